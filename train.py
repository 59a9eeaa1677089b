"""GRPO training of ultra-long writing: the LongWriter-Zero method (arXiv 2506.18841) on Qwen2.5.

    torchrun --nproc_per_node=8 train.py [--config FILE.json] [--NAME VALUE ...]

With no option it trains the embedded default, a small world that runs on a laptop's CPU. Every option is a
field of Config.
"""

import dataclasses
import difflib
import hashlib
import inspect
import json
import os
import re
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

import grpo
import model as qwen
import parallel
from data import prompts as prompt_data
from kernels import linear_logprob
from rewards import REWARDS, count_words, structure
from sampler import Completion, Request, Sampler
from tokenizer import Tokenizer, TokenizerError

ROOT = Path(__file__).parent


class ConfigError(ValueError):
    """An option that cannot be; the message names it, its value and what to do."""


@dataclass
class Config:
    model: str = "data/tiny/base"  # checkpoint folder: config.json, safetensors, tokenizer.json
    prompts: str = "data/tiny/prompts.jsonl"  # training prompts, JSONL
    prompt_style: str = "think"  # think: <think></think><answer></answer>; direct: the answer alone
    unreachable: str = "drop"  # prompts whose shortest answer exceeds max_new_tokens: drop or keep
    reward: str = ""  # comma-separated names out of rewards.REWARDS; empty: all with non-zero weight
    run_dir: str = ""  # folder of the run; empty: a new one under runs/
    resume: str = "auto"  # auto: go on with an unfinished run of this config; true: insist; false: refuse
    steps: int = 100  # GRPO steps (paper: 150)
    prompts_per_step: int = 8  # over all ranks (not specified by the paper)
    group_size: int = 8  # samples of each prompt (paper: 32)
    max_new_tokens: int = 256  # thinking and answer together (paper: 14000)
    temperature: float = 1.0  # of sampling, and of the logprobs that are trained (paper: 0.8)
    top_p: float = 1.0  # must be 1 in training, or the policy that samples is not the one that is trained
    stop: str = "</answer>,<|user|>"  # comma-separated strings that end a sample; they stay in it
    lr: float = 4e-4  # AdamW, constant after warm-up (not specified by the paper; try 1e-6 from 7B up)
    warmup: int = 5  # steps of linear warm-up (not specified by the paper)
    weight_decay: float = 0.0  # not specified by the paper
    clip_grad: float = 1.0  # largest global gradient norm (not specified by the paper)
    eps_low: float = 0.2  # clip of the ratio below (paper: 0.2); with one update per batch it never acts
    eps_high: float = 0.2  # clip of the ratio above (paper: 0.2)
    std_floor: float = 1e-4  # added to a group's std, bounds advantages (not specified by the paper)
    micro_batch_tokens: int = 16384  # tokens of a packed micro-batch on each rank
    recompute: bool = False  # recompute each layer's activations in backward: less memory, a third more time
    max_sequences: int = 64  # sequences that each rank decodes at a time
    page_size: int = 16  # tokens of a KV page
    sampler_dtype: str = "auto"  # auto: bfloat16 on CUDA, float32 on CPU; or either by name
    eval_prompts: str = "data/tiny/eval_prompts.jsonl"  # empty: no evaluation
    eval_every: int = 20  # steps between evaluations, the first before training
    save_every: int = 20  # steps between checkpoints; the last step is always saved
    keep_checkpoints: int = 2  # newest checkpoints that are kept
    seed: int = 0  # of prompt order and sampling
    device: str = "auto"  # auto, cpu or cuda
    wandb: bool = False  # log to Weights & Biases too (offline without a key)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(s for s in self.stop.split(",") if s)

    @property
    def reward_names(self) -> list[str]:
        named = [name.strip() for name in self.reward.split(",") if name.strip()]
        return named or [name for name, (_, weight) in REWARDS.items() if weight]


# What a run may change when it goes on: nothing that its steps depend on.
MAY_DIFFER = {
    "run_dir", "resume", "steps", "save_every", "keep_checkpoints", "device", "wandb", "max_sequences"
}

# ---------------------------------------------------------------------- options


def help_text() -> str:
    """--help, made from the comments beside Config's fields."""
    lines = re.findall(r"^    (\w+): (\w+) = (.+?)  # (.+)$", inspect.getsource(Config), re.M)
    rows = [f"  --{name:20}{kind:7}{comment} [{default}]" for name, kind, default, comment in lines]
    return "\n".join([__doc__.strip(), "", "Options, with their defaults:", *rows])


def convert(name: str, value, source: str):
    """A string or JSON value as the type of the field `name`; raises ConfigError."""
    fields = {f.name: f for f in dataclasses.fields(Config)}
    if name not in fields:
        near = difflib.get_close_matches(name, fields, 1)
        raise ConfigError(f"{source}: there is no option {name!r}" +
                          (f"; did you mean {near[0]!r}?" if near else "; see --help"))
    kind = fields[name].type
    try:
        if kind is bool and not isinstance(value, bool):
            return {"true": True, "false": False}[str(value).lower()]
        if isinstance(value, str) and kind is not str:
            return kind(value)
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise ValueError
        return value
    except (KeyError, ValueError):
        expected = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}[kind]
        raise ConfigError(f"{source}: {name} must be {expected}, not {value!r}") from None


def parse(arguments: list[str]) -> Config:
    """Config from `--config FILE.json` and `--NAME VALUE` (or --NAME=VALUE); later ones win. Raises
    ConfigError."""
    values, rest = {}, [
        part for a in arguments for part in (a.split("=", 1) if a.startswith("--") and "=" in a else [a])
    ]
    while rest:
        name = rest.pop(0)
        if name in ("-h", "--help"):
            print(help_text())
            raise SystemExit(0)
        if not name.startswith("--"):
            raise ConfigError(f"command line: {name!r} is no option; options are written --NAME VALUE")
        if not rest:
            raise ConfigError(f"command line: {name} lacks its value")
        name, value = name[2:].replace("-", "_"), rest.pop(0)
        if name == "config":
            try:
                loaded = json.loads(Path(value).read_text())
            except (OSError, json.JSONDecodeError) as e:
                raise ConfigError(
                    f"--config {value} cannot be read ({e}): give a JSON object of options") from None
            if not isinstance(loaded, dict):
                raise ConfigError(f"--config {value} is not a JSON object of options")
            values |= {k: convert(k, v, value) for k, v in loaded.items()}
        else:
            values[name] = convert(name, value, "command line")
    return Config(**values)


def locate(path: str) -> str:
    """A path as given, or, for the embedded default, inside the repository."""
    return path if Path(path).exists() or not (ROOT / path).exists() else str(ROOT / path)


def check(config: Config, world: parallel.World):
    """Everything that can be known without reading a file. Raises ConfigError."""
    positive = ("steps", "prompts_per_step", "max_new_tokens", "temperature", "clip_grad",
                "micro_batch_tokens", "max_sequences", "page_size", "eval_every", "save_every",
                "keep_checkpoints")
    for name in positive:
        if not getattr(config, name) > 0:
            raise ConfigError(f"{name} must be positive, not {getattr(config, name)}")
    for name in ("lr", "warmup", "weight_decay", "eps_low", "eps_high", "std_floor"):
        if not getattr(config, name) >= 0:
            raise ConfigError(f"{name} must not be negative, is {getattr(config, name)}")
    for name, choices in (("prompt_style", prompt_data.STYLES), ("unreachable", ("drop", "keep")),
                          ("resume", ("auto", "true", "false")), ("device", ("auto", "cpu", "cuda")),
                          ("sampler_dtype", ("auto", "float32", "bfloat16"))):
        if getattr(config, name) not in choices:
            raise ConfigError(f"{name} must be one of {', '.join(choices)}, not {getattr(config, name)!r}")
    if config.group_size < 2:
        raise ConfigError(
            f"group_size must be at least 2, not {config.group_size}: an advantage compares samples of one "
            "prompt"
        )
    if config.top_p != 1:
        raise ConfigError(
            f"top_p must be 1 in training, not {config.top_p}: the policy that samples would not be the one "
            "that is trained"
        )
    if config.prompts_per_step % world.size:
        raise ConfigError(
            f"prompts_per_step {config.prompts_per_step} does not divide by {world.size} ranks: groups stay "
            "whole on a rank"
        )
    for name in config.reward_names:
        if name not in REWARDS:
            raise ConfigError(f"reward {name!r} is not in rewards.REWARDS, which has {', '.join(REWARDS)}")
    if not any(REWARDS[name][1] > 0 for name in config.reward_names):
        raise ConfigError(
            f"all of the rewards {', '.join(config.reward_names)} have weight 0: give one a weight in "
            "rewards.REWARDS"
        )


# ---------------------------------------------------------------------- folder of the run


def differences(config: Config, recorded: dict) -> list[str]:
    mine = dataclasses.asdict(config)
    return [
        f"{k} ({recorded.get(k)!r} there, {v!r} now)" for k, v in mine.items()
        if k not in MAY_DIFFER and recorded.get(k) != v
    ]


def choose_folder(config: Config) -> Path:
    """run_dir, or a new folder; after an elastic restart the newest one with this config, which is the run
    that broke off."""
    if config.run_dir:
        return Path(config.run_dir)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        for folder in sorted(Path("runs").glob("*/config.json"), key=lambda f: -f.stat().st_mtime):
            if not differences(config, json.loads(folder.read_text())):
                return folder.parent
    name = time.strftime("%Y%m%d-%H%M%S")
    taken = [p.name for p in Path("runs").glob(f"{name}*")]
    return Path("runs") / (f"{name}-{len(taken) + 1}" if taken else name)


def open_run(config: Config) -> tuple[Path, Path | None]:
    """Prepares the folder and picks the checkpoint to go on from. Main rank only. Raises ConfigError before
    anything is changed."""
    folder, checkpoint = choose_folder(config), None
    record = folder / "config.json"
    if record.exists():
        if config.resume == "false":
            raise ConfigError(f"{folder} holds a run already and resume is false: choose another run_dir")
        if changed := differences(config, json.loads(record.read_text())):
            raise ConfigError(
                f"{folder} holds a run of another config: {'; '.join(changed)}; choose another run_dir, or "
                "the same options"
            )
        for path in parallel.checkpoints(folder / "checkpoints"):
            try:
                parallel.verify_checkpoint(path)
                checkpoint = path
                break
            except parallel.BadCheckpoint as e:
                print(f"warning: {e}; trying the checkpoint before it", file=sys.stderr, flush=True)
    if config.resume == "true" and checkpoint is None:
        raise ConfigError(f"resume is true, but {folder} has no checkpoint to go on from")
    try:
        (folder / "rollouts").mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
        for file in (*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("data/*.py")):
            target = folder / "source" / file.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    except OSError as e:
        raise ConfigError(f"run_dir {folder} cannot be written ({e}): choose another") from None
    cut_back(folder, int(checkpoint.name.removeprefix("step_")) if checkpoint else -1)
    return folder, checkpoint


def cut_back(folder: Path, step: int):
    """Removes metrics and rollouts of steps after `step`: they will be made again."""
    metrics = folder / "metrics.jsonl"
    if metrics.exists():
        lines = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
        beside = metrics.with_suffix(".writing")
        beside.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
        beside.replace(metrics)
    for file in (folder / "rollouts").glob("*_*.jsonl"):
        if int(file.stem.split("_")[1]) > step:
            file.unlink()


def append_jsonl(file: Path, records: list[dict], mode: str = "a"):
    with file.open(mode, encoding="utf-8") as f:
        f.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)


class NoLog:
    """What wandb.init returns, without wandb."""
    def log(self, metrics: dict, step: int):
        pass

    def finish(self):
        pass


def open_wandb(config: Config, folder: Path):
    import wandb

    has_key = bool(os.environ.get("WANDB_API_KEY")) or (Path.home() / ".netrc").exists()
    mode = os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
    return wandb.init(project="longwriter-zero",
                      name=folder.name,
                      id=folder.name,
                      resume="allow",
                      dir=str(folder),
                      mode=mode,
                      config=dataclasses.asdict(config))


# ---------------------------------------------------------------------- display


class Progress:
    """How far sampling is: one line that is overwritten on a terminal, a line every 30 seconds elsewhere."""
    def __init__(self, label: str, total: int, show: bool):
        self.label, self.total, self.show = label, total, show
        self.start = self.last = time.perf_counter()
        self.terminal = sys.stderr.isatty()

    def update(self, stats):
        now = time.perf_counter()
        if not self.show or now - self.last < (0.2 if self.terminal else 30):
            return
        self.last = now
        rate = stats.new_tokens / (now - self.start)
        line = f"{self.label}: {stats.finished}/{self.total} samples, {stats.new_tokens:,} tokens, "
        f"{rate:,.0f} tok/s on this rank"
        print(f"\r{line}\033[K" if self.terminal else line,
              end="" if self.terminal else "\n",
              file=sys.stderr,
              flush=True)

    def close(self):
        if self.show and self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


class Clock:
    """Seconds by phase of a step."""
    def __init__(self):
        self.seconds = dict.fromkeys(("sample", "score", "update", "publish", "save"), 0.0)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[phase] += time.perf_counter() - start


def peak_memory_gb(device: torch.device) -> float:
    """Peak of allocated GPU memory, or of this process's resident memory on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def describe(metrics: dict, steps: int, names: list[str]) -> str:
    rewards = " ".join(f"{name} {metrics[f'reward/{name}']:.3f}" for name in names)
    return (f"step {metrics['step']:4d}/{steps}  {rewards}  words {metrics['length/answer_words']:.0f} "
            f"in-range {metrics['length/in_range']:.0%} cut {metrics['truncated']:.0%}  grad "
            f"{metrics['grad_norm']:.3f} "
            f"entropy {metrics['entropy']:.3f} gap {metrics['gap/mean']:.1e}  sample "
            f"{metrics['time/sample']:.1f}s "
            f"({metrics['tokens_per_second/sample']:,.0f} tok/s) update {metrics['time/update']:.1f}s")


# ---------------------------------------------------------------------- stages of a
# step


def request_seed(*key) -> int:
    """63 bits out of (run seed, what for, step, prompt id): samples depend on nothing else."""
    return int.from_bytes(
        hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest(), "little") >> 1


def sample_and_score(sampler: Sampler, prompts: list, ids: list[list[int]], n: int, seeds: list[int],
                     config: Config, clock: Clock,
                     progress: Progress) -> tuple[list[list[Completion]], torch.Tensor]:
    """n completions of each of this rank's prompts, and their rewards as they finish: (completions[b][g],
    rewards_BGR)."""
    requests = [
        Request(i, n, config.max_new_tokens, config.temperature, stop=config.stop_strings, seed=s)
        for i, s in zip(ids, seeds)
    ]
    completions: list[list] = [[None] * n for _ in prompts]
    rewards_BGR = torch.full((len(prompts), n, len(config.reward_names)), torch.nan)
    for c in sampler.generate(requests):
        completions[c.prompt_index][c.sample_index] = c
        with clock("score"):
            for r, name in enumerate(config.reward_names):
                value = REWARDS[name][0](c, prompts[c.prompt_index])
                rewards_BGR[c.prompt_index, c.sample_index, r] = torch.nan if value is None else value
        progress.update(sampler.stats)
    progress.close()
    return completions, rewards_BGR


def summarise(prompts: list, completions: list[list[Completion]], rewards_BGR: torch.Tensor, names: list[str],
              world) -> dict[str, float]:
    """Means over all samples of all ranks: rewards, their spread within groups, lengths."""
    mean, std, dead = grpo.group_spread(rewards_BGR.double())
    sums = {"groups": len(prompts), "samples": rewards_BGR[..., 0].numel()}
    for r, name in enumerate(names):
        present = ~rewards_BGR[..., r].isnan()
        sums |= {
            f"sum/{name}": rewards_BGR[..., r].nansum().item(), f"present/{name}": present.sum().item(),
            f"std/{name}": std[:, r].sum().item(), f"dead/{name}": dead[:, r].sum().item()
        }
    counts = {"words": 0, "tokens": 0, "in_range": 0, "ranged": 0, "cut": 0}
    for prompt, group in zip(prompts, completions):
        for c in group:
            words = count_words(structure(c.text)[2] or "")
            counts["words"] += words
            counts["tokens"] += len(c.token_ids)
            counts["cut"] += c.finish_reason == "length"
            if prompt.length_range:
                counts["ranged"] += 1
                counts["in_range"] += prompt.length_range[0] <= words <= prompt.length_range[1]
    s = parallel.total(sums | counts, world)
    out = {}
    for name in names:
        out |= {
            f"reward/{name}": s[f"sum/{name}"] / max(1, s[f"present/{name}"]),
            f"reward_std/{name}": s[f"std/{name}"] / s["groups"],
            f"dead_groups/{name}": int(s[f"dead/{name}"]),
            f"missing/{name}": int(s["samples"] - s[f"present/{name}"])
        }
    return out | {
        "length/answer_words": s["words"] / s["samples"], "length/tokens": s["tokens"] / s["samples"],
        "length/in_range": s["in_range"] / max(1, s["ranged"]), "truncated": s["cut"] / s["samples"]
    }


def update(model, optimizer, samples: list[grpo.Sample], config: Config, n_valid: int,
           world) -> tuple[dict[str, float], list[float]]:
    """One optimiser step on this rank's share of the batch: (metrics of the whole batch, mean |logprob gap|
    of each sample)."""
    tokens = int(parallel.total({"tokens": sum(len(s.token_ids) for s in samples)}, world)["tokens"])
    lengths = [len(s.prompt_ids) + len(s.token_ids) for s in samples]
    count = int(
        parallel.largest({"count": len(grpo.pack(lengths, config.micro_batch_tokens))}, world)["count"])
    sums = dict.fromkeys(("loss", "clip_share", "gap/mean", "gap/k3", "entropy"), 0.0)
    gap_max, gaps = 0.0, [0.0] * len(samples)
    for chosen in grpo.pack(lengths, config.micro_batch_tokens, count):
        batch = grpo.collate([samples[i] for i in chosen], world.device)
        hidden_TC = model(batch.tokens_T, batch.attention)
        keep = batch.mask_T
        logp, entropy = linear_logprob(hidden_TC[keep], model.head_weight[:n_valid], batch.targets_T[keep],
                                       config.temperature)
        loss, metrics = grpo.policy_loss(logp, logp.detach(), batch.advantage_T[keep], tokens, config.eps_low,
                                         config.eps_high)
        loss.backward()
        metrics |= grpo.mismatch(logp, batch.rollout_logp_T[keep],
                                 tokens) | {"entropy": entropy.detach().sum() / tokens}
        gap_max = max(gap_max, metrics.pop("gap/max").item())
        sums = {name: sums[name] + metrics[name].item() for name in sums}
        each = (logp.detach() - batch.rollout_logp_T[keep]).abs().split(
            [len(samples[i].token_ids) for i in chosen])
        for i, gap in zip(chosen, each):
            gaps[i] = gap.mean().item()
    norm = parallel.clip_grad_(model, config.clip_grad)
    if norm != norm:
        raise FloatingPointError("the gradient is NaN: lower lr, or look at this step's samples and rewards")
    optimizer.step()
    optimizer.zero_grad()
    return parallel.total(sums, world) | parallel.largest({"gap/max": gap_max}, world) | {"grad_norm": norm
                                                                                          }, gaps


def records(prompts: list, completions: list[list[Completion]], rewards_BGR: torch.Tensor, names: list[str],
            world, extra: list[list[dict]] | None = None) -> list[dict]:
    """Rollout records of all ranks, in the order of its prompts; extra[b][g] joins a sample's record."""

    def record(b: int, g: int, c: Completion) -> dict:
        values = {name: None if v != v else v for name, v in zip(names, rewards_BGR[b, g].tolist())}
        return {"prompt_id": prompts[b].id, "sample": g, "prompt": prompts[b].text, "text": c.text,
                "tokens": len(c.token_ids), "finish_reason": c.finish_reason, "rewards": values,
                **(extra[b][g] if extra else {})}

    mine = [[record(b, g, c) for g, c in enumerate(group)] for b, group in enumerate(completions)]
    ranks = parallel.gather(mine, world)
    depth = max(len(groups) for groups in ranks)  # ranks take prompts in turn
    return [r for b in range(depth) for groups in ranks if b < len(groups) for r in groups[b]]


# ---------------------------------------------------------------------- the run


def train(config: Config):
    world = parallel.setup(config.device)
    check(config, world)
    names = config.reward_names
    weights_R = torch.tensor([REWARDS[name][1] for name in names])
    model_path = locate(config.model)
    qwen.check_tensors(qwen.read_config(model_path), model_path)
    tokenizer = Tokenizer(model_path)
    keep_all = config.unreachable == "keep"
    prompts, dropped = prompt_data.read(locate(config.prompts), config.prompt_style, config.max_new_tokens,
                                        keep_all)
    if len(prompts) < config.prompts_per_step:
        raise ConfigError(
            f"prompts {config.prompts} has {len(prompts)} usable prompts (dropped: "
            f"{dict(dropped) or 'none'}), a step needs "
            f"prompts_per_step = {config.prompts_per_step}")
    eval_prompts = []
    if config.eval_prompts:
        eval_prompts = prompt_data.read(locate(config.eval_prompts), config.prompt_style,
                                        config.max_new_tokens, keep_all)[0]
        if len(eval_prompts) < world.size:
            raise ConfigError(
                f"eval_prompts {config.eval_prompts} has {len(eval_prompts)} usable prompts, fewer than the "
                f"{world.size} ranks"
            )

    # Only the main rank touches the run's folder; the others hear what came of it.
    try:
        opened = open_run(config) if world.main else None
    except ConfigError as e:
        opened = e
    opened = parallel.broadcast(opened, world)
    if isinstance(opened, ConfigError):
        raise opened
    folder, checkpoint = opened
    start = int(checkpoint.name.removeprefix("step_")) if checkpoint else 0
    if start >= config.steps:
        if world.main:
            print(
                f"{folder} has finished its {start} steps; raise --steps to go on, or choose another run_dir")
        return

    model = parallel.shard(qwen.load(model_path), world)
    model.recompute = config.recompute
    optimizer = torch.optim.AdamW(model.parameters(),
                                  lr=config.lr,
                                  betas=(0.9, 0.95),
                                  weight_decay=config.weight_decay,
                                  fused=True)
    state = parallel.load_checkpoint(checkpoint, model, optimizer) if checkpoint else {"step": 0, "cursor": 0}
    dtype = {
        "float32": torch.float32, "bfloat16": torch.bfloat16,
        "auto": torch.bfloat16 if world.device.type == "cuda" else torch.float32
    }
    with torch.device("meta"):
        replica = qwen.Qwen2(model.config).to(dtype[config.sampler_dtype]).requires_grad_(False)
    replica.to_empty(device=world.device)
    parallel.publish(model, replica)
    sampler = Sampler(replica, tokenizer, config.max_sequences, config.page_size)
    log = open_wandb(config, folder) if config.wandb and world.main else NoLog()
    if world.main:
        notes = [f"{model.config.num_parameters:,} parameters", f"{len(prompts)} prompts"]
        notes += [f"{n} {why} dropped"
                  for why, n in dropped.items()] + [f"{world.size} x {world.device.type}"]
        notes += [f"resumed after step {start}"] if checkpoint else []
        print(f"{folder}: {', '.join(notes)}", flush=True)

    def evaluate(step: int) -> dict[str, float]:
        mine = eval_prompts[world.rank::world.size]
        ids = [tokenizer.encode(p.text) for p in mine]
        seeds = [request_seed(config.seed, "eval", p.id) for p in mine]
        progress = Progress(f"evaluation after step {step}", len(mine), world.main)
        completions, rewards_BGR = sample_and_score(sampler, mine, ids, 1, seeds, config, Clock(), progress)
        every = records(mine, completions, rewards_BGR, names, world)
        metrics = summarise(mine, completions, rewards_BGR, names, world)
        if world.main:
            append_jsonl(folder / "rollouts" / f"eval_{step:06d}.jsonl", every, "w")
            shown = "  ".join(f"{name} {metrics[f'reward/{name}']:.3f}" for name in names)
            print(
                f"eval after step {step}: {shown}  words {metrics['length/answer_words']:.0f} on "
                f"{len(eval_prompts)} prompts",
                flush=True)
        return {
            f"eval/{name}": value
            for name, value in metrics.items() if not name.startswith(("dead_groups", "reward_std"))
        }

    if start == 0 and eval_prompts:
        metrics = {"step": 0, **evaluate(0)}
        if world.main:
            append_jsonl(folder / "metrics.jsonl", [metrics])
            log.log(metrics, step=0)

    save_seconds = 0.0
    for step in range(start + 1, config.steps + 1):
        clock = Clock()
        # Sample: each rank its own groups. Score each sample as it finishes.
        order = prompt_data.order(len(prompts), config.prompts_per_step, config.seed, state["cursor"])
        mine = [prompts[i] for i in order[world.rank::world.size]]
        ids = [tokenizer.encode(p.text) for p in mine]
        seeds = [request_seed(config.seed, step, p.id) for p in mine]
        progress = Progress(f"step {step}", len(mine) * config.group_size, world.main)
        with clock("sample"):
            completions, rewards_BGR = sample_and_score(sampler, mine, ids, config.group_size, seeds, config,
                                                        clock, progress)
        clock.seconds["sample"] -= clock.seconds["score"]

        # Advantages: each reward on its own within its group, then averaged.
        advantage_BG, per_reward_BGR = grpo.advantages(rewards_BGR, weights_R, "per_reward", config.std_floor)

        # Update: logprobs of the packed samples, the clipped loss, one step of AdamW.
        lr = config.lr * min(1.0, step / max(1, config.warmup))
        for group in optimizer.param_groups:
            group["lr"] = lr
        samples = [
            grpo.Sample(ids[b], c.token_ids, c.logprobs, advantage_BG[b, g].item())
            for b, group in enumerate(completions) for g, c in enumerate(group)
        ]
        with clock("update"):
            trained, gaps = update(model, optimizer, samples, config, tokenizer.n_valid, world)
        with clock("publish"):
            parallel.publish(model, replica)
        state = {"step": step, "cursor": state["cursor"] + config.prompts_per_step}

        # Log: one line, one object, one record a sample.
        metrics = {
            "step": step, **summarise(mine, completions, rewards_BGR, names, world), **trained, "lr": lr
        }
        slowest = parallel.largest(
            clock.seconds | {"save": save_seconds, "memory": peak_memory_gb(world.device)}, world)
        new_tokens = metrics["length/tokens"] * config.prompts_per_step * config.group_size
        all_tokens = parallel.total({"tokens": sum(len(s.prompt_ids) + len(s.token_ids) for s in samples)},
                                    world)["tokens"]
        metrics |= {
            "memory/peak_gb": slowest.pop("memory"),
            **{f"time/{phase}": s
               for phase, s in slowest.items()}, "tokens_per_second/sample": new_tokens / slowest["sample"],
            "tokens_per_second/update": all_tokens / slowest["update"]
        }
        extra = [[{"advantages": dict(zip(names, per_reward_BGR[b, g].tolist())),
                   "advantage": advantage_BG[b, g].item(), "gap_mean": gaps[b * config.group_size + g]}
                  for g in range(config.group_size)] for b in range(len(mine))]
        every = records(mine, completions, rewards_BGR, names, world, extra)
        if world.main:
            append_jsonl(folder / "rollouts" / f"step_{step:06d}.jsonl", every, "w")
            print(describe(metrics, config.steps, names), flush=True)
            if metrics["truncated"] > 0.25:
                print(
                    f"warning: {metrics['truncated']:.0%} of the samples were cut at max_new_tokens "
                    f"{config.max_new_tokens}",
                    flush=True)
        if eval_prompts and step % config.eval_every == 0:
            metrics |= evaluate(step)
        if world.main:
            append_jsonl(folder / "metrics.jsonl", [metrics])
            log.log(metrics, step=step)

        if step % config.save_every == 0 or step == config.steps:
            before = time.perf_counter()
            parallel.save_checkpoint(folder / "checkpoints", model, optimizer, state, world,
                                     config.keep_checkpoints)
            save_seconds = time.perf_counter() - before
    log.finish()
    if world.main:
        print(f"done: {folder} holds metrics.jsonl, rollouts/ and checkpoints/", flush=True)


def main():
    try:
        train(parse(sys.argv[1:]))
    except (ConfigError, qwen.CheckpointError, prompt_data.PromptError, TokenizerError) as e:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {e}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    finally:
        parallel.close()


if __name__ == "__main__":
    main()
