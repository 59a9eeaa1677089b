"""The reward model of the writing reward: Qwen2.5 or Qwen3 with a scalar head, public or made by
scripts/train_rm.py. It reads the request and the answer body, never the thinking, and is sharded over all
ranks.

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
from lib.console import tracked
from lib.offload import Offloaded
from lib.options import UserError
from model import SCORER, ModelConfig, RewardModel, check_tensors, packed, read_config


def encode(tokenizer: Tokenizer, query: str, answer: str, max_tokens: int) -> tuple[list[int], bool]:
    """Ids of `<|user|>: {query} <|assistant|>: {answer}` with the end of text, and whether they were cut. If
    the tokenizer's texts end as chats do, ids of a chat, which public reward models read. Ids beyond
    max_tokens are removed from the middle of the answer (and of a query longer than half of them)."""
    before, answer, end = frame(query), " " + answer, tokenizer.eos_ids[:1]
    if tokenizer.chats:
        before, answer = tokenizer.chat(query, think=not tokenizer.thinks), answer[1:]
        end = tokenizer.encode("<|im_end|>\n")
    asked, written, most = tokenizer.encode(before), tokenizer.encode(answer), max_tokens - len(end)
    head = without_middle(asked, max_tokens // 2) if len(asked) + len(written) > most else asked
    body = without_middle(written, most - len(head))
    return head + body + end, len(head) + len(body) < len(asked) + len(written)


def without_middle(ids: list[int], most: int) -> list[int]:
    """At most `most` ids, from the start and the end."""
    return ids if len(ids) <= most else ids[:most - most // 2] + ids[len(ids) - most // 2:]


def micro_batches(lengths: list[list[int]], config, budget: int, ranks: int) -> list[list[list[int]]]:
    """Packs sequences, or pairs of sequences, given by their lengths, into rounds of one micro-batch per rank
    with about equal flops (grpo.pack)."""
    flops = [sum(n * config.flops_per_token(n // 2) for n in unit) for unit in lengths]
    return grpo.pack(list(range(len(lengths))), list(map(sum, lengths)), flops, budget, ranks)


def forward(model: RewardModel, rows: list[list[int]], device) -> torch.Tensor:
    """score_S of a micro-batch. Without rows it runs on one token, to keep the ranks' collectives in step,
    and returns an empty tensor that still has a gradient."""
    ids = rows or [[0]]
    tokens_T = torch.tensor([i for row in ids for i in row], device=device)
    return model(tokens_T, packed([len(row) for row in ids], device))[:len(rows)]


@torch.no_grad()
def scores(model: RewardModel, rows: list[list[int]], budget: int, world) -> list[float]:
    """Scores of this rank's rows of ids. All ranks must call it together; the rows of all are rebalanced over
    the ranks in micro-batches of at most `budget` tokens."""
    gathered = distributed.gather(rows, world)
    first, rows = sum(map(len, gathered[:world.rank])), sum(gathered, [])
    found = dict.fromkeys(range(len(rows)), 0.0)
    rounds = micro_batches([[len(row)] for row in rows], model.config, budget, world.size)
    for parts in tracked(rounds, "reward model", world.main):
        mine = parts[world.rank]
        found |= zip(mine, forward(model, [rows[i] for i in mine], world.device).tolist())
    parallel.reshard(model)
    found = distributed.total(found, world)  # each score is known to one rank
    return [found[i] for i in range(first, first + len(gathered[world.rank]))]


def check(path: str) -> tuple[ModelConfig, Tokenizer]:
    """Shape and tokenizer of a reward model's folder; reads only the headers of its weights. Raises
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
    """A reward model sharded over all ranks, in bf16 on CUDA. known: the result of `check`. offload: keep its
    weights in pinned host memory between calls."""

    def __init__(self, path: str, known: tuple[ModelConfig, Tokenizer], budget: int, world,
                 offload: bool = False):
        self.shape, self.tokenizer = known
        self.budget, self.world = budget, world
        dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
        self.model = parallel.load_sharded(path, world, dtype)
        self.present = Offloaded(self.model) if offload else nullcontext()

    def __call__(self, texts: list[tuple[str, str]]) -> list[float]:
        """Scores of this rank's (query, answer) pairs. All ranks must call it together."""
        most = self.shape.max_position_embeddings
        encoded = [encode(self.tokenizer, *text, most) for text in texts]
        with self.present:
            found = scores(self.model, [ids for ids, _ in encoded], self.budget, self.world)
        cut = distributed.total({"cut": sum(cut for _, cut in encoded)}, self.world)["cut"]
        if cut and self.world.main:
            print(f"warning: {cut:.0f} answers exceed the {most} tokens of the writing model and were scored "
                  "without their middle", file=sys.stderr, flush=True)
        return found
