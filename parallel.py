"""torch.distributed, in one place: process group, FSDP2, the handoff of weights to the sampler, and
checkpoints.

One path for every world size: without torchrun the process group has one rank, and FSDP2 and DCP run all the
same. Gradients are *summed* over ranks, never averaged: every loss divides by a global count, so ranks may
hold different numbers of tokens.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from model import Qwen2
from replica import restore_, tp_slice


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0


class SetupError(ValueError):
    """Processes or devices that torchrun was asked for and that are not there."""


def setup(device: str = "auto") -> World:
    """Joins the process group that torchrun describes in the environment, or makes one of a single rank.

    device: "cpu", "cuda", or "auto" for CUDA where there is one. NCCL on CUDA, gloo on CPU. Raises
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
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        try:
            if "RANK" in os.environ:
                dist.init_process_group(backend)
            else:
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        except (dist.DistError, ValueError) as e:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise SetupError(f"cannot join the process group at {address} ({str(e).splitlines()[0]}): choose "
                             "another --master_port, or let torchrun do it with --standalone") from None
    return World(dist.get_rank(), dist.get_world_size(), local)


def close():
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(model: Qwen2, world: World) -> Qwen2:
    """FSDP2, a unit per layer and one for embedding, norm and head. fp32 master weights; bf16 compute and
    fp32 reduction on CUDA."""
    mesh = dist.init_device_mesh(world.device.type, (world.size, ))
    policy = MixedPrecisionPolicy()
    if world.device.type == "cuda":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return model


def tp_group(tp: int):
    """The process group of the ranks that share this rank's sampler: tp consecutive ones, so that a node
    holds them all. None for 1."""
    return dist.new_subgroups(tp)[0] if tp > 1 else None


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
    """An exception of this kind that the body raises on some rank is raised on all, so that none waits for
    another."""
    error = None
    try:
        yield
    except kind as e:
        error = e
    if first := next((e for e in gather(error, world) if e), None):
        raise first


def clip_grad_(model: Qwen2, max_norm: float) -> float:
    """Scales the gradient to a global norm of at most `max_norm`; returns the norm before."""
    grads = [p.grad.to_local() for p in model.parameters() if p.grad is not None]
    pieces = (x for g in grads for x in g.flatten().split(2**22))  # in fp64 the whole is twice its size
    square = torch.stack([x.double().square().sum() for x in pieces]).sum()
    dist.all_reduce(square)
    norm = square.sqrt().item()
    if norm > max_norm:
        for g in grads:
            g.mul_(max_norm / norm)
    return norm


@torch.no_grad()
def publish(trainer: Qwen2, sampler: Qwen2):
    """Copies the trainer's sharded weights into the sampler's replica, or its tensor-parallel slice of one, a
    parameter at a time, cast before it is gathered."""
    restore_(sampler)
    target = dict(sampler.named_parameters())
    for name, p in trainer.named_parameters():
        full = p.detach().to(target[name].dtype)
        full = full.full_tensor() if isinstance(full, DTensor) else full
        target[name].copy_(tp_slice(name, full, sampler.tp_rank, sampler.tp))


# ---------------------------------------------------------------------- checkpoints


class BadCheckpoint(ValueError):
    """A checkpoint of a run that fails its manifest; the message names the file."""


def tensors_of(model: Qwen2, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """Weights and AdamW's moments by parameter name; moments that do not exist yet are made, so that a
    checkpoint can be read into them."""
    moments = {}
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        if not state:
            state |= {
                "step": torch.tensor(0.0, device=p.device), "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p)
            }
        moments |= {f"{name}.{key}": state[key] for key in ("exp_avg", "exp_avg_sq")}
    return {"weights": {name: p.detach() for name, p in model.named_parameters()}, "optimizer": moments}


def digest(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_durably(file: Path, text: str):
    with file.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def save_checkpoint(folder: Path, model: Qwen2, optimizer: torch.optim.Optimizer, state: dict, world: World,
                    keep: int):
    """Writes `folder`/step_NNNNNN for state["step"]: beside it first, then renamed, so that a crash leaves no
    half checkpoint.

    Each rank writes its shards as safetensors through DCP; the manifest names every file with its sha256. The
    last `keep` are kept.
    """
    final, beside = folder / f"step_{state['step']:06d}", folder / f"writing_{state['step']:06d}"
    if world.main:
        for broken_off in folder.glob("writing_*"):
            shutil.rmtree(broken_off)
        beside.mkdir(parents=True)
    dist.barrier()
    for part, tensors in tensors_of(model, optimizer).items():
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(beside / part), save_distributed=True))
    updates = next(iter(optimizer.state.values()))["step"].item()
    dist.barrier()
    if world.main:
        write_durably(beside / "state.json",
                      json.dumps(state | {"updates": updates, "torch": torch.__version__}))
        files = sorted(f for f in beside.rglob("*") if f.is_file())
        write_durably(beside / "manifest.json",
                      json.dumps({str(f.relative_to(beside)): digest(f)
                                  for f in files}, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        os.rename(beside, final)
        for old in checkpoints(folder)[keep:]:
            shutil.rmtree(old)
    dist.barrier()


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    return sorted(folder.glob("step_*"), reverse=True)


def verify_checkpoint(path: Path) -> dict:
    """Returns the state of a checkpoint whose files all match its manifest; raises BadCheckpoint for one that
    was cut or changed."""
    try:
        for name, expected in json.loads((path / "manifest.json").read_text()).items():
            if digest(path / name) != expected:
                raise BadCheckpoint(f"{path / name} does not match its checksum")
        return json.loads((path / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as e:
        raise BadCheckpoint(f"{path} is incomplete ({e})") from None


def newest_checkpoint(folder: Path) -> tuple[Path, dict] | None:
    """The newest checkpoint that is whole, and its state; warns of each newer one that is not."""
    for path in checkpoints(folder):
        try:
            return path, verify_checkpoint(path)
        except BadCheckpoint as e:
            print(f"warning: {e}; trying the checkpoint before it", file=sys.stderr, flush=True)
    return None


def load_checkpoint(path: Path, model: Qwen2, optimizer: torch.optim.Optimizer) -> dict:
    """Reads weights and optimiser state in place, whatever number of ranks wrote them; returns the state."""
    state = json.loads((path / "state.json").read_text())
    for part, tensors in tensors_of(model, optimizer).items():
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path / part)))
    for p in model.parameters():
        optimizer.state[p]["step"].fill_(state["updates"])
    return state
