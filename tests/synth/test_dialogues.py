"""What is left of a simulated user's words, and when a dialogue ends."""

import time

import pytest

from gristmill.data.chat import Message
from gristmill.synth.dialogues import ends_dialogue, strip_politeness


@pytest.mark.parametrize(
    ("said", "left"),
    [
        ("Thank you so much! Can you name a second one?", "Can you name a second one?"),
        ("User: Great, thanks for the explanation. why is that?", "Why is that?"),
        ("That's very helpful. What about bees? Thanks in advance!", "What about bees"),
        ('"How long does it take?"', "How long does it take?"),
        ("How long does it take?", "How long does it take?"),
        ("Thanks!", "Thanks!"),
        ("What next?\n\nAssistant: Next comes the harvest.", "What next?"),
        ("I thanked her for the bread. Was that right?", "I thanked her for the bread. Was that right?"),
        ("Great Britain is an island. Is Ireland?", "Great Britain is an island. Is Ireland?"),
    ],
)
def test_politeness_is_taken_off(said: str, left: str) -> None:
    assert strip_politeness(said).rstrip("?") == left.rstrip("?")


def test_politeness_without_end_takes_no_time() -> None:
    start = time.process_time()
    for text in ("So what! " + "Thanks!!! " * 2000 + "x", "Thanks! " * 2000, "thanks" + "!" * 5000, "a" + " ,." * 5000 + "thanks"):
        assert strip_politeness(text)
    assert time.process_time() - start < 20


def test_a_farewell_and_a_repetition_end_a_dialogue() -> None:
    talk = [Message("user", "What is a tide?"), Message("assistant", "The sea going up and down.")]
    assert ends_dialogue("That's all, goodbye!", talk) and ends_dialogue("what is a tide", talk) and ends_dialogue("...", talk)
    assert not ends_dialogue("Why does it say goodbye to the moon?", talk) and not ends_dialogue("And the moon?", talk)
