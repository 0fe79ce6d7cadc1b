"""Chat formats: conversations, and the one function that renders them to token ids and loss mask.

Training, reward scoring, the inference engine and the server all call `ChatFormat.render` or `render_prompt`, which build the ids
token by token: every piece of text is tokenized on its own, so the prompt's ids are always a prefix of the training ids, and
text can never produce a control token.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from gristmill.core.errors import InputError
from gristmill.data.tokenizer import SURROGATE, Tokenizer

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        trained: false for an answer that is context, on which no loss is taken (`weight: 0` in files).
    """

    role: Role
    content: str
    trained: bool = field(default=True, repr=False)


Conversation = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Rendered:
    """Token ids of a conversation and which of them are trained (assistant text and its end of turn)."""

    ids: list[int]
    mask: list[bool]


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """Chat format: how a conversation is written in tokens.

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

    def render(self, messages: Sequence[Message], tokenizer: Tokenizer) -> Rendered:
        """Render a whole conversation to ids and loss mask.

        The mask is true exactly on assistant text and the end of each assistant turn, but for turns that are not `trained`.
        Source: Nemotron-4 340B report, section 3.3 (loss on assistant turns only); format: its model card.

        Raises:
            InputError: the conversation is empty, starts with the assistant, or two turns in a row have the same role.
        """
        check_turns(messages)
        return self._render(messages, tokenizer)

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
                self._turn(out, message.role, message.content, tokenizer)
                break
            self._turn(out, message.role, message.content + self.close, tokenizer, trained=trained)
            if answer or not self.end_opens_next:
                self._token(out, self.end, tokenizer, trained=trained)
            if self.after and i + 1 < len(messages):
                self._text(out, tokenizer.encode_turn(self.after, "")[0])
        return out

    def render_prompt(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        """Render a prompt: ids up to and including the header of the assistant turn that is to be generated.

        Raises:
            InputError: as `render`, or the last turn is the assistant's.
        """
        if messages and messages[-1].role == "assistant":
            raise InputError("The conversation already ends with the assistant: remove that turn to generate a new one.")
        out = self.render(messages, tokenizer)
        if self.after:
            self._text(out, tokenizer.encode_turn(self.after, "")[0])
        self._turn(out, "assistant", "", tokenizer)
        return out.ids

    def render_turns(
        self, messages: Sequence[Message], tokenizer: Tokenizer, *, add_generation_prompt: bool = True, continue_final_message: bool = False
    ) -> list[int]:
        """Render a prompt of turns in any order, as a server is sent them; the names of the switches are Hugging Face's.

        Args:
            add_generation_prompt: end with the header of a new assistant turn.
            continue_final_message: leave the last turn open instead, so that its text goes on.

        Raises:
            InputError: there are no turns.
        """
        if not messages:
            raise InputError("The conversation has no user turn: start with a message whose role is 'user'.")
        out = self._render(messages, tokenizer, last_open=continue_final_message)
        if add_generation_prompt and not continue_final_message:
            if self.after:
                self._text(out, tokenizer.encode_turn(self.after, "")[0])
            self._turn(out, "assistant", "", tokenizer)
        return out.ids

    def response_text(self, ids: Sequence[int], tokenizer: Tokenizer, *, continued: bool = False) -> str:
        """Text of a generated answer: without the end-of-turn token and the line break that the format puts before it."""
        return tokenizer.decode(ids, continued=continued).removesuffix(self.close)

    def end_of_turn_id(self, tokenizer: Tokenizer) -> int:
        """Id of the token that ends an assistant turn."""
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


FORMATS: dict[str, ChatFormat] = {
    "nemotron": ChatFormat(
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
    "chatml": ChatFormat(
        name="chatml",
        headers={role: ("<|im_start|>", f"{role}\n", "", "") for role in get_args(Role)},
        close="",
        end="<|im_end|>",
        after="\n",
    ),
    "llama3": ChatFormat(
        name="llama3",
        headers={role: ("<|start_header_id|>", role, "<|end_header_id|>", "\n\n") for role in get_args(Role)},
        close="",
        end="<|eot_id|>",
        bos="<|begin_of_text|>",
    ),
}


def check_turns(messages: Sequence[Message]) -> None:
    """Raise `InputError` unless turns alternate user, assistant, ... after an optional system turn."""
    turns = list(messages)
    if turns and turns[0].role == "system":
        turns = turns[1:]
    if not turns:
        raise InputError("The conversation has no user turn: start with a message whose role is 'user'.")
    for i, message in enumerate(turns):
        expected = "user" if i % 2 == 0 else "assistant"
        if message.role != expected:
            raise InputError(
                f"Turn {i + 1} of the conversation has role {message.role!r} where {expected!r} is due: "
                "turns must alternate, starting with the user."
            )


def conversation(turns: Sequence[Mapping[str, Any]] | Sequence[Message]) -> Conversation:
    """Messages from dicts with `role` and `content` (or from messages, unchanged).

    `weight: 0`, `train: false` or `training: false` marks an answer as context that is not trained.

    Raises:
        InputError: a turn lacks a field, has an unknown role, calls a tool, or its content is not text.
    """
    out = []
    for turn in turns:
        if isinstance(turn, Message):
            out.append(turn)
            continue
        if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
            raise InputError(f"A message must have 'role' and 'content', got {turn!r:.200}.")
        if turn["role"] not in get_args(Role) or not isinstance(turn["content"], str):
            raise InputError(f"A message needs a role of {get_args(Role)} and text as content, got {turn!r:.200}.")
        if name := next((name for name in ("tool_calls", "function_call", "tool_call_id", "audio") if turn.get(name)), None):
            raise InputError(f"A message has {name!r}, which the chat formats cannot say: write it as text, or leave the message out.")
        if SURROGATE.search(turn["content"]):
            raise InputError(f"A message of the {turn['role']} holds half of a surrogate pair, which is no text: mend or remove it.")
        weights = [turn[name] for name in ("weight", "train", "training") if turn.get(name) is not None]
        if any(weight not in (0, 1) for weight in weights):  # which are False and True, too
            raise InputError(f"A message has the weight {weights[0]!r}: give 1 to train on an answer, or 0 not to.")
        out.append(Message(cast(Role, turn["role"]), turn["content"], turn["role"] != "assistant" or all(weights)))
    return tuple(out)


def to_dicts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The plain form of a conversation, as in JSONL files and the OpenAI API: with a `weight` only where it is 0."""
    return [{"role": m.role, "content": m.content} | ({} if m.trained else {"weight": 0}) for m in messages]


def matching_formats(tokenizer: Tokenizer) -> list[ChatFormat]:
    """The formats whose control tokens the tokenizer has."""
    return [f for f in FORMATS.values() if all(tokenizer.has(t) for t in f.special_tokens)]


def guess_format(tokenizer: Tokenizer) -> ChatFormat:
    """The format whose control tokens the tokenizer has.

    Raises:
        InputError: none or more than one fits.
    """
    fits = matching_formats(tokenizer)
    if len(fits) != 1:
        names = ", ".join(f.name for f in fits) or "none"
        raise InputError(f"Cannot tell the chat format from the tokenizer ({names} fit): name one of {', '.join(FORMATS)}.")
    return fits[0]


def find_format(name: str, tokenizer: Tokenizer) -> ChatFormat:
    """A chat format by name, or the one that fits the tokenizer for `auto`."""
    if name == "auto":
        return guess_format(tokenizer)
    if name not in FORMATS:
        raise InputError(f"Unknown chat format {name!r}: choose auto or one of {', '.join(FORMATS)}.")
    return FORMATS[name]
