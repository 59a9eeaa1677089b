"""Records as they are published, a judge's questions and answers, scores by hand and by another way."""

import json
import random
import sqlite3
from pathlib import Path

import pytest

from evaluation import benchmarks
from evaluation.benchmarks import DIMENSIONS, RANGES, Record, parse, questions, read
from evaluation.scores import aggregate, game, text_means
from lib.options import UserError
from tests.helpers import ROOT
from text import length_score, statistics

SHARED = ROOT.parent / "shared" / "data"
real = pytest.mark.skipif(not SHARED.exists(), reason="the real records are not here: ../shared/data")


def jsonl(path: Path, records: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def criterion(name: str) -> dict:
    ranges = {r: f"{name} is {r}" for r in RANGES}
    return {"name": name, "criteria_description": f"About {name}.", **ranges}


def writing(index: int, query: str = "Write.", domain: str = "Education/Plan", names="abcde") -> dict:
    domain1, _, domain2 = domain.partition("/")
    return {"index": index, "query": query, "domain1": domain1, "domain2": domain2,
            "checklist": [criterion(name) for name in names]}


ARENA = {"idx": 1, "question": "Write a poem.", "type": "Poem", "length": 100,
         "baseline_response": {"X/1": "Roses are red.", "Y": "Violets are blue."}}


def answer(ident, text: str = "Some words.", finish_reason: str = "stop", words: int = 2,
           think: str = "Hm.", response: str | None = None) -> dict:
    response = f"<think>{think}</think><answer>{text}</answer>" if response is None else response
    return {"id": str(ident), "answer": text, "think": think, "finish_reason": finish_reason,
            "words": words, "response": response}


def line(ident, key: str, verdict) -> dict:
    return {"id": str(ident), "key": key, "verdict": verdict, "raw": []}


# ---------------------------------------------------------------------- records


@real
def test_the_real_files_are_read():
    """One query of the English file is Chinese: it asks for an English text."""
    records = read("longbench_write", SHARED / "longbench_write/longbench_write.jsonl")
    assert len(records) == 120 and [r.language for r in records].count("en") == 59
    assert len({r.kind for r in records}) == 7 and {100, 20_000} <= {r.required for r in records}
    assert records[0] == Record("1", records[0].query, "en", 100, "Community Forum", "", (), {})
    ruler = read("ruler", SHARED / "longbench_write/longwrite_ruler.jsonl")
    assert [r.required for r in ruler].count(30_000) == 8 == len(ruler) / 6
    records = read("writingbench", SHARED / "writingbench/length_subset.head.jsonl")
    assert [r.id for r in records] == ["16", "23", "24", "33", "35", "38", "43", "45"]
    assert all(len(r.criteria) == 5 and r.domain == "Academic & Engineering" for r in records)
    for record in records:
        asked = questions("writingbench", record, "A text.").values()
        assert len(asked) == 5 and all(record.query in text and "A text." in text for text in asked)


@real
def test_the_real_requirement_files_name_records_and_criteria(tmp_path):
    lines = {name: (SHARED / f"writingbench/length_{name}.head.jsonl").read_text(encoding="utf-8")
             for name in ("subset", "subset_C")}
    (tmp_path / "requirement/length").mkdir(parents=True)
    (tmp_path / "benchmark_all.jsonl").write_text(lines["subset"], encoding="utf-8")
    for name, text in lines.items():
        (tmp_path / f"requirement/length/length_{name}.jsonl").write_text(text, encoding="utf-8")
    records = read("writingbench", tmp_path / "benchmark_all.jsonl")
    assert all(r.requirements["length_R"] == (0, 1, 2, 3, 4) for r in records)
    assert [*sum((r.requirements["length_C"] for r in records), ())] == [4, 3, 4, 2, 0, 4, 0, 4]


def test_arena_and_optional_lengths(tmp_path):
    chinese = ARENA | {"idx": 2, "question": "写一首诗", "length": None}
    one, two = read("arena", jsonl(tmp_path / "a.jsonl", [ARENA, chinese]))
    assert (one.required, one.baselines["Y"], one.language) == (100, "Violets are blue.", "en")
    assert (two.id, two.required, two.language, two.kind) == ("2", None, "zh", "Poem")
    assert benchmarks.keys("arena", one) == ["X/1/0", "X/1/1", "Y/0", "Y/1"]


LONG = {"prompt": "Write.", "type": "News", "length": 100}


@pytest.mark.parametrize("benchmark, record, why", [
    ("longbench_write", LONG | {"length": None},
     "line 2, read as longbench_write: length must be a number .* from 1 to 10,000,000, not None"),
    ("ruler", LONG | {"length": True}, "line 2, read as ruler: length must be .* not True"),
    ("ruler", LONG | {"length": 0}, "line 2, read as ruler: length must be .* not 0"),
    ("ruler", LONG | {"type": 3}, "line 2, read as ruler: type must be a string, not 3"),
    ("ruler", {"type": "News", "length": 100}, "line 2: no text under any of prompt"),
    ("writingbench", writing(2) | {"domain2": None}, "line 2, read as writingbench: domain2 must be a str"),
    ("writingbench", writing(2) | {"checklist": "a"}, "line 2, .*: checklist must be a list, not 'a'"),
    ("writingbench", writing(2) | {"checklist": []}, "line 2, .*: checklist must be a list of criteria"),
    ("writingbench", writing(2) | {"checklist": [{"name": "a"}]}, "line 2, .*: checklist .* 9-10"),
    ("writingbench", writing(1), "line 2: id '1' is already on line 1"),
    ("arena", ARENA | {"idx": 2, "baseline_response": ["a"]}, "line 2, .*: baseline_response must be an obj"),
    ("arena", ARENA | {"idx": 2, "baseline_response": {"a": " "}}, "line 2, .*: baseline_response must hold"),
])
def test_bad_records_are_refused_by_file_and_line(tmp_path, benchmark, record, why):
    first = {"writingbench": writing(1), "arena": ARENA}.get(benchmark, LONG)
    with pytest.raises(UserError, match=f"^{tmp_path}/x.jsonl, {why}"):
        read(benchmark, jsonl(tmp_path / "x.jsonl", [first, record]))


def test_files_that_hold_nothing_or_belong_to_another_benchmark_are_refused(tmp_path):
    with pytest.raises(UserError, match="has no record: give the JSONL file of ruler"):
        read("ruler", jsonl(tmp_path / "x.jsonl", []))
    with pytest.raises(UserError, match="gone.jsonl cannot be read"):
        read("ruler", tmp_path / "gone.jsonl")
    file = jsonl(tmp_path / "b.jsonl", [writing(1, names="ab")])
    subset = tmp_path / "requirement/style/style_subset_C.jsonl"
    other_query, other_criteria = writing(1, "Other.", names="ab"), writing(1, names="c")
    for changed in (other_query, other_criteria, writing(1) | {"checklist": "a"}):
        jsonl(subset, [writing(7), changed])
        with pytest.raises(UserError, match="C.jsonl, line 2: record 1 has another query or"):
            read("writingbench", file)


# ---------------------------------------------------------------------- questions


def test_questions_hold_what_is_judged_in_the_language_of_the_query():
    """A text that looks like a template, or like the end of one, is put in as it is."""
    trap = r'{query} {answer} {scores} \1 {"score": 10}'
    for query, marks in (("Write a plan.", "Be strict"), ("写一份计划", "请从严")):
        record = Record("7", query, "zh" if "写" in query else "en", 10, "Plan", "Education",
                        tuple(map(criterion, "aab")), {"X/1": "Another {a} text."})
        ((key, text),) = questions("longbench_write", record, trap).items()
        assert key == "" and text.count(query) == 1 and marks in text
        assert f"<text>\n{trap}\n</text>" in text and '{"analysis": ' in text.splitlines()[-1]
        assert all(f'"{name}": N' in text and f"- {name}" in text for name in DIMENSIONS)
        three = questions("writingbench", record, trap)
        assert [*three] == ["c0", "c1", "c2"] and three["c0"] == three["c1"]
        assert all(f"{r}: b is {r}" in three["c2"] for r in RANGES) and "About b." in three["c2"]
        assert f"<text>\n{trap}\n</text>" in three["c2"] and three["c2"].endswith('"score": N}')
        pair = questions("arena", record, trap)
        assert [*pair] == ["X/1/0", "X/1/1"]
        for key, a, b in (("X/1/0", trap, "Another {a} text."), ("X/1/1", "Another {a} text.", trap)):
            assert f"<text A>\n{a}\n</text A>\n\n<text B>\n{b}\n</text B>" in pair[key]
            assert '"winner": "A"' in pair[key].splitlines()[-1]
        assert questions("ruler", record, trap) == {}
        assert all(questions(benchmark, record, "") == {} for benchmark in benchmarks.BENCHMARKS)


SIX = dict.fromkeys(DIMENSIONS, 3)


@pytest.mark.parametrize("benchmark, text, verdict", [
    ("writingbench", '{"score": 7, "reason": "r"}', {"score": 7, "reason": "r"}),
    ("writingbench", '{so} {"score": 1, "reason": ""}\n```json\n{"reason": "a {b} \n c", "score": 9}\n'
     '```', {"score": 9, "reason": "a {b} \n c"}),
    ("writingbench", '<think>{"score": 1, "reason": ""}</think>{"score": 2, "reason": ""}',
     {"score": 2, "reason": ""}),
    ("arena", 'A! {"winner": "tie", "reason": "好"}', {"winner": "tie", "reason": "好"}),
    ("longbench_write", json.dumps({"analysis": "x", **SIX}), {"analysis": "x", **SIX}),
])
def test_verdicts_are_found(benchmark, text, verdict):
    assert parse(benchmark, text) == verdict


@pytest.mark.parametrize("benchmark, text", [
    ("writingbench", ""), ("writingbench", "I say 7."), ("writingbench", '{"score": 7, "reason": "r"'),
    ("writingbench", '{"score": 11, "reason": "r"}'), ("writingbench", '{"score": 0, "reason": "r"}'),
    ("writingbench", '{"score": 7.0, "reason": ""}'), ("writingbench", '{"score": true, "reason": ""}'),
    ("writingbench", '{"score": "7", "reason": ""}'), ("writingbench", '{"score": [7], "reason": ""}'),
    ("writingbench", '{"score": 7}'), ("writingbench", '{"score": 7, "reason": 7}'),
    ("writingbench", '{"score": 7, "reason": "", "": 1}'), ("writingbench", '{"Score": 7, "reason":""}'),
    ("writingbench", '{"v": {"score": 7, "reason": ""}}'),
    ("writingbench", '{"score": NaN, "reason": ""}'), ("writingbench", r'{"score": 7, "reason": "\ud800"}'),
    ("writingbench", '{"a":' * 100_000), ("writingbench", "{" * 100_000),
    ("writingbench", '{"score": 7, "reason": "r"}</think>'),
    ("arena", '{"winner": "C", "reason": "r"}'), ("arena", '{"winner": "a", "reason": "r"}'),
    ("arena", '{"winner": null, "reason": "r"}'), ("arena", '{"winner": ["A"], "reason": "r"}'),
    ("longbench_write", json.dumps({"analysis": "x", **SIX, "Clarity": 6})),
    ("longbench_write", json.dumps({"analysis": "x", **SIX, "Clarity": 0})),
    ("longbench_write", json.dumps(SIX)), ("longbench_write", '{"analysis": "x", "Relevance": 3}'),
])
def test_what_is_no_verdict_is_refused(benchmark, text):
    with pytest.raises(ValueError) as error:
        parse(benchmark, text)
    str(error.value).encode()


# ---------------------------------------------------------------------- length


@pytest.mark.parametrize("required, words, score", [
    (1000, 1000, 100), (1000, 0, 0), (1000, 1, 0), (1000, 333, 0), (999, 333, 0), (999, 334, 0.4491),
    (1000, 500, 50), (1000, 999, 99.94995), (1000, 1001, 99.96667), (1000, 2000, 66.66667),
    (1000, 2500, 50), (1000, 3999, 0.03333), (1000, 4000, 0), (1000, 4001, 0), (1000, 10**7, 0),
    (1, 1, 100), (1, 4, 0), (3, 1, 0), (100, 250, 50), (30_000, 15_000, 50),
])
def test_the_length_score_at_its_boundaries(required, words, score):
    assert length_score(required, words) == pytest.approx(score, abs=1e-4)


def longbench(required: int, language: str = "en", ident: str = "") -> Record:
    return Record(ident or str(required), "Write.", language, required, "News", "", (), {})


def test_length_scores_by_bins_and_languages():
    """Half and twice the length score 50 and 66.67; bins take their lower ends."""
    cases = [(100, 100, 100.0), (499, 499, 100.0), (500, 250, 50.0), (1999, 1999, 100.0), (2000, 0, 0.0),
             (3999, 3999, 100.0), (4000, 8000, 200 / 3), (20_000, 10_000, 50.0)]
    records = [longbench(x, "zh" if x >= 4000 else "en") for x, _, _ in cases]
    answers = [answer(x, "text" if y else "", words=y) for x, y, _ in cases]
    found, rows, games = aggregate("longbench_write", records, answers, None)
    assert {name: value for name, value in found.items() if "S_l" in name} == pytest.approx({
        "S_l": (100 + 100 + 50 + 100 + 0 + 100 + 200 / 3 + 50) / 8, "en/S_l": 450 / 6, "zh/S_l": 350 / 6,
        "S_l/<500": 100, "S_l/500-2k": 75, "S_l/2k-4k": 50, "S_l/>=4k": 350 / 6})
    assert [n[4:] for n in found if n.startswith("S_l/")] == ["<500", "500-2k", "2k-4k", ">=4k"]
    assert list(found)[:3] == ["S_l", "S_q", "overall"] and found["S_q"] is found["overall"] is None
    assert [row["scores"]["S_l"] for row in rows] == pytest.approx([s for _, _, s in cases])
    assert games == []


def test_the_ruler_sets_produced_against_required_length():
    records = [longbench(1000, ident="a"), longbench(1000, "zh", "b"), longbench(2000, ident="c")]
    answers = [answer("a", words=1000), answer("b", words=500), answer("c", words=8000)]
    found, _, _ = aggregate("ruler", records, answers, None)
    assert found == {"S_l": 50, "en/S_l": 50, "zh/S_l": 50, "S_l/1000": 75, "S_l/2000": 0,
                     "words/1000": 750, "words/2000": 8000}


# ---------------------------------------------------------------------- quality


def test_longbench_write_by_hand():
    """An answer that is missing has y = 0 and 1 in each dimension; a missing verdict is left out."""
    records = [longbench(100, ident=i) for i in "abcd"]
    answers = [answer(i, words=w) for i, w in zip("abc", (100, 50, 100))] + [answer("d", "", words=0)]
    verdicts = [line("a", "", {"analysis": "", **dict.fromkeys(DIMENSIONS, 5)}),
                line("b", "", {"analysis": "", **SIX, "Clarity": 4}),
                line("c", "", None), line("d", "", {"analysis": "", **SIX})]
    found, rows, _ = aggregate("longbench_write", records, answers, verdicts)
    b = (5 * 50 + 75) / 6
    assert found["S_l"] == (100 + 50 + 100 + 0) / 4 and found["S_q"] == pytest.approx((100 + b + 0) / 3)
    assert found["S_q/Relevance"] == 50 and found["S_q/Clarity"] == pytest.approx(175 / 3)
    assert found["S_q"] == pytest.approx(sum(found[f"S_q/{name}"] for name in DIMENSIONS) / 6)
    assert found["overall"] == found["en/overall"] == pytest.approx((found["S_l"] + found["S_q"]) / 2)
    assert found["missing_verdicts"] == 1
    assert [row["scores"]["S_q"] for row in rows] == pytest.approx([100, b, None, 0])
    assert [row["scores"]["overall"] for row in rows] == pytest.approx([100, (50 + b) / 2, None, 0])


def test_silence_counts_under_a_judge_and_is_null_without():
    records, mute = [longbench(100)], [answer(100, "", words=0)]
    for verdicts, value in ((None, None), ([], 0)):
        found, _, _ = aggregate("longbench_write", records, mute, verdicts)
        assert found["S_q"] == value and found["S_l"] == 0
    found, _, _ = aggregate("longbench_write", records, [answer(100)], None)
    assert found["S_q"] is None and "missing_verdicts" not in found


# ---------------------------------------------------------------------- WritingBench


def test_writingbench_by_hand(tmp_path):
    """Equal names stay apart, a missing verdict is left out, and a silent answer has 1 for each criterion."""
    records = [writing(1, names="aab"), writing(2, "写", "Education/Essay", "cd"),
               writing(3, domain="Law/Will", names="ef"), writing(4, domain="Law/Will", names="g")]
    jsonl(tmp_path / "requirement/style/style_subset.jsonl", [records[0], records[1], writing(99)])
    jsonl(tmp_path / "requirement/style/style_subset_C.jsonl",
          [records[0] | {"checklist": [criterion("a")]}, records[1] | {"checklist": [criterion("d")]}])
    jsonl(tmp_path / "requirement/length/length_subset.jsonl", [records[3]])
    read_in = read("writingbench", jsonl(tmp_path / "all.jsonl", records))
    assert read_in[0].requirements == {"style_R": (0, 1, 2), "style_C": (0, 1)}
    verdicts = [line(1, "c0", {"score": 4, "reason": ""}), line(1, "c1", {"score": 8, "reason": ""}),
                line(1, "c2", {"score": 3, "reason": ""}),
                line(2, "c0", None), line(2, "c1", {"score": 6, "reason": ""}),
                line(3, "c0", None), line(77, "c0", {"score": 9, "reason": ""})]
    answers = [answer(i) for i in (1, 2, 3)] + [answer(4, "")]
    found, rows, games = aggregate("writingbench", read_in, answers, verdicts)
    assert found == pytest.approx({
        "overall": (4 + 8 + 3 + 6 + 1) / 5, "en/overall": (4 + 8 + 3 + 1) / 4, "zh/overall": 6,
        "domain1/Education": (5 + 6) / 2, "domain1/Law": 1, "domain2/Plan": 5, "domain2/Essay": 6,
        "domain2/Will": 1, "style_R": (5 + 6) / 2, "style_C": (4 + 8 + 6) / 3, "length_R": 1,
        "missing_verdicts": 3})
    assert list(found)[0] == "overall" and games == []
    assert [row["scores"]["overall"] for row in rows] == [5, 6, None, 1]


def test_writingbench_as_a_database_computes_it(tmp_path):
    """300 records in SQL: missing scores, silent answers, requirements."""
    rng, db = random.Random(0), sqlite3.connect(":memory:")
    db.execute("create table v (id, place, score, domain1, domain2, language, R, C)")
    records, verdicts, answers, styles, style_c = [], [], [], [], []
    for i in range(300):
        names = rng.choice(["abcde", "aabbc", "fffff", "xyz"])
        record = writing(i, rng.choice(["Write it.", "写"]), f"D{i % 6}/E{i % 100}", names)
        r, c = rng.random() < 0.4, set(rng.sample(names, 1))
        if r:
            styles.append(record)
            style_c.append(record | {"checklist": [criterion(name) for name in c]})
        records.append(record)
        silent = rng.random() < 0.05
        answers.append(answer(i, "" if silent else "Text."))
        for place, name in enumerate(names):
            score = rng.choice([None] * 5 + list(range(1, 11)) * 3)
            said = not silent and rng.random() < 0.9
            if said:
                verdicts.append(line(i, f"c{place}", score and {"score": score, "reason": ""}))
            if silent or said and score:
                db.execute("insert into v values (?,?,?,?,?,?,?,?)", (
                    i, place, 1 if silent else score, f"D{i % 6}", f"E{i % 100}",
                    "zh" if record["query"] == "写" else "en", r, r and name in c))
    jsonl(tmp_path / "requirement/style/style_subset.jsonl", styles)
    jsonl(tmp_path / "requirement/style/style_subset_C.jsonl", style_c)
    rng.shuffle(verdicts)
    read_in = read("writingbench", jsonl(tmp_path / "all.jsonl", records))
    found, rows, _ = aggregate("writingbench", read_in, answers, verdicts)
    wanted = {"overall": "select avg(score) from v", "style_C": "select avg(score) from v where C",
              "style_R": "select avg(m) from (select avg(score) m from v where R group by id)"}
    wanted |= {f"{x}/overall": f"select avg(score) from v where language = '{x}'" for x in ("en", "zh")}
    for column in ("domain1", "domain2"):
        for (group,) in db.execute(f"select distinct {column} from v"):
            wanted[f"{column}/{group}"] = ("select avg(m) from (select avg(score) m from v where "
                                           f"{column} = '{group}' group by id)")
    assert found == pytest.approx({name: db.execute(sql).fetchone()[0] for name, sql in wanted.items()}
                                  | {"missing_verdicts": sum(len(r["checklist"]) for r in records)
                                     - db.execute("select count(*) from v").fetchone()[0]})
    assert len(found) == 5 + 6 + 100 + 1
    means = {row["id"]: row["scores"]["overall"] for row in rows}
    assert {i: mean for i, mean in means.items() if mean is not None} == pytest.approx(
        {str(i): mean for i, mean in db.execute("select id, avg(score) from v group by id")})


# ---------------------------------------------------------------------- Arena


A, B, TIE = ({"winner": winner} for winner in ("A", "B", "tie"))


@pytest.mark.parametrize("first, second, points", [
    (A, B, 1), (B, A, 0), (A, A, 0.5), (B, B, 0.5), (TIE, TIE, 0.5), (A, TIE, 0.5), (TIE, A, 0.5),
    (B, TIE, 0.5), (TIE, B, 0.5), (None, B, None), (A, None, None), (None, None, None)])
def test_a_game_is_won_only_in_both_orders(first, second, points):
    assert game(first, second) == points


def test_wins_over_a_baseline_without_an_answer_are_counted_apart():
    records = [Record(str(i), "Write.", "en", None, "", "", (), {"X": text})
               for i, text in enumerate(("", "", "x", "x"))]
    verdicts = [line(i, f"X/{order}", verdict) for i, winner in enumerate((A, A, A, B))
                for order, verdict in enumerate((winner, B if winner is A else A))]
    found, *_ = aggregate("arena", records, [answer(i) for i in range(4)], verdicts)
    assert (found["win_rate"], found["win_rate_answered"], found["games_answered"]) == (0.75, 0.5, 2)


def test_arena_by_hand():
    """Against X: a win, a loss by silence, a missing verdict; against Y: a tie by contradiction, a loss
    by silence, a tie that both verdicts name."""
    baselines = {"X/1": "x", "Y": "y"}
    records = [Record(i, "Write.", language, None, "Poem", "", (), baselines)
               for i, language in (("1", "en"), ("2", "en"), ("3", "zh"))]
    answers = [answer(1), answer(2, ""), answer(3)]
    verdicts = [line(1, "X/1/0", A), line(1, "X/1/1", B), line(1, "Y/0", A), line(1, "Y/1", A),
                line(3, "X/1/0", A), line(3, "X/1/1", None), line(3, "Y/0", TIE),
                line(3, "Y/1", TIE)]
    found, rows, games = aggregate("arena", records, answers, verdicts, name="me")
    assert games == [["me", "X/1", "1", 1], ["me", "Y", "1", 0.5], ["me", "X/1", "2", 0],
                     ["me", "Y", "2", 0], ["me", "X/1", "3", None], ["me", "Y", "3", 0.5]]
    assert found == pytest.approx({
        "win_rate": 0.4, "consistency": 2 / 3, "en/win_rate": 0.375, "zh/win_rate": 0.5, "win_rate/X/1": 0.5,
        "win_rate/Y": 1 / 3, "missing_verdicts": 1, "win_rate_answered": 2 / 3, "games_answered": 3})
    assert [row["scores"]["win_rate"] for row in rows] == [0.75, 0, 0.5]
    found, _, games = aggregate("arena", records, answers, None)
    assert found["win_rate"] is None and games == []


# ---------------------------------------------------------------------- texts


def test_statistics_of_texts_by_hand():
    """In Chinese a character is a word; an answer that was cut has not ended, a missing one counts only
    in structure and its share."""
    text = "The cat saw the dog.\n\nThe cat ran home."
    records = [longbench(10, ident=i) for i in "abcd"]
    answers = [answer("a", text, words=9, think="One two three."),
               answer("b", "天天向上，好。", "length", 5, ""),
               answer("c", "", "length", 0, "", response="<think>No end"), answer("d", "word", words=1)]
    _, rows, _ = aggregate("ruler", records, answers, None)
    a, b, c, d = (row["texts"] for row in rows)
    assert a == {"repetition": 0, "repetition_words": 0, "distinct_1": 6 / 9, "distinct_2": 7 / 8,
                 "distinct_3": 1, "answer_words": 9, "think_words": 3, "paragraphs": 2, "ending": 1,
                 "structure": 1}
    assert (b["distinct_1"], b["distinct_2"], b["ending"], b["think_words"]) == (4 / 5, 1, 0, 0)
    assert c == dict.fromkeys(a) | {"structure": 0} and d["distinct_1"] == 1 and d["distinct_2"] is None
    means = text_means(rows, answers)
    assert means["answer_words"] == 5 and means["missing_answers"] == 0.25 and means["truncated"] == 0.5
    assert means["structure"] == 0.5 and means["distinct_2"] == (7 / 8 + 1) / 2


def test_structure_is_that_of_the_prompts_style():
    direct = [answer("1", "Text.", response="<answer>Text.</answer>")]
    for style, value in (("think", 0), ("direct", 1), ("chat", None)):
        _, (row,), _ = aggregate("ruler", [longbench(1)], direct, None, style=style)
        assert row["texts"]["structure"] == value and text_means([row], direct)["structure"] == value


def test_repetition_is_seen():
    copied = "A sentence that comes back again and again. " * 20
    assert statistics(copied, "Write.", "chat", False)["repetition"] > 0.9
