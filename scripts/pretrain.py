"""Next-token pretraining on JSONL documents: what makes the base of the embedded default.

    torchrun --nproc_per_node=2 -m scripts.pretrain --documents FILE --tokenizer FOLDER --out FOLDER

Documents ({"text": ...}) are tokenised, ended, and packed into rows of one length; attention stays inside a
document. One epoch, AdamW, linear warm-up and cosine decay. Left out: resume and streaming from disk, which
small corpora do not need.
"""

import random
import sys
import time
from dataclasses import dataclass

import torch

import model as qwen
import parallel
from data.prompts import objects
from data.tokenizer import Tokenizer, copy_files
from kernels import linear_logprob
from lib import distributed, options
from lib.options import Field, UserError, typed


@dataclass
class Config:
    documents: str = "data/tiny/documents.jsonl"  # JSONL with `text`
    tokenizer: str = "data/tiny/base"  # folder with tokenizer.json
    out: str = ""  # folder for the Hugging Face checkpoint
    hidden_size: int = 128  # this and the next eight are fields of model.ModelConfig
    intermediate_size: int = 384  # of an MLP
    num_hidden_layers: int = 4  # of attention and MLP
    num_attention_heads: int = 4  # of queries
    num_key_value_heads: int = 2  # shared by several queries each
    max_position_embeddings: int = 2048  # tokens of the context
    rope_theta: float = 10000.0  # base of the angular frequencies
    head_dim: int = 0  # of queries, keys and values; 0: hidden_size / num_attention_heads
    qk_norm: bool = False  # true: Qwen3
    row_tokens: int = 1024  # of documents in a row
    rows_per_step: int = 4  # over all ranks
    lr: float = 3e-3  # AdamW, linear warm-up and cosine decay to 5 %
    warmup: int = 100  # steps of linear warm-up
    weight_decay: float = 0.1  # of matrices
    seed: int = 0  # of the weights and of the order of documents
    device: str = "auto"  # auto, cpu or cuda


def pack_documents(documents: list[list[int]], row_tokens: int, seed: int) -> list[list[list[int]]]:
    """Shuffles documents and cuts their stream into rows of exactly `row_tokens` tokens; a row is a list of
    pieces.

    A document that crosses a row's end is continued in the next row as a piece of its own. The last,
    incomplete row is dropped.
    """
    shuffled = list(documents)
    random.Random(seed).shuffle(shuffled)
    rows, row, room = [], [], row_tokens
    for document in shuffled:
        while document:
            piece, document = document[:room], document[room:]
            row.append(piece)
            room -= len(piece)
            if room == 0:
                rows.append(row)
                row, room = [], row_tokens
    return rows


def run(config: Config):
    options.check_numbers(config, "row_tokens rows_per_step", "lr warmup weight_decay")
    typed(vars(config), "command line", {k: v for k, v in qwen.FIELDS.items() if k in vars(config)})
    options.check_choices(config, device=options.DEVICES)
    if not config.out:
        raise UserError("--out is missing: give a folder for the checkpoint")
    world = distributed.setup(config.device)
    if config.rows_per_step % world.size:
        raise UserError(f"rows_per_step {config.rows_per_step} does not divide by {world.size} ranks")
    tokenizer = Tokenizer(config.tokenizer)
    documents = [typed(record, f"{config.documents}, line {line}", {"text": Field(str)})["text"]
                 for line, record in objects(config.documents, "documents")]
    documents = [tokenizer.encode(text) + [tokenizer.eos_ids[0]] for text in documents]
    rows = pack_documents(documents, config.row_tokens, config.seed)
    steps = len(rows) // config.rows_per_step
    shape = {name: x for name, x in vars(config).items() if name in qwen.ModelConfig.__dataclass_fields__}
    model = qwen.Qwen2(qwen.ModelConfig(vocab_size=tokenizer.n_valid, tie_word_embeddings=True,
                                        **shape)).init_weights_(config.seed)
    parallel.shard(model.to(world.device), world)
    optimizer = parallel.adamw(model, config.lr, config.weight_decay)
    start = time.perf_counter()
    for step in range(steps):
        first = step * config.rows_per_step
        local = rows[first:first + config.rows_per_step][world.rank::world.size]
        pieces = [piece for row in local for piece in row if len(piece) > 1]
        tokens = torch.tensor([t for piece in pieces for t in piece], device=world.device)
        targets = torch.tensor([t for piece in pieces for t in piece[1:] + [-1]], device=world.device)
        keep = targets >= 0
        count = distributed.total({"tokens": keep.sum().item()}, world)["tokens"]
        hidden = model(tokens, qwen.packed([len(piece) for piece in pieces], world.device))
        logp, _ = linear_logprob(hidden[keep], model.head_weight, targets[keep])
        loss = -logp.sum() / count
        loss.backward()
        parallel.step_(model, optimizer, parallel.warmup_cosine(step, steps, config.warmup, config.lr))
        if step % 100 == 0 or step == steps - 1:
            mean = distributed.total({"loss": loss.item()}, world)["loss"]
            if world.main:
                print(f"step {step + 1}/{steps}  loss {mean:.3f}  {time.perf_counter() - start:.0f} s",
                      flush=True)
    parallel.save_sharded(model, config.out, world)
    if world.main:
        copy_files(config.tokenizer, config.out)


@options.command
def main():
    run(options.parse(Config, sys.argv[1:], __doc__))


if __name__ == "__main__":
    main()
