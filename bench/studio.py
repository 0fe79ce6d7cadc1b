"""Studio with many rows and people: a real `gristmill studio`, asked over HTTP: time of pages, memory, and whether an answer is lost.

PYTHONPATH=src:. python bench/studio.py [--rows 100000] [--people 10] [--kills 3] [--browser] [--database postgresql://..]
PYTHONPATH=src:. python bench/studio.py --paints 5

Milliseconds of `rows` are the least of five requests, none of them answered from what the server remembers. `peak_mib` is the server's
VmHWM. `people` all rate at once without a pause, each answer sent twice as if the first reply had been lost, until nothing is left of 100
items that need three each; its milliseconds are from sending an answer to its acknowledgement. Meanwhile the server is killed (SIGKILL)
--kills times and started again; what got no reply is sent anew, as the page does. `page`, of --browser, which needs Debian's chromium, is
the list of rows from the beginning of its navigation to its first paint, before the file is expanded and after; and one person at keys:
from the fifth to the next item painted, and to "saved", after 20 items. With --paints nothing else is measured: so many times the first
list of a server that has just begun, in a browser that has just begun, with the browser's CPU seconds.
"""

import argparse
import contextlib
import http.client
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode
from uuid import uuid4

from gristmill.data.chat import Message
from gristmill.data.rows import Response, write_rows

if TYPE_CHECKING:
    from tests.studio.browser import Browser

WORDS = [f"word{n}" for n in range(5000)]
NAME = "rows.parquet"
NUM_KEYED = 20
KEYS = """(async () => {
  const item = () => document.querySelector("[data-item]")?.dataset.item;
  const press = (key) => document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  const until = (done) => new Promise((go) => { const look = () => (done() ? setTimeout(go) : requestAnimationFrame(look)); look(); });
  const saved = () => document.querySelector("[data-state=saved]");
  const out = [];
  for (let n = 0; n < NUM; n++) {
    const before = item();
    for (const key of "0123") press(key);
    const started = performance.now();
    press("4");
    await until(() => item() && item() !== before);
    const painted = performance.now() - started;
    await until(saved);
    out.push([painted, performance.now() - started]);
    await new Promise((go) => setTimeout(go, 200));
  }
  return out;
})()"""
PAINTED = """(async () => {
  while (!document.querySelector(".list tbody tr")) await new Promise(requestAnimationFrame);
  await new Promise((go) => requestAnimationFrame(() => setTimeout(go)));
  return performance.now();
})()"""
NUM_PROMPTS, NEED = 50, 3  # of the project that people work in: two answers each


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


class Client:
    """Requests of somebody who is logged in."""

    def __init__(self, origin: str, **body: str):
        self.origin = origin
        self.headers = {"Origin": origin, "Content-Type": "application/json"}
        with self._open("POST", "/session", body) as reply:
            self.headers["Cookie"] = reply.headers["Set-Cookie"].split(";")[0]

    def _open(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        return urllib.request.urlopen(urllib.request.Request(f"{self.origin}/studio/api{path}", data, self.headers, method=method))

    def ask(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        with self._open(method, path, body) as reply:
            return dict(json.load(reply))

    def insist(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """Ask, again and again while there is no server, as the page does."""
        while True:
            try:
                return self.ask(method, path, body)
            except urllib.error.HTTPError:
                raise
            except (OSError, http.client.HTTPException):
                time.sleep(0.1)


class Server:
    """A running `gristmill studio`, and its owner."""

    def __init__(self, folder: Path, database: str):
        self.command = [sys.executable, "-m", "gristmill.cli", "studio", str(folder)]
        self.command += ["--database", database] if database else []
        started = time.perf_counter()
        token = self.start("0")
        self.start_ms = round(1000 * (time.perf_counter() - started))
        self.owner = Client(self.origin, token=token)

    def start(self, port: str) -> str:
        """Returns the owner's token when the server answers."""
        self.process = subprocess.Popen([*self.command, "--port", port], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        self.origin, _, token = self.process.stdout.readline().split()[-1].partition("/#token=")
        return token

    def kill(self) -> None:
        """End the server without a warning, and start it again at the same port."""
        self.process.kill()
        self.process.wait()
        self.start(self.origin.rpartition(":")[2])

    def page(self, **query: Any) -> dict[str, Any]:
        return self.owner.ask("GET", "/rows?" + urlencode({"source": NAME, **query}))

    def make_project(self, kind: str, num: int) -> str:
        return str(self.owner.ask("POST", "/projects", {"kind": kind, "source": NAME, "num": num, "need": NEED})["id"])

    def annotator(self, name: str) -> Client:
        token = self.owner.ask("POST", "/invitations", {"role": "annotator"})["token"]
        return Client(self.origin, token=token, name=name, password="a long password")

    def mib(self, name: str) -> int:
        """A field of the process's status, in MiB: VmHWM is the peak of all resident pages, RssAnon what is no mapped file."""
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines())
        return int(fields[name].split()[0]) >> 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--people", type=int, default=10)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--browser", action="store_true")
    parser.add_argument("--paints", type=int, default=0)
    parser.add_argument("--database", default="", help="an empty one; default: SQLite")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / NAME
        write(path, args.rows)
        if args.paints:
            json.dump([first_painted(Path(folder)) for _ in range(args.paints)], sys.stdout)
            return print()
        server = Server(Path(folder), args.database)
        try:
            page = {"first_list_painted_ms": list_painted(server)} if args.browser else {}
            measured = {"rows": measure(server, args.rows)}
            if args.browser:
                page["list_painted_ms"] = min(list_painted(server) for _ in range(3))
            measured["people"] = at_work(server, args.people, args.kills)
            if args.browser:
                measured["page"] = page | at_keys(server)
        finally:
            server.process.terminate()
            server.process.wait()
        json.dump({"num_rows": args.rows, "file_mib": round(path.stat().st_size / 2**20, 1), **measured}, sys.stdout, indent=1)
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

    out: dict[str, Any] = {"start_ms": server.start_ms, "start_mib": server.mib("VmHWM"), "first_page_ms": timed(1)}
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
        server.make_project(kind, 200)
    return out | {"peak_mib": server.mib("VmHWM"), "private_mib": server.mib("RssAnon")}


def at_work(server: Server, num: int, kills: int) -> dict[str, Any]:
    """Annotators who answer at once until nothing is left, while the server is killed: what is stored, counted from the export."""
    project = server.make_project("rate", NUM_PROMPTS)
    so_far = list[str]()
    content = {"helpfulness": 3, "correctness": 3, "coherence": 4, "complexity": 1, "verbosity": 1}

    def work(client: Client) -> list[float]:
        seconds = list[float]()
        while items := client.insist("GET", f"/queue?project={project}&n=1")["items"]:
            answers = [{"id": str(uuid4()), "item": item["id"], "version": 1, "content": content, "guideline": 1} for item in items]
            sent = {"answers": [answer | {"seconds": 1.0, "keys": 5} for answer in answers]}
            started = time.perf_counter()
            said = client.insist("POST", "/answers", sent)
            seconds.append(time.perf_counter() - started)
            so_far.extend(result["item"] for result in said["results"] if result["status"] == 200)
            client.insist("POST", "/answers", sent)
        return seconds

    def kill() -> None:
        for n in range(1, kills + 1):
            while len(so_far) < 2 * NUM_PROMPTS * NEED * n // (kills + 1):
                time.sleep(0.001)
            server.kill()

    clients = [server.annotator(f"annotator {n}") for n in range(num)]
    killer = threading.Thread(target=kill)
    killer.start()
    with ThreadPoolExecutor(num) as pool:
        done = list(pool.map(work, clients))
    killer.join()
    with server.owner._open("GET", "/export/ratings.jsonl") as reply:
        rows = [json.loads(line) for line in reply.read().splitlines()]
    by_item, by_person = Counter(row["item"] for row in rows), Counter((row["item"], row["annotator"]) for row in rows)
    seconds = sorted(itertools.chain.from_iterable(done))
    return {
        "kills": kills,
        "acknowledged": len(so_far),
        "stored": len(rows),
        "acknowledged_and_not_stored": (Counter(so_far) - by_item).total(),
        "items": len(by_item),
        "items_with_more_or_less_than_needed": sum(n != NEED for n in by_item.values()),
        "twice_by_one_person": sum(n > 1 for n in by_person.values()),
        "median_ms": round(1000 * seconds[len(seconds) // 2], 1),
        "most_ms": round(1000 * seconds[-1], 1),
    }


def first_painted(folder: Path) -> dict[str, float]:
    """Milliseconds to the first list of a new server, and the browser's CPU seconds until then."""
    from tests.studio.browser import Browser

    shutil.rmtree(folder / "studio", ignore_errors=True)
    server, browser = Server(folder, ""), Browser()
    try:
        time.sleep(1)  # both have begun
        before = cpu_seconds(browser.process.pid)
        painted = painted_in(browser, server)
        return {"ms": painted, "browser_cpu": round(cpu_seconds(browser.process.pid) - before, 2)}
    finally:
        browser.close()
        server.process.terminate()
        server.process.wait()


def cpu_seconds(root: int) -> float:
    """Of a process and all that it has begun."""
    seconds, parents = dict[int, float](), dict[int, int]()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            number = int(path.parent.name)
            parents[number], seconds[number] = int(fields[1]), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    mine, news = {root}, {root}
    while news:
        news = {child for child, parent in parents.items() if parent in news} - mine
        mine |= news
    return sum(seconds.get(number, 0.0) for number in mine)


def list_painted(server: Server) -> float:
    """Milliseconds until the first rows are painted, in a browser of its own."""
    from tests.studio.browser import Browser

    browser = Browser()
    try:
        return painted_in(browser, server)
    finally:
        browser.close()


def painted_in(browser: "Browser", server: Server) -> float:
    page = browser.page(f"{server.origin}/#/rows", server.owner.headers["Cookie"])
    page.wait("location.protocol === 'http:' && document.body")
    return round(page.js(PAINTED), 1)


def at_keys(server: Server) -> dict[str, Any]:
    """One person who rates in a browser."""
    from tests.studio.browser import Browser

    project = server.make_project("rate", 2 * NUM_KEYED)
    browser = Browser()
    try:
        page = browser.page(f"{server.origin}/#/work/{project}", server.annotator("at keys").headers["Cookie"])
        page.wait("document.querySelector('[data-item]')")
        times = page.js(KEYS.replace("NUM", str(NUM_KEYED)))
    finally:
        browser.close()
    middle = [sorted(each)[NUM_KEYED // 2] for each in zip(*times, strict=True)]
    return {"items": len(times), "median_painted_ms": round(middle[0], 1), "median_saved_ms": round(middle[1], 1)}


if __name__ == "__main__":
    main()
