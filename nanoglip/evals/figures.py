"""Pictures of a run: its curves, every mask on its pictures, what the model takes them for.

Art that may not be published is left out. Written by evaluate.py.
"""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nanoglip import files, masks
from nanoglip.evals.metrics import ranks
from nanoglip.masks import Masker
from nanoglip.noise import uniform
from nanoglip.sources.pictures import HeldOut

GOOD, OTHER, BAD = "#0072b2", "#d55e00", "#999999"  # readable without telling red from green


def figure(height: float, width: float, **room: float) -> object:
    """An empty matplotlib figure, in inches; `room`: margins, where text stands between cells."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), layout="none" if room else "constrained", dpi=110)
    if room:
        fig.subplots_adjust(left=0.01, right=0.99, **room)
    return fig


def save(fig: object, path: Path) -> None:
    """Write a figure as PNG; a "$" in a caption or a file's name is a dollar, and no formula."""
    from matplotlib.text import Text

    for text in fig.findobj(Text):
        text.set_parse_math(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the font lacks some letters
        files.write_safely(path, lambda file: fig.savefig(file, format="png"))


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
    for axes, place in ((left, "lower left"), (right, "lower right")):
        axes.legend(fontsize=7, loc=place)
        axes.spines[["top", "right"]].set_visible(False)
    return fig


def draw_masks(
    pairs: HeldOut, picks: np.ndarray, encoder: object, own: Masker
) -> object:
    """Every mask of the registry on the same pictures, and how often it keeps each patch.

    All with the ratio of `own`, the run's; where a mask needs a teacher, it is the run's, or else
    the run's own image tower.
    """
    tower, grid = encoder.model.visual, encoder.model.config.grid
    p, n = encoder.model.config.patch_size, grid[0] * grid[1]
    ratio = own.mask_ratio or 0.75
    many = pairs.render(np.arange(len(pairs.concept))[:2000]).to(encoder.device)
    noise = torch.from_numpy(uniform(0, "gallery", 0, len(many), n)).to(encoder.device)
    fig = figure(1.1 * (len(picks) + 1.5), 1.1 * len(masks.MASKS) + 0.4)
    axes = fig.subplots(len(picks) + 1, len(masks.MASKS), squeeze=False)
    columns = list(zip(axes.T, masks.MASKS, strict=True))
    for column, mask in tqdm(columns, "masks", leave=False, disable=None):
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


def draw_top5(pairs: HeldOut, images: Tensor, texts: Tensor, picks: np.ndarray) -> object:
    """Held-out pictures with the five captions the model finds likeliest, the right one in blue.

    Where it is not among the five, it stands below them with its rank.
    """
    columns, rows = 6, -(-len(picks) // 6)
    fig = figure(2.4 * rows, 1.75 * columns, top=0.99, bottom=0.55 / rows, hspace=0.9)
    for cell in fig.subplots(rows, columns, squeeze=False).flat:
        cell.axis("off")
    for cell, i in zip(fig.axes, picks, strict=False):
        show(cell, pairs.render(np.array([i]))[0])
        scores, wanted = images[i] @ texts.T, int(pairs.concept[i])
        found = scores.topk(min(5, len(texts))).indices.tolist()
        rank = 1 + int(ranks(scores[None], (torch.arange(len(texts)) == wanted)[None]))
        lines = [shorten(pairs.captions[j], 27) for j in found]
        if wanted not in found:
            lines.append(f"{rank:,}. {shorten(pairs.captions[wanted], 22)}")
        for line, (j, text) in enumerate(zip([*found, wanted], lines)):
            right = j == wanted
            cell.text(
                0.5, -0.05 - 0.13 * line, text, fontsize=6.5, va="top",
                ha="center", transform=cell.transAxes, color=GOOD if right else "#555555",
                fontweight="bold" if right else "normal",
            )  # fmt: skip
    return fig


def draw_retrieval(
    pairs: HeldOut, images: Tensor, texts: Tensor, picks: np.ndarray
) -> object:
    """Captions and the pictures found for them, best first, the right ones framed.

    Where none is right, the caption is followed by the best right one's rank.
    """
    columns = 8
    fig = figure(1.3 * len(picks), 1.1 * columns, top=0.97, bottom=0.01, hspace=0.3)
    axes = fig.subplots(len(picks), columns, squeeze=False)
    for row, i in zip(axes, picks, strict=True):
        caption = pairs.concept[i]
        scores, wanted = images @ texts[caption], torch.from_numpy(pairs.concept == caption)
        found = scores.topk(min(columns, len(images))).indices.numpy()
        for cell in row:
            cell.set_axis_off()
        for cell, j in zip(row, found, strict=False):
            cell.set_axis_on()
            show(cell, pairs.render(np.array([j]))[0])
            right = pairs.concept[j] == caption
            for side in cell.spines.values():
                side.set(color=GOOD if right else "#dddddd", linewidth=3 if right else 1)
        told = shorten(pairs.captions[caption], 90)
        if not wanted[found].any():
            told += f"   (right: rank {1 + int(ranks(scores[None], wanted[None])):,})"
        row[0].text(0, 1.06, told, transform=row[0].transAxes, fontsize=8)
    return fig


def shorten(text: str, length: int) -> str:
    """A text of at most `length` characters."""
    return text if len(text) <= length else text[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"


def draw_all(
    run: Path, config: dict, features: tuple[Tensor, Tensor] | None, test: HeldOut,
    before: object, before_test: HeldOut, masker: Masker,
) -> list[str]:  # fmt: skip
    """Write the run's PNGs; art that may not be published is left out. Returns their names.

    `features` are the final model's of the pairs `test`; `before` was trained under `masker`.
    """
    figures = {"loss.png": draw_curves(run)} if (run / "log.jsonl").is_file() else {}
    art = before_test.free_art()
    if len(art.concept):
        picks = np.random.default_rng(3).permutation(min(2000, len(art.concept)))[:5]
        figures["masks.png"] = draw_masks(art, picks, before, masker)
    if len(test.concept) and test.publishable:
        sample = np.random.default_rng(1).permutation(len(test.concept))
        figures["top5.png"] = draw_top5(test, *features, sample[:18])
        figures["retrieval.png"] = draw_retrieval(test, *features, sample[-8:])
    for name, fig in figures.items():
        save(fig, run / name)
    return list(figures)
