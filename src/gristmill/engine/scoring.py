"""Log-likelihood scoring: log-probabilities of continuations of given contexts, with whatever the texts begin with in common read once.

Texts are taken in the order of their token ids, so that neighbours share the longest prefixes, and pass through the paged cache with its
prefix cache: blocks that an earlier text of the order has filled are not computed again. Several continuations of one token of the same
context are one row of logits.

Shapes: R rows of logits, V vocabulary, C continuations that read a row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from threading import Event

import numpy as np
import torch

from gristmill.engine.block_manager import BLOCK_SIZE, BlockManager
from gristmill.engine.layers import Decoder
from gristmill.engine.model_runner import ModelRunner
from gristmill.engine.scheduler import SchedulerOutput
from gristmill.engine.sequence import BatchState, RequestState
from gristmill.engine.sequence import Sequence as Slotted
from gristmill.generation.api import Request

NUM_SLOTS = 256  # texts of one forward pass
MAX_STEP_TOKENS = 2048
MAX_LOGIT_ELEMENTS = 16 * 2**20  # held at once


@dataclass(frozen=True)
class Continuation:
    """Token ids of a context and its continuation, the last `num_tokens` of which are scored."""

    ids: Sequence[int] | np.ndarray
    num_tokens: int


@dataclass(frozen=True)
class Scored:
    """Log-likelihood of a continuation: the sum of its tokens' log-probabilities (nats), and whether each is the likeliest."""

    index: int
    logprob: float
    greedy: bool


@dataclass
class _Text:
    """Input ids that one or several continuations read: all but the last id of each, which is only predicted."""

    key: bytes  # big-endian, so that bytes compare as ids do
    members: list[int] = field(default_factory=list)
    num_rows: int = 0  # of logits that any member reads, at the end
    slotted: Slotted | None = None
    logprobs: list[list[float]] = field(default_factory=list)
    greedy: list[list[bool]] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.key) // 4


def by_prefix(items: Sequence[Continuation]) -> list[_Text]:
    """Distinct input texts of continuations, sorted so that those with a common beginning are neighbours."""
    texts: dict[bytes, _Text] = {}
    for index, item in enumerate(items):
        assert 0 < item.num_tokens < len(item.ids), "a continuation has tokens, and something before it"
        key = np.asarray(item.ids[:-1], ">i4").tobytes()
        text = texts.setdefault(key, _Text(key))
        text.members.append(index)
        text.num_rows = max(text.num_rows, item.num_tokens)
    return [texts[key] for key in sorted(texts)]


class PrefixScorer:
    """Scorer of one worker: a model runner over a cache of its own, without a queue, as nothing is sampled.

    Args:
        decoder: may be shared with other workers.
        cache_dtype: of keys and values.
        max_length: tokens of the longest text.
        step_tokens: most tokens of a forward pass.
    """

    def __init__(self, decoder: Decoder, cache_dtype: torch.dtype, max_length: int, *, step_tokens: int | None = None) -> None:
        self.step_tokens = step_tokens or MAX_STEP_TOKENS
        self.max_rows = max(1, MAX_LOGIT_ELEMENTS // decoder.config.vocab_size)
        self.batch_state = BatchState(NUM_SLOTS, max_length)
        self.runner = ModelRunner(decoder, self.batch_state, cache_dtype)
        # one text before the step and those of the step; an unused block stays cached as long as nobody needs it
        num_blocks = 2 * -(-max_length // BLOCK_SIZE) + self.step_tokens // BLOCK_SIZE + NUM_SLOTS
        self.block_manager = BlockManager(num_blocks)
        self.runner.kv_cache.allocate(num_blocks + 1)
        self.num_computed = 0

    @torch.inference_mode()
    def score(self, items: Sequence[Continuation], texts: Sequence[_Text], stop: Event | None = None) -> Iterator[Scored]:
        """Score the continuations of some texts, in order; those of a text are given as its last forward pass ends."""
        waiting = list(reversed(texts))
        under_way: _Text | None = None
        while (waiting or under_way) and not (stop and stop.is_set()):
            step = SchedulerOutput()
            taken: list[tuple[_Text, int]] = []
            tokens, rows = self.step_tokens, self.max_rows
            while tokens > 0 and rows > 0 and len(taken) < NUM_SLOTS and (under_way or waiting):
                text = under_way or waiting.pop()
                if text.slotted is None:
                    self._begin(text)
                count, num_rows = self._schedule(step, text, tokens, rows)
                tokens, rows = tokens - count, rows - num_rows
                if count:
                    taken.append((text, num_rows))
                slotted = text.slotted
                assert slotted is not None
                under_way = text if slotted.num_computed < text.length else None
                if under_way:
                    break
            assert taken, "a single text always has room"
            self._read(items, taken, self.runner.run(step))
            for text, _ in taken:
                if text is not under_way:
                    yield from self._end(items, text)

    def _begin(self, text: _Text) -> None:
        """Give a text a slot, and the cached blocks of its prefix, as far as no logits are read from them."""
        state = RequestState(Request("", ()), np.frombuffer(text.key, ">i4").astype(np.int32), 1)
        slotted = text.slotted = Slotted(state, 0, slot=self.batch_state.free_slots.pop(), length=text.length)
        self.batch_state.token_ids[slotted.slot, : text.length] = state.prompt_ids
        for begin in range(0, text.length - text.num_rows - BLOCK_SIZE + 1, BLOCK_SIZE):
            hit = self.block_manager.lookup(slotted.prefix_id, state.prompt_ids[begin : begin + BLOCK_SIZE].tobytes())
            if hit is None:
                break
            self.block_manager.share(hit[0])
            self._append(slotted, hit[0])
            slotted.prefix_id = hit[1]
            slotted.num_registered += 1
            slotted.num_computed += BLOCK_SIZE

    def _append(self, slotted: Slotted, block: int) -> None:
        self.batch_state.block_tables[slotted.slot, len(slotted.block_ids)] = block
        slotted.block_ids.append(block)

    def _schedule(self, step: SchedulerOutput, text: _Text, tokens: int, rows: int) -> tuple[int, int]:
        """Schedule as much of a text as there is room for; how many tokens, and rows of logits."""
        slotted = text.slotted
        assert slotted is not None
        start, first_row = slotted.num_computed, text.length - text.num_rows
        stop = min(text.length, start + tokens, max(start, first_row) + rows)
        while len(slotted.block_ids) * BLOCK_SIZE < stop:
            block = self.block_manager.allocate()
            if block is None:
                stop = len(slotted.block_ids) * BLOCK_SIZE
                break
            self._append(slotted, block)
        if stop <= start:
            return 0, 0
        num_rows = max(0, stop - max(start, first_row))
        if num_rows:
            step.sample_rows.append(len(step.sequences))
            step.sample_sequences.append(slotted)
        step.sequences.append(slotted)
        step.starts.append(start)
        step.num_tokens.append(stop - start)
        step.num_drafts.append(max(0, num_rows - 1))
        slotted.num_computed = stop
        self.num_computed += stop - start
        prompt = slotted.state.prompt_ids
        while (slotted.num_registered + 1) * BLOCK_SIZE <= stop:  # later texts of the step may read them: keys come before attention
            begin = slotted.num_registered * BLOCK_SIZE
            block = slotted.block_ids[slotted.num_registered]
            slotted.prefix_id = self.block_manager.register(block, slotted.prefix_id, prompt[begin : begin + BLOCK_SIZE].tobytes())
            slotted.num_registered += 1
        return stop - start, num_rows

    def _read(self, items: Sequence[Continuation], taken: list[tuple[_Text, int]], logits_RV: torch.Tensor) -> None:
        """Read the log-probabilities that a step's rows give to the continuations' tokens."""
        wanted: list[tuple[_Text, int, int, int]] = []  # text, place among its members, row, token
        row = 0
        for text, num_rows in taken:
            assert text.slotted is not None
            if not text.logprobs:
                text.logprobs, text.greedy = [[] for _ in text.members], [[] for _ in text.members]
            first = text.slotted.num_computed - num_rows  # position of the first of these rows
            for place, member in enumerate(text.members):
                item = items[member]
                begin = text.length - item.num_tokens
                for position in range(max(first, begin), first + num_rows):
                    wanted.append((text, place, row + position - first, int(item.ids[position + 1])))
            row += num_rows
        if not wanted:
            return
        assert row == len(logits_RV), "as many rows as were asked for"
        device = logits_RV.device
        total_R, best_R = logits_RV.logsumexp(-1), logits_RV.argmax(-1)
        row_C = torch.tensor([w[2] for w in wanted], device=device)
        token_C = torch.tensor([w[3] for w in wanted], device=device)
        logprobs = (logits_RV[row_C, token_C] - total_R[row_C]).tolist()
        greedy = (best_R[row_C] == token_C).tolist()
        for (text, place, _, _), logprob, best in zip(wanted, logprobs, greedy, strict=True):
            text.logprobs[place].append(logprob)
            text.greedy[place].append(best)

    def _end(self, items: Sequence[Continuation], text: _Text) -> Iterator[Scored]:
        slotted, text.slotted = text.slotted, None
        assert slotted is not None
        self.block_manager.release(slotted.block_ids)
        self.batch_state.free_slots.append(slotted.slot)
        for member, logprobs, greedy in zip(text.members, text.logprobs, text.greedy, strict=True):
            assert len(logprobs) == items[member].num_tokens
            yield Scored(member, sum(logprobs), all(greedy))


def shares(texts: Sequence[_Text], count: int) -> list[Sequence[_Text]]:
    """Contiguous shares of sorted texts for so many workers, of about as many tokens each."""
    if not texts:
        return [[]] * count
    ends = np.cumsum([text.length for text in texts])
    cuts = [0, *(int(np.searchsorted(ends, ends[-1] * i / count)) for i in range(1, count)), len(texts)]
    return [texts[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
