"""Kill training runs at random moments, resume them, and compare with uninterrupted runs.

    python -m tests.torture 30        30 runs, each killed (SIGKILL) until it has survived
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import glip
from nanoglip import files, runlog
from nanoglip.config import TrainConfig
from nanoglip.sources.order import Batches
from tests.processes import Run

TIMING = {"pairs_per_second", "data_wait", "seconds", "evaluation_seconds"}
SETTINGS = [  # what has state beside weights and optimizer: each in turn
    ["--mask", "gaze", "--mask-ratio", "0.9", "0.6"], ["--mask", "attentive", "--aclip"],
    ["--mask", "cluster", "--embedding-weight", "1"], ["--optimizer", "adamw", "--loss", "siglip"],
]  # fmt: skip
# A checkpoint after each step, so that a kill often comes while one is written.
BASE = ["--image-size", "16", "--batch-size", "32", "--steps", "8", "--warmup", "3",
        "--tune-epochs", "0.02", "--log-every", "2", "--eval-every", "100", "--save-every", "1",
        "--precision", "fp32"]  # fmt: skip
TINY = (16, 4, 16, 1, 2, 8, 16, 1, 2)  # a row of glip.SIZES


def start(out: Path, flags: list[str], log: Path | None = None, **how: object) -> Run:
    """Training in processes of its own, which print to a file, by default beside their folder."""
    log = log or out.with_name(f"{out.name}.{time.monotonic_ns()}.txt")
    return Run("train", *flags, "--out", str(out), log=log, **how)


def finish(out: Path, flags: list[str], **how: object) -> str:
    """What a run printed that has to end well."""
    code, printed = start(out, flags, **how).finish()
    assert code == 0, printed[-3000:]
    return printed


def written(out: Path) -> int:
    """When latest.pt was."""
    try:
        return (out / "latest.pt").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def wait_for_checkpoint(out: Path, run: Run | subprocess.Popen, limit: float = 120) -> None:
    """Wait until this run has written a checkpoint of its own, or has ended."""
    running = run.running if isinstance(run, Run) else lambda: run.poll() is None
    until, before = time.monotonic() + limit, written(out)
    while written(out) in (0, before) and running():
        assert time.monotonic() < until
        time.sleep(0.005)


def differences(a: Path, b: Path) -> list[str]:
    """What differs between two finished runs, timing aside: nothing, bit for bit."""
    found = []
    for name in ("pretrained.pt", "model.pt"):
        one, two = (torch.load(run / name, weights_only=True)["model"] for run in (a, b))
        found += [f"{name} {k}" for k in one if not torch.equal(one[k], two[k])]
    logs = []
    for run in (a, b):
        records = map(json.loads, (run / "log.jsonl").read_text().splitlines())
        logs.append([{k: v for k, v in r.items() if k not in TIMING} for r in records])
    return found + ["log.jsonl"] * (logs[0] != logs[1])


# --- What a process does to itself, before training begins ----------------------------------------


def tiny() -> None:
    """Make the demo's model a tiny one."""
    glip.SIZES[TrainConfig().model] = TINY


MOMENTS = ("while a checkpoint is written", "between its renames", "behind a line of the log")


def die(moment: str, count: int) -> None:
    """A tiny model, and SIGKILL at a moment when it comes for the count-th time."""
    tiny()
    places = (torch, "save"), (os, "replace"), (files, "append_line")
    owner, name = dict(zip(MOMENTS, places, strict=True))[moment]
    work, seen = getattr(owner, name), []

    def deadly(*words: object, **how: object) -> object:
        if moment != MOMENTS[1] or str(words[0]).endswith("next.pt"):
            seen.append(1)
        if len(seen) < count:
            return work(*words, **how)
        if moment == MOMENTS[0]:
            words[1].write(b"the beginning of a file")
            words[1].flush()
        if moment == MOMENTS[2]:
            work(*words, **how)
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    setattr(owner, name, deadly)


def stop(number: int, step: int) -> None:
    """A tiny model, and a signal to the whole group of processes while a step is computed."""
    tiny()
    arrived, left = runlog.Report.data_arrived, [0] * step

    def signalling(self: runlog.Report, batch: object) -> None:
        if not left:
            os.killpg(0, number)
        left[:] = left[1:]
        arrived(self, batch)

    runlog.Report.data_arrived = signalling


def poison(rank: int, step: int) -> None:
    """A tiny model, and at a step a rank's picture that is not finite."""
    tiny()
    read = Batches.__getitem__

    def poisoned(self: Batches, place: int) -> object:
        batch = read(self, place)
        if (place, self.rank) != (step, rank):
            return batch
        images = batch.images.float() / 255
        images[0] = float("nan")
        return batch._replace(images=images)

    Batches.__getitem__ = poisoned


# --- Random moments -------------------------------------------------------------------------------


def torture(folder: Path, runs: int, seed: int = 0) -> dict[str, int]:
    """Kill `runs` runs until each is done; counts kills, and those while a file was written."""
    draw, counts, straight = random.Random(seed), {"runs": 0, "kills": 0, "while_writing": 0}, {}
    for i in range(runs):
        number = i % len(SETTINGS)
        flags, out, cut = [*BASE, *SETTINGS[number]], folder / f"killed{i}", set()
        if number not in straight:
            straight[number] = folder / f"straight{number}"
            finish(straight[number], flags)
        while not (out / "model.pt").exists():
            run = start(out, flags)
            wait_for_checkpoint(out, run)
            if not run.wait(draw.uniform(0, 2)):
                run.signal(signal.SIGKILL)
                counts["kills"] += 1
            run.finish()
            left = set(out.glob("*.tmp")) - cut
            counts["while_writing"] += bool(left)
            cut |= left
        found = differences(straight[number], out)
        assert not found, (flags, found)
        counts["runs"] += 1
    return counts


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        print(torture(Path(name), int(sys.argv[1])))
