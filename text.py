"""Pure functions of strings: structure, word counts, repetition, guards against reward hacking, statistics.

Rewards, benchmarks, reports and rollouts share these functions, so their figures are comparable. Thresholds
and patterns are not specified by the paper.
"""

import re
import unicodedata
from collections import Counter

import numpy as np

CJK = re.compile("[\u4e00-\u9fff]")
LATIN_WORD = re.compile(r"\b[a-zA-Z]+\b")
TAG = re.compile(r"</?(?:think|answer)>")
REQUESTED = (0, *(2**k for k in range(5, 14)))  # words asked for: from where each part of `by_request` goes

# ---------------------------------------------------------------------- structure and words


def structure(text: str, think: bool = True) -> tuple[bool, str | None, str | None]:
    """Returns (ok, think, answer): whether the text has the required structure, its thought and its answer
    body.

    The structure is exactly one <think>...</think>, then exactly one <answer>...</answer>, neither empty,
    with only white space around and between them; with think=False only the answer pair. The bodies of
    malformed texts are returned too: an answer that is never closed ends with the text. A body is None if
    there is none.

    Tags count everywhere, also in code blocks and quotes: the sampler stops at </answer> there too, and an
    exception would be a place to hide a second answer.
    """
    names, parts = TAG.findall(text), TAG.split(text)
    expected = ["<think>", "</think>"] * think + ["<answer>", "</answer>"]
    ok = names == expected and not any(map(str.strip, parts[::2])) and all(map(str.strip, parts[1::2]))
    thought, closed, _ = text.partition("<think>")[2].partition("</think>")
    answer = text.partition("<answer>")[2].partition("</answer>")[0]
    return ok, thought.strip() if closed and thought.strip() else None, answer.strip() or None


def split(text: str, style: str) -> tuple[str, str]:
    """(thinking, answer) of a text; either may be empty. With the chat styles no tags are required: the
    answer is the text after the thinking."""
    _, think, answer = structure(text)
    if style.startswith("chat") and "<answer>" not in text:
        head, closed, rest = text.rpartition("</think>")
        if not closed and "<think>" in text:  # the thinking never ends
            head, rest = text, ""
        think, answer = TAG.sub("", head).strip(), TAG.sub("", rest).strip()
    return think or "", answer or ""


def count_words(text: str) -> int:
    r"""Number of characters in U+4E00..U+9FFF plus matches of \b[a-zA-Z]+\b: the word counter of the
    LongWriter benchmarks, so that scores are comparable.

    Its quirks are kept: "don't" counts 2, digits and accented words count 0, and a Latin word next to a CJK
    character is missed.
    """
    return len(CJK.findall(text)) + len(LATIN_WORD.findall(text))


def length_score(required: float, words: int) -> float:
    """0..100: falling to 0 at four times the required length, and at a third of it (LongBench-Write)."""
    if words <= 0:
        return 0.0
    ratio = words / required
    return 100 * max(0.0, 1 - (ratio - 1) / 3 if ratio > 1 else 1 - (1 / ratio - 1) / 2)


# ---------------------------------------------------------------------- copies

SHINGLE = 24.0  # characters of Latin text that count as one repeated piece
CJK_WIDTH = 2.4  # width of a CJK character: 10 of them make a shingle
TOKEN = re.compile("[\u4e00-\u9fff]|[^\\W_\u4e00-\u9fff]+")  # a CJK character, or a word of any other script
GRAM, CJK_TOKEN = 3.0, 0.6  # words of an n-gram; width of a CJK character: 5 of them make one
NEAR, SHIFT = 8, 1  # n-grams within NEAR tokens share a source if their distances to it differ by <= SHIFT
WINDOW, DENSE = 50, 0.5  # tokens; a copied token has at least this share of copied ones around it


def letters(text: str) -> tuple[np.ndarray, np.ndarray]:
    """(codes, kept): code points of the case-folded text, and which are no white space or punctuation."""
    text = text.casefold()
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    kept = np.zeros(codes.max(initial=0) + 1, dtype=bool)
    kept[[ord(c) for c in set(text) if unicodedata.category(c)[0] in "LNM"]] = True
    return codes, kept[codes]


def fold(text: str) -> np.ndarray:
    """Code points of the case-folded text, white space and punctuation removed."""
    codes, kept = letters(text)
    return codes[kept]


def widths(codes: np.ndarray) -> np.ndarray:
    return np.where((codes >= 0x4E00) & (codes <= 0x9FFF), CJK_WIDTH, 1.0)


def last_seen(codes: np.ndarray, width: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """(end, back): the piece at i is codes[i:end[i]], the shortest of width `least`; its previous occurrence
    is back[i] places earlier (0: none). Both cover only those i at which a piece fits.

    Pieces are compared by 64-bit polynomial hashes of mixed codes, computed from prefix sums (unsigned
    arithmetic wraps).
    """
    n = len(codes)
    reach = np.concatenate(([0.0], np.cumsum(width)))
    end = np.searchsorted(reach, reach[:-1] + least - 1e-6)
    end = end[end <= n]
    at = np.arange(len(end))
    mixed = (codes.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    power = np.cumprod(np.full(n + 1, 0xD1342543DE82EF95, dtype=np.uint64))
    prefix = np.concatenate((np.zeros(1, np.uint64), np.cumsum(mixed * power[:n])))
    hashes = prefix[end] - prefix[:len(end)]
    hashes *= power[n - at]  # aligned to one exponent: equal pieces have equal hashes
    index = np.uint64(2**len(end).bit_length() - 1)
    order = (np.sort(hashes & ~index | at.astype(np.uint64)) & index).astype(np.int64)
    later, earlier = order[1:], order[:-1]  # of equal pieces, in the order of the text
    same = hashes[later] == hashes[earlier]
    back = np.zeros(len(end), dtype=np.int64)
    back[later[same]] = (later - earlier)[same]
    return end, back


def covered(n: int, end: np.ndarray, copied: np.ndarray) -> np.ndarray:
    """Mask of the n places that lie in a piece [i, end[i]) with copied[i]. `end` must not decrease."""
    reached = np.zeros(n, dtype=np.int64)
    reached[:len(end)] = np.where(copied, end, 0)
    return np.maximum.accumulate(reached) > np.arange(n)


def repetition(text: str) -> float:
    """Share of the folded text's characters that lie in a shingle which occurred earlier, in [0, 1].

    A text written twice has 0.5 (with mixed scripts: up to two characters more or less). A shingle has width
    SHINGLE: 24 Latin or 10 CJK characters.
    """
    codes = fold(text)
    end, back = last_seen(codes, widths(codes), SHINGLE)
    return float(covered(len(codes), end, back > 0).mean()) if len(codes) else 0.0


def copies(text: str) -> list[list[int]]:
    """[start, end, twin] of each stretch text[start:end] that `repetition` counts; its earlier occurrence
    begins at `twin`."""
    codes, kept = letters(text)
    place = np.flatnonzero(kept)
    if len(codes) > len(text):  # as of ß
        place = np.repeat(np.arange(len(text)), [len(c.casefold()) for c in text])[place]
    codes = codes[kept]
    end, back = last_seen(codes, widths(codes), SHINGLE)
    edges = np.flatnonzero(np.diff(covered(len(codes), end, back > 0), prepend=False, append=False))
    return [[int(place[a]), int(place[b - 1]) + 1, int(place[a - back[a]])] for a, b in edges.reshape(-1, 2)]


def repetition_words(text: str) -> float:
    """Share of the text's words that lie in a paraphrased copy of an earlier passage, in [0, 1].

    A copy with synonyms, other names or one changed word in fifteen has few long shingles in common with its
    source, but many 3-grams of words (5-grams of CJK characters). Ordinary texts repeat n-grams too, and
    longer texts more, but scattered. So an n-gram counts only if a neighbouring one has the same source, and
    if such n-grams cover a share of DENSE of the WINDOW around.
    """
    tokens = TOKEN.findall(text.casefold())
    ids: dict[str, int] = {}
    codes = np.array([ids.setdefault(token, len(ids)) for token in tokens], dtype=np.uint64)
    width = np.array([CJK_TOKEN if "\u4e00" <= token <= "\u9fff" else 1.0 for token in tokens])
    end, back = last_seen(codes, width, GRAM)
    seen = np.flatnonzero(back)
    together = (np.diff(seen) <= NEAR) & (abs(np.diff(back[seen])) <= SHIFT)
    copied = np.zeros(len(end), dtype=bool)
    copied[seen[1:][together]] = copied[seen[:-1][together]] = True
    inside = covered(len(tokens), end, copied)
    total, at = np.concatenate(([0], np.cumsum(inside))), np.arange(len(tokens))
    first, last = np.maximum(at - WINDOW // 2, 0), np.minimum(at + WINDOW // 2, len(tokens))
    dense = total[last] - total[first] >= DENSE * (last - first)
    return float((inside & dense).mean()) if tokens else 0.0


# ---------------------------------------------------------------------- guards

PASSAGE = 60  # words or CJK characters per window of the stuffing guard; windows overlap by half
STUFFED = (0.15, 0.3)  # share of one query term in a window: from clean to stuffed
LOOP = (60, 300)  # repeated Latin characters (CJK: 25, 125): from clean to broken
HEAD, TAIL = 200, 600  # characters at the start and end that are searched for self-reference
INSTRUCTION = set("about article chapter chapters characters essay from least more poem please report story "
                  "than that their this with word words write writing your".split())
FUNCTION = set("的了是在和与我你他她它们这那有一个篇写请关于字为不以及中要章")
SCRIPTS = (CJK, re.compile("[A-Za-z\u00c0-\u024f]+"),  # CJK characters, Latin words, all other letters
           re.compile("[\u3040-\u30ff]|[^\\W\\d_A-Za-z\u00c0-\u024f\u3040-\u30ff\u4e00-\u9fff]+"))
OTHER_LANGUAGE = re.compile("|".join((
    r"translat|bilingual", r"\b(?:in|into) (?:arabic|chinese|english|french|german|italian|japanese|korean|"
    r"latin|mandarin|portuguese|russian|spanish)\b",
    r"翻译|译[成为]|双语|外语|[英中汉法德日俄韩西][文语]")), re.I)
CODE = re.compile(r"```.*?(?:```|\Z)", re.S)

WORK = (r"(?:essay|story|novel|article|report|poem|piece|text|response|answer|work|draft|narrative|guide|"
        r"letter|speech|script|content)\b")
THIS = rf"\b(?:this|the above|the preceding|my) {WORK}[^.!?\n]{{0,60}}\b"
META = re.compile("|".join((
    THIS + r"(?:masterful|brilliant|beautiful|skil?ful|vivid|perfect|successful|effective|seamless|expert|"
    r"exceptional|outstanding|compelling|comprehensive|engaging|captivating|(?:high|top)[- ]quality)",
    THIS + r"(?:meets?|fulfil+s|satisf(?:ies|y)|adheres? to|compl(?:ies|y) with|exceeds?)\b[^.!?\n]{0,40}\b"
    r"(?:requirements?|request|criteria|prompt|instructions|expectations|word count|length)",
    rf"\bi hope (?:that )?(?:you (?:like|enjoy) )?(?:this|the|my) {WORK}(?! finds)",
    r"\bi hope (?:this|it) (?:meets|helps|is what you)", r"\bas (?:you |per your )request(?:ed)?\b",
    r"\b(?:let me know|feel free to)\b[^.!?\n]{0,60}\b(?:revis|adjust|modif|expand|further|any changes|more "
    r"details?)", r"\b(?:word count|total words)\s*[:：]", r"\((?:approximately |about )?[\d,]+ words\)",
    r"\bas an ai\b", rf"\b(?:here is|here's|below is)\b[^.!?\n]{{0,60}}\b{WORK}[^.!?\n]{{0,60}}"
    r"(?:\byou\b|request|based on|:\s*\n)", rf"\bi(?: ha|')ve (?:\w+ )?(?:crafted|written|composed) (?:this|"
    rf"the|your|a) (?:\w+ )?{WORK}", r"以上(?:就是|便是|即为|是)", r"感谢[您你]?的?阅读",
    r"希望(?:这[篇个份]|本文|以上|上述|我的回答|对[您你])[^。！？\n]{0,20}"
    r"(?:帮助|满足|符合|满意|喜欢|要求|需求|参考)",
    r"(?:如果?|若)[您你]?(?:还|有|需|想)[^。！？\n]{0,20}(?:修改|补充|调整|进一步|更多)",
    r"(?:本文|这篇|全文|此文|这个故事)[^。！？\n]{0,20}(?:文笔|语言|结构|内容|情节|逻辑|层次|主题)[^。\n]{0,3}"
    r"(?:优美|严谨|丰富|生动|精彩|深刻|清晰|分明|完整|鲜明)",
    r"(?:本文|这篇|全文|此文|这个故事)[^。！？\n]{0,20}(?:引人入胜|堪称|(?:符合|满足|达到)[^。\n]{0,8}要求)",
    r"作为(?:一[个名款])?(?:AI|人工智能|语言模型)", r"(?:好的|当然)[，,！!。][^。\n]{0,20}(?:以下|下面)",
    r"(?:以下|下面)(?:是|为)[^。\n]{0,10}(?:为?您|根据|按照)",
    r"(?:全文|总|本文)(?:字数|约|共)[^。\n]{0,6}\d")), re.I)

ENDED = re.compile(r"[.!?。！？…～~][\"'”’」』）)\]】》*_`]*$")
SENTENCE = re.compile(r"[^\W\d][.!?]\s|[。！？]")  # the end of one inside a line
BROKEN_OFF = re.compile(r"(?:[,，、;；:：\-—–（(\[{]|[的和与是在把被从]|\b(?:a|an|the|and|or|but|of|to|in|"
                        r"with|that|which|was|is|as))$", re.I)
CONTINUED = re.compile("|".join((
    r"to be continued", r"continued in (?:the )?(?:next|part)", r"\bdue to (?:length|space)",
    r"\b(?:rest|remainder|remaining)\b[^.\n]{0,40}(?:omitted|left out)", r"待续|篇幅(?:限制|所限|有限)",
    r"(?:以下|此处|其余)[^。\n]{0,6}省略")), re.I)


def falling(value: float, clean: float, worst: float) -> float:
    return float(min(1.0, max(0.0, (worst - value) / (worst - clean))))


def stuffing(answer: str, query: str) -> float | None:
    """1 if no term of the query is overused in any window, falling to 0. Terms are Latin words of at least 4
    letters and pairs of CJK characters."""
    asked = TOKEN.findall(query.casefold())
    terms = {t for t in asked if len(t) >= 4 and t not in INSTRUCTION}
    terms |= {a + b for a, b in zip(asked, asked[1:]) if CJK.match(a) and CJK.match(b)
              and not {a, b} & FUNCTION}
    tokens, worst = TOKEN.findall(answer.casefold()), 0.0
    for i in range(0, max(1, len(tokens) - PASSAGE // 2), PASSAGE // 2):
        passage = tokens[i:i + PASSAGE]
        counts = Counter(t for t in passage if t in terms)
        counts.update({t: 2 * n for t, n in Counter(map("".join, zip(passage, passage[1:]))).items()
                       if t in terms and CJK.match(t)})
        worst = max([worst, *(n / max(len(passage), PASSAGE / 2) for n in counts.values())])
    return falling(worst, *STUFFED)


def praise(answer: str, query: str) -> float | None:
    """0.5 to the number of times that the answer praises or announces itself at its start or end."""
    head, rest = answer[:HEAD], answer[HEAD:]
    return 0.5 ** (len(META.findall(head)) + len(META.findall(rest[-TAIL:])))


def drift(answer: str, query: str) -> float | None:
    """Share of the text in sentences of the query's script (CJK, Latin or other), without code blocks.
    Languages of the same script are not distinguished. None if the query mixes scripts or asks for another
    language."""
    def spoken(text: str) -> list[int]:
        return [len(script.findall(text)) for script in SCRIPTS]

    asked = spoken(query)
    wanted = asked.index(max(asked))
    sentences = map(spoken, re.split(r"[\n。！？!?]|\. ", CODE.sub("", answer)))
    sizes = [(sum(s), s[wanted] == max(s)) for s in sentences if sum(s)]
    if asked[wanted] <= 2 / 3 * sum(asked) or OTHER_LANGUAGE.search(query) or not sizes:
        return None
    return sum(n for n, good in sizes if good) / sum(n for n, _ in sizes)


def ending(answer: str, query: str) -> float | None:
    """1 if the text has an ending: final punctuation, or none if its lines have none (poems, lists), or a
    signature; 0 if it breaks off or announces a continuation."""
    lines = [line for line in map(str.strip, answer.splitlines()) if TOKEN.search(line)]
    if (not lines or answer.count("```") % 2 or lines[-1].startswith("#") or BROKEN_OFF.search(lines[-1])
            or CONTINUED.search(answer[-200:])):
        return 0.0
    words = lines[-1].split()
    signed = len(lines) > 1 and (len(words) <= 6 and all(not w[0].islower() for w in words)
                                 and len(CJK.findall(lines[-1])) <= 8)
    ended = [bool(ENDED.search(line)) for line in lines]
    verse = len(lines) > 1 and sum(ended) < len(lines) / 2 and not SENTENCE.search(lines[-1])
    return float(ended[-1] or signed or verse)


def loops(answer: str, query: str) -> float | None:
    """1 without loops (the same words at least three times in a row, numbers ignored), falling to 0 with the
    length of the longest one, so that a loop counts as much in a long text as in a short one."""
    codes = fold(re.sub(r"\d+", "", answer))
    width = widths(codes)
    end, back = last_seen(codes, width, SHINGLE)
    if len(end) == 0:
        return 1.0
    turns = np.flatnonzero(np.diff(back)) + 1
    first, last = np.concatenate(([0], turns)), np.concatenate((turns, [len(back)])) - 1
    looped = (back[first] > 0) & (end[last] - first >= 2 * back[first])  # one period, and two copies of it
    reach = np.concatenate(([0.0], np.cumsum(width)))
    return falling(np.max(reach[end[last]] - reach[first], where=looped, initial=0.0), *LOOP)


# ---------------------------------------------------------------------- statistics


def statistics(response: str, query: str, style: str, truncated: bool) -> dict[str, float | None]:
    """Statistics of a response; None where it has no answer. distinct_n is the share of distinct n-grams of
    words (Chinese: characters); it decreases with length, so compare it at equal length."""
    think, body = split(response, style)
    tokens = TOKEN.findall(body.casefold())
    found = {"repetition": repetition(body), "repetition_words": repetition_words(body),
             **{f"distinct_{n}": distinct(tokens, n) for n in (1, 2, 3)},
             "answer_words": count_words(body), "think_words": count_words(think),
             "paragraphs": sum(bool(TOKEN.search(line)) for line in body.splitlines()),
             "ending": 0.0 if truncated else ending(body, query)}
    formed = None if style.startswith("chat") else float(structure(response, think=style == "think")[0])
    return {**(found if body else dict.fromkeys(found)), "structure": formed}


def distinct(tokens: list[str], n: int) -> float | None:
    grams = list(zip(*(tokens[i:] for i in range(n))))
    return len(set(grams)) / len(grams) if grams else None
