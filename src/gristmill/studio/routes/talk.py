"""Routes of talk: models to chat with, rows made of a chat, and attacks on a model."""

import json
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from gristmill.core.errors import InputError
from gristmill.evaluate.attacks import ATTACKS, attack
from gristmill.evaluate.refusals import refusal_class
from gristmill.judge.guards import AEGIS
from gristmill.studio import made
from gristmill.studio.guard import GuardView
from gristmill.studio.models import Model, ModelServer, models_of
from gristmill.studio.service import PERSON, Handler, Routes, Service, body_of, json_reply, lines_reply, text_of, whole_of
from gristmill.studio.store import Refused

MAX_TOKENS, DEFAULT_TOKENS = 4096, 512
MAX_SHOWN = 200  # attacks in a list
THINKING = {True: "detailed thinking on", False: "detailed thinking off"}


class TalkRoutes(Routes):
    """Chat and red team.

    Args:
        guard: says what a guard thinks of an answer, after the person; None: no guard was given.
    """

    def __init__(self, service: Service, guard: GuardView | None):
        super().__init__(service)
        self.guard, self.server = guard, ModelServer()

    @property
    def handlers(self) -> Mapping[tuple[str, str], Handler]:
        return {
            ("GET", "/models"): self.models,
            ("POST", "/chat"): self.chat,
            ("POST", "/made"): self.make_row,
            ("GET", "/attacks"): self.attacks,
            ("POST", "/attacks"): self.add_attack,
            ("POST", "/attacks/transform"): self.transform,
        }

    async def close(self) -> None:
        await self.server.close()

    async def models(self, request: web.Request) -> web.StreamResponse:
        found = await self.in_thread(self._models)
        told = [{"name": model.name, "round": model.round, "thinks": model.thinks} for model in found]
        return json_reply({"models": told, "up": self.server.name})

    def _models(self) -> list[Model]:
        return models_of(self.sources.folder) if self.sources.is_run else []

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """An answer, a line of JSON a piece. When the page goes away, the generation ends."""
        body = await body_of(request)
        model = next((one for one in await self.in_thread(self._models) if one.name == body.get("model")), None)
        if model is None:
            raise Refused(404, "There is no such model here: choose another.")
        turns = made.check_turns(body.get("messages"), answered=False)
        if isinstance(body.get("thinking"), bool) and model.thinks:
            line = THINKING[body["thinking"]]
            has_system = turns[0]["role"] == "system"
            first = {"role": "system", "content": f"{line}\n\n{turns[0]['content']}" if has_system else line}
            turns = [first, *(turns[1:] if has_system else turns)]
        asked: dict[str, Any] = {
            "messages": turns,
            "max_tokens": whole_of(body, "max_tokens", DEFAULT_TOKENS, low=1, high=MAX_TOKENS),
            "seed": whole_of(body, "seed", 0, low=0, high=1 << 31),
            "temperature": _share(body, "temperature", 0.0, 2.0),
            "top_p": _share(body, "top_p", 1.0, 1.0),
        }
        reply = lines_reply()
        await reply.prepare(request)
        pieces = self.server.stream(model, asked)
        try:
            async for piece in pieces:
                await reply.write(json.dumps(piece).encode() + b"\n")
        except InputError as e:  # the answer has begun: its last line says what happened
            await reply.write(json.dumps({"error": str(e)}).encode() + b"\n")
        except ConnectionResetError:
            pass  # the page has gone
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]
        return reply

    async def make_row(self, request: web.Request) -> web.StreamResponse:
        """Keep a chat as a conversation to imitate."""
        body, person = await body_of(request), request[PERSON]
        meta = {name: body[name] for name in ("model", "seed", "edited") if isinstance(body.get(name), str | int | bool)}
        turns = made.check_turns(body.get("messages"), answered=True)
        task = text_of(body, "task", 80)
        await self.in_thread(made.add_demonstration, self.store, person, body.get("id"), task=task, turns=turns, meta=meta)
        return json_reply({})

    # ---- red team ----

    async def attacks(self, request: web.Request) -> web.StreamResponse:
        """Attacks so far, the newest first, and what one can be made of."""
        found = await self.in_thread(made.attacks, self.store)
        names = ("id", "category", "transforms", "model", "outcome", "codes", "at")
        shown = [{name: row[name] for name in names} | {"by": row["pseudonym"], "turns": row["conversation"]} for row in found]
        counts = {outcome: sum(row["outcome"] == outcome for row in found) for outcome in made.OUTCOMES}
        categories = [{"code": category.code, "name": category.name} for category in AEGIS.categories]
        told = {"attacks": shown[::-1][:MAX_SHOWN], "counts": counts, "regressions": len(made.regression_rows(found))}
        return json_reply(told | {"transforms": list(ATTACKS), "categories": categories, "outcomes": made.OUTCOMES})

    async def transform(self, request: web.Request) -> web.StreamResponse:
        body = await body_of(request)
        text, spec = text_of(body, "text", 20_000), text_of(body, "spec")
        seed = whole_of(body, "seed", 0, low=0, high=1 << 31)
        return json_reply({"text": await self.in_thread(attack, text, spec, seed) if spec else text})

    async def add_attack(self, request: web.Request) -> web.StreamResponse:
        """Keep an attack and its outcome by the person; then, not before, tell what programs and the guard make of the answer."""
        body, person = await body_of(request), request[PERSON]
        await self.in_thread(made.add_attack, self.store, person, body)
        turns = body["conversation"]
        answer, asked = turns[-1]["content"], turns[-2]["content"]
        told: dict[str, Any] = {"refusal": refusal_class(answer, asked)}
        if self.guard is not None:
            told["guard"] = await self.in_thread(self.guard.verdict, turns)
        return json_reply(told)


def _share(body: dict[str, Any], name: str, default: float, most: float) -> float:
    value = body.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise InputError(f"{name} must be a number from 0 to {most:g}.")
    return float(value)
