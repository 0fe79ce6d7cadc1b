"""RoPE scaling as config.json has it: linear, dynamic NTK, Llama 3's, YaRN (arXiv 2309.00071) and LongRoPE (2402.13753)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gristmill.core.errors import InputError
from gristmill.core.untrusted import quoted
from gristmill.model.bounds import check_numbers, check_sizes, value_of

ORIGINAL = "original_max_position_embeddings"
# Keys of each kind that must be there, and keys that may be.
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (("factor",), ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")),
    "longrope": (("short_factor", "long_factor"), ("factor", "attention_factor")),
}
HAS_ORIGINAL = ("llama3", "yarn", "longrope")
COMMON_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", ORIGINAL}


@dataclass(frozen=True)
class RopeScaling:
    """RoPE scaling of one `kind` (a key of KINDS); a number that the kind does not have stays as it is here.

    Attributes:
        original_max_positions: positions that the model was trained with at first (llama3, yarn, longrope).
        extended_max_positions: of longrope, whose models are read up to the original positions only: what config.json says.
    """

    factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 1
    kind: str = "llama3"
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    extended_max_positions: int = 1

    def __post_init__(self) -> None:
        check_sizes(1, max_positions=self.original_max_positions)
        check_sizes(1, max_positions=self.extended_max_positions)
        if self.factor is not None or self.kind != "longrope":
            check_numbers(factor=(self.factor, 1e-3, 1e6))
        check_numbers(low_freq_factor=(self.low_freq_factor, 1e-6, 1e6), high_freq_factor=(self.high_freq_factor, 1e-6, 1e6))
        for name in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            if (value := getattr(self, name)) is not None:
                check_numbers(**{name: (value, 0, 1e6)})
        if not isinstance(self.truncate, bool | None):
            raise InputError(f"Give truncate of the rope scaling true or false: it is {quoted(self.truncate)}.")
        if self.high_freq_factor <= self.low_freq_factor:
            raise InputError(
                f"Give a high_freq_factor ({quoted(self.high_freq_factor)}) above low_freq_factor ({quoted(self.low_freq_factor)})."
            )
        for factor in (*self.short_factor, *self.long_factor):
            check_numbers(short_factor_and_long_factor=(factor, 1e-3, 1e6))
        if self.kind == "longrope" and self.original_max_positions < 2:
            raise InputError(f"Give {ORIGINAL} of longrope at least 2 positions.")

    @property
    def depends_on_length(self) -> bool:
        """Whether the angles of a text longer than the model's positions change with its length."""
        return self.kind in ("dynamic", "longrope")


def read_rope(
    rope: Mapping[str, Any], hf: Mapping[str, Any], max_positions: int, *, kinds: Mapping[str, str], theta: Any, default_theta: float
) -> tuple[float, RopeScaling | None]:
    """RoPE base and scaling of one object of rope parameters.

    Args:
        rope: the object.
        hf: the whole config.json.
        max_positions: of config.json.
        kinds: rope types that the family has, and which kinds they mean.
        theta: the base that stands outside of the object, or None.
        default_theta: where there is none.

    Raises:
        InputError: a kind or a key that is not known, or a value that cannot be.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in kinds or rope.get("type", kind) != kind:
        raise InputError(
            f"Use a checkpoint whose rope scaling is one of {', '.join(kinds)}: {quoted(rope.get('type', kind))} is not supported."
        )
    if "rope_theta" in rope and theta is not None and rope["rope_theta"] != theta:
        raise InputError(f"Give rope_theta once in the model's config.json: it is {quoted(rope['rope_theta'])} and {quoted(theta)}.")
    needed, optional = KINDS.get(kinds[kind], ((), ()))
    for key, value in rope.items():
        if key not in COMMON_KEYS and key not in needed + optional and value not in (None, 1, False):
            raise InputError(
                f"Use a checkpoint with plain rope scaling: {quoted(key)[1:-1]} = {quoted(value)} is not supported with {kind}."
            )
    base = value_of(rope, "rope_theta", default_theta if theta is None else theta)
    if kinds[kind] == "yarn":
        check_numbers(rope_theta=(base, 1 + 1e-6, 1e15))  # its logarithm is divided by
    if kinds[kind] == "default":
        return base, None
    values: dict[str, Any] = {key: value_of(rope, key) for key in needed}
    values |= {key: rope[key] for key in optional if rope.get(key) is not None}
    for key in ("short_factor", "long_factor"):
        if key in values:
            if not isinstance(values[key], list) or len(values[key]) > 2**10:
                raise InputError(f"Give {key} of longrope a list of numbers: it is {quoted(values[key])}.")
            values[key] = tuple(values[key])
    if kinds[kind] in HAS_ORIGINAL:
        values["original_max_positions"] = hf.get(ORIGINAL, rope.get(ORIGINAL, max_positions))
    if kinds[kind] == "longrope":
        values["extended_max_positions"] = max_positions
    return base, RopeScaling(kind=kinds[kind], **values)


def write_rope(scaling: RopeScaling) -> dict[str, Any]:
    """The rope_scaling object of a config.json."""
    needed, optional = KINDS[scaling.kind]
    written = {key: getattr(scaling, key) for key in needed}
    written |= {key: getattr(scaling, key) for key in optional if getattr(scaling, key) is not None}
    written = {key: list(value) if isinstance(value, tuple) else value for key, value in written.items()}
    original = {ORIGINAL: scaling.original_max_positions} if scaling.kind in HAS_ORIGINAL else {}
    return {"rope_type": scaling.kind, **written, **original}
