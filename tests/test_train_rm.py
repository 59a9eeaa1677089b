"""Preference files, the loss, the report, and small trainings of reward models.

Not exercised here: CUDA. Several ranks are in test_writing.py.
"""

import json
import math
import re
import shutil
import sys
import zlib

import pytest
import torch

import model as qwen
from data.preferences import Pair, read
from data.tiny import make
from data.tiny import pairs as tiny
from data.tiny.pairs import KINDS, pairs
from lib.options import UserError
from scripts import train_rm
from tests.helpers import ROOT, obeys_umask
from text import count_words

BASE = ROOT / "data/tiny/base"

def write(path, records) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return str(path)


ASKED = {"prompt": "Q"}
CHAT = [{"role": "user", "content": "Q"}]
RECORDS = {
    "plain": ({**ASKED, "chosen": "a", "rejected": "b", "kind": "k"}, [("a", "b", "k")]),
    "other names": ({"instruction": "Q", "chosen_response": "a ", "rejected_response": " b"},
                    [("a", "b", "")]),
    "messages": ({**ASKED, "chosen": [*CHAT, {"role": "assistant", "content": "a"}],
                  "rejected": [*CHAT, {"role": "assistant", "content": "b"}]}, [("a", "b", "")]),
    "messages alone": ({"chosen": [*CHAT, {"content": "a"}], "rejected": [*CHAT, {"content": "b"}],
                        "kind": None}, [("a", "b", "")]),
    "request as messages": ({"prompt": CHAT, "chosen": "a", "rejected": "b"}, [("a", "b", "")]),
    "ratings": ({**ASKED, "completions": [{"response": "a", "overall_score": 3},
                                          {"response": "b", "overall_score": 1.5},
                                          {"response": "c", "overall_score": 3}]},
                [("a", "b", ""), ("c", "b", "")]),
    "a list of scores": ({**ASKED, "responses": ["a", "b", "c"], "scores": [1, 2, 3]},
                         [("b", "a", ""), ("c", "a", ""), ("c", "b", "")]),
    "all alike": ({**ASKED, "responses": ["a", "b"], "ratings": [2, 2]}, []),
    "equal and empty sides": ({**ASKED, "responses": ["a", "a", ""], "ratings": [3, 2, 1]}, []),
}


@pytest.mark.parametrize("case", RECORDS)
def test_a_record_gives_its_pairs(case, tmp_path):
    record, expected = RECORDS[case]
    found, dropped = read(write(tmp_path / "pairs.jsonl", [record, ""]))
    assert found == [Pair("Q", *sides) for sides in expected]
    assert dropped == ({"equal": 1, "empty": 2} if case == "equal and empty sides" else {})


@pytest.mark.parametrize("record, said", [
    ("{", "Expecting"), ("[1]", "must be a JSON object"), (ASKED, "neither chosen and rejected nor a list"),
    ({"chosen": "a", "rejected": "b"}, "no text under any of prompt, query"),
    ({**ASKED, "chosen": 3, "rejected": "b"}, "not '3'"),
    ({**ASKED, "chosen": "\ud800", "rejected": "b"}, "surrogates"),
    ({**ASKED, "responses": ["a", "b"]}, "needs a number under one of score,"),
    ({**ASKED, "responses": ["a", "b"], "scores": [1]}, "2 responses, but 1 scores"),
    ({**ASKED, "responses": [{"score": 1}, {"text": "b", "score": math.nan}]}, "NaN is not a finite number"),
])  # fmt: skip
def test_a_record_that_is_none_is_named_by_file_and_line(record, said, tmp_path):
    path = write(tmp_path / "pairs.jsonl", [RECORDS["plain"][0], record])
    with pytest.raises(UserError, match="pairs.jsonl, line 2: ") as e:
        read(path)
    assert said in str(e.value) and len(str(e.value).splitlines()) == 1
    with pytest.raises(UserError, match="nowhere.*cannot be read"):
        read("nowhere")


def test_the_loss_is_bradley_and_terrys_and_the_second_term_pulls_the_mean_to_zero():
    chosen, rejected = (torch.tensor(x, requires_grad=True) for x in ([2.0, 1.0], [0.5, 3.0]))
    loss = train_rm.bradley_terry(chosen, rejected, 0.1)
    sigmoids = [1 / (1 + math.exp(-m)) for m in (1.5, -2.0)]
    assert loss.item() == pytest.approx(-sum(map(math.log, sigmoids)) + 0.1 * (2.5**2 + 4.0**2), rel=1e-6)
    loss.backward()
    for i, total in enumerate((2.5, 4.0)):
        assert chosen.grad[i].item() == pytest.approx(sigmoids[i] - 1 + 0.2 * total, rel=1e-5)
        assert rejected.grad[i].item() == pytest.approx(1 - sigmoids[i] + 0.2 * total, rel=1e-5)


def test_the_report_equals_one_made_by_hand():
    """Margins 2, -1, 0 and 3; the first two have longer chosen sides, the last a longer rejected one."""
    held_out = [Pair("Q", "w w", "w", "a"), Pair("Q", "w " * 60, "w", "a"), Pair("Q", "w", "v", "b"),
                Pair("Q", "w", "w w", "b")]
    found = train_rm.report(held_out, [2.0, 0.0, 1.0, 3.0], [0.0, 1.0, 1.0, 0.0])
    assert found["accuracy"] == {
        "all": [2.5 / 4, 4], "kind/a": [0.5, 2], "kind/b": [0.75, 2], "longer/chosen": [0.5, 2],
        "longer/neither": [0.5, 1], "longer/rejected": [1.0, 1], "words/0+": [2.5 / 3, 3],
        "words/50+": [0, 1]}
    sure = [1 / (1 + math.exp(-m)) for m in (0, 1, 2, 3)]
    expected = [(p, right, 1) for p, right in zip(sure, (0.5, 0.0, 1.0, 1.0))]
    for row, (p, right, n) in zip(found["reliability"], expected, strict=True):
        assert row == (pytest.approx(p), right, n)
    assert found["calibration_error"] == pytest.approx(sum(abs(p - r) for p, r, _ in expected) / 4)
    assert found["mean_score"] == 1.0
    slope = 100 * (2 * 1 - 1 * 59 + 3 * -1) / (1 + 59**2 + 1)
    assert found["slope_per_100_words"] == pytest.approx(slope)
    assert "longer/rejected" in train_rm.shown(found) and f"{slope:+.3f}" in train_rm.shown(found)


def test_a_judge_of_length_has_the_slope_that_it_pays_by_the_word_whichever_side_is_chosen():
    lengths = [(10, 40), (300, 100), (7, 7), (1000, 90)]
    held_out = [Pair("Q", "w " * a, "v " * b) for a, b in lengths]
    sides = ([5 + offset + 0.02 * n[side] for offset, n in enumerate(lengths)] for side in (0, 1))
    assert train_rm.report(held_out, *sides)["slope_per_100_words"] == pytest.approx(2)
    equal = train_rm.report(held_out[2:3], [1.0], [0.0])
    assert equal["slope_per_100_words"] is None and "none is longer" in train_rm.shown(equal)


def test_without_a_held_out_file_no_request_is_trained_and_held_out(tmp_path):
    records = [{"prompt": f"Q{i % 100}", "chosen": f"a{i}", "rejected": "b"} for i in range(300)]
    config = train_rm.Config(pairs=write(tmp_path / "pairs.jsonl", records), eval_pairs="")
    training, held_out, _ = train_rm.split(config)
    assert len(training) + len(held_out) == 300 and 3 <= len(held_out) < 40
    assert not {p.query for p in training} & {p.query for p in held_out}


TEMPLATES = [t for group in (make.OPENINGS, make.CLOSINGS) for kind in group.values() for t in kind]
VOCABULARY = {word for line in [*TEMPLATES, *make.BODY, *sum(make.WORDS.values(), []), "the baker my sister "
                                "the old man a child"] for word in re.findall("[a-z]+", line.lower())}


def strange(text: str, request: str) -> set[str]:
    """Words that neither the generator's sentences nor the request have."""
    return {*re.findall("[a-z]+", text.lower())} - VOCABULARY - {*re.findall("[a-z]+", request.lower())}


@pytest.mark.parametrize("kind", KINDS)
def test_both_sides_of_a_pair_are_equally_long_and_one_is_spoiled_as_its_kind_says(kind):
    found = [r for r in pairs("test", 100, held_out=True) if r["kind"] == kind]
    assert len(found) == 20 and found == [r for r in pairs("test", 100, held_out=True) if r["kind"] == kind]
    for r in found:
        words = [count_words(r[side]) for side in ("chosen", "rejected")]
        assert abs(words[0] - words[1]) <= 0.02 * min(words)
        chosen, rejected = (tiny.sentences(r[side]) for side in ("chosen", "rejected"))
        seen = {
            "shuffled": sorted(chosen) == sorted(rejected) and (chosen[0], chosen[-1]) != (rejected[0],
                                                                                           rejected[-1]),
            "repeated": len(set(rejected)) < len(rejected) and set(rejected) < set(chosen),
            "truncated": r["rejected"][-1] not in ".?",
            "contradicting": bool(strange(r["rejected"], r["prompt"])) and not set(rejected) & {
                *tiny.FILLERS, *tiny.HELD_OUT_FILLERS},
            "padded": bool(set(rejected) & set(tiny.HELD_OUT_FILLERS)),
        }
        assert [name for name, yes in seen.items() if yes] == [kind], r
        assert not strange(r["chosen"], r["prompt"]) and r["chosen"][-1] == "."
        for word in re.findall(r"\b[A-Z][a-z]+", r["rejected"]):
            if word.lower() in strange(r["rejected"], r["prompt"]) and kind == "contradicting":
                assert zlib.crc32(word.lower().encode()) % 10 == 0, "held-out names alone"


def test_no_filler_is_trained_and_held_out():
    assert not set(tiny.FILLERS) & set(tiny.HELD_OUT_FILLERS)
    assert not any(line in r["rejected"] for r in pairs("test", 80) for line in tiny.HELD_OUT_FILLERS)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    shutil.copytree(BASE, tmp_path / "base")
    raw = json.loads((BASE / "tokenizer.json").read_text())
    raw["added_tokens"] += [raw["added_tokens"][0] | {"id": 5000, "content": "<|other|>"}]
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="1025 ids, but the model in .*base has only 1024 rows"):
        train_rm.run(train_rm.Config(model=str(tmp_path / "base"), out=str(tmp_path / "rm")))


def test_a_short_training_tells_texts_apart_and_transformers_reads_the_result(tmp_path, monkeypatch, capsys):
    """Short texts, cut, which are the easiest; the tokenizer lies beside the weights."""
    for name, count, held_out in (("train", 560, False), ("eval", 300, True)):
        write(tmp_path / f"{name}.jsonl", [r for r in pairs(name, count, held_out) if r["kind"] == "truncated"
                                           and count_words(r["chosen"]) < 50])
    options = ["--pairs", tmp_path / "train.jsonl", "--eval_pairs", tmp_path / "eval.jsonl", "--model", BASE,
               "--out", tmp_path / "rm", "--pairs_per_step", 4, "--warmup", 2]
    monkeypatch.setattr(sys, "argv", ["train_rm", *map(str, options)])
    train_rm.main()
    found = json.loads((tmp_path / "rm" / "evaluation.json").read_text())
    assert found["accuracy"]["all"][0] > 0.85 and found["accuracy"]["all"][1] >= 15
    assert "kind/truncated" in capsys.readouterr().out
    model = qwen.load(tmp_path / "rm", torch.bfloat16)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", dtype="auto")
    assert torch.equal(theirs.score.weight, model.score.weight) and theirs.dtype == torch.bfloat16
    assert (tmp_path / "rm/tokenizer.json").read_bytes() == (BASE / "tokenizer.json").read_bytes()
    assert obeys_umask(tmp_path / "rm")
    monkeypatch.setattr(sys, "argv", ["train_rm", *map(str, options), "--epochs", "0", "--model",
                                      str(tmp_path / "rm"), "--out", ""])
    train_rm.main()
    again = float(re.search(r"^all +(\S+)", capsys.readouterr().out, re.M).group(1))
    assert again == pytest.approx(found["accuracy"]["all"][0], abs=0.1), "a reward model is only reported on"


@pytest.mark.parametrize("options, said", [
    (["--lr", "-1"], "lr must be at least 0, not -1.0"), (["--dtype", "half"], "dtype must be one of"),
    (["--out", "data/tiny/base"], "out data/tiny/base is the folder of `model`"),
    (["--model", "nowhere"], "nowhere/config.json does not exist"), (["--pairs", "nowhere"],
                                                                     "nowhere cannot"),
    (["--pairs_per_step", "1000"], "has 3 usable pairs"), (["--eval_pairs", ""], "no held-out pair is left"),
    (["--epoch", "2"], "did you mean 'epochs'"),
    (["--out", ""], "--out is missing: give a folder"),
    (["--out", "README.md/rm"], "out README.md/rm cannot be written"),
    (["--max_tokens", "2049"], "max_tokens 2049 exceeds the model's context of 2048"),
])  # fmt: skip
def test_what_cannot_be_is_one_sentence(options, said, tmp_path, monkeypatch, capsys):
    files = [write(tmp_path / name, [{"prompt": "Q", "chosen": f"a{i}", "rejected": "b"} for i in range(3)])
             for name in ("pairs.jsonl", "eval.jsonl")]
    base = ["--pairs", files[0], "--eval_pairs", files[1], "--out", str(tmp_path / "rm"), "--pairs_per_step",
            "3"]
    monkeypatch.setattr(sys, "argv", ["train_rm", *base, *options])
    with pytest.raises(SystemExit, match="2"):
        train_rm.main()
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and len(error.splitlines()) == 1
    assert not (tmp_path / "rm").exists()
