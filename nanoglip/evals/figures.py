"""Figures of a run: its curves, every mask on its pictures, the captions and pictures it finds.

Each `draw_*` returns a matplotlib figure; draw_all() writes those that may be published.
"""

import io
import json
import math
import warnings
from collections import defaultdict
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from glip import GLIP
from nanoglip import files, masks
from nanoglip.evals.metrics import ranks
from nanoglip.masker import Masker
from nanoglip.noise import uniform
from nanoglip.sources.pictures import HeldOut

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GOOD, OTHER, BAD = "#0072b2", "#d55e00", "#999999"  # readable without telling red from green

COLOURS = (GOOD, OTHER, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
PANELS = {  # title: names in log.jsonl
    "loss (dashed: of guessing)": ("loss", "ln_batch"),
    "held-out pictures, without a mask": (
        "zero-shot top-1", "zero-shot top-5", "image to text R@1", "image to text R@5",
        "text to image R@5",
    ),
    "published and own sets, without a mask": (),  # names with a "/"
    "learning rate": ("lr",),
    "logit_scale": ("logit_scale",),
    "share of patches": ("computed", "visible", "mask_ratio"),
    "pairs per second": ("pairs_per_second",),
    "share of time waiting for data": ("data_wait",),
}  # fmt: skip


def figure(height: float, width: float, **margins: float) -> "Figure":
    """An empty figure, in inches; its layout is automatic unless `margins` are given."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), layout="none" if margins else "constrained", dpi=110)
    if margins:
        fig.subplots_adjust(**{"left": 0.01, "right": 0.99, **margins})
    return fig


def to_png(fig: "Figure") -> bytes:
    """A figure as PNG; a "$" in a caption or a file's name is a dollar, not a formula."""
    from matplotlib.text import Text

    for text in fig.findobj(Text):
        text.set_parse_math(False)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the font lacks some letters
        fig.savefig(file, format="png")
    return file.getvalue()


def show(axes: object, image: Tensor) -> None:
    """Draw a picture (3, S, S) without ticks."""
    axes.imshow(image.permute(1, 2, 0).numpy())
    axes.set(xticks=[], yticks=[])


def shorten(text: str, length: int) -> str:
    """A text of at most `length` characters."""
    return text if len(text) <= length else text[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"


def draw_curves(run: Path, chance: bool = True) -> "Figure":
    """PANELS of a run's log.jsonl; under CLIP's loss (`chance`) guessing has a known loss."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    first = max((r["step"] for r in records if r["stage"] == "pretrain"), default=0)
    panels = defaultdict(dict)
    sets = sorted({name for r in records for name in r if "/" in name and name[-5:] != "/acc5"})
    for title, names in PANELS.items():
        for name in names or sets:
            line = [(r["step"] + first * (r["stage"] == "tune"), r[name])
                    for r in records if r.get(name) is not None]  # fmt: skip
            if line and (chance or name != "ln_batch"):
                panels[title][name] = line
    rows = math.ceil(len(panels) / 2) or 1
    fig = figure(2 * rows, 8, left=0.08, bottom=0.15 / rows, top=1 - 0.15 / rows, hspace=0.4)
    for place, (title, lines) in enumerate(panels.items(), 1):
        axes = fig.add_subplot(rows, 2, place)
        for (name, line), colour in zip(lines.items(), cycle(COLOURS)):
            look = "--" if name == "ln_batch" else ".-" if len(line) < 20 else "-"
            axes.plot(*zip(*line, strict=True), look, color=colour, label=name)
        axes.axhline(0, color="#dddddd", linewidth=0.8)
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=7)
        if len(PANELS[title]) != 1:  # else the title names the curve
            axes.legend(fontsize=7)
    return fig


def draw_checkpoints(found: dict[int, dict[str, tuple[float, ...]]], tuned: int) -> "Figure":
    """Metrics (share, low, high) over the steps of training; of `tuned` steps: after tuning."""
    fig = figure(4, 8)
    axes = fig.add_subplot()
    before = {steps: each for steps, each in found.items() if steps != tuned}
    for name, colour in zip(next(iter(found.values())), COLOURS):
        share, low, high = zip(*(each[name] for each in before.values()))
        axes.plot(list(before), share, ".-", color=colour, label=name)
        axes.fill_between(list(before), low, high, color=colour, alpha=0.2)
        if tuned in found:
            share, low, high = found[tuned][name]
            axes.errorbar([tuned], [share], [[share - low], [high - share]], fmt="*", color=colour)
    axes.set(xlabel="step", ylabel="held-out pairs, without a mask", ylim=(0, None))
    axes.legend(fontsize=8, loc="upper left")  # a rising curve leaves it free
    return fig


def seen_patches(
    kept: tuple[Tensor | None, Tensor | None], count: int, grid: tuple[int, int]
) -> Tensor:
    """Which patches of `count` pictures a mask's (ids_keep, visible) leaves, (B, R, C) bool."""
    ids_keep, visible = (None if x is None else x.cpu() for x in kept)
    seen = torch.ones(count, math.prod(grid), dtype=torch.bool)
    if ids_keep is not None:
        left = torch.ones_like(ids_keep, dtype=torch.bool) if visible is None else visible
        seen = torch.zeros_like(seen).scatter(1, ids_keep, left)
    return seen.unflatten(1, grid)


def grey_out(images: Tensor, seen: Tensor, grey: int = 128) -> Tensor:
    """Pictures (B, 3, H, W) whose patches that are not seen, (B, R, C), are grey."""
    shown = F.interpolate(seen[:, None].float(), images.shape[2:], mode="nearest") > 0
    return torch.where(shown, images, torch.full_like(images, grey))


def draw_masks(pairs: HeldOut, picks: np.ndarray, model: GLIP, own: Masker) -> "Figure":
    """Every registered mask on the same pictures, and how often it keeps each patch.

    All use the ratio and the gaze of `own`, the run's mask, and its teacher or else the run's image
    tower.
    """
    tower, grid, device = model.visual, model.config.grid, model.logit_scale.device
    ratio = own.mask_ratio or 0.75
    many = pairs.render(np.arange(len(pairs.concept))[:2000]).to(device)
    noise = torch.from_numpy(uniform(0, "gallery", 0, len(many), math.prod(grid))).to(device)
    fig = figure(1.1 * (len(picks) + 1.5), 1.1 * len(masks.MASKS) + 0.4)
    axes = fig.subplots(len(picks) + 1, len(masks.MASKS), squeeze=False)
    columns = list(zip(axes.T, masks.MASKS, strict=True))
    for column, mask in tqdm(columns, "masks", leave=False, disable=None):
        column[0].set_title(mask, fontsize=9)
        known = masks.settings_of(masks.MASKS[mask])
        masker = Masker(mask, ratio, **{k: v for k, v in own.settings.items() if k in known})
        masker.teacher, masker.gaze = own.teacher or tower, own.gaze
        masker.threshold = own.threshold if mask == own.mask else None
        if masker.missing_inputs():
            column[0].set_title(f"{mask} needs {', '.join(masker.missing_inputs())}", fontsize=7)
            continue
        blocks = zip(many.split(256), noise.split(256), strict=True)
        seen = torch.cat([seen_patches(masker(*block, tower), len(block[0]), grid)
                          for block in blocks])                                # (M, R, C)
        for cell, image in zip(column, grey_out(many[picks].cpu(), seen[picks]), strict=False):
            show(cell, image)
        heat = column[-1].imshow(seen.float().mean(0).numpy(), cmap="viridis", vmin=0, vmax=1)
        column[-1].set(xticks=[], yticks=[])
    axes[-1, 0].set_ylabel("share kept", fontsize=8)
    fig.colorbar(heat, ax=axes[-1, :], shrink=0.9, pad=0.01).ax.tick_params(labelsize=6)
    settings = "".join(f", {name} {value}" for name, value in own.settings.items())
    fig.suptitle(f"{ratio:.1%} masked{settings}", fontsize=9)
    return fig


def draw_top5(pairs: HeldOut, images: Tensor, texts: Tensor, picks: np.ndarray) -> "Figure":
    """Held-out pictures with their five likeliest captions, and the right one's rank, in blue."""
    columns, rows = 6, -(-len(picks) // 6)
    fig = figure(2.4 * rows, 1.75 * columns, top=0.99, bottom=0.55 / rows, hspace=0.9)
    for cell in fig.subplots(rows, columns, squeeze=False).flat:
        cell.axis("off")
    for cell, i in zip(fig.axes, picks, strict=False):
        show(cell, pairs.render(np.array([i]))[0])
        scores, wanted = images[i] @ texts.T, int(pairs.concept[i])
        found = scores.topk(min(5, len(texts))).indices.tolist()
        lines = [(j, shorten(pairs.captions[j], 27)) for j in found]
        if wanted not in found:
            right = torch.arange(len(texts)) == wanted
            rank = 1 + int(ranks(scores[None], right[None]))
            lines.append((wanted, f"{rank:,}. {shorten(pairs.captions[wanted], 22)}"))
        for line, (j, text) in enumerate(lines):
            look = {"color": GOOD, "fontweight": "bold"} if j == wanted else {"color": "#555555"}
            cell.text(0.5, -0.05 - 0.13 * line, text, fontsize=6.5, va="top", ha="center",
                      transform=cell.transAxes, **look)  # fmt: skip
    return fig


def draw_retrieval(pairs: HeldOut, images: Tensor, texts: Tensor, picks: np.ndarray) -> "Figure":
    """Captions and the pictures found for them, the right ones framed; else the best one's rank."""
    columns = 8
    fig = figure(1.3 * len(picks), 1.1 * columns, top=0.97, bottom=0.01, hspace=0.3)
    axes = fig.subplots(len(picks), columns, squeeze=False)
    for row, i in zip(axes, picks, strict=True):
        caption = pairs.concept[i]
        scores, right = images @ texts[caption], torch.from_numpy(pairs.concept == caption)
        found = scores.topk(min(columns, len(images))).indices.numpy()
        for cell in row[len(found) :]:
            cell.set_axis_off()
        for cell, j in zip(row, found, strict=False):
            show(cell, pairs.render(np.array([j]))[0])
            look = {"color": GOOD, "linewidth": 3} if right[j] else {"color": "#dddddd"}
            for side in cell.spines.values():
                side.set(**look)
        title = shorten(pairs.captions[caption], 90)
        if not right[found].any():
            title += f"   (right: rank {1 + int(ranks(scores[None], right[None])):,})"
        row[0].text(0, 1.06, title, transform=row[0].transAxes, fontsize=8)
    return fig


def draw_all(
    run: Path, config: dict, features: tuple[Tensor, Tensor] | None, test: HeldOut,
    before: GLIP, before_test: HeldOut, masker: Masker,
) -> list[str]:  # fmt: skip
    """Write the run's PNGs, without art that may not be published; returns their names.

    `features` are the final model's of the pairs `test`; `before` was trained under `masker`.
    """
    chance, drawn = config.get("loss", "clip") == "clip" and not config["aclip"], {}
    if (run / "log.jsonl").is_file():
        drawn["loss.png"] = draw_curves(run, chance)
    if len(test.concept) and test.publishable:
        picks = np.random.default_rng(3).permutation(min(2000, len(test.concept)))[:5]
        drawn["masks.png"] = draw_masks(before_test, picks, before, masker)
        sample = np.random.default_rng(1).permutation(len(test.concept))
        drawn["top5.png"] = draw_top5(test, *features, sample[:18])
        drawn["retrieval.png"] = draw_retrieval(test, *features, sample[-8:])
    for name, fig in drawn.items():
        files.write_bytes(run / name, to_png(fig))
    return list(drawn)
