"""Asks a model questions: servers, in threads, or a checkpoint, by the sampler. An answer that is not valid
is asked for again. Each answer goes to the caller as soon as it is there, so that a kill loses none."""

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import rollout
from lib import endpoint
from lib.console import Progress
from sampler import Sampler
from scheduler import Request, Stats


@dataclass
class Result:
    """All answers to a question, and what the last one says."""

    raw: list[str] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)  # read and written, of each answer
    value: dict | None = None  # None: no answer is valid
    error: str = "no answer"


class Questions:
    """Questions and their results so far, by key.

    settings: of each request (max_tokens, temperature, ...). parse(answer) -> value; raises ValueError for an
    answer that is not valid. keep(key, result): called after each answer, one at a time. seed(key, attempt):
    of an answer; a server gets none without it. whole: an answer that reaches max_tokens is not valid.
    """

    def __init__(self, texts: dict, settings: dict, tries: int, parse: Callable[[str], dict],
                 keep: Callable[[object, Result], None], seed: Callable[[object, int], int] | None = None,
                 results: dict | None = None, whole: bool = False, label: str = ""):
        self.texts, self.settings, self.tries, self.parse = texts, settings, tries, parse
        self.keep, self.seed, self.whole, self.lock = keep, seed, whole, threading.Lock()
        self.results = {key: (results or {}).get(key) or Result() for key in texts}
        self.todo = [key for key in texts if self.is_open(key)]
        self.stats, self.progress = Stats(), Progress(label, len(self.todo), bool(label), "questions")

    def is_open(self, key) -> bool:
        """Whether the question has no valid answer and tries left."""
        return self.results[key].value is None and len(self.results[key].raw) < self.tries

    def add(self, key, raw: str, cut: bool, read: int, written: int):
        result = self.results[key]
        with self.lock:
            result.raw.append(raw)
            result.tokens.append([read, written])
            try:
                if self.whole and cut:
                    raise ValueError("cut at max_new_tokens, where JSON may be a thought")
                result.value, result.error = self.parse(raw), ""
            except ValueError as e:
                result.error = str(e)
            self.keep(key, result)
            self.stats.new_tokens += written
            self.stats.finished += not self.is_open(key)
            self.progress.update(self.stats)

    def ask_servers(self, urls: str, timeout: float, threads: int, rate: float = 0.0):
        """Raises Refused where every question would be refused."""
        server = endpoint.Endpoint(urls, timeout, rate=rate,
                                   say=lambda text: print(text, file=sys.stderr, flush=True))

        def ask(key):
            while self.is_open(key):
                attempt, message = len(self.results[key].raw), {"role": "user", "content": self.texts[key]}
                seed = {"seed": self.seed(key, attempt) % 2**31} if self.seed else {}
                raw, usage = server.chat([message], **self.settings, **seed)
                written = usage.get("completion_tokens", 0)
                self.add(key, raw, self.whole and written >= self.settings["max_tokens"],
                         usage.get("prompt_tokens", 0), written)

        try:
            for key, _, error in endpoint.each(ask, self.todo, threads):
                if error:
                    self.results[key].error = str(error)
        finally:
            server.say = None  # a thread that waits for a server gives up
            self.progress.close()

    def ask_sampler(self, sampler: Sampler, chat: bool, world=None):
        """chat: in the chat template; else the model completes the question."""
        tokenizer, s = sampler.tokenizer, self.settings
        context = sampler.model.config.max_position_embeddings
        ids = {key: tokenizer.encode(tokenizer.chat(self.texts[key]) if chat else
                                     f"{self.texts[key]}\n\nJSON:\n") for key in self.todo}
        for key in [key for key in ids if len(ids[key]) >= context]:
            self.results[key].error = f"the question exceeds the model's context of {context}"
            del ids[key]
        for attempt in range(self.tries):
            todo = [key for key in ids if self.is_open(key) and len(self.results[key].raw) == attempt]
            requests = [Request(ids[key], 1, min(int(s["max_tokens"]), context - len(ids[key])),
                                s["temperature"], s["top_p"], seed=self.seed(key, attempt)) for key in todo]
            for c in rollout.generate(sampler, requests, world):
                key = todo[c.prompt_index]
                self.add(key, c.text, chat and c.finish_reason == "length", len(ids[key]), len(c.token_ids))
        self.progress.close()
