"""Studio entry point, `gristmill studio`: a run or a folder of rows, opened for people until interrupted."""

import asyncio
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from gristmill.core.echo import echo
from gristmill.core.errors import InputError
from gristmill.core.logs import limit_logs
from gristmill.core.untrusted import quoted_path
from gristmill.report.sample_files import STUDIO_PORT
from gristmill.studio import export as exports
from gristmill.studio.app import Studio
from gristmill.studio.database import Database, place_of
from gristmill.studio.guard import guard_of
from gristmill.studio.security import key_of, new_token, origins_of
from gristmill.studio.sources import Sources
from gristmill.studio.store import Store

SHUTDOWN_SECONDS = 10.0  # that requests under way may take


@dataclass(frozen=True, kw_only=True)
class StudioArgs:
    """Studio arguments: the address, and where people's answers are kept.

    Attributes:
        url: by which people's browsers reach it, where that is not host and port.
        database: a folder of a local disk, or the URL of a PostgreSQL database; "": the folder `studio` in the run's.
        guard: FORM=URL of the guard that judges answers to attacks; "": none.
        guard_model: name that its endpoint knows it by.
        guard_key_env: environment variable with its key.
    """

    host: str = "127.0.0.1"
    port: int = STUDIO_PORT
    url: str = ""
    database: str = ""
    guard: str = ""
    guard_model: str = ""
    guard_key_env: str = ""


def open_store(folder: Path, database: str = "", *, read_only: bool = False) -> tuple[Store, Sources]:
    """The rows of a folder and the answers that people have given about them.

    Args:
        read_only: look at them beside the server that has them open.

    Raises:
        InputError: the folder holds no rows, or the database cannot be used.
    """
    place, cache = place_of(folder, database)
    sources = Sources(folder, cache)
    return Store(Database(place, read_only=read_only)), sources


def write_exports(folder: Path, database: str, out: Path) -> dict[str, int]:
    """Write people's answers as files of rows; returns their numbers of rows. The studio may be open meanwhile.

    Raises:
        InputError: as `open_store`, nobody has opened the studio yet, or a file cannot be written.
    """
    store, sources = open_store(folder, database, read_only=True)
    try:
        if not store.database.found:
            raise InputError(
                f"{store.database.name} holds no studio, so nobody has said anything: open {folder} with gristmill studio first."
            )
        return exports.export(store, sources, out)
    finally:
        store.database.close()


def serve(folder: Path, args: StudioArgs) -> None:
    """Open a folder for people until interrupted. Prints the owner's link when it is ready.

    Raises:
        InputError: the folder holds no rows, the database or the address cannot be used.
    """
    origins_of(args.host, args.port, args.url)
    guard = guard_of(args.guard, args.guard_model, args.guard_key_env)
    store, sources = open_store(folder, args.database)
    try:
        try:
            listening = socket.create_server((args.host, args.port), family=socket.AF_INET6 if ":" in args.host else socket.AF_INET)
        except (OSError, OverflowError) as e:
            reason = getattr(e, "strerror", None) or e
            raise InputError(f"Nothing can listen at {args.host}:{args.port} ({reason}): choose another --host or --port.") from e
        origins, origin = origins_of(args.host, listening.getsockname()[1], args.url)
        token = new_token()
        studio = Studio(store, sources, origins, secure=origin.startswith("https:"), owner_key=key_of(token), guard=guard)

        def ready() -> None:
            echo(f"{quoted_path(folder)} is open at {origin}/#token={token}")
            echo("The link lets its owner in, once; others are invited on the page. Ctrl-C ends the studio, answers are kept.", err=True)
            sources.look_ahead()

        asyncio.run(_listen(studio, listening, ready))
    finally:
        store.database.close()


async def _listen(studio: Studio, listening: socket.socket, ready: Callable[[], None]) -> None:
    """Answer requests until SIGINT or SIGTERM, and then those that are under way."""
    limit_logs()
    end = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, end.set)
    runner = web.AppRunner(studio.app(), access_log=None, shutdown_timeout=SHUTDOWN_SECONDS)
    await runner.setup()
    try:
        await web.SockSite(runner, listening).start()
        ready()
        await end.wait()
    finally:
        await runner.cleanup()
