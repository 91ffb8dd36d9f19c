"""Towers against open_clip and timm with the same weights; masking, loss, files."""

import copy
import math
import pickle
import resource
import zipfile
from dataclasses import asdict, replace

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from open_clip.loss import ClipLoss
from timm.models.vision_transformer import checkpoint_filter_fn

import glip
from glip import GLIP, GLIPConfig, InputError
from nanoglip import distributed, losses
from nanoglip.sources.order import Batch

TINY = GLIPConfig(32, 8, 24, 2, 3, 10, 20, 2, 2)
CAPTIONS = ["a dog", "two cats asleep on a red sofa", "", "word " * 90]


def pictures(batch=3, size=224, seed=0):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def normalised(images):
    """Torchvision's normalisation by open_clip's constants."""
    return TF.normalize(images, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)


def tiny(seed=0):
    torch.manual_seed(seed)
    return GLIP(TINY).eval()


@pytest.fixture(scope="module", params=["ViT-B-32", "ViT-B-16"])
def pair(request):
    """An open_clip model and ours with its weights; positions made large enough to matter."""
    torch.manual_seed(0)
    theirs = open_clip.create_model(request.param).eval()
    for table in (theirs.visual.positional_embedding, theirs.positional_embedding):
        torch.nn.init.normal_(table, std=0.3)
    ours = GLIP(GLIPConfig.named(request.param)).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def test_default_config_is_b16():
    assert GLIPConfig() == GLIPConfig.named("ViT-B-16")


@pytest.mark.parametrize("name", [name for name in glip.SIZES if not name.endswith("-8")])
def test_sizes_are_open_clips(name):
    theirs = open_clip.get_model_config(name)
    if theirs is None:
        assert name == "ViT-Ti-16"  # DeiT's, which open_clip does not list
        return
    vision, text, ours = theirs["vision_cfg"], theirs["text_cfg"], GLIPConfig.named(name)
    assert (ours.image_size, ours.patch_size) == (vision["image_size"], vision["patch_size"])
    assert (ours.width, ours.layers) == (vision["width"], vision["layers"])
    assert ours.heads == ours.width // vision.get("head_width", 64)
    assert (ours.text_width, ours.text_layers) == (text["width"], text["layers"])
    assert (ours.text_heads, ours.embed_dim) == (text["heads"], theirs["embed_dim"])


@torch.no_grad()
def test_features_equal_open_clip(pair):
    theirs, ours = pair
    images, tokens = pictures(), glip.tokenize(CAPTIONS)
    wanted = theirs.encode_image(normalised(images), normalize=True)
    torch.testing.assert_close(ours.encode_image(images), wanted, atol=1e-5, rtol=0)
    wanted = theirs.encode_text(tokens, normalize=True)
    torch.testing.assert_close(ours.encode_text(tokens), wanted, atol=1e-5, rtol=0)
    scale = ours(images, tokens[:3])[2]
    torch.testing.assert_close(scale, theirs.logit_scale.exp())


@torch.no_grad()
def test_masked_features_equal_open_clips_modules(pair):
    """The mask after the position embedding, as in the paper, by open_clip's own layers."""
    theirs, ours = pair
    images, tower, (rows, columns) = pictures(), theirs.visual, ours.config.grid
    ids = glip.sample_ids_keep("gaussian", 3, (rows, columns), 0.75,
                               generator=torch.Generator().manual_seed(0))  # fmt: skip
    x = tower.conv1(normalised(images)).flatten(2).mT                          # (B, N, D)
    x = x + tower.positional_embedding[1:]
    x = x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[-1]))               # (B, K, D)
    first = (tower.class_embedding + tower.positional_embedding[0]).expand(3, 1, -1)
    x = tower.transformer(tower.ln_pre(torch.cat([first, x], 1)))
    wanted = F.normalize(tower.ln_post(x[:, 0]) @ tower.proj, dim=-1)
    torch.testing.assert_close(ours.encode_image(images, ids), wanted, atol=1e-5, rtol=0)
    assert (ours.encode_image(images) - wanted).abs().max() > 1e-3


@torch.no_grad()
def test_image_tower_equals_timm():
    torch.manual_seed(0)
    ours = GLIP(GLIPConfig.named("ViT-B-16")).eval()
    tower = timm.create_model("vit_base_patch16_clip_224", num_classes=512).eval()
    tower.load_state_dict(checkpoint_filter_fn(ours.state_dict(), tower))
    wanted = F.normalize(tower(normalised(pictures())), dim=-1)
    torch.testing.assert_close(ours.encode_image(pictures()), wanted, atol=1e-5, rtol=0)


@torch.no_grad()
def test_zeros_behind_the_end_token_may_be_cut():
    """Causal attention: the loop cuts tokens to the longest caption of the batch."""
    texts = ["a dog", "", "!%", "two $#!% cats", "buy now!<br>"]  # "!" is token 0
    model, tokens = tiny(), glip.tokenize(texts)
    counted = [len(open_clip.tokenizer.SimpleTokenizer().encode(text)) + 2 for text in texts]
    assert glip.lengths(tokens).tolist() == counted
    longest = int(glip.lengths(tokens).max())
    torch.testing.assert_close(
        model.encode_text(tokens), model.encode_text(tokens[:, :longest]), atol=1e-6, rtol=0
    )
    changed = tokens.clone()
    changed[torch.arange(77) >= glip.lengths(tokens)[:, None]] = 5
    torch.testing.assert_close(model.encode_text(changed), model.encode_text(tokens))


@pytest.mark.parametrize("seed", range(5))
def test_texts_stand_in_rows_without_meeting(seed):
    draw = torch.Generator().manual_seed(seed)
    longest = int(torch.randint(2, 78, (), generator=draw))
    ends = torch.randint(2, longest + 1, (40,), generator=draw)
    tokens = torch.zeros(40, longest, dtype=torch.long)
    tokens[torch.arange(40), ends - 1] = glip.END
    _, position, packing = glip.pack_texts(tokens, torch.device("cpu"))
    rows, length = packing.table
    places, texts = packing.places.split(ends.tolist()), position.split(ends.tolist())
    assert len(set(packing.places.tolist())) == ends.sum() and length % 16 == 0
    for place, text in zip(places, texts, strict=True):
        assert (place - place[0]).tolist() == text.tolist() == list(range(len(text)))
        assert place[0] // length == place[-1] // length
    assert {int(place[0]) // length for place in places} == set(range(rows))
    assert packing.read.tolist() == (ends.cumsum(0) - 1).tolist()


@torch.no_grad()
def test_texts_that_share_a_row_do_not_see_each_other():
    model, tokens = tiny(), glip.tokenize(["a dog", "", "two cats", "a fish", "an old red house"])
    tokens = tokens[:, :16]
    *_, layout = glip.pack_texts(tokens, torch.device("cpu"))
    assert layout.table == (2, 16)
    alone = [model.encode_text(text[None]) for text in tokens]
    torch.testing.assert_close(model.encode_text(tokens), torch.cat(alone), atol=1e-6, rtol=0)


@torch.no_grad()
def test_bytes_are_floats_times_255():
    images = (pictures(2, 32) * 255).to(torch.uint8)
    model = tiny()
    assert torch.allclose(model.encode_image(images), model.encode_image(images / 255), atol=1e-6)


def test_only_kept_patches_are_seen():
    """Gradients reach exactly the pixels of the kept patches."""
    images = pictures(2, 32).requires_grad_()
    ids = torch.tensor([[0, 5, 15], [3, 2, 9]])
    tiny().encode_image(images, ids)[:, 0].sum().backward()
    seen = images.grad.abs().sum(1).unflatten(2, (4, 8)).unflatten(1, (4, 8)).sum((2, 4)).flatten(1)
    assert [row.nonzero()[:, 0].tolist() for row in seen] == [[0, 5, 15], [2, 3, 9]]


@torch.no_grad()
def test_order_of_kept_patches_does_not_matter():
    model, images = tiny(), pictures(1, 32)
    a = model.encode_image(images, torch.tensor([[1, 7, 12]]))
    b = model.encode_image(images, torch.tensor([[12, 1, 7]]))
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


@torch.no_grad()
def test_fillers_are_never_attended_to():
    """Other pixels in a filler change no bit; without it the features are the same."""
    model, images, ids = tiny(), pictures(1, 32), torch.tensor([[1, 7, 12]])
    visible = torch.tensor([[True, True, False]])
    features = model.encode_image(images, ids, visible)
    changed = images.clone()
    changed[:, :, 24:, 0:8] = 0  # patch 12
    assert torch.equal(features, model.encode_image(changed, ids, visible))
    assert not torch.equal(model.encode_image(images, ids), model.encode_image(changed, ids))
    alone = model.encode_image(images, ids[:, :2])
    torch.testing.assert_close(features, alone, atol=1e-6, rtol=0)


@torch.no_grad()
def test_rectangular_pictures():
    model = GLIP(GLIPConfig((16, 40), 8, 24, 1, 3, 10, 20, 1, 2)).eval()
    images = torch.rand(2, 3, 16, 40)
    every = torch.arange(10).expand(2, 10)
    torch.testing.assert_close(model.encode_image(images), model.encode_image(images, every))
    with pytest.raises(InputError, match="16, 40"):
        model.encode_image(images.mT)


# --- loss ---------------------------------------------------------------------------------------


def test_loss_is_the_written_out_formula():
    torch.manual_seed(0)
    x, y = (F.normalize(torch.randn(5, 7, dtype=torch.float64), dim=-1) for _ in "xy")
    scale, wanted = torch.tensor(12.5, dtype=torch.float64), 0.0
    for a, b in ((x, y), (y, x)):
        for i in range(5):
            logits = [scale.item() * float(a[i] @ b[j]) for j in range(5)]
            wanted += (math.log(sum(map(math.exp, logits))) - logits[i]) / 10
    assert glip.clip_loss(x, y, scale).item() == pytest.approx(wanted, rel=1e-12)


def test_loss_is_fp32_under_autocast():
    torch.manual_seed(0)
    x, y = (F.normalize(torch.randn(6, 8), dim=-1) for _ in "xy")
    scale = torch.tensor(100.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(glip.clip_loss(x, y, scale), glip.clip_loss(x.clone(), y, scale))
        inside = glip.clip_loss(x, y, scale)
    assert inside.dtype == torch.float32 and torch.equal(inside, glip.clip_loss(x, y, scale))


def test_temperature_starts_at_007_and_is_clamped():
    model = tiny()
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    for value, clamped in ((9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)):
        model.logit_scale.data.fill_(value)
        model.clamp_logit_scale()
        assert model.logit_scale.item() == pytest.approx(clamped)


# --- files --------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_file_alone_rebuilds_the_model(tmp_path):
    model, tokens = tiny(), glip.tokenize(CAPTIONS)
    glip.save_checkpoint(tmp_path / "m.pt", model, step=3)
    again, config = glip.load_model(tmp_path / "m.pt")
    assert config == TINY and not again.training
    assert torch.equal(again.encode_text(tokens), model.encode_text(tokens))
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt"]


@torch.no_grad()
def test_positions_are_resampled_as_open_clip_does(tmp_path):
    torch.manual_seed(0)
    small = open_clip.create_model("ViT-S-16", force_image_size=160).eval()
    state = {k: v.clone() for k, v in small.state_dict().items()}
    large = open_clip.create_model("ViT-S-16", force_image_size=224).eval()
    wanted = dict(state)
    open_clip.model.resize_pos_embed(wanted, large)
    ours = GLIP(GLIPConfig.named("ViT-S-16", 160))
    ours.load_state_dict(state)
    glip.save_checkpoint(tmp_path / "m.pt", ours)
    resized, config = glip.load_model(tmp_path / "m.pt", image_size=224)
    assert config.image_size == 224
    name = "visual.positional_embedding"
    assert torch.equal(resized.state_dict()[name], wanted[name])


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def broken_checkpoints(folder):
    """name -> file: torn, foreign, malicious and inconsistent checkpoints."""
    good = folder / "good.pt"
    glip.save_checkpoint(good, tiny())
    content = torch.load(good, weights_only=True)
    (folder / "truncated.pt").write_bytes(good.read_bytes()[:5000])
    (folder / "empty.pt").write_bytes(b"")
    (folder / "text.pt").write_text("not a checkpoint")
    torch.save({"state_dict": {}}, folder / "foreign.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save({**content, "extra": Evil(folder / "executed")}, folder / "malicious.pt")
    (folder / "pickle.pt").write_bytes(pickle.dumps(Evil(folder / "executed")))
    torch.save({**content, "model_config": {"depth": 3}}, folder / "config.pt")
    torch.save({**content, "model_config": {**asdict(TINY), "width": 48}}, folder / "shape.pt")
    missing = dict(content["model"])
    missing.popitem()
    torch.save({**content, "model": missing}, folder / "missing.pt")
    sizes = {"layers": 10**5, "image_size": 24_000, "heads": 10**9, "text_heads": 0, "width": "8"}
    for name, value in sizes.items():
        changed = {**content, "model_config": {**asdict(TINY), name: value}}
        if name == "image_size":  # its weights claim as much, by a view of a single number
            wide = torch.zeros(1).expand(1 + 3000**2, TINY.width)
            changed["model"] = content["model"] | {"visual.positional_embedding": wide}
        torch.save(changed, folder / f"{name}.pt")
    for value in (math.nan, math.inf):
        changed = copy.deepcopy(content)
        changed["model"]["text_projection"][1, 2] = value
        torch.save(changed, folder / f"{value}.pt")
    whole = good.read_bytes()
    (folder / "zeroed.pt").write_bytes(whole[:20_000] + bytes(4096) + whole[24_096:])
    with zipfile.ZipFile(good) as stored, \
            zipfile.ZipFile(folder / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as packed:  # fmt: skip
        for member in stored.namelist():
            packed.writestr(member, stored.read(member))
    return [*(p for p in folder.glob("*.pt") if p != good), folder / "absent.pt"]


def test_bad_checkpoints_are_refused_in_a_sentence_and_nothing_executes(tmp_path):
    files = broken_checkpoints(tmp_path)
    assert len(files) == 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for file in files:
        with pytest.raises(InputError, match=file.name) as caught:
            glip.load_model(file)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def test_siglip_is_open_clips():
    """Loss and gradients, against open_clip's on the same features; the model brings its start."""
    from open_clip.loss import SigLipLoss

    torch.manual_seed(0)
    model = GLIP(replace(GLIPConfig.named("ViT-nano-8"), siglip=True))
    assert model.logit_scale.exp().item() == pytest.approx(10) and model.logit_bias.item() == -10
    ours = [torch.nn.functional.normalize(torch.randn(7, 12), dim=-1).requires_grad_()
            for _ in range(2)]  # fmt: skip
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    found = losses.contrastive_loss("siglip", *ours, model.logit_scale.exp(), model.logit_bias)
    wanted = SigLipLoss()(*theirs, torch.tensor(10.0), torch.tensor(-10.0))
    torch.testing.assert_close(found, wanted)
    found.backward()
    wanted.backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_recomputed_blocks_have_the_same_gradients():
    torch.manual_seed(0)
    model = GLIP(GLIPConfig.named("ViT-nano-8")).train()
    images, tokens = torch.rand(4, 3, 64, 64), glip.tokenize(["a", "b c", "d", "e"])
    grads = []
    for recompute in (False, True):
        model.visual.transformer.recompute = model.transformer.recompute = recompute
        model.zero_grad()
        glip.clip_loss(*model(images, tokens)).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_open_clips_without_what_it_computes_for_nobody(fused, monkeypatch):
    """Every parameter's, in fp64, for texts of 3 to 32 tokens; open_clip computes them all.

    `fused`: as GPUs attend, by torch's kernel and with a row for each text.
    """
    monkeypatch.setattr(glip, "fused", lambda device: fused)
    torch.manual_seed(0)
    theirs = open_clip.CLIP(
        10, {"image_size": 32, "patch_size": 8, "width": 24, "layers": 2, "head_width": 8},
        {"context_length": 32, "width": 20, "layers": 2, "heads": 2},
    ).double()  # fmt: skip
    ours = GLIP(replace(TINY, context_length=32)).double()
    ours.load_state_dict(theirs.state_dict())
    images = pictures(4, 32).double()
    tokens = glip.tokenize(["a", *CAPTIONS[:2], CAPTIONS[3]], 32)
    assert glip.lengths(tokens).tolist() == [3, 4, 9, 32]
    glip.clip_loss(*ours(images, tokens)).backward()
    ClipLoss()(*theirs(normalised(images), tokens)[:3]).backward()
    found = dict(ours.named_parameters())
    for name, p in theirs.named_parameters():
        assert (p.grad - found[name].grad).norm() <= 1e-10 * p.grad.norm(), name


def test_batches_come_ahead_in_their_order():
    """One is fetched beyond the one in use, so that its copy and the step overlap on a GPU."""
    fetched = []

    def batches():
        for step in range(4):
            fetched.append(step)
            tensors = [torch.full((2,), step), *torch.zeros(3, 1)]
            yield Batch(*tensors, [["bad", str(step)]])

    for step, batch in enumerate(distributed.prefetch(batches(), torch.device("cpu"))):
        assert batch.images.tolist() == [step, step] and batch.bad == [["bad", str(step)]]
        assert fetched == list(range(min(step + 2, 4)))
    assert step == 3
