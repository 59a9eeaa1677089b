"""Measures block sizes on this GPU and writes them into kernels/blocks.json under its name.

    python -m bench.tune [--only decode]

For each entry of the table every candidate is compiled, its result is checked and it is timed on one case of
the mission; the fastest that is right wins, and the entry in use stays where nothing beats it by 2 %.
Candidates that this chip has no room for drop out by themselves. Run it once for a kind of GPU and commit the
table.
"""

import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from itertools import product

import torch

from bench import CUDA, bench_kernels, first_line, hardware, parser
from bench.bench_kernels import decode, logprob, prefill, sampling
from kernels import backend


def grid(**values) -> list[dict[str, int]]:
    return [dict(zip(values, chosen)) for chosen in product(*values.values())]


def searches() -> dict[str, tuple[Callable, list[dict[str, int]]]]:
    """Entry of the table -> (maker of the case that decides, candidates)."""
    # The load of page ids takes a stage of every two: 3 keeps one block of keys in flight, 5 two, 7 three.
    decodes = grid(CHUNK=[256, 512, 1024], PROGRAMS=[2, 4, 8], BLOCK_N=[32, 64, 128], num_warps=[4],
                   num_stages=[3, 5, 7])
    prefills = grid(BLOCK_M=[64, 128], BLOCK_N=[64, 128], num_warps=[4, 8], num_stages=[3, 5])
    heads = grid(BLOCK_V=[128, 256], BLOCK_C=[64, 128], num_warps=[4, 8], num_stages=[3, 4, 5])
    picks = grid(BLOCK_C=[32, 64, 128, 256], num_warps=[4, 8, 16])
    rows = grid(BLOCK_N=[1024, 2048, 4096, 8192], num_warps=[4, 8, 16])
    spread = list(range(200, 14000, 216))[:64]
    return {
        "decode/2/128": (partial(decode, spread, 28, 4), decodes),
        "decode/2/64": (partial(decode, spread, 14, 2, 64), decodes),
        "prefill/2/128": (partial(prefill, [8192], [8192], 28, 4), prefills),
        "prefill/2/64": (partial(prefill, [8192], [8192], 14, 2, 64), prefills),
        "head_tiles/2/32": (partial(sampling, 32, 152064, 3584), heads),
        "head_tiles/2/128": (partial(sampling, 128, 152064, 3584), heads),
        "pick/2/8192": (partial(sampling, 128, 152064, 3584), picks),
        "row_stats/4/262144": (partial(logprob, 16384, 152064, 3584, False), rows),
        "row_gradient/2/262144": (partial(logprob, 16384, 152064, 3584, True), rows),
    }


def time_of(make: Callable) -> float:
    """Milliseconds of the case with the table as it is; inf if it does not run or its result is wrong."""
    torch.manual_seed(0)
    try:
        case = make()
        if not case.error(case.ours()) < case.tolerance:
            return float("inf")
        return statistics.median(bench_kernels.timed(case.ours) for _ in range(10))
    except Exception as e:  # no room on the chip: OutOfResources, or the compiler gives up
        print(f"    {first_line(e)}")
        return float("inf")


def search(key: str, make: Callable, candidates: list[dict], table: dict) -> dict[str, int]:
    """Tries the candidates in table[key] and returns the one to keep."""
    kernel, itemsize, size = key.split("/")
    used = backend.blocks(kernel, {"2": torch.bfloat16, "4": torch.float32}[itemsize], int(size))
    best, best_ms = used, time_of(make)
    print(f"{key}: {best_ms:.3f} ms with {used}", flush=True)
    for candidate in candidates:
        table[key] = candidate
        ms = time_of(make)
        if ms < best_ms * (0.98 if best is used else 1.0):
            best, best_ms = candidate, ms
            print(f"    {ms:.3f} ms with {candidate}", flush=True)
    return best


def render(table: dict) -> str:
    """JSON with an entry a line."""
    devices = [f'  {json.dumps(device)}: {{\n' + ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}"
                                                           for k, v in entries.items()) + "\n  }"
               for device, entries in table.items()]
    return "{\n" + ",\n".join(devices) + "\n}\n"


def main():
    options = parser(__doc__)
    options.add_argument("--only", default="", help="only entries whose name has this in it")
    args = options.parse_args()
    if not CUDA:
        sys.exit("tune measures a GPU, and torch sees none")
    hardware()
    table = backend.table()
    own = table.setdefault(backend.device_name(), {})
    for key, (make, candidates) in searches().items():
        if args.only in key:
            own[key] = search(key, make, candidates, own)
            backend.TABLE.write_text(render(table))


if __name__ == "__main__":
    main()
