"""A progress line for the console."""

import sys
import time
from datetime import timedelta


class Progress:
    """Progress of sampling with the estimated time left: on a terminal one line that is overwritten,
    elsewhere a line every 30 seconds."""
    def __init__(self, label: str, total: int, show: bool, what: str = "samples"):
        self.label, self.total, self.show, self.what = label, total, show, what
        self.start = self.last = time.perf_counter()
        self.terminal = sys.stderr.isatty()

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
        print(f"{start}{line}", end=end, file=sys.stderr, flush=True)

    def close(self):
        if self.show and self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
