"""Base, Instruct and Reward models that write, judge and learn from their own alignment data."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The Python API, each name with the module that holds it: nothing is imported before it is used.
_API = {
    "LLM": "gristmill.api",
    "RewardModel": "gristmill.api",
    "align": "gristmill.api",
    "curate": "gristmill.api",
    "evaluate": "gristmill.api",
    "load": "gristmill.api",
    "synth": "gristmill.api",
    "train": "gristmill.api",
    "SamplingParams": "gristmill.generation.api",
    "Trainer": "gristmill.train.trainer",
}
__all__ = [
    "LLM",
    "RewardModel",
    "SamplingParams",
    "Trainer",
    "__version__",
    "align",
    "curate",
    "evaluate",
    "load",
    "synth",
    "train",
]

if TYPE_CHECKING:
    from gristmill.api import LLM, RewardModel, align, curate, evaluate, load, synth, train
    from gristmill.generation.api import SamplingParams
    from gristmill.train.trainer import Trainer


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module 'gristmill' has no attribute {name!r}")
    return getattr(import_module(_API[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _CallablePackage(ModuleType):
    """A package that has the name of a function of the API, such as `gristmill.train`, and can be called as that function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return __getattr__(self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Root(ModuleType):
    """This package: where Python sets an imported subpackage in the place of a function, it makes it callable."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _API and isinstance(value, ModuleType):
            value.__class__ = _CallablePackage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Root
