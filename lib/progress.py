"""A progress line for the console."""

import shutil
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace


class Progress:
    """Progress of a phase with its rate and the estimated time left: on a terminal one line that is
    overwritten, elsewhere nothing."""
    def __init__(self, label: str, total: int, show: bool, what: str = "samples"):
        self.label, self.total, self.show, self.what = label, total, show and sys.stderr.isatty(), what
        self.start = self.last = time.perf_counter()

    def update(self, stats):
        now = time.perf_counter()
        if not self.show or now - self.last < 0.2:
            return
        self.last, seconds = now, now - self.start
        line = f"{self.label}: {stats.finished}/{self.total} {self.what}"
        if stats.new_tokens:
            line += f", {stats.new_tokens / seconds:,.0f} tok/s on this rank"
        if stats.finished:
            left = seconds * (self.total - stats.finished) / stats.finished
            line += f", {timedelta(seconds=round(left))} left"
        print(f"\r{line[:shutil.get_terminal_size().columns - 1]}\033[K", end="", file=sys.stderr, flush=True)

    def close(self):
        if self.show:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def tracked(items: list, label: str, show: bool) -> Iterator:
    """The items of a phase, one after the other, with its progress."""
    progress = Progress(label, len(items), show, "micro-batches")
    try:
        for i, item in enumerate(items, 1):
            yield item
            progress.update(SimpleNamespace(finished=i, new_tokens=0))
    finally:
        progress.close()
