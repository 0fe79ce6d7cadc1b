"""Everything that trains works on the model's device: no tensor of the CPU comes among those of another one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gristmill.model.reward import RewardModel
from gristmill.model.transformer import Transformer
from gristmill.train.batches import AnySample, PairSample, RatedSample, Sample
from gristmill.train.objectives.next_token import next_token_objective
from gristmill.train.objectives.preference import PreferenceObjective, compute_reference_logprobs
from gristmill.train.objectives.reward import reward_objective
from gristmill.train.trainer import Objective, Trainer, TrainSettings
from tests.other_device import OTHER, OtherTensor, other_device

Make = Callable[..., Transformer]
SETTINGS = TrainSettings(optimizer="muon", lr=1e-2, steps=4, batch_size=6, micro_batch_tokens=100, validate_every=2, checkpoint_every=1e-9)


OBJECTIVES: dict[str, Objective] = {
    "next token": next_token_objective,
    "reward": reward_objective,
    "preference": PreferenceObjective("rpo", logprobs="mean", sft_weight=0.1),
}


class Killed(Exception):
    pass


def kill(step: int, num_steps: int, metrics: dict[str, float]) -> None:
    if step == 3:
        raise Killed


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_training_elsewhere_is_training_here(
    kind: str, make_model: Make, make_samples: Callable[..., list[Sample]], make_pairs: Callable[..., list[PairSample]], tmp_path: Path
) -> None:
    rated = [RatedSample([*range(1, 7), n], 6, [n, 1, 2, -100, 3], prompt=str(n // 3)) for n in range(9)]

    def trained(device: torch.device, folder: Path, kill_first: bool) -> dict[str, torch.Tensor]:
        """As it goes; with `kill_first` it is resumed once."""
        model: torch.nn.Module = RewardModel(make_model()) if kind == "reward" else make_model()
        data: list[AnySample] = {"next token": make_samples(12), "reward": rated, "preference": make_pairs(8)}[kind]
        objective = OBJECTIVES[kind]
        if kind == "preference":
            data = compute_reference_logprobs(model.to(device), data)
            model.cpu()
        if kill_first:
            with pytest.raises(Killed):
                trained_here = RewardModel(make_model()) if kind == "reward" else make_model()
                Trainer(trained_here, objective, SETTINGS, folder=folder, device=device, on_step=kill).fit(data, data[:3])
        trainer = Trainer(model, objective, SETTINGS, folder=folder, device=device)
        assert trainer.fit(data, data[:3]).steps == 4
        assert all(parameter.device == device for parameter in model.parameters())
        return {name: value.cpu() for name, value in model.state_dict().items()}

    here = trained(torch.device("cpu"), tmp_path / "here", False)
    with other_device():
        there = trained(OTHER, tmp_path / "there", True)
    for name, value in here.items():
        # another attention kernel rounds in another way, and Muon computes in bf16
        torch.testing.assert_close(value, there[name], rtol=0, atol=4e-3)


def test_a_step_of_given_samples_elsewhere(make_model: Make, make_samples: Callable[..., list[Sample]]) -> None:
    settings = replace(SETTINGS, steps=1)
    here = Trainer(make_model(), next_token_objective, settings).step(make_samples(5))
    with other_device():
        trainer = Trainer(make_model(), next_token_objective, settings, device=OTHER)
        there = trainer.step(make_samples(5))
        assert isinstance(next(trainer.model.parameters()), OtherTensor)
    assert there["loss"] == pytest.approx(here["loss"], rel=1e-5) and there["grad_norm"] == pytest.approx(here["grad_norm"], rel=1e-4)


def test_the_other_device_refuses_tensors_of_the_cpu() -> None:
    with other_device():
        there = torch.ones(3, device=OTHER)
        assert float((there + torch.tensor(1.0)).sum()) == 6  # scalars may come along
        with pytest.raises(RuntimeError, match="of the CPU"):
            there + torch.ones(3)
        with pytest.raises(RuntimeError):
            there.numpy()
