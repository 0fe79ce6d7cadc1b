"""One worker of the engine: its own slots, pages and schedule over shared weights, one step after the other."""

import os
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from gristmill.core.errors import InputError
from gristmill.engine.block_manager import PAGE_SIZE, Pages
from gristmill.engine.grammar import Constraints
from gristmill.engine.layers import Decoder
from gristmill.engine.model_runner import Runner
from gristmill.engine.sampler import Needs, choose, uniforms
from gristmill.engine.scheduler import Scheduler
from gristmill.engine.sequence import FREQUENCY, LIMIT, MIN_P, PRESENCE, PROMPT, REPETITION, TEMPERATURE, TOP_K, TOP_P, Job, Sequence, Slots
from gristmill.generation.api import Completion, Finish

STEP_TOKENS = 2048
MEMORY_SHARE = 0.25  # of the machine's memory (of what is free on a GPU: .8), for the pages of all workers

Text = Callable[[list[int]], str]


class Core:
    """Responses in flight.

    Args:
        decoder: what computes.
        max_rows: most responses in flight.
        stop_V: tokens that end a response.
        text: of a response's token ids.
        plain: of any, in which stop strings are looked for.
        cache_tokens: positions that fit into the cache; None for as many as `max_rows` responses can take, memory permitting.
        workers: that share the machine.
        step_tokens: most tokens of a forward pass.
        constraints: makes what requests with a grammar need.

    Attributes:
        prompt_tokens, output_tokens: computed and drawn so far.
    """

    def __init__(
        self,
        decoder: Decoder,
        max_rows: int,
        stop_V: np.ndarray,
        text: Text,
        plain: Text,
        cache_tokens: int | None,
        cache_dtype: torch.dtype,
        workers: int = 1,
        step_tokens: int = STEP_TOKENS,
        constraints: Callable[[], Constraints] | None = None,
    ) -> None:
        longest = decoder.config.max_positions
        self.slots = Slots(max_rows, longest)
        self.runner = Runner(decoder, self.slots, cache_dtype)
        count = -(-longest // PAGE_SIZE) * max_rows if cache_tokens is None else max(1, cache_tokens // PAGE_SIZE)
        if cache_tokens is None:
            count = min(count, max(1, int(_memory(self.runner.device) / workers / self.runner.pool.bytes_per_page)))
        self.pages = Pages(count)
        self.scheduler = Scheduler(self.slots, self.pages, max(step_tokens, max_rows))
        self.stop_V, self.text, self.plain, self.constraints = stop_V, text, plain, constraints
        self.finished: list[Job] = []
        self.prompt_tokens = self.output_tokens = 0
        self._allocated = False

    @property
    def idle(self) -> bool:
        return self.scheduler.idle

    def add(self, job: Job) -> None:
        """As `Scheduler.add`."""
        self.scheduler.add(job)

    def cancel(self, job: Job) -> None:
        self.scheduler.cancel(job)

    def refresh(self) -> None:
        """The decoder's weights are others now. What responses in flight have computed stays; no new one builds on it."""
        self.runner.forget()
        self.pages.forget_all()
        for sequence in self.scheduler.running:
            sequence.stale = True

    def take_finished(self) -> list[Job]:
        """Requests whose samples are all done, or that failed, since the last call."""
        finished, self.finished = self.finished, []
        return finished

    @torch.inference_mode()
    def step(self) -> None:
        """One forward pass, and one token more for everyone whose turn it was."""
        if not self._allocated:
            self.runner.allocate(self.pages.count)
            self._allocated = True
        step = self.scheduler.schedule()
        if not step.sequences:
            return
        if copies := self.scheduler.copies:
            self.runner.pool.copy(copies)
            self.scheduler.copies = []
        logits_RV = self.runner.run(step)
        self.prompt_tokens += sum(step.counts[step.decoding :])
        self.scheduler.take_twins(step)
        heirs = step.heirs
        if any(heir.slot < 0 for heir in heirs):  # sent back before its first token
            kept = [i for i, heir in enumerate(heirs) if heir.slot >= 0]
            heirs, logits_RV = [heirs[i] for i in kept], logits_RV[torch.tensor(kept, device=logits_RV.device)]
        if heirs:
            self._draw(heirs, logits_RV)

    def _draw(self, heirs: list[Sequence], logits_RV: Tensor) -> None:
        slots, device = self.slots, logits_RV.device
        slot_R = np.array([heir.slot for heir in heirs])
        length_R = np.array([heir.length for heir in heirs])
        ints, floats = slots.ints[slot_R], slots.floats[slot_R]
        needs = Needs.of(floats[:, TEMPERATURE], floats[:, TOP_P], ints[:, TOP_K], floats[:, MIN_P])
        put = lambda array: torch.from_numpy(np.ascontiguousarray(array)).to(device)  # noqa: E731
        u_R = uniforms(put(slots.keys[slot_R]), put(length_R - ints[:, PROMPT]))
        tokens, logprobs = choose(
            logits_RV,
            u_R,
            put(floats[:, TEMPERATURE]),
            put(floats[:, TOP_P]),
            put(ints[:, TOP_K]),
            put(floats[:, MIN_P]),
            needs,
            self._adjusted(heirs, floats, logits_RV),
        )
        token_R, logprob_R = tokens.cpu().numpy(), logprobs.cpu().numpy()
        slots.tokens[slot_R, length_R] = token_R
        slots.logprobs[slot_R, length_R] = logprob_R
        stopped_R = self.stop_V[token_R]
        done_R = stopped_R | (length_R + 1 >= ints[:, LIMIT])
        self.output_tokens += len(heirs)
        self._note_likeliest(heirs, logits_RV)
        for i, heir in enumerate(heirs):
            heir.length += 1
            job = heir.job
            if job.cancelled:  # with a sample before this one
                continue
            if heir.matcher is not None and (words := heir.matcher.add(int(token_R[i]))):
                self._fail(job, InputError(f"the grammar gave up: {words}"))
                continue
            sampling = job.request.sampling
            stopped = bool(stopped_R[i]) or (bool(sampling.stop_tokens) and int(token_R[i]) in sampling.stop_tokens)
            cut = self._stop_string(heir) if sampling.stop else None
            done = stopped or bool(done_R[i]) or cut is not None
            if job.listener is not None:
                likeliest = heir.top_logprobs[-1] if heir.top_logprobs else ()
                job.listener(heir.sample, int(token_R[i]), float(logprob_R[i]), done, likeliest)
            if done:
                self._complete(heir, stopped, cut)

    def _note_likeliest(self, heirs: list[Sequence], logits_RV: Tensor) -> None:
        for i, heir in enumerate(heirs):
            if count := heir.job.request.sampling.top_logprobs:
                best = torch.log_softmax(logits_RV[i], -1).topk(min(count, logits_RV.shape[1]))
                heir.top_logprobs.append(tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)))

    def _adjusted(self, heirs: list[Sequence], floats: np.ndarray, logits_RV: Tensor) -> Tensor | None:
        """The logits with penalties, biases and what grammars forbid, or None if nobody has any."""
        penalised = (floats[:, REPETITION] != 1) | (floats[:, PRESENCE] != 0) | (floats[:, FREQUENCY] != 0)
        biased = [bool(heir.job.request.sampling.logit_bias) for heir in heirs]
        for heir in heirs:
            if heir.matcher is None and (grammar := heir.job.request.sampling.grammar):
                assert self.constraints is not None
                heir.matcher = self.constraints().begin(grammar)
        if not penalised.any() and not any(biased) and all(heir.matcher is None for heir in heirs):
            return None
        out_RV = logits_RV.clone()
        for i, heir in enumerate(heirs):
            row_V, sampling = out_RV[i], heir.job.request.sampling
            if penalised[i]:
                tokens = self.slots.tokens[heir.slot, : heir.length]
                seen = torch.from_numpy(np.unique(tokens).astype(np.int64)).to(row_V.device)
                there = row_V[seen]
                row_V[seen] = torch.where(there > 0, there / sampling.repetition_penalty, there * sampling.repetition_penalty)
                drawn, counts = np.unique(tokens[len(heir.job.prompt) :], return_counts=True)
                less = sampling.presence_penalty + sampling.frequency_penalty * counts
                row_V[torch.from_numpy(drawn.astype(np.int64)).to(row_V.device)] -= torch.from_numpy(less).to(row_V)
            if sampling.logit_bias:
                if heir.job.bias is None:
                    tokens_B, values_B = zip(*dict(sampling.logit_bias).items(), strict=True)
                    heir.job.bias = torch.tensor(tokens_B, device=row_V.device), torch.tensor(values_B, device=row_V.device)
                row_V.index_add_(0, heir.job.bias[0], heir.job.bias[1].to(row_V.dtype))
            if heir.matcher is not None and (allowed := heir.matcher.allowed()) is not None:
                row_V[torch.from_numpy(~allowed).to(row_V.device)] = float("-inf")
        return out_RV

    def _stop_string(self, sequence: Sequence) -> int | None:
        """Characters before the first stop string in the response, or None. Looks back only as far as a new token can complete one."""
        stop = sequence.job.request.sampling.stop
        start = len(sequence.job.prompt)
        drawn = self.slots.tokens[sequence.slot, start : sequence.length]
        end = self.plain(drawn[-max(len(s.encode()) for s in stop) - 8 :].tolist())  # a token holds a byte at least
        if not any(s in end for s in stop):
            return None
        text = self.plain(drawn.tolist())
        found = [place for s in stop if (place := text.find(s)) >= 0]
        return min(found) if found else None

    def _fail(self, job: Job, error: Exception) -> None:
        job.error = error
        self.scheduler.cancel(job)
        self.finished.append(job)

    def _complete(self, sequence: Sequence, stopped: bool, cut: int | None) -> None:
        job, slots = sequence.job, self.slots
        start, length = len(job.prompt), sequence.length
        tokens = slots.tokens[sequence.slot, start:length].tolist()
        logprobs = tuple(slots.logprobs[sequence.slot, start:length].tolist())
        finish: Finish = "stop" if stopped or cut is not None else "length"
        text = self.text(tokens[:-1] if stopped else tokens) if cut is None else self.plain(tokens)[:cut]
        completion = Completion(text, length - start, logprobs, finish, tuple(tokens), tuple(sequence.top_logprobs))
        job.completions[sequence.sample] = completion
        self.scheduler.retire(sequence)
        job.open -= 1
        if not job.open:
            self.finished.append(job)


def _memory(device: torch.device) -> float:
    """Bytes that the pages of all workers may take."""
    if device.type == "cuda":
        return 0.8 * float(torch.cuda.mem_get_info(device)[0])
    try:
        return MEMORY_SHARE * float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError) as e:
        raise InputError("The machine's memory is unknown: say how much the cache may hold (cache_tokens).") from e
