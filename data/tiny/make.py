"""The embedded default: a small world of stories and letters, made from a seed.

    python -m data.tiny.make
    torchrun --nproc_per_node=2 -m scripts.pretrain --out data/tiny/base    # 15 minutes on 2 cores

The first makes documents, tokenizer and prompts; the second trains the base on them.

A request names two people, a place and a number of words; a good answer is a text of that length about those
names. The people and places of the evaluation prompts stand in no document and in no training prompt. The
base is what a base model is: it often ignores the tags, gets them wrong, or misses the length, and it can do
better.
"""

import argparse
import json
import random
import zlib
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from data.prompts import render
from text import count_words

HERE = Path(__file__).parent
END = "<|endoftext|>"
LENGTHS = range(20, 101, 10)  # words that a request asks for
DOCUMENTS = 40_000
VOCABULARY = 1024

# A name is one or two syllables and an end: thousands of them, in about three tokens. Copying several tokens
# in a row is a pattern that so small a model finds; names of a single token it did not learn to copy.
ONSETS = "b br d dr f g h j k kr l m n p r s st t tr v z".split()
VOWELS = "a e i o u ai ea".split()
PERSON_ENDS = "n ra lo ma s li th na rik da ven".split()
PLACE_ENDS = "ton holm burg field mar stad wick port".split()

WORDS = {
    "time": "In the morning|At noon|One evening|After the rain|Before dawn|On Sunday|Late at night|In early "
    "spring|Last winter|That "
    "day|Once more|A week later|At sunset|For a while".split("|"),
    "spot": "the river|the old mill|the market|the harbour|the forest|the bridge|the station|the garden|the "
    "tower|the school|the "
    "bakery|the lake|the empty street|the hill".split("|"),
    "thing": "lamp letter map boat kite coat book basket clock drum key ring horse dog cat bird cake bell "
    "stone song".split(),
    "adj": "red small old golden quiet broken warm strange green heavy bright silver wet sweet lost "
    "tiny".split(),
    "did": "found|carried|bought|lost|painted|hid|kept|saw|broke|sold|took|made|drew|dreamed of".split("|"),
    "went": "walked to|ran to|waited at|went back to|danced near|slept by|sat by|looked at|came from|met at".
    split("|"), "feel": "happy tired afraid proud hungry calm sad curious".split(),
    "sky": "The wind|The snow|The sun|The cold|The music|The fog|The smell of bread|The silence".split("|"),
}
OPENINGS = {
    "story": [
        "{A} and {B} lived in {P}.", "Once there were two friends in {P}, {A} and {B}.",
        "{A} came to {P} with {B}.", "Everyone in {P} knew {A} and {B}.", "{time}, {A} met {B} in {P}."
    ], "letter": [
        "Dear {B}, I write to you from {P}.", "Dear {B}, how are things in {P}?",
        "Dear {B}, {P} is {adj} today.", "Dear {B}, I think of {P} again."
    ],
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
    "story": [
        "That was their day in {P}.", "So {A} and {B} were {feel}.", "They never left {P} again.",
        "And {B} went home.", "{A} smiled."
    ], "letter": ["Yours, {A}.", "With love from {P}, {A}.", "Write soon, {A}.", "Your {feel} friend {A}."],
}
QUERIES = {
    "story": [
        "Write a story of {n} words about {A} and {B} in {P}.",
        "Tell a story about {A} and {B} in {P} in {n} words.",
        "Please write {n} words about {A}, {B} and {P}, as a story."
    ], "letter": [
        "Write a letter of {n} words from {A} to {B} about {P}.",
        "Please write a letter from {A} in {P} to {B} in {n} words."
    ],
}
PLANS = {
    "with the length": [
        "A {kind} of {n} words. {A} and {B} in {P}.", "It needs {n} words: {A}, {B}, {P}, a {adj} {thing}.",
        "Who? {A} and {B}. Where? {P}. How long? {n} words.",
        "First {A}, then {B}, then {spot} in {P}. About {n} words."
    ], "without": [
        "A {kind}. {A} and {B} in {P}.", "It needs {A}, {B}, {P}, a {adj} {thing}.",
        "Who? {A} and {B}. Where? {P}.", "First {A}, then {B}, then {spot} in {P}."
    ]
}


def name(rng: random.Random, ends: list[str], held_out: bool = False) -> str:
    """One name in ten is held out: it stands in no document and in no training prompt."""
    while True:
        syllables = rng.choice((1, 2))
        word = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(syllables)) + rng.choice(ends)
        if (zlib.crc32(word.encode()) % 10 == 0) == held_out:
            return word.capitalize()


def request(rng: random.Random, held_out: bool = False) -> dict:
    kind = rng.choice(list(QUERIES))
    a = b = name(rng, PERSON_ENDS, held_out)
    while a == b:
        b = name(rng, PERSON_ENDS, held_out)
    slots = {"A": a, "B": b, "P": name(rng, PLACE_ENDS, held_out), "n": rng.choice(LENGTHS), "kind": kind}
    return slots | {"query": rng.choice(QUERIES[kind]).format(**slots)}


def fill(rng: random.Random, sentence: str, slots: dict) -> str:
    words = {key: rng.choice(choices) for key, choices in WORDS.items()}
    words |= {"adj2": rng.choice(WORDS["adj"]), "thing2": rng.choice(WORDS["thing"])}
    others = ["the baker", "my sister"] if slots["kind"] == "letter" else ["the old man", "a child"]
    words["who"], words["who2"] = rng.sample([slots["A"], slots["B"], rng.choice(others)], 2)
    text = sentence.format(**slots, **words)
    return text[0].upper() + text[1:]


def write(rng: random.Random, slots: dict, words: int) -> str:
    """A text of about `words` words (within half a sentence) out of opening, body and closing."""
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
    """What stands after the prompt: 55 % bare text, 20 % well-formed tags, 25 % malformed ones.

    70 % of the bare texts keep the length asked for; of those in tags the half whose plan states it.
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
        f"{answer}\n{think}"
    ])


def document(rng: random.Random) -> str:
    """86 % prompted, half of them by the think template; the rest are bare texts and lists that are copied,
    which teach copying names."""
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
    """Byte-level BPE with the same splitting of words and digits as Qwen2.5's."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| "
        r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY,
                                  special_tokens=[END],
                                  show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def write_prompts(path: Path, rng: random.Random, count: int, purpose: str):
    with path.open("w") as f:
        for i in range(count):
            slots = request(rng, held_out=purpose == "eval")
            names = [slots[key] for key in "ABP"]
            record = {"id": f"{purpose}-{i}", "prompt": slots["query"], "length": slots["n"], "names": names}
            f.write(json.dumps(record) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out",
                        type=Path,
                        default=HERE,
                        help="folder for base/, prompts.jsonl and eval_prompts.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--documents", type=int, default=DOCUMENTS)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    documents = [document(rng) for _ in range(args.documents)]
    base = args.out / "base"
    base.mkdir(parents=True, exist_ok=True)
    train_tokenizer(documents[:8000]).save(str(base / "tokenizer.json"))
    (base / "tokenizer_config.json"
     ).write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}) + "\n")
    write_prompts(args.out / "prompts.jsonl", rng, 2000, "train")
    write_prompts(args.out / "eval_prompts.jsonl", rng, 128, "eval")
    with (args.out / "documents.jsonl").open("w") as f:
        f.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    print(f"wrote tokenizer, prompts and {len(documents)} documents to {args.out}", flush=True)


if __name__ == "__main__":
    main()
