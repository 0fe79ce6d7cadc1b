"""LoRA adapters of a server: those it starts with, and those that requests may load from a folder, as with vLLM.

Source of names and endpoints: vLLM's documentation of LoRA adapters.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gristmill.core.errors import InputError
from gristmill.core.untrusted import quoted, quoted_path
from gristmill.engine.engine import Engine
from gristmill.model.adapters import check_base, is_adapter, read_adapter
from gristmill.model.hf import fingerprint
from gristmill.model.lora import matrix_shapes

RUNTIME_VARIABLE = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"  # vLLM's own: whoever sets it knows the risk


@dataclass(frozen=True, kw_only=True)
class LoraArgs:
    """Arguments about LoRA adapters, by vLLM's names.

    Attributes:
        modules: NAME=PATH of those that are loaded at the start.
        max_loras: whose requests may be in flight at once.
        folder: that requests may load adapters from, if RUNTIME_VARIABLE is set.
    """

    enable: bool = False
    modules: Sequence[str] = ()
    max_loras: int = 8
    max_rank: int = 64
    folder: Path | None = None

    def check(self) -> None:
        """Raise `InputError` where options do not go together."""
        if not self.enable and (self.modules or self.folder is not None):
            raise InputError("Give --enable-lora with --lora-modules and --lora-folder: adapters are not served without it.")
        if self.max_loras < 1 or self.max_rank < 1:
            raise InputError("--max-loras and --max-lora-rank must be at least 1.")
        if self.folder is not None and not self.folder.is_dir():
            raise InputError(f"Give --lora-folder a folder: there is none at {quoted_path(self.folder)}.")

    @property
    def may_change(self) -> bool:
        """Whether requests may load and unload adapters."""
        return self.enable and os.environ.get(RUNTIME_VARIABLE, "").strip().lower() in ("1", "true")


class AdapterLoader:
    """Loads adapters into an engine.

    Args:
        base: folder of the engine's model.
    """

    def __init__(self, engine: Engine, base: Path, args: LoraArgs) -> None:
        self.engine, self.base, self.args = engine, base, args
        self._shapes = matrix_shapes(engine.model)

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.base)

    def start(self) -> None:
        """Load those of the command line.

        Raises:
            InputError: one cannot be served.
        """
        for module in self.args.modules:
            name, equals, path = module.partition("=")
            if not (name and equals and path):
                raise InputError(f"Write --lora-modules as NAME=PATH: {quoted(module)} is not so.")
            self._add(name, Path(path))

    def load(self, name: str, path: str) -> None:
        """Load one that a request asks for; a relative path is seen from the folder of adapters.

        Raises:
            InputError: it is not in that folder, or cannot be served.
        """
        if self.args.folder is None:
            raise InputError("this server loads no adapters: start it with --lora-folder DIR")
        root = self.args.folder.resolve()
        try:
            folder = (root / path).resolve()
        except (OSError, ValueError, RuntimeError):
            folder = root.parent
        if not folder.is_relative_to(root):
            raise InputError("lora_path: it leads out of the folder that adapters are loaded from")
        try:
            self._add(name, folder)
        except InputError as e:  # says nothing of other places on the disk
            raise InputError(str(e).replace(str(root), "DIR").replace(str(self.base), "the model")) from None

    def _add(self, name: str, folder: Path) -> None:
        if not is_adapter(folder):
            raise InputError(f"Give the folder of a LoRA adapter: {quoted_path(folder)} holds none.")
        adapter = read_adapter(folder, self._shapes)
        if adapter.max_rank > self.args.max_rank:
            raise InputError(
                f"Raise --max-lora-rank, now {self.args.max_rank}: the adapter {quoted(name)} has the rank {adapter.max_rank}."
            )
        check_base(adapter, self.base, folder, known=self._fingerprint)
        self.engine.add_adapter(name, adapter)
