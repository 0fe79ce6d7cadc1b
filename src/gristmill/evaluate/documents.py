"""Documents of a benchmark: a user's files in Hugging Face's columns, in a folder for each task, checked before work is spent.

A split is looked for as DIR/TASK/SPLIT.parquet (or .jsonl, .json, .csv, each of them .gz too), and where the Hub's copy has it:
SPLIT-00000-of-00001.parquet, in the folder itself, in `data`, or in that of a configuration.
"""

import csv
import gzip
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gristmill.core.errors import InputError
from gristmill.core.io import read_bytes, reason
from gristmill.core.untrusted import quoted
from gristmill.data.rows import read_records
from gristmill.data.tokenizer import SURROGATE
from gristmill.evaluate.prompt_pieces import piece
from gristmill.evaluate.task import Split, Task

MAX_TABLE_BYTES = 1 << 30  # of a text file, decompressed
SUFFIXES = ("parquet", "jsonl", "json", "csv", "jsonl.gz", "json.gz", "csv.gz")
DASHES = "-----"  # in BBH's prompt files, before the description
QUESTION, ANSWER = "\n\nQ: ", re.compile(r"\nA: Let's think step by step\.\s")
Doc = dict[str, Any]


@dataclass
class TaskData:
    """Documents of a task, or of one of its subsets.

    Attributes:
        name: of the task, or of task and subset.
        pool: documents that shots are taken from.
        pool_split: where they come from; None: from the task file or a prompt file.
        notes: what a reader of the score must know: other counts than published, another form, shots of the evaluated split.
    """

    task: Task
    name: str
    subset: str
    docs: list[Doc]
    pool: list[Doc] = field(default_factory=list)
    pool_split: str | None = None
    description: str = ""
    notes: list[str] = field(default_factory=list)


def read_task(task: Task, folder: Path, *, num_fewshot: int) -> list[TaskData]:
    """The documents of a task and the pool of its shots, one entry a subset.

    Args:
        folder: with a folder for each task.
        num_fewshot: shots that are wanted; without any, no pool is read.

    Raises:
        InputError: a file is missing, cannot be read, or has not the columns.
    """
    source = _Source(task, folder)
    parts = source.split(task.evaluated_split)
    config = task.fewshot_config
    pools: dict[str, list[Doc]] | None = None
    pool_split: str | None = None
    pool_notes: list[str] = []
    if num_fewshot and not config.samples and not config.prompt_file:
        pool_split, pools, pool_notes = _pool(source)
    out = []
    for subset, docs in parts.items():
        data = TaskData(task, f"{task.task}_{subset}" if subset else task.task, subset, docs, pool_split=pool_split)
        data.notes = [*source.notes[task.evaluated_split], *pool_notes]
        data.description = task.description
        if config.samples:
            data.pool = [dict(one) for one in config.samples]
        elif config.prompt_file:
            data.description, data.pool = read_prompt_file(source.file(config.prompt_file.format(subset=subset)))
        elif pools is not None:
            data.pool = pools.get(subset, [])
            if config.column:
                wanted = {value: place for place, value in enumerate(config.values)}
                chosen = [doc for doc in data.pool if doc.get(config.column) in wanted]
                data.pool = sorted(chosen, key=lambda doc: wanted[doc[config.column]])
        if num_fewshot > len(data.pool):
            raise InputError(
                f"{data.name} wants {num_fewshot} shots and its pool ({pool_split or 'the task file'}) has {len(data.pool)}: give more "
                "rows, or lower --num-fewshot."
            )
        out.append(data)
    return out


def _pool(source: "_Source") -> tuple[str, dict[str, list[Doc]], list[str]]:
    """Shots' pool by the harness's rule: the split that is named, else training, validation, test; the first whose file is there."""
    task = source.task
    if task.fewshot_split is not None:
        pools = source.split(task.fewshot_split)
        return task.fewshot_split, pools, source.notes[task.fewshot_split]
    order = [split for split in (task.training_split, task.validation_split, task.test_split) if split is not None]
    for split in order:
        if split == order[-1] or source.find(split):
            pools = source.split(split)
            notes = [f"shots: {note}" for note in source.notes[split]] if split != task.evaluated_split else []
            if split != order[0]:
                notes = [f"there is no file of the split {order[0]}: shots are of {split}, which is no published protocol", *notes]
            return split, pools, notes
    raise AssertionError("one split at least is evaluated")


class _Source:
    """Files of one task, each read once."""

    def __init__(self, task: Task, folder: Path) -> None:
        self.task, self.root = task, folder
        self.notes: dict[str, list[str]] = {}
        self._read: dict[Path, list[Doc]] = {}
        self._splits: dict[str, dict[str, list[Doc]]] = {}
        if not folder.is_dir():
            raise InputError(f"The data folder {folder} {'is no folder' if folder.exists() else 'does not exist'}: give --data a folder.")
        names = dict.fromkeys((task.task, *task.folders))
        self.folders = [folder / name for name in names if (folder / name).is_dir()] + [folder] * (folder.name in names)

    def file(self, name: str) -> Path:
        """A file of the task's folder by its name."""
        found = [path for place in self.folders if (path := place / name).is_file()]
        if not found:
            raise InputError(f"{self.task.task} needs the file {self.root / self.task.task / name}: give it ({self.task.source}).")
        return found[0]

    def find(self, split: str, subset: str = "") -> list[Path]:
        """Files of a split: those of the first pattern that has any."""
        spec = self.task.splits[split]
        stem = (split,) if not subset else ()
        patterns = [pattern.format(subset=subset) for pattern in spec.files if bool(subset) == ("{subset}" in pattern)]
        if subset:
            patterns += [f"{subset}.{suffix}" for suffix in SUFFIXES]
            patterns += [f"{subset}/{split}.{suffix}" for suffix in SUFFIXES] + [f"{subset}/{split}-*-of-*.parquet"]
        for name in stem:
            places = ["", "data/", *(f"{config}/" for config in self.task.configs)]
            patterns += [f"{place}{name}.{suffix}" for place in places for suffix in SUFFIXES]
            patterns += [f"{place}{name}-*-of-*.parquet" for place in places]
        for place in self.folders:
            for pattern in patterns:
                if found := sorted(path for path in place.glob(pattern) if path.is_file()):
                    return found
        return []

    def split(self, name: str) -> dict[str, list[Doc]]:
        """Documents of a split by subset, "" where there are none."""
        if name not in self._splits:
            self._splits[name] = self._load(name)
        return self._splits[name]

    def _load(self, name: str) -> dict[str, list[Doc]]:
        task, notes = self.task, self.notes.setdefault(name, [])
        parts: dict[str, list[Doc]] = {}
        column = task.subsets.column if task.subsets else ""
        for subset in task.subsets.names if task.subsets else ():
            if files := self.find(name, subset):
                parts[subset] = self._documents(name, files, notes)
        if not parts:
            files = self.find(name)
            if not files and column:  # the Hub's copy: a folder for each value of the column
                found = [path for place in self.folders for path in place.glob(f"*/{name}-*-of-*.parquet")]
                files = sorted(path for path in found if path.parent.name not in ("all", "auxiliary_train"))
            if not files:
                raise InputError(self._missing(name))
            docs = self._documents(name, files, notes)
            for doc in docs:
                key = doc.get(column or "subset", "") if task.subsets else ""
                if task.subsets and not (isinstance(key, str) and key):
                    raise InputError(f"{files[0]} has a document without {column or 'subset'!r}, which names its part of {task.task}.")
                parts.setdefault(key, []).append(doc)
        missing = [subset for subset in (task.subsets.names if task.subsets else ()) if subset not in parts]
        if missing and name == task.evaluated_split:
            notes.append(f"there are no documents of {', '.join(missing[:3])}{' and others' * (len(missing) > 3)}")
        num, spec = sum(map(len, parts.values())), task.splits[name]
        if spec.count and num not in (spec.count, *spec.counts):
            notes.append(f"{num:,} documents, and the published split {name} has {spec.count:,}")
        elif spec.count and num != spec.count:
            notes.append(f"{num:,} documents: another revision than the one of {spec.count:,}")
        return parts

    def _missing(self, split: str) -> str:
        task = self.task
        where = self.root / (self.folders[0].name if self.folders else task.task)
        spelt = f"{where}/{split}.parquet (or .jsonl)"
        also = f", or {', '.join(task.splits[split].files)} there" if task.splits[split].files else ""
        columns = ", ".join(task.column_types)
        return f"{task.task} needs the split {split!r}: put it at {spelt}{also}, with the columns {columns} ({task.source})."

    def _documents(self, split: str, files: Sequence[Path], notes: list[str]) -> list[Doc]:
        task, docs = self.task, []
        for path in files:
            if path not in self._read:
                self._read[path] = read_table(path)
            docs += _of_split(self._read[path], task.splits[split])
        if not docs:
            raise InputError(f"{files[0]} has no document of the split {split!r} of {task.task}: give the whole file.")
        docs, note = _in_layout(task, docs, files[0])
        if note and note not in notes:
            notes.append(note)
        missing = [name for name in task.column_types if name not in docs[0]]
        if missing:
            raise InputError(
                f"{files[0]} has not the column{'s' * (len(missing) > 1)} {', '.join(missing)} that {task.task} needs: its columns are "
                f"{quoted(', '.join(map(str, docs[0])))[1:-1]}."
            )
        for number, doc in enumerate(docs, 1):
            for name, kind in task.column_types.items():
                if doc.get(name) is None:
                    raise InputError(f"Document {number} of {files[0]} has no {name}, which {task.task} needs: mend or remove it.")
                if not isinstance(doc[name], kind):
                    what = "a list" if kind is list else "an object"
                    raise InputError(f"Document {number} of {files[0]} has the {name} {quoted(doc[name])}: {task.task} needs {what}.")
        return docs


def _of_split(docs: list[Doc], spec: Split) -> list[Doc]:
    """The documents of a split, where a file holds all of them."""
    if not spec.column or (docs and spec.column not in docs[0]):
        return docs
    kept = [doc for doc in docs if isinstance(doc[spec.column], int) and spec.first <= doc[spec.column] <= spec.last]
    return sorted(kept, key=lambda doc: doc[spec.column])


def _in_layout(task: Task, docs: list[Doc], path: Path) -> tuple[list[Doc], str]:
    for layout in task.layouts:
        if all(name in docs[0] for name in layout.columns):
            try:
                made = [doc | {name: piece(template, doc) for name, template in layout.doc.items()} for doc in docs]
            except InputError as e:
                raise InputError(f"{path}: {e}") from e
            return made, layout.note
    return docs, ""


def read_prompt_file(path: Path) -> tuple[str, list[Doc]]:
    """Description and shots of one of BBH's prompt files (input, target).

    Raises:
        InputError: it is no such file.
    """
    text = read_bytes(path).decode(errors="replace")
    body = text.split(DASHES, 1)[-1].strip()
    description, *parts = body.split(QUESTION)
    shots = [dict(zip(("input", "target"), ANSWER.split(part, 1), strict=False)) for part in parts]
    if not shots or not all("target" in shot for shot in shots):
        raise InputError(f"{path} is none of BBH's prompt files (a description, then 'Q:' and 'A: Let's think step by step.'): give those.")
    return f"{description}\n\n", shots


# ---- files ----


def read_table(path: Path) -> list[Doc]:
    """Rows of a table: Parquet, JSONL, JSON (a list, or an object with one list of objects), CSV with a header, the last three in gzip
    too; and plain text, which is one document.

    Raises:
        InputError: it cannot be read.
    """
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet") or path.name.endswith(".jsonl"):
        return read_records(path)
    text = _text(path)
    if name.endswith(".txt"):
        return [{"text": text}]
    if name.endswith(".csv"):
        return list(_csv_rows(text, path))
    try:
        lines = [line for line in text.split("\n") if line.strip()]
        rows = [json.loads(line) for line in lines] if name.endswith(".jsonl") else json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path} is not JSON ({reason(e)}): download it again.") from e
    if isinstance(rows, dict):
        lists = [value for value in rows.values() if isinstance(value, list) and value and all(isinstance(one, dict) for one in value)]
        rows = lists[0] if len(lists) == 1 else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} holds no list of objects: give one object a document.")
    if "\\ud" in text.lower() and SURROGATE.search(json.dumps(rows, ensure_ascii=False)):
        raise InputError(f"{path} holds half of a surrogate pair, which is no text: mend or remove it.")
    return rows


def _text(path: Path) -> str:
    data = read_bytes(path, MAX_TABLE_BYTES)
    try:
        if path.name.endswith(".gz"):
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
                data = file.read(MAX_TABLE_BYTES + 1)
            if len(data) > MAX_TABLE_BYTES:
                raise InputError(f"{path} has more than {MAX_TABLE_BYTES:,} bytes when decompressed: give the plain file of a benchmark.")
        return data.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as e:
        raise InputError(f"{path} cannot be read ({reason(e)}): download it again.") from e


def _csv_rows(text: str, path: Path) -> Iterator[Doc]:
    try:
        yield from csv.DictReader(io.StringIO(text, newline=""))
    except csv.Error as e:
        raise InputError(f"{path} is no table of comma-separated values ({reason(e)}): download it again.") from e
