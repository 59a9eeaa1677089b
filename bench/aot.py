"""Compiles every kernel for sm_80, sm_90 and sm_100, as its wrapper would launch it, on any machine:

    python -m bench.aot [--cases "decode 7B bfloat16"]

Prints registers, spills, shared memory and code size of each; without --cases writes them to
bench/results/aot.json too. The wrappers run on tensors without storage, a stand-in for the driver names the
target, and Triton's own launcher does the rest up to the launch, so that argument types, alignments and block
sizes are those of a real run. Exits with 1 if a kernel needs more shared memory than the chip has.
"""

import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from io import StringIO

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import KernelInterface

from bench import finish, hardware, parser
from kernels import attention, backend, logprob, sample

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block can have


class Driver:
    """What Triton's launcher asks of a driver before it launches."""
    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch  # the launcher's cache is per device

    def get_current_stream(self, device):
        return 0


# ---------------------------------------------------------------------- what is launched


def pages(kv_heads, dim, page_size, dtype):
    return (torch.empty(1024, page_size, kv_heads, dim, dtype=dtype), ) * 2


def decode(heads, kv_heads, dim, page_size, dtype):
    keys, values = pages(kv_heads, dim, page_size, dtype)
    table, context = torch.empty(64, 256, dtype=torch.int64), torch.empty(64, dtype=torch.int64)
    attention.PagedDecode(keys, table, context)(torch.empty(64, heads, dim, dtype=dtype), keys, values)


def prefill(heads, kv_heads, dim, page_size, dtype):
    keys, values = pages(kv_heads, dim, page_size, dtype)
    table = torch.empty(2, 256, dtype=torch.int64)
    plan = attention.PagedPrefill(keys, heads, table, [100, 1], [500, 7])
    plan(torch.empty(101, heads, dim, dtype=dtype), keys, values)


def write(heads, kv_heads, dim, page_size, dtype):
    q, k = torch.empty(64, heads, dim, dtype=dtype), torch.empty(64, kv_heads, dim, dtype=dtype)
    angles = torch.empty(64, 1, dim)
    attention.write_kv(q, k, k, angles, angles, torch.empty(64, dtype=torch.int64),
                       *pages(kv_heads, dim, page_size, dtype))


def head(rows, hidden, vocabulary, dtype):
    sample.head_draw(torch.empty(rows, hidden, dtype=dtype), torch.empty(vocabulary, hidden, dtype=dtype),
                     vocabulary - 400, torch.empty(rows, dtype=torch.float64), torch.empty(rows))


def rows(columns, dtype):
    logits, targets = torch.empty(64, columns), torch.empty(64, dtype=torch.int64)
    logprob.RowStats(64, logits.device).add_(logits, targets, 0.8)
    row = torch.empty(64)
    for entropy in (None, row):
        logprob.logit_gradient(logits, targets, row, row, row, row, entropy, 0.8, dtype)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = {  # query heads, KV heads, head dim, page size
    "0.5B": (14, 2, 64, 16), "7B": (28, 4, 128, 16), "32B": (40, 8, 128, 64), "dim 80": (8, 8, 80, 32),
    "dim 96": (8, 8, 96, 32)}
CASES = {
    f"{job.__name__} {shape} {str(dtype)[6:]}": (job, *SHAPES[shape], dtype)
    for job in (decode, prefill, write)
    for shape, dtype in (("0.5B", BF16), ("7B", BF16), ("32B", BF16), ("dim 80", FP16), ("dim 96", FP16),
                         ("7B", FP32))
} | {
    f"head {rows} rows {str(dtype)[6:]}": (head, rows, hidden, 152064, dtype)
    for rows, hidden, dtype in ((16, 3584, BF16), (64, 5120, BF16), (128, 3584, BF16), (128, 896, FP32))
} | {"logprob bfloat16": (rows, 8192, BF16), "logprob float32": (rows, 8192, FP32)}


# ---------------------------------------------------------------------- compiling

def compile_cases(arch: int, names: list[str]) -> list[dict]:
    """A row for each launch of each case. Changes Triton for the process that it runs in."""
    rows, logs = [], {}  # logs of ptxas, by the compiled kernel's hash

    def compile_only(kernel, grid):
        def run(*args, **options):
            with redirect_stdout(StringIO()) as log:
                compiled = kernel.warmup(*args, grid=grid, **options)
            if log.getvalue():  # nothing was compiled for a launch that was seen before
                logs[compiled.hash] = log.getvalue()
            log = logs[compiled.hash]
            rows.append({"case": name, "kernel": kernel.fn.__name__, "arch": arch,
                         "registers": int(re.search(r"Used (\d+) registers", log)[1]),
                         "spilled_bytes": int(re.search(r"(\d+) bytes spill stores", log)[1]),
                         "shared_bytes": compiled.metadata.shared, "warps": compiled.metadata.num_warps,
                         "code_bytes": len(compiled.asm["cubin"])})
        return run

    triton.runtime.driver.set_active(Driver(arch))
    triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
    KernelInterface.__getitem__, backend.fused = compile_only, lambda x: True
    for name in names:
        wrapper, *arguments = CASES[name]
        with torch.device("meta"):
            wrapper(*arguments)
    return rows


def main():
    options = parser(__doc__)
    options.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE",
                         help=f"out of: {', '.join(CASES)}")
    args = options.parse_args()
    if "TRITON_INTERPRET" in os.environ:
        sys.exit("bench.aot: TRITON_INTERPRET replaces the compiler by an interpreter: unset it")
    with ProcessPoolExecutor(min(len(SHARED_LIMIT), os.cpu_count())) as pool:  # an architecture each
        parts = list(pool.map(compile_cases, SHARED_LIMIT, [args.cases] * len(SHARED_LIMIT)))
    table = [row for name in args.cases for part in parts for row in part if row["case"] == name]
    print(f"{'case':26} {'kernel':14} arch  regs spills  shared warps   code")
    for r in table:
        print(f"{r['case']:26} {r['kernel']:14} {r['arch']:4} {r['registers']:5} {r['spilled_bytes']:6} "
              f"{r['shared_bytes']:7} {r['warps']:5} {r['code_bytes']:6}")
    finish({"bench": "aot", **hardware(), "triton": triton.__version__, "kernels": table},
           save=args.cases == list(CASES))
    if too_much := [r for r in table if r["shared_bytes"] > SHARED_LIMIT[r["arch"]]]:
        sys.exit(f"{len(too_much)} kernels need more shared memory than the chip has: {too_much}")


if __name__ == "__main__":
    main()
