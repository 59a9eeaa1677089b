"""What the measures of repetition make of texts whose share of copies is known by construction.

The texts are in tests/attacks.py. Their sentences come from grammars: they show what separates copies from
honest forms, not how a judge would rank real prose.
"""

import numpy as np
import pytest

from rewards import count_words, format_reward, format_words
from tests import attacks
from tests.helpers import asked, said


@pytest.fixture(scope="module")
def cases():
    return attacks.cases()


@pytest.fixture(scope="module")
def measured(cases):
    rows, scores = attacks.table(cases)
    return rows, dict(zip(attacks.MEASURES, scores))


def test_the_attack_set_holds_what_it_claims(cases):
    """Both languages, 8 disguises, 9 honest forms, 12,000-word texts; a disguise hides the copy from a plain
    search."""
    assert len(cases) >= 60 and len({case.text for case in cases}) == len(cases)
    for language in ("en", "zh"):
        for kind in attacks.VERBATIM + attacks.DISGUISED + attacks.HONEST:
            assert [c for c in cases if (c.kind, c.language) == (kind, language)], (kind, language)
        long = [c for c in cases if c.language == language and count_words(c.text) > 9000]
        assert {c.share > 0 for c in long} == {True, False}
    for case in (c for c in cases if c.share == 0.5):
        again = case.text[-200:]
        assert (again in case.text[:-200]) == (case.kind in ("block", "far")), case.kind


def test_copies_are_measured_as_they_were_constructed_and_honest_texts_stay_low(cases, measured):
    """|score - share of copies| <= 0.1 for verbatim ones; honest texts <= 0.15 on average, long ones too."""
    rows, scores = measured
    for name in ("repetition", "repetition_words", "either"):
        assert rows[name]["error"] <= 0.1, name
        assert rows[name]["honest"] <= 0.15, name
        long = [s for s, c in zip(scores[name], cases) if not c.share and count_words(c.text) > 9000]
        assert len(long) == 4 and np.mean(long) <= 0.15, name


def test_copies_in_every_disguise_score_above_honest_texts_and_better_than_n_grams_do(cases, measured):
    """AUC >= 0.98 over all kinds for `repetition_words` and for the larger of the two; shares of n-grams
    separate worse."""
    rows, scores = measured
    assert rows["repetition_words"]["auc"] >= 0.98 and rows["either"]["auc"] >= 0.98
    attack = np.array([case.share > 0 for case in cases])
    for n in (3, 5, 6):  # 6 is the best of 2 to 15: bench.bench_rewards
        peer = np.array([attacks.ngram_share(case.text, n) for case in cases])
        assert attacks.auc(peer[attack], peer[~attack]) < rows["either"]["auc"] - 0.005, n
    synonyms = np.array([case.kind == "synonyms" for case in cases])
    assert (scores["repetition_words"][synonyms] > scores["repetition"][synonyms]).mean() > 0.9


def test_other_texts_of_the_same_kinds_are_told_apart_too():
    """The thresholds are not fitted to one draw."""
    texts = attacks.cases(1)
    scores = np.array([attacks.either(case.text) for case in texts])
    attack = np.array([case.share > 0 for case in texts])
    assert attacks.auc(scores[attack], scores[~attack]) >= 0.98 and scores[~attack].mean() <= 0.15


def test_the_peers_are_what_their_sources_say():
    """TRL's example: 5 5 5 5 5 has one of four 2-grams, a penalty of 0.75; 1 2 3 4 has none."""
    assert attacks.ngram_share("5 5 5 5 5", 2) == 0.75
    assert attacks.ngram_share("1 2 3 4", 2) == attacks.ngram_share("1", 2) == 0.0
    assert attacks.auc(np.array([1, 2]), np.array([0, 1])) == 0.875


def test_format_words_pays_less_than_format_for_copies_in_disguise(cases):
    for text in (case.text for case in cases if case.kind == "synonyms" and case.share == 0.5):
        completion = said(f"<think>t</think><answer>{text}</answer>")
        assert format_words(completion, asked()) < format_reward(completion, asked()) - 0.02
        assert format_words(completion, asked()) == 1 - attacks.either(text)
    assert format_words(said(f"<answer>{text}</answer>"), asked()) == 0.0
