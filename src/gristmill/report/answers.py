"""One question with the answers of all models of a run, side by side: from the evaluation's prompts, outcomes and journals."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gristmill.core.errors import InputError
from gristmill.data.chat import to_dicts
from gristmill.data.rows import Prompt
from gristmill.report.comparisons import MODES, model_stages, stage_label
from gristmill.report.markup import Markup, el
from gristmill.runs import artifacts
from gristmill.runs.reader import RunData

NUM_SHOWN = 5  # questions on the page
MAX_CHARACTERS = 1200  # of an answer on the page


@dataclass(frozen=True)
class Said:
    """A model's answer to a question, and whether it is right."""

    model: str
    text: str
    right: bool


class Answers:
    """The answers of all evaluated models of a run.

    Attributes:
        ids: of the evaluation's prompts, in their order.

    Raises:
        InputError: no model is evaluated yet, or a file is damaged.
    """

    def __init__(self, data: RunData, mode: str = MODES[0]):
        self.mode = mode
        self._data = data
        ids_of = {s["folder"]: data.columns(s["folder"], artifacts.EVALUATION, "id")["id"] for s in data.stages_with(artifacts.EVALUATION)}
        self._folders = [(folder, number) for folder, ids in ids_of.items() for number in range(len(ids))]
        self.ids: list[str] = [one for ids in ids_of.values() for one in ids.to_pylist()]
        self._models: list[tuple[str, str, Mapping[str, bool]]] = [
            (stage["name"], stage["folder"], data.read(stage["folder"], artifacts.OUTCOMES).get(mode, {})) for stage in model_stages(data)
        ]
        if not self._models or not self.ids:
            raise InputError(f"{data.folder} has no evaluated model yet: run the same command again to finish it.")

    def right(self, prompt: str) -> list[bool]:
        """Whether the answer of each model that was asked is right, in the order of the run, to the prompt with an id."""
        return [outcomes[prompt] for *_, outcomes in self._models if prompt in outcomes]

    def prompt(self, place: int) -> Prompt:
        """The prompt at a place, counted from 0."""
        folder, number = self._folders[place]
        (found,) = self._data.read(folder, artifacts.EVALUATION, [number])
        return found

    def to(self, prompts: Sequence[Prompt]) -> list[list[Said]]:
        """What every model says to each of some prompts, in the order of the run."""
        names = {prompt.id: f"{prompt.id}-{self.mode}" for prompt in prompts}
        out: list[list[Said]] = [[] for _ in prompts]
        for model, folder, outcomes in self._models:
            calls = self._data.records(folder, artifacts.EVALUATION_CALLS, set(names.values()))
            for said, prompt in zip(out, prompts, strict=True):
                if record := calls.get(names[prompt.id]):
                    said.append(Said(model, str(record["out"][0][0]), bool(outcomes.get(prompt.id))))
        return out

    def find(self, prompt: str) -> Prompt:
        """The prompt with an id, or of a place counted from 1; with "" the first that the first model fails and the last one answers."""
        if not prompt:
            place = next((n for n, one in enumerate(self.ids) if _turned(self.right(one))), 0)
        elif prompt.isdecimal() and 1 <= int(prompt) <= len(self.ids):
            place = int(prompt) - 1
        elif prompt in self.ids:
            place = self.ids.index(prompt)
        else:
            raise InputError(f"There is no evaluation prompt {prompt!r}: give its id, or a number from 1 to {len(self.ids)}.")
        return self.prompt(place)


def _turned(right: Sequence[bool]) -> bool:
    return bool(right) and not right[0] and right[-1]


def answers_table(answers: Answers, prompt: Prompt) -> dict[str, Any]:
    """One question and its answers as plain values."""
    (said,) = answers.to([prompt])
    rows = [{"model": s.model, "right": s.right, "text": s.text} for s in said]
    place = answers.ids.index(prompt.id) + 1
    asked = {"id": prompt.id, "number": place, "of": len(answers.ids), "task": prompt.task, "messages": to_dicts(prompt.messages)}
    return {**asked, "mode": answers.mode, "answers": rows}


def answers_lines(table: Mapping[str, Any]) -> list[str]:
    """The same for a terminal."""
    lines = [f"prompt {table['number']} of {table['of']}, id {table['id']}, task {table['task']}, {table['mode']}"]
    for message in table["messages"]:
        lines += [f"{message['role']}> {message['content']}"]
    for row in table["answers"]:
        lines += ["", f"{stage_label(row['model'])}: {'right' if row['right'] else 'wrong'}", f"  {row['text']}".replace("\n", "\n  ")]
    return lines


def answers_section(data: RunData) -> list[Markup]:
    """A few questions, drawn by the run's seed, those first on which the models disagree; each with all models' answers."""
    if not model_stages(data) or not data.stages_with(artifacts.EVALUATION):
        return [el("p", "No model has been evaluated yet.", class_="soft")]
    answers = Answers(data)
    drawn = random.Random(f"answers-{data.recipe.get('seed', 0)}").sample(range(len(answers.ids)), len(answers.ids))
    shown = [answers.prompt(n) for n in sorted(drawn, key=lambda n: len(set(answers.right(answers.ids[n]))) < 2)[:NUM_SHOWN]]
    return [_card(prompt, said) for prompt, said in zip(shown, answers.to(shown), strict=True)]


def _card(prompt: Prompt, said: Sequence[Said]) -> Markup:
    asked = [
        el("div", el("div", m.role, class_="who"), el("div", _cut(m.content), class_="said", dir="auto"), class_="turn")
        for m in prompt.messages
    ]
    rows = []
    for s in said:
        mark = el("span", "right" if s.right else "wrong", class_="chip good" if s.right else "chip bad")
        words = el("div", _cut(s.text) or "(nothing)", class_="said", dir="auto")
        rows.append(el("div", words, el("div", mark, el("span", stage_label(s.model)), class_="facts"), class_="answer"))
    return el("div", asked, rows, class_="sample")


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} [... {len(text) - MAX_CHARACTERS:,} more characters]"
