"""The Triton kernels of attention.py and sample.py against fp64: on a GPU compiled, else in Triton's
interpreter.

Pages that a sequence does not own, and the slots after its last token, hold NaN throughout: nothing of them
may show in a result. logprob.py's kernels have their tests in test_logprob.py. The interpreter cannot show
tf32 where fp32 is meant, nor races; tests/gpu and compute-sanitizer can.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import grpo
import model as qwen
import train
from kernels import backend
from kernels.attention import PagedDecode, PagedPrefill, rotate, write_kv
from kernels.sample import draw, head_draw, streams, uniforms
from sampler import Request, Sampler

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
SMALL = {"CHUNK": 32, "PROGRAMS": 3, "BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_V": 128, "BLOCK_C": 32}


@pytest.fixture
def kernels(monkeypatch):
    """The kernels take every tensor, with blocks so small that short contexts have several."""
    real = backend.blocks

    def small(*key):
        size = real(*key)
        return size | {name: SMALL[name] for name in size if name in SMALL} if DEVICE == "cpu" else size

    monkeypatch.setattr(backend, "blocks", small)
    monkeypatch.setattr(backend, "fused", lambda x: True)


@pytest.fixture
def table_blocks(monkeypatch):
    """The same with the blocks of the table."""
    monkeypatch.setattr(backend, "fused", lambda x: True)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def relative(x, expected):
    return ((x.double() - expected).norm() / expected.norm()).item()


def cache_of(contexts, kv_heads, dim, page_size, dtype=torch.float32, seed=0, spare=2):
    """keys, values, table of sequences in shuffled pages; NaN wherever no token lies."""
    g = torch.Generator().manual_seed(seed)
    columns = max(-(-n // page_size) for n in contexts) + spare
    pages = len(contexts) * columns + 3
    table = torch.randperm(pages, generator=g)[:len(contexts) * columns].view(len(contexts), columns)
    out = []
    for _ in range(2):
        x = torch.full((pages, page_size, kv_heads, dim), torch.nan)
        for row, n in zip(table, contexts):
            place = torch.arange(n)
            x[row[place // page_size], place % page_size] = torch.randn(n, kv_heads, dim, generator=g)
        out.append(x.to(DEVICE, dtype))
    return *out, table.to(DEVICE)


def exact_attention(q_THD, keys, values, table, query_lengths, contexts):
    """In fp64, a sequence at a time; the queries are the last tokens of their context."""
    out = []
    for q, pages, n in zip(q_THD.double().split(query_lengths), table, contexts):
        k, v = (x[pages].flatten(0, 1)[:n].double().repeat_interleave(q.shape[1] // x.shape[2], dim=1)
                for x in (keys, values))
        scores = torch.einsum("thd,nhd->htn", q, k) / math.sqrt(q.shape[2])
        seen = torch.ones(len(q), n, dtype=torch.bool, device=q.device).tril(n - len(q))
        out.append(torch.einsum("htn,nhd->thd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
    return torch.cat(out)


# ------------------------------------------------------------------------------------------ decode


FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize("heads, kv_heads, dim, page_size, dtype", [
    (14, 2, 64, 16, FP32), (14, 2, 64, 16, BF16), (7, 1, 64, 16, FP16), (10, 2, 128, 16, FP32),
    (5, 1, 128, 64, BF16), (2, 2, 80, 32, FP32), (4, 4, 80, 32, BF16), (3, 1, 96, 64, FP32),
    (5, 5, 16, 16, FP32)])
def test_decode_equals_fp64_attention(heads, kv_heads, dim, page_size, dtype, kernels):
    """Contexts of one token, around the ends of pages, blocks and chunks, and one far longer."""
    contexts = [1, 15, 16, 17, 32, 33, 64, 150]
    keys, values, table = cache_of(contexts, kv_heads, dim, page_size, dtype)
    q = normal(len(contexts), heads, dim, seed=1, dtype=dtype)
    out = PagedDecode(keys, table, torch.tensor(contexts, device=DEVICE))(q, keys, values)
    expected = exact_attention(q, keys, values, table, [1] * len(contexts), contexts)
    assert out.dtype == dtype and relative(out, expected) < TOLERANCE[dtype]
    for row, right in zip(out, expected, strict=True):  # not hidden behind the others' norm
        assert relative(row, right) < 3 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_with_the_blocks_of_the_table(dtype, table_blocks):
    contexts = [700, 3, 512, 513]
    keys, values, table = cache_of(contexts, 2, 64, 16, dtype)
    q = normal(4, 14, 64, seed=1, dtype=dtype)
    out = PagedDecode(keys, table, torch.tensor(contexts, device=DEVICE))(q, keys, values)
    assert relative(out, exact_attention(q, keys, values, table, [1] * 4, contexts)) < TOLERANCE[dtype]


def test_decode_reads_pages_that_sequences_share(kernels):
    """Samples forked from one prompt: the first pages are the same, the last differ."""
    contexts = [70, 70, 61]
    keys, values, table = cache_of(contexts, 2, 16, 16)
    table[1:, :3] = table[0, :3]
    q = normal(3, 4, 16, seed=2)
    out = PagedDecode(keys, table, torch.tensor(contexts, device=DEVICE))(q, keys, values)
    assert relative(out, exact_attention(q, keys, values, table, [1] * 3, contexts)) < 1e-5


def test_empty_slots_of_a_batch_of_fixed_size_change_nothing(kernels):
    contexts = [40, 7, 100]
    keys, values, table = cache_of(contexts, 2, 16, 16)
    q = normal(6, 4, 16, seed=3)
    alone = PagedDecode(keys, table, torch.tensor(contexts, device=DEVICE))(q[[1, 2, 4]], keys, values)
    wide = table.new_zeros(6, table.shape[1])
    wide[[1, 2, 4]] = table
    plan = PagedDecode(keys, wide, torch.tensor([0, 40, 7, 0, 100, 0], device=DEVICE))
    out = plan(q, keys, values)
    assert torch.equal(out[[1, 2, 4]], alone) and not out[[0, 3, 5]].any()
    nobody = PagedDecode(keys, wide, torch.zeros(6, dtype=torch.int64, device=DEVICE))
    assert not nobody(q, keys, values).any()


def test_decode_of_a_sequence_does_not_depend_on_its_batch(kernels):
    """Bit for bit: alone, among others, with a wider table."""
    contexts = [90, 1, 33, 200, 64]
    keys, values, table = cache_of(contexts, 2, 32, 16)
    q = normal(5, 6, 32, seed=4)
    together = PagedDecode(keys, table, torch.tensor(contexts, device=DEVICE))(q, keys, values)
    for s, n in enumerate(contexts):
        own = table[s:s + 1, :-(-n // 16)].contiguous()
        alone = PagedDecode(keys, own, torch.tensor([n], device=DEVICE))(q[s:s + 1], keys, values)
        assert torch.equal(alone[0], together[s]), n


def test_scores_of_ten_thousand_are_safe(kernels):
    """One key 1e4 above the rest takes all the weight, equal ones share it; nothing overflows."""
    keys, values, table = cache_of([48, 48, 48], 1, 16, 16)
    place, pages = torch.arange(48), table.cpu()
    peaks = ([5], [5, 40], list(range(48)))
    for row, tops in zip(pages, peaks):
        keys[row[place // 16], place % 16] = torch.zeros(48, 1, 16, device=DEVICE)
        keys[row[place // 16], place % 16, 0, 0] = -1e4
        keys[row[torch.tensor(tops) // 16], torch.tensor(tops) % 16, 0, 0] = 1e4
    q = torch.zeros(3, 2, 16, device=DEVICE)
    q[..., 0] = 4  # over sqrt(16)
    for out in (PagedDecode(keys, table, torch.full((3, ), 48, device=DEVICE))(q, keys, values),
                PagedPrefill(keys, 2, table, [1] * 3, [48] * 3)(q, keys, values)):
        for row, pages, tops in zip(out, table, peaks):
            expected = values[pages].flatten(0, 1)[tops].double().mean(0).expand(2, -1)
            assert relative(row, expected) < 1e-5


# ------------------------------------------------------------------------------------------ prefill


@pytest.mark.parametrize("heads, kv_heads, dim, page_size, dtype", [
    (14, 2, 64, 16, FP32), (14, 2, 64, 16, BF16), (7, 1, 64, 32, FP16), (5, 1, 128, 32, FP32),
    (10, 2, 128, 16, BF16), (2, 2, 80, 64, FP32), (6, 1, 96, 16, BF16)])
def test_prefill_equals_fp64_attention(heads, kv_heads, dim, page_size, dtype, kernels):
    """Whole prompts, chunks of one, decode rows between them, one-token prompts."""
    queries = [1, 20, 1, 17, 33, 2, 1]
    contexts = [1, 20, 50, 60, 35, 66, 130]
    keys, values, table = cache_of(contexts, kv_heads, dim, page_size, dtype)
    q = normal(sum(queries), heads, dim, seed=1, dtype=dtype)
    out = PagedPrefill(keys, heads, table, queries, contexts)(q, keys, values)
    expected = exact_attention(q, keys, values, table, queries, contexts)
    assert out.dtype == dtype and relative(out, expected) < TOLERANCE[dtype]
    for row, right in zip(out, expected, strict=True):
        assert relative(row, right) < 3 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefill_with_the_blocks_of_the_table(dtype, table_blocks):
    queries, contexts = [40, 1, 70], [200, 90, 70]
    keys, values, table = cache_of(contexts, 2, 64, 16, dtype)
    q = normal(sum(queries), 14, 64, seed=1, dtype=dtype)
    out = PagedPrefill(keys, 14, table, queries, contexts)(q, keys, values)
    expected = exact_attention(q, keys, values, table, queries, contexts)
    assert relative(out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("seed", range(4))
def test_prefill_and_decode_at_random(seed, kernels):
    rng = np.random.default_rng(seed)
    kv_heads, group = int(rng.integers(1, 3)), int(rng.integers(1, 9))
    dim = int(rng.choice([16, 32, 48, 64]))
    contexts = rng.integers(1, 80, rng.integers(1, 5)).tolist()
    queries = [int(rng.integers(1, n + 1)) for n in contexts]
    keys, values, table = cache_of(contexts, kv_heads, dim, int(rng.choice([16, 32, 64])), seed=seed)
    q = normal(sum(queries), kv_heads * group, dim, seed=seed)
    out = PagedPrefill(keys, kv_heads * group, table, queries, contexts)(q, keys, values)
    expected = exact_attention(q, keys, values, table, queries, contexts)
    assert relative(out, expected) < 1e-5
    last = torch.tensor(queries, device=DEVICE).cumsum(0) - 1
    out = PagedDecode(keys, table, torch.tensor(contexts, device=DEVICE))(q[last], keys, values)
    assert relative(out, expected[last]) < 1e-5


@pytest.mark.parametrize("fused", [False, True])
def test_a_prompt_in_chunks_equals_the_prompt_at_once(fused, kernels, monkeypatch):
    """On the reference too, which is what a CPU runs."""
    monkeypatch.setattr(backend, "fused", lambda x: fused)
    keys, values, table = cache_of([75], 2, 32, 16)
    q = normal(75, 6, 32, seed=5)
    if not fused:  # a CPU reads masked slots too: the pool holds no NaN
        keys, values, table, q = keys.nan_to_num().cpu(), values.nan_to_num().cpu(), table.cpu(), q.cpu()
    whole = PagedPrefill(keys, 6, table, [75], [75])(q, keys, values)
    for cut in (1, 16, 40, 74):
        parts = [PagedPrefill(keys, 6, table, [b - a], [b])(q[a:b], keys, values)
                 for a, b in ((0, cut), (cut, 75))]
        assert relative(torch.cat(parts), whole.double()) < 1e-6


@pytest.mark.parametrize("kv_heads, group, dim", [(2, 4, 64), (2, 2, 16), (1, 7, 128), (4, 1, 64),
                                                  (1, 5, 32)])
def test_on_a_cpu_a_row_has_the_same_bits_alone_in_a_batch_and_in_a_chunk(kv_heads, group, dim, kernels,
                                                                          monkeypatch):
    """Across all lengths at which SDPA's products change their order."""
    monkeypatch.setattr(backend, "fused", lambda x: False)
    n, heads = 1100, kv_heads * group
    keys, values, table = cache_of([n], kv_heads, dim, 16)
    keys, values, table, q = (x.cpu() for x in (keys.nan_to_num(), values.nan_to_num(), table,
                                                normal(n, heads, dim, seed=5)))
    contexts = torch.tensor([1, 2, 15, 16, 17, 100, 191, 192, 193, 255, 256, 257, 300, 383, 384, 385, 400,
                             511, 512, 513, 640, 896, 897, 1000, 1024, 1025, 1100])
    alone = torch.cat([PagedDecode(keys, table, c[None])(q[c - 1][None], keys, values) for c in contexts])
    batch = PagedDecode(keys, table.expand(len(contexts), -1), contexts)(q[contexts - 1], keys, values)
    assert torch.equal(batch, alone)
    for size in (16, 37, 300, n):
        chunks = [PagedPrefill(keys, heads, table, [min(size, n - a)], [min(n, a + size)])(
            q[a:a + size], keys, values) for a in range(0, n, size)]
        assert torch.equal(torch.cat(chunks)[contexts - 1], alone), size


@pytest.mark.parametrize("queries, contexts", [([0], [5]), ([6], [5]), ([1, 7], [1, 6])])
def test_queries_that_are_not_the_end_of_their_context_are_refused(queries, contexts):
    with pytest.raises(ValueError, match="must be the last tokens"):
        PagedPrefill(torch.zeros(3, 16, 1, 16), 1, torch.zeros(2, 1, dtype=torch.int64), queries, contexts)


# ------------------------------------------------------------------------------------------ write_kv


@pytest.mark.parametrize("heads, kv_heads, dim", [(14, 2, 64), (5, 1, 80), (3, 3, 32), (1, 1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_are_rotated_and_written_to_their_slots_and_nowhere_else(heads, kv_heads, dim, dtype, kernels):
    tokens = 9
    both = normal(tokens, (heads + 2 * kv_heads) * dim, seed=6, dtype=dtype).unflatten(-1, (-1, dim))
    q, k, v = both.split((heads, kv_heads, kv_heads), dim=1)  # views of one projection
    angle = normal(tokens, 1, dim // 2, seed=7)
    cos, sin = torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)
    slots = torch.randperm(64, generator=torch.Generator().manual_seed(8))[:tokens].to(DEVICE)
    keys, values = (torch.full((4, 16, kv_heads, dim), torch.nan, dtype=dtype, device=DEVICE) for _ in "kv")
    out = write_kv(q, k, v, cos, sin, slots, keys, values)
    right_q, right_k = rotate(q.double(), k.double(), cos.double(), sin.double())
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 8e-3}[dtype]
    assert out.dtype == dtype and relative(out, right_q) < tolerance
    assert relative(keys.flatten(0, 1)[slots], right_k) < tolerance
    assert torch.equal(values.flatten(0, 1)[slots], v)
    others = torch.ones(64, dtype=torch.bool, device=DEVICE).index_fill(0, slots, False)
    assert keys.flatten(0, 1)[others].isnan().all() and values.flatten(0, 1)[others].isnan().all()


# ------------------------------------------------------------------------------------------ sampling


def exact_draws(hidden, weight, n_valid, uniform, temperature):
    """In fp64 over the whole row: the id, its logprob, and how far u is from the nearest edge of the CDF."""
    t = torch.where(temperature == 0, 1.0, temperature).double()
    logp = torch.log_softmax(hidden.double() @ weight[:n_valid].double().T / t[:, None], dim=-1)
    cdf = logp.exp().cumsum(-1)
    token = (cdf <= uniform[:, None]).sum(-1).clamp(max=n_valid - 1)
    token = torch.where(temperature == 0, logp.argmax(-1), token)
    gap = (cdf - uniform[:, None]).abs().amin(-1).masked_fill(temperature == 0, 1.0)
    return token, logp.gather(-1, token[:, None])[:, 0], gap


@pytest.mark.parametrize("rows, vocabulary, n_valid, width", [
    (1, 64, 64, 32), (16, 1000, 1000, 48), (21, 1000, 961, 72), (40, 300, 129, 16), (5, 200, 1, 16),
    (130, 200, 190, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_from_the_head_equal_a_search_in_fp64(rows, vocabulary, n_valid, width, dtype, kernels):
    """The fused path draws the same ids but where u lies within rounding of an edge; none here is that near
    unless it is counted. Greedy rows among them; padded ids would win if they took part, and what lies beyond
    the width would poison all."""
    hidden = normal(rows, width, seed=rows, dtype=dtype)
    weight = normal(vocabulary, width, seed=1, dtype=dtype) * 0.4
    weight[n_valid:] = 9 * weight[:1]
    hidden, weight = (torch.nn.functional.pad(x, (0, 40), value=torch.nan)[:, :width]
                      for x in (hidden, weight))
    temperature = torch.where(torch.arange(rows) % 4 == 3, 0.0, torch.linspace(0.5, 1.3, rows)).to(DEVICE)
    sample_of = torch.arange(rows, device=DEVICE)
    u = uniforms(streams(sample_of + 5, sample_of), sample_of)
    token, logp = head_draw(hidden, weight, n_valid, u, temperature)
    expected, right_logp, gap = exact_draws(hidden, weight, n_valid, u, temperature)
    flips = token != expected
    assert not (flips & (gap > 1e-6)).any() and flips.sum() <= 1
    assert token.dtype == torch.int64 and token.max() < n_valid
    assert (logp - right_logp)[~flips].abs().max() < 1e-5


def test_the_fused_head_draws_what_the_reference_draws(kernels, monkeypatch):
    """200 draws of one distribution, whose u are spread evenly: at most one flip, at an edge."""
    hidden, weight = normal(1, 16, seed=3).expand(200, -1).contiguous(), normal(200, 16, seed=4) / 3
    u = (torch.arange(200, dtype=torch.float64, device=DEVICE) + 0.5) / 200
    temperature = torch.tensor(0.8, device=DEVICE).expand(200)  # has no memory of its own
    token, logp = head_draw(hidden, weight, 200, u, temperature)
    monkeypatch.setattr(backend, "fused", lambda x: False)
    expected, right_logp = head_draw(hidden, weight, 200, u, temperature)
    same = token == expected
    assert (~same).sum() <= 1 and len(token.unique()) > 80
    assert (logp - right_logp)[same].abs().max() < 1e-5


def test_logits_of_ten_thousand_and_ties_are_drawn_right(kernels):
    """Logits +-1e4, exact in fp32: equal maxima share the draws, of greedy ones the lowest id wins."""
    weight = torch.full((200, 16), 0.0, device=DEVICE)
    weight[:, 0] = -1e4
    weight[[70, 71, 140], 0] = 1e4
    hidden = torch.zeros(7, 16, device=DEVICE)
    hidden[:, 0] = 1
    u = torch.tensor([1e-9, 0.3, 0.34, 0.6, 0.7, 1 - 1e-9, 0.9], dtype=torch.float64, device=DEVICE)
    temperature = torch.tensor([1.0, 0.5, 0.5, 1.0, 1.0, 1.0, 0.0], device=DEVICE)
    token, logp = head_draw(hidden, weight, 200, u, temperature)
    assert token.tolist() == [70, 70, 71, 71, 140, 140, 70]
    assert torch.allclose(logp, torch.full((7, ), -math.log(3), device=DEVICE))


@pytest.mark.parametrize("filters", [(0.7, 0), (1.0, 5)])
def test_top_p_and_top_k_take_the_path_over_logits(filters, kernels):
    hidden, weight = normal(30, 24, seed=5), normal(400, 24, seed=6)
    u = (torch.arange(30, dtype=torch.float64, device=DEVICE) + 0.5) / 30
    settings = [torch.full((30, ), x, device=DEVICE) for x in (0.9, *filters)]
    token, logp = head_draw(hidden, weight, 390, u, *settings)
    expected = draw(hidden @ weight[:390].T, u, *settings)
    assert torch.equal(token, expected[0]) and torch.allclose(logp, expected[1], atol=1e-5)


# ------------------------------------------------------------------------------------------ inside the model


def tiny_model(layers=2):
    config = qwen.ModelConfig(300, 48, 64, layers, 3, 1, tie_word_embeddings=True)
    model = qwen.Qwen2(config).init_weights_(0)
    for p in model.parameters():  # init's 0.02 would leave all tokens alike
        if p.dim() > 1:
            p.data.mul_(8)
    return model.to(DEVICE)


REQUESTS = [Request(list(range(40, 70)), n=2, max_new_tokens=6, temperature=0.9, seed=1),
            Request([5, 6, 7], n=1, max_new_tokens=4, temperature=0.0),
            Request(list(range(30)), n=1, max_new_tokens=4, temperature=0.7, top_k=20, seed=2)]


def test_the_sampler_on_kernels_writes_what_the_reference_writes(kernels, monkeypatch):
    """Prefill, decode over forked pages, greedy, sampled and filtered rows; the reference on a CPU."""
    runs = []
    for fused in (False, True):
        monkeypatch.setattr(backend, "fused", lambda x, fused=fused: fused)
        sampler = Sampler(tiny_model(layers=1).to(DEVICE if fused else "cpu"), max_sequences=3)
        runs.append(sorted(sampler.generate(REQUESTS), key=lambda c: (c.prompt_index, c.sample_index)))
        assert sampler.stats.copied_pages and sampler.stats.peak_rows == 3
    assert len(runs[0]) == 4
    for a, b in zip(*runs, strict=True):
        assert a.token_ids == b.token_ids
        assert np.allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_a_grpo_step_on_kernels_has_the_reference_loss_and_gradients(kernels, monkeypatch):
    """Loss, metrics and every parameter's gradient, the KL's and the sampler's correction included."""
    generator = torch.Generator().manual_seed(0)
    samples = [grpo.Sample(torch.randint(290, (p, ), generator=generator).tolist(),
                           torch.randint(290, (n, ), generator=generator).tolist(), [-3.0] * n, a)
               for p, n, a in ((3, 12, 1.0), (7, 1, -0.5), (1, 18, 0.25))]
    config = train.Config(beta=0.1, tis_cap=2.0, max_new_tokens=40)
    results = []
    for fused in (False, True):
        monkeypatch.setattr(backend, "fused", lambda x, fused=fused: fused)
        model, reference = tiny_model(), tiny_model()
        reference.head_weight.data.mul_(1.1)
        batch = grpo.collate(samples, DEVICE)
        sums, values = train.backward(model, reference, batch, None, {"samples": 3, "tokens": 31}, config,
                                      290, train.run.Clock())
        results.append((sums, torch.stack(values), {name: p.grad for name, p in model.named_parameters()}))
    (sums, gaps, gradients), (other, other_gaps, others) = results
    assert sums["loss"] != 0 and sums["kl"] > 0
    for name, value in sums.items():
        assert other[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert torch.allclose(gaps, other_gaps, atol=1e-4)
    for name, gradient in gradients.items():
        assert relative(others[name], gradient.double()) < 1e-4, name


def test_a_cpu_tensor_takes_the_reference():
    assert not backend.fused(torch.zeros(1))


def test_all_works_without_triton():
    """As on a Mac: the import of triton fails."""
    code = """
import sys
sys.modules["triton"] = None
import torch, model
from kernels import backend, linear_logprob
from sampler import Request, Sampler
tiny = model.Qwen2(model.ModelConfig(50, 32, 32, 1, 2, 1)).init_weights_(0)
(c,) = Sampler(tiny).generate([Request([1, 2], max_new_tokens=3)])
logp, _ = linear_logprob(torch.ones(2, 32), tiny.head_weight, torch.tensor([1, 2]))
print(backend.AVAILABLE, len(c.token_ids), logp.isfinite().all().item())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "3", "True"], done.stderr


# ------------------------------------------------------------------------------------------ compiled


@pytest.mark.slow
def test_every_kernel_compiles_for_three_generations_of_gpus_within_their_limits():
    """In a process of its own, without the interpreter. ptxas spills a few bytes here and there; the full
    table is bench/results/aot.json."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    names = ["decode 7B bfloat16", "prefill 7B bfloat16", "write 7B bfloat16", "head 128 rows bfloat16",
             "logprob bfloat16"]
    done = subprocess.run([sys.executable, "-m", "bench.aot", "--cases", *names], cwd=ROOT, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])["kernels"]
    assert {r["kernel"] for r in rows} == {"attend", "combine", "rotate_write", "head_tiles", "pick",
                                           "row_stats", "row_gradient"}
    assert {r["arch"] for r in rows} == {80, 90, 100}
    limits = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
    for r in rows:
        assert r["shared_bytes"] <= limits[r["arch"]] and r["spilled_bytes"] <= 32, r


# ------------------------------------------------------------------------------------------ split heads

SPLIT_HEAD = """
import sys
import torch
import torch.distributed as dist
from kernels import backend
from kernels.sample import head_draw
from lib import distributed

distributed.setup("cpu")
rank, size = dist.get_rank(), dist.get_world_size()
generator = torch.Generator().manual_seed(0)
hidden, weight = torch.randn(9, 24, generator=generator), torch.randn(201, 24, generator=generator) / 3
n_valid, own = 185, 201 // size
for fused in (False, True):
    backend.fused = lambda x: fused
    u = (torch.arange(9, dtype=torch.float64) + 0.5) / 9
    temperature = torch.tensor([0.0, 0.5, 1.0] * 3)
    for filters in ((), (torch.full((9,), 0.8), torch.full((9,), 30))):
        right = head_draw(hidden, weight, n_valid, u, temperature, *filters)
        found = head_draw(hidden, weight[rank * own:(rank + 1) * own], n_valid, u, temperature, *filters,
                          group=dist.group.WORLD)
        assert torch.equal(found[0], right[0]), (found[0], right[0])
        torch.testing.assert_close(found[1], right[1], rtol=1e-5, atol=1e-5)
print("equal", flush=True)
distributed.close()
"""


def test_a_head_split_over_ranks_gives_the_same_draws(forks):
    """Reference and kernels; 185 valid ids of 201, so that the last slice is cut; a slice of 67 ids is a tile
    and a bit of the next."""
    assert all("equal" in said for said in forks.run(SPLIT_HEAD, ranks=3))


@pytest.mark.parametrize("kernel, itemsize, size, found", [
    ("decode", 2, 64, "decode/2/64"), ("decode", 2, 80, "decode/2/128"), ("decode", 2, 256, "decode/2/128"),
    ("head_tiles", 2, 3, "head_tiles/2/32"), ("decode", 4, 16, "decode/4/128")])
def test_the_nearest_entry_of_the_table_is_taken(kernel, itemsize, size, found, monkeypatch):
    monkeypatch.setattr(backend, "device_name", lambda: "none")
    dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
    assert backend.blocks(kernel, dtype, size) == backend.table()["default"][found]


def test_an_entry_of_the_device_goes_before_the_default_and_hides_no_other(monkeypatch):
    everything = backend.table() | {backend.device_name(): {"decode/2/64": {"CHUNK": 7}}}
    monkeypatch.setattr(backend, "table", lambda: everything)
    assert backend.blocks("decode", torch.bfloat16, 64) == {"CHUNK": 7}
    assert backend.blocks("decode", torch.bfloat16, 128)["CHUNK"] > 7


def test_a_kernel_without_an_entry_is_named():
    with pytest.raises(KeyError, match="has no entry nonsense/2/"):
        backend.blocks("nonsense", torch.bfloat16, 1)
