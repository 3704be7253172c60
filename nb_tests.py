"""The notebook's tests: it runs, its saved output is of this code, its exercises tell right from wrong."""

import base64
import re
from inspect import getsource
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
import torch

import data
import dr

HERE = Path(__file__).parent
NOTEBOOK = nbformat.read(HERE / "tutorial.ipynb", 4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
OUTPUTS = [output for cell in CODE for output in cell.outputs]
EXERCISE_COUNT = 9


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    data.prepare("demo", out=folder, clips=161)
    return folder


@pytest.fixture(scope="session")
def executed(prepared, tmp_path_factory):
    """The same cells on a small demo, for fewer epochs, in a folder of their own."""
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "prepared").symlink_to(prepared)
    short = nbformat.from_dict(NOTEBOOK)
    shorter = {"settings |= dict()": "settings |= dict(epochs=5, every=2)", "dict(epochs=12)": "dict(epochs=3)"}
    for long, brief in shorter.items():
        assert sum(long in cell.source for cell in short.cells) == 1
        for cell in short.cells:
            cell.source = cell.source.replace(long, brief)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE))
        client = nbclient.NotebookClient(short, timeout=300, resources={"metadata": {"path": str(folder)}})
        with client.setup_kernel():
            for index, cell in enumerate(short.cells):
                client.execute_cell(cell, index)
            loop = next(k for k, cell in enumerate(short.cells) if "def one_epoch" in cell.source)
            again = nbformat.from_dict(short.cells[loop])  # every cell can be run twice; this one trains
            client.execute_cell(again, loop)
    return short, again


def texts(cells):
    outputs = [o for cell in cells if cell.cell_type == "code" for o in cell.outputs]
    return "".join(o.get("text", "") for o in outputs)


def test_the_notebook_runs_from_top_to_bottom(executed):
    short, _ = executed
    outputs = [o for cell in short.cells if cell.cell_type == "code" for o in cell.outputs]
    assert not any(o.output_type == "error" for o in outputs)
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 11
    assert texts(short.cells).count("not yet") == EXERCISE_COUNT  # nobody has solved the exercises


def test_the_loop_that_the_reader_writes_is_that_of_train(executed):
    assert "the same to the printed digit" in texts(executed[0].cells)


def test_the_sound_by_hand_and_the_stored_arrays_are_those_of_data(executed):
    told = texts(executed[0].cells)
    assert told.count("the same as we have just made: True") == 2
    assert float(re.search(r"largest difference to fbank: ([\d.]+)", told)[1]) < 0.01


def test_a_cell_that_trains_can_be_run_twice(executed):
    short, again = executed
    first = next(cell for cell in short.cells if "def one_epoch" in cell.source)
    assert texts([first]) == texts([again])


def test_the_saved_output_is_of_one_run_of_this_code():
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    assert all(cell.source.count("\n") < 26 for cell in CODE)
    assert not any(o.output_type == "error" or o.get("name") == "stderr" for o in OUTPUTS)
    shown = "".join(o["data"].get("text/markdown", "") for o in OUTPUTS if "data" in o)
    parts = [dr.purity, dr.purity_gap, dr.relearning_strength, dr.soft_reinit, dr.relearn, dr.diagnose]
    parts += [dr.joint, dr.step, dr.Concatenation, dr.PictureEncoder, dr.small_resnet]
    for part in [*parts, data.fbank, data.middles, data.read_frames, data.add_noise]:
        assert getsource(part) in shown, f"{part.__name__} has changed since: run the notebook again"


def test_the_file_is_small_and_names_no_machine():
    path = HERE / "tutorial.ipynb"
    assert path.stat().st_size < 3_000_000
    assert not re.search(r"/(home|work|tmp|Users)/", path.read_text("utf-8"))


def test_every_picture_has_an_alternative_text_and_150_dpi():
    pictures = [o for o in OUTPUTS if "image/png" in o.get("data", {})]
    assert pictures
    for o in pictures:
        assert o.metadata["image/png"]["alt"]
        png = base64.b64decode(o.data["image/png"])
        width = int.from_bytes(png[16:20], "big")
        assert width == pytest.approx(2 * o.metadata["image/png"]["width"], abs=1)  # shown at half its size


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
        "due = lambda v, p: None",
    ],
    7: ["predicted_7 = 'grows'", "predicted_7 = 'shrinks'", "predicted_7 = 'stays'", "predicted_7 = 'perhaps'"],
    8: ["predicted_8 = 17", "predicted_8 = 60", "predicted_8 = 170"],
    9: [
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
ALSO_RIGHT = {
    6: "due = lambda v, p: np.bool_(len(v) > p and max(v[-p:]) <= max(v[:-p]))",  # any truthy answer
}


class Untrained(torch.nn.Module):
    """Stands in for the notebook's model: its accuracy is evaluated by a stub."""


@pytest.mark.parametrize("number", EXERCISES)
def test_an_exercises_check_tells_right_from_wrong(number, capsys, monkeypatch):
    rng, y = np.random.default_rng(0), np.arange(300) % 6
    x = {m: (rng.normal(size=(300, 8)) + 2 * np.eye(8)[y]).astype(np.float32) for m in ("audio", "visual")}
    scope = {"np": np, "torch": torch, "dr": dr, "x_train": x, "y_train": y}
    scope |= {"model": Untrained(), "first_stage": ({}, {}), "initial": {}, "gaps": {}}
    scope["dataset"] = type("Stub", (), {"val": None})
    monkeypatch.setattr(dr, "evaluate", lambda model, split: {"accuracy": 100 / 6})
    monkeypatch.setattr(dr, "relearn", lambda *args: {})
    exec(next(cell.source for cell in CODE if "def check(" in cell.source), scope)
    starts = next(cell.source for cell in CODE if f"# exercise {number}" in cell.source)
    asks = next(cell.source for cell in CODE if re.search(rf"^check\(\s*{number},", cell.source, re.M))
    right = [EXERCISES[number][0], ALSO_RIGHT.get(number, EXERCISES[number][0])]
    for answer in [*right, *EXERCISES[number][1:], starts]:
        exec(answer, scope)
        exec(asks, scope)
        told = capsys.readouterr().out.splitlines()[-1]
        assert told.startswith(f"Exercise {number}: " + ("right" if answer in right else "not yet")), (answer, told)


def test_there_is_an_answer_for_every_exercise():
    answers = next(cell.source for cell in NOTEBOOK.cells if "<details>" in cell.source)
    assert re.findall(r"^(\d+)\. ", answers, re.M) == [str(k) for k in range(1, EXERCISE_COUNT + 1)] == [*map(str, EXERCISES)]
