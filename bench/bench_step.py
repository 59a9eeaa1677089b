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

import argparse
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
from bench import ROOT, hardware, shapes
from data.tokenizer import Tokenizer
from lib import distributed
from lib.files import locate
from scripts import plan as planner

QWEN = ROOT.parent / "shared/data/qwen2.5-tokenizer"
SHAPES = shapes.SHAPES | {"43m": qwen.ModelConfig(151936, 256, 704, 6, 8, 2, tie_word_embeddings=True)}
BATCH = {"43m": (2, 4, 256, 4096), "0.5b": (4, 8, 4096, 8192), "1.5b": (4, 8, 4096, 8192)}
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 flops a second
IN_UPDATE = ("logprob", "backward", "step")
BARS = {"seconds": 3.0, "memory": 0.5}  # TRL / ours at least; ours / TRL at most


def varied(completion, prompt):
    """A reward of random text that differs within a group, or there would be no gradient; also TRL's."""
    return len(completion.text) % 97 / 97


def make(folder: Path, shape: str, tokenizer: Path) -> list[str]:
    """A checkpoint of random weights, prompts, and the options that train on them."""
    config, path = SHAPES[shape], folder / "model"
    weights = qwen.Qwen2(config).init_weights_(0)
    qwen.save(weights if shape == "43m" else weights.to(torch.bfloat16), path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, path)
    if tokenizer != QWEN:  # as many ids as Qwen2.5's
        file = path / "tokenizer.json"
        raw = json.loads(file.read_text())
        vocabulary = raw["model"]["vocab"]
        vocabulary |= {f"<id{i}>": i for i in range(max(vocabulary.values()) + 1, 151665)}
        file.write_text(json.dumps(raw))
    (path / "generation_config.json").write_text('{"eos_token_id": 151664}')
    texts = [f"Write story number {i} about a lamp in a harbour town." for i in range(8)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts))
    names = ("prompts_per_step", "group_size", "max_new_tokens", "micro_batch_tokens")
    batch = sum(([f"--{name}", str(value)] for name, value in zip(names, BATCH[shape])), [])
    return ["--config", str(run.ROOT / "configs/tiny.json"), "--model", str(path), "--prompts",
            str(folder / "prompts.jsonl"), "--stop", "", "--reward", "varied", "--steps", "4", *batch]


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


def measure(folder: Path, options: list[str], shape: str, tokenizer: Path):
    """Trains as the options say; prints figures and the JSON line."""
    config = train.parse([*options, "--run_dir", f"{folder}/run"])
    world = distributed.setup(config.device)
    folder = Path(distributed.broadcast(str(folder), world))
    if shape:
        made = make(folder, shape, tokenizer) if world.main else None
        options = [*distributed.broadcast(made, world), *options]
    base = ["--steps", "6", "--eval_prompts", ""]
    config = train.parse([*base, *options, "--run_dir", str(folder / "run")])
    if config.reward == "varied":
        rewards.REWARDS["varied"] = (varied, 1.0)
    stamps, step = [], run.Log.step

    def stamped(*arguments):
        step(*arguments)
        stamps.append((time.perf_counter(), time.process_time()))

    no_checkpoint = mock.patch.object(checkpoints, "save")  # no option turns off the last step's
    with mock.patch.object(run.Log, "step", stamped), no_checkpoint:
        train.train(config)
    dist.barrier()
    texts = sorted((Path(config.run_dir) / "rollouts").iterdir())
    lines = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").open()]
    records = [json.loads(line) for line in texts[-1].open()]
    model = qwen.read_config(locate(config.model))
    encode = Tokenizer(locate(config.model)).encode
    dist.barrier()  # nobody removes the folder before all have read it
    distributed.close()
    if not world.main:
        return
    steady = lines[1:] or lines
    wanted = ("time/", "tokens_per_second/", "balance/", "length/tokens", "gap/mean")
    figures = {name: statistics.median(m[name] for m in steady)
               for name in steady[0] if name.startswith(wanted)}
    figures["memory/peak_gb"] = lines[-1]["memory/peak_gb"]
    prompts = [len(encode(r["prompt"])) for r in records]
    figures["planned_gb"] = planned(config, model, world, max(prompts))
    for name, column in (("seconds", 0), ("cpu_seconds", 1)):
        took = [b[column] - a[column] for a, b in zip(stamps, stamps[1:])]
        figures[name] = statistics.median(took) if took else 0.0
    lengths = [n + r["tokens"] for n, r in zip(prompts, records)]
    flops = 3 * sum(n * model.flops_per_token(n // 2) for n in lengths)
    figures["update_tflops"] = flops / figures["time/update"] / world.size / 1e12
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else ""
    peak = next((flops for name, flops in PEAKS.items() if name in device), None)
    machine = hardware()
    print(f"{world.size} ranks; {config.prompts_per_step} x {config.group_size} samples a step, "
          f"max_new_tokens {config.max_new_tokens}")
    for name, value in figures.items():
        print(f"{name:28}{value:12,.4g}" + ("  of it" if name[5:] in IN_UPDATE else ""))
    mfu = figures["update_tflops"] * 1e12 / peak if peak else "unknown"
    print(f"update mfu {mfu}")
    chosen = ("model", "prompts_per_step", "group_size", "max_new_tokens", "micro_batch_tokens")
    settings = {"ranks": world.size, "steps": len(steady), **{name: getattr(config, name) for name in chosen}}
    rounded = {name: round(value, 6) for name, value in figures.items()}
    print(json.dumps({"bench": "step", **machine, "shape": shape, **settings, **rounded, "mfu": mfu}),
          flush=True)


def answer(command: list[str], log: Path, **given) -> dict:
    """The JSON object that a command ends with."""
    with log.open("w") as errors:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True,
                              **given)
    if done.returncode:
        said = done.stdout[-2000:] + log.read_text()[-4000:]
        sys.exit(f"{command[1]} ended with {done.returncode}:\n{said}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(folder: Path, python: str, rounds: int, options: list[str], tokenizer: Path):
    """Ours and TRL's in turn."""
    options = [*make(folder, "43m", tokenizer), "--device", "cpu", *options]
    config, machine = train.parse(options), hardware()
    names = ("model", "prompts_per_step", "group_size", "max_new_tokens", "temperature", "lr", "steps")
    prompts = [json.loads(line)["prompt"] for line in Path(config.prompts).open()]
    asked = {name: getattr(config, name) for name in names} | {
        "threads": torch.get_num_threads(), "prompts": prompts}
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    print(f"{SHAPES['43m'].num_parameters:,} parameters, fp32; {config.prompts_per_step} x "
          f"{config.group_size} samples of {config.max_new_tokens} tokens; {config.steps - 1} steps a round, "
          "after one", flush=True)
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(answer([sys.executable, "-m", "bench.bench_step", *options], folder / "ours.log",
                           env=environment))
        trl = answer([python, str(Path(__file__).with_name("trl_peer.py"))], folder / "trl.log",
                     input=json.dumps(asked), env=environment)
        took = [[b - a for a, b in zip(x, x[1:])] for x in zip(*trl["stamps"])]
        theirs.append({"seconds": statistics.median(took[0]), "cpu_seconds": statistics.median(took[1]),
                       "memory/peak_gb": trl["peak_gb"], "trl": trl["trl"]})
        for name, row in (("ours", ours[-1]), ("trl", theirs[-1])):
            print(f"{name:6}{row['seconds']:8.2f} s  {row['cpu_seconds']:8.2f} CPU s  "
                  f"{row['memory/peak_gb']:6.2f} GB  load {os.getloadavg()[0]:.1f}", flush=True)
    ratios = {name: round(statistics.median(b[key] / a[key] for a, b in zip(ours, theirs)), 3)
              for name, key in (("seconds", "seconds"), ("cpu", "cpu_seconds"))}
    ratios["memory"] = round(max(a["memory/peak_gb"] / b["memory/peak_gb"] for a, b in zip(ours, theirs)), 3)
    print(f"TRL / ours: {ratios['seconds']} in time (bar {BARS['seconds']}), {ratios['cpu']} in CPU time; "
          f"ours / TRL in memory: {ratios['memory']} (bar {BARS['memory']})")
    kept = ("seconds", "cpu_seconds", "memory/peak_gb")
    split = {k: statistics.median(row[k] for row in ours) for k in ours[0] if k.startswith("time/")}
    print(json.dumps({"bench": "step", **machine, "shape": "43m", "rounds": rounds, "trl": theirs[0]["trl"],
                      "ours": [{k: row[k] for k in kept} for row in ours],
                      "theirs": [{k: round(row[k], 6) for k in kept} for row in theirs],
                      **{f"ratio_{k}": v for k, v in ratios.items()}, **split,
                      "load": os.getloadavg()[0]}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="", choices=list(BATCH), help="random weights of this shape")
    parser.add_argument("--tokenizer", default="", metavar="FOLDER", help="of Qwen2.5; else a made-up one")
    parser.add_argument("--trl", default="", metavar="PYTHON", help="that has TRL 1.16: compare with it")
    parser.add_argument("--rounds", type=int, default=2, help="of the comparison")
    args, options = parser.parse_known_args()
    tokenizer = Path(args.tokenizer or (QWEN if QWEN.exists() else ROOT / "data/tiny/base"))
    with tempfile.TemporaryDirectory() as folder:
        if args.trl:
            compare(Path(folder), args.trl, args.rounds, options, tokenizer)
        else:
            measure(Path(folder), options, args.shape, tokenizer)


if __name__ == "__main__":
    main()
