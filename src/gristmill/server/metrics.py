"""Prometheus metrics of the server."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from gristmill.engine.async_engine import AsyncEngine
from gristmill.server.connections import ConnectionPool


class Metrics:
    """Prometheus metrics of a server.

    Args:
        pool: its connections, if they are limited.
    """

    def __init__(self, async_engine: AsyncEngine, pool: Callable[[], ConnectionPool | None]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("gristmill_requests", "Requests by path and status.", ["path", "status"], registry=self.registry)
        self.seconds = Histogram("gristmill_request_seconds", "Time to the end of an answer.", registry=self.registry)
        self.first = Histogram("gristmill_first_token_seconds", "Time to the first token of a streamed answer.", registry=self.registry)
        cores = lambda: [worker.core for worker in async_engine.workers]  # noqa: E731
        for name, about, value in (
            ("gristmill_open_samples", "Samples under way or waiting.", lambda: async_engine.num_open),
            ("gristmill_connections", "Connections.", lambda: len(one.connections) if (one := pool()) else 0),
            (
                "gristmill_connections_dropped",
                "Connections that were refused, or dropped because their time was up or another needed their place.",
                lambda: sum(one.num_dropped.values()) if (one := pool()) else 0,
            ),
            (
                "gristmill_running",
                "Samples that have a slot.",
                lambda: sum(c.batch_state.num_slots - len(c.batch_state.free_slots) for c in cores()),
            ),
            ("gristmill_pages_in_use", "KV-cache blocks in use.", lambda: sum(c.block_manager.num_used_blocks for c in cores())),
            ("gristmill_pages", "KV-cache blocks.", lambda: sum(c.block_manager.num_blocks for c in cores())),
            ("gristmill_prompt_tokens", "Prompt tokens computed.", lambda: sum(c.prompt_tokens for c in cores())),
            ("gristmill_output_tokens", "Tokens sampled.", lambda: sum(c.output_tokens for c in cores())),
            ("gristmill_draft_tokens", "Tokens drafted (speculative decoding).", lambda: sum(c.draft_tokens for c in cores())),
            ("gristmill_accepted_tokens", "Drafted tokens that were accepted.", lambda: sum(c.accepted_tokens for c in cores())),
            (
                "gristmill_preemptions",
                "Samples preempted for want of KV-cache blocks.",
                lambda: sum(c.scheduler.num_preemptions for c in cores()),
            ),
        ):
            Gauge(name, about, registry=self.registry).set_function(value)
