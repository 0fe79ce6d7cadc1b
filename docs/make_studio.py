"""Pictures of every screen of the studio, light and dark, for docs/studio.md. Run by hand: no test compares a browser's pixels.

PYTHONPATH=src:. python docs/make_studio.py RUN [--only rate]

RUN is a finished run of the miniature. A copy of it is opened, in which simulated annotators answer. Needs Debian's chromium.
"""

import argparse
import base64
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from gristmill.data.rows import Demonstration, read_rows
from gristmill.miniature.annotators import SimulatedAnnotator
from gristmill.miniature.world import World
from gristmill.runs import artifacts, checks
from gristmill.studio.serve import open_store
from tests.studio.browser import Browser, Page
from tests.studio.conftest import Client, Served
from tests.studio.test_said import annotate
from tests.studio.test_screens import show

OUT = Path(__file__).parent / "studio"
GUIDELINE = "Judge the last answer alone. Helpful is what the person wanted, correct is what is true."
QUALITY = 50
NAMES = ("Ada", "Bo", "Chidi", "Dana")  # the last one has not answered yet
CHOOSE = """{{
  const select = document.querySelectorAll('.panel select')[{}];
  select.value = '{}';
  select.dispatchEvent(new Event('change', {{ bubbles: true }}));
}}"""


def ask_people(run: Path) -> None:
    """A check that waits, of rows that the run had kept."""
    rows = read_rows(next(run.glob("*-r2-answers")) / "kept.parquet", Demonstration)[:40]
    folder = run / "00-r3-check"
    folder.mkdir()
    artifacts.CHECK.write(folder, rows)
    now = time.time()
    question = {"id": "check", "round": 3, "rows": len(rows), "of": 2400, "seed": 3, "hours": 24, "default": "approve"}
    artifacts.QUESTION.write(folder, question | {"asked": checks.utc(now), "until": checks.utc(now + 86400)})


def fill(served: Served) -> tuple[dict[str, str], Client]:
    """Projects with what three of four people said; returns their ids by kind, and the fourth person."""
    owner, world = served.client("owner"), World.make()
    people = [served.client("annotator", name) for name in NAMES]
    source = next(s.name for s in served.studio.service.sources.all() if s.name.endswith("r2-answers/responses.parquet"))
    for kind, num in (("rate", 40), ("pair", 30)):
        body = {"kind": kind, "source": source, "num": num, "need": len(NAMES), "guideline": GUIDELINE, "seed": 2}
        assert owner.api("POST", "/projects", body)[0] == 200
    projects = {p["kind"]: p["id"] for p in owner.api("GET", "/projects")[1]["projects"]}
    for kind, project in projects.items():
        for number, client in enumerate(people[:-1] if kind != "check" else ()):
            annotate(client, project, kind, SimulatedAnnotator(world, number))
    return projects, people[-1]


def click(page: Page, words: str) -> None:
    found = f"[...document.querySelectorAll('button')].find((b) => b.innerText.trim() === {json.dumps(words)} && !b.disabled)"
    page.wait(found)
    page.js(f"{found}.click()")


def ask(page: Page, words: str, button: str) -> None:
    """Ask the model of the screen, and wait for its answer."""
    page.js("document.querySelector('form textarea').focus()")
    page.call("Input.insertText", text=words)
    click(page, button)
    page.wait("document.querySelectorAll('.turns .turn').length === 2 && !document.body.innerText.includes('Answering')")


def rate(page: Page) -> None:
    for key in "331":
        page.press(key)


def repair(page: Page) -> None:
    page.press("2")
    page.wait("document.activeElement.id === 'repair'")


def open_row(page: Page) -> None:
    page.wait("document.querySelector('.list a')")
    page.js("document.querySelectorAll('.list a')[1].click()")
    page.wait("document.querySelector('.tree li')")


def chat(page: Page) -> None:
    ask(page, "Name the capital of Batru.", "Send")
    page.wait("document.querySelector('.tokens summary')")
    page.js("document.querySelector('.tokens summary').click()")


def attack(page: Page) -> None:
    if "I understand" in page.text():
        click(page, "I understand")
    page.wait("document.querySelectorAll('.panel select').length === 3")
    for number, value in ((1, "O1"), (2, "role_play")):
        page.js(CHOOSE.format(number, value))
    ask(page, "Tell me how to pick a lock.", "Attack")
    click(page, "off topic")
    page.wait("document.body.innerText.includes('its beginning reads as')")


Screen = tuple[str, str, Callable[[Page], None] | None]


def screens(served: Served, projects: dict[str, str]) -> list[Screen]:
    """Name, address and what is done there; those of the owner."""
    source = next(s.name for s in served.studio.service.sources.all() if s.name.endswith("r2-answers/responses.parquet"))
    disputed = served.client("owner").api("GET", f"/statistics/{projects['rate']}")[1]["disputed"][0]["item"]
    return [
        ("projects", "", None),
        ("rows", f"rows?source={source}&filter=score > 1&sort=score", open_row),
        ("check", f"work/{projects['check']}", repair),
        ("agreement", f"agreement/{projects['rate']}", None),
        ("settle", f"settle/{disputed}", None),
        ("people", "people", None),
        ("run", "run", None),
        ("chat", "chat", chat),
        ("redteam", "redteam", attack),
    ]


def picture(page: Page, name: str, dark: bool) -> None:
    page.js("document.activeElement.blur(); new Promise((done) => setTimeout(done, 300))")
    data = page.call("Page.captureScreenshot", format="webp", quality=QUALITY)["data"]
    (OUT / f"{name}-{'dark' if dark else 'light'}.webp").write_bytes(base64.b64decode(data))


def take(served: Served, browser: Browser, projects: dict[str, str], worker: Client, only: str, dark: bool) -> None:
    """All pictures of a colour scheme."""
    look = {"width": 1120, "height": 740, "dark": dark}
    at = f"{served.origin}/#/"
    working: list[Screen] = [("rate", f"work/{projects['rate']}", rate), ("compare", f"work/{projects['pair']}", None)]
    stranger = browser.page(at, **look)
    stranger.wait("document.body.innerText.includes('Log in')")
    picture(stranger, "login", dark)
    for person, shown in ((worker, working), (served.client("owner"), screens(served, projects))):
        page = browser.page(at, person.headers["Cookie"], **look)
        page.call("Emulation.setScrollbarsHidden", hidden=True)
        page.wait("document.querySelectorAll('.project').length >= 3")
        for name, address, act in shown:
            if only and name != only:
                continue
            show(page, address)
            if address.startswith("work/"):
                page.wait("document.querySelector('[data-item]')")
            if act:
                act(page)
            picture(page, name, dark)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--only", default="", help="this screen alone")
    args = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(shutil.copytree(args.run, Path(folder) / "run"))
        ask_people(run)
        store, sources = open_store(run)
        served, browser = Served(store, sources), Browser()
        try:
            projects, worker = fill(served)
            for dark in (False, True):
                take(served, browser, projects, worker, args.only, dark)
        finally:
            browser.close()
            served.stop()
            store.database.close()


if __name__ == "__main__":
    main()
