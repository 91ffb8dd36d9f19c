"""Evaluate a run: zero-shot on what was held out, retrieval, linear probe, and pictures of it.

    python evaluate.py                      the run written last
    python evaluate.py runs/demo --linear-probe
    python evaluate.py runs/demo --robustness               the same pictures, blurred, turned, ...
    python evaluate.py runs/demo --publish  adds it to results/; --figures: its PNGs to docs/
    python evaluate.py runs/demo --zero-shot DIR --retrieval DIR            published sets:
    python evaluate.py runs/demo --suite paper --root DIR                   see benchmarks.py
    python evaluate.py runs/a runs/b        which differences between two runs are real; with
                                            --zero-shot, --retrieval or --suite on published sets
    python evaluate.py runs/demo --search "a red apple" --images DIR        see search.py

Prints tables and writes into the run's folder results.json, outcomes.npz (the rank of every right
answer) and PNGs: loss.png, masks.png, top5.png, retrieval.png; report.html shows them.
Pictures show Google's and Twitter's art only, whose licences allow it.
"""

import contextlib
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

import data
import glip
from glip import InputError
from nanoglip import cli, files, page
from nanoglip.distributed import processes
from nanoglip.evals import benchmarks, figures, probe, search, significance
from nanoglip.evals.encoder import (
    Encoder,
    features,
    intervals,
    mask_shares,
    metrics,
    prompted,
    ranked,
    robustness,
)
from nanoglip.evals.metrics import WITHIN, hits
from nanoglip.evals.probe import probe_all
from nanoglip.files import digest
from nanoglip.machine import Device, machine, resolve
from nanoglip.masks import Masker
from nanoglip.results import add_run
from nanoglip.sources.pictures import HeldOut

# --- Two runs, example by example -----------------------------------------------------------------


def identity(run: Path, precision: str) -> str:
    """The digest of a run's models and of the precision in which they multiply."""
    models = [run / name for name in ("model.pt", "pretrained.pt") if (run / name).is_file()]
    return digest(models, precision)


def keep_ranks(
    run: Path, found: dict[str, dict[str, Tensor]], pairs: HeldOut, model: str
) -> None:
    """Write every answer's rank to outcomes.npz, which pairs were asked about, and the `model`."""
    asked = json.dumps([pairs.examples(), pairs.captions, pairs.concept.tolist()])
    arrays = {column: {question: rank.numpy() for question, rank in questions.items()}
              for column, questions in found.items()}  # fmt: skip
    significance.save_outcomes(run / "outcomes.npz", arrays, digest([], asked), model)


def kept_ranks(run: Path, options: "EvaluateConfig") -> tuple[dict[str, dict[str, Tensor]], str]:
    """What keep_ranks wrote; evaluates where that is missing, or of another model or precision."""
    path = run / "outcomes.npz"
    model = identity(run, resolve(options.device, options.precision).precision)
    if not path.is_file() or significance.load_outcomes(path)[2] != model:
        run_evaluation(replace(options, run=str(run), other=""))
    arrays, pairs, _ = significance.load_outcomes(path)
    found = {column: {question: torch.from_numpy(rank) for question, rank in questions.items()
                      if question in WITHIN} for column, questions in arrays.items()}  # fmt: skip
    return found, pairs


def compare_runs(options: "EvaluateConfig") -> list[str]:
    """`evaluate.py A B`, on held-out pairs or published sets; returns what is wrong with sets."""
    runs, problems = (run_folder(options.run), run_folder(options.other)), []
    if sets_asked(options):
        with processes(options.device) as among:
            (a, problems), (b, _) = (run_benchmarks(replace(options, run=str(run)), *among)
                                     for run in runs)  # fmt: skip
        if not a:  # all are broken, or the first process has them
            return problems
        a, b = ({f"{name}, {column}": answers for name, columns in side.items()
                 for column, answers in columns.items()} for side in (a, b))  # fmt: skip
    else:
        (a, pairs), (b, other_pairs) = (kept_ranks(run, options) for run in runs)
        if pairs != other_pairs:
            raise InputError(
                f"{runs[0]} and {runs[1]} held out different pairs, and cannot be compared one by "
                "one: name two runs with the same --data and --held-out"
            )
        a, b = ({column: hits(found) for column, found in side.items()} for side in (a, b))
    both = [column for column in a if a[column] and a[column].keys() == b.get(column, {}).keys()]
    if not both:
        raise InputError(
            f"{runs[0]} and {runs[1]} share no column of single answers: "
            f"{', '.join(a) or 'nothing held out'} against {', '.join(b) or 'nothing held out'}; "
            "compare runs of the same stages, on sets whose metric is a share of answers"
        )
    tables = significance.compare(*({column: side[column] for column in both} for side in (a, b)))
    precision = resolve(options.device, options.precision).precision
    cli.say(f"A: {runs[0]}\nB: {runs[1]}\nin {precision}\n{significance.comparison_table(tables)}")
    return problems


# --- The command ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate a run on what was held out; draw it; keep the numbers."""

    run: Annotated[
        str, tyro.conf.Positional,
        tyro.conf.arg(metavar="[RUN]", help_behavior_hint="(default: the run written last)"),
    ] = ""
    """folder of a run"""
    other: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(metavar="[OTHER]", help_behavior_hint="(optional)")
    ] = ""
    """folder of a second run: compare both, example by example"""
    search: str = ""  # a text: which of --images fit it best; needs no data of the run's
    images: str = ""  # a folder of pictures, for --search
    classify: str = ""  # a picture: which of --names fits it best
    names: str = ""  # names or whole captions, with commas between, for --classify
    attention: str = ""  # a picture: draw where the image tower looks
    linear_probe: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # also probe the features
    probe_data: tuple[str, ...] = ()  # labelled folders (DIR/train/CLASS/*.jpg) to probe them on
    few_shot: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # probe with few pictures, too
    robustness: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # on changed pictures too
    publish: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # add it to results/runs.jsonl
    figures: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # copy the PNGs to docs/figures/
    zero_shot: tuple[str, ...] = ()  # instead: published sets in folders
    retrieval: tuple[str, ...] = ()  # instead: published sets with captions, in folders
    suite: Literal["none", "paper"] = "none"  # instead: the paper's sets, as far as under --root
    root: str = "."  # folder of the suite's sets
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where multiplied natively
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of these there is


SETTINGS = {
    "data", "vendors", "held_out", "mask", "mask_ratio", "seed", "out", "model", "aclip",
    "text_mask",
}  # fmt: skip


def last_run() -> Path:
    """The folder under runs/ whose model was written last."""
    models = sorted(Path("runs").glob("*/model.pt"), key=lambda path: path.stat().st_mtime)
    if not models:
        raise InputError("runs/ holds no finished run: start one with python train.py")
    return models[-1].parent


def run_folder(name: str) -> Path:
    """A run's folder, the latest for ""; raises InputError where no model is in it."""
    run = Path(name) if name else last_run()
    run = run.resolve() if run.name in ("", "..") else run  # results are told by the folder's name
    if not (run / "model.pt").is_file():
        raise InputError(f"{run}: no model.pt in it; name the folder of a finished run")
    return run


def sets_asked(options: EvaluateConfig) -> bool:
    """Whether published sets are asked about, in the place of held-out pairs."""
    return bool(options.zero_shot or options.retrieval or options.suite != "none")


def run_command(options: EvaluateConfig) -> None:
    """Everything that `python evaluate.py` does."""
    asked, pair = search.given_flags(options), ["a second run"] * bool(options.other)
    sets = ["published sets"] * sets_asked(options)
    flags = ("linear_probe", "probe_data", "few_shot", "robustness", "publish", "figures")
    beside = [f"--{flag.replace('_', '-')}" for flag in flags if getattr(options, flag)]
    given = [*asked, *pair, *sets, *beside]
    held_out = sets and (options.robustness or options.figures)  # which are of held-out pairs
    if (asked and len(given) > 1) or (pair and beside) or held_out:
        raise InputError(f"{' and '.join(given)}: one at a time, please")
    problems = []
    if options.other:
        problems = compare_runs(options)
    elif asked:
        run, on = run_folder(options.run), resolve(options.device, options.precision)
        model = glip.load_model(run / "model.pt")[0].to(on.device)
        search.use(Encoder(model, on), run, options)
    elif sets:
        with processes(options.device) as among:
            _, problems = run_benchmarks(options, *among)
    else:
        run_evaluation(options)
    if problems:
        raise InputError(*problems)


def open_run(
    options: EvaluateConfig, on: Device
) -> tuple[Path, dict, Encoder, Encoder, Masker]:
    """(folder, content of model.pt, its model, the one before tuning, the mask of training)."""
    run = run_folder(options.run)
    content = masked = glip.load_checkpoint(run / "model.pt")
    record = {"config", "mask", "steps", "stage", "seconds", "machine", "command", "world", "bf16"}
    if record - content.keys() or SETTINGS - content["config"].keys():
        raise InputError(f"{run}/model.pt holds no full training record; name a run of train.py")

    def encoder(content: dict) -> Encoder:
        return Encoder(glip.build(content).to(on.device), on)

    before = final = encoder(content)
    if content["stage"] == "tune" and (run / "pretrained.pt").is_file():
        masked = glip.load_checkpoint(run / "pretrained.pt")
        before = encoder(masked)
    return run, content, final, before, Masker.restored(masked["mask"], before.model.visual)


def columns_of(
    final: Encoder, before: Encoder, masker: Masker, tuned: bool
) -> dict[str, tuple[Encoder, Masker | None]]:
    """The paper's columns that a run can have: who is asked, and under which mask."""
    columns = {"masked inference": (before, masker)} if masker.mask != "none" else {}
    if before is not final or not tuned:
        columns["full picture"] = (before, None)
    return columns | ({"after tuning": (final, None)} if tuned else {})


def run_evaluation(options: EvaluateConfig) -> dict:
    """Evaluate a run on its held-out pairs; the content of results.json is returned."""
    if cli.place()[2] > 1:
        raise InputError("several processes are for --zero-shot, --retrieval and --suite alone")
    on = resolve(options.device, options.precision)
    run, content, encoder, before, masker = open_run(options, on)
    config = content["config"]
    folders = labelled_folders(options, encoder.model.config.pixels[0])
    opened = partial(
        data.load, config["data"], vendors=tuple(config["vendors"]), held_out=config["held_out"],
        max_bad=config.get("max_bad", data.MAX_BAD),
    )  # fmt: skip
    known_results(run)  # told before the work if it cannot be read
    train, test = opened(image_size=encoder.model.config.pixels[0])
    before_test = test
    if before.model.config != encoder.model.config:
        before_test = opened(image_size=before.model.config.pixels[0])[1]
    found, shares, last = {}, {}, None
    if len(test.concept):
        columns = columns_of(encoder, before, masker, content["stage"] == "tune")
        for column, (own, mask) in columns.items():
            pairs = test if own is encoder else before_test
            last = features(own, pairs, mask)  # in the end the final model's, of whole pictures
            found[column] = ranked(pairs, *last)
        if masker.mask != "none":
            shares = mask_shares(before, before_test, masker)
    results = {
        **known_results(run), **record_of(run, content),
        "counts": {**train.counts, "training pictures": len(train) - len(train.held),
                   "held-out pictures": len(test.concept), "captions": len(test.captions)},
        "evaluated_on": machine(on.device), "evaluation_bf16": on.bf16,
        "mask_shares": shares,
        "held_out": {column: metrics(answers) for column, answers in found.items()},
        "intervals": {column: intervals(answers) for column, answers in found.items()},
    }  # fmt: skip
    if test.flags is not None:
        results["prompted"] = prompted(encoder, test, last[0])
    if options.linear_probe or folders:
        probed = probe_all(encoder, run, folders, options.linear_probe, options.few_shot)
        results["linear_probe"] = {**results.get("linear_probe", {}), **probed}
    if options.robustness and len(test.concept):
        results["robustness"] = robustness(encoder, test)
    told = describe(results)
    cli.say(told)  # before anything is written: the folder may be read-only
    write_results(run, results)
    keep_ranks(run, found, test, identity(run, on.precision))
    pictures = figures.draw_all(
        run, config.get("loss", "clip") == "clip" and not config["aclip"], last, test, before.model,
        before_test, masker,
    )  # fmt: skip
    files = ["results.json", "outcomes.npz", *pictures]
    print_files(run, files, page.add_results(run, "held-out pairs", told, pictures))
    publish(run, options, pictures)
    return results


def run_benchmarks(
    options: EvaluateConfig, rank: int, world: int, device: torch.device
) -> tuple[dict[str, dict], list[str]]:
    """Evaluate on published sets, on all processes; the results stand beside what was there.

    Returns the answers, on the first process, and what is wrong with some sets. Probes are its
    alone: of the suite's sets, too, where they have training shards and no second run is asked.
    """
    places, captioned, probed = options.zero_shot, options.retrieval, []
    if options.suite != "none":
        own, own_captioned, missing = benchmarks.suite(Path(options.root))
        if rank == 0 and missing:
            cli.say("\n".join(missing))
        if not (own or own_captioned or places or captioned):
            raise InputError(f"--root {options.root}: none of the paper's sets is in it")
        places, captioned = (*places, *own), (*captioned, *own_captioned)
        probed = [place for place in own if benchmarks.set_name(Path(place)) in benchmarks.PROBED
                  and (Path(place) / "train/nshards.txt").exists() and not options.other
                  and place not in options.probe_data]  # fmt: skip
    on = resolve(device, options.precision)
    run, content, encoder, before, masker = open_run(options, on)
    columns = columns_of(encoder, before, masker, content["stage"] == "tune")
    folders = labelled_folders(options, encoder.model.config.pixels[0])
    known_results(run)  # as above
    new, answers, problems = benchmarks.evaluate_sets(
        columns, places, captioned, rank, world
    )
    if rank:
        return answers, problems
    results = {**known_results(run), **record_of(run, content)}
    where = {"evaluated_on": machine(device), "bf16": on.bf16}
    new = {name: {**entry, **where} for name, entry in new.items()}
    results["benchmarks"] = {**results.get("benchmarks", {}), **new}
    found, told = {}, []
    if new:
        told.append(benchmarks.sets_table(new, on.precision))
        cli.say(told[0])
        write_results(run, results)
    try:
        folders += [probe.open_set(place, encoder.model.config.pixels[0]) for place in probed]
        found = probe_all(encoder, run, folders, options.linear_probe, options.few_shot)
    except InputError as error:
        problems.append(str(error))
    if found:
        results["linear_probe"] = {**results.get("linear_probe", {}), **found}
        told += probe.probe_lines(found)
        cli.say("\n".join(probe.probe_lines(found)))
        write_results(run, results)
    if told:
        written = page.add_results(run, "published sets", "\n".join(told), [])
        print_files(run, ["results.json"], written)
        publish(run, options, [])
    return answers, problems


def print_files(run: Path, files: list[str], written: Path | None) -> None:
    """Say what was written, and which page shows it."""
    print(f"wrote {', '.join(files)} into {run}" + f"; see {written}" * bool(written))


def known_results(run: Path) -> dict:
    """What an earlier evaluation, perhaps of other sets, left in results.json.

    Raises InputError for a file that is not whole: to write it anew would lose what it held.
    """
    path, content = run / "results.json", None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: not what evaluate.py writes: remove it, or bring a whole one")
    return content


def record_of(run: Path, content: dict) -> dict:
    """What results.json says of the training, from the content of model.pt."""
    return {
        "name": run.name, "command": content["command"], "config": portable(content["config"]),
        "steps": content["steps"], "world": content["world"], "bf16": content["bf16"],
        "train_seconds": content["seconds"], "trained_on": content["machine"],
    }  # fmt: skip


def write_results(run: Path, results: dict) -> None:
    """Write results.json."""
    files.write_bytes(run / "results.json", (json.dumps(results, indent=1) + "\n").encode())


def publish(run: Path, options: EvaluateConfig, pictures: list[str]) -> None:
    """Write the run's line in results/runs.jsonl, and copy its PNGs, where asked."""
    if options.publish:
        add_run(known_results(run))
        print(f"published {run.name} in results/runs.jsonl")
    for name in pictures if options.figures else ():
        files.write_bytes(Path(__file__).parent / "docs/figures" / name, (run / name).read_bytes())
        print(f"published docs/figures/{name}")


def labelled_folders(options: EvaluateConfig, image_size: int) -> list[tuple]:
    """What --probe-data names, opened; raises InputError before anything is computed."""
    if options.few_shot and not (options.linear_probe or options.probe_data):
        raise InputError("--few-shot is a part of a probe: add --linear-probe or --probe-data DIR")
    folders = [probe.open_set(place, image_size) for place in options.probe_data]
    names = [name for name, *_ in folders]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"--probe-data: two folders are called '{twice}': rename one of them")
    return folders


def portable(config: dict) -> dict:
    """A run's settings without the folders of this machine."""
    names = [config["data"]] if isinstance(config["data"], str) else config["data"]
    names = " ".join(Path(name).name for name in names)
    paths = {key: Path(config.get(key, "")).name for key in ("out", "clusters", "init")}
    return {**config, **paths, "data": names}


def describe(results: dict) -> str:
    """The results as text: a table of the held-out pairs, and one of the probe."""
    tables, config = results["held_out"], results["config"]
    lines = [
        f"{results['name']}: {config['model']}, {config['data']}, mask {config['mask']} "
        f"{config['mask_ratio']:.1%}{', A-CLIP' * config['aclip']}, "
        + f"text mask {config['text_mask']}, " * (config["text_mask"] != "none")
        + f"{'bf16' if results['evaluation_bf16'] else 'fp32'}, seed {config['seed']}; "
        f"{results['counts']['held-out pictures']:,} held-out pictures"
    ]
    if any(tables.values()):
        lines.append(f"{'':30}" + "".join(f"{name:>22}" for name in tables))
        for metric in next(iter(tables.values())):
            cells = ""
            for column, table in tables.items():
                low, high = results["intervals"][column][metric]
                between = f"({100 * low:.1f}-{100 * high:.1f})"
                cells += f"{100 * table[metric]:>8.1f} % {between:>11}"
            lines.append(f"{metric:30}" + cells)
    else:
        lines.append("too few pairs, one in twenty, were held out to ask anything")
    shares = results["mask_shares"]
    if shares and shares["visible"] != shares["computed"]:
        lines.append(
            f"masked inference computes {shares['computed']:.1%} of the patches and sees "
            f"{shares['visible']:.1%}"
        )
    for prompt, value in results.get("prompted", {}).items():
        lines.append(f"{'zero-shot top-1, ' + prompt:40}{100 * value:>8.1f} %")
    lines += probe.probe_lines(results.get("linear_probe", {}))
    for name, table in results.get("robustness", {}).items():
        for metric, value in list(table.items())[:1]:
            lines.append(f"{metric}, {name:{30 - len(metric)}}{100 * value:>16.1f} %")
    return "\n".join(lines)


@cli.guarded
def main() -> None:
    """The command line: bad input is one sentence and exit code 2."""
    run_command(tyro.cli(EvaluateConfig, description=__doc__))


if __name__ == "__main__":
    main()
