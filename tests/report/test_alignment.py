"""The page: safe, self-contained, complete, and plain about what did not work."""

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gristmill.core.errors import InputError
from gristmill.report.alignment import HEADING, write_report
from gristmill.runs import artifacts
from tests.report.links import opened

MakeRun = Callable[..., Path]
ReadPage = Callable[[str], Any]
StageFolder = Callable[[Path, str], Path]

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</div></details></main><iframe src=javascript:alert(1)>",
    "</title><style>*{display:none}</style>",
    "<svg/onload=alert(1)>",
    "javascript:alert(1)",
    "]]><!--",
    "&lt;script&gt;",
    "\u202eevil\u2066",
)
STUDIO = re.compile(r'"http://127\.0\.0\.1:8600/#/rows\?[^"]*"')
TAGS = (
    "html head meta title style body header main nav section footer div p span b i small br h1 h2 h3 a ul li details summary pre "
    "table thead tbody tr th td svg g rect line circle polyline text"
)


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@pytest.fixture
def run_folder(make_run: MakeRun) -> Path:
    return make_run()


@pytest.fixture
def page(run_folder: Path) -> str:
    return text_of(write_report(run_folder))


def test_a_finished_run(page: str, read_page: ReadPage) -> None:
    read = read_page(page)
    for words in (*HEADING.values(), "What did not improve", "round 1 RPO 1", "topic: Batru", "not understood", "no collapse alarm"):
        assert words in read.text, words
    for words in ("kept", "dropped", "pair", "chosen", "rejected", "right", "wrong", "accepted", "cut off"):
        assert f">{words}<" in page, words


def test_every_model_has_its_interval_and_its_difference(page: str) -> None:
    rows = re.findall(r"<tr><td><b>(.*?)</b>.*?</tr>", page)
    assert rows[:3] == ["base", "demonstrations", "round 1 code SFT"]
    assert len(re.findall(r'class="(?:up|down|flat)">[^<]*[+-]\d\.\d{3}', page)) >= 8


def test_the_page_needs_nothing_from_anywhere(page: str, read_page: ReadPage) -> None:
    read = read_page(page)
    policies = [a["content"] for t, a in read.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1 and (policies[0] or "").startswith("default-src 'none'")
    assert not re.search(r"https?:|//|url\(|@import", STUDIO.sub("", page))  # the studio's links load nothing by themselves
    assert all((a.get("href") or "#").startswith(("#", "http://127.0.0.1:8600/#/rows?")) for _, a in read.tags)
    assert {t for t, _ in read.tags} <= set(TAGS.split())


def test_generated_tokens_are_counted_from_the_journals(page: str, run_folder: Path, stage_folder: StageFolder) -> None:
    for name, artifact in {"r1-prompts": artifacts.CALLS, "r1-dpo": artifacts.EVALUATION_CALLS}.items():
        stage = stage_folder(run_folder, name)
        tokens = sum(out[1] for record in artifact.read(stage).values() for out in record["out"])
        row = re.search(rf"<tr><td>{stage.name}</td>.*?</tr>", page)
        assert tokens and row and f">{tokens:,}<" in row[0]


def test_every_link_has_its_place(page: str, read_page: ReadPage) -> None:
    read = read_page(page)
    ids = [a["id"] for _, a in read.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {(a["href"] or "")[1:] for t, a in read.tags if t == "a" and "rel" not in a} == set(ids)


def test_samples_open_in_the_studio(page: str, run_folder: Path, tmp_path: Path) -> None:
    section = page[page.index('<section id="samples">') :]
    assert len(opened(run_folder, section.partition("<h3>Prompts that")[0], tmp_path / "cache")) > 4
    refused = [row for row in section.split("<tr>") if "refused.parquet" in row]
    assert refused and all(opened(run_folder, 'class="sample"' + row, tmp_path / "cache") for row in refused)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_model_text_stays_text(make_run: MakeRun, text: str, read_page: ReadPage) -> None:
    calm = read_page(text_of(write_report(make_run("calm", text=" calm"))))
    hostile = text_of(write_report(make_run("hostile", text=f" {text}")))
    read = read_page(hostile)
    assert [t for t, _ in read.tags] == [t for t, _ in calm.tags]  # not one tag more, less or elsewhere
    assert {k for _, a in read.tags for k in a} == {k for _, a in calm.tags for k in a}
    assert not any(k.startswith("on") for _, a in read.tags for k in a)
    assert not re.search("[\u202a-\u202e\u2066-\u2069]", hostile)
    if text.isprintable():
        assert text in read.text  # and it can be read


def test_a_hostile_name_and_topic_stay_text(make_run: MakeRun) -> None:
    folder = make_run()
    saved = folder / "recipe.yaml"
    saved.write_text(saved.read_text().replace("name: run", "name: '<script>x</script>'"))
    assert "<script" not in text_of(write_report(folder))


def test_an_unfinished_run_gives_a_page(make_run: MakeRun, read_page: ReadPage) -> None:
    text = read_page(text_of(write_report(make_run(done=False)))).text
    assert "This run is not finished" in text and "07-r1-code-sft" in text and "unfinished" in text


def test_a_run_of_which_nothing_is_done_gives_a_page(make_run: MakeRun, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "recipe.yaml").write_text((make_run() / "recipe.yaml").read_text())
    assert "No model has been trained" in text_of(write_report(empty))


def test_a_control_is_shown_at_the_top(make_run: MakeRun, read_page: ReadPage) -> None:
    text = read_page(text_of(write_report(make_run(control="human-only")))).text
    assert text.index("This is a control: human-only") < text.index("Stages")


def test_samples_are_those_of_the_seed(make_run: MakeRun) -> None:
    def samples(seed: int, name: str) -> str:
        page = text_of(write_report(make_run(name, seed=seed)))
        return page[page.index('<section id="samples">') : page.index('<section id="time">')]

    assert samples(1, "a") == samples(1, "b")
    assert samples(1, "c") != samples(2, "d")


def test_long_texts_are_cut(make_run: MakeRun) -> None:
    page = text_of(write_report(make_run(text=" x" * 5000)))
    assert "more characters]" in page and len(page) < 600_000


def test_a_monitor_that_is_no_number_does_not_break_the_page(make_run: MakeRun, stage_folder: StageFolder, change_json: Any) -> None:
    folder = make_run()
    change_json(stage_folder(folder, "r1-monitors") / "done.json", lambda done: done["values"].update(human_nll=math.nan))
    assert "not a number" in text_of(write_report(folder))


def test_a_damaged_or_lost_artifact_is_named(make_run: MakeRun, stage_folder: StageFolder) -> None:
    path = stage_folder(make_run(), "r1-prompts") / artifacts.TOPICS.file
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match="topics.parquet cannot be read"):
        write_report(path.parents[1])
    path.unlink()
    with pytest.raises(InputError, match="topics.parquet is gone"):
        write_report(path.parents[1])
    assert not (path.parents[1] / "report.html").exists()


def test_a_run_of_another_kind_is_refused(make_run: MakeRun) -> None:
    folder = make_run()
    saved = folder / "recipe.yaml"
    saved.write_text(saved.read_text().replace("kind: alignment", "kind: dataset"))
    with pytest.raises(InputError, match="holds a run of `gristmill synth`"):
        write_report(folder)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_page_that_cannot_be_written_leaves_the_old_one(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run()
    old = text_of(write_report(folder))

    def disk_full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(InputError, match="No space left"):
        write_report(folder)
    assert text_of(folder / "report.html") == old
