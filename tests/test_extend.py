"""Weights kept on the way, evaluated one by one, and a finished run that is made longer."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import glip
import train
from nanoglip import estimate, runlog
from nanoglip.config import parse
from nanoglip.evals import encoder
from nanoglip.machine import resolve
from tests.test_evaluate import inside
from tests.test_train import records
from tests.torture import BASE, TIMING, differences, finish, tiny

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_model")]

FLAGS = [*BASE, "--log-every", "1", "--save-every", "0", "--keep-every", "3"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(a finished run of eight steps that keeps every third, its settings)."""
    out = tmp_path_factory.mktemp("kept") / "run"
    config = parse([*FLAGS, "--out", str(out)])
    return train.train(config), config


def weights(path):
    return glip.load_checkpoint(path)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_kept_weights_are_those_of_their_step(finished, tmp_path):
    """They end nowhere else: a checkpoint of the same step has the same, and they are light."""
    run, config = finished
    assert sorted(path.name for path in run.iterdir()) == [
        "config.json", "extend.pt", "log.jsonl", "model.pt", "pretrained.pt", "report.html",
        "step-000003.pt", "step-000006.pt",
    ]  # fmt: skip
    found, save = {}, runlog.Report.save_latest

    def saved(self, model, step):
        save(self, model, step)
        found.setdefault(step, weights(self.out / "latest.pt"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runlog.Report, "save_latest", saved)
        other = train.train(replace(config, out=str(tmp_path / "run"), keep_every=0, save_every=1))
    assert differences(run, other) == []  # what is kept changes nothing
    for step in (3, 6):
        content = glip.load_checkpoint(run / f"step-{step:06}.pt")
        assert same(content["model"], found[step]) and "optimizers" not in content
        assert (content["step"], content["steps"]) == (step, {"pretrain": step})
    assert same(weights(run / "extend.pt"), weights(run / "pretrained.pt"))
    sizes = {path.name: path.stat().st_size for path in run.iterdir()}
    assert sizes["step-000003.pt"] < 1.1 * sizes["model.pt"] < sizes["extend.pt"]
    assert not list(other.glob("step-*")) and not (other / "extend.pt").exists()


def longer(config, run, out, **values):
    return replace(config, extend=str(run), out=str(out), **{"steps": 13, **values})


@pytest.mark.parametrize("more", [{}, {"mask": "attentive", "aclip": True}], ids=["glip", "aclip"])
def test_without_a_fall_of_the_rate_an_extension_is_the_straight_run(tmp_path, more):
    """While all is warm-up the rate does not know the length: the same bits, the same log."""
    more = {"teacher_momentum": 1.0, **more} if more else {}  # its momentum knows the length, too
    config = replace(parse(FLAGS), warmup=100, tune_epochs=0.01, **more)
    short = train.train(replace(config, steps=7, out=str(tmp_path / "short")))
    before = {path.name: path.read_bytes() for path in short.iterdir()}
    straight = train.train(replace(config, steps=13, out=str(tmp_path / "straight")))
    extended = train.train(longer(config, short, tmp_path / "longer"))
    assert before == {path.name: path.read_bytes() for path in short.iterdir()}
    ends = [[{k: v for k, v in r.items() if k not in TIMING} for r in records(run) if "loss" in r]
            for run in (straight, extended)]  # fmt: skip
    assert ends[0] == ends[1]
    for name in ("step-000009.pt", "step-000012.pt", "pretrained.pt", "model.pt"):
        assert same(weights(straight / name), weights(extended / name)), name
    content = glip.load_checkpoint(extended / "model.pt")
    assert content["steps"] == glip.load_checkpoint(straight / "model.pt")["steps"]
    assert content["seconds"]["pretrain"] > json.loads(json.dumps(
        glip.load_checkpoint(short / "model.pt")["seconds"]["pretrain"]))  # fmt: skip


def test_the_rate_of_an_extension_is_the_longer_runs(finished, tmp_path, capsys):
    """Up to the old end the log is the old run's; then the rate is lr_at of the new length."""
    run, config = finished
    out = train.train(longer(config, run, tmp_path / "longer"))
    assert f"extending {run} after pretrain step 8" in capsys.readouterr().out
    old, new = ([r for r in records(where) if "loss" in r and r["stage"] == "pretrain"]
                for where in (run, out))  # fmt: skip
    assert new[:8] == old and len(new) == 13
    rates = [train.lr_at(step, 13, config.warmup, config.lr) for step in range(13)]
    assert [r["lr"] for r in new[8:]] == rates[8:]
    assert old[-1]["lr"] < rates[8] < config.lr
    assert not same(weights(run / "pretrained.pt"), weights(out / "pretrained.pt"))
    again = train.train(longer(config, out, tmp_path / "again", steps=15))
    assert [r["step"] for r in records(again) if "lr" in r][-3:-1] == [14, 15]


def test_an_extension_that_is_cut_ends_as_one_that_is_not(finished, tmp_path, monkeypatch):
    """Cut before its first checkpoint, when it starts anew, and after."""
    run, config = finished
    straight = train.train(longer(config, run, tmp_path / "straight"))
    own, save = longer(config, run, tmp_path / "cut"), runlog.Report.save_latest
    for before in (True, False):

        def cut(*arguments, before=before):
            if not before:
                save(*arguments)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(runlog.Report, "save_latest", cut)
            train.train(own)
    assert differences(straight, train.train(own)) == []


def test_two_processes_extend_a_sharded_run(tmp_path):
    flags = [*FLAGS, "--optimizer", "adamw", "--shard", "--tune-epochs", "0", "--warmup", "100"]
    finish(tmp_path / "short", [*flags, "--steps", "4"], world=2, before=tiny)
    more = ["--steps", "7", "--extend", str(tmp_path / "short")]
    finish(tmp_path / "longer", [*flags, *more], world=2, before=tiny)
    finish(tmp_path / "straight", [*flags, "--steps", "7"], world=2, before=tiny)
    for name in ("step-000006.pt", "model.pt"):
        assert same(*(weights(tmp_path / run / name) for run in ("longer", "straight")))


def test_what_cannot_be_extended_is_told_before_anything_is_written(finished, tmp_path):
    run, config = finished
    bare = shutil.copytree(run, tmp_path / "bare")
    (bare / "extend.pt").unlink()
    broken = shutil.copytree(run, tmp_path / "broken")
    (broken / "extend.pt").write_bytes((run / "extend.pt").read_bytes()[:9999])
    cases = [
        (bare, {}, "no extend.pt in it, which a run with --keep-every leaves"),
        (broken, {}, r"extend\.pt: not a whole checkpoint"),
        (run, {"steps": 8}, "has 8 steps: give more --steps or --epochs"),
        (run, {"lr": 0.5}, "its --lr was 0.002, not 0.5"),
        (run, {"precision": "bf16"}, "its --precision was fp32, not bf16"),
    ]
    for source, values, words in cases:
        with pytest.raises(glip.InputError, match=words):
            train.train(longer(config, source, tmp_path / "longer", **values))
        assert not (tmp_path / "longer").exists()
    with pytest.raises(glip.InputError, match=f"--extend {run} makes it longer in a folder"):
        train.train(replace(config, steps=13))


def test_the_estimate_counts_what_is_kept():
    """In units of a ViT-B/16's 4-byte weights: 10 without, 3 for extend.pt and one each with."""
    sizes = []
    for every in ("0", "100000", "50000"):
        words = ["--recipe", "cc12m", "--estimate", "h100x8", "--keep-every", every]
        told = estimate.tell(parse(words), []).splitlines()
        (line,) = (line for line in told if line.startswith("disk:"))
        sizes.append([float(size) for size in re.findall(r"([\d.]+) GB of (?:ch|what)", line)])
    assert sizes[0] == [pytest.approx(10 * 0.598, abs=0.05)]
    assert sizes[1][1] == pytest.approx(5 * 0.598, abs=0.05)  # 257,040 steps
    assert sizes[2][1] == pytest.approx(8 * 0.598, abs=0.05)


# --- evaluate.py --checkpoints --------------------------------------------------------------------


def test_every_kept_checkpoint_is_evaluated(finished, tmp_path, monkeypatch, capsys):
    """The numbers of a plain loop; printed, drawn, on the page; also while the run goes on."""
    run = shutil.copytree(finished[0], tmp_path / "run")
    done = inside(monkeypatch, capsys, evaluate.main, "evaluate.py", str(run), "--checkpoints",
                  "--precision", "fp32")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((run / "results.json").read_text())["checkpoints"]
    _, pairs = data.load(("emoji",), 16)
    assert list(found) == ["3", "6", "8", "9"]
    for steps, name in zip(found, ("step-000003", "step-000006", "pretrained", "model")):
        model, _ = glip.load_model(run / f"{name}.pt")
        with torch.no_grad():
            scores = model.encode_image(pairs.render(np.arange(1809))) @ model.encode_text(
                glip.tokenize(pairs.captions)
            ).T
        right = torch.from_numpy(pairs.concept)[:, None]
        share, low, high = found[steps]["zero-shot top-5"]
        wanted = (scores.topk(5).indices == right).any(1).double().mean().item()
        assert share == pytest.approx(wanted, abs=2.5 / 1809) and low <= share <= high
        assert f"{100 * share:.1f} % ({100 * low:.1f}-{100 * high:.1f})" in done.stdout
    assert "9, after tuning" in done.stdout and "8, after" not in done.stdout
    assert Image.open(run / "checkpoints.png").format == "PNG"
    assert "Evaluation: kept checkpoints" in (run / "report.html").read_text()
    for name in ("model.pt", "pretrained.pt"):
        (run / name).unlink()
    options = evaluate.EvaluateConfig(run=str(run), checkpoints=True, precision="fp32")
    early = evaluate.run_checkpoints(options)
    assert early == {step: {k: tuple(v) for k, v in found[str(step)].items()} for step in (3, 6)}
    for path in run.glob("step-*"):
        path.unlink()
    with pytest.raises(glip.InputError, match=r"no step-\*\.pt in it, which train.py --keep-every"):
        evaluate.run_checkpoints(options)
    with pytest.raises(glip.InputError, match="--checkpoints and --publish: give one at a time"):
        evaluate.run_command(replace(options, publish=True))


def test_the_last_kept_step_says_what_the_log_says(finished):
    run, _ = finished
    _, pairs = data.load(("emoji",), 16)
    own = encoder.Encoder(glip.load_model(run / "pretrained.pt")[0], resolve("cpu", "fp32"))
    (logged,) = (r for r in records(run) if r["stage"] == "pretrain" and r["step"] == 8
                 and "evaluation_seconds" in r)  # fmt: skip
    scores = encoder.quick(own, pairs)
    assert scores == {name: logged[name] for name in encoder.metrics_of(pairs)}
