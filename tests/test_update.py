"""Every option that reaches the loss or the optimiser, from the command line to the weights: the whole loop,
with samples that are made up and a policy whose gradient has a closed form, against NumPy in fp64. And what
the loop asks the sampler for and says of its samples.

The policy is a table of bigrams: a token's hidden state is its row of the embedding.
"""

import math
import random
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checkpoints
import model as qwen
import parallel
import replica
import rewards
import rollout
import run
import train
from data.prompts import Prompt
from data.tokenizer import Tokenizer
from lib import distributed
from lib.scoring import Reward
from sampler import Completion
from scheduler import Stats
from tests.helpers import ROOT, metrics

BASE = ROOT / "data" / "tiny" / "base"
N_VALID, ROWS, C = 1024, 1030, 4  # ids of the tokenizer, rows of the head, width
BETAS, ADAM_EPS = (0.9, 0.95), 1e-8
WEIGHTS = {"small": 1.0, "large": 3.0}
SETTING = {
    "steps": 2, "prompts_per_step": 4, "group_size": 4, "max_new_tokens": 12, "micro_batch_tokens": 700,
    "lr": 0.05, "warmup": 3, "updates_per_batch": 2, "clip_grad": 0.3, "loss": "token", "is_ratio": "token",
    "eps_low": 0.2, "eps_high": 0.2, "tis_cap": 2.0, "unreachable": "keep", "eval_prompts": "",
    "reward": "small,large",
}
PUBLISHED = {"token": ("token", 0.2, 0.2), "sequence": ("sequence", 3e-4, 4e-4), "cispo": ("token", 1.0, 4.0)}
AS_PUBLISHED = {"loss": None, "eps_low": None, "eps_high": None}  # not given
TABLE = [
    {}, {"loss": "sequence"}, {"loss": "constant"}, {"loss": "constant", "max_new_tokens": 40},
    {"is_ratio": "sequence"}, {"is_ratio": "cispo"}, {"is_ratio": "sequence", **AS_PUBLISHED},
    {"is_ratio": "cispo", **AS_PUBLISHED}, {"eps_low": 0.02}, {"eps_high": 0.5}, {"tis_cap": 0.0},
    {"tis_cap": 1.2}, {"beta": 0.5}, {"beta": 2.0}, {"beta": 0.5, "reference": "other"}, {"clip_grad": 0.05},
    {"weight_decay": 0.5}, {"normalise_std": False}, {"std_floor": 0.0}, {"std_floor": 0.8},
    {"advantage": "sum"}, {"advantage": "gdpo"}, {"updates_per_batch": 1}, {"updates_per_batch": 4},
    {"overlong": "mask"}, {"temperature": 1.3}, {"lr": 0.02}, {"warmup": 0},
]


class Bigrams(torch.nn.Module):
    config, layers = qwen.ModelConfig(ROWS, C, 1, 1, 1, 1), []

    def __init__(self, seed: int):
        super().__init__()
        rng = np.random.default_rng(seed)
        self.embedding, self.head_weight = (
            torch.nn.Parameter(torch.tensor(rng.normal(0, 0.7, (ROWS, C)), dtype=torch.float32))
            for _ in range(2))

    def forward(self, tokens_T, attention):
        return self.embedding[tokens_T]


class Dealer:
    """Stands in for the sampler: deals made-up samples of few ids, and keeps what it dealt."""

    def __init__(self, tokenizer):
        self.tokenizer, self.model = tokenizer, SimpleNamespace(group=None)
        self.stats, self.dealt = Stats(), []

    def generate(self, requests):
        step = []
        for b, r in enumerate(requests):
            rng = random.Random(r.seed)
            for g in range(r.n):
                ids = [rng.randrange(1, 30) for _ in range(rng.randint(2, 9))]
                logps = [rng.uniform(-8.5, -5.5) for _ in ids]
                text = f"<think>t</think><answer>{'word ' * len(ids)}</answer>"
                reason = rng.choice(["stop", "stop", "length"])
                step.append((r, Completion(b, g, ids, logps, text, reason, r.max_new_tokens)))
        self.dealt.append(step)
        yield from (c for _, c in step)

    def sleep(self):
        pass


def small(completion, prompt) -> float:
    """Its spread falls from prompt to prompt, to a thousandth."""
    return sum(completion.token_ids) % 7 * 0.1**completion.prompt_index


def large(completion, prompt) -> float:
    return 50.0 + 20 * completion.token_ids[0]


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """The policy after a run with these options, what was dealt in each step, and the run's metrics."""
    other, made, dealers = tmp_path / "other", [], []
    other.symlink_to(BASE)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"query": "Write {i} words."}}\n' for i in range(5)))

    def load(path, world):
        made.append(Bigrams(Path(path).name == "other"))
        return made[-1]

    def make_sampler(shape, tokenizer, options, world):
        dealers.append(Dealer(tokenizer))
        return dealers[-1]

    for name, function in (("small", small), ("large", large)):
        monkeypatch.setitem(rewards.REWARDS, name, (function, WEIGHTS[name]))
    monkeypatch.setattr(parallel, "load_sharded", load)
    monkeypatch.setattr(parallel, "publish", lambda *a: 0)
    monkeypatch.setattr(replica, "released", lambda model: nullcontext())
    monkeypatch.setattr(rollout, "make_sampler", make_sampler)
    monkeypatch.setattr(checkpoints, "save", lambda *a: None)

    def run(options: dict):
        given = {"prompts": str(prompts)} | SETTING | options
        given |= {"reference": str(other)} if "reference" in options else {}
        arguments = [f"--{name}={v}" for name, v in given.items() if v is not None]
        train.train(train.parse([*arguments, f"--run_dir={tmp_path}/run"]))
        return made[0], dealers[0].dealt, metrics(tmp_path / "run")

    return run


# ---------------------------------------------------------------------- the same in NumPy


def advantages(r_BGR, o):
    """Of each sample; section 3.1 of the paper, with a floor relative to the batch."""
    weight = np.array(list(WEIGHTS.values()))
    weight /= weight.sum()
    if o.advantage == "sum":
        r_BGR, weight = (r_BGR @ weight)[..., None], np.ones(1)
    centred, std = r_BGR - r_BGR.mean(1, keepdims=True), r_BGR.std(1)
    if o.normalise_std:
        live_rms = np.sqrt((std**2).sum(0) / np.maximum(1, (std > 0).sum(0)))
        centred = centred / np.maximum(std, np.maximum(1e-6, o.std_floor * live_rms))[:, None]
    a_BG = centred @ weight
    return (a_BG - a_BG.mean()) / a_BG.std() if o.advantage == "gdpo" else a_BG


def distribution(weights, previous, o):
    """logp of every id after each token."""
    embedding, head = weights
    z = embedding[previous] @ head[:N_VALID].T / o.temperature
    z -= z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def surrogate(d, logp, advantage, of_sample, o):
    """Value and slope in each token's logp, and whether the clip acts; d = logp - old."""
    low, high = 1 - o.eps_low, 1 + o.eps_high
    if o.is_ratio == "cispo":
        ratio = np.exp(d)
        weight = np.clip(ratio, low, high)
        return -weight * advantage * logp, -weight * advantage, weight != ratio
    if o.is_ratio == "sequence":
        d = np.array([d[of_sample == s].mean() for s in of_sample])
    ratio = np.exp(d)
    muted = np.where(advantage > 0, ratio > high, ratio < low)
    value = -np.where(muted, np.clip(ratio, low, high), ratio) * advantage
    return value, np.where(muted, 0, -ratio * advantage), muted


def expected(dealt, o):
    """(weights, metrics of each step)."""
    weights = [p.detach().double().numpy() for p in Bigrams(0).parameters()]
    reference = [p.detach().double().numpy() for p in Bigrams(bool(o.reference)).parameters()]
    first, second, updates, log = [0, 0], [0, 0], 0, []
    for step, samples in enumerate(dealt, 1):
        raw = np.array([[small(c, None), large(c, None)] for _, c in samples]).reshape(-1, o.group_size, 2)
        advantage = advantages(raw, o).flatten()
        previous = [np.array(r.prompt_ids[-1:] + c.token_ids[:-1]) for r, c in samples]
        behaviour = [distribution(weights, previous[i], o)[np.arange(len(c.token_ids)), c.token_ids]
                     for i, (_, c) in enumerate(samples)]  # by the trainer, before the first update
        sums, norms, tokens = dict.fromkeys(("loss", "clip_share", "entropy", "kl", "tis_capped"), 0.0), [], 0
        for part in np.array_split(np.arange(len(samples)), o.updates_per_batch):
            kept = [i for i in part if o.overlong == "keep" or samples[i][1].finish_reason != "length"]
            lengths = np.array([len(samples[i][1].token_ids) for i in kept])
            of_sample, total = np.repeat(np.arange(len(kept)), lengths), lengths.sum()
            every = {"token": total, "sequence": len(kept) * lengths[of_sample],
                     "constant": len(kept) * o.max_new_tokens}[o.loss]
            before = np.concatenate([previous[i] for i in kept])
            target = np.concatenate([samples[i][1].token_ids for i in kept])
            rollout = np.concatenate([samples[i][1].logprobs for i in kept])
            all_logp, at = distribution(weights, before, o), np.arange(total)
            logp, old = all_logp[at, target], np.concatenate([behaviour[i] for i in kept])
            value, slope, muted = surrogate(logp - old, logp, advantage[kept][of_sample], of_sample, o)
            if o.tis_cap:
                weight = np.minimum(np.exp(old - rollout), o.tis_cap)
                value, slope = weight * value, weight * slope
                sums["tis_capped"] += (weight == o.tis_cap).sum()
            value, slope = value / every, slope / every
            if o.is_ratio == "sequence":  # a token moves the ratio of all of its sample
                slope = np.array([slope[of_sample == s].mean() for s in of_sample])
            if o.beta:
                x = distribution(reference, before, o)[at, target] - logp
                value = value + o.beta * (np.exp(x) - 1 - x) / every
                slope = slope + o.beta * (1 - np.exp(x)) / every
                sums["kl"] += (np.exp(x) - 1 - x).sum()
            sums["loss"] += value.sum()
            sums["clip_share"] += (muted & (advantage[kept][of_sample] != 0)).sum()
            sums["entropy"] -= (np.exp(all_logp) * all_logp).sum()
            tokens += total

            by_logit = -np.exp(all_logp) * slope[:, None]
            by_logit[at, target] += slope
            by_logit /= o.temperature
            gradient = [np.zeros((ROWS, C)), np.zeros((ROWS, C))]
            np.add.at(gradient[0], before, by_logit @ weights[1][:N_VALID])
            gradient[1][:N_VALID] = by_logit.T @ weights[0][before]
            norms.append(np.sqrt(sum((g**2).sum() for g in gradient)))
            updates += 1
            lr = o.lr * min(1, step / max(1, o.warmup))
            for k, g in enumerate(gradient):  # AdamW
                g = g * min(1, o.clip_grad / norms[-1])
                first[k] = BETAS[0] * first[k] + (1 - BETAS[0]) * g
                second[k] = BETAS[1] * second[k] + (1 - BETAS[1]) * g**2
                mean, square = first[k] / (1 - BETAS[0]**updates), second[k] / (1 - BETAS[1]**updates)
                weights[k] = weights[k] * (1 - lr * o.weight_decay) - lr * mean / (np.sqrt(square) + ADAM_EPS)
        log.append({name: s / (len(norms) if name == "loss" else tokens) for name, s in sums.items()} | {
            "grad_norm": np.mean(norms), "lr": lr, "truncated": np.mean([c.finish_reason == "length"
                                                                         for _, c in samples]),
            **{f"reward/{name}": raw[..., k].mean() for k, name in enumerate(WEIGHTS)},
            **{f"reward_std/{name}": raw[..., k].std(1).mean() for k, name in enumerate(WEIGHTS)},
            "length/tokens": np.mean([len(c.token_ids) for _, c in samples])})
    return weights, log


def distance(a, b) -> float:
    return np.sqrt(sum(((x - y)**2).sum() for x, y in zip(a, b)))


def config_of(options: dict):
    given = SETTING | options
    published = dict(zip(AS_PUBLISHED, PUBLISHED[given["is_ratio"]]))
    return train.Config(**published | {name: v for name, v in given.items() if v is not None})


@pytest.mark.parametrize("options", TABLE, ids=str)
def test_an_option_does_to_the_weights_what_numpy_says(options, trained):
    """And makes a difference: one that is ignored, or hard-wired, fails in its own row or in the first."""
    policy, dealt, log = trained(options)
    weights, numbers = expected(dealt, config_of(options))
    got = [p.detach().double().numpy() for p in policy.parameters()]
    start = [p.detach().double().numpy() for p in Bigrams(0).parameters()]
    assert distance(got, weights) < 1e-3 * distance(weights, start)
    assert len(log) == len(numbers) == 2
    for m, n in zip(log, numbers):
        for name in n.keys() & m.keys():
            assert m[name] == pytest.approx(n[name], rel=1e-4, abs=1e-6), name
        assert ("kl" in m) == ("beta" in options) and ("tis_capped" in m) == (options.get("tis_cap") != 0)
    if options:
        without, _ = expected(dealt, config_of({}))
        assert distance(weights, without) > 1e-2 * distance(weights, start)


# ---------------------------------------------------------------------- what the sampler is asked for


def test_requests_are_those_of_the_options_and_samples_are_counted(trained, tmp_path, capfd):
    """Five calls: an evaluation before training, and after each of two steps."""
    file = tmp_path / "ranged.jsonl"
    file.write_text("".join(f'{{"query": "Write {i}.", "range": {lengths}}}\n'
                            for i, lengths in enumerate(([4, 5], [4, 7], [3, 40], "null"))))
    _, dealt, log = trained({"prompts": file, "eval_prompts": file, "eval_every": 1, "stop": "</answer>,END",
                             "temperature": 0.7, "seed": 4, "max_new_tokens": 20})
    assert all((r.stop, r.temperature, r.max_new_tokens) == (("</answer>", "END"), 0.7, 20)
               for call in dealt for r, _ in call)
    evaluations, steps = [[r for r, _ in call] for call in dealt[::2]], dealt[1::2]
    assert [r.n for r in evaluations[0]] == [1] * 4 and evaluations[0] == evaluations[1] == evaluations[2]
    assert [r.expected_tokens for r in evaluations[0]] == [13, 18, 20, 20]  # 2 x 1.3 a word, up to the budget
    seeds = [{r.seed for r, _ in step} for step in steps] + [{r.seed for r in evaluations[0]}]
    assert [len(x) for x in seeds] == [4] * 3 and len(set.union(*seeds)) == 12
    ranges = {tuple(r.prompt_ids): x for r, x in zip(evaluations[0], ((4, 5), (4, 7), (3, 40)))}
    cut, at_the_end = [], set()
    for step, m in zip(steps, log[1:], strict=True):
        asked = [(*ranges[tuple(r.prompt_ids)], len(c.token_ids)) for r, c in step
                 if tuple(r.prompt_ids) in ranges]
        assert len(asked) == 12 and m["length/in_range"] == np.mean([lo <= n <= hi for lo, hi, n in asked])
        assert m["length/answer_words"] == np.mean([len(c.token_ids) for _, c in step])
        at_the_end |= {(n == lo, n == hi) for lo, hi, n in asked}
        cut.append(np.mean([c.finish_reason == "length" for _, c in step]))
    assert {(True, False), (False, True)} <= at_the_end, "some are as short, some as long as is allowed"
    assert [m["truncated"] for m in log[1:]] == cut and min(cut) < 0.25 < max(cut)
    warned = [line for line in capfd.readouterr().out.splitlines() if line.startswith("warning: ")]
    (line,) = (x for x in warned if "were cut" in x)
    assert line.startswith(f"warning: {max(cut):.0%} of the samples were cut at max_new_tokens 20: raise it")


def test_seconds_of_sampling_scoring_and_waiting_for_others_do_not_overlap(monkeypatch):
    """By a clock that moves 1 s for a step's sampling, 10 for each reward and 100 for the slowest rank."""
    now = [0.0]

    class Slow(Dealer):
        def generate(self, requests):
            now[0] += 1
            yield from super().generate(requests)

    def ten(completion, prompt):
        now[0] += 10
        return 1.0

    @contextmanager
    def in_rounds(world, group=None):
        yield lambda: None
        now[0] += 100

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(distributed, "in_rounds", in_rounds)
    config = train.Config(prompts_per_step=1, group_size=2, max_new_tokens=20)
    clock, world = run.Clock(), distributed.setup("cpu")
    sampler, prompt = Slow(Tokenizer(BASE)), Prompt("1", "Write.", "Write.", None, "en")
    rollout.sample_and_score(sampler, [prompt], [Reward("ten", ten, 1.0)], 2, 1, "step 1", rollout.lengths,
                             config, clock, None, world)
    assert [clock.seconds[phase] for phase in ("sample", "score", "idle")] == [1, 20, 100]


# ---------------------------------------------------------------------- along the text


@pytest.mark.parametrize("text, thought", [
    ("<think>A plan.</think>\n<answer>A text.</answer>", "<think>A plan.</think>"), ("A text.", ""),
    ("<think>A plan that is never", "<think>A plan that is never"), ("", ""),
    ("<think>A plan.\n<answer>A text.</answer>", ""), ("<think></think>雾", "<think></think>"),
    ("<answer>A text.</answer><think>B</think>", "<answer>A text.</answer><think>B</think>")])
def test_thinking_ends_with_the_token_in_which_its_tag_ends(text, thought):
    tokenizer = Tokenizer(ROOT / "data/tiny/base")
    ids = tokenizer.encode(text)
    n = rollout.thinking(ids, tokenizer)
    assert tokenizer.decode(ids[:n]).startswith(thought) and not tokenizer.decode(
        ids[:n - 1] if n else []).endswith(thought or "no")
    assert rollout.thinking(list(text.encode()), SimpleNamespace(
        token_bytes=[bytes([i]) for i in range(256)])) == len(thought.encode())


def test_means_by_request_are_those_of_the_prompts_that_ask_for_it():
    prompts = [SimpleNamespace(length_range=x) for x in ((20, 40), (31, 32), (32, 32), None, (9000, 12000))]
    values = torch.arange(10.0).view(5, 2)
    values[0, 0] = math.nan
    found = rollout.by_request({"a": values}, prompts)["by_request/a"]
    expected = [math.nan] * len(rollout.REQUESTED)
    expected[0], expected[1], expected[-1] = 2.0, 4.5, 8.5  # words 30 and 31.5, 32, 10,500
    assert found == pytest.approx(expected, nan_ok=True)
    assert rollout.by_request({"a": values[3:4]}, prompts[3:4]) == {}
