"""Several adapters in one engine: each request gets what its own merged model would give, whatever is in flight or cached beside it."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from gristmill.core.errors import InputError
from gristmill.data.chat import Message
from gristmill.data.chat_format import FORMATS
from gristmill.data.tokenizer import Tokenizer
from gristmill.engine.async_engine import AsyncEngine, TokenEvent
from gristmill.engine.engine import Engine
from gristmill.engine.model_runner import ModelRunner
from gristmill.generation.api import Completion, Request, SamplingParams
from gristmill.model.adapters import Adapter
from gristmill.model.config import ModelConfig, uniform_blocks
from gristmill.model.lora import LoraConfig, adapter_parts, add_adapters, merge_adapter
from gristmill.model.transformer import Transformer

FORMAT = FORMATS["chatml"]
WORDS = "land river seven apples in the what is of mill wheat stone"
TOKENIZER = Tokenizer.train([WORDS] * 5, 320, FORMAT.special_tokens)
SAMPLING = SamplingParams(temperature=0.0, max_tokens=6)
LONG = "the land of the river is what seven mill apples in stone wheat " * 8  # some blocks


def base(family: str = "llama") -> Transformer:
    rotary = 0.5 if family == "nemotron" else 1.0
    config = ModelConfig(family, TOKENIZER.vocab_size, 32, uniform_blocks(2, 4, 2, 8, 64), 256, rotary_fraction=rotary, init_std=0.2)
    return Transformer(config)


def make_adapter(family: str, seed: int, **config: Any) -> Adapter:
    lora = LoraConfig(rank=2 + seed, alpha=4.0, **config)
    model = base(family)
    add_adapters(model, lora, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in adapter_parts(model).values():
            part.lora_B.normal_(0, 0.3, generator=generator)
    return Adapter(lora, adapter_parts(model), "")


def adapters(family: str) -> dict[str, Adapter]:
    return {"a": make_adapter(family, 1), "b": make_adapter(family, 2, targets=("q_proj", "v_proj", "down_proj"), rslora=True)}


def merged(family: str, name: str, **options: Any) -> Engine:
    model = base(family)
    if name:
        merge_adapter(model, adapters(family)[name].matrices)
    return Engine(model, TOKENIZER, FORMAT, name="merged", **options)


def engine(family: str, **options: Any) -> Engine:
    made = Engine(base(family), TOKENIZER, FORMAT, name="base", **options)
    for name, adapter in adapters(family).items():
        made.add_adapter(name, adapter)
    return made


def ask(adapter: str, number: int, text: str = "") -> Request:
    sampling = replace(SAMPLING, temperature=float(number % 2))
    return Request(f"{adapter}{number}", (Message("user", text or f"seven apples {number}"),), sampling, adapter=adapter)


def run(made: Engine, requests: list[Request]) -> dict[str, list[Completion]]:
    return {request.id: completions for request, completions in made.generate(requests)}


def assert_same(ours: list[Completion], theirs: list[Completion]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.tokens == b.tokens
        assert torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "nemotron", "qwen2"])
def test_adapters_in_one_batch_answer_as_their_merged_models(family: str) -> None:
    requests = [ask(name, number) for number in range(4) for name in ("a", "", "b", "a")[: 3 if number else 4]]
    requests = list({request.id: request for request in requests}.values())
    found = run(engine(family, max_batch=16), requests)
    for name in ("", "a", "b"):
        alone = [request for request in requests if request.adapter == name]
        expected = run(merged(family, name), [replace(request, adapter="") for request in alone])
        for request in alone:
            assert_same(found[request.id], expected[request.id])
    assert len({found[f"{name}1"][0].tokens for name in ("", "a", "b")}) == 3


def test_a_cached_prompt_is_not_served_to_another_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    computed: list[int] = []
    forward = ModelRunner.run
    monkeypatch.setattr(ModelRunner, "run", lambda self, step: computed.append(sum(step.num_tokens)) or forward(self, step))  # type: ignore[func-returns-value]
    requests = [ask(name, 2 * number, LONG) for number in range(2) for name in ("", "a", "b")]
    found = run(engine("llama", max_batch=1, cache_tokens=2048), requests)
    assert sum(one > 90 for one in computed) == 3  # each reads the prompt once, and finds its own blocks the second time
    together = run(engine("llama", max_batch=8), requests)  # nor are equal prompts of one step read once for all
    for name in ("", "a", "b"):
        expected = run(merged("llama", name), [ask("", 0, LONG)])["0"]
        for number in (0, 2):
            assert_same(found[f"{name}{number}"], expected)
            assert_same(together[f"{name}{number}"], expected)


def test_an_adapter_that_is_loaded_again_reads_nothing_of_the_former() -> None:
    made = engine("llama", max_batch=1, cache_tokens=2048)

    def requests() -> Any:
        yield ask("a", 0, LONG)
        while made.stats.output_tokens < SAMPLING.max_tokens:  # its blocks are in the cache now
            yield ask("", 0)
        made.remove_adapter("a")
        made.add_adapter("a", adapters("llama")["b"])
        yield ask("a", 2, LONG)

    found = run(made, requests())
    assert_same(found["a2"], run(merged("llama", "b"), [ask("", 2, LONG)])["2"])
    assert_same(found["a0"], run(merged("llama", "a"), [ask("", 0, LONG)])["0"])


def test_preempted_requests_keep_their_adapter() -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=60)
    core = engine("llama", max_batch=8, cache_tokens=40 * 32).core()
    made = engine("llama")
    states = [made.prepare(Request(f"{name}{i}", (Message("user", LONG),), sampling, adapter=name)) for i in range(3) for name in "ab"]
    for state in states:
        core.add(state)
    for number in itertools.count():
        core.step()
        if core.idle:
            break
        if number < 12:  # as when blocks run out
            core.scheduler._preempt(core.scheduler.running[number % len(core.scheduler.running)])
    assert core.scheduler.num_preemptions == 12
    for name in "ab":
        expected = run(merged("llama", name), [Request("x", (Message("user", LONG),), sampling)])["x"]
        for state in states:
            if state.request.adapter == name:
                assert_same([c for c in state.completions if c is not None], expected)


@pytest.mark.parametrize(("quantize", "cache"), [("int8", None), ("int8-weight", None), ("", torch.bfloat16)])
def test_adapters_beside_a_quantized_model(quantize: Any, cache: torch.dtype | None) -> None:
    made = engine("nemotron", quantize=quantize, cache_dtype=cache, own=bool(quantize))
    found, exact = run(made, [ask("a", 0)])["a0"], run(merged("nemotron", "a"), [ask("", 0)])["0"]
    assert abs(found[0].logprobs[0] - exact[0].logprobs[0]) < 0.15
    plain = run(Engine(base("nemotron"), TOKENIZER, FORMAT, name="x", quantize=quantize, cache_dtype=cache), [ask("", 0)])["0"]
    assert_same(run(made, [ask("", 0)])["0"], plain)


def test_prompts_are_scored_with_an_adapter() -> None:
    ids = TOKENIZER.encode(LONG)[:40]
    ours, theirs = engine("llama").prompt_logprobs(ids, 3, "a"), merged("llama", "a").prompt_logprobs(ids, 3)
    torch.testing.assert_close(torch.tensor(ours[0]), torch.tensor(theirs[0]), rtol=1e-4, atol=1e-4)
    assert [[token for token, _ in best] for best in ours[1]] == [[token for token, _ in best] for best in theirs[1]]


def test_a_step_has_as_many_adapters_as_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    seen: list[int] = []
    forward = ModelRunner.run

    def count(self: ModelRunner, step: Any) -> torch.Tensor:
        seen.append(len({s.state.adapter for s in step.sequences} - {None}))
        return forward(self, step)

    monkeypatch.setattr(ModelRunner, "run", count)
    requests = [ask(name, number) for number in range(3) for name in ("a", "", "b")]
    assert len(run(engine("llama", max_loras=1), requests)) == 9 and max(seen) == 1
    seen.clear()
    assert len(run(engine("llama", max_loras=2), requests)) == 9 and max(seen) == 2


def test_what_cannot_be_served_is_one_sentence() -> None:
    made = engine("llama")
    with pytest.raises(InputError, match="no adapter 'c'"):
        run(made, [ask("c", 0)])
    with pytest.raises(InputError, match="'a' is loaded already"):
        made.add_adapter("a", adapters("llama")["a"])
    with pytest.raises(InputError, match="'base' is loaded already"):
        made.add_adapter("base", adapters("llama")["a"])
    with pytest.raises(InputError, match="Merge the adapter 'd'"):
        made.add_adapter("d", make_adapter("llama", 1, dora=True))
    with pytest.raises(InputError, match="no adapter 'd' to unload"):
        made.remove_adapter("d")


def test_a_request_under_way_keeps_an_adapter_that_is_unloaded() -> None:
    made = engine("llama")
    events: list[TokenEvent] = []
    server = AsyncEngine(made, events.extend)
    state = made.prepare(ask("a", 0))
    made.remove_adapter("a")
    server.start()
    try:
        server.submit(state)
        while not any(event.sample == -1 for event in list(events)):
            pass
    finally:
        server.stop()
    assert_same([c for c in state.completions if c is not None], run(merged("llama", "a"), [ask("", 0)])["0"])
