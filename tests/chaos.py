"""Kills a run of train.py again and again, and compares its end with that of an undisturbed run.

    python -m tests.chaos [kills | deaths | nodes] [--number 30] [--seed 0]

kills: a signal at a random moment (a step of the sampler, a reward, a backward, a checkpoint's files, its
    rename, any time), `--number` times: kill -9 of one of two ranks, after which torchrun starts both again,
    or of torchrun; SIGINT or SIGHUP to either. Where torchrun has ended, no rank may be left after 15 s, and
    the same command is given again.
deaths: as with NCCL, a rank that has lost another waits for it and never returns. One of two ranks raises an
    exception, is out of memory, is killed, told to stop, or torchrun is killed while its ranks start; with a
    static or a c10d rendezvous at a fixed port. Every process must be gone 15 s later, the cause be said, and
    the same command, given at once, go on.
nodes: two torchrun agents with two ranks each and a replica of the weights (HSDP) on each; the one that does
    not host the rendezvous is killed with its ranks in the middle of a step, and started again.

Runs the embedded default on small settings, in a temporary folder. Ends with one JSON line, kept in
bench/results/chaos.json.
"""

import ctypes
import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from safetensors import safe_open

from bench import finish, hardware, parser
from lib import distributed
from lib.files import ROOT

SMALL = ["--prompts_per_step", "4", "--group_size", "4", "--max_new_tokens", "48", "--unreachable", "keep",
         "--eval_prompts", "", "--save_every", "2", "--steps", "40", "--reward", "length,format"]

MOMENTS = {  # what is called then, and its calls in two to four steps of SMALL on each of two ranks
    "sampling": ("sampler.Sampler.launch", 120),
    "scoring": ("rollout.score", 36),
    "backward": ("train.backward", 4),
    "checkpoint": ("torch.distributed.checkpoint.save", 3),
    "rename": ("os.rename", 2),
}


def strike(moment: str, nth: int, sign: int | Exception = signal.SIGKILL, pid: int = 0):
    """This process sends itself, or another, a signal at the nth call of what happens at this moment, or
    raises an exception there. The file CHAOS_STRUCK is made then."""
    path, name = MOMENTS[moment][0].rsplit(".", 1)
    try:
        owner = importlib.import_module(path)
    except ModuleNotFoundError:  # a class
        owner = getattr(importlib.import_module(path.rsplit(".", 1)[0]), path.rsplit(".", 1)[1])
    real, calls = getattr(owner, name), []

    def fatal(*args, **kwargs):
        calls.append(1)
        if len(calls) == nth:
            Path(os.environ.get("CHAOS_STRUCK", os.devnull)).touch()
            if isinstance(sign, Exception):
                raise sign
            os.kill(pid or os.getpid(), sign)
        return real(*args, **kwargs)

    setattr(owner, name, fatal)


def as_nccl():
    """Where gloo says at once that a rank is gone, this process waits in C for ever, whatever the signal."""
    real = distributed.peer_failure

    def peer_failure(e: BaseException) -> str:
        while real(e):
            ctypes.CDLL(None).pause()
        return ""

    distributed.peer_failure = peer_failure


DEATHS = {  # how, and what is on the screen then
    "raises": (KeyError("ours"), "KeyError: 'ours'"),
    "out of memory": (RuntimeError("CUDA out of memory"), " is out of memory: "),
    "SIGKILL": (signal.SIGKILL, "error: a rank was killed: "),
    "SIGTERM": (signal.SIGTERM, ""),
    "torchrun SIGKILL": (None, ""),
    "nothing": (None, ""),
}


def victim():
    """A rank of `deaths`: train.py, with the death that CHAOS_DEATH describes."""
    import train

    as_nccl()
    rank, how, moment, nth = json.loads(os.environ["CHAOS_DEATH"])
    if int(os.environ["RANK"]) == rank and DEATHS[how][0] is not None:
        strike(moment, nth, DEATHS[how][0])
    train.main()


def worker():
    """A rank of `kills`: train.py, and at each start but the last one rank draws how it ends."""
    import train

    restarts, before, number, seed = (int(os.environ[name]) for name in (
        "TORCHELASTIC_RESTART_COUNT", "CHAOS_BEFORE", "CHAOS_NUMBER", "CHAOS_SEED"))
    rng = random.Random(f"{seed}/{before + restarts}")
    moment, rank = rng.choice([*MOMENTS, "any time"]), rng.randrange(2)
    rank = 0 if moment == "rename" else rank  # which is rank 0's
    victim, sign = rng.choice([("rank", signal.SIGKILL)] * 3 + [("torchrun", signal.SIGKILL)] * 2 + [
        (victim, sign) for victim in ("rank", "torchrun") for sign in (signal.SIGINT, signal.SIGHUP)])
    if int(os.environ["RANK"]) == rank:
        pid = os.getpid() if victim == "rank" else os.getppid()
        if before + restarts >= number:
            victim, moment = "nobody", "any time"
        elif moment == "any time":
            threading.Timer(rng.uniform(0, 8), os.kill, (pid, sign)).start()
        else:
            strike(moment, rng.randint(1, MOMENTS[moment][1]), sign, pid)
        print(f"chaos: start {before + restarts}, rank {rank}: {sign.name} to {victim}: {moment}", flush=True)
    train.main()


def torchrun(*arguments: str, log: Path, **environment: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *arguments], cwd=ROOT,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                            stdout=log.open("a"), stderr=subprocess.STDOUT)


def differences(a: Path, b: Path) -> list[str]:
    """What the ends of two runs differ in: checkpoints' tensors, texts, metrics but those of the machine."""
    def content(run: Path) -> dict:
        out = {f.name: f.read_text() for f in (run / "rollouts").iterdir()}
        for file in max((run / "checkpoints").glob("step_*")).rglob("*.safetensors"):
            with safe_open(file, "np") as f:  # which rank writes a part that replicas share is not fixed
                parts = json.loads(f.metadata()["DCP_SHARDING_INFO"])
                out |= {f"{name}{parts[name]['saved_offsets']}": f.get_tensor(name).tobytes()
                        for name in f.keys()}
        for line in (run / "metrics.jsonl").read_text().splitlines():
            m = json.loads(line)
            kind = "evaluation" if any(k.startswith("eval/") for k in m) else "metrics"
            out[f"{kind} of step {m['step']}"] = {
                k: v for k, v in m.items() if not k.startswith(("time/", "tokens_per_second/", "memory/"))}
        return out

    one, other = content(a), content(b)
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


def left(run: Path) -> list[str]:
    """Command lines of the processes that still work on a run."""
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has just ended
            lines.append(file.read_text())
    return [line for line in lines if str(run) in line]


def kills(folder: Path, number: int, seed: int) -> dict:
    launch, long = ["--standalone", "--nproc_per_node=2"], [*SMALL, "--steps", str(2 * number)]
    calm = torchrun(*launch, "train.py", *long, "--run_dir", str(folder / "calm"), log=folder / "calm.log")
    assert calm.wait() == 0, (folder / "calm.log").read_text()
    start, lines, slowest, commands = time.time(), [], 0.0, 0
    while not any(line.startswith("done: ") for line in lines) and commands <= number:
        before = sum(line.startswith("chaos: ") for line in lines)
        wild = torchrun(*launch, f"--max-restarts={number}", "-m", "tests.chaos", "worker", *long,
                        "--run_dir", str(folder / "wild"), log=folder / "wild.log", CHAOS_NUMBER=str(number),
                        CHAOS_SEED=str(seed), CHAOS_BEFORE=str(before))
        code, ended, commands = wild.wait(), time.time(), commands + 1
        while (there := left(folder / "wild")) and time.time() < ended + 15:
            time.sleep(0.1)
        assert not there, (there, (folder / "wild.log").read_text()[-3000:])
        slowest, lines = max(slowest, time.time() - ended), (folder / "wild.log").read_text().splitlines()
    drawn = [line.split(": ")[2:] for line in lines if line.startswith("chaos: ")][:-1]
    counts = Counter(sum(drawn, []))
    return {"exit_code": code, "kills": len(drawn), "drawn": {m: counts[m] for m in sorted(counts)},
            "commands": commands, "slowest_end_s": round(slowest, 1), "seconds": round(time.time() - start),
            "differ": differences(folder / "calm", folder / "wild") if code == 0 else lines[-60:]}


def deaths(folder: Path, number: int, seed: int) -> dict:
    rng, port, start = random.Random(seed), free_port(), time.time()
    launches = {
        "static": ["--rdzv_backend=static", "--nnodes=1", "--master_addr=127.0.0.1", f"--master_port={port}"],
        "c10d": ["--rdzv_backend=c10d", "--nnodes=1", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=chaos"]}
    long = [*SMALL, "--steps", str(number), "--save_every", "1"]
    calm = torchrun("--standalone", "--nproc_per_node=2", "train.py", *long, "--run_dir",
                    str(folder / "calm_deaths"), log=folder / "calm.log")
    assert calm.wait() == 0, (folder / "calm.log").read_text()
    run, counts, slowest, late, orphans = folder / "deaths", Counter(), 0.0, [], {}
    for trial in range(number + 1):
        how = rng.choice([*DEATHS][:-1]) if trial < number else "nothing"
        moment, launch, rank = rng.choice([*MOMENTS]), rng.choice([*launches]), rng.randrange(2)
        rank = 0 if moment == "rename" else rank
        death = [rank, how, moment, rng.randint(1, MOMENTS[moment][1] // 2)]
        struck, log = folder / f"struck_{trial}", folder / f"deaths_{trial}.log"
        agent = torchrun(*launches[launch], "--nproc_per_node=2", "-m", "tests.chaos", "victim", *long,
                         "--run_dir", str(run), log=log, CHAOS_DEATH=json.dumps(death),
                         CHAOS_STRUCK=str(struck))
        while gone_by := {pid: t for pid, t in orphans.items() if Path(f"/proc/{pid}").exists()}:
            assert time.time() < max(gone_by.values()), (trial, gone_by)  # of the torchrun before
            time.sleep(0.1)
        if how == "torchrun SIGKILL":
            while not children(agent.pid):
                time.sleep(0.05)
            time.sleep(rng.uniform(0, 8))
            orphans = dict.fromkeys(children(agent.pid), time.time() + 15)
            agent.kill()
            agent.wait()
            launch += f", {len(orphans)} ranks"
        else:
            code, orphans = agent.wait(), {}
            if struck.exists():
                slowest = max(slowest, seconds := round(time.time() - struck.stat().st_mtime, 1))
                late += [(death, seconds)] * (seconds > 15)
                assert not left(run), (death, log.read_text()[-3000:])
                assert DEATHS[how][1] in log.read_text(), (death, log.read_text()[-3000:])
            elif trial < number:
                how += ", too late"
        counts.update((how, moment, launch))
    return {"exit_code": code, "deaths": number, "drawn": {m: counts[m] for m in sorted(counts)},
            "slowest_end_s": slowest, "later_than_15_s": late, "seconds": round(time.time() - start),
            "differ": differences(folder / "calm_deaths", run) if code == 0 else log.read_text()[-3000:]}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def nodes(folder: Path, kill_after: int = 5, steps: int = 10) -> dict:
    options = [*SMALL, "--steps", str(steps), "--replicate", "2"]

    def agent(run: str, port: int, log: str) -> subprocess.Popen:
        return torchrun("--nnodes=2", "--nproc_per_node=2", "--max-restarts=3", "--rdzv_backend=c10d",
                        f"--rdzv_endpoint=127.0.0.1:{port}", "train.py", *options, "--run_dir",
                        str(folder / run), log=folder / log, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")

    for run in ("nodes", "nodes_calm"):
        port = free_port()
        host = agent(run, port, f"{run}_host.log")
        time.sleep(3)  # the first to come hosts the rendezvous
        guest = agent(run, port, f"{run}_guest.log")
        if run == "nodes":
            while f"step {kill_after:4d}/" not in (folder / f"{run}_host.log").read_text():
                assert host.poll() is None and guest.poll() is None, (folder / f"{run}_host.log").read_text()
                time.sleep(0.05)
            for pid in (guest.pid, *children(guest.pid)):
                os.kill(pid, signal.SIGKILL)
            killed = time.time()
            guest.wait()
            guest = agent(run, port, f"{run}_guest.log")
        codes = [host.wait(), guest.wait()]
        assert codes == [0, 0], (codes, (folder / f"{run}_host.log").read_text()[-3000:])
        if run == "nodes":
            seconds = round(time.time() - killed)
    said = [line for line in (folder / "nodes_host.log").read_text().splitlines() if "resumed after" in line]
    return {"resumed": [line.split(", ")[-1] for line in said], "seconds_after_kill": seconds,
            "differ": differences(folder / "nodes_calm", folder / "nodes")}


def main():
    if sys.argv[1:2] in (["worker"], ["victim"]):
        return {"worker": worker, "victim": victim}[sys.argv.pop(1)]()
    options = parser(__doc__)
    options.add_argument("what", nargs="?", choices=("kills", "deaths", "nodes", "all"), default="all")
    options.add_argument("--number", type=int, default=30)
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    result = {"bench": "chaos", **hardware()}
    with tempfile.TemporaryDirectory() as folder:
        for what, measure in (("kills", kills), ("deaths", deaths)):
            if args.what in (what, "all"):
                result[what] = measure(Path(folder), args.number, args.seed)
        if args.what in ("nodes", "all"):
            result["nodes"] = nodes(Path(folder))
    finish(result)


if __name__ == "__main__":
    main()
