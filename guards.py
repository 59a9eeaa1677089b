"""Is an answer written for a reader, or for a reward? Guards against known ways to earn without writing well.

Each takes an answer and its query and returns 1 for a clean text, less the worse it is, 0 at worst, or None
where it cannot be told. They read the surface: a guard that is trained against will be evaded in time, so
look at the texts too. All thresholds and patterns are not specified by the paper.
"""

import re
from collections import Counter

import numpy as np

from repeats import CJK, SHINGLE, TOKEN, fold, last_seen, widths

PASSAGE = 60  # words or CJK characters that are judged at a time for stuffing; the next begins half way
STUFFED = (0.15, 0.3)  # share of a passage that one term of the query takes: from clean to stuffed
LOOP = (60, 300)  # Latin characters that a loop adds (CJK: 25, 125): from clean to broken
HEAD, TAIL = 200, 600  # characters at the answer's beginning and end in which it talks of itself
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
    """Does one term of the query crowd a passage? Terms are Latin words of 4 letters or more, and pairs of
    CJK characters."""
    asked = TOKEN.findall(query.casefold())
    terms = {t for t in asked if len(t) >= 4 and t not in INSTRUCTION}
    terms |= {a + b for a, b in zip(asked, asked[1:]) if CJK.match(a) and CJK.match(b)
              and not {a, b} & FUNCTION}
    tokens, worst = TOKEN.findall(answer.casefold()), 0.0
    for i in range(0, max(1, len(tokens) - PASSAGE // 2), PASSAGE // 2):
        passage = tokens[i:i + PASSAGE]
        taken = Counter(t for t in passage if t in terms)
        taken.update({t: 2 * n for t, n in Counter(map("".join, zip(passage, passage[1:]))).items()
                      if t in terms and CJK.match(t)})
        worst = max([worst, *(n / max(len(passage), PASSAGE / 2) for n in taken.values())])
    return falling(worst, *STUFFED)


def praise(answer: str, query: str) -> float | None:
    """Does it praise or announce itself, at its beginning or end? Each time halves the value."""
    head, rest = answer[:HEAD], answer[HEAD:]
    return 0.5 ** (len(META.findall(head)) + len(META.findall(rest[-TAIL:])))


def language(answer: str, query: str) -> float | None:
    """The share of its text in sentences of the query's script, code left out: CJK, Latin or other. Languages
    of one script are not told apart. None where the query mixes scripts or asks for another language."""
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
    """1 if it comes to an end: in punctuation, or without any where its lines have none (poems, lists), or
    in a signature; 0 if it breaks off or promises to go on."""
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
    """Does it get stuck: the same words three times in a row or more, numbers aside? Judged by the longest
    such place, so that a loop counts as much in a long text as in a short one."""
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
