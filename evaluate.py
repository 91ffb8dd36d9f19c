"""Evaluate a run: zero-shot on what was held out, retrieval, linear probe, and figures of it.

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
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

import data
import glip
from glip import InputError
from nanoglip import cli, files, page
from nanoglip.distributed import processes
from nanoglip.evals import benchmarks, figures, probe, search, significance
from nanoglip.evals.encoder import (
    Encoder,
    encode_pairs,
    intervals_of,
    mask_shares,
    prompted,
    rank_features,
    robustness,
    shares_of,
)
from nanoglip.evals.metrics import WITHIN, hits
from nanoglip.machine import Device, machine, resolve
from nanoglip.masks import Masker
from nanoglip.results import add_run

# --- The command line -----------------------------------------------------------------------------


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
    linear_probe: bool = False  # also probe the features
    probe_data: tuple[str, ...] = ()  # labelled folders (DIR/train/CLASS/*.jpg) to probe them on
    few_shot: bool = False  # probe with few pictures, too
    robustness: bool = False  # on changed pictures too
    publish: bool = False  # add it to results/runs.jsonl
    figures: bool = False  # copy the PNGs to docs/figures/
    zero_shot: tuple[str, ...] = ()  # instead: published sets in folders
    retrieval: tuple[str, ...] = ()  # instead: published sets with captions, in folders
    suite: Literal["none", "paper"] = "none"  # instead: the paper's sets, as far as under --root
    root: str = "."  # folder of the suite's sets
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where multiplied natively
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of these there is

    def names_sets(self) -> bool:
        """Whether published sets take the place of held-out pairs."""
        return bool(self.zero_shot or self.retrieval or self.suite != "none")


def run_command(options: EvaluateConfig) -> None:
    """Do everything that `python evaluate.py` does."""
    own_pictures, pair = search.given_flags(options), ["a second run"] * bool(options.other)
    sets, problems = ["published sets"] * options.names_sets(), []
    flags = ("linear_probe", "probe_data", "few_shot", "robustness", "publish", "figures")
    more = [f"--{flag.replace('_', '-')}" for flag in flags if getattr(options, flag)]
    given = [*own_pictures, *pair, *sets, *more]
    of_held_out = options.robustness or options.figures
    if (own_pictures and len(given) > 1) or (pair and more) or (sets and of_held_out):
        raise InputError(f"{' and '.join(given)}: one at a time, please")
    if pair:
        problems = compare_runs(options)
    elif own_pictures:
        folder, on = run_folder(options.run), resolve(options.device, options.precision)
        model = glip.load_model(folder / "model.pt")[0].to(on.device)
        search.use(Encoder(model, on), folder, options)
    elif sets:
        with processes(options.device) as among:
            _, problems = run_benchmarks(options, *among)
    else:
        run_evaluation(options)
    if problems:
        raise InputError(*problems)


# --- A run ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run that was trained here."""

    folder: Path
    content: dict  # of model.pt
    final: Encoder
    before: Encoder  # tuning; the same as `final` where nothing was tuned
    masker: Masker  # of pre-training

    def columns(self) -> dict[str, tuple[Encoder, Masker | None]]:
        """The paper's columns that the run can have: the model, and the mask it is asked under."""
        tuned, columns = self.content["stage"] == "tune", {}
        if self.masker.mask != "none":
            columns["masked inference"] = self.before, self.masker
        if self.before is not self.final or not tuned:
            columns["full picture"] = self.before, None
        return columns | ({"after tuning": (self.final, None)} if tuned else {})

    def record(self) -> dict:
        """What results.json says of the training."""
        content = self.content
        return {
            "name": self.folder.name, "command": content["command"],
            "config": portable(content["config"]), "steps": content["steps"],
            "world": content["world"], "bf16": content["bf16"],
            "train_seconds": content["seconds"], "trained_on": content["machine"],
        }  # fmt: skip


def run_folder(name: str) -> Path:
    """A run's folder, the latest for ""; raises InputError where no model is in it."""
    if not name:
        models = sorted(Path("runs").glob("*/model.pt"), key=lambda path: path.stat().st_mtime)
        if not models:
            raise InputError("runs/ holds no finished run: start one with python train.py")
        name = models[-1].parent
    folder = Path(name)
    folder = folder.resolve() if folder.name in ("", "..") else folder  # results have its name
    if not (folder / "model.pt").is_file():
        raise InputError(f"{folder}: no model.pt in it; name the folder of a finished run")
    return folder


def open_run(options: EvaluateConfig, on: Device) -> Run:
    """The run that is asked about, its models on a device."""
    folder = run_folder(options.run)
    content = masked = glip.load_checkpoint(folder / "model.pt")
    record = {"config", "mask", "steps", "stage", "seconds", "machine", "command", "world", "bf16"}
    settings = {"data", "vendors", "held_out", "mask", "mask_ratio", "seed", "out", "model",
                "aclip", "text_mask"}  # fmt: skip
    if record - content.keys() or settings - content["config"].keys():
        raise InputError(f"{folder}/model.pt holds no full training record; name a run of train.py")
    before = final = Encoder(glip.build(content).to(on.device), on)
    if content["stage"] == "tune" and (folder / "pretrained.pt").is_file():
        masked = glip.load_checkpoint(folder / "pretrained.pt")
        before = Encoder(glip.build(masked).to(on.device), on)
    masker = Masker.restored(masked["mask"], before.model.visual)
    return Run(folder, content, final, before, masker)


# --- Held-out pairs -------------------------------------------------------------------------------


def run_evaluation(options: EvaluateConfig) -> dict:
    """Evaluate a run on its held-out pairs; the content of results.json is returned."""
    if cli.place()[2] > 1:
        raise InputError("several processes are for --zero-shot, --retrieval and --suite alone")
    on = resolve(options.device, options.precision)
    run = open_run(options, on)
    config, encoder, before = run.content["config"], run.final, run.before
    folders = labelled_folders(options, encoder)
    opened = partial(
        data.load, config["data"], vendors=tuple(config["vendors"]), held_out=config["held_out"],
        max_bad=config.get("max_bad", data.MAX_BAD),
    )  # fmt: skip
    known_results(run.folder)  # raises before the work
    train, test = opened(image_size=encoder.model.config.pixels[0])
    before_test = test
    if before.model.config != encoder.model.config:
        before_test = opened(image_size=before.model.config.pixels[0])[1]
    ranks, last = {}, None
    for column, (own, mask) in run.columns().items() if len(test.concept) else ():
        pairs = test if own is encoder else before_test
        last = encode_pairs(own, pairs, mask)  # in the end the final model's, of whole pictures
        ranks[column] = rank_features(pairs, *last)
    masked = "masked inference" in ranks
    results = {
        **known_results(run.folder), **run.record(),
        "counts": {**train.counts, "training pictures": len(train) - len(train.held),
                   "held-out pictures": len(test.concept), "captions": len(test.captions)},
        "evaluated_on": machine(on.device), "evaluation_bf16": on.bf16,
        "mask_shares": mask_shares(before, before_test, run.masker) if masked else {},
        "held_out": {column: shares_of(found) for column, found in ranks.items()},
        "intervals": {column: intervals_of(found) for column, found in ranks.items()},
    }  # fmt: skip
    if test.flags is not None:
        results["prompted"] = prompted(encoder, test, last[0])
    if options.linear_probe or folders:
        run_probes(run, options, folders, results)
    if options.robustness and len(test.concept):
        results["robustness"] = robustness(encoder, test)
    text = results_table(results)
    write_results(run.folder, results, text)
    asked = json.dumps([test.examples(), test.captions, test.concept.tolist()])
    significance.save_outcomes(
        run.folder / "outcomes.npz",
        {column: {question: rank.numpy() for question, rank in found.items()}
         for column, found in ranks.items()},
        files.digest([], asked), identity(run.folder, on),
    )  # fmt: skip
    chance = config.get("loss", "clip") == "clip" and not config["aclip"]
    drawn = figures.draw_all(
        run.folder, chance, last, test, before.model, before_test, run.masker
    )
    publish(run.folder, options, "held-out pairs", text, ["outcomes.npz"], drawn)
    return results


def labelled_folders(options: EvaluateConfig, encoder: Encoder) -> list[tuple]:
    """What --probe-data names, opened; raises InputError before anything is computed."""
    if options.few_shot and not (options.linear_probe or options.probe_data):
        raise InputError("--few-shot is a part of a probe: add --linear-probe or --probe-data DIR")
    side = encoder.model.config.pixels[0]
    folders = [probe.open_set(place, side) for place in options.probe_data]
    for name, count in Counter(name for name, *_ in folders).items():
        if count > 1:
            raise InputError(f"--probe-data: two folders are called '{name}': rename one of them")
    return folders


def run_probes(
    run: Run, options: EvaluateConfig, folders: list[tuple], results: dict
) -> list[str]:  # fmt: skip
    """Probe the final model and add what is found to `results`; returns it as lines."""
    found = probe.probe_all(
        run.final, run.folder, folders, options.linear_probe, options.few_shot
    )
    results["linear_probe"] = {**results.get("linear_probe", {}), **found}
    return probe.probe_lines(found)


# --- Published sets -------------------------------------------------------------------------------


def run_benchmarks(
    options: EvaluateConfig, rank: int, world: int, device: torch.device
) -> tuple[dict[str, dict], list[str]]:
    """Evaluate on published sets, on all processes; returns the answers and what is wrong.

    Only rank 0 has the answers, and probes: also those of the suite's sets that have training
    shards, unless a second run is asked for.
    """
    places, captioned, to_probe = options.zero_shot, options.retrieval, []
    if options.suite != "none":
        own, own_captioned, missing = benchmarks.suite(Path(options.root))
        if rank == 0 and missing:
            cli.say("\n".join(missing))
        if not (own or own_captioned or places or captioned):
            raise InputError(f"--root {options.root}: none of the paper's sets is in it")
        places, captioned = (*places, *own), (*captioned, *own_captioned)
        to_probe = [place for place in own if benchmarks.set_name(Path(place)) in benchmarks.PROBED
                    and (Path(place) / "train/nshards.txt").exists() and not options.other
                    and place not in options.probe_data]  # fmt: skip
    on = resolve(device, options.precision)
    run = open_run(options, on)
    folders = labelled_folders(options, run.final)
    known_results(run.folder)  # raises before the work
    new, answers, problems = benchmarks.evaluate_sets(
        run.columns(), places, captioned, rank, world
    )
    if rank:
        return answers, problems
    results, text = {**known_results(run.folder), **run.record()}, []
    where = {"evaluated_on": machine(device), "bf16": on.bf16}
    new = {name: {**entry, **where} for name, entry in new.items()}
    if new:
        results["benchmarks"] = {**results.get("benchmarks", {}), **new}
        text.append(benchmarks.sets_table(new, on.precision))
        write_results(run.folder, results, text[0])
    try:
        side = run.final.model.config.pixels[0]
        folders += [probe.open_set(place, side) for place in to_probe]
        probed = run_probes(run, options, folders, results)
    except InputError as error:
        problems.append(str(error))
        probed = []
    if probed:
        text += probed
        write_results(run.folder, results, "\n".join(probed))
    if text:
        publish(run.folder, options, "published sets", "\n".join(text), [], [])
    return answers, problems


# --- Two runs, example by example -----------------------------------------------------------------


def identity(folder: Path, on: Device) -> str:
    """The digest of a run's models and of the precision in which they multiply."""
    models = [folder / name for name in ("model.pt", "pretrained.pt") if (folder / name).is_file()]
    return files.digest(models, on.precision)


def right_answers(folder: Path, options: EvaluateConfig) -> tuple[dict[str, dict], str]:
    """{column: {metric: which answers are right}} on held-out pairs, and the digest of the pairs.

    They are read from outcomes.npz, which is written anew if it is of another model or precision.
    """
    path, model = folder / "outcomes.npz", identity(folder, resolve(options.device, options.precision))
    if not path.is_file() or significance.load_outcomes(path)[2] != model:
        run_evaluation(replace(options, run=str(folder), other=""))
    columns, pairs, _ = significance.load_outcomes(path)
    return {column: hits({question: torch.from_numpy(rank) for question, rank in found.items()
                          if question in WITHIN}) for column, found in columns.items()}, pairs


def compare_runs(options: EvaluateConfig) -> list[str]:
    """Say which differences of two runs are real; returns what is wrong with published sets."""
    runs, problems = (run_folder(options.run), run_folder(options.other)), []
    if options.names_sets():
        with processes(options.device) as among:
            (a, problems), (b, _) = (run_benchmarks(replace(options, run=str(run)), *among)
                                     for run in runs)  # fmt: skip
        if not a:  # all sets are broken, or another rank has the answers
            return problems
        a, b = ({f"{name}, {column}": answers for name, columns in side.items()
                 for column, answers in columns.items()} for side in (a, b))  # fmt: skip
    else:
        (a, pairs), (b, other_pairs) = (right_answers(run, options) for run in runs)
        if pairs != other_pairs:
            raise InputError(
                f"{runs[0]} and {runs[1]} held out different pairs, and cannot be compared one by "
                "one: name two runs with the same --data and --held-out"
            )
    both = {column: a[column] for column in a
            if a[column] and a[column].keys() == b.get(column, {}).keys()}  # fmt: skip
    if not both:
        raise InputError(
            f"{runs[0]} and {runs[1]} share no column of single answers: "
            f"{', '.join(a) or 'nothing held out'} against {', '.join(b) or 'nothing held out'}; "
            "compare runs of the same stages, on sets whose metric is a share of answers"
        )
    table = significance.comparison_table(significance.compare(both, b))
    precision = resolve(options.device, options.precision).precision
    cli.say(f"A: {runs[0]}\nB: {runs[1]}\nin {precision}\n{table}")
    return problems


# --- results.json ---------------------------------------------------------------------------------


def known_results(folder: Path) -> dict:
    """What an earlier evaluation left in results.json; raises InputError for a broken file."""
    path, content = folder / "results.json", None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: not what evaluate.py writes: remove it, or bring a whole one")
    return content


def write_results(folder: Path, results: dict, text: str = "") -> None:
    """Print results as text, for the folder may be read-only; then write results.json."""
    if text:
        cli.say(text)
    files.write_bytes(folder / "results.json", (json.dumps(results, indent=1) + "\n").encode())


def publish(
    folder: Path, options: EvaluateConfig, what: str, text: str, names: list[str], drawn: list[str]
) -> None:
    """Add results to report.html, say what was written, and copy what is asked to results/."""
    shown = page.add_results(folder, what, text, drawn)
    names = ", ".join(["results.json", *names, *drawn])
    print(f"wrote {names} into {folder}" + f"; see {shown}" * bool(shown))
    if options.publish:
        add_run(known_results(folder))
        print(f"published {folder.name} in results/runs.jsonl")
    for name in drawn if options.figures else ():
        content = (folder / name).read_bytes()
        files.write_bytes(Path(__file__).parent / "docs/figures" / name, content)
        print(f"published docs/figures/{name}")


def portable(config: dict) -> dict:
    """A run's settings without the folders of this machine."""
    names = [config["data"]] if isinstance(config["data"], str) else config["data"]
    names = " ".join(Path(name).name for name in names)
    paths = {key: Path(config.get(key, "")).name for key in ("out", "clusters", "init")}
    return {**config, **paths, "data": names}


def results_table(results: dict) -> str:
    """An evaluation on held-out pairs as text."""
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
    else:
        lines.append("too few pairs, one in twenty, were held out to ask anything")
    for metric in next(iter(tables.values()), {}):
        cells = ""
        for column, table in tables.items():
            low, high = results["intervals"][column][metric]
            between = f"({100 * low:.1f}-{100 * high:.1f})"
            cells += f"{100 * table[metric]:>8.1f} % {between:>11}"
        lines.append(f"{metric:30}" + cells)
    shares = results["mask_shares"]
    if shares and shares["visible"] != shares["computed"]:
        lines.append(f"masked inference computes {shares['computed']:.1%} of the patches and sees "
                     f"{shares['visible']:.1%}")  # fmt: skip
    for prompt, value in results.get("prompted", {}).items():
        lines.append(f"{'zero-shot top-1, ' + prompt:40}{100 * value:>8.1f} %")
    lines += probe.probe_lines(results.get("linear_probe", {}))
    for name, table in results.get("robustness", {}).items():
        metric, value = next(iter(table.items()))
        lines.append(f"{metric}, {name:{30 - len(metric)}}{100 * value:>16.1f} %")
    return "\n".join(lines)


@cli.guarded
def main() -> None:
    """The command line: bad input is one sentence and exit code 2."""
    config = (tyro.conf.FlagCreatePairsOff,)
    run_command(tyro.cli(EvaluateConfig, description=__doc__, config=config))


if __name__ == "__main__":
    main()
