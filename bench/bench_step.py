"""Where the time of a training step goes: train.py's own steps, its own clock.

    [torchrun --nproc_per_node=N] -m bench.bench_step [--steps 6] [any option of train.py]

Runs the real loop in a temporary run folder, without evaluation, and reports medians over the steps after the
first: seconds by phase, tokens a second of sampling and update, peak memory of the hungriest rank. Ends with
one JSON line.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch.distributed as dist

import parallel
import train
from bench import hardware


def main():
    with tempfile.TemporaryDirectory() as folder:
        base = ["--steps", "6", "--eval_prompts", "", "--save_every", "1000000", *sys.argv[1:]]
        config = train.parse([*base, "--run_dir", f"{folder}/run"])
        world = parallel.setup(config.device)
        config.run_dir = parallel.broadcast(config.run_dir, world)
        train.train(config)
        dist.barrier()
        lines = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").open()]
        dist.barrier()  # nobody removes the folder before all have read it
        parallel.close()
    if not world.main:
        return
    steady = lines[1:] or lines
    wanted = ("time/", "tokens_per_second/", "memory/", "length/tokens", "gap/mean")
    figures = {name: statistics.median(m[name] for m in steady)
               for name in steady[0] if name.startswith(wanted)}
    phases = ("sample", "score", "update", "publish")
    figures["time/step"] = sum(figures[f"time/{phase}"] for phase in phases)
    machine = hardware()
    print(f"{world.size} ranks; {config.prompts_per_step} x {config.group_size} samples a step, "
          f"max_new_tokens {config.max_new_tokens}")
    for name, value in figures.items():
        print(f"{name:28}{value:12,.4g}")
    chosen = ("model", "prompts_per_step", "group_size", "max_new_tokens", "micro_batch_tokens")
    settings = {"ranks": world.size, "steps": len(steady), **{name: getattr(config, name) for name in chosen}}
    rounded = {name: round(value, 6) for name, value in figures.items()}
    print(json.dumps({"bench": "step", **machine, **settings, **rounded}))


if __name__ == "__main__":
    main()
