"""Writing rows through an endpoint: gristmill beside a bare aiohttp loop with a journal, against the same server.

    PYTHONPATH=src python bench/synth.py --rows 20000

The server of the tests answers after `--latency` seconds, on core 0; each client is a process of its own on core 1. One line of JSON for
each client and a summary. CPU is the whole process's, start-up included; memory is its peak.
"""

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SERVER = Path(__file__).parent.parent / "tests" / "generation" / "mock_endpoint.py"
CONCURRENCY = 64


def prompt(row: int) -> str:
    return f"[row {row:06d}] Write a short explanation of the tides for a reader who has {row % 7 + 1} minutes, with one surprising fact."


async def gristmill(url: str, rows: int, journal: Path) -> None:
    from gristmill.data.chat import Message
    from gristmill.generation.api import Request
    from gristmill.generation.cached import CachedClient
    from gristmill.generation.endpoint import Endpoint, Target
    from gristmill.runs.journal import Journal

    requests = (Request(str(row), (Message("user", prompt(row)),)) for row in range(rows))
    with Journal(journal) as book:
        async with Endpoint([Target(url, "mock")], concurrency=CONCURRENCY) as endpoint:
            async for _ in CachedClient(endpoint, book).stream(requests):
                pass


async def loop(url: str, rows: int, journal: Path) -> None:
    """The least that such a client can do: no retries, no adapting, a line for each answer."""
    import aiohttp

    todo = iter(range(rows))
    with journal.open("w", buffering=1) as book:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CONCURRENCY)) as session:

            async def worker() -> None:
                for row in todo:
                    body = {"model": "mock", "messages": [{"role": "user", "content": prompt(row)}]}
                    async with session.post(f"{url}/chat/completions", json=body) as reply:
                        answer = (await reply.json())["choices"][0]["message"]["content"]
                    book.write(json.dumps({"id": row, "out": answer}) + "\n")

            await asyncio.gather(*(worker() for _ in range(CONCURRENCY)))


CLIENTS = {"loop": loop, "gristmill": gristmill}


def measure(client: str, url: str, rows: int) -> dict[str, Any]:
    """Run one client in a new process and look at what it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "journal.jsonl"
        command = [sys.executable, __file__, "--client", client, "--url", url, "--rows", str(rows), "--journal", str(journal)]
        started = time.monotonic()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        seconds = time.monotonic() - started
        answers = {int(r["id"]): r["out"] for line in journal.read_text().splitlines() if (r := json.loads(line))}
        right = sum(f"[row {row:06d}]" in str(answers.get(row)) for row in range(rows))
    cpu, peak = json.loads(done.stdout)
    facts = {"client": client, "rows": rows, "right": right, "rows_per_second": round(rows / seconds)}
    return facts | {"cpu_ms_per_row": round(1000 * cpu / rows, 3), "peak_mib": round(peak / 1024)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--latency", type=float, default=0.05)
    parser.add_argument("--client", choices=CLIENTS, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--journal", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        asyncio.run(CLIENTS[options.client](options.url, options.rows, options.journal))
        usage = resource.getrusage(resource.RUSAGE_SELF)
        print(json.dumps([usage.ru_utime + usage.ru_stime, usage.ru_maxrss]))
        return
    command = [sys.executable, str(SERVER), "--latency", str(options.latency), "--forget"]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(server.pid, {min(os.sched_getaffinity(0))})
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
        results = []
        for client in CLIENTS:
            results.append(measure(client, url, options.rows))
            print(json.dumps(results[-1]), flush=True)
    finally:
        server.terminate()
    ours, bare = (next(r for r in results if r["client"] == name) for name in ("gristmill", "loop"))
    print(json.dumps({"summary": {"cpu_ratio": round(ours["cpu_ms_per_row"] / bare["cpu_ms_per_row"], 2)}}))


if __name__ == "__main__":
    main()
