"""Preferences: pairs of answers to one request, of which people or models preferred the first.

A line of JSONL is an object with the request under `prompt`, `query`, `question` or `instruction`, and either
the two sides (under the names of SIDES), or several responses with scores (RESPONSES, TEXTS, SCORES), any two
of which that differ in score make a pair. A text may be a list of chat messages, as in UltraFeedback: the
last is the answer, and what stands before it is the request where the record has none. `kind`, where there is
one, is reported by itself.
"""

import itertools
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from data.prompts import QUERY_FIELDS, objects, present
from lib.options import UserError

SIDES = (("chosen", "rejected"), ("chosen_response", "rejected_response"), ("preferred", "dispreferred"),
         ("win", "lose"))
RESPONSES = ("responses", "completions", "answers", "outputs")
TEXTS = ("response", "text", "content", "answer", "output", "completion")
SCORES = ("score", "overall_score", "rating", "reward", "scores", "ratings")


@dataclass(frozen=True)
class Pair:
    query: str
    chosen: str
    rejected: str
    kind: str = ""


def plain(text) -> str:
    """The text itself, or that of the last of a list of chat messages. Raises ValueError."""
    text = text[-1].get("content") if isinstance(text, list) and text and isinstance(text[-1], dict) else text
    if not isinstance(text, str):
        raise ValueError(f"a text must be a string or a list of chat messages, not {str(text)[:80]!r}")
    text.encode()  # a lone surrogate would fail in the tokenizer, far from here
    return text.strip()


def rated(record: dict, responses: list) -> list[tuple[str, float]]:
    """(text, score) of each response: of objects, or of texts beside a list of scores. Raises ValueError."""
    if isinstance(given := present(record, SCORES), list) and len(given) != len(responses):
        raise ValueError(f"{len(responses)} responses, but {len(given)} scores")
    scores = given if isinstance(given, list) else [present(r, SCORES) if isinstance(r, dict) else None
                                                    for r in responses]
    for score in scores:
        if type(score) not in (int, float) or not math.isfinite(score):
            raise ValueError(f"each response needs a number under one of {', '.join(SCORES)}, not {score!r}")
    return [(plain(present(r, TEXTS) if isinstance(r, dict) else r), s) for r, s in zip(responses, scores)]


def pairs_of(record: dict) -> list[Pair]:
    """Raises ValueError for a record that is none."""
    query, kind = present(record, QUERY_FIELDS), str(present(record, ["kind"], ""))
    for names in SIDES:
        if all(name in record for name in names):
            sides = [record[name] for name in names]
            if query is None and all(isinstance(side, list) and len(side) > 1 for side in sides):
                query = "\n\n".join(plain([message]) for message in sides[0][:-1])
            texts = [tuple(map(plain, sides))]
            break
    else:
        if not isinstance(responses := present(record, RESPONSES), list):
            raise ValueError(f"neither {' and '.join(SIDES[0])} nor a list under {', '.join(RESPONSES)}")
        both = itertools.combinations(rated(record, responses), 2)
        texts = [(a, b) if x > y else (b, a) for (a, x), (b, y) in both if x != y]
    if query is None or not (query := plain(query)):
        raise ValueError(f"no text under any of {', '.join(QUERY_FIELDS)}")
    return [Pair(query, *sides, kind) for sides in texts]


def read(path: str | Path) -> tuple[list[Pair], Counter]:
    """All pairs of a JSONL file, in its order, and how many were dropped: `empty` sides, `equal` ones. Raises
    UserError for a missing file or a malformed line."""
    pairs, dropped = [], Counter()
    for number, record in objects(path, "preference"):
        try:
            found = pairs_of(record)
        except ValueError as e:
            raise UserError(f"{path}, line {number}: {e}") from None
        for pair in found:
            why = ("empty" if not (pair.chosen and pair.rejected) else
                   "equal" if pair.chosen == pair.rejected else "")
            dropped[why] += bool(why)
            pairs += [] if why else [pair]
    return pairs, +dropped
