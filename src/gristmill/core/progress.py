"""Progress display: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from gristmill.core.echo import echo, sentence, terminal, visible

Item = TypeVar("Item")
LINE_SECONDS = 5.0


class Progress:
    """Progress of a run's stages.

    Args:
        quiet: print nothing.
        describe: makes the one line that a finished stage leaves behind, from its marker.
    """

    def __init__(self, *, quiet: bool = False, describe: Callable[[dict[str, Any]], str] = lambda done: ""):
        self.quiet, self._describe = quiet, describe
        self._bar: Any = None
        self._task: Any = None
        self._stage = ""
        self._printed = self._stage_started = self._started = time.monotonic()
        if not quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bars

            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                TimeElapsedColumn(),
            )
            self._bar = Bars(*columns, console=Console(file=terminal(), emoji=False), transient=True)

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage begins; one that begins within another gives the display back to it."""
        outer = self._task, self._stage, self._stage_started
        self._stage, self._stage_started = name, time.monotonic()
        if self._bar:
            self._task = self._bar.add_task(sentence(name), total=None, note="")
        try:
            yield
        finally:
            if self._bar:
                self._bar.remove_task(self._task)
            self._task, self._stage, self._stage_started = outer

    def finished(self, name: str, done: dict[str, Any]) -> None:
        """A stage is done: leave one line."""
        line = f"{self._clock()}  {name:<18} {done['seconds']:>6.1f} s  {self._describe(done)}"
        if self._bar:
            self._bar.console.print(visible(line), markup=False, highlight=False)
        else:
            self._print(line)

    def warn(self, line: str) -> None:
        """Something went wrong and was mended: say so, quiet or not."""
        if self._bar:
            self._bar.console.print(sentence(line), markup=False, highlight=False)
        else:
            echo(sentence(line), err=True)

    def say(self, line: str) -> None:
        """A line that stays, unless quiet."""
        if not self.quiet:
            self.warn(line)

    def tick(self, done: int, total: int | None, note: str = "") -> None:
        """How far the stage is."""
        if self._bar:
            self._bar.update(self._task, completed=done, total=total, note=sentence(note))
        elif time.monotonic() - self._printed > LINE_SECONDS:
            share = f"{done}/{total}" if total else str(done)
            self._print(f"{self._clock()}  {self._stage:<18} {time.monotonic() - self._stage_started:>6.1f} s  {share} {note}")

    def train_step(self, step: int, total: int, metrics: dict[str, float]) -> None:
        """Tick of a training step, with its loss and speed."""
        self.tick(step, total, f"steps, loss {metrics['loss']:.3f}, {metrics['tokens_per_second']:,.0f} tokens/s")

    def track(self, items: Iterable[Item], total: int | None, note: Callable[[], str] = lambda: "") -> Iterator[Item]:
        """Tick once an item."""
        for i, item in enumerate(items, 1):
            yield item
            self.tick(i, total, note())

    def _clock(self) -> str:
        seconds = int(time.monotonic() - self._started)
        return f"{seconds // 60:>3}:{seconds % 60:02d}"

    def _print(self, line: str) -> None:
        if not self.quiet:
            echo(line, err=True)
            self._printed = time.monotonic()
