"""Generation: paged KV cache, continuous batching, and draws that depend only on their own random key.

Shapes: S running sequences (rows), T packed tokens, H query heads, K KV heads, D head dim, C hidden, P pages
of a sequence.

`scheduler.Scheduler` decides what each step does; this file executes it. The decode state of a row (page
table, position, newest token, random key) lives on the device and is written only where it changes, so a pure
decode step sends a few numbers per row however long the contexts are. On a GPU a step is launched before the
previous step's tokens are read, so the device does not wait for the host; a sample that has ended is noticed
one step late, and the extra token is dropped. Pure decode steps are replayed as CUDA graphs.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence

from kernels.attention import Gathered, PagedDecode, PagedPrefill, sent, write_kv
from kernels.sample import head_draw, streams, uniforms, whole_tiles
from lib.options import UserError
from model import ModelConfig, Qwen2
from replica import fuse_linears_, pack_head
from scheduler import Chunk, Request, Scheduler, Sequence, Stats, Step

# CPU matrix products with few rows take other code paths, whose rounding differs. Padded to this many rows, a
# row has the same bits in any batch.
MIN_ROWS, MIN_ROWS_UNPACKED = 4, 16
GRAPH_ROWS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512)  # batch sizes that get a CUDA graph


@dataclass(frozen=True)
class Completion:
    prompt_index: int  # of the request in `generate`'s argument
    sample_index: int
    token_ids: list[int]  # including the id or string that ended it
    logprobs: list[float]  # of the full softmax at the sampling temperature (greedy: at 1)
    text: str  # without the end-of-text token
    finish_reason: str  # "stop" | "length"
    max_new_tokens: int = 0  # of its request


# ---------------------------------------------------------------------- on the device


class PagePool:
    """Keys and values of all layers in pages: a tensor per layer. Initialised to zeros, because on a CPU
    masked slots are read too, and NaN would pass the mask."""
    def __init__(self, model: Qwen2, num_pages: int, page_size: int):
        config, head = model.config, model.head_weight
        self.num_pages, self.page_size = num_pages, page_size
        shape = (num_pages, page_size, config.num_key_value_heads // model.tp, config.head_dim)
        self.keys, self.values = ([torch.zeros(shape, dtype=head.dtype, device=head.device)
                                   for _ in range(config.num_hidden_layers)] for _ in range(2))

    def copy_(self, source: torch.Tensor, target: torch.Tensor):
        for x in (*self.keys, *self.values):
            x[target] = x[source]


def max_pages(rows: int, columns: int) -> int:
    """Upper bound on the pages of a pool for `rows` sequences of `columns` pages, page 0 and copies
    included."""
    return (rows + 1) * (columns + 1) + 1


def workspace(config: ModelConfig, tp: int, token_budget: int, rows: int, longest: int) -> int:
    """Estimated bytes needed beside the pool on a GPU: activations of the largest forward, partial results of
    decode attention (shared by all graphs), cuBLAS and the graphs. longest: tokens of a sequence."""
    wide = 2 * config.hidden_size + 2 * config.query_size + 4 * config.intermediate_size // tp
    chunks = rows * (longest // 256 + 1)
    decode = 4 * chunks * config.query_size // tp + 8 * rows * config.vocab_size // tp
    return 4 * token_budget * wide + 2 * decode + 2**30


class Rows:
    """Device state of the decode batch. The last row is padding: it stays at one token, in page 0."""
    def __init__(self, rows: int, columns: int, device):
        self.padding = rows
        self.table = torch.zeros(rows + 1, columns, dtype=torch.int64, device=device)
        integers = torch.zeros(5, rows + 1, dtype=torch.int64, device=device)
        self.token, self.position, self.drawn, self.stream, self.top_k = integers
        self.temperature, self.top_p = torch.ones(2, rows + 1, device=device)


class PagedPlan:
    """Attention plan of a forward that writes new keys and values into pages, then attends to them.

    parts: (attention, number of tokens) in the order of the tokens. pages_T: the page of each token.
    """
    def __init__(self, pool: PagePool, parts: list[tuple[PagedDecode | PagedPrefill, int]],
                 pages_T: torch.Tensor, positions_T: torch.Tensor):
        self.pool, self.parts, self.positions_T = pool, parts, positions_T
        self.slots_T = pages_T * pool.page_size + positions_T % pool.page_size

    def __call__(self, layer: int, q_THD, k_TKD, v_TKD, cos_T1D, sin_T1D):
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        q_THD = write_kv(q_THD, k_TKD, v_TKD, cos_T1D, sin_T1D, self.slots_T, keys, values)
        queries = q_THD.split([n for _, n in self.parts])
        out = [attend(q, keys, values) for (attend, _), q in zip(self.parts, queries)]
        return out[0] if len(out) == 1 else torch.cat(out)


@dataclass
class PendingTokens:
    """The tokens that a step draws; on a GPU they may not be computed yet."""

    sequences: list[Sequence]
    token_S: torch.Tensor
    logp_S: torch.Tensor
    ready: torch.cuda.Event | None = None


# ---------------------------------------------------------------------- engine


class Sampler:
    """Generates with a model whose weights may change between calls.

    tokenizer: provides valid ids, end-of-text ids, stop strings and text. Without one every row of the head
        is an id, and a sample ends by its length only.
    max_sequences: rows of the decode batch.
    page_size: tokens of a page.
    num_pages: pages of the pool; default: what max_sequences of the longest request need, if memory allows.
    token_budget: tokens of a forward, decoding rows and prefill chunks together.
    memory: share of the free memory that pool and workspace may take; on a CPU, of half of the machine's
        memory divided by its ranks.
    overlap: launch a step before the previous step's tokens are read; default: on a GPU.
    graphs: decode with CUDA graphs on a GPU.
    interrupt: called before each step; an exception that it raises ends the generation.

    A tensor-parallel model (`Qwen2(config, group)`) samples on all ranks of its group: each must pass the
    same requests and yields the same completions. If one rank cancels a request or stops iterating, all must,
    after the same completion.
    """
    def __init__(self, model: Qwen2, tokenizer=None, max_sequences: int = 64, page_size: int = 16,
                 num_pages: int | None = None, token_budget: int = 2048, memory: float = 0.9,
                 overlap: bool | None = None, graphs: bool = True,
                 interrupt: Callable[[], None] = lambda: None):
        self.model, self.tokenizer, self.device = model, tokenizer, model.head_weight.device
        self.max_sequences, self.page_size, self.num_pages = max_sequences, page_size, num_pages
        self.token_budget, self.memory = max(token_budget, max_sequences + 1), memory
        self.cuda = self.device.type == "cuda"
        self.overlap, self.use_graphs = self.cuda if overlap is None else overlap, graphs and self.cuda
        self.n_valid = tokenizer.n_valid if tokenizer else model.config.vocab_size
        self.eos_ids = frozenset(tokenizer.eos_ids if tokenizer else ())
        self.stats, self.interrupt = Stats(), interrupt
        # One stream for all captures: cuBLAS keeps a workspace for each stream that it has seen.
        self.side = torch.cuda.Stream(self.device) if self.cuda else None
        self.scheduler, self.pool, self.rows, self.graphs, self.gathered = None, None, None, {}, Gathered()
        if self.n_valid > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {self.n_valid} ids, the model only {model.config.vocab_size} rows: they "
                "do not belong together"
            )

    def generate(self, requests: list[Request]) -> Iterator[Completion]:
        """Yields every sample of every request as it finishes. Raises ValueError for a request that cannot be
        served."""
        requests = list(requests)
        self.check(requests)
        return self.run(requests)

    def cancel(self, prompt_index: int):
        """Drops the unfinished samples of a request. May be called between completions."""
        self.scheduler.cancel(prompt_index)

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
        if self.num_pages is not None:
            self.refuse(requests, Scheduler(self.num_pages, self.page_size, 1, 1))

    def refuse(self, requests: list[Request], scheduler: Scheduler):
        for i, r in enumerate(requests):
            if reason := scheduler.refusal(r):
                raise ValueError(f"request {i}: {reason}")

    @torch.inference_mode()
    def run(self, requests: list[Request]) -> Iterator[Completion]:
        if not requests:
            return
        self.stats = Stats()
        under_way: deque[PendingTokens] = deque()
        self.decoding, self.numbers = None, None
        try:
            self.wake(requests)
            self.scheduler = scheduler = Scheduler(self.pool.num_pages, self.page_size, self.rows.padding,
                                                   self.token_budget, self.stats)
            self.refuse(requests, scheduler)
            scheduler.add(requests)
            while scheduler.busy:
                self.interrupt()
                step = scheduler.step()
                if step:
                    under_way.append(self.launch(step))
                assert under_way, "the scheduler found nothing to do"
                if not step or len(under_way) > self.overlap:
                    yield from self.collect(under_way.popleft())
        finally:  # also when the caller stops iterating
            for i in range(len(requests) if self.scheduler else 0):
                self.scheduler.cancel(i)
            if not self.cuda:
                self.sleep()

    # ---- memory

    def wake(self, requests: list[Request]):
        """Prepares `run`: fused weights, page pool, row state. On a GPU all of it stays until `sleep`."""
        fuse_linears_(self.model)
        rows = min(self.max_sequences, sum(r.n for r in requests))
        columns = max(r.max_pages(self.page_size) for r in requests)
        if self.pool is None or self.rows.padding < rows or self.rows.table.shape[1] < columns:
            self.sleep()
            self.pool = PagePool(self.model, self.num_pages or self.affordable(rows, columns), self.page_size)
            self.rows = Rows(rows, columns, self.device)
        weight = self.model.head_weight
        self.head = pack_head(weight[:whole_tiles(self.n_valid)] if self.model.tp == 1 else weight)
        self.min_rows = 1 if self.cuda else MIN_ROWS_UNPACKED if self.head is None else MIN_ROWS

    def affordable(self, rows: int, columns: int) -> int:
        """Number of pages that the requests can need, or that memory allows if that is less."""
        model, wanted = self.model, max_pages(rows, columns)
        config, dtype = model.config, model.head_weight.dtype
        if self.cuda:
            if model.group is not None:
                dist.barrier(group=model.group)  # makes NCCL allocate its buffers now
            torch.cuda.empty_cache()
            beside = workspace(config, model.tp, self.token_budget, rows, columns * self.page_size)
            room = self.memory * torch.cuda.mem_get_info()[0] - beside
        else:
            here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            room = self.memory * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2 / here
        page_bytes = self.page_size * config.kv_bytes_per_token(dtype) // model.tp
        pages = torch.tensor(min(wanted, int(room) // page_bytes), device=self.device)
        if model.group is not None:  # the ranks' schedules must be the same
            dist.all_reduce(pages, dist.ReduceOp.MIN, group=model.group)
        if pages < columns + 2:
            raise UserError(f"the KV pool can have {pages} pages of {self.page_size} tokens, but the "
                             f"longest request needs {columns + 2}: lower max_new_tokens, or free memory")
        return int(pages)

    def sleep(self):
        """Frees pool and graphs; the weights stay."""
        self.pool = self.rows = self.head = None
        self.graphs = {}
        self.gathered.clear()
        if self.cuda:
            torch.cuda.empty_cache()

    # ---- a step

    def send(self, values: list, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """Copies Python numbers to a tensor on the device, without synchronisation."""
        x = torch.tensor(values, dtype=dtype)
        self.stats.host_elements += x.numel()
        return sent(x, self.device)

    def launch(self, step: Step) -> PendingTokens:
        """Launches a step on the device, without synchronisation."""
        if step.copies:
            self.pool.copy_(*self.send(step.copies).T)
        if step.table:
            row, column, page = self.send(step.table).T
            self.rows.table[row, column] = page
        if step.forks:
            self.init_rows([s for _, s in step.forks])
        self.stats.decode_steps += bool(step.decode)
        sequences = step.decode + [s for _, s in step.forks]
        filtered = any(s.request.top_p < 1 or s.request.top_k > 0 for s in sequences)
        if self.use_graphs and not (step.chunks or step.forks or filtered):
            token_S, logp_S = self.replay(step.decode)
        else:
            token_S, logp_S = self.forward(step, filtered)
        self.stats.new_tokens += len(sequences)
        if not self.cuda:
            return PendingTokens(sequences, token_S, logp_S)
        token_S, logp_S = (torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
                           for x in (token_S, logp_S))
        ready = torch.cuda.Event()
        ready.record()
        return PendingTokens(sequences, token_S, logp_S, ready)

    def init_rows(self, sequences: list[Sequence]):
        """Initialises the device state of the sequences' rows: their next draw is number `drawn`."""
        state = self.rows
        self.gathered.clear()
        integers = [(s.row, s.cached, s.drawn - 1, s.request.top_k, s.request.seed, s.sample)
                    for s in sequences]
        row, state.position[row], state.drawn[row], state.top_k[row], seed, sample = self.send(integers).T
        state.stream[row] = streams(seed, sample)
        filters = self.send([(s.request.temperature, s.request.top_p) for s in sequences], torch.float32)
        state.temperature[row], state.top_p[row] = filters.T

    def decode_rows(self, sequences: list[Sequence], size: int) -> torch.Tensor:
        """Row numbers of the sequences, padded to `size`; copied to the device only when they change."""
        numbers = [s.row for s in sequences]
        numbers += [self.rows.padding] * (size - len(numbers))
        if numbers != self.decoding:
            self.decoding, self.numbers = numbers, self.send(numbers)
            self.gathered.clear()
        return self.numbers

    def forward(self, step: Step, filtered: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """One forward over decoding rows and prefill chunks, then the draws of rows and forks."""
        hidden, rows = [], []
        if step.decode or step.chunks:
            row_S = self.decode_rows(step.decode, max(self.min_rows, len(step.decode)))
            columns = max((len(s.pages) for s in step.decode), default=1)
            parts, tokens, positions, pages = self.decode_part(row_S, columns)
            if step.chunks:
                more = self.prefill_part(step.chunks)
                parts, tokens, positions, pages = parts + more[0], *(
                    torch.cat(pair) for pair in zip((tokens, positions, pages), more[1:]))
            states = self.model(tokens, PagedPlan(self.pool, parts, pages, positions))
            self.advance(row_S)
            at = len(row_S)
            for chunk in step.chunks:
                at += chunk.end - chunk.start
                if chunk.last:
                    chunk.prefix.hidden = states[at - 1].clone()
            hidden, rows = [states[:len(step.decode)]], [row_S[:len(step.decode)]]
        if step.forks:
            hidden.append(torch.stack([prefix.hidden for prefix, _ in step.forks]))
            rows.append(self.send([s.row for _, s in step.forks]))
        hidden_SC, row_S = (torch.cat(x) if len(x) > 1 else x[0] for x in (hidden, rows))
        if not len(row_S):  # prefill chunks only, none of them a last one
            return row_S, row_S
        return self.draw(hidden_SC, row_S, filtered)

    def decode_part(self, row_S: torch.Tensor, columns: int):
        """(attention, tokens, positions, pages) of decoding rows."""
        table, positions = self.rows.table[row_S, :columns], self.rows.position[row_S]
        pages = table.gather(1, (positions // self.page_size)[:, None])[:, 0]
        attend = PagedDecode(self.pool.keys[0], table, positions + 1, self.gathered)
        return [(attend, len(row_S))], self.rows.token[row_S], positions, pages

    def prefill_part(self, chunks: list[Chunk]):
        """(attention, tokens, positions, pages) of prefill chunks."""
        lengths, ends = [c.end - c.start for c in chunks], [c.end for c in chunks]
        table = pad_sequence([torch.tensor(c.pages) for c in chunks], batch_first=True)
        positions = [torch.arange(c.start, c.end) for c in chunks]
        pages = [row[p // self.page_size] for row, p in zip(table, positions)]
        heads = self.model.config.num_attention_heads // self.model.tp
        attend = PagedPrefill(self.pool.keys[0], heads, sent(table, self.device), lengths, ends)
        self.stats.host_elements += table.numel() + 2 * sum(lengths)
        return ([(attend, sum(lengths))], self.send([t for c in chunks for t in c.tokens]),
                *(sent(torch.cat(x), self.device) for x in (positions, pages)))

    def advance(self, row_S: torch.Tensor):
        self.rows.position[row_S] += (row_S != self.rows.padding).long()

    def draw(self, hidden_SC: torch.Tensor, row_S: torch.Tensor,
             filtered: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """The next token of each row and its logprob; padding rows draw too, without effect."""
        state, count = self.rows, len(row_S)
        if count < self.min_rows:
            row_S = torch.cat((row_S, row_S.new_full((self.min_rows - count,), state.padding)))
            hidden_SC = torch.cat((hidden_SC, hidden_SC.new_zeros(self.min_rows - count, hidden_SC.shape[1])))
        filters = (state.top_p[row_S], state.top_k[row_S]) if filtered else (None, None)
        product = {"product": lambda x, _: self.head(x)} if self.head else {}
        token, logp = head_draw(hidden_SC, self.model.head_weight, self.n_valid,
                                uniforms(state.stream[row_S], state.drawn[row_S]), state.temperature[row_S],
                                *filters, self.model.group, **product)
        state.token[row_S] = token
        state.drawn[row_S] += 1
        return token[:count], logp[:count]

    # ---- CUDA graphs

    def replay(self, sequences: list[Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
        """A pure decode step as a CUDA graph of the next larger batch size, captured on first use. It gets
        the whole page table; the kernels read only as far as the contexts reach."""
        size = min((n for n in GRAPH_ROWS if n >= len(sequences)), default=-(-len(sequences) // 256) * 256)
        row_S = self.decode_rows(sequences, size)
        if size not in self.graphs:
            self.graphs[size] = self.capture(size)
        graph, graph_row_S, seen, token_S, logp_S = self.graphs[size]
        if seen[0] is not row_S:
            graph_row_S.copy_(row_S)
            seen[0] = row_S
        graph.replay()
        return token_S[:len(sequences)], logp_S[:len(sequences)]

    def capture(self, size: int):
        row_S = torch.full((size,), self.rows.padding, device=self.device)  # writes no sequence's state

        def decode():
            parts, tokens, positions, pages = self.decode_part(row_S, self.rows.table.shape[1])
            hidden_SC = self.model(tokens, PagedPlan(self.pool, parts, pages, positions))
            self.advance(row_S)
            return self.draw(hidden_SC, row_S)

        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            for _ in range(2):
                decode()
        torch.cuda.current_stream().wait_stream(self.side)
        graph = torch.cuda.CUDAGraph()
        memory = next(iter(self.graphs.values()))[0].pool() if self.graphs else None  # never run together
        # thread_local: threads of remote rewards may use CUDA meanwhile
        with torch.cuda.graph(graph, memory, self.side, capture_error_mode="thread_local"):
            token_S, logp_S = decode()
        return graph, row_S, [None], token_S, logp_S

    # ---- results

    def collect(self, drawn: PendingTokens) -> Iterator[Completion]:
        """Appends the drawn tokens to their sequences; retires those that end and yields their
        completions."""
        if drawn.ready:
            drawn.ready.synchronize()
        for s, token, logp in zip(drawn.sequences, drawn.token_S.tolist(), drawn.logp_S.tolist()):
            if s.done:
                continue
            s.token_ids.append(token)
            s.logprobs.append(logp)
            if reason := self.ended(s, token):
                self.scheduler.finish(s)
                self.stats.finished += 1
                yield self.completion(s, reason)

    def ended(self, s: Sequence, token: int) -> str | None:
        r = s.request
        if token in self.eos_ids:
            return "stop"
        if r.stop:
            s.tail += self.tokenizer.token_bytes[token]
            if any(stop.encode() in s.tail for stop in r.stop):
                return "stop"
            s.tail = s.tail[-max(len(stop.encode()) for stop in r.stop):]
        return "length" if len(s.token_ids) == r.max_new_tokens else None

    def completion(self, s: Sequence, reason: str) -> Completion:
        ids = s.token_ids
        shown = ids[:-1] if ids[-1] in self.eos_ids else ids
        text = self.tokenizer.decode(shown) if self.tokenizer else ""
        return Completion(s.index, s.sample, ids, s.logprobs, text, reason, s.request.max_new_tokens)
