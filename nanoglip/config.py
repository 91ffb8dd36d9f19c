"""What a run is: every setting of train.py, the recipes that change some, and what is refused.

The defaults are the demo's. A recipe wins over them, a file of --config over the recipe, a flag
given by hand over the file. The settings of masks, text masks and samplings are declared beside
their functions.
"""

import argparse
import contextlib
import difflib
import inspect
import json
import math
import os
import re
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields, make_dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import UnionType
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

import torch
import tyro

import glip
from glip import GLIPConfig, InputError
from nanoglip.aliases import translated
from nanoglip.cli import check_numbers, say
from nanoglip.losses import LOSSES
from nanoglip.machine import cores
from nanoglip.masker import Masker
from nanoglip.masks import MASKS, Setting, check_setting, sample_mask, settings_of
from nanoglip.sources.captions import SAMPLINGS
from nanoglip.sources.emoji import EMBEDDED, HELD_OUT, VENDORS
from nanoglip.sources.pictures import MAX_BAD
from nanoglip.text import TEXT_MASKS

# The GLIP authors' README. What it leaves open is filled with open_clip's defaults (warm-up, weight
# decay, context of 77) or, for the tuning's warm-up, with ours. Their batch of 1,280 is stated for
# 50 % alone. GLIP, Cluster Masking and A-CLIP were trained in fp16 with a scaled loss, CLIPA in
# bf16; here it is bf16 or fp32.
PAPER = {
    "data": (), "crop_scale": (0.5, 1.0), "model": "ViT-B-16", "mask_ratio": 0.5, "epochs": 30.0,
    "batch_size": 1280, "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.2, "beta2": 0.98,
    "warmup": 10_000, "tune_epochs": 1.0, "tune_batch_size": 640, "tune_lr": 1e-5,
    "tune_warmup": 1_000, "teacher_momentum": 0.996, "text_threshold": 1e-6, "log_every": 100,
}  # fmt: skip

RECIPES = {
    "demo": {},
    "compare": {  # a row of the comparison of masks: 100 s
        "model": "ViT-nano-8", "batch_size": 256, "steps": 450, "lr": 1e-3, "weight_decay": 0.1,
        "tune_epochs": 0.5, "captions": "names",
    },
    "cc3m": PAPER,
    "cc12m": PAPER,
    # FLIP (2212.00794), its authors' configuration for ViT-B/16 on LAION-400M: 32 epochs, learning
    # rates per 256 pairs scaled to the batch, warm-ups of 40 and 20 epochs of ImageNet's length.
    # Not done here: it flips pictures; its image positions are sines, its image feature is the mean
    # of all tokens; its text tower is not causal, reads 32 WordPiece tokens (here 32 of CLIP's) and
    # is read at the first; weight decay spares its positions.
    "flip": PAPER | {
        "mask": "random", "context_length": 32, "epochs": 32.0, "batch_size": 65_536,
        "lr": 1.024e-3, "beta2": 0.95, "warmup": 782, "tune_epochs": 0.32,
        "tune_batch_size": 65_536, "tune_lr": 1.024e-5, "tune_warmup": 391,
    },
    # Cluster Masking (2405.08815), its README's command for CC12M; it is not tuned.
    "cluster-masking": PAPER | {
        "mask": "cluster", "min_mask_ratio": 0.3, "crop_scale": (0.9, 1.0), "epochs": 32.0,
        "batch_size": 2048, "lr": 5e-4, "warmup": 2000, "tune_epochs": 0.0,
    },
    # CLIP-PGS (2503.17080) with 30 to 50 % masked, its repository's command for CC12M; it is not
    # tuned. With --mask-ratio 0.5 --mask-range 0 it is the other of its two models. Its crops are
    # open_clip's default; it weights embeddings by the epoch, here in eight steps.
    "clip-pgs": PAPER | {
        "mask": "pgs", "mask_ratio": 0.3, "mask_range": 0.2, "embedding_weight": 1.0,
        "crop_scale": (0.9, 1.0), "epochs": 32.0, "batch_size": 4096, "tune_epochs": 0.0,
    },
    # A-CLIP (2212.08653) on YFCC-15M: 25 epochs, one of warm-up (3,600 steps are about that). It is
    # not tuned. Not done here: colour is augmented (jitter, grey, blur, solarise); ImageNet's mean
    # and deviation; AdamW's eps of 1e-8 (ours 1e-6); a schedule from 1e-6 and down to 1e-5 (ours
    # ends at 0); evaluation of the teacher, not of the model itself. See also aclip.py.
    "a-clip": PAPER | {
        "mask": "attentive", "aclip": True, "epochs": 25.0, "batch_size": 4096, "lr": 5e-4,
        "weight_decay": 0.5, "warmup": 3600, "tune_epochs": 0.0,
    },
    # CLIPA (2305.07017), B/16 at 112 pixels and 16 text tokens on LAION-400M. Its text tower has 16
    # positions in both stages and in evaluation: captions and prompts are cut. Not done here: its
    # image positions are sines, and learned in the tuning alone.
    "clipa": PAPER | {
        "mask": "none", "mask_ratio": 0.0, "image_size": 112, "context_length": 16,
        "crop_scale": (0.4, 1.0), "epochs": 6.0, "batch_size": 65_536, "lr": 2.048e-3,
        "beta2": 0.95, "warmup": 782, "tune_image_size": 224, "tune_epochs": 0.33,
        "tune_batch_size": 8192, "tune_lr": 2.56e-5, "tune_warmup": 3072,
    },
    # From the weights of --init: FLYP (2212.00638), which fine-tunes CLIP by CLIP's own loss. Its
    # README's command and its code for ImageNet, AdamW's beta2 being torch's default. Not done
    # here: weight decay also acts on vectors and scalars; AdamW's eps of 1e-8 (ours 1e-6).
    "finetune-pairs": PAPER | {
        "mask": "none", "mask_ratio": 0.0, "crop_scale": (0.9, 1.0), "epochs": 10.0,
        "batch_size": 512, "lr": 1e-5, "weight_decay": 0.1, "beta2": 0.999, "warmup": 500,
        "tune_epochs": 0.0,
    },
}  # fmt: skip

# --- The settings by subject, in the order in which a run's name tells them -----------------------

Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]


def declared_settings(registry: dict) -> list[tuple]:
    """Fields (name, type, default) of the settings that a registry's rows declare."""
    found, users = {}, {}
    for row, function in registry.items():
        for name, declared in settings_of(function).items():
            found[name] = declared
            users[name] = [*users.get(name, []), row]
    return [
        (name, Annotated[kind, tyro.conf.arg(help=help_of(setting, users[name]))],
         field(default=default))
        for name, (kind, default, setting) in found.items()
    ]  # fmt: skip


def help_of(setting: Setting, users: list[str]) -> str:
    """A setting's help: the rows that it serves, what it is, its range."""
    bounds = f", in [{setting.low:g}, {setting.high:g}]" * math.isfinite(setting.high)
    return f"{', '.join(users)}: {setting.help}{bounds}"


def with_settings(group: type, registry: dict) -> type:
    """A group of settings, followed by those that a registry's rows declare."""
    fields = declared_settings(registry)
    made = make_dataclass(group.__name__, fields, bases=(group,), frozen=True)
    for name in {"__doc__", "__module__", "__firstlineno__"} & vars(group).keys():
        setattr(made, name, vars(group)[name])  # where tyro finds the help
    return made


@dataclass(frozen=True)
class Recipe:
    """Where the defaults below come from."""

    recipe: Literal[tuple(RECIPES)] = "demo"  # a named set of settings; flags given by hand win


@dataclass(frozen=True)
class Data:
    """Pairs of images and captions."""

    data: tuple[str, ...] = ("emoji",)  # emoji, scenes-center, -corner, ..., or PATHs, URLs
    data_weights: tuple[float, ...] = ()  # passes of an epoch through each of --data (none: 1)
    crop_scale: tuple[float, float] = (0.5, 1.0)  # area of crops: own images, and --aclip's views
    max_bad: float = MAX_BAD  # share of unreadable images above which the run stops
    vendors: tuple[str, ...] = ()  # emoji: art to train on (none: all but the held-out)
    held_out: Literal[VENDORS] = HELD_OUT  # emoji: whose art to evaluate on
    captions: Literal["prompts", "names"] = "prompts"  # emoji: names in prompts, or names alone


@dataclass(frozen=True)
class Sampling:
    """Which pairs an epoch of pre-training has."""

    sampling: Literal[("all", *SAMPLINGS)] = "all"  # all, or a share chosen by clusters or words
    clusters: str = ""  # clusters: .npy or text file with the cluster of each pair, a whole number


@dataclass(frozen=True)
class Mask:
    """Patches that pre-training removes from images."""

    mask: Literal[tuple(MASKS)] = "gaussian"  # which patches are kept
    mask_ratio: float | tuple[float, float] = 0.75  # share removed, in [0, 1); two: at first, last
    aclip: Switch = False  # attentive: A-CLIP's two views and its other losses


@dataclass(frozen=True)
class Words:
    """Words that pre-training removes from captions."""

    text_mask: Literal[("none", *TEXT_MASKS)] = "none"  # which words are kept
    text_tokens: int = 0  # tokens that they leave of a caption, start and end included


@dataclass(frozen=True)
class Model:
    """The two towers."""

    model: Literal[tuple(glip.SIZES)] = "ViT-pico-8"  # open_clip's name, or a smaller one
    image_size: int = 0  # pixels a side (0: the model's own)
    context_length: int = 77  # tokens that the text tower reads, start and end included
    init: str = ""  # run or .pt file whose weights to start from (none: new ones)


@dataclass(frozen=True)
class Schedule:
    """Pre-training."""

    optimizer: Literal["muon", "adamw"] = "muon"  # muon: on the blocks' matrices, AdamW elsewhere
    batch_size: int = 512  # pairs per step, over all processes
    steps: int = 760  # updates
    epochs: float = 0.0  # passes over the data, instead of steps
    extend: str = ""  # run with --keep-every whose pre-training goes on, to more steps or epochs
    lr: float = 2e-3  # peak learning rate (Muon's is twice that); half a cosine takes it to 0
    weight_decay: float = 1.0  # of matrices; vectors and scalars have none
    beta2: float = 0.98  # AdamW's second decay
    warmup: int = 50  # steps of linear warm-up


@dataclass(frozen=True)
class Tuning:
    """Unmasked tuning, which follows with a fresh optimizer and schedule."""

    tune_epochs: float = 1.0  # passes over the data (0: no tuning)
    tune_batch_size: int = 256  # pairs per step, over all processes
    tune_lr: float = 3e-4  # peak learning rate
    tune_warmup: int = 5  # steps of linear warm-up
    tune_image_size: int = 0  # pixels a side (0: as in pre-training)


@dataclass(frozen=True)
class Loss:
    """What both stages minimise, and the seed of all that is random in them."""

    loss: Literal[tuple(LOSSES)] = "clip"  # clip: softmax over the batch; siglip: sigmoids
    clip_grad_norm: float = 0.0  # norm at which gradients are clipped (0: none)
    seed: int = 0  # of weights, order, augmentation and masks


@dataclass(frozen=True)
class Machine:
    """Devices, memory and processes."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 if the hardware has it
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of these that is there
    micro_batch: int = 0  # pairs of a process whose activations exist at once (0: all)
    recompute: Switch = False  # activation checkpointing
    compile: Switch = False  # use torch.compile
    shard: Switch = False  # shard weights and state (FSDP2)
    workers: int = -1  # readers per process (-1: 0 for embedded data, else the cores, at most 8)


@dataclass(frozen=True)
class Preview:
    """Instead of a run."""

    estimate: str = ""  # print the time and memory of the run on a machine: here, h100x8, ...
    overfit: int = 0  # train on this many pairs until the loss is near 0, or say what is wrong


@dataclass(frozen=True)
class Output:
    """What a run writes."""

    out: str = ""  # folder of the run (none: runs/ and what differs from the recipe)
    log_every: int = 10  # steps between records in log.jsonl
    eval_every: int = 0  # steps between evaluations (0: four in a stage)
    eval_sets: tuple[str, ...] = ()  # folders of published sets, or DIR/CLASS/*.jpg, to evaluate on
    save_every: int = 0  # steps between checkpoints (0: at evaluations, and every ten minutes)
    keep_every: int = 0  # steps between models of pre-training that are kept (0: none)
    resume: Literal["auto", "never"] = "auto"  # auto: an unfinished run in --out is resumed
    tensorboard: Switch = False  # write the records of log.jsonl for TensorBoard, too
    wandb: Switch = False  # send them to Weights & Biases, too
    trackio: Switch = False  # send them to trackio, too


@dataclass(frozen=True)
class TrainConfig(
    Output, Preview, Machine, Loss, Tuning, Schedule, Model, with_settings(Words, TEXT_MASKS),
    with_settings(Mask, MASKS), with_settings(Sampling, SAMPLINGS), Data, Recipe,
):  # the fields of the last base come first
    """Pre-train a CLIP model under a mask, then tune it without.

    Settings also come from JSON, --config FILE; what is given by hand wins. open_clip's flags are
    read where they mean the same: docs/open_clip.md.
    """


GROUPS = TrainConfig.__bases__[::-1]
# What no result depends on.
MACHINE = {f.name for group in (Machine, Preview, Output) for f in fields(group)} - {"precision"}

# --- The command line -----------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> TrainConfig:
    """The settings of a command line: defaults, the recipe's, a file's, what was given by hand."""
    arguments, told = translated(sys.argv[1:] if arguments is None else arguments)
    if told:
        say("\n".join(told))
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--recipe")
    first.add_argument("--config")
    recipe, file = None, {}
    with contextlib.suppress(argparse.ArgumentError):  # tyro tells it better
        known, rest = first.parse_known_args(arguments)
        recipe, file = known.recipe, read_settings(Path(known.config)) if known.config else {}
        arguments = rest if recipe is None else ["--recipe", recipe, *rest]
    recipe = recipe or file.get("recipe", "demo")
    base = TrainConfig(recipe, **RECIPES[recipe]) if recipe in RECIPES else TrainConfig()
    default = replace(base, **file | {"recipe": base.recipe})
    if {"-h", "--help"} & set(arguments):
        show_help(default)
    config = tyro.cli(TrainConfig, args=arguments, default=default)
    given = {a.split("=")[0].lstrip("-").replace("-", "_") for a in arguments if a.startswith("--")}
    if {"steps", "epochs"} <= given:
        raise InputError("--steps and --epochs both set the length: give one of them")
    if "epochs" in given and not config.epochs > 0:
        raise InputError("--epochs must be above 0; give --steps to count in steps")
    if "steps" in given:
        config = replace(config, epochs=0.0)
    changed = {name for name, value in file.items() if value != getattr(base, name)}
    refuse_idle(config, given | changed)
    return replace(config, mask_ratio=0.0) if config.mask == "none" else config


def read_settings(path: Path) -> dict:
    """The settings of a JSON file, such as a run's config.json, by name; `path` may be a run.

    Raises InputError for a file that holds no JSON object, an unknown name, or a wrong type.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InputError(f"--config {path}: no JSON object; name a file like a run's config.json")
    kinds, settings = get_type_hints(TrainConfig), {}
    for name, value in found.items():
        if name not in kinds:
            alike = difflib.get_close_matches(name, kinds, 1)
            hint = f"write {alike[0]}" if alike else "leave it out"
            raise InputError(f"--config {path}: there is no setting {name}: {hint}")
        try:
            settings[name] = fitted(value, kinds[name])
        except (TypeError, OverflowError):
            raise InputError(
                f"--config {path}: {name} is {json.dumps(value)}: give {wanted(kinds[name])}"
            ) from None
    if "steps" in settings and "epochs" not in settings:
        settings["epochs"] = 0.0
    return settings


def fitted(value: object, kind: object) -> object:
    """A value of JSON as a setting of this type; raises TypeError if it is none."""
    origin, of = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for one in of:
            with contextlib.suppress(TypeError):
                return fitted(value, one)
    if origin is tuple and isinstance(value, list):
        of = of[:1] * len(value) if of[1:] == (...,) else of
        if len(of) == len(value):
            return tuple(map(fitted, value, of))
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is kind or (origin is Literal and value in of):
        return value
    raise TypeError


def wanted(kind: object) -> str:
    """What values of a type are in JSON, in words."""
    origin, of = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(of)}"
    if origin is tuple:
        return f"[{', '.join('...' if one is ... else wanted(one) for one in of)}]"
    if origin in (Union, UnionType):
        return " or ".join(map(wanted, of))
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(
        kind, "null"
    )


def refuse_idle(config: TrainConfig, given: set[str]) -> None:
    """Raise InputError for a flag given by hand that does nothing beside the others."""
    own = bool(config.data) and config.data[0] not in EMBEDDED
    names, tuning = " ".join(config.data), {name for name in given if name[:5] == "tune_"}
    own_only = {"data_weights", "sampling", "max_bad", *([] if config.aclip else ["crop_scale"])}
    rules = [  # flags, whether they do nothing, why
        ({"vendors", "held_out", "captions"}, own, f"is for emoji, not for --data {names}"),
        (own_only, not own, "is for pictures of your own: give their --data"),
        (tuning - {"tune_epochs"}, not config.tune_epochs,
         "does nothing without tuning: --tune-epochs is 0"),
    ]
    for flags, idle, why in rules:
        for flag in sorted(given & flags) if idle else ():
            raise InputError(f"{flag_of(flag)} {why}")
    if config.mask == "none" and "mask_ratio" in given and config.mask_ratio != 0:
        raise InputError("--mask none keeps every patch: leave --mask-ratio out")
    for flag in sorted(given - used_settings(config).keys()):
        users = {choice: [row for row in registry if flag in settings_under(choice, row)]
                 for choice, registry in CHOICES.items()}  # fmt: skip
        told = [f"{flag_of(choice)} {', '.join(rows)}" for choice, rows in users.items() if rows]
        if told:
            raise InputError(
                f"{flag_of(flag)} belongs to {' or '.join(told)}: leave it out, or choose "
                + ("that" if sum(map(len, users.values())) == 1 else "one of them")
            )


CHOICES = {"mask": MASKS, "text_mask": TEXT_MASKS, "sampling": SAMPLINGS}


def settings_under(choice: str, row: str) -> dict:
    """What a row of --mask, --text-mask or --sampling declares, by name, as by settings_of."""
    used = {} if row not in CHOICES[choice] else dict(settings_of(CHOICES[choice][row]))
    if choice == "sampling" and row == "words":  # whose scores are of rare words
        used["text_threshold"] = settings_of(TEXT_MASKS["frequency"])["text_threshold"]
    if choice == "sampling" and row == "clusters":
        used["clusters"] = None
    if "teacher_scale" in used:
        used["aclip"] = None
    return used


def used_settings(config: TrainConfig) -> dict:
    """What the chosen mask, text mask and sampling declare, by name: settings_under's rows."""
    chosen = (settings_under(choice, getattr(config, choice)) for choice in CHOICES)
    return {name: declared for row in chosen for name, declared in row.items()}


def show_help(default: TrainConfig) -> None:
    """Print every flag under its group, with its default, and leave."""
    grouped = make_dataclass("Grouped", [(group.__name__.lower(), group) for group in GROUPS])
    values = (group(*(getattr(default, f.name) for f in fields(group))) for group in GROUPS)
    tyro.cli(
        grouped, args=["--help"], description=inspect.getdoc(TrainConfig),
        default=grouped(*values), config=(tyro.conf.OmitArgPrefixes,),
    )  # fmt: skip


def flag_of(name: str) -> str:
    """A setting as it is typed."""
    return f"--{name.replace('_', '-')}"


# --- What cannot work -----------------------------------------------------------------------------


def check(config: TrainConfig, world: int) -> None:
    """Refuse settings that cannot work, before anything is read or written."""

    def refuse(wrong: object, why: str) -> None:
        if wrong:
            raise InputError(why)

    refuse(not (config.data or config.estimate),
           f"--recipe {config.recipe} needs your copy of the data: give --data PATH")
    refuse(config.recipe == "finetune-pairs" and not (config.init or config.estimate),
           "--recipe finetune-pairs starts from weights: give --init RUN")
    refuse(config.estimate and config.overfit,
           "--estimate and --overfit exclude each other: give one of them")
    refuse(config.overfit == 1 or config.overfit < 0,
           f"--overfit {config.overfit}: a contrast needs at least 2 pairs")
    for name in ("batch_size", "tune_batch_size"):
        flag, size = flag_of(name), getattr(config, name)
        refuse(size < 2, f"{flag} {size}: a contrast needs at least 2 pairs")
        refuse(size % world, f"{flag} {size} cannot be shared evenly by {world} processes")
    check_numbers(
        config, ("steps", "lr", "tune_lr", "log_every"),
        ("epochs", "tune_epochs", "weight_decay", "warmup", "tune_warmup", "eval_every",
         "save_every", "keep_every", "micro_batch", "clip_grad_norm", "seed"),
    )
    for name, declared in used_settings(config).items():
        if declared:
            check_setting(name, getattr(config, name), declared[2])
    refuse(config.aclip and (config.micro_batch or config.loss != "clip"),
           "--aclip compares images across the batch and with CLIP's loss: leave --micro-batch "
           "and --loss out")
    for name in ("tensorboard", "wandb", "trackio"):
        found = find_spec(name) if getattr(config, name) else None
        refuse(getattr(config, name) and not (found and found.origin),  # a folder has no origin
               f"--{name} needs a package: pip install {name}")
    refuse(config.sampling != "all" and len(config.data) > 1,
           "--sampling is for a single --data: sample each source into its own index")
    refuse(config.sampling == "clusters" and not config.clusters,
           "--sampling clusters needs --clusters FILE, with a cluster for each pair")
    refuse(not 0 < config.max_bad <= 1, f"--max-bad {config.max_bad} is outside (0, 1]")
    refuse(not 0 < config.crop_scale[0] <= config.crop_scale[1] <= 1,
           f"--crop-scale {' '.join(map(str, config.crop_scale))}: give the smallest and the "
           "largest share of the area, above 0 and up to 1")
    refuse(not 0 <= config.beta2 < 1, f"--beta2 {config.beta2} is outside [0, 1)")
    refuse((config.text_mask != "none") != (config.text_tokens > 0),
           "a text mask is --text-mask with --text-tokens, 3 or more: give both")
    refuse(not 3 <= config.context_length <= CONTEXT,
           f"--context-length {config.context_length} is outside [3, {CONTEXT}]")
    refuse(config.text_mask != "none" and not 3 <= config.text_tokens <= config.context_length,
           f"--text-tokens {config.text_tokens} is outside [3, {config.context_length}], up to "
           "--context-length")
    masker = masker_of(config)
    for size in (config.image_size, config.tune_image_size):
        grid = GLIPConfig.named(config.model, size or None).grid
        for ratio in masker.mask_ratios:
            masker.num_computed(grid[0] * grid[1], ratio)
    refuse(masker.annealed and masker.needs("threshold"),
           f"--mask {config.mask} finds its threshold for one ratio: give one --mask-ratio")
    model = GLIPConfig.named(config.model, config.image_size or None)
    scale = masker.settings.get("teacher_scale", 1.0)
    refuse(any(side * scale % model.patch_size for side in model.pixels),
           f"--teacher-scale {scale} of {model.image_size} pixels is not a multiple of the patch "
           f"size {model.patch_size}: choose another scale")
    refuse(missing := masker.missing_inputs(),
           f"mask '{config.mask}' needs {', '.join(missing)}, which nothing here supplies")
    try_mask(masker, model)
    if config.shard:
        check_shard(config, world, refuse)


def try_mask(masker: Masker, model: GLIPConfig) -> None:
    """Raise InputError if the mask does not give scores (B, N) for two black pictures."""
    noise = torch.linspace(0, 0.99, 2 * math.prod(model.grid)).view(2, -1)
    inputs = {name: value for name, value in masker.settings.items() if masker.needs(name)}
    inputs |= {"pixels": torch.zeros(2, 3, *model.pixels, dtype=torch.uint8), "attention": noise,
               "gaze": noise}  # fmt: skip
    sample_mask(masker.mask, 2, model.grid, masker.mask_ratio, noise=noise, **inputs)


def check_shard(config: TrainConfig, world: int, refuse: Callable) -> None:
    """Refuse what cannot be sharded across ranks."""
    refuse(not find_spec("torch.distributed.fsdp._fully_shard"),
           f"--shard needs FSDP2, which torch {torch.__version__} lacks: update it")
    refuse(world < 2, "--shard divides a model among processes: start them with torchrun")
    refuse(config.optimizer == "muon",
           "--shard divides the matrices that muon needs whole: give --optimizer adamw")
    refuse(config.aclip or config.embedding_weight or masker_of(config).needs("attention"),
           f"--mask {config.mask} uses a tower's parts, which --shard divides: leave it out")


CONTEXT = GLIPConfig().context_length


def masker_of(config: TrainConfig) -> Masker:
    """The mask of pre-training with its settings."""
    settings = {name: getattr(config, name) for name in settings_of(MASKS[config.mask])}
    return Masker(config.mask, config.mask_ratio, **settings)


def embedded(config: TrainConfig) -> bool:
    """Whether no file of the user's is read."""
    return bool({*config.data[:1]} & {*EMBEDDED})


def workers_of(config: TrainConfig) -> int:
    """Data workers of this rank: as asked for, else by the number of its cores."""
    if config.workers >= 0 or embedded(config):
        return max(0, config.workers)
    return min(8, cores())


def path_name(path: str) -> str:
    """The last name of a path, with a checksum of the rest if there is one."""
    path = os.path.normpath(path)
    name = re.sub(r"[^\w.-]+", "-", Path(path).name)
    return name if name == path else f"{name}-{zlib.crc32(path.encode(errors='replace')):08x}"


def run_name(config: TrainConfig) -> str:
    """A folder name made of the recipe and of what differs from it."""
    base = TrainConfig(recipe=config.recipe, **RECIPES[config.recipe])
    parts = [config.recipe]
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name in MACHINE or value == getattr(base, f.name):
            continue
        if f.name == "mask_ratio" and config.mask == "none":
            continue
        values = value if isinstance(value, tuple) else (value,)
        if f.name in ("data", "clusters", "init", "extend"):  # a path's name, not its folders
            values = [path_name(name) for name in values]
        value = "-".join(map(str, values))
        value = re.sub(r"[^\w.-]+", "-", value)
        parts.append(f"{f.name.replace('_', '-')}={value}")
    name = "_".join(parts)
    return name if len(name) <= 200 else f"{name[:190]}-{zlib.crc32(name.encode()):08x}"
