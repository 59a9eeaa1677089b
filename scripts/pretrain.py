"""Next-token pretraining on JSONL documents: what makes the base of the embedded default.

    torchrun --nproc_per_node=2 -m scripts.pretrain --documents FILE.jsonl --tokenizer FOLDER --out FOLDER

Documents ({"text": ...}) are tokenised, ended, and packed into rows of one length; attention stays inside a
document. One epoch, AdamW, linear warm-up and cosine decay. Left out: resume and streaming from disk, which
small corpora do not need.
"""

import argparse
import dataclasses
import json
import random
import time
from dataclasses import dataclass

import torch

import model as qwen
import parallel
from data.tokenizer import Tokenizer, copy_files
from kernels import linear_logprob


@dataclass
class Config:
    documents: str = "data/tiny/documents.jsonl"  # JSONL with `text`
    tokenizer: str = "data/tiny/base"  # folder with tokenizer.json
    out: str = ""  # folder for the Hugging Face checkpoint
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    row_tokens: int = 1024
    rows_per_step: int = 4  # global
    lr: float = 3e-3
    warmup: int = 100  # steps
    weight_decay: float = 0.1
    seed: int = 0
    device: str = "auto"


def pack_documents(documents: list[list[int]], row_tokens: int, seed: int) -> list[list[list[int]]]:
    """Shuffles documents and cuts their stream into rows of exactly `row_tokens` tokens; a row is a list of
    pieces.

    A document that crosses a row's end is continued in the next row as a piece of its own. The last,
    incomplete row is dropped.
    """
    if row_tokens < 1:
        raise ValueError(f"row_tokens must be at least 1, not {row_tokens}")
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
    world = parallel.setup(config.device)
    if config.rows_per_step % world.size:
        raise ValueError(f"rows_per_step {config.rows_per_step} does not divide by {world.size} ranks")
    tokenizer = Tokenizer(config.tokenizer)
    with open(config.documents) as f:
        documents = [tokenizer.encode(json.loads(line)["text"]) + [tokenizer.eos_ids[0]] for line in f]
    rows = pack_documents(documents, config.row_tokens, config.seed)
    steps = len(rows) // config.rows_per_step
    shape = {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(qwen.ModelConfig) if hasattr(config, f.name)
    }
    model = qwen.Qwen2(qwen.ModelConfig(vocab_size=tokenizer.n_valid, tie_word_embeddings=True,
                                        **shape)).init_weights_(config.seed)
    parallel.shard(model.to(world.device), world)
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=config.lr,
        betas=(0.9, 0.95),
        fused=True)
    start = time.perf_counter()
    for step in range(steps):
        first = step * config.rows_per_step
        pieces = [
            piece for row in rows[first:first + config.rows_per_step][world.rank::world.size] for piece in row
            if len(piece) > 1
        ]
        tokens = torch.tensor([t for piece in pieces for t in piece], device=world.device)
        targets = torch.tensor([t for piece in pieces for t in piece[1:] + [-1]], device=world.device)
        keep = targets >= 0
        count = parallel.total({"tokens": keep.sum().item()}, world)["tokens"]
        hidden = model(tokens, qwen.packed([len(piece) for piece in pieces], world.device))
        logp, _ = linear_logprob(hidden[keep], model.head_weight, targets[keep])
        loss = -logp.sum() / count
        loss.backward()
        parallel.clip_grad_(model, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = parallel.warmup_cosine(step, steps, config.warmup, config.lr)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            mean = parallel.total({"loss": loss.item()}, world)["loss"]
            if world.main:
                print(f"step {step + 1}/{steps}  loss {mean:.3f}  {time.perf_counter() - start:.0f} s",
                      flush=True)
    parallel.save_sharded(model, config.out, world)
    if world.main:
        copy_files(config.tokenizer, config.out)
    parallel.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for field in dataclasses.fields(Config):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    config = Config(**vars(parser.parse_args()))
    if not config.out:
        parser.exit(2, "error: --out is missing: give a folder for the checkpoint\n")
    run(config)
