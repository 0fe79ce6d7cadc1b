"""A model behind the OpenAI protocol: `/v1/models` and `/v1/chat/completions`, answered in batches by the engine.

Source of the protocol: OpenAI's API reference, chat completions.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from gristmill.chat import Conversation, check, conversation
from gristmill.engine.generator import Completion, Generator, Request, Sampling
from gristmill.errors import InputError
from gristmill.rows import make_id

LARGEST_BODY = 4 << 20  # bytes
MOST_SAMPLES = 128
MOST_TOP_K = 1 << 20
COLDEST = 1e-3  # below, logits would overflow, and the likeliest token is as good as certain
KNOWN = {"model", "messages", "temperature", "top_p", "top_k", "max_tokens", "max_completion_tokens", "n", "seed", "logprobs", "stream"}


@dataclass
class _Waiting:
    request: Request
    turn: asyncio.Future[list[Completion]]


class Server:
    """Answers requests with a generator that runs in a thread of its own: what waits goes through it together.

    Args:
        count: tokens of a conversation as a prompt.
        context: tokens that the model can see.
    """

    def __init__(self, generator: Generator, count: Callable[[Conversation], int], context: int):
        self.generator, self.count, self.context = generator, count, context
        self._waiting: queue.Queue[_Waiting | None] = queue.Queue()
        self._number = 0
        self.thread = threading.Thread(target=self._work, daemon=True)

    def app(self) -> web.Application:
        """The routes; the engine's thread starts and stops with them."""
        app = web.Application(client_max_size=LARGEST_BODY)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)

        async def start(app: web.Application) -> None:
            self._loop = asyncio.get_running_loop()
            self.thread.start()

        async def stop(app: web.Application) -> None:
            self._waiting.put(None)

        app.on_startup.append(start)
        app.on_cleanup.append(stop)
        return app

    def _work(self) -> None:
        """The engine's thread: one run after another, each of all that waits."""
        while (first := self._waiting.get()) is not None:
            self._run(first)

    def _run(self, first: _Waiting) -> None:
        waiting: dict[int, _Waiting] = {}

        def coming() -> Iterator[Request]:
            one: _Waiting | None = first
            while one is not None:
                if not one.turn.done():  # else its client has gone
                    waiting[id(one.request)] = one
                    yield one.request
                try:
                    one = self._waiting.get_nowait()
                except queue.Empty:
                    return
            self._waiting.put(None)  # the end is for the thread to see

        try:
            for request, outs in self.generator.generate(coming()):
                self._loop.call_soon_threadsafe(_settle, waiting.pop(id(request)).turn, outs)
        except Exception:  # one of them broke the run: each by itself, so that only that one fails
            for one in waiting.values():
                self._loop.call_soon_threadsafe(_settle, one.turn, self._alone(one.request))

    def _alone(self, request: Request) -> list[Completion] | Exception:
        try:
            ((_, outs),) = self.generator.generate([request])
        except Exception as e:
            return e
        return outs

    async def _models(self, _: web.Request) -> web.Response:
        model = {"id": self.generator.name, "object": "model", "created": 0, "owned_by": "gristmill"}
        return web.json_response({"object": "list", "data": [model]})

    async def _chat(self, http: web.Request) -> web.Response:
        try:
            body = await http.json()
        except (ValueError, RecursionError, LookupError, web.HTTPBadRequest):
            return _error(400, "the body is not JSON")
        try:
            request, model = self._request(body)
        except (InputError, TypeError, ValueError, OverflowError) as e:
            return _error(400, str(e))
        if model != self.generator.name:
            return _error(404, f"the model {model!r} does not exist; this server has {self.generator.name!r}")
        waiting = _Waiting(request, asyncio.get_running_loop().create_future())
        self._waiting.put(waiting)
        try:
            outs = await waiting.turn
        except InputError as e:
            return _error(400, str(e))
        except Exception as e:
            return _error(500, f"the engine failed ({type(e).__name__})")
        return web.json_response(_answer(request, outs, model, self.count(request.messages), bool(body.get("logprobs"))))

    def _request(self, body: Any) -> tuple[Request, str]:
        if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
            raise InputError("the body must be an object with `messages`")
        if unknown := set(body) - KNOWN:
            raise InputError(f"unknown field {sorted(unknown)[0]!r}")
        if body.get("stream"):
            raise InputError("streaming is not offered")
        talk = conversation(body["messages"])
        check(talk)
        if talk[-1].role != "user":
            raise InputError("the last message must be the user's")
        if (num := self.count(talk)) >= self.context:
            raise InputError(f"the conversation has {num} tokens and the model's context is {self.context}: shorten it")
        most = body.get("max_completion_tokens", body.get("max_tokens", 256))
        if not all(isinstance(body.get(name) or 0, int) for name in ("n", "top_k", "seed")) or not isinstance(most, int):
            raise InputError("n, top_k, seed and max_tokens must be whole numbers")
        if body.get("n", 1) > MOST_SAMPLES:
            raise InputError(f"n must be at most {MOST_SAMPLES}")
        temperature = float(body.get("temperature", 1.0))
        sampling = Sampling(
            temperature=0.0 if 0 <= temperature < COLDEST else temperature,
            top_p=float(body.get("top_p", 1.0)),
            top_k=min(body.get("top_k", 0), MOST_TOP_K),
            max_tokens=min(most, self.context),
            n=body.get("n", 1),
        )
        self._number += 1
        seed = body.get("seed")
        # the engine draws by id and seed: where a seed is given, equal requests shall have equal answers
        name = f"chat-{self._number}" if seed is None else make_id(body["messages"], seed)
        return Request(name, talk, sampling, int(seed or 0)), str(body.get("model", ""))


def _settle(turn: asyncio.Future[list[Completion]], result: list[Completion] | Exception) -> None:
    if turn.done():  # the client has gone
        return
    if isinstance(result, Exception):
        turn.set_exception(result)
    else:
        turn.set_result(result)


def _answer(request: Request, outs: list[Completion], model: str, num_prompt: int, logprobs: bool) -> dict[str, Any]:
    choices = [
        {
            "index": number,
            "message": {"role": "assistant", "content": out.text},
            "logprobs": {"content": [{"token": "", "logprob": value} for value in out.logprobs]} if logprobs else None,
            "finish_reason": out.finish,
        }
        for number, out in enumerate(outs)
    ]
    tokens = sum(out.num_tokens for out in outs)
    usage = {"prompt_tokens": num_prompt, "completion_tokens": tokens, "total_tokens": num_prompt + tokens}
    return {"id": request.id, "object": "chat.completion", "created": int(time.time()), "model": model, "choices": choices, "usage": usage}


def _error(status: int, words: str) -> web.Response:
    return web.json_response({"error": {"message": words, "type": "invalid_request_error"}}, status=status)
