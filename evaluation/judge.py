"""Judges: servers, a checkpoint that our sampler reads, or a reward model. Every answer of a judge goes to
verdicts.part-RANK.jsonl in --out at once, by a hash of judge and question, so that none is asked for twice.
"""

from dataclasses import dataclass
from pathlib import Path

import reward_model
from evaluation import benchmarks
from evaluation.ask import Questions, Result
from evaluation.benchmarks import Record
from evaluation.source import Source, find, fingerprint, open_sampler
from lib import distributed, endpoint
from lib.files import merge_parts, write_jsonl
from lib.options import Field, UserError, parse_json, typed
from rollout import request_seed

SCORED = 8192  # tokens of a reward model's micro-batch


@dataclass(frozen=True)
class Judge:
    name: str
    settings: dict  # all that its answers depend on, beside the question
    source: Source | None  # None: servers

    @property
    def scalar(self) -> bool:
        return self.source is not None and self.source.scalar


def find_judge(config) -> Judge | None:
    """None where there is nothing to judge. Raises an error of one sentence."""
    if not config.judge or config.benchmark == "ruler":
        return None
    try:
        settings = parse_json(config.judge_settings.encode())
    except ValueError as e:
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
    known = {"max_tokens": Field(int, 1, default=4096), "temperature": Field(float, 0, 100, 0.0),
             "top_p": Field(float, 1e-6, 1, 1.0)}
    for key in settings.keys() - known:
        raise UserError(f"judge_settings has {key} {settings[key]!r}: a checkpoint knows {', '.join(known)}")
    settings = typed(settings, "judge_settings", known)
    return Judge(name, settings | {"template": source.template, "seed": config.seed} | about, source)


def greet(config, judge: Judge):
    """Raises UserError where no server of the judge answers, or one refuses what it will be asked."""
    try:
        endpoint.Endpoint(config.judge, config.timeout, say=None, rate=config.rate).chat(
            [{"role": "user", "content": endpoint.HELLO}], **judge.settings)
    except (endpoint.Refused, endpoint.Unavailable) as e:
        raise UserError(f"judge {config.judge} cannot be asked: {e}") from None


# ---------------------------------------------------------------------- asking


def compare(judge: Judge, pairs: list[tuple[str, str, str]], world) -> list[Result]:
    """Of each (query, A, B) the text that a reward model scores higher wins. On all ranks."""
    texts = list(dict.fromkeys((query, text) for query, *pair in pairs for text in pair))
    mine, scores = texts[world.rank::world.size], {}
    folder = judge.source.folder
    found = reward_model.Scorer(folder, reward_model.check(folder), SCORED, world)(mine)
    for theirs in distributed.gather(dict(zip(mine, found)), world):
        scores |= theirs
    both = [(scores[query, a], scores[query, b]) for query, a, b in pairs]
    return [Result(value={"winner": "tie" if a == b else "A" if a > b else "B", "scores": [a, b]})
            for a, b in both]


def line(key: str, result: Result) -> dict:
    """A line of verdicts.jsonl. key: the hash of judge, its settings and the question."""
    return {"hash": key, "verdict": result.value, "raw": result.raw, "tokens": result.tokens,
            **({} if result.value else {"error": result.error})}


def ask(config, judge: Judge, records: list[Record], answers: list[dict], verdicts: list[dict],
        world) -> tuple[list[dict], dict]:
    """(lines of verdicts.jsonl, `judge` of result.json). verdicts: lines that --out has already. On all ranks
    where the judge is a checkpoint."""
    asked, texts, pairs, out = {}, {}, {}, Path(config.out)
    there = {x["hash"]: Result(x["raw"], x["tokens"], x.get("verdict"), x.get("error", "")) for x in verdicts}
    for record, answer in zip(records, answers):
        for part, text in benchmarks.questions(config.benchmark, record, answer["answer"]).items():
            key = asked[record.id, part] = fingerprint([judge.name, judge.settings, text])
            texts[key] = text
            if config.benchmark == "arena":
                name, _, place = part.rpartition("/")
                pair = (answer["answer"], record.baselines[name])
                pairs[key] = record.query, *(pair if place == "0" else pair[::-1])
                if not record.baselines[name]:
                    there[key] = Result(value={"winner": "AB"[int(place)], "reason": "the other is empty"})

    def keep(key: str, result: Result):
        write_jsonl(out / f"verdicts.part-{world.rank}.jsonl", [line(key, result)], "a")

    def seed(key: str, attempt: int) -> int:
        return request_seed(config.seed, "judge", texts[key], attempt)

    questions = Questions(texts, judge.settings, config.tries,
                          lambda raw: benchmarks.parse(config.benchmark, raw), keep,
                          seed if judge.source else None, there, label=f"{out}: verdicts" * world.main)
    results, todo = questions.results, questions.todo
    before = sum(len(r.raw) for r in results.values())
    if judge.scalar:
        results |= zip(todo, compare(judge, [pairs[key] for key in todo], world))
    elif judge.source and todo:
        questions.todo = todo[world.rank::world.size]
        sampler = open_sampler(judge.source, config, world)
        questions.ask_sampler(sampler, judge.settings["template"] == "chat", world)
        for theirs in distributed.gather({key: results[key] for key in questions.todo}, world):
            results |= theirs
    elif todo:
        questions.ask_servers(config.judge, config.timeout, config.threads, config.rate)
    lines = [{"id": id, "key": part} | line(key, results[key]) for (id, part), key in asked.items()]
    read, written = (sum(n[i] for r in results.values() for n in r.tokens) for i in (0, 1))
    calls, missing = sum(len(r.raw) for r in results.values()), sum(not x["verdict"] for x in lines)
    made = {"name": judge.name, "settings": judge.settings, "calls": calls, "missing": missing,
            "prompt_tokens": read, "completion_tokens": written,
            "cost": (read * config.prices[0] + written * config.prices[1]) / 1e6 if config.prices else None}
    if world.main:
        merge_parts(out, "verdicts", lines)
        print(f"{out}: {len(lines)} verdicts by {judge.name}, {missing} missing; {calls - before} calls now, "
              f"{before} before", flush=True)
        if failed := [results[key].error for key in todo if questions.is_open(key)]:
            print(f"{len(failed)} questions have no answer, the first because of this: {failed[0]}. The same "
                  "command asks again", flush=True)
    return lines, made
