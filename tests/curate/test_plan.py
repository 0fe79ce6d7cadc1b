"""Plan of a curation: its sums, and which numbers it refuses."""

import json
import math

import pytest
from typer.testing import CliRunner

from gristmill.cli.main import app
from gristmill.core.config import RECIPES, read
from gristmill.core.errors import InputError
from gristmill.curate.plan import DOCUMENT_BYTES, NODE_BANDWIDTH, RATES, CurationPlan, plan_curation, steps_of

ENGLISH = steps_of(read(RECIPES / "english-text.yaml"))


def plan_of(documents: float = 1e9, nodes: int = 32, cores: int = 64) -> CurationPlan:
    return plan_curation(ENGLISH, documents, nodes, cores=cores)


def test_neighbours_that_look_at_one_document_share_a_pass() -> None:
    assert [stage.name for stage in plan_of().stages] == ["read", "clean-language-filter", "exact", "fuzzy", "pii", "write"]


def test_core_hours_are_those_of_the_measured_pipeline() -> None:
    # read, clean, heuristics, exact, fuzzy, personal data, write: 23.4 MB a CPU second, measured as a whole; with language 14.3
    for steps, rate in (([s for s in ENGLISH if s != "language"], 23.4e6), (ENGLISH, 14.3e6)):
        plan = plan_curation(steps, 1e6, 1, cores=1)
        assert plan.text_bytes / (plan.core_hours * 3600) == pytest.approx(rate, rel=0.15)


def test_disk_holds_every_stage_and_keys() -> None:
    text = 1e9 * DOCUMENT_BYTES
    plan = plan_of()
    assert plan.disk == 6 * text + 1e9 * (24 + 320)
    assert plan.traffic == sum(stage.read + stage.written + 2 * stage.shuffled for stage in plan.stages)


def test_a_stage_takes_as_long_as_its_computing_or_its_traffic() -> None:
    one, many = plan_of(nodes=1, cores=1), plan_of(nodes=1, cores=2**20)
    assert one.hours == pytest.approx(one.core_hours, rel=0.02)  # even one core finds equal texts faster than they arrive
    assert many.hours == pytest.approx(many.traffic / NODE_BANDWIDTH / 3600)
    assert plan_of(documents=2e9).hours == pytest.approx(2 * plan_of().hours)


@pytest.mark.parametrize("numbers", [{"documents": math.nan}, {"documents": 0}, {"documents": 1e30}, {"nodes": 0}, {"cores": -1}])
def test_numbers_that_cannot_be_used(numbers: dict) -> None:
    with pytest.raises(InputError, match=f"--{next(iter(numbers))} a number from 1"):
        plan_of(**numbers)


def test_the_command() -> None:
    asked = ["plan", "curate", "--documents", "1e9", "--nodes", "32"]
    facts = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
    assert facts["hours"] == plan_of().hours and facts["disk_bytes"] == plan_of().disk and facts["network_bytes"] == plan_of().traffic
    assert "In all" in CliRunner().invoke(app, asked).stdout


def test_steps_without_a_rate_are_named() -> None:
    assert plan_curation(["clean", "semantic", "rephrase"], 1e6, 1, cores=1).unknown == ("semantic", "rephrase")
    assert set(ENGLISH) <= set(RATES)
    for recipe in ({}, {"steps": "clean"}, {"steps": [{"step": 3}]}):
        with pytest.raises(InputError, match="a list of steps"):
            steps_of(recipe)
