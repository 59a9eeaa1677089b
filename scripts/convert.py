"""Queries out of others' files, for scripts.annotate.

    python -m scripts.convert --files wildchat.jsonl,lmsys.jsonl --out queries.jsonl

Takes the first request of each conversation of WildChat-1M and LMSYS-Chat-1M (`conversation`, a list of
{"role", "content"}; `language`), and of any record the text that train.py would read, or a `prompt` or
`messages` that is such a list: LongWriter-Zero-RLData. Of that no description was at hand: it is assumed to
hold each query so, perhaps inside the template <|user|>: ... <|assistant|>:, and a range, if any, under
`length_range`, `range` or `length`, as numbers or as text. Each text is taken once, whatever its punctuation.
"""

import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from data.prompts import ID_FIELDS, RANGE_FIELDS, objects, parse_range, present, query_of
from lib import options
from lib.options import UserError
from text import fold

FRAME = re.compile(r"<\|(?:user|用户)\|>:(.*)<\|(?:assistant|助手)\|>:", re.S)


@dataclass
class Config:
    files: str = ""  # JSONL, comma-separated
    out: str = ""  # JSONL of {"id", "prompt", "source", perhaps "length_range"}
    languages: str = "English,Chinese"  # that are taken, where a record names its own
    min_chars: int = 10  # of a query
    max_chars: int = 10000


def request_of(record: dict) -> str:
    """The first thing that a user says in it; empty where nobody says anything."""
    lists = [record[f] for f in ("conversation", "messages", "prompt") if isinstance(record.get(f), list)]
    said = [turn.get("content") for turn in sum(lists[:1], [])
            if isinstance(turn, dict) and turn.get("role") == "user"]
    try:
        text = query_of({"prompt": (said or [None])[0]} if lists else record)
    except ValueError:
        return ""
    framed = FRAME.search(text)
    return (framed.group(1) if framed else text).strip()


def range_of(record: dict) -> list[int] | None:
    """Raises ValueError."""
    def numbers(value):
        """Those of a text; one alone is no list, and of none the text is left, unless it is empty."""
        if not isinstance(value, str):
            return value
        found = [int(n) for n in re.findall(r"\d+", value)]
        return found[0] if len(found) == 1 else found or value.strip() or None

    found = parse_range({f: numbers(record.get(f)) for f in (*RANGE_FIELDS, "length")})
    return found and list(found)


def listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def convert(config: Config) -> Counter:
    """Writes the queries; counts what became of the records."""
    counts, seen, broken, languages = Counter(), set(), [], listed(config.languages.lower())
    files, beside = listed(config.files), Path(f"{config.out}.writing")
    if Path(config.out).resolve() in [Path(path).resolve() for path in files]:
        raise UserError(f"out {config.out} is one of the files: choose another")
    with beside.open("w", encoding="utf-8", errors="replace") as out:  # `source` may be any text
        for path in files:
            for number, record in objects(path, broken=broken):
                try:
                    text, length_range = request_of(record), range_of(record)
                except ValueError as e:
                    broken.append(f"{path}, line {number}: {e}")
                    continue
                ident = blake2b(fold(text).tobytes() or text.encode(), digest_size=8).hexdigest()
                spoken = record.get("language")
                fate = ("without a request" if not text else
                        "in another language" if spoken and str(spoken).lower() not in languages else
                        "too short" if len(text) < config.min_chars else
                        "too long" if len(text) > config.max_chars else
                        "repeated" if ident in seen else "taken")
                counts[fate] += 1
                if fate == "taken":
                    seen.add(ident)
                    source = present(record, ("conversation_hash", "conversation_id", *ID_FIELDS), number)
                    made = {"id": ident, "prompt": text, "source": f"{Path(path).name}: {source}"}
                    made |= {"length_range": length_range} if length_range else {}
                    out.write(json.dumps(made, ensure_ascii=False) + "\n")
    if broken:
        counts[f"broken (the first: {broken[0]})"] = len(broken)
    if not counts["taken"]:
        beside.unlink()
        raise UserError(f"{config.files}: no record could be taken ({dict(counts)}): is it of one of the "
                        "forms that --help describes?")
    beside.replace(config.out)
    return counts


@options.command
def main():
    config = options.parse(Config, sys.argv[1:], __doc__)
    for name in ("files", "out"):
        if not getattr(config, name):
            raise UserError(f"--{name} is missing")
    print(f"{config.out}: {', '.join(f'{n} {fate}' for fate, n in convert(config).items())}")


if __name__ == "__main__":
    main()
