"""Preference training through a real model: the first loss, the references, and what a pair's mask covers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import normalizers

from gristmill.core.errors import InputError
from gristmill.data.chat import Message
from gristmill.data.chat_format import FORMATS
from gristmill.data.rows import Pair
from gristmill.data.tokenizer import Tokenizer
from gristmill.model.config import BlockConfig, ModelConfig
from gristmill.model.lora import LoraConfig, add_adapters
from gristmill.model.transformer import Transformer
from gristmill.train.batches import PairBatch, PairSample, Sample, collate_pairs
from gristmill.train.objectives import preference
from gristmill.train.objectives.preference import (
    PreferenceObjective,
    compute_reference_logprobs,
    pair_samples,
    response_logprobs,
)
from gristmill.train.trainer import Trainer, TrainSettings, compute_precision

Make = Callable[..., Transformer]
MakePairs = Callable[..., list[PairSample]]
CPU = torch.device("cpu")


def with_a_stranger(side: Sample) -> PairBatch:
    """One side, which shares nothing with the other of its pair."""
    other = Sample([(int(side.ids[0]) + 1) % 48, 1], [False, True])
    return collate_pairs([PairSample(side, other)], CPU)


def first_loss(model: Transformer, pairs: Sequence[PairSample], **settings: object) -> float:
    output = PreferenceObjective(**settings)(model, collate_pairs(pairs, CPU))  # type: ignore[arg-type]
    return output.sum.item() / output.count


def test_the_first_dpo_loss_is_ln_2_packed(make_model: Make, make_pairs: MakePairs) -> None:
    model = make_model()
    pairs = compute_reference_logprobs(model, make_pairs(9), micro_batch_tokens=40)
    # micro-batches of another cut than the reference's: packing changes no log-probability
    assert first_loss(model, pairs, beta=0.1) == pytest.approx(math.log(2), abs=1e-6)
    assert first_loss(model, pairs[:4], beta=0.1) == pytest.approx(math.log(2), abs=1e-6)
    assert first_loss(model, pairs, loss="ipo", beta=0.1) == pytest.approx(25.0, abs=1e-3)
    equal = [replace(pair, chosen_reward=1.0, rejected_reward=1.0) for pair in pairs]
    assert first_loss(model, equal, loss="rpo") == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("base", "precision"), [("fp32", "fp32"), ("int8", "bf16")])
def test_the_base_with_adapters_off_is_the_reference(
    make_model: Make, make_pairs: MakePairs, base: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    add_adapters(model, LoraConfig(rank=4, alpha=8.0), seed=0, base=base)
    monkeypatch.setattr(preference, "num_workers", lambda model: 2)  # each thread switches them off for itself
    pairs = compute_reference_logprobs(model, make_pairs(9), micro_batch_tokens=40, precision=precision)
    with compute_precision(model, precision):
        assert first_loss(model, pairs, beta=0.1) == pytest.approx(math.log(2), abs=1e-6 if precision == "fp32" else 1e-3)
    Trainer(model, PreferenceObjective(), TrainSettings(lr=1e-2, steps=9, batch_size=9, precision=precision)).fit(pairs)
    with compute_precision(model, precision):
        assert first_loss(model, pairs, beta=0.1) < 0.6
    again = compute_reference_logprobs(model, pairs, micro_batch_tokens=40, precision=precision)
    assert [(pair.ref_chosen, pair.ref_rejected) for pair in again] == [(pair.ref_chosen, pair.ref_rejected) for pair in pairs]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_shared_prompt_changes_no_logprob_and_no_gradient(make_model: Make, make_pairs: MakePairs, precision: str) -> None:
    model, pairs = make_model(), make_pairs(6)
    batch = collate_pairs(pairs, CPU)
    assert batch.num_tokens < sum(side.num_tokens for pair in pairs for side in (pair.chosen, pair.rejected))
    weights_N = torch.randn(12, generator=torch.Generator().manual_seed(0))
    with compute_precision(model, precision):
        together_N = response_logprobs(model, batch)
        grads = torch.autograd.grad((together_N * weights_N).sum(), list(model.parameters()))
        sides = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
        alone_N = torch.cat([response_logprobs(model, with_a_stranger(side))[:1] for side in sides])
        alone_grads = torch.autograd.grad((alone_N * weights_N).sum(), list(model.parameters()))
    near = {"rtol": 1e-5, "atol": 1e-5} if precision == "fp32" else {"rtol": 2e-2, "atol": 0.1}
    torch.testing.assert_close(together_N, alone_N, **near)
    for ours, theirs in zip(grads, alone_grads, strict=True):
        largest = float(theirs.abs().max())
        assert (ours - theirs).abs().max() < (1e-5 if precision == "fp32" else 0.05) * max(largest, 1e-3)


def test_the_first_dpo_loss_is_ln_2_in_bf16(make_model: Make, make_pairs: MakePairs) -> None:
    model = make_model()
    pairs = compute_reference_logprobs(model, make_pairs(9), precision="bf16")
    with compute_precision(model, "bf16"):
        assert first_loss(model, pairs, beta=0.1) == pytest.approx(math.log(2), abs=2e-3)


@pytest.mark.parametrize("loss", ["dpo", "cdpo", "ipo", "rpo", "rpo_fwd_kl", "rpo_sq"])
def test_training_moves_the_margin_to_its_target(make_model: Make, make_pairs: MakePairs, loss: str) -> None:
    model = make_model()
    pairs = compute_reference_logprobs(model, make_pairs(8))
    settings = TrainSettings(lr=3e-3, steps=40, batch_size=8, schedule="constant", weight_decay=0.0)
    objective = PreferenceObjective(loss, beta=0.5, label_smoothing=0.1 if loss == "cdpo" else 0.0)
    first: list[dict[str, float]] = []
    result = Trainer(model, objective, settings, on_step=lambda step, total, metrics: first.append(metrics)).fit(pairs)
    assert first[0]["margin"] == pytest.approx(0, abs=1e-4)
    assert result.metrics["accuracy"] == 1.0
    entropy = 0.325083 if loss == "cdpo" else 0.0  # of one flipped label in ten, which no model can undercut
    assert result.metrics["preference_loss"] - entropy < (first[0]["preference_loss"] - entropy) / 3
    if loss.startswith("rpo"):
        gap = sum(pair.chosen_reward - pair.rejected_reward for pair in pairs) / 8
        assert result.metrics["margin"] == pytest.approx(gap / 0.5, abs=0.5)
    assert first[0]["chosen_logprob"] < 0 and first[0]["rejected_logprob"] < 0


def test_references_are_required(make_model: Make, make_pairs: MakePairs) -> None:
    with pytest.raises(InputError, match="run compute_reference_logprobs on them first"):
        first_loss(make_model(), make_pairs(2))


def test_pairs_of_another_tokenizer_are_refused(make_model: Make) -> None:
    side = Sample([1, 48], [False, True])
    with pytest.raises(InputError, match="sample odd has token 48 but the model has 48"):
        compute_reference_logprobs(make_model(), [PairSample(side, side, id="odd")])


def test_doubling_a_response_doubles_its_summed_logprob_only() -> None:
    class Uniform:
        """Every token has probability 1/48 whatever came before."""

        config = ModelConfig("nemotron", 48, 4, (BlockConfig(1, 1, 4, 4),), 64)

        def hidden(self, ids_T: torch.Tensor, shape: object, rows_S: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(rows_S), 4)

        def unembedding(self) -> torch.Tensor:
            return torch.zeros(48, 4)

    def logprobs(length: int, mode: str) -> float:
        side = Sample([1] * (length + 1), [False] + [True] * length)
        batch = collate_pairs([PairSample(side, side, ref_chosen=0.0, ref_rejected=0.0)], CPU)
        value, count = PreferenceObjective(logprobs=mode)(Uniform(), batch).metrics["chosen_logprob"]  # type: ignore[arg-type]
        return float(value) / count

    assert logprobs(6, "sum") == pytest.approx(2 * logprobs(3, "sum")) == pytest.approx(-6 * math.log(48))
    assert logprobs(6, "mean") == pytest.approx(logprobs(3, "mean")) == pytest.approx(-math.log(48))


def test_the_sft_term_is_the_chosen_logprob(make_model: Make, make_pairs: MakePairs) -> None:
    model = make_model()
    pairs = compute_reference_logprobs(model, make_pairs(5))
    chosen = response_logprobs(model, collate_pairs(pairs, CPU)).view(-1, 2)[:, 0]
    with_term = first_loss(model, pairs, sft_weight=0.25)
    assert with_term == pytest.approx(first_loss(model, pairs) - 0.25 * chosen.mean().item(), rel=1e-5)


def test_dropping_a_pair_leaves_the_loss_of_the_others(make_model: Make, make_pairs: MakePairs) -> None:
    model, other = make_model(), make_model(seed=1)
    pairs = compute_reference_logprobs(other, make_pairs(4))
    empty = Sample([1, 2], [False, False])
    long = PairSample(Sample([1] * 30, [True] * 30), empty, id="long")
    settings = TrainSettings(steps=1, batch_size=4, max_tokens=29)
    alone = Trainer(model, PreferenceObjective(), settings).fit(pairs)
    void = replace(pairs[0], rejected=empty, id="void")
    beside = Trainer(make_model(), PreferenceObjective(), settings).fit([*pairs, long, void])
    assert beside.metrics["loss"] == alone.metrics["loss"]
    assert beside.dropped_long == ["long"] and beside.dropped_untrained == ["void"]


def test_references_are_computed_once_and_keyed(
    make_model: Make, make_pairs: MakePairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = make_pairs(5)
    calls: list[int] = []

    def counting(model: Transformer, batch: preference.PairBatch) -> torch.Tensor:
        calls.append(1)
        return response_logprobs(model, batch)

    monkeypatch.setattr(preference, "response_logprobs", counting)
    first = compute_reference_logprobs(make_model(), pairs, tmp_path / "cache")
    assert len(calls) == 1
    again = compute_reference_logprobs(make_model(), first, tmp_path / "cache")
    assert len(calls) == 1 and [p.ref_chosen for p in again] == [p.ref_chosen for p in first]
    assert [p.ref_rejected for p in again] == [p.ref_rejected for p in first]
    compute_reference_logprobs(make_model(seed=1), pairs, tmp_path / "cache")
    compute_reference_logprobs(make_model(), pairs[::-1], tmp_path / "cache")
    compute_reference_logprobs(make_model(), pairs, tmp_path / "cache", precision="bf16")
    assert len(calls) == 4 and len(list((tmp_path / "cache").iterdir())) == 4
    # a damaged file is computed anew
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:20])
    recomputed = compute_reference_logprobs(make_model(), pairs, tmp_path / "cache")
    assert len(calls) == 5 and [p.ref_chosen for p in recomputed] == [p.ref_chosen for p in first]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "kto"}, "unknown preference loss 'kto'"),
        ({"logprobs": "max"}, "choose one of sum, mean"),
        ({"beta": 0.0}, "beta is 0.0; it must be above zero"),
        ({"label_smoothing": 0.5}, "at least 0 and below 0.5"),
    ],
)
def test_wrong_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PreferenceObjective(**settings)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    names = [name for chat_format in FORMATS.values() for name in chat_format.special_tokens]
    return Tokenizer.train(["User Assistant System hello there two is the sum of one and one"] * 3, 400, names)


@pytest.mark.parametrize("name", list(FORMATS))
def test_only_the_compared_answer_is_masked_in(tokenizer: Tokenizer, name: str) -> None:
    turns = (Message("user", "hello"), Message("assistant", "hello there"), Message("user", "one and one"))
    pair = Pair("p", "q", "sums", turns, "two", "hello", 3.0, 1.0, "verifier")
    (sample,) = pair_samples([pair], FORMATS[name], tokenizer)
    prompt = FORMATS[name].render_prompt(turns, tokenizer)
    for side, text in ((sample.chosen, "two"), (sample.rejected, "hello")):
        assert list(side.ids[: len(prompt)]) == prompt and not any(side.mask[: len(prompt)])
        response = [int(token) for token in side.ids[side.mask]]
        assert FORMATS[name].response_text(response, tokenizer) == text
        assert response[-1] == FORMATS[name].end_of_turn_id(tokenizer)
    assert (sample.chosen_reward, sample.rejected_reward, sample.id) == (3.0, 1.0, "p")
    with pytest.raises(InputError, match="pair p has the same answer on both sides"):
        pair_samples([replace(pair, rejected="two")], FORMATS[name], tokenizer)
    with pytest.raises(InputError, match="pair p: "):
        pair_samples([replace(pair, messages=turns[:2])], FORMATS[name], tokenizer)


@pytest.mark.parametrize("name", list(FORMATS))
def test_an_answer_that_was_cut_off_does_not_end(tokenizer: Tokenizer, name: str) -> None:
    """Token by token: prompt and text, and of the format's end nothing; the other side ends as ever."""
    turns, end = (Message("user", "hello"),), FORMATS[name].end_of_turn_id(tokenizer)
    pair = Pair("p", "q", "sums", turns, "two", "two is the sum", 3.0, 1.0, "verifier", rejected_finished=False)
    (sample,) = pair_samples([pair], FORMATS[name], tokenizer)
    prompt = FORMATS[name].render_prompt(turns, tokenizer)
    assert list(sample.rejected.ids[: len(prompt)]) == prompt and not any(sample.rejected.mask[: len(prompt)])
    response = [int(token) for token in sample.rejected.ids[len(prompt) :]]
    assert all(sample.rejected.mask[len(prompt) :]) and tokenizer.decode(response) == "two is the sum" and end not in response
    assert int(sample.chosen.ids[-1]) == end and sample.chosen.mask[-1]
    (old,) = pair_samples([replace(pair, rejected_finished=True)], FORMATS[name], tokenizer)
    assert int(old.rejected.ids[-1]) == end and list(old.chosen.ids) == list(sample.chosen.ids)
    # both sides may say the same words, of which one ends: that is a difference
    with pytest.raises(InputError, match="same answer on both sides"):
        pair_samples([replace(pair, rejected="two")], FORMATS[name], tokenizer)


def test_answers_that_are_the_same_to_the_tokenizer_are_refused() -> None:
    """NFC makes one letter of a letter and its accent."""
    backend = HFTokenizer.from_str(Tokenizer.train(["a"], 300, FORMATS["chatml"].special_tokens).to_json())
    backend.normalizer = normalizers.NFC()
    pair = Pair("p", "", "", (Message("user", "q"),), "caf\u00e9", "cafe\u0301", 1.0, 0.0, "x")
    with pytest.raises(InputError, match="pair p has the same tokens on both sides"):
        pair_samples([pair], FORMATS["chatml"], Tokenizer(backend))
