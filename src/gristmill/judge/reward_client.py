"""Client of reward models behind OpenAI-compatible endpoints, which answer a conversation with the attributes of its last turn.

The same five numbers stand in the answer's text, `helpfulness:1.6171875,correctness:1.6484375,...`, and as entries of its
log-probabilities, `{"token": "helpfulness", "logprob": 1.6171875}`. Source: the API of Nemotron-4-340B-Reward.
"""

import asyncio
import contextlib
import re
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from gristmill.core.concurrent import map_concurrent
from gristmill.core.errors import InputError
from gristmill.core.response_text import answer_text
from gristmill.data.chat import Message
from gristmill.data.rows import ATTRIBUTES, Rating
from gristmill.generation.api import Completion, Request, SamplingParams
from gristmill.generation.endpoint import Endpoint, RowFailed, Target
from gristmill.generation.openai_format import FIELDS

NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?", re.ASCII)
MAX_CONCURRENT = 512  # conversations that wait for the endpoint, which itself bounds what is in flight
MAX_SHOWN = 100  # characters of an answer in an error


class RewardModelEndpoint(Endpoint):
    """Endpoint of a reward model. Its answers are attribute strings, whichever form they came in.

    It draws nothing, so that no field of sampling is sent but those that a target's `fields` name.
    """

    def __init__(self, targets: Sequence[Target], **options: Any):
        sampling = {name: None for name in FIELDS if name != "logprobs"}
        super().__init__([replace(target, fields={**sampling, **target.fields}) for target in targets], **options)

    def choice_text(self, choice: Any, target: Target) -> Any:
        try:
            rating = parse_choice(choice)
        except InputError:
            return super().choice_text(choice, target)
        return ",".join(f"{name}:{getattr(rating, name)}" for name in ATTRIBUTES)

    async def complete(self, request: Request, model: str = "") -> list[Completion]:
        """As `Endpoint.complete`; an answer that is no rating is a failed row too."""
        outs = await super().complete(request, model)
        try:
            parse_attributes(outs[0].text)
        except InputError as e:
            raise RowFailed(f"the answer is no rating: {e}", 1, 200) from e
        return outs


class Completer(Protocol):
    """Protocol of clients that answer a request with an attribute string: a `RewardModelEndpoint`, for instance."""

    async def complete(self, request: Request) -> list[Completion]: ...


class RemoteRewardScorer:
    """Reward scorer over an endpoint, the counterpart of `RewardScorer`.

    Args:
        weights: name of a published weight set (REWARD_WEIGHTS).

    Raises:
        InputError: no weight set has this name.
    """

    def __init__(self, endpoint: Completer, weights: str = "nemotron4-340b"):
        self.endpoint = endpoint
        self.weights = weight_set(weights)

    async def rate(self, messages: Sequence[Message], name: str) -> Rating:
        """Rating of the last assistant turn, in raw floats; `name` is the row's in requests and errors.

        Raises:
            InputError: the conversation does not end with the assistant, or the answer is no rating; as `Endpoint.complete`.
            RowFailed: as `Endpoint.complete`.
        """
        _check(messages, name)
        answers = await self.endpoint.complete(Request(name, tuple(messages), SamplingParams(temperature=0.0)))
        try:
            return parse_attributes(answers[0].text)
        except InputError as e:
            raise InputError(f"{name}: {e}") from e

    def score(self, conversations: Sequence[Sequence[Message]]) -> list[Rating]:
        """Ratings of the last assistant turn of each conversation, many at once on an event loop of its own.

        Raises:
            InputError: as `rate`; nothing is sent when a conversation does not end with the assistant.
            RowFailed: as `rate`.
        """
        rows = [(i, messages, f"Conversation {i}") for i, messages in enumerate(conversations)]
        for _, messages, name in rows:
            _check(messages, name)

        async def one(row: tuple[int, Sequence[Message], str]) -> tuple[int, Rating]:
            return row[0], await self.rate(*row[1:])

        async def all_of_them() -> dict[int, Rating]:
            async with contextlib.AsyncExitStack() as stack:
                if isinstance(self.endpoint, contextlib.AbstractAsyncContextManager):
                    await stack.enter_async_context(self.endpoint)
                rated: AsyncIterator[tuple[int, Rating]] = map_concurrent(rows, one, min(MAX_CONCURRENT, len(rows)))
                return {i: rating async for i, rating in rated}

        ratings = asyncio.run(all_of_them())
        return [ratings[i] for i in range(len(rows))]

    def total(self, rating: Rating) -> float:
        """Weighted sum of a rating."""
        return rating.score(self.weights)


def weight_set(name: str) -> tuple[float, ...]:
    """The weights of a published set.

    Raises:
        InputError: no set has this name.
    """
    from gristmill.model.reward import REWARD_WEIGHTS  # which imports torch

    if name not in REWARD_WEIGHTS:
        raise InputError(f"Unknown reward weights {name!r}: choose one of {', '.join(REWARD_WEIGHTS)}.")
    return REWARD_WEIGHTS[name]


def parse_choice(choice: dict[str, Any]) -> Rating:
    """Parse the rating of one decoded choice: that of its log-probabilities where they hold one, else that of its text.

    Raises:
        InputError: neither form is there, or an attribute is missing, there twice or no number.
    """
    match choice:
        # the tokens of a text, a colon among them, are no attribute names
        case {"logprobs": {"content": [_, *_] as entries}} if all(
            isinstance(e, dict) and isinstance(e.get("token"), str) and e["token"].strip().isidentifier() for e in entries
        ):
            return _rating((e["token"].strip(), e.get("logprob")) for e in entries)
        case {"message": {"content": str(text)}}:
            return parse_attributes(text)
    raise InputError(f"The choice {_short(repr(choice))} holds neither log-probabilities nor text: is the model a reward model?")


def parse_attributes(text: str) -> Rating:
    """Parse the rating of an attribute string. Attributes beyond the five are ignored: some models have nine.

    Raises:
        InputError: an attribute is missing, there twice or no number.
    """
    pairs = ([side.strip() for side in pair.partition(":")[::2]] for pair in answer_text(text).split(","))
    try:
        return _rating((name, float(value) if NUMBER.fullmatch(value) else value) for name, value in pairs)
    except InputError as e:
        raise InputError(f"{e} The answer was {_short(repr(text))}.") from e


def _rating(pairs: Iterable[tuple[str, Any]]) -> Rating:
    values: dict[str, float] = {}
    for name, value in pairs:
        if name not in ATTRIBUTES:
            continue
        if name in values:
            raise InputError(f"The rating has {name} twice: is the model a reward model?")
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
            raise InputError(f"The rating's {name} is {_short(repr(value))}, which is no number: is the model a reward model?")
        values[name] = float(value)
    if missing := [name for name in ATTRIBUTES if name not in values]:
        raise InputError(f"The rating lacks {', '.join(missing)}: is the model a reward model?")
    return Rating(**values)


def _check(messages: Sequence[Message], name: str) -> None:
    if not messages or messages[-1].role != "assistant":
        raise InputError(f"{name} does not end with the assistant: there is no answer to score.")


def _short(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."
