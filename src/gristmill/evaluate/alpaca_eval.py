"""AlpacaEval 2: win rate against a baseline's answers to 805 instructions, and its length-controlled form (arXiv 2404.04475).

A judge prefers m or M; log-probabilities make the preference a number from 1 (baseline) to 2 (model). The user brings all data.
"""

import csv
import io
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gristmill.core.errors import InputError
from gristmill.core.io import read_bytes
from gristmill.core.response_text import answer_text
from gristmill.core.untrusted import quoted_path
from gristmill.data.chat import Conversation
from gristmill.data.rows import read_records
from gristmill.evaluate.model_answers import find_file, text_of
from gristmill.evaluate.stats import bootstrap
from gristmill.judge.pairwise import judge_prompt

if TYPE_CHECKING:
    import numpy as np

NUM_INSTRUCTIONS = 805
MAX_TOKENS = 2048
JUDGE_TOKENS = 1  # the token whose probability is the preference
GAMED_WEIGHT = 0.2 / 2  # of each of the two gamed baselines' rows
NUM_FOLDS = 5
PENALTIES = 1e-4, 1e4, 10  # inverse strengths of the L1 penalty: from, to, how many
DIFFICULTY_FILE, GAMED_FILE = "instruction_difficulty.csv", "df_gamed.csv"

JUDGE = "You rank answers of language models by what most people would prefer, and reply with the name of a model alone."
COMPARE = """Two models, m and M, answered the same instruction. Which answer would most people prefer?

<|instruction|>
{instruction}

<|answer of model m|>
{m}

<|answer of model M|>
{M}

Reply with nothing but the name of the model whose answer is better: m or M."""
NAME = re.compile(r"(?<![\w'\u2019])[mM](?![\w'\u2019])")


@dataclass(frozen=True)
class Instruction:
    """Instruction with the baseline's answer to it."""

    text: str
    baseline_output: str
    baseline: str


@dataclass(frozen=True)
class Difficulty:
    """What length control knows besides the preferences: each instruction's difficulty, and rows of the gamed baselines.

    Attributes:
        by_instruction: by place in the data; empty where the user has no such file.
        gamed: rows of (preference - 1, standardised difference of lengths, difficulty).
    """

    by_instruction: Sequence[float] = ()
    gamed: Sequence[tuple[float, float, float]] = ()


# ---- files ----


def read_instructions(data: Path) -> list[Instruction]:
    """The baseline's answers: instruction, output, generator (alpaca_eval's files), of a file or of a folder that has one.

    Raises:
        InputError: the file is missing or a row lacks a column.
    """
    path = find_file(data, "file of the baseline's answers (alpaca_eval_gpt4_baseline.json)", lambda p: p.suffix != ".csv")
    rows = list(enumerate(read_records(path), 1))
    where = f"of {quoted_path(path)}"
    return [
        Instruction(*(text_of(row, (name,), f"Row {number} {where}") for name in ("instruction", "output", "generator")))
        for number, row in rows
    ]


def read_annotations(path: Path) -> list[dict[str, Any]] | None:
    """Preferences that a judge has given already (alpaca_eval's annotations.json); None where a file holds answers instead.

    Raises:
        InputError: a row lacks a column, or its preference is no number from 1 to 2 (0: a tie; null: unreadable).
    """
    rows = read_records(path)
    if not rows or "preference" not in rows[0]:
        return None
    for number, row in enumerate(rows, 1):
        where = f"Row {number} of {quoted_path(path)}"
        for name in ("instruction", "output_1", "output_2", "generator_1", "generator_2"):
            text_of(row, (name,), where)
        value = row.get("preference")
        if value is not None and not (isinstance(value, int | float) and (value == 0 or 1 <= value <= 2)):
            raise InputError(f"{where} has the preference {value!r}: give 1 (baseline) to 2 (model), 0 for a tie, null for none.")
    return rows


def read_difficulty(folder: Path, num: int) -> Difficulty:
    """AlpacaEval's published files of difficulty and of gamed baselines, where a folder holds them.

    Raises:
        InputError: a file lacks a column, or has other rows than there are instructions.
    """
    difficulty, gamed = folder / DIFFICULTY_FILE, folder / GAMED_FILE
    rows = _csv(gamed) if gamed.is_file() else []
    names = ("index", "preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline")
    if rows and (missing := [name for name in names if name not in rows[0]]):
        raise InputError(f"{quoted_path(gamed)} lacks {', '.join(missing)}: give AlpacaEval's file as it is.")
    known: dict[int, float] = {}
    if difficulty.is_file():
        known = {int(float(value)): float(row["instruction_difficulty"]) for row in _csv(difficulty) for value in list(row.values())[:1]}
    for row in rows:
        known.setdefault(int(float(row["index"])), float(row["instruction_difficulty"]))
    if known and (missing_at := [i for i in range(num) if i not in known]):
        raise InputError(f"{quoted_path(folder)} has no difficulty of instruction {missing_at[0]}: the files are of another set.")
    return Difficulty(
        [known[i] for i in range(num)] if known else (),
        [(_preference(float(r["preference"])), float(r["std_delta_len"]), float(r["instruction_difficulty"])) for r in rows],
    )


def _csv(path: Path) -> list[dict[str, str]]:
    try:
        rows = list(csv.DictReader(io.StringIO(read_bytes(path).decode("utf-8-sig"))))
        for row in rows:
            for name in ("preference", "std_delta_len", "instruction_difficulty", "index"):
                if name in row:
                    float(row[name])
    except (ValueError, TypeError, csv.Error) as e:
        raise InputError(f"{quoted_path(path)} is no table of numbers ({e}): give AlpacaEval's file as it is.") from e
    return rows


# ---- requests and verdicts ----


def model_is_first(name: str, seed: int) -> bool:
    """Whether the model stands first (as m): drawn once for each instruction, as in the protocol."""
    return random.Random(f"{seed}/{name}").random() < 0.5


def judging_prompt(instruction: Instruction, output: str, *, first: bool) -> Conversation:
    """What the judge is asked; `first`: the model is m, and the baseline M."""
    m, big_m = (output, instruction.baseline_output) if first else (instruction.baseline_output, output)
    return judge_prompt(JUDGE, [COMPARE.format(instruction=instruction.text, m=m, M=big_m)])


def parse_preference(reply: str, logprob: float | None, *, first: bool) -> float | None:
    """The preference in a judge's reply, 1 (baseline) to 2 (model); None where it names no model, or both.

    Args:
        logprob: of the reply's one token; the other name is taken to have the rest. None: the preference is 1 or 2.
    """
    named = set(NAME.findall(answer_text(reply)))
    if len(named) != 1:
        return None
    sure = 1.0 if logprob is None else max(0.5, math.exp(min(0.0, logprob)))  # of the two names it is the likelier
    return 1 + (sure if (named == {"m"}) == first else 1 - sure)


# ---- scores ----


def win_rates(
    preferences: Sequence[float | None],
    lengths: Sequence[tuple[int, int]],
    difficulty: Difficulty,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Win rate and length-controlled win rate (0 to 100).

    Args:
        preferences: 1 to 2 by instruction; 0 is a tie, None is left out and counted.
        lengths: characters of the baseline's and the model's answer.
    """
    points = [_preference(p) if p is not None else None for p in preferences]
    given = [p for p in points if p is not None]
    found = bootstrap([[100 * p] for p in given], seed=seed)
    controlled, name = length_controlled(points, lengths, difficulty)
    sides = [sum(pair[i] for pair in lengths) / max(1, len(lengths)) for i in (0, 1)]
    discrete = [1.0 if p > 0.5 else 0.0 if p < 0.5 else 0.5 for p in given]
    return {
        "win_rate": found,
        "discrete_win_rate": round(100 * sum(discrete) / len(discrete), 2) if discrete else None,
        "length_controlled": {"mean": controlled, "name": name},
        "mean_characters": {"baseline": round(sides[0]), "model": round(sides[1])},
    }


def length_controlled(
    points: Sequence[float | None], lengths: Sequence[tuple[int, int]], difficulty: Difficulty
) -> tuple[float | None, str]:
    """Length-controlled win rate (0 to 100), and its name: "LC", or "LC (re-estimated)" where a published file is absent.

    L1-regularised logistic regression of the preference on tanh(standardised difference of lengths), the instruction's difficulty and
    "not a gamed baseline", its penalty chosen by 5-fold cross-validation; then the mean prediction for answers of equal length.
    """
    import numpy as np

    name = "LC" if difficulty.gamed and difficulty.by_instruction else "LC (re-estimated)"
    if not difficulty.by_instruction:
        name = "LC (re-estimated, by length alone)"
    kept = [i for i, p in enumerate(points) if p is not None]
    if len(kept) < NUM_FOLDS:
        return None, name
    delta = np.array([a - b for a, b in lengths], float)
    spread = delta.std(ddof=1)
    lengthwise = np.tanh(delta / spread) if spread > 0 else np.zeros(len(delta))
    hard = np.array(difficulty.by_instruction) if difficulty.by_instruction else np.zeros(len(delta))
    x = np.stack([lengthwise, hard, np.ones(len(delta))], 1)
    y = np.array([points[i] for i in kept], float)
    weights = np.ones(len(kept))
    train = x[kept]
    if difficulty.gamed:
        gamed = np.array(difficulty.gamed)
        train = np.concatenate([np.stack([np.tanh(gamed[:, 1]), gamed[:, 2], np.zeros(len(gamed))], 1), train])
        y, weights = np.concatenate([gamed[:, 0], y]), np.concatenate([np.full(len(gamed), GAMED_WEIGHT), weights])
    coefficients = _fit_cross_validated(train, y, weights)
    equal = np.concatenate([np.zeros((len(delta), 1)), x[:, 1:]], 1)
    return round(100 * float(_sigmoid(equal @ coefficients).mean()), 2), name


def _fit_cross_validated(x: "np.ndarray", y: "np.ndarray", weights: "np.ndarray") -> "np.ndarray":
    """The fit whose penalty has the least held-out log-loss over the folds."""
    import numpy as np

    fold = np.arange(len(y)) % NUM_FOLDS
    start, stop, num = PENALTIES
    losses = []
    for inverse in (choices := np.geomspace(start, stop, num)):
        loss = 0.0
        for k in range(NUM_FOLDS):
            c = _fit_l1(x[fold != k], y[fold != k], weights[fold != k], inverse)
            z = x[fold == k] @ c
            loss += float((weights[fold == k] * (np.logaddexp(0, z) - y[fold == k] * z)).mean())
        losses.append(loss)
    return _fit_l1(x, y, weights, choices[int(np.argmin(losses))])


def _fit_l1(x: "np.ndarray", y: "np.ndarray", weights: "np.ndarray", inverse: float) -> "np.ndarray":
    """Coefficients that minimise |c|_1 + inverse * sum of weighted cross-entropies: proximal Newton, by coordinates."""
    import numpy as np

    def objective(c: "np.ndarray") -> float:
        z = x @ c
        return float(np.abs(c).sum() + inverse * (weights * (np.logaddexp(0, z) - y * z)).sum())

    c = np.zeros(x.shape[1])
    now = objective(c)
    for _ in range(200):
        p = _sigmoid(x @ c)
        gradient = inverse * (x.T @ (weights * (p - y)))
        hessian = inverse * ((x * (weights * p * (1 - p))[:, None]).T @ x) + 1e-9 * np.eye(len(c))
        d = np.zeros(len(c))
        for _ in range(200):  # the quadratic model with the penalty, one coordinate after the other
            before = d.copy()
            for j in range(len(c)):
                slope = gradient[j] + hessian[j] @ d - hessian[j, j] * d[j]
                target = c[j] - slope / hessian[j, j]
                d[j] = np.sign(target) * max(0.0, abs(target) - 1 / hessian[j, j]) - c[j]
            if np.abs(d - before).max() < 1e-12:
                break
        size = 1.0
        while size > 1e-10 and objective(c + size * d) > now:
            size /= 2
        if size <= 1e-10:
            break
        c, before_now = c + size * d, now
        now = objective(c)
        if before_now - now < 1e-13 * (1 + abs(now)):
            break
    return c


def _sigmoid(z: Any) -> Any:
    import numpy as np

    return np.exp(-np.logaddexp(0, -z))


def _preference(value: float) -> float:
    """A preference of 1 to 2 as 0 to 1; 0 in the data is a tie."""
    return 0.5 if value == 0 else value - 1


def notes(num: int, baselines: Sequence[str], name: str, *, hard: int = 0) -> list[str]:
    """What sets a run apart from the published protocol, a sentence each."""
    out = []
    if num != NUM_INSTRUCTIONS:
        out.append(f"{num} instructions instead of the published {NUM_INSTRUCTIONS}: the rates are those of another set.")
    if set(baselines) != {"gpt4_1106_preview"}:
        out.append(f"The baseline is {', '.join(sorted(set(baselines)))}, not AlpacaEval 2's gpt4_1106_preview.")
    if name != "LC":
        out.append(
            f"{name}: the published LC needs {GAMED_FILE} and {DIFFICULTY_FILE} in the data's folder; without them it is wrong by several "
            "points, for weak models most."
        )
    if hard:
        out.append(f"{hard} preferences are 1 or 2, not between: the judge's endpoint told no log-probabilities.")
    return out
