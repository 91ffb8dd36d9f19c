"""A pretended cuda:0 on a CPU: torch's FakeTensorMode, whose tensors carry their values along."""

import contextlib
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader

from nanoglip import distributed
from nanoglip.sources import order
from tools import finetune

CUDA, CPU, META = torch.device("cuda", 0), torch.device("cpu"), torch.device("meta")
aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}


def held(x):
    """The CPU's twin of a fake tensor or of a device; anything else as it is."""
    if isinstance(x, FakeTensor):
        return x.real_tensor
    return CPU if isinstance(x, torch.device) else x


def is_tensor(x):
    return isinstance(x, torch.Tensor)


def kind(x):
    """What torch's checks of an argument go by."""
    return (type(x), x.shape, x.stride(), x.dtype) if is_tensor(x) else (type(x), x)


class FakeGPU(FakeTensorMode):
    """Tensors on the CPU are real. Those on cuda:0 are fake, so that torch checks devices and
    shapes; each has a twin on the CPU, on which the same operations run: what is read of it is
    what a GPU would give, but for rounding.

    `waits` lists what would have made the host wait for a GPU.
    """

    avoid_device_init = True

    def __init__(self, processes=False):
        super().__init__(allow_non_fake_inputs=True)
        self.waits, self.pinned, self.inside, self.processes = [], {}, False, processes
        self.right = set()  # what was called, and with which kinds of arguments

    def __deepcopy__(self, memo):  # with a tensor's attributes
        return self

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if self.inside:  # of an operation that torch takes apart
            return super().__torch_dispatch__(func, types, args, kwargs)
        if func is torch.ops.prim.device.default:  # asked by C++ alone: autograd wants no stream
            return META
        if func._can_decompose():  # under inference_mode such operations arrive whole
            with self:
                return func.decompose(*args, **kwargs)
        if kwargs.get("device") == META:  # which C++ took from this answer
            kwargs["device"] = CUDA
        flat = tree_leaves((args, kwargs))
        given, target = [x for x in flat if isinstance(x, FakeTensor)], kwargs.get("device")
        if not given and (target is None or torch.device(target).type != "cuda"):
            return func(*args, **kwargs)
        twins, named = tree_map(held, args), tree_map(held, kwargs)
        self.note(func, args, kwargs, flat)
        if func in READS or (target is not None and torch.device(target).type == "cpu"):
            return func(*twins, **named)
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            return func(*twins, **named)
        alike, found = (func, *kwargs, *map(kind, flat)), None
        shares = any(result.alias_info for result in func._schema.returns)
        again = torch.Tag.inplace_view not in func.tags
        if shares and (self.processes or torch.is_inference_mode_enabled()):
            again = False  # DDP looks at the storage of views, inference mode at their versions
        if not again or alike not in self.right:  # else torch found nothing wrong with one alike
            self.inside = True
            try:
                found = super().__torch_dispatch__(func, types, args, kwargs)
                if again:
                    self.right.add(alike)
            except (DynamicOutputShapeException, DataDependentOutputException):
                self.waits.append(f"{func}: its shape depends on values")
            finally:
                self.inside = False
        known = {id(x.real_tensor): x for x in given}
        real = func(*twins, **named)
        if found is None:
            return tree_map(lambda x: self.made(x, known) if is_tensor(x) else x, real)
        fakes, reals = tree_leaves(found), tree_leaves(real)
        for fake, twin in zip(fakes, reals, strict=True):
            if isinstance(fake, FakeTensor) and id(twin) not in known:
                same = fake.shape == twin.shape and fake.dtype == twin.dtype
                assert same or func is aten.log_sigmoid_forward.default  # a CPU's keeps more
                fake.real_tensor = twin
        return found

    def made(self, real, known):
        if id(real) in known:
            return known[id(real)]
        shape = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device="meta")
        return FakeTensor(self, shape, CUDA, real_tensor=real)

    def note(self, func, args, kwargs, flat):
        """List it, if the host would wait."""
        host = [x for x in flat if is_tensor(x) and not isinstance(x, FakeTensor)]
        if func in READS:
            self.waits.append(f"{func}: a value is read")
        elif func in (aten._to_copy.default, aten.copy_.default):
            fast = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            pinned = all(x.untyped_storage().data_ptr() in self.pinned for x in host)
            away = bool(host) or (kwargs.get("device") or CUDA).type == "cpu"
            if away and not (fast and pinned):
                self.waits.append(f"{func}: a copy between host and device")
        elif any(x.ndim for x in host):
            self.waits.append(f"{func}: a tensor of the host is an index")
        index = args[1] if func.overloadpacket in (aten.index_put, aten.index_put_) else []
        if any(is_tensor(x) and x.dtype == torch.bool for x in index):
            self.waits.append(f"{func}: a boolean index")

    def pin(self, x, device=None):
        copy = x.clone()
        self.pinned[copy.untyped_storage().data_ptr()] = copy
        return copy


class Shared(DistributedDataParallel):
    """torch's fake process group gives DDP nothing to wait for; so a bucket is its own sum."""

    def __init__(self, *words, **how):
        super().__init__(*words, **how)
        self.register_comm_hook(None, self.summed)

    @staticmethod
    def summed(state, bucket):
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done


class Stream:
    """Neither order nor overlap is checked."""

    def __init__(self, device=None):
        self.record_event = self.wait_event = lambda event=None: None


class Event:
    """A moment in a GPU's work; as there, its time is refused until the host has waited for it."""

    def __init__(self, waits, enable_timing=False):
        self.waits, self.timed, self.place = waits, enable_timing, None

    def record(self):
        self.place = len(self.waits)

    def elapsed_time(self, end):
        assert self.timed and end.timed and self.place <= end.place < len(self.waits)
        return 0.0


class Loader(DataLoader):
    """What it brings is pinned, if that is asked for, as the mode understands it."""

    def __init__(self, *words, pin_memory, **how):
        super().__init__(*words, **how)
        self.pinned = pin_memory

    def __iter__(self):
        for batch in super().__iter__():
            yield tree_map(lambda x: x.pin_memory() if self.pinned and is_tensor(x) else x, batch)


@contextlib.contextmanager
def fake_gpu(world=1):
    """A machine whose GPUs are fake; with `world` above 1 this is the first of so many processes.

    Yields the mode, with its list of waits.
    """
    mode, save, load, generator = FakeGPU(world > 1), torch.save, torch.load, torch.Generator
    join = dist.init_process_group

    def saved(content, file, **how):
        save(tree_map(lambda x: held(x).clone() if is_tensor(x) else x, content), file, **how)

    def loaded(*words, **how):
        with unset_fake_temporarily():
            return load(*words, **how)

    def left():
        if dist.is_initialized():  # after an error a run leaves it so
            dist.destroy_process_group()

    def joined(backend, **how):
        assert backend == "nccl"
        left()
        join("fake", store=FakeStore(), rank=0, world_size=world)

    replaced = {
        torch.cuda: {
            "is_available": lambda: True, "device_count": lambda: 8, "set_device": lambda d: None,
            "get_device_name": lambda d=None: "fake", "is_bf16_supported": lambda **how: True,
            "current_device": lambda: 0, "get_device_capability": lambda d=None: (9, 0),
            "Event": partial(Event, mode.waits),
            "Stream": Stream, "current_stream": Stream, "stream": contextlib.nullcontext,
            "is_current_stream_capturing": lambda: False,
            "get_device_properties": lambda d: SimpleNamespace(total_memory=80 * 2**30),
        },
        torch.Tensor: {"record_stream": lambda x, s: None, "pin_memory": lambda x: mode.pin(x)},
        FakeTensor: {"is_cuda": property(lambda x: True), "is_meta": property(lambda x: False)},
        torch: {"save": saved, "load": loaded, "Generator": lambda device=None: generator()},
        torch.utils: {"weakref": SimpleNamespace(getweakrefs=lambda x: [])},  # the mode has some
        order: {"DataLoader": Loader}, finetune: {"DataLoader": Loader},
        distributed: {"DistributedDataParallel": Shared},
        dist: {
            "init_process_group": joined, "broadcast_object_list": lambda found: None,
            "rendezvous": lambda *words, **how: iter([(FakeStore(), 0, world)]),
            "all_gather_object": lambda found, own: found.__setitem__(slice(None), [own] * world),
        },
    }  # fmt: skip
    many = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "RANK": 0, "LOCAL_RANK": 0,
            "MASTER_ADDR": "localhost", "MASTER_PORT": 1}  # fmt: skip
    many = {name: str(value) for name, value in many.items() if world > 1}
    with contextlib.ExitStack() as stack:
        for owner, names in replaced.items():
            for name, value in names.items():
                stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(mock.patch.dict("os.environ", many))
        stack.callback(left)
        stack.enter_context(mode)
        yield mode
