"""Whole runs of train.py, short: resume, crashes, ranks, and what stands in a run's folder."""

import json
import os
import re
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file

import rewards
import run
import train
from data.tokenizer import Tokenizer
from lib import console, distributed, scoring
from lib.console import Progress
from tests.helpers import ROOT, SMALL, equal, in_process, launch, metrics, rollouts, tensors
from text import length_score


class FakeWandb(SimpleNamespace):
    """The module wandb; what is named in `broken` raises."""
    def __init__(self, *broken):
        super().__init__(broken=broken, calls=[])

    def init(self, mode, **options):
        self.calls.append((mode, options["id"], options["resume"]))
        self.fail("init " + mode)
        return self

    def fail(self, what):
        if what in self.broken:
            raise OSError(f"no route\nfor {what}")

    def log(self, metrics, step):
        self.fail("log")
        self.calls.append(step)

    def finish(self):
        self.fail("finish")
        self.calls.append("finish")

    def teardown(self):
        self.calls.append("teardown")

    def log_artifact(self, artifact):
        pass

    def Artifact(self, *_):
        return MagicMock()

    Table = Artifact


def test_lengths_are_logged_with_and_without_cut_samples_and_thinking_apart(tmp_path):
    in_process(tmp_path / "run", "--steps", "1", "--max_new_tokens", "90", "--eval_prompts", "")
    (m,) = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    texts = [json.loads(line) for line in (tmp_path / "run/rollouts/step_000001.jsonl").open()]
    words = [rewards.count_words(rewards.structure(t["text"])[2] or "") for t in texts]
    whole = [n for n, t in zip(words, texts) if t["finish_reason"] != "length"]
    assert m["length/answer_words"] == pytest.approx(sum(words) / len(words))
    assert 0 < len(whole) < len(texts)
    assert m["length/answer_words_complete"] == pytest.approx(sum(whole) / len(whole))
    thoughts = [re.match(".*?</think>|.*", t["text"], re.S)[0] for t in texts if "<think>" in t["text"]]
    assert any("</think>" not in t["text"] for t in texts), "what is cut while it thinks counts"
    tokens = sum(map(len, map(Tokenizer(ROOT / "data/tiny/base").encode, thoughts)))
    assert m["length/think_tokens"] == pytest.approx(tokens / len(texts), abs=2), "a token may cross the tag"
    assert sum(m["along/tokens/think"]) == pytest.approx(m["length/think_tokens"] * len(texts))
    parts = sum(map(sum, (m["along/tokens/think"], m["along/tokens/answer"])))
    assert parts == pytest.approx(m["length/tokens"] * len(texts))
    for name in ("entropy", "gap"):
        whole = sum(n * x for part in ("think", "answer") for n, x in zip(
            m[f"along/tokens/{part}"], m[f"along/{name}/{part}"]) if n)
        assert whole / parts == pytest.approx(m["gap/mean" if name == "gap" else name], rel=1e-5)


def test_the_folder_of_a_run_holds_what_docs_running_says(undisturbed):
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in lines] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
    evaluated = [m for m in lines if "eval/reward/length" in m]
    assert [m["step"] for m in evaluated] == [0, 2, 4, 6], "lines of their own, after the step's"
    assert all(name == "step" or name.startswith("eval/") for m in evaluated for name in m)
    for m in (m for m in lines if m not in evaluated):
        expected = {
            "step", "loss", "grad_norm", "skipped_updates", "entropy", "clip_share", "gap/mean", "gap/max",
            "gap/k3", "tis_capped",
            "length/answer_words", "length/answer_words_complete", "length/tokens", "length/think_tokens",
            "length/in_range", "truncated", "lr",
            "weights/fingerprint", "tokens_per_second/sample", "tokens_per_second/update", "memory/peak_gb",
            "balance/flops", "balance/tokens",
            *(f"time/{p}" for p in ("sample", "idle", "score", "logprob", "backward", "step", "update",
                                    "publish", "save", "total")),
            *(f"{kind}/{name}" for kind in ("reward", "reward_std", "dead_groups", "missing", "slope",
                                            "by_request") for name in ("length", "format", "writing")),
            *(f"along/{name}/{part}" for part in ("think", "answer")
              for name in ("tokens", "entropy", "gap", "clip_share", "advantage_share")),
            "by_request/ended",
            *(f"dominance/{name}" for name in ("length", "format", "writing")),
            *(f"{kind}/{pair}" for kind in ("correlation", "disagreement")
              for pair in ("length,format", "length,writing", "format,writing"))
        }
        assert expected == set(m)
        assert all(v == v and abs(v) != float("inf") for v in m.values() if type(v) is not list)
        assert m["clip_share"] == 0 and m["lr"] == pytest.approx(1.75e-4 * min(1, m["step"] / 5))
    record = json.loads((undisturbed / "rollouts" / "step_000003.jsonl").read_text().splitlines()[0])
    assert set(record) == {
        "prompt_id", "sample", "prompt", "text", "length_range", "tokens", "finish_reason", "rewards",
        "advantages", "advantage", "gap_mean"
    }
    assert len((undisturbed / "rollouts" / "step_000003.jsonl").read_text().splitlines()) == 8
    assert (undisturbed / "source" / "rewards.py").read_text() == (ROOT / "rewards.py").read_text()
    assert (undisturbed / "source" / "kernels" / "logprob.py").exists()
    assert sorted(p.name for p in (undisturbed / "checkpoints").iterdir()) == ["step_000004", "step_000006"]
    assert train.parse(["--config", str(undisturbed / "config.json")]).steps == 6


def test_trainer_and_sampler_agree_on_policy(tmp_path):
    """At the first inner step in fp32, at a temperature other than 1."""
    in_process(tmp_path / "run", "--steps", "1", "--temperature", "0.8")
    (_, first) = metrics(tmp_path / "run")
    assert 0 < first["gap/mean"] < 1e-5 and 0 <= first["gap/k3"] < 1e-9


def test_three_and_three_steps_equal_six_bit_for_bit(undisturbed, tmp_path, monkeypatch, capfd):
    """Without saying the options again, and where wandb fails meanwhile. log.txt has what is printed."""
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb("log"))
    in_process(tmp_path / "run", "--steps", "3", "--resume", "false")
    in_process(tmp_path / "run", "--steps", "6", "--wandb", "true", small=[])
    said, log = capfd.readouterr(), (tmp_path / "run" / "log.txt").read_text()
    assert said.err.count("wandb failed (no route for log)") == 1 and log.count("resumed after step 3") == 1
    assert sorted(log.splitlines()) == sorted((said.out + said.err).splitlines())
    assert [line.split()[1] for line in log.splitlines() if line.startswith("step ")] == [
        f"{n}/{steps}" for n, steps in ((1, 3), (2, 3), (3, 3), (4, 6), (5, 6), (6, 6))]
    assert metrics(tmp_path / "run") == metrics(undisturbed)
    assert rollouts(tmp_path / "run") == rollouts(undisturbed)
    assert equal(tensors(tmp_path / "run", 6), tensors(undisturbed, 6))


@pytest.mark.slow
def test_an_evaluation_leaves_the_run_bit_for_bit_as_it_was(undisturbed, tmp_path):
    """Samples, weights, optimizer and torch's generator; a run with evaluations has the metrics of one
    without, and more."""
    states = []
    for name, options in (("with", []), ("without", ["--eval_prompts", ""])):
        torch.manual_seed(7)
        in_process(tmp_path / name, "--steps", "4", *options)
        states.append(torch.random.get_rng_state())
    kept = [{name: text for name, text in rollouts(tmp_path / run).items() if not name.startswith("eval_")}
            for run in ("with", "without")]
    assert kept[0] == kept[1] and len(kept[0]) == 4 and torch.equal(*states)
    assert equal(tensors(tmp_path / "with", 4), tensors(tmp_path / "without", 4))
    plain = [{k: v for k, v in m.items() if not k.startswith("eval/")} for m in metrics(tmp_path / "with")]
    assert plain[1:] == metrics(tmp_path / "without")
    assert metrics(tmp_path / "with") == metrics(undisturbed)[:5]


@pytest.mark.slow
def test_evaluations_describe_the_texts_alike_on_any_number_of_ranks(undisturbed, forks, tmp_path):
    """Three prompts on two ranks: a mean of means would be another number."""
    codes, said = forks.train(tmp_path / "two", "--steps", "1", small=SMALL, ranks=2)
    assert codes == [0, 0], said
    one, two = ({k: v for k, v in metrics(run)[0].items() if "reward" not in k and "writing" not in k}
                for run in (undisturbed, tmp_path / "two"))
    assert one == two and {"eval/S_l", "eval/repetition", "eval/distinct_2", "eval/structure",
                           "eval/missing_answers", "eval/answer_words"} <= one.keys()
    texts = [json.loads(line) for line in rollouts(undisturbed)["eval_000000.jsonl"].splitlines()]
    prompts = {json.loads(line)["id"]: json.loads(line) for line in open(ROOT / "tests" / "eval_small.jsonl")}
    expected = []
    for text in texts:
        asked, (_, _, answer) = prompts[text["prompt_id"]], rewards.structure(text["text"])
        expected.append(length_score(asked["length"], rewards.count_words(answer or "")))
    assert one["eval/S_l"] == pytest.approx(sum(expected) / len(expected)) and len(texts) == 3
    assert one["eval/S_l"] == pytest.approx(sum(t["scores"]["S_l"] for t in texts) / 3)


# The process is killed when `function` of `module` is called for the nth time with `when` true.
ACCIDENT = """
import os, {module}
real, calls = {module}.{function}, []
def fatal(*args, **kwargs):
    calls.append(1) if {when} else None
    if len(calls) == {nth}:
        os.kill(os.getpid(), 9)
    return real(*args, **kwargs)
{module}.{function} = fatal
"""
KILLS = {
    "between weights and optimiser": {
        "module": "torch.distributed.checkpoint", "function": "save", "nth": 4, "when": True},
    "before the rename": {
        "module": "os", "function": "rename", "nth": 2, "when": "'writing' in str(args[0])"},
    "while metrics are ahead": {
        "module": "checkpoints", "function": "save", "nth": 2, "when": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", KILLS)
def test_a_kill_while_a_checkpoint_is_written_loses_nothing_before_it(undisturbed, forks, tmp_path, moment):
    """Killed at the second checkpoint; the same command goes on from the first and ends as if nothing had
    happened."""
    codes, said = forks.train(tmp_path / "run", "--steps", "6", small=SMALL,
                              code=ACCIDENT.format(**KILLS[moment]))
    assert codes == [-signal.SIGKILL], said
    assert [m["step"] for m in metrics(tmp_path / "run")] == list(range(5))
    in_process(tmp_path / "run", "--steps", "6")
    assert metrics(tmp_path / "run") == metrics(undisturbed)
    assert rollouts(tmp_path / "run") == rollouts(undisturbed)
    assert equal(tensors(tmp_path / "run", 6), tensors(undisturbed, 6))
    assert sorted(p.name
                  for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_000004", "step_000006"]


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(undisturbed, tmp_path, capfd):
    in_process(tmp_path / "run", "--steps", "4")
    victim = next((tmp_path / "run" / "checkpoints" / "step_000004").rglob("*.safetensors"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    in_process(tmp_path / "run", "--steps", "6")
    out = capfd.readouterr()
    assert victim.name in out.err and "resumed after step 2" in out.out
    assert metrics(tmp_path / "run") == metrics(undisturbed)


def test_a_finished_run_stays_as_it_is_and_another_config_is_refused(undisturbed, capfd):
    before = {f: f.read_bytes() for f in undisturbed.rglob("*") if f.is_file()}
    in_process(undisturbed, "--steps", "6")
    assert "has finished its 6 steps" in capfd.readouterr().out
    with pytest.raises(train.UserError, match=r"another config: lr \(0.000175 there, 0.001 now\)"):
        in_process(undisturbed, "--steps", "8", "--lr", "1e-3")
    with pytest.raises(train.UserError, match="resume is false"):
        in_process(undisturbed, "--steps", "8", "--resume", "false")
    assert {f: f.read_bytes() for f in undisturbed.rglob("*") if f.is_file()} == before


@pytest.mark.slow
def test_other_prompts_or_another_model_under_the_same_name_are_refused(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "data" / "tiny" / "base", tmp_path / "base")
    shutil.copy(ROOT / "data" / "tiny" / "prompts.jsonl", tmp_path / "prompts.jsonl")
    options = ["--config", str(ROOT / "configs" / "tiny.json"), *SMALL, "--model", str(tmp_path / "base"),
               "--prompts", str(tmp_path / "prompts.jsonl"), "--eval_prompts", "",
               "--reward", "length,format", "--run_dir", str(tmp_path / "run")]
    train.train(train.parse([*options, "--steps", "2"]))
    for file, old, new in (("prompts.jsonl", "Please", "Now"), ("base/config.json", "1e-06", "1e-05")):
        text = (tmp_path / file).read_text()
        assert old in text
        (tmp_path / file).write_text(text.replace(old, new, 1))
        with pytest.raises(train.UserError, match=f"{file} is not what .*step_000002 was made with"):
            train.train(train.parse([*options, "--steps", "4"]))
        (tmp_path / file).write_text(text)


def test_steps_that_metrics_or_rollouts_lack_are_named_on_resume(tmp_path, capfd):
    options = ["--eval_prompts", "", "--max_new_tokens", "8", "--reward", "length,format"]
    in_process(tmp_path / "run", "--steps", "2", *options)
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    (tmp_path / "run" / "rollouts" / "step_000002.jsonl").unlink()
    in_process(tmp_path / "run", "--steps", "3", *options)
    said = capfd.readouterr().err
    assert "metrics.jsonl lacks 2 steps before the checkpoint, the first is 1" in said
    assert "rollouts lacks 1 steps before the checkpoint, the first is 2" in said


def test_a_run_folder_that_vanishes_ends_the_run_and_is_not_made_again(tmp_path, monkeypatch):
    def remove(completion, prompt):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return 0.5

    monkeypatch.setitem(rewards.REWARDS, "remove", (remove, 1.0))
    with pytest.raises(train.UserError, match="run/rollouts/step_000001.jsonl cannot be written"):
        in_process(tmp_path / "run", "--steps", "1", "--eval_prompts", "", "--reward", "remove",
                   "--max_new_tokens", "8")
    assert not (tmp_path / "run").exists()


def test_a_reward_that_raises_names_the_line_of_the_user_and_keeps_the_traceback(tmp_path, monkeypatch):
    def broken(completion, prompt):
        if completion.token_ids:
            return json.loads("{")  # raises in the library

    check, line = [], broken.__code__.co_firstlineno + 2
    monkeypatch.setitem(rewards.REWARDS, "broken", (broken, 1.0))
    monkeypatch.setattr(train.rollout, "check_rewards", lambda *_: check.append(1))
    with pytest.raises(scoring.RewardError, match=rf"JSONDecodeError .* in test_run.py, line {line}, on an"):
        in_process(tmp_path / "run", "--steps", "1", "--eval_prompts", "", "--reward", "broken",
                   "--max_new_tokens", "8")
    kept = (tmp_path / "run" / "reward_error.txt").read_text()
    assert "decoder.py" in kept and "in broken" in kept and check


def test_constant_rewards_leave_the_weights_bit_identical(tmp_path, monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "constant", (lambda completion, prompt: 0.1, 1.0))
    in_process(tmp_path / "run", "--steps", "8", "--save_every", "1", "--keep_checkpoints", "8",
               "--eval_prompts", "", "--max_new_tokens", "8", "--reward", "constant")
    first = {k: v for k, v in tensors(tmp_path / "run", 1).items() if k.startswith("weights")}
    last = {k: v for k, v in tensors(tmp_path / "run", 8).items() if k.startswith("weights")}
    base = load_file(ROOT / "data" / "tiny" / "base" / "model.safetensors")
    assert equal(first, last) and equal({k.split("/")[-1]: v for k, v in last.items()}, base)
    assert all(m["dead_groups/constant"] == 2 and m["grad_norm"] == 0 for m in metrics(tmp_path / "run"))


def test_a_reward_that_fails_is_missing_and_training_goes_on(tmp_path, monkeypatch):
    def moody(completion, prompt):
        return None if completion.sample_index == 2 else 0.5

    monkeypatch.setitem(rewards.REWARDS, "moody", (moody, 1.0))
    in_process(tmp_path / "run", "--steps", "1", "--eval_prompts", "")
    assert metrics(tmp_path / "run")[0]["missing/moody"] == 2
    records = [json.loads(line) for line in rollouts(tmp_path / "run")["step_000001.jsonl"].splitlines()]
    assert sum(r["rewards"]["moody"] is None and r["advantages"]["moody"] == 0 for r in records) == 2


@pytest.mark.slow
def test_one_and_two_ranks_sample_the_same_texts_and_take_the_same_step(forks, tmp_path):
    """Also for other numbers of micro-batches and of concurrent sequences."""
    alike = ["--steps", "1", "--max_new_tokens", "150", "--group_size", "16", "--reward", "length,format"]
    other = ["--micro_batch_tokens", "300", "--max_sequences", "3"]
    for name, ranks, options in (("one", 1, []), ("two", 2, other)):
        codes, said = forks.train(tmp_path / name, *alike, *options, small=SMALL, ranks=ranks)
        assert codes == [0] * ranks, said
    one, two = (rollouts(tmp_path / name)["step_000001.jsonl"].splitlines() for name in ("one", "two"))
    assert len(one) == 32
    for a, b in zip(map(json.loads, one), map(json.loads, two), strict=True):
        assert a.pop("gap_mean") == pytest.approx(b.pop("gap_mean"), abs=1e-6) and a == b
    for a, b in zip(metrics(tmp_path / "one")[1:2], metrics(tmp_path / "two")[1:2], strict=True):
        a.pop("weights/fingerprint"), b.pop("weights/fingerprint")  # of weights that differ in last bits
        assert max(a.pop("gap/max"), b.pop("gap/max")) < 2e-5, "the largest rounding error, no mean"
        assert a["grad_norm"] > 0 and all(a[k] == pytest.approx(b[k], rel=1e-5, abs=1e-6) for k in a)


@pytest.mark.slow
def test_the_rewards_of_the_default_rise(tmp_path):
    """Fourteen steps of what a user starts first: all three must be well on their way."""
    done = launch(2, "train.py", "--run_dir", tmp_path / "run", "--steps", "14", "--eval_prompts", "")
    assert done.returncode == 0, done.stderr
    steps = metrics(tmp_path / "run")
    for name in ("format", "length", "writing"):
        values = [m[f"reward/{name}"] for m in steps]
        assert sum(values[-3:]) / 3 > sum(values[:3]) / 3 + 0.15, values


@pytest.mark.parametrize("broken, calls, said", [
    ([], ["online", 1, 2, "finish"], None),
    (["init online"], ["online", "teardown", "offline", 1, 2, "finish"], "logs offline"),
    (["init online", "init offline"], ["online", "teardown", "offline"], "goes on without it"),
    (["log"], ["online"], "goes on without it"),
    (["finish"], ["online", 1, 2], "goes on without it"),
    (None, [], "goes on without it; pip install wandb"),
])
def test_what_fails_at_wandb_is_said_once_and_ends_no_run(broken, calls, said, tmp_path, monkeypatch, capsys):
    fake = FakeWandb(*broken or ())
    monkeypatch.setitem(sys.modules, "wandb", None if broken is None else fake)  # None: not installed
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    log = run.wandb_log.open_wandb(train.Config(), tmp_path, lambda line: print(line, file=sys.stderr))
    for step in (1, 2):
        log.send(lambda run, step=step: run.log({"loss": 0.5}, step=step))
    log.send(lambda run: run.finish())
    assert [c[0] if isinstance(c, tuple) else c for c in fake.calls] == calls
    err = capsys.readouterr().err
    assert err.count("\n") == (said is not None) and (said or "") in err
    assert ("no route for" in err) == bool(broken)


def test_a_wandb_run_is_named_by_the_whole_path_of_its_folder_and_kept_on_resume(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    for folder in ("a/7b", "b/7b", "a/7b", "a/../a/7b"):
        run.wandb_log.open_wandb(train.Config(), tmp_path / folder, print)
    monkeypatch.chdir(tmp_path)
    run.wandb_log.open_wandb(train.Config(), Path("a/7b"), print)
    (one, other, *again), resume = ([c[i] for c in fake.calls] for i in (1, 2))
    assert one != other and again == [one] * 3 and set(resume) == {"allow"}


@pytest.mark.parametrize("chosen, policy", [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")])
def test_threads_that_wait_leave_their_core_to_others_unless_told_otherwise(chosen, policy, monkeypatch):
    """OpenMP reads the variable when torch loads it; here torch is an ImportError."""
    monkeypatch.setattr(os, "environ", dict(chosen))
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="torch"):
        runpy.run_path(str(ROOT / "train.py"))
    assert os.environ == {"OMP_WAIT_POLICY": policy}


def test_the_time_left_is_that_of_the_samples_left_at_the_rate_so_far(monkeypatch, capsys):
    monkeypatch.setattr(time, "perf_counter", lambda: 1000.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress("step 1", 8, True)
    progress.start, progress.last = 940.0, 0.0
    progress.update(SimpleNamespace(new_tokens=1200, finished=2))
    assert "step 1: 2/8 samples, 20 tok/s on this rank, 0:03:00 left" in capsys.readouterr().err
    progress.last = 0.0
    progress.update(SimpleNamespace(new_tokens=1200, finished=0))
    assert "left" not in capsys.readouterr().err


def test_a_gpus_peak_is_kept_by_phase_and_of_the_whole_run(monkeypatch):
    peak, now = 5, 1  # GiB
    def use(gb):
        nonlocal peak
        peak = max(peak, gb)
    def reset():
        nonlocal peak
        peak = now
    for name, fake in (("is_available", lambda: True), ("synchronize", lambda: None),
                       ("max_memory_allocated", lambda: peak * 2**30), ("reset_peak_memory_stats", reset)):
        monkeypatch.setattr(torch.cuda, name, fake)
    clock = run.Clock()
    for sampling, backward in ((9, 3), (2, 6)):
        clock.begin(1)
        with clock("sample"), clock("score"):
            use(sampling)
        use(4)
        with clock("update"):
            use(2)
            with clock("backward"):
                use(backward)
    assert clock.memory(torch.device("cuda")) == {
        "memory/peak_gb": 9, "memory/log_gb": 4, "memory/sample_gb": 2, "memory/update_gb": 6}


def test_progress_is_shown_on_a_terminal_alone_and_not_logged(tmp_path, monkeypatch, capsys):
    stats = SimpleNamespace(new_tokens=9, finished=1)
    log = run.Log(tmp_path, train.Config(), [], run.Clock(), distributed.setup("cpu"))
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        monkeypatch.setenv("COLUMNS", "30")
        progress = Progress("step 1", 2, True)
        progress.last -= 60
        progress.update(stats)
        said = capsys.readouterr().err
        assert re.fullmatch("\rstep 1: 1/2 samples, .{8}\033\\[K" if terminal else "", said), "30 columns"
    log.warn("warning: so")
    assert capsys.readouterr().err == "warning: so\n"
    assert (tmp_path / "log.txt").read_text() == "warning: so\n"


def test_where_the_log_cannot_be_written_lines_are_still_shown(tmp_path, capsys):
    run.Log(tmp_path / "nowhere", train.Config(), [], run.Clock(), distributed.setup("cpu")).say("a line")
    assert capsys.readouterr().out == "a line\n"


STEP = {"step": 10, "reward/length": 0.5, "reward/format": 1.0, "reward/writing": 0.25, "truncated": 0.0,
        "length/answer_words": 987.0, "length/in_range": 0.5, "grad_norm": 12.345, "entropy": 1.234,
        "gap/mean": 1e-6, "gap/k3": 1e-9, "time/idle": 10.0, "time/total": 910.0, "dead_groups/length": 4,
        "dead_groups/format": 5, "dead_groups/writing": 0, "dominance/length": 0.3, "dominance/format": 0.3,
        "dominance/writing": 0.4}


def test_a_line_of_a_step_says_how_long_it_took_and_how_long_the_run_will(monkeypatch):
    """Loading took 100 s, steps 9 and 10, the first since a resume, 1,000 s each."""
    monkeypatch.setattr(time, "perf_counter", lambda: 3100.0)
    line = console.describe(STEP, 150, ["length", "format", "writing"], [1000.0, 1100.0, 2100.0])
    assert line == ("step  10/150  length 0.50 format 1.00 writing 0.25  987 words 50% in range 0% cut  910s "
                    "38:53 left")
    assert "910s 0:00 left" in console.describe(STEP, 10, ["length"], [1000.0])  # of a step before a resume


@pytest.mark.parametrize("count", [1, 3, 5, 9])
def test_a_line_of_a_step_is_never_wider_than_100_columns(count, monkeypatch):
    monkeypatch.setattr(time, "perf_counter", lambda: 900.0)
    names = [f"a_long_name_of_a_reward_{i}" for i in range(count)]
    step = STEP | {f"reward/{name}": -123.456 for name in names} | {"length/answer_words": 12345.0}
    line = console.describe(step, 1000, names, [0.0, 1.0])
    assert len(line) <= 100 and ("left" in line) == (count < 5), line


def test_a_warning_of_a_step_has_a_remedy():
    config, names = train.parse([]), ["length", "format", "writing"]
    (dead,) = console.warnings(STEP, config, names, STEP)
    assert "the same, format in 5 of the 8 groups: raise group_size" in dead
    fine = STEP | {"dead_groups/format": 4}
    (cut,) = console.warnings(fine | {"truncated": 0.26}, config, names, STEP)
    assert "26% of the samples were cut at max_new_tokens 256: raise it" in cut
    for change, part in (({"dominance/writing": 0.81}, "reward writing is 81% of the advantages: lower its"),
                         ({"entropy": 0.2}, "entropy fell from 1.2 to 0.2: lower lr"),
                         ({"time/idle": 901.0}, "waited 901 s for the last sample, and timeout is 1800"),
                         ({"gap/k3": 0.02}, "gap/k3 0.02 is above 0.01 nats a token: set sampler_dtype")):
        (line,) = console.warnings(fine | change, config, names, STEP)
        assert part in line and ": " in line
    assert not [*console.warnings(fine, config, names, STEP)]


def test_the_end_of_a_run_says_what_rose_and_fell_and_shows_samples(tmp_path, capsys):
    in_process(tmp_path / "run", "--steps", "2", "--eval_prompts", "", "--token_stats_every", "0")
    a, b = metrics(tmp_path / "run")
    lines = capsys.readouterr().out.splitlines()
    for name in ("reward/length", "entropy"):
        (line,) = [line.split() for line in lines if line.startswith(name)]
        assert [float(line[1]), float(line[3])] == pytest.approx([a[name], b[name]], rel=1e-3)
        assert line[-1] == ("rose" if b[name] > a[name] else "fell")
    texts = [json.loads(line) for line in (tmp_path / "run/rollouts/step_000002.jsonl").open()]
    best = max(texts, key=lambda t: t["advantage"])
    (shown,) = [line for line in lines if line.startswith(f"line {texts.index(best) + 1}, ")]
    assert " ".join(best["text"].split()).startswith(shown.split(": ", 1)[1]) and len(shown) <= 100
    assert f"python -m scripts.report {tmp_path}/run" in lines[-2]
    assert not [*(tmp_path / "run/rollouts").glob("*.safetensors")]


def test_a_token_record_has_what_trainer_and_sampler_gave_each_token(tmp_path):
    in_process(tmp_path / "run", "--steps", "3", "--token_stats_every", "2", "--eval_prompts", "")
    (file,) = (tmp_path / "run/rollouts").glob("*.safetensors")
    assert file.name == "step_000002.safetensors"
    x, texts = load_file(file), [json.loads(t) for t in file.with_suffix(".jsonl").open()]
    assert x["offsets"].diff().tolist() == [t["tokens"] for t in texts] and x["offsets"][0] == 0
    tokenizer = Tokenizer(ROOT / "data/tiny/base")
    for text, a, b in zip(texts, x["offsets"], x["offsets"][1:]):
        assert b"".join(tokenizer.token_bytes[i] for i in x["ids"][a:b]).decode().startswith(text["text"])
        gap = (x["trainer_logp"] - x["sampler_logp"])[a:b].abs().mean().item()
        assert gap == pytest.approx(text["gap_mean"], rel=1e-3, abs=1e-8)
    assert x["entropy"].mean().item() == pytest.approx(metrics(tmp_path / "run")[1]["entropy"], rel=1e-5)
    run.cut_back(tmp_path / "run", 1)
    assert not file.exists() and not file.with_suffix(".jsonl").exists()


@pytest.mark.parametrize("dropped, part", [
    (1, None), (2, "warning: 40% of the prompts are dropped: raise max_new_tokens")])
def test_a_run_that_drops_many_prompts_says_what_to_do(dropped, part, tmp_path, capfd):
    ranges = [[0, 0]] * dropped + [[8, 9]] * 3
    lines = [{"prompt": f"Write letter {i}.", "length_range": r} for i, r in enumerate(ranges)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    in_process(tmp_path / "run", "--steps", "1", "--eval_prompts", "", "--max_new_tokens", "4", "--reward",
               "length", "--prompts", str(prompts))
    out = capfd.readouterr().out
    assert f"{dropped} unanswerable dropped" in out and ("are dropped: raise" in out) == (part is not None)
    assert (part or "") in out
