"""Loop state: what the alignment loop carries from stage to stage."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gristmill.data.rows import Demonstration, Pair, Rated
from gristmill.runs.run_dir import Stage
from gristmill.workflows.alarms import Alarm


@dataclass(frozen=True)
class Said:
    """What people have said in a studio, as rows to train on.

    Attributes:
        people: how many answers of each kind each person gave, by pseudonym.
    """

    ratings: list[Rated] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    demonstrations: list[Demonstration] = field(default_factory=list)
    people: dict[str, dict[str, int]] = field(default_factory=dict)


ReadSaid = Callable[[Path, str], Said]


@dataclass
class State:
    """Rows, models and counts so far.

    Attributes:
        made: fingerprint of each stage by its name.
        measured: stages of each kind of measurement, by the model that was measured, in the order of the models.
        said: what people have said in the studio, as this round takes it.
        rated_by_people: which of their ratings the reward model was trained on.
        unmeasured: what is still to be measured: kind, and name of the model.
    """

    demonstrations: list[Demonstration]
    ratings: list[Rated]
    made: dict[str, str]
    reward_folder: Path | None = None
    synthetic: list[Demonstration] = field(default_factory=list)  # kept answers of all rounds
    repaired: int = 0  # of the synthetic ones, those that a program has edited
    pairs: int = 0
    human_pairs: int = 0
    said: Said = field(default_factory=Said)
    rated_by_people: str = ""
    seen: set[str] = field(default_factory=set)
    stages: list[dict[str, Any]] = field(default_factory=list)
    collapse: list[dict[str, Any]] = field(default_factory=list)
    alarms: list[Alarm] = field(default_factory=list)
    models: dict[str, Path] = field(default_factory=dict)
    measured: dict[str, dict[str, Stage]] = field(default_factory=dict)
    unmeasured: list[tuple[str, str]] = field(default_factory=list)

    def of(self, *names: str) -> dict[str, str]:
        """Fingerprints of the stages that another one reads, where the run has them."""
        return {name: self.made[name] for name in names if name in self.made}

    def rounds_made(self, number: int) -> list[str]:
        """Stages of earlier rounds that say which prompts were asked and answered."""
        return [f"r{i}-{name}" for i in range(1, number) for name in ("prompts", "answers")]
