"""Routes of a run: its stages, curves and monitors while it goes on, and the checks that it waits for. Files alone are read."""

from collections.abc import Mapping
from typing import Any

from aiohttp import web

from gristmill.core.errors import InputError
from gristmill.runs.checks import DECISIONS
from gristmill.studio import live, rounds
from gristmill.studio.service import PERSON, Handler, Routes, body_of, json_reply, number_of
from gristmill.studio.store import Refused


class RunRoutes(Routes):
    """The run that the studio has open."""

    @property
    def handlers(self) -> Mapping[tuple[str, str], Handler]:
        return {
            ("GET", "/run"): self.run,
            ("GET", "/run/{stage}"): self.stage,
            ("GET", "/checks"): self.checks,
            ("POST", "/checks/{stage}"): self.decide,
        }

    async def run(self, request: web.Request) -> web.StreamResponse:
        self._only_runs()
        return json_reply(await self.in_thread(live.overview, self.sources.folder))

    async def stage(self, request: web.Request) -> web.StreamResponse:
        """The curves of a stage, from a step on."""
        self._only_runs()
        stage, after = request.match_info["stage"], number_of(request, "after", 0)
        return json_reply(await self.in_thread(live.curves, self.sources.folder, stage, after=after))

    async def checks(self, request: web.Request) -> web.StreamResponse:
        def read() -> list[dict[str, Any]]:
            rounds.open_checks(self.store, self.sources)
            return rounds.checks_of(self.store, self.sources)

        return json_reply({"checks": await self.in_thread(read)})

    async def decide(self, request: web.Request) -> web.StreamResponse:
        decision = (await body_of(request)).get("decision")
        if decision not in DECISIONS:
            raise InputError(f"A check is decided by {' or '.join(DECISIONS)}.")
        await self.in_thread(rounds.decide, self.store, self.sources, request.match_info["stage"], str(decision), request[PERSON])
        await self.service.events.publish()  # who is at its rows hears that nothing is left
        return json_reply({})

    def _only_runs(self) -> None:
        if not self.sources.is_run:
            raise Refused(404, "This folder holds files of rows and no run.")
