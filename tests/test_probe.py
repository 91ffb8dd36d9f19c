"""The probe against scikit-learn, labelled folders, features that are computed once."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import glip
from nanoglip import files
from nanoglip.evals import figures, probe
from nanoglip.evals.encoder import Encoder
from nanoglip.machine import Device
from tests.test_significance import made_run, run_main


def blobs(n=900, width=20, classes=5, noise=1.5, seed=0):
    """Overlapping clusters of correlated features, standardised."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, classes, n)
    x = draw.standard_normal((classes, width))[labels] + noise * draw.standard_normal((n, width))
    x = x @ draw.standard_normal((width, width))
    return (x - x.mean(0)) / x.std(0), labels


def make_folder(root, counts, parts=("train", "test"), size=20):
    """Plain coloured pictures with noise, a class a colour."""
    draw = np.random.default_rng(0)
    for part in parts:
        for c, count in enumerate(counts):
            place = root / part / f"class_{c}"
            place.mkdir(parents=True)
            for i in range(count):
                colour = np.array([(c * 90) % 256, (c * 160 + 40) % 256, 200 - c * 60 % 200])
                pixels = colour + draw.integers(-25, 26, (size, size, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{i}.png")
    return root


def make_run(folder, seed=0):
    """A run's folder with an untrained model, and its encoder."""
    torch.manual_seed(seed)
    model = glip.GLIP(glip.GLIPConfig(16, 8, 24, 1, 3, 10, 20, 1, 2))
    folder.mkdir(exist_ok=True)
    glip.save_checkpoint(folder / "model.pt", model)
    return Encoder(model, Device(torch.device("cpu"), bf16=False))


# --- logistic regression ------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("strength", [0.01, 10.0])
def test_regression_has_scikit_learns_coefficients(classes, strength):
    x, y = blobs(classes=classes)
    plain = LogisticRegression(C=strength, tol=1e-8, max_iter=5000).fit(x, y)
    features, labels = torch.from_numpy(x), torch.from_numpy(y)
    weight, bias = probe.regress(features, labels, strength, tolerance=1e-8)
    coefficients = plain.coef_.T if classes > 2 else plain.coef_.T * [[-0.5, 0.5]]
    np.testing.assert_allclose(weight.numpy(), coefficients, atol=2e-5)
    shares = (features @ weight + bias).softmax(1).numpy()
    np.testing.assert_allclose(shares, plain.predict_proba(x), atol=1e-5)


def test_large_sets_have_the_accuracy_of_scikit_learn(monkeypatch):
    """The same sweep, by either way, on a set that fits: equal within a tenth of a point."""
    x, y = blobs(6000, 16, 8, noise=2.0)
    x = x.astype(np.float32)
    parts = np.split(np.arange(6000), [2500, 3000])
    small = probe.probe(x, y, parts)
    monkeypatch.setattr(probe, "LARGE", 1)
    large = probe.probe(x, y, parts)
    assert 0.3 < small["accuracy"] < 0.95
    assert large["accuracy"] == pytest.approx(small["accuracy"], abs=0.001 + 1e-9)
    assert small["test"] == large["test"] == 3000


def test_few_shot_draws_so_many_of_each_class_and_more_are_better():
    digits = load_digits()
    x, y = digits.data.astype(np.float32), digits.target
    rest, test = probe.hold_out(y, np.arange(len(y)), seed=1)
    found = probe.probe(x, y, [*probe.hold_out(y, rest), test], few_shot=True)["few_shot"]
    assert list(found) == ["1", "2", "4", "8", "16"]
    assert all(len(row["draws"]) == 3 == len(set(row["draws"])) for row in found.values())
    assert found["1"]["mean"] < found["4"]["mean"] < found["16"]["mean"]
    drawn = [probe.sample(y, rest, 4, draw) for draw in (0, 0, 1)]
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
    assert set(np.bincount(y[drawn[0]])) == {4} and np.isin(drawn[0], rest).all()


def test_splits_hold_out_a_fifth_of_every_class():
    labels = np.repeat([0, 1, 2], [50, 11, 2])
    rest, held = probe.hold_out(labels, np.arange(63))
    assert np.array_equal(np.sort(np.concatenate([rest, held])), np.arange(63))
    assert np.bincount(labels[held]).tolist() == [10, 2, 1]


# --- labelled folders ---------------------------------------------------------------------------


def test_folders_are_read_in_each_of_the_three_layouts(tmp_path):
    root = make_folder(tmp_path / "a", (10, 5))
    source, (train, valid, test) = probe.labelled(root, 16, "--probe-data")
    assert source.captions == ["class_0", "class_1"]
    where = [{source.paths[i].parts[-3] for i in ids} for ids in (train, valid, test)]
    assert where == [{"train"}, {"train"}, {"test"}] and len(valid) == 3
    shutil.copytree(root / "test", root / "val")
    split = probe.labelled(root, 16, "--probe-data")
    where = [{split[0].paths[i].parts[-3] for i in ids} for ids in split[1]]
    assert where == [{"train"}, {"val"}, {"test"}]
    source, split = probe.labelled(root / "train", 16, "--probe-data")
    assert [len(ids) for ids in split] == [10, 2, 3]
    assert len(set(np.concatenate(split))) == len(source) == 15


def test_features_are_computed_once_for_each_content(tmp_path, monkeypatch):
    encoder = make_run(tmp_path / "run")
    folder = make_folder(tmp_path / "colours", (12, 12, 12))
    count = []
    once = encoder.images
    monkeypatch.setattr(encoder, "images", lambda *a, **k: count.append(1) or once(*a, **k))

    def probed():
        opened = probe.open_set(folder, 16)
        return probe.probe_all(encoder, tmp_path / "run", [opened], embedded=False)["colours"]

    first = probed()
    assert first["accuracy"] == 1.0 and len(count) == 1
    assert probed() == first and len(count) == 1
    picture = folder / "train" / "class_0" / "3.png"
    Image.new("RGB", (30, 30), "red").save(picture)
    probed()
    assert len(count) == 2  # a picture has changed
    os.utime(picture, ns=(1, 1))
    probed()
    assert len(count) == 3  # so it says
    make_run(tmp_path / "run", seed=1)
    probed()
    assert len(count) == 4  # the checkpoint has changed


def test_bad_folders_are_told_in_a_sentence(tmp_path):
    good = make_folder(tmp_path / "good", (6, 6))
    cases = {"nowhere": "is no folder"}
    (tmp_path / "empty").mkdir()
    cases["empty"] = "fewer than two classes"
    make_folder(tmp_path / "alone", (6, 6), parts=("train",))
    cases["alone"] = "has train/ alone"
    shutil.copytree(good, tmp_path / "hole")
    (tmp_path / "hole/train/class_2").mkdir()
    cases["hole"] = "class_2 holds no picture"
    shutil.copytree(good, tmp_path / "new")
    shutil.copytree(good / "test/class_0", tmp_path / "new/test/class_9")
    cases["new"] = "class 'class_9' has 0 of the 2 pictures needed in train/"
    make_folder(tmp_path / "few", (6, 2), parts=("",))
    cases["few"] = "class 'class_1' has 2 of the 3 pictures needed"
    for name, words in cases.items():
        with pytest.raises(glip.InputError, match=words) as told:
            probe.labelled(tmp_path / name, 16, "--probe-data")
        assert str(told.value).startswith("--probe-data ") and "\n" not in str(told.value)
    encoder = make_run(tmp_path / "run")
    for i in (1, 4):
        (good / f"train/class_1/{i}.png").write_bytes(b"no picture")
    opened = probe.open_set(good, 16)
    with pytest.raises(glip.InputError, match=r"2 of 24 pictures .*train/class_1/1.png \("):
        probe.probe_all(encoder, tmp_path / "run", [opened], embedded=False)
    assert not list((tmp_path / "run").glob("features-*"))


def test_kept_arrays_that_are_torn_are_computed_again(tmp_path):
    """And where nothing can be kept, what was computed is not lost."""
    path, wanted = tmp_path / "x.npy", np.arange(1000, dtype=np.float32)
    for content in (None, b"", b"torn", b"PK\x03\x04", "cut", "short"):
        if content == "cut":
            path.write_bytes(path.read_bytes()[:-80])
        elif content == "short":
            np.save(path, wanted[:900])
        elif content is not None:
            path.write_bytes(content)
        assert (files.cached_array(path, 1000, wanted.copy) == wanted).all()
        assert (files.cached_array(path, 1000, lambda: None) == wanted).all()
    assert (files.cached_array(path / "x.npy", 1000, wanted.copy) == wanted).all()


def test_the_command_probes_folders(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(figures, "draw_all", lambda *_: [])
    made_run(tmp_path / "run")
    make_folder(tmp_path / "colours", (20, 20, 20))
    words = "run", "--precision", "fp32"
    code, out, _ = run_main(monkeypatch, capsys, *words, "--probe-data", "colours", "--few-shot")
    assert code == 0 and "linear probe, colours" in out and "  16 a class" in out
    assert "digits" not in out
    found = json.loads((tmp_path / "run/results.json").read_text())["linear_probe"]["colours"]
    assert found["accuracy"] == 1.0 and found["test"] == 60
    (tmp_path / "x").mkdir()
    shutil.copytree("colours", "x/colours")
    for extra, sentence in ((["--few-shot"], "add --linear-probe"),
                            (["--probe-data", "x", "no"], "--probe-data x: fewer than two classes"),
                            (["--probe-data", "colours", "x/colours"], "rename one")):  # fmt: skip
        code, _, told = run_main(monkeypatch, capsys, *words, *extra)
        assert code == 2 and sentence in told
