"""All that waits for a GPU, in one command.

    python -m bench.gpu_check [--stages tests engine ...] [--budget SECONDS] [--dry-run] [--out FOLDER]

bench/README.md describes the stages and has the commands for short loans of a GPU; `stages` has them in the
order in which they run, the most valuable first. All of it is estimated at 33 minutes.

--budget: a command starts only if its estimate fits into what is left, and is stopped when nothing is left;
skipped commands are named. --dry-run prints the schedule. --smoke runs small forms of the stages on any
machine.

Writes FOLDER/gpu.json (default bench/results) after each command, with device and versions; results of other
commands are kept, so that it can be run in parts. Exits with 1 if a command failed or a bar was missed.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from bench import CUDA, RESULTS, ROOT, hardware, parser
from kernels import backend
from lib.files import replace

PYTHON = [sys.executable, "-m"]
SANITIZER = ["compute-sanitizer", "--report-api-errors", "no", "--error-exitcode", "1", "--tool"]
AOT_TEST = "test_every_kernel_compiles_for_three_generations_of_gpus_within_their_limits"  # needs no GPU
TESTS = ["tests/gpu", "tests/test_kernels.py", "tests/test_logprob.py"]
SMOKE_TESTS = "sequences_share or empty_slots or nearest_entry or uniform_distribution"
SMOKE_STEP = ["--steps", "2", "--prompts_per_step", "2", "--group_size", "2", "--max_new_tokens", "16",
              "--reward", "length,format", "--unreachable", "keep"]

Stages = dict[str, list[tuple[float, list[str]]]]


def bench(name: str, *options: str) -> list[str]:
    return [*PYTHON, f"bench.bench_{name}", *options]


def stages() -> Stages:
    """Commands by stage, each after the seconds that it is ESTIMATED to take on an H200 with 16 cores: none
    of these numbers is measured."""
    parallel = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    kernels = {"decode": 60, "prefill": 40, "training": 40, "write": 15, "logprob": 55, "sampling": 30}
    return {
        "tests": [(130 if parallel else 400, [*PYTHON, "pytest", "-q", "--tb=short", *parallel, *TESTS,
                                              "--deselect", f"tests/test_kernels.py::{AOT_TEST}"])],
        "engine": [(170, bench("engine", "--shapes", "7b", "--rows", "32"))],
        "kernels": [(seconds, bench("kernels", "--only", name)) for name, seconds in kernels.items()],
        "step": [(180, bench("step", "--device", "cuda", "--shape", "1.5b"))],
        "steps": [(60, bench("step", "--device", "cuda")),
                  (120, bench("step", "--device", "cuda", "--shape", "0.5b"))],
        "sampler": [(90, bench("sampler", "--device", "cuda", "--dtype", "bfloat16"))],
        "engines": [(250, bench("engine", "--shapes", "7b", "--rows", "1", "128")),
                    (250, bench("engine", "--shapes", "1.5b")), (200, bench("engine", "--shapes", "0.5b"))],
        "sanitizer": [(150, [*SANITIZER, tool, *bench("kernels", "--smoke", "--no_peers")])
                      for tool in ("memcheck", "racecheck")],
    }


def smoke_stages() -> Stages:
    """The same programs at small shapes, with about the CPU seconds that they take."""
    return {
        "tests": [(20, [*PYTHON, "pytest", "-q", *TESTS, "-k", SMOKE_TESTS])],
        "engine": [(25, bench("engine", "--smoke"))],
        "kernels": [(25, bench("kernels", "--smoke"))],
        "step": [(25, bench("step", *SMOKE_STEP))],
    }


def spoken(command: list[str]) -> str:
    return " ".join(command[1:] if command[0] == sys.executable else command)


def too_long(seconds: float, left: float) -> str:
    """Why a command is skipped; empty if it fits."""
    return f"estimated {seconds:.0f} s, {max(0, left):.0f} s of the budget are left" * (seconds > left)


def run(command: list[str], limit: float) -> dict:
    """Exit code and seconds of a command, the JSON line that a bench ends with, and its last lines. Prints
    all other lines as they come."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONUNBUFFERED"] = "1"
    if command[0] == SANITIZER[0]:  # torch's cache of freed memory would hide an access beyond a tensor
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    start, lines, found = time.perf_counter(), [], None
    try:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True,
                                   stderr=subprocess.STDOUT, errors="replace", start_new_session=True)
    except OSError as e:
        code = str(e)
    else:  # killed with the processes that it has started
        timer = threading.Timer(min(limit, threading.TIMEOUT_MAX), os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        try:
            for line in process.stdout:
                if line.startswith('{"bench"') and line.endswith("}\n"):
                    found = json.loads(line)
                    continue
                lines.append(line.rstrip("\n"))
                print(lines[-1], flush=True)
            code = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    seconds = time.perf_counter() - start
    return {"command": spoken(command), "exit": code if seconds < limit else f"stopped after {limit:.0f} s",
            "seconds": round(seconds, 1), "result": found, "tail": lines[-15 if found else -60:]}


def missed(result: dict) -> list[str]:
    bad = [f"{result['command']}: exit {result['exit']}"] * (result["exit"] != 0)
    for case in (result["result"] or {}).get("cases", ()):
        bad += [f"{case['case']}: {bar} missed, {x['figure']} instead of {x['bound']}"
                for bar, x in case["bars"].items() if not x["met"]]
    return bad


def main():
    start = time.perf_counter()
    options = parser(__doc__)
    options.add_argument("--stages", nargs="+", default=list(stages()), choices=list(stages()))
    options.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS",
                         help="of all commands together")
    options.add_argument("--dry-run", action="store_true", help="print the schedule, run nothing")
    options.add_argument("--smoke", action="store_true", help="small forms of the stages, on any machine")
    options.add_argument("--out", default="", help="folder of gpu.json")
    args = options.parse_args()
    if not (args.smoke or args.dry_run or CUDA):
        sys.exit("gpu_check: torch sees no GPU here; nothing was measured and nothing was written")
    table = smoke_stages() if args.smoke else stages()
    todo = [(name, *item) for name in table if name in args.stages for item in table[name]]
    if args.dry_run:
        print("stage      seconds, estimated  command")
        for name, seconds, command in todo:
            why = too_long(seconds, args.budget)
            args.budget -= 0 if why else seconds
            print(f"{name:10}{seconds:19.0f}  {spoken(command)}{f'  SKIPPED: {why}' if why else ''}")
        return
    out = Path(args.out or (ROOT / "runs/gpu_check_smoke" if args.smoke else RESULTS))
    out.mkdir(parents=True, exist_ok=True)
    file = out / "gpu.json"
    machine = hardware() | {"triton": backend.triton.__version__, "cuda": torch.version.cuda}
    record = json.loads(file.read_text()) if file.exists() else {}
    if record.get("machine") != machine:  # figures of two machines do not mix
        record = {"bench": "gpu_check", "machine": machine, "stages": {}}
    bad, record["skipped"] = [], []
    for name, seconds, command in todo:
        left = args.budget - (time.perf_counter() - start)
        print(f"== {name}: {spoken(command)}", flush=True)
        if why := too_long(seconds, left):
            record["skipped"].append(f"{spoken(command)} ({why})")
        else:
            result = run(command, left)
            others = record["stages"].get(name, ())
            record["stages"][name] = [r for r in others if r["command"] != result["command"]] + [result]
            bad += missed(result)
        replace(file, json.dumps(record, indent=1) + "\n")
    print("\n".join([f"written to {file}", *(f"skipped: {line}" for line in record["skipped"])]))
    if bad:
        sys.exit("\n".join(bad))


if __name__ == "__main__":
    main()
