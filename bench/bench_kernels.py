"""The kernels against what a user would otherwise call.

    python -m bench.bench_kernels [--only NAME] [--smoke] [--no_peers]

Each case first proves its result (relative error by norm, against fp64 of a few rows), then takes turns
with its peers: the median of 30 calls, the second-level cache emptied before each. Beside the time stand
the bytes that must move or the flops that must be done, as a share of what this device does in a plain copy
(bytes read and written) and a plain 8192^3 bf16 product, and the memory that a call needs beyond its inputs.
Shapes are those of Qwen2.5-7B (28 query heads, 4 KV heads, head dim 128, hidden 3,584) and 32B (40, 8, 128,
5,120), vocabulary 152,064, bf16. A peer that this torch or this GPU's memory does not have is reported so.

--smoke runs small shapes, on a CPU in Triton's interpreter: it proves the program, its times mean nothing.
"""

import math
import statistics
import sys
import traceback
from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F

import bench.interpreter  # noqa: F401
from bench import CUDA, finish, first_line, hardware, now, parser
from kernels import attention, backend, linear_logprob
from kernels.sample import head_draw

DEVICE, PAGE = "cuda" if CUDA else "cpu", 16
sdpa = partial(F.scaled_dot_product_attention, enable_gqa=True)


@dataclass
class Case:
    ours: Callable
    peers: dict[str, Callable]
    error: Callable  # what `ours` returned -> relative error
    tolerance: float
    bytes: int = 0  # that have to move
    flops: int = 0  # that have to be done
    apart: int = 0  # bytes of a result that everybody has to hold, not counted as extra memory


BARS = {  # case, without its model -> figure of `run` -> least value
    "decode 64 x 8k": {"of_copy": 0.85},
    "prefill 8k": {"speedup over varlen flash, contiguous": 0.75},
    "logprob, forward": {"speedup over unfused": 1 / 1.05, "memory saving over unfused": 10},
    "logprob, forward + backward": {"speedup over unfused": 1 / 1.35, "memory saving over unfused": 10},
    "sampling, 128 rows": {"speedup over logits + softmax + multinomial": 1.3},
    "decode 2 x 70": {"right": 1}}


# ---------------------------------------------------------------------- measuring

FLUSH = torch.empty(256 * 2**20 if CUDA else 0, dtype=torch.int8, device=DEVICE)


def timed(function: Callable) -> float:
    """Milliseconds of one call, with the second-level cache full of something else."""
    if not CUDA:
        start = now()
        function()
        return 1e3 * (now() - start)
    FLUSH.zero_()
    torch.cuda._sleep(10**6)  # half a millisecond ahead: what is timed is the GPU, not Python's launching
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_bytes(function: Callable) -> int:
    """Memory that a call holds at its worst, beyond what was there before."""
    if not CUDA:
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(functions: dict[str, Callable], repeats: int, apart: int = 0) -> dict[str, dict]:
    """ms (median) and extra bytes of each function; a function that raises gets {"error": why}."""
    out, times = {}, {}
    for name, function in functions.items():
        try:
            function()  # compiles
            out[name] = {"extra_bytes": max(0, peak_bytes(function) - apart)}
            times[name] = []
        except Exception as e:
            out[name] = {"error": first_line(e)}
    for _ in range(repeats):
        for name, values in times.items():
            values.append(timed(functions[name]))
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


def run(name: str, case: Case, limit: dict[str, float], repeats: int) -> dict:
    """Measures a case; prints and returns its figures."""
    error = case.error(case.ours())
    peers = measure({"ours": case.ours, **case.peers}, repeats, case.apart)
    ours = peers.pop("ours")
    figures = {"right": float(error < case.tolerance),
               "of_copy": 1e3 * case.bytes / ours["ms"] / limit["copy_bytes_per_s"],
               "of_matmul": 1e3 * case.flops / ours["ms"] / limit["matmul_flops_per_s"]}
    print(f"{name}: {ours['ms']:.3f} ms, {100 * figures['of_copy']:.0f} % of copy, "
          f"{100 * figures['of_matmul']:.0f} % of matmul, {ours['extra_bytes'] / 2**20:.0f} MiB extra, "
          f"error {error:.1e}{'' if figures['right'] else ' WRONG'}")
    row = {"case": name, "error": error, "ours": ours, "peers": peers, **figures}
    for peer, its in peers.items():
        said = its.get("error")
        if not said:
            figures[f"speedup over {peer}"] = speedup = its["ms"] / ours["ms"]
            figures[f"memory saving over {peer}"] = its["extra_bytes"] / max(1, ours["extra_bytes"])
            said = f"{its['ms']:.3f} ms, {speedup:.2f}x ours, {its['extra_bytes'] / 2**20:.0f} MiB extra"
        print(f"    {peer}: {said}")
    row["bars"] = {}
    for bar, bound in BARS.get(name.split(" ", 1)[1], {}).items():
        value = figures.get(bar)
        met = value is not None and value >= bound
        row["bars"][bar] = {"figure": value, "bound": bound, "met": met}
        print(f"    bar {bar}: {'met' if met else 'MISSED'} ({value} >= {bound})")
    return row


# ---------------------------------------------------------------------- attention


def normal(*shape):
    return torch.randn(shape, device=DEVICE).bfloat16()


def relative(x, expected) -> float:
    return ((x.double() - expected.double()).norm() / expected.double().norm()).item()


def paged(contexts: list[int], kv_heads: int, dim: int):
    """keys, values, table: random numbers in shuffled pages."""
    columns = [-(-n // PAGE) for n in contexts]
    keys, values = (normal(sum(columns) + 1, PAGE, kv_heads, dim) for _ in range(2))
    pages = (torch.randperm(sum(columns)) + 1).split(columns)
    table = torch.nn.utils.rnn.pad_sequence(pages, batch_first=True)
    return keys, values, table.to(DEVICE)


def end_to_end(cache, table, contexts) -> list[torch.Tensor]:
    """The tokens (n, K, D) of each sequence."""
    return [cache[pages].flatten(0, 1)[:n] for pages, n in zip(table, contexts)]


def paged_case(plan: Callable, peers: dict[str, Callable], q_THD, keys, values, table, queries: list[int],
               contexts: list[int]) -> Case:
    """A case of attention over pages; its error is that of the first, middle and last query."""
    ends, shown = list(accumulate(queries)), sorted({0, len(q_THD) // 2, len(q_THD) - 1})

    def exact(t: int):
        s = bisect(ends, t)  # the sequence of query t
        n = contexts[s] - ends[s] + t + 1  # tokens that it sees
        k, v = (x[table[s]].flatten(0, 1)[:n].transpose(0, 1).double() for x in (keys, values))
        return sdpa(q_THD[None, t, :, None].double(), k[None], v[None])[0, :, 0]

    pairs = sum(n * (2 * m - n + 1) // 2 for n, m in zip(queries, contexts))
    return Case(lambda: plan(q_THD, keys, values), peers,
                lambda out: relative(out[shown], torch.stack([exact(t) for t in shown])), 1e-2,
                bytes=2 * (sum(contexts) * keys[0, 0].nbytes + q_THD.nbytes),
                flops=4 * q_THD[0].numel() * pairs)


def cumulative(lengths: list[int]) -> torch.Tensor:
    return F.pad(torch.tensor(lengths, device=DEVICE).cumsum(0), (1, 0)).int()


def flash(q, k, v, queries: list[int], contexts: list[int], window=(-1, 0), **pages) -> Callable:
    ends = cumulative(queries), cumulative(contexts)
    return lambda: attention.varlen()(q, k, v, *ends, max(queries), max(contexts), window_size=window,
                                      **pages)


def decode(contexts: list[int], heads: int, kv_heads: int, dim: int = 128) -> Case:
    """SDPA reads contiguous keys and values, under a mask where lengths differ."""
    keys, values, table = paged(contexts, kv_heads, dim)
    q, context = normal(len(contexts), heads, dim), torch.tensor(contexts, device=DEVICE)
    plan, queries = attention.PagedDecode(keys, table, context), [1] * len(contexts)
    k, v = (torch.nn.utils.rnn.pad_sequence(end_to_end(x, table, contexts), batch_first=True)
            .transpose(1, 2).contiguous() for x in (keys, values))
    seen = (torch.arange(k.shape[2], device=DEVICE) < context[:, None])[:, None, None]
    mask = None if seen.all() else seen
    peers = {"SDPA, contiguous": partial(sdpa, q[:, :, None], k, v, mask),
             "varlen, paged": flash(q, keys, values, queries, contexts, (-1, -1),
                                    seqused_k=context.int(), block_table=table.int())}
    return paged_case(plan, peers, q, keys, values, table, queries, contexts)


def prefill(queries: list[int], contexts: list[int], heads: int, kv_heads: int, dim: int = 128) -> Case:
    keys, values, table = paged(contexts, kv_heads, dim)
    q = normal(sum(queries), heads, dim)
    plan = attention.PagedPrefill(keys, heads, table, queries, contexts)
    k, v = (torch.cat(end_to_end(x, table, contexts)) for x in (keys, values))
    peers = {"varlen flash, contiguous": flash(q, k, v, queries, contexts)}
    if queries == contexts:
        peers["SDPA, contiguous"] = lambda: attention.packed_reference(q, k, v, queries)
    return paged_case(plan, peers, q, keys, values, table, queries, contexts)


def training(lengths: list[int], heads: int, kv_heads: int, dim: int = 128) -> Case:
    """Forward and backward of packed causal attention: what training runs, and what it could run instead."""
    q, k, v = (normal(sum(lengths), n, dim).requires_grad_() for n in (heads, kv_heads, kv_heads))
    up = normal(sum(lengths), heads, dim)
    packed = partial(attention.packed_attention, cu_seqlens=cumulative(lengths))

    def gradients(attend: Callable, dtype=torch.bfloat16):
        out = attend(*(x.to(dtype) for x in (q, k, v)), lengths)
        return torch.autograd.grad(out, (q, k, v), up.to(dtype))

    def error(found):  # against fp32 where its scores fit into memory
        dtype = torch.float32 if max(lengths) <= 2048 else torch.bfloat16
        return max(map(relative, found, gradients(attention.packed_reference, dtype)))

    pairs = sum(n * (n + 1) // 2 for n in lengths)
    return Case(partial(gradients, packed), {"SDPA": partial(gradients, attention.packed_reference)}, error,
                2e-2, flops=14 * heads * dim * pairs)


def write(tokens: int, heads: int, kv_heads: int, dim: int = 128) -> Case:
    """RoPE, and keys and values into their pages."""
    both = normal(tokens, heads + 2 * kv_heads, dim)
    q, k, v = both.split((heads, kv_heads, kv_heads), dim=1)
    angle = torch.randn(tokens, 1, dim // 2, device=DEVICE)
    cos, sin = torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)
    keys, values = (normal(-(-tokens // PAGE), PAGE, kv_heads, dim) for _ in range(2))
    slots = torch.randperm(len(keys) * PAGE, device=DEVICE)[:tokens]
    given = q, k, v, cos, sin, slots, keys, values

    def error(out):
        right_q, right_k = attention.rotate(*(x.double() for x in (q, k, cos, sin)))
        return max(relative(out, right_q), relative(keys.view(-1, kv_heads, dim)[slots], right_k))

    return Case(lambda: attention.write_kv(*given),
                {"rotate, then scatter": lambda: attention.write_reference(*given)}, error, 1e-2,
                bytes=both.nbytes * 2 + cos.nbytes)


# ---------------------------------------------------------------------- the LM head


def head(tokens: int, vocabulary: int, hidden: int):
    return normal(tokens, hidden), normal(vocabulary, hidden) / math.sqrt(hidden) * 3


def logprob(tokens: int, vocabulary: int, hidden: int, backward: bool) -> Case:
    """Log-probability and entropy; backward: of the log-probability alone, as training runs it."""
    h, w = (x.requires_grad_(backward) for x in head(tokens, vocabulary, hidden))
    targets = torch.randint(vocabulary, (tokens, ), device=DEVICE)
    up = torch.randn(tokens, device=DEVICE)

    def unfused():
        logp = torch.log_softmax((h @ w.T).float() / 0.8, -1)
        return logp.gather(-1, targets[:, None])[:, 0], None if backward else -(logp.exp() * logp).sum(-1)

    def gradients(logp: Callable):
        return torch.autograd.grad(logp(), (h, w), up)

    def error(result):
        shown = [0, tokens // 2, tokens - 1]
        w_64 = w.detach().double()
        logp = torch.log_softmax(h.detach()[shown].double() @ w_64.T / 0.8, -1)
        if not backward:
            return relative(result[shown], logp.gather(-1, targets[shown, None])[:, 0])
        one = F.one_hot(targets[shown], vocabulary)
        return relative(result[0][shown], up[shown, None] * (one - logp.exp()) @ w_64 / 0.8)

    run = {"ours": lambda: linear_logprob(h, w, targets, 0.8)[0], "unfused": lambda: unfused()[0],
           "linear_cross_entropy": lambda: F.linear_cross_entropy(h, w, targets, reduction="none")}
    product = 2 * tokens * vocabulary * hidden
    if not backward:
        return Case(run.pop("ours"), run, error, 1e-3, flops=product)
    run = {name: partial(gradients, logp) for name, logp in run.items()}
    return Case(run.pop("ours"), run, error, 2e-2, flops=4 * product, apart=w.nbytes)


def sampling(rows: int, vocabulary: int, hidden: int) -> Case:
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

    return Case(lambda: head_draw(h, w, vocabulary, u, temperature),
                {"logits + softmax + multinomial": multinomial}, error, 1e-3, bytes=w.nbytes + h.nbytes,
                flops=2 * rows * vocabulary * hidden)


# ---------------------------------------------------------------------- all of them


def smoke_cases() -> dict[str, Callable]:
    made = {
        "decode 2 x 70": partial(decode, [70, 70], 4, 2, 16),
        "decode, mixed": partial(decode, [70, 1, 33], 4, 2, 16),
        "prefill": partial(prefill, [40] * 2, [40] * 2, 4, 2, 16),
        "prefill, chunk": partial(prefill, [5, 1], [40, 9], 4, 2, 16),
        "training": partial(training, [20, 12], 4, 2, 16),
        "write": partial(write, 9, 4, 2, 16),
        "logprob, forward of 8": partial(logprob, 8, 300, 64, False),
        "logprob, forward + backward of 8": partial(logprob, 8, 300, 64, True),
        "sampling, 5 rows": partial(sampling, 5, 300, 64)}
    return {f"smoke {name}": make for name, make in made.items()}


def cases() -> dict[str, Callable]:
    """Makers of cases by name, which begins with the model: all cases together would not fit into memory."""
    made = {}
    for model, heads, hidden in (("7B", (28, 4), 3584), ("32B", (40, 8), 5120)):
        own = {
            **{f"decode {batch} x {k}k": partial(decode, [1024 * k] * batch, *heads)
               for batch in (1, 8, 64, 256) for k in (1, 8, 16)
               if batch * k <= 64 * 16},  # more is no GPU's pool
            # decode batches of an RL step: one long sample among short ones, and a wide spread
            "decode 63 x 512 and one of 14k": partial(decode, [512] * 63 + [14000], *heads),
            "decode 64 of 200 to 14k": partial(decode, list(range(200, 14000, 216))[:64], *heads),
            "prefill 8k": partial(prefill, [8192], [8192], *heads),
            "prefill 4 x 8k": partial(prefill, [8192] * 4, [8192] * 4, *heads),
            "prefill 512 after 8k, and 32 rows of 4k": partial(
                prefill, [512] + [1] * 32, [8704] + [4096] * 32, *heads),
            "training 2 x 8k": partial(training, [8192] * 2, *heads),
            "training 16 x 1k": partial(training, [1024] * 16, *heads),
            **{f"write {tokens} tokens": partial(write, tokens, *heads) for tokens in (64, 8192)},
            "logprob, forward": partial(logprob, 16384, 152064, hidden, False),
            "logprob, forward + backward": partial(logprob, 16384, 152064, hidden, True),
            # as training runs it: over the ids that the tokenizer has
            "logprob, forward + backward, 151,665 ids": partial(logprob, 16384, 151665, hidden, True),
            **{f"sampling, {rows} rows": partial(sampling, rows, 152064, hidden)
               for rows in (1, 16, 64, 128, 256)}}
        made |= {f"{model} {name}": make for name, make in own.items()}
    return made


def main():
    options = parser(__doc__)
    options.add_argument("--only", default="", help="only cases whose name has this in it")
    options.add_argument("--smoke", action="store_true", help="small shapes, on any machine")
    options.add_argument("--no_peers", action="store_true", help="our kernels alone")
    args = options.parse_args()
    if not args.smoke and not CUDA:
        sys.exit("bench_kernels measures a GPU, and torch sees none: --smoke proves the program at least")
    if not CUDA:
        backend.fused = lambda x: True
    torch.manual_seed(0)
    result = {"bench": "kernels", **hardware(), "triton": backend.triton.__version__, **limits(args.smoke)}
    print(f"copy {result['copy_bytes_per_s'] / 1e12:.2f} TB/s, matmul "
          f"{result['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s", flush=True)
    result["cases"], failed = [], []
    for name, make in (smoke_cases() if args.smoke else cases()).items():
        if args.only not in name:
            continue
        try:
            case = make()
            if args.no_peers:
                case.peers = {}
            row = run(name, case, result, 1 if args.smoke else 30)
            result["cases"].append(row)
            failed += [] if row["right"] else [f"{name} is wrong"]
        except Exception as e:  # the other cases are measured all the same
            traceback.print_exc()
            failed.append(f"{name}: {first_line(e)}")
        case = None
        torch.cuda.empty_cache()
    finish(result)
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
