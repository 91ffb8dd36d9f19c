"""Which patches a tower sees: the masking strategies of the field behind one interface.

    noise (B, N), uniform in [0, 1)  ->  a strategy's scores (B, N)  ->  the K highest are kept

A strategy is one function and one line in MASKS. Its further parameters name what it needs beside
noise. A parameter annotated with a Setting becomes a flag of train.py with its default, help and
range; the others are inputs that training supplies by name: mask_ratio, pixels (pictures as the
tower gets them), attention, ... A strategy that cannot fill all K places returns (scores, hidden),
hidden (B, N) bool: patches that only fill a place, and that nothing attends to.

Shapes: B pairs, N patches of a (rows, columns) grid, K kept.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Annotated, NamedTuple, get_type_hints

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import glip
from glip import (
    MIN_SIGMA,
    ImageTower,
    InputError,
    at_least_fp32,
    log_gaussian,
    normalise,
    num_keep,
    patchify,
)


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

    What GLIP's text could also mean and its authors' code does not do: the K highest of a log
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


def cluster_scores(
    noise: Tensor, grid: tuple[int, int], pixels: Tensor, mask_ratio: float,
    threshold: float | None = None, embeddings: Tensor | None = None,
    min_mask_ratio: Annotated[
        float | None, Setting("share never computed (none: mask_ratio - 0.2)", 0, 1)
    ] = None,
    embedding_weight: Annotated[
        float, Setting("share of patch embeddings in similarity, at the end of training", 0, 1)
    ] = 0.0,
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

SUPPLIED = {  # inputs that training supplies to a mask that asks for them, and settings of theirs
    "mask_ratio": {}, "pixels": {},
    "attention": {
        "teacher_scale": (float, 1.0, Setting(
            "size of the teacher's pictures; 0.5 is A-CLIP-eff", 1e-3, 1)),
        "teacher_momentum": (float, 0.9, Setting(
            "of the moving average at the start; 1 at the end", 0, 1)),
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
    """Call a registry's row on what it takes; InputError names what is unknown or missing."""
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
    if scores.shape != noise.shape:
        shape = tuple(scores.shape)
        raise InputError(f"mask '{mask}' gave scores {shape} for {(batch, n)} patches")
    ids_keep = scores.topk(k, dim=1).indices                                   # (B, K)
    return ids_keep, None if hidden is None else ~hidden.gather(1, ids_keep)


def num_computed(mask: str, n: int, mask_ratio: float, min_mask_ratio: float | None = None) -> int:
    """K, the patches of n that a mask computes: all of "none", more than are seen of "cluster"."""
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


# --- A mask with all that it needs beside noise ---------------------------------------------------


def momentum_at(step: int, steps: int, start: float) -> float:
    """The teacher's momentum: from `start` to 1 along half a cosine, as in A-CLIP."""
    return 1 - (1 - start) * 0.5 * (1 + math.cos(math.pi * step / steps))


def embedding_weight_at(step: int, steps: int, last: float) -> float | None:
    """The embeddings' weight where it changes, from 0 to `last` in eight steps; None elsewhere."""
    places = [i for i in range(8) if round(i * steps / 8) == step]
    return last * places[-1] / 7 if places else None


class Masker:
    """A mask, its settings, and the state that training finds for it; called on pictures, it masks.

    The mask is a function of noise, pictures and this state, which a checkpoint holds.
    """

    def __init__(self, mask: str = "none", mask_ratio: float = 0.0, **settings: object) -> None:
        known = settings_of(MASKS[mask])
        self.mask, self.mask_ratio = mask, mask_ratio
        self.settings = {name: default for name, (_, default, _) in known.items()} | settings
        for name, value in settings.items():
            if name not in known:
                raise InputError(f"mask '{mask}' has no setting '{name}'")
            check_setting(name, value, known[name][2])
        self.threshold: float | None = None  # below which a patch is not like an anchor
        self.embedding_weight = self.settings.get("embedding_weight", 0.0)  # now, in training
        self.teacher: nn.Module | None = None

    def needs(self, name: str) -> bool:
        """Whether the mask takes an input of this name."""
        return name in required_inputs(MASKS[self.mask])

    def missing_inputs(self) -> list[str]:
        """Required inputs that nothing here supplies."""
        row = required_inputs(MASKS[self.mask])
        return [name for name, needed in row.items() if needed and name not in SUPPLIED]

    def num_computed(self, n: int) -> int:
        """How many of n patches are computed."""
        share = self.settings.get("min_mask_ratio")
        return num_computed(self.mask, n, self.mask_ratio, share)

    def summary(self, grid: tuple[int, int]) -> str:
        """How many of a grid's patches are kept, in words."""
        n = math.prod(grid)
        k, computed = num_keep(n, self.mask_ratio), self.num_computed(n)
        if self.mask == "none":
            return f"no mask: all {n} patches"
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
            "embeddings": lambda: self.embeddings(images, tower),
            "threshold": lambda: self.threshold,
            "embedding_weight": lambda: self.embedding_weight,
        }
        inputs = {name: supply() for name, supply in supplies.items()
                  if self.needs(name) and name not in inputs} | inputs  # fmt: skip
        own = {name: value for name, value in self.settings.items() if self.needs(name)}
        return sample_mask(
            self.mask, len(images), grid, self.mask_ratio, noise=noise, **(own | inputs)
        )

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
        return resized_map(found, grid).flatten(1)

    def before_step(
        self, step: int, steps: int, tower: ImageTower, sample: Callable[[], Iterable]
    ) -> None:
        """Update the teacher, and at fixed steps cluster's threshold on sample()'s blocks."""
        if self.needs("attention"):
            momentum = momentum_at(step, steps, self.settings["teacher_momentum"])
            self.update_teacher(tower, momentum)
        weight = embedding_weight_at(step, steps, self.settings.get("embedding_weight", 0.0))
        if self.needs("threshold") and weight is not None and (step == 0 or weight > 0):
            self.embedding_weight, found = weight, [None]
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
            closest.append(closest_anchor(noise, grid, images, embeddings, self.embedding_weight))
        share = self.settings["min_mask_ratio"]
        self.threshold = similarity_threshold(torch.cat(closest), self.mask_ratio, share)

    @torch.no_grad()
    def update_teacher(self, tower: ImageTower, momentum: float) -> None:
        """Move the teacher, at first a copy of the tower, towards the tower."""
        if self.teacher is None:
            self.teacher = copy.deepcopy(tower).requires_grad_(False)
        move_towards(self.teacher, tower, momentum)

    def state(self) -> dict:
        """Plain values and tensors, for a checkpoint."""
        plain = {key: value for key, value in vars(self).items() if key != "teacher"}
        return {**plain, "teacher": self.teacher and self.teacher.state_dict()}

    @staticmethod
    def restored(state: dict, tower: nn.Module) -> "Masker":
        """The masker of a state(), beside its tower; InputError for another version's."""
        try:
            masker = Masker(state["mask"], state["mask_ratio"], **state["settings"])
            masker.threshold = state["threshold"]
            masker.embedding_weight = state["embedding_weight"]
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


def resized_map(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resample maps (B, R, C) to another grid, bilinear."""
    if tuple(maps.shape[1:]) == tuple(grid):
        return maps
    return F.interpolate(maps[:, None], grid, mode="bilinear", align_corners=False)[:, 0]
