"""torch.distributed in one place: the process group, sums and gathers over ranks, errors shared by all ranks.

One path for every world size: without torchrun the process group has one rank.
"""

import atexit
import itertools
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lib.options import UserError
from lib.stop import Stopped, Watch


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    timeout: timedelta = timedelta(minutes=30)  # of a collective
    stopping: list[int] = field(default_factory=list)  # signals received, see Watch
    replicate: int = 1  # copies of the sharded weights; more than 1: HSDP

    @property
    def main(self) -> bool:
        return self.rank == 0

    def check_stop(self):
        """Raises Stopped if a stop signal has arrived at this rank; `raise_on_all_ranks` raises it on all."""
        if self.stopping:
            raise Stopped(self.stopping[0])

    @cached_property
    def mesh(self) -> DeviceMesh:
        """Device mesh of FSDP2. Shard groups are consecutive ranks, so only gradient sums cross nodes."""
        shape, names = (self.replicate, self.size // self.replicate), ("replicate", "shard")
        dims = slice(0 if self.replicate > 1 else 1, 2)
        mesh = dist.init_device_mesh(self.device.type, shape[dims], mesh_dim_names=names[dims])
        for group in mesh.get_all_groups():
            dist.distributed_c10d._set_pg_timeout(self.timeout, group)
        return mesh


def restart_prefix() -> str:
    """A store prefix that is unique to this start of the processes. torchrun keeps one store for all its
    restarts, whose old entries point to processes that are gone, and an orphan of an earlier torchrun on the
    same port must not join. Raises UserError where the nodes cannot agree on the number of restarts."""
    environment = os.environ.get
    several_nodes = environment("GROUP_WORLD_SIZE", "1") != "1"
    shared = environment("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared and several_nodes and environment("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise UserError("restarts on several nodes need a store of their own each time: export "
                        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun on every node, with "
                        "--rdzv_backend=c10d; or leave --max-restarts out")
    logs = os.path.dirname(os.path.dirname(environment("TORCHELASTIC_ERROR_FILE", "")))  # of this torchrun
    return "" if several_nodes else environment("TORCHELASTIC_RESTART_COUNT", "0") + logs


def setup(device: str = "auto", timeout: int = 1800, watch: Watch | None = None, replicate: int = 1) -> World:
    """Joins the process group that torchrun describes in the environment, or makes one of a single rank.

    device: "cpu", "cuda", or "auto" for CUDA where there is one. NCCL on CUDA, gloo on CPU.
    timeout: seconds that a collective may take. watch: started here, fills World.stopping. Raises UserError.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        index, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if not torch.cuda.is_available():
            raise UserError("device is cuda, but torch sees no GPU: pass --device cpu, or install a CUDA "
                            "build of torch")
        if index >= gpus:
            raise UserError(f"this node has {gpus} GPUs, but torchrun started a process for GPU {index}: "
                            "lower --nproc_per_node")
        local = torch.device("cuda", index)
        torch.cuda.set_device(local)
    else:
        local = torch.device("cpu")
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if here > 1 and os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun's own setting: share the cores
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            torch.set_num_threads(max(1, cores // here))
    limit = timedelta(seconds=timeout)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        try:
            store, rank, size = dist.HashStore(), 0, 1
            if "RANK" in os.environ:
                store, rank, size = next(dist.rendezvous("env://", timeout=limit))
                store = dist.PrefixStore(restart_prefix(), store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
            atexit.register(close)  # not where a rank of several fails: it would wait for the others
        except (dist.DistError, ValueError) as e:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise UserError(f"cannot join the process group at {address} ({str(e).splitlines()[0]}): choose "
                            "another --master_port, or let torchrun do it with --standalone") from None
        if watch:
            watch.start(store.clone(), rank, size)
    stopping = watch.stopping if watch else []
    return World(dist.get_rank(), dist.get_world_size(), local, limit, stopping, replicate)


def close():
    if dist.is_initialized():
        dist.destroy_process_group()


def total(values: dict[str, float], world: World, op=dist.ReduceOp.SUM) -> dict[str, float]:
    """Sums (or another `op`) of the named numbers over all ranks, in fp64. Every rank must pass the same
    names in the same order."""
    tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=world.device)
    dist.all_reduce(tensor, op)
    return dict(zip(values, tensor.tolist()))


def largest(values: dict[str, float], world: World) -> dict[str, float]:
    return total(values, world, dist.ReduceOp.MAX)


def gather(value, world: World, group=None) -> list:
    """Every rank's Python object, in rank order, on every rank (of a group)."""
    out = [None] * (world.size if group is None else dist.get_world_size(group))
    dist.all_gather_object(out, value, group=group)
    return out


def broadcast(value, world: World):
    """Rank 0's Python object on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def own(x: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a sharded parameter, gradient or moment."""
    return x.to_local() if isinstance(x, DTensor) else x


def gather_rows(x: torch.Tensor, world: World) -> torch.Tensor:
    """The rows of every rank's CPU tensor, in rank order, on every rank. Ranks may have different numbers of
    rows."""
    counts = gather(len(x), world)
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[:len(x)] = x
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([rows[:n] for rows, n in zip(gathered, counts)])


def gather_to_main(value, world: World) -> list:
    """Every rank's Python object, in rank order, on the main rank; an empty list elsewhere."""
    out = [None] * world.size if world.main else None
    dist.gather_object(value, out)
    return out or []


@contextmanager
def raise_on_all_ranks(world: World) -> Iterator[None]:
    """Raises a UserError, OSError or Stopped of one rank's body on all ranks, so that none waits for another
    in a collective. Other errors take precedence over Stopped."""
    error = None
    try:
        yield
    except (UserError, OSError, Stopped) as e:
        error = e
    errors = [e for e in gather(error, world) if e]
    if errors:
        raise next((e for e in errors if not isinstance(e, Stopped)), errors[0])


@contextmanager
def in_rounds(world: World, group=None) -> Iterator[Callable[[], None]]:
    """`raise_on_all_ranks` for a body whose duration may differ between ranks by more than the timeout of a
    collective.

    Yields a function that the body must call often. Every 5 seconds it runs a collective with the other
    ranks, in which ranks that are done wait for the rest, and raises Stopped on all ranks if one has received
    a signal or raised an error. group: ranks whose calls are in lockstep (a tensor-parallel sampler's); they
    decide together when to run the collective.
    """
    period = min(5.0, world.timeout.total_seconds() / 4)
    due, over, error, calls = time.monotonic() + period, False, None, itertools.count(1)

    def meet(busy: bool):
        nonlocal due, over
        stop = max(world.stopping, default=signal.SIGTERM if error else 0)
        flags = torch.tensor([busy, stop])  # on the CPU: by gloo, so that no GPU waits for it
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        due, over = time.monotonic() + period, flags.tolist() != [1, 0]
        if flags[1]:
            raise Stopped(flags[1].item())

    def interrupt():
        if group is not None and next(calls) % 32:
            return
        now = torch.tensor(int(bool(world.stopping) or time.monotonic() >= due))
        if group is not None:
            dist.all_reduce(now, dist.ReduceOp.MAX, group=group)
        if now:
            meet(True)

    with raise_on_all_ranks(world):
        try:
            yield interrupt
        except (UserError, OSError, Stopped) as e:
            error = e
        while not over:
            try:
                meet(False)
            except Stopped as e:
                error = error or e
        if error:
            raise error


def check_stop(world: World):
    """Raises Stopped on all ranks if a stop signal has arrived at one of them."""
    stop = torch.tensor(max(world.stopping, default=0))  # on the CPU: by gloo, so that no GPU waits for it
    dist.all_reduce(stop, dist.ReduceOp.MAX)
    if stop:
        raise Stopped(stop.item())


def peer_failure(e: BaseException) -> str:
    """Description of a collective's error after a timeout or the loss of a rank; empty for any other
    error."""
    if not isinstance(e, dist.DistError) and not (isinstance(e, RuntimeError) and "gloo/" in str(e)):
        return ""
    reason = re.sub(r"^\[.*?\] ", "", str(e).splitlines()[0]).split(". ")[0]
    return f"has lost the others ({reason}): the cause is in the output of the rank that ended first"


ROOM = {"sample": "lower max_sequences",
        "start": "set offload_optimizer or offload_reward_model, or take more GPUs",
        "": "set recompute or offload_..., or lower micro_batch_tokens in a new run"}  # in any other phase


def leave(e: Exception, watch: Watch, phase: str, step: int):
    """Called by a rank that ends with an error: tells the other ranks, and ends the process if one line says
    it all. Returns if the caller has to raise, so that the error's own message or traceback is printed."""
    what = failure(e, phase)
    why = f"it {what}" if what else f"{type(e).__name__}: {e}".splitlines()[0]
    first = watch.end(why)
    if not first or not peer_failure(e) and why not in first:  # else another rank has printed the cause
        if not what:
            return
        print(f"error: rank {watch.rank} in phase {phase!r} of step {step} {what}; the same command goes on "
              "from the last checkpoint", file=sys.stderr, flush=True)
    os._exit(2 if isinstance(e, (UserError, OSError)) else 1)


def failure(e: Exception, phase: str) -> str:
    """Description of an out-of-memory error, or of a collective that failed; empty for any other error."""
    if isinstance(e, RuntimeError) and re.search("out ?of ?memory|can't allocate memory", repr(e), re.I):
        return f"is out of memory: {ROOM.get(phase, ROOM[''])}"
    return peer_failure(e)
