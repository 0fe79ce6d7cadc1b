"""Export: files of the same bytes, which the trainer's readers take as they are."""

import json
from pathlib import Path
from typing import Any

import pytest

from gristmill.data.readers import read_pairs, read_ratings
from gristmill.data.rows import ATTRIBUTES, Rated, read_rows
from gristmill.studio.agreement import agreement
from gristmill.studio.export import FILES, export
from gristmill.studio.sources import Sources
from gristmill.studio.store import Store
from tests.studio.conftest import RATING, answer

ANSWERS = "01-answers/responses.parquet"


def create(store: Store, sources: Sources, kind: str, need: int = 3) -> str:
    items = sources.choose_items(ANSWERS, kind, num=6, seed=0)
    return store.create_project(kind, kind, items, source=ANSWERS, need=need, guideline="", by=store.owner())


def work(store: Store, project: str, marks: Any) -> None:
    """Three people answer every item: marks(person's number, item's number) -> content."""
    for number in range(3):
        person = store.add_person(f"{project} {number}", "annotator")
        while items := store.deal(project, person, 20):
            for item in items:
                store.submit(person, answer(item["id"], **marks(number, item["number"])))


@pytest.fixture
def worked(local_store: Store, sources: Sources) -> Store:
    rate, pair = create(local_store, sources, "rate"), create(local_store, sources, "pair")
    work(local_store, rate, lambda person, item: RATING | {"helpfulness": (0, 2, 4)[person] if item == 0 else 2 + (item + person) % 2})
    strengths = ((-2, -1, -2), (1, 2, 2), (0, 0, 0), (None, None, 1), (3, 2, 3), (-1, -1, -1))

    def prefer(person: int, item: int) -> dict[str, Any]:
        strength = strengths[item][person]
        return {"preference": strength or 0, "neither": strength is None, "reason": "because"}

    work(local_store, pair, prefer)
    return local_store


def test_the_trainers_readers_take_the_files(worked: Store, sources: Sources, tmp_path: Path) -> None:
    counts = export(worked, sources, tmp_path)
    # one item of twelve waits for two more people; six comparisons: one tie, one without an acceptable answer
    made = {"demonstrations.parquet": 0, "attacks.jsonl": 0, "regressions.jsonl": 0}
    said = {"rated.parquet": 11, "ratings.jsonl": 36, "pairs.parquet": 4, "preference.jsonl": 5}
    assert counts == {**said, **made, "gone": 0, "split": 1}
    rated = read_ratings(tmp_path / "rated.parquet")
    assert len(rated) == 11 and all(r.labels[0] in (2, 3) and r.labels[2] == 4 for r in rated)
    single = read_ratings(tmp_path / "ratings.jsonl")
    assert len(single) == 36 and {m.role for r in single for m in r.messages} == {"system", "user", "assistant"}
    pairs = read_pairs(tmp_path / "pairs.parquet")
    assert sorted(round(p.chosen_reward, 3) for p in pairs) == [1, 1.667, 1.667, 2.667]
    for pair in pairs:
        assert {pair.chosen.split()[0], pair.rejected.split()[0]} == {"It", "Perhaps"}


def test_rows_name_people_time_and_item(worked: Store, sources: Sources, tmp_path: Path) -> None:
    export(worked, sources, tmp_path)
    row = read_rows(tmp_path / "rated.parquet", Rated)[0]
    assert row.meta["annotators"] == ["a2", "a3", "a4"] and row.meta["rule"] == "helpsteer2" and row.meta["at"].endswith("Z")
    assert row.meta["rows"][0].partition("#")[0] and row.meta["source"] == ANSWERS
    assert set(row.meta["mean"]) == set(ATTRIBUTES)
    text = (tmp_path / "ratings.jsonl").read_text()
    assert "person" not in text and '"annotator": "a2"' in text  # pseudonyms alone


def test_preferences_have_helpsteers_columns(worked: Store, sources: Sources, tmp_path: Path) -> None:
    export(worked, sources, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "preference.jsonl").read_text().splitlines()]
    assert [row["preference_strength"] for row in rows] == [-2, 2, 0, 3, -1]
    assert rows[0]["preference_statement"] == "Response 1 is better than Response 2"
    assert len(rows[0]["three_most_similar_preferences"]) == len(rows[0]["all_preferences_unprocessed"]) == 3


def test_both_files_of_comparisons_round_alike(local_store: Store, sources: Sources, tmp_path: Path) -> None:
    project = create(local_store, sources, "pair", need=2)
    for marks in ((0, 0, 2), (1, -1, 3)):  # of three items, whose means stay as they are: two people
        person = local_store.add_person(f"person {marks[0]}", "annotator")
        for item, preference in zip(local_store.deal(project, person, 3), marks, strict=True):
            local_store.submit(person, answer(item["id"], preference=preference, neither=False))
    export(local_store, sources, tmp_path)
    strengths = [json.loads(line)["preference_strength"] for line in (tmp_path / "preference.jsonl").read_text().splitlines()]
    assert strengths == [1, -1, 3] and [p.chosen_reward for p in read_pairs(tmp_path / "pairs.parquet")] == [0.5, 0.5, 2.5]


def test_the_same_database_gives_the_same_bytes(worked: Store, sources: Sources, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        export(worked, sources, tmp_path / folder)
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_prompt_with_an_answer_in_dispute_is_left_out(local_store: Store, sources: Sources, tmp_path: Path) -> None:
    project = create(local_store, sources, "rate")
    work(local_store, project, lambda person, item: RATING | {"helpfulness": (0, 2, 4)[person] if item == 0 else 2, "coherence": 2})
    expert = local_store.add_person("expert", "expert")
    first = local_store.items(project)[0]
    for helpfulness in (0, 4):
        person = local_store.add_person(f"more {helpfulness}", "annotator")
        (item,) = local_store.deal(project, person, 1)
        # every triple then spreads over more than 2 on helpfulness: the others differ more on coherence
        local_store.submit(person, answer(item["id"], **RATING | {"helpfulness": helpfulness, "coherence": 0, "correctness": 0}))
    counts = export(local_store, sources, tmp_path)
    state = local_store.items(project)[0]["state"]
    assert state == "split" and counts["rated.parquet"] == 10 and counts["split"] == 1
    local_store.submit(expert, answer(first["id"], **RATING), role="expert")
    assert export(local_store, sources, tmp_path)["rated.parquet"] == 12


def test_nobody_has_answered(local_store: Store, sources: Sources, tmp_path: Path) -> None:
    create(local_store, sources, "rate")
    assert set(export(local_store, sources, tmp_path).values()) == {0}


def test_rows_that_are_gone_are_counted(worked: Store, sources: Sources, run_folder: Path, tmp_path: Path) -> None:
    (run_folder / ANSWERS).unlink()
    counts = export(worked, sources, tmp_path)
    assert counts["gone"] == 17 and counts["rated.parquet"] == counts["pairs.parquet"] == 0


def test_agreement_of_the_people(worked: Store) -> None:
    rate, pair = (project["id"] for project in worked.projects())
    found = agreement(worked, rate)
    assert [a["name"] for a in found["attributes"]] == list(ATTRIBUTES) and found["shared"] == 12 and found["says"] == ""
    helpfulness, correctness = found["attributes"][:2]
    assert helpfulness["alpha"] < 0.5 and correctness["alpha"] is None  # all gave 3
    assert sum(map(sum, helpfulness["confusion"])) == 12 * 3 * 2
    assert [p["name"] for p in found["people"]] == ["a2", "a3", "a4"] and found["people"][0]["seconds"] == 4
    assert found["disputed"][0]["answers"][0]["content"]["helpfulness"] == 0
    assert agreement(worked, pair)["attributes"][0]["name"] == "preference"
    worked.set_guideline(rate, "other", worked.owner())
    newer = agreement(worked, rate)
    assert newer["answers"] == 0 and newer["others"] == 36 and "Nobody has answered" in newer["says"]
    assert agreement(worked, rate, guideline=0)["answers"] == 36
