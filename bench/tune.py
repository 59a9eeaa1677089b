"""Measures block sizes on this GPU and writes them into kernels/blocks.json under its name.

    python -m bench.tune [--only decode] [--dry]

For each entry of the table every candidate is compiled, its result is checked and it is timed on one case of
the mission; the fastest that is right wins, and the entry in use stays where nothing beats it by 2 %.
Candidates that this chip has no room for drop out by themselves. Run it once for a kind of GPU and commit the
table.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from itertools import product

import torch

from bench import bench_kernels as cases
from bench import hardware
from kernels import backend

BF16, FP32 = torch.bfloat16, torch.float32


def grid(**values) -> list[dict[str, int]]:
    return [dict(zip(values, chosen)) for chosen in product(*values.values())]


def searches() -> dict[str, tuple[Callable, list[dict[str, int]]]]:
    """Entry of the table -> (maker of the case that decides, candidates)."""
    # The load of page ids takes a stage of every two: 3 keeps one block of keys in flight, 5 two, 7 three.
    decode = grid(CHUNK=[256, 512, 1024], PROGRAMS=[2, 4, 8], BLOCK_N=[32, 64, 128], num_warps=[4],
                  num_stages=[3, 5, 7])
    prefill = grid(BLOCK_M=[64, 128], BLOCK_N=[64, 128], num_warps=[4, 8], num_stages=[3, 5])
    head = grid(BLOCK_V=[128, 256], BLOCK_C=[64, 128], num_warps=[4, 8], num_stages=[3, 4, 5])
    row = grid(BLOCK_N=[1024, 2048, 4096, 8192], num_warps=[4, 8, 16])
    spread = list(range(200, 14000, 216))[:64]
    return {
        "decode/2/128": (partial(cases.decode, "tune", spread, 28, 4), decode),
        "decode/2/64": (partial(cases.decode, "tune", spread, 14, 2, 64), decode),
        "prefill/2/128": (partial(cases.prefill, "tune", [8192], [8192], 28, 4), prefill),
        "prefill/2/64": (partial(cases.prefill, "tune", [8192], [8192], 14, 2, 64), prefill),
        "head_tiles/2/32": (partial(cases.sampling, "tune", 32, 152064, 3584), head),
        "head_tiles/2/128": (partial(cases.sampling, "tune", 128, 152064, 3584), head),
        "pick/2/8192": (partial(cases.sampling, "tune", 128, 152064, 3584),
                        grid(BLOCK_C=[32, 64, 128, 256], num_warps=[4, 8, 16])),
        "row_stats/4/262144": (partial(cases.logprob, "tune", 16384, 152064, 3584, False), row),
        "row_gradient/2/262144": (partial(cases.logprob, "tune", 16384, 152064, 3584, True), row)
    }


def time_of(make: Callable, repeats: int) -> float:
    """Milliseconds of the case with the table as it is; inf if it does not run or its result is wrong."""
    try:
        case = make()
        if not case.error(case.ours()) < case.tolerance:
            return float("inf")
        return statistics.median(cases.timed(case.ours) for _ in range(repeats))
    except Exception as e:  # no room on the chip: OutOfResources, or the compiler gives up
        print(f"    {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"[:110])
        return float("inf")


def search(key: str, make: Callable, candidates: list[dict], table: dict, repeats: int) -> dict[str, int]:
    """Tries the candidates in table[key] and returns the one to keep."""
    kernel, itemsize, size = key.split("/")
    used = backend.blocks(kernel, {"2": BF16, "4": FP32}[itemsize], int(size))
    torch.manual_seed(0)
    best, best_ms = used, time_of(make, repeats)
    print(f"{key}: {best_ms:.3f} ms with {used}", flush=True)
    for candidate in candidates:
        table[key] = candidate
        torch.manual_seed(0)
        ms = time_of(make, repeats)
        if ms < best_ms * (0.98 if best is used else 1.0):
            best, best_ms = candidate, ms
            print(f"    {ms:.3f} ms with {candidate}", flush=True)
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only entries whose name has this in it")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--dry", action="store_true", help="print the table instead of writing it")
    args = parser.parse_args()
    if not cases.CUDA:
        sys.exit("tune measures a GPU, and torch sees none")
    hardware()
    everything = backend.table()
    own = everything.setdefault(backend.device_name(), {})
    for key, (make, candidates) in searches().items():
        if args.only in key:
            own[key] = search(key, make, candidates, own, args.repeats)
            text = render(everything)
            if args.dry:
                print(text)
            else:
                backend.TABLE.write_text(text)


def render(table: dict) -> str:
    """JSON with an entry a line."""
    devices = [f'  {json.dumps(device)}: {{\n' + ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}"
                                                           for k, v in entries.items()) + "\n  }"
               for device, entries in table.items()]
    return "{\n" + ",\n".join(devices) + "\n}\n"


if __name__ == "__main__":
    main()
