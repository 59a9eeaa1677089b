"""A checkpoint's tokenizer: ids, their bytes, and the ids that end a text."""

import re
import shutil
from functools import cached_property
from pathlib import Path

import tokenizers

from lib.options import UserError, read_json, shown

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json", "merges.txt",
         "added_tokens.json", "special_tokens_map.json", "generation_config.json")
MOST_IDS = 2**24  # largest vocabulary


def byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level BPE writes bytes: character -> byte. By GPT-2's rule printable bytes
    are written as themselves."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [b for b in range(256) if b not in kept]
    return {chr(b): b for b in kept} | {chr(256 + i): b for i, b in enumerate(moved)}


def read_optional(file: Path) -> dict:
    """The object in a JSON file, empty if there is no such file. Raises UserError."""
    return read_json(file, "copy it again") if file.exists() else {}


def copy_files(source: str | Path, out: str | Path):
    """Copies the FILES that a checkpoint folder has into another one."""
    for file in (Path(source) / name for name in FILES):
        if file.exists() and file.resolve() != (target := Path(out) / file.name).resolve():
            shutil.copyfile(file, target)


class Tokenizer:
    """The tokenizer of a checkpoint folder. eos_ids: ids that end a text. n_valid: ids are 0 .. n_valid - 1;
    the embedding may have more rows. token_bytes: the bytes of each id. Raises UserError."""
    def __init__(self, path: str | Path):
        self.path = Path(path)
        file = self.path / "tokenizer.json"
        try:
            self.inner = tokenizers.Tokenizer.from_file(str(file))
        except Exception as e:  # tokenizers raises bare Exception
            raise UserError(f"{file} cannot be read ({e}): a checkpoint folder needs its model's") from None
        vocabulary = self.inner.get_vocab(with_added_tokens=True)
        self.n_valid = max(vocabulary.values(), default=-1) + 1
        if not 1 <= self.n_valid <= MOST_IDS:
            raise UserError(f"{file} must have 1 to {MOST_IDS:,} ids, not {self.n_valid:,}: copy it again")
        self.eos_ids = self.find_eos(vocabulary)
        self.token_bytes = self.bytes_of(vocabulary)

    def check_rows(self, rows: int, model):
        """Raises UserError if the tokenizer has more ids than the model's embedding has rows."""
        if self.n_valid > rows:
            raise UserError(f"{self.path}/tokenizer.json has {self.n_valid} ids, but the model in "
                            f"{model} has only {rows} rows: they do not belong together")

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text of the ids with special tokens, so that rewards see all that was sampled."""
        return self.inner.decode(ids, skip_special_tokens=False)

    @cached_property
    def template(self) -> str:
        """The chat template, in Jinja; empty for none."""
        if (file := self.path / "chat_template.jinja").exists():
            return file.read_text(encoding="utf-8", errors="replace")
        return str(read_optional(self.path / "tokenizer_config.json").get("chat_template", ""))

    @cached_property
    def system(self) -> str:
        """The chat template's default system message; empty for none."""
        found = re.search(r"<\|im_start\|>system\\n([^'\"<{]+)<\|im_end\|>", self.template)
        return found[1] if found else ""

    @property
    def thinks(self) -> bool:
        """Whether the chat template puts thinking before an answer, as Qwen3's does."""
        return "\\n<think>\\n" in self.template

    @property
    def chats(self) -> bool:
        """Whether <|im_end|> ends the model's texts, as it does in chats."""
        ends = self.encode("<|im_end|>")
        return len(ends) == 1 and ends[0] in self.eos_ids

    def chat(self, query: str | list[dict], think: bool = True) -> str:
        """A chat with one message of the user, or with several (role, content), up to the model's answer.
        think: False begins the answer with Qwen3's empty thinking."""
        messages = [{"role": "user", "content": query}] if isinstance(query, str) else query
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        chat = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        return f"{chat}<|im_start|>assistant\n" + ("" if think else "<think>\n\n</think>\n\n")

    def find_eos(self, vocabulary: dict[str, int]) -> list[int]:
        """End-of-text ids from generation_config.json, else the `eos_token` of tokenizer_config.json."""
        generation = self.path / "generation_config.json"
        ids = read_optional(generation).get("eos_token_id")
        if ids is None:
            token = read_optional(self.path / "tokenizer_config.json").get("eos_token")
            token = token.get("content") if isinstance(token, dict) else token
            ids = vocabulary.get(token) if isinstance(token, str) else None
        if ids is None:
            raise UserError(f"{self.path} names no end-of-text token: it needs generation_config.json with "
                            "eos_token_id, or tokenizer_config.json with eos_token")
        ids = ids if isinstance(ids, list) else [ids]
        if not ids or any(type(i) is not int or not 0 <= i < self.n_valid for i in ids):
            raise UserError(f"{generation}: eos_token_id must be ids below {self.n_valid}, not {shown(ids)}")
        return ids

    def bytes_of(self, vocabulary: dict[str, int]) -> list[bytes]:
        """The bytes of each id, which find stop strings without decoding the whole text."""
        alphabet = byte_alphabet()
        added = self.inner.get_added_tokens_decoder()
        out = [b""] * self.n_valid
        for token, i in vocabulary.items():
            ordinary = i not in added and all(c in alphabet for c in token)
            out[i] = bytes(alphabet[c] for c in token) if ordinary else token.encode()
        return out
