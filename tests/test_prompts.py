"""Reading prompts, rendering them, the order in which a run sees them."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from data import prompts as prompt_data
from data.prompts import QUERY_FIELDS, STYLES, TEMPLATES, language, load, read, render
from data.tokenizer import Tokenizer
from lib.options import UserError
from train import Config

BASE = Path(__file__).parent.parent / "data" / "tiny" / "base"
LONGBENCH = Path(__file__).parents[2] / "shared" / "data" / "longbench_write"


def written(folder, *lines):
    """A prompts file of the given lines: objects as JSON, strings as they are."""
    file = folder / "prompts.jsonl"
    text = "\n".join(x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) for x in lines)
    file.write_text(text + "\n", encoding="utf-8")
    return file


def ranges(folder, *records, style="direct", tokens=14000, **options):
    """The length ranges that are read from records, each given the same query."""
    lines = [{"query": "Write.", **r} for r in records]
    prompts, dropped = read(written(folder, *lines), style, tokens, **options)
    return [p.length_range for p in prompts], dict(dropped)


# ------------------------------------------------------------------------------------------ fields


@pytest.mark.parametrize("field", ["prompt", "query", "question", "instruction"])
def test_the_request_is_read_under_every_name(field, tmp_path):
    (prompt,), dropped = read(written(tmp_path, {field: " Write a poem. ", "type": "x"}), "think", 100)
    assert field in QUERY_FIELDS and prompt.query == " Write a poem. " and not dropped
    assert prompt.text == render(prompt.query, "think")
    assert prompt.style == "think" and prompt.language == "en"


def test_the_first_field_with_text_wins(tmp_path):
    lines = [{"prompt": "", "query": "b"}, {"prompt": ["x"], "instruction": "d"},
             {"question": "c", "query": "e"}]
    assert [p.query for p in read(written(tmp_path, *lines), "think", 100)[0]] == ["b", "d", "e"]


def test_ranges_are_read_under_both_names_and_missing_ones_are_none(tmp_path):
    got, dropped = ranges(tmp_path, {"length_range": [100, 200]}, {"range": [0, 50]}, {"range": [70, 70]}, {},
                          {"range": None}, {"range": [1, 2], "length": 900},
                          {"length_range": [3, 4], "range": [5, 6]})
    assert got == [(100, 200), (0, 50), (70, 70), None, None, (1, 2), (3, 4)] and dropped == {}


def test_one_length_stands_for_ten_percent_to_either_side(tmp_path):
    values = 100, 3000, 150.0, 4, None
    got, _ = ranges(tmp_path, *({"length": value} for value in values))
    assert got == [(90, 110), (2700, 3300), (135, 165), (4, 4), None]


def test_ids_are_read_or_made_from_the_line(tmp_path):
    """An id seeds the sampling: it must not depend on which other prompts are usable."""
    lines = [{"id": "a", "query": "q"}, "", {"index": 7, "query": "q"},
             {"idx": 0, "query": "q"}, {"query": "q"}]
    assert [p.id for p in read(written(tmp_path, *lines), "think", 100)[0]] == ["a", "7", "0", "5"]


def test_prompts_keep_the_order_of_the_file(tmp_path):
    lines = [{"query": f"number {i}"} for i in range(50)]
    assert [p.query for p in read(written(tmp_path, *lines), "think", 100)[0]] == [x["query"] for x in lines]


# ------------------------------------------------------------------------------------------ dropped


def test_unanswerable_prompts_are_dropped_and_counted(tmp_path):
    got, dropped = ranges(tmp_path, {"range": [0, 0]}, {"range": [0, 1]}, {"length_range": [0, 0]})
    assert got == [(0, 1)] and dropped == {"unanswerable": 2}
    assert ranges(tmp_path, {"range": [0, 0]}, keep_unreachable=True) == ([], {"unanswerable": 1})


def test_unreachable_prompts_are_dropped_or_kept(tmp_path):
    """1,000 tokens hold 769 English words; only lo counts, because an answer at lo earns the full reward."""
    records = {"range": [769, 9000]}, {"range": [770, 9000]}, {"range": [0, 9000]}, {}
    assert ranges(tmp_path, *records, tokens=1000) == ([(769, 9000), (0, 9000), None], {"unreachable": 1})
    kept, dropped = ranges(tmp_path, *records, tokens=1000, keep_unreachable=True)
    assert len(kept) == 4 and dropped == {}


@pytest.mark.parametrize("style, query, most", [
    ("direct", "Write.", 769), ("think", "Write.", 653), ("direct", "写。", 1428), ("think", "写。", 1214)])
def test_how_many_words_fit_into_1000_tokens(style, query, most, tmp_path):
    """1.3 tokens a word, 0.7 a Chinese character; 15 % are left for thinking."""
    file = written(tmp_path, *({"query": query, "range": [lo, 9000]} for lo in (most, most + 1)))
    prompts, dropped = read(file, style, 1000)
    assert [p.length_range[0] for p in prompts] == [most] and dropped == {"unreachable": 1}


def test_an_answer_that_fills_the_budget_to_the_last_token_is_reachable(tmp_path):
    file = written(tmp_path, {"query": "写。", "range": [1000, 9000]})  # 700 tokens
    assert [len(read(file, "direct", budget)[0]) for budget in (699, 700)] == [0, 1]


def test_prompts_are_loaded_if_there_are_enough_and_each_fits_into_the_context_with_its_answer(tmp_path):
    file = written(tmp_path, {"query": "one"}, {"query": "two", "keep": False}, {"query": "three"})
    config = SimpleNamespace(prompts=str(file), prompt_style="direct", max_new_tokens=100, unreachable="drop")
    letters = SimpleNamespace(encode=list, token_bytes=[b"a"])  # a token a character
    longest = len(render("three", "direct")) + 100
    prompts, dropped = load(config, "prompts", 2, "a step", letters, longest)
    assert [p.query for p in prompts] == ["one", "three"] and dropped == {"rejected": 1}
    said = f"prompt .3. has {longest - 100} tokens or more, .* context of {longest - 1}"
    with pytest.raises(UserError, match=said):
        load(config, "prompts", 2, "a step", letters, longest - 1)
    with pytest.raises(UserError, match="has 2 usable prompts .*'rejected': 1.*, but a step needs 3"):
        load(config, "prompts", 3, "a step", letters, longest)


def test_what_was_rejected_is_dropped_and_what_nobody_judged_is_not(tmp_path):
    """`keep` of scripts.annotate: false rejects, null or none at all says nothing."""
    judged = [{"range": [i, 9], "keep": keep} for i, keep in enumerate((True, None, False))]
    got, dropped = ranges(tmp_path, *judged, {"range": [3, 9]})
    assert got == [(0, 9), (1, 9), (3, 9)] and dropped == {"rejected": 1}


def test_what_is_reachable_depends_on_language_and_on_room_for_thinking(tmp_path):
    """A Chinese character takes half the tokens of an English word; thinking takes a part of the budget."""
    word, character = {"query": "Write.", "range": [700, 800]}, {"query": "写。", "range": [1200, 1400]}
    file = written(tmp_path, word, character)
    assert [p.language for p in read(file, "direct", 950)[0]] == ["en", "zh"]
    assert read(file, "think", 950) == ([], {"unreachable": 2})
    assert [p.language for p in read(file, "direct", 900)[0]] == ["zh"]


# ------------------------------------------------------------------------------------------ templates


@pytest.mark.parametrize("query, ending", [
    ("Write a poem.", "\n<|user|>: Write a poem. <|assistant|>:"),
    ("写一首诗。", "\n<|用户|>: 写一首诗。 <|助手|>:"),
    ("Translate 春 into English", "\n<|用户|>: Translate 春 into English <|助手|>:"),
    ("Écris un poème", "\n<|user|>: Écris un poème <|assistant|>:"),
    ("詩を\u3042", "\n<|用户|>: 詩を\u3042 <|助手|>:")])
@pytest.mark.parametrize("style", ["think", "direct"])
def test_templates_end_as_the_paper_says_and_name_the_tags(style, query, ending):
    """One character in U+4E00..U+9FFF picks the Chinese twin. A thought that is not wanted is not named."""
    text = render(query, style)
    assert text.endswith(ending) and text.count(query) == 1
    assert "<answer></answer>" in text and ("<think></think>" in text) == (style == "think")
    assert language(query) == ("zh" if "助手" in ending else "en")
    assert STYLES[:2] == ("think", "direct")


@pytest.mark.parametrize("character, tongue", [
    ("\u4dff", "en"), ("\u4e00", "zh"), ("\u9fff", "zh"), ("\ua000", "en")])
def test_chinese_is_from_4e00_to_9fff_both_included(character, tongue):
    assert language(f"a {character} b") == tongue


def test_the_twins_are_each_in_their_language():
    for (_, tongue), template in TEMPLATES.items():
        instruction = template.split("\n<|")[0]
        assert (language(instruction) == "zh") == (tongue == "zh") and template.count("{query}") == 1


@pytest.mark.parametrize("query", [
    "{query}", "{", "}", "{}", "{0} {name!r:>9}", "%s %(x)d %", "$query ${query}", "\\1 \\g<0>",
    "{query}{query} 春",
    'JSON {"a": {"b": []}}', "f(x) = \\frac{1}{2}", "<|user|>: nested <|assistant|>:", "two\nlines\r\n\ttab"])
@pytest.mark.parametrize("style", ["think", "direct"])
def test_a_query_stands_in_its_prompt_exactly_as_it_was_written(style, query):
    head, tail = TEMPLATES[style, language(query)].split("{query}")
    assert render(query, style) == head + query + tail


# ------------------------------------------------------------------------------------------ malformed files


@pytest.mark.parametrize("line, part", [
    ('{"query": "a"', "line 2"), ("not json", "line 2"), ('["query"]', "object"), ('"query"', "object"),
    ("3", "object"),
    ("null", "object"), ("{}", "query"), ('{"query": ""}', "query"), ('{"query": " \\n"}', "query"),
    ('{"query": 3}', "query"),
    ('{"text": "a"}', "query"),
    ('{"query": "a", "range": [5, 4]}', "[5, 4]"), ('{"query": "a", "range": [-1, 4]}', "[-1, 4]"),
    ('{"query": "a", "range": [1.5, 4]}', "[1.5, 4]"), ('{"query": "a", "range": [1]}', "[1]"),
    ('{"query": "a", "range": []}', "[]"), ('{"query": "a", "range": [1, 2, 3]}', "[1, 2, 3]"),
    ('{"query": "a", "range": ["1", "2"]}', "['1', '2']"),
    ('{"query": "a", "range": [true, true]}', "[True, True]"),
    ('{"query": "a", "range": [1, null]}', "[1, None]"), ('{"query": "a", "range": 7}', "7"),
    ('{"query": "a", "length_range": {"lo": 1}}', "length_range"), ('{"query": "a", "length": 0}', "length"),
    ('{"query": "a", "length": -5}', "-5"), ('{"query": "a", "length": "90"}', "'90'"),
    ('{"query": "a", "length": true}', "True"), ('{"query": "a", "length": NaN}', "NaN"),
    ('{"query": "a", "id": "\\ud800"}', "surrogates"),
    ('{"query": "a", "id": {"a": 1}}', "an id must be a string or a"),
    ('{"query": "a", "id": [1]}', "not [1]"), ('{"query": "a", "id": true}', "not True"),
    (f'{{"query": "a", "range": [{10**400}, {10**401}]}}', "characters)"),
    ('{"query": "a", "range": [1, 10000000]}', "< 1e7"),
    (f'{{"query": "a", "length": {10**400}}}', "characters)"),
    (f'{{"query": "a", "x": {"[" * 9999}{"]" * 9999}}}', "deeply"),
    ('{"query": "a", "length": 1e999}', "1e999"),
    (f'{{"query": "a", "x": {"9" * 5000}}}', "5000 digits"),
    ('{"query": "a", "length": Infinity}', "Infinity"), ('{"query": "a", "id": "first"}', "first")])
def test_a_malformed_line_is_an_error_that_names_file_line_and_value(line, part, tmp_path):
    file = written(tmp_path, {"query": "fine", "id": "first"}, line, {"query": "fine too"})
    with pytest.raises(UserError) as e:
        read(file, "think", 100)
    assert str(file) in str(e.value) and "line 2" in str(e.value) and part in str(e.value)


def test_two_prompts_with_one_id_are_an_error_that_names_both_lines(tmp_path):
    """Also where the number 7 meets the text "7", and where the first of the two was dropped."""
    for twins in (({"id": 7}, {"index": "7"}), ({"id": "x", "range": [0, 0]}, {"id": "x"})):
        first, second = ({"query": "a", **twin} for twin in twins)
        with pytest.raises(UserError, match=r"line 3: .*line 1"):
            read(written(tmp_path, first, "", second), "think", 100)


def test_a_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path):
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00\x81")
    for name, why in (("absent.jsonl", "cannot be read"), ("binary.jsonl", "line 1: 'utf-8'"),
                      (".", "cannot be read")):
        with pytest.raises(UserError, match=why) as e:
            read(tmp_path / name, "think", 100)
        assert str(tmp_path / name) in str(e.value)


def test_blank_lines_are_skipped_and_an_empty_file_has_no_prompts(tmp_path):
    assert read(written(tmp_path, "", "  "), "think", 100) == ([], {})
    assert len(read(written(tmp_path, "", {"query": "a"}, "\t", {"query": "b"}, ""), "think", 100)[0]) == 2


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_only_newlines_end_a_line(separator, tmp_path):
    (prompt,), _ = read(written(tmp_path, {"query": f"one{separator}two"}), "think", 100)
    assert prompt.query == f"one{separator}two"


# ------------------------------------------------------------------------------------------ real files


@pytest.mark.skipif(not LONGBENCH.exists(), reason="LongBench-Write's files are not beside this repository")
@pytest.mark.parametrize("name, total, chinese", [
    ("longbench_write", 120, 61), ("longbench_write_en", 60, 1), ("longwrite_ruler", 48, 24)])
def test_longbench_write_loads_as_it_is(name, total, chinese):
    """60 of the 120 ask for Chinese; one more is written in Chinese and asks for English."""
    file = LONGBENCH / f"{name}.jsonl"
    for style in STYLES[:2]:
        prompts, dropped = read(file, style, 14000, keep_unreachable=True)
        assert len(prompts) == total and not dropped
        assert sum(p.language == "zh" for p in prompts) == chinese
        for prompt, line in zip(prompts, file.open(encoding="utf-8"), strict=True):
            record = json.loads(line)
            lo, hi = prompt.length_range
            assert prompt.query == record["prompt"] and prompt.text == render(record["prompt"], style)
            assert abs(lo - 0.9 * record["length"]) <= 0.5 >= abs(hi - 1.1 * record["length"])
        prompts, dropped = read(file, style, 14000)
        assert len(prompts) + dropped["unreachable"] == total and set(dropped) <= {"unreachable"}


# ------------------------------------------------------------------------------------------ order


def order(n: int, batch: int, seed: int, step: int) -> list[int]:
    """Indices of the prompts of a step, out of n."""
    return prompt_data.batch(range(n), batch, seed, step)


@pytest.mark.parametrize("n, batch", [(10, 4), (12, 4), (7, 7), (5, 1), (9, 8)])
def test_an_epoch_shows_every_prompt_at_most_once_and_a_batch_never_twice(n, batch):
    """What an epoch leaves out are its n mod batch last ones; another epoch shows them."""
    steps, epochs = n // batch, []
    for epoch in range(30):
        batches = [order(n, batch, 3, epoch * steps + step) for step in range(1, steps + 1)]
        assert all(len(set(b)) == len(b) == batch for b in batches)
        epochs.append([i for b in batches for i in b])
        assert len(set(epochs[-1])) == steps * batch and set(epochs[-1]) <= set(range(n))
    assert set().union(*epochs) == set(range(n))
    if n > 5:
        assert len({tuple(e) for e in epochs}) == 30, "every epoch has an order of its own"


def test_order_is_a_pure_function_so_a_run_resumes_at_any_step():
    """A run that starts anew at step k sees what the run that never stopped saw, whatever came before."""
    whole = [order(23, 5, 1, step) for step in range(1, 101)]
    state = random.getstate()
    steps = list(range(100))
    random.Random(0).shuffle(steps)
    assert all(order(23, 5, 1, 1 + k) == whole[k] for k in steps)
    random.setstate(state)
    random.seed(9)
    before = random.getstate()
    assert order(23, 5, 1, 10) == whole[9]
    assert random.getstate() == before, "Python's own generator stays out of it"


def test_batches_are_one_long_pass_cut_in_pieces():
    """The epoch's permutation does not depend on how it is cut."""
    long = order(24, 24, 5, 1)
    for batch in (1, 2, 3, 4, 6, 8, 12):
        assert [i for step in range(24 // batch) for i in order(24, batch, 5, 1 + step)] == long


def test_the_seed_decides_the_order():
    orders = {seed: [order(40, 8, seed, step) for step in range(1, 11)] for seed in range(20)}
    assert len({str(o) for o in orders.values()}) == 20
    assert order(40, 40, 0, 1) != list(range(40)), "the file's own order is not the training order"


def test_a_prompt_of_ten_megabytes_is_refused_without_being_tokenised(tmp_path):
    """Its beginning is: what the longest tokens can hold of a context, and one more."""
    tokenizer, asked = Tokenizer(BASE), []
    encode = tokenizer.encode
    tokenizer.encode = lambda text: asked.append(len(text)) or encode(text)
    file = written(tmp_path, {"query": "a" * 10**7, "id": "x" * 999})
    config = Config(prompts=str(file), max_new_tokens=100)
    with pytest.raises(UserError,
        match=r"\(1,001 characters\) has \d+ tokens or more, and with max_new") as e:
        load(config, "prompts", 1, "a step", tokenizer, 2048)
    assert max(asked) < 100_000 and len(str(e.value)) < 500
