"""Queries, their length ranges and verdicts: every answer that comes is validated, kept at once and asked for
once."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from data import prompts
from data.tokenizer import Tokenizer
from lib import endpoint
from lib.options import UserError
from scripts import annotate, convert
from tests.fake_endpoint import FakeEndpoint
from tests.helpers import ROOT

QUERIES = [{"id": f"q{i}", "prompt": f"Write a report of {i}00 words." if i % 3 else f"写一篇{i}00字的报告"}
           for i in range(1, 25)]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(endpoint, "BACK_OFF", 0.01)


def number(request: dict) -> int:
    """Of the words that the query at the end of a chat asks for."""
    return int(re.findall(r"(\d+) ?(?:words|字)", request["messages"][-1]["content"])[-1])


def range_reply(request: dict) -> str:
    return f'Let me see. {{"range": [{number(request) - 10}, {number(request) + 10}]}}'


def jsonl(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(monkeypatch, capsys, script, **options) -> tuple[int, str]:
    """(exit code, everything it said)."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", [script.__name__, *words])
    try:
        script.main()
        code = 0
    except SystemExit as e:
        code = e.code
    return code, "".join(capsys.readouterr())


# ---------------------------------------------------------------------- answers

ANSWERS = {
    ("range", '{"range": [800, 1200]}'): [800, 1200], ("range", 'So: {"range":[0,0]}.'): [0, 0],
    ("range", '<think>{"range": [1, 2]}?</think> ```json\n{"range": [3, 4]}\n```'): [3, 4],
    ("range", '{"range": [1, 2]} or {"range": [900, 900]}'): [900, 900],
    ("range", '<think>{"range": [1, 2]}? No, for'): None,
    ("range", '<think>{"range": [1, 2]}?</think> No.'): None, ("range", "800 to 1200"): None,
    ("range", ""): None, ("range", '{"range": [800, 1200]'): None,
    ("range", '{"range": [1200, 800]}'): None, ("range", '{"range": [-100, 800]}'): None,
    ("range", '{"range": [800]}'): None, ("range", '{"range": [800.0, 1200]}'): None,
    ("range", '{"range": ["800", "1200"]}'): None, ("range", '{"range": null}'): None,
    ("range", '{"range": [true, 2]}'): None, ("range", '{"length": [800, 1200]}'): None,
    ("range", '{"length": 800}'): None, ("range", '{"range": ' + "[" * 9000 + "}"): None,
    ("filter", '{"reason": " An essay. ", "keep": true}'): (True, "An essay."),
    ("filter", '{"keep": false, "reason": "问候"}'): (False, "问候"), ("filter", '{"keep": true}'): None,
    ("filter", '{"keep": "yes", "reason": "An essay."}'): None, ("filter", "{}"): None,
}


@pytest.mark.parametrize("task, answer", ANSWERS, ids=lambda x: x[:40])
def test_an_answer_is_what_was_asked_for_or_an_error(task, answer):
    expected = ANSWERS[task, answer]
    if expected is None:
        with pytest.raises(ValueError):
            annotate.find(task, answer)
    elif task == "range":
        assert annotate.find(task, answer) == {"length_range": expected}
    else:
        assert annotate.find(task, answer) == dict(zip(("keep", "reason"), expected))


# ---------------------------------------------------------------------- servers


def test_ranges_stand_in_the_order_of_the_queries_and_train_reads_them(tmp_path, monkeypatch, capsys):
    """Each is asked in its language; an invalid answer is asked for again with another seed, as often as
    `tries` says."""
    def reply(request):
        n = number(request)
        tried[n] = tried.get(n, 0) + 1
        time.sleep(0.02 if n == 100 else 0)
        return "no idea" if n == 500 or n == 700 and tried[n] < 3 else range_reply(request)

    tried, out = {}, tmp_path / "out.jsonl"
    queries = jsonl(tmp_path / "queries.jsonl", [q | {"note": q["id"]} for q in QUERIES])
    with FakeEndpoint(reply=reply) as fake:
        model = f"{fake.url}/v1#judge"
        code, said = run(monkeypatch, capsys, annotate, queries=queries, out=out, model=model)
    assert code == 0 and "out.jsonl: 23 ranges" in said
    assert "1 queries have no valid answer" in said and "no JSON object in 'no idea'" in said
    made = read(out)
    assert [r["id"] for r in made] == [f"q{i}" for i in range(1, 25) if i != 5]
    for r in made:
        n = int(r["id"][1:]) * 100
        assert r["length_range"] == [n - 10, n + 10] and r["note"] == r["id"]
        assert r["annotators"] == {"range": "judge"}
    assert tried == {100 * i: 3 if i in (5, 7) else 1 for i in range(1, 25)}
    seeds = [r["seed"] for r in fake.calls if number(r) == 700]
    assert len(set(seeds)) == 3 and all(r["model"] == "judge" for r in fake.calls)
    assert all(("上限" in r["messages"][0]["content"]) == ("字" in r["messages"][0]["content"][-6:])
               for r in fake.calls)
    assert len(prompts.read(out, "think", 100000)[0]) == 23


def test_a_kill_costs_no_answer_and_repeats_none(tmp_path, monkeypatch, capsys):
    """Only what was under way, on 4 threads, is asked again; the result is that of an undisturbed run."""
    queries, out = jsonl(tmp_path / "queries.jsonl", QUERIES), tmp_path / "out.jsonl"
    with FakeEndpoint(reply=lambda r: time.sleep(0.05) or range_reply(r)) as fake:
        options = dict(queries=queries, out=out, model=f"{fake.url}/v1#judge", threads=4)
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        killed = subprocess.Popen([sys.executable, "-m", "scripts.annotate", *words], cwd=ROOT,
                                  stderr=subprocess.DEVNULL)
        while not out.exists() or out.read_bytes().count(b"\n") < 8:
            time.sleep(0.005)
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
        had, asked = {r["id"] for r in read(out)}, len(fake.calls)
        assert 8 <= len(had) < 20 and asked <= len(had) + 4
        out.write_bytes(out.read_bytes() + b'{"id": "q24", "prom')  # and the last line was torn
        annotate.resume(annotate.Config(out=str(out)), "judge", {})
        assert {r["id"] for r in read(out)} == had
        code, said = run(monkeypatch, capsys, annotate, **options)
        assert code == 0, said
        again = {f"q{number(r) // 100}" for r in fake.calls[asked:]}
        assert again == {q["id"] for q in QUERIES} - had and len(fake.calls) - asked == len(again)
    expected = [[100 * i - 10, 100 * i + 10] for i in range(1, 25)]
    assert [r["length_range"] for r in read(out)] == expected


def test_a_range_that_is_there_stays_unless_it_is_to_be_replaced(tmp_path, monkeypatch, capsys):
    """Also in the file that is continued."""
    given = [{"length_range": [7, 9]}, {"length": 7}, {"range": [0, 0], "annotators": {"range": "QwQ"}}, {}]
    queries = jsonl(tmp_path / "queries.jsonl", [q | more for q, more in zip(QUERIES, given)])
    with FakeEndpoint(reply=range_reply) as fake:
        options = dict(queries=queries, out=tmp_path / "out.jsonl", model=f"{fake.url}/v1#judge")
        for _ in range(2):
            code, said = run(monkeypatch, capsys, annotate, **options)
            assert code == 0 and "out.jsonl: 3 kept as they were, 1 ranges" in said, said
            assert read(options["out"])[:3] == read(queries)[:3] and [number(r) for r in fake.calls] == [400]
        code, said = run(monkeypatch, capsys, annotate, **options, replace=True)
        assert code == 2 and "line 1, is no range by judge, but by None" in said
        code, said = run(monkeypatch, capsys, annotate, **options | {"out": tmp_path / "new"}, replace=True)
    assert code == 0 and [r["length_range"][0] for r in read(tmp_path / "new")] == [90, 190, 290, 390]


def test_a_filter_keeps_its_verdicts_and_what_it_rejects_is_passed_over(tmp_path, monkeypatch, capsys):
    judged, out = tmp_path / "judged.jsonl", tmp_path / "out.jsonl"
    queries = jsonl(tmp_path / "queries.jsonl", QUERIES)

    def verdict(request):
        return json.dumps({"reason": f"{number(request)}", "keep": number(request) > 600})

    with FakeEndpoint(reply=verdict) as fake:
        model = f"{fake.url}/v1#judge"
        code, said = run(monkeypatch, capsys, annotate, task="filter", queries=queries, out=judged,
                         model=model)
        assert code == 0 and "18 kept" in said and "6 rejected" in said
        assert read(judged)[0]["keep"] is False and read(judged)[0]["reason"] == "100"
        fake.reply = range_reply
        code, said = run(monkeypatch, capsys, annotate, queries=judged, out=out, model=model)
    assert code == 0 and len(read(out)) == 18 and len(fake.calls) == 24 + 18
    assert read(out)[0]["annotators"] == {"filter": "judge", "range": "judge"}
    kept, dropped = prompts.read(judged, "think", 100000)
    assert len(kept) == 18 and dropped == {"rejected": 6}


def test_what_servers_do_costs_queries_only_where_they_refuse_them(tmp_path, monkeypatch, capsys):
    def behave(i, request):
        return "400" if number(request) == 300 else ("429", "500", "broken", "cut", "wrong", "ok")[min(i, 5)]

    queries, out = jsonl(tmp_path / "queries.jsonl", QUERIES), tmp_path / "out.jsonl"
    with FakeEndpoint(behave, reply=range_reply) as fake:
        code, said = run(monkeypatch, capsys, annotate, queries=queries, out=out, model=fake.url)
    assert code == 0 and len(read(out)) == 23 and "answered 400" in said
    assert "q3" not in [r["id"] for r in read(out)]


def test_where_all_would_be_refused_one_sentence_says_why(tmp_path, monkeypatch, capsys):
    queries, out = jsonl(tmp_path / "queries.jsonl", QUERIES), tmp_path / "out.jsonl"
    with FakeEndpoint(lambda i, _: "ok" if i < 5 else "401", reply=range_reply) as fake:
        code, said = run(monkeypatch, capsys, annotate, queries=queries, out=out, model=fake.url, threads=1)
    assert code == 2 and f"error: {fake.url} answered 401" in said and len(read(out)) == 5


@pytest.mark.parametrize("noted", [None, "somebody", ["a"]])
def test_annotators_of_another_kind_in_a_file_are_no_traceback(noted, tmp_path, monkeypatch, capsys):
    queries, out = jsonl(tmp_path / "queries.jsonl", [q | {"annotators": noted} for q in QUERIES[:2]]), "out"
    with FakeEndpoint(reply=range_reply) as fake:
        code, said = run(monkeypatch, capsys, annotate, queries=queries, out=tmp_path / out, model=fake.url)
    assert code == 0 and [len(record["annotators"]) for record in read(tmp_path / out)] == [1, 1], said


def test_an_answer_that_was_cut_may_be_a_thought_and_is_none(tmp_path, monkeypatch, capsys):
    queries, out = jsonl(tmp_path / "queries.jsonl", QUERIES[:2]), tmp_path / "out.jsonl"
    with FakeEndpoint(reply=range_reply) as fake:  # all answers have 7 tokens
        for most, ranges in ((7, 0), (8, 2)):
            code, said = run(monkeypatch, capsys, annotate, queries=queries, out=out, model=fake.url,
                             max_new_tokens=most)
            assert code == 0 and len(read(out)) == ranges
            assert ("cut at max_new_tokens" in said) == (most == 7)


def test_a_full_disk_ends_it_and_asks_no_more(tmp_path, monkeypatch, capsys):
    """What is whole stays, and the same command goes on."""
    queries, out = jsonl(tmp_path / "queries.jsonl", QUERIES), tmp_path / "out.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with FakeEndpoint(reply=range_reply) as fake:
        options = dict(queries=queries, out=out, model=fake.url, threads=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            code, said = run(monkeypatch, capsys, annotate, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert code == 2 and f"error: {out} cannot be written (File too large): make room" in said
        had = out.read_bytes().count(b"\n")
        assert 2 < had < 20 and len(fake.calls) <= had + 2
        assert run(monkeypatch, capsys, annotate, **options)[0] == 0 and len(read(out)) == 24


# ---------------------------------------------------------------------- our own sampler


def any_answer(task: str, text: str) -> dict:
    if len(text) % 3 == 0:
        raise ValueError("not now")
    return {"length_range": [len(text), len(text) + 1], "said": text}


def test_the_sampler_answers_alike_whatever_is_asked_beside_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(annotate, "find", any_answer)
    options = dict(model="data/tiny/base", max_new_tokens=16, device="cpu", tries=3)
    made = []
    for name, n in (("whole", 6), ("part", 2), ("part", 6)):
        queries, out = jsonl(tmp_path / "queries.jsonl", QUERIES[:n]), tmp_path / f"{name}.jsonl"
        code, said = run(monkeypatch, capsys, annotate, queries=queries, out=out, **options)
        assert code == 0, said
        made.append(read(out))
    assert made[0] == made[2] and made[1] == made[2][:len(made[1])] and len(made[0]) >= 4
    assert len({r["said"] for r in made[0]}) == len(made[0])


def test_a_chat_model_is_asked_in_its_template(tmp_path, monkeypatch, capsys):
    """It is one where <|im_end|> ends its texts; too long a query is not asked, a cut answer none."""
    tokenizer = Path(ROOT / "../shared/data/qwen2.5-tokenizer")
    if not tokenizer.is_dir():
        pytest.skip("no Qwen2.5 tokenizer at ../shared/data")
    asked = []

    class Sampler:
        def __init__(self, tokenizer):
            self.tokenizer, self.model = tokenizer, SimpleNamespace(
                group=None, config=SimpleNamespace(max_position_embeddings=2048))

        def generate(self, requests):
            asked.extend(self.tokenizer.decode(r.prompt_ids) for r in requests)
            yield SimpleNamespace(prompt_index=0, text='1, 2]}{"range": [1, 2]}', finish_reason="length",
                                  token_ids=[1])

    sampler, out = Sampler(Tokenizer(tokenizer)), tmp_path / "out.jsonl"
    monkeypatch.setattr(annotate, "open_sampler", lambda config: sampler)
    queries = jsonl(tmp_path / "queries.jsonl", [{"id": "1", "prompt": "Write."},
                                                 {"id": "2", "prompt": "word " * 5000}])
    for eos, chat in ((151645, True), (151643, False)):
        sampler.tokenizer.eos_ids = [eos]
        code, said = run(monkeypatch, capsys, annotate, queries=queries, out=out, tries=1, device="cpu",
                         model="data/tiny/base")
        why = ("2 queries have no valid answer, 1 of them so: cut at max_new_tokens" if chat else
               "1 queries have no valid answer, 1 of them so: the question exceeds the model's context")
        assert code == 0 and why in said, said
        assert asked[-1].startswith("<|im_start|>system\nYou are Qwen") == chat
        assert asked[-1].endswith("<|im_end|>\n<|im_start|>assistant\n" if chat else "JSON:\n")
        assert [r["id"] for r in read(out)] == ([] if chat else ["1"])


# ---------------------------------------------------------------------- errors


def test_bad_input_gets_one_sentence(tmp_path, monkeypatch, capsys):
    queries = jsonl(tmp_path / "queries.jsonl", QUERIES)
    theirs = jsonl(tmp_path / "theirs.jsonl", QUERIES)
    theirs.write_text(text := theirs.read_text().strip())
    other = jsonl(tmp_path / "other.jsonl", [QUERIES[0] | {"annotators": {"range": "QwQ"}}])
    parquet = tmp_path / "data.parquet"
    parquet.write_bytes(b"PAR1\x00")
    good = dict(queries=queries, out=tmp_path / "out.jsonl", model="http://localhost:1/v1#judge")
    for change, words in [
            (dict(task="guess"), "task must be one of range, filter, not 'guess'"),
            (dict(queries=""), "--queries is missing"), (dict(out=""), "--out is missing"),
            (dict(queries="nowhere.jsonl"), "nowhere.jsonl cannot be read"),
            (dict(queries=parquet), "is a Parquet file"), (dict(tries=0), "tries must be positive, not 0"),
            (dict(temperature=-1), "temperature must be"), (dict(top_p=1.5), "top_p must be"),
            (dict(model="ftp://x"), "'ftp://x' is no address"), (dict(model="nowhere"), "nowhere"),
            (dict(model="data/tiny/writing", device="cpu"), "writing is a reward model"),
            (dict(out=theirs), "theirs.jsonl, line 1, is no range by judge, but by None"),
            (dict(out=other), "by QwQ: choose another --out")]:
        code, said = run(monkeypatch, capsys, annotate, **good | change)
        (line,) = said.splitlines()
        assert code == 2 and line.startswith("error: ") and words in line, (change, said)
    assert theirs.read_text() == text, "nobody's file is touched"
    for text in ('{"lr": 1e-6}', "a note", "[1]"):  # nor is one of a line without an end
        theirs.write_text(text)
        with pytest.raises(UserError, match="line 1, is no range by judge"):
            annotate.resume(annotate.Config(out=str(theirs)), "judge", {})
        assert theirs.read_text() == text


# ---------------------------------------------------------------------- others' files

RECORDS = [  # a record: what becomes of it
    ({"conversation_hash": "h1", "language": "English", "turn": 1, "conversation": [
        {"role": "user", "content": " Write a long story. ", "language": "English", "toxic": False},
        {"role": "assistant", "content": "Once"}, {"role": "user", "content": "Longer!"}]},
     {"prompt": "Write a long story.", "source": "h1"}),
    ({"conversation_id": "l1", "language": "Chinese", "model": "vicuna", "conversation": [
        {"role": "user", "content": "写一篇关于潮汐能的长报告"}]},
     {"prompt": "写一篇关于潮汐能的长报告", "source": "l1"}),
    ({"conversation_id": "l2", "language": "English", "conversation": [
        {"role": "user", "content": "WRITE a long, story"}]}, "repeated"),
    ({"conversation_id": "l3", "language": "Russian", "conversation": [
        {"role": "user", "content": "Напиши длинный рассказ"}]}, "in another language"),
    ({"conversation_id": "l4", "conversation": [{"role": "user", "content": "Hi"}]}, "too short"),
    ({"conversation_id": "l5", "conversation": [{"role": "user", "content": "a b " * 3000}]}, "too long"),
    ({"conversation_id": "l6", "conversation": [{"role": "user", "content": ""}]}, "without a request"),
    ({"conversation_id": "l7", "conversation": []}, "without a request"),
    ({"prompt": "system <|user|>: Write about the sea. <|assistant|>:", "range": "[800, 1200]"},
     {"prompt": "Write about the sea.", "length_range": [800, 1200]}),
    ({"query": "写一篇关于大海的散文，越长越好", "length_range": [0, 0]},
     {"prompt": "写一篇关于大海的散文，越长越好", "length_range": [0, 0]}),
    ({"prompt": [{"role": "user", "content": "Write a speech, please."}], "length": "1000"},
     {"prompt": "Write a speech, please.", "length_range": [900, 1100]}),
    ({"prompt": "Write a long letter.", "length": " ", "id": "\ud800"},
     {"prompt": "Write a long letter."}),
]


def test_records_of_others_become_queries_that_train_reads(tmp_path, monkeypatch, capsys):
    files = jsonl(tmp_path / "a.jsonl", [r for r, _ in RECORDS]), jsonl(tmp_path / "b.jsonl", [RECORDS[0][0]])
    out = tmp_path / "out.jsonl"
    code, said = run(monkeypatch, capsys, convert, files=", ".join(map(str, files)), out=out,
                     languages="English, Chinese")
    assert code == 0
    for fate in ("6 taken", "2 repeated", "1 too short", "1 too long", "2 without a request",
                 "1 in another language"):
        assert fate in said
    expected = [fate for _, fate in RECORDS if isinstance(fate, dict)]
    assert len(read(out)) == len(expected) == len({r["id"] for r in read(out)})
    for made, fate in zip(read(out), expected):
        assert made["prompt"] == fate["prompt"] and made.get("length_range") == fate.get("length_range")
        assert made["source"].startswith("a.jsonl: ") and made["source"].endswith(fate.get("source", ""))
    kept, dropped = prompts.read(out, "think", 14000)
    assert len(kept) == 5 and dropped == {"unanswerable": 1}


def test_a_broken_line_is_skipped_counted_and_named(tmp_path, monkeypatch, capsys):
    file, out = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    file.write_bytes(b'{"prompt": "About the sea."}\n{"prompt": "Wri\n{"prompt": "About the s\xffn."}\n[1]\n'
                     b'{"prompt": "About the moon.", "range": [5, 1]}\n{"prompt": "About the fog."}\n')
    code, said = run(monkeypatch, capsys, convert, files=file, out=out)
    assert code == 0 and [r["prompt"] for r in read(out)] == ["About the sea.", "About the fog."]
    assert said.startswith(f"{out}: 2 taken, 4 broken (the first: {file}, line 2: ")


def test_files_that_cannot_be_converted_get_one_sentence(tmp_path, monkeypatch, capsys):
    parquet = tmp_path / "data.parquet"
    parquet.write_bytes(b"PAR1\x00")
    other = jsonl(tmp_path / "other.jsonl", [{"text": "Once upon a time there was"}])
    none = jsonl(tmp_path / "out.json", [{"prompt": "Write something long.", "range": "unknown"}])
    odd = jsonl(tmp_path / "odd.jsonl", [{"prompt": "Write something long.", "range": [5, 1]}])
    for files, words in ((parquet, "Parquet file"), (other, "1"), (odd, "odd.jsonl, line 1: `range` must be"),
                         (none, "not 'unknown'"),
                         (f"{odd}, {tmp_path}/out.jsonl", "out.jsonl is one of the"),
                         ("", "--files is missing"), (tmp_path / "none", "cannot be read")):
        code, said = run(monkeypatch, capsys, convert, files=files, out=tmp_path / "out.jsonl")
        assert code == 2 and said.startswith("error: ") and words in said and len(said.splitlines()) == 1
    assert not (tmp_path / "out.jsonl").exists()
