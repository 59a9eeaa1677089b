"""Runs and results of scripts.evaluate as one page: curves, tables, Elo, and all texts.

    python -m scripts.report PATH [PATH ...] [--out report.html] [--pin NAME=RATING,...]

A path is the folder of a run, also of one that goes on, or of a result. Of runs the page has curves of all
metrics, metrics along the text, what differs between the first two, and every sample of every step: its data
lies in OUT_data/ beside the page, and a later call makes what is new. Of results, a column is a result, a
section a benchmark. Elo is fitted to the games of all results that one judge
judged; a baseline called as a result is that player. --pin fixes ratings, otherwise the baselines' mean
is 1000. Of two results each score is compared record by record, and the same numbers stand as JSON beside
the page, which needs nothing but a browser.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from evaluation import elo
from lib import options
from lib.files import read_jsonl, replace
from lib.options import UserError, read_json
from viewer import page, runs

BENCHMARKS = {"longbench_write": ("LongBench-Write", 100),  # title, scale of its scores
              "ruler": ("LongWrite-Ruler", 100), "writingbench": ("WritingBench", 10),
              "arena": ("Arena-Write", 1)}
ROUNDS, SEED = 1000, 0  # of the bootstrap behind the intervals of ratings
KEPT = ("label", "folder", "benchmark", "data", "model", "sampling", "judge", "made", "code")


@dataclass
class Config:
    paths: tuple = ()  # folders of runs, and of results of scripts.evaluate
    out: str = "report.html"  # the page; data and JSON stand beside it
    pin: str = ""  # ratings of players that stay as they are: NAME=RATING,...


# ---------------------------------------------------------------------- reading


def read(folder: Path) -> dict:
    """A result with its `answers` and `verdicts`. Raises UserError."""
    result = read_json(folder / "result.json", "give folders of runs or of finished evaluations")
    try:
        result |= {"folder": str(folder)}
        result["answers"] = read_jsonl(folder / "answers.jsonl")
        result["verdicts"] = read_jsonl(folder / "verdicts.jsonl") if result["judge"] else []
        if [r["id"] for r in result["records"]] != [a["id"] for a in result["answers"]]:
            raise ValueError("answers.jsonl has other records than result.json")
        BENCHMARKS[result["benchmark"]], data_of(result), judge_of(result), result["name"]
        return result
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{folder} is no result ({type(e).__name__}: {e}): give folders of "
                        "runs or of finished evaluations") from None


def grouped(results: list[dict]) -> dict[str, list[dict]]:
    """By benchmark, each with a `label` that is its own. Raises UserError."""
    groups = {name: [r for r in results if r["benchmark"] == name] for name in BENCHMARKS}
    for group in groups.values():
        names = [r["name"] for r in group]
        for r in group:
            r["label"] = r["name"] if names.count(r["name"]) == 1 else f"{r['name']} ({r['folder']})"
            if r["data"]["sha256"] != group[0]["data"]["sha256"]:
                raise UserError(f"{group[0]['folder']} and {r['folder']} are of different data "
                                f"({data_of(group[0])}; {data_of(r)}): give results of one file")
        if len({r["label"] for r in group}) < len(group):
            raise UserError(f"a folder is given twice: {', '.join(r['folder'] for r in group)}")
    return {name: group for name, group in groups.items() if group}


def data_of(result: dict) -> str:
    data = result["data"]
    return (f"{data['file']}, {data['records']:,} records, sha256 {data['sha256'][:12]}"
            + f", commit {data['commit']}" * bool(data["commit"]))


def settings(values: dict) -> str:
    return ", ".join(f"{name} {value[:12] if name == 'fingerprint' else value}"
                     for name, value in values.items())


def judge_of(result: dict) -> str:
    """The judge and its settings: judged scores compare only where this is equal."""
    judge = result["judge"]
    return f"{judge['name']} ({settings(judge['settings'])})" if judge else "none"


def about(results: list[dict]) -> dict[str, str]:
    """Data, judge, sampling and model of each result; under `all` what they have in common."""
    def facts(r: dict) -> list[str]:
        return [data_of(r), f"judge {judge_of(r)}", settings(r["sampling"]), f"{len(r['records'])} answers",
                f"{r['folder']}, {r['made']}",
                f"{r['model']['path']} (weights {r['model']['fingerprint'][:12]})"]

    every = {r["label"]: facts(r) for r in results}
    common = [fact for fact in facts(results[0]) if all(fact in facts for facts in every.values())]
    own = {name: [fact for fact in facts if fact not in common] for name, facts in every.items()}
    return {name: "; ".join(facts) for name, facts in ({"all": common} | own).items() if facts}


# ---------------------------------------------------------------------- comparing


def rows(results: list[dict], kind: str) -> dict[str, list]:
    """The values of each score, or of `texts`, that at least one result has."""
    names = dict.fromkeys(name for r in results for name, x in r[kind].items() if x is not None)
    return {name: [r[kind].get(name) for r in results] for name in names}


def ratings(results: list[dict], pinned: dict[str, float]) -> dict:
    """Elo over the games of results that one judge judged. Raises ValueError."""
    games = [[r["label"], *game[1:]] for r in results for game in r.get("games", [])]
    return {"judge": judge_of(results[0]), "rounds": ROUNDS, "seed": SEED, "players": {
        name: dataclasses.asdict(p) | {"pinned": name in pinned}
        for name, p in elo.fit(games, pinned, ROUNDS, SEED).items()}}


def section(results: list[dict], pinned: dict[str, float]) -> dict:
    """The comparison of a benchmark's results. Raises UserError."""
    scores, texts = (rows(results, kind) for kind in ("scores", "texts"))
    notes, judges = [], {}
    for r in (r for r in results if r["judge"]):
        judges.setdefault(judge_of(r), []).append(r)
    judged = {name for name in scores if "S_l" not in name} if len(judges) > 1 else set()
    if judged:
        notes.append("The judges differ: scores with * do not compare between them.")
    try:
        fits = [ratings(group, pinned) for group in judges.values()
                if any(game[3] is not None for r in group for game in r.get("games", []))]
        compared = {name: dataclasses.asdict(d) for field in ("scores", "texts") if len(results) == 2
                    for name, d in elo.paired(*results[::-1], field=field, without=judged).items()}
    except ValueError as e:
        raise UserError(f"{', '.join(r['folder'] for r in results)}: {e}") from None
    if any(p["virtual"] for fit in fits for p in fit["players"].values()):
        notes.append("A player won or lost every game: only virtual ties keep these ratings finite.")
    title, scale = BENCHMARKS[results[0]["benchmark"]]
    return {"title": title, "scale": scale, "about": about(results), "notes": notes,
            "judged_apart": sorted(judged), "results": [{key: r[key] for key in KEPT} for r in results],
            "scores": scores, "texts": texts, "elo": fits, "differences": compared}


# ---------------------------------------------------------------------- showing


def describe_verdict(line: dict) -> tuple[str, str]:
    """Heading and reason of a line of verdicts.jsonl."""
    key, verdict = line["key"], line["verdict"]
    if verdict is None:
        return f"{key} no valid verdict".strip(), line["error"]
    values = {name: x for name, x in verdict.items() if name not in ("analysis", "reason")}
    if "winner" in verdict:
        name, ours = key[:-2], "AB"[int(key[-1])]
        outcome = {ours: "wins", "tie": "tie"}.get(values.pop("winner"), "loses")
        key = f"{name}, read {'first' if ours == 'A' else 'second'}: {outcome}"
    elif key:
        key = f"criterion {int(key[1:]) + 1}:"
    return f"{key} {settings(values)}".strip(), verdict.get("analysis", verdict.get("reason", ""))


def reader(results: list[dict], judged_apart: list[str]) -> dict:
    """A view of the page's reader: records, each with an answer of each result."""
    records = {}
    for i, r in enumerate(results):
        verdicts = {}
        for line in r["verdicts"]:
            verdicts.setdefault(line["id"], []).append(describe_verdict(line))
        for a, row in zip(r["answers"], r["records"]):
            asked = f"{a['required']:,} words asked for" if a["required"] else ""
            record = records.setdefault(a["id"], {
                **{key: a[key] for key in ("id", "query", "language", "required")}, "heading": a["query"],
                "facts": " · ".join(filter(None, (a["domain"], a["kind"], asked))),
                "samples": [{"name": r["label"], "facts": "has no such record"} for r in results]})
            scores = [f"{name}{'*' * (name in judged_apart)} {page.shown([x])[0]}"
                      for name in ("S_l", "S_q", "overall", "win_rate")
                      if (x := row["scores"].get(name)) is not None]
            tokens = f"{a['tokens']:,} tokens" + ", cut off" * (a["finish_reason"] == "length")
            record["samples"][i] = {
                **{key: a[key] for key in ("answer", "think", "words")}, "name": r["label"],
                "copies": runs.copied(a["answer"]),
                "response": "" if a["answer"] else a["response"], "verdicts": verdicts.get(a["id"], []),
                "facts": " · ".join([f"{a['words']:,} words", *scores, tokens])}
    return {"title": BENCHMARKS[results[0]["benchmark"]][0], "name": "", "groups": [*records.values()],
            "prompts": [*records], "judges": [r["judge"] and r["judge"]["name"] for r in results]}


def aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
            for row in rows]


def show(part: dict) -> str:
    """A section as lines for a terminal."""
    (head, *scores), (_, *texts) = (page.score_rows(part, kind) for kind in ("scores", "texts"))
    lines = [part["title"], *aligned([head, *scores, [""] * len(head), *texts])]
    lines += ["", *(f"{name}: {text}" for name, text in part["about"].items()), *part["notes"]]
    for fit in part["elo"]:
        lines += ["", f"Elo, judge {fit['judge']}, {fit['rounds']:,} rounds, seed {fit['seed']}",
                  *aligned(page.elo_rows(fit))]
    return "\n".join(lines)


def pins(text: str, groups: dict[str, list[dict]]) -> dict[str, float]:
    """Raises UserError."""
    arena = groups.get("arena", [])
    players = sorted({name for r in arena for game in r["games"] for name in (r["label"], game[1])})
    found = {}
    for part in filter(None, text.split(",")):
        name, _, rating = part.rpartition("=")
        try:
            found[name] = float(rating)
        except ValueError:
            raise UserError(f"--pin must be NAME=RATING,..., not {part!r}") from None
        if name not in players:
            raise UserError(f"--pin: {name!r} plays no game; the players: {', '.join(players)}")
    return found


@options.command
def main():
    config = options.parse(Config, sys.argv[1:], __doc__, "paths")
    out, paths = Path(config.out), [Path(path) for path in config.paths]
    if out.suffix != ".html":
        raise UserError(f"--out must end in .html, not be {out}: data and JSON stand beside it")
    trained = [path for path in paths if (path / "metrics.jsonl").exists()]
    groups = grouped([read(path) for path in paths if path not in trained])
    pinned = pins(config.pin, groups)
    sections = [section(group, pinned) for group in groups.values()]
    readers = [reader(group, part["judged_apart"]) for group, part in zip(groups.values(), sections)]
    data = out.with_name(f"{out.stem}_data")
    found = runs.gather(trained, data)
    replace(out, page.render(sections, readers + found["views"], found["runs"], found["diff"], data.name))
    written = [str(out)] + [str(data)] * bool(trained)
    if sections:
        replace(out.with_suffix(".json"), json.dumps(sections, ensure_ascii=False, indent=1) + "\n")
        written.append(str(out.with_suffix(".json")))
    print("\n\n".join([*map(show, sections), ", ".join(written)]))


if __name__ == "__main__":
    main()
