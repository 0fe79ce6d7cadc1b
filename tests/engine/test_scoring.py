"""Log-likelihood scoring: the same sums as text by text, whatever is shared, cut in steps or quantized; shared prefixes computed once."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from gristmill.core.errors import InputError
from gristmill.engine.engine import Engine
from gristmill.engine.load import EngineArgs, load_engine
from gristmill.engine.scoring import Continuation
from gristmill.model.packed import PackedShape


def family(engine: Engine, shared: int = 150) -> list[Continuation]:
    """Continuations as of a benchmark: few long beginnings, questions after them, answers of one token and of several."""
    draw, size = random.Random(0), engine.model.config.vocab_size
    ids = lambda num: [draw.randrange(size) for _ in range(num)]  # noqa: E731
    items = []
    for shots in (ids(shared), ids(shared), []):
        for _ in range(3):
            context = shots + ids(draw.randrange(1, 40))
            lengths = draw.choice([(1, 1, 1, 1), (1, 5, 2, 40)])
            items += [Continuation(context + ids(num), num) for num in lengths]
    answer = ids(70)  # answers that begin alike are shared no further than where the first logits are read
    items += [Continuation([*ids(9), *answer, one, 7], 72) for one in (1, 2)]
    items += [Continuation([3, 4, *answer, one, 7], 72) for one in (1, 2)]
    draw.shuffle(items)
    return items


def by_text(engine: Engine, item: Continuation) -> tuple[float, bool]:
    logprobs, best = engine.prompt_logprobs(item.ids, 1)
    greedy = [likeliest[0][0] == token for likeliest, token in zip(best, item.ids[1:], strict=True)]
    return sum(logprobs[-item.num_tokens :]), all(greedy[-item.num_tokens :])


@pytest.mark.parametrize("step_tokens", [None, 33])
def test_scores_equal_those_of_each_text_and_prefixes_are_computed_once(random_base: Path, step_tokens: int | None) -> None:
    engine = load_engine(random_base, EngineArgs(step_tokens=step_tokens, device="cpu"))
    items = family(engine)
    found = {scored.index: scored for scored in engine.continuations(items)}
    assert sorted(found) == list(range(len(items)))
    computed = engine.stats.prompt_tokens
    for index, item in enumerate(items):
        logprob, greedy = by_text(engine, item)
        assert found[index].logprob == pytest.approx(logprob, abs=1e-4)
        assert found[index].greedy == greedy
    # 2 x 4 whole blocks of the shots once a worker; of each question its own tokens, and a block that is not full for each answer
    assert computed < 0.35 * sum(len(item.ids) - 1 for item in items)


def test_greedy_continuations_are_told(random_base: Path) -> None:
    engine = load_engine(random_base, EngineArgs(device="cpu"))
    likeliest = engine.prompt_logprobs([5, 6, 7, 0, 0], 1)[1][2][0][0]
    items = [Continuation([5, 6, 7, token], 1) for token in range(engine.model.config.vocab_size)]
    assert [scored.index for scored in engine.continuations(items) if scored.greedy] == [likeliest]


def test_few_rows_of_logits_at_a_time(random_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load_engine(random_base, EngineArgs(device="cpu"))
    monkeypatch.setattr("gristmill.engine.scoring.MAX_LOGIT_ELEMENTS", 7 * engine.model.config.vocab_size)
    item = Continuation([3 + i % 50 for i in range(257)], 256)  # the last token is only predicted: one more than the context
    (scored,) = engine.continuations([item])
    whole = sum(engine.prompt_logprobs(list(item.ids[:256]), 1)[0])
    last = torch.log_softmax(engine.logits(engine.model.hidden(*_packed(engine, item.ids[:256]))[-1:]), -1)[0, item.ids[256]]
    assert scored.logprob == pytest.approx(whole + float(last), abs=1e-3)
    with pytest.raises(InputError, match="shorten it"):
        list(engine.continuations([Continuation([1] * 258, 3)]))


def _packed(engine: Engine, ids: Sequence[int]) -> tuple[torch.Tensor, PackedShape]:
    return torch.tensor(ids), PackedShape.from_lengths([len(ids)], engine.device)


def test_a_quantized_engine_scores_by_what_it_computes(random_base: Path) -> None:
    engine = load_engine(random_base, EngineArgs(quantize="int8", device="cpu"))
    items = family(engine, shared=64)[:6]
    found = {scored.index: scored.logprob for scored in engine.continuations(items)}
    for index, item in enumerate(items):
        assert found[index] == pytest.approx(by_text(engine, item)[0], abs=0.05)
