"""Scores of a benchmark from answers and verdicts, as papers report them, and statistics without a judge.

Each score is a mean over records, so every record has scores of the same names; a group such as
"domain1/Education" is a score that only its records have. A missing verdict is left out and counted. A
missing answer gets the lowest verdict; otherwise a model could gain by not answering.
"""

from evaluation.benchmarks import DIMENSIONS, VERDICTS, Record, keys
from text import length_score, statistics

BINS = ((500, "<500"), (2000, "500-2k"), (4000, "2k-4k"), (float("inf"), ">=4k"))  # of required words
HEADLINES = {"longbench_write": ("S_l", "S_q", "overall"), "ruler": ("S_l",),
             "writingbench": ("overall",), "arena": ("win_rate",)}  # given for each language too
Weighted = dict[str, tuple[float | None, int]]  # name -> a record's score and its weight


def aggregate(benchmark: str, records: list[Record], answers: list[dict], verdicts: list[dict] | None,
              name: str = "model", style: str = "think") -> tuple[dict, list[dict], list[list]]:
    """(scores {name: number or None}, a row {id, scores, texts} of each record, games).

    answers: a line of answers.jsonl for each record, in their order. verdicts: the lines of verdicts.jsonl;
    None: without a judge, and judged scores are None. name: the model's in games. style: of the prompts.
    """
    verdict_of = {(line["id"], line["key"]): line["verdict"] for line in verdicts or ()}
    judged, rows, founds, games, missing = verdicts is not None, [], [], [], 0
    for record, answer in zip(records, answers, strict=True):
        silent = judged and not answer["answer"]
        got = {key: lowest(benchmark, key) if silent else verdict_of.get((record.id, key))
               for key in keys(benchmark, record)}
        missing += sum(verdict is None for verdict in got.values())
        found = SCORES[benchmark](record, answer, got)
        found |= {f"{record.language}/{score}": found[score] for score in HEADLINES[benchmark]}
        founds.append(found)
        rows.append({"id": record.id, "scores": {score: value for score, (value, _) in found.items()},
                     "texts": statistics(answer["response"], record.query, style,
                                         answer["finish_reason"] == "length")})
        if judged:
            games += [[name, baseline, record.id, game(got[f"{baseline}/0"], got[f"{baseline}/1"])]
                      for baseline in record.baselines]
    by_length = [founds[i] for i in sorted(range(len(records)), key=lambda i: records[i].required or 0)]
    names = sorted(dict.fromkeys(score for found in by_length for score in found), key=order)
    scores = {score: mean([found[score] for found in founds if score in found]) for score in names}
    if benchmark == "longbench_write":  # S_l counts where a verdict is missing too
        for group in "", "en/", "zh/":
            if scores.get(f"{group}S_q") is not None:
                scores[f"{group}overall"] = (scores[f"{group}S_l"] + scores[f"{group}S_q"]) / 2
    if judged and benchmark == "arena":
        scores["games_answered"] = sum(found["win_rate_answered"][1] for found in founds)
    return scores | ({"missing_verdicts": missing} if judged else {}), rows, games


def mean(pairs: list[tuple[float | None, int]]) -> float | None:
    """Weighted mean of (value or None, weight) pairs; None if all values are None."""
    weight = sum(w for value, w in pairs if value is not None)
    return sum(value * w for value, w in pairs if value is not None) / weight if weight else None


def order(score: str) -> tuple:
    """Sort key: headline scores, then languages, then each kind of group."""
    group, slash, _ = score.partition("/")
    return bool(slash), group not in ("en", "zh"), group if slash else ""


def lowest(benchmark: str, key: str) -> dict:
    """The verdict for a missing answer."""
    if benchmark == "arena":
        return {"winner": "B" if key.endswith("/0") else "A"}
    return {name: min(values) for name, values in VERDICTS[benchmark].items()}


# ---------------------------------------------------------------------- a record's scores


def longbench_write(record: Record, answer: dict, got: dict) -> Weighted:
    length, verdict = length_score(record.required, answer["words"]), got[""]
    points = {f"S_q/{name}": verdict and 25 * (verdict[name] - 1) for name in DIMENSIONS}
    quality = verdict and sum(points.values()) / len(points)
    bin = next(name for most, name in BINS if record.required < most)
    return each({"S_l": length, "S_q": quality, "overall": verdict and (length + quality) / 2,
                 f"S_l/{bin}": length, **points})


def ruler(record: Record, answer: dict, got: dict) -> Weighted:
    length, required = length_score(record.required, answer["words"]), record.required
    return each({"S_l": length, f"S_l/{required}": length, f"words/{required}": answer["words"]})


def writingbench(record: Record, answer: dict, got: dict) -> Weighted:
    """`overall` and a requirement's criteria (C) are means over verdicts; domains and R are means over
    records."""
    given = [verdict and verdict["score"] for verdict in got.values()]
    overall = over(given)
    found = {"overall": overall}
    for requirement, places in record.requirements.items():
        criteria = requirement.endswith("_C")
        found[requirement] = over([given[i] for i in places]) if criteria else (overall[0], 1)
    return found | each({f"domain1/{record.domain}": overall[0], f"domain2/{record.kind}": overall[0]})


def arena(record: Record, answer: dict, got: dict) -> Weighted:
    """Shares of the points; win_rate_answered counts games where both sides wrote an answer. Consistency is
    the share of games on which the judge's two verdicts agree."""
    pairs = {b: (got[f"{b}/0"], got[f"{b}/1"]) for b in record.baselines}
    games = {b: game(*pair) for b, pair in pairs.items()}
    agreed = [agree(*pair) for pair in pairs.values() if None not in pair and answer["answer"]]
    answered = [games[b] for b, text in record.baselines.items() if text and answer["answer"]]
    return {"win_rate": over(list(games.values())), "win_rate_answered": over(answered),
            "consistency": over(agreed), **{f"win_rate/{b}": over([game]) for b, game in games.items()}}


def points(verdict: dict, mine: str) -> float:
    """Points of a verdict for the text A or B."""
    return 0.5 if verdict["winner"] == "tie" else float(verdict["winner"] == mine)


def game(first: dict | None, second: dict | None) -> float | None:
    """The model's points from two verdicts, with its text as A and as B: 1 or 0 if they agree, otherwise
    0.5."""
    if first is None or second is None:
        return None
    return points(first, "A") if agree(first, second) else 0.5


def agree(first: dict, second: dict) -> bool:
    return points(first, "A") == points(second, "B")


def each(scores: dict) -> Weighted:
    return {name: (value, 1) for name, value in scores.items()}


def over(values: list) -> tuple[float | None, int]:
    """Mean of the values that are not None, and their number."""
    given = [value for value in values if value is not None]
    return (sum(given) / len(given) if given else None), len(given)


SCORES = {"longbench_write": longbench_write, "ruler": ruler, "writingbench": writingbench,
          "arena": arena}

# ---------------------------------------------------------------------- texts


def text_means(rows: list[dict], answers: list[dict]) -> dict[str, float | None]:
    """Mean of each text statistic over the rows of `aggregate`, and the shares of missing and of truncated
    answers."""
    means = {name: mean([(row["texts"][name], 1) for row in rows]) for name in rows[0]["texts"]}
    return means | {"missing_answers": mean([(not answer["answer"], 1) for answer in answers]),
                    "truncated": mean([(answer["finish_reason"] == "length", 1) for answer in answers])}
