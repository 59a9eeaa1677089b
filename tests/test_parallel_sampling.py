"""One engine over several ranks, and several engines side by side: the same samples as on one."""

import json
from pathlib import Path

import pytest
import torch

import model as qwen
import parallel
from bench.exactness import compare, split
from data import prompts as prompt_data
from data.tokenizer import Tokenizer
from lib import distributed
from lib.options import UserError
from replica import check_tp, tp_slice
from sampler import Sampler
from scheduler import Request, assign
from tests.helpers import ROOT, write_qwen3

BASE = ROOT / "data" / "tiny" / "base"


@pytest.fixture(scope="module")
def requests():
    tokenizer = Tokenizer(BASE)
    prompts, _ = prompt_data.read(str(ROOT / "data/tiny/eval_prompts.jsonl"), "think", 256, True)
    return [Request(tokenizer.encode(p.text), 2, 48, 0.8, seed=i) for i, p in enumerate(prompts[:6])]


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
def test_two_ranks_with_half_the_heads_each_draw_what_one_draws(family, requests, tmp_path):
    """Bit for bit it cannot be: two sums of halves round otherwise. At most one draw in a thousand flips."""
    path = BASE if family == "Qwen2" else write_qwen3(tmp_path)
    completions = split(str(path), requests, 2)
    found = compare(qwen.load(path), Tokenizer(path).n_valid, requests, completions)
    assert found["draws"] > 400 and found["flip_share"] <= 1e-3
    assert 0 < found["gap_max"] < 1e-4  # 0 would say that nothing was split


def one_of_two_engines(folder: str):
    """What each of four ranks does."""
    world = distributed.setup("cpu")
    whole = qwen.load(BASE)
    model = qwen.Qwen2(whole.config, parallel.tp_group(2)).requires_grad_(False)
    parallel.publish(whole, model)
    out = drawn(model, engine=world.rank // 2)
    Path(folder, f"{world.rank}.json").write_text(json.dumps(out))
    distributed.close()


def drawn(model, engine: int) -> list:
    request = Request(list(range(3, 40 + 7 * engine)), 2 + engine, 30 - 9 * engine, 0.8, seed=engine)
    return sorted([c.sample_index, c.token_ids] for c in Sampler(model).generate([request]))


@pytest.mark.slow
def test_two_engines_of_two_ranks_on_one_node_do_not_disturb_each_other(forks, tmp_path):
    """Weights by `publish`, different requests and numbers of steps in each."""
    forks.run(f"import tests.test_parallel_sampling as t; t.one_of_two_engines({str(tmp_path)!r})", ranks=4)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    model = qwen.load(BASE)
    for engine in (0, 1):
        assert ranks[2 * engine] == ranks[2 * engine + 1] == drawn(model, engine)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("tp", [2, 4])
def test_slices_of_a_checkpoint_put_together_are_the_checkpoint(tp, qk_norm):
    config = qwen.ModelConfig(64, 32, 48, 1, 4, 4, head_dim=12, qk_norm=qk_norm)
    for name, p in qwen.Qwen2(config).init_weights_(0).named_parameters():
        parts = [tp_slice(name, p, rank, tp) for rank in range(tp)]
        if "norm" in name:
            assert all(torch.equal(part, p) for part in parts)
            continue
        dim = 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0
        assert torch.equal(torch.cat(parts, dim), p) and parts[0].shape[dim] == p.shape[dim] // tp


@pytest.mark.parametrize("tp, named", [(3, "num_attention_heads"), (4, "num_key_value_heads")])
def test_a_split_that_does_not_divide_the_model_is_refused(tp, named):
    with pytest.raises(UserError, match=f"tp {tp} does not divide the model's {named}"):
        check_tp(qwen.ModelConfig(64, 32, 48, 1, 4, 2), tp)


def test_groups_go_to_ranks_longest_first_and_evenly():
    assert assign([5, 9, 1, 7, 3, 8], 2) == [[0, 1, 4], [2, 3, 5]]  # 9 5 3 | 8 7 1
    assert assign([1, 1, 1, 1], 2) == [[0, 2], [1, 3]]
    assert assign([4, 4, 4, 4, 4], 4) == [[0, 4], [1], [2], [3]]
    expected = [(i * 7919) % 1000 + 1 for i in range(64)]
    shares = assign(expected, 8)
    assert sorted(sum(shares, [])) == list(range(64)) and {len(s) for s in shares} == {8}
    loads = [sum(expected[i] for i in share) for share in shares]
    assert max(loads) / min(loads) < 1.05
    assert max(loads) < max(sum(expected[r::8]) for r in range(8))  # dealing in turn would be worse
