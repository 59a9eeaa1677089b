"""The folder of a run, its display and its clock: what surrounds the algorithm in train.py."""

import dataclasses
import fcntl
import hashlib
import itertools
import json
import math
import os
import resource
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from pathlib import Path

import torch

from checkpoints import DiskError, complete
from options import ConfigError

ROOT = Path(__file__).parent


def locate(path: str) -> str:
    """A path as given, or, for the embedded default, inside the repository."""
    return path if Path(path).exists() or not (ROOT / path).exists() else str(ROOT / path)


# What a run may change when it goes on: nothing that its steps depend on.
MAY_DIFFER = {"run_dir", "resume", "steps", "save_every", "keep_checkpoints", "keep_every", "device", "wandb",
              "max_sequences", "replicate", "recompute", "offload_activations", "offload_optimizer",
              "offload_reward_model", "timeout", "max_skipped"}

# ---------------------------------------------------------------------- folder of the run


def differences(config, recorded: dict) -> list[str]:
    mine = dataclasses.asdict(config)
    return [
        f"{k} ({recorded.get(k)!r} there, {v!r} now)" for k, v in mine.items()
        if k not in MAY_DIFFER and recorded.get(k) != v
        and not ("://" in str(v) and "://" in str(recorded.get(k)))  # servers may move
    ]


def lock(folder: Path):
    """Keeps the folder for this process until it ends. Raises ConfigError if another process has it, even a
    stopped one. A POSIX lock: no child inherits it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)  # for good: to close it is to unlock it
    except OSError:
        return  # a finished run may be read-only; of any other `open_folder` says why it cannot be written
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(file, os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode()))
    except (BlockingIOError, PermissionError):
        raise ConfigError(f"{folder} is in use by {os.read(file, 999).decode()}: end that run first, or "
                          "choose another run_dir") from None
    except OSError as e:
        print(f"warning: {folder} cannot be locked ({e.strerror}): start no other run in it", file=sys.stderr,
              flush=True)


def new_folder() -> Path:
    """A folder under runs/ that this process has made and no other."""
    name = Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    try:
        for folder in (Path(f"{name}-{n}" if n > 1 else name) for n in itertools.count(1)):
            with suppress(FileExistsError):
                folder.mkdir(parents=True)
                return folder
    except OSError as e:
        raise ConfigError(f"{name} cannot be made ({e.strerror}): give a --run_dir elsewhere") from None


def choose_folder(config, restarted: bool) -> Path:
    """run_dir, or a new folder; after an elastic restart the newest one with this config, which is the run
    that broke off. It is locked. Raises ConfigError if a run goes on there, or one of another config was."""
    folder = Path(config.run_dir) if config.run_dir else None
    if not folder and restarted:
        for record in sorted(Path("runs").glob("*/config.json"), key=lambda f: -f.stat().st_mtime):
            if not differences(config, json.loads(record.read_text())):
                with suppress(ConfigError):  # another run with the same options goes on there
                    lock(record.parent)
                    return record.parent
    if config.resume == "true" and not (folder and complete(folder / "checkpoints")):
        raise ConfigError(f"resume is true, but {folder or 'a new run'} has no checkpoint to go on from")
    folder = folder or new_folder()
    record = folder / "config.json"
    if record.exists():
        if config.resume == "false":
            raise ConfigError(f"{folder} holds a run already and resume is false: choose another run_dir")
        if changed := differences(config, json.loads(record.read_text())):
            raise ConfigError(
                f"{folder} holds a run of another config: {'; '.join(changed)}; choose another run_dir, or "
                "the same options"
            )
    lock(folder)
    return folder


def open_folder(config, folder: Path, newest: tuple[Path, dict] | None):
    """Prepares the folder for going on from its newest checkpoint, or for beginning. Main rank only. Raises
    ConfigError."""
    path, state = newest or (None, {"step": -1})
    try:
        (folder / "rollouts").mkdir(parents=True, exist_ok=True)
        replace(folder / "config.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n")
        kept = keep_source(folder, state["step"])
        cut_back(folder, state["step"] - ("unlogged" in state))
    except OSError as e:
        raise ConfigError(f"run_dir {folder} cannot be written ({e}): choose another") from None
    if (code := state.get("code")) and code != code_hash():
        with logged(folder):
            print(f"warning: {path} was made by other code than this: {kept.name} holds what runs from here "
                  "on", file=sys.stderr, flush=True)


def replace(file: Path, text: str):
    """Writes beside and renames, so that a crash leaves the old file or the new one."""
    beside = Path(f"{file}.writing")
    beside.write_text(text, encoding="utf-8")
    beside.replace(file)


def source() -> dict[str, str]:
    """The code that runs, by file."""
    return {str(f.relative_to(ROOT)): f.read_text(encoding="utf-8")
            for pattern in ("*.py", "kernels/*.py", "data/*.py", "evaluation/*.py")
            for f in sorted(ROOT.glob(pattern))}


def code_hash() -> str:
    return hashlib.sha256(json.dumps(source()).encode()).hexdigest()


def keep_source(folder: Path, step: int) -> Path:
    """Copies the code into source/; changed code of a resumed run into source_from_step_NNNNNN/. Returns the
    folder that holds it."""
    code, kept = source(), max(folder.glob("source*"), default=None)
    if step > 0 and kept and all((kept / name).exists() and (kept / name).read_text(encoding="utf-8") == text
                                 for name, text in code.items()):
        return kept
    target = folder / (f"source_from_step_{step + 1:06d}" if step > 0 else "source")
    for name, text in code.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(text, encoding="utf-8")
    return target


def cut_back(folder: Path, step: int):
    """Removes metrics and rollouts of steps after `step`: they will be made again."""
    metrics = folder / "metrics.jsonl"
    if metrics.exists():
        lines = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
        replace(metrics, "".join(line for line in lines if json.loads(line)["step"] <= step))
    for file in (folder / "rollouts").glob("*_*.jsonl"):
        if int(file.stem.split("_")[1]) > step:
            file.unlink()


def write_jsonl(file: Path, records: list[dict], mode: str = "w"):
    """Raises DiskError."""
    try:
        file.parent.mkdir(exist_ok=True)
        with file.open(mode, encoding="utf-8") as f:
            f.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    except OSError as e:
        raise DiskError(f"{file} cannot be written ({e.strerror}): make room, or mend it, and the same "
                        "command goes on") from None


def read_jsonl(file: Path) -> list[dict]:
    """Its records, without one that is being written: a last line without its end. Raises OSError or
    ValueError."""
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]


def append_metrics(folder: Path, metrics: dict):
    """Numbers that are not finite become null, which every reader of JSON knows."""
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    write_jsonl(folder / "metrics.jsonl", [finite], "a")


class Wandb:
    """A run at Weights & Biases, or none: what fails there is said once on stderr, and training goes on."""
    def __init__(self, run=None):
        self.run = run

    def send(self, method: str, *arguments, **options):
        try:
            if self.run:
                getattr(self.run, method)(*arguments, **options)
        except Exception as e:
            self.run = None
            warn_of_wandb(e, "goes on without it, and metrics.jsonl holds every step")


def warn_of_wandb(error: Exception, consequence: str):
    print(f"warning: wandb failed ({' '.join(str(error).split())[:200]}): this run {consequence}",
          file=sys.stderr, flush=True)


def open_wandb(config, folder: Path) -> Wandb:
    """Online if there is a key and the server answers in time, else offline, else none."""
    has_key = bool(os.environ.get("WANDB_API_KEY")) or (Path.home() / ".netrc").exists()
    mode = os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
    options = {"project": "longwriter-zero", "name": folder.name, "resume": "allow", "dir": str(folder),
               "id": hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
               "config": dataclasses.asdict(config)}
    limits = {"login_timeout": 5, "init_timeout": 10, "finish_timeout": 60}  # seconds
    try:
        import wandb
        try:
            return Wandb(wandb.init(mode=mode, settings=limits, **options))
        except Exception as e:
            wandb.teardown()  # its service holds on to the id
            offline = Wandb(wandb.init(mode="offline", **options))
            warn_of_wandb(e, f"logs offline; later: wandb sync {folder}/wandb/offline-run-*")
            return offline
    except Exception as e:
        warn_of_wandb(e, "goes on without it; pip install wandb if it is missing, or leave --wandb out")
        return Wandb()


# ---------------------------------------------------------------------- display


class Tee:
    """A stream whose text goes to a file too. Where the file cannot be written, metrics.jsonl, which cannot
    either, ends the run."""
    def __init__(self, screen, file: Path):
        self.screen, self.file = screen, file

    def write(self, text: str) -> int:
        with suppress(OSError), self.file.open("a", encoding="utf-8") as f:
            f.write(text)
        return self.screen.write(text)

    def __getattr__(self, name: str):
        return getattr(self.screen, name)


@contextmanager
def logged(folder: Path) -> Iterator[None]:
    """Appends to log.txt what is printed meanwhile, but for progress."""
    file = folder / "log.txt"
    with redirect_stdout(Tee(sys.stdout, file)), redirect_stderr(Tee(sys.stderr, file)):
        yield


class Progress:
    """How far sampling is, and when it ends if it goes on so: one line that is overwritten on a terminal, a
    line every 30 seconds elsewhere."""
    def __init__(self, label: str, total: int, show: bool, what: str = "samples"):
        self.label, self.total, self.show, self.what = label, total, show, what
        self.start = self.last = time.perf_counter()
        self.stream = getattr(sys.stderr, "screen", sys.stderr)  # not to log.txt
        self.terminal = self.stream.isatty()

    def update(self, stats):
        now = time.perf_counter()
        if not self.show or now - self.last < (0.2 if self.terminal else 30):
            return
        self.last = now
        rate = stats.new_tokens / (now - self.start)
        left = (now - self.start) * (self.total - stats.finished) / max(1, stats.finished)
        line = (f"{self.label}: {stats.finished}/{self.total} {self.what}, {stats.new_tokens:,} tokens, "
                f"{rate:,.0f} tok/s on this rank"
                + f", about {timedelta(seconds=round(left))} left" * (stats.finished > 0))
        start, end = ("\r", "\033[K") if self.terminal else ("", "\n")
        print(f"{start}{line}", end=end, file=self.stream, flush=True)

    def close(self):
        if self.show and self.terminal:
            print("\r\033[K", end="", file=self.stream, flush=True)


class Clock:
    """Seconds by phase of a step, and where the run is. `save` keeps the time of the last checkpoint.
    begun: when the process and each of its steps began."""
    def __init__(self):
        self.step, self.phase, self.seconds, self.begun = 0, "start", {"save": 0.0}, []
        self.begin(0)

    def begin(self, step: int):
        self.step, self.phase = step, "log"  # whatever is no phase of its own
        self.begun.append(time.perf_counter())
        phases = ("sample", "idle", "score", "logprob", "backward", "step", "update", "publish")
        self.seconds |= dict.fromkeys(phases, 0.0)

    @contextmanager
    def __call__(self, phase: str, wait: bool = True) -> Iterator[None]:
        start, outer, self.phase = time.perf_counter(), self.phase, phase
        yield
        if wait and torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[phase] += time.perf_counter() - start
        self.phase = outer  # after an exception it stays what it was


def peak_memory_gb(device: torch.device) -> float:
    """Peak of allocated GPU memory, or of this process's resident memory on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if (status := Path("/proc/self/status")).exists():  # getrusage counts what the parent had when it forked
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def describe(metrics: dict, steps: int, names: list[str], begun: list[float]) -> str:
    """A step's line. begun: of the Clock; its steps so far say how long the rest takes."""
    now, done = time.perf_counter(), len(begun) - 1
    left = (now - begun[done > 0]) / max(1, done) * (steps - metrics["step"]) / 60
    rewards = " ".join(f"{name} {metrics[f'reward/{name}']:.3f}" for name in names)
    return (f"step {metrics['step']:4d}/{steps}  {rewards}  words {metrics['length/answer_words']:.0f} "
            f"in-range {metrics['length/in_range']:.0%} cut {metrics['truncated']:.0%}  "
            f"grad {metrics['grad_norm']:.3f} entropy {metrics['entropy']:.2f} "
            f"gap {metrics['gap/mean']:.0e}  sample {metrics['time/sample']:.1f}s "
            f"({metrics['tokens_per_second/sample']:,.0f} tok/s) update {metrics['time/update']:.1f}s "
            f"all {metrics['time/total']:.1f}s  elapsed {(now - begun[0]) / 60:.0f}min left {left:.0f}min")


GAP_LIMIT = 0.01  # gap/k3 that is warned of: 100 nats over 10,000 tokens; a bf16 sampler of the default: 1e-5


def warnings(metrics: dict, config) -> Iterator[str]:
    """What a step's metrics call for, with the remedy."""
    if metrics["truncated"] > 0.25:
        yield (f"warning: {metrics['truncated']:.0%} of the samples were cut at max_new_tokens "
               f"{config.max_new_tokens}: raise it, or ask for shorter texts")
    dead = {name: metrics[f"dead_groups/{name}"] for name in config.reward_names}
    if dead := [f"{name} in {n}" for name, n in dead.items() if 2 * n > config.prompts_per_step]:
        yield (f"warning: all samples of a group earned the same, {', '.join(dead)} of the "
               f"{config.prompts_per_step} groups: raise group_size or temperature, or choose prompts that "
               "are neither too easy nor too hard")
    if metrics["gap/k3"] > GAP_LIMIT:
        yield (f"warning: the sampler drifts from the trainer: gap/k3 {metrics['gap/k3']:.3g} is above "
               f"{GAP_LIMIT} nats a token: set sampler_dtype to float32, and keep tis_cap above 0")
