"""Preferences of the embedded default: a text as it should be, and one as long that is spoiled.

    python -m data.tiny.pairs
    torchrun --nproc_per_node=2 -m scripts.train_rm --out data/tiny/writing    # 10 minutes on 2 cores

Both sides answer the same request with as many words (within 2 %), so that length says nothing. One is what
make.py writes, the other that text with its sentences shuffled, repeated in the place of others, padded with
some that say nothing, or with other names in a part of it; or a longer text cut within a sentence. `kind`
says which. The held-out pairs have names and fillers that stand in no training pair.
"""

import argparse
import json
import random
import re
from pathlib import Path

from data.tiny.make import HERE, LENGTHS, PERSON_ENDS, PLACE_ENDS, name, request, write
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
    """Opening or closing, or both, are somewhere else."""
    parts = sentences(text)
    order = list(range(len(parts)))
    while order[0] == 0 and order[-1] == len(parts) - 1:
        rng.shuffle(order)
    return " ".join(parts[i] for i in order)


def repeated(rng: random.Random, slots: dict, text: str, held_out: bool) -> str:
    """Sentences stand there again, at once or later, in the place of others."""
    parts = sentences(text)
    for _ in range(rng.randint(1, max(1, len(parts) // 2))):
        i, j = sorted(rng.sample(range(max(2, len(parts) - 1)), 2))
        parts[j] = parts[i]
    return " ".join(parts)


def truncated(rng: random.Random, slots: dict, text: str, held_out: bool) -> str:
    """Ends within a sentence: as much of a longer text."""
    words = count_words(text)
    parts = write(rng, slots, words + rng.randint(10, 50)).split()[:words]
    while parts[-1][-1] in ".?":
        parts.pop()
    return " ".join(parts)


def contradicting(rng: random.Random, slots: dict, text: str, held_out: bool) -> str:
    """One to three of the names are others in a part of the text. Half of the training texts have three
    others throughout: from them so small a model learns to compare names, from the rest alone it does not."""
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
    """Sentences that say nothing stand between others, in the place of some."""
    parts, fillers = sentences(text), HELD_OUT_FILLERS if held_out else FILLERS
    for filler in rng.sample(fillers, rng.randint(1, max(1, len(parts) // 2))):
        parts[rng.randint(1, len(parts) - 1)] = filler
    return " ".join(parts)


KINDS = {f.__name__: f for f in (shuffled, repeated, truncated, contradicting, padded)}
TRAINING = [*KINDS, *["repeated", "contradicting"] * 2]  # those that are hard to learn more often


def pair(rng: random.Random, kind: str, held_out: bool = False) -> dict:
    """A record of preference data. 70 % of the lengths are as asked for, like those of the base's texts."""
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
    """As many of each kind where they are held out."""
    rng, kinds = random.Random(seed), list(KINDS) if held_out else TRAINING
    return [pair(rng, kinds[i % len(kinds)], held_out) for i in range(count)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder for pairs.jsonl and eval_pairs.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=12_800)
    parser.add_argument("--shuffle_labels", action="store_true",
                        help="swaps half of all pairs: a control, of which nothing can be learnt")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    swap = random.Random(args.seed)
    for file, purpose, count in (("pairs.jsonl", "train", args.count), ("eval_pairs.jsonl", "eval", 1000)):
        records = pairs(f"{args.seed}/{purpose}", count, purpose == "eval")
        for record in records:
            if args.shuffle_labels and swap.random() < 0.5:
                record["chosen"], record["rejected"] = record["rejected"], record["chosen"]
        (args.out / file).write_text("".join(json.dumps(record) + "\n" for record in records))
        print(f"wrote {args.out / file}: {count} pairs", flush=True)


if __name__ == "__main__":
    main()
