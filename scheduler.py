"""The scheduler of the paged engine: admission, chunked prefill, forks, preemption, page accounting.

It works on Python integers only. `Scheduler.step` is the whole policy; the sampler executes the `Step` that
it returns.

Life of a request: its prefix waits in the queue, the longest expected output first. It is admitted when the
pool is expected to hold its samples to their end. Its tokens are prefilled in chunks, in the same forward as
other sequences' decoding. Its n samples fork as rows become free and share the prompt's pages; each decodes
one token a step, and a shared page is copied before a sequence writes to it. If the pool runs out of pages,
the youngest sequence is preempted: its pages are freed, and its prompt and the tokens written so far are
prefilled again later. The oldest sequence is never preempted, so the engine always makes progress.
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
    expected_tokens: int = 0  # estimate of the new tokens, used by the scheduler only; 0: max_new_tokens

    def max_pages(self, page_size: int) -> int:
        """The most pages that one sample can hold."""
        return -(-(len(self.prompt_ids) + self.max_new_tokens) // page_size)


@dataclass
class Stats:
    """Counters of one `generate` call."""

    prefill_tokens: int = 0
    decode_steps: int = 0  # forwards with at least one decoding row
    new_tokens: int = 0
    finished: int = 0
    copied_pages: int = 0
    preemptions: int = 0
    peak_pages: int = 0
    peak_rows: int = 0
    host_elements: int = 0  # numbers copied from Python lists to tensors


@dataclass(eq=False)
class Sequence:
    """One sample. While it runs it owns a row, and pages that hold the KV of its first `cached` tokens."""

    index: int  # of its request
    sample: int
    request: Request
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    drawn: int = 0  # tokens drawn, including one still in flight; token_ids may lag by one
    pages: list[int] = field(default_factory=list)
    shared: int = 0  # pages received from its prefix
    cached: int = 0
    row: int = -1
    done: bool = False  # ended or cancelled; a token still in flight is dropped
    tail: bytes = b""  # the last bytes, where a stop string may have started

    @property
    def remaining(self) -> int:
        """Expected number of tokens still to come. A sequence that exceeds its estimate is expected to write
        half as many again."""
        r = self.request
        expected = min(r.expected_tokens or r.max_new_tokens, r.max_new_tokens)
        return min(max(expected - self.drawn, self.drawn // 2), r.max_new_tokens - self.drawn)


@dataclass(eq=False)
class Prefix:
    """Tokens to prefill once, and the sequences that continue them: the samples of a request, or one
    preempted sequence."""

    sequences: list[Sequence]
    tokens: list[int] = field(default_factory=list)  # set on admission
    pages: list[int] = field(default_factory=list)
    cached: int = 0
    hidden: object = None  # set by the sampler: hidden state of the last token


@dataclass(frozen=True)
class Chunk:
    """Tokens start..end of a prefix, to be prefilled into its pages."""

    prefix: Prefix
    start: int
    end: int
    pages: list[int]  # a copy: the prefix hands its pages to its sequences in the same step

    @property
    def tokens(self) -> list[int]:
        return self.prefix.tokens[self.start:self.end]

    @property
    def last(self) -> bool:
        return self.end == len(self.prefix.tokens)


@dataclass
class Step:
    """One step, executed in this order: copy pages, write the page table, decode, prefill, draw."""

    decode: list[Sequence] = field(default_factory=list)  # each feeds its newest token to the model
    chunks: list[Chunk] = field(default_factory=list)
    forks: list[tuple[Prefix, Sequence]] = field(default_factory=list)  # draw from the prefix's hidden state
    copies: list[tuple[int, int]] = field(default_factory=list)  # pages: from, to
    table: list[tuple[int, int, int]] = field(default_factory=list)  # row, column, page
    preempted: bool = False

    def __bool__(self) -> bool:
        return bool(self.decode or self.chunks or self.forks)


class Pages:
    """Free list and reference counts of the pool's pages. Page 0 is reserved: padding rows write to it."""
    def __init__(self, num_pages: int, page_size: int):
        self.num_pages, self.page_size = num_pages, page_size
        self.references = [0] * num_pages
        self.free_list = deque(range(1, num_pages))

    @property
    def used(self) -> int:
        return self.num_pages - 1 - len(self.free_list)

    def needed(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def allocate(self) -> int:
        page = self.free_list.popleft()
        self.references[page] = 1
        return page

    def fork(self, pages: list[int]) -> list[int]:
        for page in pages:
            self.references[page] += 1
        return list(pages)

    def free_(self, pages: list[int]):
        for page in pages:
            self.references[page] -= 1
            if self.references[page] == 0:
                self.free_list.append(page)
        pages.clear()


class Scheduler:
    """num_pages and page_size: of the pool. rows: sequences that decode at a time. token_budget: tokens of a
    forward, one for each row that decodes and the rest for prefill.

    reserve: share of the expected future pages of all sequences that admission keeps free. At 1, with correct
    estimates, no sequence is ever preempted, but half of the pool stays idle. With estimates off by 40 %, 1/3
    needed 0.6 times the steps of 1 and prefilled 11 % of the tokens twice; 0 needed 0.55 times and 90 %.
    """
    def __init__(self, num_pages: int, page_size: int, rows: int, token_budget: int,
                 stats: Stats | None = None, reserve: float = 1 / 3):
        self.pages = Pages(num_pages, page_size)
        self.free_rows = deque(range(rows))
        self.token_budget, self.reserve = token_budget, reserve
        self.stats = stats or Stats()
        self.waiting: deque[Prefix] = deque()
        self.prefilling: deque[Prefix] = deque()  # prefilled one at a time
        self.ready: deque[Prefix] = deque()  # prefilled; hold their pages until every sample has a row
        self.running: list[Sequence] = []  # oldest first

    def refusal(self, r: Request) -> str | None:
        """The reason why the pool is too small for a request, or None."""
        need = r.max_pages(self.pages.page_size) + 2  # page 0, and a copied one
        if need > self.pages.num_pages:
            return (f"{len(r.prompt_ids)} + {r.max_new_tokens} tokens need {need} pages, the pool has "
                    f"{self.pages.num_pages}")

    def add(self, requests: list[Request], first: int = 0):
        """Queues requests, numbered from `first`, the longest expected output first. Requests with the same
        prompt share its prefill and pages."""
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
        self.schedule_decode(step)
        if not step.preempted:  # with overlap, a preempted sequence's newest token is not known yet
            self.prefill(step)
            self.fork(step)
        self.stats.peak_pages = max(self.stats.peak_pages, self.pages.used)
        self.stats.peak_rows = max(self.stats.peak_rows, len(self.running))
        return step

    def schedule_decode(self, step: Step):
        """Schedules a decode for each sequence that has, or can allocate, a page for its next token."""
        for s in list(self.running):
            if s.row < 0 or s.drawn == s.request.max_new_tokens:  # preempted, or its last token is in flight
                continue
            fresh = s.cached == len(s.pages) * self.pages.page_size
            if fresh or self.pages.references[s.pages[-1]] > 1:
                ending = any(x.drawn == x.request.max_new_tokens for x in self.running)
                if not self.pages.free_list and ending:
                    continue  # those will free their pages
                while not self.pages.free_list and s.row >= 0:
                    self.preempt()
                    step.preempted = True
                if s.row < 0:
                    continue
                page = self.pages.allocate()
                if not fresh:
                    step.copies.append((s.pages[-1], page))
                    self.pages.free_([s.pages.pop()])
                    s.shared = max(0, s.shared - 1)
                s.pages.append(page)
                step.table.append((s.row, len(s.pages) - 1, page))
            s.cached += 1
            s.drawn += 1
            step.decode.append(s)
        self.stats.copied_pages += len(step.copies)

    def preempt(self):
        """Frees the pages of the youngest prefix or sequence and queues it again."""
        self.stats.preemptions += 1
        if prefixes := self.prefilling or self.ready:
            prefix = prefixes.pop()
            self.pages.free_(prefix.pages)
            prefix.cached, prefix.hidden = 0, None
        else:
            youngest = self.running[-1]
            self.free_row(youngest)
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
        """Allocates pages for the first waiting prefix if there is a free row and the pool is expected to
        hold its samples, beside the running ones, to their end. Returns whether it did."""
        rows = len(self.free_rows) - sum(len(prefix.sequences) for prefix in self.ready)
        if not self.waiting or rows <= 0:
            return False
        prefix = self.waiting[0]
        first = prefix.sequences[0]
        tokens = first.request.prompt_ids + first.token_ids
        need, starters = self.pages.needed(len(tokens)), prefix.sequences[:rows]
        soon = max(self.reserve * self.peak_new_pages(starters), len(self.running) + len(starters))
        if (self.running or self.ready) and need + soon > len(self.pages.free_list):
            return False
        prefix.tokens, prefix.pages = tokens, [self.pages.allocate() for _ in range(need)]
        self.prefilling.append(self.waiting.popleft())
        return True

    def peak_new_pages(self, starters: list[Sequence]) -> int:
        """Peak number of pages needed beyond those in use if every sequence ends as expected. Just before the
        k-th longest ends, the k longest have each grown by as much as it did, and the others are gone."""
        coming = [s for prefix in self.ready for s in prefix.sequences]
        rest = sorted(((s.remaining, len(s.pages) - s.shared)
                       for s in (*self.running, *coming, *starters)), reverse=True)
        own = sum(pages for _, pages in rest)
        peak = 0
        for k, (remaining, pages) in enumerate(rest, 1):
            own -= pages  # of those that end before the k-th
            peak = max(peak, k * (self.pages.needed(remaining) + 1) - own)
        return peak

    def fork(self, step: Step):
        """Gives rows to samples of prefilled prefixes while every running sequence can get one more page."""
        while self.ready and self.free_rows:
            if self.running and len(self.pages.free_list) <= len(self.running):
                break
            prefix = self.ready[0]
            s = prefix.sequences.pop(0)
            s.row, s.pages = self.free_rows.popleft(), self.pages.fork(prefix.pages)
            s.cached, s.shared = len(prefix.tokens), len(prefix.pages) if prefix.sequences else 0
            s.drawn += 1
            step.forks.append((prefix, s))
            step.table += [(s.row, column, page) for column, page in enumerate(s.pages)]
            self.running.append(s)
            if not prefix.sequences:
                self.pages.free_(prefix.pages)
                self.ready.popleft()

    # ---- ends

    def free_row(self, s: Sequence):
        self.running.remove(s)
        self.pages.free_(s.pages)
        self.free_rows.append(s.row)
        s.row, s.cached, s.shared = -1, 0, 0

    def finish(self, s: Sequence):
        """Retires a sequence that has ended, whether it is running or was preempted."""
        s.done = True
        if s.row >= 0:
            self.free_row(s)
        else:
            self.remove(s)

    def cancel(self, index: int):
        """Drops the unfinished samples of a request."""
        for s in [s for s in self.running if s.index == index]:
            self.finish(s)
        for prefix in (*self.waiting, *self.prefilling, *self.ready):
            for s in [s for s in prefix.sequences if s.index == index]:
                s.done = True
                self.remove(s)

    def remove(self, s: Sequence):
        """Removes a waiting sequence from its prefix, and frees a prefix that has none left."""
        for queue in (self.waiting, self.prefilling, self.ready):
            for prefix in list(queue):
                if s in prefix.sequences:
                    prefix.sequences.remove(s)
                    if not prefix.sequences:
                        self.pages.free_(prefix.pages)
                        queue.remove(prefix)


# ---------------------------------------------------------------------- over the ranks


def assign(expected: list[int], ranks: int) -> list[list[int]]:
    """Indices of the groups that each rank samples, equally many on each: longest expected output first, each
    to the rank with the least expected tokens so far."""
    shares, load = [[] for _ in range(ranks)], [0] * ranks
    per_rank = -(-len(expected) // ranks)
    for i in sorted(range(len(expected)), key=lambda i: -expected[i]):
        rank = min((r for r in range(ranks) if len(shares[r]) < per_rank), key=lambda r: load[r])
        shares[rank].append(i)
        load[rank] += expected[i]
    return [sorted(share) for share in shares]
