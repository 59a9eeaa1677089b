"""GRPO training of ultra-long writing: the LongWriter-Zero method (arXiv 2506.18841) on Qwen2.5.

    torchrun --nproc_per_node=8 train.py [--config FILE.json] [--NAME VALUE ...]

With no option it trains the embedded default, a small world that runs on a laptop's CPU. Every option is a
field of Config. `python train.py --plan ...` trains nothing: it says what the same options need, see plan.py.
"""

import faulthandler
import hashlib
import itertools
import math
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import checkpoints
import grpo
import model as qwen
import options
import parallel
import plan as planner
import replica
import rewards
import run
from checkpoints import DiskError
from data import prompts as prompt_data
from evaluation import scores
from evaluation.answers import line
from evaluation.benchmarks import Record
from kernels import linear_logprob
from options import ConfigError
from rewards import Remote, RewardError, count_words, is_batched, is_remote, score, structure
from run import locate
from sampler import Completion, Sampler
from scheduler import Request, assign
from tokenizer import Tokenizer, TokenizerError
from watch import Stopped, Watch

GAP_LIMIT = 0.01  # gap/k3 that is warned of: 100 nats over 10,000 tokens; a bf16 sampler of the default: 1e-5


@dataclass
class Config:
    model: str = "data/tiny/base"  # checkpoint folder: config.json, safetensors, tokenizer.json
    prompts: str = "data/tiny/prompts.jsonl"  # training prompts, JSONL
    prompt_style: str = "think"  # think: <think></think><answer></answer>; direct: the answer alone
    unreachable: str = "drop"  # prompts whose shortest answer exceeds max_new_tokens: drop or keep
    reward: str = ""  # comma-separated names out of rewards.REWARDS; empty: all with a weight, or in REQUIRED
    reward_model: str = "data/tiny/writing"  # the writing reward's: checkpoint folder, or URLs of servers
    offload_reward_model: bool = False  # its weights wait in host memory until a step's samples are scored
    run_dir: str = ""  # folder of the run; empty: a new one under runs/
    resume: str = "auto"  # auto: go on with an unfinished run of this config; true: insist; false: refuse
    steps: int = 70  # GRPO steps (paper: 150)
    prompts_per_step: int = 8  # over all ranks (not specified by the paper)
    group_size: int = 8  # samples of each prompt (paper: 32)
    max_new_tokens: int = 256  # thinking and answer together (paper: 14000)
    temperature: float = 0.8  # of sampling, and of the logprobs that are trained (paper: 0.8)
    top_p: float = 1.0  # must be 1 in training, or the policy that samples is not the one that is trained
    stop: str = "</answer>,<|user|>"  # comma-separated strings that end a sample; they stay in it
    lr: float = 1.75e-4  # AdamW, constant after warm-up (not specified by the paper; try 1e-6 from 7B up)
    warmup: int = 5  # steps of linear warm-up (not specified by the paper)
    weight_decay: float = 0.0  # not specified by the paper
    clip_grad: float = 1.0  # largest global gradient norm (not specified by the paper)
    skip_grad: float = 0.0  # an update with a larger norm is skipped; 0: only one that is not finite
    max_skipped: int = 3  # skipped updates in a row that end the run
    advantage: str = "per_reward"  # per_reward: each normalised in its group, then averaged; or sum, gdpo
    normalise_std: bool = True  # false: advantages are not divided by the group's std (Dr. GRPO)
    std_floor: float = grpo.STD_FLOOR  # least std, in rms of the batch's group stds (not in the paper)
    is_ratio: str = "token"  # PPO's ratio; or sequence (GSPO), cispo; with one update per batch all are 1
    loss: str = None  # mean over tokens; or sequence, constant; None: is_ratio's: token, GSPO sequence
    eps_low: float = None  # clip of the ratio below; None: is_ratio's: 0.2 (the paper), GSPO 3e-4, cispo 1
    eps_high: float = None  # clip above (DAPO: 0.28); None: is_ratio's: 0.2 (the paper), GSPO 4e-4, cispo 4
    updates_per_batch: int = 1  # optimiser steps, each on its part of a step's groups; 1: strictly on-policy
    tis_cap: float = 2.0  # largest trainer/sampler ratio that weighs a token; 0: no correction
    beta: float = 0.0  # weight of the KL to a reference policy (paper: 0, and then there is none)
    reference: str = ""  # its checkpoint folder; empty: `model`
    overlong: str = "keep"  # samples cut at max_new_tokens: keep, or mask (not specified by the paper)
    micro_batch_tokens: int = 4096  # tokens of a packed micro-batch on each rank
    replicate: int = 1  # HSDP: so many copies of the weights, each sharded over its part of the GPUs
    recompute: bool = False  # recompute each layer's activations in backward: less memory, a third more time
    offload_activations: bool = False  # what recompute starts from, a layer's inputs, waits in host memory
    offload_optimizer: bool = False  # AdamW's moments, half of the training state, wait in host memory
    max_sequences: int = 64  # sequences that each sampler decodes at a time
    page_size: int = 16  # tokens of a KV page
    tp: int = 1  # GPUs of a node that share a sampler by tensor parallelism, for models too large for one
    sampler_dtype: str = "auto"  # auto: bfloat16 on CUDA, float32 on CPU; or either by name
    eval_prompts: str = "data/tiny/eval_prompts.jsonl"  # empty: no evaluation
    eval_every: int = 10  # steps between evaluations, the first before training
    save_every: int = 10  # steps between checkpoints; the last step is always saved
    keep_checkpoints: int = 2  # newest checkpoints that are kept
    keep_every: int = 0  # every Nth step's checkpoint is kept for good; a multiple of save_every, 0: none
    seed: int = 0  # of prompt order and sampling
    device: str = "auto"  # auto, cpu or cuda
    timeout: int = 1800  # seconds that a rank waits for the others before the run ends
    wandb: bool = False  # log to Weights & Biases too (offline without a key)

    def __post_init__(self):
        """What is_ratio's paper says stands for what is not given."""
        published = zip(("loss", "eps_low", "eps_high"), grpo.FORMS.get(self.is_ratio, grpo.FORMS["token"]))
        for name, value in published:
            if getattr(self, name) is None:
                setattr(self, name, value)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(s for s in self.stop.split(",") if s)

    @property
    def reward_names(self) -> list[str]:
        return rewards.chosen(self.reward)


# ---------------------------------------------------------------------- options


def parse(arguments: list[str]) -> Config:
    return options.parse(Config, arguments, __doc__)


def check(config: Config, world: parallel.World):
    """Everything that can be known without reading a file. Raises ConfigError."""
    positive = ("steps", "prompts_per_step", "max_new_tokens", "temperature", "clip_grad",
                "updates_per_batch", "micro_batch_tokens", "max_sequences", "page_size", "tp", "replicate",
                "eval_every", "save_every", "keep_checkpoints", "max_skipped", "timeout")
    for name in positive:
        if not getattr(config, name) > 0:
            raise ConfigError(f"{name} must be positive, not {getattr(config, name)}")
    for name in ("lr", "warmup", "weight_decay", "eps_low", "eps_high", "std_floor", "tis_cap", "beta",
                 "skip_grad", "keep_every"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ConfigError(f"{name} must not be negative or infinite, is {getattr(config, name)}")
    for name, choices in (("prompt_style", prompt_data.STYLES), ("unreachable", ("drop", "keep")),
                          ("advantage", grpo.ADVANTAGES), ("loss", grpo.LOSSES), ("is_ratio", grpo.IS_RATIOS),
                          ("overlong", ("keep", "mask")),
                          ("resume", ("auto", "true", "false")), ("device", ("auto", "cpu", "cuda")),
                          ("sampler_dtype", ("auto", "float32", "bfloat16"))):
        if getattr(config, name) not in choices:
            raise ConfigError(f"{name} must be one of {', '.join(choices)}, not {getattr(config, name)!r}")
    if config.group_size < 2:
        raise ConfigError(
            f"group_size must be at least 2, not {config.group_size}: an advantage compares samples of one "
            "prompt"
        )
    if config.top_p != 1:
        raise ConfigError(
            f"top_p must be 1 in training, not {config.top_p}: the policy that samples would not be the one "
            "that is trained"
        )
    if world.size % config.replicate:
        raise ConfigError(f"replicate {config.replicate} does not divide the {world.size} ranks: each copy "
                          "of the weights is sharded over as many")
    if config.offload_activations and not config.recompute:
        raise ConfigError("offload_activations needs recompute: set it to true too")
    if config.prompts_per_step % world.size:
        raise ConfigError(
            f"prompts_per_step {config.prompts_per_step} does not divide by {world.size} ranks: groups stay "
            "whole on a rank"
        )
    if config.prompts_per_step % config.updates_per_batch:
        raise ConfigError(
            f"prompts_per_step {config.prompts_per_step} does not divide by updates_per_batch "
            f"{config.updates_per_batch}: groups stay whole in an update"
        )
    if config.keep_every % config.save_every:
        raise ConfigError(f"keep_every {config.keep_every} is no multiple of save_every {config.save_every}: "
                          "those steps have no checkpoint")
    if (here := int(os.environ.get("LOCAL_WORLD_SIZE", 1))) % config.tp:
        raise ConfigError(
            f"tp {config.tp} does not divide the {here} processes of a node: a sampler stays inside a node")
    if config.reference and not config.beta:
        raise ConfigError(
            f"reference {config.reference} is given, but beta is 0 and it would not be used: set beta too")
    rewards.check_names(config.reward_names)


# ---------------------------------------------------------------------- stages of a
# step


def request_seed(*key) -> int:
    """63 bits out of (run seed, what for, step, prompt id): samples depend on nothing else."""
    return int.from_bytes(
        hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest(), "little") >> 1


def make_requests(tokenizer: Tokenizer, prompts: list, n: int, when, config: Config) -> list[Request]:
    """n samples of each prompt. Their seeds come from the run's, `when` (the step) and the prompt's id."""
    return [Request(tokenizer.encode(p.text), n, config.max_new_tokens, config.temperature,
                    stop=config.stop_strings, seed=request_seed(config.seed, when, p.id),
                    expected_tokens=expected_tokens(p, config)) for p in prompts]


def expected_tokens(prompt, config: Config) -> int:
    """A guess at a sample's tokens, which decides when and on which rank it is written: twice those of the
    longest answer asked for, thinking included."""
    if not prompt.length_range:
        return config.max_new_tokens
    asked = round(2 * prompt_data.TOKENS_PER_WORD[prompt.language] * prompt.length_range[1])
    return max(1, min(asked, config.max_new_tokens))


def share_out(prompts: list, config: Config, world) -> list[list[int]]:
    """Indices of the prompts that each rank samples, scores and trains."""
    return assign([expected_tokens(p, config) for p in prompts], world.size)


def generate(sampler: Sampler, requests: list[Request], world) -> Iterator[Completion]:
    """Completions of this rank's requests. The ranks that share a sampler write all of theirs together, and
    none may leave before the last is written."""
    model = sampler.model
    if model.group is None:
        yield from sampler.generate(requests)
        return
    everyone = parallel.gather(requests, world, model.group)
    first = sum(map(len, everyone[:model.tp_rank]))
    stream = sampler.generate(sum(everyone, []))
    try:
        for c in stream:
            if first <= c.prompt_index < first + len(requests):
                yield replace(c, prompt_index=c.prompt_index - first)
    finally:
        deque(stream, maxlen=0)


def sample_and_score(sampler: Sampler, prompts: list, requests: list[Request], config: Config,
                     clock: run.Clock, progress: run.Progress,
                     world) -> tuple[list[list[Completion]], torch.Tensor]:
    """Completions of this rank's prompts, scored as they finish: completions[b][g], rewards_BGR with NaN
    where missing and -inf for rewards.LOWEST.

    Rewards marked `remote` are called in threads meanwhile and waited for at the end; those marked `batched`
    see all samples then. Raises RewardError, or Stopped, on all ranks if one has it.
    """
    n, names = requests[0].n, config.reward_names
    completions: list[list] = [[None] * n for _ in prompts]
    rewards_BGR = torch.full((len(prompts), n, len(names)), torch.nan, dtype=torch.float64)
    answered = [prompt for prompt in prompts for _ in range(n)]
    inline = [(r, name) for r, name in enumerate(names) if not is_batched(name) and not is_remote(name)]
    at_the_end = [(r, name) for r, name in enumerate(names) if is_batched(name)]
    failures = {}
    with ExitStack() as stack:
        remote = [(r, stack.enter_context(Remote(name))) for r, name in enumerate(names) if is_remote(name)]
        with parallel.agreed(RewardError, world):
            try:
                with closing(generate(sampler, requests, world)) as stream:  # whoever raises, ends it
                    for c in stream:
                        completions[c.prompt_index][c.sample_index] = c
                        for _, pool in remote:
                            pool.submit(c.prompt_index * n + c.sample_index, c, prompts[c.prompt_index])
                        with clock("score", wait=False):  # a step is under way on the device
                            for r, name in inline:
                                (value,) = score(name, [c], [prompts[c.prompt_index]])
                                rewards_BGR[c.prompt_index, c.sample_index, r] = value
                        progress.update(sampler.stats)
            finally:
                progress.close()
                sampler.sleep()  # its pages' memory is the update's now
                ended = time.perf_counter()
        clock.seconds["idle"] += time.perf_counter() - ended  # until the last rank's last sample
        sampled = time.monotonic()
        for r, name in at_the_end:  # perhaps sharded models, which nobody enters alone
            with parallel.agreed(RewardError, world), clock("score"):
                values = score(name, sum(completions, []), answered)
                rewards_BGR[..., r] = torch.tensor(values, dtype=torch.float64).view(len(prompts), n)
        with clock("score"):
            await_servers([pool for _, pool in remote], sampled, progress.label, world)
        with parallel.agreed(RewardError, world), clock("score"):
            for r, pool in remote:
                values, failures[pool.name] = pool.collect(answered)
                rewards_BGR[..., r] = torch.tensor(values, dtype=torch.float64).view(len(prompts), n)
    for name, errors in failures.items():
        reasons = Counter(sum(parallel.gather(errors, world), []))
        if reasons and world.main:
            shown = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(2))
            print(f"warning: {progress.label}: reward {name!r} is missing for {reasons.total()} samples, "
                  f"because it failed: {shown}", file=sys.stderr, flush=True)
    return completions, rewards_BGR


def await_servers(pools: list[Remote], since: float, label: str, world):
    """Until the remote rewards of all ranks are back or given up. In rounds of seconds: no rank waits in a
    collective, which has a timeout, for servers that are down, which have none."""
    told = None
    while pools:
        with parallel.agreed(RewardError, world):
            waiting = [pool.wait(since, world.heed) for pool in pools]
        waiting = sum(parallel.gather(waiting, world), [])
        down, now = next(filter(None, waiting), ""), time.monotonic()
        if down and (told is None or now - told >= 30):
            told = now
            if world.main:
                print(f"paused: {label} waits for its scores, and no server answers: {down}", file=sys.stderr,
                      flush=True)
        if told and not down:
            told = None
            if world.main:
                print(f"{label} goes on: a server answers again", file=sys.stderr, flush=True)
        if all(why is None for why in waiting):
            return


def summarise(prompts: list, completions: list[list[Completion]], rewards_BGR: torch.Tensor, names: list[str],
              tokenizer: Tokenizer, world) -> dict[str, float]:
    """Means over all samples of all ranks: rewards, their spread within groups, lengths."""
    _, std, dead = grpo.group_spread(rewards_BGR)
    sums = {"groups": len(prompts), "samples": rewards_BGR[..., 0].numel()}
    for r, name in enumerate(names):
        present = ~rewards_BGR[..., r].isnan()
        sums |= {
            f"sum/{name}": rewards_BGR[..., r].nansum().item(), f"present/{name}": present.sum().item(),
            f"std/{name}": std[:, r].sum().item(), f"dead/{name}": dead[:, r].sum().item()
        }
    counts = {"words": 0, "words_complete": 0, "tokens": 0, "think": 0, "in_range": 0, "ranged": 0, "cut": 0}
    for prompt, group in zip(prompts, completions):
        for c in group:
            words = count_words(structure(c.text)[2] or "")
            counts["words"] += words
            counts["words_complete"] += words * (c.finish_reason != "length")
            counts["tokens"] += len(c.token_ids)
            thought = c.text.partition("<think>")[2].partition("</think>")[0].partition("<answer>")[0]
            counts["think"] += len(tokenizer.encode(thought))  # one that is cut too
            counts["cut"] += c.finish_reason == "length"
            if prompt.length_range:
                counts["ranged"] += 1
                counts["in_range"] += prompt.length_range[0] <= words <= prompt.length_range[1]
    s = parallel.total(sums | counts, world)
    out = {}
    for name in names:
        out |= {
            f"reward/{name}": s[f"sum/{name}"] / (s[f"present/{name}"] or math.nan),  # all missing: null
            f"reward_std/{name}": s[f"std/{name}"] / s["groups"],
            f"dead_groups/{name}": int(s[f"dead/{name}"]),
            f"missing/{name}": int(s["samples"] - s[f"present/{name}"])
        }
    return out | {
        "length/answer_words": s["words"] / s["samples"], "length/tokens": s["tokens"] / s["samples"],
        "length/answer_words_complete": s["words_complete"] / max(1, s["samples"] - s["cut"]),
        "length/think_tokens": s["think"] / s["samples"],
        "length/in_range": s["in_range"] / max(1, s["ranged"]), "truncated": s["cut"] / s["samples"]
    }


def compose(raw: list, names: list[str], config: Config,
            suite=rewards) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """Advantages out of the raw rewards raw[b][g][r] of all ranks' groups, with the weights, transforms and
    requirements of `suite`, a module such as rewards: (advantage_BG, per_reward_BGR, metrics). Raises
    RewardError."""
    weights_R = torch.tensor([suite.REWARDS[name][1] for name in names])
    least_R = torch.tensor([suite.REQUIRED.get(name, -math.inf) for name in names], dtype=torch.float64)
    worth_BGR = torch.tensor([[list(map(suite.transformed, names, values)) for values in group]
                              for group in raw], dtype=torch.float64)
    advantage_BG, per_reward_BGR = grpo.advantages(worth_BGR, weights_R, config.advantage, config.std_floor,
                                                   config.normalise_std)
    advantage_BG, violates_BGR = grpo.require(advantage_BG, torch.tensor(raw, dtype=torch.float64), least_R)
    violators = dict(zip(names, violates_BGR.sum((0, 1)).tolist()))
    return advantage_BG, per_reward_BGR, {
        **{f"violators/{name}": violators[name] for name in suite.REQUIRED},
        **grpo.conflicts(per_reward_BGR, weights_R, names, config.advantage)}


def costs(samples: list[grpo.Sample], seconds: dict[str, float], world) -> dict[str, float]:
    """Seconds by phase of the slowest rank, rates over all ranks, whose samples these are, memory of the
    hungriest one."""
    slowest = parallel.largest(seconds | {"memory": run.peak_memory_gb(world.device)}, world)
    new, prompt = sum(len(s.token_ids) for s in samples), sum(len(s.prompt_ids) for s in samples)
    return {"memory/peak_gb": slowest.pop("memory"),
            **{f"time/{phase}": s for phase, s in slowest.items()},
            "tokens_per_second/sample": new / slowest["sample"],
            "tokens_per_second/update": (new + prompt) / slowest["update"]}


def everyones(groups: list, share: list[int], world) -> list:
    """The groups of all ranks in the order of the whole batch, in which this rank's are `share`."""
    by_place = {}
    for theirs in parallel.gather(dict(zip(share, groups)), world):
        by_place |= theirs
    return [by_place[place] for place in sorted(by_place)]


def minibatches(samples: list[grpo.Sample], config: Config) -> list[list[int]]:
    """Indices of the samples that each optimiser step trains, out of the whole batch, group after group;
    groups stay whole."""
    size = len(samples) // config.updates_per_batch
    return [[i for i in range(start, start + size) if samples[i].trained]
            for start in range(0, len(samples), size)]


def logprobs(model, batch: grpo.Batch, config: Config, n_valid: int) -> tuple[torch.Tensor, torch.Tensor]:
    """logp_N and entropy_N of a micro-batch's trained tokens, at the sampling temperature."""
    hidden_TC = model(batch.tokens_T, batch.attention)
    return linear_logprob(hidden_TC[batch.mask_T], model.head_weight, batch.targets_T[batch.mask_T],
                          config.temperature, n_valid=n_valid)


def backward(model, reference, batch: grpo.Batch, old_N: torch.Tensor | None, count: dict[str, int],
             config: Config, n_valid: int, clock: run.Clock) -> tuple[dict[str, float], torch.Tensor]:
    """Adds the gradient of one micro-batch: (sums over its tokens, |logprob gap| of each token).

    old_N: logprobs of the policy that sampled, by the trainer; None while it is the one that is trained.
    count: samples and tokens that are trained in the whole batch.
    """
    with clock("logprob"):
        logp_N, entropy_N = logprobs(model, batch, config, n_valid)
    old_N, rollout_N = logp_N.detach() if old_N is None else old_N, batch.rollout_logp_T[batch.mask_T]
    denominator_N = grpo.denominators(batch.lengths, config.loss, count["samples"], count["tokens"],
                                      config.max_new_tokens, logp_N.device)
    options, sums = {}, {}
    if config.tis_cap:
        options["correction_N"] = grpo.truncated_ratio(old_N, rollout_N, config.tis_cap)
        sums["capped"] = (options["correction_N"] == config.tis_cap).sum()
    if reference:
        with torch.no_grad(), clock("logprob"):
            options["reference_logp_N"] = logprobs(reference, batch, config, n_valid)[0]
        options["beta"] = config.beta
    loss, seen = grpo.policy_loss(logp_N, old_N, batch.advantage_T[batch.mask_T], denominator_N,
                                  config.eps_low, config.eps_high, config.is_ratio, batch.lengths, **options)
    with clock("backward"):
        loss.backward()
    sums |= seen | grpo.mismatch(old_N, rollout_N)
    sums |= {"loss": loss.detach(), "entropy": entropy_N.detach().sum()}
    return {name: value.item() for name, value in sums.items()}, (old_N - rollout_N).abs()


def update(model, reference, optimizer, samples: list[grpo.Sample], parts: list[list[int]], config: Config,
           n_valid: int, world,
           clock: run.Clock) -> tuple[dict[str, float], list[float | None], list[bool | None]]:
    """One optimiser step for each part of the samples, which are those of all ranks: (metrics over all of
    them, mean |logprob gap| of each sample, None if it is not trained, whether each step was taken).

    Whoever sampled them, each rank trains those that give all ranks the same work. None is taken where all
    samples of a part are masked (None), or where the gradient is not finite or above skip_grad (False).
    Raises Stopped, on all ranks, as long as the weights are those of the last step.
    """
    lengths = [len(s.prompt_ids) + len(s.token_ids) for s in samples]
    flops = [n * model.config.flops_per_token(n // 2) for n in lengths]
    plans = [grpo.pack(part, lengths, flops, config.micro_batch_tokens, world.size) for part in parts]
    balance = grpo.balance(sum(plans, []), lengths, flops, config.micro_batch_tokens)
    plans = [[micro_batch[world.rank] for micro_batch in plan] for plan in plans]
    counts = [{"samples": len(part), "tokens": sum(len(samples[i].token_ids) for i in part)}
              for part in parts]
    old = {}  # each sample's logprobs before the first update, where there is a second
    for part in (part for plan in plans for part in plan if len(plans) > 1):
        parallel.heed(world)
        batch = grpo.collate([samples[i] for i in part], world.device)
        with torch.no_grad(), clock("logprob"):
            old |= zip(part, logprobs(model, batch, config, n_valid)[0].split(batch.lengths))

    sums = dict.fromkeys(("loss", "clipped", "entropy", "gap/mean", "gap/k3", "kl", "capped"), 0.0)
    gap_max, gaps, norms, taken = 0.0, dict.fromkeys(range(len(samples)), 0.0), [], []
    for plan, count in zip(plans, counts):
        if not count["tokens"]:
            taken.append(None)
            continue
        for part in plan:
            if True not in taken:
                parallel.heed(world)
            if config.replicate > 1:  # replicas add up their gradients once
                model.set_requires_all_reduce(part is plan[-1])
            batch = grpo.collate([samples[i] for i in part], world.device)
            old_N = torch.cat([old[i] for i in part]) if old and part else None
            seen, gap_N = backward(model, reference, batch, old_N, count, config, n_valid, clock)
            gap_max = max(gap_max, seen.pop("gap/max"))
            sums |= {name: sums[name] + value for name, value in seen.items()}
            for i, gap in zip(part, gap_N.split(batch.lengths)):
                gaps[i] = gap.mean().item()
        with clock("step"):
            norms.append(parallel.clip_grad_(model, config.clip_grad))
            taken.append(math.isfinite(norms[-1]) and not 0 < config.skip_grad < norms[-1])
            if taken[-1]:
                optimizer.step()
            optimizer.zero_grad()
    sums, gaps = parallel.total(sums, world), parallel.total(gaps, world)  # of each gap one rank knows
    tokens = max(1, sum(count["tokens"] for count in counts))
    metrics = {"loss": sums["loss"] / max(1, len(norms)), "grad_norm": sum(norms) / max(1, len(norms)),
               "skipped_updates": len(taken) - taken.count(True),
               "clip_share": sums["clipped"] / tokens, "entropy": sums["entropy"] / tokens,
               "gap/mean": sums["gap/mean"] / tokens, "gap/k3": sums["gap/k3"] / tokens,
               **parallel.largest({"gap/max": gap_max}, world), **balance}
    if reference:
        parallel.reshard(reference)
        metrics["kl"] = sums["kl"] / tokens
    if config.tis_cap:
        metrics["tis_capped"] = sums["capped"] / tokens
    return metrics, [gaps[i] if s.trained else None for i, s in enumerate(samples)], taken


def records(prompts: list, completions: list[list[Completion]], rewards_BGR: torch.Tensor, names: list[str],
            share: list[int], world, extra: list[list[dict]] | None = None) -> list[dict]:
    """Rollout records of all ranks, in the order of the whole batch, in which this rank's groups are `share`;
    extra[b][g] joins a sample's record."""

    def record(b: int, g: int, c: Completion) -> dict:
        values = {name: None if v != v else v for name, v in zip(names, rewards_BGR[b, g].tolist())}
        return {"prompt_id": prompts[b].id, "sample": g, "prompt": prompts[b].text, "text": c.text,
                "tokens": len(c.token_ids), "finish_reason": c.finish_reason, "rewards": values,
                **(extra[b][g] if extra else {})}

    mine = [[record(b, g, c) for g, c in enumerate(group)] for b, group in enumerate(completions)]
    return sum(everyones(mine, share, world), [])


# ---------------------------------------------------------------------- the run


@dataclass(frozen=True)
class Inputs:
    """What a run reads besides weights."""

    model: str  # folders
    reference: str
    tokenizer: Tokenizer
    prompts: list
    eval_prompts: list
    dropped: dict[str, int]  # prompts, by reason


def read_inputs(config: Config, world) -> Inputs:
    """Reads and checks all that can be known before weights load: options, checkpoints' headers, prompts,
    rewards. Raises an error of one sentence."""
    check(config, world)
    model, reference = locate(config.model), locate(config.reference or config.model)
    shapes, tokenizer = {path: qwen.read_config(path) for path in (model, reference)}, Tokenizer(model)
    for path, shape in shapes.items():
        if shape.scalar_head:
            raise ConfigError(f"{path} is a reward model, which writes nothing: give it as reward_model")
        qwen.check_tensors(shape, path)
        replica.check_tp(shape, config.tp)
        tokenizer.check_rows(shape.vocab_size, path)
    context = min(shape.max_position_embeddings for shape in shapes.values())
    prompts, dropped = read_prompts(config, "prompts", config.prompts_per_step, "a step", tokenizer, context)
    eval_prompts = []
    if config.eval_prompts:
        eval_prompts, out = read_prompts(config, "eval_prompts", world.size, "every rank", tokenizer, context)
        dropped |= {f"{why} evaluation prompts": n for why, n in out.items()}
    rewards.check(config.reward_names, config)
    for name in config.reward_names:  # a dry run: a reward that raises should do so now
        if is_batched(name) and is_remote(name):
            raise RewardError(f"reward {name!r} is marked both @batched and @remote: choose one")
        for text in ("<think>A plan.</think><answer>A text.</answer>", ""):
            if not is_batched(name) and not is_remote(name):
                ids = tokenizer.encode(text) + tokenizer.eos_ids[:1]  # no sample is without a token
                made_up = Completion(0, 0, ids, [0.0] * len(ids), text, "stop", config.max_new_tokens)
                rewards.transformed(name, score(name, [made_up], prompts[:1])[0])
    return Inputs(model, reference, tokenizer, prompts, eval_prompts, dropped)


def read_prompts(config: Config, option: str, need: int, why: str, tokenizer: Tokenizer,
                 context: int) -> tuple[list, dict[str, int]]:
    """The usable prompts of the file that an option names, and what was dropped; raises ConfigError if fewer
    than `need` are left, or if one does not fit into the model's context with its answer."""
    path = getattr(config, option)
    prompts, dropped = prompt_data.read(locate(path), config.prompt_style, config.max_new_tokens,
                                        config.unreachable == "keep")
    if len(prompts) < need:
        raise ConfigError(f"{option} {path} has {len(prompts)} usable prompts (dropped: "
                          f"{dict(dropped) or 'none'}), but {why} needs {need}")
    for prompt in prompts:
        if (tokens := len(tokenizer.encode(prompt.text))) + config.max_new_tokens > context:
            raise ConfigError(f"{option} {path}: prompt {prompt.id!r} has {tokens} tokens, and with "
                              f"max_new_tokens {config.max_new_tokens} it exceeds the model's context of "
                              f"{context}: shorten it, or lower max_new_tokens")
    return prompts, dict(dropped)


class Diverged(Exception):
    """Too many updates in a row had to be skipped."""


def open_run(config: Config, world) -> tuple[Path, tuple[Path, dict] | None]:
    """The run's folder, and its newest whole checkpoint with its state. What the main rank finds, or its
    error, is everyone's; all ranks verify."""
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))  # 0 on a node that has just come back
    restarted, folder = parallel.largest({"restarts": restarts}, world)["restarts"] > 0, None
    with parallel.agreed(ConfigError, world):
        folder = run.choose_folder(config, restarted) if world.main else None
    folder = parallel.broadcast(folder, world)
    newest = checkpoints.newest(folder / "checkpoints", world)
    with parallel.agreed(ConfigError, world):
        if world.main and not (newest and finished(newest[1], config)):
            run.open_folder(config, folder, newest)
    return folder, newest


def finished(state: dict, config: Config) -> bool:
    return state["step"] >= config.steps and "unlogged" not in state


def make_sampler(model, tokenizer: Tokenizer, config: Config, world) -> Sampler:
    """A sampler with a replica of the trainer's model, or a slice of one, which `parallel.publish` fills."""
    dtype = {"auto": torch.bfloat16 if world.device.type == "cuda" else torch.float32,
             "float32": torch.float32, "bfloat16": torch.bfloat16}[config.sampler_dtype]
    group, steps = parallel.tp_group(config.tp, world.timeout), itertools.count()

    def interrupt():
        if group is None:
            world.heed()
        elif next(steps) % 32 == 0:  # its ranks are in step, and can only stop together
            parallel.heed(world, group)

    with torch.device("meta"):
        policy = qwen.Qwen2(model.config, group).to(dtype).requires_grad_(False)
    return Sampler(policy.to_empty(device=world.device), tokenizer, config.max_sequences, config.page_size,
                   interrupt=interrupt)


def measure(prompt, c: Completion) -> dict[str, float | None]:
    """LongBench-Write's length score, for the middle of the range that is asked for, and statistics of the
    text."""
    wanted = prompt.length_range and sum(prompt.length_range) / 2
    record = Record(prompt.id, prompt.query, prompt.language, wanted, "", "", (), {})
    answer = line(record, c.text, prompt.style, c.finish_reason, len(c.token_ids))
    return {"S_l": scores.length_score(wanted, answer["words"]) if wanted else None,
            "missing_answers": float(not answer["answer"]), **scores.texts(record, answer, prompt.style)}


def evaluate(step: int, prompts: list, sampler: Sampler, config: Config, folder: Path, clock: run.Clock,
             world) -> dict:
    """One sample of each evaluation prompt, the same seeds every time: metrics, and texts in rollouts/."""
    share = share_out(prompts, config, world)[world.rank]
    mine = [prompts[i] for i in share]
    requests = make_requests(sampler.tokenizer, mine, 1, "eval", config)
    progress = run.Progress(f"evaluation after step {step}", len(mine), world.main)
    with clock("sample"):
        completions, rewards_BGR = sample_and_score(sampler, mine, requests, config, clock, progress, world)
    rewards_BGR = grpo.place_lowest(rewards_BGR)  # a single sample without a body has no such reward
    metrics = summarise(mine, completions, rewards_BGR, config.reward_names, sampler.tokenizer, world)
    measured = [[{"scores": measure(prompt, c)} for c in group] for prompt, group in zip(mine, completions)]
    texts = records(mine, completions, rewards_BGR, config.reward_names, share, world, measured)
    for name in texts[0]["scores"]:
        value = scores.mean([(text["scores"][name], 1) for text in texts])
        metrics[name] = math.nan if value is None else value
    with parallel.agreed(DiskError, world):
        if world.main:
            run.write_jsonl(folder / "rollouts" / f"eval_{step:06d}.jsonl", texts)
    if world.main:
        shown = "  ".join(f"{name} {metrics[f'reward/{name}']:.3f}" for name in config.reward_names)
        print(f"eval after step {step}: {shown}  words {metrics['length/answer_words']:.0f} "
              f"on {len(prompts)} prompts", flush=True)
    within_group = ("dead_groups", "reward_std")  # mean nothing for single samples
    return {f"eval/{name}": v for name, v in metrics.items() if not name.startswith(within_group)}


def train(config: Config, clock: run.Clock | None = None, watch: Watch | None = None):
    clock, world = clock or run.Clock(), parallel.setup(config.device, config.timeout, watch,
                                                        config.replicate)
    inputs = read_inputs(config, world)
    prompts, eval_prompts, tokenizer = inputs.prompts, inputs.eval_prompts, inputs.tokenizer
    names = config.reward_names
    folder, newest = open_run(config, world)
    if newest and finished(newest[1], config):
        if world.main:
            print(f"{folder} has finished its {newest[1]['step']} steps; raise --steps, or choose another "
                  "run_dir")
        return

    model = parallel.load_sharded(inputs.model, world)
    model.recompute, model.offload_activations = config.recompute, config.offload_activations
    reference = parallel.load_sharded(inputs.reference, world) if config.beta else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95),
                                  weight_decay=config.weight_decay, fused=True)
    saved = checkpoints.load(newest[0], model, optimizer) if newest else {"step": 0, "cursor": 0}
    if config.offload_optimizer:
        parallel.offload_(optimizer)
    rewards.prepare(names, config, world)
    made_by = {"code": run.code_hash(), "config": asdict(config)}
    # state: of the last step; safe: of the last that was not skipped, whose weights these still are
    state = safe = {name: saved.get(name, 0) for name in ("step", "cursor", "skipped")}
    start = on_disk = state["step"]
    sampler = make_sampler(model, tokenizer, config, world)
    parallel.publish(model, sampler.model)
    log = run.open_wandb(config, folder) if config.wandb and world.main else run.NoLog()
    if world.main:
        notes = [f"{model.config.num_parameters:,} parameters", f"{len(prompts)} prompts"]
        notes += [f"{n} {why} dropped" for why, n in inputs.dropped.items()]
        notes += [f"{world.size} x {world.device.type}"] + [f"resumed after step {start}"] * (start > 0)
        print(f"{folder}: {', '.join(notes)}", flush=True)

    def save(**unlogged):
        nonlocal on_disk
        clock.seconds["save"] = 0.0
        with clock("save"):
            checkpoints.save(folder / "checkpoints", model, optimizer, safe | made_by | unlogged, world,
                             config.keep_checkpoints, config.keep_every)
        on_disk = safe["step"]

    @contextmanager
    def kept(**unlogged):
        """Where the run ends, on all ranks alike, the last step stays: a checkpoint, with what of it is not
        in the log yet."""
        try:
            yield
        except (Stopped, RewardError, DiskError, Diverged) as e:
            if safe["step"] > on_disk:
                save(**(unlogged if safe is state else {}))
            if isinstance(e, Stopped) and world.main:
                print(f"stopped by SIGTERM: step {safe['step']} is kept, and the same command goes on from "
                      "there", flush=True)
            raise

    def record(metrics: dict):
        with parallel.agreed(DiskError, world):
            if world.main:
                run.append_metrics(folder, metrics)
        if world.main:
            log.log(metrics, step=metrics["step"])

    def log_step(metrics: dict, texts: list[dict]):
        """One line, one object, one record a sample; and the evaluation."""
        with kept(unlogged={"metrics": metrics, "texts": texts}):
            with parallel.agreed(DiskError, world):
                if world.main:
                    run.write_jsonl(folder / "rollouts" / f"step_{metrics['step']:06d}.jsonl", texts)
            if world.main:
                print(run.describe(metrics, config.steps, names), flush=True)
                if metrics["truncated"] > 0.25:
                    print(f"warning: {metrics['truncated']:.0%} of the samples were cut at max_new_tokens "
                          f"{config.max_new_tokens}", flush=True)
                if metrics["gap/k3"] > GAP_LIMIT:
                    print(f"warning: the sampler drifts from the trainer: gap/k3 {metrics['gap/k3']:.3g} is "
                          f"above {GAP_LIMIT} nats a token; set sampler_dtype to float32, and keep tis_cap "
                          "above 0", flush=True)
            if eval_prompts and metrics["step"] % config.eval_every == 0:
                evaluated = evaluate(metrics["step"], eval_prompts, sampler, config, folder, clock, world)
                metrics = metrics | evaluated
            record(metrics)

    if start == 0 and eval_prompts:
        with kept():
            record({"step": 0, **evaluate(0, eval_prompts, sampler, config, folder, clock, world)})
    if "unlogged" in saved:
        log_step(**saved["unlogged"])

    due = False
    for step in range(start + 1, config.steps + 1):
        clock.begin(step)
        # Sample: each rank its own groups. Score each sample as it finishes.
        order = prompt_data.order(len(prompts), config.prompts_per_step, config.seed, state["cursor"])
        share = share_out([prompts[i] for i in order], config, world)[world.rank]
        mine = [prompts[order[i]] for i in share]
        requests = make_requests(tokenizer, mine, config.group_size, step, config)
        progress = run.Progress(f"step {step}", len(mine) * config.group_size, world.main)
        with kept(), clock("sample"):
            completions, rewards_BGR = sample_and_score(sampler, mine, requests, config, clock, progress,
                                                        world)
        clock.seconds["sample"] -= clock.seconds["score"] + clock.seconds["idle"]

        # Advantages, of all ranks' groups: each reward on its own within its group, then averaged.
        raw_BGR = grpo.place_lowest(torch.tensor(everyones(rewards_BGR.tolist(), share, world),
                                                 dtype=torch.float64))
        with kept():
            *composed, conflicts = compose(raw_BGR.tolist(), names, config)
        rewards_BGR, advantage_BG, per_reward_BGR = (x[share] for x in (raw_BGR, *composed))

        # Update: samples of all ranks, packed and dealt by flops; logprobs, the clipped loss, AdamW.
        lr = config.lr * min(1.0, step / max(1, config.warmup))
        for parameters in optimizer.param_groups:
            parameters["lr"] = lr
        samples = [[grpo.Sample(requests[b].prompt_ids, c.token_ids, c.logprobs, advantage_BG[b, g].item(),
                                config.overlong == "keep" or c.finish_reason != "length")
                    for g, c in enumerate(group)] for b, group in enumerate(completions)]
        replica.release_(sampler.model)  # until publish: its memory is the update's
        with kept(), clock("update"):
            samples = sum(everyones(samples, share, world), [])
            parts = minibatches(samples, config)
            trained, gaps, taken = update(model, reference, optimizer, samples, parts, config,
                                          tokenizer.n_valid, world, clock)
        with clock("publish"):
            fingerprint = parallel.publish(model, sampler.model)
        skipped = state["skipped"]
        for yes in taken:
            skipped = skipped if yes is None else 0 if yes else skipped + 1
        state = {"step": step, "cursor": state["cursor"] + config.prompts_per_step, "skipped": skipped}
        safe = state if True in taken or False not in taken else safe

        # Log.
        metrics = {"step": step, **summarise(mine, completions, rewards_BGR, names, tokenizer, world),
                   **conflicts, **trained, "lr": lr, "weights/fingerprint": fingerprint,
                   **costs(samples, clock.seconds, world)}
        extra = [[{"advantages": dict(zip(names, per_reward_BGR[b, g].tolist())),
                   "advantage": advantage_BG[b, g].item(), "gap_mean": gaps[place * config.group_size + g]}
                  for g in range(config.group_size)] for b, place in enumerate(share)]
        log_step(metrics, records(mine, completions, rewards_BGR, names, share, world, extra))
        if False in taken:
            with kept():
                keep_bad(folder, step, [samples[i] for part, yes in zip(parts, taken) if yes is False
                                        for i in part], world)
                if skipped >= config.max_skipped:
                    raise Diverged(f"{skipped} updates in a row were skipped, the last with a gradient of "
                                   f"norm {trained['grad_norm']:.3g}: look at their samples in "
                                   f"{folder}/bad_batches, at the rewards and at lr; step {safe['step']}, "
                                   "before them, is kept")

        # Save: after the log, so that a resumed run cuts back lines and never lacks one.
        last = step == config.steps
        due = due or step % config.save_every == 0 or last
        if due and (safe is state or last):
            safe, due = state, False
            save()
    log.finish()
    if world.main:
        print(f"done: {folder} holds metrics.jsonl, rollouts/ and checkpoints/", flush=True)


def keep_bad(folder: Path, step: int, samples: list[grpo.Sample], world):
    """The samples of updates that were skipped, each line the arguments of a grpo.Sample."""
    with parallel.agreed(DiskError, world):
        if world.main:
            run.write_jsonl(folder / "bad_batches" / f"step_{step:06d}.jsonl", [asdict(s) for s in samples])


def main():
    clock, watch, rank = run.Clock(), Watch(), int(os.environ.get("RANK", 0))
    faulthandler.enable(sys.__stderr__)  # where NCCL's watchdog ends a process, it says in which line
    try:
        if "--plan" in sys.argv:
            return planner.main([word for word in sys.argv[1:] if word != "--plan"], Config, check)
        train(parse(sys.argv[1:]), clock, watch)
    except Stopped:
        pass
    except (ConfigError, parallel.SetupError, parallel.HandoffError, qwen.CheckpointError,
            checkpoints.BadCheckpoint, DiskError, prompt_data.PromptError, TokenizerError, RewardError,
            Diverged) as e:
        if rank == 0:
            print(f"error: {e}", file=sys.stderr, flush=True)
        else:  # torchrun ends all with the first that exits: not before rank 0 has spoken
            time.sleep(5)
        raise SystemExit(2) from None
    except RuntimeError as e:
        if not (said := parallel.lost(e)):
            raise
        print(f"error: rank {rank} in phase {clock.phase!r} of step {clock.step} has lost the others "
              f"({said}): see what they said; the same command goes on from the last checkpoint",
              file=sys.stderr, flush=True)
        os._exit(1)  # nobody is left to say goodbye to
    finally:
        watch.close()
        parallel.close()


if __name__ == "__main__":
    main()
