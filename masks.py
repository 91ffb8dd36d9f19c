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
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI CLIP's normalisation, red green blue
STD = (0.26862954, 0.26130258, 0.27577711)


class InputError(ValueError):
    """Bad input, told in one sentence with the remedy; the scripts print it and exit with 2."""


DRAWS = 8  # random numbers that one augmented picture may use


def noise(seed: int, purpose: str, position: int, count: int, n: int) -> np.ndarray:
    """Uniform numbers in [0, 1) for positions position ... position + count - 1: (count, n) fp32.

    Counter-based (Philox): what stands at a position depends on nothing but the arguments.
    """
    blocks = -(-n // 4)  # a block of the generator is four 64-bit words
    key = [seed, zlib.crc32(purpose.encode())]
    words = np.random.Philox(key=key, counter=[position * blocks, 0, 0, 0])
    words = words.random_raw(count * blocks * 4).reshape(count, blocks * 4)[:, :n]
    return (words >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


# ------------------------------------------------------------------------------------------------
# From noise alone
# ------------------------------------------------------------------------------------------------


def none_scores(noise: Tensor, grid: tuple[int, int]) -> Tensor:
    """CLIP: no mask; every patch is kept, in reading order. noise (B, N) -> scores (B, N)."""
    return -torch.arange(noise.shape[1], device=noise.device).expand_as(noise)


def random_scores(noise: Tensor, grid: tuple[int, int]) -> Tensor:
    """FLIP (2212.00794, section 3): every patch is equally likely. noise (B, N) -> scores."""
    return noise


def gaussian_scores(
    noise: Tensor, grid: tuple[int, int], sigma: float | tuple, centre: tuple = (0.0, 0.0)
) -> Tensor:
    """GLIP (2403.15837, method section): noise plus a normal density. (B, N) -> scores (B, N).

    The patch centres span [-1, 1] on each axis; sigma is the density's VARIANCE, as in the authors'
    code (their 0.2 is a standard deviation of 0.447), one value or (rows, columns); `centre` is its
    mean, (row, column). Because the density is added to the noise, sigma sets the width and the
    strength of the centre's advantage. This is not weighted sampling without replacement
    (gumbel_scores), which at sigma 0.1 and 50 % keeps the rim six times less often.
    """
    log_weight, sigma = log_gaussian(grid, sigma, centre, noise.device)
    peak = 1 / (2 * math.pi * math.sqrt(math.prod(sigma)))
    return noise + peak * torch.exp(log_weight)                                # (B, N)


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
    return -sent(place, noise.device).to(noise.dtype).expand_as(noise)


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


def centres(n: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Patch centres along one axis: n numbers over [-1, 1], the outermost exactly at the ends."""
    ends = (-1, 1) if n > 1 else (0, 0)
    return torch.linspace(*ends, n, device=device, dtype=dtype)


MIN_SIGMA = 1e-6  # far below it the density is not finite in fp32


def sent(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; for a copy to a GPU nobody waits, which takes pinned memory."""
    if device.type == "cuda" and x.is_cpu:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def log_gaussian(
    grid: tuple[int, int], sigma: float | tuple, centre: tuple, device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, tuple[float, float]]:  # fmt: skip
    """Log of a Gaussian weight whose peak is 1, at the patch centres (N,); sigma as a pair."""
    if len(centre) != 2:
        raise InputError(f"centre {centre} must be two numbers, row and column on [-1, 1]")
    pair = tuple(sigma) if isinstance(sigma, tuple | list) else (sigma, sigma)
    if len(pair) != 2 or not all(MIN_SIGMA <= s < math.inf for s in pair):
        raise InputError(
            f"sigma {sigma} is a variance and must be above 0, at least {MIN_SIGMA}: one or two"
        )
    y, x = (
        (centres(n, device, dtype) - c) ** 2 / (2 * s)
        for n, c, s in zip(grid, centre, pair, strict=True)
    )
    return -(y[:, None] + x[None, :]).flatten(), pair


# ------------------------------------------------------------------------------------------------
# From pixels
# ------------------------------------------------------------------------------------------------

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


# ------------------------------------------------------------------------------------------------
# From a teacher
# ------------------------------------------------------------------------------------------------


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


# ------------------------------------------------------------------------------------------------
# The seam
# ------------------------------------------------------------------------------------------------


def num_keep(n: int, mask_ratio: float) -> int:
    """Patches kept of n, at least one: 98, 49, 16 of 196 at 50, 75, 91.8 %."""
    if not 0 <= mask_ratio < 1:
        raise InputError(f"mask ratio {mask_ratio} is outside [0, 1): it is the share removed")
    return max(1, round(n * (1 - mask_ratio)))


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


def patchify(images: Tensor, grid: tuple[int, int], ids_keep: Tensor | None = None) -> Tensor:
    """Cut all patches, or the kept ones, out of pictures. (B, 3, H, W), (B, K) -> (B, K, 3pp)."""
    patches = images.unflatten(3, (grid[1], -1)).unflatten(2, (grid[0], -1))   # (B, 3, R, p, C, p)
    patches = patches.permute(0, 2, 4, 1, 3, 5)                                # (B, R, C, 3, p, p)
    if ids_keep is None:
        return patches.flatten(1, 2).flatten(2)
    samples = torch.arange(len(images), device=images.device)[:, None]
    return patches[samples, ids_keep // grid[1], ids_keep % grid[1]].flatten(2)


def normalise(patches: Tensor) -> Tensor:
    """Bytes, or floats in [0, 1], -> floats of CLIP's mean 0 and deviation 1. (B, K, 3pp)."""
    scale = 255.0 if patches.dtype == torch.uint8 else 1.0
    x = patches.unflatten(-1, (3, -1))                                         # (B, K, 3, pp)
    x = x.float() if x.dtype == torch.uint8 else x
    # filled where they are needed: a GPU would wait for a copy from the host
    mean, std = (torch.stack([x.new_full((1,), v) for v in c]) for c in (MEAN, STD))  # (3, 1)
    return ((x - scale * mean) / (scale * std)).flatten(2)


# ------------------------------------------------------------------------------------------------
# A mask with all that it needs beside noise
# ------------------------------------------------------------------------------------------------


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
            return tower.project(patchify(images, tower.config.grid))

    def attention(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """What the teacher attends to, at the patches of `grid`. (B, 3, H, W) -> (B, N)."""
        found, _ = self.teacher.attend(scaled(images, self.teacher_scale))
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


# ------------------------------------------------------------------------------------------------
# Words: the same idea. noise (B, T) and the captions' lengths (B,), start and end tokens included,
# -> scores (B, T); the highest of the words are kept, in their order
# ------------------------------------------------------------------------------------------------


def truncate_text(noise: Tensor, lengths: Tensor) -> Tensor:
    """CLIP: the first words are kept. noise (B, T) -> scores (B, T)."""
    return -torch.arange(noise.shape[1], device=noise.device).expand_as(noise)


def random_text(noise: Tensor, lengths: Tensor) -> Tensor:
    """CLIPA's random text mask (2305.07017, on text tokens): every word is equally likely."""
    return noise


def block_text(noise: Tensor, lengths: Tensor, keep: int) -> Tensor:
    """CLIPA's block text mask (2305.07017, on text tokens): `keep` words in a row, anywhere."""
    free = (lengths - 2 - keep).clamp(min=0)[:, None]  # words that go
    first = 1 + (noise[:, :1] * (free + 1)).long()                             # (B, 1)
    place = torch.arange(noise.shape[1], device=noise.device)
    return ((place >= first) & (place < first + keep)).to(noise)


def frequency_text(
    noise: Tensor, lengths: Tensor, word_shares: Tensor, text_threshold: float
) -> Tensor:
    """CLIPF (2412.16148, method section): frequent words are dropped more often. -> scores (B, T).

    A word with the share f of all words goes with probability 1 - sqrt(t / f), t the
    text_threshold; that is subtracted from the noise, GLIP's rule for words. word_shares (B, T).
    """
    return noise - (1 - (text_threshold / word_shares.clamp(min=1e-12)).sqrt()).clamp(min=0)


def syntax_text(noise: Tensor, lengths: Tensor, word_ranks: Tensor, keep: int) -> Tensor:
    """CLIPA's syntax mask, as its code has it: `keep` words are chosen, then cut to `keep` tokens.

    word_ranks (B, T): each token's word in the order of choice, from 0; nouns come first, then
    adjectives, verbs and others. No noise: a caption is shortened in the same way every time.
    """
    place = torch.arange(noise.shape[1], device=noise.device)
    return -(place + noise.shape[1] * (word_ranks >= keep)).to(noise)


TEXT_MASKS = {
    "truncate": truncate_text,
    "random": random_text,
    "block": block_text,
    "frequency": frequency_text,
    "syntax": syntax_text,
}


def mask_text(
    text_mask: str,
    tokens: Tensor,
    text_tokens: int,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    **inputs: object,
) -> Tensor:
    """Shorten captions to text_tokens, start and end included. (B, T) -> (B, text_tokens).

    The start and end token stay, and so does the order of what is kept; shorter captions are
    padded with zeros. A pure function of `noise` (B, T), drawn from `generator` if absent. Raises
    InputError for an unknown mask, fewer than 3 tokens, or an input that is missing, by name.
    """
    if text_tokens < 3:
        raise InputError(f"{text_tokens} text tokens leave no word between start and end: give 3")
    batch, length = tokens.shape
    if noise is None:
        device = generator.device if generator else tokens.device
        noise = torch.rand(batch, length, generator=generator, device=device)
    if tuple(noise.shape) != (batch, length):
        raise InputError(f"noise has shape {tuple(noise.shape)}, the texts {(batch, length)}")
    ends = tokens.argmax(dim=1)  # the end token has the highest id              (B,)
    always = {"keep": text_tokens - 2}
    scores = apply_row(TEXT_MASKS, "text mask", text_mask, (noise, ends + 1), always, inputs)
    place = torch.arange(length, device=tokens.device)
    scores = scores.float().masked_fill(place > ends[:, None], -math.inf)
    scores = scores.masked_fill((place == 0) | (place == ends[:, None]), math.inf)
    kept = scores.topk(min(text_tokens, length), dim=1).indices.sort(dim=1).values
    return F.pad(tokens.gather(1, kept), (0, text_tokens - kept.shape[1]))
