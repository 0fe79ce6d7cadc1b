"""A run on several processes: the first one drives it and alone writes; all train together, and each answers and rates a share.

The first process goes through the stages as if it were alone. What others can help with it tells them: they wait for the next order,
however long that takes, and read models from the run's folder.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from gristmill.core.errors import InputError
from gristmill.data.chat import Message
from gristmill.data.rows import Demonstration, Pair, Rated, Rating
from gristmill.engine.engine import Engine
from gristmill.generation.api import Completion, Request
from gristmill.judge.reward import RewardScorer
from gristmill.parallel.mesh import Mesh, Orders
from gristmill.train.settings import PreferenceTraining, Training
from gristmill.train.trainer import TrainResult
from gristmill.workflows.train import train_model

PORTION = 512  # requests of a process between two exchanges: what a kill loses, at most
# Rows of a kind of training; any other has pairs.
ROWS: dict[str, TypeAdapter[Any]] = {"sft": TypeAdapter(list[Demonstration]), "reward": TypeAdapter(list[Rated])}
PAIRS: TypeAdapter[Any] = TypeAdapter(list[Pair])
CHECKPOINT_SECONDS = 20.0


class Ranks:
    """The processes of one run.

    Args:
        engine: a model's engine, by its name and folder.
        scorer: a reward model's, by its folder.
        options: of every training, as `train_model` takes them.
    """

    def __init__(
        self, mesh: Mesh, *, engine: Callable[[str, Path], Engine], scorer: Callable[[Path], RewardScorer], options: dict[str, Any]
    ) -> None:
        self.mesh, self._engine, self._scorer, self._options = mesh, engine, scorer, options
        self._orders, self._busy = Orders(mesh), False

    # ---- what the first process asks for ----

    def generate(self, name: str, folder: Path, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Completion]]]:
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
        if self.mesh.size == 1:
            return self._scorer(folder).score(conversations)
        plain = TypeAdapter(list[tuple[Message, ...]]).dump_python([tuple(talk) for talk in conversations], mode="json")
        with self._together({"job": "score", "folder": str(folder), "conversations": plain}):
            return self._share_of_ratings(folder, conversations)

    def train(self, kind: str, start: Path, rows: Sequence[Any], recipe: Training, folder: Path) -> TrainResult:
        """Train on all processes."""
        if self.mesh.size == 1:
            return self._train(kind, start, rows, recipe, folder)
        order = {"kind": kind, "start": str(start), "folder": str(folder), "recipe": recipe.model_dump(mode="json")}
        with self._together({"job": "train", "rows": ROWS.get(kind, PAIRS).dump_python(list(rows), mode="json"), **order}):
            return self._train(kind, start, rows, recipe, folder)

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
            folder = Path(order["folder"])
            if order["job"] == "generate":
                self._share_of_answers(order["name"], folder, TypeAdapter(list[Request]).validate_python(order["requests"]))
            elif order["job"] == "score":
                self._share_of_ratings(folder, TypeAdapter(list[tuple[Message, ...]]).validate_python(order["conversations"]))
            else:
                rows = ROWS.get(order["kind"], PAIRS).validate_python(order["rows"])
                recipe = (Training if order["kind"] in ROWS else PreferenceTraining).model_validate(order["recipe"])
                with suppress(InputError):  # the first process says it, and what comes then
                    self._train(order["kind"], Path(order["start"]), rows, recipe, folder)

    # ---- what all do ----

    def _train(self, kind: str, start: Path, rows: Sequence[Any], recipe: Training, folder: Path) -> TrainResult:
        options = {"checkpoint_every": CHECKPOINT_SECONDS, "mesh": self.mesh, **self._options}
        return train_model(kind, start, rows, out=folder, recipe=recipe, **options)

    def _share_of_answers(self, name: str, folder: Path, requests: Sequence[Request]) -> dict[str, list[Completion]]:
        adapter = TypeAdapter(list[Completion])
        mine = dealt(requests, self.mesh.size)[self.mesh.rank]

        def answers() -> Any:
            done = self._engine(name, folder).generate(mine)
            return {request.id: adapter.dump_python(completions, mode="json") for request, completions in done}

        return {name: adapter.validate_python(found) for share in self._exchange(answers) for name, found in share.items()}

    def _share_of_ratings(self, folder: Path, conversations: Sequence[Sequence[Message]]) -> list[Rating]:
        adapter, size = TypeAdapter(list[Rating]), -(-len(conversations) // self.mesh.size)
        mine = conversations[self.mesh.rank * size : (self.mesh.rank + 1) * size]  # neighbours: they answer one prompt
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


def dealt(requests: Sequence[Request], num_shares: int) -> list[list[Request]]:
    """Requests in shares of about one size; those of one conversation together, of which an engine reads the prompt once."""
    shares: list[list[Request]] = [[] for _ in range(num_shares)]
    of_prompts: dict[tuple[Any, ...], list[Request]] = {}
    for request in requests:
        share = of_prompts.setdefault((request.messages, request.prompt_ids), min(shares, key=len))
        share.append(request)
    return shares
