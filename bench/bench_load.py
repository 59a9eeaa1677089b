"""Memory of a rank that reads its part of a checkpoint, and that publishes to its sampler.

    python -m bench.bench_load [--ranks 2] [--megabytes 400] [--vocabulary 50000] [--hidden 1024]

Writes a bf16 checkpoint of zeros, and starts fresh processes on the CPU that read it into fp32 shards and
publish it twice to a whole bf16 replica; the second time counts, when the replica's own pages exist. A
smaller checkpoint goes first, so that what torch loads at first use is there. A peak is that of the resident
memory (VmHWM), pages of mapped files included, above what was resident before; malloc is told to return what
is freed. The bars, for the hungriest rank:

    load       its shard and 0.6 of the checkpoint
    publish    two layers or one embedding matrix, whichever is larger, in bf16

Linux with glibc only. Ends with one JSON line.
"""

import argparse
import gc
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

import model as qwen
import parallel
from bench import hardware


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


def measure(path: Path, world: parallel.World) -> dict[str, float]:
    """Peaks of this rank and what bounds them, in bytes; seconds."""
    peak, start = Peak(), time.perf_counter()
    model = parallel.load_sharded(path, world)
    figures = {"load": peak(), "load_seconds": round(time.perf_counter() - start, 3)}
    with torch.device("meta"):
        sampler = qwen.Qwen2(model.config).bfloat16()
    parallel.publish(model, sampler.to_empty(device=world.device))
    peak, start = Peak(), time.perf_counter()
    parallel.publish(model, sampler)
    figures |= {"publish": peak(), "publish_seconds": round(time.perf_counter() - start, 3)}
    checkpoint = sum(f.stat().st_size for f in path.glob("*.safetensors"))
    shard = sum(p.to_local().nbytes for p in model.parameters())
    layer = sum(p.nbytes for p in sampler.layers[0].parameters())
    return figures | {"checkpoint": checkpoint, "shard": shard, "layer": layer,
                      "embedding": sampler.model["embed_tokens"].weight.nbytes,
                      "load_bar": shard + round(0.6 * checkpoint),
                      "publish_bar": max(2 * layer, sampler.model["embed_tokens"].weight.nbytes)}


def write(path: Path, megabytes: int, vocabulary: int, hidden: int):
    """A bf16 checkpoint of about that size, whatever its weights are."""
    shape = qwen.ModelConfig(vocabulary, hidden, 11 * hidden // 4, 1, 16, 4)
    layer = replace(shape, num_hidden_layers=2).num_parameters - shape.num_parameters
    more = max(0, megabytes * 10**6 // 2 - shape.num_parameters) // layer
    with torch.device("meta"):
        model = qwen.Qwen2(replace(shape, num_hidden_layers=1 + more)).bfloat16()
    qwen.save(model.to_empty(device="cpu"), path)


def rank(rank: int, ranks: int, folder: str):
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    world = parallel.setup("cpu")
    measure(Path(folder, "small"), world)
    Path(folder, f"rank_{rank}.json").write_text(json.dumps(measure(Path(folder, "large"), world)))
    parallel.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=400, help="of the checkpoint")
    parser.add_argument("--vocabulary", type=int, default=50000)
    parser.add_argument("--hidden", type=int, default=1024)
    args = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, "small"), 1, 64, 64)
        write(Path(folder, "large"), args.megabytes, args.vocabulary, args.hidden)
        torch.multiprocessing.spawn(rank, (args.ranks, folder), nprocs=args.ranks)
        each = [json.loads(Path(folder, f"rank_{r}.json").read_text()) for r in range(args.ranks)]
    worst = {name: max(figures[name] for figures in each) for name in each[0]}
    machine = hardware()
    for phase in ("load", "publish"):
        mb = {name: worst[name] / 1e6 for name in (phase, f"{phase}_bar")}
        print(f"{phase:8} {mb[phase]:7.1f} MB above the start, bar {mb[f'{phase}_bar']:.1f} MB, "
              f"{worst[f'{phase}_seconds']:.1f} s")
    print(json.dumps({"bench": "load", **machine, **vars(args), **worst}))


if __name__ == "__main__":
    main()
