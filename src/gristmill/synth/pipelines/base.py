"""Base class of prompt pipelines: options that a recipe may set, and an asynchronous generator of rows."""

from abc import abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from gristmill.core.config import Section
from gristmill.data.chat import Message
from gristmill.data.rows import Demonstration, Prompt, make_id
from gristmill.synth.writer import Topic, Writer


@dataclass(frozen=True)
class Inputs:
    """Seeds that pipelines start from.

    Attributes:
        topics: of the run, made or given.
        documents, prompts, entities: the user's own, by the ids of their rows.
        tasks: names of the user's tasks.
    """

    topics: Sequence[Topic] = ()
    documents: Sequence[Topic] = ()
    prompts: Sequence[Prompt] = ()
    entities: Sequence[Topic] = ()
    tasks: Sequence[str] = ()


class Pipeline(Section):
    """Pipeline with its options. What `write` yields depends on them, the inputs, the templates and the answers alone."""

    @property
    def needs(self) -> str:
        """Which of the inputs it cannot do without."""
        return "topics"

    @property
    def reads(self) -> set[str]:
        """Which of the inputs it starts from, if they are there."""
        return set(self.needs.split(" or ")) - {""}

    @abstractmethod
    def write(self, writer: Writer, inputs: Inputs) -> AsyncIterator[Prompt | Demonstration]:
        """Rows, in no particular order."""


def prompt(task: str, written: Topic, parents: Sequence[str]) -> Prompt:
    """Single-turn prompt row of a written text, itself the first of its parents."""
    parents = (written.id, *parents)
    name = make_id(task, written.text, parents)
    return Prompt(name, task, (Message("user", written.text),), written.origin, parents, request=written.request)


def demonstration(task: str, messages: Sequence[Message], origin: str, *, parents: Sequence[str]) -> Demonstration:
    """Demonstration row of a whole conversation."""
    name = make_id(task, [(m.role, m.content) for m in messages], parents)
    return Demonstration(name, task, tuple(messages), origin, tuple(parents))
