"""HTTP API of the studio, and the page's files: every route with its roles, one sentence for every error.

What an annotator gets is blind here, not in the page: no model, reward, judge or verdict, and no answer of anybody else.
"""

import asyncio
import contextlib
import functools
import json
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web

from gristmill.core.echo import echo
from gristmill.core.errors import InputError
from gristmill.runs.reader import reading_back
from gristmill.studio import export as exports
from gristmill.studio.agreement import agreement
from gristmill.studio.database import Unreachable
from gristmill.studio.security import (
    COOKIE,
    EXPERTS,
    HEADERS,
    INVITATION_SECONDS,
    ROUTES,
    SESSION_SECONDS,
    Tries,
    check_password,
    hash_password,
    key_of,
    new_token,
)
from gristmill.studio.sources import OF_KIND, Sources, cut
from gristmill.studio.store import EXPERT, LEASE_SECONDS, OWNER, ROLES, Person, Refused, Store
from gristmill.studio.tasks import KINDS, PAIR, RATE, from_sides, swapped
from gristmill.workflows.dataset.lineage import lineage

API = "/studio/api"
PAGE = Path(__file__).parent / "page"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
MAX_BODY_BYTES = 1 << 20
BODY_SECONDS = 30.0
NUM_THREADS = 8
MAX_ANSWERS = 200  # in one request
MAX_PROJECT_PROMPTS = 100_000
MAX_GUIDELINE_CHARS = 20_000
NAMES = {RATE: "Ratings", PAIR: "Comparisons"}
MAX_GONE = 50  # times that items are dealt anew because rows are gone
MAX_STREAMS = 200  # of events, open at once
PULSE_SECONDS = 20.0
PERSON = web.RequestKey("person", Person)
T = TypeVar("T")


class Events:
    """Feed of server-sent events: the last ones are kept, so that a page that comes back gets what it has missed."""

    def __init__(self) -> None:
        self._number = int(time.time() * 1000)  # goes on after a restart
        self._recent: deque[tuple[int, dict[str, Any]]] = deque(maxlen=500)
        self._changed = asyncio.Condition()
        self.closed = False
        self.num_streams = 0

    async def publish(self, **event: Any) -> None:
        """Add an event. It goes to everybody, so it names a project and nothing else."""
        async with self._changed:
            self._number += 1
            self._recent.append((self._number, event))
            self._changed.notify_all()

    async def close(self) -> None:
        """End all streams."""
        async with self._changed:
            self.closed = True
            self._changed.notify_all()

    async def after(self, number: int) -> AsyncIterator[tuple[int, dict[str, Any]] | None]:
        """Events after a number as they come; None where there was none for a while."""
        number = number or self._number
        while not self.closed:
            new = [event for event in list(self._recent) if event[0] > number]
            for event in new:
                number = event[0]
                yield event
            if new:
                continue
            async with self._changed:
                if self._number > number or self.closed:
                    continue
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), PULSE_SECONDS)
                    continue
            yield None


class Studio:
    """Server of a studio.

    Args:
        origins: that browsers may come from; others' requests are refused, so that no page of a stranger acts for somebody.
        secure: whether cookies are sent over TLS alone.
        owner_key: hash of the token by which the owner comes in, once.
    """

    def __init__(self, store: Store, sources: Sources, origins: frozenset[str], *, secure: bool = False, owner_key: str = ""):
        self.store, self.sources, self.origins, self.secure, self.owner_key = store, sources, origins, secure, owner_key
        self.hosts = frozenset(origin.partition("://")[2] for origin in origins)
        self.threads = ThreadPoolExecutor(NUM_THREADS, "studio")
        self.tries = Tries()
        self.handlers: dict[tuple[str, str], Callable[[web.Request], Awaitable[web.StreamResponse]]] = {
            ("POST", "/session"): self._log_in,
            ("DELETE", "/session"): self._log_out,
            ("GET", "/me"): self._me,
            ("GET", "/projects"): self._projects,
            ("POST", "/projects"): self._create_project,
            ("POST", "/projects/{project}/guideline"): self._set_guideline,
            ("GET", "/queue"): self._queue,
            ("POST", "/answers"): self._answers,
            ("POST", "/flags"): self._flag,
            ("POST", "/leases/renew"): self._renew,
            ("GET", "/items/{item}/text"): self._item_text,
            ("GET", "/items/{item}"): self._item,
            ("POST", "/items/{item}/resolve"): self._resolve,
            ("GET", "/progress/{project}"): self._progress,
            ("GET", "/statistics/{project}"): self._statistics,
            ("GET", "/sources"): self._sources,
            ("GET", "/rows"): self._rows,
            ("GET", "/row"): self._row,
            ("GET", "/row/text"): self._row_text,
            ("GET", "/row/lineage"): self._lineage,
            ("GET", "/people"): self._people,
            ("POST", "/invitations"): self._invite,
            ("DELETE", "/people/{person}"): self._remove_person,
            ("GET", "/events"): self._events,
            ("GET", "/export/{name}"): self._export,
        }
        assert self.handlers.keys() == ROUTES.keys()

    def app(self) -> web.Application:
        """Application with its routes."""
        app = web.Application(middlewares=[self._around], client_max_size=MAX_BODY_BYTES)
        for (method, path), handler in self.handlers.items():
            app.router.add_route(method, API + path, functools.partial(self._checked, ROUTES[method, path], handler))
        app.router.add_get("/", self._page)
        app.router.add_get("/page/{file:.+}", self._page)

        async def start(_: web.Application) -> None:
            self.events = Events()

        async def end_streams(_: web.Application) -> None:
            await self.events.close()

        async def stop(_: web.Application) -> None:
            self.threads.shutdown(wait=True, cancel_futures=True)

        app.on_startup.append(start)
        app.on_shutdown.append(end_streams)
        app.on_cleanup.append(stop)
        return app

    # ---- what stands around all routes ----

    @web.middleware
    async def _around(self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
        try:
            self._check_origin(request)
            reply = await handler(request)
        except Refused as e:
            reply = _error(e.status, str(e), **e.more)
        except Unreachable as e:
            echo(f"gristmill studio: {e}", err=True)
            reply = _error(503, "The database does not answer: what you said is kept in the page and sent again.")
        except InputError as e:
            reply = _error(400, str(e))
        except web.HTTPRequestEntityTooLarge:
            reply = _error(413, f"The request has more than {MAX_BODY_BYTES:,} bytes: send less at once.")
        except web.HTTPNotFound:
            reply = _error(404, "There is nothing at this address.")
        except web.HTTPMethodNotAllowed:
            reply = _error(405, "This address takes no such method.")
        except web.HTTPException as e:
            reply = _error(e.status, e.reason)
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception as e:  # a bug: what it says may hold foreign text
            echo(f"gristmill studio: {type(e).__name__} in {request.method} {request.path}: {e}", err=True)
            reply = _error(500, f"The server failed ({type(e).__name__}): nothing that was saved is lost.")
        if not reply.prepared:
            for name, value in HEADERS.items():
                reply.headers[name] = value
            reply.headers.setdefault("Cache-Control", "no-store")
        return reply

    def _check_origin(self, request: web.Request) -> None:
        """Refuse other names of this host (DNS rebinding), and what a page of somebody else sends."""
        if request.headers.get("Host", "").lower() not in self.hosts:
            raise Refused(421, "This server goes by another name: ask the address that it printed, or start it with --url.")
        if request.method not in ("GET", "HEAD"):
            if request.headers.get("Origin", "").lower() not in self.origins:
                raise Refused(403, "This request does not come from the studio's own page.")
            if request.body_exists and request.content_type != "application/json":
                raise Refused(415, "Send JSON, as application/json.")

    async def _checked(
        self, roles: frozenset[str] | None, handler: Callable[[web.Request], Awaitable[web.StreamResponse]], request: web.Request
    ) -> web.StreamResponse:
        token = request.cookies.get(COOKIE, "")
        person = await self._in_thread(self.store.session, key_of(token)) if token else None
        if roles is not None:
            if person is None:
                raise Refused(401, "Log in first: your session has ended.")
            if person.role not in roles:
                raise Refused(403, f"This is not for the role of {person.role}.")
        if person is not None:
            request[PERSON] = person
        return await handler(request)

    async def _in_thread(self, work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.threads, functools.partial(work, *args, **kwargs))

    async def _body(self, request: web.Request) -> dict[str, Any]:
        try:
            async with asyncio.timeout(BODY_SECONDS):
                raw = await request.read()
        except TimeoutError:
            raise Refused(408, f"The request did not arrive within {BODY_SECONDS:g} s.") from None
        try:
            body = json.loads(raw or b"{}")
        except (ValueError, RecursionError):
            raise InputError("The request is not JSON.") from None
        if not isinstance(body, dict):
            raise InputError("The request must be a JSON object.")
        return body

    # ---- people ----

    async def _log_in(self, request: web.Request) -> web.StreamResponse:
        """By the owner's token, an invitation with a new name and password, or a name and password."""
        body = await self._body(request)
        token, name, password = (_text(body, field) for field in ("token", "name", "password"))
        keys = (f"address {request.remote}", *([f"name {name}"] if name else []))
        if not self.tries.allowed(*keys):
            raise Refused(429, "Too many wrong tries: wait a quarter of an hour.")
        person: Person | None = None
        if token and self.owner_key and key_of(token) == self.owner_key:
            self.owner_key = ""  # it works once
            person = await self._in_thread(self.store.owner)
        elif token and name:
            secret = await self._in_thread(hash_password, password)
            try:
                person = await self._in_thread(self.store.accept, key_of(token), name, secret)
            except Refused:
                self.tries.fail(keys[0])
                raise
        elif name and password:
            found = await self._in_thread(self.store.secret_of, name)
            if await self._in_thread(check_password, password, found[1] if found else ""):
                assert found is not None
                person = found[0]
        if person is None:
            self.tries.fail(*keys)
            words = "This link was used already: the program prints a new one when it is started." if token and not name else ""
            raise Refused(403, words or "The name or the password is wrong.")
        session = new_token()
        await self._in_thread(self.store.open_session, key_of(session), person, SESSION_SECONDS)
        reply = _json(_me(person))
        reply.set_cookie(COOKIE, session, max_age=int(SESSION_SECONDS), httponly=True, samesite="Strict", secure=self.secure, path="/")
        return reply

    async def _log_out(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        key = key_of(request.cookies.get(COOKIE, ""))
        await self._in_thread(self.store.close_sessions, key, request[PERSON], body.get("everywhere") is True)
        reply = _json({})
        reply.del_cookie(COOKIE, path="/", httponly=True, samesite="Strict", secure=self.secure)
        return reply

    async def _me(self, request: web.Request) -> web.StreamResponse:
        person = request.get(PERSON)
        return _json(_me(person) if person else {"role": None})

    async def _people(self, request: web.Request) -> web.StreamResponse:
        return _json({"people": await self._in_thread(self.store.people)})

    async def _invite(self, request: web.Request) -> web.StreamResponse:
        role = (await self._body(request)).get("role")
        if role not in ROLES or role == OWNER:
            raise InputError("An invitation is for an expert, an annotator or a reader.")
        token = new_token()
        await self._in_thread(self.store.invite, key_of(token), str(role), INVITATION_SECONDS)
        return _json({"token": token, "days": int(INVITATION_SECONDS / 86400)})

    async def _remove_person(self, request: web.Request) -> web.StreamResponse:
        await self._in_thread(self.store.remove_person, request.match_info["person"], request[PERSON])
        return _json({})

    # ---- projects ----

    async def _projects(self, request: web.Request) -> web.StreamResponse:
        """All projects; to annotators without where their rows come from, which could tell what wrote them."""
        found = await self._in_thread(self.store.projects)
        blind = request[PERSON].role not in ("owner", "expert", "reader")
        names = ("id", "name", "kind", "guideline", "guideline_text", "items", "closed")
        return _json({"projects": [{name: p[name] for name in names} if blind else p for p in found]})

    async def _create_project(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        kind, num, seed, need = body.get("kind"), body.get("num", 100), body.get("seed", 0), body.get("need", 1)
        if kind not in KINDS:
            raise InputError(f"A project is one of {', '.join(KINDS)}.")
        for name, value, low, high in (("num", num, 1, MAX_PROJECT_PROMPTS), ("seed", seed, 0, 1 << 31)):
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise InputError(f"{name} must be a whole number from {low:,} to {high:,}.")
        source, guideline = _text(body, "source"), _text(body, "guideline", MAX_GUIDELINE_CHARS)
        name = _text(body, "name") or NAMES[str(kind)]  # not the source, which annotators are not to know
        items = await self._in_thread(self.sources.choose_items, source, str(kind), num=num, seed=seed)
        project = await self._in_thread(
            self.store.create_project,
            str(kind),
            name,
            items,
            source=source,
            need=need,
            guideline=guideline,
            by=request[PERSON],
            settings={"num": num, "seed": seed},
        )
        await self.events.publish(project=project)
        return _json({"id": project, "items": len(items)})

    async def _set_guideline(self, request: web.Request) -> web.StreamResponse:
        body, project = await self._body(request), request.match_info["project"]
        version = await self._in_thread(self.store.set_guideline, project, _text(body, "guideline", MAX_GUIDELINE_CHARS), request[PERSON])
        await self.events.publish(project=project)
        return _json({"guideline": version})

    # ---- work ----

    async def _queue(self, request: web.Request) -> web.StreamResponse:
        """Items that this person holds, with their texts. One whose rows are gone is flagged as broken, and another comes."""
        project, num = request.query.get("project", ""), _number(request, "n", 3)
        found = await self._in_thread(self.store.project, project)

        def deal() -> list[dict[str, Any]]:
            for _ in range(MAX_GONE):
                items = self.store.deal(project, request[PERSON], num)
                shown = [(item, exports.rows_of(self.sources, item | _places(item))) for item in items]
                for item, rows in shown:
                    if rows is None:
                        self.store.flag(request[PERSON], item["id"], "broken", "its row is gone")
                if all(rows is not None for _, rows in shown):
                    return [_blind(item, rows or [], found["kind"], request[PERSON]) for item, rows in shown]
            raise Refused(409, "The rows of this project are gone: ask its owner to put their file back.")

        items = await self._in_thread(deal)
        progress = await self._in_thread(self.store.progress, project, request[PERSON])
        return _json({"items": items, "guideline": found["guideline"], "lease": LEASE_SECONDS, "progress": progress})

    async def _answers(self, request: web.Request) -> web.StreamResponse:
        """Answers of the page, each accepted or refused on its own: nothing is held up by one that cannot be stored."""
        answers = (await self._body(request)).get("answers")
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

        results = await self._in_thread(submit)
        await self._tell([str(result.get("item")) for result in results if result["status"] == 200])
        return _json({"results": results}, 200 if any(r["status"] == 200 for r in results) else results[0]["status"])

    def _canonical(self, answer: dict[str, Any], person: Person) -> dict[str, Any]:
        """An answer whose preference speaks of the first and second answer, not of left and right."""
        content, item = answer.get("content"), answer.get("item")
        strength = content.get("preference") if isinstance(content, dict) else None
        turn = isinstance(strength, int) and not isinstance(strength, bool) and swapped(str(item), person.id)
        return answer | {"content": from_sides(dict(content), True)} if turn and isinstance(content, dict) else answer

    async def _tell(self, items: list[str]) -> None:
        found = {(await self._in_thread(self.store.item, item))["project"] for item in items[-1:]}
        for project in found:
            await self.events.publish(project=project)

    async def _flag(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        item = _text(body, "item")
        if body.get("undo") is True:
            await self._in_thread(self.store.unflag, request[PERSON], item)
        else:
            await self._in_thread(self.store.flag, request[PERSON], item, _text(body, "kind"), _text(body, "note"))
        return _json({})

    async def _renew(self, request: web.Request) -> web.StreamResponse:
        items = (await self._body(request)).get("items")
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise InputError("Send `items`, a list of ids.")
        return _json({"items": await self._in_thread(self.store.renew, request[PERSON], items)})

    async def _item_text(self, request: web.Request) -> web.StreamResponse:
        """A piece of a long text of an item that this person holds or has answered."""
        name, person = request.match_info["item"], request[PERSON]

        def piece() -> dict[str, Any]:
            item = self.store.item(name)
            rows = exports.rows_of(self.sources, item | _places(item)) if self.store.may_see(person, name) else None
            if rows is None:
                raise Refused(404, "This item is not in your queue any more.")
            settles = person.role in EXPERTS and request.query.get("settle") == "1"
            texts = _texts(item, rows, None if settles else person)
            number = _number(request, "part", 0)
            if number >= len(texts):
                raise Refused(404, "This item has no such text.")
            return cut(texts[number], _number(request, "from", 0))

        return _json(await self._in_thread(piece))

    async def _item(self, request: web.Request) -> web.StreamResponse:
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

        return _json(await self._in_thread(read))

    async def _resolve(self, request: web.Request) -> web.StreamResponse:
        """An expert's decision: an answer of that role, which is the item's label."""
        body, name = await self._body(request), request.match_info["item"]
        result = await self._in_thread(self.store.submit, request[PERSON], body | {"item": name}, EXPERT)
        await self._tell([name])
        return _json(result)

    async def _progress(self, request: web.Request) -> web.StreamResponse:
        return _json(await self._in_thread(self.store.progress, request.match_info["project"], request[PERSON]))

    async def _statistics(self, request: web.Request) -> web.StreamResponse:
        given = request.query.get("guideline")
        guideline = _number(request, "guideline", 0) if given is not None else None
        return _json(await self._in_thread(agreement, self.store, request.match_info["project"], guideline=guideline))

    # ---- rows ----

    async def _sources(self, request: web.Request) -> web.StreamResponse:
        found = await self._in_thread(self.sources.all)
        kinds = {kind: [s.name for s in found if not s.kind or s.kind in rows] for kind, rows in OF_KIND.items()}
        listed = [{"name": s.name, "kind": s.kind, "stage": s.stage} for s in found]
        return _json({"sources": listed, "of_kind": kinds, "folder": self.sources.folder.resolve().name, "is_run": self.sources.is_run})

    async def _rows(self, request: web.Request) -> web.StreamResponse:
        query = request.query
        page = functools.partial(self.sources.page, query.get("source", ""), filter=query.get("filter", ""), sort=query.get("sort", ""))
        return _json(await self._in_thread(page, after=_number(request, "after", -1), num=_number(request, "n", 50)))

    async def _row(self, request: web.Request) -> web.StreamResponse:
        """A row, the other answers to its prompt, and what people have said of it."""
        source, place = request.query.get("source", ""), _number(request, "place", 0)

        def read() -> dict[str, Any]:
            row = self.sources.row(source, place)
            said = self.store.answers_to_row(row["id"]) if row["id"] else []
            answers = [{"person": a["pseudonym"], "role": a["role"], "content": a["content"], "at": a["at"]} for a in said]
            return {"row": _cut_row(row), "siblings": [_cut_row(one) for one in self.sources.siblings(source, place)], "people": answers}

        return _json(await self._in_thread(read))

    async def _row_text(self, request: web.Request) -> web.StreamResponse:
        source, place, part, begin = request.query.get("source", ""), *(_number(request, n, 0) for n in ("place", "part", "from"))

        def piece() -> dict[str, Any]:
            row = self.sources.row(source, place)
            texts = [m["content"] for m in row["messages"]] + [a["text"] for a in row["answers"]]
            if part >= len(texts):
                raise Refused(404, "This row has no such text.")
            return cut(texts[part], begin)

        return _json(await self._in_thread(piece))

    async def _lineage(self, request: web.Request) -> web.StreamResponse:
        if not self.sources.is_run:
            return _json({"lineage": []})

        def read() -> list[dict[str, Any]]:
            with reading_back(self.sources.folder):
                return lineage(self.sources.folder, request.query.get("id", ""))

        return _json({"lineage": await self._in_thread(read)})

    # ---- events, exports, files ----

    async def _events(self, request: web.Request) -> web.StreamResponse:
        if self.events.num_streams >= MAX_STREAMS:
            raise Refused(503, "Too many pages are open: close some.")
        given = request.headers.get("Last-Event-ID") or request.query.get("after", "0")
        reply = web.StreamResponse(headers={**HEADERS, "Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        await reply.prepare(request)
        self.events.num_streams += 1
        try:
            await reply.write(b"retry: 2000\n\n")
            async for event in self.events.after(int(given) if given.isascii() and given.isdigit() and len(given) < 19 else 0):
                line = f"id: {event[0]}\ndata: {json.dumps(event[1])}\n\n" if event else ": still here\n\n"
                await reply.write(line.encode())
        finally:
            self.events.num_streams -= 1
        return reply

    async def _export(self, request: web.Request) -> web.StreamResponse:
        name = exports.check_file(request.match_info["name"])

        def make() -> bytes:
            with tempfile.TemporaryDirectory(prefix="gristmill-studio-") as folder:
                path = Path(folder) / name
                exports.write(self.store, self.sources, name, path)
                self.store.log(request[PERSON], "export", name)
                return path.read_bytes()

        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        return web.Response(body=await self._in_thread(make), content_type="application/octet-stream", headers=headers)

    async def _page(self, request: web.Request) -> web.StreamResponse:
        files = page_files()
        name = request.match_info.get("file", "index.html")
        if name not in files:
            raise web.HTTPNotFound
        return web.Response(body=files[name], content_type=TYPES[Path(name).suffix], charset="utf-8", headers={"Cache-Control": "no-cache"})


@functools.cache
def page_files() -> dict[str, bytes]:
    """The page's files by their path: what is not among them is not served."""
    return {str(path.relative_to(PAGE)): path.read_bytes() for path in sorted(PAGE.rglob("*")) if path.suffix in TYPES}


def _json(value: Any, status: int = 200) -> web.Response:
    return web.json_response(value, status=status)


def _error(status: int, message: str, **more: Any) -> web.Response:
    return web.json_response({"error": message, **more}, status=status)


def _me(person: Person) -> dict[str, Any]:
    return {"id": person.id, "name": person.name, "pseudonym": person.pseudonym, "role": person.role}


def _text(body: dict[str, Any], name: str, most: int = 4000) -> str:
    value = body.get(name, "")
    if not isinstance(value, str) or len(value) > most:
        raise InputError(f"`{name}` must be text of at most {most:,} characters.")
    return value


def _number(request: web.Request, name: str, default: int) -> int:
    value = request.query.get(name)
    if value is None or value == "":
        return default
    if not value.isascii() or not value.isdigit() or len(value) > 12:
        raise InputError(f"`{name}` must be a whole number.")
    return int(value)


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


def _cut_row(row: dict[str, Any]) -> dict[str, Any]:
    messages = [{"role": m["role"], **cut(m["content"])} for m in row["messages"]]
    return row | {"messages": messages, "answers": [{"label": a["label"], **cut(a["text"])} for a in row["answers"]]}
