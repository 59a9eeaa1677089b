"""Prompts: reading JSONL, length ranges, templates, and the order in which a run sees them.

A line is an object with the request under `prompt`, `query`, `question` or `instruction`, and the wanted
length in words (Chinese: characters) under `length_range` or `range` as [lo, hi], or under `length` as one
number, which stands for 10 % to either side. Without a length the length reward of that prompt is missing.
LongBench-Write and WritingBench files load as they are.
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

# Raw completion prompts for a base model (paper, appendix; the words are ours). The query's language picks
# the twin.
TEMPLATES = {
    ("think", "en"): (
        "The assistant answers a request for writing. First it thinks deeply inside <think></think>: it "
        "plans to cover every aspect, asks "
        "itself clarifying questions where the request is ambiguous, explores several approaches, weighs "
        "coherence, clarity, style, tone, "
        "audience and purpose, then reviews and refines. The finished work stands inside <answer></answer>.\n"
        "<|user|>: {query} <|assistant|>:"), ("direct", "en"): (
        "The assistant answers a request for writing. It writes the finished work at once, inside "
        "<answer></answer>.\n"
        "<|user|>: {query} <|assistant|>:"),
    ("think", "zh"): (
        "助手回应用户的写作要求。先在<think></think>之内深入思考：制定计划，顾及要求的每一个方面；"
        "要求含糊时向自己提出澄清性的问题，尝试多种思路；权衡连贯、清晰、风格、语气、读者与目的，再检查并改进。"
        "成稿写在<answer></answer>之内。\n<|用户|>: {query} <|助手|>:"),
    ("direct", "zh"): (
        "助手回应用户的写作要求，直接写出成稿，放在<answer></answer>之内。\n<|用户|>: {query} <|助手|>:"),
}
STYLES = tuple(dict.fromkeys(style for style, _ in TEMPLATES))

STOP = "</answer>,<|user|>,<|用户|>"  # strings that end a text in these templates, comma-separated
TOKENS_PER_WORD = {"en": 1.3, "zh": 0.7}  # of Qwen2.5's tokenizer; Chinese counts characters
THINK_SHARE = 0.15  # of the token budget is left for thinking (2,100 of 14,000; the paper's models use 2-3k)


@dataclass(frozen=True)
class Prompt:
    id: str
    text: str  # what the model reads: the query inside its template
    query: str
    length_range: tuple[int, int] | None  # words, both ends included
    language: str  # "en" | "zh"
    style: str = "think"  # which template, hence which structure the format reward expects


def language(query: str) -> str:
    return "zh" if re.search("[\u4e00-\u9fff]", query) else "en"


def render(query: str, style: str) -> str:
    return TEMPLATES[style, language(query)].replace("{query}", query)


def frame(query: str) -> str:
    """The last line of the template alone, without an instruction: what a writing model reads."""
    return TEMPLATES["direct", language(query)].split("\n")[-1].replace("{query}", query)


def parse_range(record: dict) -> tuple[int, int] | None:
    """The [lo, hi] of a record, or None if it names no length. Raises ValueError for a value that is no
    range."""
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
    """Whether even the shortest wanted answer does not fit in the token budget, thinking included."""
    if prompt.length_range is None:
        return False
    budget = max_new_tokens * (1 - THINK_SHARE if prompt.style == "think" else 1)
    return prompt.length_range[0] * TOKENS_PER_WORD[prompt.language] > budget


def present(record: dict, names, default=None):
    """The value under the first of the names that the record has."""
    return next((record[name] for name in names if record.get(name) is not None), default)


def objects(path: str | Path, what: str = "prompts",
            broken: list[str] | None = None) -> Iterator[tuple[int, dict]]:
    """Number and object of each line of a JSONL file that is not empty. Raises UserError; for a broken line
    only without a list `broken`, which gets its message otherwise."""
    try:
        with open(path, "rb") as f:
            if f.read(4) == b"PAR1":
                raise UserError(f"{path} is a Parquet file, which needs a package that this program does "
                            "without: make JSONL of it, as by pandas.read_parquet(FILE).to_json(OUT, "
                            "orient='records', lines=True)")
        with open(path, "rb") as lines:  # of bytes, because JSON allows other line separators
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        record = parse_json(line)
                    except ValueError as e:
                        if broken is None:
                            raise UserError(f"{path}, line {number}: {e}") from None
                        broken.append(f"{path}, line {number}: {e}")
                        continue
                    yield number, record
    except OSError as e:
        raise UserError(f"{what} file {path} cannot be read ({e}): give a JSONL file, one object a line"
                    ) from None


def query_of(record: dict) -> str:
    """Raises ValueError."""
    for field in QUERY_FIELDS:
        if isinstance(query := record.get(field), str) and query.strip():
            query.encode()  # a lone surrogate would fail in the tokenizer, far from here
            return query
    raise ValueError(f"no text under any of {', '.join(QUERY_FIELDS)}")


def queries(path: str | Path) -> Iterator[tuple[int, str, str, dict]]:
    """(line, id, query, record) of each. Raises UserError."""
    seen = {}
    for number, record in objects(path):
        ident = present(record, ID_FIELDS, number)
        try:
            if type(ident) not in (str, int, float):
                raise ValueError(f"an id must be a string or a number, not {shown(ident)}")
            query, ident, _ = query_of(record), str(ident), str(ident).encode()
            if ident in seen:
                raise ValueError(f"id {shown(ident)} stands already on line {seen[ident]}; ids seed the "
                                 "sampling and must differ")
        except ValueError as e:
            raise UserError(f"{path}, line {number}: {e}") from None
        seen[ident] = number
        yield number, ident, query, record


def read(path: str | Path, style: str, max_new_tokens: int,
         keep_unreachable: bool = False) -> tuple[list[Prompt], Counter]:
    """All usable prompts of a JSONL file, in its order, and how many were dropped for what.

    Dropped: `rejected` (`keep` is false), `unanswerable` (range [0, 0]) and `unreachable` (unless kept).
    Raises UserError for a missing file or a malformed line.
    """
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


def order(n: int, batch: int, seed: int, cursor: int) -> list[int]:
    """Indices of the `batch` prompts at `cursor`, the count of prompts used so far, out of `n` that are
    reshuffled every epoch.

    A pure function of its arguments, so a resumed run needs the cursor alone. An epoch drops its last n mod
    batch prompts: a batch across two epochs could hold one prompt twice, whose samples, seeded alike, would
    be equal.
    """
    if not 0 < batch <= n:
        raise ValueError(f"a step needs {batch} prompts, but only {n} are usable")
    epoch, start = divmod(cursor, n // batch * batch)
    if start + batch > n // batch * batch:
        raise ValueError(f"cursor {cursor} lies less than a batch of {batch} before the end of its epoch")
    permutation = list(range(n))
    random.Random(f"{seed}/{epoch}").shuffle(permutation)
    return permutation[start:start + batch]


def batch(prompts: list[Prompt], size: int, seed: int, step: int) -> list[Prompt]:
    """The prompts of a step, counted from 1; the same on all ranks."""
    return [prompts[i] for i in order(len(prompts), size, seed, (step - 1) * size)]


def load(config, option: str, need: int, why: str, tokenizer,
         context: int) -> tuple[list[Prompt], dict[str, int]]:
    """The usable prompts of the file that an option names, and how many were dropped for what.

    config: prompt_style, max_new_tokens, unreachable. Raises UserError if fewer than `need` are left, or if
    one does not fit into the model's context with its answer.
    """
    path = getattr(config, option)
    prompts, dropped = read(locate(path), config.prompt_style, config.max_new_tokens,
                            config.unreachable == "keep")
    if len(prompts) < need:
        raise UserError(f"{option} {path} has {len(prompts)} usable prompts (dropped: "
                        f"{dict(dropped) or 'none'}), but {why} needs {need}")
    most = (context + 1) * max(map(len, tokenizer.token_bytes))  # characters: a longer one cannot fit
    for prompt in prompts:
        if (tokens := len(tokenizer.encode(prompt.text[:most]))) + config.max_new_tokens > context:
            raise UserError(f"{option} {path}: prompt {shown(prompt.id)} has {tokens} tokens or more, and "
                            f"with max_new_tokens {config.max_new_tokens} it exceeds the model's context of "
                            f"{context}: shorten it, or lower max_new_tokens")
    return prompts, dict(dropped)
