"""The whole loop under each option, and what an option does to a step on one and on two ranks."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import rewards
import train
from tests.test_run import ROOT, launch, metrics, tensors

MATRIX = [
    ["--advantage", "sum"], ["--advantage", "gdpo"], ["--normalise_std", "false"], ["--std_floor", "0"],
    ["--loss", "sequence"], ["--loss", "constant"], ["--updates_per_batch", "2"],
    ["--updates_per_batch", "2", "--is_ratio", "sequence"],
    ["--updates_per_batch", "2", "--is_ratio", "cispo", "--eps_high", "0.28"],
    ["--updates_per_batch", "2", "--eps_high", "0.28", "--loss", "sequence"], ["--tis_cap", "2"],
    ["--beta", "0.05"], ["--beta", "0.05", "--reference", "data/tiny/base", "--updates_per_batch", "2"],
    ["--overlong", "mask"], ["--reward", "length,format,overlong"], ["--reward", "format"],
    ["--prompt_style", "direct"], ["--recompute", "true"], ["--sampler_dtype", "bfloat16", "--tis_cap", "2"],
    ["--weight_decay", "0.1"], ["--max_sequences", "3"], ["--page_size", "64"], ["--stop", "</answer>"],
    ["--micro_batch_tokens", "300"], ["--eval_prompts", ""], ["--clip_grad", "0.01"],
]  # fmt: skip
# An lr at which two updates on one batch move ratios out of the clip.
SMALL = ["--prompts_per_step", "2", "--group_size", "4", "--max_new_tokens", "64", "--unreachable", "keep",
         "--eval_prompts", str(ROOT / "tests" / "eval_small.jsonl"), "--eval_every", "5", "--lr", "2e-3",
         "--warmup", "0", "--save_every", "100"]


@pytest.mark.parametrize("options", MATRIX, ids=" ".join)
def test_five_steps_under_each_option(options, tmp_path):
    train.train(train.parse([*SMALL, "--run_dir", str(tmp_path / "run"), "--steps", "5", *options]))
    lines = metrics(tmp_path / "run")
    steps = [m for m in lines if m["step"] > 0]
    assert [m["step"] for m in steps] == [1, 2, 3, 4, 5]
    assert len({frozenset(k for k in m if not k.startswith("eval/")) for m in steps}) == 1
    assert all(math.isfinite(v) for m in lines for v in m.values())
    assert any(m["grad_norm"] > 0 for m in steps)
    given = dict(zip(options[::2], options[1::2]))
    several = given.get("--updates_per_batch") == "2"
    assert (sum(m["clip_share"] for m in steps) > 0) == several, "the clip lives off-policy and only there"
    assert ("kl" in steps[0]) == ("--beta" in given) and ("tis_capped" in steps[0]) == ("--tis_cap" in given)
    if "kl" in steps[0]:
        assert steps[-1]["kl"] > steps[0]["kl"] >= 0, "the policy leaves its reference"
    assert ("skipped_updates" in steps[0]) == ("--overlong" in given)
    if "--overlong" in given:
        texts = [json.loads(line) for line in (tmp_path / "run/rollouts/step_000001.jsonl").open()]
        assert all((t["gap_mean"] is None) == (t["finish_reason"] == "length") for t in texts)
        assert {t["finish_reason"] for t in texts} == {"length", "stop"}
    records = [json.loads(line) for line in (tmp_path / "run/rollouts/step_000005.jsonl").open()]
    assert len(records) == 8 and all(math.isfinite(r["advantage"]) for r in records)


def test_a_batch_that_is_masked_whole_is_skipped_and_counted(tmp_path):
    options = ["--overlong", "mask", "--max_new_tokens", "4", "--steps", "2", "--updates_per_batch", "2"]
    train.train(train.parse([*SMALL, *options, "--eval_prompts", "", "--run_dir", str(tmp_path / "run")]))
    for m in metrics(tmp_path / "run"):
        assert m["skipped_updates"] == 2 and m["truncated"] == 1 and m["grad_norm"] == 0 == m["entropy"]
    saved, base = tensors(tmp_path / "run", 2), train.qwen.load(ROOT / "data/tiny/base").state_dict()
    found = {k.split("/")[-1]: v for k, v in saved.items() if "exp_avg" not in k}
    assert len(found) == len(base) and all(torch.equal(found[k], base[k]) for k in base)


def lists(completions, prompts):
    """Half of the samples have no such reward."""
    return [None if len(c.token_ids) % 2 else len(c.text) for c in completions]


def test_a_batched_reward_is_called_once_with_all_samples_of_a_rank(tmp_path, monkeypatch):
    calls = []

    @rewards.batched
    def model(completions, prompts):
        pairs = zip(completions, prompts, strict=True)
        calls.append([(p.id, c.prompt_index, c.sample_index) for c, p in pairs])
        return lists(completions, prompts)

    monkeypatch.setitem(rewards.REWARDS, "model", (model, 1.0))
    options = ["--steps", "1", "--eval_prompts", "", "--run_dir", str(tmp_path / "run")]
    train.train(train.parse([*SMALL, *options]))
    (call,) = calls
    assert [key[1:] for key in call] == [(b, g) for b in range(2) for g in range(4)]
    records = [json.loads(line) for line in (tmp_path / "run/rollouts/step_000001.jsonl").open()]
    assert [r["prompt_id"] for r in records] == [key[0] for key in call]
    for r in records:
        assert r["rewards"]["model"] == (None if r["tokens"] % 2 else len(r["text"]))
    (m,) = metrics(tmp_path / "run")
    assert m["missing/model"] == sum(r["rewards"]["model"] is None for r in records) > 0


RANKS = """
import torch, rewards
def patchy(completion, prompt):  # missing for some, and with spread for the others
    return None if len(completion.token_ids) % 5 == 0 else float(len(completion.token_ids) % 7)
rewards.REWARDS["patchy"] = (patchy, 1.0)
"""


@pytest.mark.parametrize("loss, advantage, updates", [
    ("token", "per_reward", 2), ("sequence", "gdpo", 4), ("constant", "sum", 2)])
def test_an_update_is_the_same_on_two_ranks_and_in_any_micro_batches(loss, advantage, updates, tmp_path):
    """Masked, truncated and missing-reward samples among them, several updates per batch (with 4 a rank has
    none of the samples of some), a KL."""
    options = ["--steps", "1", "--prompts_per_step", "4", "--loss", loss, "--advantage", advantage,
               "--overlong", "mask", "--updates_per_batch", str(updates), "--beta", "0.1", "--tis_cap", "2",
               "--eval_prompts", "", "--reward", "length,format,patchy"]
    weights = {}
    for ranks, budget in ((1, 4096), (1, 600), (2, 4096)):
        folder = tmp_path / f"{ranks}_{budget}"
        done = launch(folder, *options, "--micro_batch_tokens", str(budget), ranks=ranks, code=RANKS,
                      small=SMALL)
        assert done.returncode == 0, done.stderr
        weights[ranks, budget] = merged(folder), metrics(folder)[0]
    base = train.qwen.load(ROOT / "data/tiny/base").state_dict()
    one, numbers = weights[1, 4096]
    moved = torch.cat([(one[k] - base[k]).flatten() for k in base])
    assert moved.norm() > 0.1 and 0 < numbers["truncated"] < 1 and numbers["missing/patchy"] > 0
    for other, values in weights.values():
        assert values == pytest.approx(numbers, rel=1e-4, abs=1e-5)
        # Adam's first steps divide a gradient by its own size: where it is rounding, the sign may differ.
        difference = torch.cat([(other[k] - one[k]).flatten() for k in base])
        assert difference.norm() <= 1e-3 * moved.norm()


def merged(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint after step 1, whole."""
    full = {k: torch.empty_like(v) for k, v in train.qwen.load(ROOT / "data/tiny/base").state_dict().items()}
    reader = dcp.HuggingFaceStorageReader(str(folder / "checkpoints/step_000001/weights"))
    dcp.load(full, storage_reader=reader, no_dist=True)
    return full
