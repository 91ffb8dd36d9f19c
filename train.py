"""Pre-train a CLIP model under a mask, then tune it for a moment without: one loop, two stages.

    python train.py                                         the demo, on the embedded emoji
    torchrun --nproc_per_node 8 train.py --mask gaussian    the same on eight processes
    python train.py --data my_pictures/ --epochs 30         your own pictures
    python train.py --recipe cc12m --data cc12m/            the paper's settings, on indexed shards
    python train.py --mask attentive --aclip                a rival's whole method

The demo trains for four minutes on two CPU cores with native bf16, and then names about 41 % of
1,809 emoji in the style of an artist that it never saw (three seeds in results/; chance: 0.06 %).

Writes to runs/NAME: config.json, log.jsonl, latest.pt (at every evaluation, until the run is done),
pretrained.pt (before tuning), model.pt, and quarantine.jsonl if pictures could not be read.
"""

import argparse
import contextlib
import json
import math
import os
import re
import shlex
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.distributed as dist
import tyro
from timm.optim import Muon
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import aclip
import data
import evaluate
import glip
from data import EMBEDDED, HELD_OUT, MAX_BAD, SAMPLINGS, VENDORS, Batches, TextMask
from glip import GLIP, GLIPConfig, InputError, Masker

# ------------------------------------------------------------------------------------------------
# Settings: the defaults are the demo's; a recipe changes some; a flag given by hand wins
# ------------------------------------------------------------------------------------------------

# The GLIP authors' README. What it leaves open is filled with open_clip's defaults (warm-up, weight
# decay, context of 77) or, for the tuning's warm-up, with ours. Their batch of 1,280 is stated for
# 50 % alone; crops cover 50 to 100 % of a picture (data.CROP_SCALE).
PAPER = {
    "data": (), "model": "ViT-B-16", "mask_ratio": 0.5, "epochs": 30.0, "batch_size": 1280,
    "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.2, "beta2": 0.98, "warmup": 10_000,
    "tune_epochs": 1.0, "tune_batch_size": 640, "tune_lr": 1e-5, "tune_warmup": 1_000,
    "teacher_momentum": 0.996, "text_threshold": 1e-6, "log_every": 100,
}  # fmt: skip
RECIPES = {
    "demo": {},
    "compare": {"steps": 450, "tune_epochs": 0.5},  # a row of the comparison of masks: 100 s
    "cc3m": PAPER,
    "cc12m": PAPER,
}


@dataclass(frozen=True)
class TrainConfig:
    """Pre-train a CLIP model under a mask, then tune it without."""

    recipe: Literal[tuple(RECIPES)] = "demo"  # a named set of the settings below

    # Data
    data: tuple[str, ...] = ("emoji",)  # emoji, scenes-center, -corner, -anywhere, or PATHs, URLs
    data_weights: tuple[float, ...] = ()  # passes of an epoch through each of --data (none: 1)
    sampling: Literal[("all", *SAMPLINGS)] = "all"  # which pairs an epoch of pre-training has
    sampling_share: float = 0.5  # share of the pairs that such an epoch has
    sampling_power: float = 0.2  # clusters: n pairs of a cluster count as n^power
    clusters: str = ""  # clusters: .npy or text file with the cluster of each pair, a whole number
    max_bad: float = MAX_BAD  # share of unreadable pictures above which the run stops
    vendors: tuple[str, ...] = ()  # emoji: art to train on (default: all but the held-out)
    held_out: Literal[VENDORS] = HELD_OUT  # emoji: whose art to evaluate on

    # Mask
    mask: Literal[tuple(glip.MASKS)] = "gaussian"  # which patches are kept
    mask_ratio: float = 0.75  # share of patches removed, in [0, 1)
    sigma: float | tuple[float, float] = 0.2  # variance on [-1, 1], or two: of rows, of columns
    mask_center: tuple[float, float] = (0.0, 0.0)  # (row, column) on [-1, 1]: where it is centred
    min_mask_ratio: float | None = None  # cluster: share never computed (none: mask_ratio - 0.2)
    embedding_weight: float = 0.0  # cluster: share of patch embeddings in similarity at the end
    teacher_scale: float = 1.0  # attentive: size of the teacher's pictures; 0.5 is A-CLIP-eff
    teacher_momentum: float = 0.9  # attentive: of the moving average at the start; 1 at the end
    aclip: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # attentive: A-CLIP's other losses

    # Words
    text_mask: Literal[("none", *glip.TEXT_MASKS)] = "none"  # which words are kept in pre-training
    text_tokens: int = 0  # length of a caption under a text mask, start and end included
    text_threshold: float = 1e-4  # frequency, sampling words: smaller shares count as rare

    # Model
    model: Literal[tuple(glip.SIZES)] = "ViT-nano-8"  # a row of glip.SIZES
    image_size: int = 0  # pixels a side (0: the model's own)

    # Pre-training
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: on the blocks' matrices, AdamW elsewhere
    batch_size: int = 256  # pairs per step, over all processes
    steps: int = 1250  # updates
    epochs: float = 0.0  # passes over the data, instead of steps
    lr: float = 1e-3  # highest learning rate (Muon's is twice that); then half a cosine to 0
    weight_decay: float = 0.1  # on matrices only
    beta2: float = 0.98  # AdamW's second decay
    warmup: int = 50  # steps of linear warm-up

    # Unmasked tuning, with a fresh optimizer and schedule
    tune_epochs: float = 1.0  # passes over the data (0: none)
    tune_batch_size: int = 256  # pairs per step, over all processes
    tune_lr: float = 3e-4  # highest learning rate
    tune_warmup: int = 5  # steps of linear warm-up
    tune_image_size: int = 0  # pixels a side (0: as in pre-training)

    # Machine
    seed: int = 0  # of weights, order, augmentation and masks
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where multiplied natively
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of these there is
    workers: int = -1  # data processes each (-1: 0 for embedded data, else the cores, at most 8)

    # Output
    out: str = ""  # folder of the run (default: runs/, named by what differs from the recipe)
    log_every: int = 10  # steps between records in log.jsonl
    eval_every: int = 0  # steps between evaluations (0: four in a stage)


MACHINE = {"device", "workers", "out", "log_every", "eval_every"}  # what no result depends on


def parse(arguments: list[str] | None = None) -> TrainConfig:
    """Command line -> settings: defaults, then the recipe's, then what was given by hand."""
    arguments = sys.argv[1:] if arguments is None else arguments
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--recipe", default="demo")
    recipe = "demo"
    with contextlib.suppress(argparse.ArgumentError):  # tyro tells it better
        recipe = first.parse_known_args(arguments)[0].recipe
    default = TrainConfig(recipe, **RECIPES[recipe]) if recipe in RECIPES else TrainConfig()
    config = tyro.cli(TrainConfig, args=arguments, default=default)
    given = {a.split("=")[0].lstrip("-").replace("-", "_") for a in arguments if a.startswith("--")}
    if {"steps", "epochs"} <= given:
        raise InputError("--steps and --epochs both set the length: give one of them")
    if "epochs" in given and not config.epochs > 0:
        raise InputError("--epochs must be above 0; give --steps to count in steps")
    if "steps" in given:
        config = replace(config, epochs=0.0)
    own = bool(config.data) and config.data[0] not in EMBEDDED
    if own and given & {"vendors", "held_out"}:
        names = " ".join(config.data)
        raise InputError(f"--vendors and --held-out are for emoji, not for --data {names}")
    for flag in sorted(given & {"data_weights", "sampling", "max_bad"}):
        if not own:
            raise InputError(f"{flag_of(flag)} is for pictures of your own: give their --data")
    if config.mask == "none":
        if "mask_ratio" in given and config.mask_ratio != 0:
            raise InputError("--mask none keeps every patch: leave --mask-ratio out")
        config = replace(config, mask_ratio=0.0)
    used = [
        glip.declared(registry[name])
        for registry, name in ((glip.MASKS, config.mask), (glip.TEXT_MASKS, config.text_mask))
        if name in registry
    ]
    used.append(data.sampling_inputs(config.sampling))
    for flag in sorted(given & FLAG_SERVES.keys()):
        if not any(name in row for row in used for name in FLAG_SERVES[flag].split()):
            raise InputError(
                f"{flag_of(flag)} does nothing under --mask {config.mask} --text-mask "
                f"{config.text_mask} --sampling {config.sampling}: leave it out"
            )
    return config


FLAG_SERVES = {  # flags that serve some strategies alone: the input by which a row asks for it
    "sigma": "sigma", "mask_center": "centre", "min_mask_ratio": "min_mask_ratio",
    "embedding_weight": "embedding_weight", "teacher_scale": "attention",
    "teacher_momentum": "attention", "aclip": "attention",
    "text_threshold": "text_threshold caption_scores", "sampling_share": "share",
    "sampling_power": "power", "clusters": "clusters",
}  # fmt: skip


def flag_of(name: str) -> str:
    """A setting as it is typed."""
    return f"--{name.replace('_', '-')}"


def check(config: TrainConfig, world: int) -> None:
    """Refuse settings that cannot work, before anything is read or written."""
    if not config.data:
        raise InputError(f"--recipe {config.recipe} needs your copy of the data: give --data PATH")
    for name in ("batch_size", "tune_batch_size"):
        flag, size = flag_of(name), getattr(config, name)
        if size < 2:
            raise InputError(f"{flag} {size}: a contrast needs at least 2 pairs")
        if size % world:
            raise InputError(f"{flag} {size} cannot be shared evenly by {world} processes")
    for name in ("steps", "lr", "tune_lr", "sigma", "log_every", "text_threshold"):
        if not all(0 < value < math.inf for value in as_tuple(getattr(config, name))):
            raise InputError(f"{flag_of(name)} must be above 0 and finite")
    for name in ("tune_epochs", "weight_decay", "warmup", "tune_warmup", "eval_every"):
        if not 0 <= getattr(config, name) < math.inf:
            raise InputError(f"{flag_of(name)} must be at least 0 and finite")
    if config.data_weights and len(config.data_weights) != len(config.data):
        raise InputError(
            f"--data-weights needs {len(config.data)} numbers, one for each of --data, or none"
        )
    if config.sampling != "all" and len(config.data) > 1:
        raise InputError("--sampling is for a single --data: sample each source into its own index")
    if config.sampling == "clusters" and not config.clusters:
        raise InputError("--sampling clusters needs --clusters FILE, with a cluster for each pair")
    for name in ("sampling_share", "max_bad"):
        if not 0 < getattr(config, name) <= 1:
            raise InputError(f"{flag_of(name)} {getattr(config, name)} is outside (0, 1]")
    if not 0 <= config.sampling_power <= 1:
        raise InputError(f"--sampling-power {config.sampling_power} is outside [0, 1]")
    if not 0 <= config.beta2 < 1:
        raise InputError(f"--beta2 {config.beta2} is outside [0, 1)")
    for name in ("embedding_weight", "teacher_momentum"):
        if not 0 <= getattr(config, name) <= 1:
            raise InputError(f"{flag_of(name)} {getattr(config, name)} is outside [0, 1]")
    if not all(-1 <= value <= 1 for value in config.mask_center):
        raise InputError(f"--mask-center {config.mask_center} lies outside the picture, [-1, 1]")
    if not 0 < config.teacher_scale <= 1:
        raise InputError(f"--teacher-scale {config.teacher_scale} is outside (0, 1]")
    if (config.text_mask != "none") != (config.text_tokens > 0):
        raise InputError("a text mask is --text-mask with --text-tokens, 3 or more: give both")
    if config.text_mask != "none" and not 3 <= config.text_tokens <= CONTEXT:
        raise InputError(f"--text-tokens {config.text_tokens} is outside [3, {CONTEXT}]")
    for size in (config.image_size, config.tune_image_size):
        grid = GLIPConfig.named(config.model, size or None).grid
        glip.num_keep(grid[0] * grid[1], config.mask_ratio)
    if not 0 <= (config.min_mask_ratio or 0) <= config.mask_ratio:
        raise InputError(
            f"--min-mask-ratio {config.min_mask_ratio} is outside [0, --mask-ratio "
            f"{config.mask_ratio}]"
        )
    model, masker = GLIPConfig.named(config.model, config.image_size or None), masker_of(config)
    if any(side * config.teacher_scale % model.patch_size for side in model.pixels):
        raise InputError(
            f"--teacher-scale {config.teacher_scale} of {model.image_size} pixels is not a "
            f"multiple of the patch size {model.patch_size}: choose another scale"
        )
    unmet = masker.unmet()
    if unmet:
        raise InputError(
            f"mask '{config.mask}' needs {', '.join(unmet)}, which nothing here supplies: it can "
            f"have {', '.join(sorted(masker.SUPPLIED))}"
        )


CONTEXT = GLIPConfig().context_length


def as_tuple(value: float | tuple[float, float]) -> tuple[float, ...]:
    """One or two numbers as a tuple."""
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def masker_of(config: TrainConfig) -> Masker:
    """The pre-training mask as set."""
    return Masker(
        config.mask, config.mask_ratio, config.sigma, config.mask_center,
        config.min_mask_ratio, teacher_scale=config.teacher_scale,
    )  # fmt: skip


def run_name(config: TrainConfig) -> str:
    """A folder name made of the recipe and of what differs from it; no clock."""
    base = TrainConfig(recipe=config.recipe, **RECIPES[config.recipe])
    parts = [config.recipe]
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in MACHINE or value == getattr(base, field.name):
            continue
        if field.name == "mask_ratio" and config.mask == "none":
            continue
        values = value if isinstance(value, tuple) else (value,)
        if field.name in ("data", "clusters"):  # the name of a path, not the folders of a machine
            values = [Path(name).name for name in values]
        value = "-".join(map(str, values))
        value = re.sub(r"[^\w.-]+", "-", value)
        parts.append(f"{field.name.replace('_', '-')}={value}")
    name = "_".join(parts)
    return name if len(name) <= 200 else f"{name[:190]}-{zlib.crc32(name.encode()):08x}"


# ------------------------------------------------------------------------------------------------
# Pure functions of the step, and the optimizer
# ------------------------------------------------------------------------------------------------


def lr_at(step: int, steps: int, warmup: int, lr: float) -> float:
    """Learning rate of a step: linear warm-up, then half a cosine down to 0."""
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def momentum_at(step: int, steps: int, start: float) -> float:
    """The teacher's momentum: from `start` to 1 along half a cosine, as in A-CLIP."""
    return 1 - (1 - start) * 0.5 * (1 + math.cos(math.pi * step / steps))


def embedding_weight_at(step: int, steps: int, last: float) -> float | None:
    """The embeddings' weight where it changes, from 0 to `last` in eight steps; None elsewhere."""
    places = [i for i in range(8) if round(i * steps / 8) == step]
    return last * places[-1] / 7 if places else None


MUON_SCALE = 2.0  # Muon's learning rate in AdamW's, from the search told in the README


def make_optimizers(model: GLIP, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW with CLIP's constants, and for the blocks' matrices Muon if asked for.

    Weight decay acts on matrices, not on vectors and scalars. Muon's updates are scaled to the size
    of AdamW's, then by MUON_SCALE, so that one learning rate serves both.
    """
    groups = {"muon": [], "matrices": [], "vectors": []}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        inner = config.optimizer == "muon" and "resblocks" in name
        groups["vectors" if p.ndim < 2 else "muon" if inner else "matrices"].append(p)
    decayed = {"params": groups["matrices"], "weight_decay": config.weight_decay}
    plain = {"params": groups["vectors"], "weight_decay": 0.0}
    adamw = torch.optim.AdamW([decayed, plain], betas=(0.9, config.beta2), eps=1e-6, fused=True)
    if not groups["muon"]:
        return [adamw]
    inner = {"params": groups["muon"], "scale": MUON_SCALE}
    muon = Muon(
        [inner], weight_decay=config.weight_decay, momentum=0.95, nesterov=True,
        ns_coefficients="original", adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    return [adamw, muon]


# ------------------------------------------------------------------------------------------------
# Processes and stages
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """Pre-training or unmasked tuning: a name and what it changes."""

    name: str
    masker: Masker
    aclip: bool
    steps: int
    lr: float
    warmup: int
    model: GLIPConfig
    batches: Batches
    held_out: data.Emoji | data.HeldOut


@contextlib.contextmanager
def processes(config: TrainConfig) -> Iterator[tuple[int, int, torch.device]]:
    """Join torchrun's processes if there are any: (rank, world, device)."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = evaluate.pick_device(config.device)
    if device.type == "cuda":
        local, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= there:
            raise InputError(f"{there} GPUs here: give torchrun --nproc_per_node {there} at most")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world > 1:  # the others wait while the first decodes, checks pictures or evaluates
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=3))
    try:
        yield int(os.environ.get("RANK", 0)), world, device
    finally:
        if world > 1:
            dist.destroy_process_group()


def open_data(config: TrainConfig, image_size: int, rank: int, world: int) -> tuple:
    """(training pairs, held-out pairs); the first process builds the cache, the others wait.

    What is wrong with the data is raised by every process, so that none hangs on the others.
    """

    def opened() -> tuple:
        return data.load(
            config.data, image_size, config.vendors, config.held_out, config.data_weights,
            config.max_bad,
        )

    pairs, problem = None, [None]
    if rank == 0:
        try:
            pairs = opened()
        except InputError as error:
            problem = [str(error)]
    if world > 1:
        dist.broadcast_object_list(problem)
    if problem[0]:
        raise InputError(problem[0])
    return pairs or opened()


def plan(config: TrainConfig, rank: int, world: int) -> list[Stage]:
    """The stages with their data; raises InputError for data that cannot serve them."""
    opened = {}

    def stage(
        name: str, masker: Masker, batch_size: int, steps: int, epochs: float, lr: float,
        warmup: int, size: int,
    ) -> Stage:  # fmt: skip
        model = GLIPConfig.named(config.model, size or None)
        if model.image_size not in opened:
            opened[model.image_size] = open_data(config, model.image_size, rank, world)
        train, test = opened[model.image_size]
        first = name == "pretrain"
        text_mask = chances = None
        for turn in (rank == 0, rank > 0):  # the first counts words, then the others read
            if turn and first and config.text_mask != "none":
                text_mask = TextMask(
                    config.text_mask, config.text_tokens, config.text_threshold, train
                )
            if turn and first and config.sampling != "all":
                chances = data.sampling_probabilities(
                    config.sampling, train, config.sampling_share, config.sampling_power,
                    config.clusters, config.text_threshold,
                )
            if world > 1:
                dist.barrier()
        order = data.make_order(train, batch_size, config.seed, name, chances)
        steps = max(1, round(epochs * order.steps_per_epoch)) if epochs else steps
        if rank == 0:
            print(
                f"{name}: {order.describe()}; {steps:,} steps; {masker.describe(model.grid)}"
                + f"; sampling {config.sampling}" * (chances is not None)
                + (f"; text mask {config.text_mask}, {config.text_tokens} tokens" * bool(text_mask))
            )
        extra = aclip.VIEW_DRAWS if first and config.aclip else 0
        batches = Batches(train, order, model, rank, world, text_mask, extra)
        return Stage(
            name, masker, first and config.aclip, steps, lr, warmup, model, batches, test
        )

    stages = [stage(
        "pretrain", masker_of(config), config.batch_size, config.steps,
        config.epochs, config.lr, config.warmup, config.image_size,
    )]  # fmt: skip
    if config.tune_epochs:
        stages.append(stage(
            "tune", Masker(), config.tune_batch_size, 0, config.tune_epochs, config.tune_lr,
            config.tune_warmup, config.tune_image_size or config.image_size,
        ))  # fmt: skip
    return stages


# ------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------


def run_stage(
    stage: Stage, model: GLIP, config: TrainConfig, world: int, device: torch.device,
    report: "Report",
) -> None:  # fmt: skip
    """Train `model` in place for one stage."""
    network = aclip.AClip(model).to(device) if stage.aclip else model
    optimizers = make_optimizers(network, config)
    parallel = DistributedDataParallel(network, static_graph=True) if world > 1 else network
    bf16 = evaluate.use_bf16(config.precision, device)
    workers = config.workers
    if workers < 0:
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = 0 if config.data[0] in EMBEDDED else max(1, min(8, cores))
    batches = data.loader(stage.batches, 0, stage.steps, workers, pin=device.type == "cuda")
    model.train()
    report.begin(stage, model)
    for step, batch in enumerate(batches):
        report.data_arrived(batch[4])
        renew_mask(stage, network, config, step, device)
        lr = lr_at(step, stage.steps, stage.warmup, stage.lr)
        found = update(parallel, optimizers, batch, stage, lr, device, bf16)
        model.clamp_logit_scale()
        report.step(step, *found, lr)
    model.requires_grad_(True)  # A-CLIP froze the patch projection


def renew_mask(
    stage: Stage, network: nn.Module, config: TrainConfig, step: int, device: torch.device
) -> None:
    """Before a step: the teacher follows; at fixed steps cluster's threshold is found again."""
    masker, tower = stage.masker, (network.model if stage.aclip else network).visual
    if masker.needs("attention"):
        momentum = momentum_at(step, stage.steps, config.teacher_momentum)
        masker.follow(tower, momentum)
        if stage.aclip:
            network.follow(momentum)
    weight = embedding_weight_at(step, stage.steps, config.embedding_weight)
    if masker.needs("threshold") and weight is not None and (step == 0 or weight > 0):
        masker.embedding_weight, found = weight, [None]
        if stage.batches.rank == 0:  # reads the sample, for all
            blocks = ((x.to(device) for x in block) for block in stage.batches.sample())
            masker.find_threshold(blocks, tower)
            found = [masker.threshold]
        if dist.is_initialized():
            dist.broadcast_object_list(found)
        (masker.threshold,) = found


def update(
    network: nn.Module, optimizers: list[torch.optim.Optimizer],
    batch: tuple[Tensor, Tensor, Tensor, Tensor, list], stage: Stage, lr: float,
    device: torch.device, bf16: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """One step on images (B, 3, H, W), tokens (B, T), noise (B, N), more noise for A-CLIP's crops.

    Returns the loss, logit_scale, and visible (B, K) or None.
    """
    images, tokens, noise, extra = (x.to(device, non_blocking=True) for x in batch[:4])
    inner = network.module if isinstance(network, DistributedDataParallel) else network
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        if stage.aclip:
            loss, scale, visible = aclip.aclip_loss(
                network, inner, stage.masker, images, tokens, noise, extra
            )
        else:
            ids_keep, visible = stage.masker(images, noise, inner.visual)
            image_features, text_features, scale = network(images, tokens, ids_keep, visible)
            loss = glip.clip_loss(image_features, text_features, scale)
    loss.backward()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("scale", 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return loss, scale, visible


class Report:
    """Progress bar, log.jsonl and evaluations; only the first process shows and writes."""

    def __init__(
        self, config: TrainConfig, out: Path, rank: int, world: int, device: torch.device
    ) -> None:
        self.config, self.out, self.rank, self.world, self.device = config, out, rank, world, device
        self.seconds, self.steps = {}, {}  # of each stage, evaluations left out
        self.read, self.bad, self.quarantined = 0, 0, set()

    def begin(self, stage: Stage, model: GLIP) -> None:
        """Start the clock of a stage; evaluation stops it."""
        self.stage, self.model, self.waited = stage, model, 0.0
        self.every = self.config.eval_every or max(1, math.ceil(stage.steps / 4))
        self.bar = tqdm(
            total=stage.steps, desc=stage.name, disable=self.rank > 0, dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 20,
        )  # fmt: skip
        self.begun = self.ready = time.perf_counter()

    def data_arrived(self, bad: list[list[str]]) -> None:
        """Count the time since the last step ended as waiting for data, and list bad pictures."""
        self.waited += time.perf_counter() - self.ready
        self.read += self.stage.batches.share
        self.bad += len(bad)
        new = [row for row in bad if tuple(row) not in self.quarantined]
        if new:
            path = self.out / "quarantine.jsonl"
            if path.exists():  # other processes, and epochs before, write there too
                lines = path.read_text().splitlines()
                self.quarantined |= {tuple(json.loads(line).values()) for line in lines}
            for row in new:
                if tuple(row) not in self.quarantined:
                    self.quarantined.add(tuple(row))
                    line = json.dumps(dict(zip(("data", "where", "why"), row, strict=True)))
                    with open(path, "a") as file:
                        file.write(line + "\n")

    def step(
        self, step: int, loss: Tensor, scale: Tensor, visible: Tensor | None, lr: float
    ) -> None:
        """Log, evaluate and save when due; raises InputError for a loss that is not finite."""
        last = step + 1 == self.stage.steps
        if last or (step + 1) % self.config.log_every == 0:
            self.log(step, loss, scale, visible, lr)
        self.bar.update()
        if last or (step + 1) % self.every == 0:
            self.seconds[self.stage.name] = time.perf_counter() - self.begun
            self.steps[self.stage.name] = step + 1
            if self.rank == 0:
                self.evaluate(step + 1)
            if self.world > 1:
                dist.barrier()
            self.begun = time.perf_counter() - self.seconds[self.stage.name]
        if last:
            self.bar.close()
        self.ready = time.perf_counter()

    def log(
        self, step: int, loss: Tensor, scale: Tensor, visible: Tensor | None, lr: float
    ) -> None:
        """One record of log.jsonl, the loss averaged over the processes."""
        sums = torch.stack([loss.detach().float(), loss.new_tensor(self.bad).float()])
        if self.world > 1:
            dist.all_reduce(sums)
        loss, bad = sums[0].item() / self.world, round(sums[1].item())
        self.check_bad(bad, self.read * self.world)
        batch_size = self.stage.batches.order.batch_size
        if not math.isfinite(loss):
            self.bar.close()
            raise InputError(
                f"the loss is {loss} at {self.stage.name} step {step + 1}: lower --lr or lengthen "
                "--warmup"
            )
        elapsed = time.perf_counter() - self.begun
        rate, waiting = (step + 1) * batch_size / elapsed, self.waited / elapsed
        shares = {}
        if visible is not None:  # of this process's pictures
            shares["computed"] = visible.shape[1] / self.stage.batches.patches
            shares["visible"] = visible.float().mean().item() * shares["computed"]
            shares["threshold"] = self.stage.masker.threshold
        self.write(
            stage=self.stage.name, step=step + 1, loss=loss, ln_batch=math.log(batch_size), lr=lr,
            logit_scale=scale.item(), **shares, bad=bad, pairs_per_second=rate, data_wait=waiting,
            seconds=elapsed,
        )  # fmt: skip
        self.bar.set_postfix_str(
            f"loss {loss:.3f} (ln batch {math.log(batch_size):.2f}), {rate:,.0f} pairs/s, "
            f"{waiting:.0%} waiting for data",
            refresh=False,
        )

    def check_bad(self, bad: int, read: int) -> None:
        """Stop if too many pictures cannot be read; all processes know the same numbers."""
        if bad > self.config.max_bad * read:
            path = self.out / "quarantine.jsonl"
            reasons = Counter(json.loads(line)["why"] for line in path.read_text().splitlines())
            most = ", ".join(f"{why} ({n})" for why, n in reasons.most_common(3))
            self.bar.close()
            raise InputError(
                f"{bad} of {read} pictures cannot be read, more than --max-bad "
                f"{self.config.max_bad:g}: {most}; {path} lists them: repair the data"
            )

    def evaluate(self, step: int) -> None:
        """Evaluate the full picture on the held-out pairs, and save the model as it is."""
        result = evaluate.quick(
            self.model, self.stage.held_out, self.device, self.config.precision
        )
        self.write(stage=self.stage.name, step=step, **result)
        self.bar.write(
            f"{self.stage.name} step {step}: "
            + ", ".join(f"{name} {value:.1%}" for name, value in result.items())
        )
        self.save("latest.pt", step)
        self.model.train()

    def save(self, name: str, step: int) -> None:
        """Write a checkpoint that tells what made it."""
        glip.save_checkpoint(
            self.out / name, self.model, stage=self.stage.name, step=step,
            mask=self.stage.masker.state(), config=asdict(self.config),
            seconds=dict(self.seconds), steps=dict(self.steps),
            machine=evaluate.machine(self.device), command=command(), world=self.world,
            bf16=evaluate.use_bf16(self.config.precision, self.device),
        )  # fmt: skip

    def write(self, **record: object) -> None:
        """Append a line to log.jsonl."""
        if self.rank == 0:
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")


def command() -> str:
    """The command line that made this run, without folders of this machine."""
    folders = r"(^|=)(\w+:/)?/\S*/(?=.)"
    words = [Path(sys.argv[0]).name, *(re.sub(folders, r"\1", w) for w in sys.argv[1:])]
    world, local = (int(os.environ.get(name, 0)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    nodes = f"--nnodes {world // local} " if local and world > local else ""
    launcher = f"torchrun {nodes}--nproc_per_node {local or world}" if world else "python"
    return f"{launcher} {shlex.join(words)}"


def train(config: TrainConfig) -> Path:
    """Pre-train, keep pretrained.pt, tune, keep model.pt; the folder of the run is returned.

    Raises InputError for settings or data that cannot work, before anything is written.
    """
    with processes(config) as (rank, world, device):
        check(config, world)
        out = Path(config.out or Path("runs") / run_name(config))
        if out.exists() and not out.is_dir():
            raise InputError(f"--out {out} is a file: name a folder")
        if out.exists() and any(out.iterdir()):
            state = "a finished" if (out / "model.pt").exists() else "an unfinished"
            raise InputError(
                f"--out {out} holds {state} run already: choose another --out, or remove the folder"
            )
        stages = plan(config, rank, world)  # all processes meet here, and then the first writes
        torch.manual_seed(config.seed)
        model = GLIP(stages[0].model).to(device)
        if rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            text = json.dumps(asdict(config), indent=2)
            glip.write_bytes(out / "config.json", text.encode())
            print(f"{config.model} on {device.type}, writing to {out}")
        report = Report(config, out, rank, world, device)
        for stage in stages:
            if stage.model != model.config:
                model = glip.resized(model, stage.model.image_size).to(device)
            run_stage(stage, model, config, world, device, report)
            if rank == 0:
                last = stage is stages[-1]
                report.save("model.pt" if last else "pretrained.pt", stage.steps)
        if rank == 0:
            (out / "latest.pt").unlink()
    return out


def main() -> None:
    """The command line: bad input is one sentence and exit code 2."""
    try:
        train(parse())
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted; what was saved so far is in the run's folder")


if __name__ == "__main__":
    main()
