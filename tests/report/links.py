"""Links of a page's samples into the studio, followed as the studio follows them."""

import html
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from gristmill.studio.sources import Sources

LINK = re.compile(r'href="http://127\.0\.0\.1:8600/#/rows\?([^"]+)"')


def plain(text: str) -> str:
    """What can be seen of a text, on one line."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())


def opened(folder: Path, page: str, cache: Path) -> list[dict[str, Any]]:
    """The rows that the samples of a page open, each of which says something that its sample says."""
    rows, sources = [], Sources(folder, cache)
    for block in page.split('class="sample"')[1:]:
        (query,) = LINK.findall(block)
        asked = parse_qs(html.unescape(query))
        row = sources.row(asked["source"][0], int(asked["place"][0]))
        texts = [turn["content"] for turn in row["messages"]] + [answer["text"] for answer in row["answers"]]
        shown = plain(html.unescape(block))
        assert any(plain(text)[:90] in shown for text in texts if text.strip()), (row, shown)
        rows.append(row)
    return rows
