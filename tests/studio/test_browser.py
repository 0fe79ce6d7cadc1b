"""The page in a real browser: keys, queues, drafts, a lost network, two tabs, hostile texts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from gristmill.data.chat import Message
from gristmill.data.rows import ATTRIBUTES, Response, read_rows, write_rows
from gristmill.studio.sources import Sources
from gristmill.studio.store import Store
from tests.studio.browser import CHROMIUM, Browser, Page
from tests.studio.conftest import RATING, Served, answer

pytestmark = pytest.mark.skipif(not CHROMIUM.is_file(), reason="no /usr/bin/chromium: the studio's page is not tested")
ANSWERS = "01-answers/responses.parquet"
ITEM = "document.querySelector('[data-item]')?.dataset.item"
SAVED = "document.querySelector('[data-state=saved]') !== null"


def responses(folder: Path, texts: list[str], prompt: str = "A question?") -> None:
    """Replace a run's answers: one to a prompt."""
    rows = [
        Response(f"r{n}", f"p{n}", "t", (Message("user", f"{prompt} {n}"),), text, "m", 1.0, 0, 5, None, True)
        for n, text in enumerate(texts)
    ]
    write_rows(folder / ANSWERS, rows)


def open_work(served: Served, browser: Browser, kind: str = "rate", *, num: int = 6, need: int = 3, **more: Any) -> tuple[Page, str]:
    """A page of an annotator at work, and the project."""
    owner = served.store.owner()
    items = served.studio.service.sources.choose_items(ANSWERS, kind, num=num, seed=0)
    project = served.store.create_project(kind, kind, items, source=ANSWERS, need=need, guideline="", by=owner)
    client = served.client("annotator")
    page = browser.page(f"{served.origin}/#/work/{project}", client.headers["Cookie"], **more)
    page.wait(ITEM)
    return page, project


def test_keys_faster_than_the_page_is_painted_lose_nothing(served: Served, browser: Browser, run_folder: Path) -> None:
    responses(run_folder, [f"answer {n}" for n in range(40)])
    page, project = open_work(served, browser, num=40)
    # 25 keys in one task of the page, which paints nothing meanwhile: 200 keys in 8 bursts, each when the next items have come
    burst = "for (const k of '0123444321012341234011111') document.dispatchEvent(new KeyboardEvent('keydown', {key: k, bubbles: true}))"
    for number in range(1, 9):
        page.js(burst.replace("document.dispatch", "document.body.dispatch"))
        page.wait(f"{SAVED} && ({ITEM} || {number} === 8)")
    page.wait("document.body.innerText.includes('nothing left')")
    answers = served.store.answers(project)
    said = [tuple(a["content"][name] for name in ATTRIBUTES) for a in answers]
    wanted = [tuple(map(int, "0123444321012341234011111"[i : i + 5])) for i in range(0, 25, 5)] * 8
    assert said == wanted and len({a["item"] for a in answers}) == 40 and {a["keys"] for a in answers} == {5}


def test_what_one_has_answered_is_counted_once_also_on_a_slow_network(served: Served, browser: Browser) -> None:
    page, project = open_work(served, browser, num=40)
    page.call("Network.emulateNetworkConditions", offline=False, latency=300, downloadThroughput=-1, uploadThroughput=-1)
    for answered in range(1, 8):
        item = page.js(ITEM)
        for _ in ATTRIBUTES:
            page.press("2")
        page.wait(f"{ITEM} !== {json.dumps(item)}")
        assert f"{answered} answered in all" in page.text()
    page.wait(SAVED)
    assert "7 answered in all" in page.text()
    page.reload()
    page.wait(f"{ITEM} && document.body.innerText.includes('7 answered in all')")


def test_letters_backspace_undo_skip_and_help(served: Served, browser: Browser) -> None:
    page, project = open_work(served, browser)
    first = page.js(ITEM)
    for key in ("g", "f", "Backspace", "d", "s", "a"):
        page.press(key)
    page.press("Enter")  # four of five: nothing is sent
    assert page.js(ITEM) == first and "five attributes first" in page.text()
    page.reload()  # a draft stays
    page.wait(f"{ITEM} === {json.dumps(first)} && document.querySelectorAll('.choice.on').length === 4")
    page.press("4")
    page.wait(f"{ITEM} !== {json.dumps(first)} && {SAVED}")
    page.press("u")
    page.wait(f"{ITEM} === {json.dumps(first)}")
    page.press("0")  # verbosity, again
    page.wait(f"{ITEM} !== {json.dumps(first)} && {SAVED}")
    (said,) = served.store.answers(project)
    assert [said["content"][name] for name in ATTRIBUTES] == [4, 2, 1, 0, 0] and said["version"] == 2
    second = page.js(ITEM)
    page.press("?")
    page.wait("document.body.innerText.includes('single keys act')")
    page.press("?")
    page.press("x")
    page.press("1")
    page.wait(f"{ITEM} !== {json.dumps(second)} && {SAVED}")
    assert served.store.flags(project) == {"broken": 1}
    page.js("document.querySelector('textarea').focus()")
    page.press("4")  # a text field takes it
    assert page.js("document.querySelector('textarea').value") == "4" and page.js("document.querySelectorAll('.choice.on').length") == 0


def test_comparisons_by_keyboard_alone(served: Served, browser: Browser) -> None:
    page, project = open_work(served, browser, "pair", num=3)
    for key in ("1", "n", "4"):
        item = page.js(ITEM)
        page.press(key)
        page.wait(f"{ITEM} !== {json.dumps(item)} && {SAVED}")
    answers = [a["content"] for a in served.store.answers(project)]
    assert [abs(a["preference"]) for a in answers] == [3, 0, 0] and [a["neither"] for a in answers] == [False, True, False]
    page.wait("document.body.innerText.includes('nothing left')")


def test_the_mouse_and_native_controls_work(served: Served, browser: Browser) -> None:
    page, project = open_work(served, browser)
    item = page.js(ITEM)
    for name in ATTRIBUTES:
        page.js(f"document.querySelector('input[name={name}][value=\"3\"]').click()")
    assert page.js(ITEM) == item  # a click submits nothing by itself
    page.js("[...document.querySelectorAll('button')].find((b) => b.innerText.startsWith('Submit')).click()")
    page.wait(f"{ITEM} !== {json.dumps(item)} && {SAVED}")
    assert [a["content"]["verbosity"] for a in served.store.answers(project)] == [3]


def test_work_without_a_network_arrives_in_order(served: Served, browser: Browser) -> None:
    page, project = open_work(served, browser)
    page.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
    items = []
    for level in range(5):
        items.append(page.js(ITEM))
        for _ in ATTRIBUTES:
            page.press(str(level))
    page.wait("document.querySelector('[data-state=offline]')")
    assert "offline, 5 waiting" in page.text() and not served.store.answers(project)
    assert page.js("{const e = new Event('beforeunload', {cancelable: true}); dispatchEvent(e); e.defaultPrevented}")
    other = browser.page(f"{served.origin}/#/", like=page)  # as after a crash: another page of this browser finds them
    other.wait(SAVED)
    page.call("Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    page.wait(SAVED)
    answers = served.store.answers(project)
    assert [(a["item"], a["content"]["helpfulness"]) for a in answers] == list(zip(items, range(5), strict=True))


def test_a_clock_that_is_set_changes_neither_order_nor_times(served: Served, browser: Browser) -> None:
    page, project = open_work(served, browser)
    page.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
    items = []
    for hours in (0, 2, -5):
        page.js(f"{{ const now = Date.now() + {hours} * 3600e3; Date.now = () => now }}")
        items.append(page.js(ITEM))
        for _ in ATTRIBUTES:
            page.press("2")
    page.wait("document.querySelector('[data-state=offline]')")
    other = browser.page(f"{served.origin}/#/", like=page)  # it reads what waits from where it is kept
    other.wait(SAVED)
    answers = served.store.answers(project)
    assert [a["item"] for a in answers] == items and all(a["seconds"] < 600 for a in answers)
    page.call("Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1)


def test_a_second_tab_works_on_the_same_item_and_hears_of_the_answer(served: Served, browser: Browser) -> None:
    page, project = open_work(served, browser)
    item = page.js(ITEM)
    other = browser.page(f"{served.origin}/#/work/{project}", like=page)
    other.wait(f"{ITEM} === {json.dumps(item)}")
    for key in "01234":
        page.press(key)
    other.wait(f"{ITEM} && {ITEM} !== {json.dumps(item)}")
    assert "answered the item before in another tab" in other.text()


def test_an_answer_that_another_tab_contradicts_is_decided_by_the_person(served: Served, browser: Browser) -> None:
    page, project = open_work(served, browser)
    item = page.js(ITEM)
    person = next(p for p in served.store.people() if p["role"] == "annotator")
    (worker,) = [served.store.secret_of(person["name"])[0]]  # type: ignore[index]
    served.store.submit(worker, answer(item))  # from a browser that this page does not hear
    for _ in ATTRIBUTES:
        page.press("0")
    page.wait("document.body.innerText.includes('answered an item twice')")
    assert served.store.answers(project)[0]["content"]["helpfulness"] == 3
    page.js("[...document.querySelectorAll('button')].find((b) => b.innerText === 'Keep this one').click()")
    page.wait(f"!document.body.innerText.includes('answered an item twice') && {SAVED}")
    assert served.store.answers(project)[0]["content"]["helpfulness"] == 0


SEND = """(async () => {
  const { Outbox } = await import(location.origin + "/page/outbox.js");
  const nothing = () => {};
  const out = new Outbox("PERSON", { changed: nothing, accepted: nothing, ended: nothing });
  const content = { verdict: "repair", text: "x".repeat(100000), reason: "" };
  const answer = { item: "gone", version: 1, content, seconds: 1, keys: 1, guideline: 1 };
  for (let n = 0; n < 15; n++) out.add("answer", { ...answer, id: "a".repeat(30) + n });
  out.add("flag", { item: "gone", kind: "unsure", note: "" });
  for (let n = 0; n < 600 && out.waiting; n++) await new Promise((done) => setTimeout(done, 50));
  out.close();
  return [out.waiting, out.aside.map((entry) => entry.refused.status)];
})()"""


def test_what_is_on_its_way_goes_in_requests_that_the_server_takes_and_refusals_are_said(served: Served, browser: Browser) -> None:
    client = served.client("annotator")
    page = browser.page(f"{served.origin}/#/", client.headers["Cookie"])
    page.wait("document.body.innerText.includes('Projects')")
    assert page.js(SEND.replace("PERSON", client.person.id)) == [0, [404] * 16]
    page.reload()
    page.wait("document.querySelectorAll('.banner').length === 16")
    assert "A skip was not taken: " in page.text() and "An answer was not taken: " in page.text()


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "javascript:alert(1)",
    "<iframe srcdoc='<script>parent.alert(1)</script>'></iframe>",
    "<a href=javascript:alert(1)>x</a>",
    "{{constructor.constructor('alert(1)')()}}",
    "${alert(1)}",
    "<style>*{display:none}</style>",
    "<base href=//evil.example>",
    "<meta http-equiv=refresh content='0;url=//evil.example'>",
    "<form action=//evil.example><button autofocus>",
    "\u202eevil\u2066\u200b\u00ad\ufeff",
    "</textarea><script>alert(1)</script>",
    "<x-y onclick=alert(1) style='position:fixed;inset:0'>",
    '{"constructor":null,"__html":"<b>x</b>","type":"img"}',
    "&lt;script&gt;alert(1)&lt;/script&gt; &#x3c;img src=x onerror=alert(1)&#x3e;",
    "![x](//evil.example/x.png) <!-- --><![CDATA[<script>alert(1)</script>]]>",
    "\0\x1b[2J\x9b31m",
    "a\nb\r\n\tc" + "z" * 400,
]


def harmless(page: Page, origin: str) -> None:
    """No dialog, no request to elsewhere, no element that no view makes, no error in the page."""
    assert not page.said("Page.javascriptDialogOpening")
    urls = {r["request"]["url"] for r in page.said("Network.requestWillBeSent")}
    assert not {u for u in urls if not u.startswith(origin)}
    assert not page.js(
        "[...document.querySelectorAll('script:not([src]), style, iframe, object, img, base, x-y, form[action], svg:not(.chart)')].length"
    )
    assert not page.said("Runtime.exceptionThrown")


def test_hostile_texts_stay_texts_on_every_screen(local_store: Store, tmp_path: Path, browser: Browser) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    turns = {text: tuple(Message(role, text) for role in ("user", "assistant", "user")) for text in HOSTILE}
    rows = [
        Response(f"{text[:30]}{n}", f"p{n // 2}", text, turns[text], text + str(n), text, 1.0, 0, 5, None, True, judge=text)
        for n, text in enumerate(HOSTILE)
    ]
    write_rows(folder / "<img src=x onerror=alert(1)>.parquet", rows)
    (folder / "samples.jsonl").write_text(
        "".join(json.dumps({"id": t, t[:9]: [t, t], "messages": [{"role": t, "content": t}], "said": t}) + "\n" for t in HOSTILE)
    )
    made = Served(local_store, Sources(folder, tmp_path / "cache"))
    try:
        name = next(s.name for s in made.studio.service.sources.all() if s.name.endswith("parquet"))
        owner = local_store.owner()
        for kind in ("rate", "pair"):
            items = made.studio.service.sources.choose_items(name, kind, num=20, seed=0)
            project = local_store.create_project(kind, HOSTILE[1], items, source=name, need=2, guideline=HOSTILE[0], by=owner)
            people = [local_store.add_person(f"{HOSTILE[2]}{kind}{n}", "annotator") for n in range(2)]
            for n, person in enumerate(people):
                for item in local_store.deal(project, person, 5):
                    content = RATING | {"helpfulness": 4 * n} if kind == "rate" else {"preference": 6 * n - 3, "neither": False}
                    local_store.submit(person, answer(item["id"], **content, reason=HOSTILE[1]))
        client = made.client("owner")
        page = browser.page(f"{made.origin}/#/", client.headers["Cookie"])
        page.wait("document.body.innerText.includes('Projects') && document.querySelectorAll('.project').length === 2")
        projects = [p["id"] for p in local_store.projects()]
        disputed = next(i["id"] for i in local_store.items(projects[0]) if i["have"] == 2)
        screens = [f"work/{p}" for p in projects] + [f"agreement/{p}" for p in projects] + [f"settle/{disputed}", "people"]
        at = urlencode({"source": name})
        screens += [
            f"rows?{query}"
            for query in ("", f"{at}&place=0", f"{at}&place=3", f"{at}&place=12", "filter=%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E")
        ]
        screens += [f"rows?source=samples.jsonl&place={place}" for place in (0, 3, 12)]
        for screen in screens:
            page.js(f"location.hash = {json.dumps('#/' + screen)}")
            page.wait("!document.body.innerText.includes('Loading \\u2026') && !document.body.innerText.includes('Computing')")
            harmless(page, made.origin)
        page.js(f"location.hash = '#/work/{projects[0]}'")
        page.wait(ITEM)
        seen = set()
        for _ in range(len(HOSTILE)):
            if not page.js(ITEM):
                break
            seen.add(page.js("document.querySelector('.judged .said').innerText.slice(0, 12)"))
            before = page.js(ITEM)
            for key in "01234":
                page.press(key)
            page.wait(f"{ITEM} !== {json.dumps(before)}")
        harmless(page, made.origin)
        assert "<script>aler" in seen and any("U+202E" in text for text in seen)
    finally:
        made.stop()


def test_a_very_long_answer_unfolds_by_pieces(served: Served, browser: Browser, run_folder: Path) -> None:
    responses(run_folder, ["x" * 200_000, "line\n" * 10_000])
    page, _ = open_work(served, browser, num=2)
    size = "document.querySelector('.judged .said').innerText.length"
    button = "document.querySelector('.judged .said button.link')"
    before = page.js(size)
    assert 10_000 < before < 50_000
    page.js(f"{button}.click()")
    page.wait(f"{size} > {before} + 15000")


def test_who_is_logged_out_keeps_what_was_said(served: Served, browser: Browser) -> None:
    page, project = open_work(served, browser)
    person = next(p for p in served.store.people() if p["role"] == "annotator")
    who = served.store.secret_of(person["name"])
    assert who is not None
    served.store.close_sessions("", who[0], True)
    for key in "01234":
        page.press(key)
    page.wait("document.body.innerText.includes('Log in')")
    assert page.js("Object.keys(localStorage).filter((k) => k.startsWith('studio:out:')).length") == 1
    assert not served.store.answers(project)


def test_the_owners_link_opens_the_page_and_makes_a_project(served: Served, browser: Browser) -> None:
    page = browser.page(f"{served.origin}/#token={served.token}")
    page.wait("document.body.innerText.includes('no project yet')")
    assert "token" not in page.js("location.href")
    page.wait("document.querySelectorAll('select')[1].options.length > 0")
    page.js("document.querySelector('form button[type=submit]').click()")
    page.wait("document.querySelectorAll('.project').length === 1")
    (project,) = served.store.projects()
    assert (project["kind"], project["items"], project["name"]) == ("rate", 12, "Ratings")


def test_a_list_is_asked_for_once_and_not_as_somebody_else(served: Served, browser: Browser) -> None:
    def asked(page: Page) -> list[str]:
        found = [r["request"]["url"].partition("/studio/api/")[2] for r in page.said("Network.requestWillBeSent")]
        return [path.partition("?")[0] for path in found if path.startswith(("me", "rows", "sources"))]

    page = browser.page(f"{served.origin}/#/rows", served.client("owner").headers["Cookie"])
    page.wait("document.querySelectorAll('.list tbody tr').length > 9 && document.querySelector('select').value")
    assert sorted(asked(page)) == ["me", "rows", "sources"]
    page.js("document.querySelector('.list a').click()")
    page.wait("document.querySelector('article.row')")
    assert sorted(asked(page)) == ["me", "rows", "sources"]

    token = served.client("owner").api("POST", "/invitations", {"role": "reader"})[1]["token"]
    assert served.client().api("POST", "/session", {"token": token, "name": "Ann", "password": "a long password"})[0] == 200
    page = browser.page(f"{served.origin}/#/rows")  # nobody: the first requests are refused
    page.wait("document.querySelector('form')")
    for kind, text in (("text", "Ann"), ("password", "a long password")):
        page.js(f"document.querySelector('input[type={kind}]').focus()")
        page.call("Input.insertText", text=text)
    page.js("document.querySelector('form button').click()")
    page.wait("document.querySelectorAll('.list tbody tr').length > 9")


def test_answers_are_compared_word_by_word(served: Served, browser: Browser, run_folder: Path) -> None:
    responses(run_folder, ["It is  four,\nI think.", "It is surely four, \u202eI hope."])
    write_rows(run_folder / ANSWERS, [replace(r, prompt="p") for r in read_rows(run_folder / ANSWERS, Response)])
    page = browser.page(f"{served.origin}/#/rows?place=0", served.client("owner").headers["Cookie"])
    page.wait("document.querySelectorAll('.side').length > 1")
    page.js("document.querySelector('article input[type=checkbox]').click()")
    page.wait("document.querySelector('mark')")
    marks = "[...document.querySelectorAll('.side')].map((side) => [...side.querySelectorAll('mark')].map((m) => m.innerText))"
    assert page.js(marks) == [[], ["surely", "U+202EI hope."]]
    assert page.js("document.querySelectorAll('.side .lines')[1].innerText") == "It is surely four, U+202EI hope."
