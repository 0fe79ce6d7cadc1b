"""Contamination: which documents of a benchmark have word 13-grams in the texts that a run trained on."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gristmill.core.errors import InputError
from gristmill.curate.filters.decontaminate import Benchmarks, Decontaminate, counts
from gristmill.data.rows import read_records
from gristmill.runs.artifacts import CONVERSATIONS, HUMAN_DEMONSTRATIONS, KEPT, PAIRS
from gristmill.runs.reader import read_run

TRAINED = (HUMAN_DEMONSTRATIONS, KEPT, PAIRS, CONVERSATIONS)
ROWS = 4096  # of training rows that are looked through at once
MIN_WORDS = 13  # shorter items would match common phrases


def contaminated(source: Path, documents: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, set[int]]:
    """Numbers of the documents of each task of which a 13-gram is in the training rows.

    Args:
        source: folder of a run, or a file of rows (JSONL, Parquet).

    Raises:
        InputError: it holds no training rows.
    """
    if not source.exists():  # said even where no document is long enough to be looked for
        raise InputError(f"{source} does not exist: give the folder of a run, or a file of its rows.")
    settings = Decontaminate(benchmarks=[source], ngram=MIN_WORDS, min_words=MIN_WORDS)
    texts = [(name, number, text) for name, docs in documents.items() for number, doc in enumerate(docs) for text in _strings(doc)]
    if not texts:
        return {name: set() for name in documents}
    try:
        index = Benchmarks.of([text for _, _, text in texts], settings)
    except InputError:  # no document has 13 words
        return {name: set() for name in documents}
    found = np.zeros(len(index), np.int64)
    num = 0
    for batch in _batches(source):
        num += len(batch)
        found += counts(pa.table({"text": pa.array(batch, pa.large_string())}), index)
    if not num:
        raise InputError(f"{source} holds no training rows: give the folder of a run, or a file of its rows.")
    seen = index.grams_G[found > 0]
    out: dict[str, set[int]] = {name: set() for name in documents}
    for name, number, text in texts:
        if number not in out[name] and len(seen) and np.isin(Benchmarks.grams_of(text, settings), seen).any():
            out[name].add(number)
    return out


def _batches(source: Path) -> Iterator[list[str]]:
    batch: list[str] = []
    for record in _rows(source):
        batch += _strings(record)
        if len(batch) >= ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


def _rows(source: Path) -> Iterator[dict[str, Any]]:
    if not source.is_dir():
        yield from read_records(source)
        return
    run = read_run(source)
    for artifact in TRAINED:
        for stage in run.stages_with(artifact):
            yield from read_records(run.folder / stage["folder"] / artifact.file)


def _strings(value: Any) -> list[str]:
    """Every text in a value, at any depth."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [text for one in inner for text in _strings(one)]
