"""What every script shows: errors as one sentence with an exit code, and progress bars."""

import contextlib
import functools
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from glip import InputError

# Parts of torch's messages when memory is short, and when another process has ended.
SHORT = ("out of memory", "allocate memory", "shared memory", "DataLoader worker")
LOST = ("gloo/transport", "Connection closed", "remote process exited")
STOPPED = 75  # the exit code of a run that was asked to stop and can be resumed


class Stopped(Exception):
    """The run was asked to stop, and saved."""


def printable(text: object) -> str:
    """Text with "?" for characters that a terminal would obey or cannot show."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def say(text: str) -> None:
    """Print lines of text that may hold names from elsewhere, on rank 0 alone."""
    if os.environ.get("RANK", "0") in ("", "0"):
        print("\n".join(map(printable, text.split("\n"))))


def counted(n: int, what: str) -> str:
    """A number with what it counts: "1 step", "2,000 steps"."""
    return f"{n:,} {what}{'s' * (n != 1)}"


def blocks(count: int, size: int, what: str) -> Iterator[Tensor]:
    """Blocks of `size` of the numbers below `count`, with a progress bar on a terminal."""
    with tqdm(total=count, desc=what, leave=False, disable=None) as bar:
        for ids in torch.arange(count).split(size):
            yield ids
            bar.update(len(ids))


def place() -> tuple[int, int, int]:
    """(rank, rank on this machine, number of ranks) of torchrun's environment."""
    world = os.environ.get("WORLD_SIZE") or "1"
    if world == "1":
        return 0, 0, 1
    numbers = {name: os.environ.get(name) or "" for name in ("WORLD_SIZE", "RANK", "MASTER_PORT")}
    numbers["LOCAL_RANK"] = os.environ.get("LOCAL_RANK") or "0"
    wrong = [name for name, value in numbers.items() if not value.isdecimal()]
    if wrong or not os.environ.get("MASTER_ADDR"):
        raise InputError(
            f"WORLD_SIZE is {world}, but {(*wrong, 'MASTER_ADDR')[0]} is missing or no number: "
            "start several processes with torchrun, or unset WORLD_SIZE"
        )
    return int(numbers["RANK"]), int(numbers["LOCAL_RANK"]), int(world)


def guarded(main: Callable[[], None]) -> Callable[[], None]:
    """A script's `main` that ends with one sentence on errors; --debug adds the traceback."""

    @functools.wraps(main)
    def run() -> None:
        debug = "--debug" in sys.argv
        sys.argv = [word for word in sys.argv if word != "--debug"]
        try:
            main()
        except BrokenPipeError:  # the reader has closed the output, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, KeyboardInterrupt | Stopped):
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one must not interrupt this
            code, sentences = message_of(error)
            lines = [f"{Path(sys.argv[0]).name}: {sentence}" for sentence in sentences]
            lines = traceback.format_exc().splitlines() * debug + lines
            print_once("\n".join(map(printable, lines)))
            sys.exit(code)

    return run


def message_of(error: BaseException) -> tuple[int, list[str]]:
    """(exit code, sentences) for an error; an InputError holds one sentence or more."""
    kind, lines = type(error).__name__, str(error).splitlines() or [""]
    first = lines[0]
    if "Original Traceback (most recent call last):" in lines:  # a data worker's error, as text
        first = lines[-1].partition("Error: ")[2]
        error.args = (first,)
    if isinstance(error, InputError):
        return 2, list(error.args)
    if isinstance(error, Stopped):
        return STOPPED, [first]
    if isinstance(error, KeyboardInterrupt):
        return 130, ["interrupted; the same command goes on with what was saved, if anything was"]
    if isinstance(error, OSError) and error.filename is not None:
        return 2, [f"{error.filename}: {error.strerror}; check the name, its rights and the disk"]
    if isinstance(error, ModuleNotFoundError) and error.name:
        return 2, [f"the package {error.name} is not installed: `make setup` installs all"]
    if isinstance(error, MemoryError) or any(words in first for words in SHORT):
        return 2, [f"{kind}: {first}; if memory is short, lower --batch-size or --workers"]
    if any(words in first for words in LOST):
        return 1, [f"another process of this run ended ({first}); give the same command again"]
    if isinstance(error, dist.DistBackendError):  # NCCL names the cause on a later line
        first = " ".join(lines)
    return 1, [
        f"{kind}: {first}; nanoGLIP did not foresee this: please report it with the command (with "
        "--debug it shows the traceback)"
    ]


def print_once(text: str) -> None:
    """Print to stderr on one rank, before any rank exits: torchrun then ends the others.

    The processes share their launcher's store, which is there before they have a group.
    """
    store, wait = None, timedelta(seconds=10)
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        with contextlib.suppress(KeyError, ValueError, RuntimeError):  # no store: each prints
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
            store = dist.TCPStore(host, port, is_master=False, timeout=wait)
            store = dist.PrefixStore(f"error{attempt}", store)
            if store.add("processes", 1) > 1:
                store.wait(["printed"], wait)
                return
    print(text, file=sys.stderr, flush=True)
    if store is not None:
        with contextlib.suppress(RuntimeError):
            store.set("printed", "yes")


def check_numbers(
    config: object, above_0: Collection[str] = (), at_least_0: Collection[str] = ()
) -> None:
    """Refuse numbers of a command line that are not finite or too small."""
    for name, value in vars(config).items():
        rule = "above 0 and " * (name in above_0) or "at least 0 and " * (name in at_least_0)
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, int | float):
                continue
            low = number <= 0 if name in above_0 else number < 0 and name in at_least_0
            whole = isinstance(number, int)
            if low or not abs(number) < (2**63 if whole else math.inf):
                end = "below 2^63" if whole else "finite"
                raise InputError(f"--{name.replace('_', '-')} must be {rule}{end}")
