"""All that waits for a GPU, in one command.

    python -m bench.gpu_check [--stages tests kernels ...] [--out FOLDER]

    tests      the kernels' tests, compiled, and tests/gpu
    kernels    bench.bench_kernels: each kernel beside what a user would otherwise call, with the bars
    sanitizer  compute-sanitizer's memcheck and racecheck over the kernels at small shapes
    sampler    bench.bench_sampler in bf16 against transformers' generate
    engine     bench.bench_engine: decoding as a share of the bandwidth limit, with and without graphs
    step       bench.bench_step on the GPU: the embedded default, and 4k-token outputs at 0.5B and 1.5B

Writes FOLDER/gpu.json (default bench/results) after each command, with device and versions; stages measured
before are kept, so that it can be run in parts. Exits with 1 if a stage failed or a bar was missed.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench import hardware
from kernels import backend

ROOT = Path(__file__).parent.parent
PYTHON = [sys.executable, "-m"]
SANITIZER = ["compute-sanitizer", "--report-api-errors", "no", "--error-exitcode", "1", "--tool"]
KERNELS = ("decode", "prefill", "training", "write", "logprob", "sampling")
SMOKE = [*PYTHON, "bench.bench_kernels", "--smoke", "--no_peers"]


def stages() -> dict[str, list[list[str]]]:
    return {
        "tests": [PYTHON + ["pytest", "-q", "tests/gpu", "tests/test_kernels.py", "tests/test_logprob.py"]],
        "kernels": [PYTHON + ["bench.bench_kernels", "--only", name] for name in KERNELS],
        "sanitizer": [[*SANITIZER, tool, *SMOKE] for tool in ("memcheck", "racecheck")],
        "sampler": [PYTHON + ["bench.bench_sampler", "--device", "cuda", "--dtype", "bfloat16"]],
        "engine": [PYTHON + ["bench.bench_engine", "--shapes", shape] for shape in ("7b", "1.5b", "0.5b")],
        "step": [PYTHON + ["bench.bench_step", "--device", "cuda"]] + [
            PYTHON + ["bench.bench_step", "--device", "cuda", "--shape", shape] for shape in ("0.5b", "1.5b")]
    }


def run(command: list[str], limit: float) -> dict:
    """Exit code and seconds of a command, the JSON line that a bench ends with, and its last lines."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if command[0] == SANITIZER[0]:  # torch's cache of freed memory would hide an access beyond a tensor
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    start = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, timeout=limit)
        code, text = done.returncode, done.stdout
    except subprocess.TimeoutExpired as e:
        code, text = f"stopped after {limit:g} s", e.stdout or ""  # bytes, whatever `text` says
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
    except OSError as e:
        code, text = str(e), ""
    lines = text.splitlines()
    found = next((line for line in reversed(lines) if line.startswith('{"bench"')), None)
    shown = [line for line in lines if line != found]
    print("\n".join(shown[-60:]), flush=True)
    return {"command": " ".join(command[1:] if command[0] == sys.executable else command), "exit": code,
            "seconds": round(time.perf_counter() - start, 1), "result": found and json.loads(found),
            "tail": shown[-15:]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", default=list(stages()), choices=list(stages()))
    parser.add_argument("--out", default=str(ROOT / "bench/results"), help="folder of gpu.json")
    parser.add_argument("--limit", type=float, default=550, help="seconds that a command may take")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_check: torch sees no GPU here; nothing was measured and nothing was written")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "gpu.json"
    machine = hardware() | {"triton": backend.triton.__version__, "cuda": torch.version.cuda}
    record = json.loads(file.read_text()) if file.exists() else {}
    if record.get("machine") != machine:  # figures of two machines do not mix
        record = {"bench": "gpu_check", "machine": machine, "stages": {}}
    bad = []
    for name in args.stages:
        print(f"== {name}", flush=True)
        record["stages"][name] = results = []
        for command in stages()[name]:
            results.append(run(command, args.limit))
            file.write_text(json.dumps(record, indent=1) + "\n")
        bad += [f"{r['command']}: exit {r['exit']}" for r in results if r["exit"] != 0]
        for case in (c for r in results for c in (r["result"] or {}).get("cases", ())):
            bad += [f"{case['case']}: {bar} missed, {x['figure']} instead of {x['bound']}"
                    for bar, x in case["bars"].items() if not x["met"]]
    print(f"written to {file}")
    if bad:
        sys.exit("\n".join(bad))


if __name__ == "__main__":
    main()
