"""The reward lab: what the samples of a run would have got with other rewards."""

import json
import math
import random
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import rewards
from scripts import rescore
from tests.helpers import ROOT, in_process

NAN = math.nan
TEXT = "<think>A plan.</think><answer>{}</answer>"


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "real"
    in_process(folder, "--steps", "2", "--eval_prompts", "", "--max_new_tokens", "64", "--lr",
               "2e-3", "--warmup", "0")
    return folder


def made_up(folder: Path, steps=(1, 2, 3)) -> Path:
    """A run of groups of two on two prompts, whose only reward was the length: 5 words were wanted. Of each
    group one text had 5 and one 4, but in step 2 both 5."""
    (folder / "rollouts").mkdir(parents=True)
    asked = [{"id": i, "prompt": f"Write {i}", "length_range": [5, 5]} for i in "ab"]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in asked))
    (folder / "config.json").write_text(json.dumps({
        "prompts": str(folder / "prompts.jsonl"), "prompts_per_step": 2, "group_size": 2, "std_floor": 0.0}))
    for step in steps:
        records = []
        for ident in "ab":
            for sample, words in enumerate((5, 5 if step == 2 else 4)):
                value, better = (1.0, 0.8)[words == 4], 0.0 if step == 2 else (1.0, -1.0)[sample]
                records.append({
                    "prompt_id": ident, "sample": sample, "prompt": f"... Write {ident} ...",
                    "text": TEXT.format("one two three four five".rsplit(" ", 5 - words)[0]), "tokens": 7,
                    "finish_reason": "stop", "rewards": {"length": value}, "advantages": {"length": better},
                    "advantage": better, "gap_mean": 0.0})
        (folder / "rollouts" / f"step_{step:06d}.jsonl").write_text(
            "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    return folder


def suite(file: Path, source: str) -> Path:
    """rewards.py with `source` at its end."""
    file.write_text((ROOT / "rewards.py").read_text() + source)
    return file


def main(monkeypatch, capsys, *arguments) -> tuple[dict, str]:
    """(the JSON line, all that was said)."""
    monkeypatch.setattr(sys, "argv", ["rescore", *map(str, arguments)])
    rescore.load.cache_clear()
    rescore.main()
    said = capsys.readouterr().out
    return json.loads(said.splitlines()[-1]), said


def test_with_the_rewards_of_a_run_its_advantages_come_out_again_bit_for_bit(real, monkeypatch, capsys):
    result, said = main(monkeypatch, capsys, real)
    assert result["samples"] == 16 and result["advantage"]["mean_change"] == 0 and "no advantage" in said
    assert result["rewards"]["length"]["changed"] == 0 and result["rewards"]["length"]["old"] > 0
    assert json.loads((real / "rescore.json").read_text())["most_changed"] == []


@pytest.mark.parametrize("mode", ["sum", "gdpo"])
def test_the_options_of_the_run_hold_in_the_lab(real, mode, tmp_path, monkeypatch, capsys):
    """With another `advantage` in its config the same rewards make other advantages."""
    shutil.copytree(real, tmp_path / "run")
    config = json.loads((real / "config.json").read_text()) | {"advantage": mode}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert main(monkeypatch, capsys, tmp_path / "run")[0]["advantage"]["mean_change"] > 0.01


def test_what_an_edited_reward_changes_by_hand(tmp_path, monkeypatch, capsys):
    """`short` pays for fewer words, so that in steps 1 and 3 each sample changes sides; in step 2 both are
    alike. With `length` at the same weight the two cancel."""
    run, short = made_up(tmp_path / "run"), "\ndef short(c, p): return -count_words(structure(c.text)[2])\n"
    alone = suite(tmp_path / "alone.py", short + "REWARDS = {'short': (short, 1.0)}")
    result, said = main(monkeypatch, capsys, run, "--rewards", alone)
    assert result["samples"] == 12 and result["names"] == ["short"]
    assert result["rewards"]["short"] == {"old": None, "new": pytest.approx(-14 / 3), "spearman": None,
                                          "changed": None, "missing": 0}
    assert result["advantage"] == {"spearman": pytest.approx(-1), "other_sign": pytest.approx(8 / 12),
                                   "mean_change": pytest.approx(2 * 8 / 12)}
    most = json.loads((run / "rescore.json").read_text())["most_changed"]
    assert [(c["step"], c["prompt_id"], c["sample"]) for c in most] == [
        (step, ident, sample) for step in (1, 3) for ident in "ab" for sample in (0, 1)]
    assert most[1]["advantage"] == [-1.0, pytest.approx(1)] and most[1]["rewards"] == {"short": [None, -4.0]}
    assert "step 1, prompt a, sample 1: advantage -1.00 -> +1.00;  short - -> -4.000" in said

    both = suite(tmp_path / "both.py", short + "REWARDS = {'length': (length, 2.0), 'short': (short, 1.0)}")
    result, _ = main(monkeypatch, capsys, run, "--rewards", both, "--steps", "1:2")
    assert result["steps"] == 2 and result["rewards"]["length"]["changed"] == 0
    assert result["advantage"]["other_sign"] == 0
    assert result["advantage"]["mean_change"] == pytest.approx(1 / 3)
    assert result["conflicts"] == pytest.approx({
        "dominance/length": 2 / 3, "dominance/short": 1 / 3, "correlation/length,short": -1,
        "disagreement/length,short": 0.5})


def test_a_reward_that_reads_ids_and_logprobs_is_computed_where_they_are_recorded(tmp_path, monkeypatch,
                                                                                   capsys):
    in_process(tmp_path / "run", "--steps", "1", "--eval_prompts", "", "--max_new_tokens", "64",
               "--token_stats_every", "1")
    lab = suite(tmp_path / "lab.py", """
REWARDS = {"surprise": (lambda c, p: -sum(c.logprobs), 1.0),
           "last": (lambda c, p: float(c.token_ids[-1]), 1.0)}
""")
    out, _ = main(monkeypatch, capsys, tmp_path / "run", "--rewards", lab, "--reward", "surprise,last")
    x = load_file(tmp_path / "run/rollouts/step_000001.safetensors")
    ends, samples = x["offsets"][1:] - 1, len(x["offsets"]) - 1
    assert out["rewards"]["last"]["new"] == pytest.approx(x["ids"][ends].mean(), rel=1e-5)
    assert out["rewards"]["surprise"]["new"] == pytest.approx(-x["sampler_logp"].sum() / samples, rel=1e-5)


def test_transforms_and_requirements_of_the_edited_file_count(tmp_path, monkeypatch, capsys):
    run = made_up(tmp_path / "run")
    source = "\nREWARDS = {'length': (length, 1.0)}\nTRANSFORMS = {'length': lambda r: -r}\n"
    result, _ = main(monkeypatch, capsys, run, "--rewards", suite(tmp_path / "turned.py", source))
    assert result["rewards"]["length"]["changed"] == 0
    assert result["advantage"]["spearman"] == pytest.approx(-1)
    source = "\nREWARDS = {'length': (length, 1.0)}\nREQUIRED = {'length': 2}\n"
    result, _ = main(monkeypatch, capsys, run, "--rewards", suite(tmp_path / "strict.py", source))
    changes = [c["advantage"] for c in json.loads((run / "rescore.json").read_text())["most_changed"]]
    assert changes[0] == [1.0, pytest.approx(-0.1)] and all(new < 0 for _, new in changes)


def test_a_model_keeps_its_values_until_it_is_named(tmp_path, monkeypatch, capsys):
    """Then it is prepared once and called once a step."""
    run, calls = made_up(tmp_path / "run"), []

    @rewards.batched
    def model(completions, prompts):
        calls.append(len(completions))
        return [float(len(c.text)) for c in completions]

    monkeypatch.setattr(rewards, "REWARDS", {"length": (model, 1.0)})
    model.prepare = lambda config, world: calls.append((config.group_size, world.size))
    result, _ = main(monkeypatch, capsys, run)
    assert not calls and result["rewards"]["length"]["changed"] == 0
    result, _ = main(monkeypatch, capsys, run, "--reward", "length")
    assert calls == [(2, 1), 4, 4, 4] and result["rewards"]["length"]["changed"] == 1
    assert result["rewards"]["length"]["spearman"] == pytest.approx(1)
    monkeypatch.setattr(rewards, "REWARDS", {"judge": (model, 1.0)})
    assert "pass --reward judge" in fails(monkeypatch, capsys, run)


def test_a_server_that_fails_leaves_samples_missing_and_says_why(tmp_path, monkeypatch, capsys):
    @rewards.remote(threads=2)
    def server(completion, prompt):
        if prompt.id == "b":
            raise TimeoutError("too late")
        return 1.0

    monkeypatch.setattr(rewards, "REWARDS", {"server": (server, 1.0)})
    monkeypatch.setattr(sys, "argv", ["rescore", str(made_up(tmp_path / "run")), "--reward", "server"])
    rescore.main()
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["rewards"]["server"]["missing"] == 6
    assert err.count("missing for 2 samples, because it failed: 2 x TimeoutError (too late)") == 3


def test_a_call_that_hangs_is_given_up_when_nothing_comes_back_any_more(tmp_path, monkeypatch, capsys):
    """Patience is for the next answer: three of 0.7 s in a row are waited for, a fourth is not."""
    @rewards.remote(threads=1, patience=1)
    def server(completion, prompt):
        time.sleep(0.7 if len(asked) < 3 else 60)
        asked.append(completion)
        return 1.0

    asked = []
    monkeypatch.setattr(rewards, "REWARDS", {"server": (server, 1.0)})
    run = made_up(tmp_path / "run", steps=(1,))
    assert main(monkeypatch, capsys, run, "--reward", "server")[0]["rewards"]["server"]["missing"] == 1


def test_a_mistake_in_a_remote_reward_is_a_sentence_and_no_missing_value(tmp_path, monkeypatch, capsys):
    server = rewards.remote(lambda c, p: nowhere)  # noqa: F821
    monkeypatch.setattr(rewards, "REWARDS", {"server": (server, 1.0)})
    line = fails(monkeypatch, capsys, made_up(tmp_path / "run"), "--reward", "server")
    assert "reward 'server' raised NameError" in line


# ------------------------------------------------------------------------------------------ a run in between


@pytest.fixture
def rules(monkeypatch):
    """Rewards without a model, whose values the run would have to hold."""
    monkeypatch.setattr(rewards, "REWARDS", {name: rewards.REWARDS[name] for name in ("length", "format")})


def test_a_step_that_is_being_written_is_named(rules, tmp_path, monkeypatch, capsys):
    """Torn in the middle of a character, at the end of a line, or empty."""
    run = made_up(tmp_path / "run", steps=(1,))
    whole = (run / "rollouts" / "step_000001.jsonl").read_bytes()
    torn = '{"prompt_id": "a", "text": "春'.encode()[:-1]
    file = run / "rollouts" / "step_000002.jsonl"
    for content in (whole[:len(whole) // 2], whole.split(b"\n")[0] + b"\n" + torn, b""):
        file.write_bytes(content)
        line = fails(monkeypatch, capsys, run)
        assert f"{file} has {content.count(bytes([10]))} of 4 samples: leave it out with --steps" in line
    assert main(monkeypatch, capsys, run, "--steps", ":1")[0]["steps"] == 1


def fails(monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["rescore", *map(str, arguments)])
    rescore.load.cache_clear()
    with pytest.raises(SystemExit) as stopped:
        rescore.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith("error: ")
    return line


def test_what_cannot_be_scored_is_one_sentence(rules, tmp_path, monkeypatch, capsys):
    run = made_up(tmp_path / "run")
    assert f"{tmp_path}/config.json does not exist" in fails(monkeypatch, capsys, tmp_path)
    assert "A:B" in fails(monkeypatch, capsys, run, "--steps", "one")
    assert "no step_*.jsonl of steps 7:9" in fails(monkeypatch, capsys, run, "--steps", "7:9")
    assert "'lenght' is not in rewards.REWARDS" in fails(monkeypatch, capsys, run, "--reward", "lenght")
    assert "nowhere.py cannot be used" in fails(monkeypatch, capsys, run, "--rewards", "nowhere.py")
    assert "guards.py cannot be used" in fails(monkeypatch, capsys, run, "--rewards", ROOT / "guards.py")
    for name, source, part in (("syntax", "\ndef (", "SyntaxError"), ("name", "\nREWARDS['x'] = y", "'y'")):
        file = suite(tmp_path / f"{name}.py", source)
        line = fails(monkeypatch, capsys, run, "--rewards", file)
        assert f"{file} cannot be used" in line and part in line
    for name, body in (("ids", "sum(c.token_ids)"), ("zero", "1 / 0"), ("word", "'good'")):
        source = f"\nREWARDS = {{'mine': (lambda c, p: {body}, 1.0)}}\n"
        line = fails(monkeypatch, capsys, run, "--rewards", suite(tmp_path / f"{name}.py", source))
        assert "reward 'mine'" in line and "prompt 'a'" in line
    first = run / "rollouts" / "step_000001.jsonl"
    whole = first.read_text()
    for lines, error in (
            ("{}\n", ", line 1: prompt_id must be a string"), ("[]\n", " cannot be read at line 1 (it must"),
            ("\x1d\n", " cannot be read at line 1 (Expecting value")):
        first.write_text(lines * 4)
        assert f"{first}{error}" in fails(monkeypatch, capsys, run)
    first.write_text(whole)
    config = json.loads((run / "config.json").read_text())
    shutil.copytree(ROOT / "data/tiny/writing", tmp_path / "writing")
    (tmp_path / "writing" / "tokenizer.json").write_text("{")
    (run / "config.json").write_text(json.dumps(config | {"reward_model": str(tmp_path / "writing")}))
    monkeypatch.setattr(rewards, "REWARDS", {"writing": (rewards.Writing(), 1.0)})
    assert "tokenizer.json cannot be read" in fails(monkeypatch, capsys, run, "--reward", "writing")
    monkeypatch.undo()
    (run / "prompts.jsonl").write_text('{"id": "a", "prompt": "Write on", "length_range": [5, 5]}\n')
    assert "prompt 'a' is not, or not like this, in" in fails(monkeypatch, capsys, run)
    (run / "prompts.jsonl").unlink()
    assert "prompts.jsonl cannot be read" in fails(monkeypatch, capsys, run)


# ------------------------------------------------------------------------------------------ rank correlation


def test_rank_correlation_by_hand_and_against_counting():
    """Ties share the mean of their ranks; missing pairs leave; without spread there is none."""
    assert rescore.ranks(np.array([30.0, 10.0, 20.0, 20.0])).tolist() == [4, 1, 2.5, 2.5]
    up, down = np.array([1.0, 2.0, 5.0, NAN, 9.0]), np.array([8.0, 4.0, 2.0, 1.0, NAN])
    assert rescore.spearman(up, up**3) == pytest.approx(1) and rescore.spearman(up, down) == pytest.approx(-1)
    assert rescore.spearman(np.ones(4), np.arange(4.0)) is None is rescore.spearman(up, np.full(5, NAN))
    rng = random.Random(0)
    for _ in range(50):
        a, b = ([float(rng.randrange(6)) for _ in range(12)] for _ in range(2))
        ra, rb = ([sum(y < x for y in v) + sum(y == x for y in v) / 2 for x in v] for v in (a, b))
        if len({*a}) > 1 < len({*b}):
            assert rescore.spearman(np.array(a), np.array(b)) == pytest.approx(np.corrcoef(ra, rb)[0, 1])
