"""Ranks without torchrun: forked from one process that has imported everything, because imports take longer
than a short run. Like torchrun's ranks they share one store over all restarts, and when one has failed the
others get SIGTERM."""

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from lib.files import ROOT


class Forks:
    """Starts ranks, one group at a time."""

    def __init__(self, logs: Path):
        self.logs = logs
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.server = subprocess.Popen([sys.executable, "-m", "tests.forks"], cwd=ROOT, env=environment,
                                       text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def start(self, *argv, ranks: int = 1, main: str = "train", code: str = "",
              agent: bool = True) -> tuple[list[int], Callable]:
        """Process ids of the ranks, and wait() -> (exit codes, what each rank printed).

        main: module whose main() runs with `argv`; "": none. code: runs before it, with the number of its
        `rank`. agent: whether a failure ends the other ranks."""
        start = {"argv": [*map(str, argv)], "ranks": ranks, "main": main, "code": code, "agent": agent,
                 "log": str(self.logs / "log")}
        print(json.dumps(start), file=self.server.stdin, flush=True)
        pids = json.loads(self.server.stdout.readline())

        def wait() -> tuple[list[int], list[str]]:
            codes = json.loads(self.server.stdout.readline())
            return codes, [(self.logs / f"log.{rank}").read_text() for rank in range(ranks)]

        return pids, wait

    def train(self, folder: Path, *options, small=(), **given) -> tuple[list[int], list[str]]:
        """Ranks of train.py: exit codes and what each printed."""
        return self.start(*small, "--run_dir", folder, *options, **given)[1]()

    def run(self, code: str, ranks: int) -> list[str]:
        """Code on several ranks that must succeed: what each printed."""
        codes, said = self.start(ranks=ranks, main="", code=code)[1]()
        assert codes == [0] * ranks, said
        return said

    def close(self):
        self.server.stdin.close()
        assert self.server.wait(30) == 0


def serve():
    """Reads a start per line; answers with a line of process ids and one of exit codes."""
    for module in ("bench.interpreter", "train", "scripts.evaluate"):
        __import__(module)
    import torch
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGHUP):  # a shell in the background, or nohup, may ignore them
        signal.signal(number, signal.SIG_DFL)
    port, end = store()
    for restarts, line in enumerate(sys.stdin):
        start = json.loads(line)
        world = {"WORLD_SIZE": start["ranks"], "LOCAL_WORLD_SIZE": start["ranks"], "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True",
                 "TORCHELASTIC_RESTART_COUNT": restarts}
        pids, codes = [], {}
        for rank in range(start["ranks"]):
            pid = os.fork()
            if pid == 0:
                os.close(end)
                become(rank, start, world | {"RANK": rank, "LOCAL_RANK": rank})
            pids.append(pid)
        print(json.dumps(pids), flush=True)
        while len(codes) < len(pids):
            pid, status = os.wait()
            codes[pid] = os.waitstatus_to_exitcode(status)
            if codes[pid] and start["agent"]:
                for other in set(pids) - set(codes):
                    os.kill(other, signal.SIGTERM)
        print(json.dumps([codes[pid] for pid in pids]), flush=True)


def store() -> tuple[int, int]:
    """Port of a store in a process of its own, whose threads hold no lock while a rank is forked; and the
    descriptor that ends it when all its copies are closed."""
    import torch.distributed as dist
    (told, tell), (over, end) = os.pipe(), os.pipe()
    if os.fork() == 0:
        os.close(end)
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(tell, str(server.port).encode())
        os.read(over, 1)
        os._exit(0)
    return int(os.read(told, 9)), end


def become(rank: int, start: dict, environment: dict):
    """Runs a rank in this process, and ends it."""
    out = os.open(f"{start['log']}.{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(out, 1), os.dup2(out, 2)
    os.environ.update({name: str(value) for name, value in environment.items()})
    sys.argv, code = [f"{start['main']}.py", *start["argv"]], 0
    try:
        exec(start["code"], {"rank": rank})
        if start["main"]:
            sys.modules[start["main"]].main()
    except SystemExit as e:
        code = e.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
