"""Attention over a paged cache of keys and values, the writing into it, and attention over packed sequences.

Shapes: S sequences, T packed query tokens, H query heads, K KV heads, G = H / K, D head dim, P columns of a
page table. Keys and values of one layer are (pages, page_size, K, D) each; row s of table_SP names the pages
of sequence s in order, `context_S` counts its tokens, those of the current step included.

One kernel, `attend`, serves both. The rows of a tile share their loads of K and V: all query heads of a KV
head are rows of one tile, so grouped queries cost no extra traffic.

`PagedDecode`: one query per sequence. Each context is split into chunks of CHUNK tokens, a fixed number of
programs loops over the chunks of all sequences, and `combine` merges the chunks of a sequence, so one context
of 14,000 tokens among short ones does not become the critical path. The split depends on the sequence alone,
so its result does not depend on the rest of the batch. `PagedPrefill`: any number of queries per sequence,
the last ones of its context (whole prompts or chunks). The rows of a tile are (token, head of the group)
pairs; tiles with the longest contexts start first.
"""

from __future__ import annotations

from functools import cache, partial

import torch
import torch.nn.functional as F

from kernels import backend
from kernels.backend import tl, triton

# ---------------------------------------------------------------------- packed sequences


def packed_attention(q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, lengths: list[int],
                     cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Causal attention inside each of the sequences that lie end to end: out_THD, differentiable.

    torch's variable-length flash attention for 16-bit types on a GPU, else SDPA a sequence at a time.
    """
    if q_THD.is_cuda and q_THD.dtype != torch.float32:
        return varlen()(q_THD, k_TKD, v_TKD, cu_seqlens, cu_seqlens, max(lengths), max(lengths),
                        window_size=(-1, 0))
    return packed_reference(q_THD, k_TKD, v_TKD, lengths)


def packed_reference(q_THD, k_TKD, v_TKD, lengths: list[int]) -> torch.Tensor:
    rows = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q_THD, k_TKD, v_TKD)))
    out = [F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
           for q, k, v in rows]
    return torch.cat(out, dim=1).transpose(0, 1)


@cache
def varlen():
    """torch's variable-length flash attention, imported on first use (the import takes a second). Since torch
    2.12 grouped queries need enable_gqa; before that the option does not exist."""
    from torch.nn.attention.varlen import varlen_attn
    has_option = "enable_gqa" in varlen_attn.__kwdefaults__
    return partial(varlen_attn, enable_gqa=True) if has_option else varlen_attn


# ---------------------------------------------------------------------- writing into pages


def rotate(q_THD: torch.Tensor, k_TKD: torch.Tensor, cos_T1D: torch.Tensor,
           sin_T1D: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """RoPE: rotates pairs (i, i + D/2) of q and k in fp32; the first half of sin carries the minus sign of
    the rotation matrix."""
    x = torch.cat((q_THD, k_TKD), dim=1).float()
    x = torch.addcmul(x * cos_T1D, x.roll(x.shape[-1] // 2, -1), sin_T1D).to(q_THD.dtype)
    return x.split_with_sizes((q_THD.shape[1], k_TKD.shape[1]), dim=1)


def write_kv(q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, cos_T1D: torch.Tensor,
             sin_T1D: torch.Tensor, slots_T: torch.Tensor, keys: torch.Tensor,
             values: torch.Tensor) -> torch.Tensor:
    """Rotates q and k, writes k and v into the slots (page * page_size + place) and returns the rotated q.

    One pass over q, k and v instead of ten. If several tokens name the same slot, as padding rows do, one of
    them is written.
    """
    if not backend.fused(q_THD):
        return write_reference(q_THD, k_TKD, v_TKD, cos_T1D, sin_T1D, slots_T, keys, values)
    (tokens, heads, dim), kv_heads = q_THD.shape, k_TKD.shape[1]
    for x in (q_THD, k_TKD, v_TKD):
        assert x.stride()[1:] == (dim, 1), "write_kv: the heads of a token must lie end to end"
    assert all(x.is_contiguous() for x in (keys, values, cos_T1D, sin_T1D, slots_T))
    out = torch.empty((tokens, heads, dim), dtype=q_THD.dtype, device=q_THD.device)
    rotate_write[(tokens, )](q_THD, q_THD.stride(0), k_TKD, k_TKD.stride(0), v_TKD, v_TKD.stride(0), cos_T1D,
                             sin_T1D, slots_T, out, keys, values, heads, kv_heads, HALF=dim // 2,
                             BLOCK_HALF=triton.next_power_of_2(dim // 2),
                             BLOCK_H=triton.next_power_of_2(heads), BLOCK_K=triton.next_power_of_2(kv_heads),
                             num_warps=8)
    return out


def write_reference(q_THD, k_TKD, v_TKD, cos_T1D, sin_T1D, slots_T, keys, values) -> torch.Tensor:
    q_THD, k_TKD = rotate(q_THD, k_TKD, cos_T1D, sin_T1D)
    keys.flatten(0, 1).index_copy_(0, slots_T, k_TKD)
    values.flatten(0, 1).index_copy_(0, slots_T, v_TKD)
    return q_THD


@triton.jit
def rotate_write(q, q_stride, k, k_stride, v, v_stride, cos, sin, slots, out, keys, values, heads, kv_heads,
                 HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr):
    """One program per token."""
    t = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_HALF)
    real = i < HALF
    c = tl.load(cos + t * 2 * HALF + i, mask=real, other=0.0)[None, :]
    s = tl.load(sin + t * 2 * HALF + HALF + i, mask=real, other=0.0)[None, :]  # without the minus sign

    h = tl.arange(0, BLOCK_H)
    at, mask = h[:, None] * 2 * HALF + i[None, :], (h < heads)[:, None] & real[None, :]
    first = tl.load(q + t * q_stride + at, mask=mask).to(tl.float32)
    second = tl.load(q + t * q_stride + HALF + at, mask=mask).to(tl.float32)
    out += t * heads * 2 * HALF
    tl.store(out + at, (first * c - second * s).to(out.dtype.element_ty), mask=mask)
    tl.store(out + HALF + at, (second * c + first * s).to(out.dtype.element_ty), mask=mask)

    h = tl.arange(0, BLOCK_K)
    at, mask = h[:, None] * 2 * HALF + i[None, :], (h < kv_heads)[:, None] & real[None, :]
    slot = tl.load(slots + t) * kv_heads * 2 * HALF
    first = tl.load(k + t * k_stride + at, mask=mask).to(tl.float32)
    second = tl.load(k + t * k_stride + HALF + at, mask=mask).to(tl.float32)
    tl.store(keys + slot + at, (first * c - second * s).to(keys.dtype.element_ty), mask=mask)
    tl.store(keys + slot + HALF + at, (second * c + first * s).to(keys.dtype.element_ty), mask=mask)
    for half in tl.static_range(2):
        x = tl.load(v + t * v_stride + half * HALF + at, mask=mask)
        tl.store(values + slot + half * HALF + at, x.to(values.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------- paged attention


class PagedDecode:
    """Attention of one query per sequence over its pages. Built once per step, called once per layer.

    cache: the keys of any layer. context_S may be 0 for an unused row, whose result is undefined. Everything
    runs on the device without synchronisation, with shapes that depend on the page table's shape only, so it
    can be captured in a CUDA graph.
    """
    def __init__(self, cache: torch.Tensor, table_SP: torch.Tensor, context_S: torch.Tensor,
                 gathered: Gathered | None = None):
        self.table_SP, self.context_S = table_SP.contiguous(), context_S.contiguous()
        slots = table_SP.shape[1] * cache.shape[1]
        if not backend.fused(cache):
            self.gathered = gathered or Gathered()
            self.parts = [(rows, *attended(cache, table_SP[rows], context_S[rows, None, None] - 1))
                          for rows in self.gathered.partition(context_S)]
            page_size, self.last_S = cache.shape[1], (context_S - 1).clamp(min=0)
            page_S = table_SP.gather(1, (self.last_S // page_size)[:, None])[:, 0]
            self.slot_S = page_S * page_size + self.last_S % page_size
            return
        self.size = backend.blocks("decode", cache.dtype, cache.shape[-1])
        self.programs, chunk = backend.processors() * self.size.pop("PROGRAMS"), self.size["CHUNK"]
        self.first_chunk_S1 = F.pad(((context_S + chunk - 1) // chunk).cumsum(0), (1, 0))
        self.num_chunks = self.first_chunk_S1[-1:].clone()
        number = torch.arange(len(table_SP) * triton.cdiv(slots, chunk), device=cache.device)
        self.sequence_of = torch.searchsorted(self.first_chunk_S1[1:], number, right=True)
        self.part_of = number - self.first_chunk_S1[self.sequence_of]

    def __call__(self, q_SHD: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        if not backend.fused(q_SHD):
            return self.reference(q_SHD, keys, values)
        (rows, heads, dim), chunks = q_SHD.shape, len(self.sequence_of)
        parts = torch.empty(chunks, heads, dim, device=q_SHD.device)
        lse = torch.empty(chunks, heads, device=q_SHD.device)
        run_attend(q_SHD, keys, values, parts, lse, self.table_SP, self.context_S, None, self.sequence_of,
                   self.part_of, self.num_chunks, self.programs, self.size)
        out = torch.empty_like(q_SHD, memory_format=torch.contiguous_format)
        combine[(rows, heads)](parts, lse, self.first_chunk_S1, out, heads, dim, BLOCK_N=16,
                               BLOCK_D=triton.next_power_of_2(dim), num_warps=4)
        return out

    def reference(self, q_SHD, keys, values):
        kv_heads = keys.shape[2]
        group = q_SHD.shape[1] // kv_heads
        q = q_SHD.unflatten(1, (kv_heads, group))  # the query heads of a KV head are rows: (S, K, G, D)
        if padding := max(4, 1 << (group - 1).bit_length()) - group:  # see `attended`
            q = F.pad(q, (0, 0, 0, padding))
        out = torch.empty_like(q) if len(self.parts) > 1 else None
        for i, (rows, table, mask) in enumerate(self.parts):
            k, v = (self.gathered(x, i, table, mask.shape[-1], self.slot_S[rows], self.last_S[rows])
                    for x in (keys, values))
            part = F.scaled_dot_product_attention(q[rows], k, v, attn_mask=mask)
            if out is None:
                out = part
            else:
                out[rows] = part
        return out[:, :, :group].flatten(1, 2)


SHORT, MEDIUM = 192, 384  # context lengths on a CPU, see `attended`


class Gathered:
    """CPU only: contiguous copies of the rows' keys and values, kept from step to step. While the same rows
    decode, a step copies one token per row instead of whole contexts. Call `clear` when a row is
    reassigned."""
    LIMIT = 2**30  # bytes; contexts beyond this limit are copied in every step

    def __init__(self):
        self.clear()

    def clear(self):
        self.sizes, self.buffers, self.bytes = None, {}, 0

    def partition(self, context_S: torch.Tensor) -> list[torch.Tensor | slice]:
        """Groups of rows with contexts of similar length (short, medium, then powers of two), because
        attention of a group costs as much as its longest row."""
        self.place = None
        sizes = [SHORT if n <= SHORT else MEDIUM if n <= MEDIUM else 1 << (n - 1).bit_length()
                 for n in context_S.tolist()]
        if sizes != self.sizes:
            self.clear()
            self.sizes = sizes
        if len(set(sizes)) == 1:
            return [slice(None)]
        return [torch.tensor([i for i, other in enumerate(sizes) if other == size])
                for size in sorted(set(sizes))]

    def __call__(self, cache, part: int, table, length: int, slot_S, last_S) -> torch.Tensor:
        """A layer's keys or values as (S, K, L, D), for one group of rows; slot_S holds their newest
        tokens."""
        key = part, cache.data_ptr()
        buffer, *flat = self.buffers.get(key, (None,))
        if buffer is not None and buffer.shape[1] >= length:
            if self.place is None or self.place[0] != (part, buffer.shape[1]):
                first_S = torch.arange(len(last_S)) * buffer.shape[1]
                self.place = (part, buffer.shape[1]), first_S + last_S
            flat[1].index_copy_(0, self.place[1], flat[0].index_select(0, slot_S))
            return buffer[:, :length].transpose(1, 2)
        found = gather(cache, table, length)
        if buffer is not None:
            self.bytes -= self.buffers.pop(key)[0].nbytes
        size = found.nbytes * (length + 128) // length
        if self.bytes + size <= self.LIMIT:
            buffer = F.pad(found.transpose(1, 2), (0, 0, 0, 0, 0, 128))
            self.buffers[key] = buffer, cache.flatten(0, 1), buffer.flatten(0, 1)
            self.bytes += size
        return found


def attended(cache: torch.Tensor, table_SP: torch.Tensor,
             last_S1T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """CPU only: page numbers (flat) and additive mask (S, 1, T, L) of rows whose last visible keys are
    last_S1T. The mask is additive because SDPA would convert a boolean one in each layer.

    L is chosen so that a row's result has the same bits whatever other rows and keys are in the call. SDPA's
    CPU kernel processes 512 keys at a time; its product with V sums up to B keys at once and up to 2 B in two
    halves, where B is 384 with AVX-512 and 192 with AVX2. So L is a multiple of the vector width up to SHORT,
    then MEDIUM, then a multiple of 512, and rows on different sides of SHORT or MEDIUM must not share a call.
    For the same reason the number of query rows is 4, 8 or a multiple of 16.
    """
    longest, page_size = max(1, int(last_S1T.max()) + 1), cache.shape[1]
    step = 16 if longest <= SHORT else MEDIUM if longest <= MEDIUM else 512
    length = -(-longest // step) * step
    columns = -(-length // page_size)
    table = F.pad(table_SP[:, :columns], (0, max(0, columns - table_SP.shape[1])))
    seen = torch.arange(length) <= last_S1T[..., None]
    return table.flatten(), torch.zeros(seen.shape, dtype=cache.dtype).masked_fill_(~seen, -torch.inf)


def gather(cache: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    """The pages of each row, contiguous, as (S, K, L, D). index_select is much faster than indexing."""
    pages = cache.index_select(0, table)
    columns = -(-length // cache.shape[1])
    return pages.view(-1, columns * cache.shape[1], *cache.shape[2:])[:, :length].transpose(1, 2)


class PagedPrefill:
    """Causal attention of the last query_lengths[s] tokens of each sequence over its pages. Built once per
    step, called once per layer.

    cache: the keys of any layer. The queries of all sequences are packed end to end; context_lengths include
    them.
    """
    def __init__(self, cache: torch.Tensor, heads: int, table_SP: torch.Tensor, query_lengths: list[int],
                 context_lengths: list[int]):
        if not all(0 < n <= m for n, m in zip(query_lengths, context_lengths, strict=True)):
            raise ValueError(f"PagedPrefill: queries {query_lengths} must be the last tokens, at least one, "
                             f"of their contexts {context_lengths}")
        self.table_SP = table_SP.contiguous()
        if not backend.fused(cache):
            self.parts = []  # calls do not cross SHORT and MEDIUM
            for table_P, n, m in zip(table_SP, query_lengths, context_lengths):
                for low, high in ((0, SHORT), (SHORT, MEDIUM), (MEDIUM, m)):
                    start, end = max(m - n, low), min(m, high)
                    if start < end:
                        last = start + torch.arange(-(-(end - start) // 16) * 16).clamp_(max=end - start - 1)
                        self.parts.append((end - start, *attended(cache, table_P[None], last[None, None])))
            return
        self.size = backend.blocks("prefill", cache.dtype, cache.shape[-1])
        group, block = heads // cache.shape[2], self.size["BLOCK_M"]
        tiles = [(m - n + part * block // group, s, part)  # what its first row sees, about
                 for s, (n, m) in enumerate(zip(query_lengths, context_lengths))
                 for part in range(-(-n * group // block))]
        order = sent(torch.tensor(sorted(tiles, reverse=True)), cache.device).T
        self.sequence_of, self.part_of = (x.clone() for x in order[1:])  # aligned, whatever their length
        self.num_tiles = torch.full((1,), len(tiles), device=cache.device)
        self.context_S = sent(torch.tensor(context_lengths), cache.device)
        self.first_token_S1 = F.pad(sent(torch.tensor(query_lengths), cache.device).cumsum(0), (1, 0))

    def __call__(self, q_THD: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        if not backend.fused(q_THD):
            return self.reference(q_THD, keys, values)
        out = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
        run_attend(q_THD, keys, values, out, None, self.table_SP, self.context_S, self.first_token_S1,
                   self.sequence_of, self.part_of, self.num_tiles, len(self.sequence_of), self.size)
        return out

    def reference(self, q_THD, keys, values):
        out = []
        for q, (n, table, mask) in zip(q_THD.split([n for n, _, _ in self.parts]), self.parts):
            k, v = (gather(x, table, mask.shape[-1]) for x in (keys, values))
            q = F.pad(q, (0, 0, 0, 0, 0, mask.shape[2] - n)).transpose(0, 1)[None]
            out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0, :, :n])
        return torch.cat(out, dim=1).transpose(0, 1)


def sent(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a CPU tensor to the device without synchronisation."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def run_attend(q_THD, keys, values, out, lse, table_SP, context_S, first_token_S1, sequence_of, part_of,
               num_items, programs: int, size: dict[str, int]):
    (_, heads, dim), (_, page_size, kv_heads, _) = q_THD.shape, keys.shape
    assert q_THD.stride()[1:] == (dim, 1), "the heads of a token must lie end to end"
    assert keys.is_contiguous() and values.is_contiguous()
    group = heads // kv_heads
    size = {"CHUNK": 0, "BLOCK_M": max(16, triton.next_power_of_2(group))} | size
    attend[(min(len(sequence_of), programs), kv_heads)](
        q_THD, q_THD.stride(0), keys, values, out, lse, table_SP, table_SP.stride(0), context_S,
        first_token_S1, sequence_of, part_of, num_items, heads, kv_heads, dim**-0.5 * LOG2_E, GROUP=group,
        DIM=dim, PAGE=page_size, BLOCK_D=max(16, triton.next_power_of_2(dim)), **size)


LOG2_E = 1.4426950408889634  # exp2 is what the hardware has


@triton.jit(do_not_specialize=["table_stride"])  # it changes with the contexts; do not recompile
def attend(q, q_stride, keys, values, out, lse, table, table_stride, context, first_token, sequence_of,
           part_of, num_items, heads, kv_heads, scale, GROUP: tl.constexpr, DIM: tl.constexpr,
           PAGE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
           BLOCK_D: tl.constexpr):
    """Loops over work items, for one KV head (second grid axis).

    With CHUNK > 0 an item is a chunk of one query's context; its normalised output and log2-sum-exp go to row
    `item` of out and lse. With CHUNK = 0 an item is a tile of BLOCK_M (token, head of the group) rows of one
    sequence, and out has the layout of q.
    """
    kv = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    keys += kv * DIM
    values += kv * DIM
    for item in range(tl.program_id(0), tl.load(num_items), tl.num_programs(0)):
        s, part = tl.load(sequence_of + item), tl.load(part_of + item)
        end = tl.load(context + s)
        r = tl.arange(0, BLOCK_M)
        if CHUNK > 0:
            start = part * CHUNK
            end = tl.minimum(end, start + CHUNK)
            bare = start + (end - start) // BLOCK_N * BLOCK_N  # before it no key needs a mask
            token, head, real = s + r * 0, r, r < GROUP
            position = end - 1 + r * 0
        else:
            first, after = tl.load(first_token + s), tl.load(first_token + s + 1)
            offset = end - (after - first)
            r += part * BLOCK_M
            token, head, real = r // GROUP, r % GROUP, r < (after - first) * GROUP
            position = offset + token
            start = offset * 0
            bare = (offset + part * BLOCK_M // GROUP + 1) // BLOCK_N * BLOCK_N
            end = tl.minimum(end, offset + (part * BLOCK_M + BLOCK_M - 1) // GROUP + 1)
            token += first
        row = kv * GROUP + head
        mask = real[:, None] & (d < DIM)[None, :]
        a = tl.load(q + token.to(tl.int64)[:, None] * q_stride + row[:, None] * DIM + d[None, :], mask=mask,
                    other=0.0)
        acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
        peak = tl.full((BLOCK_M, ), -float("inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK_M, ), dtype=tl.float32)
        pages = table + s * table_stride
        for MASKED in tl.static_range(2):
            acc, peak, total = walk(acc, peak, total, a, position, bare if MASKED else start,
                                    end if MASKED else bare, end, keys, values, pages, kv_heads, scale, DIM,
                                    PAGE, BLOCK_N, BLOCK_D, MASKED)
        if CHUNK > 0:
            token = item + r * 0
            tl.store(lse + token.to(tl.int64) * heads + row, peak + tl.log2(total), mask=real)
        at = (token.to(tl.int64) * heads + row)[:, None] * DIM + d[None, :]
        tl.store(out + at, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)


@triton.jit
def walk(acc, peak, total, a, position, start, stop, end, keys, values, pages, kv_heads, scale,
         DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
         MASKED: tl.constexpr):
    """Online softmax (arXiv 2205.14135) over the keys from start to stop. With MASKED, row m sees keys up to
    position[m], and slots at or after `end` are not read: they may belong to another sequence."""
    for first in range(start, stop, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        page = tl.load(pages + n // PAGE, mask=n < end, other=0) if MASKED else tl.load(pages + n // PAGE)
        at = (page.to(tl.int64) * PAGE + n % PAGE) * kv_heads * DIM
        k = load_rows(keys, at, n < end, DIM, BLOCK_D, MASKED)
        x = tl.dot(a, tl.trans(k), input_precision="ieee") * scale
        if MASKED:
            x = tl.where(n[None, :] <= position[:, None], x, -float("inf"))
        top = tl.maximum(peak, tl.max(x, 1))
        p = tl.exp2(x - top[:, None])
        fade = tl.exp2(peak - top)
        total = total * fade + tl.sum(p, 1)
        peak = top
        v = load_rows(values, at, n < end, DIM, BLOCK_D, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, peak, total


@triton.jit
def load_rows(cache, at, seen, DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    if MASKED:
        x = tl.load(cache + at[:, None] + d[None, :], mask=seen[:, None] & (d < DIM)[None, :], other=0.0)
    elif DIM < BLOCK_D:
        x = tl.load(cache + at[:, None] + d[None, :], mask=(d < DIM)[None, :], other=0.0)
    else:
        x = tl.load(cache + at[:, None] + d[None, :])
    return x


@triton.jit
def combine(parts, lse, first_chunk, out, heads, dim, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program per (sequence, head): sums its chunks' outputs, weighted by their log2-sum-exps, in
    order."""
    s, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    start, end = tl.load(first_chunk + s), tl.load(first_chunk + s + 1)
    acc = tl.zeros((BLOCK_D, ), dtype=tl.float32)
    peak, total = -float("inf"), 0.0
    for first in range(start, end, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        x = tl.load(lse + n * heads + h, mask=n < end, other=-float("inf"))
        top = tl.maximum(peak, tl.max(x, 0))
        w = tl.exp2(x - top)
        fade = tl.exp2(peak - top)
        part = tl.load(parts + (n * heads + h)[:, None] * dim + d[None, :],
                       mask=(n < end)[:, None] & (d < dim)[None, :], other=0.0)
        acc = acc * fade + tl.sum(w[:, None] * part, 0)
        total = total * fade + tl.sum(w, 0)
        peak = top
    acc = acc / tl.where(total > 0, total, 1.0)
    tl.store(out + (s * heads + h) * dim + d, acc.to(out.dtype.element_ty), mask=d < dim)
