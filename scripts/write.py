"""Writes a text with a checkpoint, shown while it is written.

    python -m scripts.write runs/NAME Write a story of 80 words about Mila and Toma in Kostad.
    python -m scripts.write FOLDER --file task.txt --words 2000:3000
    python -m scripts.write FOLDER --chat true

CHECKPOINT is a run (its newest checkpoint), one of its checkpoints, or a Hugging Face folder. Thinking is
dimmed; at the end stand words, speed and the rewards that need no model. Ctrl-C ends the text. With --chat
each line that you type is the next message, and Ctrl-C or Ctrl-D at the prompt ends the chat.
"""

import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tokenizers.decoders import DecodeStream

import rewards
from data.prompts import Prompt, language, parse_range, render
from data.tokenizer import Tokenizer
from evaluation import source
from lib import distributed, options
from lib.options import UserError
from lib.scoring import choose_rewards, score
from sampler import Completion, Sampler
from scheduler import Request
from text import count_words, structure

DIM, PLAIN = "\033[2m", "\033[0m"


@dataclass
class Config:
    checkpoint: str = ""  # a run, one of its checkpoints, or a folder as downloaded
    task: tuple = ()  # what to write, in words; or give file, or chat
    file: str = ""  # a file with the task
    chat: bool = False  # talk with a model that has a chat template
    template: str = "auto"  # auto, chat, chat_nothink, think or direct: see docs/evaluation.md
    words: str = ""  # LO:HI, the requested length, which the length reward reads
    max_new_tokens: int = 16000  # at most; the context may allow fewer
    temperature: float = 0.6  # 0: always the likeliest token
    top_p: float = 0.95  # of the probability mass, from which tokens are drawn
    seed: int = 0  # of the samples
    sampler_dtype: str = "auto"  # auto: bfloat16 on CUDA, float32 on CPU; or either by name
    device: str = "auto"  # auto, cpu or cuda
    max_sequences = tp = 1  # of the sampler, and its page size (not options)
    page_size = 16


class Screen:
    """Prints a text's tokens as they come; what stands in <think> is dimmed on a terminal."""

    def __init__(self, sampler: Sampler):
        self.sampler, self.stream = sampler, DecodeStream(skip_special_tokens=False)
        self.marks = [("<think>", DIM), ("</think>", PLAIN)] * sys.stdout.isatty()
        self.ids, self.shown, self.tail = [], 0, ""

    def __call__(self):
        """Prints what is new; the sampler calls it before each of its steps."""
        if running := self.sampler.scheduler and self.sampler.scheduler.running:
            self.print(running[0].token_ids)

    def print(self, ids: list[int]):
        self.ids, new = ids, ids[self.shown:]
        self.shown = len(ids)
        for token in (token for token in new if token not in self.sampler.eos_ids):
            part = self.stream.step(self.sampler.tokenizer.inner, token) or ""
            self.tail, rest = (self.tail + part)[-40:], ""
            if self.marks and self.marks[0][0] in self.tail:
                tag, code = self.marks.pop(0)
                rest = self.tail.split(tag)[1]  # of the token in which the tag ends
                part = part.removesuffix(rest) + code
            print(part + rest, end="", flush=True)


def write(text: str, sampler: Sampler, config: Config, stop: tuple[str, ...]) -> tuple[Completion, float]:
    """Writes and shows what follows `text`: (completion, seconds). Ctrl-C ends it."""
    ids, start = sampler.tokenizer.encode(text), time.perf_counter()
    room = sampler.model.config.max_position_embeddings - len(ids)
    if room < 1:
        raise UserError(f"the task has {len(ids):,} tokens, the context {room + len(ids):,}: shorten it")
    request = Request(ids, 1, min(config.max_new_tokens, room), config.temperature, config.top_p, stop=stop,
                      seed=config.seed)
    screen = sampler.interrupt = Screen(sampler)
    found = None
    try:
        with closing(sampler.generate([request])) as stream:
            (found,) = stream
    except KeyboardInterrupt:
        text = sampler.tokenizer.decode(screen.ids)
        found = Completion(0, 0, screen.ids, [], text, "stopped", request.max_new_tokens)
    screen.print(found.token_ids)
    print(PLAIN * bool(screen.marks), flush=True)
    return found, time.perf_counter() - start


def summary(found: Completion, seconds: float, prompt: Prompt) -> str:
    """Words, speed, why it ended, and the rewards of a text."""
    answer = structure(found.text)[2] if prompt.style in ("think", "direct") else found.text
    ended = {"stop": "ended", "length": "cut at max_new_tokens", "stopped": "stopped"}[found.finish_reason]
    notes = [f"{count_words(answer or ''):,} words", f"{len(found.token_ids):,} tokens",
             f"{len(found.token_ids) / seconds:,.0f} a second", ended]
    if prompt.style in ("think", "direct"):
        for reward in choose_rewards("length,format,overlong", rewards):
            (value,) = score(reward, [found], [prompt])
            notes += [f"{reward.name} {value:.3f}"] if value is not None and value == value else []
    return ", ".join(notes)


def talk(sampler: Sampler, config: Config, style: str):
    messages = []
    while True:
        try:
            messages.append({"role": "user", "content": input("> ")})
        except (EOFError, KeyboardInterrupt):
            print()
            return
        text = sampler.tokenizer.chat(messages, style == "chat" or not sampler.tokenizer.thinks)
        found, seconds = write(text, sampler, config, ())
        answer = found.text.rpartition("</think>")[2].strip()  # thinking is not shown to the model again
        messages.append({"role": "assistant", "content": answer})
        print(f"({len(found.token_ids):,} tokens, {len(found.token_ids) / seconds:,.0f} a second)\n")


@options.command
def main():
    elsewhere = any(word.startswith(("--file", "--chat")) for word in sys.argv)
    config = options.parse(Config, sys.argv[1:], __doc__, "checkpoint" if elsewhere else "checkpoint task")
    options.check_numbers(config, "max_new_tokens", temperature=(0, 100),
                          top_p=(1e-6, 1))
    options.check_choices(config, device=options.DEVICES, sampler_dtype=options.DTYPES,
                          template=source.TEMPLATES)
    found = source.find(config.checkpoint, config.template)
    query = Path(config.file).read_text(encoding="utf-8") if config.file else " ".join(config.task)
    tokenizer = Tokenizer(found.folder)
    if found.scalar or config.chat and not tokenizer.chats:
        raise UserError(f"{config.checkpoint} is a reward model, or has no chat template: it writes no "
                        f"{'chat' if config.chat else 'text'}")
    if not (query.strip() or config.chat):
        raise UserError("give a task as words, in --file, or --chat true")
    try:
        bounds = [int(x) for x in config.words.split(":")] if config.words else None
        asked = parse_range({"length_range": bounds})
    except ValueError:
        raise UserError(f"words must be LO:HI, such as 2000:3000, not {config.words!r}") from None
    sampler = source.open_sampler(found, config, distributed.setup(config.device))
    if config.chat:
        return talk(sampler, config, found.template)
    chats = found.template.startswith("chat")
    text = tokenizer.chat(query, found.template == "chat" or not tokenizer.thinks) if chats else render(
        query, found.template)
    completion, seconds = write(text, sampler, config, found.stop)
    print(summary(completion, seconds, Prompt("task", text, query, asked, language(query), found.template)))


if __name__ == "__main__":
    main()
