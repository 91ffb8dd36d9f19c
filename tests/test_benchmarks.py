"""The published sets' formats, their metrics against CLIP_benchmark, and what broken ones say."""

import io
import json
import shutil
import struct
import threading
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import webdataset
from clip_benchmark.datasets.builder import build_wds_dataset, image_captions_collate_fn
from clip_benchmark.datasets.sugar_crepe import SugarCrepe
from clip_benchmark.metrics import (
    image_caption_selection,
    zeroshot_classification,
    zeroshot_retrieval,
)
from PIL import Image

import evaluate
import glip
from nanoglip.config import TrainConfig
from nanoglip.evals import benchmarks, probe, significance
from nanoglip.evals.encoder import Encoder
from nanoglip.evals.metrics import aupr, classification, retrieved, shares
from nanoglip.machine import Device, use_bf16
from nanoglip.masker import Masker
from tests.test_resume import TORCHRUN
from tests.test_significance import run_main
from tests.test_train import command

ROOT = Path(__file__).parent.parent
SIDE = 32
COLOURS = ["red", "green", "blue", "white", "black", "yellow", "a gr\u00e9y one"]
PROMPTS = ["a photo of a {c}.", "{c}", "a drawing of the {c}, small."]


# --- made-up sets -------------------------------------------------------------------------------


def image(i, mode="RGB"):
    """A picture of its own size, smooth enough to survive compression."""
    draw = np.random.default_rng(i)
    size = tuple(int(n) for n in draw.integers(20, 80, 2))
    small = draw.integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(i):
    """(suffix, bytes) of picture i: formats and modes in turn, one of them turned by its EXIF."""
    suffix, form, modes = (
        ("jpg", "JPEG", ("RGB", "L", "CMYK")), ("png", "PNG", ("RGB", "RGBA", "P", "L")),
        ("webp", "WEBP", ("RGB", "RGBA")), ("jpeg", "JPEG", ("RGB", "L", "CMYK")),
    )[i % 4]  # fmt: skip
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6 if i % 8 == 3 else 1
    picture = image(i, modes[i // 4 % len(modes)])
    picture.save(file, form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
    return suffix, file.getvalue()


def write_set(folder, samples, shards=3, split="test", **files):
    """CLIP_benchmark's layout of (picture's suffix and bytes, target's suffix and content)."""
    (folder / split).mkdir(parents=True)
    each = -(-len(samples) // shards)
    for shard in range(shards):
        with webdataset.TarWriter(str(folder / split / f"{shard}.tar")) as writer:
            for i, (picture, target) in enumerate(samples[shard * each : (shard + 1) * each]):
                key = f"s{shard * each + i:07}"
                writer.write({"__key__": key, picture[0]: picture[1], target[0]: target[1]})
    (folder / split / "nshards.txt").write_text(f"{shards}\n")
    names = {"classes": "classnames", "prompts": "zeroshot_classification_templates",
             "kind": "dataset_type"}  # fmt: skip
    for what, lines in files.items():
        (folder / f"{names[what]}.txt").write_text("".join(f"{line}\n" for line in lines))
    return folder


LABELS = np.random.default_rng(0).integers(0, 6, 1000)  # the seventh has no picture


def write_classes(folder, count=53, **files):
    samples = [(encoded(i), ("cls", str(label))) for i, label in enumerate(LABELS[:count])]
    return write_set(folder, samples, **{"classes": COLOURS, "prompts": PROMPTS} | files)


def write_captions(folder, count=41):
    samples = [
        (encoded(i), ("txt", "\n".join(f"picture {i} said {w}" for w in range(1 + i % 5))))
        for i in range(count)
    ]
    return write_set(folder, samples, kind=["retrieval"])


def write_tree(folder, names, count=4):
    for n, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            suffix, content = encoded(n * count + i)
            (folder / name / f"{i}.{suffix.upper()}").write_bytes(content)
    return folder


def write_sugar_crepe(folder, count=12):
    (folder / "val2017").mkdir(parents=True)
    for i in range(count):
        image(i).save(folder / f"val2017/{i}.jpg")
    for task in ("swap_obj", "add_att"):
        rows = {
            str(3 * i): {"filename": f"{i}.jpg", "caption": f"{task} thing {i} on a mat",
                         "negative_caption": f"mat on a {task} thing {i}"} for i in range(count)
        }  # fmt: skip
        (folder / f"{task}.json").write_text(json.dumps(rows))
    return folder


# --- a model, as open_clip's and as ours ----------------------------------------------------------


@pytest.fixture(scope="module")
def models():
    """(open_clip's, Encoder) with the same weights, which are large enough to tell pictures."""
    torch.manual_seed(0)
    config = glip.GLIPConfig(SIDE, 8, 64, 2, 2, 32, 64, 2, 2)
    vision = {"image_size": SIDE, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
    theirs = open_clip.CLIP(32, vision, text).eval()
    for name, weight in theirs.named_parameters():
        if "positional" in name or "token_embedding" in name or name.endswith("proj"):
            torch.nn.init.normal_(weight, std=0.3)
    ours = glip.GLIP(config)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k != "attn_mask"})
    return theirs, Encoder(ours, Device(torch.device("cpu"), bf16=False))


def ours(encoder, place, captions=False, **columns):
    places = ((), (str(place),)) if captions else ((str(place),), ())
    columns = columns or {"full picture": (encoder, None)}
    results, _, problems = benchmarks.evaluate_sets(columns, *places)
    assert problems == []
    return results


def theirs_of(folder):
    """CLIP_benchmark's own reader of the folder."""
    transform = open_clip.image_transform(SIDE, is_train=False)
    found = build_wds_dataset("x", transform=transform, split="test", data_dir=str(folder))
    loader = torch.utils.data.DataLoader(found.batched(16), batch_size=None)
    return loader, found.classes, found.templates


TOKENIZER = open_clip.get_tokenizer("ViT-B-32")


# --- against CLIP_benchmark -----------------------------------------------------------------------


def test_classification_equals_clip_benchmark(models, tmp_path):
    """To the last example: 53 pictures of four formats and five modes, over three prompts."""
    folder = write_classes(tmp_path / "wds_colours")
    loader, classes, templates = theirs_of(folder)
    results = ours(models[1], folder)["colours"]
    assert (results["pictures"], results["classes"], results["prompts"]) == (53, 7, 3)
    found = results["columns"]["full picture"]
    for prompts, suffix in ((templates, ""), ([benchmarks.ONE_PROMPT], "_one_prompt")):
        wanted = zeroshot_classification.evaluate(
            models[0], loader, TOKENIZER, classes, prompts, "cpu", amp=False
        )
        assert 0 < wanted["acc1"] < wanted["acc5"] < 1
        for metric, value in wanted.items():
            assert found[metric + suffix] == pytest.approx(value, abs=1e-12), metric


def test_retrieval_equals_clip_benchmark(models, tmp_path):
    """One to five captions a picture."""
    folder = write_captions(tmp_path / "flickr")
    wanted = zeroshot_retrieval.evaluate(
        models[0], theirs_of(folder)[0], TOKENIZER, "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    found = ours(models[1], folder, captions=True)["flickr"]
    assert found["columns"]["full picture"] == pytest.approx(wanted, abs=1e-6)
    assert found["captions"] == sum(1 + i % 5 for i in range(41)) and len(wanted) == 6


def test_sugar_crepe_equals_clip_benchmark(models, tmp_path):
    folder = write_sugar_crepe(tmp_path / "sugar")
    transform = open_clip.image_transform(SIDE, is_train=False)
    results = ours(models[1], folder, captions=True)
    assert set(results) == {"sugar_crepe/swap_obj", "sugar_crepe/add_att"}
    for name, found in results.items():
        path = folder / f"{name.rpartition('/')[2]}.json"
        wanted = image_caption_selection.evaluate(
            models[0],
            torch.utils.data.DataLoader(
                SugarCrepe(str(folder / "val2017"), str(path), transform), 5,
                collate_fn=image_captions_collate_fn,
            ),
            TOKENIZER, "cpu", amp=False,
        )  # fmt: skip
        assert found["columns"]["full picture"]["text_acc"] == pytest.approx(wanted["text_acc"])


def test_pictures_are_prepared_as_open_clip_does(tmp_path):
    """The same bytes, whatever the format, the mode, the shape or the size, square or not."""
    sizes = [(SIDE, SIDE), (24, 40), (40, 16)]
    transforms = [open_clip.image_transform(size, is_train=False) for size in sizes]
    for transform in transforms:
        transform.transforms.pop()  # the normalisation
    for i in range(48):
        content = encoded(i)[1]
        benchmark = benchmarks.Benchmark("x", "choice", np.arange(1), lambda _, c=content: c, str)
        image = Image.open(io.BytesIO(content)).convert("RGB")
        found = benchmarks.preprocess(benchmark, 0, sizes)
        for transform, mine in zip(transforms, found, strict=True):
            assert torch.equal(mine, (transform(image) * 255).round().to(torch.uint8)), i


# --- properties -----------------------------------------------------------------------------------


class Oracle:
    """Looks like an Encoder; its features are given."""

    def __init__(self, model, images, texts):
        self.model, self.given, self.words = model, images, texts

    def block(self, images, start, masker):
        assert masker is None and images.shape[1:] == (3, SIDE, SIDE)
        return self.given[start : start + len(images)]

    def text_block(self, captions):
        return torch.stack([self.words(caption) for caption in captions])


def test_perfect_features_give_100_percent(models, tmp_path, monkeypatch):
    """Of sizes that no block divides; a picture out of its place would show."""
    monkeypatch.setattr(benchmarks, "BLOCK", 10)
    names = torch.eye(len(COLOURS))
    texts = lambda t: names[next(i for i, c in enumerate(COLOURS) if c in t)]  # noqa: E731
    classes = write_classes(tmp_path / "classes", 47)
    oracle = Oracle(models[1].model, names[LABELS[:47]], texts)
    found = ours(oracle, classes)["classes"]["columns"]["full picture"]
    assert {found[k] for k in ("acc1", "acc5", "mean_per_class_recall")} == {1.0}
    captions = write_captions(tmp_path / "captions", 41)
    oracle = Oracle(models[1].model, torch.eye(41), lambda t: torch.eye(41)[int(t.split()[1])])
    found = ours(oracle, captions, captions=True)["captions"]["columns"]["full picture"]
    assert set(found.values()) == {1.0}


def test_permuted_features_give_chance():
    torch.manual_seed(0)
    names, labels = F.normalize(torch.randn(40, 32), dim=-1), torch.arange(20_000) % 40
    found = classification(names[torch.randperm(20_000) % 40] @ names.T, labels)
    assert found["acc1"] == pytest.approx(1 / 40, abs=0.004)
    assert found["acc5"] == pytest.approx(5 / 40, abs=0.01)
    assert found["mean_per_class_recall"] == pytest.approx(found["acc1"])
    images, texts = torch.randn(1000, 32), torch.randn(3000, 32)
    found = retrieved(images, texts, torch.arange(1000).repeat_interleave(3))
    found = shares(found)
    assert found["image_retrieval_recall@10"] == pytest.approx(10 / 1000, abs=0.006)
    assert found["text_retrieval_recall@10"] == pytest.approx(30 / 3000, abs=0.009)


def test_recall_within_all_candidates_is_left_out():
    """Of 6 pictures R@1 and R@5, of 11 captions R@10 as well: nothing that must be 100 %."""
    found = retrieved(torch.randn(6, 8), torch.randn(11, 8), torch.arange(11) % 6)
    assert set(found) == {*(f"text_retrieval_recall@{k}" for k in (1, 5, 10)),
                          *(f"image_retrieval_recall@{k}" for k in (1, 5))}  # fmt: skip


def test_mean_per_class_recall_weighs_classes_alike():
    scores = torch.eye(3)[[0, 0, 0, 1, 2, 2]]
    found = classification(scores, torch.tensor([0, 0, 0, 0, 2, 1]))
    assert found["acc1"] == pytest.approx(4 / 6)
    assert found["mean_per_class_recall"] == pytest.approx((3 / 4 + 0 + 1) / 3)


def test_area_under_precision_and_recall_of_foreign_pictures():
    sure, unsure = torch.eye(4).repeat(3, 1) * 9, torch.zeros(6, 4)
    assert aupr(sure, unsure) == 1.0
    assert aupr(unsure, sure) < 0.8  # the share of foreign ones among all is 2 / 3


# --- the other formats ----------------------------------------------------------------------------


def test_trees_of_folders_are_the_shards_of_the_same_pictures(models, tmp_path):
    """Named, numbered (where 10 sorts before 2) and by WordNet, with and without test/."""
    count = 12
    names = [f"class {chr(97 + i)}" for i in range(count)]
    samples = [(encoded(i), ("cls", str(i // 4))) for i in range(4 * count)]
    wanted = ours(models[1], write_set(tmp_path / "wds", samples, classes=names, prompts=PROMPTS))
    wanted = wanted["wds"]["columns"]
    for place, folders in (("named", names), ("numbered/test", map(str, range(count)))):
        folder = tmp_path / place.partition("/")[0]
        write_tree(tmp_path / place, folders)
        (folder / "classnames.txt").write_text("\n".join(names))
        (folder / "zeroshot_classification_templates.txt").write_text("\n".join(PROMPTS))
        assert ours(models[1], folder)[folder.name]["columns"] == wanted


def test_folders_names_are_classes_where_nothing_else_is_said(tmp_path):
    write_tree(tmp_path / "flowers/val", ["red_tulip", "daisy"], 2)
    (found,) = benchmarks.open_benchmarks(str(tmp_path / "flowers"))
    assert found.classes == ["daisy", "red tulip"] and found.labels.tolist() == [0, 0, 1, 1]
    write_tree(tmp_path / "splits", ["train/a", "train/b", "validation/a", "validation/b"], 1)
    with pytest.raises(glip.InputError, match="0 names for 2 folders"):
        benchmarks.open_benchmarks(str(tmp_path / "splits"))
    for name, folders in (("1 folder", ["train"]), ("2 folders", ["0", "1"])):
        with pytest.raises(glip.InputError, match=f"0 names for {name} of"):
            benchmarks.open_benchmarks(str(write_tree(tmp_path / name, folders)))


def test_a_set_with_training_shards_is_probed(models, tmp_path):
    """The same features as zero-shot's, training pictures first; a fifth of them for validation."""
    samples = [(encoded(i), ("cls", str(label))) for i, label in enumerate(LABELS[:90])]
    folder = write_set(tmp_path / "wds_x", samples[:60], split="train", classes=COLOURS)
    write_set(folder, samples[60:], split="test")
    name, labels, (train, valid, test), stamp, render = probe.open_set(str(folder), SIDE)
    assert name == "x" and (labels == LABELS[:90]).all() and stamp.count(".tar") == 6
    assert sorted([*train, *valid]) == list(range(60)) and (test == np.arange(60, 90)).all()
    held = np.bincount(labels[valid], minlength=7)
    assert (held[:6] == np.maximum(1, np.bincount(labels[:60], minlength=7)[:6] // 5)).all()
    features = models[1].images(render, 90)
    wanted = []
    for split in ("train", "test"):
        (found,) = benchmarks.open_benchmarks(str(folder), split)
        blocks = benchmarks.image_features({"x": (models[1], None)}, found, 0, 1)
        wanted.append(benchmarks.joined([blocks])["x"])
    torch.testing.assert_close(features, torch.cat(wanted))
    with pytest.raises(glip.InputError, match="a set for retrieval, not for classification"):
        probe.open_set(str(both_splits(write_captions(tmp_path / "captions"))), SIDE)


def both_splits(folder):
    shutil.copytree(folder / "test", folder / "train")
    return folder


def test_wordnets_folders_are_imagenets_classes(tmp_path):
    """The class names of ImageNet-A, -R and -O follow from their folders."""
    write_tree(tmp_path / "imagenet-a", ["n01498041", "n07697537", "n12267677"], 1)
    (found,) = benchmarks.open_benchmarks(str(tmp_path / "imagenet-a"))
    assert found.classes == ["stingray", "hot dog", "acorn"] and found.labels.tolist() == [0, 1, 2]
    assert len(found.prompts) == 80 and "a bad photo of a {c}." in found.prompts
    every = benchmarks.imagenet_names()
    assert list(every) == sorted(every) and len(every) == 1000


def test_robustness_is_compared_on_the_same_classes(models, tmp_path):
    """The drop of a subset's set is against ImageNet's pictures and names of that subset."""
    encoder, chosen = models[1], [1, 3, 5]
    everything = write_classes(tmp_path / "imagenet1k", 90)
    subset = [COLOURS[c] for c in chosen]
    few = [(encoded(i), ("cls", str(i % 3))) for i in range(60, 91)]
    places = [
        write_set(tmp_path / "imagenet-a", few, classes=subset, prompts=PROMPTS),
        write_classes(tmp_path / "imagenet_sketch", 40),
        write_set(tmp_path / "objectnet", few, classes=["cup", "mug", "jug"], prompts=PROMPTS),
        write_set(tmp_path / "imagenet-o", few, classes=subset, prompts=PROMPTS),
    ]
    same = [(encoded(i), ("cls", str(chosen.index(label)))) for i, label in enumerate(LABELS[:90])
            if label in chosen]  # fmt: skip
    alone = write_set(tmp_path / "alone", same, classes=subset, prompts=PROMPTS)
    columns = {"full picture": (encoder, None)}
    found, _, problems = benchmarks.evaluate_sets(
        columns, [str(p) for p in (*places, everything, alone)], ()
    )
    assert problems == []
    acc1 = {name: entry["columns"]["full picture"]["acc1"] for name, entry in found.items()}
    drop = {name: entry["columns"]["full picture"].get("drop") for name, entry in found.items()}
    assert drop["imagenet-a"] == pytest.approx(acc1["alone"] - acc1["imagenet-a"])
    assert found["imagenet-a"]["against"] == f"imagenet1k, 3 classes, {len(same)} pictures"
    assert drop["imagenet_sketch"] == pytest.approx(acc1["imagenet1k"] - acc1["imagenet_sketch"])
    assert drop["objectnet"] == pytest.approx(acc1["imagenet1k"] - acc1["objectnet"])
    assert found["objectnet"]["against"] == "imagenet1k, 7 classes, 90 pictures"
    assert drop["imagenet-o"] is None and drop["alone"] is None
    assert 0 < found["imagenet-o"]["columns"]["full picture"]["aupr"] < 1
    table = evaluate.sets_table(found, "fp32")
    assert "imagenet-a T3, drop" in table and "imagenet1k T1 T2 T6 T7, acc1_one_prompt" in table


def test_the_papers_suite_takes_what_is_there_and_names_the_rest(tmp_path):
    write_classes(tmp_path / "imagenet1k", 7)
    write_classes(tmp_path / "wds_vtab-pets", 7)
    write_captions(tmp_path / "mscoco_captions", 7)
    write_tree(tmp_path / "imagenet-r/test", ["n01498041", "n07697537"], 1)
    (tmp_path / "food101").mkdir()  # empty
    places, captioned, missing = benchmarks.suite(tmp_path)
    assert {Path(p).name for p in places} == {
        "imagenet1k", "wds_vtab-pets", "imagenet-r"
    }  # fmt: skip
    assert [Path(p).name for p in captioned] == ["mscoco_captions"]
    assert len(benchmarks.SETS["T2"]) == 26 and len(missing) == 26 + 6 + 2 - 4
    assert any("clip-benchmark/wds_vtab-cifar10 " in line for line in missing)
    assert any("cub/CLASS/*.jpg" in line for line in missing)
    (pets,) = benchmarks.open_benchmarks(str(tmp_path / "wds_vtab-pets"))
    assert pets.name == "pets" and pets.metric == "mean_per_class_recall"
    assert benchmarks.suite(tmp_path / "imagenet1k")[:2] == ([], [])


# --- broken sets ----------------------------------------------------------------------------------


def png(width, height):
    """A header that claims a size, and next to nothing behind it."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + bytes(9)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks
    )


def thread():
    file = io.BytesIO()
    Image.new("RGB", (90_000, 1)).save(file, "PNG")
    return file.getvalue()


def test_each_broken_set_is_told_in_a_sentence_and_the_rest_goes_on(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cases, good = {}, write_classes(tmp_path / "good", 9)

    def broken(name, words, change=None):
        cases[name] = words
        if change:
            shutil.copytree(good, name)
            change(Path(name))

    def sample(*pair, **files):
        def change(folder):
            shutil.rmtree(folder)
            write_set(folder, [*[(encoded(i), ("cls", "0")) for i in range(3)], pair], 1,
                      **{"classes": COLOURS, "prompts": PROMPTS} | files)  # fmt: skip

        return change

    picture, cls = encoded(0), ("cls", "1")
    broken("names", "names/classnames.txt: missing or",
           lambda f: (f / "classnames.txt").unlink())  # fmt: skip
    broken("gap", "classnames.txt: line 2 is empty",
           lambda f: (f / "classnames.txt").write_text("a\n\nb\n"))  # fmt: skip
    broken("none", "classnames.txt: line 1 is empty",
           lambda f: (f / "classnames.txt").write_text(" \n\n"))  # fmt: skip
    (good / "classnames.txt").write_text("\n".join([*COLOURS, "", " \n"]))  # harmless
    broken("few", "class 5 has no name, 0 to 4 have",
           lambda f: (f / "classnames.txt").write_text("\n".join("abcde")))  # fmt: skip
    broken("count", "nshards.txt says 4; .tar files here: 3",
           lambda f: (f / "test/nshards.txt").write_text("4\n"))  # fmt: skip
    broken("lost", "nshards.txt says 3; .tar files here: 2", lambda f: (f / "test/1.tar").unlink())
    broken("other", "nshards.txt: missing", lambda f: (f / "test/nshards.txt").unlink())
    broken("torn", "test/2.tar: incomplete (cut short)",
           lambda f: (f / "test/2.tar").write_bytes((good / "test/2.tar").read_bytes()[:5120]))
    broken("empty", "test/2.tar: incomplete", lambda f: (f / "test/2.tar").write_bytes(b""))
    broken("prompt", "line 1 has no {c}",
           lambda f: (f / "zeroshot_classification_templates.txt").write_text("a photo"))
    broken("kind", "not one of classification",
           lambda f: (f / "dataset_type.txt").write_text("detection"))  # fmt: skip
    broken("word", "0.tar s0000003: no class number in its .cls",
           sample(picture, ("cls", "cat")))  # fmt: skip
    broken("far", "0.tar s0000003: no class number", sample(picture, ("cls", "9" * 20)))
    broken("alone", "s0000003 without a .cls", sample(picture, ("json", {})))
    broken("cut", "not a readable picture", sample(("jpg", picture[1][:200]), cls))
    broken("bomb", "over 67,108,864 pixels", sample(("png", png(10**5, 10**5)), cls))
    broken("thread", "over 67,108,864 pixels", sample(("png", thread()), cls))
    broken("nowhere", "nowhere: no such folder")
    broken("speech", "a set for retrieval: give it to --retrieval")
    write_captions(tmp_path / "speech", 3)
    broken("mute", "0.tar s0000000: no caption in its .txt")
    write_set(tmp_path / "mute", [(picture, ("txt", " \n"))], 1, kind=["retrieval"])
    broken("tree", "0 names for 2 folders")
    write_tree(tmp_path / "tree", ["n00000001", "n00000002"])
    broken("hollow", "no test/nshards.txt")
    (tmp_path / "hollow").mkdir()
    for name, content in (("sugar", "[1]"), ("crepe", '{"0": {"filename": 3}}')):
        broken(name, "not SugarCrepe's list of captions")
        (tmp_path / name).mkdir()
        (tmp_path / name / "swap_obj.json").write_text(content)
    columns = {"full picture": (models[1], None)}
    results, _, problems = benchmarks.evaluate_sets(columns, [*cases, "good"], ())
    assert list(results) == ["good"] and len(problems) == len(cases)
    for name, told in zip(cases, problems, strict=True):
        assert cases[name] in told and name in told and "\n" not in told, (name, told)


# --- the command ----------------------------------------------------------------------------------


def write_run(folder, first=0):
    """A finished run, as train.py leaves it, of models that were never trained."""
    folder.mkdir()
    files = ("pretrained.pt", "pretrain"), ("model.pt", "tune")
    for seed, (file, stage) in enumerate(files, start=first):
        torch.manual_seed(seed)
        model = glip.GLIP(glip.GLIPConfig(SIDE, 8, 64, 2, 2, 32, 64, 2, 2))
        glip.save_checkpoint(
            folder / file, model, config=asdict(TrainConfig()), stage=stage, step=1,
            mask=Masker("gaussian", 0.5).state(), steps={}, seconds={}, machine={},
            command="x", world=1, bf16=False,
        )  # fmt: skip
    return folder


def test_two_runs_are_compared_on_published_sets(tmp_path, monkeypatch, capsys):
    """Example by example, as by hand; a broken set is told, and the others are compared."""
    runs = write_run(tmp_path / "a"), write_run(tmp_path / "b", 2)
    classes, captions = write_classes(tmp_path / "classes"), write_captions(tmp_path / "captions")
    (runs[0] / "results.json").write_text('{"held_out": {"a": 1}, "benchmarks": {"old": {}}}')
    code, out, err = run_main(
        monkeypatch, capsys, *runs, "--zero-shot", classes, "nowhere",
        "--retrieval", captions, "--precision", "fp32",
    )  # fmt: skip
    assert code == 2 and err.startswith("evaluate.py: nowhere: no such folder")
    sides = []
    for folder in runs:
        text = (folder / "results.json").read_text()
        entries = json.loads(text)["benchmarks"]
        assert entries.keys() - {"old"} == {"classes", "captions"} and str(tmp_path) not in text
        assert list(entries["classes"]["columns"]) == [
            "masked inference", "full picture", "after tuning"
        ]  # fmt: skip
        model, _ = glip.load_model(folder / "model.pt")
        encoder = Encoder(model, Device(torch.device("cpu"), bf16=False))
        (found,) = benchmarks.open_benchmarks(str(classes))
        blocks = benchmarks.image_features({"x": (encoder, None)}, found, 0, 1)
        names = benchmarks.class_features(encoder, COLOURS, PROMPTS)
        right = (benchmarks.joined([blocks])["x"] @ names.T).argmax(1).numpy() == LABELS[:53]
        sides.append(right)
    kept = json.loads((runs[0] / "results.json").read_text())
    assert kept["held_out"] == {"a": 1} and kept["benchmarks"]["old"] == {}
    wanted = significance.difference(*sides)
    assert wanted["low"] < wanted["high"]
    lines = out[out.index("A: ") :].splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("classes, after tuning"))
    assert lines[place + 1].startswith("acc1 ") and (
        f"{100 * wanted['difference']:+.1f} ({100 * wanted['low']:+.1f} to "
        f"{100 * wanted['high']:+.1f})" in lines[place + 1]
    )
    assert " of 24 differences are real" in lines[-2]  # in 3 columns 2 metrics, and 6
    for words, told in (
        ((*runs, "--zero-shot", classes, "--publish"), "published sets and --publish: give"),
        ((runs[0], "--zero-shot", classes, "--robustness"), "sets and --robustness: give"),
    ):
        code, _, err = run_main(monkeypatch, capsys, *words)
        assert code == 2 and told in err


def test_a_mean_over_classes_has_its_own_interval(models, tmp_path):
    """Of a rare class alone right and a common one wrong, it is around a half, and not acc1's."""
    samples = [(encoded(i), ("cls", str(int(i < 5)))) for i in range(40)]
    folder = write_set(tmp_path / "pets", samples, classes=["red", "blue"], prompts=["{c}"])
    oracle = Oracle(models[1].model, torch.eye(2)[[1] * 20 + [0] * 4 + [1] * 16],
                    lambda text: torch.eye(2)[int("blue" in text)])  # fmt: skip
    found = ours(oracle, folder)["pets"]
    share = found["columns"]["full picture"]["mean_per_class_recall"]
    assert share == pytest.approx((1 + 4 / 35) / 2)
    low, high = found["intervals"]["full picture"]["mean_per_class_recall"]
    assert 0.5 <= low < share < high < 0.65
    told = f"{100 * share:.1f} ({100 * low:.1f}-{100 * high:.1f})"
    assert told in evaluate.sets_table({"pets": found}, "fp32")


def test_answers_about_one_picture_are_one_example(models, tmp_path):
    """Intervals of captions that are right or wrong together are those of so many pictures."""
    lines = ["\n".join(f"picture {i} said {w}" for w in range(5)) for i in range(40)]
    samples = [(encoded(i), ("txt", text)) for i, text in enumerate(lines)]
    flickr = write_set(tmp_path / "flickr", samples, kind=["retrieval"])
    sugar = write_sugar_crepe(tmp_path / "sugar")
    rows = json.loads((sugar / "swap_obj.json").read_text())
    for place, row in enumerate(rows.values()):  # three questions about each of four pictures
        row["filename"] = f"{3 - place // 3}.jpg"
    (sugar / "swap_obj.json").write_text(json.dumps(rows))

    def words(text):
        if text.startswith("picture"):  # of the second half another picture is found
            number = int(text.split()[1])
            return torch.eye(40)[number if number < 20 else 20 + (number + 1) % 20]
        return torch.eye(40)[0 if text[-3:] == "mat" else 39]

    oracle = Oracle(models[1].model, torch.eye(40), words)
    found, answers, _ = benchmarks.evaluate_sets({"c": (oracle, None)}, (), [str(flickr)])
    half = significance.interval(np.arange(40) < 20)
    for way in ("image", "text"):
        assert found["flickr"]["columns"]["c"][f"{way}_retrieval_recall@1"] == 0.5
        drawn = found["flickr"]["intervals"]["c"][f"{way}_retrieval_recall@1"]
        assert drawn == pytest.approx(half, abs=0.03)
    right = answers["flickr"]["c"]["image_retrieval_recall@1"]
    row = significance.difference(right, np.full((40, 2), 5))
    assert row["p"] == pytest.approx(2 * 0.5**20) and row["difference"] == 0.5
    oracle.given = torch.eye(40)[[0] * 6 + [39] * 6]
    found = ours(oracle, sugar, captions=True)["sugar_crepe/swap_obj"]
    assert found["columns"]["full picture"]["text_acc"] == 0.5
    assert found["intervals"]["full picture"]["text_acc"] == (0, 1)  # two of four


def test_the_suite_probes_what_has_training_pictures(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "a")
    samples = [(encoded(i), ("cls", str(label))) for i, label in enumerate(LABELS[:90])]
    for split, part in (("train", samples[:60]), ("test", samples[60:])):
        write_set(tmp_path / "sets/wds_vtab-cifar10", part, split=split, classes=COLOURS,
                  prompts=PROMPTS)  # fmt: skip
    write_classes(tmp_path / "sets/mnist", 9)
    code, out, _ = run_main(monkeypatch, capsys, run, "--suite", "paper", "--root",
                            tmp_path / "sets")  # fmt: skip
    results = json.loads((run / "results.json").read_text())
    assert code == 0 and set(results["benchmarks"]) == {"cifar10", "mnist"}
    nothing = run_main(monkeypatch, capsys, run, "--suite", "paper", "--root", tmp_path / "a")
    assert nothing[0] == 2 and "none of the paper's sets" in nothing[2]
    assert "download --repo-type dataset clip-benchmark/wds_imagenet1k " in nothing[1]
    assert out.index("missing: food101") < out.index("set, metric") < out.index(" in bf16" if
        use_bf16("auto", torch.device("cpu")) else " in fp32")  # fmt: skip
    assert results["linear_probe"].keys() == {"cifar10"}
    assert results["linear_probe"]["cifar10"]["test"] == 30
    assert "linear probe, cifar10" in out and "missing: food101" in out
    (tmp_path / "sets/wds_vtab-cifar10/train/1.tar").unlink()
    (run / "results.json").unlink()
    code, out, err = run_main(monkeypatch, capsys, run, "--suite", "paper", "--root",
                              tmp_path / "sets")  # fmt: skip
    results = json.loads((run / "results.json").read_text())
    assert code == 2 and "cifar10/train: nshards.txt says 3; .tar" in err and "missing: food" in out
    assert set(results["benchmarks"]) == {"cifar10", "mnist"} and "linear_probe" not in results


def test_two_processes_have_the_numbers_of_one(models, tmp_path, monkeypatch):
    """As two threads that meet as processes would; a set that one of them cannot read is broken."""
    monkeypatch.setattr(benchmarks, "BLOCK", 10)
    classes = write_classes(tmp_path / "classes", 25)  # three blocks, 10, 10 and 5
    few = write_classes(tmp_path / "few", 9)  # the second process has none of them
    captions = write_captions(tmp_path / "captions", 27)
    masked = Masker("gaussian", 0.5)
    columns = {"masked": (models[1], masked), "full": (models[1], None)}
    places = [str(classes), str(few)], [str(captions)]
    barrier, given, found = threading.Barrier(2), {}, {}
    mine = threading.local()

    def gather(parts, own):
        barrier.wait()
        given[mine.rank] = own
        barrier.wait()
        parts[:] = [given[0], given[1]]

    def process(rank):
        mine.rank = rank
        found[rank] = benchmarks.evaluate_sets(columns, *places, rank, 2)

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    wanted = benchmarks.evaluate_sets(columns, *places)
    assert wanted[2] == [] and len(wanted[0]) == 3
    for broken in (False, True):
        if broken:  # a picture of the second process's block
            shutil.rmtree(classes)
            samples = [*map(encoded, range(24)), ("jpg", encoded(0)[1][:200])]
            write_set(classes, [(picture, ("cls", "0")) for picture in samples],
                      classes=COLOURS, prompts=PROMPTS)  # fmt: skip
        threads = [threading.Thread(target=process, args=[rank]) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        results, answers, problems = found[0]
        assert found[1] == ({}, {}, problems) and len(problems) == broken
        assert list(results) == ["classes", "few", "captions"][broken:]
        for name, entry in results.items():
            assert entry == wanted[0][name]
            for column, right in answers[name].items():
                assert all((right[k] == wanted[1][name][column][k]).all() for k in right)
        shown = [entry["columns"] for entry in results.values()]
        assert any(table["masked"] != table["full"] for table in shown)
    assert "classes/test/2.tar s0000024: not a readable picture" in problems[0]


@pytest.mark.proof
def test_the_command_on_two_processes(tmp_path, monkeypatch, capsys):
    """One table and one sentence, and the numbers of one process."""
    run, classes = write_run(tmp_path / "small"), write_classes(tmp_path / "classes", 12)
    words = [str(run), "--zero-shot", str(classes), "nowhere", "--precision", "fp32"]
    code, out, told = run_main(monkeypatch, capsys, *words)
    assert code == 2 and "nowhere: no such folder" in told and out.count("classes, acc1 ") == 1
    alone = json.loads((run / "results.json").read_text())
    done = command(*TORCHRUN, str(ROOT / "evaluate.py"), str(run), *words, "--device", "cpu")
    (told,) = (row for row in done.stderr.splitlines() if row.startswith("evaluate.py: "))
    assert done.returncode != 0 and "nowhere: no such folder" in told
    assert done.stdout.count("classes, acc1 ") == 2  # compared with itself
    assert done.stdout.count("0 of 6 differences are real") == 1
    assert json.loads((run / "results.json").read_text())["benchmarks"] == alone["benchmarks"]
