"""Answers of an engine, or of several processes', that are journalled as they come."""

from collections.abc import Callable, Sequence
from pathlib import Path

from gristmill.core.progress import Progress
from gristmill.generation.api import Completion, Generator, Request
from gristmill.runs.journal import Journal


def journalled(requests: Sequence[Request], engine: Callable[[], Generator], path: Path, progress: Progress) -> dict[str, list[Completion]]:
    """Completions by request; those that an earlier start finished are read from the journal. They hold text, length and end alone.

    Args:
        engine: makes the engine, where something is left to answer.
        path: of the journal.
    """
    with Journal(path) as journal:
        if missing := [r for r in requests if r.id not in journal]:
            for request, answers in progress.track(engine().generate(missing), len(missing), lambda: "prompts answered"):
                journal.append({"id": request.id, "out": [[a.text, a.num_tokens, a.finish] for a in answers]})
        return {r.id: [Completion(text, num, (), finish) for text, num, finish in journal[r.id]["out"]] for r in requests}
