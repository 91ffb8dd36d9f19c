"""Weights in and out, by each consumer's own loader; hostile files; the peers' tools agree."""

import contextlib
import io
import json
import math
import os
import pickle
import re
import shutil
import sys
import tarfile
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import evaluate
import glip
import train
from glip import GLIP, SIZES, GLIPConfig, InputError
from nanoglip import runlog
from nanoglip.config import TrainConfig, parse
from nanoglip.evals import figures
from nanoglip.evals.encoder import Encoder, rank_pairs, shares_of
from nanoglip.evals.metrics import retrieval, zero_shot
from nanoglip.machine import Device
from nanoglip.results import portable
from nanoglip.sources import emoji, pictures
from nanoglip.sources.order import loader
from tests.test_model import CAPTIONS, Evil
from tools import card, convert
from train import resized

TINY = GLIPConfig(32, 8, 64, 2, 1, 16, 64, 2, 1)
TEXTS = [*CAPTIONS, "it's 2 o'clock: caf\u00e9", "a red \U0001f34e", "the cat\u2019s"]


def model_of(config, seed=0):
    """A random model whose positions, norms and biases are far from where they start."""
    with torch.device("meta"):
        model = GLIP(config)
    torch.manual_seed(seed)
    for name, p in model.to_empty(device="cpu").named_parameters():
        norm = p.ndim == 1 and name.endswith("weight")
        wide = p.ndim < 2 or "positional" in name
        torch.nn.init.normal_(p, float(norm), 0.2 if wide else p[0].numel() ** -0.5)
    torch.nn.init.constant_(model.logit_scale, 2.0)
    return model.eval()


def run_of(folder, config, seed=0):
    """A folder with a model.pt; the model."""
    model = model_of(config, seed)
    folder.mkdir(parents=True)
    glip.save_checkpoint(folder / "model.pt", model)
    return model


def command(monkeypatch, *words):
    """convert.py in this process: its exit code, output and errors."""
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, words)])
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            convert.main()
        except SystemExit as stopped:
            return stopped.code, out.getvalue(), err.getvalue()
    return 0, out.getvalue(), err.getvalue()


def do(monkeypatch, *words):
    code, out, err = command(monkeypatch, *words)
    assert code == 0, err
    return out


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def photographs(height, width):
    """Real pictures (3, height, width) uint8, cut out of photographs."""
    found = [photo[:, 20 : 20 + height, 10 : 10 + width]
             for photo in emoji.photographs("test", max(height, width))]  # fmt: skip
    return torch.from_numpy(np.stack([p for p in found if p.shape[1:] == (height, width)][:2]))


def as_image(picture):
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


def features_of(folder, to, images):
    """(image features, text features) by a consumer's own loader, preprocessing and tokenizer."""
    shown = [as_image(picture) for picture in images]
    if to == "open_clip":
        model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
        pixels = torch.stack([preprocess(picture) for picture in shown])
        return model.eval().encode_image(pixels), model.encode_text(tokens)
    if to == "timm":
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
        return model(torch.stack([transform(picture) for picture in shown])), None
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(folder).eval()
    inputs = CLIPProcessor.from_pretrained(folder)(
        text=TEXTS, images=shown, return_tensors="pt", padding=True, truncation=True
    )
    pixels, tokens = inputs.pop("pixel_values"), inputs
    image, text = model.get_image_features(pixels), model.get_text_features(**tokens)
    return image.pooler_output, text.pooler_output


SHAPES = {
    "demo": GLIPConfig.named(TrainConfig().model), "quick_gelu": replace(TINY, quick_gelu=True),
    "resized": replace(TINY, image_size=48), "siglip": replace(TINY, siglip=True),
    "non-square": replace(TINY, image_size=(32, 48)),
}  # fmt: skip


@torch.no_grad()
def check_features(folder, to, model):
    """Through the consumer's own loader, on photographs and captions, normalised: 1e-5."""
    images = photographs(*model.config.pixels)
    wanted = model.encode_image(images), model.encode_text(glip.tokenize(TEXTS))
    assert (wanted[0][0] - wanted[0][1]).abs().max() > 1e-3
    for found, ours in zip(features_of(folder, to, images), wanted, strict=True):
        if found is not None:
            torch.testing.assert_close(F.normalize(found, dim=-1), ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_exports_have_our_features_and_come_back_bit_for_bit(shape, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run, config = tmp_path / "run", SHAPES[shape]
    model = run_of(run, config)
    if shape == "resized":  # positions of another grid, resampled here
        model = resized(model_of(TINY), config.image_size).eval()
        glip.save_checkpoint(run / "model.pt", model)
    for to in ("open_clip", "timm", "hf"):
        out = tmp_path / to
        code, _, err = command(monkeypatch, "export", run, "--to", to, "--out", out)
        if to == "hf" and shape in ("non-square", "siglip"):
            assert code == 2 and "--to open_clip" in err and not out.exists()
            continue
        assert code == 0, err
        check_features(out, to, model)
        if to == "timm":
            continue
        do(monkeypatch, "import", out, "--from", to, "--out", tmp_path / f"{to}-run")
        again, found = glip.load_model(tmp_path / f"{to}-run/model.pt")
        assert found == config and same_weights(again, model)
        do(monkeypatch, "export", tmp_path / f"{to}-run", "--to", to, "--out", tmp_path / f"{to}2")
        for path in out.iterdir():
            if path.name != "README.md":
                assert path.read_bytes() == (tmp_path / f"{to}2" / path.name).read_bytes()


QUICK_SIZES = ("ViT-Ti-16", "ViT-B-32")


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    name if name in QUICK_SIZES else pytest.param(name, marks=pytest.mark.proof)
    for name in SIZES if name not in ("ViT-pico-8", "ViT-nano-8")
])  # fmt: skip
def test_published_sizes_have_our_features(name, tmp_path, monkeypatch):
    """ViT-B/16 whole, the others cut to two layers."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = GLIPConfig.named(name)
    if name != "ViT-B-16":
        config = replace(config, layers=2, text_layers=2)
    model = model_of(config)
    for fill in ("kaiming_uniform_", "normal_", "uniform_", "xavier_uniform_"):  # takes seconds
        monkeypatch.setattr(torch.nn.init, fill, lambda tensor, *_, **__: tensor)
    for to in ("open_clip", "timm", "hf"):
        check_features(exported(tmp_path / to, to, model), to, model)
        shutil.rmtree(tmp_path / to)


@pytest.mark.parametrize("to", ["open_clip", "timm", "hf"])
def test_exports_bring_our_preprocessing(to, tmp_path, monkeypatch):
    """A photograph of another size, by the consumer's own transform: resized, cut, normalised."""
    run_of(tmp_path / "run", TINY)
    do(monkeypatch, "export", tmp_path / "run", "--to", to, "--out", tmp_path / "out")
    photo = photographs(60, 90)[0]
    image, ours = as_image(photo), pictures.centred(photo.permute(1, 2, 0).numpy(), 32)
    if to == "open_clip":
        found = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")[2](image)
    elif to == "timm":
        model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
        found = timm.data.create_transform(**timm.data.resolve_model_data_config(model))(image)
    else:
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
        found = processor(image, return_tensors="pt")["pixel_values"][0]
    wanted = TF.normalize(ours / 255, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    assert found.shape == (3, 32, 32)
    assert (found - wanted).abs().max() < 1.01 / 255 / 0.26  # bicubic rounds a byte up or down


def test_the_towers_by_torch_export(tmp_path, monkeypatch):
    model = run_of(tmp_path / "run", replace(TINY, image_size=(32, 48)))
    do(monkeypatch, "export", tmp_path / "run", "--to", "torch", "--out", tmp_path / "out")
    assert "torch.export.load" in (tmp_path / "out/README.md").read_text()
    image, text = (torch.export.load(tmp_path / f"out/{name}.pt2").module()
                   for name in ("image", "text"))  # fmt: skip
    images, tokens = photographs(32, 48), glip.tokenize(TEXTS)
    with torch.no_grad():
        for rows in (1, 2):
            torch.testing.assert_close(image(images[:rows]), model.encode_image(images[:rows]))
            torch.testing.assert_close(text(tokens[:rows]), model.encode_text(tokens[:rows]))
        torch.testing.assert_close(text(tokens), model.encode_text(tokens))


def test_transformers_is_not_needed(tmp_path, monkeypatch):
    run_of(tmp_path / "run", TINY)
    monkeypatch.setitem(sys.modules, "transformers", None)
    do(monkeypatch, "export", tmp_path / "run", "--to", "hf", "--out", tmp_path / "out")
    do(monkeypatch, "import", tmp_path / "out", "--from", "hf", "--out", tmp_path / "again")


# --- OpenAI's weights ---------------------------------------------------------------------------


def test_openais_weights_come_by_transformers_files(tmp_path, monkeypatch):
    """CLIPModel's own file and config, which leaves out defaults and has the old end token."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    text = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "eos_token_id": 2,
            "num_attention_heads": 1}  # fmt: skip
    vision = {**text, "image_size": 32, "patch_size": 8}
    theirs = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    do(monkeypatch, "import", tmp_path / "theirs", "--from", "hf", "--out", tmp_path / "run")
    model, config = glip.load_model(tmp_path / "run/model.pt")
    assert config == replace(TINY, quick_gelu=True)
    images, tokens = photographs(32, 32), glip.tokenize(TEXTS)
    pixels = TF.normalize(images / 255, glip.MEAN, glip.STD)
    with torch.no_grad():
        wanted = F.normalize(theirs.get_image_features(pixels).pooler_output, dim=-1)
        torch.testing.assert_close(model.encode_image(images), wanted, atol=1e-5, rtol=0)
        tokens = torch.where(tokens == 0, glip.END, tokens)
        wanted = F.normalize(theirs.get_text_features(tokens).pooler_output, dim=-1)
        torch.testing.assert_close(model.encode_text(tokens), wanted, atol=1e-5, rtol=0)
        other = GLIP(TINY)
        other.load_state_dict(model.state_dict())
        assert (other.encode_image(images) - model.encode_image(images)).abs().max() > 1e-4


@pytest.fixture
def script(tmp_path):
    """A TorchScript archive, as OpenAI published its weights."""
    cfg = {"layers": 1, "width": 64, "patch_size": 8, "image_size": 32}
    text = {"layers": 1, "width": 64, "heads": 1}
    torch.jit.script(open_clip.CLIP(16, cfg, text, quick_gelu=True)).save(tmp_path / "ViT.pt")
    return tmp_path / "ViT.pt"


def test_torchscript_is_refused_and_another_form_named(script, tmp_path, monkeypatch):
    told = refused(monkeypatch, tmp_path, script, "--from", "open_clip", "--config", "ViT-B-32")
    assert "nothing in it was executed" in told and "published as safetensors" in told


# --- refusals -----------------------------------------------------------------------------------


def exported(folder, to, model):
    """A folder with the files of an export."""
    folder.mkdir(parents=True)
    for name, content in convert.EXPORTS[to](model).items():
        (folder / name).write_bytes(content)
    return folder


def change(path, place, value):
    """Put a value into a JSON file, at a place of dots."""
    content = json.loads(path.read_text())
    *outer, last = place.split(".")
    inner = content
    for key in outer:
        inner = inner[key]
    inner[last] = value
    path.write_text(json.dumps(content))


VARIANTS = [  # consumer, place in its config, value, what the refusal names
    ("open_clip", "model_cfg.vision_cfg.timm_model_name", "vit_base", "timm_model_name"),
    ("open_clip", "model_cfg.vision_cfg.attentional_pool", True, "attentional_pool"),
    ("open_clip", "model_cfg.vision_cfg.no_ln_pre", True, "no_ln_pre"),
    ("open_clip", "model_cfg.vision_cfg.pool_type", "avg", "pool_type"),
    ("open_clip", "model_cfg.vision_cfg.mlp_ratio", 4.3637, "mlp_ratio"),
    ("open_clip", "model_cfg.text_cfg.hf_model_name", "roberta-base", "hf_model_name"),
    ("open_clip", "model_cfg.text_cfg.no_causal_mask", True, "no_causal_mask"),
    ("open_clip", "model_cfg.custom_text", True, "custom_text"),
    ("open_clip", "model_cfg.multimodal_cfg", {"layers": 12}, "multimodal_cfg"),
    ("open_clip", "preprocess_cfg.mean", [0.5, 0.5, 0.5], "mean"),
    ("open_clip", "preprocess_cfg.resize_mode", "squash", "resize_mode"),
    ("hf", "model_type", "siglip", "siglip"),
    ("hf", "text_config.hidden_act", "gelu_new", "gelu_new"),
    ("hf", "vision_config.hidden_act", "quick_gelu", "hidden_act"),
    ("hf", "vision_config.intermediate_size", 100, "intermediate_size"),
    ("hf", "text_config.eos_token_id", 5, "eos_token_id"),
    # and configs that lie about their weights, or try to cost time and memory
    ("open_clip", "model_cfg.embed_dim", 17, "size mismatch for"),
    ("open_clip", "model_cfg.vision_cfg.layers", 10**9, "no model of its"),
    ("open_clip", "model_cfg.vision_cfg.width", 10**9, "no model of its"),
    ("open_clip", "model_cfg.vision_cfg.image_size", 24_000, "positional_embedding"),
    ("open_clip", "model_cfg.vision_cfg.image_size", 2**40, "no model of its"),
    ("open_clip", "model_cfg.text_cfg.context_length", 10**12, "positional_embedding"),
    ("open_clip", "model_cfg.text_cfg.vocab_size", 10**15, "token_embedding"),
    ("open_clip", "model_cfg.vision_cfg.patch_size", 0, "no model of its"),
    ("open_clip", "model_cfg.vision_cfg.head_width", 0, "no model of its"),
    ("open_clip", "model_cfg.text_cfg.layers", "many", "no model of its"),
    ("open_clip", "model_cfg.text_cfg.layers", -1, "resblocks"),
    ("open_clip", "model_cfg.vision_cfg", 3, "no model of its"),
    ("hf", "vision_config.num_hidden_layers", 10**9, "no model of its"),
    ("hf", "vision_config.hidden_size", None, "no model of its"),
    ("hf", "vision_config.image_size", 40, "size mismatch for visual"),
    ("hf", "text_config", "none", "no model of its"),
]  # fmt: skip


def refused(monkeypatch, tmp_path, *words):
    """The one sentence of a refused import, which writes nothing."""
    out = tmp_path / "refused"
    code, told, err = command(monkeypatch, "import", *words, "--out", out)
    assert code == 2 and told == "" and not out.exists()
    assert err.startswith("convert.py: ") and err.count("\n") == 1, err
    assert not (tmp_path / "executed").exists()
    return err


def test_variants_that_we_lack_and_configs_that_lie_are_refused_by_name(tmp_path, monkeypatch):
    folders = {to: exported(tmp_path / to, to, model_of(TINY)) for to in ("open_clip", "hf")}
    names = {"open_clip": "open_clip_config.json", "hf": "config.json"}
    for to, place, value, told in VARIANTS:
        path = folders[to] / names[to]
        before = path.read_text()
        change(path, place, value)
        assert told in refused(monkeypatch, tmp_path, folders[to], "--from", to), place
        path.write_text(before)
    change(folders["hf"] / "preprocessor_config.json", "image_mean", [0.5, 0.5, 0.5])
    assert "image_mean" in refused(monkeypatch, tmp_path, folders["hf"], "--from", "hf")
    file = folders["open_clip"] / "open_clip_model.safetensors"
    (folders["open_clip"] / "open_clip_config.json").unlink()
    assert "--config" in refused(monkeypatch, tmp_path, file, "--from", "open_clip")
    told = refused(monkeypatch, tmp_path, file, "--from", "open_clip", "--config", "ViT-B-61")
    assert "ViT-B-61" in told
    told = refused(monkeypatch, tmp_path, file, "--from", "open_clip", "--config", "RN50")
    assert "ResNet" in told
    told = refused(monkeypatch, tmp_path, file, "--from", "open_clip", "--config", "ViT-B-32")
    assert "Missing key" in told


def test_damaged_and_malicious_files_run_nothing_and_write_nothing(script, tmp_path, monkeypatch):
    folder = exported(tmp_path / "good", "open_clip", model_of(TINY))
    good = (folder / "open_clip_model.safetensors").read_bytes()
    weights = load_file(folder / "open_clip_model.safetensors")
    evil, buffer = Evil(tmp_path / "executed"), io.BytesIO()
    torch.save({"state_dict": weights}, buffer)
    files = {
        "empty": b"", "text": b"no weights", "head": good[:7], "torn": good[:100_000],
        "almost": good[:-1], "script": script.read_bytes(),
        "script-torn": script.read_bytes()[:9999], "pickle": pickle.dumps(evil),
        "torch-torn": buffer.getvalue()[:5000], "length": b"\xff" * 7 + b"\x7f{" + good[9:],
        "config": (folder / "open_clip_config.json").read_bytes(),
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_bytes(content)
    torch.save({"state_dict": weights, "extra": evil}, folder / "evil.pt")
    torch.save({"state_dict": evil}, folder / "evil.pth")
    torch.save({"state_dict": {"a": 1}}, folder / "numbers.pt")
    torch.save([weights], folder / "list.pt")
    torch.save({"epoch": 1}, folder / "none.pt")
    for name, code in (("pickle.pt", "byteorder"), ("script.pt", "constants.pkl")):
        with zipfile.ZipFile(folder / name, "w") as file:
            for member, content in ((code, b"little"), ("data.pkl", pickle.dumps(evil, 2))):
                file.writestr(f"model/{member}", content)
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors"):
            continue
        told = refused(monkeypatch, tmp_path, path, "--from", "open_clip")
        assert path.name in told and "nothing in it was executed" in told, told
        code, _, err = command(monkeypatch, "info", path)
        assert code == 2 and err.count("\n") == 1 and path.name in err
    assert not (tmp_path / "executed").exists()
    # Whatever the name: the content tells, and is taken as what it is.
    for name, content in (("a.pt", good), ("a.safetensors", buffer.getvalue())):
        (folder / name).write_bytes(content)
        out = tmp_path / f"run-{name}"
        do(monkeypatch, "import", folder / name, "--from", "open_clip", "--out", out)
    name, value = "visual.proj", weights["visual.proj"]
    for wrong, told in (
        ({name: value * math.nan}, "visual.proj is not finite"),
        ({name: value.T}, "mismatch for visual.proj"), ({name: None}, 'Missing key(s)'),
        ({name: value[:, 1:]}, "mismatch for visual.proj"), ({"visual.x": value + 0}, '"visual.x"'),
    ):  # fmt: skip
        changed = {k: v.contiguous() for k, v in (weights | wrong).items() if v is not None}
        save_file(changed, folder / "wrong.safetensors")
        found = refused(monkeypatch, tmp_path, folder / "wrong.safetensors", "--from", "open_clip")
        assert told in found
    found = refused(monkeypatch, tmp_path, tmp_path / "absent.pt", "--from", "hf")
    assert "there is no such file" in found
    for make in (None, os.mkfifo, Path.mkdir):
        if make:
            make(folder / "config.json")
        found = refused(monkeypatch, tmp_path, folder / "wrong.safetensors", "--from", "hf")
        assert "its config" in found
        if make is os.mkfifo:
            (folder / "config.json").unlink()


def test_spoilt_weights_and_wild_names_are_refused_by_name(tmp_path, monkeypatch):
    folder = exported(tmp_path / "good", "open_clip", model_of(TINY))
    file = folder / "open_clip_model.safetensors"
    weights = load_file(file)
    for value in (torch.inf, -torch.inf):
        spoilt = weights["visual.proj"].clone()
        spoilt[3, 5] = value
        save_file(weights | {"visual.proj": spoilt}, file)
        told = refused(monkeypatch, tmp_path, folder, "--from", "open_clip")
        assert "visual.proj is not finite" in told and file.name in told
    save_file(weights | {"visual.\x1b[2J\n" + "x" * 10**6: torch.zeros(1)}, file)
    told = refused(monkeypatch, tmp_path, folder, "--from", "open_clip")
    assert "no plain ViT" in told and told.strip().isprintable() and len(told) < 500
    torch.save({1: torch.zeros(3)}, tmp_path / "numbers.pt")
    code, _, err = command(monkeypatch, "info", tmp_path / "numbers.pt")
    assert code == 2 and "not a readable file of weights" in err


def test_a_small_file_takes_little_memory(tmp_path, monkeypatch):
    """Compressed members, and views that claim more than the file."""
    torch.save({"a": torch.zeros(2**20)}, tmp_path / "whole.pt")
    assert convert.read_weights(tmp_path / "whole.pt").keys() == {"a"}
    with zipfile.ZipFile(tmp_path / "whole.pt") as old, \
            zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as new:  # fmt: skip
        for name in old.namelist():
            new.writestr(name, old.read(name))
    torch.save({"a": torch.zeros(1).expand(10**12)}, tmp_path / "views.pt")
    for name in ("bomb.pt", "views.pt"):
        with pytest.raises(InputError, match=f"{name}: not a readable file of weights"):
            convert.read_weights(tmp_path / name)


def test_nothing_is_written_over(tmp_path, monkeypatch):
    run_of(tmp_path / "run", TINY)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/note.txt").write_text("mine")
    for words in (("export", tmp_path / "run", "--to", "hf"), ("import", "x", "--from", "hf")):
        for out in (tmp_path / "mine", tmp_path / "run/model.pt"):
            code, _, err = command(monkeypatch, *words, "--out", out)
            assert code == 2 and "choose another" in err
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["note.txt"]
    code, _, err = command(monkeypatch, "export", tmp_path, "--to", "hf", "--out", tmp_path / "new")
    assert code == 2 and "no model.pt in it" in err and not (tmp_path / "new").exists()


# --- the peers' own tools -----------------------------------------------------------------------


@pytest.mark.slow
def test_clip_benchmarks_command_prints_our_numbers(tmp_path, monkeypatch):
    """Its command line, as it is, on shards of emoji."""
    from clip_benchmark.cli import main

    model = run_of(tmp_path / "run", replace(TINY, image_size=64))
    do(monkeypatch, "export", tmp_path / "run", "--to", "open_clip", "--out", tmp_path / "model")
    _, test = data.load("emoji", 64)
    ids = np.arange(0, 1800, 9)
    images, concept = test.render(ids), np.arange(len(ids)) % 10
    names = [test.captions[test.concept[i]] for i in ids]
    for kind, count in (("classification", 10), ("retrieval", len(ids))):
        folder = tmp_path / kind / "test"
        folder.mkdir(parents=True)
        (folder / "nshards.txt").write_text("1")
        (folder.parent / "dataset_type.txt").write_text(kind)
        (folder.parent / "classnames.txt").write_text("\n".join(names[:count]))
        (folder.parent / "zeroshot_classification_templates.txt").write_text("{c}")
        with tarfile.open(folder / "0.tar", "w") as tar:
            for i, picture in enumerate(images):
                png = io.BytesIO()
                as_image(picture).save(png, "png")
                label = f"{concept[i]}" if kind == "classification" else names[i]
                for suffix, content in (("png", png.getvalue()),
                                        ("cls" if count == 10 else "txt", label.encode())):
                    member = tarfile.TarInfo(f"{i:04}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        monkeypatch.setattr(sys, "argv", [
            "clip_benchmark", "eval", "--model", f"local-dir:{tmp_path / 'model'}", "--pretrained",
            "none", "--dataset", f"wds/{kind}", "--dataset_root", str(tmp_path / kind), "--no_amp",
            "--task", f"zeroshot_{kind}", "--num_workers", "0", "--recall_k", "1", "5", "--output",
            str(tmp_path / f"{kind}.json"),
        ])  # fmt: skip
        main()
    encoder = Encoder(model, Device(torch.device("cpu"), bf16=False))
    features, texts = encoder.images(lambda i: images[i], len(images)), encoder.texts(names)
    ours = shares_of(
        zero_shot(features, texts[:10], concept, np.zeros(10, bool))
    )
    found = json.loads((tmp_path / "classification.json").read_text())["metrics"]
    assert found["acc1"] == pytest.approx(ours["zero-shot top-1"], abs=1e-9)
    assert found["acc5"] == pytest.approx(ours["zero-shot top-5"], abs=1e-9)
    assert 0.05 < found["acc1"] < found["acc5"] < 0.95  # neither all right nor all wrong
    ours = shares_of(retrieval(features, texts, torch.arange(len(ids))))
    found = json.loads((tmp_path / "retrieval.json").read_text())["metrics"]
    for k in (1, 5):
        assert found[f"image_retrieval_recall@{k}"] == pytest.approx(
            ours[f"text to image R@{k}"], abs=1e-6
        )
        assert found[f"text_retrieval_recall@{k}"] == pytest.approx(
            ours[f"image to text R@{k}"], abs=1e-6
        )


WORDS = ["--model", "ViT-nano-8", "--image-size", "32", "--mask", "none", "--batch-size", "16",
         "--optimizer", "adamw", "--steps", "2", "--tune-epochs", "0", "--precision", "fp32",
         "--warmup", "0", "--log-every", "1", "--workers", "0"]  # fmt: skip
NANO = GLIPConfig.named("ViT-nano-8", 32)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder; training in it does not stop to evaluate."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runlog, "quick", lambda *_: {})
    return tmp_path


def logged(run):
    return [record["loss"] for line in (run / "log.jsonl").read_text().splitlines()
            if "loss" in (record := json.loads(line))]  # fmt: skip


@pytest.mark.slow
def test_open_clip_trains_on_from_our_export_and_we_from_its_checkpoint(folder, monkeypatch):
    """Two steps each from the same weights have the same losses; then we go on from open_clip's."""
    run_of(folder / "run", NANO)
    do(monkeypatch, "export", "run", "--to", "open_clip", "--out", "export")
    config = parse([*WORDS, "--init", "run", "--out", "ours"])
    train.train(config)
    theirs = open_clip.create_model(f"local-dir:{folder / 'export'}").train()
    ndim = [[p for p in theirs.parameters() if (p.ndim < 2) == few] for few in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": ndim[0], "weight_decay": 0.0},
         {"params": ndim[1], "weight_decay": config.weight_decay}],
        betas=(0.9, 0.98), eps=1e-6,
    )  # fmt: skip
    (stage,) = train.plan(config, 0, 1)
    losses = []
    for step, batch in enumerate(loader(stage.batches, 0, 2, 0, pin=False)):
        pixels = TF.normalize(batch.images / 255, glip.MEAN, glip.STD)
        tokens = F.pad(batch.tokens, (0, 77 - batch.tokens.shape[1]))
        loss = open_clip.ClipLoss()(*theirs(pixels, tokens))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = train.lr_at(step, 2, 0, config.lr)
        optimizer.step()
    assert logged(folder / "ours") == pytest.approx(losses, rel=1e-5)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    # A checkpoint as open_clip's trainer writes it; no config lies beside it.
    state = {f"module.{k}": v for k, v in theirs.state_dict().items()}
    torch.save({"epoch": 1, "name": "x", "state_dict": state,
                "optimizer": optimizer.state_dict()}, "epoch_1.pt")  # fmt: skip
    do(monkeypatch, "import", "epoch_1.pt", "--from", "open_clip", "--config",
       "export/open_clip_config.json", "--out", "back")  # fmt: skip
    train.train(parse([*WORDS, "--init", "back", "--seed", "1", "--out", "on"]))
    (stage,) = train.plan(parse([*WORDS, "--seed", "1"]), 0, 1)
    batch = next(iter(loader(stage.batches, 0, 1, 0, pin=False)))
    with torch.no_grad():
        pixels = TF.normalize(batch.images / 255, glip.MEAN, glip.STD)
        tokens = F.pad(batch.tokens, (0, 77 - batch.tokens.shape[1]))
        loss = open_clip.ClipLoss()(*theirs(pixels, tokens)).item()
    assert logged(folder / "on")[0] == pytest.approx(loss, rel=1e-5)


# --- --init, evaluation, info, card -------------------------------------------------------------


@pytest.mark.slow
def test_imported_weights_are_tuned_under_a_mask_and_evaluated(folder, monkeypatch):
    config = replace(NANO, quick_gelu=True)
    exported(folder / "hub", "hf", model_of(config))
    do(monkeypatch, "import", "hub", "--from", "hf", "--out", "runs/published")
    monkeypatch.setattr(figures, "draw_all", lambda *_: [])
    results = evaluate.run_evaluation(evaluate.EvaluateConfig("runs/published", precision="fp32"))
    encoder = Encoder(model_of(config), Device(torch.device("cpu"), bf16=False))
    wanted = shares_of(rank_pairs(encoder, data.load("emoji", 32)[1]))
    assert results["held_out"] == {"full picture": wanted}
    words = [*WORDS, "--mask", "gaussian", "--image-size", "64", "--init", "runs/published"]
    run = train.train(parse(words))
    assert "init=published" in run.name
    model, found = glip.load_model(run / "model.pt")
    assert found == replace(config, image_size=64)
    start = resized(model_of(config), 64).state_dict()
    gaps = [(p - start[k]).abs().max().item() for k, p in model.state_dict().items()]
    assert 0 < max(gaps) < 1e-2  # two AdamW steps, lr 2e-3, weight decay 1: still where it began
    content = glip.load_checkpoint(run / "model.pt")
    assert portable(content["config"])["init"] == "published"


@pytest.mark.slow
def test_the_recipe_for_published_weights_keeps_them(folder):
    """Each weight stays within a hundredth of where it began, and the loss goes on falling."""
    words = ["--model", "ViT-nano-8", "--data", "emoji", "--image-size", "32", "--batch-size", "64",
             "--precision", "fp32", "--warmup", "2", "--log-every", "1"]  # fmt: skip
    start = ["--mask", "none", "--tune-epochs", "0", "--steps", "40", "--out", "start"]
    train.train(parse([*words, *start]))
    recipe = [*words, "--recipe", "finetune-pairs", "--steps", "8", "--out", "on"]
    with pytest.raises(InputError, match="starts from weights: give --init"):
        train.train(parse(recipe))
    config = parse([*recipe, "--init", "start"])
    assert (config.optimizer, config.mask, config.tune_epochs) == ("adamw", "none", 0)
    train.train(config)
    assert sum(logged(Path("on"))) < sum(logged(Path("start"))[-8:])
    before, after = (glip.load_model(f"{run}/model.pt")[0].state_dict() for run in ("start", "on"))
    for name, weight in before.items():
        assert 0 < (after[name] - weight).norm() <= 0.01 * weight.norm() + 1e-3, name


@pytest.mark.slow
def test_a_resumed_run_does_not_read_its_init_again(folder, monkeypatch):
    run_of(folder / "start", replace(NANO, quick_gelu=True))
    words = [*WORDS, "--init", "start", "--save-every", "1"]
    train.train(parse([*words, "--out", "straight"]))
    save = runlog.Report.save_latest

    def save_and_stop(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runlog.Report, "save_latest", save_and_stop)
        train.train(parse([*words, "--out", "cut"]))
    shutil.rmtree("start")
    train.train(parse([*words, "--out", "cut"]))
    a, b = (glip.load_model(f"{name}/model.pt")[0] for name in ("straight", "cut"))
    assert same_weights(a, b)


def test_an_init_that_does_not_fit_is_refused_before_anything_is_written(folder, monkeypatch):
    run_of(folder / "siglip", replace(NANO, siglip=True))
    run_of(folder / "tiny", TINY)
    for init, told in (("siglip", "siglip is True"), ("tiny", "its width is 64"),
                       ("none", "none: not a whole checkpoint")):  # fmt: skip
        with pytest.raises(InputError, match=told):
            train.train(parse([*WORDS, "--init", init, "--out", "run"]))
        assert not Path("run").exists()


def test_a_checkpoints_words_are_no_markup_and_no_orders_to_a_terminal(folder, monkeypatch):
    wild = "\x1b[2Jx\n# Owned\n<script>a</script>[b](c)`|"
    run = asdict(TrainConfig(data=(wild,), init=wild))
    glip.save_checkpoint(
        "model.pt", model_of(TINY), config=run, steps={wild: 1}, seconds={}, command=wild, world=1,
        bf16=False, machine={"device": wild, "cpu": wild, "commit": wild},
    )  # fmt: skip
    Path("results.json").write_text(json.dumps({"held_out": {wild: {wild: 0.5}}}))
    told = do(monkeypatch, "info", "model.pt")
    assert len(told.splitlines()) == 14 and told.replace("\n", "").isprintable()
    do(monkeypatch, "export", "model.pt", "--to", "timm", "--out", "timm")
    text = Path("timm/README.md").read_text()
    assert "\x1b" not in text and [x for x in text.splitlines() if x[:1] == "#"] == [
        f"# {card.architecture(TINY)}, by nanoGLIP", "## Model and training", "## Results",
        "## Licence", "## Limits",
    ]  # fmt: skip
    body = text.partition("## Model and training")[2]
    assert "Owned" in body and not re.search(r"(?<!\\)[`<\[]", body)
    assert len({line.replace(r"\|", "").count("|") for line in body.splitlines()}) == 2


def test_info_and_card_tell_what_a_checkpoint_is(folder, monkeypatch):
    from huggingface_hub import ModelCard

    train.train(parse([*WORDS, "--seed", "7", "--out", "run"]))
    table = {"full picture": {"zero-shot top-1": 0.123, "zero-shot top-5": 0.456}}
    Path("run/results.json").write_text(json.dumps({"held_out": table}))
    Path("new").mkdir()
    shutil.copy("run/model.pt", "new")
    Path("new/results.json").write_text('{"benchmarks": {}}')  # of published sets alone
    do(monkeypatch, "export", "new", "--to", "timm", "--out", "none")
    assert "Not evaluated on held-out pairs" in Path("none/README.md").read_text()
    told = do(monkeypatch, "info", "run")
    size = Path("run/model.pt").stat().st_size
    for words in ("checkpoint of nanoGLIP", f"{size:,} bytes", "ViT-nano-8", "seed: 7", "2 pre"):
        assert words in told
    for to in ("open_clip", "timm", "hf"):
        do(monkeypatch, "export", "run", "--to", to, "--out", to)
        loaded = ModelCard.load(Path(to) / "README.md")
        assert loaded.data.license and loaded.data.library_name
        for words in ("emoji", "mask: none", "mask ratio: 0.0", "seed: 7", "12.3 %", "45.6 %",
                      "MIT", "## Limits"):  # fmt: skip
            assert words in loaded.content
    for name, words in (("open_clip", "open_clip's names"), ("hf", "transformers' names"),
                          ("timm", "timm's names")):  # fmt: skip
        (file,) = Path(name).glob("*.safetensors")
        assert words in do(monkeypatch, "info", file) == do(monkeypatch, "info", name)
    do(monkeypatch, "import", "hf", "--from", "hf", "--out", "back")
    assert "sha256" in do(monkeypatch, "info", "back")
    Path("torch").mkdir()
    Path("torch/image.pt2").write_bytes(b"a program, not weights")
    code, _, err = command(monkeypatch, "info", "torch")
    assert code == 2 and "torch: no model.pt or model.safetensors" in err
