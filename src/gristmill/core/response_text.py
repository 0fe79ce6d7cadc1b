"""Response text of models: thinking taken away, fenced code blocks, and the program among them.

Models wrap things round an answer: `<think>...</think>` (or only its end, where the prompt held its beginning), tags, fences. Every part
that reads an answer reads it through this module, so that the same text means the same to all of them.
"""

import html
import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_NAMES = (
    r"(?:[a-z]{1,12}:|(?:longcat|internal|inner|hidden)_)?(?:think(?:ing)?|thoughts?|reasoning)(?:_(?:process|steps|content))?"
    r"|antthinking|reflection|scratchpad|inner_monologue|analysis"
)
_OPENING = (
    rf"<\|?(?:{_NAMES})\|?(?:\s[^<>\n]{{0,100}}(?<!/))?>|<\|begin_of_thought\|>|<\|start_thinking\|>|(?-i:\[THINK\])|\u25c1think\u25b7"
    r"|<unused94>|<\|channel>\s{0,9}(?:thought|analysis)\b"
)
_CLOSING = (
    rf"<\|?\s?\\?/\s?(?:{_NAMES})\s*\|?>|<channel\|>|<\|end_of_thought\|>|<\|end_thinking\|>|(?-i:\[/THINK\])|\u25c1/think\u25b7|<unused95>"
)
# Channels: what follows the last one, `final`, is the answer.
_CHANNEL = r"(?:<\|start\|>(?:assistant)?)?<\|channel\|>\s*(?:analysis|commentary)[^<\n]{0,100}(?:<\|message\|>)?"
_FINAL = r"(?:<\|start\|>(?:assistant)?)?<\|channel\|>\s*final[^<\n]{0,100}<\|message\|>|(?-i:assistantfinal)"  # also without its tokens
# Thinking that a tag of its own says; and Open WebUI's, whose end might belong to anything else.
EMPTY = re.compile(rf"<(?:{_NAMES})\s*/>|<details\s[^<>\n]{{0,200}}type=\"reasoning\"[^<>\n]{{0,200}}>.*?(?:</details>|\Z)", re.I | re.S)
THINKING = re.compile(rf"(?P<close>{_CLOSING}|{_FINAL})|(?P<open>{_OPENING}|{_CHANNEL})", re.I)
OPENING, CLOSING = re.compile(rf"\s{{0,200}}(?:{_OPENING})", re.I), re.compile(_CLOSING, re.I)
# What may yet become such a tag, at the end of a text that is still written.
_BEGUN_TAG = re.compile(r"(?:<[|/\\\w:]{0,24}(?:\s[^<>\n]{0,100})?|<\|channel>\s{0,9}\w{0,10}|\[/?[A-Z]{0,5}|\u25c1/?\w{0,5})\Z")
ANSWER_TAG = re.compile(
    r"<(/?)(?:final_?)?(?:answer|solution|response)>|<\|(?:begin|(end))_of_(?:solution|box)\|>|<\|(?:start|(end))_response\|>"
    r"|\[(?:begin|(end)) final response\]",
    re.I,
)
# Control tokens that a model has spelt: what begins a text, and what ends a turn. What it makes up after that is no part of its answer.
_BEGINNING = re.compile(
    r"(?:\s*(?:<\|(?:begin_of_text|startoftext|python_tag)\|>|<\|im_start\|>assistant\n|<s>|<bos>|<\uff5cbegin\u2581of\u2581sentence\uff5c>))+"
)
_END_OF_TURN = re.compile(
    r"<\|(?:im_end|eot_id|eom_id|end|endoftext|end_of_text|end_of_turn|return|call)\|>|<end_of_turn>|<eos>|</s>"
    r"|<\uff5cend\u2581of\u2581sentence\uff5c>"
)
QUOTES = "\"'`"
SPACE = r"[ \t\u00a0\u3000\ufeff\u200b]"  # blanks about a fence, seen or not

FENCE = re.compile(
    rf"(?P<quote>(?:[ \t]{{0,3}}>)*)(?P<indent>{SPACE}*(?:(?:[-*+]|\d{{1,3}}[.)])[ \t]+)?)(?P<fence>`{{3,}}|~{{3,}})(?P<info>[^\r\n]*)"
)
CODE_TAG = re.compile(
    r"<(?P<tag>code|python)(?:\s[^<>]{0,200})?>(?P<html>.*?)(?:</(?P=tag)>|\Z)"
    r"|\[(?:PYTHON|BEGIN)\](?P<plain>.*?)(?:\[/PYTHON\]|\[DONE\]|\Z)"
    r"|\\begin\{(?P<tex>lstlisting|verbatim|minted)\}(?:\[[^\]\n]*\]|\{\w*\})*(?P<listing>.*?)(?:\\end\{(?P=tex)\}|\Z)"
    r"|^'''(?:python|py)\n(?P<quoted>.*?)(?:^'''|\Z)",
    re.S | re.M,
)
CODE_SPAN = re.compile(r"(`{1,3})((?:async def|def|class)\b[^`\n]*)\1")
# The first line of a program, behind the fence.
FIRST_LINE = re.compile(r"\s*(?:i?py(?:thon)?[\d.]*[ \t]+)?((?:(?:async[ \t]+def|def|class|import|from)[ \t]+\w|@\w).*)")
FUNCTION = re.compile(r"^(?:async[ \t]+)?(?:def|class)\b", re.M)
MARKDOWN = ("markdown", "md")
# Before a line of code, where Python has spaces.
BLANKS = re.compile(r"^[ \t]*[\u00a0\u2007\u202f\u3000\u200b\ufeff][ \t\u00a0\u2007\u202f\u3000\u200b\ufeff]*", re.M)
PLAIN_BLANKS = str.maketrans("\u00a0\u2007\u202f\u3000", "    ", "\u200b\ufeff")
LATE_FENCE = re.compile(r"(?:^|[ \t:])(?P<fence>`{3,})(?P<info>[\w+#.-]{1,20})[ \t\r]*$")  # `Here it is: ```python`
LANGUAGE = re.compile(r"[{. \t]*([\w+#.-]*)")
PYTHON = re.compile(r"i?py(?:thon)?[\d.]*")
# Blocks that are no program whatever is in them: commands, output, data.
NO_PROGRAM = re.compile(
    r"bash|z?sh|(?:power)?shell|fish|console|shell-?session|terminal|ps1|cmd|bat(?:ch)?|dos|te?xt|plain(?:text)?|out(?:put)?|std(?:out|err)|logs?|"
    r"pycon|python-repl|jsonl?|ya?ml|toml|ini|csv|xml|html|css|markdown|md|diff|patch|mermaid|(?:la)?tex|math|error|traceback|results?|input"
)
TOKEN = re.compile(r"#[^\n]*|'''|\"\"\"|'(?:\\.|[^'\\\n])*'?|\"(?:\\.|[^\"\\\n])*\"?")  # of Python: comments and strings
STRING_END = {quotes: re.compile(rf"(?:\\.|(?!{quotes})[^\\])*+{quotes}", re.S) for quotes in ("'''", '"""')}
DEFINED = re.compile(
    r"^(?:async[ \t]+)?def[ \t]+(\w+)|^class[ \t]+(\w+)|^([^\W\d]\w*)[ \t]*(?::[^=\n]+)?=(?!=)"
    r"|^(?:from\b[^\n]*?\bimport\b[ \t]*(?:\([^)]{0,2000}\)|[^\n]*)|import\b[^\n]*)",
    re.M,
)
BOUND = re.compile(
    r"\bdef[ \t]+\w+[ \t]*\(([^)]{0,1000})\)|\blambda\b([^:\n]{0,200}):|\bfor\b([^\n]{0,200}?)\bin\b|\bas[ \t]+(\w+)"
    r"|^[ \t]++([\w, \t]{1,200})=(?!=)|(\w{1,100})[ \t]*:=",
    re.M,
)
CODE_LINE = re.compile(
    r"(?:async def|def|class|if|for|while|try|with)\b[^\n]*:|import \w|from [\w.]+ import\b|@\w|#|'''|\"\"\""
    r"|[^\W\d][\w.]*(?:\[[^\n]*\])?\s*[-+*/]?=[^=]"
)
PROSE = re.compile(r"(?:[*>-]|[A-Z][\w']*[ ,:])[^\n=]*$")


@dataclass(frozen=True)
class CodeBlock:
    """Fenced code block of a text.

    Attributes:
        language: in lower case, "" where none is named.
        code: its lines, without the fence's own indentation.
        start, end: the span in the text, with both fences.
        lines: numbers of the text's lines that it takes.
    """

    language: str
    code: str
    start: int
    end: int
    lines: range


def strip_thinking(text: str) -> str:
    """Strip the thinking of a response: what is left is what is said.

    Thinking that never ends leaves nothing behind it; an end without a beginning takes away all before it. Tags that are quoted, or stand
    in pairs within a code block, are text.
    """
    text = EMPTY.sub("", text)
    tags = list(THINKING.finditer(text)) if any(sign in text for sign in ("<", "[", "\u25c1", "assistantfinal")) else []
    if not tags:
        return text
    quoted = _in_pairs(code_blocks(text), tags, [m["open"] is not None for m in tags])
    said: list[str] = []
    at, thinking = 0, False
    for m in tags:
        if m.start() in quoted or _is_quoted(text, m):
            continue
        if m["open"] is not None:
            if not thinking:
                said.append(text[at : m.start()])
            thinking = True
        else:
            if not thinking:  # begun before the response
                said.clear()
            thinking = False
        at = m.end()
    if not at:
        return text
    said.append("" if thinking else re.sub(r"^(?:[ \t]*\r?\n)+", "", text[at:]))
    return "".join(said)


# Whether a response begins in the midst of thinking, by the names of vLLM's reasoning parsers; None: where it begins with a tag.
REASONING_PARSERS: dict[str, bool | None] = {"think": None, "deepseek_r1": True, "qwen3": True}


def has_open_thinking(text: str, *, at_end: bool = False) -> bool | None:
    """Whether a text stops in the midst of thinking; None where it has none, or, with `at_end`, does not end with a tag of it."""
    tags = [m for m in THINKING.finditer(text) if not _is_quoted(text, m)]
    if not tags or (at_end and text[tags[-1].end() :].strip()):
        return None
    return tags[-1]["open"] is not None


class ReasoningParser:
    """Reasoning parser: parts a response, as it arrives, into the thinking that it begins with and its content, both verbatim.

    A response whose thinking never ends has no content. What follows the end is content, whatever tags are in it.

    Args:
        begun: whether the response begins in the midst of thinking; None: where it begins with a tag.
    """

    def __init__(self, begun: bool | None) -> None:
        self.thinking = begun
        self._text = ""  # what is not told yet, behind a little of what is
        self._told = 0
        self._opened = False

    def add(self, text: str, *, last: bool = False) -> tuple[str, str]:
        """Thinking and content that can be told now; with the `last` piece, all that is left."""
        self._text += text
        if self.thinking is not False and not self._opened:
            m = OPENING.match(self._text)
            before = self._text[: begun.start()] if (begun := _BEGUN_TAG.search(self._text)) else self._text
            if m is None and not last and len(before) <= 200 and not before.strip():
                return "", ""  # it may be one yet
            self._opened, self._told, self.thinking = True, m.end() if m else 0, m is not None or bool(self.thinking)
        thought = self._think(last) if self.thinking else ""
        said = ""
        if self.thinking is False:
            said, self._text, self._told = self._text[self._told :], "", 0
        return thought, said

    def _think(self, last: bool) -> str:
        text, start = self._text, self._told
        for m in CLOSING.finditer(text, start):
            if m.end() == len(text) and not last:  # a quotation mark may follow
                self._told = m.start()
                return text[start : m.start()]
            if not _is_quoted(text, m):
                self._told, self.thinking = m.end(), False
                return text[start : m.start()]
        begun = None if last else _BEGUN_TAG.search(text, start)
        end = begun.start() if begun else len(text)
        kept = max(0, end - 300)  # what tells whether a tag is quoted
        self._text, self._told = text[kept:], end - kept
        return text[start:end]


def answer_text(text: str) -> str:
    """The answer of a response: its own turn without thinking, and what is between the last answer tags where there are some."""
    text = _own_turn(strip_thinking(text))
    start, end = 0, len(text)
    tags = list(ANSWER_TAG.finditer(text))
    ends = [any(m.groups()) for m in tags]
    programs = [b for b in code_blocks(text) if b.language and not NO_PROGRAM.fullmatch(b.language)] if tags else []
    quoted = _in_pairs(programs, tags, ends)
    for m, is_end in zip(tags, ends, strict=True):
        if m.start() in quoted or _is_quoted(text, m):
            continue
        if is_end:
            end = m.start() if m.start() > start else end
        else:
            start, end = m.end(), len(text)
    return text[start:end] if start else text


def _own_turn(text: str) -> str:
    """A text up to the control token that ends its turn. Tokens that are quoted, or in a code block, are text."""
    if "<" not in text:
        return text
    if beginning := _BEGINNING.match(text):
        text = text[beginning.end() :]
    tokens = [m for m in _END_OF_TURN.finditer(text) if not _is_quoted(text, m) and not (m[0] == "</s>" and "<s>" in text)]
    blocks = code_blocks(text) if tokens else []
    starts = [block.start for block in blocks]
    for m in tokens:
        end = blocks[bisect_left(starts, m.start()) - 1].end if starts and starts[0] < m.start() else 0
        if "```" not in text[m.end() : end] and not text[: m.start()].isspace():
            return text[: m.start()]
    return text


def repetition(text: str, order: int = 4) -> float:
    """Share of a text's n-grams of words that repeat an earlier one; 0 for a text of fewer words. A model that loops has most of them."""
    words = text.lower().split()
    grams = list(zip(*(words[i:] for i in range(order)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _in_pairs(blocks: Sequence[CodeBlock], tags: Sequence[re.Match[str]], first: Sequence[bool]) -> set[int]:
    """Places of the tags in code blocks that hold as many of the first kind as of the other: they are text."""
    starts = [m.start() for m in tags]
    found: set[int] = set()
    for block in blocks:
        inside = range(bisect_left(starts, block.start), bisect_left(starts, block.end))
        if 2 * sum(first[n] for n in inside) == len(inside):
            found.update(starts[n] for n in inside)
    return found


def _is_quoted(text: str, m: re.Match[str]) -> bool:
    before, after = text[m.start() - 1 : m.start()], text[m.end() : m.end() + 1]
    line = text[max(0, m.start() - 200) : m.start()].rpartition("\n")[2]
    return (before == after and before != "" and before in QUOTES) or (line.count("`") % 2 == 1 and "```" not in line)


# ---- fences ----


def code_blocks(text: str) -> list[CodeBlock]:
    """The fenced code blocks of a text, in order. The last may be unclosed.

    Fences may be indented, stand in a list or a quotation, or be of tildes. One within a triple-quoted string of a program is a part of
    the program; one with a language ends a block that was left open.
    """
    if "```" not in text and "~~~" not in text:
        return []
    lines = text.split("\n")
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    found = []
    at = 0
    while at < len(lines):
        line = lines[at]
        opening = FENCE.match(line) or LATE_FENCE.search(line)
        if opening is None or (opening["fence"][0] == "`" and "`" in opening["info"]):
            at += 1
            continue
        groups = opening.groupdict()
        quote, indent = (groups.get("quote") or "").count(">"), len(groups.get("indent") or "")
        info = LANGUAGE.match(opening["info"])
        language = info[1].lower().rstrip(".") if info else ""
        body, following, tail = _body(lines, at + 1, opening["fence"], language=language, quote=quote, indent=indent)
        first = next((entry for entry in body if entry.strip()), "")
        width = min(indent, len(first) - len(first.lstrip(" \t")))
        if begun := FIRST_LINE.fullmatch(opening["info"]):
            language, body = "", [begun[1], *body]
        code = "\n".join(re.sub(rf"^[ \t]{{0,{width}}}", "", entry) if width else entry for entry in body)
        if body and tail is None and following <= len(lines) and (following < len(lines) or _is_fence(lines[-1], opening["fence"][0])):
            code += "\n"
        found.append(CodeBlock(language, code, starts[at] + opening.start(), min(starts[following], len(text)), range(at, following)))
        at = following
    return found


def _is_fence(line: str, mark: str) -> bool:
    m = FENCE.match(line)
    return m is not None and m["fence"][0] == mark


def _body(lines: Sequence[str], at: int, fence: str, *, language: str, quote: int, indent: int) -> tuple[list[str], int, str | None]:
    """Lines of the block that begins at a line, the line after it, and the code before a closing fence at the end of a line of code."""
    body: list[str] = []
    is_python = not language or PYTHON.fullmatch(language) is not None
    nests = language in MARKDOWN
    depth, string, first = 0, "", 0  # string: the quotes that are open; first: where a fence within a string was
    for number in range(at, len(lines)):
        line = lines[number]
        if quote:
            line = re.sub(rf"^(?:[ \t]{{0,3}}>){{1,{quote}}} ?", "", line)
        m = FENCE.match(line)
        if m and not m["quote"] and m["indent"].strip() == "" and m["fence"][0] == fence[0] and len(m["fence"]) >= len(fence):
            info = m["info"].strip()
            is_opening = re.fullmatch(r"[\w+#.{}-]*[\w+#}]( [^`]*)?", info) is not None and (
                " " not in info or _is_language(info.split()[0])
            )
            if string:
                first = first or number + 1
            elif nests and is_opening:
                depth += 1
            elif depth and not info:
                depth -= 1
            elif is_opening:
                return body, number, None
            elif info or is_python or len(m["indent"]) <= indent + 3:
                return body, number + 1, None
        if is_python:
            string = _open_string(line, string)
        stripped = line.rstrip()
        if not string and not m and not nests and stripped.endswith(fence) and not stripped.endswith("`" * (len(fence) + 1)):
            return [*body, stripped[: -len(fence)]], number + 1, stripped
        body.append(line)
    if string and first:  # the string never ends, so it was none
        return body[: first - 1 - at], first, None
    return body, len(lines), None


def _is_language(word: str) -> bool:
    return (NO_PROGRAM.fullmatch(word) or PYTHON.fullmatch(word)) is not None


def _open_string(line: str, quotes: str) -> str:
    """The triple quotes that are open after a line of Python, "" for none."""
    at = 0
    while True:
        if quotes:
            m = STRING_END[quotes].match(line, at)
            if m is None:
                return quotes
            at, quotes = m.end(), ""
        m = next((m for m in TOKEN.finditer(line, at) if m[0] in ("'''", '"""')), None)
        if m is None:
            return ""
        at, quotes = m.end(), m[0]


# ---- programs ----


def extract_code(text: str, tests: str = "") -> str:
    """Extract the program of an answer: of its code blocks the one that holds the program, else the whole answer.

    Python comes before other languages; commands, output and data are no program. The last block that defines a name which the tests use
    is taken, else the last that defines something, with the other blocks whose definitions it needs.
    """
    return BLANKS.sub(lambda m: m[0].translate(PLAIN_BLANKS), _program(answer_text(text), tests))


def _program(text: str, tests: str) -> str:
    blocks = code_blocks(text)
    if not blocks or _is_bare_program(text, blocks[0]):
        return _unfenced(text)
    wanted = _words(tests) - _defined(tests)
    programs = [b for b in blocks if _is_program(b)]
    rest = "".join(text[a.end if a else 0 : b.start if b else len(text)] for a, b in zip([None, *blocks], [*blocks, None], strict=True))
    inside = set[str]().union(*(_defined(b.code) for b in programs))
    # a program that began without a fence and ends with one, or stands beside its example
    if FUNCTION.search(rest) and not wanted & inside and (wanted & _defined(rest) or not any(FUNCTION.search(b.code) for b in programs)):
        return _bare_program(rest)
    labelled = [b for b in programs if PYTHON.fullmatch(b.language)]
    if labelled and any(_defined(b.code) for b in labelled):
        programs = labelled
    elif programs:
        programs = [b for b in programs if not b.language or PYTHON.fullmatch(b.language)] or programs
    elif nested := next((b.code for b in reversed(blocks) if b.language in MARKDOWN and any(map(_is_program, code_blocks(b.code)))), ""):
        return _program(nested, tests)
    elif _defined(rest):
        return _bare_program(rest)
    else:
        return next((b.code for b in reversed(blocks) if _defined(b.code)), _json_program(blocks[-1].code) or blocks[-1].code)
    return _with_needed([b.code for b in programs], wanted)


def _is_program(block: CodeBlock) -> bool:
    return not NO_PROGRAM.fullmatch(block.language) and not block.code.lstrip().startswith(">>>")


def _unfenced(text: str) -> str:
    """The program of a text without fences: in tags, in JSON, in a code span, or as it stands."""
    tagged = list(CODE_TAG.finditer(text))
    if CODE_LINE.match(text.lstrip()) and not (tagged and tagged[-1]["quoted"]):
        return _bare_program(text)
    if tagged:
        m = tagged[-1]
        code = next(code for code in m.group("html", "plain", "listing", "quoted") if code is not None)
        return _bare_program(html.unescape(code) if m["tag"] == "code" else code)
    if code := _json_program(text):
        return code
    spans = [] if FUNCTION.search(text) else CODE_SPAN.findall(text)
    return _bare_program(spans[-1][1] if spans else text)


def _json_program(text: str) -> str:
    """The program that is a value of a JSON object; "" where there is none."""
    try:
        found = json.loads(text) if text.lstrip().startswith("{") else {}
    except (ValueError, RecursionError):
        return ""
    return next((value for value in found.values() if isinstance(value, str) and FUNCTION.search(value)), "")


def _with_needed(programs: Sequence[str], tested: set[str]) -> str:
    made = [_defined(code, imports=False) for code in programs]
    defined = [names | (_defined(code) - set().union(*made)) for names, code in zip(made, programs, strict=True)]
    wanted = tested & set().union(*defined)
    order = range(len(programs) - 1, -1, -1)
    functions = [n for n in order if FUNCTION.search(programs[n])]
    base = next((n for n in order if wanted & defined[n]), next(iter(functions), next((n for n in order if defined[n]), order[0])))
    chosen = {base}
    needed = ((_words(programs[base]) - _bound(programs[base])) | wanted) - defined[base]
    for n in order:
        # a block that uses what the program defines is an example of its use, unless the tests ask for it
        if n != base and needed & defined[n] and (wanted & needed & defined[n] or not _words(programs[n]) & defined[base]):
            chosen.add(n)
            needed = (needed | (_words(programs[n]) - _bound(programs[n]))) - defined[n]
    return programs[base] if len(chosen) == 1 else "\n".join(programs[n].rstrip("\n") + "\n" for n in sorted(chosen))


def _defined(code: str, *, imports: bool = True) -> set[str]:
    """Names that a program defines at its top level, or imports there."""
    names: set[str] = set()
    for m in DEFINED.finditer(_without_strings(code)):
        names.update([m[m.lastindex]] if m.lastindex else re.findall(r"\w+", m[0]) if imports else ())
    return names - {"from", "import", "as"}


def _bound(code: str) -> set[str]:
    """Names of a program's parameters and local variables."""
    return {name for m in BOUND.finditer(_without_strings(code)) for group in m.groups() if group for name in re.findall(r"\w+", group)}


def _words(code: str) -> set[str]:
    return set(re.findall(r"[^\W\d]\w*", _without_strings(code)))


def _without_strings(code: str) -> str:
    return "\n".join(_code_lines(code))


def _code_lines(code: str) -> Iterator[str]:
    quotes = ""
    for line in code.split("\n"):
        opened, quotes = quotes, _open_string(line, quotes)
        yield "" if opened else TOKEN.sub("''", line)


def _is_bare_program(text: str, block: CodeBlock) -> bool:
    """Whether a text is a program as it is, and its first fence stands in one of its strings."""
    before = text[: block.start]
    if not CODE_LINE.match(before.lstrip()):
        return False
    quotes = ""
    for line in before.split("\n"):
        quotes = _open_string(line, quotes)
    return bool(quotes)


def _bare_program(text: str) -> str:
    """A program without a fence: from its first definition on where words stand before it, up to the words after it."""
    first = text.lstrip()
    start = re.search(r"^(?:async def|def|class|import|from|@\w+)\b", text, re.M)
    if not first or text[: len(text) - len(first)].rpartition("\n")[2] or not (start or CODE_LINE.match(first)):
        return text
    lines = text[0 if start is None or CODE_LINE.match(first) else start.start() :].split("\n")
    quotes = ""
    for number, line in enumerate(lines):
        if number and not quotes and not lines[number - 1].strip() and PROSE.match(line) and not CODE_LINE.match(line):
            return "\n".join(lines[:number])
        quotes = _open_string(line, quotes)
    return "\n".join(lines)
