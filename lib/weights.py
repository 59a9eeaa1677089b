"""The safetensors files of a Hugging Face checkpoint folder."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from lib.options import Field, UserError, read_json, shown

INDEX = "model.safetensors.index.json"


def open_weights(file: Path):
    """Opens a safetensors file. Raises UserError if it is missing, incomplete or of another format."""
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as e:
        raise UserError(f"{file} cannot be read ({e}): copy it again") from None


def weight_files(path: str | Path) -> dict[str, Path]:
    """Tensor name -> safetensors file of a checkpoint folder. Raises UserError."""
    path = Path(path)
    index, single = path / INDEX, path / "model.safetensors"
    if index.exists():
        names = read_json(index, "copy it again", weight_map=Field(dict))["weight_map"]
        for name, file in names.items():
            if not isinstance(file, str) or file != Path(file).name:  # of another folder
                raise UserError(f"{index}: {name} must be in a file of this folder, not in {shown(file)}")
        files = {name: path / file for name, file in names.items()}
        if missing := sorted({f.name for f in files.values() if not f.is_file()}):
            raise UserError(f"{path} lacks {', '.join(missing)}, which its index names: is the download "
                            "complete?")
        return files
    if single.exists():
        with open_weights(single) as f:
            return dict.fromkeys(f.keys(), single)
    raise UserError(f"{path} has neither model.safetensors nor {INDEX}: is the download complete?")


def check_finite(x: torch.Tensor, name: str, file: Path):
    """Raises UserError. Takes no memory: minimum and maximum are NaN where any number is."""
    if not torch.stack(torch.aminmax(x)).isfinite().all():
        raise UserError(f"{file}: {name} has numbers that are not finite: choose another checkpoint")


def plan_files(model: nn.Module, itemsize: int, max_shard_bytes: int = 5 * 2**30) -> dict[str, list[str]]:
    """The names of the tensors that go into each safetensors file of a checkpoint, in the model's order."""
    groups, size = [[]], 0
    for name, p in model.named_parameters():
        if groups[-1] and size + p.numel() * itemsize > max_shard_bytes:
            groups, size = [*groups, []], 0
        groups[-1].append(name)
        size += p.numel() * itemsize
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


def write_file(tensors: dict[str, torch.Tensor], file: Path):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, metadata={"format": "pt"})  # renames a file that only its owner may read
    file.chmod(mode)


def write_index(model: nn.Module, path: str | Path, dtype: torch.dtype, files: dict[str, list[str]]):
    """Writes the index where there are several files, and removes what an older checkpoint left."""
    path = Path(path)
    for file in path.glob("model*.safetensors*"):
        if file.name not in files:  # an older index would be read instead of the new file
            file.unlink()
    if len(files) > 1:
        size = sum(p.numel() for p in model.parameters()) * dtype.itemsize
        places = {name: file for file, names in files.items() for name in names}
        content = {"metadata": {"total_size": size}, "weight_map": places}
        (path / INDEX).write_text(json.dumps(content, indent=2))
