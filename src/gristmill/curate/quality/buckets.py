"""Quality buckets from an ensemble of scores, as Nemotron-CC makes them (2412.02595).

Each classifier's scores are cut at percentiles, so that its buckets hold equal shares of the bytes (the public recipe) or of the documents
(the paper); a document's bucket is the highest that any classifier gives it. That takes two passes: `measure` over every table, and
`quality` with the `thresholds` of all that was measured.

Shapes: N documents, C classifiers.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from gristmill.core.config import Section, SourceOrPath
from gristmill.core.errors import InputError
from gristmill.curate.io import readers
from gristmill.curate.outcome import Metric, Outcome, hash_uniform, in_meta, split
from gristmill.curate.quality import classifier, lm_scores, perplexity
from gristmill.curate.text.text_column import TextColumn

Label = Literal["High", "Medium-High", "Medium", "Medium-Low", "Low"]
COLUMN, PERPLEXITY = "column:", "perplexity:"
# of the lowest bucket of each label, how many twentieths of all lie below its upper end, at least: buckets 19, 18, 12, 7 of 20
_LABELS: tuple[tuple[Label, int], ...] = (("High", 19), ("Medium-High", 18), ("Medium", 12), ("Medium-Low", 7), ("Low", 0))


class Quality(Section):
    """Quality buckets from an ensemble of classifiers; the documents of the lower ones are dropped."""

    step: Literal["quality"] = "quality"
    classifiers: list[SourceOrPath] = Field(
        min_length=1,
        description="folders of trained classifiers; column:NAME, a column or a key of `meta` that holds a number; perplexity:FOLDER, of "
        "trigrams or of a model",
    )
    weight: Literal["bytes", "documents"] = Field("bytes", description="what the buckets of a classifier hold equal shares of")
    bins: int = Field(20, ge=2, le=1000, description="buckets")
    min_bucket: int = Field(0, ge=0, description="lowest bucket to keep")
    keep: list[Label] = Field([], description="labels to keep; none keeps all")
    sample: int = Field(1_000_000, gt=0, description="documents that the thresholds are made from")
    pareto: float = Field(0, ge=0, description="alpha: keep with probability (2 - s)^-alpha, s the first classifier's probability; 0: off")
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if self.min_bucket >= self.bins:
            raise ValueError(f"min_bucket must be below bins: the highest bucket is {self.bins - 1}")
        if any(name in ("", COLUMN, PERPLEXITY) for name in self.classifiers):
            raise ValueError("a classifier is a folder, column:NAME or perplexity:FOLDER, none of them empty")
        if self.pareto and self.classifiers[0].startswith(PERPLEXITY):
            raise ValueError("pareto needs a probability: give a classifier before the perplexity")
        return self


_classifier = cache(classifier.load)
_trigrams = cache(perplexity.load)


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").exists()


def models(settings: Quality) -> None:
    """Load every model once, so that a missing one is told before work is spent.

    Raises:
        InputError: a folder is missing, damaged, or holds a model of another kind.
    """
    for name in settings.classifiers:
        if name.startswith(PERPLEXITY):
            folder = Path(name.removeprefix(PERPLEXITY))
            if _is_model(folder):
                lm_scores.check(folder)
            else:
                _trigrams(folder)
        elif not name.startswith(COLUMN):
            _classifier(Path(name))


def _number(value: Any) -> float:
    """The same as a float; NaN if it is no number, or one that no float can hold."""
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else float("nan")
    except OverflowError:
        return float("nan")


def _score(table: pa.Table, texts: TextColumn, name: str) -> np.ndarray:
    """float32 [N]: one classifier's score of each document; the higher, the better; NaN where there is none."""
    if name.startswith(PERPLEXITY):
        folder = Path(name.removeprefix(PERPLEXITY))
        if _is_model(folder):
            return (-lm_scores.bits_per_byte(table["text"].to_pylist(), folder)).astype(np.float32)
        return (-_trigrams(folder).perplexity(texts)).astype(np.float32)
    if not name.startswith(COLUMN):
        return _classifier(Path(name)).scores(texts)
    name = name.removeprefix(COLUMN)
    if name not in table.column_names:
        return np.array([_number(in_meta(record, name)) for record in table["meta"].to_pylist()], np.float32)
    kind = table.schema.field(name).type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise InputError(f"The column {name!r} holds {kind}, not numbers: name another in `classifiers`.")
    return table[name].cast(pa.float64()).to_numpy().astype(np.float32)


def measure(table: pa.Table, settings: Quality) -> pa.Table:
    """What the thresholds are made of, by document: `score_0` and so on (float32, of each classifier), `bytes` (int64), `key` (uint64).

    Raises:
        InputError: a model cannot be read, or a column holds no numbers.
    """
    texts = TextColumn.of(table["text"])
    columns: dict[str, np.ndarray] = {f"score_{c}": _score(table, texts, name) for c, name in enumerate(settings.classifiers)}
    return pa.table(columns | {"bytes": texts.sizes_N, "key": hash_uniform(table["id"], settings.seed, "sample")})


def scores_of(measured: pa.Table, settings: Quality) -> np.ndarray:
    """float32 [N, C]: the scores in a table that `measure` made."""
    return np.stack([measured[f"score_{c}"].to_numpy() for c in range(len(settings.classifiers))], axis=1)


def _sampled(measured: list[pa.Table], size: int) -> pa.Table:
    """The documents of the smallest keys; those of the last key all, so that no order counts."""
    table = pa.concat_tables(measured)
    if len(table) <= size:
        return table
    keys = table["key"].to_numpy()
    return table.filter(pa.array(keys <= np.partition(keys, size - 1)[size - 1]))


def thresholds(measured: Iterable[pa.Table], settings: Quality) -> np.ndarray:
    """float32 [C, bins - 1]: for each classifier the scores at which a share 1/bins, 2/bins, ... of the weight is reached (inverted CDF).

    They do not depend on how documents are spread over tables. Documents without a score are left out.

    Raises:
        InputError: no document has a score of one of the classifiers.
    """
    waiting: list[pa.Table] = []
    for table in measured:
        waiting.append(table)
        if sum(map(len, waiting)) > 2 * settings.sample:
            waiting = [_sampled(waiting, settings.sample)]
    out = np.zeros((len(settings.classifiers), settings.bins - 1), np.float32)
    if not sum(map(len, waiting)):
        return out
    sample = _sampled(waiting, settings.sample)
    weights_N = sample["bytes"].to_numpy() if settings.weight == "bytes" else np.ones(len(sample), np.int64)
    for c, (name, scores_N) in enumerate(zip(settings.classifiers, scores_of(sample, settings).T, strict=True)):
        order = np.argsort(scores_N, kind="stable")[: len(scores_N) - int(np.isnan(scores_N).sum())]  # NaN sorts last
        if not len(order):
            raise InputError(f"No document has a score of {name!r}: check `classifiers`.")
        reached = np.cumsum(weights_N[order])
        # in whole numbers: a share that is met exactly must not be missed by rounding
        place = np.searchsorted(reached * settings.bins, np.arange(1, settings.bins) * reached[-1], side="left")
        out[c] = scores_N[order[place]]
    return out


def label(bucket: int, bins: int = 20) -> Label:
    """Nemotron-CC's label of a bucket: of 20, High 19, Medium-High 18, Medium 12 to 17, Medium-Low 7 to 11, Low 0 to 6."""
    return next(name for name, below in _LABELS if (bucket + 1) * 20 > below * bins)


def quality(table: pa.Table, settings: Quality, scores: np.ndarray, *, limits: np.ndarray) -> Outcome:
    """Give every document its bucket, and drop those that are not wanted.

    Args:
        scores: float32 [N, C], `scores_of` what was measured of this table.
        limits: float32 [C, bins - 1], `thresholds` of the whole corpus.

    Returns:
        The kept with two more columns: `quality_bucket` (int32) and `quality` (string, the label). The figure of a document dropped for
        its bucket or its label is the bucket, the limit `min_bucket` or the lowest bucket of a label to keep; of one that Pareto sampling
        dropped, the probability and what it had to be.

    Raises:
        InputError: Pareto sampling is asked for, and the first score is no probability.
    """
    buckets_N = np.zeros(len(table), np.int32)
    for scores_N, row in zip(scores.T, limits, strict=True):
        found_N = np.where(np.isnan(scores_N), 0, np.digitize(scores_N, row))
        buckets_N = np.maximum(buckets_N, found_N.astype(np.int32))
    names = [label(bucket, settings.bins) for bucket in range(settings.bins)]
    labels = [names[bucket] for bucket in buckets_N.tolist()]
    wanted = settings.keep or names
    lowest = next((bucket for bucket, name in enumerate(names) if name in wanted), settings.bins)

    figures_N, limits_N = buckets_N.astype(np.float64), np.full(len(table), settings.min_bucket, np.float64)
    reasons: list[str | None] = [None] * len(table)
    needed_N = np.full(len(table), -np.inf)
    if settings.pareto:
        first_N = np.nan_to_num(scores[:, 0].astype(np.float64), nan=0.0)
        if len(first_N) and not 0 <= first_N.min() <= first_N.max() <= 1:
            raise InputError(f"The scores of {settings.classifiers[0]!r} are no probabilities, which `pareto` needs: leave it out.")
        uniform_N = ((hash_uniform(table["id"], settings.seed, "pareto") >> np.uint64(11)) + 0.5) * 2.0**-53
        needed_N = 2 - uniform_N ** (-1 / settings.pareto)  # u < (2 - s)^-alpha, solved for s
    for n, bucket in enumerate(buckets_N.tolist()):
        if bucket < settings.min_bucket:
            reasons[n] = "quality"
        elif labels[n] not in wanted:
            reasons[n], limits_N[n] = f"quality {labels[n]}", lowest
        elif settings.pareto and not first_N[n] > needed_N[n]:
            reasons[n], figures_N[n], limits_N[n] = "pareto", first_N[n], needed_N[n]
    for name, column in (("quality_bucket", pa.array(buckets_N, pa.int32())), ("quality", pa.array(labels, pa.string()))):
        if name in table.column_names:
            table = table.drop_columns([name])
        table = table.append_column(name, column)
    least = settings.min_bucket
    metrics = {"quality_bucket": Metric(buckets_N.astype(np.float64), least or None, description="highest of all classifiers")}
    for name, scores_N, row in zip(settings.classifiers, scores.T, limits, strict=True):
        limit = float(row[least - 1]) if least and len(settings.classifiers) == 1 else None
        metrics[name] = Metric(scores_N.astype(np.float64), limit, description="score of this classifier; the higher, the better")
    return replace(split(table, "quality", reasons, figures_N, limits_N), metrics=metrics)


def learn(kind: Literal["classifier", "perplexity"], positive: Sequence[str], negative: Sequence[str], *, folder: Path) -> dict[str, Any]:
    """Train a model of quality on files of documents and write it; returns its settings and what it measured.

    Raises:
        InputError: files are missing, or without documents.
    """

    def tables(inputs: Sequence[str]) -> Iterator[pa.Table]:
        for path, name in readers.list_files(inputs).items():
            yield from readers.read(path, readers.Reading(), lambda where, why: None, name=name)

    if kind == "perplexity":
        return perplexity.train(tables(positive), folder).settings
    if not negative:
        raise InputError("A classifier needs --negative too: files of documents that are not wanted.")
    return classifier.train(tables(positive), tables(negative), folder).settings
