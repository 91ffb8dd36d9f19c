"""Loss and gradients on several processes are the single process's on the joined batch."""

import copy
import functools
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor.debug import CommDebugMode

import train
from glip import GLIP, GLIPConfig
from nanoglip import distributed, losses, masks
from nanoglip.aclip import VIEW_DRAWS, AClip
from nanoglip.config import TrainConfig
from nanoglip.machine import Device
from nanoglip.masker import Masker
from nanoglip.noise import uniform
from nanoglip.sources.order import Batch
from tests.processes import start_server

pytestmark = pytest.mark.slow  # it trains, kills or fetches

TINY = GLIPConfig(32, 8, 24, 2, 3, 10, 20, 2, 2, context_length=9, vocab_size=50)
BATCH, SEED, CPU = 12, 3, torch.device("cpu")

EMBEDDINGS, FULL = "cluster with embeddings", "the full A-CLIP"
CASES = [(mask, loss, micro) for mask in [*masks.MASKS, EMBEDDINGS] for loss in losses.LOSSES
         for micro in (0, 2)]  # fmt: skip
CASES += [("gaussian", loss, micro) for loss in losses.LOSSES for micro in (1, 3, 99)]
SHARDED = [("gaussian", loss, micro, "shard") for loss in losses.LOSSES for micro in (0, 2)]
CASES += [(FULL, "clip", 0), *SHARDED]
FEW = [case for case in CASES if case[0] in ("gaussian", FULL) or case[1:] == ("clip", 2)]


def prepared(
    rank: int, world: int, case: tuple, dtype: torch.dtype = torch.float64
) -> tuple[torch.nn.Module, tuple]:
    """A model, and what train.compute_gradients takes for a process's share of a fixed batch.

    A case is a mask, a loss, how many pairs are computed at a time, and `shard` to divide it.
    """
    name, loss, micro, *shard = case
    torch.manual_seed(0)
    model = GLIP(replace(TINY, siglip=loss == "siglip")).to(dtype)
    teacher = GLIP(TINY).to(dtype).visual.requires_grad_(False)
    mask = {EMBEDDINGS: "cluster", FULL: "attentive"}.get(name, name)
    weight = 0.5 if name == EMBEDDINGS else 0.0
    settings = {"min_mask_ratio": 0.25, "embedding_weight": weight} if mask == "cluster" else {}
    masker = Masker(mask, 0.5, **settings)
    masker.threshold, masker.teacher = 0.02, teacher
    share = BATCH // world
    rows = slice(rank * share, (rank + 1) * share)
    images = torch.from_numpy(uniform(SEED, "images", 0, BATCH, 3 * 32 * 32)).to(dtype)
    images = images.view(BATCH, 3, 32, 32)[rows]
    tokens = torch.from_numpy(uniform(SEED, "tokens", 0, BATCH, 9) * 49).long()
    tokens[:, 6] = 49
    noise = torch.from_numpy(uniform(SEED, "mask", rank * share, share, 16))
    draws = torch.from_numpy(uniform(SEED, "crops", rank * share, share, VIEW_DRAWS + 1))
    draws = draws.to(dtype) + torch.tensor([0] * VIEW_DRAWS + [0.5])  # the last: width / height
    network = AClip(model).to(dtype) if name == FULL else model
    shared = distributed.wrap(network, world, CPU, bool(shard), not micro)
    batch, on = Batch(images, tokens[rows], noise, draws, []), Device(CPU, False)
    if name == FULL:
        step = partial(train.aclip_gradients, network, batch, masker, (0.5, 1.0), on, shared)
    else:
        def step() -> tuple:
            with masker.learning(model.visual):
                return train.compute_gradients(model, batch, masker, loss, on, micro, shared)

        if mask == "gaze":  # whose gradients are compared, too
            network.gaze = masker.looking(model.visual).to(dtype)
    return network, step


def gradients(rank: int, world: int, case: tuple) -> tuple[float, dict]:
    """Loss and gradients of a process's share of the batch, in float64, by the loop's code."""
    network, step = prepared(rank, world, case)
    loss, _, visible = step()
    if "shard" in case:
        distributed.share_scalars(network)
    assert visible is None or 0.1 < visible.double().mean() < 0.9
    return loss.item(), distributed.gather_full(
        {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    )


def trained(rank: int, world: int, micro: int, cut: int) -> dict:
    """Weights after two steps in fp32; before step `cut` (0: none) a new process takes over."""
    state = None
    for step in range(2):
        if step in (0, cut):
            network, compute = prepared(rank, world, ("gaussian", "clip", micro), torch.float32)
            optimizers = train.make_optimizers(network, TrainConfig(optimizer="adamw"))
        if state:
            network.load_state_dict(state["model"])
            optimizers[0].load_state_dict(state["optimizer"])
        compute()
        train.apply_gradients(network, optimizers, 1e-2, 0.0)
        state = {"model": network.state_dict(), "optimizer": optimizers[0].state_dict()}
        state = copy.deepcopy(state)
    return state["model"]


def exchanges(rank: int, loss: str, rows: int) -> dict[str, int]:
    """How often processes exchange something for a loss and its gradients by the features."""
    draw = torch.Generator().manual_seed(rank)
    features = [torch.randn(6, 5, generator=draw, requires_grad=True) for _ in range(2)]
    scale, bias = (torch.tensor(x, requires_grad=True) for x in (10.0, -10.0))
    with CommDebugMode() as found:
        if rows:
            losses.cached_gradients(loss, *features, scale, bias, rows)
        else:
            losses.contrastive_loss(loss, *features, scale, bias).backward()
    return {str(kind): count for kind, count in found.get_comm_counts().items()}


def work(rank: int, world: int, folder: str, cases: list[tuple]) -> None:
    """One process: all that is asked of `world` processes, written by the first."""
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
    )
    torch.set_num_threads(1)
    results = {"world": world, "cases": cases, "resumed": {}, "exchanges": {}}
    for case in cases:
        loss, grads = gradients(rank, world, case)
        mean = torch.tensor(loss, dtype=torch.float64)
        dist.all_reduce(mean)
        results[str(case)] = {"loss": mean.item() / world, "grads": grads}
    for micro in (0, 2):
        results["resumed"][micro] = [trained(rank, world, micro, cut) for cut in (0, 1)]
    for loss in losses.LOSSES:
        results["exchanges"][loss] = [exchanges(rank, loss, rows) for rows in (0, 2, 6)]
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    # Leave without gloo's teardown, which now and then aborts a process that has done its work
    # ("terminate called without an active exception", seen with torch 2.14), once all are done.
    Path(folder, f"done{rank}").touch()
    while len(list(Path(folder).glob("done*"))) < world:
        time.sleep(0.01)
    os._exit(0)


@functools.cache
def alone(mask: str, loss: str) -> tuple[float, dict]:
    """Loss and gradients of the whole batch at once, on one process."""
    return gradients(0, 1, (mask, loss, 0))


@pytest.fixture(scope="module", params=[
    (2, FEW), pytest.param((3, CASES), marks=pytest.mark.proof),
    pytest.param((4, CASES), marks=pytest.mark.proof),
], ids=lambda how: f"{how[0]} processes")  # fmt: skip
def results(request, tmp_path_factory):
    """What so many processes found."""
    start_server()
    (world, cases), folder = request.param, str(tmp_path_factory.mktemp("meeting"))
    mp.start_processes(work, (world, folder, cases), nprocs=world, start_method="forkserver")
    return torch.load(f"{folder}/results.pt", weights_only=True)


def same_as_alone(case: tuple, loss: float, grads: dict) -> None:
    """Fails unless loss and gradients are those of the whole batch at once."""
    wanted_loss, wanted_grads = alone(*case[:2])
    assert loss == pytest.approx(wanted_loss, rel=1e-12)
    assert grads.keys() == wanted_grads.keys()
    for name, wanted in wanted_grads.items():
        assert (grads[name] - wanted).norm() <= 1e-10 * wanted.norm(), (case, name)


def test_gradients_equal_the_single_process(results):
    """The loss alone would not tell: a gather without gradients gives the same loss."""
    for case in results["cases"]:
        same_as_alone(case, **results[str(case)])


@pytest.mark.parametrize("case", [
    pytest.param(case, marks=() if case in FEW else pytest.mark.proof)
    for case in CASES if case[2] and case not in SHARDED
], ids=str)  # fmt: skip
def test_parts_of_a_batch_give_the_gradients_of_the_whole(case):
    same_as_alone(case, *gradients(0, 1, case))


def test_a_resumed_run_has_the_bits_of_an_uncut_one(results):
    """On several processes, too: a step sums the gradients in one order, whether the first or not.
    """
    for uncut, resumed in results["resumed"].values():
        assert all(torch.equal(uncut[name], resumed[name]) for name in uncut)


def test_a_loss_in_parts_exchanges_as_often_as_at_once(results):
    for loss, (at_once, *parts) in results["exchanges"].items():
        assert all(found == at_once for found in parts), loss
        assert sum(at_once.values()) == (2 if loss == "clip" else 2 * results["world"])
