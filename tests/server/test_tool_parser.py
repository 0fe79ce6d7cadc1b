"""Tool call parsers: every form read back, whatever pieces it comes in, and nothing made up."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.server.tool_parser import FORMS, CallDelta, ToolCallParser, parse_calls

TOOLS: dict[str, dict[str, Any]] = {
    "mill": {"type": "object", "properties": {"sacks": {"type": "integer"}, "note": {"type": "string"}, "fine": {"type": "boolean"}}},
    "sieve": {"type": "object"},
}
ARGUMENTS = '{"sacks": 12, "note": "a } \\" ] </tool_call>", "fine": true}'
MILL = ("mill", json.loads(ARGUMENTS))
XML = (
    "<tool_call>\n<function=mill>\n<parameter=sacks>\n12\n</parameter>\n<parameter=note>\nline\n\n <b>two\n</parameter>\n"
    "</function>\n</tool_call>"
)
DEEPSEEK = [f"<\uff5ctool\u2581{name}\uff5c>" for name in ("calls\u2581begin", "call\u2581begin", "sep", "call\u2581end", "calls\u2581end")]
WRITTEN: dict[str, list[tuple[str, str, list[tuple[str, Any]]]]] = {
    "hermes": [
        (f'<tool_call>\n{{"name": "mill", "arguments": {ARGUMENTS}}}\n</tool_call>', "", [MILL]),
        (
            f'Let me see.\n\n<tool_call>\n{{"name": "mill", "arguments": {ARGUMENTS}}}\n</tool_call>\n'
            '<tool_call>{"arguments": {}, "name": "sieve"}</tool_call>\n done ',
            "Let me see.\n done",
            [MILL, ("sieve", {})],
        ),
        ('<tool_call>{"name": "sieve", "arguments": {"a": {"b": [1, "]"]}}}', "", [("sieve", {"a": {"b": [1, "]"]}})]),
        ('<tool_call>{"name": "sieve", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("sieve", {"a": 1})]),
    ],
    "llama3_json": [
        (f'{{"name": "mill", "parameters": {ARGUMENTS}}}', "", [MILL]),
        (
            f'<|python_tag|> {{"name": "mill", "parameters": {ARGUMENTS}}}; {{"name": "sieve", "parameters": {{}}}}',
            "",
            [MILL, ("sieve", {})],
        ),
    ],
    "mistral": [
        (
            f'[TOOL_CALLS] [{{"name": "mill", "arguments": {ARGUMENTS}, "id": "abcdefghi"}}, {{"name": "sieve", "arguments": {{}}}}]',
            "",
            [MILL, ("sieve", {})],
        ),
    ],
    "mistral_args": [(f"Well.[TOOL_CALLS]mill[ARGS]{ARGUMENTS}[TOOL_CALLS]sieve{{}}", "Well.", [MILL, ("sieve", {})])],
    "granite": [(f'<|tool_call|>[{{"name": "mill", "arguments": {ARGUMENTS}}}]', "", [MILL])],
    "jamba": [(f'<tool_calls>[\n    {{"name": "mill", "arguments": {ARGUMENTS}}}\n]</tool_calls> x', " x", [MILL])],
    "phi4_mini_json": [(f'functools[{{"name": "mill", "arguments": {ARGUMENTS}}}]', "", [MILL])],
    "qwen3_coder": [
        (XML, "", [("mill", {"sacks": 12, "note": "line\n\n <b>two"})]),
        (
            f"I go.\n{XML}\n<tool_call>\n<function=sieve>\n</function>\n</tool_call>",
            "I go.",
            [("mill", {"sacks": 12, "note": "line\n\n <b>two"}), ("sieve", {})],
        ),
        (
            "<tool_call><function=mill><parameter=note></function></parameter></function></tool_call>",
            "",
            [("mill", {"note": "</function>"})],
        ),
    ],
    "pythonic": [
        (
            "[mill(sacks=-12, note='x [', fine=True), sieve(a={'b': [None, true]}, c=\"\\ud83d\\ude00\")]",
            "",
            [("mill", {"sacks": -12, "note": "x [", "fine": True}), ("sieve", {"a": {"b": [None, True]}, "c": "\U0001f600"})],
        ),
    ],
    # as the published templates write them: vLLM's for DeepSeek-V3, GLM-4.5's and Kimi-K2's own
    "deepseek_v3": [
        (
            f"I go.{DEEPSEEK[0]}{DEEPSEEK[1]}function{DEEPSEEK[2]}mill\n```json\n{ARGUMENTS}\n```{DEEPSEEK[3]}\n"
            f"{DEEPSEEK[1]}function{DEEPSEEK[2]}sieve\n```json\n{{}}\n```{DEEPSEEK[3]}{DEEPSEEK[4]}",
            "I go.",
            [MILL, ("sieve", {})],
        ),
        (f"{DEEPSEEK[0]}{DEEPSEEK[1]}function{DEEPSEEK[2]}sieve\n```json\n{{}}", "", [("sieve", {})]),
    ],
    "glm45": [
        (
            "I go.\n<tool_call>mill\n<arg_key>sacks</arg_key>\n<arg_value>12</arg_value>\n<arg_key>note</arg_key>\n"
            "<arg_value>line\n </tool_call></arg_value>\n</tool_call>\n<tool_call>sieve\n</tool_call>",
            "I go.",
            [("mill", {"sacks": 12, "note": "line\n </tool_call>"}), ("sieve", {})],
        ),
    ],
    "kimi_k2": [
        (
            f"I go.<|tool_calls_section_begin|><|tool_call_begin|>functions.mill:0<|tool_call_argument_begin|>{ARGUMENTS}<|tool_call_end|>"
            "<|tool_call_begin|>functions.sieve:12<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
            "I go.",
            [MILL, ("sieve", {})],
        ),
    ],
}
# No calls: what breaks off, names no tool, is no JSON, or is only spoken of.
BROKEN = {
    "hermes": [
        f'<tool_call>\n{{"name": "mill", "arguments": {ARGUMENTS[:20]}',
        '<tool_call>\n{"name": "burn", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "mill", "arguments": {sacks: 1}}\n</tool_call>',
        '<tool_call>\n{"name": "mill", "arguments": [1]}\n</tool_call>',
        '<tool_call>\n{"name": "mill", "arguments": {"sacks": NaN}}\n</tool_call>',
        "Write <tool_call> before a call, and </tool_call> behind it. ",
        "<tool_call>",
        "<tool_call>\n\n",
        '<tool_call>\n{"arguments": {}}\n</tool_call>',
        '{"name": "mill", "arguments": {}}',
        f"<tool_call>{'[' * 5000}",
        '<tool_call>{"name": ' + "[" * 5000 + "]" * 5000 + "}",
        "a < b <tool",
    ],
    "llama3_json": [
        '{"name": "burn", "parameters": {}}',
        '{"answer": 1} ',
        "  [1]",
        '{"name": "mill"',
        "Hm {",
        "<|python_tag|>print(1)",
        " ",
    ],
    "mistral": ["[TOOL_CALLS] [1]", '[TOOL_CALLS] [{"name": "mill"', "[TOOL_CALLS] ", "[TOOL_"],
    "mistral_args": ["[TOOL_CALLS]burn{}", "[TOOL_CALLS]mill[ARGS]{", "[TOOL_CALLS]mill[AR", "[TOOL_CALLS]mill x"],
    "qwen3_coder": [
        "<tool_call>\n<function=mill>\n<parameter=sacks>\ntwelve\n</parameter>\n</function>\n</tool_call>",
        "<tool_call>\n<function=burn>\n</function>\n</tool_call>",
        XML[:-60],
        "<tool_call><function=mill>hm</function>",
        "<tool_call><func",
    ],
    "deepseek_v3": [
        f"{DEEPSEEK[0]}{DEEPSEEK[1]}function{DEEPSEEK[2]}burn\n```json\n{{}}\n```{DEEPSEEK[3]}{DEEPSEEK[4]}",
        f"{DEEPSEEK[0]}{DEEPSEEK[1]}function{DEEPSEEK[2]}mill\n```json\n{{",
        f"{DEEPSEEK[0]}{DEEPSEEK[1]}func",
        f"{DEEPSEEK[0]}{DEEPSEEK[1]}function{DEEPSEEK[2]}mill\n```json\n" + " " * 900 + "x",
    ],
    "glm45": [
        "<tool_call>burn\n</tool_call>",
        "<tool_call>mill\n<arg_key>sacks</arg_key>",
        "<tool_call>{}</tool_call>",
        "<tool_call>mill is",
    ],
    "kimi_k2": [
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.mill:<|tool_call_argument_begin|>{}",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.mi",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.burn:0<|tool_call_argument_begin|>{}<|tool_call_end|>",
    ],
    "pythonic": [
        "[1] is a note",
        "[mill(__import__('os'))]",
        "[mill(sacks=1",
        "[burn()]",
        "[mill(sacks=9**9)]",
        "[",
        "[mill(**{})]",
        "[mill(sacks=1e999)]",
    ],
}


def told(form: str, text: str, cuts: list[int], *, live: bool) -> tuple[str, list[tuple[str, str]]]:
    parser = ToolCallParser(FORMS[form], TOOLS, live=live)
    said, calls = "", list[tuple[str, str]]()
    ends = [*sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for start, end in zip([0, *ends], ends, strict=False):
        for piece in parser.add(text[start:end], last=False):
            said, calls = taken(said, calls, piece)
    for piece in parser.add("", last=True):
        said, calls = taken(said, calls, piece)
    return said, calls


def taken(said: str, calls: list[tuple[str, str]], piece: str | CallDelta) -> tuple[str, list[tuple[str, str]]]:
    if isinstance(piece, str):
        return said + piece, calls
    if piece.name:
        assert piece.index == len(calls)
        return said, [*calls, (piece.name, "")]
    assert piece.index == len(calls) - 1 and piece.arguments
    return said, [*calls[:-1], (calls[-1][0], calls[-1][1] + piece.arguments)]


@pytest.mark.parametrize("form", FORMS)
def test_what_a_model_writes_is_read_back(form: str) -> None:
    for text, said, calls in WRITTEN[form]:
        found = parse_calls(text, FORMS[form], TOOLS)
        assert (found[0], [(name, json.loads(arguments)) for name, arguments in found[1]]) == (said, calls)


@pytest.mark.parametrize("form", BROKEN)
def test_what_is_no_call_stays_text(form: str) -> None:
    for text in BROKEN[form]:
        assert parse_calls(text, FORMS[form], TOOLS) == (text, [])


CASES = [(form, text) for form, cases in WRITTEN.items() for text, *_ in cases] + [
    (form, text) for form, texts in BROKEN.items() for text in texts if len(text) < 1000
]


@settings(deadline=None, max_examples=40)
@given(case=st.sampled_from(CASES), cuts=st.lists(st.integers(0, 300), max_size=12))
def test_any_split_gives_the_same_calls(case: tuple[str, str], cuts: list[int]) -> None:
    form, text = case
    whole = parse_calls(text, FORMS[form], TOOLS)
    assert told(form, text, cuts, live=False) == told(form, text, list(range(len(text))), live=False) == whole
    if text not in BROKEN.get(form, ()):
        assert told(form, text, cuts, live=True) == whole


@settings(deadline=None, max_examples=60)
@given(case=st.sampled_from(CASES), place=st.integers(0, 300))
def test_an_answer_that_goes_on_within_a_call_ends_it(case: tuple[str, str], place: int) -> None:
    form, text = case
    before, behind = text[:place], text[place:]
    whole = ToolCallParser(FORMS[form], TOOLS)
    num_before = len([piece for piece in whole.add(before) if isinstance(piece, CallDelta) and piece.name])
    expected: tuple[str, list[tuple[str, str]]] = "", [("", "")] * num_before
    for piece in whole.add(behind, last=True):
        expected = taken(*expected, piece)
    parser = ToolCallParser(FORMS[form], TOOLS, begun=before)
    said, calls = "", list[tuple[str, str]]()
    for piece in [*parser.add(behind[:3]), *parser.add(behind[3:], last=True)]:
        said, calls = taken(said, calls, piece)
    if FORMS[form].begin or parser.goes_on:
        assert calls == expected[1][num_before:] and expected[0].endswith(said)
        assert said == behind or expected[1]
    else:
        assert (said, calls) == parse_calls(behind, FORMS[form], TOOLS) or before.strip() in ("", FORMS[form].also)


SCRAPS = [*"<[{}]\"'\\,:;/ \n", "<tool_call>", "</tool_call>", '{"name": "mill", ', '"arguments": {}}', "[TOOL_CALLS]", "mill", "word"]


@settings(deadline=None, max_examples=40)
@given(
    form=st.sampled_from(sorted(FORMS)),
    scraps=st.lists(st.sampled_from(SCRAPS), max_size=12),
    cuts=st.lists(st.integers(0, 60), max_size=6),
)
def test_any_text_is_told_the_same_in_pieces_and_nothing_but_white_space_is_lost(form: str, scraps: list[str], cuts: list[int]) -> None:
    text = "".join(scraps)
    said, calls = parse_calls(text, FORMS[form], TOOLS)
    assert told(form, text, cuts, live=False) == (said, calls)
    assert calls or said == text


def test_an_answer_full_of_broken_calls_is_read_in_no_time() -> None:
    text = "<tool_call>{" * 2_000
    parser = ToolCallParser(FORMS["hermes"], TOOLS)
    scanned = 0
    scan = parser._scan

    def counted() -> int:
        nonlocal scanned
        scanned += len(parser._text) - parser._at
        return scan()

    parser._scan = counted  # type: ignore[method-assign]
    assert parser.add(text, last=True)[-1] and scanned < 40 * len(text)
    assert parse_calls(text, FORMS["hermes"], TOOLS) == (text, [])


def test_arguments_come_as_they_are_written() -> None:
    parser = ToolCallParser(FORMS["hermes"], TOOLS, live=True)
    assert parser.add('<tool_call>\n{"name": "mill", "argum') == []
    assert parser.add('ents": {"note"') == [CallDelta(0, "mill"), CallDelta(0, arguments='{"note"')]
    assert parser.add(': "}') == [CallDelta(0, arguments=': "}')]
    assert parser.add('"}}\n</tool') == [CallDelta(0, arguments='"}')]
    assert parser.add("_call>") == parser.add("", last=True) == []
