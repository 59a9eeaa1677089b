"""Checkpoints of a run: safetensors through torch.distributed.checkpoint, beside a manifest of checksums."""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from model import Qwen2
from parallel import World


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


def save(folder: Path, model: Qwen2, optimizer: torch.optim.Optimizer, state: dict, world: World,
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
        for old in complete(folder)[keep:]:
            shutil.rmtree(old)
    dist.barrier()


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    return sorted(folder.glob("step_*"), reverse=True)


def verify(path: Path) -> dict:
    """Returns the state of a checkpoint whose files all match its manifest; raises BadCheckpoint for one that
    was cut or changed."""
    try:
        for name, expected in json.loads((path / "manifest.json").read_text()).items():
            if digest(path / name) != expected:
                raise BadCheckpoint(f"{path / name} does not match its checksum")
        return json.loads((path / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as e:
        raise BadCheckpoint(f"{path} is incomplete ({e})") from None


def newest(folder: Path) -> tuple[Path, dict] | None:
    """The newest checkpoint that is whole, and its state; warns of each newer one that is not."""
    for path in complete(folder):
        try:
            return path, verify(path)
        except BadCheckpoint as e:
            print(f"warning: {e}; trying the checkpoint before it", file=sys.stderr, flush=True)
    return None


def load(path: Path, model: Qwen2, optimizer: torch.optim.Optimizer) -> dict:
    """Reads weights and optimiser state in place, whatever number of ranks wrote them; returns the state."""
    state = json.loads((path / "state.json").read_text())
    for part, tensors in tensors_of(model, optimizer).items():
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path / part)))
    for p in model.parameters():
        optimizer.state[p]["step"].fill_(state["updates"])
    return state
