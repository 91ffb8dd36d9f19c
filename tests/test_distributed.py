"""Loss and gradients on several processes are the single process's on the joined batch."""

import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import data
import glip
import parallel
import train
from aclip import AClip
from glip import GLIP, GLIPConfig, Masker

TINY = GLIPConfig(32, 8, 24, 2, 3, 10, 20, 2, 2, context_length=9, vocab_size=50)
BATCH, SEED = 12, 3


EMBEDDINGS, FULL = "cluster with embeddings", "the full A-CLIP"
CASES = [(mask, loss, micro) for mask in [*glip.MASKS, EMBEDDINGS] for loss in glip.LOSSES
         for micro in (0, 1)]  # fmt: skip
CASES += [("gaussian", loss, micro) for loss in glip.LOSSES for micro in (2, 3, 99)]
CASES += [(FULL, "clip", 0)]
SHARDED = [("gaussian", loss, micro) for loss in glip.LOSSES for micro in (0, 2)]


def gradients(
    rank: int, world: int, case: tuple[str, str, int], shard: bool = False
) -> tuple[float, dict]:
    """Loss and gradients of this process's share of a fixed batch, in float64, by the loop's code.

    A case is a mask, a loss, and how many pairs are computed at a time.
    """
    name, loss, micro = case
    torch.manual_seed(0)
    model = GLIP(replace(TINY, siglip=loss == "siglip")).double()
    teacher = GLIP(TINY).double().visual.requires_grad_(False)
    masker = Masker(
        {EMBEDDINGS: "cluster", FULL: "attentive"}.get(name, name), 0.5, min_mask_ratio=0.25,
        threshold=0.02, teacher=teacher, embedding_weight=0.5 if name == EMBEDDINGS else 0.0,
    )  # fmt: skip
    share = BATCH // world
    rows = slice(rank * share, (rank + 1) * share)
    images = torch.from_numpy(data.noise(SEED, "images", 0, BATCH, 3 * 32 * 32)).double()
    images = images.view(BATCH, 3, 32, 32)[rows]
    tokens = torch.from_numpy(data.noise(SEED, "tokens", 0, BATCH, 9) * 49).long()
    tokens[:, 6] = 49
    noise = torch.from_numpy(data.noise(SEED, "mask", rank * share, share, 16))
    draws = torch.from_numpy(data.noise(SEED, "crops", rank * share, share, 8)).double()
    network = AClip(model).double() if name == FULL else model
    shared = parallel.spread(network, world, torch.device("cpu"), shard, not micro)
    stage = SimpleNamespace(aclip=name == FULL, masker=masker)
    config = train.TrainConfig(loss=loss, micro_batch=micro, shard=shard)
    batch = (images, tokens[rows], noise, draws, [])
    loss, _, visible = train.compute_gradients(
        shared, network, batch, stage, config, torch.device("cpu"), False
    )
    assert visible is None or 0.1 < visible.double().mean() < 0.9
    return loss.item(), parallel.whole(
        {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    )


def work(rank: int, world: int, folder: str) -> None:
    """One process: every case's loss and gradients, written by the first."""
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
    )
    torch.set_num_threads(1)
    results = {}
    for case in CASES + [(*case, "shard") for case in SHARDED if world > 1]:
        loss, grads = gradients(rank, world, case[:3], shard=len(case) > 3)
        mean = torch.tensor(loss, dtype=torch.float64)
        dist.all_reduce(mean)
        results[str(case)] = {"loss": mean.item() / world, "grads": grads}
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    # Leave without gloo's teardown, which now and then aborts a process that has done its work
    # ("terminate called without an active exception", seen with torch 2.14), once all are done.
    Path(folder, f"done{rank}").touch()
    while len(list(Path(folder).glob("done*"))) < world:
        time.sleep(0.01)
    os._exit(0)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_gradients_equal_the_single_process(world, tmp_path):
    """Of the whole batch at once, too. The loss alone would not tell: a gather without gradients
    gives the same loss."""
    mp.spawn(work, (world, str(tmp_path)), nprocs=world)
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    for case in CASES + [(*case, "shard") for case in SHARDED if world > 1]:
        loss, grads = gradients(0, 1, (*case[:2], 0))
        assert results[str(case)]["loss"] == pytest.approx(loss, rel=1e-12)
        assert results[str(case)]["grads"].keys() == grads.keys()
        for name, wanted in grads.items():
            found = results[str(case)]["grads"][name]
            assert (found - wanted).norm() <= 1e-10 * wanted.norm(), (case, name)
