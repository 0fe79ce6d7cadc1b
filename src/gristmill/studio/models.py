"""Models of a run to talk to: each is served by a `gristmill serve` of its own, a process that the studio starts, asks and ends.

So a model that loads, computes or fails never holds up the page. One is up at a time; it goes when nobody has asked it for a while.
"""

import asyncio
import contextlib
import json
import os
import re
import secrets
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from gristmill.core.echo import visible
from gristmill.core.errors import InputError
from gristmill.runs.reader import read_run
from gristmill.runs.stage_names import round_of
from gristmill.studio.store import Refused

KEY = "GRISTMILL_STUDIO_KEY"  # environment variable of the served model's key
LOAD_SECONDS, ANSWER_SECONDS, IDLE_SECONDS = 300.0, 600.0, 900.0
GONE_SECONDS = 2.0  # in which a page that has gone is noticed, by the next token that it would get
ADDRESS = re.compile(r" at (http://127\.0\.0\.1:\d+/v1)\s*$")
THINKS = re.compile(rb"detailed thinking|<think>")
MAX_TEMPLATE_BYTES = 4 << 20
NUM_TOPS = 4  # other tokens whose log-probability is shown


@dataclass(frozen=True)
class Model:
    """A model folder of a run.

    Attributes:
        name: its stage, or "base".
        thinks: whether its chat template knows a switch for reasoning.
    """

    name: str
    folder: Path
    round: int
    thinks: bool


def models_of(run: Path) -> list[Model]:
    """The models of a run that can be talked to, the last one first."""
    data = read_run(run)
    found = []
    for stage in data.stages:
        folder = run / stage["folder"] / "model"
        if "greedy" in stage and (folder / "config.json").is_file():
            found.append(Model(stage["name"], folder, round_of(stage["name"]), _thinks(folder)))
    base = Path(str(data.recipe.get("model", "")))
    if data.recipe.get("model") == "miniature":
        from gristmill.miniature.base import BASE

        base = BASE
    if (base / "config.json").is_file():
        found.insert(0, Model("base", base, 0, _thinks(base)))
    return found[::-1]


def _thinks(folder: Path) -> bool:
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        path = folder / name
        if path.is_file() and path.stat().st_size < MAX_TEMPLATE_BYTES and THINKS.search(path.read_bytes()):
            return True
    return False


class ModelServer:
    """The one model that is up."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._name, self._url, self._key, self._used, self._streams = "", "", "", 0.0, 0
        self._watch: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """The model that is up; "" where none is."""
        return self._name if self._process is not None and self._process.returncode is None else ""

    async def _start(self, model: Model) -> None:
        """Serve a model, in place of another one.

        Raises:
            InputError: it cannot be loaded.
            Refused: another one is answering.
        """
        async with self._lock:
            if self.name == model.name:
                return
            begun = time.monotonic()
            while self._streams and time.monotonic() < begun + GONE_SECONDS:
                await asyncio.sleep(0.05)
            if self._streams:
                raise Refused(409, f"{self._name} is answering somebody: wait, or stop it.")
            await self._end()
            self._key = secrets.token_urlsafe(24)
            command = [sys.executable, "-m", "gristmill.cli", "serve", str(model.folder), "--port", "0", "--api-key-env", KEY]
            pipe = asyncio.subprocess.PIPE
            environment = os.environ | {KEY: self._key}
            process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=environment
            )
            self._process, self._name = process, model.name
            assert process.stdout is not None and process.stderr is not None
            try:
                line = (await asyncio.wait_for(process.stdout.readline(), LOAD_SECONDS)).decode(errors="replace")
            except BaseException as e:
                await self._end()
                if isinstance(e, TimeoutError):
                    raise InputError(f"{model.name} was not loaded within {LOAD_SECONDS:g} s.") from e
                raise
            if (found := ADDRESS.search(line)) is None:
                said = (await process.stderr.read()).decode(errors="replace").strip().splitlines()
                await self._end()
                raise InputError(f"{model.name} cannot be served: {visible(said[-1]) if said else 'its process ended'}")
            self._url, self._used = found[1], time.monotonic()
            self._drains = [asyncio.create_task(_drain(stream)) for stream in (process.stdout, process.stderr)]
            self._watch = asyncio.create_task(self._end_when_idle())

    async def stream(self, model: Model, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Pieces of an answer as they come: `text`, `tokens` with log-probabilities, at last `finish`. Leaving ends the generation."""
        if self.name != model.name:
            yield {"state": "loading"}
        await self._start(model)
        self._streams += 1
        try:
            timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
            headers = {"Authorization": f"Bearer {self._key}"}
            asked = body | {"model": model.folder.resolve().name, "stream": True, "logprobs": True, "top_logprobs": NUM_TOPS}
            async with (
                aiohttp.ClientSession(timeout=timeout, headers=headers) as session,
                session.post(f"{self._url}/chat/completions", json=asked) as reply,
            ):
                if reply.status != 200:
                    raise InputError(await _reason(reply))
                async for raw in reply.content:
                    if raw.startswith(b"data: {"):
                        yield _piece(json.loads(raw[6:]))
        except (aiohttp.ClientError, TimeoutError) as e:
            raise InputError(f"{model.name} has stopped answering ({type(e).__name__}): ask again.") from e
        finally:
            self._streams -= 1
            self._used = time.monotonic()

    async def close(self) -> None:
        """End the model's process."""
        await self._end()

    async def _end(self) -> None:
        process, self._process = self._process, None
        if self._watch is not None and self._watch is not asyncio.current_task():
            self._watch.cancel()
        self._watch = None
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), 10)
        except TimeoutError:
            process.kill()
            await process.wait()

    async def _end_when_idle(self) -> None:
        while self._streams or time.monotonic() < self._used + IDLE_SECONDS:
            await asyncio.sleep(IDLE_SECONDS / 10)
        async with self._lock:
            await self._end()


async def _drain(stream: asyncio.StreamReader) -> None:
    """Read what nobody needs, so that the process can go on writing."""
    while await stream.read(1 << 16):
        pass


async def _reason(reply: aiohttp.ClientResponse) -> str:
    try:
        return visible(str((await reply.json())["error"]["message"]))
    except (ValueError, LookupError, TypeError, aiohttp.ClientError):
        return f"The model's server refused with status {reply.status}."


def _piece(chunk: dict[str, Any]) -> dict[str, Any]:
    """A chunk of the served model as the page gets it."""
    if "error" in chunk:
        raise InputError(visible(str(chunk["error"].get("message", "The model failed."))))
    choice = (chunk.get("choices") or [{}])[0]
    piece: dict[str, Any] = {"text": (choice.get("delta") or {}).get("content") or ""}
    if entries := (choice.get("logprobs") or {}).get("content"):
        piece["tokens"] = [
            [one["token"], round(one["logprob"], 4), [[top["token"], round(top["logprob"], 4)] for top in one.get("top_logprobs", ())]]
            for one in entries
        ]
    if choice.get("finish_reason"):
        piece["finish"] = choice["finish_reason"]
    return piece
