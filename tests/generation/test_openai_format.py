"""Requests become bodies, and headers and bodies are read, whatever they hold."""

from gristmill.generation.openai_format import MAX_RETRY_AFTER, parse_retry_after


def test_retry_after_may_be_a_date_or_nonsense() -> None:
    assert parse_retry_after("2") == 2.0 and parse_retry_after(None) is None and parse_retry_after("soon") is None
    assert parse_retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert parse_retry_after("99999") == MAX_RETRY_AFTER
