"""Base, Instruct and Reward models that write, judge and learn from their own alignment data."""

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
    from importlib import import_module

    return getattr(import_module(_API[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
