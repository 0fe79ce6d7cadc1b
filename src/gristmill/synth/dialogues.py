"""Multi-turn dialogue synthesis: a model is the assistant and, by persona, the user (report, section 3.2.1)."""

import re
from collections.abc import AsyncIterator, Sequence
from typing import Literal

from pydantic import Field

from gristmill.core.config import Section
from gristmill.data.chat import Message
from gristmill.data.rows import Demonstration, Prompt, make_id
from gristmill.synth.parsing import normalize
from gristmill.synth.writer import ParseError, Writer

PERSONAS = {"normal": "next_turn", "complex": "next_turn_complex", "concise": "next_turn_concise"}
SPEAKER = re.compile(r"\A\s*(?:\*\*)?(?:user|human|me)(?:\*\*)?\s*:\s*(?:\*\*)?", re.I)
OTHER = re.compile(r"^\s*(?:\*\*)?(?:assistant|ai|bot)(?:\*\*)?\s*:", re.I | re.M)
# What polite users of simulations say before and after what they want.
POLITE_START = re.compile(
    r"(?:oh|ah|wow|great|perfect|excellent|wonderful|awesome|fantastic|amazing|interesting|nice|ok|okay|sure|thanks|thank you"
    r"|many thanks|i appreciate (?:it|that|this)|that(?:'s| is) (?:\w{1,20} )?(?:helpful|great|perfect|interesting|useful|good)"
    r"|that makes sense|i see|got it)(?: so much| very much| a lot| again)?(?: for [^.!?\n]{1,120})?\s{0,9}[.!,;:\u2014-]{1,9}\s{0,9}",
    re.I,
)
POLITE_END = re.compile(
    r"(?:\A|[\s.!?,])(?P<said>(?:thanks|thank you|many thanks|i appreciate your help|i(?:'d| would) appreciate (?:it|that))"
    r"(?: so much| very much| a lot| again| in advance)?(?: for your (?:help|time|patience))?[\s.!]{0,9})\Z",
    re.I,
)
MAX_POLITENESS_CHARS = 200  # characters at either end
FAREWELL = re.compile(r"\b(?:goodbye|bye|that(?:'s| is) all|no (?:more|further) questions|have a (?:nice|great|good) (?:day|one))\b", re.I)


class Dialogues(Section):
    """Recipe section of dialogues grown from prompts."""

    turns: int = Field(3, gt=1, description="user turns, the prompt's included")
    share: float = Field(0.2, ge=0, le=1, description="share of the single-turn prompts that become dialogues")
    personas: tuple[Literal["normal", "complex", "concise"], ...] = Field(("normal", "complex", "concise"), min_length=1)
    threshold: float = Field(0.0, description="lowest reward that every turn of a kept dialogue must reach")

    def chosen(self, writer: Writer, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts that become dialogues."""
        single = [p for p in prompts if len(p.messages) == 1]
        return [p for p in single if writer.random("dialogue", p.id).random() < self.share]

    async def write(self, writer: Writer, prompts: Sequence[Prompt]) -> AsyncIterator[Demonstration]:
        """A dialogue for each prompt; one that ends early is kept from its second turn on."""

        async def dialogue(prompt: Prompt) -> list[Demonstration]:
            persona = writer.random("persona", prompt.id).choice(self.personas)
            talk, parents = list(prompt.messages), [prompt.id]
            for turn in range(self.turns):
                answer = await writer.answer(talk, "answer", parents)
                talk.append(Message("assistant", answer.text))
                parents.append(answer.id)
                if turn + 1 == self.turns:
                    break
                reply = await writer.next_turn(PERSONAS[persona], talk, parents)
                said = strip_politeness(reply.text)
                if ends_dialogue(said, talk):
                    break
                talk.append(Message("user", said))
                parents.append(reply.id)
            if len(talk) < 4:
                raise ParseError("dialogue of one turn")
            name = make_id("dialogue", prompt.id, parents)
            return [Demonstration(name, "dialogue", tuple(talk), answer.model, tuple(parents))]

        async for row in writer.each(prompts, dialogue):
            yield row


def strip_politeness(text: str) -> str:
    """Strip a simulated user's words of the speaker's name, thanks and praise around what is wanted.

    What a user turn holds after its own words (a made-up answer of the assistant) is cut off. A text of nothing but politeness stays.
    """
    text = SPEAKER.sub("", text.strip())
    if found := OTHER.search(text):
        text = text[: found.start()].strip() or text
    if len(text) > 1 and text[0] == text[-1] == '"' and '"' not in text[1:-1]:
        text = text[1:-1].strip()
    shorter = text
    while found := POLITE_START.match(shorter):
        shorter = shorter[found.end() :]
    while found := POLITE_END.search(shorter, max(0, len(shorter) - MAX_POLITENESS_CHARS)):
        shorter = shorter[: found.start("said")].rstrip(" ,")
    if not normalize(shorter):
        return text
    return shorter[0].upper() + shorter[1:] if shorter[0] != text[0] else shorter


def ends_dialogue(said: str, talk: Sequence[Message]) -> bool:
    """Whether a user's words end the dialogue: nothing is asked, it is a farewell, or it was said before."""
    folded = normalize(said)
    if not folded or (len(said) < 120 and "?" not in said and FAREWELL.search(said)):
        return True
    return any(normalize(m.content) == folded for m in talk)
