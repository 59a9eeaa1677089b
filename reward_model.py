"""Writing quality by a model: Qwen2.5 or Qwen3 with a scalar head, public or made by scripts/train_rm.py.

It reads a request and the body of an answer, never the thinking, and is sharded over the ranks that train.

Shapes: T tokens of a micro-batch, S sequences in it.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import torch

import grpo
import parallel
from data.prompts import frame
from data.tokenizer import Tokenizer
from lib import distributed
from lib.options import UserError
from model import SCORER, ModelConfig, RewardModel, check_tensors, packed, read_config


def encode(tokenizer: Tokenizer, query: str, answer: str, max_tokens: int) -> tuple[list[int], bool]:
    """Ids of `<|user|>: {query} <|assistant|>: {answer}` and the end of text, or of a chat if the tokenizer's
    texts end so, as public reward models read; and whether they were cut: what exceeds max_tokens is taken
    from the middle of the answer (and of a query that fills half of them)."""
    before, answer, end = frame(query), " " + answer, tokenizer.eos_ids[:1]
    if tokenizer.chats:
        before, answer = tokenizer.chat(query, think=not tokenizer.thinks), answer[1:]
        end = tokenizer.encode("<|im_end|>\n")
    asked, written, most = tokenizer.encode(before), tokenizer.encode(answer), max_tokens - len(end)
    head = without_middle(asked, max_tokens // 2) if len(asked) + len(written) > most else asked
    body = without_middle(written, most - len(head))
    return head + body + end, len(head) + len(body) < len(asked) + len(written)


def without_middle(ids: list[int], most: int) -> list[int]:
    """At most so many ids, of the beginning and of the end."""
    return ids if len(ids) <= most else ids[:most - most // 2] + ids[len(ids) - most // 2:]


def micro_batches(lengths: list[list[int]], config, budget: int, ranks: int) -> list[list[list[int]]]:
    """Rounds of one micro-batch for each rank, of about equal flops (grpo.pack), out of sequences or pairs of
    them, given by their lengths."""
    flops = [sum(n * config.flops_per_token(n // 2) for n in unit) for unit in lengths]
    return grpo.pack(list(range(len(lengths))), list(map(sum, lengths)), flops, budget, ranks)


def forward(model: RewardModel, rows: list[list[int]], device) -> torch.Tensor:
    """score_S of a micro-batch. No rows make one of one token, which keeps the collectives in step, and no
    scores, on which a gradient still depends."""
    ids = rows or [[0]]
    tokens_T = torch.tensor([i for row in ids for i in row], device=device)
    return model(tokens_T, packed([len(row) for row in ids], device))[:len(rows)]


@torch.no_grad()
def scores(model: RewardModel, rows: list[list[int]], budget: int, world) -> list[float]:
    """The score of each of this rank's rows of ids. All ranks enter together, each with its own; each then
    scores as many micro-batches of at most `budget` tokens, whoever's rows they are."""
    everyone = distributed.gather(rows, world)
    first, rows = sum(map(len, everyone[:world.rank])), sum(everyone, [])
    found = dict.fromkeys(range(len(rows)), 0.0)
    for parts in micro_batches([[len(row)] for row in rows], model.config, budget, world.size):
        mine = parts[world.rank]
        found |= zip(mine, forward(model, [rows[i] for i in mine], world.device).tolist())
    parallel.reshard(model)
    found = distributed.total(found, world)  # of each score one rank knows
    return [found[i] for i in range(first, first + len(everyone[world.rank]))]


def check(path: str) -> tuple[ModelConfig, Tokenizer]:
    """Shape and tokenizer of a reward model's folder, of whose weights only headers are read. Raises
    UserError."""
    if not Path(path, "config.json").exists():
        raise UserError(f"reward_model: {path}/config.json does not exist: give a reward model's "
                        "folder or the addresses of servers, or leave the reward out with --reward")
    shape = read_config(path)
    if not shape.scalar_head:
        raise UserError(f"reward_model {path} is no reward model: its config.json must name Qwen2{SCORER} "
                        f"or Qwen3{SCORER}; or leave the reward out with --reward")
    check_tensors(shape, path)
    tokenizer = Tokenizer(path)
    tokenizer.check_rows(shape.vocab_size, path)
    return shape, tokenizer


class Scorer:
    """A reward model over all ranks, in bf16 on CUDA, of which `known` is what `check` found.
    offload: between calls its weights wait in pinned host memory."""

    def __init__(self, path: str, known: tuple[ModelConfig, Tokenizer], budget: int, world,
                 offload: bool = False):
        self.shape, self.tokenizer = known
        self.budget, self.world = budget, world
        dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
        self.model = parallel.load_sharded(path, world, dtype)
        self.present = offload.Offloaded(self.model) if offload else nullcontext()

    def __call__(self, texts: list[tuple[str, str]]) -> list[float]:
        """The score of each (query, answer) of this rank. All ranks enter together."""
        most = self.shape.max_position_embeddings
        encoded = [encode(self.tokenizer, *text, most) for text in texts]
        with self.present:
            found = scores(self.model, [ids for ids, _ in encoded], self.budget, self.world)
        cut = distributed.total({"cut": sum(cut for _, cut in encoded)}, self.world)["cut"]
        if cut and self.world.main:
            print(f"warning: {cut:.0f} answers exceed the {most} tokens of the writing model and were scored "
                  "without their middle", file=sys.stderr, flush=True)
        return found
