"""Diagnosing & Re-learning for balanced multimodal learning
(Wei, Li, Feng, Hu; ECCV 2024, arXiv 2407.09705).

A network that learns from several modalities at once leans on the one that it
learns first. Every H epochs D&R looks at each modality's encoder: k-means
clusters its features of the training and of a validation set, and the gap g
between the purities of the two is the encoder's learning state. Then every
encoder is pulled back towards its initial weights, the further the larger g:

    a = tanh(lambda * g)        theta <- (1 - a) * theta + a * theta_init

    python dr.py                       D&R on the demo, drawn on the spot
    python dr.py --method joint        trained and left alone; more: --help
    python dr.py --modalities audio    one modality alone
    python dr.py --dataset cremad      after python data.py cremad --raw ...
    python dr.py --sweep method=joint,dr seed=0,1,2      a grid, over seeds
    python dr.py --evaluate runs/demo-dr-0/best.pt       on the test set
    python dr.py --tsne runs/demo-dr-0/best.pt           its features, drawn
    torchrun --nproc_per_node=2 dr.py --dataset cremad   on two GPUs

A run leaves config.json, log.jsonl, summary.json, best.pt, test.npz, curves.png
in runs/<name>/. If it is stopped, the same command resumes it.
"""

import argparse
import contextlib
import copy
import inspect
import io
import itertools
import json
import math
import os
import re
import shlex
import sys
import time
import traceback
from collections import OrderedDict
from concurrent.futures import BrokenExecutor
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import joblib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from scipy import special, stats
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import data


# ---- 1  Encoders: one per modality, each from its input to features (B, D) ---------------------------------------
class PictureEncoder(nn.Module):
    """Makes an encoder of a network from pictures (B, C, H, W) to maps (B, D, h, w): for spectrograms (B, 1, F, T), and
    for frames (B, T, C, H, W), which are folded into the batch. Its features are the mean over space and time."""

    def __init__(self, network, width):
        super().__init__()
        self.network = network
        self.width = width

    def tokens(self, x):  # one token per place of the map -> (B, T*h*w, D); none of them is padding
        pictures = x if x.dim() == 4 else x.flatten(0, 1)  # (B*T, C, H, W)
        return self.network(pictures).flatten(2).mT.reshape(len(x), -1, self.width), None

    def forward(self, x):
        return masked_mean(*self.tokens(x))  # (B, D)


def masked_mean(tokens, padding):
    """The mean over those of the tokens (B, N, D) that are not padding (B, N) -> (B, D), in fp32."""
    tokens = tokens.float()
    if padding is None:
        return tokens.mean(1)
    return tokens.masked_fill(padding[..., None], 0).sum(1) / (~padding).sum(1, keepdim=True)


def resnet18(shape):
    """torchvision's ResNet-18 from scratch, for any number of channels; 512 features, as in the paper."""
    network = torchvision.models.resnet18(weights=None)
    network.conv1 = nn.Conv2d(shape[-3], 64, kernel_size=7, stride=2, padding=3, bias=False)
    layers = OrderedDict(list(network.named_children())[:-2])  # without pooling and classifier
    return PictureEncoder(nn.Sequential(layers), 512)


def small_resnet(shape, widths=(12, 24, 48, 96)):
    """A narrow ResNet for small pictures and spectrograms, such as the demo's; 96 features."""
    stem = nn.Conv2d(shape[-3], widths[0], kernel_size=3, stride=2, padding=1, bias=False)
    layers = [stem, nn.BatchNorm2d(widths[0]), nn.ReLU()]
    for before, after in zip(widths, widths[1:]):
        # the pooling is a stride; as the convolution's own it has crashed on CPUs (oneDNN, 12 channels)
        shortcut = nn.Sequential(nn.MaxPool2d(1, stride=2), nn.Conv2d(before, after, 1, bias=False),
                                 nn.BatchNorm2d(after))  # fmt: skip
        layers.append(torchvision.models.resnet.BasicBlock(before, after, stride=2, downsample=shortcut))
    return PictureEncoder(nn.Sequential(*layers), widths[-1])


ENCODERS = {"resnet18": resnet18, "small": small_resnet}  # more in room 7


def choose_encoder(shape, wanted):
    """The name of the encoder for samples of this shape; it can be chosen for pictures only."""
    if len(shape) == 2:  # (T, D)
        return "transformer"
    usual = "small" if shape[-2] <= 64 else "resnet18"
    return usual if wanted == "auto" else wanted


# ---- 2  Fusion, and the multimodal model -------------------------------------------------------------------------
class Concatenation(nn.Module):
    """The features side by side, and one linear layer: the official code's fusion."""

    def __init__(self, widths, n_classes):
        super().__init__()
        self.widths = widths
        self.head = nn.Linear(sum(widths.values()), n_classes)

    def forward(self, features):  # {modality: (B, D)} -> logits (B, n_classes)
        return self.head(torch.cat(list(features.values()), 1))

    def parts(self, features):
        """What each modality adds to the logits -> {modality: (B, n_classes)}: by its own columns of the weight, and an
        equal share of the bias, as in OGM-GE's official code. They sum to the logits."""
        columns = self.head.weight.split(list(self.widths.values()), 1)
        bias = self.head.bias / len(columns)
        return {m: F.linear(features[m], w, bias) for m, w in zip(self.widths, columns)}


FUSIONS = {"concat": Concatenation}  # more in room 7


class MultimodalModel(nn.Module):
    """One encoder per modality, then a fusion. `shapes` is {modality: shape of one sample}."""

    def __init__(self, shapes, n_classes, encoder="auto", fusion="concat"):
        super().__init__()
        self.recipe = (shapes, n_classes, encoder, fusion)
        self.bf16 = False  # whether the encoders compute in bf16
        self.encoders = nn.ModuleDict({m: ENCODERS[choose_encoder(s, encoder)](s) for m, s in shapes.items()})
        self.fusion = FUSIONS[fusion]({m: e.width for m, e in self.encoders.items()}, n_classes)
        self.apply(initialise)

    @property
    def device(self):
        return next(self.parameters()).device

    def features(self, inputs):  # {modality: input} -> {modality: (B, D)}, in fp32
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return {m: encoder(inputs[m]) for m, encoder in self.encoders.items()}

    def forward(self, inputs):  # -> logits (B, n_classes), in fp32
        return self.fusion(self.features(inputs))

    def own(self, m):
        """What belongs to modality m and is re-learnt with it: its encoder."""
        return self.encoders[m]


def initialise(module):
    """The official code's initial weights; linear layers keep PyTorch's."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


# ---- 3  Diagnosing: how far has each encoder learnt? -------------------------------------------------------------
def purity(features, labels, n_clusters, n_init=10, seed=0):
    """How well k-means clusters of the features agree with the labels, at most 1: the paper's P.

        P = 1/N * sum over clusters of the size of the cluster's largest class

    features (N, D) and labels (N,), arrays or CPU tensors; labels may be any integers. As in the official code every
    feature is first scaled to [-1, 1] over this very set. Raises ValueError for fewer samples than clusters and for
    lengths that differ, FloatingPointError for features that are not finite."""
    x = np.asarray(features, dtype=np.float32)
    y = np.asarray(labels)
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise ValueError(f"purity takes features (N, D) and labels (N,), not {x.shape} and {y.shape}")
    if len(x) < n_clusters:
        raise ValueError(f"purity takes at least as many samples ({len(x)}) as clusters ({n_clusters})")
    if not np.isfinite(x).all():
        raise FloatingPointError("the features are not finite: training has diverged; try a smaller --lr")
    span = np.ptp(x, axis=0)
    x = 2 * (x - x.min(0)) / np.where(span > 0, span, 1) - 1
    clusters = KMeans(n_clusters, n_init=n_init, random_state=seed).fit_predict(x)  # (N,); it never sees the labels
    classes, y = np.unique(y, return_inverse=True)
    count = np.zeros((n_clusters, len(classes)), dtype=int)
    np.add.at(count, (clusters, y), 1)  # count[k, c]: samples of class c in cluster k
    return float(count.max(1).sum() / len(y))


def purity_gap(train_features, train_labels, val_features, val_labels, n_clusters, n_init=10, seed=0):
    """An encoder's learning state, g = |P_train - P_val| -> (P_train, P_val, g). Large: it is well learnt, or
    over-trained. Small: it is under-trained, or has little to tell."""
    train = purity(train_features, train_labels, n_clusters, n_init, seed)
    val = purity(val_features, val_labels, n_clusters, n_init, seed)
    return train, val, abs(train - val)


@torch.no_grad()
def extract_features(model, split, batch_size=128):
    """Features of a split, in eval mode, without augmentation -> ({modality: (N, D)}, labels (N,)), as arrays."""
    model.eval()
    batches = [(model.features(inputs), y) for inputs, y in data.batches(split, batch_size, device=model.device)]
    features = {m: torch.cat([x[m] for x, _ in batches]).cpu().numpy() for m in model.encoders}
    return features, torch.cat([y for _, y in batches]).cpu().numpy()


def diagnose(model, train, val, n_clusters, n_init=10, batch_size=128):
    """The purity gap of every modality -> {modality: (P_train, P_val, g)}; n_clusters is the number of classes."""
    x_train, y_train = extract_features(model, train, batch_size)
    x_val, y_val = extract_features(model, val, batch_size)
    jobs = [(x_train[m], y_train, x_val[m], y_val, n_clusters, n_init) for m in x_train]
    one_thread = threadpool_limits.wrap(limits=1)  # OpenMP counts its threads for each thread that calls it
    side_by_side = joblib.Parallel(len(jobs), backend="threading")
    with threadpool_limits(1):
        gaps = side_by_side(joblib.delayed(one_thread(purity_gap))(*job) for job in jobs)
    return dict(zip(x_train, gaps))


# ---- 4  Re-learning: back towards the initial weights, by as much as the gap says ---------------------------------
def relearning_strength(gap, lam):
    """a = tanh(lambda * g), from 0, which leaves an encoder alone, towards 1, which restarts it."""
    return math.tanh(lam * gap)


@torch.no_grad()
def soft_reinit(module, init_state, strength):
    """theta <- (1 - a) * theta + a * theta_init, in place, for all parameters of `module`.
    `init_state` is the module's state_dict copied before the first step. As in the official code, batch-norm's scales
    and biases are parameters and go back; its running statistics and the optimiser's momentum do not."""
    if not 0 <= strength <= 1:
        raise ValueError(f"a re-learning strength lies in [0, 1], not {strength}")
    for name, parameter in module.named_parameters():
        parameter.lerp_(init_state[name].to(parameter), strength)


def initial_weights(model):
    """What the method has to remember, taken before the first step -> {modality: state_dict}."""
    return {m: copy.deepcopy(model.own(m).state_dict()) for m in model.encoders}


def relearn(model, initial, gaps, lam, optimiser=None):
    """D&R: every encoder goes back by the strength of its own gap.
    `gaps` is {modality: g}, `initial` initial_weights(model) -> {modality: strength}. An ablation needs `optimiser`."""
    strengths = {m: relearning_strength(g, lam) for m, g in gaps.items()}
    for m, strength in strengths.items():
        soft_reinit(model.own(m), initial[m], strength)
    return strengths


RELEARNING = {"dr": relearn}  # {--method: what follows a diagnosis}; other methods are diagnosed and left alone


# ---- 5  Training: a method leaves a gradient in every parameter, the optimiser makes the step ---------------------
def joint(model, inputs, labels, t):
    """One cross-entropy for all modalities, and nothing else."""
    logits = model(inputs)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    return loss, logits


METHODS = {"joint": joint, "dr": joint}  # {--method: what is done with a batch}; t from 0 to 1: how far training is


def step(model, optimiser, inputs, labels, method=joint, t=0.0):
    """One step of training -> the batch's mean loss, and its logits (B, C)."""
    optimiser.zero_grad()
    loss, logits = method(model, inputs, labels, t)
    if dist.is_initialized():
        average_gradients(model)
    optimiser.step()
    return loss.detach(), logits.detach()


def average_gradients(model):
    """The mean of all processes' gradients, in one message. Each has weighed the modalities on its own share."""
    gradients = [p.grad for p in model.parameters()]
    message = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(message)
    means = (message / dist.get_world_size()).split([g.numel() for g in gradients])
    for g, mean in zip(gradients, means):
        g.copy_(mean.view_as(g))


def train_epoch(model, optimiser, split, config, epoch):
    """One pass over the training set -> (mean loss, accuracy in per cent)."""
    model.train()
    rank, world = ranks()
    # dropout and the methods' own draws begin anew, so that a resumed run repeats them
    torch.manual_seed(config.seed + 1000 * epoch + 1000_000 * rank)
    shuffled = data.batches(split, config.batch_size, (config.seed, epoch), model.device, config.augment, (rank, world))
    steps = math.ceil(len(split) / config.batch_size)
    totals = torch.zeros(2, device=model.device)  # loss, right answers: read once, so that no step waits for it
    clips = 0
    for inputs, labels in tqdm(shuffled, f"epoch {epoch}", steps, leave=False, ncols=78, disable=rank > 0 or None):
        loss, logits = step(model, optimiser, inputs, labels, METHODS[config.method], epoch / config.epochs)
        totals += torch.stack([loss * len(labels), (logits.argmax(1) == labels).sum()])
        clips += len(labels) * world
    if world > 1:
        dist.all_reduce(totals)
    loss, right = totals.tolist()
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss} in epoch {epoch}: try a smaller --lr")
    return loss / clips, 100 * right / clips


@torch.no_grad()
def predict(model, split, batch_size=128):
    """Logits (N, C) and labels (N,) of a whole split, in eval mode, as arrays."""
    model.eval()
    batches = [(model(inputs), y) for inputs, y in data.batches(split, batch_size, device=model.device)]
    return [torch.cat(part).cpu().numpy() for part in zip(*batches)]


def metrics(scores, labels):
    """Accuracy and macro F1, in per cent, where the largest of the scores (N, C) is the prediction."""
    predicted = scores.argmax(1)
    f1 = f1_score(labels, predicted, average="macro", zero_division=0)
    return {"accuracy": 100 * float((predicted == labels).mean()), "macro F1": 100 * float(f1)}


def evaluate(model, split, batch_size=128):
    """Accuracy and macro F1, in per cent, over a whole split."""
    return metrics(*predict(model, split, batch_size))


def train(config):
    """Train one model -> its history, one dict per epoch, and files in <out>/<name>/.
    An entry holds epoch (from 0), loss, train, val and test accuracy in per cent, val_f1, test_f1, seconds; after a
    diagnosis also diagnosis {modality: {train, val, gap, strength}} and relearnt (if false, nothing went back); with
    --track-purity test_purity {modality: P}. A stopped run resumes from its last checkpoint and, on a CPU, ends bit for
    bit as if it had not been. Under torchrun the main process alone evaluates, diagnoses and reports."""
    device = set_up(config)
    dataset = load_dataset(config)
    if device.type == "cuda":
        data.move_to_gpu(dataset, device, max_bytes=torch.cuda.mem_get_info(device)[0] / 2)
    torch.manual_seed(config.seed)
    model = make_model(config, dataset, device)
    initial = initial_weights(model)  # the seed's, and so those of a resumed run
    optimiser = torch.optim.SGD(model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay)
    history, best = resume(config, model, optimiser)
    from_main(start_run, config, model, dataset, history)
    saved = time.monotonic()

    for epoch in range(len(history), config.epochs):
        start = time.monotonic()
        if ranks()[0] == 0 and start - saved >= CHECKPOINT_SECONDS:
            states = {"model": model.state_dict(), "optimiser": optimiser.state_dict()}
            save(config, "last.pt", history=history, best=best, **states)
            saved = time.monotonic()
        loss, accuracy = train_epoch(model, optimiser, dataset.train, config, epoch)
        val = from_main(evaluate, model, dataset.val)
        test = from_main(evaluate, model, dataset.test)
        entry = {"epoch": epoch, "loss": loss, "train": accuracy, "val": val["accuracy"], "test": test["accuracy"],
                 "val_f1": val["macro F1"], "test_f1": test["macro F1"]}  # fmt: skip
        if config.track_purity:
            found = from_main(diagnose, model, dataset.test, dataset.val, len(dataset.classes), config.n_init)
            entry["test_purity"] = {m: p_test for m, (p_test, _, _) in found.items()}
        if all(entry["val"] > e["val"] for e in history):
            best = copy.deepcopy(model.state_dict())

        if epoch % config.every == 0 and epoch > 0:
            found = from_main(diagnose, model, dataset.train, dataset.val, len(dataset.classes), config.n_init)
            gaps = {m: gap for m, (_, _, gap) in found.items()}
            relearnt = sum(e.get("relearnt", False) for e in history)
            due = config.method in RELEARNING and relearnt < config.times
            strengths = {m: relearning_strength(gap, config.lam) for m, gap in gaps.items()}
            if due:
                torch.manual_seed(1000 * (config.seed + 1) + epoch)  # dr-new draws, alike on all processes
                strengths = RELEARNING[config.method](model, initial, gaps, config.lam, optimiser)
            entry["diagnosis"] = {
                m: {"train": p_train, "val": p_val, "gap": gap, "strength": strengths[m]}
                for m, (p_train, p_val, gap) in found.items()
            }
            entry["relearnt"] = due

        entry["seconds"] = time.monotonic() - start
        history.append(entry)
        from_main(report_epoch, config, history)

    from_main(finish_run, config, model, dataset, history, best)
    if dist.is_initialized():
        dist.destroy_process_group()
    return history


# ---- 6  Other methods: rivals of D&R, and D&R with one thing changed ----------------------------------------------
# Each rival is its official code with that code's defaults; what differs is said. Their uni-modal logits are `parts`
# of the joint ones, where some official codes train extra heads.
def joint_and_unimodal(model, inputs, labels):
    """One forward pass -> features, logits, the joint loss L, and the sum over modalities of L_m."""
    features = model.features(inputs)
    logits = model.fusion(features)
    unimodal = sum(F.cross_entropy(part, labels) for part in model.fusion.parts(features).values())
    return features, logits, F.cross_entropy(logits, labels), unimodal


def multitask(model, inputs, labels, t):
    """Joint training plus one cross-entropy per modality.
    L + sum over m of L_m: the baseline of MMPareto's official code. The loss returned is L, to compare methods by."""
    _, logits, joint_loss, unimodal_loss = joint_and_unimodal(model, inputs, labels)
    (joint_loss + unimodal_loss).backward()
    return joint_loss, logits


@torch.no_grad()
def score_ratios(model, features, labels):
    """How far each modality is ahead -> {modality: r}, scalars: r_m = s_m / the mean of the others' s.
    s_m: the mean probability of the right class by m's part of the logits. For two modalities it is OGM-GE's ratio."""
    parts = model.fusion.parts(features)
    s = {m: part.softmax(1).gather(1, labels[:, None]).mean() for m, part in parts.items()}
    return {m: s[m] * (len(s) - 1) / sum(s[n] for n in s if n != m) for m in s}


def ogm_ge(model, inputs, labels, t, alpha=0.8, until=0.5, noise=True):
    """Slows what is ahead; GE adds noise (Peng et al., CVPR 2022).
    In the first half of training the gradients of encoder m's convolutions and linear layers (officially: convolutions)
    times k_m = 1 - tanh(alpha r_m) if r_m > 1 (officially the audio's at r = 1, too), else 1, plus N(0, std(grad)^2),
    tensor by tensor, each process its own, the std before they are slowed. alpha is the authors' for CREMA-D."""
    features = model.features(inputs)
    logits = model.fusion(features)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    if t > until:
        return loss, logits
    for m, ratio in score_ratios(model, features, labels).items():
        factor = torch.where(ratio > 1, 1 - torch.tanh(alpha * ratio), 1.0)
        for p in model.encoders[m].parameters():
            if p.dim() > 1:
                spread = noise * (p.grad.std() + 1e-8)
                p.grad = factor * p.grad + spread * torch.randn_like(p.grad)
    return loss, logits


def mlb(model, inputs, labels, t, alpha=0.5, beta=10.0):
    """MLB (Kontras et al., BMVC 2024): multitask, slowed and sped up.
    Times k_m = 1 + tanh(alpha (1/r_m - 1)), or 1 + (beta - 1) tanh(alpha (1/r_m - 1)) where r_m < 1, on all parameters
    of encoder m. alpha and beta are the authors' for CREMA-D. They scale m's head, too; here it is the joint one's."""
    features, logits, joint_loss, unimodal_loss = joint_and_unimodal(model, inputs, labels)
    (joint_loss + unimodal_loss).backward()
    for m, ratio in score_ratios(model, features, labels).items():
        pace = torch.tanh(alpha * (1 / ratio - 1))
        for p in model.encoders[m].parameters():
            p.grad *= 1 + pace * torch.where(pace > 0, beta - 1, 1.0)
    return joint_loss, logits


def opm(model, inputs, labels, t, base=0.5, gain=0.5, chance=0.7, warm_up=0.05):
    """OPM (Wei et al., TPAMI 2024): drops features of what is ahead.
    A sample loses z_m with probability q_m = base (1 + gain tanh(r_m - 1)) if r_m > 1, else 0; what stays is divided
    by 1 - theta, theta the mean of q over all features. In a share `chance` of the batches, after 6 in 100 epochs.
    Some modality is always behind, so no sample loses all."""
    features = model.features(inputs)
    if t > warm_up and torch.rand(()) < chance:
        ratios = score_ratios(model, features, labels)
        q = {m: torch.where(r > 1, base * (1 + gain * torch.tanh(r - 1)), 0.0) for m, r in ratios.items()}
        theta = sum(q[m] * x.shape[1] for m, x in features.items()) / sum(x.shape[1] for x in features.values())
        for m, x in features.items():
            keep = torch.rand(len(x), 1, device=x.device) >= q[m]
            features[m] = x * keep / (1 - theta)
    logits = model.fusion(features)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    return loss, logits


def mmpareto(model, inputs, labels, t, gamma=1.5):
    """MMPareto (Wei and Hu, ICML 2024): reconciles gradients.
    With g, h an encoder's gradients of L and L_m: new = 2 w g + 2 (1 - w) h, where w = 1/2 if they agree (g.h > 0),
    else at the point of the segment nearest to 0, w = (h.h - g.h) / |g - h|^2. Each tensor that is shorter than g + h
    is enlarged to that norm; all are multiplied by gamma. The head keeps g + h."""
    _, logits, joint_loss, unimodal_loss = joint_and_unimodal(model, inputs, labels)
    parameters = list(model.parameters())
    g = dict(zip(parameters, torch.autograd.grad(joint_loss, parameters, retain_graph=True)))
    h = dict(zip(parameters, torch.autograd.grad(unimodal_loss, parameters)))
    for p in parameters:
        p.grad = g[p] + h[p]
    for encoder in model.encoders.values():
        gh = sum((g[p] * h[p]).sum() for p in encoder.parameters())
        hh = sum((h[p] * h[p]).sum() for p in encoder.parameters())
        apart = sum((g[p] - h[p]).square().sum() for p in encoder.parameters())
        w = torch.where(gh > 0, 0.5, (hh - gh) / apart.clamp_min(1e-30))
        for p in encoder.parameters():
            new = 2 * w * g[p] + 2 * (1 - w) * h[p]
            longer = p.grad.norm() / new.norm().clamp_min(1e-30)
            p.grad = gamma * longer.clamp_min(1) * new
    return joint_loss, logits


def dgl(model, inputs, labels, t, alpha=4.0):
    """DGL (Wei et al., ICCV 2025): no joint loss on the encoders.
    loss = L(stopped features) + alpha * sum over m of L(z_m, zeros for the others; stopped head): the official two
    backward passes in one. alpha is the authors' default; they also clip the gradient's norm at 40."""
    features = model.features(inputs)
    logits = model.fusion({m: x.detach() for m, x in features.items()})
    joint_loss = F.cross_entropy(logits, labels)
    loss = joint_loss
    head = {name: p.detach() for name, p in model.fusion.named_parameters()}
    for m in features:
        alone = {n: x if n == m else torch.zeros_like(x) for n, x in features.items()}
        part = torch.func.functional_call(model.fusion, head, (alone,))
        loss = loss + alpha * F.cross_entropy(part, labels)
    loss.backward()
    return joint_loss, logits


def relearn_same(model, initial, gaps, lam, optimiser=None):
    """D&R with one strength for all modalities, from their mean gap."""
    return relearn(model, initial, dict.fromkeys(gaps, sum(gaps.values()) / len(gaps)), lam)


def relearn_hard(model, initial, gaps, lam, optimiser=None):
    """D&R with strength 1: back to the initial weights."""
    return relearn(model, initial, dict.fromkeys(gaps, math.inf), 1.0)


def relearn_one(model, initial, gaps, lam, optimiser=None, which=max):
    """D&R of the modality with the largest or smallest gap alone."""
    one = which(gaps, key=gaps.get)
    return dict.fromkeys(gaps, 0.0) | relearn(model, initial, {one: gaps[one]}, lam)


def relearn_statistics(model, initial, gaps, lam, optimiser=None):
    """D&R of batch-norm's running statistics, too."""
    strengths = relearn(model, initial, gaps, lam)
    for m, strength in strengths.items():
        for name, buffer in model.own(m).named_buffers():
            if buffer.is_floating_point():  # not the count of batches
                buffer.lerp_(initial[m][name].to(buffer), strength)
    return strengths


def relearn_momentum(model, initial, gaps, lam, optimiser):
    """D&R, and the optimiser's momentum set to 0."""
    strengths = relearn(model, initial, gaps, lam)
    for m in [m for m, strength in strengths.items() if strength > 0]:
        for p in model.own(m).parameters():
            optimiser.state.pop(p, None)
    return strengths


def relearn_new(model, initial, gaps, lam, optimiser=None):
    """D&R towards new random weights instead of the initial ones."""
    stranger = type(model)(*model.recipe)
    return relearn(model, initial_weights(stranger), gaps, lam)


METHODS |= {"multitask": multitask, "multitask+dr": multitask, "ogm": partial(ogm_ge, noise=False), "ogm-ge": ogm_ge}
METHODS |= {"mlb": mlb, "opm": opm, "mmpareto": mmpareto, "dgl": dgl}
RELEARNING |= {"multitask+dr": relearn, "dr-same": relearn_same, "dr-hard": relearn_hard, "dr-new": relearn_new}
RELEARNING |= {"dr-largest": relearn_one, "dr-smallest": partial(relearn_one, which=min)}
RELEARNING |= {"dr-statistics": relearn_statistics, "dr-momentum": relearn_momentum}
METHODS |= {name: joint for name in RELEARNING if name not in METHODS}


# ---- 7  Other encoders and fusions --------------------------------------------------------------------------------
def transformer(width, layers):
    """Pre-norm self-attention layers on tokens (B, N, width), and a last LayerNorm."""
    layer = nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=4 * width, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)


class SequenceTransformer(nn.Module):
    """A small transformer on feature sequences (B, T, D) whose padding is exactly 0."""

    def __init__(self, shape, width=64, layers=2):
        super().__init__()
        self.width = width
        self.embed = nn.Linear(shape[-1], width)
        self.position = nn.Parameter(0.02 * torch.randn(shape[0], width))
        self.layers = transformer(width, layers)

    def tokens(self, x):  # one token per time step -> (B, T, width), and which are padding (B, T)
        padding = (x == 0).all(-1)
        padding[:, 0] &= ~padding.all(1)  # nothing at all: look at the first step, so that there is a mean
        return self.layers(self.embed(x) + self.position, src_key_padding_mask=padding), padding

    def forward(self, x):
        return masked_mean(*self.tokens(x))


class PatchTransformer(nn.Module):
    """A small Vision Transformer (Dosovitskiy et al. 2021): pictures (B, C, H, W) to patches (B, D, N)."""

    def __init__(self, shape, width, layers):
        super().__init__()
        patch = 8 if shape[-2] <= 64 else 16
        self.embed = nn.Conv2d(shape[-3], width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(width, shape[-2] // patch, shape[-1] // patch))
        self.layers = transformer(width, layers)

    def forward(self, x):
        return self.layers((self.embed(x) + self.position).flatten(2).mT).mT


def vit(shape, width=128, layers=4):
    return PictureEncoder(PatchTransformer(shape, width, layers), width)


class Sum(nn.Module):
    """A linear classifier per modality; their logits are added."""

    def __init__(self, widths, n_classes):
        super().__init__()
        self.heads = nn.ModuleDict({m: nn.Linear(width, n_classes) for m, width in widths.items()})

    def parts(self, features):
        return {m: head(features[m]) for m, head in self.heads.items()}

    def forward(self, features):
        return sum(self.parts(features).values())


class FiLM(nn.Module):
    """The first modality scales and shifts the features of the second (Perez et al. 2018)."""

    def __init__(self, widths, n_classes):
        super().__init__()
        first, second = widths.values()
        self.film = nn.Linear(first, 2 * second)
        self.head = nn.Linear(second, n_classes)

    def forward(self, features):
        first, second = features.values()
        gamma, beta = self.film(first).chunk(2, 1)  # (B, D) each
        return self.head(gamma * second + beta)


class Gated(nn.Module):
    """The first modality opens and closes the features of the second (Kiela et al. 2018)."""

    def __init__(self, widths, n_classes, width=512):
        super().__init__()
        first, second = widths.values()
        self.gate = nn.Linear(first, width)
        self.value = nn.Linear(second, width)
        self.head = nn.Linear(width, n_classes)

    def forward(self, features):
        first, second = features.values()
        return self.head(self.gate(first).sigmoid() * self.value(second))


class Bottleneck(nn.Module):
    """The modalities' tokens meet only in a few shared bottleneck tokens (MBT, Nagrani et al. 2021).
    In every layer a modality's tokens and the bottleneck attend to each other, by weights of the modality's own; the
    next layer gets the mean of the bottlenecks. One classifier, on each modality's mean token; logits are averaged."""

    def __init__(self, widths, n_classes, width=128, size=4, layers=2):
        super().__init__()
        self.depth = layers
        self.bottleneck = nn.Parameter(0.02 * torch.randn(size, width))
        self.layers = nn.ModuleDict()
        for m, w in widths.items():
            self.layers[m] = nn.ModuleList([nn.Linear(w, width), *(transformer(width, 1) for _ in range(layers))])
        self.head = nn.Linear(width, n_classes)

    def forward(self, tokens):  # {modality: (tokens (B, N, D), padding (B, N) or None)} -> (M, B, width), in fp32
        S = len(self.bottleneck)
        x = {m: self.layers[m][0](own) for m, (own, _) in tokens.items()}
        padding = {m: None if p is None else F.pad(p, (S, 0)) for m, (_, p) in tokens.items()}
        shared = self.bottleneck.expand(len(next(iter(x.values()))), -1, -1)  # (B, S, width)
        for k in range(1, self.depth + 1):
            x = {m: self.layers[m][k](torch.cat([shared, x[m]], 1), src_key_padding_mask=padding[m]) for m in x}
            shared = sum(y[:, :S] for y in x.values()) / len(x)
            x = {m: y[:, S:] for m, y in x.items()}
        return torch.stack([masked_mean(x[m], tokens[m][1]) for m in x])


class BottleneckModel(MultimodalModel):
    """MBT: its fusion takes the encoders' tokens, and a modality's layers in it are re-learnt with its encoder."""

    def forward(self, inputs):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            pooled = self.fusion({m: encoder.tokens(inputs[m]) for m, encoder in self.encoders.items()})
        return self.fusion.head(pooled).mean(0)

    def own(self, m):
        return nn.ModuleList([self.encoders[m], self.fusion.layers[m]])


ENCODERS |= {"transformer": SequenceTransformer, "vit": vit}
FUSIONS |= {"sum": Sum, "film": FiLM, "gated": Gated, "mbt": Bottleneck}


# ---- 8  Runs: their settings, checkpoints, several processes ------------------------------------------------------
OFFICIAL = dict(epochs=90, batch_size=64, lr=0.002, weight_decay=1e-4, every=20, times=3, augment=False)
PRESETS = {
    "demo": OFFICIAL | dict(epochs=30, lr=0.05, every=5, times=4, augment=True),
    "cremad": OFFICIAL,  # the official code's, and any other dataset's: the paper trains its video datasets alike
    "mosi": OFFICIAL | dict(epochs=30, batch_size=32, lr=0.01, every=6),
}
CHOICES = {"method": METHODS, "fusion": FUSIONS, "precision": ["auto", "bf16", "fp32"]}
CHOICES["encoder"] = ["auto", "resnet18", "small", "vit"]
CHECKPOINT_SECONDS = 30  # a kill costs at most so much, and the epoch that it falls into


@dataclass
class Config:
    """Everything that a run depends on. Every field is a flag, with its comment as help; None: by dataset, PRESETS."""

    dataset: str = "demo"  # what to train on: a folder of prepared data
    method: str = "dr"  # how to train: one of the list below
    modalities: str = ""  # which, such as visual or audio+visual; all if not given
    encoder: str = "auto"  # of pictures: resnet18, small, vit; auto: by their size
    fusion: str = "concat"  # how features are joined: concat, sum, film, gated, mbt
    noise_audio: float = 0.0  # noise on the sound, in standard deviations of it
    augment: bool = None  # mild crops, flips, gains in training; officially none
    lam: float = 3.0  # lambda in a = tanh(lambda * gap)
    every: int = None  # H: diagnose after epochs H, 2H, ..., counted from 0
    times: int = None  # re-learn at most so many times
    epochs: int = None  # how long to train
    batch_size: int = None  # samples per step
    lr: float = None  # learning rate of SGD, constant
    momentum: float = 0.9  # momentum of SGD
    weight_decay: float = None  # weight decay of SGD
    n_init: int = 10  # restarts of k-means
    track_purity: bool = False  # after each epoch, the purity of the test features
    seed: int = 0  # of the initial weights and of the order of batches
    precision: str = "auto"  # bf16 (autocast) or fp32; auto: bf16 on CUDA
    device: str = "auto"  # cpu, cuda, cuda:1 or mps; auto: the best there is
    data: str = "prepared"  # folder of the prepared datasets
    out: str = "runs"  # folder of the runs
    name: str = ""  # of the run; made of what is not default if not given

    def __post_init__(self):
        for key, value in PRESETS.get(self.dataset, OFFICIAL).items():
            if getattr(self, key) is None:
                setattr(self, key, value)
        self.name = self.name or run_name(self)
        for key, value in asdict(self).items():
            least = 1 if key in ("every", "epochs", "batch_size", "n_init") else 0
            if key in CHOICES and value not in CHOICES[key]:
                raise ValueError(f"{key} is one of {', '.join(CHOICES[key])}, not {value!r}")
            if isinstance(value, (int, float)) and not least <= value < 2**32:
                raise ValueError(f"{key} is at least {least} and less than 2 to the 32, not {value}")
            if key in ("dataset", "name") and (Path(value).name != value or value == ".."):
                raise ValueError(f"{key} is the name of a folder, without slashes, not {value!r}")
        self.folder = Path(self.out) / self.name

    def stored(self):  # what is written of it: all fields, and which clips were prepared how
        return asdict(self) | {"manifest": data.fingerprint(Path(self.data) / self.dataset / "manifest.json")}


def run_name(config):
    """<dataset>-<method>-<what else is not default>-<seed>."""
    usual = {f.name: f.default for f in fields(Config)} | PRESETS.get(config.dataset, OFFICIAL)
    words = [config.dataset, config.method]
    for key, value in asdict(config).items():
        if value != usual[key] and key not in ("dataset", "method", "name", "seed", "device", "data", "out"):
            words.append(value if key == "modalities" else f"{key}={value}")
    return "-".join([*words, str(config.seed)])


def differences(config, settings):
    """In what a run differs from the stored settings of another; where they run is not among it."""
    return [k for k, v in config.stored().items() if k not in ("device", "data", "out") and v != settings.get(k)]


def is_done(config):
    """Has this very run been finished, on whatever device?"""
    settings = config.folder / "config.json"
    return (config.folder / "summary.json").exists() and not differences(config, json.loads(settings.read_text()))


def set_up(config):
    """Set PyTorch up for a run -> its torch.device; under torchrun join the other processes. Raises DataError if this
    machine has no such device. With a GPU for each process they speak NCCL, else gloo."""
    gpus = torch.cuda.device_count()
    name = config.device
    if name == "auto":
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if name == "cuda" and gpus:
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % gpus}"
    with data.explained(f"--device {name} cannot be used here"):
        device = torch.ones(1, device=name).device
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # fp32 is exact
    if "RANK" in os.environ and not dist.is_initialized():
        nccl = config.device in ("auto", "cuda") and gpus >= int(os.environ["LOCAL_WORLD_SIZE"])
        # the others wait, for a day if need be, while the main process evaluates and diagnoses
        dist.init_process_group("nccl" if nccl else "gloo", timeout=timedelta(days=1))
    return device


def ranks():
    """(which, of how many) processes this is: (0, 1) but under torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def from_main(work, *args):
    """work(*args), done by the main process alone; every process gets what it returns."""
    box = [work(*args) if ranks()[0] == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def load_dataset(config):
    """The prepared dataset of a config; the demo is made if it is not there. Raises DataError."""
    if config.dataset == "demo" and not (Path(config.data) / "demo" / "manifest.json").exists():
        from_main(data.prepare, "demo", None, config.data)
    dataset = data.load(config.dataset, config.data, config.modalities.split("+") if config.modalities else None)
    if min(len(dataset.train), len(dataset.val), len(dataset.test)) < len(dataset.classes):
        raise data.DataError("a diagnosis takes at least as many clips of every split as there are classes")
    if reason := why_undefined(config, "+".join(dataset.shapes)):
        raise data.DataError(reason)
    if config.noise_audio:
        data.add_noise(dataset, "audio", config.noise_audio)
    return dataset


def why_undefined(config, modalities):
    """Why method and fusion are not defined for these modalities, or ""."""
    count = modalities.count("+") + 1
    if config.fusion in ("film", "gated") and count != 2:
        return f"--fusion {config.fusion} joins two modalities, not {count}: name two with --modalities"
    if METHODS[config.method] is not joint and (count < 2 or not hasattr(FUSIONS[config.fusion], "parts")):
        return f"--method {config.method} compares modalities: it takes two or more, and --fusion concat or sum"
    return ""


def make_model(config, dataset, device="cpu"):
    """The model of a config, on its device. On several processes batch-norm takes its statistics over each one's share
    of a batch, as is usual; SyncBatchNorm would wait for the others 120 times per step."""
    kind = BottleneckModel if config.fusion == "mbt" else MultimodalModel
    model = kind(dataset.shapes, len(dataset.classes), config.encoder, config.fusion)
    model.to(device, memory_format=data.memory_format(device))
    fast = model.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    model.bf16 = fast if config.precision == "auto" else config.precision == "bf16"
    return model


def save(config, name, **content):
    """Write a checkpoint into the run's folder, atomically."""
    buffer = io.BytesIO()  # into a file torch.save does not say when the disk is full
    torch.save({"config": config.stored(), **content}, buffer)
    data.write_atomically(config.folder / name, lambda file: file.write(buffer.getbuffer()))


def read_checkpoint(path):
    """A checkpoint's content, on the CPU, and its config; raises DataError, or OSError if it cannot be opened."""
    with open(path, "rb") as file, data.explained(f"{path} is no checkpoint of this dr.py, or it is damaged"):
        content = torch.load(file, map_location="cpu", weights_only=True)
        return content, Config(**{k: v for k, v in content["config"].items() if k != "manifest"})


def resume(config, model, optimiser):
    """Take up the unfinished run of this config, if there is one -> its history, its best weights so far."""
    path = config.folder / "last.pt"
    if not path.exists():
        return [], None
    content, _ = read_checkpoint(path)
    if differ := ", ".join(differences(config, content["config"])):
        raise data.DataError(f"{path} is of a run with another {differ}: finish or delete that, or give a --name")
    with data.explained(f"{path} is not of a run on the {config.dataset} in {config.data}: delete it"):
        model.load_state_dict(content["model"])
        optimiser.load_state_dict(content["optimiser"])
        return content["history"], content["best"]


def load_run(path, **changes):
    """A run's best.pt -> its model, dataset and config; `changes` replace what has moved, such as data, device."""
    content, config = read_checkpoint(path)
    config = replace(config, **changes)
    dataset = load_dataset(config)
    model = make_model(config, dataset, set_up(config))
    with data.explained(f"{path} is not of a run on the {config.dataset} that is in {config.data}"):
        if differences(config, content["config"]):
            raise ValueError("another manifest")
        model.load_state_dict(content["model"])
    return model, dataset, config


# ---- 9  What a run shows and leaves behind ------------------------------------------------------------------------
def start_run(config, model, dataset, history):
    """Make the run's folder, write its config, and say what is about to be trained."""
    if (config.folder / "summary.json").exists() and not is_done(config):
        raise data.DataError(f"{config.folder} holds another finished run: give a --name, or delete it")
    config.folder.mkdir(parents=True, exist_ok=True)
    (config.folder / "summary.json").unlink(missing_ok=True)  # only a finished run has one
    data.write_json(config.folder / "config.json", config.stored())
    sizes = " / ".join(f"{len(split):,}" for split in (dataset.train, dataset.val, dataset.test))
    print(f"{config.name}: {sizes} clips for training / validation / test, {len(dataset.classes)} classes")
    for m, encoder in model.encoders.items():
        count = sum(p.numel() for p in encoder.parameters())
        print(f"  {m:<8} {dataset.shapes[m]} -> {encoder.width} features, {count:,} weights")
    if history:
        print(f"  resumes with epoch {len(history)}")


EPOCH = "epoch {epoch:3d}  loss {loss:.3f}  train {train:5.1f} %  val {val:5.1f} %  test {test:5.1f} %  {seconds:.1f} s"
SUMMARY = """
{name}, on the test set                         accuracy    macro F1
  at the best validation epoch, {best_val[epoch]:<3}       {best_val[test]:14.1f} % {best_val[test_f1]:9.1f} %
  at the last epoch, {last[epoch]:<3}                  {last[test]:14.1f} % {last[test_f1]:9.1f} %
  as the official code reports it: best test epoch, {best_test[epoch]}: {best_test[test]:.1f} %
{seconds:.0f} s; config, log, weights and curves are in {config.folder}/; linear probes of the encoders:"""


def report_epoch(config, history):
    """A line of log.jsonl and one on the screen; after a diagnosis, a table."""
    entry = history[-1]
    (config.folder / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in history))
    print(EPOCH.format(**entry), flush=True)
    if "diagnosis" in entry:
        count = sum(e.get("relearnt", False) for e in history)
        print(f"\n  re-learning {count} of {config.times}" if entry["relearnt"] else "\n  diagnosis only")
        table = pd.DataFrame(entry["diagnosis"]).T.set_axis(["purity train", "purity val", "gap", "strength"], axis=1)
        print(table.to_string(float_format="{:.3f}".format, col_space=14), flush=True, end="\n\n")


def probe(model, train, test):
    """Test accuracy in per cent of a linear classifier on each encoder's frozen features (paper, Fig. 1b and 1c)."""
    x_train, y_train = extract_features(model, train)
    x_test, y_test = extract_features(model, test)
    linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    return {m: 100 * linear.fit(x_train[m], y_train).score(x_test[m], y_test) for m in x_train}


def finish_run(config, model, dataset, history, best_weights):
    """Write best.pt, the test set's logits and the curves; print the summary and write it to summary.json."""
    best = max(history, key=lambda entry: entry["val"])  # the first of the best
    model.load_state_dict(best_weights)
    save(config, "best.pt", epoch=best["epoch"], model=model.state_dict())
    logits, labels = predict(model, dataset.test)
    np.savez(config.folder / "test.npz", logits=logits, labels=labels)
    draw_curves(history, config.folder / "curves.png", config.name)
    relearnt = [e["diagnosis"] for e in history if e.get("relearnt")]
    seconds = sum(entry["seconds"] for entry in history)
    strength = {m: np.mean([d[m]["strength"] for d in relearnt]) for m in model.encoders if relearnt}
    summary = {"name": config.name, "accuracy": best["test"], "macro F1": best["test_f1"], "strength": strength}
    summary |= {"probe": probe(model, dataset.train, dataset.test)}
    summary |= {"seconds": seconds, "seconds per epoch": seconds / len(history)}
    summary |= {"best_val": best, "last": history[-1], "best_test": max(history, key=lambda entry: entry["test"])}
    data.write_json(config.folder / "summary.json", summary)
    (config.folder / "last.pt").unlink(missing_ok=True)  # only an unfinished run has one
    print(SUMMARY.format(config=config, **summary))
    for m, accuracy in summary["probe"].items():
        print(f"  {m:<42}{accuracy:14.1f} %")


COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito's
MARKERS = "os^Dv<"


def draw_curves(history, path, title):
    """Accuracy, purity gap, re-learning strength and, if tracked, test purity over the epochs (paper, Fig. 4)."""
    log = pd.json_normalize(history).set_index("epoch")  # columns such as diagnosis.audio.gap
    relearnt = log[log.get("relearnt", log["val"]).eq(True)]
    panels = {"accuracy in %": log[["train", "val", "test"]], "purity gap g": log.filter(regex="gap$").dropna()}
    panels |= {"strength a": relearnt.filter(regex="strength$"), "test purity P": log.filter(regex="^test_purity")}
    panels = {label: values for label, values in panels.items() if values.size}
    size = (7, 1 + 2 * len(panels))
    figure, axes = plt.subplots(len(panels), figsize=size, sharex=True, squeeze=False, layout="constrained")
    for axis, (label, values) in zip(axes[:, 0], panels.items()):
        colours = ["0.6", COLOURS[2], "black"] if label == "accuracy in %" else COLOURS
        names = [column.split(".")[-2:][0] for column in values]
        values.set_axis(names, axis=1).plot(ax=axis, style=".-", color=colours, ylabel=label)
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        axis.vlines(relearnt.index, 0, 1, color="0.85", zorder=0, transform=axis.get_xaxis_transform())
    axes[0, 0].set_title(title, parse_math=False)
    axes[-1, 0].set_xlabel("epoch; grey lines: re-learning")
    save_figure(figure, path)


def draw_tsne(path, **changes):
    """t-SNE of each encoder's features of the test set, coloured by class (paper, Fig. 3) -> tsne.png beside it."""
    model, dataset, _ = load_run(path, **changes)
    features, labels = extract_features(model, dataset.test)
    size = (3.4 * len(features) + 1.2, 3.5)
    figure, axes = plt.subplots(1, len(features), figsize=size, squeeze=False, layout="constrained")
    for axis, (m, x) in zip(axes[0], features.items()):
        plane = TSNE(perplexity=max(1, min(30, len(x) // 4)), init="pca", random_state=0)
        x2 = plane.fit_transform(StandardScaler().fit_transform(x))  # (N, 2)
        for c, name in enumerate(dataset.classes):
            axis.plot(*x2[labels == c].T, MARKERS[c % 6], color=COLOURS[c % 7], markersize=3, label=name)
        axis.set_title(f"{m}, purity {purity(x, labels, len(dataset.classes)):.2f}", loc="left")
        axis.set_axis_off()
    if len(dataset.classes) <= 10:
        axes[0, -1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    picture = Path(path).parent / "tsne.png"
    save_figure(figure, picture, f"python dr.py --tsne {path}")
    return picture


def save_figure(figure, path, caption=""):
    """Write a picture, without frames, with the command that made it below it."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(caption, x=0.01, ha="left", wrap=True, family="monospace", fontsize=7, color="0.35")
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---- 10  Sweeps: a grid of runs, averaged over seeds --------------------------------------------------------------
def expand(words, base):
    """The configs of a grid such as ["method=joint,dr", "seed=0,1"] over the flags `base`."""
    kinds = {f.name: f.type for f in fields(Config)}
    kinds |= dict.fromkeys(("augment", "track_purity"), {"true": True, "false": False}.__getitem__)
    grid = {}
    for word in words:
        key, _, values = word.partition("=")
        key = key.replace("-", "_")
        try:
            grid[key] = [kinds[key](value) for value in values.split(",")]
        except (ValueError, KeyError):
            raise ValueError(f"--sweep takes words such as method=joint,dr or lam=1,2.5, not {word!r}") from None
    return [Config(**base | dict(zip(grid, values))) for values in itertools.product(*grid.values())]


def train_quietly(settings):
    """Train one run of a sweep, what it prints going to output.txt in its folder -> [] or [why it failed]."""
    config = Config(**settings)
    config.folder.mkdir(parents=True, exist_ok=True)
    with open(config.folder / "output.txt", "w") as output, contextlib.redirect_stdout(output):
        try:
            train(config)
        except Exception as error:
            traceback.print_exc(file=output)
            return [f"{config.name}: {error}"]
    return []


def run_all(configs, jobs=None):
    """Train what is not done yet, a process per GPU or core, or `jobs` of them; then DataError says what failed."""
    import dr  # by this name, not as __main__, another process finds the function that it is to run

    gpus = torch.cuda.device_count() if configs[0].device in ("auto", "cuda") else 0
    jobs = jobs or gpus or (1 if torch.accelerator.is_available() and configs[0].device != "cpu" else os.cpu_count())
    todo = [asdict(c) for c in configs if not is_done(c)]
    for k, settings in enumerate(todo if gpus else []):
        settings["device"] = f"cuda:{k % gpus}"
    failures = []
    try:
        with joblib.parallel_config("loky", inner_max_num_threads=max(1, os.cpu_count() // jobs)):
            side_by_side = joblib.Parallel(jobs, return_as="generator_unordered")
            finished = side_by_side(joblib.delayed(dr.train_quietly)(settings) for settings in todo)
            for failure in tqdm(finished, f"{len(configs)} runs", len(todo), unit="run", disable=None, ncols=78):
                failures += failure
    except BrokenExecutor:
        failures = ["the system killed a run, for want of memory as a rule; try a smaller --jobs"]
    finally:  # after Ctrl-C, too, nothing trains on
        joblib.externals.loky.get_reusable_executor().shutdown(kill_workers=True)
    if failures:
        count = f"{len(failures)} of {len(configs)} runs failed; the same command tries them again"
        raise data.DataError("\n  ".join([count, *failures]))


def sweep(words, base, jobs=None, name=""):
    """Run the grid that `words` span over the flags `base`, and report it -> a DataFrame with a row per run."""
    configs = expand(words, base)
    shapes = {d: load_dataset(Config(dataset=d, data=f)).shapes for d, f in {(c.dataset, c.data) for c in configs}}
    configs = [c for c in configs if not why_undefined(c, c.modalities or "+".join(shapes[c.dataset]))]
    if not configs:
        raise data.DataError("no method of this sweep is defined for its modalities and its fusion")
    if len({c.folder for c in configs}) < len(configs):
        raise data.DataError("this sweep would write two of its runs into the same folder")
    run_all(configs, jobs)
    names = [word.partition("=")[0].replace("-", "_") for word in words if word[:5] != "seed="] or ["method"]
    rows = [asdict(c) | json.loads((c.folder / "summary.json").read_text()) for c in configs]
    runs = pd.json_normalize(rows + ensembles(configs), sep=" ")
    runs.insert(0, "setting", runs[names].astype(str).agg(", ".join, axis=1))
    found = sorted(runs.filter(regex="^(accuracy|macro|probe|strength|seconds per)"))
    table = tabulate(runs, names, found)
    stem = Path(base["out"]) / (name or "-".join(["sweep", Config(**base).name, *words]))
    caption = "python " + shlex.join(sys.argv)
    note = "± standard deviation over seeds; vs: paired over seeds, ± half its 95 % interval"
    text = f"    {caption}\n\n{table.to_markdown(disable_numparse=True)}\n\n{note}\n"
    Path(f"{stem}.md").write_text(text, encoding="utf-8")
    runs[[*names, "seed", *found]].to_csv(f"{stem}.csv", index=False)
    draw_sweep(runs, f"{stem}.png", caption)
    print(f"\n{table.to_string(line_width=80)}\n\n{note}\n{stem}.md, .csv and .png")
    return runs


def ensembles(configs):
    """A row for runs of one modality each that are alike but for that: their log-probabilities, summed."""
    groups = {}
    for c in configs:
        if c.modalities and "+" not in c.modalities:
            groups.setdefault(run_name(replace(c, modalities="")), []).append(c)
    rows = []
    for group in [group for group in groups.values() if len(group) > 1]:
        tests = [np.load(c.folder / "test.npz") for c in group]
        scores = sum(special.log_softmax(test["logits"], 1) for test in tests)
        title = "ensemble of " + " and ".join(c.modalities for c in group)
        rows.append(asdict(group[0]) | metrics(scores, tests[0]["labels"]) | {"modalities": title})
    return rows


def tabulate(runs, names, found):
    """Means over seeds of the columns `found`, as text, a row per setting. The differences in accuracy are to the first
    method with all else alike, or to the first setting, and paired over seeds."""
    first = "method" if "method" in names else "setting"
    alike = ["seed", *(name for name in names if first == "method" and name != "method")]
    reference = runs["accuracy"].where(runs[first] == runs[first][0])
    runs["difference"] = runs["accuracy"] - reference.groupby([runs[name] for name in alike]).transform("first")
    groups = runs.groupby("setting", sort=False)
    half = groups["difference"].sem() * stats.t.ppf(0.975, groups.size() - 1)  # Student's t
    table = pd.DataFrame(index=list(groups.groups))
    for column in found:
        style = ".2f" if column[0] == "s" else ".1f"
        table[column] = plus_minus(groups[column].mean(), groups[column].std(), style)
    versus = plus_minus(groups["difference"].mean(), half, "+.1f").where(groups[first].first() != runs[first][0], "")
    table.insert(1, f"vs {runs[first][0]}", versus)
    return table


def plus_minus(means, spreads, style):
    """Two Series as one of text; without what there is not."""
    texts = [f"{mean:{style}} ± {spread:{style[-3:]}}" for mean, spread in zip(means, spreads)]
    return pd.Series(texts, means.index).str.replace(r"( ± |\+)?nan", "", regex=True)


def draw_sweep(runs, path, caption):
    """A panel per metric: a bar with one standard deviation per setting, and a dot per run."""
    found = sorted(runs.filter(regex="^(accuracy|probe|strength)"))
    size = (3 * len(found) + 1, 1.4 + 0.26 * runs["setting"].nunique())
    figure, axes = plt.subplots(1, len(found), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis, column in zip(axes[0], found):
        values = runs.groupby("setting", sort=False)[column]
        axis.barh(list(values.groups), values.mean(), xerr=values.std(), color=COLOURS[5])
        axis.plot(runs[column], runs["setting"], ".", color="black", markersize=3)
        axis.set_title(column)
    axes[0, 0].invert_yaxis()  # the first row on top
    save_figure(figure, path, caption)


# ---- 11  Command line ---------------------------------------------------------------------------------------------
def parse(arguments=None):
    """The command line -> (the fields of Config, all that was given); ends the program on what is wrong."""
    methods = []
    for name, function in (METHODS | RELEARNING).items():
        doc = getattr(function, "func", function).__doc__  # of what partial was made of
        methods.append(f"  {name:<13} {doc.splitlines()[0]}")
    parser = argparse.ArgumentParser(usage="python dr.py [--flag value ...]", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    presets = pd.DataFrame(PRESETS).T.to_string()
    parser.epilog = "\n".join(["methods:", *methods, "", "presets (other datasets have cremad's):", presets])
    comments = dict(re.findall(r"    (\w+): .*  # (.*)", inspect.getsource(Config)))
    for f in fields(Config):
        default = "preset" if f.default is None else f.default
        text = f"{comments[f.name]} ({default})" if default else comments[f.name]
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type, "metavar": ""}
        parser.add_argument("--" + f.name.replace("_", "-"), help=text, default=f.default, **kind)
    parser.add_argument("--sweep", nargs="+", default=[], metavar="FIELD=A,B", help="run a grid, average it over seeds")
    parser.add_argument("--jobs", type=int, metavar="", help="runs of a sweep side by side (one per GPU or CPU core)")
    parser.add_argument("--evaluate", metavar="BEST.PT", help="test this run as it was set, but for --data, --device")
    parser.add_argument("--tsne", metavar="BEST.PT", help="draw the test features of this run, likewise")
    given = parser.parse_args(arguments)
    settings = {f.name: getattr(given, f.name) for f in fields(Config)}
    try:
        expand(given.sweep, settings)
        if given.sweep and "RANK" in os.environ:
            raise ValueError("--sweep starts processes of its own, one per GPU: run it without torchrun")
    except ValueError as error:
        parser.error(str(error))
    return settings, given


def main():
    settings, given = parse()
    with data.one_line_for_errors("dr.py"):
        if given.evaluate:
            model, dataset, _ = load_run(given.evaluate, data=given.data, device=given.device)
            print("on the test set: " + ", ".join(f"{k} {v:.1f} %" for k, v in evaluate(model, dataset.test).items()))
        elif given.tsne:
            print(draw_tsne(given.tsne, data=given.data, device=given.device))
        elif given.sweep:
            sweep(given.sweep, settings | {"name": ""}, given.jobs, given.name)
        else:
            train(Config(**settings))


if __name__ == "__main__":
    main()
