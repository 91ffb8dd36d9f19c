"""Your own captioned pictures: a folder, a table, or indexed shards, behind one interface.

    read(ids, draws)    decoded, cropped at random by the draws -> (ids, images, what was bad)
    texts(ids)          captions;   tokens(ids)  the same, for the text tower
    held                ids of the pictures that are held out

Pictures are not trusted: the size in the header is checked before anything is decoded, formats are
four, and what cannot be decoded whole is counted by reason and replaced by the picture that follows
it, a function of its number alone.
"""

import csv
import hashlib
import io
import os
import re
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from glip import InputError, tokenize
from nanoglip import files
from nanoglip.cli import say
from nanoglip.files import cached, read_regular, text_of

# --- Decode and crop ------------------------------------------------------------------------------

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")

PIXEL_CAP = 2**26  # pixels of a picture: a header that claims more is a bomb until proven otherwise

CROP_SCALE = (0.5, 1.0)  # share of the area that a training crop covers, in GLIP's paper

DRAWS = 8  # random numbers that one augmented picture may use


SCANS_CAP = 100  # of a JPEG: each costs as much as a picture, and can be a few bytes

MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]", re.DOTALL)  # of a JPEG's segment

TOO_LARGE = f"over {PIXEL_CAP:,} pixels, or none"

LICENCE = (
    "The lists of Conceptual Captions may be freely used; the pictures belong to their owners, "
    "come as they are, and are not for redistribution."
)


class BadPicture(ValueError):
    """A picture that cannot be used, for the reason that it tells."""


def decode(
    content: bytes, side: int, finish: Callable[[Image.Image], Image.Image] | None = None
) -> np.ndarray:
    """Encoded bytes -> RGB pixels (h, w, 3), upright, on white; JPEG at a fraction if enough.

    "Enough" leaves the shorter side at 2 x `side` or more. `finish` makes RGB in another way than
    upright() does. Raises BadPicture.
    """
    try:
        check_scans(content)
        if content[:2] == b"\xff\xd8" and b"Exif\0\0" not in content:
            height, width, space, _ = simplejpeg.decode_jpeg_header(content)
            check_pixels(width, height)
            if space != "CMYK":
                room = 2 * side
                return simplejpeg.decode_jpeg(content, min_height=room, min_width=room)
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            check_pixels(*image.size)
            image.draft("RGB", (2 * side, 2 * side))
            return np.asarray((finish or upright)(image))
    except BadPicture:
        raise
    except Image.DecompressionBombError:
        raise BadPicture(TOO_LARGE) from None
    except Exception as error:  # decoders raise many kinds for torn and hostile bytes
        if "MAX_TEXT" in str(error) and len(plain := without_texts(content)) < len(content):
            return decode(plain, side, finish)
        reason = type(error).__name__ if isinstance(error, MemoryError) else str(error)
        if "cannot identify" in reason or not reason:  # it names an address in memory
            reason = f"not one of {', '.join(FORMATS)}"
        raise BadPicture(reason.split("\n")[0].partition(" (")[0][:80]) from None


def check_pixels(width: int, height: int) -> None:
    """Refuse a bomb by its header."""
    if not 0 < width * height <= PIXEL_CAP:
        raise BadPicture(TOO_LARGE)


def check_scans(content: bytes) -> None:
    """Refuse a JPEG that would be decoded for hours."""
    if content[:2] != b"\xff\xd8" or content.count(b"\xff\xda") <= SCANS_CAP:
        return
    scans, found = 0, MARKER.search(content, 2)
    while found and found[0][-1] != 0xD9 and scans <= SCANS_CAP:  # till the picture's end
        scans, place = scans + (found[0][-1] == 0xDA), found.end()
        # Not inside metadata, which may hold whole pictures.
        found = MARKER.search(content, place + int.from_bytes(content[place : place + 2], "big"))
    if scans > SCANS_CAP:
        raise BadPicture(f"over {SCANS_CAP} scans")


def without_texts(png: bytes) -> bytes:
    """A PNG without its texts and colour profile, for which Pillow has limits."""
    kept, place = bytearray(png[:8]), 8
    while place < len(png):
        end = place + 12 + int.from_bytes(png[place : place + 4], "big")
        if png[place + 4 : place + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept += png[place:end]
        place = end
    return bytes(kept)


def upright(image: Image.Image) -> Image.Image:
    """Turned as its camera was held, on white, RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # convert() would cut at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def read_picture(path: Path | str, side: int) -> Image.Image:
    """A picture's file, decoded; raises InputError for one that cannot be."""
    try:
        return Image.fromarray(decode(read_regular(path, PICTURE_CAP), side))
    except (OSError, BadPicture) as error:
        raise InputError(f"{path}: not a readable picture ({error})") from None


def random_crop(
    width: int, height: int, draw: np.ndarray, scale: tuple[float, float] = CROP_SCALE
) -> tuple[int, int, int, int]:
    """Random-resized crop: area share in `scale`, aspect 3/4 to 4/3; three tries, then cut."""
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
    """Bicubic, as torchvision does it. (h, w, 3) -> (3, height, width) bytes."""
    image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None]          # channels last
    return F.interpolate(image, (height, width), mode="bicubic", antialias=True)[0]


def cropped(
    pixels: np.ndarray, draw: np.ndarray, side: int, scale: tuple[float, float]
) -> Tensor:
    """A random crop, resized: torchvision's RandomResizedCrop. (h, w, 3) -> (3, S, S) bytes."""
    left, top, width, height = random_crop(pixels.shape[1], pixels.shape[0], draw, scale)
    return resize(pixels[top : top + height, left : left + width], side, side)


def centred(pixels: np.ndarray, side: int) -> Tensor:
    """The shorter side resized, the centre cut: Resize and CenterCrop. (h, w, 3) -> (3, S, S)."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    for axis, length in ((0, height), (1, width)):
        if length > 8 * short:  # a thread of a picture: what is far from its centre is not needed
            start = (length - 8 * short) // 2
            pixels = np.take(pixels, range(start, start + 8 * short), axis)
    height, width = pixels.shape[:2]
    image = resize(pixels, side * height // short, side * width // short)
    top, left = (round((length - side) / 2) for length in image.shape[1:])
    return image[:, top : top + side, left : left + side]


# --- What folders, tables and shards have in common -----------------------------------------------

MAX_HELD_OUT = 5000  # pictures of a source

PROBED = 200  # pictures that are decoded before anything starts


class Source:
    """Numbered captioned pictures; `held` (H,): ids that are held out, in ascending order.

    `left_out`: rows of the data, as given, that have no number here. `crop_scale`: smallest and
    largest share of the area that a training crop covers.

    What only some sources have is empty in the others: `concept` (M,), the number of each picture's
    caption in `captions`; `flags` (C,), where captions are class names: which of them are flags;
    `shard_starts` (S + 1,); `sources` and their `weights`, passes in an epoch.
    """

    name: str
    image_size: int
    held: np.ndarray
    left_out = np.empty(0, int)
    crop_scale = CROP_SCALE
    counts: dict[str, int]
    captions: Sequence[str] = ()
    concept: np.ndarray | None = None
    flags: np.ndarray | None = None
    shard_starts = np.empty(0, int)
    sources: Sequence["Source"] = ()
    weights: Sequence[float] = ()
    publishable = True  # whether figures may show its pictures

    def __len__(self) -> int:
        raise NotImplementedError

    def encoded(self, ids: np.ndarray) -> list[bytes | Exception]:
        """Encoded pictures, or the error for each that cannot be read."""
        raise NotImplementedError

    def where(self, i: int) -> str:
        """Where picture i is, for people."""
        raise NotImplementedError

    def stamp(self, ids: np.ndarray) -> str:
        """What changes when captions change, or the pictures `ids`: the cache's key."""
        raise NotImplementedError

    def texts(self, ids: np.ndarray) -> list[str]:
        """Captions of pictures."""
        raise NotImplementedError

    def tokens(self, ids: np.ndarray) -> Tensor:
        """Token ids of captions, (B, T)."""
        return tokenize(self.texts(ids))

    def prompted(self, ids: np.ndarray, draws: np.ndarray) -> list[str]:
        """Class names of pictures in templates that draws (B,) choose."""
        raise NotImplementedError

    def prompts(self) -> dict[str, list[str]]:
        """All class names in each template that is evaluated; empty where captions are texts."""
        return {}

    def examples(self, ids: np.ndarray) -> list[str]:
        """What tells these pictures from others, wherever the data lie."""
        return [Path(self.where(i)).name for i in ids]

    def free_art(self) -> "Source":
        """The source in the place of this one whose pictures figures may show."""
        return self

    def following(self, i: int) -> int:
        """The picture that stands in for a bad one: the next that is not held out."""
        i = (i + 1) % len(self)
        place = int(np.searchsorted(self.held, i))
        while place < len(self.held) and self.held[place] == i:
            i, place = (i + 1) % len(self), place + 1
        return i

    def image(
        self, content: bytes | Exception, draw: np.ndarray | None, aspect: np.ndarray | None = None
    ) -> Tensor:
        """One picture from its bytes, (3, S, S) bytes, as read() says. Raises BadPicture."""
        if isinstance(content, Exception):
            raise BadPicture(f"{type(content).__name__}: {content}"[:100])
        pixels = decode(content, self.image_size)
        if aspect is not None:
            aspect[:] = pixels.shape[1] / pixels.shape[0]
            return resize(pixels, self.image_size, self.image_size)
        if draw is None:
            return centred(pixels, self.image_size)
        return cropped(pixels, draw, self.image_size, self.crop_scale)

    def read(
        self, ids: np.ndarray, draws: np.ndarray | None, aspects: np.ndarray | None = None
    ) -> tuple[np.ndarray, Tensor, list[list[str]]]:
        """ids (B,), draws (B, DRAWS) -> ids after replacement, images (B, 3, S, S), bad ones.

        Pictures are cropped by the draws; without draws they are centred squares. If `aspects` (B,)
        is given, they are whole, squeezed into the square, and their width / height is put there.

        A bad one is [source, where, reason]. After a hundred bad ones in a row the picture is
        black, and it is for --max-bad to stop the run.
        """
        ids, bad = np.array(ids), []
        images = torch.empty(len(ids), 3, self.image_size, self.image_size, dtype=torch.uint8)
        for k, content in enumerate(self.encoded(ids)):
            first = len(bad)
            while True:
                try:
                    draw = None if draws is None else draws[k]
                    aspect = None if aspects is None else aspects[k : k + 1]
                    images[k] = self.image(content, draw, aspect)
                    break
                except BadPicture as error:
                    bad.append([self.name, self.where(ids[k]), str(error)])
                if len(bad) - first >= min(100, len(self)):
                    images[k] = 0
                    break
                ids[k] = self.following(ids[k])
                (content,) = self.encoded(ids[k : k + 1])
        return ids, images, bad

    def render(self, ids: np.ndarray) -> Tensor:
        """Held-out pictures `ids`, centred squares, (B, 3, S, S) bytes. Raises InputError."""
        images = torch.empty(len(ids), 3, self.image_size, self.image_size, dtype=torch.uint8)
        for k, (i, content) in enumerate(zip(ids, self.encoded(ids), strict=True)):
            try:
                images[k] = self.image(content, None)
            except BadPicture as error:
                raise InputError(
                    f"{self.where(i)} is held out and was read before, and now cannot be "
                    f"({error}): look after the data"
                ) from None
        return images

    def check_readable(self, max_bad: float) -> np.ndarray:
        """Decode the first PROBED pictures and all held-out ones; returns the good held-out ones.

        Bad ones are named. Raises InputError if more than max_bad of them are bad.
        """
        first = np.arange(min(PROBED, len(self)))
        ids = np.union1d(first, self.held).astype(int)

        def trouble(i: int) -> str | None:
            try:
                self.image(self.encoded(np.array([i]))[0], None)
            except BadPicture as error:
                return str(error)
            return None

        def check() -> dict[str, str]:
            with ThreadPoolExecutor() as pool:
                found = zip(ids.tolist(), pool.map(trouble, ids.tolist()), strict=True)
                return {str(i): why for i, why in found if why}

        stamp = os.fsencode(f"{self.stamp(ids)} {self.image_size}")
        key = hashlib.sha256(stamp + ids.tobytes())
        path = files.CACHE / f"probe-{key.hexdigest()[:16]}.json"
        bad = {} if path.is_file() else {int(i): why for i, why in check().items()}
        if not bad and not path.is_file():  # what was bad may have been the network, or be repaired
            cached(path, dict)
        for i, why in list(bad.items())[:10]:
            say(f"cannot be read: {self.where(i)} ({why})")
        if bad:
            say(f"{self.name}: {len(bad)} of the {len(ids)} pictures looked at cannot be read")
        if len(bad) > max_bad * len(ids):
            raise InputError(
                f"{self.name}: {len(bad)} of {len(ids)} pictures cannot be read, the first is "
                f"{self.where(min(bad))} ({bad[min(bad)]}): repair or remove them, or raise "
                f"--max-bad {max_bad:g}"
            )
        return np.array([i for i in self.held if i not in bad], int)


class HeldOut:
    """The held-out pictures of some sources, as evaluation sees them.

    `captions`: the distinct ones, or all class names; `concept` (M,): each picture's. `flags`:
    which class names are flags, None where captions are texts.
    """

    def __init__(self, sources: Sequence[Source], chosen: Sequence[np.ndarray]) -> None:
        self.sources, self.chosen, self.flags = sources, chosen, sources[0].flags
        texts = [t for s, ids in zip(sources, chosen, strict=True) for t in s.texts(ids)]
        self.captions = sorted(set(texts)) if self.flags is None else sources[0].captions
        number = {text: i for i, text in enumerate(self.captions)}
        self.concept = np.array([number[text] for text in texts], int)
        self.ends = np.cumsum([len(ids) for ids in chosen])

    def __len__(self) -> int:
        return len(self.concept)

    @property
    def publishable(self) -> bool:
        """Whether figures may show the pictures."""
        return all(source.publishable for source in self.sources)

    def free_art(self) -> "HeldOut":
        """The pairs in the place of these whose pictures figures may show."""
        if self.flags is None:
            return self
        source = self.sources[0].free_art()
        return HeldOut([source], [source.held])

    def prompts(self) -> dict[str, list[str]]:
        """All class names in each template that is evaluated; empty where captions are texts."""
        return self.sources[0].prompts()

    def examples(self) -> list[str]:
        """What tells these pictures from others, wherever the data lie."""
        each = zip(self.sources, self.chosen, strict=True)
        return [example for source, ids in each for example in source.examples(ids)]

    def render(self, ids: np.ndarray) -> Tensor:
        """Pictures `ids` (B,) -> (B, 3, S, S) bytes."""
        size, number = self.sources[0].image_size, np.searchsorted(self.ends, ids, "right")
        images = torch.empty(len(ids), 3, size, size, dtype=torch.uint8)
        for s in np.unique(number):
            places = np.flatnonzero(number == s)
            own = self.chosen[s][ids[places] - self.ends[s]]  # counted from the end
            images[places] = self.sources[s].render(own)
        return images


# --- Folders and tables ---------------------------------------------------------------------------

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}

PATH_COLUMNS = ("filepath", "image_path", "path", "image", "file", "filename", "file_name")

CAPTION_COLUMNS = ("caption", "title", "text", "description")


def own_pictures(path: Path) -> list[tuple[Path, str]]:
    """(picture, caption) of a folder or a CSV/TSV; raises InputError with the file and row."""
    if path.is_dir():
        pairs = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES)
        rows = [(f, f.with_suffix(".txt")) for f in pairs if f.with_suffix(".txt").is_file()]
        if len(rows) < len(pairs):
            alone = len(pairs) - len(rows)
            say(f"{path}: {alone} of {len(pairs)} pictures have no .txt beside them: left out")
        if not rows:
            raise InputError(f"{path}: no picture has an equally named .txt beside it; add some")
        rows = [(f, text_of(read_regular(x, CAPTION_CAP)), str(x)) for f, x in rows]
    else:
        rows = table_rows(path)
        if not rows:
            raise InputError(f"{path}: there is no row below the heading; add pictures")
    for _, text, where in rows:
        if not text.strip():
            raise InputError(f"{where}: the caption is empty, or no UTF-8; mend or remove it")
    return [(picture, " ".join(text.split())) for picture, text, _ in rows]


def table_rows(path: Path) -> list[tuple[Path, str, str]]:
    """(picture, caption, where) of a CSV/TSV's rows; raises InputError with the file and row."""
    tabs, rows, endings = path.suffix.lower() == ".tsv", [], "|".join(SUFFIXES).replace(".", "\\.")
    torn = re.compile(r"\t" if tabs else rf'({endings})"?\s*(,|$)', re.IGNORECASE | re.MULTILINE)
    csv.field_size_limit(2**24)
    text = text_of(content := read_regular(path, 2**32))
    if content and not text:
        raise InputError(f"{path}: it is no UTF-8, or holds NUL bytes; save it as UTF-8")
    lines = io.StringIO(text, newline="")
    table = csv.reader(lines, delimiter="\t" if tabs else ",")
    try:
        heading = next(table, [])
        columns = {name.strip().lower(): place for place, name in enumerate(heading)}
        image = next((columns[c] for c in PATH_COLUMNS if c in columns), None)
        caption = next((columns[c] for c in CAPTION_COLUMNS if c in columns), None)
        if image is None or caption is None:
            raise InputError(
                f"{path}: the first row must name a picture column ({', '.join(PATH_COLUMNS)}) "
                f"and a caption column ({', '.join(CAPTION_COLUMNS)}); it has "
                f"{', '.join(columns) or 'nothing'}"
                + "; name a file with tabs between columns .tsv" * ("\t" in "".join(columns))
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
        raise InputError(f"{path} line {table.line_num}: {error}; mend the row") from None
    kinds = ((x.suffix.lower(), Path(text).suffix.lower()) for x, text, _ in rows)
    if rows and all(x not in SUFFIXES and other in SUFFIXES for x, other in kinds):
        raise InputError(
            f"{path}: '{heading[caption]}' holds pictures' names and '{heading[image]}' none: swap "
            "the two in the first row"
        )
    return rows


class Pictures(Source):
    """Pictures in files; equal captions are one concept, `concept` (M,) is each picture's."""

    def __init__(self, rows: list[tuple[Path, str]], image_size: int, name: str) -> None:
        self.name, self.image_size = name, image_size
        self.paths = [path for path, _ in rows]
        self.captions = sorted({text for _, text in rows})
        number = {text: i for i, text in enumerate(self.captions)}
        self.concept = np.array([number[text] for _, text in rows], dtype=int)
        self.held = np.empty(0, int)
        self.counts = {"pictures": len(set(self.paths)), "rows": len(rows)}

    def __len__(self) -> int:
        return len(self.paths)

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
        rows = "\n".join(f"{path} {self.captions[i]}"
                         for path, i in zip(self.paths, self.concept, strict=True))  # fmt: skip
        found = [self.paths[i].stat() if self.paths[i].is_file() else None for i in ids]
        return rows + str([x and (x.st_size, x.st_mtime_ns) for x in found])

    def texts(self, ids: np.ndarray) -> list[str]:
        return [self.captions[self.concept[i]] for i in ids]


def held_out(names: np.ndarray) -> np.ndarray:
    """Places of the pictures that are held out, ascending, by their names' hashes (M,).

    One in twenty, at most MAX_HELD_OUT, those of the smallest: pictures that come later never bring
    one to them that was trained on before.
    """
    chosen = np.flatnonzero(names % 20 == 0)
    return np.sort(chosen[np.argsort(names[chosen], kind="stable")[:MAX_HELD_OUT]])


def split_rows(rows: list[tuple[Path, str]]) -> tuple[list, list]:
    """Rows -> (training, held out); of several captions of one picture the first counts."""
    paths = list(dict.fromkeys(path for path, _ in rows))
    chosen = {paths[i] for i in held_out(np.array([name_hash(path.name) for path in paths]))}
    test = {path: text for path, text in reversed(rows) if path in chosen}
    return [(path, text) for path, text in rows if path not in chosen], list(test.items())


class Mixed(Source):
    """Several sources as one, their numbers one behind the other; `weights`: passes an epoch."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]) -> None:
        self.sources, self.weights, self.image_size = sources, weights, sources[0].image_size
        self.starts = np.concatenate([[0], np.cumsum([len(source) for source in sources])])
        self.name = " + ".join(source.name for source in sources)
        self.held = np.concatenate(
            [source.held + start for source, start in zip(sources, self.starts, strict=False)]
        )
        self.counts = {f"{source.name}: {what}": n
                       for source in sources for what, n in source.counts.items()}  # fmt: skip

    def __len__(self) -> int:
        return int(self.starts[-1])

    def where(self, i: int) -> str:
        ((source, start, _),) = self.parts(np.array([i]))
        return f"{source.name} {source.where(i - start)}"

    def parts(self, ids: np.ndarray) -> list[tuple[Source, int, np.ndarray]]:
        """(source, where it starts, places in `ids`) of each source that these ids touch."""
        number = np.searchsorted(self.starts, ids, "right") - 1
        return [
            (self.sources[s], int(self.starts[s]), np.flatnonzero(number == s))
            for s in np.unique(number)
        ]

    def read(
        self, ids: np.ndarray, draws: np.ndarray | None, aspects: np.ndarray | None = None
    ) -> tuple[np.ndarray, Tensor, list[list[str]]]:
        ids, bad = np.array(ids), []
        images = torch.empty(len(ids), 3, self.image_size, self.image_size, dtype=torch.uint8)
        for source, start, places in self.parts(ids):
            own = None if draws is None else draws[places]
            shape = None if aspects is None else aspects[places]  # a copy
            found, images[places], more = source.read(ids[places] - start, own, shape)
            ids[places] = found + start
            if aspects is not None:
                aspects[places] = shape
            bad += more
        return ids, images, bad

    def stamp(self, ids: np.ndarray) -> str:
        number = np.searchsorted(self.starts, ids, "right") - 1
        return "\n".join(
            source.stamp(ids[number == s] - self.starts[s]) for s, source in enumerate(self.sources)
        )

    def texts(self, ids: np.ndarray) -> list[str]:
        texts = [""] * len(ids)
        for source, start, places in self.parts(ids):
            for place, text in zip(places, source.texts(ids[places] - start), strict=True):
                texts[place] = text
        return texts

    def tokens(self, ids: np.ndarray) -> Tensor:
        tokens = torch.zeros(len(ids), 77, dtype=torch.long)
        for source, start, places in self.parts(ids):
            tokens[places] = source.tokens(ids[places] - start)
        return tokens



PICTURES = (".jpg", ".jpeg", ".png", ".webp")



PICTURE_CAP, CAPTION_CAP = 2**26, 2**20  # bytes of a picture, and of a .txt or .json



def name_hash(name: str) -> int:
    """What decides whether a picture is held out: its file's name, wherever it lies."""
    return zlib.crc32(os.fsencode(name).decode("utf-8", "replace").encode())
