"""Resident memory of loading a checkpoint sharded and of publishing it, and what bounds both."""

import gc
from dataclasses import replace
from pathlib import Path

import torch

import model as qwen
import parallel
from lib import distributed


class Peak:
    """Bytes of resident memory above those at the start; the kernel keeps the maximum."""
    def __init__(self):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
        self.start = self.read("VmRSS")

    def __call__(self) -> int:
        return self.read("VmHWM") - self.start

    @staticmethod
    def read(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def measure(path: Path, world: distributed.World) -> dict[str, float]:
    """Peaks of this rank and what bounds them, in bytes."""
    peak = Peak()
    model = parallel.load_sharded(path, world)
    figures = {"load": peak()}
    with torch.device("meta"):
        sampler = qwen.Qwen2(model.config).bfloat16()
    parallel.publish(model, sampler.to_empty(device=world.device))
    peak = Peak()
    parallel.publish(model, sampler)
    figures |= {"publish": peak()}
    checkpoint = sum(f.stat().st_size for f in path.glob("*.safetensors"))
    shard = sum(p.to_local().nbytes for p in model.parameters())
    layer = sum(p.nbytes for p in sampler.layers[0].parameters())
    return figures | {"checkpoint": checkpoint, "shard": shard, "layer": layer,
                      "embedding": sampler.model["embed_tokens"].weight.nbytes,
                      "load_bar": shard + round(0.6 * checkpoint),
                      "publish_bar": max(2 * layer, sampler.model["embed_tokens"].weight.nbytes)}


def write(path: Path, megabytes: int, vocabulary: int, hidden: int):
    """A bf16 checkpoint of about that size, all zeros."""
    shape = qwen.ModelConfig(vocabulary, hidden, 11 * hidden // 4, 1, 16, 4)
    layer = replace(shape, num_hidden_layers=2).num_parameters - shape.num_parameters
    more = max(0, megabytes * 10**6 // 2 - shape.num_parameters) // layer
    with torch.device("meta"):
        model = qwen.Qwen2(replace(shape, num_hidden_layers=1 + more)).bfloat16()
    model = model.to_empty(device="cpu")
    for p in model.parameters():
        p.data.zero_()  # what memory holds may be no finite number
    qwen.save(model, path)
