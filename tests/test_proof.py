"""What takes too long for `make test`: `make proof`, which records it in results/bench.json."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from nanoglip import results
from nanoglip.machine import machine
from nanoglip.sources import shards
from tests.test_shards import fuzz, make_shards, memory_growth
from tests.torture import torture

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.proof


@pytest.fixture
def record():
    """Keep a proof's numbers, with the machine and the commit that they are of."""

    def keep(name, **numbers):
        where = machine(torch.device("cpu"))
        found = {**numbers, "command": "make proof", "machine": where}
        results.save_bench("proof", {**results.load("bench")["proof"], name: found})

    return keep


def test_memory_stays_flat_over_200_000_reads(tmp_path, record):
    folder = make_shards(tmp_path / "shards", 20, 100)
    shards.build(str(folder), 1)
    growth = memory_growth(folder, 200_000)
    record("memory", reads=200_000, growth=growth)
    assert growth < 0.05


def test_thirty_killed_runs(tmp_path, record):
    counts = torture(tmp_path, 30)
    record("torture", **counts)
    assert counts["runs"] == 30 and counts["kills"] > 20


def test_five_thousand_fuzzed_shards(tmp_path, record):
    found, unread = fuzz(tmp_path, 5_000)
    record("fuzz", shards=5_000, samples_found=found, samples_unreadable=unread)
    assert found > 30_000


def test_twelve_million_samples(tmp_path, record):
    """The index alone, made from synthetic scans: size, opening, memory, an order's first batch."""
    count, size, draw = 1200, 10_000, np.random.default_rng(0)
    folder = tmp_path / "cc12m"
    parts = folder / "index/parts"
    parts.mkdir(parents=True)
    prints = []
    for i in range(count):
        sizes = draw.integers(8_000, 30_000, size)
        begins = np.concatenate([[0], np.cumsum(-(-sizes // 512) + 4)])
        addresses = np.stack([begins[:-1] + 1, sizes], 1)
        # CC12M's captions have 20 words on the average, with as large a deviation.
        lengths = np.clip(draw.gamma(1.6, 26 / 1.6, size), 3, shards.LONGEST).astype("u1")
        tokens = draw.integers(0, 49_000, int(lengths.sum(dtype=np.int64)))
        np.savez(
            parts / f"{i}.npz", addresses=addresses.astype("<u4"), tokens=tokens.astype("<u2"),
            checks=draw.integers(0, 2**16, size).astype("<u2"),
            names=draw.integers(0, 2**32, size).astype("<u4"),
            lengths=lengths, skipped=np.frombuffer(b"{}", np.uint8),
        )  # fmt: skip
        with open(folder / f"{i:05}.tar", "wb") as file:
            file.truncate(int(begins[-1]) * 512)  # a hole: takes no room
        prints.append(shards.fingerprint(str(folder / f"{i:05}.tar")))
    begun = time.perf_counter()
    shards.join(folder / "index", prints, [parts / f"{i}.npz" for i in range(count)])
    joined = time.perf_counter() - begun
    bytes_of = {n: (folder / f"index/{n}.bin").stat().st_size
                for n in shards.ARRAYS}  # fmt: skip
    code = (
        "import sys, time, psutil\n"
        "from nanoglip.sources.order import make_order\n"
        "from nanoglip.sources.shards import Shards\n"
        "memory = lambda: psutil.Process().memory_info().rss / 2**20\n"
        "before, begun = memory(), time.perf_counter()\n"
        "train = Shards(sys.argv[1], 224)\n"
        "opened, after = time.perf_counter() - begun, memory()\n"
        "order = make_order(train, 1280, 0, 'pretrain')\n"
        "begun = time.perf_counter()\n"
        "ids = order.batch(order.steps_per_epoch * 3 + 4321)\n"
        "tokens = train.tokens(ids)\n"
        "done = time.perf_counter() - begun\n"
        "print(len(train), opened, after - before, done, memory() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    total, opened, grown, batch, with_batch = map(float, done.stdout.split())
    captions = (bytes_of["tokens"] + bytes_of["lengths"]) / total
    record(
        "index", samples=int(total),
        address_bytes=sum(bytes_of[n] for n in ("addresses", "checks", "names")),
        caption_bytes_per_sample=captions, join_seconds=joined, open_seconds=opened,
        open_memory_mib=grown, first_batch_seconds=batch, memory_with_a_batch_mib=with_batch,
    )  # fmt: skip
    assert total == 12e6 and captions <= 60 and opened < 5  # its checksum is looked at
    assert bytes_of["addresses"] + bytes_of["checks"] + bytes_of["names"] <= 250e6
