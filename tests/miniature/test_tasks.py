"""Each task's truth, model answer and reading of its own prompts agree; prompts of others are read safely."""

import random
import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.data.chat import Message
from gristmill.miniature import code, followups, lists, sums
from gristmill.miniature.problem import Problem
from gristmill.miniature.world import TASKS, World
from gristmill.verify.verify import verify

WORLD = World.make()
seeds = st.integers(0, 2**32)
tasks = st.sampled_from(TASKS)


def run_code(program: str, tests: str) -> bool:
    """Programs of this world only: its own solutions, or those with one thing changed."""
    try:
        exec(f"{program}\n{tests}", {})
    except Exception:
        return False
    return True


def problem_of(task: str, seed: int) -> Problem:
    return WORLD.sample(random.Random(seed), task)


def right(problem: Problem, answer: str) -> bool:
    return verify(problem.truth, answer, run_code)


@given(tasks, seeds)
def test_the_model_answer_is_right(task: str, seed: int) -> None:
    problem = problem_of(task, seed)
    assert right(problem, problem.answer)
    assert not right(problem, "") and not right(problem, "I do not know.")


@given(tasks, seeds)
def test_a_seed_makes_one_problem(task: str, seed: int) -> None:
    assert problem_of(task, seed) == problem_of(task, seed)


@given(tasks, seeds, seeds)
def test_the_answer_to_another_question_is_wrong(task: str, seed: int, other: int) -> None:
    problem, stranger = problem_of(task, seed), problem_of(task, other)
    if task in ("facts", "sums") and problem.truth != stranger.truth:
        assert right(problem, stranger.answer) == (str(problem.truth["value"]) == str(stranger.truth["value"]))


@given(tasks, seeds)
def test_the_verifier_reads_the_prompt_as_it_was_meant(task: str, seed: int) -> None:
    problem = problem_of(task, seed)
    read = WORLD.verifier(task, problem.messages)
    if read is None:
        assert not WORLD.checkable(task, problem.messages), "what no program can check is for the reward model"
        return
    assert WORLD.checkable(task, problem.messages) and verify(read, problem.answer, run_code)
    assert plain({k: v for k, v in read.items() if k in problem.truth}) == plain(problem.truth)


def plain(truth: dict[str, Any]) -> dict[str, Any]:
    """Without the order of what has none."""
    return {k: sorted(v) if isinstance(v, list) else v for k, v in truth.items()}


def test_every_task_but_facts_is_checked_by_programs() -> None:
    rng = random.Random(0)
    for task in TASKS:
        share = sum(WORLD.verifier(task, WORLD.sample(rng, task).messages) is not None for _ in range(300)) / 300
        assert share == {"facts": 0.0, "followups": share}.get(task, 1.0)
        assert task != "followups" or 0.4 < share < 0.8  # the rest asks for facts


@given(seeds)
def test_a_question_about_a_fact_is_read_back(seed: int) -> None:
    problem = problem_of("facts", seed)
    read = WORLD.lands.parse_question(problem.question)
    assert read is not None and WORLD.lands.facts[read[0]][read[1]] == problem.truth["value"] and read[0] == problem.topic
    assert problem.truth["value"] not in problem.others and len(problem.others) > 3


@given(seeds)
def test_sums_stay_small(seed: int) -> None:
    start, steps = sums.plan(random.Random(seed), 3)
    worked, value = sums.work(start, steps)
    assert 0 <= value <= 999 and len(steps) == 3
    for a, op, b, result in re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)\.", worked):
        assert sums.apply(op, int(a), int(b)) == int(result) >= 0


@given(st.sampled_from(code.LEVELS), seeds)
def test_tests_of_a_program_tell_it_from_others(level: int, seed: int) -> None:
    problem = code.sample(random.Random(seed), level)
    assert problem.truth["tests"].count("assert") >= 2
    assert not run_code("def f(x): return None", problem.truth["tests"])


@given(seeds)
def test_a_list_that_breaks_a_demand_is_wrong(seed: int) -> None:
    problem = problem_of("lists", seed)
    words = re.findall(r"\w+", problem.answer)
    assert not right(problem, problem.answer + " and more")
    assert not right(problem, problem.answer.replace(words[-2 if "end" in problem.truth["extras"] else -1], "zebra"))


@given(seeds)
def test_the_second_turn_leans_on_the_first(seed: int) -> None:
    problem = problem_of("followups", seed)
    assert [m.role for m in problem.messages] == ["user", "assistant", "user"]
    alone = WORLD.verifier("followups", (Message("user", problem.question),))
    assert alone is None


@given(seeds)
def test_a_second_turn_follows_what_was_said(seed: int) -> None:
    problem = problem_of("followups", seed)
    first, said, second = problem.messages
    if problem.truth["kind"] == "number":
        wrong = Message("assistant", re.sub(r"\d+\.$", "500.", said.content))
        read = followups.parse_question((first, wrong, second))
        step = int(re.findall(r"\d+", second.content)[0])
        assert read is not None and read["value"] in (500 + step, 500 - step)
    elif problem.truth["kind"] == "list":
        assert followups.parse_question((first, Message("assistant", "nothing of the kind"), second)) is None


# ---- prompts that a model, or anyone, may have written ----


HOSTILE = [
    "Write f(x): it takes a text, repeats 999999999 times and returns the result.",
    "Write f(x): it takes a text, repeats 123456789 times and returns the result.",
    "Write f(x): it takes a text, repeats 12 times and returns the result.",
    "Write f(x): it takes a text, repeats 0 times and returns the result.",
    "Write f(x): it takes a text, repeats -1 times and returns the result.",
    "Write f(x): it takes a text, repeats 9**9 times and returns the result.",
    "Write f(x): it takes a text, repeats  times and returns the result.",
    "Write f(x): it takes a text, repeats {k} times and returns the result.",
    "Write f(x): it takes a text, repeats \u0665 times and returns the result.",
    "Write f(x): it takes a number, " + ", then ".join(["squares"] * 12) + " and returns the result.",
    "Write f(x): it takes a list, " + ", then ".join(["doubles the list"] * 40) + " and returns the result.",
    "Write f(x): it takes a list, sorts, then __import__('os').system('true') and returns the result.",
    "Write f(x): it takes a number, adds 3), then sorts and returns the result.",
    "Write f(x): it takes a number, sorts and returns the result.",
    "Write f(x): it takes a number,  and returns the result.",
    "Write f(x): it takes a number, and returns the result.",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_coding_task_is_not_understood(text: str) -> None:
    assert code.parse_question(text) is None


@given(st.lists(st.sampled_from([o.words for o in code.OPERATIONS]), min_size=1, max_size=5), st.sampled_from("ntlx"), seeds)
def test_no_coding_task_makes_a_huge_program(words: list[str], kind: str, number: int) -> None:
    what = code.KINDS.get(kind, ("a thing", ""))[0]
    steps = ", then ".join(w.replace("{k}", str(number)) for w in words)
    started = time.process_time()
    truth = code.parse_question(f"Write f(x): it takes {what}, {steps} and returns the result.")
    assert time.process_time() - started < 10
    if truth:
        assert len(truth["tests"]) < 30_000  # 9 * 9 * 9 times `Red fox` is the longest
        assert len(words) <= max(code.LEVELS) and (number <= 9 or not any("{k}" in w for w in words))


@given(st.text(alphabet="Ana has 0123456789.apples buys more?,\n\u0665[]'-", max_size=200))
def test_any_text_can_be_asked(text: str) -> None:
    for task in TASKS:
        assert WORLD.verifier(task, (Message("user", text),)) is None or any(c.isalpha() for c in text)
        WORLD.checkable(task, (Message("user", text),))
    followups.parse_question((Message("user", text), Message("assistant", text), Message("user", text)))
    WORLD.lands.parse_question(text)


def test_a_sum_with_a_huge_number_is_not_understood() -> None:
    many = "9" * 5000  # more digits than Python reads
    assert sums.parse_question(f"Ana has {many} nuts. Ana buys 2 more. How many nuts are there now?") is None
    assert sums.parse_question(f"Ana has 5 nuts. Ana buys {many} more. How many nuts are there now?") is None
    talk = (
        Message("user", "Ana has 5 nuts. Ana buys 2 more. How many nuts are there now?"),
        Message("assistant", f"The answer is {many}."),
    )
    assert followups.parse_question((*talk, Message("user", "Now add 3."))) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Ana has 5 nuts. Ana buys 2 more. How many nuts are there now?", 7),
        ("Zed has 5 rocks. Zed then has 3 times as many. Zed loses 4. How many rocks does Zed have now?", 11),
        ("Ana has 5 nuts. How many nuts are there now?", None),
        ("Ana has 5 nuts. Ben buys 2 more. How many nuts are there now?", None),
        ("Ana has 5 nuts. Ana buys 2 more. How many eggs are there now?", None),
        ("Ana has 5 nuts. Ana buys two more. How many nuts are there now?", None),
        ("Ana has 5 nuts. Ana buys 2 more.", None),
        ("", None),
    ],
)
def test_which_sums_are_understood(text: str, value: int | None) -> None:
    assert sums.parse_question(text) == value


@pytest.mark.parametrize("text", ["List six fruits separated by commas.", "List two cars separated by commas.", "List two fruits.", "List"])
def test_lists_of_other_worlds_are_not_understood(text: str) -> None:
    assert lists.parse_question(text) is None
