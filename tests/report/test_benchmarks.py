"""Benchmark results as lines and as a page, in which what a model wrote is text."""

import re
from pathlib import Path
from typing import Any

import pytest

from gristmill.core.progress import Progress
from gristmill.report.benchmarks import benchmark_text, write_benchmark_page
from gristmill.workflows.benchmark_requests import BenchmarkArgs
from gristmill.workflows.benchmarks import run_benchmarks
from tests.evaluate.benchmarks import Scripted, write_data
from tests.report.links import opened

EVIL = "<script>alert(1)</script>\x1b[31m The answer is 0."


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("eval")
    data = write_data(out / "data")

    def run(name: str, answer: str, **settings: Any) -> dict[str, Any]:
        args = BenchmarkArgs(tasks=("mmlu", "gsm8k_cot"), data=data, out=out / name, num_fewshot=1, **settings)
        return run_benchmarks(lambda: Scripted({"0 and 0?\nA:": answer}), {"name": "<b>model</b>"}, args, Progress(quiet=True))

    run("before", "none")
    return out / "after", run("after", EVIL, against=out / "before")


def test_lines(evaluated: tuple[Path, dict[str, Any]]) -> None:
    text = benchmark_text(evaluated[1])
    lines = text.splitlines()
    assert re.match(r"mmlu +1 +acc +0\.3333 \[0\.097, 0\.700\] +6 +macro 0\.3333$", lines[1])
    assert re.match(r"gsm8k_cot +1 +exact_match,strict-match +0\.3333 \[.*\] +3 +2 unparsed$", lines[2])
    assert any(line.startswith("gsm8k_cot: against") and "+0.3333" in line for line in lines)
    assert any("3 documents, and the published split test has 1,319" in line for line in lines)
    assert any(line == "gsm8k_cot: 2 empty answers" for line in lines)


def test_contamination_stands_beside_the_score(tmp_path: Path) -> None:
    data = write_data(tmp_path)
    args = BenchmarkArgs(tasks=("gsm8k_cot",), data=data, contamination=data / "gsm8k" / "test.jsonl", num_fewshot=0)
    report = run_benchmarks(Scripted, {"name": "m"}, args, Progress(quiet=True))
    assert "gsm8k_cot: 0 of 3 documents have 13 words in a row in the training rows" in benchmark_text(report).splitlines()
    report["tasks"]["gsm8k_cot"]["contaminated"] = 1
    assert "; without them exact_match,strict-match is 0.0000" in benchmark_text(report)


def test_the_page_shows_worst_items_and_runs_nothing(evaluated: tuple[Path, dict[str, Any]]) -> None:
    page = write_benchmark_page(*evaluated).read_text()
    for part in ("mmlu by subset", "old_stones", "Wilson", "gsm8k_cot: worst items", "Tokens of an answer: 10 % at most 0", "read by own"):
        assert part in page
    assert "<script>" not in page and "\x1b" not in page and "&lt;b&gt;model" in page
    assert "document 1" in page and "* " in page  # the right choice of a wrong item


def test_every_item_opens_in_the_studio(evaluated: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    rows = opened(evaluated[0], write_benchmark_page(*evaluated).read_text(), tmp_path)
    assert {row["source"] for row in rows} == {f"samples/{name}.jsonl" for name in evaluated[1]["tasks"]}
    assert all(row["kind"] == "samples" and row["at"] == f"line {row['place'] + 1}" for row in rows)
