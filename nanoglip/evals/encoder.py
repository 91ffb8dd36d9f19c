"""A model's features of pictures and texts, and its answers on held-out pairs.

Answers on held-out pairs are ranks: {question: (Q,), the rank of each right answer}.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

import glip
from glip import GLIP
from nanoglip import cli
from nanoglip.evals import significance
from nanoglip.evals.metrics import hits, retrieval, zero_shot
from nanoglip.machine import Device
from nanoglip.masker import Masker
from nanoglip.noise import uniform
from nanoglip.sources.pictures import HeldOut

TEXTS = 512  # that a model gets at a time: the same for every number of processes


class Encoder:
    """A model on its device; encodes in blocks, without gradients."""

    def __init__(self, model: GLIP, on: Device) -> None:
        self.model, self.on, self.device = model.eval(), on, on.device

    def images(self, render: Callable, count: int, masker: Masker | None = None) -> Tensor:
        """image_features (count, E) of render(ids) -> (B, 3, S, S), under a mask if given."""
        return torch.cat([self.block(render(ids.numpy()), int(ids[0]), masker)
                          for ids in cli.blocks(count, 256, "pictures")])  # fmt: skip

    @torch.inference_mode()
    def block(self, images: Tensor, start: int, masker: Masker | None = None) -> Tensor:
        """image_features (B, E) of pictures (B, 3, S, S) that are numbered from `start`."""
        images = images.to(self.device)
        keep = self.mask(images, start, masker) if masker else (None, None)
        with self.on.autocast():
            return self.model.encode_image(images, *keep).cpu()

    @torch.inference_mode()
    def mask(self, images: Tensor, start: int, masker: Masker) -> tuple[Tensor, Tensor | None]:
        """ids_keep and visible (B, K) of pictures that are numbered from `start`: always the same.
        """
        n = math.prod(self.model.config.grid)
        noise = torch.from_numpy(uniform(0, "masked inference", start, len(images), n))
        with self.on.autocast():
            return masker(images, noise.to(self.device), self.model.visual)

    def texts(self, captions: list[str]) -> Tensor:
        """text_features (n, E) of n captions."""
        return torch.cat([self.text_block([captions[i] for i in ids])
                          for ids in cli.blocks(len(captions), TEXTS, "texts")])  # fmt: skip

    @torch.inference_mode()
    def text_block(self, captions: list[str]) -> Tensor:
        """text_features (B, E) of a block of captions."""
        tokens = glip.tokenize(captions, self.model.config.context_length)
        with self.on.autocast():
            return self.model.encode_text(tokens[:, : int(glip.lengths(tokens).max())]).cpu()


# --- Held-out pairs -------------------------------------------------------------------------------


def encode_pairs(
    encoder: Encoder, pairs: HeldOut, masker: Masker | None = None,
    change: Callable[[Tensor], Tensor] = lambda images: images,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """image_features (M, E) and text_features (C, E) of held-out pairs.

    Pictures are encoded under a mask, or changed (B, 3, S, S) before, if asked.
    """
    images = encoder.images(lambda ids: change(pairs.render(ids)), len(pairs.concept), masker)
    return images, encoder.texts(pairs.captions)


def rank_features(pairs: HeldOut, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
    """Ranks by question, zero-shot (emoji) and retrieval, from encode_pairs()."""
    result = {}
    if pairs.flags is not None:
        result = zero_shot(images, texts, pairs.concept, pairs.flags)
    shown, concept = np.unique(pairs.concept, return_inverse=True)  # captions that have a picture
    return result | retrieval(images, texts[torch.from_numpy(shown)], torch.from_numpy(concept))


def rank_pairs(encoder: Encoder, pairs: HeldOut, *how: object) -> dict[str, Tensor]:
    """Ranks by question of held-out pairs; `how`: a mask and a change, as for encode_pairs()."""
    return rank_features(pairs, *encode_pairs(encoder, pairs, *how))


def shares_of(ranks: dict[str, Tensor]) -> dict[str, float]:
    """The share of right answers, by metric."""
    return {metric: right.mean().item() for metric, right in hits(ranks).items()}


def intervals_of(ranks: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """The 95 % interval of every metric, by bootstrap over answers."""
    return {metric: significance.interval(right) for metric, right in hits(ranks).items()}


def chance(pairs: HeldOut) -> dict[str, float]:
    """The share of right answers that guessing gives, by the metrics of a single guess."""
    shown = len(np.unique(pairs.concept))  # captions, as in rank_features()
    choices = dict.fromkeys(("image to text R@1", "text to image R@1"), shown)
    if pairs.flags is not None:
        plain = len(pairs.flags) - int(pairs.flags.sum())
        choices |= {"zero-shot top-1": len(pairs.flags), "zero-shot top-1 without flags": plain}
    return {metric: 1 / n for metric, n in choices.items() if n}


def metrics_of(pairs: HeldOut) -> tuple[str, ...]:
    """The metrics of held-out pairs: zero-shot for emoji, retrieval for own pictures."""
    if pairs.flags is None:
        return "image to text R@1", "image to text R@5", "text to image R@5"
    return "zero-shot top-1", "zero-shot top-5"


def quick(encoder: Encoder, pairs: HeldOut) -> dict[str, float]:
    """A model's metrics of held-out pairs, {} where there are none."""
    full = shares_of(rank_pairs(encoder, pairs)) if len(pairs.concept) else {}
    return {name: full[name] for name in metrics_of(pairs) if name in full}


def prompted(encoder: Encoder, pairs: HeldOut, images: Tensor) -> dict[str, float]:
    """Zero-shot top-1 of image_features (M, E), by the prompt that all names are put in."""
    found = {}
    for prompt, names in pairs.prompts.items():
        ranks = zero_shot(images, encoder.texts(names), pairs.concept, pairs.flags)
        found[prompt] = shares_of(ranks)["zero-shot top-1"]
    return found


def mask_shares(encoder: Encoder, pairs: HeldOut, masker: Masker) -> dict:
    """Shares of the held-out pictures' patches that are computed and seen under a mask."""
    n, seen = math.prod(encoder.model.config.grid), []
    for ids in torch.arange(len(pairs.concept)).split(256):
        images = pairs.render(ids.numpy()).to(encoder.device)
        ids_keep, visible = encoder.mask(images, int(ids[0]), masker)
        seen.append(torch.ones_like(ids_keep).sum(1) if visible is None else visible.sum(1))
    seen = torch.cat(seen).double()
    return {
        "computed": ids_keep.shape[1] / n, "visible": seen.mean().item() / n,
        "pictures of one patch": (seen == 1).double().mean().item(),
        "threshold": masker.threshold,
    }  # fmt: skip


def robustness(encoder: Encoder, pairs: HeldOut) -> dict[str, dict[str, float]]:
    """All metrics of the held-out pictures, as they are and after each change."""
    from torchvision.transforms.v2 import functional as change

    def small(images: Tensor, times: int) -> Tensor:
        side = images.shape[-1]
        return change.resize(change.resize(images, [side // times] * 2), [side] * 2)

    changes = {"as it is": lambda images: images}
    bilinear = change.InterpolationMode.BILINEAR
    for n in (1, 2):  # the strengths are ours; the corners of a rotated picture are white
        changes |= {
            f"blurred, {n} px": partial(change.gaussian_blur, kernel_size=8 * n + 1, sigma=n),
            f"turned, {20 * n}°": partial(
                change.rotate, angle=20 * n, fill=255, interpolation=bilinear
            ),
            f"hue, {30 * n}°": partial(change.adjust_hue, hue_factor=n / 12),
            f"small, 1/{2 * n}": partial(small, times=2 * n),
        }
    changes["grey"] = partial(change.rgb_to_grayscale, num_output_channels=3)
    return {name: shares_of(rank_pairs(encoder, pairs, None, f)) for name, f in changes.items()}


PLACES, EVERY = 7, 3  # rows and columns of a map; of the held-out pictures every third is moved


def accuracy_by_place(encoder: Encoder, pairs: HeldOut) -> list[list[float]]:
    """Zero-shot top-1 with the object at each of 7 x 7 places, rows from the top.

    Raises InputError for pictures whose object cannot be moved.
    """
    concept, texts = pairs.concept[::EVERY], encoder.texts(pairs.captions)
    shares = np.linspace(0, 1, PLACES).tolist()

    def top1(down: float, across: float) -> float:
        scenes = pairs.placed(down, across)
        images = encoder.images(lambda ids: scenes.render(EVERY * ids), len(concept))
        return shares_of(zero_shot(images, texts, concept, pairs.flags))["zero-shot top-1"]

    return [[top1(down, across) for across in shares] for down in shares]
