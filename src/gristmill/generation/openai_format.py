"""The OpenAI wire format, the client's side: request bodies out of requests, completions and errors out of response bodies."""

import email.utils
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from gristmill.core.errors import InputError
from gristmill.data.tokenizer import SURROGATE
from gristmill.generation.api import Completion, Finish, Request

MAX_RETRY_AFTER = 120.0  # seconds; an endpoint that asks for more is treated as one that asks for this
MAX_REPORTED_TOKENS = 1 << 40  # that an answer may say it has
# Fields of a request that some endpoints do not take, or take by another name.
FIELDS = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "stop",
    "stop_token_ids", "logit_bias", "n", "logprobs", "seed",
)  # fmt: skip
KEPT_FIELDS = ("stop", "stop_token_ids")  # without them an answer would be another text: a refusal of these ends the row
OWN_FIELDS = ("model", "messages", "prompt", "n", "stream")  # which no extra body may set
# What an error that is told in words alone is as a status, by its type or code, never by its message.
_STATUS_OF = {
    "rate_limit|too_many|quota|throttl": 429, "authentication|api_key|unauthorized": 401, "permission|forbidden": 403, "not_?found": 404,
    "invalid_?request|bad_?request|context_length|unsupported|unknown_parameter|validation": 400,
}  # fmt: skip
_REFUSAL = re.compile(
    r"unsupported|not (?:currently |yet )?(?:supported|permitted|allowed|recognized|available)|(?:isn't|does(?: not|n't)) support"
    r"|unrecognized|unknown|unexpected|extra[_ ](?:inputs?|fields?|forbidden)|only the default|deprecated"
    r"|invalid (?:parameter|argument|field|property)s?\s*:?\s*[\"'`]?\w+[\"'`]?\s*(?=[\"'}\],.]|$)",  # and not what its value must be
    re.IGNORECASE,
)
_REFUSED_N = re.compile(
    r"(?<![\w.])(?:['\"`]n['\"`]|n)\s*(?::|=|>|must|should|can only|is not supp)|only (?:one|1) (?:completion|choice)", re.IGNORECASE
)
# Where an answer without choices says what went wrong.
_ERROR_NAMES = ("detail", "message", "msg", "errors", "error_msg", "error_code", "base_resp", "fault")
# Why an answer ended, in the words of many servers; what is none of these is an end.
_BROKEN_OFF = re.compile("error|abort|cancel|insufficient|timeout|timed_out|interrupt|overload|preempt")
_FILTERED = re.compile("filter|safety|recitation|blocklist|blocked|prohibited|moderat|toxic|spii|sensitive")
_CUT_OFF = re.compile("length|max_.*tokens|token.*limit|limit.*token|context_window|budget|incomplete")
_DURATION = re.compile(
    r"(?:(?P<d>\d+)d)?(?:(?P<h>\d+)h)?(?:(?P<m>\d+)m(?!s))?(?:(?P<s>\d+(?:\.\d+)?)s)?(?:(?P<ms>\d+(?:\.\d+)?)ms)?", re.ASCII
)
_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_NUMBER = re.compile(r"\d{1,30}(?:\.\d{1,30})?", re.ASCII)


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


class ErrorInAnswer(Exception):
    """An error that an endpoint tells in the body of an answer.

    Attributes:
        status: HTTP status that such an error has.
        error: the decoded error.
        headers: those that the error holds, as gateways pass them on.
    """

    def __init__(self, error: Any):
        super().__init__(error if isinstance(error, str) else json.dumps(error, ensure_ascii=False))
        self.error, self.status = error, _status_of(error)
        metadata = error.get("metadata") if isinstance(error, dict) else None
        found = metadata.get("headers") if isinstance(metadata, dict) else None
        self.headers = {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}


def check_fields(fields: Mapping[str, str | None], extra_body: Mapping[str, Any]) -> None:
    """Raise `InputError` unless these are other names of fields that are sent, and a body that may be added."""
    for name, other in fields.items():
        if name not in FIELDS:
            raise InputError(f"fields names {name!r}, which is not sent: choose among {', '.join(FIELDS)}.")
        if other is not None and (not other or other in (*OWN_FIELDS, *FIELDS)):
            raise InputError(f"fields calls {name!r} {other!r}: give the endpoint's name for it, or null to leave it out.")
    for name in extra_body:
        if name in OWN_FIELDS or (name in FIELDS and name not in fields) or name in fields.values():
            raise InputError(f"extra_body sets {name!r}, which is sent anyway: set it where it belongs, or leave it out first, by fields.")
    try:
        json.dumps(dict(extra_body), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise InputError(f"extra_body is no JSON ({e}): give text, numbers, true, false, null, lists and mappings.") from e


def request_body(
    request: Request,
    num: int,
    start: int,
    *,
    model: str,
    chat: bool,
    logprobs: bool,
    fields: Mapping[str, str | None] | None = None,
    extra_body: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Body of `/chat/completions`, or of `/completions` where not `chat`.

    Args:
        num: samples that are asked for.
        start: samples that the request has already, which would draw the same numbers.
        fields: what the endpoint calls a field; None leaves it out.
        extra_body: what is sent besides.

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
    for name, other in (fields or {}).items():
        if name in body:
            value = body.pop(name)
            if other is not None:
                body[other] = value
    return body | dict(extra_body or {})


# ---- answers ----


def decode_answer(body: bytes) -> tuple[dict[str, Any], int, int]:
    """A decoded response body, and the tokens that it counts in and out.

    Raises:
        TransientError: it cannot be read.
        ErrorInAnswer: it holds an error.
    """
    try:
        answer = json.loads(body)
        if not isinstance(answer, dict):
            raise TypeError
        if (
            answer.get("error")
            or answer.get("object") == "error"
            or (answer.get("choices") is None and any(answer.get(name) for name in _ERROR_NAMES))
        ):
            raise ErrorInAnswer(answer.get("error") or answer)
        usage = answer.get("usage") or {}
        tokens_in, tokens_out = (
            min(MAX_REPORTED_TOKENS, max(0, int(usage.get(name) or 0))) for name in ("prompt_tokens", "completion_tokens")
        )
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as e:
        raise _malformed(e) from e
    return answer, tokens_in, tokens_out


def parse_completions(answer: dict[str, Any], num: int, tokens_out: int, choice_text: Callable[[Any], Any]) -> tuple[list[Completion], str]:
    """Completions of a decoded response, and why some of them have no text.

    An answer that is all reasoning, or a call of a tool, is a completion without text: to ask again would buy the same. One that
    is empty for no reason, or cut off by a filter or an error, is left out where others came with it.

    Args:
        num: most completions to read.
        tokens_out: tokens that the response counts.
        choice_text: the text of a decoded choice; what raises there, or is no text, is a malformed answer.

    Raises:
        TransientError: the answer cannot be read, or no choice is any good.
        ErrorInAnswer: no choice is any good, and one holds an error.
    """
    outs: list[Completion] = []
    reason = ""
    failed: TransientError | ErrorInAnswer = TransientError("malformed", "the answer holds no choice", 200)
    try:
        choices = answer["choices"]
        if choices is None:
            raise failed
        share = tokens_out // max(1, len(choices))
        for choice in choices[:num]:
            finish_reason = str(choice.get("finish_reason")).lower()
            if choice.get("error") or _BROKEN_OFF.search(finish_reason):
                failed = ErrorInAnswer(choice.get("error") or f"the answer was broken off ({finish_reason})")
                continue
            if _FILTERED.search(finish_reason):
                failed = TransientError("filtered", "the endpoint's content filter cut the answer off", 200)
                continue
            text = choice_text(choice)
            finish: Finish = "length" if _CUT_OFF.search(finish_reason) else "stop"
            if not isinstance(text, str):
                raise TypeError
            if not text.strip():
                why = _why_empty(choice, finish)
                if not why:
                    failed = TransientError("empty", "the answer is empty", 200)
                    continue
                reason, text = why, ""
            text = SURROGATE.sub("\ufffd", text)  # which no file could hold
            logprobs = _parse_logprobs(choice.get("logprobs")) if text else ()
            outs.append(Completion(text, len(logprobs) or share, logprobs, finish))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as e:
        raise _malformed(e) from e
    if not outs:
        raise failed
    return outs, reason


def message_text(choice: Any, chat: bool) -> str:
    """The text of a decoded choice, in one piece or in parts. What raises here is a malformed answer."""
    content = choice["message"].get("content") if chat else choice["text"]  # some servers leave null fields out
    if isinstance(content, list):  # the parts of other types are reasoning, or no text
        parts = [part if isinstance(part, str) else part.get("text") for part in content if _is_text(part)]
        content = "".join(part for part in parts if isinstance(part, str))
    if content is not None and not isinstance(content, str):
        raise TypeError
    return content or ""


def _is_text(part: Any) -> bool:
    return isinstance(part, str) or part.get("type", "text") in ("text", "output_text")


def _why_empty(choice: Any, finish: Finish) -> str:
    """Why a choice without text will have none the next time either; "" where it might."""
    message = choice.get("message") or choice
    parts = message.get("content")
    names = ("reasoning_content", "reasoning", "reasoning_details", "thinking")
    reasoned = any(place.get(name) for place in (message, choice) for name in names) or (
        isinstance(parts, list) and any(not _is_text(part) for part in parts)
    )
    if finish == "length":
        what = "reasoning took all of max_tokens" if reasoned else "max_tokens ended it"
        return f"the answer has no text: {what} (finish_reason length). Allow more tokens, or less reasoning"
    if reasoned:
        return "the answer is reasoning alone, without text"
    if message.get("tool_calls") or message.get("function_call"):
        return "the answer is a call of a tool, without text"
    return "the model refused to answer" if message.get("refusal") else ""


def _malformed(e: Exception) -> TransientError:
    return TransientError("malformed", f"the answer cannot be read ({e.__class__.__name__})", 200)


def _parse_logprobs(found: Any) -> tuple[float, ...]:
    if not found:
        return ()
    if "content" in found:
        values = tuple(float(token["logprob"]) for token in found["content"] or ())
    else:
        values = tuple(float(value) for value in found.get("token_logprobs") or () if value is not None)
    if not all(map(math.isfinite, values)):
        raise ValueError
    return values


# ---- errors ----


def _status_of(error: Any) -> int:
    if not isinstance(error, dict):
        return 500
    for name in ("code", "status", "status_code"):
        value = error.get(name)
        if isinstance(value, int | str) and re.fullmatch(r"[45][0-9]{2}", str(value)):
            return int(value)
    kind = f"{error.get('type')} {error.get('code')}".lower()
    return next((status for pattern, status in _STATUS_OF.items() if re.search(pattern, kind)), 500)


def refused_fields(words: str, sent: Iterable[str]) -> list[str]:
    """Fields among those sent that an error refuses by name, whatever their value: one that it only mentions it does not refuse."""
    try:
        named = set(_places(json.loads(words)))
    except (ValueError, RecursionError):
        named = set()
    near = " ".join(words[max(0, m.start() - 80) : m.end() + 80] for m in _REFUSAL.finditer(words))
    found = []
    for name in sent:
        if name == "n":
            hit = bool(_REFUSED_N.search(words)) or (name in named and near != "")
        else:
            hit = name in named or bool(re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", near))
        if hit and (near or name == "n"):
            found.append(name)
    # where the error gives a place, other fields are those that it advises
    return [name for name in found if name in named] or found


def _places(error: Any, depth: int = 8) -> list[str]:
    """Names that an error gives as the place of what is wrong: OpenAI's `param`, and the last part of FastAPI's `loc`."""
    if isinstance(error, list) and depth:
        return [name for item in error[:64] for name in _places(item, depth - 1)]
    if not isinstance(error, dict) or not depth:
        return []
    found = [error["param"].split(".")[-1]] if isinstance(error.get("param"), str) else []
    loc = error.get("loc")
    if isinstance(loc, list) and loc and isinstance(loc[-1], str):
        found.append(loc[-1])
    return found + [name for key in ("error", "detail", "message", "errors") for name in _places(error.get(key), depth - 1)]


def parse_retry_after(value: str | None, unit: float = 1.0, now: float | None = None) -> float | None:
    """Seconds that a Retry-After header asks for, as a number, a duration or any of the three HTTP dates; None where it says nothing.

    Args:
        unit: seconds of a bare number's unit.
        now: the server's clock, in seconds since 1970.
    """
    seconds = _seconds(value.strip(), unit, time.time() if now is None else now) if value else None
    return None if seconds is None else min(MAX_RETRY_AFTER, seconds)


def retry_after_of(headers: Mapping[str, str], *, rate_limited: bool = False) -> float | None:
    """Seconds after which an answer asks to come again, by `retry-after-ms` or Retry-After; None where it says nothing.

    Args:
        rate_limited: also look at when rate limits are reset: the last of those that are used up, or of all.
    """
    found = {name.lower(): value for name, value in headers.items()}
    now = _date(found.get("date", ""))
    wait = parse_retry_after(found.get("retry-after-ms"), 0.001, now)
    wait = parse_retry_after(found.get("retry-after"), 1.0, now) if wait is None else wait
    if wait is not None or not rate_limited:
        return wait
    resets = {name: parse_retry_after(value, 1.0, now) for name, value in found.items() if "ratelimit" in name and "reset" in name}
    known = {name: seconds for name, seconds in resets.items() if seconds is not None}
    used_up = [seconds for name, seconds in known.items() if found.get(name.replace("reset", "remaining"), "").strip() == "0"]
    return max(used_up or known.values(), default=None)


def _seconds(value: str, unit: float, now: float) -> float | None:
    """Seconds from now that a header gives: a number, a duration such as 6m0s or 120ms, a date, or a time since 1970."""
    if _NUMBER.fullmatch(value):
        number = float(value) * unit
        if unit == 1.0 and number > 1e9:  # a time, in seconds or milliseconds
            number = max(0.0, (number / 1000 if number > 1e11 else number) - now)
        return number
    if value and (match := _DURATION.fullmatch(value)):
        return sum(float(match[name]) * seconds for name, seconds in _UNITS.items() if match[name])
    at = _date(value)
    return None if at is None else max(0.0, at - now)


def _date(value: str) -> float | None:
    """Seconds since 1970 of an HTTP date in any of its three forms, or of an ISO 8601 time."""
    if not 8 <= len(value) <= 64:
        return None
    for parse in (email.utils.parsedate_to_datetime, datetime.fromisoformat):
        try:
            at = parse(value)
            return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
        except (ValueError, TypeError, IndexError, OverflowError):
            continue
    return None
