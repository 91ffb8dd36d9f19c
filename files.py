"""Files that outlast a crash: written under a temporary name, flushed, and only then renamed."""

import contextlib
import io
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from masks import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextlib.contextmanager
def room_for(path: Path | str) -> Iterator[None]:
    """Tell of a disk that is full, or closed to us, by one InputError."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save tells of a full disk by either
        why = f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):
            if shutil.disk_usage(Path(path).parent).free < 2**26:
                why = "No space left"
        raise InputError(
            f"{path} cannot be written ({why}); what was there before is as it was: make room, "
            "or choose another folder"
        ) from None


def write_safely(path: Path | str, write: Callable[[io.BufferedWriter], object]) -> None:
    """Let `write(file)` fill a temporary file, flush it to disk, and only then give it its name.

    Raises InputError where there is no room; what had the name before is then still there.
    """
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with room_for(path):
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


@contextlib.contextmanager
def locked(folder: Path | str, what: str) -> Iterator[None]:
    """Make a folder and be the only process that is `what`, as in "indexing", it.

    Raises InputError that names the other process. The system frees the lock of a process that was
    killed. Read-only and some network disks cannot be locked: there nothing is checked.
    """
    path = Path(folder) / ".lock"
    with room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = take(path)
    except BlockingIOError as error:
        raise InputError(
            f"{folder}: {error} is {what} it at this moment; wait until it has ended, or stop it"
        ) from None
    except (OSError, AttributeError):
        held = None
    try:
        yield
    finally:
        if held is not None:
            path.unlink(missing_ok=True)
            os.close(held)


def take(path: Path) -> int:
    """The descriptor of a file that this process has locked; raises BlockingIOError with the owner.

    By lockf, not flock: forked data workers that outlive a killed process hold nothing.
    """
    while True:
        held = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            owner = os.read(held, 200).decode("utf-8", "replace")
            os.close(held)
            raise BlockingIOError(owner or "another process") from None
        if path.exists() and os.path.samestat(os.fstat(held), path.stat()):
            break
        os.close(held)  # its owner ended, and removed it, after it was opened here
    os.ftruncate(held, 0)
    os.write(held, f"process {os.getpid()} on {platform.node()}".encode())
    return held


def flush_folder(folder: Path) -> None:
    """Make names that were given in a folder outlast a loss of power."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        os.fsync(number)
        os.close(number)


def write_bytes(path: Path | str, content: bytes) -> None:
    """write_safely for content that is at hand."""
    write_safely(path, lambda file: file.write(content))


def cached(path: Path, make: Callable[[], dict]) -> dict:
    """A JSON object from the cache, or made and kept; what something else cut is made anew."""
    with contextlib.suppress(ValueError, OSError):
        return json.loads(path.read_text())
    value = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, json.dumps(value).encode())
    return value
