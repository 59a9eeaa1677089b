"""Log-probability and entropy of given tokens under an LM head, without ever holding T x V logits.

Shapes: T tokens, C hidden, V vocabulary.

The T x V logits of a 14,000-token sample with Qwen2.5's head are 8.5 GB in fp32, and a naive backward holds
several of them. Here both directions walk over chunks of the vocabulary (`CHUNK_BYTES` of logits): forward
keeps an online log-sum-exp of each row, backward recomputes the chunk's logits and turns them into their
gradient in place. Without the kernels, on a CPU, the products are slow and memory is plentiful: forward keeps
the chunks' exponentials, up to `KEPT_BYTES`. Chunks of the vocabulary, not of tokens: the weight's gradient
is then written once, a chunk's rows at a time, where it would be read and written as a whole for each chunk
of tokens. The matrix products are cuBLAS's; two kernels do what lies between them, one pass over a chunk
each. No atomics: the result is the same, bit for bit, every time.
"""

from __future__ import annotations

import torch

from kernels import backend
from kernels.backend import tl, triton

CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}  # of fp32 logits at a time
KEPT_BYTES = 4 * 2**30  # of fp32 exponentials, the most that forward keeps for backward without the kernels


def matmul_fp32(a_TC: torch.Tensor, weight_VC: torch.Tensor, out=None) -> torch.Tensor:
    """a @ weight.T with fp32 accumulation and an fp32 result, perhaps in the memory of `out`: bf16 logits
    would round log-probabilities by up to 2^-8 relative."""
    if a_TC.is_cuda and a_TC.dtype != torch.float32:
        return torch.mm(a_TC, weight_VC.T, out_dtype=torch.float32)
    return torch.mm(a_TC.float(), weight_VC.float().T, out=out)


def chunks(rows: int, vocabulary: int, device: torch.device) -> list[slice]:
    width = max(1, CHUNK_BYTES[device.type] // (4 * max(1, rows)))
    width = width // 128 * 128 or width
    edges = [*range(0, vocabulary, width), vocabulary]
    if device.type == "cuda" and vocabulary > 8 and vocabulary % 8:
        # Tensor cores want rows of 16 bytes: an odd vocabulary's last few ids are a chunk of their own.
        edges = sorted({*edges, vocabulary // 8 * 8})
    return [slice(a, b) for a, b in zip(edges, edges[1:])]


# ---------------------------------------------------------------------- a chunk of logits


class RowStats:
    """Online softmax statistics of each row over the chunks seen so far, of logits over temperature z:

        peak = max z    total = sum exp(z - peak)    weighted = sum exp(z - peak) (z - peak)
        target = z of the target, -inf until its chunk was seen

    Relative to the peak, because fp32 steps by 1e-3 at 1e4.
    """
    def __init__(self, rows: int, device: torch.device):
        self.peak_T, self.target_T = (torch.full((rows, ), -torch.inf, device=device) for _ in range(2))
        self.total_T, self.weighted_T = (torch.zeros(rows, device=device) for _ in range(2))

    def add_(self, logits_TN: torch.Tensor, targets_T: torch.Tensor, temperature: float):
        """Takes in the next chunk, and its memory; targets_T counts from the chunk's first column. Without
        the kernels it returns exp(z - peak) of the chunk, and the peak."""
        if backend.fused(logits_TN):
            return self.add_fused_(logits_TN, targets_T, temperature)
        z = logits_TN.div_(temperature) if temperature != 1 else logits_TN
        peak = torch.maximum(self.peak_T, z.amax(-1))
        here = (targets_T >= 0) & (targets_T < z.shape[1])
        at = targets_T.clamp(0, z.shape[1] - 1)
        self.target_T = torch.where(here, z.gather(-1, at[:, None])[:, 0], self.target_T)
        z.sub_(peak[:, None])
        e = z.exp()
        drop = torch.where(self.total_T > 0, self.peak_T - peak, 0)
        self.weighted_T = drop.exp() * (self.weighted_T + drop * self.total_T)
        self.weighted_T += torch.bmm(e[:, None], z[..., None]).view(-1)  # a dot product a row
        self.total_T = drop.exp() * self.total_T + e.sum(-1)
        self.peak_T = peak
        return e, peak

    def add_fused_(self, logits_TN, targets_T, temperature):
        size = backend.blocks("row_stats", logits_TN.dtype, logits_TN.shape[1])
        row_stats[(len(logits_TN), )](logits_TN, logits_TN.stride(0), logits_TN.shape[1], targets_T,
                                      self.peak_T, self.total_T, self.weighted_T, self.target_T, temperature,
                                      **size)


def logit_gradient(logits_TN: torch.Tensor, targets_T: torch.Tensor, peak_T: torch.Tensor,
                   log_total_T: torch.Tensor, mean_T: torch.Tensor, grad_logp_T: torch.Tensor,
                   grad_entropy_T: torch.Tensor | None, temperature: float,
                   dtype: torch.dtype) -> torch.Tensor:
    """The gradient of a chunk's logits, in `dtype` and perhaps in their memory. With p = softmax(z),
    E = sum p z = mean + peak and entropy h = log total - mean:

        d logp / dz = onehot(target) - p        d h / dz = -p (z - E)
    """
    if backend.fused(logits_TN):
        out = logits_TN if dtype == torch.float32 else torch.empty_like(logits_TN, dtype=dtype)
        rows, columns = logits_TN.shape
        size = backend.blocks("row_gradient", dtype, columns)
        row_gradient[(rows, triton.cdiv(columns, size["BLOCK_N"]))](
            logits_TN, out, columns, targets_T, peak_T, log_total_T, mean_T, grad_logp_T, grad_entropy_T,
            temperature, ENTROPY=grad_entropy_T is not None, **size)
        return out
    z, up_T = logits_TN.div_(temperature), grad_logp_T / temperature  # passes over rows, not over logits
    if grad_entropy_T is None:
        g = z.sub_(peak_T[:, None]).exp_().mul_((-up_T * (-log_total_T).exp())[:, None])
    else:
        z.sub_(peak_T[:, None])
        g = (z - log_total_T[:, None]).exp_()
        g *= -up_T[:, None] - (grad_entropy_T / temperature)[:, None] * z.sub_(mean_T[:, None])
    here = (targets_T >= 0) & (targets_T < z.shape[1])
    g.scatter_add_(-1, targets_T.clamp(0, z.shape[1] - 1)[:, None],
                   torch.where(here, up_T, 0)[:, None])
    return g.to(dtype)


@triton.jit
def row_stats(logits, stride, columns, targets, peak, total, weighted, target, temperature,
              BLOCK_N: tl.constexpr):
    """`RowStats.add_`: a program a row."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    high, mass, moment = tl.load(peak + row), tl.load(total + row), tl.load(weighted + row)
    for start in range(0, columns, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        z = tl.load(logits + n, mask=n < columns, other=-float("inf")) / temperature
        top = tl.maximum(high, tl.max(z, 0))
        drop = tl.where(mass > 0, high - top, 0.0)
        moment = tl.exp(drop) * (moment + drop * mass)
        mass = tl.exp(drop) * mass
        below = tl.where(n < columns, z - top, 0.0)
        e = tl.where(n < columns, tl.exp(below), 0.0)
        mass += tl.sum(e, 0)
        moment += tl.sum(e * below, 0)
        high = top
    tl.store(peak + row, high)
    tl.store(total + row, mass)
    tl.store(weighted + row, moment)
    at = tl.load(targets + row)
    if (at >= 0) & (at < columns):
        tl.store(target + row, tl.load(logits + at) / temperature)


@triton.jit
def row_gradient(logits, out, columns, targets, peak, log_total, mean, grad_logp, grad_entropy, temperature,
                 ENTROPY: tl.constexpr, BLOCK_N: tl.constexpr):
    """`logit_gradient`: a program for BLOCK_N columns of a row; logits and out are contiguous, and may be one
    tensor."""
    row = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offset = row.to(tl.int64) * columns + n
    z = tl.load(logits + offset, mask=n < columns, other=-float("inf")) / temperature - tl.load(peak + row)
    p = tl.exp(z - tl.load(log_total + row))
    up = tl.load(grad_logp + row)
    g = -up * p
    if ENTROPY:
        g -= tl.load(grad_entropy + row) * p * tl.where(n < columns, z - tl.load(mean + row), 0.0)
    g += tl.where(n == tl.load(targets + row), up, 0.0)
    tl.store(out + offset, (g / temperature).to(out.dtype.element_ty), mask=n < columns)


# ---------------------------------------------------------------------- autograd


def add_kept_(grad_hidden_TC, grad_weight, hidden_TC, weight_VC, targets_T, peak_T, log_total_T, up_T, chunks,
              rows):
    """Adds the gradients of sum(up_T z_target - up_T log sum exp z), from exp(z - peak) of each chunk. What a
    row's exponentials are multiplied by is put into the products' other factor or result, both smaller."""
    if grad_hidden_TC is not None:
        grad_hidden_TC.addcmul_(up_T[:, None], weight_VC[targets_T])
    if grad_weight is not None:
        grad_weight.index_add_(0, targets_T, (up_T[:, None] * hidden_TC).to(grad_weight.dtype))
    for part, exp_TN, chunk_peak_T in chunks:
        if len(rows) < len(exp_TN):
            exp_TN, chunk_peak_T = exp_TN[rows], chunk_peak_T[rows]
        scale_T1 = (up_T * (chunk_peak_T - peak_T - log_total_T).exp())[:, None]
        if grad_hidden_TC is not None:
            grad_hidden_TC.addcmul_(scale_T1, matmul_fp32(exp_TN, weight_VC[part].T), value=-1)
        if grad_weight is not None:
            grad_weight[part] -= matmul_fp32(exp_TN.T, (scale_T1 * hidden_TC).T)


class LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TC, weight_VC, targets_T, temperature, n_valid, trained):
        stats, ctx.kept = RowStats(len(hidden_TC), hidden_TC.device), []
        keep = trained and not backend.fused(hidden_TC) and 4 * len(hidden_TC) * n_valid <= KEPT_BYTES
        parts = chunks(len(hidden_TC), n_valid, hidden_TC.device)
        if keep:  # one place for all logits: between what is kept, malloc would find none that fits the next
            buffer = torch.empty(len(hidden_TC), parts[0].stop, device=hidden_TC.device)
        for part in parts:
            out = buffer[:, :part.stop - part.start] if keep else None
            chunk = stats.add_(matmul_fp32(hidden_TC, weight_VC[part], out), targets_T - part.start,
                               temperature)
            ctx.kept += [(part, *chunk)] if keep else []
        log_total_T, mean_T = stats.total_T.log(), stats.weighted_T / stats.total_T
        ctx.save_for_backward(hidden_TC, weight_VC, targets_T, stats.peak_T, log_total_T, mean_T)
        ctx.temperature, ctx.n_valid = temperature, n_valid
        ctx.set_materialize_grads(False)
        return stats.target_T - stats.peak_T - log_total_T, log_total_T - mean_T

    @staticmethod
    def backward(ctx, grad_logp_T, grad_entropy_T):
        hidden_TC, weight_VC, *rows = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden_TC) if need_hidden else None
        grad_weight = torch.zeros_like(weight_VC) if need_weight else None
        grad_logp_T = torch.zeros_like(rows[1]) if grad_logp_T is None else grad_logp_T.contiguous()
        counted = grad_logp_T != 0
        if grad_entropy_T is not None:
            grad_entropy_T = grad_entropy_T.contiguous()
            counted |= grad_entropy_T != 0
        kept = counted.nonzero()[:, 0]
        if len(kept) < len(hidden_TC):  # rows without a gradient cost nothing
            hidden_TC, *rows, grad_logp_T = (x[kept] for x in (hidden_TC, *rows, grad_logp_T))
            grad_entropy_T = None if grad_entropy_T is None else grad_entropy_T[kept]
        targets_T, *stats = rows
        sums_TC = torch.zeros(hidden_TC.shape, device=hidden_TC.device) if need_hidden else None
        if ctx.kept and grad_entropy_T is None:
            add_kept_(sums_TC, grad_weight, hidden_TC, weight_VC, targets_T, *stats[:2],
                      grad_logp_T / ctx.temperature, ctx.kept, kept)
            ctx.kept = []  # else they would stay until all of the graph is gone
        elif len(kept):
            for part in chunks(len(kept), ctx.n_valid, hidden_TC.device):
                g_TN = logit_gradient(matmul_fp32(hidden_TC, weight_VC[part]), targets_T - part.start, *stats,
                                      grad_logp_T, grad_entropy_T, ctx.temperature, hidden_TC.dtype)
                if need_hidden:
                    sums_TC += matmul_fp32(g_TN, weight_VC[part].T)
                if need_weight and g_TN.is_cuda:
                    torch.mm(g_TN.T, hidden_TC, out=grad_weight[part])
                elif need_weight:
                    grad_weight[part] = matmul_fp32(g_TN.T, hidden_TC.T)
                del g_TN  # before the next chunk's is made
        if need_hidden:
            grad_hidden[kept] = sums_TC.to(grad_hidden.dtype)
        return grad_hidden, grad_weight, None, None, None, None


def linear_logprob(hidden_TC: torch.Tensor, weight_VC: torch.Tensor, targets_T: torch.Tensor,
                   temperature: float = 1.0,
                   n_valid: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(hidden @ weight.T / temperature)[target] and the entropy of that distribution.

    hidden_TC and weight_VC share a dtype; targets_T is int64 in [0, V), or negative at positions to ignore,
    which get 0 and cost nothing. Returns fp32 logp_T and entropy_T (nats), both differentiable.

    n_valid: rows of the weight that are ids, where the checkpoint pads its vocabulary beyond the tokenizer's
    last; as weight_VC[:n_valid], whose gradient autograd would copy once more into one of V rows.
    """
    if not temperature > 0:
        raise ValueError(f"linear_logprob: temperature must be positive, got {temperature}")
    n_valid = len(weight_VC) if n_valid is None else n_valid
    if len(targets_T) and (largest := int(targets_T.max())) >= n_valid:
        raise ValueError(f"linear_logprob: target {largest} is beyond the last id, {n_valid - 1}")
    kept, rest = (targets_T >= 0).nonzero()[:, 0], (temperature, n_valid, torch.is_grad_enabled())
    if len(kept) == len(targets_T):
        return LinearLogprob.apply(hidden_TC, weight_VC, targets_T, *rest)
    values = LinearLogprob.apply(hidden_TC[kept], weight_VC, targets_T[kept], *rest)
    return tuple(x.new_zeros(len(targets_T)).index_put((kept, ), x) for x in values)
