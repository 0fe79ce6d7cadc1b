"""Arena-Hard v0.1 and v2.0: a model against a baseline, judged in both orders (arXiv 2406.11939); Bradley-Terry and style control.

Scores are those of arena-hard-auto at its head; the judge's prompts say the same in other words. N battles, M models, F style features.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gristmill.core.errors import InputError
from gristmill.core.response_text import answer_text
from gristmill.core.untrusted import quoted, quoted_path
from gristmill.data.chat import Conversation
from gristmill.data.rows import read_records
from gristmill.evaluate.model_answers import ModelAnswers, data_files, find_file, read_answers
from gristmill.evaluate.stats import accuracy, bootstrap
from gristmill.judge.pairwise import judge_prompt

if TYPE_CHECKING:
    import numpy as np

V01 = "arena-hard-v0.1"
BASELINES = {
    V01: "gpt-4-0314",
    "hard_prompt": "o3-mini-2025-01-31",
    "coding": "o3-mini-2025-01-31",
    "math": "o3-mini-2025-01-31",
    "creative_writing": "gemini-2.0-flash-001",
}
NUM_QUESTIONS = {True: 500, False: 750}  # of v0.1, of v2.0
MAX_TOKENS = 4096
JUDGE_TOKENS = {True: 4096, False: 16_000}
NUM_BOOTSTRAPS = 100
STRONG = 3  # weight of a strong verdict
RIDGE = 1e-3  # on every coefficient: without it, a model that wins all its battles has no finite strength

JUDGE = """You compare what two AI assistants, A and B, said to a user, and favour neither.{own} Find and correct what is wrong in
either. Then weigh which is more helpful (it does what was asked, and asks back where the request can be read in several ways), more to
the point and clearer, without padding; then whether it is original where that is wanted, and whether something important is missing.
Explain yourself, and end with exactly one of these five verdicts:
[[A>>B]] assistant A is much better
[[A>B]] assistant A is a little better
[[A=B]] both are about as good
[[B>A]] assistant B is a little better
[[B>>A]] assistant B is much better
For example: My verdict is [[A=B]]"""
OWN_ANSWER = " First answer the request yourself, before you judge, and hold both answers against yours."

VERDICT = re.compile(r"\[\[([AB<>=]+)\]\]")
LOOSE_VERDICT = re.compile(r"\[([AB<>=]+)\]")  # what arena-hard-auto falls back to
# What A's side of a battle gets for each verdict; a strong one counts three times.
SCORES = {
    "A>B": [1.0], "A>>B": [1.0] * STRONG, "A=B": [0.5], "A<B": [0.0], "A<<B": [0.0] * STRONG,
    "B>A": [0.0], "B>>A": [0.0] * STRONG, "B=A": [0.5], "B<A": [1.0], "B<<A": [1.0] * STRONG,
}  # fmt: skip

# Counts of Markdown, as arena-hard-auto's, in time that grows with the text: blanks before a list never cross a line.
HEADER = re.compile(r"^#{1,6}\s", re.M)
LIST_ITEM = re.compile(r"^[^\S\n]*(?:\d+\.|[-*+])\s", re.M)
BOLD = re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__")
FENCED = re.compile(r"```([^`]*)```")
WORD = re.compile(r"\w+|[^\w\s]")
STYLE = ("length", "headers", "lists", "bold")


@dataclass(frozen=True)
class Question:
    """Question of Arena-Hard."""

    id: str
    category: str
    prompt: str

    @property
    def is_v01(self) -> bool:
        return self.category not in BASELINES or self.category == V01


@dataclass(frozen=True)
class Battle:
    """What came of one question: the model's scores from both games, and the style of both answers.

    Attributes:
        scores: 1 for the model, 0 for the baseline, .5 for both, a strong verdict three times.
        style, baseline_style: tokens, headers, list items and bold spans of the answers.
    """

    id: str
    model: str
    baseline: str
    scores: tuple[float, ...]
    style: tuple[int, ...] = ()
    baseline_style: tuple[int, ...] = ()


# ---- files ----


def read_questions(data: Path) -> list[Question]:
    """Questions of a file, or of question.jsonl in a folder: uid, category, prompt (or v0.1's older question_id, turns).

    Raises:
        InputError: the file is missing or a row lacks a column.
    """
    path = find_file(data, "file of Arena-Hard's questions (question.jsonl)", lambda p: p.stem.startswith("question"))
    questions: dict[str, Question] = {}
    for number, row in enumerate(read_records(path), 1):
        prompt = row.get("prompt")
        match row.get("turns"):
            case [{"content": str(text)}, *_] if prompt is None:
                prompt = text
        name, category = row.get("uid", row.get("question_id")), row.get("category", V01)
        if not isinstance(name, str | int) or not isinstance(prompt, str) or not isinstance(category, str):
            raise InputError(f"Row {number} of {quoted_path(path)} is no question of Arena-Hard: give uid, category and prompt.")
        questions[str(name)] = Question(str(name), category, prompt)
    if not questions:
        raise InputError(f"{quoted_path(path)} holds no questions: give Arena-Hard's question.jsonl.")
    return list(questions.values())


def read_baselines(data: Path, questions: Sequence[Question], given: Path | None = None) -> dict[str, ModelAnswers]:
    """The baseline's answers for each category: of the file that is given, else of the files in the folder named for the baseline.

    Raises:
        InputError: a category's baseline has no file.
    """
    if given is not None:
        return dict.fromkeys((q.category for q in questions), read_answers(given))
    files = data_files(data if data.is_dir() else data.parent)
    out: dict[str, ModelAnswers] = {}
    for category in dict.fromkeys(q.category for q in questions):
        name = BASELINES.get(category, BASELINES[V01])
        known = {found.model: found for found in out.values()}
        path = next((p for p in files if name in p.stem), None)
        if name not in known and path is None:
            raise InputError(
                f"The baseline of {quoted(category)} is {name}, and {quoted_path(data)} has no file of its answers "
                f"(model_answer/{name}.jsonl): put it there, or give --baseline FILE."
            )
        out[category] = known[name] if name in known or path is None else read_answers(path)
    return out


# ---- requests and verdicts ----


def judging_prompt(question: Question, a: str, b: str) -> Conversation:
    """What the judge is asked in one game. In the first A is the baseline, in the second the model."""
    own = "" if question.category == "creative_writing" else OWN_ANSWER
    talk = [f"<|user's request|>\n{question.prompt}"]
    talk += [f"<|begin of assistant {x}'s answer|>\n{text}\n<|end of assistant {x}'s answer|>" for x, text in (("A", a), ("B", b))]
    return judge_prompt(JUDGE.format(own=own), talk)


def parse_verdict(reply: str) -> str | None:
    """The verdict of a judge's reply: the last label in double brackets, else in single ones; None where there is none."""
    text = answer_text(reply).upper()
    for pattern in (VERDICT, LOOSE_VERDICT):
        if found := [label for label in pattern.findall(text) if label in SCORES]:
            return str(found[-1])
    return None


def battle_scores(first_game: str | None, second_game: str | None) -> tuple[float, ...]:
    """The model's scores from the verdicts of both games; none, and the question is dropped whole, where one is unreadable."""
    if first_game is None or second_game is None:
        return ()
    return (*SCORES[second_game], *(1 - score for score in SCORES[first_game]))


def first_place(verdicts: Sequence[str | None]) -> dict[str, Any]:
    """Position bias: how often the answer that stands first is called better, of the games that are decided; .5 without bias."""
    values = [SCORES[v][0] for v in verdicts if v is not None]
    return accuracy([value == 1.0 for value in values if value != 0.5])


# ---- scores ----


def win_rate(battles: Sequence[Battle], *, seed: int = 0) -> dict[str, Any]:
    """Win rate of a model (0 to 100): the mean of its scores.

    Returns:
        mean; ci95, a bootstrap over questions; ci90, as arena-hard-auto takes it: 100 bootstraps over single scores, 5 to 95 %, which
        is too narrow, since a strong verdict makes three scores of one; n, questions; bradley_terry, the same from a fit.
    """
    import numpy as np

    found = bootstrap([b.scores for b in battles], seed=seed)
    scores = np.array([s for b in battles for s in b.scores])
    if not len(scores):
        return {"mean": None, "ci95": None, "ci90": None, "n": 0, "bradley_terry": None}
    draws = np.random.default_rng(seed).choice(scores, (NUM_BOOTSTRAPS, len(scores))).mean(1)
    return {
        "mean": _percent(scores.mean()),
        "ci95": [_percent(x) for x in found["ci95"]],
        "ci90": [_percent(x) for x in np.percentile(draws, [5, 95])],
        "n": len(battles),
        "bradley_terry": next(iter(leaderboard(battles, features=(), num_bootstraps=0).values()))["mean"],
    }


def style_of(text: str, num_tokens: int | None = None) -> tuple[int, ...]:
    """Tokens, headers, list items and bold spans of an answer, without its fenced code.

    The code is taken away as arena-hard-auto does it: the text between two fences, wherever it stands, and not the fences.

    Args:
        num_tokens: where a tokenizer has counted them; default the number of words and marks.
    """
    tokens = len(WORD.findall(text)) if num_tokens is None else num_tokens
    for block in dict.fromkeys(FENCED.findall(text)):  # in their order, which tells where one is part of another
        text = text.replace(block, "") if block else text
    return tokens, *(len(pattern.findall(text)) for pattern in (HEADER, LIST_ITEM, BOLD))


def style_features(style: Sequence[int], baseline: Sequence[int]) -> list[float]:
    """Differences in style: (m - b)/(m + b) of lengths, (d_m - d_b)/(d_m + d_b + 1) of densities d = count/(tokens + 1)."""
    tokens, other_tokens = style[0], baseline[0]
    ours, theirs = [c / (tokens + 1) for c in style[1:]], [c / (other_tokens + 1) for c in baseline[1:]]
    length = (tokens - other_tokens) / (tokens + other_tokens) if tokens + other_tokens else 0.0
    return [length, *((m - b) / (m + b + 1) for m, b in zip(ours, theirs, strict=True))]


def leaderboard(
    battles: Sequence[Battle], *, features: Sequence[str] = STYLE, num_bootstraps: int = NUM_BOOTSTRAPS, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Win rates (0 to 100) of all models against their common baseline: Bradley-Terry, with style control where features are named.

    Logistic regression without intercept on one-hot(model) - one-hot(baseline) and the standardised style features; a score of .5 is a
    soft label; a ridge of `RIDGE` on every coefficient. A feature that never varies changes nothing.

    Returns:
        by model: mean, from all battles; median, ci90 and ci95 of bootstraps over questions; n; and the style's coefficients.
    """
    import numpy as np

    battles = [b for b in battles if b.scores]
    models = sorted({b.model for b in battles})
    of_score = np.repeat(np.arange(len(battles)), [len(b.scores) for b in battles])  # the battle of each
    hot_NM = np.zeros((len(battles), len(models) + 1))
    hot_NM[np.arange(len(battles)), [models.index(b.model) for b in battles]] = 1
    hot_NM[:, -1] = -1
    columns = [STYLE.index(name) for name in features]
    style = [[style_features(b.style, b.baseline_style)[i] for i in columns] for b in battles] if columns else []
    style_NF = np.array(style, float).reshape(len(battles), len(columns))
    x = np.concatenate([hot_NM[of_score], _standardised(style_NF[of_score])], 1)
    y = np.array([s for b in battles for s in b.scores])

    def strengths(weights: "np.ndarray") -> "np.ndarray":
        return _fit(x, y, weights)

    whole = strengths(np.ones(len(y)))
    rng = np.random.default_rng(seed)
    drawn = [strengths(rng.multinomial(len(battles), np.full(len(battles), 1 / len(battles)))[of_score]) for _ in range(num_bootstraps)]
    out: dict[str, dict[str, Any]] = {}
    for i, model in enumerate(models):
        found: dict[str, Any] = {"mean": _percent(_sigmoid(whole[i] - whole[len(models)])), "n": sum(b.model == model for b in battles)}
        if drawn:
            rates = np.array([_sigmoid(c[i] - c[len(models)]) for c in drawn])
            found |= {
                "median": _percent(np.median(rates)),
                "ci90": [_percent(r) for r in np.percentile(rates, [5, 95])],
                "ci95": [_percent(r) for r in np.percentile(rates, [2.5, 97.5])],
            }
        out[model] = found | {"style": {name: round(float(c), 4) for name, c in zip(features, whole[len(models) + 1 :], strict=True)}}
    return out


def _standardised(columns: "np.ndarray") -> "np.ndarray":
    """Columns of mean 0 and (sample) standard deviation 1; a column that never varies becomes zeros."""
    import numpy as np

    centred = columns - columns.mean(0)
    spread = columns.std(0, ddof=1) if len(columns) > 1 else np.zeros(columns.shape[1])
    return np.where(spread > 1e-12, centred / np.where(spread > 1e-12, spread, 1), 0.0)


def _fit(x: "np.ndarray", y: "np.ndarray", weights: "np.ndarray") -> "np.ndarray":
    """Coefficients of a logistic regression with soft labels and a ridge, by Newton's method with steps that never raise the loss."""
    import numpy as np

    def loss(c: "np.ndarray") -> float:
        z = x @ c
        return float((weights * (np.logaddexp(0, z) - y * z)).sum() + RIDGE / 2 * c @ c)

    c = np.zeros(x.shape[1])
    now = loss(c)
    for _ in range(100):
        p = _sigmoid(x @ c)
        gradient = x.T @ (weights * (p - y)) + RIDGE * c
        hessian = (x * (weights * p * (1 - p))[:, None]).T @ x + RIDGE * np.eye(len(c))
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while size > 1e-10 and (then := loss(c - size * step)) > now:
            size /= 2
        if size <= 1e-10:
            break
        c, before, now = c - size * step, now, then
        if before - now < 1e-12 * (1 + now):
            break
    return c


def _sigmoid(z: Any) -> Any:
    import numpy as np

    return np.exp(-np.logaddexp(0, -z))


def _percent(share: Any) -> float:
    return round(100 * float(share), 2)


def notes(questions: Sequence[Question], baselines: Mapping[str, ModelAnswers], battles: Sequence[Battle]) -> list[str]:
    """What sets a run apart from the published protocol, a sentence each."""
    out = []
    published = NUM_QUESTIONS[all(q.is_v01 for q in questions)]
    if len(questions) != published:
        out.append(f"{len(questions)} questions instead of the published {published}: the score is that of another set.")
    for category, found in baselines.items():
        if found.model != BASELINES.get(category, BASELINES[V01]):
            out.append(f"The baseline of {quoted(category)} is {quoted(found.model)}, not the published one.")
    scores = [s for b in battles for s in b.scores]
    if scores and len(set(scores)) == 1 and scores[0] != 0.5:
        out.append(f"One side won every battle: the Bradley-Terry strength is finite only by its ridge of {RIDGE:g}.")
    return out
