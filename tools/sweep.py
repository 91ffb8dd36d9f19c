"""The comparison of masks: every mask at equal steps and at equal time, for three seeds.

    python -m tools.sweep            runs what results/ lacks; about twelve hours on two cores
    python -m tools.sweep --jobs 1   one run at a time, on all cores
    python -m tools.sweep --masks border gaussian     these masks alone
    python -m tools.sweep --list     prints the runs, and which of them results/ has

The sweep can be interrupted: finished runs are skipped, an unfinished run starts again.

Equal time is computed from the cost of a step, which is measured once for each mask in alternating
runs (results/cost.json): a mask whose step costs more than GLIP's at the same ratio gets as many
steps as cost the same. Where a step costs the same, one run serves both comparisons.

The last runs are for notebooks and questions: other sigmas, fewer vendors, annealed ratios, growing
pictures, tuning, scenes without a centre, optimizers. The optimizers' learning rates are searched
on another vendor. The same command, given again after the search, makes the runs with the best.
"""

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import Annotated

import torch
import tyro

import data
import glip
from glip import GLIPConfig, InputError
from nanoglip import cli, masks, results
from nanoglip.config import RECIPES, TrainConfig, parse, run_name
from nanoglip.machine import cores, machine, resolve
from nanoglip.masker import Masker

ROOT = Path(__file__).parents[1]
SEEDS = (0, 1, 2)
COMPARED = TrainConfig("compare", **RECIPES["compare"])
RATIOS = (0.75, 0.918, 0.5)
HOME = "scenes-center"  # where every mask runs at every ratio
AWAY = ("emoji", "scenes-corner", "scenes-anywhere")  # where most run, at 75 %
HOME_ONLY = {"grid", "block"}
SMALL = "small pictures"  # RECLIP's in the table of costs
ACLIP = "the whole A-CLIP"  # two views, all losses; at 75 % and equal time alone
MASKED = set(masks.MASKS) - {"none"}  # of which the mask alone has a cost
SAME = 1.15  # a step that costs less than this many of GLIP's counts as equal
ART = ("Goog", "Appl", "FB", "Sams")  # to train on the first 1, 2, 4: the question of scale
TUNING = {1: 2.86, 2: 1.43, 4: 0.74}  # epochs of their art that are the comparison's 20 steps
MAPPED = {"scenes-center", "scenes-anywhere"}, {"none", "random", "gaussian", "gaze"}  # by place
WATCHED = 100  # steps between the weights that the figure of the gaze is drawn from
SHIFTS = ("--robustness", "--linear-probe")
SHIFTED = {"emoji"}, {"none", "random", "gaussian", "gaze"}  # with robustness and a probe
VALIDATION = "--held-out Joy --vendors Appl FB Goog Sams Wind"  # where settings are searched
LRS = (5e-4, 1e-3, 2e-3, 4e-3)  # of each optimizer under each of three masks
RECOVERY = {1788: 0.5, 1520: 2.0, 450: 8.0}  # steps at 91.8 %, and epochs of tuning of equal cost
ANNEALED = ("0.9 0.6", "0.6 0.9")  # mask ratios at the start and the end, with the patches of 75 %
GROWN = (  # half of the time that GLIP takes at 32 pixels, half at 64 (Perception Encoder's way)
    "--image-size 32 --steps 225 --tune-image-size 64 --tune-epochs 2.4 --tune-lr 5e-4"
)


@dataclass(frozen=True)
class SweepConfig:
    """Run what is missing of the comparison of masks."""

    jobs: int = 2  # runs at a time, sharing the cores
    masks: tuple[str, ...] = ()  # only these, of the registry or "small pictures" (default: all)
    list: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # print the runs, start none


def mask_flags(mask: str, ratio: float) -> list[str]:
    """The flags of train.py for a mask, or for the small pictures that cost as much."""
    if mask == SMALL:  # the square number of patches nearest to K, tuned at the full size
        model = GLIPConfig.named(COMPARED.model)
        side = model.patch_size * round(glip.num_keep(math.prod(model.grid), ratio) ** 0.5)
        return f"--mask none --image-size {side} --tune-image-size {model.image_size}".split()
    if mask == ACLIP:
        return ["--mask", "attentive", "--aclip", "--mask-ratio", str(ratio)]
    return ["--mask", mask] + (["--mask-ratio", str(ratio)] if mask != "none" else [])


def script(words: list[str], threads: int, folder: Path = ROOT) -> str:
    """Run a script of this project, or of its copy in a folder; returns "", or what went wrong."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    words = [sys.executable, *words]
    done = subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True)
    said = done.stderr.strip() or f"exit {done.returncode}"
    return said.splitlines()[-1] if done.returncode else ""


def times_of(run: Path, stage: str) -> list[float]:
    """Seconds of the steps of a stage after its first, from the log of a run that has them all."""
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    ends = [line["seconds"] for line in lines if line["stage"] == stage and "loss" in line]
    return [later - earlier for earlier, later in pairwise(ends)]


def step_seconds(mask: str, ratio: float, threads: int, steps: int) -> tuple[list, list]:
    """Seconds of training steps under a mask, and of the mask alone; the first are left out."""
    with tempfile.TemporaryDirectory() as place:
        words = ["--recipe", "compare", "--data", HOME, *mask_flags(mask, ratio), "--out", place]
        short = f"--steps {steps} --tune-epochs 0.001 --log-every 1 --eval-every 100000".split()
        if problem := script(["train.py", *words, *short], threads):
            raise InputError(f"train.py {' '.join(words)}: {problem}")
        seconds = times_of(Path(place), "pretrain")
        content = glip.load_checkpoint(Path(place) / "pretrained.pt")
    on, alone = resolve("auto", "auto"), []
    model = glip.build(content).to(on.device)
    masker = Masker.restored(content["mask"], model.visual)
    size, patches = model.config.pixels, model.config.grid[0] * model.config.grid[1]
    batch = content["config"]["batch_size"]
    images = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8)
    for _ in range(steps):
        noise = torch.rand(len(images), patches)
        start = time.perf_counter()
        with on.autocast():
            ids_keep, _ = masker(images.to(on.device), noise.to(on.device), model.visual)
        if ids_keep is not None:
            ids_keep[0, 0].item()  # waits for a GPU
        alone.append(time.perf_counter() - start)
    return seconds[1:], alone[2:]


def rows() -> tuple[str, ...]:
    """Every mask of the registry and what is compared with them."""
    return (*masks.MASKS, SMALL, ACLIP)


def ratios_of(mask: str) -> tuple[float, ...]:
    """The ratios at which a mask is measured."""
    return (0.0,) if mask == "none" else RATIOS[:1] if mask == ACLIP else RATIOS


def measure_cost(threads: int, names: list[str], rounds: int = 3, steps: int = 12) -> dict:
    """Seconds of a training step, and of its mask alone, for masks at every ratio, alternating."""
    torch.set_num_threads(threads)  # as many as a run will have
    variants = [(name, ratio) for name in names for ratio in ratios_of(name)]
    found = {variant: ([], []) for variant in variants}
    for _, variant in product(range(rounds), variants):
        for values, new in zip(found[variant], step_seconds(*variant, threads, steps), strict=True):
            values += new
    rows = [
        {"mask": mask, "mask_ratio": ratio, "step": statistics.median(steps),
         "mask alone": statistics.median(alone)}
        for (mask, ratio), (steps, alone) in found.items()
    ]  # fmt: skip
    on = resolve("auto", "auto")
    return {
        "command": "python -m tools.sweep", "data": HOME, "batch_size": COMPARED.batch_size,
        "rounds": rounds, "model": COMPARED.model, "bf16": on.bf16, "threads": threads,
        "seconds": rows, "machine": machine(on.device),
    }  # fmt: skip


def complete_cost(cost: dict, threads: int) -> dict:
    """The table of costs with missing masks measured; existing rows are not touched.

    A new mask is measured beside GLIP's, and scaled to the seconds of the table's GLIP.
    """
    lacking = [name for name in rows()
               if name not in {row["mask"] for row in cost.get("seconds", [])}]  # fmt: skip
    if not cost or not lacking:
        return cost or measure_cost(threads, lacking)
    new = measure_cost(threads, ["gaussian", *lacking])["seconds"]
    before, now = (
        {row["mask_ratio"]: row["step"] for row in rows if row["mask"] == "gaussian"}
        for rows in (cost["seconds"], new)
    )
    for row in new:
        if row["mask"] in lacking:
            scale = before[row["mask_ratio"]] / now[row["mask_ratio"]]
            scaled = {name: row[name] * scale for name in ("step", "mask alone")}
            cost["seconds"].append({**row, **scaled})
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
        """The name of its folder and its line in results/; runs for both budgets have one."""
        return run_name(config_of(self.flags))


@cache
def config_of(flags: tuple[str, ...]) -> TrainConfig:
    """The settings that these flags of train.py stand for."""
    return parse(list(flags))


def planned(cost: dict) -> list[Run]:
    """Every run of the comparison; masks of equal cost have one run for both budgets.

    Where a mask's cost is not known, its runs at equal time are left out.
    """
    full, runs = COMPARED.steps, []
    for ratio, equal, seed in product(RATIOS, ("steps", "time"), SEEDS):
        places = [(HOME, mask) for mask in (*masks.MASKS, SMALL)]
        if ratio == RATIOS[0]:
            places += product(AWAY, [mask for mask in masks.MASKS if mask not in HOME_ONLY])
            places += product((HOME, *AWAY), [ACLIP] * (equal == "time"))
        for name, mask in places:
            steps = affordable(cost, mask, ratio, full) if equal == "time" else full
            words = ["--recipe", "compare", "--data", name, *mask_flags(mask, ratio)]
            words += [] if steps == full else ["--steps", str(steps)]
            whole = steps == full and (mask == "none" or ratio == RATIOS[0])
            more = ("--positions",) * (whole and name in MAPPED[0] and mask in MAPPED[1])
            if whole and name in SHIFTED[0] and mask in SHIFTED[1]:
                more = SHIFTS
            if steps is not None:
                words += ["--seed", str(seed)]
                words += ["--keep-every", str(WATCHED)] * (whole and mask == "gaze")
                runs.append(Run(name, mask, ratio, equal, seed, tuple(words), more))
    return runs


def questions(published: list[dict]) -> list[Run]:
    """What the notebooks 05 and 06 ask beside the comparison, at 75 % and equal steps.

    `published`: the runs of results/, from which the optimizers' learning rates are chosen.
    """
    three = ("none", "random", "gaussian")
    asked = [  # data, mask, flags of train.py, seeds, flags of evaluate.py
        *((HOME, "gaussian", f"--sigma {s}", 3, ()) for s in (0.05, 0.1, 0.4, 0.8)),
        *(("emoji", mask, f"--vendors {' '.join(ART[:n])} --tune-epochs {epochs}", 1, SHIFTS)
          for n, epochs in TUNING.items() for mask in three),
        *((HOME, "gaussian", f, 2, ()) for f in ("--sigma 0.1 0.4", "--mask-center 0 0.5")),
        *((name, "gaussian", f"--mask-ratio {ends}", 3, ())
          for name in (HOME, "emoji") for ends in ANNEALED),
        *((name, "none", GROWN, 3, ()) for name in (HOME, "emoji")),
        *((HOME, "gaussian", f"--mask-ratio 0.918 --steps {steps} --tune-epochs {epochs}", 3, ())
          for steps, epochs in RECOVERY.items()),
        *(("scenes-tiled", mask, "", 3, ()) for mask in (*three, "gaze")),
    ]  # fmt: skip
    for mask, optimizer in product(three, ("adamw", "muon")):
        flags = [f"--optimizer {optimizer} --lr {lr}" for lr in LRS]
        asked += [("emoji", mask, f"{VALIDATION} {words}", 1, ()) for words in flags]
        if best := best_of(published, f"--mask {mask} {VALIDATION}", flags):
            asked.append(("emoji", mask, best, 3, ()))
    runs = []
    for seed, (name, mask, flags, seeds, more) in product(SEEDS, asked):
        if seed < seeds:
            words = f"--recipe compare --data {name} --mask {mask} {flags} --seed {seed}".split()
            ratio = 0.0 if mask == "none" else 0.918 if "0.918" in words else RATIOS[0]
            runs.append(Run(name, mask, ratio, "steps", seed, tuple(words), more))
    return runs


def best_of(runs: list[dict], common: str, flags: list[str]) -> str:
    """Of `flags`, each run beside `common`, the most accurate; "" before all were run."""
    found = {words: seeds_of(runs, f"{common} {words}") for words in flags}
    return max(found, key=found.get) if all(found.values()) else ""


def runs_of(runs: list[dict], flags: str) -> list[dict]:
    """Every published seed of `train.py --recipe compare FLAGS`."""
    published = {run["name"]: run for run in runs}
    words = ("--recipe", "compare", *flags.split(), "--seed")
    names = [run_name(config_of((*words, str(seed)))) for seed in SEEDS]
    return [published[name] for name in names if name in published]


def seeds_of(
    runs: list[dict], flags: str, column: str = "after tuning", metric: str = "zero-shot top-1"
) -> list[float]:
    """A metric of `runs_of` these flags, in percent."""
    found = [run["held_out"] for run in runs_of(runs, flags)]
    return [100 * held_out[column][metric] for held_out in found if column in held_out]


def carry_out(run: Run, threads: int) -> str:
    """Train, evaluate and publish one run; returns "", or what went wrong."""
    place = f"runs/sweep/{run.name}"
    folder = ROOT / place
    if folder.exists() and not (folder / "model.pt").exists():
        shutil.rmtree(folder)  # a run of the sweep that was interrupted
    commands = [["evaluate.py", place, "--publish", *run.more]]
    if not folder.exists():
        commands.insert(0, ["train.py", *run.flags, "--out", place, "--eval-every", "100000"])
    start = time.perf_counter()
    for words in commands:
        if problem := script(words, threads):
            return f"{run.name}: {problem}"
    print(f"{run.name}: {time.perf_counter() - start:.0f} s", flush=True)
    return ""


def lacks(line: dict | None, run: Run) -> bool:
    """Whether the line of a run is not there, or lacks an answer that its flags ask for."""
    return line is None or any(flag[2:].replace("-", "_") not in line for flag in run.more)


@cli.guarded
def main() -> None:
    """The command line."""
    options = tyro.cli(SweepConfig, description=__doc__)
    cli.check_numbers(options, above_0=("jobs",))
    threads = max(1, cores() // options.jobs)
    cost = results.load("cost")
    unknown = [mask for mask in options.masks if mask not in rows()]
    if unknown:
        choices = ", ".join((*masks.MASKS, f"'{SMALL}'", f"'{ACLIP}'"))
        raise InputError(f"--masks {unknown[0]}: choose from {choices}")
    if not options.list:
        commit = machine(torch.device("cpu"))["commit"]
        if not commit or commit.endswith("-dirty"):
            raise InputError("results name the commit they come from: commit your changes")
        for name in (HOME, *AWAY):  # decode once, before runs share the cache
            data.load(name, glip.SIZES[COMPARED.model][0])
    if not options.list or not cost:
        cost = complete_cost(cost, threads)
        results.save("cost", cost)
    wanted = options.masks or rows()
    published = results.load_runs()
    plan = (*planned(cost), *questions(published), *planned(cost))  # what the first asks wins
    runs = {run.name: run for run in plan if run.mask in wanted}
    done = {run["name"]: run for run in published}
    missing = [run for run in runs.values() if lacks(done.get(run.name), run)]
    if options.list:
        for run in runs.values():
            print("missing" if run in missing else "done   ", "python train.py", *run.flags)
        return
    with ThreadPoolExecutor(options.jobs) as pool:
        failed = [problem for problem in pool.map(lambda run: carry_out(run, threads), missing)
                  if problem]  # fmt: skip
    if failed:
        raise InputError(f"{cli.counted(len(failed), 'run')} failed, the first is {failed[0]}")


if __name__ == "__main__":
    main()
