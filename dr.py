"""Diagnosing & Re-learning for balanced multimodal learning
(Wei, Li, Feng, Hu; ECCV 2024, arXiv 2407.09705).

A network that learns from several modalities at once leans on the one that it
learns first. Every H epochs D&R looks at each modality's encoder: k-means
clusters its features of the training and of a validation set, and the gap g
between the purities of the two is the encoder's learning state. Then every
encoder is pulled back towards its initial weights, the further the larger g:

    a = tanh(lambda * g)        theta <- (1 - a) * theta + a * theta_init

    python dr.py                       D&R on the demo, drawn on the spot
    python dr.py --method joint        the same network, trained and left alone
    python dr.py --method joint --modalities audio       one modality alone
    python dr.py --dataset cremad      after python data.py cremad --raw ...
    python dr.py --sweep method=joint,dr seed=0,1,2      a grid, over seeds
    python dr.py --evaluate runs/demo-dr-0/best.pt       on the test set
    python dr.py --tsne runs/demo-dr-0/best.pt           its features, drawn
    torchrun --nproc_per_node=2 dr.py --dataset cremad   on two GPUs
    python dr.py --bench               how fast this machine trains

A run leaves config.json, log.jsonl, summary.json, best.pt and curves.png in
runs/<name>/. If it is stopped, the same command goes on.
"""

import argparse
import csv
import io
import itertools
import json
import math
import os
import pickle
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import OrderedDict
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import scipy.io.wavfile
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from scipy import stats
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import BasicBlock
from tqdm import tqdm

import data
from data import kaldi

# ---------------------------------------------------------------------------------------------------
# 1  Encoders: one per modality, each from its input to features (B, D)
# ---------------------------------------------------------------------------------------------------


class PictureEncoder(nn.Module):
    """A network from pictures (B, C, H, W) to maps (B, D, h, w), for spectrograms (B, 1, F, T) and for frame stacks
    (B, T, C, H, W), which are folded into the batch; its features are the mean over space and time."""

    def __init__(self, network, width):
        super().__init__()
        self.network, self.width = network, width

    def tokens(self, x):  # one a place of a map -> (B, T*h*w, D), no padding
        pictures = x if x.dim() == 4 else x.flatten(0, 1)  # (B*T, C, H, W)
        return self.network(pictures).flatten(2).mT.reshape(len(x), -1, self.width), None

    def forward(self, x):
        return masked_mean(*self.tokens(x))  # (B, D)


def resnet18(shape):
    """torchvision's ResNet-18 from scratch, for any number of channels; 512 features, as in the paper."""
    network = torchvision.models.resnet18(weights=None)
    network.conv1 = nn.Conv2d(shape[-3], 64, kernel_size=7, stride=2, padding=3, bias=False)
    return PictureEncoder(nn.Sequential(OrderedDict(list(network.named_children())[:-2])), 512)  # no pooling, no head


def small_resnet(shape, widths=(16, 32, 64, 128)):
    """A narrow ResNet for small pictures and spectrograms, such as the demo's; 128 features."""
    layers = [nn.Conv2d(shape[-3], widths[0], 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    for before, after in zip(widths, widths[1:]):
        shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride=2, bias=False), nn.BatchNorm2d(after))
        layers.append(BasicBlock(before, after, stride=2, downsample=shortcut))
    return PictureEncoder(nn.Sequential(*layers), widths[-1])


def transformer(width, layers):
    """`layers` pre-norm self-attention layers on tokens (B, N, width), and a last LayerNorm."""
    layer = nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=4 * width, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)


class SequenceTransformer(nn.Module):
    """A small transformer on feature sequences (B, T, D) whose padding is exactly 0; averaged over what is not."""

    def __init__(self, shape, width=64, layers=2):
        super().__init__()
        self.width = width
        self.embed = nn.Linear(shape[-1], width)
        self.position = nn.Parameter(0.02 * torch.randn(shape[0], width))
        self.layers = transformer(width, layers)

    def tokens(self, x):  # one a time step -> (B, T, width), and which of them are padding (B, T)
        padding = (x == 0).all(-1)
        padding[:, 0] &= ~padding.all(1)  # nothing at all: look at the first step, so that there is a mean
        return self.layers(self.embed(x) + self.position, src_key_padding_mask=padding), padding

    def forward(self, x):
        return masked_mean(*self.tokens(x))


def masked_mean(tokens, padding):
    """The mean over those of the tokens (B, N, D) that are not padding (B, N) -> (B, D)."""
    if padding is None:
        return tokens.mean(1)
    return tokens.masked_fill(padding[..., None], 0).sum(1) / (~padding).sum(1, keepdim=True)


ENCODERS = {"resnet18": resnet18, "small": small_resnet, "transformer": SequenceTransformer}


def default_encoder(shape):
    """The encoder for samples of this shape: (T, D) a sequence, else pictures, small or large."""
    return "transformer" if len(shape) == 2 else "small" if shape[-2] <= 64 else "resnet18"


# ---------------------------------------------------------------------------------------------------
# 2  Fusion, and the multimodal model
# ---------------------------------------------------------------------------------------------------


class Concatenation(nn.Module):
    """The features side by side, and one linear layer: the official code's fusion."""

    def __init__(self, widths, n_classes):
        super().__init__()
        self.head = nn.Linear(sum(widths.values()), n_classes)

    def forward(self, features):  # {modality: (B, D)} -> (B, n_classes)
        return self.head(torch.cat(list(features.values()), 1))


FUSIONS = {"concat": Concatenation}


class MultimodalModel(nn.Module):
    """One encoder per modality, then a fusion. `shapes` is {modality: shape of one sample}, one or more of them."""

    def __init__(self, shapes, n_classes, encoder="auto", fusion="concat"):
        super().__init__()
        kinds = {m: default_encoder(s) if encoder == "auto" or len(s) == 2 else encoder for m, s in shapes.items()}
        self.encoders = nn.ModuleDict({m: ENCODERS[kinds[m]](shape) for m, shape in shapes.items()})
        self.fusion = FUSIONS[fusion]({m: e.width for m, e in self.encoders.items()}, n_classes)
        self.apply(initialise)

    def features(self, inputs):  # {modality: input} -> {modality: (B, D)}
        return {m: encoder(inputs[m]) for m, encoder in self.encoders.items()}

    def forward(self, inputs):
        if isinstance(self.fusion, Bottleneck):
            return self.fusion({m: encoder.tokens(inputs[m]) for m, encoder in self.encoders.items()})
        return self.fusion(self.features(inputs))

    def own(self, m):
        """What belongs to modality m and is re-learnt with it: its encoder; and in a Bottleneck its layers, too."""
        if isinstance(self.fusion, Bottleneck):
            return nn.ModuleList([self.encoders[m], self.fusion.layers[m]])
        return self.encoders[m]


def initialise(module):
    """The official code's initial weights; linear layers keep PyTorch's."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


# ---------------------------------------------------------------------------------------------------
# 3  Diagnosing: how far has each encoder learnt?
# ---------------------------------------------------------------------------------------------------


def purity(features, labels, n_clusters, n_init=10, seed=0, kmeans=KMeans):
    """How well k-means clusters of the features agree with the labels, from 1/C to 1: the paper's P.

        P = 1/N * sum over clusters of the size of the cluster's largest class

    features (N, D) and labels (N,), arrays or CPU tensors; labels may be any integers. As in the official code every
    feature is first scaled to [-1, 1] over this very set. Raises ValueError for fewer samples than clusters,
    for lengths that differ, and for features that are not finite. `kmeans` is scikit-learn's, or FastKMeans, below,
    which finds the same clusters.
    """
    x, y = np.asarray(features, dtype=np.float32), np.asarray(labels)
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise ValueError(f"purity takes features (N, D) and labels (N,), not {x.shape} and {y.shape}")
    if len(x) < n_clusters:
        raise ValueError(f"purity takes at least as many samples ({len(x)}) as clusters ({n_clusters})")
    if not np.isfinite(x).all():
        raise ValueError("the features are not finite: training has diverged; try a smaller learning rate")
    low, high = x.min(0), x.max(0)
    x = 2 * (x - low) / np.where(high > low, high - low, 1) - 1
    clusters = kmeans(n_clusters, n_init=n_init, random_state=seed).fit_predict(x)  # (N,) it never sees the labels
    classes, y = np.unique(y, return_inverse=True)
    count = np.zeros((n_clusters, len(classes)), dtype=int)
    np.add.at(count, (clusters, y), 1)  # count[k, c]: samples of class c in cluster k
    return float(count.max(1).sum() / len(y))


def purity_gap(train_features, train_labels, val_features, val_labels, n_clusters, n_init=10, seed=0, kmeans=KMeans):
    """An encoder's learning state, g = |P_train - P_val| -> (P_train, P_val, g).

    Large: well learnt, or over-trained. Small: under-trained, or with little to tell.
    """
    train = purity(train_features, train_labels, n_clusters, n_init, seed, kmeans)
    val = purity(val_features, val_labels, n_clusters, n_init, seed, kmeans)
    return train, val, abs(train - val)


@torch.no_grad()
def extract_features(model, split, batch_size=128, device="cpu"):
    """All features of a split, in eval mode and without augmentation -> ({modality: (N, D)}, labels (N,))."""
    model.eval()
    parts = [(model.features(inputs), y) for inputs, y in data.batches(split, batch_size, device=device, part=ranks())]
    features = {m: torch.cat([f[m] for f, _ in parts]).float().cpu().numpy() for m in parts[0][0]}
    labels = torch.cat([y for _, y in parts]).cpu().numpy()
    return {m: gather(f) for m, f in features.items()}, gather(labels)


def diagnose(model, train, val, n_clusters, n_init=10, batch_size=128, device="cpu"):
    """The purity gap of every modality -> {modality: (P_train, P_val, g)}; n_clusters is the number of classes."""
    x_train, y_train = extract_features(model, train, batch_size, device)
    x_val, y_val = extract_features(model, val, batch_size, device)
    gap = lambda m: purity_gap(x_train[m], y_train, x_val[m], y_val, n_clusters, n_init, kmeans=FastKMeans)  # noqa: E731
    return once(lambda: {m: gap(m) for m in x_train})  # of several processes, one runs k-means


# ---------------------------------------------------------------------------------------------------
# 4  Re-learning: back towards the initial weights, by as much as the gap says
# ---------------------------------------------------------------------------------------------------


def relearning_strength(gap, lam):
    """a = tanh(lambda * g), from 0, which leaves an encoder alone, towards 1, which starts it anew."""
    return math.tanh(lam * gap)


@torch.no_grad()
def soft_reinit(module, init_state, strength):
    """theta <- (1 - a) * theta + a * theta_init, in place, for all parameters of `module`.

    `init_state` is the module's state_dict copied before the first step. Batch-norm scales and biases are
    parameters and are treated; running statistics are buffers and are not, nor is the optimiser's
    momentum: so does the official code.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"a re-learning strength lies in [0, 1], not {strength}")
    for name, parameter in module.named_parameters():
        parameter.lerp_(init_state[name].to(parameter), strength)


# ---------------------------------------------------------------------------------------------------
# 5  Beside the method: a faster k-means, and what to compare with: an encoder, fusions, ablations
# ---------------------------------------------------------------------------------------------------


class FastKMeans(KMeans):
    """scikit-learn's KMeans, the same clusters in a half to a quarter of the time when there are many of them.

    Most of that time goes into k-means++, which looks at all samples for every centre of every restart. Here the
    same draws choose the centres of all restarts together, by one matrix product a centre.
    """

    def fit(self, X, y=None, sample_weight=None):
        starts = X[self.plus_plus(X)]  # (R, K, D): centres to start from, in R restarts
        fits = [KMeans(self.n_clusters, init=start, n_init=1).fit(X) for start in starts]
        vars(self).update(vars(min(fits, key=lambda fit: fit.inertia_)))
        return self

    def plus_plus(self, X):  # (N, D) -> rows of X (R, K)
        x = (X - X.mean(0)).astype(np.float64)
        N, R, norms, one = len(x), self.n_init, (x * x).sum(1), np.ones(len(x), np.float32)
        tries = 2 + int(math.log(self.n_clusters))
        draws = np.random.RandomState(self.random_state).random_sample((R, 1 + (self.n_clusters - 1) * tries))
        chosen, nearest = [], np.full((R, N), np.inf, np.float32)  # squared distance to the nearest centre
        for k in range(self.n_clusters):
            if k == 0:
                rows = np.int64(draws[:, :1] * N)
            else:  # a sample is drawn the oftener the farther it is from all centres so far
                u = draws[:, 1 + (k - 1) * tries :][:, :tries]
                rows = np.stack([np.searchsorted(d.cumsum(), (d @ one) * v) for d, v in zip(nearest, u)])
                rows = np.minimum(rows, N - 1)  # (R, tries)
            at = rows.ravel()
            d = np.maximum(norms + norms[at, None] - 2 * x[at] @ x.T, 0).astype(np.float32).reshape(*rows.shape, N)
            d = np.minimum(d, nearest[:, None])  # (R, tries, N)
            best = np.stack([(try_ @ one).argmin() for try_ in d])  # the try that leaves the samples nearest
            nearest = d[np.arange(R), best]
            chosen.append(rows[np.arange(R), best])
        return np.stack(chosen, 1)


class PatchTransformer(nn.Module):
    """A small Vision Transformer (Dosovitskiy et al. 2021), from pictures (B, C, H, W) to maps (B, D, h, w)."""

    def __init__(self, shape, width=128, layers=4):
        super().__init__()
        patch = 8 if shape[-2] <= 64 else 16
        self.embed = nn.Conv2d(shape[-3], width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(width, shape[-2] // patch, shape[-1] // patch))
        self.layers = transformer(width, layers)

    def forward(self, x):
        x = self.embed(x) + self.position  # (B, D, h, w)
        return self.layers(x.flatten(2).mT).mT.unflatten(2, x.shape[2:])


class Sum(nn.Module):
    """A linear classifier per modality; their logits are added."""

    def __init__(self, widths, n_classes):
        super().__init__()
        self.heads = nn.ModuleDict({m: nn.Linear(width, n_classes) for m, width in widths.items()})

    def forward(self, features):
        return sum(head(features[m]) for m, head in self.heads.items())


class FiLM(nn.Module):
    """The first modality scales and shifts the features of the second (Perez et al. 2018)."""

    def __init__(self, widths, n_classes):
        super().__init__()
        self.first, self.second = pair(widths)
        self.film = nn.Linear(widths[self.first], 2 * widths[self.second])
        self.head = nn.Linear(widths[self.second], n_classes)

    def forward(self, features):
        gamma, beta = self.film(features[self.first]).chunk(2, 1)  # (B, D) each
        return self.head(gamma * features[self.second] + beta)


class Gated(nn.Module):
    """The first modality opens and closes the features of the second (Kiela et al. 2018)."""

    def __init__(self, widths, n_classes, width=512):
        super().__init__()
        self.first, self.second = pair(widths)
        self.gate, self.value = nn.Linear(widths[self.first], width), nn.Linear(widths[self.second], width)
        self.head = nn.Linear(width, n_classes)

    def forward(self, features):
        return self.head(self.gate(features[self.first]).sigmoid() * self.value(features[self.second]))


def pair(widths):
    if len(widths) != 2:
        raise data.DataError(f"film and gated join two modalities, not {len(widths)}: name two with --modalities")
    return widths


class Bottleneck(nn.Module):
    """The modalities' tokens meet only in a few shared bottleneck tokens (MBT, Nagrani et al. 2021).

    In every layer a modality's tokens and the bottleneck attend to each other, by weights of the modality's own;
    the bottleneck goes on as the mean of what the modalities made of it. These layers work on the tokens of one
    modality, so they belong to it and are re-learnt with its encoder; the bottleneck and the classifier, which is
    one for all modalities (their logits are averaged), belong to none and are left alone.
    """

    def __init__(self, widths, n_classes, width=128, size=4, layers=2):
        super().__init__()
        self.bottleneck = nn.Parameter(0.02 * torch.randn(size, width))
        self.layers = nn.ModuleDict(
            {m: nn.ModuleList([nn.Linear(w, width), *(transformer(width, 1) for _ in range(layers))])
             for m, w in widths.items()}
        )  # fmt: skip
        self.head = nn.Linear(width, n_classes)

    def forward(self, tokens):  # {modality: tokens (B, N, D), padding (B, N) or None}
        x, S = {m: self.layers[m][0](t) for m, (t, _) in tokens.items()}, len(self.bottleneck)
        padding = {m: None if p is None else F.pad(p, (S, 0)) for m, (_, p) in tokens.items()}
        shared = self.bottleneck.expand(len(next(iter(x.values()))), -1, -1)  # (B, S, width)
        for k in range(1, len(self.layers[next(iter(x))])):
            y = {m: self.layers[m][k](torch.cat([shared, x[m]], 1), src_key_padding_mask=padding[m]) for m in x}
            x, shared = {m: y[m][:, S:] for m in y}, sum(y[m][:, :S] for m in y) / len(y)
        means = [masked_mean(x[m], tokens[m][1]) for m in x]
        return self.head(torch.stack(means)).mean(0)


# D&R with one thing changed; each is a --method.
ABLATIONS = {
    "dr-same": "one strength for all modalities, from their mean gap",
    "dr-hard": "strength 1, back to the initial weights",
    "dr-largest": "only the modality with the largest gap",
    "dr-smallest": "only the modality with the smallest gap",
    "dr-statistics": "batch-norm's running statistics, too",
    "dr-momentum": "the optimiser's momentum set to 0, too",
    "dr-new": "towards new random weights",
}


def relearning_strengths(gaps, lam, method="dr"):
    """{modality: g} -> {modality: a}, by D&R or by one of its ablations."""
    strengths = {m: relearning_strength(g, lam) for m, g in gaps.items()}
    if method == "dr-same":
        return dict.fromkeys(gaps, relearning_strength(sum(gaps.values()) / len(gaps), lam))
    if method == "dr-hard":
        return dict.fromkeys(gaps, 1.0)
    if method in ("dr-largest", "dr-smallest"):
        chosen = (max if method == "dr-largest" else min)(gaps, key=gaps.get)
        return {m: a if m == chosen else 0.0 for m, a in strengths.items()}
    return strengths


@torch.no_grad()
def reset_more(part, init_state, strength, optimiser, method):
    """What two ablations treat besides the parameters: running statistics, momentum."""
    if method == "dr-statistics":
        for name, buffer in part.named_buffers():
            if buffer.is_floating_point():  # not the count of batches
                buffer.lerp_(init_state[name].to(buffer), strength)
    if method == "dr-momentum" and strength > 0:
        for parameter in part.parameters():
            optimiser.state[parameter]["momentum_buffer"].zero_()


ENCODERS["vit"] = lambda shape: PictureEncoder(PatchTransformer(shape), 128)
FUSIONS |= {"sum": Sum, "film": FiLM, "gated": Gated, "mbt": Bottleneck}


# ---------------------------------------------------------------------------------------------------
# 6  Training and evaluating
# ---------------------------------------------------------------------------------------------------

# CREMA-D's are the official code's; the paper trains its other video datasets alike.
OFFICIAL = dict(epochs=90, batch_size=64, lr=0.002, every=20, times=3)
PRESETS = {
    "demo": dict(epochs=40, batch_size=64, lr=0.02, every=8, times=3),
    "cremad": OFFICIAL,
    "kinetics": OFFICIAL,
    "ucf101": OFFICIAL,
    "mosi": dict(epochs=30, batch_size=32, lr=0.01, every=6, times=3),
}


def flag(default, help, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    """Everything that a run depends on; every field is a flag. What is None comes from the dataset's preset."""

    dataset: str = flag("demo", "what to train on", list(PRESETS))
    method: str = flag(
        "dr", "dr: diagnose and re-learn; joint: diagnose only; or an ablation", ["dr", "joint", *ABLATIONS]
    )
    modalities: str = flag("", "which, such as visual or audio+visual; all if not given")
    encoder: str = flag("auto", "of pictures; auto: by their size", ["auto", "resnet18", "small", "vit"])
    fusion: str = flag("concat", "how the features are joined", list(FUSIONS))
    noise_audio: float = flag(0.0, "noise on the sound, in standard deviations of it")
    augment: bool = flag(False, "crops, flips and masks in training; the official code runs without")
    lam: float = flag(3.0, "lambda in a = tanh(lambda * gap)")
    every: int = flag(None, "H: diagnose after epochs H, 2H, ..., counted from 0")
    times: int = flag(None, "re-learn at most so many times")
    epochs: int = flag(None, "how long to train")
    batch_size: int = flag(None, "samples a step")
    lr: float = flag(None, "learning rate of SGD, constant")
    momentum: float = flag(0.9, "momentum of SGD")
    weight_decay: float = flag(1e-4, "weight decay of SGD")
    n_init: int = flag(10, "restarts of k-means")
    track_purity: bool = flag(False, "after each epoch, the purity of the test set's features")
    seed: int = flag(0, "of the initial weights and of the order of batches")
    precision: str = flag("auto", "bf16 (autocast) or fp32; auto: bf16 on CUDA", ["auto", "bf16", "fp32"])
    device: str = flag("auto", "cpu, cuda or mps; auto: the best there is")
    data: str = flag("prepared", "folder of the prepared datasets")
    out: str = flag("runs", "folder of the runs")
    name: str = flag("", "of the run; made of what is not default if not given")

    def __post_init__(self):
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{f.name} is one of {', '.join(choices)}, not {value!r}")
        self.modalities = self.modalities.replace(",", "+")
        for key, value in PRESETS[self.dataset].items():
            if getattr(self, key) is None:
                setattr(self, key, value)
        for key, least in dict(every=1, epochs=1, batch_size=1, n_init=1, times=0, lam=0, noise_audio=0).items():
            if getattr(self, key) < least:
                raise ValueError(f"{key} is {least} or more, not {getattr(self, key)}")
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"
        if not self.name:
            elsewhere = ("method", "seed", "device", "data", "out", "name")
            more = {k: v for k, v in changed(self).items() if k not in elsewhere}
            words = [v if k == "modalities" else f"{k}={v}" for k, v in more.items()]
            self.name = "-".join([self.dataset, self.method, *words, str(self.seed)])


def changed(config):
    """{field: value} of what is not the default of a config's dataset."""
    usual = Config(dataset=config.dataset, name="-")
    return {k: v for k, v in asdict(config).items() if v != getattr(usual, k)}


def set_up(config):
    """Set PyTorch up for a run; under torchrun join the other processes, a GPU each, which share out every batch."""
    if config.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # matters to fp32 alone, which is then exact
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if config.device == "cuda" else "gloo")


def ranks():
    """(which, of how many) processes this is: (0, 1) but under torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(values):
    """The arrays (N, ...) or lists of all ranks as one, in the order of the ranks."""
    if ranks()[1] == 1:
        return values
    parts = [None] * ranks()[1]
    dist.all_gather_object(parts, values)
    return np.concatenate(parts) if isinstance(values, np.ndarray) else sum(parts, [])


def once(work):
    """work(), done by rank 0 alone; every rank gets what it returns."""
    box = [work() if ranks()[0] == 0 else None]
    if ranks()[1] > 1:
        dist.broadcast_object_list(box)
    return box[0]


class AllReduce(torch.autograd.Function):
    """The sum over the ranks; its gradient goes back to all of them."""

    @staticmethod
    def forward(ctx, x):
        dist.all_reduce(x := x.clone())
        return x

    backward = forward


class SharedBatchNorm(nn.BatchNorm2d):
    """Batch-norm over a batch that lies in equal pieces on several ranks: PyTorch's SyncBatchNorm, for CPUs."""

    def forward(self, x):  # (B, C, H, W)
        if not self.training:
            return super().forward(x)
        moments = torch.stack([x.mean((0, 2, 3)), x.square().mean((0, 2, 3))])
        mean, square = AllReduce.apply(moments) / ranks()[1]
        variance, n = square - mean.square(), x.numel() // x.shape[1] * ranks()[1]
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(variance.detach() * n / (n - 1), self.momentum)
        self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]


@torch.no_grad()
def evaluate(model, split, batch_size=128, device="cpu"):
    """Accuracy and macro F1, in per cent, over a whole split."""
    model.eval()
    parts = data.batches(split, batch_size, device=device, part=ranks())
    scores = [(model(inputs).argmax(1), y) for inputs, y in parts]
    predicted, labels = (gather(torch.cat(part).cpu().numpy()) for part in zip(*scores))
    f1 = f1_score(labels, predicted, average="macro", zero_division=0)
    return {"accuracy": 100 * float(accuracy_score(labels, predicted)), "macro_f1": 100 * float(f1)}


def probe(model, train, test, device="cpu"):
    """What each encoder knows by itself: test accuracy in per cent of a linear classifier on its frozen features
    (paper, Fig. 1b and 1c) -> {modality: accuracy}."""
    x_train, y_train = extract_features(model, train, device=device)
    x_test, y_test = extract_features(model, test, device=device)
    linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    return once(lambda: {m: 100 * linear.fit(x_train[m], y_train).score(x_test[m], y_test) for m in x_train})


def step(model, optimiser, inputs, labels):
    """One step of training -> the batch's mean loss, and its logits (B, C)."""
    logits = model(inputs).float()
    loss = F.cross_entropy(logits, labels)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.detach(), logits


def train_epoch(model, optimiser, split, config, epoch):
    """One pass over the training set -> (mean loss, accuracy in per cent)."""
    model.train()
    (rank, world), device = ranks(), config.device
    shuffled = data.batches(split, config.batch_size, (config.seed, epoch), device, config.augment, (rank, world))
    bar = tqdm(shuffled, f"epoch {epoch}", math.ceil(len(split) / config.batch_size), leave=False,
               disable=True if rank else None, ncols=78, unit="step")  # fmt: skip
    totals = torch.zeros(3, device=device)  # of loss, right answers, clips; read once an epoch: no step waits for it
    for inputs, labels in bar:
        loss, logits = step(model, optimiser, inputs, labels)
        right = (logits.argmax(1) == labels).float().sum()
        totals += torch.stack([loss * len(labels), right, torch.full_like(right, len(labels))])
    if world > 1:
        dist.all_reduce(totals)
    loss_sum, right, count = totals.tolist()
    if not math.isfinite(loss_sum):
        raise FloatingPointError(f"the loss is {loss_sum} in epoch {epoch}: try a smaller --lr")
    return loss_sum / count, 100 * right / count


def train(config):
    """Train one model -> its history, one dict per epoch, and files in <out>/<name>/.

    An entry holds epoch (from 0), loss, train, val and test accuracy in per cent, val_f1 and test_f1, seconds;
    after a diagnosed epoch also diagnosis {modality: {train, val, gap, strength}} and relearnt (true or false);
    with --track-purity also test_purity {modality: P}. A run that was stopped goes on after its last whole epoch,
    to the same end, bit for bit on a CPU. Under torchrun every process trains on its share of each batch.
    """
    set_up(config)
    dataset = load_dataset(config)
    device, n_classes, folder = config.device, len(dataset.classes), Path(config.out) / config.name
    if device == "cuda":
        data.hold(dataset, device, torch.cuda.mem_get_info()[0] / 2)
    torch.manual_seed(config.seed)
    model, initial = make_model(config, dataset)
    optimiser = torch.optim.SGD(model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay)
    history = resume(folder / "last.pt", config, model, initial, optimiser)
    if is_first := ranks()[0] == 0:
        start_run(config, model, dataset, history)
    trained = DistributedDataParallel(model) if ranks()[1] > 1 else model

    for epoch in range(len(history), config.epochs):
        start = time.perf_counter()
        loss, accuracy = train_epoch(trained, optimiser, dataset.train, config, epoch)
        val, test = (evaluate(model, split, device=device) for split in (dataset.val, dataset.test))
        entry = {"epoch": epoch, "loss": loss, "train": accuracy, "val": val["accuracy"], "test": test["accuracy"],
                 "val_f1": val["macro_f1"], "test_f1": test["macro_f1"]}  # fmt: skip
        if config.track_purity:
            x, y = extract_features(model, dataset.test, device=device)
            entry["test_purity"] = {m: purity(f, y, n_classes, config.n_init, 0, FastKMeans) for m, f in x.items()}
        if is_first and all(entry["val"] > e["val"] for e in history):
            save(folder / "best.pt", config, epoch, model, initial)

        if epoch % config.every == 0 and epoch > 0:
            found = diagnose(model, dataset.train, dataset.val, n_classes, config.n_init, device=device)
            strengths = relearning_strengths({m: g for m, (_, _, g) in found.items()}, config.lam, config.method)
            entry["diagnosis"] = {
                m: {"train": p_train, "val": p_val, "gap": g, "strength": strengths[m]}
                for m, (p_train, p_val, g) in found.items()
            }
            relearnt = sum(e.get("relearnt", False) for e in history)
            entry["relearnt"] = config.method != "joint" and relearnt < config.times
            if entry["relearnt"]:
                target = initial
                if config.method == "dr-new":
                    with torch.random.fork_rng(devices=[]):
                        torch.default_generator.manual_seed(1000 * (config.seed + 1) + epoch)
                        target = make_model(config, dataset)[1]
                for m, strength in strengths.items():
                    soft_reinit(model.own(m), target[m], strength)
                    reset_more(model.own(m), target[m], strength, optimiser, config.method)

        entry["seconds"] = time.perf_counter() - start
        history.append(entry)
        states = gather([random_states(device)])
        if is_first:
            more = {"history": history, "optimiser": optimiser.state_dict(), "random_states": states}
            save(folder / "last.pt", config, epoch, model, initial, **more)
            report_epoch(config, folder, history)

    best = max(history, key=lambda entry: entry["val"])  # the first of the best
    weights = once(lambda: torch.load(folder / "best.pt", map_location="cpu", weights_only=True)["model"])
    model.load_state_dict(weights)
    probes = probe(model, dataset.train, dataset.test, device)
    if is_first:
        report_run(config, folder, history, best, probes)
        (folder / "last.pt").unlink()  # only an unfinished run has one
    if dist.is_initialized():
        dist.destroy_process_group()
    return history


def save(path, config, epoch, model, initial, **more):
    """Write a checkpoint, whole or not at all."""
    content = {"config": asdict(config), "epoch": epoch, "model": model.state_dict(), "initial": initial, **more}
    torch.save(content, buffer := io.BytesIO())  # into a file it does not say when the disk is full
    data.write_whole(path, lambda file: file.write(buffer.getbuffer()))


def read_checkpoint(path):
    """A checkpoint's content, on the CPU, and its config; raises DataError."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return content, Config(**content["config"])
    except FileNotFoundError:
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError, OSError) as error:
        raise data.DataError(f"{path} is no checkpoint that this dr.py wrote, or it is damaged") from error


def resume(path, config, model, initial, optimiser):
    """Take up the run whose last.pt this is, if it is there and of this config -> its history, else an empty one."""
    content, theirs = once(lambda: read_checkpoint(path) if path.exists() else (None, None))
    if content is None:
        return []
    mine, theirs = (identity(c) for c in (config, theirs))
    if other := [f"{k} {v}, now {mine[k]}" for k, v in theirs.items() if v != mine[k]]:
        raise data.DataError(f"{path} is of an unfinished run with other settings ({', '.join(other)}): finish that, "
                             "delete its folder, or give this one another --name")  # fmt: skip
    model.load_state_dict(content["model"])
    optimiser.load_state_dict(content["optimiser"])
    for m, state in content["initial"].items():
        for key, value in state.items():
            initial[m][key].copy_(value)
    states = content["random_states"][ranks()[0] % len(content["random_states"])]
    torch.set_rng_state(states[0])
    if config.device == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1])
    return content["history"]


def identity(config):
    """The fields that make a run what it is; where it runs is not among them."""
    return {k: v for k, v in asdict(config).items() if k not in ("device", "data", "out")}


def random_states(device):
    """PyTorch's random states, of the CPU and of the GPU."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if device == "cuda" else [])


def load_dataset(config):
    """The prepared dataset of a config; the demo is made if it is not there."""
    if config.dataset == "demo" and not (Path(config.data) / "demo" / "manifest.json").exists():
        once(lambda: data.prepare("demo", out=config.data))
    dataset = data.load(config.dataset, config.data, config.modalities.split("+") if config.modalities else None)
    if min(len(dataset.train), len(dataset.val)) < len(dataset.classes):
        raise data.DataError("a diagnosis takes at least as many training and validation clips as there are classes")
    if config.noise_audio:
        data.add_noise(dataset, "audio", config.noise_audio)
    return dataset


def make_model(config, dataset):
    """The model of a config, and a copy of its initial weights -> model, {modality: state_dict of what is its own}.

    On several processes batch-norm's statistics are of the whole batch, so that the result does not depend on
    how many there are.
    """
    model = MultimodalModel(dataset.shapes, len(dataset.classes), config.encoder, config.fusion)
    if ranks()[1] > 1 and config.device == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif ranks()[1] > 1:
        for module in model.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = SharedBatchNorm  # the same parameters and buffers
    model.to(config.device, memory_format=data.layout(config.device))
    if config.precision == "bf16" or (config.precision == "auto" and config.device == "cuda"):
        for name in ("forward", "features"):  # one autocast each: forward calls features, and none may be entered twice
            setattr(model, name, torch.autocast(config.device, torch.bfloat16)(getattr(model, name)))
    return model, {m: {k: v.clone() for k, v in model.own(m).state_dict().items()} for m in model.encoders}


def load_checkpoint(path, **changes):
    """A run's best.pt -> its model, dataset and config; `changes` replace what has moved, such as data or device."""
    content, config = read_checkpoint(path)
    config = replace(config, **changes)
    dataset = load_dataset(config)
    model, _ = make_model(config, dataset)
    model.load_state_dict(content["model"])
    return model, dataset, config


# ---------------------------------------------------------------------------------------------------
# 7  What a run shows and leaves behind
# ---------------------------------------------------------------------------------------------------


def start_run(config, model, dataset, history):
    """Make the run's folder, write its config and the log so far, and say what is about to be trained."""
    folder = Path(config.out) / config.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").unlink(missing_ok=True)  # only a finished run has one
    data.write_json(folder / "config.json", asdict(config))
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history))
    sizes = " / ".join(f"{len(s):,}" for s in (dataset.train, dataset.val, dataset.test))
    print(f"{config.name}: {sizes} clips for training / validation / test, {len(dataset.classes)} classes")
    for m, encoder in model.encoders.items():
        count = sum(p.numel() for p in encoder.parameters())
        print(f"  {m:<8} {'x'.join(map(str, dataset.shapes[m])):<14} -> {encoder.width} features, {count:,} weights")
    if history:
        print(f"  goes on after epoch {history[-1]['epoch']} of {config.epochs - 1}")


def report_epoch(config, folder, history):
    """A line of log.jsonl and one on the screen; after a diagnosis, a table."""
    entry = history[-1]
    with open(folder / "log.jsonl", "a") as file:
        file.write(json.dumps(entry) + "\n")
    accuracies = "   ".join(f"{split} {entry[split]:5.1f} %" for split in ("train", "val", "test"))
    print(f"epoch {entry['epoch']:3d}   loss {entry['loss']:.3f}   {accuracies}   {entry['seconds']:4.1f} s")
    if "diagnosis" not in entry:
        return
    relearnt = sum(e.get("relearnt", False) for e in history)
    title = f"re-learning {relearnt} of {config.times}" if entry["relearnt"] else "diagnosis only"
    print(f"\n  {title:<20}  purity train    purity val         gap    strength")
    for m, d in entry["diagnosis"].items():
        strength = f"{d['strength']:12.3f}" if entry["relearnt"] else "           -"
        print(f"  {m:<20}{d['train']:14.3f}{d['val']:14.3f}{d['gap']:12.3f}{strength}")
    print(flush=True)


def report_run(config, folder, history, best, probes):
    """The summary: printed, and written to summary.json; the curves drawn to curves.png."""
    last, lucky = history[-1], max(history, key=lambda e: e["test"])
    summary = {"best_val_epoch": best["epoch"], "accuracy": best["test"], "macro_f1": best["test_f1"],
               "last_accuracy": last["test"], "last_macro_f1": last["test_f1"], "best_test_accuracy": lucky["test"],
               "probe": probes, "strength": mean_strengths(history),
               "seconds": sum(e["seconds"] for e in history)}  # fmt: skip
    draw_curves(history, folder / "curves.png", config.name, "python dr.py " + " ".join(flags_of(config)))
    data.write_json(folder / "summary.json", summary)
    print(f"\n{config.name}, on the test set                     accuracy    macro F1")
    print(f"  at the best validation epoch, {best['epoch']:<3}         {best['test']:10.1f} % {best['test_f1']:9.1f} %")
    print(f"  at the last epoch, {last['epoch']:<3}                    {last['test']:10.1f} % {last['test_f1']:9.1f} %")
    print(f"  as the official code reports it: best test epoch, {lucky['epoch']}: {lucky['test']:.1f} %")
    for m, accuracy in probes.items():
        print(f"  linear probe on the frozen {m} encoder   {accuracy:10.1f} %")
    print(f"{summary['seconds']:.0f} s; config, log, weights and curves are in {folder}/")


def mean_strengths(history):
    """{modality: mean strength of a run's re-learnings}, empty if there was none."""
    strengths = [{m: d["strength"] for m, d in e["diagnosis"].items()} for e in history if e.get("relearnt")]
    return {m: sum(a[m] for a in strengths) / len(strengths) for m in (strengths[0] if strengths else ())}


# Okabe and Ito's colours, which the colour-blind can tell apart, and markers that need no colour
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "os^Dv<>"


def draw_curves(history, path, title, caption=""):
    """Accuracy, purity gap, re-learning strength and, if tracked, test purity over the epochs (paper, Fig. 4)."""
    diagnosed = [e for e in history if "diagnosis" in e]
    relearnt = [e for e in diagnosed if e["relearnt"]]
    panels = [
        ("purity gap g", diagnosed, lambda e, m: e["diagnosis"][m]["gap"]),
        ("strength a", relearnt, lambda e, m: e["diagnosis"][m]["strength"]),
        ("test purity P", [e for e in history if "test_purity" in e], lambda e, m: e["test_purity"][m]),
    ]
    panels = panels if "test_purity" in history[0] else panels[:2]
    rows = 1 + len(panels)
    figure, axes = plt.subplots(rows, 1, figsize=(7, 3 + 2 * len(panels)), sharex=True, layout="constrained",
                                height_ratios=[2] + [1] * len(panels))  # fmt: skip
    for key, name, colour, style in (("train", "training", "0.6", "-"), ("val", "validation", COLOURS[2], "--"),
                                     ("test", "test", "black", "-")):  # fmt: skip
        axes[0].plot([e["epoch"] for e in history], [e[key] for e in history], style, color=colour, label=name)
    axes[0].set(ylabel="accuracy in %", ylim=(0, 102), title=title)
    for axis, (label, shown, value) in zip(axes[1:], panels):
        for k, m in enumerate(diagnosed[0]["diagnosis"] if diagnosed else ()):
            often = len(shown) == len(history)  # a value an epoch is a curve, a few are points
            axis.plot([e["epoch"] for e in shown], [value(e, m) for e in shown], label=m, color=COLOURS[k % 7],
                      marker=MARKERS[k % 7], markersize=3 if often else 6)  # fmt: skip
        axis.set(ylabel=label, ylim=(0, 1.05) if label == "strength a" else (0, None))
    axes[-1].set(xlabel="epoch; grey lines: re-learning")
    for axis in axes:
        for e in relearnt:
            axis.axvline(e["epoch"], color="0.85", zorder=0)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, path, caption)


def evaluate_checkpoints(paths, **changes):
    """Print the accuracy and macro F1 of checkpoints on the test set."""
    print(f"on the test set{'':<33}accuracy    macro F1")
    for path in paths:
        model, dataset, config = load_checkpoint(path, **changes)
        score = evaluate(model, dataset.test, device=config.device)
        print(f"  {path:<40}{score['accuracy']:12.1f} % {score['macro_f1']:9.1f} %")


def draw_tsne(paths, out=None, **changes):
    """t-SNE of each encoder's features of the test set, coloured by class: a row a checkpoint, a panel a modality
    (paper, Fig. 3). Written beside the first checkpoint, if `out` names no other place -> its path."""
    loaded = [load_checkpoint(path, **changes) for path in paths]
    columns = max(len(dataset.shapes) for _, dataset, _ in loaded)
    figure, axes = plt.subplots(len(loaded), columns, figsize=(3.4 * columns + 1.2, 3.5 * len(loaded)),
                                squeeze=False, layout="constrained")  # fmt: skip
    for axis in axes.flat:
        axis.set_axis_off()
    for k, (row, (model, dataset, config)) in enumerate(zip(axes, loaded)):
        features, labels = extract_features(model, dataset.test, device=config.device)
        few = len(dataset.classes) <= 7
        for axis, (m, x) in zip(row, features.items()):
            plane = TSNE(perplexity=min(30, (len(x) - 1) / 3), init="pca", random_state=0)
            x2 = plane.fit_transform(StandardScaler().fit_transform(x))  # (N, 2)
            for c, name in enumerate(dataset.classes):
                colour = COLOURS[c] if few else plt.cm.hsv(c / len(dataset.classes))
                marker = MARKERS[c] if few else "o"
                axis.scatter(*x2[labels == c].T, s=9, linewidths=0, color=colour, marker=marker, label=name)
            head = config.name if axis is row[0] else ""  # once a row; it may be as wide as the row
            share = purity(x, labels, len(dataset.classes), kmeans=FastKMeans)
            axis.set_title(f"{head}\n{m}, purity {share:.2f}", fontsize=10, loc="left")
        if few and k == 0:
            row[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2)
    out = Path(out or Path(paths[0]).parent / "tsne.png")
    save_figure(figure, out, "python dr.py --tsne " + " ".join(map(str, paths)))
    return out


def save_figure(figure, path, caption=""):
    """Write a picture, without frames, with the command that made it below it."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    if caption:
        wrap = textwrap.TextWrapper(int(figure.get_figwidth() * 15), break_on_hyphens=False).wrap
        lines = [line for part in caption.splitlines() for line in wrap(part)]
        below = (0.1 + 0.13 * len(lines)) / figure.get_figheight()
        figure.get_layout_engine().set(rect=(0, below, 1, 1 - below))
        figure.text(0.01, 0.01, "\n".join(lines), family="monospace", fontsize=7, color="0.35")
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------
# 8  Experiments: a grid of configs, averaged over seeds
# ---------------------------------------------------------------------------------------------------


def parse_grid(words):
    """["method=joint,dr", "seed=0,1"] -> {"method": ["joint", "dr"], "seed": [0, 1]}; raises ValueError."""
    kinds, grid = {f.name: f.type for f in fields(Config)}, {}
    for word in words:
        key, _, values = word.partition("=")
        key = key.replace("-", "_")
        if key not in kinds or key in ("name", "out", "data", "device") or not values:
            raise ValueError(f"--sweep takes words such as method=joint,dr or seed=0,1,2, not {word!r}")
        convert = (lambda v: {"false": False, "true": True}[v.lower()]) if kinds[key] is bool else kinds[key]
        try:
            grid[key] = [convert(value) for value in values.split(",")]
        except (ValueError, KeyError):
            raise ValueError(f"{word}: {key} takes values of type {kinds[key].__name__}") from None
    return grid


def flags_of(config):
    """The command line of a run: the words that follow `python dr.py`."""
    words = ["--dataset", config.dataset]
    for key, value in changed(replace(config, name="")).items():
        if key != "name":
            words += ["--" + key.replace("_", "-")] + ([] if value is True else [str(value)])
    return words + (["--name", config.name] if config.name != replace(config, name="").name else [])


def is_done(config):
    """Has this very run been finished, on whatever device?"""
    folder = Path(config.out) / config.name
    if not (folder / "summary.json").exists():
        return False
    made = asdict(Config(dataset=config.dataset)) | json.loads((folder / "config.json").read_text())
    return all(made[k] == v for k, v in identity(config).items())


def run_all(configs, jobs=None):
    """Train what is not done yet, side by side: a process a GPU, or a CPU core, or `jobs` of them.

    Two runs on a core each get further than one run on both; what each run prints goes to output.txt in its folder.
    """
    todo = [c for c in configs if not is_done(c)]
    gpus = torch.cuda.device_count() if configs[0].device == "cuda" else 0
    jobs = jobs or gpus or (os.cpu_count() if configs[0].device == "cpu" else 1)
    total, epochs = sum(c.epochs for c in configs), sum(c.epochs for c in configs if c not in todo)
    bar = tqdm(total=total, initial=epochs, desc=f"{len(configs)} runs", unit="epoch", disable=None, ncols=78)
    running, failed = {}, []  # running: {slot: (config, process)}
    try:
        while todo or running:
            for slot in set(range(jobs)) - set(running):
                if todo:
                    running[slot] = start_process(todo.pop(0), slot % gpus if gpus else None)
            time.sleep(0.2)
            for slot, (config, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    epochs += config.epochs
                    if process.returncode:
                        failed.append(config)
                    else:
                        tqdm.write(f"{config.name}: {read_metrics(config)['accuracy']:.1f} %")
            bar.n = epochs + sum(map(epochs_logged, (config for config, _ in running.values())))
            bar.refresh()
    finally:
        bar.close()
        for _, process in running.values():
            process.terminate()
            process.wait()
    if failed:
        says = [(Path(c.out) / c.name / "output.txt").read_text().strip().splitlines()[-1:] for c in failed]
        lines = [f"\n  {c.name}: {' '.join(words) or 'killed'}" for c, words in zip(failed, says)]
        count = f"{len(failed)} of {len(configs)} runs failed; the same command tries them again"
        raise data.DataError(count + "".join(lines))


def start_process(config, gpu):
    """Train one config in a process of its own: on one GPU, or on one core -> (config, process)."""
    folder = Path(config.out) / config.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").unlink(missing_ok=True)
    place = {"OMP_NUM_THREADS": "1"}
    if gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        place = {"CUDA_VISIBLE_DEVICES": visible.split(",")[gpu] if visible else str(gpu)}
    command = [sys.executable, __file__, *flags_of(config)]
    with open(folder / "output.txt", "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | place)
    return config, process


def epochs_logged(config):
    log = Path(config.out) / config.name / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def sweep(words, base, jobs=None, name=""):
    """Run the grid that `words` span over the flags `base`, and report it: table, CSV, picture -> one dict a run."""
    grid = parse_grid(words)
    configs = [Config(**{**base, **dict(zip(grid, values))}) for values in itertools.product(*grid.values())]
    for config in {c.dataset: c for c in configs}.values():
        load_dataset(config)  # the demo is made once; what is not there is missed here, not in every run
    run_all(configs, jobs)

    names = [key for key in grid if key != "seed"] or ["method"]
    records = [{key: getattr(c, key) for key in (*names, "seed")} | read_metrics(c) for c in configs]
    metrics = list(dict.fromkeys(key for r in records for key in r if key not in (*names, "seed")))
    metrics.sort(key=lambda metric: metric.startswith("strength"))  # after the probes of all modalities
    rows = {}  # {values of the swept fields: {seed: record}}
    for r in records:
        rows.setdefault(tuple(r[key] for key in names), {})[r["seed"]] = r

    stem = Path(base["out"]) / (name or "sweep-" + "-".join([base["dataset"], *names]))
    caption = "python dr.py " + " ".join([*flags_of(Config(**base)), "--sweep", *words])
    with open(f"{stem}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [*names, "seed", *metrics])
        writer.writeheader()
        writer.writerows(records)
    table = list(table_columns(names, metrics, rows))
    note = "± standard deviation over seeds; vs: paired over seeds, ± half its 95 % interval"
    Path(f"{stem}.md").write_text(f"    {caption}\n\n{markdown(table)}\n\n{note}\n", encoding="utf-8")
    draw_sweep(names, metrics, rows, f"{stem}.png", caption)
    print(f"\n{markdown(table, width=80)}\n\n{note}\n{stem}.md, .csv and .png; the runs are in {base['out']}/")
    return records


def read_metrics(config):
    """What a finished run came to -> {metric: value}."""
    summary = json.loads((Path(config.out) / config.name / "summary.json").read_text())
    metrics = {"accuracy": summary["accuracy"], "macro F1": summary["macro_f1"]}
    metrics |= {f"probe {m}": accuracy for m, accuracy in summary["probe"].items()}
    return metrics | {f"strength {m}": a for m, a in summary["strength"].items()}


def table_columns(names, metrics, rows):
    """Yield (title, cells): mean ± standard deviation over seeds; differences paired over seeds, with the half-width
    of their 95 % interval (Student's t)."""

    def spread(values, digits, sign="", scale=1):
        if not values:
            return ""
        mean = f"{np.mean(values):{sign}.{digits}f}"
        return mean if len(values) == 1 else f"{mean} ± {scale * deviation(values):.{digits}f}"

    def difference(key, reference):
        pairs = [rows[key][s]["accuracy"] - rows[reference][s]["accuracy"] for s in rows[key] if s in rows[reference]]
        half = stats.t.ppf(0.975, len(pairs) - 1) / math.sqrt(len(pairs)) if len(pairs) > 1 else 0
        return "" if key == reference else spread(pairs, 1, "+", half)

    for k, name in enumerate(names):
        yield name, [str(key[k]) for key in rows]
    first = next(iter(rows))
    for metric in metrics:
        digits = 2 if metric.startswith("strength") else 1
        yield metric, [spread([r[metric] for r in runs.values() if metric in r], digits) for runs in rows.values()]
        if metric == "accuracy":
            yield "vs first row", [difference(key, first) for key in rows]
            if "method" in names and len(names) > 1:  # to the first method, all else equal
                at = names.index("method")
                yield f"vs {first[at]}", [difference(key, (*key[:at], first[at], *key[at + 1 :])) for key in rows]


def markdown(columns, width=10**6):
    """Columns (title, cells) as a Markdown table; as several, each with the first column, where it would be wider."""
    columns = [[title, *cells] for title, cells in columns]
    first, *others = [[f" {cell:<{max(map(len, column))}} " for cell in column] for column in columns]
    blocks = [[first]]
    for column in others:
        if sum(len(c[0]) + 1 for c in (*blocks[-1], column)) >= width:
            blocks.append([first])
        blocks[-1].append(column)
    texts = []
    for block in blocks:
        head, *body = ["|" + "|".join(row) + "|" for row in zip(*block)]
        texts.append("\n".join([head, "".join(c if c == "|" else "-" for c in head), *body]))
    return "\n\n".join(texts)


def draw_sweep(names, metrics, rows, path, caption):
    """A panel a metric. Over a field of numbers: lines, with a band of one standard deviation; else bars, and a dot
    for each seed."""
    metrics = [m for m in metrics if m != "macro F1"]
    columns = list(zip(*rows))  # the values of each swept field
    x = next((k for k, c in enumerate(columns) if len(set(c)) > 1 and type(c[0]) in (int, float)), None)
    across, down = min(3, len(metrics)), math.ceil(len(metrics) / 3)
    size = (2.7 * across + 1.4, down * (1.0 + 0.26 * len(rows) if x is None else 2.5) + 0.4)
    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False, sharey=x is None, layout="constrained")
    for axis in axes.flat[len(metrics) :]:
        axis.set_axis_off()
    for axis, metric in zip(axes.flat, metrics):
        values = {key: [r[metric] for r in runs.values() if metric in r] for key, runs in rows.items()}
        unit = metric if metric.startswith("strength") else f"{metric} in %"
        if x is None:
            draw_bars(axis, values)
            axis.set(xlabel=unit)
        else:
            draw_lines(axis, values, x)
            axis.set(xlabel=names[x], ylabel=unit)
    if x is not None:
        caption = f"{names[x]}: {Config.__dataclass_fields__[names[x]].metadata['help']}\n{caption}"
        if len(names) > 1:
            axes[0, -1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, path, caption)


def deviation(values):
    return np.std(values, ddof=1) if len(values) > 1 else 0


def draw_bars(axis, values):  # {key: values of the seeds}, some of which may be empty
    for y, v in enumerate(values.values()):
        if v:
            axis.barh(y, np.mean(v), xerr=deviation(v), color=COLOURS[5], ecolor="0.3", height=0.7)
            axis.plot(v, [y] * len(v), ".", color="black", markersize=3)
    axis.set(yticks=range(len(values)), yticklabels=[", ".join(map(str, key)) for key in values])
    axis.set_ylim(len(values) - 0.4, -0.6)  # the first row on top


def draw_lines(axis, values, x):  # over field number x of the keys; a line for each value of the others
    for k, line in enumerate(dict.fromkeys(key[:x] + key[x + 1 :] for key in values)):
        keys = [key for key, v in values.items() if v and key[:x] + key[x + 1 :] == line]
        keys.sort(key=lambda key: key[x])
        at, mean = [key[x] for key in keys], np.array([np.mean(values[key]) for key in keys])
        sd, colour = np.array([deviation(values[key]) for key in keys]), COLOURS[k % 7]
        axis.plot(at, mean, color=colour, marker=MARKERS[k % 7], markersize=5, label=", ".join(map(str, line)))
        axis.fill_between(at, mean - sd, mean + sd, color=colour, alpha=0.2, linewidth=0)


# ---------------------------------------------------------------------------------------------------
# 9  Bench: what this machine does with arrays in a dataset's shapes, made on the spot
# ---------------------------------------------------------------------------------------------------

# classes, clips for training / validation / test, what a clip holds
SIZES = {
    "demo": (6, (1200, 300, 800), {"audio": data.fbank_spec(48, 1.2, shift=25.0), "visual": data.frames_spec(1, 48)}),
    "cremad": (6, (5954, 744, 744), {"audio": data.fbank_spec(128, 3.0), "visual": data.frames_spec(2, 224)}),
    "kinetics": (31, (14799, 1644, 2594), {"audio": data.fbank_spec(128, 10.24), "visual": data.frames_spec(3, 224)}),
    "ucf101": (101, (8586, 951, 3783), {"flow": data.flow_spec(3, 224), "visual": data.frames_spec(3, 224)}),
}


def bench(given, steps=4):
    """Measure a step, an epoch, a diagnosis, and the loop that is usual in the field, and print a table.

    On CUDA on all clips of the dataset, elsewhere on `steps` batches of 16 of them, from which the diagnosis's share of
    the training is reckoned. The floor is a step on one batch in memory; all steps that are compared are taken in turn.
    """
    config = Config(**given)
    if config.device != "cuda":
        config.batch_size = given["batch_size"] or 16
    if config.dataset not in SIZES:
        raise data.DataError(f"--bench makes arrays for {', '.join(SIZES)}, not for {config.dataset}")
    set_up(config)
    classes, counts, specs = SIZES[config.dataset]
    device, batch = config.device, config.batch_size
    some = counts if device == "cuda" else (steps * batch, batch, batch)
    row = lambda what, value, note="": print(f"  {what:<31}{value:>13}  {note}", flush=True)  # noqa: E731
    chip = torch.cuda.get_device_name() if device == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    print(f"{config.dataset} in {batch}s on {chip}, PyTorch {torch.__version__}")

    with tempfile.TemporaryDirectory() as folder:
        dataset = made_up(Path(folder), classes, some, specs)
        if device == "cuda":
            data.hold(dataset, device, torch.cuda.mem_get_info()[0] / 2)
        torch.manual_seed(0)
        model, _ = make_model(config, dataset)
        optimiser = torch.optim.SGD(model.parameters(), config.lr, config.momentum)
        held = [next(data.batches(dataset.train, batch, 0, device))]
        with FlopCounterMode(display=False) as counter:
            step(model, optimiser, *held[0])
        flop, peak = counter.get_total_flops(), matrix_product(device, model(held[0][0]).dtype)
        loops = [(model, optimiser, held), (model, optimiser, data.batches(dataset.train, batch, 0, device))]
        if resnets := all(encoder.width == 512 for encoder in model.encoders.values()):
            by_hand = ByHand(dataset.shapes, classes).to(device)
            contiguous = {m: x.contiguous() for m, x in held[0][0].items()}
            loops.append((by_hand, torch.optim.SGD(by_hand.parameters(), 0.002, 0.9), [(contiguous, held[0][1])]))
        floor, disk, *hand = in_turn(30 if device == "cuda" else steps, device, loops)
        speed = flop / floor
        note = f"{flop / 1e9:.0f} GFLOP, {speed / 1e9:,.0f} GFLOP/s"
        row("step, one batch in memory", f"{1000 * floor:.1f} ms", note)
        row("large matrix product", f"{peak / 1e9:,.0f} GFLOP/s", f"the step reaches {speed / peak:.0%} of it")
        row("step, batches from the arrays", f"{1000 * disk:.1f} ms", f"{disk / floor:.3f} of one in memory")
        if resnets:
            note = f"ours takes {floor / hand[0]:.2f} of it"
            row("step by hand, torchvision, fp32", f"{1000 * hand[0]:.1f} ms", note)
        start = clock(device)
        train_epoch(model, optimiser, dataset.train, config, 0)
        each = (clock(device) - start) / some[0]
        row("epoch", f"{each * some[0]:.1f} s", f"{some[0]:,} clips, {1 / each:.1f} a second")

        start = clock(device)
        x, _ = extract_features(model, dataset.train, device=device)
        extract_features(model, dataset.val, device=device)
        features = (clock(device) - start) / (some[0] + some[1]) * (counts[0] + counts[1])
        found = [blobs(n, x[m].shape[1], classes) for m in x for n in counts[:2]]
        start = clock(device)
        for points in found:
            FastKMeans(classes, n_init=config.n_init, random_state=0).fit_predict(points)
        cluster, training = clock(device) - start, each * counts[0] * config.every
        share = f"{features / training:.1%} of the {config.every} epochs before it"
        row("diagnosis: features", f"{features:.1f} s", share)
        row("diagnosis: k-means", f"{cluster:.1f} s", f"{cluster / training:.3%}")
        if device == "cuda":
            memory = torch.cuda.max_memory_allocated()
        else:
            import resource  # there is none on Windows

            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        row("peak memory", f"{memory / 2**30:.1f} GiB", "of the GPU" if device == "cuda" else "of the process")
        if resnets and set(specs) == {"audio", "visual"}:
            for seconds in dict.fromkeys((10.0, specs["audio"]["shape"][2] / 100)):
                usual = usual_epoch(Path(folder), some[0], seconds, specs, classes, batch, device)
                ratio = f"our epoch takes {each * some[0] / usual:.2f} of it"
                row(f"the usual loop, {seconds:g} s of sound", f"{usual:.1f} s", ratio)


def clock(device):
    """Seconds, when all that was begun on the device is done."""
    if device in ("cuda", "mps"):
        getattr(torch, device).synchronize()
    return time.perf_counter()


def in_turn(rounds, device, loops):
    """Seconds a step of each (model, optimiser, batches), one step of each in turn, the fastest: whatever else the
    machine does only adds to it. A list of one batch is used again and again."""
    seconds, streams = [[] for _ in loops], [itertools.cycle(b) if isinstance(b, list) else b for _, _, b in loops]
    for _ in range(rounds):
        for (model, optimiser, _), stream, taken in zip(loops, streams, seconds):
            model.train()
            start = clock(device)
            step(model, optimiser, *next(stream))
            taken.append(clock(device) - start)
    return list(map(min, seconds))


def matrix_product(device, dtype):
    """FLOP/s of a large matrix product, the best of those that fit into a second."""
    n = 8192 if device == "cuda" else 2048
    a, taken = torch.randn(n, n, device=device, dtype=dtype), []
    while sum(taken) < 1:
        start = clock(device)
        a @ a
        taken.append(clock(device) - start)
    return 2 * n**3 / min(taken)


def made_up(folder, classes, counts, specs):
    """A prepared dataset of noise -> Dataset."""
    rng, splits = np.random.default_rng(0), {}
    for split, n in zip(("train", "val", "test"), counts):
        (folder / split).mkdir()
        np.save(folder / split / "labels.npy", np.arange(n) % classes)
        for m, spec in specs.items():
            array = np.lib.format.open_memmap(folder / split / f"{m}.npy", "w+", spec["dtype"], (n, *spec["shape"]))
            for k in range(n):
                array[k] = rng.integers(256, size=spec["shape"], dtype=np.uint8)
        splits[split] = list(map(str, range(n)))
    manifest = {"modalities": specs, "splits": splits, "classes": list(map(str, range(classes)))}
    return data.open_arrays("bench", folder, manifest, None)


def blobs(n, width, classes):
    """Features as an encoder's: positive, in clusters that overlap."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(classes, 48))[rng.integers(classes, size=n)] + rng.normal(size=(n, 48))
    return np.maximum(points @ rng.normal(size=(48, width)), 0).astype(np.float32)


class ByHand(nn.Module):
    """What one writes with torchvision's ResNet-18 when one writes it quickly."""

    def __init__(self, shapes, classes):
        super().__init__()
        self.nets = nn.ModuleDict({m: torchvision.models.resnet18() for m in shapes})
        for m, net in self.nets.items():
            net.conv1, net.fc = nn.Conv2d(shapes[m][-3], 64, 7, 2, 3, bias=False), nn.Identity()
        self.head = nn.Linear(512 * len(shapes), classes)

    def forward(self, inputs):
        features = []
        for m, x in inputs.items():
            y = self.nets[m](x if x.dim() == 4 else x.flatten(0, 1))
            features.append(y if x.dim() == 4 else y.unflatten(0, x.shape[:2]).mean(1))
        return self.head(torch.cat(features, 1))


class UsualClips(torch.utils.data.Dataset):
    """A wav file and some JPEGs a clip, opened, padded, transformed and resized whenever they are asked for."""

    def __init__(self, folder, n, seconds, spec):
        self.folder, self.n, self.seconds, self.spec = folder, n, seconds, spec

    def __len__(self):
        return self.n

    def __getitem__(self, k):
        rate, sound = scipy.io.wavfile.read(self.folder / f"{k}.wav")
        sound = np.resize(sound, int(self.seconds * rate)).astype(np.float32) / 32768  # repeated until it is so long
        fbank = kaldi.fbank(torch.from_numpy(sound)[None], sample_frequency=rate, num_mel_bins=128, frame_shift=10)
        size, frames = (self.spec["size"],) * 2, []
        for t in range(self.spec["count"]):
            picture = np.asarray(Image.open(self.folder / f"{k}-{t}.jpg").convert("RGB").resize(size))
            frames.append((picture - np.float32(self.spec["mean"])) / np.float32(self.spec["std"]))
        return fbank.T[None], torch.from_numpy(np.stack(frames).transpose(0, 3, 1, 2).copy()), k % 6


def usual_epoch(folder, n, seconds, specs, classes, batch, device):
    """Seconds that an epoch takes in the field's usual loop, on clips of CREMA-D's kind: 480 x 360 pixels, 2.5 s of
    sound, padded to `seconds`."""
    rng = np.random.default_rng(0)
    blots = rng.integers(256, size=(8, 12, 16, 3), dtype=np.uint8)
    pictures = [Image.fromarray(blot).resize((480, 360)) for blot in blots]
    for k in range(n):
        scipy.io.wavfile.write(folder / f"{k}.wav", 16000, rng.integers(-9999, 9999, 40000, dtype=np.int16))
        for t in range(specs["visual"]["count"]):
            pictures[(k + t) % 8].save(folder / f"{k}-{t}.jpg")
    clips = UsualClips(folder, n, seconds, specs["visual"])
    workers = dict(num_workers=os.cpu_count(), pin_memory=device == "cuda")
    loader = torch.utils.data.DataLoader(clips, batch, shuffle=True, **workers)
    model = ByHand({"audio": (1, 0, 0), "visual": (3, 0, 0)}, classes).to(device)
    optimiser = torch.optim.SGD(model.parameters(), 0.002, 0.9)
    start = clock(device)
    for audio, visual, labels in loader:
        step(model, optimiser, {"audio": audio.to(device), "visual": visual.to(device)}, labels.to(device))
    return clock(device) - start


# ---------------------------------------------------------------------------------------------------
# 10  Command line
# ---------------------------------------------------------------------------------------------------


def parse(arguments=None):
    """The command line -> (fields of Config that were given, what is no field of Config: sweep, jobs, tsne)."""
    parser = argparse.ArgumentParser(usage="python dr.py [--flag value ...]", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.epilog = "ablations, each a --method:\n" + "\n".join(f"  {k:<14} {v}" for k, v in ABLATIONS.items())
    parser.epilog += "\n\npresets:\n" + "\n".join(
        f"  {name:<9}" + "  ".join(f"{k} {v}" for k, v in preset.items()) for name, preset in PRESETS.items()
    )
    for f in fields(Config):
        choices, default = f.metadata["choices"], "preset" if f.default is None else f.default
        text = f.metadata["help"] + (f": {', '.join(choices)}" if choices and f.name != "method" else "")
        text += "" if default is False or default == "" else f" ({default})"
        kind = dict(action="store_true") if f.type is bool else dict(type=f.type, default=f.default, metavar="")
        parser.add_argument("--" + f.name.replace("_", "-"), help=text, **kind)
    parser.add_argument("--sweep", nargs="+", metavar="FIELD=A,B", help="run a grid, average it over seeds, report it")
    parser.add_argument("--jobs", type=int, metavar="", help="runs of a sweep side by side (one a GPU, or a CPU core)")
    parser.add_argument("--bench", action="store_true", help="measure this machine, on --dataset's shapes (cremad)")
    parser.add_argument("--evaluate", nargs="+", metavar="BEST.PT", help="test these checkpoints")
    parser.add_argument("--tsne", nargs="+", metavar="BEST.PT", help="draw the test features of these checkpoints")
    if "--bench" in (sys.argv if arguments is None else arguments):
        parser.set_defaults(dataset="cremad")
    given = vars(parser.parse_args(arguments))
    extra = {key: given.pop(key) for key in ("sweep", "jobs", "bench", "evaluate", "tsne")}
    try:
        for values in itertools.product(*(grid := parse_grid(extra["sweep"] or ())).values()):
            Config(**{**given, **dict(zip(grid, values))})
        if extra["jobs"] is not None and extra["jobs"] < 1:
            raise ValueError(f"--jobs is 1 or more, not {extra['jobs']}")
    except ValueError as error:
        parser.error(str(error))
    return given, SimpleNamespace(**extra)


def main():
    try:
        given, extra = parse()
        if extra.sweep and "RANK" in os.environ:
            raise data.DataError("--sweep starts processes of its own, one a GPU: run it without torchrun")
        if extra.bench:
            bench(given)
        elif extra.evaluate:
            evaluate_checkpoints(extra.evaluate, data=given["data"], device=given["device"])
        elif extra.tsne:
            print(draw_tsne(extra.tsne, data=given["data"], device=given["device"]))
        elif extra.sweep:
            sweep(extra.sweep, {**given, "name": ""}, extra.jobs, given["name"])
        else:
            train(Config(**given))
    except (data.DataError, FloatingPointError, OSError) as error:
        hint = "; when that is mended, the same command goes on" if isinstance(error, OSError) else ""
        print(f"dr.py: {error}{hint}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        rest = "does what is missing" if "--sweep" in sys.argv else "goes on after the last whole epoch"
        print(f"\nstopped; the same command {rest}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
