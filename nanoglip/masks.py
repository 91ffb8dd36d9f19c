"""Which patches and words a tower sees: the masking strategies of the field behind one seam.

    noise (B, N), uniform in [0, 1)  ->  a strategy's scores (B, N)  ->  the K highest are kept

A strategy is one function and one line in MASKS (patches) or TEXT_MASKS (words). What it needs
beside noise it declares by the names of its further parameters: sigma, centre, mask_ratio, pixels
(pictures as the tower gets them), attention, ... Whoever calls supplies them by name. A strategy
that cannot fill all K places returns (scores, hidden), hidden (B, N) bool: patches that only fill
a place, and that nothing attends to.

Shapes: B pairs, N patches of a (rows, columns) grid, K kept, T tokens of a caption.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from glip import (
    ImageTower,
    InputError,
    at_least_fp32,
    gaussian_scores,
    log_gaussian,
    normalise,
    num_keep,
    patchify,
)

# --- From noise alone -----------------------------------------------------------------------------


def none_scores(noise: Tensor, grid: tuple[int, int]) -> Tensor:
    """CLIP: no mask; every patch is kept, in reading order. noise (B, N) -> scores (B, N)."""
    return -torch.arange(noise.shape[1], device=noise.device).expand_as(noise)


def random_scores(noise: Tensor, grid: tuple[int, int]) -> Tensor:
    """FLIP (2212.00794, section 3): every patch is equally likely. noise (B, N) -> scores."""
    return noise


def gumbel_scores(
    noise: Tensor, grid: tuple[int, int], sigma: float | tuple, centre: tuple = (0.0, 0.0)
) -> Tensor:
    """Control: draw patches with Gaussian weights, without replacement. (B, N) -> scores (B, N).

    What GLIP's text could also mean and its authors' code does not do: the K highest of a log
    weight plus Gumbel noise are K successive weighted draws (1903.06059, on Gumbel-top-k).
    """
    gumbel = -torch.log(-torch.log(noise.clamp(min=torch.finfo(noise.dtype).tiny)))
    return gumbel + log_gaussian(grid, sigma, centre, noise.device)[0]


def center_crop_scores(
    noise: Tensor, grid: tuple[int, int], centre: tuple = (0.0, 0.0)
) -> Tensor:
    """Control: GLIP without its noise, the K most central patches. noise (B, N) -> scores (B, N).

    Patches at equal distance are taken in reading order.
    """
    nearest = -log_gaussian(grid, 1.0, centre, torch.device("cpu"), torch.float64)[0]
    place = nearest.argsort(stable=True).argsort()                             # (N,)
    if noise.device.type == "cuda":  # the copy from pinned memory is asynchronous
        place = place.pin_memory()
    return -place.to(noise.device, non_blocking=True).to(noise.dtype).expand_as(noise)


def grid_scores(noise: Tensor, grid: tuple[int, int]) -> Tensor:
    """CLIPA's grid mask (2305.07017, on image tokens), our reading: no code of it was released.

    Evenly spread: one patch of every cell of 2 x 2 at 75 %; at other ratios every cell gives
    equally many or one more, and the noise says which. noise (B, N) -> scores (B, N).
    """
    rows, columns = grid
    square = F.pad(noise.view(-1, rows, columns), (0, columns % 2, 0, rows % 2), value=-1.0)
    cells = square.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3)  # (B, R, C, 2, 2)
    rank = cells.flatten(3).argsort(descending=True).argsort().view_as(cells)
    rank = rank.transpose(2, 3).reshape_as(square)[:, :rows, :columns]
    return noise - rank.flatten(1)                                             # (B, N)


def block_scores(noise: Tensor, grid: tuple[int, int]) -> Tensor:
    """CLIPA's block mask (2305.07017, on image tokens), our reading: no code of it was released.

    One contiguous region around a random patch, as square as the picture's border allows: minus
    the Chebyshev distance to it; the noise breaks ties. noise (B, N) -> scores (B, N).
    """
    patch = torch.arange(grid[0] * grid[1], device=noise.device)
    middle = noise.argmax(dim=1, keepdim=True)                                 # (B, 1) uniform
    down = (patch // grid[1] - middle // grid[1]).abs()
    across = (patch % grid[1] - middle % grid[1]).abs()                        # (B, N)
    return noise - torch.maximum(down, across)


# --- From pixels ----------------------------------------------------------------------------------

ANCHORS = 0.03  # share of the patches that are anchors; 6 of 196


def cluster_scores(
    noise: Tensor,
    grid: tuple[int, int],
    pixels: Tensor,
    mask_ratio: float,
    threshold: float | None = None,
    embeddings: Tensor | None = None,
    embedding_weight: float = 0.0,
    min_mask_ratio: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Cluster Masking (2405.08815, section 3): patches that look like an anchor go together.

    noise (B, N), pixels (B, 3, H, W) -> scores (B, N), hidden (B, N). Anchors are the patches of
    the highest noise; whatever is more similar to one than `threshold` is hidden. Visible patches
    score above hidden ones, so those that K cannot hold are dropped by the noise, and free places
    are filled by hidden patches. `threshold` comes from similarity_threshold on a fixed sample;
    without it, from these pictures. embeddings (B, N, D), embedding_weight: their similarity's
    share beside the pixels'. min_mask_ratio (default: mask_ratio - 0.2) sets K, by which
    sample_mask goes.
    """
    closest = closest_anchor(noise, grid, pixels, embeddings, embedding_weight)
    if threshold is None:
        threshold = similarity_threshold(closest, mask_ratio, min_mask_ratio)
    visible = below(closest, threshold)
    return noise + visible, ~visible                                           # (B, N), (B, N)


def closest_anchor(
    noise: Tensor, grid: tuple[int, int], pixels: Tensor, embeddings: Tensor | None = None,
    embedding_weight: float = 0.0,
) -> Tensor:  # fmt: skip
    """Cosine similarity of every patch to the anchor most like it; of anchors, infinity. (B, N).

    Patches of the normalised picture are standardised each, to which the cosine of their centred
    pixels is equal.
    """
    patches = normalise(patchify(pixels, grid))                                # (B, N, 3pp)
    patches = patches - patches.mean(dim=-1, keepdim=True)
    n = noise.shape[1]
    anchors = noise.topk(n - int(n * (1 - ANCHORS)), dim=1).indices            # (B, A)

    def similarity(x: Tensor) -> Tensor:
        x = F.normalize(x, dim=-1)
        return torch.take_along_dim(x, anchors[..., None], dim=1) @ x.mT       # (B, A, N)

    with torch.autocast(noise.device.type, enabled=False):  # thresholds want all digits
        found = similarity(patches)
        if embeddings is not None and embedding_weight:
            found = torch.lerp(found, similarity(embeddings.to(found)), embedding_weight)
    return found.amax(dim=1).scatter(1, anchors, math.inf)


def below(closest: Tensor, threshold: float) -> Tensor:
    """What is not more similar to an anchor than the threshold is visible. (B, N) -> (B, N) bool.

    A picture of which nothing would be visible shows what is least similar.
    """
    return closest <= closest.amin(dim=1, keepdim=True).clamp(min=threshold)


def similarity_threshold(
    closest: Tensor, mask_ratio: float, min_mask_ratio: float | None = None
) -> float:
    """The threshold under which 1 - mask_ratio of all patches are seen. closest (B, N) -> number.

    Found by bisection, as in the paper. No picture shows more patches than its K places hold.
    """
    if mask_ratio < ANCHORS:
        return math.inf  # not even anchors are hidden
    n = closest.shape[1]
    places = num_keep(n, share_skipped(mask_ratio, min_mask_ratio))
    low, high = -1.0, 1.0
    for _ in range(25):
        middle = (low + high) / 2
        seen = below(closest, middle).sum(dim=1).clamp(max=places).double().mean().item()
        low, high = (middle, high) if seen < n * (1 - mask_ratio) else (low, middle)
    return high


# --- From a teacher -------------------------------------------------------------------------------


def attentive_scores(noise: Tensor, grid: tuple[int, int], attention: Tensor) -> Tensor:
    """A-CLIP (2212.08653, section 3): what a teacher's class token attends to most is kept.

    attention (B, N) -> scores (B, N); no noise. Patches are chosen one by one, where the paper
    keeps cells of 2 x 2 (100 of 196 patches at 50 %, for which we keep 98).
    """
    return attention


MASKS = {
    "none": none_scores,
    "random": random_scores,
    "gaussian": gaussian_scores,
    "gumbel": gumbel_scores,
    "center-crop": center_crop_scores,
    "grid": grid_scores,
    "block": block_scores,
    "cluster": cluster_scores,
    "attentive": attentive_scores,
}


def declared(row: Callable) -> dict[str, bool]:
    """What a strategy takes beside noise and its second argument: name -> whether it must be."""
    names = list(inspect.signature(row).parameters.values())[2:]
    return {p.name: p.default is p.empty for p in names}


def apply_row(
    registry: dict, kind: str, name: str, first: tuple, always: dict, inputs: dict
) -> object:
    """Call a registry's row on what it declares; InputError names what is unknown or missing."""
    if name not in registry:
        raise InputError(f"unknown {kind} '{name}': choose one of {', '.join(registry)}")
    known = sorted({key for row in registry.values() for key in declared(row)})
    unknown = [key for key in inputs if key not in known]
    if unknown:
        raise InputError(f"no {kind} takes '{unknown[0]}': inputs are {', '.join(known)}")
    inputs = {**inputs, **always}
    wanted = declared(registry[name])
    given = {key: inputs[key] for key in wanted if inputs.get(key) is not None}
    missing = [key for key, needed in wanted.items() if needed and key not in given]
    if missing:
        raise InputError(f"{kind} '{name}' needs {' and '.join(missing)}, which was not given")
    return registry[name](*first, **given)


def sample_mask(
    mask: str,
    batch: int,
    grid: int | tuple[int, int],
    mask_ratio: float,
    *,
    sigma: float | tuple[float, float] = 0.2,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    **inputs: object,
) -> tuple[Tensor, Tensor | None]:
    """Choose the kept patches: ids_keep (B, K) int64, and visible (B, K) bool or None for all.

    A pure function of `noise` (B, N), uniform in [0, 1), drawn from `generator` if absent; `grid`
    is patches a side or (rows, columns); `inputs` holds whatever else the mask's row declares.
    Raises InputError for an unknown mask, a ratio outside [0, 1), or an input that is missing.
    """
    grid = (grid, grid) if isinstance(grid, int) else tuple(grid)
    n = grid[0] * grid[1]
    k = num_keep(n, mask_ratio)
    if noise is None:
        device = generator.device if generator else None
        noise = torch.rand(batch, n, generator=generator, device=device)
    if tuple(noise.shape) != (batch, n):
        raise InputError(f"noise has shape {tuple(noise.shape)}, the mask needs {(batch, n)}")
    always = {"sigma": sigma, "mask_ratio": mask_ratio}
    scores = apply_row(MASKS, "mask", mask, (noise, grid), always, inputs)
    scores, hidden = scores if isinstance(scores, tuple) else (scores, None)
    if scores.shape != noise.shape:
        shape = tuple(scores.shape)
        raise InputError(f"mask '{mask}' gave scores {shape} for {(batch, n)} patches")
    if mask == "none":
        k = n
    elif "min_mask_ratio" in declared(MASKS[mask]):
        k = num_keep(n, share_skipped(mask_ratio, inputs.get("min_mask_ratio")))
    ids_keep = scores.topk(k, dim=1).indices                                   # (B, K)
    return ids_keep, None if hidden is None else ~hidden.gather(1, ids_keep)


def sample_ids_keep(*args: object, **kwargs: object) -> Tensor:
    """The first element of sample_mask, same arguments: ids_keep (B, K)."""
    return sample_mask(*args, **kwargs)[0]


def share_skipped(mask_ratio: float, min_mask_ratio: float | None) -> float:
    """Share never computed by a mask of varying size; Cluster Masking's is 0.3 at 0.5."""
    return max(0.0, mask_ratio - 0.2) if min_mask_ratio is None else min_mask_ratio


# --- A mask with all that it needs beside noise ---------------------------------------------------


@dataclass
class Masker:
    """A mask's settings, and the state that training finds for it; called on pictures, it masks.

    What the row declares is supplied: settings, the pictures' pixels, patch embeddings, the
    attention of a teacher. So a mask is a function of noise, pictures and the checkpointed state.
    """

    mask: str = "none"
    mask_ratio: float = 0.0
    sigma: float | tuple[float, float] = 0.2  # a variance, or two: rows, columns
    centre: tuple[float, float] = (0.0, 0.0)  # (row, column) on [-1, 1]
    min_mask_ratio: float | None = None  # share never computed, where a mask's size varies
    embedding_weight: float = 0.0  # share of patch embeddings in cluster's similarity, now
    teacher_scale: float = 1.0  # size of the pictures that the teacher gets
    threshold: float | None = None  # cluster's, found by find_threshold
    teacher: nn.Module | None = None  # attentive's, made by follow

    SUPPLIED: ClassVar = {"sigma", "mask_ratio", "centre", "pixels", "attention"}

    def needs(self, name: str) -> bool:
        """Whether the mask's row declares an input of this name."""
        return name in declared(MASKS[self.mask])

    def unmet(self) -> list[str]:
        """Inputs that the mask's row demands and that nobody here supplies."""
        row = declared(MASKS[self.mask])
        return [name for name, must in row.items() if must and name not in self.SUPPLIED]

    def describe(self, grid: tuple[int, int]) -> str:
        """How much is kept of a grid's patches, in words."""
        n = grid[0] * grid[1]
        if self.mask == "none":
            return f"no mask: all {n} patches"
        k = num_keep(n, self.mask_ratio)
        text = f"mask {self.mask} keeps {k} of {n} patches ({1 - k / n:.1%} removed)"
        if self.needs("min_mask_ratio"):
            k = num_keep(n, share_skipped(self.mask_ratio, self.min_mask_ratio))
            text += f" on the average, and computes {k}"
        return text

    @torch.no_grad()
    def __call__(
        self, images: Tensor, noise: Tensor, tower: nn.Module, **inputs: object
    ) -> tuple[Tensor | None, Tensor | None]:
        """Pictures (B, 3, H, W), noise (B, N) -> ids_keep and visible (B, K); None: all are kept.

        `inputs` wins over what would be supplied.
        """
        if self.mask == "none":
            return None, None
        if self.needs("attention") and "attention" not in inputs and self.teacher:
            inputs["attention"] = self.attention(images, tower.config.grid)
        if self.needs("embeddings"):
            inputs["embeddings"] = self.embeddings(images, tower)
        settings = {"sigma", "centre", "min_mask_ratio", "embedding_weight", "threshold"}
        plain = {name: getattr(self, name) for name in settings if self.needs(name)}
        inputs = {**plain, **({"pixels": images} if self.needs("pixels") else {}), **inputs}
        return sample_mask(
            self.mask, len(images), tower.config.grid, self.mask_ratio, noise=noise, **inputs
        )

    def embeddings(self, images: Tensor, tower: nn.Module) -> Tensor | None:
        """All patches projected by the tower, in full precision, if weighted. (B, N, D)"""
        if not self.embedding_weight:
            return None
        with torch.autocast(images.device.type, enabled=False):
            patches = normalise(patchify(images, tower.config.grid))
            return F.linear(patches, tower.conv1.weight.flatten(1))

    def attention(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """What the teacher attends to, at the patches of `grid`. (B, 3, H, W) -> (B, N)."""
        found, _ = attend(self.teacher, scaled(images, self.teacher_scale))
        return resized_map(found, grid).flatten(1)

    @torch.no_grad()
    def find_threshold(self, blocks: Iterable[tuple[Tensor, Tensor]], tower: nn.Module) -> None:
        """Set the threshold under which blocks of (pictures, noise) show 1 - mask_ratio of all."""
        closest = torch.cat([
            closest_anchor(
                noise, tower.config.grid, images, self.embeddings(images, tower),
                self.embedding_weight,
            )
            for images, noise in blocks
        ])  # fmt: skip
        self.threshold = similarity_threshold(closest, self.mask_ratio, self.min_mask_ratio)

    @torch.no_grad()
    def follow(self, tower: nn.Module, momentum: float) -> None:
        """Move the teacher towards the tower, of which it begins as a copy: an EMA by torch."""
        if self.teacher is None:
            self.teacher = copy.deepcopy(tower).requires_grad_(False)
        move_towards(self.teacher, tower, momentum)

    def state(self) -> dict:
        """Plain values and tensors, for a checkpoint."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**plain, "teacher": self.teacher and self.teacher.state_dict()}

    @staticmethod
    def restored(state: dict, tower: nn.Module) -> "Masker":
        """The masker whose state() a checkpoint holds, beside its tower; else InputError."""
        try:
            masker = Masker(**{**state, "teacher": None})
            if state["teacher"]:
                masker.teacher = copy.deepcopy(tower).requires_grad_(False)
                masker.teacher.load_state_dict(state["teacher"])
        except (TypeError, KeyError, RuntimeError) as error:
            raise InputError(
                f"the checkpoint's mask is of another version ({type(error).__name__}): train again"
            ) from None
        return masker


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
    """One step of torch's exponential moving average, on the teacher's parameters in place."""
    pair = list(teacher.parameters()), list(student.parameters())
    get_ema_multi_avg_fn(momentum)(*pair, None)


def scaled(images: Tensor, scale: float) -> Tensor:
    """Pictures at another size, as floats in [0, 1]. (B, 3, H, W) -> (B, 3, scale H, scale W)."""
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    if scale == 1:
        return images
    size = [round(side * scale) for side in images.shape[2:]]
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def resized_map(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resample maps (B, R, C) to another grid, bilinear."""
    if tuple(maps.shape[1:]) == tuple(grid):
        return maps
    return F.interpolate(maps[:, None], grid, mode="bilinear", align_corners=False)[:, 0]
