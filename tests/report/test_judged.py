"""Results of judged benchmarks as lines and as a page, in which what models wrote is text."""

import json
from pathlib import Path
from typing import Any

from gristmill.evaluate import mt_bench
from gristmill.report.judged import judged_text, write_judged_page
from tests.report.links import opened

EVIL = "<script>alert(1)</script>\x1b[31m"
SETTINGS = {"limit": 1, "seed": 0, "greedy": True, "explain": False, "max_tokens": None, "judge_tokens": 64}


def graded(turn: int, reply: str | None, score: float | None) -> dict[str, Any]:
    head = {"id": "81", "category": "writing", "turn": turn, "question": "Why?", "answer": EVIL}
    return head | {"reply": reply, "score": score, "fastchat_score": score}


SAMPLES = [graded(1, "Rating: [[7]]", 7.0), graded(2, "It depends.", None), graded(1, "Rating: [[2]]", 2.0), graded(2, None, None)]
RESULTS: dict[str, Any] = {
    "benchmark": "mt-bench",
    "model": "<b>m</b>",
    "judge": "j",
    "settings": SETTINGS,
    "scores": mt_bench.grade_scores(SAMPLES, seed=0),
    "verdicts": {"replies": 3, "unreadable": 1},
    "failed_calls": 1,
    "notes": ["Math has no reference."],
}


def test_lines() -> None:
    lines = judged_text(RESULTS).splitlines()
    assert lines[0].split()[:2] == ["MT-Bench", "4.50"] and lines[0].endswith("n 2")
    assert lines[-2:] == ["unreadable verdicts: 1 of 3 replies; failed calls: 1", "note: Math has no reference."]


def test_the_page_counts_what_cannot_be_read_and_shows_it(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SAMPLES))
    page = write_judged_page(tmp_path, RESULTS, tmp_path / "samples.jsonl").read_text()
    for part in (
        "mt-bench: &lt;b&gt;m&lt;/b&gt; judged by j",
        "limit 1; seed 0; greedy; judge tokens 64; the first questions of each category alone: no published figure",
        "unreadable verdicts: 1 of 3 replies; failed calls: 1; what cannot be read is left out of the means",
        "replies that cannot be read: 1 samples",
        "the lowest grades",
        "Math has no reference.",
    ):
        assert part in page, part
    assert page.index("It depends.") < page.index("Rating: [[2]]") < page.index("Rating: [[7]]"), "unreadable ones first, then the lowest"
    assert "<script>" not in page and "\x1b" not in page
    assert [row["place"] for row in opened(tmp_path, page, tmp_path / "cache")] == [1, 2, 0], "each opens in the studio"
    (tmp_path / "samples.jsonl").write_text("")
    assert "lowest grades" not in write_judged_page(tmp_path, RESULTS, tmp_path / "samples.jsonl").read_text()
