"""Routes of rows: lists by page, single rows with their lineage, and people's answers as files."""

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aiohttp import web

from gristmill.runs.reader import reading_back
from gristmill.studio import export as exports
from gristmill.studio.service import PERSON, Handler, Routes, json_reply, number_of
from gristmill.studio.sources import OF_KIND, PAGE_ROWS, cut
from gristmill.studio.store import Refused
from gristmill.workflows.dataset.lineage import lineage


class RowsRoutes(Routes):
    """Rows of the folder, and exports."""

    @property
    def handlers(self) -> Mapping[tuple[str, str], Handler]:
        return {
            ("GET", "/sources"): self.all_sources,
            ("GET", "/rows"): self.rows,
            ("GET", "/row"): self.row,
            ("GET", "/row/text"): self.row_text,
            ("GET", "/row/lineage"): self.lineage,
            ("GET", "/export/{name}"): self.export,
        }

    async def all_sources(self, request: web.Request) -> web.StreamResponse:
        found = await self.in_thread(self.sources.all)
        kinds = {kind: [s.name for s in found if not s.kind or s.kind in rows] for kind, rows in OF_KIND.items()}
        listed = [{"name": s.name, "kind": s.kind, "stage": s.stage} for s in found]
        return json_reply(
            {"sources": listed, "of_kind": kinds, "folder": self.sources.folder.resolve().name, "is_run": self.sources.is_run}
        )

    async def rows(self, request: web.Request) -> web.StreamResponse:
        query = request.query
        page = functools.partial(self.sources.page, query.get("source", ""), filter=query.get("filter", ""), sort=query.get("sort", ""))
        return json_reply(await self.in_thread(page, after=number_of(request, "after", -1), num=number_of(request, "n", PAGE_ROWS)))

    async def row(self, request: web.Request) -> web.StreamResponse:
        """A row, the other answers to its prompt, and what people have said of it."""
        source, place = request.query.get("source", ""), number_of(request, "place", 0)

        def read() -> dict[str, Any]:
            row = self.sources.row(source, place)
            said = self.store.answers_to_row(row["id"]) if row["id"] else []
            answers = [{"person": a["pseudonym"], "role": a["role"], "content": a["content"], "at": a["at"]} for a in said]
            return {"row": _cut_row(row), "siblings": [_cut_row(one) for one in self.sources.siblings(source, place)], "people": answers}

        return json_reply(await self.in_thread(read))

    async def row_text(self, request: web.Request) -> web.StreamResponse:
        source, place, part, begin = request.query.get("source", ""), *(number_of(request, n, 0) for n in ("place", "part", "from"))

        def piece() -> dict[str, Any]:
            row = self.sources.row(source, place)
            texts = [m["content"] for m in row["messages"]] + [a["text"] for a in row["answers"]]
            if part >= len(texts):
                raise Refused(404, "This row has no such text.")
            return cut(texts[part], begin)

        return json_reply(await self.in_thread(piece))

    async def lineage(self, request: web.Request) -> web.StreamResponse:
        if not self.sources.is_run:
            return json_reply({"lineage": []})

        def read() -> list[dict[str, Any]]:
            with reading_back(self.sources.folder):
                return lineage(self.sources.folder, request.query.get("id", ""))

        return json_reply({"lineage": await self.in_thread(read)})

    async def export(self, request: web.Request) -> web.StreamResponse:
        name = exports.check_file(request.match_info["name"])

        def make() -> bytes:
            with tempfile.TemporaryDirectory(prefix="gristmill-studio-") as folder:
                path = Path(folder) / name
                exports.write(self.store, self.sources, name, path)
                self.store.log(request[PERSON], "export", name)
                return path.read_bytes()

        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        return web.Response(body=await self.in_thread(make), content_type="application/octet-stream", headers=headers)


def _cut_row(row: dict[str, Any]) -> dict[str, Any]:
    messages = [{"role": m["role"], **cut(m["content"])} for m in row["messages"]]
    return row | {"messages": messages, "answers": [{"label": a["label"], **cut(a["text"])} for a in row["answers"]]}
