"""Files of a model folder, and what people give in place of one: a GGUF file, a name on the Hugging Face Hub, pickled weights."""

import os
import re
from pathlib import Path

from gristmill.core.errors import InputError
from gristmill.core.io import Stamp, stamp
from gristmill.core.untrusted import existing_file, quoted_path

NO_MODEL = "Give a folder with a Hugging Face model"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


def model_file(folder: Path, name: str) -> Path:
    """The path of a file of a model folder.

    Raises:
        InputError: there is none. It says what to do with what is there instead.
    """
    path = folder / name
    if not os.path.lexists(path):
        refuse_other_forms(folder)
    return existing_file(path, NO_MODEL)


def refuse_other_forms(folder: Path) -> None:
    """Raise InputError where a path names a model in a form that is not read, and say what to do."""
    if what := _instead(folder):
        raise InputError(what)


def _instead(folder: Path) -> str:
    shown, parent = quoted_path(folder), folder.parent
    if folder.suffix == ".gguf" or _starts_as_gguf(folder) or (folder.is_dir() and any(folder.glob("*.gguf"))):
        return (
            f"{NO_MODEL} (config.json, *.safetensors, tokenizer.json), not {shown}: GGUF is not read. Fetch the checkpoint that it "
            "was made from, or convert it with transformers: from_pretrained(..., gguf_file=...), then save_pretrained."
        )
    if folder.is_file():
        return f"{NO_MODEL}, not one of its files: {shown} is a file."
    if any((folder / name).exists() for name in ("pytorch_model.bin", "pytorch_model.bin.index.json")):
        return (
            f"Save {shown} as safetensors first (transformers: from_pretrained, then save_pretrained): "
            "its weights are pickled, and opening them would run code."
        )
    if (folder / "model" / "config.json").is_file():  # a stage of ours, beside what it kept of its training
        return f"{NO_MODEL}: that of {shown} is {quoted_path(folder / 'model')}."
    names = (parent.name, folder.name)
    if not os.path.lexists(parent) and parent.parent.is_dir() and all(HUB_NAME.fullmatch(one) for one in names):
        name = "/".join(names)
        return (
            f"{NO_MODEL}: {shown} does not exist, and nothing is downloaded. If {name} is a name on the Hugging Face Hub, fetch it first "
            f"(hf download {name} --local-dir {folder.name}) and give that folder."
        )
    return ""


def _starts_as_gguf(path: Path) -> bool:
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except (OSError, ValueError):
        return False


# Files that decide what a model or adapter folder answers.
ANSWERING = ("*.safetensors", "config.json", "adapter_config.json", "tokenizer*.json", "chat_template.jinja")


def folder_stamps(folder: Path) -> dict[str, Stamp]:
    """Stamps of a model or adapter folder's files, by name: whose answers a journal holds."""
    return {path.name: stamp(path) for path in sorted({path for pattern in ANSWERING for path in folder.glob(pattern)})}
