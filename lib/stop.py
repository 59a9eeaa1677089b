"""What ends a rank from outside: SIGTERM, SIGINT or SIGHUP at any rank, the end of another or of torchrun."""

import os
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path

PARENT = os.getppid()  # while it lives: imported before what takes seconds
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
GRACE, LIMIT = 3.0, 7.0  # seconds that the main thread has to end by itself; that all ranks have to answer


class Stopped(Exception):
    """The run was told to end, by the signal of this number at one of its ranks at least."""


def follow_torchrun():
    """Ends the process with its torchrun: an orphan would keep a GPU, or join the next run. Process 1, which
    adopts orphans, is torchrun itself where it is a Python: in a container."""
    init = Path("/proc/1/cmdline")
    alive = PARENT != 1 or init.exists() and b"python" in init.read_bytes().split(b"\0")[0]
    while alive and os.getppid() == PARENT:
        time.sleep(0.5)
    os._exit(1)


if "TORCHELASTIC_RUN_ID" in os.environ:
    threading.Thread(target=follow_torchrun, daemon=True).start()


class Watch:
    """Shares with the other ranks, in a thread of its own, what the main thread cannot while it is inside a
    collective: SIGNALS, which go into `stopping`, and errors. The process ends where another rank has ended
    with an error, or does not answer a signal: NCCL would wait for the dead. Or with the second Ctrl-C."""
    def __init__(self):
        self.stopping, self.store, self.rank, self.size = [], None, 0, 1
        self.first = self.error = ""  # which rank has ended first, and why; how this one has ended
        self.noticed = False  # by the main thread, which ends the process itself
        self.ear, self.voice = socket.socketpair()
        self.voice.setblocking(False)
        self.thread = threading.Thread(target=self.listen, daemon=True)
        self.thread.start()

    def start(self, store, rank: int, size: int):
        """store: what the ranks of this start share, over a connection that nobody else uses."""
        self.store, self.rank, self.size = store, rank, size
        signal.set_wakeup_fd(self.voice.fileno())  # a byte for each signal that has a handler, at once
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a shell's background
                signal.signal(number, lambda *_: None)

    def listen(self):
        told, limit, complete = 0.0, float("inf"), False
        while True:
            heard = self.ear.recv(64) if select.select([self.ear], [], [], 0.5)[0] else b""
            if 0 in heard:
                return
            if signal.SIGINT in heard:
                if told and time.monotonic() - told > 0.5:  # `timeout` sends it twice at once
                    os._exit(130)
                told = time.monotonic()
            self.stopping += [number for number in heard if number in SIGNALS]
            limit = min(limit, time.monotonic() + LIMIT) if self.stopping else limit
            try:
                complete |= bool(self.store) and self.exchange()
            except RuntimeError:  # whoever holds it is gone: the next collective will say so
                self.store = None
            if time.monotonic() > limit and not complete:
                self.first = self.first or "a rank was killed"
            if self.first and not self.noticed:
                print(f"error: {self.first}: rank {self.rank} ends too, and the same command goes on from "
                      "the last checkpoint", file=sys.stderr, flush=True)
                time.sleep(GRACE)
                if not self.noticed:
                    os._exit(1)

    def exchange(self) -> bool:
        """Tells the other ranks what this one knows, and asks them. True if all have answered a signal."""
        if self.error or self.store.check(["error"]):
            self.first = self.store.compare_set("error", "", self.error).decode()
        if not self.stopping and self.store.check(["stop"]):
            self.stopping.append(int(self.store.get("stop")))
        if self.stopping:
            self.store.set("stop", str(self.stopping[0]))
            self.store.set(f"answer {self.rank}", "")
        return self.store.check([f"answer {rank}" for rank in range(self.size)])

    def end(self, why: str) -> str:
        """Tells the other ranks that this one ends with an error, and lets them say first that they do too.
        Returns what another that has ended before it said, if one has."""
        self.noticed = True
        if self.size > 1:
            time.sleep(0.5 * (self.rank > 0))  # rank 0 says what all would
            self.error = f"rank {self.rank} has ended ({why})"
            time.sleep(1.5)  # for `listen`, here and at the others
        return self.first.removeprefix(self.error)

    def close(self):
        signal.set_wakeup_fd(-1)
        self.voice.send(b"\0")
        self.thread.join(5)
