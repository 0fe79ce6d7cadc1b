"""The page of a curation that was run: what each step measured, where its limits are, both sides of them, and nothing that is markup."""

import json
import re
import shlex
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gristmill.cli.main import app
from gristmill.core.errors import InputError
from gristmill.core.progress import Progress
from gristmill.curate.recipe import Curation
from gristmill.curate.run import run
from gristmill.report.curation import funnel_lines, write_page
from gristmill.report.distributions import distribution, short
from tests.report.links import LINK, opened

HOSTILE = "<img src=x onerror=alert(1)> \u202e"
GOOD = "The people of the town have a boat that they sail with, and to be on the river is what they like. "
STEPS: list[dict[str, Any]] = [
    {"step": "clean"},
    {"step": "filter", "rules": "gopher", "limits": {"words": [10, 100], "unique_lines": [None, None]}},
    {"step": "exact"},
    {"step": "fuzzy"},
    {"step": "pii"},
]


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Documents of 8, 16 and so on words to 128, a copy, an address, and one whose id and text try to be markup."""
    folder = tmp_path_factory.mktemp("a run's")
    words = (GOOD * 8).split()
    rows = [{"id": f"d{n}", "text": " ".join(f"{w}{n}" if i % 5 == 0 else w for i, w in enumerate(words[:n]))} for n in range(8, 129, 8)]
    rows += [{"id": "copy", "text": rows[3]["text"]}, {"id": "mail", "text": f"{GOOD} Mail to someone@example.org."}]
    rows += [{"id": "<script>it's</script>", "text": HOSTILE}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "no json\n")
    recipe = Curation.model_validate({"name": "tiny", "inputs": [str(folder / "rows.jsonl")], "workers": 1, "steps": STEPS})
    results = run(recipe, folder / "run", Progress(quiet=True))
    write_page(folder / "run", results)
    return folder / "run", results


def page(folder: Path) -> str:
    return (folder / "report.html").read_text()


def card(text: str, metric: str) -> str:
    """The part of the page on one metric."""
    begin = text.index(f'<p class="title">{metric}</p>')
    end = text.find('<p class="title">', begin + 1)
    return text[begin : end if end > 0 else None]


def test_each_step_has_its_documents_time_and_memory(curated: tuple[Path, dict[str, Any]]) -> None:
    text, results = page(curated[0]), curated[1]
    for number, step in enumerate(results["steps"], 1):
        assert f'id="step-{number}"' in text and step["seconds"] >= 0 and step["peak_mib"] > 10
        row = re.search(rf"<tr><td>{step['step']}</td>(.*?)</tr>", text)
        assert row and f"{step['documents_in']:,}" in row[1] and f"{step['peak_mib']:,} MiB" in row[1]
    assert "rows.jsonl:20" in text and "not JSON" in text
    assert "words 6" in "\n".join(funnel_lines(results))


def test_a_metric_has_its_meaning_its_limits_and_all_documents(curated: tuple[Path, dict[str, Any]]) -> None:
    text, results = page(curated[0]), curated[1]
    words = card(text, "words")
    assert "Number of words; at least 10 and at most 100 is kept." in words
    assert words.count('class="level"') == 2 and words.count('class="alarm"') == 2
    shown = [int(count) for count in re.findall(r"<title>[^<]*: (\d+) documents", words)]
    assert sum(shown) == 19 == results["steps"][1]["documents_in"]
    assert "19 measured, 6 outside (31.6%), 6 dropped for it first." in words
    assert card(text, "unique_lines").count('class="level"') == 0, "a rule without limits"
    assert "Similarity" not in text and ">similarity<" not in text, "nothing was dropped for it"


def test_both_sides_of_a_limit_are_shown(curated: tuple[Path, dict[str, Any]]) -> None:
    words = card(page(curated[0]), "words")
    dropped, kept = words[words.index("dropped (2)") :].split("kept, nearest to the limit (2)")
    assert "d8" in dropped and "measured 8, limit 10" in dropped
    assert "measured 96" in kept and kept.count("measured") == 2


def test_a_document_is_explained_by_the_command_on_the_page(curated: tuple[Path, dict[str, Any]]) -> None:
    commands = ElementTree.fromstring("<p>" + "".join(re.findall(r"<code>gristmill.*?</code>", page(curated[0]))) + "</p>").iter("code")
    for command in {str(code.text) for code in commands}:
        done = CliRunner().invoke(app, shlex.split(command)[1:])
        assert done.exit_code == 0 and "step " in done.output, command


def test_every_sample_opens_in_the_studio(curated: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    rows = opened(curated[0], page(curated[0]), tmp_path)
    assert len(rows) > 20 and {row["at"].split(",")[0] for row in rows} == {f"steps {n}" for n in range(1, len(STEPS) + 1)}


def test_what_documents_say_is_text(curated: tuple[Path, dict[str, Any]]) -> None:
    text = page(curated[0])
    assert "<script" not in text and "<img" not in text and "\u202e" not in text and "&lt;script&gt;it&#x27;s" in text
    assert "<EMAIL>" not in text and "&lt;EMAIL&gt;" in text, "redacted where it is shown"
    assert "http:" not in LINK.sub("", text).replace("http://,", "").replace("http-equiv", "") and "src=" not in re.sub(
        r"&lt;.*?&gt;", "", text
    )


def test_a_run_without_its_samples_is_told(curated: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"samples\.json cannot be read"):
        write_page(tmp_path, curated[1])


@pytest.mark.parametrize(
    ("bins", "low", "high"),
    [
        ({}, None, None),
        ({"0": 5}, None, 0.0),
        ({"50": 3, "25": 1}, 0.7, None),
        ({"54": 1, "90": 7}, 2.0, 100_000.0),
        ({"-70": 2, "-60": 3}, -9.5, None),
        ({"4037": 1, "-4037": 1}, None, None),
        ({"10": 99, "80": 1}, None, 0.3),
    ],
)
def test_distributions_stay_within_their_frame(bins: dict[str, int], low: float | None, high: float | None) -> None:
    """Every mark is inside the figure, and no document is lost."""
    tree = ElementTree.fromstring(distribution(bins, low, high))
    _, _, width, height = map(float, tree.attrib["viewBox"].split())
    for mark in tree.iter("rect"):
        x, y, wide, tall = (float(mark.attrib[name]) for name in ("x", "y", "width", "height"))
        assert x >= 0 and y >= 0 and x + wide <= width and y + tall <= height
    shown = [re.search(r": ([\d,]+) documents", str(title.text)) for title in tree.iter("title")]
    assert sum(int(one[1].replace(",", "")) for one in shown if one) == sum(bins.values())
    assert sum(line.attrib["class"] == "level" for line in tree.iter("line")) == (low is not None) + (high is not None)


def test_short_values() -> None:
    shown = [short(value) for value in (0, -0.0, 0.15, 2, 99.5, 1000, 100_000, 2.5e6, 1e300)]
    assert shown == ["0", "0", "0.15", "2", "99.5", "1,000", "100k", "2.5M", "1e+300"]
