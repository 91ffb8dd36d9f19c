"""Pre-train a CLIP model under a mask, then tune it for a moment without: one loop, two stages.

    python train.py                                         the demo, on the embedded emoji
    torchrun --nproc_per_node 8 train.py --mask gaussian    the same on eight processes
    python train.py --data my_pictures/ --epochs 30         your own pictures
    python train.py --recipe cc12m --data cc12m/            the paper's settings, on indexed shards
    python train.py --mask attentive --aclip                a rival's whole method

The demo trains for four minutes on two CPU cores with native bf16, and then names about 41 % of
1,809 emoji in the style of an artist that it never saw (three seeds in results/; chance: 0.06 %).

Writes to runs/NAME: config.json, log.jsonl, pretrained.pt (before tuning), model.pt; until it is
done latest.pt and previous.pt, from which the same command goes on after a kill; and if there is
cause, quarantine.jsonl (pictures that could not be read) and bad-batch.json.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from timm.optim import Muon
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import aclip
import data
import evaluate
import glip
from data import EMBEDDED, Batches, TextMask
from glip import GLIP, GLIPConfig, InputError, Masker
from recipes import (  # noqa: F401 - one name for users, train
    RECIPES,
    TrainConfig,
    as_tuple,
    check,
    flag_of,
    masker_of,
    parse,
    run_name,
)

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
    report: "Report", state: dict,
) -> None:  # fmt: skip
    """Train `model` in place for one stage, from where `state`, a checkpoint of it, stopped."""
    network = aclip.AClip(model).to(device) if stage.aclip else model
    model.transformer.recompute = model.visual.transformer.recompute = config.recompute
    optimizers = make_optimizers(network, config)
    start = state.get("step", 0)
    if state:
        restore(state, stage, network, optimizers)
    parallel = network
    if world > 1:
        static = not (config.micro_batch or config.recompute)
        parallel = DistributedDataParallel(network, static_graph=static)
    if config.compile:
        parallel = torch.compile(parallel)
    bf16 = evaluate.use_bf16(config.precision, device)
    workers = config.workers
    if workers < 0:
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = 0 if config.data[0] in EMBEDDED else max(1, min(8, cores))
    batches = data.loader(stage.batches, start, stage.steps, workers, pin=device.type == "cuda")
    model.train()
    report.begin(stage, network, optimizers, state)
    for step, batch in enumerate(batches, start):
        report.data_arrived(batch[4])
        renew_mask(stage, network, config, step, device)
        lr = lr_at(step, stage.steps, stage.warmup, stage.lr)
        found = compute_gradients(parallel, batch, stage, config, device, bf16)
        finite = apply_gradients(network, optimizers, lr, config.clip_grad_norm)
        model.clamp_logit_scale()
        report.step(step, *found, lr, finite)
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


def compute_gradients(
    network: nn.Module, batch: tuple[Tensor, Tensor, Tensor, Tensor, list], stage: Stage,
    config: TrainConfig, device: torch.device, bf16: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Backward through images (B, 3, H, W), tokens (B, T), noise (B, N), A-CLIP's further noise.

    Returns the loss, logit_scale, and visible (B, K) or None.
    """
    images, tokens, noise, extra = (x.to(device, non_blocking=True) for x in batch[:4])
    inner = getattr(network, "module", getattr(network, "_orig_mod", network))
    inner = getattr(inner, "module", inner)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        if stage.aclip:
            loss, scale, visible = aclip.aclip_loss(
                network, inner, stage.masker, images, tokens, noise, extra
            )
        elif config.micro_batch:
            return backward_cached(network, inner, images, tokens, noise, stage.masker, config)
        else:
            ids_keep, visible = stage.masker(images, noise, inner.visual)
            image_features, text_features, scale = network(images, tokens, ids_keep, visible)
            loss = glip.contrastive_loss(
                config.loss, image_features, text_features, scale, inner.logit_bias
            )
    loss.backward()
    return loss.detach(), scale.detach(), visible


def backward_cached(
    network: nn.Module, inner: GLIP, images: Tensor, tokens: Tensor, noise: Tensor,
    masker: Masker, config: TrainConfig,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The same gradients with the activations of micro_batch pairs at a time.

    GradCache (2101.06983): all features without a graph, their gradients by the loss, then each
    part again with a graph, under the masks that it had.
    """
    parts = [slice(i, i + config.micro_batch) for i in range(0, len(images), config.micro_batch)]
    features, masks = [], []
    with torch.no_grad():
        for part in parts:
            masks.append(masker(images[part], noise[part], inner.visual))
            features.append(inner(images[part], tokens[part], *masks[-1]))
    image_features, text_features, scales = zip(*features, strict=True)
    loss, grads = glip.cached_gradients(
        config.loss, torch.cat(image_features), torch.cat(text_features), scales[0],
        inner.logit_bias, config.micro_batch,
    )  # fmt: skip
    for place, part in enumerate(parts):
        last = place == len(parts) - 1
        alone = isinstance(network, DistributedDataParallel) and not last
        with network.no_sync() if alone else contextlib.nullcontext():
            found = network(images[part], tokens[part], *masks[place])
            surrogate = (found[0] * grads[0][part]).sum() + (found[1] * grads[1][part]).sum()
            surrogate = surrogate + found[2] * grads[2] * float(last)
            if inner.logit_bias is not None:
                surrogate = surrogate + inner.logit_bias * grads[3] * float(last)
            surrogate.backward()
    visible = None if masks[0][1] is None else torch.cat([mask[1] for mask in masks])
    return loss, scales[0], visible


@torch.no_grad()
def apply_gradients(
    network: nn.Module, optimizers: list[torch.optim.Optimizer], lr: float, longest: float
) -> Tensor:
    """Update, unless a gradient is not finite; returns whether all are, on the device.

    After DDP every process has the same gradients, so all skip or none. Fused AdamW skips on the
    device; Muon cannot, and the host waits to hear.
    """
    grads = [p.grad for p in network.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    finite = norm.isfinite()
    if longest:
        torch._foreach_mul_(grads, (longest / (norm + 1e-6)).clamp(max=1.0))
    skip = len(optimizers) > 1 and not finite.item()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("scale", 1.0)
        if isinstance(optimizer, torch.optim.AdamW):
            optimizer.found_inf = (~finite).float()
        if not skip:
            optimizer.step()
        optimizer.zero_grad()
    return finite


# ------------------------------------------------------------------------------------------------
# Checkpoints, and going on from them
# ------------------------------------------------------------------------------------------------

STOPPED = 75  # the exit code of a run that was asked to stop and can be resumed
FREE = {  # what may differ when a run is resumed
    "device", "workers", "out", "log_every", "eval_every", "save_every", "micro_batch", "recompute",
    "compile", "max_bad", "resume",
}  # fmt: skip
asked_to_stop = []  # signals that came


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """SIGTERM and SIGINT ask the run to save and stop; a second SIGINT stops it at once."""

    def ask(number: int, frame: object) -> None:
        if number == signal.SIGINT and signal.SIGINT in asked_to_stop:
            raise KeyboardInterrupt
        asked_to_stop.append(number)

    asked_to_stop.clear()
    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stopped(Exception):
    """The run was asked to stop, and saved."""


def stamp_of(pairs: object) -> str:
    """What tells these training data from others."""
    text = pairs.stamp(np.arange(0)) if isinstance(pairs, data.Source) else str(pairs.counts)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def last_state(out: Path, config: TrainConfig, stages: list[Stage]) -> dict:
    """The newest whole checkpoint of an unfinished run in `out`, {} if there is none.

    Raises InputError where it is another run's, naming what differs.
    """
    names = [name for name in ("latest.pt", "previous.pt") if (out / name).is_file()]
    for name in names:
        try:
            state = glip.load_checkpoint(out / name)
        except InputError as error:
            print(f"{error}; going back to the checkpoint before", file=sys.stderr)
            continue
        if "optimizers" not in state:
            continue
        now, then = asdict(config), state["config"]
        for key in sorted(now.keys() - FREE):
            if key not in then or now[key] != then[key]:
                raise InputError(
                    f"--out {out} holds another run: its {flag_of(key)} was {then.get(key)}, not "
                    f"{now[key]}; give that, or choose another --out"
                )
        if state["data_stamp"] != stamp_of(stages[0].batches.pairs):
            raise InputError(
                f"--out {out}: the data have changed since this run began; bring them back, or "
                "choose another --out"
            )
        return state
    if names:
        raise InputError(f"--out {out}: no checkpoint in it is whole; remove the folder")
    return {}


def restore(
    state: dict, stage: Stage, network: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> None:
    """Put a checkpoint's optimizers, teacher and heads back in place."""
    model = network.model if stage.aclip else network
    found = Masker.restored(state["mask"], model.visual)
    vars(stage.masker).update(vars(found))
    if stage.aclip:
        network.load_state_dict(state["heads"], strict=False)
    for optimizer, content in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(content)


def cut_log(out: Path, state: dict, stages: list[Stage]) -> None:
    """Cut log.jsonl back to a checkpoint, and what was written of another step away."""
    order = [stage.name for stage in stages]
    until = (order.index(state["stage"]), state["step"]) if state else (-1, 0)
    kept, path = [], out / "log.jsonl"
    for line in path.read_text().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, KeyError):  # a line that a kill cut
            record = json.loads(line)
            if (order.index(record["stage"]), record["step"]) <= until:
                kept.append(line + "\n")
    glip.write_bytes(path, "".join(kept).encode())


class Report:
    """Progress bar, log.jsonl and evaluations; only the first process shows and writes."""

    def __init__(
        self, config: TrainConfig, out: Path, rank: int, world: int, device: torch.device
    ) -> None:
        self.config, self.out, self.rank, self.world, self.device = config, out, rank, world, device
        self.seconds, self.steps = {}, {}  # of each stage, evaluations left out
        self.read, self.bad, self.quarantined, self.news, self.told = 0, 0, set(), [], 0
        self.first_bad = torch.full((), -1, device=device)  # the first step that was not finite

    def begin(
        self, stage: Stage, network: nn.Module, optimizers: list, state: dict
    ) -> None:  # fmt: skip
        """Start the clock of a stage; evaluation stops it."""
        self.stage, self.network, self.optimizers, self.waited = stage, network, optimizers, 0.0
        self.model = network.model if stage.aclip else network
        self.every = self.config.eval_every or max(1, math.ceil(stage.steps / 4))
        self.bar = tqdm(
            total=stage.steps, desc=stage.name, disable=self.rank > 0, dynamic_ncols=True,
            initial=state.get("step", 0), mininterval=0.5 if sys.stderr.isatty() else 20,
        )  # fmt: skip
        self.begun = self.ready = self.saved = time.perf_counter()
        self.begun -= self.seconds.get(stage.name, 0.0)
        self.first = state.get("step", 0)

    def data_arrived(self, bad: list[list[str]]) -> None:
        """Count the time since the last step ended as waiting for data, and list bad pictures."""
        self.waited += time.perf_counter() - self.ready
        self.read += self.stage.batches.share
        self.bad += len(bad)
        self.news += bad

    def quarantine(self) -> None:
        """List what could not be read since the last time; the first process writes for all."""
        news = [self.news]
        if self.world > 1:
            news = [None] * self.world
            dist.all_gather_object(news, self.news)
        bad, self.news = [row for rows in news for row in rows], []
        path = self.out / "quarantine.jsonl"
        if not self.quarantined and path.exists():  # of the run before it was cut short
            self.quarantined |= {tuple(json.loads(line).values())
                                 for line in path.read_text().splitlines()}  # fmt: skip
        for row in bad:
            if tuple(row) not in self.quarantined:
                self.quarantined.add(tuple(row))
                if self.rank == 0:
                    record = dict(zip(("data", "where", "why"), row, strict=True))
                    glip.append_line(path, record)

    def step(
        self, step: int, loss: Tensor, scale: Tensor, visible: Tensor | None, lr: float,
        finite: Tensor,
    ) -> None:  # fmt: skip
        """Log, evaluate, save when due, and stop if asked to; all processes decide alike.

        Raises InputError for numbers that are not finite, and Stopped.
        """
        self.first_bad = torch.where(finite | (self.first_bad >= 0), self.first_bad, step)
        last, done = step + 1 == self.stage.steps, step + 1
        due = last or done % self.config.log_every == 0
        stop = bool(asked_to_stop)
        if due or (self.world > 1 and done % 10 == 0):  # others hear of a signal here
            sums = torch.stack([loss.float(), loss.new_tensor(self.bad).float(),
                                loss.new_tensor(stop).float()])  # fmt: skip
            if self.world > 1:
                dist.all_reduce(sums)
            loss, bad, stop = sums.tolist()
            if bad > self.told:  # all processes know the same number
                self.quarantine()
                self.told = bad
            if due:
                self.log(step, loss / self.world, round(bad), scale, visible, lr)
        elif self.world > 1:
            stop = False
        self.bar.update()
        evaluating = last or done % self.every == 0
        if evaluating or stop:
            self.seconds[self.stage.name] = time.perf_counter() - self.begun
            self.steps[self.stage.name] = done
        if evaluating:
            if self.rank == 0:
                self.evaluate(done)
            if self.world > 1:
                dist.barrier()
            self.begun = time.perf_counter() - self.seconds[self.stage.name]
        if self.rank == 0 and (evaluating or stop or self.save_is_due(done)):
            self.seconds[self.stage.name] = time.perf_counter() - self.begun
            self.save_last(done)
        if stop and not last:
            self.bar.close()
            raise Stopped(f"{self.stage.name} step {done}")
        if last:
            self.bar.close()
        self.ready = time.perf_counter()

    def save_is_due(self, done: int) -> bool:
        """Every save_every steps; by default when ten minutes have passed."""
        if self.config.save_every:
            return done % self.config.save_every == 0
        return time.perf_counter() - self.saved > 600

    def log(
        self, step: int, loss: float, bad: int, scale: Tensor, visible: Tensor | None, lr: float
    ) -> None:
        """One record of log.jsonl, of a loss that is the mean over the processes."""
        self.check_finite(loss, step)
        self.check_bad(bad, self.read * self.world)
        batch_size = self.stage.batches.order.batch_size
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

    def check_finite(self, loss: float, step: int) -> None:
        """Stop after a loss or gradient that was not finite; its update was skipped.

        The pictures of that batch are written down.
        """
        first = int(self.first_bad)
        if first < 0 and math.isfinite(loss):
            return
        first, batches = first if first >= 0 else step, self.stage.batches
        ids = batches.order.batch(first)
        where = [batches.pairs.where(i) for i in ids]
        if self.rank == 0:
            record = {"stage": self.stage.name, "step": first + 1, "pictures": where}
            glip.write_bytes(self.out / "bad-batch.json", json.dumps(record, indent=1).encode())
        self.bar.close()
        raise InputError(
            f"the loss or its gradient is not finite at {self.stage.name} step {first + 1}; that "
            f"update was skipped, and {self.out}/bad-batch.json names its pictures: lower --lr, "
            "lengthen --warmup, or try --clip-grad-norm 1"
        )

    def check_bad(self, bad: int, read: int) -> None:
        """Stop if too many pictures cannot be read; all processes know the same numbers."""
        if bad > self.config.max_bad * max(read, 1000):  # too few tell nothing
            reasons = Counter(why for _, _, why in self.quarantined)
            most = ", ".join(f"{why} ({n})" for why, n in reasons.most_common(3))
            self.bar.close()
            raise InputError(
                f"{bad} of {read} pictures cannot be read, more than --max-bad "
                f"{self.config.max_bad:g}: {most}; {self.out}/quarantine.jsonl lists them: repair "
                "the data"
            )

    def evaluate(self, step: int) -> None:
        """Evaluate the full picture on the held-out pairs."""
        result = evaluate.quick(
            self.model, self.stage.held_out, self.device, self.config.precision
        )
        self.write(stage=self.stage.name, step=step, **result)
        self.bar.write(
            f"{self.stage.name} step {step}: "
            + ", ".join(f"{name} {value:.1%}" for name, value in result.items())
        )
        self.model.train()

    def save(self, name: str, step: int, **state: object) -> None:
        """Write a checkpoint that tells what made it."""
        glip.save_checkpoint(
            self.out / name, self.model, stage=self.stage.name, step=step,
            mask=self.stage.masker.state(), config=asdict(self.config),
            seconds=dict(self.seconds), steps=dict(self.steps),
            machine=evaluate.machine(self.device), command=command(), world=self.world,
            bf16=evaluate.use_bf16(self.config.precision, self.device), **state,
        )  # fmt: skip

    def save_last(self, step: int) -> None:
        """Write latest.pt, all that going on needs; the one before stays as previous.pt."""
        heads = {}
        if self.stage.aclip:
            heads = {k: v for k, v in self.network.state_dict().items() if k[:6] != "model."}
        self.save(
            "next.pt", step, heads=heads, optimizers=[o.state_dict() for o in self.optimizers],
            data_stamp=stamp_of(self.stage.batches.pairs), read=self.read, bad=self.bad,
        )  # fmt: skip
        if (self.out / "latest.pt").exists():
            os.replace(self.out / "latest.pt", self.out / "previous.pt")
        os.replace(self.out / "next.pt", self.out / "latest.pt")
        glip.flush_folder(self.out)
        self.saved = time.perf_counter()

    def write(self, **record: object) -> None:
        """Append a line to log.jsonl."""
        if self.rank == 0:
            glip.append_line(self.out / "log.jsonl", record)


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

    A run that was cut short goes on from its last checkpoint. Raises InputError for settings or
    data that cannot work, before anything is written, and Stopped when a signal asks for it.
    """
    with processes(config) as (rank, world, device), listening():
        check(config, world)
        out = Path(config.out or Path("runs") / run_name(config))
        if out.exists() and not out.is_dir():
            raise InputError(f"--out {out} is a file: name a folder")
        if (out / "model.pt").exists():
            raise InputError(
                f"--out {out} holds a finished run already: choose another --out, or remove the "
                "folder"
            )
        if out.exists() and any(out.iterdir()):
            if not (out / "config.json").is_file():
                raise InputError(f"--out {out} holds other files: choose another --out")
            if config.resume == "never":
                raise InputError(
                    f"--out {out} holds an unfinished run: leave --resume out to go on with it, or "
                    "remove the folder"
                )
        stages = plan(config, rank, world)  # all processes meet here, and then the first writes
        state = last_state(out, config, stages) if out.is_dir() else {}
        if world > 1:
            dist.barrier()  # nobody writes before all have read
        torch.manual_seed(config.seed)
        model = GLIP(replace(stages[0].model, siglip=config.loss == "siglip")).to(device)
        if rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            text = json.dumps(asdict(config), indent=2)
            glip.write_bytes(out / "config.json", text.encode())
            cut_log(out, state, stages)
            told = f", going on after {state['stage']} step {state['step']}" if state else ""
            print(f"{config.model} on {device.type}, writing to {out}{told}")
        report = Report(config, out, rank, world, device)
        if state:
            report.seconds, report.steps = state["seconds"], state["steps"]
            report.read, report.bad = state["read"], state["bad"]
        for stage in stages:
            if state and stage.name != state["stage"]:
                continue  # done before
            if stage.model.image_size != model.config.image_size:
                model = glip.resized(model, stage.model.image_size).to(device)
            if state:
                model.load_state_dict(state["model"])
            run_stage(stage, model, config, world, device, report, state)
            state = {}
            if rank == 0:
                last = stage is stages[-1]
                report.save("model.pt" if last else "pretrained.pt", stage.steps)
        if rank == 0:
            for name in ("latest.pt", "previous.pt"):
                (out / name).unlink(missing_ok=True)
    return out


def main() -> None:
    """The command line: bad input is one sentence and exit code 2, a signal's stop STOPPED."""
    try:
        train(parse())
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"train.py: stopped after {stopped}, saved; the same command goes on")
        sys.exit(STOPPED)
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted; the same command goes on from the last checkpoint")


if __name__ == "__main__":
    main()
