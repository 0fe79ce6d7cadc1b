"""Instruction-following pipeline: prompts with verifiable constraints, the 25 types of IFEval (2311.07911; report, section 3.2.1)."""

import random
from collections.abc import AsyncIterator, Callable
from typing import Any

from pydantic import Field

from gristmill.data.chat import Message
from gristmill.data.rows import Prompt, make_id
from gristmill.synth.pipelines.base import Inputs, Pipeline
from gristmill.synth.pipelines.two_turn import openings
from gristmill.synth.writer import Topic, Writer

MakeConstraint = Callable[[random.Random, str], tuple[dict[str, Any], str]]
WORDS = ("river", "balance", "window", "reason", "garden", "measure", "signal", "winter", "market", "bridge", "memory", "pattern")
ENDINGS = ("Is there anything else I can help with?", "That is all you need.", "I hope this serves you well.")
LANGUAGES = {"de": "German", "fr": "French", "es": "Spanish", "it": "Italian", "pt": "Portuguese", "ru": "Russian", "hi": "Hindi"}


def _count(rng: random.Random, low: int, high: int) -> tuple[str, int]:
    return rng.choice(["at least", "less than"]), rng.randint(low, high)


def _number_words(rng: random.Random, prompt: str) -> tuple[dict[str, Any], str]:
    relation, num = _count(rng, 40, 300)
    return {"relation": relation, "num_words": num}, f"Use {relation} {num} words."


def _number_sentences(rng: random.Random, prompt: str) -> tuple[dict[str, Any], str]:
    relation, num = _count(rng, 3, 15)
    return {"relation": relation, "num_sentences": num}, f"Use {relation} {num} sentences."


def _number_paragraphs(rng: random.Random, prompt: str) -> tuple[dict[str, Any], str]:
    num = rng.randint(2, 5)
    return {"num_paragraphs": num}, f"Write {num} paragraphs with the divider *** between them."


def _nth_paragraph(rng: random.Random, prompt: str) -> tuple[dict[str, Any], str]:
    num = rng.randint(2, 5)
    nth, word = rng.randint(1, num), rng.choice(WORDS)
    words = f"Write {num} paragraphs with a blank line between them and nowhere else; paragraph {nth} must begin with the word {word}."
    return {"num_paragraphs": num, "nth_paragraph": nth, "first_word": word}, words


def _keywords(rng: random.Random, prompt: str) -> tuple[dict[str, Any], str]:
    words = rng.sample(WORDS, 2)
    return {"keywords": words}, f"Use the words {' and '.join(words)}."


def _keyword_frequency(rng: random.Random, prompt: str) -> tuple[dict[str, Any], str]:
    (relation, num), word = _count(rng, 2, 5), rng.choice(WORDS)
    return {"relation": relation, "keyword": word, "frequency": num}, f"The word {word} must occur {relation} {num} times."


def _forbidden(rng: random.Random, prompt: str) -> tuple[dict[str, Any], str]:
    words = rng.sample(WORDS, 2)
    return {"forbidden_words": words}, f"Do not use the words {' and '.join(words)}."


def _letters(rng: random.Random, prompt: str) -> tuple[dict[str, Any], str]:
    (relation, num), letter = _count(rng, 4, 20), rng.choice("abcdefghilmnoprstuvw")
    values = {"let_relation": relation, "letter": letter, "let_frequency": num}
    return values, f"The letter {letter} must occur {relation} {num} times."


def _capital_words(rng: random.Random, prompt: str) -> tuple[dict[str, Any], str]:
    relation, num = _count(rng, 2, 10)
    return {"capital_relation": relation, "capital_frequency": num}, f"Words in capital letters alone must occur {relation} {num} times."


def _language(rng: random.Random, prompt: str) -> tuple[dict[str, Any], str]:
    code = rng.choice(list(LANGUAGES))
    return {"language": code}, f"Answer in {LANGUAGES[code]} and in no other language."


def _placeholders(rng: random.Random, prompt: str) -> tuple[dict[str, Any], str]:
    num = rng.randint(1, 6)
    return {"num_placeholders": num}, f"Leave at least {num} placeholders in square brackets, such as [name]."


def _bullets(rng: random.Random, prompt: str) -> tuple[dict[str, Any], str]:
    num = rng.randint(2, 6)
    return {"num_bullets": num}, f"Give exactly {num} bullet points, each on a line that begins with an asterisk and a space."


def _highlights(rng: random.Random, prompt: str) -> tuple[dict[str, Any], str]:
    num = rng.randint(1, 4)
    return {"num_highlights": num}, f"Highlight at least {num} passages with asterisks, *like this*."


def _sections(rng: random.Random, prompt: str) -> tuple[dict[str, Any], str]:
    num, word = rng.randint(2, 4), rng.choice(["Section", "Part"])
    return {
        "section_spliter": word,
        "num_sections": num,
    }, f"Divide the answer into {num} parts that begin with {word} 1, {word} 2 and so on."


def _postscript(rng: random.Random, prompt: str) -> tuple[dict[str, Any], str]:
    mark = rng.choice(["P.S.", "P.P.S"])
    return {"postscript_marker": mark}, f"End with a postscript that begins with {mark}"


def _ending(rng: random.Random, prompt: str) -> tuple[dict[str, Any], str]:
    phrase = rng.choice(ENDINGS)
    return {"end_phrase": phrase}, f"End with exactly these words and nothing after them: {phrase}"


def _repeat(rng: random.Random, prompt: str) -> tuple[dict[str, Any], str]:
    return {
        "prompt_to_repeat": prompt
    }, "First repeat the request above word for word, without this sentence and all after it; then answer."


def _plain(words: str) -> MakeConstraint:
    return lambda rng, prompt: ({}, words)


CONSTRAINTS: dict[str, MakeConstraint] = {
    "length_constraints:number_words": _number_words,
    "length_constraints:number_sentences": _number_sentences,
    "length_constraints:number_paragraphs": _number_paragraphs,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "keywords:existence": _keywords,
    "keywords:frequency": _keyword_frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letters,
    "language:response_language": _language,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _plain("Write in English and in capital letters alone."),
    "change_case:english_lowercase": _plain("Write in English and in small letters alone."),
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:title": _plain("Give the answer a title in double angular brackets, such as <<hope>>."),
    "detectable_format:json_format": _plain("Give the whole answer as JSON."),
    "detectable_format:constrained_response": _plain(
        "Answer with one of these sentences: My answer is yes. My answer is no. My answer is maybe."
    ),
    "combination:two_responses": _plain("Give two different answers with six asterisks (******) between them."),
    "combination:repeat_prompt": _repeat,
    "startend:end_checker": _ending,
    "startend:quotation": _plain("Put the whole answer in double quotation marks."),
    "punctuation:no_comma": _plain("Use no commas."),
}
# Constraints that contradict others, or leave them no room, stand alone.
ALONE = {
    "detectable_format:json_format",
    "detectable_format:constrained_response",
    "combination:repeat_prompt",
    "combination:two_responses",
    "language:response_language",
    "startend:quotation",
}
CLASHES = (
    {"change_case:english_capital", "change_case:english_lowercase", "change_case:capital_word_frequency", "detectable_content:postscript"},
    {"startend:end_checker", "detectable_content:postscript"},
    {"length_constraints:number_words", "length_constraints:number_sentences"},
    {"length_constraints:number_paragraphs", "length_constraints:nth_paragraph_first_word", "detectable_format:multiple_sections"},
    {
        "keywords:existence",
        "keywords:frequency",
        "keywords:forbidden_words",
        "change_case:english_capital",
        "change_case:english_lowercase",
    },
    {"detectable_format:number_bullet_lists", "detectable_format:number_highlighted_sections"},
    {"startend:end_checker", "change_case:english_capital", "change_case:english_lowercase", "punctuation:no_comma"},
)


def draw_constraints(rng: random.Random, prompt: str, num: int) -> tuple[list[dict[str, Any]], str]:
    """Up to `num` constraints that can hold together: their checks, and the words that ask for them."""
    chosen: list[str] = []
    for name in rng.sample(list(CONSTRAINTS), len(CONSTRAINTS)):
        apart = name in ALONE or any(name in clash and clash & set(chosen) for clash in CLASHES)
        if not chosen or not apart:
            chosen.append(name)
        if len(chosen) == num or chosen[0] in ALONE:
            break
    made = [(name, *CONSTRAINTS[name](rng, prompt)) for name in chosen]
    return [{"id": name, **values} for name, values, _ in made], " ".join(words for _, _, words in made)


class Instructions(Pipeline):
    """Requests with constraints, in three forms: in the request, for a whole conversation, and as a revision of an answer."""

    prompts: int = Field(100, gt=0, description="prompts to write")
    max_constraints: int = Field(3, gt=0, description="most constraints a prompt")
    whole_talk: float = Field(0.2, ge=0, le=1, description="share whose constraints hold for a conversation of two user turns")
    revision: float = Field(0.2, ge=0, le=1, description="share that ask for the last answer again, under constraints")

    @property
    def needs(self) -> str:
        return "topics or prompts"

    async def write(self, writer: Writer, inputs: Inputs) -> AsyncIterator[Prompt]:
        templates = writer.templates

        async def constrain(first: Topic) -> list[Prompt]:
            rng = writer.random("constraints", first.id)
            checks, words = draw_constraints(rng, first.text, rng.randint(1, self.max_constraints))
            form = rng.random()
            talk, parents, origin = [Message("user", first.text)], [first.id], first.origin
            if form < self.whole_talk + self.revision:
                # a request is repeated or ended in its own answer: no form for two turns
                checks, words = draw_constraints(rng, first.text, 1) if checks[0]["id"] == "combination:repeat_prompt" else (checks, words)
                while checks[0]["id"] == "combination:repeat_prompt":
                    checks, words = draw_constraints(rng, first.text, 1)
            if form < self.whole_talk:
                rule = templates["instruction_whole_talk"].render(constraints=words)
                talk = [Message("user", f"{rule}\n\n{first.text}")]
            elif form >= self.whole_talk + self.revision:
                talk = [Message("user", templates["instruction_prompt"].render(prompt=first.text, constraints=words))]
            if form < self.whole_talk + self.revision:
                answer = await writer.answer(talk, "answer", parents)
                talk.append(Message("assistant", answer.text))
                parents.append(answer.id)
                if form < self.whole_talk:
                    following = await writer.items("questions", 1, parents=parents, salt="next", topic=first.text)
                    talk.append(Message("user", following[0].text))
                    parents.append(following[0].id)
                else:
                    talk.append(Message("user", templates["instruction_revision"].render(constraints=words)))
            truth = {"kind": "instructions", "checks": checks}
            name = make_id("instructions", [(m.role, m.content) for m in talk], parents)
            return [Prompt(name, "instructions", tuple(talk), origin, (*parents, first.root or first.id), truth=truth)]

        async for row in writer.each(await openings(writer, inputs, self.prompts), constrain):
            yield row
