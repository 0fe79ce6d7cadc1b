"""Names of an alignment's stages: their round, and which model each one is meant to improve on."""

import re
from collections.abc import Sequence


def round_of(name: str) -> int:
    """The round of a stage: "r2-dpo" is of round 2, "demonstrations" of round 0."""
    match = re.match(r"r(\d+)-", name)
    return int(match[1]) if match else 0


def is_single_task(name: str) -> bool:
    """Whether a stage trains for one task only, so that its overall accuracy says little."""
    return name.endswith("code-sft")


def baselines(names: Sequence[str]) -> dict[str, str]:
    """The baseline of each model.

    Both SFT stages of a round start from Base and are to surpass the model that wrote their data: the last one of the round before.
    Every other stage continues the one before it.
    """
    out: dict[str, str] = {}
    for i, name in enumerate(names):
        earlier = [n for n in names[:i] if round_of(n) < round_of(name)]
        if name.endswith("-sft") and earlier:
            out[name] = earlier[-1]
        elif i:
            out[name] = names[i - 1]
    return out
