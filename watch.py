"""What ends a run from outside: SIGTERM at any rank, or the end of the torchrun that started it."""

import os
import select
import signal
import socket
import threading

import torch.distributed as dist


class Stopped(Exception):
    """The run was told to end, by SIGTERM at one of its ranks at least."""


class Watch:
    """Hears, in a thread of its own, what must be heard while the main thread is inside a collective: SIGTERM
    at this rank or any other, which sets `stopping`, and the end of this rank's torchrun, which ends the
    process, so that no orphan keeps a GPU."""
    def __init__(self):
        self.stopping, self.thread = threading.Event(), None

    def start(self, store: dist.Store, key: str):
        """key: of the store that all ranks share; set by the first that is told to stop."""
        self.ear, self.voice = socket.socketpair()
        self.voice.setblocking(False)
        signal.set_wakeup_fd(self.voice.fileno())  # a byte for each signal that has a handler, at once
        signal.signal(signal.SIGTERM, lambda *_: None)
        self.thread = threading.Thread(target=self.listen, args=(store, key), daemon=True)
        self.thread.start()

    def listen(self, store: dist.Store, key: str):
        parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        while True:
            heard = self.ear.recv(64) if select.select([self.ear], [], [], 1.0)[0] else b""
            if 0 in heard:
                return
            if parent and os.getppid() != parent:
                os._exit(1)
            if signal.SIGTERM in heard:
                self.stopping.set()
            try:
                if store and self.stopping.is_set():
                    store.set(key, "")
                elif store and store.check([key]):
                    self.stopping.set()
            except RuntimeError:  # whoever holds it is gone: the next collective will say so
                store = None

    def close(self):
        if self.thread:
            signal.set_wakeup_fd(-1)
            self.voice.send(b"\0")
            self.thread.join()
