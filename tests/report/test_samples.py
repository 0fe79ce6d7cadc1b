"""Rows with the way they came: topics, second turns, refused prompts, and what was drawn."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gristmill.data.chat import Message
from gristmill.report.alignment import write_report
from gristmill.report.samples import read_judged, read_lineage
from gristmill.runs import artifacts
from gristmill.runs.reader import read_run

MakeRun = Callable[..., Path]
StageFolder = Callable[[Path, str], Path]
ReadPage = Callable[[str], Any]


def test_every_prompt_that_a_model_wrote_has_its_topic(make_run: MakeRun) -> None:
    lineage = read_lineage(read_run(make_run()))
    written = [p for p in lineage.prompts.values() if lineage.is_written(p.id)]
    assert written and all(lineage.topic(p) is not None for p in written)
    given = [p for p in lineage.prompts.values() if p not in written]
    assert given and all(lineage.topic(p) is None and p.origin == "file" for p in given)


def test_a_second_turn_shows_its_first_prompt_and_that_ones_topic(
    make_run: MakeRun, stage_folder: StageFolder, read_page: ReadPage
) -> None:
    folder = make_run()
    stage = stage_folder(folder, "r1-prompts")
    rows = artifacts.PROMPTS.read(stage)
    first = next(p for p in rows if p.origin == "demonstrations")
    talk = (*first.messages, Message("assistant", "Said."), Message("user", "And then?"))
    answered = {r.prompt for s in ("r1-answers", "r1-dpo-pairs") for r in artifacts.RESPONSES.read(stage_folder(folder, s))}
    for task in ("followups", *dict.fromkeys(p.task for p in rows)):  # the only one of its task, so that it is drawn
        chosen = next((p for p in rows if p.task == task and p.id in answered and p is not first), None)
        if chosen is not None and sum(p.task == task for p in rows) == 1:
            break
    assert chosen is not None
    second = dataclasses.replace(chosen, messages=talk, origin="r9-writer", parents=("a-request", "an-answer", first.id, first.id))
    artifacts.PROMPTS.write(stage, [second if p is chosen else p for p in rows])
    lineage = read_lineage(read_run(folder))
    assert lineage.opening(second) == first and lineage.topic(second) == lineage.topic(first) is not None
    text = read_page(write_report(folder).read_text()).text
    topic = lineage.topic(first)
    assert topic is not None
    assert f"topic: {topic.text}\u2192prompt by demonstrations\u2192second turn by round 9 writer" in text


def test_refused_prompts_are_shown_with_their_reasons(make_run: MakeRun, stage_folder: StageFolder) -> None:
    folder = make_run()
    refused = artifacts.REFUSED.read(stage_folder(folder, "r1-prompts"))
    page = write_report(folder).read_text()
    shown = page[page.index("Prompts that round 1 refused") :]
    rows = re.findall(r'<div class="said" dir="auto">([^<]*)</div></td><td>(\w+)</td><td>([^<]+)</td>', shown)
    reasons = {r.reason for r in refused}
    assert reasons and {reason for *_, reason in rows} == reasons
    assert {(task, reason) for _, task, reason in rows} <= {(r.task, r.reason) for r in refused}


def test_answers_are_read_with_what_became_of_them(make_run: MakeRun, stage_folder: StageFolder) -> None:
    folder = make_run()
    judged = {stage.name: stage for stage in read_judged(read_run(folder))}
    assert [(s.name, s.makes_pairs) for s in judged.values()] == [("r1-answers", False), ("r1-dpo-pairs", True), ("r1-rpo1-pairs", True)]
    for name, stage in judged.items():
        answers = {r.id for rows in stage.answers.values() for r in rows}
        assert stage.kept and stage.kept < answers
        assert bool(stage.pairs) == stage.makes_pairs
        assert answers == {r.id for r in artifacts.RESPONSES.read(stage_folder(folder, name))}


def test_one_prompt_of_each_kind_is_one_that_a_model_wrote(make_run: MakeRun) -> None:
    page = write_report(make_run(seed=3)).read_text()
    facts = page[page.index("<summary>facts</summary>") :]
    assert "prompt by demonstrations" in facts[: facts.index("</details>")]
