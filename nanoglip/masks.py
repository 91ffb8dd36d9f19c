"""Which patches a tower sees: the masking strategies of the field behind one interface.

    noise (B, N), uniform in [0, 1)  ->  a strategy's scores (B, N)  ->  the K highest are kept

A strategy is one function and one line in MASKS. Its further parameters name what it needs beside
noise. A parameter annotated with a Setting becomes a flag of train.py with its default, help and
range; the others are inputs that training supplies by name: mask_ratio, pixels (pictures as the
tower gets them), attention, ... A strategy that cannot fill all K places returns (scores, hidden),
hidden (B, N) bool: patches that are only padding, and that nothing attends to.

Shapes: B pairs, N patches of a (rows, columns) grid, K kept.
"""

import inspect
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Annotated, NamedTuple, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor

import glip
from glip import MIN_SIGMA, InputError, at_least_fp32, log_gaussian, normalise, num_keep, patchify


class Setting(NamedTuple):
    """Marks a parameter that users set: its help, and the range of its number or numbers."""

    help: str
    low: float = -math.inf
    high: float = math.inf


# --- From noise alone -----------------------------------------------------------------------------


def none_scores(noise: Tensor, grid: tuple[int, int]) -> Tensor:
    """CLIP: no mask; every patch is kept, in reading order. noise (B, N) -> scores (B, N)."""
    return -torch.arange(noise.shape[1], device=noise.device).expand_as(noise)


def random_scores(noise: Tensor, grid: tuple[int, int]) -> Tensor:
    """FLIP (2212.00794, section 3): every patch is equally likely. noise (B, N) -> scores."""
    return noise


Sigma = Annotated[
    float | tuple[float, float],
    Setting("variance on [-1, 1], or two: of rows, of columns", MIN_SIGMA),
]
Center = Annotated[tuple[float, float], Setting("(row, column) of the centre", -1, 1)]


def gaussian_scores(
    noise: Tensor, grid: tuple[int, int], sigma: Sigma = 0.2, mask_center: Center = (0.0, 0.0)
) -> Tensor:
    """GLIP (2403.15837): glip.gaussian_scores. noise (B, N) -> scores (B, N)."""
    return glip.gaussian_scores(noise, grid, sigma, mask_center)


def gumbel_scores(
    noise: Tensor, grid: tuple[int, int], sigma: Sigma = 0.2, mask_center: Center = (0.0, 0.0)
) -> Tensor:
    """Control: draw patches with Gaussian weights, without replacement. (B, N) -> scores (B, N).

    GLIP's text could also mean this; its authors' code does not do it. The K highest of a log
    weight plus Gumbel noise are K successive weighted draws (1903.06059, on Gumbel-top-k).
    """
    gumbel = -torch.log(-torch.log(noise.clamp(min=torch.finfo(noise.dtype).tiny)))
    return gumbel + log_gaussian(grid, sigma, mask_center, noise.device)[0]


def center_crop_scores(
    noise: Tensor, grid: tuple[int, int], mask_center: Center = (0.0, 0.0)
) -> Tensor:
    """Control: GLIP without its noise, the K most central patches. noise (B, N) -> scores (B, N).

    Patches at equal distance are taken in reading order.
    """
    nearest = -log_gaussian(grid, 1.0, mask_center, torch.device("cpu"), torch.float64)[0]
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
EmbeddingWeight = Annotated[
    float, Setting("share of patch embeddings in similarity, at the end of training", 0, 1)
]


def cluster_scores(
    noise: Tensor, grid: tuple[int, int], pixels: Tensor, mask_ratio: float,
    threshold: float | None = None, embeddings: Tensor | None = None,
    min_mask_ratio: Annotated[
        float | None, Setting("share never computed (none: mask_ratio - 0.2)", 0, 1)
    ] = None,
    embedding_weight: EmbeddingWeight = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Cluster Masking (2405.08815, section 3): patches that look like an anchor go together.

    noise (B, N), pixels (B, 3, H, W) -> scores (B, N), hidden (B, N). Anchors are the patches of
    the highest noise; whatever is more similar to one than `threshold` is hidden. Visible patches
    score above hidden ones, so the noise drops those that K cannot hold, and hidden patches fill
    free places. `threshold` comes from similarity_threshold on a fixed sample; without it, from
    these pictures. embeddings are (B, N, D). min_mask_ratio sets K in sample_mask.
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
    """Cosine similarity of every patch to the anchor most like it; of anchors, infinity. (B, N)."""
    n = noise.shape[1]
    anchors = noise.topk(n - int(n * (1 - ANCHORS)), dim=1).indices            # (B, A)
    patches = normalise(patchify(pixels, grid))                                # (B, N, 3pp)
    found = similarity(patches, embeddings, embedding_weight, anchors)         # (B, A, N)
    return found.amax(dim=1).scatter(1, anchors, math.inf)


def similarity(
    patches: Tensor, embeddings: Tensor | None = None, embedding_weight: float = 0.0,
    chosen: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Cosine similarity of all patches, or of those chosen (B, A), to all: (B, N or A, N).

    patches (B, N, 3pp) are standardised each, to which the cosine of their centred pixels is equal;
    embeddings (B, N, D) have a weight in [0, 1] beside them.
    """
    patches = at_least_fp32(patches)
    patches = patches - patches.mean(dim=-1, keepdim=True)

    def cosine(x: Tensor) -> Tensor:
        x = F.normalize(x, dim=-1)
        return (x if chosen is None else torch.take_along_dim(x, chosen[..., None], dim=1)) @ x.mT

    with torch.autocast(patches.device.type, enabled=False):  # comparisons need full precision
        found = cosine(patches)
        if embeddings is not None and embedding_weight:
            found = torch.lerp(found, cosine(embeddings.to(found)), embedding_weight)
    return found


def below(closest: Tensor, threshold: float) -> Tensor:
    """What is not more similar to an anchor than the threshold is visible. (B, N) -> (B, N) bool.

    If nothing of a picture would be visible, its least similar patch is.
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


CANDIDATES = 0.05  # share of the patches that are candidates; 10 of 196
EDGE, ALIKE = 0.5, 0.5  # of the strongest edge: protected from here; beside a candidate: may hide
ROUNDS = 20  # of balanced: sums are then 1 to about 3e-4


def pgs_scores(
    noise: Tensor, grid: tuple[int, int], pixels: Tensor, mask_ratio: float,
    embeddings: Tensor | None = None, embedding_weight: EmbeddingWeight = 0.0,
    mask_range: Annotated[
        float, Setting("share masked beyond mask_ratio, at most, where patches are alike", 0, 1)
    ] = 0.0,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """CLIP-PGS (2503.17080): patches like a few candidates are dropped, edges are kept.

    noise (B, N), pixels (B, 3, H, W) -> scores (B, N), and hidden (B, N) if mask_range is above 0.
    Candidates are the patches of the highest noise that have no strong edge. A patch is as alike as
    its similarity to some candidate, S + Sinkhorn(S); the most alike go first, edges last.

    The paper's variants are mask_ratio 0.5, and 0.3 with mask_range 0.2: up to half is masked. We
    did not have its body. S + Sinkhorn(S), ALIKE, the share of candidates and grey as the mean of
    colours are from the authors' code. EDGE is ours, and so is an order by likeness where they
    choose at random. In three things we follow the paper's abstract against the code: Sobel sees
    pixels, strong edges are not candidates, and Sinkhorn (of max(S, 0)) ends at sums of 1.
    """
    n, strong = noise.shape[1], edges(pixels, grid) > EDGE
    candidates = (noise - strong.to(noise)).topk(n - int(n * (1 - CANDIDATES)), dim=1)
    found = similarity(normalise(patchify(pixels, grid)), embeddings, embedding_weight)
    found = found + balanced(found.clamp(min=1e-6))                            # (B, N, N)
    alike = torch.take_along_dim(found, candidates.indices[..., None], dim=1).amax(dim=1)
    first = 3 + candidates.values.to(alike)  # others are below 2
    alike = alike.scatter(1, candidates.indices, first) - 6 * strong
    scores = noise / 1000 - alike  # patches as good as equal are ordered by noise
    if not mask_range:
        return scores, None
    rank = scores.argsort(dim=1, descending=True).argsort(dim=1)
    return scores, (alike > ALIKE) & (rank >= max(1, round(n * (1 - mask_ratio - mask_range))))


def balanced(alike: Tensor) -> Tensor:
    """Sinkhorn's scaling of symmetric matrices above 0 to rows and columns of sum 1. (B, N, N).

    One vector scales both sides, so that the matrix stays symmetric.
    """
    scale = alike.sum(dim=-1, keepdim=True).rsqrt()                            # (B, N, 1)
    for _ in range(ROUNDS):
        scale = (scale / (alike * scale.mT).sum(dim=-1, keepdim=True)).sqrt()
    return scale * alike * scale.mT


def edges(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Sobel's gradient of the grey picture, its mean in each patch, from 0 to 1. (B, N).

    Grey is the mean of the colours; the border is repeated. A picture without edges has zeros.
    """
    grey = F.pad(pixels.float().mean(dim=1), (1, 1, 1, 1), mode="replicate")   # (B, H+2, W+2)
    # slices instead of a convolution, whose kernel a GPU would wait for
    down, across = grey[:, 2:] - grey[:, :-2], grey[:, :, 2:] - grey[:, :, :-2]
    down = down[:, :, :-2] + 2 * down[:, :, 1:-1] + down[:, :, 2:]
    across = across[:, :-2] + 2 * across[:, 1:-1] + across[:, 2:]
    cells = torch.hypot(down, across).unflatten(2, (grid[1], -1)).unflatten(1, (grid[0], -1))
    found = cells.mean(dim=(2, 4)).flatten(1)                                  # (B, N)
    found = found - found.amin(dim=1, keepdim=True)
    return found / found.amax(dim=1, keepdim=True).clamp(min=1e-6)


# --- From a teacher -------------------------------------------------------------------------------


def attentive_scores(noise: Tensor, grid: tuple[int, int], attention: Tensor) -> Tensor:
    """A-CLIP (2212.08653, section 3): what a teacher's class token attends to most is kept.

    attention (B, N) -> scores (B, N); no noise. Patches are chosen one by one, where the paper
    keeps cells of 2 x 2 (100 of 196 patches at 50 %, for which we keep 98).
    """
    return attention


# --- From a gaze ----------------------------------------------------------------------------------


def gaze_scores(noise: Tensor, grid: tuple[int, int], gaze: Tensor, sigma: Sigma = 0.2) -> Tensor:
    """Ours: GLIP's densities, handed out by the rank of the gaze instead of the distance.

    gaze (B, N), high where the loss is expected to depend on a patch (gaze.py); noise (B, N) ->
    scores (B, N). The mask is exactly as random as GLIP's.
    """
    hill = glip.gaussian_scores(torch.zeros_like(noise[:1]), grid, sigma).sort(descending=True)
    order = gaze.argsort(dim=1, descending=True, stable=True)                  # (B, N)
    return noise + torch.empty_like(noise).scatter_(1, order, hill.values.expand_as(noise))


MASKS = {
    "none": none_scores,
    "random": random_scores,
    "gaussian": gaussian_scores,
    "gumbel": gumbel_scores,
    "center-crop": center_crop_scores,
    "grid": grid_scores,
    "block": block_scores,
    "cluster": cluster_scores,
    "pgs": pgs_scores,
    "attentive": attentive_scores,
    "gaze": gaze_scores,
}

SUPPLIED = {  # inputs that training supplies to a mask that asks for them, and settings of theirs
    "mask_ratio": {}, "pixels": {}, "gaze": {},
    "attention": {
        "teacher_scale": (float, 1.0, Setting(
            "size of the teacher's pictures; 0.5 is A-CLIP-eff", 1e-3, 1)),
        "teacher_momentum": (float, 0.9, Setting(
            "momentum of the teacher's moving average at first; 1 at last", 0, 1)),
    },
}  # fmt: skip

# --- The interface --------------------------------------------------------------------------------


@lru_cache
def required_inputs(row: Callable) -> dict[str, bool]:
    """What a strategy takes beside its first two arguments: name -> whether it must be given."""
    names = list(inspect.signature(row).parameters.values())[2:]
    return {p.name: p.default is p.empty for p in names}


@lru_cache
def settings_of(row: Callable) -> dict[str, tuple[object, object, Setting]]:
    """A strategy's settings, by name: (type, default, Setting)."""
    hints, found = get_type_hints(row, include_extras=True), {}
    for name, parameter in inspect.signature(row).parameters.items():
        setting = next(iter(getattr(hints.get(name), "__metadata__", ())), None)
        if isinstance(setting, Setting):
            found[name] = (hints[name].__origin__, parameter.default, setting)
        found |= SUPPLIED.get(name, {})
    return found


def check_setting(name: str, value: object, setting: Setting) -> None:
    """Raise InputError for a number, or one of several, outside a setting's range."""
    numbers = value if isinstance(value, tuple | list) else (value,)
    if not all(n is None or setting.low <= n <= setting.high for n in numbers):
        flag = f"--{name.replace('_', '-')}"
        raise InputError(f"{flag} {value} is outside [{setting.low:g}, {setting.high:g}]")


def call_row(registry: dict, kind: str, name: str, first: tuple, inputs: dict) -> object:
    """The result of a registry's row on its inputs; InputError names an unknown or missing one."""
    if name not in registry:
        raise InputError(f"unknown {kind} '{name}': choose one of {', '.join(registry)}")
    wanted = required_inputs(registry[name])
    for key in inputs.keys() - wanted.keys():  # those of other rows are passed over
        known = sorted({key for row in registry.values() for key in required_inputs(row)})
        if key not in known:
            raise InputError(f"no {kind} takes '{key}': inputs are {', '.join(known)}")
    given = {key: inputs[key] for key in wanted if inputs.get(key) is not None}
    missing = [key for key, needed in wanted.items() if needed and key not in given]
    if missing:
        raise InputError(f"{kind} '{name}' needs {' and '.join(missing)}, which was not given")
    return registry[name](*first, **given)


def sample_mask(
    mask: str, batch: int, grid: int | tuple[int, int], mask_ratio: float, *,
    noise: Tensor | None = None, generator: torch.Generator | None = None, **inputs: object,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The kept patches: ids_keep (B, K) int64, and visible (B, K) bool or None for all.

    A pure function of `noise` (B, N), uniform in [0, 1), drawn from `generator` if absent; `grid`
    is patches a side or (rows, columns); `inputs` holds whatever else the mask takes, as sigma.
    Raises InputError for an unknown mask, a ratio outside [0, 1), or an input that is missing.
    """
    grid = (grid, grid) if isinstance(grid, int) else tuple(grid)
    n = grid[0] * grid[1]
    k = num_computed(mask, n, mask_ratio, inputs.get("min_mask_ratio"))
    if noise is None:
        device = generator.device if generator else None
        noise = torch.rand(batch, n, generator=generator, device=device)
    if tuple(noise.shape) != (batch, n):
        raise InputError(f"noise has shape {tuple(noise.shape)}, the mask needs {(batch, n)}")
    inputs = {**inputs, "mask_ratio": mask_ratio}
    scores = call_row(MASKS, "mask", mask, (noise, grid), inputs)
    scores, hidden = scores if isinstance(scores, tuple) else (scores, None)
    for what, x in (("scores", scores), ("hidden", noise if hidden is None else hidden)):
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        if shape != (batch, n):
            raise InputError(f"mask '{mask}' gave {what} {shape} for {(batch, n)} patches")
    ids_keep = scores.topk(k, dim=1).indices                                   # (B, K)
    return ids_keep, None if hidden is None else ~hidden.gather(1, ids_keep)


def num_computed(mask: str, n: int, mask_ratio: float, min_mask_ratio: float | None = None) -> int:
    """K, how many of n patches are computed: all for "none", more than are seen for "cluster"."""
    kept = num_keep(n, mask_ratio)
    if mask == "none":
        return n
    varies = mask in MASKS and "min_mask_ratio" in required_inputs(MASKS[mask])
    return num_keep(n, share_skipped(mask_ratio, min_mask_ratio)) if varies else kept


def share_skipped(mask_ratio: float, min_mask_ratio: float | None) -> float:
    """Share never computed by a mask of varying size; Cluster Masking's is 0.3 at 0.5."""
    if min_mask_ratio is not None and not 0 <= min_mask_ratio <= mask_ratio:
        raise InputError(f"--min-mask-ratio {min_mask_ratio} is outside [0, {mask_ratio}]")
    return max(0.0, mask_ratio - 0.2) if min_mask_ratio is None else min_mask_ratio
