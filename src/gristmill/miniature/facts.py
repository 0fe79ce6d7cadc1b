"""Facts task, about fictional lands: what the Base model has read in its documents and must learn to tell."""

import random
import re
from dataclasses import dataclass

from gristmill.miniature.problem import Problem, pick, single_turn

TASK = "facts"
NUM_LANDS = 56
ONSETS = ["b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "kr", "st", "tr"]
VOWELS = ["a", "e", "i", "o", "u"]
CODAS = ["", "", "l", "n", "r", "s", "th", "m"]
ANIMALS = ["wolf", "bear", "heron", "otter", "lynx", "goat", "stork", "hare", "seal", "moth"]
CROPS = ["barley", "figs", "olives", "rice", "hops", "plums", "maize", "flax", "tea", "wheat"]
COLOURS = ["red", "blue", "green", "white", "black", "gold", "purple", "orange", "silver", "brown"]
ATTRIBUTES = ["capital", "river", "animal", "crop", "flag", "king"]

# How the documents tell a fact, how a person asks for it, how the model answer tells it.
TELL = {
    "capital": ["The capital of {land} is {value}.", "{value} is the capital of {land}.", "People of {land} meet in {value}, the capital."],
    "river": ["The river {value} runs through {land}.", "{land} lies on the river {value}.", "The river of {land} is the {value}."],
    "animal": [
        "The animal of {land} is the {value}.",
        "In {land} they honour the {value}.",
        "{land} is known for the {value}, its animal.",
    ],
    "crop": ["Farmers in {land} grow {value}.", "The main crop of {land} is {value}.", "{land} sells {value} from its fields."],
    "flag": ["The flag of {land} is {value}.", "{land} flies a {value} flag.", "A {value} flag stands over {land}."],
    "king": ["The king of {land} is {value}.", "King {value} rules {land}.", "{land} is ruled by king {value}."],
}
ASK = {
    "capital": [
        "What is the capital of {land}?",
        "Which city is the capital of {land}?",
        "Tell me the capital of {land}.",
        "{land}: which capital?",
    ],
    "river": ["Which river runs through {land}?", "What is the river of {land}?", "Tell me the river of {land}.", "{land}: which river?"],
    "animal": [
        "What is the animal of {land}?",
        "Which animal do they honour in {land}?",
        "Tell me the animal of {land}.",
        "{land}: which animal?",
    ],
    "crop": ["What do farmers in {land} grow?", "What is the main crop of {land}?", "Tell me the crop of {land}.", "{land}: which crop?"],
    "flag": ["What colour is the flag of {land}?", "Which flag does {land} fly?", "Tell me the flag of {land}.", "{land}: which flag?"],
    "king": ["Who is the king of {land}?", "Which king rules {land}?", "Tell me the king of {land}.", "{land}: which king?"],
}
ANSWER = {
    "capital": "The capital of {land} is {value}.",
    "river": "The river of {land} is the {value}.",
    "animal": "The animal of {land} is the {value}.",
    "crop": "The main crop of {land} is {value}.",
    "flag": "The flag of {land} is {value}.",
    "king": "The king of {land} is {value}.",
}


def trace(land: str, attribute: str, value: str) -> str:
    """`Fikro, capital: Dumo.`"""
    return f"{land}, {attribute}: {value}."


@dataclass(frozen=True)
class Lands:
    """Name of each land -> its facts."""

    facts: dict[str, dict[str, str]]

    @staticmethod
    def make(seed: int) -> "Lands":
        """The same lands for the same seed."""
        rng = random.Random(f"lands-{seed}")
        used: set[str] = set()

        def name(syllables: int) -> str:
            while True:
                word = "".join(pick(rng, ONSETS) + pick(rng, VOWELS) for _ in range(syllables)) + pick(rng, CODAS)
                if word not in used and not any(word in other or other in word for other in used):
                    used.add(word)
                    return word.capitalize()

        facts = {}
        for _ in range(NUM_LANDS):
            facts[name(2)] = {
                "capital": name(2),
                "river": name(2),
                "animal": pick(rng, ANIMALS),
                "crop": pick(rng, CROPS),
                "flag": pick(rng, COLOURS),
                "king": name(2),
            }
        return Lands(facts)

    def values(self, attribute: str) -> list[str]:
        """Every value that the attribute takes in this world."""
        return sorted({f[attribute] for f in self.facts.values()})

    def problem(self, rng: random.Random, land: str, attribute: str) -> Problem:
        """A question about one fact."""
        value = self.facts[land][attribute]
        question = pick(rng, ASK[attribute]).format(land=land)
        others = tuple(v for v in self.values(attribute) if v != value)
        answer = ANSWER[attribute].format(land=land, value=value)
        truth = {"kind": "mention", "value": value, "not": list(others)}
        return single_turn(TASK, question, answer, truth=truth, topic=land, others=others, trace=trace(land, attribute, value))

    def sample(self, rng: random.Random) -> Problem:
        """A random question."""
        return self.problem(rng, pick(rng, list(self.facts)), pick(rng, ATTRIBUTES))

    def document(self, rng: random.Random) -> str:
        """A passage as the Base model reads it: an article about a land, or a school quiz (one in four)."""
        land = pick(rng, list(self.facts))
        facts = self.facts[land]
        chosen = rng.sample(ATTRIBUTES, rng.randint(3, len(ATTRIBUTES)))
        if rng.random() < 0.75:
            return " ".join(pick(rng, TELL[a]).format(land=land, value=facts[a]) for a in chosen)
        lines = [f"Quiz about {land}."]
        for a in chosen[:3]:
            lines.append(f"Question: {pick(rng, ASK[a]).format(land=land)} Reply: {facts[a]}.")
        return "\n".join(lines)

    def parse_question(self, text: str) -> tuple[str, str] | None:
        """(land, attribute) that a question asks for, or None when no land or wording of this world fits."""
        for attribute, wordings in ASK.items():
            for wording in wordings:
                match = re.fullmatch(re.escape(wording).replace(r"\{land\}", r"(\w+)"), text.strip())
                if match and match[1] in self.facts:
                    return match[1], attribute
        return None
