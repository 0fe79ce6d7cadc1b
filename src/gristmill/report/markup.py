"""HTML builder that is safe by construction: `el` escapes every piece of text, and only what `el` made goes into a page unchanged.

A model's text may try anything: tags, attribute breaks, control characters, text that reads backwards. It arrives here as `str`.
"""

import html
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from gristmill.report.style import STYLE

VOID = frozenset({"meta", "br"})
# Scripts whose letters join (Persian, Hindi) and families of emoji need these two invisible characters.
JOINERS = "\u200c\u200d"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


class Markup(str):
    """Finished HTML."""


Child = str | int | float | None | Iterable[Any]


def visible(text: str) -> str:
    """Sanitized text: control characters, direction overrides and other invisible characters written out as their code points."""
    return "".join(
        c if c in "\n\t" or c in JOINERS or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") else f"\u2039U+{ord(c):04X}\u203a"
        for c in text.replace("\r\n", "\n")
    )


def el(name: str, /, *children: Child, **attributes: str | int | float | None) -> Markup:
    """An element of HTML or SVG.

    Args:
        name: of the element.
        children: text (escaped), numbers, `Markup`, or iterables of these; None is left out.
        attributes: `class_` is `class`; other underscores become hyphens. None leaves an attribute out.
    """
    pairs = [(k.rstrip("_").replace("_", "-"), v) for k, v in attributes.items() if v is not None]
    opening = "".join(f' {k}="{html.escape(visible(str(v)), quote=True)}"' for k, v in pairs)
    if name in VOID:
        return Markup(f"<{name}{opening}>")
    return Markup(f"<{name}{opening}>{join(children)}</{name}>")


def join(children: Child) -> Markup:
    """Children concatenated, text escaped."""
    if children is None:
        return Markup("")
    if isinstance(children, Markup):
        return children
    if isinstance(children, str | int | float):
        return Markup(html.escape(visible(str(children)), quote=True))
    return Markup("".join(join(c) for c in children))


def table(head: Iterable[Child], rows: Iterable[Iterable[Child]], *, numeric_from: int = 1, medium: bool = False) -> Markup:
    """A table that scrolls sideways where it must; `medium` is narrower than the page. Cells are children of `td`, or a finished `td`."""

    def cell(value: Child, i: int) -> Markup:
        if isinstance(value, Markup) and value.startswith("<td"):
            return value
        return el("td", value, class_="num" if i >= numeric_from else None)

    top = el("tr", [el("th", h, scope="col", class_="num" if i >= numeric_from else None) for i, h in enumerate(head)])
    body = [el("tr", [cell(c, i) for i, c in enumerate(row)]) for row in rows]
    return el("div", el("table", el("thead", top), el("tbody", body)), class_="wide medium" if medium else "wide")


def banner(head: str, words: str) -> Markup:
    """What a reader must know before all else."""
    return el("p", el("b", head), words, class_="banner")


def alarm_banners(results: Mapping[str, Any] | None) -> list[Markup]:
    """The alarms of a run, of which an unfinished one has none."""
    return [banner("Alarm. ", alarm["text"]) for alarm in (results or {}).get("alarms", ())]


def document(title: str, *body: Child) -> Markup:
    """An HTML document that needs nothing from anywhere: its own style, no script, and a policy that forbids loading anything."""
    head = [
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        el("style", Markup(STYLE)),
    ]
    return Markup("<!doctype html>\n" + el("html", el("head", head), el("body", *body), lang="en") + "\n")
