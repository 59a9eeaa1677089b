"""Trains a reward model on preferences: Bradley and Terry's loss on Qwen2.5 or Qwen3 with a scalar head.

    torchrun --nproc_per_node=8 -m scripts.train_rm --model FOLDER --pairs FILE.jsonl --out FOLDER

data/preferences.py says what a line of the files may look like; writing.py, what the model reads of it. A
policy gets a fresh head, a reward model keeps its own. FSDP2 over all ranks, pairs packed by a token budget.
After training it reports on held-out pairs, prints that and writes it to evaluation.json beside the weights;
with --epochs 0 it only reports. Left out: resume, which runs of hours do not need.
"""

import json
import math
import sys
import time
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import model as qwen
import parallel
import reward_model
from data.preferences import Pair, read
from data.prompts import batch
from data.tokenizer import Tokenizer, copy_files
from lib import distributed, options
from lib.options import UserError
from lib.schedule import learning_rate
from text import count_words

BINS = 10  # of predicted probability, in the reliability table
LENGTHS = (0, 50, 100, 300, 1000, 3000, 10000)  # words of a pair's longer side: from where each bucket goes


@dataclass
class Config:
    model: str = "data/tiny/base"  # checkpoint folder: a policy, or a reward model to go on with
    pairs: str = "data/tiny/pairs.jsonl"  # training pairs, JSONL
    eval_pairs: str = "data/tiny/eval_pairs.jsonl"  # held-out pairs; empty: one request in 20 of `pairs`
    out: str = ""  # folder for the Hugging Face checkpoint; with --epochs 0 none is needed
    dtype: str = "bfloat16"  # of the weights as they are saved: bfloat16 or float32
    epochs: int = 1  # passes over the pairs; 0: only the report on held-out pairs
    pairs_per_step: int = 16  # over all ranks
    max_tokens: int = 0  # of a text, or the answer's middle is left out; 0: the model's context
    lr: float = 1e-3  # AdamW, linear warm-up and cosine decay to 5 % (try 1e-5 from 7B up)
    warmup: int = 20  # steps of linear warm-up
    weight_decay: float = 0.01  # of matrices
    centre: float = 0.01  # weight of the squared sum of a pair's scores, which keeps their mean at 0
    micro_batch_tokens: int = 16384  # tokens of a packed micro-batch on each rank; a longer pair stands alone
    recompute: bool = False  # recompute each layer's activations in backward: less memory, a third more time
    seed: int = 0  # of the order of pairs
    device: str = "auto"  # auto, cpu or cuda
    timeout: int = 1800  # seconds that a rank waits for the others


def check(config: Config):
    """Raises UserError."""
    options.check_numbers(config, "pairs_per_step micro_batch_tokens timeout",
                          "epochs max_tokens lr warmup weight_decay centre")
    options.check_choices(config, dtype=("bfloat16", "float32"), device=options.DEVICES)
    if config.epochs and not config.out:
        raise UserError("--out is missing: give a folder for the checkpoint, or --epochs 0 for a report")
    if config.out and Path(config.out).resolve() == Path(config.model).resolve():
        raise UserError(f"out {config.out} is the folder of `model`: choose another")


def split(config: Config) -> tuple[list[Pair], list[Pair], Counter]:
    """(training pairs, held-out pairs, what was dropped); no request is in both parts of one file."""
    training, dropped = read(config.pairs) if config.epochs or not config.eval_pairs else ([], Counter())
    if config.eval_pairs:
        held_out, more = read(config.eval_pairs)
        dropped += more
    else:
        place = [zlib.crc32(pair.query.encode()) % 20 for pair in training]
        held_out = [pair for i, pair in zip(place, training) if i == 0]
        training = [pair for i, pair in zip(place, training) if i]
    if config.epochs and len(training) < config.pairs_per_step:
        raise UserError(f"pairs {config.pairs} has {len(training)} usable pairs, but a step needs "
                        f"pairs_per_step {config.pairs_per_step}")
    if not held_out:
        raise UserError(f"no held-out pair is left of {config.eval_pairs or config.pairs}: give more")
    return training, held_out, dropped


# ---------------------------------------------------------------------- loss


def bradley_terry(chosen_P: torch.Tensor, rejected_P: torch.Tensor, centre: float) -> torch.Tensor:
    """Sum over pairs of -log sigmoid(r_w - r_l) + centre (r_w + r_l)^2. The loss sees differences alone; the
    second term (arXiv 2312.09244) keeps the mean at 0, because the head has no bias to subtract it with."""
    return (centre * (chosen_P + rejected_P).square() - F.logsigmoid(chosen_P - rejected_P)).sum()


def fit(model: qwen.RewardModel, pairs: list[Pair], encode, config: Config, world):
    """Trains the model in place. encode: text of a pair -> ids."""
    optimizer = parallel.adamw(model, config.lr, config.weight_decay)
    steps = config.epochs * (len(pairs) // config.pairs_per_step)
    start, seen = time.perf_counter(), {"loss": 0.0, "right": 0.0, "pairs": 0}
    for step in range(steps):
        rows = [(encode(pair, "chosen"), encode(pair, "rejected"))
                for pair in batch(pairs, config.pairs_per_step, config.seed, step + 1)]
        lengths = [[len(row) for row in both] for both in rows]
        for parts in reward_model.micro_batches(lengths, model.config, config.micro_batch_tokens, world.size):
            part = parts[world.rank]
            score_S = reward_model.forward(model, [row for i in part for row in rows[i]], world.device)
            chosen_P, rejected_P = score_S.view(-1, 2).unbind(1)
            loss = bradley_terry(chosen_P, rejected_P, config.centre)
            (loss / len(rows)).backward()
            seen["loss"] += loss.item()
            seen["right"] += (chosen_P > rejected_P).sum().item()
            seen["pairs"] += len(part)
        lr = learning_rate(step, steps, config.warmup, config.lr)
        if not math.isfinite(parallel.step_(model, optimizer, lr)):
            raise UserError(f"the gradient of step {step + 1} is not finite: lower lr {config.lr}")
        if step % 10 == 9 or step == steps - 1:
            s, seen = distributed.total(seen, world), dict.fromkeys(seen, 0.0)
            if world.main:
                print(f"step {step + 1}/{steps}  loss {s['loss'] / s['pairs']:.3f}  accuracy "
                      f"{s['right'] / s['pairs']:.3f}  {time.perf_counter() - start:.0f} s", flush=True)


# ---------------------------------------------------------------------- report


def report(pairs: list[Pair], chosen: list[float], rejected: list[float]) -> dict:
    """What the scores of both sides say of the model: accuracy (a tie is half right) over all pairs and parts
    of them, calibration, mean and slope.

    Calibration is that of sigmoid(|margin|), the probability that the model gives the side it prefers: a
    table of (probability, accuracy, pairs) by bins, and the expected calibration error, their distance.
    The slope is that of a pair's difference in score on its difference in words, through 0: points that 100
    more words earn at the same request; None where both sides are equally long in all pairs.
    """
    parts, bins = defaultdict(list), defaultdict(list)
    margin_P = np.subtract(chosen, rejected)
    words = [(count_words(p.chosen), count_words(p.rejected)) for p in pairs]
    longer_by_P = np.array([w - v for w, v in words])
    for pair, margin, (w, v) in zip(pairs, margin_P.tolist(), words):
        right = 0.5 if margin == 0 else float(margin > 0)
        low = max(x for x in LENGTHS if x <= max(w, v))
        longer = "neither" if w == v else "chosen" if w > v else "rejected"
        kinds = [f"kind/{pair.kind}"] if pair.kind else []
        for name in ("all", *kinds, f"words/{low}+", f"longer/{longer}"):
            parts[name].append(right)
        probability = 1 / (1 + math.exp(-abs(margin)))
        bins[min(BINS - 1, int((2 * probability - 1) * BINS))].append((probability, right))
    table = [(*np.mean(b, 0).tolist(), len(b)) for _, b in sorted(bins.items())]
    squares = float(longer_by_P @ longer_by_P)
    return {
        "pairs": len(pairs), "accuracy": {k: [sum(v) / len(v), len(v)] for k, v in sorted(parts.items())},
        "calibration_error": sum(abs(p - r) * n for p, r, n in table) / len(pairs), "reliability": table,
        "mean_score": float(np.mean([chosen, rejected])),
        "slope_per_100_words": 100 * float(margin_P @ longer_by_P) / squares if squares else None,
    }


def shown(r: dict) -> str:
    rows = [f"{name:28}{accuracy:8.3f}{n:8}" for name, (accuracy, n) in r["accuracy"].items()]
    slope = r["slope_per_100_words"]
    return "\n".join([
        f"{'held-out pairs':28}accuracy   pairs", *rows,
        f"expected calibration error {r['calibration_error']:.3f}; mean score {r['mean_score']:+.3f}",
        "100 more words of a pair's side: " + ("none is longer" if slope is None else f"{slope:+.3f}")])


def evaluate(model: qwen.RewardModel, pairs: list[Pair], encode, config: Config, world) -> dict:
    """The report on pairs. The main rank encodes them, all ranks score."""
    rows = [encode(pair, side) for pair in pairs if world.main for side in ("chosen", "rejected")]
    scores = distributed.broadcast(reward_model.scores(model, rows, config.micro_batch_tokens, world), world)
    return report(pairs, scores[::2], scores[1::2])


# ---------------------------------------------------------------------- the run


def run(config: Config) -> dict:
    check(config)
    world = distributed.setup(config.device, config.timeout)
    shape, tokenizer = qwen.read_config(config.model), Tokenizer(config.model)
    tokenizer.check_rows(shape.vocab_size, config.model)
    if config.max_tokens > shape.max_position_embeddings:
        raise UserError(f"max_tokens {config.max_tokens} exceeds the model's context of "
                        f"{shape.max_position_embeddings}")
    training, held_out, dropped = split(config)
    saved = config.out if config.epochs else ""
    with distributed.raise_on_all_ranks(world):  # before the training, not after it
        try:
            if saved and world.main:
                Path(saved).mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"out {saved} cannot be written ({e}): choose another") from None
    model = parallel.load_sharded(config.model, world, scalar_head=True)
    model.recompute = config.recompute
    most, cut = config.max_tokens or shape.max_position_embeddings, set()

    def encode(pair: Pair, side: str) -> list[int]:
        ids, was_cut = reward_model.encode(tokenizer, pair.query, getattr(pair, side), most)
        cut.update([(pair, side)] * was_cut)
        return ids

    if world.main:
        notes = [f"{n} {why} dropped" for why, n in dropped.items()]
        print(f"{config.model}: {len(training)} pairs to train, {len(held_out)} held out",
              *notes, sep=", ", flush=True)
    fit(model, training, encode, config, world)
    found = evaluate(model, held_out, encode, config, world)
    if saved:
        parallel.save_sharded(model, saved, world, getattr(torch, config.dtype))
        if world.main:
            copy_files(config.model, saved)
            (Path(saved) / "evaluation.json").write_text(json.dumps(found, indent=2) + "\n")
    if world.main:
        print(shown(found), f"{len(cut)} texts were longer than {most} tokens and read without their middle",
              sep="\n", flush=True)
    return found


@options.command
def main():
    run(options.parse(Config, sys.argv[1:], __doc__))


if __name__ == "__main__":
    main()
