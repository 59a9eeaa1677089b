"""A run: what it reads, its folder, log and clock."""

import dataclasses
import faulthandler
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import safetensors.torch
import torch

import checkpoints
import model as qwen
import replica
from data import prompts as prompt_data
from data.tokenizer import Tokenizer
from lib import console, distributed, wandb_log
from lib.distributed import World, broadcast, gather, raise_on_all_ranks
from lib.files import ROOT, jsonl, locate, read_jsonl, replace, write_jsonl
from lib.options import Field, UserError, environment, read_json
from lib.stop import Stopped, Watch

# Options that may differ when a run is resumed: the steps do not depend on them.
MAY_DIFFER = {"run_dir", "resume", "steps", "save_every", "keep_checkpoints", "keep_every", "device", "wandb",
              "max_sequences", "replicate", "recompute", "offload_activations", "offload_optimizer",
              "offload_reward_model", "timeout", "max_skipped", "token_stats_every", "out", "peak_tflops"}

# ---------------------------------------------------------------------- inputs


@dataclass(frozen=True)
class Inputs:
    """What a run reads in addition to weights."""

    model: str  # checkpoint folders
    reference: str
    shape: qwen.ModelConfig
    tokenizer: Tokenizer
    prompts: list
    eval_prompts: list
    dropped: dict[str, int]  # training prompts, by reason
    eval_dropped: dict[str, int]

    @cached_property
    def record(self) -> dict:
        """What a checkpoint keeps of it, so that a resumed run can check that it reads the same."""
        texts = json.dumps([dataclasses.astuple(prompt) for prompt in self.prompts])
        return {"prompts": hashlib.sha256(texts.encode()).hexdigest(),
                "model": dataclasses.asdict(self.shape)}


def read_inputs(config, world: World) -> Inputs:
    """Reads and checks what can be known before weights load: checkpoints' headers, tokenizer and prompts.
    Raises UserError."""
    model, reference = locate(config.model), locate(config.reference or config.model)
    shapes, tokenizer = {path: qwen.read_config(path) for path in (model, reference)}, Tokenizer(model)
    for path, shape in shapes.items():
        if shape.scalar_head:
            raise UserError(f"{path} is a reward model, which writes nothing: give it as reward_model")
        qwen.check_tensors(shape, path)
        replica.check_tp(shape, config.tp)
        tokenizer.check_rows(shape.vocab_size, path)
    context = min(shape.max_position_embeddings for shape in shapes.values())
    prompts, dropped = prompt_data.load(config, "prompts", config.prompts_per_step, "a step", tokenizer,
                                        context)
    eval_prompts, eval_dropped = [], {}
    if config.eval_prompts:
        eval_prompts, eval_dropped = prompt_data.load(config, "eval_prompts", world.size, "every rank",
                                                      tokenizer, context)
    return Inputs(model, reference, shapes[model], tokenizer, prompts, eval_prompts, dropped, eval_dropped)


# ---------------------------------------------------------------------- folder of the run


def differences(config, recorded: dict) -> list[str]:
    """Options that differ from the recorded ones and may not, with both values. Of servers only the names of
    their models count."""
    def named(value):
        return {url.strip().partition("#")[2] for url in value.split(",")} if "://" in str(value) else value

    return [f"{k} ({recorded.get(k)!r} there, {v!r} now)" for k, v in dataclasses.asdict(config).items()
            if k not in MAY_DIFFER and named(recorded.get(k)) != named(v)]


def lock(folder: Path, option: str = "run_dir"):
    """Locks the folder that an option names until this process ends. Raises UserError if another process,
    even a stopped one, holds the lock. It is a POSIX lock, which child processes do not inherit."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)  # never closed: that would unlock it
    except OSError:
        return  # a finished run may be read-only; for any other `open_folder` raises UserError
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(file, os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode()))
    except (BlockingIOError, PermissionError):
        raise UserError(f"{folder} is in use by {os.read(file, 999).decode()}: end that run first, or "
                        f"choose another {option}") from None
    except OSError as e:
        print(f"warning: {folder} cannot be locked ({e.strerror}): start no other run in it", file=sys.stderr,
              flush=True)


def new_folder() -> Path:
    """Creates a new folder under runs/."""
    name = Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    try:
        for folder in (Path(f"{name}-{n}" if n > 1 else name) for n in itertools.count(1)):
            with suppress(FileExistsError):
                folder.mkdir(parents=True)
                return folder
    except OSError as e:
        raise UserError(f"{name} cannot be made ({e.strerror}): give a --run_dir elsewhere") from None


def choose_folder(config, restarted: bool) -> Path:
    """Returns run_dir, or a new folder, or after an elastic restart the newest folder with the same config;
    and locks it. Raises UserError if the folder is in use or holds a run of another config."""
    folder = Path(config.run_dir) if config.run_dir else None
    if not folder and restarted:
        for record in sorted(Path("runs").glob("*/config.json"), key=lambda f: -f.stat().st_mtime):
            if not differences(config, read_json(record, "remove it")):
                with suppress(UserError):  # another run with the same options goes on there
                    lock(record.parent)
                    return record.parent
    if config.resume == "true" and not (folder and checkpoints.complete(folder / "checkpoints")):
        raise UserError(f"resume is true, but {folder or 'a new run'} has no checkpoint to go on from")
    folder = folder or new_folder()
    record = folder / "config.json"
    if record.exists():
        if config.resume == "false":
            raise UserError(f"{folder} holds a run already and resume is false: choose another run_dir")
        if changed := differences(config, read_json(record, "choose another run_dir")):
            raise UserError(f"{folder} holds a run of another config: {'; '.join(changed)}; choose another "
                            "run_dir, or the same options")
    lock(folder)
    return folder


def open_run(config, inputs: Inputs, world: World) -> tuple[Path, tuple[Path, dict] | None]:
    """The run's folder, and its newest whole checkpoint with its state. Raises UserError on all ranks."""
    restarts = environment()["TORCHELASTIC_RESTART_COUNT"]  # 0 on a node that has just come back
    restarted = any(gather(restarts, world))
    with raise_on_all_ranks(world):
        folder = choose_folder(config, restarted) if world.main else None
    folder = broadcast(folder, world)
    newest = checkpoints.newest(folder / "checkpoints", world)
    for name, value in (newest[1].get("inputs", {}) if newest else {}).items():
        if inputs.record[name] != value:
            where = f"{inputs.model}/config.json" if name == "model" else getattr(config, name)
            raise UserError(f"{where} is not what {newest[0]} was made with: put it back, or choose another "
                            "run_dir")
    with raise_on_all_ranks(world):
        if world.main and not (newest and newest[1]["step"] > config.steps):
            open_folder(config, folder, newest)
    return folder, newest


def open_folder(config, folder: Path, newest: tuple[Path, dict] | None):
    """Prepares the folder to start, or to resume from its newest checkpoint. Main rank only. Raises
    UserError."""
    path, state = newest or (None, {"step": -1})
    step = state["step"]
    try:
        for part in ("rollouts", "checkpoints"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        replace(folder / "config.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n")
        cut_back(folder, step)
        if step >= config.steps:  # at most an evaluation is missing
            return
        target = folder / (f"source_from_step_{step + 1:06d}" if newest else "source")
        changed = state.get("code") != code_hash()
        if changed or target.exists():  # else source/, or a later copy, holds this code
            for name, text in source().items():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                (target / name).write_text(text, encoding="utf-8")
    except OSError as e:
        raise UserError(f"run_dir {folder} cannot be written ({e}): choose another") from None
    if newest and changed:
        print(f"warning: {path} was made by other code than this: {target.name} holds what runs from here on",
              file=sys.stderr, flush=True)


@cache
def source() -> dict[str, str]:
    """The source files that a result depends on: path -> text."""
    return {str(f.relative_to(ROOT)): f.read_text(encoding="utf-8")
            for pattern in "*.py lib/*.py kernels/*.py kernels/*.json data/*.py scripts/pretrain.py".split()
            for f in sorted(ROOT.glob(pattern))}


def code_hash() -> str:
    return hashlib.sha256(json.dumps(source()).encode()).hexdigest()


def cut_back(folder: Path, step: int):
    """Removes metrics and rollouts of steps after `step`, which will be made again. Warns of missing ones
    before it."""
    metrics, records, steps = folder / "metrics.jsonl", [], set(range(1, step + 1))
    if metrics.exists():
        records = [record for record in read_jsonl(metrics, step=Field(int, 0)) if record["step"] <= step]
        replace(metrics, jsonl(records))
    files = {file: (m[1], int(m[2])) for file in (folder / "rollouts").iterdir()
             if (m := re.fullmatch(r"(step|eval)_(\d{6,})\.(jsonl|safetensors)", file.name))}
    for file in (file for file, (_, of) in files.items() if of > step):
        file.unlink()
    there = {"metrics.jsonl": {record["step"] for record in records if "loss" in record},
             "rollouts": {of for kind, of in files.values() if kind == "step"} or steps}  # none: pretraining
    for name, found in there.items():
        if lost := sorted(steps - found):
            print(f"warning: {folder / name} lacks {len(lost)} steps before the checkpoint, the first is "
                  f"{lost[0]}: the run goes on without them", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------- clock


class Clock:
    """Seconds spent in each phase of a step (`save`: in the last checkpoint), and the current step and phase.
    begun: start times of the process and of its steps. peaks: GiB of GPU memory in each phase that is inside
    no other, and in all of them (`peak`)."""
    def __init__(self):
        self.seconds, self.begun, self.peaks = {"save": 0.0}, [], {"peak": 0.0}
        self.begin(0)
        self.phase = "start"

    def begin(self, step: int):
        self.step, self.phase = step, "log"  # everything outside the phases below
        self.begun.append(time.perf_counter())
        phases = ("sample", "idle", "score", "logprob", "backward", "step", "update", "publish")
        self.seconds |= dict.fromkeys(phases, 0.0)

    @contextmanager
    def __call__(self, phase: str, wait: bool = True) -> Iterator[None]:
        start, outer, self.phase = time.perf_counter(), self.phase, phase
        self.record_peak(outer, outer)
        yield
        if wait and torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[phase] += time.perf_counter() - start
        self.record_peak(phase, outer)
        self.phase = outer  # not reached after an exception: the phase that failed stays

    def record_peak(self, phase: str, outer: str):
        """Records the peak of GPU memory since the last call as the phase's, unless it is inside another."""
        if outer == "log" and torch.cuda.is_available():
            self.peaks[phase] = torch.cuda.max_memory_allocated() / 2**30
            self.peaks["peak"] = max(self.peaks["peak"], self.peaks[phase])
            torch.cuda.reset_peak_memory_stats()

    def memory(self, device: torch.device) -> dict[str, float]:
        """The metrics of memory."""
        largest = max(self.peaks["peak"], peak_memory_gb(device))
        return {f"memory/{phase}_gb": gb for phase, gb in (self.peaks | {"peak": largest}).items()}


def costs(clock: Clock, groups, world: World) -> dict[str, float]:
    """Seconds by phase of the slowest rank, tokens per second over all ranks, largest peak memory of a
    rank."""
    seconds = clock.seconds | {"total": time.perf_counter() - clock.begun[-1]}
    slowest = distributed.largest({f"time/{phase}": s for phase, s in seconds.items()}
                                  | clock.memory(world.device), world)
    new = sum(map(len, groups.token_ids))
    prompt = sum(map(len, groups.prompt_ids)) * groups.rewards_BGR.shape[1]
    return slowest | {"tokens_per_second/sample": new / slowest["time/sample"],
                      "tokens_per_second/update": (new + prompt) / slowest["time/update"]}


def peak_memory_gb(device: torch.device) -> float:
    """Peak of allocated GPU memory, or of this process's resident memory on CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")  # getrusage counts what the parent had when it forked
    if status.exists() and (peak := re.search(r"^VmHWM:\s*(\d+)", status.read_text(), re.MULTILINE)):
        return int(peak[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def watched(train: Callable):
    """Calls train(clock, watch) until it returns or is stopped. Of an error the other ranks are told."""
    clock, watch = Clock(), Watch()
    faulthandler.enable(sys.__stderr__)  # where NCCL's watchdog ends a process, it says in which line
    try:
        train(clock, watch)
    except Stopped:
        pass
    except Exception as e:
        distributed.leave(e, watch, clock.phase, clock.step)
        raise
    finally:
        watch.close()


# ---------------------------------------------------------------------- log


def finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


class Log:
    """Writes rollouts/, metrics.jsonl, log.txt, the console and wandb on the main rank. All ranks must call
    its methods; if a file cannot be written, they raise UserError on all ranks."""

    def __init__(self, folder: Path, config, names: list[str], clock: Clock, world: World):
        self.folder, self.config, self.names, self.clock, self.world = folder, config, names, clock, world
        self.wandb = wandb_log.Wandb(None, self.warn)
        if config.wandb and world.main:
            self.wandb = wandb_log.open_wandb(config, folder, self.warn)
        file = folder / "metrics.jsonl"
        lines = read_jsonl(file, step=Field(int, 0)) if world.main and file.exists() else []
        evaluated = {m["step"] for m in lines if any(name.startswith("eval/") for name in m)}
        self.evaluated = broadcast(evaluated, world)  # steps
        self.first = next((m for m in lines if "loss" in m), None)

    def start(self, model: qwen.Qwen2, inputs: Inputs, saved: int):
        """Prints the first line: model, prompts, devices, step."""
        notes = [f"{model.config.num_parameters:,} parameters", f"{len(inputs.prompts)} prompts"]
        notes += [f"{n} {why} dropped" for why, n in inputs.dropped.items()]
        notes += [f"{n} {why} evaluation prompts dropped" for why, n in inputs.eval_dropped.items()]
        notes += [f"{self.world.size} x {self.world.device.type}"]
        notes += [f"options of {file}" for file in self.config.files]
        self.say(f"{self.folder}: {', '.join(notes + [f'resumed after step {saved}'] * (saved > 0))}")
        dropped = sum(inputs.dropped.values())
        if (share := dropped / (dropped + len(inputs.prompts))) > 0.25:
            self.say(f"warning: {share:.0%} of the prompts are dropped: raise max_new_tokens if they are "
                     f"unreachable, or mend their `keep` and `length_range` in {self.config.prompts}")

    def evaluation_due(self, step: int) -> bool:
        return (bool(self.config.eval_prompts) and step % self.config.eval_every == 0
                and step not in self.evaluated)

    def say(self, line: str, file=None):
        if self.world.main:
            print(line, file=file, flush=True)
            with suppress(OSError), (self.folder / "log.txt").open("a", encoding="utf-8") as f:
                f.write(line + "\n")  # if this fails, so does metrics.jsonl, which ends the run

    def warn(self, line: str):
        self.say(line, sys.stderr)

    def step(self, metrics: dict, records: list[dict], tokens: dict[str, torch.Tensor]):
        """Writes rollouts/step_NNNNNN.jsonl, with `tokens` the .safetensors of that name too, then the step's
        line of metrics.jsonl."""
        self.write(f"step_{metrics['step']:06d}.jsonl", metrics, records, "samples" * bool(tokens), tokens)
        self.first = self.first or metrics
        self.say(console.describe(metrics, self.config.steps, self.names, self.clock.begun))
        for line in console.warnings(metrics, self.config, self.names, self.first):
            self.say(line)

    def evaluation(self, step: int, metrics: dict, records: list[dict]):
        """Writes rollouts/eval_NNNNNN.jsonl, then a line of metrics.jsonl of its own."""
        self.write(f"eval_{step:06d}.jsonl", {"step": step, **metrics}, records, "eval/samples")
        rewards = "  ".join(f"{name} {metrics[f'eval/reward/{name}']:.3f}" for name in self.names)
        self.say(f"eval after step {step}: {rewards}  words {metrics['eval/length/answer_words']:.0f} on "
                 f"{len(records)} prompts")

    def bad_batch(self, step: int, samples: list):
        """Writes the samples of skipped updates, each line the fields of a grpo.Sample."""
        with raise_on_all_ranks(self.world):
            if self.world.main and samples:
                (self.folder / "bad_batches").mkdir(exist_ok=True)
                write_jsonl(self.folder / "bad_batches" / f"step_{step:06d}.jsonl",
                            [{name: x.tolist() if isinstance(x, torch.Tensor) else x
                              for name, x in vars(s).items()} for s in samples])

    def stopped(self, e: Stopped, saved: int):
        self.say(f"stopped by {signal.Signals(*e.args).name}: step {saved} is kept, and the same command "
                 "goes on from there")

    def reward_error(self, details: str):
        """Writes the traceback of a reward to reward_error.txt."""
        if details and self.world.main:
            (self.folder / "reward_error.txt").write_text(details, encoding="utf-8")
            self.say(f"{self.folder}/reward_error.txt has the whole traceback")

    def write(self, file: str, metrics: dict, records: list[dict], table: str = "",
              tokens: dict[str, torch.Tensor] | None = None):
        """Writes numbers that are not finite as null, because JSON has no NaN. file: of the records, empty
        without any. table: the name that wandb gets them by. tokens: of the token record beside them."""
        with raise_on_all_ranks(self.world):
            if self.world.main:
                path = self.folder / "rollouts" / file
                if tokens:
                    path.with_suffix(".safetensors").write_bytes(safetensors.torch.save(tokens))
                if file:
                    write_jsonl(path, records)
                lines = {name: [finite(x) for x in value] if isinstance(value, list) else finite(value)
                         for name, value in metrics.items()}
                write_jsonl(self.folder / "metrics.jsonl", [lines], "a")
        self.wandb.send(lambda run: run.log(metrics, step=metrics["step"]))
        if records and table:
            self.wandb.send(lambda run: run.log({table: wandb_log.table(records)}, step=metrics["step"]))

    def finish(self):
        self.wandb.send(lambda run: run.finish())
        for line in console.summary(self.folder, self.names) if self.world.main else ():
            self.say(line)
        self.say(f"done: {self.folder} holds metrics.jsonl, rollouts/ and checkpoints/")
