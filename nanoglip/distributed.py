"""Several ranks: joining torchrun's, and sharing gradients (DDP) or the whole state (FSDP2).

Without `--shard` every rank holds the model and DDP averages the gradients. With it FSDP2 shards
weights, gradients and optimizer block by block, and gathers a block only while it computes: for
towers that one device cannot hold.
"""

import contextlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import timedelta
from time import sleep
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _get_default_store
from torch.nn.parallel import DistributedDataParallel

from glip import InputError
from nanoglip import cli
from nanoglip.machine import Device, resolve

T = TypeVar("T")
LIMIT = timedelta(minutes=30)  # of waiting for one another, but for rank_0_alone()


@contextlib.contextmanager
def processes(device: str, precision: str) -> Iterator[tuple[int, int, Device]]:
    """(rank, world, device with precision), after joining torchrun's ranks if there are any."""
    rank, local, world = cli.place()
    on = resolve(device, precision)
    if on.device.type == "cuda":
        there = torch.cuda.device_count()
        if local >= there:
            told = f"{cli.counted(there, 'GPU')} here"
            raise InputError(f"{told}: give torchrun --nproc_per_node {there} at most")
        on = replace(on, device=torch.device("cuda", local))
        torch.cuda.set_device(on.device)
    if world > 1:
        backend = "nccl" if on.device.type == "cuda" else "gloo"
        store = next(dist.rendezvous("env://", timeout=LIMIT))[0]
        # torchrun keeps its store when it restarts a run: without a name of their own the ranks
        # would find the addresses of the run before, and wait for processes that are gone.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
        store = dist.PrefixStore(f"attempt{attempt}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=LIMIT)
    leave = world > 1  # not after an error, so that the error is reported before the others fail
    try:
        yield rank, world, on
    except BaseException as error:
        leave = leave and isinstance(error, cli.Stopped)
        raise
    finally:
        if leave:
            dist.destroy_process_group()


@contextlib.contextmanager
def rank_0_alone(rank: int, world: int) -> Iterator[None]:
    """A block that no rank leaves before rank 0, however long rank 0 works in it; all enter it.

    In a collective they would give up after LIMIT. So they look for a key in the store, one of its
    own for every block: a run that torchrun restarts finds the keys of the run before.
    """
    if world == 1:
        yield
        return
    key, store = [secrets.token_hex(8)], _get_default_store()
    dist.broadcast_object_list(key)
    try:
        yield
    finally:
        if rank == 0:
            store.set(key[0], "")
    while rank and not store.check(key):
        sleep(0.05)
    dist.barrier()


def on_rank_0(rank: int, world: int, work: Callable[[], T]) -> T | None:
    """The result of `work` on rank 0, None on the others; all ranks raise its InputError."""
    found, problem = None, [None]
    with rank_0_alone(rank, world):
        if rank == 0:
            try:
                found = work()
            except InputError as error:
                problem = [str(error)]
    if world > 1:
        dist.broadcast_object_list(problem)
    if problem[0]:
        raise InputError(problem[0])
    return found


def wrap(
    network: nn.Module, world: int, device: torch.device, shard: bool, static_graph: bool
) -> nn.Module:
    """The network as ranks share it: in DDP, or with `shard` in FSDP2."""
    if shard:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (world,))
        scalars = {p for p in network.parameters() if not p.ndim}  # cannot be divided
        for tower in (network.visual, network):
            for block in tower.transformer.resblocks:
                fully_shard(block, mesh=mesh)
        return fully_shard(network, mesh=mesh, ignored_params=scalars)
    if world > 1:
        network = DistributedDataParallel(
            network, static_graph=static_graph, gradient_as_bucket_view=True
        )
        if device.type == "cpu":
            # After its first step DDP rebuilds its buckets, and in another bucket the processes'
            # gradients are summed in another order: the first step after a resume would differ in
            # the last bits. So the buckets are rebuilt before the first step, which happens once.
            network.reducer._push_all_rebuilt_params()
            network.reducer._rebuild_buckets()
    return network


def prefetch(batches: Iterable, device: torch.device) -> Iterator:
    """Batches on a device; each is copied while the one before is used."""
    streams = torch.get_device_module(device)
    if not hasattr(streams, "Stream"):  # no such thing on MPS
        yield from (batch.to_device(device) for batch in batches)
        return
    side, waiting = streams.Stream(), None
    for batch in batches:
        with streams.stream(side):
            coming = batch.to_device(device), side.record_event()
        if waiting:
            yield wait_for_copy(*waiting, streams.current_stream())
        waiting = coming
    if waiting:
        yield wait_for_copy(*waiting, streams.current_stream())


def wait_for_copy(batch: tuple, copied: object, stream: object) -> tuple:
    """The batch; the stream waits for its asynchronous copy and keeps it until it was used."""
    if copied is not None:  # a CPU's streams have no events
        stream.wait_event(copied)
    for x in batch:
        if isinstance(x, Tensor) and not x.is_cpu:
            x.record_stream(stream)
    return batch


@contextlib.contextmanager
def synchronise(network: nn.Module, wanted: bool) -> Iterator[None]:
    """All-reduce the gradients of a backward pass, or keep them to accumulate more."""
    if isinstance(network, DistributedDataParallel) and not wanted:
        with network.no_sync():
            yield
        return
    if hasattr(network, "set_requires_gradient_sync"):
        network.set_requires_gradient_sync(wanted)
    yield


def is_sharded(x: object) -> bool:
    """Whether it is a DTensor, whose import takes a second."""
    return hasattr(x, "full_tensor")


def share_scalars(network: nn.Module) -> None:
    """Average the gradients that FSDP2 does not."""
    for p in network.parameters():
        if p.grad is not None and not is_sharded(p):
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()


def local_shards(tensors: list[Tensor]) -> list[Tensor]:
    """This rank's shard of each tensor."""
    return [t.to_local() if is_sharded(t) else t for t in tensors]


def total_norm(grads: list[Tensor]) -> Tensor:
    """Norm of all gradients together, sharded or not."""
    shares = [g for g in grads if is_sharded(g)]
    if not shares:
        return torch.nn.utils.get_total_norm(grads)
    alone = [g for g in grads if not is_sharded(g)]
    norms = [torch.nn.utils.get_total_norm(shares).full_tensor()]
    return torch.stack([*norms, *(g.norm() for g in alone)]).norm()


def gather_full(tree: object) -> object:
    """Dicts and lists with every sharded tensor gathered; all ranks call it together."""
    if is_sharded(tree):
        return tree.full_tensor().cpu()
    if isinstance(tree, dict):
        return {key: gather_full(value) for key, value in tree.items()}
    return [gather_full(value) for value in tree] if isinstance(tree, list) else tree


def shard_like(state: dict, parameters: list[nn.Parameter]) -> dict:
    """An optimizer's state with each tensor sharded like its parameter: gather_full's inverse."""
    from torch.distributed.tensor import distribute_tensor

    for place, p in enumerate(parameters):
        found = state["state"].get(place, {})
        for key, value in found.items():
            if is_sharded(p) and isinstance(value, Tensor) and value.shape == p.shape:
                value = value.to(p.device)
                found[key] = distribute_tensor(value, p.device_mesh, p.placements)
    return state
