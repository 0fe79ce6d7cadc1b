"""Main text of an HTML page, with what its layout says by raised and lowered signs and by formulas (MathML, KaTeX, MathJax) written out."""

import re
from dataclasses import dataclass, field
from html import escape, unescape

MAX_HTML = 16 << 20  # characters of a page
MAX_NESTING = 1000  # of a page's elements: the extraction's time grows with the square, 0.02 s at 1,000 and 7 minutes at 100,000
MAX_RAISED = 16  # superscripts, or subscripts, in each other: the text of each is read
MAX_SCRIPT = 400  # characters of a superscript or subscript, elements included

_TAG = re.compile(r"<(/?)([A-Za-z][A-Za-z0-9]*)")
# that hold nothing, or that the next one of their kind closes
_FLAT = re.compile("area|base|br|col|embed|hr|img|input|link|meta|param|source|track|wbr|p|li|dt|dd|td|th|tr|tbody|thead|tfoot|option")
_LAYOUT = re.compile(r"<(?:su[pb]|math|mjx-container)\b|math/tex|katex|MathJax", re.I)
_MARKUP = re.compile(r"<!--.*?(?:-->|\Z)|<(/?)([A-Za-z][^\s/<>]*)", re.S)
_END = re.compile(r"[>\"']")
_CLASS = re.compile(r"\sclass\s*=\s*(?:\"([^\"]*)\"|'([^']*)'|([^\s>\"']+))", re.I)
_TEX = re.compile(r"type\s*=\s*[\"']?math/tex|encoding\s*=\s*[\"']?(?:application/x-)?(?:la)?tex\b", re.I)
_RAW = {"script", "style", "textarea", "title"}  # hold no elements
_IN_LINE = {"a", "b", "i", "em", "strong", "span", "sup", "sub", "u", "small", "font", "var", "code", "abbr", "mark"}
_AFTER = re.compile(r"(?:</?(?:a|b|i|em|strong|span|u|small|font|var|code)\b[^<>]{0,200}>){0,4}([^<]?)(<sub\b)?", re.I)
# What stands around a formula and all the ways in which it is shown.
_FORMULA = {"katex", "mwe-math-element", "mjx-chtml", "MathJax_Preview"}
_ORDINAL = re.compile(r"(?i)(?:st|nd|rd|th|er?|re|[e\xe8]me|[ao\xaa\xba]|tm|sm|[\u2122\xae])\Z")
_PLAIN = re.compile(r"[+\-\u2212]?\w+\Z")
_BRACKETS = tuple(")]}|!'\u2032")  # what may stand before what is raised, beside letters and digits
_INVISIBLE = dict.fromkeys((0x2061, 0x2062, 0x2063, 0x2064))  # signs between factors that are not shown
_NOTE = tuple("[]()*\u2020\u2021\xa7")
# Texts of elements that the extraction may take for a bullet: a character between tags, or one behind another.
_SHORT = re.compile(r">(\s*(?:[^\s<>&]|&#?\w{2,31};){1,2})(?=\s*<)")
_BULLETS = frozenset("\u2022\u2023\u2043\u2219\u25aa\u25ab\u25cb\u25cf\u25e6\u203a\u2039")
_INVISIBLE_SIGNS = "\u2060\u2061\u2062\u2063"  # one that the page has not makes such a text longer


class PageError(ValueError):
    """A page is too large or too deep to be read; the message says which."""


def main_text(page: str) -> str:
    """The main text of an HTML page.

    Raised and lowered signs are written as in TeX, 10^8 and x_1, and each formula once: its TeX source, or else its MathML in a line.

    Raises:
        PageError: it is too large, or its elements lie too deep in each other.
    """
    if len(page) > MAX_HTML:
        raise PageError(f"a page of {len(page):,} characters")
    deep, still_open = 0, dict[str, int]()
    for closes, tag in _TAG.findall(page):
        tag = tag.lower()
        if _FLAT.fullmatch(tag):
            continue
        if not closes:
            still_open[tag] = still_open.get(tag, 0) + 1
            deep += 1
            if deep > MAX_NESTING or still_open[tag] > MAX_RAISED and tag in ("sup", "sub"):
                raise PageError(f"a page of elements in each other more than {MAX_NESTING if deep > MAX_NESTING else MAX_RAISED} deep")
        elif still_open.get(tag, 0):
            still_open[tag] -= 1
            deep -= 1
    from resiliparse.extract.html2text import extract_plain_text

    page = _written_out(page) if _LAYOUT.search(page) else page
    sign = next((sign for sign in _INVISIBLE_SIGNS if sign not in page), "")
    page = _SHORT.sub(lambda found: found[0] + sign if _is_dropped(unescape(found[1]).strip()) else found[0], page)
    text = str(extract_plain_text(page, main_content=True))
    return text.replace(sign, "") if sign else text


def _is_dropped(text: str) -> bool:
    """Whether the extraction drops the text of an element though it is no bullet: three bytes, the last of them none of ASCII."""
    return len(text.encode(errors="replace")) == 3 and text[-1] > "\x7f" and text not in _BULLETS


@dataclass
class _Element:
    """An element that will be written otherwise, while it is open."""

    name: str
    kind: str
    opening: str  # its tag
    before: str = ""  # the character that it stands behind
    depth: int = 1  # of elements of this name
    parts: list[str] = field(default_factory=list)
    formula: str = ""  # the first in it


def _written_out(page: str) -> str:
    """A page whose formulas, superscripts and subscripts are text."""
    has_sources = "math/tex" in page  # beside what MathJax shows
    whole = _Element("", "", "")
    stack, at, last, unclosed = [whole], 0, "", set[str]()
    while found := _MARKUP.search(page, at):
        text = page[at : found.start()]
        stack[-1].parts.append(text)
        last = unescape(text[-12:])[-1:] or last
        closes, name = found[1], (found[2] or "").lower()
        if not name:
            at = found.end()
            continue
        at = _tag_end(page, found.end(), unclosed)
        tag, top = page[found.start() : at], stack[-1]
        if name in _RAW and not closes:
            end = _find_end(page, name, at)
            content, at = page[at:end], end
            if name == "script" and _TEX.search(tag):
                top.parts.append(_formula(stack, content, ""))
            else:
                top.parts += [tag, content]
            continue
        if closes and name == top.name:
            top.depth -= 1
            if top.depth == 0:
                stack.pop()
                stack[-1].parts.append(_closed(stack, top, page, at, tag, has_sources))
                last = "}" if top.kind in ("sup", "sub") else " "
                continue
        elif not closes and (kind := _kind(name, tag)) and top.kind != "math":
            stack.append(_Element(name, kind, tag, last))
            continue
        elif not closes and name == top.name:
            top.depth += 1
        if name not in _IN_LINE:
            last = ""
        top.parts.append(tag)
    stack[-1].parts.append(page[at:])
    while len(stack) > 1:  # never closed: as they are
        open_ = stack.pop()
        stack[-1].parts += [open_.opening, *open_.parts]
    return "".join(whole.parts)


def _tag_end(page: str, at: int, unclosed: set[str]) -> int:
    """Where a tag ends. Args: `unclosed`, the quotes that have no other behind some place; so that each is looked for once in vain."""
    begin = at
    while found := _END.search(page, at):
        at = found.end()
        if found[0] == ">":
            return at
        if found[0] not in unclosed:
            end = page.find(found[0], at)
            if end < 0:
                unclosed.add(found[0])
                at = begin
            else:
                at = end + 1
    return len(page)


def _find_end(page: str, name: str, at: int) -> int:
    found = re.compile(f"</{name}", re.I).search(page, at)
    return found.start() if found else len(page)


def _kind(name: str, tag: str) -> str:
    """How an element is written otherwise, or ""."""
    if name in ("sup", "sub", "math"):
        return name
    if name == "mjx-container":
        return "mathjax"
    if name in ("span", "div") and (found := _CLASS.search(tag)):
        names = (found[1] or found[2] or found[3] or "").split()
        if any(one.startswith(("MathJax", "mjx-chtml")) for one in names):
            return "mathjax"
        return "formula" if not _FORMULA.isdisjoint(names) else ""
    return ""


def _formula(stack: list[_Element], source: str, shown: str) -> str:
    """A formula's source as text, or what is shown of it, at its place in the page; the elements around it are told."""
    source = " ".join(source.split())
    if source:
        for element in stack:
            element.formula = element.formula or source
    return f" {escape(source, quote=False)} " if source else shown


def _closed(stack: list[_Element], element: _Element, page: str, at: int, tag: str, has_sources: bool) -> str:
    """What an element becomes that ends at a place of the page."""
    inner = "".join(element.parts)
    as_it_is = element.opening + inner + tag
    if element.kind == "math":
        tree = _tree(inner)
        return _formula(stack, _tex(tree) or _linear(tree, 0), as_it_is)
    if element.kind == "mathjax" and has_sources:
        return ""
    if element.kind in ("mathjax", "formula"):
        return f" {escape(element.formula, quote=False)} " if element.formula else as_it_is
    text = unescape(re.sub(r"<[^>]*>", "", inner)).strip() if len(inner) <= MAX_SCRIPT else ""
    if not text or not (element.before.isalnum() or element.before in _BRACKETS):
        return as_it_is
    raised = element.kind == "sup"
    if (raised and _ORDINAL.match(text)) or (text[0] in _NOTE and text[-1] in _NOTE):
        return as_it_is
    after = _AFTER.match(page, at)
    following = after[1] if after else ""
    if raised and after and after[2] and following in ("/", "\u2044"):  # 1 1/2
        return f" {as_it_is}"
    plain = _PLAIN.match(text) and not (text[-1].isalnum() and following.isdigit())
    opening, closing = ("^" if raised else "_"), ""
    if not plain:
        opening, closing = opening + "{", "}"
    return f"{opening}{element.opening}{inner.strip()}{tag}{closing}"


# ---- MathML ----


@dataclass
class _Node:
    """An element of a formula."""

    tag: str
    attributes: str = ""
    text: str = ""
    children: list["_Node"] = field(default_factory=list)


def _tree(inner: str) -> _Node:
    """The elements of a formula, by their tags."""
    root = _Node("math")
    stack, at, unclosed = [root], 0, set[str]()
    while found := _MARKUP.search(inner, at):
        stack[-1].text += unescape(inner[at : found.start()])
        at, name = found.end(), (found[2] or "").lower().split(":")[-1]
        if not name:
            continue
        begin, at = at, _tag_end(inner, at, unclosed)
        if found[1]:
            names = [node.tag for node in stack[1:]]
            if name in names:
                del stack[len(names) - names[::-1].index(name) :]
        else:
            node = _Node(name, inner[begin:at])
            stack[-1].children.append(node)
            if not inner.endswith("/>", 0, at) and len(stack) < MAX_NESTING:
                stack.append(node)
    stack[-1].text += unescape(inner[at:])
    return root


def _tex(node: _Node) -> str:
    """The TeX source that a formula is annotated with."""
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if one.tag == "annotation" and _TEX.search(one.attributes):
            return one.text
        waiting += one.children
    return ""


def _linear(node: _Node, depth: int) -> str:
    """Presentation MathML in one line."""
    if node.tag in ("annotation", "annotation-xml", "mphantom", "mspace") or depth > 100:
        return ""
    parts = [_linear(child, depth + 1) for child in node.children]
    first, second, third = (*parts, "", "", "")[:3]
    match node.tag:
        case "mn" | "mi" | "mo" | "mtext" | "ms":
            return node.text.strip().translate(_INVISIBLE)
        case "msup" | "mover":
            return f"{_grouped(first)}^{_braced(second)}"
        case "msub" | "munder":
            return f"{_grouped(first)}_{_braced(second)}"
        case "msubsup" | "munderover":
            return f"{_grouped(first)}_{_braced(second)}^{_braced(third)}"
        case "mfrac":
            return f"{_grouped(first)}/{_grouped(second)}"
        case "mfenced":
            return f"({', '.join(parts)})"
        case "mmultiscripts":
            at = next((n for n, child in enumerate(node.children) if child.tag == "mprescripts"), len(parts))
            return _scripts(parts[at + 1 :]) + first + _scripts(parts[1:at])
        case "msqrt":
            return f"sqrt({''.join(parts)})"
        case "mroot":
            return f"root({first}, {second})"
        case "mtr" | "mlabeledtr":
            return ", ".join(parts)
        case "mtable":
            return "; ".join(parts)
        case "semantics":
            return first
    line = "" if parts else node.text.strip()
    for part in parts:  # two numbers or names side by side stay two
        line += " " + part if line[-1:].isalnum() and part[:1].isalnum() else part
    return line


def _scripts(parts: list[str]) -> str:
    pairs = zip("_^" * len(parts), parts, strict=False)
    return "".join(sign + _braced(part) for sign, part in pairs if part)


def _grouped(part: str) -> str:
    return part if len(part) == 1 or re.fullmatch(r"\w*|\(.*\)", part) else f"({part})"


def _braced(part: str) -> str:
    return part if re.fullmatch(r"\w*", part) else f"{{{part}}}"
