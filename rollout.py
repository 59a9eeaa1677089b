"""One step's data: requests, sampling, scoring, the gather over ranks, advantages, records; and evaluation.

Each rank samples and scores whole groups of its own; `all_gather` then gives every rank all of them. `config`
is train.Config, or any object with the fields that a function reads.

Shapes: B prompts, G samples of each (a group), N = B x G samples, R rewards.
"""

import bisect
import hashlib
import itertools
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F

import grpo
import model as qwen
import parallel
from data.prompts import TOKENS_PER_WORD
from data.tokenizer import Tokenizer
from lib import distributed
from lib.console import Progress
from lib.scoring import Remote, Reward, RewardError, score
from run import Clock, Log
from sampler import Completion, Sampler
from scheduler import Request, assign
from text import REQUESTED, count_words, length_score, statistics, structure

# ---------------------------------------------------------------------- requests


def request_seed(*key) -> int:
    """A 63-bit hash of (run seed, step or purpose, prompt id), the only source of randomness of a sample."""
    return int.from_bytes(
        hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest(), "little") >> 1


def make_requests(tokenizer: Tokenizer, prompts: list, n: int, key, config) -> list[Request]:
    """Requests for n samples of each prompt, seeded by the run's seed, `key` (the step) and the prompt."""
    return [Request(tokenizer.encode(p.text), n, config.max_new_tokens, config.temperature,
                    stop=config.stop_strings, seed=request_seed(config.seed, key, p.id),
                    expected_tokens=expected_tokens(p, config)) for p in prompts]


def expected_tokens(prompt, config) -> int:
    """Estimated tokens of a sample, used to schedule it and to choose its rank: twice the longest answer
    asked for, which leaves room for thinking."""
    if not prompt.length_range:
        return config.max_new_tokens
    asked = round(2 * TOKENS_PER_WORD[prompt.language] * prompt.length_range[1])
    return max(1, min(asked, config.max_new_tokens))


def local_indices(prompts: list, config, world) -> list[int]:
    """Indices of the prompts that this rank samples and scores."""
    return assign([expected_tokens(p, config) for p in prompts], world.size)[world.rank]


def make_sampler(config: qwen.ModelConfig, tokenizer: Tokenizer, options, world) -> Sampler:
    """A sampler with an uninitialised replica of a model, or a tensor-parallel slice, which parallel.publish
    fills. options: tp, sampler_dtype, max_sequences, page_size."""
    group = parallel.tp_group(options.tp, world.timeout)
    with torch.device("meta"):
        policy = qwen.Qwen2(config, group).to(sampler_dtype(options, world.device)).requires_grad_(False)
    return Sampler(policy.to_empty(device=world.device), tokenizer, options.max_sequences, options.page_size)


def sampler_dtype(options, device: torch.device) -> torch.dtype:
    auto = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, auto if options.sampler_dtype == "auto" else options.sampler_dtype)


def generate(sampler: Sampler, requests: list[Request], world) -> Iterator[Completion]:
    """Completions of this rank's requests. Ranks that share a tensor-parallel sampler generate the requests
    of all of them together, and each must iterate to the end."""
    model = sampler.model
    if model.group is None:
        yield from sampler.generate(requests)
        return
    gathered = distributed.gather(requests, world, model.group)
    first = sum(map(len, gathered[:model.tp_rank]))
    stream = sampler.generate(sum(gathered, []))
    try:
        for c in stream:
            if first <= c.prompt_index < first + len(requests):
                yield replace(c, prompt_index=c.prompt_index - first)
    finally:
        deque(stream, maxlen=0)


# ---------------------------------------------------------------------- rewards


def check_rewards(rewards: list[Reward], config, prompts: list, tokenizer: Tokenizer):
    """Calls `check(config)` of each reward that has one, and rewards that are plain functions on two made-up
    completions, so that errors show before weights load. Raises UserError."""
    for reward in rewards:
        if hasattr(reward.function, "check"):
            reward.function.check(config)
        if reward.batched and reward.remote:
            raise RewardError(f"reward {reward.name!r} is marked both @batched and @remote: choose one")
        if not reward.needs_model:
            for text in ("<think>A plan.</think><answer>A text.</answer>", ""):
                ids = tokenizer.encode(text) + tokenizer.eos_ids[:1]  # no sample is without a token
                c = Completion(0, 0, ids, [0.0] * len(ids), text, "stop", config.max_new_tokens)
                reward.transformed(score(reward, [c], prompts[:1])[0])


def prepare_rewards(rewards: list[Reward], config, world):
    """Calls `prepare` of each reward that has one, on all ranks: reward models load here."""
    for reward in rewards:
        if hasattr(reward.function, "prepare"):
            reward.function.prepare(config, world)


def await_servers(pools: list[Remote], since: float, label: str, log: Log, world):
    """Waits until the remote rewards of all ranks have returned or are given up. The ranks meet every few
    seconds instead of waiting in one collective, which would time out while servers are down."""
    reported = None
    while pools:
        with distributed.raise_on_all_ranks(world):
            waiting = [pool.wait(since, world.check_stop) for pool in pools]
        waiting = sum(distributed.gather(waiting, world), [])
        down, now = next(filter(None, waiting), ""), time.monotonic()
        if down and (reported is None or now - reported >= 30):
            reported = now
            log.warn(f"paused: {label} waits for its scores, and no server answers: {down}")
        if reported and not down:
            reported = None
            log.warn(f"{label} goes on: a server answers again")
        if all(why is None for why in waiting):
            return


# ---------------------------------------------------------------------- groups


@dataclass(frozen=True)
class Groups:
    """G samples of each of B prompts, in batch order: those of one rank, or after `all_gather` of all."""

    indices: list[int]  # of the B prompts in the batch
    prompt_ids: list[torch.Tensor]  # B, int32 on the CPU, as all that follow
    token_ids: list[torch.Tensor]  # N
    logprobs: list[torch.Tensor]  # N, the sampler's, fp32
    rewards_BGR: torch.Tensor  # fp64, raw; NaN where missing, -inf for rewards.LOWEST
    statistics: dict[str, torch.Tensor]  # name -> value_BG, fp64, NaN where a sample has none
    texts: list[str]  # N; once gathered, on the main rank alone

    @cached_property
    def placed_BGR(self) -> torch.Tensor:
        """The rewards as they are logged, with a number for LOWEST; of the groups of all ranks."""
        return grpo.place_lowest(self.rewards_BGR)

    @property
    def truncated_N(self) -> list[bool]:
        return self.statistics["truncated"].bool().flatten().tolist()


def sample_and_score(sampler: Sampler, prompts: list, rewards: list[Reward], n: int, key, label: str,
                     measure: Callable, config, clock: Clock, log: Log, world) -> Groups:
    """Samples n completions of each of this rank's prompts and scores them.

    prompts: those of all ranks. key: part of the samples' seeds. label: shown on the console. measure(prompt,
    completion, tokenizer) -> statistics. Plain rewards run as each sample finishes; remote rewards run in
    threads during sampling and are awaited at the end; batched rewards get all samples at the end. Raises
    RewardError or Stopped on all ranks if one raises it.
    """
    indices = local_indices(prompts, config, world)
    requests = make_requests(sampler.tokenizer, [prompts[i] for i in indices], n, key, config)
    answered = [prompts[i] for i in indices for _ in range(n)]
    completions, failures = [None] * len(answered), {}
    reward_NR = torch.full((len(answered), len(rewards)), torch.nan, dtype=torch.float64)
    columns = list(enumerate(rewards))
    inline = [(r, reward) for r, reward in columns if not reward.batched and not reward.remote]
    progress = Progress(label, len(answered), world.main)
    with clock("sample"), ExitStack() as stack:
        remote = [(r, stack.enter_context(Remote(reward))) for r, reward in columns if reward.remote]
        with distributed.in_rounds(world, sampler.model.group) as sampler.interrupt:
            try:
                with closing(generate(sampler, requests, world)) as stream:  # closed on any exception
                    for c in stream:
                        i = c.prompt_index * n + c.sample_index
                        completions[i] = c
                        for _, pool in remote:
                            pool.submit(i, c, answered[i])
                        with clock("score", wait=False):  # do not wait for the step on the device
                            for r, reward in inline:
                                (reward_NR[i, r],) = score(reward, [c], [answered[i]])
                        progress.update(sampler.stats)
            finally:
                progress.close()
                sampler.sleep()  # frees the KV pool for the update
                ended = time.perf_counter()
        clock.seconds["idle"] += time.perf_counter() - ended  # until the last rank's last sample
        sampled = time.monotonic()
        for r, reward in columns:
            if reward.batched:  # may be a sharded model, which all ranks must call together
                with distributed.raise_on_all_ranks(world), clock("score"):
                    values = score(reward, completions, answered)
                    reward_NR[:, r] = torch.tensor(values, dtype=torch.float64)
        with clock("score"):
            await_servers([pool for _, pool in remote], sampled, label, log, world)
        with distributed.raise_on_all_ranks(world), clock("score"):
            for r, pool in remote:
                values, failures[pool.reward.name] = pool.collect(answered)
                reward_NR[:, r] = torch.tensor(values, dtype=torch.float64)
    clock.seconds["sample"] -= clock.seconds["score"] + clock.seconds["idle"]
    for name, errors in failures.items():
        if reasons := Counter(sum(distributed.gather(errors, world), [])):
            shown = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(2))
            log.warn(f"warning: {label}: reward {name!r} is missing for {reasons.total()} samples, because "
                     f"it failed: {shown}")
    found = [measure(prompt, c, sampler.tokenizer) for prompt, c in zip(answered, completions)]
    shape = len(indices), n
    return Groups(
        indices, [torch.tensor(r.prompt_ids, dtype=torch.int32) for r in requests],
        [torch.tensor(c.token_ids, dtype=torch.int32) for c in completions],
        [torch.tensor(c.logprobs) for c in completions], reward_NR.view(*shape, -1),
        {name: torch.tensor([math.nan if s[name] is None else s[name] for s in found],
                            dtype=torch.float64).view(shape) for name in found[0]},
        [c.text for c in completions])


def all_gather(local: Groups, world) -> Groups:
    """The groups of all ranks, in the order of the batch. Token ids, logprobs and numbers go to every rank as
    tensors; texts go to the main rank alone."""
    B, G, _ = local.rewards_BGR.shape
    place_B = distributed.gather_rows(torch.tensor(local.indices), world).argsort()

    def batch_order(x: torch.Tensor) -> torch.Tensor:
        return distributed.gather_rows(x, world)[place_B]

    def ragged(rows: list[torch.Tensor], groups: bool) -> list[torch.Tensor]:
        lengths = distributed.gather_rows(torch.tensor([len(row) for row in rows]), world).tolist()
        parts = distributed.gather_rows(torch.cat(rows), world).split(lengths)
        return [parts[b * G + g] for b in place_B for g in range(G)] if groups else [
            parts[b] for b in place_B]

    texts = distributed.gather_to_main([local.texts[b * G:(b + 1) * G] for b in range(B)], world)
    texts = sum(texts, [])
    return Groups(
        list(range(len(place_B))), ragged(local.prompt_ids, False), ragged(local.token_ids, True),
        ragged(local.logprobs, True), batch_order(local.rewards_BGR),
        {name: batch_order(x) for name, x in local.statistics.items()},
        sum((texts[b] for b in place_B), []) if texts else [])


LENGTHS = ("words", "words_complete", "think_tokens", "in_range", "truncated")  # what `lengths` returns


def thinking(ids: list[int], tokenizer: Tokenizer) -> int:
    """Tokens up to the end of the thinking: all where it is never closed, 0 without any."""
    data = [tokenizer.token_bytes[i] for i in ids]
    text = b"".join(data)
    if (end := text.find(b"</think>")) < 0:
        return len(ids) if b"<think>" in text and b"<answer>" not in text else 0
    return bisect.bisect_left(list(itertools.accumulate(map(len, data))), end + len(b"</think>")) + 1


def lengths(prompt, c: Completion, tokenizer: Tokenizer) -> dict[str, float | None]:
    """Length statistics of a training sample."""
    words, truncated = count_words(structure(c.text)[2] or ""), c.finish_reason == "length"
    lo, hi = prompt.length_range or (None, None)
    think_tokens = thinking(c.token_ids, tokenizer)
    in_range = None if lo is None else lo <= words <= hi
    return dict(zip(LENGTHS, (words, None if truncated else words, think_tokens, in_range, truncated)))


def describe_text(prompt, c: Completion, tokenizer: Tokenizer) -> dict[str, float | None]:
    """Statistics of an evaluation sample: `lengths`, LongBench-Write's length score against the middle of the
    requested range, and text.statistics."""
    found, cut = lengths(prompt, c, tokenizer), c.finish_reason == "length"
    wanted = prompt.length_range and sum(prompt.length_range) / 2
    texts = statistics(c.text, prompt.query, prompt.style, cut)
    return found | {"S_l": length_score(wanted, found["words"]) if wanted else None,
                    "missing_answers": texts["answer_words"] is None, **texts}


def summarise(groups: Groups, prompts: list, rewards: list[Reward]) -> dict[str, float | list[float]]:
    """Metrics of all samples: rewards, their spread within groups, lengths, and both by requested length."""
    _, std, dead = grpo.group_spread(groups.placed_BGR)
    present_R, found = (~groups.placed_BGR.isnan()).sum((0, 1)), groups.statistics
    out = {}
    for r, reward in enumerate(rewards):
        total = groups.placed_BGR[..., r].nansum().item()
        out |= {f"reward/{reward.name}": total / (present_R[r].item() or math.nan),  # all missing: null
                f"reward_std/{reward.name}": std[:, r].mean().item(),
                f"dead_groups/{reward.name}": int(dead[:, r].sum()),
                f"slope/{reward.name}": 100 * grpo.slope(found["words"], groups.placed_BGR[..., r]),
                f"missing/{reward.name}": int(found["words"].numel() - present_R[r])}
    tokens = sum(map(len, groups.token_ids))
    values = {"ended": 1 - found["truncated"]} | {
        reward.name: groups.placed_BGR[..., r] for r, reward in enumerate(rewards)}
    return out | by_request(values, prompts) | {"length/answer_words": mean_of(found["words"]),
                  "length/tokens": tokens / len(groups.token_ids),
                  "length/answer_words_complete": mean_of(found["words_complete"]) or 0.0,
                  "length/think_tokens": mean_of(found["think_tokens"]),
                  "length/in_range": mean_of(found["in_range"]) or 0.0,
                  "truncated": mean_of(found["truncated"])}


def by_request(values: dict[str, torch.Tensor], prompts: list) -> dict[str, list[float]]:
    """Means of values (B, G) over the samples whose prompt asks for a length from one number of REQUESTED to
    the next, NaN without any; empty where no prompt asks for one."""
    part_B = torch.tensor([bisect.bisect_right(REQUESTED, sum(p.length_range) / 2) - 1 if p.length_range
                           else -1 for p in prompts])
    return {} if (part_B < 0).all() else {
        f"by_request/{name}": [x_BG[part_B == i].nanmean().item() for i in range(len(REQUESTED))]
        for name, x_BG in values.items()}


def mean_of(values: torch.Tensor) -> float | None:
    """Mean of the values that are not NaN; None if all are."""
    present = values[~values.isnan()]
    return present.mean().item() if len(present) else None


def combine_advantages(rewards_BGR: torch.Tensor, rewards: list[Reward],
                       config) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """Advantages from the raw rewards of all ranks' groups, with weights, transforms and requirements:
    (advantage_BG, per_reward_BGR, metrics). Raises RewardError."""
    weights_R = torch.tensor([reward.weight for reward in rewards])
    least_R = torch.tensor([reward.required for reward in rewards], dtype=torch.float64)
    raw = rewards_BGR.tolist()
    transformed_BGR = torch.tensor([[[reward.transformed(x) for reward, x in zip(rewards, values)]
                                     for values in group] for group in raw], dtype=torch.float64)
    placed_BGR = grpo.place_lowest(transformed_BGR)
    advantage_BG, per_reward_BGR = grpo.advantages(placed_BGR, weights_R, config.advantage,
                                                   config.std_floor, config.normalise_std)
    advantage_BG, violates_BGR = grpo.require(advantage_BG, rewards_BGR, least_R)
    violators = {f"violators/{reward.name}": n for reward, n in zip(
        rewards, violates_BGR.sum((0, 1)).tolist()) if reward.required > -math.inf}
    names = [reward.name for reward in rewards]
    return advantage_BG, per_reward_BGR, {
        **violators, **grpo.conflicts(per_reward_BGR, weights_R, names, config.advantage)}


def training_samples(groups: Groups, advantage_BG: torch.Tensor, config) -> list[grpo.Sample]:
    """The N samples as the update needs them; truncated ones are not trained where `overlong` is mask."""
    G = advantage_BG.shape[1]
    trained_N = [config.overlong == "keep" or not cut for cut in groups.truncated_N]
    thinking_N = groups.statistics["think_tokens"].int().flatten().tolist()
    return [grpo.Sample(groups.prompt_ids[i // G], *columns) for i, columns in enumerate(zip(
        groups.token_ids, groups.logprobs, advantage_BG.flatten().tolist(), trained_N, thinking_N))]


def records(groups: Groups, prompts: list, rewards: list[Reward], **columns: list) -> list[dict]:
    """The lines of a rollouts file, one a sample, on the main rank. columns: more fields, N values each."""
    rows = groups.placed_BGR.flatten(0, 1).tolist()
    G = groups.rewards_BGR.shape[1]
    return [{"prompt_id": prompts[i // G].id, "sample": i % G, "prompt": prompts[i // G].text, "text": text,
             "length_range": prompts[i // G].length_range, "tokens": len(ids),
             "finish_reason": "length" if cut else "stop",
             "rewards": {reward.name: None if x != x else x for reward, x in zip(rewards, row)},
             **{name: values[i] for name, values in columns.items()}}
            for i, (text, ids, cut, row) in enumerate(
                zip(groups.texts, groups.token_ids, groups.truncated_N, rows))]


def token_stats(groups: Groups, tokens: dict[int, list], world) -> dict[str, torch.Tensor]:
    """The tensors of a token record, on the main rank: `ids`, `sampler_logp`, `trainer_logp` and `entropy` of
    the tokens of all samples end to end, and `offsets`: sample i has offsets[i]:offsets[i + 1]. Trainer's
    values are NaN in samples that are not trained. tokens: train.Update's, of this rank."""
    known = {i: x for part in distributed.gather_to_main(tokens, world) for i, x in part.items()}
    if not world.main:
        return {}
    lengths_N = torch.tensor([len(ids) for ids in groups.token_ids])
    nothing = [[x.new_full(x.shape, torch.nan)] * 2 for x in groups.logprobs]
    logps, entropies = zip(*(known.get(i, nan) for i, nan in enumerate(nothing)))
    return {"ids": torch.cat(groups.token_ids), "sampler_logp": torch.cat(groups.logprobs),
            "trainer_logp": torch.cat(logps), "entropy": torch.cat(entropies),
            "offsets": F.pad(lengths_N.cumsum(0), (1, 0))}


# ---------------------------------------------------------------------- evaluation


def evaluate(step: int, prompts: list, rewards: list[Reward], sampler: Sampler, config, clock: Clock,
             log: Log, world) -> tuple[dict, list[dict]]:
    """One sample of each evaluation prompt, with the same seeds in every evaluation: (metrics, records). The
    records, lines of rollouts/eval_NNNNNN.jsonl, exist on the main rank only."""
    local = sample_and_score(sampler, prompts, rewards, 1, "eval", f"evaluation after step {step}",
                             describe_text, config, clock, log, world)
    groups = all_gather(local, world)
    shown = [name for name in groups.statistics if name not in LENGTHS]
    rows = torch.stack([groups.statistics[name].flatten() for name in shown], 1).tolist()
    scores = [{name: None if x != x else x for name, x in zip(shown, row)} for row in rows]
    metrics = {name: x for name, x in summarise(groups, prompts, rewards).items()  # single samples have no:
               if not name.startswith(("dead_groups", "reward_std", "slope"))}
    for name in shown:
        mean = mean_of(groups.statistics[name])
        metrics[name] = math.nan if mean is None else mean
    return ({f"eval/{name}": x for name, x in metrics.items()},
            records(groups, prompts, rewards, scores=scores))
