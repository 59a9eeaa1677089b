"""Tokenised documents, and rows of them in a random order that takes no memory.

A corpus is a folder of meta.json and shards, made by scripts/tokenise.py. A shard is little-endian uint32:
the tokens of its documents end to end, then the length of each.

A document of n tokens has n - 1 pairs of an input and its target. An epoch is the pairs of all documents:
shards in a random order, and the documents of each. Row k of a source is the k-th `row_tokens` pairs of its
epochs. A document that crosses a row's end is continued in the next row as a sequence of its own, whose first
input is the last target before it: every token but a document's first is predicted exactly once. A row
depends on (seed, source, k) alone: ranks read only their own rows, and a position is a number of rows.
"""

import hashlib
import itertools
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.tokenizer import Tokenizer
from lib.options import Field, UserError, parse_json, read_json

BATCH = 2**20  # characters that are tokenised together, in parallel
SHARD = "shard_{:05d}.bin"


class Row(NamedTuple):
    tokens_T: np.ndarray
    targets_T: np.ndarray  # the token after each; -1: not trained
    lengths: list[int]  # of the sequences in it


# ---------------------------------------------------------------------- tokens


def fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of what turns documents into tokens."""
    text = (tokenizer.path / "tokenizer.json").read_bytes()
    return hashlib.sha256(text + str(tokenizer.eos_ids[0]).encode()).hexdigest()


def texts(files: list[Path], place: list[int]) -> Iterator[tuple[str, str, str, list[int]]]:
    """(text, why it cannot be used, where it stands, the place after it) of each document from a place on,
    which is the index of a file, and the byte and the line in it."""
    for i, file in list(enumerate(files))[place[0]:]:
        jsonl = file.suffix == ".jsonl"
        with open(file, "rb") as f:
            f.seek(place[1])
            for number, data in enumerate(f if jsonl else [f.read()] * (not place[2]), place[2] + 1):
                place, why = [i, place[1] + len(data), number], ""
                try:
                    text = parse_json(data).get("text") if jsonl else data.decode("utf-8-sig")
                    if not isinstance(text, str) or not text.strip() or not text.encode():
                        why = "without text"
                except ValueError as e:  # a lone surrogate fails in `encode`
                    why = "not UTF-8" if isinstance(e, UnicodeError) else "no JSON object"
                if not jsonl or data.strip():
                    yield "" if why else text, why, f"{file}, line {number}", place
        place = [i + 1, 0, 0]


def tokenised(files: list[Path], tokenizer: Tokenizer,
              place: list[int]) -> Iterator[tuple[np.ndarray, str, str, list[int]]]:
    """`texts` as tokens with the end of text, in the same order; batches are encoded in parallel."""
    tokenizer.inner.no_truncation(), tokenizer.inner.no_padding()
    batch, size = [], 0
    for item in itertools.chain(texts(files, place), [None]):
        if item is None or size > BATCH:
            encodings = tokenizer.inner.encode_batch_fast([x[0] for x in batch], add_special_tokens=False)
            for (_, why, *where), ids in zip(batch, (e.ids for e in encodings)):
                ids_T = np.array([*ids, tokenizer.eos_ids[0]], "<u4")
                yield ids_T, why or "of one token" * (len(ids) < 2), *where
            batch, size = [], 0
        if item:
            batch.append(item)
            size += len(item[0]) + 100


# ---------------------------------------------------------------------- rows


class Corpus:
    """The rows of a source. file: changes with it; sizes: documents and tokens of each shard; read: its index
    -> (tokens, lengths)."""
    dropped = 0

    def __init__(self, name: str, file: Path, sizes: list[list[int]], read: Callable, row_tokens: int,
                 seed: int):
        self.name, self.file, self.read, self.row_tokens = name, file, read, row_tokens
        self.key = [seed % 2**32, zlib.crc32(name.encode())]
        self.pairs_S = np.array([tokens - documents for documents, tokens in sizes], np.int64)
        self.rows = int(self.pairs_S.sum()) // row_tokens  # whole ones in an epoch
        self.shards, self.documents = lru_cache(2)(self.shards), lru_cache(2)(self.documents)

    def permutation(self, n: int, *key: int) -> np.ndarray:
        return np.random.RandomState([*self.key, *key]).permutation(n)  # NumPy never changes its numbers

    def shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of an epoch, and up to which pair of it each goes."""
        order_S = self.permutation(len(self.pairs_S), epoch)
        return order_S, self.pairs_S[order_S].cumsum()

    def documents(self, epoch: int, shard: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A shard's tokens, and of its documents in the order of an epoch the first token, and up to which
        pair of the shard each goes."""
        tokens_T, lengths_D = self.read(shard)
        lengths_D, order_D = lengths_D.astype(np.int64), self.permutation(len(lengths_D), epoch, shard)
        return tokens_T, (lengths_D.cumsum() - lengths_D)[order_D], (lengths_D - 1)[order_D].cumsum()

    def row(self, k: int) -> Row:
        pieces, at, end = [], k * self.row_tokens, (k + 1) * self.row_tokens
        while at < end:
            epoch, pair = divmod(at, int(self.pairs_S.sum()))
            order_S, ends_S = self.shards(epoch)
            s = ends_S.searchsorted(pair, "right")
            pair -= int(ends_S[s] - self.pairs_S[order_S[s]])
            tokens_T, starts_D, ends_D = self.documents(epoch, int(order_S[s]))
            d = ends_D.searchsorted(pair, "right")
            first, n = starts_D[d] + pair - (ends_D[d - 1] if d else 0), min(end - at, int(ends_D[d]) - pair)
            pieces.append(tokens_T[first:first + n + 1].astype(np.int64))
            at += n
        return Row(np.concatenate([ids[:-1] for ids in pieces]), np.concatenate([ids[1:] for ids in pieces]),
                   [len(ids) - 1 for ids in pieces])


def open_corpus(name: str, folder: Path, tokenizer: Tokenizer, row_tokens: int, seed: int) -> Corpus:
    """The corpus in a folder. Raises UserError if another tokenizer made it, or if it is not whole."""
    meta = read_json(file := folder / "meta.json", "make the folder by scripts.tokenise",
                     tokenizer=Field(str), complete=Field(bool), shards=Field(list))
    if meta["tokenizer"] != fingerprint(tokenizer):
        raise UserError(f"{folder} has tokens of another tokenizer than {tokenizer.path}: make it again")
    if not meta["complete"]:
        raise UserError(f"{folder} is not complete: give scripts.tokenise the same command again")
    for i, size in enumerate(meta["shards"]):
        path = folder / SHARD.format(i)
        if not path.is_file() or path.stat().st_size != 4 * sum(size):
            raise UserError(f"{path} must have {4 * sum(size):,} bytes by its meta.json: copy it again")

    def read(shard: int) -> list[np.ndarray]:
        return np.split(np.memmap(folder / SHARD.format(shard), "<u4", "r"), [meta["shards"][shard][1]])

    return Corpus(name, file, meta["shards"], read, row_tokens, seed)


def in_memory(file: Path, tokenizer: Tokenizer, row_tokens: int, seed: int) -> Corpus:
    """The documents of a file. Raises UserError for one that cannot be used."""
    documents = []
    for ids_T, why, where, _ in tokenised([file], tokenizer, [0, 0, 0]):
        if why:
            raise UserError(f"{where} is {why}: mend it, or leave it out")
        documents.append(ids_T)
    shard = np.concatenate(documents or [[]]), np.array([len(ids_T) for ids_T in documents])
    return Corpus("documents", file, [[len(documents), len(shard[0])]], lambda _: shard, row_tokens, seed)


def take(sources: list, weights: list[float], position: dict[str, int],
         n: int) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """The next n rows of a mixture, as (index of the source, its row), and the position after them: the rows
    taken of each source. A row is of the source that is furthest behind its weight, so that none is ever off
    by more than a row or so."""
    taken_S, shares_S, rows = np.array([position[s.name] for s in sources]), np.array(weights), []
    for _ in range(n):
        s = int((shares_S / shares_S.sum() * (taken_S.sum() + 1) - taken_S).argmax())
        rows.append((s, int(taken_S[s])))
        taken_S[s] += 1
    return rows, {source.name: int(x) for source, x in zip(sources, taken_S)}
