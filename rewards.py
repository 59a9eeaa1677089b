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
import os
import sys
import threading

import reward_model
import text
from data.prompts import frame
from lib.endpoint import HELLO, Endpoint, Unavailable
from lib.files import locate
from lib.options import UserError
from text import count_words, repetition, repetition_words, structure

END_OF_TEXT = "<|endoftext|>"  # of the Qwen2.5 family: a reward model's score stands there
OVERLONG_CACHE = 0.2  # share of max_new_tokens over which `overlong` falls (DAPO: 4,096 of 20,480)
LOWEST = -math.inf

# ---------------------------------------------------------------------- marks (leave these as they are)


def batched(reward):
    """Marks a reward as called with a list of completions and a list of their prompts: it returns a list."""
    reward.batched = True
    return reward


def remote(reward=None, *, threads: int = 8, patience: float = 60.0):
    """Marks a reward that waits for a network, as `@remote` or `@remote(threads=..., patience=...)`.

    It is called in one of `threads` threads as soon as a sample ends, and must not use torch. Where it
    raises, or is not back `patience` seconds after the step's last sample, it is missing; but a mistake in
    the code (scoring.MISTAKES) ends the run, as in any reward. If it has an attribute `down`, as
    endpoint.Endpoint has, the run pauses while `down()` is not empty, and patience stands still.
    """
    if not (threads >= 1 and 0 <= patience <= threading.TIMEOUT_MAX):
        raise ValueError(f"@remote: threads {threads} must be at least 1, and patience {patience} finite and "
                         "not negative")

    def mark(reward):
        reward.remote = (threads, patience)
        return reward

    return mark if reward is None else mark(reward)


# ---------------------------------------------------------------------- length (edit from here on)


def length_reward(words: int, lo: int, hi: int) -> float:
    """1 inside [lo, hi], falling linearly to 0 at 0 words and at Lmax = max(1.5 hi, hi + 20) (Lmax: not
    specified by the paper)."""
    if words < lo:
        return words / lo
    if words <= hi:
        return 1.0
    zero_at = max(1.5 * hi, hi + 20)
    return max(0.0, (zero_at - words) / (zero_at - hi))


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
    """`format_reward` that sees copies in disguise too (text.repetition_words)."""
    ok, _, answer = structure(completion.text, think=prompt.style == "think")
    return 1.0 - max(repetition(answer), repetition_words(answer)) if ok else 0.0


# ---------------------------------------------------------------------- guards against hacking


def guard(check):
    """A reward from a guard of text.py, of the answer body; no body: 0, or silence would be clean."""
    def reward(completion, prompt) -> float | None:
        _, _, answer = structure(completion.text)
        return check(answer, prompt.query) if answer else 0.0

    return reward


def ending(completion, prompt) -> float | None:
    """text.ending, and 0 for a sample that was cut or never closed its answer."""
    closed = completion.finish_reason != "length" and "</answer>" in completion.text
    return guard(text.ending)(completion, prompt) if closed else 0.0


# ---------------------------------------------------------------------- writing


SERVER_TIMEOUT, SERVER_PATIENCE, SERVER_THREADS = 60.0, 120.0, 32  # seconds; calls of a rank at a time
SERVER_KEY = "REWARD_API_KEY"  # the environment variable of its key; that of judges is not for these servers


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
        if not config.reward_model:
            raise UserError("reward_model is empty, and the writing reward asks it: give --reward_model, "
                            "or train on the rules alone with --reward length,format")
        if "://" not in config.reward_model:
            self.read = reward_model.check(locate(config.reward_model))
            return
        self.servers = Endpoint(config.reward_model, SERVER_TIMEOUT, key=SERVER_KEY, say=lambda why: None)
        try:
            Endpoint(config.reward_model, timeout=5.0, attempts=1, key=SERVER_KEY, say=None).score(HELLO)
        except Unavailable as e:
            if os.environ.get("RANK", "0") == "0":
                print(f"warning: no server of reward_model answers yet ({e}); the run will wait for one when "
                      "its first samples are written", file=sys.stderr, flush=True)
        self.batched, self.remote, self.down = False, (SERVER_THREADS, SERVER_PATIENCE), self.servers.down

    def prepare(self, config, world):
        if not self.batched:
            return
        self.scorer = reward_model.Scorer(locate(config.reward_model), self.read, config.micro_batch_tokens,
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
    "no_stuffing": (guard(text.stuffing), 0.0),
    "no_praise": (guard(text.praise), 0.0),
    "no_drift": (guard(text.drift), 0.0),
    "no_loops": (guard(text.loops), 0.0),
    "ending": (ending, 0.0),
}
TRANSFORMS = {}  # name: function of the raw value, such as math.log1p; the advantage sees what it makes
REQUIRED = {}  # name: least raw value; a sample with less gets a negative advantage, see grpo.require
