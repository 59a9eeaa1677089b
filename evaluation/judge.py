"""Who judges, and what was said? Servers, a checkpoint that our sampler reads, or a reward model; and what
judges answered, on disk, by content, so that nothing is asked for twice.
"""

import json
import math
import sqlite3
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import reward_model
import rollout
from evaluation import benchmarks
from evaluation.benchmarks import Record
from evaluation.source import Source, find, fingerprint, open_sampler
from lib import distributed, endpoint
from lib.options import UserError
from lib.progress import Progress
from scheduler import Request, Stats

SCORED = 8192  # tokens of a reward model's micro-batch


@dataclass(frozen=True)
class Judge:
    name: str
    settings: dict  # all that its answers depend on, beside the question
    source: Source | None  # None: servers

    @property
    def scalar(self) -> bool:
        return self.source is not None and self.source.scalar


@dataclass
class JudgeResult:
    """What was answered to a question, try by try, and what that amounts to."""

    raw: list[str]
    verdict: dict | None = None
    error: str = "no answer"
    read: int = 0  # tokens
    written: int = 0


def find_judge(config) -> Judge | None:
    """None where there is nothing to judge. Raises an error of one sentence."""
    if not config.judge or config.benchmark == "ruler":
        return None
    try:
        settings = dict(json.loads(config.judge_settings))
    except (ValueError, TypeError) as e:
        raise UserError(f"judge_settings {config.judge_settings} must be a JSON object ({e})") from None
    if "://" in config.judge:
        endpoint.Endpoint(config.judge)
        return Judge(endpoint.model_names(config.judge), settings, None)
    source = find(config.judge)
    name, about = Path(source.path).name, {"fingerprint": source.fingerprint}
    if source.scalar and config.benchmark != "arena":
        raise UserError(f"judge {config.judge} is a reward model, which compares texts: it is for arena")
    if source.scalar:
        return Judge(name, about, source)
    known = {"max_tokens": (1, math.inf), "temperature": (0, 100), "top_p": (1e-6, 1)}
    settings = {"max_tokens": 4096, "temperature": 0.0, "top_p": 1.0} | settings
    for key, value in settings.items():
        low, high = known.get(key, (math.inf, 0))
        if type(value) not in (int, float) or not low <= value <= high:
            raise UserError(f"judge_settings has {key} {value!r}: a checkpoint knows max_tokens (1 or "
                            "more), temperature (0 or more) and top_p (at most 1)")
    return Judge(name, settings | {"template": source.template, "seed": config.seed} | about, source)


def greet(config, judge: Judge):
    """Raises UserError where no server of the judge answers, or one refuses what it will be asked."""
    try:
        endpoint.Endpoint(config.judge, config.timeout, say=None, rate=config.rate).chat(
            [{"role": "user", "content": endpoint.HELLO}], **judge.settings)
    except (endpoint.Refused, endpoint.Unavailable) as e:
        raise UserError(f"judge {config.judge} cannot be asked: {e}") from None


class Cache:
    """A judge's answers, of all evaluations. Raises UserError."""

    def __init__(self, config, judge: Judge):
        self.config, self.judge, self.lock = config, judge, threading.Lock()
        try:
            Path(config.cache).parent.mkdir(parents=True, exist_ok=True)
            self.db = sqlite3.connect(config.cache, 60, isolation_level=None, check_same_thread=False)
            self.db.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, judge TEXT, "
                            "raw TEXT, tokens_read INTEGER, tokens_written INTEGER, made TEXT)")
        except (sqlite3.Error, OSError) as e:
            raise UserError(f"cache {config.cache} cannot be used ({e}): choose another") from None

    def key(self, text: str, attempt: int) -> str:
        return fingerprint([self.judge.name, self.judge.settings, text, attempt])

    def put(self, text: str, attempt: int, raw: str, read: int, written: int):
        with self.lock:
            row = self.key(text, attempt), self.judge.name, raw, read, written, datetime.now().isoformat()
            self.db.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?)", row)

    def tried(self, text: str, call: Callable | None = None) -> JudgeResult:
        """call(text) -> (raw answer, tokens read, tokens written): makes the tries that are not there."""
        t = JudgeResult([])
        while t.verdict is None and len(t.raw) < self.config.tries:
            with self.lock:
                row = self.db.execute("SELECT raw, tokens_read, tokens_written FROM answers "
                                      "WHERE key = ?", (self.key(text, len(t.raw)),)).fetchone()
            if not row and not call:
                break
            if not row:
                row = call(text)
                self.put(text, len(t.raw), *row)
            t.raw, t.read, t.written = [*t.raw, row[0]], t.read + row[1], t.written + row[2]
            try:
                t.verdict, t.error = benchmarks.parse(self.config.benchmark, row[0]), ""
            except ValueError as e:
                t.error = str(e)
        return t

    def open(self, text: str) -> bool:
        t = self.tried(text)
        return t.verdict is None and len(t.raw) < self.config.tries


# ---------------------------------------------------------------------- who is asked


def ask_servers(config, cache: Cache, texts: list[str]) -> dict[str, str]:
    """Fills the cache. Returns why some of the texts have no answer."""
    greet(config, cache.judge)
    server = endpoint.Endpoint(config.judge, config.timeout, rate=config.rate,
                               say=lambda said: print(said, file=sys.stderr, flush=True))

    def call(text: str) -> tuple[str, int, int]:
        raw, usage = server.chat([{"role": "user", "content": text}], **cache.judge.settings)
        return raw, usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)

    failed, stats = {}, Stats()
    progress = Progress(f"{config.out}: verdicts", len(texts), True, "questions")
    for text, t, error in endpoint.each(lambda text: cache.tried(text, call), texts, config.threads):
        failed |= {text: str(error)} if error else {}
        stats.finished += 1
        stats.new_tokens += t.written if t else 0
        progress.update(stats)
    progress.close()
    return failed


def ask_sampler(config, cache: Cache, texts: list[str], world) -> dict[str, str]:
    """The same of a checkpoint, on all ranks."""
    sampler, s = open_sampler(cache.judge.source, config, world), cache.judge.settings
    tokenizer, context = sampler.tokenizer, sampler.model.config.max_position_embeddings
    ids = {text: tokenizer.encode(tokenizer.chat(text) if s["template"] == "chat" else f"{text}\n\nJSON:\n")
           for text in texts[world.rank::world.size]}
    room = {text: min(int(s["max_tokens"]), context - len(ids[text])) for text in ids}
    for attempt in range(config.tries):
        todo = [text for text in ids if room[text] > 0 and cache.open(text)
                and len(cache.tried(text).raw) == attempt]
        requests = [Request(ids[text], 1, room[text], s["temperature"], s["top_p"],
                            seed=rollout.request_seed(s["seed"], "judge", text, attempt)) for text in todo]
        progress = Progress(f"{config.out}: try {attempt + 1}", len(todo), world.main, "questions")
        for c in rollout.generate(sampler, requests, world):
            text = todo[c.prompt_index]
            cache.put(text, attempt, c.text, len(ids[text]), len(c.token_ids))
            progress.update(sampler.stats)
        progress.close()
    failed = {text: f"the question exceeds the judge's context of {context}"
              for text in ids if room[text] <= 0}
    return {text: why for theirs in distributed.gather(failed, world) for text, why in theirs.items()}


def compare(judge: Judge, pairs: list[tuple[str, str, str]], world) -> list[JudgeResult]:
    """Of each (query, A, B) the text that a reward model scores higher wins. On all ranks."""
    texts = list(dict.fromkeys((query, text) for query, *pair in pairs for text in pair))
    mine, scores = texts[world.rank::world.size], {}
    folder = judge.source.folder
    found = reward_model.Scorer(folder, reward_model.check(folder), SCORED, world)(mine)
    for theirs in distributed.gather(dict(zip(mine, found)), world):
        scores |= theirs
    both = [(scores[query, a], scores[query, b]) for query, a, b in pairs]
    return [JudgeResult([], {"winner": "tie" if a == b else "A" if a > b else "B", "scores": [a, b]})
            for a, b in both]


def ask(config, judge: Judge, records: list[Record], answers: list[dict], world) -> tuple[list[dict], dict]:
    """(lines of verdicts.jsonl, `judge` of result.json). On all ranks where the judge is a checkpoint."""
    asked, tried, pairs, failed, before = [], {}, {}, {}, 0
    for record, answer in zip(records, answers):
        for q in benchmarks.questions(config.benchmark, record, answer["answer"]):
            asked.append(q)
            if config.benchmark == "arena":
                name, _, place = q.key.rpartition("/")
                texts = (answer["answer"], record.baselines[name])
                pairs[q.text] = record.query, *(texts if place == "0" else texts[::-1])
                if not record.baselines[name]:
                    verdict = {"winner": "AB"[int(place)], "reason": "the other is empty"}
                    tried[q.text] = JudgeResult([], verdict)
    todo = [text for text in dict.fromkeys(q.text for q in asked) if text not in tried]
    if judge.scalar:
        tried |= zip(todo, compare(judge, [pairs[text] for text in todo], world))
    else:
        cache = Cache(config, judge)
        before, open = sum(len(cache.tried(text).raw) for text in todo), list(filter(cache.open, todo))
        if judge.source and (open := distributed.broadcast(open, world)):
            failed = ask_sampler(config, cache, open, world)
        elif open:
            failed = ask_servers(config, cache, open)
        tried |= {text: cache.tried(text) for text in todo}
    lines = [{"id": q.id, "key": q.key, "verdict": t.verdict, "raw": t.raw,
              **({} if t.verdict else {"error": failed.get(q.text, t.error)})}
             for q in asked for t in (tried[q.text],)]
    if failed and world.main:
        print(f"{len(failed)} questions have no answer, the first because of this: "
              f"{next(iter(failed.values()))}. The same command asks again", flush=True)
    read, written = sum(t.read for t in tried.values()), sum(t.written for t in tried.values())
    cost = (read * config.prices[0] + written * config.prices[1]) / 1e6 if config.prices else None
    return lines, {"name": judge.name, "settings": judge.settings, "cached": before,
                   "calls": sum(len(t.raw) for t in tried.values()), "prompt_tokens": read,
                   "completion_tokens": written, "cost": cost,
                   "missing": sum(not line["verdict"] for line in lines)}
