"""What an export says of its rows."""

from pathlib import Path
from typing import Any

import yaml

from gristmill.core.config import check
from gristmill.data.chat import Message
from gristmill.data.rows import Demonstration
from gristmill.workflows.dataset.export import card
from gristmill.workflows.dataset.recipe import DatasetRecipe

RESULTS: dict[str, Any] = {"prompts": 1, "responses": 2, "calls": {"failed": 0}, "funnel": {"read": 1}, "dropped": {}}


def test_names_are_no_markup_of_the_card(tmp_path: Path) -> None:
    folder = tmp_path / "a\n# `b`"
    generators: list[dict[str, Any]] = [{"base_url": "http://127.0.0.1/v1", "model": "m`n"}, {"folder": str(folder)}]
    recipe = check(DatasetRecipe, {"generators": generators, "pipelines": {"from_file": None}, "prompts": "p.jsonl", "licence": "a: b"})
    text = card(recipe, RESULTS, [Demonstration("1", "a|b <i>", (Message("user", "x"), Message("assistant", "y")), "m")], [])
    assert yaml.safe_load(text.split("---")[1])["license"] == "a: b"
    assert [line for line in text.splitlines() if line.startswith("#")] == ["# dataset"]
    assert "written by `m'n`, `a\\n# 'b'` (in process" in text
    assert "| a\\|b \\<i\\> | 1 | 0 |" in text
