"""The user's own material for a dataset: documents, prompts and words, checked before anything is asked."""

from pathlib import Path

from gristmill.core.errors import InputError
from gristmill.data.formats import parse_conversation
from gristmill.data.rows import Prompt, make_id, read_records
from gristmill.data.truths import read_truth
from gristmill.synth.pipelines.base import Inputs
from gristmill.synth.pipelines.topics import read_lines
from gristmill.synth.writer import Topic
from gristmill.verify.verify import check_truth
from gristmill.workflows.dataset.recipe import DatasetRecipe

CHARACTERS_A_TOKEN = 3  # at least, in most languages; an estimate, since an endpoint's tokenizer is unknown


def read(recipe: DatasetRecipe) -> Inputs:
    """All inputs but the topics.

    Raises:
        InputError: a file is missing, empty or wrong, a document is too long, or a pipeline lacks what it needs.
    """
    room = recipe.context // 2 * CHARACTERS_A_TOKEN
    documents = _documents(recipe.documents, room) if recipe.documents else []
    prompts = _prompts(recipe.prompts) if recipe.prompts else []
    entities = [Topic(text, make_id("entity", text)) for text in read_lines(recipe.entities, "word")] if recipe.entities else []
    topics = bool(recipe.topics.given() or recipe.topics.macro or recipe.topics.broad)
    have = {"topics": topics, "documents": bool(documents), "prompts": bool(prompts), "entities": bool(entities)}
    recipe.pipelines.check([name for name, there in have.items() if there])
    return Inputs((), documents, prompts, entities)


def _documents(path: Path, room: int) -> list[Topic]:
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md") and p.is_file())
        found = []
        for file in files:
            try:
                found.append((str(file.relative_to(path)), file.read_text(encoding="utf-8").strip()))
            except (OSError, UnicodeDecodeError) as e:
                raise InputError(f"The document {file} cannot be read ({e}).") from e
    else:
        found = []
        for number, record in enumerate(read_records(path), 1):
            if not isinstance(record.get("text"), str):
                raise InputError(f"Row {number} of {path} lacks `text`: give every document one.")
            found.append((f"row {number}", record["text"].strip()))
    found = [(name, text) for name, text in found if text]
    if not found:
        raise InputError(f"{path} holds no document: give text files (.txt, .md), or rows with `text`.")
    for name, text in found:
        if len(text) > room:
            raise InputError(
                f"Document {name} of {path} has {len(text):,} characters, and about {room:,} fit beside a task in the models' context: "
                "split it, or raise `context` if the models take more."
            )
    return [Topic(text, make_id("document", text), "file") for _, text in found]


def _prompts(path: Path) -> list[Prompt]:
    rows = []
    for number, record in enumerate(read_records(path), 1):
        try:
            talk, meta = parse_conversation(record, answered=False, known=("id", "task", "truth"))
            if not talk[-1].content.strip():
                raise InputError("the text is empty.")
            truth = read_truth({"truth": record.get("truth")})
            if truth is not None:  # so that a wrong one is found before its answers are bought
                check_truth(truth)
        except InputError as e:
            raise InputError(f"Row {number} of {path}: {e}") from e
        name = make_id("prompt", [(m.role, m.content) for m in talk])
        rows.append(Prompt(name, str(record.get("task") or "from_file"), talk, "file", (), truth, meta=meta))
    if not rows:
        raise InputError(f"{path} is empty: give one prompt a row.")
    return rows
