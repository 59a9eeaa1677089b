"""What a run needs, before it is started: memory of a GPU, buffer by buffer, and the time of each phase.

    python -m scripts.plan --config configs/qwen2.5-32b.json --nodes 8 [--gpus 8] [--gpu_memory 80]
    python -m scripts.plan --job pretrain --model Qwen2.5-7B --row_tokens 32768 --billion_tokens 1

Loads nothing, and needs neither the GPUs nor the checkpoint. Bytes follow from what the code allocates;
tests/test_plan.py holds them against torch's own memory tracker. Seconds follow from RATES.

Shapes: T tokens of a micro-batch, C hidden, M intermediate. FSDP gathers a layer at a time; embedding, norm
and head together are its root.
"""

import inspect
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

import rewards
import rollout
import train
from kernels.logprob import CHUNK_BYTES, KEPT_BYTES
from lib import distributed, options, scoring
from lib.files import locate
from lib.options import UserError
from model import ModelConfig, build, read_config
from replica import check_tp, tp_slice
from sampler import Sampler, max_pages, workspace
from scheduler import Request, Scheduler

GIB = 2**30
# Assumed: CUDA's context, NCCL's buffers and what the label of a GPU rounds up; or Python and torch.
RESERVE = {"cuda": 3 * GIB, "cpu": GIB // 2}
SLACK = 0.05  # assumed: share of an update's GPU memory that the allocator holds and cannot use
SAMPLER = {name: p.default for name, p in inspect.signature(Sampler).parameters.items()}

SHAPES = {  # of folders that are not there yet
    "Qwen2.5-0.5B": ModelConfig(151936, 896, 4864, 24, 14, 2, tie_word_embeddings=True),
    "Qwen2.5-1.5B": ModelConfig(151936, 1536, 8960, 28, 12, 2, tie_word_embeddings=True),
    "Qwen2.5-3B": ModelConfig(151936, 2048, 11008, 36, 16, 2, tie_word_embeddings=True),
    "Qwen2.5-7B": ModelConfig(152064, 3584, 18944, 28, 28, 4),
    "Qwen2.5-14B": ModelConfig(152064, 5120, 13824, 48, 40, 8),
    "Qwen2.5-32B": ModelConfig(152064, 5120, 27648, 64, 40, 8),
    "Qwen2.5-72B": ModelConfig(152064, 8192, 29568, 80, 64, 8),
    **{f"Qwen3-{size}": ModelConfig(151936, *shape, 8, 40960, tie_word_embeddings=tied, head_dim=128,
                                    qk_norm=True)
       for size, tied, *shape in (
           ("0.6B", True, 1024, 3072, 28, 16), ("1.7B", True, 2048, 6144, 28, 16),
           ("4B", True, 2560, 9728, 36, 32), ("8B", False, 4096, 12288, 36, 32),
           ("14B", False, 5120, 17408, 40, 40), ("32B", False, 5120, 25600, 64, 64))},
}

RATES = {  # of a GPU, or of a process on a CPU, and where each is from: put in what you measure
    "cuda": {"flops": (0.4 * 989e12, "a second: 0.4, assumed, of an H100 SXM's data sheet"),
             "memory": (0.6 * 3.35e12, "bytes a second: 0.6, assumed, of an H100 SXM's data sheet"),
             "inside a node": (200e9, "bytes a second: assumed"),
             "across nodes": (40e9, "bytes a second: assumed, for 400 Gb/s a GPU"),
             "layer": (40e-6, "seconds of a decoding step that nothing overlaps: assumed")},
    "cpu": {"flops": (4e10, "a second: measured, the embedded default on a core"),
            "memory": (1e10, "bytes a second: measured, bench/results/sampler.json"),
            "inside a node": (1e9, "bytes a second: assumed"), "across nodes": (1e8, "the same"),
            "layer": (1.5e-3, "seconds of a decoding step: measured, the embedded default on a core")},
}


SAVES = {  # options that need less memory in a phase; those of "sample" hold for any other one too
    "update": "recompute, offload_activations, fewer micro_batch_tokens, offload_optimizer, "
              "offload_reward_model and more nodes",
    "score": "fewer micro_batch_tokens, offload_optimizer and more nodes",
    "sample": "tp, offload_optimizer, offload_reward_model and more nodes",
    "next token": "recompute, fewer micro_batch_tokens, offload_optimizer and more nodes",  # all phases
}


@dataclass(frozen=True)
class Machine:
    gpus: int = 0  # GPUs of a node, or processes where there are none; 0: 8, or 1
    nodes: int = 1  # nodes
    gpu_memory: float = 0.0  # GiB of a GPU, or of a node without; 0: 80, or what this machine has
    prompt_tokens: int = 512  # of the longest prompt, with its template
    job: str = "rl"  # train.py; or scripts/: pretrain, sft (--sft of pretrain) or train_rm
    row_tokens: int = 1024  # of those jobs: the longest row or text, which attends to itself
    billion_tokens: float = 1.0  # of those jobs: trained in all


@dataclass
class Plan:
    """Bytes of one rank, in dicts from a buffer's name to its size."""

    config: object  # train.Config
    machine: Machine
    shape: ModelConfig
    cuda: bool = True
    scorer: ModelConfig | None = None  # of the writing reward, where its folder is there

    def __post_init__(self):
        config, machine, total = self.config, self.machine, int(self.machine.gpu_memory * GIB)
        self.device = "cuda" if self.cuda else "cpu"
        self.rate = {name: number for name, (number, _) in RATES[self.device].items()}
        self.ranks = machine.gpus * machine.nodes
        self.shards = max(1, self.ranks // config.replicate)  # ranks that share one copy of the weights
        self.room = total // (1 if self.cuda else machine.gpus) - RESERVE[self.device]  # bytes for a rank
        self.itemsize = 2 if self.cuda else 4  # bytes of a number that the trainer computes with
        self.rl = machine.job == "rl"
        self.longest = machine.prompt_tokens + config.max_new_tokens if self.rl else machine.row_tokens
        self.tokens = max(config.micro_batch_tokens, self.longest)  # a sample above the budget stands alone
        self.samples = config.prompts_per_step * config.group_size * config.tp // self.ranks  # of a sampler
        self.rows = min(config.max_sequences, self.samples)
        self.columns = -(-self.longest // config.page_size)  # pages of the longest sample
        self.sampler_dtype = rollout.sampler_dtype(config, torch.device(self.device))
        self.page_bytes = config.page_size * self.shape.kv_bytes_per_token(self.sampler_dtype) // config.tp
        self.scorer_bytes = self.itemsize * self.scorer.num_parameters // self.shards if self.scorer else 0
        with torch.device("meta"):  # the root and layer 0: all layers are alike
            self.parameters = dict(build(replace(self.shape, num_hidden_layers=1)).named_parameters())

    def shard(self, name: str, rank: int = 0) -> torch.Size:
        """Shape of a rank's part of a parameter: FSDP cuts rows as torch.chunk does."""
        rows, *rest = self.parameters[name].shape
        each = -(-rows // self.shards)
        return torch.Size((min(max(rows - rank * each, 0), each), *rest))

    def numbers(self, unit: str = "", rank: int = 0) -> int:
        """In a rank's shards of a "layer", of the "root", or of all. FSDP pads every rank's to rank 0's."""
        if not unit:
            return self.numbers("root", rank) + self.shape.num_hidden_layers * self.numbers("layer", rank)
        return sum(self.shard(name, rank).numel() for name in self.parameters
                   if (".layers." in name) == (unit == "layer"))

    # ---- trainer

    def persistent(self, rank: int = 0) -> dict[str, int]:
        """What stays from phase to phase; gradients stay for an update."""
        config, size = self.config, self.sampler_dtype.itemsize
        slices = {name: tp_slice(name, p, 0, config.tp).numel() * (
            self.shape.num_hidden_layers if ".layers." in name else 1) for name, p in self.parameters.items()}
        products = sum(n for name, n in slices.items() if name.endswith("_proj.weight"))
        return {
            "weights, fp32": 4 * self.numbers(),
            "AdamW's moments, fp32": 8 * self.numbers(rank=rank) * (not config.offload_optimizer),
            "gradients, fp32": 4 * self.numbers(),
            "reference's weights, fp32": 4 * self.numbers() * (config.beta > 0),
            "reward model's weights": self.scorer_bytes * (not config.offload_reward_model),
            "sampler's weights": size * sum(slices.values()) * self.rl,
            "sampler's weights, packed": size * products * (not self.cuda and self.rl),
        }

    def pinned(self) -> int:
        """Host memory of a node that holds what is offloaded."""
        config, inputs = self.config, self.shape.num_hidden_layers * self.tokens * self.shape.hidden_size
        return self.machine.gpus * (8 * self.numbers() * config.offload_optimizer +
                                    self.itemsize * inputs * config.offload_activations +
                                    self.scorer_bytes * config.offload_reward_model)

    def scoring(self) -> dict[str, int]:
        """Of the reward model at work on a micro-batch: embedding and two layers are whole; beside its input
        a layer has its norm's output and queries, or gate, silu of it and up."""
        shape = self.scorer
        embedding = shape.vocab_size * shape.hidden_size
        layer = (shape.num_parameters - embedding) // shape.num_hidden_layers
        return {"reward model's weights": self.scorer_bytes,
                "reward model, gathered": self.itemsize * (embedding + 2 * layer),
                "reward model's activations": self.itemsize * self.tokens * (
                    2 * shape.hidden_size + shape.query_size + 3 * shape.intermediate_size)}

    def layer_activations(self) -> int:
        """What autograd keeps of a layer, its input included.

        T x C: the input, both norms' outputs, the sum in the middle. T x H D: queries, attention's output.
        Keys and values. T x M: gate, silu of it, up, their product. In fp32 attention's log-sum-exp and 1/rms
        of two norms. On a CPU also both norms before their weight, and attention before sequences are joined.
        Norms of queries and keys keep their inputs, 1/rms, and on a CPU what they are before their weight.
        """
        shape, heads = self.shape, self.shape.num_attention_heads + self.shape.num_key_value_heads
        wide = (2 if self.cuda else 3) * (2 * shape.hidden_size + shape.query_size)
        wide += 2 * shape.num_key_value_heads * shape.head_dim + 4 * shape.intermediate_size
        wide += shape.qk_norm * (1 if self.cuda else 2) * heads * shape.head_dim
        return self.tokens * (self.itemsize * wide + 4 * (
            shape.num_attention_heads + shape.qk_norm * heads) + 8)

    def moments(self) -> dict[str, dict[str, int]]:
        """The moments of an update in which memory can peak: buffers beside the persistent ones."""
        config, shape, b = self.config, self.shape, self.itemsize
        fsdp = self.cuda or self.ranks > 1  # else gradients are added to where they stay: no copies
        layers, layer = shape.num_hidden_layers, fsdp * self.shards * self.numbers("layer")
        root, embedding = fsdp * self.shards * self.numbers("root"), b * shape.vocab_size * shape.hidden_size
        head = embedding * (not shape.scalar_head)
        added = shape.tie_word_embeddings and not self.cuda  # the embedding's gradient, to the head's
        c, m = (b * self.tokens * size for size in (shape.hidden_size, shape.intermediate_size))
        whole, offloaded = self.layer_activations(), config.recompute and config.offload_activations
        kept = 0 if offloaded else c if config.recompute else whole
        what = "inputs of the layers" if config.recompute else "activations of the layers"
        around = 8 * self.tokens * shape.head_dim + 2 * c * offloaded  # cos and sin; inputs on their way
        all_kept = {what: layers * kept + around + c * (1 if self.cuda else 2)}  # and the final norm's
        gathered = {"embedding and head, gathered": b * root}
        if config.beta:
            gathered["embedding and head of the reference, gathered"] = b * root
        exponentials = 4 * self.tokens * shape.vocab_size * (not shape.scalar_head)
        chunk = min(CHUNK_BYTES[self.device], exponentials)
        sums = 4 * c // b * (not shape.scalar_head)  # T x C in fp32, and again while a chunk is added
        if self.cuda:
            logits = max(2 * sums + chunk // 2, sums + 3 * chunk // 2)
        elif exponentials <= KEPT_BYTES:
            logits = exponentials + 2 * sums + chunk
        else:
            logits = max(2 * sums + chunk, 2 * chunk - head - 2 * c)  # in backward, in forward
        # In a layer's backward the gradient of the layer above is still in reduction. The first to run has
        # none above it, but all layers' activations.
        above = layers > 1 and 4 * layer > kept
        moments = {
            "logprobs": gathered | all_kept | {
                "hidden states and their gradient": 3 * c, "head's gradient": head,
                "logits, in chunks": logits},
            # In its MLP: the product is gone; gradients of product, silu and up are there, and the matrix'.
            "backward of a layer": gathered | {
                what: (layers - 1 - above) * kept + around, "activations of one layer": whole - m,
                "gradients of activations": c + 3 * m, "layer, gathered": b * layer,
                "next layer, in the gathering": b * layer * (self.shards > 1 and layers > 1),
                "gradient of a matrix": b * shape.hidden_size * shape.intermediate_size,
                "layer's gradient, in reduction": 4 * layer * above, "head's gradient": head * fsdp},
            "backward of the embedding": gathered | {
                "embedding's and head's gradient": embedding + head * (fsdp - added),
                "layer's gradient, in reduction": 4 * layer,
                "gradients of activations": c},
            "end of backward": {
                "embedding's and head's gradient": b * root * (self.shards > 1),
                "the same, in reduction": 4 * root * (1 if self.shards > 1 else 3 - (self.ranks == 1))},
            "optimizer": {
                "gradient's norm, fp64": 16 * min(2**22, max(self.shard(n).numel() for n in self.parameters)),
                "AdamW's moments, on their way": 8 * self.numbers() * config.offload_optimizer},
        }
        if config.beta:
            moments["logprobs of the reference"] = gathered | all_kept | {
                "hidden states": 2 * c, "layers, gathered": 3 * b * layer,
                "activations of one layer": 3 * c + 4 * m, "logits, in chunks": 3 * chunk}
        return moments

    def phases(self) -> dict[str, dict[str, int]]:
        """The buffers of each phase at its peak, without the KV pool, which takes what is left."""
        stays = self.persistent()
        idle = {k: v for k, v in stays.items() if not k.startswith("gradients")}
        update = {k: v for k, v in stays.items() if k != "sampler's weights"}  # which publish brings back
        units = self.shards * self.numbers("layer") * 2, self.shape.vocab_size * self.shape.hidden_size
        handoff = {"handoff, at most": self.sampler_dtype.itemsize * max(units)}
        update |= max(self.moments().values(), key=lambda buffers: sum(buffers.values()))
        update["unusable, of the allocator"] = int(SLACK * sum(update.values()) * self.cuda)
        load = {k: v for k, v in idle.items() if not k.startswith("AdamW")} | handoff
        if not self.rl:
            return {"load": load, "update": update}
        beside = workspace(self.shape, self.config.tp, SAMPLER["token_budget"], self.rows, self.longest)
        score = {"score": idle | self.scoring()} if self.scorer else {}  # the KV pool is not there then
        return {"load": load, "sample": idle | {"workspace of decoding": beside * self.cuda}, **score,
                "update": update, "publish": idle | handoff}

    # ---- sampler

    @cached_property
    def pages(self) -> int:
        """Of the KV pool, as `Sampler.affordable` counts them."""
        buffers = self.phases()["sample"]
        beside = buffers.pop("workspace of decoding")
        free = self.room - sum(buffers.values()) if self.cuda else self.machine.gpu_memory * GIB / (
            2 * self.machine.gpus)
        room = SAMPLER["memory"] * free - beside
        return max(0, min(max_pages(self.rows, self.columns), int(room) // self.page_bytes))

    def rehearse(self, full: bool) -> dict[str, float]:
        """A step's sampling by the real scheduler, with some tokens for one. full: every sample has all its
        tokens, as expected; else groups expect 1/8 of them to all, and samples are up to 40 % off."""
        config, rng, unit = self.config, random.Random(0), max(self.config.page_size, self.longest // 128)
        most, requests, ends = -(-config.max_new_tokens // unit), [], {}
        prompt = max(1, -(-self.longest // unit) - most)
        for i in range(self.samples // config.group_size):
            expected = most if full else max(1, int(most * rng.uniform(1 / 8, 1)))
            ends |= {(i, j): min(most, max(1, int(expected * (1 if full else rng.uniform(0.6, 1.4)))))
                     for j in range(config.group_size)}
            requests.append(Request([i] * prompt, config.group_size, most, expected_tokens=expected))
        pages = max(self.pages * config.page_size // unit, prompt + most + 2)
        scheduler = Scheduler(pages, 1, self.rows, SAMPLER["token_budget"])
        scheduler.add(requests)
        weights, seconds = self.persistent()["sampler's weights"], 0.0
        while scheduler.busy:
            step = scheduler.step()
            for s in (drew := step.decode + [s for _, s in step.forks]):
                s.token_ids.append(0)
                if s.row >= 0 and s.drawn >= ends[s.index, s.sample]:
                    scheduler.finish(s)
            cached = unit * sum(s.cached for s in scheduler.running) // config.page_size
            read = weights + cached * self.page_bytes
            seconds += unit * bool(drew) * (self.shape.num_hidden_layers * self.rate["layer"] +
                                            read / self.rate["memory"])
        prefilled, tokens = scheduler.stats.prefill_tokens, sum(ends.values())
        flops = unit * prefilled * self.shape.flops_per_token(self.longest // 2) / config.tp
        return {"seconds": seconds + flops / self.rate["flops"], "preemptions": scheduler.stats.preemptions,
                "again": (prefilled - sum(len(r.prompt_ids) for r in requests)) / tokens,
                "mean": min(unit * tokens / len(ends), config.max_new_tokens)}

    # ---- time

    def seconds(self, length: float, samples: float) -> tuple[float, float]:
        """Of an update and of publish, with so many sequences a rank, of so many tokens on average."""
        config, more = self.config, (self.config.updates_per_batch > 1) + (self.config.beta > 0)
        passes = 3 + config.recompute + more  # forwards' worth; a backward is two
        flops = samples * length * passes * self.shape.flops_per_token(int(length / 2))
        bandwidth = self.rate["inside a node" if self.shards <= self.machine.gpus else "across nodes"]
        sent = self.shape.num_parameters * (self.shards > 1) / bandwidth  # seconds for a byte a parameter
        batches = -(-samples // max(1, self.tokens // length))
        return (max(flops / self.rate["flops"], batches * sent * ((2 + more) * self.itemsize + 4)),
                sent * self.sampler_dtype.itemsize)

    # ---- does it fit

    def lacking(self) -> list[str]:
        """A sentence for each phase that does not fit."""
        needs = {phase: sum(buffers.values()) for phase, buffers in self.phases().items()}
        saves = SAVES if self.rl else dict.fromkeys(needs, SAVES["next token"])
        out = [f"{phase} needs {gib(size)} GiB of {gib(self.room)}, {gib(size - self.room)} too many: there "
               f"{saves.get(phase, SAVES['sample'])} save memory"
               for phase, size in needs.items() if size > self.room]
        if not out and self.rl and self.pages < self.columns + 2:
            out = [f"the KV pool has {self.pages} pages, the longest sample needs {self.columns + 2}: while "
                   f"sampling {SAVES['sample']} save memory"]
        return out


# ---------------------------------------------------------------------- what is shown


def gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size > GIB else f"{size / GIB:.3f}"


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def describe(plan: Plan) -> Iterator[str]:
    """Lines: a table of buffers by phase, the KV pool, times, and what the times follow from."""
    config, phases, unit = plan.config, plan.phases(), "GPU" if plan.cuda else "process"
    if plan.rl:
        phases["sample"]["KV pool"] = plan.pages * plan.page_bytes
    names = dict.fromkeys(name for buffers in phases.values() for name, size in buffers.items() if size)
    rows = [(name, [gib(b[name]) if b.get(name) else "" for b in phases.values()]) for name in names]
    total = f"together, of {gib(plan.room)}", [gib(sum(b.values())) for b in phases.values()]
    for name, cells in [(f"GiB of a {unit}", phases), *rows, total]:
        yield (f"{name:46}" + "".join(f"{cell:>9}" for cell in cells)).rstrip()
    peaks = sorted(((sum(b.values()), name) for name, b in plan.moments().items()), reverse=True)
    yield "\nAn update peaks in: " + ", ".join(f"{name} ({gib(size)})" for size, name in peaks[:3])
    if plan.pinned():
        yield f"Offloaded, in a node's memory: {gib(plan.pinned())} GiB"
    if plan.rl:
        yield (f"KV pool: {plan.pages} pages of {config.page_size} tokens hold {plan.pages // plan.columns} "
               f"samples of {plan.machine.prompt_tokens} + {config.max_new_tokens} tokens; a sampler writes "
               f"{plan.samples} a step, in {plan.rows} rows")
    else:
        tokens = 1e9 * plan.machine.billion_tokens
        took = plan.seconds(plan.longest, tokens / plan.longest / plan.ranks)[0] / 3600
        yield (f"{tokens:.3g} tokens in rows of {plan.longest:,}: {took:,.1f} hours, "
               f"{plan.ranks * took:,.1f} {unit}-hours, without evaluation and checkpoints")
    hours = []
    for full in (False, True) if plan.rl and plan.pages > plan.columns + 1 else ():
        r = plan.rehearse(full)
        update, publish = plan.seconds(r["mean"] + plan.machine.prompt_tokens, plan.samples / config.tp)
        hours.append((r["seconds"] + update + publish) * config.steps / 3600)
        yield (f"{'full' if full else 'mixed'} lengths, {r['mean']:,.0f} new tokens a sample: sample "
               f"{duration(r['seconds'])} ({r['preemptions']} preemptions, {r['again']:.0%} prefilled "
               f"again), update {duration(update)}, publish {duration(publish)}")
    if hours:
        yield (f"all {config.steps} steps: {hours[0]:,.1f} to {hours[1]:,.1f} hours, "
               f"{plan.ranks * hours[0]:,.1f} to {plan.ranks * hours[1]:,.1f} {unit}-hours, without "
               "scoring, evaluation and checkpoints")
    yield "\nThese times follow from:"
    for name, (value, source) in RATES[plan.device].items():
        yield f"  {name:15}{value:9.3g} {source}"


def find_shape(path: str) -> tuple[ModelConfig, str]:
    """The shape of a checkpoint, and what to say of its source. Raises UserError."""
    if Path(folder := locate(path)).exists():
        return read_config(folder), ""
    for name, shape in SHAPES.items():
        if f"{Path(path).name}-".lower().startswith(f"{name}-".lower()):
            return shape, f" (there is no folder {path}: the shape is that of {name})"
    raise UserError(f"model {path} does not exist, and its name begins with none of {', '.join(SHAPES)}: "
                    "give the folder that has its config.json")


def parse(arguments: list[str]) -> tuple[train.Config, Machine, bool]:
    """(the run's options, the machine, whether it has GPUs). Raises UserError."""
    words = [w for a in arguments for w in (a.split("=", 1) if a.startswith("--") else [a])]
    pairs, names = [words[i:i + 2] for i in range(0, len(words), 2)], Machine.__dataclass_fields__
    own = [p for p in pairs if p[0].strip("-").replace("-", "_") in names]
    given, _ = options.read(Machine, sum(own, []), "")
    start = ["--recompute", "false"] if given.get("job", "rl") != "rl" else []  # those jobs' default
    config = train.parse(sum((p for p in pairs if p not in own), start), "The run's:", tuple(names))
    options.check_numbers(Machine(**given), " ".join(given.keys() - {"job"}))
    options.check_choices(Machine(**given), job=("rl", "pretrain", "sft", "train_rm"))
    cuda = config.device == "cuda" or config.device == "auto" and (bool(own) or torch.cuda.is_available())
    here = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    return config, Machine(**{"gpus": 8 if cuda else 1, "gpu_memory": 80.0 if cuda else here} | given), cuda


def make(config: train.Config, machine: Machine, cuda: bool) -> tuple[Plan, str]:
    """The plan, and what to say of the shape. Raises UserError."""
    shape, note = find_shape(config.model)
    check_tp(shape, config.tp)
    if machine.job == "train_rm":
        shape = replace(shape, scalar_head=True)
    scorer, used = None, machine.job == "rl" and any(
        reward.name == "writing" for reward in scoring.choose_rewards(config.reward, rewards))
    if used and not config.reward_model:
        note += "; no reward_model is given: it is not counted"
    elif used and "://" not in config.reward_model:  # servers are elsewhere
        scorer, more = find_shape(config.reward_model)
        scorer, note = replace(scorer, scalar_head=True), note + more
    return Plan(config, machine, shape, cuda, scorer), note


def read(arguments: list[str]) -> tuple[Plan, str]:
    """The plan for a command line, and what to say of the shape. Raises UserError."""
    return make(*parse(arguments))


def show(arguments: list[str]):
    """Prints the plan; exits with 1 if it does not fit."""
    if {"-h", "--help"} & set(arguments):
        print(options.help_text(Machine, __doc__), end="\n\n")
    config, machine, cuda = parse(arguments)
    os.environ["LOCAL_WORLD_SIZE"] = str(machine.gpus)  # which train.check reads
    if machine.job == "rl":
        train.check(config, distributed.World(0, machine.gpus * machine.nodes, torch.device("cpu")))
    plan, note = make(config, machine, cuda)
    device = f"GPUs of {machine.gpu_memory:g} GiB" if cuda else "processes"
    print(f"{config.model}: {plan.shape.num_parameters:,} parameters{note}\n{machine.nodes} x {machine.gpus} "
          f"{device}; weights over {plan.shards}" + f", a sampler over {config.tp}" * plan.rl +
          f"; micro-batches of up to {plan.tokens:,} tokens\n", *describe(plan), sep="\n")
    if problems := plan.lacking():
        print("", *(f"It does not fit: {problem}." for problem in problems), sep="\n")
        raise SystemExit(1)
    print("\nIt fits." + " The reward model comes on top." * note.endswith("not counted"))


@options.command
def main():
    show(sys.argv[1:])


if __name__ == "__main__":
    main()
