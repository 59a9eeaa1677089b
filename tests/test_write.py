"""scripts.write: what is shown is what is sampled; stopping; tasks that cannot be."""

import builtins
import re
import sys

import pytest

from data.prompts import render
from data.tokenizer import Tokenizer
from scripts import write
from tests.helpers import ROOT

BASE = ROOT / "data/tiny/base"
TASK = "Write a story of 50 words about Vean and Rura in Steburg.".split()


def run(monkeypatch, capsys, *options) -> str:
    monkeypatch.setattr(sys, "argv", ["write", *map(str, options)])
    write.main()
    return capsys.readouterr().out


@pytest.fixture
def shown(monkeypatch):
    """The completions of a command."""
    found, plain = [], write.write
    monkeypatch.setattr(write, "write", lambda *a: found.append(plain(*a)) or found[-1])
    return found


def test_what_is_shown_is_what_is_sampled_in_parts(monkeypatch, capsys, shown, tmp_path):
    """From words, and the same from a file. Nothing but the text is printed before its summary."""
    (tmp_path / "task.txt").write_text(" ".join(TASK), encoding="utf-8")
    parts, plain = [], builtins.print
    monkeypatch.setattr(builtins, "print", lambda *a, **k: parts.append(a) or plain(*a, **k))
    out = run(monkeypatch, capsys, BASE, *TASK, "--words", "45:55")
    again = run(monkeypatch, capsys, BASE, "--file", tmp_path / "task.txt", "--words=45:55")
    (completion, _), (other, _) = shown
    assert completion == other and len(parts) > 2 * 20, "token by token"
    text, summary = out.rstrip("\n").rsplit("\n", 1)
    assert text == completion.text and re.fullmatch(
        r"\d+ words, \d+ tokens, [\d,]+ a second, ended, length [\d.]+, format [\d.]+, overlong 0.000",
        summary)
    assert re.sub(r"[\d,]+ a second", "", again) == re.sub(r"[\d,]+ a second", "", out)


def test_thinking_is_dimmed_on_a_terminal(monkeypatch, capsys):
    """Between the tags' ends, and never for longer than the text."""
    tokenizer, said = Tokenizer(BASE), "<think>A plan.</think>\n<answer>雾 came.</answer>"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    sampler = type("Fake", (), {"tokenizer": tokenizer, "eos_ids": set(tokenizer.eos_ids)})()
    screen, ids = write.Screen(sampler), tokenizer.encode(said) + tokenizer.eos_ids
    for n in range(len(ids) + 1):
        screen.print(ids[:n])
    assert capsys.readouterr().out == said.replace("<think>", "<think>\033[2m").replace(
        "</think>", "</think>\033[0m")


def test_ctrl_c_ends_the_text(monkeypatch, capsys, shown):
    calls, plain = [], write.Screen.__call__

    def stop(self):
        calls.append(1)
        plain(self)
        if len(calls) == 12:
            raise KeyboardInterrupt

    monkeypatch.setattr(write.Screen, "__call__", stop)
    out = run(monkeypatch, capsys, BASE, *TASK)
    (completion, _), = shown
    assert completion.finish_reason == "stopped" and 5 < len(completion.token_ids) < 12
    assert out.startswith(completion.text + "\n") and "a second, stopped" in out


@pytest.mark.parametrize("options, part", [
    ([BASE], "TASK is missing"), ([BASE, " "], "give a task as words"),
    ([BASE, "--file", "nowhere"], "nowhere"), ([BASE, "--chat", "true"], "has no chat template"),
    ([BASE.parent / "writing", "a"], "is a reward model"),
    ([BASE, "a", "--words", "9"], "words must be LO:HI"),
    ([BASE, "a", "--words", "9:5"], "words must be LO:HI"), ([BASE, "word " * 3000], "shorten it"),
    (["nowhere", "a"], "nowhere/config.json"), ([BASE, "a", "--top_p", "2"], "top_p must be"),
])  # fmt: skip
def test_what_cannot_be_is_one_sentence(monkeypatch, capsys, options, part):
    monkeypatch.setattr(sys, "argv", ["write", *map(str, options)])
    with pytest.raises(SystemExit, match="2"):
        write.main()
    error = capsys.readouterr().err
    assert error.startswith("error: ") and part in error and len(error.splitlines()) == 1


def test_a_chat_remembers_what_was_said_without_the_thinking(monkeypatch, capsys):
    """Each answer continues the chat; its thinking is left out of it."""
    tokenizer, asked = Tokenizer(BASE), []
    lines = iter(["Hello.", "And then?"])

    def answer(text, sampler, config, stop):
        asked.append(text)
        return write.Completion(0, 0, [1, 2], [], f"<think>x</think> answer {len(asked)}", "stop", 9), 1.0

    def ask(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(write, "write", answer)
    monkeypatch.setattr(builtins, "input", ask)
    write.talk(type("Fake", (), {"tokenizer": tokenizer})(), write.Config(), "chat")
    assert asked[1] == tokenizer.chat([{"role": "user", "content": "Hello."},
                                       {"role": "assistant", "content": "answer 1"},
                                       {"role": "user", "content": "And then?"}])
    assert render("x", "think") not in asked[1] and "(2 tokens, 2 a second)" in capsys.readouterr().out
