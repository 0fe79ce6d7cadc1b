"""Documents that a model writes in other words, through an endpoint: what is kept, what is dropped and why, and what is bought once."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from gristmill.core.errors import InputError
from gristmill.core.progress import Progress
from gristmill.curate.recipe import Curation
from gristmill.curate.run import explain, run
from gristmill.curate.transforms.rephrase import LIMITS, Rephrase
from gristmill.report.curation import write_page
from gristmill.synth.rephrase import TASKS

PLACES = ["Arden", "Balfour", "Corinth", "Dunmore", "Evesham", "Falmouth", "Girvan", "Harwich", "Ilminster", "Jarrow", "Kelso", "Ludlow"]


def document(number: int, sentences: int = 12, **words: str) -> str:
    draw = random.Random(number)
    said = [
        f"The harbour of {draw.choice(PLACES)} was enlarged in {draw.randrange(1700, 1999)} for {draw.randrange(20, 900)} ships from "
        f"{draw.choice(PLACES)}, which had none of its own."
        for _ in range(sentences)
    ]
    return " ".join([*words.values(), *said])


def corpus_in(folder: Path, **more: str) -> Path:
    rows = [{"id": f"d{i}", "text": document(i), "band": "low" if i % 2 else "high"} for i in range(8)]
    rows += [{"id": name, "text": text, "band": "low"} for name, text in more.items()]
    path = folder / "documents.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe_of(corpus: Path, endpoint: Any, *before: dict[str, Any], **settings: Any) -> Curation:
    step = {"step": "rephrase", "tasks": ["wikipedia"], "generators": [{"base_url": endpoint.url, "model": "mock"}]} | settings
    return Curation.model_validate({"inputs": [str(corpus)], "workers": 2, "steps": [*before, step]})


def curated(recipe: Curation, folder: Path) -> dict[str, Any]:
    return run(recipe, folder, Progress(quiet=True))


def rows_in(folder: Path) -> dict[str, dict[str, Any]]:
    rows = [row for path in sorted(folder.iterdir()) for row in pq.read_table(path).to_pylist()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


@pytest.fixture
def obedient(start_endpoint: Callable[..., Any]) -> Any:
    return start_endpoint(obedient=True)


def test_tasks_are_known_by_the_same_names() -> None:
    assert set(LIMITS) == set(TASKS)


def test_all_five_tasks(obedient: Any, tmp_path: Path) -> None:
    corpus = corpus_in(tmp_path)
    funnel = curated(recipe_of(corpus, obedient, {"step": "clean"}, tasks=list(TASKS)), tmp_path / "run")
    kept = rows_in(tmp_path / "run" / "data")
    assert len(kept) == 8 + 8 * 5 and not list((tmp_path / "run" / "dropped").iterdir())
    for name, row in kept.items():
        meta = json.loads(row["meta"])
        if "#" not in name:
            assert row["text"] == document(int(name[1:])) and "rephrase" not in meta
            continue
        parent, task = name.removesuffix("-0").split("#")
        about = [meta[key] for key in ("rephrase_of", "rephrase", "rephrase_segment", "rephrase_model")]
        assert about == [parent, task, 0, "mock"] and meta["band"]
        assert meta["rephrase_entity_support"] == meta["rephrase_number_support"] == 1.0
        assert set(row["text"].split()) & set(kept[parent]["text"].split()) and "paraphrase" not in row["text"]
    assert kept["d1#wikipedia-0"]["text"].split(". ")[0] == kept["d1"]["text"].split(". ")[-1].rstrip(".")
    assert kept["d1#diverse_qa-0"]["text"].startswith(kept["d1"]["text"] + "\n\nQuestion: ")
    step = funnel["steps"][1]
    assert (step["documents_in"], step["documents_out"], step["changed"]) == (8, 48, {"calls": 40, "written": 40})
    write_page(tmp_path / "run", funnel)


def test_what_is_not_true_to_its_source_is_dropped(obedient: Any, tmp_path: Path) -> None:
    corpus = corpus_in(
        tmp_path,
        lie=document(20, lie="This is a lie, that it was in 1804."),
        formless=document(21, x="This one is formless."),
        cut=document(22, x="[fate cut]"),
        refused=document(23, x="[fate 400]"),
        filtered=document(24, x="[fate filter]"),
        short="Too short.",
    )
    recipe = recipe_of(corpus, obedient, calls={"retries": 1})
    funnel = curated(recipe, tmp_path / "run")
    gone, kept = rows_in(tmp_path / "run" / "dropped"), rows_in(tmp_path / "run" / "data")
    why = {name: row["reason"] for name, row in gone.items()}
    assert why == {
        "lie#wikipedia-0": "number_recall",
        "formless#wikipedia-0": "no opening",
        "cut#wikipedia-0": "too many tokens",
        "refused#wikipedia-0": "no answer",
        "filtered#wikipedia-0": "no answer",
    }
    assert gone["lie#wikipedia-0"]["figure"] < gone["lie#wikipedia-0"]["limit"] == 0.8 and "777777" in gone["lie#wikipedia-0"]["text"]
    assert len(kept) == 8 + 8 + 6
    assert {"lie", "short"} < set(kept)  # the documents themselves stay
    assert funnel["steps"][0]["reasons"] == {"no answer": 2, "number_recall": 1, "no opening": 1, "too many tokens": 1}
    assert "refused (400)" in gone["refused#wikipedia-0"]["meta"] and gone["refused#wikipedia-0"]["figure"] is None
    assert explain(tmp_path / "run", "lie#wikipedia-0")[0]["reason"] == "number_recall"
    page = write_page(tmp_path / "run", funnel).read_text()
    assert "nan" not in page and "number_recall: 1 dropped" in page and "measured 0, limit 0.8" in page


def test_some_documents_alone_and_without_the_originals(obedient: Any, tmp_path: Path) -> None:
    corpus = corpus_in(tmp_path, lie=document(20, lie="This is a lie, that it was in 1804."))
    first = {"step": "rephrase", "tasks": ["distill"], "generators": [{"base_url": obedient.url, "model": "mock"}], "column": "band"}
    recipe = recipe_of(corpus, obedient, first | {"values": ["high"]}, column="band", values=["low"], originals=False)
    curated(recipe, tmp_path / "run")
    kept, gone = rows_in(tmp_path / "run" / "data"), rows_in(tmp_path / "run" / "dropped")
    high, low = {f"d{i}" for i in range(0, 8, 2)}, {f"d{i}" for i in range(1, 8, 2)}
    # what the first step made is not rephrased by the second, and a document of which nothing came stays
    assert set(kept) == high | {f"{name}#distill-0" for name in high} | {f"{name}#wikipedia-0" for name in low} | {"lie"}
    assert {name: row["reason"] for name, row in gone.items()} == dict.fromkeys(low, "rephrased") | {"lie#wikipedia-0": "number_recall"}
    curated(recipe_of(corpus, obedient, share=0.5), tmp_path / "share")
    assert 9 < len(rows_in(tmp_path / "share" / "data")) < 17


def test_scores_of_a_reward_model(obedient: Any, tmp_path: Path) -> None:
    corpus = corpus_in(tmp_path, unrated=document(20, x="This one is unrated."), other=document(21))
    reward = {"base_url": obedient.url, "model": "mock-reward"}
    curated(recipe_of(corpus, obedient, reward=reward, min_reward=3.5, calls={"retries": 0}), tmp_path / "run")
    kept, gone = rows_in(tmp_path / "run" / "data"), rows_in(tmp_path / "run" / "dropped")
    made = {name: json.loads(row["meta"]) for name, row in (kept | gone).items() if "#" in name}
    for name, meta in made.items():
        if name.startswith("unrated"):
            assert gone[name]["reason"] == "no rating"
        else:
            assert ("rephrase_helpfulness" in meta) and (meta["rephrase_reward"] >= 3.5) == (name in kept)
            assert name in kept or gone[name]["reason"] == "reward"
    assert {name in kept for name in made} == {True, False}


def test_a_reward_model_that_is_none_stops_the_run(obedient: Any, tmp_path: Path) -> None:
    recipe = recipe_of(corpus_in(tmp_path), obedient, reward={"base_url": obedient.url, "model": "mock"}, calls={"retries": 0})
    with pytest.raises(InputError, match="8 of 8 texts got no rating .*see to the reward model"):
        curated(recipe, tmp_path / "run")


def test_an_answer_is_bought_once(start_endpoint: Callable[..., Any], tmp_path: Path) -> None:
    endpoint = start_endpoint(obedient=True)
    corpus = corpus_in(tmp_path)
    curated(recipe_of(corpus, endpoint), tmp_path / "run")
    before = rows_in(tmp_path / "run" / "data")
    assert endpoint.stats()["requests"] == 8
    curated(recipe_of(corpus, endpoint, {"step": "clean"}, limits={"length": [0.1, 3.0]}), tmp_path / "run")  # another recipe
    assert endpoint.stats()["requests"] == 8 and rows_in(tmp_path / "run" / "data") == before


def test_another_model_says_other_words(start_endpoint: Callable[..., Any], tmp_path: Path) -> None:
    endpoint = start_endpoint(obedient=True)
    corpus = corpus_in(tmp_path)
    two = [{"base_url": endpoint.url, "model": name} for name in ("first", "second")]
    before = {"step": "rephrase", "tasks": ["wikipedia"], "generators": two[:1]}
    curated(recipe_of(corpus, endpoint, before, generators=two[1:]), tmp_path / "run")
    kept = rows_in(tmp_path / "run" / "data")
    assert endpoint.stats()["requests"] == 16 and len(kept) == 24
    models = {name: json.loads(row["meta"])["rephrase_model"] for name, row in kept.items() if "#" in name}
    assert models == {f"d{i}#wikipedia-0": "first" for i in range(8)} | {f"d{i}#wikipedia-0.2": "second" for i in range(8)}
    curated(recipe_of(corpus, endpoint, generators=two[1:]), tmp_path / "run")
    assert endpoint.stats()["requests"] == 16


def test_a_document_is_replaced_as_a_whole_or_not_at_all(obedient: Any, tmp_path: Path) -> None:
    long = "\n".join(document(i) for i in range(4))
    corpus = corpus_in(tmp_path, whole=long, broken=long + "\nThis one is formless. " + document(5))
    curated(recipe_of(corpus, obedient, originals=False), tmp_path / "run")
    kept, gone = rows_in(tmp_path / "run" / "data"), rows_in(tmp_path / "run" / "dropped")
    parts = {name for name in kept if name.startswith("whole#")}
    assert gone["whole"]["reason"] == "rephrased" and gone["whole"]["figure"] == len(parts) > 1
    assert "broken" in kept and "broken#wikipedia-0" in kept and "no opening" in {gone[name]["reason"] for name in gone}


def test_an_outage_is_not_final(start_endpoint: Callable[..., Any], tmp_path: Path) -> None:
    endpoint = start_endpoint(obedient=True)
    corpus = corpus_in(tmp_path, **{f"ill{i}": document(30 + i, x="[fate 500 500 ok]") for i in range(4)})
    recipe = recipe_of(corpus, endpoint, calls={"retries": 0})
    for _ in range(2):
        with pytest.raises(InputError, match=r"4 of 12 calls got no answer .*run the same command again"):
            curated(recipe, tmp_path / "run")
    curated(recipe, tmp_path / "run")
    assert len(rows_in(tmp_path / "run" / "data")) == 24 and endpoint.stats()["requests"] == 8 + 3 * 4


def test_killed_runs_buy_nothing_twice(start_endpoint: Callable[..., Any], tmp_path: Path) -> None:
    endpoint = start_endpoint(obedient=True, latency=0.05)
    rows = [{"id": f"d{i}", "text": document(i)} for i in range(120)]
    corpus = tmp_path / "documents.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_of(corpus, endpoint, calls={"concurrency": 4}, tasks=["wikipedia", "distill"]).model_dump(mode="json")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"workers": 1, "reading": {"batch_bytes": 30_000}}))
    command = [sys.executable, "-m", "gristmill.cli", "curate", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run"), "--quiet"]
    for _ in range(2):
        process = subprocess.Popen(command)
        asked = endpoint.stats()["requests"]
        while endpoint.stats()["requests"] < asked + 40 and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert subprocess.run(command, timeout=120).returncode == 0
    assert len(rows_in(tmp_path / "run" / "data")) == 360
    assert endpoint.stats()["requests"] <= 240 + 2 * 4  # what was in flight at the two kills


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tasks": []}, "at least 1"),
        ({"tasks": ["poem"]}, "wikipedia"),
        ({"generators": []}, "give endpoints, or one folder"),
        ({"column": "band"}, "both column and values"),
        ({"limits": {"entity_recal": [0, 1]}}, "did you mean 'entity_recall'"),
        ({"limits": {"length": [2, 1]}}, "the min of length is above the max"),
        ({"tasks": ["distill", "distill"]}, "each once"),
        ({"generators": [{"base_url": "http://localhost:1/v1", "model": "m", "kind": "completions"}]}, "use 'chat'"),
        ({"min_reward": 2}, "needs a reward model"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Rephrase.model_validate({"tasks": ["wikipedia"], "generators": [{"base_url": "http://localhost:1/v1", "model": "m"}]} | settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"generators": [{"base_url": "localhost", "model": "m"}]}, "not the base URL"),
        ({"generators": [{"base_url": "http://localhost:1/v1", "model": "m", "api_key_env": "NO_SUCH_KEY"}]}, "NO_SUCH_KEY is empty"),
        ({"templates": "nowhere.yaml"}, "cannot be read"),
        ({"templates": "{folder}/same.yaml"}, "lacks {document}"),
        ({"templates": "{folder}/long.yaml"}, "leave no room"),
        ({"tokenizer": "nowhere"}, "give another folder as `tokenizer`"),
        ({"generators": [{"folder": "nowhere"}]}, "nowhere/config.json does not exist"),
        ({"reward": {"folder": "nowhere"}}, "nowhere/config.json does not exist"),
    ],
)
def test_what_is_missing_is_told_before_work_is_spent(obedient: Any, settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "same.yaml").write_text("rephrase_wikipedia: {text: Say something.}")
    (tmp_path / "long.yaml").write_text(f"rephrase_system: {{text: {'word ' * 500}}}")
    settings = {key: value.format(folder=tmp_path) if isinstance(value, str) else value for key, value in settings.items()}
    with pytest.raises(InputError, match=words):
        curated(recipe_of(corpus_in(tmp_path), obedient, **settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_in_process(tiny_base: Path, tmp_path: Path) -> None:
    texts = {f"d{i}": document(i, 1) for i in range(3)}
    corpus = tmp_path / "documents.jsonl"
    corpus.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in texts.items()))
    pack = tmp_path / "pack.yaml"
    pack.write_text("rephrase_knowledge_list: {text: '{document}', sampling: {max_tokens: 8}}\nrephrase_system: {text: x}\n")
    step = {"step": "rephrase", "tasks": ["knowledge_list"], "generators": [{"folder": str(tiny_base)}], "templates": str(pack)}
    curated(Curation.model_validate({"inputs": [str(corpus)], "workers": 1, "steps": [step]}), tmp_path / "run")
    assert set(texts) <= set(rows_in(tmp_path / "run" / "data"))  # it has learnt no such thing, but says something
    assert {row["id"].split("#")[1] for row in rows_in(tmp_path / "run" / "dropped").values()} == {"knowledge_list-0"}
