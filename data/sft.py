"""Supervised fine-tuning: chats in JSONL, as rows in which only the response, the last message, is trained.

A line has `messages`, a list of objects with `role` and `content`, or the request under `prompt` (or `query`,
`question`, `instruction`) and the `response`. Where the tokenizer's texts end as chats do, a chat is written
as one; else the request, all before the response, stands in the template of data/prompts.py.
"""

import random
from pathlib import Path

import numpy as np

from data.corpus import Row
from data.prompts import QUERY_FIELDS, objects, present, render
from data.tokenizer import Tokenizer
from lib.options import UserError


def encode(record: dict, tokenizer: Tokenizer, style: str) -> Row:
    """A chat, trained from the first token of the response to the end of text. The request is encoded by
    itself, as it is when the model answers. Raises ValueError."""
    messages = record.get("messages", [{"role": "user", "content": present(record, QUERY_FIELDS)},
                                       {"role": "assistant", "content": record.get("response")}])
    if not isinstance(messages, list) or len(messages) < 2 or not all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            and m["content"].strip() for m in messages) or messages[-1]["role"] != "assistant":
        raise ValueError("it needs a prompt and a response, or messages with role and content, of which the "
                         "last is the assistant's")
    "".join(m["role"] + m["content"] for m in messages).encode()  # a lone surrogate fails here
    *before, response = messages
    prompt, end = render("\n\n".join(m["content"] for m in before), style), tokenizer.eos_ids[:1]
    if tokenizer.chats:
        prompt = tokenizer.chat(before, style == "think" or not tokenizer.thinks)
        end = tokenizer.encode("<|im_end|>")
    prompt_ids = tokenizer.encode(prompt)
    ids = np.array(prompt_ids + tokenizer.encode(response["content"]) + end)
    trained = np.arange(1, len(ids)) >= len(prompt_ids)
    return Row(ids[:-1], np.where(trained, ids[1:], -1), [len(ids) - 1])


class Chats:
    """The rows of a file: whole chats of at most row_tokens inputs together, in an order of each epoch's own.
    `dropped` chats have more."""
    name = "sft"

    def __init__(self, path: str, tokenizer: Tokenizer, style: str, row_tokens: int, seed: int):
        self.file, self.seed, self.packed, chats, room = Path(path), seed, [], [], 0
        for number, record in objects(path, "sft"):
            try:
                chats.append(encode(record, tokenizer, style))
            except ValueError as e:
                raise UserError(f"{path}, line {number}: {e}") from None
        random.Random(seed).shuffle(chats)
        for chat in (fitting := [chat for chat in chats if chat.lengths[0] <= row_tokens]):
            if chat.lengths[0] > room:
                self.packed.append([])
                room = row_tokens
            self.packed[-1].append(chat)
            room -= chat.lengths[0]
        self.rows, self.dropped = len(self.packed), len(chats) - len(fitting)

    def row(self, k: int) -> Row:
        epoch, i = divmod(k, self.rows)
        order = np.random.RandomState([self.seed % 2**32, epoch]).permutation(self.rows)
        tokens, targets, lengths = zip(*self.packed[order[i]])
        return Row(np.concatenate(tokens), np.concatenate(targets), sum(lengths, []))
