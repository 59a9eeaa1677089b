"""What in a text was there before? Two shares in [0, 1], by hashes of all its pieces at once, linear in
length but for one sort: `repetition` of long shingles, `repetition_words` of disguised copies."""

import re
import unicodedata

import numpy as np

SHINGLE = 24.0  # characters of Latin text that count as one repeated piece
CJK_WIDTH = 2.4  # a CJK character counts as so many: 10 of them make a shingle
CJK = re.compile("[\u4e00-\u9fff]")
TOKEN = re.compile("[\u4e00-\u9fff]|[^\\W_\u4e00-\u9fff]+")  # a CJK character, or a word of any other script
GRAM, CJK_TOKEN = 3.0, 0.6  # words of an n-gram; a CJK character counts as so many: 5 of them make one
NEAR, SHIFT = 8, 1  # n-grams so many tokens apart come from one place if they are so equally far from it
WINDOW, DENSE = 50, 0.5  # tokens; a copied token has at least this share of copied ones around it


def fold(text: str) -> np.ndarray:
    """Code points of the case-folded text, white space and punctuation removed."""
    text = text.casefold()
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    kept = np.zeros(codes.max(initial=0) + 1, dtype=bool)
    kept[[ord(c) for c in set(text) if unicodedata.category(c)[0] in "LNM"]] = True
    return codes[kept[codes]]


def widths(codes: np.ndarray) -> np.ndarray:
    return np.where((codes >= 0x4E00) & (codes <= 0x9FFF), CJK_WIDTH, 1.0)


def last_seen(codes: np.ndarray, width: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """(end, back): the piece from i is codes[i:end[i]], the shortest of width `least`; it occurred back[i]
    places earlier, the last time, or never (0). Only for those i from which a piece fits.

    Pieces are compared by 64-bit polynomial hashes over mixed codes, from prefix sums (unsigned arithmetic
    wraps).
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
    """Which of n places lie in a piece [i, end[i]) with copied[i]; end never falls."""
    reached = np.zeros(n, dtype=np.int64)
    reached[:len(end)] = np.where(copied, end, 0)
    return np.maximum.accumulate(reached) > np.arange(n)


def repetition(text: str) -> float:
    """The share of the folded text's characters that lie in a shingle which occurred earlier, in [0, 1].

    A text given twice has 0.5 (mixed scripts: to within two characters). A shingle is SHINGLE wide: 24 Latin
    characters, 10 of CJK.
    """
    codes = fold(text)
    end, back = last_seen(codes, widths(codes), SHINGLE)
    return float(covered(len(codes), end, back > 0).mean()) if len(codes) else 0.0


def repetition_words(text: str) -> float:
    """The share of the text's words that stand in a copy of an earlier passage, word by word, in [0, 1].

    For copies in disguise: where synonyms, names or one word in fifteen differ, few long shingles are left,
    but many 3-grams of words (5-grams of CJK characters). An honest text has such n-grams too, the more the
    longer it is; but scattered. They count where two in a row come from one place, and where they cover
    DENSE of a WINDOW around.
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
