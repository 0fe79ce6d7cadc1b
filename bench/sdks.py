"""The server through the clients that programs use: OpenAI's, LangChain's, LlamaIndex's, openai-agents', and Open WebUI's calls.

    PYTHONPATH=src:/path/to/clients python bench/sdks.py MODEL [--only openai langchain llama_index agents open_webui]

    pip install --target /path/to/clients openai langchain-openai llama-index-llms-openai-like openai-agents

Starts `gristmill serve MODEL` and does with each client what its own examples do: chats, streams, tools that are called and whose answers
are sent back, structured output, responses. MODEL may write nonsense, but its chat template must have a place for tools: what is looked at
is that calls are whole and keep to their schemas, and that streams say what whole answers do. A client that is not installed is
skipped by its name. Prints a line for each and exits 1 if something is not so.
"""

import argparse
import asyncio
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import urllib.error
import urllib.request
from typing import Any, Literal

os.environ |= {"OPENAI_API_KEY": "none", "OPENAI_AGENTS_DISABLE_TRACING": "1", "ANONYMIZED_TELEMETRY": "False", "DO_NOT_TRACK": "1"}
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Weather of a city.", "parameters": WEATHER}}
ASK = [{"role": "user", "content": "What is the weather in Rome?"}]
LIMIT = 120  # tokens of an answer


def check_arguments(arguments: Any) -> None:
    told = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert set(told) == {"city", "unit"} and told["city"] in ("Rome", "Oslo") and told["unit"] in ("celsius", "fahrenheit"), told


def try_openai(url: str, model: str) -> None:
    import openai
    from pydantic import BaseModel

    client = openai.OpenAI(base_url=url, max_retries=0)
    assert [one.id for one in client.models.list()] == [model] and client.models.retrieve(model).id == model
    common: dict[str, Any] = {"model": model, "messages": ASK, "max_tokens": LIMIT, "seed": 1}
    whole = client.chat.completions.create(**common | {"max_tokens": 20}).choices[0].message.content
    stream = client.chat.completions.create(**common | {"max_tokens": 20}, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole and chunks[-1].usage.completion_tokens == 20
    one: dict[str, Any] = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    message = client.chat.completions.create(**common, **one).choices[0]
    assert message.finish_reason == "tool_calls" and len(message.message.tool_calls) == 1
    call = message.message.tool_calls[0]
    check_arguments(call.function.arguments)
    with client.chat.completions.stream(**common, **one) as events:
        kinds = {event.type for event in events}
        final = events.get_final_completion().choices[0]
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds, kinds
    assert final.finish_reason == "tool_calls" and final.message.tool_calls[0].function.arguments == call.function.arguments
    turns = [*ASK, message.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    client.chat.completions.create(**common | {"messages": turns, "max_tokens": 5}, tools=[TOOL])

    class Mill(BaseModel):
        sacks: Literal[1, 2]
        fine: bool

    assert isinstance(client.chat.completions.parse(**common, response_format=Mill).choices[0].message.parsed, Mill)
    prefill = [*ASK, {"role": "assistant", "content": "The weather is"}]
    client.chat.completions.create(**common | {"messages": prefill, "max_tokens": 5}, extra_body={"continue_final_message": True})
    flat = {"type": "function", "strict": True, **TOOL["function"]}  # type: ignore[dict-item]
    asked: dict[str, Any] = {"model": model, "input": "What is the weather in Rome?", "max_output_tokens": LIMIT, "extra_body": {"seed": 1}}
    text = client.responses.create(**asked | {"max_output_tokens": 20}, instructions="Be kind.")
    with client.responses.stream(**asked | {"max_output_tokens": 20}, instructions="Be kind.") as events:
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == text.output_text and text.usage.output_tokens == 20
    called = client.responses.create(**asked, tools=[flat], tool_choice="required", parallel_tool_calls=False)
    (item,) = (one for one in called.output if one.type == "function_call")
    check_arguments(item.arguments)
    with client.responses.stream(**asked, tools=[flat], tool_choice={"type": "function", "name": "get_weather"}) as events:
        for _ in events:
            pass
        check_arguments(events.get_final_response().output[0].arguments)
    output = {"type": "function_call_output", "call_id": item.call_id, "output": "sunny"}
    client.responses.create(**asked | {"input": [*ASK, *called.output, output], "max_output_tokens": 5}, tools=[flat])
    assert isinstance(client.responses.parse(**asked, text_format=Mill).output_parsed, Mill)
    for refused, words in (
        (lambda: client.responses.create(**asked, previous_response_id="resp_1"), "stored"),
        (lambda: client.embeddings.create(model=model, input="x"), "embeddings"),
    ):
        try:
            refused()
        except openai.APIStatusError as e:
            assert words in e.message, e.message
        else:
            raise AssertionError(f"{words}: not refused")


def try_langchain(url: str, model: str) -> None:
    from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    @tool
    def add(a: Literal[2, 3], b: Literal[2, 3]) -> int:
        """Add two numbers."""
        return a + b

    for responses in (False, True):
        common: dict[str, Any] = {"model": model, "base_url": url, "api_key": "none", "use_responses_api": responses, "max_retries": 0}
        llm, short = ChatOpenAI(max_tokens=LIMIT, **common), ChatOpenAI(max_tokens=10, **common)
        assert short.invoke("Hi").usage_metadata["output_tokens"] <= 10
        assert list(short.stream("Hi"))
        bound = llm.bind_tools([add], tool_choice="add", parallel_tool_calls=False)
        answer = bound.invoke("What is 2 + 3?")
        (call,) = answer.tool_calls
        assert call["name"] == "add" and all(isinstance(call["args"][name], int) for name in "ab"), call
        together: Any = None
        for chunk in bound.stream("What is 2 + 3?"):
            assert isinstance(chunk, AIMessageChunk)
            together = chunk if together is None else together + chunk
        (call,) = together.tool_calls
        assert call["name"] == "add" and set(call["args"]) == {"a", "b"}, call
        told = ToolMessage(str(add.invoke(answer.tool_calls[0]["args"])), tool_call_id=answer.tool_calls[0]["id"])
        short.bind_tools([add]).invoke([HumanMessage("What is 2 + 3?"), answer, told])
        assert llm.with_structured_output({"title": "Weather", **WEATHER}, method="json_schema").invoke("Rome?")["city"] in ("Rome", "Oslo")


def try_llama_index(url: str, model: str) -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.core.tools import FunctionTool
    from llama_index.llms.openai_like import OpenAILike

    def add(a: Literal[2, 3], b: Literal[2, 3]) -> int:
        """Add two numbers."""
        return a + b

    llm = OpenAILike(
        model=model, api_base=url, api_key="none", is_chat_model=True, is_function_calling_model=True, max_tokens=LIMIT, max_retries=0
    )
    talk = [ChatMessage(role="user", content="What is 2 + 3?")]
    assert llm.chat(talk, max_tokens=10).raw is not None
    assert [chunk.delta for chunk in llm.stream_chat(talk, max_tokens=10)]
    tool = FunctionTool.from_defaults(add)
    reply = llm.chat_with_tools([tool], chat_history=talk, tool_required=True)
    (call,) = llm.get_tool_calls_from_response(reply)
    assert call.tool_name == "add" and set(call.tool_kwargs) == {"a", "b"}, call
    last = list(llm.stream_chat_with_tools([tool], chat_history=talk, tool_required=True))[-1]
    (call,) = llm.get_tool_calls_from_response(last)
    assert call.tool_name == "add" and set(call.tool_kwargs) == {"a", "b"}, call


def try_agents(url: str, model: str) -> None:
    from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool
    from openai import AsyncOpenAI

    calls: list[tuple[str, int]] = []

    @function_tool
    def grind(kind: Literal["rye", "oat"], sacks: Literal[1, 2]) -> str:
        """Grind sacks of a kind of corn."""
        calls.append((kind, sacks))
        return f"{sacks} sacks are ground"

    async def run() -> None:
        client = AsyncOpenAI(base_url=url, max_retries=0)
        settings = ModelSettings(tool_choice="required", parallel_tool_calls=False, max_tokens=LIMIT)
        for made in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
            parts: dict[str, Any] = {"name": "Miller", "instructions": "Grind.", "model": made(model, client), "tools": [grind]}
            if made is OpenAIResponsesModel:  # it takes an answer that the limit cuts off, as nonsense is, for an error
                parts["tool_use_behavior"] = "stop_on_first_tool"
            agent = Agent(**parts, model_settings=settings)
            before = len(calls)
            await Runner.run(agent, "Grind 2 sacks of rye.", max_turns=6)
            streamed = Runner.run_streamed(agent, "Grind 2 sacks of rye.", max_turns=6)
            async for _ in streamed.stream_events():
                pass
            assert len(calls) >= before + 2, calls

    asyncio.run(run())


def try_open_webui(url: str, model: str) -> None:
    """What Open WebUI asks: the list of models, a streamed chat with usage, a title, and tools in its native mode."""

    def ask(path: str, body: dict[str, Any] | None = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": "Bearer none", "Content-Type": "application/json", "X-OpenWebUI-User-Name": "A"}
        with urllib.request.urlopen(urllib.request.Request(url + path, data, headers), timeout=300) as reply:
            return str(reply.read().decode())

    assert [one["id"] for one in json.loads(ask("/models"))["data"]] == [model]
    chat: dict[str, Any] = {"model": model, "messages": [{"role": "system", "content": "Be kind."}, *ASK], "stream": True}
    for more in ({}, {"tools": [TOOL]}):
        events = ask("/chat/completions", chat | {"max_tokens": 10, "stream_options": {"include_usage": True}} | more).split("\n\n")
        assert events[-2] == "data: [DONE]" and json.loads(events[-3].removeprefix("data: "))["usage"]["completion_tokens"] <= 10
    title = json.loads(ask("/chat/completions", chat | {"stream": False, "max_completion_tokens": 10}))
    assert isinstance(title["choices"][0]["message"]["content"], str)


CLIENTS = {
    "openai": (try_openai, "openai"),
    "langchain": (try_langchain, "langchain_openai"),
    "llama_index": (try_llama_index, "llama_index.llms.openai_like"),
    "agents": (try_agents, "agents"),
    "open_webui": (try_open_webui, "json"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--only", nargs="+", choices=list(CLIENTS), default=list(CLIENTS))
    args = parser.parse_args()
    command = [sys.executable, "-m", "gristmill.cli", "serve", args.model, "--port", "0", "--name", "model", "--max-batch", "8"]
    with subprocess.Popen([*command, "--enable-auto-tool-choice"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            return process.wait()
        wrong = 0
        for name in args.only:
            attempt, package = CLIENTS[name]
            try:
                importlib.import_module(package)
            except ImportError as e:
                print(f"{name}: skipped, it is not installed ({e.name})", flush=True)
                continue
            started = time.perf_counter()
            try:
                attempt(line.split()[-1], "model")
                print(f"{name}: ok, {time.perf_counter() - started:.1f} s", flush=True)
            except Exception:
                traceback.print_exc()
                print(f"{name}: failed", flush=True)
                wrong += 1
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
