"""A small part of tests/fuzz.py, and that it lists what it is for."""

import time

import pytest

from lib import distributed
from lib.options import UserError
from tests import fuzz


@pytest.fixture(autouse=True)
def group():
    yield
    distributed.close()


@pytest.mark.parametrize("part, number", [("prompts", 8), ("models", 12), ("options", 8)])
def test_every_input_is_accepted_and_trains_or_is_refused_in_a_sentence(part, number):
    found = fuzz.fuzz(part, number, seed=7)
    accepted, refused = found.pop("accepted"), found.pop("refused")
    assert not any(found.values()), found
    assert accepted + refused == number and min(accepted, refused) > 0


def raises(error: BaseException):
    def read():
        raise error
    return read


def test_what_is_no_sentence_is_listed(monkeypatch):
    """A panic of tokenizers' Rust is no Exception."""
    class PanicException(BaseException):
        pass

    monkeypatch.setattr(fuzz, "LIMIT", 1)
    found = {"accepted": 0, "refused": 0, "tracebacks": [], "hangs": [], "accepted that cannot train": []}
    cases = {"zero": lambda: 1 / 0, "panic": raises(PanicException("oh")), "mute": raises(UserError()),
             "useless": raises(fuzz.CannotTrain("why")), "slow": lambda: time.sleep(9),
             "sentence": raises(UserError("a sentence")), "good": lambda: None}
    for what, read in cases.items():
        fuzz.attempt(read, what, found)
    assert (found["accepted"], found["refused"]) == (1, 2)
    assert [line.split(":")[0] for line in found["tracebacks"]] == ["zero", "panic", "mute"]
    assert found["accepted that cannot train"] == ["useless: why"]
    assert [line.split(":")[0] for line in found["hangs"]] == ["slow"]
