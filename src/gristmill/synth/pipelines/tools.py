"""Function-calling pipeline: functions with JSON schemas -> a user's request -> the call that serves it (report, section 3.2.5)."""

import json
from collections.abc import AsyncIterator
from typing import Any

from pydantic import Field

from gristmill.data.chat import Message
from gristmill.data.rows import Demonstration
from gristmill.synth.pipelines.base import Inputs, Pipeline, demonstration
from gristmill.synth.writer import ParseError, Topic, Writer
from gristmill.verify.json_schema import extract_json, schema_error, validation_error


class Tools(Pipeline):
    """Requests that one call of a function serves. A call that does not fit its function's schema is left out."""

    functions: int = Field(3, gt=0, description="functions a topic")
    requests: int = Field(2, gt=0, description="requests a topic")
    topics: int = Field(50, gt=0, description="topics to write functions for, at most")

    async def write(self, writer: Writer, inputs: Inputs) -> AsyncIterator[Demonstration]:
        async def about(topic: Topic) -> list[Demonstration]:
            reply = await writer.reply("tools", parents=[topic.id], num=self.functions, topic=topic.text)
            functions = parse_functions(reply.text)
            if not functions:
                raise ParseError("no function with a schema")
            shown = json.dumps(list(functions.values()), indent=1, ensure_ascii=False)
            parents = [topic.id, reply.id]

            async def serve(number: int) -> list[Demonstration]:
                request = await writer.reply("tool_request", parents=parents, salt=number, tools=shown)
                made = await writer.reply("tool_call", parents=[*parents, request.id], tools=shown, request=request.text)
                call = extract_json(made.text)
                if why := call_error(call, functions):
                    raise ParseError(why)
                talk = [
                    Message("system", f"You can call these functions:\n{shown}\nTo call one, reply with its name and arguments as JSON."),
                    Message("user", request.text),
                    Message("assistant", json.dumps(call, ensure_ascii=False)),
                ]
                return [demonstration("tools", talk, made.model, parents=[*parents, request.id, made.id])]

            return await writer.all(range(self.requests), serve)

        topics = writer.random("tools").sample(list(inputs.topics), min(self.topics, len(inputs.topics)))
        async for row in writer.each(topics, about):
            yield row


def parse_functions(text: str) -> dict[str, dict[str, Any]]:
    """Parse the functions of a JSON array whose parameters are a schema that can be checked, by name."""
    found = extract_json(text)
    functions: dict[str, dict[str, Any]] = {}
    for function in found if isinstance(found, list) else ():
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            continue
        parameters = function.get("parameters")
        if isinstance(parameters, dict) and parameters.get("type") == "object" and not schema_error(parameters):
            kept = {"name": function["name"], "description": str(function.get("description", "")), "parameters": parameters}
            functions.setdefault(function["name"], kept)
    return functions


def call_error(call: Any, functions: dict[str, dict[str, Any]]) -> str:
    """Why a call is none of these functions'; "" where it is."""
    if not isinstance(call, dict) or set(call) != {"name", "arguments"} or not isinstance(call["arguments"], dict):
        return "no call"
    if not isinstance(call["name"], str) or call["name"] not in functions:
        return "call of an unknown function"
    return "arguments do not fit the schema" if validation_error(call["arguments"], functions[call["name"]]["parameters"]) else ""
