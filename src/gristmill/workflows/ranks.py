"""A run on several processes: the first one drives it and alone writes; all train together, and each answers and rates a share.

The first process goes through the stages as if it were alone. What others can help with it tells them: they wait for the next order,
however long that takes, and read models from the run's folder.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from gristmill.core.errors import InputError
from gristmill.data.chat import Message
from gristmill.data.rows import Rating
from gristmill.engine.engine import Engine
from gristmill.generation.api import Completion, Request
from gristmill.judge.judges import Scorer
from gristmill.parallel.mesh import Mesh, Orders

TALKS: TypeAdapter[Any] = TypeAdapter(list[tuple[Message, ...]])
PORTION = 512  # requests of a process between two exchanges: what a kill loses, at most


class Ranks:
    """The processes of one run. How they train, a workflow adds in `_do`.

    Args:
        engine: a model's engine, by its name and folder.
        scorer: a reward model's, by its folder.
    """

    def __init__(self, mesh: Mesh, *, engine: Callable[[str, Path], Engine], scorer: Callable[[Path], Scorer]) -> None:
        self.mesh, self._engine, self._scorer = mesh, engine, scorer
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

    def score(self, folder: Path, conversations: Sequence[Sequence[Message]]) -> list[Rating]:
        """Ratings by a reward model, of which each process makes a share."""
        talks = [tuple(talk) for talk in conversations]
        if self.mesh.size == 1:
            return self._scorer(folder).score(talks)
        with self._together({"job": "score", "folder": str(folder), "conversations": TALKS.dump_python(talks, mode="json")}):
            return self._share_of_ratings(folder, talks)

    def shared_scorer(self, folder: Path) -> Scorer:
        """A reward model of which every process has one, and rates a share."""
        return _SharedScorer(self, folder, self._scorer(folder))

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
        if order["job"] == "score":
            self._share_of_ratings(Path(order["folder"]), TALKS.validate_python(order["conversations"]))
            return
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

    def _share_of_ratings(self, folder: Path, talks: Sequence[tuple[Message, ...]]) -> list[Rating]:
        adapter, size = TypeAdapter(list[Rating]), -(-len(talks) // self.mesh.size)
        mine = talks[self.mesh.rank * size : (self.mesh.rank + 1) * size]  # neighbours: they answer one prompt
        shares = self._exchange(lambda: adapter.dump_python(self._scorer(folder).score(mine), mode="json") if mine else [])
        return [rating for share in shares for rating in adapter.validate_python(share)]

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


class _SharedScorer:
    """A reward model of which every process of the run has one."""

    def __init__(self, ranks: Ranks, folder: Path, scorer: Scorer):
        self.fits, self._ranks, self._folder = scorer.fits, ranks, folder

    def score(self, conversations: Sequence[Sequence[Message]]) -> list[Rating]:
        return self._ranks.score(self._folder, conversations)


def dealt(requests: Sequence[Request], num_shares: int) -> list[list[Request]]:
    """Requests in shares of about one size; those of one conversation together, of which an engine reads the prompt once."""
    shares: list[list[Request]] = [[] for _ in range(num_shares)]
    of_prompts: dict[tuple[Any, ...], list[Request]] = {}
    for request in requests:
        share = of_prompts.setdefault((request.messages, request.prompt_ids), min(shares, key=len))
        share.append(request)
    return shares
