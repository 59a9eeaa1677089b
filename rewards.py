"""What is rewarded. An ablation edits this file: write a function, add it to REWARDS at the end.

A reward is called as `reward(completion, prompt) -> float | None` with the sampler's Completion and the
Prompt it answers. None means that it could not be computed: the reward is then missing for this sample, which
is not the same as 0. LOWEST means that there is nothing to judge, and that this is worse than anything that
can be judged: see grpo.place_lowest. Each reward is normalised within its group on its own (grpo.advantages),
so its scale and offset do not matter; its weight does. A reward marked `@batched`, a model, is called with
lists, once a step. One marked `@remote` waits for a network: it is called in a thread, while other samples
decode.
"""

import math
import numbers
import os
import queue
import re
import sys
import threading
import time
import traceback
from pathlib import Path

import numpy as np

import guards
import writing
from data.prompts import frame
from endpoint import Endpoint, Unavailable
from options import ConfigError
from repeats import CJK, repetition, repetition_words
from run import locate

LATIN_WORD = re.compile(r"\b[a-zA-Z]+\b")
TAG = re.compile(r"</?(?:think|answer)>")
END_OF_TEXT = "<|endoftext|>"  # of the Qwen2.5 family: a writing model's score stands there
OVERLONG_CACHE = 0.2  # share of max_new_tokens over which `overlong` falls (DAPO: 4,096 of 20,480)
LOWEST = -math.inf
LARGEST = float(np.finfo(np.float32).max)  # reward: its square and their sums are finite in fp64

MISTAKES = (NameError, ImportError)  # of a remote reward: no server makes it raise these
MISTAKES_OF_ALL = (AttributeError, TypeError)  # these one may, by an odd answer, but hardly on all samples


class RewardError(ValueError):
    """A reward that raised, or returned what is no reward; the message names it, the prompt and the line."""


def batched(reward):
    """Marks a reward as called with a list of completions and a list of their prompts: it returns a list."""
    reward.batched = True
    return reward


def remote(reward=None, *, threads: int = 8, patience: float = 60.0):
    """Marks a reward that waits for a network, as `@remote` or `@remote(threads=..., patience=...)`.

    It is called in one of `threads` threads as soon as a sample ends, and must not use torch. Where it
    raises, or is not back `patience` seconds after the step's last sample, it is missing; but a mistake in
    the code (MISTAKES) ends the run, as in any reward. If it has an attribute `down`, as endpoint.Endpoint
    has, the run pauses while `down()` is not empty, and patience stands still.
    """
    if not (threads >= 1 and 0 <= patience <= threading.TIMEOUT_MAX):
        raise ValueError(f"@remote: threads {threads} must be at least 1, and patience {patience} finite and "
                         "not negative")

    def mark(reward):
        reward.remote = (threads, patience)
        return reward

    return mark if reward is None else mark(reward)


# ---------------------------------------------------------------------- structure


def structure(text: str, think: bool = True) -> tuple[bool, str | None, str | None]:
    """Whether the text has the asked form, its thought and its answer body: (ok, think, answer).

    The form: exactly one <think>...</think>, then exactly one <answer>...</answer>, neither empty, nothing
    but white space around and between them; with think=False the answer pair alone. The bodies are found in
    broken texts too: an answer that is never closed reaches to the end of the text. None where there is no
    such body.

    A tag is a tag wherever it stands, in a code block or between quotes too: the sampler ends a sample at
    </answer> there as well, and an exception would be a place to hide a second answer. A text about tags has
    to write them otherwise.
    """
    names, parts = TAG.findall(text), TAG.split(text)
    expected = ["<think>", "</think>"] * think + ["<answer>", "</answer>"]
    ok = names == expected and not any(map(str.strip, parts[::2])) and all(map(str.strip, parts[1::2]))
    thought, closed, _ = text.partition("<think>")[2].partition("</think>")
    answer = text.partition("<answer>")[2].partition("</answer>")[0]
    return ok, thought.strip() if closed and thought.strip() else None, answer.strip() or None


# ---------------------------------------------------------------------- length


def count_words(text: str) -> int:
    r"""Characters in U+4E00..U+9FFF plus matches of \b[a-zA-Z]+\b: the counter of the LongWriter benchmarks,
    so that scores compare.

    Its quirks are kept: "don't" counts 2, digits and accented words count 0, a Latin word glued to a CJK
    character is missed.
    """
    return len(CJK.findall(text)) + len(LATIN_WORD.findall(text))


def length_reward(words: int, lo: int, hi: int) -> float:
    """1 inside [lo, hi], falling linearly to 0 at 0 words and at Lmax = max(1.5 hi, hi + 20) (Lmax: not
    specified by the paper)."""
    if words < lo:
        return words / lo
    if words <= hi:
        return 1.0
    most = max(1.5 * hi, hi + 20)
    return max(0.0, (most - words) / (most - hi))


def length(completion, prompt) -> float | None:
    """Length of the answer body against the prompt's range. No body, or none with a word in it: 0, or a range
    that starts at 0 would pay for silence."""
    if prompt.length_range is None:
        return None
    _, _, answer = structure(completion.text)
    words = count_words(answer or "")
    return length_reward(words, *prompt.length_range) if words else 0.0


# ---------------------------------------------------------------------- format


def format_reward(completion, prompt) -> float | None:
    """Structure times non-repetition of the answer body, in [0, 1]."""
    ok, _, answer = structure(completion.text, think=prompt.style == "think")
    return 1.0 - repetition(answer) if ok else 0.0


def format_words(completion, prompt) -> float | None:
    """`format_reward` that sees copies in disguise too (repeats.repetition_words)."""
    ok, _, answer = structure(completion.text, think=prompt.style == "think")
    return 1.0 - max(repetition(answer), repetition_words(answer)) if ok else 0.0


# ---------------------------------------------------------------------- guards against hacking


def guard(check):
    """A reward out of guards.py, of the answer body; no body: 0, or silence would be clean."""
    def reward(completion, prompt) -> float | None:
        _, _, answer = structure(completion.text)
        return check(answer, prompt.query) if answer else 0.0

    return reward


def ending(completion, prompt) -> float | None:
    """guards.ending, and 0 for a sample that was cut or never closed its answer."""
    closed = completion.finish_reason != "length" and "</answer>" in completion.text
    return guard(guards.ending)(completion, prompt) if closed else 0.0


# ---------------------------------------------------------------------- writing


SERVER_TIMEOUT, SERVER_PATIENCE, SERVER_THREADS = 60.0, 120.0, 32  # seconds; calls of a rank at a time


class Writing:
    """A reward model's raw score of query and answer body. No body: LOWEST.

    Raw, because reward models of others are not centred: a sigmoid of scores about 16 with a spread of 1 is
    constant. Normalisation in the group needs no squashing. No fixed number can stand for an answer that is
    not there: 0 is the best score of a model with mean -5, and would rule the group's spread under one with
    mean 20. Missing would be no better: silence would escape this reward, and beat every answer below the
    mean.

    Where `reward_model` is the URLs of servers it is a remote reward, see endpoint.Endpoint.score.
    """

    batched = True

    def check(self, config):
        vars(self).clear()
        if "://" not in config.reward_model:
            self.read = writing.check(locate(config.reward_model))
            return
        try:
            self.servers = Endpoint(config.reward_model, SERVER_TIMEOUT, say=lambda why: None)  # the run does
            Endpoint(config.reward_model, timeout=5.0, attempts=1, say=None).score("Hello")
        except Unavailable as e:
            if os.environ.get("RANK", "0") == "0":
                print(f"warning: no server of reward_model answers yet ({e}); the run will wait for one when "
                      "its first samples are written", file=sys.stderr, flush=True)
        except ValueError as e:
            raise ConfigError(f"reward_model: {e}") from None
        self.batched, self.remote, self.down = False, (SERVER_THREADS, SERVER_PATIENCE), self.servers.down

    def prepare(self, config, world):
        if not self.batched:
            return
        self.scorer = writing.Scorer(locate(config.reward_model), self.read, config.micro_batch_tokens,
                                     world, config.offload_reward_model)

    def __call__(self, completions, prompts) -> list[float]:
        if not self.batched:
            return self.ask(completions, prompts)
        bodies = [structure(c.text)[2] for c in completions]
        scores = iter(self.scorer([(p.query, body) for p, body in zip(prompts, bodies) if body]))
        return [next(scores) if body else LOWEST for body in bodies]

    def ask(self, completion, prompt) -> float:
        body = structure(completion.text)[2]
        return self.servers.score(f"{frame(prompt.query)} {body}{END_OF_TEXT}") if body else LOWEST


# ---------------------------------------------------------------------- what is trained


def overlong(completion, prompt) -> float | None:
    """DAPO's soft penalty (arXiv 2503.14476, eq. 13): 0 up to Lmax - Lc tokens, then falling to -1 at Lmax,
    where Lmax is max_new_tokens and Lc is OVERLONG_CACHE of it."""
    if not completion.max_new_tokens:
        return None
    cache = OVERLONG_CACHE * completion.max_new_tokens
    return max(-1.0, min(0.0, (completion.max_new_tokens - cache - len(completion.token_ids)) / cache))


REWARDS = {  # name: (function, weight); advantages are averaged with weights w / sum w
    "length": (length, 1.0),
    "format": (format_reward, 1.0),
    "writing": (Writing(), 1.0),
    "overlong": (overlong, 0.0),
    "format_words": (format_words, 0.0),
    "no_stuffing": (guard(guards.stuffing), 0.0),
    "no_praise": (guard(guards.praise), 0.0),
    "no_drift": (guard(guards.language), 0.0),
    "no_loops": (guard(guards.loops), 0.0),
    "ending": (ending, 0.0),
}
TRANSFORMS = {}  # name: function of the raw value, such as math.log1p; the advantage sees what it makes
REQUIRED = {}  # name: least raw value; a sample with less gets a negative advantage, see grpo.require

# ---------------------------------------------------------------------- calling


def chosen(reward: str) -> list[str]:
    """The names that the option `reward` chooses: without any, those that have a weight or are required.
    Raises ConfigError for a malformed entry of REWARDS."""
    for name, entry in REWARDS.items():
        pair = isinstance(entry, tuple) and len(entry) == 2
        if not (pair and callable(entry[0]) and is_number(entry[1])):
            raise ConfigError(f"rewards.REWARDS has {entry!r} for {name!r}: it must be (function, "
                              "weight)")
    named = [name.strip() for name in reward.split(",") if name.strip()]
    return named or [name for name, (_, weight) in REWARDS.items() if weight or name in REQUIRED]


def check_names(names: list[str]):
    """Whether these can be trained with. Raises ConfigError."""
    for name in names:
        if name not in REWARDS:
            raise ConfigError(f"reward {name!r} is not in rewards.REWARDS, which has {', '.join(REWARDS)}")
    if len(set(names)) < len(names):
        raise ConfigError(f"reward names one twice: {','.join(names)}; weigh it in rewards.REWARDS instead")
    if not (total := sum(REWARDS[name][1] for name in names)) > 0:
        raise ConfigError(f"the rewards {', '.join(names)} have weight {total:g} together: give them "
                          "more in rewards.REWARDS, and turn a reward's sign instead of its weight's")
    for table, kind, entries in (("TRANSFORMS", "function", TRANSFORMS), ("REQUIRED", "number", REQUIRED)):
        for name, entry in entries.items():
            if name not in REWARDS:
                raise ConfigError(f"rewards.{table} has {name!r}, which is not in rewards.REWARDS")
            if not (callable(entry) if kind == "function" else is_number(entry)):
                raise ConfigError(f"rewards.{table} has {entry!r} for {name!r}, which is no {kind}")
    if left_out := [name for name in REQUIRED if name not in names]:
        raise ConfigError(f"rewards.REQUIRED has {left_out[0]!r}, which --reward leaves out: name it too, or "
                          "take it out of REQUIRED")


def is_batched(name: str) -> bool:
    return getattr(REWARDS[name][0], "batched", False)


def is_remote(name: str) -> bool:
    return hasattr(REWARDS[name][0], "remote")


def check(names: list[str], config):
    """Called before weights load: what a reward needs and can be known by then. Raises an error of one
    sentence."""
    for name in names:
        if hasattr(REWARDS[name][0], "check"):
            REWARDS[name][0].check(config)


def prepare(names: list[str], config, world):
    """Called on all ranks before the first step: rewards that are models load them."""
    for name in names:
        if hasattr(REWARDS[name][0], "prepare"):
            REWARDS[name][0].prepare(config, world)


def score(name: str, completions: list, prompts: list) -> list[float]:
    """One reward of each completion, NaN where it is missing. Raises RewardError."""
    function = REWARDS[name][0]
    try:
        values = function(completions, prompts) if is_batched(name) else map(function, completions, prompts)
        values = list(values)
    except Exception as e:  # whatever a user's function raises
        raise raised(name, e, prompts[0]) from e
    if len(values) != len(completions):
        raise RewardError(f"reward {name!r} returned {len(values)} values for {len(completions)} "
                          "completions: it must return one for each, None where it cannot be computed")
    return checked(name, values, prompts)


def raised(name: str, e: BaseException, prompt) -> RewardError:
    return RewardError(f"reward {name!r} raised {describe(e)}, on an answer to prompt {prompt.id!r}: repair "
                       "it, or leave it out with --reward")


def describe(e: BaseException) -> str:
    at, said = traceback.extract_tb(e.__traceback__)[-1], " ".join(str(e).split())
    return f"{type(e).__name__} ({said[:200]}) in {Path(at.filename).name}, line {at.lineno}"


def checked(name: str, values: list, prompts: list) -> list[float]:
    """What a reward returned, as numbers, NaN for None. Raises RewardError for anything else."""
    for value, prompt in zip(values, prompts):
        lowest = isinstance(value, numbers.Real) and value == LOWEST
        if value is not None and not lowest and not is_number(value):
            raise RewardError(f"reward {name!r} returned {value!r} for an answer to prompt {prompt.id!r}: it "
                              "must be a finite number, or None where it cannot be computed")
    return [math.nan if value is None else float(value) for value in values]


def is_number(value) -> bool:
    return isinstance(value, (numbers.Real, np.bool_)) and bool(abs(value) <= LARGEST)


def transformed(name: str, value: float) -> float:
    """What enters the advantage for a raw value; one that is missing (NaN), or LOWEST, stays so. Raises
    RewardError."""
    if name not in TRANSFORMS or not math.isfinite(value):
        return value
    try:
        made = TRANSFORMS[name](value)
    except Exception as e:  # whatever a user's function raises
        raise RewardError(f"the transform of reward {name!r} raised {describe(e)}, on {value:g}: repair it "
                          "in rewards.TRANSFORMS") from e
    if not is_number(made):
        raise RewardError(f"the transform of reward {name!r} makes {made!r} of {value:g}: it must be a "
                          "finite number for every value of the reward; repair it in rewards.TRANSFORMS")
    return float(made)


class Remote:
    """One remote reward of one step: as a context, its threads live while the step's samples are scored.

    They are daemons. Those of concurrent.futures are joined when the interpreter exits: one that hangs would
    keep the process for ever.
    """

    def __init__(self, name: str):
        self.name, self.function = name, REWARDS[name][0]
        self.threads, self.patience = self.function.remote
        self.todo, self.done, self.closed = queue.SimpleQueue(), queue.SimpleQueue(), False
        self.values, self.errors, self.waiting, self.paused = {}, {}, 0, -math.inf

    def __enter__(self):
        for _ in range(self.threads):
            threading.Thread(target=self.work, name=f"reward {self.name}", daemon=True).start()
        return self

    def __exit__(self, *error):
        """Samples that no thread has begun are given up; a thread ends when its call is back."""
        self.closed = True
        for _ in range(self.threads):
            self.todo.put(None)

    def submit(self, i: int, completion, prompt):
        """Returns at once; i is the sample's place in `collect`."""
        self.waiting += 1
        self.todo.put((i, completion, prompt))

    def work(self):
        while (sample := self.todo.get()) and not self.closed:
            i, completion, prompt = sample
            try:
                self.done.put((i, self.function(completion, prompt), None))
            except BaseException as e:  # asyncio's CancelledError is no Exception
                self.done.put((i, None, e))

    def wait(self, since: float, interrupt=lambda: None, seconds: float = 5.0) -> str | None:
        """None once every sample is back, or given up `patience` seconds after `since`, a time.monotonic();
        else, after some seconds, which servers are down, "" if they are only slow. `interrupt` is called
        meanwhile, and may raise."""
        until = time.monotonic() + seconds
        while self.waiting:
            interrupt()
            now, down = time.monotonic(), getattr(self.function, "down", str)()
            self.paused = now if down else self.paused
            left = max(since, self.paused) + self.patience - now
            try:
                i, value, error = self.done.get(timeout=max(0.0, min(1.0, left, until - now)))
            except queue.Empty:
                if left <= 0:
                    break
                if now >= until:
                    return down
                continue
            self.waiting -= 1
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
                raise raised(self.name, e, prompts[i]) from e
        reasons = [describe(e) for e in self.errors.values()]
        reasons += [f"not back {self.patience:g} s after the last sample"] * self.waiting
        return checked(self.name, [self.values.get(i) for i in range(len(prompts))], prompts), reasons
