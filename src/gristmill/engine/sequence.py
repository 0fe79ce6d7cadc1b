"""A request on its way, and the responses in flight, one slot each.

Shapes: S slots, L positions, B pages of a sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from gristmill.engine.block_manager import PAGE_SIZE, ROOT
from gristmill.engine.grammar import Matcher
from gristmill.generation.api import Completion, Request

# Columns of `Slots.ints`.
PROMPT, LIMIT, TOP_K = range(3)
# Columns of `Slots.floats`.
TEMPERATURE, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY = range(6)

# sample, token, its log-probability, whether it is the last, the likeliest if asked for
Listener = Callable[[int, int, float, bool, tuple[tuple[int, float], ...]], None]


@dataclass(eq=False)
class Job:
    """A request: `open` of its samples are not done.

    Attributes:
        prompt: token ids.
        limit: most tokens of a response.
        arrival: of requests of one priority the earliest goes first.
        waiting: samples that have no slot.
        listener: hears every token as it is drawn.
        error: why it has no completions.
        bias: tokens and what is added to their logits.
    """

    request: Request
    prompt: np.ndarray
    limit: int
    completions: list[Completion | None]
    open: int
    arrival: int = 0
    waiting: int = 0
    listener: Listener | None = None
    cancelled: bool = False
    error: Exception | None = None
    bias: tuple[Tensor, Tensor] | None = None


@dataclass(eq=False)
class Sequence:
    """One response, waiting or in a slot.

    Attributes:
        slot: -1 while it waits.
        length: tokens of prompt and response so far.
        pages: of its positions, in order.
        computed: positions whose keys and values are in the pages.
        named: pages that are known by their content, the last of which has the content `content`.
        stale: its pages hold what former weights made of its tokens, and shall not be known by them.
        twins: responses to the same prompt that begin when its prompt has been read, each with a slot of its own.
        matcher: where it stands in its grammar, if it has one.
        top_logprobs: of each token drawn, if asked for.
        tokens, logprobs: what it had generated when it was sent back to wait.
    """

    job: Job
    sample: int
    slot: int = -1
    length: int = 0
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    named: int = 0
    content: int = ROOT
    stale: bool = False
    twins: list["Sequence"] = field(default_factory=list)
    matcher: Matcher | None = None
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    tokens: np.ndarray | None = None
    logprobs: np.ndarray | None = None

    @property
    def order(self) -> tuple[int, int, int]:
        """Who goes first."""
        return -self.job.request.priority, self.job.arrival, self.sample


class Slots:
    """What every step reads, a row for each response in flight. Pages of memory that no token has reached are never touched."""

    def __init__(self, count: int, longest: int) -> None:
        self.count = count
        self.tokens = np.empty((count, longest), np.int32)
        self.logprobs = np.empty((count, longest), np.float32)
        self.table = np.zeros((count, -(-longest // PAGE_SIZE)), np.int32)
        self.ints = np.zeros((count, 3), np.int64)
        self.floats = np.zeros((count, 6), np.float32)
        self.keys = np.zeros(count, np.int64)
        self.free = list(range(count - 1, -1, -1))
