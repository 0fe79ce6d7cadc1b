"""Verification of answers in batches: programs run in the sandbox, each different one once."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gristmill.core.echo import echo
from gristmill.core.errors import InputError
from gristmill.core.response_text import extract_code
from gristmill.data.rows import Prompt
from gristmill.sandbox.sandbox import Sandbox, SandboxResult
from gristmill.verify.code_tests import check_text, complete, wrong_programs
from gristmill.verify.verify import verify

BATCH = 64  # programs that the sandbox gets at once
MAX_TRUTH_SECONDS = 60.0  # for the tests of prompts, before any answer is asked for
REFERENCE_SECONDS = 20.0  # a reference solution may take its time
MAX_NAMED = 3  # prompts that an error names

Tick = Callable[[int, int, str], None]  # done, of how many, of what


class Verifier:
    """Verifies (truth, answer) pairs, and remembers what programs did.

    Args:
        sandbox: where programs run; None where no truth is a program.
        tick: told how many programs have run.
    """

    def __init__(self, sandbox: Sandbox | None = None, tick: Tick | None = None):
        self._sandbox, self._tick = sandbox, tick
        self._results: dict[tuple[str, str], SandboxResult] = {}

    def verify(self, cases: Sequence[tuple[dict[str, Any], str]]) -> list[bool]:
        """Whether each answer is right."""
        collected: list[tuple[str, str]] = []

        def collect(program: str, tests: str) -> bool:
            if (program, tests) not in self._results:
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
                self._results[key] = result
            if self._tick:
                self._tick(start + len(batch), len(unique), "programs run")
        return [verify(truth, answer, lambda program, tests: self._results[program, tests].passed) for truth, answer in cases]

    def is_weak(self, truth: dict[str, Any], answer: str) -> bool:
        """Whether the verdict about an answer that was verified rests on what the program says of itself (sandbox/split.py)."""
        weak: list[bool] = []
        if is_code(truth):
            verify(truth, answer, lambda program, tests: bool(weak.append(self._results[program, tests].weak)))  # type: ignore[func-returns-value]
        return any(weak)

    def num_weak(self, cases: Sequence[tuple[dict[str, Any], str]], right: Sequence[bool]) -> int:
        """How many of the answers that were found right are so by a weak verdict."""
        return sum(self.is_weak(truth, answer) for (truth, answer), ok in zip(cases, right, strict=True) if ok)


def is_code(truth: dict[str, Any] | None) -> bool:
    """Whether a truth is checked by running the answer."""
    return (truth or {}).get("kind") == "code"


def check_tests(prompts: Iterable[Prompt], sandbox: Sandbox, *, quiet: bool = False) -> None:
    """Run the tests of prompts against programs that must fail, and against the reference solution where there is one.

    Equal tests are run once, and for a minute at most; what it cost is printed.

    Raises:
        InputError: tests pass a program that is wrong, or fail their own reference.
    """
    truths: dict[str, tuple[Prompt, dict[str, Any]]] = {}
    for prompt in prompts:
        if prompt.truth is not None and is_code(prompt.truth):
            key = repr((check_text(prompt.truth), prompt.truth.get("prefix"), prompt.truth.get("reference")))
            truths.setdefault(key, (prompt, prompt.truth))
    start, waiting = time.monotonic(), list(truths.values())
    num_checked, num_references, num_weak, num_late = 0, 0, 0, 0
    wrong: dict[str, str] = {}
    while waiting and time.monotonic() - start < MAX_TRUTH_SECONDS:
        batch, waiting = waiting[:BATCH], waiting[BATCH:]
        runs = [(p, program, why, check_text(t)) for p, t in batch for why, program in wrong_programs(t).items()]
        for (prompt, _, why, _), result in zip(runs, sandbox.run_many([(program, check) for _, program, _, check in runs]), strict=True):
            if result.passed:
                wrong.setdefault(prompt.id, f"{_named(prompt)} pass {why}")
        known = [(p, complete(t, extract_code(t["reference"])), check_text(t)) for p, t in batch if t.get("reference")]
        results = sandbox.run_many([(program, check) for _, program, check in known], REFERENCE_SECONDS)
        for (prompt, _, _), result in zip(known, results, strict=True):
            num_weak += result.weak
            num_late += result.reason == "timeout"  # a busy machine proves nothing about the tests
            if not result.passed and result.reason != "timeout":
                wrong.setdefault(prompt.id, f"{_named(prompt)} fail their own reference solution ({result.reason})")
        num_checked, num_references = num_checked + len(batch), num_references + len(known)
    if wrong:
        more = f"; and {len(wrong) - MAX_NAMED} more" if len(wrong) > MAX_NAMED else ""
        raise InputError(f"{'; '.join(list(wrong.values())[:MAX_NAMED])}{more}: mend the tests, or take the rows out.")
    seconds = time.monotonic() - start
    if truths and not quiet:
        line = f"tests of {num_checked} prompts: no wrong program passes, {num_references - num_late} references do, {seconds:.1f} s"
        line += f"; {num_weak} verdicts are weak" if num_weak else ""
        line += f"; {num_late} references did not end in {REFERENCE_SECONDS:g} s" if num_late else ""
        line += f"; {len(waiting)} were not checked, for want of time" if waiting else ""
        echo(line, err=True)


def _named(prompt: Prompt) -> str:
    return f"The tests of {prompt.messages[-1].content.strip()[:60]!r}"
