"""Verification of answers in batches: programs run in the sandbox, each different one once."""

from collections.abc import Callable, Sequence
from typing import Any

from gristmill.sandbox.sandbox import Sandbox
from gristmill.verify.verify import verify

BATCH = 64  # programs that the sandbox gets at once

Tick = Callable[[int, int, str], None]  # done, of how many, of what


class Verifier:
    """Verifies (truth, answer) pairs, and remembers what programs did.

    Args:
        sandbox: where programs run; None where no truth is a program.
        tick: told how many programs have run.
    """

    def __init__(self, sandbox: Sandbox | None = None, tick: Tick | None = None):
        self._sandbox, self._tick = sandbox, tick
        self._passed: dict[tuple[str, str], bool] = {}

    def verify(self, cases: Sequence[tuple[dict[str, Any], str]]) -> list[bool]:
        """Whether each answer is right."""
        collected: list[tuple[str, str]] = []

        def collect(program: str, tests: str) -> bool:
            if (program, tests) not in self._passed:
                collected.append((program, tests))
            return False

        for truth, answer in cases:
            if is_code(truth):
                verify(truth, answer, collect)
        unique = list(dict.fromkeys(collected))
        for start in range(0, len(unique), BATCH):
            assert self._sandbox is not None
            batch = unique[start : start + BATCH]
            for key, result in zip(batch, self._sandbox.run_many(batch), strict=True):
                self._passed[key] = result.passed
            if self._tick:
                self._tick(start + len(batch), len(unique), "programs run")
        return [verify(truth, answer, lambda program, tests: self._passed[program, tests]) for truth, answer in cases]


def is_code(truth: dict[str, Any] | None) -> bool:
    """Whether a truth is checked by running the answer."""
    return (truth or {}).get("kind") == "code"
