"""What the engine does next: who gets pages and rows, who is prefilled, who has to wait or give way.

Bookkeeping of Python integers, without a tensor: `Scheduler.step` is all of the policy, and the sampler
carries out the `Step` that it returns.

The life of a request: its prefix waits; it is admitted when the pool can be expected to hold what comes of
it, the longest expected first, so that the tail starts early; its tokens are prefilled in chunks beside the
others' decoding; its n samples fork, sharing the prompt's pages, as rows become free; each decodes a token a
step; a page that two share is copied when one writes to it. When the pool runs dry the youngest gives its
pages back and is prefilled again later, with what it had written. The oldest always gets on.
"""

from collections import deque
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Request:
    prompt_ids: list[int]
    n: int = 1  # samples of this prompt
    max_new_tokens: int = 256
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is all
    stop: tuple[str, ...] = ()  # strings that end a sample; they stay in it
    seed: int = 0  # int64; with sample index and position it determines every draw
    expected_tokens: int = 0  # a guess at the new tokens, for the schedule alone; 0: max_new_tokens

    def most_pages(self, page_size: int) -> int:
        """Pages that one sample can come to hold."""
        return -(-(len(self.prompt_ids) + self.max_new_tokens) // page_size)


@dataclass
class Stats:
    """What one `generate` did so far."""

    prefill_tokens: int = 0
    decode_steps: int = 0  # forwards in which somebody decoded
    mixed_steps: int = 0  # forwards with a chunk of prefill in them
    new_tokens: int = 0
    finished: int = 0
    copied_pages: int = 0
    preemptions: int = 0
    peak_pages: int = 0
    peak_rows: int = 0
    host_elements: int = 0  # numbers that went from Python lists to tensors


@dataclass(eq=False)
class Sequence:
    """One sample. While it runs it has a row, and pages that hold its first `cached` tokens."""

    index: int  # of its request
    sample: int
    request: Request
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    drawn: int = 0  # tokens that are drawn or being drawn; token_ids may be a step behind
    pages: list[int] = field(default_factory=list)
    shared: int = 0  # pages that it had from its prefix
    cached: int = 0
    row: int = -1
    done: bool = False  # ended or cancelled: what is still being drawn is dropped
    tail: bytes = b""  # the last bytes, in which a stop string may have begun

    @property
    def remaining(self) -> int:
        """Tokens that it may still be expected to write. One that has outlived its estimate may go on for
        half as long again."""
        r = self.request
        expected = min(r.expected_tokens or r.max_new_tokens, r.max_new_tokens)
        return min(max(expected - self.drawn, self.drawn // 2), r.max_new_tokens - self.drawn)


@dataclass(eq=False)
class Prefix:
    """Tokens to prefill once, and the sequences that go on from them: the samples of a request, or one that
    had to give way."""

    sequences: list[Sequence]
    tokens: list[int] = field(default_factory=list)  # once it is admitted
    pages: list[int] = field(default_factory=list)
    cached: int = 0
    hidden: object = None  # the sampler's: the hidden state of the last token


@dataclass(frozen=True)
class Chunk:
    """Tokens start..end of a prefix, to be prefilled into its pages."""

    prefix: Prefix
    start: int
    end: int
    pages: list[int]  # its own list: the prefix gives its pages to its sequences in the same step

    @property
    def tokens(self) -> list[int]:
        return self.prefix.tokens[self.start:self.end]

    @property
    def last(self) -> bool:
        return self.end == len(self.prefix.tokens)


@dataclass
class Step:
    """What the next forward does, in this order: copy pages, write the page table, decode, prefill, draw."""

    decode: list[Sequence] = field(default_factory=list)  # each feeds its newest token
    chunks: list[Chunk] = field(default_factory=list)
    forks: list[tuple[Prefix, Sequence]] = field(default_factory=list)  # draw from the prefix's last state
    copies: list[tuple[int, int]] = field(default_factory=list)  # pages: from, to
    table: list[tuple[int, int, int]] = field(default_factory=list)  # row, column, page
    preempted: bool = False

    def __bool__(self) -> bool:
        return bool(self.decode or self.chunks or self.forks)


class Pages:
    """Which pages are free, and how many hold each. Page 0 belongs to nobody: padding rows write there."""
    def __init__(self, num_pages: int, page_size: int):
        self.num_pages, self.page_size = num_pages, page_size
        self.references = [0] * num_pages
        self.free = deque(range(1, num_pages))

    @property
    def used(self) -> int:
        return self.num_pages - 1 - len(self.free)

    def needed(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def take(self) -> int:
        page = self.free.popleft()
        self.references[page] = 1
        return page

    def share(self, pages: list[int]) -> list[int]:
        for page in pages:
            self.references[page] += 1
        return list(pages)

    def release_(self, pages: list[int]):
        for page in pages:
            self.references[page] -= 1
            if self.references[page] == 0:
                self.free.append(page)
        pages.clear()


class Scheduler:
    """num_pages and page_size: of the pool. rows: sequences that decode at a time. token_budget: tokens of a
    forward, one for each row that decodes and the rest for prefill.

    reserve: the share of the pages that everyone is expected to need yet which admission sets aside. At 1 and
    with right guesses nobody ever gives way, and half of the pool idles. Where guesses are off by 40 %, a
    third took 0.6 times the steps of 1, and prefilled 11 % of the tokens again; 0 takes 0.55 and 90 %.
    """
    def __init__(self, num_pages: int, page_size: int, rows: int, token_budget: int,
                 stats: Stats | None = None, reserve: float = 1 / 3):
        self.pages = Pages(num_pages, page_size)
        self.free_rows = deque(range(rows))
        self.token_budget, self.reserve = token_budget, reserve
        self.stats = stats or Stats()
        self.waiting: deque[Prefix] = deque()
        self.prefilling: deque[Prefix] = deque()  # one at a time
        self.ready: deque[Prefix] = deque()  # prefilled; keep their pages until all their samples have a row
        self.running: list[Sequence] = []  # oldest first

    def refusal(self, r: Request) -> str | None:
        """Why the pool can never serve a request; None if it can."""
        need = r.most_pages(self.pages.page_size) + 2  # page 0, and a copied one
        if need > self.pages.num_pages:
            return (f"{len(r.prompt_ids)} + {r.max_new_tokens} tokens need {need} pages, the pool has "
                    f"{self.pages.num_pages}")

    def add(self, requests: list[Request], first: int = 0):
        """Queues requests, numbered from `first`, the longest expected first; those of one prompt share its
        prefill and pages."""
        prompts: dict[tuple[int, ...], list[Sequence]] = {}
        for i, r in enumerate(requests, first):
            prompts.setdefault(tuple(r.prompt_ids), []).extend(Sequence(i, n, r) for n in range(r.n))
        prefixes = [Prefix(sorted(group, key=lambda s: -s.remaining)) for group in prompts.values()]
        self.waiting.extend(sorted(prefixes, key=lambda prefix: -prefix.sequences[0].remaining))

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.prefilling or self.ready or self.running)

    # ---- the policy

    def step(self) -> Step:
        step = Step()
        self.grow(step)
        if not step.preempted:  # under overlap the newest token of who gave way is not known yet
            self.prefill(step)
            self.fork(step)
        self.stats.peak_pages = max(self.stats.peak_pages, self.pages.used)
        self.stats.peak_rows = max(self.stats.peak_rows, len(self.running))
        return step

    def grow(self, step: Step):
        """Lets everyone decode who owns the page that its newest token goes to, or can get it."""
        for s in list(self.running):
            if s.row < 0 or s.drawn == s.request.max_new_tokens:  # gave way; or its last draw is under way
                continue
            fresh = s.cached == len(s.pages) * self.pages.page_size
            if fresh or self.pages.references[s.pages[-1]] > 1:
                if not self.pages.free and any(x.drawn == x.request.max_new_tokens for x in self.running):
                    continue  # their pages are about to come back
                while not self.pages.free and s.row >= 0:
                    self.reclaim()
                    step.preempted = True
                if s.row < 0:
                    continue
                page = self.pages.take()
                if not fresh:
                    step.copies.append((s.pages[-1], page))
                    self.pages.release_([s.pages.pop()])
                    s.shared = max(0, s.shared - 1)
                s.pages.append(page)
                step.table.append((s.row, len(s.pages) - 1, page))
            s.cached += 1
            s.drawn += 1
            step.decode.append(s)
        self.stats.copied_pages += len(step.copies)

    def reclaim(self):
        """Takes the pages of the youngest."""
        self.stats.preemptions += 1
        if prefixes := self.prefilling or self.ready:
            prefix = prefixes.pop()
            self.pages.release_(prefix.pages)
            prefix.cached, prefix.hidden = 0, None
        else:
            youngest = self.running[-1]
            self.unseat(youngest)
            prefix = Prefix([youngest])
        self.waiting.appendleft(prefix)

    def prefill(self, step: Step):
        budget = self.token_budget - len(step.decode)
        while budget > 0 and (self.prefilling or self.admit()):
            prefix = self.prefilling[0]
            start, prefix.cached = prefix.cached, min(len(prefix.tokens), prefix.cached + budget)
            budget -= prefix.cached - start
            step.chunks.append(Chunk(prefix, start, prefix.cached, list(prefix.pages)))
            if step.chunks[-1].last:
                self.ready.append(self.prefilling.popleft())
        self.stats.prefill_tokens += sum(c.end - c.start for c in step.chunks)

    def admit(self) -> bool:
        """Gives the first that waits its pages, if a row awaits it and the pool can be expected to hold it to
        its end beside those that are running."""
        rows = len(self.free_rows) - sum(len(prefix.sequences) for prefix in self.ready)
        if not self.waiting or rows <= 0:
            return False
        prefix = self.waiting[0]
        first = prefix.sequences[0]
        tokens = first.request.prompt_ids + first.token_ids
        need, starters = self.pages.needed(len(tokens)), prefix.sequences[:rows]
        soon = max(self.reserve * self.growth(starters), len(self.running) + len(starters))
        if (self.running or self.ready) and need + soon > len(self.pages.free):
            return False
        prefix.tokens, prefix.pages = tokens, [self.pages.take() for _ in range(need)]
        self.prefilling.append(self.waiting.popleft())
        return True

    def growth(self, starters: list[Sequence]) -> int:
        """The most pages that are ever needed beyond those in use, if everyone ends as expected. Just before
        the k-th longest ends, those above it have grown as much as it has, and the others are gone."""
        coming = [s for prefix in self.ready for s in prefix.sequences]
        rest = sorted(((s.remaining, len(s.pages) - s.shared)
                       for s in (*self.running, *coming, *starters)), reverse=True)
        own = sum(pages for _, pages in rest)
        most = 0
        for k, (remaining, pages) in enumerate(rest, 1):
            own -= pages  # of those that end before the k-th
            most = max(most, k * (self.pages.needed(remaining) + 1) - own)
        return most

    def fork(self, step: Step):
        """Seats samples of the prefixes that are prefilled, while everyone can have one more page."""
        while self.ready and self.free_rows:
            if self.running and len(self.pages.free) <= len(self.running):
                break
            prefix = self.ready[0]
            s = prefix.sequences.pop(0)
            s.row, s.pages = self.free_rows.popleft(), self.pages.share(prefix.pages)
            s.cached, s.shared = len(prefix.tokens), len(prefix.pages) if prefix.sequences else 0
            s.drawn += 1
            step.forks.append((prefix, s))
            step.table += [(s.row, column, page) for column, page in enumerate(s.pages)]
            self.running.append(s)
            if not prefix.sequences:
                self.pages.release_(prefix.pages)
                self.ready.popleft()

    # ---- ends

    def unseat(self, s: Sequence):
        self.running.remove(s)
        self.pages.release_(s.pages)
        self.free_rows.append(s.row)
        s.row, s.cached, s.shared = -1, 0, 0

    def finish(self, s: Sequence):
        """Its end has been seen, wherever it is by now."""
        s.done = True
        if s.row >= 0:
            self.unseat(s)
        else:
            self.forget(s)

    def cancel(self, index: int):
        """Drops what is left of a request."""
        for s in [s for s in self.running if s.index == index]:
            self.finish(s)
        for prefix in (*self.waiting, *self.prefilling, *self.ready):
            for s in [s for s in prefix.sequences if s.index == index]:
                s.done = True
                self.forget(s)

    def forget(self, s: Sequence):
        """Takes a sequence out of the prefix that it waits in; a prefix without any gives its pages back."""
        for queue in (self.waiting, self.prefilling, self.ready):
            for prefix in list(queue):
                if s in prefix.sequences:
                    prefix.sequences.remove(s)
                    if not prefix.sequences:
                        self.pages.release_(prefix.pages)
                        queue.remove(prefix)


# ---------------------------------------------------------------------- over the ranks


def assign(expected: list[int], ranks: int) -> list[list[int]]:
    """Which rank samples which group, equally many each: the longest expected first, always to the rank that
    has least to write so far. Indices of each rank's groups, in order."""
    shares, load = [[] for _ in range(ranks)], [0] * ranks
    most = -(-len(expected) // ranks)
    for i in sorted(range(len(expected)), key=lambda i: -expected[i]):
        rank = min((r for r in range(ranks) if len(shares[r]) < most), key=lambda r: load[r])
        shares[rank].append(i)
        load[rank] += expected[i]
    return [sorted(share) for share in shares]
