"""Tar shards of captioned pictures, indexed once, then read by address and never extracted.

    00000.tar, 00001.tar, ...    WebDataset's members: KEY.jpg|jpeg|png|webp, KEY.txt or KEY.json
    index/                       by `python data.py index DIR`: addresses of pictures, tokens

Shards are named by a folder, a single .tar, or a pattern such as DIR/train-{0000..2175}.tar, on
disk or behind any URL that fsspec reads (s3://, gs://, http://). The index is memory-mapped, so
that all processes share one copy: 15 bytes a sample, and 2 for each of its tokens.

Shards are not trusted: headers alone decide what is a picture or a caption, everything else is
skipped and counted, names are keys and never paths, and nothing is unpickled or extracted.
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
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import glip
from glip import InputError, encode
from nanoglip import files
from nanoglip.cli import counted, say
from nanoglip.sources import pictures
from nanoglip.text import decode_tokens

VERSION = 2
LONGEST = 254  # tokens of a caption that are kept, without start and end token
BLOCK = 512  # bytes: a tar's members begin at multiples of it
PAX_PATH = re.compile(rb"(?:^|\n)\d+ path=([^\n]*)(?:\n|$)")
CAPS = {"picture": pictures.PICTURE_CAP} | dict.fromkeys((".txt", ".json"), pictures.CAPTION_CAP)
ARRAYS = {"addresses": "<u4", "checks": "<u2", "names": "<u4", "tokens": "<u2", "lengths": "u1"}

# --- Reading a tar --------------------------------------------------------------------------------


def members(file: BinaryIO, length: int, skipped: Counter) -> Iterator[tuple[str, int, int, int]]:
    """(name, offset, size, crc of the header) of the plain files in a tar of `length` bytes.

    tarfile stops at damage. Here each header's checksum is verified, and after a broken one or a
    hole of zeros the next good one is searched. What is skipped is counted by reason in `skipped`.
    """
    offset, name, lost, zeros = 0, "", False, 0
    while offset + BLOCK <= length:
        file.seek(offset)
        block = file.read(BLOCK)
        offset += BLOCK
        given, name = name, ""  # a long name is for the next header only
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
        except tarfile.EOFHeaderError:
            zeros += 1
            if zeros > 99 and hasattr(file, "raw"):  # a sparse file can have gigabytes of them
                try:
                    offset = max(offset, file.seek(offset, getattr(os, "SEEK_DATA", 0)) & -BLOCK)
                except OSError:
                    break
            continue
        except (tarfile.HeaderError, ValueError, OverflowError):
            skipped["hole" if zeros else "broken header"] += not lost
            lost, zeros = True, 0
            continue
        skipped["hole"] += zeros > 0
        lost, zeros = not 0 <= header.size <= length - offset, 0
        if lost:
            skipped["torn"] += 1
            continue
        if header.type in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            content = file.read(min(header.size, pictures.CAPTION_CAP)).rstrip(b"\0")
            found = PAX_PATH.search(content) if header.type == tarfile.XHDTYPE else [0, content]
            name = found[1].decode("utf-8", "replace") if found else ""
        elif header.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
            yield given or header.name, offset, header.size, zlib.crc32(block)
        elif header.type not in (tarfile.DIRTYPE, tarfile.XGLTYPE):  # links, devices, sparse files
            skipped["not a plain file"] += 1
        if header.type not in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE):
            offset += -(-header.size // BLOCK) * BLOCK
    skipped["torn"] += 0 < length - offset < BLOCK


def check_of(crc: int, content: bytes) -> int:
    """16 bits of a header's crc and a picture's last bytes, to recognise the picture by."""
    return zlib.crc32(content[-BLOCK:], crc) & 0xFFFF


def scan(location: str) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """A shard's samples as ARRAYS, in the order of their keys, and what was skipped by reason.

    `addresses` (M, 2): (offset / 512, bytes) of the pictures; `checks` (M,) recognise each with its
    header; `names` (M,): hashes; `tokens`: end to end, `lengths` (M,) of each caption.
    """
    skipped, found = Counter(), {}
    ahead = {"block_size": 2**22, "cache_type": "readahead"}
    with (filesystem(location).open(location, "rb", **ahead) if is_remote(location)
          else files.open_regular(location)) as file:  # fmt: skip
        length = file.seek(0, os.SEEK_END)
        for name, offset, size, crc in members(file, length, skipped):
            folder, _, base = name.rpartition("/")
            key, dot, suffix = base.partition(".")
            suffix = (dot + suffix).lower()
            kind = "picture" if suffix in pictures.PICTURES else suffix
            record = found.setdefault(f"{folder}/{key}", {})
            if kind not in CAPS:
                skipped["neither picture nor caption"] += 1
            elif kind in record:
                skipped["twice the same key"] += 1
            elif not 0 < size <= CAPS[kind]:
                skipped[f"{kind.strip('.')} empty or too large"] += 1
            elif kind == "picture":
                file.seek(offset + max(0, size - BLOCK))
                check = check_of(crc, file.read(min(size, BLOCK)))
                record[kind] = ((offset // BLOCK, size), check, pictures.name_hash(base))
            elif ".txt" not in record:
                file.seek(offset)
                record[kind] = file.read(size)
                if kind == ".txt":
                    record.pop(".json", None)  # not needed, and a shard has many
    samples, captions = [], []
    for _, record in sorted(found.items()):
        ids = encode(caption_of(record))[:LONGEST]
        if "picture" in record and ids:
            samples.append(record["picture"])
            captions.append(ids)
        elif record:
            skipped["no caption" if "picture" in record else "no picture"] += 1
    columns = list(zip(*samples, strict=True)) or [(), (), ()]
    columns += [[token for ids in captions for token in ids], [*map(len, captions)]]
    arrays = {name: np.array(x, ARRAYS[name]) for name, x in zip(ARRAYS, columns, strict=True)}
    return arrays, {why: n for why, n in skipped.items() if n}


def caption_of(record: dict[str, bytes]) -> str:
    """A sample's caption: its .txt, else `caption` in its .json; "" if it has none."""
    caption = files.text_of(record.get(".txt", b""))
    if ".txt" not in record:
        with contextlib.suppress(*files.FOREIGN):
            caption = json.loads(record[".json"])["caption"]
    return " ".join(caption.split()) if isinstance(caption, str) else ""


# --- Finding shards, on disk or behind a URL ------------------------------------------------------

PAUSES = (0.2, 0.8, 3.2)  # seconds before each further try of what the network may have failed
TIMES = ("ETag", "etag", "Last-Modified", "LastModified", "updated", "mtime")  # of file systems


def is_remote(location: str) -> bool:
    """Whether a location is read by fsspec."""
    return "://" in location


def filesystem(location: str) -> Any:
    """fsspec's access to a location, which it keeps for each process."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(location)[0]
    except (ImportError, ValueError) as error:
        needs = "install what fsspec needs (s3fs for s3://, gcsfs for gs://)"
        raise InputError(f"{location}: {error_line(error)}; {needs}") from None


def error_line(error: BaseException) -> str:
    """A library's error in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def with_retries(call: Callable[[], object]) -> object:
    """The result of a call, which is repeated where the network may have failed."""
    for pause in PAUSES:
        try:
            return call()
        except (FileNotFoundError, InputError):
            raise
        except Exception:  # each file system of fsspec has errors of its own
            time.sleep(pause)
    return call()


def expand(pattern: str) -> list[str]:
    """train-{0000..0002}.tar -> its three names, as the shell would."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        return [pattern]
    first, last = found.groups()
    names = (f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1))
    return [n for x in names for n in expand(pattern[: found.start()] + x + pattern[found.end() :])]


def shards_of(location: str) -> list[str]:
    """The finished shards of a folder, pattern or file, sorted. Raises InputError without any.

    img2dataset writes NAME_stats.json last: where any shard has one, those without are unfinished.
    """
    names, finished, root = set(), set(), location.rstrip("/")
    if is_remote(location) and not location.endswith(".tar"):
        fs = filesystem(location)
        try:
            listed = with_retries(lambda: fs.ls(root, detail=False))
        except Exception as error:
            again = "name the shards, as URL/{00000..00099}.tar"
            raise InputError(f"{root}: cannot be listed ({error_line(error)}); {again}") from None
        names = {str(path).rstrip("/").rpartition("/")[2] for path in listed}
        finished = {name.removesuffix("_stats.json") for name in names} - names
    elif not location.endswith(".tar"):
        names = {path.name for path in Path(location).glob("*")}
        finished = finished_shards(Path(location)).keys()
    tars = sorted(name for name in names if name.endswith(".tar"))
    torn = [name for name in tars if (finished or "fetch.json" in names)
            and name.removesuffix(".tar") not in finished]  # fmt: skip
    if torn:
        say(f"{location}: left out, unfinished (no _stats.json yet): {', '.join(torn)}")
    found = [f"{root}/{name}" for name in tars if name not in torn]
    found = expand(location) if location.endswith(".tar") else found
    if not found:
        raise InputError(f"{location}: no finished .tar shard; name a folder of shards")
    name, times = Counter(path.rpartition("/")[2] for path in found).most_common(1)[0]
    if times > 1:
        raise InputError(f"{location}: {name} is there in several folders; give each to --data")
    return found


def finished_shards(folder: Path) -> dict[str, dict]:
    """Name -> img2dataset's statistics of each shard that was written to its end."""
    found = {}
    for tar in folder.glob("*.tar"):
        path = tar.with_name(f"{tar.stem}_stats.json")
        with contextlib.suppress(OSError, *files.FOREIGN):  # none, or half of one after a kill
            stats = json.loads(files.read_regular(path, 2**24))
            if stats["successes"] >= 0:
                found[tar.stem] = stats
    return found


def fingerprint(path: str) -> list:
    """[name, bytes, time or ETag] of a shard. Raises InputError if it cannot be opened."""
    try:
        if is_remote(path):
            info = with_retries(lambda: filesystem(path).info(path))
            size, changed = int(info["size"]), next((info[k] for k in TIMES if info.get(k)), "")
        else:
            with files.open_regular(path) as file:
                size, changed = (stat := os.fstat(file.fileno())).st_size, stat.st_mtime_ns
        return [path.rpartition("/")[2], size, str(changed)]
    except Exception as error:
        why = f"cannot be opened ({error_line(error)}): bring it back, or name other shards"
        raise InputError(f"{path}: {why}") from None


# --- Building the index ---------------------------------------------------------------------------


def index_folder(location: str) -> Path:
    """DIR/index for a folder that can be written to; in the cache for everything else."""
    folder, home = Path(location), Path(location) / "index"
    if folder.is_dir() and (home.is_dir() or os.access(folder, os.W_OK)):
        return home
    return files.CACHE / f"index-{zlib.crc32(os.fsencode(location)):08x}"


def build(location: str, workers: int) -> dict:
    """The content of index.json; shards are indexed by `workers` processes where it is outdated.

    Each shard's part is kept until all are there, so that a killed build resumes.
    """
    from concurrent.futures import ProcessPoolExecutor

    home, paths = index_folder(location), shards_of(location)
    with files.locked(home, "indexing"):
        prints = [fingerprint(path) for path in tqdm(paths, "looking at shards", leave=False)]
        record = read_record(home)
        if record and record["shards"] == prints:
            say(f"{location}: the index is up to date")
            return record
        (home / "index.json").unlink(missing_ok=True)  # the arrays that it describes change now
        (home / "parts").mkdir(exist_ok=True)
        parts = [home / f"parts/{files.digest([], json.dumps(x))[:32]}.npz" for x in prints]
        jobs = [job for job in zip(paths, parts, strict=True) if not is_complete(job[1])]
        spawn = multiprocessing.get_context("spawn")  # a fork would copy locked threads
        workers = min(workers, len(jobs))
        pool = ProcessPoolExecutor(workers, spawn, end_with_parent) if workers > 1 else None
        with pool or contextlib.nullcontext():
            done = (pool.map if pool else map)(build_part, jobs)
            for _ in tqdm(done, f"indexing {location}", len(jobs), unit=" shards"):
                pass
        record = join(home, prints, parts)
        shutil.rmtree(home / "parts")
        return record


@lru_cache  # one watch for a process
def end_with_parent() -> None:
    """End this process with its parent: a restarted parent would write the same files."""

    def watch() -> None:
        parent.join()
        os._exit(1)

    if parent := multiprocessing.parent_process():
        threading.Thread(target=watch, daemon=True).start()


def build_part(job: tuple[str, Path]) -> None:
    """Scan one shard and save what was found."""
    location, part = job
    try:
        arrays, skipped = with_retries(lambda: scan(location))
    except Exception as error:
        why = f"cannot be read ({error_line(error)}); the same command resumes"
        raise InputError(f"{location}: {why}") from None
    skipped = np.frombuffer(json.dumps(skipped).encode(), np.uint8)
    files.write_safely(part, lambda file: np.savez(file, **arrays, skipped=skipped))


def is_complete(part: Path) -> bool:
    """Whether an earlier build's part can be used."""
    with contextlib.suppress(Exception), np.load(part) as content:  # numpy raises many kinds
        json.loads(content["skipped"].tobytes())
        return [content[name].dtype for name in ARRAYS] == [*ARRAYS.values()]
    return False


def join(home: Path, prints: list, parts: Sequence[Path]) -> dict:
    """The content of index.json, written after the arrays that are joined from the parts."""

    def column(name: str) -> Iterator[np.ndarray]:
        for part in parts:
            with np.load(part) as content:
                yield content[name]

    for name in ARRAYS:
        files.write_safely(home / f"{name}.bin", lambda file, x=name: file.writelines(column(x)))
    skipped = Counter()
    for content in column("skipped"):
        skipped.update(json.loads(content.tobytes()))
    counts = [len(lengths) for lengths in column("lengths")]
    record = {"version": VERSION, "shards": prints, "counts": counts, "skipped": skipped}
    record["digest"] = digest_of(home, record)
    files.write_bytes(home / "index.json", json.dumps(record).encode())
    return record


def digest_of(home: Path, record: dict) -> str:
    """A digest of all that an index holds but the shards' times."""
    text = json.dumps([record["counts"], record["skipped"]])
    return files.digest((home / f"{name}.bin" for name in ARRAYS), text)


def read_record(home: Path) -> dict | None:
    """The content of index.json; None where it, or an array that it describes, has changed."""
    with contextlib.suppress(OSError, *files.FOREIGN):
        record = json.loads(files.read_regular(home / "index.json", 2**30))
        types = [[*map(type, row)] for row in record["shards"]]
        sound = record["version"] == VERSION and types == [[str, int, str]] * len(record["counts"])
        if sound and record["digest"] == digest_of(home, record):
            return record
    return None


# --- The source -----------------------------------------------------------------------------------


class Shards(pictures.Source):
    """Indexed shards, as one source; sample numbers run over all of them.

    Raises InputError for an index that is missing or does not fit the shards.
    """

    def __init__(self, location: str, image_size: int) -> None:
        home, again = index_folder(location), f"python data.py index {location}"
        record = read_record(home)
        if record is None:
            raise InputError(f"{location} has no complete index of this version: {again}")
        paths = {path.rpartition("/")[2]: path for path in shards_of(location)}
        rows = record["shards"]
        first = len(rows) - 1 if is_remote(location) else 0  # others that changed show when read
        for i, (name, *_) in enumerate(rows):
            if name not in paths:
                folder = location.rstrip("/")
                raise InputError(f"{folder}/{name} is missing: bring it back, or give {again}")
            if i >= first and fingerprint(paths[name]) != rows[i]:
                raise InputError(f"{location}: {name} is not what was indexed: {again}")
        if new := len(paths) - len(rows):
            say(f"{location}: left out {counted(new, 'shard')} that the index lacks; {again}")
        self.name, self.image_size, self.digest = location, image_size, record["digest"]
        self.paths = [paths[name] for name, *_ in rows]
        self.shard_starts = np.cumsum([0, *record["counts"]])
        total = int(self.shard_starts[-1])
        if not total:
            raise InputError(f"{location}: no shard holds a picture with a caption")
        self.lengths = mapped(home, "lengths", total)
        # Where every 64th caption begins: what lies between is added up when it is read.
        sums = np.add.reduceat(self.lengths, np.arange(0, total, 64), dtype=np.int64)
        self.begins = np.concatenate([[0], np.cumsum(sums)])
        self.addresses = mapped(home, "addresses", 2 * total).reshape(-1, 2)
        self.checks = mapped(home, "checks", total)
        self.all_tokens = mapped(home, "tokens", int(self.begins[-1]))
        self.held = pictures.held_out(mapped(home, "names", total))
        skipped = {f"left out: {why}": n for why, n in record["skipped"].items()}
        self.counts = {"pictures": total, "shards": len(rows), **skipped}

    def __reduce__(self) -> tuple:
        # A spawned worker maps the files itself.
        return Shards, (self.name, self.image_size), {"crop_scale": self.crop_scale}

    def __len__(self) -> int:
        return len(self.addresses)

    def shard(self, i: int) -> int:
        """The number of the shard that holds sample i."""
        return int(np.searchsorted(self.shard_starts, i, "right")) - 1

    def where(self, i: int) -> str:
        block, size = self.addresses[i].tolist()
        return f"{self.paths[self.shard(i)].rpartition('/')[2]} bytes {block * BLOCK}+{size}"

    def stamp(self, ids: np.ndarray) -> str:
        return f"{self.name} {self.digest}"

    def caption(self, i: int) -> np.ndarray:
        """The token ids of sample i's caption, without start and end."""
        block = i // 64
        begin = int(self.begins[block] + self.lengths[block * 64 : i].sum(dtype=np.int64))
        return self.all_tokens[begin : begin + int(self.lengths[i])]

    def texts(self, ids: np.ndarray) -> list[str]:
        return [decode_tokens(self.caption(i)) for i in ids]

    def tokens(self, ids: np.ndarray) -> Tensor:
        tokens = np.zeros((len(ids), 77), np.int64)
        for row, i in zip(tokens, ids, strict=True):
            caption = self.caption(i)[:75]
            row[0], row[1 : 1 + len(caption)], row[1 + len(caption)] = glip.START, caption, glip.END
        return torch.from_numpy(tokens)

    def encoded(self, ids: np.ndarray) -> list[bytes | Exception]:
        # Each is read with the header in front of it, so that a shard that changed is noticed.
        stale = "the shard is not what was indexed: give python data.py index again"
        found = self.read_remote(ids) if is_remote(self.name) else self.read_local(ids)
        for k, (i, content) in enumerate(zip(ids, found, strict=True)):
            if isinstance(content, bytes):
                same = check_of(zlib.crc32(content[:BLOCK]), content[BLOCK:]) == self.checks[i]
                found[k] = content[BLOCK:] if same else OSError(stale)
        return found

    def read_local(self, ids: np.ndarray) -> list[bytes | Exception]:
        """Headers and pictures from disk."""
        found = []
        for i, (block, size) in zip(ids, self.addresses[ids].tolist(), strict=True):
            try:
                file = opened(self.paths[self.shard(i)])
                found.append(os.pread(file.fileno(), BLOCK + size, (block - 1) * BLOCK))
            except OSError as error:
                found.append(error)
        return found

    def read_remote(self, ids: np.ndarray, pauses: Sequence = PAUSES) -> list[bytes | Exception]:
        """The same from behind a URL, all at once; what failed is asked for again."""
        fs = filesystem(self.name)
        paths = [fs._strip_protocol(self.paths[self.shard(i)]) for i in ids]
        begins = (self.addresses[ids, 0].astype(int) - 1) * BLOCK
        sizes = BLOCK + self.addresses[ids, 1].astype(int)
        try:
            ends = (begins + sizes).tolist()
            found = fs.cat_ranges(paths, begins.tolist(), ends, on_error="return")
        except Exception as error:  # some file systems raise all the same
            found = [error] * len(ids)
        failed = [k for k, content in enumerate(found)
                  if isinstance(content, Exception) or len(content) != sizes[k]]  # fmt: skip
        if failed and pauses:
            time.sleep(pauses[0])
            again = self.read_remote(ids[failed], pauses[1:])
            for k, content in zip(failed, again, strict=True):
                found[k] = content
        return found


def mapped(home: Path, name: str, count: int) -> np.ndarray:
    """One of an index's ARRAYS, (count,), memory-mapped."""
    found = np.memmap(home / f"{name}.bin", ARRAYS[name], "r", shape=count)
    return found.view(np.ndarray)  # memmap's own class makes each access to an item slow


@lru_cache(maxsize=64)  # shards that are open at a time: a window of them and some more
def opened(path: str) -> BinaryIO:
    """A shard, left open; read by offset, so that forked processes may share it."""
    return open(path, "rb", buffering=0)
