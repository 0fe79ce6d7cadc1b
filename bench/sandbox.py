"""The sandbox on published problems, and its speed beside a fresh interpreter for every program.

Reference solutions of HumanEval and MBPP, each with its own tests, should all pass; those that do not are listed with the reason.
Then many small programs, all different, run one after the other on one core: through a warm sandbox and through `python -I -S -c` in a
subprocess with a time-out, in turns, so that a busy neighbour slows both.
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median, quantiles

from gristmill.sandbox.sandbox import Sandbox

AIM = 200  # programs a second on one core
ROUNDS = 5
EXAMPLE = """example:
  PYTHONPATH=src python bench/sandbox.py --humaneval HumanEval.jsonl.gz --mbpp mbpp.jsonl --programs 2000
"""


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--humaneval", type=Path, metavar="FILE", help="HumanEval.jsonl or .jsonl.gz")
    parser.add_argument("--mbpp", type=Path, metavar="FILE", help="mbpp.jsonl or .jsonl.gz")
    parser.add_argument("--timeout", type=float, default=10.0, metavar="S", help="seconds for one solution and its tests (default 10)")
    parser.add_argument(
        "--programs", type=int, default=2000, metavar="N", help="programs to time on each side; 0 times none (default 2000)"
    )
    args = parser.parse_args()
    if 0 < args.programs < 100:
        parser.error("--programs: fewer than 100 give no 99th percentile")
    return args


def say(**row: object) -> None:
    """Print one line of JSON."""
    print(json.dumps(row), flush=True)


def rows(path: Path) -> Iterator[dict]:
    """The rows of a JSON-lines file, compressed or not."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        yield from map(json.loads, file)


def humaneval(path: Path) -> Iterator[tuple[str, str, str]]:
    """Name, program and check of every problem."""
    for row in rows(path):
        yield row["task_id"], row["prompt"] + row["canonical_solution"], f"{row['test']}\ncheck({row['entry_point']})\n"


def mbpp(path: Path) -> Iterator[tuple[str, str, str]]:
    """Name, program and check of every problem."""
    for row in rows(path):
        # The set-up follows the solution: two of them build objects of its classes.
        tests = [row["test_setup_code"], *row["test_list"], *row["challenge_test_list"]]
        yield f"MBPP/{row['task_id']}", row["code"], "\n".join(tests)


def references(box: Sandbox, suite: str, problems: Iterator[tuple[str, str, str]], timeout_s: float) -> dict[str, object]:
    """Run a suite, print the problems that do not pass, and return the counts."""
    failed, seconds = [], {}
    for name, program, check in problems:
        result = box.run(program, check, timeout_s)
        seconds[name] = result.seconds
        if not result.passed:
            failed.append(name)
            say(suite=suite, problem=name, passed=False, reason=result.reason, seconds=round(result.seconds, 3))
    counts = {"problems": len(seconds), "passed": len(seconds) - len(failed), "failed": failed}
    slowest = max(seconds, key=seconds.__getitem__)
    say(suite=suite, **counts, median_ms=round(median(seconds.values()) * 1e3, 2), slowest=slowest, slowest_s=round(seconds[slowest], 2))
    return counts


def tiny(i: int) -> tuple[str, str]:
    """Program i and its check: no two alike."""
    program = f"def f{i}(n):\n    total = {i}\n    for k in range(n):\n        total += k * {i % 97 + 1}\n    return total\n"
    return program, "".join(f"assert f{i}({n}) == {i + n * (n - 1) // 2 * (i % 97 + 1)}\n" for n in (0, 1, 10))


def cpu_seconds() -> float:
    """Processor time of this process and of all below it, those that ended and were waited for included."""
    parents, used = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        parents[int(folder.name)] = int(fields[1])
        used[int(folder.name)] = sum(map(int, fields[11:15]))
    ours = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return sum(used[pid] for pid in ours) / os.sysconf("SC_CLK_TCK")


def speed(box: Sandbox, num: int) -> dict[str, dict[str, float]]:
    """Time `num` programs on either side, in turns, on one core."""

    python = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)  # as the sandbox does

    def fresh(program: str, check: str) -> bool:
        command = [python, "-I", "-S", "-c", program + check]
        return subprocess.run(command, env={}, cwd="/", capture_output=True, timeout=3.0).returncode == 0

    sides: dict[str, Callable[[str, str], bool]] = {"sandbox": lambda program, check: box.run(program, check).passed, "fresh": fresh}
    taken: dict[str, list[float]] = {side: [] for side in sides}
    cpu = dict.fromkeys(sides, 0.0)
    for start in range(0, num, -(-num // ROUNDS)):
        for side, run in sides.items():
            before = cpu_seconds()
            for i in range(start, min(start + -(-num // ROUNDS), num)):
                program, check = tiny(i)
                began = time.perf_counter()
                passed = run(program, check)
                taken[side].append(time.perf_counter() - began)
                if not passed:
                    raise SystemExit(f"{side}: program {i} did not pass")
            cpu[side] += cpu_seconds() - before
    report = {}
    for side, seconds in taken.items():
        report[side] = {
            "median_ms": round(median(seconds) * 1e3, 2),
            "p99_ms": round(quantiles(seconds, n=100)[98] * 1e3, 2),
            "per_second": round(len(seconds) / sum(seconds), 1),
            "per_cpu_second": round(len(seconds) / cpu[side], 1),
        }
        say(side=side, programs=len(seconds), **report[side])
    return report


def main() -> None:
    """Run what the command line asks for."""
    args = options()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core; what is started from here inherits it
    summary: dict[str, object] = {}
    with Sandbox() as box:
        box.run("", "")  # warm
        for name, source, read in (("humaneval", args.humaneval, humaneval), ("mbpp", args.mbpp, mbpp)):
            if source:
                summary[name] = references(box, name, read(source), args.timeout)
        if args.programs:
            sides = speed(box, args.programs)
            faster = sides["sandbox"]["per_second"] / sides["fresh"]["per_second"]
            summary |= sides | {"times_faster": round(faster, 2), "aim_per_second": AIM}
            summary["aim_met"] = sides["sandbox"]["per_second"] >= AIM
    say(summary=summary, load=os.getloadavg()[0])


if __name__ == "__main__":
    main()
