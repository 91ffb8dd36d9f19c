"""Exact order: which pairs stand at which step, for every number of processes and workers.

An order is a pure function of (seed, stage, epoch, position). Random numbers have an address,
`uniform(seed, purpose, position)`, with position = step x global batch + index in it. So what
stands at a position does not depend on workers, on processes, or on what was read before.
"""

import os
import shutil
import signal
import time
from bisect import bisect_right
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from glip import GLIPConfig, InputError, tokenize
from nanoglip.cli import counted
from nanoglip.noise import DRAWS, uniform
from nanoglip.sources.captions import LONGEST, TextMask
from nanoglip.sources.pictures import Source
from nanoglip.text import cut_tokens

# --- Orders ---------------------------------------------------------------------------------------

WINDOW = 16  # shards whose samples are shuffled together: more mix better, fewer are read faster


def make_order(
    pairs: Source, batch_size: int, seed: int, stage: str, chances: np.ndarray | None = None
) -> "Order":  # fmt: skip
    """The order that suits the data: distinct captions where they are known, else by shards.

    `chances` (M,) are the probabilities that an epoch shows each picture, if it does not show all.
    """
    if pairs.sources:
        return MixedOrder(pairs, batch_size, seed, stage)
    if pairs.concept is None or chances is not None:
        return ShardOrder(pairs, batch_size, seed, stage, chances)
    return ConceptOrder(pairs.concept, batch_size, seed, stage)


class Order:
    """Picture ids by position; an epoch shows `length` of `total` pictures, in whole batches."""

    def __init__(
        self, batch_size: int, seed: int, stage: str, length: int, total: int, most: int,
        what: str = "pictures of an epoch",
    ) -> None:  # fmt: skip
        if not 2 <= batch_size <= most:
            flag = "--batch-size" if stage.startswith("pretrain") else "--tune-batch-size"
            raise InputError(f"{flag} {batch_size} must lie between 2 and the {most} {what}")
        self.batch_size, self.seed, self.stage = batch_size, seed, stage
        self.length, self.total, self.steps_per_epoch = length, total, length // batch_size
        self.unplaced = total - self.steps_per_epoch * batch_size  # pictures left out

    def between(self, epoch: int, begin: int, end: int) -> np.ndarray:
        """Picture ids from one place of an epoch to another, (end - begin,)."""
        raise NotImplementedError

    def stream(self, position: int, count: int) -> np.ndarray:
        """Picture ids where epochs follow each other without a gap, (count,)."""
        found = [np.empty(0, int)]
        while count > 0:
            epoch, begin = divmod(position, self.length)
            found.append(self.between(epoch, begin, min(begin + count, self.length)))
            position, count = position + len(found[-1]), count - len(found[-1])
        return np.concatenate(found)

    def batch(self, step: int) -> np.ndarray:
        """Picture ids of the global batch of a step, (batch_size,)."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return self.between(epoch, index * self.batch_size, (index + 1) * self.batch_size)

    def describe(self) -> str:
        """The arithmetic of an epoch."""
        steps = self.steps_per_epoch
        return (
            f"{self.total:,} pictures; an epoch is {counted(steps, 'step')} of "
            f"{self.batch_size:,} = {steps * self.batch_size:,}, {self.unplaced:,} left over"
        )


class ConceptOrder(Order):
    """Few captions, each shown by several pictures; a batch never holds a caption twice.

    An epoch is a sequence of passes over the concepts in one shuffled order. A concept's pictures
    are shuffled, too; pass p shows the p-th of each concept that has as many. Any batch_size
    neighbours are distinct concepts. A pass over fewer than batch_size concepts is left out.
    """

    def __init__(self, concept: np.ndarray, batch_size: int, seed: int, stage: str) -> None:
        self.concept, sizes = concept, np.bincount(concept)
        widths = [int((sizes > p).sum()) for p in range(sizes.max(initial=0))]
        length = sum(width for width in widths if width >= batch_size)
        what = "distinct captions of the training data, or equal captions would be negatives"
        super().__init__(batch_size, seed, stage, length, len(concept), (sizes > 0).sum(), what)
        self.last = (-1, np.empty(0, int))

    def epoch(self, number: int) -> np.ndarray:
        """Picture ids of one epoch, (length,)."""
        if self.last[0] != number:
            shuffle = uniform(self.seed, f"order/{self.stage}", number, 1, len(self.concept))[0]
            pictures = np.argsort(shuffle, kind="stable")
            concept = self.concept[pictures]
            grouped = np.argsort(concept, kind="stable")  # a concept's pictures side by side
            _, first, size = np.unique(concept[grouped], return_index=True, return_counts=True)
            turn = np.arange(len(pictures)) - np.repeat(first, size)  # p: place in its concept
            place = np.repeat(grouped[first], size)  # where in the shuffle its concept comes first
            ids = pictures[grouped[np.lexsort((place, turn))]][: self.length]
            self.last = (number, ids)
        return self.last[1]

    def between(self, epoch: int, begin: int, end: int) -> np.ndarray:
        return self.epoch(epoch)[begin:end]

    def describe(self) -> str:
        captions = len(np.unique(self.concept))
        return f"{super().describe()}; {captions:,} captions, distinct in a batch"


class ShardOrder(Order):
    """Shards shuffled, then the samples within each window of WINDOW shards.

    With `chances` (M,) an epoch shows a fixed number of pictures, their sum, drawn anew in each:
    those of the smallest noise / chance, so that each is drawn about as often as its chance says.
    """

    def __init__(
        self, pairs: Source, batch_size: int, seed: int, stage: str,
        chances: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        starts, self.held, self.chances = pairs.shard_starts, pairs.held, chances
        self.starts = starts if len(starts) else np.array([0, len(pairs)])
        self.plans, self.windows, total = {}, {}, len(pairs) - len(pairs.held)
        length = total if chances is None else round(float(chances.sum()))
        super().__init__(batch_size, seed, stage, length, total, length)

    def plan(self, epoch: int) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
        """(ids shown, shards in their order, where in the epoch each window of them ends).

        The ids are ascending; None: all that are not held out.
        """
        if epoch not in self.plans:
            shown, count = None, len(self.starts) - 1
            below = self.starts - np.searchsorted(self.held, self.starts)
            if self.chances is not None:
                draw = uniform(self.seed, f"sampling/{self.stage}", epoch, 1, len(self.chances))[0]
                with np.errstate(divide="ignore"):
                    draw = (draw + 2**-25) / self.chances
                shown = np.sort(np.argpartition(draw, self.length - 1)[: self.length])
                below = np.searchsorted(shown, self.starts)
            draw = uniform(self.seed, f"shards/{self.stage}", epoch, 1, count)[0]
            shards = np.argsort(draw, kind="stable")
            sizes = np.add.reduceat(np.diff(below)[shards], np.arange(0, count, WINDOW))
            self.plans = {epoch: (shown, shards, np.cumsum(sizes))}
        return self.plans[epoch]

    def window(self, epoch: int, number: int) -> np.ndarray:
        """The ids of one window, shuffled."""
        if (epoch, number) not in self.windows:
            parts, (shown, shards, _) = [], self.plan(epoch)
            for shard in shards[number * WINDOW : (number + 1) * WINDOW]:
                begin, end = self.starts[shard : shard + 2]
                if shown is None:
                    ids = np.arange(begin, end)
                    parts.append(np.setdiff1d(ids, self.held, assume_unique=True))
                else:
                    parts.append(shown[slice(*np.searchsorted(shown, [begin, end]))])
            ids = np.concatenate(parts)
            purpose = f"window/{self.stage}/{epoch}/{number}"
            ids = ids[np.argsort(uniform(self.seed, purpose, 0, 1, len(ids))[0], kind="stable")]
            last = list(self.windows.items())[-1:]  # a batch may reach over the end of one
            self.windows = dict([*last, ((epoch, number), ids)])
        return self.windows[epoch, number]

    def between(self, epoch: int, begin: int, end: int) -> np.ndarray:
        found, ends = [], self.plan(epoch)[2]
        while begin < end:
            number = int(np.searchsorted(ends, begin, "right"))
            first = int(ends[number - 1]) if number else 0
            found.append(self.window(epoch, number)[begin - first : end - first])
            begin += len(found[-1])
        return np.concatenate(found)


class MixedOrder(Order):
    """Sources side by side: an epoch has weight x length pictures of each, evenly mixed.

    What an epoch takes of a source continues where the epoch before stopped, so that a weight of
    0.2 shows another fifth each time.
    """

    def __init__(self, pairs: Source, batch_size: int, seed: int, stage: str) -> None:
        sizes = np.array([w * len(s) for w, s in zip(pairs.weights, pairs.sources, strict=True)])
        most = np.minimum(np.ceil(batch_size * sizes / sizes.sum()) + 1, batch_size).astype(int)
        self.orders, self.quota, self.starts = [], [], pairs.starts
        for i, (source, weight) in enumerate(zip(pairs.sources, pairs.weights, strict=True)):
            order = make_order(source, max(2, int(most[i])), seed, f"{stage}/{i}")
            self.orders.append(order)
            self.quota.append(max(1, round(weight * order.length)))
        length = sum(self.quota)
        super().__init__(batch_size, seed, stage, length, length, length)

    def shares(self, place: int) -> list[int]:
        """How many pictures of each source stand before a place of the epoch; they add up to it.

        Source i's k-th picture belongs at (k + 1/2) / quota of the epoch: all are merged by that,
        in whole numbers, so that no source's share ever falls.
        """
        scale = 2 * self.length

        def before(time: int) -> list[int]:
            return [(2 * n * time + scale) // (2 * scale) for n in self.quota]

        # The last time by which no more than `place` pictures came.
        last = bisect_right(range(scale + 1), place, key=lambda time: sum(before(time))) - 1
        counts, after = before(last), before(last + 1)
        for i, n in enumerate(after):  # of those that come at the same time, the first sources
            counts[i] += min(n - counts[i], place - sum(counts))
        return counts

    def between(self, epoch: int, begin: int, end: int) -> np.ndarray:
        found = []
        for i, (first, last) in enumerate(zip(self.shares(begin), self.shares(end), strict=True)):
            ids = self.orders[i].stream(epoch * self.quota[i] + first, last - first)
            found.append(ids + self.starts[i])
        ids = np.concatenate(found)
        draw = uniform(self.seed, f"mix/{self.stage}/{epoch}", begin, 1, len(ids))[0]
        return ids[np.argsort(draw, kind="stable")]  # so that every process has some of each

    def describe(self) -> str:
        parts = ", ".join(f"{n:,}" for n in self.quota)
        return f"{super().describe()}; from the sources in their order: {parts}"


# --- Batches --------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """What a process computes a step with: B pairs, and noise for their masks."""

    images: Tensor  # (B, 3, S, S) bytes
    tokens: Tensor  # (B, T), T: the longest caption's; they stay on the CPU until they are packed
    noise: Tensor  # (B, N) fp32, for the patch mask
    views: Tensor  # (B, 0); where views are cut out of whole pictures, their noise and aspect ratio
    bad: list[list[str]]  # [source, where, reason] of each unreadable picture that was replaced
    core_seconds: float = 0.0  # that it took to read

    def to_device(self, device: torch.device) -> "Batch":
        """The batch with all but the tokens on a device."""
        to = partial(Tensor.to, device=device, non_blocking=True)
        return self._replace(images=to(self.images), noise=to(self.noise), views=to(self.views))


class Batches(Dataset):
    """Item `step`: this process's share of the global batch, but for its time a pure function.

    A stage that cuts `views` out of pictures gets them whole, squeezed into the square; with
    `prompts` class names are put in templates.
    """

    def __init__(
        self, pairs: Source, order: Order, config: GLIPConfig, rank: int, world: int,
        text_mask: TextMask | None = None, views: int = 0, prompts: bool = False,
    ) -> None:  # fmt: skip
        self.pairs, self.order, self.text_mask, self.views = pairs, order, text_mask, views
        self.patches, self.context_length = config.grid[0] * config.grid[1], config.context_length
        self.rank, self.share, self.prompts = rank, order.batch_size // world, prompts

    def __getitem__(self, step: int) -> Batch:
        start, begun = self.rank * self.share, time.process_time()
        position = step * self.order.batch_size + start
        ids = self.order.batch(step)[start : start + self.share]
        draws = self.noise("augment", position, DRAWS).numpy()
        ids, images, aspects, bad = self.pairs.read(ids, draws, whole=self.views > 0)
        tokens = self.tokens(ids, position)
        longest = tokens.numpy().argmax(1).max() + 1  # torch's argmax takes milliseconds
        tokens = tokens[:, :longest]
        noise = self.noise("mask", position, self.patches)
        views = self.noise("extra", position, self.views)
        if self.views:
            views = torch.cat([views, torch.from_numpy(aspects)[:, None]], dim=1)
        return Batch(images, tokens, noise, views, bad, time.process_time() - begun)

    def tokens(self, ids: np.ndarray, position: int) -> Tensor:
        """Token ids of pictures that stand from a position on, (B, T)."""
        if self.text_mask:
            words = self.noise("text mask", position, LONGEST)
            return self.text_mask(self.pairs.texts(ids), words)
        if self.prompts:
            chosen = self.noise("prompt", position, 1)[:, 0].numpy()
            return tokenize(self.pairs.prompted(ids, chosen), self.context_length)
        return cut_tokens(self.pairs.tokens(ids), self.context_length)

    def noise(self, purpose: str, position: int, n: int) -> Tensor:
        """This process's numbers for a purpose, from a position on: (B, n)."""
        purpose = f"{purpose}/{self.order.stage}"
        return torch.from_numpy(uniform(self.order.seed, purpose, position, self.share, n))

    def sample(self, count: int = 2048, block: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of augmented training pictures (B, 3, S, S) and noise (B, N): always the same."""
        seed, total = self.order.seed, len(self.pairs)
        chosen = np.argsort(uniform(seed, "sample", 0, 1, total)[0], kind="stable")
        chosen = chosen[~np.isin(chosen, self.pairs.held)][:count]
        for start in range(0, len(chosen), block):
            ids = chosen[start : start + block]
            draws = uniform(seed, "sample/augment", start, len(ids), DRAWS)
            masks = uniform(seed, "sample/mask", start, len(ids), self.patches)
            yield self.pairs.read(ids, draws)[1], torch.from_numpy(masks)


def check_shared_memory(batches: Batches, workers: int) -> None:
    """Raise InputError if the batches that wait in this machine's shared memory cannot fit.

    A worker that finds it full prints a traceback, and everybody waits for its batch forever.
    """
    local, shared = int(os.environ.get("LOCAL_WORLD_SIZE") or 1), Path("/dev/shm")
    waiting = local * workers * 2 * batches.share * 3 * batches.pairs.image_size**2  # torch has two
    if waiting and shared.is_dir() and (room := shutil.disk_usage(shared).total) < waiting:
        raise InputError(
            f"data workers pass batches on in /dev/shm: {waiting / 1e6:,.0f} MB for {workers} of "
            f"them in each process, and it has {room / 1e6:,.0f}: enlarge it (docker run "
            "--ipc=host), or lower --workers"
        )


def loader(batches: Batches, start: int, stop: int, workers: int, pin: bool) -> DataLoader:
    """Batches of the steps start ... stop - 1 in order, read by `workers` processes (0: here)."""
    return DataLoader(
        batches, batch_size=None, sampler=range(start, stop), num_workers=workers, pin_memory=pin,
        worker_init_fn=ignore_signals,
    )  # fmt: skip


def ignore_signals(worker: int) -> None:
    """Data workers go on when a run is asked to stop: it saves first, and then ends them."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
