"""From a checkpoint to scores: whatever judges and kills do, each answer is written once and paid for once,
and the result is that of an undisturbed run."""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

import reward_model
from checkpoints import digest
from evaluation import benchmarks, scores
from evaluation.source import fingerprint
from lib import endpoint
from scripts import evaluate, export
from tests.fake_endpoint import FakeEndpoint
from tests.helpers import ROOT, in_process
from text import split

SHARED = ROOT.parent / "shared" / "data"
RECORDS = [{"id": f"r{i}", "prompt": f"Write a story of {20 + i} words about Vean and Rura." if i % 3 else
            f"写一篇{20 + i}字的故事", "type": "story", "length": 20 + i} for i in range(24)]
PRELUDE = """
import os, signal
from lib import endpoint
from scripts import evaluate
signal.signal(signal.SIGINT, signal.default_int_handler)
endpoint.BACK_OFF = endpoint.PAUSE = 0.02
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(endpoint, "BACK_OFF", 0.01)
    monkeypatch.setattr(endpoint, "PAUSE", 0.02)


@pytest.fixture
def data(tmp_path) -> Path:
    return jsonl(tmp_path / "data.jsonl", RECORDS)


def jsonl(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def options(folder: Path, **given) -> list[str]:
    """A base model that is asked as if in a chat: nearly each of its texts is an answer."""
    given = {"benchmark": "longbench_write", "data": folder.parent / "data.jsonl", "model": "data/tiny/base",
             "out": folder, "template": "chat", "max_new_tokens": 12, "device": "cpu"} | given
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def run(monkeypatch, capsys):
    """run(folder, **options) -> (exit code, everything it said), in this process."""
    def call(folder: Path, **given) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate", *options(folder, **given)])
        try:
            evaluate.main()
            code = 0
        except SystemExit as e:
            code = e.code
        return code, "".join(capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def start(forks):
    """start(folder, code, **options) -> (pid, wait); wait() -> (exit code, what it said). `code` runs
    first."""
    def begin(folder: Path, code: str = "", **given):
        (pid,), wait = forks.start(*options(folder, **given), main="scripts.evaluate", code=PRELUDE + code)

        def alone() -> tuple[int, str]:
            (code,), (said,) = wait()
            return code, said

        return pid, alone

    return begin


def result(folder: Path) -> dict:
    """What must not depend on kills."""
    found = json.loads((folder / "result.json").read_text())
    names = ("scores", "texts", "records", "games", "sampling", "model", "data")
    return {name: found[name] for name in names}


def files(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("answers.jsonl", "verdicts.jsonl")]


def answered(folder: Path) -> int:
    """Answers of a judge that are on disk, whole."""
    lines = [json.loads(line) for file in sorted(folder.glob("verdicts*.jsonl"))
             for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
    return sum(len(line["raw"]) for line in {line["hash"]: line for line in lines}.values())


def asked(fake: FakeEndpoint) -> dict[str, int]:
    """How often each question came, greetings apart."""
    texts = [call["messages"][-1]["content"] for call in fake.calls]
    return {text: texts.count(text) for text in texts if text != endpoint.HELLO}


def opinion(request: dict) -> str:
    """A judge whose answer depends on the question alone: some answers are never valid."""
    text = request["messages"][-1]["content"]
    number = int(hashlib.sha256(text.encode()).hexdigest(), 16)
    if number % 16 < 3:
        return ("no JSON {", '{"score": 11, "reason": "!"}', '{"verdict": 5}')[number % 16]
    if '"winner"' in text:
        return json.dumps({"reason": "so", "winner": ("A", "B", "tie")[number % 3]})
    if '"analysis"' in text:
        return json.dumps({"analysis": "so"} | {name: 1 + (number + i) % 5
                                                for i, name in enumerate(benchmarks.DIMENSIONS)})
    return f'<think>{{"score": 0}}</think>```json\n{{"reason": "so", "score": {1 + number % 10}}}\n```'


# ---------------------------------------------------------------------- kills


@pytest.mark.slow
def test_killed_at_three_places_the_result_is_that_of_an_undisturbed_run(data, tmp_path, start):
    """While answers are written, while they are judged, and between verdicts and scores."""
    with FakeEndpoint(reply=opinion) as fake:
        given = dict(judge=f"{fake.url}/v1#judge", threads=2)
        assert start(tmp_path / "calm", **given)[1]()[0] == 0
        calm, fake.calls = asked(fake), []
        assert {1, 5} == set(calm.values()) and len(calm) > 10, "an invalid answer is asked for 5 times"

        folder = tmp_path / "killed"
        part = folder / "answers.part-0.jsonl"
        pid, wait = start(folder, max_sequences=1, **given)  # one after another, so that there is a middle
        while not part.exists() or part.read_bytes().count(b"\n") < 6:
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        assert wait()[0] == -9
        lines = part.read_text().split("\n")[:-1]
        assert 6 <= len(lines) < 24
        marked = json.dumps(json.loads(lines[0]) | {"marked": True}, ensure_ascii=False)
        part.write_text("\n".join([marked, *lines[1:], lines[0][:40]]))  # and a line was torn
        assert len(evaluate.read_folder(folder)[1]) == len(lines) and part.read_bytes().endswith(b"}\n")

        fake.behave = lambda *_: time.sleep(0.03) or "ok"
        pid, wait = start(folder, **given)
        while sum(asked(fake).values()) < 20:
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        assert wait()[0] == -9
        assert sum(asked(fake).values()) - answered(folder) <= 2, "what was under way on 2 threads"
        with (folder / "verdicts.part-0.jsonl").open("a") as f:
            f.write('{"hash": "')  # and a line was torn

        code, said = start(folder, "evaluate.score = lambda *_: os.kill(os.getpid(), 9)", **given)[1]()
        assert code == -9 and (folder / "verdicts.jsonl").exists()
        assert 0 <= sum(asked(fake).values()) - sum(calm.values()) <= 2 and asked(fake).keys() == calm.keys()
        before = sum(asked(fake).values())
        code, said = start(folder, **given)[1]()
        assert code == 0 and sum(asked(fake).values()) == before and " 0 calls now" in said, said

    made = read(folder / "answers.jsonl")
    assert made[[a["id"] for a in made].index(json.loads(marked)["id"])].pop("marked"), "it was written twice"
    jsonl(folder / "answers.jsonl", made)
    assert files(folder) == files(tmp_path / "calm") and result(folder) == result(tmp_path / "calm")
    assert not list(folder.glob("*.part-*"))
    usage = [json.loads((f / "result.json").read_text())["judge"] for f in (folder, tmp_path / "calm")]
    assert usage[0] == usage[1] and usage[0]["calls"] == sum(calm.values())


@pytest.mark.parametrize("where", ["answers", "verdicts"])
def test_ctrl_c_gets_one_sentence_and_loses_nothing(data, tmp_path, start, where):
    part = tmp_path / "out/answers.part-0.jsonl"
    with FakeEndpoint(lambda *_: time.sleep(0.1) or "ok", opinion) as fake:
        pid, wait = start(tmp_path / "out", max_sequences=1, judge=f"{fake.url}/v1#judge", threads=2)
        while sum(asked(fake).values()) < 6 if where == "verdicts" else not (
                part.exists() and part.read_bytes()):
            time.sleep(0.002)
        os.kill(pid, signal.SIGINT)
        code, said = wait()
        assert code == 130 and said.splitlines()[-1].startswith("stopped: ") and "Traceback" not in said, said
        if where == "verdicts":
            assert sum(asked(fake).values()) - 2 <= answered(tmp_path / "out")
            assert len(read(tmp_path / "out/answers.jsonl")) == 24
        else:
            assert 1 <= len(read(part)) < 24


# ---------------------------------------------------------------------- judges that are servers


@pytest.mark.parametrize("benchmark, file, count", [
    ("longbench_write", "longbench_write/longbench_write.jsonl", 120),
    ("ruler", "longbench_write/longwrite_ruler.jsonl", 48),
    ("writingbench", "writingbench/length_subset.head.jsonl", 8)])
def test_real_records_go_through_whatever_the_server_does(benchmark, file, count, tmp_path, run):
    if not (SHARED / file).exists():
        pytest.skip(f"no {file} at ../shared/data")
    bad = ("429", "ok", "500", "ok", "broken", "ok", "cut", "ok", "wrong", "ok", "ok")
    with FakeEndpoint(lambda i, _: "slow" if i == 7 else bad[i % len(bad)], opinion) as fake:
        given = dict(benchmark=benchmark, data=SHARED / file, judge=f"{fake.url}/v1#judge", price="2,8",
                     max_new_tokens=128)
        code, said = run(tmp_path / "out", **given)
        while code == 0 and "asks again" in said:  # where four calls in a row failed
            code, said = run(tmp_path / "out", **given)
    made = read(tmp_path / "out/answers.jsonl")
    found = json.loads((tmp_path / "out/result.json").read_text())
    assert code == 0 and len(made) == count == len(found["records"]) == found["data"]["records"], said
    assert {a["finish_reason"] for a in made} <= {"stop", "length"} and all(a["tokens"] <= 128 for a in made)
    assert found["texts"]["missing_answers"] == sum(not a["answer"] for a in made) / count
    if benchmark == "ruler":
        assert found["judge"] is None and not fake.calls and not (tmp_path / "out/verdicts.jsonl").exists()
        return
    given = [v for v in read(tmp_path / "out/verdicts.jsonl") if v["verdict"]]
    missing = [v for v in read(tmp_path / "out/verdicts.jsonl") if not v["verdict"]]
    assert len(given) > len(missing) > 0 and all(len(v["raw"]) == 5 and v["error"] for v in missing)
    calls = len(given) + 5 * len(missing)
    assert found["judge"]["calls"] == calls and found["judge"]["missing"] == len(missing)
    assert (found["judge"]["prompt_tokens"], found["judge"]["completion_tokens"]) == (5 * calls, 7 * calls)
    assert found["judge"]["cost"] == pytest.approx(calls * (5 * 2 + 7 * 8) / 1e6)


def test_an_invalid_answer_is_asked_for_again_and_kept(data, tmp_path, run):
    count = {}

    def reply(request):
        text = request["messages"][-1]["content"]
        count[text] = count.get(text, 0) + 1
        scores = dict.fromkeys(benchmarks.DIMENSIONS, 6 if count[text] == 1 else 3)
        return json.dumps(scores | {"analysis": "so"})

    with FakeEndpoint(reply=reply) as fake:
        given = dict(judge=f"{fake.url}/v1#judge")
        assert run(tmp_path / "one", **given)[0] == 0
        assert set(asked(fake).values()) == {2}
        verdicts = read(tmp_path / "one/verdicts.jsonl")
        assert all(len(v["raw"]) == 2 and '"Clarity": 6' in v["raw"][0] and v["verdict"]["Clarity"] == 3
                   for v in verdicts) and result(tmp_path / "one")["scores"]["S_q"] > 0
        before = len(fake.calls)
        assert run(tmp_path / "one", **given)[0] == 0 and len(fake.calls) == before
        assert read(tmp_path / "one/verdicts.jsonl") == verdicts
        assert run(tmp_path / "two", judge_settings='{"temperature": 1}', **given)[0] == 0
        assert len(asked(fake)) == len(verdicts) and set(asked(fake).values()) == {3}, "another judge"
        assert all(c["temperature"] == 1 for c in fake.calls[-len(verdicts):])
        (tmp_path / "one/verdicts.jsonl").unlink()  # a kill leaves a half, one try, a torn line
        half, before = len(verdicts) // 2, len(fake.calls)
        begun = verdicts[half] | {"verdict": None, "raw": verdicts[half]["raw"][:1], "tokens": [[5, 7]]}
        part = jsonl(tmp_path / "one/verdicts.part-0.jsonl", [*verdicts[:half], begun])
        part.write_text(part.read_text() + '{"hash": "')
        count.clear()
        assert run(tmp_path / "one", **given)[0] == 0
        assert len(fake.calls) - before == 2 * (len(verdicts) - half), "the rest"
        assert len(read(tmp_path / "one/verdicts.jsonl")[half].pop("raw")) == 3 and not part.exists()
        assert [v | {name: v[name][-2:] for name in ("raw", "tokens")}
                for v in read(tmp_path / "one/verdicts.jsonl")] == verdicts


def test_what_was_judged_by_one_is_not_mixed_with_another(data, tmp_path, run):
    """Nor are answers of other settings; without a model the same folder is scored again."""
    with FakeEndpoint(reply=opinion) as fake:
        given = dict(judge=f"{fake.url}/v1#judge")
        assert run(tmp_path / "out", **given)[0] == 0
        made, scored = files(tmp_path / "out"), result(tmp_path / "out")
        for change, words in [
                (dict(seed=1), "answers by other settings: seed (0 there, 1 now); choose another --out"),
                (dict(temperature=0.1), "temperature (0.5 there, 0.1 now)"),
                (dict(model="data/tiny/writing"), "is a reward model, which writes nothing"),
                (dict(judge=f"{fake.url}/v1#other"), "verdicts by other settings: judge ('judge' there, 'ot"),
                (dict(judge=""), "judge ('judge' there, None now)")]:
            code, said = run(tmp_path / "out", **given | change)
            assert code == 2 and words in said and len(said.splitlines()) == 1, said
            assert files(tmp_path / "out") == made
        (tmp_path / "out/result.json").unlink()
        assert run(tmp_path / "out", model="", **given)[0] == 0
        assert result(tmp_path / "out") == scored
        (tmp_path / "out/verdicts.jsonl").unlink()
        assert run(tmp_path / "out", **given | dict(judge=f"{fake.url}/v1#other"))[0] == 0


# ---------------------------------------------------------------------- answers


@pytest.mark.slow
def test_answers_depend_on_seed_and_id_not_on_order_or_ranks(data, tmp_path, run, forks):
    """What another number of ranks had begun is taken over. A checkpoint judges alike on any number, too."""
    judge = dict(judge="data/tiny/base", tries=1, judge_settings='{"max_tokens": 4, "temperature": 1}')
    assert run(tmp_path / "one", **judge)[0] == 0
    one = {a["id"]: a for a in read(tmp_path / "one/answers.jsonl")}
    assert [*one] == [r["id"] for r in RECORDS] and len({a["response"] for a in one.values()}) > 20
    (tmp_path / "two").mkdir()
    (tmp_path / "two/settings.json").write_bytes((tmp_path / "one/settings.json").read_bytes())
    jsonl(tmp_path / "two/answers.part-3.jsonl", [one["r5"] | {"marked": True}])
    codes, said = forks.start(*options(tmp_path / "two", **judge), ranks=2, main="scripts.evaluate")[1]()
    assert codes == [0, 0], said
    assert files(tmp_path / "two")[1] == files(tmp_path / "one")[1] != b""
    two = read(tmp_path / "two/answers.jsonl")
    assert two[5].pop("marked") and two == [*one.values()] and result(tmp_path / "two")["scores"]
    jsonl(data, RECORDS[::-1])
    assert run(tmp_path / "three", seed=0)[0] == 0
    assert {a["id"]: a for a in read(tmp_path / "three/answers.jsonl")} == one
    assert run(tmp_path / "four", seed=1)[0] == 0
    assert sum(a["response"] == one[a["id"]]["response"] for a in read(tmp_path / "four/answers.jsonl")) < 6


def test_a_runs_checkpoint_answers_as_its_export_does_in_the_runs_own_template(data, tmp_path, run):
    in_process(tmp_path / "run", "--steps", "4", "--eval_prompts", "", "--lr", "1e-3", "--prompt_style",
               "direct")
    export.export(tmp_path / "run", tmp_path / "hf")
    checkpoint = tmp_path / "run/checkpoints/step_000002"
    given = dict(template="auto", max_new_tokens=48)
    for name, model in (("run", tmp_path / "run"), ("step", checkpoint), ("base", "data/tiny/base")):
        code, said = run(tmp_path / f"of_{name}", model=model, **given)
        assert code == 0, said
    assert run(tmp_path / "of_hf", model=tmp_path / "hf",
               **given | dict(template="direct"))[0] == 0
    made = {name: read(tmp_path / f"of_{name}/answers.jsonl") for name in ("run", "hf", "step", "base")}
    about = {name: json.loads((tmp_path / f"of_{name}/result.json").read_text()) for name in made}
    assert made["run"] == made["hf"] != made["step"]
    assert [about[name]["sampling"]["template"] for name in made] == ["direct", "direct", "direct", "think"]
    assert len({about[name]["model"]["fingerprint"] for name in made}) == 4
    weights = (tmp_path / "run/checkpoints/step_000004/weights").iterdir()
    digests = {f"weights/{f.name}": digest(f) for f in weights}
    assert about["run"]["model"]["fingerprint"] == fingerprint(digests)
    assert about["run"]["model"]["path"].endswith("step_000004") and about["run"]["name"] == "of_run"


def test_a_query_that_fills_the_context_is_missing_and_so_counted(tmp_path, run):
    jsonl(tmp_path / "data.jsonl", [RECORDS[0], RECORDS[1] | {"prompt": "word " * 3000}])
    code, said = run(tmp_path / "out", max_new_tokens=5000)
    short, long = read(tmp_path / "out/answers.jsonl")
    assert code == 0 and "2 answers" in said and short["tokens"] > 12
    assert (long["response"], long["finish_reason"], long["tokens"]) == ("", "length", 0)
    assert json.loads((tmp_path / "out/result.json").read_text())["texts"]["missing_answers"] >= 0.5


def test_what_is_judged_is_the_answer_without_thinking_and_tags():
    for style, text, expected in [
            ("think", "<think>A plan.</think><answer>A text.</answer>", ("A plan.", "A text.")),
            ("think", "<think>A plan.</think><answer>A te", ("A plan.", "A te")),
            ("think", "A text.", ("", "")), ("think", "<think>A plan", ("", "")),
            ("direct", "<answer>A text.</answer>", ("", "A text.")),
            ("chat_nothink", "A text.", ("", "A text.")), ("chat", "A text.", ("", "A text.")),
            ("chat", "A plan.</think>A text.", ("A plan.", "A text.")),
            ("chat", "<think>\nA plan.</think>\nA text.", ("A plan.", "A text.")),
            ("chat", "<think>A plan", ("A plan", "")),
            ("chat", "<think>A plan.</think><answer>A text.</answer>", ("A plan.", "A text."))]:
        assert split(text, style) == expected


def test_thinking_is_switched_off_as_qwen3s_template_does_it(data, tmp_path, run, monkeypatch):
    asked, generate = [], evaluate.rollout.generate

    def recorded(sampler, requests, world):
        asked.extend(sampler.tokenizer.decode(r.prompt_ids) for r in requests)
        return generate(sampler, requests, world)

    monkeypatch.setattr(evaluate.rollout, "generate", recorded)
    for template, end in (("chat", ""), ("chat_nothink", "<think>\n\n</think>\n\n")):
        assert run(tmp_path / template, template=template, max_new_tokens=2)[0] == 0
        assert asked and all(text.endswith(f"<|im_end|>\n<|im_start|>assistant\n{end}") for text in asked)
        assert json.loads((tmp_path / template / "settings.json").read_text())["answers"]["stop"] == []
        asked.clear()


def test_defaults_are_those_of_the_benchmark(data):
    for benchmark, expected in [("writingbench", (16000, 0.7, 0.8, 20)),
                                ("longbench_write", (32768, 0.5, 1, 0))]:
        config = evaluate.Config(benchmark, str(data), "data/tiny/base", device="cpu")
        model = evaluate.find("data/tiny/base")
        made = evaluate.sampling(config, model, evaluate.torch.device("cpu"))
        names = ("max_new_tokens", "temperature", "top_p", "top_k")
        assert tuple(made[name] for name in names) == expected
        config = evaluate.Config(benchmark, temperature=0.0, top_k=0, top_p=0.5, max_new_tokens=7)
        made = evaluate.sampling(config, model, evaluate.torch.device("cpu"))
        assert tuple(made[name] for name in names) == (7, 0.0, 0.5, 0)


# ---------------------------------------------------------------------- judges of our own


def test_a_reward_model_compares_evaluations(data, tmp_path, run):
    """Its scores, swapped too; equal texts tie, a text wins against none, and two that are none do not
    play."""
    given = dict(benchmark="arena", template="think", max_new_tokens=64, temperature=0.8)
    assert run(tmp_path / "base", **given)[0] == 0
    code, said = run(tmp_path / "mine", judge="data/tiny/writing", seed=3,
                     baselines=tmp_path / "base", **given)
    assert code == 0, said
    theirs, mine = ({a["id"]: a["answer"] for a in read(tmp_path / name / "answers.jsonl")}
                    for name in ("base", "mine"))
    found, verdicts = result(tmp_path / "mine"), read(tmp_path / "mine/verdicts.jsonl")
    playing = [i for i in mine if mine[i] or theirs[i]]
    assert [game[1:3] for game in found["games"]] == [["base", i] for i in playing] and len(playing) < 24
    keys = [(i, f"base/{order}") for i in mine if mine[i] for order in (0, 1)]
    assert [(v["id"], v["key"]) for v in verdicts] == keys
    world = evaluate.distributed.setup("cpu")
    scorer = reward_model.Scorer("data/tiny/writing", reward_model.check("data/tiny/writing"), 4096, world)
    for name, _, i, points in found["games"]:
        given_verdicts = [v["verdict"] for v in verdicts if v["id"] == i]
        assert name == "mine"
        if not mine[i] or not theirs[i]:
            assert points == float(bool(mine[i]))
            continue
        query = next(r["prompt"] for r in RECORDS if r["id"] == i)
        a, b = scorer([(query, mine[i]), (query, theirs[i])])
        assert given_verdicts[0]["scores"] == pytest.approx([a, b], abs=1e-5)
        assert given_verdicts[1]["scores"] == given_verdicts[0]["scores"][::-1] and points == float(a > b)
    evaluate.distributed.close()
    assert run(tmp_path / "twin", judge="data/tiny/writing", baselines=tmp_path / "base",
               **given)[0] == 0
    assert {game[3] for game in result(tmp_path / "twin")["games"]} == {0.5}


def test_a_checkpoint_judges_through_our_sampler_and_is_not_asked_again(data, tmp_path, run, monkeypatch):
    """Tries have seeds of their own; what is valid here, no real verdict of so small a model would be."""
    def parse(benchmark, text):
        if len(text) % 3 == 0:
            raise ValueError("not now")
        return dict.fromkeys(benchmarks.DIMENSIONS, 1 + len(text) % 5) | {"analysis": text}

    monkeypatch.setattr(benchmarks, "parse", parse)
    jsonl(data, RECORDS[:6])
    given = dict(judge="data/tiny/base", judge_settings='{"temperature": 1, "max_tokens": 16}')
    code, said = run(tmp_path / "one", **given)
    assert code == 0, said
    verdicts, usage = (read(tmp_path / "one/verdicts.jsonl"),
                       json.loads((tmp_path / "one/result.json").read_text())["judge"])
    assert usage["calls"] == sum(len(v["raw"]) for v in verdicts) > len(verdicts) >= 4
    assert all(len(set(v["raw"])) == len(v["raw"]) and (v["verdict"] or len(v["raw"]) == 5 or
                                                        "context" in v["error"]) for v in verdicts)
    assert usage["completion_tokens"] <= 16 * usage["calls"] and usage["prompt_tokens"] > 100 * usage["calls"]
    monkeypatch.setattr("evaluation.judge.open_sampler", lambda *_: pytest.fail("nothing is left to ask"))
    assert run(tmp_path / "one", **given)[0] == 0
    assert read(tmp_path / "one/verdicts.jsonl") == verdicts


# ---------------------------------------------------------------------- errors


def test_bad_input_gets_one_sentence_before_anything_is_written(data, tmp_path, run, monkeypatch):
    monkeypatch.setattr(evaluate, "generate", lambda *_: pytest.fail("answers were written"))
    no_criteria = jsonl(tmp_path / "wb.jsonl", [{"index": 1, "domain1": "a", "domain2": "b", "query": "W."}])
    (tmp_path / "file").write_text("")
    (tmp_path / "half/checkpoints/step_000001").mkdir(parents=True)
    (tmp_path / "half/config.json").write_text("{}")
    (tmp_path / "no/answers.jsonl").parent.mkdir()
    (tmp_path / "no/answers.jsonl").write_text("{}\n")
    with FakeEndpoint(lambda *_: "401") as fake:
        for change, words in [
                (dict(benchmark="mmlu"), "benchmark must be one of longbench_write, ruler"),
                (dict(data=""), "--data is missing"),
                (dict(data="nowhere.jsonl"), "nowhere.jsonl cannot be read"),
                (dict(data=no_criteria), "wb.jsonl, line 1, read as longbench_write: type must be a"),
                (dict(data=no_criteria, benchmark="writingbench"), "read as writingbench: checklist must"),
                (dict(benchmark="arena", judge="data/tiny/writing"), "without baseline_response: give --bas"),
                (dict(model=""), "--model is missing"), (dict(model="nowhere"), "nowhere"),
                (dict(model=tmp_path / "half"), "step_000001"), (dict(template="raw"), "template must be"),
                (dict(model="data/tiny/writing"), "reward model"),
                (dict(judge="data/tiny/writing"), "for arena"),
                (dict(judge="ftp://x"), "no address"), (dict(judge="http://127.0.0.1:9/v1#x"), "refused"),
                (dict(judge=f"{fake.url}/v1#x"), "answered 401"), (dict(judge="nowhere"), "nowhere"),
                (dict(judge="http://x", judge_settings="{"), "judge_settings { must be a JSON object"),
                (dict(judge="http://me:sk-1@x", judge_settings="{}"), "one with @ or ? is no address"),
                (dict(judge="data/tiny/base", judge_settings='{"n": 2}'), "judge_settings has n 2"),
                (dict(price="2"), "price '2' must be two numbers"), (dict(price="a,b"), "price"),
                (dict(top_p=2), "top_p must be at most 1, not"), (dict(tries=0), "tries must be positive"),
                (dict(baselines="x"), "opponents in arena"), (dict(tp=3), "tp 3 does not divide"),
                (dict(benchmark="arena", baselines=tmp_path), "settings.json does not exist: evaluate"),
                (dict(out=tmp_path / "file/out"), "cannot be"),
                (dict(out=tmp_path / "no"), "settings.json does not exist: choose"),
                (dict(temprature=1), "'temperature'")]:
            code, said = run(change.pop("out", tmp_path / "out"), **change)
            lines = [line for line in said.splitlines() if not line.startswith("warning: ")]
            assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (change, said)
            assert words in said, (change, said)
    assert not (tmp_path / "out/answers.jsonl").exists() and not scores.mean([])
    assert os.environ.get("RANK") is None
