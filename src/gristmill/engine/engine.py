"""The in-process generator: many responses in flight, a KV cache row each, rows refilled as responses end.

`Engine` is what callers see. `_Batch` holds the responses in flight of one `generate` call.

Shapes: B rows in flight, P requests of one prefill, T their prompt tokens one after the other, S the copies
of those tokens over all rows (n samples share one prefill), V vocabulary, H query heads, K key/value heads, d
head size, D hidden size, L positions.
"""

import copy
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from threading import Event, Lock
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.chat import ChatFormat, Message
from gristmill.engine.cache import KVCache
from gristmill.engine.generator import Completion, Finish, Request
from gristmill.engine.sampler import Needs, choose, sample_key, uniforms
from gristmill.errors import InputError
from gristmill.model.attention import varlen_attention
from gristmill.model.packed import PackedShape
from gristmill.model.transformer import Block, Transformer
from gristmill.tokenizer import Tokenizer
from gristmill.workers import merge, num_workers, workers

# New requests wait until this share of the rows is free, so that one prefill serves many of them.
REFILL_SHARE = 8
# Prompt tokens of one packed forward pass, and logits held at once: they bound the memory beside the cache.
PACKED_TOKENS = 8192
LOGIT_ELEMENTS = 16 * 2**20


Item = TypeVar("Item")


@dataclass
class EngineStats:
    """Work done so far: prompt and scored tokens computed (a prompt that samples share counts once), tokens
    generated, and seconds inside the engine, on average over its workers.
    """

    prompt_tokens: int = 0
    output_tokens: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._lock = Lock()

    def add(self, prompt_tokens: int = 0, output_tokens: int = 0, seconds: float = 0.0) -> None:
        """Count work; workers may do so at the same time."""
        with self._lock:
            self.prompt_tokens += prompt_tokens
            self.output_tokens += output_tokens
            self.seconds += seconds


class Engine:
    """A model, its tokenizer and its chat format as a `Generator`.

    Every `generate` call has its own rows and cache, so calls may be interleaved. On a CPU the requests of a
    small model are dealt to several workers (see `workers.py`), each with a share of the rows. The engine reads the
    model's weights in place where their type is `dtype`; otherwise it works on a converted copy and does not
    see later changes.

    Args:
        model: on the device where it is to run.
        tokenizer: the model's tokenizer.
        chat_format: how conversations are written; its end-of-turn token (and the tokenizer's EOS) ends a
            response.
        name: for records and reports.
        max_batch: most responses in flight.
        dtype: of matrices, activations and cache; norms and sampling are always float32.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        chat_format: ChatFormat,
        name: str,
        max_batch: int = 256,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if max_batch < 1:
            raise InputError(f"max_batch must be at least 1, got {max_batch}.")
        self.model = _in_dtype(model, dtype)
        self.blocks = [block for block in self.model.blocks if isinstance(block, Block)]
        self.tokenizer = tokenizer
        self.chat_format = chat_format
        self.max_batch = max_batch
        self.dtype = dtype
        self.device = model.embedding.device
        self.stats = EngineStats()
        self._name = name
        self.stop_V = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=self.device)
        self.stop_V[[chat_format.end_of_turn_id(tokenizer), tokenizer.eos_id]] = True

    @property
    def name(self) -> str:
        """Name of the model, for records and reports."""
        return self._name

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Completion]]]:
        """Yield each request with its completions when all its samples are done, in order of finishing.

        Requests are taken from the iterable only as rows become free, so it may be endless or produced on the
        fly. A request's completions do not depend on what else is in flight (up to the last digits of
        floating-point sums, which may differ with the batch's size).

        Raises:
            InputError: a prompt that leaves no room for an answer in the model's context, before anything is
                computed for it.
        """
        count = min(num_workers(self.model), self.max_batch)
        shares = _Shares(requests, count)
        yield from merge(count, lambda number, stop: self._serve(shares, number, stop))

    def _serve(self, shares: "_Shares", number: int, stop: Event) -> Iterator[tuple[Request, list[Completion]]]:
        """What one worker does until its share is exhausted."""
        source = shares.of(number)
        batch = _Batch(self, self.max_batch // shares.count)
        exhausted = False
        while not stop.is_set():
            started = time.perf_counter()
            if not exhausted:
                exhausted = self._refill(batch, source)
            if batch.rows:
                batch.step()
            self.stats.add(seconds=(time.perf_counter() - started) / shares.count)
            yield from batch.take_finished()
            if exhausted and not batch.rows:
                return

    def _refill(self, batch: "_Batch", source: Iterator[Request]) -> bool:
        """Start waiting requests if enough rows are free. Returns whether there are no more."""
        free = batch.max_rows - len(batch.rows)
        if batch.rows and free < max(1, batch.max_rows // REFILL_SHARE):
            return False
        starts: list[tuple[_Job, int, int]] = []
        while free:
            if batch.waiting is None:
                request = next(source, None)
                if request is None:
                    break
                batch.waiting = self._job(request)
            job = batch.waiting
            count = min(free, job.request.sampling.n - job.started)
            starts.append((job, job.started, count))
            free -= count
            job.started += count
            if job.started == job.request.sampling.n:
                batch.waiting = None
        batch.make_room(starts)
        for group in _by_tokens(starts, [len(job.prompt) for job, _, _ in starts], PACKED_TOKENS):
            batch.start(group)
        return free > 0

    def _job(self, request: Request) -> "_Job":
        prompt = self.chat_format.render_prompt(request.messages, self.tokenizer)
        room = self.model.config.max_positions - len(prompt)
        if room < 1:
            raise InputError(
                f"Request {request.id!r} has a prompt of {len(prompt)} tokens, which leaves no room for an "
                f"answer in the model's {self.model.config.max_positions}: shorten it."
            )
        sampling = request.sampling
        return _Job(request, prompt, min(sampling.max_tokens, room), [None] * sampling.n, sampling.n)

    def loglikelihood(self, conversations: Iterable[Sequence[Message]]) -> list[tuple[float, int]]:
        """Sum of log-probabilities (nats) and number of the trained tokens of each conversation.

        Trained tokens are the assistant turns with their end-of-turn tokens, as `ChatFormat.render` marks
        them.

        Raises:
            InputError: a conversation longer than the model's context.
        """
        rendered = [self.chat_format.render(messages, self.tokenizer) for messages in conversations]
        limit = self.model.config.max_positions
        for index, one in enumerate(rendered):
            if len(one.ids) > limit:
                raise InputError(f"Conversation {index} has {len(one.ids)} tokens and the model's context is {limit}: shorten it.")
        return self._score([one.ids for one in rendered], [one.mask for one in rendered])

    def text_loglikelihood(self, texts: Iterable[str]) -> list[tuple[float, int]]:
        """Sum of log-probabilities (nats) and number of predicted tokens of each raw document.

        The first token of a document is not predicted. A document longer than the model's context is read in
        consecutive pieces of that length, each predicted from its own beginning.
        """
        limit = self.model.config.max_positions
        pieces: list[list[int]] = []
        owners: list[int] = []
        count = 0
        for text in texts:
            ids = self.tokenizer.encode(text)
            for begin in range(0, len(ids), limit):
                pieces.append(ids[begin : begin + limit])
                owners.append(count)
            count += 1
        totals = [(0.0, 0)] * count
        scores = self._score(pieces, [[True] * len(ids) for ids in pieces])
        for owner, (logprob, tokens) in zip(owners, scores, strict=True):
            totals[owner] = (totals[owner][0] + logprob, totals[owner][1] + tokens)
        return totals

    def _score(self, ids: list[list[int]], masks: list[list[bool]]) -> list[tuple[float, int]]:
        started = time.perf_counter()
        out = [(0.0, 0)] * len(ids)
        order = sorted((i for i, one in enumerate(ids) if one), key=lambda i: len(ids[i]))
        groups = list(_by_tokens(order, [len(ids[i]) for i in order], PACKED_TOKENS))

        def score(group: list[int]) -> list[tuple[float, int]]:
            return self._score_group([ids[i] for i in group], [masks[i] for i in group])

        with workers(num_workers(self.model)) as each:
            for group, scores in zip(groups, each(score, groups), strict=True):
                for i, one in zip(group, scores, strict=True):
                    out[i] = one
        self.stats.add(prompt_tokens=sum(map(len, ids)), seconds=time.perf_counter() - started)
        return out

    @torch.inference_mode()
    def _score_group(self, ids: list[list[int]], masks: list[list[bool]]) -> list[tuple[float, int]]:
        shape = PackedShape.from_lengths([len(one) for one in ids], self.device)
        ids_T = torch.tensor([t for one in ids for t in one], device=self.device)
        mask_T = torch.tensor([m for one in masks for m in one], device=self.device)
        target_T = (mask_T & (shape.positions_T > 0)).nonzero()[:, 0]
        h_TD = self.model.hidden(ids_T, shape)
        logprobs_T = torch.zeros(len(ids_T), dtype=torch.float64, device=self.device)
        for part in target_T.split(max(1, LOGIT_ELEMENTS // self.model.config.vocab_size)):
            logits_PV = self.model.logits(h_TD[part - 1]).float()
            chosen_P = logits_PV.gather(-1, ids_T[part][:, None])[:, 0]
            logprobs_T[part] = (chosen_P - logits_PV.logsumexp(-1)).double()
        counted_T = torch.zeros_like(mask_T)
        counted_T[target_T] = True
        parts = zip(logprobs_T.split(shape.lengths), counted_T.split(shape.lengths), strict=True)
        return [(float(sums.sum()), int(counts.sum())) for sums, counts in parts]


class _Shares:
    """Requests dealt out to workers one by one, so that which worker has which does not depend on their speed."""

    def __init__(self, requests: Iterable[Request], count: int) -> None:
        self._requests = iter(requests)
        self._lock = Lock()
        self._dealt: list[deque[Request]] = [deque() for _ in range(count)]
        self._next = 0
        self.count = count

    def of(self, number: int) -> Iterator[Request]:
        """The requests of one worker."""
        mine = self._dealt[number]
        while True:
            with self._lock:
                while not mine:
                    request = next(self._requests, None)
                    if request is None:
                        return
                    self._dealt[self._next].append(request)
                    self._next = (self._next + 1) % self.count
                request = mine.popleft()
            yield request


@dataclass
class _Job:
    """A request on its way: `started` samples have a row or are done, `open` are not done."""

    request: Request
    prompt: list[int]
    limit: int
    completions: list[Completion | None]
    open: int
    started: int = 0


# Rows of `_Batch.ints`: the token to feed next, its position, tokens generated, most tokens, random key,
# top_k, row of the output table.
TOKEN, POSITION, COUNT, LIMIT, KEY, TOP_K, HOME = range(7)


class _Batch:
    """Responses in flight. Row b of every tensor belongs to rows[b]; the first len(rows) rows are in use.

    A finished row is taken over by the last one, so a step computes nothing for free rows. Generated tokens
    and their log-probabilities stay on the device in a table whose lines ("homes") do not move, and are read
    once, at the end.
    """

    def __init__(self, engine: Engine, max_rows: int) -> None:
        device = engine.device
        self.engine = engine
        self.max_rows = max_rows
        self.rows: list[tuple[_Job, int]] = []
        self.waiting: _Job | None = None
        self.finished: list[_Job] = []
        self.longest = 0
        self.needs = Needs(False, False, 0, False)
        shapes = [(b.num_kv_heads, b.head_dim) if b.has_attention else None for b in engine.model.config.blocks]
        self.cache = KVCache(shapes, engine.dtype, device)
        self.ints = torch.zeros(7, max_rows, dtype=torch.int64, device=device)
        self.floats = torch.zeros(2, max_rows, device=device)  # temperature, top_p
        self.free_homes = list(range(max_rows))
        self.tokens_out = torch.zeros(max_rows, 0, dtype=torch.int64, device=device)
        self.logprobs_out = torch.zeros(max_rows, 0, device=device)

    def take_finished(self) -> Iterator[tuple[Request, list[Completion]]]:
        finished, self.finished = self.finished, []
        for job in finished:
            yield job.request, [c for c in job.completions if c is not None]

    @torch.inference_mode()
    def make_room(self, group: Sequence[tuple[_Job, int, int]]) -> None:
        """Grow the cache for the prompts, and the output table for the answers, of jobs about to start."""
        if not group:
            return
        rows = len(self.rows) + sum(samples for _, _, samples in group)
        # A power of two of rows, so that a short list of requests does not pay for the whole cache.
        slots = min(self.max_rows, 1 << (rows - 1).bit_length())
        self.cache.reserve(slots, max(len(job.prompt) for job, _, _ in group), len(self.rows))
        width = max(job.limit for job, _, _ in group)
        if width > self.tokens_out.shape[1]:
            extra = (0, width - self.tokens_out.shape[1])
            self.tokens_out = F.pad(self.tokens_out, extra)
            self.logprobs_out = F.pad(self.logprobs_out, extra)

    @torch.inference_mode()
    def start(self, group: Sequence[tuple[_Job, int, int]]) -> None:
        """Prefill the prompts of `group` (job, first sample, samples) in one pass: every sample gets a row
        and its first token.
        """
        first_row, count = len(self.rows), sum(samples for _, _, samples in group)
        self._add_rows(group)
        new = slice(first_row, first_row + count)
        logits_BV = self._prefill(group, first_row)
        live = len(self.rows)
        self.needs = Needs.of(self.floats[0, :live], self.floats[1, :live], self.ints[TOP_K, :live])
        self._record(logits_BV, new)
        self._measure()
        self._retire()

    def _add_rows(self, group: Sequence[tuple[_Job, int, int]]) -> None:
        first_row = len(self.rows)
        ints, floats = [], []
        for job, first, samples in group:
            request, sampling = job.request, job.request.sampling
            for sample in range(first, first + samples):
                self.rows.append((job, sample))
                key = sample_key(request.seed, request.id, sample)
                home = self.free_homes.pop()
                ints.append((0, len(job.prompt) - 1, 0, job.limit, key, sampling.top_k, home))
                floats.append((sampling.temperature, sampling.top_p))
        new = slice(first_row, len(self.rows))
        self.ints[:, new] = torch.tensor(ints, device=self.engine.device).T
        self.floats[:, new] = torch.tensor(floats, device=self.engine.device).T

    def _prefill(self, group: Sequence[tuple[_Job, int, int]], first_row: int) -> Tensor:
        """Logits [B, V] after each new row's prompt, whose keys and values are written to the row. Equal prompts are read once."""
        engine, model, device = self.engine, self.engine.model, self.engine.device
        prompts: dict[tuple[int, ...], int] = {}
        sources = [prompts.setdefault(tuple(job.prompt), len(prompts)) for job, _, samples in group for _ in range(samples)]
        lengths = [len(prompt) for prompt in prompts]
        shape = PackedShape.from_lengths(lengths, device)
        ids_T = torch.tensor([t for prompt in prompts for t in prompt], device=device)
        engine.stats.add(prompt_tokens=len(ids_T))
        # Every prompt token once for each row that reads it.
        starts = shape.cu_seqlens.tolist()
        source_S = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in sources]).to(device)
        row_S = torch.arange(first_row, first_row + len(sources)).repeat_interleave(torch.tensor([lengths[i] for i in sources])).to(device)
        position_S = shape.positions_T[source_S]
        copied = len(source_S) > len(ids_T)
        cos_TR, sin_TR = model.rope(shape.positions_T)
        last_P = shape.cu_seqlens[1:].long() - 1
        x_TD = model.embed(ids_T)
        for layer, block in enumerate(engine.blocks):
            attended_THd = None
            if block.attention is not None:
                q_THd, k_TKd, v_TKd = block.qkv(x_TD, cos_TR, sin_TR)
                attended_THd = varlen_attention(q_THd, k_TKd, v_TKd, shape)
                if copied:
                    k_TKd, v_TKd = k_TKd[source_S], v_TKd[source_S]
                self.cache.write(layer, row_S, position_S, k_TKd, v_TKd)
            if layer == len(engine.blocks) - 1:
                # Only the last token of each prompt is read from here on.
                x_TD = x_TD[last_P]
                attended_THd = None if attended_THd is None else attended_THd[last_P]
            x_TD = block.finish(x_TD, attended_THd)
        logits_PV = model.logits(model.final_norm(x_TD))
        return logits_PV[torch.tensor(sources, device=device)] if copied else logits_PV

    @torch.inference_mode()
    def step(self) -> None:
        """One token for every row."""
        model, live = self.engine.model, len(self.rows)
        positions_B = self.ints[POSITION, :live]
        self.longest += 1
        length = self.longest
        self.cache.reserve(live, length, live)
        visible_BL = torch.arange(length, device=self.engine.device) <= positions_B[:, None]
        mask_B11L = torch.where(visible_BL, 0.0, float("-inf")).to(self.engine.dtype)[:, None, None]
        rows_B = torch.arange(live, device=self.engine.device)
        cos_BR, sin_BR = model.rope(positions_B)
        x_BD = model.embed(self.ints[TOKEN, :live])
        for layer, block in enumerate(self.engine.blocks):
            attended_BHd = None
            if block.attention is not None:
                q_BHd, k_BKd, v_BKd = block.qkv(x_BD, cos_BR, sin_BR)
                self.cache.write(layer, rows_B, positions_B, k_BKd, v_BKd)
                attended_BHd = self.cache.attend(layer, q_BHd, mask_B11L)
            x_BD = block.finish(x_BD, attended_BHd)
        self._record(model.logits(model.final_norm(x_BD)), slice(0, live))
        self._retire()

    def _record(self, logits_BV: Tensor, rows: slice) -> None:
        """Choose the next token of `rows` and note it."""
        ints = self.ints[:, rows]
        u_B = uniforms(ints[KEY], ints[COUNT])
        tokens_B, logprobs_B = choose(logits_BV, u_B, self.floats[0, rows], self.floats[1, rows], ints[TOP_K], self.needs)
        self.tokens_out[ints[HOME], ints[COUNT]] = tokens_B
        self.logprobs_out[ints[HOME], ints[COUNT]] = logprobs_B
        ints[TOKEN] = tokens_B
        ints[POSITION : COUNT + 1] += 1

    def _retire(self) -> None:
        """Hand over finished rows and let the last rows take their places."""
        live = len(self.rows)
        ints = self.ints[:, :live]
        stopped_B = self.engine.stop_V[ints[TOKEN]]
        done = (stopped_B | (ints[COUNT] >= ints[LIMIT])).nonzero()[:, 0]
        done_rows = done.tolist()
        if done_rows:
            self._complete(done_rows, done, stopped_B[done].tolist())
            left = live - len(done_rows)
            dead = set(done_rows)
            holes = [row for row in done_rows if row < left]
            movers = [row for row in range(left, live) if row not in dead]
            if holes:
                to = torch.tensor(holes, device=self.engine.device)
                source = torch.tensor(movers, device=self.engine.device)
                self.ints[:, to] = self.ints[:, source]
                self.floats[:, to] = self.floats[:, source]
                self.cache.move(to, source, int(self.ints[POSITION, to].max()))
                for hole, mover in zip(holes, movers, strict=True):
                    self.rows[hole] = self.rows[mover]
            del self.rows[left:]
            self._measure()

    def _measure(self) -> None:
        live = len(self.rows)
        self.longest = int(self.ints[POSITION, :live].max()) if live else 0

    def _complete(self, rows: list[int], rows_tensor: Tensor, stopped: list[bool]) -> None:
        engine = self.engine
        homes = self.ints[HOME, rows_tensor]
        counts = self.ints[COUNT, rows_tensor].tolist()
        tokens, logprobs = self.tokens_out[homes].tolist(), self.logprobs_out[homes].tolist()
        for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
            job, sample = self.rows[row]
            ids = tokens[i][: count - 1] if stopped[i] else tokens[i][:count]
            finish: Finish = "stop" if stopped[i] else "length"
            text = engine.chat_format.response_text(ids, engine.tokenizer)
            job.completions[sample] = Completion(text, count, tuple(logprobs[i][:count]), finish)
            job.open -= 1
            if not job.open:
                self.finished.append(job)
        self.free_homes.extend(homes.tolist())
        engine.stats.add(output_tokens=sum(counts))


def _in_dtype(model: Transformer, dtype: torch.dtype) -> Transformer:
    """The model itself where its matrices and activations have this type, else a copy; norms keep theirs."""
    if model.embedding.dtype == dtype and model.compute_dtype == dtype:
        return model
    converted = copy.deepcopy(model).requires_grad_(False)
    for parameter in converted.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data.to(dtype)
    converted.compute_dtype = dtype
    return converted


def _by_tokens(items: Sequence[Item], sizes: Sequence[int], budget: int) -> Iterator[list[Item]]:
    """Consecutive groups whose sizes add up to at most `budget` (or a single larger item)."""
    group: list[Item] = []
    total = 0
    for item, size in zip(items, sizes, strict=True):
        if group and total + size > budget:
            yield group
            group, total = [], 0
        group.append(item)
        total += size
    if group:
        yield group
