"""Agreement of a project's people: each attribute's alpha and kappa, each person against the others, confusions, disputed items."""

from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from gristmill.data.rows import ATTRIBUTES
from gristmill.evaluate.reliability import alpha, confusions, mean_kappa, weighted_kappa
from gristmill.studio.consensus import NEITHER
from gristmill.studio.store import ANNOTATOR, Store, by_item
from gristmill.studio.tasks import MAX_STRENGTH, MAX_VALUE, RATE

# Quadratic kappa of HelpSteer2's published ratings (its paper, table of agreement), to read ours beside.
PUBLISHED = dict(zip(ATTRIBUTES, (0.791, 0.793, 0.428, 0.427, 0.548), strict=True))
MAX_DISPUTED = 20
MIN_STRAIGHT = 5  # answers of a person, below which equal marks say nothing


def agreement(store: Store, project: str, *, guideline: int | None = None) -> dict[str, Any]:
    """Statistics of a project, of answers that were given by one version of its guideline.

    Args:
        guideline: the version; None: the newest. 0: of all versions together.
    """
    found = store.project(project)
    version = found["guideline"] if guideline is None else guideline
    every = [a for a in store.answers(project) if a["role"] == ANNOTATOR]
    answers = [a for a in every if version in (0, a["guideline"])]
    people = sorted({a["pseudonym"] for a in answers}, key=lambda name: int(name[1:]))
    names, num_values = (ATTRIBUTES, MAX_VALUE + 1) if found["kind"] == RATE else (("preference",), 2 * MAX_STRENGTH + 1)
    items = by_item(answers)
    tables = {name: _table(items, people, name) for name in names}
    return {
        "kind": found["kind"],
        "guideline": version,
        "guidelines": found["guideline"],
        "others": len(every) - len(answers),
        "items": len(items),
        "shared": sum(len(one) > 1 for one in items.values()),
        "answers": len(answers),
        "attributes": [_attribute(name, tables[name], num_values) for name in names],
        "people": [_person(name, place, tables, answers, num_values=num_values) for place, name in enumerate(people)],
        "disputed": _disputed(store, project, items, names),
        "flags": store.flags(project),
        "says": _lacking(items, people),
    }


def _table(items: dict[str, list[dict[str, Any]]], people: Sequence[str], name: str) -> list[list[int | None]]:
    """Values of an attribute: a row an item, a column a person. Answers that say "neither" have no preference."""
    out = []
    for answers in items.values():
        row: list[int | None] = [None] * len(people)
        for a in answers:
            if not a["content"].get(NEITHER):
                row[people.index(a["pseudonym"])] = a["content"][name] + (MAX_STRENGTH if name == "preference" else 0)
        out.append(row)
    return out


def _attribute(name: str, table: list[list[int | None]], num_values: int) -> dict[str, Any]:
    estimate = alpha(table, num_values)
    matrices = list(confusions(table, num_values).values())
    together = sum(matrices, np.zeros((num_values, num_values)))
    together = together + together.T
    return {
        "name": name,
        "alpha": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "kappa": mean_kappa(table, num_values),
        "published": PUBLISHED.get(name),
        "items": sum(sum(value is not None for value in row) > 1 for row in table),
        "confusion": together.astype(int).tolist(),
    }


def _person(
    name: str, place: int, tables: dict[str, list[list[int | None]]], answers: Sequence[dict[str, Any]], *, num_values: int
) -> dict[str, Any]:
    """A person against the mean of the others on shared items: kappa, bias, seconds, and how often all marks are the same."""
    mine = [a for a in answers if a["pseudonym"] == name]
    kappas, biases = {}, {}
    for attribute, table in tables.items():
        both = [(row[place], [v for i, v in enumerate(row) if i != place and v is not None]) for row in table]
        shared = [(own, sum(others) / len(others)) for own, others in both if own is not None and others]
        if shared:
            own, rounded = [own for own, _ in shared], [int(mean + 0.5) for _, mean in shared]
            kappas[attribute] = weighted_kappa(own, rounded, num_values, weights="quadratic")
            biases[attribute] = sum(own - mean for own, mean in shared) / len(shared)
    marks = [tuple(a["content"].get(attribute) for attribute in tables) for a in mine]
    straight = sum(len(set(one)) == 1 for one in marks) / len(marks) if len(tables) > 1 and len(marks) >= MIN_STRAIGHT else None
    return {
        "name": name,
        "answers": len(mine),
        "kappa": kappas,
        "bias": biases,
        "seconds": median(a["seconds"] for a in mine),
        "straight": straight,
    }


def _disputed(store: Store, project: str, items: dict[str, list[dict[str, Any]]], names: Sequence[str]) -> list[dict[str, Any]]:
    """The items on which people differ most, the most first; those that were settled are left out."""

    def spread(answers: Sequence[dict[str, Any]]) -> float:
        valid = [a["content"] for a in answers if not a["content"].get(NEITHER)]
        ranges = [max(c[name] for c in valid) - min(c[name] for c in valid) for name in names] if len(valid) > 1 else [0]
        return float(10 * ranges[0] + sum(ranges))

    rows = {item["id"]: item for item in store.items(project)}
    found = [(spread(answers), item) for item, answers in items.items() if rows[item]["rule"] != "expert"]
    worst = sorted((one for one in found if one[0] > 0), key=lambda one: (-one[0], rows[one[1]]["number"]))[:MAX_DISPUTED]
    return [
        {
            "item": item,
            "excerpt": rows[item]["excerpt"],
            "task": rows[item]["task"],
            "state": rows[item]["state"],
            "answers": [{"person": a["pseudonym"], "content": a["content"]} for a in items[item]],
        }
        for _, item in worst
    ]


def _lacking(items: dict[str, list[dict[str, Any]]], people: Sequence[str]) -> str:
    """What keeps agreement from being computed; "" where nothing does."""
    if not items:
        return "Nobody has answered yet by this version of the guideline."
    if len(people) < 2:
        return "One person has answered: agreement needs a second."
    if not any(len(answers) > 1 for answers in items.values()):
        return "No item has answers of two people yet."
    return ""
