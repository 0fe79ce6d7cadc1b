"""Text edits in sentences, lines and parts, and what edits of one answer share."""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gristmill.core.response_text import repetition
from gristmill.verify.ifeval import check_instructions, sentence_ends

MAX_REPETITION = 0.3  # of what is joined, and of what comes out where the answer itself repeats less
MIN_WORDS = 3  # of a repaired answer, or as many as it had
MIN_SHARE = 0.3  # of an answer's words that stay where sentences with unwanted words go

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


@dataclass
class RepairJob:
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


# ---- text in sentences, lines and parts ----


def sentences_of(line: str) -> list[str]:
    """The sentences of a line; the first keeps the line's indentation."""
    places = [0, *sentence_ends(line), len(line)]
    found = [line[a:b] for a, b in zip(places, places[1:], strict=False)]
    return [found[0], *(s.strip() for s in found[1:])] if len(found) > 1 else [line]


def lines_of(text: str) -> list[list[str]]:
    """The sentences of each line."""
    return [[s for s in sentences_of(line) if s.strip()] for line in text.split("\n")]


def text_of(lines: Sequence[Sequence[str]]) -> str:
    """The text of lines of sentences."""
    return re.sub(r"\n{3,}", "\n\n", "\n".join(" ".join(line) for line in lines)).strip()


def trim(text: str, fits: Callable[[str], bool]) -> str:
    """The longest beginning that fits: whole sentences and lines, else clauses of the first sentence."""
    lines = lines_of(text)
    while any(lines):
        last = max(i for i, line in enumerate(lines) if line)
        lines = [*lines[:last], lines[last][:-1]]
        while any(lines) and HEADING.match(tail := next(line[-1] for line in reversed(lines) if line)) and len(sum(lines, [])) > 1:
            place = max(i for i, line in enumerate(lines) if line)  # a heading or an announcement of what is gone
            if lines[place][-1] != tail:
                break
            lines = [*lines[:place], lines[place][:-1]]
        shorter = text_of(lines)
        if shorter and fits(shorter):
            return shorter
    first = next((s for line in lines_of(text) for s in line), "").strip()
    for mark in reversed(list(re.finditer(r"[,;:\u2014](?=\s)| (?=and |but |because |so that |which |while )", first))):
        shorter = first[: mark.start()].rstrip(" ,;:-") + "."
        if len(WORD.findall(shorter)) >= MIN_WORDS and fits(shorter):
            return shorter
    return text


def drop_sentences(text: str, bad: Callable[[str], int], fits: Callable[[str], bool]) -> str:
    """Leave sentences out, those that are worst first, until the rest fits; the text as it is where none does."""
    lines = lines_of(text)
    places = sorted(
        ((bad(s), len(s), i, k) for i, line in enumerate(lines) for k, s in enumerate(line)), key=lambda e: (-e[0] / e[1], -e[2], -e[3])
    )
    gone: set[tuple[int, int]] = set()
    for weight, _, i, k in places:
        if not weight:
            break
        gone.add((i, k))
        rest = text_of([[s for n, s in enumerate(line) if (at, n) not in gone] for at, line in enumerate(lines)])
        if fits(rest):
            return rest if len(WORD.findall(rest)) >= max(MIN_WORDS, MIN_SHARE * len(WORD.findall(text))) else text
    return text


def join_sentences(text: str, job: RepairJob, enough: Callable[[str], bool], *, wanted: Callable[[str], bool] | None = None) -> str:
    """Add what other answers to the prompt say and this one does not, until it is enough: paragraphs, or sentences that are `wanted`."""
    for place, other in enumerate(job.others):
        if repetition(other) > MAX_REPETITION:
            continue
        parts = re.split(r"\n\s*\n", other) if wanted is None else [s for line in lines_of(other) for s in line if wanted(s)]
        for number, part in enumerate(parts):
            known = {plain_words(s) for line in lines_of(text) for s in line}
            lines = [
                [s for s in line if plain_words(s) and plain_words(s) not in known and job.harmless(text, f"{text}\n{s}")]
                for line in lines_of(part)
            ]
            if number == 0 and wanted is None and lines[0] and OPENING.match(lines[0][0]):
                lines[0] = lines[0][1:]
            added = text_of(lines)
            longer = (f"{text}\n\n{added}" if wanted is None else append_sentence(text, added)) if added else text
            if added and repetition(longer) <= MAX_REPETITION and job.harmless(text, longer):
                text = longer
                job.sources.add(place)
            if enough(text):
                return text
    return text


def plain_words(text: str) -> str:
    """The words of a text alone, in lower case."""
    return " ".join(WORD.findall(text.lower()))


def append_sentence(text: str, sentence: str) -> str:
    """A sentence at the end of the last paragraph, or in one of its own after a list or heading."""
    last = text.rstrip().rpartition("\n")[2]
    inline = last.rstrip().endswith((".", "!", "?")) and not ITEM.match(last) and not HEADING.match(last)
    return f"{text.rstrip()}{' ' if inline else chr(10) * 2}{sentence}"


def add_tail(text: str, addition: str, job: RepairJob) -> str:
    """A part at the very end. Where paragraphs are counted, it starts no paragraph."""
    tight = "length_constraints:nth_paragraph_first_word" in job.names
    return f"{text.rstrip()}{chr(10) if tight else chr(10) * 2}{addition}"


def add_head(text: str, addition: str, job: RepairJob) -> str:
    """A part at the very beginning, as `add_tail`."""
    tight = "length_constraints:nth_paragraph_first_word" in job.names
    return f"{addition}{chr(10) if tight else chr(10) * 2}{text.lstrip()}"


def split_parts(text: str, num: int, job: RepairJob) -> list[str] | None:
    """A text in `num` parts of about the same length: whole paragraphs, else lines, else sentences, else of other answers too."""
    for joined in (False, True):
        longer = join_sentences(text, job, lambda t: sum(map(len, lines_of(t))) >= num) if joined else text
        paragraphs = [p.strip() for p in re.split(r"\n\s*\n", longer) if p.strip()]
        lines = [line.rstrip() for line in longer.split("\n") if line.strip()]
        sentences = [s.strip() for line in lines_of(longer) for s in line]
        for units, mark in ((paragraphs, "\n\n"), (lines, "\n"), (sentences, " ")):
            glued = glue_headings(units, "\n" if mark == " " else mark)
            if len(glued) >= num:
                return [mark.join(group) for group in even_groups(glued, num)]
    clauses = split_clauses(glue_headings((s.strip() for line in lines_of(text) for s in line), "\n"), num)
    return clauses if len(clauses) == num else None


def split_clauses(sentences: Sequence[str], num: int) -> list[str]:
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


def glue_headings(units: Iterable[str], mark: str) -> list[str]:
    """Parts of a text, a heading together with what it announces."""
    out: list[str] = []
    for unit in units:
        if out and HEADING.match(out[-1].rpartition("\n")[2]):
            out[-1] += mark + unit
        else:
            out.append(unit)
    return out


def even_groups(units: Sequence[str], num: int) -> list[list[str]]:
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


def spread(places: Sequence[re.Match[str]]) -> list[re.Match[str]]:
    """Candidates in an order that spreads the first few over the text."""
    order: list[int] = []
    step = len(places)
    while step >= 1:
        order += [i for i in range(0, len(places), step) if i not in order]
        step //= 2
    return [places[i] for i in order]


def content_words(text: str) -> list[str]:
    """The words of most weight: frequent ones first, then long ones."""
    words = [w.lower() for w in WORD.findall(text) if len(w) > 3 and w.lower() not in COMMON]
    count = Counter(words)
    return sorted(count, key=lambda w: (-count[w], -len(w), w))
