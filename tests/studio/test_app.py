"""The studio's API: who may do what, what annotators get to see, and that nothing is lost or doubled."""

import json
import re
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from gristmill.core.errors import InputError
from gristmill.studio.app import page_files
from gristmill.studio.security import (
    COOKIE,
    MAX_TRIES,
    MAX_TRIES_TOGETHER,
    ROUTES,
    Tries,
    check_password,
    hash_password,
    key_of,
    new_token,
    origins_of,
)
from gristmill.studio.store import LEASE_SECONDS, ROLES
from tests.studio.conftest import RATING, Client, Served, answer

ANSWERS = "01-answers/responses.parquet"


def create(served: Served, kind: str = "rate", **more: Any) -> tuple[str, int]:
    status, made = served.client("owner").api("POST", "/projects", {"kind": kind, "source": ANSWERS, "num": 6, "need": 3, **more})
    assert status == 200, made
    return made["id"], made["items"]


@pytest.mark.parametrize("role", ["", *ROLES])
def test_every_route_lets_in_its_roles_alone(served: Served, role: str) -> None:
    client = served.client(role)
    for (method, path), roles in ROUTES.items():
        if path == "/events":
            continue  # an endless answer: below
        place = re.sub(r"\{.*?\}", "x", path)
        status, said = client.api(method, place, {} if method == "POST" else None)
        if roles is None or role in roles:
            assert status not in (401,) and not (status == 403 and "role" in said["error"]), (method, path, said)
        else:
            assert status == (403 if role else 401), (method, path, said)
        if (method, path) == ("DELETE", "/session") and role:
            client = served.client(role)  # that was its end


def test_an_annotator_sees_texts_and_nothing_else(served: Served) -> None:
    for kind in ("rate", "pair"):
        project, _ = create(served, kind)
        client = served.client("annotator")
        status, queue = client.api("GET", f"/queue?project={project}&n=2")
        assert status == 200 and len(queue["items"]) == 2
        for item in queue["items"]:
            assert item.keys() == {"id", "kind", "messages", "answers"}
            assert all(message.keys() == {"role", "text", "length"} for message in item["messages"])
            assert [one.keys() for one in item["answers"]] == [{"text", "length"}] * (2 if kind == "pair" else 1)
    _, projects = client.api("GET", "/projects")
    hidden = ("a model", "reward", "score", "verifier", "responses", "01-answers", "temperature")
    assert not [word for word in hidden if word in json.dumps([queue, projects])]
    assert served.client("annotator").api("GET", f"/items/{queue['items'][0]['id']}/text")[0] == 404  # another's item


def test_ten_people_answer_each_item_three_times(served: Served) -> None:
    project, num = create(served)
    clients = [served.client("annotator") for _ in range(10)]
    failed: list[Any] = []

    def work(client: Client) -> None:
        while True:
            status, queue = client.api("GET", f"/queue?project={project}&n=3")
            if status != 200 or not queue["items"]:
                return failed.append((status, queue)) if status != 200 else None
            sent = {"answers": [answer(item["id"]) for item in queue["items"]]}
            for _ in range(2):  # as if the first reply had been lost
                status, said = client.api("POST", "/answers", sent)
                if status != 200 or any(r["status"] != 200 for r in said["results"]):
                    failed.append(said)

    threads = [threading.Thread(target=work, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    answers = served.store.answers(project)
    assert Counter(a["item"] for a in answers) == {i["id"]: 3 for i in served.store.items(project)} and len(answers) == 3 * num
    assert max(Counter((a["item"], a["person"]) for a in answers).values()) == 1


def test_sides_are_dealt_evenly_and_answers_speak_of_the_rows(served: Served) -> None:
    project, num = create(served, "pair", need=10)
    total = 0
    for _ in range(10):
        client = served.client("annotator")
        _, queue = client.api("GET", f"/queue?project={project}&n=20")
        for item in queue["items"]:
            said = answer(item["id"], preference=-3, neither=False)
            assert client.api("POST", "/answers", {"answers": [said]})[0] == 200
            (stored,) = [a for a in served.store.history(item["id"]) if a["id"] == said["id"]]
            first = served.studio.service.sources.find(*_place(served, item["id"], 0))
            left_is_first = first["answers"][0]["text"] == item["answers"][0]["text"]  # type: ignore[index]
            assert stored["content"]["preference"] == (-3 if left_is_first else 3)
            total += stored["content"]["preference"]
    assert abs(total / 3) <= 3 * (10 * num) ** 0.5  # three standard deviations of that many fair coins


def _place(served: Served, item: str, number: int) -> tuple[Any, str]:
    row = served.store.item(item)
    return json.loads(row["places"])[number], json.loads(row["row_ids"])[number]


def test_another_tab_is_told_what_was_said(served: Served) -> None:
    project, _ = create(served, "pair")
    client = served.client("annotator")
    _, queue = client.api("GET", f"/queue?project={project}&n=1")
    item = queue["items"][0]["id"]
    client.api("POST", "/answers", {"answers": [answer(item, preference=-2, neither=False)]})
    status, said = client.api("POST", "/answers", {"answers": [answer(item, preference=3, neither=False)]})
    assert status == 409 and said["results"][0]["newest"]["content"]["preference"] == -2  # left and right, as it was given
    assert client.api("POST", "/answers", {"answers": [answer(item, 2, preference=3, neither=False)]})[0] == 200
    # one that cannot be stored holds up no other
    status, said = client.api("POST", "/answers", {"answers": [answer("gone"), answer(item, 3, preference=1, neither=False)]})
    assert status == 200 and [r["status"] for r in said["results"]] == [404, 200]


def test_an_expert_settles_and_looks_at_agreement(served: Served) -> None:
    project, _ = create(served, need=1)
    client, expert = served.client("annotator"), served.client("expert")
    _, queue = client.api("GET", f"/queue?project={project}&n=1")
    item = queue["items"][0]["id"]
    client.api("POST", "/answers", {"answers": [answer(item)]})
    _, shown = expert.api("GET", f"/items/{item}")
    assert [a["content"]["helpfulness"] for a in shown["history"]] == [3]
    assert expert.api("POST", f"/items/{item}/resolve", answer(item, **RATING | {"helpfulness": 0}))[0] == 200
    assert [i["rounded"]["helpfulness"] for i in served.store.items(project) if i["rule"]] == [0]
    status, found = expert.api("GET", f"/statistics/{project}")
    assert status == 200 and found["says"].startswith("One person")


def test_rows_with_lineage_and_what_people_said(served: Served) -> None:
    reader = served.client("reader")
    _, page = reader.api("GET", f"/rows?source={ANSWERS}&filter=score%20%3E%204&sort=-score&n=2")
    assert page["total"] == 5 and [r["facts"]["score"] for r in page["rows"]] == [5.2, 5.1]
    _, found = reader.api("GET", f"/row?source={ANSWERS}&place={page['rows'][0]['place']}")
    assert len(found["siblings"]) == 2 and found["people"] == []
    _, tree = reader.api("GET", f"/row/lineage?id={found['row']['id'].replace('#', '%23')}")
    assert [e["kind"] for e in tree["lineage"]][:2] == ["response", "prompt"]
    assert reader.api("GET", f"/rows?source={ANSWERS}&filter=scor%3D1")[1]["error"].endswith("did you mean score?")
    _, sources = reader.api("GET", "/sources")
    assert ANSWERS in sources["of_kind"]["pair"] and sources["is_run"]


def test_exports_are_attachments_for_the_owner(served: Served) -> None:
    owner = served.client("owner")
    status, raw = owner.api("GET", "/export/ratings.jsonl")
    assert status == 200 and raw == b"" and owner.reply["Content-Disposition"].startswith("attachment")
    assert owner.api("GET", "/export/..%2Fstudio.db")[0] in (400, 404)


# ---- who comes in ----


def test_the_owners_link_works_once(served: Served) -> None:
    client = served.client()
    status, me = client.api("POST", "/session", {"token": served.token})
    assert (status, me["role"]) == (200, "owner")
    cookie = client.reply["Set-Cookie"]
    assert all(word in cookie for word in (COOKIE, "HttpOnly", "SameSite=Strict", "Path=/"))
    assert served.client().api("POST", "/session", {"token": served.token})[0] == 403
    client.headers["Cookie"] = cookie.split(";")[0]
    assert client.api("GET", "/me")[1]["role"] == "owner"
    client.api("DELETE", "/session", {"everywhere": True})
    assert client.api("GET", "/me")[1] == {"role": None}


def test_invited_people_choose_a_password_and_come_back(served: Served) -> None:
    owner = served.client("owner")
    _, invited = owner.api("POST", "/invitations", {"role": "annotator"})
    assert owner.api("POST", "/invitations", {"role": "owner"})[0] == 400
    guest = served.client()
    wanted = {"token": invited["token"], "name": "Ada", "password": "short"}
    assert guest.api("POST", "/session", wanted)[0] == 400
    wanted["password"] = "a long password"
    assert guest.api("POST", "/session", wanted)[1]["role"] == "annotator"
    assert guest.api("POST", "/session", wanted | {"name": "Bob"})[0] == 403
    assert served.client().api("POST", "/session", {"name": "Ada", "password": "a long password"})[0] == 200
    assert served.client().api("POST", "/session", {"name": "Ada", "password": "wrong"})[1]["error"].startswith("The name or")
    _, people = owner.api("GET", "/people")
    ada = next(p for p in people["people"] if p["name"] == "Ada")
    assert "secret" not in ada and owner.api("DELETE", f"/people/{ada['id']}")[0] == 200
    assert served.client().api("POST", "/session", {"name": "Ada", "password": "a long password"})[0] == 403


def test_wrong_passwords_are_limited() -> None:
    tries = Tries()
    assert [tries.begin("here", "Ada") for _ in range(MAX_TRIES + 1)] == [True] * MAX_TRIES + [False]
    assert tries.begin("here", "Bo") and tries.begin("elsewhere", "Ada")
    tries.succeed("here", "Bo")
    assert [tries.begin("here", "Bo") for _ in range(MAX_TRIES + 1)] == [True] * MAX_TRIES + [False]
    assert tries.begin("here", "")
    tries.succeed("here", "")  # somebody's token is right: no guess is forgotten
    names = [f"guess {n}" for n in range(MAX_TRIES_TOGETHER)]
    assert [tries.begin("here", name) for name in names].count(True) == MAX_TRIES_TOGETHER - 2 * MAX_TRIES
    assert [tries.begin(name, "Ada") for name in names].count(True) == MAX_TRIES_TOGETHER - MAX_TRIES - 1


def test_wrong_passwords_at_one_time_are_limited_too(served: Served) -> None:
    served.store.add_person("Bo", "annotator", hash_password("a long password"))
    with ThreadPoolExecutor(32) as pool:
        wrong = {"name": "Ada", "password": "wrong"}
        said = [status for status, _ in pool.map(lambda _: served.client().api("POST", "/session", wrong), range(32))]
    assert Counter(said) == {403: MAX_TRIES, 429: 32 - MAX_TRIES}
    assert served.client().api("POST", "/session", {"name": "Bo", "password": "a long password"})[0] == 200  # behind the same address


def test_passwords_are_hashed_with_salt() -> None:
    one, two = hash_password("a long password"), hash_password("a long password")
    assert one != two and check_password("a long password", one) and not check_password("a long passwort", one)
    assert "password" not in one


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "127.0.0.1"}, 421),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": ""}, 403),
        ({"Origin": "null"}, 403),
        ({"Content_Type": "text/plain"}, 415),
        ({"Content_Type": "application/x-www-form-urlencoded"}, 415),
    ],
)
def test_strange_hosts_origins_and_bodies_are_refused(served: Served, headers: dict[str, str], status: int) -> None:
    assert served.client("owner").api("POST", "/invitations", {"role": "reader"}, **headers)[0] == status


def test_bodies_are_counted_and_read_as_json(served: Served) -> None:
    client = served.client("annotator")
    assert client.api("POST", "/answers", b"x" * (2 << 20))[0] == 413
    for body in (b"{", b"[1]", b"[" * 100_000, b'{"answers": 3}', b'{"answers": [1]}', b'{"answers": []}'):
        assert client.api("POST", "/answers", body)[0] == 400
    assert client.api("GET", "/queue?project=%00&n=1")[0] == 404
    broken = {"answers": [{"id": "x" * 10, "item": ["no"], "version": "1", "content": None}]}
    assert client.api("POST", "/answers", broken)[0] == 400


def test_every_answer_has_the_strict_policy(served: Served) -> None:
    client = served.client("owner")
    for path in ("/", "/page/main.js", "/studio/api/me", "/studio/api/export/ratings.jsonl", "/nowhere"):
        client.ask("GET", path)
        policy = client.reply["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "require-trusted-types-for 'script'" in policy and "unsafe" not in policy
        assert client.reply["X-Content-Type-Options"] == "nosniff" and client.reply["Referrer-Policy"] == "no-referrer"
        assert client.reply["Cache-Control"] == ("no-cache" if path in ("/", "/page/main.js") else "no-store")


def test_the_page_makes_no_markup_of_texts() -> None:
    forbidden = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "http://", "https://", "style=")
    for name, data in page_files().items():
        if not name.startswith("vendor/") and not name.endswith(".svg"):
            assert not [word for word in forbidden if word in data.decode()], name
    served = page_files()["index.html"].decode()
    assert not re.search(r"<script(?![^>]*\ssrc=)|\son\w+=|<style", served)
    preloaded = re.findall(r'<link rel="modulepreload" href="/page/(.*?)">', served)
    assert set(preloaded) == {name for name in page_files() if name.endswith(".js")}, "no module waits for another's imports to be read"


def test_addresses() -> None:
    origins, first = origins_of("127.0.0.1", 8600, "")
    assert first == "http://127.0.0.1:8600" and "http://localhost:8600" in origins
    assert origins_of("10.0.0.1", 80, "")[1] == "http://10.0.0.1" and origins_of("::", 1, "https://mill:443")[1] == "https://mill"
    assert origins_of("0.0.0.0", 80, "https://Mill.example")[1] == "https://mill.example"
    for host, url in (("0.0.0.0", ""), ("127.0.0.1", "mill"), ("127.0.0.1", "https://mill/x"), ("127.0.0.1", "javascript:alert(1)")):
        with pytest.raises(InputError):
            origins_of(host, 80, url)


def test_events_tell_that_a_project_has_changed_and_a_page_that_goes_leaves_no_trace(served: Served, caplog: Any) -> None:
    client = served.client("annotator")
    with socket.create_connection(served.listening.getsockname()) as stream:
        head = f"GET /studio/api/events HTTP/1.1\r\nHost: {served.origin[7:]}\r\nCookie: {client.headers['Cookie']}\r\n\r\n"
        stream.sendall(head.encode())
        stream.settimeout(20)
        raw = b""
        while b"retry" not in raw:
            raw += stream.recv(4096)
        project, _ = create(served)
        while b"data:" not in raw or not raw.endswith(b"\n\n\r\n"):
            raw += stream.recv(4096)
    number = re.search(rb"id: (\d+)\ndata: (.*)\n", raw)
    assert number and json.loads(number[2]) == {"project": project}
    owner, version, end = served.client("owner"), 1, time.monotonic() + 20
    while served.studio.service.events.num_streams:  # the server finds out when it writes
        assert owner.api("POST", f"/projects/{project}/guideline", {"guideline": str(version)})[0] == 200 and time.monotonic() < end
        version += 1
    assert not [record for record in caplog.records if record.name.startswith("aiohttp")]


@pytest.mark.parametrize("last", [5, 10**17])  # before this server began, and after it: a clock was set back
def test_a_page_that_comes_back_after_a_restart_is_told_at_once_and_stops_nobody(served: Served, last: int) -> None:
    client = served.client("annotator")
    with socket.create_connection(served.listening.getsockname()) as stream:
        head = (
            f"GET /studio/api/events HTTP/1.1\r\nHost: {served.origin[7:]}\r\nCookie: {client.headers['Cookie']}\r\nLast-Event-ID: {last}"
        )
        stream.sendall(f"{head}\r\n\r\n".encode())
        stream.settimeout(20)
        raw = b""
        while b"data: {}" not in raw:
            raw += stream.recv(4096)
        assert client.api("GET", "/me")[0] == 200


def test_projects_tell_how_many_answers_there_are_and_which_are_ones_own(served: Served) -> None:
    project, num = create(served)
    client = served.client("annotator")
    item = client.api("GET", f"/queue?project={project}&n=1")[1]["items"][0]["id"]
    assert client.api("POST", "/answers", {"answers": [answer(item)]})[0] == 200
    (mine,) = client.api("GET", "/projects")[1]["projects"]
    (others,) = served.client("owner").api("GET", "/projects")[1]["projects"]
    assert (mine["mine"], others["mine"], others["answers"], others["items"]) == (1, 0, 1, num) and "answers" not in mine


def test_a_removed_row_is_skipped_and_said(served: Served, run_folder: Any) -> None:
    project, num = create(served)
    (run_folder / ANSWERS).unlink()
    client = served.client("annotator")
    status, queue = client.api("GET", f"/queue?project={project}&n=20")
    assert (status, queue["items"], queue["lease"]) == (200, [], LEASE_SECONDS)
    assert served.store.flags(project) == {"broken": num}


def test_tokens_are_stored_as_hashes(served: Served) -> None:
    token = new_token()
    served.store.invite(key_of(token), "reader", 60)
    found = served.store.database.read(lambda t: t.all("select * from invitation"))
    assert token not in json.dumps(found)
