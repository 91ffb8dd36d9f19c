"""What only a GPU can show: make gpu. Without one these are skipped; tests/test_fake_gpu.py is not.

No GPU has run this file yet: its tests were tried with DEVICE = "cpu", but for those of waiting and
of two GPUs. A first run on a GPU may find that a tolerance is too narrow; what is compared holds.
"""

import json
import math
import statistics
import time
from dataclasses import replace

import pytest
import torch

import evaluate
import glip
import train
from nanoglip import masks, runlog
from nanoglip.config import TrainConfig
from nanoglip.machine import machine
from nanoglip.sources.order import Batches
from tests import against_open_clip
from tests.test_train import command

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(), reason="this machine has no NVIDIA GPU"
    ),
]
SHORT = TrainConfig(
    batch_size=64, steps=6, image_size=32, tune_epochs=0, warmup=2, precision="fp32", log_every=1,
    eval_every=3, device=DEVICE,
)  # fmt: skip


def logged(run, name="loss"):
    lines = (run / "log.jsonl").read_text().splitlines()
    return [record[name] for record in map(json.loads, lines) if name in record]


def card():
    return machine(torch.device(DEVICE))["device"]


def test_the_demos_first_hundred_steps_are_a_cpus(tmp_path):
    """In the precision of each: the losses, and what is then named of the held-out pictures."""
    config = replace(TrainConfig(), steps=100, tune_epochs=0.0)
    runs = [train.train(replace(config, device=device, out=str(tmp_path / name)))
            for name, device in (("gpu", DEVICE), ("cpu", "cpu"))]  # fmt: skip
    ours, theirs = map(logged, runs)
    print(f"\n{card()}, losses of the demo: {ours}; a CPU's: {theirs}")
    assert len(ours) == 10 and ours[-1] < ours[0] - 1
    assert ours == pytest.approx(theirs, rel=0.03)
    found = [logged(run, "zero-shot top-5")[-1] for run in runs]
    assert found[0] == pytest.approx(found[1], abs=0.03)
    both = [evaluate.run_evaluation(evaluate.EvaluateConfig(run=str(runs[0]), device=device,
            precision="fp32"))["held_out"] for device in (DEVICE, "cpu")]  # fmt: skip
    for column, table in both[1].items():  # of equal weights
        assert both[0][column] == pytest.approx(table, abs=0.005)


def test_waiting_for_data_is_timed_by_the_gpu(tmp_path, monkeypatch):
    """Nearly all that a reader sleeps, half a second before each of six batches."""
    read = Batches.__getitem__
    monkeypatch.setattr(Batches, "__getitem__", lambda s, i: time.sleep(0.5) or read(s, i))
    run = train.train(replace(SHORT, out=str(tmp_path / "run")))
    waited = logged(run, "data_wait")[-1] * logged(run, "seconds")[-1]
    assert 2.5 < waited <= logged(run, "seconds")[-1]


@pytest.mark.parametrize("mask", ["none", "gaussian", "cluster"])
def test_features_and_gradients_are_a_cpus(mask):
    """In fp32 to its rounding; in bf16 they point the same way."""
    torch.manual_seed(0)
    config = glip.GLIPConfig.named("ViT-Ti-16", 112)
    images = torch.randint(0, 256, (16, 3, 112, 112), dtype=torch.uint8)
    tokens = glip.tokenize([f"picture {'word ' * i}" for i in range(16)])
    keep = None, None
    if mask != "none":
        keep = masks.sample_mask(mask, 16, 7, 0.5, noise=torch.rand(16, 49), pixels=images)
    weights = glip.GLIP(config).state_dict()

    def passed(device, bf16=False):
        model = glip.GLIP(config)
        model.load_state_dict(weights)
        model.to(device)
        on = [None if x is None else x.to(device) for x in keep]
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            image_features, text_features, scale = model(images.to(device), tokens, *on)
        glip.clip_loss(image_features, text_features, scale).backward()
        grads = {name: p.grad.cpu() for name, p in model.named_parameters()}
        return image_features.detach().cpu(), text_features.detach().cpu(), grads

    wanted, found, rough = passed("cpu"), passed(DEVICE), passed(DEVICE, bf16=True)
    for i in (0, 1):
        torch.testing.assert_close(found[i], wanted[i], atol=1e-5, rtol=1e-4)
        assert (rough[i] * wanted[i]).sum(1).min() > 0.999
    for name, grad in wanted[2].items():
        assert (found[2][name] - grad).norm() <= 1e-3 * grad.norm() + 1e-7, name


def test_two_micro_batches_are_one_batch(tmp_path):
    runs = [train.train(replace(SHORT, micro_batch=size, out=str(tmp_path / str(size))))
            for size in (0, 32)]  # fmt: skip
    assert logged(runs[1]) == pytest.approx(logged(runs[0]), rel=1e-3)


def test_a_run_is_resumed(tmp_path, monkeypatch):
    """Cut after the checkpoint in the middle, it ends as the one that was left alone."""
    straight = train.train(replace(SHORT, out=str(tmp_path / "straight")))
    write_page = runlog.Report.write_page

    def cut(self, model, step):
        write_page(self, model, step)
        raise KeyboardInterrupt

    config = replace(SHORT, out=str(tmp_path / "cut"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runlog.Report, "write_page", cut)
        train.train(config)
    assert glip.load_checkpoint(tmp_path / "cut/latest.pt")["step"] == 3
    run = train.train(config)
    assert (run / "report.html").is_file() and len(logged(run)) == 6
    assert logged(run) == pytest.approx(logged(straight), rel=1e-3)


def test_compiled_it_is_the_same(tmp_path):
    runs = [train.train(replace(SHORT, steps=3, compile=on, out=str(tmp_path / str(on))))
            for on in (False, True)]  # fmt: skip
    assert logged(runs[1]) == pytest.approx(logged(runs[0]), rel=1e-3)


@pytest.mark.skipif(DEVICE != "cuda", reason="of a GPU alone")
@pytest.mark.parametrize("how", [
    {}, {"optimizer": "adamw", "precision": "bf16"}, {"mask": "cluster"}, {"micro_batch": 32},
    {"mask": "attentive", "aclip": True},
], ids=lambda how: "-".join(map(str, how.values())))  # fmt: skip
def test_no_step_waits_for_the_gpu(how, tmp_path, monkeypatch):
    """torch itself tells of what synchronises, in a step that neither logs nor saves."""
    arrived, count = runlog.Report.data_arrived, []

    def watched(self, batch):
        arrived(self, batch)
        count.append(len(batch))
        torch.cuda.set_sync_debug_mode("error" if len(count) == 3 else "default")

    monkeypatch.setattr(runlog.Report, "data_arrived", watched)
    config = replace(SHORT, log_every=100, eval_every=100, **how)
    try:
        train.train(replace(config, out=str(tmp_path / "run")))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(count) == 6


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this machine has no two NVIDIA GPUs")
def test_two_gpus_are_one(tmp_path):
    alone = train.train(replace(SHORT, out=str(tmp_path / "one")))
    config = ["--batch-size", "64", "--steps", "6", "--image-size", "32", "--tune-epochs", "0",
              "--warmup", "2", "--precision", "fp32", "--log-every", "1"]  # fmt: skip
    done = command("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                   "train.py", *config, "--out", str(tmp_path / "two"))  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert logged(tmp_path / "two") == pytest.approx(logged(alone), rel=1e-3)


@pytest.mark.parametrize(("mask_ratio", "bf16"), [(0.75, True), (0.75, False), (0.0, True)])
def test_a_step_beside_open_clips(mask_ratio, bf16):
    """Of equal weights, pictures and patches: the losses are equal. What each takes is printed."""
    device, batch = torch.device(DEVICE), 256 if DEVICE == "cuda" else 4
    torch.manual_seed(0)
    theirs, weights = against_open_clip.their_step(batch, mask_ratio, bf16, device=device)
    ours = against_open_clip.our_step(batch, mask_ratio, 224, bf16, weights, device=device)
    times, losses = {"open_clip": [], "ours": []}, []
    for count in range(5):
        tokens = against_open_clip.captions(batch, seed=count)
        for name, step in (
            ("open_clip", lambda tokens: theirs(tokens, True)),
            ("ours", lambda tokens: ours(tokens, against_open_clip.noise_of(batch, 224))),
        ):
            torch.manual_seed(count)  # the same patches
            begun = time.perf_counter()
            losses.append(step(tokens))
            times[name].append(time.perf_counter() - begun)
    assert math.isclose(*losses[:2], rel_tol=5e-3 if bf16 else 1e-4)
    told = ", ".join(f"{n} {batch / statistics.median(t[2:]):,.0f}" for n, t in times.items())
    print(f"\n{card()}, ViT-B/16, {batch} pairs, {mask_ratio:.0%} masked, "
          f"{'bf16' if bf16 else 'fp32'}: pairs a second: {told}")  # fmt: skip
