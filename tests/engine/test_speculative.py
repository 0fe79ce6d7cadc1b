"""Speculative decoding by n-gram look-up: the same tokens, the same distribution, and nothing rejected in the cache."""

import itertools
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.core.errors import InputError
from gristmill.engine.block_manager import BLOCK_SIZE, ROOT
from gristmill.engine.core import Core
from gristmill.engine.layers import Decoder
from gristmill.engine.sequence import RequestState
from gristmill.engine.speculative import SpeculativeConfig, propose
from gristmill.generation.api import Completion, Request, SamplingParams
from gristmill.model.config import BlockConfig, ModelConfig
from gristmill.model.packed import PackedShape
from gristmill.model.transformer import Transformer
from tests.engine.test_core import VOCABULARY, answers_of, core_of, finish, model_of, words
from tests.engine.test_lora import LONG, ask, engine, run

EAGER = SpeculativeConfig(num_speculative_tokens=6, prompt_lookup_max=3, prompt_lookup_min=1)
MODEL = model_of(blocks=(BlockConfig(4, 2, 8, 64),) * 2)


# ---- what is drafted ----


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 6), st.integers(1, 4), st.integers(1, 4))
def test_a_draft_is_what_followed_the_longest_match(tokens: list[int], num_tokens: int, max_ngram: int, min_ngram: int) -> None:
    min_ngram = min(min_ngram, max_ngram)
    expected: list[int] = []
    for size in range(min(max_ngram, len(tokens) - 1), min_ngram - 1, -1):
        starts = [i + size for i in range(len(tokens) - size) if tokens[i : i + size] == tokens[-size:]]
        if starts:
            whole = [start for start in starts if start + num_tokens <= len(tokens)]
            start = whole[-1] if whole else starts[0]
            expected = tokens[start : start + num_tokens]
            break
    found = propose(np.array(tokens, np.int32), num_tokens, max_ngram=max_ngram, min_ngram=min_ngram)
    assert found.tolist() == expected


def test_settings_are_vllms() -> None:
    assert SpeculativeConfig.parse(None) is None and SpeculativeConfig.parse("") is None
    assert SpeculativeConfig.parse("ngram") == SpeculativeConfig()
    given = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 1}
    assert SpeculativeConfig.parse(given) == SpeculativeConfig(num_speculative_tokens=3, prompt_lookup_max=1, prompt_lookup_min=1)
    found = SpeculativeConfig.parse('{"method": "ngram", "prompt_lookup_min": 6}')
    assert found == SpeculativeConfig(prompt_lookup_min=6, prompt_lookup_max=6)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("eagle", "no JSON object"),
        ("[" * 100_000, "no JSON object"),
        ("[1]", "no JSON object"),
        ({"num_speculative_tokens": 3}, "needs .method"),
        ({"method": "eagle"}, "only one that is implemented"),
        ({"method": "ngram", "model": "x"}, "model of the speculative config is unknown"),
        ({"method": "ngram", "num_speculative_tokens": True}, "is a whole number"),
        ({"method": "ngram", "num_speculative_tokens": 0}, "must be 1 to 64, got 0"),
        ({"method": "ngram", "prompt_lookup_max": 2, "prompt_lookup_min": 3}, "got 3 and 2"),
    ],
)
def test_wrong_settings_are_refused(config: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        SpeculativeConfig.parse(config)


# ---- what comes of it ----


def looping_states(seed: int) -> tuple[list[RequestState], dict[tuple[str, int], list[tuple[object, ...]]]]:
    """Requests whose prompts repeat themselves, with all that may end or change an answer; and what their listeners will hear."""
    draw = random.Random(seed)
    heard: dict[tuple[str, int], list[tuple[object, ...]]] = {}
    states = []
    for i in range(6):
        part = [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 12))]
        prompt = np.array((part * 40)[: draw.randint(1, 90)], np.int32)
        sampling = SamplingParams(
            temperature=draw.choice((0.0, 0.3, 1.0)),
            top_p=draw.choice((1.0, 0.7)),
            max_tokens=draw.randint(1, 50),
            n=draw.choice((1, 1, 3)),
            stop=draw.choice(((), ("1 2", "33"))),
            stop_tokens=draw.choice(((), (5, 11))),
            top_logprobs=draw.choice((0, 2)),
            repetition_penalty=draw.choice((1.0, 1.0, 1.0, 1.2)),
            logit_bias=draw.choice(((), (), ((3, 2.0),))),
        )
        state = RequestState(Request(f"r{i}", (), sampling, seed=i), prompt, sampling.max_tokens, i)
        state.listener = lambda sample, *event, name=f"r{i}": heard.setdefault((name, sample), []).append(event)  # type: ignore[misc]
        states.append(state)
    return states, heard


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 10**6))
def test_drafts_change_no_token_and_no_stream(seed: int) -> None:
    draw = random.Random(seed)
    plain, plain_heard = looping_states(seed)
    expected = finish(core_of(MODEL), plain)
    states, heard = looping_states(seed)
    core = core_of(
        MODEL,
        max_batch=draw.choice((1, 3, 12)),
        blocks=draw.choice((5, 9, 80)),
        max_batched_tokens=draw.choice((8, 40, 512)),
        interactive=draw.random() < 0.5,
        speculative=draw.choice((EAGER, SpeculativeConfig(), replace(EAGER, num_speculative_tokens=40))),
    )
    assert finish(core, states) == expected
    for state, other in zip(states, plain, strict=True):
        for sample, (one, two) in enumerate(zip(state.completions, other.completions, strict=True)):
            assert isinstance(one, Completion) and isinstance(two, Completion)
            assert one.tokens == two.tokens and one.logprobs == pytest.approx(two.logprobs, abs=1e-4)
            assert [[t for t, _ in best] for best in one.top_logprobs] == [[t for t, _ in best] for best in two.top_logprobs]
            events, others = heard[state.request.id, sample], plain_heard[state.request.id, sample]
            assert [(token, last) for token, _, last, _ in events] == [(token, last) for token, _, last, _ in others]
            assert tuple(logprob for _, logprob, _, _ in events) == one.logprobs


def test_a_loop_is_drafted_and_takes_fewer_steps() -> None:
    """A model that says its last token again: the drafts are right, and an answer takes a step for every six tokens."""
    model = model_of(blocks=(BlockConfig(4, 2, 8, 64),))
    with torch.no_grad():
        for block in model.blocks.values():
            for parameter in block.parameters():
                parameter.zero_()  # the residual stream is the embedding alone
        model.embedding.copy_(torch.eye(VOCABULARY, 32) + 0.01)
        model.embedding[32:] = 0
        model.lm_head.weight.copy_(model.embedding)
    steps = {}
    for config in (None, EAGER):
        core = core_of(model, speculative=config)
        state = RequestState(Request("r", (), SamplingParams(0.0, max_tokens=60)), np.full(4, 9, np.int32), 60)
        core.add(state)
        steps[config] = 0
        while not core.idle:
            core.step()
            steps[config] += 1
        assert state.completions[0] is not None and set(state.completions[0].tokens) == {9}
        if config is not None:
            assert core.draft_tokens == core.accepted_tokens >= 45
    assert steps[None] == 60 and steps[EAGER] <= 12


def test_what_depends_on_the_tokens_before_is_not_drafted() -> None:
    for changed in ({"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"frequency_penalty": 0.1}, {"logit_bias": ((3, 1.0),)}):
        core = core_of(MODEL, speculative=EAGER)
        core.stop_V[:] = False
        sampling = replace(SamplingParams(0.0, max_tokens=20), **changed)  # type: ignore[arg-type]
        finish(core, [RequestState(Request("r", (), sampling), np.full(30, 5, np.int32), 20)])
        assert core.draft_tokens == 0 and core.output_tokens == 20


@pytest.mark.parametrize("seed", range(4))
def test_the_prefix_cache_holds_no_rejected_token(seed: int) -> None:
    """Every registered chain of blocks is the beginning of a text that there was, and an answer that builds on it is right."""
    states, _ = looping_states(seed)
    core = core_of(MODEL, blocks=40, speculative=replace(EAGER, num_speculative_tokens=40))
    core.stop_V[:] = False
    finish(core, states)
    assert 0 < core.accepted_tokens < core.draft_tokens
    texts = []
    for state in states:
        texts += [[*state.prompt_ids.tolist(), *c.tokens] for c in state.completions if c is not None]
    registered = core.block_manager._key_of
    for prefix_id in registered:
        chain: list[int] = []
        while prefix_id != ROOT:
            prefix_id, tokens = registered[prefix_id]
            chain = [*np.frombuffer(tokens, np.int32).tolist(), *chain]
        assert any(text[: len(chain)] == chain for text in texts)
    longest = max(texts, key=len)[:120]
    before = core.prompt_tokens
    again = [RequestState(Request("again", (), SamplingParams(0.0, max_tokens=9)), np.array(longest, np.int32), 9) for _ in range(2)]
    assert finish(core, again[:1]) == finish(core_of(MODEL), again[1:])
    assert core.prompt_tokens - before <= len(longest) - BLOCK_SIZE


def test_sampled_tokens_have_the_models_distribution() -> None:
    """Chi-square of three tokens in a row against the probabilities that the transformer itself gives them."""
    vocabulary, prompt = 5, [0, 1, 2, 0, 1, 2, 0, 1]
    model = Transformer(ModelConfig("llama", vocabulary, 16, (BlockConfig(2, 1, 8, 16),), 64, init_std=0.1)).requires_grad_(False)
    never = np.zeros(vocabulary, np.bool_)
    texts = {"response_text": words, "decode": words}
    core = Core(Decoder(model, torch.float32), 12, never, cache_tokens=None, cache_dtype=torch.float32, speculative=EAGER, **texts)  # type: ignore[arg-type]
    num = 2000
    states = [RequestState(Request(f"{i}", (), SamplingParams(max_tokens=3)), np.array(prompt, np.int32), 3, i) for i in range(num)]
    said = Counter(completion[0] for completion in answers(core, states))
    assert 0.1 < core.accepted_tokens / core.draft_tokens < 0.9
    triples = list(itertools.product(range(vocabulary), repeat=3))
    ids = torch.tensor([token for triple in triples for token in (*prompt, *triple)])
    shape = PackedShape.from_lengths([len(prompt) + 3] * len(triples), ids.device)
    logprobs = torch.log_softmax(model.logits(model.hidden(ids, shape)).float(), -1).unflatten(0, (len(triples), -1))
    probs = [float(one[range(len(prompt) - 1, len(prompt) + 2), list(t)].sum().exp()) for one, t in zip(logprobs, triples, strict=True)]
    assert sum(probs) == pytest.approx(1, abs=1e-4)
    cells = [(said[triple], num * p) for triple, p in zip(triples, probs, strict=True) if num * p >= 5]
    rest = num - sum(count for count, _ in cells), num - sum(expected for _, expected in cells)
    chi_square = sum((count - expected) ** 2 / expected for count, expected in [*cells, rest])
    assert chi_square < len(cells) + 4 * (2 * len(cells)) ** 0.5


def answers(core: Core, states: list[RequestState]) -> list[list[tuple[int, ...]]]:
    finish(core, states)
    return [[c.tokens for c in state.completions if c is not None] for state in states]


def test_cancelling_beside_drafts_frees_everything() -> None:
    for seed in range(6):
        draw = random.Random(seed)
        states, _ = looping_states(seed)
        expected = finish(core_of(MODEL), looping_states(seed)[0])
        core = core_of(MODEL, max_batch=5, blocks=draw.choice((6, 30)), speculative=EAGER)
        gone = set()
        for state in states:
            core.add(state)
        while not core.idle:
            core.step()
            state = draw.choice(states)
            if draw.random() < 0.2 and state.num_unfinished and not state.cancelled:
                core.cancel(state)
                gone.add(state.request.id)
        assert core.block_manager.num_used_blocks == 0 and len(core.batch_state.free_slots) == 5
        assert answers_of(core.take_finished()) == {name: one for name, one in expected.items() if name not in gone}


def test_adapters_are_drafted_for_too() -> None:
    requests = [replace(ask(name, number, LONG), sampling=SamplingParams(number % 2, max_tokens=40)) for number, name in enumerate("abba")]
    requests.append(replace(ask("", 4, LONG), sampling=SamplingParams(0.0, max_tokens=40)))
    drafting = engine("llama", speculative=EAGER)
    plain, found = run(engine("llama"), requests), run(drafting, requests)
    assert {name: [c.tokens for c in said] for name, said in found.items()} == {n: [c.tokens for c in said] for n, said in plain.items()}
    stats = drafting.stats
    assert 0 < stats.accepted_tokens <= stats.draft_tokens and f"of {stats.draft_tokens:,} tokens accepted" in stats.acceptance
