"""Writes docs/api.md from the docstrings of the Python API and the snippets beside this file: `make docs`."""

import ast
import inspect
import sys
from importlib import import_module
from pathlib import Path

import gristmill

FOLDER = Path(__file__).parent
INTRO = """# Python API

Written from the docstrings by `make docs`. Everything here is imported lazily: `import gristmill` costs nothing. Bad input raises
`gristmill.core.errors.InputError`, one sentence that says what is wrong and what to do. The command line calls the same functions.

Ten snippets, each run by `tests/test_api.py`, then the reference.
"""


def snippet(path: Path) -> str:
    """A snippet under its docstring as a heading."""
    text = path.read_text()
    title = ast.get_docstring(ast.parse(text)) or path.stem
    code = text.split('"""', 2)[2].strip()
    return f"## {title.rstrip('.')}\n\n```python\n{code}\n```\n"


def described(name: str, thing: object, level: int) -> str:
    """Signature and docstring of a class or function, and of a class's public methods."""
    signature = str(inspect.signature(thing)).replace("'", "") if callable(thing) else ""
    out = f"{'#' * level} `{name}`\n\n```python\n{name.rpartition('.')[2]}{signature}\n```\n\n{docstring(thing)}\n"
    if inspect.isclass(thing):
        methods = [(n, m) for n, m in vars(thing).items() if inspect.isfunction(m) and not n.startswith("_") and m.__doc__]
        out += "".join("\n" + described(f"{name}.{n}", m, level + 1) for n, m in methods)
    return out


def docstring(thing: object) -> str:
    """A docstring as Markdown: its sections (Args, Raises, ...) as lists."""
    lines = []
    for line in (inspect.getdoc(thing) or "").splitlines():
        if line.endswith(":") and line[:-1] in ("Args", "Returns", "Raises", "Attributes", "Yields"):
            lines += [f"*{line[:-1]}*", ""]
        elif line.startswith("        "):
            lines.append(f"  {line.strip()}")
        elif line.startswith("    "):
            lines.append(f"- {line.strip()}")
        else:
            lines.append(line)
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    names = [name for name in sorted(gristmill.__all__, key=str.lower) if not name.startswith("__")]
    parts = [INTRO, *(snippet(path) for path in sorted((FOLDER / "snippets").glob("*.py"))), "# Reference\n"]
    parts += [described(f"gristmill.{name}", getattr(import_module(gristmill._API[name]), name), 2) for name in names]
    return "\n".join(parts)


if __name__ == "__main__":
    (FOLDER / "api.md").write_text(page())
    print(FOLDER / "api.md", file=sys.stderr)
