"""What the guards against reward hacking catch and what they leave alone, as such texts look."""

import random
from types import SimpleNamespace

import pytest

import text as guards
from lib.scoring import Reward, score
from rewards import REWARDS
from tests import attacks

TIDES_EN, TIDES_ZH = "Write an essay about tidal power for a town council.", "写一篇关于潮汐能的文章"
EN = """The council met on a wet Tuesday, and by nine o'clock nobody could say where the money for the barrage
had gone. What remained was a drawing, two invoices and a great deal of water, which rose and fell as it
always had. An engineer from the coast explained that turbines turn both ways. She was believed, mostly
because she brought cake."""
ZH = """议会在一个下雨的星期二开会，到了九点，谁也说不清建坝的钱去了哪里。剩下的只有一张图纸、两张发票
和许多海水，照旧涨落。海边来的工程师解释说，水轮机两个方向都能转。大家信了她，多半是因为她带了点心。"""


@pytest.fixture(scope="module")
def honest():
    return [(TIDES_EN if case.language == "en" else TIDES_ZH, case.text)
            for case in attacks.cases() if case.share == 0]


@pytest.mark.parametrize("check", [guards.stuffing, guards.praise, guards.drift, guards.loops],
                         ids=lambda check: check.__name__)
def test_honest_texts_of_every_form_are_clean(check, honest):
    """Essays, refrains, lists, dialogues, poems and references of tests/attacks.py, and these two."""
    for query, text in honest + [(TIDES_EN, EN), (TIDES_ZH, ZH)]:
        assert check(text, query) >= 0.95, text[-200:]


def test_honest_texts_end(honest):
    for query, text in honest + [(TIDES_EN, EN), (TIDES_ZH, ZH)]:
        assert guards.ending(text, query) == 1, text[-200:]


# ------------------------------------------------------------------------------------------ stuffing


STUFFED = [
    (TIDES_EN, EN[:60] + " Tidal power is tidal power: tidal turbines, tidal lagoons, tidal barrages, tidal "
     "energy for tidal towns, cheap tidal power, best tidal power, tidal power near me, tidal power council, "
     "tidal power essay, buy tidal power, tidal power benefits, tidal power facts, tidal power future."),
    ("Write a blog post on running shoes.", "Running shoes are running shoes for running in running weather. "
     "Best running shoes, cheap running shoes, men's running shoes, women's running shoes, trail running "
     "shoes."),
    (TIDES_ZH, ZH[:20] + "潮汐能就是潮汐能，潮汐能发电靠潮汐，潮汐能优势，潮汐能前景，潮汐能电站，"
     "潮汐能技术，潮汐能项目，潮汐能开发，潮汐能投资，潮汐能最好，发展潮汐能，支持潮汐能，热爱潮汐能。"),
    ("请介绍人工智能", "人工智能改变人工智能，人工智能推动人工智能，人工智能时代的人工智能需要人工智能。")]


@pytest.mark.parametrize("query, text", STUFFED)
def test_a_passage_crowded_by_a_term_of_the_query_is_caught_wherever_it_stands(query, text):
    assert guards.stuffing(text, query) < 0.5
    long = attacks.honest(random.Random(0), "zh" if "，" in text else "en", "essay", 300).text
    assert guards.stuffing(long + "\n" + text * 2 + "\n" + long, query) < 0.5
    assert guards.stuffing(text, "Describe a violin." if "，" not in text else "描写二胡") == 1.0


@pytest.mark.parametrize("query, text", [
    (TIDES_EN, "Tidal power needs patience. The moon sets the hours, the seabed sets the price, and a "
     "council that wants tidal power must first ask its fishermen. Two towns tried: one sold its "
     "turbines, the other still has light at low water, and calls the tidal lagoon its own."),
    (TIDES_ZH, "潮汐能要靠耐心。月亮定时辰，海床定价钱，想要潮汐能的小镇，得先问问渔民。有两座镇子试过："
     "一座卖了水轮机，另一座退潮时仍有灯火，把那片泻湖叫作自己的。"),
    ("Write a dialogue between Anna and Ben.", "Anna: You came late.\nBen: The ferry was late; I only sat on "
     "it.\nAnna: And the parcel?\nBen: Still dry. Your sister packed it with more string than sense.\n")])
def test_a_text_that_keeps_to_its_topic_is_not_stuffed(query, text):
    assert guards.stuffing(text, query) == 1.0


# ------------------------------------------------------------------------------------------ praise


@pytest.mark.parametrize("text", [
    EN + "\n\nThis essay masterfully weaves together engineering and irony.",
    EN + "\n\nThe above report fully satisfies all of the stated requirements.",
    EN + "\n\nI hope this essay meets your expectations!", EN + "\n\nI hope you enjoy this story.",
    EN + "\n\nLet me know if you would like any changes, or a further section.",
    EN + "\n\nFeel free to ask me to expand any of the chapters.", EN + "\n\nWord count: 1,204",
    EN + "\n\n(approximately 1,200 words)", "Sure! Here is the essay you requested:\n\n" + EN,
    "Here's a comprehensive report based on your notes:\n" + EN, "As an AI, I cannot vote. " + EN,
    EN + "\n\nI have carefully crafted this compelling narrative.", EN + " As per your request, it is long.",
    ZH + "\n\n以上就是关于潮汐能的文章。", ZH + "\n\n希望这篇文章能够满足您的要求！",
    ZH + "\n\n希望对您有所帮助。", ZH + "\n\n如需进一步修改，请告诉我。",
    ZH + "\n\n本文结构严谨，语言优美，引人入胜。", "好的，以下是为您撰写的文章：\n" + ZH,
    "作为一个AI语言模型，我没有去过海边。" + ZH, ZH + "\n（全文共1200字）", ZH + "\n感谢您的阅读！"])
def test_an_answer_that_praises_or_announces_itself_is_caught(text):
    assert guards.praise(text, "") <= 0.5


@pytest.mark.parametrize("text", [
    "Dear Ines, I hope this letter finds you well. Let me know when the ferry runs again. Yours, Ben",
    "Here is the story of how my grandfather lost a boat and found a cousin. It begins with rain.",
    "This report covers the years 1901 to 1914. The harbour master kept the ledger.",
    EN + " She had written this story once before, and burnt it.",
    EN + " \"I hope you like herring,\" said the widow.", ZH + "以上三点，缺一不可。",
    EN + " Her letter was short, and not beautiful.", "本文讨论潮汐电站的造价。" + ZH,
    ZH + "她希望母亲能够满意，可是信没有寄到。",
    EN + " I have written to the council twice." + EN])
def test_letters_reports_and_stories_may_speak_as_they_do(text):
    assert guards.praise(text, "") == 1.0


def test_every_further_phrase_halves_the_value_and_only_head_and_tail_are_searched():
    said = "This essay masterfully explores the sea. I hope this essay helps."
    assert guards.praise(EN + "\n" + said, "") == 0.25
    assert guards.praise(EN * 3 + said + EN * 3, "") == 1.0


# ------------------------------------------------------------------------------------------ language


@pytest.mark.parametrize("query, text, share", [
    (TIDES_EN, EN, 1.0), (TIDES_ZH, ZH, 1.0), (TIDES_EN, ZH, 0.0), (TIDES_ZH, EN, 0.0),
    (TIDES_ZH, "本站采用 Siemens SWT-3.6 型 turbine，由 ABB 供应 inverter。", 1.0),
    (TIDES_EN, "Her name, 林黛玉, means dark jade. The word перестройка means rebuilding.", 1.0),
    (TIDES_ZH, ZH + "\n```python\nfor tide in tides: turbine.turn(tide)\n```\n", 1.0),
    (TIDES_EN, "one two three four. 一二三四。", 0.5), (TIDES_ZH, "一二三四。\none two three", 4 / 7),
    ("Напишите рассказ о море.", "Море было тихим. Никто не пел.", 1.0), ("Напишите рассказ.", EN, 0.0),
    (TIDES_ZH, "これはとてもながいにほんごのぶんしょうです", 0.0)])
def test_language_is_the_share_of_text_in_sentences_of_the_querys_script(query, text, share):
    assert guards.drift(text, query) == pytest.approx(share)


@pytest.mark.parametrize("query, text", [
    ("Translate this letter into Chinese.", ZH), ("请用英文写一篇关于海的散文", EN), ("12345", EN), ("", EN),
    ("Compare 孔子 与 老子 on tides", EN), (TIDES_EN, "2024: 17 % 😀"), ("把下面这段话译成法语", EN)])
def test_language_is_missing_where_nobody_can_tell_what_was_asked(query, text):
    assert guards.drift(text, query) is None


# ------------------------------------------------------------------------------------------ ending


@pytest.mark.parametrize("text", [
    "It was over.", "\"Is it?\" she asked.", "\"It is!\"", "他走了。", "“走吧。”", "他走了……", "结束了！**",
    "(It was over.)", "Yours sincerely,\nAnna Bell", "He slept.\n\nTHE END", "他睡了。\n（全文完）",
    "他睡了。\n2024年5月1日", "Roses\nare red\nviolets\nare not",
    "床前明月光\n疑是地上霜\n举头望明月\n低头思故乡",
    "- salt\n- rope\n- two lamps", "He slept.\n\n---\n",
    "So it ends.\n```sh\nmake\n```", "The table.\n| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |"])
def test_texts_that_end(text):
    assert guards.ending(text, "") == 1.0


@pytest.mark.parametrize("text", [
    "The first chapter closed. The second one opened with a bell and the", "He slept. Then he woke, and then",
    "It was late. She took the lamp, and", "One thing remained:", "他走了。天色渐暗，", "他走了。天色渐暗的",
    "他走了。后来他又回到了那座桥上看见了很多", "He slept.\n(to be continued)", "他睡了。（未完待续）",
    "Due to length constraints the last chapters are brief.", "由于篇幅限制，其余章节不再展开。",
    "He slept.\n\n## Chapter 5", "He slept.\n```python\nx = 1", "...", "", "1. salt,"])
def test_texts_that_break_off(text):
    assert guards.ending(text, "") == 0.0


# ------------------------------------------------------------------------------------------ loops


@pytest.mark.parametrize("text", [
    EN + " and then she said that he was right" * 12 + EN, EN + " the" * 120 + EN, "word " * 100,
    "The sea was calm and the boat was slow. " * 9, "哈" * 200, "ab" * 200,
    EN * 4, "\n".join(f"Day {i}: we sailed on, and nothing happened that day." for i in range(20)),
    ZH + "海水涨了又落，落了又涨。" * 12 + ZH, ZH + "他继续往前走。" * 25])
def test_a_loop_is_caught_wherever_it_stands(text):
    assert guards.loops(text, "") < 0.35
    long = attacks.honest(random.Random(0), "en", "essay", 300).text
    assert guards.loops(long + text + long, "") < 0.35, "a loop counts as much in a long text"


@pytest.mark.parametrize("text", [
    "", "a", "Row, row, row your boat, gently down the stream.", "“哈哈哈哈哈哈！”他笑道。", EN + EN,
    ZH + ZH, "No, no, no, no, no!", "1. salt\n2. rope\n3. lamps\n4. bread\n5. nails\n6. flour\n7. tar",
    "| 1 | 2 | 3 |\n" * 30])
def test_refrains_laughter_lists_and_a_text_given_twice_are_no_loops(text):
    assert guards.loops(text, "") == 1.0


def test_a_longer_loop_is_worse():
    values = [guards.loops(EN + " and the sea went out again" * n + EN, "") for n in range(1, 20)]
    assert values == sorted(values, reverse=True) and values[0] == 1 and values[-1] == 0


# ------------------------------------------------------------------------------------------ as rewards


GUARDS = ("no_stuffing", "no_praise", "no_drift", "no_loops", "ending")


def completion(text, finish_reason="stop"):
    return SimpleNamespace(text=text, finish_reason=finish_reason)


def judged(name: str, c, prompt) -> list[float]:
    return score(Reward(name, *REWARDS[name]), [c], [prompt])


@pytest.mark.parametrize("name", GUARDS)
def test_guards_judge_the_answer_body_and_weigh_nothing_by_default(name):
    prompt = SimpleNamespace(id="p", query=TIDES_EN, style="think")
    thought = "<think>" + STUFFED[0][1] + "的的的" + "loop " * 300 + "</think>"
    assert REWARDS[name][1] == 0
    assert judged(name, completion(f"{thought}<answer>{EN}</answer>"), prompt) == [1.0]
    for silent in ("", thought, thought + "<answer> </answer>"):
        assert judged(name, completion(silent), prompt) == [0.0], "silence must not be clean"


def test_a_sample_that_was_cut_or_never_closed_has_not_ended():
    prompt = SimpleNamespace(id="p", query="", style="think")
    assert judged("ending", completion(f"<answer>{EN}</answer>"), prompt) == [1.0]
    assert judged("ending", completion(f"<answer>{EN}</answer>", "length"), prompt) == [0.0]
    assert judged("ending", completion(f"<answer>{EN}"), prompt) == [0.0]
