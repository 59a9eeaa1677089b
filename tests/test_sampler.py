"""The engine against plain forwards: what is sampled depends on the request's key and on nothing else."""

import gc
import os
import random
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import model as qwen
import replica
from data.tokenizer import Tokenizer
from kernels import linear_logprob
from lib.options import UserError
from sampler import Sampler, workspace
from scheduler import Request

BASE = Path(__file__).parent.parent / "data" / "tiny" / "base"
QWEN3 = {"head_dim": 32, "qk_norm": True}


def perturbed(vocab_size=300, heads=4, kv_heads=2, seed=0, **kwargs) -> qwen.Qwen2:
    """A random model in which every parameter matters."""
    config = qwen.ModelConfig(vocab_size,
                              64,
                              96,
                              3,
                              heads,
                              kv_heads,
                              tie_word_embeddings=True,
                              rope_theta=1e4,
                              **kwargs)
    model = qwen.Qwen2(config).init_weights_(seed).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed + 1)
    for p in model.parameters():
        p.add_(torch.randn(p.shape, generator=generator) * (0.05 if p.dim() > 1 else 0.2))
    return model


def requests(count=4, n=3, new=24, vocab=300, **kwargs) -> list[Request]:
    rng = random.Random(7)
    return [
        Request([rng.randrange(vocab) for _ in range(rng.randint(5, 40))], n, new, seed=i, **kwargs)
        for i in range(count)
    ]


def run(model, reqs, tokenizer=None, **kwargs):
    """{(prompt, sample): completion}, and the sampler."""
    sampler = Sampler(model, tokenizer, **kwargs)
    return {(c.prompt_index, c.sample_index): c for c in sampler.generate(reqs)}, sampler


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(a[k].token_ids == b[k].token_ids and a[k].logprobs == b[k].logprobs
                                        for k in a)


@pytest.fixture(scope="module")
def reference():
    return run(perturbed(), requests())[0]


@pytest.mark.parametrize("options", [
    {"max_sequences": 1}, {"max_sequences": 2}, {"max_sequences": 5}, {"page_size": 4}, {"page_size": 64},
    {"token_budget": 16, "max_sequences": 4}, {"overlap": True}, {"overlap": True, "max_sequences": 2}])
def test_samples_are_bitwise_the_same_however_they_are_scheduled(reference, options):
    assert same(run(perturbed(), requests(), **options)[0], reference)


@pytest.fixture(scope="module")
def long_reference():
    """Contexts on both sides of 192, 384 and 512, where a CPU's attention changes its order of summation."""
    return run(perturbed(), long_requests())[0]


def long_requests(guess=0):
    rng = random.Random(3)
    return [Request([rng.randrange(300) for _ in range(n)], 2, 40, seed=n, expected_tokens=guess)
            for n in (5, 100, 170, 330, 365, 480, 500, 700)]


@pytest.mark.parametrize("options", [
    {"max_sequences": 1}, {"token_budget": 16, "max_sequences": 8}, {"token_budget": 100, "max_sequences": 3},
    {"num_pages": 65, "overlap": True}, {"num_pages": 65, "page_size": 16, "max_sequences": 64}])
def test_long_contexts_are_bitwise_the_same_alone_in_chunks_and_after_preemption(long_reference, options):
    """With a guess of one token for each sample the pool is overfilled, and the youngest gives way."""
    out, sampler = run(perturbed(), long_requests(guess=1), **options)
    assert same(out, long_reference)
    if "num_pages" in options:
        assert sampler.stats.preemptions > 0


def test_a_sample_is_bitwise_the_same_alone_and_among_64():
    crowd = requests(21, n=3) + [Request([9, 8, 7], 1, 30, seed=5)]
    among = run(perturbed(), crowd, max_sequences=64)[0][21, 0]
    alone = run(perturbed(), crowd[-1:])[0][0, 0]
    assert among.token_ids == alone.token_ids and among.logprobs == alone.logprobs


def test_samples_do_not_depend_on_the_order_of_requests(reference):
    swapped = run(perturbed(), requests()[::-1])[0]
    assert same({(3 - p, g): c for (p, g), c in swapped.items()}, reference)


def test_samples_of_a_group_differ_and_seeds_matter(reference):
    assert len({tuple(c.token_ids) for c in reference.values()}) == len(reference)
    other = run(perturbed(),
                [Request(r.prompt_ids, r.n, r.max_new_tokens, seed=r.seed + 100) for r in requests()])[0]
    assert all(other[k].token_ids != reference[k].token_ids for k in reference)


@pytest.mark.parametrize("heads,kv_heads,own", [(4, 4, {}), (4, 2, {}), (8, 1, {}), (4, 2, QWEN3)])
def test_logprobs_equal_a_packed_forward_at_the_sampling_temperature(heads, kv_heads, own):
    model, reqs = perturbed(heads=heads, kv_heads=kv_heads, **own), requests(temperature=0.8)
    for (p, _), c in run(model, reqs, page_size=4)[0].items():
        ids = reqs[p].prompt_ids + c.token_ids
        hidden = model(torch.tensor(ids), qwen.packed([len(ids)]))
        logp, _ = linear_logprob(hidden[len(reqs[p].prompt_ids) - 1:-1], model.head_weight,
                                 torch.tensor(c.token_ids), 0.8)
        assert torch.allclose(logp, torch.tensor(c.logprobs), atol=1e-5)


@pytest.mark.parametrize(
    "tied,kv_heads,yarn,own",
    [(True, 2, None, {}), (False, 4, None, {}),
     (True, 1, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, {}),
     (True, 1, None, QWEN3), (False, 4, None, QWEN3)])
def test_greedy_continues_as_transformers_does_over_200_tokens(tmp_path, tied, kv_heads, yarn, own):
    transformers = pytest.importorskip("transformers")
    config = qwen.ModelConfig(300,
                              64,
                              96,
                              3,
                              4,
                              kv_heads,
                              tie_word_embeddings=tied,
                              rope_scaling=yarn,
                              max_position_embeddings=512,
                              **own)
    model = qwen.Qwen2(config).init_weights_(3).requires_grad_(False)
    for p in model.parameters():
        p.add_(torch.randn(p.shape) * (0.1 if p.dim() > 1 else 0.2))
    qwen.save(model, tmp_path)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    prompts = [r.prompt_ids for r in requests(3)]
    ours, _ = run(model, [Request(p, 1, 200, temperature=0.0) for p in prompts])
    for i, p in enumerate(prompts):
        theirs = oracle.generate(torch.tensor([p]),
                                 max_new_tokens=200,
                                 min_new_tokens=200,
                                 do_sample=False,
                                 pad_token_id=0)
        assert ours[i, 0].token_ids == theirs[0, len(p):].tolist()


def test_a_group_prefills_its_prompt_once_and_shares_its_pages():
    prompt = list(range(100)) * 2 + [1]  # 201 tokens: 12 full pages and one that is copied on write
    _, sampler = run(perturbed(), [Request(prompt, 8, 8, seed=1)])
    assert sampler.stats.prefill_tokens == 201
    assert sampler.stats.copied_pages == 7  # the last sample keeps the original
    assert sampler.stats.peak_pages == 12 + 8


def test_requests_of_one_prompt_share_its_prefill():
    reqs = [Request(list(range(50)), 1, 8, seed=i) for i in range(4)]
    out, sampler = run(perturbed(), reqs)
    assert sampler.stats.prefill_tokens == 50
    assert all(out[i, 0].token_ids == run(perturbed(), [r])[0][0, 0].token_ids for i, r in enumerate(reqs))


def test_the_host_writes_no_more_for_a_long_context_than_for_a_short_one():
    """Numbers from Python lists to tensors in 32 steps of decode of 4 rows: their pages, and nothing else."""
    written = {}
    for context in (112, 16000):  # whole pages both
        sampler = Sampler(perturbed(max_position_embeddings=20000), page_size=16)
        prompt = [i % 300 for i in range(context)]
        stream = sampler.generate([Request(prompt, 1, 40, seed=s) for s in range(4)])
        launch, counts = sampler.launch, []

        def counting(step, launch=launch, counts=counts, sampler=sampler):
            before = sampler.stats.host_elements
            drawn = launch(step)
            if not (step.chunks or step.forks):
                counts.append(sampler.stats.host_elements - before)
            return drawn

        sampler.launch = counting
        list(stream)
        written[context] = counts
    assert written[112] == written[16000] and len(written[112]) == 39
    assert max(written[112]) <= 4 + 3 * 4 and written[112].count(0) > 32  # row numbers; row, column, page


def test_memory_of_pages_goes_when_the_engine_sleeps_and_comes_back():
    sampler = Sampler(perturbed())
    stream = sampler.generate(requests())
    next(stream)
    pages = [weakref.ref(x) for x in (*sampler.pool.keys, *sampler.pool.values, sampler.rows.table)]
    before = {name: p.data_ptr() for name, p in sampler.model.named_parameters()}
    stream.close()
    sampler.sleep()
    gc.collect()
    assert not any(ref() is not None for ref in pages)
    assert same({(c.prompt_index, c.sample_index): c for c in sampler.generate(requests())},
                run(perturbed(), requests())[0])
    assert before == {name: p.data_ptr() for name, p in sampler.model.named_parameters()}


def test_weights_that_gave_back_their_memory_sample_as_before_once_they_are_written():
    """Fused products included, whose parameters share a tensor."""
    model, source = perturbed(), perturbed()
    before, _ = run(model, requests())
    for _ in range(2):
        with replica.released(model):
            assert all(p.untyped_storage().nbytes() == 0 for p in model.parameters())
        with torch.no_grad():
            for p, q in zip(model.parameters(), source.parameters()):
                p.fill_(torch.nan).copy_(q)
        assert model.layers[0].self_attn.qkv.holds() and same(run(model, requests())[0], before)


def test_weights_that_changed_between_calls_are_the_ones_that_sample():
    """The engine computes with packed copies."""
    model, other = perturbed(), perturbed(seed=4)
    sampler = Sampler(model)
    list(sampler.generate(requests(1)))
    for p, q in zip(model.parameters(), other.parameters()):
        p.data.copy_(q)
    out = {(c.prompt_index, c.sample_index): c for c in sampler.generate(requests())}
    assert same(out, run(other, requests())[0])
    sampler.model.to(torch.float64).to(torch.float32)  # new storage for every parameter
    assert same({(c.prompt_index, c.sample_index): c for c in sampler.generate(requests())}, out)


def test_a_model_still_trains_after_it_has_sampled():
    model = perturbed().requires_grad_(True)
    list(Sampler(model).generate(requests(1)))
    model(torch.tensor([1, 2, 3]), qwen.packed([3])).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in model.named_parameters()
               if "k_proj.bias" not in name)


def test_a_cancelled_request_ends_and_the_others_do_not_notice(reference):
    sampler = Sampler(perturbed())
    out = {}
    for c in sampler.generate([*requests(), Request([1, 2, 3], 3, 200, seed=9)]):
        out[c.prompt_index, c.sample_index] = c
        sampler.cancel(4)
    assert same(out, reference)


def test_no_page_is_leaked_and_an_abandoned_generator_gives_all_back():
    model = perturbed()
    sampler = Sampler(model, page_size=4, num_pages=40)
    pools = []
    for stop_after in (None, 1, 5):
        stream = sampler.generate(requests())
        for i, _ in enumerate(stream):
            pools.append(sampler.scheduler.pages)
            if i == stop_after:
                break
        stream.close()
        gc.collect()
        pool = pools[-1]
        assert sum(pool.references) == 0 and sorted(pool.free_list) == list(range(1, 40))


def test_every_request_finishes_in_the_smallest_pool_that_can_hold_it():
    reqs = requests(6, n=4, new=30)
    need = max(-(-(len(r.prompt_ids) + 30) // 4) for r in reqs) + 2
    out, sampler = run(perturbed(), reqs, page_size=4, num_pages=need)
    assert len(out) == 24 and all(len(c.token_ids) == 30 for c in out.values())
    assert sum(sampler.stats.__dict__.values()) > 0


def test_the_memory_must_hold_the_longest_request_a_copied_page_and_the_one_of_padding():
    sampler = Sampler(model := perturbed(), page_size=4)
    page = 4 * model.config.kv_bytes_per_token(torch.float32)
    half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    sampler.memory = 12.5 * page / half
    assert sampler.affordable(rows=8, columns=10) == 12
    with pytest.raises(UserError, match="can have 12 pages of 4 tokens, .* needs 13"):
        sampler.affordable(rows=8, columns=11)


def test_a_rank_of_two_keeps_half_of_a_page():
    sampler = Sampler(model := perturbed(), page_size=4)
    model.tp = 2
    half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    sampler.memory = 12.5 * 2 * model.config.kv_bytes_per_token(torch.float32) / half
    assert sampler.affordable(rows=8, columns=10) == 12


def test_the_workspace_of_a_gpu_by_hand():
    """100 tokens x (4 x 64 + 4 x 96) x 4 bytes; twice 8 rows in 24 chunks of 64 fp32 and 8 bytes a logit; 1
    GiB."""
    config = qwen.ModelConfig(300, 64, 96, 2, 4, 2)
    assert workspace(config, 1, 100, 8, 600) == 256_000 + 2 * (4 * 24 * 64 + 8 * 8 * 300) + 2**30
    assert workspace(config, 2, 100, 8, 600) == 179_200 + 2 * (2 * 24 * 64 + 4 * 8 * 300) + 2**30


def test_a_request_that_can_never_fit_is_refused_before_any_work():
    with pytest.raises(ValueError, match="request 1: .* pages, the pool has 10"):
        Sampler(perturbed(), page_size=4,
                num_pages=10).generate([Request([1], 1, 8), Request([1] * 40, 1, 8)])


@pytest.mark.parametrize("bad", [
    Request([]),
    Request([1], n=0),
    Request([1], temperature=-1.0),
    Request([1], top_p=0.0),
    Request([1], top_k=-1),
    Request([300]),
    Request([1], stop=("x", ))
])
def test_bad_requests_are_refused(bad):
    with pytest.raises(ValueError, match="request 0"):
        Sampler(perturbed()).generate([bad])


def test_completions_come_as_they_finish():
    reqs = [Request([1, 2, 3], 1, n, seed=i) for i, n in enumerate((30, 5, 15))]
    assert [c.prompt_index for c in Sampler(perturbed()).generate(reqs)] == [1, 2, 0]


def test_top_k_1_is_greedy_and_reports_the_full_softmax():
    model, reqs = perturbed(), requests(2, n=1)
    greedy = run(model, [Request(r.prompt_ids, 1, 24, temperature=0.0) for r in reqs])[0]
    narrow = run(model, [Request(r.prompt_ids, 1, 24, top_k=1) for r in reqs])[0]
    wide = run(model, [Request(r.prompt_ids, 1, 24, top_p=1e-6) for r in reqs])[0]
    assert same(greedy, narrow) and same(greedy, wide)
    assert all(p < -0.01 for c in narrow.values() for p in c.logprobs[:5])


def test_padded_rows_of_the_vocabulary_are_neither_sampled_nor_normalised_over():
    tokenizer = Tokenizer(BASE)
    model = perturbed(vocab_size=1100)
    model.head_weight[1024:] = model.head_weight[:76] * 50  # would win, and would take all the mass
    out, _ = run(model, [Request([5, 6, 7], 8, 40)], tokenizer)
    assert max(t for c in out.values() for t in c.token_ids) < tokenizer.n_valid == 1024
    c = out[0, 0]
    hidden = model(torch.tensor([5, 6, 7] + c.token_ids), qwen.packed([3 + len(c.token_ids)]))
    logp, _ = linear_logprob(hidden[2:-1], model.head_weight[:1024], torch.tensor(c.token_ids))
    assert torch.allclose(logp, torch.tensor(c.logprobs), atol=1e-5)


class Scripted(torch.nn.Module):
    """A stand-in whose most likely next token is given by a table of the current token."""
    def __init__(self, successor: dict[int, int], size: int):
        super().__init__()
        self.config, self.tp, self.group, self.layers = qwen.ModelConfig(size, size, 1, 1, 1, 1), 1, None, []
        self.register_buffer("head_weight", torch.eye(size) * 100)
        self.successor = successor

    def forward(self, tokens_T, attention):
        return torch.nn.functional.one_hot(
            torch.tensor([self.successor.get(t, 0) for t in tokens_T.tolist()]),
            self.config.vocab_size).float()


def scripted(text: str, stop: tuple[str, ...], new=50, eos=False, **options):
    tokenizer = Tokenizer(BASE)
    ids = [tokenizer.encode("Q")[0]] + tokenizer.encode(text) + (tokenizer.eos_ids if eos else [])
    assert len(set(ids)) == len(ids), "a token that repeats would need a longer memory"
    model = Scripted(dict(zip(ids, ids[1:])), tokenizer.n_valid)
    sampler = Sampler(model, tokenizer, **options)
    (completion, ) = sampler.generate([Request(ids[:1], 1, new, temperature=0.0, stop=stop)])
    return completion, ids[1:], tokenizer


def test_a_stop_string_ends_the_sample_and_stays_in_it():
    """The silent bug of cutting it off: the closing tag is then never trained, and the structure check
    fails."""
    c, ids, _ = scripted(" the fog</answer> was gone", ("</answer>", ))
    assert c.finish_reason == "stop" and c.text == " the fog</answer>" and c.token_ids == ids[:len(c.token_ids
                                                                                                   )]
    assert len(c.logprobs) == len(c.token_ids)


def test_an_end_that_is_seen_a_step_late_leaves_no_trace():
    """With overlap the next step is under way when the end is found; what it draws is dropped."""
    for args in ((" the fog</answer> was gone", ("</answer>",)), (" the fog", (), 50, True),
                 (" the fog came over the harbour".replace(" the h", " h"), (), 3)):
        assert scripted(*args, overlap=True)[0] == scripted(*args)[0]


def test_with_overlap_nothing_is_added_to_samples_that_ended_or_were_cancelled():
    """Several, so that the step under way is looked at: what it drew for them is dropped."""
    tokenizer, model = Tokenizer(BASE), perturbed(vocab_size=1024)
    reqs = [Request(r.prompt_ids, 4, 24, seed=i, stop=("q", "an")) for i, r in enumerate(requests())]
    expected, _ = run(model, reqs, tokenizer)
    assert {c.finish_reason for c in expected.values()} == {"stop", "length"}
    sampler, out = Sampler(model, tokenizer, max_sequences=9, overlap=True), {}
    for c in sampler.generate([*reqs, Request([1, 2, 3], 3, 60, seed=9)]):
        out[c.prompt_index, c.sample_index] = c
        sampler.cancel(4)
    assert same(out, expected) and [c.text for c in out.values()] == [expected[k].text for k in out]


def test_a_stop_string_is_found_across_tokens_and_inside_one():
    assert scripted(" the fog came over", ("og ca", ))[0].text.endswith("fog came")
    assert scripted(" the fog came over", ("og came", "#"))[0].text.endswith("fog came"), "the longest too"
    assert scripted(" a golden harbour", ("arbo", ))[0].finish_reason == "stop"


def test_the_end_of_text_token_is_trained_but_not_shown():
    c, ids, tokenizer = scripted(" the fog", (), eos=True)
    assert c.finish_reason == "stop" and c.token_ids == ids and c.token_ids[
        -1] in tokenizer.eos_ids and c.text == " the fog"


def test_the_budget_ends_a_sample_with_reason_length():
    c, ids, _ = scripted(" the fog came over the harbour".replace(" the h", " h"), (), new=3)
    assert c.finish_reason == "length" and c.token_ids == ids[:3]


def test_a_sample_that_ends_with_its_budget_was_not_cut():
    """Its reason is what ended it, or it would count as truncated and could be masked."""
    for text, stop, eos in ((" the fog</answer>", ("</answer>",), False), (" the fog", (), True)):
        _, ids, _ = scripted(text, stop, eos=eos)
        c, _, _ = scripted(text, stop, new=len(ids), eos=eos)
        assert c.token_ids == ids and c.finish_reason == "stop"


def test_each_end_of_text_id_ends_a_sample():
    """Instruct models name two."""
    tokenizer = Tokenizer(BASE)
    ask, word, *tokenizer.eos_ids = tokenizer.encode("Q the fog came")[:4]
    for end in tokenizer.eos_ids:
        model = Scripted({ask: word, word: end, end: word}, tokenizer.n_valid)
        (c,) = Sampler(model, tokenizer).generate([Request([ask], 1, 9, temperature=0.0)])
        assert c.token_ids == [word, end] and c.finish_reason == "stop"
        assert c.text == tokenizer.decode([word])


# ---------------------------------------------------------------------- packed weights


@pytest.mark.parametrize("library", ["whichever there is", "oneDNN"])
def test_a_row_of_a_packed_product_has_the_same_bits_among_any_number_of_rows(library, monkeypatch):
    if library == "oneDNN":
        monkeypatch.setattr(replica, "mkl_packs", lambda: False)
    torch.manual_seed(0)
    for width, columns in ((512, 768), (1408, 512), (96, 130)):
        weight, bias, x = torch.randn(columns, width), torch.randn(columns), torch.randn(300, width)
        product = replica.pack(weight)
        if product is None:
            pytest.skip("neither MKL nor oneDNN")
        few = torch.cat([product(rows, weight, bias) for rows in x.split(4)])
        torch.testing.assert_close(few, F.linear(x, weight, bias), rtol=1e-5, atol=1e-4)
        for rows in (5, 16, 33, 64, 100, 300):
            assert torch.equal(product(x[:rows], weight, bias), few[:rows])
