"""Studio with many rows: a real `gristmill studio`, asked over HTTP: time of pages, filters and orders, and the most memory that it held.

python bench/studio.py [--rows 100000]

Milliseconds are the least of five requests, none of them answered from what the server remembers. `peak_mib` is the server's VmHWM.
"""

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from gristmill.data.chat import Message
from gristmill.data.rows import Response, write_rows

WORDS = [f"word{n}" for n in range(5000)]
NAME = "rows.parquet"


def write(path: Path, num: int) -> None:
    """Answers of about 1.3 KB each, four to a prompt."""
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


class Server:
    """A running `gristmill studio`, and its owner's requests."""

    def __init__(self, folder: Path):
        command = [sys.executable, "-m", "gristmill.cli", "studio", str(folder), "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        self.origin, _, token = self.process.stdout.readline().split()[-1].partition("/#token=")
        self.headers = {"Origin": self.origin, "Content-Type": "application/json"}
        with self._open("POST", "/session", {"token": token}) as reply:
            self.headers["Cookie"] = reply.headers["Set-Cookie"].split(";")[0]

    def _open(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        return urllib.request.urlopen(urllib.request.Request(f"{self.origin}/studio/api{path}", data, self.headers, method=method))

    def page(self, **query: Any) -> dict[str, Any]:
        with self._open("GET", "/rows?" + urlencode({"source": NAME, **query})) as reply:
            return dict(json.load(reply))

    def make_project(self, kind: str) -> None:
        with self._open("POST", "/projects", {"kind": kind, "source": NAME, "num": 200, "need": 3}) as reply:
            reply.read()

    def mib(self, name: str) -> int:
        """A field of the process's status, in MiB: VmHWM is the peak of all resident pages, RssAnon what is no mapped file."""
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines())
        return int(fields[name].split()[0]) >> 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / NAME
        write(path, args.rows)
        server = Server(Path(folder))
        try:
            measured = measure(server, args.rows)
        finally:
            server.process.terminate()
            server.process.wait()
        json.dump({"rows": args.rows, "file_mib": round(path.stat().st_size / 2**20, 1), **measured}, sys.stdout, indent=1)
    print()


def measure(server: Server, rows: int) -> dict[str, Any]:
    """Figures of one server, in the order in which a person would cause them."""
    fresh = itertools.count()  # no two filters are the same

    def timed(times: int = 5, **query: Any) -> float:
        found = []
        for _ in range(times):
            asked = {name: value.replace("FRESH", str(next(fresh))) if isinstance(value, str) else value for name, value in query.items()}
            started = time.perf_counter()
            server.page(**asked)
            found.append(time.perf_counter() - started)
        return round(1000 * min(found), 1)

    out: dict[str, Any] = {"start_mib": server.mib("VmHWM"), "first_page_ms": timed(1)}
    out["expand_ms"] = timed(1, after=0)
    out["list_peak_mib"] = server.mib("VmHWM")
    out["page_ms"] = timed(after=rows * 9 // 10)
    out["filter_column_ms"] = timed(filter="task = task3 and score < 0.1FRESH")
    out["order_ms"] = timed(filter="score < 10FRESH", sort="-score")
    last = server.page(sort="-score")["rows"][-1]["place"]
    out["next_page_of_order_ms"] = timed(sort="-score", after=last)
    out["columns_peak_mib"] = server.mib("VmHWM")
    out["filter_text_ms"] = timed(filter='text ~ "word123 wordFRESH"')
    out["text_peak_mib"] = server.mib("VmHWM")
    for kind in ("rate", "pair"):
        server.make_project(kind)
    return out | {"peak_mib": server.mib("VmHWM"), "private_mib": server.mib("RssAnon")}


if __name__ == "__main__":
    main()
