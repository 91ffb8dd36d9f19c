"""Tar shards of captioned pictures, indexed once, then read by address and never extracted.

    00000.tar, 00001.tar, ...    members KEY.jpg|jpeg|png|webp and KEY.txt or KEY.json: WebDataset's
    index/                       made by `python data.py index DIR`: where each picture lies, and
                                 each caption's tokens

Shards are named by a folder, a single .tar, or a pattern such as DIR/train-{0000..2175}.tar, on
disk or behind any URL that fsspec reads (s3://, gs://, http://). The index is mapped into memory,
so that all workers and processes share one copy: 15 bytes a sample, and 2 for each of its tokens.

Nothing in a shard is trusted. Headers alone say what is a picture or a caption; everything else is
passed over and counted; names are keys, never paths; nothing is unpickled or written anywhere.
"""

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import tarfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import fsspec
import numpy as np
import torch
from fsspec.core import url_to_fs
from torch import Tensor
from tqdm import tqdm

import glip
from glip import InputError, encode
from nanoglip import files
from nanoglip.cli import printable, say
from nanoglip.files import (
    digest,
    locked,
    open_regular,
    read_regular,
    room_for,
    text_of,
    write_bytes,
    write_safely,
)
from nanoglip.sources.pictures import (
    CAPTION_CAP,
    PICTURE_CAP,
    PICTURES,
    Source,
    held_out,
    name_hash,
)
from nanoglip.text import decode_tokens

LONGEST = 254  # tokens of a caption that are kept, start and end token aside

BLOCK = 512  # bytes: a tar's members begin at multiples of it

VERSION = 2

ARRAYS = {"addresses": "<u4", "checks": "<u2", "names": "<u4", "tokens": "<u2", "lengths": "u1"}

PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE)

# --- Tars, read as untrusted bytes ----------------------------------------------------------------


def members(file: BinaryIO, length: int, skipped: Counter) -> Iterator[tuple[str, int, int, int]]:
    """(name, offset, size, crc) of the plain files in a tar of `length` bytes, by their headers.

    Each header's checksum is verified. After a broken one, or a hole of zeros, the next good one is
    looked for, so that damage costs what it hits and no more; what is passed over is counted by
    reason in `skipped`. `crc` is the header's.
    """
    offset, name, lost, empty = 0, "", False, 0
    while offset + BLOCK <= length:
        file.seek(offset)
        block = file.read(BLOCK)
        offset += BLOCK
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
        except tarfile.EOFHeaderError:
            empty += 1
            if empty > 99 and hasattr(file, "raw"):  # a sparse file can have many gigabytes of them
                try:
                    offset = max(offset, file.seek(offset, getattr(os, "SEEK_DATA", 0)) & -BLOCK)
                except OSError:
                    break
            continue
        except (tarfile.HeaderError, ValueError, OverflowError):
            skipped["hole" if empty else "broken header"] += not lost
            lost, empty, name = True, 0, ""
            continue
        skipped["hole"] += empty > 0
        if header.size < 0 or offset + header.size > length:
            skipped["torn"] += 1
            lost, empty, name = True, 0, ""
            continue
        lost, empty = False, 0
        if header.type in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):  # the next one's long name
            name = long_name(file.read(min(header.size, CAPTION_CAP)), header.type)
        elif header.type in PLAIN and not (name := name or header.name).endswith("/"):
            yield name, offset, header.size, zlib.crc32(block)
            name = ""
        else:  # links, devices, folders, sparse files
            skipped["not a plain file"] += header.type not in (tarfile.DIRTYPE, tarfile.XGLTYPE)
            name = ""
        if header.type not in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE):
            offset += -(-header.size // BLOCK) * BLOCK
    if offset < length and length - offset < BLOCK:
        skipped["torn"] += 1


def check_of(crc: int, content: bytes) -> int:
    """16 bits that tell a picture with this crc of its header from others, by its last bytes."""
    return zlib.crc32(content[-BLOCK:], crc) & 0xFFFF


def long_name(content: bytes, kind: bytes) -> str:
    """The name that a GNU or pax header gives to the member behind it; "" if none."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return content.rstrip(b"\0").decode("utf-8", "replace")
    found = re.search(rb"(?:^|\n)\d+ path=([^\n]*)\n", content)
    return found[1].decode("utf-8", "replace") if found else ""


def scan(location: str) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """A shard's samples as ARRAYS, and what is passed over; its captions are tokenised.

    `addresses` (M, 2) are (offset / 512, bytes) of pictures, `checks` (M,) tell each with its
    header from others, `names` (M,) are hashed, `tokens` stand end to end, `lengths` (M,) of them.
    Samples stand in the order of their keys, for fetched shards hold them in order of arrival.
    """
    skipped, found = Counter(), {}
    with reading_ahead(location) as file:
        length = file.seek(0, os.SEEK_END)
        for name, offset, size, crc in members(file, length, skipped):
            folder, _, base = name.rpartition("/")
            key, dot, suffix = base.partition(".")
            suffix = (dot + suffix).lower()
            kind = "picture" if suffix in PICTURES else suffix
            record = found.setdefault(f"{folder}/{key}", {})
            if kind not in ("picture", ".txt", ".json"):
                count(skipped, f"members {printable(suffix)[:20] or 'without a suffix'}")
            elif kind in record:
                skipped["twice the same key"] += 1
            elif not 0 < size <= (PICTURE_CAP if kind == "picture" else CAPTION_CAP):
                skipped[f"{kind.strip('.')} empty or too large"] += 1
            elif kind == "picture":
                file.seek(offset + max(0, size - BLOCK))
                check = check_of(crc, file.read(min(size, BLOCK)))
                record[kind] = ((offset // BLOCK, size), check, name_hash(base))
            elif ".txt" not in record:
                file.seek(offset)
                record[kind] = file.read(size)
                if kind == ".txt":
                    record.pop(".json", None)  # not needed, and a shard has many
    pictures, tokens, lengths = [], [], []
    for key in sorted(found):
        record = found[key]
        caption = caption_of(record)
        if "picture" not in record or not caption:
            if record:
                skipped["no picture" if "picture" not in record else "no caption"] += 1
            continue
        ids = encode(caption)[:LONGEST]
        pictures.append(record["picture"])
        tokens.extend(ids)
        lengths.append(len(ids))
    found = (*(zip(*pictures, strict=True) if pictures else ([], [], [])), tokens, lengths)
    arrays = {name: np.array(x, ARRAYS[name]) for name, x in zip(ARRAYS, found, strict=True)}
    return arrays, {why: n for why, n in skipped.items() if n}


def count(skipped: Counter, why: str, n: int = 1) -> None:
    """Count what is passed over, by 50 reasons at most: a tar can hold any number of suffixes."""
    skipped[why if why in skipped or len(skipped) < 50 else "others"] += n


def caption_of(record: dict[str, bytes]) -> str:
    """A sample's caption: its .txt, else `caption` in its .json; "" if it has none."""
    caption = text_of(record.get(".txt", b""))
    if ".txt" not in record and ".json" in record:
        try:
            content = json.loads(record[".json"])
        except (ValueError, RecursionError):
            content = None
        caption = content.get("caption") if isinstance(content, dict) else ""
    return " ".join(caption.split()) if isinstance(caption, str) else ""


# --- Where shards are, on disk or behind a URL ----------------------------------------------------


def is_remote(location: str) -> bool:
    """Whether fsspec has to fetch it."""
    return "://" in location


def reading_ahead(location: str) -> BinaryIO:
    """Open a shard that is read from front to back."""
    if not is_remote(location):
        return open_regular(location)
    fs = filesystem(location, os.getpid())
    return fs.open(location, "rb", block_size=2**22, cache_type="readahead")


@lru_cache(maxsize=8)
def filesystem(root: str, process: int) -> fsspec.AbstractFileSystem:
    """fsspec's access to a location: one in each process, for connections do not survive a fork."""
    try:
        return url_to_fs(root)[0]
    except (ImportError, ValueError) as error:
        raise InputError(
            f"{root}: {printable_error(error)}; install what fsspec needs for this kind of URL "
            "(s3fs for s3://, gcsfs for gs://)"
        ) from None


def printable_error(error: BaseException) -> str:
    """An error of a library in one line, without addresses in memory."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def with_retries(call: Callable[[], object], tries: int = 4) -> object:
    """Call; on an error of the network wait 0.2, 0.8, 3.2 s and try again, then raise it."""
    for turn in range(tries):
        try:
            return call()
        except FileNotFoundError:
            raise
        except Exception:  # each file system of fsspec has errors of its own
            if turn == tries - 1:
                raise
            time.sleep(0.2 * 4**turn)
    return None


def expand(pattern: str) -> list[str]:
    """train-{0000..0002}.tar -> its three names, as the shell would."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        return [pattern]
    first, last = found.groups()
    names = (f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1))
    return [n for x in names for n in expand(pattern[: found.start()] + x + pattern[found.end() :])]


def shards_of(location: str) -> list[str]:
    """The finished shards of a folder, pattern or file, in order of their names.

    img2dataset writes NAME_stats.json last: where any shard has one, one without is unfinished, and
    named. Raises InputError where there is none at all.
    """
    if location.endswith(".tar"):
        found, finished, fetched = expand(location), set(), False
    elif is_remote(location):
        root, fs = location.rstrip("/"), filesystem(location, os.getpid())
        try:
            listed = with_retries(lambda: fs.ls(root, detail=False))
        except Exception as error:
            raise InputError(
                f"{location}: cannot be listed ({printable_error(error)}); name the shards, as "
                "URL/{00000..00099}.tar"
            ) from None
        names = sorted({str(x).rstrip("/").rpartition("/")[2] for x in listed})
        found = [f"{root}/{name}" for name in names if name.endswith(".tar")]
        finished = {n.removesuffix("_stats.json") for n in names if n.endswith("_stats.json")}
        fetched = bool(finished) or "fetch.json" in names
    else:
        found = sorted(str(path) for path in Path(location).glob("*.tar"))
        finished = {p.name.removesuffix("_stats.json") for p in whole_stats(Path(location))}
        fetched = bool(finished) or (Path(location) / "fetch.json").exists()
    torn = [path for path in found if fetched and Path(path).stem not in finished]
    if torn:
        say(f"{location}: left out, unfinished (no _stats.json yet): "
            f"{', '.join(Path(path).name for path in torn)}")  # fmt: skip
    found = [path for path in found if path not in torn]
    if not found:
        raise InputError(f"{location}: no finished .tar shard; name a folder of shards")
    names = Counter(path.rpartition("/")[2] for path in found)
    if len(names) < len(found):
        raise InputError(
            f"{location}: {names.most_common(1)[0][0]} is there in several folders; give each "
            "folder to --data by itself"
        )
    return found


def whole_stats(folder: Path) -> Iterator[Path]:
    """img2dataset's NAME_stats.json files, without one that a kill left half written."""
    for path in folder.glob("*_stats.json"):
        try:
            content = json.loads(read_regular(path, 2**24))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(content, dict) and isinstance(content.get("successes"), int):
            yield path


TIMES = ("ETag", "etag", "Last-Modified", "LastModified", "updated", "mtime")  # of file systems


def fingerprint(path: str) -> list:
    """[name, bytes, time or ETag] of a shard; raises InputError for one that is not there."""
    try:
        if is_remote(path):
            info = with_retries(lambda: filesystem(path, os.getpid()).info(path))
            size, time = int(info["size"]), next((info[k] for k in TIMES if info.get(k)), "")
        else:
            with open_regular(path) as file:
                size, time = (found := os.fstat(file.fileno())).st_size, found.st_mtime_ns
        return [path.rpartition("/")[2], size, str(time)]
    except Exception as error:
        raise InputError(
            f"{path}: cannot be opened ({printable_error(error)}); check the name"
        ) from None


# ------------------------------------------------------------------------------------------------
# Building the index: a part for each shard, kept until all are there, so that a kill loses little
# ------------------------------------------------------------------------------------------------


def index_folder(location: str) -> Path:
    """Beside the shards of a folder that can be written to; in the cache for all others."""
    folder = Path(location)
    if not is_remote(location) and folder.is_dir():
        home = folder / "index"
        if home.is_dir() or os.access(folder, os.W_OK):
            return home
    return files.CACHE / f"index-{zlib.crc32(os.fsencode(location)):08x}"


def build(location: str, workers: int) -> dict:
    """Index shards, `workers` of them at a time; returns the content of index.json.

    Parts that an earlier, killed build left are used again; an index that is true already is kept.
    """
    home, paths = index_folder(location), shards_of(location)
    with locked(home, "indexing"):
        parts = home / "parts"
        prints = [fingerprint(path) for path in tqdm(paths, "looking at shards", leave=False)]
        record = read_record(home)
        if record and record["shards"] == prints:
            say(f"{location}: the index is up to date")
            return record
        with room_for(home / "index.json"):  # it vouches for the rest, which now changes
            (home / "index.json").unlink(missing_ok=True)
            parts.mkdir(parents=True, exist_ok=True)
        names = [f"{digest([], json.dumps(x))[:32]}.npz" for x in prints]
        todo = [i for i, name in enumerate(names) if not is_whole(parts / name)]
        jobs = [(paths[i], parts / names[i]) for i in todo]
        done = len(names) - len(todo)
        show = {"desc": f"indexing {location}", "unit": " shards", "initial": done}
        if workers < 2 or len(jobs) < 2:
            for job in tqdm(jobs, total=len(names), **show):
                build_part(*job)
        else:
            spawn = multiprocessing.get_context("spawn")  # a fork would copy locked threads
            with ProcessPoolExecutor(min(workers, len(jobs)), spawn, end_with_parent) as pool:
                waiting = [pool.submit(build_part, *job) for job in jobs]
                for job in tqdm(as_completed(waiting), total=len(names), **show):
                    job.result()
        record = join(home, prints, [parts / name for name in names])
        shutil.rmtree(parts)
        return record


@lru_cache  # one watch for a process
def end_with_parent() -> None:
    """End this process when its parent is gone, or two would write what the next start writes."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()


def build_part(location: str, part: Path) -> None:
    """Scan one shard and keep what was found."""
    try:
        arrays, skipped = with_retries(lambda: scan(location))
    except Exception as error:
        raise InputError(
            f"{location}: cannot be read ({printable_error(error)}); what was indexed is kept: "
            "give the same command again to go on"
        ) from None
    skipped = np.frombuffer(json.dumps(skipped).encode(), np.uint8)
    write_safely(part, lambda file: np.savez(file, **arrays, skipped=skipped))


def is_whole(part: Path) -> bool:
    """Whether a part that an earlier build left can be used."""
    with contextlib.suppress(Exception), np.load(part) as content:  # numpy raises many kinds
        json.loads(content["skipped"].tobytes())
        return [content[name].dtype for name in ARRAYS] == [*ARRAYS.values()]
    return False


def join(home: Path, prints: list, parts: Sequence[Path]) -> dict:
    """Put the parts together, in order; index.json is written last."""
    counts, skipped = [], Counter()
    for name in ARRAYS:

        def pour(file: BinaryIO, name: str = name) -> None:
            for part in parts:
                with np.load(part) as content:
                    file.write(content[name].tobytes())
                    if name == "lengths":
                        counts.append(len(content[name]))
                        for why, n in json.loads(content["skipped"].tobytes()).items():
                            count(skipped, why, n)

        write_safely(home / f"{name}.bin", pour)
    record = {"version": VERSION, "shards": prints, "counts": counts, "skipped": dict(skipped)}
    record["digest"] = digest_of(home, counts, record["skipped"])
    write_bytes(home / "index.json", json.dumps(record).encode())
    return record


def digest_of(home: Path, counts: list[int], skipped: dict[str, int]) -> str:
    """A checksum of all that an index holds but the shards' times."""
    return digest((home / f"{name}.bin" for name in ARRAYS), json.dumps([counts, skipped]))


def read_record(home: Path) -> dict | None:
    """The content of index.json; None where it or what it stands for is not what was written."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        record = json.loads(read_regular(home / "index.json", 2**30))
        kinds = [[*map(type, row)] for row in record["shards"]]
        told = [record["version"], kinds, digest_of(home, record["counts"], record["skipped"])]
        if told == [VERSION, [[str, int, str]] * len(record["counts"]), record["digest"]]:
            return record
    return None


# --- Reading --------------------------------------------------------------------------------------


STALE = "the shard is not what was indexed: give python data.py index again"


class Index:
    """Indexed shards: sample i's encoded picture and its caption's tokens, i running over shards.

    `counts` (S,): samples of each shard; `starts` (S + 1,): where each shard's begin.
    Raises InputError for an index that is missing or does not fit the shards.
    """

    def __init__(self, location: str) -> None:
        home, again = index_folder(location), f"python data.py index {location}"
        record = read_record(home)
        if record is None:
            raise InputError(f"{location} has no index of this version that is whole: {again}")
        paths = {path.rpartition("/")[2]: path for path in shards_of(location)}
        for row in record["shards"][:: -1 if is_remote(location) else 1]:
            name = row[0]
            if name not in paths or fingerprint(paths[name]) != row:
                raise InputError(f"{location}: {name} is not what was indexed: {again}")
            if is_remote(location):
                break  # one request, for the last; a wrong one elsewhere shows in decoding
        new = len(paths) - len(record["shards"])
        if new:
            say(f"{location}: {new} shards are not in the index and are left out; {again}")
        self.location, self.skipped, self.digest = location, record["skipped"], record["digest"]
        self.paths = [paths[name] for name, _, _ in record["shards"]]
        self.counts = np.array(record["counts"])
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        total = int(self.starts[-1])
        if not total:
            raise InputError(f"{location}: no shard holds a picture with a caption")
        self.lengths = mapped(home, "lengths", total)
        # Where every 64th caption begins: what lies between is added up when it is read.
        sums = np.add.reduceat(self.lengths, np.arange(0, total, 64), dtype=np.int64)
        self.begins = np.concatenate([[0], np.cumsum(sums)])
        self.addresses = mapped(home, "addresses", 2 * total).reshape(-1, 2)
        self.checks, self.names = (mapped(home, name, total) for name in ("checks", "names"))
        self.tokens = mapped(home, "tokens", int(self.begins[-1]))

    def __reduce__(self) -> tuple:
        return Index, (self.location,)  # a spawned worker maps the files itself

    def __len__(self) -> int:
        return len(self.addresses)

    def shard(self, i: int) -> int:
        """The number of the shard that holds sample i."""
        return int(np.searchsorted(self.starts, i, "right")) - 1

    def where(self, i: int) -> str:
        """Where sample i's picture lies, for people."""
        block, size = self.addresses[i].tolist()
        return f"{self.paths[self.shard(i)].rpartition('/')[2]} bytes {block * BLOCK}+{size}"

    def caption(self, i: int) -> np.ndarray:
        """The token ids of sample i's caption, without start and end."""
        block = i // 64
        begin = int(self.begins[block] + self.lengths[block * 64 : i].sum(dtype=np.int64))
        return self.tokens[begin : begin + int(self.lengths[i])]

    def encoded(self, ids: np.ndarray) -> list[bytes | Exception]:
        """The encoded pictures of samples; the error for each that cannot be read.

        The header in front of each is read along: with the picture's end it tells a shard that is
        no longer the one that was indexed.
        """
        found = self.fetched(ids) if is_remote(self.location) else self.opened(ids)
        for k, (i, content) in enumerate(zip(ids, found, strict=True)):
            if isinstance(content, bytes):
                crc, content = zlib.crc32(content[:BLOCK]), content[BLOCK:]
                found[k] = content if check_of(crc, content) == self.checks[i] else OSError(STALE)
        return found

    def opened(self, ids: np.ndarray) -> list[bytes | Exception]:
        """Headers and pictures from disk."""
        found = []
        for i, (block, size) in zip(ids, self.addresses[ids].tolist(), strict=True):
            try:
                file = opened(self.paths[self.shard(i)])
                content = os.pread(file.fileno(), BLOCK + size, (block - 1) * BLOCK)
            except OSError as error:
                content = error
            if isinstance(content, bytes) and len(content) != BLOCK + size:
                content = OSError("the shard was cut short")
            found.append(content)
        return found

    def fetched(self, ids: np.ndarray) -> list[bytes | Exception]:
        """The same from behind a URL: all ranges at once, what failed up to three times more."""
        fs = filesystem(self.location, os.getpid())
        begins = (self.addresses[ids, 0].astype(int) - 1) * BLOCK
        ends = begins + BLOCK + self.addresses[ids, 1]
        paths = [fs._strip_protocol(self.paths[self.shard(i)]) for i in ids]
        found = [OSError("not read")] * len(ids)
        for turn in range(4):
            todo = [k for k, content in enumerate(found) if isinstance(content, Exception)]
            if not todo:
                break
            time.sleep(0.2 * 4 ** (turn - 1) if turn else 0)
            ranges = [[x[k] for k in todo] for x in (paths, begins.tolist(), ends.tolist())]
            try:
                contents = fs.cat_ranges(*ranges, on_error="return")
            except Exception as error:  # some file systems raise all the same
                contents = [error] * len(todo)
            for k, content in zip(todo, contents, strict=True):
                if isinstance(content, bytes) and len(content) != ends[k] - begins[k]:
                    content = OSError("the server sent another range than asked for")
                found[k] = content
        return found


def mapped(home: Path, name: str, count: int) -> np.ndarray:
    """One of an index's ARRAYS, (count,), in shared memory."""
    # Seen as a plain array, for memmap's own class makes every look at an item slow.
    kind = ARRAYS[name]
    if not count:
        return np.empty(0, kind)
    return np.memmap(home / f"{name}.bin", kind, "r", shape=count).view(np.ndarray)


@lru_cache(maxsize=64)  # shards that are open at a time: a window of them and some more
def opened(path: str) -> BinaryIO:
    """A shard, left open; read by offset, so that a fork may share it."""
    return open(path, "rb", buffering=0)


# Shards, and several sources as one
class Shards(Source):
    """Indexed shards."""

    def __init__(self, location: str, image_size: int) -> None:
        self.name, self.image_size, self.index = location, image_size, Index(location)
        self.shard_starts, total = self.index.starts, len(self.index)
        self.held = held_out(self.index.names)
        left_out = {f"left out: {why}": n for why, n in self.index.skipped.items()}
        self.counts = {"pictures": total, "shards": len(self.index.counts), **left_out}

    def __len__(self) -> int:
        return len(self.index)

    def encoded(self, ids: np.ndarray) -> list[bytes | Exception]:
        return self.index.encoded(ids)

    def where(self, i: int) -> str:
        return self.index.where(i)

    def stamp(self, ids: np.ndarray) -> str:
        return f"{self.name} {self.index.digest}"

    def texts(self, ids: np.ndarray) -> list[str]:
        return [decode_tokens(self.index.caption(i)) for i in ids]

    def tokens(self, ids: np.ndarray) -> Tensor:
        captions = [self.index.caption(i)[:75] for i in ids]
        tokens = np.zeros((len(ids), 77), np.int64)
        for row, caption in zip(tokens, captions, strict=True):
            row[0], row[1 : 1 + len(caption)], row[1 + len(caption)] = glip.START, caption, glip.END
        return torch.from_numpy(tokens)
