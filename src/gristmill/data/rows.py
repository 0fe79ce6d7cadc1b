"""Row types of all data (prompts, responses, ratings, pairs), with ids made from their inputs, in Parquet and JSONL.

Every row names its parents, so that any training sample can be traced back to the topic it grew from.
"""

import dataclasses
import hashlib
import json
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from gristmill.core.errors import InputError
from gristmill.core.io import DamagedFile, reason, replacing, write_text
from gristmill.data.chat import Conversation, conversation, to_dicts
from gristmill.data.tokenizer import SURROGATE

if TYPE_CHECKING:  # rows in JSONL need no Arrow
    import numpy as np
    import pyarrow as pa

    from gristmill.data.parquet import ParquetReader

COLUMN_ROWS = 1 << 16  # of a few columns of a Parquet file, texts as numbers into a dictionary


def make_id(*parts: object) -> str:
    """A short id from the inputs that made a row: the same inputs give the same id."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True)
class Rating:
    """Five attributes of an answer, 0 to 4 (HelpSteer2)."""

    helpfulness: float
    correctness: float
    coherence: float
    complexity: float
    verbosity: float

    def score(self, weights: Sequence[float]) -> float:
        """Weighted sum of the five attributes."""
        return sum(w * v for w, v in zip(weights, dataclasses.astuple(self), strict=True))


ATTRIBUTES = tuple(f.name for f in dataclasses.fields(Rating))


@dataclass(frozen=True)
class Prompt:
    """A conversation that awaits an answer.

    Attributes:
        origin: "human", "file", "template" (a form filled in by a program), or the name of the model that wrote it.
        parents: ids of what it was made from (a topic, an earlier prompt and its answer).
        request: what the model was asked when it wrote the prompt; empty for others.
        truth: what a verifier needs to check an answer, when anything can be checked.
        meta: other columns of a user's file, in all rows that come from one.
    """

    id: str
    task: str
    messages: Conversation
    origin: str
    parents: tuple[str, ...] = ()
    truth: dict[str, Any] | None = None
    request: str = ""
    meta: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Response:
    """An answer of one model to one prompt, with every judgement passed on it.

    Attributes:
        judge: what decided `good`: "verifier" where a program could, else "reward".
        good: whether the judge accepts the answer.
        score: weighted sum of the rating.
        logprob: sum over the answer's tokens, under the model that wrote it; None where the source told none.
        votes: how many of the prompt's samples said exactly this.
        weak: the verifier ran a program that could have lied to its tests; None for all other judgements.
        edits: of an answer that a program has repaired: the instructions that it was edited for.
        repaired_from: ids of the answers that it was made of, the failing one first.
    """

    id: str
    prompt: str
    task: str
    messages: Conversation
    text: str
    generator: str
    temperature: float
    sample: int
    num_tokens: int
    logprob: float | None
    finished: bool
    rating: Rating | None = None
    score: float | None = None
    verified: bool | None = None
    judge: str | None = None
    good: bool | None = None
    votes: int = 1
    weak: bool | None = None
    edits: tuple[str, ...] = ()
    repaired_from: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the better first, with the rewards whose gap RPO aims at.

    Attributes:
        chosen_finished, rejected_finished: false for an answer that was cut off: it is not taught, nor blamed, to end there.
    """

    id: str
    prompt: str
    task: str
    messages: Conversation
    chosen: str
    rejected: str
    chosen_reward: float
    rejected_reward: float
    judge: str
    parents: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict, hash=False)
    chosen_finished: bool = True
    rejected_finished: bool = True


@dataclass(frozen=True)
class Demonstration:
    """A whole conversation to imitate.

    Attributes:
        origin: "human", or the name of the model that wrote the answers.
    """

    id: str
    task: str
    messages: Conversation
    origin: str
    parents: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Rated:
    """A conversation whose last answer people have rated. A missing attribute is None."""

    id: str
    task: str
    messages: Conversation
    labels: tuple[float | None, ...] = field(default=())
    pair: str = ""
    meta: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class TopicRow:
    """A topic that prompts grew from."""

    id: str
    text: str
    origin: str = ""


@dataclass(frozen=True)
class Refused:
    """A prompt that was written and not kept, and why."""

    id: str
    task: str
    text: str
    reason: str


Row = TypeVar("Row")
_JSON = {"truth", "rating", "meta"}  # nested and free-form: kept as JSON text in Parquet
# Columns that stand in a table where a row needs them, with what they are elsewhere.
_OPTIONAL: dict[str, Any] = {"meta": {}, "edits": [], "repaired_from": [], "chosen_finished": True, "rejected_finished": True}


def write_rows(path: Path, rows: Iterable[Any]) -> int:
    """Write dataclass rows to `.parquet` or `.jsonl`, by the file's ending, atomically. Returns their number.

    Raises:
        InputError: a number that JSON cannot say (NaN, an infinity) is where a number is due.
    """
    records = [_plain(r) for r in rows]
    for name, default in _OPTIONAL.items():
        if any(name in record for record in records):
            for record in records:
                record.setdefault(name, default)  # a table has its columns in every row
    if path.suffix != ".parquet":
        write_text(path, "".join(json_line(r, f"Row {number} for {path}") for number, r in enumerate(records, 1)))
        return len(records)
    import pyarrow as pa
    import pyarrow.parquet as pq

    for record in records:
        for key in _JSON & record.keys():
            record[key] = None if record[key] is None else strict_json(record[key])
    table = pa.Table.from_pylist(records) if records else pa.table({})
    with replacing(path) as temporary:
        pq.write_table(table, temporary)
    return len(records)


def strict_json(value: Any) -> str:
    """JSON as other programs read it: NaN and infinities, which it cannot say, become null."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(finite(value), allow_nan=False)


def finite(value: Any) -> Any:
    """The same with None for NaN and infinities, however deep they lie."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {(finite(k) if isinstance(k, float) else k): finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list | tuple) else value


def json_line(record: dict[str, Any], where: str) -> str:
    """A row as a line of JSON. Free-form values have null for NaN and infinities.

    Raises:
        InputError: a column of its own holds one, or half of a surrogate pair.
    """
    record = {k: finite(v) if k in _JSON else v for k, v in record.items()}
    try:
        line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as e:
        raise InputError(f"{where} holds NaN or an infinity, which JSON cannot say: mend the number or leave the row out.") from e
    if SURROGATE.search(line):
        raise InputError(f"{where} holds half of a surrogate pair, which is no text: mend or remove it.")
    return line


def num_bytes(value: Any) -> int:
    """Bytes of a plain value, as good as: one a character, and eight of anything else."""
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(num_bytes, value)) if isinstance(value, list) else len(value) if isinstance(value, str | bytes) else 8


def read_records(path: Path, at: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """Plain rows of a `.parquet` or `.jsonl` file, or of a `.json` file with one list of objects.

    Args:
        at: the numbers of the only rows to read, from 0 and sorted, of a Parquet file.

    Raises:
        InputError: the file is missing, has another ending, a line is not a JSON object or says a name twice, or holds half of a
            surrogate pair.
    """
    if not path.is_file():
        what = "is no file: give a .parquet, .jsonl or .json file" if path.exists() else "does not exist: check the path"
        raise InputError(f"{path} {what}.")
    if at is not None:
        return _records_at(path, at)
    if path.suffix == ".parquet":
        records: list[dict[str, Any]] = []
        size = 0
        with _parquet(path) as (file, most):
            for batch in (batch for group in range(file.facts.num_row_groups) for batch in file.batches(group)):
                records += (rows := batch.to_pylist())
                if (size := size + num_bytes(rows)) > most:
                    raise _expanded(path)
        return _with_values(records)
    if path.suffix not in (".jsonl", ".json"):
        raise InputError(f"{path} is neither .parquet nor .jsonl: convert it to one of them.")
    try:
        text = path.read_text(encoding="utf-8-sig")  # some programs put a mark before the text
    except UnicodeDecodeError as e:
        raise InputError(f"{path} is not UTF-8 text ({e}): convert it.") from e
    except OSError as e:
        raise InputError(f"{path} cannot be read ({e.strerror}): check the path and its permissions.") from e
    if path.suffix == ".json" and text.lstrip().startswith("["):
        found = _parse_json(text, str(path), "write a list of objects")
        return [_object(record, f"Item {number} of {path}", "write a list of objects") for number, record in enumerate(found, 1)]
    places = ((f"Line {n} of {path}", line) for n, line in enumerate(text.split("\n"), 1))  # text may hold U+2028 or U+0085
    lines = ((where, line) for where, line in places if line.strip())
    return [_object(_parse_json(line, where, "write one JSON object a line"), where, "write one object a line") for where, line in lines]


def _expanded(path: Path) -> InputError:
    from gristmill.data.parquet import MAX_EXPANSION, max_held_bytes

    size = path.stat().st_size
    ratio = min(MAX_EXPANSION, max_held_bytes(size) // max(size, 1))
    return InputError(f"{path} holds more than {ratio} bytes of text to a byte: write it without repetitions, or as JSONL.")


@contextmanager
def _parquet(path: Path, names: Sequence[str] | None = None) -> "Iterator[tuple[ParquetReader, int]]":
    """A Parquet file, and how many bytes may come out of it."""
    import pyarrow as pa

    from gristmill.data.parquet import Expansion, LargePages, ParquetReader, max_held_bytes

    try:
        most = max_held_bytes(path.stat().st_size)
        with ParquetReader(path, most, names) as file:
            yield file, most
    except InputError:
        raise
    except LargePages as e:
        raise InputError(f"{path} has pages that are too large to be opened: write it with smaller ones, or as JSONL.") from e
    except Expansion as e:
        raise _expanded(path) from e
    except (pa.ArrowException, OSError, ValueError) as e:
        raise DamagedFile(f"{path} cannot be read as Parquet ({reason(e)}): write or download it again.") from e


def _with_values(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records whose columns of JSON text are read."""
    for record in records:
        for key in _JSON & record.keys():
            with suppress(ValueError, RecursionError):  # a user's column of that name may hold any text
                record[key] = json.loads(record[key]) if isinstance(record[key], str) else record[key]
    return records


def _coded(
    path: Path, names: Sequence[str] | None, num_rows: int, at: Sequence[int] | None = None
) -> "Iterator[tuple[int, pa.RecordBatch]]":
    """Batches of a Parquet file with texts as dictionaries, each with the number of its first row.

    Args:
        names: of its columns; those that it lacks are left out. None for all.
        at: numbers of the rows that are wanted, sorted; row groups without any are skipped.
    """
    with _parquet(path, names) as (file, _):
        first = 0
        for group in range(file.facts.num_row_groups):
            end = first + file.facts.row_group(group).num_rows
            if at is not None and bisect_left(at, first) == bisect_left(at, end):
                first = end
                continue
            for batch in file.coded_batches(group, num_rows):
                yield first, batch
                first += batch.num_rows


def read_columns(path: Path, row: type[Row], names: Sequence[str]) -> "dict[str, pa.Array]":
    """Some fields of all rows that `write_rows` wrote to a Parquet file, as Arrow arrays: texts as dictionaries, and lists of such.

    Raises:
        InputError: the file is damaged, or a column is missing or of another type than the field.
    """
    import pyarrow as pa

    coded = pa.dictionary(pa.int32(), pa.string())
    types: dict[Any, pa.DataType] = {str: coded, tuple[str, ...]: pa.list_(coded), float: pa.float64(), float | None: pa.float64()}
    fields = {f.name: f for f in dataclasses.fields(cast(Any, row))}
    batches = [batch for _, batch in _coded(path, names, COLUMN_ROWS)]
    num_rows, out = sum(batch.num_rows for batch in batches), {}
    for name in names:
        kind, parts = types[fields[name].type], [batch.column(name) for batch in batches if name in batch.schema.names]
        if num_rows and not parts and fields[name].default is fields[name].default_factory:
            raise InputError(f"Row 1 of {path} lacks {name}: add the field to every row.")
        try:
            out[name] = _joined(parts, kind, num_rows)
        except (pa.ArrowException, NotImplementedError) as e:
            raise InputError(f"{path} cannot be read (a value of another type in {name}: {reason(e)}).") from e
        if kind is coded and out[name].null_count:
            raise InputError(f"A row of {path} lacks {name}: add the field to every row.")
    return out


def rows_of(texts: "pa.Array", wanted: "pa.Array") -> "np.ndarray":
    """The number of the last row of a dictionary array that holds each wanted text; -1 where none does."""
    import numpy as np
    import pyarrow.compute as pc

    last = np.full(len(texts.dictionary) + 1, -1)
    last[texts.indices.to_numpy()] = np.arange(len(texts))
    return last[pc.fill_null(pc.index_in(wanted, value_set=texts.dictionary), len(texts.dictionary)).to_numpy()]


def _joined(parts: "list[pa.Array]", kind: "pa.DataType", num_rows: int) -> "pa.Array":
    """Parts of a column as one array of a type; nulls where there is none of them."""
    import pyarrow as pa

    if not parts or all(pa.types.is_null(part.type) for part in parts):
        return pa.nulls(num_rows, kind)
    if pa.types.is_list(kind) and all(pa.types.is_list(part.type) and pa.types.is_null(part.type.value_type) for part in parts):
        return pa.concat_arrays([pa.ListArray.from_arrays(part.offsets, pa.nulls(len(part.values), kind.value_type)) for part in parts])
    joined = pa.chunked_array(parts).unify_dictionaries().combine_chunks()
    return joined.cast(kind)


def _parse_json(text: str, where: str, what: str) -> Any:
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{where} is not JSON ({e}): {what}.") from e
    if "\\ud" in text.lower() and SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise InputError(f"{where} holds half of a surrogate pair, which is no text: mend or remove it.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it says {next(name for name in names if names.count(name) > 1)!r} twice")
    return record


def _object(record: Any, where: str, what: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise InputError(f"{where} is not a JSON object: {what}.")
    return record


def read_rows(path: Path, row: type[Row], at: Sequence[int] | None = None) -> list[Row]:
    """Dataclass rows written by `write_rows`.

    Args:
        at: the numbers of the only rows to read, from 0 and sorted, of a Parquet file.

    Raises:
        InputError: as `read_records`, or a row lacks a field.
    """
    fields = dataclasses.fields(cast(Any, row))
    names = {f.name for f in fields}
    needed = [f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    records = read_records(path, at)
    numbers = range(len(records)) if at is None else at
    for number, record in zip(numbers, records, strict=True):
        missing = [n for n in needed if n not in record]
        if missing:
            raise InputError(f"Row {number + 1} of {path} lacks {', '.join(missing)}: add the field to every row.")
    rows = []
    for number, record in zip(numbers, records, strict=True):
        try:
            rows.append(_row({k: v for k, v in record.items() if k in names}, row))
        except (TypeError, ValueError, KeyError, AttributeError) as e:
            why = str(e) if isinstance(e, InputError) else f"a value of another type: {reason(e)}"
            raise InputError(f"Row {number + 1} of {path} cannot be read ({why}).") from e
    return rows


def _records_at(path: Path, at: Sequence[int]) -> list[dict[str, Any]]:
    """Plain rows of a Parquet file, given by their numbers, sorted."""
    import pyarrow as pa

    from gristmill.data.parquet import CODED_ROWS, FEW_ROWS, max_held_bytes

    records: list[dict[str, Any]] = []
    size, most = 0, max_held_bytes(path.stat().st_size)
    for first, batch in _coded(path, None, CODED_ROWS, at) if at else ():
        mine = at[bisect_left(at, first) : bisect_left(at, first + batch.num_rows)]
        for start in range(0, len(mine), FEW_ROWS):
            places = pa.array([number - first for number in mine[start : start + FEW_ROWS]], pa.int64())
            records += (rows := batch.take(places).to_pylist())
            if (size := size + num_bytes(rows)) > most:
                raise _expanded(path)
    return _with_values(records)


def _plain(row: Any) -> dict[str, Any]:
    record = {f.name: getattr(row, f.name) for f in dataclasses.fields(row)}
    if "messages" in record:
        # calls of tools as text: in a table of structures each would have the names of all others
        plain = to_dicts([dataclasses.replace(m, fields="") if m.fields else m for m in record["messages"]])
        record["messages"] = [d | ({"fields": m.fields} if m.fields else {}) for d, m in zip(plain, record["messages"], strict=True)]
    if record.get("rating") is not None:
        record["rating"] = dataclasses.asdict(record["rating"])
    record = {k: list(v) if isinstance(v, tuple) else v for k, v in record.items()}
    return {k: v for k, v in record.items() if k not in _OPTIONAL or v != _OPTIONAL[k]}


def _row(record: dict[str, Any], row: type[Row]) -> Row:
    if "messages" in record:
        turns = [{k: v for k, v in turn.items() if k != "fields"} | json.loads(turn.get("fields") or "{}") for turn in record["messages"]]
        record["messages"] = conversation(turns, tools=True)
    if record.get("rating") is not None:
        record["rating"] = Rating(**record["rating"])
    for key in ("parents", "labels", "edits", "repaired_from"):
        if key in record:
            record[key] = tuple(record[key] or ())
    if "meta" in record:
        record["meta"] = record["meta"] or {}
    return row(**record)
