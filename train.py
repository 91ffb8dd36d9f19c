"""Pre-train a CLIP model under a mask, then tune it without: one loop, two stages.

    python train.py                                         the demo, on the embedded emoji
    torchrun --nproc_per_node 8 train.py --mask gaussian    the same on eight processes
    python train.py --data DIR --batch-size 64 --tune-batch-size 64     your own pictures
    python train.py --recipe cc12m --data cc12m/            the paper's settings, on indexed shards
    python train.py --mask attentive --aclip                A-CLIP, with all its losses

The demo trains for eight minutes on two CPU cores; native bf16 should halve that. It names about
46 % of 1,809 emoji of a vendor whose art it never saw (three seeds in results/; chance: 0.06 %).

Writes to runs/NAME: config.json, log.jsonl, pretrained.pt (before tuning) and model.pt. While it
runs, latest.pt and previous.pt are there, from which the same command resumes. Unreadable pictures
are listed in quarantine.jsonl, the pictures of a batch that was not finite in bad-batch.json.
"""

import contextlib
import json
import math
import shlex
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import data
import glip
from glip import GLIP, GLIPConfig, InputError
from nanoglip import aclip, checkpoint, cli, distributed, estimate, files
from nanoglip.config import MACHINE, TrainConfig, check, masker_of, parse, run_name, workers_of
from nanoglip.evals.benchmarks import open_sets
from nanoglip.files import locked
from nanoglip.losses import cached_gradients, contrastive_loss, rows_at_once
from nanoglip.machine import Device, keep_memory, memory_of, use_bf16
from nanoglip.masker import Masker, momentum_at
from nanoglip.masks import settings_of
from nanoglip.runlog import Report, Stage, cut_log, listening, opened_logs
from nanoglip.sources import captions
from nanoglip.sources.captions import TextMask
from nanoglip.sources.order import Batch, Batches, check_shared_memory, loader, make_order

# --- Pure functions of the step, and the optimizer ------------------------------------------------


def lr_at(step: int, steps: int, warmup: int, lr: float) -> float:
    """Learning rate of a step: linear warm-up, then half a cosine down to 0."""
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


MOST = 2**48  # pairs of a run; the largest published ones have 2**37
FREE = MACHINE | {"max_bad"}  # settings that may differ when a run is resumed
LENGTH = {"steps", "epochs", "extend"}  # and when it is extended
MUON_SCALE = 2.0  # Muon's learning rate over AdamW's; docs/training.md has the search


def make_optimizers(model: GLIP, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW with CLIP's constants, and Muon for the blocks' matrices if asked for.

    Weight decay acts on matrices, not on vectors and scalars. Muon's updates are scaled to the size
    of AdamW's, then by MUON_SCALE, so that one learning rate serves both.
    """
    groups = {"muon": [], "matrices": [], "vectors": [], "scalars": []}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        inner = config.optimizer == "muon" and "resblocks" in name
        kind = ("scalars", "vectors", "muon" if inner else "matrices")[min(p.ndim, 2)]
        groups[kind].append(p)
    decayed = {"params": groups["matrices"], "weight_decay": config.weight_decay}
    plain = [{"params": groups[kind], "weight_decay": 0.0} for kind in ("vectors", "scalars")]
    adamw = torch.optim.AdamW([decayed, *plain], betas=(0.9, config.beta2), eps=1e-6, fused=True)
    if not groups["muon"]:
        return [adamw]
    inner = {"params": groups["muon"], "scale": MUON_SCALE}
    return [adamw, Muon([inner], config.weight_decay)]


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are made orthogonal (Jordan, 2024), at AdamW's size (2502.16982).

    timm's and torch's compute it in bf16 everywhere. A processor without bf16 takes most of a
    step for that, so there it is fp32.
    """

    def __init__(self, params: list, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum})
        native = use_bf16("auto", self.param_groups[0]["params"][0].device)
        self.dtype = torch.bfloat16 if native else torch.float32

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, momentum, alike = group["lr"], group["momentum"], defaultdict(list)
            for p in group["params"]:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                mean = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                alike[p.shape].append((p, p.grad.lerp(mean, momentum)))        # Nesterov's
            for shape, found in alike.items():  # small matrices are faster together
                params, means = zip(*found, strict=True)
                updates = orthogonal(torch.stack(means), self.dtype)
                for p, update in zip(params, updates, strict=True):
                    p.mul_(1 - lr * group["weight_decay"])
                    p.add_(update, alpha=-lr * 0.2 * max(shape) ** 0.5)


def orthogonal(matrices: Tensor, dtype: torch.dtype, iterations: int = 5) -> Tensor:
    """Nearly U V' of each matrix U S V', by Newton-Schulz steps: singular values of 0.7 to 1.2.

    (n, r, c) -> (n, r, c).
    """
    x, tall = matrices.to(dtype), matrices.shape[1] > matrices.shape[2]
    x = x.mT if tall else x  # products with the shorter side are cheaper
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        square = x @ x.mT
        poly = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, poly, x, beta=3.4445)
    return x.mT if tall else x


# --- Processes and stages -------------------------------------------------------------------------


def open_data(config: TrainConfig, image_size: int, rank: int, world: int) -> tuple:
    """(training pairs, held-out pairs); rank 0 builds the cache, the others wait.

    All ranks raise what is wrong with the data, so none waits for the others.
    """

    def opened() -> tuple:
        return data.load(
            config.data, image_size, config.vendors, config.held_out, config.data_weights,
            config.max_bad, config.crop_scale,
        )

    return distributed.on_rank_0(rank, world, opened) or opened()


def plan(config: TrainConfig, rank: int, world: int) -> list[Stage]:
    """The stages with their data; raises InputError for data that cannot serve them."""
    opened = {}

    def stage(
        name: str, masker: Masker, batch_size: int, steps: int, epochs: float, lr: float,
        warmup: int, size: int,
    ) -> Stage:  # fmt: skip
        model = GLIPConfig.named(config.model, size or None, config.context_length)
        if model.image_size not in opened:
            opened[model.image_size] = open_data(config, model.image_size, rank, world)
        train, test = opened[model.image_size]
        first = name == "pretrain"

        def words() -> tuple:  # from the cache, or computed and cached
            mask = chances = None
            if first and config.text_mask != "none":
                mask = TextMask(config.text_mask, config.text_tokens, config.text_threshold, train)
            if first and config.sampling != "all":
                row = settings_of(captions.SAMPLINGS[config.sampling])
                chances = captions.sampling_probabilities(
                    config.sampling, train, {name: getattr(config, name) for name in row},
                    config.clusters, config.text_threshold,
                )  # fmt: skip
            return mask, chances

        text_mask, chances = distributed.on_rank_0(rank, world, words) or words()
        held = f"held out: {cli.counted(len(test), 'picture')}"
        try:
            order = make_order(train, batch_size, config.seed, name, chances)
        except InputError as error:
            raise InputError(f"{error}; {held}") from None
        steps = max(1, round(epochs * order.steps_per_epoch)) if epochs else steps
        if steps * batch_size > MOST:
            raise InputError(f"{name}: {steps:.3g} steps are more than any run has: give fewer")
        if rank == 0:
            print(
                f"{name}: {order.describe()}; {held}; {cli.counted(steps, 'step')}; "
                + masker.summary(model.grid)
                + f"; sampling {config.sampling}" * (chances is not None)
                + (f"; text mask {config.text_mask}, {config.text_tokens} tokens" * bool(text_mask))
                + f"; too short for the warm-up ({warmup})" * (warmup >= steps)
            )
        views = aclip.VIEW_DRAWS if first and config.aclip else 0
        prompts = train.flags is not None and config.captions == "prompts"
        batches = Batches(train, order, model, rank, world, text_mask, views, prompts)
        aclip_too = first and config.aclip
        return Stage(name, masker, aclip_too, steps, lr, warmup, model, batches, test)

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


# --- The loop -------------------------------------------------------------------------------------


def run_stage(
    stage: Stage, model: GLIP, config: TrainConfig, world: int, on: Device, report: Report,
    state: dict,
) -> GLIP:  # fmt: skip
    """The model after one stage, resumed where `state`, a checkpoint of the stage, stopped."""
    network = aclip.AClip(model).to(on.device) if stage.aclip else model
    model.transformer.recompute = model.visual.transformer.recompute = config.recompute
    static = not (config.micro_batch or config.recompute)
    shared = distributed.wrap(network, world, on.device, config.shard, static)
    optimizers = make_optimizers(network, config)  # of sharded parameters, if they are
    start = state.get("step", 0)
    if state:
        checkpoint.restore(state, stage.masker, stage.aclip, network, optimizers)
    if config.compile:
        compile_towers(model, stage.masker.needs("gaze"))
    pin = on.device.type == "cuda"
    check_shared_memory(stage.batches, workers := workers_of(config))
    batches = loader(stage.batches, start, stage.steps, workers, pin)
    model.train()
    report.begin(stage, network, optimizers, state)
    for step, batch in enumerate(distributed.prefetch(batches, on.device), start):
        report.data_arrived(batch)
        stage.masker.before_step(step, stage.steps, model.visual, stage.batches.sample)
        if stage.aclip:
            network.update_teacher(momentum_at(step, stage.steps, config.teacher_momentum))
            found = aclip_gradients(network, batch, stage.masker, config.crop_scale, on, shared)
        else:
            with stage.masker.learning(model.visual):
                found = compute_gradients(
                    model, batch, stage.masker, config.loss, on, config.micro_batch, shared
                )
        if config.shard:
            distributed.share_scalars(network)
        lr = lr_at(step, stage.steps, stage.warmup, stage.lr)
        finite = apply_gradients(network, optimizers, lr, config.clip_grad_norm)
        model.clamp_logit_scale()
        report.step(step, *found, lr, finite)
    model.requires_grad_(True)  # A-CLIP froze the patch projection
    return report.whole_model()


def compile_towers(model: GLIP, watched: bool = False) -> None:
    """torch.compile in place, but not the packing of texts, whose sizes change at every step.

    Where a gaze watches the image tower's tokens, they are made outside of what is compiled.
    """
    (model.visual.transformer if watched else model.visual).compile()
    model.transformer.compile()


def compute_gradients(
    model: GLIP, batch: Batch, masker: Masker, loss: str, on: Device, micro_batch: int = 0,
    shared: nn.Module | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Backward through a batch; returns the loss, logit_scale, and visible (B, K) or None.

    `shared` is `model` as ranks share it. With micro_batch that many pairs are in memory.
    """
    images, tokens, noise, *_ = batch.to_device(on.device)
    shared = model if shared is None else shared
    with on.autocast():
        if micro_batch:
            return backward_cached(shared, model, images, tokens, noise, masker, loss, micro_batch)
        ids_keep, visible = masker(images, noise, model.visual)
        image_features, text_features, scale = shared(images, tokens, ids_keep, visible)
        total = contrastive_loss(loss, image_features, text_features, scale, model.logit_bias)
    total.backward()
    return total.detach(), scale.detach(), visible


def aclip_gradients(
    network: aclip.AClip, batch: Batch, masker: Masker, crop_scale: tuple[float, float],
    on: Device, shared: nn.Module,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """compute_gradients with A-CLIP's two views and its other losses."""
    images, tokens, noise, views, *_ = batch.to_device(on.device)
    with on.autocast():
        loss, scale, visible = aclip.aclip_loss(
            shared, network, masker, images, tokens, noise, views, crop_scale
        )
    loss.backward()
    return loss.detach(), scale.detach(), visible


def backward_cached(
    shared: nn.Module, network: GLIP, images: Tensor, tokens: Tensor, noise: Tensor,
    masker: Masker, loss: str, micro_batch: int,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The same gradients with the activations of micro_batch pairs at a time.

    GradCache (2101.06983): all features without a graph, their gradients by the loss, then each
    part again with a graph, under the same masks.
    """
    parts = [slice(i, i + micro_batch) for i in range(0, len(images), micro_batch)]
    features, masks = [], []
    with torch.no_grad():
        for part in parts:
            masks.append(masker(images[part], noise[part], network.visual))
            features.append(network(images[part], tokens[part], *masks[-1]))
    image_features, text_features, scales = zip(*features, strict=True)
    everybody = len(images) * (dist.get_world_size() if dist.is_initialized() else 1)
    total, grads = cached_gradients(
        loss, torch.cat(image_features), torch.cat(text_features), scales[0],
        network.logit_bias,
        rows_at_once(micro_batch, everybody, memory_of(images.device)),
    )
    for place, part in enumerate(parts):
        last = place == len(parts) - 1
        with distributed.synchronise(shared, last):
            found = shared(images[part], tokens[part], *masks[place])
            surrogate = (found[0] * grads[0][part]).sum() + (found[1] * grads[1][part]).sum()
            surrogate = surrogate + found[2] * grads[2] * float(last)
            if network.logit_bias is not None:
                surrogate = surrogate + network.logit_bias * grads[3] * float(last)
            surrogate.backward()
    visible = None if masks[0][1] is None else torch.cat([mask[1] for mask in masks])
    return total, scales[0], visible


@torch.no_grad()
def apply_gradients(
    network: nn.Module, optimizers: list[torch.optim.Optimizer], lr: float, longest: float
) -> Tensor:
    """Update the weights; returns whether all gradients were finite, a bool tensor on the device.

    It is not read here, so that no step waits for the device. If it is False, the new weights are
    unusable, and Report stops the run before it saves them.
    """
    grads = [p.grad for p in network.parameters() if p.grad is not None]
    norm = distributed.total_norm(grads)
    finite = norm.isfinite()
    if longest:
        shorter = (longest / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(distributed.local_shards(grads), shorter)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("scale", 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return finite


# --- A run ----------------------------------------------------------------------------------------


def first_model(config: TrainConfig, wanted: GLIPConfig, state: dict) -> GLIP:
    """A new model, or the weights of --init; for a resumed run, its checkpoint's towers.

    Raises InputError for an --init that holds no model, or one of other towers than the run's.
    """
    wanted = replace(wanted, siglip=config.loss == "siglip")
    if state:
        return GLIP(GLIPConfig(**state["model_config"]))
    if not config.init:
        return GLIP(wanted)
    path = Path(config.init)
    model, found = glip.load_model(path / "model.pt" if path.is_dir() else path)
    wanted = replace(wanted, quick_gelu=found.quick_gelu)
    for name, value in asdict(replace(found, image_size=wanted.image_size)).items():
        if value != getattr(wanted, name):
            raise InputError(
                f"--init {path}: its {name} is {value}, this run's is {getattr(wanted, name)}: "
                "choose the --model, --context-length and --loss that it was trained with"
            )
    return resized(model, wanted.image_size)


def resized(model: GLIP, image_size: int | tuple[int, int]) -> GLIP:
    """The same model for pictures of another size (pixels), positions resampled."""
    content = {"model_config": asdict(model.config), "model": model.state_dict()}
    return glip.build(content, image_size)


def check_out(out: Path, config: TrainConfig) -> None:
    """Refuse a folder that this run may not write in."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: name a folder")
    if (out / "model.pt").exists():
        longer = f"--extend {out} makes it longer in a folder of its own; "
        raise InputError(
            f"--out {out} holds a finished run already: {longer * (out / 'extend.pt').exists()}"
            "choose another --out, or remove the folder"
        )
    if out.exists() and any(path.name != ".lock" for path in out.iterdir()):
        if not (out / "config.json").is_file():
            raise InputError(f"--out {out} holds other files: choose another --out")
        if config.resume == "never":
            raise InputError(
                f"--out {out} holds an unfinished run: leave --resume out to resume it, or "
                "remove the folder"
            )


def train(config: TrainConfig) -> Path:
    """The folder of a run, after pre-training (pretrained.pt) and tuning (model.pt).

    An unfinished run is resumed from its last checkpoint. Raises InputError for settings or
    data that cannot work, before anything is written, and Stopped when a signal asks for it.
    """
    with (
        distributed.processes(config.device, config.precision) as (rank, world, on), listening(),
        contextlib.ExitStack() as stack,
    ):  # fmt: skip
        check(config, world)
        if on.device.type == "cpu":
            keep_memory()
        out = Path(config.out or Path("runs") / run_name(config))
        check_out(out, config)
        sets = open_sets(config.eval_sets, rank, world)
        stages = plan(config, rank, world)  # all ranks meet here, then rank 0 writes

        def claim() -> None:
            stack.enter_context(locked(out, "training in"))
            check_out(out, config)  # what another process may have finished since

        distributed.on_rank_0(rank, world, claim)
        own, pairs, told = asdict(config), stages[0].batches.pairs, "resuming"
        state = checkpoint.latest(out, own, FREE, pairs, on.bf16)
        extending = bool(config.extend) and not state
        if extending:
            source, told = Path(config.extend), f"extending {config.extend}"
            state = checkpoint.to_extend(
                source, own, FREE | LENGTH, pairs, on.bf16, stages[0].steps
            )  # fmt: skip
        checkpoint.check_same(out, state, world)  # before anything is written
        torch.manual_seed(config.seed)
        model = first_model(config, stages[0].model, state).to(on.device)
        if rank == 0:
            text = json.dumps(asdict(config), indent=2)
            files.write_bytes(out / "config.json", text.encode())
            for name in ("log.jsonl", "quarantine.jsonl") if extending else ():
                if (source / name).is_file():
                    files.write_bytes(out / name, (source / name).read_bytes())
            cut_log(out, state, stages)
            for torn in out.glob("*.tmp"):  # of a run that was killed while it wrote
                torn.unlink()
            told = f", {told} after {state['stage']} step {state['step']}" if state else ""
            cli.say(f"{config.model} on {on.device.type}, writing to {out}{told}")
        logs = stack.enter_context(opened_logs(config, out, state, rank, world))
        report = Report(config, out, rank, world, on, logs, sets)
        if state:
            report.resume(state)
        for stage in stages:
            if state and stage.name != state["stage"]:
                continue  # done before
            if stage.model.image_size != model.config.image_size:
                model = resized(model, stage.model.image_size).to(on.device)
            if state:
                model.load_state_dict(state["model"])
            model = run_stage(stage, model, config, world, on, report, state)
            state, name = {}, "model.pt" if stage is stages[-1] else "pretrained.pt"
            with distributed.rank_0_alone(rank, world):
                if rank == 0:
                    report.save(name, model, stage.steps)
        if rank == 0:
            for name in ("latest.pt", "previous.pt"):
                (out / name).unlink(missing_ok=True)
            cli.say(f"trained: {out}/model.pt; the run on one page: {out}/report.html; "
                    f"next: python evaluate.py {shlex.quote(str(out))}")  # fmt: skip
    return out


def overfit(config: TrainConfig) -> None:
    """Overfit one batch, each step under a new mask; raises InputError if that fails."""
    config = replace(
        config, batch_size=config.overfit, tune_epochs=0.0, epochs=0.0,
        steps=min(config.steps, 500), warmup=min(config.warmup, 50),
    )  # fmt: skip
    with distributed.processes(config.device, config.precision) as (rank, world, on):
        check(config, world)
        if world > 1 or config.aclip:
            raise InputError("--overfit is for one process: leave torchrun and --aclip out")
        (stage,) = plan(config, rank, world)
        torch.manual_seed(config.seed)
        model = first_model(config, stage.model, {}).to(on.device).train()
        optimizers = make_optimizers(model, config)
        guess = math.log(config.batch_size)
        batch = stage.batches[0]
        if len(batch.tokens.unique(dim=0)) < len(batch.tokens):
            raise InputError("equal captions in the batch, so no loss near 0: give another --seed")
        for step in range(config.steps):
            stage.masker.before_step(step, config.steps, model.visual, stage.batches.sample)
            noise = stage.batches.noise("mask", step * config.batch_size, stage.batches.patches)
            batch = batch._replace(noise=noise)
            with stage.masker.learning(model.visual):
                loss, scale, _ = compute_gradients(
                    model, batch, stage.masker, config.loss, on, config.micro_batch
                )
            lr = lr_at(step, config.steps, config.warmup, config.lr)
            finite = apply_gradients(model, optimizers, lr, config.clip_grad_norm)
            model.clamp_logit_scale()
            if not finite:
                raise InputError(f"the gradient is not finite at step {step + 1}: lower --lr")
            if (step + 1) % 50 == 0 or loss < 0.05:
                print(f"step {step + 1}: loss {loss:.3f} (ln batch {guess:.2f}), scale {scale:.1f}")
            if loss < 0.05:
                print(f"{config.overfit} pairs are overfitted on {on.device}: model and loss work")
                return
        with torch.no_grad():
            features = model(batch.images.to(on.device), batch.tokens)[:2]
            alike = [f @ f.T for f in features]
        alike = [(x.sum() - x.trace()).item() / (len(x) * (len(x) - 1)) for x in alike]
        raise InputError(diagnosis(loss.item(), guess, *alike, config))


def diagnosis(loss: float, guess: float, images: float, texts: float, config: TrainConfig) -> str:
    """Why a batch was not learned; `images`, `texts`: mean cosine of different ones."""
    told = f"after {cli.counted(config.steps, 'step')} the loss is {loss:.3f}, not near 0"
    for name, cosine in (("pictures", images), ("texts", texts)):
        if cosine > 0.95:
            return (
                f"{told}, and all {name} look alike to the model (cosine {cosine:.2f}): are they "
                "different? else lower --lr, or lengthen --warmup"
            )
    if config.loss == "clip" and loss > 0.9 * guess:
        return f"{told}, still that of guessing (ln batch {guess:.2f}): raise --lr"
    return f"{told}: it falls too slowly; raise --lr, or lower --mask-ratio"


@cli.guarded
def main() -> None:
    """The command line: bad input is one sentence and exit code 2."""
    config = parse()
    if config.estimate:
        check(config, estimate.count_of(config.estimate))
        print(estimate.tell(config, plan(config, 0, 1) if config.data else []))
    elif config.overfit:
        overfit(config)
    else:
        train(config)


if __name__ == "__main__":
    main()
