"""Reward functions of a user in their own process: TRL's form, and every way to fail."""

from pathlib import Path
from typing import Any

import pytest

from gristmill.core.errors import InputError
from gristmill.data.chat import Message
from gristmill.data.rows import Prompt
from gristmill.generation.api import Completion
from gristmill.judge.programs import Verifier
from gristmill.workflows.rl.functions import RewardProcess
from gristmill.workflows.rl.recipe import RewardFunction, Rewards
from gristmill.workflows.rl.rewards import Rewarder

TEXTS = ("one", "three", "fourteen")
PROMPTS = [
    Prompt(f"p{i}", "", (Message("user", f"Say {text}."),), "file", (), {"kind": "exact", "value": text}, meta={"level": i})
    for i, text in enumerate(TEXTS)
]
ANSWERS = [Completion(text, 2, (), "stop", (7, i)) for i, text in enumerate(TEXTS)]


def values(folder: Path, code: str, **settings: Any) -> list[Any]:
    (folder / "rewards.py").write_text(code)
    with RewardProcess(RewardFunction(file=folder / "rewards.py", **settings)) as process:
        return process.rewards(PROMPTS, ANSWERS)


def test_functions_in_trl_form(tmp_path: Path) -> None:
    assert values(tmp_path, "def reward(completions, **kwargs): return [len(c) for c in completions]") == [3.0, 5.0, 8.0]
    assert values(tmp_path, "def reward(prompts, level): return [i + len(p) for i, p in zip(level, prompts)]") == [8.0, 11.0, 15.0]
    assert values(tmp_path, "async def reward(completion_ids, answer): return [ids[1] for ids in completion_ids]") == [0.0, 1.0, 2.0]
    talk = "def reward(completions, prompts, **_): return [len(c[0]['content']) + len(p) for c, p in zip(completions, prompts)]"
    assert values(tmp_path, talk, messages=True) == [4.0, 6.0, 9.0]
    assert values(tmp_path, "def reward(completions): print('hi'); return [None, 1, 2]") == [None, 1.0, 2.0]
    (tmp_path / "helper.py").write_text("BONUS = 2")
    assert values(tmp_path, "from helper import BONUS\ndef mine(completions): return [BONUS] * len(completions)", name="mine") == [2.0] * 3


def test_an_answer_that_a_function_fails_on_costs_no_other_its_reward(tmp_path: Path) -> None:
    code = "def reward(completions): return [1 / (len(c) - 5) for c in completions]"
    first, second, third = values(tmp_path, code)
    assert first == -0.5 and third == pytest.approx(1 / 3) and "ZeroDivisionError" in second


def test_a_hang_a_nan_and_an_end_are_told(tmp_path: Path) -> None:
    hang = "import time\ndef reward(completions):\n    if 'three' in completions: time.sleep(60)\n    return [1.0] * len(completions)"
    assert values(tmp_path, hang, timeout=5.0) == [1.0, "it did not answer within 5 s", 1.0]
    nan = "def reward(completions): return [float('nan') if c == 'one' else 1.0 for c in completions]"
    assert values(tmp_path, nan) == ["it gave nan", 1.0, 1.0]
    end = "import os\ndef reward(completions):\n    if 'one' in completions: os._exit(3)\n    return [1.0] * len(completions)"
    assert values(tmp_path, end) == ["it ended", 1.0, 1.0]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def reward(completions): return [1.0, 2.0]", "fails on every answer .it gave 2 values for 1 answers.: mend it"),
        ("def reward(completions): return 3", "fails on every answer"),
        ("def reward(completions): raise ValueError('no key')", "ValueError: no key"),
        ("def other(completions): return []", "has no attribute 'reward'"),
        ("import nothing_of_this_name", "ModuleNotFoundError"),
        ("def reward(completions: return", "SyntaxError"),
        ("raise SystemExit(0)", "SystemExit"),
    ],
)
def test_a_function_that_cannot_work_is_one_sentence(tmp_path: Path, code: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        values(tmp_path, code)


def test_functions_add_to_the_verdict_by_weight(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text("def short(completions): return [c != 'one' and -len(c) for c in completions]")
    with RewardProcess(RewardFunction(file=tmp_path / "rewards.py", name="short", weight=0.5)) as short:
        found = Rewarder(Rewards(verifier=2.0), Verifier(), 10, [short]).rewards(PROMPTS, ANSWERS)
    assert [reward.total for reward in found] == [2.0, -0.5, -2.0] and found[1].parts == {"short": -5.0}
