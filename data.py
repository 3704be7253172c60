"""Prepare and load the datasets: from a raw download to memory-mapped arrays, and from those to batches.

    python data.py cremad   --raw CREMA-D         VideoFlash/ and AudioWAV/
    python data.py kinetics --raw kinetics400     Kinetics-Sounds' 31 classes
    python data.py ucf101   --raw UCF101          RGB and optical flow
    python data.py mosi     --raw aligned_50.pkl  CMU-MOSI, a pickle of features
    python data.py my_clips.csv                   your own: a table, see its --help
    python data.py demo                           drawn on the spot, no download
    python data.py cremad   --show                a page of what was prepared
    python data.py cremad   --help                all that can be set

What it leaves behind, and what training reads, is a folder of NumPy arrays:

    prepared/cremad/manifest.json      classes, ids, parameters, what was skipped
    prepared/cremad/train/visual.npy   (N, T, H, W, 3) uint8
    prepared/cremad/train/audio.npy    (N, 1, F, T) float16
    prepared/cremad/train/labels.npy   (N,) int64, -1 if the clip was skipped

A modality (audio, visual, flow, text: any name) is of a kind: frames, flow, fbank or sequence. The manifest holds a
spec of each: its kind, the shape of one clip, and how to normalise it."""

import argparse
import csv
import errno
import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import socket
import sys
import textwrap
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby, islice, pairwise
from multiprocessing import current_process, parent_process
from pathlib import Path

import av
import numpy as np
import pandas as pd
import scipy.io.wavfile
import scipy.signal
import torch
import torch.nn.functional as F
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from filelock import FileLock, Timeout
from joblib import cpu_count  # what taskset, SLURM and containers lend of the machine's cores
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

# torchaudio's import insists on the CUDA version it was built with; its Kaldi features, plain tensor code, need none.
cuda_version = torch.version.cuda
torch.version.cuda = None
from torchaudio.compliance import kaldi  # noqa: E402

torch.version.cuda = cuda_version


class DataError(Exception):
    """Something about the data that the user has to mend; the message says what and how."""


class BadClip(Exception):
    """One clip that cannot be used: it is skipped, counted, and listed in the manifest."""


@contextmanager
def explained(message, *let_through):
    """Any error inside becomes a DataError: message (error). DataError, PermissionError and `let_through` stay."""
    try:
        yield
    except (DataError, PermissionError, *let_through):
        raise
    except Exception as error:  # what is not what it should be can be wrong in any way
        if is_out_of_memory(error):
            raise
        says = textwrap.shorten(f"{type(error).__name__}: {error}", 120)
        raise DataError(f"{message} ({says})") from error


def is_out_of_memory(error):
    """Whether NumPy, the system or PyTorch's allocators (CUDA, MPS, CPU) say that there is no memory left."""
    says = str(error) if isinstance(error, RuntimeError) else ""
    known = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    return known or "out of memory" in says or "allocate memory" in says


# --- 1  Prepare: raw folder -> clips -> files -> rows of arrays -> manifest ---

SPLITS = ("train", "val", "test")
MAX_BAD = {"kinetics": 50.0}  # per cent of clips that may be unusable: many of Kinetics' are gone; others 5
FIXED = {  # options that are not to be chosen
    "demo": {"frames": 1, "keep": 1, "size": 32, "seconds": 1.2, "bins": 32, "shift": 50.0},
    "cremad": {"more": {"longest": 10}},  # seconds of a film that are read: one runs on for a minute after its sentence
}
OPTIONS = {  # what they mean, and the range of the numbers
    "frames": ("frames per clip, at the middles of equal segments", 1, 1000),
    "keep": ("frames kept of each segment, for --augment to draw from; odd, so that one is the middle", 1, 99),
    "size": ("pixels of a side", 1, 4096),
    "seconds": ("length of the sound; 10.24 gives the official code's 1,024 frames", 0.025, 3600),
    "bins": ("mel bands of a spectrogram, its rows", 8, 128),
    "shift": ("milliseconds from one of its columns to the next", 1, 1000),
    "split": ("clips: at random over clips; actors: whole actors held out",),
    "split_dir": ("folder of the split lists that circulate",),
    "fold": ("which of the three official splits", 1, 3),
    "clips": ("how many clips are drawn", 1, 3456),
    "seed": ("of the drawing", 0, 2**32),
    "workers": ("processes", 1, 1000),
    "max_bad": ("per cent of clips that may be unusable", 0, 100),
}


@dataclass
class Clip:
    """One sample before it is prepared."""

    id: str
    label: int
    split: str  # train, val or test
    files: dict  # {modality: path, or, of precomputed optical flow, the folders (u, v)}
    group: str = ""  # clips of a group come into the same split: those of one actor, or cut from one video


def prepare(name, raw=None, out="prepared", workers=None, max_bad=None, **options):
    """Turn a raw download, or the files of a CSV, into `out`/`name` -> that folder; `options` are the dataset's.
    Every clip has its row in arrays that are made at full size first; worker processes write the rows in place. Stopped
    at any moment, the same call resumes, with the same result. Raises DataError for all that the user can mend, also
    for more than `max_bad` per cent of clips that cannot be used."""
    if hasattr(current_process(), "_inheriting"):  # a worker that runs a script without a main guard once more
        sys.exit(1)
    folder = Path(out) / name
    raw = Path(raw or folder / "raw")
    own = raw.suffix.lower() == ".csv"
    if own == (name in DATASETS) or not re.fullmatch(r"\w[\w.-]*", name):
        raise DataError(f"{raw} cannot be called {name!r}: a dataset is {', '.join(DATASETS)}, or a .csv of another "
                        "name, of letters, digits, _, - and . alone: choose one with --name")  # fmt: skip
    lister = DATASETS.get(name, own_data)
    if lister is mosi:
        return mosi(raw, folder)
    options = {**lister.__kwdefaults__, **options}
    max_bad = MAX_BAD.get(name, 5.0) if max_bad is None else max_bad
    for option, value in {**options, "workers": workers or 1, "max_bad": max_bad}.items():
        meaning, *limits = OPTIONS[option]
        if limits and not limits[0] <= value <= limits[1] or option == "keep" and value % 2 == 0:
            flag = option.replace("_", "-")
            raise DataError(f"--{flag} ({meaning}) goes from {limits[0]} to {limits[1]:,}, not {value}")
    recorded = json.loads(json.dumps(options, default=str))  # as the manifest tells them
    if own:  # an edited table makes another dataset
        recorded["csv"] = fingerprint(raw)
    if is_prepared(folder, recorded):
        return folder
    with explained(f"{raw}: the lists that say which clips there are cannot be understood", OSError):
        clips, classes = lister(raw, **options)
    splits = {split: [] for split in SPLITS}
    for clip in clips:
        splits[clip.split].append(clip)
    check_files(folder, raw, splits, max_bad)
    options = {"more": {}, **FIXED.get(name, {}), **options}
    specs = {m: make_spec(m, clips, options) for m in clips[0].files}
    ids = {split: [clip.id for clip in mine] for split, mine in splits.items()}
    plan = {"dataset": name, "options": recorded, "classes": classes, "modalities": specs, "splits": ids}
    with exclusive(folder, wait=True):
        if not is_prepared(folder, recorded):  # by another process, meanwhile
            if (folder / "plan.json").exists() and read_json(folder / "plan.json") != plan:
                raise DataError(f"{folder} was begun with other clips than {raw} holds now: delete it to begin again")
            make_arrays(folder, plan)
            plan["skipped"] = fill_arrays(folder, plan, splits, workers, max_bad)
            write_json(folder / "manifest.json", plan)  # it says that the dataset is there
            (folder / "plan.json").unlink()
    return folder


def fingerprint(path):
    """A few letters that tell one version of a table, or of a manifest, from another."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def is_prepared(folder, recorded):
    """Whether nothing is left to do. What was made, or begun, with other options is not touched."""
    for path in folder / "manifest.json", folder / "plan.json":
        before = read_json(path)["options"] if path.exists() else recorded
        if before != recorded:
            changed = ", ".join(f"{k} {before.get(k)}, now {v}" for k, v in recorded.items() if before.get(k) != v)
            raise DataError(f"{folder} was made with other parameters ({changed}): delete it, or give another --out")
    return (folder / "manifest.json").exists()


def check_files(folder, raw, splits, max_bad):
    """Before any work: every split has clips, and enough of them have their files."""
    for split, clips in splits.items():
        if not clips:
            raise DataError(f"{raw}: no clip is in the {split} split: a list of the splits is missing, or there are "
                            "too few clips, or groups of them, to draw from (three at least)")  # fmt: skip
    total = sum(map(len, splits.values()))
    lost = 0
    for split, clips in splits.items():
        gone = {clip.id: file for clip in clips for file in clip.files.values() if what_is_wrong(file)}
        lost += len(gone)
        there = len(clips) - len(gone)
        if there <= 0.1 * len(clips) or lost > max_bad / 100 * total:
            raise DataError(f"{raw}: of {len(clips):,} clips in the {split} split {there} have their files there, "
                            f"git-lfs stubs not counted; {paths_of(next(iter(gone.values())))[0]} is missing, and "
                            f"--max-bad is {max_bad:g} per cent: nothing was prepared. "
                            f"{' is '.join(SOURCES.get(folder.name, ()))}")  # fmt: skip


def paths_of(file):
    """The paths of one of a clip's files: its own, or those of u and v."""
    return file if isinstance(file, tuple) else (file,)


def what_is_wrong(file):
    """Why there is no point in reading a file, or ''. A clone without git-lfs holds placeholders in place of media."""
    for path in paths_of(file):
        if not path.exists():
            return "missing"
        if path.is_file() and path.stat().st_size < 200 and path.read_bytes().startswith(b"version https://git-lfs"):
            return "a git-lfs stub, never fetched"
    return ""


def make_spec(m, clips, options):
    """The spec of a modality: how it is stored, and how `normalise` treats it."""
    first = clips[0].files[m]
    kind = KINDS.get(file_type(first)) or KINDS_OF_A_VIDEO.get(m, "frames")
    if kind == "sequence":
        return sequence_spec(m, clips)
    if kind == "fbank":
        return fbank_spec(options["bins"], options["seconds"], options["shift"])
    if file_type(first) == "picture":
        return frames_spec(1, options["size"])
    shape = options["frames"], options["size"], options["keep"]
    if kind == "flow":
        taken_from = "TV-L1, from the pictures in the raw folder"
        return flow_spec(*shape, flow=taken_from if isinstance(first, tuple) else "DIS, computed with OpenCV")
    return frames_spec(*shape, **options["more"])


def frames_spec(count, size, keep=1, **more):
    """(count * keep, size, size, 3) pixels, normalised by ImageNet's mean and deviation, here in units of 0..255."""
    return {"kind": "frames", "count": count, "keep": keep, "size": size, "shape": [count * keep, size, size, 3],
            "dtype": "uint8", "mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], **more}  # fmt: skip


def flow_spec(count, size, keep=1, **more):
    """(count * keep, size, size, 2): how far a pixel moves to the right and down, see read_flow."""
    flow = {"kind": "flow", "shape": [count * keep, size, size, 2], "mean": 128.0, "std": 32.0}
    return frames_spec(count, size, keep, **flow, **more)


def fbank_spec(bins, seconds, shift=10.0):
    """(1, bins, T), a column every `shift` ms, normalised as (x + 4.503877) / (2 * 5.141276) in the official code."""
    return {"kind": "fbank", "bins": bins, "shift": shift, "shape": [1, bins, max(1, round(seconds * 1000 / shift))],
            "dtype": "float16", "mean": -4.503877, "std": 2 * 5.141276}  # fmt: skip


def prepare_clip(folder, specs, clip, row):
    """Read one clip and write its rows -> the reason why it cannot be used, or ''."""
    arrays = {}
    for m, spec in specs.items():
        try:
            arrays[m] = read_file(clip.files[m], spec)
        except Exception as error:  # whatever one clip does, the others are prepared
            return reason(clip.files[m], error)
    for m, array in arrays.items():
        path = folder / clip.split / f"{m}.npy"
        offset = np.load(path, mmap_mode="r").offset
        with open(path, "r+b") as file:  # a full disk is an error here; through a map it would be a signal that kills
            file.seek(offset + row * array.nbytes)
            file.write(array.tobytes())
    return ""


def reason(file, error):
    """Why a file cannot be used, in a line."""
    known = str(error) if isinstance(error, BadClip) else getattr(error, "strerror", None)
    says = known or f"{type(error).__name__}: {error}"
    return f"{paths_of(file)[0].name}: {' '.join(says.split())}"


def read_file(file, spec):
    """What the spec wants of one file, as it is stored."""
    if problem := what_is_wrong(file):
        raise BadClip(problem)
    array = READERS[spec["kind"]](file, spec)
    if not np.isfinite(array).all():
        raise BadClip("not finite")
    return array


# --- 2  The datasets: listers, which say which clips there are ---
# A lister takes the raw folder; its keyword-only arguments are the dataset's options -> (clips, classes).


def walk(folder, above=()):
    """Yield the paths of all that is below a folder, but hidden things; of links in a circle, none a second time."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with suppress(OSError):
        for entry in os.scandir(folder):
            if not entry.name.startswith("."):
                yield entry.path
                if entry.is_dir():
                    yield from walk(entry.path, (*above, real))


def find_files(raw, *suffixes):
    """All files below a folder that end so, in any case; of one name, {stem: path} keeps the .flv, not the .mp4."""
    paths = [Path(path) for path in walk(raw) if path.lower().endswith(suffixes)]
    return sorted(paths, key=lambda path: (path.suffix.lower(), path), reverse=True)


def split_of(name):
    """The split that a file or folder is named after, as my_train, validate, val_256 are; None if none or several."""
    found = set(re.findall("(?<![a-z])(train|val|test)(?:ing|id|idate|idation)?(?![a-z])", name.lower()))
    return found.pop() if len(found) == 1 else None


def read_lists(folder, *suffixes):
    """Yield (split, path, fields) of every line of the lists that are named after a split, train first, test last."""
    found = {split_of(path.stem): path for path in find_files(folder, *suffixes)}
    for split in SPLITS:
        if split in found:
            for fields in filter(None, csv.reader(found[split].read_text("utf-8-sig").splitlines())):
                yield split, found[split], [field.strip() for field in fields]


def draw_splits(clips, val=0.1, test=0.1):
    """Move shares of the training groups to test and val at random, evenly by class; one each if there are three."""
    groups = {}  # {group: its clips}
    for clip in clips:
        if clip.split == "train":
            groups.setdefault(clip.group or clip.id, []).append(clip)
    total = len(groups)
    for split, share in ("test", test), ("val", val):
        count = max(round(share * total), share > 0 and total > 2)
        for group in shuffle_evenly(groups)[:count]:
            for clip in groups.pop(group):
                clip.split = split


def shuffle_evenly(groups):
    """The groups at random, but so that any first part of them holds every class in its share."""
    rng = np.random.default_rng(0)
    classes = {}  # {label, or -1 for several: groups}
    for group in sorted(groups):
        labels = {clip.label for clip in groups[group]}
        classes.setdefault(labels.pop() if len(labels) == 1 else -1, []).append(group)
    places = []  # (where in 0..1 it stands in its class, group)
    for label in sorted(classes):
        shuffled = rng.permutation(classes[label]).tolist()
        places += [((rank + 0.5) / len(shuffled), group) for rank, group in enumerate(shuffled)]
    return [group for _, group in sorted(places)]


def complete_splits(clips):
    """Without a test set, validation becomes it; without a validation set, a tenth of the training groups does."""
    splits = {clip.split for clip in clips}
    if "test" not in splits:
        for clip in clips:
            clip.split = clip.split.replace("val", "test")
    if not {"val", "test"} <= splits:
        draw_splits(clips, test=0)


EMOTIONS = ["ANG", "DIS", "FEA", "HAP", "NEU", "SAD"]
CREMAD_ID = re.compile(r"\d{4}_[A-Z]{3}_(ANG|DIS|FEA|HAP|NEU|SAD)_[A-Z]{2}")  # <actor>_<sentence>_<emotion>_<level>


def cremad(raw, *, frames=2, keep=1, size=224, seconds=3.0, bins=128, shift=10.0, split="clips", split_dir=None):
    """CREMA-D: 7,442 clips, 91 actors, six emotions. `raw` holds <id>.wav and <id>.flv (or .mp4) at any depth.
    split "clips" draws 80 / 10 / 10 per cent at random over clips, as officially: every actor is in all three;
    "actors" holds out whole actors. `split_dir` holds lists with lines `id,EMO` instead: my_train.csv or train.csv,
    test.csv, and val.csv unless a tenth of train is to be drawn."""
    if split not in ("clips", "actors"):
        raise DataError(f"--split is clips or actors, not {split}")
    if split == "actors" and split_dir:
        raise DataError("--split actors draws the splits, --split-dir takes them from lists: give one of the two")
    sounds = {path.stem: path for path in find_files(raw, ".wav")}
    films = {path.stem: path for path in find_files(raw, ".flv", ".mp4")}
    ids = sorted(filter(CREMAD_ID.fullmatch, {**sounds, **films}))
    for found, what in (sounds, "sound: no AudioWAV/<id>.wav"), (films, "picture: no VideoFlash/<id>.flv"):
        if found.keys().isdisjoint(ids):
            raise DataError(f"{raw} holds no CREMA-D, or a copy without {what}. Fetch it from {MIRROR}")
    clips = []
    for i in ids:
        files = {"audio": sounds.get(i, raw / f"{i}.wav"), "visual": films.get(i, raw / f"{i}.flv")}
        clips.append(Clip(i, EMOTIONS.index(i[9:12]), "train", files, i[:4] if split == "actors" else i))
    if not split_dir:
        draw_splits(clips)
        return clips, EMOTIONS
    unlisted = {clip.id: clip for clip in clips}
    clips = []
    for split, path, fields in read_lists(split_dir, ".csv"):
        i = fields[0]
        if i == "name":  # a header
            continue
        if i not in unlisted or fields[1:] != [i[9:12]]:
            line = ",".join(fields)
            raise DataError(f"{path}: {line} is not among the raw files, not what its name says, or listed twice")
        clips.append(unlisted.pop(i))
        clips[-1].split = split
    if not clips:
        raise DataError(f"{split_dir} holds no lists: it takes my_train.csv (or train.csv), test.csv, maybe val.csv")
    complete_splits(clips)
    return clips, EMOTIONS


KINETICS_SOUNDS = """blowing nose, blowing out candles, bowling, chopping wood, dribbling basketball, laughing,
mowing lawn, playing accordion, playing bagpipes, playing bass guitar, playing clarinet, playing drums, playing guitar,
playing harmonica, playing keyboard, playing organ, playing piano, playing saxophone, playing trombone,
playing trumpet, playing violin, playing xylophone, ripping paper, shoveling snow, shuffling cards, singing,
stomping grapes, tap dancing, tapping guitar, tapping pen, tickling""".replace("\n", " ").split(", ")


def kinetics(raw, *, frames=3, keep=1, size=224, seconds=10.24, bins=128, shift=10.0, split_dir=None):
    """Kinetics-Sounds: 31 classes of Kinetics-400. `raw` holds, at any depth, train and val (or test) with a folder per
    class, or flat beside train.csv and val.csv (label,youtube_id,time_start,...). `split_dir` holds the lists that
    circulate instead, with lines <youtube id>_<start>...,<seconds>,<label>: they test on Kinetics-400's test split.
    Else test is the validation set, where there is one, and validation a tenth of train."""
    paths = find_files(raw, ".mp4", ".mkv", ".webm")
    paths.sort(key=lambda path: path.parent.name.startswith("replacement"))  # of corrupt clips of the same name
    found = {clip_key(path.stem): path for path in paths}
    rows = []  # (split, clip, label)
    for split, path, fields in read_lists(split_dir or raw, ".txt", ".csv"):
        if len(fields) == 3:  # a list that circulates
            if not 0 <= int(fields[2]) <= 30:
                raise DataError(f"{path}: labels are 0 to 30, not {fields[2]}")
            rows.append((split, clip_key(fields[0]), KINETICS_SOUNDS[int(fields[2])]))
        elif fields[0] in KINETICS_SOUNDS:  # Kinetics' annotations
            rows.append((split, clip_key(f"{fields[1]}_{fields[2]}"), fields[0]))
    if not rows and not split_dir:
        for path in paths:  # the names of the folders that it lies in tell, the innermost first
            names = [name.replace("_", " ") for name in path.relative_to(raw).parts[-2::-1]]
            split = next(filter(None, map(split_of, names)), None)
            label = next((name for name in names if name in KINETICS_SOUNDS), None)
            if clip_key(path.stem) and split and label:
                rows.append((split, clip_key(path.stem), label))
    if not any(key in found for _, key, _ in rows):
        raise DataError(f"{raw} holds no clip of Kinetics-Sounds: it takes train/<class>/<id>_<start>_<end>.mp4 and "
                        "val/<class>/..., flat folders beside train.csv and val.csv, or --split-dir")  # fmt: skip
    if not split_dir and any(split == "val" for split, _, _ in rows):
        rows = [row for row in rows if row[0] != "test"]
    clips = {}
    for split, key, label in sorted(rows, key=lambda row: SPLITS.index(row[0])):  # one that is listed twice is for test
        path = found.get(key, raw / f"{key}.mp4")
        clips[key] = Clip(key, KINETICS_SOUNDS.index(label), split, {"audio": path, "visual": path})
    clips = list(clips.values())
    complete_splits(clips)
    return clips, KINETICS_SOUNDS


def clip_key(stem):
    """<youtube id>_<start, six digits>, however many digits the start has and whatever follows; '' for other names."""
    match = re.fullmatch(r"(.{11})_(\d+)(_\d+)?", stem)  # a YouTube id has 11 characters
    return f"{match[1]}_{int(match[2]):06d}" if match else ""


UCF_ID = re.compile(r"v_(\w+?)_g(\d+)_c\d+", re.IGNORECASE)


def ucf101(raw, *, frames=3, keep=1, size=224, fold=1):
    """UCF-101: RGB and optical flow of 13,320 clips, 101 classes. `raw` holds v_<Class>_gNN_cNN.avi at any depth.
    The official splits are a rule: fold k tests on groups 7k-6 to 7k. Validation is a tenth of the training groups,
    since the clips of a group are cut from one video. Flow is TV-L1 where there are pictures of it, else computed."""
    paths = find_files(raw, ".avi", ".txt")
    films = {path.stem: path for path in paths if path.suffix != ".txt" and UCF_ID.fullmatch(path.stem)}
    if not films:
        raise DataError(f"{raw} holds no UCF-101: no v_<Class>_gNN_cNN.avi (a .rar or .zip has to be unpacked)")
    classes = sorted({UCF_ID.fullmatch(stem)[1] for stem in films}, key=str.lower)
    flow = find_flow(raw)
    clips = []
    for stem, path in sorted(films.items()):
        name, group = UCF_ID.fullmatch(stem).groups()
        split = "test" if (int(group) - 1) // 7 == fold - 1 else "train"
        files = {"flow": path, "visual": path}
        if flow:  # a clip without pictures is skipped: two methods are not mixed
            files["flow"] = flow.get(stem.lower(), (raw / "u" / stem, raw / "v" / stem))
        clips.append(Clip(stem, classes.index(name), split, files, group=stem[:-4]))
    for path in paths:
        if path.name == f"testlist0{fold}.txt":
            listed = {Path(line).stem.lower() for line in path.read_text().split()}  # which write HandStandPushups
            if any((clip.id.lower() in listed) != (clip.split == "test") for clip in clips):
                raise DataError(f"{path} is not UCF-101's own list, groups {7 * fold - 6} to {7 * fold}: move it away")
    draw_splits(clips, test=0)
    return clips, classes


def find_flow(raw):
    """{clip in lower case: (u, v), the folders of its pictures}: <clip>/flow_x*.jpg and flow_y*.jpg, or u/<clip>/*.jpg
    and v/<clip>/*.jpg, in which there may be folders of classes. Half of it is an error."""
    found = {"u": {}, "v": {}}
    for folder in map(Path, walk(raw)):
        if UCF_ID.fullmatch(folder.name) and folder.is_dir():
            for axis, pictures in ("u", "flow_x*"), ("v", "flow_y*"):
                if axis in folder.parts[-3:-1] or any(folder.glob(pictures)):
                    found[axis][folder.name.lower()] = folder
    if bool(found["u"]) != bool(found["v"]):
        raise DataError(f"{raw} holds half of the optical flow, u or v: unpack all parts, or move it away")
    return {clip: (folder, found["v"].get(clip, raw / "v" / folder.name)) for clip, folder in found["u"].items()}


FILE_TYPES = {
    "video": (".mp4", ".avi", ".mkv", ".webm", ".mov", ".flv", ".m4v", ".mpg", ".mpeg", ".wmv"),
    "picture": (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif"),
    "sound": (".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac"),
    "features": (".npy",),
}
KINDS = {"picture": "frames", "sound": "fbank", "features": "sequence"}
KINDS_OF_A_VIDEO = {"audio": "fbank", "flow": "flow"}  # by what the modality is called; else frames


def file_type(path):
    """One of FILE_TYPES, or None, as for the two folders of a flow."""
    return next((name for name, suffixes in FILE_TYPES.items() if str(path).lower().endswith(suffixes)), None)


def own_data(table, *, frames=2, keep=1, size=224, seconds=3.0, bins=128, shift=10.0):
    """Your own clips from a CSV. It has a column `label`, and may have `split` (train, val, test; a missing test set is
    the val set, a missing val set a tenth of train; without the column 80 / 10 / 10 per cent are drawn, every label in
    its share), `group` (clips of a group are drawn together) and `id`. Every other column is a modality and holds
    files, relative to the CSV: a video (whose sound counts in a column `audio`, whose motion in `flow`), a picture, a
    sound, or a .npy of (T, D) or (D,) numbers."""
    rows, modalities = read_table(table)
    classes = sorted(set(rows["label"]))
    if len(classes) < 2:
        raise DataError(f"{table}: every clip has the label {classes[0]}: there is nothing to tell apart")
    clips = []
    groups = {}  # {files: group}: a clip that is listed twice is in one split
    for row in rows.to_dict("records"):
        files = {m: table.parent / row[m] for m in modalities}
        split = split_of(row.get("split", "train"))
        group = groups.setdefault(tuple(map(os.path.realpath, files.values())), row.get("group", row["id"]))
        clips.append(Clip(row["id"], classes.index(row["label"]), split, files, group))
    draw = complete_splits if "split" in rows else draw_splits
    draw(clips)
    places = {(os.path.realpath(path), clip.split) for clip in clips for path in clip.files.values()}
    if "group" in rows:
        places |= {(f"the group {clip.group}", clip.split) for clip in clips}
    count = Counter(what for what, _ in places)
    if shared := sorted(what for what in count if count[what] > 1):  # what was trained on is no test
        where = " and ".join(split for split in SPLITS if (shared[0], split) in places)
        what = "files or groups" if "group" in rows else "files"
        print(f"warning: {len(shared):,} {what} are in several splits, as {shared[0]} in {where}", file=sys.stderr)
    return clips, classes


def read_table(table):
    """The CSV's rows, each with an id, and the columns that are modalities; a wrong row is named by its line."""
    text = table.read_bytes().decode("utf-8-sig", errors="replace")
    if {"\ufffd", "\0"} & set(text) or text.startswith("sep="):
        raise DataError(f"{table} cannot be understood: save it as UTF-8, with commas, and without a line sep=")
    cells = pd.read_csv(io.StringIO(text), header=None, dtype=str, keep_default_na=False, skip_blank_lines=False)
    cells = cells.map(str.strip)
    rows = cells[1:].set_axis(cells.loc[0].tolist(), axis=1)
    rows.index += 1  # its line
    rows = rows[(rows != "").any(axis=1)]
    modalities = [m for m in rows if m not in ("label", "split", "group", "id")]
    if "label" not in rows or not modalities or rows.empty or not rows.columns.is_unique:
        raise DataError(f"{table} takes a line of column names, label and one per modality, with commas between them, "
                        f"and a row per clip; it has {len(rows)} rows and the columns {list(rows)}")  # fmt: skip
    for m in modalities:  # the name becomes a file's, a flag's and a module's
        if m == "labels" or hasattr(torch.nn.ModuleDict, m) or not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", m):
            raise DataError(f"{table}: a modality cannot be called {m!r}: give the column another name")
    if "id" not in rows:
        rows = rows.assign(id=[f"line {line}" for line in rows.index])
    rows["label"] = rows["label"].str.normalize("NFC")  # there are two ways to write an umlaut
    problems = {"has an empty cell": (rows == "").any(axis=1), "has the id of another clip": rows["id"].duplicated()}
    if "split" in rows:
        problems["is in a split other than train, val or test"] = rows["split"].map(split_of).isna()
    for m in modalities:
        types = rows[m].map(file_type)
        wrong = types.isna() | (types != types.iloc[0])
        problems[f"has no video, picture, sound or .npy file in {m}, or not what {m} begins with"] = wrong
    for problem, wrong in problems.items():
        if wrong.any():
            raise DataError(f"{table}, line {wrong.idxmax()} {problem}: {', '.join(rows.loc[wrong.idxmax()])}")
    return rows, modalities


def demo(raw, *, clips=2100, seed=0):
    """The miniature CREMA-D: written to `raw` as real files, then read as CREMA-D is. 1,000 / 300 / 800 clips, or
    3,456 at most, the emotions in turn; clip i depends on seed and i alone. Section 6 draws and synthesises them."""
    rng = np.random.default_rng(seed)
    names = []
    for emotion in EMOTIONS:
        levels = ["XX"] if emotion == "NEU" else ["XX", *LEVELS]
        every = [f"{a}_{s}_{emotion}_{level}" for a in ACTORS for s in VOWELS for level in levels]
        names.append(rng.permutation(every).tolist())
    names = list(chain(*zip(*names)))[:clips]
    jobs = [(raw, seed, index, name) for index, name in enumerate(names)]
    with exclusive(raw, wait=True), closing(in_parallel(perform, jobs)) as done:
        for folder in "AudioWAV", "VideoFlash":
            (raw / folder).mkdir(exist_ok=True)
        for name in tqdm(done, "drawing the demo", len(jobs), unit=" clips", disable=None, ncols=78):
            if name is None:
                raise DataError("a process that draws the demo died (out of memory?): the same command resumes")
    drawn = []
    for i in sorted(names):
        files = {"audio": raw / f"AudioWAV/{i}.wav", "visual": raw / f"VideoFlash/{i}.flv"}
        drawn.append(Clip(i, EMOTIONS.index(i[9:12]), "train", files))
    draw_splits(drawn, 300 / 2100, 800 / 2100)
    return drawn, EMOTIONS


def mosi(raw, folder):
    """CMU-MOSI from one pickle in MMSA's or MultiBench's layout: text, audio and vision as (N, T, D) -> folder.
    No lister: the arrays only need standardising, by the training set's statistics. Two classes: score < 0, >= 0."""
    if not raw.is_file():
        raise DataError(f"--raw {raw} is no file: it takes the pickle itself, as aligned_50.pkl")
    recorded = {"raw": raw.name, "sha256": fingerprint(raw)}
    if is_prepared(folder, recorded):
        return folder
    if raw.name == "aligned_50.pkl" and recorded["sha256"] != "d3994fd25681":
        print(f"warning: {raw} is not the {raw.name} that MMSA publishes: its SHA-256 is another", file=sys.stderr)
    specs = {}
    ids = {}
    arrays = {}  # {file: array}
    skipped = []
    scale = {}  # {modality: mean and deviation over the training set}
    with explained(f"{raw} is not CMU-MOSI as MMSA or MultiBench lay it out, but damaged, or a web page or a git-lfs "
                   "stub saved in its place: download it anew"):  # fmt: skip
        pickled = PlainUnpickler(io.BytesIO(raw.read_bytes()), encoding="latin1").load()
        for split, part in ("train", pickled["train"]), ("val", pickled["valid"]), ("test", pickled["test"]):
            n = len(part["text"])
            ids[split] = [str(i) for i in np.reshape(part.get("id", range(n)), (n, -1))[:, 0]]
            score = np.float32(part.get("regression_labels", part.get("labels"))).reshape(n, -1)[:, 0]
            bad = {"score": ~np.isfinite(score)}
            for m in "text", "audio", "vision":
                x = np.asarray(part[m], np.float32)  # (N, T, D)
                spec = {"kind": "sequence", "shape": list(x.shape[1:]), "dtype": "float32"}
                if specs.setdefault(m, spec) != spec or len(x) != n:
                    raise ValueError(f"in {split}, {m} has the shape {x.shape}")
                present = x.any(-1)  # (N, T), which steps are no padding; some pickles tell it
                if f"{m}_lengths" in part:
                    present = np.arange(x.shape[1]) < np.reshape(part[f"{m}_lengths"], (-1, 1))
                elif m == "text" and "text_bert" in part:  # (N, 3, T): ids, mask, segments
                    present = np.asarray(part["text_bert"])[:, 1] != 0
                scale.setdefault(m, statistics([x[present]]))
                arrays[f"{split}/{m}"] = standardise(x, present, *scale[m])
                bad[m] = present.any(1) & ~(np.isfinite(x) & present[..., None]).any((1, 2))
            bad = pd.DataFrame(bad)
            arrays[f"{split}/labels"] = np.where(bad.any(axis=1), SKIPPED, score >= 0)
            for row, what in bad[bad.any(axis=1)].idxmax(axis=1).items():  # the first that it lacks
                skipped.append([split, ids[split][row], f"no {what}"])
    manifest = {"dataset": "mosi", "options": recorded, "classes": ["negative", "non-negative"], "modalities": specs}
    with exclusive(folder, wait=True):
        if not is_prepared(folder, recorded):  # by another process, meanwhile
            for name, array in arrays.items():
                (folder / name).parent.mkdir(exist_ok=True)
                write_atomically(folder / f"{name}.npy", partial(np.save, arr=array))
            write_json(folder / "manifest.json", {**manifest, "splits": ids, "skipped": sorted(skipped)})
    return folder


class PlainUnpickler(pickle.Unpickler):
    """Unpickles containers, strings, numbers and NumPy arrays, and nothing that could run code."""

    ALLOWED = """numpy.ndarray numpy.dtype _codecs.encode collections.OrderedDict
        numpy.core.multiarray._reconstruct numpy.core.multiarray.scalar numpy.core.numeric._frombuffer
        numpy._core.multiarray._reconstruct numpy._core.multiarray.scalar numpy._core.numeric._frombuffer""".split()

    def find_class(self, module, name):
        if f"{module}.{name}" not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no plain data")
        return super().find_class(module, name)


DATASETS = {"demo": demo, "cremad": cremad, "kinetics": kinetics, "ucf101": ucf101, "mosi": mosi}
MIRROR = "https://gitlab.com/cs-cooper-lab/crema-d-mirror"
SOURCES = {  # name: (what it is called when it is there, where to get it); the README tells of others
    "cremad": ("CREMA-D", f"""3 GB, with git-lfs: GIT_LFS_SKIP_SMUDGE=1 git clone --depth 1 {MIRROR}.git CREMA-D
     && git -C CREMA-D lfs pull -I "AudioWAV/**,VideoFlash/**" """),
    "kinetics": ("kinetics400", "436 GB: https://github.com/cvdfoundation/kinetics-dataset"),
    "ucf101": ("UCF101", "6.5 GB, to be unpacked: https://www.crcv.ucf.edu/data/UCF101/UCF101.rar"),
    "mosi": ("aligned_50.pkl", "367 MB: "
             "https://huggingface.co/datasets/tamb2203579/CMU-MOSI/resolve/main/Processed/aligned_50.pkl"),
}  # fmt: skip


def how_to_get(folder):
    """What to do when a dataset is not there."""
    name = folder.name
    out = "" if folder.parent == Path("prepared") else f" --out {folder.parent}"
    if name not in SOURCES:
        return f"Make it:  python data.py {name if name == 'demo' else name.removesuffix('.csv') + '.csv'}{out}"
    raw, source = SOURCES[name]
    return (f"\n  1. Get {raw}, {source}\n  2. python data.py {name} --raw {raw}{out}\n"
            "Or see the method at work now:  python dr.py --dataset demo")  # fmt: skip


# --- 3  Reading media: one of a clip's files -> its rows. PyAV's wheels carry FFmpeg. ---

RATE = 16_000  # samples per second of every sound


def middles(length, count):
    """The middles of `count` equal parts of `length` frames: number i is the one at (i + 1/2) / count."""
    return [int((i + 0.5) * length / count) for i in range(count)]


def open_media(path):
    """Open a file with FFmpeg; a title that is no Unicode does not make it a bad one."""
    url = f"file:{path}"  # lest a name with a colon be taken for a protocol
    # FFmpeg would probe a .wav for coded sound in disguise: ten times as long as reading it
    options = {"probesize": "4096"} if path.suffix == ".wav" else {}
    try:
        return av.open(url, options=options, metadata_errors="replace")
    except TypeError:  # from PyAV 19 on it does so by itself
        return av.open(url, options=options)


def film_in(container):
    """Its first stream of pictures that is no cover, or None."""
    return next((s for s in container.streams.video if not s.disposition & Disposition.attached_pic), None)


def packets_of(stream):
    return (packet for packet in stream.container.demux(stream) if packet.size)


def decode(stream):
    """Yield what is shown or heard. Packets that cannot be decoded are passed over, as `ffmpeg -i` does."""
    stream.codec_context.thread_count = 1  # it is the clips that are read in parallel
    for packet in chain(packets_of(stream), [None]):  # None: what is still in the decoder comes out
        with suppress(av.error.InvalidDataError, av.error.ArgumentError, av.error.PatchWelcomeError):
            yield from stream.codec_context.decode(packet)


def read_frames(path, spec):
    """Frames at the middles of equal parts of a clip, squeezed to squares: (count * keep, size, size, 3) uint8."""
    size = spec["size"]
    if file_type(path) != "picture":
        return np.stack([convert(frame, size, size, "rgb24") for frame in pick_frames(path, spec)])
    with Image.open(path) as picture:
        if picture.mode[0] in "IF":  # 16 or 32 bits: converting would cut the values off at 255
            raise BadClip("more than 8 bits per pixel: save it with 8")
        return np.asarray(over_white(ImageOps.exif_transpose(picture)).resize((size, size)))[None]


def over_white(picture):
    """In RGB; what is transparent shows white paper, as viewers do."""
    paper = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(paper, picture.convert("RGBA")).convert("RGB")


def convert(frame, width, height, form):
    """A decoded frame as an array, turned as its camera says. In one thread, since starting several takes ten times as
    long; by a new converter, since in a forked process PyAV 19's would wait for its parent's threads for ever."""
    turns = round(frame.rotation / 90)
    if any(component.is_alpha for component in frame.format.components):
        pixels = VideoReformatter().reformat(frame, format="rgba", threads=1).to_ndarray()
        frame = av.VideoFrame.from_image(over_white(Image.fromarray(pixels)))
    picture = VideoReformatter().reformat(frame, width, height, form, threads=1).to_ndarray()
    return np.rot90(picture, turns)  # counterclockwise


def pick_frames(path, spec, pairs=False):
    """The decoded frames at the middles of count * keep equal parts of a video; in pairs, each with the next one.
    As a rule every packet is shown. Where the last frame's time tells that some were not, since what they need was
    cut off, or is broken, those that are shown are counted, and all is done again."""
    times = packet_times(path, spec)
    length = len(times)
    for counted in False, True:
        if counted:
            with open_media(path) as container:
                length = sum(1 for _ in islice(decode(film_in(container)), length))
        if length <= pairs or 2 * length < len(times):
            raise BadClip(f"broken, or too short, {length} of {len(times)} frames can be decoded")
        wanted = middles(length, spec["count"] * spec["keep"])
        if pairs:
            wanted = [min(i, length - 2) + step for i in wanted for step in (0, 1)]
        last = wanted[-1]
        with open_media(path) as container:
            shown = enumerate(islice(decode(film_in(container)), last + 1))
            frames = {i: frame for i, frame in shown if i in wanted}
        if counted or last in frames and frames[last].pts in (times[last], None):  # an AVI may tell no times
            return [frames[i] for i in wanted]


def packet_times(path, spec):
    """When the packets of a video, or of its `longest` seconds, are to be shown, in order; one that is truncated is a
    bad clip. All packets are read, which is cheap, since the container may not tell how many there are."""
    with open_media(path) as container:
        stream = film_in(container)
        if not stream:
            raise BadClip("no picture")
        packets = [(packet.pts or 0, packet.is_discard) for packet in packets_of(stream)]
        times = sorted(time for time, hidden in packets if not hidden)  # by the edit list of an MP4
        end = max(packets, default=(0,))[0] - (stream.start_time or 0)
        frames = max(len(packets), end * stream.time_base * (stream.average_rate or 0) + 1)
        if frames < 0.9 * stream.frames:  # an AVI counts those that the camera dropped, too
            raise BadClip(f"truncated, {len(times)} of {stream.frames} frames are there")
        if not stream.frames and container.duration:  # Flash tells no number of frames, but how long it lasts
            there = float(max(packets, default=(0,))[0] * stream.time_base)
            if 2 * there + 0.5 < container.duration / av.time_base:
                raise BadClip(f"truncated after {there:.1f} s")
        if "longest" in spec and stream.average_rate:
            times = times[: max(1, round(spec["longest"] * stream.average_rate))]
    return times


def read_flow(source, spec):
    """Optical flow at the middles of equal parts, (count * keep, size, size, 2) uint8: 128 is none, 255 is 20 pixels.
    `source` is a pair of folders of pictures (see find_flow), or a video, for OpenCV's DIS (Kroeger et al. 2016)."""
    if isinstance(source, tuple):
        u, v = flow_pictures(source)
        axes = [Image.open(axis[i]) for i in middles(len(u), spec["count"] * spec["keep"]) for axis in (u, v)]
    else:
        import cv2

        cv2.setNumThreads(1)
        dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        frames = pick_frames(source, spec, pairs=True)
        grey = [np.ascontiguousarray(convert(frame, None, None, "gray")) for frame in frames]  # it takes no padded rows
        axes = []
        for first, second in zip(grey[::2], grey[1::2]):
            move = 128 + dis.calc(first, second, None) * (127 / 20)  # (H, W, 2)
            axes += map(Image.fromarray, np.uint8(np.clip(move, 0, 255).round()).transpose(2, 0, 1))
    size = (spec["size"], spec["size"])
    axes = [axis.convert("L").resize(size, Image.BILINEAR) for axis in axes]  # u, v, u, v, ...
    return np.stack(axes).reshape(-1, 2, *size).transpose(0, 2, 3, 1)


def flow_pictures(folders):
    """The pictures of u and of v, in either layout."""
    u = sorted(folders[0].glob("flow_x*.jpg")) or sorted(folders[0].glob("*.jpg"))
    v = sorted(folders[1].glob("flow_y*.jpg")) or sorted(folders[1].glob("*.jpg"))
    if not u or len(u) != len(v):
        raise BadClip(f"{len(u)} pictures of flow in u, {len(v)} in v")
    return u, v


def read_sound(path, longest=math.inf):
    """A file's sound, or little more than its first `longest` seconds: (samples,) float32 in [-1, 1], mono."""
    frames = []
    seconds = 0.0
    with open_media(path) as container:
        if not container.streams.audio:
            raise BadClip("no sound")
        for frame in decode(container.streams.audio[0]):
            frames.append(frame)
            seconds += frame.samples / frame.sample_rate
            if seconds > longest:
                break
        told = length_told(path, container)
    # a new converter where the format changes on the way
    runs = groupby(frames, lambda frame: (frame.sample_rate, frame.format.name, frame.layout.name))
    sound = [resample(list(run)) for _, run in runs]
    if sum(map(len, sound)) < 400:  # less than one window of 25 ms
        raise BadClip("no sound")
    if seconds < min(0.9 * told, longest):
        raise BadClip(f"truncated, {seconds:.1f} of {told:.1f} s are there")
    return np.concatenate(sound)


def length_told(path, container):
    """The seconds that a file says its sound has, what was cut off included; 0 if it does not say."""
    stream = container.streams.audio[0]
    told = float((stream.duration or 0) * stream.time_base)
    with open(path, "rb") as file:
        riff, size = file.read(4), int.from_bytes(file.read(4), "little")
    if riff == b"RIFF" and size < 0x7FFFF000:  # a WAV that was made in a stream tells no size, or the largest
        return told * (size + 8) / container.size
    rate = stream.codec_context.bit_rate
    guess = 8 * container.size / rate if rate else 0  # what FFmpeg makes of the size where nothing is told
    return 0 if film_in(container) and not stream.frames or abs(told - guess) < 0.05 * told else told


def resample(frames):
    """Frames of one format -> mono (samples,). Where their channels cancel each other out, the loudest is taken."""
    graph = av.filter.Graph()  # what PyAV's AudioResampler does, which starts threads, and waits for them, per file
    graph.threads = 1
    first = frames[0]
    source = graph.add_abuffer(None, first.sample_rate, first.format, first.layout, time_base=first.time_base)
    resampler = graph.add("aformat", f"sample_fmts=flt:sample_rates={RATE}")
    graph.link_nodes(source, resampler, graph.add("abuffersink")).configure()
    for frame in [*frames, None]:  # None: no more will come
        graph.push(frame)
    parts = [np.zeros((0, len(first.layout.channels)), np.float32)]  # (samples, channels)
    with suppress(EOFError):
        while True:
            part = graph.pull()
            parts.append(part.to_ndarray().reshape(part.samples, -1))
    sound = np.concatenate(parts)
    mix = sound.mean(1)
    loudness = np.square(sound).mean(0)
    return sound[:, loudness.argmax()] if np.square(mix).mean() < 0.01 * loudness.mean() else mix


def fbank(sound, spec):
    """Kaldi's log-mel filter banks as the official code takes them: (1, bins, frames) float16. Mean removed, a Hanning
    window of 25 ms every `shift` ms, no dither; cut, or padded with zeros before normalising."""
    wave = torch.from_numpy(sound - sound.mean())[None]  # (1, samples)
    mel = kaldi.fbank(wave, sample_frequency=RATE, num_mel_bins=spec["bins"], frame_shift=spec["shift"],
                      window_type="hanning", htk_compat=True, use_energy=False, dither=0.0)  # fmt: skip
    frames = spec["shape"][-1]
    mel = F.pad(mel, (0, 0, 0, frames - len(mel)))  # (frames, bins); what is too long is cut
    return mel.T[None].half().numpy()


def read_fbank(path, spec):
    seconds = spec["shape"][-1] * spec["shift"] / 1000
    return fbank(read_sound(path, longest=max(60, seconds + 1)), spec)  # the mean is one of a minute at most


def open_features(path):
    """A .npy file of (T, D) or (D,) numbers, as (T, D)."""
    x = np.load(path, mmap_mode="r")
    if x.dtype.kind not in "fiu" or x.ndim not in (1, 2) or not x.size:
        raise BadClip(f"{x.dtype} of shape {x.shape}, where (T, D) or (D,) numbers are wanted")
    return np.atleast_2d(x)


def read_features(path, spec):
    """A .npy file standardised and padded with exact zeros to the longest: (T, D) float32."""
    x = open_features(path)
    padded = np.zeros(spec["shape"], np.float32)
    if x.shape[1] != padded.shape[1]:
        raise BadClip(f"{x.shape[1]} features, where the others have {padded.shape[1]}")
    if not np.isfinite(x).any():
        raise BadClip("no finite number")
    padded[: len(x)] = standardise(x, np.ones(len(x), bool), spec["mean"], spec["std"])
    return padded


def sequence_spec(m, clips):
    """The longest length and the width of a modality's .npy files, and the training set's statistics."""
    shapes = {}  # {path: (T, D)}
    problems = []
    for clip in clips:
        try:
            shapes[clip.files[m]] = open_features(clip.files[m]).shape
        except Exception as error:  # it is skipped, with its reason, when it is prepared
            problems.append(reason(clip.files[m], error))
    train = [clip.files[m] for clip in clips if clip.split == "train" and clip.files[m] in shapes]
    if not train:
        raise DataError(f"no training clip has a .npy file of (T, D) or (D,) numbers in the column {m}; {problems[0]}")
    widths = [shapes[path][1] for path in train]
    width = max(widths, key=widths.count)
    mean, std = statistics([path for path in train if shapes[path][1] == width], open_features)
    shape = [max(length for length, w in shapes.values() if w == width), width]
    return {"kind": "sequence", "shape": shape, "dtype": "float32", "mean": mean.tolist(), "std": std.tolist()}


def statistics(items, read=np.asarray):
    """Mean and deviation of each feature of the (n, D) numbers read(item), over what is finite; that of a constant is
    1. One item at a time is in memory."""

    def mean_of(f):
        total = count = 0
        for item in items:
            x = f(read(item).astype(np.float64))
            total = np.vstack([total + np.zeros_like(x[:1]), np.where(np.isfinite(x), x, 0)]).sum(0)
            count = count + np.isfinite(x).sum(0)
        return total / np.maximum(count, 1)

    mean = mean_of(np.asarray)
    std = np.sqrt(mean_of(lambda x: (x - mean) ** 2))
    return mean, np.where(std > 1e-8 * np.abs(mean), std, 1)  # less is what rounding makes of a constant


def standardise(x, present, mean, std):
    """(..., T, D) standardised, float32; what is not finite becomes the mean, 0. Steps that are not present, and these
    alone, are exactly 0 in all features: padding."""
    z = (x - np.array(mean)) / std
    z = np.float32(np.where(np.isfinite(z) & present[..., None], z, 0))
    z[..., 0] = np.where(present & ~z.any(-1), 1e-30, z[..., 0])
    return z


READERS = {"frames": read_frames, "flow": read_flow, "fbank": read_fbank, "sequence": read_features}


# --- 4  The machinery of preparing: locks, processes, a journal, writing atomically ---


@contextmanager
def exclusive(folder, wait=False):
    """Hold a folder, which is made, until this process is done with it, or dead: no other writes there meanwhile.
    Where another one holds it, wait for that; else raise DataError."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")  # the system's own: it ends with the process, however that ends
    holder = folder / ".holder"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = "another process"
        with suppress(OSError):  # it may be done by now
            who = holder.read_text() or who
        if not wait:
            raise DataError(f"{who} is at work in {folder}: wait until it is done, or choose another folder") from None
        print(f"waiting until {who} is done with {folder}", file=sys.stderr)
        lock.acquire()
    try:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


SKIPPED = -1  # the label of a clip that is not there: until all are, labels.npy is a journal of those on the disk
JOURNAL_EVERY = 2.0  # seconds: flushing every clip to the disk would be slow


def make_arrays(folder, plan):
    """Write the plan down and create its arrays at full size, once the disk is seen to hold them."""
    new = []
    for split, ids in plan["splits"].items():
        for m, spec in plan["modalities"].items():
            array = folder / split / f"{m}.npy", np.dtype(spec["dtype"]), (len(ids), *spec["shape"])
            if not is_array(*array):
                new.append(array)
    needed = sum(dtype.itemsize * math.prod(shape) for _, dtype, shape in new)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(f"{folder} will take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: "
                        "give another --out, or a smaller --size")  # fmt: skip
    if new or not (folder / "plan.json").exists():  # what a journal may tell of is not there
        for split in SPLITS:
            (folder / split / "labels.npy").unlink(missing_ok=True)
    write_json(folder / "plan.json", plan)
    for path, dtype, shape in new:
        path.parent.mkdir(exist_ok=True)
        np.lib.format.open_memmap(path, "w+", dtype, shape)


def is_array(path, dtype, shape):
    """Whether such an array is there, whole."""
    with suppress(OSError, ValueError, EOFError):
        array = np.load(path, mmap_mode="r")
        return array.dtype == dtype and array.shape == shape
    return False


def fill_arrays(folder, plan, splits, workers, max_bad):
    """Prepare the clips that are left, and what was skipped once more -> [[split, clip, why it was skipped]]."""
    labels = {}
    todo = []  # (clip, row)
    for split, clips in splits.items():
        true = np.array([clip.label for clip in clips], np.int64)
        path = folder / split / "labels.npy"
        done = is_array(path, true.dtype, true.shape) and np.load(path) == true
        labels[split] = np.where(done, true, SKIPPED)
        todo += [(clip, row) for row, clip in enumerate(clips) if labels[split][row] == SKIPPED]
    total = sum(map(len, splits.values()))
    skipped = []
    saved = time.monotonic()
    results = in_parallel(partial(prepare_clip, folder, plan["modalities"]), todo, workers)
    progress = tqdm(zip(todo, results), plan["dataset"], len(todo), unit=" clips", disable=None, ncols=78)
    try:
        with closing(results):
            for (clip, row), problem in progress:
                if problem == "":
                    labels[clip.split][row] = clip.label
                else:
                    skipped.append([clip.split, clip.id, problem or "the process that read it crashed"])
                if len(skipped) > max_bad / 100 * total:
                    raise DataError(f"{len(skipped)} of {total:,} clips cannot be used, more than --max-bad "
                                    f"{max_bad:g} per cent; the last: {', '.join(skipped[-1][1:])}")  # fmt: skip
                if time.monotonic() - saved > JOURNAL_EVERY:
                    save_journal(folder, labels)
                    saved = time.monotonic()
    finally:
        save_journal(folder, labels)
    return sorted(skipped)


def save_journal(folder, labels):
    """Flush the arrays to the disk first, and only then write down which of their rows are there."""
    for split, array in labels.items():
        for path in (folder / split).glob("*.npy"):
            with open(path, "r+b") as file:
                os.fsync(file.fileno())
        write_atomically(folder / split / "labels.npy", partial(np.save, arr=array))


def in_parallel(work, jobs, workers=None):
    """Yield work(*job) for every job, in order, from a pool of processes: one per core, or `workers` of them.
    When a process dies (inside FFmpeg), the next jobs are done one at a time; the one it dies on yields None."""
    done = 0
    careful = 0  # up to here one at a time
    most = 61 if sys.platform == "win32" else math.inf  # it cannot wait for more
    while done < len(jobs):
        alone = done < careful
        processes = 1 if alone else min(workers or cpu_count(), most)
        next_jobs = jobs[done:careful] if alone else jobs[done:]
        pool = ProcessPoolExecutor(processes, initializer=start_worker)
        pressed = []  # Python loses a Ctrl-C that comes while it forks: it is heeded when all workers are there
        usual = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
        try:
            if pool.submit(os.getpid).exception():  # a worker did not even start
                raise DataError("no process can be started to read the clips: on Windows and macOS, a script prepares "
                                "and trains below  if __name__ == '__main__':")  # fmt: skip
            results = pool.map(work, *zip(*next_jobs), chunksize=1 if alone else 8)
            signal.signal(signal.SIGINT, usual)
            if pressed:
                raise KeyboardInterrupt
            for result in results:
                done += 1
                yield result
        except BrokenProcessPool:
            if alone:
                done += 1
                yield None
            careful = done + 32 * processes  # more jobs than a pool has at hand
        finally:
            signal.signal(signal.SIGINT, usual)
            pool.shutdown(cancel_futures=True)


def start_worker():
    """A worker leaves Ctrl-C to its parent, computes on one core, and ends when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)

    def end_with_parent():
        parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def write_atomically(path, write):
    """Write a file by write(file), atomically: even a power cut leaves the old one or the new one."""
    new = path.with_suffix(".new")
    try:
        with open(new, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except OSError:  # a full disk gets its space back
        new.unlink(missing_ok=True)
        raise
    os.replace(new, path)


def write_json(path, content):
    write_atomically(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def read_json(path):
    """A plan or a manifest."""
    with explained(f"{path.parent} is damaged, see {path.name}: delete it and prepare it again"):
        content = json.loads(path.read_text())
        content["options"].keys()
        return content


# --- 5  A prepared dataset: loading, batches, augmentation ---


@dataclass
class Split:
    """One split of a prepared dataset."""

    arrays: dict  # {modality: (N, ...) memory map}
    specs: dict  # {modality: how it was made, and how it is normalised}
    rows: np.ndarray  # (n,) the rows of the arrays that hold a clip
    labels: np.ndarray  # (n,) int64
    ids: list  # n clip ids

    def __len__(self):
        return len(self.rows)


@dataclass
class Dataset:
    """What `load` returns."""

    train: Split
    val: Split
    test: Split
    classes: list  # their names; a label is an index into it
    shapes: dict  # {modality: shape of one sample, as an encoder sees it}


def load(name, root="prepared", modalities=None):
    """Open a prepared dataset without reading it into memory; `modalities` picks some of them, default all.
    Raises DataError, with the commands that make the dataset, if it is not there."""
    folder = Path(root) / name
    if not (folder / "manifest.json").exists():
        raise DataError(f"{folder} holds no manifest.json. {how_to_get(folder)}")
    with explained(f"{folder} is damaged: delete it and prepare it again"):
        manifest = read_json(folder / "manifest.json")
        specs = manifest["modalities"]
        for m in modalities or ():
            if m not in specs:
                raise DataError(f"{name} has no modality {m}; it has {', '.join(specs)} (join several by +)")
        specs = {m: specs[m] for m in modalities or specs}
        splits = {}
        for split, ids in manifest["splits"].items():
            labels = np.load(folder / split / "labels.npy")
            rows = np.flatnonzero(labels >= 0)
            arrays = {m: np.load(folder / split / f"{m}.npy", mmap_mode="r") for m in specs}
            for m, array in arrays.items():
                if array.shape != (len(labels), *specs[m]["shape"]):
                    raise ValueError(f"{split}/{m}.npy has the shape {array.shape}")
            if not len(rows):
                raise DataError(f"{folder}/{split} holds no clip: see what manifest.json says was skipped")
            splits[split] = Split(arrays, specs, rows, labels[rows], [ids[row] for row in rows])
        first, _ = next(batches(splits["train"], 1))
        shapes = {m: tuple(x.shape[1:]) for m, x in first.items()}
        return Dataset(**splits, classes=manifest["classes"], shapes=shapes)


def add_noise(dataset, modality, level):
    """Gaussian noise of `level` standard deviations on every clip of one modality, which is then in memory. A clip
    keeps its noise over the epochs, as a bad recording does, so that it can be memorised; padding stays 0."""
    if modality not in dataset.shapes:
        raise DataError(f"no {modality} to put noise on; there is {', '.join(dataset.shapes)}")
    train = dataset.train
    clean = train.arrays[modality]
    if clean.dtype.kind != "f":
        raise DataError(f"noise goes on spectrograms and feature sequences, not on {modality}")
    spread = clean[train.rows[:1000]].std(dtype=np.float64)
    for seed, split in enumerate((train, dataset.val, dataset.test)):
        rng = np.random.default_rng(seed)
        noisy = np.array(split.arrays[modality])
        for row in split.rows:
            noise = level * spread * rng.standard_normal(noisy.shape[1:], np.float32)
            if train.specs[modality]["kind"] == "sequence":
                noise *= noisy[row].any(-1, keepdims=True)
            noisy[row] = noisy[row] + noise
        split.arrays[modality] = noisy


def move_to_gpu(dataset, device, max_bytes):
    """Move the arrays into the memory of a GPU, once, if they take at most `max_bytes` -> whether they did."""
    splits = (dataset.train, dataset.val, dataset.test)
    fits = sum(array.nbytes for split in splits for array in split.arrays.values()) <= max_bytes
    if fits:
        for split in splits:
            split.arrays = {m: torch.tensor(array).to(device) for m, array in split.arrays.items()}
    return fits


def to_device(array, device):
    """A NumPy array as a tensor on a device; to CUDA from pinned memory, so that nobody waits for the copy."""
    x = torch.from_numpy(np.ascontiguousarray(array))
    if torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def read_rows(split, modality, rows, device="cpu", rng=None):
    """Rows of one modality as they are stored; of the frames kept of a segment one, drawn or the middle one."""
    spec = split.specs[modality]
    array = split.arrays[modality]
    index = [rows]
    keep = spec.get("keep", 1)
    if keep > 1:
        shape = (len(rows), spec["count"])
        drawn = rng.integers(keep, size=shape) if rng else np.full(shape, keep // 2)
        index = [rows[:, None], keep * np.arange(spec["count"]) + drawn]
    if isinstance(array, torch.Tensor):
        return array[tuple(to_device(i, array.device) for i in index)]
    return to_device(array[tuple(index)], device)


def normalise(x, spec, rng=None):
    """What `read_rows` returns as a normalised float tensor; augmented if given a random generator.
    frames (B, T, 3, H, W) and flow (B, T, 2, H, W), which stay channels-last in memory (see memory_format); fbank
    (B, 1, F, T); sequence (B, T, D), its padding exactly 0."""
    if spec["kind"] != "sequence":  # that was standardised when it was prepared
        mean = to_device(np.float32(spec["mean"]), x.device)
        x = x.float().sub_(mean).div_(to_device(np.float32(spec["std"]), x.device))
    if spec["kind"] in ("frames", "flow"):
        x = x.movedim(-1, -3)
        if memory_format(x.device) is torch.contiguous_format:
            x = x.contiguous()
    return augment(x, spec["kind"], rng) if rng else x


def memory_format(device):
    """How pictures lie in memory: channels last, which convolutions are fastest on. Not on MPS, where the gradients
    of batch-norm were wrong in it until the summer of 2026 (pytorch/pytorch#175189)."""
    return torch.contiguous_format if torch.device(device).type == "mps" else torch.channels_last


def augment(x, kind, rng):
    """Each sample by draws of its own, mildly: frames and flow by a crop of 0.6 to 1 of the area, at 0.9 to 1.1 of the
    ratio, and a flip, one for all frames of a clip; sounds become louder or softer by 2 dB or so, a shift of their
    logarithms; every feature of a sequence is shifted for the whole clip, as by another body, place or sensor."""
    B = len(x)
    if kind == "sequence":  # (B, T, D), in standard deviations
        shift = to_device(np.float32(rng.normal(0, 0.5, (B, 1, x.shape[2]))), x.device)
        return torch.where((x == 0).all(-1, keepdim=True), 0, x + shift)  # padding stays 0
    if kind == "fbank":  # (B, 1, F, T)
        return x + to_device(np.float32(rng.normal(0, 0.05, B)), x.device)[:, None, None, None]
    area = rng.uniform(0.6, 1, B)
    ratio = np.exp(rng.uniform(np.log(0.9), np.log(1.1), B))
    width = np.minimum(1, np.sqrt(area * ratio))
    height = np.minimum(1, np.sqrt(area / ratio))
    flip = rng.choice([-1, 1], B)
    theta = np.zeros((B, 2, 3), np.float32)  # x' = flip * width * x + dx, y' = height * y + dy
    theta[:, 0, 0] = flip * width
    theta[:, 0, 2] = rng.uniform(-1, 1, B) * (1 - width)
    theta[:, 1, 1] = height
    theta[:, 1, 2] = rng.uniform(-1, 1, B) * (1 - height)
    flat = x.flatten(1, 2)  # (B, T * C, H, W): all frames of a clip alike
    grid = F.affine_grid(to_device(theta, x.device), flat.shape, align_corners=False)
    x = F.grid_sample(flat, grid, padding_mode="reflection", align_corners=False).view(x.shape)
    if kind == "flow":  # mirrored, what moved to the left moves to the right
        x[:, :, 0] *= to_device(np.float32(flip), x.device)[:, None, None, None]
    return x


def batches(split, batch_size, seed=None, device="cpu", augmented=False, part=(0, 1)):
    """Yield ({modality: tensor (B, ...)}, labels (B,)) over one split, once.
    With a seed (an int or a tuple of ints) in random order, the same for the same seed; without, in the order of the
    clips. The last batch may be smaller, or, lest it be a single clip, larger: none is lost, none comes twice.
    part=(rank, world), for random order, is one process's piece of every batch. All pieces are of one size, so that
    the mean of their gradients is the batch's: some clips of a last batch may come twice."""
    rank, world = part
    order = np.arange(len(split))
    if seed is not None:
        order = np.random.default_rng(seed).permutation(len(split))
    pieces = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if seed is not None and len(pieces) > 1 and len(pieces[-1]) <= world:  # batch-norm takes two clips at least
        pieces[-2:] = [np.concatenate(pieces[-2:])]
    pieces = [np.resize(piece, -(-len(piece) // world) * world)[rank::world] for piece in pieces]

    def read(number):
        picked = np.sort(pieces[number])  # ascending rows read the disk in one direction
        rng = np.random.default_rng((*np.atleast_1d(seed), number, rank)) if augmented else None
        inputs = {m: read_rows(split, m, split.rows[picked], device, rng) for m in split.arrays}
        return inputs, to_device(split.labels[picked], device), rng

    results = map(read, range(len(pieces)))
    if torch.device(device).type == "cuda" and any(isinstance(array, np.ndarray) for array in split.arrays.values()):
        results = prefetch(read, range(len(pieces)))
    for inputs, labels, rng in results:
        yield {m: normalise(x, split.specs[m], rng) for m, x in inputs.items()}, labels


def prefetch(work, items):
    """As map(work, items), but a thread is one item ahead, and its current GPU is ours: every thread has its own."""
    with ThreadPoolExecutor(1) as thread:
        if torch.cuda.is_available():
            thread.submit(torch.cuda.set_device, torch.cuda.current_device())
        submitted = (thread.submit(work, item) for item in items)
        for current, _ in pairwise(chain(submitted, [None])):  # the next one is submitted first
            yield current.result()


# --- 6  The demo: a miniature CREMA-D of cartoon actors with babbling voices. Skip it. ---

FACE_SPREAD = 0.18  # scatter of the faces of one emotion: the larger, the harder the picture
VOICE_SPREAD = 0.2  # scatter of the voices of one emotion: the larger, the harder the sound
ROOM_TONES = 12.0  # loudness of what hums in the room, different in every clip: easily memorised
SIZE = 96
FPS = 10
SECONDS = 1.2
ACTORS = range(1001, 1049)
LEVELS = {"LO": 0.6, "MD": 0.8, "HI": 1.0}  # intensity; XX, unspecified: anywhere from LO to HI


def read_numbers(text):
    """{first word: the numbers after it} of every line."""
    rows = [line.split() for line in text.strip().splitlines()]
    return {row[0]: np.array(row[1:], float) for row in rows}


# The face tells three kinds of emotion apart (ANG DIS, FEA SAD, HAP NEU) and hints at which of the two it is; that is
# what the voice tells, high (ANG FEA HAP) or low, and little else. Neither is enough without the other.
# slope > 0: the inner ends of the brows up; skew: one brow and one corner of the mouth up
#        mouth       brows              eyes |  pitch
#        curve open  slope height skew       |  level range contour energy rate breath bright
TABLE = read_numbers("""
    ANG   -0.6  0.4  -1.2  -0.7  -0.3   -0.5    0.3   0.6   -0.3    1.4  0.7   -0.6    1.0
    DIS   -0.6 -0.1  -1.2  -0.7   0.4   -0.5   -0.9  -0.5   -0.4   -1.2 -0.7    0.4   -0.6
    FEA   -0.6  0.4   1.1   0.9   0.0    0.8    1.0   0.2    0.2    1.0  0.8    0.2    0.7
    HAP    1.3  0.4   0.0   0.2   0.0    0.0    0.8   0.8    0.3    1.2  0.7   -0.4    0.8
    NEU    0.8 -0.1   0.0   0.0   0.0    0.0   -0.7  -0.5    0.3   -1.0 -0.5   -0.1   -0.7
    SAD   -0.8 -0.1   1.1   0.6   0.0   -0.1   -0.5  -0.7   -0.1   -1.4 -0.8    0.6   -1.0
""")
FORMANTS = read_numbers("""
    a   730  1090  2440  3500
    e   530  1840  2480  3500
    i   290  2250  2950  3500
    o   500   850  2410  3500
    u   320   870  2240  3500
""")  # Hz
VOWELS = """IEO:ieeeoo TIE:aieaiae IOM:aioaei IWW:auaiiau TAI:aeeioou MTI:eiuooiio IWL:auaiuao ITH:aiaaoue
    DFA:ooeaae ITS:aiaiiio TSI:auaii WSI:ioiauoii"""
VOWELS = dict(pair.split(":") for pair in VOWELS.split())  # {sentence: vowels}


def colours(text):
    return [tuple(bytes.fromhex(word)) for word in text.split()]


SKINS = colours("ffe0c4 f4cca8 e4b288 c48c64 9e6a4a 7c543e")
HAIRS = colours("221a1c 422a20 704628 969696 ac4c28 be7a38 e2ba62")
IRISES = colours("462c1c 3c6840 3868a0 60646c")
CLOTHES = colours("c44e52 4c72b0 55946e dda046 8172b3 f0ece2")
WALLS = colours("a8c8d6 e8ceb2 bed0ac cebed8 dcdcd6 96a6be")
BLACK, WHITE, BLUSH, SHADOW, MOUTH, TONGUE = colours("100c0c fafaf8 c83c3c 5a1e1e 46121a ce5c60")
STYLES = {  # ovals behind the head: centre, width, height
    "bald": [],
    "short": [(-0.3j, 0.92, 0.84)],
    "bun": [(-1.15j, 0.36, 0.3)],
    "bob": [(0.05j, 1.06, 1.08)],
    "curly": [(0.95 * np.exp(1j * a) - 0.1j, 0.26, 0.26) for a in np.linspace(-3.3, 0.16, 11)],
    "long": [(-0.2j, 1.04, 0.98), (0.75j, 0.98, 0.75)],
}
SHADE = Image.linear_gradient("L").resize((2 * SIZE, 2 * SIZE)).convert("RGB")
CIRCLE = np.exp(2j * np.pi * np.arange(32) / 32)
LINE = np.linspace(-1, 1, 15)
BEND = 1 - LINE**2


def draw_actor(seed, number):
    """The looks and the voice of one actor, the same in every clip."""
    rng = np.random.default_rng([seed, 10_000 + number])

    def pick(choices):
        return choices[rng.integers(len(choices))]

    skin = rng.integers(len(SKINS))
    pitch, formants = pick([(110, 1.0), (200, 1.14), (270, 1.28)])
    return dict(
        skin=SKINS[skin], hair=pick(HAIRS[: 7 - skin]), iris=pick(IRISES), clothes=pick(CLOTHES), wall=pick(WALLS),
        style=pick(list(STYLES)), width=rng.uniform(0.76, 0.9), jaw=rng.uniform(0, 0.14), gap=rng.uniform(0.31, 0.36),
        nose=rng.uniform(0.09, 0.14), part=rng.uniform(-0.2, 0.2), light=rng.uniform(0.82, 1), size=rng.uniform(66, 74),
        tilt=rng.normal(0, 0.04), place=rng.normal(0, 3, 2), rest=rng.normal(0, 0.15, 6),
        pitch=pitch * 2 ** rng.normal(0, 0.12), formants=formants * 2 ** rng.normal(0, 0.05),
        loud=rng.normal(0, 2), bright=rng.normal(0, 0.4),
    )  # fmt: skip


def mix(colour, other, part):
    return tuple(int((1 - part) * a + part * b) for a, b in zip(colour, other))


def oval(centre, width, height):
    return centre + width * CIRCLE.real + 1j * height * CIRCLE.imag


def draw_face(paint, look, expression):
    """All but the mouth; paint(colour, z) fills the outline z = x + iy, y down, where the head is 2 high."""
    _, _, slope, height, skew, eyes = expression
    skin = look["skin"]
    hair = look["hair"]
    width = look["width"]
    shadow = mix(skin, SHADOW, 0.18)
    for part in STYLES[look["style"]]:
        paint(hair, oval(*part))
    paint(look["clothes"], oval(1.78j, 1.25, 0.7))
    paint(shadow, oval(0.95j, 0.33, 0.36))  # neck
    paint(shadow, oval(0.1j - width, 0.13, 0.2))  # ears
    paint(shadow, oval(0.1j + width, 0.13, 0.2))
    head = width * CIRCLE.real * (1 - look["jaw"] * CIRCLE.imag) + 1j * CIRCLE.imag
    paint(skin, head)
    if look["style"] != "bald":
        crown = 1.1 * head[16:]
        x = head[16:].real / width
        edge = np.maximum(0.55 * x**4 + look["part"] * x - 0.62, crown.imag)
        paint(hair, crown, crown.real + 1j * edge)
    tall = 0.2 + 0.04 * np.clip(eyes, 0, 1.5)
    for side in -1, 1:
        eye = side * look["gap"] - 0.06j
        paint(mix(skin, BLUSH, 0.15), oval(1.4 * eye.real + 0.33j, 0.15, 0.1))
        paint(WHITE, oval(eye, 0.21, tall))
        paint(look["iris"], oval(eye, 0.12, 0.12))
        paint(BLACK, oval(eye, 0.07, 0.07))
        paint(WHITE, oval(eye + 0.045 - 0.05j, 0.03, 0.03))
        across = eye + 0.215 * LINE
        socket = 1j * tall * np.sqrt(BEND)
        lid = across + socket * (1 - 2 * np.clip(0.74 + 0.36 * eyes, 0.2, 1))
        paint(shadow, across - 1.08 * socket, lid)
        paint(BLACK, lid - 0.025j, lid + 0.02j)
        rise = 0.37 + 0.09 * height - 0.12 * slope * side * LINE + 0.05 * BEND + 0.09 * side * skew
        brow = 1.03 * eye.real + 0.25 * LINE - 1j * rise
        thick = 0.05j * np.sqrt(0.1 + 0.9 * BEND)
        paint(mix(hair, BLACK, 0.35), brow - thick, brow + thick)
    paint(shadow, oval(0.2j, look["nose"], 0.07))
    paint(mix(skin, WHITE, 0.06), oval(0.165j, 0.9 * look["nose"], 0.075))


def draw_mouth(paint, look, expression, talk):
    """talk, 0 to 1: how far the syllable opens the mouth."""
    curve, opening, _, _, skew, _ = expression
    gap = 0.32j * np.clip(opening + 0.6 * talk, 0.06, 1.1) * BEND**0.7
    lip = 0.045j * np.sqrt(BEND)
    height = 0.5 + 0.12 * curve * (0.8 - 1.6 * LINE**2) - 0.07 * skew * LINE
    top = (0.34 + 0.02 * curve - 0.06 * talk) * LINE + 1j * height - 0.3 * gap
    paint(mix(look["skin"], BLUSH, 0.5), top - 0.8 * lip, top + gap + 1.2 * lip)
    paint(MOUTH, top, top + gap)
    paint(TONGUE, top + 0.65 * gap, top + gap)
    paint(WHITE, top, top + 1j * np.clip(gap.imag - 0.05, 0, 0.08))  # teeth


def act(look, expression, talk, rng):
    """expression (6,), talk (12,) -> 12 pictures (96, 96, 3) uint8, painted at twice the size."""
    light = look["light"] * rng.uniform(0.9, 1.08)
    x, y = SIZE + look["place"] + rng.normal(0, 3.5, 2)
    scale = look["size"] * 2 ** rng.normal(0, 0.045)
    turn = scale * np.exp(1j * (look["tilt"] + rng.normal(0, 0.07)))
    wall = Image.new("RGB", (2 * SIZE, 2 * SIZE), mix(BLACK, look["wall"], light))
    image = Image.blend(wall, SHADE, -0.12)  # brighter above
    draw = ImageDraw.Draw(image)

    def paint(colour, edge, back=()):
        z = x + 1j * (y + 6) + turn * np.concatenate([edge, back[::-1]])
        draw.polygon(z.view(float).tolist(), mix(BLACK, colour, light))

    draw_face(paint, look, expression)
    silent = image.copy()
    talk = np.round(4 * talk) / 4  # few mouths, each drawn once, to save time
    pictures = {}
    for opening in set(talk):
        image.paste(silent)
        draw_mouth(paint, look, expression, opening)
        pictures[opening] = np.asarray(image.reduce(2))
    return [pictures[opening] for opening in talk]


def resonate(sound, formants):
    """Two-pole resonances in a row: y[t] = (1 - b - c) x[t] + b y[t-1] + c y[t-2]."""
    radius = np.exp(-np.pi * (60 + 0.05 * formants) / RATE)
    b = 2 * radius * np.cos(2 * np.pi * formants / RATE)
    c = -(radius**2)
    zero = 0 * formants
    return scipy.signal.sosfilt(np.stack([1 - b - c, zero, zero, zero + 1, -b, -c], axis=1), sound)


def say(voice, sentence, tone, rng):
    """4 to 8 syllables; tone (7,) as in TABLE -> sound (19200,) in [-1, 1], talk (12,) in [0, 1]."""
    level, spread, contour, energy, rate, breath, bright = tone
    n = int(RATE * SECONDS)
    time = np.linspace(0, 1, n)
    noise = rng.normal(size=n)
    count = int(np.clip(round(5.6 * 2 ** (0.45 * rate)), 4, 8))
    accent = np.interp(time, np.linspace(0, 1, count + 2), 0.1 * 2**spread * rng.normal(size=count + 2))
    pitch = voice["pitch"] * np.exp2(0.45 * level + 0.6 * (contour - 0.2) * (time - 0.5) + accent)
    turns = np.cumsum(pitch) / RATE
    p = (turns - np.floor(turns)) / 0.7  # the glottis is open for 0.7 of a period: flow p^2 (1 - p)
    source = (2 * p - 3 * p * p) * (p < 1) + 0.08 * 2 ** (1.5 * breath) * noise
    dark = 0.95 / (1 + np.exp(1.2 * (bright + voice["bright"])))
    source = scipy.signal.lfilter([1 - dark], [1, -dark], source)
    sound = np.zeros(n)
    talk = np.zeros(n)
    edges = np.linspace(0.03 * n, 0.95 * n, count + 1).astype(int)
    for vowel, start, stop in zip(2 * VOWELS[sentence], edges, edges[1:]):
        swell = rng.uniform(0.7, 1) * np.sqrt(np.sin(np.linspace(0, 3.14, stop - start)))
        sound[start:stop] = swell * resonate(source[start:stop], voice["formants"] * FORMANTS[vowel])
        talk[start:stop] = swell * FORMANTS[vowel][0] / 730  # the first formant follows the jaw
        hiss = np.diff(noise[start : start + 481]) * np.exp(-np.arange(480) / rng.uniform(40, 160))
        sound[start : start + 480] += rng.uniform(0, 0.1) * hiss  # a consonant
    sound *= 0.06 * 10 ** ((5 * energy + voice["loud"]) / 20) / sound.std()
    sound += 10 ** rng.uniform(-3.5, -2.3) * noise[::-1]  # the room
    for hertz in np.exp(rng.uniform(np.log(80), np.log(7500), 4)):
        sound += ROOM_TONES * 10 ** rng.uniform(-3, -2) * np.sin(2 * np.pi * hertz / RATE * np.arange(n))
    return np.clip(sound, -1, 1), talk.reshape(int(FPS * SECONDS), -1).mean(1)


def perform(raw, seed, index, name):
    """Write one clip of the demo, from random numbers of its own -> its name."""
    wav = f"{raw}/AudioWAV/{name}.wav"
    flv = f"{raw}/VideoFlash/{name}.flv"
    if os.path.exists(flv):
        return name
    number, sentence, emotion, level = name.split("_")
    look = draw_actor(seed, int(number))
    rng = np.random.default_rng([seed, index])
    intensity = LEVELS.get(level) or rng.uniform(LEVELS["LO"], LEVELS["HI"])
    mean = intensity * TABLE[emotion]
    expression = np.clip(mean[:6] + FACE_SPREAD * rng.normal(size=6) + look["rest"], -1.3, 1.3)
    sound, talk = say(look, sentence, mean[6:] + VOICE_SPREAD * rng.normal(size=7), rng)
    scipy.io.wavfile.write(wav + ".part", RATE, np.int16(32767 * sound))
    with av.open(f"file:{flv}.part", "w", format="flv", options={"flush_packets": "0"}) as movie:
        video = movie.add_stream("flv1", FPS, width=SIZE, height=SIZE, bit_rate=400_000)  # Sorenson H.263, silent
        for picture in act(look, expression, talk, rng):
            movie.mux(video.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        movie.mux(video.encode())
    for path in wav, flv:
        os.replace(path + ".part", path)  # a kill leaves no half file under the final name
    return name


# --- 7  Command line ---


def show(name, root="prepared"):
    """Draw a training clip of each class as it was prepared, flow with u red and v green -> path of the picture."""
    import matplotlib.pyplot as plt

    dataset = load(name, root)
    split = dataset.train
    chosen = np.unique(split.labels, return_index=True)[1][:6]
    size = (3 * len(split.arrays), 2 * len(chosen))
    figure, axes = plt.subplots(len(chosen), len(split.arrays), figsize=size, squeeze=False, layout="constrained")
    for line, k in zip(axes, chosen):
        for axis, (m, array) in zip(line, split.arrays.items()):
            x = array[split.rows[k]]
            if x.ndim == 4:  # (T, H, W, C): the frames side by side
                axis.imshow(np.pad(np.hstack(x), ((0, 0), (0, 0), (0, 3 - x.shape[-1])), constant_values=128))
            else:
                axis.imshow(x.reshape(-1, x.shape[-1]), origin="lower", aspect="auto", cmap="magma")
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"{m}, {split.ids[k]} ({dataset.classes[split.labels[k]]})", parse_math=False)
    path = Path(root) / name / "samples.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def overview(dataset):
    """Lines of 80 columns at most: clips per class and split, of many classes the extremes; warnings."""
    names = [f"{name[:46]:<46}" for name in dataset.classes]
    splits = dict(zip(SPLITS, (dataset.train, dataset.val, dataset.test)))
    counts = {name: np.bincount(split.labels, minlength=len(names)) for name, split in splits.items()}
    table = pd.DataFrame(counts, names)
    lines = (table if len(names) <= 40 else table.agg(["min", "max"])).to_string(col_space=8).splitlines()
    least = table.min().idxmin()
    if table[least].min() < 2:
        name = table[least].idxmin().strip()[:24]
        lines.append(f"warning: fewer than two clips, {table[least].min()}, of the class {name} in {least}")
    if len(dataset.val) < 10 * len(names):
        lines.append("warning: fewer than ten clips per class to validate on: purity gaps are mostly luck")
    nothing = np.float16(np.log(torch.finfo(torch.float).eps))  # the logarithm of it
    silent = []
    for split in splits.values():
        for m, array in split.arrays.items():
            if split.specs[m]["kind"] == "fbank":
                bands = array[split.rows[:, None], 0, [0, array.shape[2] // 2]]  # (N, 2, T), the lowest and the middle
                silent += [split.ids[k] for k in np.flatnonzero(np.isin(bands, (nothing, 0)).all((1, 2)))]
    if silent:
        lines.append(f"warning: silence is all that is heard in {len(silent):,} clips, as {silent[0]}"[:80])
    return lines


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"data.py: {message}; see --help\n")


def parse(words):
    """The command line as the keyword arguments of `prepare`, and `show`; a CSV is a dataset like the others."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="name", required=True, metavar="dataset (or a .csv)")
    tables = [word for word in words[:1] if word.lower().endswith(".csv")]
    for name in [*DATASETS, *tables]:
        lister = DATASETS.get(name, own_data)
        form = argparse.ArgumentDefaultsHelpFormatter
        p = commands.add_parser(name, description=lister.__doc__, formatter_class=form)
        p.add_argument("--out", type=Path, default=Path("prepared"), help="the arrays go to a folder in OUT")
        p.add_argument("--show", action="store_true", help="draw what was prepared, to samples.png beside the arrays")
        if name in tables:
            p.set_defaults(raw=Path(name))
            p.add_argument("--name", default=Path(name).stem, help="of the dataset")  # in place of the .csv
        elif name != "demo":
            p.add_argument("--raw", type=Path, help="the download")
        if name != "mosi":
            options = {"workers": cpu_count(), "max_bad": MAX_BAD.get(name, 5.0)}
            for option, default in {**options, **lister.__kwdefaults__}.items():
                of_type = str if default is None else type(default)
                p.add_argument(f"--{option.replace('_', '-')}", type=of_type, default=default, help=OPTIONS[option][0])
    return vars(parser.parse_args(words))


@contextmanager
def one_line_for_errors(program):
    """What the user can mend ends the program with one line that says how; so does Ctrl-C."""
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # no name and no ± ends it where output is ASCII
    try:
        yield
    except Exception as error:
        says = str(error)
        if is_out_of_memory(error):
            says = f"out of memory: a smaller --batch-size takes less, and fewer --workers ({error})"
            says = textwrap.shorten(says, 200)
        elif isinstance(error, OSError) and error.errno != errno.ENOENT:
            says += "; when that is mended, the same command resumes"
        elif not isinstance(error, (DataError, FloatingPointError, OSError)):
            raise
        print(f"{program}: {says}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command resumes", file=sys.stderr)
        sys.exit(130)


def main():
    args = parse(sys.argv[1:])
    folder = args["out"] / args["name"]
    with one_line_for_errors("data.py"):
        if args.pop("show"):
            print(show(args["name"], args["out"]))
            return
        if args.get("raw", "") is None:
            raise DataError(f"--raw is missing. {how_to_get(folder)}")
        made = (folder / "manifest.json").exists()
        prepare(**args)
        manifest = read_json(folder / "manifest.json")
        dataset = load(args["name"], args["out"])  # what is damaged is said
    if made:
        print(f"{folder} was there already; to prepare it anew, delete it")
    gigabytes = sum(p.stat().st_size for p in folder.glob("*/*.npy")) / 1e9
    counts = ", ".join(f"{len(ids):,} {s}" for s, ids in manifest["splits"].items())
    print(f"{folder}: {counts} clips, {gigabytes:.2f} GB; {len(manifest['skipped'])} skipped")
    for split, clip, problem in manifest["skipped"]:
        print(f"  {clip} ({split}): {problem}")
    print(*overview(dataset), sep="\n")


if __name__ == "__main__":
    main()
