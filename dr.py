"""Diagnosing & Re-learning for balanced multimodal learning
(Wei, Li, Feng, Hu; ECCV 2024, arXiv 2407.09705).

A network that learns from several modalities at once leans on the one that it
learns first. Every H epochs D&R looks at each modality's encoder: k-means
clusters its features of the training and of a validation set, and the gap g
between the purities of the two is the encoder's learning state. Then every
encoder is pulled back towards its initial weights, the further the larger g:

    a = tanh(lambda * g)        theta <- (1 - a) * theta + a * theta_init

    python dr.py                       D&R on the demo, drawn on the spot
    python dr.py --method joint        joint training; --help lists the others
    python dr.py --modalities audio    one modality alone
    python dr.py --dataset cremad      after python data.py cremad --raw ...
    python dr.py --sweep method=joint,dr seed=0,1,2      a grid, over seeds
    python dr.py --evaluate runs/demo-dr-0/best.pt       on the test set
    python dr.py --tsne runs/demo-dr-0/best.pt           its features, drawn
    torchrun --nproc_per_node=2 dr.py --dataset cremad   on two GPUs

Sections 1 to 5 are the method, whole. A run leaves config.json, log.jsonl,
summary.json, best.pt, test.npz and curves.png in runs/<name>/. If it is
stopped, the same command resumes it.
"""

import argparse
import contextlib
import copy
import ctypes
import hashlib
import io
import itertools
import json
import math
import os
import shlex
import sys
import threading
import time
import traceback
from collections import OrderedDict
from concurrent.futures import BrokenExecutor
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, get_args

import joblib
import matplotlib
import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from scipy import special, stats
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.metrics import f1_score
from sklearn.metrics.cluster import contingency_matrix
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, minmax_scale
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import data


# ---- 1  Encoders: one per modality, from its input to features (B, D) --------------------------------------------
class PictureEncoder(nn.Module):
    """A convolutional network, and the mean of its maps over space and time: features (B, D).
    It takes spectrograms (B, 1, F, T), of F bands and T moments, or T frames of C channels, (B, T, C, H, W)."""

    def __init__(self, network, width):
        super().__init__()
        self.network = network  # pictures (B, C, H, W) -> maps (B, D, h, w)
        self.width = width  # D

    def forward(self, x):
        if x.dim() == 4:
            return self.network(x).mean((2, 3))
        maps = self.network(x.flatten(0, 1))  # frames are pictures of a larger batch: (B*T, D, h, w)
        return maps.unflatten(0, x.shape[:2]).mean((1, 3, 4))


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
        shortcut = nn.Sequential(
            nn.MaxPool2d(kernel_size=1, stride=2),  # the stride; as the convolution's own it crashes some CPUs
            nn.Conv2d(before, after, kernel_size=1, bias=False),
            nn.BatchNorm2d(after),
        )
        layers.append(torchvision.models.resnet.BasicBlock(before, after, stride=2, downsample=shortcut))
    return PictureEncoder(nn.Sequential(*layers), widths[-1])


ENCODERS = {"resnet18": resnet18, "small": small_resnet}  # more in section 7
FROM_SCRATCH = ("resnet18", "small", "vit")  # with the official code's initial weights


def choose_encoder(shape, name="auto"):
    """The encoder's name for samples of this shape: pictures have a choice, feature sequences (T, D) have none."""
    if len(shape) == 2:
        return "transformer"
    if name == "auto":
        return "small" if shape[-2] <= 64 else "resnet18"
    return name


# ---- 2  Fusion, and the multimodal model -------------------------------------------------------------------------
class Concatenation(nn.Module):
    """The features side by side, and one linear layer: the official code's fusion."""

    def __init__(self, widths, n_classes):
        super().__init__()
        self.widths = widths  # {modality: D}
        self.head = nn.Linear(sum(widths.values()), n_classes)

    def forward(self, features):  # {modality: (B, D)} -> logits (B, n_classes)
        return self.head(torch.cat(list(features.values()), 1))

    def parts(self, features):
        """The joint logits as a sum over modalities -> {modality: (B, n_classes)}: a modality's columns of the weight
        times its features, plus an equal share of the bias, as in OGM-GE's official code."""
        columns = self.head.weight.split(list(self.widths.values()), 1)
        bias = self.head.bias / len(columns)
        return {m: F.linear(features[m], w, bias) for m, w in zip(self.widths, columns)}


FUSIONS = {"concat": Concatenation}  # more in section 7


class MultimodalModel(nn.Module):
    """One encoder per modality, then a fusion. `shapes` is {modality: shape of one sample}."""

    def __init__(self, shapes, n_classes, encoder="auto", fusion="concat"):
        super().__init__()
        self.arguments = (shapes, n_classes, encoder, fusion)  # to make another one of the same kind
        self.encoders = nn.ModuleDict({m: ENCODERS[choose_encoder(s, encoder)](s) for m, s in shapes.items()})
        self.fusion = FUSIONS[fusion]({m: e.width for m, e in self.encoders.items()}, n_classes)
        for m, shape in shapes.items():
            if choose_encoder(shape, encoder) in FROM_SCRATCH:  # one's own may be pre-trained
                self.encoders[m].apply(initialise)

    @property
    def device(self):
        return next(self.parameters()).device

    def features(self, inputs):  # {modality: input} -> {modality: (B, D)}
        return {m: encoder(inputs[m]) for m, encoder in self.encoders.items()}

    def forward(self, inputs):  # -> logits (B, n_classes)
        return self.fusion(self.features(inputs))


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

    features (N, D) and labels (N,), arrays or CPU tensors. Raises ValueError for features that are not finite,
    fewer samples than clusters, and lengths that differ."""
    x = minmax_scale(np.asarray(features, dtype=np.float32), (-1, 1))  # each set by itself, as in the official code
    clusters = KMeans(n_clusters, n_init=n_init, random_state=seed).fit_predict(x)  # (N,)
    return float(contingency_matrix(labels, clusters).max(0).sum() / len(x))  # counts (classes, clusters)


def purity_gap(train_features, train_labels, val_features, val_labels, n_clusters, n_init=10, seed=0):
    """An encoder's learning state, g = |P_train - P_val|. Large: it is well learnt, or over-trained. Small: it is
    under-trained, or has little to tell. Returns (P_train, P_val, g)."""
    p_train = purity(train_features, train_labels, n_clusters, n_init, seed)
    p_val = purity(val_features, val_labels, n_clusters, n_init, seed)
    return p_train, p_val, abs(p_train - p_val)


@torch.no_grad()
def extract_features(model, split, batch_size=128):
    """Features of a split, without augmentation -> ({modality: (N, D)}, labels (N,)), as arrays. The model is in eval
    mode afterwards."""
    model.eval()
    parts = {m: [] for m in model.encoders}
    labels = []
    for inputs, y in data.batches(split, batch_size, device=model.device):
        labels.append(y)
        for m, x in model.features(inputs).items():
            parts[m].append(x)
    return {m: torch.cat(x).cpu().numpy() for m, x in parts.items()}, torch.cat(labels).cpu().numpy()


def diagnose(model, train, val, n_clusters, n_init=10, measure=purity_gap):
    """The purity gap of every modality -> {modality: (P_train, P_val, g)}; n_clusters is the number of classes."""
    x_train, y_train = extract_features(model, train)
    x_val, y_val = extract_features(model, val)
    return {m: measure(x_train[m], y_train, x_val[m], y_val, n_clusters, n_init) for m in model.encoders}


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
        if parameter.numel() and parameter.data_ptr() == init_state[name].data_ptr():
            raise ValueError(f"init_state holds the very weights that are trained, as {name}: deepcopy the state_dict")
        parameter.lerp_(init_state[name].to(parameter), strength)


def initial_weights(model):
    """theta_init, to be taken before the first step -> {modality: its encoder's state_dict}."""
    return {m: copy.deepcopy(encoder.state_dict()) for m, encoder in model.encoders.items()}


def relearn(model, initial, gaps, lam):
    """D&R: every encoder goes back by its own gap.
    `gaps` is {modality: g}, `initial` comes from initial_weights(model). Returns the strengths, {modality: a}."""
    strengths = {m: relearning_strength(gap, lam) for m, gap in gaps.items()}
    for m, strength in strengths.items():
        soft_reinit(model.encoders[m], initial[m], strength)
    return strengths


RELEARNING = {"dr": relearn}  # {--method: what follows a diagnosis -> strengths}; of other methods nothing goes back


# ---- 5  Training: a method leaves a gradient in every parameter, the optimiser makes the step ---------------------
def joint(model, inputs, labels, t):
    """One cross-entropy for all modalities, and nothing else.
    t, the share of training that is done, is for methods that change on the way (section 6)."""
    logits = model(inputs)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    return loss, logits


METHODS = {"joint": joint, "dr": joint}  # {--method: what is done with a batch}


def step(model, optimiser, inputs, labels, method=joint, t=0.0):
    """One step of training -> the batch's mean loss, and its logits (B, n_classes)."""
    optimiser.zero_grad()
    loss, logits = method(model, inputs, labels, t)
    average_gradients(model)  # section 8: of several processes, if there are any
    optimiser.step()
    return loss.detach(), logits.detach()


def train_epoch(run, epoch):
    """One pass over the training set -> {"epoch", "loss": its mean, "train": accuracy in per cent}."""
    run.model.train()
    method = METHODS[run.config.method]
    loss_sum = right = clips = 0
    for inputs, labels in training_batches(run, epoch):  # section 8: in a new order
        loss, logits = step(run.model, run.optimiser, inputs, labels, method, t=epoch / run.config.epochs)
        loss_sum += loss * len(labels)
        right += (logits.argmax(1) == labels).sum()
        clips += len(labels)
    return {"epoch": epoch, "loss": float(loss_sum) / clips, "train": 100 * int(right) / clips}


def train(config):
    """Train a model with D&R, or with another method -> its history, one dict per epoch; files in <out>/<name>/.
    An entry holds epoch (from 0), loss, train, val and test accuracy in per cent, val_f1, test_f1, seconds; after a
    diagnosis also diagnosis {modality: {P_train, P_val, gap, floor, strength}} and relearnt (if false, nothing went
    back); with --track-purity test_purity {modality: P}."""
    with begin(config) as run:  # section 8: the data, a new model and its optimiser
        initial = initial_weights(run.model)
        for epoch in remaining_epochs(run):  # section 8: all, or those that a stopped run has left
            entry = train_epoch(run, epoch)
            evaluate_epoch(run, entry)  # section 8: on validation and test; the best weights are kept

            if epoch % config.every == 0 and epoch > 0:
                diagnosis = diagnose_run(run)  # section 8: `diagnose`, with the gap that shuffled labels give
                gaps = {m: found["gap"] for m, found in diagnosis.items()}
                strengths = {m: relearning_strength(gap, config.lam) for m, gap in gaps.items()}  # what D&R would do
                entry["relearnt"] = config.method in RELEARNING and run.relearnings < config.times
                if entry["relearnt"]:
                    strengths = RELEARNING[config.method](run.model, initial, gaps, config.lam)
                    run.relearnings += 1
                entry["diagnosis"] = {m: diagnosis[m] | {"strength": strengths[m]} for m in gaps}

            end_epoch(run, entry)  # section 9: the log, and a line on the screen
        finish(run)  # section 9: the summary, weights, curves
    return run.history


# ---- 6  Other methods: rivals of D&R, and D&R with one thing changed ----------------------------------------------
# Each rival follows its official code and defaults (InfoReg: the paper's rule); what differs is said. Their
# uni-modal logits are `parts` of the joint ones, where some official codes train extra heads.
def compare(model, inputs, labels):
    """One forward pass, and how far each modality is -> a namespace. Below, r_m = s_m / the mean of the others' s:
    how far m is ahead of them, OGM-GE's ratio of two modalities."""
    features = model.features(inputs)
    parts = model.fusion.parts(features)
    logits = model.fusion(features)
    s = {m: part.detach().softmax(1).gather(1, labels[:, None]).mean() for m, part in parts.items()}
    return SimpleNamespace(
        features=features,  # {m: (B, D)}
        logits=logits,  # (B, n_classes)
        loss=F.cross_entropy(logits, labels),  # L
        unimodal_loss=sum(F.cross_entropy(part, labels) for part in parts.values()),  # the sum of L_m
        s=s,  # the mean probability of the right class by m's part
        others={m: (sum(s.values()) - s[m]) / (len(s) - 1) for m in s},  # the mean of the others' s
    )


def trained(module):
    """Its parameters that have a gradient: none that is frozen, or takes no part."""
    return [p for p in module.parameters() if p.grad is not None]


def multitask(model, inputs, labels, t):
    """Joint training plus one cross-entropy per modality.
    L + sum over m of L_m: the baseline of MMPareto's official code. The loss returned is L, to compare methods by."""
    out = compare(model, inputs, labels)
    (out.loss + out.unimodal_loss).backward()
    return out.loss, out.logits


def ogm(model, inputs, labels, t):
    """OGM: slows what is ahead (Peng et al., CVPR 2022)."""
    return ogm_ge(model, inputs, labels, t, noise=False)


def ogm_ge(model, inputs, labels, t, alpha=0.8, until=0.5, noise=True):
    """OGM, and GE: noise on the gradients (the same paper).
    In the first half of training the gradients of encoder m's convolutions and linear layers are multiplied by
    k_m = 1 - tanh(alpha r_m) if r_m > 1, else by 1; then N(0, std(grad)^2) is added, tensor by tensor, with the std from
    before, and by each process its own. alpha is the authors' for CREMA-D. Officially: convolutions only, and the
    audio's are slowed at r = 1, too."""
    out = compare(model, inputs, labels)
    out.loss.backward()
    if t > until:
        return out.loss, out.logits
    for m, encoder in model.encoders.items():
        ratio = out.s[m] / out.others[m]
        factor = torch.where(ratio > 1, 1 - torch.tanh(alpha * ratio), 1.0)
        for p in trained(encoder):
            if p.dim() > 1:
                slowed = factor * p.grad
                if noise:
                    slowed += (p.grad.std() + 1e-8) * torch.randn_like(p.grad)
                p.grad = slowed
    return out.loss, out.logits


def mlb(model, inputs, labels, t, alpha=0.5, beta=10.0):
    """MLB (Kontras et al., BMVC 2024): multitask, slowed and sped up.
    Times k_m = 1 + tanh(alpha (1/r_m - 1)), or 1 + (beta - 1) tanh(alpha (1/r_m - 1)) where r_m < 1, on all parameters
    of encoder m. alpha and beta are the authors' for CREMA-D. They scale m's head, too; here it is the joint one's."""
    out = compare(model, inputs, labels)
    (out.loss + out.unimodal_loss).backward()
    for m, encoder in model.encoders.items():
        pace = torch.tanh(alpha * (out.others[m] / out.s[m] - 1))
        for p in trained(encoder):
            p.grad *= 1 + pace * torch.where(pace > 0, beta - 1, 1.0)
    return out.loss, out.logits


def opm(model, inputs, labels, t, base=0.5, gain=0.5, chance=0.7, warm_up=0.05):
    """OPM (Wei et al., TPAMI 2024): drops features of what is ahead.
    A sample loses z_m with probability q_m = base (1 + gain tanh(r_m - 1)) if r_m > 1, else 0; what stays is divided
    by 1 - theta, theta the mean of q over all features. In a share `chance` of the batches, after 6 in 100 epochs.
    Some modality is always behind, so no sample loses all."""
    out = compare(model, inputs, labels)
    features = out.features
    if t > warm_up and torch.rand(()) < chance:
        q = {}
        for m, s in out.s.items():
            q[m] = torch.where(s > out.others[m], base * (1 + gain * torch.tanh(s / out.others[m] - 1)), 0.0)
        widths = {m: x.shape[1] for m, x in features.items()}
        theta = sum(q[m] * widths[m] for m in q) / sum(widths.values())
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
    out = compare(model, inputs, labels)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = partial(torch.autograd.grad, inputs=parameters, materialize_grads=True)  # 0 of what takes no part
    g = dict(zip(parameters, gradients(out.loss, retain_graph=True)))
    h = dict(zip(parameters, gradients(out.unimodal_loss)))
    for p in parameters:
        p.grad = g[p] + h[p]
    for encoder in model.encoders.values():
        all_g = torch.cat([g[p].flatten() for p in trained(encoder)])
        all_h = torch.cat([h[p].flatten() for p in trained(encoder)])
        nearest = (all_h @ (all_h - all_g)) / (all_g - all_h).square().sum().clamp_min(1e-30)
        w = torch.where(all_g @ all_h > 0, 0.5, nearest)
        for p in trained(encoder):
            new = 2 * w * g[p] + 2 * (1 - w) * h[p]
            longer = p.grad.norm() / new.norm().clamp_min(1e-30)
            p.grad = gamma * longer.clamp_min(1) * new
    return out.loss, out.logits


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


def inforeg(model, inputs, labels, t, beta=0.9, threshold=0.04):
    """InfoReg* (Huang et al., CVPR 2025): holds back what is ahead.
    Like multitask, but encoder m is pulled towards w_e, its weights at the beginning of epoch e, if s_m is above the
    mean of the others' s, and while it learns fast, (Tr_e-1 - Tr_e-2) / Tr_e-1 > threshold: its gradient gets
    exp(beta tanh(s_m - others)) (w - w_e). Tr_e is the sum over epoch e of its squared gradients. That is the paper's
    rule with uni-modal losses, for any number of modalities. The official code has sums for the means in s,
    .95 exp(tanh) for audio and .1 exp(tanh) for video, the threshold .05, and for both the trace of the audio's
    convolutions and linear layers, as means over their elements, smoothed over ten epochs."""
    epoch = round(t * len(model.traces))  # (epochs, M), a buffer, and so part of a checkpoint
    if getattr(model, "anchor_epoch", None) != epoch:
        model.anchor_epoch = epoch
        model.anchor = {p: p.detach().clone() for p in model.encoders.parameters()}
    out = compare(model, inputs, labels)
    (out.loss + out.unimodal_loss).backward()
    squares = [sum(p.grad.square().sum() for p in trained(encoder)) for encoder in model.encoders.values()]
    model.traces[epoch] += average(torch.stack(squares))  # section 8: over the processes
    if epoch < 2:
        return out.loss, out.logits
    before, last = model.traces[epoch - 2 : epoch]
    is_open = last - before > threshold * last  # (M,)
    for k, (m, encoder) in enumerate(model.encoders.items()):
        delta = out.s[m] - out.others[m]
        pull = torch.where(is_open[k] & (delta > 0), torch.exp(beta * torch.tanh(delta)), 0.0)
        for p in trained(encoder):
            p.grad += pull * (p.detach() - model.anchor[p])
    return out.loss, out.logits


def relearn_same(model, initial, gaps, lam):
    """D&R with one strength for all modalities, from their mean gap."""
    return relearn(model, initial, dict.fromkeys(gaps, sum(gaps.values()) / len(gaps)), lam)


def relearn_hard(model, initial, gaps, lam):
    """D&R with strength 1: back to the initial weights."""
    return relearn(model, initial, dict.fromkeys(gaps, math.inf), 1.0)


def relearn_largest(model, initial, gaps, lam):
    """D&R, but only the modality with the largest gap goes back."""
    one = max(gaps, key=gaps.get)
    return relearn(model, initial, {m: gap if m == one else 0.0 for m, gap in gaps.items()}, lam)


def relearn_smallest(model, initial, gaps, lam):
    """D&R, but only the modality with the smallest gap goes back."""
    one = min(gaps, key=gaps.get)
    return relearn(model, initial, {m: gap if m == one else 0.0 for m, gap in gaps.items()}, lam)


def relearn_statistics(model, initial, gaps, lam):
    """D&R of batch-norm's running statistics, too."""
    strengths = relearn(model, initial, gaps, lam)
    for m, strength in strengths.items():
        for name, buffer in model.encoders[m].named_buffers():
            if buffer.is_floating_point():  # not the count of batches
                buffer.lerp_(initial[m][name].to(buffer), strength)
    return strengths


def relearn_momentum(model, initial, gaps, lam):
    """D&R, and the optimiser's momentum set to 0."""
    strengths = relearn(model, initial, gaps, lam)
    for m, strength in strengths.items():
        for p in model.encoders[m].parameters():
            if strength > 0:
                model.optimiser.state.pop(p, None)
    return strengths


def relearn_new(model, initial, gaps, lam):
    """D&R towards new random weights instead of the initial ones."""
    another = type(model)(*model.arguments)
    return relearn(model, initial_weights(another), gaps, lam)


def equal_gap(x_train, y_train, x_val, y_val, n_clusters, n_init=10):
    """D&R by max(0, P_train - P_val) of equally many clips.
    Without two biases of purity_gap: the purity of fewer clips is larger by luck, and other people's clips may cluster
    better than the training clips; neither says how much was learnt. Returns (P_train, P_val, g)."""
    n = min(len(y_train), len(y_val))
    some = torch.randperm(len(y_train))[:n].numpy()
    others = torch.randperm(len(y_val))[:n].numpy()
    p_train, p_val, _ = purity_gap(x_train[some], y_train[some], x_val[others], y_val[others], n_clusters, n_init)
    return p_train, p_val, max(0.0, p_train - p_val)


def with_floor(measure, x_train, y_train, x_val, y_val, n_clusters, n_init=10, shuffles=3):
    """A measure's P_train, P_val and gap, and the gap's floor, which is luck: the mean gap for shuffled labels, by
    k-means of one start."""
    found = measure(x_train, y_train, x_val, y_val, n_clusters, n_init)
    rng = np.random.default_rng(0)
    lucky = []
    for _ in range(shuffles):
        lucky.append(measure(x_train, rng.permutation(y_train), x_val, rng.permutation(y_val), n_clusters, n_init=1)[2])
    return dict(zip(("P_train", "P_val", "gap"), found), floor=float(np.mean(lucky)))


for method in (multitask, ogm, ogm_ge, mlb, opm, mmpareto, dgl, inforeg):
    METHODS[method.__name__.replace("_", "-")] = method
METHODS["multitask+dr"] = multitask
COMPARING = METHODS.keys() - {"joint", "dr"}  # they take two modalities at least, and a fusion with `parts`
for ablation in (relearn_same, relearn_hard, relearn_largest, relearn_smallest, relearn_statistics, relearn_momentum,
                 relearn_new):  # fmt: skip
    RELEARNING[ablation.__name__.replace("relearn_", "dr-")] = ablation
RELEARNING |= {"multitask+dr": relearn, "dr-equal": relearn}
for name in RELEARNING:
    METHODS.setdefault(name, joint)
MEASURES = {"dr-equal": equal_gap}  # {--method: how its gaps are measured}; all others' are purity_gap


# ---- 7  Other encoders and fusions: what has tokens, some of which may be padding ---------------------------------
def transformer(width, layers):
    """Pre-norm self-attention layers on tokens (B, N, width), and a last LayerNorm."""
    layer = nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=4 * width, batch_first=True, norm_first=True)
    layer.self_attn.dropout = 0.0  # drawing it took a third of a step, and keeps PyTorch from its fast attention
    return nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)


def masked_mean(tokens, padding):
    """The mean over those of the tokens (B, N, D) that are not padding (B, N) -> (B, D), in fp32."""
    tokens = tokens.float()
    if padding is None:
        return tokens.mean(1)
    return tokens.masked_fill(padding[..., None], 0).sum(1) / (~padding).sum(1, keepdim=True)


class SequenceTransformer(nn.Module):
    """A small transformer on feature sequences (B, T, D) whose padding is exactly 0. A token is a patch of ceil(T / 64)
    steps, so that long sequences have 64 tokens at most."""

    def __init__(self, shape, width=64, layers=2, most=64):
        super().__init__()
        T, D = shape
        self.width = width
        self.steps = math.ceil(T / most)
        self.embed = nn.Linear(self.steps * D, width)
        self.position = nn.Parameter(0.02 * torch.randn(math.ceil(T / self.steps), width))
        self.layers = transformer(width, layers)

    def tokens(self, x):  # -> tokens (B, N, width), and which of them are padding (B, N)
        lacking = len(self.position) * self.steps - x.shape[1]
        patches = F.pad(x, (0, 0, 0, lacking)).unflatten(1, (-1, self.steps)).flatten(2)  # (B, N, steps * D)
        padding = (patches == 0).all(-1)
        padding[:, 0] &= ~padding.all(1)  # nothing at all: look at the first token, so that there is a mean
        return self.layers(self.embed(patches) + self.position, src_key_padding_mask=padding), padding

    def forward(self, x):
        return masked_mean(*self.tokens(x))


class PatchTransformer(nn.Module):
    """A small Vision Transformer (Dosovitskiy et al. 2021): pictures (B, C, H, W) to maps of patches (B, D, h, w)."""

    def __init__(self, shape, width, layers):
        super().__init__()
        patch = 8 if shape[-2] <= 64 else 16
        if min(shape[-2:]) < patch:
            raise data.DataError(f"a ViT's patch has {patch} x {patch} pixels; the pictures have {shape[-2:]}")
        self.embed = nn.Conv2d(shape[-3], width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(width, shape[-2] // patch, shape[-1] // patch))
        self.layers = transformer(width, layers)

    def forward(self, x):
        patches = self.embed(x) + self.position
        tokens = self.layers(patches.flatten(2).mT)  # (B, h*w, D)
        return tokens.mT.unflatten(2, patches.shape[2:])


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


def tokens_of(encoder, x):
    """One token per place of an encoder's maps, or per patch of a sequence -> (B, N, D), and padding (B, N) or None."""
    if hasattr(encoder, "tokens"):
        return encoder.tokens(x)
    if not hasattr(encoder, "network"):
        raise data.DataError("--fusion mbt takes encoders with tokens(x), or with a network that gives maps")
    maps = encoder.network(x.flatten(0, -4))  # (B * T, D, h, w)
    return maps.flatten(2).mT.reshape(len(x), -1, encoder.width), None


class BottleneckModel(MultimodalModel):
    """MBT: the modalities' tokens meet only in a few shared bottleneck tokens (Nagrani et al. 2021).
    In every layer a modality's tokens and the bottleneck attend to each other, by weights of the modality's own; the
    next layer gets the mean of the bottlenecks. One classifier, on each modality's mean token; logits are averaged.
    A modality's layers belong to its encoder, and so are re-learnt with it."""

    def __init__(self, shapes, n_classes, encoder="auto", fusion="mbt", width=128, size=4, layers=2):
        super().__init__(shapes, n_classes, encoder)
        for encoder in self.encoders.values():
            encoder.project = nn.Linear(encoder.width, width)
            encoder.bottleneck_layers = nn.ModuleList([transformer(width, 1) for _ in range(layers)])
        self.bottleneck = nn.Parameter(0.02 * torch.randn(size, width))
        self.fusion = nn.Linear(width, n_classes)
        self.depth = layers

    def mean_tokens(self, inputs):  # {modality: input} -> {modality: (B, width)}
        S = len(self.bottleneck)
        x = {}
        padding = {}
        for m, encoder in self.encoders.items():
            tokens, padding[m] = tokens_of(encoder, inputs[m])
            x[m] = encoder.project(tokens)  # (B, N, width)
        shared = self.bottleneck.expand(len(tokens), -1, -1)  # (B, S, width)
        for k in range(self.depth):
            for m, encoder in self.encoders.items():
                mask = None if padding[m] is None else F.pad(padding[m], (S, 0))  # a mask of nothing costs 5 %
                x[m] = encoder.bottleneck_layers[k](torch.cat([shared, x[m]], 1), src_key_padding_mask=mask)
            shared = sum(y[:, :S] for y in x.values()) / len(x)
            x = {m: y[:, S:] for m, y in x.items()}
        return {m: masked_mean(x[m], padding[m]) for m in x}

    def forward(self, inputs):
        return sum(self.fusion(x) for x in self.mean_tokens(inputs).values()) / len(inputs)


ENCODERS |= {"transformer": SequenceTransformer, "vit": vit}
FUSIONS |= {"sum": Sum, "film": FiLM, "gated": Gated, "mbt": BottleneckModel}


# ---- 8  Runs: their settings, checkpoints, several processes ------------------------------------------------------
OFFICIAL = dict(epochs=90, batch_size=64, lr=0.002, weight_decay=1e-4, every=20, times=3, augment=False)
PRESETS = {
    "demo": OFFICIAL | dict(epochs=30, lr=0.05, every=5, times=4, augment=True),
    "cremad": OFFICIAL,  # the official code's, and any other dataset's: the paper trains its video datasets alike
    "mosi": OFFICIAL | dict(epochs=30, batch_size=32, lr=0.01, every=6),
}
CHOICES = {"method": METHODS, "fusion": FUSIONS, "precision": ["auto", "bf16", "fp32"]}
LEAST = {"every": 1, "epochs": 1, "batch_size": 2, "n_init": 1}  # batch-norm takes two clips
CHECKPOINT_SECONDS = 30  # a kill costs at most so much, and the epoch that it falls into
ALL_THREADS = torch.get_num_threads()


@dataclass
class Config:
    """Everything that a run depends on. Every field is a flag, with its help; None: by dataset, see PRESETS."""

    dataset: Annotated[str, "what to train on: a folder of prepared data"] = "demo"
    method: Annotated[str, "how to train: one of the list below"] = "dr"
    modalities: Annotated[str, "those to use, as visual or audio+visual; all if not given"] = ""
    encoder: Annotated[str, "of pictures: resnet18, small, vit; auto: by their size"] = "auto"
    fusion: Annotated[str, "how features are joined: concat, sum, film, gated, mbt"] = "concat"
    noise_audio: Annotated[float, "noise on the sound, in standard deviations of it"] = 0.0
    augment: Annotated[bool, "mild crops, flips, gains, shifts in training; officially none"] = None
    lam: Annotated[float, "lambda in a = tanh(lambda * gap)"] = 3.0
    every: Annotated[int, "H: diagnose after epochs H, 2H, ..., counted from 0"] = None
    times: Annotated[int, "re-learn at most so many times"] = None
    epochs: Annotated[int, "how long to train"] = None
    batch_size: Annotated[int, "samples per step"] = None
    lr: Annotated[float, "learning rate of SGD, constant"] = None
    momentum: Annotated[float, "momentum of SGD"] = 0.9
    weight_decay: Annotated[float, "weight decay of SGD"] = None
    n_init: Annotated[int, "restarts of k-means"] = 10
    track_purity: Annotated[bool, "after each epoch, the purity of the test features"] = False
    seed: Annotated[int, "of initial weights, order of batches, augmentation"] = 0
    precision: Annotated[str, "bf16 (autocast) or fp32; auto: bf16 on CUDA"] = "auto"
    device: Annotated[str, "cpu, cuda, cuda:1 or mps; auto: the best there is"] = "auto"
    data: Annotated[str, "folder of the prepared datasets"] = "prepared"
    out: Annotated[str, "folder of the runs"] = "runs"
    name: Annotated[str, "of the run; by default made of the flags that are not default"] = ""

    def __post_init__(self):
        for key, value in PRESETS.get(self.dataset, OFFICIAL).items():
            if getattr(self, key) is None:
                setattr(self, key, value)
        for method in RELEARNING:  # a re-learning of one's own trains as D&R does
            METHODS.setdefault(method, joint)
        manifest = Path(self.data) / self.dataset / "manifest.json"
        all_of_them = ["audio", "visual"] if self.dataset == "demo" else []  # which may not be drawn yet
        if manifest.exists():
            all_of_them = list(data.read_json(manifest)["modalities"])
        if self.modalities.split("+") == all_of_them:
            self.modalities = ""  # the same run as if none were named
        self.name = self.name or run_name(self)
        choices = CHOICES | {"encoder": ["auto", *sorted(ENCODERS.keys() - {"transformer"})]}  # of pictures
        for key, value in asdict(self).items():
            least = LEAST.get(key, 0)
            if key in choices and value not in choices[key]:
                raise ValueError(f"{key} is one of {', '.join(choices[key])}, not {value!r}")
            if isinstance(value, (int, float)) and not least <= value < 2**32:
                raise ValueError(f"{key} is at least {least} and less than 2 to the 32, not {value}")
            if key in ("dataset", "name") and (Path(value).name != value or value == ".."):
                raise ValueError(f"{key} is the name of a folder, without slashes, not {value!r}")
        self.folder = Path(self.out) / self.name

    def stored(self):  # what is written of it: all fields, and which clips were prepared how
        return asdict(self) | {"manifest": data.fingerprint(Path(self.data) / self.dataset / "manifest.json")}


KINDS = {f.name: get_args(f.type) for f in fields(Config)}  # {field: (its type, its help)}
PLACES = ("device", "data", "out", "name")  # where a run is, not what it is


def run_name(config):
    """<dataset>-<method>-<what else is not default>-<seed>."""
    usual = {f.name: f.default for f in fields(Config)} | PRESETS.get(config.dataset, OFFICIAL)
    words = [config.dataset, config.method]
    for key, value in asdict(config).items():
        if value != usual[key] and key not in (*PLACES, "dataset", "method", "seed"):
            words.append(value if key == "modalities" else f"{key}={value}")
    return shorten("-".join([*words, str(config.seed)]))


def shorten(name, most=100):
    """A name that every file system takes: of a long one the beginning, and a hash that tells it from others."""
    if len(name.encode()) <= most:
        return name
    return name.encode()[: most - 9].decode(errors="ignore") + "-" + hashlib.sha256(name.encode()).hexdigest()[:8]


def is_done(config):
    """Has this very run been finished, on whatever device? Raises DataError if its folder holds another one."""
    summary = config.folder / "summary.json"
    if summary.exists() or (config.folder / "last.pt").exists():
        with data.explained(f"{config.folder}/config.json is damaged: delete {config.folder}"):
            before = json.loads((config.folder / "config.json").read_text())
        differ = [key for key, value in config.stored().items() if key not in PLACES and value != before.get(key)]
        if differ:
            other = f"{config.folder} holds a run with another {', '.join(differ)}"
            raise data.DataError(f"{other}: finish or delete that, or give a --name")
    return summary.exists() and "probe" in json.loads(summary.read_text())  # the last that is written


@contextlib.contextmanager
def begin(config):
    """All that a run works on, its folder held against other processes -> a namespace, for a `with`. Under torchrun
    every process has its own; the main process alone evaluates, diagnoses, writes and prints."""
    device = set_up(config)
    dataset = load_dataset(config)
    with data.exclusive(config.folder) if is_main() else contextlib.nullcontext():
        if device.type == "cuda":
            data.move_to_gpu(dataset, device, max_bytes=torch.cuda.mem_get_info(device)[0] / 2)
        torch.manual_seed(config.seed)
        model = make_model(config, dataset, device)
        optimiser = torch.optim.SGD(model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay)
        model.optimiser = optimiser  # dr-momentum's
        run = SimpleNamespace(config=config, dataset=dataset, model=model, optimiser=optimiser)
        run.history = []
        run.best_weights = None  # of the epoch that is the best on validation so far
        run.relearnings = 0
        yield run
    if dist.is_initialized():
        dist.destroy_process_group()


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
        torch.backends.cudnn.allow_tf32 = False  # fp32 is exact
    if device.type == "cpu":
        keep_freed_memory()
    if "RANK" in os.environ and not dist.is_initialized():
        nccl = config.device in ("auto", "cuda") and gpus >= int(os.environ["LOCAL_WORLD_SIZE"])
        # the others wait, for a day if need be, while the main process evaluates and diagnoses
        dist.init_process_group("nccl" if nccl else "gloo", timeout=timedelta(days=1))
    return device


def keep_freed_memory():
    """Let glibc keep what PyTorch frees. Giving it back, and getting it anew, took a fifth of a small network's step."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # other systems have no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: nothing is mapped
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing is given back


def load_dataset(config):
    """The prepared dataset of a config; the demo is made if it is not there. Raises DataError."""
    if config.dataset == "demo" and not (Path(config.data) / "demo" / "manifest.json").exists():
        data.prepare("demo", out=config.data)
    names = config.modalities.split("+") if config.modalities else None
    if names and len(set(names)) < len(names):
        raise data.DataError(f"--modalities {config.modalities} names one twice")
    dataset = data.load(config.dataset, config.data, names)
    if min(len(dataset.train), len(dataset.val), len(dataset.test)) < len(dataset.classes):
        raise data.DataError("a diagnosis takes at least as many clips of every split as there are classes")
    if len(set(dataset.train.labels)) < 2:
        raise data.DataError("every training clip has the same label: there is nothing to tell apart")
    if reason := why_undefined(config, "+".join(dataset.shapes)):
        raise data.DataError(reason)
    if config.noise_audio:
        data.add_noise(dataset, "audio", config.noise_audio)
    return dataset


def why_undefined(config, modalities):
    """Why method, fusion or noise are not defined for these modalities, or ""."""
    count = modalities.count("+") + 1
    if config.noise_audio and "audio" not in modalities.split("+"):
        return f"--noise-audio is noise on audio; there is {modalities}"
    if config.fusion in ("film", "gated") and count != 2:
        return f"--fusion {config.fusion} joins two modalities, not {count}: name two with --modalities"
    if config.method in COMPARING and (count < 2 or not hasattr(FUSIONS[config.fusion], "parts")):
        return f"--method {config.method} compares modalities: it takes two or more, and --fusion concat or sum"
    return ""


class InBf16:
    """Mixed into a model: its encoders compute in bf16, by autocast; features are fp32, and so are fusion and loss."""

    def features(self, inputs):
        with torch.autocast(self.device.type, torch.bfloat16):
            return {m: x.float() for m, x in super().features(inputs).items()}

    def mean_tokens(self, inputs):  # a BottleneckModel's, which are fp32
        with torch.autocast(self.device.type, torch.bfloat16):
            return super().mean_tokens(inputs)


def make_model(config, dataset, device="cpu"):
    """The model of a config, on its device. On several processes batch-norm takes its statistics over each one's share
    of a batch, as is usual; SyncBatchNorm would wait for the others 120 times per step."""
    device = torch.device(device)
    names = {choose_encoder(shape, config.encoder) for shape in dataset.shapes.values()}
    if config.encoder not in ("auto", *names):
        raise data.DataError(f"--encoder {config.encoder} is for pictures and spectrograms; here are sequences alone, "
                             "which dr.ENCODERS['transformer'] takes")  # fmt: skip
    # small encoders gain nothing from more threads, which wait for each other, and change the last digits
    torch.set_num_threads(ALL_THREADS if names & {"resnet18", "vit"} else 1)
    kind = BottleneckModel if config.fusion == "mbt" else MultimodalModel
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if config.precision == "bf16" or (config.precision == "auto" and fast):
        kind = type("ModelInBf16", (InBf16, kind), {})
    model = kind(dataset.shapes, len(dataset.classes), config.encoder, config.fusion)
    if config.method == "inforeg":
        model.register_buffer("traces", torch.zeros(config.epochs, len(dataset.shapes)))
    return model.to(device, memory_format=data.memory_format(device))


def remaining_epochs(run):
    """Yield the epochs that are left to train. Before one, if the last is half a minute old, a checkpoint is written;
    on a CPU a resumed run ends bit for bit as if it had not been stopped."""
    is_done(run.config)  # refuses the folder of another run
    resume(run)
    if is_main():
        start_run(run)
    saved = time.monotonic()
    for epoch in range(len(run.history), run.config.epochs):
        run.epoch_began = time.monotonic()
        if is_main() and run.epoch_began - saved >= CHECKPOINT_SECONDS:
            states = {"model": run.model.state_dict(), "optimiser": run.optimiser.state_dict()}
            save(run.config, "last.pt", history=run.history, best=run.best_weights, **states)
            saved = time.monotonic()
        yield epoch


def training_batches(run, epoch):
    """The training set in batches, in an order drawn from seed and epoch; of several processes each gets its share."""
    config = run.config
    rank, world = ranks()
    # dropout and the methods' own draws begin anew, so that a resumed run repeats them
    torch.manual_seed(config.seed + 1000 * epoch + 1000_000 * rank)
    split = run.dataset.train
    order = (config.seed, epoch)
    batches = data.batches(split, config.batch_size, order, run.model.device, config.augment, (rank, world))
    steps = math.ceil(len(split) / config.batch_size)
    return tqdm(batches, f"epoch {epoch}", steps, leave=False, ncols=78, disable=rank > 0 or None)


def evaluate_epoch(run, entry):
    """Add accuracy and macro F1 on validation and test to an epoch's entry, and keep the weights if they are the best
    on validation so far. Raises FloatingPointError if training has diverged."""
    config = run.config
    if dist.is_initialized():
        means = average(torch.tensor([entry["loss"], entry["train"]], device=run.model.device))
        entry["loss"], entry["train"] = means.tolist()
    if not math.isfinite(entry["loss"]):
        raise FloatingPointError(f"the loss is {entry['loss']} in epoch {entry['epoch']}: try a smaller --lr")
    torch.manual_seed(1000 * (config.seed + 1) + entry["epoch"])  # what re-learning draws is alike on all processes
    if not is_main():
        return
    for name, split in ("val", run.dataset.val), ("test", run.dataset.test):
        entry[name], entry[f"{name}_f1"] = evaluate(run.model, split).values()
    if config.track_purity:
        x, y = extract_features(run.model, run.dataset.test)
        with threadpool_limits(1):
            entry["test_purity"] = {m: purity(x[m], y, len(run.dataset.classes), config.n_init) for m in x}
    if all(entry["val"] > e["val"] for e in run.history):
        run.best_weights = copy.deepcopy(run.model.state_dict())


def diagnose_run(run):
    """`diagnose` a run on the main process -> {modality: {"P_train", "P_val", "gap", "floor"}}, for all processes."""
    dataset = run.dataset
    measure = partial(with_floor, MEASURES.get(run.config.method, purity_gap))
    box = [None]
    if is_main():
        with threadpool_limits(1):  # k-means' threads wait for each other, ten times as long, where others work, too
            box = [diagnose(run.model, dataset.train, dataset.val, len(dataset.classes), run.config.n_init, measure)]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def ranks():
    """(which, of how many) processes this is: (0, 1) but under torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main():
    return ranks()[0] == 0


def average(tensor):
    """The mean over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def average_gradients(model):
    """The mean of all processes' gradients, in one message. Each has weighed the modalities on its own share."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in trained(model)]
    message = average(torch.cat([g.flatten() for g in gradients]))
    for g, mean in zip(gradients, message.split([g.numel() for g in gradients])):
        g.copy_(mean.view_as(g))


@torch.no_grad()
def predict(model, split, batch_size=128):
    """Logits (N, C) and labels (N,) of a whole split, in eval mode, as arrays. Raises FloatingPointError."""
    model.eval()
    batches = [(model(inputs), y) for inputs, y in data.batches(split, batch_size, device=model.device)]
    logits, labels = [torch.cat(part).cpu().numpy() for part in zip(*batches)]
    if not np.isfinite(logits).all():
        raise FloatingPointError("the logits are not finite, training has diverged: try a smaller --lr")
    return logits, labels


def metrics(scores, labels):
    """Accuracy and macro F1, in per cent, where the largest of the scores (N, C) is the prediction."""
    predicted = scores.argmax(1)
    f1 = f1_score(labels, predicted, average="macro", zero_division=0)
    return {"accuracy": 100 * float((predicted == labels).mean()), "macro F1": 100 * float(f1)}


def evaluate(model, split):
    """`metrics` of a whole split."""
    return metrics(*predict(model, split))


def save(config, name, **content):
    """Write a checkpoint into the run's folder, atomically."""
    buffer = io.BytesIO()  # into a file torch.save does not say when the disk is full
    torch.save({"config": config.stored(), **content}, buffer)
    data.write_atomically(config.folder / name, lambda file: file.write(buffer.getbuffer()))


def read_checkpoint(path):
    """A checkpoint's content, on the CPU; raises DataError, or OSError if it cannot be opened."""
    with open(path, "rb") as file, data.explained(f"{path} is no checkpoint of this dr.py, or it is damaged"):
        return torch.load(file, map_location="cpu", weights_only=True)


def resume(run):
    """Take up the unfinished run of this config, if there is one."""
    path = run.config.folder / "last.pt"
    if path.exists():
        content = read_checkpoint(path)
        with data.explained(f"{path} cannot be resumed: delete it"):
            run.model.load_state_dict(content["model"])
            run.optimiser.load_state_dict(content["optimiser"])
            run.history = content["history"]
            run.best_weights = content["best"]
            run.relearnings = sum(entry.get("relearnt", False) for entry in run.history)


def load_run(path, **changes):
    """A run's best.pt -> its model, dataset and config; `changes` replace what has moved, such as data, device."""
    content = read_checkpoint(path)
    with data.explained(f"{path} is no checkpoint of this dr.py (does your own file register a method?), or damaged"):
        settings = content["config"] | changes
        manifest = settings.pop("manifest")
        config = Config(**settings)
    dataset = load_dataset(config)
    model = make_model(config, dataset, set_up(config))
    with data.explained(f"{path} is not of a run on the {config.dataset} that is in {config.data}"):
        if config.stored()["manifest"] != manifest:
            raise ValueError("another manifest")
        model.load_state_dict(content["model"])
    return model, dataset, config


# ---- 9  What a run shows and leaves behind ------------------------------------------------------------------------
def never_relearns(config):
    """A line, if this D&R ends before its first diagnosis, and so is joint training; else ""."""
    if config.method not in RELEARNING or config.every < config.epochs:
        return ""
    return f"--every {config.every} comes to no diagnosis in {config.epochs} epochs: nothing will be re-learnt"


def start_run(run):
    """Write the run's config, and say what is about to be trained."""
    config = run.config
    dataset = run.dataset
    (config.folder / "summary.json").unlink(missing_ok=True)  # only a finished run has one
    data.write_json(config.folder / "config.json", config.stored())
    sizes = " / ".join(f"{len(split):,}" for split in (dataset.train, dataset.val, dataset.test))
    print(f"{config.name}: {sizes} clips for training / validation / test, {len(dataset.classes)} classes")
    for m, encoder in run.model.encoders.items():
        count = sum(p.numel() for p in encoder.parameters())
        print(f"  {m:<8} {dataset.shapes[m]} -> {encoder.width} features, {count:,} weights")
    if len(dataset.val) < 10 * len(dataset.classes):
        print("  fewer than ten validation clips per class: the gaps will be mostly luck")
    if never_relearns(config):
        print(f"  {never_relearns(config)}")
    if run.history:
        print(f"  resumes with epoch {len(run.history)}")


EPOCH = "epoch {epoch:3d}  loss {loss:.3f}  train {train:5.1f} %  val {val:5.1f} %  test {test:5.1f} %  {seconds:.1f} s"
COLUMNS = {"P_train": "purity train", "P_val": "purity val"}
SUMMARY = """
{name}, on the test set                         accuracy    macro F1
  at the best validation epoch, {best_val[epoch]:<3}       {best_val[test]:14.1f} % {best_val[test_f1]:9.1f} %
  at the last epoch, {last[epoch]:<3}                  {last[test]:14.1f} % {last[test_f1]:9.1f} %
  as the official code reports it: best test epoch, {best_test[epoch]}: {best_test[test]:.1f} %
{seconds:.0f} s; config, log, weights and curves are in {config.folder}/
"""


def end_epoch(run, entry):
    """Add an epoch to the history; write log.jsonl, and a line on the screen; after a diagnosis, a table."""
    entry["seconds"] = time.monotonic() - run.epoch_began
    run.history.append(json.loads(json.dumps(entry, default=float)))  # numbers of NumPy's could not be resumed
    if not is_main():
        return
    (run.config.folder / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in run.history))
    print(EPOCH.format(**entry), flush=True)
    if "diagnosis" in entry:
        title = f"re-learning {run.relearnings} of {run.config.times}" if entry["relearnt"] else "diagnosis only"
        table = pd.DataFrame(entry["diagnosis"]).T.rename(columns=COLUMNS)
        print(f"\n  {title}\n{table.to_string(float_format='{:.3f}'.format, col_space=12)}\n", flush=True)
        if (table["gap"] < table["floor"]).all():
            print("  every gap is below its floor: little is learnt yet, or validation is too small to tell\n")


def finish(run):
    """Leave what a finished run leaves. What it was run for is written before anything that may fail."""
    if not is_main():
        return
    config = run.config
    history = run.history
    best = max(history, key=lambda entry: entry["val"])  # the first of the best
    run.model.load_state_dict(run.best_weights)
    save(config, "best.pt", epoch=best["epoch"], model=run.model.state_dict())
    logits, labels = predict(run.model, run.dataset.test)
    np.savez(config.folder / "test.npz", logits=logits, labels=labels)
    relearnt = pd.json_normalize([entry for entry in history if entry.get("relearnt")])
    strengths = {m: relearnt[f"diagnosis.{m}.strength"].mean() for m in run.dataset.shapes if len(relearnt)}
    summary = {
        "name": config.name,
        "accuracy": best["test"],
        "macro F1": best["test_f1"],
        "strength": strengths,  # means over the re-learnings
        "seconds": sum(entry["seconds"] for entry in history),
        "seconds per epoch": float(np.mean([entry["seconds"] for entry in history])),
        "best_val": best,
        "last": history[-1],
        "best_test": max(history, key=lambda entry: entry["test"]),
    }
    data.write_json(config.folder / "summary.json", summary)
    print(SUMMARY.format(config=config, **summary))
    known = {"probe": attempt(probe, run.model, run.dataset.train, run.dataset.test)}
    if len(run.dataset.shapes) > 1 and hasattr(run.model.fusion, "parts"):
        known["contribution"] = attempt(contributions, run.model, run.dataset.test)
    data.write_json(config.folder / "summary.json", summary | known)
    (config.folder / "last.pt").unlink(missing_ok=True)  # only an unfinished run has one
    table = pd.DataFrame(known).rename(columns={"probe": "linear probe, %"})
    print(table.to_string(float_format="{:.2f}".format, col_space=16))
    attempt(draw_curves, history, config.folder / "curves.png", config.name)


def attempt(work, *args):
    """work(*args), or {} and a line that says why not: what comes after a run costs nothing that is written."""
    try:
        return work(*args)
    except Exception as error:
        print(f"  {work.__name__} failed, everything else is there ({type(error).__name__}: {error})")
        return {}


def probe(model, train, test):
    """Test accuracy in per cent of a linear classifier on each encoder's frozen features (paper, Fig. 1b and 1c)."""
    x_train, y_train = extract_features(model, train)
    x_test, y_test = extract_features(model, test)
    linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    with threadpool_limits(1):
        return {m: 100 * linear.fit(x_train[m], y_train).score(x_test[m], y_test) for m in x_train}


@torch.no_grad()
def contributions(model, split):
    """What each modality contributes to the right answers, per clip -> {modality: phi}; they sum to M * accuracy.
    Shapley values (Wei et al., CVPR 2024) of v(C) = |C| where the modalities C alone give the right class, the others'
    features being zeros, else 0: what a modality adds to v, as a mean over all orders in which they may come."""
    features, labels = extract_features(model, split)
    M = len(features)
    v = {frozenset(): 0.0}
    shapley = dict.fromkeys(features, 0.0)
    for size in range(1, M + 1):
        for C in map(frozenset, itertools.combinations(features, size)):
            kept = {m: torch.tensor(x * (m in C), device=model.device) for m, x in features.items()}
            v[C] = size * float((model.fusion(kept).argmax(1).cpu().numpy() == labels).mean())
            for m in C:  # of M * comb(M - 1, size - 1) orders, one has m right behind the others of C
                shapley[m] += (v[C] - v[C - {m}]) / (M * math.comb(M - 1, size - 1))
    return shapley


COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito's
MARKERS = "os^Dv<"
styled = matplotlib.rc_context({
    "text.parse_math": False,  # names that others gave are no mathematics
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
    "savefig.dpi": 150,
})  # fmt: skip
COMMAND = {"x": 0.01, "ha": "left", "wrap": True, "family": "monospace", "fontsize": 7, "color": "0.35"}


@styled
def draw_curves(history, path, title):
    """Accuracy, purity gap, re-learning strength and, if tracked, test purity over the epochs (paper, Fig. 4)."""
    log = pd.json_normalize(history).set_index("epoch")  # columns such as diagnosis.audio.gap
    relearnt = log[[entry.get("relearnt", False) for entry in history]]
    drawn = {
        "accuracy in %": log[["train", "val", "test"]],
        "purity gap g": log.filter(regex="gap$").dropna(),
        "strength a": relearnt.filter(regex="strength$"),
        "test purity P": log.filter(regex="^test_purity"),
    }
    drawn = {label: values for label, values in drawn.items() if values.size}
    figure = Figure((7, 1 + 2 * len(drawn)))  # without pyplot, which may want a screen, or a notebook
    axes = figure.subplots(len(drawn), sharex=True, squeeze=False)[:, 0]
    axes[0].set_prop_cycle(color=["0.6", COLOURS[2], "black"])  # no modality's
    for axis, (label, values) in zip(axes, drawn.items()):
        names = values.columns.str.replace(r"^(diagnosis|test_purity)\.|\.(gap|strength)$", "", regex=True)
        axis.plot(values, ".-", label=list(names))
        axis.set(ylabel=label, ylim=(0, None))
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        axis.vlines(relearnt.index, 0, 1, color="0.85", zorder=0, transform=axis.get_xaxis_transform())
    axes[0].set_title(title)
    axes[-1].set_xlabel("epoch; grey lines: re-learning")
    figure.savefig(path)


@styled
def draw_tsne(path, **changes):
    """t-SNE of each encoder's features of the test set, coloured by class (paper, Fig. 3) -> tsne.png beside it."""
    model, dataset, _ = load_run(path, **changes)
    features, labels = extract_features(model, dataset.test)
    figure = Figure((3.4 * len(features) + 1.2, 3.5))
    axes = figure.subplots(1, len(features), squeeze=False)[0]
    for axis, (m, x) in zip(axes, features.items()):
        plane = TSNE(perplexity=max(1, min(30, len(x) // 4)), init="pca", random_state=0)
        with threadpool_limits(1):  # several threads have waited for each other two hundred times as long
            x2 = plane.fit_transform(StandardScaler().fit_transform(x))  # (N, 2)
            pure = purity(x, labels, len(dataset.classes))
        for c, name in enumerate(dataset.classes):  # a label that begins with _ would be hidden
            axis.plot(*x2[labels == c].T, MARKERS[c % 6], color=COLOURS[c % 7], markersize=3, label=f" {name}")
        axis.set_title(f"{m}, purity {pure:.2f}", loc="left")
        axis.set_axis_off()
    if len(dataset.classes) <= 10:
        axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.supxlabel(f"python dr.py --tsne {path}", **COMMAND)
    picture = Path(path).parent / "tsne.png"
    figure.savefig(picture)
    return picture


# ---- 10  Sweeps: a grid of runs, averaged over seeds --------------------------------------------------------------
def expand(words, base):
    """A grid such as ["method=joint,dr", "seed=0,1"] over the flags `base` -> its fields, and its configs."""
    grid = {}
    for word in words:
        key, _, values = word.partition("=")
        key = key.replace("-", "_")
        if key in grid:
            raise ValueError(f"--sweep takes every field once; {key} is there twice")
        try:
            kind = KINDS[key][0]
            if kind is bool:
                kind = {"true": True, "false": False}.__getitem__
            grid[key] = [kind(value) for value in values.split(",")]
        except (ValueError, KeyError):
            raise ValueError(f"--sweep takes words such as method=joint,dr or lam=1,2.5, not {word!r}") from None
    return list(grid), [Config(**base | dict(zip(grid, values))) for values in itertools.product(*grid.values())]


TABLES = (METHODS, RELEARNING, MEASURES, ENCODERS, FUSIONS)  # to which a file of the user's own may add


def train_quietly(settings, tables, parent):
    """Train one run of a sweep, what it prints going to output.txt in its folder -> [] or [why it failed].
    `tables` are the TABLES of the process `parent`, whose end is this one's, too."""
    if os.getpid() != parent:
        threading.Thread(target=end_with, args=[parent], daemon=True).start()
    for table, entries in zip(TABLES, tables):
        table.update(entries)
    config = Config(**settings)
    config.folder.mkdir(parents=True, exist_ok=True)
    with open(config.folder / "output.txt", "a", encoding="utf-8") as output, contextlib.redirect_stdout(output):
        try:
            if not is_done(config):  # by another sweep, meanwhile
                train(config)
        except Exception as error:
            traceback.print_exc(file=output)
            return [f"{config.name}: {error}"]
    return []


def end_with(parent):
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def run_all(configs, jobs=None):
    """Train what is not done yet, a process per GPU or core, or `jobs` of them -> what failed, or ""."""
    gpus = torch.cuda.device_count() if configs[0].device in ("auto", "cuda") else 0
    cores = data.cpu_count()
    jobs = jobs or gpus or (1 if torch.accelerator.is_available() and configs[0].device != "cpu" else cores)
    todo = [asdict(c) for c in configs if not is_done(c)]
    if len(todo) < len(configs):
        print(f"{len(configs) - len(todo)} of {len(configs)} runs are there already; to train them anew, delete them")
    for k, settings in enumerate(todo if gpus else []):
        settings["device"] = f"cuda:{k % gpus}"
    failures = []
    try:
        with joblib.parallel_config("loky", inner_max_num_threads=max(1, cores // jobs)):
            side_by_side = joblib.Parallel(jobs, return_as="generator_unordered")
            finished = side_by_side(joblib.delayed(train_quietly)(c, TABLES, os.getpid()) for c in todo)
            for failure in tqdm(finished, f"{len(configs)} runs", len(todo), unit="run", disable=None, ncols=78):
                failures += failure
    except BrokenExecutor:
        failures = ["the system killed a run, for want of memory as a rule; try a smaller --jobs"]
    finally:  # after Ctrl-C, too, nothing trains on
        joblib.externals.loky.get_reusable_executor().shutdown(kill_workers=True)
    if not failures:
        return ""
    return "\n  ".join([f"{len(failures)} of {len(configs)} runs failed; the same command tries them again", *failures])


def sweep(words, base, jobs=None, name=""):
    """Run the grid that `words` span over `base`, all flags of Config, and report it -> a DataFrame, a row a run."""
    names, configs = expand(words, base)
    if len({c.folder for c in configs}) < len(configs):
        raise data.DataError("this sweep would write two of its runs into the same folder")
    one_of_each = {c.dataset: Config(dataset=c.dataset, data=c.data) for c in configs}
    shapes = {name: load_dataset(c).shapes for name, c in one_of_each.items()}
    reasons = [why_undefined(c, c.modalities or "+".join(shapes[c.dataset])) for c in configs]
    if any(reasons):
        whys = "; ".join(dict.fromkeys(filter(None, reasons)))
        print(f"{sum(map(bool, reasons))} of {len(configs)} runs are left out: {whys}")
    configs = [c for c, reason in zip(configs, reasons) if not reason]
    if not configs:
        raise data.DataError("no method of this sweep is defined for its modalities and its fusion")
    for line in {never_relearns(c) for c in configs} - {""}:
        print(line)
    failed = run_all(configs, jobs)
    configs = [c for c in configs if is_done(c)]
    if not configs:
        raise data.DataError(failed)
    rows = []
    for c in configs:
        rows.append(asdict(c) | {"modalities": c.modalities or "all"})
        rows[-1] |= json.loads((c.folder / "summary.json").read_text())
    runs = pd.json_normalize(rows + ensembles(configs), sep=" ").rename(columns={"best_val val": "accuracy on val"})
    names = [name for name in names if name != "seed"] or ["method"]
    runs.insert(0, "setting", runs[names].astype(str).agg(", ".join, axis=1))
    found = sorted(runs.filter(regex="^(accuracy|macro|probe|contribution|strength|seconds per)"))
    table = tabulate(runs, names, found)
    stem = Path(base["out"]) / (name or shorten("-".join(["sweep", Config(**base).name, *words])).replace("/", "_"))
    stem.parent.mkdir(parents=True, exist_ok=True)
    command = "python " + shlex.join(sys.argv)
    note = "± standard deviation over seeds; vs: paired over seeds, ± half its 95 % interval"
    text = f"    {command}\n\n{table.to_markdown(disable_numparse=True)}\n\n{note}\n"
    Path(f"{stem}.md").write_text(text, encoding="utf-8")
    runs[[*names, "seed", *found]].to_csv(f"{stem}.csv", index=False)
    print(f"\n{table.to_string(line_width=80)}\n\n{note}\n{stem}.md, .csv and .png")
    attempt(draw_sweep, runs, f"{stem}.png", command)
    if failed:
        raise data.DataError(failed)
    return runs


def ensembles(configs):
    """A row for runs of one modality each that are alike but for that: their log-probabilities, summed."""
    groups = {}
    for c in configs:
        if c.modalities and "+" not in c.modalities:
            groups.setdefault(run_name(replace(c, modalities="")), []).append(c)
    rows = []
    for group in groups.values():
        if len(group) == 1:
            continue
        tests = [np.load(c.folder / "test.npz") for c in group]
        scores = sum(special.log_softmax(test["logits"], 1) for test in tests)
        title = "ensemble of " + " and ".join(c.modalities for c in group)
        rows.append(asdict(group[0]) | metrics(scores, tests[0]["labels"]) | {"modalities": title})
    return rows


def tabulate(runs, names, found):
    """The columns `found` as text, a row per setting. The differences in accuracy are to the first method with all else
    alike, or to the first setting, and paired over seeds."""
    first = "method" if "method" in names else "setting"
    alike = ["seed", *(name for name in names if first == "method" and name != "method")]
    others = runs[first] != runs[first][0]
    versus = f"vs {runs[first][0]}"
    reference = runs["accuracy"].mask(others).groupby([runs[name] for name in alike]).transform("first")
    runs[versus] = (runs["accuracy"] - reference).where(others)
    groups = runs.groupby("setting", sort=False)
    return groups[["accuracy", versus, *found[1:]]].agg(plus_minus).rename_axis(None)


def plus_minus(values):
    """A column over seeds, as text: mean ± standard deviation; of differences, half of Student's 95 % interval."""
    values = values.dropna()
    if values.empty:
        return ""
    style = ".2f" if values.name.startswith(("contribution", "seconds", "strength")) else ".1f"
    sign = ""
    spread = values.std()
    if values.name.startswith("vs "):
        sign = "+"
        spread = values.sem() * stats.t.ppf(0.975, len(values) - 1)
    mean = f"{values.mean():{sign}{style}}"
    return f"{mean} ± {spread:{style}}" if len(values) > 1 else mean


@styled
def draw_sweep(runs, path, command):
    """A panel per metric: a bar with one standard deviation per setting, and a dot per run."""
    found = sorted(runs.filter(regex="^(accuracy$|probe|contribution|strength)"))
    figure = Figure((3 * len(found) + 1, 1.4 + 0.26 * runs["setting"].nunique()))
    axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axis, column in zip(axes, found):
        values = runs.groupby("setting", sort=False)[column]
        axis.barh(list(values.groups), values.mean(), xerr=values.std(), color=COLOURS[5])
        axis.plot(runs[column], runs["setting"], ".", color="black", markersize=3)
        axis.set_title(column)
    axes[0].invert_yaxis()  # the first row on top
    figure.supxlabel(command, **COMMAND)
    figure.savefig(path)


# ---- 11  Command line ---------------------------------------------------------------------------------------------
def parse(arguments=None):
    """The command line -> (the fields of Config, all that was given); ends the program on what is wrong."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage="python dr.py [--flag value ...]", description=__doc__, formatter_class=raw)
    about = METHODS | RELEARNING | MEASURES  # the last of them says what is special
    about = {name: (function.__doc__ or "your own").splitlines()[0] for name, function in about.items()}
    about["multitask+dr"] = "multitask, diagnosed and re-learnt as D&R is."
    methods = [f"  {name:<13} {words}" for name, words in about.items()]
    presets = pd.DataFrame(PRESETS).T.to_string()
    parser.epilog = "\n".join(["methods:", *methods, "", "presets (other datasets have cremad's):", presets])
    for f in fields(Config):
        kind, words = KINDS[f.name]
        default = "preset" if f.default is None else f.default
        words = f"{words} ({default})" if default else words
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind, "metavar": ""}
        parser.add_argument("--" + f.name.replace("_", "-"), help=words, default=f.default, **how)
    parser.add_argument("--sweep", nargs="+", default=[], metavar="FIELD=A,B", help="run a grid, average it over seeds")
    parser.add_argument("--jobs", type=int, metavar="", help="runs of a sweep side by side (one per GPU or CPU core)")
    parser.add_argument("--evaluate", metavar="BEST.PT", help="test this run; it takes --data and --device, too")
    parser.add_argument("--tsne", metavar="BEST.PT", help="draw the test features of this run; likewise")
    given = parser.parse_args(arguments)
    settings = {name: getattr(given, name) for name in KINDS}
    usual = vars(parser.parse_args([]))
    ignored = [name for name in KINDS if settings[name] != usual[name] and name not in ("data", "device")]
    try:
        expand(given.sweep, settings)
        if (given.evaluate or given.tsne) and ignored:
            raise ValueError(f"--evaluate and --tsne take a run as it was set, and so no {', '.join(ignored)}")
        if sum(map(bool, (given.evaluate, given.tsne, given.sweep))) > 1:
            raise ValueError("--evaluate, --tsne and --sweep are three things to do: one at a time")
        if given.sweep and "RANK" in os.environ:
            raise ValueError("--sweep starts processes of its own, one per GPU: run it without torchrun")
    except (ValueError, data.DataError) as error:
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
    import dr  # by this name, not as __main__, other processes find what they are to run

    dr.main()
