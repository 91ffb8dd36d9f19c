"""Every script ends in one sentence, whatever happens, and on however many processes."""

import io
import itertools
import math
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import data
import evaluate
import train
from glip import InputError
from nanoglip import cli, distributed
from nanoglip.config import TrainConfig, check
from tests.test_resume import TORCHRUN
from tests.test_train import command
from tools import bench, convert, finetune, sweep, tables

WORKER = """Caught InputError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "worker.py", line 3, in fetch
masks.InputError: give --y
"""


def ended(monkeypatch, capsys, error, *words):
    """(exit code, lines on stderr) of a script in which something is raised."""

    @cli.guarded
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (InputError("give --x"), 2, "give --x"),
        (cli.Stopped("stopped after step 3"), cli.STOPPED, "stopped after step 3"),
        (KeyError("stage"), 1, "KeyError: 'stage'; nanoGLIP did not foresee this: please report"),
        (OSError(36, "File name too long", "xx"), 2, "xx: File name too long; check the name"),
        (torch.OutOfMemoryError("CUDA out of memory\nTry"), 2, "OutOfMemoryError: CUDA out"),
        (RuntimeError("CUDA error: an illegal memory access"), 1, "RuntimeError: CUDA error: "),
        (dist.DistBackendError("NCCL error\nno space"), 1, "DistBackendError: NCCL error no sp"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ModuleNotFoundError(name="skimage"), 2, "the package skimage is not installed: `make set"),
        (RuntimeError("[/x/gloo/transport/tcp/pair.cc:547] Connection closed"), 1, "another proc"),
        (InputError(WORKER), 2, "give --y"),
        (RuntimeError(WORKER), 1, "RuntimeError: give --y; nanoGLIP did not"),
    ],
)
def test_an_error_is_one_sentence(monkeypatch, capsys, error, code, words):
    before = signal.getsignal(signal.SIGINT)
    try:
        found, lines = ended(monkeypatch, capsys, error)
        if isinstance(error, KeyboardInterrupt | cli.Stopped):  # once more
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert found == code and len(lines) == 1
    assert lines[0].startswith(f"train.py: {words}")


def test_debug_adds_the_traceback_and_no_script_sees_the_flag(monkeypatch, capsys):
    code, lines = ended(monkeypatch, capsys, KeyError("stage"), "--debug", "--steps", "3")
    assert code == 1 and lines[0].startswith("Traceback") and lines[-1].startswith("train.py: Key")
    assert sys.argv[1:] == ["--steps", "3"]


def test_a_terminal_obeys_nothing_in_a_sentence(monkeypatch, capsys):
    wild = "a\x1b[31mb\ntrain.py: all is well\r\x9b\udcff\u202ec"
    for error in (InputError(wild, "two"), OSError(2, "No such file", wild)):
        _, lines = ended(monkeypatch, capsys, error)
        assert len(lines) == (len(error.args) if isinstance(error, InputError) else 1)
        assert all(line.isprintable() and line.startswith("train.py: ") for line in lines)
    cli.say("one\x1b[2J\ntwo")
    assert capsys.readouterr().out == "one?[2J\ntwo\n"


def test_a_sentence_is_told_by_rank_0_alone(monkeypatch, capsys):
    for rank in ("0", "1", "7"):
        monkeypatch.setenv("RANK", rank)
        cli.say(f"rank {rank}")
    assert capsys.readouterr().out == "rank 0\n"


def test_every_script_has_the_handler():
    for script in (bench, convert, data, evaluate, finetune, tables, sweep, train):
        assert script.main.__wrapped__.__module__ == script.__name__


CHECKS = {
    "train": (lambda config: check(config, 1), TrainConfig()),
    "finetune": (finetune.check, finetune.settled(finetune.FineTuneConfig("run", "data"), 240)),
    "snapshot": (data.snapshot, data.SnapshotConfig("cc3m", Path("nowhere"))),
    "index": (data.index, data.IndexConfig("https://nowhere.invalid")),
}


@pytest.mark.parametrize("name", CHECKS)
def test_a_number_that_is_none_is_refused_by_its_flag(name):
    """Every setting that is a number, with what is not finite or has more than 63 bits."""
    check, config = CHECKS[name]
    numbers = [n for n, value in vars(config).items() if type(value) in (int, float)]
    assert numbers
    for setting, value in itertools.product(numbers, (math.nan, math.inf, -math.inf, 10**30)):
        with pytest.raises(InputError, match=f"^--{setting.replace('_', '-')} "):
            check(replace(config, **{setting: value}))


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("finetune", "batch_size", 1), ("finetune", "seed", -1), ("finetune", "lr", 0),
        ("finetune", "workers", -1), ("finetune", "wise", (0.5, math.nan)), ("train", "seed", -1),
        ("train", "sigma", (0.2, math.inf)), ("index", "processes", -1),
        ("snapshot", "connections", 0),
    ],
)  # fmt: skip
def test_a_number_out_of_range_is_refused_by_its_flag(name, setting, value):
    check, config = CHECKS[name]
    with pytest.raises(InputError, match=f"^--{setting.replace('_', '-')} "):
        check(replace(config, **{setting: value}))


NUMBERS = {
    "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "9",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({}, (1, 1, 2)), ({"LOCAL_RANK": None}, (1, 0, 2)), ({"WORLD_SIZE": None}, (0, 0, 1)),
        ({"WORLD_SIZE": ""}, (0, 0, 1)), ({"WORLD_SIZE": "1"}, (0, 0, 1)),
        ({"RANK": None}, "RANK"), ({"RANK": ""}, "RANK"), ({"WORLD_SIZE": "two"}, "WORLD_SIZE"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR"), ({"MASTER_PORT": "-1"}, "MASTER_PORT"),
    ],
)  # fmt: skip
def test_a_half_set_environment_is_told(monkeypatch, changed, found):
    for name, value in (NUMBERS | changed).items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    if isinstance(found, tuple):
        assert cli.place() == found
        return
    with pytest.raises(InputError, match=f"{found} is missing or no number: start .* torchrun"), \
            distributed.processes("cpu", "fp32"):  # fmt: skip
        raise AssertionError


FAILS = """
import sys, time
from nanoglip import cli
from glip import InputError
@cli.guarded
def main():
    when, who = sys.argv[1:]
    rank = cli.place()[0]
    if when == "before" and str(rank) in who:
        raise InputError(f"wrong on {rank}")
    from nanoglip import distributed
    with distributed.processes("cpu", "fp32") as (rank, world, on):
        if str(rank) in who:
            raise InputError(f"wrong on {rank}")
        distributed.dist.barrier()
        time.sleep(60)
main()
"""


@pytest.mark.parametrize(("when", "who"), [("before", "01"), ("before", "1"), ("within", "1")])
def test_the_sentence_is_there_on_several_processes(tmp_path, when, who):
    """Whether all fail or one that is not the first, with a group of processes or without."""
    (tmp_path / "fails.py").write_text(FAILS)
    done = command(*TORCHRUN, str(tmp_path / "fails.py"), when, who)
    told = [line for line in done.stderr.splitlines() if line.startswith("fails.py: ")]
    assert done.returncode != 0 and len(told) == 1 and told[0][:-1] == "fails.py: wrong on "


def test_blocks_are_all_numbers_in_order_under_a_bar(monkeypatch):
    """On a terminal; elsewhere nothing is printed."""
    for terminal in (True, False):
        screen = io.StringIO()
        screen.isatty = lambda terminal=terminal: terminal
        monkeypatch.setattr(sys, "stderr", screen)
        found = list(cli.blocks(600, 256, "pictures"))
        assert torch.cat(found).tolist() == list(range(600)) and len(found) == 3
        assert ("pictures" in screen.getvalue() and "/600" in screen.getvalue()) == terminal
        assert terminal or not screen.getvalue()
