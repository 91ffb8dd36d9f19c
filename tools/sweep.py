"""The comparison of masks in the README: every mask of the registry, at equal steps and equal time.

    python -m tools.sweep            runs what results/ lacks; about six hours on two cores
    python -m tools.sweep --jobs 1   one run at a time, on all cores
    python -m tools.sweep --masks border gaussian     these masks alone
    python -m tools.sweep --list     prints the runs, and which of them results/ has

Interrupt it when you like: finished runs are skipped, an unfinished one starts again.

Equal time is not taken with a stop-watch: the cost of a step under each mask is measured once, in
one alternating run (results/cost.json), and a mask whose step costs more than GLIP's at the same
ratio gets as many steps as cost the same. Where a step costs the same, one run serves both.

At the end come the runs that only the notebooks 05 and 06 need: other sigmas, fewer vendors, scenes
anywhere.
"""

import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import tyro

import data
import glip
import train
from glip import GLIP, GLIPConfig, InputError
from nanoglip import cli, masks, results
from nanoglip.config import TrainConfig, parse, run_name
from nanoglip.machine import machine, pick_device, use_bf16

ROOT = Path(__file__).parents[1]

SEEDS = (0, 1, 2)

RATIOS = (0.75, 0.918, 0.5)

HOME = "scenes-center"  # where every mask runs at every ratio

AWAY = ("emoji", "scenes-corner")  # where most run, at 75 %

HOME_ONLY = {"grid", "block"}

SMALL = "small pictures"  # RECLIP's in the table of costs

SAME = 1.15  # a step that costs less than this many of GLIP's counts as equal

ART = ("Goog", "Appl", "FB", "Sams")  # to train on the first 1, 2, 4: the question of scale

TUNING = {1: 2.86, 2: 1.43, 4: 0.74}  # epochs of their art that are the comparison's 20 steps


@dataclass(frozen=True)
class SweepConfig:
    """Run what is missing of the comparison of masks."""

    jobs: int = 2  # runs at a time, sharing the cores
    masks: tuple[str, ...] = ()  # only these, of the registry or "small pictures" (default: all)
    list: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # print the runs, start none


def partner(ratio: float) -> int:
    """Side in pixels of the small pictures whose patches are nearest to the K of a ratio."""
    model = GLIPConfig.named(TrainConfig().model)
    patches = glip.num_keep(model.grid[0] * model.grid[1], ratio)
    return model.patch_size * round(patches**0.5)


def measure_cost(threads: int, masks: list[str], rounds: int = 8) -> dict:
    """Seconds of a training step, and of its mask alone, for masks at every ratio, alternating."""
    torch.set_num_threads(threads)  # as many as a run will have
    config = parse(["--recipe", "compare", "--data", HOME])
    device = pick_device("auto")
    bf16 = use_bf16("auto", device)

    def variant(mask: str, ratio: float, size: int = 0) -> tuple:
        changed = replace(
            config, mask=mask, mask_ratio=ratio, image_size=size, tune_epochs=0, seed=0
        )
        (stage,) = train.plan(changed, 0, 1)
        torch.manual_seed(0)
        model = GLIP(stage.model).to(device)
        train.renew_mask(stage, model, changed, 0, device)
        return changed, stage, model, train.make_optimizers(model, changed)

    variants = {}
    for mask in masks:
        for ratio in (0.0,) if mask == "none" else RATIOS:
            small = mask == SMALL
            variants[mask, ratio] = (
                variant("none", 0.0, partner(ratio)) if small else variant(mask, ratio)
            )
    steps = {key: [] for key in variants}
    masks = {key: [] for key in variants}
    for step in range(1, rounds + 3):
        for key, (changed, stage, model, optimizers) in variants.items():
            start = time.perf_counter()
            batch = stage.batches[step]
            train.renew_mask(stage, model, changed, step, device)
            loss, *_ = train.compute_gradients(
                model, model, batch, stage, changed, device, bf16
            )
            train.apply_gradients(model, optimizers, 1e-3, 0.0)
            loss.item()
            middle = time.perf_counter()
            train.renew_mask(stage, model, changed, step, device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                ids_keep, _ = stage.masker(
                    batch.images.to(device), batch.noise.to(device), model.visual
                )
            if ids_keep is not None:
                ids_keep[0, 0].item()  # waits for a GPU
            if step > 2:  # the first rounds warm up
                steps[key].append(middle - start)
                masks[key].append(time.perf_counter() - middle)
    rows = [
        {"mask": mask, "mask_ratio": ratio, "step": statistics.median(steps[mask, ratio]),
         "mask alone": statistics.median(masks[mask, ratio])}
        for mask, ratio in variants
    ]  # fmt: skip
    return {
        "command": "python -m tools.sweep", "data": HOME, "batch_size": config.batch_size,
        "rounds": rounds, "model": config.model, "bf16": bf16,
        "threads": torch.get_num_threads(), "seconds": rows, "machine": machine(device),
    }  # fmt: skip


def complete_cost(cost: dict | None, threads: int) -> dict:
    """The table of costs with what it lacks measured; what it has is not touched.

    A new mask is measured beside GLIP's, and told in the seconds of the table's GLIP.
    """
    there = {row["mask"] for row in cost["seconds"]} if cost else set()
    lacking = [mask for mask in (*masks.MASKS, SMALL) if mask not in there]
    if not cost or not lacking:
        return cost or measure_cost(threads, lacking)
    new = measure_cost(threads, ["gaussian", *lacking])
    for row in new["seconds"]:
        glips = [
            next(r["step"] for r in table["seconds"]
                 if (r["mask"], r["mask_ratio"]) == ("gaussian", row["mask_ratio"]))
            for table in (cost, new)
        ]  # fmt: skip
        if row["mask"] in lacking:
            scale = glips[0] / glips[1]
            row |= {name: row[name] * scale for name in ("step", "mask alone")}
            cost["seconds"].append(row)
    return cost


def affordable(cost: dict, mask: str, ratio: float, steps: int) -> int | None:
    """Steps under a mask that cost as much as `steps` of GLIP's; None: its cost is not known."""
    seconds = {(row["mask"], row["mask_ratio"]): row["step"] for row in cost["seconds"]}
    own = seconds.get((mask, 0.0 if mask == "none" else ratio))
    if own is None:
        return None
    times = own / seconds["gaussian", ratio]
    return steps if times < SAME else 4 * round(steps / times / 4)  # known no more finely


@dataclass(frozen=True)
class Run:
    """A cell's share of the comparison: one seed of one mask."""

    data: str
    mask: str  # of the registry, or SMALL
    ratio: float  # whose K patches it has or is compared with
    equal: str  # in steps or time
    seed: int
    flags: tuple[str, ...]  # of train.py
    more: tuple[str, ...] = ()  # flags of evaluate.py

    @property
    def name(self) -> str:
        """The name of its folder and of its JSON: runs that serve both readings have one."""
        return name_of(self.flags)


@cache
def name_of(flags: tuple[str, ...]) -> str:
    """The name of the run that these flags start."""
    return run_name(parse(list(flags)))


def planned(cost: dict) -> list[Run]:
    """Every run, in the order of what it tells; masks of equal cost serve both readings.

    Where a mask's cost is not known, its runs at equal time are left out.
    """
    config = parse(["--recipe", "compare"])
    size = GLIPConfig.named(config.model).image_size
    runs = []

    def add(name: str, mask: str, ratio: float, equal: str, seed: int) -> None:
        flags = ["--mask", mask, "--mask-ratio", ratio]
        if mask == "none":
            flags = ["--mask", mask]
        elif mask == SMALL:  # another stretch of the same budget: tuned at the full size
            flags = ["--mask", "none", "--image-size", partner(ratio), "--tune-image-size", size]
        steps = config.steps
        if equal == "time":
            steps = affordable(cost, mask, ratio, steps)
            if steps is None:
                return
        if steps != config.steps:
            flags += ["--steps", steps]
        words = ["--recipe", "compare", "--data", name, *map(str, flags), "--seed", str(seed)]
        runs.append(Run(name, mask, ratio, equal, seed, tuple(words)))

    for ratio, equal, seed in product(RATIOS, ("steps", "time"), SEEDS):
        for mask in (*masks.MASKS, SMALL):
            add(HOME, mask, ratio, equal, seed)
        for name in AWAY if ratio == RATIOS[0] else ():
            for mask in masks.MASKS:
                if mask not in HOME_ONLY:
                    add(name, mask, ratio, equal, seed)
    return runs


def questions() -> list[Run]:
    """What the notebooks 05 and 06 ask beside the comparison, at 75 % and equal steps."""
    three, shifts = ("none", "random", "gaussian"), ("--robustness", "--linear-probe")
    asked = [  # data, mask, flags of train.py, seeds, flags of evaluate.py
        *((HOME, "gaussian", f"--sigma {s}", 3, ()) for s in (0.05, 0.1, 0.4, 0.8)),
        *(("scenes-anywhere", mask, "", 2, ()) for mask in (*three, "attentive")),
        *(("emoji", mask, f"--vendors {' '.join(ART[:n])} --tune-epochs {epochs}", 1, shifts)
          for n, epochs in TUNING.items() for mask in three),
        *((HOME, "gaussian", f, 2, ()) for f in ("--sigma 0.1 0.4", "--mask-center 0 0.5")),
    ]  # fmt: skip
    runs = []
    for seed, (name, mask, flags, seeds, more) in product(SEEDS, asked):
        if seed < seeds:
            words = f"--recipe compare --data {name} --mask {mask} {flags} --seed {seed}".split()
            ratio = 0.0 if mask == "none" else RATIOS[0]
            runs.append(Run(name, mask, ratio, "steps", seed, tuple(words), more))
    return runs


def run(name: str, flags: tuple[str, ...], threads: int, more: tuple[str, ...] = ()) -> str | None:
    """Train, evaluate and publish one run; returns what went wrong."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    folder = ROOT / "runs/sweep" / name
    if folder.exists() and not (folder / "model.pt").exists():
        shutil.rmtree(folder)  # a run of the sweep that was interrupted
    commands = [["evaluate.py", f"runs/sweep/{name}", "--publish", *more]]
    if not folder.exists():
        out = ["--out", f"runs/sweep/{name}", "--eval-every", "100000"]
        commands.insert(0, ["train.py", *flags, *out])
    start = time.perf_counter()
    for words in commands:
        done = subprocess.run(
            [sys.executable, *words], env=environment, cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode:
            return f"{name}: {(done.stderr.strip() or f'exit {done.returncode}').splitlines()[-1]}"
    print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return None


@cli.guarded
def main() -> None:
    """The command line."""
    options = tyro.cli(SweepConfig, description=__doc__)
    cli.check_numbers(options, above_0=("jobs",))
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    cost = results.load("cost")
    unknown = [mask for mask in options.masks if mask not in (*masks.MASKS, SMALL)]
    if unknown:
        choices = ", ".join((*masks.MASKS, f"'{SMALL}'"))
        raise InputError(f"--masks {unknown[0]}: choose from {choices}")
    if not options.list:
        commit = machine(torch.device("cpu"))["commit"]
        if not commit or commit.endswith("-dirty"):
            raise InputError("results name the commit they come from: commit your changes")
        for name in (HOME, *AWAY):  # decode once, before runs share the cache
            data.load(name, glip.SIZES[TrainConfig().model][0])
    if not options.list or not cost:
        cost = complete_cost(cost, threads)
        results.save("cost", cost)
    wanted = options.masks or (*masks.MASKS, SMALL)
    runs = [*planned(cost), *questions()]
    runs = {run.name: (run.flags, run.more) for run in runs if run.mask in wanted}
    done = {run["name"] for run in results.load_runs()}
    if options.list:
        for name, (flags, _) in runs.items():
            print("done   " if name in done else "missing", "python train.py", *flags)
        return
    runs = {name: words for name, words in runs.items() if name not in done}
    with ThreadPoolExecutor(options.jobs) as pool:
        ended = pool.map(lambda name: run(name, runs[name][0], threads, runs[name][1]), runs)
        failed = [problem for problem in ended if problem]
    if failed:
        raise InputError(f"{len(failed)} runs failed, the first is {failed[0]}")


if __name__ == "__main__":
    main()
