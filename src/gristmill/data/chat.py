"""Chat formats: conversations, and the one function that renders them to token ids and loss mask.

Training, reward scoring, the inference engine and the server all call `ChatFormat.render` or `render_prompt`. A `TokenFormat` builds the
ids token by token, every piece of text tokenized on its own. A `TemplateFormat` renders the Jinja template that a model folder brings.
Of both the prompt's ids are always a prefix of the training ids, and text can never produce a control token.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, cast, get_args

from gristmill.core.errors import InputError
from gristmill.data.template import RESERVED, ChatTemplate, Rendering, TemplateError, encode_rendering
from gristmill.data.tokenizer import SURROGATE, Tokenizer

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        trained: false for an answer that is context, on which no loss is taken (`weight: 0` in files).
        fields: JSON of what else a chat template may read (`tool_calls`, `tool_call_id`, `reasoning_content`, ...), or "".
    """

    role: Role
    content: str
    trained: bool = field(default=True, repr=False)
    fields: str = field(default="", repr=False)


OWN = "the folder's own template"  # how records and reports name it
# Turns as plain text, for a Base without tokens of its own for chats.
PLAIN = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content + '\n\n' }}"
    "{% elif message.role == 'user' %}{{ 'User:\n' + message.content + '\n\n' }}"
    "{% elif message.role == 'assistant' %}{{ 'Assistant:\n' + message.content + eos_token + '\n\n' }}"
    "{% else %}{{ raise_exception('There are no turns but of system, user and assistant.') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
# What a template must write as a known format does, to be rendered as that one.
TRIAL_TEXTS = ("And 12.5 stones?", "  two blanks first", "\n\na line break first", "blanks behind  ", "\u00e9\u4e2d line behind\n", "")
TRIAL_TOOL = {
    "type": "function",
    "function": {"name": "mill", "description": "Grinds.", "parameters": {"type": "object"}},
}
Conversation = tuple[Message, ...]
SPOKEN: tuple[Role, ...] = ("system", "user", "assistant")  # roles that every format has


@dataclass(frozen=True, slots=True)
class Rendered:
    """Token ids of a conversation and which of them are trained (assistant text and its end of turn)."""

    ids: list[int]
    mask: list[bool]


class ChatFormat(ABC):
    """Chat format: how a conversation is written in tokens.

    Attributes:
        name: for records and reports.
        close: text that stands between an answer and the token that ends it.
    """

    name: str
    close: str

    @abstractmethod
    def render(self, messages: Sequence[Message], tokenizer: Tokenizer, *, tools: Sequence[Any] = (), ended: bool = True) -> Rendered:
        """Render a whole conversation to ids and loss mask.

        The mask is true exactly on assistant text and the end of each assistant turn, but for turns that are not `trained`.
        Source: Nemotron-4 340B report, section 3.3 (loss on assistant turns only).

        Args:
            tools: descriptions of the tools that the assistant may call.
            ended: whether the last turn came to its end. One that was cut off has no token that ends it.

        Raises:
            InputError: the format has no such conversation: it is empty, turns do not alternate, or it has tools and the format has not.
        """

    @abstractmethod
    def render_prompt(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        """Render a prompt: ids up to and including the header of the assistant turn that is to be generated.

        Raises:
            InputError: as `render`, or the last turn is the assistant's.
        """

    @abstractmethod
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
        """Render a prompt of turns in any order, as a server is sent them; the names of the switches are Hugging Face's.

        Args:
            add_generation_prompt: end with the header of a new assistant turn.
            continue_final_message: leave the last turn open instead, so that its text goes on.
            tools: as in `render`.
            variables: values for a chat template, such as `enable_thinking`.

        Raises:
            InputError: there are no turns, or the format has no tools or no such variable.
        """

    @abstractmethod
    def end_of_turn_id(self, tokenizer: Tokenizer) -> int:
        """Id of the token that ends an assistant turn."""

    def render_samples(self, messages: Sequence[Message], tokenizer: Tokenizer, *, tools: Sequence[Any] = ()) -> list[Rendered]:
        """Render a conversation for training: once, or more often where later turns change how earlier answers are written."""
        return [self.render(messages, tokenizer, tools=tools)]

    def response_text(self, ids: Sequence[int], tokenizer: Tokenizer, *, continued: bool = False) -> str:
        """Text of a generated answer, or (`continued`) of its rest: without the end-of-turn token and what the format puts before it."""
        return tokenizer.decode(ids, continued=continued).removesuffix(self.close)

    @property
    def in_process(self) -> bool:
        """Whether rendering waits for no other process."""
        return True


@dataclass(frozen=True, slots=True)
class TokenFormat(ChatFormat):
    """Chat format that is rendered token by token.

    Attributes:
        name: key in `FORMATS`.
        headers: control token and text that open a turn of each role, as (tokens, text, tokens, text).
        close: text that ends every turn, before `end`.
        end: control token that ends a turn. The model learns to emit it after an answer; it stops generation, and the reward
            head reads its state.
        bos: control token at the very start, if any.
        after: text after `end`, never trained (chatml's line break).
        end_opens_next: the token that ends an assistant turn is the one that opens the next user turn (nemotron).
        always_system: write an empty system turn when the conversation has none.
    """

    name: str
    headers: dict[str, tuple[str, str, str, str]]
    close: str
    end: str
    bos: str = ""
    after: str = ""
    end_opens_next: bool = False
    always_system: bool = False

    @property
    def special_tokens(self) -> list[str]:
        """Every control token of the format, in first-use order."""
        names = [self.bos, *(h[i] for h in self.headers.values() for i in (0, 2)), self.end]
        return list(dict.fromkeys(n for n in names if n))

    @property
    def template(self) -> str:
        """Chat template in Hugging Face's Jinja form, for other programs.

        With the tokenizer that `Tokenizer.save` writes beside it, what it makes of a conversation has the tokens of `render`, unless a
        message spells the name of a control token. Tools, and turns that `render` refuses, are an error there too.
        """

        def put(text: str) -> str:
            return f"{{{{ {json.dumps(text)} }}}}" if text else ""

        header = {role: "".join(parts) for role, parts in self.headers.items()}
        user = put(header["user"])
        if self.end_opens_next:
            after_answer = put("".join(self.headers["user"][1:]))
            user = f"{{% if loop.first or loop.previtem.role != 'assistant' %}}{user}{{% else %}}{after_answer}{{% endif %}}"
        end = put(self.end)
        if self.end_opens_next:
            end = f"{{% if message.role == 'assistant' %}}{end}{{% endif %}}"
        between = f"{{% if not loop.last %}}{put(self.after)}{{% endif %}}" if self.after else ""
        no_system = put(header["system"]) + put(self.close)

        def refuse(when: str, why: str) -> str:
            return f"{{% if {when} %}}{{{{ raise_exception({json.dumps(why)}) }}}}{{% endif %}}"

        first = "(1 if messages and messages[0].role == 'system' else 0)"
        due = f"(loop.index0 - {first}) % 2 == 0"
        return "".join(
            (
                refuse("tools", "This chat format has no tools."),
                refuse(f"not messages or messages | length == {first}", "The conversation has no user turn."),
                put(self.bos),
                f"{{% if messages[0].role != 'system' %}}{no_system}{{% endif %}}" if self.always_system else "",
                "{% for message in messages %}",
                refuse(
                    f"not (message.role == 'system' and loop.first) and message.role != ('user' if {due} else 'assistant')",
                    "Turns must alternate user and assistant, after a system turn or none; there are no others.",
                ),
                refuse("message.content is not string or message.tool_calls", "A message must be text, and call no tool."),
                f"{{% if message.role == 'system' %}}{put(header['system'])}{{% elif message.role == 'user' %}}{user}",
                f"{{% else %}}{put(header['assistant'])}{{% endif %}}",
                "{{ message.content }}" + put(self.close) + end + between,
                "{% endfor %}",
                "{% if add_generation_prompt %}",
                refuse("messages[-1].role == 'assistant'", "The conversation already ends with the assistant."),
                put(self.after + header["assistant"]) + "{% endif %}",
            )
        )

    def render(self, messages: Sequence[Message], tokenizer: Tokenizer, *, tools: Sequence[Any] = (), ended: bool = True) -> Rendered:
        check_turns(messages)
        self._check_plain(messages, tools)
        return self._render(messages, tokenizer, last_open=not ended)

    def _check_plain(self, messages: Sequence[Message], tools: Sequence[Any]) -> None:
        """Raise `InputError` where a conversation has tools. Thoughts are left out: they are no part of an answer."""
        calls = any(message.role == "tool" or '"tool_calls"' in message.fields for message in messages)
        if tools or calls:
            what = "a message calls a tool or is its answer" if calls else "there are tools"
            raise InputError(f"{what}, and the chat format {self.name} has none: write them as text, or leave them out.")

    def _render(self, messages: Sequence[Message], tokenizer: Tokenizer, *, last_open: bool = False) -> Rendered:
        """`render` of turns in any order, the last of them without its end if it is `last_open`."""
        out = Rendered([], [])
        if self.bos:
            self._token(out, self.bos, tokenizer)
        if self.always_system and messages[0].role != "system":
            self._turn(out, "system", self.close, tokenizer)
        for i, message in enumerate(messages):
            answer = message.role == "assistant"
            trained = answer and message.trained
            if last_open and i + 1 == len(messages):
                self._turn(out, message.role, message.content, tokenizer, trained=trained)
                break
            self._turn(out, message.role, message.content + self.close, tokenizer, trained=trained)
            if answer or not self.end_opens_next:
                self._token(out, self.end, tokenizer, trained=trained)
            if self.after and i + 1 < len(messages):
                self._text(out, tokenizer.encode_turn(self.after, "")[0])
        return out

    def render_prompt(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        _check_prompt(messages)
        out = self.render(messages, tokenizer)
        if self.after:
            self._text(out, tokenizer.encode_turn(self.after, "")[0])
        self._turn(out, "assistant", "", tokenizer)
        return out.ids

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
        self._check_plain(messages, tools)
        if variables:
            raise InputError(f"The chat format {self.name} has no {next(iter(variables))!r}: leave it out.")
        if not messages:
            raise InputError("The conversation has no user turn: start with a message whose role is 'user'.")
        out = self._render(messages, tokenizer, last_open=continue_final_message)
        if add_generation_prompt and not continue_final_message:
            if self.after:
                self._text(out, tokenizer.encode_turn(self.after, "")[0])
            self._turn(out, "assistant", "", tokenizer)
        return out.ids

    def end_of_turn_id(self, tokenizer: Tokenizer) -> int:
        return tokenizer.special_id(self.end)

    def _turn(self, out: Rendered, role: str, text: str, tokenizer: Tokenizer, *, trained: bool = False) -> None:
        first, header, second, tail = self.headers[role]
        if first and not (self.end_opens_next and first == self.end and out.ids and out.ids[-1] == tokenizer.special_id(self.end)):
            self._token(out, first, tokenizer)
        if second:
            self._text(out, tokenizer.encode_turn(header, "")[0])
            self._token(out, second, tokenizer)
            header = tail
        head, body = tokenizer.encode_turn(header, text)
        self._text(out, head)
        self._text(out, body, trained=trained)

    @staticmethod
    def _token(out: Rendered, name: str, tokenizer: Tokenizer, *, trained: bool = False) -> None:
        out.ids.append(tokenizer.special_id(name))
        out.mask.append(trained)

    @staticmethod
    def _text(out: Rendered, ids: Sequence[int], *, trained: bool = False) -> None:
        out.ids.extend(ids)
        out.mask.extend([trained] * len(ids))


FORMATS: dict[str, TokenFormat] = {
    "nemotron": TokenFormat(
        name="nemotron",
        headers={
            "system": ("<extra_id_0>", "System\n", "", ""),
            "user": ("<extra_id_1>", "User\n", "", ""),
            "assistant": ("<extra_id_1>", "Assistant\n", "", ""),
        },
        close="\n",
        end="<extra_id_1>",
        end_opens_next=True,
        always_system=True,
    ),
    "chatml": TokenFormat(
        name="chatml",
        headers={role: ("<|im_start|>", f"{role}\n", "", "") for role in SPOKEN},
        close="",
        end="<|im_end|>",
        after="\n",
    ),
    "llama3": TokenFormat(
        name="llama3",
        headers={role: ("<|start_header_id|>", role, "<|end_header_id|>", "\n\n") for role in SPOKEN},
        close="",
        end="<|eot_id|>",
        bos="<|begin_of_text|>",
    ),
}


class TemplateFormat(ChatFormat):
    """Chat format of a Jinja template, of which nothing is known but what it writes.

    The ids are those that transformers' `apply_chat_template` gives. An answer begins where the text of the conversation before it, with
    the header of a new turn, ends; where that is no beginning of the whole, it begins where the tag `generation` does. It ends with the
    first control token that ends answers: that of a trial, the tokenizer's end of text, or one of generation_config.json.

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
        with _explained(self._place):
            (prompt,) = template.render([(turns, True)])
            if ask not in prompt.text:
                raise TemplateError("it does not write what the user says")
        ends = {tokenizer.eos, *(tokenizer.name_of(token) for token in tokenizer.end_ids)}
        try:
            (whole,) = template.render([([*turns, {"role": "assistant", "content": answer}], False)])
            after = whole.text[whole.text.rindex(answer) + len(answer) :]
        except (TemplateError, ValueError):  # of use for answers all the same; training says what is wrong
            after = ""
        if found := _pattern(tokenizer.control).search(after):
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
        _check_prompt(messages)
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
        with _explained(self._place):
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
        with _explained(self._place):
            written = self._template.render([*calls, (turns, False)], tools=tools)
        whole = written.pop()
        open_answers = [self._answer(prompt, said) for prompt, said in zip(written[::2], written[1::2], strict=True)]
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
        begin = len(prompt.text) if follows else 0
        if whole.spans and whole.spans[-1][1] > begin:
            begin = max(begin, whole.spans[-1][0])
        elif not follows:
            raise InputError(
                "The chat template writes an answer in another way than it asks for one, so what is to be learnt cannot be told: give a "
                "template with the tag `generation` around answers, or name another chat format."
            )
        if (end := self._ends.search(whole.text, begin)) is None:
            raise InputError(
                "The chat template ends an answer with no control token, so that a model would not learn to stop: name another chat format."
            )
        return _Answer(begin, end.end(), whole, cuts=(len(prompt.text), begin) if follows else (begin,))


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
def _explained(place: str) -> Iterator[None]:
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


def _check_prompt(messages: Sequence[Message]) -> None:
    if messages and messages[-1].role == "assistant":
        raise InputError("The conversation already ends with the assistant: remove that turn to generate a new one.")


def check_turns(messages: Sequence[Message]) -> None:
    """Raise `InputError` unless turns alternate user, assistant, ... after an optional system turn.

    An assistant that calls tools may be followed by their answers, and goes on after them.
    """
    turns = list(messages)
    if turns and turns[0].role == "system":
        turns = turns[1:]
    if not turns:
        raise InputError("The conversation has no user turn: start with a message whose role is 'user'.")
    expected = "user"
    for i, message in enumerate(turns):
        if message.role == "tool" and i > 0 and (turns[i - 1].role == "tool" or '"tool_calls"' in turns[i - 1].fields):
            expected = "assistant"
            continue
        if message.role != expected:
            raise InputError(
                f"Turn {i + 1} of the conversation has role {message.role!r} where {expected!r} is due: "
                "turns must alternate, starting with the user."
            )
        expected = "assistant" if expected == "user" else "user"


def conversation(turns: Sequence[Mapping[str, Any]] | Sequence[Message], *, tools: bool = False) -> Conversation:
    """Messages from dicts with `role` and `content` (or from messages, unchanged).

    `weight: 0`, `train: false` or `training: false` marks an answer as context that is not trained.

    Args:
        tools: take calls of tools, their answers and thoughts (`reasoning_content`), which only a chat template can say.

    Raises:
        InputError: a turn lacks a field, has an unknown role, calls a tool, or its content is not text.
    """
    out = []
    for turn in turns:
        if isinstance(turn, Message):
            out.append(turn)
            continue
        fields = template_fields(turn) if tools and isinstance(turn, Mapping) else ""
        if fields and turn.get("content") is None:
            turn = {**turn, "content": ""}
        if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
            raise InputError(f"A message must have 'role' and 'content', got {turn!r:.200}.")
        roles = get_args(Role) if tools else SPOKEN
        if turn["role"] not in roles or not isinstance(turn["content"], str):
            raise InputError(f"A message needs a role of {roles} and text as content, got {turn!r:.200}.")
        unsaid = ("function_call", "audio") if tools else ("tool_calls", "function_call", "tool_call_id", "audio")
        if name := next((name for name in unsaid if turn.get(name)), None):
            raise InputError(f"A message has {name!r}, which the chat formats cannot say: write it as text, or leave the message out.")
        if SURROGATE.search(turn["content"]):
            raise InputError(f"A message of the {turn['role']} holds half of a surrogate pair, which is no text: mend or remove it.")
        weights = [turn[name] for name in ("weight", "train", "training") if turn.get(name) is not None]
        if any(weight not in (0, 1) for weight in weights):  # which are False and True, too
            raise InputError(f"A message has the weight {weights[0]!r}: give 1 to train on an answer, or 0 not to.")
        out.append(Message(cast(Role, turn["role"]), turn["content"], turn["role"] != "assistant" or all(weights), fields))
    return tuple(out)


def template_fields(turn: Mapping[str, Any]) -> str:
    """JSON of what only a chat template can say of a turn: calls of tools, whose call an answer belongs to, thoughts; "" for none of them.

    Arguments of a call that are written as JSON become what they say, as templates want them.

    Raises:
        InputError: a call is of no known form.
    """
    fields: dict[str, Any] = {}
    thoughts = (turn[name] for name in ("reasoning_content", "thinking", "reasoning") if turn.get(name) and isinstance(turn[name], str))
    if turn.get("role") == "assistant" and (thought := next(thoughts, "")):
        fields["reasoning_content"] = thought
    if calls := turn.get("tool_calls"):
        fields["tool_calls"] = [_tool_call(call) for call in (calls if isinstance(calls, list | tuple) else [calls])]
    if turn.get("role") == "tool":
        fields |= {name: turn[name] for name in ("tool_call_id", "name") if isinstance(turn.get(name), str)}
    if fields and turn.get("content") is None:
        fields["content"] = None
    try:
        text = json.dumps(fields, ensure_ascii=False) if fields else ""
    except (TypeError, ValueError, RecursionError) as e:
        raise InputError(f"A call of a tool holds what is no JSON ({e}): correct it.") from None
    if SURROGATE.search(text):
        raise InputError("A call of a tool holds half of a surrogate pair, which is no text: mend or remove it.")
    return text


def _tool_call(call: Any) -> dict[str, Any]:
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise InputError("A call of a tool needs a `function` with its `name` and `arguments`.")
    arguments = inner.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise InputError(f"The arguments of the call of {inner['name'][:80]!r} are no JSON: correct them.") from None
    function = {k: v for k, v in inner.items() if v is not None} | {"arguments": arguments}
    return {k: v for k, v in call.items() if v is not None} | {"function": function} if inner is not call else function


def to_dicts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The plain form of a conversation, as in JSONL files and the OpenAI API: with a `weight` only where it is 0."""
    return [
        {"role": m.role, "content": m.content} | (json.loads(m.fields) if m.fields else {}) | ({} if m.trained else {"weight": 0})
        for m in messages
    ]


def matching_formats(tokenizer: Tokenizer) -> list[TokenFormat]:
    """The formats whose control tokens the tokenizer has."""
    return [f for f in FORMATS.values() if all(tokenizer.has(t) for t in f.special_tokens)]


def guess_format(tokenizer: Tokenizer) -> ChatFormat:
    """The chat format of a model folder: its own template, or, if it has none, the format whose control tokens the tokenizer has.

    A template that writes every conversation of a set as one of `FORMATS` does is rendered as that one, which is faster.

    Raises:
        InputError: the template cannot be used, or there is none and not exactly one format fits.
    """
    fits = matching_formats(tokenizer)
    if tokenizer.chat_templates:
        for known in fits:
            if tokenizer.cuts_headers and tokenizer.chat_templates == {"default": known.template}:
                return known
        with _explained(tokenizer.place):
            template = ChatTemplate(tokenizer.chat_templates, tokenizer)
        own = TemplateFormat(template, tokenizer)
        return next((known for known in fits if _writes_as(own, known, tokenizer)), own)
    if len(fits) != 1:
        names = ", ".join(f.name for f in fits) or "none"
        raise InputError(
            f"Cannot tell the chat format from the tokenizer ({names} fit), and the model folder brings no chat template: name one of "
            f"{', '.join(FORMATS)}; or `plain`, which needs no tokens of its own; or give the model tokens, by `gristmill init "
            "--add-chat-tokens` or `gristmill add-chat-tokens`."
        )
    return fits[0]


def find_format(name: str, tokenizer: Tokenizer) -> ChatFormat:
    """A chat format by name, or the model folder's own for `auto`."""
    if name == "auto":
        return guess_format(tokenizer)
    if name == "plain":
        return TemplateFormat(ChatTemplate({"default": PLAIN}, tokenizer.with_chat_template(PLAIN)), tokenizer, name)
    if name not in FORMATS:
        raise InputError(f"Unknown chat format {name!r}: choose auto, plain or one of {', '.join(FORMATS)}.")
    return FORMATS[name]


def with_template_of(chat_format: ChatFormat, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with the chat template of the format that a model is trained in: unchanged where that is the folder's own."""
    if isinstance(chat_format, TokenFormat):
        if tokenizer.chat_templates and guess_format(tokenizer) is chat_format:
            return tokenizer
        return tokenizer.with_chat_template(chat_format.template, cut=True)
    return tokenizer.with_chat_template(PLAIN) if chat_format.name == "plain" else tokenizer


def _writes_as(own: TemplateFormat, known: TokenFormat, tokenizer: Tokenizer) -> bool:
    """Whether a template gives the ids of a known format, for every conversation of a set, and has nothing that the format has not."""
    if own.variables - {"messages", "add_generation_prompt", "tools", *tokenizer.token_names}:
        return False
    turns = [Message("user", "A mill"), Message("assistant", "Yes")]
    if "tools" in own.variables:
        try:
            if own.render_turns(turns[:1], tokenizer, tools=[TRIAL_TOOL]) != own.render_turns(turns[:1], tokenizer):
                return False
        except InputError:  # it refuses them, too
            pass
    try:
        for system in (None, "Be kind.", " s\n"):
            for text in TRIAL_TEXTS:
                talk = [*([] if system is None else [Message("system", system)]), *turns, Message("user", text)]
                said = [*talk, Message("assistant", text)]
                if own.render_prompt(talk, tokenizer) != known.render_prompt(talk, tokenizer):
                    return False
                if own.render(said, tokenizer) != known.render(said, tokenizer):
                    return False
    except InputError:
        return False
    return True
