"""Adaptive rate limit of an endpoint: additive increase, multiplicative decrease of the requests in flight."""

import asyncio
from collections import deque

# The limit of a base URL shrinks when more than this share of its last answers were refusals or time-outs. Some endpoints refuse
# a few requests at random, which says nothing about load.
CONGESTED_SHARE = 0.2


class RateLimit:
    """Concurrency limit of one base URL, as TCP's congestion window: a little more after a window that went well, half after a bad one."""

    def __init__(self, max_limit: int):
        self.max_limit, self.limit = max_limit, float(max_limit)
        self.in_flight = 0
        self._again: deque[asyncio.Future[None]] = deque()
        self._fresh: deque[asyncio.Future[None]] = deque()
        self._seen = self._refused = 0

    @property
    def load(self) -> int:
        """Requests in flight or waiting for a slot."""
        return self.in_flight + len(self._again) + len(self._fresh)

    async def acquire(self, again: bool) -> None:
        """Wait for a slot; rows that were sent before go first."""
        if self.in_flight < int(self.limit) and not self._again and not self._fresh:
            self.in_flight += 1
            return
        turn = asyncio.get_running_loop().create_future()
        (self._again if again else self._fresh).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release()
            raise

    def release(self) -> None:
        """Give the slot to whoever waits next."""
        self.in_flight -= 1
        while self.in_flight < int(self.limit) and (self._again or self._fresh):
            turn = (self._again or self._fresh).popleft()
            if not turn.done():
                self.in_flight += 1
                turn.set_result(None)

    def record(self, refused: bool) -> None:
        """Count one answer, and move the limit at the end of a window."""
        self._seen += 1
        self._refused += refused
        if self._seen < max(self.limit, 8):
            return
        if self._refused > CONGESTED_SHARE * self._seen:
            self.limit = max(1.0, self.limit / 2)
        else:
            self.limit = min(float(self.max_limit), self.limit + max(1.0, self.limit / 8))
        self._seen = self._refused = 0
