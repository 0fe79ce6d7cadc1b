"""Several clients as one: each request goes to one of them, by weight."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

from gristmill.generation.api import Completion, Request
from gristmill.generation.cached import CachedClient, Client
from gristmill.generation.endpoint import Endpoint, Usage

TICK = 0.5  # seconds


class MixtureClient:
    """Clients that share the requests.

    Args:
        clients: each with its weight and the names of its models. Which one answers a request depends on the request's id alone.
    """

    def __init__(self, clients: Sequence[tuple[Client, float, Sequence[str]]]):
        self.clients = [client for client, _, _ in clients]
        self._weights = [weight for _, weight, _ in clients]
        self._by_model = {name: client for client, _, names in reversed(clients) for name in names}
        self._stack = AsyncExitStack()

    @property
    def concurrency(self) -> int:
        """Requests that all of them can have under way."""
        return sum(client.concurrency for client in self.clients)

    def model_of(self, request_id: str) -> str:
        """The model that answers a row."""
        return self._of(request_id).model_of(request_id)

    def _of(self, request_id: str) -> Client:
        digest = hashlib.blake2b(f"client/{request_id}".encode(), digest_size=8).digest()
        share = int.from_bytes(digest, "big") / 2**64 * sum(self._weights)
        for client, weight in zip(self.clients, self._weights, strict=True):
            share -= weight
            if share < 0:
                return client
        return self.clients[0]

    async def complete(self, request: Request, model: str = "") -> list[Completion]:
        """As `Client.complete`."""
        client = self._by_model[model] if model else self._of(request.id)
        return await client.complete(request, model)

    async def __aenter__(self) -> "MixtureClient":
        for client in self.clients:
            if isinstance(client, AbstractAsyncContextManager):
                await self._stack.enter_async_context(client)
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self._stack.aclose()


def endpoints_of(client: Client) -> list[Endpoint]:
    """The endpoints among a client's."""
    clients = client.clients if isinstance(client, MixtureClient) else [client]
    return [one for one in clients if isinstance(one, Endpoint)]


def usage_of(client: Client) -> dict[str, Any]:
    """What a client's endpoints were asked in this start; empty where there is none."""
    used = [endpoint.usage for endpoint in endpoints_of(client)]
    if not used:
        return {}
    errors = sum((usage.errors for usage in used), Usage().errors)
    names = ("requests", "tokens_in", "tokens_out")
    return {name: sum(getattr(usage, name) for usage in used) for name in names} | {
        "cost": round(sum(usage.cost for usage in used), 6),
        "errors": dict(errors),
        "refused_fields": {model: dict(fields) for usage in used for model, fields in usage.refused_fields.items()},
    }


@asynccontextmanager
async def opened(client: Client) -> AsyncIterator[Client]:
    """A client with its connections and threads, as long as it is needed."""
    async with AsyncExitStack() as stack:
        if isinstance(client, AbstractAsyncContextManager):
            await stack.enter_async_context(client)
        yield client


@asynccontextmanager
async def shown(cached: CachedClient, tick: Callable[[int, int | None, str], None], total: int | None = None) -> AsyncIterator[None]:
    """Show the calls of a client while they are made: how many, from where, tokens a second, errors, cost, and the time left.

    Args:
        total: calls that will have been made at the end, where that is known.
    """
    endpoints = endpoints_of(cached.source)

    async def ticking() -> None:
        tokens, calls = 0, cached.calls
        while True:
            await asyncio.sleep(TICK)
            done = cached.calls
            speed, calls = (done - calls) / TICK, done
            note = f"calls, {cached.found:,} of them from the journal, {cached.failed:,} failed"
            usage = usage_of(cached.source)
            rate, tokens = (usage["tokens_out"] - tokens) / TICK, usage["tokens_out"]
            in_flight = sum(endpoint.in_flight for endpoint in endpoints)
            note += f", {in_flight} in flight, {rate:,.0f} tokens/s, {sum(usage['errors'].values()):,} errors"
            note += f", cost {usage['cost']:.2f}" if usage["cost"] else ""
            if total is not None and speed > 0:
                note += f", {(total - done) / speed / 60:.0f} min left"
            tick(done, total, note)

    if not endpoints:  # an engine's answers show as they come
        yield
        return
    task = asyncio.ensure_future(ticking())
    try:
        yield
    finally:
        task.cancel()
