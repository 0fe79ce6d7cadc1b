"""Where a run's human data, prompts and truths come from: a built-in world, or a user's own files."""

from collections.abc import Sequence
from typing import Any, Protocol

from gristmill.core.errors import InputError
from gristmill.data.chat import Conversation, Message
from gristmill.data.human import HumanData
from gristmill.data.readers import read_demonstrations, read_prompts, read_ratings
from gristmill.data.rows import Demonstration, Prompt, Rated, make_id
from gristmill.synth.templates import Template


class DataSource(Protocol):
    """Supplies a run. Only `evaluation` and verifiers know truths."""

    @property
    def tasks(self) -> Sequence[str]:
        """Tasks of the demonstrations."""
        ...

    @property
    def code_tasks(self) -> frozenset[str]:
        """Tasks whose answers are programs."""
        ...

    def demonstrations(self) -> list[Demonstration]: ...

    def ratings(self) -> list[Rated]: ...

    def prompts(self) -> list[Prompt]: ...

    def task(self, pipeline: str) -> str:
        """The task that a pipeline's prompts belong to."""
        ...

    def evaluation(self) -> list[Prompt]: ...

    def validation(self) -> list[Prompt]:
        """Prompts with truths by which the best model is chosen: neither evaluated nor trained on."""
        ...

    @property
    def validated_on(self) -> str:
        """Which prompts those are."""
        ...

    def truth(self, task: str, messages: Conversation) -> dict[str, Any] | None:
        """What a verifier needs for a prompt that a model wrote, or None."""
        ...

    def checkable(self, task: str, messages: Conversation) -> bool:
        """Whether a prompt that no verifier understands is worthless."""
        ...


MIN_SPLIT = 5  # rows with known answers from which some are held out to choose the best model
MIN_SPLIT_EVALUATION = 20  # evaluation rows from which some are, where nothing else is there
SPLIT = 5  # every fifth of them
MAX_VALIDATION = 200
CODE_PIPELINES = frozenset({"python", "genetic"})


class FileSource:
    """A user's own files, checked before any work is spent.

    | file | columns |
    |---|---|
    | demonstrations | `messages` (ending with the assistant), or `prompt` and `response`; optional `task`; none: the model is an Instruct |
    | ratings | HelpSteer2's: `prompt` and `response` (or `messages`), helpfulness, correctness, coherence, complexity, verbosity |
    | prompts | `messages` or `prompt`; optional `truth`, `answer` (a known final answer) or tests (data/truths.py), optional `task` |
    | evaluation | as prompts, with `truth`, `answer` or tests |
    | validation | as evaluation |

    Without a file the validation rows are those with known answers that `num_evaluation` and `num_prompts` leave out, where these are
    five or more; else every fifth prompt with a known answer; else every fifth of 20 or more evaluation rows. A number that is given is
    held: nothing is taken from those rows. The demonstrations also teach the model to write prompts: each first turn becomes the answer
    to a request for a prompt.

    Args:
        request: template of that request.

    Raises:
        InputError: a file is missing or empty, or a row lacks a column.
    """

    def __init__(self, data: HumanData, request: Template):
        self._request = request
        assert data.evaluation
        given = read_demonstrations(data.demonstrations) if data.demonstrations else []
        self._demonstrations = given[: data.num_demonstrations]
        self._evaluation = read_prompts(data.evaluation, "human", truth=True)
        self._prompts = read_prompts(data.prompts, "file") if data.prompts else []
        known_beyond = [p for p in self._prompts[data.num_prompts :] if p.truth] if data.num_prompts is not None else []
        self._prompts = self._prompts[: data.num_prompts]
        self._ratings = _rated(read_ratings(data.ratings), data) if data.ratings else []
        self.tasks = tuple(dict.fromkeys(d.task for d in self._demonstrations))
        limited: list[Prompt] = []
        for task in dict.fromkeys(p.task for p in self._evaluation):
            limited += [p for p in self._evaluation if p.task == task][: data.num_evaluation]
        beyond = [p for p in self._evaluation if p not in limited]
        self._evaluation = limited
        self._validation, self.validated_on = self._split(data, beyond, known_beyond)
        checked = {p.task for p in [*self._prompts, *self._evaluation] if (p.truth or {}).get("kind") == "code"}
        self.code_tasks = frozenset({t for t in self.tasks if "code" in t.lower()} | checked | CODE_PIPELINES)

    def _split(self, data: HumanData, *beyond: list[Prompt]) -> tuple[list[Prompt], str]:
        """Rows that choose the best model, and which they are; taken out of what they were."""
        held_out = frozenset(normalize_prompt(p.messages) for p in self._evaluation)
        if data.validation is not None:
            rows = read_prompts(data.validation, "validation", truth=True)
            for number, p in enumerate(rows, 1):
                if contaminated(p.messages, held_out):
                    raise InputError(
                        f"Row {number} of {data.validation} asks what the evaluation asks: take it out of one of the two files."
                    )
            return rows, "data.validation"
        unused = [p for rows in beyond for p in rows if not contaminated(p.messages, held_out)]
        if len(unused) >= MIN_SPLIT:
            return unused[:MAX_VALIDATION], "rows with known answers beyond data.num_evaluation and data.num_prompts"
        known = [p for p in self._prompts if p.truth and not contaminated(p.messages, held_out)]
        if data.num_prompts is None and len(known) >= MIN_SPLIT:
            held = known[SPLIT - 1 :: SPLIT][:MAX_VALIDATION]
            self._prompts = [p for p in self._prompts if p not in held]
            return held, "a fifth of the prompts with known answers, which the run does not train on"
        if data.num_evaluation is None and len(self._evaluation) >= MIN_SPLIT_EVALUATION:
            held = self._evaluation[SPLIT - 1 :: SPLIT][:MAX_VALIDATION]
            self._evaluation = [p for p in self._evaluation if p not in held]
            return held, "a fifth of the evaluation rows, which are not reported"
        return [], ""

    def validation(self) -> list[Prompt]:
        """Held-out prompts that choose the best model."""
        return self._validation

    def demonstrations(self) -> list[Demonstration]:
        """The user's conversations, and prompt-writing ones derived from them (a fifth as many)."""
        return [*self._demonstrations, *(self._written(d) for d in self._demonstrations[::5])]

    def _written(self, d: Demonstration) -> Demonstration:
        first = next(m for m in d.messages if m.role == "user")
        messages = (Message("user", self._request.render(task=d.task)), Message("assistant", first.content))
        return Demonstration(make_id("write", d.id), "prompt-writing", messages, "human", (d.id,))

    def ratings(self) -> list[Rated]:
        """Rated answers; empty when the recipe names none."""
        return self._ratings

    def task(self, pipeline: str) -> str:
        """The pipeline's own name."""
        return pipeline

    def prompts(self) -> list[Prompt]:
        """Prompts from the user's file."""
        return self._prompts

    def evaluation(self) -> list[Prompt]:
        """Held-out prompts with truths."""
        return self._evaluation

    def truth(self, task: str, messages: Conversation) -> dict[str, Any] | None:
        """Nothing is known about prompts that a model wrote."""
        return None

    def checkable(self, task: str, messages: Conversation) -> bool:
        """Any prompt may be judged by the reward model."""
        return False


def _rated(rows: list[Rated], data: HumanData) -> list[Rated]:
    """Ratings of as many prompts as are asked for, those to be held out included."""
    if data.num_rated_prompts is None:
        return rows
    wanted = set(list(dict.fromkeys(r.pair for r in rows))[: data.num_rated_prompts + data.num_held_out_ratings])
    return [r for r in rows if r.pair in wanted]


def contaminated(messages: Sequence[Message], held_out: frozenset[str]) -> bool:
    """Whether a prompt asks what the evaluation asks: as a whole, or in one of its user turns. Case and spaces aside."""
    if normalize_prompt(messages) in held_out:
        return True
    return len(messages) > 1 and any(m.role == "user" and _normalize(m.content) in held_out for m in messages)


def normalize_prompt(messages: Sequence[Message]) -> str:
    """A prompt as one text, for comparing prompts."""
    return "\n".join(_normalize(m.content) for m in messages)


def _normalize(text: str) -> str:
    return " ".join(text.lower().split())
