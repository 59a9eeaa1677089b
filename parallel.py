"""A model over several ranks: FSDP2, weights from and to Hugging Face folders, publishing to the sampler.

Gradients are *summed* over ranks, never averaged: every loss is divided by a global count, so ranks may hold
different numbers of tokens. No process holds a whole model except the sampler's replica.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from lib.distributed import World, gather, own, raise_on_all_ranks
from lib.options import UserError
from lib.weights import check_finite, plan_files, write_file, write_index
from model import Qwen2, build, check_tensors, read_config, write_config
from replica import tp_dim, tp_slice


def shard(model: Qwen2, world: World) -> Qwen2:
    """Applies FSDP2 with one unit per layer and one for embedding, norm and head: fp32 master weights, on
    CUDA bf16 compute and fp32 reduction. A single process on a CPU is left as it is, without FSDP's
    copies."""
    if world.size == 1 and world.device.type == "cpu":
        return model
    policy = MixedPrecisionPolicy()
    if world.device.type == "cuda":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for module in (*model.layers, model):
        fully_shard(module, mesh=world.mesh, mp_policy=policy)
        if world.size > 1:  # sum; with one rank the mean is the sum, and dividing by 1 would copy
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    # Forward: start to gather a layer before the previous one is launched; otherwise the network idles while
    # the host is not ahead of the GPU. In backward FSDP does so by default.
    for module, following in zip((model, *model.layers), model.layers):
        module.set_modules_to_forward_prefetch([following])
    return model


def reshard(model: Qwen2):
    """Frees embedding and head, which FSDP keeps gathered after a forward without a backward."""
    if isinstance(model, FSDPModule):
        model.reshard()


def entire(x: torch.Tensor) -> torch.Tensor:
    """All rows, from all ranks."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def shard_of(p: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """This rank's rows of a parameter, the index of the first, and the rows of a full shard. FSDP splits like
    torch.chunk: the last ranks may have fewer rows, or none."""
    if not isinstance(p, DTensor):
        return p.detach(), 0, len(p)
    mesh = p.device_mesh["shard"]
    rows = -(-len(p) // mesh.size())
    return p.detach().to_local(), min(len(p), rows * mesh.get_local_rank()), rows


def load_sharded(path: str | Path, world: World, dtype: torch.dtype = torch.float32,
                 scalar_head: bool = False) -> Qwen2:
    """Loads a Hugging Face checkpoint as a sharded model; each rank reads only its own rows. Raises
    UserError.

    scalar_head: make a RewardModel of a policy, with a head from N(0, 1 / (C + 1)) (arXiv 2009.01325).
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
            elif len(local):  # opened for each: pages of a mapped file stay resident until it is closed
                with safe_open(files[name], framework="pt") as f:
                    local.copy_(f.get_slice(name)[first:first + len(local)])
                check_finite(local, name, files[name])
    return model


def save_sharded(model: Qwen2, path: str | Path, world: World, dtype: torch.dtype = torch.float32,
                 max_shard_bytes: int = 5 * 2**30):
    """Writes a Hugging Face folder, as model.save does. The ranks take turns in writing files; a rank holds
    the file that it writes and one more tensor."""
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


def tp_group(tp: int, timeout: timedelta | None = None):
    """The process group of the tp consecutive ranks that share a tensor-parallel sampler; None for tp 1."""
    return dist.new_subgroups(tp, timeout=timeout)[0] if tp > 1 else None


def clip_grad_(model: Qwen2, max_norm: float) -> float:
    """Scales the gradient to a global norm of at most `max_norm`; returns the norm before."""
    grads = [own(p.grad) for p in model.parameters() if p.grad is not None]
    mesh = getattr(next(model.parameters()), "device_mesh", None)
    replicas = mesh.size() // mesh["shard"].size() if mesh else 1
    pieces = (x for g in grads for x in g.flatten().split(2**22))  # fp64 doubles the size
    square = torch.stack([x.double().square().sum() for x in pieces]).sum()
    dist.all_reduce(square)  # over replicas too, so that all get the same bits
    norm = (square / replicas).sqrt().item()
    if norm > max_norm:
        for g in grads:
            g.mul_(max_norm / norm)
    return norm


def adamw(model: Qwen2, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices, and no vector."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": weight_decay},
                              {"params": vectors, "weight_decay": 0.0}], lr, betas=(0.9, 0.95), fused=True)


def step_(model: Qwen2, optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Updates the model by its gradient, clipped to a norm of 1, unless that is not finite, and clears it.
    Returns the norm before."""
    if math.isfinite(norm := clip_grad_(model, 1.0)):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad()
    return norm


# ---------------------------------------------------------------------- publish


@dataclass(frozen=True)
class Piece:
    """Some columns of this rank's shard of a parameter; a bias counts as one column."""

    name: str
    local: torch.Tensor
    first: tuple[int, int]  # row and column of its first element in the parameter
    rows: int  # of a full shard
    whole_rows: int


def buckets(model: Qwen2) -> Iterator[list[Piece]]:
    """All parameters in order, in buckets of at most half a layer or a quarter of the embedding, because a
    gathered bucket exists up to three times (inside gloo, by rank, by row). Larger ones are split by
    columns."""
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
    """Copies the trainer's sharded weights into the sampler's replica or tensor-parallel slice: cast, then
    gathered within the shard group, half a layer at a time. Returns the fingerprint of the weights.

    Needs less memory than max(two layers, one embedding matrix) in the sampler's dtype. Raises UserError on
    all ranks if a rank's weights differ from what was sent.
    """
    reshard(trainer)
    head, target = sampler.head_weight, dict(sampler.named_parameters())
    mesh = trainer.head_weight.device_mesh["shard"] if isinstance(trainer, FSDPModule) else None
    sent, received = ({name: head.new_zeros((), dtype=torch.int64) for name in target} for _ in range(2))
    for bucket in buckets(trainer):
        sizes = [piece.rows * piece.local.shape[1] for piece in bucket]
        local = head.new_empty(sum(sizes))
        for piece, part in zip(bucket, local.split(sizes)):
            part = part.view(piece.rows, -1)[:len(piece.local)].copy_(piece.local)
            sent[piece.name] += bits(part, *piece.first)
        gathered = DTensor.from_local(local, mesh, [Shard(0)]).full_tensor() if mesh else local
        for piece, part in zip(bucket, gathered.view(-1, len(local)).split(sizes, dim=1)):
            width, column = piece.local.shape[1], piece.first[1]
            whole, to = part.reshape(-1, width)[:piece.whole_rows], target[piece.name]
            to.view(len(to), -1)[:, column:column + width].copy_(
                tp_slice(piece.name, whole, sampler.tp_rank, sampler.tp))
    for name, p in target.items():
        part, dim = p.view(len(p), -1), tp_dim(name)
        if dim is not None or sampler.tp_rank == 0:  # replicated parameters count once per tp group
            corner = [sampler.tp_rank * part.shape[i] if i == dim else 0 for i in (0, 1)]
            received[name] = bits(part, *corner)
    return agreement(sent, received, mesh and mesh.get_group(), sampler.group)


def bits(x_RC: torch.Tensor, row: int, column: int) -> torch.Tensor:
    """Sum of a matrix part's bit patterns, each times odd numbers of its row and column, mod 2^64. The sums
    of parts add up to the sum of the whole matrix, however it is split."""
    x_RC = x_RC.view({2: torch.int16, 4: torch.int32}[x_RC.element_size()])
    odd_R, odd_C = (2 * torch.arange(first, first + n, device=x_RC.device) + 1
                    for first, n in zip((row, column), x_RC.shape))
    room = odd_C.new_empty(max(1, 2**(22 if x_RC.is_cuda else 16) // len(odd_C)), len(odd_C))
    parts = [room[:len(part)].copy_(part).mul_(odd_C).sum(1) for part in x_RC.split(len(room))]
    return (torch.cat(parts) * odd_R).sum()


def agreement(sent: dict[str, torch.Tensor], received: dict[str, torch.Tensor], shard_group, tp_group) -> int:
    """Fingerprint of the weights, the same for any number of ranks, in 53 bits, which JSON readers keep
    exactly. Raises UserError on all ranks if sums differ."""
    sums = []
    for parts, group in ((sent, shard_group), (received, tp_group)):
        sum_P = torch.stack(list(parts.values()))
        if group is not None:
            dist.all_reduce(sum_P, group=group)
        sums.append(sum_P.tolist())
    fingerprint = sum((2 * i + 1) * number for i, number in enumerate(sums[0])) % 2**53
    differ = [name for name, a, b in zip(sent, *sums) if a != b]
    gathered = gather((fingerprint, differ), None, dist.group.WORLD)
    for rank, (number, names) in enumerate(gathered):
        if names or number != gathered[0][0]:
            what = f"the sampler's {names[0]} is not the trainer's" if names else "weights are not rank 0's"
            raise UserError(f"publish: on rank {rank} {what}. A machine or a change of the code is at "
                            "fault; the same command goes on from the last checkpoint")
    return fingerprint
