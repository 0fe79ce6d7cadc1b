"""Hand-made files of a few documents in the columns of published benchmarks, and sources of answers without a model."""

import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gristmill.evaluate.task import GenerationKwargs
from gristmill.workflows.benchmark_sources import Chat, Generated, Likelihood

COLOURS = ["red", "blue", "green", "black"]
MMLU = [
    {"question": f" What is {subject} {i}? ", "subject": subject, "choices": COLOURS, "answer": i % 4}
    for subject in ("old_stones", "rivers")
    for i in range(3)
]
MMLU_DEV = [row | {"question": f"Dev {row['question'].strip()}"} for row in MMLU]
ARC = [
    {"id": str(i), "question": f"Why {i}?", "choices": {"text": ["so", "for it is", "no"], "label": ["A", "B", "C"]}, "answerKey": "ABC"[i]}
    for i in range(3)
]
HELLASWAG = [
    {
        "ind": i,
        "activity_label": "Milling",
        "ctx_a": f"[header] A man {i} [title] goes.",
        "ctx_b": "he Then",
        "endings": ["runs [x] off.", "sits.", "  grinds  corn.", "sings."],
        "label": str(i),
    }
    for i in range(3)
]
WINOGRANDE = [
    {"sentence": f"Ann gave Bea {i} loaves because _ was hungry.", "option1": "Ann", "option2": "Bea", "answer": "21"[i % 2]}
    for i in range(3)
]
GSM8K = [{"question": f"What is {i} and {i}?", "answer": f"Add them.\n#### {2 * i}"} for i in range(3)]
HUMANEVAL = [
    {
        "task_id": f"HumanEval/{i}",
        "prompt": f'def f{i}(x):\n    """Add {i}."""\n',
        "test": f"def check(candidate):\n    assert candidate(1) == {i + 1}\n",
        "entry_point": f"f{i}",
        "canonical_solution": f"    return x + {i}\n",
    }
    for i in range(3)
]
MBPP = [
    {
        "task_id": number,
        "text": f"Write a function to add {number}.",
        "code": f"def add(x):\r\n    return x + {number}",
        "test_list": [f"assert add({n}) == {n + number}" for n in range(3)],
        "test_setup_code": "",
        "challenge_test_list": [],
    }
    for number in (12, 2, 11, 3, 4, 5, 600)
]
IFEVAL = [
    {"key": 1, "prompt": "Say a word.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"num_words": None}]},
    {
        "key": 2,
        "prompt": "Say two words.",
        "instruction_id_list": ["length_constraints:number_words", "detectable_format:title"],
        "kwargs": [{"num_words": 100, "relation": "less than"}, {"num_words": None, "relation": None}],
    },
]
BBH_PROMPT = (
    "BENCHMARK DATA\n-----\nDo sums.\n\nQ: 1+1\nA: Let's think step by step.\nTwo. So the answer is 2.\n\n"
    "Q: 2+2\nA: Let's think step by step. So the answer is 4.\n\nQ: 3+3\nA: Let's think step by step.\nSo the answer is 6."
)
BBH = [{"input": f"{i}+{i}", "target": str(2 * i)} for i in range(3)]


def jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), newline="")


def write_data(folder: Path) -> Path:
    """A folder with a few documents of each benchmark."""
    splits = {
        "mmlu/test": MMLU,
        "mmlu/dev": MMLU_DEV,
        "arc_challenge/test": ARC,
        "arc_challenge/train": [row | {"question": f"Train {row['question']}"} for row in ARC] * 9,
        "hellaswag/validation": HELLASWAG,
        "hellaswag/train": [row | {"activity_label": f"Baking {i}"} for i in range(5) for row in HELLASWAG],
        "winogrande/validation": WINOGRANDE,
        "winogrande/train": [row | {"option1": f"Cid {i}"} for i in range(3) for row in WINOGRANDE],
        "gsm8k/test": GSM8K,
        "gsm8k/train": [row | {"question": f"Train {row['question']}"} for row in GSM8K] * 2,
        "humaneval/test": HUMANEVAL,
        "ifeval/test": IFEVAL,
    }
    for name, rows in splits.items():
        jsonl(folder / f"{name}.jsonl", rows)
    jsonl(folder / "mbpp" / "mbpp.jsonl", MBPP)
    (folder / "bbh" / "bbh").mkdir(parents=True)
    (folder / "bbh" / "cot-prompts").mkdir()
    (folder / "bbh" / "bbh" / "web_of_lies.json").write_text(json.dumps({"canary": "x", "examples": BBH}))
    (folder / "bbh" / "cot-prompts" / "web_of_lies.txt").write_text(BBH_PROMPT)
    (folder / "text").mkdir()
    (folder / "text" / "one.txt").write_text("The mill\nturns and turns. " * 9)
    return folder


class Scripted:
    """Source that answers by a rule: the longest continuation is the likeliest, and texts are what `say` gives.

    Attributes:
        log: file that gets a line for each request.
        killed_after: answers after which it kills its process.
    """

    name, context = "scripted", None

    def __init__(self, answers: dict[str, str] | None = None, log: Path | None = None, killed_after: int | None = None) -> None:
        self.answers, self.log, self.killed_after = answers or {}, log, killed_after
        self.num_answers = 0

    def _note(self, what: Any) -> None:
        if self.num_answers == self.killed_after:
            os.kill(os.getpid(), signal.SIGKILL)
        self.num_answers += 1
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(json.dumps(what) + "\n")

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[int, Likelihood]]:
        for number, pair in reversed(list(enumerate(pairs))):  # in an order of its own
            self._note(pair)
            yield number, Likelihood(-100.0 + len(pair[0]) / 1e4 + len(pair[1]), False)

    def rolling(self, texts: Sequence[str]) -> Iterator[tuple[int, Likelihood]]:
        for number, text in enumerate(texts):
            self._note(text)
            yield number, Likelihood(-float(len(text.split())), False)

    def generate(
        self, prompts: Sequence[str], settings: GenerationKwargs, *, chat: Chat | None, seed: int
    ) -> Iterator[tuple[int, Generated]]:
        for number, prompt in enumerate(prompts):
            self._note(prompt)
            text = next((answer for ending, answer in self.answers.items() if prompt.endswith(ending)), "")
            yield number, Generated(text, len(text.split()), "stop")
