"""Training samples of rollouts: what the model did not choose is not trained on."""

from pathlib import Path
from types import SimpleNamespace

from gristmill.core.config import check
from gristmill.data.chat import Message
from gristmill.data.rows import Prompt
from gristmill.generation.api import Completion
from gristmill.runs.journal import Journal
from gristmill.workflows.rl.recipe import RlRecipe
from gristmill.workflows.rl.rewards import Reward
from gristmill.workflows.rl.rollouts import Group, RolloutSource, _read, _written


def test_forced_tokens_are_no_targets_and_have_no_log_probability(tmp_path: Path) -> None:
    prompt = Prompt("p", "", (Message("user", "3 and 4?"),), "file", (), {"kind": "number", "value": 7})
    bound = Completion("<think>3</think>7", 5, (-0.1, -0.2, -9.0, -0.3, -0.4), "stop", (11, 12, 13, 14, 15), forced=(2,))
    free = Completion("8", 2, (-0.5, -0.6), "stop", (21, 15))
    assert [_read(_written(one)) for one in (bound, free)] == [bound, free], "a journal keeps what was forced"
    group = Group("g", prompt, [bound, free], [Reward(1.0, 1.0, 1.0), Reward(0.0, 0.0, 1.0)])
    recipe = check(RlRecipe, {"world": "miniature"})
    engine = SimpleNamespace(chat_format=SimpleNamespace(render_prompt=lambda messages, tokenizer: [1, 2]), tokenizer=None)
    with Journal(tmp_path / "rollouts.jsonl") as journal:
        source = RolloutSource(recipe, [prompt], engine, None, journal)  # type: ignore[arg-type]
        one, other = source.samples(group)
    assert one.ids.tolist() == [1, 2, 11, 12, 13, 14, 15] and one.mask.tolist() == [False] * 2 + [True, True, False, True, True]  # type: ignore[union-attr]
    assert one.num_targets == 4 and [round(float(value), 1) for value in one.logprobs] == [-0.1, -0.2, -0.3, -0.4]
    assert other.num_targets == 2 and one.advantage > 0 > other.advantage
