"""The best rollouts of an RL run, prompt and completion, as documents for scripts/tokenise.py.

    python -m scripts.distil RUN --min_reward X [--corpus FOLDER --share 0.01] [--out FILE.jsonl]
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from data.tokenizer import Tokenizer
from lib import options
from lib.files import locate, read_jsonl, write_jsonl
from lib.options import Field, UserError, read_json


@dataclass
class Config:
    run: str = ""  # its folder
    min_reward: float = 0.0  # least mean of a sample's rewards, without those that are missing
    corpus: str = ""  # folder of scripts.tokenise; empty: the number of documents has no limit
    share: float = 0.01  # of the corpus's tokens are the documents at most
    out: str = "distilled.jsonl"  # the file to write


def distil(config: Config) -> list[dict]:
    """The documents, highest reward first; samples that were cut are left out. Raises UserError."""
    recorded, left, found, documents = Path(config.run, "config.json"), float("inf"), [], []
    tokenizer = Tokenizer(locate(read_json(recorded, "give an RL run", model=Field(str))["model"]))
    if config.corpus:
        meta = read_json(Path(config.corpus, "meta.json"), "make it by scripts.tokenise", shards=Field(list))
        left = config.share * sum(tokens for _, tokens in meta["shards"])
    for file in sorted(Path(config.run).glob("rollouts/step_*.jsonl")):
        for sample in read_jsonl(file, prompt=Field(str), text=Field(str), rewards=Field(dict)):
            rewards = [x for x in sample["rewards"].values() if x is not None] or [float("-inf")]
            mean = sum(rewards) / len(rewards)
            if mean >= config.min_reward and sample.get("finish_reason") != "length":
                found.append((mean, sample["prompt"] + sample["text"]))
    for _, text in sorted(found, key=lambda x: -x[0]):
        if (left := left - len(tokenizer.encode(text)) - 1) < 0:
            break
        documents.append({"text": text})
    if not documents:
        raise UserError(f"none of {len(found)} rollouts of min_reward {config.min_reward} fits into share "
                        f"{config.share}: lower the one, or raise the other")
    return documents


@options.command
def main():
    config = options.parse(Config, sys.argv[1:], __doc__, "run")
    write_jsonl(Path(config.out), documents := distil(config))
    print(f"{config.out}: {len(documents)} documents")


if __name__ == "__main__":
    main()
