r"""Math answers: extraction from a solution, and equivalence of two.

Numbers are compared as exact fractions, tuples, matrices and intervals element by element, lists, sets and unions in any order, and
everything else (`2\sqrt{3}`, `x^2+1`, `Monday`) as text in a normal form. Expressions that differ as texts are compared by their
values (`verify/expression.py`). Units, currency and degree marks count for nothing; a percent sign counts. The forms are those of GSM8K
and MATH.
"""

import re
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Hashable
from fractions import Fraction

from gristmill.core.response_text import answer_text
from gristmill.verify.expression import expression_value

MAX_ANSWER_CHARS = 1000  # a longer one is equal only to itself, white space aside
MAX_BOXES = 10  # that make one answer
MAX_DEPTH = 20  # brackets within each other that are looked into

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.S)
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

SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
TEXT = r"\\(?:boxed|text(?:bf|it|rm|sf|normal)?|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}"
WRAPPED = re.compile(TEXT)
TIDY = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        ("\u03c0", r"\\pi "),
        (r"\u221e|\binfinity\b", r"\\infty "),
        (r"\u221a\s*(\d+)", r"\\sqrt{\1}"),
        ("\u221a", r"\\sqrt "),
        (r"\\leq?(?![a-zA-Z])|\u2264|<=", r"\\le "),
        (r"\\geq?(?![a-zA-Z])|\u2265|>=", r"\\ge "),
        (r"(?<=\d)(?:\{,\}|,?\\[,!]|,\\ )(?=\d{3}(?!\d))", ""),  # thousands in LaTeX: `1{,}000`, `1\,000`, `1,\!000`
        (r"(?<=\d)(?<!\d\d\d\d) (?=\d{3}(?:[ .]|$))(?=(?: ?\d{3})+(?:\.\d+)?$)", ""),  # `10 000`
        (r"\\neq?(?![a-zA-Z])|\u2260|!=", r"\\ne "),
        (r"\u222a|(?<=[)\]])\s*U\s*(?=[(\[])|\\bigcup(?![a-zA-Z])", r"\\cup "),
        ("\u2208", r"\\in "),
        (r"\u2205|\\varnothing(?![a-zA-Z])", r"\\emptyset "),
        (r"\u00b1|\+/-|\+-", r"\\pm "),
        (r"\u00f7|\\div(?![a-zA-Z])|[\u2044\u2215]", "/"),
        (r"\\lvert|\\rvert|\\vert(?![a-zA-Z])", "|"),
        (r"\\(?:lbrace|rbrace)(?![a-zA-Z])", lambda m: "{" if m[0][1] == "l" else "}"),
        (r"\\[()\[\]!]", ""),
        (r"\\[,;: ]|~|\\q?quad(?![a-zA-Z])|\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![a-zA-Z])", " "),
        (r"(?:\b(?:US|CA|AU|NZ|HK)(?=\\?\$))?\\?[$\u20a0-\u20bf\u00a2\u00a3\u00a5]", ""),
        (r"\\underline(?![a-zA-Z])|\\(?:text)?color\s*\{\w+\}|\\(?:bm|boldsymbol)(?![a-zA-Z])", ""),
        (r"^(?:\s*\\(?:approx|simeq)(?![a-zA-Z])|\s*[\u2248~])", ""),
        (r"^([a-zA-Z])\s*(?:\\approx(?![a-zA-Z])|\u2248)", r"\1="),
        (r"(?<=\d)\s*[xX]\s*(?=10\s*(?:\^|\*\*))", "*"),
        (r"\\(mathbb|mathbf|mathcal|mathrm|vec|hat)\s+([a-zA-Z])", r"\\\1{\2}"),
        (r"\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"\\(?:langle|rangle)(?![a-zA-Z])", lambda m: "(" if m[0][1] == "l" else ")"),
        (r"\.(\d)\1\1+(?:\.\.\.|\\[lc]?dots|\u2026)", r".\\overline{\1}"),
        (r"\(mod\s*(\w+)\)|\\pmod\s*(\w)(?!\w)", lambda m: f"\\pmod{{{m[1] or m[2]}}}"),
        (
            r"(?<=\d)\s*(?:\\text\s*\{\s*)?\b(hundred|thousand|million|billion|trillion)\b(?:\s*\}|(?!\w))",
            lambda m: f"*10^{{{SCALES[m[1]]}}}",
        ),
        (r"(?<![\d.,])(\d{1,3}(?:\.\d{3}){2,})(?![\d.])", lambda m: m[1].replace(".", "")),
        (r"(?<![\d.,])(\d{1,3}(?:\.\d{3})+),(\d+)(?![\d.,])", lambda m: m[1].replace(".", "") + "." + m[2]),
        (r"^[^,]*;[^,]*$", lambda m: m[0].replace(";", ",")),
        (r"^\\?\{\s*[a-zA-Z](?:\s*\\in\s*\\mathbb\{?R\}?)?\s*(?:\\mid(?![a-zA-Z])|[:|])\s*(.*?)\\?\}$", r"\1"),
        (r"^\s*[a-zA-Z]\s*\([a-zA-Z]\)\s*=(?=[^=]*$)", ""),
        (r"\b([ap])\.\s?m\.?(?!\w)|\\text\s*\{\s*([ap])\.\s?m\.\s*\}", lambda m: f" {m[1] or m[2]}m"),
        (r"(?:\{\s*\}|\\\{\s*\\\})$", r"\\emptyset "),
        (r"\s*\\%|\s*\bper\s?cent\b|\s+%", "%"),
        (r"\^\s*(?:\\circ(?![a-zA-Z])|\{\s*\\circ\s*\})|\\degree(?![a-zA-Z])", "\u00b0"),
        (r"(?<=[nstc])(\s*[\s({]\s*)(\d+(?:\.\d+)?)\s*\u00b0", r"\1(\2\\pi/180)"),  # of an angle: `\sin 30^\circ`
        (r"\u00b0\s*(?:[CF]\b|\\(?:text|mathrm|rm)\s*\{\s*[CF]\s*\})?", ""),
        (r"\\([{}])", r"\1"),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:times|cdot)(?![a-zA-Z])|[\u00d7\u22c5\u00b7\u2217\u2219]", "*"),
        (r"\*\*", "^"),
        (r"(?<![a-zA-Z])\\?sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi "),
        (r"\\(frac|sqrt)\s*([0-9a-zA-Z])", r"\\\1{\2}"),
        (r"([\^_])\s*\{\s*(\w)\s*\}", r"\1\2"),
        (r",?\s*\\text\s*\{\s*(?:and|or)\s*\}|,?\s+(?:and|or)(?=\s)", ","),
    )
]
CHOICE = re.compile(r"(?:\\text(?:bf|it|rm)?\s*\{)?[\s(*]*([a-zA-Z])[\s).:*]*\}?[\s).]*")
LABELLED = re.compile(r"(?:\\(?:text|mathrm|mathbf|textbf)\s*\{)?(?:\(([A-J])\)|([A-J])[.):])\}?(?:\s|\\ )\s*(\S.*)")
ASSIGNED = re.compile(r"(?:^|(?<=,))\s*([a-zA-Z](?:_\w)?)\s*(?:=|\\in(?![a-zA-Z]))")
ASSIGNED_LAST = re.compile(r"([^=,<>\\]+)=\s*[a-zA-Z](?:_\w)?")
# Neither after a bracket, where a comma separates, nor before further digits: `1,234` is one number, `1,2345` are two.
THOUSANDS = re.compile(r"(?<![\d.,(\[{])\d{1,3}(?:,\d{3})+(?!,?\d)")
GREEK = re.compile("GREEK (SMALL|CAPITAL) LETTER ([A-Z]+)")
SIMPLE = re.compile(r"-?\d{1,15}(?:\.\d{1,15})?", re.A)  # most answers
ROW = "\x1e"  # stands for the double backslash that ends a row
MATRIX = re.compile(r"\\begin\s*\{((?:small|[pbBvV])?matrix|array)\*?\}(?:\s*\{[lcr| ]*\})?((?:(?!\\begin).)*)\\end\s*\{\1\*?\}", re.S)
RELATION = re.compile(r"(\\(?:le|ge|ne)(?![a-zA-Z])|[=<>])")
CONDITION = re.compile(r"[<>\u2264\u2265\u2260]|\\(?:[lg]eq?|[lgn]eq?slant|neq?|setminus|mid|cup)(?![a-zA-Z])|\\backslash")
# Of one variable: `1<x`, `x\le 2`, `1<x\le 2`, and the same turned round.
BOUNDS = re.compile(r"(?:([^<>=]+)(<|\\le|>|\\ge))?\s*([a-zA-Z])(?:(<|\\le|>|\\ge)([^<>=]+))?")
EXCEPT = re.compile(r"(?:[a-zA-Z]\\ne|\\mathbb\{?\s*R\}?(?:\\setminus|\\backslash|-)\{)\s*([^{}=<>]+?)\}?")
CLOSING = {"(": ")]", "[": ")]", "{": "}"}

DECIMAL = re.compile(r"(\d+\.?\d*|\.\d+)(?:e([-+]?\d{1,3})|\s*\*\s*10\s*\^\s*\{?\s*([-+]?\d{1,3})\s*\}?)?", re.I | re.A)
RATIO = re.compile(r"(?:(\d+)\s+)?(\d+\.?\d*|\.\d+)\s*/\s*([-+]?(?:\d+\.?\d*|\.\d+))", re.A)
# Below the line one factor alone: `1/2x` is read in two ways.
PLAIN_FRACTION = re.compile(r"(-?)([^/+-]+)/(\d[\d.]*|[^\W\d_]|\\[a-zA-Z]+(?:\{[^{}/+-]*\}|[a-z\d])?|\([^()/+-]*\))")
WHOLE_FRAC = re.compile(r"(\d*)\s*\\frac\s*(?=\{)", re.A)

UNIT_SIGNS = {"\u2126": "ohm", "\u212a": "kelvin", "\u212b": "angstrom"}  # and the units of CJK compatibility
WORDS = {
    word: str(n)
    for n, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"])
}
POWER = r"(?:\s*\^\s*\{?-?\d\}?)?"
UNIT = re.compile(rf"(.*?[\d.%)}}])\s+((?:(?:sq|cu)\.\s*)?[a-zA-Z]{{2,}}(?:[\s/-]+[a-zA-Z]{{2,}}){{0,3}}{POWER})", re.S)
SHORT_UNIT = re.compile(rf"(.*?\d)\s*((?:[mck]m|[mk]g|lbs?|oz|ft|m[lL]|km/h|m/s|mph|hrs?){POWER})", re.S)
WRAPPED_UNIT = re.compile(rf"(.*[\w.%)}}])\s*{TEXT}{POWER}", re.S)
QUANTITY = re.compile(r"\d[)}]*\s*((?:[a-zA-Z]++(?:\^\{?-?\d\}?)?[\s.*]*+|/\s*+){1,12})$")
UNIT_NAMES = (
    "m meter metre,km kilometer kilometre,cm centimeter centimetre,mm millimeter millimetre,mi mile,ft foot feet,in inch,yd yard,s sec "
    "second,min minute,h hr hour,d day,wk week,month,yr year,g gram,kg kilogram,mg milligram,lb pound,oz ounce,ton tonne,l liter litre,"
    "ml milliliter millilitre,gal gallon,n newton,j joule,kj kilojoule,w watt,kw kilowatt,v volt,hz hertz,pa pascal,kpa kilopascal,k "
    "kelvin,c celsius,f fahrenheit,deg degree,rad radian,dollar usd,cent,euro eur,gbp,yen jpy,rupee inr,mol mole,ohm"
)
UNITS = {name: names.split()[0] for names in UNIT_NAMES.split(",") for name in names.split()}
# A word that changes what the number before it means.
NO_UNIT = re.compile(
    r"(?i)\b(?:and|or|not|is|are|to|of|at|if|for|when|more|less|most|least|odd|even|[ap]m|base|over|plus|minus|times|choose|mod|factorial|"
    r"squared|cubed|pi|sqrt|sin|cos|tan|sec|csc|cot|log|ln|exp|half|halves|(?:third|quarter|fourth|fifth|sixth|eighth|tenth|hundredth)s?|"
    r"(?:dozen|hundred|thousand|[a-z]{1,4}illion)s?)\b"
)


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
        said = _unit(SENTENCE_END.split(text[max(0, text.rfind(found)) :][: len(found) + MAX_DENIAL_CHARS])[0])
        if said and (wanted := _unit(value)) and said != wanted:
            return False
    return is_equiv(found, value)


def is_equiv(a: str, b: str) -> bool:
    """Whether two answers are mathematically the same. Texts that cannot be read are equal when they are alike.

    Letters are variables, and r is another one than R, but for `(B)` and `\\text{B}`, which are choices.
    """
    if a != b and ((one := _unit(a)) and (other := _unit(b)) and one != other):
        return False
    labels = [LABELLED.fullmatch(text.strip()) for text in (a, b)]
    if (labels[0] is None) != (labels[1] is None):  # `(B) 7` is B, and 7
        (labelled,), bare = [m for m in labels if m], a if labels[1] else b
        return any(_is_same(part, bare) for part in labelled.groups() if part)
    return _is_same(a, b)


def _is_same(a: str, b: str) -> bool:
    choices = [m for m in map(CHOICE.fullmatch, (a.strip(), b.strip())) if m]
    if len(choices) == 2 and any(m[1].isupper() and (len(m[0]) > 1 or m[1] <= "E") for m in choices):
        return choices[0][1].upper() == choices[1][1].upper()
    one, other = _read(a, _plain), _read(b, _plain)
    if one == other or (_is_number(one) and _is_number(other)):
        return one == other
    if _read(a, _symbolic) == _read(b, _symbolic):
        return True
    if not CONDITION.search(a + b):
        return False
    one, other = _read(a, _solutions), _read(b, _solutions)
    return _union(one) == _union(other)


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
        if found := found.lstrip(' *`_"').rstrip(' \t.,;:*`_"' if "{" in found else ' \t.,;:*`_"}'):
            return found.strip()
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
            return value if _is_number(_read(value, _plain)) else found[0]
    return found[0]


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


# ---- reading ----


def _read(text: str, of_other: Callable[[str], Hashable]) -> Hashable:
    """What an answer means: equal answers have equal readings. What is no number is read by `of_other`."""
    text = " ".join(text.split()).strip(" *`")
    text = WORDS.get(text.lower().rstrip("."), text)
    if len(text) > MAX_ANSWER_CHARS:
        return text
    if SIMPLE.fullmatch(text):
        return Fraction(text), False
    if not text.isascii():
        text = _to_ascii(text)
    text = re.sub(r"\\\\(?:\[[^\]]*\])?", ROW if r"\begin" in text else r"\\", text)
    for pattern, replacement in TIDY:
        text = pattern.sub(replacement, text)
    text = _second_arguments(text).strip().rstrip(".,;: ")
    names = ASSIGNED.findall(text)
    if len(set(names)) == 1 and text.count("=") <= len(names):  # `x = 1, x = 2`, but not `x = 1, y = 2`
        text = ASSIGNED.sub("", text)
    elif m := ASSIGNED_LAST.fullmatch(text):
        text = m[1]
    return _value(text, of_other)


def _is_number(reading: Hashable) -> bool:
    return isinstance(reading, tuple) and isinstance(reading[0], Fraction)


def _to_ascii(text: str) -> str:
    """Digits, fractions, powers and minus signs beyond ASCII in their usual spelling."""
    out = []
    for c in text:
        kind, *parts = unicodedata.decomposition(c).split() or [""]
        plain = unicodedata.normalize("NFKC", c)
        if c in "\u00b0\u00ba\u2103\u2109":  # degrees, Celsius and Fahrenheit too
            out.append("\u00b0")
        elif c in UNIT_SIGNS or (kind == "<square>" and "\u3371" <= c <= "\u33df"):  # cm^2 as one character
            word = UNIT_SIGNS.get(c) or re.sub(r"[^a-zA-Z\d]", "", plain)
            out.append(re.sub(r"(\D+)(\d?)", lambda m: rf"\text{{ {m[1]}}}" + (m[2] and f"^{m[2]}"), word, count=1))
        elif c == "\u00b5":  # micro, not the variable mu
            out.append("u")
        elif kind == "<fraction>" and len(parts) == 3:
            top, bottom = plain.split("\u2044")
            out.append(rf"\frac{{{top}}}{{{bottom}}}")
        elif kind in ("<super>", "<sub>"):
            out.append(f"{'^' if kind == '<super>' else '_'}{{{plain}}}")
        elif letter := GREEK.fullmatch(unicodedata.name(c, "")):
            out.append(f"\\{letter[2].lower() if letter[1] == 'SMALL' else letter[2].title()} ")
        elif (digit := unicodedata.decimal(c, None)) is not None:
            out.append(str(digit))
        else:
            out.append("-" if c == "\u2212" or unicodedata.category(c) == "Pd" else plain)
    return re.sub(r"\}[\^](?=\{)\{|\}_\{", "", "".join(out)).replace("\u2212", "-")


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


def _value(text: str, of_other: Callable[[str], Hashable], depth: int = 0) -> Hashable:
    text = text.strip()
    if depth > MAX_DEPTH:
        return of_other(text)
    if m := WRAPPED.fullmatch(text):
        return _value(m[1].strip().rstrip("."), of_other, depth + 1)
    if m := MATRIX.fullmatch(text[1:-1].strip() if text[:1] + text[-1:] == "[]" else text):
        rows = m[2].strip().removesuffix(ROW).split(ROW)
        kind = "|" if m[1] and m[1][0] in "vV" else "matrix"
        return kind, *(tuple(_value(cell, of_other, depth + 1) for cell in row.split("&")) for row in rows)
    if len(sets := _pieces(text, r"\cup")) > 1:
        return r"\cup", frozenset(_value(piece, of_other, depth + 1) for piece in sets)
    kind = ""
    if text and text[-1] in CLOSING.get(text[0], "") and _end(text, 0) == len(text) and text[1:-1].strip():
        kind, text = text[0] + text[-1], text[1:-1]
    else:
        text = THOUSANDS.sub(lambda m: m[0].replace(",", ""), text)
    pieces = _pieces(text)
    if kind in ("", "{}"):
        pieces = [signed for piece in pieces for signed in _signs(piece)]
    if kind in ("", "()", "{}") and len(pieces) == 1:
        return _value(text, of_other, depth + 1) if kind else _atom(text, of_other)
    parts = [_value(piece, of_other, depth + 1) for piece in pieces]
    return frozenset(Counter(parts).items()) if kind in ("", "{}") else (kind, *parts)


def _signs(piece: str) -> list[str]:
    r"""`a \pm b` as `a + b` and `a - b`."""
    if r"\pm" not in piece:
        return [piece]
    return [re.sub(r"\\pm\s*", first, re.sub(r"\\mp\s*", second, piece)) for first, second in ("+-", "-+")]


def _pieces(text: str, separator: str = ",") -> list[str]:
    """A text split at the separators outside all brackets."""
    pieces, start, depth = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if depth == 0 and c == separator[0] and text.startswith(separator, i):
            pieces.append(text[start:i])
            start = i + len(separator)
    return [*pieces, text[start:]]


def _atom(text: str, of_other: Callable[[str], Hashable]) -> Hashable:
    while (m := WRAPPED_UNIT.fullmatch(text)) and _is_unit(m[2]):
        text = m[1].rstrip("/* ")
    text = WRAPPED.sub(r" \1 ", text).strip()
    bare = [m[1] for pattern in (UNIT, SHORT_UNIT) if (m := pattern.fullmatch(text)) and _is_unit(m[2])]
    for candidate in (text, *bare):
        number = _number(candidate.removesuffix("%").strip())
        if number is not None:
            return number, candidate.endswith("%")
    return of_other(text)


def _symbolic(text: str) -> Hashable:
    """The value of an expression or relation; the text in its normal form where it is none."""
    plain = _plain(text)
    sides = RELATION.split(plain)
    if len(sides) == 1:
        value = expression_value(plain)
        return plain if value is None else (value, False) if isinstance(value, Fraction) else value
    values, signs = [_symbolic(side) for side in sides[::2]], sides[1::2]
    if all(sign in ("=", r"\ne") for sign in signs) and len(set(signs)) == 1:
        return signs[0], frozenset(values)
    if all(sign in (">", r"\ge") for sign in signs):
        values, signs = values[::-1], [{">": "<", r"\ge": r"\le"}[sign] for sign in signs[::-1]]
    return (*values, *signs)


def _solutions(text: str) -> Hashable:
    """The interval or union of which an inequality in one variable is true; else as `_symbolic`."""
    plain = _plain(text).replace("\\le ", "\\le").replace("\\ge ", "\\ge")
    if m := EXCEPT.fullmatch(plain):
        return _value(rf"(-\infty,{m[1]})\cup({m[1]},\infty)", _symbolic)
    m = BOUNDS.fullmatch(plain)
    signs = {sign.replace("\\ge", ">").replace("\\le", "<") for sign in (m[2], m[4]) if sign} if m else set()
    if m is None or len(signs) != 1:
        return _symbolic(text)
    low, high = ((m[1], m[2]), (m[5], m[4])) if "<" in signs else ((m[5], m[4]), (m[1], m[2]))
    opening, closing = "[" if low[1] and low[1][0] == "\\" else "(", "]" if high[1] and high[1][0] == "\\" else ")"
    ends = low[0] or r"-\infty", high[0] or r"\infty"
    return _value(f"{opening}{ends[0]},{ends[1]}{closing}", _symbolic)


def _union(reading: Hashable) -> Hashable:
    """Conditions of which one holds, as the union of what they allow."""
    return (r"\cup", frozenset(dict(reading))) if isinstance(reading, frozenset) else reading


def _unit(text: str) -> frozenset[tuple[str, int]] | None:
    """The unit of measure, or currency, at the end of a quantity, as powers of units that are known; None where it has none."""
    if money := re.match(r"\s*[\u00a3\u00a5\u20a0-\u20bf]", text):
        return frozenset({(money[0].strip(), 1)})
    text = re.sub(r"\\(?:text|mathrm|mbox|rm)\s*\{([^{}]*)\}|\\[,;: ]|~", r" \1", text.replace("\\cdot", "*"))
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\u00b0|\\degree(?![a-zA-Z])", " deg ", text)
    m = QUANTITY.search(text.strip().rstrip(".$*` "))
    if m is None:
        return None
    found: Counter[str] = Counter()
    sign, power = 1, 1
    for word, exponent in re.findall(r"([a-zA-Z]+|/)(?:\^\{?(-?\d)\}?)?", m[1]):
        word = word.lower()
        if word in ("/", "per"):
            sign = -1
        elif word in ("square", "sq", "cubic", "cu", "squared", "cubed"):
            power = 2 if word[0] == "s" else 3
        elif word == "mph":
            found.update({"mi": 1, "h": -1})
        elif unit := UNITS.get(word) or UNITS.get(word.removesuffix("s")) or UNITS.get(word.removesuffix("es")):
            found[unit] += sign * int(exponent or power)
            power = 1
        else:
            return None
    return frozenset(found.items()) or None


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
        text = text.rstrip(")")
        return text.casefold() if len(text) > 1 else text  # r is not R
    text = re.sub(r"(\\[a-zA-Z]+) +(?=[a-zA-Z])", "\\1\t", text)
    text = re.sub(r"(?<!\d) +| +(?!\d)", "", text).replace("\t", " ").removeprefix("+")  # `2 3` is not 23, nor `\pi r` `\pir`
    text = re.sub(r"\*(?=[a-zA-Z\\(])", "", text)
    if (m := PLAIN_FRACTION.fullmatch(text)) and m[2].count("{") == m[2].count("}"):
        text = rf"{m[1]}\frac{{{m[2]}}}{{{m[3]}}}"
    if text.startswith(r"\frac{-") and not re.search("[+-]", text[7 : _end(text, 5)]):
        text = r"-\frac{" + text[7:]
    return text
