"""Rewards marked `@remote`: they overlap with decoding, and whatever they do, training goes on."""

import json
import os
import random
import threading
import time
from types import SimpleNamespace

import pytest
import torch

import rewards
import rollout
import train
from lib.scoring import Remote, Reward, RewardError
from rewards import batched, remote
from tests.helpers import metrics

LONG = 20  # seconds that a test waits for what must happen
SMALL = ["--prompts_per_step", "2", "--group_size", "8", "--max_new_tokens", "24", "--unreachable",
         "keep", "--eval_prompts", "", "--save_every", "100", "--steps", "1"]


def step(folder, monkeypatch, **functions) -> tuple[dict, list[dict], torch.Tensor]:
    """A run of one step with these rewards: its metrics, rollouts and rewards_BGR."""
    seen, score = [], rollout.sample_and_score
    monkeypatch.setattr(rollout, "sample_and_score", lambda *a: seen.append(score(*a)) or seen[-1])
    for name, function in functions.items():
        monkeypatch.setitem(rewards.REWARDS, name, (function, 1.0))
    train.train(train.parse([*SMALL, "--run_dir", str(folder), "--reward", ",".join(functions)]))
    lines = (folder / "rollouts" / "step_000001.jsonl").read_text().splitlines()
    return metrics(folder)[0], [json.loads(line) for line in lines], seen[0].rewards_BGR


def place(completion) -> int:
    return completion.prompt_index * 8 + completion.sample_index


def test_a_remote_reward_is_called_while_others_decode_and_none_waits_for_it(tmp_path, monkeypatch):
    """No call returns before all 16 samples are there, 8 are under way then, and the first began before
    the last sample was scored by a rule."""
    begun, generated, rule_calls, judge_threads = threading.Semaphore(0), threading.Event(), [], []

    @remote(threads=8)
    def judge(completion, prompt):
        judge_threads.append(threading.current_thread())
        begun.release()
        assert generated.wait(LONG)
        return float(len(completion.text))

    def rule(completion, prompt):
        rule_calls.append(threading.current_thread())
        if len(rule_calls) == 2 + 16:  # 2 in the dry run
            assert begun.acquire(timeout=LONG)
        return 1.0

    @batched
    def model(completions, prompts):
        assert all(begun.acquire(timeout=LONG / 2) for _ in range(7)), "fewer than 8 at a time"
        assert not begun.acquire(timeout=0.1), "more than 8 at a time"
        generated.set()
        return [None for c in completions]

    m, records, _ = step(tmp_path / "run", monkeypatch, judge=judge, rule=rule, model=model)
    assert m["missing/judge"] == 0 and m["missing/model"] == 16
    assert [r["rewards"]["judge"] for r in records] == [len(r["text"]) for r in records]
    assert set(rule_calls) == {threading.main_thread()} and len(judge_threads) == 16, "no dry run"
    for thread in set(judge_threads):
        thread.join(LONG)
        assert not thread.is_alive(), "threads end with their step"


def test_scores_belong_to_their_samples_whenever_they_are_back(tmp_path, monkeypatch, capsys):
    """A None is missing, but no failure."""
    rng = random.Random(1)
    delays = [rng.uniform(0, 0.05) for _ in range(16)]

    @remote
    def judge(completion, prompt):
        time.sleep(delays[place(completion)])
        return None if place(completion) == 5 else place(completion)

    m, records, rewards_BGR = step(tmp_path / "run", monkeypatch, judge=judge)
    expected = [None if i == 5 else i for i in range(16)]
    assert [r["rewards"]["judge"] for r in records] == expected
    assert rewards_BGR.flatten().isnan().tolist() == [i == 5 for i in range(16)]
    assert m["missing/judge"] == 1 and m["reward/judge"] == pytest.approx((120 - 5) / 15)
    assert not capsys.readouterr().err


def test_where_a_remote_reward_raises_it_is_missing_and_a_line_says_so(tmp_path, monkeypatch, capsys):
    """CancelledError and SystemExit are no Exception, and end no thread."""
    refused = ConnectionError("refused\nby peer")
    errors = {3: refused, 4: SystemExit(1), 11: refused}

    @remote(threads=1, patience=LONG)
    def judge(completion, prompt):
        if place(completion) in errors:
            raise errors[place(completion)]
        return place(completion)

    start = time.monotonic()
    m, records, rewards_BGR = step(tmp_path / "run", monkeypatch, judge=judge)
    assert time.monotonic() - start < LONG
    assert [r["rewards"]["judge"] for r in records] == [None if i in errors else i for i in range(16)]
    assert rewards_BGR.flatten().isnan().tolist() == [i in errors for i in range(16)]
    assert m["missing/judge"] == 3
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("warning: step 1: reward 'judge' is missing for 3 samples, because it failed: "
                           "2 x ConnectionError (refused by peer) in test_remote.py, line ")
    assert "; 1 x SystemExit (1) in " in line


def test_a_server_that_vanishes_ends_no_run(tmp_path, monkeypatch, capsys):
    @remote
    def judge(completion, prompt):
        raise ConnectionError("gone")

    m, _, rewards_BGR = step(tmp_path / "run", monkeypatch, judge=judge)
    assert rewards_BGR.isnan().all() and m["missing/judge"] == 16 and m["grad_norm"] == m["loss"] == 0
    assert m["reward/judge"] is None, "a mean over nothing is null, not 0"
    said = capsys.readouterr()
    assert "16 x ConnectionError (gone)" in said.err and "judge nan" in said.out


@remote(patience=0.5)
def hangs_on_one_rank(completion, prompt):
    if os.environ["RANK"] == "1" and place(completion) % 4 == 1:
        time.sleep(3600)
    return place(completion)


@pytest.mark.slow
def test_a_call_that_hangs_is_given_up_and_keeps_no_process(forks, tmp_path):
    """One rank speaks for all."""
    code = "import rewards, tests.test_remote as t; rewards.REWARDS['judge'] = (t.hangs_on_one_rank, 1.0)"
    start = time.monotonic()
    codes, said = forks.train(tmp_path / "run", small=SMALL, ranks=2, code=code)
    assert codes == [0, 0] and time.monotonic() - start < 100, said
    (line,) = [line for line in "".join(said).splitlines() if line.startswith("warning: step")]
    assert "is missing for 2 samples, because it failed: 2 x not back 0.5 s after the last" in line
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert record["missing/judge"] == 2 and 0.3 < record["time/score"] < 20


def scores(monkeypatch, judge, n: int = 8) -> tuple[list[float], list[str]]:
    """Of a remote reward whose completions are numbers."""
    with Remote(Reward("judge", judge, 1.0)) as pool:
        for i in range(n):
            pool.submit(i, i, None)
        assert pool.wait(time.monotonic()) is None
        return pool.collect([SimpleNamespace(id=f"p{i}") for i in range(n)])


def test_a_mistake_in_a_remote_reward_ends_the_run_as_in_any_other(tmp_path, monkeypatch):
    @remote
    def judge(completion, prompt):
        return completion.txt

    with pytest.raises(RewardError, match="reward 'judge' raised AttributeError .* in test_remote.py, line"):
        step(tmp_path / "run", monkeypatch, judge=judge)


@pytest.mark.parametrize("slip, often", [(lambda: nowhere, 1), (lambda: "a" + 1, 8),  # noqa: F821
                                         (lambda: __import__("nowhere"), 1), (lambda: None.get("score"), 8)])
def test_what_is_a_mistake_in_the_code_is_not_taken_for_a_server_that_fails(monkeypatch, slip, often):
    with pytest.raises(RewardError, match="prompt 'p0': repair it"):
        scores(monkeypatch, remote(lambda i, prompt: slip() if i < often else 1.0, threads=1))


class Nothing(Exception):
    """An exception that is false."""

    def __len__(self) -> int:
        return 0


def test_a_failure_is_one_whatever_its_exception_is_worth(monkeypatch):
    def judge(completion, prompt):
        raise Nothing("no answers")

    _, reasons = scores(monkeypatch, remote(judge))
    assert [reason[:20] for reason in reasons] == ["Nothing (no answers)"] * 8


@pytest.mark.parametrize("answer", [None, [], "{", {}])
def test_a_server_that_answers_nonsense_now_and_then_ends_no_run(monkeypatch, answer):
    """Though what reads it raises AttributeError, TypeError or ValueError."""
    values, reasons = scores(monkeypatch, remote(
        lambda i, prompt: float((answer if i % 2 else {"score": 1}).get("score", "x"))))
    assert values[::2] == [1] * 4 and len(reasons) == 4 and all(v != v for v in values[1::2])


def test_while_servers_are_down_patience_stands_still(monkeypatch):
    back = threading.Event()

    @remote(threads=2, patience=0.3)
    def judge(completion, prompt):
        back.wait(LONG)
        return completion

    judge.down = lambda: "gone"
    with Remote(Reward("judge", judge, 1.0)) as pool:
        for i in range(4):
            pool.submit(i, i, None)
        start = time.monotonic()
        assert pool.wait(start - LONG, seconds=1.0) == "gone" and time.monotonic() - start >= 1
        judge.down = lambda: ""
        assert pool.wait(start - LONG, seconds=0.1) == "", "patience begins anew"
        back.set()
        assert pool.wait(start - LONG) is None and pool.collect([None] * 4) == ([0, 1, 2, 3], [])


def test_what_no_thread_has_begun_is_given_up_with_the_step(monkeypatch):
    """A server that is late must not be asked about the last step during the next."""
    calls, begun, release = [], threading.Event(), threading.Event()

    @remote(threads=1, patience=0)
    def judge(completion, prompt):
        calls.append((completion, threading.current_thread()))
        begun.set()
        release.wait(LONG)

    with Remote(Reward("judge", judge, 1.0)) as pool:
        for i in range(3):
            pool.submit(i, i, None)
        assert begun.wait(LONG)
        assert pool.wait(time.monotonic()) is None
        values, errors = pool.collect([None] * 3)
    assert all(v != v for v in values) and errors == ["not back 0 s after the last sample"] * 3
    release.set()
    thread = calls[0][1]
    thread.join(LONG)
    assert not thread.is_alive() and [c for c, _ in calls] == [0]


def test_patience_is_counted_from_the_last_sample_once_for_all_rewards(monkeypatch):
    """Asked when it is over: what is back counts, what is not is not waited for."""
    @remote(patience=LONG, threads=1)
    def judge(completion, prompt):
        return completion if completion is not None else time.sleep(LONG)

    with Remote(Reward("judge", judge, 1.0)) as pool:
        for i in range(16):
            pool.submit(i, i, None)
        pool.submit(16, None, None)
        while pool.done.qsize() < 16:
            time.sleep(0.001)
        start = time.monotonic()
        assert pool.wait(start - LONG) is None
        values, errors = pool.collect([None] * 17)
        assert time.monotonic() - start < LONG / 2
    assert values[:16] == list(range(16)) and values[16] != values[16] and len(errors) == 1


@pytest.mark.parametrize("options", [
    {"threads": 0}, {"patience": -1}, {"patience": float("inf")}, {"patience": float("nan")}])
def test_threads_and_patience_that_cannot_be(options):
    with pytest.raises(ValueError, match=f"{[*options][0]} {[*options.values()][0]}"):
        remote(**options)
