"""Server of the studio: every route with its roles, the page's files, one sentence for every error."""

import asyncio
import functools
import json
from pathlib import Path

from aiohttp import web

from gristmill.core.echo import echo
from gristmill.core.errors import InputError
from gristmill.studio.database import Unreachable
from gristmill.studio.guard import GuardView
from gristmill.studio.routes.people import PeopleRoutes
from gristmill.studio.routes.rows import RowsRoutes
from gristmill.studio.routes.run import RunRoutes
from gristmill.studio.routes.talk import TalkRoutes
from gristmill.studio.routes.work import WorkRoutes
from gristmill.studio.security import COOKIE, HEADERS, ROUTES, key_of
from gristmill.studio.service import PERSON, Events, Handler, Routes, Service, error_reply
from gristmill.studio.sources import Sources
from gristmill.studio.store import Refused, Store

API = "/studio/api"
PAGE = Path(__file__).parent / "page"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
MAX_BODY_BYTES = 1 << 20
MAX_STREAMS = 200  # of events, open at once


class Studio:
    """Server of a studio.

    Args:
        origins: that browsers may come from; others' requests are refused, so that no page of a stranger acts for somebody.
        secure: whether cookies are sent over TLS alone.
        owner_key: hash of the token by which the owner comes in, once.
        guard: what is asked about answers of the red team's models.
    """

    def __init__(
        self,
        store: Store,
        sources: Sources,
        origins: frozenset[str],
        *,
        secure: bool = False,
        owner_key: str = "",
        guard: GuardView | None = None,
    ):
        self.service, self.origins = Service(store, sources), origins
        self.hosts = frozenset(origin.partition("://")[2] for origin in origins)
        self.routes: list[Routes] = [
            PeopleRoutes(self.service, secure=secure, owner_key=owner_key),
            WorkRoutes(self.service),
            RowsRoutes(self.service),
            RunRoutes(self.service),
            TalkRoutes(self.service, guard),
        ]
        self.handlers: dict[tuple[str, str], Handler] = {("GET", "/events"): self._events}
        for routes in self.routes:
            self.handlers |= routes.handlers
        assert self.handlers.keys() == ROUTES.keys()

    def app(self) -> web.Application:
        """Application with its routes."""
        app = web.Application(middlewares=[self._around], client_max_size=MAX_BODY_BYTES)
        for (method, path), handler in self.handlers.items():
            app.router.add_route(method, API + path, functools.partial(self._checked, ROUTES[method, path], handler))
        app.router.add_get("/", self._page)
        app.router.add_get("/page/{file:.+}", self._page)

        async def start(_: web.Application) -> None:
            self.service.events = Events()

        async def end_streams(_: web.Application) -> None:
            await self.service.events.close()
            self.service.sources.close()

        async def stop(_: web.Application) -> None:
            for routes in self.routes:
                await routes.close()
            self.service.threads.shutdown(wait=True, cancel_futures=True)

        app.on_startup.append(start)
        app.on_shutdown.append(end_streams)
        app.on_cleanup.append(stop)
        return app

    # ---- what stands around all routes ----

    @web.middleware
    async def _around(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            self._check_origin(request)
            reply = await handler(request)
        except Refused as e:
            reply = error_reply(e.status, str(e), **e.more)
        except Unreachable as e:
            echo(f"gristmill studio: {e}", err=True)
            reply = error_reply(503, "The database does not answer: what you said is kept in the page and sent again.")
        except InputError as e:
            reply = error_reply(400, str(e))
        except web.HTTPRequestEntityTooLarge:
            reply = error_reply(413, f"The request has more than {MAX_BODY_BYTES:,} bytes: send less at once.")
        except web.HTTPNotFound:
            reply = error_reply(404, "There is nothing at this address.")
        except web.HTTPMethodNotAllowed:
            reply = error_reply(405, "This address takes no such method.")
        except web.HTTPException as e:
            reply = error_reply(e.status, e.reason)
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception as e:  # a bug: what it says may hold foreign text
            echo(f"gristmill studio: {type(e).__name__} in {request.method} {request.path}: {e}", err=True)
            reply = error_reply(500, f"The server failed ({type(e).__name__}): nothing that was saved is lost.")
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

    async def _checked(self, roles: frozenset[str] | None, handler: Handler, request: web.Request) -> web.StreamResponse:
        token = request.cookies.get(COOKIE, "")
        person = await self.service.in_thread(self.service.store.session, key_of(token)) if token else None
        if roles is not None:
            if person is None:
                raise Refused(401, "Log in first: your session has ended.")
            if person.role not in roles:
                raise Refused(403, f"This is not for the role of {person.role}.")
        if person is not None:
            request[PERSON] = person
        return await handler(request)

    async def _events(self, request: web.Request) -> web.StreamResponse:
        if self.service.events.num_streams >= MAX_STREAMS:
            raise Refused(503, "Too many pages are open: close some.")
        given = request.headers.get("Last-Event-ID") or request.query.get("after", "0")
        reply = web.StreamResponse(headers={**HEADERS, "Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        await reply.prepare(request)
        self.service.events.num_streams += 1
        try:
            await reply.write(b"retry: 2000\n\n")
            async for event in self.service.events.after(int(given) if given.isascii() and given.isdigit() and len(given) < 19 else 0):
                line = f"id: {event[0]}\ndata: {json.dumps(event[1])}\n\n" if event else ": still here\n\n"
                await reply.write(line.encode())
        except ConnectionError:
            pass  # the page has gone: nothing that its owner's terminal needs to say
        finally:
            self.service.events.num_streams -= 1
        return reply

    async def _page(self, request: web.Request) -> web.StreamResponse:
        files = page_files()
        name = request.match_info.get("file", "index.html")
        if name not in files:
            raise web.HTTPNotFound
        return web.Response(body=files[name], content_type=TYPES[Path(name).suffix], charset="utf-8", headers={"Cache-Control": "no-cache"})


@functools.cache
def page_files() -> dict[str, bytes]:
    """The page's files by their path: what is not among them is not served. All modules are asked for at once, not as imports are read."""
    files = {str(path.relative_to(PAGE)): path.read_bytes() for path in sorted(PAGE.rglob("*")) if path.suffix in TYPES}
    links = "".join(f'<link rel="modulepreload" href="/page/{name}">\n' for name in files if name.endswith(".js"))
    return files | {"index.html": files["index.html"].replace(b"</head>", links.encode() + b"</head>")}
