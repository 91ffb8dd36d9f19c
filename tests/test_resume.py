"""A run that is killed, stopped, poisoned or moved to other processes goes on as if it were not."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import train
from glip import InputError
from nanoglip import checkpoint, cli, files, runlog
from nanoglip.config import parse
from nanoglip.sources import shards
from tests.test_shards import make_shards
from tests.torture import (
    BASE,
    ROOT,
    differences,
    end,
    finish,
    start,
    torture,
    wait_for_checkpoint,
)

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("straight") / "run"
    finish(out, BASE)
    return out


def cut_short(out, flags=BASE, launch=(), number=signal.SIGKILL, checkpoints=1):
    """A run that was ended behind its first checkpoints; its exit code."""
    process = start(out, flags, launch)
    for _ in range(checkpoints):
        wait_for_checkpoint(out, process)
    end(process, number)
    process.communicate(timeout=120)
    assert not (out / "model.pt").exists()
    return process.returncode


def test_killed_runs_end_as_the_straight_run(tmp_path):
    counts = torture(tmp_path, 2)
    assert counts["runs"] == 2


def test_a_torn_checkpoint_falls_back_to_the_one_before(tmp_path, straight):
    out = tmp_path / "run"
    cut_short(out, checkpoints=2)
    (out / "latest.pt.1.tmp").write_bytes(b"of a run that was killed while it wrote")
    assert (out / "previous.pt").exists()
    content = (out / "latest.pt").read_bytes()
    (out / "latest.pt").write_bytes(content[: len(content) // 2])
    told = finish(out, BASE)
    assert "latest.pt: not a whole checkpoint of nanoGLIP" in told and "going back" in told
    assert differences(straight, out) == []
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json", "log.jsonl", "model.pt", "pretrained.pt", "report.html"
    ]  # fmt: skip


@pytest.fixture(scope="module")
def cut_run(tmp_path_factory):
    """(a run that ended behind its second checkpoint, its settings, its stages)."""
    out = tmp_path_factory.mktemp("cut") / "run"
    config = parse([*BASE, "--out", str(out)])
    save, left = runlog.Report.save_latest, [1, 2]

    def save_and_stop(*arguments):
        save(*arguments)
        left.pop()
        if not left:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runlog.Report, "save_latest", save_and_stop)
        train.train(config)
    return out, config, train.plan(config, 0, 1)


@pytest.fixture
def unfinished(cut_run, tmp_path):
    """cut_run, in a folder of this test alone."""
    shutil.copytree(cut_run[0], tmp_path / "run")
    return tmp_path / "run", replace(cut_run[1], out=str(tmp_path / "run")), cut_run[2]


def latest(out, config, stages, bf16):
    pairs = stages[0].batches.pairs
    return checkpoint.latest(out, asdict(config), train.FREE, pairs, bf16)


def changed(path, **values):
    """A checkpoint with other values, or without those that are None."""
    state = torch.load(path, weights_only=True) | values
    torch.save({k: v for k, v in state.items() if v is not None}, path)


def rot(path):
    """Bytes of the tensors change: torch compares no checksum."""
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + b"\x3f" * 2**16 + content[middle + 2**16 :])
    torch.load(path, weights_only=True)


def poison(path):
    weights = torch.load(path, weights_only=True)["model"]
    weights["text_projection"][0, 0] = float("nan")
    changed(path, model=weights)


DAMAGE = {
    "rotten": rot, "not finite": poison, "no step": lambda path: changed(path, step=None),
    "bare": lambda path: changed(path, optimizers=None), "mask": lambda path: changed(path, mask=3),
    "seconds": lambda path: changed(path, seconds=[1.0]),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_torch_takes_for_whole_falls_back_too(unfinished, capsys, damage):
    out, config, stages = unfinished
    assert latest(out, config, stages, False)["step"] == 2
    DAMAGE[damage](out / "latest.pt")
    assert latest(out, config, stages, False)["step"] == 1
    told = capsys.readouterr().err
    assert "latest.pt: " in told and "going back to the checkpoint before" in told
    DAMAGE[damage](out / "previous.pt")
    with pytest.raises(InputError, match="no checkpoint in it is whole"):
        latest(out, config, stages, False)


def test_a_state_that_does_not_fit_is_told(unfinished):
    out, config, stages = unfinished
    good = latest(out, config, stages, False)
    model = train.first_model(config, stages[0].model, good)
    for wrong in ({"mask": {}}, {"optimizers": []}, {"optimizers": [1, 2]}):
        with pytest.raises(InputError, match=r"latest\.pt: its mask, heads or optimizers are not"):
            optimizers = train.make_optimizers(model, config)
            checkpoint.restore(good | wrong, stages[0].masker, False, model, optimizers)
    optimizers = train.make_optimizers(model, config)
    checkpoint.restore(good, stages[0].masker, False, model, optimizers)


def test_foreign_lines_and_html_do_not_come_along(unfinished, capsys):
    """The run goes on, counts what it left out of its own files, and shows nothing of it."""
    out, config, _ = unfinished
    good = (out / "log.jsonl").read_bytes()
    assert good.count(b"\n") == 1
    lines = (
        b"\xff\xfe", b"[1]", b"3", b'{"stage": "pretrain"}', b'{"stage": "x", "step": 1}',
        b"[" * 9**5, b'{"stage": "pretrain", "step": 1, "loss": "<script>"}',
        b'{"stage": "pretrain", "step"',
    )  # fmt: skip
    (out / "log.jsonl").write_bytes(b"\n".join(lines) + b"\n" + good)
    row = {"data": "a", "where": "b", "why": "c"}
    rows = [row, {"data": "a"}, ["a", "b", "c"], row | {"why": 3}]
    (out / "quarantine.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"data": "')
    (out / ".lock").write_text("process 1")  # of a run that was killed
    samples = torch.load(out / "latest.pt", weights_only=True)["pairs"]["pretrain"]
    samples[0] = ['"><script>', "", "<script>"]
    changed(out / "latest.pt", pairs={"pretrain": samples, "<script>": samples, "x": "<script>"})
    train.train(config)
    told = capsys.readouterr().out
    assert f"log.jsonl: {len(lines)} lines were no records" in told
    assert "quarantine.jsonl: 4 lines were no records" in told and "1 pictures could not be" in told
    assert (out / "log.jsonl").read_bytes().startswith(good)
    assert json.loads((out / "quarantine.jsonl").read_text()) == row
    text = (out / "report.html").read_text()
    assert "<script>" not in text and text.count("&lt;script&gt;") >= 3 and "tune" in text
    assert not (out / ".lock").exists()


def test_a_second_trainer_is_told_of_the_first(unfinished):
    out, config, _ = unfinished
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    has, child = multiprocessing.get_context("fork").Pipe()

    def hold():
        with files.locked(out, "training in"):
            child.send("held")
            time.sleep(600)

    other = multiprocessing.get_context("fork").Process(target=hold)
    other.start()
    try:
        assert has.recv() == "held"
        with pytest.raises(InputError, match=f"process {other.pid} on .* is training in it"):
            train.train(config)
    finally:
        other.kill()
        other.join()
    (out / ".lock").unlink()
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    with files.locked(out, "training in"):
        pass


def test_what_may_not_differ_is_told_by_name(unfinished):
    """Settings, the data, the kind of numbers; a folder that is not for this run."""
    out, config, stages = unfinished
    for other, words in (
        ({"lr": 0.5}, "its --lr was 0.002, not 0.5"), ({"mask": "random"}, "its --mask was"),
        ({"seed": 1}, "its --seed was 0, not 1"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            latest(out, replace(config, **other), stages, False)
    with pytest.raises(InputError, match="multiplies in fp32"):
        latest(out, config, stages, True)
    with pytest.raises(InputError, match="leave --resume out"):
        train.train(replace(config, resume="never"))
    changed(out / "latest.pt", data_stamp="other")
    with pytest.raises(InputError, match="the data have changed"):
        train.train(config)
    (out / "config.json").unlink()
    with pytest.raises(InputError, match="holds other files"):
        train.train(config)


def test_what_may_differ(unfinished, straight):
    """Workers, micro-batch, logging."""
    out, config, _ = unfinished
    train.train(replace(config, workers=1, micro_batch=7, recompute=True, save_every=4))
    one, two = (torch.load(run / "model.pt", weights_only=True)["model"] for run in (straight, out))
    # Muon makes matrices orthogonal in bf16: from another order of sums come differences of 1e-3
    assert all((one[k] - two[k]).norm() <= 3e-3 * one[k].norm() + 1e-5 for k in one)
    with pytest.raises(InputError, match="holds a finished run already"):
        train.train(config)


@pytest.fixture(scope="module")
def on_shards(tmp_path_factory):
    """(the flags of a run on shards, such a run that nothing happened to)."""
    folder = make_shards(tmp_path_factory.mktemp("on") / "shards", 4, 20)
    shards.build(str(folder), 1)
    flags = [*BASE, "--data", str(folder), "--workers", "2", "--tune-batch-size", "32",
             "--tune-epochs", "1"]  # fmt: skip
    finish(folder.parent / "straight", flags)
    return flags, folder.parent / "straight"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_workers_let_it(on_shards, tmp_path, number):
    flags, straight = on_shards
    out = tmp_path / "run"
    process = start(out, [*flags, "--save-every", "0", "--eval-every", "3"])
    wait_for_checkpoint(out, process)
    end(process, number)
    told = process.communicate(timeout=60)[0]
    assert process.returncode == cli.STOPPED, told[-2000:]
    assert "stopped after pretrain step" in told and "Traceback" not in told
    step = torch.load(out / "latest.pt", weights_only=True)["step"]
    assert f"stopped after pretrain step {step}," in told
    finish(out, [*flags, "--eval-every", "3"])
    one, two = (torch.load(run / "model.pt", weights_only=True)["model"]
                for run in (straight, out))  # fmt: skip
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.proof
def test_torchrun_restarts_what_died(tmp_path):
    """A worker is killed; all start again from the checkpoint. Then a stop by signal, on all."""
    finish(tmp_path / "straight", BASE, TORCHRUN)
    out = tmp_path / "run"
    process = start(out, BASE, (*TORCHRUN, "--max-restarts", "3"))
    wait_for_checkpoint(out, process)
    workers = [int(p) for p in children(process.pid) if "train.py" in command_of(p)]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    told = process.communicate(timeout=200)[0]
    assert process.returncode == 0 and "resuming after pretrain step" in told, told[-3000:]
    assert differences(tmp_path / "straight", out) == []
    out = tmp_path / "stopped"
    process = start(out, [*BASE, "--steps", "4000"], TORCHRUN)
    wait_for_checkpoint(out, process)
    for pid in children(process.pid):  # one rank alone hears it; both must stop at one step
        if "train.py" in command_of(pid):
            os.kill(int(pid), signal.SIGTERM)
            break
    told = process.communicate(timeout=100)[0]
    assert told.count("stopped after pretrain step") == 1, told[-3000:]


def children(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return found.stdout.split()


def command_of(pid):
    path = Path(f"/proc/{pid}/cmdline")
    return path.read_bytes().decode().replace("\0", " ") if path.exists() else ""


@pytest.mark.proof
def test_two_nodes_are_one_run(tmp_path):
    """Two agents on loopback, one process each: the same bits as two processes of one node."""
    finish(tmp_path / "one", BASE, TORCHRUN)
    port = 20_000 + os.getpid() % 20_000
    agents = [
        start(tmp_path / "two", BASE, (
            "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(node),
            "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", str(port),
        )) for node in (0, 1)
    ]  # fmt: skip
    told = [agent.communicate(timeout=200)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], told
    assert differences(tmp_path / "one", tmp_path / "two") == []


POISON = """
import os, sys, train
from nanoglip.sources.order import Batches
original = Batches.__getitem__
def poisoned(self, step):
    batch = original(self, step)
    images = batch.images.float() / 255
    if step == 3 and self.rank == {rank}:
        images[0] = float("nan")
    return batch._replace(images=images)
Batches.__getitem__ = poisoned
train.main()
"""


@pytest.mark.parametrize(("world", "optimizer"), [(1, "adamw"), (2, "muon"), (2, "adamw")])
def test_poison_on_one_rank_harms_none(tmp_path, world, optimizer):
    """The update is skipped everywhere, all stop, and the batch is written down."""
    (tmp_path / "poison.py").write_text(POISON.format(rank=world - 1))
    launch = TORCHRUN if world > 1 else ()
    words = [*BASE, "--log-every", "4", "--optimizer", optimizer, "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, *launch, str(tmp_path / "poison.py"), *words], capture_output=True,
        text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=200,
    )  # fmt: skip
    assert done.returncode != 0 and "not finite at pretrain step 4" in done.stderr
    found = json.loads((tmp_path / "run/bad-batch.json").read_text())
    assert found["step"] == 4 and len(found["pictures"]) == 32
    state = torch.load(tmp_path / "run/latest.pt", weights_only=True)
    assert all(w.isfinite().all() for w in state["model"].values())
    skipped = torch.load(tmp_path / "run/previous.pt", weights_only=True)
    assert state["step"] >= 3 and skipped["step"] >= 2


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", str(small)])
    if mounted.returncode:
        pytest.skip("no right to mount a small disk here")
    try:
        process = start(small / "run", [*BASE, "--steps", "2000"])
        wait_for_checkpoint(small / "run", process)
        (small / "filler").write_bytes(bytes(2**20))
        with open(small / "filler", "ab") as file:
            try:
                while process.poll() is None:
                    file.write(bytes(2**20))
                    file.flush()
            except OSError:
                pass
        told = process.communicate(timeout=60)[0]
        assert process.returncode == 2 and "No space left" in told, told[-2000:]
        assert "Traceback" not in told
        (small / "filler").unlink()
        whole = [name for name in ("latest.pt", "previous.pt") if (small / "run" / name).exists()]
        assert torch.load(small / "run" / whole[0], weights_only=True)["step"] >= 1
        process = start(small / "run", [*BASE, "--steps", "2000"])
        wait_for_checkpoint(small / "run", process)
        end(process, signal.SIGTERM)
        assert "resuming after" in process.communicate(timeout=60)[0]
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
