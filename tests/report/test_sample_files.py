"""Samples as rows: of lines and of a JSON object, whatever fields they have."""

import json
from pathlib import Path

from gristmill.report.sample_files import read_samples, sample_files, walk


def test_a_line_is_turns_texts_and_facts(tmp_path: Path) -> None:
    line = {
        "doc_id": 7,
        "messages": [{"role": "user", "content": "2 + 2?"}],
        "answer": "4",
        "label": "safe",
        "right": True,
        "choices": ["three", "four"],
        "logprobs": [-1.0] * 30,
        "none": None,
    }
    (tmp_path / "samples.jsonl").write_text(json.dumps({"reply": None}) + "\n" + json.dumps(line) + "\n")
    empty, sample = read_samples(tmp_path / "samples.jsonl")
    assert sample.id == "7" and sample.meta["at"] == "line 2" and empty.id == "line 1"
    assert sample.meta["messages"] == line["messages"]
    assert sample.meta["facts"] == {"doc_id": 7, "label": "safe", "right": True}
    parts = dict(sample.meta["parts"])
    assert list(parts) == ["answer", "choices 1", "choices 2", "logprobs"] and parts["answer"] == "4"
    assert sample.text.startswith("2 + 2?\n4\nthree\nfour")


def test_an_object_has_the_samples_of_its_lists_in_order(tmp_path: Path) -> None:
    steps = [{"dropped": {"text": [{"id": "a", "text": "x"}]}, "kept": {}}, {"dropped": {}, "kept": {"": [{"id": "b", "text": None}]}}]
    (tmp_path / "samples.json").write_text(json.dumps({"steps": steps}))
    assert [(s.id, s.meta["at"]) for s in read_samples(tmp_path / "samples.json")] == [
        ("a", "steps 1, dropped, text 1"),
        ("b", "steps 2, kept, 1"),
    ]
    assert [sample["id"] for _, sample in walk({"steps": steps})] == ["a", "b"]


def test_files_are_found_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    names = ["samples.jsonl", "canaries.samples.jsonl", "samples/mmlu.jsonl"]
    for name in [*names, "answers.jsonl", "results.json"]:
        (tmp_path / name).write_text("")
    assert [path.relative_to(tmp_path).as_posix() for path in sample_files(tmp_path)] == names
