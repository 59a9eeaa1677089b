"""What the console shows: progress of a phase, a line for each step, warnings, and a summary at the end."""

import shutil
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from lib.files import read_jsonl
from lib.options import Field


class Progress:
    """Progress of a phase with its rate and the estimated time left: on a terminal one line that is
    overwritten, elsewhere nothing."""
    def __init__(self, label: str, total: int, show: bool, what: str = "samples"):
        self.label, self.total, self.show, self.what = label, total, show and sys.stderr.isatty(), what
        self.start = self.last = time.perf_counter()

    def update(self, stats):
        now = time.perf_counter()
        if not self.show or now - self.last < 0.2:
            return
        self.last, seconds = now, now - self.start
        line = f"{self.label}: {stats.finished}/{self.total} {self.what}"
        if stats.new_tokens:
            line += f", {stats.new_tokens / seconds:,.0f} tok/s on this rank"
        if stats.finished:
            left = seconds * (self.total - stats.finished) / stats.finished
            line += f", {timedelta(seconds=round(left))} left"
        print(f"\r{line[:shutil.get_terminal_size().columns - 1]}\033[K", end="", file=sys.stderr, flush=True)

    def close(self):
        if self.show:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def tracked(items: list, label: str, show: bool) -> Iterator:
    """The items of a phase, one after the other, with its progress."""
    progress = Progress(label, len(items), show, "micro-batches")
    try:
        for i, item in enumerate(items, 1):
            yield item
            progress.update(SimpleNamespace(finished=i, new_tokens=0))
    finally:
        progress.close()


COLUMNS = 100


def describe(metrics: dict, steps: int, names: list[str], begun: list[float]) -> str:
    """The console line of a step, at most COLUMNS wide: names of rewards are cut to what there is room for.
    begun: of the Clock, for the estimated time left."""
    now, done = time.perf_counter(), len(begun) - 1
    left = (now - begun[done > 0]) / max(1, done) * (steps - metrics["step"])
    start = f"step {metrics['step']:>{len(str(steps))}}/{steps}"
    rest = (f"{metrics['length/answer_words']:,.0f} words {metrics['length/in_range']:.0%} in range "
            f"{metrics['truncated']:.0%} cut  {metrics['time/total']:,.0f}s "
            f"{left // 3600:.0f}:{left // 60 % 60:02.0f} left")
    values = [f"{metrics[f'reward/{name}']:.2f}" for name in names]
    room = (COLUMNS - len(start) - len(rest) - 3) // len(names) - max(map(len, values)) - 2
    rewards = " ".join(f"{name[:max(1, room)]} {value}" for name, value in zip(names, values))
    return f"{start}  {rewards}  {rest}"[:COLUMNS]


GAP_LIMIT = 0.01  # gap/k3 that is warned of: 100 nats over 10,000 tokens; a bf16 sampler of the default: 1e-5
DOMINANCE, COLLAPSE, WAIT = 0.8, 0.2, 0.5  # share of advantages, of the first step's entropy, of timeout


def warnings(metrics: dict, config, names: list[str], first: dict) -> Iterator[str]:
    """Warnings that a step's metrics call for, each with a remedy. first: metrics of the run's first step."""
    if metrics["truncated"] > 0.25:
        yield (f"warning: {metrics['truncated']:.0%} of the samples were cut at max_new_tokens "
               f"{config.max_new_tokens}: raise it, or ask for shorter texts")
    dead = {name: metrics[f"dead_groups/{name}"] for name in names}
    if dead := [f"{name} in {n}" for name, n in dead.items() if 2 * n > config.prompts_per_step]:
        yield (f"warning: all samples of a group earned the same, {', '.join(dead)} of the "
               f"{config.prompts_per_step} groups: raise group_size or temperature, or choose prompts that "
               "are neither too easy nor too hard")
    for name in names:
        if len(names) > 1 and metrics[f"dominance/{name}"] > DOMINANCE:
            yield (f"warning: reward {name} is {metrics[f'dominance/{name}']:.0%} of the advantages: lower "
                   "its weight in rewards.py, or set advantage to per_reward")
    if metrics["gap/k3"] > GAP_LIMIT:
        yield (f"warning: the sampler drifts from the trainer: gap/k3 {metrics['gap/k3']:.3g} is above "
               f"{GAP_LIMIT} nats a token: set sampler_dtype to float32, and keep tis_cap above 0")
    if metrics["entropy"] < COLLAPSE * first["entropy"]:
        yield (f"warning: entropy fell from {first['entropy']:.2g} to {metrics['entropy']:.2g}: lower lr, or "
               "raise temperature or eps_high")
    if metrics["time/idle"] > WAIT * config.timeout:
        yield (f"warning: ranks waited {metrics['time/idle']:,.0f} s for the last sample, and timeout is "
               f"{config.timeout}: raise timeout, or lower max_new_tokens")


RISES = ("length/answer_words", "length/in_range", "truncated", "entropy", "gap/mean", "grad_norm")


def summary(folder: Path, names: list[str]) -> Iterator[str]:
    """Lines at the end of a run: the first and the last fifth of the steps, and three samples of the last."""
    steps = [m for m in read_jsonl(folder / "metrics.jsonl", step=Field(int, 0)) if "loss" in m]
    fifth = max(1, len(steps) // 5)
    for name in [*(f"reward/{name}" for name in names), *RISES]:
        a, b = (float(np.mean([m[name] for m in part if m[name] is not None] or [np.nan]))
                for part in (steps[:fifth], steps[-fifth:]))
        yield f"{name:24}{a:10.4g} ->{b:10.4g}  {'rose' if b > a else 'fell' if b < a else ''}".rstrip()
    for file in sorted((folder / "rollouts").glob("step_*.jsonl"))[-1:]:
        ranked = sorted(enumerate(read_jsonl(file), 1), key=lambda x: -x[1]["advantage"])
        yield f"samples of {file}, best, median and worst advantage:"
        for line, sample in (ranked[0], ranked[len(ranked) // 2], ranked[-1]):
            text = " ".join(sample["text"].split())
            yield f"line {line}, {sample['advantage']:+.2f}: {text}"[:COLUMNS]
    yield f"all of it as a page: python -m scripts.report {folder}"
