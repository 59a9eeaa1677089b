"""torch.distributed, in one place: process group, FSDP2, and the handoff of weights to the sampler.

One path for every world size: without torchrun the process group has one rank, and FSDP2 runs all the same.
Gradients are *summed* over ranks, never averaged: every loss divides by a global count, so ranks may hold
different numbers of tokens.
"""

import os
import re
import select
import signal
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from model import Qwen2
from replica import tp_slice


class Stopped(Exception):
    """The run was told to end, by SIGTERM at one of its ranks at least."""


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    timeout: timedelta = timedelta(minutes=30)  # of a collective
    stopping: threading.Event = field(default_factory=threading.Event)  # see Watch

    @property
    def main(self) -> bool:
        return self.rank == 0

    def heed(self):
        """Raises Stopped if this rank has been told to stop; `agreed` passes it on."""
        if self.stopping.is_set():
            raise Stopped


class SetupError(ValueError):
    """Processes or devices that torchrun was asked for and that are not there."""


class Watch:
    """Hears, in a thread of its own, what must be heard while the main thread is inside a collective: SIGTERM
    at this rank or any other, which sets `stopping`, and the end of this rank's torchrun, which ends the
    process, so that no orphan keeps a GPU."""
    def __init__(self):
        self.stopping, self.thread = threading.Event(), None

    def start(self, store: dist.Store, key: str):
        """key: of the store that all ranks share; set by the first that is told to stop."""
        self.ear, self.voice = socket.socketpair()
        self.voice.setblocking(False)
        signal.set_wakeup_fd(self.voice.fileno())  # a byte for each signal that has a handler, at once
        signal.signal(signal.SIGTERM, lambda *_: None)
        self.thread = threading.Thread(target=self.listen, args=(store, key), daemon=True)
        self.thread.start()

    def listen(self, store: dist.Store, key: str):
        parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        while True:
            heard = self.ear.recv(64) if select.select([self.ear], [], [], 1.0)[0] else b""
            if 0 in heard:
                return
            if parent and os.getppid() != parent:
                os._exit(1)
            if signal.SIGTERM in heard:
                self.stopping.set()
            try:
                if store and self.stopping.is_set():
                    store.set(key, "")
                elif store and store.check([key]):
                    self.stopping.set()
            except RuntimeError:  # whoever holds it is gone: the next collective will say so
                store = None

    def close(self):
        if self.thread:
            signal.set_wakeup_fd(-1)
            self.voice.send(b"\0")
            self.thread.join()


def attempt() -> str:
    """A name of this start of the processes. torchrun keeps one store for all of its restarts, and what the
    processes before have left in it sends these to addresses where nobody answers. Raises SetupError where
    the nodes cannot know how often it was."""
    environment = os.environ.get
    several_nodes = environment("GROUP_WORLD_SIZE", "1") != "1"
    shared = environment("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared and several_nodes and environment("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise SetupError("restarts on several nodes need a store of their own each time: export "
                         "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun on every node, with "
                         "--rdzv_backend=c10d; or leave --max-restarts out")
    return "" if several_nodes else environment("TORCHELASTIC_RESTART_COUNT", "0")


def setup(device: str = "auto", timeout: int = 1800, watch: Watch | None = None) -> World:
    """Joins the process group that torchrun describes in the environment, or makes one of a single rank.

    device: "cpu", "cuda", or "auto" for CUDA where there is one. NCCL on CUDA, gloo on CPU.
    timeout: seconds that a collective may take. watch: is started, and World.stopping is its. Raises
    SetupError.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        index, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if not torch.cuda.is_available():
            raise SetupError(
                "device is cuda, but torch sees no GPU: pass --device cpu, or install a CUDA build of torch")
        if index >= gpus:
            raise SetupError(
                f"this node has {gpus} GPUs, but torchrun started a process for GPU {index}: lower "
                "--nproc_per_node")
        local = torch.device("cuda", index)
        torch.cuda.set_device(local)
    else:
        local = torch.device("cpu")
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if here > 1 and os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun's own setting: share the cores
            # not every system says which cores are ours
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            torch.set_num_threads(max(1, cores // here))
    limit = timedelta(seconds=timeout)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        try:
            store, rank, size = dist.HashStore(), 0, 1
            if "RANK" in os.environ:
                store, rank, size = next(dist.rendezvous("env://", timeout=limit))
                store = dist.PrefixStore(attempt(), store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
        except (dist.DistError, ValueError) as e:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise SetupError(f"cannot join the process group at {address} ({str(e).splitlines()[0]}): choose "
                             "another --master_port, or let torchrun do it with --standalone") from None
        if watch:  # torchrun's store may outlive a restart: a key that only these processes know
            key = [uuid.uuid4().hex]
            dist.broadcast_object_list(key, src=0)
            watch.start(store, key[0])
    world = World(dist.get_rank(), dist.get_world_size(), local, limit)
    return replace(world, stopping=watch.stopping) if watch else world


def close():
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(model: Qwen2, world: World, replicate: int = 1) -> Qwen2:
    """FSDP2, a unit per layer and one for embedding, norm and head. fp32 master weights; bf16 compute and
    fp32 reduction on CUDA."""
    mesh = dist.init_device_mesh(world.device.type, (world.size, ))
    if replicate > 1:
        mesh = dist.init_device_mesh(world.device.type, (replicate, world.size // replicate),
                                     mesh_dim_names=("replicate", "shard"))
        for group in mesh.get_all_groups():
            dist.distributed_c10d._set_pg_timeout(world.timeout, group)
    policy = MixedPrecisionPolicy()
    if world.device.type == "cuda":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return model


def tp_group(tp: int, timeout: timedelta | None = None):
    """The process group of the ranks that share this rank's sampler: tp consecutive ones, so that a node
    holds them all. None for 1."""
    return dist.new_subgroups(tp, timeout=timeout)[0] if tp > 1 else None


def total(values: dict[str, float], world: World, op=dist.ReduceOp.SUM) -> dict[str, float]:
    """Sums (or with `op` maxima) of the named numbers over all ranks, in fp64. Every rank passes the same
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


@contextmanager
def agreed(kind: type[Exception], world: World) -> Iterator[None]:
    """An exception of this kind, or Stopped, that the body raises on some rank is raised on all, so that none
    waits for another."""
    error = None
    try:
        yield
    except (kind, Stopped) as e:
        error = e
    if first := next((e for e in gather(error, world) if e), None):
        raise first


def heed(world: World, group=None):
    """Raises Stopped on all ranks (of a group) if one of them has been told to stop."""
    told = torch.tensor(int(world.stopping.is_set()))  # on the CPU: by gloo, so that no GPU waits for it
    dist.all_reduce(told, dist.ReduceOp.MAX, group=group)
    if told:
        raise Stopped


def lost(e: BaseException) -> str:
    """What a collective says that has waited too long or has lost a rank; empty for any other exception."""
    if not isinstance(e, dist.DistError) and "gloo/" not in str(e):
        return ""
    return re.sub(r"^\[.*?\] ", "", str(e).splitlines()[0]).split(". ")[0]


def clip_grad_(model: Qwen2, max_norm: float) -> float:
    """Scales the gradient to a global norm of at most `max_norm`; returns the norm before."""
    grads = [p.grad.to_local() for p in model.parameters() if p.grad is not None]
    square = torch.stack([g.double().square().sum() for g in grads]).sum()
    mesh = next(model.parameters()).device_mesh
    dist.all_reduce(square, group=mesh.get_group(mesh.ndim - 1))  # replicas hold the same
    norm = square.sqrt().item()
    if norm > max_norm:
        for g in grads:
            g.mul_(max_norm / norm)
    return norm


@torch.no_grad()
def publish(trainer: Qwen2, sampler: Qwen2):
    """Copies the trainer's sharded weights into the sampler's replica, or its tensor-parallel slice of one, a
    parameter at a time, cast before it is gathered."""
    target = dict(sampler.named_parameters())
    for name, p in trainer.named_parameters():
        full = p.detach().to(target[name].dtype)
        full = full.full_tensor() if isinstance(full, DTensor) else full
        target[name].copy_(tp_slice(name, full, sampler.tp_rank, sampler.tp))
