"""Routes of work: projects, queues, answers, and what experts settle.

What an annotator gets is blind here, not in the page: no model, reward, judge or verdict, and no answer of anybody else.
"""

import json
from collections.abc import Mapping
from threading import Event
from typing import Any

from aiohttp import web

from gristmill.core.errors import InputError
from gristmill.studio import asking
from gristmill.studio import export as exports
from gristmill.studio.agreement import agreement
from gristmill.studio.apart import Told
from gristmill.studio.database import Unreachable
from gristmill.studio.rounds import decided_checks, open_checks
from gristmill.studio.security import EXPERTS
from gristmill.studio.service import PERSON, Handler, Routes, body_of, json_reply, number_of, progress_reply, text_of, whole_of
from gristmill.studio.sources import cut
from gristmill.studio.store import EXPERT, LEASE_SECONDS, Person, Refused
from gristmill.studio.tasks import CHECK, KINDS, PAIR, RATE, check_need, from_sides, swapped

MAX_ANSWERS = 200  # in one request
MAX_PROJECT_PROMPTS = 100_000
MAX_GUIDELINE_CHARS = 20_000
NAMES = {RATE: "Ratings", PAIR: "Comparisons"}
MAX_GONE = 50  # times that items are dealt anew because rows are gone


class WorkRoutes(Routes):
    """Projects and the work in them."""

    @property
    def handlers(self) -> Mapping[tuple[str, str], Handler]:
        return {
            ("GET", "/projects"): self.projects,
            ("POST", "/projects"): self.create_project,
            ("POST", "/projects/{project}/guideline"): self.set_guideline,
            ("GET", "/queue"): self.queue,
            ("POST", "/answers"): self.answers,
            ("POST", "/flags"): self.flag,
            ("POST", "/leases/renew"): self.renew,
            ("GET", "/items/{item}/text"): self.item_text,
            ("GET", "/items/{item}"): self.item,
            ("POST", "/items/{item}/resolve"): self.resolve,
            ("GET", "/progress/{project}"): self.progress,
            ("GET", "/statistics/{project}"): self.statistics,
        }

    async def projects(self, request: web.Request) -> web.StreamResponse:
        """All projects; to annotators without where their rows come from, which could tell what wrote them."""
        await self.in_thread(open_checks, self.store, self.sources)
        found = await self.in_thread(self.store.projects)
        mine = await self.in_thread(self.store.answered, request[PERSON])
        decided = await self.in_thread(decided_checks, self.sources)
        found = [p | {"mine": mine.get(p["id"], 0), "decided": p["settings"].get("check") in decided} for p in found]
        blind = request[PERSON].role not in ("owner", "expert", "reader")
        names = ("id", "name", "kind", "guideline", "guideline_text", "items", "closed", "mine", "decided")
        return json_reply({"projects": [{name: p[name] for name in names} if blind else p for p in found]})

    async def create_project(self, request: web.Request) -> web.StreamResponse:
        body = await body_of(request)
        kind, need = body.get("kind"), check_need(body.get("need", 1))
        if kind not in KINDS:
            raise InputError(f"A project is one of {', '.join(KINDS)}.")
        num, seed = whole_of(body, "num", 100, low=1, high=MAX_PROJECT_PROMPTS), whole_of(body, "seed", 0, low=0, high=1 << 31)
        source, guideline = text_of(body, "source"), text_of(body, "guideline", MAX_GUIDELINE_CHARS)
        name = text_of(body, "name") or NAMES[str(kind)]  # not the source, which annotators are not to know
        strategy = text_of(body, "strategy") or asking.RANDOM
        settings = {"num": num, "seed": seed, "strategy": strategy}
        made = list[str]()

        def make(told: Told, stop: Event) -> dict[str, Any]:
            items = asking.choose_items(self.sources, source, str(kind), num=num, seed=seed, strategy=strategy, told=told, stop=stop)
            more: dict[str, Any] = {"source": source, "need": need, "guideline": guideline, "by": request[PERSON], "settings": settings}
            made.append(self.store.create_project(str(kind), name, items, **more))
            return {"id": made[0], "items": len(items)}

        reply = await progress_reply(request, self.service, make)
        if made:
            await self.service.events.publish(project=made[0])
        return reply

    async def set_guideline(self, request: web.Request) -> web.StreamResponse:
        body, project = await body_of(request), request.match_info["project"]
        version = await self.in_thread(self.store.set_guideline, project, text_of(body, "guideline", MAX_GUIDELINE_CHARS), request[PERSON])
        await self.service.events.publish(project=project)
        return json_reply({"guideline": version})

    async def queue(self, request: web.Request) -> web.StreamResponse:
        """Items that this person holds, with their texts. One whose rows are gone is flagged as broken, and another comes."""
        project, num = request.query.get("project", ""), number_of(request, "n", 3)
        found = await self.in_thread(self.store.project, project)

        def deal() -> list[dict[str, Any]]:
            if found["kind"] == CHECK and found["settings"].get("check") in decided_checks(self.sources):
                return []
            for _ in range(MAX_GONE):
                items = self.store.deal(project, request[PERSON], num)
                shown = [(item, exports.rows_of(self.sources, item | _places(item))) for item in items]
                for item, rows in shown:
                    if rows is None:
                        self.store.flag(request[PERSON], item["id"], "broken", "its row is gone")
                if all(rows is not None for _, rows in shown):
                    return [_blind(item, rows or [], found["kind"], request[PERSON]) for item, rows in shown]
            raise Refused(409, "The rows of this project are gone: ask its owner to put their file back.")

        items = await self.in_thread(deal)
        progress = await self.in_thread(self.store.progress, project, request[PERSON])
        return json_reply({"items": items, "guideline": found["guideline"], "lease": LEASE_SECONDS, "progress": progress})

    async def answers(self, request: web.Request) -> web.StreamResponse:
        """Answers of the page, each accepted or refused on its own: nothing is held up by one that cannot be stored."""
        answers = (await body_of(request)).get("answers")
        if not isinstance(answers, list) or not 0 < len(answers) <= MAX_ANSWERS or not all(isinstance(a, dict) for a in answers):
            raise InputError(f"Send `answers`, a list of 1 to {MAX_ANSWERS}.")
        person = request[PERSON]

        def submit() -> list[dict[str, Any]]:
            out = []
            for answer in answers:
                try:
                    out.append(self.store.submit(person, self._canonical(answer, person)) | {"status": 200})
                except Refused as e:
                    newest = e.more.get("newest")
                    if newest:
                        newest = newest | {"content": from_sides(newest["content"], swapped(str(answer.get("item")), person.id))}
                    out.append({"id": answer.get("id"), "status": e.status, "error": str(e), "newest": newest})
                except Unreachable:
                    raise
                except InputError as e:
                    out.append({"id": answer.get("id"), "status": 400, "error": str(e)})
            return out

        results = await self.in_thread(submit)
        await self.tell([str(result.get("item")) for result in results if result["status"] == 200])
        return json_reply({"results": results}, 200 if any(r["status"] == 200 for r in results) else results[0]["status"])

    def _canonical(self, answer: dict[str, Any], person: Person) -> dict[str, Any]:
        """An answer whose preference speaks of the first and second answer, not of left and right."""
        content, item = answer.get("content"), answer.get("item")
        strength = content.get("preference") if isinstance(content, dict) else None
        turn = isinstance(strength, int) and not isinstance(strength, bool) and swapped(str(item), person.id)
        return answer | {"content": from_sides(dict(content), True)} if turn and isinstance(content, dict) else answer

    async def tell(self, items: list[str]) -> None:
        found = {(await self.in_thread(self.store.item, item))["project"] for item in items[-1:]}
        for project in found:
            await self.service.events.publish(project=project)

    async def flag(self, request: web.Request) -> web.StreamResponse:
        body = await body_of(request)
        item = text_of(body, "item")
        if body.get("undo") is True:
            await self.in_thread(self.store.unflag, request[PERSON], item)
        else:
            await self.in_thread(self.store.flag, request[PERSON], item, text_of(body, "kind"), text_of(body, "note"))
        return json_reply({})

    async def renew(self, request: web.Request) -> web.StreamResponse:
        items = (await body_of(request)).get("items")
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise InputError("Send `items`, a list of ids.")
        return json_reply({"items": await self.in_thread(self.store.renew, request[PERSON], items)})

    async def item_text(self, request: web.Request) -> web.StreamResponse:
        """A piece of a long text of an item that this person holds or has answered."""
        name, person = request.match_info["item"], request[PERSON]

        def piece() -> dict[str, Any]:
            item = self.store.item(name)
            rows = exports.rows_of(self.sources, item | _places(item)) if self.store.may_see(person, name) else None
            if rows is None:
                raise Refused(404, "This item is not in your queue any more.")
            settles = person.role in EXPERTS and request.query.get("settle") == "1"
            texts = _texts(item, rows, None if settles else person)
            number = number_of(request, "part", 0)
            if number >= len(texts):
                raise Refused(404, "This item has no such text.")
            return cut(texts[number], number_of(request, "from", 0))

        return json_reply(await self.in_thread(piece))

    async def item(self, request: web.Request) -> web.StreamResponse:
        """An item with everybody's answers, for who settles it."""
        name = request.match_info["item"]

        def read() -> dict[str, Any]:
            item = self.store.item(name)
            rows = exports.rows_of(self.sources, item | _places(item))
            if rows is None:
                raise Refused(404, "The row of this item is gone.")
            history = [a | {"person": a["pseudonym"]} for a in self.store.history(name)]
            return _shown(item, exports.answer_texts(rows), rows[0]["messages"], item["kind"]) | {
                "history": history,
                "state": item["state"],
            }

        return json_reply(await self.in_thread(read))

    async def resolve(self, request: web.Request) -> web.StreamResponse:
        """An expert's decision: an answer of that role, which is the item's label."""
        body, name = await body_of(request), request.match_info["item"]
        result = await self.in_thread(self.store.submit, request[PERSON], body | {"item": name}, EXPERT)
        await self.tell([name])
        return json_reply(result)

    async def progress(self, request: web.Request) -> web.StreamResponse:
        return json_reply(await self.in_thread(self.store.progress, request.match_info["project"], request[PERSON]))

    async def statistics(self, request: web.Request) -> web.StreamResponse:
        given = request.query.get("guideline")
        guideline = number_of(request, "guideline", 0) if given is not None else None
        if (await self.in_thread(self.store.project, request.match_info["project"]))["kind"] == CHECK:
            raise Refused(404, "A check has no agreement: the run's screen shows what people found.")
        return json_reply(await self.in_thread(agreement, self.store, request.match_info["project"], guideline=guideline))


def _places(item: dict[str, Any]) -> dict[str, Any]:
    return {name: json.loads(item[name]) if isinstance(item[name], str) else item[name] for name in ("places", "row_ids")}


def _texts(item: dict[str, Any], rows: list[dict[str, Any]], person: Person | None) -> list[str]:
    """All texts of an item in the order in which a person sees them, or, for None, in which they are stored: turns, then answers."""
    answers = exports.answer_texts(rows)
    if len(answers) > 1 and person is not None and swapped(item["id"], person.id):
        answers = answers[::-1]
    return [m["content"] for m in rows[0]["messages"]] + answers


def _blind(item: dict[str, Any], rows: list[dict[str, Any]], kind: str, person: Person) -> dict[str, Any]:
    """An item as an annotator gets it: the turns and the answers, and nothing that tells where they come from."""
    turns = rows[0]["messages"]
    return _shown(item, _texts(item, rows, person)[len(turns) :], turns, kind)


def _shown(item: dict[str, Any], answers: list[str], turns: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    messages = [{"role": m["role"], **cut(m["content"])} for m in turns]
    return {"id": item["id"], "kind": kind, "messages": messages, "answers": [cut(text) for text in answers[: 2 if kind == PAIR else 1]]}
