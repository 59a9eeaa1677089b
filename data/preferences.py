"""Preferences: pairs of answers to one request, the first of which people or models preferred.

A line of JSONL is an object with the request under `prompt`, `query`, `question` or `instruction`, and either
the two sides (under the names of SIDES), or several responses with scores (RESPONSES, TEXTS, SCORES): any two
that differ in score make a pair. A text may be a list of chat messages, as in UltraFeedback: the last one is
the answer, and the others are the request if the record has no other. train_rm reports each `kind` apart.
"""

import itertools
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
    """The text, or that of the last of a list of chat messages. Raises ValueError."""
    text = text[-1].get("content") if isinstance(text, list) and text and isinstance(text[-1], dict) else text
    if not isinstance(text, str):
        raise ValueError(f"a text must be a string or a list of chat messages, not {str(text)[:80]!r}")
    text.encode()  # raises UnicodeEncodeError for a lone surrogate, which the tokenizer cannot read
    return text.strip()


def rated(record: dict, responses: list) -> list[tuple[str, float]]:
    """(text, score) of each response, from objects or from texts and a list of scores. Raises ValueError."""
    responses = [r if isinstance(r, dict) else {"text": r} for r in responses]
    scores = present(record, SCORES)
    if not isinstance(scores, list):
        scores = [present(r, SCORES) for r in responses]
    if len(scores) != len(responses):
        raise ValueError(f"{len(responses)} responses, but {len(scores)} scores")
    for score in scores:
        if type(score) not in (int, float):
            raise ValueError(f"each response needs a number under one of {', '.join(SCORES)}, not {score!r}")
    return [(plain(present(r, TEXTS)), score) for r, score in zip(responses, scores)]


def pairs_of(record: dict) -> list[Pair]:
    """The pairs of a record. Raises ValueError."""
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
            raise ValueError(f"there are neither {' and '.join(SIDES[0])} nor a list under any of "
                             f"{', '.join(RESPONSES)}")
        both = itertools.combinations(rated(record, responses), 2)
        texts = [(a, b) if x > y else (b, a) for (a, x), (b, y) in both if x != y]
    if query is None or not (query := plain(query)):
        raise ValueError(f"no text under any of {', '.join(QUERY_FIELDS)}")
    return [Pair(query, *sides, kind) for sides in texts]


def read(path: str | Path) -> tuple[list[Pair], Counter]:
    """All pairs of a JSONL file, in its order, and how many were dropped because a side is `empty` or both
    are `equal`. Raises UserError for a missing file or an invalid line."""
    pairs, dropped = [], Counter()
    for number, record in objects(path, "preference"):
        try:
            found = pairs_of(record)
        except ValueError as e:
            raise UserError(f"{path}, line {number}: {e}") from None
        for pair in found:
            if not (pair.chosen and pair.rejected):
                dropped["empty"] += 1
            elif pair.chosen == pair.rejected:
                dropped["equal"] += 1
            else:
                pairs.append(pair)
    return pairs, dropped
