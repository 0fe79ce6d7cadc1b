"""Chat templates of model folders: Jinja rendered in a process of its own, and the token ids of what it writes.

A template writes control tokens as text. What a message says must not become one: in the messages that a template gets, a private-use
character stands within every name of a control token, and what it writes is tokenized so that only names without one are tokens.
"""

import atexit
import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock
from typing import Any

from gristmill.core.errors import InputError
from gristmill.core.untrusted import quoted
from gristmill.data.tokenizer import Tokenizer

MAX_TEMPLATE_CHARS = 1 << 20  # the longest published ones have 20,000
MAX_SECONDS = 2.0  # of a processor, for one text
MAX_MEMORY = 1 << 30  # bytes of the process that renders
MAX_WAIT = 120.0  # seconds, on a machine that is busy with other things
MAX_REPLY = 1 << 30  # bytes
BOOT = "import sys; sys.path[:] = sys.argv[1:]; from gristmill.data.template_worker import main; main({}, {})"
PRIVATE = range(0xF0000, 0xFFFF0, 4)  # private-use characters, of which four serve as marks
RESERVED = ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize")  # that no caller may set


class TemplateError(InputError):
    """Input error of a chat template that cannot be used; `refusal`: it refuses a conversation by itself."""

    def __init__(self, message: str, *, refusal: bool = False) -> None:
        super().__init__(message)
        self.refusal = refusal


@dataclass(frozen=True)
class Rendering:
    """Text that a template has written.

    Attributes:
        mark: character within the names of control tokens that the conversation spells; it is no part of the text.
        spans: what the template's tag `generation` encloses, as (begin, end) in `text`.
    """

    text: str
    mark: str
    spans: tuple[tuple[int, int], ...] = ()


class _Worker:
    """The process that renders; started for the first text, and again when a template has made it end."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, request: list[Any]) -> list[dict[str, Any]]:
        with self._lock:
            process = self._process
            if process is None or process.poll() is not None or self._owner != os.getpid():
                process = self._start()
            assert process.stdin is not None and process.stdout is not None
            reply = b""
            with suppress(BrokenPipeError):
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
                if select.select([process.stdout], [], [], MAX_WAIT)[0]:
                    reply = process.stdout.readline(MAX_REPLY)
            if reply.endswith(b"\n"):
                return list(json.loads(reply))
            process.kill()
            ended = process.wait()
            self.close()
        if ended == -signal.SIGPROF:
            raise TemplateError(f"it takes more than {MAX_SECONDS:g} seconds of a processor")
        raise TemplateError(f"its renderer ended (status {ended}), perhaps for more than {MAX_MEMORY >> 20:,} MiB of memory")

    def _start(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-I", "-c", BOOT.format(MAX_SECONDS, MAX_MEMORY), *sys.path]
        # in a session of its own, so that an interrupt from the terminal is not for it
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self._owner = os.getpid()
        return self._process

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):
                    assert pipe is not None
                    pipe.close()
            process.wait()


WORKER = _Worker()
atexit.register(WORKER.close)


class ChatTemplate:
    """Chat template of a model folder.

    Args:
        sources: Jinja texts by name; "default", and perhaps "tool_use" for conversations with tools.
        tokenizer: says which tokens the template may name.

    Raises:
        TemplateError: there is no default, or a text is too long.
    """

    def __init__(self, sources: Mapping[str, str], tokenizer: Tokenizer) -> None:
        if "default" not in sources:
            names = ", ".join(quoted(name) for name in sources)
            raise TemplateError(f"it has several by name ({names}), and none of them is the default")
        if any(len(text) > MAX_TEMPLATE_CHARS for text in sources.values()):
            raise TemplateError(f"it has more than {MAX_TEMPLATE_CHARS:,} characters")
        self.sources = dict(sources)
        self._names = tokenizer.token_names
        control = sorted((name for name in tokenizer.control if len(name) > 1), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, control)) or "(?!)")
        self.variables: frozenset[str] = frozenset()  # known when it has rendered once

    def render(
        self,
        calls: Sequence[tuple[Sequence[dict[str, Any]], bool]],
        *,
        tools: Sequence[Any] = (),
        variables: Mapping[str, Any] | None = None,
        go_on: bool = False,
    ) -> list[Rendering]:
        """Write conversations, each with or without the header of a new assistant turn.

        Args:
            calls: messages, and whether a new turn begins.
            variables: further ones of the template's, such as `enable_thinking`.
            go_on: leave each last message open, so that its text goes on.

        Raises:
            TemplateError: the template refuses, is no Jinja, or takes too long.
        """
        given = [[list(messages) for messages, _ in calls], list(tools), dict(variables or {})]
        try:
            told = json.dumps(given, ensure_ascii=False) + "".join(self.sources.values())
        except RecursionError:
            raise TemplateError("a conversation or its tools are nested too deeply", refusal=True) from None
        marks = next((m for m in PRIVATE if not any(chr(m + i) in told for i in range(4))), None)
        if marks is None:
            raise TemplateError("a conversation holds every private-use character, and none is left to mark what it spells")
        mark, begin, end, tag = (chr(marks + i) for i in range(4))
        try:
            conversations, tools, more = self._marked(given, mark)
        except RecursionError:
            raise TemplateError("a conversation or its tools are nested too deeply", refusal=True) from None
        if go_on:
            conversations = [[*talk[:-1], talk[-1] | {"content": f"{talk[-1]['content']}{tag} "}] for talk in conversations]
        values = {"tools": tools or None, "documents": None, **self._names, **more}
        source = self.sources["tool_use" if tools and "tool_use" in self.sources else "default"]
        request = [
            (source, values | {"messages": talk, "add_generation_prompt": ask}, (begin, end))
            for talk, (_, ask) in zip(conversations, calls, strict=True)
        ]
        out = []
        for reply in WORKER.ask(request):
            if "error" in reply:
                raise TemplateError(quoted(self._plain(str(reply["error"]), mark))[1:-1], refusal=bool(reply.get("refusal")))
            self.variables |= set(reply["variables"])
            out.append(_spans(_open(reply["text"], tag) if go_on else reply["text"], mark, begin, end))
        return out

    def _marked(self, value: Any, mark: str) -> Any:
        """A value with a mark after the first character of each name of a control token, in names and texts at every depth."""
        if isinstance(value, str):
            return self._control.sub(lambda found: found[0][0] + mark + found[0][1:], value)
        if isinstance(value, Mapping):
            return {self._marked(name, mark): self._marked(one, mark) for name, one in value.items()}
        if isinstance(value, list | tuple):
            return [self._marked(one, mark) for one in value]
        return value

    @staticmethod
    def _plain(text: str, mark: str) -> str:
        return text.replace(mark, "")


def _open(text: str, tag: str) -> str:
    """A text up to the tag at the end of the last message; where the template has cut the blank behind the tag, without white space."""
    at = text.rfind(tag)
    if at < 0:
        raise TemplateError("it leaves out the last message, which is to go on")
    return text[:at] if text[at + 1 : at + 2] == " " else text[:at].rstrip()


def _spans(text: str, mark: str, begin: str, end: str) -> Rendering:
    spans: list[tuple[int, int]] = []
    parts: list[str] = []
    at, opened = 0, 0
    for piece in re.split(f"([{begin}{end}])", text):
        if piece == begin:
            opened = at
        elif piece == end:
            spans.append((opened, at))
        else:
            parts.append(piece)
            at += len(piece)
    return Rendering("".join(parts), mark, tuple(spans))


def encode_rendering(
    rendering: Rendering, tokenizer: Tokenizer, cuts: Sequence[int] = (), *, borders: Sequence[int] = ()
) -> tuple[list[int], list[int], set[int]]:
    """Token ids of what a template wrote, where each begins in the text, and the borders that tokens reach over.

    The ids are those of the whole text, as other programs make them, but for two things. What a message spells is no control token. And no
    token reaches over a cut, where an answer begins, so that the prompt of inference is a prefix of what training sees.

    Args:
        cuts: where the tokens before must be those of a text that ends there.
        borders: where it is to be found out whether they are.
    """
    text, mark = rendering.text, rendering.mark
    ids, offsets = tokenizer.encode_template(text)
    out_ids: list[int] = []
    out_starts: list[int] = []
    crossed: set[int] = set()
    for before, first, last, begin, end in _runs(ids, offsets, tokenizer.control_ids, len(text)):

        def until(stop: int, before: int = before, begin: int = begin) -> list[int]:
            """Ids of the run, if the text ended there."""
            if mark in text[begin:stop]:
                plain = _plain(text[begin:stop], mark)
                return tokenizer.encode(plain) if before < 0 else tokenizer.encode_turn("", plain)[1]
            from_token = 0 if before < 0 else offsets[before][0]
            return tokenizer.encode_template(text[from_token:stop])[0][before >= 0 :]

        run, starts = list(ids[first:last]), [start for start, _ in offsets[first:last]]
        if mark in text[begin:end]:
            run = until(end)
            starts = [begin] * len(run)
        for cut in sorted({*cuts, *borders}):
            if not begin < cut < end:
                continue
            head = until(cut)
            if run[: len(head)] != head:
                if cut not in cuts:
                    crossed.add(cut)
                    continue
                run = head + tokenizer.encode_turn(_plain(text[begin:cut], mark), _plain(text[cut:end], mark))[1]
                starts = [*starts[: len(head)], *[cut] * len(run)][: len(run)]
            starts = [*(min(start, cut - 1) for start in starts[: len(head)]), *(max(start, cut) for start in starts[len(head) :])]
        out_ids += run
        out_starts += starts
        if last < len(ids):
            out_ids.append(ids[last])
            out_starts.append(offsets[last][0])
    return out_ids, out_starts, crossed


def _plain(text: str, mark: str) -> str:
    """A text without its marks, also where `tojson` has spelt them."""
    return text.replace(mark, "").replace(json.dumps(mark)[1:-1], "")


def _runs(
    ids: Sequence[int], offsets: Sequence[tuple[int, int]], control: frozenset[int], length: int
) -> list[tuple[int, int, int, int, int]]:
    """What stands between control tokens: the token before (or -1), first and last of its own tokens, begin and end in the text."""
    runs = []
    before, begin = -1, 0
    for place in [*(i for i, token in enumerate(ids) if token in control), len(ids)]:
        end = offsets[place][0] if place < len(ids) else length
        runs.append((before, before + 1, place, begin, end))
        if place < len(ids):
            before, begin = place, offsets[place][1]
    return runs
