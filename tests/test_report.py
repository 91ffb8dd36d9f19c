"""Tables and budgets on made-up results whose means, ranges and steps are known."""

import report
import sweep
import train


def made_up(data, mask, steps, seed, top1):
    column = {"zero-shot top-1": top1, "zero-shot top-5": 2 * top1}
    tables = {"full picture": {k: v / 2 for k, v in column.items()}, "after tuning": column}
    if mask != "none":
        tables["masked inference"] = {k: v / 4 for k, v in column.items()}
    versions = {"torch": "2"}
    machine = {"cores": 2, "cpu": "c", "memory_gib": 8, "versions": versions, "commit": "abc"}
    return {
        "name": f"{data}{mask}{steps}{seed}", "held_out": tables, "trained_on": machine,
        "bf16": True, "steps": {"pretrain": steps, "tune": 1},
        "config": {"recipe": "compare", "data": data, "mask": mask, "steps": steps, "seed": seed},
    }  # fmt: skip


def test_comparison_shows_means_ranges_and_budgets():
    runs = [
        made_up(data, mask, steps, seed, top1 + 0.01 * seed)
        for data in ("emoji", "scenes-center")
        for mask, steps, top1 in (
            ("gaussian", 100, 0.20), ("random", 100, 0.16), ("none", 100, 0.30), ("none", 40, 0.08),
        )
        for seed in range(3)
    ]  # fmt: skip
    lines = report.compare_table(runs).splitlines()
    assert "| emoji | gaussian | 100 | both | 3 | 5.2 (5.0-5.5) | 10.5 (10.0-11.0) | " \
        "21.0 (20.0-22.0) | 42.0 (40.0-44.0) |" in lines  # fmt: skip
    assert "| emoji | random | 100 | both | 3 | 4.2 (4.0-4.5) | 8.5 (8.0-9.0) | " \
        "17.0 (16.0-18.0) | 34.0 (32.0-36.0) |" in lines  # fmt: skip
    none = [line for line in lines if line.startswith("| scenes-center | none")]
    assert [line.split(" | ")[2:6] for line in none] == [
        ["100", "steps", "3", "-"], ["40", "time", "3", "-"]
    ]  # fmt: skip
    assert "31.0 (30.0-32.0)" in none[0] and "9.0 (8.0-10.0)" in none[1]
    assert lines[-1] == "2 cores of c, 8 GiB, torch 2, bf16, commit abc."


def test_missing_results_are_not_run():
    assert report.compare_table([]) == report.demo_table([]) == "Not run."
    assert report.spread([]) == "not run" and report.spread([0.25]) == "25.0"


def test_equal_time_is_paid_for_in_steps():
    """An unmasked step that costs 3 times a masked one leaves a third of the steps."""
    runs = [train.parse(flags) for flags in sweep.planned({"times_gaussian": {"none": 3.0}})]
    assert len({train.run_name(config) for config in runs}) == len(runs) == 24
    full = train.parse(["--recipe", "compare"]).steps
    for seed in sweep.SEEDS:
        for data in sweep.SETS:
            found = {(c.mask, c.steps) for c in runs if (c.seed, c.data) == (seed, data)}
            assert found == {("gaussian", full), ("random", full), ("none", full),
                             ("none", full // 3)}  # fmt: skip
    assert {(c.model, c.batch_size, c.tune_epochs, c.mask_ratio > 0) for c in runs} == {
        (c.model, c.batch_size, c.tune_epochs, c.mask != "none") for c in runs
    }
