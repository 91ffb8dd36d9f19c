"""Tar shards of captioned pictures, indexed once, then read by address and never extracted.

    00000.tar, 00001.tar, ...    members KEY.jpg|jpeg|png|webp and KEY.txt or KEY.json: WebDataset's
    index/                       made by `python data.py index DIR`: where each picture lies, and
                                 each caption's tokens

Shards are named by a folder, a single .tar, or a pattern such as DIR/train-{0000..2175}.tar, on
disk or behind any URL that fsspec reads (s3://, gs://, http://). The index is mapped into memory,
so that all workers and processes share one copy: 11 bytes a sample, and 2 for each of its tokens.

Nothing in a shard is trusted. Headers alone say what is a picture or a caption; everything else is
passed over and counted; names are keys, never paths; nothing is unpickled or written anywhere.
"""

import json
import multiprocessing
import os
import re
import tarfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import fsspec
import numpy as np
from fsspec.core import url_to_fs
from tqdm import tqdm

import glip
from glip import InputError, encode, write_bytes, write_safely

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
PICTURE_CAP, CAPTION_CAP = 2**26, 2**20  # bytes of a picture, and of a .txt or .json
LONGEST = 254  # tokens of a caption that are kept, start and end token aside
BLOCK = 512  # bytes: a tar's members begin at multiples of it
VERSION = 1

# ------------------------------------------------------------------------------------------------
# Tars, read as untrusted bytes
# ------------------------------------------------------------------------------------------------


def members(file: BinaryIO, length: int, skipped: Counter) -> Iterator[tuple[str, int, int, int]]:
    """(name, offset, size, check) of the plain files in a tar of `length` bytes, by their headers.

    Each header's checksum is verified. After a broken one, or a hole of zeros, the next good one is
    looked for, so that damage costs what it hits and no more; what is passed over is counted by
    reason in `skipped`. `check` tells a header from others.
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
        elif header.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not header.name.endswith("/"):
            yield name or header.name, offset, header.size, check_of(block)
            name = ""
        else:  # links, devices, folders, sparse files
            skipped["not a plain file"] += header.type not in (tarfile.DIRTYPE, tarfile.XGLTYPE)
            name = ""
        if header.type not in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE):
            offset += -(-header.size // BLOCK) * BLOCK
    if offset < length and length - offset < BLOCK:
        skipped["torn"] += 1


def check_of(header: bytes) -> int:
    """16 bits that tell a member's header (512 bytes: name, size, time) from others."""
    return zlib.crc32(header) & 0xFFFF


def long_name(content: bytes, kind: bytes) -> str:
    """The name that a GNU or pax header gives to the member behind it; "" if none."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return content.rstrip(b"\0").decode("utf-8", "replace")
    found = re.search(rb"(?:^|\n)\d+ path=([^\n]*)\n", content)
    return found[1].decode("utf-8", "replace") if found else ""


@dataclass(frozen=True)
class Scan:
    """One shard's samples by key: where pictures lie (M, 2), token ids end to end, caption lengths.

    An address is (offset / 512, bytes); `checks` (M,) tell the header in front of each picture.
    """

    addresses: np.ndarray
    checks: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray
    skipped: dict[str, int]


def scan(location: str) -> Scan:
    """Read a shard's headers and captions, and tokenise these.

    Samples stand in the order of their keys, for fetched shards hold them in order of arrival.
    """
    skipped, found = Counter(), {}
    with reading_ahead(location) as file:
        length = file.seek(0, os.SEEK_END)
        for name, offset, size, check in members(file, length, skipped):
            folder, _, base = name.rpartition("/")
            key, dot, suffix = base.partition(".")
            suffix = (dot + suffix).lower()
            kind = "picture" if suffix in PICTURES else suffix
            record = found.setdefault(f"{folder}/{key}", {})
            if kind not in ("picture", ".txt", ".json"):
                skipped[f"members {printable(suffix)}"] += 1
            elif kind in record:
                skipped["twice the same key"] += 1
            elif not 0 < size <= (PICTURE_CAP if kind == "picture" else CAPTION_CAP):
                skipped[f"{kind.strip('.')} empty or too large"] += 1
            elif kind == "picture":
                record[kind] = (offset // BLOCK, size, check)
            elif ".txt" not in record:
                file.seek(offset)
                record[kind] = file.read(size)
                if kind == ".txt":
                    record.pop(".json", None)  # not needed, and a shard has many
    addresses, checks, tokens, lengths = [], [], [], []
    for key in sorted(found):
        record = found[key]
        caption = caption_of(record)
        if "picture" not in record or not caption:
            if record:
                skipped["no picture" if "picture" not in record else "no caption"] += 1
            continue
        ids = encode(caption)[:LONGEST]
        addresses.append(record["picture"][:2])
        checks.append(record["picture"][2])
        tokens.extend(ids)
        lengths.append(len(ids))
    return Scan(
        np.array(addresses, "<u4").reshape(-1, 2), np.array(checks, "<u2"),
        np.array(tokens, "<u2"), np.array(lengths, "u1"), {k: n for k, n in skipped.items() if n},
    )  # fmt: skip


def caption_of(record: dict[str, bytes]) -> str:
    """A sample's caption: its .txt, else `caption` in its .json; "" if it has none."""
    caption = record.get(".txt", b"").decode("utf-8", "replace")
    if ".txt" not in record and ".json" in record:
        try:
            content = json.loads(record[".json"])
        except (ValueError, RecursionError):
            content = None
        caption = content.get("caption") if isinstance(content, dict) else ""
    if not isinstance(caption, str):
        return ""
    # No longer than it can count, for merging the pieces of one endless word takes for ever.
    return " ".join(word[:200] for word in caption[:4096].split())


def printable(text: str) -> str:
    """A hostile name made fit for a terminal and a log."""
    return "".join(c if c.isprintable() else "?" for c in text)[:20] or "without a suffix"


# ------------------------------------------------------------------------------------------------
# Where shards are, on disk or behind a URL
# ------------------------------------------------------------------------------------------------


def is_remote(location: str) -> bool:
    """Whether fsspec has to fetch it."""
    return "://" in location


def reading_ahead(location: str) -> BinaryIO:
    """Open a shard that is read from front to back."""
    if not is_remote(location):
        return open(location, "rb")
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
        print(f"{location}: left out, unfinished (no _stats.json yet): "
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
            content = json.loads(path.read_text())
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict) and "successes" in content:
            yield path


def size_of(path: str) -> int:
    """Bytes of a shard; raises InputError for one that is not there."""
    try:
        if not is_remote(path):
            return Path(path).stat().st_size
        return int(with_retries(lambda: filesystem(path, os.getpid()).size(path)))
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
    return glip.CACHE / f"index-{zlib.crc32(str(location).encode()):08x}"


def fingerprint(path: str) -> list:
    """Name, bytes, and a checksum of the first and last 64 KiB of a shard."""
    length = size_of(path)

    def ends() -> int:
        with fsspec.open(path, "rb") as file:
            check = zlib.crc32(file.read(2**16))
            file.seek(max(0, length - 2**16))
            return zlib.crc32(file.read(), check)

    return [path.rpartition("/")[2], length, with_told_retries(path, ends)]


def with_told_retries(path: str, call: Callable[[], object]) -> object:
    """with_retries, and in the end a sentence."""
    try:
        return with_retries(call)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{path}: cannot be read ({printable_error(error)}); what was indexed is kept: give "
            "the same command again to go on"
        ) from None


def build(location: str, workers: int) -> dict:
    """Index shards, `workers` of them at a time; returns the content of index.json.

    Parts that an earlier, killed build left are used again; an index that is true already is kept.
    """
    home, paths = index_folder(location), shards_of(location)
    with glip.locked(home, "indexing"):
        return build_in(home, location, paths, workers)


def build_in(home: Path, location: str, paths: list[str], workers: int) -> dict:
    """build, in a folder that no other process writes in."""
    parts = home / "parts"
    prints = [fingerprint(path) for path in tqdm(paths, "looking at shards", leave=False)]
    record = read_record(home)
    if record and [record["version"], record["shards"]] == [VERSION, prints]:
        print(f"{location}: the index is up to date")
        return record
    (home / "index.json").unlink(missing_ok=True)  # it vouches for the rest, which now changes
    parts.mkdir(parents=True, exist_ok=True)
    names = [f"{name}-{length}-{check:08x}.npz" for name, length, check in prints]
    todo = [i for i, name in enumerate(names) if not (parts / name).exists()]
    jobs = [(paths[i], parts / names[i]) for i in todo]
    show = {"desc": f"indexing {location}", "unit": " shards", "initial": len(names) - len(todo)}
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
    for part in parts.iterdir():
        part.unlink()
    parts.rmdir()
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
    found = with_told_retries(location, lambda: scan(location))
    skipped = np.frombuffer(json.dumps(found.skipped).encode(), np.uint8)
    write_safely(part, lambda file: np.savez(
        file, addresses=found.addresses, checks=found.checks, tokens=found.tokens,
        lengths=found.lengths, skipped=skipped,
    ))  # fmt: skip


def join(home: Path, prints: list, parts: Sequence[Path]) -> dict:
    """Put the parts together, in order; index.json is written last."""
    counts, skipped = [], Counter()
    for name in ("addresses", "checks", "tokens", "lengths"):

        def pour(file: BinaryIO, name: str = name) -> None:
            for part in parts:
                with np.load(part) as content:
                    file.write(content[name].tobytes())
                    if name == "lengths":
                        counts.append(len(content[name]))
                        skipped.update(json.loads(content["skipped"].tobytes()))

        write_safely(home / f"{name}.bin", pour)
    record = {"version": VERSION, "shards": prints, "counts": counts, "skipped": dict(skipped)}
    write_bytes(home / "index.json", json.dumps(record).encode())
    return record


def read_record(home: Path) -> dict | None:
    """The content of index.json; None where there is none that can be read."""
    try:
        record = json.loads((home / "index.json").read_text())
        return record if {"version", "shards", "counts", "skipped"} <= record.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


# ------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------


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
            raise InputError(f"{location} has no index: {again}")
        if record["version"] != VERSION:
            raise InputError(f"{home} is an index of another version: {again}")
        paths = {path.rpartition("/")[2]: path for path in shards_of(location)}
        for name, length, _ in record["shards"][:: -1 if is_remote(location) else 1]:
            if name not in paths or size_of(paths[name]) != length:
                raise InputError(f"{location}: {name} is not what was indexed: {again}")
            if is_remote(location):
                break  # one request, for the last; a wrong one elsewhere shows in decoding
        new = len(paths) - len(record["shards"])
        if new:
            print(f"{location}: {new} shards are not in the index and are left out; {again}")
        self.location, self.skipped, self.prints = location, record["skipped"], record["shards"]
        self.paths = [paths[name] for name, _, _ in record["shards"]]
        self.counts = np.array(record["counts"])
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        total = int(self.starts[-1])
        if not total:
            raise InputError(f"{location}: no shard holds a picture with a caption")
        self.lengths = mapped(home / "lengths.bin", "u1", total, again)
        # Where every 64th caption begins: what lies between is added up when it is read.
        sums = np.add.reduceat(self.lengths, np.arange(0, total, 64), dtype=np.int64)
        self.begins = np.concatenate([[0], np.cumsum(sums)])
        self.addresses = mapped(home / "addresses.bin", "<u4", 2 * total, again).reshape(-1, 2)
        self.checks = mapped(home / "checks.bin", "<u2", total, again)
        self.tokens = mapped(home / "tokens.bin", "<u2", int(self.begins[-1]), again)

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

        The header in front of each is read along: it tells a shard that is no longer the one that
        was indexed.
        """
        found = self.fetched(ids) if is_remote(self.location) else self.opened(ids)
        for k, (i, content) in enumerate(zip(ids, found, strict=True)):
            if isinstance(content, bytes):
                right = check_of(content[:BLOCK]) == self.checks[i]
                found[k] = content[BLOCK:] if right else OSError(STALE)
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


def mapped(path: Path, kind: str, count: int, again: str) -> np.ndarray:
    """A file of the index as an array (count,) in shared memory."""
    if not path.is_file() or path.stat().st_size != count * np.dtype(kind).itemsize:
        raise InputError(f"{path} is not whole: {again}")
    # Seen as a plain array, for memmap's own class makes every look at an item slow.
    return np.memmap(path, kind, "r").view(np.ndarray) if count else np.empty(0, kind)


@lru_cache(maxsize=64)  # shards that are open at a time: a window of them and some more
def opened(path: str) -> BinaryIO:
    """A shard, left open; read by offset, so that a fork may share it."""
    return open(path, "rb", buffering=0)
