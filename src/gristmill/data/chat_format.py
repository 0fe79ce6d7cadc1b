"""Chat formats: the one function that renders conversations to token ids and loss mask, and the formats that go token by token.

Training, reward scoring, the inference engine and the server all call `ChatFormat.render` or `render_prompt`. A `TokenFormat` builds the
ids token by token, every piece of text tokenized on its own; a `TemplateFormat` (`template_format.py`) renders the Jinja template that a
model folder brings. Of both the prompt's ids are always a prefix of the training ids, and text can never produce a control token.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gristmill.core.errors import InputError
from gristmill.data.chat import SPOKEN, Message, check_turns
from gristmill.data.thinking import OPEN, with_toggle
from gristmill.data.tokenizer import Tokenizer

SWITCHES = ("enable_thinking", "thinking")  # of thinking, by their names in published chat templates


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

    def fits(self, messages: Sequence[Message], tokenizer: Tokenizer, max_tokens: int) -> bool:
        """Whether a conversation has at most `max_tokens` tokens.

        Raises:
            InputError: as `render`.
        """
        return len(self.render(messages, tokenizer).ids) <= max_tokens

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

    def fits(self, messages: Sequence[Message], tokenizer: Tokenizer, max_tokens: int) -> bool:
        check_turns(messages)
        self._check_plain(messages, ())
        around = max(len("".join(header)) for header in self.headers.values()) + len(self.close + self.end + self.after)
        # a token has a character at least; the first turn may be an empty system's
        most = len(self.bos) + around * (len(messages) + 1) + sum(tokenizer.max_tokens(message.content) for message in messages)
        if most <= max_tokens and all(map(tokenizer.has, self.special_tokens)):
            return True
        return super(TokenFormat, self).fits(messages, tokenizer, max_tokens)  # named, since a class with slots is made anew

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
        check_prompt(messages)
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
        messages = self._switched(messages, tokenizer, variables or {})
        if not messages:
            raise InputError("The conversation has no user turn: start with a message whose role is 'user'.")
        out = self._render(messages, tokenizer, last_open=continue_final_message)
        if add_generation_prompt and not continue_final_message:
            if self.after:
                self._text(out, tokenizer.encode_turn(self.after, "")[0])
            self._turn(out, "assistant", "", tokenizer)
        return out.ids

    def _switched(self, messages: Sequence[Message], tokenizer: Tokenizer, variables: Mapping[str, Any]) -> Sequence[Message]:
        """The conversation with the toggle's line of a model that thinks, where `enable_thinking` says which."""
        for name, value in variables.items():
            if name not in SWITCHES or not tokenizer.has(OPEN):  # none that was trained with the toggle
                raise InputError(f"The chat format {self.name} has no {name!r}: leave it out.")
            if not isinstance(value, bool):
                raise InputError(f"{name} must be true or false.")
            messages = with_toggle(messages, "on" if value else "off")
        return messages

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


def check_prompt(messages: Sequence[Message]) -> None:
    """Raise `InputError` where a conversation ends with an answer, so that none is due."""
    if messages and messages[-1].role == "assistant":
        raise InputError("The conversation already ends with the assistant: remove that turn to generate a new one.")
