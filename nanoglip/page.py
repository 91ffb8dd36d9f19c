"""report.html: a run on one page, made of its log.jsonl; it needs no other file and no network."""

import base64
import html
import io
import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import glip
from nanoglip import files
from nanoglip.config import RECIPES, TrainConfig
from nanoglip.text import decode_tokens

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 62em; margin: 2em auto;
       padding: 0 1em }
h1 { font-size: 1.5em; overflow-wrap: anywhere } h2 { font-size: 1.1em; margin: 1.6em 0 .4em }
.row { display: flex; flex-wrap: wrap; gap: 1em } figure { margin: 0; max-width: 440px }
figcaption { color: #555 }
.pairs figure { width: 132px; font-size: .8em } img { image-rendering: pixelated; width: 132px }
code { overflow-wrap: anywhere } table { border-collapse: collapse; font-size: .9em }
td { padding: .1em 1em .1em 0; vertical-align: top; overflow-wrap: anywhere }
tr.changed td { font-weight: bold } svg text { font: 12px system-ui, sans-serif; fill: #555 }
"""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's

WIDTH, HEIGHT, BOTTOM = 440, 220, 24  # of a chart, and of its margin


def ticks(low: float, high: float) -> tuple[np.ndarray, list[str], str]:
    """Round numbers over a range, their labels, and the power of ten that the labels leave out."""
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    form, numbers = ScalarFormatter(), MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high)
    form.create_dummy_axis()
    return numbers, form.format_ticks(numbers), form.get_offset()


def chart(title: str, lines: dict[str, list[tuple[float, float]]], dashed: float | None) -> str:
    """An SVG of named lines over the step; `dashed` is a height to compare with."""
    points = [point for line in lines.values() for point in line]
    if not points:
        return ""
    x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
    heights = [y for _, y in points] + ([] if dashed is None else [dashed])
    y0, y1 = min(0.0, *heights), max(heights)
    marks, labels, power = ticks(y0, y1 if y1 > y0 else y0 + 1)
    y0, y1 = marks[0], marks[-1]
    left = 14 + 7 * max(map(len, labels))  # 7: a digit's width

    def across(x: float) -> float:
        return left + (WIDTH - left - 8) * (x - x0) / max(x1 - x0, 1)

    def up(y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 10) * (y - y0) / (y1 - y0)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">']
    for y, label in zip(marks, labels, strict=True):
        parts.append(
            f'<path d="M{left} {up(y):.1f}H{WIDTH - 8}" stroke="#ddd"/>'
            f'<text x="{left - 6}" y="{up(y) + 4:.1f}" text-anchor="end">{label}</text>'
        )
    for x, anchor in ((x0, "start"), (x1, "end")):
        parts.append(
            f'<text x="{across(x):.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{x:,.0f}</text>'
        )
    if dashed is not None:
        parts.append(
            f'<path d="M{left} {up(dashed):.1f}H{WIDTH - 8}" stroke="#555" stroke-dasharray="5 4"/>'
        )
    for colour, line in zip(COLOURS, lines.values(), strict=False):
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line)
        dots = "".join(f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3" fill="{colour}"/>'
                       for x, y in line if len(line) < 20)  # fmt: skip
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(dots)
    names = ", ".join(
        f'<span style="color:{colour}">&#9632;</span> {html.escape(name)}'
        for colour, name in zip(COLOURS, lines, strict=False)
    )
    caption = f"<b>{title}</b>" + f", in {power}," * bool(power) + " over the step"
    caption += f": {names}" * (len(lines) > 1)
    return f"<figure>{''.join(parts)}</svg><figcaption>{caption}</figcaption></figure>"


def charts(records: list[dict], clip: bool) -> str:
    """Loss, evaluations, learning rate, temperature, what is seen, and speed, over both stages.

    Under CLIP's own loss (`clip`) guessing has a known height.
    """
    first = max((r["step"] for r in records if r["stage"] == "pretrain"), default=0)
    steps = [(r["step"] + first * (r["stage"] == "tune"), r) for r in records]

    def line(name: str) -> list[tuple[float, float]]:
        return [(step, r[name]) for step, r in steps if r.get(name) is not None]

    logged = {"loss", "ln_batch", "lr", "logit_scale", "computed", "visible", "threshold", "bad",
              "pairs_per_second", "data_wait", "seconds", "stage", "step"}  # fmt: skip
    scores = dict.fromkeys(name for r in records for name in r if name not in logged)
    chance = next((r["ln_batch"] for r in records if "ln_batch" in r), None) if clip else None
    named = [
        ("Loss" + " (dashed: ln of the batch, what guessing gives)" * clip, ["loss"], chance),
        ("Held-out pictures, without a mask", scores, None),
        ("Learning rate", ["lr"], None),
        ("logit_scale", ["logit_scale"], None),
        ("Share of patches", ["computed", "visible"], None),
        ("Pairs a second", ["pairs_per_second"], None),
        ("Share of time spent waiting for data", ["data_wait"], None),
    ]
    found = [(title, {n: line(n) for n in names}, dashed) for title, names, dashed in named]
    return "".join(chart(title, {n: x for n, x in lines.items() if x}, dashed)
                   for title, lines, dashed in found)  # fmt: skip


def embedded(png: str) -> str:
    """A PNG in base64 as an <img>."""
    return f'<img alt="" src="data:image/png;base64,{html.escape(png)}">'


def as_png(pixels: Tensor) -> str:
    """A picture (3, H, W), bytes or floats in [0, 1], as base64."""
    if pixels.is_floating_point():
        pixels = (pixels.nan_to_num().clamp(0, 1) * 255).byte()
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def masked(images: Tensor, seen: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) with the patches that are not seen, (B, R, C), in grey."""
    shape = images.shape[2:]
    shown = torch.nn.functional.interpolate(seen[:, None].float(), shape, mode="nearest") > 0
    return torch.where(shown, images, torch.full_like(images, 128))


def samples(
    images: Tensor, tokens: Tensor, ids_keep: Tensor | None, visible: Tensor | None,
    grid: tuple[int, int],
) -> list[list[str]]:  # fmt: skip
    """Pairs as they are trained on, (B, 3, H, W) and (B, T): the picture, its mask, its words."""
    images, tokens, ids_keep, visible = (
        x if x is None else x.cpu() for x in (images, tokens, ids_keep, visible)
    )  # wherever the model computes
    seen = torch.ones(len(images), grid[0] * grid[1], dtype=torch.bool)
    if ids_keep is not None:
        kept = torch.ones_like(ids_keep, dtype=torch.bool) if visible is None else visible
        seen = torch.zeros_like(seen).scatter(1, ids_keep, kept)
    hidden = masked(images, seen.unflatten(1, grid))
    words = [decode_tokens(row[1 : length - 1].tolist())
             for row, length in zip(tokens, glip.lengths(tokens), strict=True)]  # fmt: skip
    return [[*map(as_png, both), text] for *both, text in zip(images, hidden, words, strict=True)]


def figures(rows: list[list[str]]) -> str:
    """samples() as HTML."""
    return "".join(
        "<figure>"
        + "".join(map(embedded, both))
        + f"<figcaption>{html.escape(words)}</figcaption></figure>"
        for *both, words in rows
    )


def settings(config: TrainConfig) -> str:
    """Every setting, those that differ from the recipe's in bold."""
    usual = asdict(TrainConfig(recipe=config.recipe, **RECIPES[config.recipe]))
    rows = [
        f"<tr{' class=changed' * (usual[name] != value)}><td>{name}</td>"
        f"<td>{html.escape(str(value))}</td></tr>"
        for name, value in asdict(config).items()
    ]
    return f"<table>{''.join(rows)}</table>"


def write(
    out: Path, config: TrainConfig, where: str, command: str, machine: dict,
    pairs: dict[str, list[list[str]]],
) -> None:  # fmt: skip
    """Write out/report.html; `where` says how far the run is, `pairs` are samples() of stages."""
    lines = (out / "log.jsonl").read_text().splitlines()
    clip = config.loss == "clip" and not config.aclip
    name, curves = html.escape(out.name), charts([json.loads(line) for line in lines], clip)
    made = "{device}, {cores} cores of {cpu}, commit {commit}".format(**machine)
    shown = "".join(
        f"<h2>{html.escape(stage)}: pairs of the last batch, and what the mask left of them</h2>"
        f'<div class="row pairs">{figures(rows)}</div>'
        for stage, rows in pairs.items()
    )
    text = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title>
<style>{STYLE}</style><h1>{name}</h1><p>{html.escape(where)}. {html.escape(made)}.</p>
<p><code>{html.escape(command)}</code></p>
<h2>Curves</h2><div class="row">{curves}</div>
{shown}
<h2>Settings (bold: not the recipe's)</h2>{settings(config)}</html>
"""
    files.write_bytes(out / "report.html", text.encode())


WHOLE = """
.results pre { overflow-x: auto } .results figure { max-width: none; margin: 1em 0 }
.results img { width: auto; max-width: 100%; image-rendering: auto }
"""

FIGURES = {
    "top5.png": "Held-out pictures and their likeliest five captions; the right one in blue",
    "retrieval.png": "Captions and the pictures found for them, best first; right ones framed",
    "masks.png": "Every mask on the same pictures, and how often it keeps each patch",
}


def add_results(out: Path, what: str, tables: str, pictures: list[str]) -> Path | None:
    """The path of a run's page, if it has one, to which an evaluation of `what` was added.

    Its tables, and those of its `pictures` that are in FIGURES, replace an earlier evaluation's.
    """
    path = out / "report.html"
    if not path.is_file():
        return None
    found = {name: base64.b64encode((out / name).read_bytes()).decode()
             for name in FIGURES if name in pictures}  # fmt: skip
    shown = "".join(
        f"<figure>{embedded(png)}<figcaption>{FIGURES[name]}</figcaption></figure>"
        for name, png in found.items()
    )
    start, end = f'<section class="results" title="{what}">', "</section>\n"
    old = re.compile(re.escape(start) + ".*?" + end, re.DOTALL)
    text = old.sub("", path.read_text("utf-8"))
    title = f"<style>{WHOLE}</style><h2>Evaluation: {what}</h2>"
    added = f"{start}{title}<pre>{html.escape(tables)}</pre>{shown}{end}"
    text = text.replace("<h2>Curves</h2>", f"{added}<h2>Curves</h2>", 1)
    files.write_bytes(path, text.encode())
    return path
