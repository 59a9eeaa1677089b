"""The embedded default: a small world of stories and letters, made from a seed.

    python -m data.tiny.make
    torchrun --nproc_per_node=2 -m scripts.pretrain --out data/tiny/base    # 15 minutes on 2 cores

The first makes documents, tokenizer and prompts; the second trains the base on them.

A request names two people, a place and a number of words; a good answer is a text of that length about those
names. No document and no training prompt contains the people and places of the evaluation prompts. The
documents leave the base something to learn: it often ignores the tags, gets them wrong, or misses the length.
"""

import random
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from data.prompts import render
from lib import options
from lib.files import jsonl
from text import count_words

END = "<|endoftext|>"
LENGTHS = range(20, 101, 10)  # words that a request asks for
DOCUMENTS = 40_000
VOCABULARY = 1024


@dataclass
class Config:
    out: str = "data/tiny"  # folder for the files


# A name is one or two syllables and an end: thousands of names of about three tokens each. A model of this
# size learns to copy several tokens in a row; it did not learn to copy names of a single token.
ONSETS = "b br d dr f g h j k kr l m n p r s st t tr v z".split()
VOWELS = "a e i o u ai ea".split()
PERSON_ENDS = "n ra lo ma s li th na rik da ven".split()
PLACE_ENDS = "ton holm burg field mar stad wick port".split()

WORDS = {
    "time": "In the morning|At noon|One evening|After the rain|Before dawn|On Sunday|Late at night|"
            "In early spring|Last winter|That day|Once more|A week later|At sunset|For a while".split("|"),
    "spot": "the river|the old mill|the market|the harbour|the forest|the bridge|the station|the garden|"
            "the tower|the school|the bakery|the lake|the empty street|the hill".split("|"),
    "thing": "lamp letter map boat kite coat book basket clock drum key ring horse dog cat bird cake bell "
             "stone song".split(),
    "adj": "red small old golden quiet broken warm strange green heavy bright silver wet sweet lost "
           "tiny".split(),
    "did": "found|carried|bought|lost|painted|hid|kept|saw|broke|sold|took|made|drew|dreamed of".split("|"),
    "went": "walked to|ran to|waited at|went back to|danced near|slept by|sat by|looked at|came from|"
            "met at".split("|"),
    "feel": "happy tired afraid proud hungry calm sad curious".split(),
    "sky": "The wind|The snow|The sun|The cold|The music|The fog|The smell of bread|The silence".split("|"),
}
OPENINGS = {
    "story": ["{A} and {B} lived in {P}.", "Once there were two friends in {P}, {A} and {B}.",
              "{A} came to {P} with {B}.", "Everyone in {P} knew {A} and {B}.",
              "{time}, {A} met {B} in {P}."],
    "letter": ["Dear {B}, I write to you from {P}.", "Dear {B}, how are things in {P}?",
               "Dear {B}, {P} is {adj} today.", "Dear {B}, I think of {P} again."],
}
BODY = [
    "{time}, {who} {went} {spot}.", "{who} {did} a {adj} {thing} near {spot}.",
    "{who} said that the {thing} was {adj}.", "{time}, {who} {did} the {adj} {thing}.",
    "The {thing} was {adj} and {adj2}, but {who} was {feel}.", "Nobody had seen such a {adj} {thing}.",
    "{who} was {feel} because the {thing} was {adj}.", "{sky} made {who} {feel}.",
    "There was a {adj} {thing} at {spot}.", "{who} {went} {spot} and {did} a {thing}.",
    "Was the {thing} really {adj}?", "{who} gave {who2} a {adj} {thing}.", "{sky} came over {spot}.",
    "{who} wanted a {thing}, not a {adj} {thing2}.", "In {P} every {thing} is {adj}.",
    "{who} could not forget the {adj} {thing}.", "{time}, the {thing} was gone.",
]
CLOSINGS = {
    "story": ["That was their day in {P}.", "So {A} and {B} were {feel}.", "They never left {P} again.",
              "And {B} went home.", "{A} smiled."],
    "letter": ["Yours, {A}.", "With love from {P}, {A}.", "Write soon, {A}.", "Your {feel} friend {A}."],
}
QUERIES = {
    "story": ["Write a story of {n} words about {A} and {B} in {P}.",
              "Tell a story about {A} and {B} in {P} in {n} words.",
              "Please write {n} words about {A}, {B} and {P}, as a story."],
    "letter": ["Write a letter of {n} words from {A} to {B} about {P}.",
               "Please write a letter from {A} in {P} to {B} in {n} words."],
}
PLANS = {
    "with the length": ["A {kind} of {n} words. {A} and {B} in {P}.",
                        "It needs {n} words: {A}, {B}, {P}, a {adj} {thing}.",
                        "Who? {A} and {B}. Where? {P}. How long? {n} words.",
                        "First {A}, then {B}, then {spot} in {P}. About {n} words."],
    "without": ["A {kind}. {A} and {B} in {P}.", "It needs {A}, {B}, {P}, a {adj} {thing}.",
                "Who? {A} and {B}. Where? {P}.", "First {A}, then {B}, then {spot} in {P}."],
}


def name(rng: random.Random, ends: list[str], held_out: bool = False) -> str:
    """A random name. One name in ten is held out: no document and no training prompt contains it."""
    while True:
        syllables = rng.choice((1, 2))
        word = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(syllables)) + rng.choice(ends)
        if (zlib.crc32(word.encode()) % 10 == 0) == held_out:
            return word.capitalize()


def request(rng: random.Random, held_out: bool = False) -> dict:
    """The query of a request, and what fills the slots of its sentences."""
    kind = rng.choice(list(QUERIES))
    a = b = name(rng, PERSON_ENDS, held_out)
    while a == b:
        b = name(rng, PERSON_ENDS, held_out)
    slots = {"A": a, "B": b, "P": name(rng, PLACE_ENDS, held_out), "n": rng.choice(LENGTHS), "kind": kind}
    return slots | {"query": rng.choice(QUERIES[kind]).format(**slots)}


def fill(rng: random.Random, sentence: str, slots: dict) -> str:
    """The sentence with its slots filled from the request and, at random, from WORDS."""
    words = {key: rng.choice(choices) for key, choices in WORDS.items()}
    words |= {"adj2": rng.choice(WORDS["adj"]), "thing2": rng.choice(WORDS["thing"])}
    others = ["the baker", "my sister"] if slots["kind"] == "letter" else ["the old man", "a child"]
    words["who"], words["who2"] = rng.sample([slots["A"], slots["B"], rng.choice(others)], 2)
    text = sentence.format(**slots, **words)
    return text[0].upper() + text[1:]


def write(rng: random.Random, slots: dict, words: int) -> str:
    """A text of opening, body and closing with about `words` words (within half a sentence)."""
    first, last = (fill(rng, rng.choice(part[slots["kind"]]), slots) for part in (OPENINGS, CLOSINGS))
    text, left = [first], words - count_words(first) - count_words(last)
    while left > 0:
        sentence = fill(rng, rng.choice(BODY), slots)
        if (size := count_words(sentence)) > 2 * left:
            break
        text.append(sentence)
        left -= size
    return " ".join([*text, last])


def respond(rng: random.Random, slots: dict) -> str:
    """A completion of the prompt: 55 % bare text, 20 % well-formed tags, 25 % malformed ones.

    70 % of the bare texts have the requested length; of texts in tags, the half whose plan states it.
    """
    bare = rng.random() < 0.55
    asked = rng.random() < (0.7 if bare else 0.5)
    text = write(rng, slots, round(slots["n"] * rng.uniform(0.9, 1.1)) if asked else rng.randint(15, 110))
    if bare:
        return " " + text
    plan = fill(rng, rng.choice(PLANS["with the length" if asked else "without"]), slots)
    think, answer = f"<think>{plan}</think>", f"<answer>{text}</answer>"
    if rng.random() < 4 / 9:
        return f" {think}\n{answer}"
    return " " + rng.choice([
        f"{think}\n{text}", f"<think>{plan}\n{answer}", answer, f"{think}\n<answer>{text}",
        f"{think}\n{think}\n{answer}", f"{think}\nWell then: {answer}", f"<think></think>\n{answer}",
        f"{answer}\n{think}"])


def document(rng: random.Random) -> str:
    """A training text: 86 % are prompts with completions, about half of them in the think template. The rest
    are texts alone, and lists of names with a copy, which teach the model to copy names."""
    slots, kind = request(rng), rng.random()
    if kind < 0.06:
        return write(rng, slots, rng.randint(15, 110))
    if kind < 0.14:
        names = [name(rng, rng.choice([PERSON_ENDS, PLACE_ENDS])) for _ in range(rng.randint(3, 8))]
        return f"Names: {', '.join(names)}. Again: {', '.join(names)}."
    if kind < 0.54:
        return render(slots["query"], "think") + respond(rng, slots)
    if kind < 0.62:
        return render(slots["query"], "direct") + respond(rng, slots)
    return f"<|user|>: {slots['query']} <|assistant|>:" + respond(rng, slots)


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """Byte-level BPE that splits words and digits as Qwen2.5's does."""
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| "
               r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def prompts(rng: random.Random, count: int, purpose: str) -> list[dict]:
    """Records of a prompts file; those of purpose "eval" have held-out names."""
    records = []
    for i in range(count):
        slots = request(rng, held_out=purpose == "eval")
        records.append({"id": f"{purpose}-{i}", "prompt": slots["query"], "length": slots["n"],
                        "names": [slots[key] for key in "ABP"]})
    return records


@options.command
def main():
    out, rng = Path(options.parse(Config, sys.argv[1:], __doc__).out), random.Random(0)
    documents = [document(rng) for _ in range(DOCUMENTS)]
    (out / "base").mkdir(parents=True, exist_ok=True)
    train_tokenizer(documents[:8000]).save(str(out / "base/tokenizer.json"))
    settings = [{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}]
    files = {"base/tokenizer_config.json": settings, "prompts.jsonl": prompts(rng, 2000, "train"),
             "eval_prompts.jsonl": prompts(rng, 128, "eval"),
             "documents.jsonl": [{"text": text} for text in documents]}
    for name, records in files.items():
        (out / name).write_text(jsonl(records))
    print(f"wrote tokenizer, prompts and {len(documents)} documents to {out}", flush=True)


if __name__ == "__main__":
    main()
