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

A run leaves config.json, log.jsonl, summary.json, best.pt and curves.png in
runs/<name>/.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torchvision.models.resnet import BasicBlock
from tqdm import tqdm

import data

# ---------------------------------------------------------------------------------------------------
# 1  Encoders: one per modality, each from its input to features (B, D)
# ---------------------------------------------------------------------------------------------------


class Convolutional(nn.Module):
    """A 2-D network on spectrograms (B, 1, F, T) or on frame stacks (B, T, C, H, W), averaged over time."""

    def __init__(self, network, width):
        super().__init__()
        self.network, self.width = network, width

    def forward(self, x):
        if x.dim() == 4:
            return self.network(x)  # (B, D)
        B, T = x.shape[:2]
        return self.network(x.flatten(0, 1)).view(B, T, -1).mean(1)  # (B*T, C, H, W) -> (B*T, D) -> (B, D)


def resnet18(shape):
    """torchvision's ResNet-18 from scratch, for any number of channels; 512 features, as in the paper."""
    network = torchvision.models.resnet18(weights=None)
    network.conv1 = nn.Conv2d(shape[-3], 64, kernel_size=7, stride=2, padding=3, bias=False)
    network.fc = nn.Identity()  # what comes out is averaged over space
    return Convolutional(network, 512)


def small_resnet(shape, widths=(16, 32, 64, 128)):
    """A narrow ResNet for small pictures and spectrograms, such as the demo's; 128 features."""
    layers = [nn.Conv2d(shape[-3], widths[0], 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    for before, after in zip(widths, widths[1:]):
        shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride=2, bias=False), nn.BatchNorm2d(after))
        layers.append(BasicBlock(before, after, stride=2, downsample=shortcut))
    return Convolutional(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), widths[-1])


class SequenceTransformer(nn.Module):
    """A small transformer on feature sequences (B, T, D) whose padding is exactly 0; averaged over what is not."""

    def __init__(self, shape, width=64, layers=2):
        super().__init__()
        self.width = width
        self.embed = nn.Linear(shape[-1], width)
        self.position = nn.Parameter(0.02 * torch.randn(shape[0], width))
        layer = nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=4 * width, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, x):
        present = (x != 0).any(-1)  # (B, T)
        present[:, 0] |= ~present.any(1)  # nothing at all: look at the first step, so that there is a mean
        x = self.layers(self.embed(x) + self.position, src_key_padding_mask=~present)  # (B, T, width)
        return (x * present[..., None]).sum(1) / present.sum(1, keepdim=True)


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
        return self.fusion(self.features(inputs))


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


def purity(features, labels, n_clusters, n_init=10, seed=0):
    """How well k-means clusters of the features agree with the labels, from 1/C to 1: the paper's P.

        P = 1/N * sum over clusters of the size of the cluster's largest class

    features (N, D) and labels (N,), arrays or CPU tensors; labels may be any integers. As in the official code every
    feature is first scaled to [-1, 1] over this very set. Raises ValueError for fewer samples than clusters,
    for lengths that differ, and for features that are not finite.
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
    clusters = KMeans(n_clusters, n_init=n_init, random_state=seed).fit_predict(x)  # (N,) it never sees the labels
    classes, y = np.unique(y, return_inverse=True)
    count = np.zeros((n_clusters, len(classes)), dtype=int)
    np.add.at(count, (clusters, y), 1)  # count[k, c]: samples of class c in cluster k
    return float(count.max(1).sum() / len(y))


def purity_gap(train_features, train_labels, val_features, val_labels, n_clusters, n_init=10, seed=0):
    """An encoder's learning state, g = |P_train - P_val| -> (P_train, P_val, g).

    Large: well learnt, or over-trained. Small: under-trained, or with little to tell.
    """
    train = purity(train_features, train_labels, n_clusters, n_init, seed)
    val = purity(val_features, val_labels, n_clusters, n_init, seed)
    return train, val, abs(train - val)


@torch.no_grad()
def extract_features(model, split, batch_size=128, device="cpu"):
    """All features of a split, in eval mode and without augmentation -> ({modality: (N, D)}, labels (N,))."""
    model.eval()
    parts, labels = [], []
    for inputs, y in data.batches(split, batch_size, device=device):
        parts.append({m: f.float().cpu() for m, f in model.features(inputs).items()})
        labels.append(y.cpu())
    return {m: torch.cat([p[m] for p in parts]).numpy() for m in parts[0]}, torch.cat(labels).numpy()


def diagnose(model, train, val, n_clusters, n_init=10, batch_size=128, device="cpu"):
    """The purity gap of every modality -> {modality: (P_train, P_val, g)}; n_clusters is the number of classes."""
    train_features, train_labels = extract_features(model, train, batch_size, device)
    val_features, val_labels = extract_features(model, val, batch_size, device)
    return {
        m: purity_gap(train_features[m], train_labels, val_features[m], val_labels, n_clusters, n_init)
        for m in train_features
    }


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
    method: str = flag("dr", "dr: diagnose and re-learn; joint: diagnose only", ["dr", "joint"])
    modalities: str = flag("", "which, such as visual or audio,visual; all if not given")
    encoder: str = flag("auto", "of pictures and spectrograms; auto: by their size", ["auto", "resnet18", "small"])
    fusion: str = flag("concat", "how the features are joined", list(FUSIONS))
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
    seed: int = flag(0, "of the initial weights and of the order of batches")
    device: str = flag("auto", "cpu, cuda or mps; auto: the best there is")
    data: str = flag("prepared", "folder of the prepared datasets")
    out: str = flag("runs", "folder of the runs")
    name: str = flag("", "of the run; made of dataset, method and seed if not given")

    def __post_init__(self):
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{f.name} is one of {', '.join(choices)}, not {value!r}")
        for key, value in PRESETS[self.dataset].items():
            if getattr(self, key) is None:
                setattr(self, key, value)
        for key, least in dict(every=1, epochs=1, batch_size=1, n_init=1, times=0, lam=0).items():
            if getattr(self, key) < least:
                raise ValueError(f"{key} is {least} or more, not {getattr(self, key)}")
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"
        if not self.name:
            parts = [self.dataset, self.method, self.modalities.replace(",", "+"), str(self.seed)]
            self.name = "-".join(filter(None, parts))


@torch.no_grad()
def evaluate(model, split, batch_size=128, device="cpu"):
    """Accuracy and macro F1, in per cent, over a whole split."""
    model.eval()
    scores = [(model(inputs).argmax(1), y) for inputs, y in data.batches(split, batch_size, device=device)]
    predicted, labels = (torch.cat(part).cpu().numpy() for part in zip(*scores))
    f1 = f1_score(labels, predicted, average="macro", zero_division=0)
    return {"accuracy": 100 * accuracy_score(labels, predicted), "macro_f1": 100 * f1}


def probe(model, train, test, device="cpu"):
    """What each encoder knows by itself: test accuracy in per cent of a linear classifier on its frozen features
    (paper, Fig. 1b and 1c) -> {modality: accuracy}."""
    x_train, y_train = extract_features(model, train, device=device)
    x_test, y_test = extract_features(model, test, device=device)
    linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    return {m: 100 * linear.fit(x_train[m], y_train).score(x_test[m], y_test) for m in x_train}


def train_epoch(model, optimiser, split, config, epoch):
    """One pass over the training set -> (mean loss, accuracy in per cent)."""
    model.train()
    loss_sum, correct = torch.zeros((), device=config.device), torch.zeros((), device=config.device)
    shuffled = data.batches(split, config.batch_size, (config.seed, epoch), config.device, config.augment)
    steps = math.ceil(len(split) / config.batch_size)
    for inputs, labels in tqdm(shuffled, f"epoch {epoch}", steps, leave=False, disable=None, ncols=78, unit="step"):
        logits = model(inputs)
        loss = F.cross_entropy(logits, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        loss_sum += loss.detach() * len(labels)
        correct += (logits.argmax(1) == labels).sum()
    if not loss_sum.isfinite():
        raise FloatingPointError(f"the loss is {loss_sum.item()} in epoch {epoch}: try a smaller --lr")
    return loss_sum.item() / len(split), 100 * correct.item() / len(split)


def train(config):
    """Train one model -> its history, one dict per epoch, and files in <out>/<name>/.

    An entry holds epoch (from 0), loss, train, val and test accuracy in per cent, val_f1 and test_f1, seconds;
    after a diagnosed epoch also diagnosis {modality: {train, val, gap, strength}} and relearnt (true or false).
    """
    dataset = load_dataset(config)
    device, n_classes = config.device, len(dataset.classes)
    torch.manual_seed(config.seed)
    model = MultimodalModel(dataset.shapes, n_classes, config.encoder, config.fusion)
    model.to(device, memory_format=torch.channels_last)
    initial = {m: {k: v.clone() for k, v in e.state_dict().items()} for m, e in model.encoders.items()}  # theta_init
    optimiser = torch.optim.SGD(model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay)
    folder = start_run(config, model, dataset)

    history, best, relearnt = [], None, 0
    for epoch in range(config.epochs):
        start = time.perf_counter()
        loss, accuracy = train_epoch(model, optimiser, dataset.train, config, epoch)
        val, test = (evaluate(model, split, device=device) for split in (dataset.val, dataset.test))
        entry = {"epoch": epoch, "loss": loss, "train": accuracy, "val": val["accuracy"], "test": test["accuracy"],
                 "val_f1": val["macro_f1"], "test_f1": test["macro_f1"]}  # fmt: skip
        if best is None or entry["val"] > best["val"]:
            best = entry
            checkpoint = {"config": asdict(config), "epoch": epoch, "model": model.state_dict(), "initial": initial}
            data.write_whole(folder / "best.pt", lambda file, c=checkpoint: torch.save(c, file))

        if epoch % config.every == 0 and epoch > 0:
            gaps = diagnose(model, dataset.train, dataset.val, n_classes, config.n_init, device=device)
            entry["diagnosis"] = {
                m: {"train": p_train, "val": p_val, "gap": g, "strength": relearning_strength(g, config.lam)}
                for m, (p_train, p_val, g) in gaps.items()
            }
            entry["relearnt"] = config.method == "dr" and relearnt < config.times
            if entry["relearnt"]:
                relearnt += 1
                for m, diagnosis in entry["diagnosis"].items():
                    soft_reinit(model.encoders[m], initial[m], diagnosis["strength"])

        entry["seconds"] = time.perf_counter() - start
        history.append(entry)
        report_epoch(config, folder, entry, relearnt)

    model.load_state_dict(torch.load(folder / "best.pt", map_location=device, weights_only=True)["model"])
    report_run(config, folder, history, best, probe(model, dataset.train, dataset.test, device))
    return history


def load_dataset(config):
    """The prepared dataset of a config; the demo is made if it is not there."""
    if config.dataset == "demo" and not (Path(config.data) / "demo" / "manifest.json").exists():
        data.prepare("demo", out=config.data)
    dataset = data.load(config.dataset, config.data, [m for m in config.modalities.split(",") if m])
    if min(len(dataset.train), len(dataset.val)) < len(dataset.classes):
        raise data.DataError("a diagnosis takes at least as many training and validation clips as there are classes")
    return dataset


# ---------------------------------------------------------------------------------------------------
# 7  What a run shows and leaves behind
# ---------------------------------------------------------------------------------------------------


def start_run(config, model, dataset):
    """Make the run's folder, write its config, and say what is about to be trained."""
    folder = Path(config.out) / config.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
    (folder / "log.jsonl").write_text("")
    sizes = " / ".join(f"{len(s):,}" for s in (dataset.train, dataset.val, dataset.test))
    print(f"{config.name}: {sizes} clips for training / validation / test, {len(dataset.classes)} classes")
    for m, encoder in model.encoders.items():
        count = sum(p.numel() for p in encoder.parameters())
        print(f"  {m:<8} {'x'.join(map(str, dataset.shapes[m])):<14} -> {encoder.width} features, {count:,} weights")
    return folder


def report_epoch(config, folder, entry, relearnt):
    """A line of log.jsonl and one on the screen; after a diagnosis, a table."""
    with open(folder / "log.jsonl", "a") as file:
        file.write(json.dumps(entry) + "\n")
    accuracies = "   ".join(f"{split} {entry[split]:5.1f} %" for split in ("train", "val", "test"))
    print(f"epoch {entry['epoch']:3d}   loss {entry['loss']:.3f}   {accuracies}   {entry['seconds']:4.1f} s")
    if "diagnosis" not in entry:
        return
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
               "probe": probes, "seconds": sum(e["seconds"] for e in history)}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    draw_curves(history, folder / "curves.png", config.name)
    print(f"\n{config.name}, on the test set                     accuracy    macro F1")
    print(f"  at the best validation epoch, {best['epoch']:<3}         {best['test']:10.1f} % {best['test_f1']:9.1f} %")
    print(f"  at the last epoch, {last['epoch']:<3}                    {last['test']:10.1f} % {last['test_f1']:9.1f} %")
    print(f"  as the official code reports it: best test epoch, {lucky['epoch']}: {lucky['test']:.1f} %")
    for m, accuracy in probes.items():
        print(f"  linear probe on the frozen {m} encoder   {accuracy:10.1f} %")
    print(f"{summary['seconds']:.0f} s; config, log, weights and curves are in {folder}/")


def draw_curves(history, path, title):
    """Accuracy, purity gap and re-learning strength over the epochs (after the paper's Fig. 4)."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 1, figsize=(7, 7.5), sharex=True, height_ratios=(2, 1, 1), layout="constrained")
    for key, name, style in (("train", "training", "0.6"), ("val", "validation", "C2"), ("test", "test", "black")):
        axes[0].plot([e["epoch"] for e in history], [e[key] for e in history], color=style, label=name)
    diagnosed = [e for e in history if "diagnosis" in e]
    for axis, key, shown in (
        (axes[1], "gap", diagnosed),
        (axes[2], "strength", [e for e in diagnosed if e["relearnt"]]),
    ):
        for k, m in enumerate(shown[0]["diagnosis"] if shown else ()):
            values = [e["diagnosis"][m][key] for e in shown]
            colour, marker = f"C{(0, 1, 3, 4, 5)[k % 5]}", "os^Dv"[k % 5]
            axis.plot([e["epoch"] for e in shown], values, color=colour, marker=marker, label=m)
    axes[0].set(ylabel="accuracy in %", ylim=(0, 102), title=title)
    axes[1].set(ylabel="purity gap g", ylim=(0, None))
    axes[2].set(ylabel="strength a", ylim=(0, 1.05), xlabel="epoch; grey lines: re-learning")
    for axis in axes:
        for e in diagnosed:
            if e["relearnt"]:
                axis.axvline(e["epoch"], color="0.85", zorder=0)
        if axis.lines and axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------
# 8  Command line
# ---------------------------------------------------------------------------------------------------


def parse(arguments=None):
    """Flags to a Config: every field of Config is one."""
    parser = argparse.ArgumentParser(usage="python dr.py [--flag value ...]", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.epilog = "presets:\n" + "\n".join(
        f"  {name:<9}" + "  ".join(f"{k} {v}" for k, v in preset.items()) for name, preset in PRESETS.items()
    )
    for f in fields(Config):
        choices, default = f.metadata["choices"], "preset" if f.default is None else f.default
        text = f.metadata["help"] + (f": {', '.join(choices)}" if choices and f.name != "method" else "")
        text += "" if default is False or default == "" else f" ({default})"
        kind = dict(action="store_true") if f.type is bool else dict(type=f.type, default=f.default, metavar="")
        parser.add_argument("--" + f.name.replace("_", "-"), help=text, **kind)
    try:
        return Config(**vars(parser.parse_args(arguments)))
    except ValueError as error:
        parser.error(str(error))


def main():
    try:
        train(parse())
    except (data.DataError, FloatingPointError, OSError) as error:
        print(f"dr.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
