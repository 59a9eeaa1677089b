"""Where the time and memory of a training step go: train.py's own steps, its own clock.

    [torchrun --nproc_per_node=N] -m bench.bench_step [--shape 43m] [--steps 6] [any option of train.py]
    python -m bench.bench_step --trl PYTHON [--rounds 2] [any option of train.py]

Runs the real loop in a temporary run folder, without evaluation and checkpoints, and reports medians over
the steps after the first: seconds by phase and of the whole step, this process's CPU seconds, tokens a
second, peak memory of the hungriest rank, the update's flops over its time (MFU where the device's peak is
known).

--shape makes a checkpoint of random weights with Qwen2.5's vocabulary: 43m, of 8 samples x 256 tokens for a
CPU; 0.5b and 1.5b, of 32 samples x 4096 tokens for a GPU. No id ends a sample, and rewards vary.

--trl alternates with TRL's GRPOTrainer on the same checkpoint, prompts and lengths, run by a Python that has
it: each side a process of its own, with as many threads, each round a fresh one. Ends with one JSON line.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

import checkpoints
import model as qwen
import rewards
import run
import train
from bench import ROOT, finish, hardware, parser
from bench.shapes import SHAPES
from data.tokenizer import Tokenizer
from lib import distributed
from lib.files import locate, read_jsonl, write_jsonl
from scripts import plan as planner

BASE = ROOT / "data/tiny/base"
LONG = "--prompts_per_step 4 --group_size 8 --max_new_tokens 4096 --micro_batch_tokens 8192"
BATCH = {"43m": "--prompts_per_step 2 --group_size 4 --max_new_tokens 256 --micro_batch_tokens 4096",
         "0.5b": LONG, "1.5b": LONG}
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 flops a second


def varied(completion, prompt):
    """A reward of random text that differs within a group, or there would be no gradient; also TRL's."""
    return len(completion.text) % 97 / 97


def make(folder: Path, shape: str) -> list[str]:
    """A checkpoint of random weights, prompts, and the options that train on them."""
    path = folder / "model"
    weights = qwen.Qwen2(SHAPES[shape]).init_weights_(0)
    qwen.save(weights if shape == "43m" else weights.to(torch.bfloat16), path)
    shutil.copy(BASE / "tokenizer_config.json", path)
    tokenizer = json.loads((BASE / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]  # made to have as many ids as Qwen2.5's
    vocabulary |= {f"<id{i}>": i for i in range(max(vocabulary.values()) + 1, 151665)}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (path / "generation_config.json").write_text('{"eos_token_id": []}')
    write_jsonl(folder / "prompts.jsonl",
                [{"prompt": f"Write story number {i} about a lamp in a harbour town."} for i in range(8)])
    return ["--config", str(ROOT / "configs/tiny.json"), "--model", str(path), "--prompts",
            str(folder / "prompts.jsonl"), "--stop", "", "--reward", "varied", "--steps", "4",
            *BATCH[shape].split()]


def planned(config: train.Config, shape: qwen.ModelConfig, world, prompt_tokens: int) -> float:
    """GiB that the planner expects at the peak, without what the allocator cannot use."""
    cuda = world.device.type == "cuda"
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    memory = torch.cuda.mem_get_info()[1] if cuda else host
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    machine = planner.Machine(here, world.size // here, memory / planner.GIB, prompt_tokens)
    plan = planner.Plan(config, machine, shape, cuda)
    phases = plan.phases()
    phases["sample"]["KV pool"] = plan.pages * plan.page_bytes
    del phases["update"]["unusable, of the allocator"]
    return max(sum(buffers.values()) for buffers in phases.values()) / planner.GIB


def medians(stamps: list[tuple[float, float]]) -> dict[str, float]:
    """Of the seconds and CPU seconds between stamps of (clock, CPU clock)."""
    return {name: statistics.median(b - a for a, b in zip(clock, clock[1:]))
            for name, clock in zip(("seconds", "cpu_seconds"), zip(*stamps))}


def measure(folder: Path, options: list[str], shape: str):
    """Trains as the options say; prints figures and the JSON line."""
    config = train.parse([*options, "--run_dir", f"{folder}/run"])
    world = distributed.setup(config.device)
    folder = Path(distributed.broadcast(str(folder), world))
    if shape:
        made = make(folder, shape) if world.main else None
        options = [*distributed.broadcast(made, world), *options]
    config = train.parse(["--steps", "6", *options, "--eval_prompts", "", "--run_dir", str(folder / "run")])
    if config.reward == "varied":
        rewards.REWARDS["varied"] = (varied, 1.0)
        Tokenizer.find_eos = lambda self, *_: []  # no id ends a sample
    stamps, step = [], run.Log.step

    def stamped(*arguments):
        step(*arguments)
        stamps.append((time.perf_counter(), time.process_time()))

    no_checkpoint = mock.patch.object(checkpoints, "save")  # no option turns off the last step's
    with mock.patch.object(run.Log, "step", stamped), no_checkpoint:
        train.train(config)
    dist.barrier()
    distributed.close()
    if not world.main:
        return
    lines = read_jsonl(folder / "run/metrics.jsonl")
    records = read_jsonl(max((folder / "run/rollouts").iterdir()))
    model, encode = qwen.read_config(locate(config.model)), Tokenizer(locate(config.model)).encode
    wanted = ("time/", "tokens_per_second/", "balance/", "length/tokens", "gap/mean")
    figures = {name: statistics.median(m[name] for m in lines[1:])
               for name in lines[-1] if name.startswith(wanted)}
    prompts = [len(encode(r["prompt"])) for r in records]
    lengths = [n + r["tokens"] for n, r in zip(prompts, records)]
    flops = 3 * sum(n * model.flops_per_token(n // 2) for n in lengths)
    figures |= {"memory/peak_gb": lines[-1]["memory/peak_gb"],
                "planned_gb": planned(config, model, world, max(prompts)), **medians(stamps),
                "update_tflops": flops / figures["time/update"] / world.size / 1e12}
    machine = hardware()
    print(f"{world.size} ranks; {config.prompts_per_step} x {config.group_size} samples a step, "
          f"max_new_tokens {config.max_new_tokens}")
    for name, value in figures.items():
        part = name in ("time/logprob", "time/backward", "time/step")
        print(f"{name:28}{value:12,.4g}{'  of the update' * part}")
    device = machine["gpu"] if world.device.type == "cuda" else ""
    peak = next((flops for name, flops in PEAKS.items() if name in device), None)
    mfu = figures["update_tflops"] * 1e12 / peak if peak else "unknown"
    print(f"update mfu {mfu}")
    chosen = ("model", "prompts_per_step", "group_size", "max_new_tokens", "micro_batch_tokens")
    finish({"bench": "step", **machine, "shape": shape, "ranks": world.size, "steps": len(lines) - 1,
            **{name: getattr(config, name) for name in chosen},
            **{name: round(value, 6) for name, value in figures.items()}, "mfu": mfu})


def answer(*command: str, **given) -> dict:
    """The JSON object that a command ends with."""
    done = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True, **given,
                          env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    return json.loads(done.stdout.splitlines()[-1])


def compare(folder: Path, python: str, rounds: int, options: list[str]):
    """Ours and TRL's in turn."""
    options = [*make(folder, "43m"), "--device", "cpu", *options]
    config, machine = train.parse(options), hardware()
    names = ("model", "prompts_per_step", "group_size", "max_new_tokens", "temperature", "lr", "steps")
    settings = {name: getattr(config, name) for name in names} | {
        "threads": torch.get_num_threads(),
        "prompts": [r["prompt"] for r in read_jsonl(Path(config.prompts))]}
    print(f"{SHAPES['43m'].num_parameters:,} parameters, fp32; {config.prompts_per_step} x "
          f"{config.group_size} samples of {config.max_new_tokens} tokens; {config.steps - 1} steps a round, "
          "after one", flush=True)
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(answer(sys.executable, "-m", "bench.bench_step", *options))
        trl = answer(python, "bench/trl_peer.py", input=json.dumps(settings))
        theirs.append(medians(trl["stamps"]) | {"memory/peak_gb": trl["peak_gb"]})
        for name, row in (("ours", ours[-1]), ("trl", theirs[-1])):
            print(f"{name:6}{row['seconds']:8.2f} s  {row['cpu_seconds']:8.2f} CPU s  "
                  f"{row['memory/peak_gb']:6.2f} GB  load {os.getloadavg()[0]:.1f}", flush=True)
    pairs = list(zip(ours, theirs))
    ratios = {"seconds": statistics.median(b["seconds"] / a["seconds"] for a, b in pairs),
              "cpu": statistics.median(b["cpu_seconds"] / a["cpu_seconds"] for a, b in pairs),
              "memory": max(a["memory/peak_gb"] / b["memory/peak_gb"] for a, b in pairs)}
    print(f"TRL / ours: {ratios['seconds']:.3f} in time (bar 3), {ratios['cpu']:.3f} in CPU time; "
          f"ours / TRL in memory: {ratios['memory']:.3f} (bar 0.5)")
    finish({"bench": "step", **machine, "shape": "43m", "rounds": rounds, "trl": trl["trl"],
            "ours": [{name: row[name] for name in theirs[0]} for row in ours], "theirs": theirs,
            **{f"ratio_{name}": round(ratio, 3) for name, ratio in ratios.items()},
            **{name: statistics.median(row[name] for row in ours) for name in ours[0]
               if name.startswith("time/")},
            "load": os.getloadavg()[0]})


def main():
    known = parser(__doc__)
    known.add_argument("--shape", default="", choices=list(BATCH), help="random weights of this shape")
    known.add_argument("--trl", default="", metavar="PYTHON", help="that has TRL 1.16: compare with it")
    known.add_argument("--rounds", type=int, default=2, help="of the comparison")
    args, options = known.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.trl:
            compare(Path(folder), args.trl, args.rounds, options)
        else:
            measure(Path(folder), options, args.shape)


if __name__ == "__main__":
    main()
