"""Topic generation: macro topics, subtopics of each, and the user's own topics (report, section 3.2.1)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from gristmill.core.config import FilePath, Section
from gristmill.core.errors import InputError
from gristmill.core.io import read_bytes, reason
from gristmill.data.rows import make_id
from gristmill.synth.parsing import unique
from gristmill.synth.writer import Topic, Writer


class Topics(Section):
    """Recipe section of a run's topics."""

    macro: int = Field(10, ge=0, description="broad topics that the model names")
    subtopics: int = Field(10, ge=0, description="topics within each broad one")
    combine: bool = Field(True, description="use the broad topics as topics too")
    broad: tuple[str, ...] = Field((), description="broad topics of your own; subtopics are made of them too")
    own: tuple[str, ...] = Field((), description="topics of your own, used as they are")
    file: FilePath | None = Field(None, description="a text file with one topic of your own a line")

    @model_validator(mode="after")
    def _all_read(self) -> Self:
        broad = bool(self.macro or self.broad)
        if not broad and (not self.combine or self.subtopics not in (0, type(self).model_fields["subtopics"].default)):
            raise ValueError("subtopics and combine are of broad topics: give macro or broad, or take them out")
        if broad and not self.combine and not self.subtopics:
            raise ValueError("no broad topic would be used: give subtopics, or leave combine out")
        return self

    def given(self) -> list[str]:
        """The user's own topics.

        Raises:
            InputError: the file is missing or empty.
        """
        own = list(self.own)
        if self.file is not None:
            own += read_lines(self.file, "topic")
        return unique(own)

    async def collect(self, writer: Writer) -> list[Topic]:
        """All topics: own ones first, then broad ones, then those within them. No two alike."""
        broad = own_topics(unique(self.broad))
        if self.macro:
            async for topic in writer.each([self.macro], lambda num: writer.items("macro_topics", num)):
                broad.append(topic)
        within: list[Topic] = []
        if self.subtopics:
            within = await writer.all(broad, lambda topic: writer.items("subtopics", self.subtopics, parents=[topic.id], topic=topic.text))
        return deduplicate(writer, [*own_topics(self.given()), *(broad if self.combine else ()), *within])


def own_topics(texts: Sequence[str]) -> list[Topic]:
    """The user's own words as topics."""
    return [Topic(text, make_id("topic", text)) for text in texts]


def deduplicate(writer: Writer, topics: Sequence[Topic]) -> list[Topic]:
    """Deduplicate topics up to case, spaces and punctuation; the writer takes note of those that stay."""
    by_text = {topic.text: topic for topic in reversed(topics)}
    found = [by_text[text] for text in unique(topic.text for topic in topics)]
    writer.topics |= {topic.id: topic for topic in found}
    return found


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a text file that are not blank.

    Raises:
        InputError: there is no such file, or nothing in it.
    """
    try:
        found = [line.strip() for line in read_bytes(path).decode().splitlines() if line.strip()]
    except ValueError as e:
        raise InputError(f"The {what} file {path} cannot be read ({reason(e)}).") from e
    if not found:
        raise InputError(f"The {what} file {path} is empty: write one {what} a line.")
    return found
