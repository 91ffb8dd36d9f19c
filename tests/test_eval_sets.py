"""What training evaluates at intervals, on the user's sets, and what it costs nobody."""

import os
import shutil
import time
from dataclasses import replace
from datetime import timedelta
from functools import partial

import pytest
import torch

import glip
import train
from nanoglip import checkpoint, distributed, runlog
from nanoglip.config import parse
from nanoglip.evals import benchmarks, figures
from nanoglip.evals.encoder import Encoder
from nanoglip.machine import Device
from tests.processes import Run
from tests.test_benchmarks import write_captions, write_classes, write_tree
from tests.test_page import drawn
from tests.test_train import records
from tests.torture import BASE, differences, finish, start, tiny

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_model")]

FLAGS = [*BASE, "--log-every", "1", "--eval-every", "4", "--save-every", "0"]


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmarks, "BLOCK", 5)
        yield


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A published set, a folder of classes, and pictures with captions."""
    home = tmp_path_factory.mktemp("sets")
    return [str(folder) for folder in (
        write_classes(home / "wds_colours", 12), write_captions(home / "said", 11),
        write_tree(home / "garden", ["red_tulip", "daisy"], 3),
    )]  # fmt: skip


NAMES = ["colours/acc1", "colours/acc5", "garden/acc1", "said/text_retrieval_recall@1"]


def scores(run):
    """What a run's log says of sets, by stage and step."""
    return {(r["stage"], r["step"]): {k: v for k, v in r.items() if "/" in k}
            for r in records(run) if "evaluation_seconds" in r}  # fmt: skip


def by_evaluate(run, name, sets):
    """The same of a checkpoint's model, as evaluate.py computes it in one process."""
    model = glip.load_model(run / name)[0]
    columns = {"x": (Encoder(model, Device(torch.device("cpu"), bf16=False)), None)}
    captioned = [place for place in sets if place.endswith("said")]
    others = [place for place in sets if place not in captioned]
    results, _, problems = benchmarks.evaluate_sets(columns, others, captioned)
    assert problems == []
    found = {f"{name}/{metric}": value for name, entry in results.items()
             for metric, value in entry["columns"]["x"].items()}  # fmt: skip
    return {name: found[name] for name in NAMES}


@pytest.fixture(scope="module")
def straight(tmp_path_factory, sets):
    """A run whose tuning sees larger pictures."""
    out = tmp_path_factory.mktemp("watched") / "run"
    config = parse([*FLAGS, "--tune-image-size", "24", "--tensorboard", "--out", str(out),
                    "--eval-sets", *sets])  # fmt: skip
    return train.train(config), config


def test_the_log_has_what_evaluate_says_of_each_stages_model(straight, sets):
    run, _ = straight
    found = scores(run)
    assert set(found) > {("pretrain", 4), ("pretrain", 8)} and max(found)[0] == "tune"
    assert found["pretrain", 8] == by_evaluate(run, "pretrained.pt", sets)
    assert found[max(found)] == by_evaluate(run, "model.pt", sets)
    assert any(found["pretrain", 8][name] != found[max(found)][name] for name in NAMES)


def test_curves_and_tensorboard_show_the_sets(straight, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = straight
    panels, fig = drawn(tmp_path, records(run))
    (legend,) = (axes.get_legend() for axes in fig.axes if "sets" in axes.get_title())
    assert [text.get_text() for text in legend.get_texts()] == sorted({*NAMES} - {"colours/acc5"})
    (panel,) = (lines for title, lines in panels.items() if "sets" in title)
    assert list(panel) == [name for name in NAMES if name != "colours/acc5"]
    before = [found["garden/acc1"] for (stage, _), found in scores(run).items()
              if stage == "pretrain"]  # fmt: skip
    line = panel["garden/acc1"]
    assert [y for _, y in line[: len(before)]] == before and line[0][0] == 4 and line[-1][0] > 8
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    shown = {event.step: event.value for event in board.Scalars("garden/acc1")}
    assert [shown[step] for step in (4, 8)] == pytest.approx(before)
    assert len({*figures.COLOURS}) == 7


def test_a_resumed_run_logs_the_same_numbers(straight, sets, tmp_path, monkeypatch):
    run, config = straight
    out, save, left = tmp_path / "run", runlog.Report.save_latest, [1, 2]

    def save_and_stop(*arguments):
        save(*arguments)
        left.pop()
        if not left:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runlog.Report, "save_latest", save_and_stop)
        train.train(replace(config, out=str(out)))
    train.train(replace(config, out=str(out)))
    assert differences(run, out) == []


def test_evaluation_is_not_training_time(sets, tmp_path, monkeypatch, capsys):
    """Neither in the record of the model nor in pairs per second; the log has its seconds."""
    score, slow = runlog.score_sets, 3.0

    def slowly(*arguments):
        time.sleep(slow)
        return score(*arguments)

    monkeypatch.setattr(runlog, "score_sets", slowly)
    words = [*FLAGS, "--tune-epochs", "0", "--out", str(tmp_path / "run"), "--eval-sets", sets[2]]
    begun = time.perf_counter()
    run = train.train(parse(words))
    wall = time.perf_counter() - begun
    logged = records(run)
    spent = [r["evaluation_seconds"] for r in logged if "evaluation_seconds" in r]
    assert len(spent) == 2 and min(spent) > slow
    seconds = glip.load_checkpoint(run / "model.pt")["seconds"]["pretrain"]
    assert seconds < wall - sum(spent)
    last = [r for r in logged if "loss" in r][-1]
    assert last["seconds"] < wall - spent[0]
    assert last["pairs_per_second"] == pytest.approx(8 * 32 / last["seconds"])
    assert "pretrain step 8: zero-shot top-1" in (told := capsys.readouterr().out)
    assert "garden/acc1" in told


def blocks_of_5():
    tiny()
    benchmarks.BLOCK, benchmarks.TEXTS = 5, 7


@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_share_the_sets_and_find_what_one_finds(sets, tmp_path, shard):
    out = tmp_path / "run"
    more = ["--optimizer", "adamw", *["--shard"] * shard, "--tune-epochs", "0"]
    finish(out, [*FLAGS, *more, "--eval-sets", *sets], world=2, before=blocks_of_5)
    assert scores(out)["pretrain", 8] == by_evaluate(out, "model.pt", sets)


# --- what is wrong --------------------------------------------------------------------------------


def spoil(folder):
    """Cut the last picture of a folder short."""
    path = max(folder.rglob("*.*"))
    path.write_bytes(path.read_bytes()[:60])


def test_a_bad_set_is_told_before_anything_is_written(sets, tmp_path):
    twin = shutil.copytree(sets[2], tmp_path / "garden")
    empty = tmp_path / "empty"
    empty.mkdir()
    for places, words in (
        (["nowhere"], "nowhere: no such folder"), ([str(empty)], "empty: no test/nshards.txt"),
        ([sets[2], str(twin)], "--eval-sets: 2 sets are called garden"),
    ):  # fmt: skip
        with pytest.raises(glip.InputError, match=words):
            train.train(parse([*FLAGS, "--out", str(tmp_path / "run"), "--eval-sets", *places]))
    spoil(twin)
    run = Run("train", *FLAGS, "--out", tmp_path / "run", "--eval-sets", twin,
              log=tmp_path / "log.txt", world=2, before=blocks_of_5)  # fmt: skip
    code, printed = run.finish()
    assert code != 0 and printed.count("not a readable picture") == 1, printed[-2000:]
    assert "Traceback" not in printed and not (tmp_path / "run").exists()


def test_a_set_that_breaks_while_the_model_trains_gives_no_number(sets, tmp_path, capsys):
    """The run goes on, and says why; the other set has its numbers."""
    places = [shutil.copytree(place, tmp_path / place.rpartition("/")[2]) for place in sets[1:]]
    score = runlog.score_sets

    def break_then_score(*arguments):
        spoil(places[1])
        return score(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runlog, "score_sets", break_then_score)
        run = train.train(parse([*FLAGS, "--out", str(tmp_path / "run"), "--eval-sets",
                                 *map(str, places)]))  # fmt: skip
    assert all(set(found) == {NAMES[3]} for found in scores(run).values())
    assert "no number of a set: " in capsys.readouterr().out and (run / "model.pt").exists()


ALONE = {  # what rank 0 does alone
    "decoding": (train.data, "load"), "evaluation": (runlog, "quick"),
    "checkpoint": (checkpoint, "save"),
}  # fmt: skip


def slow_first(what, seconds, limit):
    """Rank 0 works alone for longer than collectives may last."""
    tiny()
    distributed.LIMIT = timedelta(seconds=limit)
    owner, name = ALONE[what]
    work = getattr(owner, name)

    def slowly(*arguments, **how):
        time.sleep(seconds * (os.environ["RANK"] == "0"))
        return work(*arguments, **how)

    setattr(owner, name, slowly)


@pytest.mark.parametrize("what", ALONE)
def test_work_of_rank_0_outlasts_the_limit_of_collectives(tmp_path, what):
    words = [*BASE, "--steps", "2", "--save-every", "0", "--tune-epochs", "0"]
    run = start(tmp_path / "run", words, world=2, before=partial(slow_first, what, 12.0, 6.0))
    code, printed = run.finish()
    assert code == 0 and (tmp_path / "run/model.pt").exists(), printed[-3000:]
