"""Generation API: sampling parameters, requests, completions, and the `Generator` protocol.

Pipelines are written against `Generator`, so the in-process engine and a remote endpoint are interchangeable.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

from gristmill.core.errors import InputError
from gristmill.data.chat import Message

Finish = Literal["stop", "length"]
MAX_PENALTY = 1e9  # of penalties and biases: beyond, sums would overflow
COMMON_PARAMS = ("temperature", "top_p", "top_k", "max_tokens", "n")


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of a request.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: keep the smallest set of likeliest tokens whose probability reaches this; 1 keeps all.
        top_k: keep this many likeliest tokens (applied before top_p); 0 keeps all.
        max_tokens: most tokens of a response, its end-of-turn token included.
        n: number of responses.
        min_p: keep tokens whose probability is at least this share of the likeliest one's; 0 keeps all.
        repetition_penalty: divides positive logits of tokens that prompt or response hold, multiplies negative ones; 1 is off.
        presence_penalty, frequency_penalty: taken from the logits of tokens that the response holds, once or as often as it does.
        stop: the response ends before any of these strings.
        stop_tokens: ids of tokens that end the response, and are no part of its text, as its end of turn does.
        logit_bias: (token, what is added to its logit).
        top_logprobs: likeliest tokens that are told beside each drawn one.
        grammar: grammar that the response keeps to, made by `engine.grammar`; "" is none.
        max_thinking_tokens: most tokens between `<think>` and `</think>`: then the closing tag is forced, within max_tokens; None: any.

    Raises:
        InputError: a value out of its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    n: int = 1
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int = 0
    grammar: str = ""
    max_thinking_tokens: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= MAX_PENALTY:
            raise InputError(f"temperature must be 0 (greedy) or more, at most {MAX_PENALTY:g}, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p}.")
        if self.top_k < 0:
            raise InputError(f"top_k must be 0 (off) or more, got {self.top_k}.")
        if self.max_tokens < 1:
            raise InputError(f"max_tokens must be at least 1, got {self.max_tokens}.")
        if self.n < 1:
            raise InputError(f"n must be at least 1, got {self.n}.")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p must be 0 (off) to 1, got {self.min_p}.")
        if not 1 / MAX_PENALTY <= self.repetition_penalty <= MAX_PENALTY:
            raise InputError(f"repetition_penalty must be above 0 and at most {MAX_PENALTY:g}, got {self.repetition_penalty}.")
        biases = {f"logit_bias of token {token}": value for token, value in self.logit_bias}
        more = {"presence_penalty": self.presence_penalty, "frequency_penalty": self.frequency_penalty} | biases
        for name, value in more.items():
            if not -MAX_PENALTY <= value <= MAX_PENALTY:
                raise InputError(f"{name} must be a number up to {MAX_PENALTY:g}, got {value}.")
        if self.top_logprobs < 0:
            raise InputError(f"top_logprobs must be 0 or more, got {self.top_logprobs}.")
        if self.max_thinking_tokens is not None and self.max_thinking_tokens < 0:
            raise InputError(f"max_thinking_tokens must be 0 or more, got {self.max_thinking_tokens}.")
        if not all(self.stop):
            raise InputError("stop holds an empty string: every answer would end at once.")

    @property
    def processes_logits(self) -> bool:
        """Whether anything but temperature and cuts changes what is sampled from: a penalty, a bias, a grammar or a thinking budget."""
        penalties = self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        return penalties or bool(self.logit_bias) or bool(self.grammar) or self.max_thinking_tokens is not None

    def described(self) -> dict[str, Any]:
        """The five settings that every source of text knows, and those of the others that are not off: what ids are made of."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if name in COMMON_PARAMS or value != getattr(type(self), name)}


@dataclass(frozen=True)
class Request:
    """A conversation that waits for the assistant's next turn, or a prompt of token ids to continue as it is.

    The same request (id, messages, sampling, seed) to the same model gives the same responses, whatever else
    is in flight. Requests of a higher priority are served first.
    """

    id: str
    messages: tuple[Message, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    priority: int = 0
    prompt_ids: tuple[int, ...] = ()  # what the model reads, where messages are not to be rendered
    adapter: str = ""  # name of a LoRA adapter that the engine has loaded

    @property
    def continues_text(self) -> bool:
        """Whether the response goes on with a text: a prompt of token ids, or an assistant's message that was left open."""
        return not self.messages or self.messages[-1].role == "assistant"


@dataclass(frozen=True)
class Completion:
    """One sampled response.

    Attributes:
        text: the response without its end-of-turn token.
        num_tokens: tokens generated, the end-of-turn token included.
        logprobs: natural log-probability of every generated token under the model itself: before temperature,
            top_p and top_k.
        finish: "stop" if the model ended its turn, "length" if it hit max_tokens or the model's context.
        tokens: their ids, where the source tells them.
        top_logprobs: of each token the likeliest ones with their log-probabilities, if asked for.
        left_out: fields of the request that the endpoint refused, and was asked without.
        forced: places of the tokens that the model did not choose: its thinking was at its budget's end.
    """

    text: str
    num_tokens: int
    logprobs: tuple[float, ...]
    finish: Finish
    tokens: tuple[int, ...] = ()
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    left_out: tuple[str, ...] = ()
    forced: tuple[int, ...] = ()


class Generator(Protocol):
    """Protocol of whatever generates: the engine, an endpoint."""

    @property
    def name(self) -> str:
        """Name of the model, for records and reports."""
        ...

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Completion]]]:
        """Yield each request with its `n` completions when all of them are done, in order of finishing."""
        ...
