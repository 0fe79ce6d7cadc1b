"""Untrusted input: files that a stranger wrote, read within bounds, and what they say, in a form that can be printed."""

import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from gristmill.core.errors import InputError
from gristmill.core.io import read_bytes

MAX_JSON_BYTES = 16 << 20  # ten times the largest configuration of a published tokenizer
MAX_QUOTED = 80
MAX_NAME_BYTES = 255  # of a file name on every usual file system


def quoted(value: object) -> str:
    """Printable form of a stranger's value: its repr in ASCII, without control characters, cut at MAX_QUOTED characters."""
    text = ascii(value[:MAX_QUOTED] if isinstance(value, str | list | tuple) else value)
    return text if len(text) <= MAX_QUOTED else text[: MAX_QUOTED - 3] + "..."


def existing_file(path: Path, what: str) -> Path:
    """The path of a regular file; `what` says for an error which file it should be.

    Raises:
        InputError: there is none; a pipe or a device counts as none.
    """
    try:
        mode = path.stat().st_mode  # follows links: the caches of the Hugging Face Hub are made of them
    except (OSError, ValueError):
        raise InputError(f"{what}: {quoted_path(path)} does not exist.") from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{what}: {quoted_path(path)} is no regular file.")
    return path


def quoted_path(path: Path) -> str:
    """Printable form of a path: as it is where it can be printed."""
    text = str(path)
    return text if text.isprintable() and len(text) <= 4096 else quoted(text)


def is_bare_name(name: object) -> bool:
    """Whether a stranger's value names a file in the folder at hand, and nothing outside of it."""
    if not isinstance(name, str) or not 0 < len(name.encode(errors="replace")) <= MAX_NAME_BYTES:
        return False
    return name not in (".", "..") and not set(name) & {"/", "\\", os.sep, "\0"}


def read_untrusted_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object of a file that anybody may have written. NaN and infinity, which JSON does not have, are refused.

    Raises:
        InputError: the file is no regular one, cannot be read, is too large, or holds no JSON object.
    """
    data = read_bytes(existing_file(path, "A file is missing"), max_bytes)
    try:
        value = json.loads(data.decode(), parse_constant=_refuse_constant)
    except RecursionError:
        raise InputError(f"Download or save {path} again: it is not valid JSON (nested too deeply).") from None
    except ValueError as e:
        raise InputError(f"Download or save {path} again: it is not valid JSON ({e}).") from None
    if not isinstance(value, dict):
        raise InputError(f"Download or save {path} again: it holds no JSON object.")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")
