"""Evaluate a run: zero-shot on what was held out, retrieval, linear probe, and figures of it.

    python evaluate.py                      the run written last
    python evaluate.py runs/demo --linear-probe
    python evaluate.py runs/demo --robustness               the same pictures, blurred, turned, ...
    python evaluate.py runs/demo --checkpoints              all that train.py --keep-every kept
    python evaluate.py runs/demo --publish                  adds its numbers to results/
    python evaluate.py runs/demo --zero-shot DIR --retrieval DIR            published sets:
    python evaluate.py runs/demo --suite paper --root DIR                   see docs/evaluation.md
    python evaluate.py runs/a runs/b        which differences between two runs are real; with
                                            --zero-shot, --retrieval or --suite on published sets
    python evaluate.py runs/demo --search "a red apple" --images DIR        which fit a text

Prints tables and writes into the run's folder results.json, outcomes.npz (the rank of every right
answer), loss.png, masks.png, top5.png, retrieval.png and checkpoints.png. report.html shows the
tables and figures. Of the emoji only Google's and Twitter's are drawn, whose licences allow it.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from tqdm import tqdm

import data
import glip
from glip import InputError
from nanoglip import checkpoint, cli, files, page, results
from nanoglip.distributed import processes
from nanoglip.evals import benchmarks, encoder, figures, probe, search, significance
from nanoglip.evals.encoder import Encoder
from nanoglip.evals.metrics import hits
from nanoglip.machine import Device, machine, resolve
from nanoglip.masker import Masker
from nanoglip.sources.pictures import MAX_BAD, HeldOut, Source

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
    search: str = ""  # a text, by which the pictures of --images are ranked
    images: str = ""  # a folder of pictures, for --search
    classify: str = ""  # a picture: which of --names fits it best
    names: str = ""  # names or whole captions, with commas between, for --classify
    attention: str = ""  # a picture: draw where the image tower looks
    linear_probe: bool = False  # also probe the features
    probe_data: tuple[str, ...] = ()  # labelled folders (DIR/train/CLASS/*.jpg) to probe on
    few_shot: bool = False  # probe with few pictures, too
    positions: bool = False  # scenes: also accuracy by the object's place, a map of 7 x 7
    robustness: bool = False  # also on blurred, turned, recoloured pictures
    publish: bool = False  # add the numbers to results/runs.jsonl
    checkpoints: bool = False  # instead: models kept by --keep-every, also of an unfinished run
    zero_shot: tuple[str, ...] = ()  # instead of held-out pairs: published sets, in these folders
    retrieval: tuple[str, ...] = ()  # the same, of sets with captions
    suite: Literal["none", "paper"] = "none"  # the same, of the paper's sets that --root holds
    root: str = "."  # folder of the suite's sets
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 if the hardware has it
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of these that is there

    def names_sets(self) -> bool:
        """Whether published sets take the place of held-out pairs."""
        return bool(self.zero_shot or self.retrieval or self.suite != "none")


def run_command(options: EvaluateConfig) -> None:
    """Do everything that `python evaluate.py` does."""
    own_pictures, pair = search.given_flags(options), ["a second run"] * bool(options.other)
    sets, problems = ["published sets"] * options.names_sets(), []
    alone = [*own_pictures, *["--checkpoints"] * options.checkpoints]
    flags = ("linear_probe", "probe_data", "few_shot", "robustness", "positions", "publish")
    more = [f"--{flag.replace('_', '-')}" for flag in flags if getattr(options, flag)]
    given = [*alone, *pair, *sets, *more]
    held_out_alone = options.robustness or options.positions
    if (alone and len(given) > 1) or (pair and more) or (sets and held_out_alone):
        raise InputError(f"{' and '.join(given)}: give one at a time")
    if pair:
        problems = compare_runs(options)
    elif own_pictures:
        folder, on = run_folder(options.run), resolve(options.device, options.precision)
        model = glip.load_model(folder / "model.pt")[0].to(on.device)
        search.use(Encoder(model, on), folder, options)
    elif alone:
        run_checkpoints(options)
    elif sets:
        with processes(options.device, options.precision) as among:
            _, problems = run_benchmarks(options, *among)
    else:
        run_evaluation(options)
    if problems:
        raise InputError(*problems)


@dataclass(frozen=True)
class Run:
    """A run that was trained here."""

    folder: Path
    content: dict  # of model.pt
    final: Encoder
    before: Encoder  # tuning; where nothing was tuned it is `final`
    masker: Masker  # of pre-training

    def columns(self) -> dict[str, tuple[Encoder, Masker | None]]:
        """The paper's columns that this run can fill: a model, and the mask of its pictures."""
        tuned = self.content["stage"] == "tune"
        columns = {
            "masked inference": self.masker.mask != "none" and (self.before, self.masker),
            "full picture": (self.before is not self.final or not tuned) and (self.before, None),
            "after tuning": tuned and (self.final, None),
        }
        return {column: how for column, how in columns.items() if how}

    def pairs(self, own: Encoder) -> tuple[Source, HeldOut]:
        """The run's training and held-out pairs, at the image size of one of its models."""
        return pairs_of(self.content["config"], own)

    def known_results(self) -> dict:
        """What results.json holds already, with the record of the training."""
        content = self.content
        return results.load("results", self.folder) | {
            "name": self.folder.name, "command": content["command"],
            "config": results.portable(content["config"]), "steps": content["steps"],
            "world": content["world"], "bf16": content["bf16"],
            "train_seconds": content["seconds"], "trained_on": content["machine"],
        }  # fmt: skip


def run_folder(name: str) -> Path:
    """A run's folder, the latest for ""; raises InputError where no model is in it."""
    models = sorted(Path("runs").glob("*/model.pt"), key=lambda path: path.stat().st_mtime)
    if not name and not models:
        raise InputError("runs/ holds no finished run: start one with python train.py")
    folder = Path(name or models[-1].parent)
    folder = folder.resolve() if folder.name in ("", "..") else folder  # results are named after it
    if not (folder / "model.pt").is_file():
        raise InputError(f"{folder}: no model.pt in it; name the folder of a finished run")
    return folder


def pairs_of(config: dict, own: Encoder) -> tuple[Source, HeldOut]:
    """Training and held-out pairs by a run's settings, at the image size of one of its models."""
    return data.load(
        config["data"], own.model.config.pixels[0], tuple(config["vendors"]), config["held_out"],
        max_bad=config.get("max_bad", MAX_BAD),
    )


def open_run(options: EvaluateConfig, on: Device) -> tuple[Run, list[tuple]]:
    """The run that is asked about, its models on a device, and what --probe-data names, opened.

    Raises InputError for everything that can be wrong before something is computed.
    """
    folder = run_folder(options.run)
    content = masked = checkpoint.load(folder / "model.pt")
    before = final = Encoder(glip.build(content).to(on.device), on)
    if content["stage"] == "tune" and (folder / "pretrained.pt").is_file():
        masked = checkpoint.load(folder / "pretrained.pt")
        before = Encoder(glip.build(masked).to(on.device), on)
    masker = Masker.restored(masked["mask"], before.model.visual)
    if options.few_shot and not (options.linear_probe or options.probe_data):
        raise InputError("--few-shot is a part of a probe: add --linear-probe or --probe-data DIR")
    labelled = [probe.open_set(place, final.model.config.pixels[0]) for place in options.probe_data]
    names = [name for name, *_ in labelled]
    if len(set(names)) < len(names):
        raise InputError(f"--probe-data: two of {', '.join(names)} have one name: rename one")
    results.load("results", folder)
    return Run(folder, content, final, before, masker), labelled


# --- Held-out pairs and published sets ------------------------------------------------------------


def refuse_processes() -> None:
    """Raise InputError under torchrun with several processes."""
    if cli.place()[2] > 1:
        raise InputError("several processes are for --zero-shot, --retrieval and --suite alone")


def run_evaluation(options: EvaluateConfig) -> dict:
    """Evaluate a run on its held-out pairs; the content of results.json is returned."""
    refuse_processes()
    on = resolve(options.device, options.precision)
    run, labelled = open_run(options, on)
    train, test = run.pairs(run.final)
    if options.positions:
        test.placed(0, 0)  # refused at once where nothing can be moved
    same = run.before.model.config == run.final.model.config
    before_test = test if same else run.pairs(run.before)[1]
    ranks, last = {}, None
    for column, (own, mask) in run.columns().items() if len(test.concept) else ():
        pairs = test if own is run.final else before_test
        last = encoder.encode_pairs(own, pairs, mask)  # the last is the final model's, unmasked
        ranks[column] = encoder.rank_features(pairs, *last)
    record = run.known_results() | {
        "counts": {**train.counts, "training pictures": len(train) - len(train.held),
                   "held-out pictures": len(test.concept), "captions": len(test.captions)},
        "evaluated_on": machine(on.device), "evaluation_bf16": on.bf16, "mask_shares": {},
        "held_out": {column: encoder.shares_of(found) for column, found in ranks.items()},
        "intervals": {column: encoder.intervals_of(found) for column, found in ranks.items()},
        "chance": encoder.chance(test),
    }  # fmt: skip
    if "masked inference" in ranks:
        record["mask_shares"] = encoder.mask_shares(run.before, before_test, run.masker)
    if test.flags is not None:
        record["prompted"] = encoder.prompted(run.final, test, last[0])
    if options.linear_probe or labelled:
        run_probes(run, options, labelled, record)
    if options.robustness and len(test.concept):
        record["robustness"] = encoder.robustness(run.final, test)
    if options.positions:
        record["positions"] = {
            column: encoder.accuracy_by_place(own, test if own is run.final else before_test)
            for column, (own, mask) in run.columns().items() if mask is None
        }
    text = results_table(record)
    save_results(run, record, text)
    asked = json.dumps([test.examples(), test.captions, test.concept.tolist()])
    pairs, model = files.digest([], asked), identity(run.folder, on)
    significance.save_outcomes(run.folder / "outcomes.npz", ranks, pairs, model)
    drawn = figures.draw_all(
        run.folder, run.content["config"], last, test, run.before.model, before_test, run.masker
    )
    publish(run.folder, options, "held-out pairs", text, ["outcomes.npz", *drawn])
    return record


def run_checkpoints(options: EvaluateConfig) -> dict[int, dict[str, tuple[float, float, float]]]:
    """(share, lower, upper end of its 95 % interval) by steps of training and metric.

    Evaluates what a run has kept so far, finished or not, on held-out pairs without a mask.
    """
    refuse_processes()
    folder = Path(options.run) if options.run else run_folder("")
    kept, on = [*folder.glob("step-*.pt")], resolve(options.device, options.precision)
    if not kept:
        raise InputError(f"{folder}: no step-*.pt in it, which train.py --keep-every N keeps")
    ended = [folder / name for name in ("pretrained.pt", "model.pt") if (folder / name).is_file()]
    found, opened, tuned = {}, {}, 0
    for path in tqdm([*kept, *ended], "checkpoints", leave=False, disable=None):
        content = checkpoint.load(path)
        steps, own = sum(content["steps"].values()), Encoder(glip.build(content).to(on.device), on)
        size = own.model.config.image_size
        if size not in opened:
            opened[size] = pairs_of(content["config"], own)[1]
        pairs = opened[size]
        if not len(pairs.concept):
            raise InputError(f"{folder}: its data held out no pair to ask about: add pairs")
        if steps not in found:
            ranks = encoder.rank_pairs(own, pairs)
            shares, between = encoder.shares_of(ranks), encoder.intervals_of(ranks)
            found[steps] = {name: (shares[name], *between[name])
                            for name in encoder.metrics_of(pairs) if name in shares}  # fmt: skip
        tuned = steps if content["stage"] == "tune" else tuned
    found = dict(sorted(found.items()))
    metrics = next(iter(found.values()))
    title = f"{folder.name}, steps, in {on.precision}"
    lines = [f"{title:40}" + "".join(f"{name:>24}" for name in metrics)]
    for steps, each in found.items():
        cells = (f"{100 * share:.1f} % ({100 * low:.1f}-{100 * high:.1f})"
                 for share, low, high in each.values())  # fmt: skip
        label = f"{steps:,}" + ", after tuning" * (steps == tuned)
        lines.append(f"{label:40}" + "".join(f"{cell:>24}" for cell in cells))
    text = "\n".join(lines)
    cli.say(text)
    files.write_bytes(
        folder / "checkpoints.png", figures.to_png(figures.draw_checkpoints(found, tuned))
    )
    results.save("results", results.load("results", folder) | {"checkpoints": found}, folder)
    publish(folder, options, "kept checkpoints", text, ["checkpoints.png"])
    return found


def run_probes(run: Run, options: EvaluateConfig, labelled: list, record: dict) -> list[str]:
    """Probe the final model and add what is found to `record`; returns it as lines."""
    found = probe.probe_all(run.final, run.folder, labelled, options.linear_probe, options.few_shot)
    record["linear_probe"] = {**record.get("linear_probe", {}), **found}
    return probe.probe_lines(found)


def run_benchmarks(
    options: EvaluateConfig, rank: int, world: int, on: Device
) -> tuple[dict[str, dict], list[str]]:
    """Evaluate on published sets, on all processes; returns the answers and what is wrong.

    Only rank 0 has the answers. It also fits linear probes: on --probe-data, and, unless a second
    run is given, on the suite's sets that have training shards.
    """
    places, captioned, to_probe = options.zero_shot, options.retrieval, []
    if options.suite != "none":
        own, own_captioned, missing = benchmarks.suite(Path(options.root))
        if missing:
            cli.say("\n".join(missing))
        if not (own or own_captioned or places or captioned):
            raise InputError(f"--root {options.root}: none of the paper's sets is in it")
        places, captioned = (*places, *own), (*captioned, *own_captioned)
        to_probe = [place for place in own if benchmarks.set_name(Path(place)) in benchmarks.PROBED
                    and (Path(place) / "train/nshards.txt").exists() and not options.other
                    and place not in options.probe_data]  # fmt: skip
    run, labelled = open_run(options, on)
    new, answers, problems = benchmarks.evaluate_sets(run.columns(), places, captioned, rank, world)
    if rank:
        return answers, problems
    where = {"evaluated_on": machine(on.device), "bf16": on.bf16}
    new = {name: {**entry, **where} for name, entry in new.items()}
    record, text, lines = run.known_results(), [], []
    record["benchmarks"] = {**record.get("benchmarks", {}), **new}
    if new:
        text = [sets_table(new, on.precision)]
        save_results(run, record, text[0])
    try:
        side = run.final.model.config.pixels[0]
        labelled += [probe.open_set(place, side) for place in to_probe]
        lines = run_probes(run, options, labelled, record)
    except InputError as error:
        problems.append(str(error))
    if lines:
        save_results(run, record, "\n".join(lines))
    if text or lines:
        publish(run.folder, options, "published sets", "\n".join(text + lines), [])
    return answers, problems


def identity(folder: Path, on: Device) -> str:
    """The digest of a run's models and of the precision in which they multiply."""
    models = [folder / name for name in ("model.pt", "pretrained.pt") if (folder / name).is_file()]
    return files.digest(models, on.precision)


def right_answers(folder: Path, options: EvaluateConfig) -> tuple[dict[str, dict], str]:
    """{column: {metric: which answers are right}} on held-out pairs, and the digest of the pairs.

    They are read from outcomes.npz, which is written anew if it is of another model or precision.
    """
    path, on = folder / "outcomes.npz", resolve(options.device, options.precision)
    if not path.is_file() or significance.load_outcomes(path)[2] != identity(folder, on):
        run_evaluation(replace(options, run=str(folder), other=""))
    columns, pairs, _ = significance.load_outcomes(path)
    return {column: hits(ranks) for column, ranks in columns.items()}, pairs


def compare_runs(options: EvaluateConfig) -> list[str]:
    """Say which differences of two runs are real; returns what is wrong with published sets."""
    runs, problems = (run_folder(options.run), run_folder(options.other)), []
    if options.names_sets():
        with processes(options.device, options.precision) as among:
            (a, problems), (b, _) = (run_benchmarks(replace(options, run=str(run)), *among)
                                     for run in runs)  # fmt: skip
        if not a:  # all sets are broken, or another rank has the answers
            return problems
        a, b = ({f"{name}, {column}": answers for name, columns in side.items()
                 for column, answers in columns.items()} for side in (a, b))  # fmt: skip
    else:
        (a, pairs), (b, other_pairs) = (right_answers(run, options) for run in runs)
        if pairs != other_pairs:
            raise InputError(f"{runs[0]} and {runs[1]} held out different pairs: name runs of the "
                             "same --data and --held-out")  # fmt: skip
    both = {column: a[column] for column in a
            if a[column] and a[column].keys() == b.get(column, {}).keys()}  # fmt: skip
    if not both:
        raise InputError(
            f"{runs[0]} and {runs[1]} share no column of single answers but have "
            f"{', '.join(a) or 'none'} and {', '.join(b) or 'none'}: compare runs of like stages"
        )
    table = significance.comparison_table(significance.compare(both, b))
    precision = resolve(options.device, options.precision).precision
    cli.say(f"A: {runs[0]}\nB: {runs[1]}\nin {precision}\n{table}")
    return problems


# --- Results --------------------------------------------------------------------------------------


def save_results(run: Run, record: dict, text: str) -> None:
    """Print results as text, for the folder may be read-only; then write results.json."""
    cli.say(text)
    results.save("results", record, run.folder)


def publish(
    folder: Path, options: EvaluateConfig, what: str, text: str, written: list[str]
) -> None:
    """Add results to report.html, say what was written, and add the run to results/ if asked."""
    shown = page.add_results(folder, what, text, written)
    told = ", ".join(["results.json", *written])
    print(f"wrote {told} into {folder}" + f"; see {shown}" * bool(shown))
    if options.publish:
        results.add_run(results.load("results", folder))
        print(f"published {folder.name} in results/runs.jsonl")


def results_table(record: dict) -> str:
    """An evaluation on held-out pairs as text."""
    tables, config = record["held_out"], record["config"]
    masked = " to ".join(f"{r:.1%}" for r in np.atleast_1d(config["mask_ratio"]))
    lines = [
        f"{record['name']}: {config['model']}, {config['data']}, mask {config['mask']} "
        f"{masked}{', A-CLIP' * config['aclip']}, "
        + f"text mask {config['text_mask']}, " * (config["text_mask"] != "none")
        + f"{'bf16' if record['evaluation_bf16'] else 'fp32'}, seed {config['seed']}; "
        + cli.counted(record["counts"]["held-out pictures"], "held-out picture")
    ]
    if any(tables.values()):
        lines.append(f"{'':30}" + "".join(f"{name:>22}" for name in tables))
    else:
        lines.append("nothing is evaluated: too few pairs are held out (one in twenty)")
    for metric in next(iter(tables.values()), {}):
        cells = ""
        for column, table in tables.items():
            low, high = record["intervals"][column][metric]
            between = f"({100 * low:.1f}-{100 * high:.1f})"
            cells += f"{100 * table[metric]:>8.1f} % {between:>11}"
        guess = record["chance"].get(metric)
        lines.append(f"{metric:30}{cells}" + (f"   chance {guess:.2%}" if guess else ""))
    shares = record["mask_shares"]
    if shares and shares["visible"] != shares["computed"]:
        computed, visible = (f"{shares[name]:.1%}" for name in ("computed", "visible"))
        lines.append(f"masked inference computes {computed} of the patches and sees {visible}")
    for prompt, value in record.get("prompted", {}).items():
        lines.append(f"{'zero-shot top-1, ' + prompt:40}{100 * value:>8.1f} %")
    lines += probe.probe_lines(record.get("linear_probe", {}))
    for name, table in record.get("robustness", {}).items():
        metric, value = next(iter(table.items()))
        lines.append(f"{metric}, {name:{30 - len(metric)}}{100 * value:>16.1f} %")
    for column, rows in record.get("positions", {}).items():
        lines.append(f"zero-shot top-1 (%) by the object's place, {column}")
        lines += ["".join(f"{100 * value:>8.1f}" for value in row) for row in rows]
    return "\n".join(lines)


def sets_table(results: dict[str, dict], precision: str) -> str:
    """A run's results as text: each set's metric, also with one prompt, and its drop or aupr."""
    columns = list(next(iter(results.values()))["columns"])
    title = f"set, metric (%, 95 % interval), in {precision}"
    lines = [f"{title:58}" + "".join(f"{c:>22}" for c in columns)]
    for name, entry in sorted(results.items()):
        each, metric = entry["columns"], entry["metric"]
        shown = [metric, f"{metric}_one_prompt", "drop", "aupr"]
        if entry["kind"] == "retrieval":
            shown = list(each[columns[0]])
        tables = (table for table, names in benchmarks.SETS.items() if name in names)
        title = " ".join([name, *tables])
        for label in (label for label in shown if label in each[columns[0]]):
            cells = ""
            for column in columns:
                low, high = entry["intervals"][column].get(label, (0, 0))
                between = f" ({100 * low:.1f}-{100 * high:.1f})" if high else ""
                cells += f"{f'{100 * each[column][label]:.1f}{between}':>22}"
            lines.append(f"{f'{title}, {label}':58}" + cells)
    return "\n".join(lines)


@cli.guarded
def main() -> None:
    """The command line: bad input is one sentence and exit code 2."""
    config = (tyro.conf.FlagCreatePairsOff,)
    run_command(tyro.cli(EvaluateConfig, description=__doc__, config=config))


if __name__ == "__main__":
    main()
