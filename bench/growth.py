"""How hot paths over data grow: CPU seconds and peak memory at 1, 2, 4 and 8 times a small size, and the straight line through them.

    PYTHONPATH=src OMP_NUM_THREADS=1 python bench/growth.py curate blend order journal
    PYTHONPATH=src OMP_NUM_THREADS=1 python bench/growth.py report --run runs/miniature      # a finished run

curate: documents of 2,500 letters, cleaned, exact and near duplicates dropped (a twentieth are), personal data found; one worker. blend:
the same documents as tokens of the miniature. order: the order of a blend's documents, which one process draws. journal: opening one of
records of 1,500 letters, as every restart does. report: `gristmill report` on a run whose rows were written many times (report.py). Each is
a process of its own, start-up included. Prints a line of JSON for each size, and one for the line: what a document, record or row costs.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SIZES = (1, 2, 4, 8)
OF_ONE = {
    "curate": 4_000,
    "blend": 4_000,
    "order": 1_000_000,
    "journal": 25_000,
    "report": 22_885,
}  # documents, records, answers of the miniature
# A small process that starts the one to be measured: a child's peak includes that of whoever forked it.
LAUNCH = """
import json, resource, subprocess, sys
status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"cpu_seconds": round(used.ru_utime + used.ru_stime, 2), "peak_mib": used.ru_maxrss // 1024}))
sys.exit(status)
"""
DRAW = """
import sys; import numpy as np; from gristmill.curate.blend.blend import Blend, draw
num, source = int(sys.argv[1]), {"name": "one", "inputs": ["/"], "weight": 1}
recipe, lengths = Blend.model_validate({"tokenizer": "/", "sources": [source], "tokens": num * 1000}), [np.full(num, 1000)]
order, *_ = draw(recipe, lengths)
np.save(sys.argv[2], order)
np.save(sys.argv[2], np.cumsum(np.concatenate(lengths)[order]))
"""
OPEN = "import sys; from pathlib import Path; from gristmill.runs.journal import Journal; print(len(Journal(Path(sys.argv[1]))))"


def write_documents(path: Path, num: int) -> None:
    """Documents of words that only few others have, so that they are no duplicates; every twentieth is nearly the one before."""
    draw, last = random.Random(num), ""
    common = ["the", "of", "and", "to", "in", "a", "is", "that", "for", "it"]
    with path.open("w") as file:
        for number in range(num):
            words = [
                draw.choice(common) if draw.random() < 0.4 else f"{draw.choice('bcdfglmnprst')}{draw.randrange(10**5)}" for _ in range(460)
            ]
            last = f"{last} Again." if number % 20 == 19 else " ".join(words) + "."
            file.write(json.dumps({"id": f"d{number}", "text": last}) + "\n")


def curate(folder: Path, times: int) -> list[str]:
    write_documents(folder / "in.jsonl", times * OF_ONE["curate"])
    steps = [{"step": "clean"}, {"step": "exact"}, {"step": "fuzzy"}, {"step": "pii"}]
    recipe = {"kind": "curation", "inputs": [str(folder / "in.jsonl")], "reading": {"batch_bytes": 8_000_000}, "workers": 1, "steps": steps}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return ["-m", "gristmill", "curate", str(folder / "recipe.yaml"), "--out", str(folder / "out"), "--quiet"]


def blend(folder: Path, times: int) -> list[str]:
    from gristmill.miniature.base import BASE

    write_documents(folder / "in.jsonl", times * OF_ONE["blend"])
    source = {"name": "one", "inputs": [str(folder / "in.jsonl")], "weight": 1}
    recipe = {"kind": "blend", "tokenizer": str(BASE), "sources": [source], "tokens": times * OF_ONE["blend"] * 800, "workers": 1}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return ["-m", "gristmill", "blend", str(folder / "recipe.yaml"), "--out", str(folder / "out"), "--quiet"]


def order(folder: Path, times: int) -> list[str]:
    return ["-c", DRAW, str(times * OF_ONE["order"]), str(folder / "order.npy")]


def journal(folder: Path, times: int) -> list[str]:
    with (folder / "calls.jsonl").open("w") as file:
        for number in range(times * OF_ONE["journal"]):
            file.write(json.dumps({"id": f"{number * 2654435761 % 2**64:016x}", "text": "word " * 300}) + "\n")
    return ["-c", OPEN, str(folder / "calls.jsonl")]


def report(folder: Path, times: int, run: Path) -> list[str]:
    make = [sys.executable, str(Path(__file__).with_name("report.py")), "make", str(run), str(folder / "run"), "--times", str(times)]
    subprocess.run(make, stdout=subprocess.DEVNULL, check=True)
    return ["-m", "gristmill", "report", str(folder / "run")]


def measure(name: str, prepare: Callable[[Path, int], list[str]]) -> None:
    found = []
    for times in SIZES:
        with tempfile.TemporaryDirectory() as place:
            command = [sys.executable, "-c", LAUNCH, sys.executable, *prepare(Path(place), times)]
            facts: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        found.append({"path": name, "number": times * OF_ONE[name], **facts})
        print(json.dumps(found[-1]), flush=True)
    line: dict[str, Any] = {"path": name}
    for key, factor, unit in (("cpu_seconds", 1e6, "microseconds"), ("peak_mib", 2**20, "bytes")):
        slope, start = np.polyfit([one["number"] for one in found], [one[key] for one in found], 1)
        worst = max(abs(start + slope * one["number"] - one[key]) / one[key] for one in found)
        line |= {f"{key} of none": round(start, 1), f"{unit} of one": round(slope * factor, 1), f"{key}: largest error": round(worst, 3)}
    print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", choices=OF_ONE)
    parser.add_argument("--run", type=Path, help="a finished run of the miniature, for report")
    args = parser.parse_args()
    if "report" in args.paths and args.run is None:
        parser.error("report needs --run")
    prepare = {
        "curate": curate,
        "blend": blend,
        "order": order,
        "journal": journal,
        "report": lambda folder, times: report(folder, times, args.run),
    }
    for name in args.paths:
        measure(name, prepare[name])


if __name__ == "__main__":
    main()
