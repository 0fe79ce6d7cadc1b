"""Policy gradients: published values of advantages and KL estimates, and identities of the loss through a real model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gristmill.core.errors import InputError
from gristmill.model.transformer import Transformer
from gristmill.train.batches import Rollout, collate, group_answers
from gristmill.train.objectives.policy_gradient import (
    PolicyGradientObjective,
    group_advantages,
    kl_terms,
    normalized,
    overlong_penalty,
    sampled_logprobs,
)
from gristmill.train.trainer import Trainer, TrainSettings

Make = Callable[..., Transformer]
CPU = torch.device("cpu")


def collated(rollouts: Sequence[Rollout]) -> Any:
    return collate(group_answers(rollouts, 99, 10_000), CPU)


@pytest.fixture
def rollouts(make_model: Make) -> list[Rollout]:
    """Three groups of four answers of one to nine tokens, with the model's own log-probabilities."""
    model, rng = make_model(), np.random.default_rng(0)
    out = []
    for prompt in range(3):
        start = rng.integers(1, 48, 4).tolist()
        for answer in range(4):
            length = int(rng.integers(1, 10))
            ids = [*start, *rng.integers(1, 48, length).tolist()]
            mask = [False] * 4 + [True] * length
            advantage = (-1.0, 0.5, 1.5, -1.0)[answer]
            out.append(Rollout(ids, mask, f"{prompt}-{answer}", advantage=advantage, logprobs=[0.0] * length, prompt=f"p{prompt}"))
    batch = collated(out)
    with torch.no_grad():
        logps = sampled_logprobs(model, batch).split(batch.lengths_N.tolist())
    return [replace(rollout, logprobs=logp.numpy()) for rollout, logp in zip(out, logps, strict=True)]


def gradients(model: Transformer, objective: PolicyGradientObjective, rollouts: Sequence[Rollout]) -> tuple[float, list[Tensor]]:
    output = objective(model, collated(rollouts))
    loss = output.sum / output.count
    return loss.item(), list(torch.autograd.grad(loss, list(model.parameters())))


def trained_gradients(model: Transformer, rollouts: Sequence[Rollout], micro_batch_tokens: int) -> list[Tensor]:
    """What the optimizer is given in a step of the Trainer."""
    settings = TrainSettings(lr=0.0, steps=1, batch_size=12, micro_batch_tokens=micro_batch_tokens, clip=0.0, weight_decay=0.0)
    trainer, kept = Trainer(model, PolicyGradientObjective(), settings), []

    def keep(*_: Any, **__: Any) -> None:
        kept.extend(p.grad.clone() for p in model.parameters() if p.grad is not None)

    trainer.optimizer.step = keep  # type: ignore[method-assign]
    trainer.step(rollouts)
    return kept


def distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-6)) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("kind", "size"), [("std", 1.0), ("mean", 0.5), ("leave_one_out", 2 / 3)])
def test_advantages_of_two_right_of_four(kind: Any, size: float) -> None:
    assert group_advantages(kind, [1, 0, 0, 1]) == pytest.approx([size, -size, -size, size])
    assert group_advantages(kind, [0.1, 0.1, 0.1]) == [0.0] * 3 and group_advantages(kind, [1.0]) == [0.0]


def test_kl_estimators_have_their_published_values() -> None:
    log = torch.tensor([0.5, -0.5])
    expected = {"k1": [-0.5, 0.5], "k2": [0.125, 0.125], "k3": [0.148721, 0.106531]}
    for name, values in expected.items():
        assert kl_terms(name, torch.zeros(2), log).tolist() == pytest.approx(values, abs=1e-6)  # type: ignore[arg-type]
    assert (kl_terms("k3", torch.randn(500), torch.randn(500)) >= 0).all()
    assert torch.isfinite(kl_terms("k3", torch.tensor([-500.0]), torch.tensor([500.0]))).all()


def test_overlong_answers_are_punished_as_in_dapo() -> None:
    assert [overlong_penalty(n, 20_480, 4_096) for n in (16_384, 18_432, 20_480, 20_481)] == [0.0, -0.5, -1.0, -1.0]


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_the_first_update_is_reinforce(make_model: Make, rollouts: list[Rollout], ratio: Any) -> None:
    """The ratio is exactly 1; the loss is that of the advantages, its gradient that of -A log pi."""
    model = make_model()
    rollouts = normalized(rollouts, "sequence", 9)
    output = PolicyGradientObjective(ratio=ratio)(model, collated(rollouts))
    total, count = output.metrics["ratio"]
    assert float(total) == count and float(output.metrics["clipped"][0]) == 0
    assert output.sum.item() == pytest.approx(0, abs=1e-6), "advantages of mean 0 in each group"
    _, clipped = gradients(model, PolicyGradientObjective(ratio=ratio), rollouts)
    _, plain = gradients(model, PolicyGradientObjective(surrogate="reinforce"), rollouts)
    assert distance(clipped, plain) < 1e-5 and max(float(g.abs().max()) for g in clipped) > 1e-3


def test_each_token_may_have_an_advantage_of_its_own(make_model: Make, rollouts: list[Rollout]) -> None:
    """Equal ones are the answer's; those of first tokens alone give the gradient of answers without the others."""
    model, objective = make_model(), PolicyGradientObjective()
    each = [replace(r, advantage=np.full(r.num_targets, r.advantage)) for r in rollouts]
    assert distance(gradients(model, objective, each)[1], gradients(model, objective, rollouts)[1]) == 0
    first = [replace(r, advantage=np.eye(1, r.num_targets)[0] * r.advantage) for r in rollouts]
    cut = [replace(r, mask=[False] * 4 + [True] + [False] * (len(r.ids) - 5), logprobs=r.logprobs[:1]) for r in rollouts]
    assert distance(gradients(model, objective, first)[1], gradients(model, objective, cut)[1]) < 1e-4


@pytest.mark.parametrize("kind", ["token", "sequence", "constant"])
def test_micro_batches_change_no_gradient(make_model: Make, rollouts: list[Rollout], kind: Any) -> None:
    rollouts = normalized(rollouts, kind, 9)
    _, whole = gradients(make_model(), PolicyGradientObjective(), rollouts)
    for limit in (16, 40):
        assert distance(trained_gradients(make_model(), rollouts, limit), whole) < 2e-5, limit


def test_weights_are_those_of_the_named_normalization(rollouts: list[Rollout]) -> None:
    lengths = [r.num_targets for r in rollouts]
    by_name = {kind: normalized(rollouts, kind, 20) for kind in ("token", "sequence", "constant")}
    assert [sum(r.num_terms for r in rows) for rows in by_name.values()] == [sum(lengths), 12, 12]
    assert [r.weight * n for r, n in zip(by_name["sequence"], lengths, strict=True)] == pytest.approx([1.0] * 12)
    assert {r.weight for r in by_name["constant"]} == {1 / 20} and {r.weight for r in by_name["token"]} == {1.0}


def old_of(rollouts: Sequence[Rollout], difference: float) -> list[Rollout]:
    return [replace(r, old=np.asarray(r.logprobs) - difference) for r in rollouts]


def test_a_clipped_token_has_no_gradient(make_model: Make, rollouts: list[Rollout]) -> None:
    """A ratio of e^.5 is above 1.2: answers with a positive advantage teach nothing more, the others still do."""
    better, worse = [r for r in rollouts if r.advantage > 0], [r for r in rollouts if r.advantage < 0]
    objective = PolicyGradientObjective()
    loss, grads = gradients(make_model(), objective, old_of(better, 0.5))
    assert max(float(g.abs().max()) for g in grads) == 0
    assert max(float(g.abs().max()) for g in gradients(make_model(), objective, old_of(worse, 0.5))[1]) > 0
    _, low = gradients(make_model(), objective, old_of(worse, -0.5))
    assert max(float(g.abs().max()) for g in low) == 0
    # CISPO goes on, with the weight of the limit
    cispo = PolicyGradientObjective(surrogate="cispo", clip_low=1.0, clip_high=0.2)
    _, limited = gradients(make_model(), cispo, old_of(better, 0.5))
    _, plain = gradients(make_model(), PolicyGradientObjective(surrogate="reinforce"), better)
    assert distance(limited, [1.2 * g for g in plain]) < 1e-5


def test_a_sequence_ratio_is_the_geometric_mean_of_its_tokens(make_model: Make, rollouts: list[Rollout]) -> None:
    rng = np.random.default_rng(1)
    rows = [replace(r, old=np.asarray(r.logprobs) - rng.normal(0, 0.3, r.num_targets)) for r in normalized(rollouts, "sequence", 9)]
    output = PolicyGradientObjective(ratio="sequence", clip_low=9.0, clip_high=9.0)(make_model(), collated(rows))
    expected = [-r.advantage * math.exp(float(np.mean(np.asarray(r.logprobs) - r.old))) for r in rows]
    assert output.sum.item() == pytest.approx(sum(expected), rel=1e-4)


def test_stale_samples_weigh_what_the_policies_differ_in_up_to_a_limit(make_model: Make, rollouts: list[Rollout]) -> None:
    rows = [replace(r, old=np.asarray(r.logprobs) + 0.1) for r in rollouts]
    plain = PolicyGradientObjective(surrogate="reinforce")
    _, grads = gradients(make_model(), plain, rows)
    for limit, factor in ((2.0, math.exp(0.1)), (1.05, 1.05)):
        _, weighted = gradients(make_model(), replace(plain, max_importance=limit), rows)
        assert distance(weighted, [factor * g for g in grads]) < 1e-5


def test_the_kl_term_pulls_to_the_reference(make_model: Make, rollouts: list[Rollout]) -> None:
    objective = PolicyGradientObjective(beta=0.1)
    with pytest.raises(InputError, match="reference"):
        objective(make_model(), collated(rollouts))
    calm = [replace(r, advantage=0.0) for r in rollouts]
    same = [replace(r, reference=np.asarray(r.logprobs)) for r in calm]
    loss, grads = gradients(make_model(), objective, same)
    assert loss == pytest.approx(0, abs=1e-6) and max(float(g.abs().max()) for g in grads) < 1e-5
    away = [replace(r, reference=np.asarray(r.logprobs) + 0.3) for r in calm]
    loss, grads = gradients(make_model(), objective, away)
    assert loss > 0 and max(float(g.abs().max()) for g in grads) > 1e-4


def test_a_rollout_needs_a_log_probability_for_every_sampled_token() -> None:
    with pytest.raises(InputError, match="2 sampled tokens but 1 log-probabilities"):
        Rollout([1, 2, 3], [False, True, True], "a", logprobs=[-1.0])


def test_answers_to_one_prompt_read_it_once_and_a_large_group_is_split(rollouts: list[Rollout]) -> None:
    groups = group_answers(rollouts, 99, 10_000)
    assert [len(g.answers) for g in groups] == [4, 4, 4]  # type: ignore[union-attr]
    assert groups[0].num_tokens == 4 + sum(r.num_targets for r in rollouts[:4])
    assert all(g.num_tokens <= 15 or len(g.answers) == 1 for g in group_answers(rollouts, 99, 15))  # type: ignore[union-attr]
