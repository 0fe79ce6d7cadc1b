"""The OpenAI wire format, the client's side: request bodies out of requests, completions out of response bodies."""

import email.utils
import hashlib
import json
import time
from collections.abc import Callable
from typing import Any

from gristmill.core.errors import InputError
from gristmill.data.tokenizer import SURROGATE
from gristmill.generation.api import Completion, Finish, Request

MAX_RETRY_AFTER = 120.0  # seconds; an endpoint that asks for more is treated as one that asks for this
MAX_REPORTED_TOKENS = 1 << 40  # that an answer may say it has


class TransientError(Exception):
    """A failed attempt that may succeed when it is repeated.

    Attributes:
        kind: what went wrong, as it is counted.
        status: HTTP status; 0 where there was none.
        retry_after: seconds that the server asks for.
    """

    def __init__(self, kind: str, reason: str, status: int = 0, retry_after: float | None = None):
        super().__init__(reason)
        self.kind, self.status, self.retry_after = kind, status, retry_after


def request_body(request: Request, num: int, start: int, *, model: str, chat: bool, logprobs: bool) -> dict[str, Any]:
    """Body of `/chat/completions`, or of `/completions` where not `chat`.

    Args:
        num: samples that are asked for.
        start: samples that the request has already, which would draw the same numbers.

    Raises:
        InputError: a request of several messages to `/completions`.
    """
    sampling = request.sampling
    body: dict[str, Any] = {"model": model, "temperature": sampling.temperature, "max_tokens": sampling.max_tokens}
    if chat:
        body["messages"] = [{"role": m.role, "content": m.content} for m in request.messages]
    elif len(request.messages) == 1:
        body["prompt"] = request.messages[0].content
    else:
        raise InputError(f"Row {request.id} has {len(request.messages)} messages and {model} takes one text: use kind 'chat'.")
    if sampling.top_p < 1:
        body["top_p"] = sampling.top_p
    if sampling.top_k:
        body["top_k"] = sampling.top_k
    if sampling.min_p:
        body["min_p"] = sampling.min_p
    for name, off in (("repetition_penalty", 1.0), ("presence_penalty", 0.0), ("frequency_penalty", 0.0)):
        if (value := getattr(sampling, name)) != off:
            body[name] = value
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.stop_tokens:
        body["stop_token_ids"] = list(sampling.stop_tokens)
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): value for token, value in sampling.logit_bias}
    if num > 1:
        body["n"] = num
    if logprobs:
        body["logprobs"] = True if chat else 0
    # one seed a row: the same request always draws the same numbers, another row others
    digest = hashlib.blake2b(f"{request.seed}/{request.id}/{start}".encode(), digest_size=4).digest()
    body["seed"] = int.from_bytes(digest, "big") >> 1
    return body


def parse_completions(body: bytes, choice_text: Callable[[Any], Any]) -> tuple[list[Completion], int, int]:
    """Completions of a response body, and the tokens that it counts in and out.

    Args:
        choice_text: the text of a decoded choice; what raises there, or is no text, is a malformed answer.

    Raises:
        TransientError: the body cannot be read, or an answer is empty or cut off by a filter.
    """
    try:
        answer = json.loads(body)
        choices = answer["choices"]
        usage = answer.get("usage") or {}
        tokens_in, tokens_out = (
            min(MAX_REPORTED_TOKENS, max(0, int(usage.get(name) or 0))) for name in ("prompt_tokens", "completion_tokens")
        )
        outs = []
        for choice in choices:
            text = choice_text(choice)
            if not isinstance(text, str) or not text.strip():
                raise TransientError("empty", "the answer is empty", 200)
            if choice.get("finish_reason") == "content_filter":
                raise TransientError("filtered", "the endpoint's content filter cut the answer off", 200)
            text = SURROGATE.sub("\ufffd", text)  # which no file could hold
            logprobs = _parse_logprobs(choice.get("logprobs"))
            finish: Finish = "length" if choice.get("finish_reason") == "length" else "stop"
            outs.append(Completion(text, len(logprobs) or tokens_out // len(choices), logprobs, finish))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as e:
        raise TransientError("malformed", f"the answer cannot be read ({e.__class__.__name__})", 200) from e
    if not outs:
        raise TransientError("malformed", "the answer holds no choice", 200)
    return outs, tokens_in, tokens_out


def _parse_logprobs(found: Any) -> tuple[float, ...]:
    if not found:
        return ()
    if "content" in found:
        return tuple(float(token["logprob"]) for token in found["content"] or ())
    return tuple(float(value) for value in found.get("token_logprobs") or () if value is not None)


def parse_retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or a date; None where it says nothing."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return min(MAX_RETRY_AFTER, seconds) if seconds > 0 else 0.0
