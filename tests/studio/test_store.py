"""Store: one contract on SQLite and PostgreSQL: leases, answers that are never lost or doubled, consensus, people."""

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gristmill.core.errors import InputError
from gristmill.studio import store as stores
from gristmill.studio.database import Database
from gristmill.studio.store import Refused, Store
from tests.studio.conftest import RATING, answer

Make = Callable[..., Any]


def test_an_item_gets_as_many_answers_as_it_needs_and_nobody_twice(store: Store, make_project: Make) -> None:
    project, people = make_project(store, 12, people=5)

    def work(person: stores.Person) -> None:
        while items := store.deal(project, person, 3):
            for item in items:
                store.submit(person, answer(item["id"]))

    threads = [threading.Thread(target=work, args=(person,)) for person in people]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answers = store.answers(project)
    assert Counter(a["item"] for a in answers) == {item["id"]: 3 for item in store.items(project)}
    assert max(Counter((a["item"], a["person"]) for a in answers).values()) == 1
    assert not any(a["late"] for a in answers)
    assert {item["state"] for item in store.items(project)} == {"done"}


def test_leases_count_toward_need_and_expire(store: Store, make_project: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    project, (one, two, _) = make_project(store, 2, need=1)
    held = store.deal(project, one, 1)
    assert [i["id"] for i in store.deal(project, one, 1)] == [held[0]["id"]]  # a second tab: the same item
    assert held[0]["id"] not in {i["id"] for i in store.deal(project, two, 5)}
    assert store.renew(one, [held[0]["id"], "nothing"]) == [held[0]["id"]]
    monkeypatch.setattr(stores, "LEASE_SECONDS", -1.0)  # a lease that is over when it begins
    store.renew(one, [held[0]["id"]])
    monkeypatch.undo()
    assert held[0]["id"] in {i["id"] for i in store.deal(project, two, 5)}
    assert store.renew(one, [held[0]["id"]]) == []


def test_an_answer_that_comes_too_late_is_kept_and_not_counted(store: Store, make_project: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    project, (one, two, _) = make_project(store, 1, need=1)
    monkeypatch.setattr(stores, "LEASE_SECONDS", -1.0)
    (item,) = store.deal(project, one, 1)
    monkeypatch.undo()
    store.deal(project, two, 1)
    assert store.submit(one, answer(item["id"]))["late"]
    assert not store.submit(two, answer(item["id"]))["late"]
    assert len(store.answers(project)) == 2
    (closed,) = store.items(project)
    assert (closed["have"], len(closed["used"])) == (1, 1)


def test_sending_an_answer_again_changes_nothing(store: Store, make_project: Make) -> None:
    project, (one, two, _) = make_project(store, 1)
    (item,) = store.deal(project, one, 1)
    said = answer(item["id"])
    assert store.submit(one, said) == store.submit(one, said)
    assert len(store.history(item["id"])) == 1 and store.items(project)[0]["have"] == 1
    with pytest.raises(Refused, match="another answer"):
        store.submit(two, said)
    for wrong in ("\0" * 8, "\ud800" * 8):
        with pytest.raises(InputError):
            store.submit(one, said | {"id": wrong})
        with pytest.raises(Refused, match="gone"):
            store.submit(one, answer(wrong))


def test_a_newer_version_wins_and_the_older_stays(store: Store, make_project: Make) -> None:
    project, (one, *_) = make_project(store, 1, need=1)
    (item,) = store.deal(project, one, 1)
    store.submit(one, answer(item["id"]))
    with pytest.raises(Refused) as refused:  # from another tab
        store.submit(one, answer(item["id"], 1, **RATING | {"helpfulness": 0}))
    assert refused.value.status == 409 and refused.value.more["newest"]["version"] == 1
    store.submit(one, answer(item["id"], 2, **RATING | {"helpfulness": 1}))
    assert [a["version"] for a in store.history(item["id"])] == [1, 2]
    assert [a["content"]["helpfulness"] for a in store.answers(project)] == [1]
    (found,) = store.items(project)
    assert (found["have"], found["rounded"]["helpfulness"]) == (1, 1)


def test_people_who_differ_ask_for_two_more(store: Store, make_project: Make) -> None:
    project, people = make_project(store, 1, people=6)
    for person, helpfulness in zip(people, [0, 2, 4, 0, 4], strict=False):
        (item,) = store.deal(project, person, 1)
        store.submit(person, answer(item["id"], **RATING | {"helpfulness": helpfulness}))
        (found,) = store.items(project)
        assert found["need"] == (5 if found["have"] >= 3 else 3)
    assert (found["state"], found["closed"], found["rounded"]["helpfulness"]) == ("done", 1, 1)
    assert store.deal(project, people[5], 1) == []


def test_an_expert_settles_what_stays_in_dispute(store: Store, make_project: Make) -> None:
    project, people = make_project(store, 1, people=5)
    for person, helpfulness in zip(people, [0, 4, 0, 4, 2], strict=True):
        (item,) = store.deal(project, person, 1)
        content = RATING | {"helpfulness": helpfulness, "coherence": helpfulness}
        store.submit(person, answer(item["id"], **content))
    expert = store.add_person("expert", "expert")
    store.submit(expert, answer(item["id"], **RATING | {"helpfulness": 2}), role="expert")
    (found,) = store.items(project)
    assert (found["state"], found["rule"], found["rounded"]["helpfulness"], found["have"]) == ("settled", "expert", 2, 5)


@pytest.mark.parametrize("wrong", [{"helpfulness": 5}, {"helpfulness": 2.5}, {"helpfulness": True}, {"helpfulness": None}, {"score": 1}])
def test_a_wrong_value_is_refused_and_nothing_is_stored(local_store: Store, make_project: Make, wrong: dict[str, Any]) -> None:
    project, (one, *_) = make_project(local_store, 1)
    (item,) = local_store.deal(project, one, 1)
    with pytest.raises(InputError):
        local_store.submit(one, answer(item["id"], **RATING | wrong))
    assert not local_store.answers(project) and len(local_store.deal(project, one, 1)) == 1


def test_a_flagged_item_goes_to_others_and_back_when_the_flag_is_taken(store: Store, make_project: Make) -> None:
    project, (one, two, _) = make_project(store, 1)
    (item,) = store.deal(project, one, 1)
    store.flag(one, item["id"], "broken", "no text \udc00\0")
    store.flag(one, item["id"], "pii")
    assert store.deal(project, one, 1) == [] and len(store.deal(project, two, 1)) == 1
    assert store.flags(project) == {"pii": 1} and store.progress(project, one) == {"answered": 0, "skipped": 1}
    store.unflag(one, item["id"])
    assert len(store.deal(project, one, 1)) == 1
    with pytest.raises(InputError):
        store.flag(one, item["id"], "ugly")


def test_a_new_guideline_has_a_number_that_answers_name(store: Store, make_project: Make) -> None:
    project, (one, two, _) = make_project(store, 1)
    (item,) = store.deal(project, one, 1)
    assert store.set_guideline(project, "be kinder", store.owner()) == 2
    store.submit(one, answer(item["id"]))
    store.deal(project, two, 1)
    store.submit(two, answer(item["id"]) | {"guideline": 2})
    assert [a["guideline"] for a in store.answers(project)] == [1, 2]


def test_people_come_by_invitation_once_and_leave_their_answers(store: Store, make_project: Make) -> None:
    project, _ = make_project(store, 1, people=0)
    owner = store.owner()
    assert store.owner() == owner
    store.invite("key", "annotator", 60)
    person = store.accept("key", "Ada", "secret")
    assert store.secret_of("Ada") == (person, "secret") and person.pseudonym == "a2"
    for wrong in ("key", "other"):
        with pytest.raises(Refused, match="expired"):
            store.accept(wrong, "Bob", "secret")
    store.invite("old", "annotator", -1)
    with pytest.raises(Refused, match="expired"):
        store.accept("old", "Bob", "secret")
    store.open_session("s", person, 60)
    assert store.session("s") == person and store.session("x") is None
    (item,) = store.deal(project, person, 1)
    store.submit(person, answer(item["id"]))
    store.remove_person(person.id, owner)
    assert store.session("s") is None and store.secret_of("Ada") is None
    assert [a["pseudonym"] for a in store.answers(project)] == ["a2"]
    assert store.accept.__doc__ and [p["name"] for p in store.people()] == ["owner"]
    assert store.add_person("Ada", "reader").pseudonym == "a3"  # never the same again


def test_names_are_unique_and_sessions_end(store: Store) -> None:
    person = store.add_person("Ada", "annotator")
    with pytest.raises(Refused, match="already"):
        store.add_person(" Ada ", "reader")
    for name in ("Ada\nBob", "Ada\x1b[2J", " "):
        with pytest.raises(InputError, match="on one line"):
            store.add_person(name, "reader")
    store.open_session("old", person, -1)
    assert store.session("old") is None
    for key in "ab":
        store.open_session(key, person, 60)
    store.close_sessions("a", person, False)
    assert store.session("a") is None and store.session("b") == person
    store.close_sessions("b", person, True)
    assert store.session("b") is None


def test_a_project_needs_items_and_people(local_store: Store) -> None:
    owner = local_store.owner()
    with pytest.raises(InputError, match="nothing to ask"):
        local_store.create_project("rate", "p", [], source="f", need=1, guideline="", by=owner)
    with pytest.raises(InputError, match="from 1 to 25"):
        local_store.create_project("rate", "p", [], source="f", need=0, guideline="", by=owner)


def test_what_was_said_is_there_after_a_restart(where: Path | str, make_project: Make) -> None:
    database = Database(where)
    store = Store(database)
    project, (one, *_) = make_project(store, 1)
    (item,) = store.deal(project, one, 1)
    store.submit(one, answer(item["id"]))
    database.close()
    database = Database(where)
    assert len(Store(database).answers(project)) == 1
    database.close()
