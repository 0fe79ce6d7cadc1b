"""People in a run: report section on who judged what, and the rows of a round check for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from gristmill.report.comparisons import format_ci, format_difference, format_score
from gristmill.report.markup import Markup, el, table
from gristmill.runs import artifacts
from gristmill.runs.checks import Check
from gristmill.runs.reader import RunData
from gristmill.runs.stage_names import round_of

LEAD = "Who judged what: people in the studio, programs and models, a round at a time."
KINDS = ("ratings", "comparisons", "rows")  # what a person gives


def has_people(data: RunData) -> bool:
    """Whether people had a part in a run."""
    return any("said" in stage or "checked" in stage for stage in data.stages)


def people_section(data: RunData) -> list[Markup]:
    """What each person gave, what became of it, checks of rounds, and how many answers which judge decided."""
    return [*_judges(data), *_given(data), *_taken(data), *_reward(data), *_checks(data)]


def _judges(data: RunData) -> list[Markup]:
    rows: list[list[Any]] = []
    for stage in data.stages_with(artifacts.KEPT):
        counts: dict[str, int] = {}
        for of_task in stage["funnel"].values():
            for judge, n in of_task["judge"].items():
                counts[judge] = counts.get(judge, 0) + n
        rows.append([f"Round {round_of(stage['name'])}", ", ".join(f"{judge} {n:,}" for judge, n in sorted(counts.items()))])
    return [el("h3", "Answers, by what judged them"), table(["round", "answers"], rows, numeric_from=9)] if rows else []


def _given(data: RunData) -> list[Markup]:
    """By person, from the last round: a round takes all that was said so far."""
    last = next((stage["said"] for stage in reversed(_in_order(data, "said"))), None)
    if not last or not last["people"]:
        return []
    rows = [[name, *(f"{counts.get(kind, 0):,}" for kind in KINDS)] for name, counts in last["people"].items()]
    return [el("h3", "People, by the names that exports know them by"), table(["person", *KINDS], rows)]


def _taken(data: RunData) -> list[Markup]:
    rows: list[list[Any]] = []
    for stage in _in_order(data, "said"):
        said = stage["said"]
        lost = ", ".join(f"{n:,} {why}" for why, n in said["left_out"].items()) or "\u2013"
        taken = [f"{said[kind]:,}" for kind in ("ratings", "pairs", "demonstrations")]
        rows.append([f"Round {round_of(stage['name'])}", *taken, lost])
    head = ["round", "rated answers", "pairs", "conversations", "left out"]
    return [el("h3", "Human data of each round, from the studio"), table(head, rows)] if rows else []


def _reward(data: RunData) -> list[Markup]:
    rows: list[list[Any]] = []
    for stage in data.stages:
        if held := stage.get("held_out"):
            scores = [f"{format_score(held[key]['mean'])} {format_ci(held[key])}" for key in ("before", "after")]
            rows.append([f"Round {round_of(stage['name'])}", *scores, format_difference(held["difference"]), held["after"]["n"]])
    head = ["round", "before", "with people's ratings", "difference, paired", "pairs"]
    return [el("h3", "Reward model on held-out pairs"), table(head, rows)] if rows else []


def _checks(data: RunData) -> list[Markup]:
    rows: list[list[Any]] = []
    for stage in _in_order(data, "checked"):
        check = stage["checked"]
        wrong = f"{check['wrong']['mean']:.0%} {format_ci(check['wrong'])}" if check["wrong"]["n"] else "nobody looked"
        looked = f"{check['wrong']['n']} of {check['rows']}"
        rows.append(
            [
                f"Round {round_of(stage['name'])}",
                check["decision"],
                check["by"],
                looked,
                wrong,
                check["reject"],
                check["repair"],
                check["at"],
            ]
        )
    head = ["round", "decision", "by", "rows looked at", "wrong", "rejected", "repaired", "at (UTC)"]
    return [el("h3", "Checks before training"), table(head, rows, numeric_from=3)] if rows else []


def _in_order(data: RunData, key: str) -> list[dict[str, Any]]:
    return sorted((stage for stage in data.stages if key in stage), key=lambda stage: round_of(stage["name"]))


# ---- for a terminal ----


def check_rows(check: Check) -> list[dict[str, Any]]:
    """The sample of a check, as plain rows."""
    rows = artifacts.CHECK.read(check.folder)
    return [{"id": r.id, "task": r.task, "messages": [{"role": m.role, "content": m.content} for m in r.messages]} for r in rows]


def check_lines(check: Check, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A check and its rows to read."""
    lines = []
    for row in rows:
        lines.append(f"{row['id']}  {row['task']}")
        lines += [f"  {m['role']}: {' '.join(m['content'].split())}" for m in row["messages"]]
    asked = check.question
    state = f"decided: {check.decision['decision']} by {check.decision['by']}" if check.decision else "waiting"
    what = f"{asked['rows']} of {asked['of']:,} rows, seed {asked['seed']}"
    lines.append(f"{check.stage}: {what}; {state}; until {asked['until']}, then {asked['default']}")
    return lines
