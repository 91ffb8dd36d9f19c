"""The folder results/: runs.jsonl, one line for each published run, and a few JSON files.

    pandas.read_json("results/runs.jsonl", lines=True)

A line has the run's name, its flags, the settings that differ from the recipe, the commit, the id
of the machine (in machines.json), and the metrics. Writers wait for each other.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from glip import InputError
from nanoglip import files
from nanoglip.config import MACHINE, RECIPES, TrainConfig

FOLDER = Path(__file__).parents[1] / "results"
DIGITS = 5  # after the decimal point: with fewer, means print differently
LEFT_OUT = {
    "command", "config", "trained_on", "evaluated_on", "intervals", "chance", "checkpoints",
}  # fmt: skip


def load(name: str, folder: Path = FOLDER) -> dict:
    """The content of NAME.json, {} where there is none; raises InputError for a broken file."""
    path, content = folder / f"{name}.json", None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: not what evaluate.py writes: remove it, or bring a whole one")
    return content


def save(name: str, content: dict, folder: Path = FOLDER) -> None:
    """Write NAME.json."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    files.write_bytes(folder / f"{name}.json", text.encode())


def save_bench(name: str, found: dict, folder: Path = FOLDER) -> None:
    """Add or replace one measurement in bench.json."""
    with one_writer(folder):
        save("bench", {**load("bench", folder), name: found}, folder)


def load_runs(folder: Path = FOLDER, having: str = "held_out") -> list[dict]:
    """Every published run that has a part, such as "held_out" or "benchmarks".

    `config` has all settings again, and `trained_on` the record of the machine.
    """
    machines, runs = load("machines", folder), []
    for line in read_lines(folder):
        run = json.loads(line)
        config = {**usual(run["settings"].get("recipe", "demo")), **run["settings"]}
        where = {**machines[run["machine"]], "commit": run["commit"]}
        runs += [{**run, "config": config, "trained_on": where}] * (having in {"config", *run})
    return runs


def add_run(results: dict, folder: Path = FOLDER) -> None:
    """Add or replace a run's line in runs.jsonl; `results` is the content of its results.json."""
    results = json.loads(json.dumps(results))  # lists for tuples, as in `usual`
    where = dict(results["trained_on"])
    commit = where.pop("commit")
    machine = files.digest([], json.dumps(where, sort_keys=True))[:8]
    config = results["config"]
    expected = usual(config["recipe"])
    settings = {
        name: value for name, value in config.items()
        if name == "recipe" or (name not in MACHINE and expected.get(name) != value)
    }  # fmt: skip
    line = json.dumps({
        "name": results["name"],
        "flags": results["command"].partition("train.py")[2].strip(),
        "settings": settings, "commit": commit, "machine": machine, **rounded(results),
    }, ensure_ascii=False)  # fmt: skip
    with one_writer(folder):
        save("machines", {**load("machines", folder), machine: where}, folder)
        lines = {json.loads(old)["name"]: old for old in read_lines(folder)}
        lines = sorted({**lines, results["name"]: line}.items())
        text = "".join(f"{line}\n" for _, line in lines)
        files.write_bytes(folder / "runs.jsonl", text.encode())


def read_lines(folder: Path) -> list[str]:
    """The lines of runs.jsonl."""
    path = folder / "runs.jsonl"
    return path.read_text("utf-8").splitlines() if path.exists() else []


def usual(recipe: str) -> dict:
    """A recipe's settings as JSON holds them; `data` is one string, as in results.json."""
    config = json.loads(json.dumps(asdict(TrainConfig(recipe, **RECIPES[recipe]))))
    return {**config, "data": " ".join(config["data"])}


def portable(config: dict) -> dict:
    """A run's settings without the folders of this machine."""
    names = [config["data"]] if isinstance(config["data"], str) else config["data"]
    names = " ".join(Path(name).name for name in names)
    paths = {key: Path(config.get(key, "")).name for key in ("out", "clusters", "init", "extend")}
    sets = [Path(name).name for name in config.get("eval_sets", ())]
    return {**config, **paths, "eval_sets": sets, "data": names}


def rounded(content: object) -> object:
    """Results with numbers rounded to DIGITS, and without what runs.jsonl leaves out."""
    if isinstance(content, dict):
        return {key: rounded(value) for key, value in content.items() if key not in LEFT_OUT}
    return round(content, DIGITS) if isinstance(content, float) else content


@contextlib.contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Wait until no other process writes to the folder, and let none do so meanwhile.

    Some network disks cannot be locked: there nothing is checked.
    """
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError, ImportError):  # Windows has no fcntl
            import fcntl

            number = os.open(folder, os.O_RDONLY)
            held.callback(os.close, number)
            fcntl.flock(number, fcntl.LOCK_EX)
        yield
