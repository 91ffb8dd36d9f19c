"""Files that outlast a crash: written under a temporary name, flushed, and only then renamed."""

import codecs
import contextlib
import errno
import hashlib
import io
import json
import os
import platform
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from glip import InputError

# What Python raises where content from elsewhere has other types, keys or sizes than ours.
FOREIGN = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@contextlib.contextmanager
def room_for(path: Path | str) -> Iterator[None]:
    """Turn a full or read-only disk into one InputError."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save raises either on a full disk
        why = f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):
            if shutil.disk_usage(Path(path).parent).free < 2**26:
                why = "No space left"
        raise InputError(
            f"{path} cannot be written ({why}); what was there before is as it was: make room, "
            "or choose another folder"
        ) from None


def write_safely(path: Path | str, write: Callable[[io.BufferedWriter], object]) -> None:
    """Write a file by `write(file)`; it gets its name only when all of it is on disk.

    Raises InputError where there is no room; a file that had the name before is then unchanged.
    """
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with room_for(path):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except InputError:
        with contextlib.suppress(OSError):  # a read-only disk, or a name that is too long
            temporary.unlink()
        raise
    flush_folder(Path(path).parent)


def append_line(path: Path | str, record: dict) -> None:
    """Add a line of JSON to a file; raises InputError where there is no room."""
    with room_for(path), open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def prune(path: Path, keep: Callable[[dict], object]) -> None:
    """Drop the JSON lines of a file that are not to `keep`; lines that are no records are counted.

    A line is no record where it is not JSON, or `keep` raises an error of types or keys.
    """
    kept, lost = [], 0
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            kept += [line + b"\n"] * bool(keep(json.loads(line.decode())))
        except FOREIGN:
            lost += 1
    if lost:
        print(f"{path}: lines left out, as they hold no record: {lost}")
    write_bytes(path, b"".join(kept))


@contextlib.contextmanager
def locked(folder: Path | str, what: str) -> Iterator[None]:
    """Make a folder and lock it for one process, which is doing `what`, such as "indexing".

    Raises InputError that names the other process. The system frees the lock of a process that was
    killed. Read-only and some network disks cannot be locked: there nothing is checked.
    """
    path = Path(folder) / ".lock"
    with room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        held.callback(remove_empty, path.parent)
        with contextlib.suppress(OSError, ImportError):  # Windows has no fcntl
            import fcntl

            file = held.enter_context(open(path, "a+"))
            try:  # not flock, which forked data workers would hold on to after this process
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.fstat(file.fileno()).st_nlink:  # its owner has removed it since
                    raise BlockingIOError
            except (BlockingIOError, PermissionError):
                file.seek(0)
                raise InputError(
                    f"{folder}: {file.read(200) or 'another process'} is {what} it at this moment; "
                    "wait until it has ended, or stop it"
                ) from None
            held.callback(path.unlink, missing_ok=True)
            file.truncate(0)
            print(f"process {os.getpid()} on {platform.node()}", end="", file=file, flush=True)
        yield


def check_new(out: Path) -> None:
    """Raise InputError for an --out that would write over something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out} exists and is not an empty folder: choose another")


def remove_empty(folder: Path) -> None:
    """Remove a folder in which nothing was written."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def flush_folder(folder: Path) -> None:
    """Flush a folder's names to disk."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        os.fsync(number)
        os.close(number)


def write_bytes(path: Path | str, content: bytes) -> None:
    """Write bytes as write_safely does."""
    write_safely(path, lambda file: file.write(content))


def digest(paths: Iterable[Path], text: str) -> str:
    """The SHA-256 of the contents of files, and a text."""
    total = hashlib.sha256(text.encode(errors="surrogatepass"))
    for path in paths:
        with open_regular(path) as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def cached_array(path: Path, count: int, make: Callable[[], np.ndarray]) -> np.ndarray:
    """fp32 (count, ...) from a .npy in the cache, or made and cached; a damaged file is remade."""
    with contextlib.suppress(Exception):  # numpy raises many kinds for a torn file
        found = np.load(path)
        if len(found) == count and found.dtype == np.float32:
            return found
    array = make()
    with contextlib.suppress(InputError):  # a folder that cannot be written to
        write_safely(path, lambda file: np.save(file, array))
    return array


def cached(path: Path, make: Callable[[], dict]) -> dict:
    """A JSON object from the cache, or made and cached; a damaged file is remade."""
    with contextlib.suppress(ValueError, OSError, RecursionError):
        if isinstance(found := json.loads(read_regular(path, 2**32)), dict):
            return found
    value = make()
    with contextlib.suppress(InputError):  # a cache that cannot be written to
        write_bytes(path, json.dumps(value).encode())
    return value


def open_regular(path: Path | str, most: int = 2**63) -> io.BufferedReader:
    """Open a regular file of at most `most` bytes; raises OSError for anything else."""
    flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # opening a pipe would block
    file = os.fdopen(os.open(path, os.O_RDONLY | flags), "rb")
    found = os.fstat(file.fileno())
    if stat.S_ISREG(found.st_mode) and found.st_size <= most:
        return file
    file.close()
    why = f"over {most:,} bytes" if stat.S_ISREG(found.st_mode) else "not a regular file"
    raise OSError(errno.EINVAL, why, str(path))


def read_regular(path: Path | str, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes; raises OSError for anything else."""
    with open_regular(path, most) as file:
        return file.read(most)


def text_of(content: bytes) -> str:
    """Bytes as text, by their byte order mark; "" if they hold NULs and so are no text."""
    wide = content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    text = content.decode("utf-16" if wide else "utf-8-sig", "replace")
    return "" if "\0" in text else text


# Beside the code of a checkout; of an installed package, in the home folder
CHECKOUT = Path(__file__).parents[1]
HOME = CHECKOUT / ".cache" if (CHECKOUT / "train.py").exists() else Path.home() / ".cache/nanoglip"
CACHE = Path(os.environ.get("NANOGLIP_CACHE", HOME))
