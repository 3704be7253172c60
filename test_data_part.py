"""Tests of data.py: python -m pytest. Each holds the code against something independent of it."""

import contextlib
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
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import av
import numpy as np
import pytest
import scipy.io.wavfile
import scipy.signal
import torch
from PIL import Image

import data

HERE = Path(__file__).parent
REAL = Path(os.environ["DR_REAL"]) if "DR_REAL" in os.environ else None
needs_real = pytest.mark.skipif(REAL is None, reason="DR_REAL names no folder of real material")

# --- helpers --------------------------------------------------------------------------------------

def command(*words, **more):
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=HERE, **more)


def called(*words):
    """`python data.py words`, but in this process: importing PyTorch takes longer than most of what is tested."""
    told, complained, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["data.py", *map(str, words)]),
        contextlib.redirect_stdout(told),
        contextlib.redirect_stderr(complained),
    ):
        try:
            data.main()
        except SystemExit as end:
            code = end.code
    return SimpleNamespace(returncode=code, stdout=told.getvalue(), stderr=complained.getvalue())


def parts(clips, what=lambda c: c.id):
    return {s: {what(c) for c in clips if c.split == s} for s in ("train", "val", "test")}


FLASH = dict(codec="flv1", sound="libmp3lame")
XVID = dict(codec="mpeg4", sound="libmp3lame", tag="XVID", options={"bf": "2"})
H264 = dict(codec="libx264", sound="aac", options={"bf": "2", "x264-params": "log-level=error"})
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
        film(raw / f"VideoFlash/{name}.flv", **FLASH, frames=24 + k % 9, seed=k)
        babble(raw / f"AudioWAV/{name}.wav", (0.8, 3, 3.7)[k % 3], seed=k)
    return raw


@pytest.fixture(scope="session")
def crowd(crema, tmp_path_factory):
    """The same under 900 names, some seconds of work, with one stub among them -> raw folder, prepared folder."""
    raw = tmp_path_factory.mktemp("crowd")
    for k in range(10):
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
    film(raw / "VideoFlash/1009_IEO_DIS_MD.flv", **FLASH, frames=720)  # a minute
    film(raw / "VideoFlash/1009_MTI_NEU_XX.flv", "flv1", frames=1)  # very short, without sound; its WAV is good
    film(raw / "VideoFlash/1009_TIE_SAD_XX.flv", **FLASH, muxer={"flvflags": "no_duration_filesize"})
    for name in "1009_IEO_DIS_MD", "1009_MTI_NEU_XX", "1009_TIE_SAD_XX":
        babble(raw / f"AudioWAV/{name}.wav", 3)
    return raw, {path.stem: says for path, _, says in bad}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
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
    lines, films = {"train": [], "test": []}, [film(raw / f"films/{k}.avi", **XVID, seed=k) for k in range(4)]
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
    replace(raw / "UCF-101/YoYo/v_YoYo_g10_c01.avi", films[0].read_bytes()[:20000])
    return raw, {"v_Archery_g09_c01": "Invalid data", "v_YoYo_g10_c01": "truncated"}


def test_ucf101_holds_out_whole_groups_and_finds_handstand_pushups(ucf):
    clips, classes, _ = data.ucf101(ucf[0])
    groups = parts(clips, lambda c: c.id[:-4])
    assert [len(g) for g in groups.values()] == [36, 4, 8] and len(set.union(*groups.values())) == 48
    assert {g[-3:] for g in groups["test"]} == {"g01", "g02"} and len({c.label for c in clips if c.split == "val"}) == 4
    assert all(classes[c.label].lower() == c.id.split("_")[1].lower() for c in clips)


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
    done = called("cremad", "--raw", tmp_path, "--out", tmp_path / "out")
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
    clips, names, specs = data.ucf101(tmp_path, fold=fold)
    assert names == ["ApplyEyeMakeup", "HandstandPushups", "jumpRope", "YoYo"] and specs["flow"]["flow"].startswith("DIS")
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
    clips, _, specs = data.ucf101(tmp_path)
    assert specs["flow"]["flow"].startswith("TV-L1")
    assert [c.id for c in clips if not c.files["flow"].is_dir()] == [names[0][1]]  # is skipped, not computed
    assert [len(axis) for axis in data.flow_pictures(clips[1].files["flow"])] == [1, 1]


@pytest.mark.parametrize("name", ["cremad", "kinetics", "ucf101"])
def test_an_empty_folder_gets_one_clear_line(name, tmp_path):
    done = called(name, "--raw", tmp_path, "--out", tmp_path / "out")
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
    done = called(table, "--out", tmp_path, "--size", 16, "--frames", 3, "--keep", 3, "--seconds", 0.5)
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
    assert called(table, "--out", tmp_path, "--size", 16, "--frames", 3, "--keep", 3, "--seconds", 0.5).returncode == 0
    write_csv(table, header, [[*row[:-1], "a"] if k == 3 else row for k, row in enumerate(rows)])
    done = called(table, "--out", tmp_path, "--size", 16, "--frames", 3, "--keep", 3, "--seconds", 0.5)
    assert done.returncode == 2 and "was made with other parameters (csv" in done.stderr


def test_splits_groups_and_ids_of_your_own_data(clips):
    folder, _, rows = clips
    split = ["train"] * 12 + ["valid"] * 4 + ["test"] * 4
    table = write_csv(folder / "split.csv", ["id", "scan", "label", "split"], [
        [f"clip {k}", row[3], row[-1], split[k]] for k, row in enumerate(rows)])  # fmt: skip
    listed, classes, _ = data.own_data(table)
    assert [(c.id, c.split) for c in listed] == [(f"clip {k}", split[k][:5].replace("valid", "val")) for k in range(20)]
    assert [classes[c.label] for c in listed] == [row[-1] for row in rows]
    table = write_csv(folder / "group.csv", ["scan", "label", "group"], [[r[3], r[-1], f"g{k // 2}"] for k, r in enumerate(rows)])
    listed = data.own_data(table)[0]
    groups = parts(listed, lambda c: (int(c.id[5:]) - 2) // 2)
    assert [len(g) for g in groups.values()] == [8, 1, 1] and len(set.union(*groups.values())) == 10


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
    done = called(table, "--out", tmp_path)
    assert done.returncode == 2 and re.search(says, done.stderr) and len(done.stderr.splitlines()) == 1, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, content, says", [
    ("demo.csv", "label,scan\na,0.png\n", "cannot be called 'demo'"), ("mosi.csv", "", "cannot be called 'mosi'"),
    ("-x y.csv", "label\n", "cannot be called"), ("gone.csv", None, "No such file"), ("empty.csv", "", "cannot be understood.*No columns"),
    ("semicolons.csv", "label;scan\na;0.png\n", "with commas between them"), ("binary.csv", b"\xff\xfe\x00label", "cannot be understood"),
    ("nul.csv", "label,scan\na,\0.png\n", "have their files there|cannot be understood"), ("one.csv", "label,scan\n" + "a,0.png\n" * 9, "split 0 have their files|in the val split"),
])  # fmt: skip
def test_a_table_that_is_none_gets_one_clear_line(name, content, says, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    done = called(tmp_path / name, "--out", tmp_path / "out")
    assert done.returncode == 2 and re.search(says, done.stderr) and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "out").exists()


def test_bad_files_of_your_own_data_are_skipped_and_listed(clips, tmp_path):
    folder, _, rows = clips
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    np.save(folder / "wide.npy", np.ones((2, 9)))
    np.save(folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    names = [["bad.png", rows[0][5]], [rows[1][3], "wide.npy"], [rows[2][3], "objects.npy"], ["gone.png", rows[3][5]]]
    lines = [*names, *([row[3], row[5]] for row in rows[4:])]
    table = write_csv(folder / "spoilt.csv", ["scan", "text", "label"], [[*line, "ab"[k % 2]] for k, line in enumerate(lines)])
    done = called(table, "--out", tmp_path, "--size", 8, "--max-bad", 30)
    assert done.returncode == 0 and "4 skipped" in done.stdout, done.stderr
    skipped = {i: r for _, i, r in json.loads((tmp_path / "spoilt/manifest.json").read_text())["skipped"]}
    for line, says in (2, "cannot identify image file"), (3, "9 features, where the others have 6"), (4, "Python objects"), (5, "missing"):
        assert says in skipped[f"line {line}"]


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
    done = called("mosi", "--raw", tmp_path / "bad.pkl", "--out", tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "is not CMU-MOSI" in done.stderr and "a web page or git-lfs stub" in done.stderr


@needs_real
def test_real_mosi_end_to_end(tmp_path):
    assert called("mosi", "--raw", REAL / "mosi" / "mosi.pkl", "--out", tmp_path).returncode == 0
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
    stereo = np.random.default_rng(0).normal(0, 3000, (88200, 2))
    stereo = scipy.signal.sosfilt(scipy.signal.butter(4, 3000, fs=44100, output="sos"), stereo, axis=0)
    scipy.io.wavfile.write(tmp_path / "a.wav", 44100, np.int16(stereo))
    expected, found = scipy.signal.resample_poly(stereo.mean(1) / 32768, 160, 441), data.read_sound(tmp_path / "a.wav")
    assert len(found) == pytest.approx(32000, abs=50)
    np.testing.assert_allclose(found[1000:30000], expected[1000:30000], atol=0.05 * expected.std())


@pytest.mark.parametrize("move", [(3, 2), (-4, 1)])
def test_the_flow_of_a_texture_is_how_it_moves(move, tmp_path):
    flow = data.read_flow(film(tmp_path / "a.avi", "mpeg4", options={"qmax": "3"}, move=move), data.flow_spec(3, 48))
    assert flow.shape == (3, 48, 48, 2) and flow.dtype == np.uint8
    pixels = (flow[:, 12:36, 12:36].astype(float) - 128) * 20 / 127
    np.testing.assert_allclose(np.median(pixels, (1, 2)), [move] * 3, atol=0.25)


def test_precomputed_flow_is_read_at_the_middles(tmp_path):
    folders = tmp_path / "u/v_A_g01_c01", tmp_path / "v/v_A_g01_c01"
    for folder, offset in zip(folders, (0, 100)):
        folder.mkdir(parents=True)
        for i in range(10):
            Image.new("L", (80, 60), offset + 10 * i).save(folder / f"frame{i + 1:06d}.jpg", quality=100)
    flow = data.read_flow(folders[0], data.flow_spec(3, 16))
    np.testing.assert_allclose(flow.mean((1, 2)), [[10, 110], [50, 150], [80, 180]], atol=1)
    (folders[1] / "frame000004.jpg").unlink()
    with pytest.raises(data.BadClip, match="10 pictures of flow in u, 9 in v"):
        data.read_flow(folders[0], data.flow_spec(3, 16))


# --- 3 preparing --------------------------------------------------------------------------


def test_bad_clips_are_skipped_with_their_reasons_and_the_others_are_whole(spoilt, tmp_path):
    raw, says = spoilt
    with pytest.raises(
        data.DataError, match="5 of 93 clips cannot be used, more than --max-bad 5 per cent; the last: .+"
    ):
        data.prepare("cremad", raw, tmp_path / "strict", size=32, workers=1)
    folder = data.prepare("cremad", raw, tmp_path, size=32, workers=2, max_bad=20)
    skipped = {i: reason for _, i, reason in json.loads((folder / "manifest.json").read_text())["skipped"]}
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


def start(raw, out):
    """`python data.py cremad` in a process group of its own, returned when it is at work."""
    words = [sys.executable, "data.py", "cremad", "--raw", raw, "--out", out, "--size", "32", "--workers", "2"]
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  a shell's background jobs ignore Ctrl-C
    process = subprocess.Popen(
        words, cwd=HERE, start_new_session=True, stderr=subprocess.PIPE, text=True, preexec_fn=heed
    )
    while process.poll() is None and not (out / "cremad/plan.json").exists():
        time.sleep(0.01)
    return process


def test_killed_at_any_time_it_goes_on_and_the_arrays_are_the_same_byte_for_byte(crowd, tmp_path):
    (raw, undisturbed), folder = crowd, tmp_path / "cremad"
    journal = folder / "journal.txt"
    done = lambda: journal.read_text().count("\n") if journal.exists() else 0  # noqa: E731
    for kill in os.killpg, os.killpg, os.kill:  # at last the command alone: its workers end by themselves
        process, before = start(raw, tmp_path), done()
        while kill is os.kill and done() == before and process.poll() is None:  # until more is in the journal
            time.sleep(0.01)
        time.sleep(random.random() if kill is os.killpg else 0)
        kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)  # returns when no worker holds the other end any more
    read, real = [], data.in_parallel
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "in_parallel", lambda work, jobs, workers: read.extend(jobs) or real(work, jobs, workers))
        rest = 900 - done()
        data.prepare("cremad", raw, tmp_path, size=32, workers=2)
    assert len(read) == rest < 900  # what is done is not read again
    assert arrays(folder) == arrays(undisturbed) and not list(tmp_path.rglob("*.new"))
    assert (folder / "manifest.json").read_text() == (undisturbed / "manifest.json").read_text()


@pytest.mark.parametrize("wait", [0.02, 0.5])  # while the workers are started, and later
def test_ctrl_c_is_one_clear_line_and_exit_130(wait, crowd, tmp_path):
    process = start(crowd[0], tmp_path)
    time.sleep(wait)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and told.strip() == "stopped; the same command resumes from here"
    with pytest.raises(data.DataError, match="other parameters .*size 32, now 48"):
        data.prepare("cremad", crowd[0], tmp_path, size=48)


def stop(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("where, size", [("in_parallel", 32), ("write_json", 40)])
def test_stopped_in_the_middle_of_a_line_of_the_journal_or_before_the_plan(where, size, crema, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, where, stop)
        data.prepare("cremad", crema, tmp_path, size=32)
    if where == "in_parallel":
        (tmp_path / "cremad/journal.txt").write_text("train 1")  # of "train 12\n"
    folder = data.prepare("cremad", crema, tmp_path, size=size, workers=1)  # before the plan: another size may be taken
    ids, visual = (
        json.loads((folder / "manifest.json").read_text())["splits"]["train"],
        np.load(folder / "train/visual.npy"),
    )
    np.testing.assert_array_equal(visual[1], frames_by_hand(crema / f"VideoFlash/{ids[1]}.flv", 2, size))


def test_works_under_the_spawn_start_method_and_a_finished_dataset_is_recognised(crema, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import multiprocessing, sys, data\nif __name__ == '__main__':\n"
                      "    multiprocessing.set_start_method('spawn')\n"
                      "    data.prepare('cremad', sys.argv[1], sys.argv[2], size=32, workers=2)\n")  # fmt: skip
    done = command(script, crema, tmp_path, env={**os.environ, "PYTHONPATH": str(HERE)})
    assert done.returncode == 0, done.stderr
    spawned = arrays(tmp_path / "cremad")
    assert len(spawned) == 9 and spawned == arrays(data.prepare("cremad", crema, tmp_path / "here", size=32, workers=1))
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    data.prepare("cremad", crema, tmp_path, size=32)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == times
    with pytest.raises(data.DataError, match="other parameters .*frames 2, now 3, keep 1, now 5"):
        data.prepare("cremad", crema, tmp_path, size=32, frames=3, keep=5)


@pytest.mark.parametrize("kinds", ["VideoFlash/* AudioWAV/*", "VideoFlash/*"])
def test_git_lfs_stubs_are_recognised_at_once(kinds, crema, tmp_path):
    for path in crema.glob("*/*"):
        link(path, tmp_path / path.relative_to(crema))
    for kind in kinds.split():
        for path in tmp_path.glob(kind):
            replace(path, STUB)
    with pytest.raises(data.DataError, match="0 have their files there(.|\n)*lfs pull -I(.|\n)*gitlab.com/cs-cooper-lab"):
        data.prepare("cremad", tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


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


@pytest.mark.parametrize("name, fixture", [("cremad", "spoilt"), ("kinetics", "kinetics"), ("ucf101", "ucf")])
def test_from_the_raw_download_to_a_run(name, fixture, request, tmp_path):
    raw, says = request.getfixturevalue(fixture)
    sound = () if name == "ucf101" else ("--seconds", 0.3)
    words = name, "--raw", raw, "--out", tmp_path, "--size", 32, "--frames", 1, "--max-bad", 20, *sound
    done = called(*words)
    assert done.returncode == 0 and f"{len(says)} skipped" in done.stdout, done.stderr
    skipped = {i: r for _, i, r in json.loads((tmp_path / name / "manifest.json").read_text())["skipped"]}
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
    manifest = json.loads((folder / "manifest.json").read_text())
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
    done = called("cremad", "--raw", crema, "--out", tmp_path, "--size", 16)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"is damaged ({name}" in done.stderr and "delete it and prepare it again" in done.stderr


def test_a_damaged_journal_means_reading_some_clips_again(crema, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "in_parallel", stop)
        data.prepare("cremad", crema, tmp_path, size=16)
    (tmp_path / "cremad/journal.txt").write_bytes(b"\xff\x00train\ntrain -1\ntrain 99999\n\n")
    folder = data.prepare("cremad", crema, tmp_path, size=16, workers=1)
    assert arrays(folder) == arrays(data.prepare("cremad", crema, tmp_path / "again", size=16, workers=1))


@pytest.mark.parametrize("words", [
    ["--size", "x"], ["--size", "0"], ["--size", "99999999999999999999"], ["--seconds", "nan"], ["--seconds", "inf"],
    ["--frames", "-1"], ["--keep", "2"], ["--split", "people"], ["--split-dir", "/nowhere"], ["--workers", "-3"],
    ["--max-bad", "nan"], ["--max-bad", "101"], ["--raw", "/nowhere"], ["--nonsense"], ["--out", "/dev/null"]])  # fmt: skip
def test_wrong_flags_get_one_line(words, crema, tmp_path):
    done = called("cremad", "--raw", crema, "--out", tmp_path / "out", *words)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("data.py: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [[], ["nonsense"], ["ucf101", "--raw", ".", "--fold", "4"], ["demo", "--clips", "4000"], ["demo", "--seed", "-1"], ["mosi", "--raw", "."]])  # fmt: skip
def test_wrong_commands_get_one_line(words):
    done = called(*words)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("data.py: ")


# --- 4 a prepared dataset: loading, batches, augmentation -----------------------------------------


@pytest.mark.parametrize(
    "name, content", [("manifest.json", b"{"), ("train/visual.npy", b"\x93NUMPY"), ("val/labels.npy", None)]
)
def test_a_damaged_dataset_gets_one_clear_line(name, content, prepared, tmp_path):
    shutil.copytree(prepared / "demo", tmp_path / "demo", ignore=shutil.ignore_patterns("raw"))
    (tmp_path / "demo" / name).unlink()
    if content is not None:
        (tmp_path / "demo" / name).write_bytes(content)
    with pytest.raises(data.DataError, match="is damaged .* delete it and prepare it again"):
        data.load("demo", tmp_path)


# --- batches --------------------------------------------------------------------------------------


def test_batches_hold_every_clip_once_and_repeat_with_the_seed(prepared):
    split = data.load("demo", prepared).train
    whole = {m: data.read_inputs(split, m, split.rows) for m in split.arrays}

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


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_out_every_batch(world, prepared):
    split = data.load("demo", prepared).val  # 21 clips
    shuffled = [list(data.batches(split, 8, 1, part=(rank, world))) for rank in range(world)]
    for k, (x, y) in enumerate(data.batches(split, 8, 1)):
        pieces = [share[k] for share in shuffled]
        assert len({len(labels) for _, labels in pieces}) == 1
        drawn = {tuple(row) for piece, _ in pieces for row in piece["audio"].flatten(1).tolist()}
        assert drawn == {tuple(row) for row in x["audio"].flatten(1).tolist()}
        assert 0 <= sum(len(labels) for _, labels in pieces) - len(y) < world


def test_arrays_held_on_the_device_and_batches_read_ahead_are_the_same(prepared, monkeypatch):
    dataset = data.load("demo", prepared)

    def read():
        found = data.batches(dataset.train, 16, 0, augmented=True)
        return [x for inputs, labels in found for x in (*inputs.values(), labels)]

    plain = read()
    with monkeypatch.context() as patch:  # as on CUDA
        patch.setattr(data, "map", lambda work, items: data.prefetch(work, items, torch.device("cpu")), raising=False)
        threaded = read()
    assert not data.move_to_gpu(dataset, "cpu", max_bytes=1000) and isinstance(dataset.train.arrays["audio"], np.ndarray)
    assert data.move_to_gpu(dataset, "cpu", max_bytes=10**9) and isinstance(dataset.train.arrays["audio"], torch.Tensor)
    for x, y, z in zip(plain, threaded, read(), strict=True):
        assert torch.equal(x, y) and torch.equal(x, z)


def test_noise_has_the_strength_asked_for_and_stays_with_its_clip(prepared):
    clean, noisy, again = (data.load("demo", prepared) for _ in range(3))
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


def test_noise_leaves_padding_alone_and_refuses_pictures(prepared, tmp_path):
    rows, sequence = np.arange(6), np.ones((6, 5, 3), np.float32) * np.arange(1, 7)[:, None, None]
    sequence[:, 3:] = 0
    splits = [
        data.Split({"text": sequence}, {"text": {"kind": "sequence"}}, rows, rows % 2, list(rows)) for _ in range(3)
    ]
    dataset = data.Dataset(*splits, classes=["a", "b"], shapes={"text": (5, 3)})
    data.add_noise(dataset, "text", 1.0)
    noisy = dataset.val.arrays["text"]
    assert (noisy[:, 3:] == 0).all() and (noisy[:, :3] != sequence[:, :3]).all()
    demo = data.load("demo", prepared)
    for modality, says in (("visual", "not on visual"), ("text", "no text to put noise on; there is audio, visual")):
        with pytest.raises(data.DataError, match=says):
            data.add_noise(demo, modality, 1.0)


# --- augmentation ---------------------------------------------------------------------------------


def a_split(kind, keep=1, same=False):
    pictures = {"frames": data.frames_spec, "flow": data.flow_spec}
    spec = pictures[kind](2, 24, keep) if kind in pictures else data.fbank_spec(20, 0.4)
    array = np.random.default_rng(0).integers(0, 256, (12, *spec["shape"])).astype(spec["dtype"])
    array = array[:1].repeat(12, 0) if same else array
    return data.Split({kind: array}, {kind: spec}, np.arange(12), np.arange(12), [str(i) for i in range(12)])


@pytest.mark.parametrize("kind", ["frames", "flow", "fbank"])
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


def test_masks_hide_a_band_of_bins_and_of_time_and_nothing_else():
    x = torch.rand(200, 1, 50, 100) + 1
    y = data.augment(x.clone(), "fbank", np.random.default_rng(0))
    hidden = (y == 0)[:, 0]
    assert torch.equal(y[:, 0][~hidden], x[:, 0][~hidden])
    bins, times = hidden.all(2), hidden.all(1)
    assert torch.equal(hidden, bins[:, :, None] | times[:, None])
    for lines, n in (bins, 50), (times, 100):
        assert lines.sum(1).max() == n // 5 and lines.sum(1).min() == 0 and (lines.diff(dim=1).sum(1) <= 2).all()


def test_of_several_frames_kept_the_middle_one_is_taken_unless_augmented():
    split = a_split("frames", keep=3)
    spec, array = split.specs["frames"], split.arrays["frames"]
    expected = (array[:, [1, 4]].astype(np.float32) - spec["mean"]) / spec["std"]
    x = data.read_inputs(split, "frames", np.arange(12))
    np.testing.assert_allclose(x.permute(0, 1, 3, 4, 2).numpy(), expected, rtol=1e-4, atol=1e-5)
    split.arrays["frames"] = np.broadcast_to(np.arange(6, dtype=np.uint8)[:, None, None, None], array.shape)
    y = data.read_inputs(split, "frames", np.arange(12).repeat(9), rng=np.random.default_rng(0))[:, :, 0, 12, 12]
    drawn = np.rint(y.numpy() * spec["std"][0] + spec["mean"][0])
    assert {tuple(d) for d in drawn} == {(i, j) for i in (0, 1, 2) for j in (3, 4, 5)}
