"""report.html: a run on one page, made of its log.jsonl; it needs no other file and no network."""

import base64
import html
import io
import re
from pathlib import Path

from PIL import Image
from torch import Tensor

import glip
from nanoglip import files
from nanoglip.evals import figures
from nanoglip.text import decode_tokens

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 62em; margin: 2em auto;
       padding: 0 1em }
h1, code, td { overflow-wrap: anywhere } h2 { font-size: 1.1em; margin: 1.6em 0 .4em }
figure { margin: 1em 0 } figcaption { color: #555 } img { max-width: 100% } pre { overflow-x: auto }
.pairs { display: flex; flex-wrap: wrap; gap: 1em; font-size: .8em }
.pairs figure { width: 132px; margin: 0 } .pairs img { width: 132px; image-rendering: pixelated }
td { padding: .1em 1em .1em 0; vertical-align: top } tr.changed td { font-weight: bold }
"""

FIGURES = {  # of an evaluation
    "checkpoints.png": "Kept checkpoints, with 95 % intervals; a star is the tuned model",
    "top5.png": "Held-out pictures and their likeliest five captions; the right one in blue",
    "retrieval.png": "Captions and the pictures found for them, best first; right ones framed",
    "masks.png": "Every mask on the same pictures, and how often it keeps each patch",
}


def as_png(image: Tensor) -> str:
    """A picture (3, H, W), bytes, as PNG in base64."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def shown(pngs: list[str], caption: str) -> str:
    """PNGs in base64 above a caption, as HTML."""
    images = (f'<img alt="" src="data:image/png;base64,{html.escape(png)}">' for png in pngs)
    return f"<figure>{''.join(images)}<figcaption>{html.escape(caption)}</figcaption></figure>"


def samples(
    images: Tensor, tokens: Tensor, kept: tuple[Tensor | None, Tensor | None],
    grid: tuple[int, int],
) -> list[list[str]]:  # fmt: skip
    """[picture, its patches under a mask's (ids_keep, visible), caption] of each pair.

    Takes bytes (B, 3, H, W) and tokens (B, T); the pictures are PNGs in base64.
    """
    images, tokens = images.cpu().byte(), tokens.cpu()
    masked = figures.grey_out(images, figures.seen_patches(kept, len(images), grid))
    rows = []
    for *both, row, length in zip(images, masked, tokens, glip.lengths(tokens), strict=True):
        rows.append([*map(as_png, both), decode_tokens(row[1 : length - 1].tolist())])
    return rows


def write(
    out: Path, settings: dict, usual: dict, chance: bool, where: str, command: str, machine: dict,
    pairs: dict[str, list[list[str]]],
) -> None:  # fmt: skip
    """Write out/report.html.

    Settings that differ from the `usual` ones are bold; `chance` as in figures.draw_curves; `where`
    says how far the run is; `pairs` are samples() of each stage.
    """
    curves = base64.b64encode(figures.to_png(figures.draw_curves(out, chance))).decode()
    name = html.escape(out.name)
    made = "{device}, {cores} cores of {cpu}, commit {commit}".format(**machine)
    batches = "".join(
        f"<h2>{html.escape(stage)}: pairs of the last batch, and what the mask left of them</h2>"
        f'<div class="pairs">{"".join(shown(pngs, words) for *pngs, words in rows)}</div>'
        for stage, rows in pairs.items()
    )
    table = "".join(
        f"<tr{' class=changed' * (usual[key] != value)}><td>{key}</td>"
        f"<td>{html.escape(str(value))}</td></tr>"
        for key, value in settings.items()
    )
    text = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title>
<style>{STYLE}</style><h1>{name}</h1><p>{html.escape(where)}. {html.escape(made)}.</p>
<p><code>{html.escape(command)}</code></p>
<h2>Curves</h2>{shown([curves], "Over the step; tuning follows pre-training")}
{batches}
<h2>Settings (bold: not the recipe's)</h2><table>{table}</table></html>
"""
    files.write_bytes(out / "report.html", text.encode())


def add_results(out: Path, what: str, tables: str, pictures: list[str]) -> Path | None:
    """The path of a run's page, if it has one, to which an evaluation of `what` was added.

    Its tables, and those of its `pictures` that are in FIGURES, replace an earlier evaluation's.
    """
    path = out / "report.html"
    if not path.is_file():
        return None
    pngs = {name: base64.b64encode((out / name).read_bytes()).decode() for name in pictures
            if name in FIGURES}  # fmt: skip
    drawn = "".join(shown([png], FIGURES[name]) for name, png in pngs.items())
    start, end = f'<section title="{what}">', "</section>\n"
    old = re.compile(re.escape(start) + ".*?" + end, re.DOTALL)
    added = f"{start}<h2>Evaluation: {what}</h2><pre>{html.escape(tables)}</pre>{drawn}{end}"
    before, curves, after = old.sub("", path.read_text("utf-8")).partition("<h2>Curves</h2>")
    files.write_bytes(path, (before + added + curves + after).encode())
    return path
