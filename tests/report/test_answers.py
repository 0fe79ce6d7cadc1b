"""One question with all models' answers: read from the run's journals, shown as text, never as markup."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gristmill.cli.main import app
from gristmill.core.errors import InputError
from gristmill.report.answers import Answers, answers_lines, answers_section, answers_table
from gristmill.runs import artifacts
from gristmill.runs.reader import read_run

MakeRun = Callable[..., Path]
MODELS = ["base", "demonstrations", "r1-code-sft", "r1-general-sft", "r1-dpo", "r1-rpo1"]


def test_every_model_answers_every_question(finished: Path) -> None:
    data = read_run(finished)
    answers = Answers(data)
    for number in range(1, 1 + len(answers.ids)):
        prompt = answers.find(str(number))
        assert prompt.id == answers.ids[number - 1]
        table = answers_table(answers, prompt)
        assert [row["model"] for row in table["answers"]] == MODELS and table["number"] == number
        for row, stage in zip(table["answers"], (s for s in data.stages if "greedy" in s), strict=True):
            record = data.read(stage["folder"], artifacts.EVALUATION_CALLS)[f"{prompt.id}-greedy"]
            assert row["text"] == record["out"][0][0]
            assert row["right"] == data.read(stage["folder"], artifacts.OUTCOMES)["greedy"][prompt.id]


def test_a_question_is_found_by_id_number_or_because_it_was_learnt(make_run: MakeRun, set_outcomes: Any) -> None:
    folder = make_run()
    set_outcomes(folder, "base", lambda i, task: i < 3)
    set_outcomes(folder, "r1-rpo1", lambda i, task: i > 3)
    answers = Answers(read_run(folder))
    assert answers.find("").id == answers.ids[4]
    assert answers.find("2").id == answers.ids[1] and answers.find(answers.ids[5]).id == answers.ids[5]
    with pytest.raises(InputError, match="a number from 1 to 10"):
        answers.find("11")


def test_the_command_prints_text_and_json(finished: Path) -> None:
    shown = CliRunner().invoke(app, ["answers", str(finished), "--prompt", "3", "--json"])
    table = json.loads(shown.stdout)
    assert shown.exit_code == 0 and table["number"] == 3 and len(table["answers"]) == len(MODELS)
    text = CliRunner().invoke(app, ["answers", str(finished), "--prompt", "3"]).stdout
    assert "prompt 3 of 10" in text and "round 1 DPO: " in text
    assert "\n".join(answers_lines(table)).count("  ") >= len(MODELS)


def test_the_page_shows_words_as_words(make_run: MakeRun, stage_folder: Any) -> None:
    folder = make_run()
    for path in folder.glob("*/evaluation.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for record in records:
            record["out"][0][0] = "<b>bold</b>"
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
    page = "".join(map(str, answers_section(read_run(folder))))
    assert "&lt;b&gt;bold&lt;/b&gt;" in page and "<b>bold" not in page and page.count("round 1 DPO") == 5


def test_a_run_without_a_model_is_one_sentence(make_run: MakeRun) -> None:
    folder = make_run(done=False)
    for name in ("00-base", "02-demonstrations"):
        (folder / name / "done.json").unlink()
    shown = CliRunner().invoke(app, ["answers", str(folder)])
    assert shown.exit_code == 2 and "no evaluated model yet" in shown.stderr
    assert "No model has been evaluated yet" in str(answers_section(read_run(folder))[0])
