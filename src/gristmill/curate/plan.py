"""Plan of a curation: processor hours, disk and traffic of so many documents, step by step, from rates that were measured on one core."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from gristmill.core.errors import InputError
from gristmill.core.untrusted import quoted

# Bytes of text a CPU second of a step (docs/results.md, "Curation on one core"); of reading and writing what the whole pipeline leaves.
RATES = {
    "clean": 152e6,
    "language": 52e6,
    "filter": 94e6,
    "exact": 2346e6,
    "fuzzy": 251e6,
    "pii": 174e6,
    "decontaminate": 171e6,
}
READ_AND_WRITE = 65e6
LOCAL = ("clean", "language", "filter", "pii")  # steps that share a pass with their neighbours
# Passes over the texts that a step of its own reads, beside the one that it writes; of near duplicates the candidates' texts, at most all.
READS = {"exact": 2, "fuzzy": 3, "decontaminate": 2}
KEY_BYTES = {"exact": 24, "fuzzy": 16 * 20}  # a document, sorted by key between the shards: 20 bands of 13 hashes
NODE_BANDWIDTH = 3.125e9  # bytes a second of a node to the storage: 25 Gbit/s
MAX_DOCUMENTS, MAX_NODES = 1e15, 2**20
DOCUMENT_BYTES = 4000  # of a web page's text


@dataclass(frozen=True)
class CurationStage:
    """What one stage takes: CPU seconds, bytes that are read and written, bytes of keys between shards, bytes that stay until the end."""

    name: str
    cpu_seconds: float
    read: float
    written: float
    shuffled: float
    disk: float

    @property
    def traffic(self) -> float:
        """Bytes between nodes and the storage that all of them see."""
        return self.read + self.written + 2 * self.shuffled

    def seconds(self, nodes: int, cores: int) -> float:
        """On so many nodes of so many cores: what takes longer, computing or the network."""
        return max(self.cpu_seconds / (nodes * cores), self.traffic / (nodes * NODE_BANDWIDTH))


@dataclass(frozen=True)
class CurationPlan:
    """What a curation takes where no document is dropped, which is the most."""

    stages: tuple[CurationStage, ...]
    documents: float
    text_bytes: float
    nodes: int
    cores: int  # of a node
    unknown: tuple[str, ...]  # steps without a measured rate

    @property
    def hours(self) -> float:
        return sum(stage.seconds(self.nodes, self.cores) for stage in self.stages) / 3600

    @property
    def core_hours(self) -> float:
        return sum(stage.cpu_seconds for stage in self.stages) / 3600

    @property
    def disk(self) -> float:
        """Bytes at the end: every stage keeps its shards until all are done."""
        return sum(stage.disk for stage in self.stages)

    @property
    def traffic(self) -> float:
        """Bytes between nodes and the storage that all of them see."""
        return sum(stage.traffic for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain values, for --json."""
        return {
            "documents": self.documents,
            "text_bytes": self.text_bytes,
            "nodes": self.nodes,
            "cores": self.cores,
            "hours": self.hours,
            "core_hours": self.core_hours,
            "disk_bytes": self.disk,
            "network_bytes": self.traffic,
            "network_bytes_per_second": self.traffic / max(self.hours * 3600, 1e-9),
            "shuffle_bytes": sum(stage.shuffled for stage in self.stages),
            "stages": [asdict(stage) for stage in self.stages],
            "unknown": list(self.unknown),
        }


def plan_curation(
    steps: Sequence[str], documents: float, nodes: int, *, cores: int, document_bytes: float = DOCUMENT_BYTES
) -> CurationPlan:
    """Plan a curation of so many documents on `nodes` of `cores` each; `steps` are the recipe's, in their order.

    Raises:
        InputError: a number that cannot be used.
    """
    numbers = {"documents": (documents, MAX_DOCUMENTS), "nodes": (nodes, MAX_NODES), "cores": (cores, MAX_NODES)}
    numbers |= {"document-bytes": (document_bytes, 1e12)}
    for name, (value, most) in numbers.items():
        if not 1 <= value <= most:  # NaN is not
            raise InputError(f"Give --{name} a number from 1 to {most:g}: it is {value:g}.")
    text = documents * document_bytes
    stages = [CurationStage("read", text / READ_AND_WRITE / 2, text, text, 0.0, text)]
    for local, group in groupby(steps, key=lambda step: step in LOCAL):
        names = list(group)
        for part in [names] if local else [[name] for name in names]:
            seconds = sum(text / RATES[name] for name in part if name in RATES)
            keys = sum(KEY_BYTES.get(name, 0) for name in part) * documents
            reads = 1 if local else READS.get(part[0], 1)
            stages.append(CurationStage("-".join(part), seconds, reads * text, text, keys, text + keys))
    stages.append(CurationStage("write", text / READ_AND_WRITE / 2, text, text, 0.0, text))
    unknown = tuple(dict.fromkeys(step for step in steps if step not in RATES))
    return CurationPlan(tuple(stages), documents, text, nodes, cores, unknown)


def steps_of(recipe: dict[str, Any]) -> list[str]:
    """The steps of a curation's recipe, by name.

    Raises:
        InputError: it has none.
    """
    steps = recipe.get("steps")
    names = [step.get("step") for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
    if not names or not all(isinstance(name, str) and name.isidentifier() for name in names):
        raise InputError(f"Give the curation's recipe a list of steps, each with its name under `step`: it has {quoted(steps)}.")
    return [str(name) for name in names]
