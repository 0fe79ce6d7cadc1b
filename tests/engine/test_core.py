"""Continuous batching: sequences join, leave, fork, are preempted and cancelled, and nobody's tokens depend on it."""

import random
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gristmill.core.errors import InputError
from gristmill.engine.attention import AttentionBackend, AttentionMetadata, CompiledAttention, KVCache, TorchAttention
from gristmill.engine.block_manager import BLOCK_SIZE
from gristmill.engine.core import Core
from gristmill.engine.kernels import library as kernels
from gristmill.engine.layers import Decoder
from gristmill.engine.scheduler import SchedulerOutput
from gristmill.engine.sequence import RequestState
from gristmill.generation.api import Completion, Request, SamplingParams
from gristmill.model.config import BlockConfig, ModelConfig
from gristmill.model.quantized import MAX_VALUES
from gristmill.model.transformer import Transformer

VOCABULARY = 80
WIDE = (BlockConfig(4, 2, 8, 64), BlockConfig(0, 0, 0, 64), BlockConfig(4, 1, 8, 0), BlockConfig(2, 2, 8, 48))
Make = Callable[..., Core]


def model_of(family: str = "nemotron", blocks: tuple[BlockConfig, ...] = WIDE, longest: int = 256) -> Transformer:
    model = Transformer(ModelConfig(family, VOCABULARY, 32, blocks, longest, init_std=0.3))
    return model.requires_grad_(False)


def words(ids: list[int], continued: bool = False) -> str:
    return " ".join(map(str, ids))


def core_of(model: Transformer, max_batch: int = 8, blocks: int | None = None, **options: object) -> Core:
    stop = np.zeros(VOCABULARY, np.bool_)
    stop[7] = True
    tokens = None if blocks is None else blocks * BLOCK_SIZE
    settings = {"response_text": words, "decode": words, "cache_tokens": tokens, "cache_dtype": torch.float32} | options
    return Core(Decoder(model, torch.float32), max_batch, stop, **settings)  # type: ignore[arg-type]


def states_of(count: int, seed: int = 0, longest: int = 90, answer: int = 60) -> list[RequestState]:
    """Requests, some of which begin alike, with one to three samples, half of them greedy."""
    draw = random.Random(seed)
    prefix = [draw.randrange(VOCABULARY) for _ in range(2 * BLOCK_SIZE)]
    out = []
    for i in range(count):
        own = [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, longest))]
        prompt = np.array(prefix[: draw.choice((0, 40, 64))] + own, np.int32)
        n, limit = draw.choice((1, 1, 2, 3)), draw.randint(1, answer)
        request = Request(f"r{seed}-{i}", (), SamplingParams(temperature=i % 2, max_tokens=limit, n=n), seed=i)
        out.append(RequestState(request, prompt, limit, i))
    return out


def finish(core: Core, states: list[RequestState]) -> dict[str, list[tuple[str, int, str]]]:
    for state in states:
        core.add(state)
    for _ in range(20_000):
        if core.idle:
            break
        core.step()
    assert (
        core.idle
        and core.block_manager.num_used_blocks == 0
        and sorted(core.batch_state.free_slots) == list(range(core.batch_state.num_slots))
    )
    return answers_of(core.take_finished())


def answers_of(states: list[RequestState]) -> dict[str, list[tuple[str, int, str]]]:
    return {j.request.id: [(c.text, c.num_tokens, c.finish) for c in j.completions if c is not None] for j in states}


@pytest.fixture(scope="module")
def model() -> Transformer:
    return model_of()


@pytest.fixture(scope="module")
def alone(model: Transformer) -> dict[str, list[tuple[str, int, str]]]:
    """Each of twelve requests by itself."""
    out: dict[str, list[tuple[str, int, str]]] = {}
    for state in states_of(12):
        out |= finish(core_of(model), [state])
    return out


@pytest.mark.parametrize("options", [{}, {"max_batch": 3}, {"max_batch": 64}, {"max_batched_tokens": 8}, {"max_batched_tokens": 33}])
def test_company_changes_nothing(model: Transformer, alone: dict[str, list[tuple[str, int, str]]], options: dict[str, int]) -> None:
    assert finish(core_of(model, **options), states_of(12)) == alone


@pytest.mark.parametrize("blocks", [6, 8, 12])
def test_preempted_sequences_give_the_same_answers(model: Transformer, alone: dict[str, list[tuple[str, int, str]]], blocks: int) -> None:
    core = core_of(model, max_batch=8, blocks=blocks)
    assert finish(core, states_of(12)) == alone
    assert core.scheduler.num_preemptions > 0


@pytest.mark.parametrize("blocks", [6, 9])
def test_preemption_shows_in_no_stream_and_no_completion(model: Transformer, blocks: int) -> None:
    roomy, tight = core_of(model), core_of(model, blocks=blocks)
    for core in (roomy, tight):
        core.stop_V[:] = False  # long answers, so that blocks run out
    expected, found = streams(roomy), streams(tight)
    assert tight.scheduler.num_preemptions > 0 == roomy.scheduler.num_preemptions and found.keys() == expected.keys() and len(found) == 9
    for key, (events, completion) in found.items():
        other_events, other = expected[key]
        assert [(token, last) for token, _, last, _ in events] == [(token, last) for token, _, last, _ in other_events]
        assert (completion.text, completion.tokens, completion.finish) == (other.text, other.tokens, other.finish)
        assert completion.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        # the whole answer is what was streamed, to the last digit
        assert tuple(token for token, _, _, _ in events) == completion.tokens
        assert tuple(logprob for _, logprob, _, _ in events) == completion.logprobs
        assert tuple(top for _, _, _, top in events) == completion.top_logprobs
        assert [last for _, _, last, _ in events] == [False] * (completion.num_tokens - 1) + [True]


def streams(core: Core) -> dict[tuple[str, int], tuple[list[tuple[int, float, bool, object]], Completion]]:
    """Events that each sample's listener hears, and its completion."""
    heard: dict[tuple[str, int], list[tuple[int, float, bool, object]]] = {}
    states = []
    for i in range(6):
        sampling = SamplingParams(temperature=float(i % 3 > 0), max_tokens=70 + i, n=1 + i % 2, top_logprobs=2)
        state = RequestState(Request(f"r{i}", (), sampling, seed=i), np.arange(3 * i, 5 * i + 9, dtype=np.int32), 70 + i, i)
        state.listener = lambda sample, *event, name=state.request.id: heard.setdefault((name, sample), []).append(event)  # type: ignore[misc]
        states.append(state)
    finish(core, states)
    return {
        (state.request.id, sample): (heard[state.request.id, sample], completion)
        for state in states
        for sample, completion in enumerate(state.completions)
        if completion is not None
    }


def test_common_prefixes_are_prefilled_once(model: Transformer) -> None:
    shared = [5] * (3 * BLOCK_SIZE)
    for gap in (0, 5):  # in one step, and later
        core = core_of(model)
        for i in range(4):
            state = RequestState(Request(f"r{i}", (), SamplingParams(max_tokens=3)), np.array([*shared, i], np.int32), 3, i)
            core.add(state)
            for _ in range(gap):
                core.step()
        while not core.idle:
            core.step()
        assert core.prompt_tokens == len(shared) + 4


def test_a_prompt_of_whole_cached_blocks_is_still_answered(model: Transformer) -> None:
    core = core_of(model)
    states = [
        RequestState(Request("same", (), SamplingParams(0.0, max_tokens=4)), np.arange(2 * BLOCK_SIZE, dtype=np.int32) % 7, 4, i)
        for i in (0, 1)
    ]
    assert finish(core, states[:1]) == finish(core, states[1:])
    assert core.prompt_tokens == 3 * BLOCK_SIZE, "the last block is computed again"


def test_what_never_fits_is_refused_at_once(model: Transformer) -> None:
    core = core_of(model, blocks=3)
    with pytest.raises(InputError, match="may take 110 tokens and the cache holds 96"):
        core.add(RequestState(Request("big", (), SamplingParams(max_tokens=100)), np.zeros(10, np.int32), 100))
    assert core.idle


def test_priority_goes_first_and_nobody_starves(model: Transformer) -> None:
    core = core_of(model, max_batch=1)
    order = []
    states = states_of(4, answer=3)
    urgent = RequestState(Request("urgent", (), SamplingParams(max_tokens=2), priority=1), np.arange(5, dtype=np.int32), 2, 99)
    for state in states:
        core.add(state)
    core.step()
    core.add(urgent)
    while not core.idle:
        core.step()
        order += [state.request.id for state in core.take_finished()]
    names = [state.request.id for state in states]
    assert order.index("urgent") <= 1 and [name for name in order if name != "urgent"] == names


def first_tokens(core: Core, arrivals: list[tuple[str, int, int]], priority: dict[str, int] | None = None) -> dict[str, int]:
    """Prompt tokens that had been computed when each request said its first token.

    Args:
        arrivals: name, prompt length, and prompt tokens that are computed before it comes.
        priority: of some of them.
    """
    heard: dict[str, int] = {}
    todo = list(arrivals)
    while todo or not core.idle:
        while todo and (core.prompt_tokens >= todo[0][2] or core.idle):
            name, length, _ = todo.pop(0)
            request = Request(name, (), SamplingParams(0.0, max_tokens=2), priority=(priority or {}).get(name, 0))
            state = RequestState(request, np.arange(length, dtype=np.int32) * 7 % VOCABULARY, 2, len(arrivals) - len(todo))
            state.prompt_ids[0] = len(todo) % VOCABULARY  # no two begin alike
            state.listener = lambda *_, name=name: heard.setdefault(name, core.prompt_tokens)
            core.add(state)
        core.step()
    return heard


def test_a_short_prompt_need_not_wait_for_a_long_one(model: Transformer) -> None:
    arrivals = [("long", 200, 0), ("short", 9, 20)]
    waiting = first_tokens(core_of(model, max_batched_tokens=16), arrivals)
    assert waiting["long"] < waiting["short"]
    found = first_tokens(core_of(model, max_batched_tokens=16, interactive=True), arrivals)
    assert found["short"] <= 60 and found["long"] == 209


def test_no_prompt_waits_for_ever(model: Transformer) -> None:
    """Short prompts that come without an end take turns with a long one once it is old enough; and priority is only a head start."""
    shorts = [(f"s{i}", 10, 10 * i) for i in range(300)]
    for priority in ({}, {name: 1 for name, _, _ in shorts}):
        found = first_tokens(core_of(model, max_batched_tokens=12, interactive=True), [("long", 200, 0), *shorts], priority)
        assert 500 < found["long"] < 200 * 5 + 256 + 100
    assert first_tokens(core_of(model, max_batched_tokens=12), [("long", 200, 0), *shorts], priority)["long"] > 2900, "strict there"


def test_priority_goes_before_those_that_came_earlier(model: Transformer) -> None:
    arrivals = [("one", 100, 0), ("two", 100, 0), ("three", 100, 0)]
    found = first_tokens(core_of(model, max_batched_tokens=16, interactive=True), arrivals, {"three": 1})
    assert sorted(found, key=lambda name: found[name]) == ["three", "one", "two"]


def longest_gap(core: Core) -> float:
    """Longest gap of a response beside which prompts of 240 tokens arrive, on a machine whose steps take 10 ms, 1 ms a decoded token and
    .5 ms a prompt token: the core's clock is moved as its model runs."""
    now, run = [0.0], core.model_runner.run

    def slow(step: SchedulerOutput) -> Tensor:
        decoded = step.num_decoded_tokens
        now[0] += 0.01 + 0.001 * decoded + 0.0005 * (sum(step.num_tokens) - decoded)
        return run(step)

    core.clock, core.stop_V[:] = (lambda: now[0]), False
    core.model_runner.run = slow  # type: ignore[method-assign]
    heard: list[float] = []
    state = RequestState(Request("d", (), SamplingParams(0.0, max_tokens=90)), np.arange(4, dtype=np.int32), 90)
    state.listener = lambda *_: heard.append(now[0])
    core.add(state)
    for i in range(90):
        if i in (10, 30, 50):
            core.add(RequestState(Request(f"p{i}", (), SamplingParams(max_tokens=1)), np.full(240, i, np.int32), 1, i))
        core.step()
    return max(after - before for before, after in zip(heard[20:], heard[21:], strict=False))


def test_interactive_steps_are_as_long_as_whoever_decodes_can_bear(model: Transformer) -> None:
    assert longest_gap(core_of(model)) == pytest.approx(0.131)
    assert 0.02 < longest_gap(core_of(model, interactive=True)) < 0.043  # three and a half times one that both decode in


def test_what_neighbours_take_is_no_price_of_a_steps_tokens(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    core = core_of(model, interactive=True)
    run, observed, asleep = core.model_runner.run, list[float](), 0.3
    core.model_runner.run = lambda step: (time.sleep(asleep), run(step))[1]  # type: ignore[method-assign, func-returns-value]
    assert core.scheduler.token_budget is not None
    monkeypatch.setattr(core.scheduler.token_budget, "observe", lambda decoded, prompt, seconds: observed.append(seconds))
    core.add(RequestState(Request("d", (), SamplingParams(0.0, max_tokens=2)), np.arange(4, dtype=np.int32), 2))
    core.step()
    assert 0 < observed[0] < asleep


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6))
def test_cancelling_frees_everything_and_disturbs_nobody(seed: int) -> None:
    draw = random.Random(seed)
    model = MODEL
    states = states_of(8, seed=seed % 3, longest=40, answer=25)
    wanted = finish(core_of(model), states_of(8, seed=seed % 3, longest=40, answer=25))
    core = core_of(model, max_batch=draw.choice((2, 5, 8)), blocks=draw.choice((5, 9, 40)), max_batched_tokens=draw.choice((8, 40, 512)))
    gone = set()
    for state in states:
        core.add(state)
    while not core.idle:
        core.step()
        if draw.random() < 0.2:
            state = draw.choice(states)
            if state.num_unfinished and not state.cancelled:
                core.cancel(state)
                gone.add(state.request.id)
    assert core.block_manager.num_used_blocks == 0 and sorted(core.batch_state.free_slots) == list(range(core.batch_state.num_slots))
    assert answers_of(core.take_finished()) == {name: said for name, said in wanted.items() if name not in gone}


MODEL = model_of(blocks=(BlockConfig(4, 2, 8, 64),) * 2)


def test_a_short_prompt_among_many_is_sampled_at_its_end(model: Transformer) -> None:
    """Tokens to sample and tokens of the step may round up to the same number."""
    core = core_of(model, max_batch=40)
    for i in range(20):
        core.add(RequestState(Request(f"d{i}", (), SamplingParams(0.0, max_tokens=40)), np.full(9, i, np.int32), 40, i))
    for _ in range(3):
        core.step()
    late = RequestState(Request("late", (), SamplingParams(0.0, max_tokens=5)), np.arange(6, dtype=np.int32) + 30, 5, 99)
    again = RequestState(Request("late", (), SamplingParams(0.0, max_tokens=5)), np.arange(6, dtype=np.int32) + 30, 5, 99)
    assert finish(core, [late])["late"] == finish(core_of(model), [again])["late"]


def test_blocks_of_former_weights_are_never_reused(model: Transformer) -> None:
    changing = model_of()
    core = core_of(changing)
    text = np.arange(10, dtype=np.int32)
    first = RequestState(Request("first", (), SamplingParams(0.0, max_tokens=60)), text, 60)
    core.stop_V[:] = False
    core.add(first)
    for _ in range(10):
        core.step()
    with torch.no_grad():
        for parameter in changing.parameters():
            parameter.mul_(0.6)
    core.refresh()
    said = finish(core, [])["first"][0][0]
    prompt = np.array([*text, *map(int, said.split())], np.int32)[: BLOCK_SIZE + 8]
    states = [RequestState(Request("next", (), SamplingParams(0.0, max_tokens=6)), prompt, 6) for _ in range(2)]
    before = core.prompt_tokens
    other = core_of(changing)
    other.stop_V[:] = False
    assert finish(core, states[:1]) == finish(other, states[1:]) and core.prompt_tokens - before == len(prompt)


def test_a_listener_hears_every_token_once(model: Transformer) -> None:
    heard: dict[int, list[int]] = {0: [], 1: [], 2: []}
    ended = []
    state = RequestState(Request("r", (), SamplingParams(max_tokens=9, n=3)), np.arange(40, dtype=np.int32), 9)

    def listener(sample: int, token: int, logprob: float, last: bool, likeliest: object) -> None:
        heard[sample].append(token)
        assert logprob <= 0
        if last:
            ended.append(sample)

    state.listener = listener
    (said,) = finish(core_of(model, max_batch=2, blocks=5), [state]).values()
    assert sorted(ended) == [0, 1, 2]
    for sample, (text, num_tokens, finished) in enumerate(said):
        tokens = heard[sample][:-1] if finished == "stop" else heard[sample]
        assert len(heard[sample]) == num_tokens and " ".join(map(str, tokens)) == text


# ---- sampling parameters ----


def sampled(model: Transformer, **sampling: object) -> tuple[str, int, str]:
    core = core_of(model)
    core.stop_V[:] = False
    values = {"temperature": 0.0, "max_tokens": 12} | sampling
    state = RequestState(Request("r", (), SamplingParams(**values)), np.arange(9, dtype=np.int32), 12)  # type: ignore[arg-type]
    return finish(core, [state])["r"][0]


def test_a_stop_string_ends_the_response_before_it(model: Transformer) -> None:
    text, _, _ = sampled(model)
    words = text.split()
    place = next(i for i in range(3, len(words)) if words[i] not in words[:i])
    said, num_tokens, finish_reason = sampled(model, stop=("nothing", f" {words[place]}"))
    assert said == " ".join(words[:place]) and num_tokens == place + 1 and finish_reason == "stop"


def test_a_stop_token_ends_the_response_and_is_no_part_of_it(model: Transformer) -> None:
    words = sampled(model)[0].split()
    place = next(i for i in range(3, len(words)) if words[i] not in words[:i])
    said, num_tokens, finish_reason = sampled(model, stop_tokens=(int(words[place]), 5000))
    assert said == " ".join(words[:place]) and num_tokens == place + 1 and finish_reason == "stop"


def test_biases_and_penalties(model: Transformer) -> None:
    text, _, _ = sampled(model)
    first = int(text.split()[0])
    assert sampled(model, logit_bias=((first, -1e9),))[0].split()[0] != str(first)
    assert set(sampled(model, logit_bias=((3, 1e9),))[0].split()) == {"3"}
    once = sampled(model, presence_penalty=1e9)[0].split()
    assert len(set(once)) == len(once)
    assert sampled(model, repetition_penalty=1e6)[0] != text
    assert sampled(model, frequency_penalty=0.0, presence_penalty=0.0)[0] == text


# ---- attention ----


@pytest.mark.skipif(kernels.load() is None, reason="no compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache", list(kernels.CACHE_TYPES))
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_compiled_attention_equals_torchs(dtype: torch.dtype, cache: torch.dtype, seed: int) -> None:
    library = kernels.load()
    assert library is not None
    compare(partial(CompiledAttention, library), dtype, cache, seed)


def compare(make: Callable[..., AttentionBackend], dtype: torch.dtype, cache: torch.dtype, seed: int, device: str = "cpu") -> None:
    """A back-end beside torch's on a step of random shape."""
    draw = random.Random(seed)
    block = BlockConfig(*draw.choice(((4, 2, 8), (8, 1, 32), (3, 3, 48), (16, 2, 64), (2, 1, 20))), 16)
    config = ModelConfig("nemotron", 10, 32, (block,), 512, rotary_fraction=draw.choice((0.5, 1.0)))
    if draw.random() < 0.7:  # windows, caps, scales, layers that do not rotate: parts of other families
        family = draw.choice(("gemma2", "smollm3"))
        block = replace(block, window=draw.choice((0, 1, 7, 32, 33, 100)), rope="none" if family == "smollm3" else "global")
        factors = {"attention_scale": 0.7, "attention_soft_cap": draw.choice((None, 3.0, 50.0))} if family == "gemma2" else {}
        config = ModelConfig(family, 10, 32, (block,), 512, **factors)
    model = Transformer(config)
    with torch.inference_mode():
        angles = model.rope(torch.arange(512, device=device))
    caches = [KVCache(config, cache, torch.device(device)) for _ in range(2)]
    caches[0].allocate(48)
    torch.manual_seed(seed)
    fill(caches[0])
    caches[1].memory = caches[0].memory.clone()
    num_decodes, num_prefills = draw.randint(0, 3), draw.randint(0, 3)
    counts = [1] * num_decodes + [draw.randint(2, 70) for _ in range(num_prefills)] or [5]
    seq_lens = np.array([count + draw.randint(0, 120) for count in counts], np.int32)
    query_start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    blocks = list(range(48))
    draw.shuffle(blocks)
    block_tables = np.array(blocks, np.int32).reshape(8, 6)
    slots = np.array(draw.sample(range(8), len(counts)), np.int32)
    positions = np.concatenate([np.arange(n - c, n) for n, c in zip(seq_lens, counts, strict=True)])
    metadata = AttentionMetadata(query_start, seq_lens, slots, block_tables, positions.astype(np.int64), num_decodes)
    qkv = torch.randn(int(query_start[-1]) + 3, block.num_heads + 2 * block.num_kv_heads, block.head_dim).to(device, dtype)
    outs = []
    for attention in (
        make(config, caches[0], angles=angles),
        TorchAttention(config, caches[1], angles=angles),
    ):
        attention.prepare(metadata)
        with torch.inference_mode():
            outs.append(attention.attend(0, qkv))
    exact = dtype == cache == torch.float32
    far = 0.1 if cache in MAX_VALUES else 0.03  # where a number lies between two of the cache's, either is right
    assert torch.allclose(outs[0].float(), outs[1].float(), atol=2e-5 if exact else far, rtol=1e-4 if exact else 0.02)
    assert (outs[0][int(query_start[-1]) :] == 0).all() and (outs[1][int(query_start[-1]) :] == 0).all()
    kept = [stored(cache) for cache in caches]
    step = 0.15 if cache == torch.float8_e4m3fn else 0.02  # eighths, and int8's 127th of the largest
    same = torch.isclose(*kept, atol=1e-6 if cache == torch.float32 else 0.04, rtol=step, equal_nan=True)
    assert same.all(), "both store the same keys and values at the same places, and nothing else"


@pytest.mark.skipif(not kernels.has_tiles(), reason="no AMX")
@pytest.mark.parametrize("window", [0, 20])
def test_attention_by_tiles_of_a_token_does_not_depend_on_the_others(window: int) -> None:
    config = ModelConfig("gemma2", 10, 32, (BlockConfig(6, 2, 32, 16, window),), 512)
    library, qkv_THd = kernels.load(), torch.randn(100, 10, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert library is not None
    outs = []
    for ends in ([100], [33, 34, 100]):
        cache = KVCache(config, torch.bfloat16, torch.device("cpu"))
        cache.allocate(4)
        attention = CompiledAttention(library, config, cache, angles=Transformer(config).rope(torch.arange(512)))
        parts = []
        for start, end in zip([0, *ends], ends, strict=False):
            query_start, seq_lens, slots = (np.array(x, np.int32) for x in ([0, end - start], [end], [0]))
            attention.prepare(AttentionMetadata(query_start, seq_lens, slots, np.arange(4, dtype=np.int32)[None], np.arange(start, end), 0))
            parts.append(attention.attend(0, qkv_THd[start:end]))
        outs.append(torch.cat(parts))
    assert torch.equal(*outs)


def fill(cache: KVCache) -> None:
    """Numbers everywhere: as in blocks that others have used."""
    if not cache.scaled:
        cache.memory.normal_()
        return
    cache.memory.copy_(torch.randint(0, 0x7E, cache.memory.shape, dtype=torch.uint8))
    for at in cache.offsets:
        cache.memory[:, at[2] :].view(torch.float32).uniform_(0.001, 0.02)


def stored(cache: KVCache) -> Tensor:
    """All keys and values of a pool with one layer, [blocks, 2 K BLOCK_SIZE d] or so."""
    k_at, v_at, s_at = cache.offsets[0]
    if not cache.scaled:
        return cache.memory[:, k_at:s_at].float()
    kv_heads = (cache.width - s_at) // (2 * BLOCK_SIZE * 4)
    by_P2KL = cache.memory[:, s_at:].view(torch.float32).unflatten(1, (2, kv_heads, BLOCK_SIZE))
    values = cache.memory[:, :s_at].view(cache.dtype).float()
    keys = values[:, k_at:v_at].unflatten(1, (kv_heads, -1, BLOCK_SIZE)) * by_P2KL[:, 0, :, None]
    return torch.cat(
        [keys.flatten(1), (values[:, v_at:].unflatten(1, (kv_heads, BLOCK_SIZE, -1)) * by_P2KL[:, 1, :, :, None]).flatten(1)], 1
    )


@pytest.mark.skipif(kernels.load() is None, reason="no compiler")
def test_fp8_of_the_kernels_is_torchs() -> None:
    config = ModelConfig("nemotron", 10, 32, (BlockConfig(1, 1, 16, 16),), 512)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = torch.cat([every[every.isfinite()], torch.linspace(-448, 448, 2001), torch.linspace(-0.05, 0.05, 1001)])
    count = len(numbers) // 15
    value_Td = torch.cat([torch.full((count, 1), 448.0), numbers[: 15 * count].view(count, 15)], 1)  # so that the scale is 1
    qkv = torch.stack([torch.zeros(count, 16), torch.zeros(count, 16), value_Td], 1)
    cache = KVCache(config, torch.float8_e4m3fn, torch.device("cpu"))
    cache.allocate(-(-count // BLOCK_SIZE))
    library = kernels.load()
    assert library is not None
    attention = CompiledAttention(library, config, cache, angles=Transformer(config).rope(torch.arange(512)))
    table = np.arange(cache.memory.shape[0], dtype=np.int32)[None]
    attention.prepare(AttentionMetadata(*(np.array(x, np.int32) for x in ([0, count], [count], [0])), table, np.arange(count), 0))
    out = attention.attend(0, qkv)
    _, v_at, s_at = cache.offsets[0]
    kept_Td = cache.memory[:, v_at:s_at].reshape(-1, 16)[:count].view(torch.float8_e4m3fn).float()
    assert torch.equal(kept_Td, value_Td.to(torch.float8_e4m3fn).float())
    means_Td = kept_Td.double().cumsum(0) / torch.arange(1, count + 1)[:, None]
    assert torch.allclose(out[:, 0].double(), means_Td, atol=1e-3, rtol=1e-4), "queries of zeros see the mean of all values"
