"""Asynchronous engine: streams of concurrent requests under a cache that is too small for them."""

from collections import defaultdict
from pathlib import Path
from queue import SimpleQueue

import pytest

from gristmill.data.chat import Message
from gristmill.data.chat_format import FORMATS
from gristmill.engine import engine as engine_module
from gristmill.engine.async_engine import AsyncEngine, TokenEvent
from gristmill.engine.engine import Engine
from gristmill.engine.sequence import RequestState
from gristmill.generation.api import Completion, Request, SamplingParams
from gristmill.model.hf import load_model

REQUESTS = [Request(f"r{i}", (Message("user", f"Name a land. {i}"),), SamplingParams(max_tokens=60, n=2), seed=i) for i in range(5)]
Streams = dict[tuple[str, int], list[TokenEvent]]


def serve(folder: Path, cache_tokens: int) -> tuple[Streams, dict[str, list[Completion]], int]:
    """Token events and completions of all requests, submitted at once, and how often a sequence was preempted."""
    engine = Engine(*load_model(folder), FORMATS["nemotron"], name="tiny", max_batch=10, cache_tokens=cache_tokens)
    engine.stop_V[:] = False  # long answers, so that blocks run out
    events: SimpleQueue[TokenEvent] = SimpleQueue()
    async_engine = AsyncEngine(engine, lambda some: [events.put(event) for event in some])
    async_engine.start()
    streams: Streams = defaultdict(list)
    states: list[RequestState] = [engine.prepare(request) for request in REQUESTS]
    try:
        for state in states:
            state.listener = lambda *_: None
            async_engine.submit(state)
        open_states = set(states)
        while open_states:
            event = events.get(timeout=60)
            if event.sample < 0:
                assert event.error is None
                open_states.remove(event.state)
            else:
                assert event.state in open_states, "no token comes after the end"
                streams[event.state.request.id, event.sample].append(event)
        preemptions = sum(worker.core.scheduler.num_preemptions for worker in async_engine.workers)
    finally:
        assert async_engine.stop()
    return streams, {s.request.id: [c for c in s.completions if c is not None] for s in states}, preemptions


def test_preempted_requests_stream_every_token_once(tiny_base: Path) -> None:
    expected, _, none = serve(tiny_base, 4096)
    streams, completions, preemptions = serve(tiny_base, 288)
    assert none == 0 < preemptions
    assert streams.keys() == expected.keys() == {(request.id, sample) for request in REQUESTS for sample in range(2)}
    for (name, sample), events in streams.items():
        completion = completions[name][sample]
        assert [event.token for event in events] == [event.token for event in expected[name, sample]] == list(completion.tokens)
        assert [event.logprob for event in events] == list(completion.logprobs)
        assert list(completion.logprobs) == pytest.approx([event.logprob for event in expected[name, sample]], abs=1e-4)
        assert [event.last for event in events] == [False] * (completion.num_tokens - 1) + [True]


def test_a_worker_is_filled_before_another_begins(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many rows as make a step worth it; and none waits for a slot while another worker has one."""
    model, tokenizer = load_model(tiny_base)
    rows = sum(p.numel() for p in model.parameters())

    def loads(step_rows: int, max_batch: int, num_workers: int = 2) -> list[list[int]]:
        monkeypatch.setattr(engine_module, "STEP_PRODUCTS", step_rows * rows)
        engine = Engine(model, tokenizer, FORMATS["nemotron"], name="tiny", max_batch=max_batch)
        engine.num_workers = num_workers
        waiting = AsyncEngine(engine, lambda some: None)  # it is not started, so nothing ends
        out = []
        for one in REQUESTS:  # of two samples each
            waiting.submit(engine.prepare(one))
            out.append([worker.load for worker in waiting.workers])
        return out

    assert loads(4, 100) == [[2, 0], [4, 0], [6, 0], [6, 2], [6, 4]]
    assert loads(4, 8) == [[2, 0], [4, 0], [4, 2], [4, 4], [6, 4]]
    assert loads(3, 9, 3)[:3] == [[2, 0, 0], [2, 2, 0], [2, 2, 2]], "three slots hold no two requests"
    assert loads(5, 8) == [[2], [4], [6], [8], [10]], "so few slots are one worker's"
