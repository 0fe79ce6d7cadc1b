"""Whole curations: what is kept, what is dropped and why, by every executor, and after being killed at any moment."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from gristmill.core.config import load
from gristmill.core.errors import InputError
from gristmill.core.progress import Progress
from gristmill.curate import run as curation
from gristmill.curate import stages
from gristmill.curate.recipe import Curation
from gristmill.curate.run import explain, run
from gristmill.report.curation import funnel_lines, write_page
from gristmill.runs.reader import read_run

STEPS: list[dict[str, Any]] = [
    {"step": "clean"},
    {"step": "filter", "rules": "gopher"},
    {"step": "exact"},
    {"step": "fuzzy"},
    {"step": "pii"},
]
COMMON = ["the", "of", "and", "to", "that", "with", "be", "have", "a", "in", "is", "it", "for", "on", "as"]


def prose(draw: random.Random, words: int = 150) -> str:
    parts = [
        draw.choice(COMMON) if draw.random() < 0.5 else f"word{chr(97 + draw.randrange(26))}{draw.randrange(900)}" for _ in range(words)
    ]
    return "\n".join(" ".join(parts[i : i + 30]).capitalize() + "." for i in range(0, words, 30))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six files, with copies, near copies, addresses, and documents that are too short."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    texts = [prose(draw) for _ in range(200)]
    texts += [texts[i] for i in range(0, 40, 2)]
    texts += [texts[i].replace("Word", "Term", 1) + " Postscript." for i in range(1, 40, 2)]
    texts += [f"{prose(draw)} Write to someone{i}@example.org." for i in range(20)] + ["Too short."] * 10
    draw.shuffle(texts)
    for part in range(6):
        rows = [{"id": f"d{i}", "text": text, "kind": part} for i, text in enumerate(texts) if i % 6 == part]
        (folder / f"part{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe_of(corpus: Path, **more: Any) -> Curation:
    return Curation.model_validate({"inputs": [str(corpus)], "reading": {"batch_bytes": 30_000}, "workers": 1, "steps": STEPS} | more)


def curated(recipe: Curation, folder: Path) -> dict[str, Any]:
    return run(recipe, folder, Progress(quiet=True))


def kept(folder: Path) -> dict[str, str]:
    rows = [row for path in sorted((folder / "data").iterdir()) for row in pq.read_table(path).to_pylist()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row["text"] for row in rows}


def dropped(folder: Path) -> dict[str, tuple[str, str]]:
    rows = [row for path in sorted((folder / "dropped").iterdir()) for row in pq.read_table(path).to_pylist()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: (row["step"], row["reason"]) for row in rows}


@pytest.fixture(scope="module")
def done(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("done")
    curated(recipe_of(corpus), folder)
    return folder


def test_every_document_is_kept_or_dropped_for_a_reason(corpus: Path, done: Path) -> None:
    rows = [json.loads(line) for path in sorted(corpus.iterdir()) for line in path.read_text().splitlines()]
    here, gone = kept(done), dropped(done)
    assert set(here) | set(gone) == {row["id"] for row in rows} and not set(here) & set(gone)
    steps = [step for step, _ in gone.values()]
    assert steps.count("exact") == 20 and steps.count("filter") == 10
    assert 18 <= steps.count("fuzzy") <= 20
    assert not any("@example.org" in text for text in here.values()) and sum("<EMAIL>" in text for text in here.values()) == 20
    funnel = json.loads((done / "results.json").read_text())
    assert [step["step"] for step in funnel["steps"]] == [step["step"] for step in STEPS]
    assert funnel["read"]["documents"] == len(rows) and funnel["documents"] == len(here)
    for before, after in zip(funnel["steps"], funnel["steps"][1:], strict=False):
        assert before["documents_out"] == after["documents_in"] and before["bytes_out"] == after["bytes_in"]
    assert {path.name for path in done.iterdir()} == {".lock", "data", "dropped", "recipe.yaml", "results.json", "samples.json"}


def test_why_a_document_is_gone(done: Path) -> None:
    here, gone = kept(done), dropped(done)
    name, (step, reason) = next((name, why) for name, why in gone.items() if why[0] == "fuzzy")
    (found,) = explain(done, name)
    assert (found["step"], found["reason"]) == (step, reason) and found["figure"] >= 0.7
    assert reason.split()[-1] in here
    (found,) = explain(done, next(iter(here)))
    assert found["step"] == "kept"
    with pytest.raises(InputError, match="has the id 'nobody'"):
        explain(done, "nobody")


def test_processes_and_the_size_of_shards_change_nothing(corpus: Path, done: Path, tmp_path: Path) -> None:
    curated(recipe_of(corpus, workers=2), tmp_path / "two")
    assert kept(tmp_path / "two") == kept(done) and dropped(tmp_path / "two") == dropped(done)
    curated(recipe_of(corpus, reading={"batch_bytes": 10_000_000}), tmp_path / "large")
    assert kept(tmp_path / "large") == kept(done)


def test_ray_changes_nothing(corpus: Path, done: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    curated(recipe_of(corpus, executor="ray", workers=2), tmp_path)
    assert kept(tmp_path) == kept(done) and dropped(tmp_path) == dropped(done)


def test_a_finished_run_is_not_done_again_and_a_changed_one_is(corpus: Path, tmp_path: Path) -> None:
    first = curated(recipe_of(corpus), tmp_path)
    at = (tmp_path / "data" / "part-00000.parquet").stat().st_mtime_ns
    assert curated(recipe_of(corpus, workers=2), tmp_path) == first
    assert (tmp_path / "data" / "part-00000.parquet").stat().st_mtime_ns == at
    second = curated(recipe_of(corpus, steps=STEPS[:3]), tmp_path)
    assert second["documents"] > first["documents"] and not any(step == "fuzzy" for step, _ in dropped(tmp_path).values())


def test_a_changed_recipe_begins_again_where_it_differs(corpus: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages before the change stay, of a run that was stopped; and the finished one has no more of them."""
    other = [*STEPS[:3], {"step": "fuzzy", "threshold": 0.9}, STEPS[4]]
    with monkeypatch.context() as patch:
        patch.setattr(curation, "emit", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            curated(recipe_of(corpus, steps=other), tmp_path)
    names = ["00-read", "01-clean-filter", "02-exact", "03-fuzzy", "04-pii"]
    redone = []
    run_stage = stages.run_stage
    monkeypatch.setattr(stages, "run_stage", lambda stage, steps: redone.append(stage.folder.name) or run_stage(stage, steps))
    results = curated(recipe_of(corpus), tmp_path)
    assert redone == names[3:]
    assert kept(tmp_path) == kept(done) and dropped(tmp_path) == dropped(done)
    assert [stage["folder"] for stage in results["stages"]] == [*names, "05-write"] and not list(tmp_path.glob("0*-*"))
    data = read_run(tmp_path)
    assert data.results == results and data.stages == results["stages"] and all(stage["peak_mib"] > 10 for stage in data.stages)


@pytest.mark.parametrize("left", ["work", "funnel.json"])
def test_a_folder_of_an_earlier_version_is_refused(corpus: Path, tmp_path: Path, left: str) -> None:
    (tmp_path / "recipe.yaml").write_text("name: curated\n")
    (tmp_path / left).mkdir()
    with pytest.raises(InputError, match="made by an earlier version of gristmill"):
        curated(recipe_of(corpus), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([left, "recipe.yaml"])


@pytest.mark.parametrize("moved", [0, 1, 2, 3])
def test_killed_while_the_products_are_moved(corpus: Path, tmp_path: Path, moved: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over those of a run of another recipe; then all are of the new one."""
    steps = [{"step": "clean"}, {"step": "exact"}, {"step": "remember"}]
    curated(recipe_of(corpus, steps=steps[1:]), tmp_path / "run")
    curated(recipe_of(corpus, steps=steps), tmp_path / "calm")
    rename, there = Path.rename, []

    def stopping(path: Path, target: Path) -> Path:
        if target.name not in curation.PRODUCTS:
            return rename(path, target)
        if len(there) < moved:
            there.append(rename(path, target))
        if len(there) == moved:
            raise KeyboardInterrupt
        return there[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stopping)
        with pytest.raises(KeyboardInterrupt):
            curated(recipe_of(corpus, steps=steps), tmp_path / "run")
    curated(recipe_of(corpus, steps=steps), tmp_path / "run")
    for name in curation.PRODUCTS:
        mine, calm = ({path.name: path.read_bytes() for path in (tmp_path / run / name).iterdir()} for run in ("run", "calm"))
        assert mine == calm, name


def test_what_is_not_its_own_is_not_replaced(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text(prose(random.Random(1)))
    for inputs in (tmp_path / "data", corpus):
        with pytest.raises(InputError, match="give another --out"):
            curated(recipe_of(inputs), tmp_path)
    assert (tmp_path / "data" / "mine.txt").exists()


def test_files_that_a_step_reads_may_change(corpus: Path, tmp_path: Path) -> None:
    text = json.loads((corpus / "part0.jsonl").read_text().splitlines()[0])["text"]
    benchmark = tmp_path / "benchmark.txt"
    benchmark.write_text("these are words that stand in no document of this corpus at all and never will\n")
    recipe = recipe_of(corpus, steps=[{"step": "decontaminate", "benchmarks": [str(benchmark)]}])
    before = curated(recipe, tmp_path / "run")
    benchmark.write_text(" ".join(text.split()) + "\n")
    after = curated(recipe, tmp_path / "run")
    assert after["steps"][0]["reasons"] and not before["steps"][0]["reasons"]


def test_fields_that_cannot_be_read_stop_no_step(tmp_path: Path) -> None:
    """Nested about as deep as can be read: one place reads it, and another, which is called from deeper, may not."""
    draw = random.Random(4)
    extra = ["[" * deep + "]" * deep for deep in range(900, 1100, 5)] + ["9" * 4000, "9" * 5000, "1e999", "NaN"]
    extra += [json.dumps("[" * 5000 + "]" * 5000)]
    lines = [f'{{"id": "d{i}", "text": {json.dumps(prose(draw))}, "meta": {{"score": {one}}}}}' for i, one in enumerate(extra)]
    lines += [f'{{"id": "s{i}", "text": {json.dumps(prose(draw))}, "score": {i}, "meta": {extra[-1]}}}' for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    (tmp_path / "benchmark.txt").write_text("these are words that stand in no document of this corpus at all and never will\n")
    curated(recipe_of(corpus=tmp_path / "rows.jsonl", steps=[{"step": "remember"}]), tmp_path / "first")
    steps: list[dict[str, Any]] = [
        *STEPS,
        {"step": "language", "keep": []},
        {"step": "filter", "column": "score", "values": ["3"]},
        {"step": "quality", "classifiers": ["column:score"]},
        {"step": "substring"},
        {"step": "semantic"},
        {"step": "decontaminate", "benchmarks": [str(tmp_path / "benchmark.txt")]},
        {"step": "seen", "index": str(tmp_path / "first" / "index")},
        {"step": "remember"},
    ]
    funnel = curated(recipe_of(tmp_path / "rows.jsonl", steps=steps), tmp_path / "run")
    assert funnel["read"]["documents"] + funnel["read"]["num_skipped"] == len(lines)
    assert funnel["steps"][-2]["documents_in"] > 40 and funnel["documents"] == 0


def test_killed_at_any_moment_it_ends_the_same(corpus: Path, done: Path, tmp_path: Path) -> None:
    """kill -9 of the driver, with its workers, at random moments; then to the end."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_of(corpus, workers=2).model_dump(mode="json")))
    command = [sys.executable, "-m", "gristmill.cli", "curate", str(path), "--out", str(tmp_path / "run"), "--quiet"]
    draw = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
        time.sleep(draw.uniform(1.0, 4.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert kept(tmp_path / "run") == kept(done) and dropped(tmp_path / "run") == dropped(done)


def processes_with(mark: str) -> dict[int, str]:
    """Running processes that have this in their environment: Ray starts its own in groups of their own."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_text()
    return found


def test_the_driver_of_ray_is_killed(corpus: Path, done: Path, tmp_path: Path) -> None:
    """kill -9 of the driver alone when some tasks are done, and again; then to the end."""
    pytest.importorskip("ray")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_of(corpus, executor="ray", workers=2).model_dump(mode="json")))
    command = [sys.executable, "-m", "gristmill.cli", "curate", str(path), "--out", str(tmp_path / "run"), "--quiet"]
    mark = f"GRISTMILL_TEST={tmp_path}"
    environment = os.environ | dict([mark.split("=", 1)])
    draw = random.Random(0)
    try:
        for least in (1, 15, 30):
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
            wanted = least + draw.randrange(12)
            while process.poll() is None and sum(1 for _ in (tmp_path / "run").glob("*/*.json")) < wanted:
                time.sleep(0.02)
            assert process.poll() is None, "it is stopped before its end"
            process.kill()
            process.wait()
            end = time.monotonic() + 20  # twice what it takes, if much else is going on
            while any("ray::" in name and "perform" in name for name in processes_with(mark).values()):
                assert time.monotonic() < end, "who has worked for it ends with it"
                time.sleep(0.1)
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    finally:
        for one in processes_with(mark):  # Ray's own end later
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
    assert kept(tmp_path / "run") == kept(done) and dropped(tmp_path / "run") == dropped(done)


def test_what_an_earlier_run_has_seen(corpus: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    (tmp_path / "new").mkdir()
    curated(recipe_of(corpus, steps=[{"step": "clean"}, {"step": "exact"}, {"step": "remember"}]), first)
    old = kept(first)
    draw = random.Random(9)
    fresh = {f"n{i}": prose(draw) for i in range(20)}
    again = {f"a{i}": text for i, text in enumerate(list(old.values())[:10])}
    near = {f"m{i}": f"{text} A postscript." for i, text in enumerate([t for t in old.values() if len(t) > 500][10:20])}
    rows = [{"id": name, "text": text} for name, text in (fresh | again | near).items()]
    draw.shuffle(rows)
    (tmp_path / "new" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = [{"step": "clean"}, {"step": "seen", "index": str(first / "index")}]
    curated(recipe_of(tmp_path / "new", steps=steps, reading={"batch_bytes": 5000}), tmp_path / "second")
    gone = dropped(tmp_path / "second")
    assert set(kept(tmp_path / "second")) == set(fresh) and set(gone) == set(again | near)
    assert all(old[reason.removeprefix("seen before as ")] in (again | near)[name] for name, (_, reason) in gone.items())
    with pytest.raises(InputError, match="is no index"):
        curated(recipe_of(corpus, steps=[{"step": "seen", "index": str(tmp_path)}]), tmp_path / "third")


def test_an_index_of_other_words_is_refused(corpus: Path, tmp_path: Path) -> None:
    curated(recipe_of(corpus, steps=[{"step": "remember"}]), tmp_path / "run")
    path = tmp_path / "run" / "index" / "index.json"
    how = json.loads(path.read_text())
    assert how.pop("words") == 2
    path.write_text(json.dumps(how))  # as an earlier version wrote it
    with pytest.raises(InputError, match="signatures of other words"):
        curated(recipe_of(corpus, steps=[{"step": "seen", "index": str(tmp_path / "run" / "index")}]), tmp_path / "next")


def test_an_index_is_neither_lost_nor_taken_for_another(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remembering = [{"step": "exact"}, {"step": "remember"}]
    curated(recipe_of(corpus, steps=remembering), tmp_path / "run")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    seen = {"step": "seen", "index": str(tmp_path / "run" / "index")}
    for steps, why in (([{"step": "exact"}], "is of another recipe"), ([seen, {"step": "remember"}], "would replace")):
        with pytest.raises(InputError, match=f"{why}.*give another --out"):
            curated(recipe_of(corpus, steps=steps), tmp_path / "run")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    # a run that has remembered and is stopped then leaves nothing to one that does not remember
    with monkeypatch.context() as patch:
        patch.setattr(curation, "emit", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            curated(recipe_of(corpus, steps=remembering), tmp_path / "stopped")
    assert (tmp_path / "stopped" / "02-remember" / "index").exists()
    curated(recipe_of(corpus, steps=[{"step": "exact"}]), tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "index").exists()


def test_spans_and_meanings_that_stood_before(corpus: Path, tmp_path: Path) -> None:
    draw = random.Random(5)
    notice = " ".join(f"notice{draw.randrange(900)}" for _ in range(60))
    rows = [{"id": f"r{i}", "text": f"{prose(draw)} before{i} {notice} after{i} {prose(draw)}"} for i in range(20)]
    rows += [{"id": f"s{i}", "text": rows[i]["text"].upper()} for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = [{"step": "semantic", "clusters": 4}, {"step": "substring"}]
    funnel = curated(recipe_of(tmp_path / "rows.jsonl", steps=steps, reading={"batch_bytes": 5000}), tmp_path / "run")
    here, gone = kept(tmp_path / "run"), dropped(tmp_path / "run")
    assert len(gone) == 5 and all(step == "semantic" for step, _ in gone.values()), "the same words in capitals"
    assert sum(notice in text or notice.upper() in text for text in here.values()) == 1
    assert funnel["steps"][1]["changed"]["documents cut"] == 19


@pytest.mark.parametrize("order", ["hard", "random"])
def test_which_of_like_documents_stays_does_not_depend_on_shards(tmp_path: Path, order: str) -> None:
    draw = random.Random(6)
    rows = [{"id": f"{i}{case}", "text": text} for i in range(60) for text in [prose(draw)] for case in "abc"]
    draw.shuffle(rows)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = [{"step": "semantic", "clusters": 5, "order": order}]
    gone = []
    for size in (3000, 20_000, 10_000_000):
        curated(recipe_of(tmp_path / "rows.jsonl", steps=steps, reading={"batch_bytes": size}), tmp_path / str(size))
        gone.append(dropped(tmp_path / str(size)))
    assert gone[0] == gone[1] == gone[2] and len(gone[0]) == 120


def test_the_page_shows_hostile_text_as_text(tmp_path: Path) -> None:
    rows = [{"id": "<script>alert(1)</script>", "text": "<img src=x onerror=alert(2)> short"}, {"id": "b", "text": "\u202e also short"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "no json\n")
    funnel = curated(recipe_of(tmp_path / "rows.jsonl"), tmp_path / "run")
    page = write_page(tmp_path / "run", funnel).read_text()
    assert "<script" not in page and "<img" not in page and "\u202e" not in page
    assert "&lt;script&gt;alert(1)" in page and "rows.jsonl:3" in page and "not JSON" in page
    assert funnel["documents"] == 0 and "words 2" in "\n".join(funnel_lines(funnel))


def test_inputs_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in (b"a.txt", b"b\xff.txt", b"c\xff.bin"):
        Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/" + name)).write_bytes(b"\0 one" if name.endswith(b"bin") else b"one")
    (tmp_path / "in" / "gone.txt").symlink_to("nowhere")
    steps = [{"step": "filter", "rules": "gopher"}]
    funnel = curated(recipe_of(tmp_path / "in", steps=steps, workers=2), tmp_path / "run")
    assert [where for where, _ in funnel["read"]["skipped"]] == [str(tmp_path / "in" / "gone.txt"), r"c\xff.bin"]
    assert funnel["read"]["num_skipped"] == 2 and set(dropped(tmp_path / "run")) == {"a.txt", r"b\xff.txt"}
    assert r"c\xff.bin" in write_page(tmp_path / "run", funnel).read_text()


def test_buckets_of_quality(corpus: Path, tmp_path: Path) -> None:
    def command(*words: str) -> dict[str, Any]:
        return json.loads(subprocess.run([sys.executable, "-m", "gristmill.cli", *words, "--json"], check=True, capture_output=True).stdout)

    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    draw = random.Random(3)
    good.write_text("".join(json.dumps({"text": prose(draw)}) + "\n" for _ in range(60)))
    bad.write_text("".join(json.dumps({"text": f"for (int i{i} = 0; i{i} < n; i{i}++) {{ s += a[i{i}]; }}"}) + "\n" for i in range(60)))
    learnt = command("quality", "classifier", "--positive", str(good), "--negative", str(bad), "--out", str(tmp_path / "c"))
    assert learnt["held_out_auc"] == 1
    assert command("quality", "perplexity", "--positive", str(good), "--out", str(tmp_path / "p"))["documents"] == 60
    step = {"step": "quality", "classifiers": [str(tmp_path / "c"), f"perplexity:{tmp_path / 'p'}"], "min_bucket": 5}
    funnel = curated(recipe_of(corpus, steps=[step]), tmp_path / "run")
    rows = [row for path in sorted((tmp_path / "run" / "data").iterdir()) for row in pq.read_table(path).to_pylist()]
    assert {row["quality"] for row in rows} <= {"High", "Medium-High", "Medium", "Medium-Low", "Low"}
    assert min(row["quality_bucket"] for row in rows) == 5 and max(row["quality_bucket"] for row in rows) == 19
    assert 0 < len(rows) == funnel["documents"] < funnel["read"]["documents"]
    with pytest.raises(InputError):
        curated(recipe_of(corpus, steps=[step | {"classifiers": [str(tmp_path / "nothing")]}]), tmp_path / "none")


def test_bad_recipes_say_what_is_wrong(tmp_path: Path) -> None:
    def loaded(text: str) -> None:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        load(path, Curation)

    with pytest.raises(InputError, match="unknown key 'steps.0.fuzzy.band': did you mean 'bands'"):
        loaded("steps: [{step: fuzzy, band: 3}]")
    with pytest.raises(InputError, match="steps.0"):
        loaded("steps: [{step: fussy}]")
    with pytest.raises(InputError, match="threshold"):
        loaded("steps: [{step: fuzzy, threshold: 3}]")
    with pytest.raises(InputError):
        curated(Curation(inputs=[str(tmp_path / "nothing")]), tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError):
        curated(Curation(inputs=[str(tmp_path / "empty")]), tmp_path / "out")
