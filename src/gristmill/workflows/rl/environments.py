"""Environments of other programs, with tasks of one turn: a verifiers (v0) module, or NeMo-Gym's rows and the server that verifies them.

An environment gives prompts and is a part of the reward. A prompt's `meta` holds the number of its row.
"""

import asyncio
import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import aiohttp

from gristmill.core.errors import InputError
from gristmill.core.io import reason
from gristmill.core.untrusted import quoted, quoted_path
from gristmill.data.chat import conversation
from gristmill.data.rows import Prompt, make_id, read_records
from gristmill.generation.api import Completion
from gristmill.runs.journal import Journal
from gristmill.workflows.rl.functions import PythonProcess
from gristmill.workflows.rl.recipe import Environment
from gristmill.workflows.rl.rewards import RewardPart

ROW = "row"  # the key of a prompt's `meta`
ATTEMPTS, PAUSE = 4, 0.5  # of a call, and seconds before the second one; twice as many before each next
MAX_BODY = 1 << 20  # bytes of a server's answer
# Datasets, rubrics and parsers are taken as they are: nothing of the package verifiers is imported here, only by who wrote the module.
VERIFIERS = """
def rows_of(dataset):
    dataset = dataset() if callable(dataset) else dataset
    return [dict(row) for row in dataset] if dataset is not None else []

def messages_of(row, environment):
    prompt = row.get("prompt", row.get("question"))
    if isinstance(prompt, str):
        system = getattr(environment, "system_prompt", None)
        prompt = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": prompt}]
    return [{"role": m["role"], "content": m["content"]} for m in prompt]

def begin():
    environment = load().load_environment(**given["args"])
    tools = getattr(environment, "tools", None) or getattr(environment, "oai_tools", None)
    if tools or getattr(environment, "max_turns", 1) not in (1, None):
        raise ValueError("the environment has tools or several turns; there is one turn here")
    whole = environment.rubric
    rubrics = getattr(whole, "rubrics", None) or [whole]
    functions = []
    for rubric in rubrics:
        found = getattr(rubric, "funcs", None) or getattr(rubric, "reward_funcs", None) or []
        weights = getattr(rubric, "weights", None) or getattr(rubric, "reward_weights", None) or [1.0] * len(found)
        for function, weight in zip(found, weights, strict=True):
            plural = {"states", "prompts", "completions", "answers", "tasks", "infos"} & set(inspect.signature(function).parameters)
            if plural:
                raise ValueError(f"the rubric's {function.__name__} values whole groups; functions of one answer are called here")
            if weight:
                functions.append((function, weight, rubric))
    if not functions:
        raise ValueError("the environment's rubric has no function with a weight")
    sets = []
    for getter, name in (("get_dataset", "dataset"), ("get_eval_dataset", "eval_dataset")):
        held = getattr(environment, name, None)
        sets.append(rows_of(held if held is not None else getattr(environment, getter, None) if name == "dataset" else None))
    rows = [*sets[0], *sets[1]]
    for row in rows:
        row["prompt"] = messages_of(row, environment)
    said = [{"messages": row["prompt"], "task": str(row.get("task") or "")} for row in rows]
    return (environment, functions, rows), {"rows": said, "num_train": len(sets[0])}

def answer(state, asked):
    environment, functions, rows = state
    out = []
    for number, text in zip(asked["rows"], asked["texts"], strict=True):
        row = rows[number]
        info = row.get("info") or {}
        info = json.loads(info) if isinstance(info, str) else info
        values = {k: v for k, v in row.items()}
        values |= {"completion": [{"role": "assistant", "content": text}], "answer": row.get("answer", ""), "info": info}
        values |= {"task": row.get("task", "default"), "parser": getattr(environment, "parser", None)}
        values["state"] = {**values, "input": row, "responses": [], "turn": 1, "trajectory": []}
        total = 0.0
        for function, weight, rubric in functions:
            total += weight * float(call(function, {**values, **(getattr(rubric, "class_objects", None) or {})}))
        out.append(total)
    return out

serve(begin, answer)
"""
START_SECONDS = 600.0  # an environment may have to read its data


class Tasks(RewardPart, Protocol):
    """An environment: prompts, those to evaluate with, and the reward of answers to them."""

    prompts: list[Prompt]
    evaluation: list[Prompt]  # none where it has no such set
    journal: Journal | None  # of what a server has said


def open_environment(settings: Environment, stack: ExitStack, concurrency: int) -> Tasks:
    """The environment of a recipe, at work as long as `stack` is open.

    Raises:
        InputError: it cannot be used here.
    """
    if settings.verifiers is not None:
        return stack.enter_context(VerifiersEnvironment(settings))
    return NemoGymEnvironment(settings, concurrency)


class VerifiersEnvironment(PythonProcess):
    """A module with `load_environment`, in a process of its own: the rubric's functions by the names of their arguments, and weights."""

    name = "environment"
    journal: Journal | None = None

    def __init__(self, settings: Environment):
        assert settings.verifiers is not None
        self.weight = settings.weight
        label, given = f"The environment {settings.verifiers}", {"args": settings.args}
        super().__init__(VERIFIERS, settings.verifiers, given, label=label, timeout=settings.timeout, start_timeout=START_SECONDS)
        rows, num_train = self.said["rows"], self.said["num_train"]
        prompts = [_prompt(number, row["messages"], row["task"]) for number, row in enumerate(rows)]
        if not num_train:
            raise InputError(f"{self} has no rows to train on.")
        self.prompts, self.evaluation = prompts[:num_train], prompts[num_train:]

    def question(self, prompts: Sequence[Prompt], answers: Sequence[Completion]) -> dict[str, Any]:
        return {"rows": [prompt.meta[ROW] for prompt in prompts], "texts": [answer.text for answer in answers]}


class NemoGymEnvironment:
    """Rows of NeMo-Gym, and the resources server whose `/verify` rewards answers to them. Equal answers to a row are asked about once."""

    name = "environment"

    def __init__(self, settings: Environment, concurrency: int):
        assert settings.nemo_gym is not None
        self._file = settings.nemo_gym
        self.weight, self._settings, self._concurrency = settings.weight, settings, concurrency
        self.journal: Journal | None = None
        self._rows = read_records(settings.nemo_gym)
        self.prompts = [_prompt(i, self._messages(row, i + 1), "") for i, row in enumerate(self._rows)]
        self.evaluation: list[Prompt] = []

    def _messages(self, row: dict[str, Any], number: int) -> list[dict[str, Any]]:
        where = f"Row {number} of {quoted_path(self._file)}"
        params = row.get("responses_create_params")
        params = params if isinstance(params, dict) else {}
        asked = params.get("input")
        if not asked:
            raise InputError(f"{where} has no responses_create_params.input: give rows of NeMo-Gym.")
        if params.get("tools"):
            raise InputError(f"{where} has tools, which take several turns: leave it out, for there is one turn here.")
        if isinstance(asked, str):
            return [{"role": "user", "content": asked}]
        out = []
        for message in asked if isinstance(asked, list) else [None]:
            message = message if isinstance(message, dict) else {}
            content = message.get("content")
            parts = content if isinstance(content, list) else [{"text": content}]
            texts = [str(part["text"]) for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
            if not texts or len(texts) < len(parts):
                raise InputError(f"{where} has a message that is no text: leave it out.")
            role = str(message.get("role"))
            out.append({"role": "system" if role == "developer" else role, "content": "".join(texts)})
        return out

    def rewards(self, prompts: Sequence[Prompt], answers: Sequence[Completion]) -> list[float | str | None]:
        """What the server says of each answer, or how it failed.

        Raises:
            InputError: it failed for all.
        """
        return list(asyncio.run(self._all(prompts, answers)))

    async def _all(self, prompts: Sequence[Prompt], answers: Sequence[Completion]) -> list[float | str]:
        cases = [(p.meta[ROW], a.text) for p, a in zip(prompts, answers, strict=True)]
        slots, found = asyncio.Semaphore(self._concurrency), dict[tuple[int, str], float | str]()
        timeout = aiohttp.ClientTimeout(total=self._settings.timeout)
        async with aiohttp.ClientSession(timeout=timeout) as session:

            async def one(case: tuple[int, str]) -> None:
                async with slots:
                    found[case] = await self._verified(session, *case)

            await asyncio.gather(*(one(case) for case in dict.fromkeys(cases)))
        if found and all(isinstance(value, str) for value in found.values()):
            why = next(iter(found.values()))
            raise InputError(f"environment.url fails on every answer ({why}): start the server and run the same command again.")
        return [found[case] for case in cases]

    async def _verified(self, session: aiohttp.ClientSession, row: int, text: str) -> float | str:
        name = make_id("verify", self._settings.url, self._rows[row], text)
        if self.journal is not None and name in self.journal:
            return float(self.journal[name]["reward"])
        body, why = self._rows[row] | {"response": _response(text)}, ""
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(PAUSE * 2 ** (attempt - 1))
            try:
                async with session.post(f"{self._settings.url.rstrip('/')}/verify", json=body) as reply:
                    said = await reply.content.read(MAX_BODY)
                    value = _reward(said) if reply.status == 200 else None
                    why = f"status {reply.status}: {quoted(said[:80].decode('utf-8', 'replace'))}"
            except (aiohttp.ClientError, OSError, TimeoutError) as e:
                why = reason(e) if isinstance(e, OSError) else type(e).__name__
                continue
            if value is not None:
                if self.journal is not None:
                    self.journal.append({"id": name, "row": row, "reward": value})
                return value
            if reply.status < 500 and reply.status != 429:
                break
        return why


def _reward(body: bytes) -> float | None:
    """The finite `reward` of a server's answer, if it has one."""
    try:
        value = json.loads(body)["reward"]
    except (ValueError, LookupError, TypeError):
        return None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _response(text: str) -> dict[str, Any]:
    """An answer in the form of OpenAI's Responses API."""
    content = [{"type": "output_text", "text": text, "annotations": []}]
    message = {"id": "msg_0", "type": "message", "role": "assistant", "status": "completed", "content": content}
    return {
        "id": "resp_0",
        "object": "response",
        "created_at": 0.0,
        "model": "policy",
        "output": [message],
        "parallel_tool_calls": False,
        "tool_choice": "none",
        "tools": [],
    }


def _prompt(number: int, messages: Sequence[dict[str, Any]], task: str) -> Prompt:
    talk = conversation(messages)
    return Prompt(make_id("environment", number, messages), task or "environment", talk, "file", meta={ROW: number})
