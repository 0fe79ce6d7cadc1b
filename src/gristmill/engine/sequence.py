"""State of requests and sequences, and the batch's arrays with a slot for each running sequence.

Shapes: S slots, L positions, B blocks of a sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from gristmill.engine.block_manager import BLOCK_SIZE, ROOT
from gristmill.engine.grammar import GrammarMatcher
from gristmill.engine.lora import LoadedAdapter
from gristmill.engine.thinking import ThinkingBudget
from gristmill.generation.api import Completion, Request

# Columns of `BatchState.ints`.
PROMPT, LIMIT, TOP_K = range(3)
# Columns of `BatchState.floats`.
TEMPERATURE, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY = range(6)

# sample, token, its log-probability, whether it is the last, top log-probabilities if asked for
TokenListener = Callable[[int, int, float, bool, tuple[tuple[int, float], ...]], None]


@dataclass(eq=False)
class RequestState:
    """A request in the engine, and its completions as they finish.

    Attributes:
        prompt_ids: token ids.
        max_tokens: of a response.
        rank: the lowest goes first; the scheduler sets it.
        arrival: of requests of one rank the earliest goes first.
        completions: of the samples that are done.
        num_unfinished: samples that are not done.
        num_waiting: samples that have no slot.
        listener: streaming callback: hears every token once, as it is sampled.
        error: why it has no completions.
        logit_bias: tokens and what is added to their logits.
        adapter: that changes the model for it, even if it has been unloaded since.
    """

    request: Request
    prompt_ids: np.ndarray
    max_tokens: int
    arrival: int = 0
    rank: int = 0
    num_waiting: int = 0
    listener: TokenListener | None = None
    cancelled: bool = False
    error: Exception | None = None
    logit_bias: tuple[Tensor, Tensor] | None = None
    adapter: LoadedAdapter | None = None

    @property
    def root(self) -> int:
        """The prefix before its first block."""
        return ROOT if self.adapter is None else self.adapter.root

    def __post_init__(self) -> None:
        self.num_unfinished = self.request.sampling.n
        self.completions: list[Completion | None] = [None] * self.num_unfinished


@dataclass(eq=False)
class Sequence:
    """One sample of a request, waiting or in a slot.

    Attributes:
        slot: -1 while it waits.
        length: tokens of prompt and response so far.
        block_ids: of its positions, in order.
        num_computed: positions whose keys and values are in the blocks.
        num_registered: blocks that are in the prefix cache, the last of which has the prefix id `prefix_id`.
        stale: its blocks hold what former weights made of its tokens, and shall not be registered.
        siblings: samples of the same prompt that fork when its prefill ends, each with a slot of its own.
        matcher: where it stands in its grammar, if it has one.
        thinking: where it stands in its thinking, if that has a budget.
        forced: places in the response of tokens that were forced.
        top_logprobs: of each token sampled, if asked for.
        max_draft: most tokens of its next draft; 0 until there was one.
        saved_tokens, saved_logprobs: prompt and response, and the response's log-probabilities, when it was preempted.
    """

    state: RequestState
    sample: int
    slot: int = -1
    length: int = 0
    block_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_registered: int = 0
    prefix_id: int = ROOT
    stale: bool = False
    siblings: list["Sequence"] = field(default_factory=list)
    matcher: GrammarMatcher | None = None
    thinking: ThinkingBudget | None = None
    forced: list[int] = field(default_factory=list)
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    max_draft: int = 0
    saved_tokens: np.ndarray | None = None
    saved_logprobs: np.ndarray | None = None

    @property
    def order(self) -> tuple[int, int, int]:
        """Scheduling order: rank, then arrival."""
        return self.state.rank, self.state.arrival, self.sample


class BatchState:
    """Persistent batch: arrays that every step reads, a row for each slot. Memory pages that no token has reached are never touched."""

    def __init__(self, num_slots: int, max_positions: int) -> None:
        self.num_slots = num_slots
        self.token_ids = np.empty((num_slots, max_positions), np.int32)
        self.logprobs = np.empty((num_slots, max_positions), np.float32)
        self.block_tables = np.zeros((num_slots, -(-max_positions // BLOCK_SIZE)), np.int32)
        self.ints = np.zeros((num_slots, 3), np.int64)
        self.floats = np.zeros((num_slots, 6), np.float32)
        self.rng_keys = np.zeros(num_slots, np.int64)
        self.free_slots = list(range(num_slots - 1, -1, -1))
