"""The recipe of reinforcement learning: methods as switches, and what is refused before any work."""

from pathlib import Path
from typing import Any

import pytest

from gristmill.core.config import check
from gristmill.core.errors import InputError
from gristmill.workflows.rl.recipe import RlRecipe


def recipe(**values: Any) -> RlRecipe:
    return check(RlRecipe, {"world": "miniature", **values})


def test_a_method_is_a_set_of_switches_that_a_recipe_may_override() -> None:
    assert recipe(method="dapo").objective().clip_high == 0.28 and recipe(method="gspo").objective().ratio == "sequence"
    assert recipe(method="rloo").objective().surrogate == "reinforce" and recipe(method="cispo").objective().surrogate == "cispo"
    assert recipe(method="dapo", clip_high=0.5, beta=0.01).objective() == recipe(clip_high=0.5, beta=0.01).objective()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"world": None}, "give prompts, or name a world"),
        ({"world": None, "data": {"prompts": "p.jsonl"}}, "give evaluation beside prompts"),
        ({"data": {"prompts": "p.jsonl"}}, "one of them alone"),
        ({"data": {"evaluation": "p.jsonl"}}, "leave the file out, or the world"),
        ({"rewards": {"reward_model": {}}}, "give the reward model's folder, or base_url"),
        ({"rewards": {"judge": {"checkpoint": "latest"}}}, "leave checkpoint and rounds out"),
        ({"rewards": {"functions": [{"file": "r.py", "name": "judge"}]}}, "another part has the name judge"),
        ({"rewards": {"supervision": "process"}}, "goes with form: thinking"),
        ({"training": {"lora": {"dora": True}}}, "without dora"),
        ({"training": {"lora": {"base": "int8"}}}, "base in fp32 or bf16"),
        ({"training": {"lora": {}, "optimizer": "muon"}}, "optimizer: adamw"),
        ({"rewards": {"overlong_buffer": 300}}, "below max_tokens"),
        ({"updates": 99}, "at most one a prompt"),
        ({"samples": 1}, "samples"),
        ({"temperature": 0.7}, "temperature"),
        ({"top_p": 0.9}, "top_p"),
    ],
)
def test_what_cannot_work_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        recipe(**values)


def test_an_adapter_has_ten_times_the_learning_rate() -> None:
    assert recipe().lr(1_000_000) == 3e-4 and recipe(training={"lora": {}}).lr(1_000_000) == pytest.approx(3e-3)
    assert recipe().lr(135_000_000) == 4e-5
    assert recipe(training={"lora": {}, "lr": 1e-4}).lr(1_000_000) == 1e-4


def test_what_an_earlier_version_does_not_know_is_not_written() -> None:
    written = recipe().model_dump()
    assert "environment" not in written and "lora" not in written["training"] and "judge" not in written["rewards"]
    assert recipe(training={"lora": {}}).model_dump()["training"]["lora"]["rank"] == 16


def test_files_of_the_command_line(tmp_path: Path) -> None:
    files = {"world": None, "data": {"prompts": "p.jsonl", "evaluation": "e.jsonl"}}
    given = recipe(**files, rewards={"reward_model": {"folder": "REWARD", "weight": 2.0}})
    given = given.with_files(prompts=tmp_path, reward_model=tmp_path)
    assert given.rewards.reward_model is not None and given.data.prompts == tmp_path
    assert given.rewards.reward_model.folder == tmp_path and given.rewards.reward_model.weight == 2.0
    with pytest.raises(InputError, match="leave --prompts out"):
        recipe().with_files(prompts=tmp_path, reward_model=None)
