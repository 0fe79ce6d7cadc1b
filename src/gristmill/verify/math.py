r"""Equivalence of math answers.

Numbers are compared as exact fractions, tuples, matrices and intervals element by element, lists, sets and unions in any order, and
everything else (`2\sqrt{3}`, `x^2+1`, `Monday`) as text in a normal form. Expressions that differ as texts are compared by their
values (`verify/expression.py`). Units, currency and degree marks count for nothing; a percent sign counts. The forms are those of GSM8K
and MATH.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable
from fractions import Fraction

from gristmill.verify.expression import equation_value, expression_value

MAX_ANSWER_CHARS = 1000  # a longer one is equal only to itself, white space aside
MAX_DEPTH = 20  # brackets within each other that are looked into

SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
TEXT = r"\\(?:boxed|text(?:bf|it|rm|sf|normal)?|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}"
WRAPPED = re.compile(TEXT)
UNIT_FRACTION = r"\\[dt]?frac\s*\{\s*\\(?:text|mathrm)\{([^{}]*)\}\s*\}\s*\{\s*\\(?:text|mathrm)\{([^{}]*)\}\s*\}"
TIDY = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        ("\u03c0", r"\\pi "),
        (r"\u221e|\binfinity\b", r"\\infty "),
        (r"\u221a\s*(\d+)", r"\\sqrt{\1}"),
        ("\u221a", r"\\sqrt "),
        (r"\\leq?(?![a-zA-Z])|\u2264|<=", r"\\le "),
        (r"\\geq?(?![a-zA-Z])|\u2265|>=", r"\\ge "),
        (r"(?<=\d)(?:\{,\}|,?\\[,!]|,\\ ) ?(?=\d{3}(?!\d))", ""),  # thousands in LaTeX: `1{,}000`, `1\,000`, `1,\! 000`
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
        (r"\\[dt]binom(?![a-zA-Z])", r"\\binom"),
        (UNIT_FRACTION, r"\\text{ \1/\2}"),
        (r"\\([ij])math(?![a-zA-Z])", r"\1"),
        (r"^\s*\\(?:vec|mathbf|overrightarrow)\s*\{\s*[a-zA-Z]{1,2}\s*\}\s*=(?=[^=]*$)", ""),
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
        (r"(?<=\d)\s*([AP])\.?\s?M\b\.?", lambda m: f" {m[1].lower()}m"),
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
ONES = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen"),
    *("fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
WORDS = {word: str(n) for n, word in enumerate(ONES)} | {word: str(10 * n) for n, word in enumerate(TENS, 2)}
WORDS |= {f"{ten}{sign}{ONES[n]}": str(int(WORDS[ten]) + n) for ten in TENS for n in range(1, 10) for sign in "- "}
WORDS |= {f"{one} {word}": str(size) for one in ("one", "a") for word, size in (("hundred", 100), ("thousand", 1000), ("million", 10**6))}
POWER = r"(?:\s*\^\s*\{?-?\d\}?)?"
UNIT = re.compile(rf"(.*?[\d.%)}}])\s+((?:(?:sq|cu)\.\s*)?[a-zA-Z]{{2,}}(?:[\s/-]+[a-zA-Z]{{2,}}){{0,3}}{POWER})", re.S)
SHORT_UNIT = re.compile(rf"(.*?\d)\s*((?:[mck]m|[mk]g|lbs?|oz|ft|m[lL]|km/h|m/s|mph|hrs?){POWER})", re.S)
LETTER_UNIT = re.compile(rf"(.*?[\d}}])\s+([mshgJNWVK]{POWER})", re.S)
WRAPPED_UNIT = re.compile(rf"(.*[\w.%)}}])\s*{TEXT}{POWER}", re.S)
QUANTITY = re.compile(r"\d[)}]*\s*((?:[a-zA-Z]++(?:\^\{?-?\d\}?)?[\s.*]*+|/\s*+){1,12})$")
UNIT_NAMES = (
    "m meter metre,km kilometer kilometre,cm centimeter centimetre,mm millimeter millimetre,mi mile,ft foot feet,in inch,yd yard,s sec "
    "second,min minute,h hr hour,d day,wk week,month,yr year,g gram,kg kilogram,mg milligram,lb pound,oz ounce,ton tonne,l liter litre,"
    "ml milliliter millilitre,gal gallon,n newton,j joule,kj kilojoule,w watt,kw kilowatt,v volt,hz hertz,pa pascal,kpa kilopascal,k "
    "kelvin,c celsius,f fahrenheit,deg degree,rad radian,dollar usd,cent,euro eur,gbp,yen jpy,rupee inr,mol mole,ohm"
)
UNITS = {name: names.split()[0] for names in UNIT_NAMES.split(",") for name in names.split()}
CURRENCIES = {"$": "dollar", "\u20ac": "euro", "\u00a3": "gbp", "\u00a5": "yen", "\u20b9": "rupee"}
# A word that changes what the number before it means.
NO_UNIT = re.compile(
    r"(?i)\b(?:[ei]|and|or|not|is|are|to|of|at|if|for|when|more|less|most|least|odd|even|[ap]m|base|over|plus|minus|times|choose|mod|factorial|"
    r"squared|cubed|pi|sqrt|sin|cos|tan|sec|csc|cot|log|ln|exp|half|halves|(?:third|quarter|fourth|fifth|sixth|eighth|tenth|hundredth)s?|"
    r"(?:dozen|hundred|thousand|[a-z]{1,4}illion)s?)\b"
)


def is_equiv(a: str, b: str) -> bool:
    """Whether two answers are mathematically the same. Texts that cannot be read are equal when they are alike.

    Letters are variables, and r is another one than R, but for `(B)` and `\\text{B}`, which are choices.
    """
    if a != b and ((one := unit_of(a)) and (other := unit_of(b)) and one != other):
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
    equations = [_equation(text) for text in (a, b)]
    if None not in equations and equations[0] == equations[1]:
        return True
    if not CONDITION.search(a + b):
        return False
    one, other = _read(a, _solutions), _read(b, _solutions)
    return _union(one) == _union(other)


# ---- reading ----


def _read(text: str, of_other: Callable[[str], Hashable]) -> Hashable:
    """What an answer means: equal answers have equal readings. What is no number is read by `of_other`."""
    text = " ".join(text.split()).strip(" *`")
    wrapped = WRAPPED.fullmatch(text)
    text = WORDS.get((wrapped[1].strip() if wrapped else text).lower().rstrip("."), text)
    if len(text) > MAX_ANSWER_CHARS:
        return text
    if SIMPLE.fullmatch(text):
        return Fraction(text), False
    text = _tidied(text)
    names = ASSIGNED.findall(text)
    if len(set(names)) == 1 and text.count("=") <= len(names):  # `x = 1, x = 2`, but not `x = 1, y = 2`
        text = ASSIGNED.sub("", text)
    elif m := ASSIGNED_LAST.fullmatch(text):
        text = m[1]
    return _value(text, of_other)


def _tidied(text: str) -> str:
    """LaTeX and other spellings in one form."""
    if not text.isascii():
        text = _to_ascii(text)
    text = re.sub(r"\\\\(?:\[[^\]]*\])?", ROW if r"\begin" in text else r"\\", text)
    for pattern, replacement in TIDY:
        text = pattern.sub(replacement, text)
    return _second_arguments(text).strip().rstrip(".,;: ")


def _equation(text: str) -> Hashable | None:
    """What is equal for equations of one line or curve: 2x - y + 1 = 0 and y = 2x + 1; None for what is no equation."""
    if text.count("=") != 1 or len(text) > MAX_ANSWER_CHARS:
        return None
    sides = RELATION.split(_plain(_tidied(" ".join(text.split()).strip(" *`$")), products=True))
    return equation_value(sides[0], sides[2]) if len(sides) == 3 and sides[1] == "=" else None


def is_number(text: str) -> bool:
    """Whether a text is a number, in any of its spellings."""
    return _is_number(_read(text, _plain))


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
        values = [_value(piece, of_other, depth + 1) for piece in sets]
        if all(re.fullmatch(r"\s*\{.*\}\s*", piece, re.S) for piece in sets):  # of numbers, one by one
            members = {member for value in values for member in (dict(value) if isinstance(value, frozenset) else [value])}
            return frozenset((member, 1) for member in members) if len(members) > 1 else members.pop()
        return r"\cup", frozenset(values)
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
    bare = [m[1] for pattern in (UNIT, SHORT_UNIT, LETTER_UNIT) if (m := pattern.fullmatch(text)) and _is_unit(m[2])]
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
        value = expression_value(_plain(text, products=True))
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


def unit_of(text: str) -> frozenset[tuple[str, int]] | None:
    """The unit of measure, or currency, at the end of a quantity, as powers of units that are known; None where it has none."""
    money = re.match(r"\s*(?:\\?(\$)(?=\d[\d,.]*\s*$)|([\u00a3\u00a5\u20a0-\u20bf]))", text)
    if money:
        sign = money[1] or money[2]
        return frozenset({(CURRENCIES.get(sign, sign), 1)})
    text = re.sub(UNIT_FRACTION, r" \1/\2", text)
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


def _plain(text: str, *, products: bool = False) -> str:
    """The normal form of what is no number, with its signs of multiplication or without."""
    if re.fullmatch(r"[^\W\d_]+(?: [^\W\d_]+)*\)?", text):  # words, or the letter of a choice
        text = text.rstrip(")")
        return text.casefold() if len(text) > 1 else text  # r is not R
    text = re.sub(r"(\\[a-zA-Z]+) +(?=[a-zA-Z])", "\\1\t", text)
    text = re.sub(r"(?<!\d) +| +(?!\d)", "", text).replace("\t", " ").removeprefix("+")  # `2 3` is not 23, nor `\pi r` `\pir`
    text = text if products else re.sub(r"\*(?=[a-zA-Z\\(])", "", text)
    if (m := PLAIN_FRACTION.fullmatch(text)) and m[2].count("{") == m[2].count("}"):
        text = rf"{m[1]}\frac{{{m[2]}}}{{{m[3]}}}"
    if text.startswith(r"\frac{-") and not re.search("[+-]", text[7 : _end(text, 5)]):
        text = r"-\frac{" + text[7:]
    return text
