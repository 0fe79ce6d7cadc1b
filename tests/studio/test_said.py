"""People in the loop, from end to end: annotators of the miniature at the API, a check, and the next round that trains on it."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from typer.testing import CliRunner

from gristmill.cli.main import app
from gristmill.core.errors import InputError
from gristmill.core.progress import Progress
from gristmill.data.chat import conversation
from gristmill.data.rows import Demonstration, Pair, Rated, read_rows
from gristmill.miniature.annotators import SimulatedAnnotator
from gristmill.miniature.world import World
from gristmill.report.alignment import write_report
from gristmill.runs.checks import find_checks
from gristmill.studio.said import read_said
from gristmill.studio.serve import open_store
from gristmill.workflows.alignment import loop, people
from gristmill.workflows.alignment.recipe import AlignmentRecipe
from gristmill.workflows.dataset.lineage import lineage
from tests.studio.conftest import Client, Served, answer

Make = Callable[..., AlignmentRecipe]


def run_with_people(recipe: AlignmentRecipe, folder: Path) -> dict[str, Any]:
    with Progress(quiet=True) as progress:
        return loop.run(recipe, folder, progress, read_said=read_said)


@pytest.fixture
def opened(copy: Path) -> Iterator[Served]:
    """A studio of a finished run of one round."""
    store, sources = open_store(copy)
    made = Served(store, sources)
    yield made
    made.stop()
    store.database.close()


def annotate(client: Client, project: str, kind: str, annotator: SimulatedAnnotator) -> int:
    """Answer all that a project has for somebody, as a page would; returns how many items."""
    num = 0
    while items := client.api("GET", f"/queue?project={project}&n=20")[1]["items"]:
        for item in items:
            messages = conversation([{"role": m["role"], "content": m["text"]} for m in item["messages"]])
            texts = [one["text"] for one in item["answers"]]
            said: dict[str, Any] | None
            if kind == "rate":
                said = annotator.rate(messages, texts[0])
            elif kind == "pair":
                strength = annotator.compare(messages, *texts)
                said = None if strength is None else {"preference": strength, "neither": False}
            else:
                fine = annotator.accepts(messages, texts[0])
                said = None if fine is None else {"verdict": "accept" if fine and num else "reject"}  # and the first, whatever it says
            if said is None:
                assert client.api("POST", "/flags", {"item": item["id"], "kind": "unsure"})[0] == 200
                continue
            assert client.api("POST", "/answers", {"answers": [answer(item["id"], **said)]})[0] == 200
            num += 1
    return num


def test_what_annotators_say_of_a_round_is_trained_on_in_the_next(opened: Served, copy: Path, make_recipe: Make) -> None:
    world, owner = World.make(), opened.client("owner")
    workers = [(opened.client("annotator"), SimulatedAnnotator(world, seed)) for seed in range(3)]
    source = next(s["name"] for s in owner.api("GET", "/sources")[1]["sources"] if s["kind"] == "responses" and "r1-answers" in s["name"])
    projects = {}
    for kind in ("rate", "pair"):
        made = owner.api("POST", "/projects", {"kind": kind, "source": source, "num": 12, "need": 3})[1]
        projects[kind] = made["id"]
        for client, annotator in workers:
            annotate(client, made["id"], kind, annotator)
    turns = [{"role": "user", "content": "Name a land."}, {"role": "assistant", "content": "Batru"}]
    assert owner.api("POST", "/made", {"id": str(uuid4()), "messages": turns, "task": "talk", "model": "r1-rpo1"})[0] == 200

    # the second round waits for people, who answer in the studio
    recipe = make_recipe(rounds=2, people="studio", check={"sample": 10, "hours": 1, "default": "stop"})
    results: dict[str, Any] = {}
    running = threading.Thread(target=lambda: results.update(run_with_people(recipe, copy)))
    running.start()
    while running.is_alive() and not find_checks(copy):
        running.join(0.05)
    (check,) = [p for p in owner.api("GET", "/projects")[1]["projects"] if p["kind"] == "check"]
    assert check["name"] == "Check of round 2" and check["items"] == 10 and check["source"] == "00-r2-check/check.parquet"
    looked = annotate(workers[0][0], check["id"], "check", workers[0][1])
    (waiting,) = owner.api("GET", "/checks")[1]["checks"]
    assert waiting["decision"] is None and waiting["wrong"]["n"] == looked > 0
    assert workers[0][0].api("POST", f"/checks/{waiting['stage']}", {"decision": "approve"})[0] == 403
    assert owner.api("POST", f"/checks/{waiting['stage']}", {"decision": "approve"})[0] == 200
    assert owner.api("POST", f"/checks/{waiting['stage']}", {"decision": "stop"})[0] == 409
    running.join(120)
    assert results and results["stopped"] is None

    def rows(stage: str, name: str, row: type[Any]) -> list[Any]:
        (path,) = copy.glob(f"*-{stage}/{name}.parquet")
        return read_rows(path, row)

    ratings, pairs = rows("r2-people", "people-ratings", Rated), rows("r2-people", "people-pairs", Pair)
    assert ratings and all(r.meta["annotators"] for r in ratings)
    (talk,) = rows("r2-people", "people-demonstrations", Demonstration)
    assert talk.meta["person"] == "a1" and talk.meta["model"] == "r1-rpo1"
    done = {path.parent.name[3:]: json.loads(path.read_text()) for path in copy.glob("*/done.json")}
    assert done["r2-people"]["said"]["people"]["a2"]["ratings"] > 0
    assert done["r2-reward"]["rows"] == done["reward"]["rows"] + len(ratings) and done["r2-reward"]["held_out"]["after"]["n"] >= 0
    assert done["r2-dpo"]["rows"] == done["r2-dpo-pairs"]["pairs"] + len(pairs)
    rejected = set(json.loads((copy / "00-r2-check/decision.json").read_text())["verdicts"].items())
    left_out = {row for row, verdict in rejected if verdict == "reject"}
    assert left_out and {d.id for d in rows("r2-check", "check", Demonstration)} >= left_out
    kinds = {entry["kind"] for entry in lineage(copy, ratings[0].id)}
    assert {"rating", "response", "prompt"} <= kinds  # a label leads to the answer and what that grew from
    page = write_report(copy).read_text()
    assert "Who judged what" in page and "approve" in page and "a2" in page
    again = run_with_people(make_recipe(rounds=2), copy)
    assert again == results  # nothing is asked or made twice, also where the recipe asks for neither any more


@pytest.fixture
def small_check(make_recipe: Make) -> Callable[..., AlignmentRecipe]:
    return lambda **section: make_recipe(rounds=1, rpo_iterations=0, check={"sample": 5, "hours": 1e-5, **section})


def test_nobody_answers_a_check(small_check: Callable[..., AlignmentRecipe], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    results = run_with_people(small_check(default="stop"), folder)
    assert results["stopped"] == "round 1: stopped by people" and "time limit stopped the round" in results["alarms"][-1]["text"]
    assert not list(folder.glob("*-r1-general-sft"))
    shown = CliRunner().invoke(app, ["check", str(folder)])
    assert shown.exit_code == 0 and "decided: stop by time limit" in shown.stdout
    refused = CliRunner().invoke(app, ["check", str(folder), "--approve"])
    assert refused.exit_code == 2 and "No check of" in refused.stderr
    (row, *_) = read_rows(folder / "00-r1-check" / "check.parquet", Demonstration)
    unknown = CliRunner().invoke(app, ["check", str(folder), "--approve", "--again", "--reject", "nothing"])
    assert unknown.exit_code == 2 and "has no row 'nothing'" in unknown.stderr
    approved = CliRunner().invoke(app, ["check", str(folder), "--approve", "--again", "--reject", row.id, "--json"])
    assert json.loads(approved.stdout)["decision"] == "approve"
    results = run_with_people(small_check(default="stop"), folder)  # taken up again, with the new decision
    assert results["stopped"] is None and any(folder.glob("*-r1-general-sft/done.json"))
    told = json.loads((folder / "00-r1-check/done.json").read_text())["checked"]
    assert told["by"] == "terminal" and told["reject"] == 1 and told["wrong"]["n"] == 1


def test_verdicts_change_what_is_trained_on() -> None:
    turns = conversation([{"role": "user", "content": "2 and 2?"}, {"role": "assistant", "content": "5"}])
    kept = [Demonstration(str(n), "sums", turns, "m") for n in range(4)]
    decision = {"verdicts": {"0": "accept", "1": "reject", "2": "repair"}, "repaired": {"2": "4"}}
    rows = people.apply_verdicts(kept, decision)
    assert [r.messages[-1].content for r in rows] == ["5", "4", "5"]
    assert rows[1].origin == "human" and rows[1].parents == ("2",) and rows[1].id not in "0123"


def test_a_sample_holds_all_tasks_alike() -> None:
    turns = conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    rows = [Demonstration(f"{task}{n}", task, turns, "m") for task, num in (("a", 50), ("b", 3), ("c", 50)) for n in range(num)]
    drawn = people.draw(rows, 15, seed=1)
    assert [sum(r.task == task for r in drawn) for task in "abc"] == [6, 3, 6]
    assert drawn == people.draw(rows, 15, seed=1) != people.draw(rows, 15, seed=2)
    assert len(people.draw(rows, 1000, seed=1)) == 103


def test_a_studio_that_nobody_has_opened_says_nothing(copy: Path) -> None:
    assert read_said(copy).ratings == [] and not (copy / "studio").exists()


def test_a_password_in_a_recipe_is_refused(make_recipe: Make) -> None:
    with pytest.raises(InputError, match="PGPASSWORD"):
        make_recipe(people={"database": "postgresql://me:secret@host/x"})
