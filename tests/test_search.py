"""Search, classification and attention on pictures of many formats, by the command's own words."""

import numpy as np
import pytest
import torch
from PIL import Image

import glip
from nanoglip.evals import search
from nanoglip.evals.encoder import Encoder
from nanoglip.machine import Device
from nanoglip.sources import pictures
from tests.test_significance import run_main

COLOURS = {"red": (220, 20, 20), "green": (20, 180, 40), "blue": (30, 40, 210)}


@pytest.fixture
def run(tmp_path):
    """A folder with a model.pt alone: no training record, no data."""
    torch.manual_seed(0)
    model = glip.GLIP(glip.GLIPConfig(32, 8, 24, 2, 3, 16, 20, 1, 2))
    (tmp_path / "run").mkdir()
    glip.save_checkpoint(tmp_path / "run/model.pt", model)
    return tmp_path / "run"


@pytest.fixture
def folder(tmp_path):
    """Readable pictures of every format and of odd shapes and modes, and what is none."""
    place, draw = tmp_path / "pictures", np.random.default_rng(0)
    (place / "deep" / "er").mkdir(parents=True)
    sizes = [(1, 1), (3, 900), (64, 64), (200, 31), (32, 32), (500, 400)]
    for k, (suffix, size) in enumerate(zip(sorted(pictures.SUFFIXES), sizes, strict=True)):
        image = Image.fromarray(draw.integers(0, 255, (*size, 3), dtype=np.uint8))
        image = image.convert("L" if k % 2 else "RGB")
        image.save(place / ("deep/er" if k % 3 else ".") / f"{k}$a_{{x{suffix.upper()}")
    Image.new("RGBA", (40, 50), (200, 0, 0, 90)).save(place / "clear.png")
    Image.new("CMYK", (40, 50)).save(place / "cmyk.jpg")
    (place / "torn.jpg").write_bytes((place / "cmyk.jpg").read_bytes()[:300])
    (place / "text.png").write_text("no picture")
    (place / "broken.gif").symlink_to(place / "nothing")
    (place / "0.txt").write_text("a caption")
    return place


def test_search_ranks_as_a_plain_loop_and_names_what_it_cannot_read(
    run, folder, monkeypatch, capsys
):
    code, out, err = run_main(monkeypatch, capsys, run, "--search", "a red $apple_{", "--images",
                              folder, "--precision", "fp32")  # fmt: skip
    assert (code, err) == (0, "") and f"wrote {run}/search.png" in out
    model, _ = glip.load_model(run / "model.pt")
    scores = {}
    for path in folder.rglob("*"):
        if path.suffix.lower() in pictures.SUFFIXES and path.stem not in ("torn", "text", "broken"):
            pixels = np.asarray(pictures.read_picture(path, 32))
            with torch.no_grad():
                image = model.encode_image(pictures.centred(pixels, 32)[None])
                scores[str(path)] = (image @ model.encode_text(glip.tokenize("a red $apple_{")).T)
    wanted = sorted(scores, key=lambda path: -scores[path].item())
    lines = [line.split(maxsplit=3) for line in out.splitlines() if " similarity " in line]
    assert [line[3] for line in lines] == wanted and len(wanted) == 8
    assert [float(line[2]) for line in lines] == pytest.approx(
        [scores[path].item() for path in wanted], abs=6e-4
    )
    for name in ("torn.jpg", "text.png", "broken.gif"):
        assert f"{folder / name}: not a readable picture (" in out
    assert "left out: 3 of 11 pictures, 1 file of other kinds" in out
    picture = Image.open(run / "search.png")
    assert picture.format == "PNG" and len(np.unique(np.asarray(picture.convert("L")))) > 50


def test_a_model_that_knows_colours_finds_and_names_them(run, tmp_path, monkeypatch, capsys):
    """Features are replaced by colours, so that the answers are known."""
    for name, colour in COLOURS.items():
        for i in range(5):
            Image.new("RGB", (20 + i, 30), colour).save(tmp_path / f"{i} {name}.png")
    table = {name: torch.tensor(colour).float() for name, colour in COLOURS.items()}
    unit = torch.nn.functional.normalize
    monkeypatch.setattr(glip.GLIP, "encode_image", lambda self, images, *_: unit(
        images.float().mean((2, 3)), dim=-1))  # fmt: skip
    monkeypatch.setattr(Encoder, "texts", lambda self, texts: unit(
        torch.stack([table[text] for text in texts]), dim=-1))  # fmt: skip
    code, out, _ = run_main(monkeypatch, capsys, run, "--search", "blue", "--images", tmp_path)
    found = [line.split(maxsplit=3)[3] for line in out.splitlines() if " similarity " in line]
    assert code == 0 and all("blue" in line for line in found[:5]) and len(found) == search.HITS
    assert not any("blue" in line for line in found[5:])
    code, out, _ = run_main(monkeypatch, capsys, run, "--classify", tmp_path / "0 green.png",
                            "--names", "red, green ,blue")  # fmt: skip
    lines = [line.split() for line in out.splitlines() if "similarity" in line]
    assert code == 0 and lines[0][-1] == "green"
    assert sum(float(line[0]) for line in lines) == pytest.approx(100, abs=0.2)


def test_shares_are_the_models_softmax(run, folder):
    model, _ = glip.load_model(run / "model.pt")
    encoder = Encoder(model, Device(torch.device("cpu"), bf16=False))
    path, names = folder / "clear.png", ["cat", "dog", "a photo of a cow"]
    image = pictures.centred(np.asarray(pictures.read_picture(path, 32)), 32)
    with torch.no_grad():
        images, texts, scale = model(image[None], glip.tokenize(names))
        wanted = (scale * images @ texts.T).softmax(1)[0].tolist()
    found = search.classify(encoder, path, names)
    assert {name: share for name, share, _ in found} == pytest.approx(
        dict(zip(names, wanted, strict=True)), abs=1e-5
    )
    shares = [share for _, share, _ in found]
    assert shares == sorted(shares, reverse=True)


def test_attention_is_the_softmax_of_every_layer(run, folder, monkeypatch, capsys):
    """Against torch's own attention, which returns its weights."""
    model, config = glip.load_model(run / "model.pt")
    encoder = Encoder(model, Device(torch.device("cpu"), bf16=False))
    path = folder / "clear.png"
    found = search.attention(encoder, path)
    image = pictures.centred(np.asarray(pictures.read_picture(path, 32)), 32)[None]
    wanted = torch.zeros(16)
    with torch.no_grad():
        x = model.visual.embed(image, (4, 4), None)
        for block in model.visual.transformer.resblocks:
            theirs = torch.nn.MultiheadAttention(config.width, config.heads, batch_first=True)
            theirs.load_state_dict(block.attn.state_dict())
            y = block.ln_1(x)
            _, weights = theirs(y, y, y, average_attn_weights=True)
            wanted += weights[0, 0, 1:] / config.layers
            x = block(x)
    torch.testing.assert_close(found.flatten(), wanted / wanted.sum(), atol=1e-5, rtol=1e-4)
    code, out, _ = run_main(monkeypatch, capsys, run, "--attention", path)
    share = found[1:3, 1:3].sum().item()
    assert code == 0 and f"25% of the picture, get {share:.0%} of the attention" in out
    assert Image.open(run / "attention.png").format == "PNG"


def test_bad_input_is_one_sentence(run, folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.png").write_text("no picture")
    cases = {
        ("--search", "x"): "--search goes with --images",
        ("--images", folder): "--search goes with --images",
        ("--classify", folder / "clear.png"): "--classify goes with --names",
        ("--search", "x", "--images", tmp_path / "no"): "there is no such folder",
        ("--search", "x", "--images", tmp_path / "empty"): "none of its files (0) ends in",
        ("--search", "x", "--images", tmp_path / "bad"): "none of its pictures (1) can be read",
        ("--search", " ", "--images", folder): "a text of 0 tokens",
        ("--search", "x " * 80, "--images", folder): "a text of 80 tokens; the model reads 1 to 75",
        ("--search", "a\x1b[2J", "--images", folder): "characters that are no text",
        ("--classify", folder / "torn.jpg", "--names", "a,b"): "not a readable picture",
        ("--classify", folder / "clear.png", "--names", "a,"): "two different names",
        ("--classify", folder / "clear.png", "--names", "a,a,b"): "two different names",
        ("--attention", folder / "none.png"): "not a readable picture",
        ("--attention", folder / "clear.png", "--publish"): "one at a time",
    }  # fmt: skip
    for words, told in cases.items():
        code, _, err = run_main(monkeypatch, capsys, run, *words)
        assert code == 2 and err.startswith("evaluate.py: ") and told in err, words
    assert not list(run.glob("*.png"))
