"""Studio with many rows: time to expand a file, of a page by key, of filters and orders, and the most memory that the server held.

python bench/studio.py [--rows 100000]
"""

import argparse
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from gristmill.data.chat import Message
from gristmill.data.rows import Response, write_rows
from gristmill.studio.sources import Sources

WORDS = [f"word{n}" for n in range(5000)]


def write(path: Path, num: int) -> None:
    """Answers of about 1.5 KB each, four to a prompt."""
    rng = random.Random(0)
    write_rows(
        path,
        (
            Response(
                f"r{n}",
                f"p{n // 4}",
                f"task{n % 7}",
                (Message("user", f"Question {n // 4}?"),),
                " ".join(rng.choices(WORDS, k=180)),
                "m",
                1.0,
                n % 4,
                200,
                -1.0,
                True,
                score=rng.random(),
            )
            for n in range(num)
        ),
    )


def timed(work: Callable[[], object], times: int = 5) -> float:
    """The least milliseconds of several runs."""
    found = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return round(1000 * min(found), 1)


def private_mib() -> float:
    """Memory of this process that is not a mapped file, in MiB."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["RssAnon"].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        if (child := os.fork()) == 0:  # what making the rows takes is not the server's
            write(path, args.rows)
            os._exit(0)
        os.waitpid(child, 0)
        sources = Sources(Path(folder), Path(folder) / "cache")
        before = private_mib()
        name = "rows.parquet"
        out = {"rows": args.rows, "file_mib": round(path.stat().st_size / 2**20, 1), "first_page_ms": timed(lambda: sources.page(name), 1)}
        out["expand_ms"] = timed(lambda: sources.page(name, after=0), 1)
        out["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        out["page_ms"] = timed(lambda: sources.page(name, after=args.rows * 9 // 10))
        filters = {"column": "task = task3 and score < 0.1", "text": 'text ~ "word123 word"'}
        for kind, text in filters.items():
            out[f"filter_{kind}_ms"] = timed(lambda text=text: (sources._orders.clear(), sources.page(name, filter=text)))  # type: ignore[misc]
        out["order_ms"] = timed(lambda: (sources._orders.clear(), sources.page(name, sort="-score")))
        out["last_page_of_order_ms"] = timed(
            lambda: sources.page(name, sort="-score", after=sources.page(name, sort="-score")["rows"][-1]["place"])
        )
        out |= {
            "private_before_mib": round(before),
            "private_mib": round(private_mib()),
            "peak_after_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        }
    json.dump(out, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
