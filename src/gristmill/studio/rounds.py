"""Round checks in the studio: a project for each check that a run waits for, and the decision that it gets.

The run asks by files and is answered by one (`runs.checks`); the verdicts of people stand in the studio's database.
"""

from typing import Any

from gristmill.evaluate.stats import accuracy
from gristmill.runs import checks
from gristmill.studio.consensus import verdict_of
from gristmill.studio.sources import Sources
from gristmill.studio.store import Person, Refused, Store, by_item
from gristmill.studio.tasks import CHECK, RATE

GUIDELINE = (
    "This is a sample of what the next model is about to be trained on. Accept an answer that a model should give like this; reject one "
    "that it should not learn from; repair one that is nearly right by writing how it should be."
)


def open_checks(store: Store, sources: Sources) -> None:
    """Make a project of every check that waits for people and has none yet."""
    if not sources.is_run:
        return
    waiting = [check for check in checks.find_checks(sources.folder) if check.decision is None]
    known = {project["settings"].get("check") for project in store.projects() if project["kind"] == CHECK} if waiting else set()
    for check in waiting:
        if check.question["id"] in known:
            continue
        source, number = f"{check.stage}/check.parquet", check.question["round"]
        items = sources.choose_items(source, RATE, num=int(check.question["rows"]), seed=0)
        settings = {"check": check.question["id"], "stage": check.stage}
        name = f"Check of round {number}"
        owner = store.owner()
        store.create_project(CHECK, name, items, source=source, need=1, guideline=GUIDELINE, by=owner, settings=settings, once=True)


def decided_checks(sources: Sources) -> set[str]:
    """The checks that have been decided: nobody is asked about their rows any more."""
    return {check.question["id"] for check in checks.find_checks(sources.folder) if check.decision is not None} if sources.is_run else set()


def checks_of(store: Store, sources: Sources) -> list[dict[str, Any]]:
    """Every check of the run: what was asked, what people have said so far, and the decision."""
    projects = {project["settings"].get("check"): project for project in store.projects() if project["kind"] == CHECK}
    out = []
    for check in checks.find_checks(sources.folder) if sources.is_run else []:
        project = projects.get(check.question["id"])
        said = _verdicts(store, project["id"]) if project else {}
        given = [answer["verdict"] for answer in said.values()]
        counts = {verdict: given.count(verdict) for verdict in checks.VERDICTS}
        decision = check.decision and {name: check.decision[name] for name in ("decision", "by", "at")}
        told = {name: check.question[name] for name in ("round", "rows", "of", "seed", "asked", "until", "default")}
        wrong = accuracy([verdict != checks.ACCEPT for verdict in given])
        out.append({"stage": check.stage, **told, "project": project and project["id"], "decision": decision, **counts, "wrong": wrong})
    return out


def decide(store: Store, sources: Sources, stage: str, decision: str, by: Person) -> None:
    """Answer a check with what people have said of its rows.

    Raises:
        Refused: there is no such check, or it is decided already.
    """
    check = next((one for one in checks.find_checks(sources.folder) if one.stage == stage), None) if sources.is_run else None
    if check is None:
        raise Refused(404, "There is no such check.")
    if check.decision is not None:
        raise Refused(409, f"This check was decided by {check.decision['by']} already: `gristmill check --again` changes that.")
    project = next((one["id"] for one in store.projects() if one["settings"].get("check") == check.question["id"]), None)
    said = _verdicts(store, project) if project else {}
    verdicts = {row: answer["verdict"] for row, answer in said.items()}
    repaired = {row: answer["text"] for row, answer in said.items() if answer["verdict"] == checks.REPAIR}
    checks.decide(check, decision, by.pseudonym, verdicts=verdicts, repaired=repaired)
    store.log(by, decision, stage)


def _verdicts(store: Store, project: str) -> dict[str, Any]:
    """What was decided about each row that somebody has looked at, by the row's id."""
    rows = {item["id"]: item["row_ids"][0] for item in store.items(project)}
    answers = by_item(store.answers(project))
    return {rows[item]: verdict_of([answer["content"] for answer in given]) for item, given in answers.items()}
