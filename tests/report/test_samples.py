"""Rows with the way they came: topics, second turns, refused prompts, and what was drawn."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from gristmill.data.chat import Message
from gristmill.report.alignment import write_report
from gristmill.report.samples import Ancestry, Lineage, read_judged
from gristmill.runs import artifacts
from gristmill.runs.reader import read_run

MakeRun = Callable[..., Path]
StageFolder = Callable[[Path, str], Path]
ReadPage = Callable[[str], Any]


def lineage_of(folder: Path) -> tuple[Lineage, set[str]]:
    """Of all prompts, and the ids of those that a model wrote."""
    ancestry = Ancestry(read_run(folder))
    prompts = [p.id for path in sorted(folder.glob("*-r1-prompts")) for p in artifacts.PROMPTS.read(path)]
    written = ancestry.written(pa.array([*prompts, "unknown"]))
    assert not written[-1]
    return ancestry.lineage(prompts), {p for p, is_written in zip(prompts, written, strict=False) if is_written}


def test_every_prompt_that_a_model_wrote_has_its_topic(make_run: MakeRun) -> None:
    lineage, ids = lineage_of(make_run())
    written = [p for p in lineage.prompts.values() if p.id in ids]
    assert written and all(lineage.topic(p) is not None for p in written)
    given = [p for p in lineage.prompts.values() if p not in written]
    assert given and all(lineage.topic(p) is None and p.origin == "file" for p in given)


def test_a_lineage_reads_what_its_prompts_grew_from_and_no_more(make_run: MakeRun, stage_folder: StageFolder) -> None:
    folder = make_run()
    stage = stage_folder(folder, "r1-prompts")
    first, second, third, *rest = artifacts.PROMPTS.read(stage)
    first, second = dataclasses.replace(first, parents=()), dataclasses.replace(second, parents=(first.id,))
    third = dataclasses.replace(third, parents=("gone", second.id, third.id))
    artifacts.PROMPTS.write(stage, [first, *rest, second, third])
    assert Ancestry(read_run(folder)).lineage([third.id]).prompts == {p.id: p for p in (first, second, third)}


def test_a_second_turn_shows_its_first_prompt_and_that_ones_topic(
    make_run: MakeRun, stage_folder: StageFolder, read_page: ReadPage
) -> None:
    folder = make_run()
    stage = stage_folder(folder, "r1-prompts")
    rows = artifacts.PROMPTS.read(stage)
    first = next(p for p in rows if p.origin == "demonstrations" and len(p.messages) == 1)
    talk = (*first.messages, Message("assistant", "Said."), Message("user", "And then?"))
    answered = {r.prompt for s in ("r1-answers", "r1-dpo-pairs") for r in artifacts.RESPONSES.read(stage_folder(folder, s))}
    chosen = next(p for p in rows if p.id in answered and p.task != first.task)
    second = dataclasses.replace(chosen, messages=talk, origin="r9-writer", parents=("a-request", "an-answer", first.id, first.id))
    # the only one of its task that a model wrote, so that it is drawn
    others = [dataclasses.replace(p, origin="file") if p.task == chosen.task else p for p in rows]
    artifacts.PROMPTS.write(stage, [second if p.id == chosen.id else p for p in others])
    lineage, _ = lineage_of(folder)
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
        rows = artifacts.RESPONSES.read(stage_folder(folder, name))
        kept = {rows[i].id for i in stage.row_N[stage.kept_N]}
        assert 0 < len(kept) < len(rows) == len({rows[i].id for i in stage.row_N})
        assert bool(len(stage.pair_prompts)) == stage.makes_pairs
        made = artifacts.PAIRS if stage.makes_pairs else artifacts.KEPT
        parents = {p for row in made.read(stage_folder(folder, name)) for p in row.parents}
        assert kept == parents & {r.id for r in rows}
        prompts = list(dict.fromkeys(r.prompt for r in rows))
        assert stage.prompts.to_pylist() == prompts
        for place, i in enumerate(stage.row_N):
            assert prompts[stage.prompt_N[place]] == rows[i].prompt and stage.tasks[stage.task_N[place]] == rows[i].task
            assert stage.score_N[place] == rows[i].score
        assert list(stage.row_N) == sorted(range(len(rows)), key=lambda i: prompts.index(rows[i].prompt))


def test_one_prompt_of_each_kind_is_one_that_a_model_wrote(make_run: MakeRun) -> None:
    page = write_report(make_run(seed=3)).read_text()
    facts = page[page.index("<summary>facts</summary>") :]
    assert "prompt by demonstrations" in facts[: facts.index("</details>")]
