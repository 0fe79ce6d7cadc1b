"""How many requests may be in flight at one base URL, and who goes next."""

import asyncio
from collections import deque

# The window of a base URL shrinks when more than this share of its last answers were refusals or time-outs. Some endpoints refuse
# a few requests at random, which says nothing about load.
CONGESTED_SHARE = 0.2


class RateLimit:
    """How many requests may be in flight at one base URL: a little more after each window that went well, half after a bad one."""

    def __init__(self, largest: int):
        self.largest, self.size = largest, float(largest)
        self.in_flight = 0
        self._again: deque[asyncio.Future[None]] = deque()
        self._fresh: deque[asyncio.Future[None]] = deque()
        self._seen = self._refused = 0

    @property
    def load(self) -> int:
        """Requests in flight or waiting for a slot."""
        return self.in_flight + len(self._again) + len(self._fresh)

    async def enter(self, again: bool) -> None:
        """Wait for a slot; rows that were sent before go first."""
        if self.in_flight < int(self.size) and not self._again and not self._fresh:
            self.in_flight += 1
            return
        turn = asyncio.get_running_loop().create_future()
        (self._again if again else self._fresh).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave()
            raise

    def leave(self) -> None:
        self.in_flight -= 1
        while self.in_flight < int(self.size) and (self._again or self._fresh):
            turn = (self._again or self._fresh).popleft()
            if not turn.done():
                self.in_flight += 1
                turn.set_result(None)

    def saw(self, refused: bool) -> None:
        """Take note of one answer."""
        self._seen += 1
        self._refused += refused
        if self._seen < max(self.size, 8):
            return
        if self._refused > CONGESTED_SHARE * self._seen:
            self.size = max(1.0, self.size / 2)
        else:
            self.size = min(float(self.largest), self.size + max(1.0, self.size / 8))
        self._seen = self._refused = 0
