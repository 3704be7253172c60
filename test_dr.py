"""Tests: python -m pytest. Each holds the code against something independent of it."""

import json
import os
import pickle
import re
import subprocess
import sys
from inspect import getsource
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics.cluster import contingency_matrix
from sklearn.preprocessing import MinMaxScaler

import data
import dr

HERE = Path(__file__).parent
REAL = Path(os.environ["DR_REAL"]) if "DR_REAL" in os.environ else None
needs_real = pytest.mark.skipif(REAL is None, reason="DR_REAL names no folder of real material")


def blobs(sizes, seed=0):
    """Well separated clusters, given as {class: size} each -> features (N, 2), labels (N,)."""
    rng = np.random.default_rng(seed)
    parts = [(100 * k + rng.normal(size=(n, 2)), np.full(n, c)) for k, blob in enumerate(sizes) for c, n in blob.items()]
    return tuple(np.concatenate(part) for part in zip(*parts))


# --- purity ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_purity_is_scikit_learns_contingency_matrix(seed):
    rng = np.random.default_rng(seed)
    n, d, c = rng.integers(30, 200), rng.integers(1, 20), rng.integers(2, 8)
    labels = rng.integers(c, size=n)
    features = (rng.normal(size=(n, d)) + labels[:, None] * rng.random()).astype(np.float32)
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
    "features, labels, says",
    [
        (np.ones((3, 2)), np.arange(3), "as many samples"),
        (np.full((9, 2), np.nan), np.arange(9), "not finite"),
        (np.ones((9, 2)), np.arange(8), r"\(9, 2\) and \(8,\)"),
        (np.ones((9, 2, 2)), np.arange(9), "features"),
    ],
)
def test_purity_says_what_is_wrong(features, labels, says):
    with pytest.raises(ValueError, match=says):
        dr.purity(features, labels, 4)


def test_gap_is_the_distance_of_the_two_purities():
    train, val = blobs([{0: 5}, {1: 5}]), blobs([{0: 3, 1: 2}, {1: 4, 0: 1}])
    assert dr.purity_gap(*train, *val, 2) == pytest.approx((1.0, 0.7, 0.3))
    assert dr.purity_gap(*val, *train, 2) == pytest.approx((0.7, 1.0, 0.3))


# --- re-learning ----------------------------------------------------------------------------------

SHAPES = {"audio": (1, 16, 12), "visual": (2, 3, 16, 16), "text": (5, 7)}


def test_interpolation_against_numpy():
    torch.manual_seed(0)
    model = dr.MultimodalModel(SHAPES, 4)
    init = {k: v.clone() for k, v in model.encoders["audio"].state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn_like(p)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    a = dr.relearning_strength(0.3, 3)
    assert a == pytest.approx(np.tanh(0.9))
    dr.soft_reinit(model.encoders["audio"], init, a)
    treated = {f"encoders.audio.{name}" for name, _ in model.encoders["audio"].named_parameters()}
    for name, now in model.state_dict().items():
        if name in treated:
            theta, theta_init = before[name].double().numpy(), init[name.removeprefix("encoders.audio.")].double().numpy()
            np.testing.assert_allclose(now.numpy(), (1 - a) * theta + a * theta_init, rtol=1e-5, atol=1e-6)
            assert not torch.equal(now, before[name])
        else:  # other modalities, the head, running statistics
            assert torch.equal(now, before[name]), name


@pytest.mark.parametrize("strength", [0, 1])
def test_strengths_0_and_1_are_exact(strength):
    encoder = dr.small_resnet((3, 16, 16))
    init = {k: v.clone() for k, v in encoder.state_dict().items()}
    with torch.no_grad():
        for p in encoder.parameters():
            p += torch.randn_like(p)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    dr.soft_reinit(encoder, init, strength)
    for name, p in encoder.named_parameters():
        assert torch.equal(p, (before, init)[strength][name])


def test_strength_out_of_range_is_refused():
    with pytest.raises(ValueError, match="1.5"):
        dr.soft_reinit(torch.nn.Linear(1, 1), {}, 1.5)


def test_the_four_functions_run_when_pasted_under_the_import_lines():
    lines = (HERE / "dr.py").read_text().splitlines()
    imports = [line for line in lines if re.match(r"(import|from) ", line) and line != "import data"]
    four = [getsource(f) for f in (dr.purity, dr.purity_gap, dr.relearning_strength, dr.soft_reinit)]
    scope = {}
    exec("\n".join(imports + four), scope)
    train, val, gap = scope["purity_gap"](*blobs([{0: 5}, {1: 5}]), *blobs([{0: 3, 1: 2}, {1: 4, 0: 1}]), 2)
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
    head, told = torch.nn.Linear(16, 4), []
    optimiser = torch.optim.SGD([*encoders.parameters(), *head.parameters()], 0.1)

    def train_one_epoch():
        for inputs, labels in loader:
            loss = torch.nn.functional.cross_entropy(head(torch.cat([encoders[m](inputs[m]) for m in x], 1)), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    exec(code, {"encoders": encoders, "train_loader": loader, "val_loader": loader[:2], "epochs": 21, "n_classes": 4,
                "train_one_epoch": train_one_epoch, "print": lambda *words: told.append(words)})  # fmt: skip
    assert [words[1] for words in told] == ["audio", "visual"]  # diagnosed once, after epoch 20


# --- encoders and the model -----------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["resnet18", "small"])
def test_encoders_give_one_feature_vector_a_sample(encoder):
    model = dr.MultimodalModel({"audio": (1, 64, 40), "visual": (2, 3, 64, 64), "flow": (3, 2, 64, 64)}, 5, encoder).eval()
    inputs = {m: torch.randn(3, *shape) for m, shape in (("audio", (1, 64, 40)), ("visual", (2, 3, 64, 64)), ("flow", (3, 2, 64, 64)))}
    features = model.features(inputs)
    assert {f.shape for f in features.values()} == {(3, 512 if encoder == "resnet18" else 128)}
    assert model(inputs).shape == (3, 5)
    stack = inputs["visual"]  # a stack of frames is the mean of its frames
    one_by_one = torch.stack([model.encoders["visual"](stack[:, [t]]) for t in range(2)]).mean(0)
    torch.testing.assert_close(features["visual"], one_by_one, rtol=1e-4, atol=1e-5)


def test_resnet18_starts_as_the_official_code_does():
    torch.manual_seed(0)
    model = dr.MultimodalModel({"audio": (1, 128, 300)}, 6)
    conv = model.encoders["audio"].network.layer4[0].conv1.weight  # fan_out 512 * 9
    assert conv.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)
    assert model.encoders["audio"].network.conv1.weight.shape == (64, 1, 7, 7)
    scale = model.encoders["audio"].network.layer4[0].bn1
    assert scale.weight.mean().item() == pytest.approx(1, abs=0.01) and scale.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert scale.bias.eq(0).all()


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


# --- whole runs on a small demo -------------------------------------------------------------------


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    data.prepare("demo", out=folder, clips=161)  # 85 / 20 / 56 or so
    return folder


def config(prepared, out, **more):
    more = {"epochs": 6, "every": 2, "times": 1, "batch_size": 16, **more}
    return dr.Config(dataset="demo", data=str(prepared), out=str(out), device="cpu", **more)


@pytest.fixture(scope="session")
def run(prepared, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    return out / "demo-dr-0", dr.train(config(prepared, out))


def test_a_run_diagnoses_and_relearns_on_schedule(run):
    _, history = run
    assert [e["epoch"] for e in history] == list(range(6))
    assert [e["epoch"] for e in history if "diagnosis" in e] == [2, 4]
    assert [e["relearnt"] for e in history if "diagnosis" in e] == [True, False]  # at most once
    for m, d in history[2]["diagnosis"].items():
        assert m in ("audio", "visual") and 1 / 6 <= d["val"] <= 1
        assert d["gap"] == abs(d["train"] - d["val"]) and d["strength"] == pytest.approx(np.tanh(3 * d["gap"]))


def without_seconds(history):
    return [{k: v for k, v in e.items() if k != "seconds"} for e in history]


def test_a_run_repeats_bit_for_bit(run, prepared, tmp_path):
    folder, history = run
    again = dr.train(config(prepared, tmp_path))
    assert without_seconds(again) == without_seconds(history)
    first, second = (torch.load(f / "best.pt", weights_only=True)["model"] for f in (folder, tmp_path / "demo-dr-0"))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert without_seconds(dr.train(config(prepared, tmp_path, seed=1))) != without_seconds(history)


def test_lambda_0_is_joint_training(prepared, tmp_path):
    joint = dr.train(config(prepared, tmp_path, method="joint", epochs=4))
    never = dr.train(config(prepared, tmp_path, lam=0.0, epochs=4))
    assert [(e["loss"], e["test"]) for e in joint] == [(e["loss"], e["test"]) for e in never]
    assert not any(e.get("relearnt") for e in joint)


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
    assert checkpoint["epoch"] == summary["best_val_epoch"] == best["epoch"]
    assert dr.evaluate(model, dataset.test)["accuracy"] == summary["accuracy"] == best["test"]
    assert set(summary["probe"]) == {"audio", "visual"}
    from PIL import Image

    assert np.asarray(Image.open(folder / "curves.png").convert("L")).std() > 5


def test_one_modality_is_the_same_code(prepared, tmp_path):
    history = dr.train(config(prepared, tmp_path, modalities="visual", epochs=3))
    assert set(history[2]["diagnosis"]) == {"visual"}


def test_diagnosing_leaves_the_model_as_it_was(prepared):
    dataset = data.load("demo", prepared)
    model = dr.MultimodalModel(dataset.shapes, 6)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = dr.diagnose(model, dataset.train, dataset.val, 6)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for m, (train, val, gap) in found.items():
        x = model.eval().encoders[m](data.cut(dataset.val, m, dataset.val.rows)).detach()
        assert dr.purity(x, dataset.val.labels, 6) == pytest.approx(val, abs=0.06)  # batched otherwise: ties may break


def test_bad_settings_are_refused(prepared, tmp_path):
    for bad in (dict(method="joined"), dict(every=0), dict(lam=-1.0), dict(times=-1), dict(dataset="cremadd")):
        with pytest.raises(ValueError):
            dr.Config(**{"dataset": "demo", **bad})
    with pytest.raises(data.DataError, match="no modality smell; it has audio, visual"):
        dr.train(config(prepared, tmp_path, modalities="smell"))


def command(*words, **more):
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=HERE, **more)


def test_a_dataset_that_is_not_there(tmp_path):
    done = command("dr.py", "--dataset", "cremad", "--data", tmp_path)
    assert done.returncode == 2
    assert "git clone" in done.stderr and "python data.py cremad --raw CREMA-D" in done.stderr
    assert "--dataset demo" in done.stderr and "Traceback" not in done.stderr


def test_help_is_a_page(tmp_path):
    text = command("dr.py", "--help").stdout
    assert "lambda in a = tanh" in text and max(map(len, text.splitlines())) <= 80


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
            part |= {"id": np.array([["v", "0", str(k)] for k in range(size)], dtype=object), "labels": score[:, None, None]}
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


@pytest.mark.parametrize(
    "content, says",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "git lfs pull"),
        (b"", "no whole pickle"),
        (pickle.dumps({"train": np.ones(9)})[:-9], "no whole pickle"),
        (pickle.dumps({"train": {}}), "not laid out"),
        (pickle.dumps([1, 2]), "not laid out"),
    ],
)
def test_what_is_no_mosi_gets_one_clear_line(content, says, tmp_path):
    (tmp_path / "bad.pkl").write_bytes(content)
    done = command("data.py", "mosi", "--raw", tmp_path / "bad.pkl", "--out", tmp_path)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


@needs_real
def test_real_mosi_end_to_end(tmp_path):
    assert command("data.py", "mosi", "--raw", REAL / "mosi" / "mosi.pkl", "--out", tmp_path).returncode == 0
    history = dr.train(dr.Config("mosi", data=str(tmp_path), out=str(tmp_path), epochs=3, every=1, device="cpu"))
    assert set(history[1]["diagnosis"]) == {"text", "audio", "vision"}
    assert history[-1]["test"] > 65  # a majority vote gives 63


# --- batches --------------------------------------------------------------------------------------


def test_batches_hold_every_clip_once_and_repeat_with_the_seed(prepared):
    split = data.load("demo", prepared).train
    whole = {m: data.cut(split, m, split.rows) for m in split.arrays}

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


def test_inputs_are_normalised_as_the_official_code_does(prepared):
    split = data.load("demo", prepared).val
    inputs, _ = next(data.batches(split, 4))
    frames = split.arrays["visual"][split.rows[:4]].astype(np.float64) / 255  # (4, 1, 48, 48, 3)
    expected = ((frames - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).transpose(0, 1, 4, 2, 3)
    np.testing.assert_allclose(inputs["visual"], expected, atol=1e-5)
    sound = split.arrays["audio"][split.rows[:4]].astype(np.float64)
    np.testing.assert_allclose(inputs["audio"], (sound + 4.503877) / (2 * 5.141276), atol=1e-5)
    flat = inputs["visual"].flatten(0, 1)
    assert flat.is_contiguous(memory_format=torch.channels_last)


def test_the_demo_is_the_same_for_one_seed_and_stratified(prepared, tmp_path):
    data.make_demo(tmp_path, 13)
    for clip in tmp_path.rglob("*.*"):
        assert clip.read_bytes() == (prepared / "demo" / "raw" / clip.relative_to(tmp_path)).read_bytes()
    dataset = data.load("demo", prepared)
    assert [len(s) for s in (dataset.train, dataset.val, dataset.test)] == [84, 21, 56]
    assert max(np.bincount(dataset.train.labels)) - min(np.bincount(dataset.train.labels)) <= 2
