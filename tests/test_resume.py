"""A run that is killed, stopped, poisoned or moved ends as an uninterrupted one."""

import errno
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_leaves

import glip
import train
from glip import InputError
from nanoglip import checkpoint, cli, files, runlog
from nanoglip.config import parse
from nanoglip.sources import shards
from tests.processes import ROOT
from tests.test_shards import make_shards
from tests.torture import (
    BASE,
    MOMENTS,
    die,
    differences,
    finish,
    poison,
    start,
    stop,
    tiny,
    wait_for_checkpoint,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_model")]

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An uninterrupted run."""
    return train.train(parse([*BASE, "--out", str(tmp_path_factory.mktemp("straight") / "run")]))


def same_weights(a, b):
    one, two = (torch.load(run / "model.pt", weights_only=True)["model"] for run in (a, b))
    return all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_killed_at_the_worst_moments_ends_as_the_straight_run(tmp_path, straight):
    """Between the renames there is no latest.pt, and behind a line the log is ahead of it."""
    out = tmp_path / "run"
    for count, moment in enumerate(MOMENTS, 2):
        code, printed = start(out, BASE, before=partial(die, moment, count)).finish()
        assert code == -signal.SIGKILL, printed[-3000:]
        assert not (out / "model.pt").exists()
        if moment == MOMENTS[0]:
            assert [path.suffix for path in out.glob("*.tmp")] == [".tmp"]
        assert (out / "latest.pt").exists() == (moment != MOMENTS[1])
    printed = finish(out, BASE, before=tiny)
    assert "resuming after" in printed
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


def test_a_torn_checkpoint_falls_back_to_the_one_before(unfinished, straight, capsys):
    out, config, _ = unfinished
    (out / "latest.pt.1.tmp").write_bytes(b"of a run that was killed while it wrote")
    content = (out / "latest.pt").read_bytes()
    (out / "latest.pt").write_bytes(content[: len(content) // 2])
    train.train(config)
    printed = "".join(capsys.readouterr())
    assert "latest.pt: not a whole checkpoint of nanoGLIP" in printed and "going back" in printed
    assert differences(straight, out) == [] and not list(out.glob("*.tmp"))


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


def spoil(path):
    weights = torch.load(path, weights_only=True)["model"]
    weights["text_projection"][0, 0] = float("nan")
    changed(path, model=weights)


DAMAGE = {
    "rotten": rot, "not finite": spoil, "no step": lambda path: changed(path, step=None),
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
    with pytest.raises(InputError, match="every checkpoint in it is damaged"):
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
    assert f"log.jsonl: lines left out, as they hold no record: {len(lines)}\n" in told
    assert "quarantine.jsonl: lines left out" in told and "\n1 picture could not be" in told
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
    assert all((one[k] - two[k]).norm() <= 3e-3 * one[k].norm() + 1e-4 for k in one)
    with pytest.raises(InputError, match="holds a finished run already"):
        train.train(config)


@pytest.mark.parametrize("flags", [
    ["--mask", "gaze", "--mask-ratio", "0.8", "0.4"], ["--mask", "gaze", "--micro-batch", "9"],
    ["--mask", "cluster", "--embedding-weight", "1"],
], ids=lambda flags: "-".join(flags).replace("--", ""))  # fmt: skip
def test_what_a_mask_has_found_is_resumed(tmp_path, monkeypatch, flags):
    """A run that is cut after its third step ends with the weights and the mask of a whole one."""
    config = parse([*BASE, *flags, "--tune-epochs", "0", "--save-every", "3"])
    whole, cut = (replace(config, out=str(tmp_path / name)) for name in ("whole", "cut"))
    train.train(whole)

    def ended(self, model, step):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runlog.Report, "write_page", ended)
        train.train(cut)
    assert glip.load_checkpoint(tmp_path / "cut/latest.pt")["step"] == 3
    train.train(cut)
    one, two = (glip.load_checkpoint(tmp_path / f"{name}/model.pt") for name in ("whole", "cut"))
    for a, b in zip(*(tree_leaves([x["model"], x["mask"]]) for x in (one, two)), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture(scope="module")
def on_shards(tmp_path_factory):
    """(the flags of a run on shards, such a run, uninterrupted and without data workers)."""
    folder = make_shards(tmp_path_factory.mktemp("on") / "shards", 4, 20)
    shards.build(str(folder), 1)
    flags = [*BASE, "--data", str(folder), "--tune-batch-size", "32", "--tune-epochs", "1",
             "--eval-every", "3"]  # fmt: skip
    out = str(folder.parent / "straight")
    return flags, train.train(parse([*flags, "--workers", "0", "--out", out]))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_workers_let_it(on_shards, tmp_path, number):
    flags, straight = on_shards
    out, flags = tmp_path / "run", [*flags, "--workers", "2", "--save-every", "0"]
    code, printed = start(out, flags, before=partial(stop, number, 5)).finish()
    assert code == cli.STOPPED, printed[-2000:]
    assert "stopped after pretrain step 6," in printed and "Traceback" not in printed
    assert torch.load(out / "latest.pt", weights_only=True)["step"] == 6
    assert "resuming after pretrain step 6" in finish(out, flags, before=tiny)
    assert same_weights(straight, out)


@pytest.mark.parametrize(("world", "optimizer"), [
    (1, "adamw"), (2, "muon"), pytest.param(2, "adamw", marks=pytest.mark.proof),
])  # fmt: skip
def test_poison_on_one_rank_harms_none(tmp_path, world, optimizer):
    """The update is skipped everywhere, all stop, and the batch is written down."""
    out, words = tmp_path / "run", [*BASE, "--log-every", "4", "--optimizer", optimizer]
    code, printed = start(out, words, world=world, before=partial(poison, world - 1, 3)).finish()
    assert code != 0 and printed.count("not finite at pretrain step 4") == 1, printed[-3000:]
    found = json.loads((out / "bad-batch.json").read_text())
    assert found["step"] == 4 and len(found["pictures"]) == 32
    for name, step in (("latest.pt", 3), ("previous.pt", 2)):
        state = torch.load(out / name, weights_only=True)
        assert state["step"] == step and all(w.isfinite().all() for w in state["model"].values())


def test_a_full_disk_leaves_the_checkpoint_before(unfinished, straight, monkeypatch, capsys):
    """The disk is full in the middle of a file: one sentence, and there is room again."""
    out, config, _ = unfinished
    before = {name: (out / name).read_bytes() for name in ("latest.pt", "previous.pt")}

    def full(content, file, **how):
        file.write(b"the beginning of a file")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        patch.setattr(sys, "argv", ["train.py", *BASE, "--out", str(out)])
        with pytest.raises(SystemExit) as stopped:
            train.main()
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and "No space left" in printed and "Traceback" not in printed
    assert before == {name: (out / name).read_bytes() for name in before}
    train.train(config)
    assert differences(straight, out) == [] and not list(out.glob("*.tmp"))


# --- real launchers, a real small disk ------------------------------------------------------------


def agent(out, *words):
    """torchrun's own process, with training flags BASE."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *words, "--out", str(out)], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def workers_of(process):
    """The process numbers of what an agent has started."""
    listed = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True
    )
    return [int(row.split()[0]) for row in listed.stdout.splitlines() if "train.py" in row]


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_two_nodes_that_meet_at_an_address_give_the_run_of_one_process(tmp_path):
    """Two torchruns of one process each, by c10d, on this machine: weights and losses."""
    words = [*BASE, "--optimizer", "adamw"]
    meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}"]
    nodes = [
        agent(tmp_path / "two", "--nnodes", "2", "--nproc_per_node", "1", *meeting, "--rdzv_id",
              "7", "train.py", *words) for _ in range(2)
    ]  # fmt: skip
    finish(tmp_path / "one", words)
    printed = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed
    one, two = (torch.load(tmp_path / name / "model.pt", weights_only=True) for name in
                ("one", "two"))  # fmt: skip
    assert (one["world"], two["world"]) == (1, 2) and "--nnodes 2" in two["command"]
    for name, weight in one["model"].items():
        assert (two["model"][name] - weight).norm() <= 1e-3 * weight.norm() + 1e-5, name
    logs = [map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines())
            for name in ("one", "two")]  # fmt: skip
    losses = [[record["loss"] for record in log if "loss" in record] for log in logs]
    assert len(losses[0]) == 5 and losses[1] == pytest.approx(losses[0], abs=1e-4)


SLURM = {  # its commands, on one machine
    "srun": 'exec "$@"',
    "scontrol": 'if [ $1 = show ]; then echo 127.0.0.1; else echo "$@" >> requeued; fi',
}


@pytest.fixture
def batch(tmp_path):
    """A function that starts the docs' batch script, with short training or another command."""
    (tmp_path / "bin").mkdir()
    text = (ROOT / "docs/training.md").read_text()
    script = re.search(r"```bash\n(.*?)```", text, re.DOTALL)[1]
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
                   "OMP_NUM_THREADS": "1", "SLURM_NNODES": "1", "SLURM_JOB_ID": "42",
                   "SLURM_JOB_NODELIST": "node[1-2]"}  # fmt: skip

    def start(torchrun=f'exec {sys.executable} -m torch.distributed.run "$@"'):
        ours = script
        for old, new in (
            ("--nproc_per_node 8", "--nproc_per_node 2"), ("29500", str(free_port())),
            ("--recipe cc12m --data cc12m", shlex.join([*BASE, "--steps", "4000"])),
            ("train.py", str(ROOT / "train.py")),
        ):  # fmt: skip
            assert ours.count(old) == 1
            ours = ours.replace(old, new)
        (tmp_path / "job.sh").write_text(ours)
        for name, line in (SLURM | {"torchrun": torchrun}).items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{line}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        return subprocess.Popen(
            ["bash", "job.sh"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    return start


def test_the_batch_script_of_the_docs_stops_in_time_and_is_put_back(batch, tmp_path):
    """A run that was asked to stop and saved; not one that failed, or that left no checkpoint."""
    out, told = tmp_path / "runs/cc12m", tmp_path / "requeued"
    job = batch("exit 2")
    assert job.wait(60) == 2 and not told.exists()
    job = batch("sleep 0.5; touch begun; exec sleep 60")  # and no checkpoint was written
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait(60) == 128 + signal.SIGTERM and not told.exists()
    job = batch()
    wait_for_checkpoint(out, job)
    os.kill(job.pid, signal.SIGTERM)
    printed = job.communicate(timeout=200)[0]
    assert printed.count("the same command goes on") == 1, printed[-3000:]
    assert job.returncode == 1 and told.read_text() == "requeue 42\n"
    assert (out / "latest.pt").exists() and not (out / "model.pt").exists()


@pytest.mark.proof
def test_torchrun_restarts_what_died(tmp_path):
    """A worker is killed; all start again from the checkpoint. Then a stop by signal, on all."""
    words = ["--standalone", "--nproc_per_node", "2", "--max-restarts", "3", "train.py", *BASE]
    assert agent(tmp_path / "straight", *words).wait(300) == 0
    out = tmp_path / "run"
    process = agent(out, *words)
    wait_for_checkpoint(out, process)
    workers = workers_of(process)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    printed = process.communicate(timeout=200)[0]
    assert process.returncode == 0 and "resuming after pretrain step" in printed, printed[-3000:]
    assert printed.count("failed (exitcode:") == 1, printed[-3000:]  # the first restart succeeds
    assert differences(tmp_path / "straight", out) == []
    out = tmp_path / "stopped"
    process = agent(out, *words[:3], *words[5:], "--steps", "4000")  # without restarts
    wait_for_checkpoint(out, process)
    os.kill(workers_of(process)[0], signal.SIGTERM)  # one rank; both must stop at one step
    printed = process.communicate(timeout=100)[0]
    assert printed.count("stopped after pretrain step") == 1, printed[-3000:]


@pytest.mark.proof
def test_two_nodes_are_one_run(tmp_path):
    """Two agents on loopback, one process each: the same bits as two processes of one node."""
    finish(tmp_path / "one", BASE, world=2)
    port = 20_000 + os.getpid() % 20_000
    agents = [
        agent(
            tmp_path / "two", "--nnodes", "2", "--node_rank", str(node), "--nproc_per_node", "1",
            "--master_addr", "127.0.0.1", "--master_port", str(port), "train.py", *BASE,
        ) for node in (0, 1)
    ]  # fmt: skip
    printed = [agent.communicate(timeout=200)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], printed
    assert differences(tmp_path / "one", tmp_path / "two") == []


@pytest.mark.proof
def test_a_small_disk_fills(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", str(small)])
    if mounted.returncode:
        pytest.skip("no right to mount a small disk here")
    out, flags = small / "run", [*BASE, "--steps", "2000"]
    try:
        run = start(out, flags, log=tmp_path / "log.txt")
        wait_for_checkpoint(out, run)
        with open(small / "filler", "wb") as file:
            try:
                while run.running():
                    file.write(bytes(2**20))
                    file.flush()
            except OSError:
                pass
        code, printed = run.finish(60)
        assert code == 2 and "No space left" in printed, printed[-2000:]
        assert "Traceback" not in printed
        (small / "filler").unlink()
        run = start(out, flags, log=tmp_path / "again.txt")
        wait_for_checkpoint(out, run)
        run.signal(signal.SIGTERM)
        assert "resuming after" in run.finish()[1]
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
