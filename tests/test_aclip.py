"""The full A-CLIP: crops, its two further losses, and what they move."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from glip import GLIP, GLIPConfig, clip_loss
from nanoglip import aclip
from nanoglip.masker import Masker, attend

SCALE = (0.5, 1.0)
TINY = GLIPConfig(32, 8, 24, 2, 3, 10, 20, 2, 2, context_length=9, vocab_size=50)


def test_a_crop_is_torchs_resize_of_the_box():
    images = torch.rand(2, 3, 32, 24)
    boxes = torch.tensor([[8 / 32, 6 / 24, 16 / 32, 12 / 24], [0, 0, 1, 1]])
    found = aclip.crop(images, boxes, (24, 18))
    part = F.interpolate(images[:1, :, 8:24, 6:18], (24, 18), mode="bilinear")
    inside = (slice(None), slice(2, -2), slice(2, -2))  # at the rim our crop sees beyond the box
    torch.testing.assert_close(found[0][inside], part[0][inside])
    whole = F.interpolate(images[1:], (24, 18), mode="bilinear")
    torch.testing.assert_close(found[1], whole[0])


@pytest.mark.parametrize("shape", [1.0, 1.5, 2 / 3])
def test_views_are_random_resized_crops_of_the_picture(shape):
    """Area and aspect in the pixels of a picture whose width / height is `shape`."""
    boxes = aclip.crop_boxes(torch.rand(5000, 4), torch.full((5000,), shape), SCALE)
    top, left, height, width = boxes.unbind(1)
    assert top.min() >= 0 and left.min() >= 0
    assert (top + height).max() <= 1 + 1e-6 and (left + width).max() <= 1 + 1e-6
    area, inside = height * width, (height < 1) & (width < 1)
    assert area.min() > 0.5 - 1e-6 and area[inside].min() < 0.52
    aspect = (shape * width / height)[inside]
    assert aspect.min() > 3 / 4 - 1e-5 and aspect.max() < 4 / 3 + 1e-5 and len(aspect) > 1000
    if shape == 1:
        assert area.mean() == pytest.approx(0.73, abs=0.03)


def test_simclr_is_a_plain_loop():
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, 7, generator=draw, dtype=torch.float64) for _ in range(2))
    z = F.normalize(torch.cat([a, b]), dim=1)
    total = 0.0
    for i in range(10):
        other = (i + 5) % 10
        rest = [math.exp(z[i] @ z[j] / 0.1) for j in range(10) if j != i]
        total -= math.log(math.exp(z[i] @ z[other] / 0.1) / sum(rest))
    assert aclip.simclr_loss(a, b).item() == pytest.approx(total / 10)


def test_byol_is_the_distance_of_unit_vectors():
    predicted, target = torch.randn(6, 4), torch.randn(3, 4)
    a, b = F.normalize(predicted, dim=1), F.normalize(target, dim=1).repeat(2, 1)
    wanted = (a - b).square().sum(1).mean()
    torch.testing.assert_close(aclip.byol_loss(predicted, target), wanted)


def parts():
    torch.manual_seed(0)
    network = aclip.AClip(GLIP(TINY))
    masker = Masker("attentive", 0.5)
    masker.update_teacher(network.model.visual, 0.9)
    images, tokens = torch.rand(4, 3, 32, 32), torch.randint(0, 49, (4, 6))
    tokens[:, -1] = 49
    return network, masker, images, tokens, torch.rand(4, 16), torch.cat([
        torch.rand(4, aclip.VIEW_DRAWS), torch.tensor([[1.0], [1.5], [0.5], [2.0]])
    ], dim=1)  # fmt: skip


def test_the_loss_is_the_sum_that_the_paper_gives():
    """Each term once more, from features made here."""
    network, masker, images, tokens, noise, draws = parts()
    loss, scale, _ = aclip.aclip_loss(network, network, masker, images, tokens, noise, draws, SCALE)
    model = network.model
    with torch.no_grad():
        attention, teacher = attend(masker.teacher, images, features=True)
        views, kept = [], []
        for half in (draws[:, :4], draws[:, 4:8]):
            box = aclip.crop_boxes(half, draws[:, 8], SCALE)
            views.append(aclip.crop(images, box, (32, 32)))
            kept.append(aclip.crop(attention[:, None], box, (4, 4)).flatten(1).topk(8).indices)
        a, b = (model.encode_image(v, k) for v, k in zip(views, kept, strict=True))
        texts = model.encode_text(tokens)
        inner = [model.visual(v, k, None) for v, k in zip(views, kept, strict=True)]
        wanted = (clip_loss(a, texts, scale) + clip_loss(b, texts, scale)) / 2
        wanted += aclip.simclr_loss(*(network.contrast(x) for x in inner))
        predicted = torch.cat([network.predict(network.project(x)) for x in inner])
        wanted += 2 * aclip.byol_loss(predicted, network.target(teacher))
    torch.testing.assert_close(loss, wanted)


def test_all_but_the_teacher_and_the_patch_projection_learn():
    network, masker, *batch = parts()
    aclip.aclip_loss(network, network, masker, *batch, SCALE)[0].backward()
    for name, p in network.named_parameters():
        still = name.startswith("target") or name == "model.visual.conv1.weight"
        assert (p.grad is None) == still, name
    assert all(p.grad is None for p in masker.teacher.parameters())
    before = copy.deepcopy(network.target.state_dict())
    network.project[0].weight.data += 1
    network.update_teacher(0.75)
    moved = network.target.state_dict()["0.weight"] - before["0.weight"]
    torch.testing.assert_close(moved, torch.full_like(moved, 0.25))
