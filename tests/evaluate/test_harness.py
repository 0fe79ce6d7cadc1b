"""Prompts by hand from the harness's published rules, its random draws, filters and metrics; our extraction beside them."""

import math
import random
from pathlib import Path

import pytest

from gristmill.core.errors import InputError
from gristmill.evaluate.documents import read_task
from gristmill.evaluate.harness import (
    Answer,
    Item,
    Prompter,
    choice_scores,
    extract,
    is_exact,
    own_is_right,
    programs,
    rolling_windows,
    text_sizes,
)
from gristmill.evaluate.task import Task, find_tasks
from tests.evaluate.benchmarks import WINOGRANDE, jsonl, write_data


def items(name: str, folder: Path, num_fewshot: int) -> list[Item]:
    (task,) = find_tasks([name])
    return Prompter(read_task(task, folder, num_fewshot=num_fewshot)[0], num_fewshot=num_fewshot, seed=1234).items()


def task(name: str) -> Task:
    return find_tasks([name])[0]


def test_prompts_of_mmlu(tmp_path: Path) -> None:
    second = items("mmlu", write_data(tmp_path), 1)[1]
    choices = "A. red\nB. blue\nC. green\nD. black\nAnswer:"
    context = (
        "The following are multiple choice questions (with answers) about old stones.\n\n"
        f"Dev What is old_stones 0?\n{choices} A\n\nWhat is old_stones 1?\n{choices}"
    )
    assert second.pairs == tuple((context, f" {letter}") for letter in "ABCD") and second.gold == 1


def test_shots_are_drawn_anew_for_each_document_in_their_order(tmp_path: Path) -> None:
    found = items("arc_challenge", write_data(tmp_path), 2)
    draw = random.Random(1234)
    for number, item in enumerate(found):
        shots = []
        for place in draw.sample(range(27), 2):
            shots.append(f"Question: Train Why {place % 3}?\nAnswer: {['so', 'for it is', 'no'][place % 3]}\n\n")
        assert item.pairs[2] == (f"{''.join(shots)}Question: Why {number}?\nAnswer:", " no")
        assert item.gold == number


def test_hellaswag_is_cleaned_and_draws_one_shot_more(tmp_path: Path) -> None:
    """Neither fewshot_split nor test_split is named: the harness takes them for the same split."""
    found = items("hellaswag", write_data(tmp_path), 2)
    assert [c for _, c in found[0].pairs] == [" runs off.", " sits.", " grinds corn.", " sings."]
    places = random.Random(1234).sample(range(15), 3)[:2]
    labels = [f"Baking {place // 3}: A man {place % 3}. goes. He then" for place in places]
    answers = [["runs off.", "sits.", "grinds corn."][place % 3] for place in places]
    head = "".join(f"{label} {answer}\n\n" for label, answer in zip(labels, answers, strict=True))
    assert found[0].pairs[0][0] == f"{head}Milling: A man 0. goes. He then" and found[2].gold == 2


def test_the_evaluated_document_is_no_shot_of_its_own(tmp_path: Path) -> None:
    folder = write_data(tmp_path)
    (folder / "winogrande" / "train.jsonl").unlink()
    found = items("winogrande", folder, 2)
    assert not any(item.in_shots for item in found)
    first = found[0]
    places = [place for place in random.Random(1234).sample(range(3), 3) if place != 0][:2]
    shots = [f"Ann gave Bea {place} loaves because {['Bea', 'Ann'][place % 2]} was hungry.\n\n" for place in places]
    context = f"{''.join(shots)}Ann gave Bea 0 loaves because "
    assert first.pairs == ((f"{context}Ann", " was hungry."), (f"{context}Bea", " was hungry.")) and first.gold == 1
    with pytest.raises(InputError, match="one shot more than 3"):
        items("winogrande", folder, 3)
    jsonl(folder / "winogrande" / "validation.jsonl", WINOGRANDE[:1] * 5)
    with pytest.raises(InputError, match="only 0 of its pool are other documents"):
        items("winogrande", folder, 2)


def test_prompts_of_generation(tmp_path: Path) -> None:
    folder = write_data(tmp_path)
    gsm = items("gsm8k", folder, 1)[0]
    place = random.Random(1234).sample(range(6), 1)[0] % 3
    shot = f"Question: Train What is {place} and {place}?\nAnswer: Add them.\n#### {2 * place}\n\n"
    assert gsm.prompt == f"{shot}Question: What is 0 and 0?\nAnswer:"
    bbh = items("bbh", folder, 3)[1]
    step = "\nA: Let's think step by step.\n"
    shots = [("1+1", "Two. So the answer is 2."), ("2+2", "So the answer is 4."), ("3+3", "So the answer is 6.")]
    assert bbh.prompt == "Do sums.\n\n" + "".join(f"Q: {q}{step}{a}\n\n" for q, a in shots) + f"Q: 1+1{step}" and bbh.gold == "2"
    mbpp = items("mbpp", folder, 3)
    head = "You are an expert Python programmer, and here is your task: Write a function to add {0}. Your code should pass these tests:\n\n"
    head += "assert add(0) == {0}\nassert add(1) == {1}\nassert add(2) == {2}\n[BEGIN]\n"
    shots_of_mbpp = "".join(head.format(n, n + 1, n + 2) + f"def add(x):\r\n    return x + {n}\n[DONE]\n\n" for n in (2, 3, 4))
    assert [item.prompt for item in mbpp] == [shots_of_mbpp + head.format(n, n + 1, n + 2) for n in (11, 12)]
    assert items("ifeval", folder, 0)[0].prompt == "Say a word."
    eight = items("gsm8k_cot", folder, 8)[0].prompt
    assert eight.count("The answer is ") == 8 and eight.startswith("Q: There are 15 trees in the grove. Grove workers will plant trees")
    assert eight.endswith("23 - 15 is 8. The answer is 8.\n\nQ: What is 0 and 0?\nA:")


def test_scores_of_choices() -> None:
    item = Item(0, {}, choices=("ab", "abcdefgh", "\u00e9\u00e9\u00e9"), gold=1)
    answer = Answer(logprobs=[-2.0, -4.0, -2.9])
    # per character -1, -.5, -.97; per byte -1, -.5, -.48
    assert choice_scores(task("arc_challenge"), item, answer) == {"acc_norm": 1.0, "acc": 0.0, "acc_bytes": 0.0}
    tie = Answer(logprobs=[-2.0, -2.0, -2.0])
    assert choice_scores(task("truthfulqa_mc1"), Item(0, {}, choices=("a", "b", "c"), gold=0), tie) == {"acc": 1.0}
    doc = {"mc2_targets": {"choices": ["a", "b", "c"], "labels": [1, 0, 1]}}
    lls = [math.log(0.2), math.log(0.1), math.log(0.1)]
    assert choice_scores(task("truthfulqa_mc2"), Item(0, doc, choices=("a", "b", "c")), Answer(logprobs=lls))["mc2"] == pytest.approx(0.75)
    assert choice_scores(task("truthfulqa_mc2"), Item(0, doc, choices=("a", "b", "c")), Answer(logprobs=[-9e3, -9e3, -9e3]))["mc2"] > 0.6


@pytest.mark.parametrize(
    ("name", "text", "strict", "flexible", "own"),
    [
        ("gsm8k_cot", "So 9 + 9. The answer is 18.", "18", "18.", "18"),
        ("gsm8k_cot", "The answer is 18", "1", "18", "18"),
        ("gsm8k_cot", "The answer is $18.", "[invalid]", "$18.", "18"),
        ("gsm8k_cot", "The answer is 18.00.", "18.00", "18.00.", "18"),
        ("gsm8k_cot", "no idea", "[invalid]", "[invalid]", "[invalid]"),
        ("gsm8k", "9 + 9 = 18\n#### 18", "18", "18", "18"),
        ("bbh", "So the answer is (A).", "(A)", None, "(A)"),
        ("bbh", "So the answer is (A)", "(A", None, "(A)"),
        ("bbh", "So the answer is (B). ", "(B).", None, "(B)"),
    ],
)
def test_filters_and_our_own_extraction(name: str, text: str, strict: str, flexible: str | None, own: str) -> None:
    found = extract(task(name), Item(0, {}), text)
    assert [*found.by_filter.values()] == [strict, *([] if flexible is None else [flexible])]
    assert found.own == own


def test_what_is_right() -> None:
    spec = task("gsm8k").metric_list[0]
    assert own_is_right(task("bbh"), Item(0, {}, gold=("Yes", "True")), "true")
    assert is_exact(spec, "$1,800.", "Add.\n#### 1800") and not is_exact(spec, "18.00", "18")
    item = Item(0, {"answer": "Add.\n#### 18"}, gold="Add.\n#### 18")
    assert own_is_right(task("gsm8k"), item, "18") and not own_is_right(task("gsm8k"), item, "19")
    assert own_is_right(task("bbh"), Item(0, {}, gold="True"), "true") and not own_is_right(
        task("bbh"), Item(0, {}, gold="True"), "[invalid]"
    )


def test_programs_keep_their_indentation_and_code_blocks_are_cut_out(tmp_path: Path) -> None:
    folder = write_data(tmp_path)
    human, mbpp = items("humaneval", folder, 0)[1], items("mbpp", folder, 0)[0]
    body = "    return x + 1\n"
    found = programs(task("humaneval"), human, extract(task("humaneval"), human, body))
    assert found["create_test"] == (human.doc["prompt"] + body, f"{human.doc['test']}\ncheck(f1)")
    assert found["own"][0] == human.doc["prompt"] + body
    whole = "Here:\n```python\ndef f1(x):\n    return x + 1\n```\n"
    assert "Here" not in programs(task("humaneval"), human, extract(task("humaneval"), human, whole))["own"][0]
    future = "from __future__ import annotations\n"
    plain, fenced = "def add(x):\n    return x + 11", "```python\ndef add(x):\n    return x + 11\n```\nthen"
    quirk = f"{plain}\n```\nthen"  # the harness takes an answer's first word for a language
    for text, expected in ((plain, plain), (fenced, ""), (quirk, plain.removeprefix("def"))):
        assert extract(task("mbpp"), mbpp, text).by_filter["extract_code"] == future + expected
    for text in (plain, fenced):
        assert programs(task("mbpp"), mbpp, extract(task("mbpp"), mbpp, text))["own"][0].strip() == plain


def test_windows_predict_every_token_once() -> None:
    ids = list(range(1, 24))
    for limit in (4, 7, 23, 50):
        windows = rolling_windows(ids, 0, limit)
        assert [token for window, num in windows for token in window[-num:]] == ids
        assert windows[0][0][0] == 0 and all(len(window) <= limit + 1 and num < len(window) for window, num in windows)
    assert rolling_windows(ids[:5], 0, 4) == [([0, 1, 2, 3, 4], 4), ([1, 2, 3, 4, 5], 1)]
    assert rolling_windows([], 0, 4) == []
    assert text_sizes("a b\nc \u00e9") == {"word_perplexity": 4, "byte_perplexity": 8}
