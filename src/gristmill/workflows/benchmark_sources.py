"""Sources of answers to benchmark requests: an engine in process, or an OpenAI-compatible endpoint."""

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from gristmill.core.concurrent import map_concurrent
from gristmill.core.errors import InputError
from gristmill.data.chat import Conversation, Message
from gristmill.data.thinking import check_shown, split_answer, thinking_answer, with_toggle
from gristmill.data.tokenizer import Tokenizer
from gristmill.engine.engine import Engine
from gristmill.engine.scoring import Continuation
from gristmill.evaluate.harness import rolling_windows
from gristmill.evaluate.task import GenerationKwargs
from gristmill.generation.api import Completion, Request, SamplingParams
from gristmill.generation.endpoint import Endpoint, RowFailed, Target

CHUNK_TOKENS = 1 << 22  # of continuations that are held at once, four bytes each
ENCODED_TEXTS = 128  # at once: the library holds many times the ids


@dataclass(frozen=True)
class Likelihood:
    """Log-likelihood of a continuation, and the characters of its context that were read: None for all."""

    logprob: float
    greedy: bool | None
    kept_chars: int | None = None


@dataclass(frozen=True)
class Generated:
    """A generated text; `kept_chars` as in `Likelihood`, `left_out` as in `Completion`, None for nothing."""

    text: str
    num_tokens: int
    finish: str
    kept_chars: int | None = None
    left_out: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Chat:
    """How generated answers are asked for as a message, in the model's chat format.

    Attributes:
        thinking: mode that the toggle's line in the system turn asks for; "": none.
        max_thinking_tokens: budget of an answer's thinking, beside the tokens that a task gives the reply; None: none.
    """

    thinking: Literal["", "on", "off"] = ""
    max_thinking_tokens: int | None = None

    def messages(self, prompt: str) -> Conversation:
        asked = (Message("user", prompt),)
        return with_toggle(asked, self.thinking) if self.thinking else asked


def sampling_of(settings: GenerationKwargs, chat: Chat | None) -> SamplingParams:
    """Greedy decoding as a task says. With thinking on its stop sequences are for the reply alone, which `replied` cuts."""
    budget = None if chat is None else chat.max_thinking_tokens
    stop = () if chat is not None and chat.thinking == "on" else tuple(filter(None, settings.until))
    return SamplingParams(temperature=0.0, max_tokens=settings.max_gen_toks + (budget or 0), stop=stop, max_thinking_tokens=budget)


def replied(text: str, settings: GenerationKwargs, chat: Chat | None) -> str:
    """An answer whose reply ends before the first stop sequence, where no stop sequence ended it."""
    if chat is None or chat.thinking != "on":
        return text
    trace, reply = split_answer(text)
    ends = [at for stop in settings.until if stop and (at := reply.find(stop)) >= 0]
    return (thinking_answer(trace, reply[: min(ends)]) if trace else reply[: min(ends)]) if ends else text


class AnswerSource(Protocol):
    """Protocol of whatever answers benchmark requests, each as it comes, by its place among those asked."""

    @property
    def name(self) -> str: ...

    @property
    def context(self) -> tuple[Tokenizer, int] | None:
        """Tokenizer and context of the model, where they are known."""

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[int, Likelihood]]: ...

    def rolling(self, texts: Sequence[str]) -> Iterator[tuple[int, Likelihood]]: ...

    def generate(
        self, prompts: Sequence[str], settings: GenerationKwargs, *, chat: Chat | None, seed: int
    ) -> Iterator[tuple[int, Generated]]: ...


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Ids of texts as the harness reads them: with a beginning-of-text token where the tokenizer puts one."""
    out = []
    for begin in range(0, len(texts), ENCODED_TEXTS):
        encoded = tokenizer.encode_batch(texts[begin : begin + ENCODED_TEXTS])
        out += [np.array(tokenizer.text_prefix + ids, np.int32) for ids in encoded]
    return out


def room_for_prompt(settings: GenerationKwargs, max_length: int) -> int:
    """Tokens that the longest answer leaves of a context.

    Raises:
        InputError: none.
    """
    room = max_length - settings.max_gen_toks
    if room < 1:
        raise InputError(
            f"Answers may have {settings.max_gen_toks} tokens and the model's context is {max_length}: use a model with a longer "
            "one, or lower max_gen_toks in a task file of your own."
        )
    return room


class EngineSource:
    """Answers of a model in process."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.max_length = engine.model.config.max_positions

    @property
    def name(self) -> str:
        return self.engine.name

    @property
    def context(self) -> tuple[Tokenizer, int]:
        return self.engine.tokenizer, self.max_length

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return encode_texts(self.engine.tokenizer, texts)

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[int, Likelihood]]:
        begin, size = 0, 0
        for end in range(len(pairs) + 1):  # chunks by characters, of which a token has about three
            if end == len(pairs) or size > 3 * CHUNK_TOKENS:
                yield from self._likelihoods(pairs[begin:end], begin)
                begin, size = end, 0
            if end < len(pairs):
                size += sum(map(len, pairs[end]))

    def _likelihoods(self, pairs: Sequence[tuple[str, str]], first: int) -> Iterator[tuple[int, Likelihood]]:
        """Context and continuation are encoded together; spaces at the context's end belong to the continuation."""
        joined = []
        for context, continuation in pairs:
            bare = context.rstrip()
            joined.append((bare, context[len(bare) :] + continuation))
        contexts = list(dict.fromkeys(context for context, _ in joined if context))
        ids_of = dict(zip(contexts, self._encode(contexts), strict=True))
        wholes = self._encode([context + continuation for context, continuation in joined])
        items, kept = [], {}
        for number, ((context, continuation), whole) in enumerate(zip(joined, wholes, strict=True)):
            if context:
                num = len(whole) - len(ids_of[context])
            else:  # nothing to begin with
                prefix = self.engine.tokenizer.context_id
                whole = whole if whole[:1].tolist() == [prefix] else np.concatenate([[prefix], whole])
                num = len(whole) - 1
            if num < 1:
                raise InputError(f"The continuation {continuation[:60]!r} adds no token to its context: choices must be texts.")
            if num > self.max_length:
                raise InputError(f"A continuation has {num} tokens and the model's context is {self.max_length}: use another model.")
            if len(whole) > self.max_length + 1:
                whole = whole[-(self.max_length + 1) :]
                kept[number] = len(self.engine.tokenizer.decode(whole[: max(0, len(whole) - num)].tolist(), continued=True))
            items.append(Continuation(whole, num))
        for scored in self.engine.continuations(items):
            yield first + scored.index, Likelihood(scored.logprob, scored.greedy, kept.get(scored.index))

    def rolling(self, texts: Sequence[str]) -> Iterator[tuple[int, Likelihood]]:
        for number, text in enumerate(texts):
            (ids,) = self._encode([text])
            windows = rolling_windows(ids.tolist(), self.engine.tokenizer.context_id, self.max_length)
            scored = list(self.engine.continuations([Continuation(window, num) for window, num in windows]))
            yield number, Likelihood(sum(one.logprob for one in scored), all(one.greedy for one in scored))

    def generate(
        self, prompts: Sequence[str], settings: GenerationKwargs, *, chat: Chat | None, seed: int
    ) -> Iterator[tuple[int, Generated]]:
        room, sampling = room_for_prompt(settings, self.max_length), sampling_of(settings, chat)
        if chat is not None and chat.thinking:
            check_shown(self.engine.tokenizer, self.name, "leave --thinking out")
        kept: dict[str, int] = {}

        def requests() -> Iterator[Request]:
            for number, prompt in enumerate(prompts):
                if chat is not None:
                    yield Request(str(number), chat.messages(prompt), sampling, seed)
                    continue
                ids = self._encode([prompt])[0].tolist()
                if len(ids) > room:
                    ids = ids[-room:]
                    kept[str(number)] = len(self.engine.tokenizer.decode(ids, continued=True))
                yield Request(str(number), (), sampling, seed, prompt_ids=tuple(ids or [self.engine.tokenizer.context_id]))

        for request, (answer,) in self.engine.generate(requests()):
            text = replied(answer.text, settings, chat)
            yield int(request.id), Generated(text, answer.num_tokens, answer.finish, kept.get(request.id))


class EndpointSource:
    """Answers of an endpoint: log-likelihoods by `/completions` with echo and log-probabilities, texts by either path.

    Args:
        base_url: up to and including `/v1`.
        model: name that the endpoint knows the model by.
    """

    def __init__(self, base_url: str, model: str, *, api_key_env: str = "", concurrency: int = 16) -> None:
        self.base_url, self.model, self.api_key_env, self.concurrency = base_url, model, api_key_env, concurrency

    @property
    def name(self) -> str:
        return self.model

    @property
    def context(self) -> None:
        return None

    def _target(self, **settings: Any) -> Target:
        return Target(self.base_url, self.model, api_key_env=self.api_key_env, **settings)

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[int, Likelihood]]:
        echo = _EchoEndpoint([self._target(kind="completions", logprobs=True, extra_body={"echo": True})], concurrency=self.concurrency)
        sampling = SamplingParams(temperature=0.0, max_tokens=1)
        texts = [context + continuation for context, continuation in pairs]
        requests = (Request(str(i), (Message("user", text),), sampling) for i, text in enumerate(texts))
        for request, outs in _complete(echo, requests, "Choices are scored by echo and logprobs of /completions. "):
            number = int(request.id)
            context, _ = pairs[number]
            yield number, self._read(outs[0].text, len(context.rstrip()), len(texts[number]))

    def _read(self, told: str, begin: int, end: int) -> Likelihood:
        """Sum of what was told of the tokens that reach beyond the context, and not beyond the text."""
        num_chars, values = json.loads(told)
        if not values:
            raise InputError(
                f"{self.base_url} ({self.model}) tells no log-probabilities of a prompt (echo, logprobs of /completions), without which "
                "no choice can be scored: use a server that does, as `gristmill serve` or vLLM, or tasks that generate."
            )
        if num_chars < end:
            raise InputError(
                f"{self.base_url} ({self.model}) repeats {num_chars:,} of a prompt's {end:,} characters, so it was cut to the model's "
                "context: lower --num-fewshot, or use a model with a longer one."
            )
        total, num = 0.0, 0
        for (start, logprob), (stop, _) in zip(values, [*values[1:], [end + 1, None]], strict=True):
            if start < end and stop > begin and logprob is not None:
                total, num = total + logprob, num + 1
        if not num:
            raise InputError(f"{self.base_url} ({self.model}) tells no log-probability of a continuation: its text_offset cannot be used.")
        return Likelihood(total, None)

    def rolling(self, texts: Sequence[str]) -> Iterator[tuple[int, Likelihood]]:
        raise InputError("Perplexity of texts is read in windows of tokens, which an endpoint does not tell: give a model folder.")

    def generate(
        self, prompts: Sequence[str], settings: GenerationKwargs, *, chat: Chat | None, seed: int
    ) -> Iterator[tuple[int, Generated]]:
        sampling, ask = sampling_of(settings, chat), chat or Chat()
        budget = {} if ask.max_thinking_tokens is None else {"max_thinking_tokens": ask.max_thinking_tokens}
        target = self._target(kind="completions" if chat is None else "chat", extra_body=budget)
        requests = (Request(str(i), ask.messages(prompt), sampling, seed) for i, prompt in enumerate(prompts))
        for request, (answer,) in _complete(Endpoint([target], concurrency=self.concurrency), requests):
            text = replied(answer.text, settings, chat)
            yield int(request.id), Generated(text, answer.num_tokens, answer.finish, left_out=answer.left_out or None)


class _EchoEndpoint(Endpoint):
    """Endpoint whose completions have as text, in JSON, the size of the repeated prompt and its tokens' offsets and log-probabilities."""

    def choice_text(self, choice: Any, target: Target) -> Any:
        told = choice.pop("logprobs", None) or {}
        offsets, logprobs = told.get("text_offset"), told.get("token_logprobs")
        if not isinstance(offsets, list) or not isinstance(logprobs, list) or len(offsets) != len(logprobs) or len(offsets) < 2:
            return "[0, []]"
        if not all(logprob is None or math.isfinite(logprob) for logprob in logprobs):
            raise ValueError  # NaN, of which no sum is any good
        pairs = zip(offsets, logprobs, strict=True)
        told = [[int(offset), None if logprob is None else float(logprob)] for offset, logprob in pairs]
        return json.dumps([len(choice.get("text") or ""), told])


def _complete(endpoint: Endpoint, requests: Iterable[Request], needs: str = "") -> Iterator[tuple[Request, list[Completion]]]:
    """Completions as they come. An answer that stays empty counts as one; whatever else fails ends the evaluation, which goes on later.

    Args:
        needs: sentence about what the requests need, told where one is refused.
    """
    with asyncio.Runner() as runner:

        async def answer(request: Request) -> tuple[Request, list[Completion]]:
            try:
                return request, await endpoint.complete(request)
            except RowFailed as e:
                if e.status == 200 and "empty" in str(e):
                    return request, [Completion("", 0, (), "stop")]
                raise InputError(
                    f"The endpoint does not answer request {int(request.id) + 1}: {e}. {needs}Mend this, and run the same again."
                ) from e

        async def rows() -> AsyncIterator[tuple[Request, list[Completion]]]:
            async with endpoint:
                async for item in map_concurrent(requests, answer, endpoint.concurrency):
                    yield item

        stream = rows()
        try:
            while (item := runner.run(_next(stream))) is not None:
                yield item
        finally:
            runner.run(_close(stream))


async def _next(stream: AsyncIterator[tuple[Request, list[Completion]]]) -> tuple[Request, list[Completion]] | None:
    return await anext(stream, None)


async def _close(stream: Any) -> None:
    with contextlib.suppress(RuntimeError):
        await stream.aclose()
