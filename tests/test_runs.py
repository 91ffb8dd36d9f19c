"""Shared state, the page, other logs, the self-test and the estimate."""

import base64
import html.parser
import io
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import accumulate, pairwise
from types import SimpleNamespace

import open_clip
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import glip
import train
from glip import GLIP, GLIPConfig, InputError
from nanoglip import aclip, estimate, losses, page, results, runlog
from nanoglip.cli import STOPPED
from nanoglip.config import TrainConfig, check, parse
from nanoglip.machine import cores
from nanoglip.sources.pictures import Pictures
from tests import against_open_clip
from tests.processes import ROOT
from tests.torture import BASE, TINY, start, stop
from tools import tables

pytestmark = pytest.mark.slow  # it trains, kills or fetches

ADAMW = [*BASE, "--optimizer", "adamw", "--clip-grad-norm", "0.5"]


def test_a_divided_run_is_the_same_run_and_goes_on_undivided(tmp_path, monkeypatch):
    """FSDP2 on two processes, stopped, and resumed by one process that holds everything."""
    monkeypatch.setitem(glip.SIZES, TrainConfig().model, TINY)
    out = tmp_path / "run"
    train.train(parse([*ADAMW, "--out", str(tmp_path / "one")]))
    flags = [*ADAMW, "--save-every", "5"]
    code, printed = start(
        out, [*flags, "--shard"], world=2, before=partial(stop, signal.SIGTERM, 5)
    ).finish()
    assert code == STOPPED, printed[-3000:]
    assert torch.load(out / "latest.pt", weights_only=True)["world"] == 2
    train.train(parse([*flags, "--out", str(out)]))
    losses = [
        [r["loss"] for r in map(json.loads, (run / "log.jsonl").read_text().splitlines())
         if "loss" in r] for run in (tmp_path / "one", out)
    ]  # fmt: skip
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    one, two = (torch.load(run / "model.pt", weights_only=True)["model"]
                for run in (tmp_path / "one", out))  # fmt: skip
    assert all((one[k] - two[k]).norm() <= 1e-3 * one[k].norm() + 1e-5 for k in one)


@pytest.mark.parametrize(
    ("flags", "world", "words"),
    [
        (["--optimizer", "adamw"], 1, "start them with torchrun"),
        ([], 2, "--optimizer adamw"),
        (["--optimizer", "adamw", "--mask", "attentive"], 2, "which --shard divides"),
    ],
)
def test_what_cannot_be_divided_is_refused(flags, world, words):
    with pytest.raises(InputError, match=words):
        check(parse(["--shard", *flags]), world)


class Tags(html.parser.HTMLParser):
    """Every tag's name and attributes."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_page_tells_the_run_and_needs_nothing_else(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setitem(glip.SIZES, TrainConfig().model, TINY)
    words = [*BASE, "--tensorboard", "--eval-every", "4", "--out", str(tmp_path / "a <b>")]
    train.train(parse(words))
    text = (tmp_path / "a <b>/report.html").read_text()
    tags = Tags()
    tags.feed(text)
    for tag, attributes in tags.found:
        assert tag not in ("script", "link", "iframe")
        assert not attributes.get("src", "data:").startswith(("http", "/", "."))
    assert "http:" not in text and "<h1>a &lt;b&gt;</h1>" in text and "tune, step 1 of 1" in text
    records = [json.loads(x) for x in (tmp_path / "a <b>/log.jsonl").read_text().splitlines()]
    losses = [r for r in records if "loss" in r]
    curves, *pictures = [a["src"].partition(",")[2] for t, a in tags.found if t == "img"]
    assert len(pictures) == 2 * 2 * 12  # both stages, the picture and what was seen of it
    assert Image.open(io.BytesIO(base64.b64decode(curves))).width > 800
    sizes = {Image.open(io.BytesIO(base64.b64decode(p))).size for p in pictures}
    assert sizes == {(16, 16)}
    events = EventAccumulator(str(tmp_path / "a <b>/tensorboard"))
    events.Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([r["loss"] for r in losses])
    assert [e.step for e in events.Scalars("loss")][-1] == 8 + 1


@pytest.fixture
def cut_and_resumed(tmp_path, monkeypatch):
    """A function that trains with flags, is cut behind a checkpoint, and goes on; (run, losses)."""
    monkeypatch.setitem(glip.SIZES, TrainConfig().model, TINY)
    save = runlog.Report.save_latest

    def cut(report, model, done):
        save(report, model, done)
        if done == 4:
            raise KeyboardInterrupt

    def run(*flags):
        config = parse([*BASE, *flags, "--out", str(tmp_path / "run")])
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(runlog.Report, "save_latest", cut)
            train.train(config)
        out = train.train(config)
        records = map(json.loads, (out / "log.jsonl").read_text().splitlines())
        return out, [record["loss"] for record in records if "loss" in record]

    return run


def test_wandb_goes_on_in_one_run_and_changes_no_weight(cut_and_resumed, tmp_path, monkeypatch):
    """Offline: both parts have one name, and between them every loss of log.jsonl."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    out, losses = cut_and_resumed("--wandb")
    name = (out / "wandb/id").read_text()
    files = sorted(out.glob(f"wandb/offline-run-*-{name}/run-{name}.wandb"))
    assert len(files) == len(list(out.glob("wandb/offline-run-*"))) == 2
    first, second = (file.read_bytes() for file in files)
    assert len(losses) == 5 and losses[4] != losses[0]
    for place, loss in enumerate(losses):
        assert json.dumps(loss).encode() in (first if place < 2 else second)
    assert b"nanoglip" in first and b"batch_size" in first
    train.train(parse([*BASE, "--out", str(tmp_path / "straight")]))
    one, two = (torch.load(run / "model.pt", weights_only=True)["model"]
                for run in (out, tmp_path / "straight"))  # fmt: skip
    assert all(torch.equal(one[key], two[key]) for key in one)


TRACKIO = """
import json
class Run:
    def __init__(self, **how):
        self.put(how)
    def log(self, metrics, step=None):
        self.put([metrics, step])
    def finish(self):
        self.put("finished")
    def put(self, what):
        with open({file!r}, "a") as file:
            print(json.dumps(what), file=file)
def init(project, name=None, config=None, resume="never"):
    if {fails}:
        raise ValueError("no room\\nto write")
    return Run(project=project, name=name, resume=resume, steps=config["steps"])
"""


def trackio(folder, monkeypatch, fails=False):
    """Put a small module in trackio's place; the file to which it writes what it is told."""
    (folder / "trackio.py").write_text(TRACKIO.format(file=str(folder / "told"), fails=fails))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setitem(sys.modules, "trackio", None)  # what is imported ends with the test
    del sys.modules["trackio"]
    return folder / "told"


def test_trackio_goes_on_in_one_run(cut_and_resumed, tmp_path, monkeypatch):
    told = trackio(tmp_path, monkeypatch)
    _, losses = cut_and_resumed("--trackio")
    begun, *rest = map(json.loads, told.read_text().splitlines())
    assert begun == {"project": "nanoglip", "name": "run", "resume": "never", "steps": 8}
    place = rest.index("finished")
    assert rest[place + 1] == begun | {"resume": "allow"} and rest[-1] == "finished"
    logged = [row for row in rest if isinstance(row, list) and "loss" in row[0]]
    assert [step for _, step in logged] == [2, 4, 6, 8, 9]
    assert [numbers["loss"] for numbers, _ in logged] == losses
    evaluated = [row for row in rest if isinstance(row, list) and "loss" not in row[0]]
    assert [step for _, step in evaluated] == [8, 9]
    assert {type(x) for row, _ in logged + evaluated for x in row.values()} <= {int, float}


def test_a_log_that_does_not_open_is_one_sentence(tmp_path, monkeypatch):
    """Missing, hidden behind a folder of that name, or unwilling; nothing is trained."""
    for name in runlog.LOGS:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(InputError, match=f"--{name} needs a package: pip install {name}$"):
                check(parse([f"--{name}"]), 1)
    (tmp_path / "path/trackio").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "path")
    with pytest.raises(InputError, match="pip install trackio"):
        check(parse(["--trackio"]), 1)
    trackio(tmp_path, monkeypatch, fails=True)
    monkeypatch.setitem(glip.SIZES, TrainConfig().model, TINY)
    with pytest.raises(InputError, match=r"--trackio does not start \(no room\): repair that, or"):
        train.train(parse([*BASE, "--trackio", "--out", str(tmp_path / "run")]))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.json", "log.jsonl"}


def test_the_page_shows_what_a_mask_leaves():
    images = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    tokens, keep = glip.tokenize(["a <red> apple"]), torch.tensor([[1, 2]])
    rows = page.samples(images, tokens, (keep, torch.tensor([[True, False]])), (2, 2))
    text = "".join(page.shown(pngs, words) for *pngs, words in rows)
    shown = [base64.b64decode(x) for x in re.findall(r'base64,([^"]+)"', text)]
    full, part = (torch.tensor(list(Image.open(io.BytesIO(x)).get_flattened_data()))
                  for x in shown)  # fmt: skip
    full, part = (x.view(16, 16, 3).permute(2, 0, 1) for x in (full, part))
    assert torch.equal(full, images[0].long())
    assert torch.equal(part[:, :8, 8:], full[:, :8, 8:])
    assert (part[:, 8:] == 128).all() and (part[:, :8, :8] == 128).all()
    assert "a &lt; red &gt; apple" in text


SMALL = ["--image-size", "16", "--precision", "fp32"]


def test_a_batch_is_learned_by_heart_or_the_fault_is_named(capsys, monkeypatch):
    monkeypatch.setitem(glip.SIZES, TrainConfig().model, (16, 8, 64, 1, 1, 32, 64, 1, 1))
    train.overfit(parse(["--overfit", "16", *SMALL]))
    assert "16 pairs are overfitted on cpu" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"still that of guessing \(ln batch 2.08\): raise --lr"):
        train.overfit(parse(["--overfit", "8", "--lr", "1e-9", "--steps", "30", *SMALL]))
    with pytest.raises(InputError, match=r"look alike|not finite|too slowly|of guessing"):
        train.overfit(parse(["--overfit", "8", "--lr", "30", "--steps", "40", *SMALL]))


@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-B-32", "ViT-L-14", "ViT-S-16"])
def test_the_estimate_counts_as_torch_does(name):
    """Parameters, products and what is kept for the backward pass, on no device at all."""
    config = GLIPConfig.named(name)
    learned = estimate.parameters(config)
    with torch.device("meta"):
        model, theirs = GLIP(config), open_clip.CLIP(**open_clip.get_model_config(name))
        assert learned["image"] + learned["text"] == sum(p.numel() for p in theirs.parameters())
        kept, text, batch = 98 if "16" in name else 40, 32, 2
        images = torch.zeros(batch, 3, 224, 224)
        ids = torch.zeros(batch, kept, dtype=torch.long)
    tokens = torch.zeros(batch, text, dtype=torch.long)  # on the CPU, where they are packed
    tokens[:, -1] = glip.END
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    saved = {}

    def keep(x):
        if x.untyped_storage()._cdata not in weights:
            saved[x.untyped_storage()._cdata] = x
        return x

    with FlopCounterMode(display=False) as forward, torch.autograd.graph.saved_tensors_hooks(
        keep, lambda x: x
    ):
        features = model(images, tokens, ids)[:2]
    wanted = sum(estimate.forward_flops(config, kept, text)) * batch
    assert wanted == pytest.approx(forward.get_total_flops(), rel=1e-3)
    with FlopCounterMode(display=False) as both:
        torch.stack([x.sum() for x in model(images, tokens, ids)[:2]]).sum().backward()
    assert 3 * wanted == pytest.approx(both.get_total_flops(), rel=0.02)
    held = sum(x.untyped_storage().nbytes() for x in saved.values()) / batch
    expected = estimate.tower_bytes(
        1 + kept, config.width, config.layers, config.heads, False, False
    ) + estimate.tower_bytes(
        text, config.text_width, config.text_layers, config.text_heads, False, False
    )
    assert expected == pytest.approx(held, rel=0.03) and len(features) == 2


def test_the_estimate_follows_the_settings():
    def told(*flags):
        text = estimate.tell(parse(["--recipe", "cc12m", "--estimate", *flags]), [])
        numbers = r"([\d.e+]+) GB a device.*? ([\d.e+]+) s \(products.*? in all ([\d.e+]+) hours"
        return [float(x) for x in re.search(numbers, text.replace("\n", " ")).groups()]

    memory, step, hours = told("h100")
    for flags in (["--mask-ratio", "0.75"], ["--mask", "none"], ["--precision", "fp32"]):
        changed = told("h100", *flags)
        more = flags[0] != "--mask-ratio"
        assert all((new > old) == more for new, old in zip(changed, (memory, step, hours)))
    assert told("h100", "--micro-batch", "64")[0] < memory / 2
    assert told("h100", "--recompute")[0] < memory / 2
    assert told("h100x8")[2] == pytest.approx(hours / 8, rel=0.2)
    for name in estimate.GPUS:
        assert estimate.named(name, "auto", 768).count == 1
        rates = {estimate.named(text, "bf16", 768).products for text in (name, f"{name}x16")}
        assert len(rates) == 1
    assert told("h100x8", "--mask", "cluster")[1] > told("h100x8")[1]  # computes more than it shows
    for wrong in ("h100x0", "abacus", "x8", "h100x"):
        with pytest.raises(InputError, match="choose here, or one of"):
            told(wrong)
    with pytest.raises(InputError, match="give --data, or a recipe whose data are known"):
        config = parse(["--estimate", "h100", "--epochs", "3"])
        estimate.tell(config, [])


@pytest.mark.parametrize("loss", losses.LOSSES)
def test_the_loss_is_counted_as_torch_does(loss):
    """Its products, and how many bytes of logits exist at the highest."""
    batch, width = 256, 16
    features = [torch.randn(batch, width, requires_grad=True) for _ in range(2)]
    learned = [torch.tensor(x, requires_grad=True) for x in (10.0, -10.0)]
    with FlopCounterMode(display=False) as flops, torch.profiler.profile(profile_memory=True) as p:
        losses.contrastive_loss(loss, *features, *learned).backward()
    wanted = batch * estimate.loss_flops(loss, batch, width)
    assert flops.get_total_flops() == wanted
    now = list(accumulate(event.self_cpu_memory_usage for event in p.events()))
    assert max(now) == pytest.approx(losses.LOGIT_BYTES * batch**2, rel=0.3)
    views = [torch.randn(batch, aclip.OUT, requires_grad=True) for _ in range(2)]
    with FlopCounterMode(display=False) as flops:
        aclip.simclr_loss(*views).backward()
    both = batch * estimate.loss_flops(loss, batch, width, views=2)
    assert both == 2 * wanted + flops.get_total_flops()


def test_the_loss_costs_what_fp32_does():
    seconds = [estimate.of_run(parse(["--recipe", "flip", "--estimate", "h100x8",
                                            "--precision", precision]), [])[1][0]["seconds"]
               for precision in ("bf16", "fp32")]  # fmt: skip
    assert seconds[0]["loss"] == seconds[1]["loss"] > 0
    assert seconds[0]["products"] < seconds[1]["products"] / 10


def test_a_gpu_computes_the_loss_in_large_parts():
    """A CPU's parts follow from the settings alone: its bits are the same on every machine."""
    assert losses.rows_at_once(64, 65_536, 80e9) > 512
    for memory in (24e9, 80e9, 141e9):
        for everybody in (512, 65_536, 2**24):
            rows = losses.rows_at_once(64, everybody, memory)
            assert rows == 1 or losses.LOGIT_BYTES * rows * everybody < memory / 50
    assert [losses.rows_at_once(64, n, 0) for n in (512, 2**17, 2**23)] == [64, 32, 1]


def test_the_estimate_names_cores_and_disk_and_that_no_gpu_ran():
    told = estimate.tell(parse(["--recipe", "cc12m", "--estimate", "h100x8"]), [])
    rate, cores = re.search(r"reader: ([\d,]+) pairs a second need ([\d.]+) CPU", told).groups()
    ours = results.load("bench")["data"]["pictures_per_second"]["ours"]
    assert float(cores) == pytest.approx(int(rate.replace(",", "")) / ours, rel=0.01)
    learned = estimate.parameters(GLIPConfig.named("ViT-B-16"))
    disk = float(re.search(r"disk: ([\d.]+) GB of checkpoints", told)[1]) * 1e9
    assert disk == pytest.approx(40 * (learned["image"] + learned["text"]), rel=0.01)
    assert "987 GB of shards" in told  # the snapshot's, which the recipe trains on
    speed = float(re.search(r"([\d.]+) GB/s of disk, 90 KB a pair", told)[1])
    assert speed == pytest.approx(int(rate.replace(",", "")) * 90e3 / 1e9, rel=0.05)
    times = [estimate.duration(hours) for hours in (5e-5, 0.03, 0.5, 1.99, 2.064, 400)]
    assert times == ["0.18 s", "108 s", "30 minutes", "119 minutes", "2.06 hours", "400 hours"]
    assert "not verified: no GPU has run this" in told
    hours = re.search("in all (.*) hours,", told)[1]
    assert f"| {float(hours):.1f} |" in tables.paper_hours()  # the README's, from the same source
    told = estimate.tell(parse(["--estimate", "h100", "--tune-epochs", "0"]), [])
    assert "reader" not in told and "shards" not in told


def test_the_estimate_says_how_many_workers_read(monkeypatch):
    told = estimate.tell(parse(["--recipe", "cc12m", "--estimate", "h100x8"]), [])
    cores, workers = re.search(r"need ([\d.]+) CPU.*: --workers (\d+) for each", told).groups()
    assert int(workers) == math.ceil(float(cores) / 8) and "here are" not in told
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(24), raising=False)
    for flags, taken in (((), 8), (("--workers", "3"), 3)):
        told = estimate.tell(parse(["--recipe", "cc12m", "--estimate", "here", *flags]), [])
        assert f": --workers 1; here are 24 cores, and train.py takes {taken}\n" in told


def test_cores_are_those_that_a_job_may_use(monkeypatch):
    """A job's share of a node by its affinity; where the system has none, all; of each process."""
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(24), raising=False)
    assert cores() == 24
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores() == 16


@pytest.fixture
def on_files(tmp_path, small_model, monkeypatch):
    """A function that trains on files, with flags, and returns what was said of the reader."""
    for i in range(40):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"red {i}")
    monkeypatch.setattr(runlog, "MINUTE", 1e-3)

    def trained(capsys, *flags):
        run = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        train.train(parse([
            "--data", str(tmp_path), "--batch-size", "16", "--image-size", "32", "--steps", "8",
            "--warmup", "1", "--log-every", "2", "--eval-every", "1000", "--tune-epochs", "0",
            "--optimizer", "adamw", "--precision", "fp32", "--out", str(run), *flags,
        ]))  # fmt: skip
        said = re.findall("^reader: .*", capsys.readouterr().out, re.MULTILINE)
        records = map(json.loads, (run / "log.jsonl").read_text().splitlines())
        return said, [record["data_wait"] for record in records if "data_wait" in record][-1]

    return trained


def asleep(seconds):
    time.sleep(seconds)


def computing(seconds):
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


@pytest.mark.parametrize(("slowly", "workers", "cores", "remedy"), [
    (asleep, 0, 2, "copy the data to a local disk, or give more --workers"),
    (computing, 0, 9, "give --workers [3-9], or store pictures of 256 pixels"),
    (computing, 1, 1, "store pictures of 256 pixels"),
])  # fmt: skip
def test_a_run_that_waits_for_data_says_so_and_what_to_do(
    slowly, workers, cores, remedy, on_files, monkeypatch, capsys
):  # fmt: skip
    encoded = Pictures.encoded
    monkeypatch.setattr(Pictures, "encoded", lambda s, ids: slowly(0.2) or encoded(s, ids))
    monkeypatch.setattr(runlog, "cores", lambda: cores)
    (demand, waiting), share = on_files(capsys, "--workers", str(workers))
    assert share > 0.5
    rate, wants, has = re.search(
        r"([\d,]+) pairs a second in each process want ([\d.e+-]+) cores; it has (\d) w", demand
    ).groups()  # fmt: skip
    assert int(has) == workers and int(rate.replace(",", "")) > 16 / 0.2
    assert (float(wants) > 0.8) == (slowly is computing)
    assert re.search(rf"[5-9]\d% of the last \d s went by waiting for data: {remedy} \(", waiting)


def test_waiting_is_told_once_above_a_tenth_of_a_minute_and_not_at_the_start(monkeypatch):
    """Records of (step, seconds, seconds waited, seconds of cores), batches of 20 pairs."""
    report, said = object.__new__(runlog.Report), []
    report.config, report.judged = parse(["--data", "x", "--workers", "4"]), ()
    report.stage = SimpleNamespace(batches=SimpleNamespace(share=20))
    report.bar, report.untold = SimpleNamespace(write=said.append), {"demand", "waiting"}
    monkeypatch.setattr(runlog, "cores", lambda: 6)
    report.judge_reader(10, 40.0, 39.0, 8.0)
    report.judge_reader(20, 41.0, 39.5, 9.0)  # half of a second says nothing
    assert said == []
    report.judge_reader(110, 104.0, 43.0, 100.0)  # 4 of 64 seconds; 92 of cores in the other 60
    (demand,) = said
    assert demand == (
        "reader: 33 pairs a second in each process want 1.5 cores; it has 4 workers and 6 cores"
    )
    report.judge_reader(210, 164.0, 48.9, 200.0)
    assert len(said) == 1
    report.judge_reader(310, 224.0, 55.0, 400.0)
    report.judge_reader(410, 284.0, 95.0, 600.0)
    assert said[1:] == ["reader: 10% of the last 60 s went by waiting for data: give --workers 5, "
                        "or store pictures of 256 pixels (docs/data.md)"]  # fmt: skip


def test_a_run_on_embedded_data_says_nothing_of_files(on_files, capsys):
    assert on_files(capsys, "--data", "emoji")[0] == []


REUSED = """
import resource, torch
from nanoglip.machine import keep_memory
keep_memory()
for i in range(4):  # a page less each time: one of the same size may not fit, once it is aligned
    torch.ones(int(2.5 * 2**30) - 4096 * i, dtype=torch.uint8)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's malloc")
def test_freed_memory_is_used_again():
    """Above 2 GiB, too, where a threshold that glibc takes as an int would end."""
    done = subprocess.run([sys.executable, "-c", REUSED], capture_output=True, text=True, cwd=ROOT)
    faults = list(map(int, done.stdout.split()))
    new = [after - before for before, after in pairwise(faults)]
    assert len(new) == 3 and max(new) < 100, "a block had new pages"


def test_the_benchmarks_steps_have_the_same_loss():
    """Ours and open_clip's, of the same weights, pictures, captions and patches."""
    torch.manual_seed(0)
    theirs, weights = against_open_clip.their_step(2, 0.75, False)
    ours, found = against_open_clip.our_step(2, 0.75, 224, False, weights), []
    for step in (theirs, lambda tokens: ours(tokens, against_open_clip.noise_of(2, 224))):
        torch.manual_seed(1)  # the same patches, by the same draw
        found.append(step(against_open_clip.captions(2)))
    assert found[1] == pytest.approx(found[0], rel=1e-4)
