"""The kernels against what a user would otherwise call.

    python -m bench.bench_kernels [--only NAME] [--smoke]

Each case first proves its result (relative error by norm, against fp64 of a few rows), then takes turns
with its peers: the median over the repeats, the second-level cache emptied before every call. Beside the time
stand the bytes that must move or the flops that must be done, as a share of what this device does in a plain
copy (bytes read and written) and a plain 8192^3 bf16 product, and the memory that a call needs beyond its
inputs.
Shapes are those of Qwen2.5-7B (28 query heads, 4 KV heads, head dim 128, hidden 3,584) and 32B (40, 8, 128,
5,120), vocabulary 152,064, bf16.

--slow_peers adds FlexAttention, which takes long to compile, and gathered pages.
--smoke runs small shapes, on a CPU in Triton's interpreter: it proves the program, its times mean nothing.
"""

import argparse
import json
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import bench.interpreter  # noqa: F401
from bench import hardware
from kernels import backend, linear_logprob
from kernels.attention import (
    PagedDecode,
    PagedPrefill,
    packed_attention,
    packed_reference,
    rotate,
    varlen,
    write_kv,
    write_reference,
)
from kernels.sample import head_draw

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
PAGE = 16
SLOW_PEERS = ("FlexAttention", "gather")  # compiled for each shape; one copies all contexts in each call


@dataclass
class Case:
    name: str
    ours: Callable
    peers: dict[str, Callable]  # those that cannot run here raise, and are reported so
    error: Callable  # what `ours` returned -> relative error
    tolerance: float
    bytes: int = 0  # that have to move
    flops: int = 0  # that have to be done
    apart: int = 0  # bytes of a result that everybody has to hold, not counted as extra memory
    bars: dict[str, tuple[str, float]] = field(default_factory=dict)  # name -> (figure, least value)


# ---------------------------------------------------------------------- measuring


def timed(function: Callable) -> float:
    """Milliseconds of one call, with the second-level cache full of something else."""
    if not CUDA:
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)
    timed.flush.zero_()
    torch.cuda._sleep(10**6)  # half a millisecond ahead: what is timed is the GPU, not Python's launching
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


timed.flush = torch.empty(256 * 2**20 if CUDA else 0, dtype=torch.int8, device=DEVICE)


def peak_bytes(function: Callable) -> int:
    """Memory that a call holds at its worst, beyond what was there before."""
    if not CUDA:
        function()
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(functions: dict[str, Callable], repeats: int) -> dict[str, dict]:
    """ms (median) and extra bytes of each function; a function that raises gets {"error": why}."""
    out, alive = {}, {}
    for name, function in functions.items():
        try:
            function()  # compiles
            out[name] = {"extra_bytes": peak_bytes(function)}
            alive[name] = function
        except Exception as e:  # a peer that this torch, or this GPU's memory, does not have
            out[name] = {"error": f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"[:160]}
            if name == "ours":
                raise
    times = {name: [] for name in alive}
    for _ in range(repeats):
        for name, function in alive.items():
            times[name].append(timed(function))
    for name, values in times.items():
        out[name]["ms"] = statistics.median(values)
    return out


def limits(smoke: bool) -> dict[str, float]:
    """Bytes a second of a plain copy, read and written, and flops a second of a plain product."""
    n, m = (2**20, 128) if smoke else (2**30, 8192)
    source, target = (torch.empty(n, dtype=torch.int8, device=DEVICE) for _ in range(2))
    a = torch.randn(m, m, device=DEVICE, dtype=torch.bfloat16)
    result = measure({"copy": lambda: target.copy_(source), "matmul": lambda: a @ a}, 3 if smoke else 20)
    return {"copy_bytes_per_s": 2e3 * n / result["copy"]["ms"],
            "matmul_flops_per_s": 2e3 * m**3 / result["matmul"]["ms"]}


def run(case: Case, limit: dict[str, float], repeats: int) -> dict:
    error = case.error(case.ours())
    measured = measure({"ours": case.ours, **case.peers}, repeats)
    for figures in measured.values():
        if "ms" in figures:
            figures["extra_bytes"] = max(0, figures["extra_bytes"] - case.apart)
    ours = measured.pop("ours")
    seconds = ours["ms"] / 1e3
    row = {"case": case.name, "error": error, "right": error < case.tolerance, "ours": ours,
           "peers": measured, "bytes": case.bytes, "flops": case.flops,
           "of_copy": case.bytes / seconds / limit["copy_bytes_per_s"],
           "of_matmul": case.flops / seconds / limit["matmul_flops_per_s"]}
    figures = {"of_copy": row["of_copy"], "right": float(row["right"])}
    for name, peer in measured.items():
        if "ms" in peer:
            figures[f"speedup over {name}"] = peer["ms"] / ours["ms"]
            # less is better
            figures[f"memory of {name}"] = -ours["extra_bytes"] / max(1, peer["extra_bytes"])
    row["bars"] = {bar: {"figure": figures.get(figure), "bound": bound,
                         "met": figure in figures and figures[figure] >= bound}
                   for bar, (figure, bound) in case.bars.items()}
    return row


def show(row: dict):
    ours = row["ours"]
    print(f"{row['case']}: {ours['ms']:.3f} ms, {100 * row['of_copy']:.0f} % of copy, "
          f"{100 * row['of_matmul']:.0f} % of matmul, {ours['extra_bytes'] / 2**20:.0f} MiB extra, error "
          f"{row['error']:.1e}{'' if row['right'] else ' WRONG'}")
    for name, peer in row["peers"].items():
        print(f"    {name}: " + (peer["error"] if "error" in peer else
                                 f"{peer['ms']:.3f} ms, {peer['ms'] / ours['ms']:.2f}x ours, "
                                 f"{peer['extra_bytes'] / 2**20:.0f} MiB extra"))
    for bar, x in row["bars"].items():
        print(f"    bar {bar}: {'met' if x['met'] else 'MISSED'} ({x['figure']} >= {x['bound']})")
    sys.stdout.flush()


# ---------------------------------------------------------------------- attention


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device=DEVICE, dtype=torch.float32).to(dtype)


def relative(x, expected) -> float:
    return ((x.double() - expected.double()).norm() / expected.double().norm()).item()


def paged(contexts: list[int], kv_heads: int, dim: int):
    """keys, values, table: random numbers in shuffled pages."""
    columns = [-(-n // PAGE) for n in contexts]
    keys, values = (normal(sum(columns) + 1, PAGE, kv_heads, dim) for _ in range(2))
    table = torch.zeros(len(contexts), max(columns), dtype=torch.int64)
    pages = (torch.randperm(sum(columns)) + 1).split(columns)
    for row, own in zip(table, pages):
        row[:len(own)] = own
    return keys, values, table.to(DEVICE)


def end_to_end(cache, table, contexts) -> list[torch.Tensor]:
    """The tokens (n, K, D) of each sequence."""
    return [cache[pages].flatten(0, 1)[:n] for pages, n in zip(table, contexts)]


def exact_row(q_HD, k_NKD, v_NKD):
    """Attention in fp64 of one query."""
    group = len(q_HD) // k_NKD.shape[1]
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k_NKD, v_NKD))
    weight_HN = (torch.einsum("hd,nhd->hn", q_HD.double(), k) / math.sqrt(q_HD.shape[-1])).softmax(-1)
    return torch.einsum("hn,nhd->hd", weight_HN, v)


def cumulative(lengths: list[int]) -> torch.Tensor:
    return F.pad(torch.tensor(lengths, device=DEVICE).cumsum(0), (1, 0)).int()


def flash(q, k, v, queries, contexts, causal, **pages) -> Callable:
    ends = cumulative(queries), cumulative(contexts)
    return lambda: varlen()(q, k, v, *ends, max(queries), max(contexts),
                            window_size=(-1, 0) if causal else (-1, -1), **pages)


flex = flex_attention if "--smoke" in sys.argv else torch.compile(flex_attention, dynamic=False)


def decode(name: str, contexts: list[int], heads: int, kv_heads: int, dim: int = 128, bars=()) -> Case:
    keys, values, table = paged(contexts, kv_heads, dim)
    q, rows = normal(len(contexts), heads, dim), len(contexts)
    context = torch.tensor(contexts, device=DEVICE)
    plan = PagedDecode(keys, table, context)
    k, v = (torch.nn.utils.rnn.pad_sequence(end_to_end(x, table, contexts), batch_first=True)
            .transpose(1, 2).contiguous() for x in (keys, values))
    seen = (torch.arange(k.shape[2], device=DEVICE) < context[:, None])[:, None, None]
    even = len({*contexts}) == 1

    def sdpa():
        return F.scaled_dot_product_attention(q[:, :, None], k, v, None if even else seen, enable_gqa=True)

    def gather_then_sdpa():
        k, v = (x.index_select(0, table.flatten()).view(rows, -1, kv_heads, dim).transpose(1, 2)
                for x in (keys, values))
        seen = (torch.arange(k.shape[2], device=DEVICE) < context[:, None])[:, None, None]
        return F.scaled_dot_product_attention(q[:, :, None], k, v, seen, enable_gqa=True)

    def error(out):
        shown = sorted({0, rows // 2, rows - 1, max(range(rows), key=contexts.__getitem__)})
        right = [exact_row(q[s], *(x[s, :, :contexts[s]].transpose(0, 1) for x in (k, v))) for s in shown]
        return relative(out[shown], torch.stack(right))

    peers = {"SDPA, contiguous" if even else "SDPA with a mask, contiguous": sdpa,
             "gather + SDPA with a mask": gather_then_sdpa,
             "varlen, paged": flash(q, keys, values, [1] * rows, contexts, False, seqused_k=context.int(),
                                    block_table=table.int())}
    if even and bars:  # it takes long to compile
        peers["FlexAttention, contiguous"] = lambda: flex(q[:, :, None], k, v, enable_gqa=True)
    moved = sum(contexts) * kv_heads * dim * 2 * 2 + 2 * q.nbytes
    return Case(f"decode {name}", lambda: plan(q, keys, values), peers, error, 1e-2, moved,
                4 * heads * dim * sum(contexts), bars=dict(bars))


def prefill(name: str, queries: list[int], contexts: list[int], heads: int, kv_heads: int, dim: int = 128,
            bars=()) -> Case:
    keys, values, table = paged(contexts, kv_heads, dim)
    q = normal(sum(queries), heads, dim)
    plan = PagedPrefill(keys, heads, table, queries, contexts)
    rows = [end_to_end(x, table, contexts) for x in (keys, values)]
    k, v = (torch.cat(x) for x in rows)
    peers = {"varlen flash, contiguous": flash(q, k, v, queries, contexts, True)}
    if queries == contexts:
        peers["SDPA, contiguous"] = lambda: packed_reference(q, k, v, queries)
    if queries == contexts and len({*queries}) == 1:
        n = queries[0]
        square = [x.view(-1, n, *x.shape[1:]).transpose(1, 2).contiguous() for x in (q, k, v)]
        causal = create_block_mask(lambda b, h, i, j: i >= j, None, None, n, n, device=DEVICE)
        peers["FlexAttention, contiguous"] = lambda: flex(*square, block_mask=causal, enable_gqa=True)

    def error(out):
        shown, right = sorted({0, sum(queries) // 2, sum(queries) - 1}), []
        for t in shown:
            s = next(i for i in range(len(queries)) if t < sum(queries[:i + 1]))
            n = contexts[s] - sum(queries[:s + 1]) + t + 1
            right.append(exact_row(q[t], rows[0][s][:n], rows[1][s][:n]))
        return relative(out[shown], torch.stack(right))

    pairs = sum(n * (2 * m - n + 1) // 2 for n, m in zip(queries, contexts))
    return Case(f"prefill {name}", lambda: plan(q, keys, values), peers, error, 1e-2,
                flops=4 * heads * dim * pairs, bars=dict(bars))


def training(name: str, lengths: list[int], heads: int, kv_heads: int, dim: int = 128) -> Case:
    """Forward and backward of packed causal attention: what training runs, and what it could run instead."""
    q, k, v = (normal(sum(lengths), n, dim).requires_grad_() for n in (heads, kv_heads, kv_heads))
    up = normal(sum(lengths), heads, dim)
    cu_seqlens = cumulative(lengths)
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(DEVICE)
    mask = create_block_mask(lambda b, h, i, j: (document[i] == document[j]) & (i >= j), None, None,
                             sum(lengths), sum(lengths), device=DEVICE)

    def both(function):
        return lambda: torch.autograd.grad(function(), (q, k, v), up)

    def flexible():
        return flex(*(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=mask,
                    enable_gqa=True)[0].transpose(0, 1)

    def error(gradients):  # in fp32 where its scores fit into memory
        dtype = torch.float32 if max(lengths) <= 2048 else torch.bfloat16
        out = packed_reference(*(x.to(dtype) for x in (q, k, v)), lengths)
        right = torch.autograd.grad(out, (q, k, v), up.to(dtype))
        return max(relative(x, y) for x, y in zip(gradients, right))

    peers = {"SDPA": both(lambda: packed_reference(q, k, v, lengths)), "FlexAttention": both(flexible)}
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    return Case(f"training attention {name}", both(lambda: packed_attention(q, k, v, lengths, cu_seqlens)),
                peers, error, 2e-2, flops=14 * heads * dim * pairs)


def write(name: str, tokens: int, heads: int, kv_heads: int, dim: int = 128) -> Case:
    both = normal(tokens, (heads + 2 * kv_heads), dim)
    q, k, v = both.split((heads, kv_heads, kv_heads), dim=1)
    angle = torch.randn(tokens, 1, dim // 2, device=DEVICE)
    cos, sin = torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)
    keys, values = (normal(-(-tokens // PAGE), PAGE, kv_heads, dim) for _ in range(2))
    slots = torch.randperm(len(keys) * PAGE, device=DEVICE)[:tokens]

    def error(out):
        right_q, right_k = rotate(*(x.double() for x in (q, k, cos, sin)))
        return max(relative(out, right_q), relative(keys.view(-1, kv_heads, dim)[slots], right_k))

    given = q, k, v, cos, sin, slots, keys, values
    return Case(f"rotate and write {name}", lambda: write_kv(*given),
                {"rotate, then scatter": lambda: write_reference(*given)}, error, 1e-2,
                both.nbytes * 2 + cos.nbytes)


# ---------------------------------------------------------------------- the LM head


def head(tokens: int, vocabulary: int, hidden: int):
    return normal(tokens, hidden), normal(vocabulary, hidden) / math.sqrt(hidden) * 3


def unfused(h, w, targets, temperature, entropy=True):
    logits = (h @ w.T).float() / temperature
    logp = torch.log_softmax(logits, -1)
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1) if entropy else None


def liger(h, w, targets):
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    return LigerFusedLinearCrossEntropyFunction.apply(h, w, targets)[0]


def logprob(name: str, tokens: int, vocabulary: int, hidden: int, backward: bool, bars=()) -> Case:
    h, w = head(tokens, vocabulary, hidden)
    targets = torch.randint(vocabulary, (tokens, ), device=DEVICE)
    up = torch.randn(tokens, device=DEVICE)
    if backward:
        h, w = h.requires_grad_(), w.requires_grad_()

    def run_of(function, scale=up):
        return (lambda: torch.autograd.grad(function(), (h, w), scale)) if backward else function

    def error(result):
        shown = [0, tokens // 2, tokens - 1]
        z = h.detach()[shown].double() @ w.detach().double().T / 0.8
        if not backward:
            return relative(result[0][shown], torch.log_softmax(z, -1).gather(-1, targets[shown, None])[:, 0])
        one = F.one_hot(targets[shown], vocabulary)
        return relative(result[0][shown], up[shown, None] * (one - z.softmax(-1)) @ w.detach().double() / 0.8)

    peers = {
        "unfused": run_of(lambda: unfused(h, w, targets, 0.8, entropy=not backward)[0]),
        "linear_cross_entropy": run_of(lambda: F.linear_cross_entropy(h, w, targets, reduction="none")),
        "Liger's mean loss": run_of(lambda: liger(h, w, targets), torch.ones((), device=DEVICE)),
    }
    if not backward:  # there the first is without entropy too
        peers["unfused, without entropy"] = lambda: unfused(h, w, targets, 0.8, entropy=False)[0]
    ours = (lambda: linear_logprob(h, w, targets, 0.8)[0]) if backward else (
        lambda: linear_logprob(h, w, targets, 0.8))
    product = 2 * tokens * vocabulary * hidden
    return Case(f"logprob {name}, {'forward + backward' if backward else 'forward'}", run_of(ours), peers,
                error, 2e-2 if backward else 1e-3, flops=(8 if backward else 2) * product,
                apart=w.nbytes if backward else 0, bars=dict(bars))


def sampling(name: str, rows: int, vocabulary: int, hidden: int, bars=()) -> Case:
    h, w = head(rows, vocabulary, hidden)
    u = torch.rand(rows, dtype=torch.float64, device=DEVICE)
    temperature = torch.full((rows, ), 0.8, device=DEVICE)

    def multinomial():
        logp = torch.log_softmax((h @ w.T).float() / temperature[:, None], -1)
        token = torch.multinomial(logp.exp(), 1)
        return token, logp.gather(-1, token)

    def error(result):
        logp = torch.log_softmax(h.double() @ w.double().T / 0.8, -1)
        cdf = logp.exp().cumsum(-1).gather(-1, result[0][:, None])[:, 0]
        own = logp.gather(-1, result[0][:, None])[:, 0]
        outside = torch.maximum(u - cdf, cdf - own.exp() - u).clamp(min=0)  # how far u is from the id's piece
        return max(relative(result[1], own), outside.max().item())

    return Case(f"sampling head {name}, {rows} rows",
                lambda: head_draw(h, w, vocabulary, u, temperature),
                {"logits + softmax + multinomial": multinomial}, error, 1e-3, w.nbytes + h.nbytes,
                2 * rows * vocabulary * hidden, bars=dict(bars))


# ---------------------------------------------------------------------- all of them


def smoke_cases() -> list[partial]:
    return [
        partial(decode, "smoke", [70, 70], 4, 2, 16, {"any": ("right", 1)}),
        partial(decode, "smoke, mixed", [70, 1, 33], 4, 2, 16),
        partial(prefill, "smoke", [40] * 2, [40] * 2, 4, 2, 16),
        partial(prefill, "smoke, chunk", [5, 1], [40, 9], 4, 2, 16),
        partial(training, "smoke", [20, 12], 4, 2, 16), partial(write, "smoke", 9, 4, 2, 16),
        partial(logprob, "smoke", 8, 300, 64, False), partial(logprob, "smoke", 8, 300, 64, True),
        partial(sampling, "smoke", 5, 300, 64)
    ]


def cases() -> list[partial]:
    """Makers of cases: all of them together would not fit into memory."""
    made = []
    for model, heads, hidden in (("7B", (28, 4), 3584), ("32B", (40, 8), 5120)):
        for batch in (1, 8, 64, 256):
            for k in (1, 8, 16):
                if batch * k <= 64 * 16:  # more is no GPU's pool
                    bars = {"85 % of copy": ("of_copy", 0.85)} if (batch, k) == (64, 8) else {}
                    name = f"{model} {batch} x {k}k"
                    made.append(partial(decode, name, [1024 * k] * batch, *heads, bars=bars))
        made += [
            # decode batches of an RL step: one long sample among short ones, and a wide spread
            partial(decode, f"{model} 63 x 512 and one of 14k", [512] * 63 + [14000], *heads),
            partial(decode, f"{model} 64 of 200 to 14k", list(range(200, 14000, 216))[:64], *heads),
            partial(prefill, f"{model} 8k", [8192], [8192], *heads,
                    bars={"0.75 of flash": ("speedup over varlen flash, contiguous", 0.75)}),
            partial(prefill, f"{model} 4 x 8k", [8192] * 4, [8192] * 4, *heads),
            partial(prefill, f"{model} 512 after 8k and 32 decode rows", [512] + [1] * 32,
                    [8704] + [4096] * 32, *heads),
            partial(training, f"{model} 2 x 8k", [8192] * 2, *heads),
            partial(training, f"{model} 16 x 1k", [1024] * 16, *heads)
        ]
        made += [partial(write, f"{model} {tokens} tokens", tokens, *heads) for tokens in (64, 8192)]
        for backward, bound in ((False, 1.05), (True, 1.35)):
            bars = {f"{bound} of unfused's time": ("speedup over unfused", 1 / bound),
                    "a tenth of its memory": ("memory of unfused", -0.1)}
            made.append(partial(logprob, model, 16384, 152064, hidden, backward, bars))
            if backward:  # as training runs it: over the ids that the tokenizer has
                made.append(partial(logprob, f"{model}, 151,665 ids", 16384, 151665, hidden, True))
        for rows in (1, 16, 64, 128, 256):
            bars = {"1.3x": ("speedup over logits + softmax + multinomial", 1.3)} if rows == 128 else {}
            made.append(partial(sampling, model, rows, 152064, hidden, bars))
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only cases whose name has this in it")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--smoke", action="store_true", help="small shapes, on a CPU in Triton's interpreter")
    parser.add_argument("--no_peers", action="store_true", help="our kernels alone")
    parser.add_argument("--slow_peers", action="store_true", help="FlexAttention and gathered pages too")
    parser.add_argument("--out", default="", help="JSON file for the result")
    args = parser.parse_args()
    if not args.smoke and not CUDA:
        sys.exit("bench_kernels measures a GPU, and torch sees none: --smoke proves the program at least")
    if args.smoke and not CUDA:
        backend.fused = lambda x: True
    torch.manual_seed(0)
    result = {"bench": "kernels", **hardware(), "triton": backend.triton.__version__}
    result |= limits(args.smoke)
    print(f"copy {result['copy_bytes_per_s'] / 1e12:.2f} TB/s, matmul "
          f"{result['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s", flush=True)
    result["cases"], failed = [], []
    for make in smoke_cases() if args.smoke else cases():
        name = f"{make.func.__name__} {make.args[0]}"
        if args.only not in name:
            continue
        try:
            case = make()
            if args.no_peers:
                case.peers, case.bars = {}, {}
            if not args.slow_peers:
                case.peers = {k: v for k, v in case.peers.items() if not k.startswith(SLOW_PEERS)}
            row = run(case, result, 1 if args.smoke else args.repeats)
            del case
            show(row)
            result["cases"].append(row)
            failed += [] if row["right"] else [f"{row['case']} is wrong"]
        except Exception as e:  # the other cases are measured all the same
            traceback.print_exc()
            failed.append(f"{name}: {type(e).__name__}")
        torch.compiler.reset()  # else FlexAttention, compiled for many shapes, falls back to unfused
        if CUDA:
            torch.cuda.empty_cache()
        if args.out:  # after each case: what is measured stays
            Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
