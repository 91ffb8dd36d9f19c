"""Loss and gradients on several processes are the single process's on the joined batch."""

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import data
import glip
from glip import GLIP, GLIPConfig

TINY = GLIPConfig(32, 8, 24, 2, 3, 10, 20, 2, 2, context_length=9, vocab_size=50)
BATCH, SEED = 12, 3


def gradients(rank: int, world: int, mask: str) -> tuple[float, dict]:
    """Loss and gradients of this process's share of a fixed batch, in float64."""
    torch.manual_seed(0)
    model = GLIP(TINY).double()
    share = BATCH // world
    rows = slice(rank * share, (rank + 1) * share)
    images = torch.from_numpy(data.noise(SEED, "images", 0, BATCH, 3 * 32 * 32)).double()
    images = images.view(BATCH, 3, 32, 32)[rows]
    tokens = torch.from_numpy(data.noise(SEED, "tokens", 0, BATCH, 9) * 49).long()
    tokens[:, 6] = 49
    noise = torch.from_numpy(data.noise(SEED, "mask", rank * share, share, 16))
    ids, visible = glip.sample_mask(mask, share, 4, 0.5, noise=noise)
    parallel = DistributedDataParallel(model) if world > 1 else model
    loss = glip.clip_loss(*parallel(images, tokens[rows], ids, visible))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def work(rank: int, world: int, folder: str) -> None:
    """One process: every mask's loss and gradients, written by the first."""
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
    )
    torch.set_num_threads(1)
    results = {}
    for mask in glip.MASKS:
        loss, grads = gradients(rank, world, mask)
        mean = torch.tensor(loss, dtype=torch.float64)
        dist.all_reduce(mean)
        results[mask] = {"loss": mean.item() / world, "grads": grads}
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    # Leave without gloo's teardown, which now and then aborts a process that has done its work
    # ("terminate called without an active exception", seen with torch 2.14), once all are done.
    Path(folder, f"done{rank}").touch()
    while len(list(Path(folder).glob("done*"))) < world:
        time.sleep(0.01)
    os._exit(0)


@pytest.mark.parametrize("world", [2, 3])
def test_gradients_equal_the_single_process(world, tmp_path):
    """The loss alone would not tell: a gather without gradients gives the same loss."""
    mp.spawn(work, (world, str(tmp_path)), nprocs=world)
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    for mask in glip.MASKS:
        loss, grads = gradients(0, 1, mask)
        assert results[mask]["loss"] == pytest.approx(loss, rel=1e-12)
        for name, wanted in grads.items():
            found = results[mask]["grads"][name]
            assert (found - wanted).norm() <= 1e-10 * wanted.norm(), (mask, name)
