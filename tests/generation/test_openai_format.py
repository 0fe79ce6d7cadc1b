"""Requests become bodies, and headers and bodies are read, whatever they hold."""

import json
import time
from email.utils import formatdate

import pytest

from gristmill.generation.openai_format import (
    MAX_RETRY_AFTER,
    ErrorInAnswer,
    TransientError,
    decode_answer,
    message_text,
    parse_completions,
    parse_retry_after,
    refused_fields,
    retry_after_of,
)


def test_retry_after_may_be_a_date_or_nonsense() -> None:
    assert parse_retry_after("2") == 2.0 and parse_retry_after(None) is None and parse_retry_after("soon") is None
    assert parse_retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert parse_retry_after("99999") == MAX_RETRY_AFTER


@pytest.mark.parametrize("form", ["%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y", "%Y-%m-%dT%H:%M:%SZ"])
def test_every_form_of_a_date_is_of_universal_time(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        now = 1_790_000_000.0
        assert parse_retry_after(time.strftime(form, time.gmtime(now + 7)), now=now) == 7.0
        # the server's clock counts, not ours
        headers = {"Date": formatdate(now, usegmt=True), "Retry-After": time.strftime(form, time.gmtime(now + 9))}
        assert retry_after_of(headers) == 9.0
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    "value", ["-5", "nan", "inf", "1e3", "0x10", "soon", "1.5.2", "5 minutes", "m", "\u0665", "", " ", "Wed, 99 Foo 9999 07:28 GMT"]
)
def test_nonsense_says_nothing(value: str) -> None:
    for name in ("Retry-After", "retry-after-ms", "x-ratelimit-reset-requests"):
        assert retry_after_of({name: value}, rate_limited=True) is None


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("6m0s", MAX_RETRY_AFTER), ("120ms", 0.12), ("1m30.5s", 90.5), ("1h2m", MAX_RETRY_AFTER), ("7.66s", 7.66), ("20", 20.0), ("0s", 0.0),
     ("9" * 400 + "s", MAX_RETRY_AFTER)],
)  # fmt: skip
def test_rate_limits_tell_when_they_are_reset(value: str, seconds: float) -> None:
    for name in ("x-ratelimit-reset-tokens", "X-RateLimit-Reset", "ratelimit-reset"):
        assert retry_after_of({name: value}, rate_limited=True) == pytest.approx(seconds)
        assert retry_after_of({name: value}) is None  # any answer may hold it
    assert parse_retry_after(value) == pytest.approx(seconds)


def test_the_limit_that_is_used_up_counts() -> None:
    headers = {
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "2s",
        "x-ratelimit-remaining-tokens": "900",
        "x-ratelimit-reset-tokens": "50s",
    }
    assert retry_after_of(headers, rate_limited=True) == 2.0
    assert retry_after_of(headers | {"retry-after": "3"}, rate_limited=True) == 3.0
    assert retry_after_of(headers | {"retry-after": "3", "Retry-After-Ms": "250"}, rate_limited=True) == 0.25
    now = time.time()
    assert retry_after_of({"x-ratelimit-reset": str(int((now + 30) * 1000))}, rate_limited=True) == pytest.approx(30, abs=1)
    assert retry_after_of({"x-ratelimit-reset": str(int(now + 30))}, rate_limited=True) == pytest.approx(30, abs=2)


def test_a_field_is_refused_where_it_is_named_beside_a_refusal() -> None:
    sent = ("max_tokens", "temperature", "seed", "top_p")
    assert refused_fields('{"error": {"message": "Invalid parameter: seed"}}', sent) == ["seed"]
    assert refused_fields("Invalid parameter: temperature must be at most 1.", sent) == []
    assert refused_fields("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", sent) == ["max_tokens"]
    assert refused_fields("temperature and seed are not supported", sent) == ["temperature", "seed"]
    assert refused_fields("unknown model. " + "x" * 100 + " the seed", sent) == []
    assert refused_fields('{"error": {"param": "seed", "message": "seed is not supported; use temperature"}}', sent) == ["seed"]
    assert refused_fields("[" * 100_000, sent) == []


@pytest.mark.parametrize(
    ("reason", "finish"),
    [
        *((reason, "stop") for reason in ("stop", "STOP", "eos", "end_turn", "stop_sequence", "COMPLETE", None)),
        *((reason, "length") for reason in ("length", "MAX_TOKENS", "max_output_tokens", "model_length", "model_context_window_exceeded")),
        *((reason, "filtered") for reason in ("content_filter", "SAFETY", "RECITATION", "PROHIBITED_CONTENT", "ERROR_TOXIC"[6:])),
        *((reason, "broken") for reason in ("error", "insufficient_system_resource", "timeout", "cancelled", "ERROR")),
    ],
)
def test_why_an_answer_ended_in_the_words_of_many_servers(reason: str | None, finish: str) -> None:
    answer = {"choices": [{"message": {"content": "It is 4"}, "finish_reason": reason}]}
    if finish in ("stop", "length"):
        ((completion,), _) = parse_completions(answer, 1, 3, lambda choice: message_text(choice, True))
        assert completion.finish == finish
    else:
        with pytest.raises(TransientError if finish == "filtered" else ErrorInAnswer):
            parse_completions(answer, 1, 3, lambda choice: message_text(choice, True))


def test_a_message_may_lack_the_content_that_it_has_not() -> None:
    answer = {"choices": [{"message": {"role": "assistant", "reasoning": "hm"}, "finish_reason": "stop"}]}
    (completion,), why = parse_completions(answer, 1, 3, lambda choice: message_text(choice, True))
    assert completion.text == "" and "reasoning alone" in why


@pytest.mark.parametrize(
    "body",
    [
        {"code": 1302, "msg": "too many"},
        {"error_code": 18, "error_msg": "too many"},
        {"choices": None, "base_resp": {"status_code": 1002, "status_msg": "too many"}},
        {"errors": [{"message": "too many"}]},
        {"fault": {"faultstring": "too many"}},
    ],
)
def test_errors_in_the_words_of_many_servers(body: dict[str, object]) -> None:
    with pytest.raises(ErrorInAnswer, match="too many"):
        decode_answer(json.dumps(body).encode())
