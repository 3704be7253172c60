"""Tests: python -m pytest. Each holds the code against something independent of it."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before anything counts cores: threads wait for those of tests beside them

import base64
import contextlib
import copy
import csv
import errno
import io
import json
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import weakref
from collections import Counter
from dataclasses import asdict, fields
from functools import partial
from inspect import getsource
from pathlib import Path
from platform import libc_ver
from types import SimpleNamespace
from unittest import mock

import av
import nbclient
import nbformat
import numpy as np
from PIL import Image
import pytest
import scipy.io.wavfile
import scipy.signal
import scipy.stats
from sklearn.cluster import KMeans
from sklearn.metrics.cluster import contingency_matrix
from sklearn.preprocessing import MinMaxScaler
from threadpoolctl import threadpool_limits
import torch
import torch.nn.functional as F
import torchvision

import data
import dr

HERE = Path(__file__).parent

# --- helpers --------------------------------------------------------------------------------------

SHAPES = {"audio": (1, 16, 12), "visual": (2, 3, 16, 16), "text": (5, 7)}
THREE = SHAPES
TWO = {m: SHAPES[m] for m in ("audio", "visual")}
COMPARES = sorted(dr.COMPARING)  # modalities with each other


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


def called(module, *words):
    """`python module.py words`, but in this process: importing PyTorch takes longer than most of what is tested."""
    told = io.StringIO()
    complained = io.StringIO()
    code = 0
    with (
        mock.patch.object(sys, "argv", [f"{module.__name__}.py", *map(str, words)]),
        contextlib.redirect_stdout(told),
        contextlib.redirect_stderr(complained),
    ):
        try:
            module.main()
        except SystemExit as end:
            code = end.code
    return SimpleNamespace(returncode=code, stdout=told.getvalue(), stderr=complained.getvalue())


dr_main = partial(called, dr)
data_called = partial(called, data)


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


def test_ones_own_encoder_keeps_its_weights(monkeypatch):
    def pretrained(shape):
        network = torch.nn.Sequential(torch.nn.Conv2d(shape[-3], 8, 3), torch.nn.BatchNorm2d(8))
        torch.nn.init.constant_(network[0].weight, 0.5)
        return dr.PictureEncoder(network, 8)

    monkeypatch.setitem(dr.ENCODERS, "mine", pretrained)
    model = dr.MultimodalModel(TWO, 4, "mine")
    for encoder in model.encoders.values():
        assert encoder.network[0].weight.eq(0.5).all() and encoder.network[1].weight.eq(1).all()
    with pytest.raises(data.DataError, match="--fusion mbt takes encoders with tokens"):
        dr.BottleneckModel(TWO, 4, "tiny")(draw_batch(TWO)[0])


@pytest.mark.parametrize("method", COMPARES)
def test_frozen_weights_and_those_that_take_no_part_stay_as_they_are(method):
    torch.manual_seed(0)
    model = dr.MultimodalModel(TWO, 4, "small")
    model.register_buffer("traces", torch.zeros(8, 2))
    for encoder in model.encoders.values():
        encoder.network[0].weight.requires_grad_(False)
        encoder.left_over = torch.nn.Linear(3, 3)  # as the classifier of a pre-trained network
    before = copy.deepcopy(model.state_dict())
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    for t in (0.0, 0.125, 0.25):
        dr.step(model, optimiser, *draw_batch(TWO), dr.METHODS[method], t)
    for m, encoder in model.encoders.items():
        assert torch.equal(encoder.network[0].weight, before[f"encoders.{m}.network.0.weight"])
        assert torch.equal(encoder.left_over.weight, before[f"encoders.{m}.left_over.weight"])
        assert not torch.equal(encoder.network[3].conv1.weight, before[f"encoders.{m}.network.3.conv1.weight"])


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
    dataset = SimpleNamespace(shapes=TWO, classes=range(4))
    c = dr.Config(encoder="small", fusion=fusion, precision="fp32")
    plain = dr.make_model(c, dataset).eval()
    inputs, _ = draw_batch(TWO)
    exact = plain(inputs)
    model = dr.make_model(dr.replace(c, precision="bf16"), dataset).eval()
    model.load_state_dict(plain.state_dict())
    near = model(inputs)
    assert near.dtype == torch.float32 and {x.dtype for x in model.features(inputs).values()} == {torch.float32}
    assert not torch.equal(exact, near)
    torch.testing.assert_close(exact, near, rtol=0.1, atol=0.1)
    assert not torch.is_autocast_enabled("cpu")
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(inputs), near)
    torch.nn.init.zeros_(twin.encoders["audio"].network[0].weight)  # a copy has weights of its own
    assert not torch.equal(twin(inputs), near)
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
        (np.ones((3, 2)), np.arange(3), ValueError, "n_samples=3 should be >= n_clusters=4"),
        (np.eye(9), np.arange(8), ValueError, "same length"),
        (np.ones((9, 2, 2)), np.arange(9), ValueError, "dim 3"),
        (np.full((9, 2), np.nan), np.arange(9), ValueError, "NaN"),
        (np.full((9, 2), np.inf), np.arange(9), ValueError, "infinity"),
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


def test_the_floor_is_what_shuffled_labels_give():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(400, 5)).astype(np.float32), np.arange(400) % 10
    floors = [dr.with_floor(dr.purity_gap, x, y, x[:n], y[:n], 10, 1)["floor"] for n in (40, 100, 400)]
    assert floors[0] > floors[1] > floors[2] and floors[2] < 0.03
    clusters = [KMeans(10, n_init=1, random_state=0).fit_predict(dr.minmax_scale(part, (-1, 1))) for part in (x, x[:40])]
    gaps = []
    for seed in range(1, 40):  # the very clusters, counted against other shuffles
        counts = [contingency_matrix(np.random.default_rng(seed).permutation(y[: len(c)]), c) for c in clusters]
        pure = [count.max(0).sum() / count.sum() for count in counts]
        gaps.append(abs(pure[0] - pure[1]))
    assert floors[0] == pytest.approx(np.mean(gaps), abs=3 * np.std(gaps) / 3**0.5)


def test_equal_gap_counts_equally_many_clips_and_no_purer_validation_set():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(400, 5)).astype(np.float32), np.arange(400) % 10
    torch.manual_seed(0)
    assert dr.purity_gap(x, y, x[:40], y[:40], 10)[2] > 0.15  # luck alone
    assert abs(np.mean([np.subtract(*dr.equal_gap(x, y, x[:40], y[:40], 10, 1)[:2]) for _ in range(20)])) < 0.05
    learnt = (10 * np.eye(10)[y] + rng.normal(size=(400, 10))).astype(np.float32)
    assert dr.equal_gap(x, y, learnt[:40], y[:40], 10)[2] == 0  # it is validation that is purer
    p_train, p_val, gap = dr.equal_gap(learnt, y, np.repeat(x[:40], 2, 1), y[:40], 10)
    assert gap == p_train - p_val > 0.3
    torch.manual_seed(5)
    some = torch.randperm(400)[:40].numpy()
    torch.manual_seed(5)
    assert dr.equal_gap(x, y, x[:40], y[:40], 10)[0] == dr.purity(x[some], y[some], 10)


def test_dr_equal_relearns_by_its_own_gaps_and_every_diagnosis_has_a_floor(prepared, tmp_path):
    history = dr.train(config(prepared, tmp_path, method="dr-equal", epochs=3))
    for d in history[2]["diagnosis"].values():
        assert d["gap"] == max(0, d["P_train"] - d["P_val"]) and 0 <= d["floor"] < 1
        assert d["strength"] == pytest.approx(np.tanh(3 * d["gap"]))


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


def test_initial_weights_that_were_not_copied_are_refused():
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="the very weights that are trained, as weight"):
        dr.soft_reinit(layer, layer.state_dict().copy(), 0.5)  # a shallow copy follows training


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
    (code,) = re.findall(r"```python\n(import torch\n.*?)```", (HERE / "README.md").read_text(), re.S)
    told = []
    scope = {"print": told.append}
    exec(code.replace("range(16)", "range(7)"), scope)
    assert len(told) == 2 and all(line.startswith("epoch 5") for line in told)  # two modalities, diagnosed once
    for m, encoder in scope["encoders"].items():
        p_train, p_val, gap = dr.purity_gap(*scope["features"](m, scope["train"]), *scope["features"](m, scope["val"]), 10)
        assert encoder.training and gap == abs(p_train - p_val) and 0.3 < p_train < 1
    state = torch.get_rng_state()
    scope["features"]("upper", scope["val"])
    assert torch.equal(torch.get_rng_state(), state)


# --- 5  training ----------------------------------------------------------------------------------


def test_a_run_diagnoses_and_relearns_on_schedule(run):
    _, history = run
    assert [e["epoch"] for e in history] == list(range(6))
    assert [e["epoch"] for e in history if "diagnosis" in e] == [2, 4]
    assert [e["relearnt"] for e in history if "diagnosis" in e] == [True, False]  # at most once
    assert set(history[2]["diagnosis"]) == {"audio", "visual"}
    for d in history[2]["diagnosis"].values():
        assert 1 / 6 <= d["P_val"] <= 1
        assert d["gap"] == abs(d["P_train"] - d["P_val"])
        assert d["strength"] == pytest.approx(np.tanh(3 * d["gap"]))


def test_a_run_repeats_bit_for_bit(run, prepared, tmp_path):
    folder, history = run
    again = dr.train(config(prepared, tmp_path))
    assert without_seconds(again) == without_seconds(history)
    first = torch.load(folder / "best.pt", weights_only=True)["model"]
    second = torch.load(tmp_path / "run/best.pt", weights_only=True)["model"]
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert dr.train(config(prepared, tmp_path, seed=1, epochs=1, name="other"))[0]["loss"] != history[0]["loss"]


def test_lambda_0_is_joint_training(prepared, tmp_path):
    joint = dr.train(config(prepared, tmp_path, method="joint", epochs=3, every=1))
    never = dr.train(config(prepared, tmp_path, lam=0.0, epochs=3, every=1, name="never"))
    assert [(e["loss"], e["test"]) for e in joint] == [(e["loss"], e["test"]) for e in never]
    assert not any(e.get("relearnt") for e in joint)


def test_one_modality_is_the_same_code(prepared, tmp_path):
    history = dr.train(config(prepared, tmp_path, modalities="visual", epochs=3))
    assert set(history[2]["diagnosis"]) == {"visual"}


def test_accuracy_and_macro_f1_by_hand():
    scores = np.array([[3, 1, 0], [2, 1, 0], [0, 1, 0], [0, 0, 1]])  # predicts 0, 0, 1, 2
    found = dr.metrics(scores, np.array([0, 1, 1, 2]))
    assert found == pytest.approx({"accuracy": 75, "macro F1": 100 * (2 / 3 + 2 / 3 + 1) / 3})


def test_what_diverges_in_the_last_step_ends_in_one_line(prepared, tmp_path):
    words = ["--data", prepared, "--out", tmp_path, "--device", "cpu", "--epochs", 1, "--batch-size", 100]
    assert_one_line(dr_main(*words, "--lr", 4e9), "not finite, training has diverged")  # the only loss came before the only step


def test_what_diverges_ends_in_one_line(prepared, tmp_path):
    words = ["--data", prepared, "--out", tmp_path, "--device", "cpu", "--epochs", 2, "--batch-size", 16]
    assert_one_line(dr_main(*words, "--lr", 1e9), "in epoch 0: try a smaller --lr")


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


def score_ratios(model, inputs, labels):
    """r_m, a modality's score over the mean of the others'."""
    out = dr.compare(model, inputs, labels)
    return {m: out.s[m] / out.others[m] for m in inputs}


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
    found = score_ratios(model, inputs, labels)
    assert found["visual"].item() == pytest.approx(s["visual"] / s["audio"], rel=1e-4)
    assert found["audio"].item() == pytest.approx(s["audio"] / s["visual"], rel=1e-4)
    assert found[ahead] > 1
    assert not found[ahead].requires_grad


@pytest.mark.parametrize("count", [2, 3, 4])
def test_equals_have_the_ratio_1_and_nothing_balances_them(count):
    model, inputs, labels = equals(count)
    assert [r.item() for r in score_ratios(model, inputs, labels).values()] == pytest.approx([1] * count, abs=1e-6)
    plain = gradients(model, dr.joint, inputs, labels)
    assert_close(gradients(model, dr.METHODS["ogm"], inputs, labels), plain, rtol=0, atol=0)
    assert_close(gradients(model, dr.opm, inputs, labels, chance=1.0), plain, rtol=0, atol=0)
    assert_close(gradients(model, dr.mlb, inputs, labels), gradients(model, dr.multitask, inputs, labels))


def test_ratios_of_three_are_to_the_mean_of_the_others():
    model, inputs, labels = with_one_ahead("text", THREE)
    model.eval()  # no dropout in the text's encoder
    s = official_scores(model, inputs, labels)
    found = score_ratios(model, inputs, labels)
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
    assert_close(gradients(model, dr.METHODS["ogm"], inputs, labels), expected)
    for name, g in gradients(model, dr.METHODS["ogm"], inputs, labels).items():  # batch-norm and the head are left alone
        assert torch.equal(g, plain[name]) or (g.dim() == 4 and f"encoders.{ahead}." in name)
    assert_close(gradients(model, dr.METHODS["ogm"], inputs, labels, t=0.51), plain, rtol=0, atol=0)  # the second half
    assert_close(gradients(model, dr.ogm_ge, inputs, labels, t=0.51), plain, rtol=0, atol=0)


def test_ogm_ges_noise_is_as_strong_as_the_gradient():
    model, inputs, labels = with_one_ahead("audio")
    plain = gradients(model, dr.joint, inputs, labels)
    slowed = gradients(model, dr.METHODS["ogm"], inputs, labels)
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
        ratios = score_ratios(model, inputs, labels)
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
    c = dr.Config(method=method, encoder="small", fusion=fusion, epochs=4)
    model = dr.make_model(c, SimpleNamespace(shapes=THREE, classes=range(4)))
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
    assert not dr.why_undefined(dr.Config(method=method, fusion="sum"), "a+b+c")
    for more, names in ({}, "a"), ({"fusion": "film"}, "a+b"), ({"fusion": "gated"}, "a+b"), ({"fusion": "mbt"}, "a+b"):
        assert f"--method {method} compares modalities" in dr.why_undefined(dr.Config(method=method, **more), names)
    base = ["--data", prepared, "--out", tmp_path, "--method", method]
    assert_one_line(dr_main(*base, "--modalities", "audio"), "two or more")
    assert_one_line(dr_main(*base, "--fusion", "mbt"), "concat or sum")


def test_a_sweep_leaves_out_what_is_undefined(prepared, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(dr, "run_all", lambda configs, jobs: found.extend(configs) or stop())
    dr_main(*sweep_words(prepared, tmp_path, "--sweep", "method=joint,ogm", "modalities=audio,visual,audio+visual"))
    pairs = [(c.method, c.modalities) for c in found]
    assert pairs == [("joint", "audio"), ("joint", "visual"), ("joint", ""), ("ogm", "")]


def inforeg_by_hand(model, anchor, traces, inputs, labels):
    """What InfoReg adds to an encoder's gradient, in NumPy -> {modality: pull}, and multitask's gradient."""
    plain = gradients(model, dr.multitask, inputs, labels)
    s = {m: v / len(labels) for m, v in official_scores(model, inputs, labels).items()}
    pulls = {}
    for k, m in enumerate(inputs):
        delta = s[m] - np.mean([s[n] for n in s if n != m])
        is_open = (traces[-1][k] - traces[-2][k]) / traces[-1][k] > 0.04
        pulls[m] = np.exp(0.9 * np.tanh(delta)) if is_open and delta > 0 else 0.0
    return pulls, plain


@pytest.mark.parametrize("shapes", [TWO, THREE])
@pytest.mark.parametrize("last, pulled", [(1.5, True), (1.03, False)])  # the window is open, or closed
def test_inforeg_is_its_formula_and_multitask_where_the_window_is_closed(shapes, last, pulled):
    model, inputs, labels = with_one_ahead("audio", shapes)
    model.encoders.eval()  # the same output at every call
    model.register_buffer("traces", torch.zeros(5, len(shapes)))
    model.traces[0] = 1.0
    model.traces[1] = last
    anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
    method = partial(dr.inforeg)
    method(model, inputs, labels, 0.4)  # the first step of epoch 2 of 5: the encoders are where it began
    with torch.no_grad():
        for p in model.encoders.parameters():
            p += 0.01 * torch.randn_like(p)
    pulls, plain = inforeg_by_hand(model, anchor, [[1.0] * 3, [last] * 3], inputs, labels)
    assert (pulls["audio"] > 0) == pulled
    trace = model.traces[2].clone()
    expected = dict(plain)
    for name, p in model.named_parameters():
        if name.startswith("encoders."):
            expected[name] = plain[name] + pulls[name.split(".")[1]] * (p.detach() - anchor[name])
    assert_close(gradients(model, dr.inforeg, inputs, labels, t=0.4), expected, atol=1e-5)
    for k, m in enumerate(shapes):
        squares = sum(g.square().sum() for name, g in plain.items() if name.startswith(f"encoders.{m}."))
        assert (model.traces[2] - trace)[k].item() == pytest.approx(squares.item(), rel=1e-3)


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
    model.optimiser = optimiser
    return model, optimiser, dr.RELEARNING[method](model, initial, gaps, 3.0)


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
            forgotten = method == "dr-momentum" and strength > 0
            assert p not in optimiser.state if forgotten else optimiser.state[p]["momentum_buffer"].eq(3).all()
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


def test_a_method_of_ones_own_from_ones_own_file(prepared, tmp_path):
    script = tmp_path / "mine.py"
    (code,) = re.findall(r"```python\n(import dr\n.*?)```", (HERE / "README.md").read_text(), re.S)
    others = "dr.RELEARNING['focal'] = dr.relearn\ndr.MEASURES['focal'] = lambda *features, **more: (1.0, 0.25, 0.75)\n"
    assert code.count("dr.main()") == 1
    script.write_text(code.replace("dr.main()", others + "dr.main()"))
    words = sweep_words(prepared, tmp_path, "--name", "t", "--sweep", "method=joint,focal", "modalities=audio,", jobs=2)
    done = command(script, *words, env={**os.environ, "PYTHONPATH": str(HERE)})
    assert done.returncode == 0, done.stderr
    found = {(x["method"], x["modalities"]): float(x["accuracy"]) for x in read_csv(tmp_path / "t.csv")}
    assert found.keys() == {(m, n) for m in ("joint", "focal") for n in ("audio", "all")}  # one modality is its affair
    losses = {}
    for m in ("joint", "focal"):
        (log,) = (path for path in tmp_path.glob(f"demo-{m}-*/log.jsonl") if "audio" not in path.parent.name)
        losses[m] = json.loads(log.read_text().splitlines()[0])["loss"]
    assert losses["focal"] < 0.9 * losses["joint"]  # another loss was trained
    for row in read_csv(tmp_path / "t.csv"):  # whatever a file registers, reaches runs in other processes
        expected = np.tanh(3 * 0.75) if row["method"] == "focal" else 0
        assert float(row["strength audio"] or 0) == pytest.approx(expected)


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


def test_long_sequences_are_cut_into_64_patches_at_most():
    torch.manual_seed(0)
    encoder = dr.SequenceTransformer((326, 6)).eval()
    assert encoder.steps == 6 and encoder.position.shape == (55, 64)
    assert dr.SequenceTransformer((50, 4)).embed.weight.shape == (64, 4)  # one step per token, as in CMU-MOSI
    x = torch.randn(2, 326, 6)
    x[0, 100:] = 0  # the last patch with a step in it is the 17th
    tokens, padding = encoder.tokens(x)
    assert padding.sum(1).tolist() == [55 - 17, 0]
    by_steps = x.new_zeros(2, 55 * 6, 6)
    by_steps[:, :326] = x
    embedded = by_steps.reshape(2, 55, 36) @ encoder.embed.weight.T + encoder.embed.bias + encoder.position
    torch.testing.assert_close(encoder.layers(embedded, src_key_padding_mask=padding), tokens)
    other = x.clone()
    other[0, 102:] = 0.0
    assert torch.equal(encoder(x)[0], encoder(other)[0])
    assert all(layer.self_attn.dropout == 0 and layer.dropout.p > 0 for layer in encoder.layers.layers)


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
    ours = {k for k, _ in model.named_parameters() if k.startswith("encoders.audio.")}
    assert fusion != "mbt" or any("bottleneck_layers" in k for k in ours)  # which are the modality's own
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
    model = dr.BottleneckModel({"a": (5, 3), "b": (7, 4)}, 6, width=8, layers=layers).eval()
    a = torch.randn(2, 1, 5, 3)
    b = torch.randn(2, 1, 7, 4)
    f = {(i, j): model({"a": a[i], "b": b[j]}) for i in (0, 1) for j in (0, 1)}
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
    c = dr.Config("cremad", "joint", modalities="audio+visual", lam=1.0, augment=True, seed=7)
    assert c.name == "cremad-joint-audio+visual-augment=True-lam=1.0-7"


def test_all_modalities_by_name_are_the_same_run_as_none_named(prepared, tmp_path):
    named = config(prepared, tmp_path, modalities="audio+visual", name="")
    assert named == config(prepared, tmp_path, name="") and "audio" not in named.name
    assert "visual+audio" in config(prepared, tmp_path, modalities="visual+audio", name="").name  # another order
    assert "audio" in config(prepared, tmp_path, modalities="audio", name="").name


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
    ("--sweep", "seed"), ("--jobs", "two"), ("--evaluate", "nowhere.pt"), ("--evaluate", ".assets"),
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


def test_long_names_are_cut_and_stay_apart():
    names = [dr.Config(lam=float(f"1.{k}{56 * '0'}1"), out=90 * "o", modalities=90 * "m").name for k in range(3)]
    assert len(set(names)) == 3 and all(len(name) <= 100 and name.startswith("demo-dr-mmm") for name in names)
    assert len(dr.shorten(200 * "é").encode()) <= 100


def test_another_process_in_the_same_folder_is_refused(run, prepared, tmp_path):
    words = ["--data", prepared, "--out", tmp_path, "--epochs", 1, "--batch-size", 16, "--device", "cpu", "--name", "run"]
    with data.exclusive(tmp_path / "run"):
        assert_one_line(dr_main(*words), "run", "at work")
        (tmp_path / "run/output.txt").write_text("what the other one says")
    assert not (tmp_path / "run/config.json").exists()
    assert dr_main(*words).returncode == 0  # it is done


def test_what_cannot_be_trained_is_refused_before_it_is(tmp_path):
    spec = {"kind": "frames", "count": 1, "keep": 1, "size": 4, "shape": [1, 4, 4, 3], "dtype": "uint8",
            "mean": [0, 0, 0], "std": [1, 1, 1]}  # fmt: skip
    write_dataset(tmp_path / "tiny", {"visual": spec}, (8, 4, 4), 2)
    write_dataset(tmp_path / "one", {"visual": spec}, (8, 4, 4), 2)
    np.save(tmp_path / "one/train/labels.npy", np.zeros(8, int))
    words = ["--data", tmp_path, "--out", tmp_path / "runs", "--device", "cpu", "--epochs", 1]
    assert_one_line(dr_main(*words, "--dataset", "tiny", "--encoder", "vit"), "patch has 8 x 8 pixels")
    assert_one_line(dr_main(*words, "--dataset", "tiny", "--batch-size", 1), "batch_size is at least 2")
    assert_one_line(dr_main(*words, "--dataset", "tiny", "--modalities", "visual+visual"), "names one twice")
    assert_one_line(dr_main(*words, "--dataset", "one"), "every training clip has the same label")
    assert not list(tmp_path.glob("runs/*/log.jsonl"))
    done = dr_main(*words, "--dataset", "tiny", "--batch-size", 2)
    assert done.returncode == 0 and "fewer than ten validation clips per class" in done.stdout


@pytest.mark.slow
def test_the_first_command_prints_the_same_figures_on_any_number_of_threads(tmp_path):
    data.prepare("demo", out=tmp_path, clips=400)
    words = ["dr.py", "--data", tmp_path, "--out", tmp_path, "--device", "cpu", "--epochs", 3, "--every", 2, "--name"]
    side_by_side = []
    for threads in ("1", "2", "4"):
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        started = [sys.executable, *map(str, words), threads]
        side_by_side.append(subprocess.Popen(started, cwd=HERE, env=environment, stdout=subprocess.DEVNULL))
    assert [process.wait() for process in side_by_side] == [0, 0, 0]
    logs = []
    for threads in ("1", "2", "4"):
        logs.append(without_seconds(map(json.loads, (tmp_path / threads / "log.jsonl").read_text().splitlines())))
    assert "diagnosis" in logs[0][2]
    assert logs[0] == logs[1] == logs[2]


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
    tensors["logits"] = torch.tensor(np.load(folder / "test.npz")["logits"])
    kept = ("name", "accuracy", "macro F1", "probe", "strength")
    return log, {k: summary[k] for k in kept} | {"epoch": best["epoch"]}, tensors


@pytest.mark.xdist_group("runner")
@pytest.mark.slow
@pytest.mark.parametrize("more", [{"fusion": "mbt", "augment": True}, {"method": "inforeg"}, {"method": "dr-equal"}])
def test_killed_at_any_time_a_run_comes_out_as_the_undisturbed_one(more, runner, prepared, tmp_path):
    start, finish = runner
    more = {"epochs": 6, "times": 2, "n_init": 2, **more}
    start(config(prepared, tmp_path / "whole", **more))
    began = time.monotonic()  # dr.py is imported by now
    assert finish() == 0
    lasted = time.monotonic() - began
    kills = 0
    code = -signal.SIGKILL
    while code == -signal.SIGKILL:
        child = start(config(prepared, tmp_path / "torn", **more))
        if kills < 8:
            time.sleep(random.random() * lasted / 6)
            with contextlib.suppress(ProcessLookupError):  # it has finished
                os.kill(child, signal.SIGKILL)
        kills += 1
        code = finish()
    assert code == 0 and kills > 3  # the last one was not killed
    log, summary, tensors = left_by(tmp_path / "whole/run")
    log_again, summary_again, tensors_again = left_by(tmp_path / "torn/run")
    assert len(log) == 6 and log == log_again
    assert summary == summary_again
    assert tensors.keys() == tensors_again.keys()
    assert all(torch.equal(v, tensors_again[k]) for k, v in tensors.items())
    names = {".lock", "best.pt", "config.json", "curves.png", "log.jsonl", "summary.json", "test.npz"}
    assert {f.name for f in (tmp_path / "torn/run").iterdir()} - names <= {"last.new", "best.new"}


@pytest.fixture
def stopped(prepared, tmp_path, monkeypatch):
    """A run that Ctrl-C has stopped in its second epoch -> its words, its last.pt."""
    monkeypatch.setattr(dr, "CHECKPOINT_SECONDS", 0)
    words = ["--data", prepared, "--out", tmp_path, "--epochs", 2, "--batch-size", 16, "--device", "cpu",
             "--name", "run"]  # fmt: skip
    end_epoch = dr.end_epoch

    def press_in_the_second_epoch(run, entry):
        if entry["epoch"] == 1:
            raise KeyboardInterrupt
        end_epoch(run, entry)

    with monkeypatch.context() as patch:
        patch.setattr(dr, "end_epoch", press_in_the_second_epoch)
        done = dr_main(*words)
    assert done.returncode == 130
    assert done.stderr.strip() == "stopped; the same command resumes"
    return words, tmp_path / "run/last.pt"


def test_ctrl_c_and_the_same_command_again(stopped):
    words, last = stopped
    done = dr_main(*words)
    assert done.returncode == 0 and "resumes with epoch 1" in done.stdout
    assert not last.exists()
    assert [json.loads(x)["epoch"] for x in (last.parent / "log.jsonl").read_text().splitlines()] == [0, 1]
    assert dr_main(*words).stdout.count("epoch   0") == 1  # what is finished is done anew when asked for


def test_a_relearning_of_ones_own_that_gives_numpys_numbers_is_resumed(prepared, tmp_path, monkeypatch):
    def mine(model, initial, gaps, lam):
        return {m: np.float32(0.5) for m in gaps}

    def once(*words):
        monkeypatch.setattr(dr, "end_epoch", end_epoch)
        raise KeyboardInterrupt

    monkeypatch.setitem(dr.RELEARNING, "mine", mine)
    monkeypatch.setattr(dr, "CHECKPOINT_SECONDS", 0)
    end_epoch = dr.end_epoch
    monkeypatch.setattr(dr, "end_epoch", lambda run, entry: (once if entry["epoch"] == 3 else end_epoch)(run, entry))
    words = [*sweep_words(prepared, tmp_path, epochs=4)[:-2], "--name", "run", "--method", "mine"]
    assert dr_main(*words).returncode == 130
    done = dr_main(*words)
    dr.METHODS.pop("mine")
    assert done.returncode == 0 and "resumes with epoch 3" in done.stdout, done.stderr
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [log[k]["diagnosis"]["audio"]["strength"] for k in (1, 2, 3)] == [0.5, 0.5, 0.5]


def test_a_run_that_is_stopped_in_its_probe_is_not_done(prepared, tmp_path, monkeypatch):
    c = config(prepared, tmp_path, epochs=1)

    def stop(*words):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dr, "probe", stop)
        dr.train(c)
    assert (c.folder / "summary.json").exists() and not dr.is_done(c)
    with pytest.raises(data.DataError, match="another lr"):
        dr.is_done(dr.replace(c, lr=0.5))
    dr.train(c)
    assert dr.is_done(c)


def test_a_run_is_of_one_version_of_the_data(stopped, small_demo, tmp_path):
    words, last = stopped
    assert_one_line(dr_main(*words, "--data", small_demo), "run holds a run with another manifest: finish or delete that, or give a --name")
    assert dr_main(*words).returncode == 0
    c = dr.Config(epochs=2, batch_size=16, name="run", data=words[1], out=str(tmp_path))
    assert dr.is_done(c) and not dr.is_done(dr.replace(c, name="another"))
    with pytest.raises(data.DataError, match="holds a run with another manifest"):
        dr.is_done(dr.replace(c, data=str(small_demo)))
    best = last.parent / "best.pt"
    before = best.read_bytes()
    assert_one_line(dr_main(*words, "--data", small_demo), "run holds a run with another manifest: finish or delete that")
    assert_one_line(dr_main(*words, "--epochs", 1), "run holds a run with another epochs: finish or delete that")
    assert_one_line(dr_main("--evaluate", best, "--data", small_demo, "--device", "cpu"), "is not of a run on the demo that is in", "another manifest")
    assert best.read_bytes() == before


def test_what_cannot_be_resumed_gets_one_line(stopped):
    words, last = stopped
    whole = last.read_bytes()
    content = torch.load(last, weights_only=True)
    other = "run holds a run with another lr: finish or delete that, or give a --name"
    assert_one_line(dr_main(*words, "--lr", 0.5), other)
    for spoilt in (b"", whole[:5000], whole[:-100], b"no checkpoint"):
        last.write_bytes(spoilt)
        assert_one_line(dr_main(*words), "last.pt is no checkpoint of this dr.py, or it is damaged")
    older = {"config": content["config"] | {"colour": 1}}
    config_alone = {"config": content["config"]}
    without_optimiser = {k: v for k, v in content.items() if k != "optimiser"}
    other_model = content | {"model": {"weight": torch.ones(1)}}
    other_optimiser = content | {"optimiser": {"state": {}, "param_groups": []}}
    for foreign in (older, config_alone, without_optimiser, other_model, other_optimiser, [1]):
        torch.save(foreign, last)
        assert_one_line(dr_main(*words), "last.pt")
    last.write_bytes(whole)
    assert "resumes with epoch 1" in dr_main(*words).stdout


def test_a_disk_that_fills_up_loses_nothing(prepared, tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")  # there is none on Windows
    monkeypatch.setattr(dr, "CHECKPOINT_SECONDS", 0)
    words = ["--data", prepared, "--out", tmp_path, "--epochs", 3, "--batch-size", 16, "--device", "cpu",
             "--name", "run"]  # fmt: skip
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    end_epoch = dr.end_epoch

    def fill(run, entry):  # after the second epoch no file may grow beyond half a checkpoint
        end_epoch(run, entry)
        if entry["epoch"] == 1:
            half = (tmp_path / "run/last.pt").stat().st_size // 2
            resource.setrlimit(resource.RLIMIT_FSIZE, (half, unlimited[1]))

    with monkeypatch.context() as patch:
        patch.setattr(dr, "end_epoch", fill)
        try:
            done = dr_main(*words)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert_one_line(done, "File too large", "the same command resumes")
    assert not list(tmp_path.rglob("*.new"))  # the room is given back
    assert "resumes with epoch 1" in dr_main(*words).stdout
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
dr.probe = lambda *words: {}
dr.dist.destroy_process_group = lambda: None  # the next run needs it
remaining_epochs = dr.remaining_epochs
finish = dr.finish


def keep_the_weights(run, name):
    torch.save(run.model.state_dict(), run.config.folder / f"{name}{dr.ranks()[0]}.pt")


def keep_the_first_weights(run):
    run.config.folder.mkdir(parents=True, exist_ok=True)
    keep_the_weights(run, "first")
    yield from remaining_epochs(run)


def keep_the_last_weights(run):
    keep_the_weights(run, "last")
    finish(run)


dr.remaining_epochs = keep_the_first_weights
dr.finish = keep_the_last_weights
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


def test_averaged_gradients_stay_in_their_places_in_any_memory_format(monkeypatch):
    torch.manual_seed(0)
    model = dr.MultimodalModel(TWO, 4, "small").to(memory_format=torch.channels_last)
    inputs, labels = draw_batch(TWO)
    alone = gradients(model, dr.joint, inputs, labels)
    assert not all(g.is_contiguous() for g in alone.values())
    monkeypatch.setattr(dr.dist, "all_reduce", lambda message: message.mul_(5))  # the other process has four times ours
    monkeypatch.setattr(dr.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dr.dist, "is_initialized", lambda: True)
    dr.average_gradients(model)
    assert_close({n: p.grad for n, p in model.named_parameters()}, {n: 2.5 * g for n, g in alone.items()})


@pytest.mark.skipif(libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept():
    faults = """
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        np.ones(2_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""
    source = ["import contextlib, ctypes, resource", "import numpy as np", getsource(dr.keep_freed_memory), faults]
    source += ["given_back = faults()", "keep_freed_memory()", "print(given_back, faults())"]
    done = subprocess.run([sys.executable, "-c", "\n".join(source)], capture_output=True, text=True)
    given_back, kept = map(int, done.stdout.split())
    assert kept < given_back / 4, done.stderr


@pytest.fixture(scope="session")
def two_processes(prepared, tmp_path_factory):
    """Every method, by two processes -> their folder, and the settings."""
    out = tmp_path_factory.mktemp("two")
    settings = asdict(config(prepared, out, encoder="tiny", epochs=3, every=1, n_init=2, batch_size=14, lr=0.005))
    settings = {k: v for k, v in settings.items() if k not in ("method", "name")}
    register = 'dr.ENCODERS["tiny"] = Tiny\n'
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


@pytest.mark.xdist_group("two processes")
@pytest.mark.slow
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


@pytest.mark.xdist_group("two processes")
@pytest.mark.slow
@pytest.mark.parametrize("method", list(dr.METHODS))
def test_all_processes_end_with_the_same_weights(method, two_processes):
    out, _ = two_processes
    before, first, second = (
        torch.load(out / method / name, weights_only=True) for name in ("first0.pt", "last0.pt", "last1.pt")
    )
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first["encoders.audio.layer.weight"], before["encoders.audio.layer.weight"])


@pytest.mark.xdist_group("two processes")
@pytest.mark.slow
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
    settings = json.loads((folder / "config.json").read_text())
    settings.pop("manifest")
    c = dr.Config(**settings)
    dataset = data.load("demo", prepared)
    model = dr.MultimodalModel(dataset.shapes, 6, c.encoder, c.fusion)
    checkpoint = torch.load(folder / "best.pt", weights_only=True)
    model.load_state_dict(checkpoint["model"])
    summary = json.loads((folder / "summary.json").read_text())
    best = max(history, key=lambda e: (e["val"], -e["epoch"]))
    assert checkpoint["epoch"] == summary["best_val"]["epoch"] == best["epoch"]
    assert dr.evaluate(model, dataset.test)["accuracy"] == summary["accuracy"] == best["test"]
    assert set(summary["probe"]) == set(summary["contribution"]) == {"audio", "visual"}
    strengths = history[2]["diagnosis"]
    assert summary["strength"] == pytest.approx({m: strengths[m]["strength"] for m in strengths})
    test = np.load(folder / "test.npz")
    assert 100 * (test["logits"].argmax(1) == test["labels"]).mean() == pytest.approx(summary["accuracy"])
    assert np.asarray(Image.open(folder / "curves.png").convert("L")).std() > 5
    assert {f.name for f in folder.iterdir()} == {
        ".lock", "best.pt", "config.json", "curves.png", "log.jsonl", "summary.json", "test.npz"
    }  # fmt: skip


def test_a_checkpoint_is_evaluated(run, prepared):
    folder, _ = run
    done = dr_main("--evaluate", folder / "best.pt", "--data", prepared, "--device", "cpu")
    summary = json.loads((folder / "summary.json").read_text())
    assert done.returncode == 0
    assert f"{summary['accuracy']:.1f} %" in done.stdout and f"{summary['macro F1']:.1f} %" in done.stdout


def test_two_things_at_a_time_are_refused():
    for words in ["--evaluate", "a.pt", "--tsne", "a.pt"], ["--evaluate", "a.pt", "--sweep", "seed=0,1"]:
        assert_one_line(dr_main(*words), "one at a time")


def test_a_checkpoint_of_ones_own_method_asks_for_ones_own_file(prepared, tmp_path, monkeypatch):
    monkeypatch.setitem(dr.METHODS, "mine", dr.joint)
    c = config(prepared, tmp_path, epochs=1, method="mine")
    dr.train(c)
    monkeypatch.delitem(dr.METHODS, "mine")
    assert_one_line(dr_main("--evaluate", c.folder / "best.pt", "--device", "cpu"), "does your own file register a method")


@pytest.mark.parametrize("epochs, every, method, told", [(2, 2, "dr", 1), (3, 2, "dr", 0), (2, 2, "joint", 0)])
def test_a_run_too_short_for_a_diagnosis_says_so(epochs, every, method, told, prepared, tmp_path, capsys):
    history = dr.train(config(prepared, tmp_path, epochs=epochs, every=every, method=method))
    assert capsys.readouterr().out.count("nothing will be re-learnt") == told
    assert any("diagnosis" in entry for entry in history) == (epochs > every)


@pytest.mark.parametrize("name", ["resnet18", "tiny"])
def test_an_encoder_that_nothing_takes_is_refused(name, sequences, tmp_path):
    done = dr_main("--dataset", "mine", "--data", sequences, "--out", tmp_path, "--encoder", name, "--device", "cpu")
    assert_one_line(done, f"--encoder {name} is for pictures and spectrograms")


def test_what_would_change_a_checkpoint_is_refused(run, prepared):
    for flag in ("--evaluate", "--tsne"):
        done = dr_main(flag, run[0] / "best.pt", "--data", prepared, "--noise-audio", 5, "--modalities", "audio")
        assert_one_line(done, "take a run as it was set, and so no modalities, noise_audio")


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


def test_what_fails_after_the_last_epoch_costs_nothing_that_is_written(prepared, tmp_path, monkeypatch):
    def fails(*words):
        raise MemoryError("no room")

    monkeypatch.setattr(dr, "probe", fails)
    monkeypatch.setattr(dr, "draw_curves", fails)
    words = ["--data", prepared, "--out", tmp_path, "--epochs", 1, "--batch-size", 16, "--device", "cpu", "--name", "run"]
    done = dr_main(*words)
    assert done.returncode == 0 and done.stdout.count("MemoryError: no room") == 2
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["accuracy"] == summary["best_val"]["test"] and summary["probe"] == {}
    assert set(summary["contribution"]) == {"audio", "visual"} and (tmp_path / "run/best.pt").exists()


def test_pictures_are_drawn_whatever_backend_is_set(run, tmp_path, monkeypatch):
    _, history = run
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # which would look for the backend, cannot be imported
    dr.draw_curves(history, tmp_path / "curves.png", "$20_$50")
    assert np.asarray(Image.open(tmp_path / "curves.png").convert("L")).std() > 5


@pytest.mark.parametrize("shapes", [TWO, THREE])
def test_contributions_are_shapley_values(shapes, monkeypatch):
    torch.manual_seed(0)
    model = dr.MultimodalModel(shapes, 4, "tiny").eval()
    with torch.no_grad():
        model.fusion.head.weight *= 5
    inputs, labels = draw_batch(shapes, 60)
    features = {m: x.detach().numpy() for m, x in model.features(inputs).items()}
    monkeypatch.setattr(dr, "extract_features", lambda *words: (features, labels.numpy()))
    head = model.fusion.head
    weight, bias = head.weight.detach().numpy().T, head.bias.detach().numpy()

    def v(*kept):  # per sample
        if not kept:
            return np.zeros(60)
        x = np.concatenate([x * (m in kept) for m, x in features.items()], 1)
        return len(kept) * ((x @ weight + bias).argmax(1) == labels.numpy())

    found = dr.contributions(model, None)
    if shapes is TWO:  # the official lines, for two
        expected = {"audio": (v("audio") - v() + v("audio", "visual") - v("visual")).mean() / 2}
        expected["visual"] = (v("visual") - v() + v("audio", "visual") - v("audio")).mean() / 2
    else:
        expected = {}
        for m in shapes:
            a, b = (n for n in shapes if n != m)
            phi = 2 * (v(m) - v()) + v(a, m) - v(a) + v(b, m) - v(b) + 2 * (v(a, b, m) - v(a, b))
            expected[m] = phi.mean() / 6
    assert found == pytest.approx(expected)
    assert sum(found.values()) == pytest.approx(v(*shapes).mean())


def test_ten_modalities_have_contributions_in_no_time(monkeypatch):
    shapes = {f"m{k}": (3, 2) for k in range(10)}  # 10! orders
    model = dr.MultimodalModel(shapes, 4, "tiny").eval()
    inputs, labels = draw_batch(shapes, 30)
    features = {m: x.detach().numpy() for m, x in model.features(inputs).items()}
    monkeypatch.setattr(dr, "extract_features", lambda *words: (features, labels.numpy()))
    monkeypatch.setattr(dr, "choose_encoder", lambda shape, name: "tiny")
    right = (model(inputs).argmax(1) == labels).double().mean().item()
    assert sum(dr.contributions(model, None).values()) == pytest.approx(10 * right)


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


def test_names_of_classes_are_no_mathematics_and_none_is_hidden(tmp_path, monkeypatch):
    names = ["$20_$50", "_rest", "a_b"]
    rng = np.random.default_rng(0)
    features = {"audio": rng.normal(size=(30, 8)).astype(np.float32)}
    dataset = SimpleNamespace(classes=names, test=None)
    monkeypatch.setattr(dr, "load_run", lambda path, **changes: (None, dataset, None))
    monkeypatch.setattr(dr, "extract_features", lambda *words: (features, np.arange(30) % 3))
    drawn = []
    monkeypatch.setattr(dr.Figure, "savefig", lambda figure, path: drawn.append(figure))
    dr.draw_tsne(tmp_path / "best.pt")
    texts = drawn[0].axes[0].get_legend().get_texts()
    assert [text.get_text().strip() for text in texts] == names
    assert not any(text.get_parse_math() for text in texts)


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
    return {row[0]: dict(zip(cells[0], row)) for row in cells[1:]}


def read_csv(path):
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.mark.xdist_group("swept")
def test_a_sweep_reports_means_deviations_and_paired_intervals(swept):
    out, told = swept
    found = {}
    on_val = {}  # what a setting is to be chosen by
    for method in ("joint", "dr"):
        summaries = [json.loads((f / "summary.json").read_text()) for f in sorted(out.glob(f"demo-{method}-*"))]
        assert len(summaries) == 2
        found[method] = np.array([s["accuracy"] for s in summaries])
        on_val[method] = np.mean([s["best_val"]["val"] for s in summaries])
    rows = read_table(out / "grid.md")
    assert list(rows) == ["joint", "dr"]
    assert {"accuracy", "vs joint", "macro F1", "probe audio", "strength visual"} <= set(rows["dr"])
    for method, values in found.items():
        assert rows[method]["accuracy"] == f"{values.mean():.1f} ± {values.std(ddof=1):.1f}"
        assert rows[method]["accuracy on val"].startswith(f"{on_val[method]:.1f} ± ")
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


@pytest.mark.xdist_group("swept")
def test_a_sweep_does_only_what_is_missing(swept, prepared):
    out, _ = swept
    words = sweep_words(prepared, out, "--name", "grid", "--sweep", "method=joint,dr", "seed=0,1")
    made = {f: f.stat().st_mtime_ns for f in out.glob("*/best.pt")}
    lost = sorted(out.glob("demo-dr-*"))[1]
    (lost / "summary.json").unlink()
    log = (lost / "log.jsonl").read_text().splitlines()
    report = read_csv(out / "grid.csv")
    done = dr_main(*words)
    assert done.returncode == 0 and "3 of 4 runs are there already" in done.stdout
    assert {f.parent.name for f, t in made.items() if f.stat().st_mtime_ns != t} == {lost.name}
    log_again = (lost / "log.jsonl").read_text().splitlines()
    assert without_seconds(map(json.loads, log)) == without_seconds(map(json.loads, log_again))
    for before, after in zip(report, read_csv(out / "grid.csv"), strict=True):
        assert {**before, "seconds per epoch": 0} == {**after, "seconds per epoch": 0}


def test_a_run_that_fails_leaves_the_others_alone_and_is_named(sequences, tmp_path):
    words = sweep_words(sequences, tmp_path, "--dataset", "mine", "--sweep", "modalities=smell,text", epochs=1)
    done = dr_main(*words)
    assert done.returncode == 2 and "1 of 2 runs failed; the same command tries them again" in done.stderr
    assert "mine-dr-smell-" in done.stderr and "no modality smell; it has text, audio, vision" in done.stderr
    assert len(list(tmp_path.glob("*text*/summary.json"))) == 1
    (report,) = tmp_path.glob("sweep*.csv")  # of what is done
    assert [line["modalities"] for line in read_csv(report)] == ["text"]
    words = sweep_words(sequences, tmp_path, "--dataset", "mine", "--sweep", "modalities=smell", epochs=1)
    done = dr_main(*words)
    assert done.returncode == 2 and "1 of 1 runs failed" in done.stderr


def test_noise_is_left_out_where_there_is_nothing_to_put_it_on(sequences, tmp_path):
    words = sweep_words(sequences, tmp_path, "--dataset", "mine", "--noise-audio", 1, "--name", "t", epochs=1)
    done = dr_main(*words, "--sweep", "modalities=text,text+audio")
    assert done.returncode == 0, done.stderr
    assert [line["modalities"] for line in read_csv(tmp_path / "t.csv")] == ["text+audio"]
    assert_one_line(dr_main(*words, "--modalities", "text"), "--noise-audio is noise on audio; there is text")


def test_a_sweep_leaves_out_what_is_undefined_and_compares_with_one_method(sequences, tmp_path):
    words = sweep_words(sequences, tmp_path, "--dataset", "mine", "--name", "t", "--sweep", epochs=1)
    done = dr_main(*words, "fusion=film,sum", "modalities=text,text+audio,text+audio+vision", "method=multitask,joint")
    assert done.returncode == 0, done.stderr
    runs = {(x["fusion"], x["modalities"], x["method"]): float(x["accuracy"]) for x in read_csv(tmp_path / "t.csv")}
    pairs = [("film", "text+audio"), ("sum", "text"), ("sum", "text+audio"), ("sum", "all")]
    assert {r[:2] for r in runs if r[2] == "joint"} == set(pairs)
    assert re.search("^6 of 12 runs are left out: .*film", done.stdout, re.M)
    assert {r[:2] for r in runs if r[2] == "multitask"} == set(pairs[2:])
    column = {row: cells["vs joint"] for row, cells in read_table(tmp_path / "t.md").items()}
    for fusion, modalities in pairs:
        assert column[f"{fusion}, {modalities}, joint"] == ""
    for fusion, modalities in pairs[2:]:
        difference = runs[fusion, modalities, "multitask"] - runs[fusion, modalities, "joint"]
        assert column[f"{fusion}, {modalities}, multitask"] == f"{difference:+.1f}"


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
    written = {setting: row["accuracy"] for setting, row in read_table(tmp_path / "both.md").items()}
    assert written == {setting: f"{float(line['accuracy']):.1f}" for setting, line in lines.items()}  # 20.0, not 20


def test_a_run_of_a_sweep_that_the_system_kills_is_said(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(dr, "train_quietly", lambda *settings: os.kill(os.getpid(), signal.SIGKILL))
    done = dr_main(*sweep_words(prepared, tmp_path, "--sweep", "seed=0,1", jobs=2))
    assert done.returncode == 2 and "for want of memory" in done.stderr and "same command" in done.stderr


@pytest.mark.xdist_group("swept")
def test_a_sweep_that_is_refused_leaves_what_is_there(swept, prepared):
    out, _ = swept
    made = {f: f.read_bytes() for f in sorted(out.glob("demo-*/*.txt"))}
    assert len(made) == 4 and all(made.values())
    folder = next(out.glob("demo-dr-*-0"))
    words = sweep_words(prepared, out, "--sweep", "seed=0")
    stored = (folder / "config.json").read_text()
    (folder / "config.json").write_text(stored.replace('"momentum": 0.9', '"momentum": 0.8'))
    assert_one_line(dr_main(*words), "holds a run with another momentum")
    (folder / "config.json").write_text(stored)
    assert made == {f: f.read_bytes() for f in sorted(out.glob("demo-*/*.txt"))}


@pytest.mark.slow
def test_a_killed_sweep_takes_its_runs_with_it(prepared, tmp_path):
    words = sweep_words(prepared, tmp_path, "--sweep", "seed=0,1", jobs=2, epochs=5000)
    with subprocess.Popen([sys.executable, "dr.py", *map(str, words)], cwd=HERE, stderr=subprocess.DEVNULL) as process:
        while len(list(tmp_path.glob("*/log.jsonl"))) < 2 and process.poll() is None:
            time.sleep(0.1)
        process.kill()

    def logged():
        return sum(f.stat().st_size for f in tmp_path.glob("*/log.jsonl"))

    time.sleep(2.5)
    size = logged()
    time.sleep(1)
    assert logged() == size > 0


def test_a_sweep_names_every_field_once_and_takes_folders(prepared, tmp_path):
    assert_one_line(dr_main(*sweep_words(prepared, tmp_path, "--sweep", "method=joint", "method=dr")), "is there twice")
    done = dr_main(*sweep_words(prepared, tmp_path, "--sweep", f"out={tmp_path}/p/q", "method=joint", epochs=1))
    assert done.returncode == 0 and len(list(tmp_path.glob("*.md"))) == 1, done.stderr


def test_a_sweep_of_many_words_has_a_short_name(prepared, tmp_path):
    values = ",".join(f"1.{k}{40 * '0'}1" for k in range(2))
    done = dr_main(*sweep_words(prepared, tmp_path, "--sweep", f"lam={values}", "method=joint", epochs=1))
    assert done.returncode == 0, done.stderr
    (table,) = tmp_path.glob("*.md")
    assert len(table.name) <= 103 and values in table.read_text()


@pytest.mark.slow
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
    assert done.returncode == 130 and done.stderr.strip().endswith("the same command resumes")
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
        (["lam=1,-1"], "lam is at least 0"),
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
    lines = [line.split(maxsplit=1)[1] for line in text.split("methods:\n")[1].split("\n\n")[0].splitlines()]
    assert len(set(lines)) == len(lines) == len(dr.METHODS)  # each says something of its own
    for key, value in dr.OFFICIAL.items():
        assert re.search(rf"cremad .*{value}", text) and key in text


REAL = Path(os.environ["DR_REAL"]) if "DR_REAL" in os.environ else None
needs_real = pytest.mark.skipif(REAL is None, reason="DR_REAL names no folder of real material")

# --- data.py: helpers --------------------------------------------------------------------------------------

def parts(clips, what=lambda c: c.id):
    return {s: {what(c) for c in clips if c.split == s} for s in ("train", "val", "test")}


FLASH = dict(codec="flv1", sound="libmp3lame")
XVID = dict(codec="mpeg4", sound="libmp3lame", tag="XVID", options={"bf": "2"})
H264 = dict(codec="libx264", sound="aac", options={"bf": "2", "x264-params": "log-level=error"})
OPTIONS = {"frames": 3, "keep": 1, "size": 16, "more": {}}
STUB = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def film(path, codec, sound=None, tag=None, options=None, muxer=None, gop=12, frames=24, move=(2, 1), seed=0, first=0):
    """A texture of 128 x 96 that moves by `move` pixels a frame, 12 frames a second, and a tone of 440 Hz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.tile(np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8), (3, 3, 1))
    texture = np.asarray(Image.fromarray(coarse).resize((384, 288), Image.BICUBIC))[96:192, 128:256]
    with av.open(str(path), "w", options=muxer or {}) as movie:
        video = movie.add_stream(
            codec, 12, width=128, height=96, pix_fmt="yuv420p", bit_rate=900_000, options=options or {}
        )
        video.gop_size, video.codec_context.codec_tag = gop, tag or video.codec_context.codec_tag
        packets = []
        for i in range(frames):
            picture = np.ascontiguousarray(np.roll(texture, (i * move[1], i * move[0]), (0, 1)))
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts = first + i  # below 0: hidden by an MP4's edit list, as in clips cut without recoding
            packets += video.encode(frame)
        packets += video.encode()
        if sound:
            audio = movie.add_stream(sound, 44100, layout="mono")
            tone = np.float32(0.3 * np.sin(2 * np.pi * 440 * np.arange(44100 * frames // 12) / 44100))[None]
            wave = (tone, "fltp") if sound == "aac" else (np.int16(32767 * tone), "s16p")
            heard = av.AudioFrame.from_ndarray(*wave, "mono")
            heard.sample_rate = 44100
            packets += audio.encode(heard) + audio.encode()
        movie.mux(packets)
    return path


def babble(path, seconds, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).normal(100, 3000, int(16000 * seconds))
    scipy.io.wavfile.write(path, 16000, noise.astype(np.int16))


def frames_by_hand(path, count, size, longest=None):
    """Frames int((i + 0.5) * N / count) of N, every one of which is decoded."""
    with av.open(str(path)) as movie:
        every = list(movie.decode(video=0))[:longest]
    picked = [every[int((i + 0.5) * len(every) / count)] for i in range(count)]
    return np.stack([f.reformat(size, size, "rgb24").to_ndarray() for f in picked])


def fbank_by_hand(path, frames):
    wave = torch.from_numpy(scipy.io.wavfile.read(path)[1] / np.float32(32768))[None]
    mel = data.kaldi.fbank(wave - wave.mean(), htk_compat=True, sample_frequency=16000, use_energy=False,
                           window_type="hanning", num_mel_bins=128, dither=0.0, frame_shift=10)  # fmt: skip
    padded = np.zeros((frames, 128), np.float16)
    padded[: len(mel)] = mel[:frames].numpy()
    return padded.T[None]


def arrays(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob("*/*.npy"))}


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def link(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    os.link(source, target)


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def replace(path, content):
    path.unlink()  # a hard link: the file that it is linked to stays
    path.write_bytes(content)


@pytest.fixture(scope="session")
def crema(tmp_path_factory):
    """90 clips: five actors, three sentences, six emotions."""
    raw = tmp_path_factory.mktemp("raw") / "CREMA-D"
    names = [f"{a}_{s}_{e}_XX" for a in range(1001, 1006) for s in ("IEO", "IOM", "TIE") for e in data.EMOTIONS]
    for k, name in enumerate(names):
        film(raw / f"VideoFlash/{name}.flv", "flv1", frames=24 + k % 9, seed=k)  # its sound is never read
        babble(raw / f"AudioWAV/{name}.wav", (0.8, 3, 3.7)[k % 3], seed=k)
    return raw


@pytest.fixture(scope="session")
def crowd(crema, tmp_path_factory):
    """The same under 360 names, some seconds of work, with one stub among them -> raw folder, prepared folder."""
    raw = tmp_path_factory.mktemp("crowd")
    for k in range(4):
        for path in crema.glob("*/*.*"):
            link(path, raw / path.parent.name / f"{int(path.name[:4]) + 10 * k}{path.name[4:]}")
    replace(raw / "VideoFlash/1031_TIE_FEA_XX.flv", STUB)
    return raw, data.prepare("cremad", raw, tmp_path_factory.mktemp("out"), size=32, workers=1)


@pytest.fixture(scope="session")
def spoilt(crema, tmp_path_factory):
    """90 clips, ten of them spoilt, and three that are odd but good -> raw folder, {id: reason}."""
    raw = tmp_path_factory.mktemp("spoilt")
    for path in crema.glob("*/*.*"):
        link(path, raw / path.parent.name / path.name)
    names = sorted(p.stem for p in raw.glob("VideoFlash/*"))[:60:6]
    flv, wav = [raw / f"VideoFlash/{n}.flv" for n in names], [raw / f"AudioWAV/{n}.wav" for n in names]
    bad = [(flv[0], flv[0].read_bytes()[:9000], "truncated"), (flv[1], b"", "Invalid data"), (wav[2], b"", "Invalid data"),
           (wav[3], wav[3].read_bytes()[:30], "Invalid data"), (wav[4], wav[4].read_bytes()[:50], "no sound"),
           (flv[5], STUB, "stub"), (wav[6], STUB, "stub"), (flv[7], bytes(3000), "Invalid data"),
           (flv[8], b"FLV\1\5\0\0\0\11\0\0\0\0", "Invalid data"), (flv[9], b"", "missing")]  # fmt: skip
    for path, content, _ in bad:
        replace(path, content)
    flv[9].unlink()
    film(raw / "VideoFlash/1009_IEO_DIS_MD.flv", "flv1", frames=720)  # a minute
    film(raw / "VideoFlash/1009_MTI_NEU_XX.flv", "flv1", frames=1)  # very short, without sound; its WAV is good
    film(raw / "VideoFlash/1009_TIE_SAD_XX.flv", **FLASH, muxer={"flvflags": "no_duration_filesize"})
    for name in "1009_IEO_DIS_MD", "1009_MTI_NEU_XX", "1009_TIE_SAD_XX":
        babble(raw / f"AudioWAV/{name}.wav", 3)
    return raw, {path.stem: says for path, _, says in bad}


@pytest.fixture(scope="session")
def small_demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    data.prepare("demo", out=folder, clips=161)  # 85 / 20 / 56 or so
    return folder


# --- 1 the datasets: from a raw folder to clips -----------------------------------------------------------------


@needs_real
def test_cremads_splits_of_the_real_names(tmp_path):
    with open(REAL / "cremad/SentenceFilenames.csv", newline="") as file:
        names = {row["Filename"] for row in csv.DictReader(file)}
    touch(tmp_path, *(f"AudioWAV/{name}.wav" for name in names), *(f"VideoFlash/{name}.flv" for name in names))
    drawn, whole = parts(data.cremad(tmp_path)[0]), Counter(n[9:12] for n in names)
    assert [len(p) for p in drawn.values()] == [5954, 744, 744] and set.union(*drawn.values()) == names
    for part in drawn.values():
        share = Counter(n[9:12] for n in part)
        assert all(abs(share[e] - len(part) * whole[e] / 7442) < 1 for e in whole)
    assert parts(data.cremad(tmp_path)[0]) == drawn  # the same every time
    actors = parts(data.cremad(tmp_path, split="actors")[0], lambda c: c.id[:4])
    assert [len(p) for p in actors.values()] == [73, 9, 9] and len(set.union(*actors.values())) == 91
    given = parts(data.cremad(tmp_path, split_dir=REAL / "cremad")[0], lambda c: f"{c.id},{data.EMOTIONS[c.label]}")
    for split, name in ("train", "my_train"), ("val", "val"), ("test", "test"):
        assert given[split] == set((REAL / f"cremad/{name}.csv").read_text().split()) - {"name,label"}


@pytest.mark.parametrize("line, says", [
    ("1002_IEO_ANG_XX,ANG\n1001_IEO_SAD_XX,SAD", "1001_IEO_SAD_XX,SAD .*or listed twice"),
    ("name,label\n1003_TIE_FEA_XX,SAD", "1003_TIE_FEA_XX,SAD .*not what its name says"),
    ("1099_TIE_FEA_XX,FEA", "1099_TIE_FEA_XX,FEA is not among the raw files"),
    ("1003_TIE_FEA_XX,FEAR", "1003_TIE_FEA_XX,FEAR is not"),  # no header
])  # fmt: skip
def test_split_files_that_are_wrong(line, says, crema, tmp_path):
    for split, clip in ("train", "1001_IEO_ANG_XX,ANG"), ("val", "1001_IEO_SAD_XX,SAD"), ("test", line):
        (tmp_path / f"{split}.csv").write_text(clip + "\n")
    with pytest.raises(data.DataError, match=f"test.csv: {says}"):
        data.cremad(crema, split_dir=tmp_path)


def test_kinetics_sounds_in_each_layout_and_below_a_folder_called_val(tmp_path):
    root, parted = tmp_path / "val", ("train", "val")
    truth = {s: [(f"-b_defgh{s[0]}{k:02d}", k % 7, (0, 26, 29)[k % 3]) for k in range(30)] for s in parted}
    for s, clips in truth.items():
        name, lines = data.KINETICS_SOUNDS, []
        for i, start, k in clips:
            for folder in f"a/{s}/{name[k]}", f"b/{s}/{name[k].replace(' ', '_')}", f"c/{s}", f"d/{s}":
                (root / folder).mkdir(parents=True, exist_ok=True)
                (root / folder / f"{i}_{start:06d}_{start + 10:06d}.mp4").touch()
            lines.append(f"{i}_{start:06d}_{start + 10:06d},10,{k}" if s == "train" else f"{i}_{start},10,{k}")
        (root / f"a/{s}/abseiling").mkdir()
        (root / f"a/{s}/abseiling/---QUuC4vJs_000084_000094.mp4").touch()
        (root / f"a/{s}/{name[0]}/not a clip.mp4").touch()
        rows = ["label,youtube_id,time_start,time_end,split", f'"abseiling",---QUuC4vJs,84,94,{s}']
        rows += [f'"{name[k]}",{i},{start},{start + 10},{s}' for i, start, k in clips]
        (root / f"c/{s}.csv").write_text("\n".join(rows))
        (root / f"d/{'test' if s == 'val' else s}.txt").write_text("\n".join(lines))
    first, *others = [data.kinetics(root / f, split_dir=root / f if f == "d" else None)[0] for f in "abcd"]
    found = parts(first, lambda c: (c.id[:11], c.label))
    assert all(c.files["audio"].exists() for c in first) and found["test"] == {(i, k) for i, _, k in truth["val"]}
    assert found["train"] | found["val"] == {(i, k) for i, _, k in truth["train"]} and not found["train"] & found["val"]
    assert len(found["val"]) == 3 and {k for _, k in found["val"]} == {0, 26, 29}
    assert all(parts(clips, lambda c: (c.id[:11], c.label)) == found for clips in others)


@needs_real
def test_kinetics_sounds_of_the_real_lists(tmp_path):
    (tmp_path / "--4-0ihtnBU_000058_000068.mp4").touch()
    clips = data.kinetics(tmp_path, split_dir=REAL / "kinetics_sounds")[0]
    found = parts(clips, lambda c: (c.id[:11], int(c.id[12:]), c.label))
    split = lambda line: (line[:11], int(line[12:].split(",")[0].split("_")[0]), int(line.split(",")[2]))  # noqa: E731
    lines = [(REAL / f"kinetics_sounds/{s}.txt").read_text().split() for s in ("train", "test")]
    train, test = ({split(line) for line in part} for part in lines)
    assert found["test"] == test and found["train"] | found["val"] == train - test and not found["train"] & found["val"]
    whole, held = Counter(k for *_, k in train), Counter(k for *_, k in found["val"])
    assert len(held) == 31 and all(abs(held[k] - 0.1 * whole[k]) <= 1 for k in whole)
    assert [c.id for c in clips if c.files["visual"].exists()] == ["--4-0ihtnBU_000058"]


@pytest.fixture(scope="session")
def ucf(tmp_path_factory):
    """4 classes of 12 groups, the first two of them test -> raw folder, {id: reason}; the lists write HandStand."""
    raw, classes = tmp_path_factory.mktemp("UCF101"), ["ApplyEyeMakeup", "Archery", "HandstandPushups", "YoYo"]
    mute = {**XVID, "sound": None}
    lines, films = {"train": [], "test": []}, [film(raw / f"films/{k}.avi", **mute, seed=k) for k in range(4)]
    for k, c in enumerate(classes):
        for g in (1, 2, *range(8, 18)):
            for n in 1, 2:
                link(films[g % 4], raw / f"UCF-101/{c}/v_{c}_g{g:02d}_c{n:02d}.avi")
                line = f"{c}/v_{c.replace('Handstand', 'HandStand')}_g{g:02d}_c{n:02d}.avi"
                lines["test" if g < 3 else "train"].append(line if g < 3 else f"{line} {k + 1}")
    lists = raw / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("".join(f"{k} {c}\r\n" for k, c in enumerate(classes, 1)))
    for split in lines:
        (lists / f"{split}list01.txt").write_text("\r\n".join(lines[split]) + "\r\n")
    replace(raw / "UCF-101/Archery/v_Archery_g09_c01.avi", b"")
    replace(raw / "UCF-101/YoYo/v_YoYo_g10_c01.avi", films[0].read_bytes()[: films[0].stat().st_size // 2])
    return raw, {"v_Archery_g09_c01": "Invalid data", "v_YoYo_g10_c01": "truncated"}


def test_ucf101_holds_out_whole_groups_and_finds_handstand_pushups(ucf):
    clips, classes = data.ucf101(ucf[0])
    groups = parts(clips, lambda c: c.id[:-4])
    assert [len(g) for g in groups.values()] == [36, 4, 8] and len(set.union(*groups.values())) == 48
    assert {g[-3:] for g in groups["test"]} == {"g01", "g02"} and len({c.label for c in clips if c.split == "val"}) == 4
    assert all(classes[c.label].lower() == c.id.split("_")[1].lower() for c in clips)


def test_ucf101s_own_lists_are_held_against_the_rule(tmp_path):
    names = [f"v_{c}_g{g:02d}_c01" for c in ("Archery", "HandstandPushups") for g in range(1, 26)]
    touch(tmp_path, *(f"UCF-101/{n}.avi" for n in names))
    official = [n.replace("stand", "Stand") for n in names if int(n[-6:-4]) in range(8, 15)]
    for listed, fits in ((official, True), (official[1:], False), ([*official, names[0]], False)):
        (tmp_path / "testlist02.txt").write_text("\r\n".join(f"{n[2:-8]}/{n}.avi" for n in listed))
        data.ucf101(tmp_path, fold=1)  # has another list
        with contextlib.nullcontext() if fits else pytest.raises(data.DataError, match="list02.txt is not .* 8 to 14"):
            data.ucf101(tmp_path, fold=2)


@pytest.fixture(scope="session")
def kinetics(tmp_path_factory):
    """403 names for six films, so that every class has clips in every part -> raw folder, {id: reason}."""
    raw = tmp_path_factory.mktemp("kinetics400")
    films = [film(raw / f"films/{k}.mp4", **H264, seed=k) for k in range(6)]
    mute, cut = film(raw / "films/mute.mp4", "libx264", options=H264["options"]), film(raw / "films/cut.mp4", **H264)
    cut.write_bytes(cut.read_bytes()[:9000])
    for part, n in ("train", 341), ("val", 62):
        for k in range(n):
            source = {7: mute, 8: cut}.get(k if part == "train" else -1, films[k % 6])
            name = data.KINETICS_SOUNDS[k % 31].replace(" ", "_" if k % 2 else " ")
            link(source, raw / part / name / f"abcdefg{part[0]}{k:03d}_000001_000011.mp4")
    shutil.rmtree(raw / "films")
    return raw, {"abcdefgt007_000001": "no sound", "abcdefgt008_000001": "Invalid data"}


# --- layouts, as people have them; most of them are named, not filled ---


def clip_names(*emotions, actors=range(1001, 1011)):
    return [f"{a}_IEO_{e}_XX" for a in actors for e in emotions or data.EMOTIONS]


@pytest.mark.parametrize("sound, picture", [
    ("AudioWAV/{}.wav", "VideoFlash/{}.flv"), ("crema-d-mirror-main/AudioWAV/{}.wav", "crema-d-mirror-main/VideoFlash/{}.flv"),
    ("AudioWAV/{}.WAV", "VideoFlash/{}.mp4"), ("{}.wav", "VideoMP4/{}.mp4"), ("a/{}.wav", "a/{}.FLV")])  # fmt: skip
def test_cremad_at_any_depth_and_in_any_case(sound, picture, tmp_path):
    names = clip_names()
    touch(tmp_path, *map(sound.format, names), *map(picture.format, names), "AudioWAV/notes.wav", "VideoFlash/._x.flv")
    clips = data.cremad(tmp_path)[0]
    assert sorted(c.id for c in clips) == sorted(names) and all(p.is_file() for c in clips for p in c.files.values())
    assert [len(p) for p in parts(clips).values()] == [48, 6, 6]


def test_cremads_flash_is_taken_before_an_mp4_of_the_same_name(tmp_path):
    names = clip_names()
    touch(tmp_path, *(f"AudioWAV/{n}.wav" for n in names), *(f"VideoFlash/{n}.{t}" for n in names for t in ("mp4", "flv")))
    assert {c.files["visual"].suffix for c in data.cremad(tmp_path)[0]} == {".flv"}


@pytest.mark.parametrize("layout, says", [("{}.wav", "without picture"), ("VideoFlash/{}.flv", "without sound"), ("{}.txt", "no CREMA-D")])  # fmt: skip
def test_half_of_cremad_says_where_the_other_half_is(layout, says, tmp_path):
    touch(tmp_path, *map(layout.format, clip_names()))
    done = data_called("cremad", "--raw", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 2 and says in done.stderr and "gitlab.com/cs-cooper-lab" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_ogm_ges_lists_of_cremad_without_validation_hold_out_a_tenth_of_train(tmp_path):
    names = clip_names()
    touch(tmp_path, *(f"AudioWAV/{n}.wav" for n in names), *(f"VideoFlash/{n}.flv" for n in names))
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/train.csv").write_text("".join(f"{n},{n[9:12]}\n" for n in names[:50]))
    (tmp_path / "lists/test.csv").write_text("".join(f"{n},{n[9:12]}\n" for n in names[50:55]))
    found = parts(data.cremad(tmp_path, split_dir=tmp_path / "lists")[0])
    assert [len(p) for p in found.values()] == [45, 5, 5] and found["test"] == set(names[50:55])
    assert found["train"] | found["val"] == set(names[:50])


def kinetics_names(split, n=62):
    return [(f"-b_defgh{split[1]}{k:02d}", k % 7, data.KINETICS_SOUNDS[k % 31]) for k in range(n)]


@pytest.mark.parametrize("train, test", [
    ("train/{c}", "val/{c}"), ("train/{c}", "validation/{c}"), ("train/{c}", "test/{c}"), ("videos_train/{c_}", "videos_val/{c_}"),
    ("train_256/{c}", "val_256/{c}"), ("videos/train/{c_}", "videos/val/{c_}"), ("k400_train_val/train/{c}", "k400_train_val/val/{c}"),
    ("train/{c}/playing_{c}_unpacked", "val/{c}/x")])  # fmt: skip
def test_kinetics_by_folders(train, test, tmp_path):
    root = tmp_path / "train and val"  # the folder's own name means nothing
    for layout, split in (train, "train"), (test, "val"):
        for i, start, c in kinetics_names(split):
            touch(root, layout.format(c=c, c_=c.replace(" ", "_")) + f"/{i}_{start:06d}_{start + 10:06d}.mp4")
    found = parts(data.kinetics(root)[0], lambda c: (c.id[:11], data.KINETICS_SOUNDS[c.label]))
    assert found["test"] == {(i, c) for i, _, c in kinetics_names("val")}
    assert found["train"] | found["val"] == {(i, c) for i, _, c in kinetics_names("train")} and len(found["val"]) == 6


@pytest.mark.parametrize("train, val", [("train.csv", "val.csv"), ("annotations/train.csv", "annotations/validate.csv"),
                                        ("a/kinetics_train.csv", "a/kinetics_val.csv")])  # fmt: skip
def test_kinetics_by_tables_with_replacements_and_a_test_table_without_labels(train, val, tmp_path):
    for name, split in (train, "train"), (val, "val"):
        rows = ["label,youtube_id,time_start,time_end,split,is_cc", "abseiling,---QUuC4vJs,84,94,train,0"]
        for i, start, c in kinetics_names(split):
            rows.append(f'"{c}",{i},{start},{start + 10},{split},0' if start else f"{c},{i},{start},{start + 10},{split},0")
            touch(tmp_path, f"{split}/{i}_{start:06d}_{start + 10:06d}.mp4")
        touch(tmp_path, name)
        (tmp_path / name).write_text("\n".join(rows))
    (tmp_path / "test.csv").write_text("youtube_id,time_start,time_end,split\n-b_defghx00,1,11,test\n")
    replaced = "replacement/replacement_for_corrupted_k400/{}_000003_000013.mp4".format(kinetics_names("val")[3][0])
    touch(tmp_path, replaced)
    clips = data.kinetics(tmp_path)[0]
    assert [len(p) for p in parts(clips).values()] == [56, 6, 62] and all(c.files["visual"].exists() for c in clips)
    assert [c.files["visual"] for c in clips if "replacement" in str(c.files["visual"].relative_to(tmp_path))] == [
        tmp_path / replaced
    ]


@pytest.mark.parametrize("names, counts", [(["my_train.txt", "my_test.txt"], [56, 6, 62]), (["train.txt", "val.txt"], [56, 6, 62]),
                                           (["train.txt", "val.txt", "test.txt"], [62, 62, 62])])  # fmt: skip
def test_kinetics_lists_under_any_name(names, counts, tmp_path):
    for name in names:
        split = data.split_of(name)
        lines = [f"{i}_{start},10,{data.KINETICS_SOUNDS.index(c)}" for i, start, c in kinetics_names(split)]
        touch(tmp_path, f"lists/{name}", *(f"clips/{i}_{s:06d}_{s + 10:06d}.mp4" for i, s, _ in kinetics_names(split)))
        (tmp_path / "lists" / name).write_text("\n".join(lines))
    clips = data.kinetics(tmp_path / "clips", split_dir=tmp_path / "lists")[0]
    assert [len(p) for p in parts(clips).values()] == counts
    (tmp_path / "lists" / names[0]).write_text("abcdefghijk_1,10,33\n")
    with pytest.raises(data.DataError, match="labels are 0 to 30, not 33"):
        data.kinetics(tmp_path / "clips", split_dir=tmp_path / "lists")


@pytest.mark.parametrize("present, says", [(["train"], "in the test split 0 have their files"), (["val"], "in the train split 0")])
def test_a_split_without_files_ends_before_any_work(present, says, tmp_path):
    for split in "train", "test":
        lines = [f"{i}_{start},10,{data.KINETICS_SOUNDS.index(c)}" for i, start, c in kinetics_names(split)]
        touch(tmp_path, f"lists/{split}.txt")
        (tmp_path / f"lists/{split}.txt").write_text("\n".join(lines))
        if (split == "train") == ("train" in present):
            touch(tmp_path, *(f"clips/{i}_{start:06d}.mp4" for i, start, _ in kinetics_names(split)))
    with pytest.raises(data.DataError, match=says):
        data.prepare("kinetics", tmp_path / "clips", tmp_path / "out", split_dir=tmp_path / "lists")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fold", [1, 2, 3])
@pytest.mark.parametrize("layout", ["UCF-101/{c}/{v}", "UCF101/UCF-101/{c}/{v}", "train/{c}/{v}", "{v}"])
def test_ucf101s_official_splits_are_a_rule(layout, fold, tmp_path):
    classes = ["HandstandPushups", "YoYo", "ApplyEyeMakeup", "jumpRope"]
    for c in classes:
        touch(tmp_path, *(layout.format(c=c, v=f"v_{c}_g{g:02d}_c01.avi") for g in range(1, 26)))
    clips, names = data.ucf101(tmp_path, fold=fold)
    assert names == ["ApplyEyeMakeup", "HandstandPushups", "jumpRope", "YoYo"]
    assert data.make_spec("flow", clips, OPTIONS)["flow"].startswith("DIS")
    assert {int(c.id[-6:-4]) for c in clips if c.split == "test"} == set(range(7 * fold - 6, 7 * fold + 1))
    assert [len(p) for p in parts(clips).values()] == [65, 7, 28]


@pytest.mark.parametrize("u, v", [
    ("u/{v}/frame000001.jpg", "v/{v}/frame000001.jpg"), ("tvl1/u/{c}/{v}/frame000001.jpg", "tvl1/v/{c}/{v}/frame000001.jpg"),
    ("rawframes/{c}/{v}/flow_x_00001.jpg", "rawframes/{c}/{v}/flow_y_00001.jpg")])  # fmt: skip
def test_ucf101s_flow_in_both_layouts_is_never_mixed(u, v, tmp_path):
    names = [(c, f"v_{c}_g{g:02d}_c01") for c in ("Archery", "YoYo") for g in range(1, 12)]
    touch(tmp_path, *(f"{c}/{n}.avi" for c, n in names), *(u.format(c=c, v=n) for c, n in names[1:]))
    with pytest.raises(data.DataError, match="holds half of the optical flow"):
        data.ucf101(tmp_path)
    touch(tmp_path, *(v.format(c=c, v=n) for c, n in names[1:]), f"rawframes/YoYo/{names[0][1]}/img_00001.jpg")
    clips, _ = data.ucf101(tmp_path)
    assert data.make_spec("flow", clips, OPTIONS)["flow"].startswith("TV-L1")
    there = lambda c: all(folder.is_dir() for folder in c.files["flow"])  # noqa: E731
    assert [c.id for c in clips if not there(c)] == [names[0][1]]  # is skipped, not computed
    assert [len(axis) for axis in data.flow_pictures(clips[1].files["flow"])] == [1, 1]


def test_links_in_circles_are_gone_through_once(tmp_path):
    names = [f"v_Archery_g{g:02d}_c01.avi" for g in range(1, 26)]
    touch(tmp_path, *(f"UCF-101/Archery/{n}" for n in names), ".trash/v_YoYo_g01_c01.avi", "u/x/v_YoYo_g01_c01/a.jpg")
    for link in "latest", "current":
        (tmp_path / link).symlink_to(".")
    (tmp_path / "UCF-101/Archery/up").symlink_to("../..")
    (tmp_path / "elsewhere").symlink_to("UCF-101")  # no circle: both are there
    found = data.find_files(tmp_path, ".avi")
    assert sorted(p.relative_to(tmp_path).as_posix() for p in found) == sorted(
        f"{folder}/Archery/{n}" for folder in ("UCF-101", "elsewhere") for n in names
    )
    shutil.rmtree(tmp_path / "u")
    assert len(data.ucf101(tmp_path)[0]) == 25


@pytest.mark.parametrize("gone, max_bad, starts", [(4, 5, True), (5, 5, False), (5, 6, True), (30, 40, True), (1, 0, False)])
def test_more_missing_files_than_max_bad_allows_end_it_at_once(gone, max_bad, starts, crema, tmp_path, monkeypatch):
    for path in crema.glob("*/*"):
        link(path, tmp_path / "raw" / path.relative_to(crema))
    for path in sorted(tmp_path.glob("raw/VideoFlash/*"))[:gone]:  # of 90
        path.unlink()
    monkeypatch.setattr(data, "make_arrays", mock.Mock(side_effect=RuntimeError("it begins")))
    says = "it begins" if starts else f"is missing.*--max-bad is {max_bad} per cent: nothing was prepared"
    with pytest.raises(RuntimeError if starts else data.DataError, match=says):
        data.prepare("cremad", tmp_path / "raw", tmp_path / "out", max_bad=max_bad)
    assert starts or not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["cremad", "kinetics", "ucf101"])
def test_an_empty_folder_gets_one_clear_line(name, tmp_path):
    done = data_called(name, "--raw", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()


# --- your own data ---


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """A film, sounds, pictures and features in the folder of a CSV -> folder, header, rows."""
    folder = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(0)
    rows = []
    for k in range(20):
        film(folder / f"media/{k}.mp4", **H264, frames=12, seed=k)
        babble(folder / f"media/{k}.wav", 0.3 + 0.1 * (k % 3), seed=k)
        Image.fromarray(rng.integers(0, 256, (30 + k, 20, 3), dtype=np.uint8)).save(folder / f"media/{k}.png")
        np.save(folder / f"media/{k}.npy", rng.normal(5, 3, (1 + k % 4, 6)).astype(np.float32))
        np.save(folder / f"media/v{k}.npy", rng.normal(5, 3, 7))
        rows.append([f"media/{k}.mp4", f"media/{k}.mp4", f"media/{k}.mp4", f"media/{k}.png", f"media/{k}.wav",
                     f"media/{k}.npy", str(folder / f"media/v{k}.npy"), "ab"[k % 2]])  # fmt: skip
    return folder, ["visual", "audio", "flow", "scan", "voice", "text", "vector", "label"], rows


def write_csv(path, header, rows):
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_your_own_data_with_every_kind_of_column(clips, tmp_path):
    folder, header, rows = clips
    table = write_csv(folder / "every.csv", header, rows)
    done = data_called(table, "--out", tmp_path, "--size", 16, "--frames", 3, "--keep", 3, "--seconds", 0.5)
    assert done.returncode == 0 and "16 train, 2 val, 2 test clips" in done.stdout, done.stderr
    dataset = data.load("every", tmp_path)
    assert dataset.classes == ["a", "b"] and dataset.shapes == {
        "visual": (3, 3, 16, 16), "audio": (1, 128, 50), "flow": (3, 2, 16, 16), "scan": (1, 3, 16, 16),
        "voice": (1, 128, 50), "text": (4, 6), "vector": (1, 7)}  # fmt: skip
    train, test = dataset.train, dataset.test
    at = [int(i.removeprefix("line ")) - 2 for i in train.ids]
    assert [int(y) for y in train.labels] == [k % 2 for k in at]
    np.testing.assert_array_equal(train.arrays["visual"][0], frames_by_hand(folder / f"media/{at[0]}.mp4", 9, 16))
    np.testing.assert_array_equal(train.arrays["voice"][0], fbank_by_hand(folder / f"media/{at[0]}.wav", 50))
    scan = np.asarray(Image.open(folder / f"media/{at[0]}.png").resize((16, 16), Image.BICUBIC))
    np.testing.assert_array_equal(train.arrays["scan"][0, 0], scan)
    raw = {k: np.load(folder / f"media/{k}.npy").astype(np.float64) for k in range(20)}
    steps = np.concatenate([raw[k] for k in at])
    for split in train, test:
        inputs, _ = next(data.batches(split, 20))
        for row, i in enumerate(split.ids):
            x = raw[int(i.removeprefix("line ")) - 2]
            z = (x - steps.mean(0)) / steps.std(0)
            np.testing.assert_allclose(inputs["text"][row, : len(x)], z, atol=1e-5)
            assert (inputs["text"][row, len(x) :] == 0).all()
    done = data_called(table, "--out", tmp_path, "--size", 16, "--frames", 3, "--keep", 3, "--seconds", 0.5)
    assert done.returncode == 0 and "was there already; to prepare it anew, delete it" in done.stdout
    write_csv(table, header, [[*row[:-1], "a"] if k == 3 else row for k, row in enumerate(rows)])
    done = data_called(table, "--out", tmp_path, "--size", 16, "--frames", 3, "--keep", 3, "--seconds", 0.5)
    assert done.returncode == 2 and "was made with other parameters (csv" in done.stderr


def test_splits_groups_and_ids_of_your_own_data(clips):
    folder, _, rows = clips
    split = ["train"] * 12 + ["valid"] * 4 + ["test"] * 4
    table = write_csv(folder / "split.csv", ["id", "scan", "label", "split"], [
        [f"clip {k}", row[3], row[-1], split[k]] for k, row in enumerate(rows)])  # fmt: skip
    listed, classes = data.own_data(table)
    assert [(c.id, c.split) for c in listed] == [(f"clip {k}", split[k][:5].replace("valid", "val")) for k in range(20)]
    assert [classes[c.label] for c in listed] == [row[-1] for row in rows]
    table = write_csv(folder / "group.csv", ["scan", "label", "group"], [[r[3], r[-1], f"g{k // 2}"] for k, r in enumerate(rows)])
    listed = data.own_data(table)[0]
    groups = parts(listed, lambda c: (int(c.id[5:]) - 2) // 2)
    assert [len(g) for g in groups.values()] == [8, 1, 1] and len(set.union(*groups.values())) == 10
    table = write_csv(folder / "both.csv", ["scan", "label", "group", "split"], [
        [r[3], f" {r[-1]} ", f"g{k // 2}", "train" if k < 16 else "test"] for k, r in enumerate(rows)])  # fmt: skip
    listed, classes = data.own_data(table)
    groups = parts(listed, lambda c: (int(c.id[5:]) - 2) // 2)
    assert groups["test"] == {8, 9} and len(groups["val"]) == 1 and len(groups["train"] - groups["val"]) == 7
    assert classes == ["a", "b"]


@pytest.mark.parametrize("line, column, value, says", [
    (4, "label", "", "line 4 has an empty cell"), (5, "scan", "", "line 5 has an empty cell"),
    (3, "scan", "media/x.docx", "line 3 has no video.*media/x.docx"), (7, "scan", "media/0.wav", "line 7 has no video.*begins with.*media/0.wav"),
    (6, "split", "dev", "line 6 is in a split other than train, val or test.*dev"), (9, "id", "clip 0", "line 9 has the id of another clip: clip 0"),
    (2, None, "more", "Expected 4 fields in line 2, saw 5"), (1, "scan", "my.scan", "modality cannot be called 'my.scan'"),
    (1, "scan", "type", "modality cannot be called 'type'"), (1, "label", "class", "takes a line of column names"),
])  # fmt: skip
def test_a_wrong_row_of_your_own_data_is_named_by_its_line(line, column, value, says, clips, tmp_path):
    folder, _, rows = clips
    header = ["id", "scan", "label", "split"]
    lines = [header, *([f"clip {k}", row[3], row[-1], "train"] for k, row in enumerate(rows))]
    if column is None:
        lines[line - 1] = [*lines[line - 1], value]
    else:
        lines[line - 1] = [value if name == column else cell for name, cell in zip(header, lines[line - 1])]
    table = write_csv(folder / "wrong.csv", lines[0], lines[1:])
    done = data_called(table, "--out", tmp_path)
    assert done.returncode == 2 and re.search(says, done.stderr) and len(done.stderr.splitlines()) == 1, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, content, says", [
    ("demo.csv", "label,scan\na,0.png\n", "cannot be called 'demo'"), ("mosi.csv", "", "cannot be called 'mosi'"),
    ("-x y.csv", "label\n", "cannot be called"), ("gone.csv", None, "No such file"), ("empty.csv", "", "cannot be understood.*No columns"),
    ("semicolons.csv", "label;scan\na;0.png\n", "with commas between them"), ("binary.csv", b"\xff\xfe\x00label", "cannot be understood"),
    ("nul.csv", "label,scan\n" + "a,\0.png\nb,\0.png\n" * 9, "have their files there|cannot be understood|empty cell"), ("one.csv", "label,scan\n" + "a,0.png\n" * 9, "nothing to tell apart"),
    ("two.csv", "label,scan\na,0.png\nb,1.png\n", "no clip is in the val split.*too few clips"), ("gone.csv", "label,scan\n" + "".join(f"{'ab'[k % 2]},{k}gone.png\n" for k in range(18)), "0 have their files.*gone.png is missing"),
])  # fmt: skip
def test_a_table_that_is_none_gets_one_clear_line(name, content, says, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    done = data_called(tmp_path / name, "--out", tmp_path / "out")
    assert done.returncode == 2 and re.search(says, done.stderr) and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "out").exists()


@needs_real
def test_the_readmes_example_of_your_own_data(tmp_path, monkeypatch):
    text = (HERE / "README.md").read_text()
    code = re.search(r"```python\n(import csv\n.*?)```", text, re.S)[1]
    prepare, train = re.findall(r"^python (data|dr)\.py (.*digits[^#\n]*)", text, re.M)[:2]
    assert (prepare[0], train[0]) == ("data", "dr")
    monkeypatch.chdir(tmp_path)
    Path("free-spoken-digit-dataset").symlink_to(REAL / "fsdd")
    exec(code, {})
    rows = read_csv("digits.csv")
    assert Counter(row["split"] for row in rows) == {"train": 1200, "val": 300, "test": 800}
    assert len({row["audio"] for row in rows}) == len(rows)  # no recording is in two splits
    assert all(Path(row["audio"]).name[0] == row["label"] for row in rows)
    with open("digits.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows[::8])
    assert data_called(*prepare[1].split()).returncode == 0
    dataset = data.load("digits")
    assert dataset.shapes == {"audio": (1, 64, 30), "scan": (1, 3, 32, 32)} and len(dataset.train) == 150
    done = dr_main(*train[1].split(), "--epochs", 1, "--device", "cpu")
    assert done.returncode == 0 and "linear probe" in done.stdout, done.stderr


GRID = ["--size", 64, "--frames", 6, "--bins", 64, "--shift", 20, "--seconds", 2.2]
PUBLIC = {  # {CSV: (its archive, flags, clips, shapes)}; of the largest ones a part
    "emg_imu_lis": ("emg_imu_lis", [], 240, {"emg": (400, 8), "imu": (400, 10)}),
    "grid_digit": ("grid_s1", GRID, 125, {"audio": (1, 64, 110), "visual": (6, 3, 64, 64)}),
    "ravdess_au_mfcc": ("ravdess_au_mfcc", [], 1440, {"face_au": (1, 35), "mfcc": (259, 1)}),
    "sp_sw_har": ("sp_sw_har", [], 339, {"phone": (375, 6), "watch": (381, 6)}),
    "utd_mhad": ("utd_mhad", [], 861, {"skeleton": (125, 60), "inertial": (326, 6)}),
}
SOME_OF = {"emg_imu_lis": ("label", "ABCDEFGH"), "sp_sw_har": ("group", ["s01", "s02", "s03", "s04", "s05"])}


def lay_out_emg(files, table):
    """files/A_00_emg.npy, ... as JSON files under random names, in the order that the README's block draws again."""
    rng = random.Random(0)
    for letter in sorted({row["label"] for row in table}):
        places = list(range(30))
        rng.shuffle(places)
        for k, place in enumerate(places):
            emg, imu = (np.load(files / f"{letter}_{k:02}_{m}.npy").astype(float) for m in ("emg", "imu"))
            moments = [{"gyroscope": x[:3], "acceleration": x[3:6], "orientation": x[6:]} for x in imu.tolist()]
            path = Path(f"emg_imu_lis/Dataset/{letter}/{place:02}f0-{letter}.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"emg": {"data": emg.astype(int).tolist()}, "imu": {"data": moments}}))


def lay_out_utd(files, table):
    """Joint j's axis a is column 3 j + a."""
    for m, key in ("Skeleton", "d_skel"), ("Inertial", "d_iner"):
        Path(m).mkdir()
        for path in files.glob(f"*_{m.lower()}.npy"):
            x = np.load(path).astype(float)
            if m == "Skeleton":
                x = np.stack([[x[:, 3 * j + a] for a in range(3)] for j in range(20)])  # (20, 3, T)
            scipy.io.savemat(f"{m}/{path.stem}.mat", {key: x})


def lay_out_sp_sw(files, table):
    """A phone's and a watch's CSV per recording; a number that the table lacks was too short a part."""
    names = "x_acc,y_acc,z_acc,x_gyro,y_gyro,z_gyro,timestamp,label".split(",")
    recordings = {}
    for row in table:
        recordings.setdefault(Path(row["phone"]).name[:6], {})[int(row["phone"][-12:-10])] = row
    for name, parts in recordings.items():
        clock = 0
        devices = {"sp": [], "sw": []}
        for k in range(max(parts) + 1):
            row = parts.get(k, {"label": f"SHORT_{k}"})
            for device, m in ("sp", "phone"), ("sw", "watch"):
                x = np.load(files.parent / row[m]) if m in row else np.ones((24, 6))
                times = np.linspace(clock, clock + 4000, len(x)).astype(int)
                devices[device] += [[*map(repr, map(float, v)), t, row["label"]] for v, t in zip(x, times)]
            devices["sw"].append(["9.5"] * 6 + [clock + 4005, row["label"]])  # between two of the phone's parts
            clock += 4010
        folder = Path("sp-sw-har-dataset/DATA") / name[:3]
        folder.mkdir(parents=True, exist_ok=True)
        for device, rows in devices.items():
            with open(folder / f"{name}_{device}.csv", "w", newline="") as file:
                csv.writer(file).writerows([names, *rows])


def lay_out_ravdess(files, table):
    clips = {}
    for path in sorted(files.glob("*_au.npy"), reverse=True):
        voice = np.load(path.with_name(path.name.replace("_au", "_mfcc")))
        clips[path.stem[:-3]] = np.concatenate([np.load(path)[0], voice[:, 0]]).astype(float)
    Path("ravdess").mkdir()
    Path("ravdess/au_mfcc.pkl").write_bytes(pickle.dumps(clips))


def lay_out_grid(files, table):
    for path in files.iterdir():
        Path("files", path.name).symlink_to(path)


SOURCES = {"emg_imu_lis": lay_out_emg, "utd_mhad": lay_out_utd, "sp_sw_har": lay_out_sp_sw,
           "ravdess_au_mfcc": lay_out_ravdess, "grid_digit": lay_out_grid}  # fmt: skip


def recipe_of(name):
    """The README's block that writes this CSV."""
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    block = next(block for block in blocks if f'"{name}.csv"' in block)
    assert len(block.splitlines()) <= 15
    return block


@needs_real
@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_dataset_from_its_source_to_an_epoch(name, tmp_path, monkeypatch):
    archive, flags, count, shapes = PUBLIC[name]
    with tarfile.open(REAL / f"{archive}.tar.gz") as file:
        file.extractall(tmp_path, filter="data")
    (tmp_path / "here/files").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    folder = next(tmp_path.rglob(f"{name}.csv")).parent
    column, values = SOME_OF.get(name, (None, [None]))
    theirs = [row for row in read_csv(folder / f"{name}.csv") if row.get(column) in values]
    SOURCES[name](folder / "files", theirs)
    exec(recipe_of(name), {})
    rows = read_csv(f"{name}.csv")
    if name == "grid_digit":  # another draw: 60, 10 and 30 of every digit
        of_each = Counter(row["split"] + row["label"] for row in rows)
        assert of_each == Counter(row["split"] + row["label"] for row in theirs)
        assert {row["id"]: row["label"] for row in rows} == {row["id"]: row["label"] for row in theirs}
        rows = rows[::8]
        with open(f"{name}.csv", "w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
    else:
        assert rows == theirs
        for path in Path("files").glob("*.npy"):
            mine, other = np.load(path), np.load(folder / path)
            assert mine.dtype == np.float32 and np.array_equal(mine, other, equal_nan=True)

    assert data_called(f"{name}.csv", *flags).returncode == 0
    dataset = data.load(name)
    manifest = json.loads(Path(f"prepared/{name}/manifest.json").read_text())
    assert dataset.shapes == shapes and not manifest["skipped"]
    assert sum(map(len, (dataset.train, dataset.val, dataset.test))) == count
    groups = {row.get("id", f"line {k}"): row.get("group") for k, row in enumerate(rows, start=2)}
    if any(groups.values()):  # no person is in two splits
        train, val, test = ({groups[i] for i in manifest["splits"][split]} for split in ("train", "val", "test"))
        assert train and val and test and not train & val | train & test | val & test
    done = dr_main("--dataset", name, "--epochs", 1, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    entry = json.loads(Path(f"runs/{name}-dr-epochs=1-0/log.jsonl").read_text())
    assert np.isfinite(entry["loss"]) and entry["loss"] < 1.5 * np.log(len(dataset.classes))


@needs_real
@pytest.mark.parametrize("form", [np.asarray, lambda y: np.stack([1 - y, y], axis=-1)])  # as numbers, or one-hot
def test_mosi_from_its_sources_pickles_to_an_epoch(form, tmp_path, monkeypatch):
    """The source has a film's segments in one row, padded to 63, in an order of films that nothing depends on."""
    monkeypatch.chdir(tmp_path)
    Path("files").mkdir()
    theirs = pickle.loads((REAL / "mosi/mosi.pkl").read_bytes())
    films = {"train": {}, "test": {}}
    known = {}  # {a segment's features of sound: (label, film)}
    for split, part in theirs.items():
        for k, name in enumerate(part["id"]):
            film = name.split("$_$")[0]
            films["test" if split == "test" else "train"].setdefault(film, []).append((split, k))
            known[part["audio"][k].tobytes()] = (part["classification_labels"][k], film)
    for m, key in ("text", "text"), ("audio", "audio"), ("video", "vision"):
        packed = []
        for segments in films.values():
            shuffled = random.Random(1).sample(sorted(segments.values()), len(segments))
            x = np.zeros((len(segments), 63, theirs["train"][key].shape[-1]))
            y = np.zeros((len(segments), 63))
            for i, film in enumerate(shuffled):
                x[i, : len(film)] = [theirs[split][key][k][0] for split, k in film]
                y[i, : len(film)] = [theirs[split]["classification_labels"][k] for split, k in film]
            packed.append((x, form(y), [len(film) for film in shuffled]))
        (x, y, n), (x_test, y_test, n_test) = packed
        Path(f"{m}_2way.pickle").write_bytes(pickle.dumps((x, y, x_test, y_test, 63, n, n_test), protocol=2))
    exec(recipe_of("mosi_2way"), {})
    splits = {}
    for row in read_csv("mosi_2way.csv"):
        label, film = known.pop(np.load(row["audio"]).tobytes())
        assert int(row["label"]) == label
        splits.setdefault(row["split"], set()).add(film)
    assert not known and {split: len(found) for split, found in splits.items()} == {"train": 62, "val": 11, "test": 20}
    assert not splits["val"] & splits["test"] and splits["val"] | splits["test"] == set(films["test"])
    assert data_called("mosi_2way.csv").returncode == 0
    assert data.load("mosi_2way").shapes == {"text": (1, 100), "audio": (1, 73), "video": (1, 100)}
    if form is np.asarray:
        assert dr_main("--dataset", "mosi_2way", "--epochs", 1, "--device", "cpu").returncode == 0


def test_bad_files_of_your_own_data_are_skipped_and_listed(clips, tmp_path):
    folder, _, rows = clips
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    Image.fromarray(np.full((9, 9), 3000, np.uint16)).save(folder / "deep.png")
    np.save(folder / "wide.npy", np.ones((2, 9)))
    np.save(folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    names = [["bad.png", rows[0][5]], [rows[1][3], "wide.npy"], [rows[2][3], "objects.npy"], ["gone.png", rows[3][5]],
             ["deep.png", rows[4][5]]]  # fmt: skip
    lines = [*names, *([row[3], row[5]] for row in rows[5:])]
    table = write_csv(folder / "spoilt.csv", ["scan", "text", "label"], [[*line, "ab"[k % 2]] for k, line in enumerate(lines)])
    done = data_called(table, "--out", tmp_path, "--size", 8, "--max-bad", 30)
    assert done.returncode == 0 and "5 skipped" in done.stdout, done.stderr
    skipped = {i: r for _, i, r in manifest_of(tmp_path / "spoilt")["skipped"]}
    for line, says in (2, "cannot identify image file"), (3, "9 features, where the others have 6"), (4, "Python objects"), (5, "missing"), (6, "more than 8 bits"):
        assert says in skipped[f"line {line}"]


def write_features(folder, arrays, header=(), more=()):
    """A CSV of .npy files, half of them a, half b -> its path."""
    folder.mkdir(exist_ok=True)
    rows = []
    for k, x in enumerate(arrays):
        np.save(folder / f"{k}.npy", x)
        rows.append([f"{k}.npy", "ab"[k % 2], *(column[k] for column in more)])
    return write_csv(folder / "t.csv", ["x", "label", *header], rows)


def test_a_step_of_zeros_is_no_padding(tmp_path):
    rng = np.random.default_rng(0)
    events = [(rng.random((1 + k % 7, 1)) < 0.3).astype(np.float32) for k in range(40)]
    events[3] = np.zeros((7, 1))
    data.prepare("t", write_features(tmp_path / "in", events), tmp_path)
    dataset = data.load("t", tmp_path)
    for split in dataset.train, dataset.val, dataset.test:
        for x, i in zip(split.arrays["x"], split.ids):
            event = events[int(i.removeprefix("line ")) - 2]
            assert (x != 0).any(-1).tolist() == [True] * len(event) + [False] * (7 - len(event))
            assert len(np.unique(x[: len(event)])) == len(np.unique(event))  # 0 and 1 are told apart
    data.add_noise(dataset, "x", 0.5)
    assert (dataset.train.arrays["x"] != 0).any(-1).sum(1).tolist() == [
        len(events[int(i.removeprefix("line ")) - 2]) for i in dataset.train.ids
    ]


@pytest.mark.parametrize("values", ["zeros", "the mean"])
def test_a_step_that_becomes_zeros_is_stored_as_one_that_is_there(values):
    x = np.tile(np.float32([[0, 0], [2, 4], [1, 2]]), (2, 1, 1))
    mean, std = ([0, 0], [1, 1]) if values == "zeros" else ([1, 2], [1, 2])
    present = np.array([[True, True, True], [True, True, False]])
    z = data.standardise(x, present, mean, std)
    assert ((z != 0).any(-1) == present).all() and z.dtype == np.float32
    np.testing.assert_allclose(z[present], ((x - mean) / std)[present], atol=1e-29)
    assert (torch.from_numpy(z).bfloat16() == 0).all(-1).tolist() == (~present).tolist()


def test_features_without_a_finite_number_are_bad_clips(tmp_path, recwarn):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(4, 3)) for _ in range(40)]
    arrays[3][:] = np.nan
    arrays[7][:] = -np.inf
    arrays[8][:, 1] = np.nan  # one feature of three is missing: it becomes the mean
    done = data_called(write_features(tmp_path / "in", arrays), "--out", tmp_path, "--max-bad", 10)
    assert done.returncode == 0 and "2 skipped" in done.stdout, done.stderr
    skipped = manifest_of(tmp_path / "t")["skipped"]
    assert sorted(says for *_, says in skipped) == ["3.npy: no finite number", "7.npy: no finite number"]
    done = data_called(write_features(tmp_path / "none", [np.full((4, 3), np.nan)] * 40), "--out", tmp_path / "out")
    assert_one_line(done, "no finite number")
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_features_are_scaled_whatever_their_unit_but_for_constants(dtype, tmp_path):
    rng = np.random.default_rng(0)
    units = [1, 1e-9, 1e6, 0, 0, 1e-3]
    around = [0, 0, 0, 7, 1 / 3, 1]
    arrays = [(np.array(around) + rng.normal(size=(5, 6)) * units).astype(dtype) for _ in range(40)]
    data.prepare("t", write_features(tmp_path / "in", arrays), tmp_path)
    train = data.load("t", tmp_path).train
    x = train.arrays["x"][train.rows].reshape(-1, 6)
    np.testing.assert_allclose(x.std(0)[[0, 1, 2, 5]], 1, rtol=1e-3)
    np.testing.assert_allclose(x[:, 3:5], 0, atol=1e-6)


def test_statistics_are_numpys_and_one_array_is_in_memory_at_a_time():
    rng = np.random.default_rng(0)
    arrays = [rng.normal(300, 5, (n, 4)) for n in (1, 7, 20, 3)]
    arrays[1][2, 1] = np.nan
    arrays[2][:, 3] = np.inf
    held = []

    def read(k):
        held.append(weakref.ref(array := arrays[k].copy().view(Held)))
        assert sum(ref() is not None for ref in held) <= 2  # this one, and at most the last
        return array

    mean, std = data.statistics(range(4), read)
    whole = np.concatenate(arrays)
    whole[~np.isfinite(whole)] = np.nan
    np.testing.assert_allclose(mean, np.nanmean(whole, 0), rtol=1e-13)
    np.testing.assert_allclose(std, np.nanstd(whole, 0), rtol=1e-13)
    assert len(held) == 8


class Held(np.ndarray):
    """Can be weakly referenced."""


@pytest.mark.parametrize("x, says", [(np.ones((5, 3, 1)), r"0.npy: float64 of shape \(5, 3, 1\)"),
                                     (np.array([1, None]), "0.npy: .*Python objects"), (np.ones((0, 3)), r"shape \(0, 3\)")])  # fmt: skip
def test_what_is_no_sequence_is_named_with_what_is_wrong(x, says, tmp_path):
    done = data_called(write_features(tmp_path / "in", [x] * 20), "--out", tmp_path / "out")
    assert_one_line(done, "column x")
    assert re.search(says, done.stderr) and not (tmp_path / "out").exists()


def test_equal_files_are_kept_together_and_what_is_in_several_splits_is_said(tmp_path, capsys):
    table = write_features(tmp_path / "in", np.arange(40)[:, None, None] * np.ones((40, 4, 3)))
    once = [[f"{k}.npy", "ab"[k % 2]] for k in range(40)]
    often = write_csv(tmp_path / "in/often.csv", ["x", "label"], [*once, *(row for row in once if row[1] == "a"), *once[:9]])
    drawn = data.own_data(often)[0]
    splits = [{c.split for c in drawn if c.files["x"].name == f"{k}.npy"} for k in range(40)]
    assert all(len(found) == 1 for found in splits) and len(drawn) == 69 and capsys.readouterr().err == ""
    assert parts(data.own_data(table)[0], lambda c: c.id)["test"]  # as before, where every row has its own
    (tmp_path / "in/link.npy").symlink_to("0.npy")
    rows = [[name, label, ("train", "val", "test")[k % 3]] for k, (name, label) in enumerate(once)]
    rows += [["link.npy", "a", "test"], ["./1.npy", "b", "train"], ["3.npy", "b", "train"]]
    done = data_called(write_csv(tmp_path / "in/several.csv", ["x", "label", "split"], rows), "--out", tmp_path)
    assert done.returncode == 0 and len(done.stderr.splitlines()) == 1
    assert re.search(r"warning: 2 files are in several splits, as .*/[01].npy in train and (val|test)$", done.stderr)
    rows = [[*row, f"person {k % 4}"] for k, row in enumerate(rows[:40])]
    data.own_data(write_csv(tmp_path / "in/people.csv", ["x", "label", "split", "group"], rows))
    assert "4 files or groups are in several splits, as the group person 0 in train and val and test" in capsys.readouterr().err


def grouped(folder, people, splits):
    """Six clips per person, a's and b's, all of the split that is named, or to be drawn."""
    more = [[f"p{k // 6}" for k in range(6 * people)]]
    if splits:
        more.append([splits[k // 6] for k in range(6 * people)])
    header = ["group", "split"][: len(more)]
    return write_features(folder, np.ones((6 * people, 2, 3)) * np.arange(6 * people)[:, None, None], header, more)


@pytest.mark.parametrize("people, splits, counts", [
    (5, ["train"] * 4 + ["test"], [3, 1, 1]), (4, ["train"] * 3 + ["test"], [2, 1, 1]), (4, None, [2, 1, 1]), (3, None, [1, 1, 1]),
    (30, None, [24, 3, 3])])  # fmt: skip
def test_few_groups_give_one_each(people, splits, counts, tmp_path):
    found = parts(data.own_data(grouped(tmp_path, people, splits))[0], lambda c: c.group)
    assert [len(groups) for groups in found.values()] == counts and len(set.union(*found.values())) == people


@pytest.mark.parametrize("people, splits", [(3, ["train", "train", "test"]), (2, None)])
def test_too_few_groups_are_said(people, splits, tmp_path):
    done = data_called(grouped(tmp_path / "in", people, splits), "--out", tmp_path / "out")
    assert_one_line(done, "no clip is in the val split", "groups", "three at least")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("encoding, first", [("cp1252", ""), ("utf-16", ""), ("utf-16-be", "\ufeff"), ("utf-16-le", ""), ("utf-8", "sep=,\r\n")])
def test_a_table_as_excel_saves_it_is_to_be_saved_as_utf_8(encoding, first, clips, tmp_path):
    folder, _, rows = clips
    lines = ["scan,label", *(f"{row[3]},{'Ärger' if k % 2 else 'joy'}" for k, row in enumerate(rows))]
    (folder / "excel.csv").write_bytes((first + "\r\n".join(lines)).encode(encoding))
    done = data_called(folder / "excel.csv", "--out", tmp_path / "out")
    assert_one_line(done, "save it as UTF-8")
    (folder / "excel.csv").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    assert data.own_data(folder / "excel.csv")[1] == ["joy", "Ärger"]


@pytest.mark.parametrize("name", ["my clips", "clips (1)", "a+b", "demo"])
def test_a_table_of_any_name_can_be_given_one(name, tmp_path):
    table = write_features(tmp_path / "in", np.arange(30)[:, None, None] * np.ones((30, 2, 3)))
    table = table.rename(table.with_stem(name))
    done = data_called(table, "--out", tmp_path)
    assert_one_line(done, f"cannot be called {name!r}", "letters, digits, _, - and .", "--name")
    done = data_called(table, "--out", tmp_path, "--name", "mine")
    assert done.returncode == 0 and len(data.load("mine", tmp_path).train) == 24, done.stderr
    done = data_called(table, "--out", tmp_path, "--name", "mine", "--show")
    assert done.stdout.strip() == str(tmp_path / "mine/samples.png")


# --- CMU-MOSI -------------------------------------------------------------------------------------


def mosi_pickle(path, layout, n=40, seed=0):
    """A small pickle in MMSA's or MultiBench's layout, with the traps of the real ones -> its raw arrays."""
    rng, out = np.random.default_rng(seed), {}
    for split, size in (("train", n), ("valid", n // 2), ("test", n // 2)):
        text, audio, vision = (rng.normal(3, 5, (size, 6, d)).astype(np.float32) for d in (8, 5, 4))
        score = rng.uniform(-3, 3, size).astype(np.float32)
        score[0] = 0  # neutral counts as non-negative
        audio[1, 2, 3], audio[2, 1, 0], vision[..., 1] = -np.inf, np.nan, 7  # missing values, a constant feature
        part = {"text": text, "audio": audio, "vision": vision}
        if layout == "mmsa":
            lengths = rng.integers(1, 7, size)
            part |= {"id": [f"v$_${k}" for k in range(size)], "regression_labels": score, "raw_text": ["ah"] * size,
                     "audio_lengths": lengths.tolist(), "vision_lengths": lengths.tolist(),
                     "text_bert": np.stack([np.arange(6) < length for length in lengths])[:, None].repeat(3, 1)}  # fmt: skip
        else:  # MultiBench pads with zeros
            for k in range(size):
                text[k, 4:], audio[k, 4:], vision[k, 4:] = 0, 0, 0
            part |= {
                "id": np.array([["v", "0", str(k)] for k in range(size)], dtype=object),
                "labels": score[:, None, None],
            }
        out[split] = part
    path.write_bytes(pickle.dumps(out))
    return out


@pytest.mark.parametrize("layout", ["mmsa", "multibench"])
def test_mosi_is_cleaned_masked_and_standardised_on_the_training_set(layout, tmp_path):
    raw = mosi_pickle(tmp_path / "mosi.pkl", layout)
    data.prepare("mosi", tmp_path / "mosi.pkl", tmp_path)
    dataset = data.load("mosi", tmp_path)
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (40, 20, 20)
    assert dataset.shapes == {"text": (6, 8), "audio": (6, 5), "vision": (6, 4)}
    score = np.ravel(raw["test"]["regression_labels" if layout == "mmsa" else "labels"])
    assert (dataset.test.labels == (score >= 0)).all() and dataset.test.labels[0] == 1
    steps = {s: np.arange(6) < (np.array(raw[s]["audio_lengths"])[:, None] if layout == "mmsa" else 4) for s in raw}
    for m in ("text", "audio", "vision"):
        seen = np.broadcast_to(steps["train"] if layout == "mmsa" else np.arange(6) < 4, (40, 6))
        values = raw["train"][m][seen].astype(np.float64)
        values[~np.isfinite(values)] = np.nan
        mean, std = np.nanmean(values, 0), np.nanstd(values, 0)
        z = (raw["test"][m] - mean) / np.where(std > 0, std, 1)
        z[~np.isfinite(z)] = 0
        z[~np.broadcast_to(steps["test"] if layout == "mmsa" else np.arange(6) < 4, (20, 6))] = 0
        inputs, _ = next(data.batches(dataset.test, 20))
        np.testing.assert_allclose(inputs[m], z, rtol=1e-3, atol=1e-3)


def test_mosi_is_not_overwritten_and_what_has_no_score_is_listed(tmp_path):
    raw = mosi_pickle(tmp_path / "mosi.pkl", "mmsa")
    raw["valid"]["regression_labels"][5] = np.nan
    (tmp_path / "mosi.pkl").write_bytes(pickle.dumps(raw))
    done = data_called("mosi", "--raw", tmp_path / "mosi.pkl", "--out", tmp_path)
    assert done.returncode == 0 and "v$_$5 (val): no score" in done.stdout and len(data.load("mosi", tmp_path).val) == 19
    mosi_pickle(tmp_path / "mosi.pkl", "mmsa", seed=1)
    done = data_called("mosi", "--raw", tmp_path / "mosi.pkl", "--out", tmp_path)
    assert done.returncode == 2 and "was made with other parameters (sha256" in done.stderr


@pytest.mark.parametrize("layout", ["mmsa", "multibench"])
def test_mosis_true_steps_are_no_padding_and_clips_of_nothing_are_skipped(layout, tmp_path, recwarn):
    raw = mosi_pickle(tmp_path / "mosi.pkl", layout)
    if layout == "mmsa":
        raw["train"]["text"][:, 0] = 0  # their length is told
    raw["train"]["vision"][3][raw["train"]["vision"][3] != 0] = np.nan
    raw["test"]["audio"][4] = np.inf
    (tmp_path / "mosi.pkl").write_bytes(pickle.dumps(raw))
    done = data_called("mosi", "--raw", tmp_path / "mosi.pkl", "--out", tmp_path)
    assert done.returncode == 0 and re.search(r"\(train\): no vision", done.stdout), done.stderr
    assert re.search(r"\(test\): no audio", done.stdout) and "2 skipped" in done.stdout
    train = data.load("mosi", tmp_path).train
    assert len(train) == 39 and 3 not in train.rows
    lengths = np.array(raw["train"]["audio_lengths"]) if layout == "mmsa" else np.full(40, 4)
    for x in train.arrays.values():
        assert ((x != 0).any(-1) == (np.arange(6) < lengths[:, None])).all()
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


@pytest.mark.parametrize("rows, steps", [(slice(9), slice(None)), (slice(None), slice(5))])
def test_mosi_whose_arrays_do_not_fit_together_is_refused(rows, steps, tmp_path):
    raw = mosi_pickle(tmp_path / "mosi.pkl", "multibench")
    raw["test"]["audio"] = raw["test"]["audio"][rows, steps]
    (tmp_path / "mosi.pkl").write_bytes(pickle.dumps(raw))
    with pytest.raises(data.DataError, match="in test, audio has the shape"):
        data.prepare("mosi", tmp_path / "mosi.pkl", tmp_path)
    assert not (tmp_path / "mosi").exists()


def test_a_hostile_pickle_runs_nothing(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'owned'}",)

    for number, content in enumerate([Hostile(), {"train": [Hostile()]}, np.array([Hostile()], dtype=object)]):
        bad = tmp_path / f"{number}.pkl"
        bad.write_bytes(pickle.dumps(content))
        with pytest.raises(data.DataError, match="no plain data"):
            data.prepare("mosi", bad, tmp_path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [
    STUB, b"<!DOCTYPE html><html>Google Drive</html>", b"", pickle.dumps({"train": np.ones(9)})[:-9],
    pickle.dumps({"train": {}}), pickle.dumps([1, 2])])  # fmt: skip
def test_what_is_no_mosi_gets_one_clear_line(content, tmp_path):
    (tmp_path / "bad.pkl").write_bytes(content)
    done = data_called("mosi", "--raw", tmp_path / "bad.pkl", "--out", tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "is not CMU-MOSI" in done.stderr and "a web page or a git-lfs stub" in done.stderr


def test_a_features_file_that_is_skipped_sets_nobodys_length(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for k in range(40):
        np.save(tmp_path / f"{k}.npy", rng.normal(size=(400, 5) if k == 11 else (5, 40)))
        rows.append([f"{k}.npy", "ab"[k % 2]])
    folder = data.prepare("t", write_csv(tmp_path / "t.csv", ["x", "label"], rows), tmp_path / "out", workers=1)
    manifest = manifest_of(folder)
    assert manifest["modalities"]["x"]["shape"] == [5, 40] and [i for _, i, _ in manifest["skipped"]] == ["line 13"]


def test_any_name_is_printed_whatever_the_output_can_show():
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with contextlib.redirect_stdout(output), data.one_line_for_errors("data.py"):
        print("Жизнь ± 1", flush=True)
    assert output.buffer.getvalue().decode("unicode-escape") == "Жизнь ± 1\n"


@needs_real
def test_real_mosi_end_to_end(tmp_path):
    assert data_called("mosi", "--raw", REAL / "mosi" / "mosi.pkl", "--out", tmp_path).returncode == 0
    dataset = data.load("mosi", tmp_path)
    assert [len(s) for s in (dataset.train, dataset.val, dataset.test)] == [1209, 238, 752]
    x, y = next(data.batches(dataset.train, 1209))
    text, labels = x["text"].flatten(1).double(), 2.0 * y.double() - 1
    weights = torch.linalg.lstsq(text, labels[:, None]).solution  # a linear probe
    z, y = next(data.batches(dataset.test, 752))
    right = ((z["text"].flatten(1).double() @ weights)[:, 0] > 0) == (y > 0)
    assert right.double().mean() > 0.65  # a majority vote gives 0.63


# --- 2 reading media ----------------------------------------------------------------

KINDS = {
    "gop_12.flv": FLASH,
    "gop_250.flv": {**FLASH, "gop": 250},
    "b_frames.mp4": H264,
    "open_gop.mp4": {**H264, "options": {"bf": "3", "x264-params": "open-gop=1:b-pyramid=normal:log-level=error"}},
    "edit_list.mp4": {**H264, "first": -5},
    "b_frames.mkv": H264,
    "b_frames.avi": XVID,
}


@pytest.mark.parametrize("name", [*KINDS, *(pytest.param(n, marks=needs_real) for n in (
    "test.avi", "arm_wrestling.mp4", "flipping_a_pancake.mkv"))])  # fmt: skip
def test_frames_are_those_that_decoding_every_frame_gives(name, tmp_path):
    path = film(tmp_path / name, **KINDS[name], frames=61) if name in KINDS else REAL / "clips" / name
    for count, keep in (1, 1), (2, 1), (3, 1), (2, 3), (11, 1):
        found = data.read_frames(path, data.frames_spec(count, 48, keep))
        np.testing.assert_array_equal(found, frames_by_hand(path, count * keep, 48))


@pytest.mark.parametrize("seconds", [0.5, 3, 4])
def test_fbank_is_kaldis_as_the_official_code_calls_it(seconds, tmp_path):
    babble(tmp_path / "a.wav", seconds)
    found = data.fbank(data.read_sound(tmp_path / "a.wav"), data.fbank_spec(128, 3.0))
    assert found.shape == (1, 128, 300) and found.dtype == np.float16
    np.testing.assert_array_equal(found, fbank_by_hand(tmp_path / "a.wav", 300))


@pytest.mark.parametrize("name", ["gop_12.flv", "b_frames.mp4", "b_frames.avi"])
def test_the_sound_of_a_film_is_the_tone_that_was_put_in(name, tmp_path):
    sound = data.read_sound(film(tmp_path / name, **KINDS[name], frames=36))
    heard = np.abs(np.fft.rfft(sound[8000:40000] * np.hanning(32000)))  # of two seconds
    assert len(sound) == pytest.approx(48000, abs=2000) and heard.argmax() == pytest.approx(2 * 440, abs=2)
    assert np.abs(sound[8000:40000]).max() == pytest.approx(0.3, rel=0.1)


def test_sound_is_mixed_to_mono_and_resampled(tmp_path):
    many = np.random.default_rng(1).normal(0, 3000, (1000, 8)).astype(np.int16)
    scipy.io.wavfile.write(tmp_path / "8.wav", 16000, many)
    np.testing.assert_allclose(data.read_sound(tmp_path / "8.wav"), many.mean(1) / 32768, atol=1e-6)
    stereo = np.random.default_rng(0).normal(0, 3000, (88200, 2))
    stereo = scipy.signal.sosfilt(scipy.signal.butter(4, 3000, fs=44100, output="sos"), stereo, axis=0)
    scipy.io.wavfile.write(tmp_path / "a.wav", 44100, np.int16(stereo))
    expected, found = scipy.signal.resample_poly(stereo.mean(1) / 32768, 160, 441), data.read_sound(tmp_path / "a.wav")
    assert len(found) == pytest.approx(32000, abs=50)
    np.testing.assert_allclose(found[1000:30000], expected[1000:30000], atol=0.05 * expected.std())


def write_sound(path, codec, rate=44100, layout="mono", seconds=10, quiet=0, **options):
    """Noise, after some seconds of silence."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate, layout=layout)
        noise = np.random.default_rng(0).normal(0, 0.1, (1 if layout == "mono" else 2, int(rate * seconds)))
        noise[:, : int(rate * quiet)] = 0
        form = next(f for f in stream.codec_context.codec.audio_formats if f.name.startswith(("s16", "flt")))
        noise = np.float32(noise) if "flt" in form.name else np.int16(32767 * noise)
        if not form.is_planar:
            noise = np.ascontiguousarray(noise.T.reshape(1, -1))
        frame = av.AudioFrame.from_ndarray(noise, form.name, layout)
        frame.sample_rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


SOUNDS = {
    "a.wav": {"codec": "pcm_s16le"}, "a.mp3": {"codec": "libmp3lame"}, "a.flac": {"codec": "flac"},
    "fast.m4a": {"codec": "aac", "movflags": "faststart"}, "late.mp3": {"codec": "libmp3lame", "quiet": 5},
}  # fmt: skip



@pytest.mark.parametrize("every", [2, 8])
def test_an_avi_of_which_the_camera_dropped_frames_is_whole(every, tmp_path):
    whole = tmp_path / "whole.avi"
    with av.open(str(whole), "w") as movie:
        video = movie.add_stream("mjpeg", 12, width=64, height=48, pix_fmt="yuvj420p")
        shown = [i for i in range(60) if (i % 2 == 0 if every == 2 else i % 8)]
        for i in shown:
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 4 * i, np.uint8), "rgb24")
            frame.pts = i
            movie.mux(video.encode(frame))
        movie.mux(video.encode())
    spec = data.frames_spec(3, 16)
    seen = data.read_frames(whole, spec)[:, 8, 8, 0]
    np.testing.assert_allclose(seen, [4 * shown[i] for i in data.middles(len(shown), 3)], atol=6)
    torn = tmp_path / "torn.avi"
    torn.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(data.BadClip, match="truncated"):
        data.read_frames(torn, spec)


@pytest.mark.parametrize("name", SOUNDS)
def test_a_sound_of_which_a_part_is_there_is_truncated(name, tmp_path):
    content = write_sound(tmp_path / name, **SOUNDS[name]).read_bytes()
    assert len(data.read_sound(tmp_path / name)) == pytest.approx(160000, abs=1000)
    for share in 0.05, 0.5, 0.8:
        (tmp_path / name).write_bytes(content[: int(share * len(content))])
        with pytest.raises(data.BadClip, match=r"truncated, .* of 10\.. s are there"):
            data.read_sound(tmp_path / name)


def test_what_tells_no_length_or_a_wrong_guess_is_not_truncated(tmp_path):
    write_sound(tmp_path / "guess.aac", "aac", quiet=5)  # FFmpeg takes silence's bit rate for all of it
    write_sound(tmp_path / "guess.mp3", "libmp3lame", write_xing="0")
    wave = write_sound(tmp_path / "a.wav", "pcm_s16le").read_bytes()
    at = wave.index(b"data") + 4
    for k, size in enumerate((0, 0xFFFFFFFF, 0x7FFFFFFF)):  # as what writes to a pipe leaves it
        told = size.to_bytes(4, "little")
        (tmp_path / f"{k}.wav").write_bytes(wave[:4] + told + wave[8:at] + told + wave[at + 4 :])
    for path in tmp_path.iterdir():
        assert len(data.read_sound(path)) == pytest.approx(160000, abs=1500), path


def test_a_sound_whose_rate_and_channels_change_on_the_way_is_heard_to_its_end(tmp_path):
    for name, rate, layout in ("a", 44100, "mono"), ("b", 32000, "stereo"), ("c", 22050, "mono"):
        write_sound(tmp_path / f"{name}.mp3", "libmp3lame", rate, layout, seconds=2, write_xing="0", id3v2_version="0")
    (tmp_path / "all.mp3").write_bytes(b"".join((tmp_path / f"{name}.mp3").read_bytes() for name in "abc"))
    parts = np.concatenate([data.read_sound(tmp_path / f"{name}.mp3") for name in "abc"])
    whole = data.read_sound(tmp_path / "all.mp3")
    assert len(whole) == pytest.approx(len(parts), abs=2000)  # the encoder's delays are cut off once, not three times
    for second in 0.5, 2.5, 4.5:
        at = slice(int(16000 * second), int(16000 * (second + 1)))
        assert whole[at].std() == pytest.approx(parts[at].std(), rel=0.05)


def test_a_bad_packet_of_a_sound_is_passed_over(tmp_path):
    content = bytearray(write_sound(tmp_path / "a.mp3", "libmp3lame", write_xing="0", seconds=4).read_bytes())
    middle = content.index(b"\xff\xfb", len(content) // 2)
    content[middle + 4 : middle + 150] = b"\xff" * 146
    (tmp_path / "b.mp3").write_bytes(content)
    assert len(data.read_sound(tmp_path / "b.mp3")) > 3.8 * 16000


def test_of_an_hours_recording_only_the_beginning_is_decoded(tmp_path, monkeypatch):
    seconds = 600
    wave = np.memmap(tmp_path / "a.raw", np.int16, "w+", shape=(seconds * 8000,))
    wave[:] = np.tile(np.random.default_rng(0).normal(0, 3000, 8000).astype(np.int16), seconds)
    scipy.io.wavfile.write(tmp_path / "a.wav", 8000, wave)
    heard = []
    real = data.decode
    monkeypatch.setattr(data, "decode", lambda *args: (heard.append(f.samples) or f for f in real(*args)))
    found = data.read_fbank(tmp_path / "a.wav", data.fbank_spec(64, 3.0))
    assert 60 <= sum(heard) / 8000 < 62
    scipy.io.wavfile.write(tmp_path / "b.wav", 8000, wave[: 8000 * 60])
    np.testing.assert_allclose(found, data.read_fbank(tmp_path / "b.wav", data.fbank_spec(64, 3.0)), atol=0.02)
    heard.clear()
    data.read_fbank(tmp_path / "a.wav", data.fbank_spec(64, 100.0))
    assert 101 <= sum(heard) / 8000 < 103


def test_channels_that_cancel_each_other_out_are_not_mixed(tmp_path):
    noise = np.random.default_rng(0).normal(0, 3000, 16000).astype(np.int16)
    scipy.io.wavfile.write(tmp_path / "a.wav", 16000, np.stack([noise, -noise], 1))
    np.testing.assert_allclose(np.abs(data.read_sound(tmp_path / "a.wav")), np.abs(noise / np.float32(32768)), atol=1e-6)


def test_a_silent_sound_is_said(clips, tmp_path):
    folder, _, rows = clips
    scipy.io.wavfile.write(folder / "nothing.wav", 16000, np.zeros(8000, np.int16))
    scipy.io.wavfile.write(folder / "offset.wav", 16000, np.full(8000, 99, np.int16))
    beginning = np.r_[np.zeros(4000), np.random.default_rng(0).normal(0, 999, 4000)]
    scipy.io.wavfile.write(folder / "late.wav", 16000, beginning.astype(np.int16))
    sounds = ["nothing.wav", "offset.wav", "late.wav", *(row[4] for row in rows[3:])]
    table = write_csv(folder / "silence.csv", ["voice", "label"], [[x, row[-1]] for x, row in zip(sounds, rows)])
    done = data_called(table, "--out", tmp_path, "--seconds", 1)
    assert done.returncode == 0, done.stderr
    assert re.search("warning: silence is all that is heard in 2 clips, as line [23]\n", done.stdout)


def test_a_colon_in_a_name_is_no_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    babble(Path("2024-05-01T12:03:00.wav"), 0.5)
    film(tmp_path / "a.mp4", **H264).rename("file:12:30.mp4")
    assert len(data.read_sound(Path("2024-05-01T12:03:00.wav"))) == 8000
    assert data.read_frames(Path("file:12:30.mp4"), data.frames_spec(1, 16)).shape == (1, 16, 16, 3)
    assert data.prepare("demo", out="12:30", clips=30).name == "demo"


@pytest.mark.parametrize("move", [(3, 2), (-4, 1)])
def test_the_flow_of_a_texture_is_how_it_moves(move, tmp_path):
    flow = data.read_flow(film(tmp_path / "a.avi", "mpeg4", options={"qmax": "3"}, move=move), data.flow_spec(3, 48))
    assert flow.shape == (3, 48, 48, 2) and flow.dtype == np.uint8
    pixels = (flow[:, 12:36, 12:36].astype(float) - 128) * 20 / 127
    np.testing.assert_allclose(np.median(pixels, (1, 2)), [move] * 3, atol=0.25)


def copy_packets(source, target, first):
    """A film from packet number `first` on, as a cut without recoding leaves it."""
    with av.open(str(source)) as whole, av.open(str(target), "w") as cut:
        stream = cut.add_stream_from_template(whole.streams.video[0])
        for k, packet in enumerate(whole.demux(whole.streams.video[0])):
            if k >= first and packet.size:
                packet.stream = stream
                cut.mux(packet)
    return target


REFRESHED = {"codec": "libx264", "options": {"x264-params": "intra-refresh=1:log-level=error"}}  # without keyframes


@pytest.mark.parametrize("first", [0, 5, 14])
@pytest.mark.parametrize("kind, suffix, all_shown", [
    (H264, "mp4", False), (H264, "mkv", False), (KINDS["open_gop.mp4"], "mkv", False), ({"codec": "libvpx-vp9"}, "webm", False),
    (REFRESHED, "mkv", False), (FLASH, "flv", True), ({"codec": "mpeg4"}, "mp4", True)])  # fmt: skip
def test_of_a_film_cut_between_keyframes_what_is_shown_counts(kind, suffix, all_shown, first, tmp_path):
    whole = film(tmp_path / f"a.{suffix}", **{**kind, "sound": None, "gop": 12}, frames=90)
    cut = copy_packets(whole, tmp_path / f"cut.{suffix}", first)
    with av.open(str(cut)) as movie:
        every = []
        for packet in movie.demux(video=0):
            with contextlib.suppress(av.error.InvalidDataError):
                every += [frame.reformat(48, 48, "rgb24").to_ndarray() for frame in packet.decode()]
    assert (len(every) == 90 - first) == (all_shown or first == 0)
    for count in 1, 3, 11:
        found = data.read_frames(cut, data.frames_spec(count, 48))
        np.testing.assert_array_equal(found, [every[int((i + 0.5) * len(every) / count)] for i in range(count)])


def test_a_film_whose_last_packets_are_broken_is_as_long_as_it_shows_and_half_of_one_is_none(tmp_path):
    content = film(tmp_path / "a.mkv", "mpeg4", frames=24, gop=1).read_bytes()
    with av.open(str(tmp_path / "a.mkv")) as movie:
        every = [frame.reformat(48, 48, "rgb24").to_ndarray() for frame in movie.decode(video=0)]
    starts = [m.start() for m in re.finditer(b"\0\0\1\xb6", content)]  # of its 24 pictures
    for broken, fits in (6, True), (18, False):
        spoilt = bytearray(content)
        for start in starts[-broken:]:
            spoilt[start : start + 4] = b"\0\0\1\xb5"  # no picture
        path = tmp_path / f"{broken}.mkv"
        path.write_bytes(spoilt)
        with contextlib.nullcontext() if fits else pytest.raises(data.BadClip, match="broken, .* of 24 frames"):
            found = data.read_frames(path, data.frames_spec(3, 48))
            np.testing.assert_array_equal(found, [every[int((i + 0.5) * (24 - broken) / 3)] for i in range(3)])


def test_memory_does_not_grow_with_the_length_of_a_film(tmp_path):
    path = film(tmp_path / "a.mkv", "mpeg4", frames=500)
    alive = most = 0

    class Counted:  # a packet, as long as it is held
        def __init__(self, packet):
            nonlocal alive, most
            self.packet = packet
            alive += 1
            most = max(most, alive)

        def __getattr__(self, name):
            return getattr(self.packet, name)

        def __del__(self):
            nonlocal alive
            alive -= 1

    with pytest.MonkeyPatch.context() as patch:
        real = data.packets_of
        patch.setattr(data, "packets_of", lambda stream: map(Counted, real(stream)))
        patch.setattr(data, "decode", lambda stream: (f for p in data.packets_of(stream) for f in p.packet.decode()))
        data.read_frames(path, data.frames_spec(2, 16))
    assert 0 < most < 10


def with_cover(content, first):
    """An MP4 with a cover picture, red, before or behind its film, as iTunes and yt-dlp put it there."""
    red = io.BytesIO()
    Image.new("RGB", (64, 48), (255, 0, 0)).save(red, "JPEG")
    box = lambda kind, content: (len(content) + 8).to_bytes(4, "big") + kind + content  # noqa: E731
    handler = box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    picture = box(b"covr", box(b"data", (13).to_bytes(4, "big") + bytes(4) + red.getvalue()))
    cover = box(b"udta", box(b"meta", bytes(4) + handler + box(b"ilst", picture)))
    start = content.index(b"moov") - 4
    moov, rest = content[start + 8 :], content[:start]  # it is the last box
    udta = moov.index(b"udta") - 4
    header = int.from_bytes(moov[:4], "big")  # mvhd
    tracks = moov[header:udta]
    return rest + box(b"moov", moov[:header] + (cover + tracks if first else tracks + cover))


@pytest.mark.parametrize("first", [True, False])
def test_a_cover_picture_is_not_taken_for_the_film(first, tmp_path):
    path = film(tmp_path / "a.mp4", **H264)
    path.with_stem("b").write_bytes(with_cover(path.read_bytes(), first))
    with av.open(str(path.with_stem("b"))) as movie:
        kinds = [stream.codec_context.name for stream in movie.streams.video]
    assert kinds == (["mjpeg", "h264"] if first else ["h264", "mjpeg"])
    found = data.read_frames(path.with_stem("b"), data.frames_spec(3, 32))
    np.testing.assert_array_equal(found, frames_by_hand(path, 3, 32))


@pytest.mark.parametrize("mode, suffix", [("RGBA", "png"), ("LA", "png"), ("P", "png"), ("RGBA", "gif"), ("RGBA", "webp")])
def test_a_drawing_on_a_transparent_ground_lies_on_white(mode, suffix, tmp_path):
    drawing = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    drawing.paste((0, 0, 0, 255), (4, 4, 12, 12))
    drawing.paste((0, 0, 0, 51), (0, 12, 16, 16))  # a fifth
    palette = mode == "P" or suffix == "gif"  # it knows no fifths
    if palette:
        drawing.paste((0, 0, 0, 0), (0, 12, 16, 16))
    more = {"lossless": True} if suffix == "webp" else {}
    drawing.convert(mode).save(tmp_path / f"a.{suffix}", **more)
    found = data.read_frames(tmp_path / f"a.{suffix}", data.frames_spec(1, 16))[0]
    expected = np.full((16, 16, 3), 255)
    expected[4:12, 4:12] = 0
    expected[12:] = 255 if palette else 204
    np.testing.assert_allclose(found, expected, atol=1)


@pytest.mark.parametrize("codec, pixels", [("qtrle", "argb"), ("png", "rgba"), ("ffv1", "yuva420p")])
def test_a_film_on_a_transparent_ground_lies_on_white(codec, pixels, tmp_path):
    with av.open(str(tmp_path / "a.mov" if codec != "ffv1" else tmp_path / "a.mkv"), "w") as movie:
        stream = movie.add_stream(codec, 10, width=64, height=48, pix_fmt=pixels)
        for k in range(6):
            picture = np.zeros((48, 64, 4), np.uint8)
            picture[8:32, 4 * k : 4 * k + 20, 3] = 255  # opaque black
            movie.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgba").reformat(format=pixels)))
        movie.mux(stream.encode())
        name = movie.name
    found = data.read_frames(Path(name), {**data.frames_spec(1, 0), "size": 48})[0]  # frame 3, 64 pixels wide, squeezed
    assert (found[:6] > 250).all() and (found[34:] > 250).all() and (found[10:30, 12:22] < 5).all()
    grey = next(iter(data.pick_frames(Path(name), data.frames_spec(1, 48))))
    assert data.convert(grey, None, None, "gray")[0, 0] > 230


def turn(path):
    """The same film as an MP4 that is to be shown turned: right becomes down, down becomes left."""
    content = path.read_bytes()
    start = content.index(b"tkhd") + 44  # of the matrix
    matrix = np.array([0, 1 << 16, 0, -1 << 16, 0, 0], ">i4").tobytes()
    turned = path.with_stem("turned")
    turned.write_bytes(content[:start] + matrix + content[start + 24 :])
    return turned


def test_a_film_is_turned_as_its_camera_says(tmp_path):
    upright = film(tmp_path / "upright.mp4", **H264)
    frames = data.read_frames(upright, data.frames_spec(2, 32))  # (2, 32, 32, 3)
    turned = data.read_frames(turn(upright), data.frames_spec(2, 32))
    np.testing.assert_array_equal(turned, frames.transpose(0, 2, 1, 3)[:, :, ::-1])
    flow = data.read_flow(turn(film(tmp_path / "a.mp4", **H264, move=(3, 0))), data.flow_spec(1, 48))
    u, v = np.median(flow, (0, 1, 2))
    assert abs(u - 128) < 3 and v > 140  # what went to the right goes down


def test_precomputed_flow_is_read_at_the_middles(tmp_path, monkeypatch):
    folders = tmp_path / "u/v_A_g01_c01", tmp_path / "v/v_A_g01_c01"
    for folder, offset in zip(folders, (0, 100)):
        folder.mkdir(parents=True)
        for i in range(10):
            Image.new("L", (80, 60), offset + 10 * i).save(folder / f"frame{i + 1:06d}.jpg", quality=100)
    flow = data.read_flow(folders, data.flow_spec(3, 16))
    np.testing.assert_allclose(flow.mean((1, 2)), [[10, 110], [50, 150], [80, 180]], atol=1)
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(data.read_flow((Path("u/v_A_g01_c01"), Path("v/v_A_g01_c01")), data.flow_spec(3, 16)), flow)
    (folders[1] / "frame000004.jpg").unlink()
    with pytest.raises(data.BadClip, match="10 pictures of flow in u, 9 in v"):
        data.read_flow(folders, data.flow_spec(3, 16))


# --- 3 preparing --------------------------------------------------------------------------


def test_bad_clips_are_skipped_with_their_reasons_and_the_others_are_whole(spoilt, tmp_path):
    raw, says = spoilt
    with pytest.raises(
        data.DataError, match="5 of 93 clips cannot be used, more than --max-bad 5 per cent; the last: .+"
    ):
        data.prepare("cremad", raw, tmp_path / "strict", size=32, workers=1)
    folder = data.prepare("cremad", raw, tmp_path, size=32, workers=2, max_bad=20)
    skipped = {i: reason for _, i, reason in manifest_of(folder)["skipped"]}
    assert sorted(skipped) == sorted(says) and [i for i in says if says[i] not in skipped[i]] == []
    dataset = data.load("cremad", tmp_path)
    assert len(dataset.train) + len(dataset.val) + len(dataset.test) == 83
    for part in dataset.train, dataset.val, dataset.test:
        for row, i, label in zip(part.rows, part.ids, part.labels):
            assert i not in says and ["ANG", "DIS", "FEA", "HAP", "NEU", "SAD"][label] == i[9:12]
            longest = 120 if i == "1009_IEO_DIS_MD" else None  # ten seconds
            frames = frames_by_hand(raw / f"VideoFlash/{i}.flv", 2, 32, longest)
            np.testing.assert_array_equal(part.arrays["visual"][row], frames)
            np.testing.assert_array_equal(part.arrays["audio"][row], fbank_by_hand(raw / f"AudioWAV/{i}.wav", 300))


# `data.py` at 200 clips per second at most: on a fast machine, too, it is still at work when it is stopped
UNHURRIED = """
import time, data
data.JOURNAL_EVERY, read_file = 0.05, data.read_file
data.read_file = lambda path, spec: time.sleep(0.005) or read_file(path, spec)  # two files a clip
data.main()
"""


def start(raw, out):
    """`python data.py cremad`, unhurried, in a process group of its own, returned when it is at work."""
    words = [sys.executable, "-c", UNHURRIED, "cremad", "--raw", raw, "--out", out, "--size", "32", "--workers", "2"]
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  a shell's background jobs ignore Ctrl-C
    process = subprocess.Popen(
        words, cwd=HERE, start_new_session=True, stderr=subprocess.PIPE, text=True, preexec_fn=heed
    )
    while process.poll() is None and not (out / "cremad/plan.json").exists():
        time.sleep(0.01)
    return process


@pytest.mark.slow
def test_killed_at_any_time_it_goes_on_and_the_arrays_are_the_same_byte_for_byte(crowd, tmp_path):
    (raw, undisturbed), folder = crowd, tmp_path / "cremad"
    done = lambda: sum(np.sum(np.load(p) != data.SKIPPED) for p in folder.glob("*/labels.npy"))  # noqa: E731
    # soon, and twice when 30 more clips are done; at last the command alone: its workers end by themselves
    for kill, more in (os.killpg, 0), (os.killpg, 30), (os.kill, 30):
        before = done()
        process = start(raw, tmp_path)
        while done() < before + more and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.2 * random.random())
        kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)  # returns when no worker holds the other end any more
        assert process.returncode == -signal.SIGKILL
    read, real = [], data.in_parallel
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "in_parallel", lambda work, jobs, workers: read.extend(jobs) or real(work, jobs, workers))
        rest = 360 - done()
        data.prepare("cremad", raw, tmp_path, size=32, workers=2)
    assert len(read) == rest <= 300  # what is done is not read again
    assert arrays(folder) == arrays(undisturbed) and not list(tmp_path.rglob("*.new"))
    assert (folder / "manifest.json").read_text() == (undisturbed / "manifest.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("wait", [0.02, 0.5])  # while the workers are started, and later
def test_ctrl_c_is_one_clear_line_and_exit_130(wait, crowd, tmp_path):
    process = start(crowd[0], tmp_path)
    time.sleep(wait)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and told.strip() == "stopped; the same command resumes"
    with pytest.raises(data.DataError, match="other parameters .*size 32, now 48"):
        data.prepare("cremad", crowd[0], tmp_path, size=48)


def stop(*_):
    raise KeyboardInterrupt


@contextlib.contextmanager
def another_process(work):
    """A forked process that has done `work`, and then sleeps until it is killed."""
    done, told = os.pipe()
    child = os.fork()
    if not child:
        with contextlib.ExitStack() as stack:
            work(stack)
            os.write(told, b".")
            time.sleep(60)
        os._exit(0)
    os.read(done, 1)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(done)
        os.close(told)


def hold_and_leave_an_orphan(folder, stack):
    stack.enter_context(data.exclusive(folder))
    if not os.fork():
        time.sleep(5)  # a worker that hangs
        os._exit(0)


def test_a_folder_is_one_processs_at_a_time_until_it_is_done_or_killed(tmp_path, capsys):
    folder = tmp_path / "a/b"
    with another_process(partial(hold_and_leave_an_orphan, folder)) as child:
        with pytest.raises(data.DataError, match=f"process {child} on .* is at work in {folder}: wait"):
            with data.exclusive(folder):
                pass
        threading.Timer(0.3, os.kill, (child, signal.SIGKILL)).start()
        start = time.monotonic()
        with data.exclusive(folder, wait=True):
            assert time.monotonic() - start < 3  # the orphan does not hold it
            waited = capsys.readouterr()
            assert waited.err == f"waiting until process {child} on {os.uname().nodename} is done with {folder}\n"
            assert waited.out == ""
    with data.exclusive(folder):
        pass
    assert capsys.readouterr().err == ""


def test_of_two_preparations_at_once_one_waits_and_both_find_the_same(crema, tmp_path, monkeypatch, capfd):
    real = data.fill_arrays
    calls = tmp_path / "calls"

    def slow(*args):
        with open(calls, "a") as file:
            file.write(".")
        time.sleep(0.5)
        return real(*args)

    monkeypatch.setattr(data, "fill_arrays", slow)
    child = os.fork()
    if not child:
        data.prepare("cremad", crema, tmp_path / "out", size=16, workers=1)
        os._exit(0)
    while not calls.exists():
        time.sleep(0.01)
    folder = data.prepare("cremad", crema, tmp_path / "out", size=16, workers=1)
    assert calls.read_text() == "." and (folder / "manifest.json").exists()  # one did it
    assert capfd.readouterr().err.count(f"waiting until process {child} on") == 1
    assert os.waitpid(child, 0)[1] == 0 and len(data.load("cremad", tmp_path / "out").train) == 72


def test_a_finished_dataset_can_be_read_only(small_demo, tmp_path, monkeypatch):
    shutil.copytree(small_demo / "demo", tmp_path / "demo", ignore=shutil.ignore_patterns("raw"))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    monkeypatch.setattr(data, "exclusive", stop)  # it would write
    data.prepare("demo", out=tmp_path, clips=161)
    assert len(data.load("demo", tmp_path).train) == 77
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only on Linux")
def test_as_many_processes_as_there_are_cores_for_this_one():
    mine = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mine)})
        assert data.cpu_count() == 1 and data.parse(["demo"])["workers"] == 1
    finally:
        os.sched_setaffinity(0, mine)


@pytest.mark.parametrize("where, size", [("in_parallel", 32), ("write_json", 40)])
def test_stopped_with_half_a_journal_or_before_the_plan(where, size, crema, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, where, stop)
        data.prepare("cremad", crema, tmp_path, size=32)
    if where == "in_parallel":
        journal = tmp_path / "cremad/train/labels.npy"
        np.save(journal, np.zeros(72, np.int64))
        journal.write_bytes(journal.read_bytes()[:-4])
    folder = data.prepare("cremad", crema, tmp_path, size=size, workers=1)  # before the plan: another size may be taken
    ids, visual = (
        manifest_of(folder)["splits"]["train"],
        np.load(folder / "train/visual.npy"),
    )
    np.testing.assert_array_equal(visual[1], frames_by_hand(crema / f"VideoFlash/{ids[1]}.flv", 2, size))


@pytest.mark.parametrize("damage", ["gone", "cut", "plan gone"])
def test_a_journal_is_believed_only_of_arrays_that_are_there(damage, crema, tmp_path, monkeypatch):
    whole = arrays(data.prepare("cremad", crema, tmp_path / "whole", size=32, workers=1))
    write = data.write_atomically
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "write_atomically", lambda path, *more: stop() if path.stem == "manifest" else write(path, *more))
        data.prepare("cremad", crema, tmp_path, size=32, workers=1)
    folder = tmp_path / "cremad"
    array = folder / "train/visual.npy"
    if damage == "gone":
        array.unlink()
    elif damage == "cut":
        array.write_bytes(array.read_bytes()[:5000])
    else:
        np.load(array, mmap_mode="r+")[:] = 0  # as if of other clips
        (folder / "plan.json").unlink()
    assert arrays(data.prepare("cremad", crema, tmp_path, size=32, workers=1)) == whole


def test_a_process_that_has_converted_frames_in_threads_can_prepare(crema, tmp_path):
    film = next(crema.glob("VideoFlash/*"))
    script = tmp_path / "script.py"
    script.write_text("import sys, data\n"
                      "for frame in data.pick_frames(data.Path(sys.argv[3]), data.frames_spec(2, 32)):\n"
                      "    frame.reformat(200, 150, 'rgb24')\n"
                      "data.prepare('cremad', *sys.argv[1:3], size=32, workers=2)\n")  # fmt: skip
    done = command(script, crema, tmp_path, film, env={**os.environ, "PYTHONPATH": str(HERE)}, timeout=100)
    assert done.returncode == 0 and (tmp_path / "cremad/manifest.json").exists(), done.stderr


@pytest.mark.slow
def test_works_under_the_spawn_start_method_and_a_finished_dataset_is_recognised(crema, tmp_path):
    few = tmp_path / "few"
    for path in sorted(crema.glob("*/*IEO_*"))[::3]:  # ten clips
        link(path, few / path.relative_to(crema))
    script = tmp_path / "script.py"
    script.write_text("import multiprocessing, sys, data\nif __name__ == '__main__':\n"
                      "    multiprocessing.set_start_method('spawn')\n"
                      "    data.prepare('cremad', sys.argv[1], sys.argv[2], size=32, workers=1)\n")  # fmt: skip
    done = command(script, few, tmp_path, env={**os.environ, "PYTHONPATH": str(HERE)})
    assert done.returncode == 0, done.stderr
    spawned = arrays(tmp_path / "cremad")
    assert len(spawned) == 9 and spawned == arrays(data.prepare("cremad", few, tmp_path / "here", size=32, workers=1))
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    data.prepare("cremad", few, tmp_path, size=32)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == times
    with pytest.raises(data.DataError, match="other parameters .*frames 2, now 3, keep 1, now 5"):
        data.prepare("cremad", few, tmp_path, size=32, frames=3, keep=5)


@pytest.mark.parametrize("kinds", ["VideoFlash/* AudioWAV/*", "VideoFlash/*"])
def test_git_lfs_stubs_are_recognised_at_once(kinds, crema, tmp_path):
    for path in crema.glob("*/*"):
        link(path, tmp_path / path.relative_to(crema))
    for kind in kinds.split():
        for path in tmp_path.glob(kind):
            replace(path, STUB)
    with pytest.raises(data.DataError, match="0 have their files there(.|\n)*gitlab.com/cs-cooper-lab(.|\n)*lfs pull -I"):
        data.prepare("cremad", tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [ValueError("odd"), FileNotFoundError("odd"), OSError("odd\nlines " + 200 * "x ")])
def test_what_is_not_what_it_should_be_is_explained_in_one_line(error):
    with pytest.raises(data.DataError, match=r"it is no list \(\w+Error: odd") as found, data.explained("it is no list"):
        raise error
    assert "\n" not in str(found.value) and len(str(found.value)) < 150


@pytest.mark.parametrize("error", [ConnectionError("odd"), PermissionError(), data.DataError("odd"), KeyboardInterrupt()])
def test_what_tells_its_own_story_is_let_through(error):
    with pytest.raises(type(error)) as found, data.explained("it is no list", ConnectionError):
        raise error
    assert found.value is error


def test_a_disk_that_fills_up_while_the_demo_is_drawn_gets_one_line(tmp_path):
    resource = pytest.importorskip("resource")  # there is none on Windows
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, unlimited[1]))
    try:
        done = data_called("demo", "--clips", 30, "--out", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "File too large" in done.stderr and "the same command resumes" in done.stderr


def test_disk_space_is_checked_before(crema, tmp_path, monkeypatch):
    need = 90 * (2 * 50 * 50 * 3 + 128 * 300 * 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=need - 1))
    with pytest.raises(data.DataError, match="0.0 GB are free: give another --out, or a smaller --size"):
        data.prepare("cremad", crema, tmp_path, size=50)
    assert not list(tmp_path.rglob("*.npy"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=need))
    assert data.prepare("cremad", crema, tmp_path, size=50).is_dir()


@pytest.mark.parametrize(
    "flag", [{"size": 0}, {"size": -3}, {"frames": 0}, {"keep": 0}, {"seconds": -2.0}, {"workers": -1}]
)
def test_impossible_parameters_are_refused(flag, crema, tmp_path):
    with pytest.raises(data.DataError, match=f"{list(flag)[0]}.*{list(flag.values())[0]}"):
        data.prepare("cremad", crema, tmp_path, **flag)


@pytest.mark.parametrize("old, new", [(b"V_MPEG4/ISO/AVC", b"V_NOBODY/S/OWN_"), (b"A song", b"\xc4 \xff\xfe\xe4\xf6")])
def test_an_unknown_codec_is_one_more_bad_clip_and_a_title_that_is_not_unicode_none(old, new, tmp_path):
    path = film(tmp_path / "a.mkv", **H264)
    with av.open(str(path)) as source, av.open(str(tmp_path / "b.mkv"), "w") as titled:
        streams = {s.index: titled.add_stream_from_template(s) for s in source.streams}
        titled.metadata["title"] = "A song"
        for packet in source.demux():
            if packet.size:
                packet.stream = streams[packet.stream.index]
                titled.mux(packet)
    content = (tmp_path / "b.mkv").read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    files, specs = (
        {"visual": path, "audio": path},
        {"audio": data.fbank_spec(128, 1.0), "visual": data.frames_spec(1, 16)},
    )
    (tmp_path / "train").mkdir()
    for m, spec in specs.items():
        np.save(tmp_path / "train" / m, np.zeros((1, *spec["shape"]), spec["dtype"]))
    reason = data.prepare_clip(tmp_path, specs, data.Clip("a", 0, "train", files), 0)
    assert bool(reason) == (b"NOBODY" in new)


@pytest.mark.slow
@pytest.mark.parametrize("name, fixture", [("cremad", "spoilt"), ("kinetics", "kinetics"), ("ucf101", "ucf")])
def test_from_the_raw_download_to_a_run(name, fixture, request, tmp_path):
    raw, says = request.getfixturevalue(fixture)
    sound = () if name == "ucf101" else ("--seconds", 0.3)
    words = name, "--raw", raw, "--out", tmp_path, "--size", 32, "--frames", 1, "--max-bad", 20, *sound
    done = data_called(*words)
    assert done.returncode == 0 and f"{len(says)} skipped" in done.stdout, done.stderr
    skipped = {i: r for _, i, r in manifest_of(tmp_path / name)["skipped"]}
    assert sorted(skipped) == sorted(says) and all(says[i] in skipped[i] and skipped[i] in done.stdout for i in says)
    dataset = data.load(name, tmp_path)
    for split in dataset.train, dataset.val, dataset.test:
        seen = 0
        for inputs, labels in data.batches(split, 16):
            assert set(inputs) == {"visual", "flow" if name == "ucf101" else "audio"}
            assert all(x.shape == (len(labels), *dataset.shapes[m]) and x.isfinite().all() for m, x in inputs.items())
            seen += len(labels)
        assert seen == len(split)


# --- nothing ends in a traceback ---


def die(path, spec):
    if path.stem.endswith("1002_IOM_HAP_XX"):
        os.kill(os.getpid(), signal.SIGKILL)  # as quick as a crash inside FFmpeg
    return data.read_frames(path, spec)


def test_a_clip_that_kills_its_process_is_named_and_the_rest_is_whole(crema, tmp_path, monkeypatch):
    plain = data.prepare("cremad", crema, tmp_path / "plain", size=16, frames=1, workers=2)
    monkeypatch.setitem(data.READERS, "frames", die)
    folder = data.prepare("cremad", crema, tmp_path / "died", size=16, frames=1, workers=2)
    manifest = manifest_of(folder)
    assert [(i, says) for _, i, says in manifest["skipped"]] == [("1002_IOM_HAP_XX", "the process that read it crashed")]
    for split, ids in manifest["splits"].items():
        keep = [k for k, i in enumerate(ids) if i != "1002_IOM_HAP_XX"]
        for m in "audio", "visual":
            here, there = (np.load(f / split / f"{m}.npy")[keep] for f in (folder, plain))
            np.testing.assert_array_equal(here, there)


@pytest.mark.parametrize("error", [IndexError("list index out of range"), RuntimeError("two\nlines"), MemoryError(), KeyError("x")])
def test_whatever_a_clip_does_it_is_one_more_bad_clip(error, crema, tmp_path, monkeypatch):
    def fail(path, spec):
        raise error

    monkeypatch.setitem(data.READERS, "frames", fail)
    clip = data.Clip("a", 0, "train", {"visual": crema / "VideoFlash/1001_IEO_ANG_XX.flv"})
    reason = data.prepare_clip(tmp_path, {"visual": data.frames_spec(1, 16)}, clip, 0)
    assert type(error).__name__ in reason and "\n" not in reason


def test_on_windows_no_more_than_61_processes_are_started(monkeypatch):
    sizes = []

    class Pool(data.ProcessPoolExecutor):
        def __init__(self, size, **more):
            sizes.append(size)
            super().__init__(1, **more)

    monkeypatch.setattr(data, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(data, "cpu_count", lambda: 64)
    for platform in "linux", "win32":
        monkeypatch.setattr(sys, "platform", platform)
        assert list(data.in_parallel(abs, [(-1,), (-2,)])) == [1, 2]
        assert list(data.in_parallel(abs, [(-1,)], 70)) == [1]
        assert list(data.in_parallel(abs, [(-1,)], 2)) == [1]
    assert sizes == [64, 70, 2, 61, 61, 2]


@pytest.mark.slow
def test_a_script_without_a_main_guard_is_told_so_at_once(crema, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import multiprocessing, sys, data\nprint('once more', flush=True)\n"
                      "multiprocessing.set_start_method('spawn', force=True)\n"
                      "data.prepare('cremad', sys.argv[1], sys.argv[2], size=32, workers=1)\n")  # fmt: skip
    done = command(script, crema, tmp_path, env={**os.environ, "PYTHONPATH": str(HERE)}, timeout=60)
    assert done.returncode == 1 and done.stderr.count("Traceback") == 1  # its own
    assert done.stderr.splitlines()[-1].startswith("data.DataError: no process can be started")
    assert "if __name__ == '__main__':" in done.stderr and done.stdout.count("once more") == 2


def take_all_memory(kind):
    if kind == "NumPy":
        np.ones(1 << 60, np.uint8)
    elif kind == "PyTorch":
        torch.ones(1 << 60, dtype=torch.uint8)
    elif kind == "the system":
        raise OSError(errno.ENOMEM, "Cannot allocate memory")
    elif kind == "CUDA":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")
    raise RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB).\nTried to allocate 2.00 GB on private pool.")


@pytest.mark.parametrize("kind", ["NumPy", "PyTorch", "the system", "CUDA", "MPS"])
def test_want_of_memory_is_one_line_that_names_the_batch_size(kind, capsys):
    with pytest.raises(SystemExit) as end, data.one_line_for_errors("dr.py"):
        with data.explained("it is damaged: delete it"):
            take_all_memory(kind)
    told = capsys.readouterr().err
    assert end.value.code == 2 and told.startswith("dr.py: out of memory") and len(told.splitlines()) == 1
    assert "--batch-size" in told and "damaged" not in told


@pytest.mark.parametrize("error", [RuntimeError("shape"), ValueError("odd"), KeyError("memory")])
def test_what_the_user_cannot_mend_keeps_its_traceback(error):
    with pytest.raises(type(error)), data.one_line_for_errors("dr.py"):
        raise error


def broken_files(folder):
    """Files of the kinds that broke readers when files were mutated at random."""
    flash = film(folder / "good.flv", "flv1").read_bytes()
    at = flash.index(b"\x09", 400)
    (folder / "new_stream.flv").write_bytes(flash[:at] + b"\x08" + flash[at + 1 :])
    (folder / "tags.flv").write_bytes(flash[:600] + bytes(range(256)) * 4 + flash[1600:])
    film(folder / "good.mp4", **H264)
    box = (folder / "good.mp4").read_bytes()
    (folder / "no_samples.mp4").write_bytes(box.replace(b"stsz", b"st?z"))
    (folder / "endless.mp4").write_bytes(box.replace(b"stts\0\0\0\0\0\0\0\1", b"stts\0\0\0\0\xff\xff\xff\xff"))
    film(folder / "good.mkv", **H264)
    (folder / "cut.mkv").write_bytes((folder / "good.mkv").read_bytes()[:700])
    babble(folder / "good.wav", 0.5)
    wave = (folder / "good.wav").read_bytes()
    (folder / "no_channels.wav").write_bytes(wave[:22] + b"\0\0" + wave[24:])
    (folder / "silent.wav").write_bytes(wave[:44])
    np.save(folder / "good.npy", np.ones((2, 3)))
    array = (folder / "good.npy").read_bytes()
    (folder / "header.npy").write_bytes(array.replace(b"'fortran_order'", b"(((((((((((((((", 1))
    (folder / "cut.npy").write_bytes(array[:-9])
    np.savez(folder / "zip.npz", x=np.ones(3))
    (folder / "zip.npz").rename(folder / "zip.npy")
    Image.new("RGB", (50, 50)).save(folder / "good.jpg")
    (folder / "cut.jpg").write_bytes((folder / "good.jpg").read_bytes()[:300])
    (folder / "folder.png").mkdir()
    return sorted(p for p in folder.iterdir() if p.stem != "good")


def test_broken_files_are_bad_clips_with_one_line_each(tmp_path):
    features = {"kind": "sequence", "shape": [2, 3], "mean": [0.0] * 3, "std": [1.0] * 3}
    for path in broken_files(tmp_path):
        specs = {".npy": [features], ".wav": [data.fbank_spec(128, 1.0)]}.get(
            path.suffix, [data.frames_spec(2, 16), data.flow_spec(1, 16), data.fbank_spec(128, 1.0)]
        )
        for spec in specs:
            (tmp_path / "train").mkdir(exist_ok=True)
            np.save(tmp_path / "train/x.npy", np.zeros((1, *spec["shape"]), spec.get("dtype", "float32")))
            reason = data.prepare_clip(tmp_path, {"x": spec}, data.Clip("a", 0, "train", {"x": path}), 0)
            assert "\n" not in reason and (reason or path.suffix in (".flv", ".mp4", ".mkv")), path


def test_flow_of_an_odd_width_and_of_ten_bits(tmp_path):
    for name, width, pixels in ("odd.mkv", 127, "yuv444p"), ("ten.mkv", 130, "yuv420p10le"):
        with av.open(str(tmp_path / name), "w") as movie:
            video = movie.add_stream("ffv1", 12, width=width, height=96, pix_fmt=pixels)
            for k in range(6):
                picture = np.random.default_rng(k).integers(0, 256, (video.height, width, 3), dtype=np.uint8)
                movie.mux(video.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
            movie.mux(video.encode())
        assert data.read_flow(tmp_path / name, data.flow_spec(2, 16)).shape == (2, 16, 16, 2)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"options": 3}', b"\xff\xfe\x00"])
@pytest.mark.parametrize("name", ["plan.json", "manifest.json"])
def test_a_damaged_plan_or_manifest_gets_one_clear_line(name, content, crema, tmp_path):
    (tmp_path / "cremad").mkdir()
    (tmp_path / "cremad" / name).write_bytes(content)
    done = data_called("cremad", "--raw", crema, "--out", tmp_path, "--size", 16)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"is damaged, see {name}" in done.stderr and "delete it and prepare it again" in done.stderr


def test_a_damaged_journal_means_reading_some_clips_again(crema, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "in_parallel", stop)
        data.prepare("cremad", crema, tmp_path, size=16)
    (tmp_path / "cremad/train/labels.npy").write_bytes(b"\xff\x00train\ntrain -1\ntrain 99999\n\n")
    np.save(tmp_path / "cremad/val/labels.npy", np.full(9, 99999))
    folder = data.prepare("cremad", crema, tmp_path, size=16, workers=1)
    assert arrays(folder) == arrays(data.prepare("cremad", crema, tmp_path / "again", size=16, workers=1))


@pytest.mark.parametrize("words", [
    ["--size", "x"], ["--size", "0"], ["--size", "99999999999999999999"], ["--seconds", "nan"], ["--seconds", "inf"],
    ["--frames", "-1"], ["--keep", "2"], ["--split", "people"], ["--split-dir", "/nowhere"],
    ["--split", "actors", "--split-dir", "."], ["--workers", "-3"],
    ["--max-bad", "nan"], ["--max-bad", "101"], ["--raw", "/nowhere"], ["--nonsense"], ["--out", "/dev/null"]])  # fmt: skip
def test_wrong_flags_get_one_line(words, crema, tmp_path):
    done = data_called("cremad", "--raw", crema, "--out", tmp_path / "out", *words)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("data.py: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [[], ["nonsense"], ["ucf101", "--raw", ".", "--fold", "4"], ["demo", "--clips", "4000"], ["demo", "--seed", "-1"], ["mosi", "--raw", "."]])  # fmt: skip
def test_wrong_commands_get_one_line(words):
    done = data_called(*words)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("data.py: ")


def a_dataset(counts, names):
    """Labels only: {split: clips of each class}."""
    splits = [np.repeat(np.arange(len(names)), n) for n in counts]
    splits = [data.Split({}, {}, np.arange(len(y)), y, list(map(str, y))) for y in splits]
    return data.Dataset(*splits, classes=names, shapes={})


def test_the_table_of_classes_shows_every_cell_and_what_is_too_small():
    lines = data.overview(a_dataset(([30, 1200], [10, 11], [2, 0]), ["joy", "x" * 99]))
    assert [line.split()[-3:] for line in lines[:3]] == [["train", "val", "test"], ["30", "10", "2"], ["1200", "11", "0"]]
    assert len(lines) == 4 and re.search("fewer than two clips, 0, of the class x+ in test", lines[3])
    assert max(map(len, lines)) <= 80
    few = data.overview(a_dataset(([30, 30], [9, 10], [2, 2]), ["a", "b"]))
    assert len(few) == 4 and "fewer than ten clips per class to validate on" in few[3]
    fine = data.overview(a_dataset(([30, 30], [10, 10], [2, 2]), ["a", "b"]))
    assert len(fine) == 3
    many = data.overview(a_dataset(([3] * 101, [*range(20, 121)], [7] * 101), [f"class {k}" for k in range(101)]))
    assert [line.split()[-3:] for line in many[1:]] == [["3", "20", "7"], ["3", "120", "7"]]


def test_one_word_is_one_class_in_either_unicode_form_and_the_table_is_printed(tmp_path):
    names = ["\u00c4rger", "A\u0308rger", "joy"]
    rows = [[f"{k}.npy", names[k % 3]] for k in range(30)]
    write_features(tmp_path / "in", np.ones((30, 2, 3)) * np.arange(30)[:, None, None])
    done = data_called(write_csv(tmp_path / "in/words.csv", ["x", "label"], rows), "--out", tmp_path)
    assert done.returncode == 0 and data.load("words", tmp_path).classes == ["joy", "\u00c4rger"], done.stderr
    assert re.search("joy +8 +1 +1\n", done.stdout) and re.search("\u00c4rger +16 +2 +2\n", done.stdout)
    assert re.search("fewer than two clips, 1, of the class joy in (val|test)\n", done.stdout)


# --- 4 a prepared dataset: loading, batches, augmentation -----------------------------------------


@pytest.mark.parametrize(
    "name, content", [("manifest.json", b"{"), ("train/visual.npy", b"\x93NUMPY"), ("val/labels.npy", None)]
)
def test_a_damaged_dataset_gets_one_clear_line(name, content, small_demo, tmp_path):
    shutil.copytree(small_demo / "demo", tmp_path / "demo", ignore=shutil.ignore_patterns("raw"))
    (tmp_path / "demo" / name).unlink()
    if content is not None:
        (tmp_path / "demo" / name).write_bytes(content)
    with pytest.raises(data.DataError, match="is damaged(, see manifest.json)?: delete it and prepare it again"):
        data.load("demo", tmp_path)


# --- batches --------------------------------------------------------------------------------------


def test_batches_hold_every_clip_once_and_repeat_with_the_seed(small_demo):
    split = data.load("demo", small_demo).train
    whole = {m: data.normalise(data.read_rows(split, m, split.rows), split.specs[m]) for m in split.arrays}

    def order(seed):
        seen = []
        for inputs, labels in data.batches(split, 16, seed):
            for k, label in enumerate(labels):
                match = (whole["visual"] == inputs["visual"][k]).flatten(1).all(1).nonzero().ravel().tolist()
                assert len(match) == 1 and split.labels[match[0]] == label
                assert torch.equal(whole["audio"][match[0]], inputs["audio"][k])
                seen += match
        return seen

    assert order(None) == list(range(len(split)))
    assert sorted(order(3)) == list(range(len(split))) and order(3) == order(3) != order(4)


@pytest.mark.parametrize("size, world, expected", [
    (19, 1, [19, 19, 19, 20]), (20, 1, [20, 20, 20, 17]), (25, 2, [13, 13, 14]), (25, 3, [9, 9, 9]), (37, 3, [13, 14])])  # fmt: skip
def test_no_process_gets_a_single_clip(size, world, expected, small_demo):
    split = data.load("demo", small_demo).train  # 77 clips
    parts = [[len(y) for _, y in data.batches(split, size, 1, part=(rank, world))] for rank in range(world)]
    assert parts == [expected] * world


def test_inputs_are_normalised_as_the_official_code_does(small_demo):
    split = data.load("demo", small_demo).val
    inputs, _ = next(data.batches(split, 4))
    frames = split.arrays["visual"][split.rows[:4]].astype(np.float64) / 255  # (4, 1, 48, 48, 3)
    expected = ((frames - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).transpose(0, 1, 4, 2, 3)
    np.testing.assert_allclose(inputs["visual"], expected, atol=1e-5)
    sound = split.arrays["audio"][split.rows[:4]].astype(np.float64)
    np.testing.assert_allclose(inputs["audio"], (sound + 4.503877) / (2 * 5.141276), atol=1e-5)
    flat = inputs["visual"].flatten(0, 1)
    assert flat.is_contiguous(memory_format=torch.channels_last)


def test_the_demo_is_the_same_for_one_seed_and_stratified(small_demo, tmp_path):
    data.demo(tmp_path, clips=13)
    for clip in tmp_path.rglob("*.*"):
        assert clip.read_bytes() == (small_demo / "demo" / "raw" / clip.relative_to(tmp_path)).read_bytes()
    dataset = data.load("demo", small_demo)
    assert [len(s) for s in (dataset.train, dataset.val, dataset.test)] == [77, 23, 61]
    assert max(np.bincount(dataset.train.labels)) - min(np.bincount(dataset.train.labels)) <= 2


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_out_every_batch(world, small_demo):
    split = data.load("demo", small_demo).val  # 21 clips
    shuffled = [list(data.batches(split, 8, 1, part=(rank, world))) for rank in range(world)]
    for k, (x, y) in enumerate(data.batches(split, 8, 1)):
        pieces = [share[k] for share in shuffled]
        assert len({len(labels) for _, labels in pieces}) == 1
        drawn = {tuple(row) for piece, _ in pieces for row in piece["audio"].flatten(1).tolist()}
        assert drawn == {tuple(row) for row in x["audio"].flatten(1).tolist()}
        assert 0 <= sum(len(labels) for _, labels in pieces) - len(y) < world


def test_arrays_held_on_the_device_and_batches_read_ahead_are_the_same(small_demo, monkeypatch):
    dataset = data.load("demo", small_demo)

    def read():
        found = data.batches(dataset.train, 16, 0, augmented=True)
        return [x for inputs, labels in found for x in (*inputs.values(), labels)]

    plain = read()
    with monkeypatch.context() as patch:  # as on CUDA
        patch.setattr(data, "map", data.prefetch, raising=False)
        threaded = read()
    assert not data.move_to_gpu(dataset, "cpu", max_bytes=1000) and isinstance(dataset.train.arrays["audio"], np.ndarray)
    assert data.move_to_gpu(dataset, "cpu", max_bytes=10**9) and isinstance(dataset.train.arrays["audio"], torch.Tensor)
    for x, y, z in zip(plain, threaded, read(), strict=True):
        assert torch.equal(x, y) and torch.equal(x, z)


def test_noise_has_the_strength_asked_for_and_stays_with_its_clip(small_demo):
    clean, noisy, again = (data.load("demo", small_demo) for _ in range(3))
    data.add_noise(noisy, "audio", 0.5)
    data.add_noise(again, "audio", 0.5)
    for split in ("train", "val", "test"):
        a, b, c = (getattr(d, split) for d in (clean, noisy, again))
        noise = np.float32(b.arrays["audio"][b.rows]) - a.arrays["audio"][a.rows]
        spread = np.float32(clean.train.arrays["audio"][clean.train.rows]).std()
        assert noise.std() == pytest.approx(0.5 * spread, rel=0.02) and abs(noise.mean()) < 0.01 * spread
        assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.1  # each clip has its own
        assert np.array_equal(b.arrays["audio"], c.arrays["audio"]) and np.array_equal(a.labels, b.labels)
        assert np.array_equal(a.arrays["visual"], b.arrays["visual"])


def test_noise_leaves_padding_alone_and_refuses_pictures(small_demo, tmp_path):
    rows, sequence = np.arange(6), np.ones((6, 5, 3), np.float32) * np.arange(1, 7)[:, None, None]
    sequence[:, 3:] = 0
    splits = [
        data.Split({"text": sequence}, {"text": {"kind": "sequence"}}, rows, rows % 2, list(rows)) for _ in range(3)
    ]
    dataset = data.Dataset(*splits, classes=["a", "b"], shapes={"text": (5, 3)})
    data.add_noise(dataset, "text", 1.0)
    noisy = dataset.val.arrays["text"]
    assert (noisy[:, 3:] == 0).all() and (noisy[:, :3] != sequence[:, :3]).all()
    demo = data.load("demo", small_demo)
    for modality, says in (("visual", "not on visual"), ("text", "no text to put noise on; there is audio, visual")):
        with pytest.raises(data.DataError, match=says):
            data.add_noise(demo, modality, 1.0)


# --- augmentation ---------------------------------------------------------------------------------


def a_split(kind, keep=1, same=False):
    pictures = {"frames": data.frames_spec, "flow": data.flow_spec}
    spec = pictures[kind](2, 24, keep) if kind in pictures else data.fbank_spec(20, 0.4)
    if kind == "sequence":
        spec = {"kind": "sequence", "shape": [6, 3], "dtype": "float32"}
    array = np.random.default_rng(0).integers(0, 256, (12, *spec["shape"])).astype(spec["dtype"])
    array = array[:1].repeat(12, 0) if same else array
    return data.Split({kind: array}, {kind: spec}, np.arange(12), np.arange(12), [str(i) for i in range(12)])


@pytest.mark.parametrize("kind", ["frames", "flow", "fbank", "sequence"])
def test_augmented_batches_repeat_with_the_seed_and_every_sample_is_drawn_on_its_own(kind):
    read = lambda seed, split: list(data.batches(split, 5, seed, augmented=True))  # noqa: E731
    split, changed = a_split(kind), a_split(kind)
    changed.arrays[kind][4] = 77
    seeds, splits = [(3, 1), (3, 1), (3, 2), (3, 1)], [split, split, split, changed]
    for (a, y), (b, z), (other, _), (c, _) in zip(*map(read, seeds, splits)):
        assert torch.equal(a[kind], b[kind]) and torch.equal(y, z) and not torch.equal(a[kind], other[kind])
        assert [torch.equal(p, q) for p, q in zip(a[kind], c[kind])] == [k != 4 for k in y.tolist()]
    x = read(0, a_split(kind, same=True))[0][0][kind]
    assert not any(torch.equal(x[i], x[j]) for i in range(5) for j in range(i))


def test_a_flip_mirrors_the_flow_and_negates_u():
    x = torch.ones(64, 3, 2, 32, 32)
    x[:, :, 1] = torch.linspace(0, 1, 32)  # u is 1; v grows to the right
    y = data.augment(x, "flow", np.random.default_rng(0))
    slope = (y[:, 0, 1, :, 20] - y[:, 0, 1, :, 12]).mean(1)
    torch.testing.assert_close(y[:, :, 0], slope.sign().view(-1, 1, 1, 1).expand(64, 3, 32, 32))
    assert 16 < (slope < 0).sum() < 48 and (y[:, 0] == y[:, 1]).all()  # one crop for all fields of a clip


def test_a_gain_shifts_a_whole_spectrogram():
    x = torch.rand(200, 1, 50, 100)
    gain = data.augment(x.clone(), "fbank", np.random.default_rng(0)) - x
    torch.testing.assert_close(gain, gain[:, :, :1, :1].expand_as(x))
    assert 0.04 < gain[:, 0, 0, 0].std() < 0.06


def test_a_shift_moves_every_feature_of_a_whole_sequence_but_not_its_padding():
    x = torch.rand(200, 9, 4) + 1
    x[:, 6:] = 0
    shift = data.augment(x.clone(), "sequence", np.random.default_rng(0)) - x
    torch.testing.assert_close(shift[:, :6], shift[:, :1].expand(-1, 6, -1))
    assert not shift[:, 6:].any()
    np.testing.assert_allclose(shift[:, 0].std(0), 0.5, atol=0.08)  # of standard deviations, each feature's its own
    assert abs(np.corrcoef(shift[:, 0].T) - np.eye(4)).max() < 0.3


def test_of_several_frames_kept_the_middle_one_is_taken_unless_augmented():
    split = a_split("frames", keep=3)
    spec, array = split.specs["frames"], split.arrays["frames"]
    expected = (array[:, [1, 4]].astype(np.float32) - spec["mean"]) / spec["std"]
    x = data.normalise(data.read_rows(split, "frames", np.arange(12)), spec)
    np.testing.assert_allclose(x.permute(0, 1, 3, 4, 2).numpy(), expected, rtol=1e-4, atol=1e-5)
    split.arrays["frames"] = np.broadcast_to(np.arange(6, dtype=np.uint8)[:, None, None, None], array.shape)
    rng = np.random.default_rng(0)
    y = data.normalise(data.read_rows(split, "frames", np.arange(12).repeat(9), rng=rng), spec, rng)[:, :, 0, 12, 12]
    drawn = np.rint(y.numpy() * spec["std"][0] + spec["mean"][0])
    assert {tuple(d) for d in drawn} == {(i, j) for i in (0, 1, 2) for j in (3, 4, 5)}


# --- the notebook ---------------------------------------------------------------------------------

NOTEBOOK = nbformat.read(HERE / "tutorial.ipynb", 4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
TEXT = [cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown"]
OUTPUTS = [output for cell in CODE for output in cell.outputs]
METHOD = ["step", "purity", "purity_gap", "relearning_strength", "relearn"]  # soft_reinit is held by relearn
SHORTER = {
    "settings |= dict()": "settings |= dict(epochs=5, every=2)",
    "load_digits(return_X_y=True)": "load_digits(n_class=3, return_X_y=True)",
}


@pytest.fixture(scope="session")
def executed(prepared, tmp_path_factory):
    """The same cells on a small demo, for fewer epochs, in a folder of their own."""
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "prepared").mkdir()
    (folder / "prepared" / "demo").symlink_to(prepared / "demo")
    short = nbformat.from_dict(NOTEBOOK)
    for long, brief in SHORTER.items():
        assert sum(long in cell.source for cell in short.cells) == 1
        for cell in short.cells:
            cell.source = cell.source.replace(long, brief)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE))
        client = nbclient.NotebookClient(short, timeout=300, resources={"metadata": {"path": str(folder)}})
        with client.setup_kernel():
            for index, cell in enumerate(short.cells):
                client.execute_cell(cell, index)
            loop = next(k for k, cell in enumerate(short.cells) if "def train_plain" in cell.source)
            again = nbformat.from_dict(short.cells[loop])  # every cell can be run twice; this one trains
            client.execute_cell(again, loop)
    return short, again


def texts(cells):
    outputs = [o for cell in cells if cell.cell_type == "code" for o in cell.outputs]
    return "".join(o.get("text", "") for o in outputs)


@pytest.mark.xdist_group("notebook")
@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(executed):
    short, _ = executed
    outputs = [o for cell in short.cells if cell.cell_type == "code" for o in cell.outputs]
    assert not any(o.output_type == "error" for o in outputs)
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 13
    assert texts(short.cells).count("not yet") == len(EXERCISES)  # nobody has solved the exercises


@pytest.mark.xdist_group("notebook")
@pytest.mark.slow
def test_the_loop_that_the_reader_writes_is_that_of_train(executed):
    told = texts(executed[0].cells)
    assert "our loop ran, for my_loop returns nothing" in told
    pairs = re.findall(r"(?:gap|strength) ([\d.]+), by dr.train ([\d.]+)", told)
    assert len(pairs) == 8  # two re-learnings, two modalities
    assert all(ours == theirs for ours, theirs in pairs)


@pytest.mark.xdist_group("notebook")
@pytest.mark.slow
def test_the_sound_by_hand_is_that_of_data(executed):
    told = texts(executed[0].cells)
    assert float(re.search(r"largest difference to the stored column: ([\d.]+)", told)[1]) < 0.01


@pytest.mark.xdist_group("notebook")
@pytest.mark.slow
def test_a_cell_that_trains_can_be_run_twice(executed):
    short, again = executed
    first = next(cell for cell in short.cells if "def train_plain" in cell.source)
    assert "by dr.train" in texts([first])
    assert texts([first]) == texts([again])


def test_the_cells_hold_every_step_against_dr():
    for name in METHOD:
        cells = "".join(cell.source for cell in CODE)
        assert f"def {name}(" in cells and f"dr.{name}" in cells, name
        defined = next(k for k, cell in enumerate(CODE) if f"def {name}(" in cell.source)
        here = CODE[defined : defined + 2]
        assert any("assert" in cell.source and f"dr.{name}" in cell.source for cell in here), name


def test_the_saved_output_is_of_one_run_of_this_code():
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    assert not any(o.output_type == "error" or o.get("name") == "stderr" for o in OUTPUTS)
    shown = "".join(o["data"].get("text/markdown", "") for o in OUTPUTS if "data" in o)
    assert getsource(dr.small_resnet) in shown, "small_resnet has changed since: run the notebook again"


def test_sentences_about_the_saved_output_give_its_figures():
    printed = ""
    checked = 0
    for cell in NOTEBOOK.cells:
        if cell.cell_type == "code":
            printed += texts([cell])
            continue
        for paragraph in cell.source.split("\n\n"):
            if "n the saved output" in paragraph:
                for figure in re.findall(r"\d+\.\d+", paragraph):
                    checked += 1
                    assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", printed), (figure, paragraph)
    assert checked > 50


def test_the_notebook_is_short():
    assert len(NOTEBOOK.cells) <= 95
    assert sum(len(text.split()) for text in TEXT) <= 3200
    lines = [line for cell in CODE if "plot" not in cell.metadata.get("tags", []) for line in cell.source.splitlines()]
    assert sum(bool(line.strip()) for line in lines) <= 450
    assert all(cell.source.count("\n") < 26 for cell in CODE if "hide-input" not in cell.metadata.get("tags", []))


def test_the_file_is_small_and_names_no_machine():
    path = HERE / "tutorial.ipynb"
    assert path.stat().st_size < 2_500_000
    assert not re.search(r"/(home|work|tmp|Users|root|opt)/", path.read_text("utf-8"))


def test_every_picture_has_an_alternative_text_and_150_dpi():
    pictures = [o for o in OUTPUTS if "image/png" in o.get("data", {})]
    assert pictures
    for o in pictures:
        assert o.metadata["image/png"]["alt"]
        png = base64.b64decode(o.data["image/png"])
        width = int.from_bytes(png[16:20], "big")
        assert width == pytest.approx(2 * o.metadata["image/png"]["width"], abs=1)  # shown at half its size


# For each exercise: answers that are right, and wrong ones
MINE = """mine = [
    ({}, {{'audio': 0.2, 'visual': 0.1}}, {{'audio': 0.5, 'visual': 0.3}}),
    ({}, {{'audio': 0.4, 'visual': 0.1}}, {{'audio': {}, 'visual': 0.3}}),
]"""
BY_DEPTH = """
@torch.no_grad()
def soft_reinit_by_depth(module, init_state, strength):
    named = list({})
    for k, (name, p) in enumerate(named):
        p.lerp_({}, strength * k / (len(named) - 1))
"""
EXERCISES = {
    1: (["purity_1 = 0.7"], ["purity_1 = 0.8", "purity_1 = 7"]),
    2: (
        ["pure = lambda n: dr.purity(x_train['visual'], y_train, n, 3)\n"
         "purity_2, clusters_2 = 1, next(k for k in (2**k for k in range(10)) if pure(k) >= 1.25 * pure(C))"],
        ["purity_2, clusters_2 = 1 / 50, 64", "purity_2, clusters_2 = 1, 256", "purity_2, clusters_2 = 1, 100",
         "purity_2, clusters_2 = 1, 1", "purity_2, clusters_2 = 1, None"],
    ),
    3: (["predicted_3 = 'grows'"], ["predicted_3 = 'shrinks'", "predicted_3 = 'stays'", "predicted_3 = 'perhaps'"]),
    4: (["lam_4 = np.arctanh(0.5) / 0.1", "lam_4 = 5.5"], ["lam_4 = 5", "lam_4 = 6", "lam_4 = 0.5"]),
    5: (
        ["part_left = lambda a: np.prod([1 - x for x in a])"],
        ["part_left = lambda a: 1 - sum(a) / len(a)", "part_left = lambda a: np.prod(a)",
         "part_left = lambda a: 1 - a[0]", "part_left = lambda a: None"],
    ),
    6: (["predicted_6 = 'chance'"], ["predicted_6 = 'half'", "predicted_6 = 'before'", "predicted_6 = 17"]),
    7: (
        [MINE.format(5, 10, 0.8)],
        ["mine = None", "mine = []", MINE.format(5, 10, 0.8) + "[:1]", MINE.format(5, 10, 0.7), MINE.format(4, 9, 0.8),
         MINE.format(5, 10, 0.8) + " * 2"],
    ),
    8: (
        ["due = lambda v, p: len(v) > p and max(v[-p:]) <= max(v[:-p])",
         "due = lambda v, p: np.bool_(len(v) > p and max(v[-p:]) <= max(v[:-p]))"],
        ["due = lambda v, p: len(v) > p and max(v[-p:]) < max(v[:-p])", "due = lambda v, p: v[-1] <= v[-2]",
         "due = lambda v, p: len(v) > 2 and max(v[-2:]) <= max(v[:-2])",
         "due = lambda v, p: len(v) > p and v[-1] <= v[-1 - p]", "due = lambda v, p: None",
         "due = lambda v, p: len(v) > p and v[-1] <= max(v[:-p])", "due = lambda v, p: max(v[-p:]) <= max(v)"],
    ),
    9: (
        [BY_DEPTH.format("module.named_parameters()", "init_state[name]")],
        [BY_DEPTH.format("zip(init_state.values(), module.parameters())", "name"),  # wrong with batch-norm
         BY_DEPTH.format("module.state_dict().items()", "init_state[name]"), "soft_reinit_by_depth = dr.soft_reinit",
         "soft_reinit_by_depth = lambda module, init_state, strength: None"],
    ),
}  # fmt: skip


class Untrained(torch.nn.Module):
    """Stands in for the notebook's model: its accuracy is a stub's."""


@pytest.mark.parametrize("number", EXERCISES)
def test_an_exercises_check_tells_right_from_wrong(number, capsys, monkeypatch):
    rng, y = np.random.default_rng(0), np.arange(300) % 6
    x = {m: (rng.normal(size=(300, 8)) + np.eye(8)[y]).astype(np.float32) for m in ("audio", "visual")}
    scope = {"np": np, "torch": torch, "dr": dr, "copy": copy, "x_train": x, "y_train": y, "C": 6, "TOLERANCE": 1e-6}
    scope |= {"model": Untrained(), "plain": {"both": {5: {"weights": {}}}}, "BOTH": "both", "H": 5}
    scope |= {"initial": {}, "gaps": {}, "dataset": SimpleNamespace(val=None)}
    scope["expected"] = {
        5: {"audio": {"gap": 0.2, "strength": 0.5}, "visual": {"gap": 0.1, "strength": 0.3}},
        10: {"audio": {"gap": 0.4, "strength": 0.8}, "visual": {"gap": 0.1, "strength": 0.3}},
    }
    monkeypatch.setattr(dr, "relearn", lambda *args: {})
    for cell in CODE:
        if re.search(r"def check(_\d)?\(", cell.source):
            definitions = cell.source.split("lam_4 = None")[0]
            exec(definitions, scope)
    asked = next(cell.source for cell in CODE if re.search(rf"^check\({number},", cell.source, re.M))
    asks = re.search(rf"^check\({number}, .*$", asked, re.M)[0]
    right, wrong = EXERCISES[number]
    for answer in [*right, *wrong]:
        accuracies = iter([50.0, 18.0])
        scope["accuracy"] = lambda model, split: next(accuracies)
        exec(answer, scope)
        exec(asks, scope)
        told = capsys.readouterr().out.splitlines()[-1]
        assert told.startswith(f"Exercise {number}: " + ("right" if answer in right else "not yet")), (answer, told)


def test_there_is_an_answer_for_every_exercise():
    answers = next(text for text in TEXT if "<b>Answers</b>" in text)
    numbers = [str(number) for number in EXERCISES]
    assert re.findall(r"^(\d+)\. ", answers, re.M) == numbers
    assert re.findall(r"^\*\*Exercise (\d+)\*\*", "\n".join(TEXT), re.M) == numbers


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
def test_a_gpus_first_step_in_fp32_is_a_cpus_in_fp64():
    shapes = {"audio": (1, 128, 300), "visual": (2, 3, 112, 112)}
    torch.manual_seed(0)
    model = dr.MultimodalModel(shapes, 6, "resnet18")
    inputs, labels = draw_batch(shapes, classes=6)
    found = {}
    for device, dtype in ("cuda", torch.float32), ("cpu", torch.float64):
        twin = copy.deepcopy(model).to(device, dtype)
        x = {m: values.to(device, dtype) for m, values in inputs.items()}
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # as dr.set_up has it
            loss, _ = dr.joint(twin, x, labels.to(device), 0.0)
        gradient = torch.cat([p.grad.flatten() for p in twin.parameters()])
        found[device] = loss.item(), gradient.double().cpu()
    assert found["cuda"][0] == pytest.approx(found["cpu"][0], abs=1e-5)
    distance = (found["cuda"][1] - found["cpu"][1]).norm() / found["cpu"][1].norm()
    assert distance < 1e-2  # 2.9e-3 on an H200


@on(*needs_gpu)
def test_on_a_gpu_a_killed_run_resumes(prepared, tmp_path):
    code = "import dr; dr.CHECKPOINT_SECONDS = 0; dr.main()"
    words = ["-c", code, "--data", prepared, "--out", tmp_path, "--name", "run", "--epochs", 30, "--every", 8]
    with subprocess.Popen([sys.executable, *map(str, words)], cwd=HERE, stdout=subprocess.DEVNULL) as process:
        log = tmp_path / "run/log.jsonl"
        while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 2):
            time.sleep(0.01)  # two epochs are in last.pt, which is written before the next one
        process.kill()
    done = command(*words)
    assert done.returncode == 0 and "resumes with epoch" in done.stdout, done.stderr
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
    assert isinstance(dr.make_model(dr.Config(), dataset, "cuda"), dr.InBf16) == native
    assert isinstance(dr.make_model(dr.Config(precision="bf16"), dataset, "cuda"), dr.InBf16)


# --- bench: python -m pytest -m bench -s ----------------------------------------------------------

CREMAD = {"audio": data.fbank_spec(128, 3.0), "visual": data.frames_spec(2, 224)}
RIVALS_TIMED = ("multitask", "ogm", "ogm-ge", "opm", "mmpareto", "dgl", "mlb")
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
            if k >= 128:  # every file is read and decoded anew, but it need not be another one
                for name in ("{}.wav", "{}-0.jpg", "{}-1.jpg"):
                    os.link(folder / name.format(k % 128), folder / name.format(k))
                continue
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
def test_bench(tmp_path, monkeypatch):
    """CREMA-D's shapes: all of its clips on CUDA, elsewhere a few batches of 16, on all cores."""
    cuda = torch.cuda.is_available()
    monkeypatch.setattr(dr, "ALL_THREADS", os.cpu_count())  # which ResNet-18 trains on
    torch.set_num_threads(os.cpu_count())
    c = dr.Config(dataset="cremad", batch_size=64 if cuda else 16, device="auto" if cuda else "cpu",
                  data=str(tmp_path), out=str(tmp_path))  # fmt: skip
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
    if not cuda:  # where it is not the default
        in_bf16 = dr.make_model(dr.replace(c, precision="bf16"), dataset)
        bf16_optimiser = torch.optim.SGD(in_bf16.parameters(), c.lr, c.momentum)
        steps["bf16"] = partial(dr.step, in_bf16, bf16_optimiser, inputs, labels)
    for name in RIVALS_TIMED:
        steps[name] = partial(dr.step, model, optimiser, inputs, labels, dr.METHODS[name], 0.25)
    found = measure(device, steps, 20 if cuda else 2)
    show("step, a batch in memory", found["joint"])
    show("step, batches from the arrays", found["arrays"], f"{found['arrays'] / found['joint']:.2f} of it")
    show("step, plain loop in fp32", found["plain"], f"ours takes {found['joint'] / found['plain']:.2f} of it")
    if not cuda:
        show("step, --precision bf16", found["bf16"], f"{found['bf16'] / found['plain']:.2f} of the plain loop's")
    for name in RIVALS_TIMED:
        show(f"step, {name}", found[name], f"{found[name] / found['joint']:.2f} of joint's")

    (tmp_path / "raw").mkdir()
    clips = UsualClips(tmp_path / "raw", counts[0])
    loader = torch.utils.data.DataLoader(clips, c.batch_size, True, num_workers=os.cpu_count(), pin_memory=cuda)
    run = SimpleNamespace(config=c, dataset=dataset, model=model, optimiser=optimiser)
    epochs = {"ours": partial(dr.train_epoch, run, 0)}
    epochs["plain"] = partial(plain_epoch, plain, plain_optimiser, loader, device)
    if not cuda:
        bf16_run = SimpleNamespace(config=c, dataset=dataset, model=in_bf16, optimiser=bf16_optimiser)
        epochs["bf16"] = partial(dr.train_epoch, bf16_run, 0)
    found = measure(device, epochs, 2 if cuda else 1)
    show(f"epoch, {counts[0]:,} clips", found["ours"], f"{counts[0] / found['ours']:,.0f} clips per second")
    show("epoch, plain loop, wav and JPEG", found["plain"], f"ours takes {found['ours'] / found['plain']:.2f} of it")
    if not cuda:
        show("epoch, --precision bf16", found["bf16"], f"{found['bf16'] / found['plain']:.2f} of the plain loop's")

    for name in ("train", "val"):
        split = getattr(dataset, name)
        found = measure(device, {"": partial(dr.extract_features, model, split)}, 1)
        show(f"diagnosis, features of {len(split):,} clips", found[""])
    for name, (n_classes, *sizes) in KMEANS.items():
        train = draw_features(sizes[0], n_classes)
        val = draw_features(sizes[1], n_classes)
        start = clock(device)
        with threadpool_limits(1):
            dr.purity_gap(*train, *val, n_classes)
        show(f"diagnosis, k-means, {name}", clock(device) - start, "per modality, one after the other")
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
