"""The recipe of reinforcement learning: methods as switches, and what is refused before any work."""

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
        ({"world": None}, "give prompts and evaluation"),
        ({"data": {"prompts": "p.jsonl"}}, "leave the files out, or the world"),
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
