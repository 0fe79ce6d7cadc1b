"""A run on several processes: the first one drives it and alone writes; all train together, and each answers a share.

The first process goes through the stages as if it were alone. What others can help with it tells them: they wait for the next order,
however long that takes, and read models from the run's folder.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from gristmill.core.errors import InputError
from gristmill.engine.engine import Engine
from gristmill.generation.api import Completion, Request
from gristmill.parallel.mesh import Mesh, Orders

PORTION = 512  # requests of a process between two exchanges: what a kill loses, at most


class Ranks:
    """The processes of one run. What they do together beside answering, a workflow adds in `_do`.

    Args:
        engine: a model's engine, by its name and folder.
    """

    def __init__(self, mesh: Mesh, *, engine: Callable[[str, Path], Engine]) -> None:
        self.mesh, self._engine = mesh, engine
        self._orders, self._busy = Orders(mesh), False

    # ---- what the first process asks for ----

    def generate(self, requests: Iterable[Request], name: str = "", folder: Path = Path()) -> Iterator[tuple[Request, list[Completion]]]:
        """Completions of requests to a model, of which each process makes a share."""
        if self.mesh.size == 1:
            yield from self._engine(name, folder).generate(requests)
            return
        waiting, step = list(requests), PORTION * self.mesh.size
        for portion in (waiting[start : start + step] for start in range(0, len(waiting), step)):
            order = {"name": name, "folder": str(folder), "requests": TypeAdapter(list[Request]).dump_python(portion, mode="json")}
            with self._together({"job": "generate", **order}):
                done = self._share_of_answers(name, folder, portion)
            for request in portion:
                yield request, done[request.id]

    @contextmanager
    def _together(self, order: dict[str, Any]) -> Iterator[None]:
        self._orders.give(order)
        self._busy = True
        yield
        self._busy = False
        self._orders.done()

    def dismiss(self) -> None:
        """Let the other processes end. Where one has failed in common work they do not listen, and torchrun ends them."""
        if self.mesh.is_writer and self.mesh.size > 1 and not self._busy:
            self._orders.dismiss()

    # ---- what the others do ----

    def follow(self) -> None:
        """Do what the first process asks for, until it has nothing more."""
        while order := self._orders.take():
            self._do(order)

    def _do(self, order: dict[str, Any]) -> None:
        requests = TypeAdapter(list[Request]).validate_python(order["requests"])
        self._share_of_answers(order["name"], Path(order["folder"]), requests)

    # ---- what all do ----

    def _share_of_answers(self, name: str, folder: Path, requests: Sequence[Request]) -> dict[str, list[Completion]]:
        adapter = TypeAdapter(list[Completion])
        mine = dealt(requests, self.mesh.size)[self.mesh.rank]

        def answers() -> Any:
            done = self._engine(name, folder).generate(mine)
            return {request.id: adapter.dump_python(completions, mode="json") for request, completions in done}

        return {name: adapter.validate_python(found) for share in self._exchange(answers) for name, found in share.items()}

    def _exchange(self, work: Callable[[], Any]) -> list[Any]:
        """What all processes' work has given, as JSON values for the first one alone; the error of one is that of all."""
        try:
            mine: dict[str, Any] = {"result": work()}
        except InputError as e:
            mine = {"error": str(e)}
        shares = self.mesh.to_first(mine)
        if errors := [share["error"] for share in shares if "error" in share]:
            raise InputError(errors[0])
        return [share.get("result", {}) for share in shares]


def dealt(requests: Sequence[Request], num_shares: int) -> list[list[Request]]:
    """Requests in shares of about one size; those of one conversation together, of which an engine reads the prompt once."""
    shares: list[list[Request]] = [[] for _ in range(num_shares)]
    of_prompts: dict[tuple[Any, ...], list[Request]] = {}
    for request in requests:
        share = of_prompts.setdefault((request.messages, request.prompt_ids), min(shares, key=len))
        share.append(request)
    return shares
