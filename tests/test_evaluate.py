"""Metrics against plain loops, the probe against scikit-learn, the command end to end."""

import json
import os
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import data
import evaluate
import glip
import train
from nanoglip.evals import figures, probe
from nanoglip.evals.encoder import (
    EVERY,
    Encoder,
    accuracy_by_place,
    prompted,
    robustness,
    shares_of,
)
from nanoglip.evals.metrics import ranks, retrieval, zero_shot
from nanoglip.machine import Device
from nanoglip.masker import Masker
from nanoglip.masks import MASKS
from nanoglip.noise import uniform
from nanoglip.sources.emoji import Emoji
from nanoglip.sources.pictures import HeldOut
from tests.test_data import make_pictures
from tests.test_model import broken_checkpoints
from tests.test_train import inside

pytestmark = pytest.mark.slow  # it trains, kills or fetches


def features(n, width=32, seed=0):
    return F.normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_perfect_features_score_100_and_permuted_ones_chance():
    names, flags = features(50), np.arange(50) % 5 == 0
    concept = np.random.default_rng(0).integers(0, 50, 400)
    perfect = shares_of(zero_shot(names[concept], names, concept, flags))
    assert set(perfect.values()) == {1.0} and len(perfect) == 4
    chance = zero_shot(features(20_000, seed=1), names, np.arange(20_000) % 50, flags)
    chance = shares_of(chance)
    assert chance["zero-shot top-1"] == pytest.approx(1 / 50, abs=0.005)
    assert chance["zero-shot top-5"] == pytest.approx(5 / 50, abs=0.01)
    assert chance["zero-shot top-5 without flags"] == pytest.approx(5 / 40, abs=0.01)


def test_equal_scores_are_not_counted_as_right():
    scores = torch.zeros(3, 10)
    right = F.one_hot(torch.tensor([0, 4, 9]), 10).bool()
    assert ranks(scores, right).tolist() == [9, 9, 9]
    assert ranks(scores * torch.nan, right).tolist() == [9, 9, 9]  # a broken model is not perfect


def test_without_flags_neither_asks_for_nor_offers_flags():
    names, flags = features(6), np.array([True, True, False, False, False, False])
    concept = np.array([0, 1, 2, 3])
    images = names[[1, 0, 0, 3]]  # flags confused with each other, and 2 taken for a flag
    result = shares_of(zero_shot(images, names, concept, flags))
    assert result["zero-shot top-1"] == 0.25
    scores = (images[2:] @ names[2:].T).argmax(1) + 2
    wanted = (scores == torch.tensor([2, 3])).double().mean().item()
    assert result["zero-shot top-1 without flags"] == wanted


def test_the_gallery_shows_the_runs_own_gaze():
    """A gaze that was taught the upper left corner keeps it in the gallery, too."""
    test = data.load("emoji", 32, ("Goog",), "Twtr")[1]
    test.concept = test.concept[:200]
    model, own = glip.GLIP(glip.GLIPConfig.named("ViT-nano-8", 32)), Masker("gaze", 0.75)
    with torch.no_grad():
        own.looking(model.visual).position.copy_(-torch.arange(16.0))
    drawn = figures.draw_masks(test, np.arange(2), model, own)
    kept = {axes.get_title(): axes for axes in drawn.axes if axes.get_title()}
    column = drawn.axes[: len(MASKS)].index(kept["gaze"])
    share = drawn.axes[2 * len(MASKS) + column].images[0].get_array()
    assert share.argmax() == 0 and share[0, 0] > 2 * share[2, 2]


def test_an_object_is_moved_to_each_place():
    """A stand-in that is right where the object lies in the upper left quarter."""
    test = data.load("scenes-center", 32, ("Goog",), "Twtr")[1]
    test.concept = test.concept[:12]
    bare = test.placed(0, 0)
    bare.parts[0][0].art = bare.parts[0][0].art * 0  # without an object

    class Eyes:
        def images(self, render, count):
            seen = (render(np.arange(count)) != bare.render(EVERY * np.arange(count))).any(1)
            seen = seen.float().mean(0)                                        # (32, 32)
            self.features = torch.eye(len(test.captions))[test.concept[::EVERY]]
            return self.features if seen[:16, :16].sum() > 0.9 * seen.sum() else -self.features

        def texts(self, captions):
            return torch.eye(len(captions))

    found = np.array(accuracy_by_place(Eyes(), test))
    assert found.shape == (7, 7) and found[:2, :2].all() and found.sum() == 4
    with pytest.raises(glip.InputError, match="name a run on scenes"):
        data.load("emoji", 32, ("Goog",), "Twtr")[1].placed(0, 0)


def test_robustness_changes_pixels_and_only_them():
    """A stand-in that encodes the pictures' bytes: what each change should do is known."""
    seen = {}

    class Pixels:
        def images(self, render, count, masker=None):
            seen[len(seen)] = render(np.arange(count))
            return F.normalize(seen[len(seen) - 1].flatten(1).float(), dim=-1)

        def texts(self, captions):
            return features(len(captions), width=3 * 64 * 64)

    art = Emoji("emoji", 64, ("Twtr",), "test")
    art.concept = art.concept[:40]
    found = robustness(Pixels(), art)
    plain, *changed = seen.values()
    pictures = dict(zip(found, (plain, *changed), strict=True))
    assert all(p.shape == plain.shape and p.dtype == torch.uint8 for p in changed)
    assert torch.equal(plain, art.render(np.arange(40)))
    assert all((p != plain).any() for p in changed)
    assert (pictures["grey"][:, 0] == pictures["grey"][:, 2]).all()
    assert (pictures["turned, 40°"][:, :, 0, 0] == 255).all()  # the corner is laid open
    loss = [(pictures[f"blurred, {n} px"].float() - plain).abs().mean() for n in (1, 2)]
    assert 0 < loss[0] < loss[1]
    assert all("zero-shot top-1" in table for table in found.values())


def test_prompts_are_asked_one_by_one():
    """A stand-in that knows names after "an image of" alone: all are right there, none elsewhere.
    """
    source = Emoji("emoji", 64, ("Twtr",), "test")
    art = HeldOut([source], [source.held])
    table = dict(zip(art.captions, torch.eye(len(art.captions)), strict=True))

    class Knower:
        def texts(self, captions):
            if not captions[0].startswith("an image of a"):
                return torch.zeros(len(captions), len(table))
            return torch.stack([table[caption.split(" ", 4)[4]] for caption in captions])

    found = prompted(Knower(), art, torch.eye(len(art.captions))[art.concept])
    assert found.pop("an image of a ...") == 1 and "a photo of a ..." in found
    assert set(found.values()) == {0}


def test_retrieval_equals_a_plain_loop():
    images, texts = features(90, 8), features(30, 8, seed=2)
    concept = torch.arange(90) % 30
    result = shares_of(retrieval(images, texts, concept))
    for k in (1, 5, 10):
        hits = sum(
            int(concept[i]) in (images[i] @ texts.T).argsort(descending=True)[:k] for i in range(90)
        )
        assert result[f"image to text R@{k}"] == pytest.approx(hits / 90)
        hits = 0
        for j in range(30):  # any of the caption's three pictures counts
            best = (images @ texts[j]).argsort(descending=True)
            wrong_before = 0
            for i in best.tolist():
                if concept[i] == j:
                    break
                wrong_before += 1
            hits += wrong_before < k
        assert result[f"text to image R@{k}"] == pytest.approx(hits / 30)


def test_recall_within_all_candidates_is_left_out():
    """Of 5 captions R@5 and R@10 must be 100 %, of 6 R@10 must; a single one cannot be asked."""
    for captions, within in ((1, ()), (5, (1,)), (6, (1, 5)), (11, (1, 5, 10))):
        found = retrieval(features(40), features(captions), torch.arange(40) % captions)
        ways = ("image to text", "text to image")
        assert set(shares_of(found)) == {f"{way} R@{k}" for way in ways for k in within}


def test_every_picture_is_encoded_once_whatever_the_block():
    torch.manual_seed(0)
    model = glip.GLIP(glip.GLIPConfig(16, 8, 24, 1, 3, 10, 20, 1, 2))
    encoder = Encoder(model, Device(torch.device("cpu"), bf16=False))
    images = torch.rand(300, 3, 16, 16)
    found = encoder.images(lambda ids: images[ids], 300)
    with torch.no_grad():
        torch.testing.assert_close(found, model.encode_image(images), atol=1e-6, rtol=0)
    masked = Masker("gaussian", 0.5)
    a, b = (encoder.images(lambda ids: images[ids], 300, masked) for _ in range(2))
    assert torch.equal(a, b) and not torch.allclose(a, found)
    assert torch.allclose(encoder.images(lambda ids: images[ids], 280, masked), a[:280], atol=1e-6)


def test_probe_equals_scikit_learn_and_never_sees_the_test_labels():
    digits = load_digits()
    x, y, groups = digits.data.astype(np.float32), digits.target, np.arange(len(digits.target))
    found = probe.probe(x, y, probe.split_groups(y, groups))
    rng_split = np.random.RandomState(0).permutation(len(y))  # as GroupShuffleSplit draws it
    size = int(np.ceil(0.2 * len(y)))
    test, rest = np.sort(rng_split[:size]), np.sort(rng_split[size:])
    plain = make_pipeline(StandardScaler(), LogisticRegression(C=found["C"], max_iter=2000))
    assert found["test"] == len(test)
    assert found["accuracy"] == pytest.approx(plain.fit(x[rest], y[rest]).score(x[test], y[test]))
    assert found["accuracy"] > 0.95
    spoilt = y.copy()
    spoilt[test] = np.random.default_rng(0).permutation(spoilt[test])
    blind = probe.probe(x, spoilt, probe.split_groups(spoilt, groups))
    assert blind["C"] == found["C"] and blind["accuracy"] < 0.2


def test_probe_keeps_groups_together():
    """Features that only tell the group say nothing about the label of another group."""
    groups = np.repeat(np.arange(60), 5)
    labels = np.random.default_rng(0).integers(0, 2, 60)[groups]
    x = np.eye(60, dtype=np.float32)[groups]
    assert probe.probe(x, labels, probe.split_groups(labels, groups))["accuracy"] < 0.85


def test_train_then_evaluate_by_the_readmes_commands(tmp_path, monkeypatch, capsys):
    """In an empty folder: of two runs the one written last is evaluated; numbers and pictures."""
    monkeypatch.chdir(tmp_path)
    words = ["--batch-size", "32", "--image-size", "32", "--steps", "4", "--eval-every", "100",
             "--precision", "fp32", "--tune-epochs", "0.01", "--tune-batch-size", "32", "--data",
             "scenes-center"]  # fmt: skip
    done = inside(monkeypatch, capsys, train.main, "train.py", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    (run,) = (tmp_path / "runs").iterdir()
    (tmp_path / "runs/older").mkdir()
    (tmp_path / "runs/older/model.pt").touch()
    os.utime(tmp_path / "runs/older/model.pt", (1, 1))
    own, told = f"runs/{run.name}", done.stdout.splitlines()[-1]
    for word in (f"{own}/model.pt", f"{own}/report.html", f"python evaluate.py {own}"):
        assert word in told
    words = ["evaluate.py", "--linear-probe", "--precision", "fp32"]
    done = inside(monkeypatch, capsys, evaluate.main, *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"top5.png", "retrieval.png", f"{own}/report.html"} <= set(
        re.split("[, ;]+", done.stdout.splitlines()[-1])
    )
    shown = (run / "report.html").read_text()
    assert shown.count("Evaluation: held-out pairs") == 1 and "zero-shot top-1" in shown
    assert ", fp32, seed 0; " in done.stdout
    results = json.loads((run / "results.json").read_text())
    assert set(results["held_out"]) == {"masked inference", "full picture", "after tuning"}
    assert results["counts"]["held-out pictures"] == 1809
    assert set(results["linear_probe"]) == {"digits", "MNIST-5k", "vendor of an emoji"}
    assert results["steps"] == {"pretrain": 4, "tune": 3} and results["config"]["seed"] == 0
    assert {"cpu", "cores", "memory_gib", "commit", "versions"} <= set(results["trained_on"])
    assert str(tmp_path) not in json.dumps(results)
    for name in ("loss.png", "masks.png", "top5.png", "retrieval.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    # Each column is its own model's: top-5 once more, by a plain loop without evaluate's code.
    _, test = data.load("scenes-center", 32)
    noise = torch.from_numpy(uniform(0, "masked inference", 0, 1809, 16))
    ids = glip.sample_ids_keep("gaussian", 1809, 4, 0.75, noise=noise)
    columns = {
        "masked inference": ("pretrained.pt", ids), "full picture": ("pretrained.pt", None),
        "after tuning": ("model.pt", None),
    }  # fmt: skip
    images, wanted = test.render(np.arange(1809)), torch.from_numpy(test.concept)
    for column, (file, ids) in columns.items():
        model, _ = glip.load_model(run / file)
        with torch.no_grad():
            scores = model.encode_image(images, ids) @ model.encode_text(
                glip.tokenize(test.captions)
            ).T
        hits = (scores.topk(5).indices == wanted[:, None]).any(1).double().mean().item()
        found = results["held_out"][column]["zero-shot top-5"]
        assert found == pytest.approx(hits, abs=2.5 / 1809), column
        assert f"{100 * found:.1f} %" in done.stdout
    assert len({json.dumps(t) for t in results["held_out"].values()}) == 3


def test_own_pictures_are_evaluated_by_retrieval(tmp_path, monkeypatch, capsys):
    make_pictures(tmp_path / "own", 60)
    words = ["--data", "own", "--batch-size", "8", "--tune-batch-size", "8", "--image-size", "16",
             "--steps", "3", "--tune-epochs", "0.3", "--precision", "fp32",
             "--workers", "1"]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for main, *arguments in ((train.main, "train.py", *words), (evaluate.main, "evaluate.py")):
        done = inside(monkeypatch, capsys, main, *arguments)
        assert done.returncode == 0, done.stderr[-2000:]
        if main is train.main:
            (count,) = set(re.findall(r"; held out: (\d+) pictures; ", done.stdout))
    (run,) = (tmp_path / "runs").iterdir()
    results = json.loads((run / "results.json").read_text())
    assert results["counts"]["held-out pictures"] == int(count)
    guesses = re.findall(r"^(.* R@1) .*   chance (.*)%$", done.stdout, re.MULTILINE)
    share = 100 / results["counts"]["captions"]
    assert [name for name, _ in guesses] == ["image to text R@1", "text to image R@1"]
    assert [float(guess) for _, guess in guesses] == pytest.approx([share] * 2, abs=0.005)
    done = inside(monkeypatch, capsys, train.main, "train.py", *words, "--out", "x",
                  "--batch-size", "900")  # fmt: skip
    assert done.returncode == 2 and done.stderr.endswith(f"; held out: {count} pictures\n")
    assert "text to image R@1" in results["held_out"]["after tuning"]
    assert "zero-shot top-1" not in results["held_out"]["after tuning"]
    assert (run / "retrieval.png").exists()


def test_bad_runs_are_told_in_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cases = {"": "runs/ holds no finished run", "nowhere": "no model.pt in it"}
    for i, file in enumerate(broken_checkpoints(tmp_path)):
        if file.exists():
            run = tmp_path / f"run{i}"
            run.mkdir()
            file.rename(run / "model.pt")
            cases[run.name] = "model.pt"
    for name, words in cases.items():
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *([name] if name else [])])
        with pytest.raises(SystemExit) as stopped:
            evaluate.main()
        told = capsys.readouterr().err.strip().splitlines()
        assert stopped.value.code == 2 and told[-1].startswith("evaluate.py: ")
        assert words in told[-1], name
    assert not (tmp_path / "executed").exists()
