"""Reading a large run back: `report`, `status`, `rows lineage`, `answers`, and the journals that a restart opens.

    PYTHONPATH=src python bench/report.py make runs/miniature runs/large --times 20
    PYTHONPATH=src python bench/report.py measure runs/large

`make` writes a finished miniature again with every row many times, each time under new ids; its models are left out. `measure` runs each
command in a process of its own. One line of JSON for each: CPU seconds of the whole process, imports included, and its peak memory.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gristmill.core.io import read_json, write_json
from gristmill.runs import artifacts
from gristmill.runs.journal import Journal
from gristmill.runs.reader import GENERATED, generated_tokens

COMMANDS = {
    "report": ["report", "{run}"],
    "status": ["status", "{run}"],
    "lineage": ["rows", "lineage", "{row}", "--folder", "{run}"],
    "errors": ["rows", "errors", "--folder", "{run}"],
    "answers": ["answers", "{run}"],
}
OPEN_JOURNALS = "import sys; from pathlib import Path; from gristmill.runs.journal import Journal; "
OPEN_JOURNALS += "print(sum(len(Journal(p, read_only=True)) for p in Path(sys.argv[1]).glob('*/calls.jsonl')))"
EVALUATED = (artifacts.EVALUATION, artifacts.OUTCOMES, artifacts.EVALUATION_CALLS)


def renamed(name: str, copy: int) -> str:
    return f"{copy:02x}{name}" if copy and name else name


def copies(rows: list[Any], times: int) -> Iterator[Any]:
    """Every row `times` times, in blocks, with ids and parents of its own."""
    for copy in range(times):
        for row in rows:
            changes: dict[str, Any] = {"id": renamed(row.id, copy)}
            for name in ("parents", "repaired_from"):
                if hasattr(row, name):
                    changes[name] = tuple(renamed(one, copy) for one in getattr(row, name))
            if isinstance(prompt := getattr(row, "prompt", None), str):
                changes["prompt"] = renamed(prompt, copy)
            yield dataclasses.replace(row, **changes)


def make(source: Path, folder: Path, times: int, evaluation: int) -> dict[str, int]:
    """Write the run; returns rows and calls by artifact."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("model", "checkpoint*", "*.parquet", "*.jsonl", "report.html"))
    counts: dict[str, int] = {}
    for path in sorted(p for p in source.glob("[0-9]*/*") if p.name in artifacts.ALL):
        artifact, number = artifacts.ALL[path.name], times
        if path.parent.name.endswith("-data") or artifact in EVALUATED:
            number = evaluation if artifact in EVALUATED else 1
        target = folder / path.parent.name
        if isinstance(artifact, artifacts.Artifact):
            num = artifact.write(target, copies(artifact.read(path.parent), number))
        elif isinstance(artifact, artifacts.JsonArtifact):
            outcomes = artifact.read(path.parent)
            artifact.write(target, {k: {renamed(i, c): v for c in range(number) for i, v in of.items()} for k, of in outcomes.items()})
            continue
        else:
            with Journal(path, read_only=True) as old, Journal(target / path.name) as new:
                for copy in range(number):
                    for record in old.values():
                        parents = {"parents": [renamed(p, copy) for p in record["parents"]]} if record.get("parents") else {}
                        new.append({**record, "id": renamed(record["id"], copy), **parents})
                num = len(new)
        counts[path.name] = counts.get(path.name, 0) + num
    for marker in folder.glob("[0-9]*/done.json"):
        write_json(marker, read_json(marker) | {GENERATED: generated_tokens(marker.parent)})
    for path in source.glob("*/train/metrics.jsonl"):
        shutil.copy(path, folder / path.parent.parent.name / "train")
    return counts


def measure(command: list[str]) -> dict[str, Any]:
    """CPU seconds and peak memory of a child."""
    child = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    said = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}.")
    facts = {"cpu_s": round(usage.ru_utime + usage.ru_stime, 2), "peak_mib": usage.ru_maxrss // 1024}
    return facts | {"last_line": said.strip().rpartition("\n")[2][:80]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    maker = commands.add_parser("make")
    maker.add_argument("source", type=Path)
    maker.add_argument("folder", type=Path)
    maker.add_argument("--times", type=int, default=20)
    maker.add_argument("--evaluation", type=int, default=1, help="how many times the evaluation's prompts and answers")
    measurer = commands.add_parser("measure")
    measurer.add_argument("folder", type=Path)
    measurer.add_argument("--only", choices=[*COMMANDS, "journals"], action="append")
    options = parser.parse_args()
    if options.command == "make":
        print(json.dumps(make(options.source, options.folder, options.times, options.evaluation)))
        return
    import pyarrow.parquet as pq

    folder = next(p.parent for p in sorted(options.folder.glob("*/kept.parquet")))
    row = pq.read_table(folder / artifacts.KEPT.file, columns=["id"])["id"][-1].as_py()
    for name, words in COMMANDS.items():
        if not options.only or name in options.only:
            filled = [w.format(run=options.folder, row=row) for w in words]
            print(json.dumps({"command": name, **measure(["-m", "gristmill.cli", *filled])}), flush=True)
    if not options.only or "journals" in options.only:
        print(json.dumps({"command": "journals", **measure(["-c", OPEN_JOURNALS, str(options.folder)])}))


if __name__ == "__main__":
    main()
