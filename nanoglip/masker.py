"""A mask with all that it needs beside noise: its settings, and what training finds for it.

    Masker(mask, mask_ratio, **settings)(images, noise, tower)  ->  ids_keep, visible

Cluster Masking's threshold, A-CLIP's teacher and the gaze are state: a checkpoint holds them.
Shapes as in masks.py.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from glip import ImageTower, InputError, at_least_fp32, normalise, num_keep, patchify
from nanoglip import masks
from nanoglip.gaze import Gaze


def momentum_at(step: int, steps: int, start: float) -> float:
    """The teacher's momentum: from `start` to 1 along half a cosine, as in A-CLIP."""
    return 1 - (1 - start) * 0.5 * (1 + math.cos(math.pi * step / steps))


def embedding_weight_at(step: int, steps: int, last: float) -> float | None:
    """The embeddings' weight where it changes, from 0 to `last` in eight steps; None elsewhere."""
    places = [i for i in range(8) if round(i * steps / 8) == step]
    return last * places[-1] / 7 if places else None


def ratio_at(step: int, steps: int, first: float, last: float) -> float:
    """The share of patches removed in a step: a straight line from `first` to `last`."""
    return first + (last - first) * step / max(1, steps - 1)


class Masker:
    """A mask, its settings, and the state that training finds for it; a call masks pictures.

    The mask is a function of noise, pictures and this state, which a checkpoint holds.
    """

    def __init__(
        self, mask: str = "none", mask_ratio: float | tuple[float, float] = 0.0, **settings: object
    ) -> None:
        known = masks.settings_of(masks.MASKS[mask])
        ends = tuple(mask_ratio) if isinstance(mask_ratio, tuple | list) else (mask_ratio,) * 2
        self.mask, self.mask_ratios = mask, ends
        self.mask_ratio: float = ends[0]  # now, in training
        self.settings = {name: default for name, (_, default, _) in known.items()} | settings
        for name, value in settings.items():
            if name not in known:
                raise InputError(f"mask '{mask}' has no setting '{name}'")
            masks.check_setting(name, value, known[name][2])
        self.threshold: float | None = None  # below which a patch is not like an anchor
        self.embedding_weight = self.settings.get("embedding_weight", 0.0)  # now, in training
        self.teacher: nn.Module | None = None
        self.gaze: Gaze | None = None

    @property
    def annealed(self) -> bool:
        """Whether the ratio changes in training."""
        return self.mask_ratios[0] != self.mask_ratios[1]

    def needs(self, name: str) -> bool:
        """Whether the mask takes an input of this name."""
        return name in masks.required_inputs(masks.MASKS[self.mask])

    def missing_inputs(self) -> list[str]:
        """Required inputs that nothing here supplies."""
        row = masks.required_inputs(masks.MASKS[self.mask])
        return [name for name, needed in row.items() if needed and name not in masks.SUPPLIED]

    def num_computed(self, n: int, ratio: float | None = None) -> int:
        """How many of n patches are computed, now or at another ratio."""
        share = self.settings.get("min_mask_ratio")
        return masks.num_computed(self.mask, n, self.mask_ratio if ratio is None else ratio, share)

    def summary(self, grid: tuple[int, int]) -> str:
        """How many of a grid's patches are kept, in words."""
        n = math.prod(grid)
        k, computed = num_keep(n, self.mask_ratio), self.num_computed(n)
        if self.mask == "none":
            return f"no mask: all {n} patches"
        if self.annealed:
            last = num_keep(n, self.mask_ratios[1])
            return f"mask {self.mask} keeps {k} of {n} patches at first, {last} at last"
        text = f"mask {self.mask} keeps {k} of {n} patches ({1 - k / n:.1%} removed)"
        return text + f" on average, and computes {computed}" * (computed != k)

    @torch.no_grad()
    def __call__(
        self, images: Tensor, noise: Tensor, tower: ImageTower, **inputs: object
    ) -> tuple[Tensor | None, Tensor | None]:
        """Images (B, 3, H, W), noise (B, N) -> ids_keep and visible (B, K); None: all are kept.

        `inputs` replace what would be supplied.
        """
        if self.mask == "none":
            return None, None
        grid = tower.config.grid
        supplies = {
            "pixels": lambda: images,
            "attention": lambda: self.teacher and self.attention(images, grid),
            "gaze": lambda: self.looking(tower)(images),
            "embeddings": lambda: self.embeddings(images, tower),
            "threshold": lambda: self.threshold,
            "embedding_weight": lambda: self.embedding_weight,
        }
        inputs = {name: supply() for name, supply in supplies.items()
                  if self.needs(name) and name not in inputs} | inputs  # fmt: skip
        own = {name: value for name, value in self.settings.items() if self.needs(name)}
        ids_keep, visible = masks.sample_mask(
            self.mask, len(images), grid, self.mask_ratio, noise=noise, **(own | inputs)
        )
        if self.gaze and self.needs("gaze"):
            self.gaze.keep(ids_keep)
        return ids_keep, visible

    def looking(self, tower: ImageTower) -> Gaze:
        """The gaze; at first GLIP's."""
        if self.gaze is None:
            device = tower.conv1.weight.device
            self.gaze = Gaze(tower.config.grid, self.settings["sigma"], device)
        return self.gaze

    def learning(self, tower: ImageTower) -> contextlib.AbstractContextManager:
        """A context in which a step's gradients teach the gaze; of other masks it does nothing."""
        needed = self.needs("gaze")
        return self.looking(tower).learning(tower) if needed else contextlib.nullcontext()

    def embeddings(self, images: Tensor, tower: ImageTower) -> Tensor | None:
        """All patches projected by the tower, in full precision, if weighted. (B, N, D)."""
        if not self.embedding_weight:
            return None
        with torch.autocast(images.device.type, enabled=False):
            patches = normalise(patchify(images, tower.config.grid))
            return F.linear(patches, tower.conv1.weight.flatten(1))

    def attention(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """What the teacher attends to, at the patches of `grid`. (B, 3, H, W) -> (B, N)."""
        found, _ = attend(self.teacher, scaled(images, self.settings["teacher_scale"]))
        return F.interpolate(found[:, None], grid, mode="bilinear").flatten(1)

    def before_step(
        self, step: int, steps: int, tower: ImageTower, sample: Callable[[], Iterable]
    ) -> None:
        """Update ratio and teacher, and at some steps the threshold, found on sample()'s blocks."""
        self.mask_ratio = ratio_at(step, steps, *self.mask_ratios)
        if self.needs("attention"):
            momentum = momentum_at(step, steps, self.settings["teacher_momentum"])
            self.update_teacher(tower, momentum)
        weight = embedding_weight_at(step, steps, self.settings.get("embedding_weight", 0.0))
        if weight is None:
            return
        self.embedding_weight = weight
        if self.needs("threshold") and (step == 0 or weight > 0):
            found = [None]
            if not dist.is_initialized() or dist.get_rank() == 0:  # reads the sample, for all
                self.find_threshold(sample(), tower)
                found = [self.threshold]
            if dist.is_initialized():
                dist.broadcast_object_list(found)
            (self.threshold,) = found

    @torch.no_grad()
    def find_threshold(self, blocks: Iterable[tuple[Tensor, Tensor]], tower: ImageTower) -> None:
        """Set the threshold under which blocks of (images, noise) show 1 - mask_ratio of all."""
        device, grid = tower.conv1.weight.device, tower.config.grid
        closest = []
        for images, noise in blocks:
            images, noise = images.to(device), noise.to(device)
            embeddings = self.embeddings(images, tower)
            weighted = embeddings, self.embedding_weight
            closest.append(masks.closest_anchor(noise, grid, images, *weighted))
        share = self.settings["min_mask_ratio"]
        self.threshold = masks.similarity_threshold(torch.cat(closest), self.mask_ratio, share)

    @torch.no_grad()
    def update_teacher(self, tower: ImageTower, momentum: float) -> None:
        """Move the teacher, at first a copy of the tower, towards the tower."""
        if self.teacher is None:
            self.teacher = copy.deepcopy(tower).requires_grad_(False)
        move_towards(self.teacher, tower, momentum)

    def state(self) -> dict:
        """Plain values and tensors, for a checkpoint."""
        nets = {"teacher": self.teacher and self.teacher.state_dict(),
                "gaze": self.gaze and self.gaze.state()}  # fmt: skip
        return vars(self) | nets

    @staticmethod
    def restored(state: dict, tower: nn.Module) -> "Masker":
        """The masker of a state(), beside its tower; InputError for another version's."""
        try:
            ratios = state.get("mask_ratios", state["mask_ratio"])
            masker = Masker(state["mask"], ratios, **state["settings"])
            masker.mask_ratio, masker.threshold = state["mask_ratio"], state["threshold"]
            masker.embedding_weight = state["embedding_weight"]
            if state["teacher"]:
                masker.teacher = copy.deepcopy(tower).requires_grad_(False)
                masker.teacher.load_state_dict(state["teacher"])
            if state.get("gaze"):
                masker.looking(tower).load(state["gaze"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"the checkpoint's mask is of another version ({type(error).__name__}): train again"
            ) from None
        return masker


# --- Teachers -------------------------------------------------------------------------------------


def attend(
    tower: ImageTower, images: Tensor, features: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Where the class token looks, mean of heads and layers, (B, R, C); if asked, its features.

    Images (B, 3, H, W) may have any size of whole patches; positions are resampled to it.
    """
    grid = tuple(side // tower.config.patch_size for side in images.shape[2:])
    x, attention = tower.embed(images, grid, None), 0.0
    blocks = tower.transformer.resblocks
    for block in blocks:
        attention = attention + class_attention(block.attn, block.ln_1(x))     # (B, N)
        if features or block is not blocks[-1]:
            x = block(x)
    maps = (attention / len(blocks)).unflatten(1, grid)
    return maps, tower.ln_post(x[:, 0]) if features else None


def class_attention(attention: nn.Module, x: Tensor) -> Tensor:
    """How much the first token attends to the others, mean of heads. (B, T, D) -> (B, T-1)."""
    (wq, wk, _), (bq, bk, _) = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    q = F.linear(x[:, :1], wq, bq).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    k = F.linear(x, wk, bk).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    with torch.autocast(x.device.type, enabled=False):  # bf16 would tie patches, and masks
        q, k = at_least_fp32(q), at_least_fp32(k)
        logits = (q * q.shape[-1] ** -0.5) @ k.mT                              # (B, h, 1, T)
        return logits.softmax(-1)[:, :, 0, 1:].mean(dim=1)


def move_towards(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Update an exponential moving average: the teacher's parameters, in place."""
    theirs, own = list(student.parameters()), list(teacher.parameters())
    torch._foreach_lerp_(own, theirs, 1 - momentum)


def scaled(images: Tensor, scale: float) -> Tensor:
    """Pictures at another size, as floats in [0, 1]. (B, 3, H, W) -> (B, 3, scale H, scale W)."""
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    if scale == 1:
        return images
    size = [round(side * scale) for side in images.shape[2:]]
    return F.interpolate(images, size, mode="bilinear", antialias=True)
