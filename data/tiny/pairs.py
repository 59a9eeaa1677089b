"""Preferences of the embedded default: a good text, and an equally long one that is spoiled.

    python -m data.tiny.pairs
    torchrun --nproc_per_node=2 -m scripts.train_rm --out data/tiny/writing    # 10 minutes on 2 cores

Both sides answer the same request with equally many words (within 2 %), so that length does not tell them
apart. The good one is written as in make.py. The other is that text with its sentences shuffled, with some of
them replaced by copies of others or by empty phrases, or with other names in parts of it; or it is a longer
text cut within a sentence. `kind` names the difference. Held-out pairs have names and fillers that no
training pair has.
"""

import random
import re
import sys
from pathlib import Path

from data.tiny.make import LENGTHS, PERSON_ENDS, PLACE_ENDS, Config, name, request, write
from lib import options
from lib.files import write_jsonl
from text import count_words

FILLERS = [
    "And so it goes on and on.", "There is much more to say about this.", "It was what it was, as always.",
    "One could say that, or one could say nothing.", "As I said before, this is so.", "This is a sentence.",
    "Many things are like that, and many are not.", "And then, and then, and then.", "Well, that is that.",
    "More could be written here.", "It is very, very, very true.", "Things happen, as things do.",
    "That is important, and it is also interesting.", "All in all, it is a matter of many matters.",
    "Let us think about it once again.", "In other words, it can be put in other words.",
]
HELD_OUT_FILLERS = [
    "So much for that, and so much for this.", "Some say yes, some say no.", "What else is there to say?",
    "It is as it is, and that is how it is.", "This point deserves many words.",
    "Again, it is worth a thought.", "To be sure, one can see it in many ways.",
    "It goes without saying that this goes without saying.",
]


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.?]) ", text)


def shuffled(rng: random.Random, slots: dict, text: str, held_out: bool) -> str:
    """The sentences in another order, in which the opening or the closing or both have moved."""
    parts = sentences(text)
    order = list(range(len(parts)))
    while order[0] == 0 and order[-1] == len(parts) - 1:
        rng.shuffle(order)
    return " ".join(parts[i] for i in order)


def repeated(rng: random.Random, slots: dict, text: str, held_out: bool) -> str:
    """Up to half of the sentences replaced by copies of earlier ones."""
    parts = sentences(text)
    for _ in range(rng.randint(1, max(1, len(parts) // 2))):
        i, j = sorted(rng.sample(range(max(2, len(parts) - 1)), 2))
        parts[j] = parts[i]
    return " ".join(parts)


def truncated(rng: random.Random, slots: dict, text: str, held_out: bool) -> str:
    """The start of a longer text, as many words or a few fewer, cut within a sentence."""
    words = count_words(text)
    parts = write(rng, slots, words + rng.randint(10, 50)).split()[:words]
    while parts[-1][-1] in ".?":
        parts.pop()
    return " ".join(parts)


def contradicting(rng: random.Random, slots: dict, text: str, held_out: bool) -> str:
    """One to three of the names replaced by others in a part of the text. In half of the training texts all
    three are replaced throughout: without these, a model of this size does not learn to compare names."""
    parts, plain = sentences(text), not held_out and rng.random() < 0.5
    spoiled = list(parts)
    while spoiled == parts:
        for key in "ABP" if plain else rng.sample("ABP", rng.randint(1, 3)):
            other = name(rng, PLACE_ENDS if key == "P" else PERSON_ENDS, held_out)
            places = [i for i, part in enumerate(parts) if slots[key] in part]
            least = len(places) if plain else (len(places) + 1) // 2
            for i in rng.sample(places, rng.randint(least, len(places))):
                spoiled[i] = spoiled[i].replace(slots[key], other)
    return " ".join(spoiled)


def padded(rng: random.Random, slots: dict, text: str, held_out: bool) -> str:
    """Up to half of the sentences replaced by fillers, which say nothing."""
    parts, fillers = sentences(text), HELD_OUT_FILLERS if held_out else FILLERS
    for filler in rng.sample(fillers, rng.randint(1, max(1, len(parts) // 2))):
        parts[rng.randint(1, len(parts) - 1)] = filler
    return " ".join(parts)


KINDS = {f.__name__: f for f in (shuffled, repeated, truncated, contradicting, padded)}
TRAINING = [*KINDS, *["repeated", "contradicting"] * 2]  # kinds that are hard to learn come more often


def pair(rng: random.Random, kind: str, held_out: bool = False) -> dict:
    """A record of preference data. 70 % of the texts have the requested length, as in the base's data."""
    slots = request(rng, held_out)
    asked = rng.random() < 0.7
    words = round(slots["n"] * rng.uniform(0.9, 1.1)) if asked else rng.randint(LENGTHS[0], 110)
    while True:
        chosen = write(rng, slots, words)
        rejected = KINDS[kind](rng, slots, chosen, held_out)
        sizes = count_words(chosen), count_words(rejected)
        if rejected != chosen and abs(sizes[0] - sizes[1]) <= 0.02 * min(sizes):
            return {"prompt": slots["query"], "chosen": chosen, "rejected": rejected, "kind": kind}


def pairs(seed: int | str, count: int, held_out: bool = False) -> list[dict]:
    """Records of preference data; if held out, equally many of each kind."""
    rng, kinds = random.Random(seed), list(KINDS) if held_out else TRAINING
    return [pair(rng, kinds[i % len(kinds)], held_out) for i in range(count)]


@options.command
def main():
    out = Path(options.parse(Config, sys.argv[1:], __doc__).out)
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "pairs.jsonl", pairs("0/train", 12_800))
    write_jsonl(out / "eval_pairs.jsonl", pairs("0/eval", 1000, held_out=True))
    print(f"wrote pairs.jsonl and eval_pairs.jsonl to {out}", flush=True)


if __name__ == "__main__":
    main()
