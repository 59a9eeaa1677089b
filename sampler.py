"""Generation: a paged KV cache, continuous batching, and token draws that depend on nothing but their own
key.

Shapes: S running sequences (rows), T packed tokens, H query heads, K KV heads, D head dim, C hidden, P pages
of a sequence.

The life of a request: it waits; its prompt is prefilled once; its n samples fork, sharing the prompt's pages;
each decodes one token a step in the common batch; a page that two samples share is copied when one writes to
it; a sample that ends is yielded at once and the next takes its row. When the pool runs dry the youngest
gives its pages back and is recomputed later, with the same draws.

Left out so far: chunked prefill, CUDA graphs and tensor parallelism.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from kernels.attention import PagedDecode, PagedPrefill, write_kv
from kernels.sample import head_draw, streams, uniforms
from model import Qwen2

# Thinner CPU matrix products take other code paths, whose rounding differs: padded, a row is the same in
# any batch.
MIN_ROWS = 16
MIN_CONTEXT = 16  # likewise the attended length is a multiple of a vector register's lanes


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


@dataclass(frozen=True)
class Completion:
    prompt_index: int  # of the request in `generate`'s argument
    sample_index: int
    token_ids: list[int]  # the id or string that ended it included
    logprobs: list[float]  # of the full softmax at the sampling temperature (greedy: at 1)
    text: str  # without the end-of-text token
    finish_reason: str  # "stop" | "length"
    max_new_tokens: int = 0  # of its request


@dataclass
class Stats:
    """What one `generate` did so far."""

    prefill_tokens: int = 0
    decode_steps: int = 0
    new_tokens: int = 0
    finished: int = 0
    copied_pages: int = 0
    preemptions: int = 0
    peak_pages: int = 0
    peak_rows: int = 0


@dataclass(eq=False)
class Group:
    """A request whose samples still wait; once prefilled it holds the prompt's pages and its last hidden
    state."""

    index: int
    request: Request
    started: int = 0
    pages: list[int] = field(default_factory=list)
    hidden_C: torch.Tensor | None = None

    @property
    def prefix(self) -> list[int]:
        return self.request.prompt_ids


@dataclass(eq=False)
class Sequence:
    """One sample that is running, or was preempted. `pages` hold the keys and values of its first `cached`
    tokens."""

    index: int
    sample: int
    request: Request
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    cached: int = 0
    row: int = -1
    tail: bytes = b""  # the last bytes, in which a stop string may have begun

    @property
    def prefix(self) -> list[int]:
        """What is recomputed after preemption; the newest token is fed by the next decode step."""
        return self.request.prompt_ids + self.token_ids[:-1]


# ---------------------------------------------------------------------- pages


class PagePool:
    """Keys and values of all layers in pages, with a reference count each. Page 0 belongs to nobody: padding
    rows write there."""
    def __init__(self, model: Qwen2, num_pages: int, page_size: int):
        config, head = model.config, model.head_weight
        self.page_size, self.num_pages = page_size, num_pages
        shape = (num_pages, page_size, config.num_key_value_heads, config.head_dim)
        # A tensor per layer; zeros, because masked slots are read too and NaN would pass the mask.
        self.keys, self.values = ([torch.zeros(shape, dtype=head.dtype, device=head.device)
                                   for _ in range(config.num_hidden_layers)] for _ in range(2))
        self.references = [0] * num_pages
        self.free = deque(range(1, num_pages))

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

    def copy_(self, pairs: list[tuple[int, int]]):
        """Copies pages (from, to) in all layers."""
        source, target = torch.tensor(pairs, device=self.keys[0].device).T
        for x in (*self.keys, *self.values):
            x[target] = x[source]


class PagedPlan:
    """Attention plan of a forward whose new keys and values go into pages before `attend` reads them.
    pages_T: the page of each token."""
    def __init__(self, pool: PagePool, attend: PagedDecode | PagedPrefill, pages_T: torch.Tensor,
                 positions_T: torch.Tensor):
        self.pool, self.attend, self.positions_T = pool, attend, positions_T
        self.slots_T = pages_T * pool.page_size + positions_T % pool.page_size

    def __call__(self, layer: int, q_THD, k_TKD, v_TKD, cos_T1D, sin_T1D):
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        q_THD = write_kv(q_THD, k_TKD, v_TKD, cos_T1D, sin_T1D, self.slots_T, keys, values)
        return self.attend(q_THD, keys, values)


# ---------------------------------------------------------------------- engine


class Sampler:
    """Generates with a model whose weights the caller may change between calls.

    tokenizer: gives the ids that exist, end-of-text ids, stop strings and text; without one every row of the
        head is an id and only length ends a sample.
    max_sequences: rows of the decode batch.
    page_size: tokens of a page.
    num_pages: of the pool; default: what max_sequences of the longest request can need.
    prefill_tokens: prompts are prefilled together up to so many tokens; default 4096, and on CPU one at a
        time: there packing gains nothing, and the rounding of a row would depend on its neighbours.
    """
    def __init__(self, model: Qwen2, tokenizer=None, max_sequences: int = 64, page_size: int = 16,
                 num_pages: int | None = None, prefill_tokens: int | None = None):
        self.model, self.tokenizer = model, tokenizer
        self.max_sequences, self.page_size, self.num_pages = max_sequences, page_size, num_pages
        together = 4096 if model.head_weight.is_cuda else 0
        self.prefill_tokens = together if prefill_tokens is None else prefill_tokens
        self.n_valid = tokenizer.n_valid if tokenizer else model.config.vocab_size
        self.eos_ids = frozenset(tokenizer.eos_ids if tokenizer else ())
        self.stats = Stats()
        if self.n_valid > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {self.n_valid} ids, the model only {model.config.vocab_size} rows: they "
                "do not belong together"
            )

    def generate(self, requests: list[Request]) -> Iterator[Completion]:
        """Yields every sample of every request as it finishes. Raises ValueError for a request that can never
        be served."""
        requests = list(requests)
        self.check(requests)
        return self.run(requests)

    def check(self, requests: list[Request]):
        for i, r in enumerate(requests):
            if not r.prompt_ids or r.n < 1 or r.max_new_tokens < 1:
                raise ValueError(f"request {i}: needs a prompt, n >= 1 and max_new_tokens >= 1")
            if r.temperature < 0 or not 0 < r.top_p <= 1 or r.top_k < 0:
                raise ValueError(f"request {i}: needs temperature >= 0, 0 < top_p <= 1 and top_k >= 0")
            if r.stop and self.tokenizer is None:
                raise ValueError(f"request {i}: stop strings need a tokenizer")
            if max(r.prompt_ids) >= self.n_valid:
                raise ValueError(
                    f"request {i}: id {max(r.prompt_ids)} is beyond the tokenizer's last, {self.n_valid - 1}")
            if self.num_pages is not None and (need := self.worst_pages(r) + 2) > self.num_pages:
                raise ValueError(
                    f"request {i}: {len(r.prompt_ids)} + {r.max_new_tokens} tokens need {need} pages, the "
                    f"pool has {self.num_pages}"
                )

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def worst_pages(self, r: Request) -> int:
        return self.pages_for(len(r.prompt_ids) + r.max_new_tokens)

    def wide(self, pages: int) -> int:
        """A number of table columns whose tokens are a multiple of MIN_CONTEXT; columns without a page name
        page 0 and are masked."""
        unit = max(1, MIN_CONTEXT // self.page_size)
        return -(-pages // unit) * unit

    @torch.inference_mode()
    def run(self, requests: list[Request]) -> Iterator[Completion]:
        if not requests:
            return
        rows = min(self.max_sequences, sum(r.n for r in requests))
        longest = self.wide(max(self.worst_pages(r) for r in requests))
        device = self.model.head_weight.device
        self.stats = Stats()
        self.pool = PagePool(self.model, self.num_pages or (rows + 1) * (longest + 1) + 1, self.page_size)
        self.waiting = deque(Group(i, r) for i, r in enumerate(requests))
        self.ready: deque[Group] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.free_rows = deque(range(rows))
        # State of the rows, on the device, written only where it changes. The last MIN_ROWS are padding.
        rows += MIN_ROWS
        self.table = torch.zeros(rows, longest, dtype=torch.int64, device=device)
        integers = torch.zeros(5, rows, dtype=torch.int64, device=device)
        self.token, self.position, self.drawn, self.stream, self.top_k = integers
        self.temperature, self.top_p = torch.ones(rows, device=device), torch.ones(rows, device=device)
        self.active = None  # row numbers of the running sequences; None: to be rebuilt
        try:
            while self.waiting or self.ready or self.running:
                yield from self.admit()
                yield from self.decode()
        finally:  # also when the consumer walks away
            for holder in (*self.ready, *self.running):
                self.pool.release_(holder.pages)
            del self.pool, self.table

    # ---- scheduling

    def admit(self) -> Iterator[Completion]:
        """Prefills what fits into free rows and pages, then starts samples. Leaves a page for each running
        sequence to grow into."""
        batch, tokens = [], 0
        rows = len(self.free_rows) - sum(g.request.n - g.started for g in self.ready)
        while self.waiting and rows > 0:
            item = self.waiting[0]
            need = self.pages_for(len(item.prefix))
            if need + len(self.running) + len(batch) >= len(self.pool.free):
                break
            if batch and tokens + len(item.prefix) > self.prefill_tokens:
                break
            self.waiting.popleft()
            item.pages = [self.pool.take() for _ in range(need)]
            batch.append(item)
            tokens += len(item.prefix)
            rows -= item.request.n - item.started if isinstance(item, Group) else 1
        if batch:
            self.prefill(batch)
        started = []
        while self.ready and self.free_rows and len(self.pool.free) > len(self.running):
            group = self.ready[0]
            sequence = Sequence(group.index, group.started, group.request, cached=len(group.prefix))
            sequence.pages = self.pool.share(group.pages)
            started.append((sequence, group.hidden_C))
            self.seat(sequence)
            group.started += 1
            if group.started == group.request.n:
                self.pool.release_(group.pages)
                self.ready.popleft()
        if started:
            sequences, hidden = zip(*started)
            rows = self.padded(sequences)
            hidden = F.pad(torch.stack(hidden), (0, 0, 0, len(rows) - len(started)))
            yield from self.extend(sequences, hidden, rows)

    def seat(self, sequence: Sequence):
        """Gives a sequence a row and writes the row's state."""
        row, r = self.free_rows.popleft(), sequence.request
        sequence.row = row
        self.running.append(sequence)
        self.table[row, :len(sequence.pages)] = torch.tensor(sequence.pages, device=self.table.device)
        self.position[row], self.drawn[row] = sequence.cached, len(sequence.token_ids)
        self.temperature[row], self.top_p[row], self.top_k[row] = r.temperature, r.top_p, r.top_k
        self.stream[row] = streams(torch.tensor(r.seed), torch.tensor(sequence.sample))
        self.active = None

    def unseat(self, sequence: Sequence):
        self.running.remove(sequence)
        self.pool.release_(sequence.pages)
        self.free_rows.append(sequence.row)
        self.active = None

    def reclaim(self):
        """Frees pages when the pool is dry: the youngest gives way and is recomputed later. The oldest always
        gets on."""
        self.stats.preemptions += 1
        if self.ready:
            item = self.ready.pop()
            self.pool.release_(item.pages)
        else:
            item = self.running[-1]
            self.unseat(item)
        self.waiting.appendleft(item)

    def grow(self):
        """Makes sure that every running sequence owns the page that its next token goes to."""
        copies, rows, columns, pages = [], [], [], []
        for sequence in list(self.running):
            if sequence not in self.running:  # was preempted for an older one
                continue
            fresh = sequence.cached == len(sequence.pages) * self.page_size
            if not fresh and self.pool.references[sequence.pages[-1]] == 1:
                continue
            while not self.pool.free and sequence in self.running:
                self.reclaim()
            if sequence not in self.running:
                continue
            page = self.pool.take()
            if not fresh:
                shared = sequence.pages.pop()
                self.pool.references[shared] -= 1
                copies.append((shared, page))
            sequence.pages.append(page)
            rows.append(sequence.row)
            columns.append(len(sequence.pages) - 1)
            pages.append(page)
        if copies:
            self.pool.copy_(copies)
            self.stats.copied_pages += len(copies)
        if rows:
            rows, columns, pages = torch.tensor([rows, columns, pages], device=self.table.device)
            self.table[rows, columns] = pages
        self.stats.peak_pages = max(self.stats.peak_pages, self.pool.num_pages - 1 - len(self.pool.free))

    # ---- computing

    def prefill(self, batch: list[Group | Sequence]):
        device, heads = self.table.device, self.model.config.num_attention_heads
        lengths = [len(item.prefix) for item in batch]
        table = pad_sequence([torch.tensor(item.pages) for item in batch], batch_first=True)
        positions = [torch.arange(n) for n in lengths]
        pages = [row[p // self.page_size] for row, p in zip(table, positions)]
        attend = PagedPrefill(self.pool.keys[0], heads, table.to(device), lengths, lengths)
        plan = PagedPlan(self.pool, attend, torch.cat(pages).to(device), torch.cat(positions).to(device))
        hidden = self.model(torch.tensor([t for item in batch for t in item.prefix], device=device), plan)
        self.stats.prefill_tokens += sum(lengths)
        for item, last in zip(batch, (torch.tensor(lengths).cumsum(0) - 1).tolist()):
            if isinstance(item, Group):
                item.hidden_C = hidden[last]
                self.ready.append(item)
            else:  # preempted before: goes on where it was
                item.cached = len(item.prefix)
                self.seat(item)
                self.token[item.row] = item.token_ids[-1]

    def decode(self) -> Iterator[Completion]:
        """One token for every running sequence."""
        self.grow()
        if not self.running:
            return
        rows = self.rows()
        columns = self.wide(max(len(s.pages) for s in self.running))
        table, positions = self.table[rows, :columns], self.position[rows]
        pages = table.gather(1, (positions // self.page_size)[:, None])[:, 0]
        plan = PagedPlan(self.pool, PagedDecode(self.pool.keys[0], table, positions + 1), pages, positions)
        hidden = self.model(self.token[rows], plan)
        self.position[rows[:len(self.running)]] += 1  # padding rows stay at one token, in page 0
        self.stats.decode_steps += 1
        self.stats.peak_rows = max(self.stats.peak_rows, len(self.running))
        for sequence in self.running:
            sequence.cached += 1
        yield from self.extend(list(self.running), hidden, rows)

    def rows(self) -> torch.Tensor:
        """Row numbers of the running sequences, padded."""
        if self.active is None:
            self.active = self.padded(self.running)
        return self.active

    def padded(self, sequences: list[Sequence]) -> torch.Tensor:
        """Their row numbers, with padding rows up to MIN_ROWS."""
        numbers = [s.row for s in sequences]
        padding = range(len(self.table) - MIN_ROWS, len(self.table) - len(numbers))
        return torch.tensor(numbers + list(padding), device=self.table.device)

    def extend(self, sequences: list[Sequence], hidden_SC: torch.Tensor,
               rows: torch.Tensor) -> Iterator[Completion]:
        """Draws the next token of each sequence from its hidden state; yields and retires those that end.

        rows: their row numbers, padded as hidden_SC is.
        """
        filtered = any(s.request.top_p < 1 or s.request.top_k > 0 for s in sequences)
        filters = (self.top_p[rows], self.top_k[rows]) if filtered else ()
        uniform = uniforms(self.stream[rows], self.drawn[rows])
        token, logp = head_draw(hidden_SC, self.model.head_weight, self.n_valid, uniform,
                                self.temperature[rows], *filters)
        self.token[rows] = token
        self.drawn[rows] += 1
        self.stats.new_tokens += len(sequences)
        for sequence, t, value in zip(sequences, token.tolist(), logp.tolist()):
            sequence.token_ids.append(t)
            sequence.logprobs.append(value)
            if reason := self.ended(sequence, t):
                self.unseat(sequence)
                self.stats.finished += 1
                yield self.completion(sequence, reason)

    def ended(self, sequence: Sequence, token: int) -> str | None:
        r = sequence.request
        if token in self.eos_ids:
            return "stop"
        if r.stop:
            sequence.tail += self.tokenizer.token_bytes[token]
            if any(s.encode() in sequence.tail for s in r.stop):
                return "stop"
            sequence.tail = sequence.tail[-max(len(s.encode()) for s in r.stop):]
        return "length" if len(sequence.token_ids) == r.max_new_tokens else None

    def completion(self, sequence: Sequence, reason: str) -> Completion:
        ids = sequence.token_ids
        shown = ids[:-1] if ids[-1] in self.eos_ids else ids
        text = self.tokenizer.decode(shown) if self.tokenizer else ""
        return Completion(sequence.index, sequence.sample, ids, sequence.logprobs, text, reason,
                          sequence.request.max_new_tokens)
