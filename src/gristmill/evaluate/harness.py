"""Requests and metrics of benchmark tasks, byte for byte as lm-eval 0.4.13 makes them, with our own extraction beside its.

Source: the harness's published behaviour (EleutherAI/lm-evaluation-harness, v0.4.13): shots, joining, filters and metrics.
"""

import math
import random
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from gristmill.core.errors import InputError
from gristmill.core.response_text import answer_text, extract_code, strip_thinking
from gristmill.core.untrusted import quoted
from gristmill.data.truths import read_truth
from gristmill.evaluate.documents import Doc, TaskData
from gristmill.evaluate.prompt_pieces import piece, text_piece
from gristmill.evaluate.task import AnswerFilter, FilterStep, MetricSpec, Task
from gristmill.verify.code_tests import check_text, complete
from gristmill.verify.final_answer import extract_answer
from gristmill.verify.ifeval import check_instructions
from gristmill.verify.math import is_equiv
from gristmill.verify.verify import last_number

INVALID = "[invalid]"
STATED = re.compile(r"\bthe answer is\b:?\s*", re.I)
FENCED = re.compile(r"```(?:\w+)?\n?(.*?)\n?```", re.S)
FUTURE = "from __future__ import annotations\n"  # which the harness puts before programs of mbpp


@dataclass(frozen=True)
class Item:
    """A document with what is asked about it.

    Attributes:
        pairs: contexts and continuations whose log-likelihoods are asked for.
        prompt: text to continue, or, of a rolling task, whose log-likelihood is asked for.
        gold: number of the right choice, or the right text; or several.
        in_shots: whether the document is among its own shots.
        shot_chars, question_chars: sizes of each shot, and of what follows them, to say how many are left where a context is cut.
    """

    number: int
    doc: Doc
    pairs: tuple[tuple[str, str], ...] = ()
    prompt: str = ""
    choices: tuple[str, ...] = ()
    gold: int | str | tuple[int, ...] | tuple[str, ...] = ""
    in_shots: bool = False
    shot_chars: tuple[int, ...] = ()
    question_chars: int = 0

    @property
    def golds(self) -> tuple[str, ...]:
        """The right texts."""
        return tuple(map(str, self.gold)) if isinstance(self.gold, tuple) else (str(self.gold),)

    @property
    def lacks_gold(self) -> bool:
        """Whether it names no right choice among its own."""
        return all(one == -1 for one in (self.gold if isinstance(self.gold, tuple) else (self.gold,)))


@dataclass
class Answer:
    """What a model answered to an item: log-likelihoods of its pairs, a text, or the log-likelihood of its text."""

    logprobs: list[float] = field(default_factory=list)
    greedy: list[bool] = field(default_factory=list)
    text: str = ""
    num_tokens: int = 0
    finish: str = ""


class Prompter:
    """Builder of a task's prompts: the shots of one document after the other, as they depend on those before.

    Args:
        num_fewshot: shots of a document.
        seed: of what draws them.
    """

    def __init__(self, data: TaskData, *, num_fewshot: int, seed: int) -> None:
        self.data, self.task, self.num_fewshot = data, data.task, num_fewshot
        self.draw = random.Random(seed)
        self._shots: dict[int, str] = {}

    @cached_property
    def _excludes(self) -> bool:
        """Whether a document is taken out of its own shots: where both splits have one name, or neither has one."""
        return self.task.fewshot_split == self.task.test_split and not self.task.fewshot_config.samples

    def items(self, limit: int | None = None) -> list[Item]:
        """The documents' items, of the first so many."""
        found = []
        for number, doc in enumerate(self.data.docs[:limit]):
            try:
                found.append(self._item(number, doc))
            except InputError as e:
                raise InputError(f"Document {number + 1} of {self.data.name}: {e}") from e
        return found

    def _places(self, doc: Doc) -> list[int]:
        """Places in the pool of a document's shots."""
        pool, num = self.data.pool, self.num_fewshot
        if not num:
            return []
        if self.task.fewshot_config.sampler == "first_n":
            return [i for i, one in enumerate(pool) if not (self._excludes and one == doc)][:num]
        if not self._excludes:
            return self.draw.sample(range(len(pool)), num)
        if len(pool) <= num:
            raise InputError(f"{self.data.name} draws one shot more than {num}, lest it be the document, and its pool has {len(pool)}.")
        drawn = [i for i in self.draw.sample(range(len(pool)), num + 1) if pool[i] != doc][:num]
        if len(drawn) < num:  # the pool has the document several times
            others = [i for i, one in enumerate(pool) if one != doc]
            if len(others) < num:
                raise InputError(f"{self.data.name} wants {num} shots and only {len(others)} of its pool are other documents: give more.")
            drawn = self.draw.sample(others, num)
        return drawn

    def _processed(self, doc: Doc) -> Doc:
        """A document with the columns that the task makes of it; only of those that are asked or shown."""
        made = {name: _piece(f"process_docs.{name}", template, doc) for name, template in self.task.process_docs.items()}
        return doc | made if made else doc

    def _shot(self, place: int) -> str:
        if place not in self._shots:
            doc, task, config = self._processed(self.data.pool[place]), self.task, self.task.fewshot_config
            question = _piece("doc_to_text of shots", task.doc_to_text if config.doc_to_text is None else config.doc_to_text, doc)
            answer = _piece("doc_to_target of shots", task.doc_to_target if config.doc_to_target is None else config.doc_to_target, doc)
            if task.doc_to_choice is not None:
                choices = _choices(task, doc)
                if isinstance(question, int):  # several contexts: the right one is the question
                    question = choices[question]
                elif (number := _number(answer)) is not None:
                    answer = choices[number]
            if isinstance(answer, list):
                answer = answer[0]
            answer = str(answer)
            self._shots[place] = f"{question}{task.target_delimiter}{answer}{task.fewshot_delimiter}" if answer else str(question)
        return self._shots[place]

    def _item(self, number: int, doc: Doc) -> Item:
        task = self.task
        places = self._places(doc)
        in_shots = self.data.pool_split == task.evaluated_split and any(self.data.pool[place] == doc for place in places)
        doc = self._processed(doc)
        head = str(_piece("description", self.data.description, doc)) if self.data.description else ""
        shots = [self._shot(place) for place in places]
        head += "".join(shots)
        of_shots: dict[str, Any] = {"shot_chars": tuple(map(len, shots))}
        of_shots["in_shots"] = in_shots
        if task.output_type == "loglikelihood_rolling":
            return Item(number, doc, prompt=str(_piece("doc_to_target", task.doc_to_target, doc)))
        question = _piece("doc_to_text", task.doc_to_text, doc)
        of_shots["question_chars"] = len(str(question))
        if task.output_type == "generate_until":
            target = _piece("doc_to_target", task.doc_to_target, doc)
            gold = tuple(map(str, target)) if isinstance(target, list | tuple) else str(target)
            if task.own is not None and task.own.target:
                _piece("own.target", task.own.target, doc)  # which fails here rather than after the answers
            return Item(number, doc, prompt=f"{head}{question}", gold=gold, **of_shots)
        choices = _choices(task, doc)
        target = _piece("doc_to_target", task.doc_to_target, doc)
        if isinstance(question, int):
            of_shots["question_chars"] = max(map(len, choices))
            pairs = tuple((f"{head}{choice}", f"{task.target_delimiter}{target}") for choice in choices)
            return Item(number, doc, pairs, choices=tuple(choices), gold=_gold(question, choices), **of_shots)
        pairs = tuple((f"{head}{question}", f"{task.target_delimiter}{choice}") for choice in choices)
        return Item(number, doc, pairs, choices=tuple(choices), gold=_gold(target, choices), **of_shots)


def _choices(task: Task, doc: Doc) -> list[str]:
    spec = task.doc_to_choice
    assert spec is not None
    if isinstance(spec, str):
        found = _piece("doc_to_choice", spec, doc)
        if not isinstance(found, list | tuple) or not found or not all(isinstance(one, str) for one in found):
            raise InputError(f"doc_to_choice of {task.task} gives no list of texts for a document: mend the task file or the data.")
        return list(found)
    return [text_piece(one, doc) for one in spec]


def _piece(key: str, template: str | int, doc: Doc) -> Any:
    """What a key of the task file makes of a document. A name alone must be a column, or it would be the text of every document."""
    if key.startswith("doc_to_") and isinstance(template, str) and template.isidentifier() and template not in doc:
        columns = quoted(", ".join(map(str, doc)))[1:-1]
        raise InputError(f"{key} names the column {template!r}, and the document has {columns}. A constant text is written {{{{'...'}}}}.")
    try:
        return piece(template, doc)
    except InputError as e:
        raise InputError(f"{key}: {e}") from e


def _number(value: Any) -> int | None:
    """A value as a choice's number, where it is one."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int):
        return value
    return int(value) if isinstance(value, str) and value.isdigit() and value.isascii() and len(value) < 4 else None


def _gold(target: Any, choices: Sequence[str]) -> int | tuple[int, ...]:
    """Number of the right choice, or those of several; -1 where it is none."""
    if isinstance(target, list | tuple):
        return tuple(n if (n := _number(one)) is not None and 0 <= n < len(choices) else -1 for one in target)
    number = _number(target)
    if number is None:
        return list(choices).index(target) if target in choices else -1
    return number if 0 <= number < len(choices) else -1


# ---- metrics of choices ----


def choice_scores(task: Task, item: Item, answer: Answer) -> dict[str, float]:
    """Metrics of a multiple-choice document. The first of equal choices wins."""
    lls = answer.logprobs
    by_chars = [ll / max(1, len(choice)) for ll, choice in zip(lls, item.choices, strict=True)]
    by_bytes = [ll / max(1, len(choice.encode())) for ll, choice in zip(lls, item.choices, strict=True)]
    predictions = {"acc": _argmax(lls), "acc_norm": _argmax(by_chars), "acc_bytes": _argmax(by_bytes)}
    gold = item.gold if isinstance(item.gold, tuple) else (item.gold,)
    out = {}
    for spec in task.metric_list:
        if spec.metric == "mc2":
            out["mc2"] = _true_share(task, item.doc, lls)
        else:
            out[spec.metric] = float(predictions[spec.metric] in gold)
    return out


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda i: (values[i], -i))


def _true_share(task: Task, doc: Doc, lls: Sequence[float]) -> float:
    """Share of the choices' probability that is on the true ones."""
    targets = doc.get("mc2_targets")
    labels = targets.get("labels", list(targets.values())) if isinstance(targets, dict) else None
    if not isinstance(labels, list) or len(labels) != len(lls):
        raise InputError(f"A document of {task.task} has no mc2_targets.labels, one for each choice: give the published file.")
    top = max(lls)
    probs = [math.exp(ll - top) for ll in lls]
    return sum(p for p, label in zip(probs, labels, strict=True) if label == 1) / sum(probs)


# ---- metrics of generated answers ----


@dataclass
class Extracted:
    """What the chains of filters make of an answer, by name, and ours ("own")."""

    by_filter: dict[str, str]
    own: str | None = None


def extract(task: Task, item: Item, text: str) -> Extracted:
    """What is scored of an answer."""
    chains = task.filter_list or (AnswerFilter(name="none", filter=(FilterStep(function="take_first"),)),)
    found = {}
    for chain in chains:
        value = text
        for step in chain.filter:
            value = _filtered(step, value, item.doc)
        found[chain.name] = value
    return Extracted(found, None if task.own is None else _own(task.own.extract, text))


def _filtered(step: FilterStep, text: str, doc: Doc) -> str:
    if step.function == "regex":
        matches = re.findall(step.regex_pattern, text)
        if not matches or not -len(matches) <= step.group_select < len(matches):
            return step.fallback
        match = matches[step.group_select]
        if isinstance(match, tuple):
            match = next((group for group in match if group), step.fallback)
        return str(match).strip()
    if step.function == "prompt_and_answer":
        return f"{doc.get('prompt', '')}{text}"
    if step.function == "code_block":
        blocks = FENCED.findall("```" + text) or FENCED.findall(text.replace("```python", "```"))
        return FUTURE + (blocks[0] if blocks else text)
    return text


def _own(kind: str, text: str) -> str:
    if kind == "number":
        number = last_number(answer_text(text))
        return INVALID if number is None else str(number)
    if kind == "answer":
        parts = STATED.split(answer_text(text))
        if len(parts) < 2:
            return extract_answer(answer_text(text)) or INVALID
        return parts[-1].split("\n")[0].strip().removesuffix(".").strip()
    return strip_thinking(text)


def is_exact(spec: MetricSpec, prediction: str, reference: str) -> bool:
    """Exact match: what is ignored is removed from both sides, one pattern after another."""
    for pattern in spec.regexes_to_ignore:
        prediction, reference = re.sub(pattern, "", prediction), re.sub(pattern, "", reference)
    if spec.ignore_case:
        prediction, reference = prediction.lower(), reference.lower()
    if spec.ignore_punctuation:
        table = str.maketrans("", "", string.punctuation)
        prediction, reference = prediction.translate(table), reference.translate(table)
    return prediction == reference


def own_is_right(task: Task, item: Item, found: str) -> bool:
    """Whether our extraction of an answer is right, by number, as mathematics, or as a text but for case."""
    assert task.own is not None
    if found == INVALID:
        return False
    golds = (text_piece(task.own.target, item.doc),) if task.own.target else item.golds
    if task.own.extract == "number":
        return any((wanted := last_number(gold)) is not None and last_number(found) == wanted for gold in golds)
    return any(" ".join(found.lower().split()) == " ".join(gold.lower().split()) or is_equiv(found, gold) for gold in golds)


def programs(task: Task, item: Item, extracted: Extracted) -> dict[str, tuple[str, str]]:
    """Program and check of each column: the harness's, and ours."""
    out = {name: (program, str(item.gold)) for name, program in extracted.by_filter.items()}
    if extracted.own is not None:
        truth = read_truth({name: value for name, value in item.doc.items() if name != "challenge_test_list"}) or {}
        if truth.get("kind") != "code":
            raise InputError(f"A document of {task.task} has no tests that can run: give `test` with `entry_point`, or `test_list`.")
        check = check_text(truth)
        continues = "```" not in extracted.own and extracted.own[:1].isspace()  # the first token may be the indentation
        out["own"] = (complete(truth, extracted.own if continues else extract_code(extracted.own, check)), check)
    return out


def ifeval_verdicts(doc: Doc, text: str) -> dict[str, list[bool]]:
    """Which instructions of an IFEval document hold, strictly and loosely."""
    truth = read_truth({name: doc[name] for name in ("instruction_id_list", "kwargs")})
    assert truth is not None
    return {mode: check_instructions(truth["checks"], text, loose=mode == "loose", prompt=doc["prompt"]) for mode in ("strict", "loose")}


# ---- rolling ----


def rolling_windows(ids: Sequence[int], prefix: int, max_length: int) -> list[tuple[list[int], int]]:
    """Windows of a long text: token ids, and how many at the end are predicted. Every token is predicted once.

    The first window begins with `prefix`; a later one with one token of context, the last with as many as fit.
    """
    if not ids:
        return []
    first = min(max_length, len(ids))
    windows = [([prefix, *ids[:first]], first)]
    done = first
    while done < len(ids):
        num = min(len(ids) - done, max_length)
        end = done + num
        windows.append((list(ids[max(0, end - max_length - 1) : end]), num))
        done = end
    return windows


def text_sizes(text: str) -> dict[str, int]:
    """Words and bytes that perplexities are of."""
    return {"word_perplexity": len(re.split(r"\s+", text)), "byte_perplexity": len(text.encode())}
