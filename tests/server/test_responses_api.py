"""Responses API: items in and out, whole and as events, by the raw protocol."""

import asyncio
import json
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from gristmill.core.errors import InputError
from gristmill.data.chat_format import FORMATS
from gristmill.data.find_format import find_format
from gristmill.data.tokenizer import Tokenizer
from gristmill.engine.engine import Engine
from gristmill.model.config import ModelConfig, uniform_blocks
from gristmill.model.transformer import Transformer
from gristmill.server.app import Server
from gristmill.server.responses_api import to_messages

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.content %}{{ m.content }}{% endif %}{% for c in m.tool_calls or () %}"
    '{{ \'\n<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' }}{{ c.function.arguments | tojson }}'
    "{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SCHEMA = {"type": "object", "properties": {"sacks": {"enum": [1, 2]}}, "required": ["sacks"], "additionalProperties": False}
TOOL = {"type": "function", "name": "mill", "parameters": SCHEMA, "strict": True, "description": None}


def engine_of(*, tools: bool = True) -> Engine:
    tokenizer = Tokenizer.train(["hello"] * 3, 300, FORMATS["chatml"].special_tokens)
    tokenizer.chat_templates = {"default": TEMPLATE}
    blocks = uniform_blocks(num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, ffn_size=32)
    model = Transformer(ModelConfig("nemotron", tokenizer.vocab_size, 16, blocks, max_positions=2048))
    return Engine(model, tokenizer, find_format("auto" if tools else "chatml", tokenizer), name="m")


def ask(engine: Engine, *bodies: dict[str, Any], reasoning: str = "") -> list[Any]:
    """Responses, and of streams their events, whose names and numbers are looked at here."""

    async def post() -> list[Any]:
        found: list[Any] = []
        async with TestClient(TestServer(Server(engine, reasoning_parser=reasoning).app())) as client:
            for body in bodies:
                reply = await client.post("/v1/responses", json={"model": "m", "input": "Hi", "max_output_tokens": 12, "seed": 1} | body)
                if not body.get("stream") or reply.status != 200:
                    found.append(await reply.json() | {"http": reply.status})
                    continue
                events = [part.split("\n") for part in (await reply.text()).split("\n\n") if part]
                read = [json.loads(data.removeprefix("data: ")) for _, data in events]
                assert [name.removeprefix("event: ") for name, _ in events] == [event["type"] for event in read]
                assert [event["sequence_number"] for event in read] == list(range(len(read)))
                found.append(read)
        return found

    return asyncio.run(post())


ENGINE = engine_of()


def test_a_text_whole_and_streamed() -> None:
    whole, events = ask(ENGINE, {}, {"stream": True})
    (item,) = whole["output"]
    assert (whole["object"], whole["status"], whole["incomplete_details"]) == ("response", "incomplete", {"reason": "max_output_tokens"})
    assert whole["usage"]["output_tokens"] == 12 and whole["usage"]["total_tokens"] == 12 + whole["usage"]["input_tokens"]
    assert item["type"] == "message" and item["status"] == "incomplete" and item["id"].startswith("msg_")
    kinds = [event["type"].removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert deltas > 2 and kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * deltas,
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    text = "".join(event["delta"] for event in events if event["type"].endswith("delta"))
    assert text == events[-4]["text"] == item["content"][0]["text"] == events[-1]["response"]["output"][0]["content"][0]["text"]
    assert events[-1]["response"]["usage"] == whole["usage"]


def test_a_function_whole_and_streamed_and_its_output_sent_back() -> None:
    call = {"tools": [TOOL], "tool_choice": {"type": "function", "name": "mill"}, "max_output_tokens": 300}
    whole, events = ask(ENGINE, call, call | {"stream": True})
    (item,) = whole["output"]
    assert whole["status"] == "completed" and item["type"] == "function_call" and item["status"] == "completed"
    assert item["name"] == "mill" and json.loads(item["arguments"])["sacks"] in (1, 2) and item["call_id"].startswith("call_")
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:3] == ["created", "in_progress", "output_item.added"] and kinds[-3:] == [
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    told = "".join(event["delta"] for event in events if event["type"].endswith("arguments.delta"))
    assert told == events[-3]["arguments"] == events[-1]["response"]["output"][0]["arguments"] == item["arguments"]
    again = [{"role": "user", "content": "Hi"}, item, {"type": "function_call_output", "call_id": item["call_id"], "output": "done"}]
    (reply,) = ask(ENGINE, {"input": again, "tools": [TOOL]})
    assert reply["http"] == 200 and reply["usage"]["input_tokens"] > whole["usage"]["input_tokens"]


def test_thinking_is_an_item() -> None:
    (whole,) = ask(ENGINE, {}, reasoning="qwen3")
    assert [item["type"] for item in whole["output"]] == ["reasoning"]
    assert whole["output"][0]["content"][0]["type"] == "reasoning_text" and whole["usage"]["output_tokens_details"]["reasoning_tokens"] > 0


def test_a_format_and_log_probabilities() -> None:
    shape = {"format": {"type": "json_schema", "name": "a", "strict": True, "schema": SCHEMA}, "verbosity": "medium"}
    told = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole, events = ask(ENGINE, {"text": shape, "max_output_tokens": 200} | told, {"stream": True} | told)
    part = whole["output"][0]["content"][0]
    assert json.loads(part["text"])["sacks"] in (1, 2)
    assert len(part["logprobs"]) == whole["usage"]["output_tokens"] and len(part["logprobs"][0]["top_logprobs"]) == 2
    told_of = [entry for event in events if event["type"].endswith("text.delta") for entry in event["logprobs"]]
    assert len(told_of) == len(events[-1]["response"]["output"][0]["content"][0]["logprobs"]) == 12


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "no response is stored"),
        ({"conversation": "conv_1"}, "conversation", "no response is stored"),
        ({"background": True}, "background", "does not implement"),
        ({"truncation": "auto"}, "truncation", "does not implement"),
        ({"include": ["file_search_call.results"]}, "include", "not implemented"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort", "does not implement"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "does not implement"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "only functions"),
        ({"tools": [{"type": "function"}]}, "tools.0.name", "needs a name"),
        ({"input": []}, "input", "one at least"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0", "'item_reference'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.content", "no other"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{"}]}, "messages.0", "no JSON"),
        ({"input": ["x"]}, "input.0", "no item"),
        ({"messages": []}, "messages", "unknown field"),
    ],
)
def test_what_is_not_there_is_refused_by_its_name(fields: dict[str, Any], param: str, words: str) -> None:
    (reply,) = ask(ENGINE, fields)
    assert reply["http"] == 400 and reply["error"]["param"] == param and words in reply["error"]["message"], reply


def test_a_model_without_tools_answers_texts_and_refuses_tools() -> None:
    engine = engine_of(tools=False)
    plain, refused = ask(engine, {"instructions": "Be kind.", "store": False, "metadata": {}, "include": []}, {"tools": [TOOL]})
    assert plain["http"] == 200 and plain["instructions"] == "Be kind."
    assert refused["http"] == 400 and refused["error"]["param"] == "tools" and "no place for tools" in refused["error"]["message"]


def test_items_become_the_turns_that_they_were() -> None:
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "id": "fc_1", "status": "completed"}
    found = to_messages(
        [
            {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "message", "role": "assistant", "id": "msg_1", "content": [{"type": "output_text", "text": "c", "annotations": []}]},
            call,
            call | {"call_id": "d"},
            {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "1"}]},
            {"type": "function_call_output", "call_id": "d", "output": "2"},
            call,
        ],
        "Be kind.",
    )
    function = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert found == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "c", "reasoning_content": "hm", "tool_calls": [{"id": i} | function for i in ("c", "d")]},
        {"role": "tool", "tool_call_id": "c", "content": "1"},
        {"role": "tool", "tool_call_id": "d", "content": "2"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c"} | function]},
    ]
    with pytest.raises(InputError, match="input: must be a text"):
        to_messages(5, None)
