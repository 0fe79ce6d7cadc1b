"""Requests to a model whose folder brings its own chat template: tools, thoughts and the template's variables."""

import asyncio
import json
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from gristmill.core.errors import InputError
from gristmill.data.chat_format import FORMATS
from gristmill.data.find_format import find_format
from gristmill.data.template_format import TemplateFormat
from gristmill.data.tokenizer import Tokenizer
from gristmill.engine.engine import Engine
from gristmill.model.config import ModelConfig, uniform_blocks
from gristmill.model.transformer import Transformer
from gristmill.server.app import Server
from gristmill.server.protocol import ChatCompletionRequest, FieldError, TemplateChatRequest, parse_body

TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.reasoning_content is string %}{{ '<think>' + message.reasoning_content + '</think>' }}{% endif %}"
    "{% if message.content is string %}{{ message.content }}{% endif %}"
    "{% for call in message.tool_calls or () %}{{ call.function.name + ' ' + call.function.arguments | tojson }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "mill", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "mill", "arguments": '{"sacks":  12}'}}
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "Grind <|im_end|>."},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "It asks."},
    {"role": "tool", "content": [{"type": "text", "text": "done"}], "tool_call_id": "c1"},
]


def server_of(name: str) -> Server:
    tokenizer = Tokenizer.train(["hello"] * 3, 300, FORMATS["chatml"].special_tokens)
    tokenizer.chat_templates = {"default": TEMPLATE}
    blocks = uniform_blocks(num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, ffn_size=32)
    model = Transformer(ModelConfig("nemotron", tokenizer.vocab_size, 16, blocks, max_positions=512))
    return Server(Engine(model, tokenizer, find_format(name, tokenizer), name="m"))


@pytest.fixture(scope="module")
def own() -> Server:
    return server_of("auto")


def prompt(server: Server, **fields: Any) -> str:
    body = parse_body(json.dumps({"messages": TALK[:1]} | fields).encode(), TemplateChatRequest)
    return server.engine.tokenizer.decode(server._render(body)[1], keep_special=True)


def test_tools_calls_answers_and_thoughts_are_written_by_the_template(own: Server) -> None:
    assert isinstance(own.engine.chat_format, TemplateFormat)
    text = prompt(own, messages=TALK, tools=[TOOL])
    assert text == (
        f"<|im_start|>system\n{json.dumps([TOOL])}<|im_end|>\n<|im_start|>user\nGrind <|im_end|>.<|im_end|>\n"
        '<|im_start|>assistant\n<think>It asks.</think>mill {"sacks": 12}<|im_end|>\n<|im_start|>tool\ndone<|im_end|>\n'
        "<|im_start|>assistant\n"
    )
    assert prompt(own, tools=[TOOL], tool_choice="none") == prompt(own) == prompt(own, tools=[], tool_choice="auto")


def test_variables_of_the_template(own: Server) -> None:
    assert (
        prompt(own, chat_template_kwargs={"enable_thinking": False})
        == prompt(own) + "<think></think>"
        == prompt(own, enable_thinking=False)
    )
    assert prompt(own, chat_template_kwargs={"enable_thinking": True}) == prompt(own)
    for name in ("thinking", "messages", "add_generation_prompt", "chat_template"):
        with pytest.raises(InputError, match=f"no variable '{name}'"):
            prompt(own, chat_template_kwargs={name: []})


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": ["mill"]}, "tools"),
        ({"chat_template_kwargs": 5}, "chat_template_kwargs"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, "messages.0"),
        ({"messages": [{"role": "assistant", "tool_calls": ["f"]}]}, "messages.0"),
        ({"messages": [{"role": "tool"}]}, "messages.0.content"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "x", "audio": {"id": 1}}]}, "messages.0.audio"),
    ],
)
def test_what_cannot_be_said_is_refused_by_name(own: Server, fields: dict[str, Any], field: str) -> None:
    with pytest.raises(FieldError) as caught:
        prompt(own, **fields)
    assert caught.value.field.startswith(field)


def test_a_format_without_tools_refuses_them() -> None:
    with pytest.raises(FieldError) as caught:
        parse_body(json.dumps({"messages": TALK[:1], "tools": [TOOL]}).encode(), ChatCompletionRequest)
    assert caught.value.field == "tools"


@pytest.mark.parametrize("name", ["auto", "chatml"])
def test_the_route_takes_what_the_format_has(name: str) -> None:
    async def ask() -> list[tuple[int, dict[str, Any]]]:
        server = server_of(name)
        replies = []
        async with TestClient(TestServer(server.app())) as client:
            for fields in (
                {},
                {"tools": [TOOL]},
                {"messages": TALK},
                {"enable_thinking": False},
                {"messages": [{"role": "user", "content": ""}] * 2},
            ):
                reply = await client.post("/v1/chat/completions", json={"model": "m", "messages": TALK[:1], "max_tokens": 2} | fields)
                replies.append((reply.status, await reply.json()))
        return replies

    found = asyncio.run(ask())
    assert [status for status, _ in found] == [200, *([200] * 3 if name == "auto" else [400] * 3), 200]
    used = [reply["usage"]["prompt_tokens"] if status == 200 else 0 for status, reply in found]
    assert name != "auto" or used[0] < used[3] < used[1] < used[2] + 100


def test_a_message_with_a_prefix_goes_on_and_other_routes_say_what_there_is(own: Server) -> None:
    begun = [*TALK[:1], {"role": "assistant", "content": "It is"}]
    assert prompt(own, messages=[*begun[:1], begun[1] | {"prefix": True}]) == prompt(own, messages=begun, continue_final_message=True)
    assert prompt(own, messages=[*begun[:1], begun[1] | {"prefix": False}]) == prompt(own, messages=begun)

    async def ask() -> list[tuple[int, dict[str, Any]]]:
        found = []
        async with TestClient(TestServer(own.app())) as client:
            for reply in (
                await client.get("/v1/models/m"),
                await client.get("/v1/models/a/b"),
                await client.post("/v1/embeddings", json={"model": "m", "input": "x"}),
            ):
                found.append((reply.status, await reply.json()))
            metrics = await (await client.get("/metrics")).text()
        assert "/v1/models/{name" in metrics and "a/b" not in metrics  # one label whatever is asked
        return found

    (model, unknown, embeddings) = asyncio.run(ask())
    assert model[0] == 200 and model[1]["id"] == "m"
    assert unknown[0] == 404 and unknown[1]["error"]["code"] == "model_not_found"
    assert embeddings[0] == 404 and "makes no embeddings" in embeddings[1]["error"]["message"]
