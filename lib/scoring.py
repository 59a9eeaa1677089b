"""Calling the reward functions of a table: inline, or in threads; and what a user's function may do wrong.

`lib` knows no table of its own: `choose_rewards` is given the module that holds REWARDS, TRANSFORMS and
REQUIRED, such as rewards.
"""

import math
import numbers
import queue
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.endpoint import Pool
from lib.options import UserError, shown

LARGEST = float(np.finfo(np.float32).max)  # reward: its square and their sums are finite in fp64
MISTAKES = (NameError, ImportError)  # of a remote reward: errors in its code, whatever a server answers
MISTAKES_OF_ALL = (AttributeError, TypeError)  # perhaps from an odd answer, unless every call raises one


class RewardError(UserError):
    """A reward that raised or returned an invalid value; the message names it, the prompt and the line."""
    details = ""  # the traceback


@dataclass(frozen=True)
class Reward:
    """An entry of rewards.REWARDS, with those of TRANSFORMS and REQUIRED."""

    name: str
    function: Callable
    weight: float
    transform: Callable | None = None  # of the raw value, for the advantage
    required: float = -math.inf  # least raw value, see grpo.require

    @property
    def batched(self) -> bool:
        return getattr(self.function, "batched", False)

    @property
    def remote(self) -> bool:
        return hasattr(self.function, "remote")

    @property
    def needs_model(self) -> bool:
        """Whether it asks a model or a server."""
        return self.batched or self.remote or hasattr(self.function, "prepare")

    def transformed(self, value: float) -> float:
        """The value that enters the advantage for a raw value; NaN (missing) and LOWEST stay as they are.
        Raises RewardError."""
        if not self.transform or not math.isfinite(value):
            return value
        try:
            result = self.transform(value)
        except Exception as e:  # whatever a user's function raises
            raise RewardError(f"the transform of reward {self.name!r} raised {describe(e)}, on {value:g}: "
                              "repair it in rewards.TRANSFORMS") from e
        if not is_number(result):
            raise RewardError(f"the transform of reward {self.name!r} returned {result!r} for {value:g}, not "
                              "a finite number: repair it in rewards.TRANSFORMS")
        return float(result)


def choose_rewards(option: str, tables) -> list[Reward]:
    """The rewards that the option `reward` names; if empty, those that have a weight or are required. Raises
    UserError."""
    table, transforms, required = tables.REWARDS, tables.TRANSFORMS, tables.REQUIRED
    for title, valid, kind in (("REWARDS", is_entry, "(function, weight)"),
                               ("TRANSFORMS", callable, "a function"), ("REQUIRED", is_number, "a number")):
        for name, entry in getattr(tables, title).items():
            if not valid(entry):
                raise UserError(f"rewards.{title} has {entry!r} for {name!r}: it must be {kind}")
            if name not in table:
                raise UserError(f"rewards.{title} has {name!r}, which is not in rewards.REWARDS")
    names = [name.strip() for name in option.split(",") if name.strip()]
    names = names or [name for name, (_, weight) in table.items() if weight or name in required]
    for name in names:
        if name not in table:
            raise UserError(f"reward {shown(name)} is not in rewards.REWARDS, which has {', '.join(table)}")
    if len(set(names)) < len(names):
        raise UserError(f"reward names one twice: {','.join(names)}; weigh it in rewards.REWARDS instead")
    if not (total := sum(table[name][1] for name in names)) > 0:
        raise UserError(f"the rewards {', '.join(names)} have weight {total:g} together: give them "
                        "more in rewards.REWARDS, and turn a reward's sign instead of its weight's")
    if left_out := [name for name in required if name not in names]:
        raise UserError(f"rewards.REQUIRED has {left_out[0]!r}, which --reward leaves out: name it too, or "
                        "take it out of REQUIRED")
    return [Reward(name, *table[name], transforms.get(name), required.get(name, -math.inf)) for name in names]


def score(reward: Reward, completions: list, prompts: list) -> list[float]:
    """The reward of each completion, NaN where it is missing. Raises RewardError."""
    try:
        values = reward.function(completions, prompts) if reward.batched else map(
            reward.function, completions, prompts)
        values = list(values)
    except Exception as e:  # whatever a user's function raises
        raise raised(reward, e, prompts[0]) from e
    if len(values) != len(completions):
        raise RewardError(f"reward {reward.name!r} returned {len(values)} values for {len(completions)} "
                          "completions: it must return one for each, None where it cannot be computed")
    return checked(reward, values, prompts)


def raised(reward: Reward, e: BaseException, prompt) -> RewardError:
    error = RewardError(f"reward {reward.name!r} raised {describe(e)}, on an answer to prompt {prompt.id!r}: "
                        "repair it, or leave it out with --reward")
    error.details = "".join(traceback.format_exception(e))
    return error


def describe(e: BaseException) -> str:
    """The exception, and where in the user's file: the one that the first frame outside of lib is in."""
    frames, message = traceback.extract_tb(e.__traceback__), " ".join(str(e).split())
    users = [f for f in frames if Path(f.filename).parent != Path(__file__).parent] or frames
    at = [f for f in users if f.filename == users[0].filename][-1]
    return f"{type(e).__name__} ({message[:200]}) in {Path(at.filename).name}, line {at.lineno}"


def checked(reward: Reward, values: list, prompts: list) -> list[float]:
    """What a reward returned, as numbers, NaN for None. Raises RewardError for anything else."""
    for value, prompt in zip(values, prompts):
        lowest = isinstance(value, numbers.Real) and value == -math.inf
        if value is not None and not lowest and not is_number(value):
            raise RewardError(f"reward {reward.name!r} returned {value!r} for an answer to prompt "
                              f"{prompt.id!r}: it must be a finite number, or None if it cannot be computed")
    return [math.nan if value is None else float(value) for value in values]


def is_entry(value) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and callable(value[0]) and is_number(value[1])


def is_number(value) -> bool:
    return isinstance(value, (numbers.Real, np.bool_)) and bool(abs(value) <= LARGEST)


class Remote(Pool):
    """The calls of one remote reward in one step."""

    def __init__(self, reward: Reward):
        threads, self.patience = reward.function.remote
        super().__init__(reward.function, threads)
        self.reward = reward
        self.values, self.errors, self.waiting, self.paused = {}, {}, 0, -math.inf
        self.last = time.monotonic()  # time of the last answer

    def submit(self, i: int, completion, prompt):
        """Returns at once; i is the sample's place in `collect`."""
        self.waiting += 1
        super().submit(i, completion, prompt)

    def wait(self, since: float | None, interrupt=lambda: None, seconds: float = 5.0) -> str | None:
        """Returns None once every sample is back, or given up `patience` seconds after `since`, a
        time.monotonic() (None: the last answer); else, after `seconds`, the servers that are down, empty if
        they are only slow. `interrupt` is called meanwhile, and may raise."""
        until = time.monotonic() + seconds
        while self.waiting:
            interrupt()
            now, down = time.monotonic(), getattr(self.call, "down", str)()
            self.paused = now if down else self.paused
            left = max(self.last if since is None else since, self.paused) + self.patience - now
            try:
                i, value, error = self.done.get(timeout=max(0.0, min(1.0, left, until - now)))
            except queue.Empty:
                if left <= 0:
                    break
                if now >= until:
                    return down
                continue
            self.waiting, self.last = self.waiting - 1, time.monotonic()
            if error is None:
                self.values[i] = value
            else:
                self.errors[i] = error
        return None

    def collect(self, prompts: list) -> tuple[list[float], list[str]]:
        """(scores, NaN where missing; the reason of each that failed), of what `wait` has seen. prompts: one
        a sample, all submitted. Raises RewardError as `score` does."""
        for i, e in self.errors.items():
            if isinstance(e, MISTAKES) or isinstance(e, MISTAKES_OF_ALL) and not self.values:
                raise raised(self.reward, e, prompts[i]) from e
        reasons = [describe(e) for e in self.errors.values()]
        reasons += [f"not back {self.patience:g} s after the last sample"] * self.waiting
        return checked(self.reward, [self.values.get(i) for i in range(len(prompts))], prompts), reasons
