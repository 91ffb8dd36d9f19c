"""Tables and budgets on made-up results whose means, ranges and steps are known."""

import argparse
import itertools
import json
import multiprocessing
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch

import train
from glip import InputError
from nanoglip import masks
from nanoglip.config import check, parse
from nanoglip.evals import benchmarks
from nanoglip.machine import machine
from nanoglip.results import add_run, load, load_runs, save_bench
from nanoglip.sources.emoji import Emoji
from tools import bench, sweep, tables

FULL = parse(["--recipe", "compare"]).steps
TIMES = {"cluster": 1.5, "attentive": 2.0, sweep.ACLIP: 3.0, "gumbel": 1.1}  # nearly the same


def made_up_cost():
    """GLIP's step takes 4, 2, 1 s at the ratios, one without a mask 6; a mask a hundredth."""
    glips = dict(zip((0.5, 0.75, 0.918), (4.0, 2.0, 1.0), strict=True))
    rows = [{"mask": "none", "mask_ratio": 0.0, "step": 6.0, "mask alone": 0.0}]
    for mask, ratio in itertools.product(sweep.rows(), sweep.RATIOS):
        if ratio in sweep.ratios_of(mask):
            step = glips[ratio] * TIMES.get(mask, 1.0)
            rows.append({"mask": mask, "mask_ratio": ratio, "step": step,
                         "mask alone": step / 100})  # fmt: skip
    return {"seconds": rows, "rounds": 8, "data": "d", "batch_size": 4, "threads": 1,
            "machine": {"commit": "abc"}}  # fmt: skip


def made_up(name, top1):
    column = {"zero-shot top-1": top1}
    tables = {
        "masked inference": {"zero-shot top-1": top1 / 5},
        "full picture": {"zero-shot top-1": top1 / 2}, "after tuning": column,
    }  # fmt: skip
    machine = {"cores": 2, "cpu": "c", "memory_gib": 8, "versions": {"torch": "2"}, "commit": "abc"}
    shares = {"computed": 0.5, "visible": top1, "pictures of one patch": 0.1}
    shares = shares if "cluster" in name else {**shares, "visible": 0.5}
    return {"name": name, "held_out": tables, "trained_on": machine, "bf16": True,
            "mask_shares": shares}  # fmt: skip


@pytest.mark.slow
def test_the_sweep_is_what_it_says():
    """Three seeds of every cell; equal cost shares a run; equal time is paid for in steps."""
    runs = sweep.planned(made_up_cost())
    cells = {(run.data, run.mask, run.ratio, run.equal) for run in runs}
    names = (*masks.MASKS, sweep.SMALL)
    assert cells == {
        *itertools.product([sweep.HOME], names, sweep.RATIOS, ("steps", "time")),
        *itertools.product(sweep.AWAY, set(masks.MASKS) - sweep.HOME_ONLY, [0.75],
                           ("steps", "time")),
        *itertools.product((sweep.HOME, *sweep.AWAY), [sweep.ACLIP], [0.75], ["time"]),
    }  # fmt: skip
    steps, names = {}, {}
    for run in runs:
        config = sweep.config_of(run.flags)
        key = (run.data, run.mask, run.ratio, run.equal)
        steps[key] = config.steps
        names.setdefault(key, set()).add(run.name)
        assert config.data == (run.data,) and config.seed == run.seed
        others = {sweep.SMALL: "none", sweep.ACLIP: "attentive"}
        assert config.mask == others.get(run.mask, run.mask)
        assert config.aclip == (run.mask == sweep.ACLIP)
        assert config.mask_ratio == (0 if config.mask == "none" else run.ratio)
        if run.mask == sweep.SMALL:
            assert (config.image_size // 8) ** 2 == {0.5: 36, 0.75: 16, 0.918: 4}[run.ratio]
            assert config.tune_image_size == 64
    assert all(len(found) == len(sweep.SEEDS) for found in names.values())
    for data, mask, ratio, _ in cells:
        slow = TIMES.get(mask, 1.0) if mask != "gumbel" else 1.0
        slow = 6.0 / {0.5: 4, 0.75: 2, 0.918: 1}[ratio] if mask == "none" else slow
        assert steps.get((data, mask, ratio, "steps"), FULL) == FULL
        assert abs(steps[data, mask, ratio, "time"] - FULL / slow) <= 2
        both = names.get((data, mask, ratio, "steps")), names[data, mask, ratio, "time"]
        assert (both[0] == both[1]) == (slow == 1.0)


@pytest.mark.slow
def test_the_questions_are_runs_of_their_own_with_the_comparisons_steps():
    """None is a cell of the comparison; fewer vendors are tuned for as many steps as all."""
    known = {run.name for run in sweep.planned(made_up_cost())}
    runs = sweep.questions([])
    assert len({run.name for run in runs}) == len(runs) and not known & {run.name for run in runs}
    for run in runs:
        config = parse(list(run.flags))
        check(config, 1)
        steps = sweep.RECOVERY if run.ratio == 0.918 else (225 if config.image_size else FULL,)
        assert (config.seed, config.mask) == (run.seed, run.mask) and config.steps in steps
        assert np.mean(config.mask_ratio) == pytest.approx(run.ratio)
        if config.held_out == "Joy":  # a search, which never sees the test vendor
            assert "Twtr" not in config.vendors and len(config.vendors) == 5
        elif config.vendors:
            pictures = Emoji("emoji", 64, config.vendors, "train")
            assert round(config.tune_epochs * (len(pictures) // config.tune_batch_size)) == 20
    counts = Counter(str(config.sigma) for config in (parse(list(r.flags)) for r in runs))
    assert all(counts[s] == len(sweep.SEEDS) for s in ("0.05", "0.1", "0.4", "0.8"))


def test_tables_show_means_ranges_and_what_is_missing():
    cost, values = made_up_cost(), {}
    for run in sweep.planned(cost):
        values[run.name] = 0.01 * (run.seed + 1)
        if run.mask == "gaussian":
            values[run.name] += {0.5: 0.3, 0.75: 0.2, 0.918: 0.1}[run.ratio]
    missing = {run.name for run in sweep.planned(cost) if run.mask == "grid" and run.seed}
    missing |= {run.name for run in sweep.planned(cost) if run.mask == "block"}
    results = [made_up(name, top1) for name, top1 in values.items() if name not in missing]
    whole = tables.compare_table(results, cost)
    first, second, third, *_ = whole.split("\n\n")
    first = first.splitlines()
    assert first[0].startswith("| scenes-center, top-1 (%) | 50.0% masked | 75.0% masked")
    assert "| gaussian | 32.0 (31.0-33.0) | 22.0 (21.0-23.0) | 12.0 (11.0-13.0) |" in first
    assert "| grid | 1.0 (1 seed) | 1.0 (1 seed) | 1.0 (1 seed) |" in first
    assert "| block | not run | not run | not run |" in first
    labels = [line.split(" | ")[0].removeprefix("| ") for line in first[2:]]
    assert "none, equal time (300, 152, 76 steps)" in labels and "none, equal steps" in labels
    assert "cluster, equal time (300, 300, 300 steps)" in labels and labels.count("random") == 1
    assert "| gaussian | 22.0 (21.0-23.0) | 22.0 (21.0-23.0) | 22.0 (21.0-23.0) |" in second
    assert "grid" not in second and "scenes-corner" in second
    row = "| gaussian | 75.0% | 4.4 (4.2-4.6) | 11.0 (10.5-11.5) | 22.0 (21.0-23.0) |"
    assert row in third.splitlines() and "| small pictures | 50.0% | - | 1.0 (0.5-1.5)" in third
    assert "`cluster` at 50.0% on scenes-center computes 50.0% of the patches, shows 2.0%" in whole
    assert "`random` at" not in whole
    assert f"{len(values) - len(missing)} of {len(values)} runs; 2 cores of c" in whole


def test_a_new_masks_cost_is_measured_beside_glips(monkeypatch):
    """And told in the seconds of the table; what the table has is not touched."""
    cost, asked = made_up_cost(), []
    old = [dict(row) for row in cost["seconds"]]

    def measured(threads, masks):
        asked.extend(masks)
        steps = {"gaussian": 10.0, "border": 15.0}
        return {"seconds": [{"mask": m, "mask_ratio": r, "step": steps[m], "mask alone": 1.0}
                            for m in masks for r in sweep.RATIOS]}  # fmt: skip

    monkeypatch.setattr(sweep, "measure_cost", measured)
    assert sweep.complete_cost(cost, 1) is cost and asked == []
    monkeypatch.setitem(masks.MASKS, "border", masks.random_scores)
    assert "border" not in {run.mask for run in sweep.planned(cost) if run.equal == "time"}
    cost = sweep.complete_cost(cost, 1)
    assert asked == ["gaussian", "border"] and cost["seconds"][: len(old)] == old
    new = {row["mask_ratio"]: row["step"] for row in cost["seconds"][len(old) :]}
    assert new == {0.5: 6.0, 0.75: 3.0, 0.918: 1.5}
    assert sweep.affordable(cost, "border", 0.75, 450) == 300


@pytest.mark.slow
def test_costs_are_measured(monkeypatch):
    """One mask, with a teacher, for one round: rows for every ratio, of real steps."""
    small = ["--batch-size", "32", "--tune-batch-size", "32"]
    monkeypatch.setattr(sweep, "RATIOS", (0.75,))
    monkeypatch.setattr(
        sweep, "script", lambda words, _: not train.train(parse([*words[1:], *small]))
    )
    (row,) = sweep.measure_cost(1, ["attentive"], rounds=1, steps=3)["seconds"]
    assert (row["mask"], row["mask_ratio"]) == ("attentive", 0.75)
    assert 0 < row["mask alone"] < row["step"]


def test_a_run_is_made_again_where_its_line_lacks_an_answer():
    run = sweep.Run("emoji", "gaussian", 0.75, "steps", 1, (), ("--robustness", "--linear-probe"))
    assert sweep.lacks(None, run) and sweep.lacks({"robustness": {}}, run)
    assert not sweep.lacks({"robustness": {}, "linear_probe": {}}, run)


def test_a_run_of_the_sweep_is_trained_then_published_and_its_failure_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    started = []

    def pretend(words, **_):
        started.append(words[1:])
        failed = "evaluate.py" in words
        return subprocess.CompletedProcess(words, -9 if failed else 0, "", "")

    monkeypatch.setattr(sweep.subprocess, "run", pretend)
    flags = ("--recipe", "compare", "--seed", "1")
    run = sweep.Run("emoji", "gaussian", 0.75, "steps", 1, flags, ("--robustness",))
    assert sweep.carry_out(run, 1) == "compare_seed=1: exit -9"
    assert started[0][: 1 + len(flags)] == ["train.py", *flags]
    place = "runs/sweep/compare_seed=1"
    assert started[1] == ["evaluate.py", place, "--publish", "--robustness"]


def test_the_sweep_lists_what_results_has_and_lacks(monkeypatch, capsys):
    """The comparison is complete but for new masks; a run without its line is missing."""
    monkeypatch.setattr(sys, "argv", ["sweep", "--list"])
    sweep.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(set(lines)) > 190
    names = {run["name"] for run in load_runs()}
    new = {"pgs", "scenes-anywhere", sweep.ACLIP}  # whose runs are still to be made
    planned = [run for run in sweep.planned(load("cost")) if not new & {run.mask, run.data}]
    assert {run.name for run in planned} <= names
    known = [*sweep.questions(load_runs()), *sweep.planned(load("cost"))]
    asked = {run.name: run for run in known}
    unmapped = [run["name"] for run in load_runs() if run["name"] in asked
                and sweep.lacks(run, asked[run["name"]])]  # fmt: skip
    done = sum(line.startswith("done ") for line in lines)
    assert done == len(names) - 3 - len(unmapped) and len(unmapped) == 22  # 3: the demo's
    runs = [run for run in load_runs() if run["name"] != "compare_data=scenes-center_mask=block"]
    monkeypatch.setattr(sweep.results, "load_runs", lambda: runs)
    sweep.main()
    (changed,) = set(capsys.readouterr().out.splitlines()) - set(lines)
    flags = "--recipe compare --data scenes-center --mask block --mask-ratio 0.75 --seed 0"
    assert changed == f"missing python train.py {flags}"


def test_the_best_rate_of_a_search_is_run_when_the_search_is_whole():
    """AdamW without a mask: of four rates the third is best, and is run on the test vendor."""
    search = [run for run in sweep.questions([]) if {"Joy", "adamw"} < {*run.flags}]
    search = [run for run in search if run.mask == "none"]
    top1 = dict(zip(sweep.LRS, (0.1, 0.2, 0.4, 0.3), strict=True))
    known = [{"name": run.name, "held_out": {"after tuning": {
        "zero-shot top-1": top1[parse(list(run.flags)).lr]}}} for run in search]  # fmt: skip
    assert sweep.questions(known[:3]) == sweep.questions([])
    before = {run.name for run in sweep.questions([])}
    new = [run for run in sweep.questions(known) if run.name not in before]
    assert [run.seed for run in new] == list(sweep.SEEDS)
    for run in new:
        config = parse(list(run.flags))
        assert (config.lr, config.optimizer, config.held_out) == (sweep.LRS[2], "adamw", "Twtr")


def test_a_row_of_the_speed_run_is_three_seeds_and_a_ratio(tmp_path, monkeypatch):
    """Runs are pretended: the first row's steps take 2 s and 5 s, the new one's 1 s and 4 s."""
    began = []

    def script(words, threads, code):
        folder, config = Path(words[-1]), parse(words[1:-2])
        began.append((code, config.seed, config.steps))
        assert (config.held_out, "Twtr" in config.vendors) == ("Joy", False)
        own = code == tmp_path
        stages = {"pretrain": (config.steps, 1 if own else 2), "tune": (4, 4 if own else 5)}
        lines = [{"stage": stage, "step": step, "loss": 1.0, "seconds": step * seconds}
                 for stage, (steps, seconds) in stages.items() for step in range(1, steps + 1)]
        lines.append({"stage": "tune", "step": 4, "zero-shot top-1": 0.5 + config.seed / 100})
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (folder / "model.pt").touch()
        return ""

    where = {"commit": "b", "cores": 2, "cpu": "c"}
    first = {"change": "the demo", "flags": "", "commit": "a", "bf16": False, "top-1": [0.5] * 3,
             "steps": {"pretrain": 100, "tune": 4}, "minutes": {"first": 9.0}, "machine": where}
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(bench, "script", script)
    monkeypatch.setattr(bench, "machine", lambda _: where)
    monkeypatch.setattr(bench, "load", lambda _: {"speedrun": {"records": [first]}})
    monkeypatch.setattr(bench, "unpack", lambda commit, folder: folder / commit)
    options = argparse.Namespace(change="shorter", flags="--steps 50", rounds=1)
    for repeats in range(2):  # the second time its three seeds are there
        before, row = bench.measure_speedrun(options)["records"]
        assert before == first and row["top-1"] == [0.5, 0.51, 0.52]
        assert row["steps"] == {"pretrain": 50, "tune": 4}
        assert row["minutes"] == {"first": (100 * 2 + 4 * 5) / 60, "this": (50 + 4 * 4) / 60}
        assert row["times_faster"] == row["range"][0] == pytest.approx(220 / 66)
        assert len(began) == 3 + 4 * (repeats + 1)  # a round is of both, after one to warm up
    text = tables.speedrun_table({"speedrun": {"records": [before, row]}})
    assert "`--steps 50` | 50 + 4 | 51.0 (50.0-52.0) | 3.33 (3.33-3.33) | 3.7 to 1.1 |" in text
    where["commit"] = "b-dirty"
    with pytest.raises(InputError, match="commit the change"):
        bench.measure_speedrun(options)


def test_the_runs_of_questions_take_as_long_as_the_docs_say():
    step = {(row["mask"], row["mask_ratio"]): row["step"] for row in load("cost")["seconds"]}
    tune = step["none", 0.0]
    short, whole = 450 * step["gaussian", 0.918] + 20 * tune, 470 * tune
    for steps, epochs in sweep.RECOVERY.items():
        taken = steps * step["gaussian", 0.918] + 40 * epochs * tune
        assert (round(taken / short, 1), round(taken / whole, 1)) == (3.5, 0.9)
    grown = parse(["--recipe", "compare", *sweep.GROWN.split()])  # as long as GLIP at 75 %
    taken = grown.steps * step[sweep.SMALL, 0.75] + 40 * grown.tune_epochs * tune
    assert taken == pytest.approx(450 * step["gaussian", 0.75] + 20 * tune, rel=0.01)


def test_code_of_a_commit_is_unpacked_or_asked_for(tmp_path):
    commit = machine(torch.device("cpu"))["commit"].removesuffix("-dirty")
    if not commit:
        pytest.skip("not a git clone")
    assert (bench.unpack(commit, tmp_path) / "train.py").exists()
    with pytest.raises(InputError, match=r"commit 000 of the ladder's first row .* --unshallow"):
        bench.unpack("000", tmp_path)


def test_costs_are_ratios():
    text = tables.cost_table(made_up_cost())
    assert "| none | 1.50 | 3.00 | 6.00 | - | - | - |" in text
    assert "| attentive | 2.00 | 2.00 | 2.00 | 1.00% | 1.00% | 1.00% |" in text


def test_missing_results_are_not_run():
    assert tables.compare_table([], made_up_cost()) == tables.demo_table([]) == "Not run."
    assert tables.mean_range([]) == "not run" and tables.mean_range([0.25]) == "25.0"


PAPER = json.loads((tables.ROOT / "results/paper.json").read_text())


def a_run(top1, **config):
    """A published run on CC12M with a result on every kind of set."""
    stages = ("masked inference", "full picture", "after tuning")
    columns = {stage: {"acc1": top1 * k / 3, "mean_per_class_recall": 0.125}
               for k, stage in enumerate(stages, 1)}  # fmt: skip
    recall = {stage: {"text_retrieval_recall@1": 0.25} for stage in stages}
    config = {"recipe": "cc12m", "mask": "gaussian", "mask_ratio": 0.5, "sigma": 0.2,
              "image_size": 0, "text_mask": "none", "aclip": False, **config}  # fmt: skip
    machine = {"cores": 2, "commit": "abc"}
    return {
        "name": "r", "config": config, "command": "train.py", "trained_on": machine,
        "linear_probe": {"cifar10": {"accuracy": 0.875}},
        "benchmarks": {"imagenet1k": {"metric": "acc1", "columns": columns},
                       "pets": {"metric": "mean_per_class_recall", "columns": columns},
                       "flickr30k": {"metric": "acc1", "columns": recall}},
    }  # fmt: skip


@pytest.fixture
def results(tmp_path):
    """A folder of results without a run of ours."""
    shutil.copy(tables.ROOT / "results/paper.json", tmp_path)
    (tmp_path / "cost.json").write_text(json.dumps(made_up_cost()))
    return tmp_path


def row_of(table, *start):
    (row,) = [row for row in table.rows if row[: len(start)] == list(start)]
    return dict(zip(table.head, row, strict=True))


def test_published_numbers_agree_with_themselves():
    """Means over sets that the third party prints are the means of its sets, as copied here."""
    checked = 0
    for model in PAPER["models"]:
        numbers = model["numbers"]
        if model["source"] == "CLIP-PGS":
            kept = [name for name, found in numbers.items() if "acc1" in found
                    and not name.startswith(("imagenet", "average"))]  # fmt: skip
            mean = statistics.mean(numbers[name]["acc1"]["full picture"] for name in kept)
            assert len(kept) == 17
            assert mean == pytest.approx(numbers["average of 17"]["acc1"]["full picture"], abs=0.06)
            checked += 1
        if "average of 26" in numbers:
            mean = statistics.mean(value for _, name, _ in PAPER["tables"]["T2"]["rows"]
                                   for value in numbers[name][benchmarks.METRICS.get(name, "acc1")]
                                   .values())  # fmt: skip
            assert mean == pytest.approx(numbers["average of 26"]["acc1"]["full picture"], abs=0.06)
            checked += 1
        assert model["source"] in PAPER["sources"]
        for name in ("mscoco_captions", "flickr30k"):
            for way in ("text", "image"):
                found = [numbers[name][f"{way}_retrieval_recall@{k}"]["full picture"]
                         for k in (1, 5, 10)] if model["source"] == "CLIP-PGS" else []  # fmt: skip
                assert found == sorted(found)
    assert checked == 6 + 10


def test_tables_of_the_paper_without_a_run_of_ours(results):
    made = tables.paper_tables(results)
    assert list(made) == [f"T{i}" for i in range(1, 8)]
    first = row_of(made["T1"], "GLIP", "91.8 %", "17", "CC12M")
    assert first["after tuning, published"] == "28.0" and first["after tuning, ours"] == "not run"
    assert row_of(made["T1"], "RECLIP", "64 px", "17", "CC12M")[
        "masked inference, published"] == "-"  # fmt: skip
    assert len(made["T2"].rows) == 26
    assert row_of(made["T2"], "Oxford Pets")["Cluster Masking, third party"] == "55.4"
    assert row_of(made["T2"], "ImageNet")["CLIP-PGS-0.5, its authors"] == "38.0"
    assert row_of(made["T6"], "CLIP-PGS-0.5")["training time, times CLIP's"] == "0.5"
    assert row_of(made["T2"], "Oxford Pets")["SLIP, A-CLIP's authors"] == "31.1"
    assert "SLIP, A-CLIP's authors" not in made["T3"].head + made["T4"].head + made["T5"].head
    views = row_of(made["T6"], "random mask, two views")
    assert views["COCO, text R@1"] == "31.1" and views["mean of 26 sets"] == "not published"
    assert row_of(made["T5"], "ImageNet, fine-tuned")["GLIP 50 %, ours"] == "not run"
    assert set(row_of(made["T7"], "FLIP").values()) >= {"not published", "not run"}
    for table in made.values():
        cells = [cell for row in table.rows for cell in row]
        assert tables.NOT_RUN in cells and tables.NOT_PUBLISHED in cells
        assert tables.NOT_PUBLISHED in table.note


def test_the_tables_ask_for_what_the_suite_runs():
    runs, (imagenet,) = benchmarks.SETS, benchmarks.SETS["T1"]
    asked = {name: [row[1] for row in plan.get("rows", [])]
             for name, plan in PAPER["tables"].items()}  # fmt: skip
    assert sorted(asked["T2"]) == sorted(runs["T2"])
    assert asked["T3"] == [imagenet, *runs["T3"]]
    assert tuple(dict.fromkeys(asked["T4"])) == runs["T4"]
    assert asked["T5"] == [*benchmarks.PROBED, imagenet]


def test_our_runs_stand_beside_the_papers_numbers(results):
    """Those of the same settings alone, in percent, with the range of seeds."""
    runs = {
        "a": a_run(0.30), "b": a_run(0.36), "sigma": a_run(0.9, sigma=0.8),
        "words": a_run(0.9, text_mask="block"), "other": a_run(0.9, recipe="flip"),
        "flip": a_run(0.24, mask="random"),
    }  # fmt: skip
    for name, run in runs.items():
        add_run({**run, "name": name}, results)
    made = tables.paper_tables(results)
    row = row_of(made["T1"], "GLIP", "50 %", "99", "CC12M")
    assert row["after tuning, ours"] == "33.0 (30.0-36.0)"
    assert row["masked inference, ours"] == "11.0 (10.0-12.0)"
    assert row_of(made["T1"], "FLIP", "50 %", "99", "CC12M")["after tuning, ours"] == "24.0"
    assert row_of(made["T1"], "GLIP", "75 %", "50", "CC12M")["after tuning, ours"] == "not run"
    assert row_of(made["T2"], "Oxford Pets")["FLIP 50 %, ours"] == "12.5"
    assert row_of(made["T3"], "ImageNet")["FLIP 50 %, ours"] == "24.0"
    assert row_of(made["T4"], "Flickr30k, text R@1")["FLIP 50 %, ours"] == "25.0"
    assert row_of(made["T4"], "Flickr30k, text R@5")["FLIP 50 %, ours"] == "not run"
    assert row_of(made["T5"], "CIFAR-10, linear probe")["FLIP 50 %, ours"] == "87.5"


def test_the_command_prints_the_paper_and_leaves_the_pages_alone(monkeypatch, capsys):
    pages = [tables.ROOT / "README.md", *(tables.ROOT / "docs").glob("*.md")]
    before = [page.read_bytes() for page in pages]
    monkeypatch.setattr(sys, "argv", ["tables", "--paper"])
    tables.main()
    out = capsys.readouterr().out
    assert out.startswith("### T1. ") and out.count("### T") == 7
    assert [page.read_bytes() for page in pages] == before


def test_marked_parts_of_a_page_are_made_anew():
    page = "a\n<!-- cost: made by tools/tables.py -->\nold\n<!-- end of cost -->\nb\n"
    made = tables.filled(page)
    assert made.startswith("a\n<!-- cost: ") and made.endswith("<!-- end of cost -->\nb\n")
    assert "| gaussian | 1.00 | 1.00 | 1.00 |" in made and "old" not in made
    assert tables.filled(made) == made


def results_of(name, top1=1 / 3, seconds=1.23456789):
    """What evaluate.py writes for a run with one setting of its own."""
    machine = {"cores": 2, "cpu": "c", "versions": {"torch": "2"}, "commit": "abc"}
    config = {**asdict(parse(["--recipe", "compare", "--sigma", "0.5"])), "data": "emoji"}
    return {
        "name": name, "command": "python train.py --recipe compare --sigma 0.5", "bf16": True,
        "config": {**config, "out": "somewhere"}, "trained_on": machine, "evaluated_on": machine,
        "train_seconds": {"pretrain": seconds}, "held_out": {"full picture": {"top-1": top1}},
        "intervals": {}, "steps": {"pretrain": 4},
    }  # fmt: skip


def test_a_published_run_is_one_line(tmp_path):
    """Sorted by name and replaced by name; settings, machine and numbers can be read back."""
    for name in ("b", "c", "a"):
        add_run(results_of(name), tmp_path)
    before = (tmp_path / "runs.jsonl").read_text().splitlines()
    add_run(results_of("b", top1=0.5), tmp_path)
    after = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in after] == ["a", "b", "c"]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, True]
    assert json.loads(after[1])["settings"] == {"recipe": "compare", "sigma": 0.5}
    frame = pandas.read_json(tmp_path / "runs.jsonl", lines=True)
    assert list(frame["name"]) == ["a", "b", "c"] and frame["flags"][0].startswith("--recipe")
    run = load_runs(tmp_path)[0]
    assert run["held_out"] == {"full picture": {"top-1": 0.33333}}
    assert run["config"]["steps"] == FULL and run["config"]["sigma"] == 0.5
    assert run["config"]["data"] == "emoji" and not run["config"]["out"]
    assert run["trained_on"] == results_of("a")["trained_on"]
    assert load_runs(tmp_path, "benchmarks") == load_runs(tmp_path / "none") == []


def publish_some(folder, first):
    for number in range(first, first + 8):
        add_run(results_of(f"run{number}"), folder)
        save_bench(f"bench{number}", {"rounds": number}, folder)


def test_processes_that_publish_at_once_lose_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=publish_some, args=(tmp_path, 8 * i)) for i in range(4)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert len(load_runs(tmp_path)) == len(load("bench", tmp_path)) == 32
    assert len(load("machines", tmp_path)) == 1
