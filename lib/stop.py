"""What ends a run from outside: SIGTERM, SIGINT or SIGHUP at any rank, or the end of its torchrun."""

import os
import select
import signal
import socket
import threading
import time

PARENT = os.getppid()  # while it lives: imported before what takes seconds
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(Exception):
    """The run was told to end, by the signal of this number at one of its ranks at least."""


class Watch:
    """Hears, in a thread of its own, what must be heard while the main thread is inside a collective: SIGNALS
    at this rank or any other, which go into `stopping`, and the end of this rank's torchrun, which ends the
    process, so that no orphan keeps a GPU. So does Ctrl-C for the second time."""
    def __init__(self):
        self.stopping, self.store, self.key = [], None, ""
        self.ear, self.voice = socket.socketpair()
        self.voice.setblocking(False)
        self.thread = threading.Thread(target=self.listen, daemon=True)
        self.thread.start()

    def start(self, store, key: str):
        """store: what all ranks share; the first that is told to stop puts its signal under the key."""
        self.store, self.key = store, key
        signal.set_wakeup_fd(self.voice.fileno())  # a byte for each signal that has a handler, at once
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a shell's background
                signal.signal(number, lambda *_: None)

    def listen(self):
        parent, told = PARENT if "TORCHELASTIC_RUN_ID" in os.environ else None, 0.0
        while True:
            heard = self.ear.recv(64) if select.select([self.ear], [], [], 1.0)[0] else b""
            if 0 in heard:
                return
            if parent and os.getppid() != parent:
                os._exit(1)
            if signal.SIGINT in heard:
                if told and time.monotonic() - told > 0.5:  # `timeout` sends it twice at once
                    os._exit(130)
                told = time.monotonic()
            self.stopping += [number for number in heard if number in SIGNALS]
            try:
                if self.store and self.stopping:
                    self.store.set(self.key, str(self.stopping[0]))
                elif self.store and self.store.check([self.key]):
                    self.stopping.append(int(self.store.get(self.key)))
            except RuntimeError:  # whoever holds it is gone: the next collective will say so
                self.store = None

    def close(self):
        signal.set_wakeup_fd(-1)
        self.voice.send(b"\0")
        self.thread.join()
