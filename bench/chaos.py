"""Does a run survive? It is killed again and again; its end is compared with one that nobody disturbed.

    python -m bench.chaos [kills | nodes] [--number 30] [--seed 0]

kills: a signal at a random moment (a step of the sampler, a reward, a backward, a checkpoint's files, its
    rename, any time), `--number` times: kill -9 of one of two ranks, after which torchrun starts both again,
    or of torchrun; SIGINT or SIGHUP to either. Where torchrun has ended, no rank may be left after 15 s, and
    the same command is given again.
nodes: two torchrun agents with two ranks each and a replica of the weights (HSDP) on each; the one that does
    not host the rendezvous is killed with its ranks in the middle of a step, and started again.

Runs the embedded default on small settings, in a temporary folder. Ends with one JSON line.
"""

import argparse
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

from bench import hardware

ROOT = Path(__file__).parent.parent
SMALL = ["--prompts_per_step", "4", "--group_size", "4", "--max_new_tokens", "48", "--unreachable", "keep",
         "--eval_prompts", "", "--save_every", "2", "--steps", "40", "--reward", "length,format"]

MOMENTS = {  # what is called then, and its calls in two to four steps of SMALL on each of two ranks
    "sampling": ("sampler.Sampler.launch", 120),
    "scoring": ("rollout.score", 36),
    "backward": ("train.backward", 4),
    "checkpoint": ("torch.distributed.checkpoint.save", 3),
    "rename": ("os.rename", 2),
}


def strike(moment: str, nth: int, sign: int = signal.SIGKILL, pid: int = 0):
    """This process sends itself, or another, a signal at the nth call of what happens at this moment."""
    path, name = MOMENTS[moment][0].rsplit(".", 1)
    try:
        owner = importlib.import_module(path)
    except ModuleNotFoundError:  # a class
        owner = getattr(importlib.import_module(path.rsplit(".", 1)[0]), path.rsplit(".", 1)[1])
    real, calls = getattr(owner, name), []

    def fatal(*args, **kwargs):
        calls.append(1)
        if len(calls) == nth:
            os.kill(pid or os.getpid(), sign)
        return real(*args, **kwargs)

    setattr(owner, name, fatal)


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
        wild = torchrun(*launch, f"--max-restarts={number}", "-m", "bench.chaos", "worker", *long,
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


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def nodes(folder: Path, kill_after: int = 5, steps: int = 10) -> dict:
    options = [*SMALL, "--steps", str(steps), "--replicate", "2"]

    def agent(run: str, port: int, log: str) -> subprocess.Popen:
        return torchrun("--nnodes=2", "--nproc_per_node=2", "--max-restarts=3", "--rdzv_backend=c10d",
                        f"--rdzv_endpoint=127.0.0.1:{port}", "train.py", *options, "--run_dir",
                        str(folder / run), log=folder / log, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")

    def free_port() -> int:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            return s.getsockname()[1]

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
    if sys.argv[1:2] == ["worker"]:
        del sys.argv[1]
        return worker()
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("kills", "nodes", "both"), default="both")
    parser.add_argument("--number", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    result = {"bench": "chaos", **hardware()}
    with tempfile.TemporaryDirectory() as folder:
        if args.what != "nodes":
            result["kills"] = kills(Path(folder), args.number, args.seed)
        if args.what != "kills":
            result["nodes"] = nodes(Path(folder))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
