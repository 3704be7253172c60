"""Prepare and load the datasets: from a raw download to memory-mapped arrays,
and from those to batches.

    python data.py cremad   --raw CREMA-D         VideoFlash/ and AudioWAV/
    python data.py kinetics --raw kinetics400     Kinetics-Sounds' 31 classes
    python data.py ucf101   --raw UCF101          RGB and optical flow
    python data.py mosi     --raw aligned_50.pkl  CMU-MOSI, a pickle of features
    python data.py demo                           drawn on the spot, no download
    python data.py cremad   --show                a page of what was prepared
    python data.py cremad   --help                all that can be set

What it leaves behind, and what training reads, is a folder of NumPy arrays:

    prepared/cremad/manifest.json      classes, clip ids, parameters, what was
                                       skipped and why
    prepared/cremad/train/visual.npy   (N, T, H, W, 3) uint8
    prepared/cremad/train/audio.npy    (N, 1, F, T) float16
    prepared/cremad/train/labels.npy   (N,) int64, -1 if it was skipped
"""

import argparse
import csv
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
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from multiprocessing import parent_process
from pathlib import Path

import av
import numpy as np
import scipy.io.wavfile
import scipy.signal
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

# torchaudio's import insists on the CUDA version it was built with; its Kaldi features are plain tensor
# code and need none, so that check is told that there is no CUDA.
cuda_version, torch.version.cuda = torch.version.cuda, None
from torchaudio.compliance import kaldi  # noqa: E402

torch.version.cuda = cuda_version


class DataError(Exception):
    """Something about the data that the user has to mend; the message says what and how."""


class BadClip(Exception):
    """One clip that cannot be used: it is skipped, counted, and listed in the manifest."""


# ---------------------------------------------------------------------------------------------------
# 1  A prepared dataset: what is on disk, how it is loaded, batches and augmentation
# ---------------------------------------------------------------------------------------------------


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

    Raises DataError, with the commands that make the dataset, if it is not there.
    """
    folder = Path(root) / name
    if not (folder / "manifest.json").exists():
        raise DataError(how_to_get(name, folder))
    try:
        return open_arrays(name, folder, json.loads((folder / "manifest.json").read_text()), modalities)
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise DataError(f"{folder} is damaged ({error}): delete it and prepare it again") from error


def open_arrays(name, folder, manifest, modalities):
    """The memory maps that a manifest tells of -> Dataset."""
    chosen = list(modalities or manifest["modalities"])
    if unknown := [m for m in chosen if m not in manifest["modalities"]]:
        raise DataError(f"{name} has no modality {', '.join(unknown)}; it has {', '.join(manifest['modalities'])}")
    specs, splits = {m: manifest["modalities"][m] for m in chosen}, {}
    for split, ids in manifest["splits"].items():
        labels = np.load(folder / split / "labels.npy")
        rows = np.flatnonzero(labels >= 0)
        arrays = {m: np.load(folder / split / f"{m}.npy", mmap_mode="r") for m in chosen}
        splits[split] = Split(arrays, specs, rows, labels[rows], [ids[r] for r in rows])
        if not len(rows):
            raise DataError(f"{folder}/{split} holds no clip: see what manifest.json says was skipped")
    shapes = {m: tuple(cut(splits["train"], m, splits["train"].rows[:1]).shape[1:]) for m in chosen}
    return Dataset(**splits, classes=manifest["classes"], shapes=shapes)


def add_noise(dataset, modality, level):
    """Gaussian noise on every clip of one modality, `level` times as strong as the modality's own standard deviation.

    A clip keeps its noise over the epochs, as a bad recording does, so that it can be learnt by heart. The noisy
    array is held in memory; padding stays 0. Raises DataError if the dataset has no such modality of real numbers.
    """
    if modality not in dataset.shapes:
        raise DataError(f"no {modality} to put noise on; there is {', '.join(dataset.shapes)}")
    train = dataset.train.arrays[modality]
    if train.dtype.kind != "f":
        raise DataError(f"noise goes on spectrograms and feature sequences, not on {modality}")
    spread = train[dataset.train.rows[:1000]].std(dtype=np.float64)
    for seed, split in enumerate((dataset.train, dataset.val, dataset.test)):
        rng, clean = np.random.default_rng(seed), split.arrays[modality]
        noisy = np.zeros(clean.shape, clean.dtype)
        for row in split.rows:
            noise = level * spread * rng.standard_normal(clean.shape[1:], np.float32)
            present = (clean[row] != 0).any(-1, keepdims=True) if split.specs[modality]["kind"] == "sequence" else 1
            noisy[row] = clean[row] + noise * present
        split.arrays[modality] = noisy


def move_to_gpu(dataset, device, max_bytes):
    """Move the arrays into the memory of an accelerator, once, if they take no more than `max_bytes` -> whether."""
    splits = (dataset.train, dataset.val, dataset.test)
    fits = sum(array.nbytes for split in splits for array in split.arrays.values()) <= max_bytes
    for split in splits if fits else ():
        split.arrays = {m: torch.tensor(array).to(device) for m, array in split.arrays.items()}
    return fits


def upload(array, device):
    """A NumPy array as a tensor on a device; to CUDA from pinned memory, so that nobody waits for the copy."""
    x = torch.from_numpy(np.ascontiguousarray(array))
    return x.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else x.to(device)


def take(split, modality, rows, device="cpu", rng=None):
    """Rows of one modality as they are stored; of the frames kept of a segment one, drawn or the middle one."""
    spec, array = split.specs[modality], split.arrays[modality]
    index = (rows,)
    if (keep := spec.get("keep", 1)) > 1:
        shape = (len(rows), spec["count"])
        drawn = rng.integers(keep, size=shape) if rng else np.full(shape, keep // 2)
        index = (rows[:, None], keep * np.arange(spec["count"]) + drawn)
    if isinstance(array, torch.Tensor):
        return array[tuple(upload(i, array.device) for i in index)]
    return upload(array[index], device)


def normalise(x, spec, rng=None):
    """What `take` returns as a normalised float tensor; augmented if given a random generator.

    frames (B, T, 3, H, W) and flow (B, T, 2, H, W), which stay channels-last in memory (see layout);
    fbank (B, 1, F, T); sequence (B, T, D), its padding exactly 0.
    """
    if spec["kind"] == "sequence":  # standardised when it was prepared
        return x
    mean, std = (upload(np.float32(spec[key]), x.device) for key in ("mean", "std"))
    x = x.float().sub_(mean).div_(std)
    if spec["kind"] != "fbank":
        x = x.movedim(-1, -3)
        x = x if memory_format(x.device.type) is torch.channels_last else x.contiguous()
    return augment(x, spec["kind"], rng) if rng else x


def memory_format(device):
    """How pictures lie in memory: channels last, which convolutions are fastest on. Not on MPS, where the gradients of
    batch-norm were wrong in it until the summer of 2026 (pytorch/pytorch#175189)."""
    return torch.contiguous_format if torch.device(device).type == "mps" else torch.channels_last


def cut(split, modality, rows, device="cpu", rng=None):
    """Rows of one modality as an encoder takes them: `take`, then `normalise`."""
    return normalise(take(split, modality, rows, device, rng), split.specs[modality], rng)


def augment(x, kind, rng):
    """Each sample by draws of its own: a crop and a flip for frames and flow, masks for spectrograms.

    Crops take 0.08 to 1 of the area at 3:4 to 4:3, as torchvision's RandomResizedCrop, one for all frames
    of a clip; masks hide up to a fifth of the bins and of the time (SpecAugment, Park et al. 2019).
    """
    B = len(x)
    if kind == "fbank":  # (B, 1, F, T)
        for axis in (2, 3):
            n = x.shape[axis]
            width = rng.integers(n // 5 + 1, size=B)
            start, at = rng.integers(n - width + 1), np.arange(n)
            mask = (at >= start[:, None]) & (at < (start + width)[:, None])  # (B, n)
            x.masked_fill_(upload(mask, x.device).view(B, 1, *((n, 1) if axis == 2 else (1, n))), 0)
        return x
    area, ratio = rng.uniform(0.08, 1, B), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), B))
    wide, high = np.minimum(1, np.sqrt(area * ratio)), np.minimum(1, np.sqrt(area / ratio))
    flip = rng.choice([-1, 1], B)
    theta = np.zeros((B, 2, 3), np.float32)  # x' = flip * wide * x + dx, y' = high * y + dy
    theta[:, 0, 0], theta[:, 0, 2] = flip * wide, rng.uniform(-1, 1, B) * (1 - wide)
    theta[:, 1, 1], theta[:, 1, 2] = high, rng.uniform(-1, 1, B) * (1 - high)
    flat = x.flatten(1, 2)  # (B, T * C, H, W): all frames of a clip alike
    grid = F.affine_grid(upload(theta, x.device), flat.shape, align_corners=False)
    x = F.grid_sample(flat, grid, padding_mode="reflection", align_corners=False).view(x.shape)
    if kind == "flow":  # mirrored, what moved to the left moves to the right
        x[:, :, 0] *= upload(np.float32(flip), x.device).view(B, 1, 1, 1)
    return x


def batches(split, batch_size, seed=None, device="cpu", augmented=False, part=(0, 1)):
    """Yield ({modality: tensor (B, ...)}, labels (B,)) over one split, once.

    With a seed (an int or a tuple of ints) in random order, the same for the same seed; without, in the
    order of the clips. The last batch may be smaller: no clip is lost, none comes twice.

    part=(rank, world) is the share of one of several processes. In the order of the clips it is a piece of the
    split, and the pieces together are the split. In random order it is a piece of every batch, and all pieces of a
    batch are of one size, so that the mean of their gradients is the batch's: some clips of a last batch that
    cannot be shared out evenly come twice.
    """
    rank, world = part
    if seed is None:
        order = np.array_split(np.arange(len(split)), world)[rank]
    else:
        order = np.random.default_rng(seed).permutation(len(split))
    pieces = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if seed is not None and world > 1:
        pieces = [np.resize(piece, -(-len(piece) // world) * world)[rank::world] for piece in pieces]

    def read(number):
        picked = np.sort(pieces[number])  # ascending rows read the disk in one direction
        rng = np.random.default_rng((*np.atleast_1d(seed), number, rank)) if augmented else None
        inputs = {m: take(split, m, split.rows[picked], device, rng) for m in split.arrays}
        return inputs, upload(split.labels[picked], device), rng

    from_disk = any(isinstance(array, np.ndarray) for array in split.arrays.values())
    look = ahead if from_disk and torch.device(device).type == "cuda" else map
    for inputs, labels, rng in look(read, range(len(pieces))):
        yield {m: normalise(x, split.specs[m], rng) for m, x in inputs.items()}, labels


def ahead(work, items):
    """As map(work, items), but a thread is one item ahead."""
    with ThreadPoolExecutor(1) as thread:
        waiting = []
        for item in items:
            waiting.append(thread.submit(work, item))
            if len(waiting) > 1:
                yield waiting.pop(0).result()
        for last in waiting:
            yield last.result()


# ---------------------------------------------------------------------------------------------------
# 2  Reading media: a clip's files to arrays. PyAV's wheels carry FFmpeg.
# ---------------------------------------------------------------------------------------------------


def middles(length, count):
    """The middles of `count` equal parts of `length` frames: number i is the one at (i + 1/2) / count."""
    return [int((i + 0.5) * length / count) for i in range(count)]


def read_frames(path, spec):
    """Frames at the middles of equal parts of a clip, squeezed to squares: (count * keep, size, size, 3) uint8."""
    size, frames = spec["size"], pick_frames(path, spec)
    # one thread: for one picture, starting several takes ten times as long as the work
    return np.stack([f.reformat(size, size, "rgb24", threads=1).to_ndarray() for f in frames])


def read_flow(source, spec):
    """Optical flow at the middles of equal parts, (count * keep, size, size, 2) uint8: 128 is none, 255 is 20 pixels.

    `source` is a pair of folders of precomputed u and v pictures; or a video, whose flow from one frame to
    the next is then computed by OpenCV's DIS (Kroeger et al. 2016), in milliseconds where TV-L1 takes seconds.
    """
    size = (spec["size"], spec["size"])
    if isinstance(source, tuple):
        u, v = (sorted(folder.glob("*.jpg")) for folder in source)
        if not u or len(u) != len(v):
            raise BadClip(f"{source[0].name}: {len(u)} pictures of flow in u, {len(v)} in v")
        at = middles(len(u), spec["count"] * spec["keep"])
        fields = [[Image.open(axis[i]).convert("L") for axis in (u, v)] for i in at]
    else:
        import cv2

        cv2.setNumThreads(1)
        grey = [f.to_ndarray(format="gray") for f in pick_frames(source, spec, pairs=True)]
        dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        moves = [dis.calc(a, b, None) for a, b in zip(grey[::2], grey[1::2])]  # (H, W, 2) in pixels
        fields = [np.uint8(np.clip(128 + m * (127 / 20), 0, 255).round()) for m in moves]
        fields = [[Image.fromarray(np.ascontiguousarray(f[..., axis])) for axis in (0, 1)] for f in fields]
    return np.stack([np.stack([i.resize(size, Image.BILINEAR) for i in pair], -1) for pair in fields])


def pick_frames(path, spec, pairs=False):
    """The decoded frames at the middles of count * keep equal parts of a video; in pairs, each with the next one.

    Packets are cheap to read and dear to decode: all are read, so that the length is known even where the
    container does not tell it, and decoding begins at the last keyframe before each frame that is wanted.
    """
    with open_media(path) as container:
        if not container.streams.video:
            raise BadClip(f"{path.name}: no picture")
        stream = container.streams.video[0]
        packets = [p for p in container.demux(stream) if p.size]
        if len(packets) <= pairs:
            raise BadClip(f"{path.name}: {len(packets)} frames")
        if len(packets) < 0.9 * stream.frames:
            raise BadClip(f"{path.name}: truncated, {len(packets)} of {stream.frames} frames are there")
        if not stream.frames and container.duration:  # Flash tells no number of frames, but how long it lasts
            there = max(p.pts or 0 for p in packets) * stream.time_base
            if 2 * there + 0.5 < (lasts := container.duration / av.time_base):
                raise BadClip(f"{path.name}: truncated, {float(there):.1f} of {lasts:.1f} s are there")
        length = sum(not p.is_discard for p in packets)  # the edit list of an MP4 may hide some
        if "longest" in spec and stream.average_rate:
            length = min(length, max(1, round(spec["longest"] * stream.average_rate)))
        wanted = middles(length, spec["count"] * spec.get("keep", 1))
        if pairs:
            wanted = [j for i in wanted for j in (min(i, length - 2), min(i, length - 2) + 1)]
        frames = decode(stream, packets, wanted, trust_times=container.format.name != "avi")
    if missing := [i for i in wanted if i not in frames]:
        raise BadClip(f"{path.name}: broken, frame {missing[0]} of {len(packets)} cannot be decoded")
    return [frames[i] for i in wanted]


def decode(stream, packets, wanted, trust_times=True):
    """{i: frame} for the frames `wanted`, counted in the order in which they are shown.

    A keyframe is a safe place to begin at when all packets before it are shown before it, and all after it
    later: then the first frame out of the decoder is the keyframe's own number. (AVI stores no such times.)
    """
    times, starts = [p.pts for p in packets], {0: 0}  # {number of a frame: packet at which to begin}
    if trust_times and None not in times:
        before = np.maximum.accumulate([-(2**62), *times[:-1]])
        after = np.minimum.accumulate([2**62, *times[:0:-1]])[::-1]
        shows = np.cumsum([0] + [not p.is_discard for p in packets]).tolist()
        safe = [k for k in range(1, len(times)) if packets[k].is_keyframe and before[k] < times[k] < after[k]]
        starts |= {shows[k]: k for k in safe}
    codec, frames, shown, fed = stream.codec_context, {}, 0, 0
    codec.thread_count = 1  # it is the clips that are read in parallel
    for i in sorted(set(wanted)):
        start = max(s for s in starts if s <= i)
        if starts[start] > fed:
            codec.flush_buffers()
            shown, fed = start, starts[start]
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
        if (codec.rate, codec.channels, codec.format.name) == (rate, 1, "s16"):  # nothing to resample
            chunks = [frame.to_ndarray()[0] / np.float32(32768) for frame in container.decode(audio=0)]
        else:
            resample = av.AudioResampler(format="fltp", rate=rate).resample
            chunks = [f.to_ndarray().mean(0) for frame in container.decode(audio=0) for f in resample(frame)]
            chunks += [f.to_ndarray().mean(0) for f in resample(None)]
    if sum(map(len, chunks)) < 400:  # less than one window of 25 ms
        raise BadClip(f"{path.name}: no sound")
    return np.concatenate(chunks)


def fbank(sound, spec, rate=16000):
    """Kaldi's log-mel filter banks as the official code takes them: (1, bins, frames) float16.

    Mean removed, a Hanning window of 25 ms every `shift` ms, no dither; cut, or padded with zeros before
    normalising, as the official code does.
    """
    wave = torch.from_numpy(sound - sound.mean())[None]  # (1, samples)
    mel = kaldi.fbank(wave, sample_frequency=rate, num_mel_bins=spec["bins"], frame_shift=spec["shift"],
                      window_type="hanning", htk_compat=True, use_energy=False, dither=0.0)  # fmt: skip
    frames = spec["shape"][-1]
    mel = F.pad(mel[:frames], (0, 0, 0, max(0, frames - len(mel))))  # (frames, bins)
    return mel.T[None].half().numpy()


def open_media(path):
    """Open a file with FFmpeg; one that is missing or a git-lfs stub is a bad clip, with a plain reason."""
    if not path.exists():
        raise BadClip(f"{path.parent.name}/{path.name}: missing")
    if is_stub(path):
        raise BadClip(f"{path.name}: a git-lfs stub, never fetched")
    # FFmpeg would probe a WAV for coded sound in disguise, which takes ten times as long as reading it
    options = {"probesize": "4096"} if path.suffix == ".wav" else {}
    try:
        return av.open(str(path), options=options)
    except UnicodeDecodeError:  # a title in some other encoding, which PyAV reads from 19 on and refuses before
        return av.open(str(path), options=options, metadata_errors="replace")


def is_stub(path):
    """Whether a file is git-lfs's placeholder: what a clone without git-lfs holds in place of media."""
    with open(path, "rb") as file:
        return file.read(40).startswith(b"version https://git-lfs.github.com/spec")


READERS = {"frames": read_frames, "flow": read_flow, "fbank": lambda path, spec: fbank(read_sound(path), spec)}


# How each kind is kept, and the constants with which `cut` normalises it.


def frames_spec(count, size, keep=1, **more):  # ImageNet's mean and deviation, in units of 0..255
    return {"kind": "frames", "count": count, "keep": keep, "size": size, "shape": [count * keep, size, size, 3],
            "dtype": "uint8", "mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], **more}  # fmt: skip


def flow_spec(count, size, keep=1):
    return {"kind": "flow", "count": count, "keep": keep, "size": size, "shape": [count * keep, size, size, 2],
            "dtype": "uint8", "mean": 128.0, "std": 32.0}  # fmt: skip


def fbank_spec(bins, seconds, shift=10.0):  # the official code's (x + 4.503877) / (2 * 5.141276)
    return {"kind": "fbank", "bins": bins, "shift": shift, "shape": [1, bins, round(seconds * 1000 / shift)],
            "dtype": "float16", "mean": -4.503877, "std": 2 * 5.141276}  # fmt: skip


# ---------------------------------------------------------------------------------------------------
# 3  The datasets: from a raw folder to clips. One lister each; its keyword arguments are its options.
# ---------------------------------------------------------------------------------------------------


@dataclass
class Clip:
    """One sample before it is prepared: what it shows, which split it is in, and where its files are."""

    id: str
    label: int
    split: str  # train, val or test
    files: dict  # {modality: path}


def hold_out(kinds, n, seed=0):
    """n of the items of {item: kind} at random, every kind in its share -> a set."""
    rng, place = np.random.default_rng(seed), {}
    for kind in sorted(set(kinds.values())):
        mine = sorted(i for i in kinds if kinds[i] == kind)
        place |= {mine[k]: (rank + 0.5) / len(mine) for rank, k in enumerate(rng.permutation(len(mine)))}
    return set(sorted(kinds, key=lambda i: (place[i], i))[:n])


EMOTIONS = ["ANG", "DIS", "FEA", "HAP", "NEU", "SAD"]


def cremad(raw, frames=2, keep=1, size=224, seconds=3.0, split="clips", split_dir=None):
    """CREMA-D: 7,442 clips, 91 actors, six emotions -> (clips, classes, specs).

    split "clips" draws 80 / 10 / 10 per cent at random over clips, as in the paper: every actor is in all
    three. "actors" holds out whole actors. `split_dir` holds my_train.csv (or train.csv), val.csv and
    test.csv with lines `id,EMO` instead.
    """
    name = re.compile(rf"\d{{4}}_[A-Z]{{3}}_({'|'.join(EMOTIONS)})_[A-Z]{{2}}")
    stems = {p.stem for kind in ("VideoFlash/*.flv", "AudioWAV/*.wav") for p in raw.glob(kind)}
    ids = sorted(filter(name.fullmatch, stems))
    if not ids:
        raise DataError(f"{raw} is no CREMA-D: it holds no VideoFlash/<id>.flv and no AudioWAV/<id>.wav")
    if split not in ("clips", "actors"):
        raise DataError(f"--split is clips or actors, not {split}")
    where = read_splits(Path(split_dir), set(ids)) if split_dir else draw_splits(ids, 0.1, 0.1, split == "actors")
    # one clip of the real set goes on for a minute after a sentence of three seconds
    specs = {"audio": fbank_spec(128, seconds), "visual": frames_spec(frames, size, keep, longest=10)}
    return cremad_clips(raw, where), EMOTIONS, specs


def cremad_clips(raw, where):
    """The clips of {id: split} in CREMA-D's layout; ids are <actor>_<sentence>_<emotion>_<level>."""
    files = lambda i: {"audio": raw / "AudioWAV" / f"{i}.wav", "visual": raw / "VideoFlash" / f"{i}.flv"}  # noqa: E731
    return [Clip(i, EMOTIONS.index(i[9:12]), split, files(i)) for i, split in where.items()]


def draw_splits(ids, val, test, by_actor=False):
    """{id: split}: shares of CREMA-D's clips held out at random, emotions in their shares, or by whole actors."""
    unit = {i: i[:4] if by_actor else i for i in ids}  # what is held out in one piece
    kinds = {u: "" if by_actor else u[9:12] for u in unit.values()}
    tested = hold_out(kinds, round(test * len(kinds)))
    chosen = hold_out({u: k for u, k in kinds.items() if u not in tested}, round(val * len(kinds)))
    return {i: "test" if u in tested else "val" if u in chosen else "train" for i, u in unit.items()}


def read_splits(folder, known):
    """{id: split} from CREMA-D's circulating split files; an unknown id, a wrong label or an overlap is an error."""
    where = {}
    for split, names in (("train", ["my_train.csv", "train.csv"]), ("val", ["val.csv"]), ("test", ["test.csv"])):
        path = next((folder / n for n in names if (folder / n).exists()), None)
        if path is None:
            raise DataError(f"{folder} has no {names[0]}: it takes my_train.csv (or train.csv), val.csv and test.csv")
        rows = [line.strip().split(",") for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
        for number, row in enumerate(rows, 1):
            if number == 1 and row[-1] not in EMOTIONS and row[0] not in known:
                continue  # some of these files have a header line
            at = f"{path}, line {number}: {row[0]}"
            if row[0] not in known:
                raise DataError(f"{at} is not among the raw files")
            if row[-1] != row[0][9:12]:
                raise DataError(f"{at} is labelled {row[-1]}, but its name says {row[0][9:12]}")
            if row[0] in where:
                raise DataError(f"{at} is in the {where[row[0]]} split already")
            where[row[0]] = split
    return where


def demo(raw, clips=2300, seed=0):
    """The miniature CREMA-D: written to `raw` as real files, then listed and read as CREMA-D is.

    1,200 / 300 / 800 clips at the default size; one frame of 48 x 48 pixels, 48 mel bands, 1.2 s.
    """
    where = draw_splits(sorted(make_demo(raw, clips, seed)), 300 / 2300, 800 / 2300)
    return cremad_clips(raw, where), EMOTIONS, {"audio": fbank_spec(48, 1.2, shift=25.0), "visual": frames_spec(1, 48)}


KINETICS_SOUNDS = """blowing nose, blowing out candles, bowling, chopping wood, dribbling basketball, laughing,
mowing lawn, playing accordion, playing bagpipes, playing bass guitar, playing clarinet, playing drums, playing guitar,
playing harmonica, playing keyboard, playing organ, playing piano, playing saxophone, playing trombone,
playing trumpet, playing violin, playing xylophone, ripping paper, shoveling snow, shuffling cards, singing,
stomping grapes, tap dancing, tapping guitar, tapping pen, tickling""".replace("\n", " ").split(", ")


def kinetics(raw, frames=3, keep=1, size=224, seconds=10.24, split_dir=None):
    """Kinetics-Sounds: the clips of 31 classes out of Kinetics-400 -> (clips, classes, specs).

    `raw` holds train/ and val/, either with a folder a class, or flat beside train.csv and val.csv (label,
    youtube_id, time_start, ...). `split_dir` holds train.txt and test.txt with lines <youtube id>_<start>...,
    <seconds>,<label> instead. Test is the validation folder, validation a tenth of train.
    """
    pattern = re.compile(r"(.{11})_(\d+)(?:_\d+)?")  # a YouTube id has 11 characters; then the start in seconds
    key = lambda stem: (m[1], int(m[2])) if (m := pattern.fullmatch(stem)) else None  # noqa: E731
    found = {k: p for p in sorted(raw.rglob("*")) if p.suffix in (".mp4", ".mkv", ".webm") and (k := key(p.stem))}
    label = {name: k for k, name in enumerate(KINETICS_SOUNDS)}
    wanted = []  # (train or test, key, label)
    for split, part in (("train", "train"), ("test", "val")):
        table = next((p for p in (raw / f"{part}.csv", raw / "annotations" / f"{part}.csv") if p.exists()), None)
        if split_dir:
            lines = [line.rsplit(",", 2) for line in (Path(split_dir) / f"{split}.txt").read_text().split()]
            wanted += [(split, key(stem), int(k)) for stem, _, k in lines]
        elif table:
            with open(table, newline="") as file:
                wanted += [(split, (row["youtube_id"], int(row["time_start"])), label[row["label"]])
                           for row in csv.DictReader(file) if row["label"] in label]  # fmt: skip
        else:
            inside = [p for p in found.values() if part in p.relative_to(raw).parts[0]]  # train, val_256, ...
            classes = {p: label.get(p.parent.name.replace("_", " ")) for p in inside}
            wanted += [(split, key(p.stem), k) for p, k in classes.items() if k is not None]
    if odd := {c for _, _, c in wanted} - set(range(31)):
        raise DataError(f"{split_dir}: labels are 0 to 30, not {odd.pop()}")
    if not any(k in found for _, k, _ in wanted):
        raise DataError(f"{raw} holds no clip of Kinetics-Sounds: it takes train/<class>/<id>_<start>_<end>.mp4 and\n"
                        "val/<class>/..., or flat folders beside train.csv and val.csv, or --split-dir")  # fmt: skip
    train = {k: c for split, k, c in wanted if split == "train"}
    chosen = hold_out(train, round(0.1 * len(train)))
    clips = {}
    for split, k, c in wanted:
        i = f"{k[0]}_{k[1]:06d}"
        path = found.get(k, raw / f"{i}.mp4")
        clips[i] = Clip(i, c, "val" if split == "train" and k in chosen else split, {"audio": path, "visual": path})
    specs = {"audio": fbank_spec(128, seconds), "visual": frames_spec(frames, size, keep)}
    return list(clips.values()), KINETICS_SOUNDS, specs


def ucf101(raw, frames=3, keep=1, size=224, fold=1):
    """UCF-101: RGB and optical flow of 13,320 clips, 101 classes -> (clips, classes, specs).

    `raw` holds, at any depth, the class folders and ucfTrainTestlist/; flow comes from folders
    u/<clip>/*.jpg and v/<clip>/*.jpg if there are any, else it is computed. Validation is a tenth of the
    training groups: the clips of a group are cut from one video.
    """
    lists = next(iter(raw.rglob(f"trainlist{fold:02d}.txt")), None)
    if lists is None:
        raise DataError(f"{raw} holds no trainlist{fold:02d}.txt: it takes the zip of split lists too")
    classes = (lists.parent / "classInd.txt").read_text().split()[1::2]  # lines: number name
    # the lists write HandStandPushups where the files say HandstandPushups: names are compared in lower case
    found = {p.stem.lower(): p for p in raw.rglob("*.avi")}
    u = next((p for p in raw.rglob("u") if p.is_dir() and (p.parent / "v").is_dir()), None)
    flow = {p.name.lower(): p for p in u.iterdir()} if u else {}
    clips = []
    for split in "train", "test":
        lines = (lists.parent / f"{split}list{fold:02d}.txt").read_text().splitlines()
        names = [line.split()[0] for line in lines if line.strip()]
        groups = {n: n.rsplit("_", 1)[0] for n in names}  # Class/v_Class_gNN
        kinds = {g: g.split("/")[0] for g in groups.values()}
        chosen = hold_out(kinds, round(0.1 * len(kinds))) if split == "train" else ()
        for n in names:
            stem = Path(n).stem
            video = found.get(stem.lower(), raw / n)
            folder = flow.get(stem.lower())
            files = {"flow": (folder, u.parent / "v" / folder.name) if folder else video, "visual": video}
            part = "val" if groups[n] in chosen else split
            clips.append(Clip(stem, classes.index(n.split("/")[0]), part, files))
    return clips, classes, {"flow": flow_spec(frames, size, keep), "visual": frames_spec(frames, size, keep)}


LISTERS = {"demo": demo, "cremad": cremad, "kinetics": kinetics, "ucf101": ucf101}
MAX_BAD = {"kinetics": 50.0}  # many of its clips are gone
OPTIONS = {  # what the listers' arguments mean, for --help
    "frames": "frames a clip, at the middles of equal segments",
    "keep": "frames kept of each segment, for --augment to draw from; odd, so that one is the middle",
    "size": "pixels of a side",
    "seconds": "length of the sound; 10.24 gives the official code's 1,024 frames",
    "split": "clips: at random over clips; actors: whole actors held out",
    "split_dir": "folder of the split lists that circulate",
    "fold": "which of the three official splits",
    "clips": "how many clips are drawn",
    "seed": "of the drawing",
}
SOURCES = {  # name: (what to get, what it is then called)
    "cremad": ("CREMA-D, 7.5 GB; it needs git-lfs:\n     git lfs install\n"
               "     git clone https://github.com/CheyneyComputerScience/CREMA-D", "CREMA-D"),
    "kinetics": ("Kinetics-400, or its 31 classes of Kinetics-Sounds:\n"
                 "     https://github.com/cvdfoundation/kinetics-dataset", "kinetics400"),
    "ucf101": ("UCF-101, 6.5 GB, and its split lists, unpacked into one folder:\n"
               "     https://www.crcv.ucf.edu/data/UCF101.php", "UCF101"),
    "mosi": ("CMU-MOSI as one pickle: aligned_50.pkl of https://github.com/thuiar/MMSA,\n"
             "     or mosi_raw.pkl of https://github.com/pliang279/MultiBench", "aligned_50.pkl"),
}  # fmt: skip


def how_to_get(name, folder):
    """What to do when a prepared dataset is not there."""
    if name not in SOURCES:
        return f"{folder} holds no manifest.json: make it with  python data.py {name}"
    what, raw = SOURCES[name]
    out = "" if folder.parent == Path("prepared") else f" --out {folder.parent}"
    return (f"{name} is not prepared: {folder} holds no manifest.json\n  1. Get {what}\n"
            f"  2. Prepare it:  python data.py {name} --raw {raw}{out}\n"
            f"Or see the method at work now:  python dr.py --dataset demo")  # fmt: skip


class PlainUnpickler(pickle.Unpickler):
    """Unpickles containers, strings, numbers and NumPy arrays, and nothing that could run code."""

    ALLOWED = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"), ("collections", "OrderedDict")} | {
        (f"numpy.{core}.{module}", name)
        for core in ("core", "_core")
        for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
    }

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise DataError(f"the pickle asks for {module}.{name}, which is no plain data: it was not loaded")
        return super().find_class(module, name)


def prepare_mosi(raw, out="prepared"):
    """CMU-MOSI from one pickle in MMSA's or MultiBench's layout: text, audio and vision as (N, T, D).

    What is not finite becomes the mean; every feature is standardised with the training set's statistics
    over what is not padding; padding is exactly 0. Two classes: sentiment < 0, and >= 0.
    """
    folder, specs, ids = Path(out) / "mosi", {}, {}
    if not raw.is_file():
        raise DataError(f"--raw {raw}: no such file")
    try:
        with open(raw, "rb") as file:
            pickled = PlainUnpickler(file, encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, AttributeError, IndexError, KeyError, TypeError) as error:
        hint = "a git-lfs stub: run `git lfs pull`" if is_stub(raw) else f"no whole pickle ({error})"
        raise DataError(f"{raw} cannot be read: it is {hint}") from None
    try:
        parts = {"train": pickled["train"], "val": pickled["valid"], "test": pickled["test"]}
        features = {m: {s: np.asarray(p[m], np.float32) for s, p in parts.items()} for m in ("text", "audio", "vision")}
        labels = {s: np.asarray(p["regression_labels"] if "regression_labels" in p else p["labels"], np.float32)
                  .reshape(len(p["text"]), -1)[:, 0] for s, p in parts.items()}  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{raw} is not laid out as MMSA's or MultiBench's CMU-MOSI: {error!r}") from None
    for m, x in features.items():
        present = {s: ~padding(x[s], m, p) for s, p in parts.items()}  # (N, T)
        known = np.where(np.isfinite(x["train"]), x["train"], np.nan)[present["train"]]
        mean, std = np.nanmean(known, 0), np.nanstd(known, 0)  # (D,)
        for s in parts:
            (folder / s).mkdir(parents=True, exist_ok=True)
            z = (x[s] - mean) / np.where(std > 1e-6, std, 1)
            np.save(folder / s / f"{m}.npy", np.float32(np.where(np.isfinite(z) & present[s][..., None], z, 0)))
        specs[m] = {"kind": "sequence", "shape": list(x["train"].shape[1:]), "dtype": "float32"}
    for s, p in parts.items():
        if not np.isfinite(labels[s]).all():
            raise DataError(f"{raw}: a label of {s} is not a number")
        np.save(folder / s / "labels.npy", np.int64(labels[s] >= 0))
        ids[s] = [str(i) for i in np.asarray(p.get("id", range(len(labels[s])))).reshape(len(labels[s]), -1)[:, 0]]
    write_json(folder / "manifest.json", {"dataset": "mosi", "options": {"raw": raw.name}, "modalities": specs,
               "classes": ["negative", "non-negative"], "splits": ids, "skipped": []})  # fmt: skip
    return folder


def padding(x, modality, part):
    """Which steps of (N, T, D) are padding, (N, T) bool: by the pickle's lengths if it has them, else all-zero rows."""
    if f"{modality}_lengths" in part:
        return np.arange(x.shape[1]) >= np.asarray(part[f"{modality}_lengths"]).reshape(-1, 1)
    if modality == "text" and np.ndim(part.get("text_bert")) == 3:  # (N, 3, T): ids, mask, segments
        return np.asarray(part["text_bert"])[:, 1] == 0
    return (x == 0).all(-1)


# ---------------------------------------------------------------------------------------------------
# 4  The demo: a miniature CREMA-D of cartoon actors with babbling voices, in the layout of the real one
# ---------------------------------------------------------------------------------------------------

FACE_SPREAD = 0.19  # scatter of the faces of one emotion: the larger, the harder the picture
VOICE_SPREAD = 0.32  # scatter of the voices of one emotion: the larger, the harder the sound
ROOM_TONES = 4.0  # loudness of what hums in the room, different in every clip: easily learnt by heart
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
        light=rng.uniform(0.82, 1), size=rng.uniform(46, 54), tilt=rng.normal(0, 0.04), place=rng.normal(0, 3, 2),
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
    """Draw and synthesise the clips, 3,456 at most, the emotions in turn -> ids. Clip i depends on seed and i alone."""
    rng, drawn = np.random.default_rng(seed), []
    for emotion in TABLE:
        levels = ["XX"] if emotion == "NEU" else ["XX", *LEVELS]
        names = [f"{a}_{s}_{emotion}_{level}" for a in ACTORS for s in VOWELS for level in levels]
        drawn.append(rng.permutation(names).tolist())
    names = [name for turn in zip(*drawn) for name in turn]
    if clips > len(names):
        raise DataError(f"--clips is {len(names):,} at most, not {clips:,}")
    names = names[:clips]
    for folder in "AudioWAV", "VideoFlash":
        (raw / folder).mkdir(parents=True, exist_ok=True)
    jobs = [(raw, seed, index, name) for index, name in enumerate(names)]
    with closing(in_parallel(perform, jobs)) as done:
        for _ in tqdm(done, "drawing the demo", len(jobs), unit=" clips", disable=None, ncols=78):
            pass
    return names


# ---------------------------------------------------------------------------------------------------
# 5  Preparing: on all cores, in place, and going on where it was stopped
# ---------------------------------------------------------------------------------------------------


def prepare(name, raw=None, out="prepared", workers=None, max_bad=None, **options):
    """Turn a raw download into `out`/`name`; `options` are the keyword arguments of the dataset's lister.

    Every clip has its row in arrays that are made at full size first; workers write rows in place, and a
    journal says which are safely on disk. Stopped at any moment, the same call goes on, and the arrays come
    out the same byte for byte. Raises DataError for all that the user can mend, among it more than `max_bad`
    per cent of clips that cannot be used (default MAX_BAD, else 5). Returns the folder.
    """
    if name == "mosi":
        return prepare_mosi(Path(raw), out)
    folder, lister = Path(out) / name, LISTERS[name]
    defaults = {k: p.default for k, p in inspect.signature(lister).parameters.items() if k != "raw"}
    options = {**defaults, **{k: str(v) if isinstance(v, Path) else v for k, v in options.items()}}
    for k, v in {**options, "workers": workers or 1}.items():
        if k in ("frames", "keep", "size", "seconds", "clips", "workers") and v <= 0:
            raise DataError(f"--{k} is more than 0, not {v}")
    if options.get("keep", 1) % 2 == 0:
        raise DataError(f"--keep is odd, so that one frame is in the middle, not {options['keep']}")
    for made in (folder / "manifest.json", folder / "plan.json"):
        if made.exists() and (before := json.loads(made.read_text())["options"]) != options:
            changed = ", ".join(f"{k} {before.get(k)}, now {v}" for k, v in options.items() if before.get(k) != v)
            raise DataError(f"{folder} was made with other parameters ({changed}): delete it, or give another --out")
    if (folder / "manifest.json").exists():
        return folder
    raw = Path(raw or folder / "raw")
    if name != "demo" and not raw.is_dir():
        raise DataError(f"--raw {raw} is no folder")
    try:
        clips, classes, specs = lister(raw, **options)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(f"the lists that say which clips there are cannot be understood: {error!r}") from error
    sample = [p for c in clips[:: max(1, len(clips) // 20)] for p in c.files.values()]
    some = [p for p in sample if isinstance(p, Path) and p.is_file()]
    if some and sum(map(is_stub, some)) >= len(some) / 2:
        raise DataError(f"{raw} holds git-lfs stubs in place of the media; fetch the files with\n"
                        f"  git lfs install && git -C {raw} lfs pull")  # fmt: skip

    ids = {s: [c.id for c in clips if c.split == s] for s in ("train", "val", "test")}
    plan = {"dataset": name, "options": options, "classes": classes, "modalities": specs, "splits": ids}
    if (folder / "plan.json").exists() and json.loads((folder / "plan.json").read_text()) != plan:
        raise DataError(f"{folder} was begun with other clips than {raw} holds now: delete it to begin again")
    paths = make_arrays(folder, plan)
    journal = folder / "journal.txt"
    done = set(journal.read_text().split("\n")[:-1]) if journal.exists() else set()
    row = {s: {i: r for r, i in enumerate(ids[s])} for s in ids}
    todo = [(c, r) for c in clips if f"{c.split} {(r := row[c.split][c.id])}" not in done]

    bad, safe, saved = [], [], time.monotonic()
    allowed = MAX_BAD.get(name, 5.0) if max_bad is None else max_bad
    progress = tqdm(total=len(clips), initial=len(clips) - len(todo), unit=" clips", desc=name, disable=None, ncols=78)
    try:
        with progress, closing(in_parallel(partial(prepare_clip, folder, specs), todo, workers)) as results:
            for clip, r, reason in results:
                progress.update()
                if reason:
                    bad.append([clip.split, clip.id, reason])
                else:
                    safe.append(f"{clip.split} {r}")
                if len(bad) > allowed / 100 * len(clips):
                    raise DataError(f"{len(bad)} of {len(clips):,} clips cannot be used, more than --max-bad "
                                    f"{allowed:g} per cent; the last: {reason}")  # fmt: skip
                if time.monotonic() - saved > 2:
                    save_journal(journal, safe, paths)
                    saved = time.monotonic()
    finally:
        save_journal(journal, safe, paths)

    skipped = {i for _, i, _ in bad}
    for s in ids:
        labels = np.array([-1 if c.id in skipped else c.label for c in clips if c.split == s], np.int64)
        write_atomically(folder / s / "labels.npy", lambda file, labels=labels: np.save(file, labels))
    write_json(folder / "manifest.json", {**plan, "skipped": sorted(bad)})
    journal.unlink(missing_ok=True)
    (folder / "plan.json").unlink()
    return folder


def in_parallel(work, jobs, workers=None):
    """Yield work(*job) for every job, in order, from a pool of processes: one a core, or `workers` of them."""
    pool = ProcessPoolExecutor(workers or os.cpu_count(), initializer=start_worker)
    try:
        # Python loses a Ctrl-C that comes while it forks: it is noted, and heeded when all workers are there
        pressed, usual = [], signal.signal(signal.SIGINT, lambda *_: pressed.append(1))
        results = pool.map(work, *zip(*jobs), chunksize=8) if jobs else ()
        signal.signal(signal.SIGINT, usual)
        if pressed:
            raise KeyboardInterrupt
        yield from results
    except BrokenProcessPool:
        raise DataError("a worker died (out of memory?): the same command goes on; try fewer --workers") from None
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
        if unfit := [m for m, array in arrays.items() if not np.isfinite(array).all()]:
            raise BadClip(f"{unfit[0]} is not finite")
    except av.FFmpegError as error:
        return clip, row, f"{Path(error.filename or clip.id).name}: {error.strerror}"
    except (BadClip, OSError, ValueError, AttributeError) as error:  # the last is PyAV's, for an unknown codec
        return clip, row, str(error)
    for m, array in arrays.items():
        path = folder / clip.split / f"{m}.npy"
        offset = np.load(path, mmap_mode="r").offset
        with open(path, "r+b") as file:  # not through the map: its pages would count as memory in use
            file.seek(offset + row * array.nbytes)
            file.write(array.tobytes())
    return clip, row, ""


def make_arrays(folder, plan):
    """Write the plan down and create its arrays at full size, once the disk is seen to hold them -> their paths."""
    each = [(s, ids, m, spec) for s, ids in plan["splits"].items() for m, spec in plan["modalities"].items()]
    wanted = {folder / s / f"{m}.npy": (spec["dtype"], (len(ids), *spec["shape"])) for s, ids, m, spec in each}
    size = sum(np.dtype(dtype).itemsize * int(np.prod(shape)) for dtype, shape in wanted.values())
    taken = sum(getattr(p.stat(), "st_blocks", 0) * 512 for p in wanted if p.exists())
    folder.mkdir(parents=True, exist_ok=True)
    if size - taken > (free := shutil.disk_usage(folder).free):
        raise DataError(f"{folder} will take {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: "
                        "give another --out, or a smaller --size")  # fmt: skip
    write_json(folder / "plan.json", plan)
    for path, (dtype, shape) in wanted.items():
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            np.lib.format.open_memmap(path.with_suffix(".new"), "w+", dtype, shape)
            os.replace(path.with_suffix(".new"), path)
    return list(wanted)


def save_journal(journal, safe, paths):
    """Flush the arrays to the disk first, and only then write down that the rows `safe` are there."""
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


def write_atomically(path, write):
    """Have write(file) make a file that is there whole or not at all, even after a power cut."""
    new = path.with_suffix(".new")
    try:
        with open(new, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except OSError:  # a disk that is full gets its room back
        new.unlink(missing_ok=True)
        raise
    os.replace(new, path)


def write_json(path, content):
    write_atomically(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


# ---------------------------------------------------------------------------------------------------
# 6  Command line
# ---------------------------------------------------------------------------------------------------


def show(name, root="prepared", count=6):
    """Draw training clips as they were prepared: frames, flow as colour, spectrograms -> path of the picture."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import hsv_to_rgb

    dataset, rng = load(name, root), np.random.default_rng(0)
    split, classes = dataset.train, rng.permutation(np.unique(dataset.train.labels))[:count]
    stacks = {m: s["shape"][0] if s["kind"] in ("frames", "flow") else 1 for m, s in split.specs.items()}
    panels = [(m, t) for m in stacks for t in range(stacks[m])]
    size = (2.2 * len(panels), 2.2 * len(classes))
    _, axes = plt.subplots(len(classes), len(panels), figsize=size, squeeze=False, layout="constrained")
    for line, c in zip(axes, classes):
        k = rng.choice(np.flatnonzero(split.labels == c))
        for axis, (m, t) in zip(line, panels):
            x, kind = split.arrays[m][split.rows[k]], split.specs[m]["kind"]
            if kind == "frames":
                axis.imshow(x[t])
            elif kind == "flow":  # direction as hue, speed as saturation: white stands still
                u, v = np.moveaxis(x[t] - 128.0, -1, 0)
                hue, speed = np.arctan2(v, u) / (2 * np.pi) % 1, np.minimum(1, np.hypot(u, v) / 64)
                axis.imshow(hsv_to_rgb(np.stack([hue, speed, np.ones_like(hue)], -1)))
            else:
                axis.imshow(x[0] if kind == "fbank" else x.T, origin="lower", aspect="auto", cmap="magma")
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"{m} {t + 1}" if stacks[m] > 1 else m, fontsize=9)
        line[0].set_ylabel(f"{dataset.classes[c]}\n{split.ids[k]}", fontsize=8)
    path = Path(root) / name / "samples.png"
    plt.savefig(path, dpi=120)
    plt.close()
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="name", required=True, metavar="dataset")
    for name in (*LISTERS, "mosi"):
        p = commands.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        p.add_argument("--out", type=Path, default=Path("prepared"), help=f"where the arrays go: OUT/{name}")
        p.add_argument("--show", action="store_true", help=f"draw what was prepared to OUT/{name}/samples.png")
        if name != "demo":
            p.add_argument("--raw", type=Path, help="the download")
        if name == "mosi":
            continue
        p.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
        bad = MAX_BAD.get(name, 5.0)
        p.add_argument("--max-bad", type=float, default=bad, help="per cent of clips that may be unusable")
        for option, parameter in list(inspect.signature(LISTERS[name]).parameters.items())[1:]:
            kind = str if parameter.default is None else type(parameter.default)
            p.add_argument("--" + option.replace("_", "-"), type=kind, default=parameter.default, help=OPTIONS[option])
    args = vars(parser.parse_args())
    name, out, drawn = args["name"], args["out"], args.pop("show")
    try:
        if drawn:
            return print(show(name, out))
        if name != "demo" and args["raw"] is None:
            raise DataError(f"--raw is missing. {how_to_get(name, out / name)}")
        folder = prepare(**args)
    except (DataError, OSError) as error:
        hint = "" if isinstance(error, DataError) else "; when that is mended, the same command goes on"
        print(f"data.py: {error}{hint}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    manifest = json.loads((folder / "manifest.json").read_text())
    size = sum(p.stat().st_size for p in folder.glob("*/*.npy")) / 1e9
    counts = ", ".join(f"{len(ids):,} {s}" for s, ids in manifest["splits"].items())
    print(f"{folder}: {counts} clips, {size:.2f} GB; {len(manifest['skipped'])} skipped")
    for split, clip, reason in manifest["skipped"]:
        print(f"  {clip} ({split}): {reason}")


if __name__ == "__main__":
    main()
