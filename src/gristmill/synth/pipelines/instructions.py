"""Instruction-following pipeline: prompts with verifiable constraints, the 25 types of IFEval (2311.07911; report, section 3.2.1)."""

import random
import re
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, ClassVar

from pydantic import Field

from gristmill.data.chat import Message
from gristmill.data.rows import Prompt, make_id
from gristmill.synth.parsing import parse_list
from gristmill.synth.pipelines.base import Inputs, Pipeline
from gristmill.synth.pipelines.two_turn import openings
from gristmill.synth.writer import Topic, Writer

MakeConstraint = Callable[[random.Random, str], tuple[dict[str, Any], str]]
TOPIC = "TOPIC"  # stands for the topic in a form
WORD_LIST = (
    "river balance window reason garden measure signal winter market bridge memory pattern kitchen courage harvest distance method "
    "shadow village custom engine profit silence teacher border rhythm weather promise energy tool habit colour journey budget "
    "question neighbour paper island choice century surface growth danger music letter pocket season detail effort candle "
)
WORDS = WORD_LIST.split()
FIRST_WORDS = (*WORDS, *["however", "finally", "today", "imagine", "people", "sometimes", "because", "quietly", "everyone", "nothing"])
ENDINGS = (
    "That is all there is to it.",
    "I hope this serves you well.",
    "Ask me again whenever you like.",
    "And so the matter rests.",
    "Now it is your turn.",
    "What would you add?",
    "Thank you for your patience.",
    "The rest is practice.",
    "Good luck with it!",
    "Do you want to hear more?",
)
LANGUAGES = {"de": "German", "fr": "French", "es": "Spanish", "it": "Italian", "pt": "Portuguese", "ru": "Russian", "hi": "Hindi"}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def _relation(rng: random.Random, low: int, high: int) -> tuple[str, int, str]:
    """A relation and a count within bounds, and words that say both."""
    relation, num = rng.choice(["at least", "less than"]), rng.randint(low, high)
    said = [f"{num} or more", f"no fewer than {num}", f"at least {num}"]
    if relation == "less than":
        said = [f"fewer than {num}", f"less than {num}", f"not as many as {num}" if num > 2 else f"fewer than {num}"]
    return relation, num, rng.choice(said)


def _number(rng: random.Random, low: int, high: int) -> tuple[int, str]:
    num = rng.randint(low, high)
    return num, rng.choice([str(num), NUMBERS[num]])


def _plural(num: int) -> str:
    return "" if num == 1 else "s"


def _number_words(rng: random.Random, prompt: str) -> tuple[dict[str, Any], str]:
    relation = rng.choice(["at least", "less than"])
    num = rng.randrange(60, 301, 10) if relation == "at least" else rng.randrange(30, 251, 10)
    words = {
        "at least": (
            f"Make it long: {num} words or more.",
            f"I need no fewer than {num} words from you.",
            f"Take your time over this; anything under {num} words is too short.",
            f"Length of the reply: {num}+ words.",
            f"Use at least {num} words.",
        ),
        "less than": (
            f"Be brief and stay below {num} words.",
            f"Your reply has to fit into fewer than {num} words.",
            f"Stop before you reach {num} words.",
            f"Length of the reply: under {num} words.",
            f"Use less than {num} words.",
        ),
    }
    return {"relation": relation, "num_words": num}, rng.choice(words[relation])


def _number_sentences(rng: random.Random, prompt: str) -> tuple[dict[str, Any], str]:
    relation, num, said = _relation(rng, 3, 14)
    words = (
        f"Spend {said} sentences on it.",
        f"I count sentences: let there be {said}.",
        f"The reply should come to {said} sentences.",
        f"Use {said} sentences.",
    )
    return {"relation": relation, "num_sentences": num}, rng.choice(words)


def _number_paragraphs(rng: random.Random, prompt: str) -> tuple[dict[str, Any], str]:
    num, said = _number(rng, 2, 6)
    words = (
        f"Arrange the text in {said} paragraphs, and put a line of three asterisks (***) between each and the next.",
        f"I want {said} paragraphs with *** as the only thing that parts them.",
        f"Cut your reply into {said} paragraphs by means of the divider ***",
        f"Write {said} paragraphs with the divider *** between them.",
    )
    return {"num_paragraphs": num}, rng.choice(words)


def _nth_paragraph(rng: random.Random, prompt: str) -> tuple[dict[str, Any], str]:
    num, said = _number(rng, 2, 5)
    nth, word = rng.randint(1, num), rng.choice(FIRST_WORDS)
    words = (
        f"Give me {said} paragraphs with an empty line after each; the word that opens number {nth} is {word}.",
        f"Use {said} paragraphs (a blank line parts them and stands nowhere else) and open paragraph {nth} with {word}.",
        f"Write {said} paragraphs with a blank line between them and nowhere else; paragraph {nth} must begin with the word {word}.",
        f'Lay it out in {said} paragraphs, blank lines between them. In paragraph {nth}, "{word}" comes first.',
    )
    return {"num_paragraphs": num, "nth_paragraph": nth, "first_word": word}, rng.choice(words)


def _keywords(rng: random.Random, prompt: str) -> tuple[dict[str, Any], str]:
    chosen = rng.sample(WORDS, rng.randint(1, 3))
    named = " and ".join(chosen)
    words = (
        f"Work in the following: {', '.join(chosen)}.",
        f"Somewhere in your text I want to read {named}.",
        f"Use the word{_plural(len(chosen))} {named}.",
        f"Let {named} occur in what you say.",
        f"It has to mention {' and '.join(f'{chr(34)}{w}{chr(34)}' for w in chosen)}.",
    )
    return {"keywords": chosen}, rng.choice(words)


def _keyword_frequency(rng: random.Random, prompt: str) -> tuple[dict[str, Any], str]:
    (relation, num, said), word = _relation(rng, 2, 5), rng.choice(WORDS)
    words = (
        f"Bring in the word {word} {said} times.",
        f'"{word}" has to turn up {said} times.',
        f"The word {word} must occur {said} times.",
        f"Count how often you say {word}: {said} times is what I want.",
    )
    return {"relation": relation, "keyword": word, "frequency": num}, rng.choice(words)


def _forbidden(rng: random.Random, prompt: str) -> tuple[dict[str, Any], str]:
    told = [w for w in dict.fromkeys(re.findall(r"[a-z]{4,}", prompt.lower())) if w not in WORDS]
    chosen = rng.sample([*WORDS, *told, *told, *told], rng.randint(1, 3))  # what the question speaks of is harder to avoid
    chosen = list(dict.fromkeys(chosen))
    words = (
        f"Keep these out of your text: {', '.join(chosen)}.",
        f"Get by without saying {' or '.join(chosen)}.",
        f"Do not use the word{_plural(len(chosen))} {' and '.join(chosen)}.",
        f"The following must not occur: {', '.join(chosen)}.",
        f"Find your way round the word{_plural(len(chosen))} {' and '.join(chosen)}.",
    )
    return {"forbidden_words": chosen}, rng.choice(words)


def _letters(rng: random.Random, prompt: str) -> tuple[dict[str, Any], str]:
    relation, num, said = _relation(rng, 3, 12)
    letter = rng.choice("abcdefghilmnoprstuvwy" if relation == "at least" else "bfgjkpqvwxyz")
    words = (
        f"The letter {letter} has to occur {said} times.",
        f"Count the {letter}'s in your reply: there should be {said}.",
        f'Write so that "{letter}" appears {said} times as a letter.',
    )
    return {"let_relation": relation, "letter": letter, "let_frequency": num}, rng.choice(words)


def _capital_words(rng: random.Random, prompt: str) -> tuple[dict[str, Any], str]:
    relation, num, said = _relation(rng, 2, 8)
    words = (
        f"Stress what matters by writing WHOLE WORDS in capitals, {said} of them.",
        f"Words in capital letters alone must occur {said} times.",
        f"Let {said} words stand in capital letters from beginning to end.",
        f"In your text {said} words should be in upper case throughout.",
    )
    return {"capital_relation": relation, "capital_frequency": num}, rng.choice(words)


def _language(rng: random.Random, prompt: str) -> tuple[dict[str, Any], str]:
    code = rng.choice(list(LANGUAGES))
    name = LANGUAGES[code]
    words = (
        f"Reply in {name} from the first word to the last.",
        f"I read {name} only.",
        f"Answer in {name} and in no other language.",
        f"Say all of it in {name} and none of it in English.",
    )
    return {"language": code}, rng.choice(words)


def _placeholders(rng: random.Random, prompt: str) -> tuple[dict[str, Any], str]:
    num, said = _number(rng, 1, 6)
    words = (
        f"Leave {said} or more blanks for me to fill in, each named in square brackets like [date].",
        f"There should be no fewer than {said} gaps in square brackets, for instance [place].",
        f"Leave at least {said} placeholder{_plural(num)} in square brackets, such as [name].",
        f"I will adapt it: put in at least {said} bracketed slot{_plural(num)}, such as [price].",
    )
    return {"num_placeholders": num}, rng.choice(words)


def _bullets(rng: random.Random, prompt: str) -> tuple[dict[str, Any], str]:
    num, said = _number(rng, 2, 8)
    words = (
        f"Sum it up in {said} points, one a line, each line starting with an asterisk and a space.",
        f"Give exactly {said} bullet points, each on a line that begins with an asterisk and a space.",
        f"I want a list of precisely {said} items that are marked with * in Markdown.",
        f"Set it down as {said} bullets, neither more nor fewer; begin every one with * ",
    )
    return {"num_bullets": num}, rng.choice(words).strip()


def _highlights(rng: random.Random, prompt: str) -> tuple[dict[str, Any], str]:
    num, said = _number(rng, 1, 5)
    words = (
        f"Mark {said} or more key phrases with asterisks, *in this way*.",
        f"Highlight at least {said} passage{_plural(num)} with asterisks, *like this*.",
        f"Put stars around the words that count (*so*), {said} time{_plural(num)} or more often.",
        f"Emphasise no fewer than {said} passage{_plural(num)} by setting *asterisks* on both sides.",
    )
    return {"num_highlights": num}, rng.choice(words)


def _sections(rng: random.Random, prompt: str) -> tuple[dict[str, Any], str]:
    (num, said), word = _number(rng, 2, 5), rng.choice(["Section", "SECTION", "Part", "Chapter", "Lesson"])
    words = (
        f"Order it under {said} headings, which read {word} 1, {word} 2 and so forth.",
        f"Split what you say into {said} pieces and head each with {word} and its number, as in {word} 1",
        f"Divide the answer into {said} parts that begin with {word} 1, {word} 2 and so on.",
        f"Number the parts of your reply from {word} 1 to {word} {num}.",
    )
    return {"section_spliter": word, "num_sections": num}, rng.choice(words)


def _postscript(rng: random.Random, prompt: str) -> tuple[dict[str, Any], str]:
    mark = rng.choice(["P.S.", "P.P.S"])
    words = (
        f"End with a postscript that begins with {mark}",
        f"Close with an afterthought, introduced by {mark}",
        f"After the main text add one more remark behind the letters {mark}",
        f"Do not forget a {mark} as the last thing in your reply, as in a letter.",
    )
    return {"postscript_marker": mark}, rng.choice(words)


def _ending(rng: random.Random, prompt: str) -> tuple[dict[str, Any], str]:
    phrase = rng.choice(ENDINGS)
    words = (
        f"Your last words are to be: {phrase}",
        f'Close with "{phrase}" and let nothing come after it.',
        f"End with exactly these words and nothing after them: {phrase}",
        f"The very end of the text reads: {phrase}",
    )
    return {"end_phrase": phrase}, rng.choice(words)


def _repeat(rng: random.Random, prompt: str) -> tuple[dict[str, Any], str]:
    words = (
        "Copy what I asked above, to the letter, as the start of your reply; after that comes your answer.",
        "Open by quoting my request above unchanged (none of the rules that follow it), and go on with the answer.",
        "First repeat the request above word for word, without this sentence and all after it; then answer.",
        "Say my question from above once more in exactly my words, and only then answer it.",
    )
    return {"prompt_to_repeat": prompt}, rng.choice(words)


def _one_of(*words: str) -> MakeConstraint:
    return lambda rng, prompt: ({}, rng.choice(words))


YES_NO = "My answer is yes. / My answer is no. / My answer is maybe."
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
    "change_case:english_capital": _one_of(
        "WRITE THE WAY I DO NOW, IN CAPITALS THROUGHOUT, IN ENGLISH.",
        "Write in English and in capital letters alone.",
        "Use English and upper case for every single letter.",
        "Shout it: not one small letter anywhere, and English please.",
    ),
    "change_case:english_lowercase": _one_of(
        "write the way i do now, without a single capital, in english.",
        "Write in English and in small letters alone, all lowercase.",
        "Use English and small letters for everything, names and sentence starts too.",
        "No upper case anywhere, please: English in lower case from start to finish.",
    ),
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:title": _one_of(
        "Put a headline of your own above it, between << and >>.",
        "Give the answer a title in double angular brackets, such as <<hope>>.",
        "It needs a name at the top, set in doubled angle brackets like <<First Snow>>.",
        "Start with a title that has << before it and >> after it.",
    ),
    "detectable_format:json_format": _one_of(
        "Reply with a JSON object and not a word outside of it.",
        "Give the whole answer as JSON.",
        "A program will read your reply, so all of it must be valid JSON.",
        "Pack everything you have to say into JSON; nothing may stand before or after it.",
    ),
    "detectable_format:constrained_response": _one_of(
        f"Would you advise a friend to look into this? Choose one, word for word: {YES_NO}",
        f"Is this worth a whole day of study? Your verdict must be one of these sentences: {YES_NO}",
        f"Tell me whether this matters to most people, by picking one of these three: {YES_NO}",
    ),
    "combination:two_responses": _one_of(
        "Do it twice, in two different ways, with ****** on a line of its own in between.",
        "Give two different answers with six asterisks (******) between them.",
        "I would like to choose: offer two versions that six asterisks (******) keep apart.",
        "Give a first answer, then a line of six stars, ******, then another answer that differs.",
    ),
    "combination:repeat_prompt": _repeat,
    "startend:end_checker": _ending,
    "startend:quotation": _one_of(
        'Set the reply as a whole between double quotes, "like this".',
        "Put the whole answer in double quotation marks.",
        "The first character you write is a double quotation mark, and so is the last.",
        'Quote yourself: open with " and close with " so that all of it stands inside.',
    ),
    "punctuation:no_comma": _one_of(
        "Manage without the comma; other marks are fine.",
        "The comma key of my keyboard is broken, so let there be none in the text.",
        "Use no commas.",
        "Do all of this with zero commas.",
    ),
}
# Constraints that contradict others, or leave them no room, stand alone.
ALONE = ("detectable_format:json_format", "detectable_format:constrained_response", "language:response_language")
SHARE_ALONE = 0.2  # of prompts, so that each of these is asked for about as often as the others
CASE = {"change_case:english_capital", "change_case:english_lowercase"}
LAYOUT = {"length_constraints:number_paragraphs", "length_constraints:nth_paragraph_first_word", "detectable_format:multiple_sections"}
CLASHES = (
    {*CASE, "change_case:capital_word_frequency", "detectable_content:postscript"},
    {*CASE, "detectable_format:multiple_sections"},
    {*CASE, "startend:end_checker"},
    {*CASE, "combination:repeat_prompt"},
    {"startend:end_checker", "detectable_content:postscript"},
    {"startend:end_checker", "punctuation:no_comma"},
    {"length_constraints:number_words", "length_constraints:number_sentences", "combination:two_responses"},
    {*LAYOUT, "combination:two_responses", "detectable_format:number_bullet_lists"},
    {"length_constraints:nth_paragraph_first_word", "detectable_format:title", "combination:repeat_prompt"},
    {"keywords:existence", "keywords:frequency", "keywords:forbidden_words", "combination:repeat_prompt"},
    {"detectable_format:number_bullet_lists", "detectable_format:number_highlighted_sections"},
    {"combination:repeat_prompt", "startend:quotation"},
    {"combination:repeat_prompt", "punctuation:no_comma"},
    {"combination:repeat_prompt", "keywords:letter_frequency"},
)


def draw_constraints(rng: random.Random, prompt: str, num: int) -> tuple[list[dict[str, Any]], str]:
    """Up to `num` constraints that can hold together: their checks, and the words that ask for them."""
    chosen = [rng.choice(ALONE)] if rng.random() < SHARE_ALONE else []
    for name in rng.sample(list(CONSTRAINTS), len(CONSTRAINTS)):
        if len(chosen) == num or chosen and chosen[0] in ALONE:
            break
        if name not in ALONE and not any(name in clash and clash & set(chosen) for clash in CLASHES):
            chosen.append(name)
    made = [(name, *CONSTRAINTS[name](rng, prompt)) for name in chosen]
    return [{"id": name, **values} for name, values, _ in made], " ".join(words for _, _, words in made)


def ask_about(topics: Sequence[Topic], forms: Sequence[str], num: int, rng: random.Random) -> list[Topic]:
    """Questions about topics in given forms, which `TOPIC` stands for in them; each topic about as often, no question twice."""
    found: list[Topic] = []
    turns = [rng.sample(list(forms), len(forms)) for _ in topics]  # of each topic its forms in an order of its own
    for place in range(min(num, len(topics) * len(forms))):
        turn, number = divmod(place, len(topics))
        topic, form = topics[number], turns[number][turn]
        text = form.replace(TOPIC, topic.text)
        found.append(Topic(text, make_id("form", topic.id, text), "template", topic.root or topic.id))
    return found


class Instructions(Pipeline):
    """Requests with constraints, in three forms: in the request, for a whole conversation, and as a revision of an answer."""

    prompts: int = Field(100, gt=0, description="prompts to write")
    max_constraints: int = Field(3, gt=0, description="most constraints a prompt")
    whole_talk: float = Field(0.2, ge=0, le=1, description="share whose constraints hold for a conversation of two user turns")
    revision: float = Field(0.2, ge=0, le=1, description="share that ask for the last answer again, under constraints")
    forms: float = Field(0.0, ge=0, le=1, description="share whose request is a form of the template pack about a topic, not a model's own")
    added: ClassVar[frozenset[str]] = frozenset({"forms"})

    @property
    def needs(self) -> str:
        return "topics" if self.forms else "topics or prompts"

    @property
    def reads(self) -> set[str]:
        return {"topics", "prompts"}

    async def write(self, writer: Writer, inputs: Inputs) -> AsyncIterator[Prompt]:
        templates = writer.templates

        async def constrain(first: Topic) -> list[Prompt]:
            rng = writer.random("constraints", first.id)
            checks, words = draw_constraints(rng, first.text, rng.randint(1, self.max_constraints))
            form = rng.random()
            talk, origin = [Message("user", first.text)], first.origin
            parents = [first.id] if origin != "template" else []
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

        forms = parse_list(templates["instruction_requests"].render(topic=TOPIC)) if self.forms else []
        first = ask_about(inputs.topics, forms, round(self.prompts * self.forms), writer.random("forms")) if self.forms else []
        if num := self.prompts - round(self.prompts * self.forms):
            first += await openings(writer, inputs, num)
        async for row in writer.each(first, constrain):
            yield row
