"""Inference engine: offline batch generation, log-likelihood scoring, and cores for an asynchronous engine.

Shapes: T packed tokens, P of them at a time, D hidden size, V vocabulary.
"""

import copy
import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from threading import Event, Lock
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from gristmill.core.device import Arena, check_dtype, current_device
from gristmill.core.errors import InputError
from gristmill.core.threads import merge, num_workers, one_torch_thread, workers
from gristmill.data.chat import Message
from gristmill.data.chat_format import ChatFormat
from gristmill.data.thinking import CLOSE
from gristmill.data.tokenizer import Tokenizer
from gristmill.engine.core import Core
from gristmill.engine.grammar import GrammarBackend
from gristmill.engine.layers import Decoder, DecoderLayer
from gristmill.engine.lora import MAX_ADAPTERS, LoadedAdapter, LoraRows
from gristmill.engine.scoring import Continuation, PrefixScorer, Scored, by_prefix, shares
from gristmill.engine.sequence import RequestState
from gristmill.engine.speculative import SpeculativeConfig
from gristmill.engine.thinking import ThinkingTags
from gristmill.generation.api import Completion, Request
from gristmill.model.adapters import Adapter
from gristmill.model.packed import PackedShape
from gristmill.model.quantized import Head, Quantize, check_widths
from gristmill.model.transformer import Transformer

# Tokens of one packed forward pass, and logits held at once: they bound the memory beside the cache.
MAX_PACKED_TOKENS = 8192
MAX_LOGIT_ELEMENTS = 16 * 2**20


# Rows times parameters of a worker's step, under which a second one costs more in waiting for Python's lock than it computes.
STEP_PRODUCTS = 64_000_000
MAX_RUN = 8  # requests of one prompt that a worker is dealt in a row

Item = TypeVar("Item")


@dataclass
class EngineStats:
    """Engine counters: prompt and scored tokens computed (a prompt that samples share counts once), tokens
    generated, seconds inside the engine, on average over its workers, tokens drafted, and those of them that were right.
    """

    prompt_tokens: int = 0
    output_tokens: int = 0
    seconds: float = 0.0
    draft_tokens: int = 0
    accepted_tokens: int = 0

    def __post_init__(self) -> None:
        self._lock = Lock()

    @property
    def acceptance(self) -> str:
        """Acceptance of drafts, in words."""
        share = f" ({self.accepted_tokens / self.draft_tokens:.0%})" if self.draft_tokens else ""
        return f"drafts: {self.accepted_tokens:,} of {self.draft_tokens:,} tokens accepted{share}"

    def add(
        self, prompt_tokens: int = 0, output_tokens: int = 0, seconds: float = 0.0, *, draft_tokens: int = 0, accepted_tokens: int = 0
    ) -> None:
        """Count work; workers may do so at the same time."""
        with self._lock:
            self.prompt_tokens += prompt_tokens
            self.output_tokens += output_tokens
            self.seconds += seconds
            self.draft_tokens += draft_tokens
            self.accepted_tokens += accepted_tokens


class Engine:
    """Inference engine of a model with its tokenizer and chat format; a `Generator`.

    Every `generate` call has its own slots and cache, so calls may be interleaved. On a CPU the requests of a
    small model are dealt to several workers, each a `Core` with a share of the slots. The engine reads the
    model's weights in place where their type is `dtype`; otherwise it works on a converted copy and does not
    see later changes.

    Args:
        model: on the device where it is to run.
        tokenizer: the model's tokenizer.
        chat_format: how conversations are written; its end-of-turn token ends a response, as do the tokenizer's EOS and the ends
            of text that the model folder's generation_config.json names.
        name: for records and reports.
        max_batch: responses that may be in flight at once.
        dtype: of matrices and activations; norms and sampling are always float32.
        cache_tokens: positions that the cache of each worker holds; None for what `max_batch` responses can take, memory permitting.
        cache_dtype: of keys and values; None for `dtype`. int8 and float8_e4m3fn keep a scale for each head of a token.
        quantize: the layers' matrices, here and now: "int8" (and activations, a scale a token), "int8-weight" or "int4" (matrices alone)
            or "fp8" (both). Everything is then computed by them, scores too.
        head: "int8": the output matrix in eight bits, its weights alone.
        own: nobody else uses the model: what is quantized or converted is dropped from it.
        layers: quantized layers, made already from blocks that were released; the model is owned then.
        max_loras: adapters whose requests may be in flight at once.
        step_tokens: most tokens that a worker computes at once; long prompts are read in as many pieces. None for what gives the most
            tokens a second, and, where somebody waits for every token (`core`, interactive), as many as keep the step short.
        speculative: how tokens are drafted (speculative decoding); None: they are not. Answers are the same.

    Attributes:
        adapters: LoRA adapters that requests may name.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        chat_format: ChatFormat,
        *,
        name: str,
        max_batch: int = 256,
        dtype: torch.dtype = torch.float32,
        cache_tokens: int | None = None,
        cache_dtype: torch.dtype | None = None,
        quantize: Quantize = "",
        head: Head = "",
        own: bool = False,
        layers: list[DecoderLayer] | None = None,
        max_loras: int = 8,
        step_tokens: int | None = None,
        speculative: SpeculativeConfig | None = None,
    ) -> None:
        if max_batch < 1:
            raise InputError(f"max_batch must be at least 1, got {max_batch}.")
        device = model.embedding.device
        if cache_dtype == torch.float8_e4m3fn and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
            raise InputError(f"{torch.cuda.get_device_name(device)} has no fp8: keep the cache in int8 or bf16.")
        check_dtype(device, dtype)
        if quantize == "int4" and layers is None:
            check_widths(model.config)
        self._trained, self.model = model, model if quantize else _in_dtype(model, dtype, own)
        self.num_workers = num_workers(model)
        self._num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.quantize, self.head = quantize, head
        self._decoder = Decoder(self.model, dtype, quantize, head=head, layers=layers)
        if own and quantize and layers is None:
            self._decoder.release()
        elif own and head:
            self._decoder.release_head()
        self.tokenizer = tokenizer
        self.chat_format = chat_format
        self.max_batch = max_batch
        self.dtype, self.cache_dtype, self.cache_tokens = dtype, cache_dtype or dtype, cache_tokens
        self.device = device
        self.stats = EngineStats()
        self.max_loras = max_loras
        self.step_tokens, self.speculative = step_tokens, speculative
        self.adapters: dict[str, LoadedAdapter] = {}
        self._name = name
        self._arrivals = itertools.count()
        self.stop_V = np.zeros(model.config.vocab_size, np.bool_)
        self.stop_V[[chat_format.end_of_turn_id(tokenizer), tokenizer.eos_id, *tokenizer.end_ids]] = True

    @property
    def is_quantized(self) -> bool:
        """Whether anything is computed in another way than the model does."""
        return bool(self.quantize or self.head) or self.cache_dtype != self.dtype

    @property
    def name(self) -> str:
        """Name of the model, for records and reports."""
        return self._name

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Completion]]]:
        """Generate: yield each request with its completions when all its samples are done, in order of finishing.

        Requests are taken from the iterable only as slots become free, so it may be endless or produced on the
        fly. A request's completions do not depend on what else is in flight (up to the last digits of
        floating-point sums, which may differ with the batch's size).

        Raises:
            InputError: a prompt that leaves no room for an answer in the model's context, before anything is
                computed for it.
        """
        if not self.quantize and not self.head:
            self._decoder.refresh()
        asked = sum(request.sampling.n for request in requests) if isinstance(requests, Sequence) else self.max_batch
        count = self.useful_workers(min(self.max_batch, asked))
        dealt = _RoundRobin(requests, count)
        with one_torch_thread() if self.num_workers > 1 else nullcontext():
            yield from merge(count, lambda number, stop: self._run_worker(dealt, number, stop))

    def useful_workers(self, num_in_flight: int) -> int:
        """Workers that finish so many requests soonest: of few rows a step takes Python longer than the processor, and one is best."""
        return max(1, min(self.num_workers, num_in_flight, num_in_flight * self._num_parameters // STEP_PRODUCTS))

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        """Load a LoRA adapter, which requests then name. Those that are under way keep the one they began with.

        Raises:
            InputError: it cannot be served, the name is taken, or there are too many.
        """
        loaded = LoadedAdapter(name, adapter, self.model, self.dtype)
        if name == self.name or name in self.adapters:
            raise InputError(f"Choose another name for the adapter, or unload that one: {name!r} is loaded already.")
        if len(self.adapters) >= MAX_ADAPTERS:
            raise InputError(f"Unload an adapter first: {MAX_ADAPTERS} are loaded.")
        self.adapters[name] = loaded

    def remove_adapter(self, name: str) -> None:
        """Unload a LoRA adapter; requests that are under way still have it.

        Raises:
            InputError: there is none of this name.
        """
        if self.adapters.pop(name, None) is None:
            raise InputError(f"There is no adapter {name!r} to unload.")

    def adapter(self, name: str) -> LoadedAdapter | None:
        """The adapter of a name; None for "", the model itself.

        Raises:
            InputError: there is none of this name.
        """
        if not name:
            return None
        if (found := self.adapters.get(name)) is None:
            raise InputError(f"There is no adapter {name!r}: load it first.")
        return found

    @cached_property
    def grammar_backend(self) -> GrammarBackend:
        """Grammar backend, made for the first request with a grammar."""
        return GrammarBackend(self.tokenizer, self.model.config.vocab_size, self.stop_V.nonzero()[0].tolist())

    @cached_property
    def _thinking_tags(self) -> ThinkingTags:
        tokenizer = self.tokenizer  # of a control token the text would be spelt
        close = [tokenizer.special_id(CLOSE)] if tokenizer.has(CLOSE) else tokenizer.encode(CLOSE)
        return ThinkingTags(tuple(close), lambda ids: tokenizer.decode(ids, keep_special=True, continued=True))

    def core(self, num_workers: int = 1, *, interactive: bool = False) -> Core:
        """Engine core of a worker, one of so many that share the machine. `interactive` as in `Core`."""
        return Core(
            self._decoder,
            max(1, self.max_batch // num_workers),
            self.stop_V,
            response_text=lambda ids, continued: self.chat_format.response_text(ids, self.tokenizer, continued=continued),
            decode=lambda ids, continued: self.tokenizer.decode(ids, continued=continued),
            cache_tokens=self.cache_tokens,
            cache_dtype=self.cache_dtype,
            num_workers=num_workers,
            grammar_backend=lambda: self.grammar_backend,
            max_loras=self.max_loras,
            max_batched_tokens=self.step_tokens,
            interactive=interactive,
            speculative=self.speculative,
            thinking_tags=self._thinking_tags,
        )

    def prepare(self, request: Request) -> RequestState:
        """Preprocess a request: render its messages into a prompt, unless it has token ids, and check it.

        Raises:
            InputError: a prompt that leaves no room for an answer in the model's context, or what the model does not have.
        """
        prompt = request.prompt_ids or self.chat_format.render_prompt(request.messages, self.tokenizer)
        room = self.model.config.max_positions - len(prompt)
        if room < 1:
            raise InputError(
                f"Request {request.id!r} has a prompt of {len(prompt)} tokens, which leaves no room for an "
                f"answer in the model's {self.model.config.max_positions}: shorten it."
            )
        sampling = request.sampling
        given = {"logit_bias": [token for token, _ in sampling.logit_bias], "stop": sampling.stop_tokens}
        for what, tokens in given.items():
            if wrong := [token for token in tokens if not 0 <= token < self.model.config.vocab_size]:
                raise InputError(f"Request {request.id!r} has a {what} for token {wrong[0]}, which the model does not have.")
        if sampling.grammar:
            self.grammar_backend.validate(sampling.grammar)
        max_tokens = min(sampling.max_tokens, room)
        adapter = self.adapter(request.adapter)
        return RequestState(request, np.array(prompt, np.int32), max_tokens, next(self._arrivals), adapter=adapter)

    def _run_worker(self, dealt: "_RoundRobin", number: int, stop: Event) -> Iterator[tuple[Request, list[Completion]]]:
        """Worker loop, until its requests are exhausted."""
        core = self.core(dealt.num_workers)
        try:
            yield from self._answer(core, dealt.of_worker(number), dealt.num_workers, stop=stop)
        finally:
            core.release()

    def _answer(
        self, core: Core, source: Iterator[Request], num_workers: int, *, stop: Event
    ) -> Iterator[tuple[Request, list[Completion]]]:
        exhausted = False
        waiting = 0
        while not stop.is_set():
            started = time.perf_counter()
            prompts, outputs = core.prompt_tokens, core.output_tokens
            drafts, accepted = core.draft_tokens, core.accepted_tokens
            while not exhausted and waiting < len(core.batch_state.free_slots):
                request = next(source, None)
                if request is None:
                    exhausted = True
                else:
                    core.add(self.prepare(request))
                    waiting = len(core.scheduler.waiting)
            if not core.idle:
                core.step()
            waiting = len(core.scheduler.waiting)
            spent = (time.perf_counter() - started) / num_workers
            drafted = {"draft_tokens": core.draft_tokens - drafts, "accepted_tokens": core.accepted_tokens - accepted}
            self.stats.add(core.prompt_tokens - prompts, core.output_tokens - outputs, spent, **drafted)
            for state in core.take_finished():
                if state.error is not None:
                    raise state.error
                yield state.request, [c for c in state.completions if c is not None]
            if exhausted and core.idle:
                return

    @torch.inference_mode()
    def prompt_logprobs(self, ids: Sequence[int], top: int, adapter: str = "") -> tuple[list[float], list[list[tuple[int, float]]]]:
        """Prompt log-probabilities: of every token but the first, given those before it, and of the `top` likeliest in its place.

        Args:
            adapter: name of the adapter to compute them with.

        Raises:
            InputError: more tokens than the model's context.
        """
        limit = self.model.config.max_positions
        if len(ids) > limit:
            raise InputError(f"The prompt has {len(ids)} tokens and the model's context is {limit}: shorten it.")
        ids_T = torch.tensor(ids, device=self.device)
        h_TD = self.hidden(ids_T, PackedShape.from_lengths([len(ids)], self.device), self.adapter(adapter))
        logprobs: list[float] = []
        best: list[list[tuple[int, float]]] = []
        for part in torch.arange(1, len(ids)).split(max(1, MAX_LOGIT_ELEMENTS // self.model.config.vocab_size)):
            logits_PV = self.logits(h_TD[part - 1])
            total_P1 = logits_PV.logsumexp(-1, keepdim=True)
            logprobs += (logits_PV.gather(-1, ids_T[part][:, None]) - total_P1)[:, 0].tolist()
            found = logits_PV.topk(min(top, logits_PV.shape[1]), -1)
            values = (found.values - total_P1).tolist()
            best += [list(zip(i, v, strict=True)) for i, v in zip(found.indices.tolist(), values, strict=True)]
        return logprobs, best

    def hidden(self, ids_T: Tensor, shape: PackedShape, adapter: LoadedAdapter | None = None) -> Tensor:
        """Hidden states [T, D] of whole texts: the model's own, or what generation comes to with an adapter, or where matrices or cache
        are quantized.
        """
        if self.is_quantized or adapter is not None:
            lora = None if adapter is None else LoraRows([(adapter, slice(None))])
            with current_device(self.device):
                return self._decoder.hidden(ids_T, shape, self.cache_dtype, lora)
        return self.model.hidden(ids_T, shape)

    def logits(self, h: Tensor) -> Tensor:
        """Logits (.., V) of such hidden states (.., D), fp32."""
        return self._decoder.logits(h).float()

    @torch.no_grad()
    def refresh(self) -> None:
        """Weight update: take over what training has changed in place, without a copy on disk. Calls of `generate` that are under way, and
        scoring, must have ended; an `AsyncEngine` has its own `refresh`.
        """
        if self.model is not self._trained:
            for mine, theirs in zip(self.model.parameters(), self._trained.parameters(), strict=True):
                mine.copy_(theirs)
        self._decoder.refresh()

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

    def continuations(self, items: Sequence[Continuation]) -> Iterator[Scored]:
        """Log-likelihoods of continuations, as their forward passes end: common prefixes are computed once.

        Raises:
            InputError: a context with its continuation is longer than the model's context and one token, which is only predicted.
        """
        limit = self.model.config.max_positions
        for number, item in enumerate(items):
            if len(item.ids) > limit + 1:
                raise InputError(f"Continuation {number} ends at token {len(item.ids)} and the model's context is {limit}: shorten it.")
        if not self.quantize and not self.head:
            self._decoder.refresh()
        texts = by_prefix(items)
        count = max(1, min(self.num_workers, len(texts)))
        parts = shares(texts, count)

        def work(number: int, stop: Event) -> Iterator[Scored]:
            longest = max((text.length for text in parts[number]), default=1)
            scorer = PrefixScorer(self._decoder, self.cache_dtype, longest, step_tokens=self.step_tokens)
            started, before = time.perf_counter(), 0
            for scored in scorer.score(items, parts[number], stop):
                spent = (time.perf_counter() - started) / count
                self.stats.add(prompt_tokens=scorer.num_computed - before, seconds=spent)
                before = scorer.num_computed
                yield scored
                started = time.perf_counter()

        yield from merge(count, work)

    def _score(self, ids: list[list[int]], masks: list[list[bool]]) -> list[tuple[float, int]]:
        started = time.perf_counter()
        out = [(0.0, 0)] * len(ids)
        order = sorted((i for i, one in enumerate(ids) if one), key=lambda i: len(ids[i]))
        groups = list(_by_tokens(order, [len(ids[i]) for i in order], MAX_PACKED_TOKENS))

        def score(group: list[int]) -> list[tuple[float, int]]:
            return self._score_group([ids[i] for i in group], [masks[i] for i in group])

        with workers(self.num_workers) as each:
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
        h_TD = self.hidden(ids_T, shape)
        logprobs_T = torch.zeros(len(ids_T), dtype=torch.float64, device=self.device)
        for part in target_T.split(max(1, MAX_LOGIT_ELEMENTS // self.model.config.vocab_size)):
            logits_PV = self.logits(h_TD[part - 1])
            chosen_P = logits_PV.gather(-1, ids_T[part][:, None])[:, 0]
            logprobs_T[part] = (chosen_P - logits_PV.logsumexp(-1)).double()
        counted_T = torch.zeros_like(mask_T)
        counted_T[target_T] = True
        parts = zip(logprobs_T.cpu().split(shape.lengths), counted_T.cpu().split(shape.lengths), strict=True)  # one wait for all
        return [(float(sums.sum()), int(counts.sum())) for sums, counts in parts]


class _RoundRobin:
    """Round-robin dispatcher of requests to workers, so that which worker has which does not depend on their speed.

    Requests of one prompt that follow each other go to one worker, whose prefix cache has the prompt then: some of them, lest a
    single prompt keep the others idle.
    """

    def __init__(self, requests: Iterable[Request], num_workers: int) -> None:
        self._requests = iter(requests)
        self._lock = Lock()
        self._queues: list[deque[Request]] = [deque() for _ in range(num_workers)]
        self._next, self._run = 0, 0
        self._last: Request | None = None
        self.num_workers = num_workers

    def of_worker(self, number: int) -> Iterator[Request]:
        """The requests of one worker."""
        mine = self._queues[number]
        while True:
            with self._lock:
                while not mine:
                    request = next(self._requests, None)
                    if request is None:
                        return
                    last, self._last = self._last, request
                    same = last is not None and (last.messages, last.prompt_ids) == (request.messages, request.prompt_ids)
                    self._run = self._run + 1 if same and self._run < MAX_RUN else 1
                    if last is not None and self._run == 1:
                        self._next = (self._next + 1) % self.num_workers
                    self._queues[self._next].append(request)
                request = mine.popleft()
            yield request


def _in_dtype(model: Transformer, dtype: torch.dtype, own: bool) -> Transformer:
    """The model itself where its matrices and activations have this type or it is owned, else a copy; norms keep theirs."""
    if model.embedding.dtype == dtype and model.compute_dtype == dtype:
        return model
    converted = (model if own else copy.deepcopy(model)).requires_grad_(False)
    convert_matrices(converted, dtype)
    return converted


def convert_matrices(model: Transformer, dtype: torch.dtype) -> None:
    """Give a model matrices and activations of a type. On a CPU they lie on large pages, as those that are loaded do: few rows are
    multiplied as fast as matrices are read.
    """
    arena = Arena()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = arena.keep(parameter.data.to(dtype))
    model.compute_dtype = dtype


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
