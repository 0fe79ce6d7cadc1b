"""Losses and metrics of a training: sums and counts over micro-batches and processes, and the log of what they come to."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from gristmill.core.io import disk_errors, read_bytes, regular, sync, write_text
from gristmill.parallel.mesh import Mesh


@dataclass(frozen=True)
class LossOutput:
    """What an objective returns: a loss sum over ``count`` terms, and named metrics as (sum, count)."""

    sum: Tensor
    count: int
    metrics: Mapping[str, tuple[Tensor | float, float]] = field(default_factory=dict)


class MetricSums:
    """Sums and counts of a loss and its metrics over micro-batches."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, float] = {}

    def add(self, output: LossOutput) -> None:
        loss = {"loss": (output.sum.detach(), float(output.count))}
        for name, (value, count) in {**output.metrics, **loss}.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0.0) + count

    def means(self, mesh: Mesh) -> dict[str, float]:
        """Means over the micro-batches of all processes. One may lack a metric that another has."""
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        for part in mesh.gather_losses({name: (float(total), self._counts[name]) for name, total in self._sums.items()}):
            for name, (total, count) in part.items():
                sums[name], counts[name] = sums.get(name, 0.0) + total, counts.get(name, 0.0) + count
        return {name: total / max(counts[name], 1) for name, total in sums.items()}


class MetricsLog:
    """``metrics.jsonl`` and TensorBoard events in a folder; nowhere without one.

    A resumed run first cuts off the lines of steps that it will do again.
    """

    def __init__(self, folder: Path | None, resumed_step: int) -> None:
        self._folder = folder
        if folder is None:
            return
        # TensorBoard is heavy to import, so only a run that writes pays for it
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "metrics.jsonl"
        with disk_errors(folder):
            lines = read_bytes(path).decode("utf-8", "replace").split("\n") if path.exists() else []
            write_text(path, "".join(line + "\n" for line in lines if _step_of(line) <= resumed_step))
            self._file = open(path, "a", opener=regular)  # noqa: SIM115 (closed by close)
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        if self._folder is None:
            return
        with disk_errors(self._folder):
            self._file.write(json.dumps({"step": step} | metrics) + "\n")
            self._file.flush()
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._folder is not None:
            with disk_errors(self._folder):
                os.fsync(self._file.fileno())
                self._file.close()
                self._board.close()
                for path in (self._folder / "tensorboard").iterdir():
                    sync(path)


def _step_of(line: str) -> float:
    """The step of a line of metrics; infinity where it is torn."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, LookupError, RecursionError):
        return math.inf
