"""Rule-based verifiers: programs that decide whether an answer is right. A truth is a small JSON object with a `kind`.

| kind | fields | right when |
|---|---|---|
| number | value, working | the last number in the answer (in its last box, if it has one) that is not denied (`not 4`) equals it; with
`working`, every equation in the answer must hold too |
| exact | value | the answer equals it, white space, case and the forms of quotes and minus signs aside |
| mention | value, not | the answer mentions it as a word, and no wrong value except as a part of it |
| choice | value | the last "answer is X" or box, else the last letter A-Z standing alone, names it and no second one (`A or B`) |
| code | tests, or cases | the program in it (a code block, or the whole answer) passes the tests in the sandbox, see code_tests.py |
| list | n, words, shape, extras | a list of n different words of the category in the asked form |
| math | value | the final answer (boxed, stated, all that is said, or the last number) equals it as a mathematician would say |
| instructions | checks, loose | every IFEval check holds, strictly or in the loose form |
| schema | schema | the JSON in the answer fits the JSON schema |

What a reasoning model thinks is no part of its answer (`core/response_text.py`). A truth's `steps` are the equations that its thinking is
to have, for process supervision (`workflows/rl/process.py`).
"""

import collections
import math
import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from gristmill.core.errors import InputError
from gristmill.core.response_text import answer_text, extract_code, strip_thinking
from gristmill.verify.code_tests import check_text, complete
from gristmill.verify.final_answer import MAX_DENIED, is_denied, is_right, spelt_fractions
from gristmill.verify.ifeval import check_instructions
from gristmill.verify.json_schema import extract_json, schema_error, validation_error

KINDS = ("number", "exact", "mention", "choice", "code", "list", "math", "instructions", "schema")
RunCode = Callable[[str, str], bool]
NUMBER = re.compile(
    r"(?:(?<![\w)\]])-)?\$?"  # a minus after a digit, a name or a bracket subtracts: `20-13` ends with 13
    r"(?:(\d{1,9}) (?=\d{1,9}/[1-9]))?"  # of a mixed number
    r"((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"  # `1,234` is one number, `1,2` are two
    r"((?:[eE][+-]?\d{1,3}(?!\d))?)"  # a longer exponent would make a number that fills the memory
    r"(?:/(\d+))?"
)
SPELT = [  # numbers as they are also written, and their plain form
    (re.compile(pattern, re.I), replacement)
    for pattern, replacement in (
        (r"\\[dtc]?frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))", r" \1\2/\3\4"),
        ("\u2044", "/"),
        (r"(?<![\d.,])\d{1,3}(?:\.\d{3}){2,}(?![\d.])|(?<![\d.,])\d{1,3}(?:\.\d{3})+(?=,\d+(?![\d.,]))", lambda m: m[0].replace(".", "")),
        (r"(?<![\d.,])(\d{4,}),(\d{1,2})(?![\d,]|\.\d)", r"\1.\2"),  # `1.234,50`, without its points by now
        (r"(?<=\d)(?:\{,\}|\\[,!]|,\\!|[\u00a0\u2009\u202f'\u2019_])(?=\d{3}(?!\d))", ","),  # `1{,}000`, `1'000`
        (r"(?<![\d.,/^-])(?<!\d )\d{1,3}(?: \d{3})+(?![\d/]|,\d| \d)", lambda m: m[0].replace(" ", ",")),  # `10 000`
        (r"[ \t]{0,3}(?:\\times|\\cdot|[*x\u00d7\u22c5\u00b7])\s*10\s*(?:\^|\*\*)\s*\{?\s*([-+]?\d{1,3})(?!\d)\s*\}?", r"e\1"),
        (r"(?<![\w.^])(\d{1,9})[ ]?(?:\^|\*\*)[ ]?(?:\{(\d{1,2})\}|(\d{1,2})(?!\d))", lambda m: str(int(m[1]) ** int(m[2] or m[3]))),
        (r"\^ ?(?:\{[ ]?-?\d{1,9}[ ]?\}|-?\d{1,9})", ""),  # of a unit or a name: `5 m^2`
        (r"(?<![\w)\]] )(?<![\w)\]])minus (?=\$?\d)|\bnegative (?=\$?\d)|(?<=[a-z]{2} )minus (?=\$?\d)", "-"),
    )
]
SUPERSCRIPTS = re.compile("[\u207b\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
EQUATION = re.compile(r"(\d{1,9}) ([-+*]) (\d{1,9}) = (-?\d{1,18})")
# The pronoun and the article are no options: `I think`, `I'm`, `A good`; `A is right` is one.
IN_WORD = r"[^\W\u3040-\u30ff\u3400-\u9fff]"  # a character of a script that parts words
LETTER = rf"(?<!{IN_WORD})(?!(?:I|A)(?:['\u2019]| (?!is\b|or\b|and\b)[a-z]))([A-Z])(?!{IN_WORD})"
STATED = re.compile(
    r"(?i:\b(?:answer|option|choice)(?:\s+is\b|\s*:)|\bI\s+(?:choose|chose|pick|select)\b|\bit(?:\s+is|\s+must\s+be|['\u2019]s)\b"
    r"|\u7b54\u6848(?:\u662f|\u4e3a|\u70ba)?|\\boxed\s*\{)"
    rf"(?:[\s:*(\[{{]|\\text(?:bf|rm|it)?|(?i:option|choice)\b)*(?:{LETTER}|(?<=\()([a-z])(?=\))|(?<!\w)([a-j])(?=\)))"
)
REJECTED = re.compile(r"[)\]*]*\s+(?:(?:is|was)(?:n['\u2019]t|\s+not|\s+(?:wrong|incorrect|false))|cannot)\b")  # behind a letter
ONLY = re.compile(r"\W*([a-zA-Z])(?:\W*|\W*\n.*|[.):]\s.*)", re.S)  # an answer of one letter, or that begins with an option's
SECOND = re.compile(
    rf"[)\]*.}}]*\s*(?:\b(?:or|and)\b|[/&])\s*(?i:option\s+|choice\s+)?[(\[*]*{LETTER}(?!\s+(?:is|was|are|has|does|cannot|can|would)\b)"
)
PLAIN = str.maketrans("\u2018\u2019\u201c\u201d\u2212\u2010\u2011", "''\"\"---")
ITEM = r"[A-Za-z]+"
ITEMS = {  # shape -> separator and pattern of an item
    "commas": (", ", ITEM),
    "slashes": (" / ", ITEM),
    "brackets": (" ", rf"\[({ITEM})\]"),
    "dashes": ("\n", rf"- ({ITEM})"),
}
SHAPES = {*ITEMS, "numbered"}
EXTRAS = {"upper", "sorted", "end", "start"}


def verify(truth: dict[str, Any], answer: str, run_code: RunCode | None = None) -> bool:
    """Verify an answer against a truth.

    Args:
        truth: see the module's table.
        answer: text written by a model: compared, never evaluated.
        run_code: (program, tests) -> passed, needed for kind `code`.

    Raises:
        InputError: the truth is of no known kind, lacks a field, has one that makes no sense, or needs a
            sandbox that was not given.
    """
    kind = _field(truth, "kind")
    answer = strip_thinking(answer) if kind == "instructions" else answer_text(answer)
    if kind == "number":
        want = last_number(str(_field(truth, "value")))
        if want is None:
            raise InputError(f"The truth {truth!r} has no number as value: use kind 'exact' for text.")
        boxed = BOXED.findall(answer)
        number = last_number(boxed[-1]) if boxed else None
        return (last_number(answer) if number is None else number) == want and (not truth.get("working") or working_holds(answer))
    if kind == "exact":
        return _normalize(answer) == _normalize(str(_field(truth, "value")))
    if kind == "mention":
        return _mention(answer, str(_field(truth, "value")), truth.get("not", ()))
    if kind == "choice":
        return _choice(answer) == str(_field(truth, "value")).strip().upper()
    if kind == "code":
        if run_code is None:
            raise InputError("A truth of kind 'code' needs the sandbox: run where it is available or pass --unsafe-code.")
        check = check_text(truth)
        return run_code(complete(truth, extract_code(answer, check)), check)
    if kind == "list":
        return _list(truth, answer)
    if kind == "math":
        return is_right(answer, str(_field(truth, "value")))
    if kind == "instructions":
        return all(check_instructions(_field(truth, "checks"), answer, loose=bool(truth.get("loose"))))
    if kind == "schema":
        schema = _field(truth, "schema")
        if why := schema_error(schema):
            raise InputError(f"The truth {truth!r} has a schema that cannot be used: {why}.")
        value = extract_json(answer)
        return value is not None and not validation_error(value, schema)
    raise InputError(f"The truth {truth!r} has an unknown kind: use one of {', '.join(KINDS)}.")


def check_truth(truth: dict[str, Any]) -> None:
    """Check, without running a program, that a truth can tell right from wrong: its own value passes, and an empty answer does not.

    Raises:
        InputError: as `verify`, or any answer passes, or none can.
    """
    if verify(truth, "", lambda program, tests: False):
        raise InputError(f"The truth {_shown(truth)} accepts an empty answer: give a value that can be missed.")
    kind = truth["kind"]
    if kind == "exact" and len(str(truth["value"]).strip().splitlines()) > 1:
        raise InputError(
            f"The exact answer {_shown(truth['value'])} has several lines, which no answer repeats word by word: give the final answer "
            "alone, or another kind of truth."
        )
    if kind == "choice" and not re.fullmatch(r"[A-Za-z]", str(truth["value"]).strip()):
        raise InputError(f"The choice {_shown(truth['value'])} is not one letter: give the letter of the right option.")
    if kind in ("exact", "number", "mention", "choice", "math"):
        value = truth["value"]
        if value is None or isinstance(value, (list, dict, bool)) or (isinstance(value, float) and not math.isfinite(value)):
            raise InputError(f"The truth {_shown(truth)} has the value {_shown(value)}: give one text or number.")
        own = f"\\boxed{{{value}}}" if kind == "math" else f"answer: {str(value).strip().upper()}" if kind == "choice" else str(value)
        if not verify({k: v for k, v in truth.items() if k != "working"}, own):
            raise InputError(
                f"The truth {_shown(truth)} does not accept its own value, so that no answer is right: write the value plainly."
            )
    if kind == "instructions" and not truth["checks"]:
        raise InputError(f"The truth {_shown(truth)} has no checks, so that any answer passes: give at least one.")
    steps = truth.get("steps", ())
    if not isinstance(steps, (list, tuple)) or not all(isinstance(step, str) and EQUATION.fullmatch(step) for step in steps):
        raise InputError(f"The truth {_shown(truth)} has steps that are no list of equations: write each as '3 + 4 = 7'.")
    for check in truth["checks"] if kind == "instructions" else ():
        relation = next((value for key, value in check.items() if key.endswith("relation")), None)
        limit = next((value for key, value in check.items() if key.startswith("num_") or key.endswith("frequency")), 1)
        if relation and isinstance(limit, int | float) and limit <= 0:
            every = "any" if relation == "at least" else "no"
            raise InputError(f"The truth {_shown(truth)} wants {relation} {limit} in {check['id']}, so that {every} answer passes.")
    if kind == "list" and not 0 < truth["n"] <= len({str(w).lower() for w in truth["words"]}):
        raise InputError(f"The truth {_shown(truth)} wants {truth['n']} different words of {len(truth['words'])}: no list has them.")
    if kind == "schema" and not any(validation_error(probe, truth["schema"]) for probe in ({}, [], {"": None}, [0])):
        raise InputError(f"The truth {_shown(truth)} has a schema that any JSON fits: name required properties or a type.")
    reference = truth.get("reference")
    if kind != "code" and reference is not None and not verify(truth, str(reference)):
        raise InputError(f"The truth {_shown({k: v for k, v in truth.items() if k != 'reference'})} rejects its own reference answer "
                         f"{_shown(reference)}: one of the two is wrong.")  # fmt: skip


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def working_holds(answer: str) -> bool:
    """Whether every `a + b = c` (also - and *) of whole numbers in a text is true."""
    results = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    return all(results[op](int(a), int(b)) == int(c) for a, op, b, c in EQUATION.findall(answer))


def last_number(text: str) -> Fraction | None:
    """The last number in a text that is not denied (`not 4`), or None.

    `1,234.50`, `3/4`, `3 1/2` in all their forms, `.5`, `2e3`, `10^3`, `minus 5` and `-$5` are read as numbers.
    """
    text = plain_numbers(text)
    numbers = collections.deque(NUMBER.finditer(text), maxlen=MAX_DENIED)
    found = next((m for m in reversed(numbers) if not is_denied(text, m.start())), None)
    if found is None:
        return None
    whole, digits, exponent, divisor = found.groups()
    try:
        value = Fraction(digits.replace(",", "") + exponent) / int(divisor or 1)
    except (ValueError, ZeroDivisionError):  # thousands of digits, or a division by zero
        return None
    value += int(whole) if whole and value < 1 else 0  # `2 5/2` are two numbers
    return -value if found[0].startswith("-") else value


def plain_numbers(text: str) -> str:
    """A text with its numbers in their plain form."""
    text = spelt_fractions(text.replace("\u2212", "-"))  # the typographic minus
    if not text.isascii():
        text = SUPERSCRIPTS.sub(lambda m: f"^{{{unicodedata.normalize('NFKC', m[0])}}}".replace("\u2212", "-"), text)
    for pattern, replacement in SPELT:
        text = pattern.sub(replacement, text)
    return text


def _choice(answer: str) -> str:
    """The letter that an answer chooses; "" where it chooses none, or several."""
    answer = unicodedata.normalize("NFKC", answer)
    found = [(m, m[m.lastindex or 0]) for m in STATED.finditer(answer)]
    if not found and (only := ONLY.fullmatch(answer)):
        return "" if SECOND.match(answer, only.end(1)) else only[1].upper()
    letters = (m for m in re.finditer(LETTER, answer) if not is_denied(answer, m.start()) and not REJECTED.match(answer, m.end()))
    found = found or [(m, m[1]) for m in letters]
    if not found:
        return ""
    last, letter = found[-1]
    if any((second := SECOND.match(answer, m.end())) and second[1] != m[m.lastindex or 0].upper() for m, _ in found[-2:]):
        return ""
    return letter.upper()


def _field(truth: dict[str, Any], name: str) -> Any:
    if not isinstance(truth, dict) or name not in truth:
        raise InputError(f"The truth {truth!r} lacks the field {name!r}.")
    return truth[name]


def _normalize(text: str) -> str:
    if not text.isascii():
        text = unicodedata.normalize("NFC", text).translate(PLAIN)
    return " ".join(text.lower().split())


def _spans(text: str, value: str) -> list[tuple[int, int]]:
    """Where a folded text has a value as a word."""
    value = _normalize(value)
    return [m.span() for m in re.finditer(rf"(?<!\w){re.escape(value)}(?!\w)", text)] if value in text else []


def _mention(answer: str, value: str, wrong: list[str] | tuple[str, ...]) -> bool:
    if not value.strip():
        raise InputError("A truth of kind 'mention' has an empty value: give the word to look for.")
    text = _normalize(answer)
    right = _spans(text, value)
    bad = [span for w in wrong if w.strip() for span in _spans(text, w)]
    return bool(right) and all(any(a <= start and end <= b for a, b in right) for start, end in bad)


def _list(truth: dict[str, Any], answer: str) -> bool:
    n, words, shape, extras = (_field(truth, name) for name in ("n", "words", "shape", "extras"))
    if shape not in SHAPES or not EXTRAS.issuperset(extras):
        known = f"use the shapes {', '.join(sorted(SHAPES))} and the extras {', '.join(sorted(EXTRAS))}"
        raise InputError(f"The truth {truth!r} has an unknown shape or extra: {known}.")
    text, upper = answer.strip(), "upper" in extras
    if "end" in extras:
        if not text.endswith((" stop", " STOP" if upper else " stop")):
            return False
        text = text[: -len(" stop")].rstrip()
    if "start" in extras:
        if not text.startswith(("here ", "HERE " if upper else "here ")):
            return False
        text = text[len("here ") :]
    items = _items(text, shape)
    if items is None or (upper and any(not i.isupper() for i in items)):
        return False
    lowered = [i.lower() for i in items]
    if len(items) != n or len(set(lowered)) != n or ("sorted" in extras and lowered != sorted(lowered)):
        return False
    return set(lowered) <= {w.lower() for w in words}


def _items(text: str, shape: str) -> list[str] | None:
    """The items of a list in the given shape, or None when the text does not have that shape."""
    if shape == "numbered":
        found = [re.fullmatch(rf"{i}\. ({ITEM})", p) for i, p in enumerate(text.split("\n"), 1)]
    else:
        separator, pattern = ITEMS[shape]
        found = [re.fullmatch(pattern, p) for p in text.split(separator)]
    return [m[m.lastindex or 0] for m in found if m] if all(found) else None
