"""Screens of a run in a real browser: accessibility by axe, whole tasks by keyboard alone, hostile texts, streaming that paints seldom."""

import json
import multiprocessing
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from gristmill.data.chat import Message
from gristmill.data.rows import Demonstration, read_rows
from gristmill.runs import artifacts, checks
from gristmill.studio import asking
from gristmill.studio import made as rows_made
from gristmill.studio.apart import Told, apart
from gristmill.studio.serve import open_store
from tests.studio.browser import CHROMIUM, Browser, Page
from tests.studio.conftest import RATING, Served, answer
from tests.studio.test_browser import HOSTILE, ITEM, SAVED, harmless

pytestmark = pytest.mark.skipif(not CHROMIUM.is_file(), reason="no /usr/bin/chromium: the studio's page is not tested")
AXE = Path(__file__).parent / "vendor" / "axe.min.js"
LEVELS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
READY = "!document.body.innerText.includes('Loading \\u2026') && !document.body.innerText.includes('Computing')"


def ask_people(run: Path, rows: list[Demonstration], number: int) -> None:
    """What a run writes when it waits for a check."""
    folder = run / f"00-r{number}-check"
    folder.mkdir(parents=True)
    artifacts.CHECK.write(folder, rows)
    question = {"id": f"check {number}", "round": number, "rows": len(rows), "of": 90, "seed": number, "hours": 24, "default": "approve"}
    artifacts.QUESTION.write(folder, question | {"asked": checks.utc(), "until": checks.utc(time.time() + 86400)})


@pytest.fixture(scope="module")
def desk(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A studio of a finished run with projects, answers, attacks, and a check of hostile rows that waits."""
    run = Path(shutil.copytree(finished, tmp_path_factory.mktemp("screens") / "run"))
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("name: tiny", f"name: {json.dumps(HOSTILE[1])}", 1))
    kept = read_rows(next(run.glob("*-r1-answers")) / "kept.parquet", Demonstration)[:6]
    ask_people(
        run, [replace(r, messages=(Message("user", HOSTILE[n]), Message("assistant", HOSTILE[n + 6]))) for n, r in enumerate(kept)], 2
    )
    store, sources = open_store(run)
    made = Served(store, sources)
    owner, name = store.owner(), next(s.name for s in sources.all() if s.name.endswith("r1-answers/responses.parquet"))
    for kind in ("rate", "pair"):
        items = sources.choose_items(name, kind, num=8, seed=0)
        project = store.create_project(kind, kind, items, source=name, need=2, guideline="be kind", by=owner)
        for n in range(2):
            person = store.add_person(f"{kind} {n}", "annotator")
            for item in store.deal(project, person, 3):
                content = RATING | {"helpfulness": 4 * n} if kind == "rate" else {"preference": n - 1, "neither": False}
                store.submit(person, answer(item["id"], **content))
    for n, outcome in enumerate(rows_made.OUTCOMES):
        turns = [{"role": "user", "content": HOSTILE[n]}, {"role": "assistant", "content": HOSTILE[n + 1]}]
        attack = {"id": str(uuid4()), "category": "O1", "transforms": HOSTILE[2], "model": HOSTILE[3], "conversation": turns}
        rows_made.add_attack(store, owner, attack | {"outcome": outcome, "codes": ["O1"]})
    yield made
    made.stop()
    store.database.close()


@pytest.fixture(scope="module")
def page(desk: Served, browser: Browser) -> Page:
    """The owner's page."""
    opened = browser.page(f"{desk.origin}/#/", desk.client("owner").headers["Cookie"])
    opened.wait("document.querySelectorAll('.project').length >= 3")  # a test before may have added one
    opened.js("sessionStorage.setItem('studio:redteam', 'yes')")
    return opened


def show(page: Page, screen: str) -> None:
    page.js(f"location.hash = {json.dumps('#/' + screen)}")
    page.js("new Promise((done) => setTimeout(done, 60))")
    page.wait(f"{READY} && document.querySelector('h1')")


def screens_of(desk: Served) -> list[str]:
    projects = {p["kind"]: p["id"] for p in desk.client("owner").api("GET", "/projects")[1]["projects"]}
    disputed = next(i["id"] for i in desk.store.items(projects["rate"]) if i["have"] == 2)
    rows = "rows?source=06-r1-answers%2Fresponses.parquet&place=2"
    works = [f"work/{projects[kind]}" for kind in ("rate", "pair", "check")]
    return ["", rows, *works, f"agreement/{projects['rate']}", f"settle/{disputed}", "people", "run", "chat", "redteam"]


def violations(page: Page, screens: list[str]) -> dict[tuple[str, bool, str], list[str]]:
    """What axe finds of levels A and AA on light and dark screens, with all that folds open, and the keys or the skip panel of work."""
    page.js(AXE.read_text() + "\n;0")
    found = {}
    for dark in (False, True):
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        for screen in screens:
            show(page, screen)
            page.js("document.querySelectorAll('details').forEach((one) => { one.open = true })")
            if screen.startswith("work/"):
                page.press("x" if dark else "?")
            said = page.js(
                f"axe.run(document, {{ runOnly: {LEVELS}, resultTypes: ['violations'] }}).then((r) => JSON.stringify(r.violations))"
            )
            for one in json.loads(said):
                found[screen, dark, one["id"]] = [node["html"][:200] for node in one["nodes"]][:3]
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
    return found


def test_no_screen_violates_wcag_a_or_aa(desk: Served, page: Page, browser: Browser) -> None:
    assert not violations(page, screens_of(desk))
    page.js("sessionStorage.removeItem('studio:redteam')")
    assert not violations(page, ["", "redteam"]) and "Before you begin" in page.text()
    page.js("sessionStorage.setItem('studio:redteam', 'yes')")
    for place, words in (("", "Log in"), ("#invite=x", "Welcome")):
        stranger = browser.page(f"{desk.origin}/{place}")
        stranger.wait(f"document.body.innerText.includes({json.dumps(words)})")
        assert not violations(stranger, [place.removeprefix("#")])
    page.js("{ const i = document.createElement('img'); i.id = 'bad'; document.body.append(i) }")  # axe sees what is wrong
    assert page.js("axe.run('#bad').then((r) => r.violations.some((v) => v.id === 'image-alt'))")
    page.js("document.getElementById('bad').remove()")


def test_no_screen_scrolls_sideways_and_submit_is_always_in_sight(desk: Served, browser: Browser) -> None:
    page = browser.page(f"{desk.origin}/#/", desk.client("owner").headers["Cookie"], width=320, height=640)
    page.call("Emulation.setScrollbarsHidden", hidden=True)
    page.wait("document.querySelectorAll('.project').length >= 3")
    for screen in screens_of(desk):
        show(page, screen)
        assert page.js("document.documentElement.scrollWidth") == 320, screen
    page.call("Emulation.setDeviceMetricsOverride", width=1280, height=560, deviceScaleFactor=1, mobile=False)  # a small laptop
    show(page, next(screen for screen in screens_of(desk) if screen.startswith("work/")))
    page.wait("document.querySelector('.controls .primary').getBoundingClientRect().bottom <= innerHeight")


def test_hostile_texts_stay_texts_on_the_screens_of_a_run(desk: Served, page: Page) -> None:
    for screen in screens_of(desk):
        show(page, screen)
        harmless(page, desk.origin)
    show(page, "redteam")
    assert "<svg onload=alert(1)>" in page.text()


def focus(page: Page, words: str) -> None:
    """Tab to a control by its words, as somebody without a mouse does."""
    page.js("document.activeElement.blur(); document.getElementById('main').focus()")
    for _ in range(60):
        page.press("Tab")
        if page.js("document.activeElement.innerText || document.activeElement.name || ''").startswith(words):
            return
    raise AssertionError(f"no {words} by Tab")


def test_a_check_is_done_and_decided_by_keyboard_alone(desk: Served, browser: Browser) -> None:
    run = desk.studio.service.sources.folder
    kept = read_rows(next(run.glob("*-r1-answers")) / "kept.parquet", Demonstration)[6:9]
    whole = "word " * 9000  # more than the server sends at once
    ask_people(run, [replace(row, messages=(*row.messages[:-1], Message("assistant", whole))) for row in kept], 3)
    client = desk.client("expert")
    page = browser.page(f"{desk.origin}/#/", client.headers["Cookie"])
    page.wait("document.body.innerText.includes('Check of round 3')")
    project = next(p["id"] for p in client.api("GET", "/projects")[1]["projects"] if p["name"] == "Check of round 3")
    page.js(f"location.hash = '#/work/{project}'")
    page.wait(ITEM)
    for key in ("1", "2", "3"):
        item = page.js(ITEM)
        page.press(key)
        if key == "2":  # repairing: the text has the focus; Escape leaves it, Enter submits
            page.wait("document.activeElement.id === 'repair'")
            page.call("Input.insertText", text=" And so on.")
            page.press("Escape")
            page.press("Enter")
        page.wait(f"{ITEM} !== {json.dumps(item)} && {SAVED}")
    page.js("location.hash = '#/run'")
    page.wait("document.body.innerText.includes('1 accepted, 1 repaired, 1 rejected')")
    focus(page, "Approve")
    page.press("Enter")
    page.wait("document.body.innerText.includes('Train on these rows')")
    focus(page, "Yes, approve")
    page.press("Enter")
    page.wait("document.body.innerText.includes('Round 3: approved by')")
    page.js(f"location.hash = '#/work/{project}'")  # nobody works for nothing
    page.wait("document.body.innerText.includes('This round has been decided')")
    assert client.api("GET", f"/queue?project={project}&n=5")[1]["items"] == []
    check = checks.read_check(run / "00-r3-check")
    assert (
        check is not None and check.decision is not None and sorted(check.decision["verdicts"].values()) == ["accept", "reject", "repair"]
    )
    (repaired,) = check.decision["repaired"].values()
    assert repaired == whole + " And so on."


# A model whose pieces come as fast as the page reads them.
FAKE = """
window.paints = 0;
window.realFetch ||= window.fetch;
new MutationObserver(() => window.paints++).observe(document.querySelector('.turns'),
  { childList: true, subtree: true, characterData: true });
window.fetch = (url, options) => {
  if (!String(url).endsWith('/chat')) return window.realFetch(url, options);
  const encode = (piece) => new TextEncoder().encode(JSON.stringify(piece) + '\\n');
  let n = 0;
  const stream = new ReadableStream({
    async pull(controller) {
      if (options.signal.aborted) return controller.error(new DOMException('', 'AbortError'));
      if (n++ >= NUM) return controller.close();
      if (n % 100 === 0) await new Promise((done) => setTimeout(done, WAIT));
      controller.enqueue(encode({ text: WORDS, tokens: [['w', -0.5, [['w', -0.5], ['v', -1.2]]]] }));
    },
  });
  return Promise.resolve(new Response(stream, { status: 200 }));
};
"""


def ask(page: Page, words: str, num: int, wait: int = 1) -> None:
    """Ask the fake model by keyboard alone."""
    page.js(FAKE.replace("NUM", str(num)).replace("WORDS", json.dumps(words)).replace("WAIT", str(wait)))
    page.js("document.querySelector('form textarea').focus()")
    page.call("Input.insertText", text="Hello?")
    page.wait("document.querySelector('form button[type=submit]:not(:disabled)')")
    page.press("Enter")


CHOOSE = """(() => { document.querySelector('details').open = true; const choice = document.querySelectorAll('form select')[2];
  choice.value = 'disagreement'; choice.dispatchEvent(new Event('change', { bubbles: true }));
  setTimeout(() => document.querySelector('form .primary').click()); })()"""


def endless(tell: Told, num: int) -> None:
    for done in range(1, 10**6):
        tell(min(done, num - 1), num)
        time.sleep(0.6)


def test_choosing_by_disagreement_says_how_far_it_is_and_ends_with_its_page(
    desk: Served, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = browser.page(f"{desk.origin}/#/", desk.client("owner").headers["Cookie"])

    def chosen() -> list[str]:
        return [p["id"] for p in desk.store.projects() if p["settings"].get("strategy") == "disagreement"]

    def choose() -> None:
        opened.wait("document.querySelectorAll('form select').length === 3 && document.querySelectorAll('form option').length > 8")
        opened.js(CHOOSE)

    stop = "[...document.querySelectorAll('form button')].find((b) => b.innerText === 'Stop').click()"
    with monkeypatch.context() as patch:
        patch.setattr(asking, "states_of", lambda model, talks, **how: apart(endless, len(talks), **how))
        for leave in ("location.hash = '#/people'", stop):
            choose()
            opened.wait("document.querySelector('form progress') && / of \\d+ answers read, \\d+ s left/.test(document.body.innerText)")
            opened.js(leave)
            end = time.monotonic() + 30
            while multiprocessing.active_children() and time.monotonic() < end:
                time.sleep(0.05)
            assert not multiprocessing.active_children() and not chosen()
            show(opened, "")
        assert "nothing of it is kept" in opened.text()
    choose()
    opened.wait("document.body.innerText.includes('It is made')")
    assert len(chosen()) == 1


def test_a_chat_streams_stops_and_becomes_a_row(desk: Served, page: Page) -> None:
    show(page, "chat")
    ask(page, "word ", 2000)
    page.wait("document.querySelector('.tokens summary')")
    assert page.js("document.querySelectorAll('.turns .turn')[1].innerText.length") > 9000
    assert 1 <= page.js("window.paints") < 400, "the page is not painted for every token"
    assert page.text().count("2000 tokens, mean log-probability -0.50") == 1
    page.js("[...document.querySelectorAll('button')].find((b) => b.innerText === 'New').click()")
    ask(page, HOSTILE[0], 100_000, 20)
    page.wait("document.querySelectorAll('.turns .turn').length === 2")
    focus(page, "Stop")
    page.press("Enter")
    page.wait("document.body.innerText.includes('Stopped.')")
    harmless(page, desk.origin)
    focus(page, "Make this a row")
    page.press("Enter")
    page.wait("document.querySelector('section[aria-label=\"Make this a row\"] textarea')")
    page.js("document.querySelector('section textarea').select()")
    page.call("Input.insertText", text="Better so.")
    focus(page, "Keep the row")
    page.press("Enter")
    page.wait("document.body.innerText.includes('Kept as a row')")
    (row,) = rows_made.demonstrations(desk.store)
    assert [m["content"] for m in row["messages"]] == ["Hello?", "Better so."] and row["meta"]["edited"] is True


def test_a_red_team_attacks_and_says_how_it_went(desk: Served, page: Page) -> None:
    show(page, "redteam")
    before = len(rows_made.attacks(desk.store))
    choose = (
        "const s = document.querySelectorAll('.panel select')[{}]; s.value = '{}'; s.dispatchEvent(new Event('change', {{bubbles: true}}))"
    )
    page.js(choose.format(1, "O3"))
    page.js(choose.format(2, "base64").replace("const s", "const t").replace("s.v", "t.v").replace("s.d", "t.d"))
    ask(page, "I cannot help with that.", 1)
    page.js("document.querySelector('form button[type=submit]').click()")
    page.wait("document.querySelectorAll('.turns .turn').length === 2")
    assert "Base64" in page.text() and "SGVsbG8/" in page.text()
    focus(page, "refused")
    page.press("Enter")
    page.wait("document.body.innerText.includes('its beginning reads as')")
    attacks: list[dict[str, Any]] = rows_made.attacks(desk.store)
    assert len(attacks) == before + 1 and attacks[-1]["outcome"] == "refused" and attacks[-1]["transforms"] == "base64"
    assert attacks[-1]["category"] == "O3" and "refusal" in page.text()
    page.press("Escape")
    page.wait("document.body.innerText.includes('Answers are hidden')")
    assert "SGVsbG8/" not in page.text()
