"""Against transformers, the packed forward pass and itself, on small random models and a small tokenizer."""

import itertools
import random
from pathlib import Path

import pytest
import torch

from gristmill.core.errors import InputError
from gristmill.data.chat import Message
from gristmill.data.chat_format import FORMATS
from gristmill.data.tokenizer import Tokenizer
from gristmill.engine import engine as engine_module
from gristmill.engine.engine import Engine, _RoundRobin
from gristmill.engine.kernels import library as kernels
from gristmill.generation.api import Completion, Request, SamplingParams
from gristmill.model.config import BlockConfig, ModelConfig
from gristmill.model.hf_save import save_model
from gristmill.model.packed import PackedShape
from gristmill.model.transformer import Transformer

WORDS = ["land", "river", "seven", "apples", "in", "the", "what", "is", "of", "mill", "wheat", "stone"]
FORMAT = FORMATS["nemotron"]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([" ".join(WORDS) for _ in range(5)], 320, FORMAT.special_tokens)


def build_model(family: str, vocab_size: int, blocks: tuple[BlockConfig, ...], max_positions: int = 128) -> Transformer:
    config = ModelConfig(
        family,
        vocab_size,
        32,
        blocks,
        max_positions,
        rotary_fraction=0.5 if family == "nemotron" else 1.0,
        init_std=0.2,
    )
    return Transformer(config)


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> Transformer:
    return build_model("nemotron", tokenizer.vocab_size, (BlockConfig(4, 2, 8, 64),) * 2)


def request(index: int, sampling: SamplingParams, num_words: int | None = None) -> Request:
    draw = random.Random(index)
    words = [draw.choice(WORDS) for _ in range(draw.randint(1, 20) if num_words is None else num_words)]
    return Request(f"r{index}", (Message("user", " ".join(words)),), sampling, seed=index)


def run(engine: Engine, requests: list[Request]) -> dict[str, list]:
    return {request.id: completions for request, completions in engine.generate(requests)}


GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
RANDOM = SamplingParams(temperature=1.0, max_tokens=15)


def make_engine(model: Transformer, tokenizer: Tokenizer, max_batch: int = 8) -> Engine:
    return Engine(model, tokenizer, FORMAT, name="test", max_batch=max_batch)


def same(left: list[Completion], right: list[Completion]) -> bool:
    """Equal but for the last digits of log-probabilities."""
    return all(
        (a.text, a.num_tokens, a.finish) == (b.text, b.num_tokens, b.finish)
        and torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4)
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("family", ["nemotron", "llama", "qwen3"])
def test_greedy_equals_transformers(family: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    model = build_model(family, tokenizer.vocab_size, (BlockConfig(4, 2, 8, 64),) * 2)
    save_model(model, tokenizer, tmp_path / "model")
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    requests = [request(i, GREEDY, num_words=12 * i + 1 if i > 3 else None) for i in range(6)]
    expected = {}
    for one in requests:
        prompt = FORMAT.render_prompt(one.messages, tokenizer)
        ids = hf.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=GREEDY.max_tokens,
            do_sample=False,
            eos_token_id=[FORMAT.end_of_turn_id(tokenizer), tokenizer.eos_id],
            pad_token_id=tokenizer.eos_id,
        )[0, len(prompt) :].tolist()
        stopped = ids[-1] in (FORMAT.end_of_turn_id(tokenizer), tokenizer.eos_id)
        text = FORMAT.response_text(ids[:-1] if stopped else ids, tokenizer)
        expected[one.id] = (text, len(ids), "stop" if stopped else "length")
    assert len({e[0] for e in expected.values()}) > 1
    neighbours = [request(100 + i, RANDOM) for i in range(9)]
    # alone, in company, where others are preempted for want of blocks, and by the other attention backend
    for max_batch, extra, cache, compiled in [
        (1, [], None, True),
        (3, neighbours, None, True),
        (16, neighbours, None, True),
        (16, neighbours, 128, True),
        (16, neighbours, 128, False),
    ]:
        if not compiled:
            monkeypatch.setattr(kernels, "load", lambda: None)
        engine = Engine(model, tokenizer, FORMAT, name="test", max_batch=max_batch, cache_tokens=cache)
        assert engine.core().model_runner.attention.name == ("compiled" if kernels.load() else "torch")
        got = run(engine, [*extra, *requests, *requests])
        assert {k: (got[k][0].text, got[k][0].num_tokens, got[k][0].finish) for k in expected} == expected


def test_samples_do_not_depend_on_neighbours_or_order(model: Transformer, tokenizer: Tokenizer) -> None:
    requests = [request(i, SamplingParams(max_tokens=5 + i, n=1 + i % 3, top_p=0.9 if i % 2 else 1.0)) for i in range(10)]
    engine = make_engine(model, tokenizer)
    together = run(engine, requests)
    reverse = run(make_engine(model, tokenizer, max_batch=5), requests[::-1])
    for one in requests:
        alone = run(engine, [one])[one.id]
        assert len(alone) == one.sampling.n
        assert same(together[one.id], alone) and same(reverse[one.id], alone)


def test_workers_generate_what_one_does(model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "STEP_PRODUCTS", 1)
    requests = [request(i, sampling) for i in range(12) for sampling in (SamplingParams(temperature=1.0, max_tokens=3 + i, n=1 + i % 5),)]
    alone = run(make_engine(model, tokenizer), requests)
    torch.set_num_threads(3)
    try:
        engine = make_engine(model, tokenizer, max_batch=7)
        together = run(engine, requests)
        with pytest.raises(InputError, match="leaves no room"):
            run(engine, [*requests, request(99, GREEDY, num_words=200)])
    finally:
        torch.set_num_threads(1)
    assert alone.keys() == together.keys() and all(same(alone[name], together[name]) for name in alone)
    assert engine.stats.output_tokens >= sum(c.num_tokens for completions in together.values() for c in completions)


def test_few_rows_of_a_small_model_are_one_workers(model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the rows that can be in flight: no more than are asked for, a sample each."""
    torch.set_num_threads(3)
    try:
        engine = make_engine(model, tokenizer, max_batch=100)
    finally:
        torch.set_num_threads(1)
    monkeypatch.setattr(engine_module, "STEP_PRODUCTS", 10 * sum(p.numel() for p in model.parameters()))
    assert [engine.useful_workers(count) for count in (1, 19, 20, 30, 99)] == [1, 1, 2, 3, 3]
    made: list[int] = []
    core = engine.core
    monkeypatch.setattr(engine, "core", lambda num_workers: (made.append(num_workers), core(num_workers))[1])
    twice, few = SamplingParams(max_tokens=2, n=2), [request(i, GREEDY) for i in range(19)]
    for requests in (few, [request(i, twice) for i in range(10)], iter(few)):
        assert len(list(engine.generate(requests))) in (10, 19)
    assert sorted(made) == [1, *[2] * 2, *[3] * 3]


def test_which_worker_has_which_request_does_not_depend_on_their_speed() -> None:
    dealt = _RoundRobin((request(i, GREEDY) for i in range(7)), 3)
    last, first, middle = (list(dealt.of_worker(number)) for number in (2, 0, 1))
    assert [[r.id for r in share] for share in (first, middle, last)] == [["r0", "r3", "r6"], ["r1", "r4"], ["r2", "r5"]]


def test_requests_of_one_prompt_are_dealt_to_one_worker() -> None:
    twice = [Request(f"{r.id}-{mode}", r.messages) for r in (request(i, GREEDY) for i in range(5)) for mode in "ab"]
    dealt = _RoundRobin(twice, 2)
    assert [[r.id for r in dealt.of_worker(n)] for n in (0, 1)] == [
        ["r0-a", "r0-b", "r2-a", "r2-b", "r4-a", "r4-b"],
        ["r1-a", "r1-b", "r3-a", "r3-b"],
    ]
    same = _RoundRobin((Request(str(i), twice[0].messages) for i in range(24)), 2)  # and no worker is idle for that
    assert [len(list(same.of_worker(n))) for n in (0, 1)] == [16, 8]


def test_equal_prompts_are_prefilled_once(model: Transformer, tokenizer: Tokenizer) -> None:
    hot, cold = SamplingParams(temperature=1.0, max_tokens=8, n=2), SamplingParams(temperature=0.0, max_tokens=8)
    first, other = request(1, hot, num_words=9), request(2, hot, num_words=5)
    greedy = Request("greedy", first.messages, cold)
    engine = make_engine(model, tokenizer)
    together = run(engine, [first, other, greedy])
    prompts = [len(FORMAT.render_prompt(r.messages, tokenizer)) for r in (first, other)]
    assert engine.stats.prompt_tokens == sum(prompts)
    for one in (first, other, greedy):
        assert same(together[one.id], run(make_engine(model, tokenizer), [one])[one.id])


def test_samples_are_distinct_and_reproducible(model: Transformer, tokenizer: Tokenizer) -> None:
    base = request(3, SamplingParams(n=6, max_tokens=10))
    engine = make_engine(model, tokenizer, max_batch=4)  # n exceeds the rows
    first, again = run(engine, [base])[base.id], run(engine, [base])[base.id]
    assert same(first, again)
    assert len({c.text for c in first}) > 3
    other = Request(base.id, base.messages, base.sampling, seed=base.seed + 1)
    assert [c.text for c in run(engine, [other])[base.id]] != [c.text for c in first]
    # Another id with the same words and seed is another draw.
    other_id = Request("other", base.messages, base.sampling, seed=base.seed)
    assert [c.text for c in run(engine, [other_id])["other"]] != [c.text for c in first]


def different_layers(tokenizer: Tokenizer) -> Transformer:
    blocks = (
        BlockConfig(4, 2, 8, 64),
        BlockConfig(0, 0, 8, 32),
        BlockConfig(4, 1, 8, 0),
        BlockConfig(2, 2, 8, 16),
    )
    return build_model("llama", tokenizer.vocab_size, blocks)


def test_logprobs_equal_the_packed_forward(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    model = different_layers(tokenizer)
    engine = make_engine(model, tokenizer, max_batch=4)
    seen: dict[str, list[int]] = {}
    # Read the raw ids where they become text: text does not always encode back to the same ids.
    decode = tokenizer.decode

    def note(ids: list[int], *, continued: bool = False) -> str:
        seen[decode(ids)] = ids
        return decode(ids)

    monkeypatch.setattr(tokenizer, "decode", note)
    requests = [request(i, SamplingParams(temperature=0.7, top_k=20, max_tokens=3 + 2 * i)) for i in range(7)]
    got = run(engine, requests)
    for one in requests:
        completion = got[one.id][0]
        raw = next(ids for text, ids in seen.items() if text.removesuffix("\n") == completion.text)
        prompt = FORMAT.render_prompt(one.messages, tokenizer)
        ids = torch.tensor(prompt + raw)
        logits = model(ids, PackedShape.from_lengths([len(ids)])).detach()
        want = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1].gather(-1, ids[len(prompt) :, None])[:, 0]
        assert len(completion.logprobs) == completion.num_tokens
        torch.testing.assert_close(torch.tensor(completion.logprobs)[: len(raw)], want, atol=1e-4, rtol=0)


def test_stops_at_end_of_turn(model: Transformer, tokenizer: Tokenizer) -> None:
    engine = make_engine(model, tokenizer)
    one = request(5, GREEDY)
    plain = run(engine, [one])[one.id][0]
    assert plain.finish == "length" and plain.num_tokens == GREEDY.max_tokens == len(plain.logprobs)
    prompt = FORMAT.render_prompt(one.messages, tokenizer)
    chosen: list[int] = []
    for _ in range(GREEDY.max_tokens):
        ids = torch.tensor(prompt + chosen)
        chosen.append(int(model(ids, PackedShape.from_lengths([len(ids)]))[-1].argmax()))
    # Let the first token that is new after the third place end the turn.
    at = next(i for i in range(3, len(chosen)) if chosen[i] not in chosen[:i])
    engine.stop_V[chosen[at]] = True
    stopped = run(engine, [one])[one.id][0]
    assert (stopped.finish, stopped.num_tokens) == ("stop", at + 1)
    assert stopped.text == FORMAT.response_text(chosen[:at], tokenizer)
    assert stopped.logprobs == pytest.approx(plain.logprobs[: at + 1], abs=1e-5)


def test_a_continued_text_keeps_what_a_turn_ends_with(model: Transformer, tokenizer: Tokenizer) -> None:
    (newline,) = tokenizer.encode("\n")
    assert FORMAT.close == "\n"
    only = SamplingParams(temperature=0.0, max_tokens=2, logit_bias=((newline, 100.0),))
    talk = request(5, only)
    text = Request("text", (), only, prompt_ids=tuple(FORMAT.render_prompt(talk.messages, tokenizer)))
    found = run(make_engine(model, tokenizer), [talk, text])
    assert (found[talk.id][0].text, found["text"][0].text) == ("\n", "\n\n")


def test_both_stop_tokens_are_known(model: Transformer, tokenizer: Tokenizer) -> None:
    stops = make_engine(model, tokenizer).stop_V.nonzero()[0].tolist()
    assert sorted(stops) == sorted({FORMAT.end_of_turn_id(tokenizer), tokenizer.eos_id})


def test_rows_are_refilled_and_requests_are_pulled_late(model: Transformer, tokenizer: Tokenizer) -> None:
    pulled: list[int] = []

    def source() -> itertools.chain:
        for i in range(7):
            pulled.append(i)
            yield request(i, SamplingParams(max_tokens=40 if i == 0 else 4))

    engine = make_engine(model, tokenizer, max_batch=2)
    engine.stop_V[:] = False
    order, ahead = [], []
    for one, _ in engine.generate(source()):
        order.append(one.id)
        ahead.append(len(pulled) - len(order))
    assert sorted(order) == [f"r{i}" for i in range(7)]
    # Six short ones pass through the second row while the long one runs.
    assert order[-1] == "r0"
    assert max(ahead) <= 2
    assert engine.stats.output_tokens == 40 + 6 * 4
    assert engine.stats.prompt_tokens == sum(len(FORMAT.render_prompt(request(i, RANDOM).messages, tokenizer)) for i in range(7))
    assert engine.stats.seconds > 0


def test_samples_of_a_request_share_one_prefill(model: Transformer, tokenizer: Tokenizer) -> None:
    one = request(2, SamplingParams(n=5, max_tokens=3))
    engine = make_engine(model, tokenizer)
    run(engine, [one])
    assert engine.stats.prompt_tokens == len(FORMAT.render_prompt(one.messages, tokenizer))


def test_no_requests(model: Transformer, tokenizer: Tokenizer) -> None:
    assert list(make_engine(model, tokenizer).generate([])) == []


def test_interleaved_and_abandoned_calls(model: Transformer, tokenizer: Tokenizer) -> None:
    engine = make_engine(model, tokenizer, max_batch=2)
    requests = [request(i, RANDOM) for i in range(6)]
    expected = run(engine, requests)
    abandoned = engine.generate(requests)
    next(abandoned)
    left, right = engine.generate(requests), engine.generate(requests[::-1])
    got = {one.id: (a, b) for (one, a), (_, b) in zip(sorted_by_id(left), sorted_by_id(right), strict=True)}
    abandoned.close()
    assert all(same(expected[k], a) and same(expected[k], b) for k, (a, b) in got.items())
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def sorted_by_id(pairs: object) -> list[tuple[Request, list[Completion]]]:
    return sorted(pairs, key=lambda pair: pair[0].id)  # type: ignore[call-overload]


def test_caller_can_train_between_results(model: Transformer, tokenizer: Tokenizer) -> None:
    for _ in make_engine(model, tokenizer).generate([request(0, RANDOM), request(1, RANDOM)]):
        ids = torch.arange(5)
        model(ids, PackedShape.from_lengths([5])).sum().backward()
    assert model.embedding.grad is not None
    model.zero_grad()


def test_context_limit_ends_the_answer(model: Transformer, tokenizer: Tokenizer) -> None:
    one = request(0, SamplingParams(max_tokens=10_000), num_words=5)
    engine = make_engine(model, tokenizer)
    engine.stop_V[:] = False
    completion = run(engine, [one])[one.id][0]
    assert completion.finish == "length"
    assert completion.num_tokens == 128 - len(FORMAT.render_prompt(one.messages, tokenizer))


def test_too_long_prompt_is_refused_before_work(model: Transformer, tokenizer: Tokenizer) -> None:
    engine = make_engine(model, tokenizer)
    with pytest.raises(InputError, match="'r7'.*shorten"):
        list(engine.generate([request(0, RANDOM), request(7, RANDOM, num_words=150)]))
    assert engine.stats.prompt_tokens == 0


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"max_tokens": 0},
        {"n": 0},
    ],
)
def test_bad_sampling_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        SamplingParams(**bad)  # type: ignore[arg-type]


def test_loglikelihood_counts_assistant_tokens(model: Transformer, tokenizer: Tokenizer) -> None:
    conversations = [
        (Message("user", "what is the land"), Message("assistant", "seven apples")),
        (
            Message("system", "in the mill"),
            Message("user", "river"),
            Message("assistant", "stone"),
            Message("user", "what"),
            Message("assistant", "wheat of the river"),
        ),
    ]
    got = make_engine(model, tokenizer).loglikelihood(conversations)
    for messages, (total, count) in zip(conversations, got, strict=True):
        rendered = FORMAT.render(messages, tokenizer)
        ids = torch.tensor(rendered.ids)
        logprobs = torch.log_softmax(model(ids, PackedShape.from_lengths([len(ids)])).detach(), -1)
        want = sum(float(logprobs[i - 1, ids[i]]) for i in range(1, len(ids)) if rendered.mask[i])
        assert count == sum(rendered.mask)
        assert total == pytest.approx(want, abs=1e-3)


def test_text_loglikelihood(model: Transformer, tokenizer: Tokenizer) -> None:
    texts = ["the river", "", "seven apples in the mill of stone " * 40]
    got = make_engine(model, tokenizer).text_loglikelihood(texts)
    for text, (total, count) in zip(texts, got, strict=True):
        ids = tokenizer.encode(text)
        want, tokens = 0.0, 0
        for begin in range(0, len(ids), 128):
            piece = torch.tensor(ids[begin : begin + 128])
            logprobs = torch.log_softmax(model(piece, PackedShape.from_lengths([len(piece)])).detach(), -1)
            want += float(logprobs[:-1].gather(-1, piece[1:, None]).sum())
            tokens += len(piece) - 1
        assert (count, total) == (tokens, pytest.approx(want, abs=1e-2))
    assert len(tokenizer.encode(texts[2])) > 128


def test_too_long_conversation_is_refused(model: Transformer, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="Conversation 0"):
        make_engine(model, tokenizer).loglikelihood([(Message("user", "river " * 200), Message("assistant", "no"))])


def test_bf16_copy_leaves_the_model_alone(model: Transformer, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, FORMAT, name="half", max_batch=4, dtype=torch.bfloat16)
    got = run(engine, [request(i, RANDOM) for i in range(5)])
    assert len(got) == 5 and model.embedding.dtype == torch.float32 and model.compute_dtype == torch.float32
    exact = make_engine(model, tokenizer).text_loglikelihood(["the river of wheat"])[0][0]
    assert engine.text_loglikelihood(["the river of wheat"])[0][0] == pytest.approx(exact, rel=0.05)


def test_a_call_that_has_ended_lets_go_of_its_cache(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(build_model("llama", tokenizer.vocab_size, (BlockConfig(4, 2, 8, 64),)), tokenizer)
    cores, core = [], engine.core
    monkeypatch.setattr(engine, "core", lambda *args: cores.append(core(*args)) or cores[-1])
    run(engine, [request(1, GREEDY)])
    for _ in engine.generate([request(1, GREEDY), request(2, GREEDY)]):
        break  # the others are not wanted
    assert len(cores) > 1 and all(one.model_runner.kv_cache.memory.numel() == 0 for one in cores)
