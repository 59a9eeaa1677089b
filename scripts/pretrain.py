"""Next-token training of Qwen2.5 and Qwen3: continual pretraining, a base from scratch, chats.

    torchrun --nproc_per_node=8 -m scripts.pretrain --model FOLDER --data NAME=FOLDER[:WEIGHT],...
    torchrun --nproc_per_node=8 -m scripts.pretrain --model FOLDER --sft FILE.jsonl

--data are folders of scripts/tokenise.py; without it and --sft, --documents are tokenised in memory. Without
--model a model of the given shape starts from scratch. A step trains rows_per_step rows of row_tokens inputs,
packed, with attention inside documents (data/corpus.py). The run's folder is like that of train.py: the same
command goes on from its last checkpoint, and scripts.curves and scripts.export read it.
"""

import dataclasses
import math
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

import checkpoints
import model as qwen
import parallel
import run
from data import corpus, prompts, sft
from data.tokenizer import Tokenizer, copy_files
from kernels import linear_logprob
from lib import distributed, offload, options
from lib.files import locate
from lib.options import UserError
from lib.schedule import learning_rate
from lib.stop import Stopped, Watch

BUCKETS = {"0-1k": 0, "1-4k": 2**10, "4-16k": 2**12, "16k+": 2**14}  # of positions: where each begins
NO_ROW = corpus.Row(np.array([0]), np.array([-1]), [1])  # keeps the ranks' collectives in step


@dataclass
class Config:
    documents: str = "data/tiny/documents.jsonl"  # JSONL with `text`, read without data and sft
    data: str = ""  # NAME=FOLDER[:WEIGHT],... of tokenised documents; weights are shares of the rows
    sft: str = ""  # JSONL with `messages`, or `prompt` and `response`, read without data
    prompt_style: str = "think"  # of sft: think or direct
    eval_data: str = ""  # NAME=FOLDER,... of tokenised documents, whose rows are all evaluated
    model: str = ""  # checkpoint folder to go on from; empty: from scratch, with tokenizer and shape below
    tokenizer: str = "data/tiny/base"  # folder with tokenizer.json
    hidden_size: int = 128  # this and the next eight are fields of model.ModelConfig
    intermediate_size: int = 384  # of an MLP
    num_hidden_layers: int = 4  # of attention and MLP
    num_attention_heads: int = 4  # of queries
    num_key_value_heads: int = 2  # shared by several queries each
    max_position_embeddings: int = 2048  # tokens of the context
    rope_theta: float = 10000.0  # base of the angular frequencies
    head_dim: int = 0  # of queries, keys and values; 0: hidden_size / num_attention_heads
    qk_norm: bool = False  # true: Qwen3
    out: str = ""  # folder for the Hugging Face checkpoint in fp32; empty: none, scripts.export makes one
    run_dir: str = ""  # folder of the run; empty: a new one under runs/
    resume: str = "auto"  # auto: go on with an unfinished run of this config; true: insist; false: refuse
    steps: int = 0  # optimiser steps; 0: one pass over the data
    row_tokens: int = 1024  # inputs of a row
    rows_per_step: int = 4  # over all ranks
    micro_batch_tokens: int = 16384  # of rows that a rank computes together; at least one row
    lr: float = 3e-3  # AdamW's peak, which decays to 5 % (try 1e-5 to go on from 7B up)
    warmup: int = 100  # steps of linear warm-up
    decay: float = 1.0  # share of the steps, at the end, in which lr decays; until then it is constant
    linear: bool = False  # lr decays linearly; false: as a cosine
    weight_decay: float = 0.1  # of matrices
    max_skipped: int = 3  # steps in a row without a finite gradient that end the run
    replicate: int = 1  # HSDP: copies of the weights, each sharded over its part of the GPUs
    recompute: bool = False  # recompute each layer's activations in backward: less memory, a third more time
    offload_optimizer: bool = False  # AdamW's moments, half of the training state, wait in host memory
    peak_tflops: float = 0.0  # of a GPU in bf16, for the metric mfu; 0: no such metric
    eval_every: int = 500  # steps between evaluations, the first before training
    save_every: int = 500  # steps between checkpoints; the last step is always saved
    keep_checkpoints: int = 2  # newest checkpoints that are kept
    keep_every: int = 0  # every Nth step's checkpoint is kept for good; a multiple of save_every, 0: none
    seed: int = 0  # of the weights and of the order of documents
    device: str = "auto"  # auto, cpu or cuda
    timeout: int = 1800  # seconds that a rank waits for the others before the run ends
    wandb: bool = False  # log to Weights & Biases too (offline without a key)


# ---------------------------------------------------------------------- inputs


def folders(config: Config, option: str, tokenizer: Tokenizer) -> dict[corpus.Corpus, float]:
    """The corpora that an option names, and their weights. Raises UserError."""
    found = {}
    for part in filter(None, getattr(config, option).split(",")):
        m = re.fullmatch(r"([\w.-]+)=(.+?)(?::(\d*\.?\d+))?", part)
        if not m or float(m[3] or 1) == 0 or m[1] in [source.name for source in found]:
            raise UserError(f"{option}: {part!r} must be NAME=FOLDER or NAME=FOLDER:WEIGHT, with a new NAME")
        source = corpus.open_corpus(m[1], Path(m[2]), tokenizer, config.row_tokens, config.seed)
        found[source] = float(m[3] or 1)
    return found


def read_inputs(config: Config, ranks: int) -> SimpleNamespace:
    """Checks the options. Returns what a run reads besides weights: model (a folder), shape, n_valid, sources
    (and their weights in the mixture), held_out sources, record (of it in checkpoints). Raises UserError."""
    options.check_numbers(
        config, "row_tokens rows_per_step micro_batch_tokens max_skipped replicate eval_every save_every "
        "keep_checkpoints timeout", "steps lr warmup weight_decay peak_tflops keep_every", decay=(0, 1))
    options.check_choices(config, device=options.DEVICES, prompt_style=prompts.STYLES,
                          resume=("auto", "true", "false"))
    if config.rows_per_step % ranks or ranks % config.replicate:
        raise UserError(f"rows_per_step {config.rows_per_step} must be a multiple of the {ranks} ranks, and "
                        f"replicate {config.replicate} divide them")
    path, size = locate(config.model or config.tokenizer), (config.row_tokens, config.seed)
    tokenizer = Tokenizer(path)
    shape = qwen.read_config(path) if config.model else qwen.parse_config("command line", vars(config) | {
        "model_type": "qwen3" if config.qk_norm else "qwen2", "vocab_size": tokenizer.n_valid,
        "tie_word_embeddings": True})
    tokenizer.check_rows(shape.vocab_size, path)
    if shape.scalar_head or config.row_tokens > shape.max_position_embeddings:
        raise UserError(f"{path} is a reward model, or row_tokens {config.row_tokens} exceeds the context of "
                        f"{shape.max_position_embeddings}: choose others")
    option = "data" if config.data else "sft" if config.sft else "documents"
    sources = folders(config, "data", tokenizer) or {
        sft.Chats(config.sft, tokenizer, config.prompt_style, *size) if config.sft else
        corpus.in_memory(Path(locate(config.documents)), tokenizer, *size): 1.0}
    held_out = list(folders(config, "eval_data", tokenizer))
    if not all(s.rows for s in [*sources, *held_out]) or sum(s.rows for s in sources) < config.rows_per_step:
        raise UserError(f"{option} {getattr(config, option)}, or eval_data, has too few tokens for a row of "
                        f"row_tokens {config.row_tokens} or rows_per_step {config.rows_per_step}: lower them")
    record = {"model": dataclasses.asdict(shape), option: [checkpoints.digest(s.file) for s in sources]}
    return SimpleNamespace(model=path, shape=shape, n_valid=tokenizer.n_valid, sources=list(sources),
                           weights=list(sources.values()), held_out=held_out, record=record)


# ---------------------------------------------------------------------- loss


def micro_batches(rows: list, config: Config) -> list[list]:
    size = max(1, config.micro_batch_tokens // config.row_tokens)
    return [rows[i:i + size] for i in range(0, len(rows), size)]


def logprobs(model: qwen.Qwen2, rows: list[corpus.Row], n_valid: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(logp_N of the trained targets, position_N of each in its sequence)."""
    device, (tokens, targets, lengths) = model.head_weight.device, zip(*rows)
    tokens_T, targets_T = (torch.from_numpy(np.concatenate(x)).to(device) for x in (tokens, targets))
    attention, trained_T = qwen.packed(sum(lengths, []), device), targets_T >= 0
    hidden_TC = model(tokens_T, attention)
    logp_N, _ = linear_logprob(hidden_TC[trained_T], model.head_weight, targets_T[trained_T], n_valid=n_valid)
    return logp_N, attention.positions_T[trained_T]


def update(model: qwen.Qwen2, optimizer, rows: list[corpus.Row], lr: float, config: Config, n_valid: int,
           world) -> dict[str, float]:
    """One optimiser step on this rank's rows, unless the gradient is not finite; returns sums and metrics.
    The loss is the mean over the tokens of all ranks: neither ranks nor micro-batches change the gradient."""
    flops = 3 * sum(n * model.config.flops_per_token(n // 2) for row in rows for n in row.lengths)
    sums = {"tokens": sum(int((row.targets_T >= 0).sum()) for row in rows), "flops": flops}
    sums, parts, mean = distributed.total(sums, world), micro_batches(rows, config), 0.0
    for part in parts:
        if config.replicate > 1:  # reduce over replicas only once
            model.set_requires_all_reduce(part is parts[-1])
        loss = -logprobs(model, part, n_valid)[0].sum() / sums["tokens"]
        loss.backward()
        mean += loss.item()
    norm = parallel.step_(model, optimizer, lr)
    return sums | distributed.total({"loss": mean}, world) | {
        "lr": lr, "grad_norm": norm, "skipped_updates": int(not math.isfinite(norm))}


@torch.no_grad()
def evaluate(step: int, model: qwen.Qwen2, inputs: SimpleNamespace, config: Config, log: run.Log, world):
    """Logs the loss of each held-out source and its perplexity by position in a sequence, if that is due."""
    if not inputs.held_out or step in log.evaluated or step % config.eval_every and step != config.steps:
        return
    metrics, starts = {}, torch.tensor(list(BUCKETS.values()), device=world.device)
    for source in inputs.held_out:
        rounds = -(-source.rows // world.size)  # of which the last may lack a row for this rank
        local = range(world.rank, rounds * world.size, world.size)
        sums = torch.zeros(2, len(BUCKETS), dtype=torch.float64, device=world.device)
        for part in micro_batches(local, config):
            rows = [source.row(k) if k < source.rows else NO_ROW for k in part]
            logp_N, position_N = logprobs(model, rows, inputs.n_valid)
            bucket_N = torch.bucketize(position_N, starts, right=True) - 1
            sums.index_add_(1, bucket_N, torch.stack((-logp_N, torch.ones_like(logp_N))).double())
        dist.all_reduce(sums)
        loss, tokens = sums.sum(1).tolist()
        metrics[f"eval/loss/{source.name}"] = loss / tokens
        metrics |= {f"eval/perplexity/{source.name}/{bucket}": x for bucket, x in zip(
            BUCKETS, (sums[0] / sums[1]).exp().tolist()) if x == x}
    parallel.reshard(model)
    log.write("", {"step": step, **metrics}, [])
    log.say(f"eval after step {step}: " + "  ".join(f"{name[5:]} {x:.3f}" for name, x in metrics.items()))


# ---------------------------------------------------------------------- the run


def make_model(config: Config, inputs: SimpleNamespace, folder: Path, world) -> qwen.Qwen2:
    """The sharded model to start with. start/ gets what scripts.export needs of one from scratch."""
    if config.model:
        model = parallel.load_sharded(inputs.model, world)
    else:
        model = qwen.Qwen2(inputs.shape).init_weights_(config.seed).to(world.device)
        parallel.shard(model, world)
        if world.main:
            (folder / "start").mkdir(exist_ok=True)
            qwen.write_config(inputs.shape, folder / "start", torch.float32)
            copy_files(inputs.model, folder / "start")
    model.recompute = config.recompute
    return model


def train(config: Config, clock: run.Clock | None = None, watch: Watch | None = None):
    clock = clock or run.Clock()
    world = distributed.setup(config.device, config.timeout, watch, config.replicate)
    with distributed.raise_on_all_ranks(world):
        inputs = read_inputs(config, world.size)
    rows = sum(source.rows for source in inputs.sources)
    config = dataclasses.replace(config, steps=config.steps or rows // config.rows_per_step)
    folder, newest = run.open_run(config, inputs, world)
    log, model = run.Log(folder, config, [], clock, world), make_model(config, inputs, folder, world)
    optimizer = parallel.adamw(model, config.lr, config.weight_decay)
    state = checkpoints.load(newest[0], model, optimizer) if newest else {
        "step": 0, "position": {source.name: 0 for source in inputs.sources}}
    done, position, skipped = state["step"], state["position"], 0
    if config.offload_optimizer:
        offload.offload_(optimizer)
    saver = checkpoints.Checkpoints(folder, model, optimizer, done, config, inputs.record, run.code_hash(),
                                    clock, world)
    log.say(f"{folder}: {inputs.shape.num_parameters:,} parameters, {rows:,} rows of {config.row_tokens} "
            f"tokens, {sum(s.dropped for s in inputs.sources)} longer chats dropped, {world.size} x "
            f"{world.device.type}" + f", resumed after step {done}" * (done > 0))
    try:
        evaluate(done, model, inputs, config, log, world)
        for step in range(done + 1, config.steps + 1):
            clock.begin(step)
            distributed.check_stop(world)
            picked, after = corpus.take(inputs.sources, inputs.weights, position, config.rows_per_step)
            lr = learning_rate(step - 1, config.steps, config.warmup, config.lr, config.decay, config.linear)
            with clock("update"):
                local = [inputs.sources[i].row(k) for i, k in picked[world.rank::world.size]]
                metrics = {"step": step} | update(model, optimizer, local, lr, config, inputs.n_valid, world)
            metrics |= distributed.largest({"time/total": time.perf_counter() - clock.begun[-1]}
                                           | clock.memory(world.device), world)
            metrics["tokens_per_second/train"] = metrics["tokens"] / metrics["time/total"]
            flops = metrics.pop("flops") / metrics["time/total"] / world.size
            if config.peak_tflops:
                metrics["mfu"] = flops / config.peak_tflops / 1e12
            log.write("", metrics, [])
            if step % 10 == 0 or step == config.steps:
                log.say(f"step {step}/{config.steps}  loss {metrics['loss']:.3f}  lr {lr:.1e}  grad "
                        f"{metrics['grad_norm']:.2f}  {metrics['tokens_per_second/train']:,.0f} tok/s")
            done, position = step, after
            skipped = skipped + 1 if metrics["skipped_updates"] else 0
            if skipped >= config.max_skipped:
                raise UserError(f"{skipped} gradients in a row were not finite: lower lr; the same command "
                                f"goes on after step {saver.saved}")
            if saver.due(step) and not skipped:
                saver.save(step, position=position)
            evaluate(step, model, inputs, config, log, world)
    except Stopped as e:
        if watch:
            watch.noticed = True
        if done > saver.saved and not skipped:
            saver.save(done, position=position)
        log.stopped(e, saver.saved)
        raise
    if config.out:
        parallel.save_sharded(model, config.out, world)
        if world.main:
            copy_files(inputs.model, config.out)
    log.wandb.send(lambda run: run.finish())
    log.say(f"done: {folder} holds metrics.jsonl and checkpoints/")


@options.command
def main():
    run.watched(lambda clock, watch: train(options.parse(Config, sys.argv[1:], __doc__), clock, watch))


if __name__ == "__main__":
    main()
