"""Every command in the README is one that the program takes, and everything it points at is there."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.main

from gristmill.cli.main import app
from gristmill.core.config import COMMANDS as OF_KIND
from gristmill.core.config import find_recipe
from gristmill.workflows.alignment.recipe import CONTROLS

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(sh|bash|shell|console)[ \t]*\n(.*?)^```[ \t]*$", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href|srcset)=\"([^\"]+)\"")
MADE = ("runs/", ".venv/")  # by earlier commands
COMMANDS: dict[str, Any] = vars(typer.main.get_command(app))["commands"]


@dataclass(frozen=True)
class Command:
    """One program call; `made` are the files that calls before it wrote."""

    words: tuple[str, ...]
    made: tuple[str, ...]

    @property
    def program(self) -> str:
        return Path(self.words[0]).name

    def __str__(self) -> str:
        return shlex.join(self.words)


def lines(kind: str, block: str) -> Iterator[str]:
    """Command lines of a block. In a console block they follow a `$`, and the rest is output."""
    for line in block.replace("\\\n", " ").splitlines():
        if kind == "console":
            if line.startswith("$ "):
                yield line[2:]
        else:
            yield line


def calls(line: str) -> Iterator[list[str]]:
    """Program calls of a line: comments, pipes, redirections and leading NAME=value taken off."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set(";&|"):
            while words and re.match(r"[A-Za-z_]\w*=", words[0]):
                words.pop(0)
            if words:
                yield words
            words = []
        else:
            words.append(word)


def without_redirections(words: list[str]) -> tuple[list[str], list[str]]:
    """Words before and files after the first `>` or `<`."""
    for i, word in enumerate(words):
        if set(word) <= set("<>"):
            return words[:i], words[i + 1 :]
    return words, []


def commands(text: str) -> list[Command]:
    found: list[Command] = []
    made: list[str] = []
    for kind, block in BLOCK.findall(text):
        for line in lines(kind, block):
            for call in calls(line):
                words, files = without_redirections(call)
                found.append(Command(tuple(words), tuple(made)))
                made += files
                made += [b for a, b in zip(words, words[1:], strict=False) if a in ("--out", "-o")]
    return found


FOUND = commands(TEXT)
OURS = [c for c in FOUND if c.program == "gristmill"]
FILES = {link for pair in LINK.findall(TEXT) for link in pair if link and not link.startswith(("http:", "https:", "mailto:", "#"))}


def test_the_reader_of_blocks() -> None:
    text = """
```sh
# a comment
A=1 gristmill run \\
  mine.yaml --out here  # and another
make test && .venv/bin/gristmill status here | cat > log
```
```console
$ gristmill generate m "what; is | this?"
an answer
```
```python
gristmill("no command")
```
"""
    assert [c.words for c in commands(text)] == [
        ("gristmill", "run", "mine.yaml", "--out", "here"),
        ("make", "test"),
        (".venv/bin/gristmill", "status", "here"),
        ("cat",),
        ("gristmill", "generate", "m", "what; is | this?"),
    ]
    assert commands(text)[-1].made == ("here", "log")


def test_the_two_commands_are_there() -> None:
    assert {"make demo", "make test"} <= {str(c) for c in FOUND}


@pytest.mark.parametrize("command", [c for c in FOUND if c.program == "make"], ids=str)
def test_make_targets_exist(command: Command) -> None:
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.M))
    wanted = [word for word in command.words[1:] if "=" not in word]
    assert wanted and set(wanted) <= targets


@pytest.mark.parametrize("command", OURS, ids=str)
def test_gristmill_takes_the_command_line(command: Command) -> None:
    arguments = list(command.words[1:])
    if arguments in (["--help"], ["--version"]):
        return
    name = arguments.pop(0)
    assert name in COMMANDS
    context = COMMANDS[name].make_context(name, arguments)
    assert context.params.get("control") in (None, *CONTROLS)
    recipe = context.params.get("recipe")
    if recipe is not None and recipe not in command.made:
        kinds = [kind for kind, command in OF_KIND.items() if command == name] or ["alignment"]  # claims run one too
        find_recipe(str(ROOT / recipe) if recipe.endswith((".yaml", ".yml")) else recipe, *kinds)


@pytest.mark.parametrize("command", [c for c in FOUND if c.program.startswith(("gristmill", "python", "bash"))], ids=str)
def test_repository_files_in_commands_exist(command: Command) -> None:
    folders = {p.name for p in ROOT.iterdir() if p.is_dir()}
    for word in command.words[1:]:
        if "/" in word and word.split("/")[0] in folders and not word.startswith(MADE) and word not in command.made:
            assert (ROOT / word).exists(), word


@pytest.mark.parametrize("link", sorted(FILES))
def test_links_to_files_exist(link: str) -> None:
    assert (ROOT / link.split("#")[0]).exists()
