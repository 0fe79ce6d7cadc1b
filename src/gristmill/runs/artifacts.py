"""Typed artifacts: the files that stages write, each with the type of its rows. Reports read them by these declarations.

A stage declares what it writes, and its `done.json` names it; so a reader never guesses at file names.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from gristmill.core.io import read_json, write_json
from gristmill.data.rows import Demonstration, Pair, Prompt, Rated, Refused, Response, TopicRow, read_columns, read_rows, write_rows
from gristmill.runs.journal import Journal

if TYPE_CHECKING:
    import pyarrow as pa

Row = TypeVar("Row")


@dataclass(frozen=True)
class Artifact(Generic[Row]):
    """A Parquet file of rows in a stage's folder.

    Attributes:
        name: what the stage calls it, and the file's name without its ending.
        row: the dataclass of its rows.
    """

    name: str
    row: type[Row]

    @property
    def file(self) -> str:
        return f"{self.name}.parquet"

    def write(self, folder: Path, rows: Iterable[Row]) -> int:
        """Write the rows; returns their number."""
        return write_rows(folder / self.file, rows)

    def read(self, folder: Path, at: Sequence[int] | None = None) -> list[Row]:
        """The rows, or those of some numbers (from 0, sorted); none where there is no file.

        Raises:
            InputError: the file is damaged.
        """
        path = folder / self.file
        return read_rows(path, self.row, at) if path.is_file() else []

    def columns(self, folder: Path, names: Sequence[str]) -> "dict[str, pa.Array]":
        """Some fields of all rows, as `read_columns` gives them.

        Raises:
            InputError: the file is damaged or is not there.
        """
        return read_columns(folder / self.file, self.row, names)


@dataclass(frozen=True)
class JsonArtifact:
    """A JSON object in a stage's folder."""

    name: str

    @property
    def file(self) -> str:
        return f"{self.name}.json"

    def write(self, folder: Path, value: dict[str, Any]) -> None:
        write_json(folder / self.file, value)

    def read(self, folder: Path) -> dict[str, Any]:
        """The object; empty where there is no file.

        Raises:
            InputError: the file is damaged.
        """
        path = folder / self.file
        return read_json(path) if path.is_file() else {}


@dataclass(frozen=True)
class JournalArtifact:
    """An append-only journal of calls in a stage's folder (see `runs.journal`)."""

    name: str

    @property
    def file(self) -> str:
        return f"{self.name}.jsonl"

    def read(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Records by id, without a torn last line; none where there is no file."""
        path = folder / self.file
        if not path.is_file():
            return {}
        with Journal(path, read_only=True) as journal:
            return dict(journal)


AnyArtifact = Artifact[Any] | JsonArtifact | JournalArtifact

# What people made.
HUMAN_DEMONSTRATIONS = Artifact("demonstrations", Demonstration)
RATINGS = Artifact("ratings", Rated)
EVALUATION = Artifact("evaluation", Prompt)
SAID_RATINGS = Artifact("people-ratings", Rated)
SAID_PAIRS = Artifact("people-pairs", Pair)
SAID_DEMONSTRATIONS = Artifact("people-demonstrations", Demonstration)
# What people are asked about before it is trained on.
CHECK = Artifact("check", Demonstration)
QUESTION = JsonArtifact("question")
DECISION = JsonArtifact("decision")
# What models wrote, and what became of it.
CALLS = JournalArtifact("calls")
RATING_CALLS = JournalArtifact("ratings")
PROMPTS = Artifact("prompts", Prompt)
TOPICS = Artifact("topics", TopicRow)
REFUSED = Artifact("refused", Refused)
CONVERSATIONS = Artifact("conversations", Demonstration)
RESPONSES = Artifact("responses", Response)
KEPT = Artifact("kept", Demonstration)
PAIRS = Artifact("pairs", Pair)
# What was measured.
OUTCOMES = JsonArtifact("outcomes")
EVALUATION_CALLS = JournalArtifact("evaluation")
SAMPLE_CALLS = JournalArtifact("samples")

ALL: dict[str, AnyArtifact] = {
    a.file: a
    for a in (
        HUMAN_DEMONSTRATIONS,
        RATINGS,
        EVALUATION,
        SAID_RATINGS,
        SAID_PAIRS,
        SAID_DEMONSTRATIONS,
        CHECK,
        QUESTION,
        DECISION,
        CALLS,
        RATING_CALLS,
        PROMPTS,
        TOPICS,
        REFUSED,
        CONVERSATIONS,
        RESPONSES,
        KEPT,
        PAIRS,
        OUTCOMES,
        EVALUATION_CALLS,
        SAMPLE_CALLS,
    )
}
