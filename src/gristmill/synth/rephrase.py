"""Rephrasing tasks of documents: prompts, segmentation, and parsing of the answers.

    document -> segments that fit into a call -> (a model) -> the answer read, or why it is of no use

Tasks, their limits and the reading of answers are those of Nemotron-CC (2412.02595) and its published recipe, with these differences: a
line that is too long for a call is cut between sentences before it is given up, and segments are not joined over what was given up.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from gristmill.core.response_text import answer_text, code_blocks
from gristmill.data.chat import Message
from gristmill.synth.templates import TemplatePack
from gristmill.synth.writer import ParseError

TaskName = Literal["wikipedia", "diverse_qa", "distill", "extract_knowledge", "knowledge_list"]
CountTokens = Callable[[Sequence[str]], list[int]]  # tokens of each text

TOKENS_PER_PAIR = 15  # of a segment, for each pair of question and answer that it may have at most
MAX_CHARS_PER_TOKEN = 32  # characters on average; an answer with more of them has another length than its server says


@dataclass(frozen=True)
class Task:
    """Rephrasing task: its limits, in tokens.

    Attributes:
        min_document, min_segment: shorter ones are left out.
        max_input: of a whole call.
        min_output: of the text that is made, for `diverse_qa` of segment and pairs.
        opening: what the answer must begin with.
        system: template of the system message.
    """

    min_document: int
    min_segment: int
    max_input: int
    min_output: int
    opening: str = ""
    system: str = "rephrase_system"


TASKS: dict[TaskName, Task] = {
    "wikipedia": Task(5, 5, 512, 50, "Here is a paraphrase:"),
    "diverse_qa": Task(30, 30, 1000, 100),
    "distill": Task(30, 10, 2000, 50, "Shorter text:", "rephrase_system_faithful"),
    "extract_knowledge": Task(30, 30, 1400, 50),
    "knowledge_list": Task(30, 30, 1000, 50),
}

_SENTENCE_END = re.compile(r"(?<=[.!?\u3002\uff01\uff1f])\s+|(?<=[\u3002\uff01\uff1f])")
_CODE = re.compile(r"`([^`\n]{1,500})`")  # a few words
_MARKDOWN = (
    (re.compile(r"^[ \t]{0,3}#{1,6}[ \t]+", re.M), ""),
    (re.compile(r"^[ \t]*(?:\*[ \t]*){3,}$|^[ \t]*(?:-[ \t]*){3,}$|^[ \t]*(?:_[ \t]*){3,}$", re.M), ""),  # rules
    (re.compile(r"^([ \t]*)[*+] ", re.M), r"\1- "),
    (re.compile(r"(?<!\w)!?\[([^\[\]\n]{0,500})\]\([^()\s]{0,500}\)"), r"\1"),
    (re.compile(r"(?<![\w*])\*\*(?=[^\s*])([^*\n]{1,500})(?<=[^\s*])\*\*(?![\w*])"), r"\1"),
    (re.compile(r"(?<!\w)__(?=[^\s_])([^_\n]{1,500})(?<=[^\s_])__(?!\w)"), r"\1"),
    (re.compile(r"(?<![\w*])\*(?=[^\s*])([^*\n]{1,500})(?<=[^\s*])\*(?![\w*])"), r"\1"),
    (re.compile(r"(?<![\w_])_(?=[^\s_])([^_\n]{1,500})(?<=[^\s_])_(?![\w_])"), r"\1"),
)
_QUOTES = {'"': '"', "\u201c": "\u201d", "\u201e": "\u201c", "\u00ab": "\u00bb", "'": "'"}
_PASSAGE = re.compile(r"^\s*Passage(?:\s[1-9])?:\s*$", re.I)
_QUESTION, _ANSWER = re.compile(r"Question:", re.I), re.compile(r"\bAnswer:", re.I)


def template_name(name: TaskName) -> str:
    """Name of a task's template."""
    return f"rephrase_{name}"


def messages(name: TaskName, segment: str, templates: TemplatePack) -> tuple[Message, ...]:
    """Messages of the call for a segment."""
    return (
        Message("system", templates[TASKS[name].system].render()),
        Message("user", templates[template_name(name)].render(document=segment)),
    )


def max_segment_tokens(name: TaskName, templates: TemplatePack, count: CountTokens) -> int:
    """Token budget of a segment: what a task's template leaves of its call."""
    return TASKS[name].max_input - sum(count([message.content for message in messages(name, "", templates)])) - 2


def split_segments(name: TaskName, text: str, max_tokens: int, *, count: CountTokens) -> list[tuple[str, int]]:
    """Split a document into segments that fit into a call, each with its tokens: consecutive lines, as many as there is room for.

    A line that does not fit is cut between sentences; a sentence that does not fit is left out.
    """
    task = TASKS[name]
    lines = text.split("\n")
    sizes = count(lines)
    if sum(sizes) < task.min_document:
        return []
    found: list[tuple[str, int]] = []
    part, size = "", 0

    def end() -> None:
        nonlocal part, size
        if (stripped := part.strip()) and size >= task.min_segment:
            found.append((stripped, size))
        part, size = "", 0

    def add(piece: str, more: int, separator: str) -> None:
        nonlocal part, size
        if size + more + 1 > max_tokens:
            end()
        part, size = (part + separator + piece, size + more + 1) if part else (piece, more)

    for line, tokens in zip(lines, sizes, strict=True):
        if tokens <= max_tokens:
            add(line, tokens, "\n")
            continue
        separator = "\n"
        sentences = _SENTENCE_END.split(line)
        for sentence, more in zip(sentences, count(sentences), strict=True):
            if more > max_tokens:
                end()
            elif sentence:
                add(sentence, more, separator)
            separator = " " if sentence.isascii() or sentence[-1] in ".!?" else ""
    end()
    return found


def parse_answer(
    name: TaskName, answer: str, tokens: int, *, max_tokens: int, segment: tuple[str, int], draw: random.Random, count: CountTokens
) -> tuple[str, str]:
    """Parse an answer: the text that it makes, and the part of it that the model wrote.

    Args:
        tokens: of the answer.
        max_tokens: that the call allowed.
        segment: text and tokens of what was to be said in other words.
        draw: which of the pairs `diverse_qa` keeps, and in which order.

    Raises:
        ParseError: it has not the form that was asked for, or is too short or too long.
    """
    task = TASKS[name]
    if tokens > max_tokens - 2 or len(answer) > MAX_CHARS_PER_TOKEN * max_tokens:
        raise ParseError("too many tokens")
    text = strip_markdown(answer_text(answer)).strip()
    if task.opening:
        if not text.casefold().startswith(task.opening.casefold()):
            raise ParseError("no opening")
        text = _unquoted(text[len(task.opening) :].strip())
    if name == "extract_knowledge":
        text = "\n".join(line for line in text.split("\n") if not _PASSAGE.match(line))
    elif name == "knowledge_list":
        text = _list(text)
    elif name == "diverse_qa":
        text = _pairs(text, segment[1], draw)
    text = text.strip()
    whole = f"{segment[0]}\n\n{text}" if name == "diverse_qa" else text
    if not text or count([whole])[0] < task.min_output:
        raise ParseError("too few tokens")
    return whole, text


def strip_markdown(text: str) -> str:
    """Strip Markdown: no headings, emphasis, links, rules and marks of code, which itself stays as it is.

    Points of lists begin with a dash.
    """
    out, at = [], 0
    for block in code_blocks(text):
        out += [_without_marks(text[at : block.start]), block.code]
        at = block.end
    return "".join([*out, _without_marks(text[at:])])


def _without_marks(text: str) -> str:
    out, at = [], 0
    for code in _CODE.finditer(text):
        out += [_plain(text[at : code.start()]), code[1]]
        at = code.end()
    return "".join([*out, _plain(text[at:])])


def _plain(text: str) -> str:
    for pattern, instead in _MARKDOWN:
        text = pattern.sub(instead, text)
    return text


def _unquoted(text: str) -> str:
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1]:
        return text[1:-1].strip()
    return text


def _list(text: str) -> str:
    """Entries, one a line; an introduction before them is left out."""
    lines = text.split("\n")
    if not lines[0].lstrip().startswith("-"):
        lines = lines[1:]
    return "\n".join(line[2:] if line.startswith(("- ", "  ")) else line for line in lines)


def _pairs(text: str, tokens: int, draw: random.Random) -> str:
    """Some of the pairs of questions and answers: as many as were drawn, of at most ten for 150 tokens of the segment."""
    lines = [line.strip().removeprefix("- ").strip() for line in text.split("\n")]
    if not _QUESTION.match(lines[0]):
        lines = lines[1:]  # the announcement
    pairs: list[str] = []
    for line in filter(None, lines):
        if _QUESTION.match(line):
            pairs.append(line)
        elif pairs:
            pairs[-1] += "\n" + line
        else:
            raise ParseError("text before the first question")
    if not pairs or not all(_ANSWER.search(pair) for pair in pairs):
        raise ParseError("a question without an answer" if pairs else "no question")
    draw.shuffle(pairs)
    return "\n\n".join(pairs[: draw.randint(1, max(1, tokens // TOKENS_PER_PAIR))])
