"""Bodies: null is absent, what is not implemented is refused by name, and nothing is parsed that would hold others up."""

import json
from typing import Any

import pytest

from gristmill.core.errors import InputError
from gristmill.data.chat import Message
from gristmill.server.protocol import (
    MAX_INLINE_VALUES,
    MAX_JSON_CONTAINERS,
    NEUTRAL,
    ChatCompletionRequest,
    CompletionRequest,
    FieldError,
    is_small,
    parse_body,
    parse_messages,
    parse_prompts,
)

SAID = [{"role": "user", "content": "x"}]


def chat(**fields: Any) -> ChatCompletionRequest:
    return parse_body(json.dumps({"messages": SAID} | fields).encode(), ChatCompletionRequest)


def test_priority_is_a_number_within_bounds() -> None:
    assert [chat(priority=value).priority for value in (-100, 0, 7, None)] == [-100, 0, 7, None]
    for value in (101, -101, 10**30, 0.5, "1"):
        with pytest.raises(FieldError, match="priority"):
            chat(priority=value)


def test_null_and_neutral_values_are_as_good_as_absent() -> None:
    names = [*NEUTRAL, *ChatCompletionRequest.model_fields, "prediction", "audio", "web_search_options", "never_heard_of"]
    plain = chat()
    assert chat(**{name: None for name in names if name != "messages"}) == plain
    for name, values in NEUTRAL.items():
        for value in values:
            assert chat(**{name: value}) == plain
    for name in ("user", "metadata", "service_tier", "safety_identifier"):
        assert chat(**{name: {"a": [1]}}) == plain


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"ignore_eos": True}, "ignore_eos"),
        ({"max_thinking_tokens": -1}, "max_thinking_tokens"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"guided_json": {}}, "guided_json"),
        ({"temprature": 1}, "temprature"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"echo": True}, "echo"),
        ({"stop": ["a"] * 60_000}, "stop"),
        ({"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
    ],
)
def test_what_would_change_an_answer_is_refused_by_name(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(FieldError) as caught:
        chat(**fields)
    assert caught.value.field == field and field in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"response_format": {"type": "json_object", "schema": {"const": "zz"}}}, "zz"),
        ({"response_format": {"type": "json_schema", "schema": {"const": "zz"}}}, "zz"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"const": "zz"}, "strict": None}}}, "zz"),
        ({"structured_outputs": {"json": '{"const": "zz"}', "regex": None}}, "zz"),
        ({"structured_outputs": {"json_object": True}, "response_format": {"type": "text"}}, "object"),
        ({"response_format": {"type": "json_object", "schema": None}}, "object"),
        ({"response_format": {"type": "text", "schema": {}}}, None),
        ({"response_format": {"type": "json_object", "scheme": {}}}, None),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "shape": 1}}}, None),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": True}}}, None),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, None),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, None),
        ({"structured_outputs": {"grammar": "start: a"}}, None),
    ],
)
def test_a_schema_is_obeyed_or_refused(fields: dict[str, Any], wanted: str | None) -> None:
    body = chat(**fields)
    if wanted is None:
        with pytest.raises(FieldError, match=r"response_format|structured_outputs"):
            body.to_grammar()
    else:
        assert wanted in body.to_grammar()


def test_sampling_settings_as_other_servers_take_them() -> None:
    for top_k in (None, -1, 0):
        assert chat(top_k=top_k).to_sampling_params(7, 100, top_logprobs=0, grammar="").top_k == 0
    with pytest.raises(InputError, match="top_k"):
        chat(top_k=-2).to_sampling_params(7, 100, top_logprobs=0, grammar="")
    for fields, wanted in (({}, 7), ({"max_tokens": 3}, 3), ({"max_completion_tokens": 4}, 4), ({"max_tokens": 10**20}, 100)):
        assert chat(**fields).to_sampling_params(7, 100, top_logprobs=0, grammar="").max_tokens == wanted
    assert chat(n=3, best_of=3).n == 3
    with pytest.raises(FieldError, match="logit_bias"):
        chat(logit_bias={"\u0663": 1}).to_sampling_params(7, 100, top_logprobs=0, grammar="")


def test_messages_in_any_order_with_parts_of_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    turns = [
        {"role": "assistant", "content": "hello", "refusal": None, "tool_calls": [], "annotations": []},
        {"role": "user", "content": parts, "name": "ann"},
        {"role": "user", "content": ["c"]},
        {"role": "developer", "content": ""},
    ]
    wanted = (Message("assistant", "hello"), Message("user", "a\nb"), Message("user", "c"), Message("system", ""))
    assert parse_messages(turns, 10) == wanted
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for wrong, field in (
        ({"role": "tool", "content": "x", "tool_call_id": "a"}, "messages.0.role"),
        ({"role": ["user"], "content": "x"}, "messages.0.role"),
        ({"role": "assistant", "content": "x", "tool_calls": [call]}, "messages.0.tool_calls"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages.0.content"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages.0.content"),
        ({"role": "user", "content": None}, "messages.0.content"),
        ({"role": "user"}, "messages.0.content"),
        ("x", "messages.0"),
    ):
        with pytest.raises(FieldError) as caught:
            parse_messages([wrong], 10)
        assert caught.value.field == field and len(str(caught.value)) < 300
    with pytest.raises(FieldError, match="11, more than"):
        parse_messages(SAID * 11, 10)


def test_prompts_in_every_form() -> None:
    for prompt, wanted in (("a", ["a"]), ([1, 2], [[1, 2]]), (["a", "b"], ["a", "b"]), ([[1], [2]], [[1], [2]])):
        assert parse_prompts(prompt) == wanted
    for wrong in ("", [], [""], [[]], [1, "a"], [True], [1.5], {}, None, [[1, None]]):
        with pytest.raises(FieldError):
            parse_prompts(wrong)


def filled(text: str) -> bytes:
    """A body with so many values that it is parsed step by step, around a text."""
    return b'{"prompt": [%s"%s"]}' % (b'"x",' * MAX_INLINE_VALUES, text.encode())


@pytest.mark.parametrize("raw", [b'{"prompt": ["%s"]}', filled("%s")])
def test_bodies_are_json_in_utf_8(raw: bytes) -> None:
    assert is_small(raw) == (len(raw) < 100)
    for good, text in ((b"caf\\u00e9 \xc3\xa9", "caf\u00e9 \u00e9"), (b"\\ud83d\\ude00", "\U0001f600"), (b"\\\\ud83d", "\\ud83d")):
        assert parse_body(raw.replace(b"%s", good), CompletionRequest).prompt[-1] == text
    for wrong in (b"\\ud83d", b"\\ude00\\ud83d", b"\xff", b"\xed\xa0\x80", b'"', b'", NaN, "', b'", 1e, "', b'", ' + b"9" * 5000 + b', "'):
        with pytest.raises(InputError, match="is not JSON"):
            parse_body(raw.replace(b"%s", wrong), CompletionRequest)


def test_the_field_of_a_wrong_type_is_named() -> None:
    for field, value in (("stream", "yes"), ("stream_options", 5), ("stop", 5), ("temperature", "x")):
        with pytest.raises(FieldError) as error:
            chat(**{field: value})
        assert error.value.field == field


def test_what_would_take_long_to_parse_is_refused_unparsed() -> None:
    for raw in (b"[" * 10**6, b'{"messages": [' + b"{}," * MAX_JSON_CONTAINERS + b"{}]}", b"," * 10**6, b'{"a":' * 50_000):
        with pytest.raises(InputError, match="send less"):
            parse_body(raw, ChatCompletionRequest)
    for raw in (b"[" * 20_000, b'{"a":' * 20_000):
        with pytest.raises(InputError, match="not JSON"):
            parse_body(raw, ChatCompletionRequest)
