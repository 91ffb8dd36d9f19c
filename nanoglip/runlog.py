"""A run's folder: what training writes there, logs and reports.

    config.json       every setting           log.jsonl    a record a line: the source of truth
    latest.pt         all that resuming needs; previous.pt is the one before
    pretrained.pt     before the tuning       model.pt     at the end
    step-000200.pt    kept on the way         extend.pt    all that a longer run needs
    report.html       the run on one page     tensorboard/, wandb/ if asked for
    quarantine.jsonl  pictures that could not be read, bad-batch.json: a batch that was not finite
"""

import contextlib
import json
import math
import os
import re
import secrets
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from glip import GLIP, GLIPConfig, InputError
from nanoglip import checkpoint, distributed, files, page
from nanoglip.cli import Stopped, counted, printable, say
from nanoglip.config import RECIPES, TrainConfig, embedded, workers_of
from nanoglip.evals.benchmarks import Benchmark, score_sets
from nanoglip.evals.encoder import Encoder, quick
from nanoglip.files import prune
from nanoglip.machine import Device, between, cores, machine, mark
from nanoglip.masker import Masker
from nanoglip.sources.order import Batch, Batches
from nanoglip.sources.pictures import HeldOut

# --- A stage, and signals -------------------------------------------------------------------------


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
    held_out: HeldOut


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


def cut_log(out: Path, state: dict, stages: list[Stage]) -> None:
    """Cut log.jsonl back to a checkpoint; drop broken lines of it and of quarantine.jsonl."""
    order = [stage.name for stage in stages]
    until = (order.index(state["stage"]), state["step"]) if state else (-1, 0)

    def before(record: dict) -> bool:
        for name in record.keys() - {"stage"}:
            math.isnan(0 if record[name] is None else record[name])  # raises for all but numbers
        return (order.index(record["stage"]), record["step"]) <= until

    prune(out / "log.jsonl", before)
    if (out / "quarantine.jsonl").exists():
        prune(out / "quarantine.jsonl", quarantined)


def quarantined(record: dict) -> tuple[str, ...]:
    """(data, where, why) of a record of quarantine.jsonl; else an error of types or keys."""
    row = tuple(record[name] for name in ("data", "where", "why"))
    "".join(row)  # raises an error unless all are text
    return row


# --- Other people's logs --------------------------------------------------------------------------

Write = Callable[[dict, int], None]  # takes a record's numbers by name, and the step of the run


@contextlib.contextmanager
def to_tensorboard(config: TrainConfig, out: Path, start: int) -> Iterator[Write]:
    """Event files in the run's folder; what a killed run wrote beyond `start` is hidden."""
    from torch.utils.tensorboard import SummaryWriter

    def write(numbers: dict, step: int) -> None:
        for name, value in numbers.items():
            board.add_scalar(name, value, step)
        board.flush()

    with SummaryWriter(out / "tensorboard", purge_step=start + 1) as board:
        yield write


@contextlib.contextmanager
def to_wandb(config: TrainConfig, out: Path, start: int) -> Iterator[Write]:
    """A run of Weights & Biases, which drops steps that it has; its id lies in the run's folder."""
    import wandb

    kept = out / "wandb/id"
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        files.write_bytes(kept, secrets.token_hex(4).encode())
    with wandb.init(
        project=os.environ.get("WANDB_PROJECT") or "nanoglip", name=out.name, dir=out,
        id=kept.read_text(), resume="allow", config=asdict(config), allow_val_change=True,
    ) as run:  # fmt: skip
        yield run.log


@contextlib.contextmanager
def to_trackio(config: TrainConfig, out: Path, start: int) -> Iterator[Write]:
    """A run of trackio, found again by its name."""
    import trackio

    run = trackio.init(
        project="nanoglip", name=out.name, resume="allow" if start else "never",
        config=asdict(config),
    )  # fmt: skip
    try:
        yield run.log
    finally:
        run.finish()


LOGS = {"tensorboard": to_tensorboard, "wandb": to_wandb, "trackio": to_trackio}  # by flag


@contextlib.contextmanager
def opened_logs(
    config: TrainConfig, out: Path, state: dict, rank: int, world: int
) -> Iterator[list[Write]]:
    """What writes to each log that is asked for; the first rank's alone. `state`: a checkpoint.

    Raises InputError, on all ranks, for a log that does not open.
    """
    start = sum({**state["steps"], state["stage"]: state["step"]}.values()) if state else 0
    with contextlib.ExitStack() as stack:

        def opened() -> list[Write]:
            writes = []
            for name in (name for name in LOGS if getattr(config, name)):
                try:
                    writes.append(stack.enter_context(LOGS[name](config, out, start)))
                except Exception as error:
                    why = str(error).partition("\n")[0].rstrip(".")
                    raise InputError(
                        f"--{name} does not start ({why}): repair that, or leave it out"
                    ) from None
            return writes

        yield distributed.on_rank_0(rank, world, opened) or []


# --- The report -----------------------------------------------------------------------------------


SHOWN = 12  # pairs on the page
MINUTE = 60.0  # seconds over which the reader is judged
SLOW = 0.1  # share of them that may go by waiting for data


class Report:
    """Progress bar, log.jsonl and evaluations; only rank 0 shows and writes."""

    def __init__(
        self, config: TrainConfig, out: Path, rank: int, world: int, on: Device,
        logs: list[Write], sets: list[Benchmark],
    ) -> None:  # fmt: skip
        self.logs = logs
        self.config, self.out, self.rank, self.world, self.on = config, out, rank, world, on
        self.sets, self.scored = sets, ""  # what is evaluated besides held-out pairs, and the last
        self.seconds, self.steps = {}, {}  # of each stage, evaluations left out
        self.read, self.bad, self.quarantined, self.news, self.told = 0, 0, set(), [], 0
        self.untold = set() if rank or embedded(config) else {"demand", "waiting"}  # of the reader
        self.chance = config.loss == "clip" and not config.aclip  # guessing loses ln(batch)
        self.pairs = {}  # on the page
        self.machine = machine(on.device)
        self.first_bad = torch.full((), -1, device=on.device)  # the first step that was not finite

    def resume(self, state: dict) -> None:
        """Restore the counts of a checkpoint."""
        self.seconds, self.steps = state["seconds"], state["steps"]
        self.pairs = {name: rows for name, rows in state["pairs"].items() if isinstance(rows, list)}
        self.read, self.told = state["read"] // self.world, state["bad"]
        self.bad = state["bad"] if self.rank == 0 else 0  # of all processes together

    def begin(self, stage: Stage, network: nn.Module, optimizers: list, state: dict) -> None:
        """Start the clock of a stage; it stops during evaluation."""
        self.stage, self.network, self.optimizers = stage, network, optimizers
        self.waited, self.reading, self.gaps, self.judged = 0.0, 0.0, [], ()
        self.model = network.model if stage.aclip else network
        self.every = self.config.eval_every or max(1, math.ceil(stage.steps / 4))
        self.bar = tqdm(
            total=stage.steps, desc=stage.name, disable=self.rank > 0, dynamic_ncols=True,
            initial=state.get("step", 0), mininterval=0.5 if sys.stderr.isatty() else 20,
        )  # fmt: skip
        self.begun = self.saved = time.perf_counter()
        self.begun -= self.seconds.get(stage.name, 0.0)
        self.ready = mark(self.on.device)
        self.before = sum(steps for name, steps in self.steps.items() if name != stage.name)

    def data_arrived(self, batch: Batch) -> None:
        """Mark the end of the wait since the last step; collect unreadable pictures."""
        self.batch = batch
        self.gaps.append((self.ready, mark(self.on.device)))
        self.reading += batch.core_seconds
        self.read += self.stage.batches.share
        self.bad += len(batch.bad)
        self.news += batch.bad

    def quarantine(self) -> None:
        """List what could not be read since the last call; rank 0 writes for all."""
        news = [self.news]
        if self.world > 1:
            news = [None] * self.world
            dist.all_gather_object(news, self.news)
        bad, self.news = [row for rows in news for row in rows], []
        path = self.out / "quarantine.jsonl"
        if not self.quarantined and path.exists():  # from before the run was interrupted
            for line in path.read_text().splitlines():
                with contextlib.suppress(ValueError, LookupError, TypeError):  # still being written
                    self.quarantined.add(quarantined(json.loads(line)))
        for row in bad:
            if tuple(row) not in self.quarantined:
                self.quarantined.add(tuple(row))
                if self.rank == 0:
                    record = dict(zip(("data", "where", "why"), row, strict=True))
                    files.append_line(path, record)

    def step(
        self, step: int, loss: Tensor, scale: Tensor, visible: Tensor | None, lr: float,
        finite: Tensor,
    ) -> None:  # fmt: skip
        """Log, evaluate and save when due, and stop if asked to; all ranks decide alike.

        Raises InputError for numbers that are not finite, and Stopped.
        """
        self.first_bad = torch.where(finite | (self.first_bad >= 0), self.first_bad, step)
        last, done = step + 1 == self.stage.steps, step + 1
        due = last or done % self.config.log_every == 0
        stop, save = bool(asked_to_stop), self.save_is_due()
        if due or (self.world > 1 and done % 10 == 0):  # here the ranks share counts and requests
            sums = torch.stack([loss.float(), *loss.new_tensor([self.bad, stop, save]).float()])
            if self.world > 1:
                dist.all_reduce(sums)
            loss, bad, stop, save = sums.tolist()
            if bad > self.told:  # all processes know the same number
                self.quarantine()
                self.told = bad
            if due:
                self.log(step, loss / self.world, round(bad), scale, visible, lr)
        elif self.world > 1:
            stop = save = False
        self.bar.update()
        evaluating = last or done % self.every == 0
        self.seconds[self.stage.name] = time.perf_counter() - self.begun
        self.steps[self.stage.name] = done
        model = None
        if evaluating or stop or save or self.save_step(done):
            self.check_finite(step)
            self.quarantine()
            model = self.whole_model()
        if evaluating:
            with distributed.rank_0_alone(self.rank, self.world):
                self.evaluate(model, done)
            self.begun = time.perf_counter() - self.seconds[self.stage.name]
        if model is not None:
            with distributed.rank_0_alone(self.rank, self.world):
                self.save_latest(model, done)
        if stop and not last:
            self.bar.close()
            raise Stopped(
                f"stopped after {self.stage.name} step {done}, saved; the same command goes on"
            )
        if last:
            self.bar.close()
            if self.quarantined and self.rank == 0:
                bad = counted(len(self.quarantined), "picture")
                say(f"{bad} could not be read: {self.reasons()}; "
                    f"listed in {self.out}/quarantine.jsonl")  # fmt: skip
        self.ready = mark(self.on.device)

    def save_step(self, done: int) -> bool:
        """Whether --save-every or --keep-every asks for a checkpoint here."""
        return self.kept(done) or bool(self.config.save_every and not done % self.config.save_every)

    def kept(self, done: int) -> bool:
        """Whether the weights of this step stay."""
        every = self.config.keep_every * (self.stage.name == "pretrain")
        return bool(every) and done % every == 0

    def save_is_due(self) -> bool:
        """Whether rank 0 asks for a checkpoint: by default after ten minutes."""
        late = time.perf_counter() - self.saved > 600
        return self.rank == 0 and not self.config.save_every and late

    def whole_model(self) -> GLIP:
        """The model, gathered from all ranks if they share it."""
        if not self.config.shard:
            return self.model
        weights = distributed.gather_full(self.model.state_dict())
        model = GLIP(self.model.config)
        model.load_state_dict(weights)
        return model.to(self.on.device)

    def log(
        self, step: int, loss: float, bad: int, scale: Tensor, visible: Tensor | None, lr: float
    ) -> None:
        """Write one record of log.jsonl; the loss is the mean over ranks."""
        self.check_finite(step, loss)
        self.check_bad(bad, self.read * self.world)
        batch_size = self.stage.batches.order.batch_size
        elapsed = time.perf_counter() - self.begun
        self.waited += sum(between(*gap) for gap in self.gaps)  # the loss was read, so all are past
        self.gaps = []
        rate, waiting = (step + 1) * batch_size / elapsed, self.waited / elapsed
        shares = {"mask_ratio": self.stage.masker.mask_ratio} if self.stage.masker.annealed else {}
        if visible is not None:  # of this process's pictures
            shares["computed"] = visible.shape[1] / self.stage.batches.patches
            shares["visible"] = visible.float().mean().item() * shares["computed"]
            shares["threshold"] = self.stage.masker.threshold
        self.write(
            stage=self.stage.name, step=step + 1, loss=loss, ln_batch=math.log(batch_size), lr=lr,
            logit_scale=scale.item(), **shares, bad=bad, pairs_per_second=rate, data_wait=waiting,
            seconds=elapsed,
        )  # fmt: skip
        guess = f" (ln batch {math.log(batch_size):.2f})" * self.chance  # what guessing gives
        self.bar.set_postfix_str(
            f"loss {loss:.3f}{guess}, {rate:,.0f} pairs/s, {waiting:.0%} waiting for data"
            + self.scored,
            refresh=False,
        )
        self.judge_reader(step, elapsed, self.waited, self.reading)

    def judge_reader(self, *now: float) -> None:
        """Say once what the steps of a minute want of the reader, and if they wait, what to do.

        `now`: steps, seconds, seconds of waiting, seconds of cores for reading. The first record
        starts the first minute, so that the start of workers does not count.
        """
        self.judged = self.judged or now
        steps, seconds, waited, reading = (b - a for a, b in zip(self.judged, now, strict=True))
        if not self.untold or seconds < MINUTE:
            return
        self.judged, busy = now, max(seconds - waited, 1e-3)  # busy: if data were always there
        wants, has, there = reading / busy, workers_of(self.config), cores()
        if "demand" in self.untold:
            self.bar.write(
                f"reader: {steps * self.stage.batches.share / busy:,.0f} pairs a second in each "
                f"process want {wants:.2g} cores; it has {counted(has, 'worker')} and "
                f"{counted(there, 'core')}"
            )
        if waited > SLOW * seconds and "waiting" in self.untold:
            self.untold = self.untold - {"waiting"}
            remedy = "copy the data to a local disk, or give more --workers"
            if wants > 0.8 * max(1, has):  # decoding keeps the workers busy
                remedy = "store pictures of 256 pixels"
                if has < there:
                    more = min(there, max(has, math.ceil(wants)) + 1)
                    remedy = f"give --workers {more}, or {remedy}"
            self.bar.write(f"reader: {waited / seconds:.0%} of the last {seconds:.0f} s went by "
                           f"waiting for data: {remedy} (docs/data.md)")  # fmt: skip
        self.untold -= {"demand"}

    def check_finite(self, step: int, loss: float = 0.0) -> None:
        """Stop after a loss or gradient that was not finite, before the next save.

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
            files.write_bytes(self.out / "bad-batch.json", json.dumps(record, indent=1).encode())
        self.bar.close()
        raise InputError(
            f"the loss or its gradient is not finite at {self.stage.name} step {first + 1}; no "
            f"checkpoint holds that update, and {self.out}/bad-batch.json names its pictures: "
            "lower --lr, lengthen --warmup, or try --clip-grad-norm 1"
        )

    def check_bad(self, bad: int, read: int) -> None:
        """Stop if too many pictures cannot be read; all ranks have the same numbers."""
        if bad > self.config.max_bad * max(read, 1000):  # the share of fewer says little
            self.bar.close()
            raise InputError(
                f"{bad} of {read} pictures cannot be read, more than --max-bad "
                f"{self.config.max_bad:g}: {self.reasons()}; {self.out}/quarantine.jsonl lists "
                "them: repair the data"
            )

    def reasons(self) -> str:
        """The most common reasons why pictures could not be read, with counts."""
        found = Counter(why for _, _, why in self.quarantined)
        return ", ".join(f"{why} ({n})" for why, n in found.most_common(3))

    def evaluate(self, model: GLIP, step: int) -> None:
        """Evaluate the full picture: on all ranks on sets, then on rank 0 on held-out pairs."""
        begun = time.perf_counter()
        encoder = Encoder(model, self.on)
        found, problems = score_sets(self.sets, encoder, self.rank, self.world)
        result = quick(encoder, self.stage.held_out) if self.rank == 0 else {}
        self.model.train()
        if self.rank > 0:
            return
        scores = [f"{name} {value:.1%}" for name, value in found.items()]
        self.scored = "".join(f", {score}" for score in scores[:1])
        seconds = time.perf_counter() - begun
        self.write(stage=self.stage.name, step=step, **result, **found, evaluation_seconds=seconds)
        scores = [f"{name} {value:.1%}" for name, value in result.items()] + scores
        self.bar.write(f"{self.stage.name} step {step}: {', '.join(scores)}; {seconds:.1f} s")
        for problem in problems:
            self.bar.write(printable(f"no number of a set: {problem}"))

    def record(self, step: int) -> dict:
        """What a checkpoint tells of the training."""
        return {
            "stage": self.stage.name, "step": step, "mask": self.stage.masker.state(),
            "config": asdict(self.config), "seconds": dict(self.seconds),
            "steps": dict(self.steps), "machine": self.machine, "command": command(),
            "world": self.world, "bf16": self.on.bf16,
        }  # fmt: skip

    def save(self, name: str, model: GLIP, step: int) -> None:
        """Write a model with the record of its training."""
        checkpoint.save(self.out / name, model, **self.record(step))

    def save_latest(self, model: GLIP, step: int) -> None:
        """Write latest.pt, all that resuming needs, what --keep-every asks for, and the page."""
        optimizers = [distributed.gather_full(x.state_dict()) for x in self.optimizers]
        bad = torch.tensor(self.bad, device=self.on.device)
        if self.world > 1:
            dist.all_reduce(bad)
        self.saved = time.perf_counter()
        if self.rank > 0:
            return
        heads = {}
        if self.stage.aclip:
            heads = {k: v for k, v in self.network.state_dict().items() if k[:6] != "model."}
        more = {
            "heads": heads, "optimizers": optimizers, "pairs": dict(self.pairs), "bad": int(bad),
            "read": self.read * self.world,
            "data_stamp": self.stage.batches.pairs.key(),
        }  # fmt: skip
        if self.kept(step):
            self.save(f"step-{step:06}.pt", model, step)
        ended = self.stage.name == "pretrain" and step == self.stage.steps
        if ended and self.config.keep_every:
            checkpoint.save(self.out / "extend.pt", model, **self.record(step), **more)
        checkpoint.save_latest(self.out, model, **self.record(step), **more)
        self.write_page(model, step)
        self.saved = time.perf_counter()

    @torch.no_grad()
    def write_page(self, model: GLIP, step: int) -> None:
        """Write report.html, with some pairs of the last batch under their masks."""
        images, tokens, noise = (x[:SHOWN] for x in self.batch[:3])
        keep = self.stage.masker(images.to(self.on.device), noise.to(self.on.device), model.visual)
        self.pairs[self.stage.name] = page.samples(images, tokens, keep, self.stage.model.grid)
        where = f"{self.stage.name}, step {step:,} of {self.stage.steps:,}"
        recipe = self.config.recipe
        usual = asdict(TrainConfig(recipe=recipe, **RECIPES[recipe]))
        page.write(
            self.out, asdict(self.config), usual, self.chance, where, command(), self.machine,
            self.pairs,
        )  # fmt: skip

    def write(self, **record: object) -> None:
        """Append a line to log.jsonl, and its numbers to the logs that are asked for."""
        if self.rank > 0:
            return
        files.append_line(self.out / "log.jsonl", record)
        step = self.before + record.pop("step")
        numbers = {name: x for name, x in record.items() if name != "stage" and x is not None}
        for write in self.logs:
            write(numbers, step)


def command() -> str:
    """The command line that made this run, without folders of this machine."""
    folders = r"(^|=)(\w+:/)?/\S*/(?=.)"
    words = [Path(sys.argv[0]).name, *(re.sub(folders, r"\1", w) for w in sys.argv[1:])]
    world, local = (int(os.environ.get(name) or 0) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    nodes = f"--nnodes {world // local} " if local and world > local else ""
    launcher = f"torchrun {nodes}--nproc_per_node {local or world}" if world else "python"
    return f"{launcher} {shlex.join(words)}"
