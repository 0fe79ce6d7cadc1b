"""A dataset from a recipe through a real endpoint process: every pipeline, judged, paired, exported, and taken up after a kill."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from gristmill.cli.main import app
from gristmill.core.config import dump, load, read
from gristmill.core.errors import InputError
from gristmill.core.progress import Progress
from gristmill.data.rows import Demonstration, Pair, Prompt, Response, read_rows
from gristmill.verify.ifeval import check_instructions
from gristmill.workflows.dataset.lineage import errors, lineage
from gristmill.workflows.dataset.recipe import DatasetRecipe
from gristmill.workflows.dataset.run import dry_run, run

ALL: dict[str, Any] = {
    "open_qa": {"questions": 2, "revisions": 2},
    "writing": {"kinds_per_topic": 1, "tasks": 1, "revisions": 1},
    "closed_qa": {"questions": 2},
    "math": {"levels": ["high school"], "topics": 2, "subtopics": 1, "problems": 1},
    "python": {"topics": 2, "subtopics": 1, "problems": 1},
    "instructions": {"prompts": 12},
    "two_turn": {"prompts": 4},
    "from_file": None,
    "topic_following": {"dialogues": 3},
    "incapable": {"tasks": 2},
    "document_qa": {"questions": 2},
    "tools": {"topics": 2},
    "genetic": {"generations": 2, "births": 3, "seeds": 3},
}
READ_BY = {
    "topics": {"open_qa", "writing", "instructions", "two_turn", "topic_following", "tools", "genetic"},
    "documents": {"closed_qa", "document_qa"},
    "prompts": {"from_file", "instructions", "two_turn", "genetic"},
    "entities": {"math", "python"},
}
QUIET = Progress(quiet=True)


def write(folder: Path, url: str, **parts: Any) -> Path:
    """A recipe and its inputs."""
    (folder / "documents").mkdir(exist_ok=True)
    for number in range(2):
        (folder / "documents" / f"{number}.txt").write_text(f"The harbour number {number} sells fish on Mondays.")
    (folder / "words.txt").write_text("prime numbers\nrecursion\n")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Tell me about lantern {n}."}) + "\n" for n in range(5)))
    values = {
        "name": "tides",
        "generators": [{"base_url": url, "model": "mock"}],
        "topics": {"macro": 2, "subtopics": 1, "own": ["tides"]},
        "documents": "documents",
        "prompts": "prompts.jsonl",
        "entities": "words.txt",
        "pipelines": ALL,
        **parts,
    }
    for name in READ_BY.keys() - parts.keys():
        if not READ_BY[name] & values["pipelines"].keys():
            del values[name]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def make(path: Path, **options: Any) -> dict[str, Any]:
    return run(load(path, DatasetRecipe), path.parent / "run", Progress(quiet=True), **options)


def test_every_pipeline_writes(start_endpoint: Callable[..., Any], tmp_path: Path) -> None:
    server = start_endpoint(latency=0.0, obedient=True)
    path = write(tmp_path, server.url, dialogues={"share": 0.3}, answers={"samples": 3, "max_tokens": 64}, near_duplicates=1)
    estimate = dry_run(load(path, DatasetRecipe))
    results = make(path)
    assert set(results["funnel"]["written"]) == {*ALL, "dialogues", "too much alike"}
    assert all(results["funnel"]["written"][name] > 0 for name in (*ALL, "dialogues"))
    assert results["calls"] == {"in journal": server.stats()["requests"], "asked now": server.stats()["requests"], "failed": 0}
    # the rehearsal asked nobody and was near, from above but for dialogues, which end earlier or later
    assert estimate["calls"] == pytest.approx(server.stats()["requests"], rel=0.25)

    prompts = read_rows(tmp_path / "run" / "00-prompts" / "prompts.parquet", Prompt)
    assert {p.task for p in prompts} == {"open_qa", "writing", "closed_qa", "math", "python", "instructions", "two_turn", "from_file"}
    assert len({p.id for p in prompts}) == len(prompts) == results["prompts"]
    assert all([m.role for m in p.messages] == ["user", "assistant", "user"] for p in prompts if p.task == "two_turn")
    assert all(p.truth and check_instructions(p.truth["checks"], "x") for p in prompts if p.task == "instructions")
    assert {p.origin for p in prompts} == {"mock", "file"}

    rows = read_rows(tmp_path / "run" / "02-judging" / "responses.parquet", Response)
    assert (
        sum(r.votes for r in rows) == 3 * len(prompts) and {r.generator for r in rows} == {"mock"} and {r.num_tokens for r in rows} == {20}
    )
    assert {r.judge for r in rows if r.task == "instructions"} == {"verifier"}
    kept = read_rows(tmp_path / "run" / "02-judging" / "kept.parquet", Demonstration)
    assert {"topic_following", "incapable", "document_qa", "tools", "genetic", "dialogue", "open_qa"} <= {d.task for d in kept}
    for d in kept:
        roles = [m.role for m in d.messages if m.role != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        if d.task == "tools":
            assert json.loads(d.messages[-1].content)["arguments"] == {"place": "the harbour"}
        if d.task == "dialogue":
            assert len(roles) == 6 and not d.messages[2].content.startswith("Thanks")

    # everything again, from the journal alone
    again = make(path)
    assert again["calls"]["asked now"] == 0 and server.stats()["requests"] == results["calls"]["asked now"]
    assert {k: again[k] for k in ("prompts", "responses", "demonstrations", "pairs", "funnel")} == {
        k: results[k] for k in ("prompts", "responses", "demonstrations", "pairs", "funnel")
    }
    assert read_rows(tmp_path / "run" / "00-prompts" / "prompts.parquet", Prompt) == prompts
    assert read_rows(tmp_path / "run" / "02-judging" / "kept.parquet", Demonstration) == kept

    card = (tmp_path / "run" / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["license"] == "other" and metadata["configs"][0] == {"config_name": "sft", "data_files": "export/sft.parquet"}
    sft = pq.read_table(tmp_path / "run" / "export" / "sft.parquet").to_pylist()
    assert len(sft) == len(kept) and sft[0]["messages"][-1]["role"] == "assistant"
    assert [json.loads(line) for line in (tmp_path / "run" / "export" / "sft.jsonl").read_text().splitlines()] == sft
    calls = pq.read_table(tmp_path / "run" / "calls.parquet").to_pylist()
    assert len(calls) == results["calls"]["in journal"] and all(call["answers"] for call in calls)

    # a revision grew from a question, and that from a topic
    row = next(p for p in prompts if p.task == "open_qa")
    chain = lineage(tmp_path / "run", row.id)
    assert chain[0]["kind"] == "prompt" and [entry["depth"] for entry in chain[:2]] == [0, 1]
    assert {entry["template"] for entry in chain if entry["kind"] == "call"} >= {"revise_question", "questions"}
    # an answer is of a call, whose sampling is told
    calls_of = [entry for entry in lineage(tmp_path / "run", rows[0].id) if entry["kind"] == "call"]
    assert calls_of and any(entry["template"] == "answer" and entry["sampling"]["max_tokens"] == 64 for entry in calls_of)


def test_judged_answers_make_pairs(start_endpoint: Callable[..., Any], tmp_path: Path) -> None:
    writer, reward = start_endpoint(latency=0.0, obedient=True), start_endpoint(latency=0.0, obedient=True)
    judging = {
        "reward": {"base_url": reward.url, "model": "mock-reward", "weights": "llama3-70b"},
        "keep": "correctness >= 2 and verbosity <= 3",
        "min_gap": 0.5,
        "max_per_task": 20,
    }
    pipelines = {"open_qa": {"questions": 3, "revisions": 2}, "instructions": {"prompts": 8}}
    path = write(tmp_path, writer.url, pipelines=pipelines, answers={"samples": 4}, judging=judging)
    results = make(path)
    rows = {r.id: r for r in read_rows(tmp_path / "run" / "02-judging" / "responses.parquet", Response)}
    pairs = read_rows(tmp_path / "run" / "02-judging" / "pairs.parquet", Pair)
    assert len(pairs) == results["pairs"] > 5
    for pair in pairs:
        chosen, rejected = rows[pair.parents[0]], rows[pair.parents[1]]
        assert (chosen.text, rejected.text, chosen.prompt) == (pair.chosen, pair.rejected, rejected.prompt)
        assert pair.chosen_reward - pair.rejected_reward >= 0.5
        if pair.judge == "reward":
            assert chosen.good and chosen.rating and chosen.rating.correctness >= 2 and pair.chosen_reward == chosen.score
        else:
            assert pair.judge == "verifier" and chosen.verified and rejected.verified is False
    kept = read_rows(tmp_path / "run" / "02-judging" / "kept.parquet", Demonstration)
    assert max(Counter(d.task for d in kept).values()) <= 20
    assert all(rows[d.parents[0]].good for d in kept)
    preference = pq.read_table(tmp_path / "run" / "export" / "preference.parquet").to_pylist()
    assert set(preference[0]) >= {"prompt", "chosen", "rejected", "chosen_reward", "rejected_reward"}
    nemo = [json.loads(line) for line in (tmp_path / "run" / "export" / "nemo_aligner.jsonl").read_text().splitlines()]
    assert set(nemo[0]) == {"prompt", "chosen_response", "rejected_response", "chosen_reward", "rejected_reward"}
    make(path)
    assert reward.stats()["requests"] == len([r for r in rows.values() if r.finished])  # ratings are bought once too


def test_a_verifiers_pair_has_the_right_answer_first(start_endpoint: Callable[..., Any], tmp_path: Path) -> None:
    server = start_endpoint(latency=0.0, obedient=True)
    path = write(tmp_path, server.url, pipelines={"from_file": None}, answers={"samples": 2, "temperatures": [0.5, 1.0]})
    talk = json.dumps({"prompt": "Tell me about lantern 7."})
    (tmp_path / "prompts.jsonl").write_text(talk + "\n")
    make(path)
    texts = [r.text for r in read_rows(tmp_path / "run" / "02-judging" / "responses.parquet", Response)]
    assert len(texts) == 2
    for right, wrong in (texts, texts[::-1]):  # whichever of the two is called the right one
        row = json.loads(talk) | {"truth": {"kind": "exact", "value": right}}
        (tmp_path / "prompts.jsonl").write_text(json.dumps(row) + "\n")
        results = run(load(path, DatasetRecipe), tmp_path / f"run-{texts.index(right)}", QUIET)
        (made,) = read_rows(tmp_path / f"run-{texts.index(right)}" / "02-judging" / "pairs.parquet", Pair)
        assert (made.chosen, made.rejected, made.judge, results["pairs"]) == (right, wrong, "verifier", 1)
        assert made.chosen_reward - made.rejected_reward == 2.0


def test_failing_answers_are_repaired_and_say_what_they_come_from(start_endpoint: Callable[..., Any], tmp_path: Path) -> None:
    server = start_endpoint(latency=0.0)  # which repeats the prompt behind some words
    repair = {"min_words": 1, "max_sampled_per_instruction": 2, "pairs": True}
    path = write(
        tmp_path, server.url, pipelines={"from_file": None}, answers={"samples": 2}, judging={"repair": repair, "max_per_topic": 99}
    )
    checks = {"title": "detectable_format:title", "comma": "punctuation:no_comma"}
    rows = [
        {"prompt": f"Tell me all about lantern {n}", "truth": {"kind": "instructions", "checks": [{"id": checks[name]}]}}
        for n, name in enumerate(["title"] * 3 + ["comma"] * 4)
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = make(path)
    judged = read_rows(tmp_path / "run" / "02-judging" / "responses.parquet", Response)
    repaired = [r for r in judged if r.edits]
    assert len(repaired) == 3 == results["repaired"] and results["responses"] == len(judged) - 3 == 7
    assert all(r.edits == ("detectable_format:title",) and r.verified and r.text.startswith("<<") for r in repaired)
    funnel = results["funnel"]["answers"]["from_file"]
    assert (funnel["kept"], funnel["repaired"], funnel["repaired_kept"]) == (5, 3, {"detectable_format:title": 3}), "two were sampled"
    assert results["demonstrations"] == 5 and results["pairs"] == 3
    pairs = read_rows(tmp_path / "run" / "02-judging" / "pairs.parquet", Pair)
    assert {p.parents for p in pairs} == {(r.id, r.repaired_from[0]) for r in repaired}
    kept = next(
        d for d in read_rows(tmp_path / "run" / "02-judging" / "kept.parquet", Demonstration) if d.parents[0] in {r.id for r in repaired}
    )
    chain = lineage(tmp_path / "run", kept.id)
    assert [(entry["kind"], entry["depth"]) for entry in chain[:2]] == [("demonstration", 0), ("response", 1)]
    assert chain[1]["edits"] == ["detectable_format:title"]
    failing = next(entry for entry in chain if entry["kind"] == "response" and "edits" not in entry)
    assert failing["depth"] == 2 and failing["verified"] is False and any(entry["kind"] == "call" for entry in chain)


def test_failed_calls_are_listed_and_asked_again_on_demand(start_endpoint: Callable[..., Any], tmp_path: Path) -> None:
    server = start_endpoint(latency=0.0, obedient=True)
    prompts = [{"prompt": "fine"}, {"prompt": "broken [fate 500 500 ok]"}]
    path = write(tmp_path, server.url, pipelines={"from_file": None}, answers={"samples": 1}, calls={"retries": 1})
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    command = [sys.executable, "-m", "gristmill.cli", "synth", str(path), "--out", str(tmp_path / "run"), "--quiet"]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 3 and "1 calls failed for good: see `gristmill rows errors" in first.stderr
    assert "2 prompts, 1 responses" in first.stdout
    (failed,) = errors(tmp_path / "run")
    assert failed["status"] == 500 and failed["attempts"] == 2 and "broken" in failed["prompt"]
    listed = subprocess.run(
        [sys.executable, "-m", "gristmill.cli", "rows", "errors", "--folder", str(tmp_path / "run")], capture_output=True, text=True
    )
    assert listed.returncode == 0 and failed["id"] in listed.stdout and "2 attempts, status 500" in listed.stdout
    assert subprocess.run(command, capture_output=True).returncode == 3 and server.stats()["requests"] == 3
    second = subprocess.run([*command, "--retry-failed"], capture_output=True, text=True)
    assert second.returncode == 0 and "2 prompts, 2 responses" in second.stdout and server.stats()["requests"] == 4


def test_a_dataset_that_keeps_nothing_alarms(start_endpoint: Callable[..., Any], tmp_path: Path) -> None:
    server = start_endpoint(latency=0.0, obedient=True)
    judging = {"reward": {"base_url": server.url, "model": "mock-reward"}, "keep": "helpfulness >= 99"}
    path = write(tmp_path, server.url, pipelines={"from_file": None}, answers={"samples": 2}, judging=judging)
    result = CliRunner().invoke(app, ["synth", str(path), "--out", str(tmp_path / "run"), "--quiet"])
    assert result.exit_code == 4 and "alarm: judging keeps none of" in result.stderr and "lower judging.keep" in result.stderr


def test_a_rating_that_cannot_be_read_is_a_failed_row(start_endpoint: Callable[..., Any], tmp_path: Path) -> None:
    server = start_endpoint(latency=0.0, obedient=True)
    judging = {"reward": {"base_url": server.url, "model": "mock-reward"}}
    path = write(tmp_path, server.url, pipelines={"from_file": None}, answers={"samples": 2}, judging=judging, calls={"retries": 0})
    rows = [{"prompt": text} for text in ("fine", "unrated one", "cut [fate cut ok]")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = make(path)
    assert results["calls"]["failed"] == 2 == len(errors(tmp_path / "run"))
    assert all("is no rating" in failed["error"] for failed in errors(tmp_path / "run"))
    asked = server.stats()["requests"]
    make(path)
    assert server.stats()["requests"] == asked
    make(path, retry_failed=True)
    assert server.stats()["requests"] == asked + 2
    # an answer that was cut off is neither kept nor on a side of a pair
    texts = [text for pair in read_rows(tmp_path / "run" / "02-judging" / "pairs.parquet", Pair) for text in (pair.chosen, pair.rejected)]
    assert all(texts) and all(d.messages[-1].content for d in read_rows(tmp_path / "run" / "02-judging" / "kept.parquet", Demonstration))


def test_quotas_a_topic_hold_where_questions_are_revised(start_endpoint: Callable[..., Any], tmp_path: Path) -> None:
    server = start_endpoint(latency=0.0, obedient=True)
    pipelines = {"open_qa": {"questions": 5, "revisions": 2}, "two_turn": {"prompts": 6}}
    topics = {"macro": 0, "own": ["tides", "boats"]}
    path = write(
        tmp_path, server.url, pipelines=pipelines, topics=topics, prompts=None, answers={"samples": 1}, judging={"max_per_topic": 2}
    )
    assert make(path)["demonstrations"] == 4


def test_halves_of_a_file_do_not_overlap(start_endpoint: Callable[..., Any], tmp_path: Path) -> None:
    server, found = start_endpoint(latency=0.0, obedient=True), {}
    for half in ("sft", "preference"):
        path = write(tmp_path, server.url, pipelines={"from_file": {"half": half}})
        talks = [[{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"row {n}"}] for n in range(40)]
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
        run(load(path, DatasetRecipe), tmp_path / half, Progress(quiet=True))
        found[half] = {p.id for p in read_rows(tmp_path / half / "00-prompts" / "prompts.parquet", Prompt)}
    assert not found["sft"] & found["preference"] and sum(map(len, found.values())) == 40 and min(map(len, found.values())) > 10


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
def test_killed_runs_end_with_the_same_rows(start_endpoint: Callable[..., Any], tmp_path: Path) -> None:
    server = start_endpoint(latency=0.02, obedient=True)
    path = write(tmp_path, server.url, calls={"concurrency": 8}, answers={"samples": 2})
    undisturbed = run(load(path, DatasetRecipe), tmp_path / "whole", QUIET)
    asked, rng = server.stats()["requests"], random.Random(0)
    command = [sys.executable, "-m", "gristmill.cli", "synth", str(path), "--out", str(tmp_path / "run"), "--quiet"]
    kills = 0

    def known() -> int:
        return sum(path.read_bytes().count(b"\n") for path in (tmp_path / "run").glob("*/calls.jsonl"))

    for _ in range(4):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        target = known() + rng.randint(1, asked // 5)
        while process.poll() is None and known() < target:
            time.sleep(0.005)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0 and kills >= 2
    for name in ("00-prompts/prompts", "02-judging/responses", "02-judging/kept", "02-judging/pairs"):
        whole, cut = ((tmp_path / folder / f"{name}.parquet") for folder in ("whole", "run"))
        assert pq.read_table(whole).equals(pq.read_table(cut)), name
    assert server.stats()["requests"] <= 2 * asked + 8 * kills
    assert undisturbed["calls"]["failed"] == 0


def test_a_limit_tries_a_recipe(start_endpoint: Callable[..., Any], tmp_path: Path) -> None:
    path = write(tmp_path, start_endpoint(latency=0.0, obedient=True).url)
    results = make(path, limit=1)
    assert set(results["funnel"]["written"].values()) <= {0, 1}


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"topics": {"macro": 0}, "pipelines": {"open_qa": None}}, "Pipeline open_qa needs topics"),
        ({"documents": None, "pipelines": {"closed_qa": None}}, "Pipeline closed_qa needs documents"),
        ({"context": 8}, "Document 0.txt of .* has 43 characters, and about 12 fit"),
        ({"templates": "nemo"}, "no template pack 'nemo'"),
        ({"judging": {"keep": "correctnes > 2"}, "answers": {}}, "correctness"),
        ({"judging": {"keep": "correctness > 2"}, "answers": {}}, "judging.keep needs ratings"),
        ({"judging": {"llm": True}}, "judging needs answers"),
        ({"topics": {"file": "empty.txt"}}, "empty.txt is empty: write one topic a line"),
        ({"entities": "nowhere.txt"}, "nowhere.txt cannot be read"),
        ({"pipelines": {"open_qas": None}}, "did you mean 'open_qa'"),
        ({"topics": {"own": ["x"]}, "pipelines": {"incapable": None}}, "topics would not be read"),
        ({"documents": "documents", "pipelines": {"incapable": None}}, "documents would not be read"),
        ({"prompts": "prompts.jsonl", "pipelines": {"incapable": None}}, "prompts would not be read"),
        ({"entities": "words.txt", "pipelines": {"incapable": None}}, "entities would not be read"),
        ({"topics": {"macro": 0, "own": ["x"], "subtopics": 3}}, "subtopics and combine are of broad topics"),
        ({"topics": {"macro": 2, "subtopics": 0, "combine": False}}, "no broad topic would be used"),
        ({"turn": {"samples": 3}}, "turn is one answer"),
        ({"answers": {"samples": 1, "temperatures": [0.1, 0.9]}}, "1 samples cannot be at 2 temperatures"),
        ({"answers": {"samples": 2}, "judging": {"min_votes": 3}}, "judging.min_votes is 3"),
        ({"answers": {}, "judging": {"min_gap": 2}}, "judging.min_gap is of reward models"),
        ({"judging": {"repair": {}}}, "judging needs answers"),
        ({"dialogues": {"threshold": 1.0}}, "dialogues.threshold needs ratings"),
        ({"dialogues": {"turns": 1}}, "dialogues.turns"),
        ({"near_duplicates": True}, "near_duplicates is true: give a number"),
        ({"pipelines": {"open_qa": {"question": 3}}}, "did you mean 'questions'"),
        ({"generators": [{"base_url": "http://x/v1", "modell": "m"}]}, "did you mean 'model'"),
        ({"generators": []}, "name at least one endpoint"),
        ({"models": []}, "unknown key 'models': it is called 'generators' now"),
        ({"generators": [{"checkpoint": "latest"}]}, "are for alignment runs"),
        ({"pipelines": {}}, "name at least one pipeline"),
        ({"dialogues": {"personas": ["angry"]}}, "dialogues.personas.0: Input should be 'normal', 'complex' or 'concise'"),
        ({"judging": {"reward": {}}, "answers": {}}, "The reward model has no place"),
        ({"judging": {"reward": {"base_url": "http://x/v1", "api_key_env": "NO_SUCH_KEY"}}, "answers": {}}, "NO_SUCH_KEY is empty"),
        ({"prompts": "odd.jsonl"}, "Row 1 of .*odd.jsonl: `prompt` must be text"),
        ({"prompts": "untrue.jsonl"}, "Row 1 of .*untrue.jsonl: The truth .* has an unknown kind"),
        ({"prompts": "broken.jsonl"}, "Line 1 of .*broken.jsonl.* surrogate"),
        ({"generators": [{"base_url": "http://127.0.0.1:9/v1", "model": "m", "api_key_env": "NO_SUCH_KEY"}]}, "NO_SUCH_KEY is empty"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_asked(endpoint: Any, tmp_path: Path, parts: dict[str, Any], words: str) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "odd.jsonl").write_text('{"prompt": 5}\n')
    (tmp_path / "untrue.jsonl").write_text('{"prompt": "hi", "truth": {"kind": "luck"}}\n')
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a\\ud800b"}\n')
    path = write(tmp_path, endpoint.url, **parts)
    with pytest.raises(InputError, match=words):
        make(path)
    assert endpoint.stats()["requests"] == 0 and not (tmp_path / "run").exists()


def test_an_input_that_is_taken_out_is_noticed(tmp_path: Path) -> None:
    saved = tmp_path / "saved.yaml"
    saved.write_text(dump(load(write(tmp_path, "http://localhost:1/v1"), DatasetRecipe)))
    without = load(write(tmp_path, "http://localhost:1/v1", entities=None), DatasetRecipe)
    assert without.changed(read(saved)) == ["entities"]


def test_nobody_needs_a_key_to_rehearse(tmp_path: Path) -> None:
    models = [{"base_url": "http://localhost:1/v1", "model": "m", "api_key_env": "GRISTMILL_NO_SUCH_KEY"}]
    path = write(tmp_path, "http://localhost:1/v1", generators=models, pipelines={"incapable": {"tasks": 1}})
    assert dry_run(load(path, DatasetRecipe))["calls"] > 0
    with pytest.raises(InputError, match="GRISTMILL_NO_SUCH_KEY"):
        make(path)


def test_a_folder_of_another_recipe_is_left_alone(start_endpoint: Callable[..., Any], tmp_path: Path) -> None:
    server = start_endpoint(latency=0.0, obedient=True)
    make(write(tmp_path, server.url, pipelines={"incapable": {"tasks": 1}}))
    before = (tmp_path / "run" / "00-prompts" / "calls.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"was made by another recipe \(they differ in seed\)"):
        make(write(tmp_path, server.url, pipelines={"incapable": {"tasks": 1}}, seed=1))
    # what decides no call may change: the address, how it is called, and what is kept
    elsewhere = start_endpoint(latency=0.0, obedient=True)
    make(write(tmp_path, elsewhere.url, pipelines={"incapable": {"tasks": 1}}, calls={"concurrency": 3}, near_duplicates=0.5))
    assert elsewhere.stats()["requests"] == 0
    assert (tmp_path / "run" / "00-prompts" / "calls.jsonl").read_bytes() == before
    with pytest.raises(InputError, match="holds no run"):
        lineage(tmp_path, "x")
    with pytest.raises(InputError, match="Nothing in .* has the id 'x'"):
        lineage(tmp_path / "run", "x")
