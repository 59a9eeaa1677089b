"""What the rule rewards pay for. Completions and prompts are stand-ins with the fields that rewards read."""

import math
import random
import string
import time
from types import SimpleNamespace

import pytest
import torch

import rewards
import rollout
import text as text_module
import train
from lib.scoring import Reward, choose_rewards, score
from rewards import REWARDS, count_words, format_reward, length, length_reward, repetition, structure
from tests.helpers import asked, said

ESSAY = """
Chapter 1: The harbour. My grandfather kept two boats, one for the herring and one that he never explained
to anybody. Each spring he scraped both hulls down to bare wood, cursing softly in a dialect that my
mother had already forgotten.
Chapter 2: The ledger. When the bank closed, a clerk carried eleven volumes of accounts up the hill and
hid them beneath the floor of the schoolhouse, where mice ate the years between the wars. What survived is
mostly weather, prices of salt, and the names of people who owed each other small sums.
Chapter 3: The bridge. Engineers came from the capital with brass instruments and an appetite for our
bread. They measured the river four times because it would not hold still, then built eight metres too
low, as every flood since has pointed out.
Chapter 4: The return. I drove back last winter to sell the house and instead repaired its roof; slate by
slate the argument for leaving grew thinner. By March I could name the owner of every chimney. The second
boat, it turns out, was for going home.
"""
ZH_ESSAY = """
第一章：老街。清晨五点，卖豆浆的推车碾过石板路，吱呀声比公鸡还准时。祖母说她年轻时，这条街夜里点的是
煤油灯，风一吹便熄去大半，行人只好摸着墙回家。
第二章：河水。上游修了水库之后，夏天再也听不见涨潮的轰鸣，孩子们失去了跳水的木桥，却得到一座漆成蓝色
的游泳池，门票两元，周一闭馆。
第三章：归人。去年冬天，我带着女儿回来给老屋换瓦。她问我为什么不住进楼房，我指着檐下空了的燕巢，一时
竟答不上来，只觉得远处有人在敲钟。
"""
RULES = {name: Reward(name, *entry) for name, entry in REWARDS.items() if name != "writing"}
LETTERS, HANZI = "abcdefgh", "春夏秋冬山水风"


# ------------------------------------------------------------------------------------------ words


@pytest.mark.parametrize("text, words", [
    ("", 0), ("   \n", 0), ("one", 1), ("one two  three.", 3), ("a well-known case", 4), ("春天来了。", 4),
    ("我爱 Beijing 烤鸭", 5), ("don't", 2), ("2024 12.5 %", 0), ("mp3 b2b", 0), ("café", 0),
    ("naïve idea", 1), ("snake_case", 0), ("我爱Beijing烤鸭", 4), ("\u4e00\u9fff", 2),
    ("\u3400\u9fff\ua000", 1), ("、。！？", 0), ("ひらがな", 0), ("<b>bold</b>", 3)])
def test_words_are_counted_as_the_longwriter_benchmarks_count_them(text, words):
    """Quirks included: "don't" is 2, digits and accented words 0, Latin glued to CJK is missed."""
    assert count_words(text) == words


# ------------------------------------------------------------------------------------------ length


@pytest.mark.parametrize("words, lo, hi, reward", [
    (0, 100, 200, 0.0), (50, 100, 200, 0.5), (99, 100, 200, 0.99), (100, 100, 200, 1.0), (150, 100, 200, 1.0),
    (200, 100, 200, 1.0), (201, 100, 200, 0.99), (250, 100, 200, 0.5), (299, 100, 200, 0.01),
    (300, 100, 200, 0.0), (301, 100, 200, 0.0), (9999, 100, 200, 0.0),
    # lo = 0: the short branch never fires
    (0, 0, 100, 1.0), (1, 0, 100, 1.0), (100, 0, 100, 1.0), (125, 0, 100, 0.5), (150, 0, 100, 0.0),
    # lo = hi
    (99, 100, 100, 0.99), (100, 100, 100, 1.0), (101, 100, 100, 0.98), (150, 100, 100, 0.0),
    # Lmax = hi + 20, then both alike, then 1.5 hi
    (30, 10, 30, 1.0), (40, 10, 30, 0.5), (49, 10, 30, 0.05), (50, 10, 30, 0.0),
    (50, 10, 40, 0.5), (60, 10, 40, 0.0), (63, 10, 42, 0.0), (62, 10, 42, 1 / 21)])
def test_length_reward_at_every_boundary(words, lo, hi, reward):
    assert length_reward(words, lo, hi) == pytest.approx(reward, abs=1e-12)


def test_length_reward_rises_to_the_range_and_falls_after_it():
    """Never negative, never above 1, monotone on both sides: a step towards the range never loses reward."""
    for lo, hi in ((0, 1), (1, 1), (7, 9), (100, 300), (2700, 3300)):
        values = [length_reward(n, lo, hi) for n in range(2 * hi + 50)]
        assert all(0 <= v <= 1 for v in values) and values[lo:hi + 1] == [1.0] * (hi + 1 - lo)
        assert values[:lo + 1] == sorted(values[:lo + 1]) and values[hi:] == sorted(values[hi:], reverse=True)
        assert values[-1] == 0


@pytest.mark.parametrize("text", [
    "", "   ", "just words without a tag", "<think>only a thought</think>",
    "<think>t</think><answer></answer>", "<think>t</think><answer>  \n </answer>",
    "<think>t</think><answer>", "</answer>", "<think>t</think><answer>...</answer>", "<answer>2024. 10!"])
def test_no_answer_body_earns_no_length_reward_even_where_zero_words_are_in_range(text):
    assert length(said(text), asked(0, 100)) == 0.0
    assert length(said(text), asked(10, 100)) == 0.0


def test_length_counts_the_answer_body_only():
    thought, outside = "<think>" + "thought " * 50 + "</think>", "outside " * 30
    text = f"{outside}{thought}{outside}<answer>one two three</answer>{outside}"
    assert length(said(text), asked(3, 3)) == 1.0


def test_an_answer_that_is_never_closed_counts_to_the_end_of_the_text():
    text = "<think>t</think><answer>" + "word " * 80
    assert length(said(text), asked(80, 80)) == 1.0
    assert length(said(text), asked(160, 200)) == 0.5
    assert format_reward(said(text), asked()) == 0.0


def test_length_holds_without_a_thought_and_for_chinese():
    assert length(said("<answer>春天来了</answer>"), asked(4, 4, style="direct")) == 1.0
    assert length(said("<answer>春天来了</answer>"), asked(8, 9, style="direct")) == 0.5


def test_length_is_missing_not_zero_for_a_prompt_without_a_range():
    assert length(said("<think>t</think><answer>body</answer>"), asked()) is None
    assert length(said(""), asked()) is None


# ------------------------------------------------------------------------------------------ structure


@pytest.mark.parametrize("text, thought, answer", [
    ("<think>t</think><answer>a</answer>", "t", "a"),
    ("  \n<think>t</think>\n\n\t<answer>a</answer> \n", "t", "a"),
    ("<think>\n two\nlines \n</think><answer>\n a\n\nb </answer>", "two\nlines", "a\n\nb"),
    ("<think>x < y, <b>bold</b></think><answer>1 < 2 </p></answer>", "x < y, <b>bold</b>", "1 < 2 </p>"),
    ("<think>先想</think>\u3000<answer>后写</answer>", "先想", "后写")])
def test_well_formed_texts_pass_and_give_their_bodies_stripped(text, thought, answer):
    assert structure(text) == (True, thought, answer)


@pytest.mark.parametrize("text", [
    # missing
    "", "plain text", "<answer>a</answer>", "<think>t</think>",
    "<think>t</think>a</answer>", "<think>t</think><answer>a", "t</think><answer>a</answer>",
    "<think>t<answer>a</answer>", "<think>t</think>a",
    # repeated
    "<think>t</think><think>t</think><answer>a</answer>",
    "<think>t</think><answer>a</answer><answer>a</answer>",
    "<think><think>t</think><answer>a</answer>", "<think>t</think></think><answer>a</answer>",
    "<think>t</think><answer>a</answer></answer>", "<think>t</think><answer><answer>a</answer>",
    # nested
    "<think>t<answer>a</answer></think>", "<think>t<think>u</think></think><answer>a</answer>",
    "<think>t</think><answer>a<think>u</think></answer>", "<answer><think>t</think>a</answer>",
    "<think>t</think><answer>a<answer>b</answer></answer>", "<think>t<answer>a</think></answer>",
    # swapped
    "<answer>a</answer><think>t</think>", "</think>t<think><answer>a</answer>",
    "<think>t</think></answer>a<answer>",
    # text outside
    "so: <think>t</think><answer>a</answer>", "<think>t</think>hence<answer>a</answer>",
    "<think>t</think><answer>a</answer>done", "<think>t</think>.<answer>a</answer>",
    # empty bodies
    "<think></think><answer></answer>", "<think></think><answer>a</answer>",
    "<think> \n</think><answer>a</answer>", "<think>t</think><answer></answer>",
    "<think>t</think><answer> \n\t</answer>",
    # no such tags
    "<Think>t</Think><Answer>a</Answer>", "<think >t</think><answer>a</answer>",
    "<think>t</think><answer>a</answer >"])
def test_malformed_texts_fail(text):
    assert structure(text)[0] is False
    assert format_reward(said(text), asked()) == 0.0


@pytest.mark.parametrize("text, answer", [
    ("<think>t</think><answer>```\n<answer>x</answer>\n```</answer>", "```\n<answer>x"),
    ("<think>t</think><answer>Write `</answer>` at the end.</answer>", "Write `"),
    ("<think>I will close with \"</think>\".</think><answer>a</answer>", "a"),
    ("```<think>t</think>```<answer>a</answer>", "a"), ("<think>```</think>```<answer>a", "a")])
def test_a_tag_is_a_tag_in_a_code_block_and_between_quotes_too(text, answer):
    """There the sampler stops as well, and an exception would hide a second answer. Escaped it is none."""
    assert structure(text)[0] is False and structure(text)[2] == answer
    assert structure("<think>t</think><answer>Close with `&lt;/answer&gt;`.</answer>")[0] is True


@pytest.mark.parametrize("text, ok", [
    ("<answer>a</answer>", True), (" \n<answer> a </answer>\n", True),
    ("<answer></answer>", False), ("<answer> </answer>", False),
    ("a", False), ("<answer>a", False), ("a</answer>", False),
    ("so <answer>a</answer>", False), ("<answer>a</answer> ok", False),
    ("<answer>a</answer><answer>b</answer>", False), ("<answer>a<answer>b</answer></answer>", False),
    ("<think>t</think><answer>a</answer>", False), ("<answer><think>t</think>a</answer>", False),
    ("<answer>a</think></answer>", False)])
def test_the_direct_style_is_the_answer_pair_alone(text, ok):
    """A thought fails it: the two settings are compared, so the direct one must not be paid for thinking."""
    assert structure(text, think=False)[0] is ok
    assert (format_reward(said(text), asked(style="direct")) > 0) is ok


@pytest.mark.parametrize("text, thought, answer", [
    ("<answer>a</answer>", None, "a"), ("<think>t</think>", "t", None),
    ("<think>t</think> x <answer>a b", "t", "a b"), ("<think>t", None, None),
    ("<think> </think><answer> </answer>", None, None), ("no tags", None, None)])
def test_bodies_are_found_in_broken_texts_and_none_where_there_is_none(text, thought, answer):
    assert structure(text) == (False, thought, answer)


# ------------------------------------------------------------------------------------------ repetition


def folded(text):
    """The reference's own folding, good enough for the alphabets of these tests."""
    return "".join(c.lower() for c in text if c.isalnum())


def brute_force(text):
    """Quadratic reference: a set of the substrings seen so far, one flag for each character."""
    text = folded(text)
    seen, again = set(), [False] * len(text)
    for i in range(len(text)):
        width, j = 0.0, i
        while j < len(text) and width < text_module.SHINGLE - 1e-6:
            width += text_module.CJK_WIDTH if "\u4e00" <= text[j] <= "\u9fff" else 1.0
            j += 1
        if width < text_module.SHINGLE - 1e-6:
            break
        if text[i:j] in seen:
            again[i:j] = [True] * (j - i)
        seen.add(text[i:j])
    return sum(again) / len(text) if text else 0.0


@pytest.mark.parametrize("text", [ESSAY, ZH_ESSAY, "The quick brown fox jumps over", "一二三四五六七八九十"])
def test_a_text_given_twice_has_repetition_one_half_exactly(text):
    assert repetition(text) == 0.0
    assert repetition(text + text) == 0.5
    assert repetition(text * 4) == 0.75


def test_a_mixed_text_given_twice_has_one_half_up_to_the_rounding_of_its_last_shingle():
    rng = random.Random(1)
    for _ in range(200):
        text = "".join(rng.choices(string.ascii_lowercase + "春夏秋冬山水风花雪月", k=80))
        assert 0.5 - 3 / 160 < repetition(text + text) <= 0.5


def test_a_shingle_is_24_latin_letters_or_10_chinese_characters():
    ends = ("一", "二", "三")
    for unit, size in ((string.ascii_lowercase, 24), ("春夏秋冬山水风花雪月星云", 10)):
        assert repetition(unit[:size - 1].join(ends)) == 0.0
        assert repetition(unit[:size].join(ends)) == pytest.approx(size / (2 * size + 3))


def test_a_block_repeated_far_away_is_caught():
    rng = random.Random(4)
    block, far = ("".join(rng.choices(string.ascii_lowercase, k=n)) for n in (200, 80_000))
    text = block + far + block
    assert repetition(text) == pytest.approx(len(folded(block)) / len(folded(text)))


def test_copies_are_the_characters_that_repetition_counts_and_name_their_twins():
    """On 100 texts with copies of all sizes, in both scripts; ß and İ fold to two characters."""
    rng = random.Random(0)
    for _ in range(100):
        source = rng.choice((ESSAY, ZH_ESSAY, ESSAY.replace("s", "ß"), ESSAY.replace("i", "İ") + ZH_ESSAY))
        pieces = [source]
        for _ in range(rng.randint(0, 4)):
            at = rng.randrange(len(source))
            pieces.append(source[at:at + rng.randint(5, 300)].upper() + rng.choice(("\n", "…", " and so ")))
        text = "".join(pieces)
        spans = text_module.copies(text)
        assert all(a < b <= c for (_, a, _), (b, c, _) in zip([(0, -1, 0), *spans], spans))
        fold = text_module.fold
        counted, whole = sum(len(fold(text[a:b])) for a, b, _ in spans), len(fold(text))
        halves = 2 * len(spans) * ("ß" in text or "İ" in text)  # a span may begin or end in one
        assert counted == pytest.approx(repetition(text) * whole, abs=1e-6 + halves)
        for start, end, twin in spans:
            assert twin < start and (fold(text[twin:])[1:8] == fold(text[start:end])[1:8]).all() or halves


def test_case_punctuation_and_white_space_hide_no_repetition():
    rng = random.Random(5)
    words = ["".join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(60)]
    plain = " ".join(words)
    disguised = "\n".join(w.upper() if i % 2 else f"«{w[:3]}-{w[3:]}»!…" for i, w in enumerate(words))
    assert repetition(plain + disguised) == 0.5
    zh = "春眠不觉晓处处闻啼鸟夜来风雨声花落知多少"
    assert repetition(zh + "，".join(zh) + "。") == 0.5


@pytest.mark.parametrize("text, share", [
    ("", 0.0), ("a", 0.0), ("春", 0.0), ("😀" * 200, 0.0), ("?!… —" * 100, 0.0), ("short", 0.0),
    (" \n\t", 0.0), ("a" * 24, 0.0), ("a" * 25, 0.96), ("a" * 100, 0.99), ("哈" * 10, 0.0), ("哈" * 50, 0.98),
    ("1" * 100, 0.99)])
def test_repetition_of_degenerate_texts(text, share):
    assert repetition(text) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize("alphabet", [LETTERS, HANZI, LETTERS + HANZI], ids=["latin", "cjk", "mixed"])
@pytest.mark.parametrize("shingle", [24.0, 6.0])
def test_repetition_equals_a_quadratic_reference(alphabet, shingle, monkeypatch):
    """Random texts over a small alphabet, made of copied pieces: repeats of all lengths and overlaps."""
    monkeypatch.setattr(text_module, "SHINGLE", shingle)
    rng, shares = random.Random(6), []
    for _ in range(150):
        text = "".join(rng.choices(alphabet, k=rng.randint(0, 60)))
        for _ in range(rng.randint(0, 6)):
            at, size = rng.randrange(len(text) + 1), rng.randint(1, 45)
            noise = "".join(rng.choices(alphabet + " ,.!", k=rng.randint(0, 20)))
            text += noise + text[at:at + size].upper()
        shares.append(repetition(text))
        assert shares[-1] == pytest.approx(brute_force(text), abs=1e-12), text
    assert min(shares) == 0 and sum(0.1 < s < 0.9 for s in shares) > 30  # both kinds of text were compared


def test_no_false_hit_among_200000_random_letters():
    """A hash of too few bits, or one that is blind to order, finds repeats where there are none."""
    rng = random.Random(7)
    assert repetition("".join(rng.choices(string.ascii_lowercase, k=200_000))) == 0.0
    piece = list(string.ascii_lowercase[:24])
    permutations = ["".join(rng.sample(piece, 24)) for _ in range(300)]
    assert repetition("".join(permutations)) == brute_force("".join(permutations)) == 0.0


# ------------------------------------------------------------------------------------------ format


def test_format_is_structure_times_non_repetition_of_the_answer_body():
    body = "春眠不觉晓，处处闻啼鸟。"

    def earned(thought, answer):
        return format_reward(said(f"<think>{thought}</think><answer>{answer}</answer>"), asked())

    assert earned("t", body) == 1.0
    assert earned("t", body * 2) == 0.5
    assert earned("t", body * 4) == 0.25
    assert earned(body * 4, body) == 1.0, "a thought may repeat itself, and an answer its thought"
    assert format_reward(said(f"<answer>{body * 2}</answer>"), asked()) == 0.0
    assert format_reward(said(f"<answer>{body * 2}</answer>"), asked(style="direct")) == 0.5


def test_format_words_sees_what_format_sees_and_disguised_copies_too():
    """Neither sees all: letters without a space are no words, and a shingle has every letter alike."""
    def earned(reward, answer):
        return reward(said(f"<think>t</think><answer>{answer}</answer>"), asked())

    verbatim, words = "a" * 100, ESSAY.split()
    assert earned(rewards.format_words, verbatim) == pytest.approx(0.01) == earned(format_reward, verbatim)
    disguised = ESSAY + " ".join(w if i % 4 else "zzz" for i, w in enumerate(words))
    assert earned(rewards.format_words, disguised) < earned(format_reward, disguised) - 0.1
    assert earned(rewards.format_words, ESSAY) == 1.0


def test_the_three_rewards_of_the_paper_count_alike_and_no_other_counts():
    assert {name: weight for name, (_, weight) in REWARDS.items() if weight} == {
        "length": 1, "format": 1, "writing": 1}
    assert not rewards.TRANSFORMS and not rewards.REQUIRED


@pytest.mark.parametrize("value", [math.inf, math.nan, 1e39, -1e39, "1", [1.0]])
def test_what_is_no_finite_number_of_fp32_is_no_reward(value):
    prompt = SimpleNamespace(id="p")
    with pytest.raises(rollout.RewardError, match="must be a finite number, or None"):
        score(Reward("odd", lambda completion, prompt: value, 1.0), [said("")], [prompt])
    assert score(Reward("odd", lambda completion, prompt: 1e38, 1.0), [said("")], [prompt]) == [1e38]


WORDS = " ".join(str(i) + "abcdefghij"[i % 10] for i in range(100_000))  # no two alike
ARABIC = "كان الميناء هادئا في الصباح، ولم يكن أحد يعرف أين ذهبت السفن القديمة."


@pytest.mark.parametrize("body, words, repeated, in_words", [
    ("", 0, None, None), (" \n\t ", 0, None, None), ("。", 0, 0, 0), ("x", 1, 0, 0), ("我", 1, 0, 0),
    ("word " * 100_000, 100_000, 1 - 1e-5, 1 - 1e-5), (WORDS, 0, 0.0, 0.0),
    ("字" * 100_000, 100_000, 1 - 1e-5, 1 - 1e-5), ("a" * 100_000, 1, 1 - 1e-5, 0),  # no spaces
    ("😀🎉" * 5000, 0, 0, 0), ("👩‍👩‍👧" * 99, 0, 0, 0), (ARABIC, 0, 0, 0), (ARABIC * 2, 0, 0.5, 0.5),
    ("\x00\x07\x1b[31m" * 500, 0, None, None), ("a\u202eb\u200bc" * 100, 201, 0.99, 197 / 201),
    ("\ud800 x", 1, 0, 0)])
def test_degenerate_bodies(body, words, repeated, in_words):
    """Hand-computed: `word ` n times repeats all but the first letter of a period; None: as the code says."""
    prompt = asked(words, words)
    prompt.query, prompt.id = "Write.", "p"
    completion = said(f"<think>t</think><answer>{body}</answer>")
    completion.finish_reason, completion.max_new_tokens, completion.token_ids = "stop", 8, [1]
    assert count_words(body) == words
    if repeated is not None:
        assert repetition(body) == pytest.approx(repeated, abs=1e-5)
        assert text_module.repetition_words(body) == pytest.approx(in_words, abs=1e-4)
    for name, reward in RULES.items():
        (value,) = score(reward, [completion], [prompt])
        assert 0 <= value <= 1 or value != value or name == "overlong", name
    assert length(completion, prompt) == float(words > 0)


# ------------------------------------------------------------------------------------------ overlong


@pytest.mark.parametrize("tokens, expected", [(1, 0), (80, 0), (81, -0.05), (90, -0.5), (100, -1)])
def test_overlong_falls_over_the_last_fifth_of_the_budget(tokens, expected):
    """DAPO: Lmax 100, Lc 20: 0 up to 80 tokens, then (80 - L) / 20."""
    completion = SimpleNamespace(token_ids=[5] * tokens, max_new_tokens=100)
    assert rewards.overlong(completion, None) == pytest.approx(expected)


def test_overlong_is_missing_without_a_budget():
    assert rewards.overlong(SimpleNamespace(token_ids=[5], max_new_tokens=0), None) is None


# ------------------------------------------------------------------------------------------ transforms


def test_a_transform_makes_what_the_advantage_sees_and_leaves_the_missing_missing(monkeypatch):
    monkeypatch.setattr(rewards, "TRANSFORMS", {"length": lambda r: 100 * r})
    with_transform, without = choose_rewards("length,format", rewards)
    assert with_transform.transformed(0.25) == 25.0 and without.transformed(0.25) == 0.25
    assert math.isnan(with_transform.transformed(math.nan))


def test_advantages_of_a_small_spread_on_a_large_offset_are_those_without_the_offset():
    """In fp64: 1e6 + 0.01 is 1e6 in fp32."""
    chosen = [Reward("one", len, 1.0)]
    raw = torch.tensor([[[0.01], [0.02], [0.04], [0.0]]], dtype=torch.float64)
    near, far = (rollout.combine_advantages(raw + offset, chosen, train.Config())[0] for offset in (0, 1e6))
    torch.testing.assert_close(near, far, rtol=1e-6, atol=1e-6)


def test_a_transform_never_sees_a_sample_without_an_answer_which_stays_the_worst():
    """The log of its number may not exist, and a falling transform would make it the best."""
    raw = torch.tensor([[[0.1], [0.9], [-math.inf], [2.0]]], dtype=torch.float64)
    for transform in (None, math.log, lambda value: -value):
        chosen = [Reward("one", len, 1.0, transform)]
        (advantage_G,), *_ = rollout.combine_advantages(raw, chosen, train.Config())
        assert advantage_G.argmin() == 2 and advantage_G[2] < -1


def test_dominance_of_summed_rewards_counts_their_weights_once():
    chosen = [Reward("one", len, 1.0), Reward("two", len, 3.0)]
    raw = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]], dtype=torch.float64)
    for mode in ("sum", "per_reward"):
        metrics = rollout.combine_advantages(raw, chosen, train.Config(advantage=mode))[2]
        assert metrics["dominance/two"] == pytest.approx(0.75)


@pytest.mark.parametrize("transform, parts", [
    (math.log, ["raised ValueError", "on 0"]), (lambda r: 1 / r, ["ZeroDivisionError", "on 0"]),
    (lambda r: math.inf, ["returned inf for 0"]), (lambda r: None, ["returned None for 0"]),
    (lambda r: "high", ["returned 'high' for 0"])])
def test_a_transform_that_makes_no_number_is_named(transform, parts):
    with pytest.raises(rollout.RewardError, match="the transform of reward 'length'") as raised:
        Reward("length", length, 1.0, transform).transformed(0.0)
    assert all(part in str(raised.value) for part in parts)


# ------------------------------------------------------------------------------------------ fuzz


PIECES = ["<think>", "</think>", "<answer>", "</answer>", "<answer", "```", "```\n", "\n", "\n\n", " ", "\t",
          "\r\n", "# ", "- ", "1. ", "*", "|", ".", "...", "!", "。", "，", "……", "“", "”", "\"", "'", "\\",
          "\x00", "\u2028", "\u202e", "\u200d", "\ufeff", "\ud800", "😀", "👨‍👩‍👧", "e\u0301", "ß", "İ",
          "ﬁ", "Ω", "ж", "ع", "あ", "한", "ก", "\U00020000", "\u4e00", "\u9fff", "的", "潮汐能", "word",
          "the", "tidal", "Word count: 9", "以上就是", "0", "９", "²"]


@pytest.mark.parametrize("seed", range(4))
def test_any_text_whatever_earns_a_number_in_0_to_1_or_is_missing(seed):
    """Fuzz: texts of random pieces, each alone, repeated, mixed, in tags and without. No reward raises."""
    rng = random.Random(seed)
    for _ in range(150):
        few = rng.sample(PIECES, rng.randint(1, 8))
        text = "".join(rng.choices(few, k=rng.choice((0, 1, 5, 40, 300))))
        text = rng.choice((text, f"<think>t</think><answer>{text}</answer>", f"<answer>{text}"))
        prompt = asked(*rng.choice(((), (0, 9), (90, 90))), style=rng.choice(("think", "direct")))
        prompt.query, prompt.id = "".join(rng.choices(PIECES, k=rng.randint(0, 9))), "p"
        completion = said(text)
        completion.finish_reason = rng.choice(("stop", "length"))
        completion.token_ids, completion.max_new_tokens = [1] * rng.randint(1, 9), rng.choice((0, 9))
        for name, reward in RULES.items():
            (value,) = score(reward, [completion], [prompt])
            assert value != value or -(name == "overlong") <= value <= 1, (name, text)


HOSTILE = ["<think>", "<answer>", "</answer>", "<answer></answer>", "<think></think>", " ", "\n", "a", "a ",
           "。", ".", ". ", "(", "```", "#", "1. ", "潮汐", "I hope this essay ", "as an ai ", "a.)", "é "]


def test_time_grows_with_the_length_of_the_text_and_not_with_its_square():
    """Eight times the text takes at most 30 times as long (64 would be quadratic), for texts on which
    patterns and searches for tags like to run away, in a body and bare. Processor time, the best of two."""
    prompt = asked(5, 9)
    prompt.query, prompt.id = "tidal power 潮汐能", "p"

    def seconds(name, text):
        completion, best = said(text), float("inf")
        completion.finish_reason, completion.token_ids, completion.max_new_tokens = "stop", [1], 9
        for _ in range(2):
            start = time.thread_time()
            score(RULES[name], [completion], [prompt])
            best = min(best, time.thread_time() - start)
        return best

    for name in RULES:
        for piece in HOSTILE:
            for form in ("{}", "<think>t</think><answer>{}</answer>"):
                short, long = (seconds(name, form.format(piece * (n // len(piece)))) for n in (3000, 24000))
                assert long < 30 * max(short, 5e-4), (name, piece, form, short, long)
