"""Scores the samples of a run, finished or not, with an edited rewards.py. Nothing is trained.

    python -m scripts.rescore runs/NAME [--rewards FILE] [--reward NAMES] [--steps 10:20]

Each sample of rollouts/step_*.jsonl gets the rewards and the advantage that it would have had with --rewards
(by default the rewards.py of this folder) and the run's other options, beside what it got: rank correlations,
advantages that change, the ten samples that change most. --reward chooses as in training. Rewards that ask a
model or a server keep the run's values, unless --reward names them.
Rollouts hold token ids and logprobs for the steps of `token_stats_every` alone: rewards that read them are
computed for those. Writes RUN/rescore.json and ends with one JSON line.
"""

import functools
import json
import multiprocessing
import os
import runpy
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.numpy import load_file

import grpo
import rewards
import rollout
from data import prompts as prompt_data
from lib import distributed, options, scoring
from lib.files import ROOT, locate, read_jsonl, replace
from lib.options import Field, UserError
from sampler import Completion
from text import structure
from train import Config, parse

MOST = 10  # samples that are shown
FIELDS = {"prompt_id": Field(str), "sample": Field(int), "prompt": Field(str), "text": Field(str),
          "tokens": Field(int, 0), "finish_reason": Field(str), "rewards": Field(dict),
          "advantage": Field(float)}


@dataclass(frozen=True)
class Options:
    run: str = ""  # its folder
    rewards: str = str(ROOT / "rewards.py")  # an edited copy of rewards.py
    reward: str = ""  # comma-separated names out of its REWARDS; empty: as the run has it
    steps: str = ":"  # A:B, both included; A: or :B


class UnknownTokens(int):
    """Stands for token ids or logprobs: only their number is known."""

    def __len__(self) -> int:
        return int(self)


# ---------------------------------------------------------------------- reading


def load_tables(file: Path):
    """The names of a file such as rewards.py. Raises UserError."""
    if file.resolve() == ROOT / "rewards.py":
        return rewards
    try:
        tables = SimpleNamespace(**runpy.run_path(str(file)))
        tables.REWARDS, tables.TRANSFORMS, tables.REQUIRED  # noqa: B018 (an AttributeError names it)
        return tables
    except Exception as e:  # whatever the file does
        raise UserError(f"--rewards {file} cannot be used ({type(e).__name__}: {e}): give an edited copy "
                        "of rewards.py") from None


@functools.cache  # before processes fork: functions of an edited file cannot be sent to them
def load(args: Options) -> tuple[Config, dict[str, prompt_data.Prompt], list[scoring.Reward]]:
    """(the run's options, its prompts by id, the rewards to compute). Raises UserError."""
    config = parse(["--config", str(Path(args.run, "config.json"))])
    prompts, _ = prompt_data.read(locate(config.prompts), config.prompt_style, config.max_new_tokens, True)
    chosen = scoring.choose_rewards(args.reward or config.reward, load_tables(Path(args.rewards)))
    return config, {prompt.id: prompt for prompt in prompts}, chosen


def choose_steps(folder: Path, steps: str) -> list[Path]:
    """The rollouts of the steps a:b, both included."""
    try:
        low, high = (int(x or end) for x, end in zip(steps.split(":"), (0, sys.maxsize), strict=True))
    except ValueError:
        raise UserError(f"--steps must be A:B, A: or :B, not {steps!r}") from None
    files = [f for f in sorted((folder / "rollouts").glob("step_*.jsonl")) if low <= int(f.stem[5:]) <= high]
    if not files:
        raise UserError(f"{folder}/rollouts has no step_*.jsonl" + f" of steps {steps}" * (steps != ":"))
    return files


def read_samples(file: Path, config: Config, prompts: dict) -> tuple[list[dict], list, list]:
    """(records, completions, prompts) of a step. Raises UserError, also where it is still being written."""
    records = read_jsonl(file, "leave it out with --steps", **FIELDS)
    if len(records) < (samples := config.prompts_per_step * config.group_size):
        raise UserError(f"{file} has {len(records)} of {samples} samples: leave it out with --steps")
    asked = [prompts.get(r["prompt_id"]) for r in records]
    for record, prompt in zip(records, asked):
        if prompt is None or prompt.query not in record["prompt"]:
            raise UserError(f"{file}: prompt {record['prompt_id']!r} is not, or not like this, in "
                            f"{config.prompts}: put back the file that the run had")
    ids = logps = [UnknownTokens(r["tokens"]) for r in records]
    if (recorded := file.with_suffix(".safetensors")).exists():
        tokens = load_file(recorded)
        ids, logps = ([x.tolist() for x in np.split(tokens[name], tokens["offsets"][1:-1])]
                      for name in ("ids", "sampler_logp"))
    completions = [Completion(0, r["sample"], *tokens, r["text"], r["finish_reason"], config.max_new_tokens)
                   for r, *tokens in zip(records, ids, logps)]
    return records, completions, asked


# ---------------------------------------------------------------------- scoring


def values(reward: scoring.Reward, completions: list, prompts: list) -> list[float]:
    """The reward of each sample, NaN where it is missing or, if remote, failed. Raises RewardError."""
    if reward.batched:
        return scoring.score(reward, completions, prompts)
    if not reward.remote:
        return [scoring.score(reward, [c], [p])[0] for c, p in zip(completions, prompts)]
    with scoring.Remote(reward) as pool:
        for i, sample in enumerate(zip(completions, prompts)):
            pool.submit(i, *sample)
        while (down := pool.wait(None, seconds=30)) is not None:  # all are asked at once
            if down:
                print(f"paused: {reward.name} waits for its scores, and no server answers: {down}",
                      file=sys.stderr, flush=True)
        got, errors = pool.collect(prompts)
    if errors:
        reason, count = Counter(errors).most_common(1)[0]
        print(f"warning: reward {reward.name!r} is missing for {len(errors)} samples, because it failed: "
              f"{count} x {reason}", file=sys.stderr, flush=True)
    return got


def rescore(args: Options, file: Path) -> tuple:
    """One step of S samples with other rewards: (old_SR, new_SR, old_S, new_S, per_reward_BGR, changes), that
    is rewards, NaN where missing, advantages, and the MOST samples that change most. Raises UserError."""
    config, prompts, chosen = load(args)
    names = [reward.name for reward in chosen]
    kept = [reward.name for reward in chosen if reward.needs_model and not args.reward]  # the run's values
    records, completions, asked = read_samples(file, config, prompts)

    def stored(name: str) -> list[float]:
        return [np.nan if (value := r["rewards"].get(name)) is None else value for r in records]

    for name in kept:
        if name not in records[0]["rewards"]:
            raise UserError(f"reward {name!r} asks a model or a server, and {file} has no values of it: "
                            f"pass --reward {','.join(names)} to ask now")
    old_SR = np.array([stored(name) for name in names]).T
    new_SR = np.array([stored(r.name) if r.name in kept else values(r, completions, asked) for r in chosen]).T
    raw_BGR = torch.tensor(new_SR.reshape(-1, config.group_size, len(chosen)))
    new_SR = grpo.place_lowest(raw_BGR).flatten(0, 1).numpy()
    advantage_BG, per_reward_BGR, _ = rollout.combine_advantages(raw_BGR, chosen, config)
    old_S, new_S = np.array([r["advantage"] for r in records]), advantage_BG.flatten().numpy()

    def change(i: int) -> dict:
        return {"step": int(file.stem[5:]), "prompt_id": asked[i].id, "sample": records[i]["sample"],
                "advantage": [float(old_S[i]), float(new_S[i])],
                "rewards": {name: [None if x != x else float(x) for x in (old_SR[i, r], new_SR[i, r])]
                            for r, name in enumerate(names)},
                "query": asked[i].query, "text": records[i]["text"]}

    most = [i for i in np.argsort(-abs(new_S - old_S), kind="stable")[:MOST] if new_S[i] != old_S[i]]
    return old_SR, new_SR, old_S, new_S, per_reward_BGR.numpy(), [change(i) for i in most]


# ---------------------------------------------------------------------- comparing


def ranks(values: np.ndarray) -> np.ndarray:
    """1 for the least; equal values share the mean of their ranks."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Correlation of ranks, over the pairs that are both there; None where either has no spread."""
    there = ~(np.isnan(a) | np.isnan(b))
    a, b = ranks(a[there]), ranks(b[there])
    return float(np.corrcoef(a, b)[0, 1]) if len({*a}) > 1 < len({*b}) else None


def compare(steps: list[tuple], chosen: list[scoring.Reward], config: Config) -> dict:
    """The comparison over all steps, as `rescore` returns them."""
    *arrays, changes = zip(*steps)
    old_SR, new_SR, old_S, new_S, per_reward_BGR = map(np.concatenate, arrays)
    names, weights_R = [r.name for r in chosen], torch.tensor([r.weight for r in chosen])

    def mean(values: np.ndarray) -> float | None:
        return None if np.isnan(values).all() else float(np.nanmean(values))

    return {
        "samples": len(old_S),
        "rewards": {name: {"old": mean(old), "new": mean(new), "spearman": spearman(old, new),
                           "changed": mean(np.where(np.isnan(old).all(), np.nan, ~np.isclose(
                               old, new, 1e-6, 1e-6, equal_nan=True))),
                           "missing": int(np.isnan(new).sum())}
                    for name, old, new in zip(names, old_SR.T, new_SR.T)},
        "advantage": {"spearman": spearman(old_S, new_S),
                      "other_sign": float((np.sign(old_S) != np.sign(new_S)).mean()),
                      "mean_change": float(abs(new_S - old_S).mean())},
        "conflicts": grpo.conflicts(torch.from_numpy(per_reward_BGR), weights_R, names, config.advantage),
        "most_changed": sorted(sum(changes, []),
                               key=lambda c: -abs(c["advantage"][1] - c["advantage"][0]))[:MOST]}


def excerpt(text: str) -> str:
    """Its answer body, or all of it, on one line; the middle left out."""
    text = " ".join((structure(text)[2] or text).split())
    return text if len(text) <= 230 else f"{text[:150]} [...] {text[-80:]}"


def show(result: dict) -> str:
    """As lines for a terminal."""

    def number(x: float | None) -> str:
        return "-" if x is None else f"{x:.3f}"

    lines = [f"{'reward':16}{'old':>9}{'new':>9}{'rank corr.':>12}{'changed':>9}{'missing':>9}"]
    lines += [f"{name:16}{number(r['old']):>9}{number(r['new']):>9}{number(r['spearman']):>12}"
              f"{number(r['changed']):>9}{r['missing']:>9}" for name, r in result["rewards"].items()]
    a = result["advantage"]
    lines += [f"advantage: rank correlation {number(a['spearman'])}, another sign for {a['other_sign']:.1%}, "
              f"mean |change| {a['mean_change']:.3f}"]
    for kind in ("dominance", "correlation", "disagreement"):
        lines += [f"{kind}: " + "  ".join(f"{name.partition('/')[2]} {x:.2f}" for name, x in
                                          result["conflicts"].items() if name.startswith(kind))]
    for i, c in enumerate(result["most_changed"], 1):
        lines += ["", f"{i}. step {c['step']}, prompt {c['prompt_id']}, sample {c['sample']}: advantage "
                  f"{c['advantage'][0]:+.2f} -> {c['advantage'][1]:+.2f};  "
                  + "  ".join(f"{name} {number(old)} -> {number(new)}"
                              for name, (old, new) in c["rewards"].items()),
                  f"   {excerpt(c['query'])}", f"   {excerpt(c['text'])}"]
    return "\n".join(lines if result["most_changed"] else [*lines, "no advantage changes"])


@options.command
def main():
    args, start = options.parse(Options, sys.argv[1:], __doc__, "run"), time.perf_counter()
    try:
        config, _, chosen = load(args)
        files = choose_steps(Path(args.run), args.steps)
        asking = [reward for reward in chosen if reward.needs_model and args.reward]
        if asking:
            world = distributed.setup()
            rollout.check_rewards(asking, config, [], None)
            rollout.prepare_rewards(asking, config, world)
            steps = [rescore(args, file) for file in files]
        else:  # rules alone: each core takes steps
            cores = min(len(files), os.cpu_count())
            with ProcessPoolExecutor(cores, multiprocessing.get_context("fork"), torch.set_num_threads,
                                     (1,)) as pool:
                steps = list(pool.map(functools.partial(rescore, args), files))
        result = {"run": args.run, "rewards_file": args.rewards, "names": [r.name for r in chosen],
                  "steps": len(steps)} | compare(steps, chosen, config)
        result["seconds"] = round(time.perf_counter() - start, 2)
        replace(Path(args.run, "rescore.json"), json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    finally:
        distributed.close()
    print(f"{args.run}: {result['samples']:,} samples of {len(steps)} steps in {result['seconds']:.1f} s\n"
          f"{show(result)}\n\nall of it: {args.run}/rescore.json")
    print(json.dumps({name: x for name, x in result.items() if name != "most_changed"}))


if __name__ == "__main__":
    main()
