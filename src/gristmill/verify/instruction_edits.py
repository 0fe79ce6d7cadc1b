"""Edits of an answer for each of IFEval's 25 types of instructions.

They go in a fixed order, so that none undoes another: what takes sentences away or adds them, then the shape, then marks and case, then
what wraps the whole.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from gristmill.core.response_text import repetition
from gristmill.verify.ifeval import OPTIONS, POSTSCRIPTS, check_instructions, detect_language, sentence_ends
from gristmill.verify.json_schema import extract_json
from gristmill.verify.text_edits import (
    COMMON,
    ITEM,
    MAX_REPETITION,
    RULE,
    WORD,
    RepairJob,
    add_head,
    add_tail,
    append_sentence,
    content_words,
    drop_sentences,
    even_groups,
    glue_headings,
    join_sentences,
    lines_of,
    plain_words,
    sentences_of,
    split_clauses,
    split_parts,
    spread,
    text_of,
    trim,
)

Edit = Callable[..., str]
EDITS: dict[str, Edit] = {}  # in their order
WITH_WORDS = (
    "All of this also has to do with {words}.",
    "A last thought belongs to {words}.",
    "It helps to think of {words} here too.",
    "Beside all that there is {words}.",
    "This brings us to {words}.",
)
WITH_KEYWORD = (
    "Much of this depends on {words}.",
    "That is where {words} comes in.",
    "It is easy to overlook {words}.",
    "Everything above can be read with {words} in mind.",
    "In short it comes back to {words}.",
    "A good next step is to look at {words}.",
)
POSTSCRIPT_TEXTS = (
    "There is more to say about this whenever you like.",
    "I hope that this is of use to you.",
    "Take your time with it.",
    "Tell me if a part of this is unclear.",
)
FIELDS = ("name", "date", "place", "address", "contact", "subject", "time", "amount", "title", "number", "reason", "signature")
CONNECTIVES = re.compile(r"(?:however|therefore|finally|first|second|third|next|then|also|meanwhile|moreover|overall|still|thus)$", re.I)


def _edit(name: str) -> Callable[[Edit], Edit]:
    def register(function: Edit) -> Edit:
        EDITS[name] = function
        return function

    return register


# ---- what goes or is added ----


@_edit("language:response_language")
def _language(text: str, job: RepairJob, language: str) -> str:
    """What is said in another language goes; there is no translation."""
    lines = [line for line in text.split("\n") if not line.strip() or detect_language(line) in (language, None)]
    return text_of([[line] for line in lines]) or text


@_edit("combination:two_responses")
def _two_responses(text: str, job: RepairJob) -> str:
    parts = [p.strip() for p in re.split(r"(?:\*[ \t]*){6,}", text) if p.strip()]
    headed = re.split(r"(?im)^\W*(?:response|answer|option|version)\s*(?:1|2|one|two)\b\W*$", text)
    if len(parts) < 2 and len(headed) == 3 and all(plain_words(p) for p in headed[1:]):
        parts = [p.strip() for p in headed[1:]]
    if len(parts) < 2:
        parts = parts or [text]
        for place, other in enumerate(job.others):
            other = re.split(r"(?:\*[ \t]*){6,}", other)[0].strip()
            if plain_words(other) and plain_words(other) != plain_words(parts[0]) and repetition(other) <= MAX_REPETITION:
                parts.append(other)
                job.sources.add(place)
                break
    return "\n\n******\n\n".join(parts[:2]) if len(parts) > 1 else text


@_edit("keywords:forbidden_words")
def _forbidden(text: str, job: RepairJob, forbidden_words: Sequence[str]) -> str:
    pattern = re.compile("|".join(rf"\b{re.escape(word)}\b" for word in forbidden_words), re.I)
    return drop_sentences(text, lambda s: len(pattern.findall(s)), lambda t: not pattern.search(t))


@_edit("keywords:letter_frequency")
def _letters(text: str, job: RepairJob, letter: str, let_frequency: int, let_relation: str) -> str:
    letter = letter.strip().lower()

    def num(part: str) -> int:
        return part.lower().count(letter)

    if let_relation == "less than":
        return drop_sentences(text, num, lambda t: num(t) < let_frequency)
    longer = join_sentences(text, job, lambda t: num(t) >= let_frequency)
    if letter == "!":
        ends = [i for i in sentence_ends(longer) if longer[i - 1] == "."]
        for place in ends[: max(0, let_frequency - num(longer))]:
            longer = f"{longer[: place - 1]}!{longer[place:]}"
    return longer


@_edit("keywords:frequency")
def _frequency(text: str, job: RepairJob, keyword: str, frequency: int, relation: str) -> str:
    pattern = re.compile(re.escape(keyword.strip()), re.I)

    def num(part: str) -> int:
        return len(pattern.findall(part))

    if relation == "less than":
        return drop_sentences(text, num, lambda t: num(t) < frequency)
    text = join_sentences(text, job, lambda t: num(t) >= frequency, wanted=lambda s: bool(pattern.search(s)))
    return _with_sentences(text, job, WITH_KEYWORD, keyword.strip(), lambda t: num(t) >= frequency)


@_edit("keywords:existence")
def _existence(text: str, job: RepairJob, keywords: Sequence[str]) -> str:
    def missing(part: str) -> list[str]:
        return [word for word in keywords if not re.search(re.escape(word), part, re.I)]

    for word in missing(text):
        has = re.compile(re.escape(word), re.I).search
        text = join_sentences(text, job, lambda t, has=has: bool(has(t)), wanted=lambda s, has=has: bool(has(s)))  # type: ignore[misc]
    return _with_sentences(text, job, WITH_WORDS, " and ".join(missing(text)), lambda t: not missing(t)) if missing(text) else text


def _with_sentences(text: str, job: RepairJob, forms: Sequence[str], words: str, enough: Callable[[str], bool]) -> str:
    """Add sentences that name words, each of another form, until it is enough; the text as it is where they do not suffice."""
    longer = text
    for form in job.shuffled(forms):
        if enough(longer):
            break
        candidate = append_sentence(longer, form.format(words=words))
        if job.harmless(longer, candidate):
            longer = candidate
    return longer if enough(longer) else text


@_edit("length_constraints:number_sentences")
def _number_sentences(text: str, job: RepairJob, num_sentences: int, relation: str) -> str:
    def num(part: str) -> int:
        return len(sentence_ends(part)) + 1

    if relation == "less than":
        room = num_sentences - job.spare.get("length_constraints:number_sentences", 0)
        return text if num(text) < room else trim(text, lambda t: num(t) < room)
    for split in (_close_lines, _split_sentences):
        if num(text) < num_sentences:
            text = split(text)
    return join_sentences(text, job, lambda t: num(t) >= num_sentences)


def _close_lines(text: str) -> str:
    """Full stops after items and lines that end without a mark."""
    return re.sub(r"(?m)(?<=[\w)])[ \t]*$", ".", text)


def _split_sentences(text: str) -> str:
    """Clauses that could be sentences become sentences."""
    text = re.sub(r"; (\w)", lambda m: ". " + m[1].upper(), text)
    clause = r", (and|but|so) (?=(?:it|they|he|she|we|you|this|these|there|that)\b)"
    return re.sub(clause, lambda m: f". {m[1].capitalize()} ", text)


@_edit("length_constraints:number_words")
def _number_words(text: str, job: RepairJob, num_words: int, relation: str) -> str:
    def num(part: str) -> int:
        return len(re.findall(r"\w+", part))

    if relation == "at least":
        return join_sentences(text, job, lambda t: num(t) >= num_words)
    room = num_words - job.spare.get("length_constraints:number_words", 0)
    return text if num(text) < room else trim(text, lambda t: num(t) < room)


# ---- the shape ----


@_edit("detectable_format:number_bullet_lists")
def _bullets(text: str, job: RepairJob, num_bullets: int) -> str:
    mark = "-" if "detectable_format:number_highlighted_sections" in job.names else "*"
    before: list[str] = []
    items: list[str] = []
    after: list[str] = []
    dividers = "length_constraints:number_paragraphs" in job.names or "combination:two_responses" in job.names
    lines = (text if dividers else RULE.sub("", text)).split("\n")
    for line in lines:
        item = ITEM.match(line)
        if item and item["text"].strip():
            items += [*after, item["text"].strip()]
            after = []
        elif line.strip():
            (after if items else before).append(line.strip())
    for joined in (False, True):
        if len(items) >= num_bullets:
            break
        lines = (join_sentences(text, job, lambda t: sum(map(len, lines_of(t))) > num_bullets) if joined else text).split("\n")
        found = [(line, ITEM.match(line)) for line in lines if line.strip()]
        units = glue_headings((s.strip() for line, m in found for s in ([m["text"]] if m else sentences_of(line))), " ")
        before, after, items = units[:1] if len(units) > num_bullets else [], [], units[len(units) > num_bullets :]
    items = split_clauses([item for item in items if plain_words(item)], num_bullets)
    if len(items) < num_bullets:
        return text
    bullets = [f"{mark} {' '.join(group)}" for group in even_groups(items, num_bullets)] if num_bullets else items
    # a line that begins with one star or a dash would count
    rest = [[re.sub(r"^\s*(?:\*(?=[^*])|-)\s*", "", line) for line in part] for part in (before, after)]
    return "\n\n".join("\n".join(part) for part in (rest[0], bullets, rest[1]) if part)


@_edit("detectable_format:multiple_sections")
def _sections(text: str, job: RepairJob, section_spliter: str, num_sections: int) -> str:
    word = section_spliter.strip()
    parts = split_parts(re.sub(rf"(?m)^[#*\s]*{re.escape(word)}\s*\d+[:.*\s]*", "", text).strip(), num_sections, job)
    return "\n\n".join(f"{word} {i}\n{part}" for i, part in enumerate(parts, 1)) if parts else text


@_edit("length_constraints:number_paragraphs")
def _paragraphs(text: str, job: RepairJob, num_paragraphs: int) -> str:
    parts = split_parts(RULE.sub("", text).replace("***", "**"), num_paragraphs, job)
    return "\n\n***\n\n".join(parts) if parts else text


@_edit("length_constraints:nth_paragraph_first_word")
def _nth_paragraph(text: str, job: RepairJob, num_paragraphs: int, nth_paragraph: int, first_word: str) -> str:
    parts = split_parts(text, num_paragraphs, job)
    if parts is None:
        return text
    parts = [re.sub(r"\n\s*\n", "\n", part).strip() for part in parts]
    chosen, word = parts[nth_paragraph - 1], first_word.strip()
    if re.split(r"[.,?!'\"\s]", chosen.lstrip("'\""), maxsplit=1)[0].lower() != word.lower():
        word = word[:1].upper() + word[1:]
        lowered = chosen if re.match(r"I\b|[^\w]|\w+[A-Z]", chosen) else chosen[:1].lower() + chosen[1:]
        parts[nth_paragraph - 1] = f"{word} {lowered}" if CONNECTIVES.match(word) else f"{word} - {lowered}"
    return "\n\n".join(parts)


@_edit("detectable_format:number_highlighted_sections")
def _highlights(text: str, job: RepairJob, num_highlights: int) -> str:
    text = re.sub(r"(?m)^([ \t]*)\*[ \t]+", r"\1- ", text)
    marked = [m.span() for m in re.finditer(r"\*[^*\n]*\*|<<[^\n]*>>|\[[^\n]*\]|(?m:^[ \t]*\W*)\w+", text)]  # not where a line starts
    places = [
        m
        for m in WORD.finditer(text)
        if len(m[0]) > 3 and m[0].lower() not in COMMON and not any(a < m.end() and m.start() < b for a, b in marked)
    ]
    chosen: list[re.Match[str]] = []
    out = text
    for place in spread(places):
        chosen = sorted([*chosen, place], key=lambda m: m.start())
        at, pieces = 0, []
        for m in chosen:
            pieces += [text[at : m.start()], f"*{m[0]}*"]
            at = m.end()
        out = "".join([*pieces, text[at:]])
        if check_instructions([{"id": "detectable_format:number_highlighted_sections", "num_highlights": num_highlights}], out)[0]:
            return out
    return text


@_edit("detectable_content:number_placeholders")
def _placeholders(text: str, job: RepairJob, num_placeholders: int) -> str:
    check = {"id": "detectable_content:number_placeholders", "num_placeholders": num_placeholders}
    names = [*FIELDS, *(f"detail {i}" for i in range(1, num_placeholders + 1))]
    lines: list[str] = []
    for name in names[: num_placeholders + len(FIELDS)]:
        lines.append(f"{name.capitalize()}: [{name}]")
        longer = add_tail(text, "\n".join(lines), job)
        if check_instructions([check], longer)[0]:
            return longer
    return text


@_edit("detectable_content:postscript")
def _postscript(text: str, job: RepairJob, postscript_marker: str) -> str:
    marker = postscript_marker.strip()
    text = re.sub(rf"(?im)^\W*(?:{'|'.join(POSTSCRIPTS.values())}|p\.?\s?s\b)[.:]?\s*", "", text)
    lines = lines_of(text)
    last = max((i for i, line in enumerate(lines) if line), default=0)
    if sum(map(len, lines)) > 3 and len(lines[last]) > 1 and not ITEM.match(lines[last][-1]):
        final = lines[last][-1]
        return add_tail(text_of([*lines[:last], lines[last][:-1]]), f"{marker} {final}", job)
    for words in job.shuffled(POSTSCRIPT_TEXTS):
        longer = add_tail(text, f"{marker} {words}", job)
        if job.harmless(text, longer):
            return longer
    return text


@_edit("detectable_format:title")
def _title(text: str, job: RepairJob) -> str:
    first, _, rest = text.partition("\n")
    named = re.fullmatch(r"\s*(?:#{1,6}\s+|\*{1,2}(?=[^*\s])|(?:\*\*)?title:\s*)(?P<name>[^\n]*?)[*#:\s]*", first, re.I)
    name = named["name"].strip(' *#:<>"') if named else ""
    if name and len(name.split()) <= 12 and rest.strip():
        return add_head(rest, f"<<{name}>>", job)
    words = content_words(text)[:2] or WORD.findall(text)[:4]
    return add_head(text, f"<<{' and '.join(w.capitalize() for w in words)}>>", job) if words else text


@_edit("detectable_format:constrained_response")
def _constrained(text: str, job: RepairJob) -> str:
    start = text[:200].lower()
    no, yes = re.search(r"\b(?:no|not|cannot|never)\b|n't\b", start), re.search(r"\b(?:yes|yeah|certainly|definitely|absolutely)\b", start)
    said = OPTIONS[0] if yes and not (no and no.start() < yes.start()) else OPTIONS[1] if re.match(r"\W*no\b", start) else OPTIONS[2]
    return add_head(text, said, job)


@_edit("startend:end_checker")
def _end(text: str, job: RepairJob, end_phrase: str) -> str:
    phrase = end_phrase.strip()
    place = text.lower().rfind(phrase.lower())
    rest = text[place + len(phrase) :]
    if place >= 0 and not WORD.search(rest):  # only marks after it
        return text[: place + len(phrase)]
    if place >= 0 and len(rest) < 200 and plain_words(text[:place]):
        text = f"{text[:place].rstrip()} {rest.strip()}"
    return add_tail(text, phrase, job)


@_edit("combination:repeat_prompt")
def _repeat(text: str, job: RepairJob, prompt_to_repeat: str) -> str:
    prompt = prompt_to_repeat.strip()
    place = text.lower().find(prompt.lower())
    if 0 <= place < 200:  # after a greeting or a mark
        text = text[place + len(prompt) :].lstrip(" \"'*\n")
    return add_head(text, prompt, job)


# ---- marks and case ----


@_edit("punctuation:no_comma")
def _no_comma(text: str, job: RepairJob) -> str:
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    text = re.sub(r",\s*(?=(?:and|or|but|so|yet|nor|which|who|where|when|while|because|as|if|though|although)\b)", " ", text)
    short = r"\w[\w'\u2019-]*(?: \w[\w'\u2019-]*){0,2}"
    text = re.sub(rf"(?<=[\s(])({short}), (?={short}(?:,| and | or ))", r"\1 and ", text)  # a list of short things
    text = re.sub(rf"( and {short}), (?={short}\b)", r"\1 and ", text)
    return re.sub(r"[ \t]+\n", "\n", re.sub(r"\s*,", "", text)) if text.replace(",", "").strip() else text


@_edit("change_case:english_capital")
def _capital(text: str, job: RepairJob) -> str:
    return text.upper()


@_edit("change_case:english_lowercase")
def _lowercase(text: str, job: RepairJob) -> str:
    return text.lower()


@_edit("change_case:capital_word_frequency")
def _capital_words(text: str, job: RepairJob, capital_frequency: int, capital_relation: str) -> str:
    check = {"id": "change_case:capital_word_frequency", "capital_frequency": capital_frequency, "capital_relation": capital_relation}

    def fits(part: str) -> bool:
        return check_instructions([check], part)[0]

    more = capital_relation == "at least"
    words = list(WORD.finditer(text))
    if more:
        strong = [m for m in words if len(m[0]) > 3 and not m[0].isupper() and m[0].lower() not in COMMON]
        places = [*spread(strong), *(m for m in words if m not in strong and not m[0].isupper() and len(m[0]) > 1)]
    else:
        places = [m for m in reversed(words) if m[0].isupper() and len(m[0]) > 1]
    out = text
    for m in places:  # of the same length, so places stay
        word = m[0].upper() if more else m[0].lower() if text[: m.start()].rstrip(" *").endswith((",", ";")) else m[0].capitalize()
        if len(word) == len(m[0]):
            out = out[: m.start()] + word + out[m.end() :]
        if fits(out):
            return out
    return out if more else drop_sentences(out, lambda s: sum(w.isupper() for w in s.split()), fits)


# ---- what wraps the whole ----


@_edit("detectable_format:json_format")
def _json(text: str, job: RepairJob) -> str:
    found = extract_json(text)
    if found and len(json.dumps(found)) * 2 > len(text) and "startend:quotation" not in job.names:
        return json.dumps(found, indent=2, ensure_ascii=False)
    text = re.sub(r"```\w*|`", "", text).replace('"', "'").strip()
    upper = "change_case:english_capital" in job.names
    key = "ANSWER" if upper else "answer"
    if not plain_words(text):
        return text
    if "startend:quotation" in job.names:
        return json.dumps(" ".join(text.split()), ensure_ascii=False)
    if "punctuation:no_comma" in job.names:
        return json.dumps({key: " ".join(text.split())}, indent=2, ensure_ascii=False)
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    items = [m["text"].strip(" *") for line in lines if (m := ITEM.match(line)) and m["text"].strip(" *")]
    rest = {key: " ".join(line for line in lines if not ITEM.match(line))} if not all(map(ITEM.match, lines)) else {}
    named = [re.match(r"\**([^:*\n]{2,40})\**:\**\s+(?P<text>\S.*)", item) for item in items]
    value: Any
    if items and all(named) and len({m[1] for m in named if m}) == len(items):
        value = rest | {m[1].strip(): m["text"].strip(" *") for m in named if m}
    elif items:
        value = rest | {"POINTS" if upper else "points": items}
    else:
        paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", text) if p.strip()]
        value = {key: paragraphs[0] if len(paragraphs) == 1 else paragraphs}
    return json.dumps(value, indent=2, ensure_ascii=False)


@_edit("startend:quotation")
def _quotation(text: str, job: RepairJob) -> str:
    inner = text.strip().strip('"\u201c\u201d').strip()
    return '"' + inner.replace('"', "'") + '"'
