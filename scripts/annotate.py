"""How long a good answer to each query would be, and which queries are worth training on, as a model judges.

    python -m scripts.annotate --task filter --queries all.jsonl --out judged.jsonl --model MODEL
    python -m scripts.annotate --task range --queries judged.jsonl --out prompts.jsonl --model MODEL

MODEL is a Qwen checkpoint that one device holds, sampled here, or an OpenAI-compatible server, as
http://HOST:PORT/v1#NAME (several: comma-separated; the key: OPENAI_API_KEY). Each answer goes to --out at
once, as fields of its query's record, and the same command goes on where it stopped. train.py reads the
result as --prompts. A query that the filter rejects has `keep` false and a reason, and is passed over.
"""

import json
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import model as qwen
from data import prompts as prompt_data
from data.prompts import RANGE_FIELDS, language, parse_range, present, query_of
from data.tokenizer import Tokenizer
from lib import endpoint, options
from lib.files import locate, replace
from lib.options import UserError
from rollout import request_seed
from sampler import Sampler
from scheduler import Request


@dataclass
class Config:
    task: str = "range"  # range: [lo, hi] in words of a good answer; filter: whether to keep the query
    queries: str = ""  # JSONL, as train.py reads prompts (scripts.convert makes it)
    out: str = ""  # JSONL; a file that the same command began is continued
    replace: bool = False  # ask for a range where the record has one, too; false: it stays
    model: str = "data/tiny/base"  # checkpoint folder, or URLs of servers: http://HOST:PORT/v1#NAME
    max_new_tokens: int = 4096  # of an answer, thinking included
    temperature: float = 0.6
    top_p: float = 0.95
    tries: int = 3  # samples, each with a seed of its own, until one is valid
    seed: int = 0
    threads: int = 32  # calls of a server at a time
    timeout: float = 600.0  # seconds for a whole call of a server
    max_sequences: int = 64  # that the sampler decodes at a time
    device: str = "auto"  # auto, cpu or cuda


RULES = {  # what is asked about a query, in its language
    ("range", "en"): """How long would a good answer to the request at the end be, in words?
- Understand what is really asked: who wants to know how to begin a thesis needs advice of 400 to 800 words, \
not a thesis.
- Give a lower and an upper bound: multiples of 100 between 0 and 12000, at most about 3000 apart.
- If the request names a number N of words, the bounds are 0.9 N and 1.1 N; for "no more than N" 0.9 N \
and N; for "at least N" N and 1.1 N.
- If more than 12000 words are needed, or the request cannot be answered, for instance because it refers to \
a text that is not there, both bounds are 0.
End with JSON of this form: {"range": [lower, upper]}

Request:
{query}""",
    ("range", "zh"): """对文末的要求，一份好的回答应有多长（字数）？
- 先弄清真正要的是什么：询问论文如何开头的人，需要的是400至800字的建议，而不是一篇论文。
- 给出下限和上限：0到12000之间的100的倍数，两者相差大致不超过3000。
- 要求中若写明字数N，则上下限为0.9N和1.1N；“不超过N”为0.9N和N；“至少N”为N和1.1N。
- 若需要超过12000字，或要求无法回答（例如所指的文本并未给出），上下限均为0。
最后按此格式给出JSON：{"range": [下限, 上限]}

要求：
{query}""",
    ("filter", "en"): """Does the request at the end need a long text of high quality?
Yes: an article, a report, a speech, a story, a plan, an essay or the like, of several hundred words at \
least, where structure, style and depth matter, and all that is needed to write it is there.
No: a question with a short answer, small talk, code, a calculation, a translation or correction of a given \
text, a request that cannot be understood or answered, or one that asks for harmful content.
End with JSON of this form: {"reason": "one sentence", "keep": true or false}

Request:
{query}""",
    ("filter", "zh"): """文末的要求是否需要一篇高质量的长文？
是：文章、报告、演讲稿、故事、方案、论述等，至少数百字，讲究结构、文风和深度，且写作所需的信息齐全。
否：一两句即可回答的问题、闲聊、代码、计算、对给定文本的翻译或修改、无法理解或无法回答的要求、索取有害内容的要求。
最后按此格式给出JSON：{"reason": "一句话", "keep": true 或 false}

要求：
{query}""",
}
BEGUN = {"range": '{"range": [', "filter": '{"reason": "'}  # by which a base model knows what to complete
WIDE = 3000  # words: a wider range is counted
CUT = "cut at max_new_tokens, where JSON may be a thought"


@dataclass(frozen=True)
class Query:
    id: str
    text: str
    record: dict  # as read


def find(task: str, answer: str) -> dict:
    """What the last JSON object of an answer, thinking left out, says, as fields of a record. Raises
    ValueError where it is not what was asked for."""
    objects = re.findall(r"\{[^{}]*\}", answer.rpartition("</think>")[2].partition("<think>")[0])
    if not objects:
        raise ValueError(f"no JSON in {answer[-80:]!r}")
    try:
        said = json.loads(objects[-1])
    except RecursionError:
        said = {}
    if task == "range":
        return {"length_range": list(parse_range({"range": said.get("range") or "nothing"}))}
    if type(said.get("keep")) is not bool or not isinstance(said.get("reason"), str):
        raise ValueError(f"`keep` must be true or false, and `reason` a text, in {objects[-1][:80]}")
    return {"keep": said["keep"], "reason": said["reason"].strip()}


# ---------------------------------------------------------------------- who is asked


def by_sampler(config: Config, queries: list[Query], keep: Callable) -> Iterator[str]:
    """Gives `keep` each query with what was found; yields "" for it, or why nothing was."""
    path = locate(config.model)
    tokenizer, shape = Tokenizer(path), qwen.read_config(path)
    if shape.scalar_head:
        raise UserError(f"model {path} is a reward model, which writes nothing")
    tokenizer.check_rows(shape.vocab_size, path)
    context = shape.max_position_embeddings
    chat = tokenizer.chats  # else a base model, which completes
    begun = "" if chat else BEGUN[config.task]
    cuda = config.device == "cuda" or config.device == "auto" and torch.cuda.is_available()
    model = qwen.load(path, torch.bfloat16 if cuda else torch.float32, "cuda" if cuda else "cpu")
    sampler = Sampler(model.requires_grad_(False), tokenizer, config.max_sequences)

    def request(query: Query, attempt: int) -> Request:
        asked = question(config, query)
        ids = tokenizer.encode((tokenizer.chat(asked) if chat else f"{asked}\n\nJSON:\n") + begun)
        return Request(ids, 1, min(config.max_new_tokens, context - len(ids)), config.temperature,
                       config.top_p, stop=() if chat else ("}",), seed=seed(config, query, attempt))

    fitting = [query for query in queries if request(query, 0).max_new_tokens > 0]
    yield from [f"the query exceeds the model's context of {context}"] * (len(queries) - len(fitting))
    for attempt in range(config.tries):
        queries, fitting = fitting, []
        for c in sampler.generate([request(query, attempt) for query in queries]):
            query = queries[c.prompt_index]
            try:
                if chat and c.finish_reason == "length":
                    raise ValueError(CUT)
                keep(query, find(config.task, begun + c.text))
                yield ""
            except ValueError as e:
                fitting.append(query)
                if attempt == config.tries - 1:
                    yield str(e)


def by_server(config: Config, queries: list[Query], keep: Callable) -> Iterator[str]:
    """The same. `keep` is called in the threads, so that no answer that has come is lost. Raises Refused
    where every query would be, and OSError where answers cannot be written."""
    server = endpoint.Endpoint(config.model, config.timeout, say=lambda text: print(text, file=sys.stderr))

    def ask(query: Query) -> str:
        for attempt in range(config.tries):
            text, usage = server.chat([{"role": "user", "content": question(config, query)}],
                                      temperature=config.temperature, top_p=config.top_p,
                                      max_tokens=config.max_new_tokens,
                                      seed=seed(config, query, attempt) % 2**31)
            try:
                if usage.get("completion_tokens", 0) >= config.max_new_tokens:
                    raise ValueError(CUT)
                keep(query, find(config.task, text))
                return ""
            except ValueError as e:
                why = str(e)
        return why

    for _, why, error in endpoint.each(ask, queries, config.threads):
        yield why or str(error or "")


def question(config: Config, query: Query) -> str:
    return RULES[config.task, language(query.text)].replace("{query}", query.text)


def seed(config: Config, query: Query, attempt: int) -> int:
    return request_seed(config.seed, config.task, query.text, attempt)


# ---------------------------------------------------------------------- files


def annotators(record: dict) -> dict[str, str]:
    """Who has done what with this record: {task: model}."""
    return record["annotators"] if isinstance(record.get("annotators"), dict) else {}


def is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def resume(config: Config, name: str, kept: dict[tuple[str, str], dict]) -> dict[tuple[str, str], dict]:
    """The records that --out holds already, by id and text, beside those that are `kept` as they are; a torn
    last line is cut off. Raises UserError for a file that is not of this command."""
    out, done = Path(config.out), dict(kept)
    if out.exists():
        *lines, torn = out.read_bytes().split(b"\n")
        if torn and (torn[:1] != b"{" or is_json(torn)):  # no kill has left it
            lines.append(torn)
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                other, key = annotators(record).get(config.task), (str(record["id"]), query_of(record))
            except (ValueError, LookupError, TypeError, AttributeError):
                other, key, record = None, None, {}
            if other != name and record != kept.get(key):
                raise UserError(f"{out}, line {number}, is no {config.task} by {name}, but by {other}: "
                                "choose another --out")
            done[key] = record
        os.truncate(out, out.stat().st_size - len(torn))
    return done


def annotate(config: Config):
    queries = [Query(ident, text, record) for _, ident, text, record in prompt_data.queries(config.queries)
               if record.get("keep") is not False]
    name = endpoint.model_names(config.model)
    kept = {(query.id, query.text): query.record | {"id": query.id} for query in queries
            if config.task == "range" and not config.replace
            and present(query.record, (*RANGE_FIELDS, "length")) is not None}
    done, lock = resume(config, name, kept), threading.Lock()
    todo = [query for query in queries if (query.id, query.text) not in done]
    ask = by_server if "://" in config.model else by_sampler
    failed, start, shown = Counter(), time.monotonic(), 0.0
    with open(config.out, "a", encoding="utf-8") as f:

        def keep(query: Query, fields: dict):
            record = query.record | {"id": query.id} | fields
            record["annotators"] = annotators(query.record) | {config.task: name}
            with lock:
                f.write(json.dumps(record, ensure_ascii=False) + "\n")
                f.flush()
                done[query.id, query.text] = record

        for count, why in enumerate(ask(config, todo, keep), 1):
            failed.update([why] if why else [])
            now, terminal = time.monotonic(), sys.stderr.isatty()
            if now - shown > (0.2 if terminal else 30) or count == len(todo):
                shown, (before, after) = now, ("\r", "\033[K") if terminal else ("", "\n")
                print(f"{before}{config.out}: {len(done)} of {len(queries)} queries, {failed.total()} "
                      f"failed, {count / (now - start):.1f}/s", end=after, file=sys.stderr, flush=True)
    place = {(query.id, query.text): i for i, query in enumerate(queries)}
    lines = [json.dumps(done[key], ensure_ascii=False) + "\n"
             for key in sorted(done, key=lambda key: place.get(key, len(place)))]
    replace(Path(config.out), "".join(lines))  # in the order of the queries
    kinds = Counter("kept as they were" if record == kept.get(key) else kind(record, config.task)
                    for key, record in done.items())
    print(f"{config.out}: {', '.join(f'{n} {what}' for what, n in kinds.items())}")
    if failed:
        why, n = failed.most_common(1)[0]
        print(f"{failed.total()} queries have no valid answer, {n} of them so: {why}. The same command asks "
              "again")


def kind(record: dict, task: str) -> str:
    if task == "filter":
        return "kept" if record["keep"] else "rejected"
    lo, hi = record["length_range"]
    return "unanswerable" if hi == 0 else f"ranges wider than {WIDE} words" if hi - lo > WIDE else "ranges"


# ---------------------------------------------------------------------- options


def check(config: Config):
    """Raises UserError."""
    options.check_choices(config, task=("range", "filter"), device=options.DEVICES)
    for name in ("queries", "out", "model"):
        if not getattr(config, name):
            raise UserError(f"--{name} is missing")
    options.check_numbers(config, "max_new_tokens tries threads timeout", top_p=(1e-9, 1),
                          temperature=(0, 100), max_sequences=(1, 2**16))
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch sees no GPU: say --device cpu")
    if "://" in config.model:
        endpoint.Endpoint(config.model)


@options.command
def main():
    config = options.parse(Config, sys.argv[1:], __doc__)
    check(config)
    annotate(config)


if __name__ == "__main__":
    main()
