"""Ends a rank for reasons from outside: SIGTERM, SIGINT or SIGHUP at any rank, the end of another rank or of
torchrun."""

import os
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path

PARENT = os.getppid()  # read early, while the parent lives: this module is imported before slow ones
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
GRACE = 3.0  # seconds for the main thread to end by itself once another rank has ended
LIMIT = 7.0  # seconds for all ranks to answer a signal


class Stopped(Exception):
    """A signal with this number, at one or more ranks, asks the run to stop."""


def follow_torchrun():
    """Ends the process when its torchrun has ended: an orphan would keep a GPU, or join the next run. Process
    1, which adopts orphans, is torchrun itself if it runs Python, as in a container."""
    init = Path("/proc/1/cmdline")
    alive = PARENT != 1 or init.exists() and b"python" in init.read_bytes().split(b"\0")[0]
    while alive and os.getppid() == PARENT:
        time.sleep(0.5)
    os._exit(1)


if "TORCHELASTIC_RUN_ID" in os.environ:
    threading.Thread(target=follow_torchrun, daemon=True).start()


class Watch:
    """A thread that exchanges signals and errors with the other ranks, also while the main thread is blocked
    in a collective. Received SIGNALS go into `stopping`. It ends the process if another rank has ended with
    an error or does not answer a signal, because NCCL would wait for that rank; and at the second Ctrl-C."""
    def __init__(self):
        self.stopping, self.store, self.rank, self.size = [], None, 0, 1
        self.first = ""  # which rank has ended first, and why
        self.error = ""  # how this rank has ended
        self.noticed = False  # True: the main thread knows of the end, and ends the process itself
        self.reader, self.writer = socket.socketpair()  # signal numbers; 0 ends the thread
        self.writer.setblocking(False)
        self.thread = threading.Thread(target=self.listen, daemon=True)
        self.thread.start()

    def start(self, store, rank: int, size: int):
        """store: shared by the ranks of this start, over a connection of its own."""
        self.store, self.rank, self.size = store, rank, size
        signal.set_wakeup_fd(self.writer.fileno())  # writes a byte for each signal that has a handler
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # under nohup or in a shell's background
                signal.signal(number, lambda *_: None)

    def listen(self):
        interrupted, limit, complete = 0.0, float("inf"), False
        while True:
            received = self.reader.recv(64) if select.select([self.reader], [], [], 0.5)[0] else b""
            if 0 in received:
                return
            if signal.SIGINT in received:
                if interrupted and time.monotonic() - interrupted > 0.5:  # `timeout` sends it twice at once
                    os._exit(130)
                interrupted = time.monotonic()
            self.stopping += [number for number in received if number in SIGNALS]
            limit = min(limit, time.monotonic() + LIMIT) if self.stopping else limit
            try:
                complete |= bool(self.store) and self.exchange()
            except RuntimeError:  # the store's process has ended: the next collective will fail
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
        """Publishes this rank's state and reads that of the others. True if all have answered a signal."""
        if self.error or self.store.check(["error"]):
            self.first = self.store.compare_set("error", "", self.error).decode()
        if not self.stopping and self.store.check(["stop"]):
            self.stopping.append(int(self.store.get("stop")))
        if self.stopping:
            self.store.set("stop", str(self.stopping[0]))
            self.store.set(f"answer {self.rank}", "")
        return self.store.check([f"answer {rank}" for rank in range(self.size)])

    def end(self, why: str) -> str:
        """Tells the other ranks that this one ends with an error, and waits until they have printed that they
        end too. Returns the message of a rank that has ended before, empty if there is none."""
        self.noticed = True
        if self.size > 1:
            time.sleep(0.5 * (self.rank > 0))  # an error of all ranks is printed by rank 0
            self.error = f"rank {self.rank} has ended ({why})"
            time.sleep(1.5)  # for `listen`, here and at the other ranks
        return self.first.removeprefix(self.error)

    def close(self):
        signal.set_wakeup_fd(-1)
        self.writer.send(b"\0")
        self.thread.join(5)
