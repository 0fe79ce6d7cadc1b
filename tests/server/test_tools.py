"""Tools: chats that call them, by the form that a model's template writes, held to their schemas."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from aiohttp.test_utils import TestClient, TestServer

from gristmill.core.errors import InputError
from gristmill.data.chat_format import FORMATS
from gristmill.data.find_format import find_format
from gristmill.data.tokenizer import Tokenizer
from gristmill.engine.engine import Engine
from gristmill.engine.load import EngineArgs
from gristmill.model.config import ModelConfig, uniform_blocks
from gristmill.model.hf_save import save_model
from gristmill.model.transformer import Transformer
from gristmill.server.app import Server
from gristmill.server.protocol import FieldError
from gristmill.server.serve import ServerArgs, serve
from gristmill.server.tool_parser import FORMS
from gristmill.server.tools import find_support, parse_tools, use_tools

BEGIN = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
END = "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
SAY = "{% if m.content %}{{ m.content }}{% endif %}"
ONE = "{% if m.tool_calls and m.tool_calls | length > 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
NINE = "{% for c in m.tool_calls or () %}{% if c.id | length != 9 %}{{ raise_exception('nine letters') }}{% endif %}{% endfor %}"
OBJECTS = '{% for c in m.tool_calls or () %}{{ \'{"name": "\' + c.function.name + \'", "KEY": \' }}{{ c.function.arguments | tojson }}}'
TEMPLATES = {
    "hermes": SAY
    + "{% for c in m.tool_calls or () %}{{ '\n<tool_call>\n' }}{{ c.function | tojson }}{{ '\n</tool_call>' }}{% endfor %}".replace(
        "c.function | tojson", "'{\"name\": \"' + c.function.name + '\", \"arguments\": ' }}{{ c.function.arguments | tojson }}{{ '}'"
    ),
    "llama3_json": ONE + SAY + OBJECTS.replace("KEY", "parameters") + "{% endfor %}",
    "mistral": NINE
    + SAY
    + "{% if m.tool_calls %}{{ '[TOOL_CALLS] [' }}"
    + OBJECTS.replace("KEY", "arguments")
    + "{% if not loop.last %}, {% endif %}{% endfor %}{{ ']' }}{% endif %}",
    "mistral_args": SAY
    + "{% for c in m.tool_calls or () %}{{ '[TOOL_CALLS]' + c.function.name + '[ARGS]' + c.function.arguments | tojson }}{% endfor %}",
    "qwen3_coder": SAY
    + "{% for c in m.tool_calls or () %}{{ '\n<tool_call>\n<function=' + c.function.name + '>\n' }}"
    "{% for k, v in c.function.arguments | items %}{{ '<parameter=' + k + '>\n' }}{{ v if v is string else v | tojson }}"
    "{{ '\n</parameter>\n' }}{% endfor %}{{ '</function>\n</tool_call>' }}{% endfor %}",
    "pythonic": SAY
    + "{% if m.tool_calls %}[{% for c in m.tool_calls %}{{ c.function.name + '(' }}{% for k, v in c.function.arguments | items %}"
    "{{ k + '=' }}{{ v | tojson }}{{ ', ' if not loop.last }}{% endfor %}){{ ', ' if not loop.last }}{% endfor %}]{% endif %}",
    "deepseek_v3": SAY
    + "{% if m.tool_calls %}{{ '<\uff5ctool\u2581calls\u2581begin\uff5c>' }}{% for c in m.tool_calls %}{{ '\n' if not loop.first }}"
    "{{ '<\uff5ctool\u2581call\u2581begin\uff5c>' + c.type + '<\uff5ctool\u2581sep\uff5c>' + c.function.name + '\n```json\n' }}"
    "{{ c.function.arguments | tojson + '\n```<\uff5ctool\u2581call\u2581end\uff5c>' }}{% endfor %}"
    "{{ '<\uff5ctool\u2581calls\u2581end\uff5c>' }}{% endif %}",
    "glm45": SAY
    + "{% for c in m.tool_calls or () %}{{ '\n<tool_call>' + c.function.name + '\n' }}{% for k, v in c.function.arguments | items %}"
    "{{ '<arg_key>' + k + '</arg_key>\n<arg_value>' }}{{ v if v is string else v | tojson }}{{ '</arg_value>\n' }}{% endfor %}"
    "{{ '</tool_call>' }}{% endfor %}",
    "kimi_k2": SAY
    + "{% if m.tool_calls %}{{ '<|tool_calls_section_begin|>' }}{% for c in m.tool_calls %}{{ '<|tool_call_begin|>' + c.id }}"
    "{{ '<|tool_call_argument_begin|>' }}{{ c.function.arguments | tojson }}{{ '<|tool_call_end|>' }}{% endfor %}"
    "{{ '<|tool_calls_section_end|>' }}{% endif %}",
    "": SAY + "{% for c in m.tool_calls or () %}{{ c.function.name + ' ' + c.function.arguments | tojson }}{% endfor %}",
}  # fmt: skip
MILL = {
    "type": "object",
    "properties": {
        "sacks": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["rye", "oat"]},
        "note": {"type": "string", "maxLength": 3},
        "fine": {"type": "boolean"},
    },
    "required": ["kind", "sacks"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "mill", "description": "Grinds.", "parameters": MILL}},
    {"type": "function", "function": {"name": "rest", "parameters": None}},
]
SCHEMAS = {"mill": MILL, "rest": {"type": "object", "maxProperties": 0}}
TALK = [{"role": "user", "content": "Grind."}]


def server_of(form: str) -> Server:
    special = [*FORMATS["chatml"].special_tokens, "[TOOL_CALLS]", "[ARGS]"]
    tokenizer = Tokenizer.train(["hello"] * 3, 300, special)
    tokenizer.chat_templates = {"default": BEGIN + TEMPLATES[form] + END}
    blocks = uniform_blocks(num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, ffn_size=32)
    model = Transformer(ModelConfig("nemotron", tokenizer.vocab_size, 16, blocks, max_positions=4096))
    return Server(Engine(model, tokenizer, find_format("auto", tokenizer), name="m"))


def ask(server: Server, *bodies: dict[str, Any], path: str = "chat/completions") -> list[Any]:
    """Answers of the server; of streams the events."""

    async def post() -> list[Any]:
        found: list[Any] = []
        async with TestClient(TestServer(Server(server.engine).app())) as client:
            for body in bodies:
                reply = await client.post(f"/v1/{path}", json={"model": "m"} | body)
                if not body.get("stream") or reply.status != 200:
                    found.append(await reply.json() | {"status": reply.status})
                    continue
                lines = [line.removeprefix("data: ") for line in (await reply.text()).split("\n") if line.startswith("data: ")]
                found.append([json.loads(line) for line in lines if line != "[DONE]"])
        return found

    return asyncio.run(post())


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": TALK, "tools": TOOLS, "max_tokens": 600, "seed": 3} | fields


def joined(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a client makes of a stream, by OpenAI's rules for deltas."""
    message: dict[str, Any] = {"content": None, "tool_calls": []}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        delta = choice["delta"]
        if delta.get("content") is not None:
            message["content"] = (message["content"] or "") + delta["content"]
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(message["tool_calls"]):
                assert set(call) == {"index", "id", "type", "function"} and call["function"]["arguments"] == ""
                message["tool_calls"].append({"id": call["id"], "type": call["type"], "function": dict(call["function"])})
            else:
                assert call["index"] == len(message["tool_calls"]) - 1 and set(call["function"]) == {"arguments"}
                message["tool_calls"][-1]["function"]["arguments"] += call["function"]["arguments"]
        message["finish"] = choice["finish_reason"]
    return message


def check(message: dict[str, Any], *, names: tuple[str, ...] = ("mill", "rest")) -> None:
    for call in message["tool_calls"]:
        assert call["function"]["name"] in names and call["type"] == "function"
        jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMAS[call["function"]["name"]])


@pytest.mark.parametrize("form", TEMPLATES)
def test_the_form_is_the_one_that_the_template_writes(form: str) -> None:
    support = server_of(form).tool_support
    assert support.form is (FORMS[form] if form else None) and support.takes_tools
    assert (support.parallel, support.short_ids) == (form != "llama3_json", form == "mistral")
    assert support.name == (form or "unknown: calls stay text")


def test_white_space_before_a_call_is_that_of_the_template(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TEMPLATES, "mistral", TEMPLATES["mistral"].replace("'[TOOL_CALLS] ['", "'[TOOL_CALLS]['"))
    server = server_of("mistral")
    assert server.tool_support.form == replace(FORMS["mistral"], lead="[") and server.tool_support.name == "mistral"
    (found,) = ask(server, chat(tool_choice="required"))
    check(found["choices"][0]["message"])


@pytest.mark.parametrize("form", [form for form in TEMPLATES if form])
def test_calls_that_must_be_made_keep_to_their_schemas(form: str) -> None:
    named = {"type": "function", "function": {"name": "mill"}}
    server = server_of(form)
    one, streamed, several = ask(
        server, chat(tool_choice=named), chat(tool_choice=named, stream=True), chat(tool_choice="required", parallel_tool_calls=False, n=3)
    )
    (choice,) = one["choices"]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls" and message["content"] is None and len(message["tool_calls"]) == 1
    check(message, names=("mill",))
    together = joined(streamed)
    assert together["finish"] == "tool_calls" and together["content"] is None
    assert [call["function"] for call in together["tool_calls"]] == [call["function"] for call in message["tool_calls"]]
    if FORMS[form].kind in ("json", "named"):  # as they are written
        assert sum(bool(choice["delta"].get("tool_calls")) for chunk in streamed for choice in chunk["choices"]) > 3
    for choice in several["choices"]:
        assert choice["finish_reason"] == "tool_calls" and len(choice["message"]["tool_calls"]) == 1
        check(choice["message"])
    # what was called can be said again, with its answer
    turns = [*TALK, message, {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "done"}]
    (again,) = ask(server, chat(messages=turns, max_tokens=1))
    assert again["status"] == 200


@pytest.mark.parametrize("form", ["mistral", "mistral_args"])
def test_a_model_that_opens_a_call_of_its_own_accord(form: str) -> None:
    server = server_of(form)
    wish = {"logit_bias": {str(server.engine.tokenizer.special_id("[TOOL_CALLS]")): 1000}, "parallel_tool_calls": False}
    whole, streamed = ask(server, chat(**wish), chat(**wish, stream=True))
    (choice,) = whole["choices"]
    assert choice["finish_reason"] == "tool_calls" and len(choice["message"]["tool_calls"]) == 1
    check(choice["message"])
    assert [one["function"] for one in joined(streamed)["tool_calls"]] == [one["function"] for one in choice["message"]["tool_calls"]]


def test_a_call_that_is_cut_off_is_text() -> None:
    cut, auto = ask(server_of("hermes"), chat(tool_choice="required", max_tokens=30), chat(max_tokens=30))
    (choice,) = cut["choices"]
    assert choice["finish_reason"] == "length" and "tool_calls" not in choice["message"]
    assert choice["message"]["content"].startswith('<tool_call>\n{"name": "')
    (choice,) = auto["choices"]
    assert choice["finish_reason"] == "length" and "tool_calls" not in choice["message"] and choice["message"]["content"]


@pytest.mark.parametrize("form", [form for form in TEMPLATES if form])
def test_a_call_that_the_model_opens_is_held_to_its_schema(form: str) -> None:
    server = server_of(form)
    tokenizer, backend = server.engine.tokenizer, server.engine.grammar_backend
    use = use_tools(server.tool_support, TOOLS)
    assert use is not None
    grammar = use.build_grammar("", tokenizer, backend.validate)
    tag = FORMS[form].begin
    begun = tag + FORMS[form].lead if tag else {"llama3_json": '{"name": "mi', "pythonic": "[mill("}[form]
    if form == "qwen3_coder":
        begun += "<function=mill>\n"

    def may_follow(said: str, then: str) -> bool:
        matcher = backend.new_matcher(grammar)
        ids = [i for part in said.split(tag or "\0") for i in [*tokenizer.encode(part), -1]][:-1]
        ids = [tokenizer.special_id(tag) if i < 0 else i for i in ids] if tag and tokenizer.has(tag) else tokenizer.encode(said)
        for token in ids:
            assert matcher.accept_token(token) == ""
        allowed = matcher.token_mask()
        assert allowed is not None
        return bool(allowed[tokenizer.encode(then)[0]])

    assert may_follow("", "T") and may_follow("Text <", "x") and may_follow("", (tag or begun)[0] if not tokenizer.has(tag) else "x")
    assert not may_follow(begun, "x") or form in ("hermes", "mistral_args")
    assert not may_follow(begun, "Z")


def test_an_answer_that_goes_on_within_a_call_makes_it() -> None:
    server = server_of("hermes")
    end = server.engine.tokenizer.encode("}")[0]
    fields: dict[str, Any] = {
        "logit_bias": {str(end): 100},
        "max_tokens": 1,
        "continue_final_message": True,
        "add_generation_prompt": False,
    }

    def going_on(text: str, **more: Any) -> dict[str, Any]:
        return chat(messages=[*TALK, {"role": "assistant", "content": text}], **fields, **more)

    begun = 'Well. <tool_call>\n{"name": "rest", "arguments": {}'
    whole, stream, text, refused, strict = ask(
        server,
        going_on(begun),
        going_on(begun, stream=True),
        going_on("Well. {"),
        going_on(begun, tool_choice="required"),
        going_on(begun, response_format={"type": "json_object"}),
    )
    message = whole["choices"][0]["message"]
    assert message["content"] is None and [call["function"] for call in message["tool_calls"]] == [{"name": "rest", "arguments": "{}"}]
    assert [call["function"] for call in joined(stream)["tool_calls"]] == [{"name": "rest", "arguments": "{}"}]
    assert text["choices"][0]["message"] == {"role": "assistant", "content": "}"}
    for one in (refused, strict):
        assert one["status"] == 400 and one["error"]["param"] == "continue_final_message"


def test_tools_beside_a_response_format() -> None:
    answer = {
        "type": "json_schema",
        "json_schema": {"name": "a", "schema": {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}},
    }
    (found,) = ask(server_of("hermes"), chat(response_format=answer, n=4))
    for choice in found["choices"]:
        message = choice["message"]
        if "tool_calls" in message:
            check(message)
        elif choice["finish_reason"] == "stop":
            assert json.loads(message["content"])["a"] == 1

    (refused,) = ask(server_of("llama3_json"), chat(structured_outputs={"regex": "a+"}))
    assert refused["status"] == 400 and refused["error"]["param"] == "structured_outputs"


def tool(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "mill"} | fields}


UNMET = {"properties": {"a": {"minimum": 5, "maximum": 3, "type": "integer"}}, "required": ["a"]}
UNKNOWN = {"properties": {"a": {"not": {}}}}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "only functions"),
        ({"tools": [tool(name="a b")]}, "tools.0.function.name", "letters"),
        ({"tools": [tool(), tool()]}, "tools.1.function.name", "another tool"),
        ({"tools": [tool(parameters={"type": "string"})]}, "tools.0.function.parameters", "schema of an object"),
        ({"tools": [tool(parameters=[])]}, "tools.0.function.parameters", "schema of an object"),
        ({"tools": [tool()] * 129}, "tools", "at most 128"),
        ({"tools": [tool(parameters=UNMET)]}, "tools.0.function.parameters", "no call of 'mill'"),
        ({"tools": [tool(parameters=UNKNOWN)], "tool_choice": "required"}, "tools.0.function.parameters", "no call of 'mill'"),
        ({"tools": [tool(strict=True, parameters=UNKNOWN)]}, "tools.0.function.parameters", "no call of 'mill'"),
        ({"tool_choice": {"type": "function", "function": {"name": "burn"}}}, "tool_choice", "no tool 'burn'"),
        ({"tool_choice": "always"}, "tool_choice", "must be"),
        ({"tool_choice": "required", "tools": []}, "tool_choice", "no tools"),
        ({"functions": [{}]}, "functions", "say tools"),
    ],
)  # fmt: skip
def test_what_cannot_be_called_is_refused_in_one_sentence(fields: dict[str, Any], param: str, words: str) -> None:
    (reply,) = ask(HERMES, chat(**fields))
    assert reply["status"] == 400 and reply["error"]["param"] == param and words in reply["error"]["message"], reply


HERMES = server_of("hermes")


def test_a_schema_of_which_a_part_is_unknown_is_held_to_the_rest_unless_a_call_is_due() -> None:
    use = use_tools(HERMES.tool_support, [tool(parameters={"properties": {"a": {"not": {"type": "null"}}}})])
    assert use is not None and use.build_grammar("", HERMES.engine.tokenizer, HERMES.engine.grammar_backend.validate) and use.held


def test_other_control_tokens_may_stand_in_a_text_and_none_in_a_call() -> None:
    engine = HERMES.engine
    use, other, end = (
        use_tools(HERMES.tool_support, TOOLS),
        engine.tokenizer.special_id("[ARGS]"),
        engine.tokenizer.special_id("<|im_end|>"),
    )
    assert use is not None
    grammar = use.build_grammar("", engine.tokenizer, engine.grammar_backend.validate, {end, engine.tokenizer.eos_id})
    matcher = engine.grammar_backend.new_matcher(grammar)
    allowed = []
    for token in [other, *engine.tokenizer.encode("so "), other, *engine.tokenizer.encode("<tool_call>\n{")]:
        assert matcher.accept_token(token) == ""
        mask = matcher.token_mask()
        assert mask is not None
        allowed.append((bool(mask[other]), bool(mask[end])))
    assert allowed[0] == allowed[5] == (True, True) and allowed[-1] == (False, False)


def test_models_without_tools_or_without_a_known_form_say_so() -> None:
    tokenizer = Tokenizer.train(["hello"] * 3, 300, FORMATS["chatml"].special_tokens)
    with pytest.raises(FieldError, match="no place for tools"):
        use_tools(find_support(FORMATS["chatml"], tokenizer), TOOLS)
    unknown = server_of("")
    with pytest.raises(FieldError, match="--tool-call-parser"):
        use_tools(unknown.tool_support, TOOLS, "required")
    assert use_tools(unknown.tool_support, TOOLS) is None
    told = find_support(unknown.engine.chat_format, unknown.engine.tokenizer, "hermes")
    assert told.form is FORMS["hermes"] and use_tools(told, TOOLS, "required") is not None
    assert find_support(FORMATS["chatml"], tokenizer, "qwen3_xml").form is FORMS["qwen3_coder"]
    with pytest.raises(InputError, match="not one of hermes, "):
        find_support(unknown.engine.chat_format, unknown.engine.tokenizer, "hermss")
    assert [one.name for one in parse_tools([{"type": "function", "name": "f", "parameters": {}}], flat=True)] == ["f"]


def test_a_call_has_no_arguments_but_those_of_its_schema() -> None:
    inner = {"type": "object", "properties": {"x": {"const": 1}}, "required": ["x"]}
    schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/in"}, "b": {"type": "array", "items": inner, "maxItems": 1}}}
    whole = schema | {"required": ["a", "b"], "$defs": {"in": inner}}
    (found,) = ask(HERMES, chat(tools=[tool(parameters=whole)], tool_choice="required", parallel_tool_calls=False))
    told = json.loads(found["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"])
    assert told in ({"a": {"x": 1}, "b": []}, {"a": {"x": 1}, "b": [{"x": 1}]})
    free = {"allOf": [{"properties": {"a": {"const": 1}}, "required": ["a"]}, {"properties": {"b": {"const": 2}}, "required": ["b"]}]}
    closed = {"allOf": [one | {"additionalProperties": True} for one in free["allOf"]], "type": "object"}
    use = use_tools(HERMES.tool_support, [tool(parameters=closed)], "required")
    assert use is not None and use.build_grammar("", HERMES.engine.tokenizer, HERMES.engine.grammar_backend.validate)


def test_a_server_that_must_tell_calls_does_not_start_where_it_cannot(tmp_path: Path) -> None:
    tokenizer = HERMES.engine.tokenizer.with_chat_template(FORMATS["chatml"].template)
    save_model(HERMES.engine.model, tokenizer, tmp_path / "m")
    with pytest.raises(InputError, match="there is no place for tools"):
        serve(tmp_path / "m", ServerArgs(enable_auto_tool_choice=True), EngineArgs(max_batch=1))
    with pytest.raises(InputError, match="--tool-call-parser hermss is not one of"):
        serve(tmp_path, ServerArgs(tool_call_parser="hermss"), EngineArgs())
    with pytest.raises(InputError, match="nowhere/config.json does not exist"):  # before the model, which is not there either
        serve(tmp_path, ServerArgs(reward=tmp_path / "nowhere"), EngineArgs())


def test_allowed_tools() -> None:
    some = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "rest"}}]}}
    use = use_tools(HERMES.tool_support, TOOLS, some)
    assert use is not None and use.required and [one.name for one in use.tools] == ["rest"]
