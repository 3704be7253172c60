"""Tests: python -m pytest. Each holds the code against something independent of it."""

import contextlib
import copy
import csv
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, fields
from functools import partial
from inspect import getsource
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import nbclient
import nbformat
import numpy as np
import pytest
import scipy.io.wavfile
import scipy.stats
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from sklearn.cluster import KMeans
from sklearn.metrics.cluster import contingency_matrix
from sklearn.preprocessing import MinMaxScaler

import data
import dr

HERE = Path(__file__).parent
os.environ["OMP_NUM_THREADS"] = "1"  # of what is started here: small models gain nothing from more threads,
torch.set_num_threads(1)  # and lose much where the machine does something else, too

# --- helpers --------------------------------------------------------------------------------------

SHAPES = {"audio": (1, 16, 12), "visual": (2, 3, 16, 16), "text": (5, 7)}
THREE = SHAPES
TWO = {m: SHAPES[m] for m in ("audio", "visual")}
COMPARES = [name for name, method in dr.METHODS.items() if method is not dr.joint]  # modalities with each other


class Tiny(torch.nn.Module):
    """An encoder without batch-norm, dropout or kinks: its loss is smooth, and linear in the batch."""

    def __init__(self, shape):
        super().__init__()
        self.width = 8
        self.layer = torch.nn.LazyLinear(8)
        self.layer(torch.zeros(1, *shape).flatten(1))

    def forward(self, x):
        return torch.tanh(self.layer(x.flatten(1)))


dr.ENCODERS["tiny"] = Tiny
dr.CHOICES["encoder"].append("tiny")


def blobs(sizes, seed=0):
    """Well separated clusters, given as {class: size} each -> features (N, 2), labels (N,)."""
    rng = np.random.default_rng(seed)
    features = []
    labels = []
    for k, blob in enumerate(sizes):
        for c, n in blob.items():
            features.append(100 * k + rng.normal(size=(n, 2)))
            labels.append(np.full(n, c))
    return np.concatenate(features), np.concatenate(labels)


def draw_batch(shapes, n=12, classes=4):
    """Random inputs and labels, of which every class has some."""
    return {m: torch.randn(n, *shape) for m, shape in shapes.items()}, torch.arange(n) % classes


def gradients(model, method, inputs, labels, **more):
    """What a method leaves in .grad -> {name: gradient}. Before it, torch is seeded."""
    model.zero_grad()
    torch.manual_seed(0)
    method(model, inputs, labels, **{"t": 0.25, **more})
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def back_propagated(model, loss):
    """The gradients of one loss -> {name: gradient}, 0 where it does not reach."""
    model.zero_grad()
    loss.backward(retain_graph=True)
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def assert_close(found, expected, **tolerance):
    """Two {name: tensor} hold the same."""
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], **{"rtol": 1e-4, "atol": 1e-6, **tolerance}, msg=name)


def without_seconds(history):
    return [{k: v for k, v in e.items() if k != "seconds"} for e in history]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    data.prepare("demo", out=folder, clips=160)  # 76 / 23 / 61
    return folder


def config(prepared, out, **more):
    more = {"epochs": 6, "every": 2, "times": 1, "batch_size": 16, "name": "run", "device": "cpu", **more}
    return dr.Config(**{"dataset": "demo", "data": str(prepared), "out": str(out), "augment": False, **more})


@pytest.fixture(scope="session")
def run(prepared, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    return out / "run", dr.train(config(prepared, out))


def write_dataset(folder, specs, counts, n_classes):
    """A prepared dataset of noise, with a trace of the class in feature sequences."""
    rng = np.random.default_rng(0)
    ids = {}
    for split, n in zip(("train", "val", "test"), counts):
        (folder / split).mkdir(parents=True)
        labels = np.arange(n) % n_classes
        np.save(folder / split / "labels.npy", labels)
        for m, spec in specs.items():
            shape = (n, *spec["shape"])
            array = np.lib.format.open_memmap(folder / split / f"{m}.npy", "w+", spec["dtype"], shape)
            for k in range(n):
                if spec["kind"] == "sequence":
                    array[k] = rng.normal(size=spec["shape"]) + labels[k]
                else:
                    array[k] = rng.integers(256, size=spec["shape"], dtype=np.uint8)
        ids[split] = [str(k) for k in range(n)]
    manifest = {"dataset": folder.name, "options": {}, "classes": [f"c{k}" for k in range(n_classes)]}
    manifest |= {"modalities": specs, "splits": ids, "skipped": []}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="session")
def sequences(tmp_path_factory):
    """A folder with a dataset of three feature sequences, like CMU-MOSI but of another name."""
    folder = tmp_path_factory.mktemp("sequences")
    specs = {}
    for m, width in {"text": 8, "audio": 5, "vision": 4}.items():
        specs[m] = {"kind": "sequence", "shape": [6, width], "dtype": "float32"}
    write_dataset(folder / "mine", specs, (48, 24, 24), 3)
    return folder


def command(*words, **more):
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=HERE, **more)


def dr_main(*words):
    """`python dr.py words`, but in this process: importing PyTorch takes longer than most of what is tested."""
    told = io.StringIO()
    complained = io.StringIO()
    code = 0
    with (
        mock.patch.object(sys, "argv", ["dr.py", *map(str, words)]),
        contextlib.redirect_stdout(told),
        contextlib.redirect_stderr(complained),
    ):
        try:
            dr.main()
        except SystemExit as end:
            code = end.code
    return SimpleNamespace(returncode=code, stdout=told.getvalue(), stderr=complained.getvalue())


def assert_one_line(done, *says):
    """It ended with exit code 2 and one line that says what is wrong; argparse puts a page of usage before its line."""
    complaint = done.stderr.strip().splitlines()
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert len(complaint) == 1 or complaint[0].startswith("usage: "), done.stderr
    for word in says:
        assert word in complaint[-1]


# --- 1, 2  encoders, fusion, the model ------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["resnet18", "small", "vit"])
def test_encoders_give_one_feature_vector_per_sample(encoder):
    shapes = {"audio": (1, 64, 40), "visual": (2, 3, 64, 64), "flow": (3, 2, 64, 64)}
    model = dr.MultimodalModel(shapes, 5, encoder).eval()
    inputs, _ = draw_batch(shapes, 3)
    features = model.features(inputs)
    width = {"resnet18": 512, "small": 96, "vit": 128}[encoder]
    assert {f.shape for f in features.values()} == {(3, width)}
    assert model(inputs).shape == (3, 5)
    stack = inputs["visual"]  # a stack of frames is the mean of its frames
    one_by_one = torch.stack([model.encoders["visual"](stack[:, [t]]) for t in range(2)]).mean(0)
    torch.testing.assert_close(features["visual"], one_by_one, rtol=1e-4, atol=1e-5)


def test_resnet18_starts_as_the_official_code_does():
    torch.manual_seed(0)
    model = dr.MultimodalModel({"audio": (1, 128, 300)}, 6)
    network = model.encoders["audio"].network
    conv = network.layer4[0].conv1.weight  # fan_out 512 * 9
    assert conv.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)
    assert network.conv1.weight.shape == (64, 1, 7, 7)
    scale = network.layer4[0].bn1
    assert scale.weight.mean().item() == pytest.approx(1, abs=0.01)
    assert scale.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert scale.bias.eq(0).all()


@pytest.mark.parametrize("shapes", [TWO, THREE])
@pytest.mark.parametrize("fusion", ["concat", "sum"])
def test_parts_sum_to_the_logits(fusion, shapes):
    torch.manual_seed(0)
    model = dr.MultimodalModel(shapes, 4, "small", fusion)
    features = model.features(draw_batch(shapes)[0])
    parts = model.fusion.parts(features)
    assert list(parts) == list(shapes)
    torch.testing.assert_close(sum(parts.values()), model.fusion(features), rtol=1e-5, atol=1e-6)
    changed = {m: x + 1 if m == "audio" else x for m, x in features.items()}
    for m, part in model.fusion.parts(changed).items():  # each is a matter of its own modality alone
        assert torch.equal(part, parts[m]) == (m != "audio")


@pytest.mark.parametrize("fusion", list(dr.FUSIONS))
def test_bf16_gives_fp32_features_and_logits_and_does_not_leak(fusion):
    torch.manual_seed(0)
    kind = dr.BottleneckModel if fusion == "mbt" else dr.MultimodalModel
    model = kind(TWO, 4, "small", fusion).eval()
    inputs, _ = draw_batch(TWO)
    exact = model(inputs)
    model.bf16 = True
    near = model(inputs)
    assert near.dtype == torch.float32 and {x.dtype for x in model.features(inputs).values()} == {torch.float32}
    assert not torch.equal(exact, near)
    torch.testing.assert_close(exact, near, rtol=0.1, atol=0.1)
    assert not torch.is_autocast_enabled("cpu")
    torch.testing.assert_close(copy.deepcopy(model)(inputs), near)
    if fusion != "mbt":  # as the notebook calls it, part by part
        torch.testing.assert_close(model.fusion(model.features(inputs)), near)


def test_a_run_in_bf16_is_near_one_in_fp32(prepared, tmp_path):
    exact = dr.train(config(prepared, tmp_path / "fp32", precision="fp32", epochs=2))
    near = dr.train(config(prepared, tmp_path / "bf16", precision="bf16", epochs=2))
    assert not torch.is_autocast_enabled("cpu")
    assert exact[0]["loss"] != near[0]["loss"] == pytest.approx(exact[0]["loss"], abs=0.05)
    weights = torch.load(tmp_path / "bf16/run/best.pt", weights_only=True)["model"]
    assert {v.dtype for v in weights.values() if v.is_floating_point()} == {torch.float32}


# --- 3  diagnosing --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_purity_is_scikit_learns_contingency_matrix(seed):
    rng = np.random.default_rng(seed)
    n = rng.integers(30, 200)
    width = rng.integers(1, 20)
    c = rng.integers(2, 8)
    labels = rng.integers(c, size=n)
    features = (rng.normal(size=(n, width)) + labels[:, None] * rng.random()).astype(np.float32)
    clusters = KMeans(c, n_init=10, random_state=0).fit_predict(MinMaxScaler((-1, 1)).fit_transform(features))
    expected = contingency_matrix(labels, clusters).max(0).sum() / n
    assert dr.purity(features, labels, c) == pytest.approx(expected, abs=1e-12)
    assert dr.purity(torch.tensor(features), torch.tensor(labels), c) == pytest.approx(expected, abs=1e-12)


def test_purity_by_hand():
    assert dr.purity(*blobs([{0: 5}, {1: 5}, {2: 5}]), 3) == 1
    assert dr.purity(*blobs([{0: 3, 1: 2}, {1: 4, 0: 1}]), 2) == 7 / 10
    assert dr.purity(*blobs([{0: 2, 1: 2}, {0: 2, 1: 2}]), 2) == 1 / 2
    assert dr.purity(*blobs([{0: 3, 1: 2}]), 1) == 3 / 5


def test_purity_does_not_depend_on_names_of_classes_or_places_of_clusters():
    sizes = [{0: 6, 1: 2}, {1: 5}, {2: 4, 0: 3}]
    x, y = blobs(sizes)
    for names in ([2, 0, 1], [7, -3, 40]):
        assert dr.purity(x, np.array(names)[y], 3) == dr.purity(x, y, 3) == 15 / 20
    assert dr.purity(*blobs(sizes[::-1]), 3) == 15 / 20
    order = np.random.default_rng(1).permutation(len(y))
    assert dr.purity(x[order], y[order], 3) == 15 / 20


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_purity_of_a_collapsed_encoder_is_the_share_of_the_largest_class():
    y = np.array([0, 0, 0, 1, 1, 2])
    assert dr.purity(np.ones((6, 4)), y, 3) == 1 / 2
    assert dr.purity(np.repeat([[0.0], [1.0]], 3, 0), y, 3) == 5 / 6  # two distinct points, one cluster empty


@pytest.mark.parametrize(
    "features, labels, error, says",
    [
        (np.ones((3, 2)), np.arange(3), ValueError, "as many samples"),
        (np.ones((9, 2)), np.arange(8), ValueError, r"\(9, 2\) and \(8,\)"),
        (np.ones((9, 2, 2)), np.arange(9), ValueError, "features"),
        (np.full((9, 2), np.nan), np.arange(9), FloatingPointError, "not finite"),
        (np.full((9, 2), np.inf), np.arange(9), FloatingPointError, "not finite"),
    ],
)
def test_purity_says_what_is_wrong(features, labels, error, says):
    with pytest.raises(error, match=says):
        dr.purity(features, labels, 4)


def test_the_gap_is_the_distance_of_the_two_purities():
    train = blobs([{0: 5}, {1: 5}])
    val = blobs([{0: 3, 1: 2}, {1: 4, 0: 1}])
    assert dr.purity_gap(*train, *val, 2) == pytest.approx((1.0, 0.7, 0.3))
    assert dr.purity_gap(*val, *train, 2) == pytest.approx((0.7, 1.0, 0.3))


def test_a_diagnosis_is_each_modalitys_gap_and_changes_nothing(prepared):
    dataset = data.load("demo", prepared)
    torch.manual_seed(0)
    model = dr.MultimodalModel(dataset.shapes, 6)
    before = copy.deepcopy(model.state_dict())
    torch.set_num_threads(3)
    found = dr.diagnose(model, dataset.train, dataset.val, 6, n_init=3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert threads == 3
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    splits = []
    with torch.no_grad():
        for split in (dataset.train, dataset.val):
            batches = list(data.batches(split, 128))
            labels = torch.cat([y for _, y in batches])
            splits.append(({m: torch.cat([model.eval().encoders[m](x[m]) for x, _ in batches]) for m in found}, labels))
    (x_train, y_train), (x_val, y_val) = splits
    assert list(found) == ["audio", "visual"]
    for m in found:
        assert found[m] == dr.purity_gap(x_train[m], y_train, x_val[m], y_val, 6, n_init=3)


# --- 4  re-learning -------------------------------------------------------------------------------


def test_interpolation_against_numpy():
    torch.manual_seed(0)
    model = dr.MultimodalModel(SHAPES, 4)
    init = dr.initial_weights(model)["audio"]
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn_like(p)
    before = copy.deepcopy(model.state_dict())
    a = dr.relearning_strength(0.3, 3)
    assert a == pytest.approx(np.tanh(0.9))
    dr.soft_reinit(model.encoders["audio"], init, a)
    treated = {f"encoders.audio.{name}" for name, _ in model.encoders["audio"].named_parameters()}
    for name, now in model.state_dict().items():
        if name in treated:
            theta = before[name].double().numpy()
            theta_init = init[name.removeprefix("encoders.audio.")].double().numpy()
            np.testing.assert_allclose(now.numpy(), (1 - a) * theta + a * theta_init, rtol=1e-5, atol=1e-6)
            assert not torch.equal(now, before[name])
        else:  # other modalities, the head, running statistics
            assert torch.equal(now, before[name]), name


@pytest.mark.parametrize("strength", [0, 1])
def test_strengths_0_and_1_are_exact(strength):
    encoder = dr.small_resnet((3, 16, 16))
    init = copy.deepcopy(encoder.state_dict())
    with torch.no_grad():
        for p in encoder.parameters():
            p += torch.randn_like(p)
    before = copy.deepcopy(encoder.state_dict())
    dr.soft_reinit(encoder, init, strength)
    for name, p in encoder.named_parameters():
        assert torch.equal(p, (before, init)[strength][name])


@pytest.mark.parametrize("strength", [1.5, -0.1, float("nan")])
def test_a_strength_out_of_range_is_refused(strength):
    with pytest.raises(ValueError, match=f"not {strength}"):
        dr.soft_reinit(torch.nn.Linear(1, 1), {}, strength)


def test_the_four_functions_run_when_pasted_under_the_import_lines():
    lines = (HERE / "dr.py").read_text().splitlines()
    imports = [line for line in lines if re.match(r"(import|from) ", line) and line != "import data"]
    four = [getsource(f) for f in (dr.purity, dr.purity_gap, dr.relearning_strength, dr.soft_reinit)]
    scope = {}
    exec("\n".join(imports + four), scope)
    _, _, gap = scope["purity_gap"](*blobs([{0: 5}, {1: 5}]), *blobs([{0: 3, 1: 2}, {1: 4, 0: 1}]), 2)
    layer = torch.nn.Linear(2, 2)
    init = {k: torch.zeros_like(v) for k, v in layer.state_dict().items()}
    expected = (1 - np.tanh(3 * gap)) * layer.weight.detach().numpy()
    scope["soft_reinit"](layer, init, scope["relearning_strength"](gap, 3))
    np.testing.assert_allclose(layer.weight.detach().numpy(), expected, rtol=1e-5)


def test_the_readmes_own_loop_runs():
    code = re.search(r"```python\n(.*?own loop.*?)```", (HERE / "README.md").read_text(), re.S)[1]
    torch.manual_seed(0)
    x = {"audio": torch.randn(40, 6), "visual": torch.randn(40, 5)}
    y = torch.arange(40) % 4
    loader = [({m: v[i : i + 8] for m, v in x.items()}, y[i : i + 8]) for i in range(0, 40, 8)]
    encoders = torch.nn.ModuleDict({m: torch.nn.Linear(v.shape[1], 8) for m, v in x.items()})
    head = torch.nn.Linear(16, 4)
    optimiser = torch.optim.SGD([*encoders.parameters(), *head.parameters()], 0.1)
    told = []

    def train_one_epoch():
        for inputs, labels in loader:
            loss = F.cross_entropy(head(torch.cat([encoders[m](inputs[m]) for m in x], 1)), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    exec(code, {"encoders": encoders, "train_loader": loader, "val_loader": loader[:2], "epochs": 21, "n_classes": 4,
                "train_one_epoch": train_one_epoch, "print": lambda *words: told.append(words)})  # fmt: skip
    assert [words[1] for words in told] == ["audio", "visual"]  # diagnosed once, after epoch 20


# --- 5  training ----------------------------------------------------------------------------------


def test_a_run_diagnoses_and_relearns_on_schedule(run):
    _, history = run
    assert [e["epoch"] for e in history] == list(range(6))
    assert [e["epoch"] for e in history if "diagnosis" in e] == [2, 4]
    assert [e["relearnt"] for e in history if "diagnosis" in e] == [True, False]  # at most once
    assert set(history[2]["diagnosis"]) == {"audio", "visual"}
    for d in history[2]["diagnosis"].values():
        assert 1 / 6 <= d["val"] <= 1
        assert d["gap"] == abs(d["train"] - d["val"])
        assert d["strength"] == pytest.approx(np.tanh(3 * d["gap"]))


def test_a_run_repeats_bit_for_bit(run, prepared, tmp_path):
    folder, history = run
    again = dr.train(config(prepared, tmp_path))
    assert without_seconds(again) == without_seconds(history)
    first = torch.load(folder / "best.pt", weights_only=True)["model"]
    second = torch.load(tmp_path / "run/best.pt", weights_only=True)["model"]
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert dr.train(config(prepared, tmp_path, seed=1, epochs=1))[0]["loss"] != history[0]["loss"]


def test_lambda_0_is_joint_training(prepared, tmp_path):
    joint = dr.train(config(prepared, tmp_path, method="joint", epochs=3, every=1))
    never = dr.train(config(prepared, tmp_path, lam=0.0, epochs=3, every=1))
    assert [(e["loss"], e["test"]) for e in joint] == [(e["loss"], e["test"]) for e in never]
    assert not any(e.get("relearnt") for e in joint)


def test_one_modality_is_the_same_code(prepared, tmp_path):
    history = dr.train(config(prepared, tmp_path, modalities="visual", epochs=3))
    assert set(history[2]["diagnosis"]) == {"visual"}


def test_accuracy_and_macro_f1_by_hand():
    scores = np.array([[3, 1, 0], [2, 1, 0], [0, 1, 0], [0, 0, 1]])  # predicts 0, 0, 1, 2
    found = dr.metrics(scores, np.array([0, 1, 1, 2]))
    assert found == pytest.approx({"accuracy": 75, "macro F1": 100 * (2 / 3 + 2 / 3 + 1) / 3})


def test_what_diverges_ends_in_one_line(prepared, tmp_path):
    words = ["--data", prepared, "--out", tmp_path, "--device", "cpu", "--epochs", 2, "--batch-size", 16]
    assert_one_line(dr_main(*words, "--lr", 1e30), "in epoch 0: try a smaller --lr")


# --- 6  other methods: rivals ---------------------------------------------------------------------


def official_parts(model, features):
    """out_m = z_m W_m^T + b / M of OGM-GE's main.py, by hand."""
    parts = {}
    start = 0
    for m, z in features.items():
        columns = model.fusion.head.weight[:, start : start + z.shape[1]]
        parts[m] = torch.mm(z, columns.T) + model.fusion.head.bias / len(features)
        start += z.shape[1]
    return parts


def official_scores(model, inputs, labels):
    """s_m, the sum over the batch of softmax(out_m)[y]."""
    with torch.no_grad():
        parts = official_parts(model, model.features(inputs))
    return {m: sum(F.softmax(out, 1)[i, y].item() for i, y in enumerate(labels)) for m, out in parts.items()}


def with_one_ahead(ahead, shapes=TWO, encoder="small", seed=0):
    """A model and a batch whose labels are what one modality says by itself."""
    torch.manual_seed(seed)
    model = dr.MultimodalModel(shapes, 4, encoder)
    inputs, _ = draw_batch(shapes)
    with torch.no_grad():
        model.fusion.head.weight *= 5
        labels = official_parts(model, model.features(inputs))[ahead].argmax(1)
    return model, inputs, labels


def equals(count):
    """A model of modalities whose encoders, inputs and parts of the logits are all the same, and a batch."""
    torch.manual_seed(0)
    names = ["a", "b", "c", "d"][:count]
    model = dr.MultimodalModel(dict.fromkeys(names, (1, 16, 12)), 4, "small")
    inputs, labels = draw_batch({"a": (1, 16, 12)})
    with torch.no_grad():
        for m in names:
            model.encoders[m].load_state_dict(model.encoders["a"].state_dict())
        columns = model.fusion.head.weight[:, : model.encoders["a"].width]
        model.fusion.head.weight.copy_(columns.repeat(1, count))
    return model, dict.fromkeys(names, inputs["a"]), labels


@pytest.mark.parametrize("ahead", ["audio", "visual"])
def test_ratios_are_ogms_official_ones_for_two_modalities(ahead):
    model, inputs, labels = with_one_ahead(ahead)
    s = official_scores(model, inputs, labels)
    found = dr.score_ratios(model, model.features(inputs), labels)
    assert found["visual"].item() == pytest.approx(s["visual"] / s["audio"], rel=1e-4)
    assert found["audio"].item() == pytest.approx(s["audio"] / s["visual"], rel=1e-4)
    assert found[ahead] > 1
    assert not found[ahead].requires_grad


@pytest.mark.parametrize("count", [2, 3, 4])
def test_equals_have_the_ratio_1_and_nothing_balances_them(count):
    model, inputs, labels = equals(count)
    assert {r.item() for r in dr.score_ratios(model, model.features(inputs), labels).values()} == {1}
    plain = gradients(model, dr.joint, inputs, labels)
    assert_close(gradients(model, dr.ogm, inputs, labels), plain, rtol=0, atol=0)
    assert_close(gradients(model, dr.opm, inputs, labels, chance=1.0), plain, rtol=0, atol=0)
    assert_close(gradients(model, dr.mlb, inputs, labels), gradients(model, dr.multitask, inputs, labels))


def test_ratios_of_three_are_to_the_mean_of_the_others():
    model, inputs, labels = with_one_ahead("text", THREE)
    model.eval()  # no dropout in the text's encoder
    s = official_scores(model, inputs, labels)
    found = dr.score_ratios(model, model.features(inputs), labels)
    assert found["text"].item() == pytest.approx(s["text"] / np.mean([s["audio"], s["visual"]]), rel=1e-4)
    assert found["audio"].item() == pytest.approx(s["audio"] / np.mean([s["text"], s["visual"]]), rel=1e-4)


@pytest.mark.parametrize("ahead", ["audio", "visual"])
def test_ogm_multiplies_what_the_published_lines_do(ahead):
    model, inputs, labels = with_one_ahead(ahead)
    s = official_scores(model, inputs, labels)
    alpha = 0.8
    ratio_v = s["visual"] / s["audio"]  # from here on as in OGM-GE's main.py
    ratio_a = 1 / ratio_v
    if ratio_v > 1:
        coeff = {"visual": 1 - np.tanh(alpha * max(ratio_v, 0)), "audio": 1}
    else:
        coeff = {"audio": 1 - np.tanh(alpha * max(ratio_a, 0)), "visual": 1}
    assert coeff[ahead] < 0.5
    plain = gradients(model, dr.joint, inputs, labels)
    expected = {}
    for name, g in plain.items():
        layer = next((m for m in coeff if f"encoders.{m}." in name), None)
        expected[name] = g * coeff[layer] if layer and len(g.size()) == 4 else g
    assert_close(gradients(model, dr.ogm, inputs, labels), expected)
    for name, g in gradients(model, dr.ogm, inputs, labels).items():  # batch-norm and the head are left alone
        assert torch.equal(g, plain[name]) or (g.dim() == 4 and f"encoders.{ahead}." in name)
    assert_close(gradients(model, dr.ogm, inputs, labels, t=0.51), plain, rtol=0, atol=0)  # the second half
    assert_close(gradients(model, dr.ogm_ge, inputs, labels, t=0.51), plain, rtol=0, atol=0)


def test_ogm_ges_noise_is_as_strong_as_the_gradient():
    model, inputs, labels = with_one_ahead("audio")
    plain = gradients(model, dr.joint, inputs, labels)
    slowed = gradients(model, dr.ogm, inputs, labels)
    noisy = gradients(model, dr.ogm_ge, inputs, labels)
    for name, g in plain.items():
        noise = noisy[name] - slowed[name]
        if g.dim() == 4:
            spread = g.std().item()  # before it is slowed, in both encoders
            if g.numel() > 4000:
                assert noise.std().item() == pytest.approx(spread, rel=0.1), name
            assert abs(noise.mean().item()) < 5 * spread / g.numel() ** 0.5
        else:
            assert noise.eq(0).all(), name


def test_multitasks_gradient_is_the_sum_of_those_of_its_losses():
    for shapes in (TWO, THREE):
        torch.manual_seed(0)
        model = dr.MultimodalModel(shapes, 4, "small").train()
        model.encoders.eval()  # no dropout in the text's encoder
        inputs, labels = draw_batch(shapes)
        features = model.features(inputs)
        parts = official_parts(model, features)
        losses = [F.cross_entropy(sum(parts.values()), labels), *(F.cross_entropy(p, labels) for p in parts.values())]
        each = [back_propagated(model, loss) for loss in losses]
        expected = {name: sum(g[name] for g in each) for name in each[0]}
        assert_close(gradients(model, dr.multitask, inputs, labels), expected)
        loss, logits = dr.multitask(model, inputs, labels, 0.0)
        torch.testing.assert_close(loss, losses[0])
        torch.testing.assert_close(logits, sum(parts.values()))


@pytest.mark.parametrize("shapes", [TWO, THREE])
def test_mlbs_pace_is_its_formula(shapes):
    model, inputs, labels = with_one_ahead("visual", shapes)
    model.encoders.eval()
    s = official_scores(model, inputs, labels)
    alpha = 0.5
    beta = 10
    plain = gradients(model, dr.multitask, inputs, labels)
    expected = dict(plain)
    k = {}
    for m in shapes:
        r = np.mean([s[n] for n in shapes if n != m]) / s[m]  # MLB's own ratio is the inverse of OGM's
        k[m] = 1 + (beta - 1) * np.tanh(alpha * (r - 1)) if r > 1 else 1 + np.tanh(alpha * (r - 1))
        for name in plain:
            if f"encoders.{m}." in name:
                expected[name] = plain[name] * k[m]
    assert k["visual"] < 1 < max(k.values())
    assert_close(gradients(model, dr.mlb, inputs, labels), expected)


def mmpareto_pieces(model, inputs, labels):
    """g and h, the gradients of L and of the sum of L_m, and their product per encoder."""
    parts = official_parts(model, model.features(inputs))
    g = back_propagated(model, F.cross_entropy(sum(parts.values()), labels))
    h = back_propagated(model, sum(F.cross_entropy(part, labels) for part in parts.values()))
    own = {m: [n for n in g if n.startswith(f"encoders.{m}.")] for m in inputs}
    return g, h, own, {m: sum((g[n] * h[n]).sum().item() for n in own[m]) for m in inputs}


@pytest.mark.parametrize("shapes", [TWO, THREE])
def test_mmpareto_where_all_agree_is_multitask_with_one_and_a_half_times_the_gradient(shapes):
    torch.manual_seed(0)
    model = dr.MultimodalModel(shapes, 4, "small")
    model.encoders.eval()
    inputs, labels = draw_batch(shapes)
    _, _, _, products = mmpareto_pieces(model, inputs, labels)
    assert min(products.values()) > 0
    plain = gradients(model, dr.multitask, inputs, labels)
    expected = {name: 1.5 * g if name.startswith("encoders.") else g for name, g in plain.items()}
    assert_close(gradients(model, dr.mmpareto, inputs, labels), expected)


def test_mmpareto_in_conflict_takes_the_point_nearest_to_0_and_shortens_nothing():
    conflicts = 0
    for seed in range(30):
        torch.manual_seed(seed)
        shapes = {"a": (1, 4, 4), "b": (1, 4, 4)}
        model = dr.MultimodalModel(shapes, 4, "tiny")
        inputs, _ = draw_batch(shapes, 4)
        inputs["a"] = inputs["a"][:1].repeat(4, 1, 1, 1)  # of which the joint logits and a's own say different things
        labels = torch.randint(4, (4,))
        with torch.no_grad():
            model.fusion.head.weight *= 10
        g, h, own, products = mmpareto_pieces(model, inputs, labels)
        found = gradients(model, dr.mmpareto, inputs, labels)
        for m in own:
            flat_g = torch.cat([g[n].flatten() for n in own[m]]).double()
            flat_h = torch.cat([h[n].flatten() for n in own[m]]).double()
            grid = torch.linspace(0, 1, 5001).double()[:, None]
            lengths = (grid * flat_g + (1 - grid) * flat_h).norm(dim=1)
            w = 0.5 if products[m] > 0 else grid[lengths.argmin()].item()
            conflicts += products[m] < 0
            for n in own[m]:
                new = 2 * w * g[n] + 2 * (1 - w) * h[n]
                whole = (g[n] + h[n]).norm()
                if new.norm() < whole:
                    new = new * whole / new.norm()
                torch.testing.assert_close(found[n], 1.5 * new, rtol=1e-2, atol=1e-3 * whole.item())
                assert found[n].norm() > 1.5 * whole * (1 - 1e-4)
        for n in set(found) - {n for names in own.values() for n in names}:
            torch.testing.assert_close(found[n], g[n] + h[n])
    assert conflicts >= 3


@pytest.mark.parametrize("shapes", [TWO, THREE])
@pytest.mark.parametrize("alpha", [1.0, 4.0])
def test_dgl_is_the_official_two_passes_and_neither_loss_reaches_the_others_weights(alpha, shapes):
    torch.manual_seed(0)
    model = dr.MultimodalModel(shapes, 4, "small")
    model.encoders.eval()
    inputs, labels = draw_batch(shapes)
    found = gradients(model, dr.dgl, inputs, labels, alpha=alpha)
    others = torch.zeros_like(labels)
    for joint_labels in (labels, others):
        features = model.features(inputs)  # from here on as in main_dgl.py
        loss = 0
        for m in shapes:
            alone = torch.cat([z if n == m else torch.zeros_like(z) for n, z in features.items()], 1)
            loss = loss + F.cross_entropy(model.fusion.head(alone), labels)
        model.zero_grad()
        (alpha * loss).backward()
        for p in model.fusion.parameters():
            p.grad = None
        joined = model.fusion.head(torch.cat([z.detach() for z in features.values()], 1))
        F.cross_entropy(joined, joint_labels).backward()
        official = {name: p.grad for name, p in model.named_parameters()}
        encoders = [name for name in official if name.startswith("encoders.")]
        assert_close({n: found[n] for n in encoders}, {n: official[n] for n in encoders})  # whatever the joint labels
        for name in set(official) - set(encoders):
            assert torch.allclose(found[name], official[name], rtol=1e-4, atol=1e-6) == (joint_labels is labels)


def seen_by_fusion(model, method, inputs, labels, **more):
    """The features that a method hands to the fusion, {modality: (B, D)}."""
    seen = []
    hook = model.fusion.register_forward_pre_hook(lambda _, args: seen.append(dict(args[0])))
    model.zero_grad()
    method(model, inputs, labels, **{"t": 0.25, **more})
    hook.remove()
    return seen[-1]


def test_opm_drops_what_is_ahead_by_the_official_chance_and_keeps_the_mean():
    model, inputs, labels = with_one_ahead("audio", encoder="tiny")
    s = official_scores(model, inputs, labels)
    q = min(1, 0.5 * (1 + 0.5 * np.tanh(s["audio"] / s["visual"] - 1)))
    theta = 8 * q / (8 + 8)
    plain = model.features(inputs)
    kept = 0
    rounds = 100
    for _ in range(rounds):
        seen = seen_by_fusion(model, dr.opm, inputs, labels, chance=1.0)
        torch.testing.assert_close(seen["visual"], plain["visual"] / (1 - theta), rtol=1e-4, atol=1e-5)  # never dropped
        keep = seen["audio"].abs().sum(1) > 0  # whole samples
        kept += keep.sum().item()
        expected = plain["audio"] * keep[:, None] / (1 - theta)
        torch.testing.assert_close(seen["audio"], expected, rtol=1e-4, atol=1e-5)
    n = rounds * len(labels)
    assert abs(kept - (1 - q) * n) < 5 * (q * (1 - q) * n) ** 0.5


def test_opm_is_off_in_warm_up_and_in_three_of_ten_batches():
    model, inputs, labels = with_one_ahead("visual", encoder="tiny")
    plain = gradients(model, dr.joint, inputs, labels)
    assert_close(gradients(model, dr.opm, inputs, labels, t=0.05, chance=1.0), plain, rtol=0, atol=0)
    torch.manual_seed(0)
    dropped = 0
    for _ in range(100):
        dropped += seen_by_fusion(model, dr.opm, inputs, labels)["visual"].eq(0).all(1).any().item()
    assert 50 < dropped < 90
    logits = model.eval()(inputs)
    torch.testing.assert_close(logits, sum(official_parts(model, model.features(inputs)).values()))


def test_of_three_modalities_opm_leaves_every_sample_one():
    lost = 0
    for seed in range(20):
        model, inputs, labels = with_one_ahead(["audio", "visual", "text"][seed % 3], THREE, "tiny", seed)
        model.eval()  # no dropout in the text's encoder
        ratios = dr.score_ratios(model, model.features(inputs), labels)
        behind = min(ratios, key=ratios.get)
        seen = seen_by_fusion(model, dr.opm, inputs, labels, chance=1.0, base=1.0)
        gone = torch.stack([x.eq(0).all(1) for x in seen.values()])
        lost += (gone.sum(0) == 2).sum().item()
        assert not gone.all(0).any() and not seen[behind].eq(0).all(1).any()
    assert lost > 0  # some have lost two


@pytest.mark.parametrize("fusion", ["concat", "sum"])
@pytest.mark.parametrize("method", list(dr.METHODS))
def test_every_method_leaves_a_gradient_in_every_parameter(method, fusion):
    torch.manual_seed(0)
    model = dr.MultimodalModel(THREE, 4, "small", fusion)
    inputs, labels = draw_batch(THREE)
    loss, logits = dr.METHODS[method](model, inputs, labels, 0.25)
    assert logits.shape == (12, 4) and loss.isfinite()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        assert p.grad.dtype == p.dtype


@pytest.mark.parametrize("method", list(dr.METHODS))
def test_every_method_runs_with_three_modalities(method, sequences, tmp_path, monkeypatch):
    monkeypatch.setattr(dr, "draw_curves", lambda *words: None)
    history = dr.train(config(sequences, tmp_path, dataset="mine", method=method, epochs=2, every=1, n_init=2))
    assert set(history[1]["diagnosis"]) == {"text", "audio", "vision"}
    assert history[1]["relearnt"] == (method in dr.RELEARNING)
    assert history[1]["loss"] < history[0]["loss"] * 1.5


@pytest.mark.parametrize("method", COMPARES)
def test_what_compares_modalities_is_refused_where_it_is_undefined(method, prepared, tmp_path):
    assert not dr.why_undefined(dr.Config(method=method, fusion="sum"), 3)
    for more, count in (({}, 1), ({"fusion": "film"}, 2), ({"fusion": "gated"}, 2), ({"fusion": "mbt"}, 2)):
        assert f"--method {method} compares modalities" in dr.why_undefined(dr.Config(method=method, **more), count)
    base = ["--data", prepared, "--out", tmp_path, "--method", method]
    assert_one_line(dr_main(*base, "--modalities", "audio"), "two or more")
    assert_one_line(dr_main(*base, "--fusion", "mbt"), "concat or sum")


def test_a_sweep_leaves_out_what_is_undefined():
    base = asdict(dr.Config()) | {"name": ""}
    found = dr.expand(["method=joint,ogm", "modalities=audio,visual,audio+visual"], base)
    pairs = [(c.method, c.modalities) for c in found]
    assert pairs == [("joint", "audio"), ("joint", "visual"), ("joint", "audio+visual"), ("ogm", "audio+visual")]


# --- 6  other methods: D&R with one thing changed -------------------------------------------------


def relearnt_by(method, gaps):
    """A model whose weights are 1, whose statistics are 2 and whose momenta are 3, re-learnt towards 0; with its
    optimiser and the strengths."""
    torch.manual_seed(0)
    model = dr.MultimodalModel(dict.fromkeys(gaps, (1, 16, 12)), 4, "small")
    optimiser = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    initial = {}
    for m, weights in dr.initial_weights(model).items():
        initial[m] = {k: torch.zeros_like(v) for k, v in weights.items()}
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1)
            optimiser.state[p]["momentum_buffer"] = torch.full_like(p, 3)
        for buffer in model.buffers():
            buffer.fill_(2)
    return model, optimiser, dr.RELEARNING[method](model, initial, gaps, 3.0, optimiser)


@pytest.mark.parametrize("method", list(dr.RELEARNING))
def test_strengths_of_the_ablations_by_hand(method):
    gaps = {"a": 0.1, "b": 0.4, "c": 0.2}
    tanh = {m: np.tanh(3 * g) for m, g in gaps.items()}
    expected = {
        "dr-same": dict.fromkeys(gaps, np.tanh(0.7)),
        "dr-hard": dict.fromkeys(gaps, 1),
        "dr-largest": {"a": 0, "b": tanh["b"], "c": 0},
        "dr-smallest": {"a": tanh["a"], "b": 0, "c": 0},
    }.get(method, tanh)
    model, optimiser, strengths = relearnt_by(method, gaps)
    assert strengths == pytest.approx(expected)
    for m, strength in expected.items():
        for p in model.encoders[m].parameters():
            if method != "dr-new":
                torch.testing.assert_close(p, torch.full_like(p, 1 - strength))
            momentum = 0 if method == "dr-momentum" else 3
            assert optimiser.state[p]["momentum_buffer"].eq(momentum).all()
        for buffer in model.encoders[m].buffers():
            statistic = method == "dr-statistics" and buffer.is_floating_point()
            torch.testing.assert_close(buffer, torch.full_like(buffer, 2 * (1 - strength) if statistic else 2))
    assert all(p.eq(1).all() for p in model.fusion.parameters())
    assert all(optimiser.state[p]["momentum_buffer"].eq(3).all() for p in model.fusion.parameters())


def test_dr_new_goes_towards_new_random_weights():
    first, _, _ = relearnt_by("dr-new", {"a": 0.5})
    weights = first.encoders["a"].network[3].conv1.weight.detach()
    a = np.tanh(1.5)
    new = (weights - (1 - a)) / a  # what it was drawn to: kaiming's, not 0
    assert new.std().item() == pytest.approx((2 / (len(weights) * 9)) ** 0.5, rel=0.1)
    assert abs(new.mean().item()) < 0.01


def test_without_momentum_dr_momentum_simply_works(prepared, tmp_path):
    history = dr.train(config(prepared, tmp_path, method="dr-momentum", momentum=0.0, epochs=3))
    assert history[2]["relearnt"]


@pytest.mark.parametrize("method", [m for m in dr.RELEARNING if m.startswith("dr-")])
def test_an_ablation_is_dr_until_it_first_relearns(method, run, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(dr, "draw_curves", lambda *words: None)
    _, history = run
    other = dr.train(config(prepared, tmp_path, method=method, epochs=4))
    assert [e["loss"] for e in other[:3]] == [e["loss"] for e in history[:3]] and other[2]["relearnt"]
    # what the running statistics hold is not used in training: that ablation must not change it
    assert (other[3]["loss"] == history[3]["loss"]) == (method == "dr-statistics")


# --- 7  other encoders and fusions ----------------------------------------------------------------


def test_sequences_are_averaged_over_what_is_not_padding():
    torch.manual_seed(0)
    encoder = dr.SequenceTransformer((6, 4)).eval()
    x = torch.randn(2, 6, 4)
    x[0, 3:] = 0
    other = x.clone()
    other[1] = 7  # another sample of the batch
    with torch.no_grad():
        assert torch.allclose(encoder(x)[0], encoder(other)[0], atol=1e-6)
        short = dr.SequenceTransformer((3, 4)).eval()
        short.load_state_dict({k: v[:3] if k == "position" else v for k, v in encoder.state_dict().items()})
        torch.testing.assert_close(encoder(x)[:1], short(x[:1, :3]), rtol=1e-4, atol=1e-5)
        assert encoder(torch.zeros(1, 6, 4)).isfinite().all()


PAIRS = [("small", fusion) for fusion in dr.FUSIONS]
PAIRS += [("resnet18", "concat"), ("resnet18", "mbt"), ("vit", "concat"), ("vit", "mbt")]


@pytest.mark.parametrize("encoder, fusion", PAIRS)
def test_every_pair_learns_and_relearning_changes_only_what_is_a_modalitys_own(encoder, fusion):
    torch.manual_seed(0)
    shapes = TWO if fusion in ("film", "gated") else THREE
    dataset = SimpleNamespace(shapes=shapes, classes=range(4))
    model = dr.make_model(dr.Config(encoder=encoder, fusion=fusion), dataset)
    initial = dr.initial_weights(model)
    inputs, labels = draw_batch(shapes)
    optimiser = torch.optim.SGD(model.parameters(), 0.01, 0.9)
    losses = [dr.step(model, optimiser, inputs, labels)[0].item() for _ in range(5)]
    assert min(losses[2:]) < losses[0]
    assert all(p.grad is not None for p in model.parameters())  # nothing is left out of the graph
    before = copy.deepcopy(model.state_dict())
    gaps = dict.fromkeys(shapes, 0.0) | {"audio": 0.2}
    dr.relearn(model, initial, gaps, 3.0)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    own = ["encoders.audio."] + ["fusion.layers.audio."] * (fusion == "mbt")
    ours = {k for k, _ in model.named_parameters() if k.startswith(tuple(own))}
    unmoved = ours - changed  # biases that the loss does not feel, such as that of attention's keys
    assert changed <= ours and all(torch.allclose(before[k], torch.zeros(()), atol=1e-3) for k in unmoved)
    assert len(changed) > 0.9 * len(ours)


def by_hand(layer, x):
    """A linear layer in NumPy."""
    return x @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()


def test_fusions_are_their_formulas():
    torch.manual_seed(0)
    x = {"a": torch.randn(5, 3), "b": torch.randn(5, 4)}
    a = x["a"].double().numpy()
    b = x["b"].double().numpy()
    fusions = {name: dr.FUSIONS[name]({"a": 3, "b": 4}, 6) for name in ("concat", "sum", "film", "gated")}
    scale = by_hand(fusions["film"].film, a)
    gate = 1 / (1 + np.exp(-by_hand(fusions["gated"].gate, a)))
    expected = {
        "concat": by_hand(fusions["concat"].head, np.concatenate([a, b], 1)),
        "sum": by_hand(fusions["sum"].heads["a"], a) + by_hand(fusions["sum"].heads["b"], b),
        "film": by_hand(fusions["film"].head, scale[:, :4] * b + scale[:, 4:]),
        "gated": by_hand(fusions["gated"].head, gate * by_hand(fusions["gated"].value, b)),
    }
    for name, fusion in fusions.items():
        np.testing.assert_allclose(fusion(x).detach().numpy(), expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fusion", ["film", "gated"])
def test_fusions_of_a_pair_refuse_three(fusion, sequences, tmp_path):
    words = ["--dataset", "mine", "--data", sequences, "--out", tmp_path, "--fusion", fusion]
    assert_one_line(dr_main(*words), "two modalities, not 3: name two with --modalities")


@pytest.mark.parametrize("layers, additive", [(1, True), (2, False)])
def test_modalities_meet_in_the_bottleneck_only(layers, additive):
    torch.manual_seed(0)
    fusion = dr.Bottleneck({"a": 3, "b": 4}, 6, width=8, layers=layers).eval()
    a = torch.randn(2, 1, 5, 3)
    b = torch.randn(2, 1, 7, 4)
    f = {(i, j): fusion({"a": (a[i], None), "b": (b[j], None)}) for i in (0, 1) for j in (0, 1)}
    mixed = f[0, 0] - f[0, 1] - f[1, 0] + f[1, 1]
    # after one layer, neither has yet seen the other
    assert torch.allclose(mixed, torch.zeros(()), atol=1e-5) == additive


def test_mbt_does_not_see_padding():
    torch.manual_seed(0)
    shapes = {"text": (6, 4), "vision": (5, 3)}
    model = dr.BottleneckModel(shapes, 3, fusion="mbt").eval()
    inputs, _ = draw_batch(shapes, 2)
    inputs["text"][0, 3:] = 0
    short = dr.BottleneckModel(shapes | {"text": (3, 4)}, 3, fusion="mbt").eval()
    short.load_state_dict({k: v[:3] if k == "encoders.text.position" else v for k, v in model.state_dict().items()})
    shortened = {"text": inputs["text"][:1, :3], "vision": inputs["vision"][:1]}
    with torch.no_grad():
        torch.testing.assert_close(model(inputs)[:1], short(shortened), rtol=1e-4, atol=1e-5)


# --- 8  runs: settings ----------------------------------------------------------------------------


def test_names_of_runs_tell_what_is_not_default():
    assert dr.Config().name == dr.Config(epochs=30, lam=3.0, device="cpu").name == "demo-dr-0"
    c = dr.Config("cremad", "joint", modalities="audio,visual", lam=1.0, augment=True, seed=7)
    assert c.name == "cremad-joint-audio+visual-augment=True-lam=1.0-7"


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"name": "x", "fusion": "mbt", "augment": False, "noise_audio": 0.5},
        {"dataset": "mosi", "every": 2, "track_purity": True},
        {"dataset": "mine", "augment": True, "modalities": "text", "lr": 1e-5, "seed": 3, "device": "cuda:1"},
    ],
)
def test_a_runs_caption_makes_the_run(given):
    c = dr.Config(**given)
    assert dr.Config(**dr.parse(dr.flags_of(c))[0]) == c


def test_every_flag_round_trips():
    assert dr.parse(["--augment"])[0]["augment"] is True
    assert dr.parse(["--no-augment"])[0]["augment"] is False
    assert dr.Config(**dr.parse(["--augment", "--no-track-purity"])[0]) == dr.Config()  # the demo's
    assert set(dr.parse([])[0]) == {f.name for f in fields(dr.Config)}


def test_any_prepared_folder_is_a_dataset_with_cremads_settings():
    mine = asdict(dr.Config(dataset="mine", method="joint"))
    cremad = asdict(dr.Config(dataset="cremad", method="joint"))
    assert {k for k in mine if mine[k] != cremad[k]} == {"dataset", "name"}


SILLY = [
    ("--dataset", "a/b"), ("--dataset", ".."), ("--dataset", "nowhere"), ("--method", "joined"), ("--method", "dr:1"),
    ("--modalities", "smell"), ("--modalities", "+"), ("--modalities", "audio,"), ("--encoder", "transformer"),
    ("--fusion", "concat:2"), ("--noise-audio", "nan"), ("--noise-audio", "-1"), ("--augment=1",), ("--lam", "inf"),
    ("--lam", "-0.1"), ("--every", "0"), ("--times", "-1"), ("--epochs", "0"), ("--epochs", "1.5"),
    ("--batch-size", "0"), ("--lr", "nan"), ("--lr", "-1"), ("--lr", "high"), ("--momentum", "inf"),
    ("--weight-decay", "nan"), ("--n-init", "0"), ("--track-purity=2",), ("--seed", "-1"), ("--seed", "1" + 30 * "0"),
    ("--precision", "fp16"), ("--device", "gpu"), ("--device", "cuda:7"), ("--device", "cpu:x"), ("--device", "CUDA"),
    ("--data", "dr.py"), ("--out", "dr.py"), ("--name", ".."), ("--name", "a/b"), ("--name", 300 * "x"),
    ("--sweep", "seed"), ("--jobs", "0"), ("--jobs", "two"), ("--evaluate", "nowhere.pt"), ("--evaluate", ".assets"),
    ("--tsne", "dr.py"), ("--colour", "red"), ("--evaluate",),
]  # fmt: skip


@pytest.mark.parametrize("words", SILLY, ids=" ".join)
def test_a_silly_value_gets_one_line(words, prepared, tmp_path):
    base = ["--data", prepared, "--out", tmp_path, "--epochs", 1, "--batch-size", 16, "--device", "cpu"]
    assert_one_line(dr_main(*base, *words))
    assert not list(tmp_path.iterdir()) or words[0] == "--seed"


def test_silly_values_of_every_flag_have_been_tried():
    tried = {words[0].partition("=")[0] for words in SILLY}
    assert {"--" + f.name.replace("_", "-") for f in fields(dr.Config)} <= tried


def test_a_dataset_that_is_not_there(tmp_path):
    done = dr_main("--dataset", "cremad", "--data", tmp_path)
    assert done.returncode == 2
    assert "git clone" in done.stderr and "python data.py cremad --raw CREMA-D" in done.stderr
    assert "--dataset demo" in done.stderr and "Traceback" not in done.stderr


# --- 8  runs: stopped, and resumed ----------------------------------------------------------------

RUNNER = """
import json, os, sys, torch, dr
torch.set_num_threads(1)
dr.CHECKPOINT_SECONDS = 0
for line in sys.stdin:
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        dr.train(dr.Config(**json.loads(line)))
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="session")
def runner():
    """A process that has imported dr.py once and forks for every run; it saves a checkpoint before every epoch.
    -> start(config), which returns the number of the process, and finish(), its exit code."""
    words = [sys.executable, "-c", RUNNER]
    with subprocess.Popen(words, cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def start(config):
            process.stdin.write(json.dumps(asdict(config)) + "\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        def finish():
            return int(process.stdout.readline())

        yield start, finish
        process.stdin.close()


def left_by(folder):
    """What a finished run leaves, but for the seconds that it took: its log, summary, and tensors."""
    log = without_seconds([json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()])
    summary = json.loads((folder / "summary.json").read_text())
    best = torch.load(folder / "best.pt", weights_only=True)
    tensors = {("best", k): v for k, v in best["model"].items()}
    for m, state in torch.load(folder / "initial.pt", weights_only=True)["initial"].items():
        tensors |= {(m, k): v for k, v in state.items()}
    tensors["logits"] = torch.tensor(np.load(folder / "test.npz")["logits"])
    kept = ("name", "accuracy", "macro F1", "probe", "strength")
    return log, {k: summary[k] for k in kept} | {"epoch": best["epoch"]}, tensors


@pytest.mark.parametrize("more", [{"fusion": "mbt", "augment": True}, {"method": "ogm-ge"}])  # what draws
def test_killed_at_any_time_a_run_comes_out_as_the_undisturbed_one(more, runner, prepared, tmp_path):
    start, finish = runner
    more = {"epochs": 6, "times": 2, "n_init": 2, **more}
    began = time.monotonic()
    start(config(prepared, tmp_path / "whole", **more))
    assert finish() == 0
    lasted = time.monotonic() - began
    kills = 0
    code = -signal.SIGKILL
    while code == -signal.SIGKILL:
        child = start(config(prepared, tmp_path / "torn", **more))
        if kills < 12:
            time.sleep(random.random() * lasted / 6)
            with contextlib.suppress(ProcessLookupError):  # it has finished
                os.kill(child, signal.SIGKILL)
        kills += 1
        code = finish()
    assert code == 0 and kills > 10  # the last one was not killed
    log, summary, tensors = left_by(tmp_path / "whole/run")
    log_again, summary_again, tensors_again = left_by(tmp_path / "torn/run")
    assert len(log) == 6 and log == log_again
    assert summary == summary_again
    assert tensors.keys() == tensors_again.keys()
    assert all(torch.equal(v, tensors_again[k]) for k, v in tensors.items())
    names = {"best.pt", "config.json", "curves.png", "initial.pt", "log.jsonl", "summary.json", "test.npz"}
    assert {f.name for f in (tmp_path / "torn/run").iterdir()} - names <= {"last.new", "initial.new", "best.new"}


@pytest.fixture
def stopped(prepared, tmp_path, monkeypatch):
    """A run that Ctrl-C has stopped in its second epoch -> its words, its last.pt."""
    monkeypatch.setattr(dr, "CHECKPOINT_SECONDS", 0)
    words = ["--data", prepared, "--out", tmp_path, "--epochs", 2, "--batch-size", 16, "--device", "cpu",
             "--name", "run"]  # fmt: skip
    report = dr.report_epoch

    def press_in_the_second_epoch(config, history):
        if len(history) == 2:
            raise KeyboardInterrupt
        report(config, history)

    with monkeypatch.context() as patch:
        patch.setattr(dr, "report_epoch", press_in_the_second_epoch)
        done = dr_main(*words)
    assert done.returncode == 130
    assert done.stderr.strip() == "stopped; the same command resumes from the last checkpoint"
    return words, tmp_path / "run/last.pt"


def test_ctrl_c_and_the_same_command_again(stopped):
    words, last = stopped
    done = dr_main(*words)
    assert done.returncode == 0 and "resumes after epoch 0 of 1" in done.stdout
    assert not last.exists()
    assert [json.loads(x)["epoch"] for x in (last.parent / "log.jsonl").read_text().splitlines()] == [0, 1]
    assert dr_main(*words).stdout.count("epoch   0") == 1  # what is finished is done anew when asked for


def test_what_cannot_be_resumed_gets_one_line(stopped):
    words, last = stopped
    whole = last.read_bytes()
    content = torch.load(last, weights_only=True)
    other = "last.pt is of an unfinished run with another lr: finish that, delete its folder, or"
    assert_one_line(dr_main(*words, "--lr", 0.5), other)
    for spoilt in (b"", whole[:5000], whole[:-100], b"no checkpoint"):
        last.write_bytes(spoilt)
        assert_one_line(dr_main(*words), "last.pt is no checkpoint that this dr.py wrote, or it is damaged")
    older = {"config": content["config"] | {"colour": 1}}
    config_alone = {"config": content["config"]}
    without_optimiser = {k: v for k, v in content.items() if k != "optimiser"}
    other_model = content | {"model": {"weight": torch.ones(1)}}
    other_optimiser = content | {"optimiser": {"state": {}, "param_groups": []}}
    for foreign in (older, config_alone, without_optimiser, other_model, other_optimiser, [1]):
        torch.save(foreign, last)
        assert_one_line(dr_main(*words), "last.pt")
    last.write_bytes(whole)
    assert "resumes after epoch 0 of 1" in dr_main(*words).stdout


def test_a_disk_that_fills_up_loses_nothing(prepared, tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")  # there is none on Windows
    monkeypatch.setattr(dr, "CHECKPOINT_SECONDS", 0)
    words = ["--data", prepared, "--out", tmp_path, "--epochs", 3, "--batch-size", 16, "--device", "cpu",
             "--name", "run"]  # fmt: skip
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    report = dr.report_epoch

    def fill(config, history):  # after the second epoch no file may grow beyond half a checkpoint
        report(config, history)
        if len(history) == 2:
            half = (tmp_path / "run/last.pt").stat().st_size // 2
            resource.setrlimit(resource.RLIMIT_FSIZE, (half, unlimited[1]))

    with monkeypatch.context() as patch:
        patch.setattr(dr, "report_epoch", fill)
        try:
            done = dr_main(*words)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert_one_line(done, "File too large", "the same command resumes")
    assert not list(tmp_path.rglob("*.new"))  # the room is given back
    assert "resumes after epoch 0 of 2" in dr_main(*words).stdout
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == 3


# --- 8  runs: several processes -------------------------------------------------------------------

# In single precision two orders of adding up differ by enough to move a point to another cluster.
IN_DOUBLE_PRECISION = """
import data, torch
in_single_precision = data.normalise
data.normalise = lambda *args: in_single_precision(*args).double()
torch.set_default_dtype(torch.float64)
"""
RANK = """
settings = json.loads(sys.argv[1])
methods = sys.argv[2:]
dr.draw_curves = lambda *words: None
dr.dist.destroy_process_group = lambda: None  # the next run needs it
from_main = dr.from_main


def keep_the_weights_of_every_process(work, *args):
    if work is dr.finish_run:
        torch.save(args[1].state_dict(), args[0].folder / f"rank{dr.ranks()[0]}.pt")
    return from_main(work, *args)


dr.from_main = keep_the_weights_of_every_process
for method in methods:
    dr.train(dr.Config(**settings, method=method, name=method))
rank, world = dr.ranks()
for method in ("ogm", "mlb", "mmpareto"):
    model, inputs, labels = small_problem()
    inputs = {m: x[rank::world] for m, x in inputs.items()}
    optimiser = torch.optim.SGD(model.parameters(), 0.0)
    dr.step(model, optimiser, inputs, labels[rank::world], dr.METHODS[method])
    if rank == 0:
        torch.save({n: p.grad for n, p in model.named_parameters()}, settings["out"] + f"/{method}.pt")
"""


def small_problem():
    torch.manual_seed(0)
    model = dr.MultimodalModel({"audio": (1, 16, 12), "visual": (2, 3, 16, 16)}, 4, "tiny")
    with torch.no_grad():
        model.fusion.head.weight *= 10
    inputs = {"audio": torch.randn(12, 1, 16, 12), "visual": torch.randn(12, 2, 3, 16, 16)}
    return model, inputs, torch.arange(12) % 4


@pytest.fixture(scope="session")
def two_processes(prepared, tmp_path_factory):
    """Every method, by two processes -> their folder, and the settings."""
    out = tmp_path_factory.mktemp("two")
    settings = asdict(config(prepared, out, encoder="tiny", epochs=3, every=1, n_init=2, batch_size=14, lr=0.005))
    settings = {k: v for k, v in settings.items() if k not in ("method", "name")}
    register = 'dr.ENCODERS["tiny"] = Tiny\ndr.CHOICES["encoder"].append("tiny")\n'
    sources = [IN_DOUBLE_PRECISION, "import json, sys, dr", getsource(Tiny), register, getsource(small_problem), RANK]
    (out / "rank.py").write_text("\n".join(sources))
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", out / "rank.py"]
    done = command(*launch, json.dumps(settings), *dr.METHODS, env={**os.environ, "PYTHONPATH": str(HERE)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch   0") == len(dr.METHODS)  # one of the two speaks
    return out, settings


@pytest.fixture
def double_precision(monkeypatch):
    monkeypatch.setattr(data, "normalise", data.normalise)  # is put back at the end
    exec(IN_DOUBLE_PRECISION, {})
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("method", ["joint", "multitask", "dgl", "dr"])  # linear in the batch
def test_two_processes_train_and_diagnose_as_one(method, two_processes, double_precision, tmp_path, monkeypatch):
    out, settings = two_processes
    monkeypatch.setattr(dr, "draw_curves", lambda *words: None)
    one = dr.train(dr.Config(**settings | {"method": method, "name": method, "out": str(tmp_path)}))
    log, summary, tensors = left_by(out / method)
    assert [e["relearnt"] for e in log if "diagnosis" in e] == [method == "dr", False]
    for mine, theirs in zip(one, log, strict=True):
        for key in ("loss", "train", "val", "test", "test_f1"):
            assert mine[key] == pytest.approx(theirs[key], abs=1e-5)
        for m, found in mine.get("diagnosis", {}).items():
            assert found == pytest.approx(theirs["diagnosis"][m], abs=1e-5)
    _, own_summary, own_tensors = left_by(tmp_path / method)
    assert own_summary["accuracy"] == pytest.approx(summary["accuracy"])
    assert_close(own_tensors, tensors, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", list(dr.METHODS))
def test_all_processes_end_with_the_same_weights(method, two_processes):
    out, _ = two_processes
    first = torch.load(out / method / "rank0.pt", weights_only=True)
    second = torch.load(out / method / "rank1.pt", weights_only=True)
    initial = torch.load(out / method / "initial.pt", weights_only=True)["initial"]["audio"]
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first["encoders.audio.layer.weight"], initial["layer.weight"])


@pytest.mark.parametrize("method", ["ogm", "mlb", "mmpareto"])  # each process weighs the modalities on its own share
def test_the_gradient_of_two_processes_is_the_mean_of_their_shares_gradients(method, two_processes, double_precision):
    out, _ = two_processes
    shares = []
    for rank in range(2):
        model, inputs, labels = small_problem()
        share = {m: x[rank::2] for m, x in inputs.items()}
        shares.append(gradients(model, dr.METHODS[method], share, labels[rank::2], t=0.0))
    expected = {name: (shares[0][name] + shares[1][name]) / 2 for name in shares[0]}
    assert_close(torch.load(out / f"{method}.pt", weights_only=True), expected)


# --- 9  what a run shows and leaves behind --------------------------------------------------------


def test_what_a_run_wrote_can_be_read_back(run, prepared):
    folder, history = run
    assert [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] == history
    c = dr.Config(**json.loads((folder / "config.json").read_text()))
    dataset = data.load("demo", prepared)
    model = dr.MultimodalModel(dataset.shapes, 6, c.encoder, c.fusion)
    checkpoint = torch.load(folder / "best.pt", weights_only=True)
    model.load_state_dict(checkpoint["model"])
    summary = json.loads((folder / "summary.json").read_text())
    best = max(history, key=lambda e: (e["val"], -e["epoch"]))
    assert checkpoint["epoch"] == summary["best_val"]["epoch"] == best["epoch"]
    assert dr.evaluate(model, dataset.test)["accuracy"] == summary["accuracy"] == best["test"]
    assert set(summary["probe"]) == {"audio", "visual"}
    strengths = history[2]["diagnosis"]
    assert summary["strength"] == pytest.approx({m: strengths[m]["strength"] for m in strengths})
    test = np.load(folder / "test.npz")
    assert 100 * (test["logits"].argmax(1) == test["labels"]).mean() == pytest.approx(summary["accuracy"])
    assert np.asarray(Image.open(folder / "curves.png").convert("L")).std() > 5
    assert {f.name for f in folder.iterdir()} == {
        "best.pt", "config.json", "curves.png", "initial.pt", "log.jsonl", "summary.json", "test.npz"
    }  # fmt: skip


def test_a_checkpoint_is_evaluated(run, prepared):
    folder, _ = run
    done = dr_main("--evaluate", folder / "best.pt", "--data", prepared, "--device", "cpu")
    summary = json.loads((folder / "summary.json").read_text())
    assert done.returncode == 0
    assert f"{summary['accuracy']:.1f} %" in done.stdout and f"{summary['macro F1']:.1f} %" in done.stdout


def spoilt_checkpoints(whole):
    """Files that are no checkpoint, or no longer -> {name: content}; whole is that of a good one."""
    files = {"empty": b"", "text": b"no checkpoint\n", "pickle": pickle.dumps({"config": print})}
    files["truncated"] = whole[: len(whole) // 2]
    files["cut short"] = whole[:-20]
    for seed in range(4):
        files[f"random {seed}"] = random.Random(seed).randbytes(3000)
        files[f"random pickle {seed}"] = b"\x80\x02" + random.Random(seed).randbytes(300)
    good = torch.load(io.BytesIO(whole), weights_only=True)
    others = {"a list": [1], "nothing": {}}
    others["no config"] = {"model": good["model"]}
    others["no model"] = {"config": good["config"]}
    others["unknown setting"] = good | {"config": good["config"] | {"colour": "red"}}
    others["wrong setting"] = good | {"config": good["config"] | {"lr": -1.0}}
    others["wrong method"] = good | {"config": good["config"] | {"method": None}}
    others["model of another kind"] = good | {"model": None}
    others["model of other sizes"] = good | {"model": {k: torch.zeros(3) for k in good["model"]}}
    for name, content in others.items():
        buffer = io.BytesIO()
        torch.save(content, buffer)
        files[name] = buffer.getvalue()
    return files


def test_what_is_no_checkpoint_gets_one_line(run, prepared, tmp_path):
    folder, _ = run
    whole = (folder / "best.pt").read_bytes()
    for name, content in spoilt_checkpoints(whole).items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(content)
        for flag in ("--evaluate", "--tsne"):
            assert_one_line(dr_main(flag, path, "--data", prepared, "--device", "cpu"), name)
    for seed in range(8):  # one byte that is wrong may be in a weight, which nobody can tell
        draw = random.Random(seed)
        content = bytearray(whole)
        content[draw.randrange(len(content) - 4000, len(content))] ^= 1 << draw.randrange(8)
        (tmp_path / "flipped.pt").write_bytes(content)
        done = dr_main("--evaluate", tmp_path / "flipped.pt", "--data", prepared, "--device", "cpu")
        assert done.returncode == 0 or not assert_one_line(done)


def test_tracked_purity_is_that_of_the_test_features(run, prepared, tmp_path):
    _, plain = run
    tracked = dr.train(config(prepared, tmp_path, epochs=3, track_purity=True))
    assert [e["loss"] for e in tracked] == [e["loss"] for e in plain[:3]]  # looking changes nothing
    model, dataset, _ = dr.load_run(tmp_path / "run" / "best.pt")
    best = max(tracked, key=lambda e: (e["val"], -e["epoch"]))
    x, y = dr.extract_features(model, dataset.test)
    for m, found in best["test_purity"].items():
        assert found == pytest.approx(dr.purity(x[m], y, 6))


def test_tsne_of_a_checkpoint(run, prepared, tmp_path):
    folder, _ = run
    shutil.copy(folder / "best.pt", tmp_path)
    done = dr_main("--tsne", tmp_path / "best.pt", "--data", prepared, "--device", "cpu")
    assert done.stdout.strip() == str(tmp_path / "tsne.png")
    assert np.asarray(Image.open(tmp_path / "tsne.png").convert("L")).std() > 5


# --- 10  sweeps -----------------------------------------------------------------------------------


def sweep_words(prepared, out, *words, jobs=1, epochs=3):
    base = ["--data", prepared, "--out", out, "--device", "cpu", "--epochs", epochs, "--every", 1, "--batch-size", 16]
    return [*base, "--n-init", 2, "--jobs", jobs, *words]


@pytest.fixture(scope="session")
def swept(prepared, tmp_path_factory):
    """A sweep of 2 methods and 2 seeds, two runs side by side, as a user starts it -> its folder, what it printed."""
    out = tmp_path_factory.mktemp("swept")
    words = sweep_words(prepared, out, "--name", "grid", "--sweep", "method=joint,dr", "seed=0,1", jobs=2)
    done = command("dr.py", *words)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def read_table(path):
    """A Markdown table -> {first cell: {column: cell}}."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {row[0]: dict(zip(cells[0], row)) for row in cells[2:]}


def read_csv(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_a_sweep_reports_means_deviations_and_paired_intervals(swept):
    out, told = swept
    found = {}
    for method in ("joint", "dr"):
        summaries = [json.loads((f / "summary.json").read_text()) for f in sorted(out.glob(f"demo-{method}-*"))]
        assert len(summaries) == 2
        found[method] = np.array([s["accuracy"] for s in summaries])
    rows = read_table(out / "grid.md")
    assert list(rows) == ["joint", "dr"]
    assert {"accuracy", "vs joint", "macro F1", "probe audio", "strength visual"} <= set(rows["dr"])
    for method, values in found.items():
        assert rows[method]["accuracy"] == f"{values.mean():.1f} ± {values.std(ddof=1):.1f}"
    interval = scipy.stats.ttest_rel(found["dr"], found["joint"]).confidence_interval(0.95)
    mean, half = (float(v) for v in rows["dr"]["vs joint"].split(" ± "))
    assert rows["joint"]["vs joint"] == "" and (mean - half, mean + half) == pytest.approx(interval, abs=0.11)
    lines = read_csv(out / "grid.csv")
    assert [(x["method"], int(x["seed"])) for x in lines] == [(m, s) for m in found for s in range(2)]
    assert [float(x["accuracy"]) for x in lines] == pytest.approx([*found["joint"], *found["dr"]])
    assert np.asarray(Image.open(out / "grid.png").convert("L")).std() > 5
    caption = (out / "grid.md").read_text().splitlines()[0]
    assert caption.startswith("    python dr.py ") and caption.endswith(" --sweep method=joint,dr seed=0,1")
    assert all(len(line) <= 80 for line in told.splitlines() if str(out) not in line)  # only paths may be longer


def test_a_sweep_does_only_what_is_missing(swept, prepared):
    out, _ = swept
    words = sweep_words(prepared, out, "--name", "grid", "--sweep", "method=joint,dr", "seed=0,1")
    made = {f: f.stat().st_mtime_ns for f in out.glob("*/best.pt")}
    lost = sorted(out.glob("demo-dr-*"))[1]
    (lost / "summary.json").unlink()
    log = (lost / "log.jsonl").read_text().splitlines()
    report = read_csv(out / "grid.csv")
    assert dr_main(*words).returncode == 0
    assert {f.parent.name for f, t in made.items() if f.stat().st_mtime_ns != t} == {lost.name}
    log_again = (lost / "log.jsonl").read_text().splitlines()
    assert without_seconds(map(json.loads, log)) == without_seconds(map(json.loads, log_again))
    for before, after in zip(report, read_csv(out / "grid.csv"), strict=True):
        assert {**before, "seconds per epoch": 0} == {**after, "seconds per epoch": 0}


def test_a_run_that_fails_leaves_the_others_alone_and_is_named(sequences, tmp_path):
    words = sweep_words(sequences, tmp_path, "--dataset", "mine", "--sweep", "fusion=film,sum", epochs=1)
    done = dr_main(*words)
    assert done.returncode == 2 and "1 of 2 runs failed; the same command tries them again" in done.stderr
    assert "fusion=film" in done.stderr and "two modalities, not 3" in done.stderr
    assert len(list(tmp_path.glob("*fusion=sum*/summary.json"))) == 1 and not list(tmp_path.glob("sweep*"))


def test_sweeps_that_differ_in_a_fixed_flag_and_the_ensemble_of_their_runs(prepared, tmp_path):
    for m in ("audio", "visual"):
        done = dr_main(*sweep_words(prepared, tmp_path, "--modalities", m, "--sweep", "seed=0", epochs=1))
        assert done.returncode == 0, done.stderr
    reports = sorted(tmp_path.glob("*.md"))
    assert len(reports) == len(list(tmp_path.glob("*.csv"))) == len(list(tmp_path.glob("*.png"))) == 2
    assert [m in path.name for m, path in zip(("audio", "visual"), reports)] == [True, True]
    words = ["--name", "both", "--sweep", "modalities=audio,visual", "seed=0"]
    assert dr_main(*sweep_words(prepared, tmp_path, *words, epochs=1)).returncode == 0
    tests = [np.load(tmp_path / path.name / "test.npz") for path in tmp_path.iterdir() if path.is_dir()]
    assert len(tests) == 2  # both were there already
    summed = sum(F.log_softmax(torch.tensor(test["logits"]), 1) for test in tests)
    accuracy = 100 * (summed.argmax(1).numpy() == tests[0]["labels"]).mean()
    lines = {line["modalities"]: line for line in read_csv(tmp_path / "both.csv")}
    assert set(lines) == {"audio", "visual", "ensemble of audio and visual"}
    assert float(lines["ensemble of audio and visual"]["accuracy"]) == pytest.approx(accuracy)


def test_ctrl_c_stops_a_sweep_and_its_runs(prepared, tmp_path):
    words = sweep_words(prepared, tmp_path, "--sweep", "method=joint,dr", "seed=0,1", jobs=2, epochs=500)

    def logged():
        return sum(f.stat().st_size for f in tmp_path.glob("*/log.jsonl"))

    def press():
        while not logged():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the test itself was started with
    done = dr_main(*words)
    signal.signal(signal.SIGINT, before)
    assert done.returncode == 130 and done.stderr.strip().endswith("the same command does what is missing")
    size = logged()
    time.sleep(2)
    assert logged() == size  # nothing trains on


@pytest.mark.parametrize(
    "words, says",
    [
        (["colour=red"], "words such as method=joint,dr"),
        (["lam=high"], "words such as"),
        (["seed"], "words such as"),
        (["augment=yes"], "words such as"),
        (["method=joined"], "method is one of"),
        (["lam=1,-1"], "lam is 0 or more"),
        (["seed=0,0"], "into the same folder"),
        (["name=a", "seed=0,1"], "into the same folder"),
        (["device=cpu,cuda"], "into the same folder"),
    ],
)
def test_a_wrong_sweep_gets_one_line_before_anything_runs(words, says, tmp_path):
    assert_one_line(dr_main("--out", tmp_path, "--sweep", *words), says)
    assert not list(tmp_path.iterdir())


# --- 11  command line -----------------------------------------------------------------------------


def test_help_is_a_page():
    text = dr_main("--help").stdout
    assert max(map(len, text.splitlines())) <= 80
    for method in dr.METHODS:
        assert re.search(rf"^  {re.escape(method)} +\w", text, re.M), method
    for f in fields(dr.Config):
        assert re.search(rf"^  --{f.name.replace('_', '-')}\b", text, re.M), f.name
    assert "lambda in a = tanh" in text and "%(default)" not in text


# --- on a GPU: skipped where there is none --------------------------------------------------------

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def on(*marks):
    """All of these marks as one decorator."""

    def mark(test):
        for m in marks:
            test = m(test)
        return test

    return mark


@on(*needs_gpu)
def test_a_gpus_first_losses_in_fp32_are_a_cpus(prepared, tmp_path):
    more = {"encoder": "resnet18", "precision": "fp32", "epochs": 1}
    cpu = dr.train(config(prepared, tmp_path / "cpu", **more))
    gpu = dr.train(config(prepared, tmp_path / "gpu", device="cuda", **more))
    assert gpu[0]["loss"] == pytest.approx(cpu[0]["loss"], abs=1e-3)


@on(*needs_gpu)
def test_on_a_gpu_a_killed_run_resumes(prepared, tmp_path):
    code = "import dr; dr.CHECKPOINT_SECONDS = 0; dr.main()"
    words = ["-c", code, "--data", prepared, "--out", tmp_path, "--name", "run", "--epochs", 30, "--every", 8]
    with subprocess.Popen([sys.executable, *map(str, words)], cwd=HERE, stdout=subprocess.DEVNULL) as process:
        while not (tmp_path / "run/last.pt").exists() and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    done = command(*words)
    assert done.returncode == 0 and "resumes after epoch" in done.stdout, done.stderr
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [e["epoch"] for e in log] == list(range(30))


@on(*needs_gpu)
@pytest.mark.parametrize("encoder", ["small", "resnet18", "vit"])
@pytest.mark.parametrize("fusion", list(dr.FUSIONS))
def test_every_fusion_and_encoder_trains_on_a_gpu_in_bf16(fusion, encoder, prepared, tmp_path):
    more = {"fusion": fusion, "encoder": encoder, "precision": "bf16", "epochs": 2, "every": 1}
    history = dr.train(config(prepared, tmp_path, device="cuda", **more))
    assert np.isfinite(history[1]["loss"]) and history[1]["relearnt"]


@on(*needs_gpu)
@pytest.mark.parametrize("method", list(dr.METHODS))
def test_every_method_trains_on_a_gpu(method, prepared, sequences, tmp_path):
    for dataset, folder in (("demo", prepared), ("mine", sequences)):
        out = tmp_path / dataset
        history = dr.train(config(folder, out, dataset=dataset, method=method, device="cuda", epochs=2, every=1))
        assert np.isfinite(history[1]["loss"])


@on(*needs_gpu)
def test_arrays_that_are_not_moved_to_the_gpu_give_the_same_losses(prepared, tmp_path, monkeypatch):
    more = {"device": "cuda", "precision": "fp32", "epochs": 1}
    held = dr.train(config(prepared, tmp_path / "held", **more))
    moved = []
    move_to_gpu = data.move_to_gpu
    monkeypatch.setattr(data, "move_to_gpu", lambda *args, max_bytes: moved.append(move_to_gpu(*args, max_bytes=0)))
    read = dr.train(config(prepared, tmp_path / "read", **more))
    assert moved == [False]
    assert read[0]["loss"] == pytest.approx(held[0]["loss"], abs=1e-3)


@on(*needs_gpu)
def test_batches_read_ahead_are_on_the_current_gpu(prepared):
    split = data.load("demo", prepared).train
    last = torch.cuda.device_count() - 1  # not the one that a thread begins with, if there are several
    with torch.cuda.device(last):
        for inputs, labels in data.batches(split, 16, 0, torch.device("cuda", last)):
            assert {x.device for x in (*inputs.values(), labels)} == {torch.device("cuda", last)}


@on(*needs_gpu)
def test_two_processes_on_one_gpu(prepared, tmp_path):
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "dr.py", "--device", "cuda:0"]
    words = ["--data", prepared, "--out", tmp_path, "--name", "run", "--epochs", 3, "--every", 1]
    done = command(*launch, *words)
    assert done.returncode == 0 and done.stdout.count("epoch   0") == 1, done.stderr
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert all(np.isfinite(e["loss"]) for e in log) and log[1]["relearnt"]


@on(*needs_gpu)
@pytest.mark.parametrize("native", [True, False])
def test_auto_is_bf16_where_it_is_not_emulated(native, monkeypatch):
    def is_bf16_supported(including_emulation=True):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    dataset = SimpleNamespace(shapes=TWO, classes=range(4))
    assert dr.make_model(dr.Config(), dataset, "cuda").bf16 == native
    assert dr.make_model(dr.Config(precision="bf16"), dataset, "cuda").bf16


# --- bench: python -m pytest -m bench -s ----------------------------------------------------------

CREMAD = {"audio": data.fbank_spec(128, 3.0), "visual": data.frames_spec(2, 224)}
KMEANS = {"CREMA-D": (6, 5954, 744), "Kinetics-Sounds": (31, 14799, 1644), "UCF-101": (101, 8586, 951)}


def clock(device):
    """Seconds, when all that was begun on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(device, works, rounds):
    """Seconds of each of {name: function}, the fastest of some rounds, in each of which all have their turn: whatever
    else the machine does only adds to it. A first round is not measured."""
    seconds = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            start = clock(device)
            work()
            if number > 0:
                seconds[name].append(clock(device) - start)
    return {name: min(taken) for name, taken in seconds.items()}


class PlainModel(torch.nn.Module):
    """What one writes with torchvision's ResNet-18 when one writes it quickly."""

    def __init__(self):
        super().__init__()
        self.audio = torchvision.models.resnet18(num_classes=512)
        self.audio.conv1 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False)
        self.visual = torchvision.models.resnet18(num_classes=512)
        self.audio.fc = self.visual.fc = torch.nn.Identity()
        self.head = torch.nn.Linear(1024, 6)

    def forward(self, inputs):
        frames = inputs["visual"]
        visual = self.visual(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).mean(1)
        return self.head(torch.cat([self.audio(inputs["audio"]), visual], 1))


def plain_step(model, optimiser, inputs, labels):
    """A step as one writes it, in fp32, with PyTorch's own settings."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=True):
        loss = F.cross_entropy(model(inputs), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


class UsualClips(torch.utils.data.Dataset):
    """The field's usual data set: a clip's wav and its JPEGs are opened and transformed whenever they are needed."""

    def __init__(self, folder, count):
        self.folder = folder
        self.count = count
        rng = np.random.default_rng(0)
        for k in range(count):
            scipy.io.wavfile.write(folder / f"{k}.wav", 16000, rng.integers(-9999, 9999, 48000, dtype=np.int16))
            for t in range(2):
                blots = rng.integers(256, size=(12, 16, 3), dtype=np.uint8)
                Image.fromarray(blots).resize((480, 360)).save(folder / f"{k}-{t}.jpg")

    def __len__(self):
        return self.count

    def __getitem__(self, k):
        _, sound = scipy.io.wavfile.read(self.folder / f"{k}.wav")
        sound = torch.from_numpy(sound.astype(np.float32) / 32768)[None]
        fbank = data.kaldi.fbank(sound, sample_frequency=16000, num_mel_bins=128).T[None]
        frames = []
        for t in range(2):
            picture = Image.open(self.folder / f"{k}-{t}.jpg").convert("RGB").resize((224, 224))
            scaled = (np.asarray(picture) - np.float32(CREMAD["visual"]["mean"])) / 58
            frames.append(scaled.transpose(2, 0, 1))
        return {"audio": fbank, "visual": torch.tensor(np.stack(frames))}, k % 6


def plain_epoch(model, optimiser, loader, device):
    for inputs, labels in loader:
        inputs = {m: x.to(device, non_blocking=True) for m, x in inputs.items()}
        plain_step(model, optimiser, inputs, labels.to(device))


def show(what, seconds, note=""):
    print(f"  {what:<40}{1000 * seconds:>12,.1f} ms  {note}", flush=True)


@pytest.mark.bench
def test_bench(tmp_path):
    """CREMA-D's shapes: all of its clips on CUDA, elsewhere a few batches of 16, on all cores."""
    cuda = torch.cuda.is_available()
    torch.set_num_threads(os.cpu_count())
    c = dr.Config(dataset="cremad", batch_size=64 if cuda else 16, out=str(tmp_path), device="auto" if cuda else "cpu")
    device = dr.set_up(c)
    counts = KMEANS["CREMA-D"][1:] if cuda else (56, 24)  # with a last batch that is smaller
    write_dataset(tmp_path / "cremad", CREMAD, (*counts, 16), 6)
    dataset = data.load("cremad", tmp_path)
    chip = torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} cores"
    print(f"\nCREMA-D's shapes, batch size {c.batch_size}, {chip}, PyTorch {torch.__version__}")
    model = dr.make_model(c, dataset, device)
    optimiser = torch.optim.SGD(model.parameters(), c.lr, c.momentum)
    plain = PlainModel().to(device)
    plain_optimiser = torch.optim.SGD(plain.parameters(), c.lr, c.momentum)

    if cuda:
        assert data.move_to_gpu(dataset, device, max_bytes=torch.cuda.mem_get_info()[0] / 2)
    stream = whole_batches(dataset.train, c.batch_size, device)
    inputs, labels = next(stream)
    contiguous = {m: x.contiguous() for m, x in inputs.items()}

    steps = {"joint": partial(dr.step, model, optimiser, inputs, labels)}
    steps["arrays"] = lambda: dr.step(model, optimiser, *next(stream))
    steps["plain"] = partial(plain_step, plain, plain_optimiser, contiguous, labels)
    for name in ("multitask", "ogm", "ogm-ge", "opm", "mmpareto", "dgl", "mlb"):
        steps[name] = partial(dr.step, model, optimiser, inputs, labels, dr.METHODS[name], 0.25)
    found = measure(device, steps, 20 if cuda else 2)
    show("step, a batch in memory", found["joint"])
    show("step, batches from the arrays", found["arrays"], f"{found['arrays'] / found['joint']:.2f} of it")
    show("step, plain loop in fp32", found["plain"], f"ours takes {found['joint'] / found['plain']:.2f} of it")
    for name in list(steps)[3:]:
        show(f"step, {name}", found[name], f"{found[name] / found['joint']:.2f} of joint's")

    (tmp_path / "raw").mkdir()
    clips = UsualClips(tmp_path / "raw", counts[0])
    loader = torch.utils.data.DataLoader(clips, c.batch_size, True, num_workers=os.cpu_count(), pin_memory=cuda)
    epochs = {"ours": partial(dr.train_epoch, model, optimiser, dataset.train, c, 0)}
    epochs["plain"] = partial(plain_epoch, plain, plain_optimiser, loader, device)
    found = measure(device, epochs, 2 if cuda else 1)
    show(f"epoch, {counts[0]:,} clips", found["ours"], f"{counts[0] / found['ours']:,.0f} clips per second")
    show("epoch, plain loop, wav and JPEG", found["plain"], f"ours takes {found['ours'] / found['plain']:.2f} of it")

    for name in ("train", "val"):
        split = getattr(dataset, name)
        found = measure(device, {"": partial(dr.extract_features, model, split)}, 1)
        show(f"diagnosis, features of {len(split):,} clips", found[""])
    for name, (n_classes, *sizes) in KMEANS.items():
        train = draw_features(sizes[0], n_classes)
        val = draw_features(sizes[1], n_classes)
        start = clock(device)
        dr.one_thread(dr.purity_gap, *train, *val, n_classes)
        show(f"diagnosis, k-means, {name}", clock(device) - start, "a modality; all side by side")
    c.folder.mkdir(exist_ok=True)
    states = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "best": model.state_dict()}
    found = measure(device, {"": partial(dr.save, c, "last.pt", **states)}, 2)
    show("checkpoint", found[""], f"{(c.folder / 'last.pt').stat().st_size / 1e6:.0f} MB, twice per minute at most")
    if cuda:
        print(f"  peak memory of the GPU {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    else:
        resource = pytest.importorskip("resource")  # there is none on Windows; in KiB, on macOS in bytes
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        print(f"  peak memory of the process {peak / 2**30:.1f} GiB")
    torch.set_num_threads(1)


def whole_batches(split, batch_size, device):
    """Batches from the arrays, for ever, without the smaller last ones."""
    while True:
        for inputs, labels in data.batches(split, batch_size, 0, device):
            if len(labels) == batch_size:
                yield inputs, labels


def draw_features(n, n_classes):
    """Features and labels as an encoder's: 512, none negative, in clusters that overlap."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(n_classes, 48))
    labels = rng.integers(n_classes, size=n)
    points = centres[labels] + rng.normal(size=(n, 48))
    return np.maximum(points @ rng.normal(size=(48, 512)), 0).astype(np.float32), labels


# --- the notebook ---------------------------------------------------------------------------------

NOTEBOOK = nbformat.read(HERE / "tutorial.ipynb", 4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]


def test_the_notebook_runs_from_top_to_bottom(prepared, tmp_path, monkeypatch):
    (tmp_path / "prepared").symlink_to(prepared)
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    short = nbformat.from_dict(NOTEBOOK)
    shorter = {"epochs=24, every=6": "epochs=6, every=2", "epochs=10, every=3": "epochs=3, every=1",
               "dict(epochs=20)": "dict(epochs=6)"}  # fmt: skip
    for long, brief in shorter.items():  # the same cells on a small demo, for fewer epochs
        assert sum(long in cell.source for cell in short.cells) == 1
        for cell in short.cells:
            cell.source = cell.source.replace(long, brief)
    nbclient.NotebookClient(short, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [o for cell in short.cells if cell.cell_type == "code" for o in cell.outputs]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 11
    assert sum("not yet" in o.get("text", "") for o in outputs) == 7  # nobody has solved the exercises


def test_the_notebooks_saved_output_is_of_one_run_of_this_code():
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    assert all(cell.source.count("\n") < 25 for cell in CODE)
    assert not any(o.output_type == "error" or o.get("name") == "stderr" for cell in CODE for o in cell.outputs)
    shown = "".join(o["data"].get("text/markdown", "") for cell in CODE for o in cell.outputs if "data" in o)
    for name in ("purity", "purity_gap", "relearning_strength", "soft_reinit", "diagnose", "Concatenation"):
        assert getsource(getattr(dr, name)) in shown, f"{name} has changed since: run the notebook again"
    assert getsource(data.add_noise) in shown


# For each exercise: an answer that is right, and wrong ones
EXERCISES = {
    1: ["purity_1 = 0.7", "purity_1 = 0.8", "purity_1 = 7"],
    2: ["lam_2 = np.arctanh(0.5) / 0.1", "lam_2 = 5"],
    3: ["part_left = lambda a: np.prod([1 - x for x in a])", "part_left = lambda a: 1 - sum(a) / 3"],
    4: [
        "purity_of = lambda k, y: sum(np.unique(y[k == i], return_counts=True)[1].max() for i in set(k)) / len(y)",
        "purity_of = lambda k, y: sum(np.unique(k[y == i], return_counts=True)[1].max() for i in set(y)) / len(y)",
    ],
    5: [
        "purity_5, pure = 1, lambda n: dr.purity(x_train['visual'], y_train, n, 3) >= 0.6\n"
        "clusters_5 = next(filter(pure, (2**k for k in range(9))))",
        "purity_5 = 1 / 50; clusters_5 = 1",
        "purity_5 = 1; clusters_5 = 256",
        "purity_5 = 1; clusters_5 = 100",
    ],
    6: [
        "due = lambda v, p: len(v) > p and max(v[-p:]) <= max(v[:-p])",
        "due = lambda v, p: len(v) > p and max(v[-p:]) < max(v[:-p])",
        "due = lambda v, p: v[-1] <= v[-2]",
    ],
    7: [
        """
@torch.no_grad()
def soft_reinit_by_depth(module, init_state, strength):
    named = list(module.named_parameters())
    for k, (name, p) in enumerate(named):
        p.lerp_(init_state[name], strength * k / (len(named) - 1))
""",
        "soft_reinit_by_depth = dr.soft_reinit",
        "soft_reinit_by_depth = lambda module, init_state, strength: None",
    ],
}


@pytest.mark.parametrize("number", EXERCISES)
def test_an_exercises_check_tells_right_from_wrong(number, capsys):
    rng, y = np.random.default_rng(0), np.arange(300) % 6
    x = {m: (rng.normal(size=(300, 8)) + 2 * np.eye(8)[y]).astype(np.float32) for m in ("audio", "visual")}
    scope = {"np": np, "torch": torch, "dr": dr, "x_train": x, "y_train": y}
    exec(next(cell.source for cell in CODE if "def check(" in cell.source), scope)
    starts = next(cell.source for cell in CODE if f"# exercise {number}" in cell.source)
    asks = next(cell.source for cell in CODE if re.search(rf"^check\(\s*{number},", cell.source, re.M))
    for k, answer in enumerate([*EXERCISES[number], starts]):
        exec(answer, scope)
        exec(asks, scope)
        told = capsys.readouterr().out
        assert told.startswith(f"Exercise {number}: " + ("right" if k == 0 else "not yet")), (answer, told)
