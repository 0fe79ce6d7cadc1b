"""Loop state: what the alignment loop carries from stage to stage."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gristmill.data.rows import Demonstration, Rated
from gristmill.workflows.alignment.alarms import Alarm


@dataclass
class State:
    """Rows, models and counts so far; `chain` names everything they come from."""

    demonstrations: list[Demonstration]
    ratings: list[Rated]
    chain: str  # fingerprint of everything so far
    reward_folder: Path | None = None
    synthetic: list[Demonstration] = field(default_factory=list)  # kept answers of all rounds
    repaired: int = 0  # of the synthetic ones, those that a program has edited
    pairs: int = 0
    human_pairs: int = 0
    seen: set[str] = field(default_factory=set)
    stages: list[dict[str, Any]] = field(default_factory=list)
    collapse: list[dict[str, Any]] = field(default_factory=list)
    alarms: list[Alarm] = field(default_factory=list)
    models: dict[str, Path] = field(default_factory=dict)
