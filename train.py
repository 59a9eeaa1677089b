"""GRPO training of ultra-long writing: the LongWriter-Zero method (arXiv 2506.18841) on Qwen2.5 and Qwen3.

    torchrun --nproc_per_node=8 train.py [--config FILE.json] [--NAME VALUE ...]

Every option is a field of Config. Without --model and --config, configs/tiny.json is read: the embedded
default, a small world that runs on a laptop's CPU. `python -m scripts.plan` says what the same options
need.
"""

import math
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from lib.stop import Stopped, Watch

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from Ctrl-C while torch is imported
# Set before torch loads OpenMP: on busy cores, threads that spin at barriers starve each other.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

import checkpoints
import grpo
import parallel
import replica
import rewards as reward_file
import rollout
import run
from checkpoints import Checkpoints
from data import prompts as prompt_data
from kernels import linear_logprob
from lib import distributed, offload, options
from lib.console import tracked
from lib.files import locate
from lib.options import UserError
from lib.scoring import RewardError, choose_rewards


@dataclass
class Config:
    model: str = ""  # checkpoint folder: config.json, safetensors, tokenizer.json
    prompts: str = "prompts.jsonl"  # training prompts, JSONL
    prompt_style: str = "think"  # think: <think></think><answer></answer>; direct: the answer alone
    unreachable: str = "drop"  # prompts whose shortest answer exceeds max_new_tokens: drop or keep
    reward: str = ""  # comma-separated names out of rewards.REWARDS; empty: all with a weight, or in REQUIRED
    reward_model: str = ""  # the writing reward's: checkpoint folder, or URLs of servers
    offload_reward_model: bool = False  # its weights wait in host memory until a step's samples are scored
    run_dir: str = ""  # folder of the run; empty: a new one under runs/
    resume: str = "auto"  # auto: go on with an unfinished run of this config; true: insist; false: refuse
    steps: int = 150  # GRPO steps (paper: 150)
    prompts_per_step: int = 32  # over all ranks (not specified by the paper)
    group_size: int = 32  # samples of each prompt (paper: 32)
    max_new_tokens: int = 14000  # thinking and answer together (paper: 14000)
    temperature: float = 0.8  # of sampling, and of the logprobs that are trained (paper: 0.8)
    top_p: float = 1.0  # must be 1 in training, or the policy that samples is not the one that is trained
    stop: str = prompt_data.STOP  # comma-separated strings that end a sample; they stay in it
    lr: float = 1e-6  # AdamW, constant after warm-up (not specified by the paper)
    warmup: int = 10  # steps of linear warm-up (not specified by the paper)
    weight_decay: float = 0.0  # not specified by the paper
    clip_grad: float = 1.0  # largest global gradient norm (not specified by the paper)
    skip_grad: float = 0.0  # an update with a larger norm is skipped; 0: only one that is not finite
    max_skipped: int = 3  # skipped updates in a row that end the run
    advantage: str = "per_reward"  # per_reward: each normalised in its group, then averaged; or sum, gdpo
    normalise_std: bool = True  # false: advantages are not divided by the group's std (Dr. GRPO)
    std_floor: float = grpo.STD_FLOOR  # least divisor: this x rms of the live groups' stds (not in the paper)
    is_ratio: str = "token"  # PPO's ratio; or sequence (GSPO), cispo; with one update per batch all are 1
    loss: str = None  # mean over tokens; or sequence, constant; None: is_ratio's: token, GSPO sequence
    eps_low: float = None  # clip of the ratio below; None: is_ratio's: 0.2 (the paper), GSPO 3e-4, cispo 1
    eps_high: float = None  # clip above (DAPO: 0.28); None: is_ratio's: 0.2 (the paper), GSPO 4e-4, cispo 4
    updates_per_batch: int = 1  # optimiser steps, each on its part of a step's groups; 1: strictly on-policy
    tis_cap: float = 2.0  # largest trainer/sampler ratio that weighs a token; 0: no correction
    beta: float = 0.0  # weight of the KL to a reference policy (paper: 0; then no reference is loaded)
    reference: str = ""  # its checkpoint folder; empty: `model`
    overlong: str = "keep"  # samples cut at max_new_tokens: keep, or mask (not specified by the paper)
    micro_batch_tokens: int = 16384  # tokens of a packed micro-batch on each rank
    replicate: int = 1  # HSDP: copies of the weights, each sharded over its part of the GPUs
    recompute: bool = True  # recompute each layer's activations in backward: less memory, a third more time
    offload_activations: bool = False  # what recompute starts from, a layer's inputs, waits in host memory
    offload_optimizer: bool = False  # AdamW's moments, half of the training state, wait in host memory
    max_sequences: int = 128  # sequences that each sampler decodes at a time
    page_size: int = 16  # tokens of a KV page
    tp: int = 1  # GPUs of a node that share a sampler by tensor parallelism, for models too large for one
    sampler_dtype: str = "auto"  # auto: bfloat16 on CUDA, float32 on CPU; or either by name
    eval_prompts: str = ""  # empty: no evaluation
    eval_every: int = 10  # steps between evaluations, the first before training
    save_every: int = 10  # steps between checkpoints; the last step is always saved
    keep_checkpoints: int = 2  # newest checkpoints that are kept
    keep_every: int = 0  # every Nth step's checkpoint is kept for good; a multiple of save_every, 0: none
    token_stats_every: int = 10  # steps between records of every token's logprobs and entropy; 0: none
    seed: int = 0  # of prompt order and sampling
    device: str = "auto"  # auto, cpu or cuda
    timeout: int = 1800  # seconds that a rank waits for the others before the run ends
    wandb: bool = False  # log to Weights & Biases too (offline without a key)
    files = ()  # the files that it was read from (not an option)

    def __post_init__(self):
        """Fills loss and clip that are not given with those of is_ratio's paper."""
        published = zip(("loss", "eps_low", "eps_high"), grpo.FORMS.get(self.is_ratio, grpo.FORMS["token"]))
        for name, value in published:
            if getattr(self, name) is None:
                setattr(self, name, value)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(s for s in self.stop.split(",") if s)


# ---------------------------------------------------------------------- options


def parse(arguments: list[str], about: str = __doc__, others: tuple[str, ...] = ()) -> Config:
    """Config from a command line. Options that are not given come from the run in run_dir, if there is one;
    else, without --model and --config, from configs/tiny.json; else they are Config's. Raises UserError."""
    given, files = options.read(Config, arguments, about, others)
    folder = given.get("run_dir")
    if folder and (record := Path(folder, "config.json")).exists():
        base = str(record)
    else:
        base = "" if files or "model" in given else locate("configs/tiny.json")
    if base:
        files = [base, *files]
        given = options.read(Config, ["--config", base], about)[0] | {"resume": "auto"} | given
    config = Config(**given)
    config.files = files
    return config


def check(config: Config, world: distributed.World):
    """Checks the options, as far as that is possible without reading a file. Raises UserError."""
    options.check_numbers(
        config,
        "steps prompts_per_step max_new_tokens clip_grad updates_per_batch micro_batch_tokens tp replicate "
        "eval_every save_every keep_checkpoints max_skipped timeout",
        "lr warmup weight_decay eps_low eps_high std_floor tis_cap beta skip_grad keep_every "
        "token_stats_every",
        temperature=(0.01, 100), max_sequences=(1, 2**16), page_size=(1, 2**12), group_size=(2, 2**16))
    options.check_choices(config, prompt_style=prompt_data.STYLES, unreachable=("drop", "keep"),
                          advantage=grpo.ADVANTAGES, loss=grpo.LOSSES, is_ratio=grpo.IS_RATIOS,
                          overlong=("keep", "mask"), resume=("auto", "true", "false"),
                          device=options.DEVICES, sampler_dtype=options.DTYPES)
    c, local = config, options.environment()["LOCAL_WORLD_SIZE"] or 1
    for invalid, message in (
        (c.top_p != 1, f"top_p must be 1 in training, not {c.top_p}: the policy that samples would not be "
                       "the one that is trained"),
        (world.size % c.replicate, f"replicate {c.replicate} does not divide the {world.size} ranks: each "
                                   "copy of the weights is sharded over as many"),
        (c.offload_activations and not c.recompute,
         "offload_activations needs recompute: set it to true too"),
        (c.prompts_per_step % world.size, f"prompts_per_step {c.prompts_per_step} does not divide by "
                                          f"{world.size} ranks: groups stay whole on a rank"),
        (c.prompts_per_step % c.updates_per_batch,
         f"prompts_per_step {c.prompts_per_step} does not divide by updates_per_batch {c.updates_per_batch}: "
         "groups stay whole in an update"),
        (c.keep_every % c.save_every, f"keep_every {c.keep_every} is no multiple of save_every "
                                      f"{c.save_every}: those steps have no checkpoint"),
        (local % c.tp, f"tp {c.tp} does not divide the {local} processes of a node: a sampler stays inside "
                       "a node"),
        (c.reference and not c.beta, f"reference {c.reference} is given, but beta is 0 and it would not be "
                                     "used: set beta too"),
    ):
        if invalid:
            raise UserError(message)
    choose_rewards(config.reward, reward_file)


# ---------------------------------------------------------------------- update


def make_optimizer(model, config: Config) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95),
                             weight_decay=config.weight_decay, fused=True)


def learning_rate(step: int, config: Config) -> float:
    """Linear warm-up, then constant."""
    return config.lr * min(1.0, step / max(1, config.warmup))


def logprobs(model, batch: grpo.Batch, config: Config, n_valid: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(logp_N, entropy_N) of a micro-batch's trained tokens at the sampling temperature."""
    hidden_TC = model(batch.tokens_T, batch.attention)
    return linear_logprob(hidden_TC[batch.mask_T], model.head_weight, batch.targets_T[batch.mask_T],
                          config.temperature, n_valid=n_valid)


def backward(model, reference, batch: grpo.Batch, old_N: torch.Tensor | None, count: dict[str, int],
             config: Config, n_valid: int, clock: run.Clock) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Accumulates the gradient of one micro-batch. Returns (sums over its tokens, [|logprob gap|, trainer's
    logprob and entropy of each token]).

    old_N: the trainer's logprobs under the policy that sampled; None if that is the current policy.
    count: trained samples and tokens of the whole minibatch, over all ranks.
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
    gap_N, entropy_N = (old_N - rollout_N).abs(), entropy_N.detach()
    along = grpo.along(batch, config.max_new_tokens, entropy_N, gap_N, seen.pop("clipped_N"),
                       batch.advantage_T[batch.mask_T].abs())
    sums |= seen | grpo.mismatch(old_N, rollout_N) | {"loss": loss.detach(), "entropy": entropy_N.sum()}
    return {name: value.item() for name, value in sums.items()} | along, [gap_N, old_N, entropy_N]


@dataclass(frozen=True)
class Update:
    """Result of a step's optimiser steps."""

    metrics: dict[str, float]  # over all samples
    gap_N: list[float | None]  # mean |logprob gap| of each sample; None: not trained
    applied: list[bool | None]  # per optimiser step; False: skipped, None: all of its samples are masked
    skipped: list[grpo.Sample]  # samples of skipped optimiser steps
    tokens: dict[int, list]  # trainer's [logp_N, entropy_N] of this rank's samples, where they are asked for

    def skipped_in_a_row(self, before: int) -> int:
        """Skipped optimiser steps since the last applied one, `before` of them in earlier steps."""
        for applied in self.applied:
            before = before if applied is None else 0 if applied else before + 1
        return before


def update(model, reference, optimizer, samples: list[grpo.Sample], parts: list[list[int]], config: Config,
           n_valid: int, world, clock: run.Clock, keep_tokens: bool = False) -> Update:
    """Trains on the samples of all ranks, with one optimiser step for each part (indices of samples).

    Samples are rebalanced across ranks by FLOPs. An optimiser step is skipped if the gradient is not finite
    or its norm exceeds skip_grad. Raises Stopped on all ranks, but only before the first change of the
    weights.
    """
    lengths = [len(s.prompt_ids) + len(s.token_ids) for s in samples]
    flops = [n * model.config.flops_per_token(n // 2) for n in lengths]
    plans = [grpo.pack(part, lengths, flops, config.micro_batch_tokens, world.size) for part in parts]
    balance = grpo.balance(sum(plans, []), lengths, flops, config.micro_batch_tokens)
    plans = [[micro_batch[world.rank] for micro_batch in plan] for plan in plans]
    counts = [{"samples": len(part), "tokens": sum(len(samples[i].token_ids) for i in part)}
              for part in parts]
    old = {}  # logprobs of each sample before the first optimiser step, if there are several
    for micro_batch in sum(plans, []) if len(plans) > 1 else []:
        distributed.check_stop(world)
        batch = grpo.collate([samples[i] for i in micro_batch], world.device)
        with torch.no_grad(), clock("logprob"):
            old |= zip(micro_batch, logprobs(model, batch, config, n_valid)[0].split(batch.lengths))

    sums = dict.fromkeys(("loss", "clipped", "entropy", "gap/mean", "gap/k3", "kl", "capped",
                          *range(grpo.ALONG)), 0.0)
    gap_max, gaps, norms, applied, kept = 0.0, dict.fromkeys(range(len(samples)), 0.0), [], [], {}
    for plan, count in zip(plans, counts):
        if not count["tokens"]:
            applied.append(None)
            continue
        for micro_batch in tracked(plan, f"step {clock.step}: update", world.main):
            if True not in applied:
                distributed.check_stop(world)
            if config.replicate > 1:  # reduce over replicas only once
                model.set_requires_all_reduce(micro_batch is plan[-1])
            batch = grpo.collate([samples[i] for i in micro_batch], world.device)
            old_N = torch.cat([old[i] for i in micro_batch]) if old and micro_batch else None
            seen, values = backward(model, reference, batch, old_N, count, config, n_valid, clock)
            gap_max = max(gap_max, seen.pop("gap/max"))
            sums |= {name: sums[name] + value for name, value in seen.items()}
            for i, gap, *rest in zip(micro_batch, *(x.split(batch.lengths) for x in values)):
                gaps[i] = gap.mean().item()
                kept |= {i: [x.cpu() for x in rest]} if keep_tokens else {}
        with clock("step"):
            norms.append(parallel.clip_grad_(model, config.clip_grad))
            applied.append(math.isfinite(norms[-1]) and not 0 < config.skip_grad < norms[-1])
            if applied[-1]:
                optimizer.step()
            optimizer.zero_grad()
    sums, gaps = distributed.total(sums, world), distributed.total(gaps, world)  # of each gap one rank knows
    tokens = max(1, sum(count["tokens"] for count in counts))
    metrics = {"loss": sums["loss"] / max(1, len(norms)), "grad_norm": sum(norms) / max(1, len(norms)),
               "skipped_updates": len(applied) - applied.count(True),
               "clip_share": sums["clipped"] / tokens, "entropy": sums["entropy"] / tokens,
               "gap/mean": sums["gap/mean"] / tokens, "gap/k3": sums["gap/k3"] / tokens,
               **distributed.largest({"gap/max": gap_max}, world), **balance, **grpo.along_metrics(sums)}
    if reference:
        parallel.reshard(reference)
        metrics["kl"] = sums["kl"] / tokens
    if config.tis_cap:
        metrics["tis_capped"] = sums["capped"] / tokens
    return Update(metrics, [gaps[i] if s.trained else None for i, s in enumerate(samples)], applied,
                  [samples[i] for part, yes in zip(parts, applied) if yes is False for i in part], kept)


# ---------------------------------------------------------------------- the run


def train(config: Config, clock: run.Clock | None = None, watch: Watch | None = None):
    clock = clock or run.Clock()
    world = distributed.setup(config.device, config.timeout, watch, config.replicate)
    with distributed.raise_on_all_ranks(world):
        check(config, world)
        rewards, inputs = choose_rewards(config.reward, reward_file), run.read_inputs(config, world)
        rollout.check_rewards(rewards, config, inputs.prompts, inputs.tokenizer)
    names = [reward.name for reward in rewards]
    folder, newest = run.open_run(config, inputs, world)
    log = run.Log(folder, config, names, clock, world)
    saved = newest[1]["step"] if newest else 0  # step of the newest checkpoint
    if saved >= config.steps and not log.evaluation_due(saved):
        if world.main:
            print(f"{folder} has finished its {saved} steps; raise --steps, or choose another run_dir")
        return
    model = parallel.load_sharded(inputs.model, world)
    model.recompute, model.offload_activations = config.recompute, config.offload_activations
    reference = parallel.load_sharded(inputs.reference, world) if config.beta else None
    optimizer = make_optimizer(model, config)
    if newest:
        checkpoints.load(newest[0], model, optimizer)
    if config.offload_optimizer:
        offload.offload_(optimizer)
    rollout.prepare_rewards(rewards, config, world)
    sampler = rollout.make_sampler(model.config, inputs.tokenizer, config, world)
    parallel.publish(model, sampler.model)
    saver = Checkpoints(folder, model, optimizer, saved, config, inputs.record, run.code_hash(), clock, world)
    log.start(model, inputs, saved)

    def evaluate(step: int):
        if log.evaluation_due(step):
            log.evaluation(step, *rollout.evaluate(step, inputs.eval_prompts, rewards, sampler, config, clock,
                                                   log, world))

    done, skipped = saved, 0  # last step with a line in the log; updates skipped since the last one taken
    try:
        evaluate(done)
        for step in range(done + 1, config.steps + 1):
            clock.begin(step)
            prompts = prompt_data.batch(inputs.prompts, config.prompts_per_step, config.seed, step)
            local = rollout.sample_and_score(sampler, prompts, rewards, config.group_size, step,
                                             f"step {step}", rollout.lengths, config, clock, log, world)
            groups = rollout.all_gather(local, world)
            advantage_BG, per_reward_BGR, stats = rollout.combine_advantages(groups.rewards_BGR, rewards,
                                                                             config)
            stats |= rollout.summarise(groups, prompts, rewards)
            stats |= {"step": step, "lr": learning_rate(step, config)}
            for parameters in optimizer.param_groups:
                parameters["lr"] = stats["lr"]
            samples = rollout.training_samples(groups, advantage_BG, config)
            keep_tokens = bool(config.token_stats_every) and step % config.token_stats_every == 0
            with replica.released(sampler.model), clock("update"):  # its memory is the update's
                updated = update(model, reference, optimizer, samples,
                                 grpo.minibatches(samples, config.updates_per_batch), config,
                                 inputs.tokenizer.n_valid, world, clock, keep_tokens)
            with clock("publish"):
                stats["weights/fingerprint"] = parallel.publish(model, sampler.model)
            stats |= updated.metrics | run.costs(clock, groups, world)
            log.step(stats, rollout.records(
                groups, prompts, rewards, advantage=advantage_BG.flatten().tolist(), gap_mean=updated.gap_N,
                advantages=[dict(zip(names, row)) for row in per_reward_BGR.flatten(0, 1).tolist()]),
                rollout.token_stats(groups, updated.tokens, world) if keep_tokens else {})
            done, skipped = step, updated.skipped_in_a_row(skipped)
            log.bad_batch(step, updated.skipped)
            if skipped >= config.max_skipped:
                raise UserError(f"{skipped} updates in a row were skipped: look at {folder}/bad_batches, "
                                f"rewards and lr; the same command goes on after step {saver.saved}")
            if saver.due(step) and not skipped:
                saver.save(step)
            evaluate(step)
    except (Stopped, RewardError) as e:  # weights are those of the last step in the log
        if watch:
            watch.noticed = True
        if done > saver.saved and not skipped:
            saver.save(done)
        log.reward_error(getattr(e, "details", ""))
        if isinstance(e, Stopped):
            log.stopped(e, saver.saved)
        raise
    log.finish()


@options.command
def main():
    run.watched(lambda clock, watch: train(parse(sys.argv[1:]), clock, watch))


if __name__ == "__main__":
    main()
