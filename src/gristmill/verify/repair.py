"""Answer repair: text edits that make a failing answer follow verifiable instructions (IFEval's 25 types, lists, JSON for a schema).

Rejection sampling learns nothing where no sample passes. An edit by a program starts from 0: lower case, an end phrase, sections, a
title. Edits go in a fixed order, so that none undoes another: what takes sentences away or adds them, then the shape, then marks and case,
then what wraps the whole. The verifier that failed the answer looks again, and only what passes is given back. An answer's own words
stay: a length is met by whole sentences, of this answer or of others to the same prompt, never by filler.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gristmill.core.response_text import answer_text, repetition, strip_thinking
from gristmill.verify.ifeval import OPTIONS, POSTSCRIPTS, check_instructions, detect_language, sentence_ends
from gristmill.verify.json_schema import extract_json, schema_error, validation_error
from gristmill.verify.verify import verify

REPAIRED_KINDS = ("instructions", "list", "schema")  # to repair a number or a program would be to write the solution down
MAX_REPETITION = 0.3  # of what is joined, and of what comes out where the answer itself repeats less
MIN_WORDS = 3  # of a repaired answer, or as many as it had
MIN_SHARE = 0.3  # of an answer's words that stay where sentences with unwanted words go
MAX_TRIES = 4  # a limit on words is met again with less room, for what later edits add
MAX_CHARS = 100_000  # of an answer that is edited

Edit = Callable[..., str]
EDITS: dict[str, Edit] = {}  # in their order

RULE = re.compile(r"^[ \t]*(?:\*{3,}|-{3,}|_{3,})[ \t]*$\n?", re.M)
ITEM = re.compile(r"[ \t]*(?:[*+\u2022-](?!\*)|\d{1,3}[.)](?=\s))[ \t]*(?P<text>.*)")
HEADING = re.compile(r"[ \t]*(?:#{1,6}[ \t]|\*\*[^*\n]+\*\*:?[ \t]*$|[^\n]*:[ \t*]*$)")
WORD = re.compile(r"[^\W\d_](?:[^\W\d_]|['\u2019-](?=[^\W\d_]))*")
OPENING = re.compile(r"(?:sure|certainly|of course|absolutely|great|here)\b", re.I)
COMMON_WORDS = (
    "about above after again also although always among another because been before being below between both could does doing down "
    "during each either else even every from further have having here hers into itself just like made make many might more most "
    "much must only other ours over same shall should since some such than that their them then there these they this those "
    "through under until very were what when where which while whom will with within without would your yours yourself the and for "
    "are but not you all any can had her was one our out has him his how its may new now see two way who did get let say she too "
    "use "
)
COMMON = frozenset(COMMON_WORDS.split())  # which no highlight or title is made of
PROPER_LIMITS = (  # instructions that what is added must not break
    "keywords:forbidden_words",
    "keywords:frequency",
    "keywords:letter_frequency",
    "change_case:capital_word_frequency",
    "length_constraints:number_words",
    "length_constraints:number_sentences",
)
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


@dataclass(frozen=True)
class Repaired:
    """A repaired answer.

    Attributes:
        edits: what failed and now holds: ids of instructions, or the truth's kind. None: the answer passed as it is.
        sources: places of the other answers that sentences were taken from.
    """

    text: str
    edits: tuple[str, ...] = ()
    sources: tuple[int, ...] = ()


@dataclass
class _Job:
    """The checks of a prompt, and what edits may use and take note of."""

    checks: Sequence[dict[str, Any]]
    others: Sequence[str]
    loose: bool
    rng: random.Random
    spare: dict[str, int] = field(default_factory=dict)  # by instruction: room that later edits need
    sources: set[int] = field(default_factory=set)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(str(check["id"]) for check in self.checks)

    def passed(self, text: str) -> list[bool]:
        return check_instructions(self.checks, text, loose=self.loose)

    def harmless(self, before: str, after: str) -> bool:
        """Whether no limit that held before is broken."""
        limits = [check for check in self.checks if check["id"] in PROPER_LIMITS]
        if not limits:
            return True
        pairs = zip(check_instructions(limits, before), check_instructions(limits, after), strict=True)
        return all(now or not then for then, now in pairs)

    def shuffled(self, texts: Sequence[str]) -> list[str]:
        return self.rng.sample(texts, len(texts))


def repair(truth: dict[str, Any], answer: str, others: Sequence[str] = ()) -> Repaired | None:
    """Repair an answer so that it passes its truth; None where no edit does that without harm.

    Args:
        truth: of the kind `instructions`, `list` or `schema` (verify.py); of any other kind no answer can be repaired.
        others: other answers to the same prompt, whose sentences may be joined where an answer is too short.

    Raises:
        InputError: as `verify`.
    """
    if truth.get("kind") not in REPAIRED_KINDS:
        return None
    if verify(truth, answer):
        return Repaired(answer)
    if not answer.strip() or len(answer) > MAX_CHARS:
        return None
    if truth["kind"] == "instructions":
        return _repair_instructions(truth, answer, others)
    text = (_repair_list if truth["kind"] == "list" else _repair_schema)(truth, answer)
    return Repaired(text, (truth["kind"],)) if text is not None and verify(truth, text) else None


def _repair_instructions(truth: dict[str, Any], answer: str, others: Sequence[str]) -> Repaired | None:
    said = strip_thinking(answer)
    thought = answer.removesuffix(said) if answer.endswith(said) else ""
    job = _Job(truth["checks"], [strip_thinking(o) for o in others], bool(truth.get("loose")), random.Random(answer))
    first = job.passed(said)
    order = {name: place for place, name in enumerate(EDITS)}
    ordered = sorted(job.checks, key=lambda check: order[check["id"]])
    for _ in range(MAX_TRIES):
        text = said.strip()
        job.sources.clear()
        for _ in range(2):  # what a later edit has broken is mended once more
            for check in ordered:
                if not check_instructions([check], text, loose=job.loose)[0]:
                    kwargs = {key: value for key, value in check.items() if key != "id" and value is not None}
                    text = EDITS[check["id"]](text, job, **kwargs)
        if all(job.passed(text)):
            whole = thought + text
            edits = tuple(str(check["id"]) for check, ok in zip(job.checks, first, strict=True) if not ok)
            fine = _is_natural(text, said) and verify(truth, whole)
            return Repaired(whole, edits, tuple(sorted(job.sources))) if fine else None
        if not _make_room(job, text):
            return None
    return None


def _make_room(job: _Job, text: str) -> bool:
    """Take note of how far an answer is over its limits of words and sentences; whether it is."""
    over = False
    for check, ok in zip(job.checks, job.passed(text), strict=True):
        if ok or check.get("relation") != "less than" or not check["id"].startswith("length_constraints:"):
            continue
        num = len(re.findall(r"\w+", text)) if "num_words" in check else len(sentence_ends(text)) + 1
        limit = check.get("num_words", check.get("num_sentences", 0))
        job.spare[check["id"]] = job.spare.get(check["id"], 0) + num - limit + 1
        over = True
    return over


def _is_natural(text: str, before: str) -> bool:
    """Whether an edited answer is still one: it has words, and does not repeat itself more than it did."""
    num, had = len(WORD.findall(text)), len(WORD.findall(before))
    return num >= min(MIN_WORDS, had) and repetition(text) <= max(MAX_REPETITION, repetition(before))


def _edit(name: str) -> Callable[[Edit], Edit]:
    def register(function: Edit) -> Edit:
        EDITS[name] = function
        return function

    return register


# ---- text in sentences, lines and parts ----


def _sentences(line: str) -> list[str]:
    """The sentences of a line; the first keeps the line's indentation."""
    places = [0, *sentence_ends(line), len(line)]
    found = [line[a:b] for a, b in zip(places, places[1:], strict=False)]
    return [found[0], *(s.strip() for s in found[1:])] if len(found) > 1 else [line]


def _lines(text: str) -> list[list[str]]:
    return [[s for s in _sentences(line) if s.strip()] for line in text.split("\n")]


def _text(lines: Sequence[Sequence[str]]) -> str:
    return re.sub(r"\n{3,}", "\n\n", "\n".join(" ".join(line) for line in lines)).strip()


def _trim(text: str, fits: Callable[[str], bool]) -> str:
    """The longest beginning that fits: whole sentences and lines, else clauses of the first sentence."""
    lines = _lines(text)
    while any(lines):
        last = max(i for i, line in enumerate(lines) if line)
        lines = [*lines[:last], lines[last][:-1]]
        while any(lines) and HEADING.match(tail := next(line[-1] for line in reversed(lines) if line)) and len(sum(lines, [])) > 1:
            place = max(i for i, line in enumerate(lines) if line)  # a heading or an announcement of what is gone
            if lines[place][-1] != tail:
                break
            lines = [*lines[:place], lines[place][:-1]]
        shorter = _text(lines)
        if shorter and fits(shorter):
            return shorter
    first = next((s for line in _lines(text) for s in line), "").strip()
    for mark in reversed(list(re.finditer(r"[,;:\u2014](?=\s)| (?=and |but |because |so that |which |while )", first))):
        shorter = first[: mark.start()].rstrip(" ,;:-") + "."
        if len(WORD.findall(shorter)) >= MIN_WORDS and fits(shorter):
            return shorter
    return text


def _drop(text: str, bad: Callable[[str], int], fits: Callable[[str], bool]) -> str:
    """Leave sentences out, those that are worst first, until the rest fits; the text as it is where none does."""
    lines = _lines(text)
    places = sorted(
        ((bad(s), len(s), i, k) for i, line in enumerate(lines) for k, s in enumerate(line)), key=lambda e: (-e[0] / e[1], -e[2], -e[3])
    )
    gone: set[tuple[int, int]] = set()
    for weight, _, i, k in places:
        if not weight:
            break
        gone.add((i, k))
        rest = _text([[s for n, s in enumerate(line) if (at, n) not in gone] for at, line in enumerate(lines)])
        if fits(rest):
            return rest if len(WORD.findall(rest)) >= max(MIN_WORDS, MIN_SHARE * len(WORD.findall(text))) else text
    return text


def _join(text: str, job: _Job, enough: Callable[[str], bool], wanted: Callable[[str], bool] | None = None) -> str:
    """Add what other answers to the prompt say and this one does not, until it is enough: paragraphs, or sentences that are `wanted`."""
    for place, other in enumerate(job.others):
        if repetition(other) > MAX_REPETITION:
            continue
        parts = re.split(r"\n\s*\n", other) if wanted is None else [s for line in _lines(other) for s in line if wanted(s)]
        for number, part in enumerate(parts):
            known = {_plain(s) for line in _lines(text) for s in line}
            lines = [
                [s for s in line if _plain(s) and _plain(s) not in known and job.harmless(text, f"{text}\n{s}")] for line in _lines(part)
            ]
            if number == 0 and wanted is None and lines[0] and OPENING.match(lines[0][0]):
                lines[0] = lines[0][1:]
            added = _text(lines)
            longer = (f"{text}\n\n{added}" if wanted is None else _append(text, added)) if added else text
            if added and repetition(longer) <= MAX_REPETITION and job.harmless(text, longer):
                text = longer
                job.sources.add(place)
            if enough(text):
                return text
    return text


def _plain(text: str) -> str:
    return " ".join(WORD.findall(text.lower()))


def _append(text: str, sentence: str) -> str:
    """A sentence at the end of the last paragraph, or in one of its own after a list or heading."""
    last = text.rstrip().rpartition("\n")[2]
    inline = last.rstrip().endswith((".", "!", "?")) and not ITEM.match(last) and not HEADING.match(last)
    return f"{text.rstrip()}{' ' if inline else chr(10) * 2}{sentence}"


def _tail(text: str, addition: str, job: _Job) -> str:
    """A part at the very end. Where paragraphs are counted, it starts no paragraph."""
    tight = "length_constraints:nth_paragraph_first_word" in job.names
    return f"{text.rstrip()}{chr(10) if tight else chr(10) * 2}{addition}"


def _head(text: str, addition: str, job: _Job) -> str:
    tight = "length_constraints:nth_paragraph_first_word" in job.names
    return f"{addition}{chr(10) if tight else chr(10) * 2}{text.lstrip()}"


def _split(text: str, num: int, job: _Job) -> list[str] | None:
    """A text in `num` parts of about the same length: whole paragraphs, else lines, else sentences, else of other answers too."""
    for joined in (False, True):
        longer = _join(text, job, lambda t: sum(map(len, _lines(t))) >= num) if joined else text
        paragraphs = [p.strip() for p in re.split(r"\n\s*\n", longer) if p.strip()]
        lines = [line.rstrip() for line in longer.split("\n") if line.strip()]
        sentences = [s.strip() for line in _lines(longer) for s in line]
        for units, mark in ((paragraphs, "\n\n"), (lines, "\n"), (sentences, " ")):
            glued = _glued(units, "\n" if mark == " " else mark)
            if len(glued) >= num:
                return [mark.join(group) for group in _groups(glued, num)]
    clauses = _clauses(_glued((s.strip() for line in _lines(text) for s in line), "\n"), num)
    return clauses if len(clauses) == num else None


def _clauses(sentences: Sequence[str], num: int) -> list[str]:
    """Sentences of which long ones are cut in two, at a comma or semicolon near the middle, until there are `num` or none can be cut."""
    out = list(sentences)
    while len(out) < num:
        cuts = [(len(s), -abs(2 * m.start() - len(s)), i, m.start()) for i, s in enumerate(out) for m in re.finditer(r"[,;](?=\s)", s)]
        cuts = [cut for cut in cuts if all(len(WORD.findall(part)) >= MIN_WORDS for part in (out[cut[2]][: cut[3]], out[cut[2]][cut[3] :]))]
        if not cuts:
            break
        _, _, place, at = max(cuts)
        first, second = out[place][:at].rstrip() + ".", out[place][at + 1 :].strip()
        out[place : place + 1] = [first, second[:1].upper() + second[1:]]
    return out


def _glued(units: Iterable[str], mark: str) -> list[str]:
    """Parts of a text, a heading together with what it announces."""
    out: list[str] = []
    for unit in units:
        if out and HEADING.match(out[-1].rpartition("\n")[2]):
            out[-1] += mark + unit
        else:
            out.append(unit)
    return out


def _groups(units: Sequence[str], num: int) -> list[list[str]]:
    """Neighbours in `num` groups of about the same length, none empty."""
    total = sum(map(len, units))
    out: list[list[str]] = [[]]
    done = 0
    for place, unit in enumerate(units):
        left = num - len(out)  # groups that are yet to begin
        due = done >= total * len(out) / num or len(units) - place <= left
        if out[-1] and left and due:
            out.append([])
        out[-1].append(unit)
        done += len(unit)
    return out


def _spread(places: Sequence[re.Match[str]]) -> list[re.Match[str]]:
    """Candidates in an order that spreads the first few over the text."""
    order: list[int] = []
    step = len(places)
    while step >= 1:
        order += [i for i in range(0, len(places), step) if i not in order]
        step //= 2
    return [places[i] for i in order]


def _content_words(text: str) -> list[str]:
    """The words of most weight: frequent ones first, then long ones."""
    words = [w.lower() for w in WORD.findall(text) if len(w) > 3 and w.lower() not in COMMON]
    count = Counter(words)
    return sorted(count, key=lambda w: (-count[w], -len(w), w))


# ---- what goes or is added ----


@_edit("language:response_language")
def _language(text: str, job: _Job, language: str) -> str:
    """What is said in another language goes; there is no translation."""
    lines = [line for line in text.split("\n") if not line.strip() or detect_language(line) in (language, None)]
    return _text([[line] for line in lines]) or text


@_edit("combination:two_responses")
def _two_responses(text: str, job: _Job) -> str:
    parts = [p.strip() for p in re.split(r"(?:\*[ \t]*){6,}", text) if p.strip()]
    headed = re.split(r"(?im)^\W*(?:response|answer|option|version)\s*(?:1|2|one|two)\b\W*$", text)
    if len(parts) < 2 and len(headed) == 3 and all(_plain(p) for p in headed[1:]):
        parts = [p.strip() for p in headed[1:]]
    if len(parts) < 2:
        parts = parts or [text]
        for place, other in enumerate(job.others):
            other = re.split(r"(?:\*[ \t]*){6,}", other)[0].strip()
            if _plain(other) and _plain(other) != _plain(parts[0]) and repetition(other) <= MAX_REPETITION:
                parts.append(other)
                job.sources.add(place)
                break
    return "\n\n******\n\n".join(parts[:2]) if len(parts) > 1 else text


@_edit("keywords:forbidden_words")
def _forbidden(text: str, job: _Job, forbidden_words: Sequence[str]) -> str:
    pattern = re.compile("|".join(rf"\b{re.escape(word)}\b" for word in forbidden_words), re.I)
    return _drop(text, lambda s: len(pattern.findall(s)), lambda t: not pattern.search(t))


@_edit("keywords:letter_frequency")
def _letters(text: str, job: _Job, letter: str, let_frequency: int, let_relation: str) -> str:
    letter = letter.strip().lower()

    def num(part: str) -> int:
        return part.lower().count(letter)

    if let_relation == "less than":
        return _drop(text, num, lambda t: num(t) < let_frequency)
    longer = _join(text, job, lambda t: num(t) >= let_frequency)
    if letter == "!":
        ends = [i for i in sentence_ends(longer) if longer[i - 1] == "."]
        for place in ends[: max(0, let_frequency - num(longer))]:
            longer = f"{longer[: place - 1]}!{longer[place:]}"
    return longer


@_edit("keywords:frequency")
def _frequency(text: str, job: _Job, keyword: str, frequency: int, relation: str) -> str:
    pattern = re.compile(re.escape(keyword.strip()), re.I)

    def num(part: str) -> int:
        return len(pattern.findall(part))

    if relation == "less than":
        return _drop(text, num, lambda t: num(t) < frequency)
    text = _join(text, job, lambda t: num(t) >= frequency, wanted=lambda s: bool(pattern.search(s)))
    return _with_sentences(text, job, WITH_KEYWORD, keyword.strip(), lambda t: num(t) >= frequency)


@_edit("keywords:existence")
def _existence(text: str, job: _Job, keywords: Sequence[str]) -> str:
    def missing(part: str) -> list[str]:
        return [word for word in keywords if not re.search(re.escape(word), part, re.I)]

    for word in missing(text):
        has = re.compile(re.escape(word), re.I).search
        text = _join(text, job, lambda t, has=has: bool(has(t)), wanted=lambda s, has=has: bool(has(s)))  # type: ignore[misc]
    return _with_sentences(text, job, WITH_WORDS, " and ".join(missing(text)), lambda t: not missing(t)) if missing(text) else text


def _with_sentences(text: str, job: _Job, forms: Sequence[str], words: str, enough: Callable[[str], bool]) -> str:
    """Add sentences that name words, each of another form, until it is enough; the text as it is where they do not suffice."""
    longer = text
    for form in job.shuffled(forms):
        if enough(longer):
            break
        candidate = _append(longer, form.format(words=words))
        if job.harmless(longer, candidate):
            longer = candidate
    return longer if enough(longer) else text


@_edit("length_constraints:number_sentences")
def _number_sentences(text: str, job: _Job, num_sentences: int, relation: str) -> str:
    def num(part: str) -> int:
        return len(sentence_ends(part)) + 1

    if relation == "less than":
        room = num_sentences - job.spare.get("length_constraints:number_sentences", 0)
        return text if num(text) < room else _trim(text, lambda t: num(t) < room)
    for split in (_close_lines, _split_sentences):
        if num(text) < num_sentences:
            text = split(text)
    return _join(text, job, lambda t: num(t) >= num_sentences)


def _close_lines(text: str) -> str:
    """Full stops after items and lines that end without a mark."""
    return re.sub(r"(?m)(?<=[\w)])[ \t]*$", ".", text)


def _split_sentences(text: str) -> str:
    """Clauses that could be sentences become sentences."""
    text = re.sub(r"; (\w)", lambda m: ". " + m[1].upper(), text)
    clause = r", (and|but|so) (?=(?:it|they|he|she|we|you|this|these|there|that)\b)"
    return re.sub(clause, lambda m: f". {m[1].capitalize()} ", text)


@_edit("length_constraints:number_words")
def _number_words(text: str, job: _Job, num_words: int, relation: str) -> str:
    def num(part: str) -> int:
        return len(re.findall(r"\w+", part))

    if relation == "at least":
        return _join(text, job, lambda t: num(t) >= num_words)
    room = num_words - job.spare.get("length_constraints:number_words", 0)
    return text if num(text) < room else _trim(text, lambda t: num(t) < room)


# ---- the shape ----


@_edit("detectable_format:number_bullet_lists")
def _bullets(text: str, job: _Job, num_bullets: int) -> str:
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
        lines = (_join(text, job, lambda t: sum(map(len, _lines(t))) > num_bullets) if joined else text).split("\n")
        found = [(line, ITEM.match(line)) for line in lines if line.strip()]
        units = _glued((s.strip() for line, m in found for s in ([m["text"]] if m else _sentences(line))), " ")
        before, after, items = units[:1] if len(units) > num_bullets else [], [], units[len(units) > num_bullets :]
    items = _clauses([item for item in items if _plain(item)], num_bullets)
    if len(items) < num_bullets:
        return text
    bullets = [f"{mark} {' '.join(group)}" for group in _groups(items, num_bullets)] if num_bullets else items
    # a line that begins with one star or a dash would count
    rest = [[re.sub(r"^\s*(?:\*(?=[^*])|-)\s*", "", line) for line in part] for part in (before, after)]
    return "\n\n".join("\n".join(part) for part in (rest[0], bullets, rest[1]) if part)


@_edit("detectable_format:multiple_sections")
def _sections(text: str, job: _Job, section_spliter: str, num_sections: int) -> str:
    word = section_spliter.strip()
    parts = _split(re.sub(rf"(?m)^[#*\s]*{re.escape(word)}\s*\d+[:.*\s]*", "", text).strip(), num_sections, job)
    return "\n\n".join(f"{word} {i}\n{part}" for i, part in enumerate(parts, 1)) if parts else text


@_edit("length_constraints:number_paragraphs")
def _paragraphs(text: str, job: _Job, num_paragraphs: int) -> str:
    parts = _split(RULE.sub("", text).replace("***", "**"), num_paragraphs, job)
    return "\n\n***\n\n".join(parts) if parts else text


@_edit("length_constraints:nth_paragraph_first_word")
def _nth_paragraph(text: str, job: _Job, num_paragraphs: int, nth_paragraph: int, first_word: str) -> str:
    parts = _split(text, num_paragraphs, job)
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
def _highlights(text: str, job: _Job, num_highlights: int) -> str:
    text = re.sub(r"(?m)^([ \t]*)\*[ \t]+", r"\1- ", text)
    marked = [m.span() for m in re.finditer(r"\*[^*\n]*\*|<<[^\n]*>>|\[[^\n]*\]|(?m:^[ \t]*\W*)\w+", text)]  # not where a line starts
    places = [
        m
        for m in WORD.finditer(text)
        if len(m[0]) > 3 and m[0].lower() not in COMMON and not any(a < m.end() and m.start() < b for a, b in marked)
    ]
    chosen: list[re.Match[str]] = []
    out = text
    for place in _spread(places):
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
def _placeholders(text: str, job: _Job, num_placeholders: int) -> str:
    check = {"id": "detectable_content:number_placeholders", "num_placeholders": num_placeholders}
    names = [*FIELDS, *(f"detail {i}" for i in range(1, num_placeholders + 1))]
    lines: list[str] = []
    for name in names[: num_placeholders + len(FIELDS)]:
        lines.append(f"{name.capitalize()}: [{name}]")
        longer = _tail(text, "\n".join(lines), job)
        if check_instructions([check], longer)[0]:
            return longer
    return text


@_edit("detectable_content:postscript")
def _postscript(text: str, job: _Job, postscript_marker: str) -> str:
    marker = postscript_marker.strip()
    text = re.sub(rf"(?im)^\W*(?:{'|'.join(POSTSCRIPTS.values())}|p\.?\s?s\b)[.:]?\s*", "", text)
    lines = _lines(text)
    last = max((i for i, line in enumerate(lines) if line), default=0)
    if sum(map(len, lines)) > 3 and len(lines[last]) > 1 and not ITEM.match(lines[last][-1]):
        final = lines[last][-1]
        return _tail(_text([*lines[:last], lines[last][:-1]]), f"{marker} {final}", job)
    for words in job.shuffled(POSTSCRIPT_TEXTS):
        longer = _tail(text, f"{marker} {words}", job)
        if job.harmless(text, longer):
            return longer
    return text


@_edit("detectable_format:title")
def _title(text: str, job: _Job) -> str:
    first, _, rest = text.partition("\n")
    named = re.fullmatch(r"\s*(?:#{1,6}\s+|\*{1,2}(?=[^*\s])|(?:\*\*)?title:\s*)(?P<name>[^\n]*?)[*#:\s]*", first, re.I)
    name = named["name"].strip(' *#:<>"') if named else ""
    if name and len(name.split()) <= 12 and rest.strip():
        return _head(rest, f"<<{name}>>", job)
    words = _content_words(text)[:2] or WORD.findall(text)[:4]
    return _head(text, f"<<{' and '.join(w.capitalize() for w in words)}>>", job) if words else text


@_edit("detectable_format:constrained_response")
def _constrained(text: str, job: _Job) -> str:
    start = text[:200].lower()
    no, yes = re.search(r"\b(?:no|not|cannot|never)\b|n't\b", start), re.search(r"\b(?:yes|yeah|certainly|definitely|absolutely)\b", start)
    said = OPTIONS[0] if yes and not (no and no.start() < yes.start()) else OPTIONS[1] if re.match(r"\W*no\b", start) else OPTIONS[2]
    return _head(text, said, job)


@_edit("startend:end_checker")
def _end(text: str, job: _Job, end_phrase: str) -> str:
    phrase = end_phrase.strip()
    place = text.lower().rfind(phrase.lower())
    rest = text[place + len(phrase) :]
    if place >= 0 and not WORD.search(rest):  # only marks after it
        return text[: place + len(phrase)]
    if place >= 0 and len(rest) < 200 and _plain(text[:place]):
        text = f"{text[:place].rstrip()} {rest.strip()}"
    return _tail(text, phrase, job)


@_edit("combination:repeat_prompt")
def _repeat(text: str, job: _Job, prompt_to_repeat: str) -> str:
    prompt = prompt_to_repeat.strip()
    place = text.lower().find(prompt.lower())
    if 0 <= place < 200:  # after a greeting or a mark
        text = text[place + len(prompt) :].lstrip(" \"'*\n")
    return _head(text, prompt, job)


# ---- marks and case ----


@_edit("punctuation:no_comma")
def _no_comma(text: str, job: _Job) -> str:
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    text = re.sub(r",\s*(?=(?:and|or|but|so|yet|nor|which|who|where|when|while|because|as|if|though|although)\b)", " ", text)
    short = r"\w[\w'\u2019-]*(?: \w[\w'\u2019-]*){0,2}"
    text = re.sub(rf"(?<=[\s(])({short}), (?={short}(?:,| and | or ))", r"\1 and ", text)  # a list of short things
    text = re.sub(rf"( and {short}), (?={short}\b)", r"\1 and ", text)
    return re.sub(r"[ \t]+\n", "\n", re.sub(r"\s*,", "", text)) if text.replace(",", "").strip() else text


@_edit("change_case:english_capital")
def _capital(text: str, job: _Job) -> str:
    return text.upper()


@_edit("change_case:english_lowercase")
def _lowercase(text: str, job: _Job) -> str:
    return text.lower()


@_edit("change_case:capital_word_frequency")
def _capital_words(text: str, job: _Job, capital_frequency: int, capital_relation: str) -> str:
    check = {"id": "change_case:capital_word_frequency", "capital_frequency": capital_frequency, "capital_relation": capital_relation}

    def fits(part: str) -> bool:
        return check_instructions([check], part)[0]

    more = capital_relation == "at least"
    words = list(WORD.finditer(text))
    if more:
        strong = [m for m in words if len(m[0]) > 3 and not m[0].isupper() and m[0].lower() not in COMMON]
        places = [*_spread(strong), *(m for m in words if m not in strong and not m[0].isupper() and len(m[0]) > 1)]
    else:
        places = [m for m in reversed(words) if m[0].isupper() and len(m[0]) > 1]
    out = text
    for m in places:  # of the same length, so places stay
        word = m[0].upper() if more else m[0].lower() if text[: m.start()].rstrip(" *").endswith((",", ";")) else m[0].capitalize()
        if len(word) == len(m[0]):
            out = out[: m.start()] + word + out[m.end() :]
        if fits(out):
            return out
    return out if more else _drop(out, lambda s: sum(w.isupper() for w in s.split()), fits)


# ---- what wraps the whole ----


@_edit("detectable_format:json_format")
def _json(text: str, job: _Job) -> str:
    found = extract_json(text)
    if found and len(json.dumps(found)) * 2 > len(text) and "startend:quotation" not in job.names:
        return json.dumps(found, indent=2, ensure_ascii=False)
    text = re.sub(r"```\w*|`", "", text).replace('"', "'").strip()
    upper = "change_case:english_capital" in job.names
    key = "ANSWER" if upper else "answer"
    if not _plain(text):
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
def _quotation(text: str, job: _Job) -> str:
    inner = text.strip().strip('"\u201c\u201d').strip()
    return '"' + inner.replace('"', "'") + '"'


# ---- our own formats ----


def _repair_list(truth: dict[str, Any], answer: str) -> str | None:
    """A list in its form: of the things that the answer names, those that belong, each once."""
    text = answer_text(answer)
    known = {str(word).lower(): str(word) for word in truth["words"]}
    found = dict.fromkeys(w.lower() for w in re.findall(r"[A-Za-z]+", text) if w.lower() in known)
    items = [known[w] for w in found][: truth["n"]]
    if len(items) < truth["n"]:
        return None
    extras, shape = truth["extras"], truth["shape"]
    items = sorted(items, key=str.lower) if "sorted" in extras else items
    forms = {"commas": ", ", "slashes": " / ", "brackets": " ", "dashes": "\n", "numbered": "\n"}
    shown = [f"[{w}]" if shape == "brackets" else f"- {w}" if shape == "dashes" else f"{i}. {w}" if shape == "numbered" else w
             for i, w in enumerate(items, 1)]  # fmt: skip
    out = ("here " if "start" in extras else "") + forms[shape].join(shown) + (" stop" if "end" in extras else "")
    return out.upper() if "upper" in extras else out


def _repair_schema(truth: dict[str, Any], answer: str) -> str | None:
    """JSON for a schema: commas too many, quotes of other languages, surplus fields and numbers written as text are mended."""
    schema = truth["schema"]
    text = answer_text(answer)
    loosely = [re.sub(r",\s*([}\]])", r"\1", text)]
    words = {"True": "true", "False": "false", "None": "null"}
    loosely.append(re.sub(r"\b(?:True|False|None)\b", lambda m: words[m[0]], loosely[0]))
    loosely.append(re.sub(r"(?<=[\[{,:\s])'([^'\"\n]*)'(?=\s*[,:}\]])", r'"\1"', loosely[1]))
    for candidate in (text, *loosely):
        value = extract_json(candidate)
        if value is not None and not schema_error(schema):
            value = _coerced(value, schema, 0)
            if not validation_error(value, schema):
                return json.dumps(value, indent=2, ensure_ascii=False)
    return None


def _coerced(value: Any, schema: Any, depth: int) -> Any:
    """A value nearer to its schema, where that loses nothing but what the schema forbids."""
    if not isinstance(schema, dict) or depth > 32:
        return value
    wanted = schema.get("type")
    if wanted == "object" and isinstance(value, list) and len(value) == 1:
        value = value[0]
    if wanted == "array" and not isinstance(value, list):
        value = [value]
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        kept = properties if schema.get("additionalProperties") is False else {*properties, *value}
        return {k: _coerced(v, properties.get(k), depth + 1) for k, v in value.items() if k in kept}
    if isinstance(value, list):
        return [_coerced(v, schema.get("items"), depth + 1) for v in value]
    if isinstance(value, str) and wanted in ("integer", "number") and re.fullmatch(r"\s*-?\d{1,15}(?:\.\d{1,15})?\s*", value):
        number = float(value)
        return int(number) if number.is_integer() else number
    if isinstance(value, str) and wanted == "boolean" and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if wanted == "string" and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value


def instructions_of(truth: dict[str, Any] | None) -> Iterable[str]:
    """The types that an answer to a truth is counted under: ids of instructions, or the truth's kind."""
    if truth is None or truth.get("kind") not in REPAIRED_KINDS:
        return []
    return dict.fromkeys(str(check["id"]) for check in truth["checks"]) if truth["kind"] == "instructions" else [truth["kind"]]
