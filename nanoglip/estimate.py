"""What a run will cost, on paper: python train.py --recipe cc12m --estimate h100x8

    forward   = (layers - 1) (24 D^2 T + 4 D T^2) a tower of T tokens, width D; its last block, of
                which one token is read, 4 D^2 T + 20 D^2 + 4 D T, of texts 4 D^2 T + 20 D^2 +
                4 D T^2; + patches, projections
    compute   = 3 forward: the backward pass is two more; + 1 to recompute, + 1 for micro-batches
    memory    = 16 bytes a parameter (weight, gradient, Adam's two), 12 where Muon has one, + 2 for
                bf16 copies; + (layers - 2/3) (36 D T + 2 h T^2) bytes a pair in bf16, (64 D T +
                4 h T^2) in fp32; without T^2 on GPUs, whose fused attention keeps no matrix
    loss      = 12 G E a pair of fp32 products (SigLIP: 6 G E) against the G pairs of the batch, of
                width E, at the rate of fp32 without TF32; 16 bytes a logit
    step      = FLOPs / rate of products + bytes touched / bandwidth of memory
    exchange  = gradients round a ring, 2 (n - 1) / n of 4 bytes a parameter (3 with --shard, whose
                weights go round as well), hidden as far as the backward pass lasts; and features
                of all pairs there and back, which wait for nothing
    reader    = pairs a second / pictures a second that a core of ours reads
    disk      = three training checkpoints of 12 bytes a parameter (8 where Muon is), weights once,
                and PAIR_BYTES a pair, which are read once an epoch

Bytes touched: TOUCHED times those of activations, STATE times the optimizer's. For a GPU the
rates are the vendor's, times ATTAINED, which is our assumption. `here` measures both rates first.
"""

import json
import math
import re
import time
from dataclasses import dataclass
from functools import cache
from mmap import mmap
from pathlib import Path

import torch

import glip
from glip import GLIPConfig, InputError
from nanoglip import aclip
from nanoglip.cli import counted
from nanoglip.config import TrainConfig, embedded, masker_of, workers_of
from nanoglip.losses import LOGIT_BYTES, rows_at_once
from nanoglip.machine import cores, memory_of, resolve

GPUS = {
    # name: FLOP/s in bf16 (dense) and fp32, bytes/s of memory, bytes of it, bytes/s to neighbours
    "h100": (989e12, 67e12, 3.35e12, 80e9, 450e9),
    "h200": (989e12, 67e12, 4.8e12, 141e9, 450e9),
    "a100": (312e12, 19.5e12, 2.04e12, 80e9, 300e9),
    "l40s": (362e12, 92e12, 0.86e12, 48e9, 32e9),
    "rtx4090": (165e12, 83e12, 1.01e12, 24e9, 32e9),
    "rtx3090": (71e12, 36e12, 0.94e12, 24e9, 32e9),
}

ATTAINED = (0.6, 0.8)  # of those rates of products and of memory: assumed, no GPU was at hand
MACHINE = 8  # GPUs in one machine
NETWORK = 50e9  # bytes a second for each GPU between machines, 400 Gbit/s
TOUCHED = 3.0  # times that an activation is read or written in a step; see `bench.py estimate`
STATE = (0.4, 2.0)  # the same for the optimizer's state: on a CPU, with pages that exist; on a GPU
PAIRS = {  # of the sets that recipes are for, from their sources
    "cc3m": 2_905_954, "cc12m": 10_968_539, "cluster-masking": 10_968_539, "clip-pgs": 10_968_539,
    "a-clip": 14_829_396, "flip": 400_000_000, "clipa": 400_000_000,
}  # fmt: skip
PAIR_BYTES = {name: 90e3 if pairs < 12e6 else 30e3 for name, pairs in PAIRS.items()}  # on disk:
# the snapshots of CC3M and CC12M take 250 GB and 1 TB; at 256 pixels CC12M takes 331 (img2dataset)


@dataclass(frozen=True)
class Machine:
    """What computes: rates in FLOP/s and bytes/s, memory in bytes, and how many there are."""

    name: str
    products: float
    fp32: float  # the rate of the loss' products
    memory_rate: float
    memory: float
    link: float
    count: int
    fused: bool  # attention that keeps no matrix
    bf16: bool


def count_of(text: str) -> int:
    """How many devices `h100x8` or `here` are; raises InputError for one that is not known."""
    found = re.fullmatch(rf"here|({'|'.join(GPUS)})(?:x([1-9]\d*))?", text.lower())
    if not found:
        raise InputError(f"--estimate {text}: choose here, or one of {', '.join(GPUS)}, as h100x8")
    return int(found[2] or 1)


def named(text: str, precision: str, width: int) -> Machine:
    """`h100x8` or `here`, measured for towers of a width; InputError for one that is not known."""
    count = count_of(text)
    if text.lower() == "here":
        on = resolve("auto", precision)
        device, bf16 = on.device, on.bf16
        products, memory_rate = rates(device, bf16, width)
        fp32 = rates(device, False, width)[0] if bf16 else products
        return Machine(f"{device.type} (measured)", products, fp32, memory_rate,
                       memory_of(device), 0, 1, device.type == "cuda", bf16)  # fmt: skip
    bf16, fp32, memory_rate, memory, link = GPUS[text.lower().removesuffix(f"x{count}")]
    fp32, memory_rate = fp32 * ATTAINED[0], memory_rate * ATTAINED[1]
    products = fp32 if precision == "fp32" else bf16 * ATTAINED[0]
    link = link if count <= MACHINE else min(link, NETWORK)
    return Machine(
        text, products, fp32, memory_rate, memory, link, count, True, precision != "fp32"
    )  # fmt: skip


def rates(device: torch.device, bf16: bool, width: int, rows: int = 4096) -> tuple[float, float]:
    """FLOP/s of a product like a block's, bytes/s of a sum into new memory; best of a second each.
    """
    kind = torch.bfloat16 if bf16 else torch.float32
    x = torch.randn(rows, width, device=device, dtype=kind)
    w = torch.randn(4 * width, width, device=device, dtype=kind)
    a, b = (torch.randn(2**24, device=device) for _ in range(2))  # larger than any cache

    def best(work: object) -> float:
        found, begun = [], time.perf_counter()
        while time.perf_counter() - begun < 1 or len(found) < 3:
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            found.append(time.perf_counter() - start)
        return min(found)

    def add() -> torch.Tensor:  # into new pages: the process keeps those it frees
        if device.type == "cpu":
            return torch.add(a, b, out=torch.frombuffer(mmap(-1, 4 * len(a)), dtype=a.dtype))
        return torch.add(a, b)

    product = best(lambda: torch.nn.functional.linear(x, w))
    return 2 * x.numel() * 4 * width / product, 3 * 4 * len(a) / best(add)


def tower_flops(tokens: float, width: int, layers: int, asking: float = 1) -> float:
    """Products of a tower's forward pass for one item; `asking`: tokens, in its last block."""
    last = 4 * width**2 * tokens + 20 * width**2 + 4 * width * tokens * asking
    return (layers - 1) * (24 * width**2 * tokens + 4 * width * tokens**2) + last


def tower_bytes(
    tokens: float, width: int, layers: int, heads: int, bf16: bool, fused: bool
) -> float:
    """What a tower's forward pass keeps of one item for the backward pass."""
    a, b = (36, 2) if bf16 else (64, 4)
    return (layers - 2 / 3) * (a * width * tokens + (0 if fused else b * heads * tokens**2))


@cache
def parameters(model: GLIPConfig) -> dict[str, int]:
    """How many numbers each tower learns, and how many of both Muon takes."""
    with torch.device("meta"):
        network = glip.GLIP(model)
    total = sum(p.numel() for p in network.parameters())
    image = sum(p.numel() for p in network.visual.parameters())
    blocks = [p for n, p in network.named_parameters() if "resblocks" in n and p.ndim > 1]
    return {"image": image, "text": total - image, "blocks": sum(p.numel() for p in blocks),
            "muon_flops": sum(muon_flops(*p.shape) for p in blocks)}  # fmt: skip


def muon_flops(rows: int, columns: int) -> float:
    """Five Newton-Schulz steps of a matrix, each two products with it and one of its square."""
    small, large = sorted((rows, columns))
    return 5 * (4 * small**2 * large + 2 * small**3)


def forward_flops(model: GLIPConfig, kept: int, text: float) -> tuple[float, float]:
    """Products of both towers for one pair: `kept` patches, `text` tokens."""
    image = tower_flops(1 + kept, model.width, model.layers)
    image += 6 * model.patch_size**2 * model.width * kept + 2 * model.width * model.embed_dim
    words = tower_flops(text, model.text_width, model.text_layers, text)
    return image, words + 2 * model.text_width * model.embed_dim


def loss_flops(loss: str, columns: int, width: int, views: int = 1) -> float:
    """Products of the loss and its gradient for one pair; two views are A-CLIP's, with SimCLR."""
    alike = 24 * columns * aclip.OUT if views > 1 else 0
    return views * (6 if loss == "siglip" else 12) * columns * width + alike


def of_stage(
    config: TrainConfig, model: GLIPConfig, kept: int, text: float, batch: int, on: Machine,
    pretrain: bool,
) -> dict:  # fmt: skip
    """FLOPs a pair, bytes of memory and seconds of a step, with the parts of each."""
    patches, learned = model.grid[0] * model.grid[1], parameters(model)
    total, share = learned["image"] + learned["text"], batch / on.count
    views = 2 if pretrain and config.aclip else 1
    image, words = forward_flops(model, kept, text)
    forward = views * image + words
    compute = (3 + config.recompute + bool(config.micro_batch)) * forward
    if pretrain and masker_of(config).needs("attention"):
        compute += config.teacher_scale**2 * forward_flops(model, patches, 0)[0]
    loss = loss_flops(config.loss, batch, model.embed_dim, views)
    kept_bytes = tower_bytes(1 + kept, model.width, model.layers, model.heads, on.bf16, on.fused)
    kept_bytes = views * kept_bytes + tower_bytes(
        text, model.text_width, model.text_layers, model.text_heads, on.bf16, on.fused
    )
    muon = config.optimizer == "muon"
    state = (16 + 2 * on.bf16) * total - 4 * muon * learned["blocks"]
    touched = TOUCHED * kept_bytes * (1 + 0.5 * config.recompute)  # of a pair
    backward = 2 * forward / on.products + 2 / 3 * touched / on.memory_rate  # of a pair
    flops, in_fp32 = share * compute + muon * learned["muon_flops"], share * loss
    moved = share * touched + STATE[on.fused] * state
    seconds = {"products": flops / on.products, "loss": in_fp32 / on.fp32,
               "memory": moved / on.memory_rate}  # fmt: skip
    sent = least = 0.0
    if on.count > 1:
        ring, parts = (on.count - 1) / on.count, share // (config.micro_batch or share) or 1
        times = 2 if not config.shard else 3 if not config.micro_batch else 1 + 3 * parts
        weights = ring * times * 4 * total
        features = ring * (2 if config.loss == "siglip" else 6) * 4 * batch * model.embed_dim
        sent = weights + features
        hidden = share / parts * backward
        seconds["exchange"] = features / on.link + max(0.0, weights / on.link - hidden)
        least = weights / on.link / backward
    held = min(config.micro_batch or share, share) * kept_bytes
    if config.recompute:  # inputs of blocks, and the inside of one
        inside = 1 / max(model.layers, model.text_layers)
        inputs = 4 * ((1 + kept) * model.width * model.layers * views
                      + text * model.text_width * model.text_layers)  # fmt: skip
        held = min(config.micro_batch or share, share) * (kept_bytes * inside + inputs)
    rows = share
    if config.micro_batch:
        rows = min(share, rows_at_once(config.micro_batch, batch, on.memory))
    return {
        "forward_flops": {"image": image, "text": words},
        "flops_per_pair": (flops + in_fp32) / share,
        "state_bytes": state / (on.count if config.shard else 1), "activation_bytes": held,
        "logit_bytes": LOGIT_BYTES * views * rows * batch,
        "seconds": seconds, "step": sum(seconds.values()),
        "sent_bytes": sent, "least_pairs": least,
    }  # fmt: skip


def of_run(config: TrainConfig, stages: list) -> tuple[Machine, list[dict]]:
    """The machine, and what each stage costs on it: of_stage's numbers, sizes, steps and hours.

    `stages` are of train.plan(), or [] where there are no data yet.
    """
    on = named(config.estimate, config.precision, GLIPConfig.named(config.model).width)
    found = []
    for name in ("pretrain", "tune") if config.tune_epochs else ("pretrain",):
        first = name == "pretrain"
        size = (config.image_size if first else config.tune_image_size or config.image_size) or None
        model = GLIPConfig.named(config.model, size, config.context_length)
        batch = config.batch_size
        epochs, steps = config.epochs, config.steps
        if not first:
            batch, epochs = config.tune_batch_size, config.tune_epochs
        known = [stage for stage in stages if stage.name == name]
        if known:
            text = min(longest(known[0]), model.context_length)
            steps, source = known[0].steps, "in these data"
        else:
            text, source = model.context_length, "at most"
            steps = round(epochs * (PAIRS.get(config.recipe, 0) // batch)) if epochs else steps
            if not steps:
                raise InputError("--estimate: give --data, or a recipe whose data are known")
        text = config.text_tokens or text if first else text
        patches = model.grid[0] * model.grid[1]
        kept, masker = patches, masker_of(config)
        if first and config.mask != "none":
            kept = round(sum(masker.num_computed(patches, r) for r in masker.mask_ratios) / 2)
        stage = of_stage(config, model, kept, text, batch, on, first)
        found.append(stage | {
            "name": name, "kept": kept, "patches": patches, "text": text, "source": source,
            "batch": batch, "steps": steps, "hours": steps * stage["step"] / 3600,
            "pairs_per_second": batch / stage["step"],
        })  # fmt: skip
    return on, found


def reader_rate() -> float:
    """Pictures a second that a thread of our reader gives, measured."""
    measured = json.loads((Path(__file__).parents[1] / "results/bench.json").read_text())
    return measured["data"]["pictures_per_second"]["ours"]


def tell(config: TrainConfig, stages: list) -> str:
    """The estimate in words. `stages` are of train.plan(), or [] where there are no data yet."""
    on, found = of_run(config, stages)
    size = config.image_size or None
    learned = parameters(GLIPConfig.named(config.model, size, config.context_length))
    total, hours = learned["image"] + learned["text"], sum(stage["hours"] for stage in found)
    lines = [
        f"{config.model}: {total / 1e6:.1f} M parameters "
        f"(image {learned['image'] / 1e6:.1f}, text {learned['text'] / 1e6:.1f}), "
        f"on {on.name}: {on.products / 1e12:.3g} TFLOP/s, {on.memory_rate / 1e9:.3g} GB/s",
        *(paragraph(stage, on) for stage in found),
        f"in all {duration(hours)}" + f", times {on.count} devices" * (on.count > 1)
        + "; data not counted",
    ]
    kept = 3 * (12 * total - 4 * (config.optimizer == "muon") * learned["blocks"]) + 4 * total
    disk = f"disk: {kept / 1e9:.3g} GB of checkpoints (two and one being written, pretrained.pt)"
    if config.keep_every:
        count = found[0]["steps"] // config.keep_every
        own = (kept - 4 * total) / 3 + 4 * total * count  # extend.pt, and the weights
        disk += f", {own / 1e9:.3g} GB of what --keep-every keeps ({count} steps)"
    if not config.data and config.recipe in PAIRS:
        pairs = PAIRS[config.recipe]
        each = PAIR_BYTES[config.recipe]
        disk += f", {pairs * each / 1e9:,.0f} GB of shards ({pairs:,} pairs of {each / 1e3:.0f} KB)"
    if not embedded(config):
        rate, most = reader_rate(), max(stage["pairs_per_second"] for stage in found)
        workers = math.ceil(most / rate / on.count)
        lines.append(f"reader: {most:,.0f} pairs a second need {most / rate:.3g} CPU cores like "
                     f"ours, {rate:,.0f} each of 256 pixels (`python -m tools.bench data`)")
        each = PAIR_BYTES.get(config.recipe, 0)
        if stages:  # 0 where the source has no shards
            each = stages[0].batches.pairs.addresses[:, 1].sum() / len(stages[0].batches.pairs)
        if each:
            lines[-1] += f", and {most * each / 1e9:.2g} GB/s of disk, {each / 1e3:.0f} KB a pair"
        lines[-1] += f": --workers {workers}" + " for each process" * (on.count > 1)
        if on.name == config.estimate:
            lines[-1] += " (default: its cores, at most 8)"
        else:
            lines[-1] += f"; here are {counted(cores(), 'core')}, and train.py takes "
            lines[-1] += str(workers_of(config))
    lines.append(disk)
    if on.name == config.estimate:
        lines.append(f"not verified: no GPU has run this; assumed are {ATTAINED[0]:.0%} of the "
                     f"vendor's rate of products and {ATTAINED[1]:.0%} of memory's")  # fmt: skip
    return "\n".join(lines)


def duration(hours: float) -> str:
    """A time in hours, minutes or seconds, two at least of the larger ones."""
    for unit, one in (("hours", 1), ("minutes", 60)):
        if hours * one >= 2:
            return f"{hours * one:.3g} {unit}"
    return f"{hours * 3600:.3g} s"


def longest(stage: object) -> float:
    """Tokens of the longest caption of a batch, the mean over some batches."""
    steps = range(0, stage.steps, max(1, stage.steps // 10))
    batches, size = stage.batches, stage.batches.order.batch_size
    tokens = (batches.tokens(batches.order.batch(step), step * size) for step in steps)
    found = [int(glip.lengths(block).max()) for block in tokens]
    return sum(found) / len(found)


def paragraph(found: dict, on: Machine) -> str:
    """One stage in words."""
    image, words = (found["forward_flops"][tower] / 1e9 for tower in ("image", "text"))
    parts = ", ".join(f"{key} {value:.3g}" for key, value in found["seconds"].items())
    memory = sum(found[key] for key in ("state_bytes", "activation_bytes", "logit_bytes"))
    lines = [
        f"{found['name']}: {found['kept']} of {found['patches']} patches, {found['text']:.3g} "
        f"tokens ({found['source']}); forward "
        f"{image:.3g} + {words:.3g} GFLOP a pair, {found['flops_per_pair'] / 1e9:.3g} in training",
        f"  memory {memory / 1e9:.3g} GB a device: {found['state_bytes'] / 1e9:.3g} state, "
        f"{found['activation_bytes'] / 1e9:.3g} activations, {found['logit_bytes'] / 1e9:.3g} "
        "logits" + (f"; it has {on.memory / 1e9:.0f}" if on.memory else "")
        + (": too little, try --micro-batch" if on.memory and memory > 0.9 * on.memory else ""),
        f"  step of {found['batch']:,} pairs: {found['step']:.3g} s ({parts}), "
        f"{found['pairs_per_second']:,.0f} pairs a second; {counted(found['steps'], 'step')}, "
        + duration(found["hours"]),
    ]  # fmt: skip
    if on.count > 1:
        lines.append(
            f"  exchange {found['sent_bytes'] / 1e9:.3g} GB a device and step; below "
            f"{found['least_pairs']:.0f} pairs a device it outlasts the backward pass"
        )
    return "\n".join(lines)
