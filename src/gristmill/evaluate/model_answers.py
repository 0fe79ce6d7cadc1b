"""Files of a model's answers, in the forms of FastChat (MT-Bench), Arena-Hard and AlpacaEval, and where benchmarks' files are found."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gristmill.core.errors import InputError
from gristmill.core.untrusted import quoted, quoted_path
from gristmill.data.rows import read_records

SUFFIXES = (".jsonl", ".json", ".parquet")
IDS = ("question_id", "uid", "prompt_id", "instruction")
MODELS = ("model_id", "model", "generator")
FORMS = "question_id with choices (MT-Bench), uid with messages (Arena-Hard), or instruction with output (AlpacaEval), and the model's name"


@dataclass(frozen=True)
class ModelAnswers:
    """A model's answers by question: one a turn.

    Attributes:
        tokens: their tokens, where the file tells them (Arena-Hard's metadata).
    """

    model: str
    by_question: Mapping[str, tuple[str, ...]]
    tokens: Mapping[str, int] = field(default_factory=dict)

    def of(self, name: str, what: str, num_turns: int = 1) -> tuple[str, ...]:
        """The answers to one question.

        Raises:
            InputError: there are none, or fewer than its turns.
        """
        found = self.by_question.get(name, ())
        if len(found) < num_turns:
            raise InputError(
                f"The answers of {quoted(self.model)} have {len(found)} of {num_turns} turns for {what}: complete the file, or use --limit."
            )
        return found[:num_turns]


def read_answers(path: Path) -> ModelAnswers:
    """Read a model's answers.

    Raises:
        InputError: the file cannot be read, a row has none of the forms, or rows are of several models.
    """
    models: dict[str, None] = {}
    answers: dict[str, tuple[str, ...]] = {}
    tokens: dict[str, int] = {}
    for number, row in enumerate(read_records(path), 1):
        name = next((str(row[key]) for key in IDS if isinstance(row.get(key), str | int)), None)
        model = next((row[key] for key in MODELS if isinstance(row.get(key), str)), None)
        turns = _turns(row)
        if name is None or model is None or turns is None or not all(isinstance(turn, str) for turn in turns):
            raise InputError(f"Row {number} of {quoted_path(path)} is no model's answer: give {FORMS}.")
        models[model], answers[name] = None, tuple(turns)
        told = row.get("metadata") or row.get("conv_metadata")
        if isinstance(told, dict) and isinstance(told.get("token_len"), int):
            tokens[name] = told["token_len"]
    if len(models) != 1:
        raise InputError(f"{quoted_path(path)} holds answers of {len(models)} models: give a file with those of one.")
    return ModelAnswers(next(iter(models)), answers, tokens)


def _turns(row: Mapping[str, Any]) -> list[Any] | None:
    match row:
        case {"choices": [{"turns": [*turns]}, *_]}:
            return [turn.get("content") if isinstance(turn, dict) else turn for turn in turns]
        case {"messages": [*_, {"content": {"answer": answer}}]} | {"messages": [*_, {"content": str(answer)}]} | {"output": answer}:
            return [answer]
    return None


def find_file(data: Path, what: str, is_it: Callable[[Path], bool]) -> Path:
    """The file that `data` is, or the first (by name) in the folder that it is; `what` names it in an error.

    Raises:
        InputError: there is none.
    """
    if data.is_file():
        return data
    if not data.is_dir():
        raise InputError(f"{quoted_path(data)} does not exist: give --data {what}.")
    for path in data_files(data):
        if is_it(path):
            return path
    raise InputError(f"{quoted_path(data)} holds no {what}: give the folder or the file with --data.")


def data_files(data: Path, *, deep: bool = True) -> list[Path]:
    """Data files in a folder, `deep`: and in the folders in it, sorted; or the one file that `data` is.

    Raises:
        InputError: there is no such file or folder.
    """
    if data.is_file():
        return [data]
    if not data.is_dir():
        raise InputError(f"{quoted_path(data)} does not exist: give a file or a folder with --data.")
    return sorted(p for pattern in (("*", "*/*") if deep else ("*",)) for p in data.glob(pattern) if p.suffix in SUFFIXES and p.is_file())


def text_of(row: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    """The text in the first column that a row has of some; an answer such as True, which a program has taken for no text, as it is written.

    Raises:
        InputError: it has none.
    """
    for name in names:
        if isinstance(row.get(name), str | bool | int | float):
            return str(row[name])
    raise InputError(f"{where} has no text in {' or '.join(names)}: give the benchmark's own columns.")
