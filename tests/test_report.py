"""Results beside each other: what the table says and refuses; the page, where a browser is installed."""

import json
import re
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import chromium
import numpy as np
import pytest
from safetensors.numpy import save_file

from scripts import report
from text import REQUESTED
from viewer import page

HOSTILE = ("</script><script>document.title = 'taken'</script>"
           "<img src=/bait onerror=\"document.title = 'taken'\"> <!-- '\"` <b \u2028\u202e\x01\x7f\U0001f409")
CHINESE = "潮水在黎明前退去，渔船静静地停在港湾里。"
WINS = {"strong": 9, "middle": 6, "weak": 2}  # of ten games with each baseline


def result(folder, name="strong", benchmark="longbench_write", judge="gpt", sha="0" * 64, n=10, **other):
    """A folder as scripts.evaluate leaves it. Record i has 10 i + 100 words; `name` decides S_q."""
    folder.mkdir(parents=True)
    answers = [{"id": str(i), "query": f"{CHINESE if i % 2 else 'Write a story'} {i}", "kind": "Story",
                "required": 100 * i + 100, "language": "zh" if i % 2 else "en", "domain": "",
                "answer": f"answer {i} of {name}", "response": f"response {i}", "think": f"a plan {i}",
                "finish_reason": "stop", "tokens": 7 * i, "words": 100 + 10 * i} for i in range(n)]
    answers[1]["answer"] = f"{CHINESE} {HOSTILE}"
    answers[2] |= {"answer": "", "words": 0, "think": "", "finish_reason": "length"}
    verdicts = [{"id": "1", "key": "", "error": "", "raw": ["..."],
                 "verdict": {"Relevance": 4, "Accuracy": 5, "analysis": HOSTILE}},
                {"id": "0", "key": "", "error": "broken JSON", "raw": ["..."], "verdict": None}]
    records = [{"id": str(i), "scores": {"S_l": 10.0 * i, "S_q": WINS[name] * 10.0 + i % 3},
                "texts": {"repetition": 0.01 * i}} for i in range(n)]
    made = {"benchmark": benchmark, "name": name, "made": "2026-01-05", "code": "c" * 64,
            "data": {"file": "file.jsonl", "sha256": sha, "commit": "", "records": 10},
            "model": {"path": f"runs/{name}", "fingerprint": "f" * 64}, "records": records,
            "sampling": {"temperature": 0.7, "seed": 0},
            "judge": judge and {"name": judge, "settings": {"temperature": 0.0}, "calls": 1234,
                                "cost": 1.5, "missing": 1},
            "scores": {"S_l": 45.0, "S_q": WINS[name] * 10.0, "S_q/Accuracy": 52.25, "S_l/<500": None,
                       "S_l/2k-4k": None if name == "weak" else 50.0},
            "texts": {"repetition": 0.045, "missing_answers": 0.1}} | other
    (folder / "result.json").write_text(json.dumps(made), encoding="utf-8")
    for file, lines in (("answers", answers), ("verdicts", verdicts if judge else [])):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{file}.jsonl").write_text(text, encoding="utf-8")
    return folder


def arena(folder, name, baselines, **more):
    games = [[name, b, str(i), 1 if i < WINS[name] else 0] for b in baselines for i in range(10)]
    scores = {"win_rate": 0.5, "consistency": 0.75}
    return result(folder, name, "arena", games=games, scores=scores, **more)


def run(monkeypatch, tmp_path, *arguments):
    """The sections of the JSON."""
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments), "--out", str(tmp_path / "r.html")])
    report.main()
    return json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))


def said(capsys):
    """Lines as lists of words."""
    return [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()]


# ---------------------------------------------------------------------- numbers


def test_a_row_a_score_a_column_a_result_and_what_is_real(tmp_path, monkeypatch, capsys):
    """All but S_q is the same in both; data, judge, settings and weights are named."""
    a, b = result(tmp_path / "a", "weak"), result(tmp_path / "b", "strong")
    (part,) = run(monkeypatch, tmp_path, a, b)
    lines = said(capsys)
    assert ["", "weak", "strong", "difference", "95 %", "p"] in lines
    (quality,) = [line for line in lines if line[0] == "S_q"]
    assert quality[1:4] == ["20.0", "90.0", "+70.0"] and quality[-1] == "real"
    (length,) = [line for line in lines if line[0] == "S_l"]
    assert length[1:3] == ["45.0", "45.0"] and length[-1] != "real"
    assert ["S_l/2k-4k", "–", "50.0"] in lines and "S_l/<500" not in {line[0] for line in lines}
    assert ["repetition", "0.045", "0.045"] in [line[:3] for line in lines]
    text = "\n".join(map(" ".join, lines))
    for said_too in ("file.jsonl, 10 records, sha256 000000000000", "judge gpt (temperature 0.0)",
                     "temperature 0.7", "runs/weak (weights ffffffffffff)"):
        assert said_too in text
    assert part["differences"]["S_q"]["difference"] == pytest.approx(70)
    assert [r["label"] for r in part["results"]] == ["weak", "strong"]


def test_scores_of_other_judges_are_marked_and_not_compared(tmp_path, monkeypatch, capsys):
    """The length score, which needs none, is still compared. Other settings make another judge."""
    a, b = result(tmp_path / "a", "weak"), result(tmp_path / "b", "strong", judge="qwen")
    (part,) = run(monkeypatch, tmp_path, a, b)
    lines = said(capsys)
    assert ["S_q*", "20.0", "90.0"] in lines and ["S_l", "45.0", "45.0"] in [line[:3] for line in lines]
    assert [part["notes"][0]] in lines and part["notes"][0].startswith("The judges differ: scores with *")
    assert all(f"judge {judge} (temperature 0.0)" in part["about"][name]
               for name, judge in (("weak", "gpt"), ("strong", "qwen")))
    assert part["differences"].keys() == {"S_l", "repetition"}
    html = (tmp_path / "r.html").read_text()
    assert "S_q* 90.0" in html and "<span>Accuracy*</span>" in html
    text = (b / "result.json").read_text().replace('"qwen", "settings": {"temperature": 0.0}',
                                                   '"gpt", "settings": {"temperature": 1.0}')
    (b / "result.json").write_text(text)
    assert run(monkeypatch, tmp_path, a, b)[0]["judged_apart"]


def test_other_sampling_and_other_records_are_said(tmp_path, monkeypatch):
    a = result(tmp_path / "a", "weak", n=4)
    b = result(tmp_path / "b", "strong", sampling={"temperature": 1.0, "seed": 0})
    (part,) = run(monkeypatch, tmp_path, a, b)
    for name, facts in (("weak", "temperature 0.7, seed 0; 4 answers"),
                        ("strong", "temperature 1.0, seed 0; 10 answers")):
        assert facts in part["about"][name] and "judge gpt" in part["about"]["all"]


def test_elo_is_of_all_folders_and_a_baseline_may_be_a_result(tmp_path, monkeypatch, capsys):
    a = arena(tmp_path / "a", "weak", ["human", "middle"])
    b = arena(tmp_path / "b", "middle", ["human"])
    c = arena(tmp_path / "c", "strong", ["human"])
    (part,) = run(monkeypatch, tmp_path, a, b, c, "--pin", "human=1100")
    (fit,) = part["elo"]
    assert [*fit["players"]] == ["strong", "middle", "human", "weak"]
    middle, human = fit["players"]["middle"], fit["players"]["human"]
    assert (middle["games"], middle["wins"], human["rating"], human["pinned"]) == (20, 14, 1100, True)
    assert middle["lo"] < middle["rating"] < middle["hi"] and fit["rounds"] == 1000
    rows = {line[0]: line[1:] for line in said(capsys) if len(line) == 7}
    assert rows["human"] == ["1100", "pinned", "30", "13", "0", "17"]


def test_judges_have_an_elo_each(tmp_path, monkeypatch):
    a = arena(tmp_path / "a", "weak", ["human"])
    b = arena(tmp_path / "b", "strong", ["human"], judge="qwen")
    (part,) = run(monkeypatch, tmp_path, a, b)
    assert [(fit["judge"][:4], sorted(fit["players"])) for fit in part["elo"]] == [
        ("gpt ", ["human", "weak"]), ("qwen", ["human", "strong"])]


def test_benchmarks_are_sections_and_equal_names_are_told_apart(tmp_path, monkeypatch):
    a, b = result(tmp_path / "a", sha="1" * 64), result(tmp_path / "b", sha="1" * 64)
    c = result(tmp_path / "c", benchmark="ruler", judge=None)
    parts = run(monkeypatch, tmp_path, c, b, a)
    assert [part["title"] for part in parts] == ["LongBench-Write", "LongWrite-Ruler"]
    assert [r["label"] for r in parts[0]["results"]] == [f"strong ({b})", f"strong ({a})"]


def test_what_cannot_be_reported_is_one_sentence(tmp_path, monkeypatch, capsys):
    a, other = result(tmp_path / "a"), result(tmp_path / "other", sha="1" * 64)
    half, game = result(tmp_path / "half"), arena(tmp_path / "game", "weak", ["human"])
    with (half / "answers.jsonl").open("a") as f:
        f.write('{"id": "new"}\n')
    broken = result(tmp_path / "broken")
    (broken / "result.json").write_text("[]")
    for arguments, part in (((tmp_path / "none",), "none/result.json does not exist: give folders"),
                            ((broken,), "broken/result.json cannot be read (it must be a JSON object)"),
                            ((half,), "half is no result (ValueError: answers.jsonl has other records"),
                            ((a, other), "are of different data"), ((a, a), "a folder is given twice"),
                            ((a, "--pin", "human=1000"), "'human' plays no game"),
                            ((game, "--pin", "humon=1"), "plays no game; the players: human, weak"),
                            ((game, "--pin", "human"), "--pin must be NAME=RATING,..., not 'human'"),
                            ((a, "--out", tmp_path / "x.json"), "--out must end in .html")):
        monkeypatch.setattr(sys, "argv", ["report", f"--out={tmp_path}/x.html", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            report.main()
        (line,) = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and line.startswith("error: ") and part in line
    assert not (tmp_path / "x.html").exists()


@pytest.mark.parametrize("values, texts", [
    ([0.1234, None], ["0.123", "–"]), ([8.876, 10.0], ["8.9", "10.0"]), ([1234.5, 0.5], ["1,234", "0"]),
    ([0.0, 0], ["0", "0"]), ([3, 4], ["3", "4"]), ([3, 4.0], ["3.00", "4.00"])])
def test_digits_are_those_that_the_largest_needs(values, texts):
    assert page.shown(values) == texts


def test_a_verdict_of_a_game_says_which_text_was_read_first():
    lines = [{"key": f"human/{order}", "verdict": {"winner": "A", "reason": "why"}} for order in (0, 1)]
    assert [report.describe_verdict(line) for line in lines] == [
        ("human, read first: wins", "why"), ("human, read second: loses", "why")]
    scalar = {"key": "a/b/1", "verdict": {"winner": "B", "scores": [0.5, 2.0]}}
    assert report.describe_verdict(scalar) == ("a/b, read second: wins scores [0.5, 2.0]", "")
    points = {"key": "c0", "verdict": {"score": 7, "reason": "why"}}
    assert report.describe_verdict(points) == ("criterion 1: score 7", "why")


# ---------------------------------------------------------------------- the page


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert not [name for name, _ in attributes if name.startswith("on") or name == "src"]

    def handle_data(self, text):
        if self.cdata_elem == "script":
            self.scripts.append(text)


def test_texts_are_no_markup_wherever_they_stand(tmp_path, monkeypatch):
    """In answers, names of models, judges, baselines and scores, paths, settings that differ."""
    bad = f"name{HOSTILE}"
    monkeypatch.setitem(WINS, bad, 3)
    a = result(tmp_path / "a", bad, scores={"S_l": 1.0, f"S_q/{HOSTILE}": 2.0}, judge=HOSTILE,
               sampling={HOSTILE: HOSTILE}, model={"path": HOSTILE, "fingerprint": "f"})
    b = arena(tmp_path / "b", bad, ["human", HOSTILE], judge=HOSTILE)
    run(monkeypatch, tmp_path, a, result(tmp_path / "c"), b)
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    found = Elements(text)
    assert found.tags.count("script") == 2 and "img" not in found.tags
    answer, _ = json.loads(found.scripts[0])["views"][0]["groups"][1]["samples"]
    assert answer["answer"] == f"{CHINESE} {HOSTILE}"


@pytest.fixture
def served(tmp_path):
    """Address of a server of the folder, and the paths that it was asked for."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, *_):
            asked.append(self.path)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


@pytest.mark.skipif(not chromium.PROGRAM, reason="no Chromium is installed")
@pytest.mark.parametrize("width, dark", [(1280, False), (400, True)])
def test_the_page_in_a_browser(tmp_path, monkeypatch, served, width, dark):
    """No error, nothing loaded, nothing wider than the screen; reader and scatter do what they should.
    An answer full of markup is text."""
    folders = [result(tmp_path / name, name) for name in WINS]
    game = arena(tmp_path / "g", "weak", ["human"], judge="a-name-without-a-break" * 9)
    run(monkeypatch, tmp_path, *folders, game)
    address, asked = served
    with chromium.Page(tmp_path / "profile", width, dark=dark) as tab:
        tab.open(f"{address}/r.html")
        assert tab.run("document.title") == "Evaluation: LongBench-Write, Arena-Write"
        assert tab.run("document.documentElement.scrollWidth <= innerWidth && innerWidth") == width
        light = tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert light is not dark

        def texts(selector):
            return tab.run(f"[...document.querySelectorAll('{selector}')].map(e => e.textContent)")

        answers = partial(texts, "article .body > .text")

        assert answers() == [f"answer 0 of {name}" for name in WINS]
        tab.press("ArrowRight")
        assert answers() == [f"{CHINESE} {HOSTILE}"] * 3
        assert tab.run("document.querySelector('article .text').closest('[lang]').lang") == "zh"
        assert tab.run("document.querySelectorAll('article details[open]').length") == 0
        assert texts("article details")[:2] == ["thinkinga plan 1",
                                                f"verdicts of gptRelevance 4, Accuracy 5{HOSTILE}"]
        tab.press("ArrowRight")
        assert texts("article .body")[0] == "no answerwhat there isresponse 2"
        tab.press("ArrowLeft")
        tab.press("ArrowLeft")
        assert answers() == [f"answer 0 of {name}" for name in WINS]

        assert texts('[data-at="3 1"] title') == [f"asked for 400, wrote 130: {CHINESE} 3"]
        tab.run("document.querySelector('[data-at=\"3 1\"]').onclick()")
        assert answers()[1] == "answer 3 of middle"
        assert tab.run("document.querySelectorAll('article')[1].getBoundingClientRect().left") < width - 300
        tab.run("show(0, 0)")
        tab.press("ArrowLeft")  # round to the last record of the other benchmark, which has one result
        assert answers() == ["answer 9 of weak"]
        assert tab.run("document.title").startswith("Evaluation")
    assert tab.console == [] and asked == ["/r.html"]
    assert {url for url in tab.requests if url != "data:,"} == {f"{address}/r.html"}


# ---------------------------------------------------------------------- runs


def trained(folder, steps=2, samples=4):
    """The folder of a run, all of whose texts, names and options are hostile. A step has two prompts; each
    answer says a sentence twice, the second time from character `len(SAID)` on."""
    (folder / "rollouts").mkdir(parents=True)
    (folder / "source").mkdir()
    (folder / "source/rewards.py").write_text(f"# {folder.name} {HOSTILE}\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"prompt_style": "think", "model": folder.name + HOSTILE}))
    lines = []
    for step in range(steps + 1):
        kind = "step" if step else "eval"
        m = {"step": step, f"reward/{HOSTILE}": step / 2, "along/entropy/think": [0.5, None, step],
             "by_request/ended": [None, *[1.0] * (len(REQUESTED) - 1)]}
        lines.append(m if step else {"step": 0, "eval/reward/length": 0.25})
        records = [{"prompt_id": f"p{b}{HOSTILE}", "sample": g, "prompt": f"Write: {HOSTILE} {b}",
                    "text": f"<think>plan {g} {HOSTILE}</think><answer>{SAID}{SAID}{step}{b}{g}</answer>",
                    "tokens": 6, "length_range": [40, 60], "finish_reason": "length",
                    "rewards": {f"r{HOSTILE}": g / 4, "none": None},
                    "advantages": {f"r{HOSTILE}": g - 1.5, "none": 0.0} if step else {},
                    "advantage": g - 1.5 if step else None} for b in range(2) for g in range(samples)]
        (folder / f"rollouts/{kind}_{step:06d}.jsonl").write_text(
            "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    tokens = np.arange(600.0 * samples, dtype=np.float32)
    save_file({"ids": tokens.astype(np.int32), "sampler_logp": -tokens, "trainer_logp": -tokens - 0.5,
               "entropy": tokens, "offsets": np.arange(0, 600 * samples + 1, 300)},
              folder / f"rollouts/step_{steps:06d}.safetensors")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
    return folder


SAID = f"The harbour was quiet that night, and {HOSTILE} stood at the gate for an hour. "


def write_page(monkeypatch, tmp_path, *arguments):
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments), "--out", str(tmp_path / "r.html")])
    report.main()


@pytest.mark.skipif(not chromium.PROGRAM, reason="no Chromium is installed")
@pytest.mark.parametrize("width, dark, scheme", [(1280, False, "file"), (400, True, "http")])
def test_every_view_of_a_run_shows_hostile_texts_as_text(tmp_path, monkeypatch, served, width, dark, scheme):
    """Two runs and a result: each step, prompt, curve and mark is opened, and nothing in them is executed."""
    write_page(monkeypatch, tmp_path, trained(tmp_path / "a"), trained(tmp_path / "b<script"),
               result(tmp_path / "strong"))
    address, asked = served
    where = f"file://{tmp_path}/r.html" if scheme == "file" else f"{address}/r.html"
    with chromium.Page(tmp_path / "profile", width, dark=dark) as tab:
        tab.open(where)
        assert tab.run("document.documentElement.scrollWidth <= innerWidth && innerWidth") == width

        def texts(selector):
            return tab.run(f"[...document.querySelectorAll('{selector}')].map(e => e.textContent)")

        answers = partial(texts, "article .body > .text")
        for details in range(tab.run("document.querySelectorAll('#curves details').length")):
            tab.run(f"document.querySelectorAll('#curves details')[{details}].open = true")
        assert tab.run("new Promise(done => setTimeout(done, 200))") is None
        assert tab.run("scrollY") == 0, "the page begins at its top"
        assert f"reward/{HOSTILE}" in texts("#curves b") and "along/entropy/think" in texts("#curves b")
        assert {"1/3", "3/3", "≥0", f"≥{REQUESTED[-1]}"} <= set(texts("#curves text"))
        assert f"model: a{HOSTILE} →" in texts("pre")[0] and f"+# b<script {HOSTILE}" in texts("pre")[0]
        count = len(texts("#view option"))
        assert count == 7, "three files of each run, one benchmark"
        for view in range(1, count):  # the first is the benchmark
            step = (view - 1) % 3
            for prompt in range(2):
                tab.run(f"show({view}, {prompt})")
                ranked = range(4) if step == 0 else range(3, -1, -1)
                assert answers()[:3] == [f"{SAID}{SAID}{step}{prompt}{g}" for g in ranked][:3]
                assert texts("article details")[0] == f"thinkingplan {ranked[0]} {HOSTILE}"
                assert texts("#query") == [f"Write: {HOSTILE} {prompt}"]
                assert f"r{HOSTILE} {ranked[0] / 4:.3f}" in texts("article")[0]
                assert len(texts("#elsewhere button")) == 5
                assert "".join(texts("article:first-child .copy")).startswith("The harbour was quiet")
        assert tab.run("document.querySelectorAll('.strip polygon').length") in (3, 4)
        assert tab.run("document.querySelector('.strip').clientHeight") == tab.run(
            "document.querySelector('.body').offsetHeight")
        tab.run("document.querySelector('.strip').dispatchEvent(new MouseEvent('click', {clientY: 1e4}))")
        tab.run("document.querySelector('.copy').click()")
        assert texts(".twin")[0].startswith("The harbour")
        tab.run("$('needle').value = 'harbour was'; $('needle').onchange()")
        assert texts("#found") == ["8 texts"] and texts(".hit")[0] == "harbour was"
        tab.run("document.querySelector('#elsewhere button').click(), 1")
        assert tab.run("new Promise(done => setTimeout(() => done(view), 100))") == 1
        tab.run("show(1, 0)")
        tab.run("document.querySelector('[data-at=\"1 3\"]').onclick()")
        assert tab.run("record") == 1
        assert tab.run("document.title").startswith("Evaluation: a, b<script")
    assert tab.console == [] and "/bait" not in asked


@pytest.mark.skipif(not chromium.PROGRAM, reason="no Chromium is installed")
def test_a_run_without_texts_shows_its_curves_alone(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/config.json").write_text("{}")
    (tmp_path / "a/metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n')
    write_page(monkeypatch, tmp_path, tmp_path / "a")
    with chromium.Page(tmp_path / "profile") as tab:
        tab.open(f"file://{tmp_path}/r.html")
        assert tab.run("new Promise(done => setTimeout(done, 200))") is None
        assert tab.run("$('reader').clientHeight") == 0
        assert tab.run("[...document.querySelectorAll('.curve')].map(x => x.getAttribute('points'))") == [
            "196,8 346,58"]
    assert tab.console == []


def test_a_second_call_makes_the_data_of_new_steps_alone(tmp_path, monkeypatch):
    folder, data = trained(tmp_path / "a", steps=2), tmp_path / "r_data/a"
    write_page(monkeypatch, tmp_path, folder)
    before = {f.name: f.stat().st_mtime_ns for f in data.glob("*.js")}
    text = (folder / "rollouts/step_000001.jsonl").read_text(encoding="utf-8")
    (folder / "rollouts/step_000003.jsonl").write_text(text, encoding="utf-8")
    with (folder / "metrics.jsonl").open("a") as f:
        f.write('{"step": 3, "loss": 1.0}\n')
    write_page(monkeypatch, tmp_path, folder)
    after = {f.name: f.stat().st_mtime_ns for f in data.glob("*.js")}
    assert after.keys() - before.keys() == {"step_000003.js"} and before.items() <= after.items()
    assert '"steps": [0, 1, 2, 3]' in (tmp_path / "r.html").read_text(encoding="utf-8")
