"""Tables and budgets on made-up results whose means, ranges and steps are known."""

import itertools
import subprocess

import glip
import report
import sweep
import train

FULL = train.parse(["--recipe", "compare"]).steps
TIMES = {"cluster": 1.5, "attentive": 2.0, "gumbel": 1.1}  # 1.1 is nearly the same


def made_up_cost():
    """GLIP's step takes 4, 2, 1 s at the ratios, one without a mask 6; a mask a hundredth."""
    glips = dict(zip((0.5, 0.75, 0.918), (4.0, 2.0, 1.0), strict=True))
    rows = [{"mask": "none", "mask_ratio": 0.0, "step": 6.0, "mask alone": 0.0}]
    for mask, ratio in itertools.product((*glip.MASKS, sweep.SMALL), sweep.RATIOS):
        if mask != "none":
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


def test_the_sweep_is_what_it_says():
    """Three seeds of every cell; equal cost shares a run; equal time is paid for in steps."""
    runs = sweep.planned(made_up_cost())
    cells = {(run.data, run.mask, run.ratio, run.equal) for run in runs}
    masks = (*glip.MASKS, sweep.SMALL)
    assert cells == {
        *itertools.product([sweep.HOME], masks, sweep.RATIOS, ("steps", "time")),
        *itertools.product(sweep.AWAY, set(glip.MASKS) - sweep.HOME_ONLY, [0.75],
                           ("steps", "time")),
    }  # fmt: skip
    steps, names = {}, {}
    for run in runs:
        config = train.parse(list(run.flags))
        key = (run.data, run.mask, run.ratio, run.equal)
        steps[key] = config.steps
        names.setdefault(key, set()).add(run.name)
        assert config.data == (run.data,) and config.seed == run.seed
        assert config.mask == ("none" if run.mask == sweep.SMALL else run.mask)
        assert config.mask_ratio == (0 if config.mask == "none" else run.ratio)
        if run.mask == sweep.SMALL:
            assert (config.image_size // 8) ** 2 == {0.5: 36, 0.75: 16, 0.918: 4}[run.ratio]
            assert config.tune_image_size == 64
    assert all(len(found) == len(sweep.SEEDS) for found in names.values())
    for data, mask, ratio, _ in cells:
        slow = TIMES.get(mask, 1.0) if mask != "gumbel" else 1.0
        slow = 6.0 / {0.5: 4, 0.75: 2, 0.918: 1}[ratio] if mask == "none" else slow
        assert steps[data, mask, ratio, "steps"] == FULL
        assert abs(steps[data, mask, ratio, "time"] - FULL / slow) <= 2
        shared = names[data, mask, ratio, "steps"] == names[data, mask, ratio, "time"]
        assert shared == (slow == 1.0)


def test_tables_show_means_ranges_and_what_is_missing():
    cost, values = made_up_cost(), {}
    for run in sweep.planned(cost):
        values[run.name] = 0.01 * (run.seed + 1)
        if run.mask == "gaussian":
            values[run.name] += {0.5: 0.3, 0.75: 0.2, 0.918: 0.1}[run.ratio]
    missing = {run.name for run in sweep.planned(cost) if run.mask == "grid" and run.seed}
    missing |= {run.name for run in sweep.planned(cost) if run.mask == "block"}
    results = [made_up(name, top1) for name, top1 in values.items() if name not in missing]
    first = report.ratio_table(results, cost).splitlines()
    assert first[0].startswith("| scenes-center, top-1 (%) | 50.0% masked | 75.0% masked")
    assert "| gaussian | 32.0 (31.0-33.0) | 22.0 (21.0-23.0) | 12.0 (11.0-13.0) |" in first
    assert "| grid | 1.0 (1 seed) | 1.0 (1 seed) | 1.0 (1 seed) |" in first
    assert "| block | not run | not run | not run |" in first
    labels = [line.split(" | ")[0].removeprefix("| ") for line in first[2:]]
    assert "none, equal time (300, 152, 76 steps)" in labels and "none, equal steps" in labels
    assert "cluster, equal time (300, 300, 300 steps)" in labels and labels.count("random") == 1
    second = report.set_table(results, cost)
    assert "| gaussian | 22.0 (21.0-23.0) | 22.0 (21.0-23.0) | 22.0 (21.0-23.0) |" in second
    assert "grid" not in second and "scenes-corner" in second
    third = report.stage_table(results, cost)
    row = "| gaussian | 75.0% | 4.4 (4.2-4.6) | 11.0 (10.5-11.5) | 22.0 (21.0-23.0) |"
    assert row in third.splitlines() and "| small pictures | 50.0% | - | 1.0 (0.5-1.5)" in third
    whole = report.compare_table(results, cost)
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
    monkeypatch.setitem(glip.MASKS, "border", None)
    assert "border" not in {run.mask for run in sweep.planned(cost) if run.equal == "time"}
    cost = sweep.complete_cost(cost, 1)
    assert asked == ["gaussian", "border"] and cost["seconds"][: len(old)] == old
    new = {row["mask_ratio"]: row["step"] for row in cost["seconds"][len(old) :]}
    assert new == {0.5: 6.0, 0.75: 3.0, 0.918: 1.5}
    assert sweep.affordable(cost, "border", 0.75, 450) == 300


def test_costs_are_measured(monkeypatch):
    """Two masks for one round: rows for every ratio, of real steps."""
    monkeypatch.setattr(sweep, "RATIOS", (0.75,))
    found = sweep.measure_cost(1, ["gaussian", "none", sweep.SMALL], rounds=1)
    rows = {(row["mask"], row["mask_ratio"]): row for row in found["seconds"]}
    assert rows.keys() == {("gaussian", 0.75), ("none", 0.0), (sweep.SMALL, 0.75)}
    assert all(0 <= row["mask alone"] < row["step"] for row in rows.values())


def test_a_run_of_the_sweep_is_started_once_and_its_failure_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    monkeypatch.setattr(sweep, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    started = []

    def pretend(words, **_):
        started.append(words[1:])
        failed = "evaluate.py" in words
        return subprocess.CompletedProcess(words, -9 if failed else 0, "", "")

    monkeypatch.setattr(sweep.subprocess, "run", pretend)
    flags = ("--recipe", "compare", "--seed", "1")
    told = sweep.run("compare_seed=1", flags, 1)
    assert told == "compare_seed=1: exit -9"
    assert started[0][: 1 + len(flags)] == ["train.py", *flags]
    assert started[1] == ["evaluate.py", "runs/sweep/compare_seed=1", "--publish"]
    (tmp_path / "results/compare_seed=1.json").touch()
    assert sweep.run("compare_seed=1", flags, 1) is None and len(started) == 2


def test_costs_are_ratios():
    text = report.cost_table(made_up_cost())
    assert "| none | 1.50 | 3.00 | 6.00 | - | - | - |" in text
    assert "| attentive | 2.00 | 2.00 | 2.00 | 1.00% | 1.00% | 1.00% |" in text


def test_missing_results_are_not_run():
    assert report.compare_table([], made_up_cost()) == report.demo_table([]) == "Not run."
    assert report.spread([]) == "not run" and report.spread([0.25]) == "25.0"
