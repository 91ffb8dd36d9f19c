"""Files that outlast a crash: written under a temporary name, flushed, and only then renamed."""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from masks import InputError


@contextlib.contextmanager
def room_for(path: Path | str) -> Iterator[None]:
    """Tell of a disk that is full, or closed to us, by one InputError."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save tells of a full disk by either
        folder = Path(path).parent
        free = shutil.disk_usage(folder).free if folder.is_dir() else 0
        why = "No space left" if free < 2**26 else f"{type(error).__name__}: {error}"
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
        with room_for(path), open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except InputError:
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)
    flush_folder(Path(path).parent)


def append_line(path: Path | str, record: dict) -> None:
    """Add a line of JSON to a file; raises InputError where there is no room."""
    with room_for(path), open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


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
