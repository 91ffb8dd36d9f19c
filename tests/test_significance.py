"""Intervals and verdicts against scipy's bootstrap, McNemar's test in closed form, and chance."""

import itertools
import json
import math
import os
import shutil
import sys

import numpy as np
import pytest
import scipy.stats
import torch

import evaluate
import glip
from nanoglip import files
from nanoglip.evals import figures, significance
from nanoglip.evals.metrics import hits, zero_shot
from nanoglip.evals.significance import by_unit, compare, difference, interval
from nanoglip.machine import use_bf16
from nanoglip.masker import Masker
from tests.test_data import make_pictures


def rights(n, share, seed=0):
    return np.random.default_rng(seed).random(n) < share


def as_columns(**hits):
    return {"full picture": {name.replace("_", " "): found for name, found in hits.items()}}


@pytest.mark.parametrize(("n", "share"), [(1809, 0.41), (300, 0.03), (50, 0.9)])
def test_interval_of_a_share_is_scipys_bootstrap(n, share):
    hits = rights(n, share)
    theirs = scipy.stats.bootstrap(
        (hits,), np.mean, n_resamples=20_000, method="percentile", rng=1, batch=1000
    ).confidence_interval
    assert interval(hits) == pytest.approx((theirs.low, theirs.high), abs=1.01 / n)
    drawn = interval(hits.astype(float))  # numbers in general are resampled
    assert drawn == pytest.approx((theirs.low, theirs.high), abs=max(0.003, 1.01 / n))


def test_interval_of_any_statistic_resamples_examples_together():
    rng = np.random.default_rng(0)
    labels = rng.random(500) < 0.4
    scores = labels + rng.normal(size=500)
    low, high = interval(labels, scores, statistic=lambda x, y: np.corrcoef(x, y)[0, 1])
    theirs = scipy.stats.pearsonr(labels, scores)
    assert (low, high) == pytest.approx(tuple(theirs.confidence_interval()), abs=0.02)
    assert low < theirs.statistic < high


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Also where all answers are wrong, or right, and no resample differs from the sample."""
    for truth in (0.4, 0.03):
        held = [low <= truth <= high for low, high in
                (interval(rights(400, truth, seed)) for seed in range(1000))]  # fmt: skip
        assert 0.91 < np.mean(held) < 0.98
    low, high = interval(np.zeros(100, bool))
    assert low == 0 and high == pytest.approx(1 - 0.025 ** (1 / 100))
    assert interval(np.ones(100, bool)) == pytest.approx((1 - high, 1))
    assert interval(np.zeros(0, bool)) == (0, 1)


def test_difference_is_mcnemars_exact_test_and_the_paired_bootstrap():
    a, b = rights(500, 0.4), rights(500, 0.5, seed=1)
    gained, lost = int((~a & b).sum()), int((a & ~b).sum())
    n, fewer = gained + lost, min(gained, lost)
    p = min(1, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)
    found = difference(a, b)
    assert found["p"] == pytest.approx(p) and found["difference"] == pytest.approx(
        b.mean() - a.mean()
    )
    theirs = scipy.stats.bootstrap(
        (a, b), lambda a, b, axis: b.mean(axis) - a.mean(axis), paired=True, n_resamples=20_000,
        method="percentile", rng=1, batch=1000,
    ).confidence_interval  # fmt: skip
    assert (found["low"], found["high"]) == pytest.approx((theirs.low, theirs.high), abs=0.005)
    other = difference(b, a)
    assert other["p"] == found["p"] and other["difference"] == -found["difference"]


def captions_found(seed, pictures=200, each=5):
    """Two equal models' rights (P, C); captions of one picture tend to be right together."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(pictures, 1))  # by both models
    own = rng.normal(size=(2, pictures, 1))
    noise = rng.normal(size=(2, pictures, each))
    return 0.57 * (shared + own) + 0.59 * noise > 0.25 * (2 * 0.57**2 + 0.59**2) ** 0.5


def test_captions_of_one_picture_are_no_independent_examples():
    """In 4,000 trials intervals covered 94.9 % (of differences 95.1 %), and equal models differed
    in 4.1 %; taken as independent, 76 and 18 %.
    """
    unit, truth = np.repeat(np.arange(200), 5), 1 - scipy.stats.norm.cdf(0.25)
    held, spans_zero, fooled, trials = 0, 0, 0, 200
    for seed in range(1000, 1000 + trials):
        a, b = (by_unit(found.ravel(), unit) for found in captions_found(seed))
        low, high = interval(a)
        held += low <= truth <= high
        found = difference(a, b)
        spans_zero += found["low"] <= 0 <= found["high"]
        fooled += found["p"] < 0.05
    assert 0.92 <= held / trials <= 0.98 and 0.92 <= spans_zero / trials <= 0.98
    assert 0.01 <= fooled / trials <= 0.08


def test_units_of_one_answer_are_examples():
    """And several units' answers, all right or all wrong, say what so many units say."""
    a, b = rights(300, 0.4), rights(300, 0.5, seed=1)
    order = np.random.default_rng(2).permutation(300)
    ones = [by_unit(answers[order], order) for answers in (a, b)]
    assert interval(ones[0]) == interval(a) and difference(*ones) == difference(a, b)
    unit = np.repeat(np.arange(100), 5)
    for answers in (np.zeros(500, bool), np.ones(500, bool)):
        assert interval(by_unit(answers, unit)) == interval(answers[:100])
    uneven = by_unit(np.array([True, False, False, False]), np.array([0, 1, 1, 1]))
    assert uneven.tolist() == [[1, 1], [0, 3]] and difference(uneven, uneven)["a"] == 0.25


def test_flipped_signs_are_counted_out():
    """Against every flip in turn, for leads of several answers."""
    lead = np.array([3, -1, 2, 0, 2, -2, 1, 5])
    signs = np.array(list(itertools.product((-1, 1), repeat=len(lead))))
    asked = np.full(len(lead), 5)
    a, b = (np.stack([np.maximum(x, 0), asked], axis=1) for x in (-lead, lead))
    found = difference(a, b)
    assert found["p"] == pytest.approx((np.abs(signs @ lead) >= abs(lead.sum())).mean())
    assert found["difference"] == lead.sum() / asked.sum()


def test_a_run_against_itself_has_no_real_difference():
    own = as_columns(easy=rights(300, 0.9), hard=rights(300, 0.1), none=np.zeros(300, bool))
    for row in compare(own, own)["full picture"].values():
        assert (row["difference"], row["low"], row["high"], row["p"]) == (0, 0, 0, 1)
        assert row["real"] is False


def test_clear_differences_are_real_and_chance_seldom_is():
    a = as_columns(better=rights(1000, 0.3), same=rights(1000, 0.5))
    b = as_columns(better=rights(1000, 0.5, 1), same=rights(1000, 0.5, 2))
    rows = compare(a, b)["full picture"]
    assert rows["better"]["real"] and rows["better"]["low"] > 0.1 and not rows["same"]["real"]
    text = significance.comparison_table({"full picture": rows})
    assert next(line for line in text.splitlines() if line.endswith("real")).startswith("better")
    assert "1 of 2 differences are real" in text
    fooled = 0
    for seed in range(60):  # eight metrics without any difference
        sides = ({f"m{i}": rights(200, 0.5, [seed, side, i]) for i in range(8)}
                 for side in (0, 1))  # fmt: skip
        rows = compare(*({"column": side} for side in sides))["column"]
        fooled += any(row["real"] for row in rows.values())
    assert fooled <= 8  # 3 are expected; uncorrected, 20


def test_permuted_features_are_at_chance():
    """Their interval holds one in a hundred, and the right features are really better."""
    rng = torch.Generator().manual_seed(0)
    names = torch.nn.functional.normalize(torch.randn(100, 64, generator=rng), dim=-1)
    concept, flags = np.arange(3000) % 100, np.zeros(100, bool)
    images = names[concept]
    perfect, permuted = (
        hits(zero_shot(images[order], names, concept, flags))
        for order in (torch.arange(3000), torch.randperm(3000, generator=rng))
    )
    low, high = interval(permuted["zero-shot top-1"])
    assert low <= 0.01 <= high and high - low < 0.01 and perfect["zero-shot top-1"].all()
    rows = compare({"": permuted}, {"": perfect})[""]
    assert len(rows) == 2 and all(row["real"] for row in rows.values())


def made_run(folder, seed=0, own="own"):
    """A finished run on 300 own pictures, of a model that was never trained."""
    pictures = folder.parent / own
    if not pictures.exists():
        make_pictures(pictures, 300)
    torch.manual_seed(seed)
    model = glip.GLIP(glip.GLIPConfig(16, 8, 24, 1, 3, 10, 20, 1, 2))
    settings = {"data": str(pictures), "vendors": (), "held_out": "Twtr", "mask": "gaussian",
                "mask_ratio": 0.5, "seed": seed, "out": str(folder), "model": "m", "aclip": False,
                "text_mask": "none"}  # fmt: skip
    folder.mkdir()
    glip.save_checkpoint(
        folder / "model.pt", model, config=settings, stage="pretrain", step=1, steps={}, seconds={},
        mask=Masker("gaussian", 0.5).state(), machine={}, command="c", world=1, bf16=False,
    )  # fmt: skip
    return folder


def run_main(monkeypatch, capsys, *words):
    """(exit code, stdout, last line of stderr) of evaluate.py."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words), "--device", "cpu"])
    code = 0
    try:
        evaluate.main()
    except SystemExit as stopped:
        code = stopped.code
    told = capsys.readouterr()
    return code, told.out, (told.err.strip().splitlines() or [""])[-1]


def test_tables_are_printed_before_anything_is_written(tmp_path, monkeypatch, capsys):
    """Of a folder that takes no file; and "." is a folder with a name."""
    monkeypatch.setattr(files, "CACHE", tmp_path / "cache")
    run = made_run(tmp_path / "a")
    for name in ("results.json", "search.png"):
        (run / f"{name}.{os.getpid()}.tmp").mkdir()  # where it is written first
    code, out, err = run_main(monkeypatch, capsys, run)
    assert code == 2 and "results.json cannot be written" in err
    assert "image to text R@1 " in out and "full picture" in out
    code, out, err = run_main(monkeypatch, capsys, run, "--search", "x", "--images",
                              tmp_path / "own")  # fmt: skip
    assert code == 2 and "search.png cannot be written" in err and " 12  similarity " in out
    monkeypatch.chdir(run)
    assert [evaluate.run_folder(name).name for name in (".", "../a", str(run))] == ["a"] * 3


def test_the_commands_help_names_what_stands_without_a_flag(monkeypatch, capsys):
    code, out, _ = run_main(monkeypatch, capsys, "--help")
    assert code == 0 and "[RUN] [OTHER]" in out
    assert "folder of a run (default: the run written" in out and "a second run: compare" in out


def test_two_runs_are_compared_by_the_command(tmp_path, monkeypatch, capsys):
    """Evaluated where they were not, read where they were, and refused where pairs differ."""
    monkeypatch.setattr(files, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(figures, "draw_all", lambda *_: [])
    a, b, other = (made_run(tmp_path / name, seed, own) for name, seed, own in
                   (("a", 0, "own"), ("b", 1, "own"), ("other", 0, "more")))  # fmt: skip
    code, out, err = run_main(monkeypatch, capsys, a, b)
    assert (code, err) == (0, "") and f"A: {a}" in out and "differences are real" in out
    assert out.count("+0.0 (+0.0 to +0.0)") < 12
    results = json.loads((b / "results.json").read_text())
    with np.load(b / "outcomes.npz") as kept:
        ranks = {name: kept[name] for name in kept.files}
    for column, table in results["held_out"].items():
        for metric, value in table.items():
            low, high = results["intervals"][column][metric]
            assert 0 <= low <= value <= high <= 1
            way, _, k = metric.partition(" R@")
            answers = ranks[f"{column}/{way} R@{{}}"]
            assert value == (answers < int(k)).mean()
            assert [low, high] == list(interval(answers < int(k)))
            assert f"{100 * value:.1f} %" in out
    assert set(results["held_out"]) == {"masked inference", "full picture"}

    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "run_evaluation", None)  # all that is needed is there
        same, out, _ = run_main(monkeypatch, capsys, a, a)
    assert same == 0 and "0 of 12 differences are real" in out
    for name in sorted((tmp_path / "more").glob("*.txt")):
        name.write_text("another " + name.read_text())
    code, _, err = run_main(monkeypatch, capsys, a, other)
    assert code == 2 and "held out different pairs" in err and "--data" in err
    before = (a / "model.pt").stat()
    shutil.copy(b / "model.pt", a / "model.pt")
    os.utime(a / "model.pt", ns=(before.st_atime_ns, before.st_mtime_ns))
    code, out, _ = run_main(monkeypatch, capsys, a, b)  # other weights, though of the same time
    assert code == 0 and out.count("+0.0 (+0.0 to +0.0)") == 12
    other = "fp32" if use_bf16("auto", torch.device("cpu")) else "bf16"
    _, out, _ = run_main(monkeypatch, capsys, a, b, "--precision", other)
    assert f"in {other}\n" in out and out.count(f" {other}, seed") == 2
    (a / "outcomes.npz").write_bytes(b"torn")
    (b / "results.json").write_text(json.dumps(results)[:500])
    for words, told in (
        ((b,), "results.json: not what evaluate.py writes: remove it"),
        ((b, "--zero-shot", b), "results.json: not what evaluate.py writes: remove it"),
        ((a, b), "outcomes.npz: not what evaluate.py writes"),
        ((a, tmp_path / "nowhere"), "nowhere: no model.pt in it"),
        ((a, b, "--publish"), "one at a time"),
    ):
        code, _, err = run_main(monkeypatch, capsys, *words)
        assert code == 2 and told in err
