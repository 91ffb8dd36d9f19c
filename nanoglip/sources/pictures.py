"""Pictures and their captions: decoding, cropping, folders, tables, and what all sources share.

Pictures are not trusted. The size in a header is checked before anything is decoded, five formats
are allowed, and a picture that cannot be decoded whole is counted by reason and replaced by the
next one. Which one that is depends on its number alone.
"""

import csv
import io
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

from glip import InputError, tokenize
from nanoglip import files
from nanoglip.cli import counted, say
from nanoglip.files import cached, digest, read_regular, text_of

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}  # in folders and tables
PICTURES = (".jpg", ".jpeg", ".png", ".webp")  # in shards
PICTURE_CAP, CAPTION_CAP = 2**26, 2**20  # bytes of a picture, and of a .txt or .json
# Pillow refuses a picture with more than a megabyte of text, or a zipped profile of that size.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = PICTURE_CAP
PIXEL_CAP = 2**26  # pixels of a picture; a header that claims more is refused
TOO_LARGE = f"over {PIXEL_CAP:,} pixels, or none"
SCANS_CAP = 100  # scans of a JPEG: each is decoded like a whole picture, and can be a few bytes
MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]", re.DOTALL)  # start of a JPEG's segment
CROP_SCALE = (0.5, 1.0)  # share of the area that a training crop covers, in GLIP's paper
MAX_BAD = 0.01  # share of pictures that may be unreadable
MAX_HELD_OUT = 5000  # held-out pictures of a source
CHECKED = 200  # training pictures that are decoded before anything starts
LICENCE = "The pictures belong to their owners, and are not for redistribution."

# --- Decode and crop ------------------------------------------------------------------------------


class BadPicture(ValueError):
    """A picture that cannot be used; the message is the reason."""


def decode(
    content: bytes, side: int, finish: Callable[[Image.Image], Image.Image] | None = None,
    crop: Callable[[int, int], tuple[int, int, int, int]] | None = None,
) -> np.ndarray:  # fmt: skip
    """RGB pixels (h, w, 3) of an encoded picture, upright, on white. Raises BadPicture.

    `crop(width, height)` gives the part that is wanted, (left, top, width, height); else it is all.
    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if its shorter side then still has 2 x `side`
    pixels. If there is a crop, and no Exif, the crop's shorter side has to have `side` pixels
    instead. `finish` replaces upright().
    """
    least, box = (side, crop) if crop else (2 * side, all_of)
    try:
        check_scans(content)
        if content[:2] == b"\xff\xd8" and b"Exif\0\0" not in content:
            height, width, space, _ = simplejpeg.decode_jpeg_header(content)
            check_pixels(width, height)
            if space != "CMYK":
                left, top, w, h = box(width, height)
                # Not by other eighths: libjpeg-turbo decodes those slower than the whole picture.
                k = next(k for k in (8, 4, 2, 1) if min(w, h) >= k * least or k == 1)
                pixels = simplejpeg.decode_jpeg(
                    content, min_height=-(-height // k), min_width=-(-width // k)
                )
                return pixels[top // k :, left // k :][: -(-h // k), : -(-w // k)]
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            check_pixels(*image.size)
            image.draft("RGB", (2 * side, 2 * side))
            pixels = np.asarray((finish or upright)(image))
            left, top, w, h = box(*pixels.shape[1::-1])
            return pixels[top:, left:][:h, :w]
    except BadPicture:
        raise
    except Image.DecompressionBombError:
        raise BadPicture(TOO_LARGE) from None
    except Exception as error:  # decoders raise many kinds for torn and hostile bytes
        reason = type(error).__name__ if isinstance(error, MemoryError) else str(error)
        if "cannot identify" in reason or not reason:  # it names an address in memory
            reason = f"not one of {', '.join(FORMATS)}"
        raise BadPicture(reason.split("\n")[0].partition(" (")[0][:80]) from None


def all_of(width: int, height: int) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a picture that is not cropped."""
    return 0, 0, width, height


def check_pixels(width: int, height: int) -> None:
    """Raise BadPicture for a header that claims too many pixels, or none."""
    if not 0 < width * height <= PIXEL_CAP:
        raise BadPicture(TOO_LARGE)


def check_scans(content: bytes) -> None:
    """Raise BadPicture for a JPEG that would be decoded for hours."""
    if content[:2] != b"\xff\xd8" or content.count(b"\xff\xda") <= SCANS_CAP:
        return
    scans, found = 0, MARKER.search(content, 2)
    while found and found[0][-1] != 0xD9 and scans <= SCANS_CAP:  # until the end of the picture
        scans, place = scans + (found[0][-1] == 0xDA), found.end()
        # Metadata are skipped: they may hold whole pictures.
        found = MARKER.search(content, place + int.from_bytes(content[place : place + 2], "big"))
    if scans > SCANS_CAP:
        raise BadPicture(f"over {SCANS_CAP} scans")


def upright(image: Image.Image) -> Image.Image:
    """The picture in RGB, turned as its camera was held, on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # convert() would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_picture(path: Path | str, side: int) -> Image.Image:
    """The decoded picture in a file. Raises InputError."""
    try:
        return Image.fromarray(decode(read_regular(path, PICTURE_CAP), side))
    except (OSError, BadPicture) as error:
        raise InputError(f"{path}: not a readable picture ({error})") from None


def random_crop(
    width: int, height: int, draw: np.ndarray, scale: tuple[float, float] = CROP_SCALE
) -> tuple[int, int, int, int]:
    """(left, top, width, height) of torchvision's RandomResizedCrop, by draw (DRAWS,).

    The share of the area lies in `scale`, the aspect between 3/4 and 4/3; three tries, then cut.
    """
    draw = draw.tolist()  # Python's numbers are faster, one at a time
    for share, shape in (draw[:2], draw[4:6], draw[6:8]):
        area = width * height * (scale[0] + share * (scale[1] - scale[0]))
        aspect = (3 / 4) ** (1 - 2 * shape)
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if w <= width and h <= height:
            break
    w, h = max(1, min(w, width)), max(1, min(h, height))
    return int(draw[2] * (width - w + 1)), int(draw[3] * (height - h + 1)), w, h


def resize(pixels: np.ndarray, height: int, width: int) -> Tensor:
    """Pixels (h, w, 3) resized bicubically, as by torchvision, (3, height, width) bytes."""
    image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None]          # channels last
    return F.interpolate(image, (height, width), mode="bicubic", antialias=True)[0]


def centred(pixels: np.ndarray, side: int) -> Tensor:
    """The centred square of pixels (h, w, 3), as by Resize and CenterCrop, (3, S, S) bytes."""
    most = 8 * min(pixels.shape[:2])  # of a very long picture only the middle is resized
    top, left = (max(0, (length - most) // 2) for length in pixels.shape[:2])
    pixels = pixels[top : top + most, left : left + most]
    height, width = (side * length // min(pixels.shape[:2]) for length in pixels.shape[:2])
    top, left = round((height - side) / 2), round((width - side) / 2)
    return resize(pixels, height, width)[:, top : top + side, left : left + side]


# --- Sources of captioned pictures ----------------------------------------------------------------


class Source:
    """Numbered captioned pictures. What only some sources have is empty in the others."""

    name: str
    image_size: int
    counts: dict[str, int]
    held: np.ndarray  # (H,) ids that are held out, ascending
    left_out = np.empty(0, int)  # rows of the data, as given, that have no id here
    crop_scale = CROP_SCALE
    captions: Sequence[str] = ()  # the distinct ones, where they are known
    concept: np.ndarray | None = None  # (M,) number of each picture's caption in `captions`
    flags: np.ndarray | None = None  # (C,) which captions are flags, where they are class names
    shard_starts = np.empty(0, int)  # (S + 1,) first id of each shard
    addresses = np.empty((0, 2), int)  # (M, 2) where in a shard each picture lies, and its bytes
    sources: Sequence["Source"] = ()  # that this one consists of
    weights: Sequence[float] = ()  # passes over each of them in an epoch
    publishable = True  # whether figures may show the pictures
    placed: Callable[[float, float], "Source"] | None = None  # the object elsewhere, (down, across)

    def __len__(self) -> int:
        return len(self.concept)

    def encoded(self, ids: np.ndarray) -> list[bytes | Exception]:
        """Encoded pictures; the error in the place of each that cannot be read."""

    def where(self, i: int) -> str:
        """Where picture i is, for people."""

    def stamp(self, ids: np.ndarray) -> str:
        """A text that changes when captions change, or the pictures `ids`: a key for caches."""

    def key(self) -> str:
        """A short key of the data, which differs for other data."""
        return digest([], self.stamp(np.arange(0)))[:16]

    def texts(self, ids: np.ndarray) -> list[str]:
        """Captions of pictures."""
        return [self.captions[i] for i in self.concept[ids]]

    def tokens(self, ids: np.ndarray) -> Tensor:
        """Token ids of captions, (B, T)."""
        return tokenize(self.texts(ids))

    def prompted(self, ids: np.ndarray, draws: np.ndarray) -> list[str]:
        """Class names of pictures in templates chosen by draws (B,)."""

    def prompts(self) -> dict[str, list[str]]:
        """All class names in each template of evaluation; empty where captions are texts."""
        return {}

    def examples(self, ids: np.ndarray) -> list[str]:
        """What tells these pictures from others, wherever the data lie."""
        return [Path(self.where(i)).name for i in ids]

    def following(self, i: int) -> int:
        """The picture that replaces a bad one: the next that is not held out."""
        i = (i + 1) % len(self)
        while i in self.held:
            i = (i + 1) % len(self)
        return i

    def pixels(self, content: bytes | Exception, crop: Callable | None = None) -> np.ndarray:
        """Pixels (h, w, 3) of a picture, or of decode()'s crop, from an item of encoded().

        Raises BadPicture.
        """
        if isinstance(content, Exception):
            raise BadPicture(f"{type(content).__name__}: {content}"[:100])
        return decode(content, self.image_size, crop=crop)

    def image(self, i: int) -> Tensor:
        """Picture i, its centred square, (3, S, S) bytes. Raises BadPicture."""
        return centred(self.pixels(self.encoded(np.array([i]))[0]), self.image_size)

    def read(
        self, ids: np.ndarray, draws: np.ndarray, whole: bool = False
    ) -> tuple[np.ndarray, Tensor, np.ndarray, list[list[str]]]:
        """ids (B,) after replacement, images (B, 3, S, S), aspects (B,), [source, where, reason]s.

        Pictures are cropped by draws (B, DRAWS), or are `whole`, squeezed into the square; aspects
        are width / height before. Each unreadable picture is listed, and the next one is read.
        After a hundred in a row the image stays black, and --max-bad stops the run.
        """
        side, ids, bad = self.image_size, np.array(ids), []
        images = torch.zeros(len(ids), 3, side, side, dtype=torch.uint8)
        aspects = np.ones(len(ids), np.float32)

        def crop(width: int, height: int) -> tuple[int, int, int, int]:
            aspects[k] = width / height
            if whole:
                return all_of(width, height)
            return random_crop(width, height, draws[k], self.crop_scale)

        for k, content in enumerate(self.encoded(ids)):
            for _ in range(min(100, len(self))):
                try:
                    images[k] = resize(self.pixels(content, crop), side, side)
                except BadPicture as error:
                    bad.append([self.name, self.where(ids[k]), str(error)])
                    ids[k] = self.following(ids[k])
                    (content,) = self.encoded(ids[k : k + 1])
                    continue
                break
        return ids, images, aspects, bad

    def render(self, ids: np.ndarray) -> Tensor:
        """Held-out pictures, centred squares, (B, 3, S, S) bytes. Raises InputError."""
        images = []
        for i, content in zip(ids, self.encoded(ids), strict=True):
            try:
                images.append(centred(self.pixels(content), self.image_size))
            except BadPicture as error:
                message = f"{self.where(i)} is held out and has become unreadable ({error})"
                raise InputError(f"{message}: repair or remove it") from None
        return torch.stack(images)

    def check_readable(self, max_bad: float) -> np.ndarray:
        """Held-out ids that can be read, when these and the first CHECKED pictures are decoded.

        Raises InputError if more than max_bad of them are unreadable.
        """
        ids = np.union1d(np.arange(min(CHECKED, len(self))), self.held).astype(int).tolist()
        key = digest([], f"{self.stamp(np.array(ids))} {self.image_size} {ids}")
        path = files.CACHE / f"readable-{key[:16]}.json"
        if path.is_file():
            return self.held

        def reason(i: int) -> str | None:
            try:
                self.image(i)
            except BadPicture as error:
                return str(error)
            return None

        with ThreadPoolExecutor() as pool:
            bad = {i: why for i, why in zip(ids, pool.map(reason, ids), strict=True) if why}
        if not bad:  # bad ones are looked at again: the network may have failed
            cached(path, dict)
            return self.held
        first = ", ".join(f"{self.where(i)} ({bad[i]})" for i in list(bad)[:10])
        message = f"{self.name}: {len(bad)} of {len(ids)} pictures cannot be read: {first}"
        if len(bad) > max_bad * len(ids):
            raise InputError(f"{message}; repair or remove them, or raise --max-bad {max_bad:g}")
        say(message)
        return self.held[~np.isin(self.held, list(bad))]


def numbered(texts: list[str]) -> tuple[list[str], np.ndarray]:
    """The distinct texts, sorted, and the number of each text among them, (n,)."""
    captions = sorted(set(texts))
    number = {text: i for i, text in enumerate(captions)}
    return captions, np.array([number[text] for text in texts], int)


def by_source(starts: np.ndarray, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(s, places in ids, ids within s) for each source s that ids touch; starts (S + 1,)."""
    number = np.searchsorted(starts, ids, "right") - 1
    for s in np.unique(number):
        places = np.flatnonzero(number == s)
        yield s, places, ids[places] - starts[s]


class HeldOut:
    """The held-out pairs of some sources, as evaluation sees them.

    `captions`: the distinct ones, or all class names, and then `flags` says which are flags;
    `concept` (M,): the number of each picture's caption.
    """

    def __init__(self, sources: Sequence[Source], chosen: Sequence[np.ndarray]) -> None:
        self.parts, first = list(zip(sources, chosen, strict=True)), sources[0]
        self.flags, self.prompts, self.image_size = first.flags, first.prompts(), first.image_size
        self.publishable = all(source.publishable for source in sources)
        self.starts = np.concatenate([[0], np.cumsum([len(ids) for ids in chosen])])
        if self.flags is None:
            texts = [text for source, ids in self.parts for text in source.texts(ids)]
            self.captions, self.concept = numbered(texts)
        else:
            self.captions, self.concept = first.captions, first.concept[chosen[0]]

    def __len__(self) -> int:
        return len(self.concept)

    def examples(self) -> list[str]:
        """What tells these pictures from others, wherever the data lie."""
        return [example for source, ids in self.parts for example in source.examples(ids)]

    def placed(self, down: float, across: float) -> "HeldOut":
        """The same pairs, every object at one place, shares of the room; InputError if it has none.
        """
        if not all(source.placed for source, _ in self.parts):
            raise InputError("--positions moves one object: name a run on scenes-center")
        return HeldOut([s.placed(down, across) for s, _ in self.parts], [i for _, i in self.parts])

    def render(self, ids: np.ndarray) -> Tensor:
        """Pictures `ids` (B,), (B, 3, S, S) bytes. Raises InputError."""
        images = torch.empty(len(ids), 3, self.image_size, self.image_size, dtype=torch.uint8)
        for s, places, own in by_source(self.starts, ids):
            source, chosen = self.parts[s]
            images[places] = source.render(chosen[own])
        return images


class Mixed(Source):
    """Several sources as one, their ids one behind the other; `weights`: passes in an epoch."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]) -> None:
        self.sources, self.weights, self.image_size = sources, weights, sources[0].image_size
        self.starts = np.concatenate([[0], np.cumsum([len(source) for source in sources])])
        self.name = " + ".join(source.name for source in sources)
        each = list(zip(sources, self.starts, strict=False))
        self.held = np.concatenate([source.held + start for source, start in each])
        self.counts = {f"{source.name}: {what}": n
                       for source in sources for what, n in source.counts.items()}  # fmt: skip

    def __len__(self) -> int:
        return int(self.starts[-1])

    def where(self, i: int) -> str:
        ((s, _, own),) = by_source(self.starts, np.array([i]))
        return f"{self.sources[s].name} {self.sources[s].where(own[0])}"

    def stamp(self, ids: np.ndarray) -> str:
        within = {s: own for s, _, own in by_source(self.starts, ids)}
        none = np.empty(0, int)
        return "\n".join(x.stamp(within.get(s, none)) for s, x in enumerate(self.sources))

    def texts(self, ids: np.ndarray) -> list[str]:
        texts = np.empty(len(ids), object)
        for s, places, own in by_source(self.starts, ids):
            texts[places] = self.sources[s].texts(own)
        return texts.tolist()

    def tokens(self, ids: np.ndarray) -> Tensor:
        tokens = torch.zeros(len(ids), 77, dtype=torch.long)
        for s, places, own in by_source(self.starts, ids):
            tokens[places] = self.sources[s].tokens(own)
        return tokens

    def read(
        self, ids: np.ndarray, draws: np.ndarray, whole: bool = False
    ) -> tuple[np.ndarray, Tensor, np.ndarray, list[list[str]]]:
        ids, aspects, bad = np.array(ids), np.ones(len(ids), np.float32), []
        images = torch.empty(len(ids), 3, self.image_size, self.image_size, dtype=torch.uint8)
        for s, places, own in by_source(self.starts, ids):
            found = self.sources[s].read(own, draws[places], whole)
            ids[places], images[places], aspects[places] = found[0] + self.starts[s], *found[1:3]
            bad += found[3]
        return ids, images, aspects, bad


# --- Folders and tables ---------------------------------------------------------------------------

PATH_COLUMNS = ("filepath", "image_path", "path", "image", "file", "filename", "file_name")
CAPTION_COLUMNS = ("caption", "title", "text", "description")


class Pictures(Source):
    """Pictures in files; equal captions are one concept."""

    def __init__(self, rows: list[tuple[Path, str]], image_size: int, name: str) -> None:
        self.name, self.image_size, self.held = name, image_size, np.empty(0, int)
        self.paths = [path for path, _ in rows]
        self.captions, self.concept = numbered([text for _, text in rows])
        self.counts = {"pictures": len(set(self.paths)), "rows": len(rows)}

    def encoded(self, ids: np.ndarray) -> list[bytes | Exception]:
        found = []
        for i in ids:
            try:
                found.append(read_regular(self.paths[i], PICTURE_CAP))
            except (OSError, ValueError) as error:  # NUL in a name
                found.append(error)
        return found

    def where(self, i: int) -> str:
        return str(self.paths[i])

    def stamp(self, ids: np.ndarray) -> str:
        texts = self.texts(np.arange(len(self)))
        rows = "\n".join(f"{path} {text}" for path, text in zip(self.paths, texts, strict=True))
        found = [self.paths[i].stat() if self.paths[i].is_file() else None for i in ids]
        return rows + str([x and (x.st_size, x.st_mtime_ns) for x in found])


def own_pictures(path: Path) -> list[tuple[Path, str]]:
    """(picture, caption) of a folder or a CSV/TSV. Raises InputError with the file and row."""
    if path.is_dir():
        found = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES)
        texts = [(f, f.with_suffix(".txt")) for f in found if f.with_suffix(".txt").is_file()]
        if alone := len(found) - len(texts):
            say(f"{path}: left out for lack of a .txt: {alone} of {counted(len(found), 'picture')}")
        rows = [(f, text_of(read_regular(x, CAPTION_CAP)), str(x)) for f, x in texts]
    else:
        rows = table_rows(path)
    if not rows:
        raise InputError(f"{path}: no picture with a row, or an equally named .txt; add some")
    for _, text, where in rows:
        if not text.strip():
            raise InputError(f"{where}: the caption is empty or not UTF-8; correct or remove it")
    return [(picture, " ".join(text.split())) for picture, text, _ in rows]


def table_rows(path: Path) -> list[tuple[Path, str, str]]:
    """(picture, caption, where) of a CSV/TSV's rows. Raises InputError with the file and row."""
    tabs, endings, rows = path.suffix.lower() == ".tsv", "|".join(map(re.escape, SUFFIXES)), []
    torn = re.compile(r"\t" if tabs else rf'({endings})"?\s*(,|$)', re.IGNORECASE | re.MULTILINE)
    csv.field_size_limit(2**24)
    if not (text := text_of(content := read_regular(path, 2**32))) and content:
        raise InputError(f"{path}: it is not UTF-8, or holds NUL bytes; save it as UTF-8")
    table = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if tabs else ",")
    try:
        heading = [name.strip().lower() for name in next(table, [])]
        image, caption = (next((heading.index(c) for c in names if c in heading), None)
                          for names in (PATH_COLUMNS, CAPTION_COLUMNS))  # fmt: skip
        if image is None or caption is None:
            raise InputError(
                f"{path}: the first row must name a picture column ({', '.join(PATH_COLUMNS)}) "
                f"and a caption column ({', '.join(CAPTION_COLUMNS)}); it has "
                f"{', '.join(heading) or 'nothing'}"
                + "; name a file with tabs between columns .tsv" * ("\t" in "".join(heading))
            )
        for number, row in enumerate(filter(None, table), start=2):
            if any("\n" in cell and torn.search(cell) for cell in row):
                raise InputError(
                    f"{path} row {number}: a quote that is not closed takes in what follows, up "
                    f"to line {table.line_num}: close it, or write it twice"
                )
            name, text = (row[k] if k < len(row) else "" for k in (image, caption))
            rows.append((path.parent / name, text, f"{path} row {number}"))
    except csv.Error as error:
        raise InputError(f"{path} line {table.line_num}: {error}; correct the row") from None
    return rows


def name_hash(name: str) -> int:
    """The number that decides whether a picture is held out, of its file's name alone."""
    return zlib.crc32(os.fsencode(name).decode("utf-8", "replace").encode())


def held_out(names: np.ndarray) -> np.ndarray:
    """Places of the pictures that are held out, ascending, by their names' hashes (M,).

    One in twenty, at most MAX_HELD_OUT, those of the smallest: a picture that was trained on is
    never held out because others were added.
    """
    chosen = np.flatnonzero(names % 20 == 0)
    return np.sort(chosen[np.argsort(names[chosen], kind="stable")[:MAX_HELD_OUT]])


def split_rows(rows: list[tuple[Path, str]]) -> tuple[list, list]:
    """Rows -> (training, held out); of several captions of one picture the first counts."""
    paths = list(dict.fromkeys(path for path, _ in rows))
    chosen = {paths[i] for i in held_out(np.array([name_hash(path.name) for path in paths]))}
    test = {path: text for path, text in reversed(rows) if path in chosen}
    return [(path, text) for path, text in rows if path not in chosen], list(test.items())
