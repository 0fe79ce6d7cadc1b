"""Chat format of the Jinja template that a model folder brings."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gristmill.core.errors import InputError
from gristmill.data.chat import Message
from gristmill.data.chat_format import ChatFormat, Rendered, check_prompt
from gristmill.data.template import RESERVED, ChatTemplate, Rendering, TemplateError, encode_rendering
from gristmill.data.tokenizer import Tokenizer

OWN = "the folder's own template"  # how records and reports name it


class TemplateFormat(ChatFormat):
    """Chat format of a Jinja template, of which nothing is known but what it writes.

    The ids are those that transformers' `apply_chat_template` gives. An answer begins where the text of the conversation before it, with
    the header of a new turn, ends; where that is no beginning of the whole, it begins where the tag `generation` does, or else behind the
    same header. It ends with the first control token that ends answers: that of a trial, the tokenizer's end of text, or one of
    generation_config.json.

    Args:
        template: of a folder, or `PLAIN`.
        tokenizer: the folder's.

    Raises:
        InputError: the template cannot be used.
    """

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, name: str = OWN) -> None:
        self.name, self.close, self._template, self._place = name, "", template, tokenizer.place
        self._end = ""
        ask, answer = "A mill, 12.5 stones", "Yes, 7."
        turns = [{"role": "user", "content": ask}]
        with explained(self._place):
            (prompt,) = template.render([(turns, True)])
            if ask not in prompt.text:
                raise TemplateError("it does not write what the user says")
        ends = {tokenizer.eos, *(tokenizer.name_of(token) for token in tokenizer.end_ids)}
        try:
            (whole,) = template.render([([*turns, {"role": "assistant", "content": answer}], False)])
            after = whole.text[whole.text.rindex(answer) + len(answer) :]
        except (TemplateError, ValueError):  # of use for answers all the same; training says what is wrong
            after = ""
        self._control = _pattern(tokenizer.control)
        self._breaks = re.compile(f"{self._control.pattern}|\n")
        if found := self._control.search(after):
            self._end, self.close = found[0], after[: found.start()]
        self._ends = _pattern({*ends, self._end} - {""})

    @property
    def in_process(self) -> bool:
        return False

    @property
    def variables(self) -> frozenset[str]:
        """Names of the values that the template reads."""
        return self._template.variables

    def end_of_turn_id(self, tokenizer: Tokenizer) -> int:
        return tokenizer.special_id(self._end) if self._end else tokenizer.eos_id

    def render(self, messages: Sequence[Message], tokenizer: Tokenizer, *, tools: Sequence[Any] = (), ended: bool = True) -> Rendered:
        rendered = self._render(messages, tokenizer, tools)[0]
        if ended:
            return rendered
        last = max(place for place, trained in enumerate(rendered.mask) if trained)  # the token that ends the answer
        close = tokenizer.encode(self.close) if self.close else []
        cut = last - len(close) if close and rendered.ids[last - len(close) : last] == close else last
        return Rendered(rendered.ids[:cut], rendered.mask[:cut])

    def render_samples(self, messages: Sequence[Message], tokenizer: Tokenizer, *, tools: Sequence[Any] = ()) -> list[Rendered]:
        return self._render(messages, tokenizer, tools)

    def render_prompt(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        check_prompt(messages)
        return self.render_turns(messages, tokenizer)

    def render_turns(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        self._check(messages, tools)
        for name in variables or ():
            if name in RESERVED or name not in self.variables:
                raise InputError(f"The chat template of {self._place} has no variable {name[:80]!r} to set: leave it out.")
        with explained(self._place):
            (rendering,) = self._template.render(
                [(_plain_turns(messages), add_generation_prompt and not continue_final_message)],
                tools=tools,
                variables=variables,
                go_on=continue_final_message,
            )
        return encode_rendering(rendering, tokenizer)[0]

    @property
    def takes_tools(self) -> bool:
        """Whether the template has a place for tools."""
        return "tools" in self.variables or "tool_use" in self._template.sources

    def write_answer(self, fields: Mapping[str, Any], *, tools: Sequence[Any] = ()) -> str:
        """Text that the template writes of an answer with such fields, up to the end of its turn; "" where it refuses."""
        turns = [{"role": "user", "content": "Grind."}]
        for said in (fields, {**fields, "content": fields.get("content") or ""}, {k: v for k, v in fields.items() if k != "content"}):
            with suppress(TemplateError):
                calls = [(turns, True), ([*turns, {"role": "assistant", **said}], False)]
                prompt, whole = (one.text for one in self._template.render(calls, tools=tools))
                begin = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole)))
                end = self._ends.search(whole, begin)
                return whole[begin : end.start() if end else len(whole)]
        return ""

    def _check(self, messages: Sequence[Message], tools: Sequence[Any]) -> None:
        if not messages:
            raise InputError("The conversation has no user turn: start with a message whose role is 'user'.")
        if tools and not self.takes_tools:
            raise InputError(f"The chat template of {self._place} has no place for tools: leave them out.")
        calls = any('"tool_calls"' in message.fields for message in messages)
        if calls and not any("tool_calls" in source for source in self._template.sources.values()):
            raise InputError(f"The chat template of {self._place} has no place for 'tool_calls' of a message: leave it out.")
        if any(message.role == "tool" for message in messages) and not self._takes_results:
            raise InputError(f"The chat template of {self._place} has no place for answers of tools: leave them out.")

    @cached_property
    def _takes_results(self) -> bool:
        """Whether the template writes what a tool has answered; many leave out roles that they do not know."""
        call = {"id": "abcdefghi", "type": "function", "function": {"name": "mill", "arguments": {}}}
        said: list[dict[str, Any]] = [{"tool_calls": [call]}, {"content": "", "tool_calls": [call]}, {"content": "Wait."}]
        for one in said:
            turns = [{"role": "user", "content": "Grind."}, {"role": "assistant"} | one]
            with suppress(TemplateError):
                result = {"role": "tool", "content": "12.5 sacks", "tool_call_id": "abcdefghi", "name": "mill"}
                (rendering,) = self._template.render([([*turns, result], True)])
                if "12.5 sacks" in rendering.text:
                    return True
        return False

    def _render(self, messages: Sequence[Message], tokenizer: Tokenizer, tools: Sequence[Any]) -> list[Rendered]:
        """The whole conversation, and those shorter ones that end with an answer which it does not write, or tokenize, as it was said."""
        self._check(messages, tools)
        turns = _plain_turns(messages)
        places = [i for i, message in enumerate(messages) if message.role == "assistant" and message.trained]
        calls = [call for i in places for call in ((turns[:i], True), (turns[: i + 1], False))]
        with explained(self._place):
            written = self._template.render([*calls, (turns, False)], tools=tools)
        whole = written.pop()
        open_answers = [self._answer(prompt, said) for prompt, said in zip(written[::2], written[1::2], strict=True)]
        if places and places[-1] + 1 == len(turns):
            whole = open_answers[-1].whole  # which differs where its prompt is written in another way than earlier turns are
        out: list[Rendered] = []
        while not out or open_answers:
            there = [answer for answer in open_answers if answer.stands_in(whole)]
            borders = [cut for answer in there[:-1] for cut in answer.cuts]  # an earlier answer's tokens are the next one's prompt
            ids, starts, crossed = encode_rendering(whole, tokenizer, there[-1].cuts if there else (), borders=borders)
            there = [answer for answer in there if answer is there[-1] or not crossed & set(answer.cuts)]
            open_answers = [answer for answer in open_answers if all(answer is not other for other in there)]
            mask = [any(answer.begin <= start < answer.end for answer in there) for start in starts]
            out.append(Rendered(ids, mask))
            if open_answers:
                whole = open_answers[-1].whole
        return out

    def _answer(self, prompt: Rendering, whole: Rendering) -> "_Answer":
        """The last answer of a conversation, beside what the conversation before it asks for."""
        follows = whole.text.startswith(prompt.text)
        begin = asked = len(prompt.text) if follows else 0
        spans = whole.spans if follows else whole.spans[len(prompt.spans) :] or whole.spans[-1:]
        if span := next((span for span in spans if span[1] > begin), None):
            begin = max(begin, span[0])
            if not follows:  # what the tag encloses may begin with the header, which the prompt has, too
                common = len(os.path.commonprefix([prompt.text, whole.text]))
                begin = max((found.end() for found in self._breaks.finditer(whole.text, begin, common)), default=begin)
        elif not follows:  # earlier turns may be written in another way while they are the last: Mistral's have the system turn in them
            headers = list(self._control.finditer(prompt.text))
            name, header = (headers[-1][0], prompt.text[headers[-1].start() :]) if headers else ("", "")
            at = whole.text.rfind(name)
            if not name or prompt.text.count(name) != whole.text.count(name) or not whole.text.startswith(header, at):
                raise InputError(
                    "The chat template writes an answer in another way than it asks for one, so what is to be learnt cannot be told: give "
                    "a template with the tag `generation` around answers, or name another chat format."
                )
            begin = asked = len(prompt.text)
            whole = Rendering(prompt.text + whole.text[at + len(header) :], whole.mark)
        if (end := self._ends.search(whole.text, begin)) is None:
            raise InputError(
                "The chat template ends an answer with no control token, so that a model would not learn to stop: name another chat format."
            )
        return _Answer(begin, end.end(), whole, cuts=(asked, begin) if asked else (begin,))


@dataclass(frozen=True, slots=True)
class _Answer:
    """Answer in the text of a conversation that ends with it: from its first character to the end of its end-of-turn token."""

    begin: int
    end: int
    whole: Rendering
    cuts: tuple[int, ...]

    def stands_in(self, other: Rendering) -> bool:
        """Whether a longer conversation writes it, and all before it, in the same way."""
        return other.text.startswith(self.whole.text[: self.end])


@contextmanager
def explained(place: str) -> Iterator[None]:
    """Turn what is wrong with a template into a sentence that says where it is and what to do."""
    try:
        yield
    except TemplateError as e:
        if e.refusal:
            raise InputError(f"The chat template of {place} refuses the conversation: {e}") from None
        raise InputError(f"The chat template of {place} cannot be used ({e}): correct it, or name another chat format.") from None


def _pattern(names: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def _plain_turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as a chat template gets them: without what is null."""
    turns = [{"role": m.role, "content": m.content} | (json.loads(m.fields) if m.fields else {}) for m in messages]
    turns = [turn | ({"thinking": turn["reasoning_content"]} if "reasoning_content" in turn else {}) for turn in turns]  # an older name
    return [{name: value for name, value in turn.items() if value is not None} for turn in turns]
