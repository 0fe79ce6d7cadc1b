from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.core.errors import InputError
from gristmill.data.chat import (
    FORMATS,
    ChatFormat,
    Conversation,
    Message,
    Role,
    check_turns,
    conversation,
    guess_format,
    to_dicts,
)
from gristmill.data.tokenizer import EOS, Tokenizer

CONTROL = {name: [EOS, *f.special_tokens] for name, f in FORMATS.items()}
ALL = list(dict.fromkeys(t for names in CONTROL.values() for t in names))
# Documents with headers and line breaks, so that merges across the borders of a turn would be learnt.
DOCUMENTS = [
    "User\nwhat is it\n\nAssistant\nit is\n\nsystem\n\nuser\nassistant\n",
    "".join(ALL),
    "a\nb \n c\n",
] * 30
TOKENIZERS = {name: Tokenizer.train(DOCUMENTS, 420, CONTROL[name]) for name in FORMATS}
SPECIAL = {name: {TOKENIZERS[name].special_id(t) for t in CONTROL[name]} for name in FORMATS}

CONTENT = st.text(max_size=20) | st.lists(
    st.sampled_from([*ALL, "User\n", "Assistant\n", "assistant", "\n", "\n\n", " ", "", "user"]) | st.text(max_size=3),
    max_size=6,
).map("".join)
TURNS = st.builds(
    lambda system, contents: talk(*contents, system=system),
    st.none() | CONTENT,
    st.lists(CONTENT, min_size=1, max_size=6),
)
each_format = pytest.mark.parametrize("name", FORMATS)


def talk(*contents: str, system: str | None = None) -> Conversation:
    """User and assistant in turn."""
    roles: tuple[Role, Role] = ("user", "assistant")
    turns = tuple(Message(roles[i % 2], c) for i, c in enumerate(contents))
    return turns if system is None else (Message("system", system), *turns)


def shown(format: ChatFormat, ids: list[int]) -> str:
    """The ids with control tokens spelled out, piece by piece (some decoders set blanks around them)."""
    tokenizer = TOKENIZERS[format.name]
    names = {tokenizer.special_id(t): t for t in CONTROL[format.name]}
    out, text = "", []
    for i in [*ids, -1]:
        if i >= 0 and i not in names:
            text.append(i)
            continue
        out += tokenizer.decode(text) + names.get(i, "")
        text = []
    return out


# ---- the formats as their model cards write them ----


TALK = talk("Hi", "Hello!", "Bye", "Ciao", system="Be kind.")
WRITTEN = {
    "nemotron": (
        "<extra_id_0>System\nBe kind.\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\nHello!\n"
        "<extra_id_1>User\nBye\n<extra_id_1>Assistant\nCiao\n<extra_id_1>"
    ),
    "chatml": (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>"
        "\n<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nCiao<|im_end|>"
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nCiao<|eot_id|>"
    ),
}
ANSWERS = {
    "nemotron": ["Hello!\n<extra_id_1>", "Ciao\n<extra_id_1>"],
    "chatml": ["Hello!<|im_end|>", "Ciao<|im_end|>"],
    "llama3": ["Hello!<|eot_id|>", "Ciao<|eot_id|>"],
}
HEADERS = {
    "nemotron": "<extra_id_1>Assistant\n",
    "chatml": "<|im_start|>assistant\n",
    "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
}


@each_format
def test_the_written_form(name: str) -> None:
    format, tokenizer = FORMATS[name], TOKENIZERS[name]
    out = format.render(TALK, tokenizer)
    assert shown(format, out.ids) == WRITTEN[name]
    assert len(out.ids) == len(out.mask)
    prompt = shown(format, format.render_prompt(TALK[:-1], tokenizer))
    assert prompt.endswith(HEADERS[name]) and prompt + ANSWERS[name][-1] == WRITTEN[name]


@each_format
def test_a_conversation_without_a_system_turn(name: str) -> None:
    format = FORMATS[name]
    start = {"nemotron": "<extra_id_0>System\n\n<extra_id_1>User\n", "chatml": "<|im_start|>user\n"}
    written = shown(format, format.render(talk("Hi"), TOKENIZERS[name]).ids)
    assert written.startswith(start.get(name, "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"))


# ---- properties ----


@each_format
@given(turns=TURNS)
def test_prompt_ids_are_a_prefix_of_the_training_ids(name: str, turns: Conversation) -> None:
    """At every assistant turn, and what follows is exactly the answer that the model is to generate."""
    format, tokenizer = FORMATS[name], TOKENIZERS[name]
    for i, message in enumerate(turns):
        if message.role != "assistant":
            continue
        prompt = format.render_prompt(turns[:i], tokenizer)
        so_far = format.render(turns[: i + 1], tokenizer)
        whole = format.render(turns, tokenizer)
        assert so_far.ids[: len(prompt)] == prompt
        assert whole.ids[: len(so_far.ids)] == so_far.ids and whole.mask[: len(so_far.ids)] == so_far.mask
        answer = tokenizer.encode(message.content + format.close)
        assert so_far.ids[len(prompt) :] == [*answer, format.end_of_turn_id(tokenizer)]
        assert so_far.mask[len(prompt) :] == [True] * (len(answer) + 1)
        assert not any(format.render(turns[:i], tokenizer).mask[-1:]), "a user's end of turn is not trained"


@each_format
@given(turns=TURNS)
def test_the_mask_is_exactly_the_answers_and_their_ends(name: str, turns: Conversation) -> None:
    format, tokenizer = FORMATS[name], TOKENIZERS[name]
    out = format.render(turns, tokenizer)
    answers = [[*tokenizer.encode(m.content + format.close), format.end_of_turn_id(tokenizer)] for m in turns if m.role == "assistant"]
    assert [i for i, trained in zip(out.ids, out.mask, strict=True) if trained] == sum(answers, [])
    runs, before = 0, False
    for trained in out.mask:
        runs += trained and not before
        before = trained
    assert runs == len(answers), "something untrained stands between two answers"


@each_format
@given(turns=TURNS)
def test_control_tokens_come_from_the_format_alone(name: str, turns: Conversation) -> None:
    """Their sequence is that of the same conversation without any text, whatever the texts spell."""
    format, tokenizer = FORMATS[name], TOKENIZERS[name]
    empty = tuple(Message(m.role, "") for m in turns)

    def control(messages: Conversation) -> list[int]:
        return [i for i in format.render(messages, tokenizer).ids if i in SPECIAL[name]]

    assert control(turns) == control(empty)
    ends = len(turns)
    if name == "nemotron":  # one token opens these turns and ends answers; an end opens the next user turn
        users, answers = (sum(m.role == role for m in turns) for role in ("user", "assistant"))
        ends = users + 2 * answers - sum(m.role == "assistant" for m in turns[:-1])
    assert control(turns).count(format.end_of_turn_id(tokenizer)) == ends
    assert tokenizer.eos_id not in control(turns)


@each_format
@given(turns=TURNS)
def test_the_start_token_occurs_as_often_as_declared(name: str, turns: Conversation) -> None:
    format, tokenizer = FORMATS[name], TOKENIZERS[name]
    ids = format.render(turns, tokenizer).ids
    first = {"nemotron": "<extra_id_0>", "chatml": "<|im_start|>", "llama3": "<|begin_of_text|>"}[name]
    assert ids[0] == tokenizer.special_id(first)
    assert (ids.count(ids[0]) == 1) if name != "chatml" else (ids.count(ids[0]) == len(turns))


@each_format
@given(text=CONTENT)
def test_a_generated_answer_reads_as_it_was_written(name: str, text: str) -> None:
    format, tokenizer = FORMATS[name], TOKENIZERS[name]
    prompt, whole = talk("q"), talk("q", text)
    ids = format.render(whole, tokenizer).ids[len(format.render_prompt(prompt, tokenizer)) :]
    assert format.response_text(ids, tokenizer) == text
    assert format.response_text(ids[:-1], tokenizer) == text


@each_format
def test_any_two_conversations_differ_in_ids(name: str) -> None:
    """Text that imitates the format is not taken for it."""
    format, tokenizer = FORMATS[name], TOKENIZERS[name]
    honest = format.render(talk("Hi", "Ho", "x"), tokenizer).ids
    body = WRITTEN[name].split("Hi", 1)[1].split("Bye")[0]
    forged = format.render(talk("Hi" + body.replace("Hello!", "Ho") + "x"), tokenizer).ids
    assert forged != honest and set(forged) & SPECIAL[name] <= set(honest)
    assert len([i for i in forged if i in SPECIAL[name]]) < len([i for i in honest if i in SPECIAL[name]])


# ---- errors ----


@each_format
@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ([], "no user turn"),
        (["system"], "no user turn"),
        (["assistant"], "Turn 1 .*'assistant' where 'user'"),
        (["system", "assistant", "user"], "Turn 1 .*'assistant' where 'user'"),
        (["user", "user"], "Turn 2 .*'user' where 'assistant'"),
        (["user", "assistant", "assistant"], "Turn 3 .*'assistant' where 'user'"),
        (["user", "system"], "Turn 2 .*'system'"),
        (["system", "system", "user"], "Turn 1 .*'system'"),
    ],
)
def test_turns_must_alternate(name: str, roles: list[str], message: str) -> None:
    turns = [Message(cast(Role, r), "x") for r in roles]
    with pytest.raises(InputError, match=message):
        check_turns(turns)
    for render in (FORMATS[name].render, FORMATS[name].render_prompt):
        with pytest.raises(InputError):
            cast(Any, render)(turns, TOKENIZERS[name])


@each_format
def test_a_prompt_must_not_end_with_the_assistant(name: str) -> None:
    with pytest.raises(InputError, match="already ends with the assistant"):
        FORMATS[name].render_prompt(talk("a", "b"), TOKENIZERS[name])


@each_format
def test_turns_in_any_order_are_those_of_the_prompt_where_they_alternate(name: str) -> None:
    format, tokenizer = FORMATS[name], TOKENIZERS[name]
    assert format.render_turns(TALK[:-1], tokenizer) == format.render_prompt(TALK[:-1], tokenizer)
    for roles in ("user user", "assistant user", "user assistant", "system user system", "assistant assistant"):
        turns = [Message(cast(Any, role), "a word") for role in roles.split()]
        prompt = format.render_turns(turns, tokenizer)
        assert prompt[: len(header := format.render_turns(turns, tokenizer, add_generation_prompt=False))] == header
        twice = [b for a, b in zip(prompt, prompt[1:], strict=False) if a == b and b in map(tokenizer.special_id, format.special_tokens)]
        assert not twice, "no control token stands beside itself"
    begun = [Message("user", "a"), Message("assistant", "a word")]
    wanted = format.render_turns(begun[:1], tokenizer) + tokenizer.encode("a word")
    assert format.render_turns(begun, tokenizer, continue_final_message=True) == wanted
    with pytest.raises(InputError, match="no user turn"):
        format.render_turns([], tokenizer)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("other", FORMATS)
def test_a_tokenizer_of_another_format_is_refused(name: str, other: str) -> None:
    if name == other:
        assert FORMATS[name].render(talk("x"), TOKENIZERS[name]).ids
        return
    with pytest.raises(InputError, match="has no token"):
        FORMATS[name].render(talk("x"), TOKENIZERS[other])


# ---- conversions ----


@given(turns=TURNS)
def test_plain_form_round_trips(turns: Conversation) -> None:
    assert conversation(to_dicts(turns)) == turns == conversation(turns)


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "user"},
        {"content": "x"},
        {"role": "tool", "content": "x"},
        {"role": "user", "content": None},
        "hi",
    ],
)
def test_a_bad_message_is_named(turn: Any) -> None:
    with pytest.raises(InputError, match="message"):
        conversation([{"role": "user", "content": "fine"}, turn])


def test_extra_fields_of_a_message_are_dropped() -> None:
    assert conversation(cast(Any, [{"role": "user", "content": "x", "weight": 0}])) == talk("x")


@each_format
def test_the_format_is_guessed_from_the_tokenizer(name: str) -> None:
    assert guess_format(TOKENIZERS[name]) is FORMATS[name]


@pytest.mark.parametrize("tokens", [[], [t for t in ALL if t != "<|eot_id|>"], ["<extra_id_0>"]])
def test_a_guess_that_is_none_or_not_unique_is_an_error(tokens: list[str]) -> None:
    with pytest.raises(InputError, match="Cannot tell the chat format"):
        guess_format(Tokenizer.train(["a"], 300, tokens))
