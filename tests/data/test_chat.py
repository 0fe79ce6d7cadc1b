"""Conversations: their plain form, and what no conversation may be."""

from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.core.errors import InputError
from gristmill.data.chat import Conversation, Message, Role, conversation, to_dicts

TURNS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=6).map(
    lambda texts: tuple(Message(cast(Role, ("user", "assistant")[i % 2]), text) for i, text in enumerate(texts))
)


@given(turns=TURNS)
def test_plain_form_round_trips(turns: Conversation) -> None:
    assert conversation(to_dicts(turns)) == turns == conversation(turns)


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "user"},
        {"content": "x"},
        {"role": "tool", "content": "x"},
        {"role": "user", "content": None},
        "hi",
    ],
)
def test_a_bad_message_is_named(turn: Any) -> None:
    with pytest.raises(InputError, match="message"):
        conversation([{"role": "user", "content": "fine"}, turn])


@pytest.mark.parametrize("weight", [0.5, 2, "0", [0]])
def test_another_weight_is_refused(weight: Any) -> None:
    with pytest.raises(InputError, match="weight"):
        conversation([{"role": "assistant", "content": "x", "weight": weight}])


@pytest.mark.parametrize("field", ["tool_calls", "function_call", "tool_call_id", "audio"])
def test_a_message_of_a_tool_is_refused_and_an_empty_field_is_not(field: str) -> None:
    with pytest.raises(InputError, match=field):
        conversation([{"role": "assistant", "content": "x", field: [{"id": "1"}]}])
    assert conversation([{"role": "assistant", "content": "x", field: None}]) == (Message("assistant", "x"),)


def test_half_of_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(InputError, match="surrogate"):
        conversation([{"role": "user", "content": "a\ud83d"}])
