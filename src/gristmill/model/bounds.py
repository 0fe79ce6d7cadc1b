"""Bounds of a model's configuration, and checks of the values of a config.json that a stranger wrote."""

from collections.abc import Mapping
from typing import Any

from gristmill.core.errors import InputError
from gristmill.core.untrusted import quoted

# Several times the largest published model. Below them, what a model needs is known without overflow.
MAX_SIZES = {
    "vocab_size": 2**21,
    "hidden_size": 2**16,
    "ffn_size": 2**19,
    "num_heads": 2**10,
    "num_kv_heads": 2**10,
    "head_dim": 2**10,
    "max_positions": 2**22,
    "window": 2**22,
}
MAX_FACTOR = 1e9  # of multipliers and caps
HF_NAMES = {  # where config.json calls them otherwise
    "ffn_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "max_positions": "max_position_embeddings",
    "window": "sliding_window",
    "rotary_fraction": "partial_rotary_factor",
    "init_std": "initializer_range",
}


def _named(name: str) -> str:
    return f"{name} ({HF_NAMES[name]} in config.json)" if name in HF_NAMES else name


def check_sizes(minimum: int, **sizes: Any) -> None:
    """Raise InputError for a size that is no whole number from `minimum` to its bound."""
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= MAX_SIZES[name]:
            raise InputError(f"Give {_named(name)} a whole number from {minimum} to {MAX_SIZES[name]}: it is {quoted(value)}.")


def check_numbers(**numbers: tuple[Any, float, float]) -> None:
    """Raise InputError for a number that is not within (value, lowest, highest)."""
    for name, (value, low, high) in numbers.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:  # NaN is not
            raise InputError(f"Give {_named(name)} a number from {low:g} to {high:g}: it is {quoted(value)}.")


def value_of(hf: Mapping[str, Any], key: str, default: Any = None, *, null: Any = None) -> Any:
    """The value of a key, `default` where it is absent, `null` where it is null.

    Raises:
        InputError: it is absent or null, and that means nothing.
    """
    if key not in hf and default is None:
        raise InputError(f"Add the missing key {key!r} to the model's config.json.")
    value = hf.get(key, default)
    if value is None and null is None:
        raise InputError(f"Give {key!r} a value in the model's config.json: it is null.")
    return null if value is None else value


def mapping_of(hf: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The JSON object of a key, empty where it is absent or null."""
    value = {} if hf.get(key) is None else hf[key]
    if not isinstance(value, dict):
        raise InputError(f"Correct {key} in the model's config.json: {quoted(value)} is no JSON object.")
    return value
