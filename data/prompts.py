"""Prompts: reading JSONL, length ranges, templates, and the order in which a run uses them.

A line is an object with the request under `prompt`, `query`, `question` or `instruction`, and the requested
length in words (Chinese: characters) under `length_range` or `range` as [lo, hi], or under `length` as one
number, which means 10 % below to 10 % above. Without a length the length reward of that prompt is missing.
Files of LongBench-Write and WritingBench load unchanged.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lib.files import locate
from lib.options import UserError, parse_json, shown

QUERY_FIELDS = ("prompt", "query", "question", "instruction")
RANGE_FIELDS = ("length_range", "range")
ID_FIELDS = ("id", "index", "idx")

# Completion prompts for a base model (paper, appendix; the wording is ours), chosen by the query's language
TEMPLATES = {
    ("think", "en"): (
        "The assistant answers a request for writing. First it thinks deeply inside <think></think>: it "
        "plans to cover every aspect, asks itself clarifying questions where the request is ambiguous, "
        "explores several approaches, weighs coherence, clarity, style, tone, audience and purpose, then "
        "reviews and refines. The finished work stands inside <answer></answer>.\n"
        "<|user|>: {query} <|assistant|>:"),
    ("direct", "en"): (
        "The assistant answers a request for writing. It writes the finished work at once, inside "
        "<answer></answer>.\n<|user|>: {query} <|assistant|>:"),
    ("think", "zh"): (
        "助手回应用户的写作要求。先在<think></think>之内深入思考：制定计划，顾及要求的每一个方面；"
        "要求含糊时向自己提出澄清性的问题，尝试多种思路；权衡连贯、清晰、风格、语气、读者与目的，再检查并改进。"
        "成稿写在<answer></answer>之内。\n<|用户|>: {query} <|助手|>:"),
    ("direct", "zh"): (
        "助手回应用户的写作要求，直接写出成稿，放在<answer></answer>之内。\n<|用户|>: {query} <|助手|>:"),
}
STYLES = tuple(dict.fromkeys(style for style, _ in TEMPLATES))

STOP = "</answer>,<|user|>,<|用户|>"  # comma-separated strings that end a text in these templates
TOKENS_PER_WORD = {"en": 1.3, "zh": 0.7}  # of Qwen2.5's tokenizer; per character in Chinese
THINK_SHARE = 0.15  # share of the token budget for thinking (2,100 of 14,000; the paper's models use 2-3k)


@dataclass(frozen=True)
class Prompt:
    id: str
    text: str  # the query inside its template, as the model reads it
    query: str
    length_range: tuple[int, int] | None  # words, both ends included
    language: str  # "en" | "zh"
    style: str = "think"  # of the template, and of the structure that the format reward expects


def language(query: str) -> str:
    return "zh" if re.search("[\u4e00-\u9fff]", query) else "en"


def render(query: str, style: str) -> str:
    return TEMPLATES[style, language(query)].replace("{query}", query)


def frame(query: str) -> str:
    """The last line of the template, without the instruction, as a writing model reads it."""
    return TEMPLATES["direct", language(query)].split("\n")[-1].replace("{query}", query)


def parse_range(record: dict) -> tuple[int, int] | None:
    """The length range of a record, None if it has no length. Raises ValueError."""
    for field in RANGE_FIELDS:
        if (value := record.get(field)) is not None:
            whole = isinstance(value, list) and len(value) == 2 and all(type(x) is int for x in value)
            if not whole or not 0 <= value[0] <= value[1] < 1e7:
                raise ValueError(f"`{field}` must be two whole numbers [lo, hi] with 0 <= lo <= hi < 1e7, "
                                 f"not {shown(value)}")
            return value[0], value[1]
    if (length := record.get("length")) is None:
        return None
    if type(length) not in (int, float) or not 1 <= length < 1e7:
        raise ValueError(f"`length` must be a positive number of words, not {shown(length)}")
    return round(0.9 * length), round(1.1 * length)


def unreachable(prompt: Prompt, max_new_tokens: int) -> bool:
    """Whether even the shortest requested answer exceeds the token budget, of which thinking takes a part."""
    if prompt.length_range is None:
        return False
    budget = max_new_tokens * (1 - THINK_SHARE if prompt.style == "think" else 1)
    return prompt.length_range[0] * TOKENS_PER_WORD[prompt.language] > budget


def present(record: dict, names, default=None):
    """The record's value under the first of the names that has one."""
    return next((record[name] for name in names if record.get(name) is not None), default)


def objects(path: str | Path, what: str = "prompts",
            broken: list[str] | None = None) -> Iterator[tuple[int, dict]]:
    """(line number, object) of each non-empty line of a JSONL file. Raises UserError; with a list `broken`,
    the messages of invalid lines are appended to it instead."""
    try:
        with open(path, "rb") as lines:  # bytes, because JSON allows other line separators
            if lines.peek(4)[:4] == b"PAR1":
                raise UserError(f"{path} is a Parquet file: convert it to JSONL, for example by "
                                "pandas.read_parquet(FILE).to_json(OUT, orient='records', lines=True)")
            for number, line in enumerate(lines, 1):
                try:
                    if line.strip():
                        yield number, parse_json(line)
                except ValueError as e:
                    if broken is None:
                        raise UserError(f"{path}, line {number}: {e}") from None
                    broken.append(f"{path}, line {number}: {e}")
    except OSError as e:
        raise UserError(f"{what} file {path} cannot be read ({e}): give a JSONL file, one object a line"
                        ) from None


def query_of(record: dict) -> str:
    """The request of a record. Raises ValueError."""
    for field in QUERY_FIELDS:
        if isinstance(query := record.get(field), str) and query.strip():
            query.encode()  # raises UnicodeEncodeError for a lone surrogate, which the tokenizer cannot read
            return query
    raise ValueError(f"no text under any of {', '.join(QUERY_FIELDS)}")


def queries(path: str | Path) -> Iterator[tuple[int, str, str, dict]]:
    """(line number, id, query, record) of each line of a file. Raises UserError."""
    seen = {}
    for number, record in objects(path):
        ident = present(record, ID_FIELDS, number)
        try:
            if type(ident) not in (str, int, float):
                raise ValueError(f"an id must be a string or a number, not {shown(ident)}")
            query, ident = query_of(record), str(ident)
            ident.encode()  # raises UnicodeEncodeError for a lone surrogate
            if ident in seen:
                raise ValueError(f"id {shown(ident)} is already on line {seen[ident]}; ids seed the "
                                 "sampling and must differ")
        except ValueError as e:
            raise UserError(f"{path}, line {number}: {e}") from None
        seen[ident] = number
        yield number, ident, query, record


def read(path: str | Path, style: str, max_new_tokens: int,
         keep_unreachable: bool = False) -> tuple[list[Prompt], Counter]:
    """The usable prompts of a JSONL file, in its order, and the numbers of dropped ones by reason: `rejected`
    (`keep` is false), `unanswerable` (range [0, 0]) and `unreachable` (unless kept). Raises UserError for a
    missing file or an invalid line."""
    prompts, dropped = [], Counter()
    for number, ident, query, record in queries(path):
        try:
            length_range = parse_range(record)
        except ValueError as e:
            raise UserError(f"{path}, line {number}: {e}") from None
        prompt = Prompt(ident, render(query, style), query, length_range, language(query), style)
        if record.get("keep") is False:
            dropped["rejected"] += 1
        elif length_range == (0, 0):
            dropped["unanswerable"] += 1
        elif not keep_unreachable and unreachable(prompt, max_new_tokens):
            dropped["unreachable"] += 1
        else:
            prompts.append(prompt)
    return prompts, dropped


def batch(prompts: list[Prompt], size: int, seed: int, step: int) -> list[Prompt]:
    """The prompts of a step, counted from 1; the same on all ranks.

    A pure function, so that a resumed run needs the step alone. Every epoch has its own order, and drops its
    last len(prompts) mod size prompts: a batch across two epochs could hold a prompt twice, whose samples
    would have equal seeds.
    """
    epoch, place = divmod(step - 1, len(prompts) // size)
    shuffled = list(prompts)
    random.Random(f"{seed}/{epoch}").shuffle(shuffled)
    return shuffled[place * size:(place + 1) * size]


def load(config, option: str, need: int, why: str, tokenizer,
         context: int) -> tuple[list[Prompt], dict[str, int]]:
    """The usable prompts of the file that an option names, and the numbers of dropped ones by reason.

    config: prompt_style, max_new_tokens, unreachable. Raises UserError if fewer than `need` are usable, or if
    one exceeds the model's context together with its answer.
    """
    path = getattr(config, option)
    prompts, dropped = read(locate(path), config.prompt_style, config.max_new_tokens,
                            config.unreachable == "keep")
    if len(prompts) < need:
        raise UserError(f"{option} {path} has {len(prompts)} usable prompts (dropped: "
                        f"{dict(dropped) or 'none'}), but {why} needs {need}")
    most = (context + 1) * max(map(len, tokenizer.token_bytes))  # characters that decide whether it fits
    for prompt in prompts:
        if (tokens := len(tokenizer.encode(prompt.text[:most]))) + config.max_new_tokens > context:
            raise UserError(f"{option} {path}: prompt {shown(prompt.id)} has {tokens} tokens or more, and "
                            f"with max_new_tokens {config.max_new_tokens} it exceeds the model's context of "
                            f"{context}: shorten it, or lower max_new_tokens")
    return prompts, dict(dropped)
