"""Everything that a GPU runs, on a false one: torch's FakeTensorMode with tensors on cuda:0.

The mode checks devices, shapes and types as on a GPU, and cuda's rules of autocast hold; the values
come from a twin on the CPU of every tensor (see fake_gpu.py), because training reads some: losses,
ranks, thresholds. So each run here must also end where a CPU's ends.

Not covered, since it is replaced: kernels for GPUs and their rounding (attention is plain products
here), streams, whether a copy has ended when its target is used, pinning as such, what other
processes send (torch's fake process group: each has what the first has; DDP's sum is replaced,
too, as are objects that processes exchange), files' reading and writing (contents come from the
CPU). Not run at all: --shard, --compile, --estimate here, notebooks. tests/test_gpu.py is for GPUs.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import glip
import train
from nanoglip import runlog
from nanoglip.config import TrainConfig
from nanoglip.evals import benchmarks, probe, search
from nanoglip.evals.encoder import Encoder, accuracy_by_place
from nanoglip.machine import resolve
from tests.fake_gpu import fake_gpu
from tests.test_benchmarks import write_tree
from tests.test_probe import make_folder
from tools import convert, finetune

pytestmark = pytest.mark.slow  # it trains, kills or fetches

SIZE = (16, 4, 16, 1, 2, 8, 16, 1, 2)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """48 small pictures of noise, each with a caption; two are held out."""
    folder, draw = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    for i in range(48):
        pixels = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i} of several {'things ' * (i % 5)}")
    return folder


@pytest.fixture
def config(pairs, tmp_path, monkeypatch):
    """Four steps, of which three are before a checkpoint, and one of tuning.

    Besides held-out pairs eight pictures of four classes are evaluated.
    """
    monkeypatch.setitem(glip.SIZES, TrainConfig().model, SIZE)
    classes = write_tree(tmp_path / "classes", ["a", "b", "c", "d"], 2)
    (classes / "zeroshot_classification_templates.txt").write_text("a drawing of a {c}")
    return TrainConfig(
        data=(str(pairs),), batch_size=16, tune_batch_size=16, steps=4, tune_epochs=0.5, warmup=1,
        optimizer="adamw", precision="fp32", workers=0, log_every=100, eval_every=100,
        save_every=3, eval_sets=(str(classes),),
        out=str(tmp_path / "run"),
    )  # fmt: skip


class Cut(Exception):
    """A run that ends without a word."""


# --- the instrument -----------------------------------------------------------------------------


WRONG = {
    "mixed devices": lambda x, own: x + own,
    "a mask of the other device": lambda x, own: torch.where(own > 0, x, x),
    "a weight that stayed behind": lambda x, own: torch.nn.functional.linear(x, own),
    "numpy": lambda x, own: x.numpy(),
    "numpy by another way": lambda x, own: np.asarray(x),
    "numpy made a tensor, and mixed": lambda x, own: x * torch.from_numpy(np.ones((3, 3))),
}


@pytest.mark.parametrize("name", WRONG)
def test_it_refuses_what_a_gpu_refuses(name):
    with fake_gpu():
        x = torch.rand(3, 3, device="cuda")
        assert x.device == torch.device("cuda", 0) and x.is_cuda and not x.is_cpu
        with pytest.raises((RuntimeError, TypeError)):
            WRONG[name](x, torch.rand(3, 3))


WAITS = {
    "item": lambda x, own: x.sum().item(),
    "if": lambda x, own: bool(x.isnan().any()),
    "tolist": lambda x, own: x.tolist(),
    "boolean index": lambda x, own: x[x > 0.5],
    "assignment by a boolean index": lambda x, own: x.index_put_((x > 0.5,), x[0, 0]),
    "nonzero": lambda x, own: x.nonzero(),
    "masked_select": lambda x, own: x.masked_select(x > 0.5),
    "an index of the host": lambda x, own: x[torch.arange(2)],
    "new tensor": lambda x, own: torch.tensor([1.0, 2.0], device="cuda"),
    "new_tensor": lambda x, own: x.new_tensor([1.0, 2.0]),
    "to the device": lambda x, own: own.to("cuda"),
    "to the device, not pinned": lambda x, own: own.to("cuda", non_blocking=True),
    "pinned, but blocking": lambda x, own: own.pin_memory().to("cuda"),
    "copied into": lambda x, own: x.copy_(own),
    "to the host": lambda x, own: x.cpu(),
    "equal": lambda x, own: torch.equal(x, x),
}


@pytest.mark.parametrize("name", WAITS)
def test_it_counts_what_a_gpu_waits_for(name):
    with fake_gpu() as gpu:
        x, own = torch.rand(3, 3, device="cuda"), torch.rand(3, 3)
        ((x @ x).softmax(-1) * 2).sum()
        own.pin_memory().to("cuda", non_blocking=True)
        own[own > 0.5].tolist()
        x[torch.arange(2, device="cuda")]
        assert gpu.waits == []
        WAITS[name](x, own)
        assert gpu.waits


def test_its_values_and_gradients_are_a_cpus():
    torch.manual_seed(0)
    model = glip.GLIP(glip.GLIPConfig(*SIZE))
    images, tokens = torch.rand(6, 3, 16, 16), glip.tokenize(["a dog", "two words", "x"] * 2)
    ids = glip.sample_ids_keep("random", 6, 4, 0.5)
    glip.clip_loss(*model(images, tokens, ids)).backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    with fake_gpu():
        model.to("cuda")
        glip.clip_loss(*model(images.to("cuda"), tokens, ids.to("cuda"))).backward()
        for name, p in model.named_parameters():
            assert p.grad.device.type == "cuda"
            torch.testing.assert_close(p.grad.cpu(), wanted[name], atol=1e-5, rtol=1e-4)


# --- training -----------------------------------------------------------------------------------

VARIANTS = [  # every mask, and every other setting with one of them
    {"mask": "none", "loss": "siglip"},
    {"mask": "random", "micro_batch": 12},
    {"mask": "gaussian", "precision": "bf16", "optimizer": "muon"},
    {"mask": "gumbel", "recompute": True, "clip_grad_norm": 1.0},
    {"mask": "center-crop", "loss": "siglip", "micro_batch": 8, "precision": "bf16"},
    {"mask": "grid", "optimizer": "muon"},
    {"mask": "block", "tune_image_size": 24},
    {"mask": "cluster"},
    {"mask": "cluster", "embedding_weight": 1.0, "precision": "bf16", "recompute": True},
    {"mask": "pgs", "embedding_weight": 1.0, "mask_range": 0.1, "precision": "bf16"},
    {"mask": "attentive", "precision": "bf16", "teacher_scale": 0.5},
    {"mask": "attentive", "aclip": True},
    {"mask": "gaze", "precision": "bf16"},
    {"mask": "gaze", "micro_batch": 8}, {"mask": "gaze", "mask_ratio": (0.75, 0.5)},
]


def logged_of(run, name):
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [record[name] for record in logged if name in record]


def losses_of(run):
    return logged_of(run, "loss")


def run_on_gpu(config, monkeypatch, quiet, world=1):
    """Train, alone until a checkpoint and on from it; what was waited for in a step, `quiet`."""
    marks, arrived, write_page = [], runlog.Report.data_arrived, runlog.Report.write_page

    def counted(self, batch):
        marks.append(len(gpu.waits))
        arrived(self, batch)

    def ended(self, model, step):
        write_page(self, model, step)
        raise Cut

    with fake_gpu(world) as gpu, monkeypatch.context() as patch:
        patch.setattr(runlog.Report, "data_arrived", counted)
        if world == 1:
            patch.setattr(runlog.Report, "write_page", ended)
            with pytest.raises(Cut):
                train.train(config)
            patch.setattr(runlog.Report, "write_page", write_page)
        run = train.train(config)
    assert len(marks) == config.steps + 1
    return run, gpu.waits[marks[quiet] : marks[quiet + 1]]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_a_run_on_a_gpu(variant, config, tmp_path, monkeypatch):
    """Both stages, evaluation, checkpoints, page, a cut and the resumption: it ends as a CPU's, and
    in a step that neither logs nor saves nothing waits for the GPU."""
    config = replace(config, **variant)
    run, waits = run_on_gpu(replace(config, device="cuda"), monkeypatch, 1)
    # Cluster Masking's threshold is found anew in each eighth.
    assert waits == [] or (config.mask == "cluster" and config.embedding_weight)
    assert {path.name for path in run.iterdir()} == {
        "config.json", "log.jsonl", "pretrained.pt", "model.pt", "report.html"
    }  # fmt: skip
    assert (run / "report.html").read_text().count("<img") == 1 + 2 * 2 * 12
    train.train(replace(config, device="cpu", out=str(tmp_path / "cpu")))
    near = {"rel": 0.05} if config.precision == "bf16" else {"rel": 1e-3}
    assert losses_of(run) == pytest.approx(losses_of(tmp_path / "cpu"), **near)
    found, wanted = (logged_of(where, "classes/acc1") for where in (run, tmp_path / "cpu"))
    assert len(found) == 2 and (found == wanted or config.precision == "bf16")


@pytest.mark.parametrize("variant", [
    {"optimizer": "muon"}, {"micro_batch": 1, "loss": "siglip"},
    {"mask": "attentive", "aclip": True, "precision": "bf16"}, {"mask": "gaze"},
], ids=["clip", "siglip", "aclip", "gaze"])  # fmt: skip
def test_the_first_of_eight_processes(variant, config, monkeypatch):
    config = replace(config, device="cuda", steps=5, save_every=5, **variant)
    monkeypatch.setattr(benchmarks, "BLOCK", 1)  # as many blocks as processes
    monkeypatch.setattr(benchmarks, "TEXTS", 1)
    run, waits = run_on_gpu(config, monkeypatch, 3, world=8)  # DDP settles in the steps before
    assert waits == [] and glip.load_checkpoint(run / "model.pt")["world"] == 8
    assert len(logged_of(run, "classes/acc1")) == 2


def test_overfitting_on_a_gpu(config):
    with fake_gpu(), pytest.raises(glip.InputError, match="after 3 steps the loss is"):
        train.overfit(replace(config, device="auto", overfit=8, steps=3))


# --- afterwards ---------------------------------------------------------------------------------


@pytest.fixture
def run(config):
    return train.train(replace(config, device="cpu", mask="cluster"))


def both(work):
    """What `work(device)` gives on a CPU, and what it gives on the GPU."""
    wanted = work("cpu")
    with fake_gpu():
        return wanted, work("cuda")


def test_evaluation_and_the_probe_on_a_gpu(run, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "LARGE", 0)  # so that regress runs
    folder = make_folder(tmp_path / "colours", (9, 9, 9))

    def work(device):
        for cache in run.glob("features-*"):
            cache.unlink()
        return evaluate.run_evaluation(evaluate.EvaluateConfig(
            run=str(run), probe_data=(str(folder),), device=device,
            precision="fp32",
        ))  # fmt: skip

    wanted, found = both(work)
    for part in ("held_out", "mask_shares"):
        assert json.loads(json.dumps(found[part])) == json.loads(json.dumps(wanted[part]))
    rows = [results["linear_probe"]["colours"] for results in (wanted, found)]
    assert rows[0]["accuracy"] == pytest.approx(rows[1]["accuracy"])
    assert found["evaluated_on"]["device"] == "fake"


def test_search_classification_and_attention_on_a_gpu(run, pairs):
    def work(device):
        options = evaluate.EvaluateConfig(run=str(run), device=device, precision="fp32")
        for asked in (
            {"search": "a dog", "images": str(pairs)},
            {"classify": str(pairs / "3.png"), "names": "cat,dog"},
            {"attention": str(pairs / "3.png")},
        ):
            evaluate.run_command(replace(options, **asked))
        device = torch.device(device)
        encoder = Encoder(glip.load_model(run / "model.pt")[0].to(device), resolve(device, "fp32"))
        return search.search(encoder, "a dog", pairs), search.attention(encoder, pairs / "3.png")

    wanted, found = both(work)
    assert [path for path, _ in found[0]] == [path for path, _ in wanted[0]]
    torch.testing.assert_close(found[1], wanted[1])


def test_a_map_of_places_on_a_gpu(run):
    pairs = data.load("scenes-center", 16, ("Goog",), "Twtr")[1]
    pairs.concept = pairs.concept[:9]

    def work(device):
        device = torch.device(device)
        encoder = Encoder(glip.load_model(run / "model.pt")[0].to(device), resolve(device, "fp32"))
        return accuracy_by_place(encoder, pairs)

    wanted, found = both(work)
    assert found == wanted and len(found) == 7


def test_fine_tuning_on_a_gpu(run, tmp_path, monkeypatch):
    """Its accuracies are those of a CPU's; within an epoch nothing waits for the GPU."""
    folder = make_folder(tmp_path / "colours", (9, 9))
    marks, forward = [], finetune.Classifier.forward

    def work(device):
        return finetune.run_fine_tuning(finetune.FineTuneConfig(
            run=str(run), data=str(folder), out=str(tmp_path / device), epochs=2, warmup_epochs=1,
            batch_size=6, drop_path=0.0, wise=(0.5,), workers=0, precision="fp32", device=device,
        ))  # fmt: skip

    wanted = work("cpu")
    with fake_gpu() as gpu:
        def counted(self, images):
            marks.append(len(gpu.waits))
            return forward(self, images)

        monkeypatch.setattr(finetune.Classifier, "forward", counted)
        found = work("cuda")
    assert len(marks) == 6 and marks[0] == marks[2] and marks[3] == marks[5]
    assert found["fine_tuned"].keys() == wanted["fine_tuned"].keys()
    assert found["fine_tuned"]["zero-shot"] == wanted["fine_tuned"]["zero-shot"]
    assert losses_of(tmp_path / "cuda") == pytest.approx(losses_of(tmp_path / "cpu"), rel=1e-3)


def test_export_of_a_run_from_a_gpu(config, tmp_path):
    with fake_gpu():
        run = train.train(replace(config, device="cuda", steps=1))
        for to in ("open_clip", "timm", "hf"):
            convert.export(convert.Export(run, to, tmp_path / to))
            assert (tmp_path / to / "README.md").is_file()
