"""The comparison of masks in the README: three seeds, at equal steps and at equal time.

    python sweep.py            runs what results/ lacks; about an hour on two cores
    python sweep.py --jobs 1   one run at a time, on all cores

Equal time is not taken with a stop-watch: the cost of a step under each mask is measured once, in
one alternating run (results/cost.json), and the unmasked model gets as many steps as cost the same
as the masked ones'. Masks of equal K cost the same, so one run of theirs serves both comparisons.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

import data
import evaluate
import glip
import train
from glip import GLIP, InputError

ROOT = Path(__file__).parent
RESULTS = ROOT / "results"
SETS = ("emoji", "scenes-center")
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class SweepConfig:
    """Run what is missing of the comparison of masks."""

    jobs: int = 2  # runs at a time, sharing the cores


def measure_cost(threads: int, rounds: int = 8) -> dict:
    """Seconds of a training step under each mask of the registry, alternating; medians."""
    torch.set_num_threads(threads)  # as many as a run will have
    config = train.parse(["--recipe", "compare"])
    device = evaluate.pick_device("auto")
    bf16 = evaluate.use_bf16("auto", device)
    (stage,) = train.plan(replace(config, tune_epochs=0), 0, 1)
    stages = {mask: replace(stage, mask=mask) for mask in glip.MASKS}
    torch.manual_seed(0)
    model = GLIP(stage.model).to(device)
    optimizers = train.make_optimizers(model, config)
    seconds = {mask: [] for mask in stages}
    for step in range(rounds + 2):
        for mask, variant in stages.items():
            start = time.perf_counter()
            batch = variant.batches[step]
            loss, _ = train.update(
                model, optimizers, batch, variant, config.sigma, 1e-3, device, bf16
            )
            loss.item()
            if step >= 2:  # the first rounds warm up
                seconds[mask].append(time.perf_counter() - start)
    medians = {mask: statistics.median(values) for mask, values in seconds.items()}
    return {
        "command": "python sweep.py", "batch_size": config.batch_size, "rounds": rounds,
        "mask_ratio": config.mask_ratio, "model": config.model, "bf16": bf16,
        "threads": torch.get_num_threads(), "seconds_per_step": medians,
        "times_gaussian": {m: value / medians["gaussian"] for m, value in medians.items()},
        "machine": evaluate.machine(device),
    }  # fmt: skip


def planned(cost: dict) -> list[list[str]]:
    """The flags of every run, the equal-time ones of the unmasked model included."""
    steps = train.parse(["--recipe", "compare"]).steps
    affordable = round(steps / cost["times_gaussian"]["none"])
    variants = [[m] for m in ("gaussian", "random", "none")] + [["none", "--steps", affordable]]
    return [
        ["--recipe", "compare", "--data", name, "--mask", *map(str, variant), "--seed", str(seed)]
        for seed in SEEDS
        for name in SETS
        for variant in variants
    ]


def run(flags: list[str], threads: int) -> str | None:
    """Train, evaluate and publish one run, unless results/ has it; returns what went wrong."""
    name = train.run_name(train.parse(flags))
    if (RESULTS / f"{name}.json").exists():
        return None
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    commands = [["evaluate.py", f"runs/{name}", "--publish"]]
    if not (ROOT / "runs" / name / "model.pt").exists():
        commands.insert(0, ["train.py", *flags])
    start = time.perf_counter()
    for words in commands:
        done = subprocess.run(
            [sys.executable, *words], env=environment, cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode:
            return f"{name}: {done.stderr.strip().splitlines()[-1]}"
    print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return None


def main() -> None:
    """The command line."""
    options = tyro.cli(SweepConfig, description=__doc__)
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    try:
        for name in SETS:  # decode once, before runs share the cache
            data.load(name, glip.SIZES[train.TrainConfig().model][0])
        path = RESULTS / "cost.json"
        if not path.exists():
            text = json.dumps(measure_cost(threads), indent=1) + "\n"
            glip.write_bytes(path, text.encode())
        with ThreadPoolExecutor(options.jobs) as pool:
            runs = planned(json.loads(path.read_text()))
            failed = [x for x in pool.map(lambda flags: run(flags, threads), runs) if x]
        if failed:
            raise InputError(f"{len(failed)} runs failed, the first is {failed[0]}")
    except InputError as error:
        print(f"sweep.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
