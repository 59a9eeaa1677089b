"""torch.distributed, in one place: process group, FSDP2, weights from and to Hugging Face folders, and their
handoff to the sampler.

One path for every world size: without torchrun the process group has one rank, and FSDP2 runs all the same.
Gradients are *summed* over ranks, never averaged: every loss divides by a global count, so ranks may hold
different numbers of tokens. No process ever holds a whole model but the sampler's.
"""

import atexit
import itertools
import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from lib.options import UserError
from lib.stop import Stopped, Watch
from lib.weights import check_finite, plan_files, write_file, write_index
from model import Qwen2, build, check_tensors, read_config, write_config
from replica import tp_dim, tp_slice


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    timeout: timedelta = timedelta(minutes=30)  # of a collective
    stopping: list[int] = field(default_factory=list)  # signals that tell it to, see Watch
    replicate: int = 1  # copies of the sharded weights; more than 1: HSDP

    @property
    def main(self) -> bool:
        return self.rank == 0

    def check_stop(self):
        """Raises Stopped if this rank has been told to stop; `raise_on_all_ranks` passes it on."""
        if self.stopping:
            raise Stopped(self.stopping[0])

    @cached_property
    def mesh(self) -> DeviceMesh:
        """Shard groups are consecutive ranks, so that only sums of gradients have to cross nodes."""
        shape, names = (self.replicate, self.size // self.replicate), ("replicate", "shard")
        dims = slice(0 if self.replicate > 1 else 1, 2)
        mesh = dist.init_device_mesh(self.device.type, shape[dims], mesh_dim_names=names[dims])
        for group in mesh.get_all_groups():
            dist.distributed_c10d._set_pg_timeout(self.timeout, group)
        return mesh


def restart_prefix() -> str:
    """A name of this start of the processes. torchrun keeps one store for all of its restarts, and what the
    processes before have left in it sends these to addresses where nobody answers; nor may an orphan of an
    earlier torchrun at this port join. Raises UserError where the nodes cannot know how often it was."""
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
    timeout: seconds that a collective may take. watch: is started, and World.stopping is its. Raises
    UserError.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        index, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if not torch.cuda.is_available():
            raise UserError(
                "device is cuda, but torch sees no GPU: pass --device cpu, or install a CUDA build of torch")
        if index >= gpus:
            raise UserError(
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


def shard(model: Qwen2, world: World) -> Qwen2:
    """FSDP2, a unit per layer and one for embedding, norm and head. fp32 master weights; bf16 compute and
    fp32 reduction on CUDA. A process alone on a CPU has nothing to share or to cast: it is spared FSDP's
    copies."""
    if world.size == 1 and world.device.type == "cpu":
        return model
    policy = MixedPrecisionPolicy()
    if world.device.type == "cuda":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for module in (*model.layers, model):
        fully_shard(module, mesh=world.mesh, mp_policy=policy)
        if world.size > 1:  # a sum is a mean of one, but dividing by 1 copies the gradient
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    # Forward: gather a layer before the one in front of it is launched, not after, or a host that is not
    # ahead of its GPU leaves the network idle. Backward: FSDP's default does the same.
    for module, following in zip((model, *model.layers), model.layers):
        module.set_modules_to_forward_prefetch([following])
    return model


def reshard(model: Qwen2):
    """Frees embedding and head, which FSDP keeps whole after a forward without a backward."""
    if isinstance(model, FSDPModule):
        model.reshard()


def own(x: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a parameter, a gradient or a moment."""
    return x.to_local() if isinstance(x, DTensor) else x


def entire(x: torch.Tensor) -> torch.Tensor:
    """All rows, from all ranks."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def shard_of(p: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """This rank's rows of a parameter, the first one's number, and the rows of a full shard: FSDP cuts as
    torch.chunk does, so that the last ranks may have fewer rows, or none."""
    if not isinstance(p, DTensor):
        return p.detach(), 0, len(p)
    mesh = p.device_mesh["shard"]
    rows = -(-len(p) // mesh.size())
    return p.detach().to_local(), min(len(p), rows * mesh.get_local_rank()), rows


def load_sharded(path: str | Path, world: World, dtype: torch.dtype = torch.float32,
                 scalar_head: bool = False) -> Qwen2:
    """A Hugging Face checkpoint as a sharded model. Each rank reads its own rows and no others. Raises
    UserError.

    scalar_head: of a policy, make a RewardModel; its head starts as N(0, 1 / (C + 1)) (arXiv 2009.01325).
    """
    config = read_config(path)
    files = check_tensors(config, path)
    with torch.device("meta"):
        model = build(replace(config, scalar_head=config.scalar_head or scalar_head)).to(dtype)
    shard(model, world).to_empty(device=world.device)
    with raise_on_all_ranks(world):
        for name, p in model.named_parameters():
            local, first, _ = shard_of(p)
            if name == "score.weight" and not config.scalar_head:
                if world.main:
                    print(f"{path} has no scalar head: a new one starts at random", flush=True)
                whole = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
                local.copy_(whole[first:first + len(local)] * (p.shape[1] + 1)**-0.5)
            elif len(local):  # opened for each: what was read of a mapped file is resident until it is closed
                with safe_open(files[name], framework="pt") as f:
                    local.copy_(f.get_slice(name)[first:first + len(local)])
                check_finite(local, name, files[name])
    return model


def save_sharded(model: Qwen2, path: str | Path, world: World, dtype: torch.dtype = torch.float32,
                 max_shard_bytes: int = 5 * 2**30):
    """Writes a Hugging Face folder, as model.save does. The ranks take the files in turn, each holds the one
    that it writes and a tensor beside it."""
    files, parameters = plan_files(model, dtype.itemsize, max_shard_bytes), dict(model.named_parameters())
    for i, (file, names) in enumerate(files.items()):
        tensors = {}
        for name in names:
            tensor = entire(parameters[name].detach().to(dtype))
            if i % world.size == world.rank:
                tensors[name] = tensor.cpu()
        if tensors:
            write_file(tensors, Path(path) / file)
    dist.barrier()
    if world.main:
        write_index(model, path, dtype, files)
        write_config(model.config, path, dtype)
    dist.barrier()


def offload_(optimizer: torch.optim.Optimizer):
    """AdamW's moments wait for the next step in pinned host memory. They alone: weights and gradients, which
    CPUOffloadPolicy moves too, would cross the bus for every micro-batch; moments do so once a step, when no
    activations need their room."""
    moments, host = ("exp_avg", "exp_avg_sq"), {}

    def fetch(*_):
        for p, state in optimizer.state.items():
            state |= {key: state[key].to(p.device, non_blocking=True) for key in moments}

    def stow(*_):
        for p, state in optimizer.state.items():
            for key in moments:
                if (p, key) not in host:
                    host[p, key] = torch.empty_like(state[key], device="cpu", pin_memory=p.is_cuda)
                state[key] = host[p, key].copy_(state[key], non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # a checkpoint reads them next

    optimizer.register_step_pre_hook(fetch)
    optimizer.register_step_post_hook(stow)
    stow()


class Offloaded:
    """As a context: the weights of a frozen model are there. Outside they wait in pinned host memory."""

    def __init__(self, model: Qwen2):
        self.shards = [shard_of(p)[0] for p in model.parameters()]
        self.host = [torch.empty_like(x, device="cpu", pin_memory=x.is_cuda).copy_(x) for x in self.shards]
        self.sizes = [x.untyped_storage().nbytes() for x in self.shards]
        self.__exit__()

    def __enter__(self):
        for x, host, size in zip(self.shards, self.host, self.sizes):
            x.untyped_storage().resize_(size)
            x.copy_(host, non_blocking=True)

    def __exit__(self, *error):
        for x in self.shards:
            x.untyped_storage().resize_(0)


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


def gather_rows(x: torch.Tensor, world: World) -> torch.Tensor:
    """The rows of every rank's CPU tensor, in rank order, on every rank. Ranks may have different numbers of
    rows."""
    counts = gather(len(x), world)
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[:len(x)] = x
    everyone = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(everyone, padded)
    return torch.cat([rows[:n] for rows, n in zip(everyone, counts)])


def gather_to_main(value, world: World) -> list:
    """Every rank's Python object, in rank order, on the main rank; an empty list elsewhere."""
    out = [None] * world.size if world.main else None
    dist.gather_object(value, out)
    return out or []


@contextmanager
def raise_on_all_ranks(world: World) -> Iterator[None]:
    """A UserError, OSError or Stopped that the body raises on one rank is raised on all, so that none waits
    for another; Stopped only where there is no other."""
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
    """`raise_on_all_ranks` for a body that may last longer on some ranks than a collective may take.

    Yields a function that the body calls often. Every 5 seconds it meets the other ranks in a collective,
    where a rank that is done waits for the rest, and raises Stopped on all ranks if one has been told to stop
    or has raised. group: ranks whose calls are in step with each other (a tensor-parallel sampler's); they
    decide together when to meet.
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
    """Raises Stopped on all ranks if one of them has been told to stop."""
    stop = torch.tensor(max(world.stopping, default=0))  # on the CPU: by gloo, so that no GPU waits for it
    dist.all_reduce(stop, dist.ReduceOp.MAX)
    if stop:
        raise Stopped(stop.item())


def peer_failure(e: BaseException) -> str:
    """What to say of a collective that has waited too long or has lost a rank; empty for any other error."""
    if not isinstance(e, dist.DistError) and not (isinstance(e, RuntimeError) and "gloo/" in str(e)):
        return ""
    reason = re.sub(r"^\[.*?\] ", "", str(e).splitlines()[0]).split(". ")[0]
    return f"has lost the others ({reason}): see what they said"


def clip_grad_(model: Qwen2, max_norm: float) -> float:
    """Scales the gradient to a global norm of at most `max_norm`; returns the norm before."""
    grads = [own(p.grad) for p in model.parameters() if p.grad is not None]
    mesh = getattr(next(model.parameters()), "device_mesh", None)
    replicas = mesh.size() // mesh["shard"].size() if mesh else 1
    pieces = (x for g in grads for x in g.flatten().split(2**22))  # in fp64 the whole is twice its size
    square = torch.stack([x.double().square().sum() for x in pieces]).sum()
    dist.all_reduce(square)  # over replicas too, so that all have the same bits
    norm = (square / replicas).sqrt().item()
    if norm > max_norm:
        for g in grads:
            g.mul_(max_norm / norm)
    return norm


def warmup_cosine(step: int, steps: int, warmup: int, peak: float) -> float:
    """Learning rate of a step, counted from 0: linear warm-up, then cosine decay to 5 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


# ---------------------------------------------------------------------- handoff


@dataclass(frozen=True)
class Piece:
    """Some columns of a parameter as this rank's shard has them; a bias is a column."""

    name: str
    local: torch.Tensor
    first: tuple[int, int]  # row and column of its corner in the whole
    rows: int  # of a full shard
    whole_rows: int


def buckets(model: Qwen2) -> Iterator[list[Piece]]:
    """All parameters in order, in buckets of half a layer or a quarter of the embedding, because a gathered
    one exists up to three times (inside gloo, by rank, by row); what is larger goes by columns."""
    limit = max(2 * sum(p.numel() for p in model.layers[0].parameters()), model.head_weight.numel()) // 4
    bucket, size = [], 0
    for name, p in model.named_parameters():
        local, row, rows = shard_of(p)
        local, column = local.view(len(local), p.numel() // len(p)), 0
        for part in local.split(max(1, limit // len(p)), dim=1):
            width = part.shape[1]
            if bucket and size + width * len(p) > limit:
                yield bucket
                bucket, size = [], 0
            bucket.append(Piece(name, part, (row, column), rows, len(p)))
            column, size = column + width, size + width * len(p)
    yield bucket


@torch.no_grad()
def publish(trainer: Qwen2, sampler: Qwen2) -> int:
    """Copies the trainer's sharded weights into the sampler's replica, or its tensor-parallel slice of one:
    cast, then gathered inside the shard group, half a layer at a time. Returns the fingerprint of both.

    Takes less memory than max(two layers, one embedding matrix) in the sampler's dtype. Raises UserError
    on all ranks if the weights of one are not what was sent.
    """
    reshard(trainer)
    head, target = sampler.head_weight, dict(sampler.named_parameters())
    mesh = trainer.head_weight.device_mesh["shard"] if isinstance(trainer, FSDPModule) else None
    sent, received = ({name: head.new_zeros((), dtype=torch.int64) for name in target} for _ in range(2))
    for bucket in buckets(trainer):
        sizes = [piece.rows * piece.local.shape[1] for piece in bucket]
        mine = head.new_empty(sum(sizes))
        for piece, part in zip(bucket, mine.split(sizes)):
            part = part.view(piece.rows, -1)[:len(piece.local)].copy_(piece.local)
            sent[piece.name] += bits(part, *piece.first)
        everyone = DTensor.from_local(mine, mesh, [Shard(0)]).full_tensor() if mesh else mine
        for piece, part in zip(bucket, everyone.view(-1, len(mine)).split(sizes, dim=1)):
            width, column = piece.local.shape[1], piece.first[1]
            whole, to = part.reshape(-1, width)[:piece.whole_rows], target[piece.name]
            to.view(len(to), -1)[:, column:column + width].copy_(
                tp_slice(piece.name, whole, sampler.tp_rank, sampler.tp))
    for name, p in target.items():
        part, dim = p.view(len(p), -1), tp_dim(name)
        if dim is not None or sampler.tp_rank == 0:  # what every rank of a tp group has counts once
            corner = [sampler.tp_rank * part.shape[i] if i == dim else 0 for i in (0, 1)]
            received[name] = bits(part, *corner)
    return agreement(sent, received, mesh and mesh.get_group(), sampler.group)


def bits(x_RC: torch.Tensor, row: int, column: int) -> torch.Tensor:
    """The bit patterns of a part of a matrix, each times odd numbers of its row and its column, summed mod
    2^64: the sums of parts add up to that of the whole, however it is cut."""
    x_RC = x_RC.view({2: torch.int16, 4: torch.int32}[x_RC.element_size()])
    odd_R, odd_C = (2 * torch.arange(first, first + n, device=x_RC.device) + 1
                    for first, n in zip((row, column), x_RC.shape))
    room = odd_C.new_empty(max(1, 2**(22 if x_RC.is_cuda else 16) // len(odd_C)), len(odd_C))
    parts = [room[:len(part)].copy_(part).mul_(odd_C).sum(1) for part in x_RC.split(len(room))]
    return (torch.cat(parts) * odd_R).sum()


def agreement(sent: dict[str, torch.Tensor], received: dict[str, torch.Tensor], shard_group, tp_group) -> int:
    """One number for the weights, the same for any number of ranks; raises UserError on all if some rank's
    disagree. 53 bits, which every reader of JSON keeps."""
    sums = []
    for parts, group in ((sent, shard_group), (received, tp_group)):
        sum_P = torch.stack(list(parts.values()))
        if group is not None:
            dist.all_reduce(sum_P, group=group)
        sums.append(sum_P.tolist())
    mine = sum((2 * i + 1) * number for i, number in enumerate(sums[0])) % 2**53
    differ = [name for name, a, b in zip(sent, *sums) if a != b]
    everyone = gather((mine, differ), None, dist.group.WORLD)
    for rank, (number, names) in enumerate(everyone):
        if names or number != everyone[0][0]:
            what = f"the sampler's {names[0]} is not the trainer's" if names else "weights are not rank 0's"
            raise UserError(f"publish: on rank {rank} {what}. A machine or a change of the code is at "
                            "fault; the same command goes on from the last checkpoint")
    return mine
