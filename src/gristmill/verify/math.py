r"""Math answers: extraction from a solution, and equivalence of two.

An answer is read as text and never computed: numbers are compared as exact fractions, tuples and intervals element by element,
lists and sets in any order, and everything else (`2\sqrt{3}`, `x^2+1`, `Monday`) as text in a normal form. Units, currency and
degree marks count for nothing; a percent sign counts. The forms are those of GSM8K and MATH.
"""

import re
from collections import Counter
from collections.abc import Hashable
from fractions import Fraction

MAX_ANSWER_CHARS = 1000  # a longer one is equal only to itself, white space aside
MAX_DEPTH = 20  # brackets within each other that are looked into

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.S)
BARE_BOX = re.compile(r"\\boxed\s+([^\s{}$\\]+)")
STATED = re.compile(r"\banswer(?:\s+is\b|\s*:)[\s:*]*", re.I)
MATH = re.compile(r"\$\$?([^$]+)\$\$?(?!\d)[^$\n]*$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S | re.M)
SENTENCE_END = re.compile(r"[.;?](?=\s|$)|\n|,?\s(?:because|since|which|where|so|as)\b")
HASHES = re.compile(r"####[ \t]*([^\s#][^\n]*)")
NUMBER = re.compile(
    r"(?:(?<![\w)\]])-)?(?:\\?\$)?"  # a minus after a digit, a name or a bracket subtracts: `20-13` ends with 13
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"  # `1,234` is one number, `1,2` are two
    r"(?:[eE][+-]?\d+)?(?:/\d+)?(?:\s?\\?%)?"
)

TEXT = r"\\(?:text(?:bf|it|rm|sf|normal)?|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}"
WRAPPED = re.compile(TEXT)
TIDY = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        ("[\u2212\u2013]", "-"),
        ("\u03c0", r"\\pi "),
        (r"\u221e|\binfinity\b", r"\\infty "),
        (r"\u221a\s*(\d+)", r"\\sqrt{\1}"),
        ("\u221a", r"\\sqrt "),
        (r"\\leq?(?![a-zA-Z])|\u2264|<=", r"\\le "),
        (r"\\geq?(?![a-zA-Z])|\u2265|>=", r"\\ge "),
        (r"(?<=\d)(?:\{,\}|,?\\[,!]|,\\ )(?=\d{3}(?!\d))", ""),  # thousands in LaTeX: `1{,}000`, `1\,000`, `1,\!000`
        (r"\\[()\[\]!]", ""),
        (r"\\[,;: ]|~|\\q?quad(?![a-zA-Z])|\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![a-zA-Z])", " "),
        (r"\\?[$\u20ac\u00a3]", ""),
        (r"\s*\\%|\s*\bper\s?cent\b|\s+%", "%"),
        (r"\^\s*(?:\\circ(?![a-zA-Z])|\{\s*\\circ\s*\})|\\degree(?![a-zA-Z])|\u00b0", ""),
        (r"\\([{}])", r"\1"),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:times|cdot)(?![a-zA-Z])|[\u00d7\u22c5\u00b7]", "*"),
        (r"\*\*", "^"),
        (r"(?<![a-zA-Z])\\?sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi "),
        (r"\\(frac|sqrt)\s*([0-9a-zA-Z])", r"\\\1{\2}"),
        (r"([\^_])\s*\{\s*(\w)\s*\}", r"\1\2"),
        (r",?\s*\\text\s*\{\s*(?:and|or)\s*\}|,?\s+(?:and|or)(?=\s)", ","),
    )
]
ASSIGNED = re.compile(r"(?:^|(?<=,))\s*([a-zA-Z](?:_\w)?)\s*(?:=|\\in(?![a-zA-Z]))")
# Neither after a bracket, where a comma separates, nor before further digits: `1,234` is one number, `1,2345` are two.
THOUSANDS = re.compile(r"(?<![\d.,(\[{])\d{1,3}(?:,\d{3})+(?!,?\d)")
CLOSING = {"(": ")]", "[": ")]", "{": "}"}

DECIMAL = re.compile(r"(\d+\.?\d*|\.\d+)(?:e([-+]?\d{1,3})|\s*\*\s*10\s*\^\s*\{?\s*([-+]?\d{1,3})\s*\}?)?", re.I | re.A)
RATIO = re.compile(r"(?:(\d+)\s+)?(\d+\.?\d*|\.\d+)\s*/\s*([-+]?(?:\d+\.?\d*|\.\d+))", re.A)
WHOLE_FRAC = re.compile(r"(\d*)\s*\\frac\s*(?=\{)", re.A)

POWER = r"(?:\s*\^\s*\{?\d\}?)?"
UNIT = re.compile(rf"(.*?[\d.%)}}])\s+([a-zA-Z]{{2,}}(?:[\s/-]+[a-zA-Z]{{2,}}){{0,3}}{POWER})", re.S)
SHORT_UNIT = re.compile(rf"(.*?\d)\s*((?:[mck]m|[mk]g|lbs?|oz|ft|m[lL]|km/h|m/s|mph|hrs?){POWER})", re.S)
WRAPPED_UNIT = re.compile(rf"(.*[\w.%)}}])\s*{TEXT}{POWER}", re.S)
# A word that changes what the number before it means.
NO_UNIT = re.compile(
    r"(?i)\b(?:and|or|not|is|are|to|of|at|if|for|when|more|less|most|least|odd|even|[ap]m|base|over|plus|minus|times|choose|mod|factorial|"
    r"squared|cubed|pi|sqrt|sin|cos|tan|sec|csc|cot|log|ln|exp|half|halves|(?:third|quarter|fourth|fifth|sixth|eighth|tenth|hundredth)s?|"
    r"(?:dozen|hundred|thousand|[a-z]{1,4}illion)s?)\b"
)


def extract_answer(text: str) -> str | None:
    r"""Extract the final answer of a solution, or None.

    The content of the last `\boxed{...}`; else what follows the last "answer is" or "answer:", to the end of the sentence; else
    what follows the last `####`; else the last number.
    """
    return _boxed(text) or _stated(text) or _last(HASHES.findall(text)) or _number_text(text)


def is_equiv(a: str, b: str) -> bool:
    """Whether two answers are mathematically the same. Texts that cannot be read are equal when they are alike."""
    return _read(a) == _read(b)


# ---- finding ----


def _boxed(text: str) -> str | None:
    boxes: list[tuple[int, int]] = []
    opened: list[int | None] = []  # where the content of each open box starts; None for another brace
    for m in BOX.finditer(text):
        if m[0] == "}":
            if opened and (start := opened.pop()) is not None:
                boxes.append((start, m.start()))
        elif m[0][-1] == "{" and m[0] != "\\{":
            opened.append(None if m[0] == "{" else m.end())
    for start, end in sorted(boxes, reverse=True):
        if found := text[start:end].strip():
            return found
    return _last(BARE_BOX.findall(text))


def _stated(text: str) -> str | None:
    for m in reversed(list(STATED.finditer(text))):
        tail = text[m.end() : m.end() + MAX_ANSWER_CHARS]
        math = MATH.match(tail)
        found = math[math.lastindex or 0] if math else SENTENCE_END.split(tail, maxsplit=1)[0]
        if found := found.lstrip(" *`").rstrip(" \t.,;:*`"):
            return found.strip()
    return None


def _number_text(text: str) -> str | None:
    found = None
    for found in NUMBER.finditer(text.replace("\u2212", "-")):  # noqa: B007
        pass
    return found[0] if found else None


def _last(found: list[str]) -> str | None:
    return found[-1].strip() if found else None


# ---- reading ----


def _read(text: str) -> Hashable:
    """What an answer means: equal answers have equal readings."""
    text = " ".join(text.split()).strip(" *`")
    if len(text) > MAX_ANSWER_CHARS:
        return text
    for pattern, replacement in TIDY:
        text = pattern.sub(replacement, text)
    text = _second_arguments(text).strip().rstrip(".,;: ")
    names = ASSIGNED.findall(text)
    if len(set(names)) == 1 and text.count("=") <= len(names):  # `x = 1, x = 2`, but not `x = 1, y = 2`
        text = ASSIGNED.sub("", text)
    return _value(text)


def _second_arguments(text: str) -> str:
    r"""`\frac{1}2` with braces about its second argument."""
    for m in reversed(list(re.finditer(r"\\frac\s*(?=\{)", text))):  # from the end, where nothing before moves
        end = _end(text, m.end())
        if end and (c := re.compile(r"\s*([0-9a-zA-Z])").match(text, end)):
            text = f"{text[:end]}{{{c[1]}}}{text[c.end() :]}"
    return text


def _end(text: str, start: int) -> int:
    """Where the bracket that opens at `start` has closed; 0 if it never does."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i + 1
    return 0


def _value(text: str, depth: int = 0) -> Hashable:
    text = text.strip()
    if depth > MAX_DEPTH:
        return _plain(text)
    if m := WRAPPED.fullmatch(text):
        return _value(m[1].strip().rstrip("."), depth + 1)
    kind = ""
    if text and text[-1] in CLOSING.get(text[0], "") and _end(text, 0) == len(text) and text[1:-1].strip():
        kind, text = text[0] + text[-1], text[1:-1]
    else:
        text = THOUSANDS.sub(lambda m: m[0].replace(",", ""), text)
    pieces = _pieces(text)
    if kind in ("", "()", "{}") and len(pieces) == 1:
        return _value(text, depth + 1) if kind else _atom(text)
    parts = [_value(piece, depth + 1) for piece in pieces]
    return frozenset(Counter(parts).items()) if kind in ("", "{}") else (kind, *parts)


def _pieces(text: str) -> list[str]:
    """A text split at the commas outside all brackets."""
    pieces, start, depth = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            pieces.append(text[start:i])
            start = i + 1
    return [*pieces, text[start:]]


def _atom(text: str) -> Hashable:
    if (m := WRAPPED_UNIT.fullmatch(text)) and _is_unit(m[2]):
        text = m[1]
    text = WRAPPED.sub(r" \1 ", text).strip()
    bare = [m[1] for pattern in (UNIT, SHORT_UNIT) if (m := pattern.fullmatch(text)) and _is_unit(m[2])]
    for candidate in (text, *bare):
        number = _number(candidate.removesuffix("%").strip())
        if number is not None:
            return number, candidate.endswith("%")
    return _plain(text)


def _is_unit(words: str) -> bool:
    return not NO_UNIT.search(words)


def _number(text: str) -> Fraction | None:
    body = text.lstrip("-+ ")
    sign = "".join(text[: len(text) - len(body)].split())
    if len(sign) > 1:
        return None
    value = _unsigned(body)
    return -value if value is not None and sign == "-" else value


def _unsigned(text: str) -> Fraction | None:
    if m := DECIMAL.fullmatch(text):
        return Fraction(f"{m[1]}e{m[2] or m[3] or 0}")
    whole: str | None
    if m := RATIO.fullmatch(text):
        whole, top, bottom = m[1], Fraction(m[2]), Fraction(m[3])
    elif m := WHOLE_FRAC.match(text):
        middle = _end(text, m.end())
        if not middle or text[middle:].lstrip()[:1] != "{" or _end(text, start := text.index("{", middle)) != len(text):
            return None
        first, second = _number(text[m.end() + 1 : middle - 1].strip()), _number(text[start + 1 : -1].strip())
        if first is None or second is None:
            return None
        whole, top, bottom = m[1], first, second
    else:
        return None
    if not bottom:
        return None
    part = top / bottom
    if not whole:
        return part
    return int(whole) + part if 0 < part < 1 else None  # `2 5/2` is a product, if anything


def _plain(text: str) -> str:
    """The normal form of what is no number."""
    if re.fullmatch(r"[^\W\d_]+(?: [^\W\d_]+)*\)?", text):  # words, or the letter of a choice
        return text.rstrip(")").casefold()
    text = text.replace(" ", "").removeprefix("+")
    text = re.sub(r"\*(?=[a-zA-Z\\(])", "", text)
    if (m := re.fullmatch(r"(-?)([^/+-]+)/([^/+-]+)", text)) and all(side.count("{") == side.count("}") for side in m.groups()):
        text = rf"{m[1]}\frac{{{m[2]}}}{{{m[3]}}}"
    if text.startswith(r"\frac{-") and not re.search("[+-]", text[7 : _end(text, 5)]):
        text = r"-\frac{" + text[7:]
    return text
