"""Page of a safety evaluation: what it tells, and that nothing of what a model wrote becomes markup."""

import json
from pathlib import Path

from gristmill.evaluate.safety import counts
from gristmill.evaluate.stats import accuracy
from gristmill.report.safety import write_safety_page
from tests.report.links import opened


def test_the_page_tells_outcomes_guards_and_canaries_and_escapes_all_that_was_written(tmp_path: Path) -> None:
    outcomes = ["passed", "failed", "failed", "incoherent", "none"]
    label = {"unsafe": counts(outcomes)}
    found = {
        "model": "m<b>",
        "settings": {"sets": ["own.jsonl"], "limit": None, "seed": 0},
        "sets": {"own": {"labels": label, "types": {"a": label["unsafe"], "b<i>": label["unsafe"]}, "refusals": {}}},
        "attacks": {"(none)": label["unsafe"], "base64": label["unsafe"]},
        "guards": {"judge:g": {"unsafe": accuracy([True, False]), "unreadable": 1, "codes": {"O3": accuracy([True])}}},
    }
    found["sets"]["own"]["refusals"] = {"compliance": accuracy([True, True, False])}  # type: ignore[index]
    (tmp_path / "results.json").write_text(json.dumps(found))
    planted = {"repeated": accuracy([True, False, False])}
    (tmp_path / "canaries.results.json").write_text(json.dumps({"model": "m", "planted": planted, "control": planted}))
    row = {"outcome": "failed", "label": "unsafe", "set": "own", "type": "b<i>", "attack": ""}
    row |= {"messages": [{"role": "user", "content": "<script>alert(1)</script>"}], "answer": "<img src=x>" + "y" * 5000}  # type: ignore[dict-item]
    (tmp_path / "samples.jsonl").write_text(json.dumps(row | {"outcome": "passed"}) + "\n" + json.dumps(row) + "\n")
    page = write_safety_page(tmp_path).read_text()
    for text in ("unsafe prompts answered", "0.667", "base64", "judge:g", "Canaries", "1 of 1 prompts that failed", "m&lt;b&gt;"):
        assert text in page, text
    assert "<script" not in page and "<img" not in page and "<i>" not in page and len(page) < 30_000
    assert [found["at"] for found in opened(tmp_path, page, tmp_path / "cache")] == ["line 2"]
    assert "y" * 1400 in page and "y" * 1600 not in page


def test_a_folder_with_canaries_alone_has_a_page(tmp_path: Path) -> None:
    group = {"repeated": accuracy([False]), "exposure": {"mean": 1.5, "ci95": [1.0, 2.0], "n": 1}}
    (tmp_path / "canaries.results.json").write_text(json.dumps({"model": "m", "planted": group, "control": group}))
    page = write_safety_page(tmp_path).read_text()
    assert "1.50 [1.00, 2.00]" in page and "What failed" not in page
