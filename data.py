"""Prepare and load the datasets: from a raw download to memory-mapped arrays, and from those to batches.

    python data.py cremad   --raw CREMA-D          # frames from VideoFlash/*.flv, sound from AudioWAV/*.wav
    python data.py mosi     --raw aligned_50.pkl   # CMU-MOSI, one pickle of features
    python data.py demo                            # a miniature CREMA-D, drawn and synthesised: no download

What it leaves behind, and what training reads, is a folder of plain NumPy arrays:

    prepared/cremad/manifest.json                  classes, clip ids, parameters, what was skipped and why
    prepared/cremad/train/visual.npy               (N, T, H, W, 3) uint8
    prepared/cremad/train/audio.npy                (N, 1, F, T) float16
    prepared/cremad/train/labels.npy               (N,) int64, -1 for a clip that was skipped
"""

import argparse
import inspect
import json
import os
import pickle
import re
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import parent_process
from pathlib import Path

import av
import numpy as np
import scipy.io.wavfile
import scipy.signal
import torch
from PIL import Image, ImageDraw
from sklearn.model_selection import train_test_split
from tqdm import tqdm

# torchaudio's import insists on the CUDA version it was built with; its Kaldi features are plain tensor
# code and need none, so that check is told that there is no CUDA.
cuda_version, torch.version.cuda = torch.version.cuda, None
from torchaudio.compliance import kaldi  # noqa: E402

torch.version.cuda = cuda_version


class DataError(Exception):
    """Something about the data that the user has to mend; the message says what and how."""


class BadClip(Exception):
    """One clip that cannot be used; it is skipped, counted, and listed in the manifest."""


# ---------------------------------------------------------------------------------------------------
# 1  A prepared dataset: what is on disk, how it is loaded, batches
# ---------------------------------------------------------------------------------------------------


@dataclass
class Split:
    """One split of a prepared dataset. `arrays[m]` is the memory map of modality m, `rows` its usable rows."""

    arrays: dict  # {modality: (N, ...) memory map}
    specs: dict  # {modality: how it was made and how it is normalised}
    rows: np.ndarray  # (n,) rows of the arrays that hold a clip
    labels: np.ndarray  # (n,) int64
    ids: list  # n clip ids

    def __len__(self):
        return len(self.rows)


@dataclass
class Dataset:
    """What `load` returns: three splits, the class names, and the shape of one sample per modality."""

    name: str
    train: Split
    val: Split
    test: Split
    classes: list
    shapes: dict = field(default_factory=dict)  # {modality: shape of one sample as the encoder sees it}


def load(name, root="prepared", modalities=None):
    """Open a prepared dataset without reading it into memory.

    `modalities` picks some of them, in that order; the default is all. Raises DataError, with the
    commands that make the dataset, if it is not there.
    """
    folder = Path(root) / name
    if not (folder / "manifest.json").exists():
        raise DataError(how_to_get(name, folder))
    manifest = json.loads((folder / "manifest.json").read_text())
    chosen = list(modalities or manifest["modalities"])
    if unknown := [m for m in chosen if m not in manifest["modalities"]]:
        raise DataError(f"{name} has no modality {', '.join(unknown)}; it has {', '.join(manifest['modalities'])}")
    specs = {m: manifest["modalities"][m] for m in chosen}
    splits = {}
    for split, ids in manifest["splits"].items():
        labels = np.load(folder / split / "labels.npy")
        rows = np.flatnonzero(labels >= 0)
        arrays = {m: np.load(folder / split / f"{m}.npy", mmap_mode="r") for m in chosen}
        splits[split] = Split(arrays, specs, rows, labels[rows], [ids[r] for r in rows])
    shapes = {m: tuple(cut(splits["train"], m, splits["train"].rows[:1]).shape[1:]) for m in chosen}
    return Dataset(name, **splits, classes=manifest["classes"], shapes=shapes)


def cut(split, modality, rows, device="cpu"):
    """Rows of one modality as a normalised float tensor.

    frames (B, T, 3, H, W) and flow (B, T, 2, H, W), which stay channels-last in memory, the layout that
    convolutions are fastest on; fbank (B, 1, F, T); sequence (B, T, D), padding exactly 0.
    """
    spec = split.specs[modality]
    x = torch.from_numpy(split.arrays[modality][rows]).to(device).float()
    if spec["kind"] == "sequence":  # standardised when it was prepared
        return x
    x.sub_(torch.tensor(spec["mean"], device=device)).div_(torch.tensor(spec["std"], device=device))
    return x if spec["kind"] == "fbank" else x.movedim(-1, -3)


def batches(split, batch_size, seed=None, device="cpu"):
    """Yield ({modality: tensor (B, ...)}, labels (B,)) over one split, once.

    With a seed (an int or a tuple of ints) in random order, the same for the same seed; without, in the
    order of the clips. The last batch may be smaller: no clip is lost, none comes twice.
    """
    order = np.arange(len(split)) if seed is None else np.random.default_rng(seed).permutation(len(split))
    for start in range(0, len(order), batch_size):
        picked = np.sort(order[start : start + batch_size])  # ascending rows read the disk in one direction
        inputs = {m: cut(split, m, split.rows[picked], device) for m in split.arrays}
        yield inputs, torch.from_numpy(split.labels[picked]).to(device)


# ---------------------------------------------------------------------------------------------------
# 2  Reading media: a clip's files to arrays. PyAV's wheels carry FFmpeg.
# ---------------------------------------------------------------------------------------------------


def read_frames(path, spec):
    """Frames at the middles of equal parts of a video, squeezed to squares: (count, size, size, 3) uint8.

    Frame number i of `count` is the one at (i + 1/2) / count of the clip. Packets are cheap to read and
    dear to decode: all are read, so that the length is known even where the container does not tell it,
    and decoding begins at the last keyframe before each frame that is wanted.
    """
    count, size = spec["count"], spec["size"]
    with open_media(path) as container:
        if not container.streams.video:
            raise BadClip(f"{path.name}: no picture")
        stream = container.streams.video[0]
        packets = [p for p in container.demux(stream) if p.size]
        if not packets:
            raise BadClip(f"{path.name}: no frame")
        if len(packets) < 0.9 * stream.frames:
            raise BadClip(f"{path.name}: truncated, {len(packets)} of {stream.frames} frames are there")
        last = len(packets)
        if "longest" in spec and stream.average_rate:
            last = min(last, max(1, round(spec["longest"] * float(stream.average_rate))))
        wanted = [int((i + 0.5) * last / count) for i in range(count)]
        frames = decode(stream, packets, wanted, trust_times=container.format.name != "avi")
        if missing := [i for i in wanted if i not in frames]:
            raise BadClip(f"{path.name}: broken, frame {missing[0]} of {len(packets)} cannot be decoded")
        # one thread: for a picture, starting several takes ten times as long as the work
        pictures = {i: f.reformat(size, size, "rgb24", threads=1).to_ndarray() for i, f in frames.items()}
    return np.stack([pictures[i] for i in wanted])


def decode(stream, packets, wanted, trust_times=True):
    """{i: frame} for the frames `wanted`, counted in the order in which they are shown.

    A keyframe is a safe place to begin at when all packets before it are shown before it, and all after it
    later: then the first frame out of the decoder is the keyframe's own number. (AVI stores no such times.)
    """
    times = [p.pts for p in packets] if trust_times else [None]
    starts = [0]
    if None not in times:
        before = np.maximum.accumulate([-(2**62), *times[:-1]])
        after = np.minimum.accumulate([2**62, *times[:0:-1]])[::-1]
        starts += [k for k in range(1, len(times)) if packets[k].is_keyframe and before[k] < times[k] < after[k]]
    codec, frames, shown, fed = stream.codec_context, {}, 0, 0
    codec.thread_count = 1  # the clips are what runs in parallel
    for i in sorted(set(wanted)):
        start = max(s for s in starts if s <= i)
        if start > fed:
            codec.flush_buffers()
            shown = fed = start
        while shown <= i and fed <= len(packets):
            for frame in codec.decode(packets[fed] if fed < len(packets) else None):
                if shown in wanted:
                    frames[shown] = frame
                shown += 1
            fed += 1
    return frames


def read_sound(path, rate=16000):
    """A file's sound as mono float32 in [-1, 1] at `rate` samples a second: (samples,)."""
    with open_media(path) as container:
        if not container.streams.audio:
            raise BadClip(f"{path.name}: no sound")
        codec = container.streams.audio[0].codec_context
        if (codec.rate, codec.channels, codec.format.name) == (rate, 1, "s16"):  # as it should be: nothing to resample
            chunks = [frame.to_ndarray()[0] / np.float32(32768) for frame in container.decode(audio=0)]
        else:
            resample = av.AudioResampler(format="flt", layout="mono", rate=rate).resample
            chunks = [f.to_ndarray()[0] for frame in container.decode(audio=0) for f in resample(frame)]
            chunks += [f.to_ndarray()[0] for f in resample(None)]
    if sum(map(len, chunks)) < 400:  # one window of 25 ms
        raise BadClip(f"{path.name}: no sound")
    return np.concatenate(chunks)


def fbank(sound, spec, rate=16000):
    """Kaldi's log-mel filter banks as the official code takes them: (1, bins, frames) float16.

    Mean removed, Hanning window of 25 ms every `shift` ms, no dither; cut or padded with zeros to
    `seconds`. (D&R's and AST's code pad before they normalise: zero is a loud value, and it is theirs.)
    """
    wave = torch.from_numpy(sound - sound.mean())[None]  # (1, samples)
    mel = kaldi.fbank(wave, sample_frequency=rate, num_mel_bins=spec["bins"], frame_shift=spec["shift"],
                      window_type="hanning", htk_compat=True, use_energy=False, dither=0.0)  # fmt: skip
    frames = spec["shape"][-1]
    mel = torch.nn.functional.pad(mel[:frames], (0, 0, 0, max(0, frames - len(mel))))
    return mel.T[None].half().numpy()


def open_media(path):
    """Open a file with FFmpeg; what is missing, empty or a git-lfs stub is a bad clip with a plain reason."""
    if not path.exists():
        raise BadClip(f"{path.parent.name}/{path.name}: missing")
    if is_stub(path):
        raise BadClip(f"{path.name}: git-lfs stub, never fetched")
    return av.open(str(path))


def is_stub(path):
    """Whether a file is git-lfs's placeholder: what a clone without git-lfs holds instead of media."""
    with open(path, "rb") as file:
        return file.read(40).startswith(b"version https://git-lfs.github.com/spec")


READERS = {"frames": read_frames, "fbank": lambda path, spec: fbank(read_sound(path), spec)}


def frames_spec(count, size, **more):
    """How pictures are kept; normalised with ImageNet's mean and deviation, in units of 0..255."""
    return {"kind": "frames", "count": count, "size": size, "shape": [count, size, size, 3], "dtype": "uint8",
            "mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], **more}  # fmt: skip


def fbank_spec(bins, seconds, shift=10.0):
    """How sound is kept; normalised as the official code does, (x + 4.503877) / (2 * 5.141276)."""
    return {"kind": "fbank", "bins": bins, "shift": shift, "shape": [1, bins, round(seconds * 1000 / shift)],
            "dtype": "float16", "mean": -4.503877, "std": 2 * 5.141276}  # fmt: skip


# ---------------------------------------------------------------------------------------------------
# 3  The datasets: from a raw folder to clips. One lister each; its keyword arguments are its options.
# ---------------------------------------------------------------------------------------------------


@dataclass
class Clip:
    """One sample before it is prepared: where its files are, what it shows, which split it is in."""

    id: str
    label: int
    split: str  # train, val or test
    files: dict  # {modality: path}


EMOTIONS = ["ANG", "DIS", "FEA", "HAP", "NEU", "SAD"]



def cremad(raw, frames=2, size=224, seconds=3.0, split="clips", split_dir=None):
    """CREMA-D: 7,442 clips, 91 actors, six emotions -> (clips, classes, specs).

    split "clips" is random over clips and stratified, 80 / 10 / 10, as in the paper: every actor is in
    all three. "actors" holds out whole actors. `split_dir` holds my_train.csv (or train.csv), val.csv and
    test.csv with lines `id,EMO` instead.
    """
    name = re.compile(r"\d{4}_[A-Z]{3}_([A-Z]{3})_[A-Z]{2}")
    stems = {p.stem for kind in ("VideoFlash/*.flv", "AudioWAV/*.wav") for p in raw.glob(kind)}
    ids = sorted(s for s in stems if (m := name.fullmatch(s)) and m[1] in EMOTIONS)
    if not ids:
        raise DataError(f"{raw} holds no CREMA-D: expected VideoFlash/<id>.flv and AudioWAV/<id>.wav")
    if split_dir:
        splits = read_splits(Path(split_dir), ids)
    else:
        splits = draw_splits(ids, round(0.1 * len(ids)), round(0.1 * len(ids)), by_actor=split == "actors")
    clips = [
        Clip(i, EMOTIONS.index(i[9:12]), s,
             {"audio": raw / "AudioWAV" / f"{i}.wav", "visual": raw / "VideoFlash" / f"{i}.flv"})
        for s in ("train", "val", "test") for i in splits[s]
    ]  # fmt: skip
    # one clip of the real set runs on for a minute after a sentence of three seconds
    return clips, EMOTIONS, {"audio": fbank_spec(128, seconds), "visual": frames_spec(frames, size, longest=10)}


def draw_splits(ids, n_val, n_test, by_actor=False, seed=0):
    """{split: ids}: validation and test drawn at random, with the emotions in equal shares or by whole actors."""
    if by_actor:
        actors = np.random.default_rng(seed).permutation(sorted({i[:4] for i in ids}))
        test = round(n_test / len(ids) * len(actors))
        val = test + round(n_val / len(ids) * len(actors))
        where = {a: "test" if k < test else "val" if k < val else "train" for k, a in enumerate(actors)}
        return {s: [i for i in ids if where[i[:4]] == s] for s in ("train", "val", "test")}
    draw = partial(train_test_split, random_state=seed)
    rest, test = draw(ids, test_size=n_test, stratify=[i[9:12] for i in ids])
    train, val = draw(rest, test_size=n_val, stratify=[i[9:12] for i in rest])
    return {"train": sorted(train), "val": sorted(val), "test": sorted(test)}


def read_splits(folder, ids):
    """{split: ids} from CREMA-D's circulating split files; a wrong id, label or overlap is an error."""
    known, splits, seen = set(ids), {}, {}
    for split in ("train", "val", "test"):
        names = ["my_train.csv", "train.csv"] if split == "train" else [f"{split}.csv"]
        path = next((folder / n for n in names if (folder / n).exists()), None)
        if path is None:
            raise DataError(f"{folder} has no {names[0]}: it takes my_train.csv (or train.csv), val.csv and test.csv")
        rows = [line.strip().split(",") for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
        rows = rows[1:] if rows[0][-1] not in EMOTIONS else rows  # some files have a header line
        for number, row in enumerate(rows, 1):
            if row[0] not in known:
                raise DataError(f"{path}, clip {number}: {row[0]} is not among the raw files")
            if row[-1] != row[0][9:12]:
                raise DataError(f"{path}, clip {number}: {row[0]} is labelled {row[-1]}, its name says {row[0][9:12]}")
            if row[0] in seen:
                raise DataError(f"{path}, clip {number}: {row[0]} is in {seen[row[0]]} already")
            seen[row[0]] = path.name
        splits[split] = [row[0] for row in rows]
    return splits


def demo(raw, clips=2300, seed=0):
    """The miniature CREMA-D: written to `raw` as real files, then listed and read as CREMA-D is.

    1,200 / 300 / 800 clips at the default size; one frame of 48 x 48 pixels, 48 mel bands, 1.2 s.
    """
    make_demo(raw, clips, seed)
    ids = sorted(p.stem for p in (raw / "AudioWAV").glob("*.wav"))
    splits = draw_splits(ids, clips * 300 // 2300, clips * 800 // 2300)
    listed, classes, _ = cremad(raw)
    where = {i: s for s in splits for i in splits[s]}
    for clip in listed:
        clip.split = where[clip.id]
    return listed, classes, {"audio": fbank_spec(48, 1.2, shift=25.0), "visual": frames_spec(1, 48)}


LISTERS = {"cremad": cremad, "demo": demo}

SOURCES = {
    "cremad": "CREMA-D, 7.5 GB, with git-lfs:\n  git lfs install\n  git clone https://github.com/CheyneyComputerScience/CREMA-D",
    "mosi": "CMU-MOSI features, one pickle: aligned_50.pkl or unaligned_50.pkl (MMSA,\n"
            "  https://github.com/thuiar/MMSA) or mosi_raw.pkl (MultiBench, https://github.com/pliang279/MultiBench)",
}  # fmt: skip
RAW_NAMES = {"cremad": "CREMA-D", "mosi": "aligned_50.pkl"}


def how_to_get(name, folder):
    """What to do when a prepared dataset is not there."""
    if name not in SOURCES:
        return f"there is no dataset {name}; there are demo, {', '.join(SOURCES)}"
    out = "" if folder.parent == Path("prepared") else f" --out {folder.parent}"
    return (f"{name} is not prepared: {folder} holds no manifest.json.\n1. Get {SOURCES[name]}\n"
            f"2. Prepare it:  python data.py {name} --raw {RAW_NAMES[name]}{out}\n"
            f"Or see the method at work now:  python dr.py --dataset demo")  # fmt: skip


class PlainUnpickler(pickle.Unpickler):
    """Unpickles containers, strings, numbers and NumPy arrays, and nothing that could run code."""

    ALLOWED = {
        ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"), ("collections", "OrderedDict"),
        *((f"numpy.{core}.multiarray", f) for core in ("core", "_core") for f in ("_reconstruct", "scalar")),
        *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    }  # fmt: skip

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise DataError(f"the pickle asks for {module}.{name}, which is no plain data: it was not loaded")
        return super().find_class(module, name)


def prepare_mosi(raw, out):
    """CMU-MOSI from one pickle in MMSA's or MultiBench's layout: text, audio and vision as (N, T, D).

    Values that are not finite become the mean, every feature is standardised with the training set's
    statistics over what is not padding, and padding is exactly 0. Two classes: sentiment < 0, and >= 0.
    """
    try:
        with open(raw, "rb") as file:
            pickled = PlainUnpickler(file, encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, AttributeError, IndexError) as error:
        hint = "a git-lfs stub: run `git lfs pull`" if is_stub(raw) else f"not a whole pickle ({error})"
        raise DataError(f"{raw} cannot be read: it is {hint}") from None
    splits = {"train": "train", "val": "valid", "test": "test"}
    modalities = ("text", "audio", "vision")
    try:
        raw_arrays = {s: {m: np.asarray(pickled[key][m], np.float32) for m in modalities} for s, key in splits.items()}
        labels = {s: np.asarray(next(pickled[key][k] for k in ("regression_labels", "labels") if k in pickled[key]),
                                np.float32).reshape(-1) for s, key in splits.items()}  # fmt: skip
        ids = {s: [str(i) for i in np.asarray(pickled[key]["id"]).reshape(len(labels[s]), -1)[:, 0]]
               for s, key in splits.items()}  # fmt: skip
    except (KeyError, TypeError, StopIteration, ValueError) as error:
        raise DataError(f"{raw} is not laid out as MMSA's or MultiBench's CMU-MOSI: {error!r}; expected "
                        "{'train' | 'valid' | 'test': {'text', 'audio', 'vision', 'id', 'regression_labels' or 'labels'}}"
                        ) from None  # fmt: skip
    folder = Path(out) / "mosi"
    specs = {}
    for m in modalities:
        present = {s: ~padding(raw_arrays[s][m], m, pickled[splits[s]]) for s in splits}  # (N, T)
        values = np.where(np.isfinite(raw_arrays["train"][m]), raw_arrays["train"][m], np.nan)[present["train"]]
        mean, std = np.nanmean(values, 0), np.nanstd(values, 0)  # (D,)
        for s in splits:
            x = (raw_arrays[s][m] - mean) / np.where(std > 1e-6, std, 1)
            x = np.where(np.isfinite(x), x, 0) * present[s][..., None]
            (folder / s).mkdir(parents=True, exist_ok=True)
            np.save(folder / s / f"{m}.npy", x.astype(np.float32))
        specs[m] = {"kind": "sequence", "shape": list(raw_arrays["train"][m].shape[1:]), "dtype": "float32"}
    for s in splits:
        if not np.isfinite(labels[s]).all():
            raise DataError(f"{raw}: a label of {s} is not a number")
        np.save(folder / s / "labels.npy", (labels[s] >= 0).astype(np.int64))
    write_json(folder / "manifest.json", {
        "dataset": "mosi", "options": {"raw": Path(raw).name}, "classes": ["negative", "non-negative"],
        "modalities": specs, "splits": ids, "skipped": [],
    })  # fmt: skip
    return folder


def padding(x, modality, pickled):
    """Which steps of (N, T, D) are padding, (N, T) bool: by the pickle's lengths if it has them, else all-zero rows."""
    steps = np.arange(x.shape[1])
    if f"{modality}_lengths" in pickled:
        return steps[None] >= np.asarray(pickled[f"{modality}_lengths"]).reshape(-1, 1)
    if modality == "text" and np.ndim(pickled.get("text_bert")) == 3:  # (N, 3, T): ids, mask, segments
        return np.asarray(pickled["text_bert"])[:, 1] == 0
    return (x == 0).all(-1)

# ---------------------------------------------------------------------------------------------------
# 4  The demo: a miniature CREMA-D of cartoon actors with babbling voices, in the layout of the real one
# ---------------------------------------------------------------------------------------------------

FACE_SPREAD = 0.2  # scatter of the faces of one emotion: the larger, the harder the picture
VOICE_SPREAD = 0.5  # scatter of the voices of one emotion: the larger, the harder the sound
ROOM_TONES = 2.0  # loudness of what hums in the room, different in every clip: easily learnt by heart
SIZE, FPS, SECONDS, RATE = 96, 10, 1.2, 16_000
MP3_RATE = 11_025  # the lowest rate that Flash takes: encoding MP3 is what costs most of the time
ACTORS = range(1001, 1049)
LEVELS = {"LO": 0.6, "MD": 0.8, "HI": 1.0}  # intensity; XX, unspecified: anywhere from LO to HI
# fmt: off
# slope > 0: the inner ends of the brows up; skew: one brow and one corner of the mouth up
#           mouth       brows                     |  pitch
#           curve open  slope height  skew  eyes  |  level range contour energy rate breath bright
TABLE = {
    "ANG": ((-0.6, -0.1, -1.1, -0.7, 0.0, -0.3), ( 0.4,  0.6, -0.5,  1.1,  0.3, -0.4,  0.9)),
    "DIS": ((-0.6,  0.1, -0.4, -0.3, 1.1, -0.6), (-0.4,  0.1, -0.7,  0.0, -0.6,  0.3, -0.1)),
    "FEA": ((-0.3,  0.7,  0.6,  0.9, 0.0,  0.9), ( 1.0, -0.2,  0.6,  0.2,  0.7,  0.7,  0.1)),
    "HAP": (( 1.1,  0.4,  0.0,  0.3, 0.0, -0.1), ( 0.8,  0.9,  0.4,  0.5,  0.2, -0.1,  0.4)),
    "NEU": (( 0.0,  0.0,  0.0,  0.0, 0.0,  0.0), ( 0.0,  0.0,  0.0,  0.0,  0.0,  0.0,  0.0)),
    "SAD": ((-0.9,  0.0,  1.0,  0.1, 0.0, -0.6), (-0.4, -0.7, -0.4, -0.9, -0.6,  0.6, -0.7)),
}
FORMANTS = {"a": (730, 1090, 2440, 3500), "e": (530, 1840, 2480, 3500), "i": (290, 2250, 2950, 3500),
            "o": (500, 850, 2410, 3500), "u": (320, 870, 2240, 3500)}  # Hz
VOWELS = {"IEO": "ieeeoo", "TIE": "aieaiae", "IOM": "aioaei", "IWW": "auaiiau", "TAI": "aeeioou", "MTI": "eiuooiio",
          "IWL": "auaiuao", "ITH": "aiaaoue", "DFA": "ooeaae", "ITS": "aiaiiio", "TSI": "auaii", "WSI": "ioiauoii"}
SKINS = (255, 224, 196), (244, 204, 168), (228, 178, 136), (196, 140, 100), (158, 106, 74), (124, 84, 62)
HAIRS = (34, 26, 28), (66, 42, 32), (112, 70, 40), (150, 150, 150), (172, 76, 40), (190, 122, 56), (226, 186, 98)
IRISES = (70, 44, 28), (60, 104, 64), (56, 104, 160), (96, 100, 108)
CLOTHES = (196, 78, 82), (76, 114, 176), (85, 148, 110), (221, 160, 70), (129, 114, 179), (240, 236, 226)
WALLS = (168, 200, 214), (232, 206, 178), (190, 208, 172), (206, 190, 216), (220, 220, 214), (150, 166, 190)
STYLES = {"bald": [], "short": [(-0.3j, 0.92, 0.84)], "bun": [(-1.15j, 0.36, 0.3)], "bob": [(0.05j, 1.06, 1.08)],
          "curly": [(0.95 * np.exp(1j * a) - 0.1j, 0.26, 0.26) for a in np.linspace(-3.3, 0.16, 11)],
          "long": [(-0.2j, 1.04, 0.98), (0.75j, 0.98, 0.75)]}  # ovals behind the head: centre, width, height
BLACK, WHITE, BLUSH, SHADOW = (16, 12, 12), (250, 250, 248), (200, 60, 60), (90, 30, 30)
# fmt: on
CIRCLE, LINE = np.exp(2j * np.pi * np.arange(32) / 32), np.linspace(-1, 1, 15)
BEND = 1 - LINE**2

def draw_actor(seed, number):
    """The looks and the voice of one actor, the same in every clip."""
    rng = np.random.default_rng([seed, 10_000 + number])
    pick = lambda choices: choices[rng.integers(len(choices))]  # noqa: E731
    skin, (pitch, formants) = rng.integers(len(SKINS)), pick(((110, 1.0), (200, 1.14), (270, 1.28)))
    return dict(
        skin=SKINS[skin], hair=pick(HAIRS[: 7 - skin]), iris=pick(IRISES), clothes=pick(CLOTHES),
        wall=pick(WALLS), style=pick(list(STYLES)), width=rng.uniform(0.76, 0.9), jaw=rng.uniform(0, 0.14),
        gap=rng.uniform(0.31, 0.36), nose=rng.uniform(0.09, 0.14), part=rng.uniform(-0.2, 0.2),
        light=rng.uniform(0.82, 1), size=rng.uniform(62, 70), tilt=rng.normal(0, 0.04), place=rng.normal(0, 3, 2),
        rest=rng.normal(0, 0.15, 6), pitch=pitch * 2 ** rng.normal(0, 0.12),
        formants=formants * 2 ** rng.normal(0, 0.05), loud=rng.normal(0, 2), bright=rng.normal(0, 0.4),
    )  # fmt: skip

def mix(colour, other, part):
    return tuple(int((1 - part) * a + part * b) for a, b in zip(colour, other))

def oval(centre, width, height):
    return centre + width * CIRCLE.real + 1j * height * CIRCLE.imag

def draw_face(paint, look, expression):
    """All but the mouth; paint(colour, z) fills the outline z = x + iy, y down, where the head is 2 high."""
    _, _, slope, height, skew, eyes = expression
    skin, hair, shadow = look["skin"], look["hair"], mix(look["skin"], SHADOW, 0.18)
    for part in STYLES[look["style"]]:
        paint(hair, oval(*part))
    paint(look["clothes"], oval(1.78j, 1.25, 0.7))
    for spot in (0.95j, 0.33, 0.36), (0.1j - look["width"], 0.13, 0.2), (0.1j + look["width"], 0.13, 0.2):
        paint(shadow, oval(*spot))  # neck and ears
    head = look["width"] * CIRCLE.real * (1 - look["jaw"] * CIRCLE.imag) + 1j * CIRCLE.imag
    paint(skin, head)
    crown, x = 1.1 * head[16:], head[16:].real / look["width"]
    if look["style"] != "bald":
        paint(hair, crown, crown.real + 1j * np.maximum(0.55 * x**4 + look["part"] * x - 0.62, crown.imag))
    for side in -1, 1:
        eye, tall = side * look["gap"] - 0.06j, 0.2 + 0.04 * np.clip(eyes, 0, 1.5)
        paint(mix(skin, BLUSH, 0.15), oval(1.4 * eye.real + 0.33j, 0.15, 0.1))
        paint(WHITE, oval(eye, 0.21, tall))
        paint(look["iris"], oval(eye, 0.12, 0.12))
        paint(BLACK, oval(eye, 0.07, 0.07))
        paint(WHITE, oval(eye + 0.045 - 0.05j, 0.03, 0.03))
        across, socket = eye + 0.215 * LINE, 1j * tall * np.sqrt(BEND)
        lid = across + socket * (1 - 2 * np.clip(0.74 + 0.36 * eyes, 0.2, 1))
        paint(shadow, across - 1.08 * socket, lid)
        paint(BLACK, lid - 0.025j, lid + 0.02j)
        rise = 0.37 + 0.09 * height - 0.12 * slope * side * LINE + 0.05 * BEND + 0.09 * side * skew
        brow, thick = 1.03 * eye.real + 0.25 * LINE - 1j * rise, 0.05j * np.sqrt(0.1 + 0.9 * BEND)
        paint(mix(hair, BLACK, 0.35), brow - thick, brow + thick)
    paint(shadow, oval(0.2j, look["nose"], 0.07))
    paint(mix(skin, WHITE, 0.06), oval(0.165j, 0.9 * look["nose"], 0.075))

def draw_mouth(paint, look, expression, talk):
    """talk, 0 to 1: how far the syllable opens the mouth."""
    curve, opening, skew = expression[[0, 1, 4]]
    gap, lip = 0.32j * np.clip(opening + 0.6 * talk, 0.06, 1.1) * BEND**0.7, 0.045j * np.sqrt(BEND)
    height = 0.5 + 0.12 * curve * (0.8 - 1.6 * LINE**2) - 0.07 * skew * LINE
    top = (0.34 + 0.02 * curve - 0.06 * talk) * LINE + 1j * height - 0.3 * gap
    paint(mix(look["skin"], BLUSH, 0.5), top - 0.8 * lip, top + gap + 1.2 * lip)
    paint((70, 18, 26), top, top + gap)
    paint((206, 92, 96), top + 0.65 * gap, top + gap)  # tongue
    paint(WHITE, top, top + 1j * np.clip(gap.imag - 0.05, 0, 0.08))  # teeth

def act(look, expression, talk, rng):
    """expression (6,), talk (12,) -> 12 pictures (96, 96, 3) uint8, painted at twice the size."""
    light, (x, y) = look["light"] * rng.uniform(0.9, 1.08), SIZE + look["place"] + rng.normal(0, 3.5, 2)
    turn = look["size"] * 2 ** rng.normal(0, 0.045) * np.exp(1j * (look["tilt"] + rng.normal(0, 0.07)))
    wall = Image.new("RGB", (2 * SIZE, 2 * SIZE), mix(BLACK, look["wall"], light))
    ramp = Image.linear_gradient("L").resize(wall.size).convert("RGB")
    image, pictures = Image.blend(wall, ramp, -0.12), {}  # brighter above
    draw = ImageDraw.Draw(image)
    def paint(colour, edge, back=()):
        z = x + 1j * (y + 6) + turn * np.concatenate([edge, back[::-1]])
        draw.polygon(z.view(float).tolist(), mix(BLACK, colour, light))
    draw_face(paint, look, expression)
    silent, talk = image.copy(), np.round(4 * talk) / 4  # few mouths, each drawn once, to save time
    for opening in set(talk):
        image.paste(silent)
        draw_mouth(paint, look, expression, opening)
        pictures[opening] = np.asarray(image.reduce(2))
    return [pictures[opening] for opening in talk]

def resonate(sound, formants):
    """Two-pole resonances in a row: y[t] = (1 - b - c) x[t] + b y[t-1] + c y[t-2]."""
    radius = np.exp(-np.pi * (60 + 0.05 * formants) / RATE)
    b, c, zero = 2 * radius * np.cos(2 * np.pi * formants / RATE), -(radius**2), 0 * formants
    return scipy.signal.sosfilt(np.stack([1 - b - c, zero, zero, zero + 1, -b, -c], axis=1), sound)

def say(voice, sentence, tone, rng):
    """4 to 8 syllables; tone (7,) as in TABLE -> sound (19200,) in [-1, 1], talk (12,) in [0, 1]."""
    level, spread, contour, energy, rate, breath, bright = tone
    n = int(RATE * SECONDS)
    u, noise = np.linspace(0, 1, n), rng.normal(size=n)
    count = int(np.clip(round(5.6 * 2 ** (0.45 * rate)), 4, 8))
    accent = np.interp(u, np.linspace(0, 1, count + 2), 0.1 * 2**spread * rng.normal(size=count + 2))
    pitch = voice["pitch"] * np.exp2(0.45 * level + 0.6 * (contour - 0.2) * (u - 0.5) + accent)
    p = np.cumsum(pitch) / RATE % 1 / 0.7  # the glottis is open for 0.7 of a period: flow p^2 (1 - p)
    source = (2 * p - 3 * p * p) * (p < 1) + 0.08 * 2 ** (1.5 * breath) * noise
    dark = 0.95 / (1 + np.exp(1.2 * (bright + voice["bright"])))
    source = scipy.signal.lfilter([1 - dark], [1, -dark], source)
    sound, talk = np.zeros(n), np.zeros(n)
    edges = np.linspace(0.03 * n, 0.95 * n, count + 1).astype(int)
    for vowel, start, stop in zip(2 * VOWELS[sentence], edges, edges[1:]):
        swell = rng.uniform(0.7, 1) * np.sqrt(np.sin(np.linspace(0, 3.14, stop - start)))
        sound[start:stop] = swell * resonate(source[start:stop], voice["formants"] * np.array(FORMANTS[vowel]))
        talk[start:stop] = swell * FORMANTS[vowel][0] / 730  # the first formant follows the jaw
        hiss = np.diff(noise[start : start + 481]) * np.exp(-np.arange(480) / rng.uniform(40, 160))
        sound[start : start + 480] += rng.uniform(0, 0.1) * hiss  # a consonant
    sound *= 0.06 * 10 ** ((5 * energy + voice["loud"]) / 20) / sound.std()
    sound += 10 ** rng.uniform(-3.5, -2.3) * noise[::-1]  # the room
    for hertz in np.exp(rng.uniform(np.log(80), np.log(7500), 4)):
        sound += ROOM_TONES * 10 ** rng.uniform(-3, -2) * np.sin(2 * np.pi * hertz / RATE * np.arange(n))
    return np.clip(sound, -1, 1), talk.reshape(int(FPS * SECONDS), -1).mean(1)

def film(path, pictures, sound):
    """pictures (96, 96, 3) uint8 each, sound (samples,) int16 -> a Flash video: Sorenson H.263 and MP3."""
    heard = np.int16(np.interp(np.arange(0, len(sound), RATE / MP3_RATE), np.arange(len(sound)), sound))
    with av.open(path, "w", format="flv", options={"flush_packets": "0"}) as movie:
        video = movie.add_stream("flv1", FPS, width=SIZE, height=SIZE, bit_rate=400_000)
        audio = movie.add_stream("libmp3lame", MP3_RATE, layout="mono", bit_rate=48_000,
                                 options={"compression_level": "9"})  # fmt: skip
        frame = av.AudioFrame.from_ndarray(heard[None], "s16p", "mono")
        frame.sample_rate = MP3_RATE
        packets = audio.encode(frame) + audio.encode()
        for picture in pictures:
            packets += video.encode(av.VideoFrame.from_ndarray(picture, "rgb24"))
        movie.mux(packets + video.encode())

def perform(raw, seed, index, name):
    """Write one clip of the demo, from random numbers of its own."""
    wav, flv = f"{raw}/AudioWAV/{name}.wav", f"{raw}/VideoFlash/{name}.flv"
    if os.path.exists(flv):
        return
    number, sentence, emotion, level = name.split("_")
    look, rng = draw_actor(seed, int(number)), np.random.default_rng([seed, index])
    intensity = LEVELS.get(level) or rng.uniform(LEVELS["LO"], LEVELS["HI"])
    face, voice = (intensity * np.array(row) for row in TABLE[emotion])
    expression = np.clip(face + FACE_SPREAD * rng.normal(size=6) + look["rest"], -1.3, 1.3)
    sound, talk = say(look, sentence, voice + VOICE_SPREAD * rng.normal(size=7), rng)
    sound = np.int16(32767 * sound)
    scipy.io.wavfile.write(wav + ".part", RATE, sound)
    film(flv + ".part", act(look, expression, talk, rng), sound)
    for path in wav, flv:
        os.replace(path + ".part", path)  # a kill leaves no half file under the final name

def make_demo(raw, clips=2300, seed=0):
    """Draw and synthesise the clips (3,456 at most), the emotions in turn; clip i depends on nothing but seed and i."""
    rng, drawn = np.random.default_rng(seed), []
    for emotion in TABLE:
        levels = ["XX"] if emotion == "NEU" else ["XX", *LEVELS]
        names = [f"{a}_{s}_{emotion}_{level}" for a in ACTORS for s in VOWELS for level in levels]
        drawn.append(rng.permutation(names).tolist())
    names = [name for turn in zip(*drawn) for name in turn][:clips]
    for folder in "AudioWAV", "VideoFlash":
        (raw / folder).mkdir(parents=True, exist_ok=True)
    jobs = [(raw, seed, index, name) for index, name in enumerate(names)]
    with closing(in_parallel(perform, jobs)) as done:
        for _ in tqdm(done, "drawing the demo", len(jobs), unit=" clips", disable=None, ncols=78):
            pass


# ---------------------------------------------------------------------------------------------------
# 5  Preparing: on all cores, in place, and going on where it was stopped
# ---------------------------------------------------------------------------------------------------


def prepare(name, raw=None, out="prepared", workers=None, max_bad=5.0, **options):
    """Turn a raw download into `out`/`name`; `options` are the keyword arguments of the dataset's lister.

    Every clip has its row in arrays that are made at full size first; workers write rows in place, and a
    journal says which are safely on disk. Stopped at any moment, the same call goes on; the arrays come out
    the same byte for byte. Raises DataError for all that the user can mend, among it more than `max_bad` per
    cent of clips that cannot be used. Returns the folder.
    """
    if name == "mosi":
        return prepare_mosi(Path(raw), out)
    folder = Path(out) / name
    lister = LISTERS[name]
    defaults = {k: p.default for k, p in inspect.signature(lister).parameters.items() if k != "raw"}
    options = {**defaults, **{k: str(v) if isinstance(v, Path) else v for k, v in options.items()}}
    for made in ("manifest.json", "plan.json"):
        if (folder / made).exists() and (before := json.loads((folder / made).read_text())["options"]) != options:
            changed = ", ".join(f"{k} {before.get(k)} -> {v}" for k, v in options.items() if before.get(k) != v)
            raise DataError(f"{folder} was made with other parameters ({changed}): delete it, or give another --out")
    if (folder / "manifest.json").exists():
        return folder
    raw = Path(raw or folder / "raw")
    if name != "demo" and not raw.is_dir():
        raise DataError(f"--raw {raw}: no such folder")
    folder.mkdir(parents=True, exist_ok=True)
    clips, classes, specs = lister(raw, **options)
    refuse_stubs(clips, raw)

    ids = {s: [c.id for c in clips if c.split == s] for s in ("train", "val", "test")}
    plan = {"dataset": name, "options": options, "classes": classes, "modalities": specs, "splits": ids}
    if (folder / "plan.json").exists() and json.loads((folder / "plan.json").read_text()) != plan:
        raise DataError(f"{folder} was begun with other clips than {raw} holds now: delete it to begin again")
    paths = make_arrays(folder, specs, ids)
    write_json(folder / "plan.json", plan)
    journal = folder / "journal.txt"
    done = set(journal.read_text().splitlines()) if journal.exists() else set()
    row = {s: {i: r for r, i in enumerate(ids[s])} for s in ids}
    todo = [(c, row[c.split][c.id]) for c in clips if f"{c.split} {row[c.split][c.id]}" not in done]

    bad, safe, saved = [], [], time.monotonic()
    progress = tqdm(total=len(clips), initial=len(done), unit=" clips", desc=name, disable=None, ncols=78)
    try:
        with progress, closing(in_parallel(partial(prepare_clip, folder, specs), todo, workers)) as results:
            for clip, r, reason in results:
                progress.update()
                if reason:
                    bad.append([clip.split, clip.id, reason])
                else:
                    safe.append(f"{clip.split} {r}")
                if len(bad) > max_bad / 100 * len(clips):
                    raise DataError(f"{len(bad)} of {len(clips):,} clips cannot be used, more than --max-bad {max_bad:g} "
                                    f"per cent. The last: {reason}")  # fmt: skip
                if time.monotonic() - saved > 2:
                    save_journal(journal, safe, paths)
                    saved = time.monotonic()
    finally:
        save_journal(journal, safe, paths)

    skipped = {(s, i) for s, i, _ in bad}
    for s in ids:
        label = {c.id: -1 if (s, c.id) in skipped else c.label for c in clips if c.split == s}
        np.save(folder / s / "labels.npy", np.array([label[i] for i in ids[s]], np.int64))
    write_json(folder / "manifest.json", {**plan, "skipped": sorted(bad)})
    journal.unlink()
    (folder / "plan.json").unlink()
    return folder


def in_parallel(work, jobs, workers=None):
    """Yield work(*job) for every job, in order, from a pool of processes: one a core, or `workers` of them."""
    pool = ProcessPoolExecutor(workers or os.cpu_count(), initializer=start_worker)
    try:
        yield from pool.map(work, *zip(*jobs), chunksize=8) if jobs else ()
    except BrokenProcessPool:
        raise DataError("a worker process died (out of memory?): the same command goes on; try fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker():
    """A worker leaves Ctrl-C to its parent, computes on one core, and ends when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def prepare_clip(folder, specs, clip, row):
    """Read one clip and write its rows -> (clip, row, reason why it cannot be used, or '')."""
    try:
        arrays = {m: READERS[spec["kind"]](clip.files[m], spec) for m, spec in specs.items()}
    except (BadClip, av.FFmpegError, OSError) as error:
        return clip, row, str(error)
    for m, array in arrays.items():
        path = folder / clip.split / f"{m}.npy"
        offset = np.load(path, mmap_mode="r").offset
        with open(path, "r+b") as file:  # not through the map: its pages would count as memory in use
            file.seek(offset + row * array.nbytes)
            file.write(array.tobytes())
    return clip, row, ""


def make_arrays(folder, specs, ids):
    """Create what is not there yet, at full size, and see first that the disk holds it -> their paths."""
    wanted = {folder / s / f"{m}.npy": (len(ids[s]), *spec["shape"]) for s in ids for m, spec in specs.items()}
    dtypes = {f"{m}.npy": spec["dtype"] for m, spec in specs.items()}
    size = sum(int(np.prod(shape)) * np.dtype(dtypes[p.name]).itemsize for p, shape in wanted.items())
    have = sum(os.stat(p).st_blocks * 512 for p in wanted if p.exists()) if hasattr(os.stat_result, "st_blocks") else 0
    free = shutil.disk_usage(folder).free
    if size - have > free:
        raise DataError(f"{folder} will take {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: "
                        "give another --out, or a smaller --size or --frames")  # fmt: skip
    for path, shape in wanted.items():
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            fresh = path.with_suffix(".new")
            np.lib.format.open_memmap(fresh, "w+", dtypes[path.name], shape)
            os.replace(fresh, path)
    return list(wanted)


def save_journal(journal, safe, paths):
    """Flush the arrays to the disk first, and only then say of the rows `safe` that they are there."""
    if not safe:
        return
    for path in paths:
        with open(path, "r+b") as file:
            os.fsync(file.fileno())
    with open(journal, "a") as file:
        file.write("".join(line + "\n" for line in safe))
        file.flush()
        os.fsync(file.fileno())
    safe.clear()


def refuse_stubs(clips, raw):
    """A clone without git-lfs holds a text stub in place of every file: say so before reading thousands."""
    some = [p for clip in clips[:: max(1, len(clips) // 20)] for p in clip.files.values() if p.is_file()]
    if some and sum(map(is_stub, some)) > len(some) / 2:
        raise DataError(f"{raw} holds git-lfs stubs, not media. Fetch the files with:\n"
                        f"  git lfs install && git -C {raw} lfs pull")  # fmt: skip


def write_json(path, content):
    """Write a JSON file so that it is there whole or not at all."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(content, indent=1))
    os.replace(fresh, path)


# ---------------------------------------------------------------------------------------------------
# 6  Command line
# ---------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description="Prepare a dataset for dr.py.")
    commands = parser.add_subparsers(dest="name", required=True, metavar="dataset")
    for name in ("demo", *SOURCES):
        p = commands.add_parser(name, help=(SOURCES.get(name) or "a miniature CREMA-D, drawn and synthesised").split(":")[0])
        if name != "demo":
            p.add_argument("--raw", type=Path, required=True, help="the download")
        p.add_argument("--out", type=Path, default="prepared", help="where the arrays go: OUT/%s" % name)
        if name != "mosi":
            p.add_argument("--workers", type=int, help="processes; default: one a core")
        if name not in ("demo", "mosi"):
            p.add_argument("--max-bad", type=float, default=5.0, help="stop if more than this per cent cannot be used")
    args = vars(parser.parse_args())
    try:
        folder = prepare(**args)
    except DataError as error:
        sys.exit(f"data.py: {error}")
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    manifest = json.loads((folder / "manifest.json").read_text())
    counts = ", ".join(f"{len(ids):,} {s}" for s, ids in manifest["splits"].items())
    print(f"{folder}: {counts} clips, {len(manifest['skipped'])} skipped")
    for split, clip, reason in manifest["skipped"]:
        print(f"  skipped {clip} ({split}): {reason}")


if __name__ == "__main__":
    main()
