"""The whole loop under each option, and what an option does to a step on one and on two ranks."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import model as qwen
import rewards
import train
from lib import console
from tests.helpers import ROOT, metrics, tensors

MATRIX = [  # what test_update does not follow to the weights, and several at once of what it does
    ["--updates_per_batch", "2", "--is_ratio", "sequence", "--advantage", "gdpo", "--beta", "0.05",
     "--reference", "data/tiny/base"],
    ["--updates_per_batch", "2", "--is_ratio", "cispo", "--eps_high", "0.28", "--advantage", "sum",
     "--tis_cap", "0"],
    ["--overlong", "mask", "--sampler_dtype", "bfloat16"],
    ["--prompt_style", "direct", "--reward", "length,format,overlong", "--recompute", "true"],
    ["--seed", "2", "--reward", "format", "--max_sequences", "3", "--page_size", "64"],
    ["--stop", "</answer>", "--eval_prompts", str(ROOT / "tests" / "eval_small.jsonl"), "--eval_every", "2",
     "--micro_batch_tokens", "300", "--loss", "constant"],
]  # fmt: skip
# An lr at which two updates on one batch move ratios out of the clip.
SMALL = ["--prompts_per_step", "2", "--group_size", "4", "--max_new_tokens", "64", "--unreachable", "keep",
         "--eval_prompts", "", "--lr", "2e-3", "--warmup", "0", "--save_every", "100"]


@pytest.mark.parametrize("options", MATRIX, ids=lambda options: " ".join(options[:4]).replace(str(ROOT), ""))
def test_three_steps_under_several_options(options, tmp_path):
    train.train(train.parse([*SMALL, "--run_dir", str(tmp_path / "run"), "--steps", "3", *options]))
    lines = metrics(tmp_path / "run")
    steps = [m for m in lines if m["step"] > 0]
    assert [m["step"] for m in steps] == [1, 2, 3]
    assert len({frozenset(k for k in m if not k.startswith("eval/")) for m in steps}) == 1
    assert all(math.isfinite(v) for m in lines for v in m.values())
    assert any(m["grad_norm"] > 0 for m in steps)
    given = dict(zip(options[::2], options[1::2]))
    several = given.get("--updates_per_batch") == "2"
    assert (sum(m["clip_share"] for m in steps) > 0) == several, "the clip lives off-policy and only there"
    assert ("kl" in steps[0]) == ("--beta" in given) and ("tis_capped" in steps[0]) != ("--tis_cap" in given)
    if "kl" in steps[0]:
        assert steps[-1]["kl"] > steps[0]["kl"] >= 0, "the policy leaves its reference"
    assert "--overlong" in given or not any(m["skipped_updates"] for m in steps)
    if "--overlong" in given:
        texts = [json.loads(line) for line in (tmp_path / "run/rollouts/step_000001.jsonl").open()]
        assert all((t["gap_mean"] is None) == (t["finish_reason"] == "length") for t in texts)
        assert {t["finish_reason"] for t in texts} == {"length", "stop"}
    records = [json.loads(line) for line in (tmp_path / "run/rollouts/step_000003.jsonl").open()]
    assert len(records) == 8 and all(math.isfinite(r["advantage"]) for r in records)


@pytest.mark.parametrize("limit", [console.GAP_LIMIT, 1e-9])
def test_a_sampler_that_drifts_is_warned_of(limit, tmp_path, monkeypatch, capsys):
    """In bf16 it does so a little: far below the limit."""
    monkeypatch.setattr(console, "GAP_LIMIT", limit)
    train.train(train.parse([*SMALL, "--run_dir", str(tmp_path / "run"), "--steps", "1",
                             "--sampler_dtype", "bfloat16"]))
    (m,) = metrics(tmp_path / "run")
    said = [line for line in capsys.readouterr().out.splitlines() if "drifts from" in line]
    assert 1e-7 < m["gap/k3"] < console.GAP_LIMIT or limit == 1e-9
    if limit == 1e-9:
        (line,) = said
        assert f"{m['gap/k3']:.3g}" in line and "sampler_dtype to float32" in line
    else:
        assert not said


def test_the_kl_enters_the_loss_with_its_weight(tmp_path):
    """On-policy the loss is minus the mean advantage over tokens, plus beta times the KL."""
    train.train(train.parse([*SMALL, "--run_dir", str(tmp_path / "run"), "--steps", "3", "--beta", "3"]))
    m = metrics(tmp_path / "run")[2]
    records = [json.loads(line) for line in (tmp_path / "run/rollouts/step_000003.jsonl").open()]
    tokens = sum(r["tokens"] for r in records)
    surrogate = -sum(r["advantage"] * r["tokens"] for r in records) / tokens
    assert m["kl"] > 1e-4 and m["loss"] == pytest.approx(surrogate + 3 * m["kl"], abs=1e-5)


def test_a_batch_that_is_masked_whole_is_skipped_and_counted(tmp_path):
    options = ["--overlong", "mask", "--max_new_tokens", "4", "--steps", "2", "--updates_per_batch", "2"]
    train.train(train.parse([*SMALL, *options, "--run_dir", str(tmp_path / "run")]))
    for m in metrics(tmp_path / "run"):
        assert m["skipped_updates"] == 2 and m["truncated"] == 1 and m["grad_norm"] == 0 == m["entropy"]
    saved, base = tensors(tmp_path / "run", 2), qwen.load(ROOT / "data/tiny/base").state_dict()
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
    options = ["--steps", "1", "--run_dir", str(tmp_path / "run")]
    train.train(train.parse([*SMALL, *options]))
    (call,) = calls
    assert [key[1:] for key in call] == [(b, g) for b in range(2) for g in range(4)]
    records = [json.loads(line) for line in (tmp_path / "run/rollouts/step_000001.jsonl").open()]
    assert [r["prompt_id"] for r in records] == [key[0] for key in call]
    for r in records:
        assert r["rewards"]["model"] == (None if r["tokens"] % 2 else len(r["text"]))
    (m,) = metrics(tmp_path / "run")
    assert m["missing/model"] == sum(r["rewards"]["model"] is None for r in records) > 0


def patchy(completion, prompt):
    """Missing for some, and with spread for the others."""
    return None if sum(completion.token_ids) % 5 == 0 else float(sum(completion.token_ids) % 7)


def test_transforms_and_requirements_act_on_the_advantage_and_raw_values_are_logged(tmp_path, monkeypatch):
    """A reward turned round by its transform teaches the opposite; whoever violates ends below 0, counted."""
    monkeypatch.setitem(rewards.REWARDS, "tokens", (lambda c, p: float(len(c.token_ids)), 1.0))
    monkeypatch.setitem(rewards.TRANSFORMS, "tokens", lambda r: -math.log1p(r))
    monkeypatch.setitem(rewards.REQUIRED, "tokens", 40)
    train.train(train.parse([*SMALL, "--run_dir", str(tmp_path / "run"), "--steps", "1"]))
    records = [json.loads(line) for line in (tmp_path / "run/rollouts/step_000001.jsonl").open()]
    assert all(r["rewards"]["tokens"] == r["tokens"] for r in records)
    groups = [sorted(records[i:i + 4], key=lambda r: r["tokens"]) for i in (0, 4)]
    assert all([r["advantages"]["tokens"] for r in group]
               == sorted((r["advantages"]["tokens"] for r in group), reverse=True) for group in groups)
    short = [r for r in records if r["tokens"] < 40]
    assert 0 < len(short) < 8 and all(r["advantage"] < 0 < r["advantages"]["tokens"] for r in short)
    (m,) = metrics(tmp_path / "run")
    assert m["violators/tokens"] == len(short)
    assert m["reward/tokens"] == pytest.approx(sum(r["tokens"] for r in records) / 8)


PATCHY = "import rewards, tests.test_variants as t; rewards.REWARDS['patchy'] = (t.patchy, 1.0)"


@pytest.mark.parametrize("loss, advantage, updates", [
    ("token", "per_reward", 1), ("token", "gdpo", 4),
    pytest.param("sequence", "gdpo", 1, marks=pytest.mark.slow),
    pytest.param("constant", "sum", 1, marks=pytest.mark.slow)])
def test_an_update_is_the_same_on_two_ranks_and_in_any_micro_batches(loss, advantage, updates, forks,
                                                                     tmp_path, monkeypatch):
    """Masked, truncated and missing-reward samples among them, a KL, a correction for the sampler. With 4
    updates on two ranks most samples are trained elsewhere than they were written."""
    options = ["--steps", "1", "--prompts_per_step", "4", "--loss", loss, "--advantage", advantage,
               "--overlong", "mask", "--updates_per_batch", str(updates), "--beta", "0.1", "--tis_cap", "2",
               "--reward", "length,format,patchy"]
    monkeypatch.setitem(rewards.REWARDS, "patchy", (patchy, 1.0))
    base, seen = qwen.load(ROOT / "data/tiny/base").state_dict(), []
    for ranks, budget in ((1, 4096), (1, 200), (2, 4096)):
        folder, given = tmp_path / f"{ranks}_{budget}", [*options, "--micro_batch_tokens", str(budget)]
        if ranks == 1:
            train.train(train.parse([*SMALL, "--run_dir", str(folder), *given]))
        else:
            codes, said = forks.train(folder, *given, small=SMALL, ranks=ranks, code=PATCHY)
            assert codes == [0] * ranks, said
        texts = [json.loads(line) for line in (folder / "rollouts/step_000001.jsonl").open()]
        assert all((t["gap_mean"] is None) == (t["finish_reason"] == "length") for t in texts)
        weights, moments = (merged(folder, part, base, suffix)
                            for part, suffix in (("weights", ""), ("optimizer", ".exp_avg")))
        (numbers,) = metrics(folder)
        del numbers["weights/fingerprint"]  # of weights that differ in their last bits
        seen.append((numbers, weights - flat(base), moments))
    numbers, moved, moments = seen[0]
    assert moved.norm() > 0.1 and 0 < numbers["truncated"] < 1 and numbers["missing/patchy"] > 0
    for other_numbers, other_moved, other_moments in seen[1:]:
        # AdamW's first step divides a gradient by its own size: rounding counts where it is near 0, and more
        # so after further steps.
        looser = 1 if updates == 1 else 100
        assert other_numbers == pytest.approx(numbers, rel=1e-5 * looser, abs=1e-7 * looser)
        assert (other_moments - moments).norm() <= 1e-6 * looser * moments.norm(), "the gradient"
        assert (other_moved - moved).norm() <= 2e-4 * looser * moved.norm()


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def merged(folder: Path, part: str, base: dict[str, torch.Tensor], suffix: str) -> torch.Tensor:
    """The weights or first moments after step 1, from the files of all ranks."""
    full = {name + suffix: torch.empty_like(tensor) for name, tensor in base.items()}
    reader = dcp.HuggingFaceStorageReader(str(folder / "checkpoints/step_000001" / part))
    dcp.load(full, storage_reader=reader, no_dist=True)
    return flat(full)
