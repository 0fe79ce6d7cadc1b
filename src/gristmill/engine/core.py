"""Engine core: one worker's batch, block manager and scheduler over shared weights; a step schedules, runs the model and samples."""

import os
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from gristmill.core.device import current_device, free_memory, put
from gristmill.core.errors import InputError
from gristmill.engine.block_manager import BLOCK_SIZE, BlockManager
from gristmill.engine.grammar import GrammarBackend
from gristmill.engine.layers import Decoder
from gristmill.engine.model_runner import ModelRunner
from gristmill.engine.sampler import SamplingMetadata, penalise, sample, uniforms
from gristmill.engine.scheduler import Scheduler
from gristmill.engine.sequence import (
    FREQUENCY,
    LIMIT,
    MIN_P,
    PRESENCE,
    PROMPT,
    REPETITION,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    BatchState,
    RequestState,
    Sequence,
)
from gristmill.engine.speculative import SpeculativeConfig
from gristmill.engine.thinking import TAIL, ThinkingBudget, ThinkingTags
from gristmill.engine.token_budget import GPU_STEP_SECONDS, TokenBudget
from gristmill.generation.api import Completion, Finish

MAX_BATCHED_TOKENS = 2048
CPU_CACHE_FRACTION = 0.25  # of the machine's memory, for the KV caches of all workers
GPU_CACHE_FRACTION = 0.8  # of the GPU's free memory

TopLogprobs = tuple[tuple[int, float], ...]
Detokenize = Callable[[list[int], bool], str]


class Core:
    """Continuous-batching loop of one worker.

    Args:
        decoder: the model's layers, shared between workers.
        max_batch: sequences that may run at once.
        stop_V: bool, tokens that end a response.
        response_text: text of a response's token ids, and whether it goes on with another.
        decode: the same of any token ids, in which stop strings are looked for.
        cache_tokens: positions that fit into the cache; None for as many as `max_batch` responses can take, memory permitting.
        cache_dtype: of keys and values.
        num_workers: that share the machine.
        max_batched_tokens: of a forward pass; None for what gives the most tokens a second, and less where somebody waits for each.
        grammar_backend: gives what requests with a grammar need.
        max_loras: adapters of a step.
        interactive: somebody waits for every token: steps stay short (`TokenBudget`), and short prompts go before long ones.
        speculative: how tokens are drafted; None: they are not.
        thinking_tags: of the model's thinking, for requests that give it a budget.

    Attributes:
        prompt_tokens, output_tokens: computed and sampled so far.
        draft_tokens, accepted_tokens: drafted so far, and how many of those were what was sampled.
    """

    def __init__(
        self,
        decoder: Decoder,
        max_batch: int,
        stop_V: np.ndarray,
        *,
        response_text: Detokenize,
        decode: Detokenize,
        cache_tokens: int | None,
        cache_dtype: torch.dtype,
        num_workers: int = 1,
        max_batched_tokens: int | None = None,
        grammar_backend: Callable[[], GrammarBackend] | None = None,
        max_loras: int = 8,
        interactive: bool = False,
        speculative: SpeculativeConfig | None = None,
        thinking_tags: ThinkingTags | None = None,
    ) -> None:
        max_positions = decoder.config.max_positions
        self.batch_state = BatchState(max_batch, max_positions)
        self.model_runner = ModelRunner(decoder, self.batch_state, cache_dtype)
        num_blocks = -(-max_positions // BLOCK_SIZE) * max_batch if cache_tokens is None else max(1, cache_tokens // BLOCK_SIZE)
        if cache_tokens is None:
            memory = _cache_memory(self.model_runner.device) / num_workers
            num_blocks = min(num_blocks, max(1, int(memory / self.model_runner.kv_cache.bytes_per_block)))
        self.block_manager = BlockManager(num_blocks)
        on_gpu = self.model_runner.device.type != "cpu"
        self.scheduler = Scheduler(
            self.batch_state,
            self.block_manager,
            max_batched_tokens or max(MAX_BATCHED_TOKENS, max_batch),
            max_loras=max_loras,
            token_budget=TokenBudget(GPU_STEP_SECONDS if on_gpu else 0.0) if interactive and max_batched_tokens is None else None,
            by_age=interactive,
            speculative=speculative,
        )
        self.stop_V, self.response_text, self.decode, self.grammar_backend = stop_V, response_text, decode, grammar_backend
        self.thinking_tags = thinking_tags
        self.finished: list[RequestState] = []
        self.prompt_tokens = self.output_tokens = self.draft_tokens = self.accepted_tokens = 0
        # On a CPU the time of this thread's own work: what neighbours take is not the step's, and would be read as the price of its tokens.
        self.clock = time.perf_counter if on_gpu else time.thread_time
        self._allocated = False

    @property
    def idle(self) -> bool:
        return self.scheduler.idle

    def add(self, state: RequestState) -> None:
        """Add a request, as `Scheduler.add`."""
        self.scheduler.add(state)

    def cancel(self, state: RequestState) -> None:
        """Abort a request."""
        self.scheduler.cancel(state)

    def refresh(self) -> None:
        """Weight update: the decoder's weights are others now. What running sequences have computed stays; no new one builds on it."""
        self.model_runner.reset_graphs()
        self.block_manager.reset_prefix_cache()
        for sequence in self.scheduler.running:
            sequence.stale = True

    def take_finished(self) -> list[RequestState]:
        """Requests whose samples are all done, or that failed, since the last call."""
        finished, self.finished = self.finished, []
        return finished

    def release(self) -> None:
        """Let go of the cache and of recorded graphs, when there is nothing more to compute: another core may want their memory."""
        self.model_runner.release()

    def step(self) -> None:
        """One forward pass, and a token more for every sequence whose turn it was, or several where its draft was right."""
        with current_device(self.model_runner.device), torch.inference_mode():
            self._step()

    def start(self) -> None:
        """Make room for the cache and record graphs, which else the first step does."""
        if not self._allocated:
            with current_device(self.model_runner.device), torch.inference_mode():
                self.model_runner.allocate_kv_cache(self.block_manager.num_blocks)
            self._allocated = True

    def _step(self) -> None:
        self.start()
        started = self.clock()
        step = self.scheduler.schedule()
        if not step.sequences:
            return
        if copies := self.scheduler.block_copies:
            self.model_runner.kv_cache.copy(copies)
            self.scheduler.block_copies = []
        logits_RV = self.model_runner.run(step)
        num_decoded = step.num_decoded_tokens
        num_prompt = sum(step.num_tokens) - num_decoded
        self.prompt_tokens += num_prompt
        self.scheduler.fork_siblings(step)
        drafts = [step.num_drafts[place] for place in step.sample_rows]
        rows = step.sample_sequences
        if step.num_drafted:
            rows = [sequence for sequence, count in zip(rows, drafts, strict=True) for _ in range(1 + count)]
        if any(sequence.slot < 0 for sequence in rows):  # preempted before its first token, when it has no draft
            kept = [i for i, sequence in enumerate(rows) if sequence.slot >= 0]
            rows, logits_RV = [rows[i] for i in kept], logits_RV[put(np.array(kept, np.int64), logits_RV.device)]
            drafts = [count for sequence, count in zip(step.sample_sequences, drafts, strict=True) if sequence.slot >= 0]
        if rows:
            self._sample(rows, drafts, logits_RV)
        if self.scheduler.token_budget is not None:
            self.scheduler.token_budget.observe(num_decoded, num_prompt, self.clock() - started)

    def _sample(self, rows: list[Sequence], drafts: list[int], logits_RV: Tensor) -> None:
        """Sample a token for each row, and give each sequence those of its rows up to the first that its draft does not have.

        Args:
            rows: sequences, each one as often as it has draft tokens, and once more.
            drafts: number of draft tokens of each sequence.
        """
        batch, device = self.batch_state, logits_RV.device
        slot_R = np.array([sequence.slot for sequence in rows])
        length_R = np.array([sequence.length for sequence in rows])
        if len(drafts) < len(rows):
            length_R += np.concatenate([np.arange(1 + count) for count in drafts])
        ints, floats = batch.ints[slot_R], batch.floats[slot_R]
        metadata = SamplingMetadata.of(floats[:, TEMPERATURE], floats[:, TOP_P], ints[:, TOP_K], min_p_B=floats[:, MIN_P])
        on_device = lambda array: put(np.ascontiguousarray(array), device)  # noqa: E731
        tokens, logprobs = sample(
            logits_RV,
            uniforms(on_device(batch.rng_keys[slot_R]), on_device(length_R - ints[:, PROMPT])),
            on_device(floats[:, TEMPERATURE]),
            top_p_B=on_device(floats[:, TOP_P]),
            top_k_B=on_device(ints[:, TOP_K]),
            min_p_B=on_device(floats[:, MIN_P]),
            metadata=metadata,
            processed_BV=self._process_logits(rows, floats, logits_RV),
        )
        if device.type == "cuda":  # one wait for both
            tokens, logprobs = torch.stack([tokens.double(), logprobs.double()]).cpu()
        token_R, logprob_R = tokens.cpu().numpy().astype(np.int64), logprobs.cpu().numpy().astype(np.float32)
        right_R = batch.token_ids[slot_R, length_R] == token_R  # behind a draft's last token it says nothing
        batch.token_ids[slot_R, length_R] = token_R
        batch.logprobs[slot_R, length_R] = logprob_R
        stopped_R = self.stop_V[token_R]
        done_R = stopped_R | (length_R + 1 >= ints[:, LIMIT])
        best, row = self._top_logprobs(rows, logits_RV), 0
        for count in drafts:
            sequence, last = rows[row], row + count
            accepted = -1
            for i in range(row, last + 1):
                accepted += 1
                sequence.num_computed += i > row
                self.output_tokens += 1
                if not self._append(sequence, int(token_R[i]), best.get(i), ended=bool(stopped_R[i]), full=bool(done_R[i])):
                    break
                if i < last and not right_R[i]:
                    break
            if count:
                self.draft_tokens += count
                self.accepted_tokens += accepted
                if sequence.slot >= 0:
                    self.scheduler.accept(sequence, count, accepted)
            row = last + 1

    def _append(self, sequence: Sequence, token: int, best: TopLogprobs | None, *, ended: bool, full: bool) -> bool:
        """Append a sampled token to its sequence. False if that was its last, or nobody wants it.

        Args:
            best: the likeliest tokens in its place, where they are asked for.
            ended: the token ends any response.
            full: the response may have no token more, or `ended`.
        """
        sequence.length += 1
        state, sampling = sequence.state, sequence.state.request.sampling
        if state.cancelled:  # with a sample before this one
            return False
        if best is not None:
            sequence.top_logprobs.append(best)
        if sequence.matcher is not None and (error := sequence.matcher.accept_token(token)):
            self._fail(state, InputError(f"the grammar gave up: {error}"))
            return False
        if sequence.thinking is not None:
            sequence.thinking.accept_token(token)
        stopped = ended or (bool(sampling.stop_tokens) and token in sampling.stop_tokens)
        cut = self._find_stop_string(sequence) if sampling.stop else None
        done = stopped or full or cut is not None
        if state.listener is not None:
            top_logprobs = sequence.top_logprobs[-1] if sequence.top_logprobs else ()
            logprob = float(self.batch_state.logprobs[sequence.slot, sequence.length - 1])
            state.listener(sequence.sample, token, logprob, done, top_logprobs)
        if done:
            self._finish(sequence, stopped, cut)
        return not done

    @staticmethod
    def _top_logprobs(rows: list[Sequence], logits_RV: Tensor) -> dict[int, TopLogprobs]:
        """The likeliest tokens of those rows whose requests ask for them."""
        out: dict[int, TopLogprobs] = {}
        by_count: dict[int, list[int]] = {}
        for i, sequence in enumerate(rows):
            if count := sequence.state.request.sampling.top_logprobs:
                by_count.setdefault(min(count, logits_RV.shape[1]), []).append(i)
        for count, asked in by_count.items():
            best = torch.log_softmax(logits_RV[put(np.array(asked, np.int64), logits_RV.device)], -1).topk(count)
            for i, tokens, values in zip(asked, best.indices.tolist(), best.values.tolist(), strict=True):
                out[i] = tuple(zip(tokens, values, strict=True))
        return out

    def _process_logits(self, sequences: list[Sequence], floats: np.ndarray, logits_RV: Tensor) -> Tensor | None:
        """Logits processors: penalties, biases, grammar masks and thinking budgets. None if nobody has any."""
        penalised = (floats[:, REPETITION] != 1) | (floats[:, PRESENCE] != 0) | (floats[:, FREQUENCY] != 0)
        biased = [bool(sequence.state.request.sampling.logit_bias) for sequence in sequences]
        for sequence in sequences:
            if sequence.matcher is None and (grammar := sequence.state.request.sampling.grammar):
                assert self.grammar_backend is not None
                sequence.matcher = self.grammar_backend().new_matcher(grammar)
        forced = self._forced_tokens(sequences)
        if not penalised.any() and not any(biased) and not forced and all(sequence.matcher is None for sequence in sequences):
            return None
        out_RV = logits_RV.clone()
        device = out_RV.device
        if penalised.any():
            rows = np.flatnonzero(penalised).tolist()
            penalise(out_RV, rows, [self._history(sequences[i]) for i in rows], [sequences[i].state.request.sampling for i in rows])
        masked: list[int] = []
        masks: list[np.ndarray] = []
        for i, sequence in enumerate(sequences):
            state = sequence.state
            if state.request.sampling.logit_bias:
                if state.logit_bias is None:
                    tokens_B, values_B = zip(*dict(state.request.sampling.logit_bias).items(), strict=True)
                    state.logit_bias = torch.tensor(tokens_B, device=device), torch.tensor(values_B, device=device)
                out_RV[i].index_add_(0, state.logit_bias[0], state.logit_bias[1].to(out_RV.dtype))
            if sequence.matcher is not None and (allowed_V := sequence.matcher.token_mask()) is not None:
                masked.append(i)
                masks.append(allowed_V)
        if masked:
            places = put(np.array(masked, np.int64), device)
            out_RV[places] = out_RV[places].masked_fill(~put(np.stack(masks), device), float("-inf"))
        for row, token in forced.items():
            out_RV[row] = float("-inf")
            out_RV[row, token] = 0.0
        return out_RV

    def _forced_tokens(self, sequences: list[Sequence]) -> dict[int, int]:
        """By row, the tokens that thinking at its budget's end must go on with."""
        out: dict[int, int] = {}
        for row, sequence in enumerate(sequences):
            limit, prompt = sequence.state.request.sampling.max_thinking_tokens, sequence.state.prompt_ids
            if limit is None:
                continue
            if sequence.thinking is None:
                assert self.thinking_tags is not None
                messages = sequence.state.request.messages
                begun = messages[-1].content if messages and messages[-1].role == "assistant" else ""
                sequence.thinking = ThinkingBudget(self.thinking_tags, limit, prompt[-TAIL:].tolist(), begun)
            if (token := sequence.thinking.forced_token()) is not None:
                out[row] = token
                sequence.forced.append(sequence.length - len(prompt))
        return out

    def _history(self, sequence: Sequence) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of a prompt, and of its response so far."""
        tokens = self.batch_state.token_ids[sequence.slot, : sequence.length]
        return tokens[: len(sequence.state.prompt_ids)], tokens[len(sequence.state.prompt_ids) :]

    def _find_stop_string(self, sequence: Sequence) -> int | None:
        """Characters before the first stop string in the response, or None. Looks back only as far as a new token can complete one."""
        stop = sequence.state.request.sampling.stop
        start = len(sequence.state.prompt_ids)
        tokens = self.batch_state.token_ids[sequence.slot, start : sequence.length]
        end = self.decode(tokens[-max(len(s.encode()) for s in stop) - 8 :].tolist(), True)  # a token holds a byte at least
        if not any(s in end for s in stop):
            return None
        text = self.decode(tokens.tolist(), sequence.state.request.continues_text)
        found = [place for s in stop if (place := text.find(s)) >= 0]
        return min(found) if found else None

    def _fail(self, state: RequestState, error: Exception) -> None:
        state.error = error
        self.scheduler.cancel(state)
        self.finished.append(state)

    def _finish(self, sequence: Sequence, stopped: bool, cut: int | None) -> None:
        state, batch = sequence.state, self.batch_state
        start, length = len(state.prompt_ids), sequence.length
        tokens = batch.token_ids[sequence.slot, start:length].tolist()
        logprobs = tuple(batch.logprobs[sequence.slot, start:length].tolist())
        finish: Finish = "stop" if stopped or cut is not None else "length"
        goes_on = state.request.continues_text
        said = tokens[:-1] if stopped and cut is None else tokens
        in_turn = cut is None and state.request.messages  # a continued text has no turns, nor what a format writes at their end
        text = self.response_text(said, goes_on) if in_turn else self.decode(said, goes_on)[:cut]
        top_logprobs, forced = tuple(sequence.top_logprobs), tuple(sequence.forced)
        completion = Completion(text, length - start, logprobs, finish, tuple(tokens), top_logprobs, forced=forced)
        state.completions[sequence.sample] = completion
        self.scheduler.finish(sequence)
        state.num_unfinished -= 1
        if not state.num_unfinished:
            self.finished.append(state)


def _cache_memory(device: torch.device) -> float:
    """Bytes that the KV caches of all workers may take."""
    if device.type == "cuda":
        return GPU_CACHE_FRACTION * float(free_memory(device))
    try:
        return CPU_CACHE_FRACTION * float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError) as e:
        raise InputError("The machine's memory is unknown: say how much the cache may hold (cache_tokens).") from e
