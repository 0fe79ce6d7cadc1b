"""Row types of all data (prompts, responses, ratings, pairs), with ids made from their inputs, in Parquet and JSONL.

Every row names its parents, so that any training sample can be traced back to the topic it grew from.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from gristmill.core.errors import InputError
from gristmill.data.chat import Conversation, conversation, to_dicts


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
        origin: "human", "file", or the name of the model that wrote it.
        parents: ids of what it was made from (a topic, an earlier prompt and its answer).
        request: what the model was asked when it wrote the prompt; empty for others.
        truth: what a verifier needs to check an answer, when anything can be checked.
    """

    id: str
    task: str
    messages: Conversation
    origin: str
    parents: tuple[str, ...] = ()
    truth: dict[str, Any] | None = None
    request: str = ""


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


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the better first, with the rewards whose gap RPO aims at."""

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


@dataclass(frozen=True)
class Rated:
    """A conversation whose last answer people have rated. A missing attribute is None."""

    id: str
    task: str
    messages: Conversation
    labels: tuple[float | None, ...] = field(default=())
    pair: str = ""


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
_JSON = {"truth", "rating"}  # nested and free-form: kept as JSON text in Parquet


def write_rows(path: Path, rows: Iterable[Any]) -> int:
    """Write dataclass rows to `.parquet` or `.jsonl`, by the file's ending, atomically. Returns their number."""
    records = [_plain(r) for r in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        for record in records:
            for key in _JSON & record.keys():
                record[key] = None if record[key] is None else json.dumps(record[key])
        pq.write_table(pa.Table.from_pylist(records) if records else pa.table({}), temporary)
    else:
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        temporary.write_text(text, encoding="utf-8", newline="\n")
    temporary.replace(path)
    return len(records)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Plain rows of a `.parquet` or `.jsonl` file.

    Raises:
        InputError: the file is missing, has another ending, or a line is not a JSON object.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist: check the path.")
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            records = cast(list[dict[str, Any]], pq.read_table(path).to_pylist())
        except pa.ArrowException as e:
            raise InputError(f"{path} cannot be read as Parquet ({e}): write or download it again.") from e
        for record in records:
            for key in _JSON & record.keys():
                record[key] = json.loads(record[key]) if isinstance(record[key], str) else record[key]
        return records
    if path.suffix not in (".jsonl", ".json"):
        raise InputError(f"{path} is neither .parquet nor .jsonl: convert it to one of them.")
    records = []
    try:
        text = path.read_text(encoding="utf-8-sig")  # some programs put a mark before the text
    except UnicodeDecodeError as e:
        raise InputError(f"{path} is not UTF-8 text ({e}): convert it.") from e
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: text may hold U+2028 or U+0085
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as e:
            raise InputError(f"Line {number} of {path} is not JSON ({e}): write one JSON object a line.") from e
        if not isinstance(record, dict):
            raise InputError(f"Line {number} of {path} is not a JSON object: write one object a line.")
        records.append(record)
    return records


def read_rows(path: Path, row: type[Row]) -> list[Row]:
    """Dataclass rows written by `write_rows`.

    Raises:
        InputError: as `read_records`, or a row lacks a field.
    """
    fields = dataclasses.fields(cast(Any, row))
    names = {f.name for f in fields}
    needed = [f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    records = read_records(path)
    for number, record in enumerate(records, 1):
        missing = [n for n in needed if n not in record]
        if missing:
            raise InputError(f"Row {number} of {path} lacks {', '.join(missing)}: add the field to every row.")
    return [_row({k: v for k, v in r.items() if k in names}, row) for r in records]


def _plain(row: Any) -> dict[str, Any]:
    record = {f.name: getattr(row, f.name) for f in dataclasses.fields(row)}
    if "messages" in record:
        record["messages"] = to_dicts(record["messages"])
    if record.get("rating") is not None:
        record["rating"] = dataclasses.asdict(record["rating"])
    return {k: list(v) if isinstance(v, tuple) else v for k, v in record.items()}


def _row(record: dict[str, Any], row: type[Row]) -> Row:
    if "messages" in record:
        record["messages"] = conversation(record["messages"])
    if record.get("rating") is not None:
        record["rating"] = Rating(**record["rating"])
    for key in ("parents", "labels"):
        if key in record:
            record[key] = tuple(record[key] or ())
    return row(**record)
