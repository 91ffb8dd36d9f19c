"""Kill training runs at random moments, go on, and compare with a run that was left alone.

    python tests/torture.py 30        30 runs, each killed (SIGKILL) until it has survived
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

ROOT = Path(__file__).parent.parent
TIMING = {"pairs_per_second", "data_wait", "seconds"}
SETTINGS = [  # what has state beside weights and optimizer: each in turn
    ["--mask", "gaussian"], ["--mask", "attentive", "--aclip"],
    ["--mask", "cluster", "--embedding-weight", "1"], ["--optimizer", "adamw", "--loss", "siglip"],
]  # fmt: skip
# Checkpoints are written all the time, so that a kill often comes while one is.
BASE = ["--image-size", "16", "--batch-size", "32", "--steps", "14", "--warmup", "3",
        "--tune-epochs", "0.02", "--log-every", "2", "--eval-every", "100", "--save-every", "1",
        "--precision", "fp32"]  # fmt: skip


def start(out: Path, flags: list[str], launch: tuple[str, ...] = ()) -> subprocess.Popen:
    """A run of its own process group."""
    return subprocess.Popen(
        [sys.executable, *launch, "train.py", *flags, "--out", str(out)], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def end(process: subprocess.Popen, number: int) -> None:
    """A signal to all of a run."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def finish(out: Path, flags: list[str], launch: tuple[str, ...] = ()) -> str:
    """Run to the end; what it printed."""
    process = start(out, flags, launch)
    told = process.communicate(timeout=300)[0]
    assert process.returncode == 0, told[-3000:]
    return told


def written(out: Path) -> int:
    """When latest.pt was."""
    try:
        return (out / "latest.pt").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def wait_for_checkpoint(out: Path, process: subprocess.Popen, limit: float = 120) -> None:
    """Until this run has written a checkpoint of its own."""
    until, before = time.monotonic() + limit, written(out)
    while written(out) in (0, before) and process.poll() is None:
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
            process = start(out, flags)
            wait_for_checkpoint(out, process)
            try:
                process.wait(draw.uniform(0, 4))
            except subprocess.TimeoutExpired:
                end(process, signal.SIGKILL)
                counts["kills"] += 1
            process.communicate()
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
