"""The writing reward by servers, in whole runs: whatever they do, no sample gets a score that it has not, and
training goes on, or waits where nobody answers."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import rewards
import train
from lib import endpoint
from lib.options import UserError
from scripts import plan
from tests.fake_endpoint import FakeEndpoint
from tests.helpers import ROOT, metrics

SMALL = ["--prompts_per_step", "2", "--group_size", "8", "--max_new_tokens", "64", "--unreachable", "keep",
         "--eval_prompts", "", "--save_every", "100", "--reward", "writing"]


def score(request: dict) -> float:
    return (len(request["input"]) % 9 - 4) / 2


@pytest.fixture
def quick(monkeypatch):
    for module, name, value in ((endpoint, "BACK_OFF", 0.01), (endpoint, "PAUSE", 0.05),
                                (rewards, "SERVER_TIMEOUT", 0.5)):
        monkeypatch.setattr(module, name, value)


def in_process(folder: Path, urls: str, steps: int) -> list[dict]:
    train.train(train.parse([*SMALL, "--run_dir", str(folder), "--steps", str(steps),
                             "--reward_model", urls]))
    return [json.loads(line) for step in range(1, steps + 1)
            for line in (folder / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()]


def test_servers_that_misbehave_cost_samples_that_are_counted_and_no_run(tmp_path, capsys, quick):
    """One server hangs, one dies in the middle, one fails on every second call in some way. Both that answer
    fail on some texts for good."""
    def hopeless(request):
        return len(request["input"]) % 4 == 0

    def behave(number, request):
        if number == 3:
            threading.Thread(target=dies.stop).start()
        if hopeless(request):
            return ("500", "broken", "wrong")[number % 3]
        return ("ok", "429", "ok", "500", "ok", "cut", "ok", "broken")[number % 8]

    with FakeEndpoint(lambda *_: "hang") as hangs, FakeEndpoint(
            lambda _, request: "500" if hopeless(request) else "ok", score=score) as dies:
        with FakeEndpoint(behave, score=score) as fails:
            texts = in_process(tmp_path / "run", f"{hangs.url},{dies.url}, {fails.url}/classify", steps=2)
        asked = {r["input"] for r in dies.calls + fails.calls}
        assert dies.released.is_set()
    scored = 0
    for r in texts:
        body = rewards.structure(r["text"])[2]
        value, request = r["rewards"]["writing"], f"{r['prompt'].splitlines()[-1]} {body}<|endoftext|>"
        if body is None:
            group = [x for x in texts if x["prompt_id"] == r["prompt_id"] and rewards.structure(x["text"])[2]]
            given = [x for x in (x["rewards"]["writing"] for x in group) if x is not None]
            assert all(value < x for x in given), "below all that was scored, never asked"
            assert given or value is None
        else:
            assert request in asked
            scored += value is not None
            assert value in (None, score({"input": request}))
    missing = [m["missing/writing"] for m in metrics(tmp_path / "run")]
    assert sum(missing) == sum(r["rewards"]["writing"] is None for r in texts)
    assert scored > 4 and len(texts) == 32
    warnings = [line for line in capsys.readouterr().err.splitlines() if "is missing for" in line]
    assert len(warnings) == sum(n > 0 for n in missing) > 0
    assert all("Unavailable" in line and fails.url in line for line in warnings)


@pytest.mark.parametrize("scale, offset", [(1, 20), (1, -5), (1e-3, 1e3)])
def test_a_model_of_any_scale_and_mean_drives_the_advantage_as_one_around_zero_does(scale, offset, tmp_path):
    advantages = []
    for name, a, b in (("zero", 1, 0), ("moved", scale, offset)):
        with FakeEndpoint(score=lambda request, a=a, b=b: b + a * score(request)) as fake:
            texts = in_process(tmp_path / name, fake.url, steps=1)
        advantages.append([r["advantage"] for r in texts])
        assert all(r["advantage"] < 0 for r in texts if not rewards.structure(r["text"])[2])
    assert advantages[1] == pytest.approx(advantages[0], abs=1e-5) and 0.9 < np.std(advantages[0]) < 1.01
    assert len({rewards.structure(r["text"])[2] is None for r in texts}) == 2


@pytest.mark.slow
def test_while_no_server_answers_all_ranks_wait_and_can_be_stopped(tmp_path):
    """It dies with the fourth call of the first step and is back 2 s later; later it dies for good."""
    def behave(number, request):
        if number in (4, 20):
            threading.Thread(target=fake.stop).start()
            return "hang"
        return "ok"

    def said(words: str, n: int = 1) -> str:
        start = time.monotonic()
        while log.read_text().count(words) < n:
            assert time.monotonic() - start < 200 and run.poll() is None, log.read_text()[-3000:]
            time.sleep(0.05)
        return next(line for line in log.read_text().splitlines() if words in line)

    log = tmp_path / "log"
    with FakeEndpoint(behave, score=score) as fake, log.open("w") as out:
        run = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
             str(ROOT / "train.py"), *SMALL, "--steps", "100", "--run_dir", str(tmp_path / "run"),
             "--reward_model", fake.url],
            cwd=ROOT, env=os.environ, stdout=out, stderr=out)
        paused = said("paused: step 1 waits for its scores, and no server answers")
        assert f"{fake.url} since " in paused and "refused" in paused
        time.sleep(2)
        assert log.read_text().count("paused") == 1
        fake.start()
        said("step 1 goes on: a server answers again")
        said("paused", 2)
        run.send_signal(signal.SIGTERM)
        run.wait(60)
    assert "stopped by SIGTERM: step " in log.read_text() and "error: " not in log.read_text()
    made = metrics(tmp_path / "run")
    assert len(made) >= 1 and all(m["missing/writing"] == 0 for m in made), "none is lost by the pause"


@pytest.mark.parametrize("urls, words", [("gpu1://x", "'gpu1://x' is no address"), ("", "answered 404")])
def test_servers_that_cannot_be_are_named_before_weights_load(tmp_path, urls, words):
    with FakeEndpoint(lambda *_: "404") as fake, pytest.raises(UserError, match=words):
        in_process(tmp_path / "run", urls or fake.url, steps=1)
    assert not (tmp_path / "run").exists()


def test_a_reward_server_gets_its_own_key_and_not_that_of_the_judges(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-judge")
    with FakeEndpoint(score=score) as fake:
        for key, sent in ((None, None), ("sk-reward", "Bearer sk-reward")):
            if key:
                monkeypatch.setenv("REWARD_API_KEY", key)
            writing = rewards.Writing()
            writing.check(SimpleNamespace(reward_model=fake.url))
            writing(SimpleNamespace(text="<answer>A text.</answer>"), SimpleNamespace(query="Write."))
            assert [h.get("Authorization") for h in fake.headers[-2:]] == [sent] * 2 and fake.calls


def test_a_plan_counts_no_model_of_a_server_and_says_where_none_is_given(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # is set for the check of the config
    for where, said in (("http://gpu9:8000/classify", "It fits."), ("Qwen2.5-0.5B-writing", "It fits."),
                        ("", "It fits. The reward model comes on top.")):
        plan.show(["--gpus", "1", "--reward_model", where])
        out = capsys.readouterr().out
        assert out.splitlines()[-1] == said and ("is not counted" in out) == (not where)
        assert ("reward model's weights" in out) == where.startswith("Qwen")


def test_servers_may_move_while_a_run_is_away(tmp_path, quick):
    with FakeEndpoint(score=score) as old:
        in_process(tmp_path / "run", old.url, steps=1)
    with FakeEndpoint(score=score) as new:
        in_process(tmp_path / "run", new.url, steps=2)
    assert len(new.calls) > 1 and [m["step"] for m in metrics(tmp_path / "run")] == [1, 2]
