"""How long a good answer to each query would be, and which queries are worth training on, as a model judges.

    python -m scripts.annotate --task filter --queries all.jsonl --out judged.jsonl --model MODEL
    python -m scripts.annotate --task range --queries judged.jsonl --out prompts.jsonl --model MODEL

MODEL is a Qwen checkpoint that one device holds, sampled here, or an OpenAI-compatible server, as
http://HOST:PORT/v1#NAME (several: comma-separated; the key: OPENAI_API_KEY). Each answer goes to --out at
once, as fields of its query's record, and the same command goes on where it stopped. train.py reads the
result as --prompts. A query that the filter rejects has `keep` false and a reason, and is passed over.
"""

import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

import model as qwen
from data import prompts as prompt_data
from data.prompts import RANGE_FIELDS, language, parse_range, present, query_of
from data.tokenizer import Tokenizer
from evaluation.ask import Questions, Result
from evaluation.benchmarks import last_object
from lib import endpoint, options
from lib.files import jsonl, locate, replace, write_jsonl
from lib.options import UserError, parse_json
from rollout import request_seed
from sampler import Sampler


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


def find(task: str, answer: str) -> dict:
    """What the last JSON object of an answer, thinking left out, says, as fields of a record. Raises
    ValueError where it is not what was asked for."""
    found = last_object(answer.rpartition("</think>")[2].partition("<think>")[0])
    if task == "range":
        return {"length_range": list(parse_range({"range": found.get("range") or "nothing"}))}
    if type(found.get("keep")) is not bool or not isinstance(found.get("reason"), str):
        raise ValueError(f"`keep` must be true or false, and `reason` a text, in {str(found)[:80]}")
    return {"keep": found["keep"], "reason": found["reason"].strip()}


def open_sampler(config: Config) -> Sampler:
    """Of a checkpoint that one device holds."""
    path = locate(config.model)
    tokenizer, shape = Tokenizer(path), qwen.read_config(path)
    if shape.scalar_head:
        raise UserError(f"model {path} is a reward model, which writes nothing")
    tokenizer.check_rows(shape.vocab_size, path)
    cuda = config.device == "cuda" or config.device == "auto" and torch.cuda.is_available()
    model = qwen.load(path, torch.bfloat16 if cuda else torch.float32, "cuda" if cuda else "cpu")
    return Sampler(model.requires_grad_(False), tokenizer, config.max_sequences)


# ---------------------------------------------------------------------- files


def annotators(record: dict) -> dict[str, str]:
    """The model that has done each task with this record: {task: model}."""
    return record["annotators"] if isinstance(record.get("annotators"), dict) else {}


def resume(config: Config, name: str, kept: dict[tuple[str, str], dict]) -> dict[tuple[str, str], dict]:
    """The records that --out holds already, by id and text, beside those that are `kept` as they are; a torn
    last line is cut off. Raises UserError for a file that is not of this command."""
    out, done = Path(config.out), dict(kept)
    if out.exists():
        *lines, torn = out.read_bytes().split(b"\n")
        if torn and (torn[:1] != b"{" or torn[-1:] == b"}"):  # no kill has left it
            lines.append(torn)
        for number, line in enumerate(lines, 1):
            try:
                record = parse_json(line)
                key = str(record["id"]), query_of(record)
            except (ValueError, KeyError):
                record, key = {}, None
            other = annotators(record).get(config.task)
            if other != name and record != kept.get(key):
                raise UserError(f"{out}, line {number}, is no {config.task} by {name}, but by {other}: "
                                "choose another --out")
            done[key] = record
        os.truncate(out, out.stat().st_size - len(torn))
    return done


def annotate(config: Config):
    queries = {(ident, text): record | {"id": ident} for _, ident, text, record in
               prompt_data.queries(config.queries) if record.get("keep") is not False}
    name = endpoint.model_names(config.model)
    kept = {key: record for key, record in queries.items() if config.task == "range" and not config.replace
            and present(record, (*RANGE_FIELDS, "length")) is not None}
    done = resume(config, name, kept)
    write_jsonl(Path(config.out), [], "a")  # fails before any answer is paid for

    def keep(key: tuple[str, str], result: Result):
        if result.value:
            record = queries[key] | result.value
            record["annotators"] = annotators(record) | {config.task: name}
            write_jsonl(Path(config.out), [record], "a")
            done[key] = record

    questions = Questions(
        {key: RULES[config.task, language(key[1])].replace("{query}", key[1]) for key in queries
         if key not in done},
        {"temperature": config.temperature, "top_p": config.top_p, "max_tokens": config.max_new_tokens},
        config.tries, lambda answer: find(config.task, answer), keep,
        lambda key, attempt: request_seed(config.seed, config.task, key[1], attempt), whole=True,
        label=config.out)
    if "://" in config.model:
        questions.ask_servers(config.model, config.timeout, config.threads)
    else:
        sampler = open_sampler(config)
        questions.ask_sampler(sampler, sampler.tokenizer.chats)
    order = {key: done[key] for key in queries if key in done} | done
    replace(Path(config.out), jsonl(order.values()))
    kinds = Counter("kept as they were" if record == kept.get(key) else kind(record, config.task)
                    for key, record in done.items())
    print(f"{config.out}: {', '.join(f'{n} {what}' for what, n in kinds.items())}")
    if failed := Counter(result.error for result in questions.results.values() if not result.value):
        why, n = failed.most_common(1)[0]
        print(f"{failed.total()} queries have no valid answer, {n} of them so: {why}. The same command asks "
              "again")


def kind(record: dict, task: str) -> str:
    if task == "filter":
        return "kept" if record["keep"] else "rejected"
    return "ranges" if record["length_range"][1] else "unanswerable"


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
