"""MT-Bench: 80 questions of two turns, answers graded 1 to 10 by an LLM judge or compared in pairs (arXiv 2306.05685).

The protocol is that of FastChat's llm_judge; the judge's prompts say the same in other words. References are the corrected ones of the
HelpSteer2 paper (appendix H) where their file is found.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gristmill.core.errors import InputError
from gristmill.core.response_text import answer_text, code_blocks
from gristmill.core.untrusted import quoted, quoted_path
from gristmill.data.chat import Conversation
from gristmill.data.rows import read_records
from gristmill.evaluate.model_answers import data_files, find_file, read_answers
from gristmill.evaluate.stats import bootstrap
from gristmill.generation.api import SamplingParams
from gristmill.judge.pairwise import Verdict, judge_prompt

NUM_QUESTIONS, NUM_TURNS = 80, 2
MAX_TOKENS, JUDGE_TOKENS = 1024, 2048
# Sampling temperature of an answer by category (FastChat); other categories are those of a user's own questions.
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
TEMPERATURES |= dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0)
OTHER_TEMPERATURE = 0.7
REFERENCE_CATEGORIES = ("math", "reasoning", "coding")
CORRECTED = "gpt-4-0125-preview"  # who wrote the corrected references
MIN_RATING, MAX_RATING = 1.0, 10.0

GRADE = """You grade what an AI assistant said to a user, and favour nobody. Weigh whether it does what was asked, is right and to the
point, goes as deep and has as much detail as the request needs, and shows imagination where that is wanted.{more} Explain your grade in
a few sentences first. Then end with a number from 1 (of no use) to 10 (nothing could be better) in double brackets, in exactly this
form:
Rating: [[5]]"""
OF_REFERENCE = """ A reference answer is given: compare with it first, and name the mistakes that you find."""
OF_SECOND_TURN = """ The user asked twice: grade the answer to the second question, and read the first as its context."""
COMPARE = """You compare what two AI assistants said to a user, and favour neither. Weigh which of them does what was asked, is right
and to the point, goes as deep and has as much detail as the request needs, and shows imagination where that is wanted. Neither the
order in which they stand nor their length or their names may count.{more} Explain your comparison in a few sentences first. Then end
with your verdict in exactly one of these forms: [[A]] if assistant A is better, [[B]] if assistant B is better, [[C]] for a tie."""

DOUBLE_BRACKETS = r"\[\[\s*(\d{1,2}(?:\.\d+)?)\s*(?:/\s*10\s*)?\]\]"
# A line that says Rating: "**Rating:** 7/10", "Final rating (1-10): 8". A scale is no rating: "Rating: 1 to 10", "Rating: 4/5".
RATING_LINE = (
    r"^[^\w\n]{0,20}(?:(?:my|the|final|overall)[^\w\n]{1,5}){0,3}rating\b[^\n\d(]{0,30}(?:\([^()\n]{0,30}\)[^\n\d]{0,10})?[^\n\d]{0,10}"
    r"(\d{1,2}(?:\.\d+)?)(?!\.?\d)(?!\s*(?:-|\u2013|to\b)\s*\d)(?!\s*/\s*(?!10\b)\d)"
    r"(?!\s*(?:%|percent\b|points?\s+(?:lower|higher|less|more|below|above)\b))"
)
RATING = re.compile(f"{DOUBLE_BRACKETS}|{RATING_LINE}", re.I | re.M | re.ASCII)
FASTCHAT_RATINGS = [re.compile(pattern) for pattern in (r"\[\[(\d+\.?\d*)\]\]", r"\[(\d+\.?\d*)\]")]


@dataclass(frozen=True)
class Question:
    """Question of MT-Bench: two turns, and a reference answer to each where its category has them."""

    id: str
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...] = ()


# ---- files ----


def read_questions(data: Path, references: Path | None = None) -> tuple[list[Question], str]:
    """Questions of a file, or of the one in a folder, with the references that are found; and a word about which those are.

    Columns: question_id, category, turns (FastChat), or prompt_id, category, prompt, reference (Hugging Face).

    Raises:
        InputError: a file is missing or lacks a column, or a question of a category that needs references has none.
    """
    path = find_file(data, "file of MT-Bench's questions (question.jsonl)", lambda p: p.stem.startswith("question"))
    answered, said = _references(references or _find_references(path.parent))
    questions: dict[str, Question] = {}
    for number, row in enumerate(read_records(path), 1):
        name, turns = row.get("question_id", row.get("prompt_id")), row.get("turns", row.get("prompt"))
        category = row.get("category")
        is_two = isinstance(turns, list) and len(turns) == NUM_TURNS and all(isinstance(turn, str) for turn in turns)
        if not isinstance(name, str | int) or not isinstance(category, str) or not isinstance(turns, list) or not is_two:
            raise InputError(f"Row {number} of {quoted_path(path)} is no question of MT-Bench: give question_id, category and two turns.")
        if str(name) in questions:
            raise InputError(f"Row {number} of {quoted_path(path)} has the id {name} of an earlier one: give each question its own.")
        own = row.get("reference")
        found = answered.get(str(name)) or (tuple(own) if isinstance(own, list) and all(isinstance(r, str) for r in own) else ())
        if category in REFERENCE_CATEGORIES:
            if len(found) < NUM_TURNS:
                raise InputError(
                    f"Question {name} of {quoted_path(path)} ({category}) is graded beside a reference answer to each turn, and has "
                    f"{len(found)}: give FastChat's file of references with --references."
                )
        else:
            found = ()  # the protocol shows references in these categories alone
        questions[str(name)] = Question(str(name), category, tuple(turns), found[:NUM_TURNS])
    return list(questions.values()), said if answered else "the questions' own"


def _find_references(folder: Path) -> Path | None:
    """The corrected references before others."""
    found = [p for p in data_files(folder) if p.suffix == ".jsonl" and "reference" in str(p.relative_to(folder))]
    return next((p for p in found if CORRECTED in p.name), next((p for p in found if "uncorrected" not in p.name), next(iter(found), None)))


def _references(path: Path | None) -> tuple[Mapping[str, tuple[str, ...]], str]:
    if path is None:
        return {}, "none"
    found = read_answers(path)
    others = f"{path.name}, by {found.model}: of FastChat's own 13 are wrong"
    return found.by_question, f"corrected ({path.name})" if found.model == CORRECTED else others


# ---- requests ----


def answer_sampling(question: Question, *, greedy: bool = False, max_tokens: int = MAX_TOKENS) -> SamplingParams:
    """How an answer is sampled: by its category, or greedily (as for Nemotron-4)."""
    temperature = 0.0 if greedy else TEMPERATURES.get(question.category, OTHER_TEMPERATURE)
    return SamplingParams(temperature=temperature, max_tokens=max_tokens)


def grading_prompt(question: Question, answers: Sequence[str], turn: int) -> Conversation:
    """What the judge is asked about the answer to one turn (0 or 1); the second is judged with both turns shown."""
    more = (OF_REFERENCE if question.references else "") + (OF_SECOND_TURN if turn else "")
    parts = [_talk("reference answers", question.turns, question.references, turn)] if question.references else []
    parts.append(_talk("the assistant's answers", question.turns, answers, turn))
    return judge_prompt(GRADE.format(more=more), parts)


def comparing_prompt(question: Question, a: Sequence[str], b: Sequence[str], turn: int) -> Conversation:
    """What the judge is asked about two assistants' answers to one turn."""
    more = (OF_REFERENCE if question.references else "") + (OF_SECOND_TURN.replace("grade", "compare") if turn else "")
    parts = [_talk("reference answers", question.turns, question.references, turn)] if question.references else []
    parts += [_talk(f"assistant {name}'s answers", question.turns, answers, turn) for name, answers in (("A", a), ("B", b))]
    return judge_prompt(COMPARE.format(more=more), parts)


def _talk(title: str, turns: Sequence[str], answers: Sequence[str], last: int) -> str:
    spoken = [f"### User:\n{asked}\n\n### Answer:\n{said}" for asked, said in list(zip(turns, answers, strict=False))[: last + 1]]
    return "\n\n".join([f"<|begin of {title}|>", *spoken, f"<|end of {title}|>"])


# ---- verdicts and scores ----


def parse_rating(reply: str) -> float | None:
    """The rating of a judge's reply: the last from 1 to 10 in double brackets or on a line that says Rating; None where there is none.

    Thinking is left out, and so is quoted code, whose brackets are lists, unless a block holds nothing but a rating.
    """
    text = answer_text(reply)
    for block in reversed(code_blocks(text)):
        code = block.code.strip()
        if not (RATING.fullmatch(code) or RATING.fullmatch(code.rstrip("]*. "))):
            text = text[: block.start] + text[block.end :]
    values = [float(m[1] or m[2]) for m in RATING.finditer(text)]
    return next((value for value in reversed(values) if MIN_RATING <= value <= MAX_RATING), None)


def parse_rating_as_fastchat(reply: str) -> float | None:
    """The rating that FastChat reads: the first number in double brackets, else in single ones; None where it drops the reply."""
    found = (pattern.search(reply) for pattern in FASTCHAT_RATINGS)
    return next((float(m[1]) for m in found if m), None)


def grade_scores(rows: Sequence[Mapping[str, Any]], *, seed: int = 0) -> dict[str, Any]:
    """MT-Bench's mean, by category and turn, with bootstrap intervals over questions; beside it what FastChat reads of the same replies.

    Args:
        rows: id, category, turn (1 or 2), score and fastchat_score, None where a reply is unreadable or there is none.
    """

    def of(part: Sequence[Mapping[str, Any]], key: str = "score") -> dict[str, Any]:
        by_question: dict[str, list[float]] = {}
        for row in part:
            if row[key] is not None:
                by_question.setdefault(row["id"], []).append(row[key])
        return bootstrap(list(by_question.values()), seed=seed)

    categories = {c: of([r for r in rows if r["category"] == c]) for c in dict.fromkeys(r["category"] for r in rows)}
    means = [score["mean"] for score in categories.values()]
    return {
        "overall": of(rows),
        "mean_of_categories": round(sum(means) / len(means), 4) if means and None not in means else None,
        "turns": {str(turn): of([r for r in rows if r["turn"] == turn]) for turn in (1, 2)},
        "categories": categories,
        "fastchat": of(rows, "fastchat_score") | {"read_otherwise": sum(r["score"] != r["fastchat_score"] for r in rows)},
    }


def pair_scores(rows: Sequence[Mapping[str, Any]], *, seed: int = 0) -> dict[str, Any]:
    """Wins, ties and losses against the baseline: a win only where both orders agree; the win rate counts a tie half.

    Args:
        rows: id, category, turn and verdict ("first": the model's answer is better).
    """
    points: dict[Verdict, float] = {"first": 1.0, "tie": 0.5, "second": 0.0}

    def of(part: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        kinds = Counter(r["verdict"] for r in part)
        by_question: dict[str, list[float]] = {}
        for row in part:
            if row["verdict"] in points:
                by_question.setdefault(row["id"], []).append(points[row["verdict"]])
        counts = {"wins": kinds["first"], "ties": kinds["tie"], "losses": kinds["second"]}
        return {**bootstrap(list(by_question.values()), seed=seed), **counts}

    return {
        "overall": of(rows),
        "turns": {str(turn): of([r for r in rows if r["turn"] == turn]) for turn in (1, 2)},
        "categories": {c: of([r for r in rows if r["category"] == c]) for c in dict.fromkeys(r["category"] for r in rows)},
    }


def notes(questions: Sequence[Question], said: str) -> list[str]:
    """What sets a run apart from the published protocol, a sentence each."""
    out = []
    if len(questions) != NUM_QUESTIONS:
        out.append(f"{len(questions)} questions instead of the published {NUM_QUESTIONS}: the mean is that of another set.")
    unknown = sorted({q.category for q in questions} - TEMPERATURES.keys())
    if unknown:
        out.append(f"Categories that MT-Bench does not have ({quoted(unknown)}): sampled at temperature {OTHER_TEMPERATURE}.")
    if not said.startswith("corrected") and any(q.references for q in questions):
        out.append(f"The references are not the corrected ones ({said}): scores are not those of the Nemotron-4 protocol.")
    return out
