r"""Final answers of solutions: the one that is boxed, stated or said last, and whether it is right."""

import re
import unicodedata
from collections import deque

from gristmill.core.response_text import answer_text
from gristmill.verify.math import MAX_ANSWER_CHARS, is_equiv, is_number, unit_of

MAX_BOXES = 10  # that make one answer

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.S)
EMPTY_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{\s*\}?")
BARE_BOX = re.compile(r"\\boxed\s+([^\s{}$\\.,;:]+)")
# What may stand between the boxes of one answer: `x = \boxed{1}` and `y = \boxed{2}`.
JOINT = re.compile(r"(?:[\s$,;&*{}-]|\\[()\[\],;: ]|\\q?quad|\\text|\b(?:and|or)\b|[^\W\d_](?:_\{?\w\}?)?\s*=|^\s*[(]?\w[).](?=\s))*", re.M)
MAX_JOINT_CHARS = 80
PLACEHOLDER = re.compile(
    r"(?:\\text\s*\{)?\W*(?:(?:your|the)\s+)?(?:(?:final|numerical|correct)\s+)?(?:answer|result|\.\.\.|\\l?dots|\\cdots)(?:\s+here)?\W*",
    re.I,
)
STATED = re.compile(
    r"\b(?:answers?|solutions?(?=\W*:))\W{0,5}(?:(?<=\s)(?:is|are|was|would\s+be|will\s+be|must\s+be|should\s+be|becomes|equals)\b|[:=])[\s:*_]*"
    r"|^[ \t]*#{1,6}[ \t]*(?:the\s+)?(?:final\s+)?answers?[ \t:]*\n\s*",
    re.I | re.M,
)
# Words before the answer that are no part of it, and what begins a remark about an answer that was given before.
FILLER = re.compile(
    r"(?:(?:therefore|thus|hence|then|so|simply|just|only|exactly|approximately|about|roughly|around|nearly|clearly|obviously|indeed|also|now|"
    r"actually|finally|equal\s+to|equals|given\s+by|found\s+to\s+be|calculated\s+(?:to\s+be|as)|as\s+follows|the\s+(?:number|value|integer|"
    r"fraction|expression|choice|option)|choice|option|number|value|always)(?![\w-])(?:\s+(?:of|is))?|\\approx(?![a-zA-Z])|\u2248|~)[\s:,*_]*",
    re.I,
)
REMARK = re.compile(
    r"(?:(?:not|neither|never|n't|in)\b|(?:\w+\s+)?(?:correct|incorrect|right|wrong|valid|invalid|reasonable|consistent|unique|plausible|verified|"
    r"confirmed|checked|supported|justified|expected|accurate|complete|final|sensible|clear|unclear|above|below|here|helpful|useful|known|unknown|true|false)\b(?=\W*(?:$|because|since|as\b|for\b|by\b|and\b|if\b|in\b|"
    r"with\b|when\b|only\b|on\b|here\b|[,.;!]))|(?:obtained|based|found|derived|computed|calculated|rounded|given|written|expressed|stated|"
    r"boxed|shown|measured|close|likely|what|that|because|since|in\s+the)\b)",
    re.I,
)
MATH = re.compile(r"\$\$?([^$]+)\$\$?(?!\d)[^$\n]*$|\\\(((?:(?!\\\)).)+)\\\)(?![^\n]*\\\()|\\\[((?:(?!\\\]).)+)\\\]", re.S | re.M)
FORMULA = re.compile(r"\$\$?([^$\n]{1,500})\$|\\\(((?:(?!\\\)).){1,500})\\\)")
SENTENCE_END = re.compile(
    r"[.;?!](?=[\s*_\"')]|$)|\n|,?\s(?:because|since|which|where|so|as|(?:and|but)\s+(?:the|this|that|it|we))\b|,?\s(?:(?:and\s+)?not|rather\s+than)\s(?=.*\d)"
)
PAST = re.compile(r"\bw(?:as|ere)\b")  # `I first thought the answer was 4`: only where nothing else is stated
HASHES = re.compile(r"####[ \t]*([^\s#][^\n]*)")
NUMBER = re.compile(
    r"(?:(?<![\w)\]])-)?(?:\\?\$)?"  # a minus after a digit, a name or a bracket subtracts: `20-13` ends with 13
    r"(?:\d{1,9} (?=\d{1,9}/\d))?"  # of a mixed number
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"  # `1,234` is one number, `1,2` are two
    r"(?:[eE][+-]?\d+)?(?:[/:]\d+)?(?:\s?\\?%)?"
)

# What denies the number after it: `not 4`, `isn't equal to 4`, `rather than 4`.
DENIED = re.compile(
    r"(?:\b(?:not|never|cannot|neither|nor|rather\s+than|instead\s+of)|n['\u2019]t|\u2260|!=|\\neq?(?![a-zA-Z]))"
    r"(?:\s+(?:be|is|equal(?:\s+to)?|equals|the\s+(?:number|value)|exactly|simply))*[\s$*_(\[\\]*$",
    re.I,
)
MAX_DENIAL_CHARS = 60
MAX_DENIED = 10  # numbers at the end of a text, among which one is looked for that is not denied


def extract_answer(text: str) -> str | None:
    r"""Extract the final answer of a solution, or None.

    The content of the last `\boxed{...}`, with those that make one answer with it (`\boxed{1}` and `\boxed{2}`); else what follows the
    last "answer is" or "answer:", to the end of the sentence, that is no remark about an answer; else what follows the last `####`; else
    the last number. What is thought is no part of it.
    """
    text = answer_text(text)
    return stated_answer(text) or _number_text(text)


def stated_answer(text: str) -> str | None:
    """The final answer of a solution that is marked as such: boxed, after "answer is" or `####`; None where none is."""
    return _boxed(text) or _stated(text) or _last(HASHES.findall(text))


def is_right(text: str, value: str) -> bool:
    """Whether the final answer of a solution equals a value: what is stated, all that is said, or the last number."""
    text = answer_text(text)
    found = stated_answer(text)
    if found is None:
        if is_equiv(text.strip(), value):
            return True
        if (found := _number_text(text)) is None:
            return False
        if (formula := _last_formula(text, found)) and is_equiv(formula, value):
            return True
        said = unit_of(SENTENCE_END.split(text[max(0, text.rfind(found)) :][: len(found) + MAX_DENIAL_CHARS])[0])
        if said and (wanted := unit_of(value)) and said != wanted:
            return False
    return is_equiv(found, value)


def _boxed(text: str) -> str | None:
    boxes: list[tuple[int, int]] = []
    opened: list[int | None] = []  # where the content of each open box starts; None for another brace
    for m in BOX.finditer(text):
        if m[0] == "}":
            if opened and (start := opened.pop()) is not None:
                boxes.append((start, m.start()))
        elif m[0][-1] == "{" and m[0] != "\\{":
            opened.append(None if m[0] == "{" else m.end())
    boxes = sorted((start, end) for start, end in boxes if (found := text[start:end].strip()) and not PLACEHOLDER.fullmatch(found))
    if not boxes:
        return _last(BARE_BOX.findall(text))
    last, kept = boxes[-1], [text[slice(*boxes[-1])].strip()]
    for start, end in reversed(boxes[:-1]):
        if end >= last[1]:  # a box about the last one
            continue
        between = text[end + 1 : last[0]].rpartition("\\")[0] if len(kept) < MAX_BOXES else "."
        if len(between) > MAX_JOINT_CHARS or not JOINT.fullmatch(between):
            break
        last, found = (start, end), text[start:end].strip()
        if not any(is_equiv(found, other) for other in kept):
            kept.insert(0, found)
    return ", ".join(kept)


def _stated(text: str) -> str | None:
    stated = list(STATED.finditer(text))
    for m in sorted(reversed(stated), key=lambda m: PAST.search(m[0]) is not None):
        tail = text[m.end() : m.end() + MAX_ANSWER_CHARS].lstrip()
        while filler := FILLER.match(tail):
            tail = tail[filler.end() :]
        math = MATH.match(tail)
        end = SENTENCE_END.search(tail)
        if REMARK.match(tail) or (end and end[0] == "?" and not math):
            continue
        found = math[math.lastindex or 0] if math else tail[: end.start()] if end else tail
        found = re.sub(r"\s\((?=[a-z]+\s)[^()]*\)\W*$", "", found)  # a remark
        found = found.lstrip(' *`_"').rstrip(' \t.,;:*`_"' if "{" in found else ' \t.,;:*`_"}').strip()
        if found and not EMPTY_BOX.fullmatch(found):
            return found
    return None


def _number_text(text: str) -> str | None:
    """The last number, as it stands in its formula where it is all that the formula says, or comes to."""
    text = spelt_fractions(text)
    numbers = deque(NUMBER.finditer(re.sub("[\u2010-\u2012\u2212\ufe63\uff0d]", "-", text)), maxlen=MAX_DENIED)
    found = next((m for m in reversed(numbers) if not is_denied(text, m.start())), None)
    if found is None:
        return None
    for m in FORMULA.finditer(text, max(0, found.start() - MAX_ANSWER_CHARS), found.end() + MAX_ANSWER_CHARS):
        if m.start() < found.start() and found.end() <= m.end():
            value = re.split(r"=|\\approx", m[m.lastindex or 0])[-1].strip()
            return value if is_number(value) else found[0]
    return found[0]


def _last_formula(text: str, number: str) -> str:
    """The last formula, if it holds the last number; else ""."""
    formulas = list(FORMULA.finditer(text, max(0, text.rfind(number) - MAX_ANSWER_CHARS)))
    last = formulas[-1][formulas[-1].lastindex or 0] if formulas else ""
    return last if number in last else ""


def spelt_fractions(text: str) -> str:
    """Spell fractions of one character: `3\u00bd` as `3 1/2`."""
    if text.isascii():
        return text
    one = lambda m: " " + unicodedata.normalize("NFKC", m[1]).replace("\u2044", "/")  # noqa: E731
    return re.sub("[ \u00a0\u2009\u202f]*([\u00bc-\u00be\u2150-\u215e])", one, text)


def is_denied(text: str, start: int) -> bool:
    """Whether what stands at `start` is said not to be so."""
    return DENIED.search(text[max(0, start - MAX_DENIAL_CHARS) : start]) is not None


def _last(found: list[str]) -> str | None:
    return found[-1].strip() if found else None
