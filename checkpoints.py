"""Checkpoints of a run: safetensors through torch.distributed.checkpoint, and a manifest of checksums.

Weights and AdamW's moments are saved by parameter name, in as many files as there are ranks, and read by any
number of ranks. Nothing is pickled.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from lib.distributed import World, broadcast, gather, raise_on_all_ranks
from lib.files import replace
from lib.options import Field, UserError, read_json
from model import Qwen2


class BadCheckpoint(UserError):
    """A checkpoint that does not match its manifest; the message names the file."""


def tensors_of(model: Qwen2, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """Weights and AdamW's moments by parameter name. Missing moments are created, so that a checkpoint can be
    read into them."""
    moments = {}
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        if not state:
            state |= {"step": torch.tensor(0.0, device=p.device), "exp_avg": torch.zeros_like(p),
                      "exp_avg_sq": torch.zeros_like(p)}
        moments |= {f"{name}.{key}": state[key] for key in ("exp_avg", "exp_avg_sq")}
    return {"weights": {name: p.detach() for name, p in model.named_parameters()}, "optimizer": moments}


def digest(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def save(folder: Path, model: Qwen2, optimizer: torch.optim.Optimizer, state: dict, world: World, keep: int,
         keep_every: int = 0):
    """Writes `folder`/step_NNNNNN for state["step"], under another name first and then renamed, so that a
    crash leaves no partial checkpoint.

    Each rank writes its shards as safetensors through DCP and hashes them; the manifest lists every file with
    its sha256. Keeps the last `keep` checkpoints and those of every `keep_every`th step. On failure raises
    UserError on all ranks and leaves earlier checkpoints untouched.
    """
    final, beside = folder / f"step_{state['step']:06d}", folder / f"writing_{state['step']:06d}"
    tensors = tensors_of(model, optimizer)
    try:
        with raise_on_all_ranks(world):
            if world.main:
                for broken_off in folder.glob("writing_*"):
                    shutil.rmtree(broken_off)
                beside.mkdir()
        for part in tensors:
            writer = HuggingFaceStorageWriter(str(beside / part), save_distributed=True)
            dcp.save(tensors[part], storage_writer=writer)
        with raise_on_all_ranks(world):  # DCP numbers its files by rank, from 1 on
            mine = {str(f.relative_to(beside)): digest(f)
                    for f in beside.glob(f"*/shard-{world.rank + 1:05d}-*")}
        manifest = {name: sha for part in gather(mine, world) for name, sha in part.items()}
        with raise_on_all_ranks(world):
            if world.main:
                updates = next(iter(optimizer.state.values()))["step"].item()
                replace(beside / "state.json",
                        json.dumps(state | {"updates": updates, "torch": torch.__version__}))
                manifest["state.json"] = digest(beside / "state.json")
                replace(beside / "manifest.json", json.dumps(manifest, indent=1))
                shutil.rmtree(final, ignore_errors=True)
                os.rename(beside, final)
    except (OSError, dcp.CheckpointException) as e:
        reasons = [e] if isinstance(e, OSError) else [error for error, _ in e.failures.values()]
        if not isinstance(reasons[0], OSError):
            raise
        if world.main:
            shutil.rmtree(beside, ignore_errors=True)
        dist.barrier()
        needed = sum(t.numel() * t.element_size() for part in tensors.values() for t in part.values())
        raise UserError(f"checkpoint {final} cannot be written ({reasons[0].strerror or reasons[0]}): it "
                        f"needs {needed:,} bytes, and {shutil.disk_usage(folder).free:,} are free; those "
                        "before it stay: make room, and the same command goes on from them") from None
    for old in complete(folder)[keep:] if world.main else []:
        if not keep_every or step_of(old) % keep_every:
            shutil.rmtree(old, ignore_errors=True)


class Checkpoints:
    """The checkpoints of a run. saved: step of the newest, 0 without one."""

    def __init__(self, folder: Path, model: Qwen2, optimizer, saved: int, config, inputs: dict, code: str,
                 clock, world: World):
        self.folder, self.model, self.optimizer, self.saved = folder / "checkpoints", model, optimizer, saved
        self.config, self.inputs, self.code, self.clock, self.world = config, inputs, code, clock, world

    def due(self, step: int) -> bool:
        """Whether a multiple of save_every, or the last step, has been reached since the newest."""
        every = self.config.save_every
        return step // every > self.saved // every or step == self.config.steps

    def save(self, step: int, **more):
        state = {"step": step, "code": self.code, "inputs": self.inputs,
                 "config": dataclasses.asdict(self.config), **more}
        self.clock.seconds["save"] = 0.0
        with self.clock("save"):
            save(self.folder, self.model, self.optimizer, state, self.world, self.config.keep_checkpoints,
                 self.config.keep_every)
        self.saved = step


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def named(folder: Path) -> list[Path]:
    """Paths that have the name of a checkpoint, newest first."""
    return sorted((p for p in folder.glob("*") if re.fullmatch(r"step_\d{6,}", p.name)), key=step_of,
                  reverse=True)


def complete(folder: Path) -> list[Path]:
    """Completely written checkpoints, newest first."""
    return [path for path in named(folder) if (path / "manifest.json").is_file()]


def verify(path: Path, world: World | None = None) -> dict:
    """Returns the state of a checkpoint whose files match its manifest; raises BadCheckpoint if they do not.
    The ranks of a world share the hashing and its result."""
    with raise_on_all_ranks(world) if world else nullcontext():
        try:
            manifest = read_json(path / "manifest.json", "copy it again", **{"state.json": Field(str)})
            state = read_json(path / "state.json", "copy it again", step=Field(int, 0),
                              updates=Field(float, 0))
            shards = {str(file.relative_to(path)) for file in path.rglob("*.safetensors")}
            unlisted, files = sorted(shards - manifest.keys()), sorted(manifest.items())
            bad = [name for name, expected in (files[world.rank::world.size] if world else files)
                   if digest(path / name) != expected]
        except (OSError, ValueError, UserError) as e:
            raise BadCheckpoint(f"{path} is incomplete ({e})") from None
        if unlisted:
            raise BadCheckpoint(f"{path / 'manifest.json'} does not list {unlisted[0]}")
        if bad:
            raise BadCheckpoint(f"{path / bad[0]} does not match its checksum")
        return state


def newest(folder: Path, world: World | None = None) -> tuple[Path, dict] | None:
    """The newest valid checkpoint and its state, with a warning for each newer one that is not valid. None
    without checkpoints; raises BadCheckpoint if none is valid."""
    paths = broadcast(named(folder), world) if world else named(folder)
    for path in paths:
        try:
            return path, verify(path, world)
        except BadCheckpoint as e:
            if not world or world.main:
                print(f"warning: {e}; trying the checkpoint before it", file=sys.stderr, flush=True)
    if paths:
        raise BadCheckpoint(f"none of the {len(paths)} checkpoints in {folder} is whole: put one of them "
                            "back, or begin anew in another run_dir")
    return None


def load(path: Path, model: Qwen2, optimizer: torch.optim.Optimizer) -> dict:
    """Reads weights and optimiser state in place, written by any number of ranks; returns the state."""
    state = read_json(path / "state.json", "copy it again")
    for part, tensors in tensors_of(model, optimizer).items():
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path / part)))
    for p in model.parameters():
        optimizer.state[p]["step"].fill_(state["updates"])
    return state


def find(path: Path) -> tuple[Path, Path]:
    """(run folder, checkpoint): the newest of a run, or the checkpoint that the path names. Raises
    UserError."""
    run = path if (path / "checkpoints").is_dir() else path.parent.parent
    if not (run / "config.json").is_file():
        raise UserError(f"{path} is neither a run nor a checkpoint of one: {run / 'config.json'} does not "
                        "exist")
    if run != path:
        verify(path)
        return run, path
    if not (found := newest(run / "checkpoints")):
        raise UserError(f"{path} has no complete checkpoint yet: export it after its first save")
    return run, found[0]
