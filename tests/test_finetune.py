"""Fine-tuning: layer decay against timm, interpolation's two ends, learning, bad input."""

import json
import shutil
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image
from timm.optim import param_groups_layer_decay

import glip
from nanoglip import results
from nanoglip.evals import probe
from nanoglip.evals.encoder import Encoder
from nanoglip.machine import Device
from tests.test_probe import make_folder, make_run
from tools import finetune, tables
from tools.finetune import Classifier, FineTuneConfig

# A tiny model and few pictures: no augmentation, more steps of more size.
QUICK = FineTuneConfig(
    "run", "colours", epochs=12, warmup_epochs=1, batch_size=12, lr=2e-2, drop_path=0.0,
    rand_augment=0, mixup=0.0, cutmix=0.0, workers=0, precision="fp32", device="cpu",
)  # fmt: skip


def sizes_of(groups, head=()):
    """(scale of the learning rate, weight decay) -> how many numbers of the tower."""
    sizes = Counter()
    for group in groups:
        count = sum(p.numel() for p in group["params"] if not any(p is q for q in head))
        sizes[round(group["lr_scale"], 9), group["weight_decay"]] += count
    return +sizes


def test_layer_decay_is_timms():
    config = glip.GLIPConfig(32, 8, 24, 4, 3, 10, 20, 1, 2)
    ours = Classifier(glip.GLIP(config), torch.zeros(7, 10))
    theirs = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=3, num_classes=7,
        pre_norm=True,
    )  # fmt: skip
    for decay in (0.65, 0.9):
        groups = param_groups_layer_decay(
            ours, 0.05, ("model.visual.positional_embedding",), layer_decay=decay
        )
        assert len({id(p) for group in groups for p in group["params"]}) == len(
            [p for p in ours.parameters() if p.requires_grad]
        )
        # timm's has no projection, and heads of another size: the towers without them
        found = sizes_of(groups, [ours.model.visual.proj, *ours.head.parameters()])
        wanted = sizes_of(
            param_groups_layer_decay(
                theirs, 0.05, theirs.no_weight_decay(), layer_decay=decay
            ), list(theirs.head.parameters()),
        )  # fmt: skip
        assert found == wanted


def test_the_first_logits_are_zero_shot(tmp_path):
    encoder = make_run(tmp_path / "run")
    names = ["a red apple", "the moon", "police_car"]
    templates = tmp_path / "zeroshot_classification_templates.txt"
    templates.write_text("{c}\n")
    head = finetune.zero_shot_head(encoder, tmp_path, names)
    model = encoder.model
    images = torch.rand(5, 3, 16, 16)
    with torch.no_grad():
        found = Classifier(model, head)(images)
        texts = model.encode_text(glip.tokenize(["a red apple", "the moon", "police car"]))
        torch.testing.assert_close(
            found, model.logit_scale.exp() * model.encode_image(images) @ texts.T
        )
        (tmp_path / "classnames.txt").write_text("ball\nsun\ncar\n")
        prompts = "a photo of a {c}.\n{c} in the rain\n"
        templates.write_text(prompts)
        head = finetune.zero_shot_head(encoder, tmp_path, names)
        both = model.encode_text(glip.tokenize(["a photo of a sun.", "sun in the rain"]))
        wanted = model.logit_scale.exp() * F.normalize(both.mean(0), dim=0)
        torch.testing.assert_close(head[1], wanted)
    numbers = finetune.zero_shot_head(encoder, tmp_path / "x", ["n01498041", "n07697537"])
    words = finetune.zero_shot_head(encoder, tmp_path / "x", ["stingray", "hot dog"])
    assert torch.equal(numbers, words)
    (tmp_path / "classnames.txt").write_text("ball\nsun\n")
    with pytest.raises(glip.InputError, match="2 lines for 3 folders"):
        finetune.zero_shot_head(encoder, tmp_path, names)


def test_stochastic_depth_leaves_out_whole_branches_in_training_alone():
    torch.manual_seed(0)
    tower = glip.ImageTower(glip.GLIPConfig(16, 8, 24, 3, 3, 10, 20, 1, 2))
    images = torch.rand(400, 3, 16, 16)
    with torch.no_grad():
        whole = tower.eval()(images, None, None)
        finetune.drop_paths(tower, 0.5)
        assert torch.equal(tower(images, None, None), whole)
        tower.train()
        block = tower.transformer.resblocks[2]
        inputs = torch.randn(400, 5, 24)
        out = block.mlp(inputs)
        kept = out.flatten(1).abs().sum(1) > 0
        assert 0.4 < kept.float().mean() < 0.6
        block.eval()
        torch.testing.assert_close(out[kept], 2 * block.mlp(inputs)[kept])
        first = tower.transformer.resblocks[0]
        assert (first.mlp(inputs).flatten(1).abs().sum(1) > 0).all()


def test_interpolation_has_the_two_ends_and_the_middle():
    config = glip.GLIPConfig(16, 8, 24, 1, 3, 10, 20, 1, 2)
    start, end = (Classifier(glip.GLIP(config), torch.randn(3, 10)).state_dict()
                  for _ in range(2))  # fmt: skip
    for share, wanted in ((0, start), (1, end)):
        found = finetune.interpolate(start, end, share)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    middle = finetune.interpolate(start, end, 0.25)
    for name in start:
        torch.testing.assert_close(middle[name], 0.75 * start[name] + 0.25 * end[name])


def test_it_learns_and_what_it_wrote_can_be_used(tmp_path, monkeypatch):
    make_run(tmp_path / "run")
    make_folder(tmp_path / "colours", (16, 16, 16))
    monkeypatch.chdir(tmp_path)
    found = finetune.run_fine_tuning(replace(QUICK, wise=(0.0, 0.5, 1.0)))
    tables = found["fine_tuned"]
    assert tables["zero-shot"]["accuracy"] < 0.7
    assert tables["fine-tuned"]["accuracy"] > 0.95
    assert tables["WiSE-FT 0"] == tables["zero-shot"]
    assert tables["WiSE-FT 1"] == tables["fine-tuned, EMA"]
    out = tmp_path / "run/finetune-colours"
    assert json.loads((out / "results.json").read_text())["fine_tuned"] == tables
    assert str(tmp_path) not in (out / "results.json").read_text()
    assert {"commit", "cpu", "versions"} <= set(found["machine"])
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 13))
    assert lines[-1]["loss"] < lines[0]["loss"]
    # The model and its head, from the file alone, on pictures read without finetune's code.
    model, _ = glip.load_model(out / "model.pt")
    content = glip.load_checkpoint(out / "model.pt")
    source, (_, _, test) = probe.labelled("colours", 18, "--data")
    encoder = Encoder(model, Device(torch.device("cpu"), bf16=False))
    read = probe.reader(source, test)
    features = encoder.images(lambda places: read(places)[..., 1:17, 1:17], len(test))
    logits = features @ content["head"]["weight"].T + content["head"]["bias"]
    right = (logits.argmax(1).numpy() == source.concept[test]).mean()
    assert right == tables["fine-tuned, EMA"]["accuracy"]
    assert content["classes"] == ["class_0", "class_1", "class_2"]
    with pytest.raises(glip.InputError, match="is not an empty folder"):
        finetune.run_fine_tuning(QUICK)


def test_the_papers_table_has_the_accuracy_of_a_published_run(tmp_path, monkeypatch):
    """From tools.finetune by results/ to tools.tables; what the run had stays."""
    make_run(tmp_path / "run")
    make_folder(tmp_path / "imagenet1k", (16, 16))
    for name in ("paper.json", "cost.json"):
        (tmp_path / "results").mkdir(exist_ok=True)
        shutil.copy(tables.ROOT / "results" / name, tmp_path / "results")
    config = results.usual("cc12m") | {"mask": "gaussian", "mask_ratio": 0.5}
    written = {"name": "run", "command": "train.py", "trained_on": {"cpu": "x", "commit": "y"},
               "config": config, "fine_tune": {"pets": {"accuracy": 0.5}}}  # fmt: skip
    (tmp_path / "run/results.json").write_text(json.dumps(written))
    monkeypatch.chdir(tmp_path)
    found = finetune.run_fine_tuning(replace(QUICK, data="imagenet1k", epochs=2))["fine_tuned"]
    kept = results.load("results", tmp_path / "run")
    assert kept["config"] == config and kept["fine_tune"]["pets"] == {"accuracy": 0.5}
    results.add_run(kept, tmp_path / "results")
    found_tables = tables.paper_tables(tmp_path / "results").items()
    text = "".join(tables.markdown(*item) for item in found_tables)
    (line,) = (x for x in text.splitlines() if x.startswith("| ImageNet, fine-tuned |"))
    value = found["fine-tuned, EMA"]["accuracy"]
    assert value != found["zero-shot"]["accuracy"] and f" {100 * value:.1f} |" in line


def test_evaluation_crops_as_mae_does(tmp_path):
    """Resize to 256/224 of the side, then the centre: against torchvision, on a wide picture."""
    draw = np.random.default_rng(0)
    for name in ("a", "b"):
        place = tmp_path / "set/train" / name
        place.mkdir(parents=True)
        for i in range(3):
            small = Image.fromarray(draw.integers(0, 256, (6, 9, 3), dtype=np.uint8))
            small.resize((180, 120), Image.Resampling.BICUBIC).save(place / f"{i}.png")
    shutil.copytree(tmp_path / "set/train", tmp_path / "set/test")
    for side, larger in ((56, 64), (225, 225)):
        source, (train, *_) = probe.labelled(tmp_path / "set", side, "--data")
        found = finetune.middles(source, train)(np.arange(2))
        for picture, i in zip(found, train, strict=False):
            wanted = TF.resize(TF.to_image(Image.open(source.paths[i])), larger, antialias=True)
            wanted = TF.center_crop(wanted, [side, side])
            assert (picture.float() - wanted.float()).abs().mean() < 2


def test_the_preset_follows_the_size_and_flags_win(capsys):
    config = FineTuneConfig("run", "flowers", lr=0.125, mixup=0.25)
    for count, name in ((240, "small"), (finetune.SMALL_SET, "ImageNet")):
        found, preset = finetune.settled(config, count), finetune.PRESETS[name]
        assert (found.lr, found.mixup) == (0.125, 0.25)
        assert found.batch_size == preset["batch_size"] and found.ema == preset["ema"]
        told = capsys.readouterr().out
        assert f"{count:,} training pictures" in told and "--lr" not in told
        assert f"--batch-size {preset['batch_size']} " in told
    assert None not in vars(finetune.settled(FineTuneConfig("run", "x"), 240)).values()


def test_same_seed_same_weights_whatever_the_workers(tmp_path, monkeypatch):
    """With everything switched on that draws."""
    make_run(tmp_path / "run")
    make_folder(tmp_path / "colours", (9, 9))
    monkeypatch.chdir(tmp_path)
    full = replace(QUICK, epochs=2, drop_path=0.3, rand_augment=9, mixup=0.8, cutmix=1.0)
    weights = []
    for i, (workers, seed) in enumerate(((0, 0), (2, 0), (0, 1))):
        finetune.run_fine_tuning(replace(full, workers=workers, seed=seed, out=f"out{i}"))
        weights.append(glip.load_checkpoint(f"out{i}/model.pt")["head"]["weight"])
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_every_picture_is_shown_once_an_epoch():
    shown = list(finetune.batches(np.arange(10, 31), 10, replace(QUICK, epochs=2)))
    assert [len(batch) for batch in shown] == [10] * 4
    for epoch in (0, 1):
        places = [place for batch in shown[2 * epoch : 2 * epoch + 2] for place in batch]
        assert {e for e, _ in places} == {epoch}
        assert len({i for _, i in places}) == 20
    assert shown[0] != [(0, i) for _, i in shown[2]]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere", "--data", "colours"], "nowhere: not a whole checkpoint of nanoGLIP (File"),
        (["run", "--data", "nothing"], "--data nothing is no folder"),
        (["run", "--data", "torn"], "1 of 18 pictures cannot be read"),
        (["run", "--data", "colours", "--wise", "0.5", "1.5"], "--wise 1.5: give a share"),
        (["run", "--data", "colours", "--rand-augment", "12"], "magnitude from 0 to 9"),
        (["run", "--data", "colours", "--lr", "0"], "--lr must be above 0"),
        (["run", "--data", "colours", "--out", "run"], "is not an empty folder"),
        (["run", "--data", "colours", "--lr", "1e30"], "the loss is nan in epoch"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(words, sentence, tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "run")
    make_folder(tmp_path / "colours", (9, 9))
    make_folder(tmp_path / "torn", (9, 9))
    (tmp_path / "torn/train/class_0/5.png").write_bytes(b"torn")
    monkeypatch.chdir(tmp_path)
    small = ["--epochs", "2", "--warmup-epochs", "1", "--workers", "0", "--precision", "fp32",
             "--device", "cpu"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["finetune.py", *words, *small])
    with pytest.raises(SystemExit) as stopped:
        finetune.main()
    told = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and told[-1].startswith("finetune.py: ")
    assert sentence in told[-1]
