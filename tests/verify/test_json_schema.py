import pytest

from gristmill.verify.json_schema import extract_json


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1}',
        'Here it is: {"a": 1}. Done.',
        'Use {braces} and [1]: {"a": 1}, as in {this}',
        '```json\n{"a": 1}\n```\nNot {"b": 2}',
        'See [2]. ```\n{"a": 1}\n```',
    ],
)
def test_json_is_found_among_other_brackets(text: str) -> None:
    assert extract_json(text) == {"a": 1}


@pytest.mark.parametrize("text", ["", "{", "{braces}", '{"a": NaN}', "{'a': 1}", "[" * 100_000])
def test_what_is_no_json_is_none(text: str) -> None:
    assert extract_json(text) is None
