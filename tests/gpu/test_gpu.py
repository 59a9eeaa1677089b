"""What only a GPU can show: sizes of the mission, CUDA graphs, no synchronisation, memory, determinism, bf16
and NCCL in a whole run. The kernels' own tests, tests/test_kernels.py and test_logprob.py, run compiled where
there is a GPU.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import model as qwen
from kernels import backend, linear_logprob
from kernels.attention import PagedDecode, PagedPrefill, packed_attention
from kernels.sample import draw, head_draw
from sampler import Sampler
from scheduler import Request

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
ROOT = Path(__file__).parents[2]
BF16 = torch.bfloat16


def normal(*shape, dtype=BF16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def relative(x, expected):
    return ((x.double() - expected.double()).norm() / expected.double().norm()).item()


def paged(contexts, kv_heads, dim, page_size=16, dtype=BF16):
    columns = [-(-n // page_size) for n in contexts]
    keys, values = (normal(sum(columns) + 1, page_size, kv_heads, dim, dtype=dtype, seed=s) for s in (1, 2))
    table = torch.zeros(len(contexts), max(columns), dtype=torch.int64)
    for row, own in zip(table, (torch.randperm(sum(columns)) + 1).split(columns)):
        row[:len(own)] = own
    return keys, values, table.cuda()


def exact_row(q_HD, keys, values, pages, n):
    k, v = (x[pages].flatten(0, 1)[:n].double().repeat_interleave(len(q_HD) // x.shape[2], dim=1)
            for x in (keys, values))
    weight = (torch.einsum("hd,nhd->hn", q_HD.double(), k) / math.sqrt(q_HD.shape[-1])).softmax(-1)
    return torch.einsum("hn,nhd->hd", weight, v)


# ------------------------------------------------------------------------------------------ attention


@pytest.mark.parametrize("heads, kv_heads, dim", [(28, 4, 128), (40, 8, 128), (14, 2, 64)])
def test_decode_of_contexts_from_one_to_131072(heads, kv_heads, dim):
    contexts = [131072, 1, 14000, 8191, 8192, 512, 513, 100]
    keys, values, table = paged(contexts, kv_heads, dim)
    q = normal(len(contexts), heads, dim)
    out = PagedDecode(keys, table, torch.tensor(contexts, device="cuda"))(q, keys, values)
    for s, n in enumerate(contexts):
        assert relative(out[s], exact_row(q[s], keys, values, table[s], n)) < 1e-2, n


def test_fp32_is_not_computed_in_tf32():
    """tf32 would be off by 1e-3."""
    contexts = [3000, 700]
    keys, values, table = paged(contexts, 4, 128, dtype=torch.float32)
    q = normal(2, 28, 128, dtype=torch.float32)
    for out in (PagedDecode(keys, table, torch.tensor(contexts, device="cuda"))(q, keys, values),
                PagedPrefill(keys, 28, table, [1, 1], contexts)(q, keys, values)):
        for s, n in enumerate(contexts):
            assert relative(out[s], exact_row(q[s], keys, values, table[s], n)) < 1e-5


def test_pages_beyond_two_to_the_31_elements_are_addressed():
    page_size, kv_heads, dim = 64, 8, 128
    pages = 2**31 // (page_size * kv_heads * dim) + 9
    if torch.cuda.mem_get_info()[0] < 2 * pages * page_size * kv_heads * dim * 2 + 2**30:
        pytest.skip("needs 10 GB of free GPU memory")
    keys, values = (torch.zeros(pages, page_size, kv_heads, dim, dtype=BF16, device="cuda") for _ in "kv")
    table = torch.tensor([[pages - 1, pages - 2]], device="cuda")
    for x in (keys, values):
        x[-2:] = normal(2, page_size, kv_heads, dim)
    q = normal(1, 40, dim)
    out = PagedDecode(keys, table, torch.tensor([100], device="cuda"))(q, keys, values)
    assert relative(out[0], exact_row(q[0], keys, values, table[0], 100)) < 1e-2


def test_a_cuda_graph_of_decode_follows_contexts_tables_and_empty_slots():
    """Captured once, planning included, then replayed with other contexts; nothing synchronises."""
    keys, values, table = paged([2000, 600, 90, 1], 4, 128)
    q, context = normal(4, 28, 128), torch.tensor([2000, 600, 90, 1], device="cuda")

    def step():
        return PagedDecode(keys, table, context)(q, keys, values)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for contexts in ([2000, 600, 90, 1], [1, 0, 17, 1], [1999, 1, 0, 0]):
        context.copy_(torch.tensor(contexts))
        graph.replay()
        for s, n in enumerate(contexts):
            if n:
                assert relative(out[s], exact_row(q[s], keys, values, table[s], n)) < 1e-2
            else:
                assert not out[s].any()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_prompt_of_8k_prefilled_in_chunks_of_any_size():
    keys, values, table = paged([8192], 4, 128)
    q = normal(8192, 28, 128)
    whole = PagedPrefill(keys, 28, table, [8192], [8192])(q, keys, values)
    for t in (0, 1, 4000, 8191):
        assert relative(whole[t], exact_row(q[t], keys, values, table[0], t + 1)) < 1e-2
    for size in (512, 3000):
        parts = [PagedPrefill(keys, 28, table, [min(size, 8192 - a)], [min(a + size, 8192)])(
            q[a:a + size], keys, values) for a in range(0, 8192, size)]
        assert relative(torch.cat(parts), whole) < 1e-2


@pytest.mark.parametrize("dtype, tolerance", [(BF16, 2e-2), (torch.float16, 5e-3), (torch.float32, 1e-4)])
def test_packed_attention_equals_fp32_sdpa_forward_and_backward(dtype, tolerance):
    lengths = [700, 1, 130, 64]
    q, k, v = (normal(sum(lengths), n, 64, dtype=dtype, seed=n).requires_grad_() for n in (14, 2, 2))
    cu_seqlens = F.pad(torch.tensor(lengths, device="cuda").cumsum(0), (1, 0)).int()
    up = normal(sum(lengths), 14, 64, dtype=dtype, seed=9)
    out = packed_attention(q, k, v, lengths, cu_seqlens)
    gradients = torch.autograd.grad(out, (q, k, v), up)
    exact = [x.detach().double().cpu().requires_grad_() for x in (q, k, v)]
    right = packed_attention(*exact, lengths, cu_seqlens)
    assert relative(out.cpu(), right) < tolerance
    for x, y in zip(gradients, torch.autograd.grad(right, exact, up.double().cpu()), strict=True):
        assert relative(x.cpu(), y) < tolerance


# ------------------------------------------------------------------------------------------ the LM head


def test_linear_logprob_is_right_deterministic_and_small_at_qwens_size():
    """2,048 tokens of 7B's head: fp64 of a few rows, bit-identical twice, a tenth of the unfused memory."""
    tokens, vocabulary, hidden = 2048, 152064, 3584
    h = normal(tokens, hidden).requires_grad_()
    w = (normal(vocabulary, hidden, seed=1) * 0.03).requires_grad_()
    targets, up = torch.randint(vocabulary, (tokens, ), device="cuda"), normal(tokens, dtype=torch.float32)

    def gradients():
        logp, entropy = linear_logprob(h, w, targets, 0.8)
        return logp, entropy, *torch.autograd.grad((logp * up).sum() + 0.1 * entropy.sum(), (h, w))

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    first = gradients()
    extra = torch.cuda.max_memory_allocated() - before - w.nbytes  # the weight's gradient apart
    assert extra < 0.1 * 5 * tokens * vocabulary * 4, extra  # unfused holds about five fp32 T x V tensors
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))
    shown = [0, 1000, tokens - 1]
    z = h.detach()[shown].double() @ w.detach().double().T / 0.8
    logp = torch.log_softmax(z, -1)
    entropy = -(logp.exp() * logp).sum(-1)
    assert (first[0][shown] - logp.gather(-1, targets[shown, None])[:, 0]).abs().max() < 1e-3
    assert (first[1][shown] - entropy).abs().max() < 1e-3
    g = up[shown, None] * (F.one_hot(targets[shown], vocabulary) - logp.exp())
    g -= 0.1 * logp.exp() * (logp + entropy[:, None])
    assert relative(first[2][shown], g @ w.detach().double() / 0.8) < 1e-2


@pytest.mark.parametrize("rows", [1, 16, 100, 300])
def test_the_fused_head_draws_the_reference_tokens_at_qwens_size(rows, monkeypatch):
    """bf16: flips only where u lies within rounding of an edge of the fp32 logits' CDF."""
    h, w = normal(rows, 3584), normal(152064, 3584, seed=1) * 0.03
    u = torch.rand(rows, dtype=torch.float64, device="cuda")
    temperature = torch.where(torch.arange(rows, device="cuda") % 5 == 4, 0.0, 0.8)
    token, logp = head_draw(h, w, 151665, u, temperature)
    right, right_logp = draw(torch.mm(h, w[:151665].T, out_dtype=torch.float32), u, temperature)
    same = token == right
    assert (~same).sum() <= 0.01 * rows + 1 and token.max() < 151665
    assert (logp - right_logp)[same].abs().max() < 1e-3


# ------------------------------------------------------------------------------------------ the whole


def test_the_sampler_agrees_with_the_trainer_on_a_gpu():
    """Logprobs of the sampler against those of a packed forward of the same tokens."""
    config = qwen.ModelConfig(2048, 256, 512, 4, 4, 2, tie_word_embeddings=True)
    for dtype, mean_gap in ((torch.float32, 1e-4), (BF16, 3e-2)):
        model = qwen.Qwen2(config).init_weights_(0).to("cuda", dtype)
        sampler = Sampler(model, max_sequences=16)
        requests = [Request(list(range(5, 5 + n)), n=4, max_new_tokens=60, temperature=t, seed=n)
                    for n, t in ((3, 0.8), (40, 1.0), (17, 0.0))]
        for c in sampler.generate(requests):
            r = requests[c.prompt_index]
            ids = torch.tensor(r.prompt_ids + c.token_ids, device="cuda")
            with torch.no_grad():
                hidden = model(ids, qwen.packed([len(ids)], "cuda"))[len(r.prompt_ids) - 1:-1]
                logp, _ = linear_logprob(hidden, model.head_weight, ids[len(r.prompt_ids):],
                                         r.temperature or 1.0)
            gap = (logp.cpu() - torch.tensor(c.logprobs)).abs()
            assert gap.mean() < mean_gap, (dtype, r.temperature, gap.mean())


def engine(dtype=torch.float32, **options) -> Sampler:
    config = qwen.ModelConfig(2048, 256, 512, 4, 4, 2, tie_word_embeddings=True)
    return Sampler(qwen.Qwen2(config).init_weights_(0).to("cuda", dtype), **options)


def written(sampler: Sampler) -> dict:
    requests = [Request(list(range(5, 5 + n)), 3, 90, seed=n) for n in (3, 40, 170, 300)]
    return {(c.prompt_index, c.sample_index): c.token_ids for c in sampler.generate(requests)}


@pytest.mark.parametrize("options", [
    {"overlap": False}, {"graphs": False}, {"graphs": False, "overlap": False}, {"token_budget": 64},
    {"max_sequences": 3}, {"num_pages": 60, "max_sequences": 8}])
def test_graphs_overlap_chunks_and_preemption_do_not_change_samples(options):
    """fp32; the products' rounding depends on the batch here, so a draw in a thousand may flip, and what
    follows it in its sample."""
    expected, found = written(engine()), written(engine(**options))
    assert expected.keys() == found.keys()
    assert sum(expected[k] == found[k] for k in expected) >= len(expected) - 2


def test_decode_steps_are_graphs_and_wait_for_nothing():
    sampler = engine(max_sequences=16)
    replay, waited = sampler.replay, []

    def watched(sequences):
        known = sampler.graphs.keys() >= {next(n for n in (1, 2, 4, 8, 16) if n >= len(sequences))}
        if known:  # a capture does wait
            torch.cuda.set_sync_debug_mode("error")
        try:
            return replay(sequences)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            waited.append(known)

    sampler.replay = watched
    written(sampler)
    assert sum(waited) > 60 and 1 <= len(sampler.graphs) <= 5


def test_sleep_gives_all_memory_back_and_the_engine_wakes_again():
    sampler = engine()
    expected = written(sampler)
    sampler.sleep()
    torch.cuda.synchronize()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(3):
        assert written(sampler) == expected
        assert torch.cuda.memory_allocated() > allocated + 2**20
        sampler.sleep()
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == allocated
        assert torch.cuda.memory_reserved() <= reserved + 2**22


def test_the_pool_takes_no_more_than_its_share_of_free_memory():
    sampler = engine(memory=0.1)
    sampler.wake([Request([1] * 16, 4096, 30000)])
    free, total = torch.cuda.mem_get_info()
    assert sum(x.nbytes for x in (*sampler.pool.keys, *sampler.pool.values)) < 0.1 * total
    sampler.sleep()


def test_the_default_runs_on_a_gpu(tmp_path):
    command = [sys.executable, "train.py", "--device", "cuda", "--steps", "2", "--eval_prompts", "",
               "--run_dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert len(lines) == 2 and all(math.isfinite(line["grad_norm"]) for line in lines)
    assert lines[0]["gap/mean"] < 0.05


def test_kernels_are_compiled_here_not_interpreted():
    assert "TRITON_INTERPRET" not in os.environ and backend.fused(torch.zeros(1, device="cuda"))
