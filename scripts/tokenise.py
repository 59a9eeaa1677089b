"""Tokenises documents into a folder of shards, which scripts/pretrain.py reads.

    python -m scripts.tokenise FILE_OR_FOLDER... --tokenizer FOLDER --out FOLDER

A .jsonl file has a document a line, under `text`; any other file is a document; a folder stands for its
files by name. Documents stay in order and are tokenised in parallel. After a kill the same command goes on
from the last whole shard, to the same bytes. What cannot be used is left out and counted.
"""

import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.corpus import SHARD, fingerprint, tokenised
from data.tokenizer import Tokenizer
from lib import options
from lib.files import locate, replace
from lib.options import Field, UserError, read_json
from run import lock


@dataclass
class Config:
    files: tuple = ()  # JSONL with `text`, files of one document each, or folders of both
    tokenizer: str = "data/tiny/base"  # folder with tokenizer.json
    out: str = ""  # the folder to make
    shard_mib: float = 64.0  # largest size of a shard; a longer document stands alone


def tokenise(config: Config) -> dict:
    """Makes the folder, or goes on with it; returns what its meta.json says. Raises UserError."""
    options.check_numbers(config, shard_mib=(0.001, 4096))
    if not config.out:
        raise UserError("--out is missing: give a folder for the shards")
    files = [file for path in map(Path, config.files)
             for file in (sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path])]
    tokenizer, out = Tokenizer(locate(config.tokenizer)), Path(config.out)
    inputs = json.dumps([config.shard_mib, *((str(file), file.stat().st_size) for file in files)])
    start = {"tokenizer": fingerprint(tokenizer), "inputs": hashlib.sha256(inputs.encode()).hexdigest()}
    meta = start | {"complete": False, "place": [0, 0, 0], "shards": [], "dropped": {}}
    lock(out, "out")
    if (out / "meta.json").exists():
        meta = read_json(out / "meta.json", "choose another out", **{
            name: Field(type(value)) for name, value in meta.items()})
        if any(meta[name] != value for name, value in start.items()):
            raise UserError(f"{out} is made of other files, or by another tokenizer or shard_mib: choose "
                            "another out")
    if meta["complete"]:
        return meta
    f, tokens, lengths = (out / "writing").open("wb"), 0, []

    def finish(complete: bool):
        """Completes the shard, which counts from when meta.json names it."""
        with f:
            f.write(np.array(lengths, "<u4").tobytes())
            f.flush()
            os.fsync(f.fileno())
        (out / "writing").replace(file := out / SHARD.format(len(meta["shards"])))
        meta["shards"].append([len(lengths), tokens])
        meta["complete"] = complete
        replace(out / "meta.json", json.dumps(meta) + "\n")
        print(f"{file}: {len(lengths):,} documents, {tokens:,} tokens", flush=True)

    for ids_T, why, where, place in tokenised(files, tokenizer, meta["place"]):
        if why:
            meta["dropped"].setdefault(why, {"first": where, "documents": 0})["documents"] += 1
        else:
            if lengths and tokens + len(lengths) + len(ids_T) >= config.shard_mib * 2**18:
                finish(complete=False)
                f, tokens, lengths = (out / "writing").open("wb"), 0, []
            f.write(ids_T.tobytes())
            tokens += len(ids_T)
            lengths.append(len(ids_T))
        meta["place"] = place
    if not lengths:
        raise UserError(f"no document is left of {', '.join(config.files)}, see `dropped`: {meta['dropped']}")
    finish(complete=True)
    return meta


@options.command
def main():
    config = options.parse(Config, sys.argv[1:], __doc__, "files")
    meta = tokenise(config)
    documents, tokens = (sum(sizes) for sizes in zip(*meta["shards"]))
    notes = [f"left out: {x['documents']:,} {why}, first {x['first']}" for why, x in meta["dropped"].items()]
    print(f"{config.out}: {documents:,} documents, {tokens:,} tokens", *notes, sep="\n")


if __name__ == "__main__":
    main()
