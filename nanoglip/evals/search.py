"""Use a trained model on your own pictures; it needs a run's model.pt and no training data.

    python evaluate.py runs/demo --search "a red apple" --images DIR     which pictures fit a text
    python evaluate.py runs/demo --classify PICTURE --names cat,dog      which names fit a picture
    python evaluate.py runs/demo --attention PICTURE                     where the model looks

Tables go to the screen, search.png and attention.png into the run's folder. As in evaluation, the
model gets the centred square of a picture.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

import glip
from glip import InputError
from nanoglip.cli import counted, printable
from nanoglip.evals import figures
from nanoglip.evals.encoder import Encoder
from nanoglip.evals.figures import shorten
from nanoglip.files import write_bytes
from nanoglip.masker import attend
from nanoglip.sources import pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HITS = 12  # pictures of a search that are listed and drawn
SHOWN = 224  # pixels a side of a picture in a figure

def given_flags(options: object) -> list[str]:
    """Which of the three are given; raises InputError for one that lacks its other half."""
    for flag, other in (("search", "images"), ("classify", "names")):
        if bool(getattr(options, flag)) != bool(getattr(options, other)):
            raise InputError(f"--{flag} goes with --{other}: give both")
    return [f"--{flag}" for flag in ("search", "classify", "attention") if getattr(options, flag)]


def use(encoder: Encoder, run: Path, options: object) -> None:
    """Print the answer, and draw it into the run's folder."""
    if options.search:
        found = search(encoder, options.search, Path(options.images))
        figure, path = draw_hits(options.search, found), run / "search.png"
    elif options.classify:
        names = [name.strip() for name in options.names.split(",") if name.strip()]
        for name, share, score in classify(encoder, Path(options.classify), names):
            print(f"{100 * share:>6.1f} %  similarity {score:+.3f}  {name}")
        print(f"(the shares are of these {len(names)} names alone)")
        return
    else:
        heat = attention(encoder, Path(options.attention))
        rows, columns = heat.shape
        middle = heat[rows // 4 : rows - rows // 4, columns // 4 : columns - columns // 4]
        print(f"the {middle.numel()} patches in the middle, {middle.numel() / heat.numel():.0%} of "
              f"the picture, get {middle.sum():.0%} of the attention")  # fmt: skip
        figure, path = draw_attention(Path(options.attention), heat), run / "attention.png"
    write_bytes(path, figures.to_png(figure))
    print(f"wrote {path}")


def picture_files(folder: Path) -> tuple[list[Path], int]:
    """The pictures in a folder and below it, by their suffixes, and how many other files it has."""
    if not folder.is_dir():
        raise InputError(f"--images {folder}: there is no such folder")
    files = sorted(path for path in folder.rglob("*") if not path.is_dir())
    chosen = [path for path in files if path.suffix.lower() in pictures.SUFFIXES]
    if not chosen:
        raise InputError(
            f"--images {folder}: none of its files ({len(files)}) ends in one of "
            f"{', '.join(sorted(pictures.SUFFIXES))}; name a folder with pictures"
        )
    return chosen, len(files) - len(chosen)


def encode_files(encoder: Encoder, paths: list[Path]) -> tuple[Tensor, dict[int, str]]:
    """image_features (n, E) of n files; {row of an unreadable file: the reason}."""
    side, bad = encoder.model.config.pixels[0], {}

    def read(i: int) -> Tensor:
        try:
            return one_picture(paths[i], side)
        except InputError as error:
            bad[i] = str(error)
            return torch.zeros(3, side, side, dtype=torch.uint8)

    with ThreadPoolExecutor() as pool:
        return encoder.images(lambda ids: torch.stack(list(pool.map(read, ids))), len(paths)), bad


def encode_texts(encoder: Encoder, texts: list[str], flag: str) -> Tensor:
    """text_features (n, E) of n texts; raises InputError for one that the model cannot read."""
    room = encoder.model.config.context_length - 2
    for text in texts:
        if not text.isprintable():
            raise InputError(f"--{flag}: {text!r} holds characters that are no text; type it anew")
        tokens = len(glip.encode(text))
        if not 0 < tokens <= room:
            raise InputError(f"--{flag}: a text of {tokens} tokens; the model reads 1 to {room}")
    return encoder.texts(texts)


def one_picture(path: Path, side: int) -> Tensor:
    """A picture's centred square, (3, S, S) bytes; raises InputError for an unreadable one."""
    return pictures.centred(np.asarray(pictures.read_picture(path, side)), side)


def search(encoder: Encoder, text: str, folder: Path) -> list[tuple[Path, float]]:
    """The HITS pictures of a folder that fit a text best, with their cosines; also printed.

    Unreadable pictures are named and counted. Raises InputError where all are.
    """
    query = encode_texts(encoder, [text], "search")                            # (1, E)
    paths, others = picture_files(folder)
    features, bad = encode_files(encoder, paths)                               # (n, E)
    for i in sorted(bad)[:HITS]:
        print(printable(bad[i]))
    if bad or others:
        print(f"left out: {len(bad)} of {counted(len(paths), 'picture')}, "
              f"{counted(others, 'file')} of other kinds")  # fmt: skip
    good = [i for i in range(len(paths)) if i not in bad]
    if not good:
        raise InputError(f"--images {folder}: none of its pictures ({len(paths)}) can be read")
    scores, places = (features[good] @ query[0]).topk(min(HITS, len(good)))
    found = [(paths[good[i]], score) for i, score in zip(places.tolist(), scores.tolist())]
    print(f"{counted(len(good), 'picture')} searched for: {text}")
    for number, (path, score) in enumerate(found, 1):
        print(f"{number:>3}  similarity {score:+.3f}  {printable(path)}")
    return found


def classify(encoder: Encoder, path: Path, names: list[str]) -> list[tuple[str, float, float]]:
    """(name, its share among these names, cosine) for a picture, the likeliest first."""
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise InputError("--names: give two different names or more, as in --names cat,dog")
    texts = encode_texts(encoder, names, "names")                              # (n, E)
    image = one_picture(path, encoder.model.config.pixels[0])
    scores = texts @ encoder.images(lambda _: image[None], 1)[0]               # (n,)
    shares = (encoder.model.logit_scale.exp().cpu() * scores).softmax(0)
    rows = zip(names, shares.tolist(), scores.tolist(), strict=True)
    return sorted(rows, key=lambda row: -row[1])


@torch.inference_mode()
def attention(encoder: Encoder, path: Path) -> Tensor:
    """Shares (R, C) of the class token's attention that patches get, mean of heads and layers.

    What the token gives to itself is left out, so that they sum to 1.
    """
    image = one_picture(path, encoder.model.config.pixels[0])
    heat, _ = attend(encoder.model.visual, image[None].to(encoder.device))
    return (heat[0] / heat[0].sum()).float().cpu()


def draw_hits(text: str, found: list[tuple[Path, float]]) -> "Figure":
    """The pictures found for a text, best first, with their file names and scores."""
    columns = min(4, len(found))
    rows = -(-len(found) // columns)
    fig = figures.figure(2.5 * rows + 0.4, 2.2 * max(columns, 2))
    fig.suptitle(shorten(text, 60), fontsize=10)
    for place, (path, score) in enumerate(found, 1):
        cell = fig.add_subplot(rows, columns, place)
        figures.show(cell, one_picture(path, SHOWN))
        cell.set_title(f"{shorten(printable(path.name), 26)}\n{score:+.3f}", fontsize=7)
    return fig


def draw_attention(path: Path, heat: Tensor) -> "Figure":
    """A picture, and the same under its attention (R, C), in multiples of an even share."""
    image = one_picture(path, SHOWN)
    fig = figures.figure(3, 6.2)
    left, right = fig.subplots(1, 2)
    for axes in (left, right):
        figures.show(axes, image)
    times, corners = (heat * heat.numel()).numpy(), (0, SHOWN, SHOWN, 0)
    drawn = right.imshow(times, extent=corners, alpha=0.7, vmin=0)
    left.set_title(shorten(printable(path.name), 40), fontsize=8)
    right.set_title("where the class token looks", fontsize=8)
    fig.colorbar(drawn, ax=right, shrink=0.9, label="times an even share")
    return fig
