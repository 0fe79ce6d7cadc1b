"""Files of benchmarks as users have them: the Hub's layouts, other revisions, and what is missing."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gristmill.core.errors import InputError
from gristmill.evaluate.documents import TaskData, read_prompt_file, read_table, read_task
from gristmill.evaluate.harness import Answer, Prompter, choice_scores
from gristmill.evaluate.task import find_tasks
from tests.evaluate.benchmarks import ARC, GSM8K, HUMANEVAL, MBPP, MMLU, MMLU_DEV, jsonl, write_data


def read(name: str, folder: Path, num_fewshot: int = 0) -> list[TaskData]:
    return read_task(find_tasks([name])[0], folder, num_fewshot=num_fewshot)


def test_the_hubs_layouts(tmp_path: Path) -> None:
    files = {
        "ai2_arc/ARC-Challenge/test-00000-of-00001.parquet": ARC,
        "mmlu/old_stones/test-00000-of-00001.parquet": MMLU[:3],
        "mmlu/rivers/test-00000-of-00001.parquet": MMLU[3:],
        "mmlu/rivers/dev-00000-of-00001.parquet": MMLU_DEV[3:],
        "mmlu/old_stones/dev-00000-of-00001.parquet": MMLU_DEV[:3],
        "gsm8k/main/test-00000-of-00002.parquet": GSM8K[:1],
        "gsm8k/main/test-00001-of-00002.parquet": GSM8K[1:],
    }
    for name, rows in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    assert [doc["question"] for doc in read("arc_challenge", tmp_path)[0].docs] == ["Why 0?", "Why 1?", "Why 2?"]
    parts = [(one.name, len(one.docs), len(one.pool)) for one in read("mmlu", tmp_path, 3)]
    assert parts == [
        ("mmlu_old_stones", 3, 3),
        ("mmlu_rivers", 3, 3),
    ]
    assert len(read("gsm8k_cot", tmp_path, 8)[0].docs) == 3  # from the folder gsm8k


def test_compressed_files_and_files_of_all_splits(tmp_path: Path) -> None:
    (tmp_path / "humaneval").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in HUMANEVAL)
    (tmp_path / "humaneval" / "HumanEval.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert len(read("humaneval", tmp_path)[0].docs) == 3
    jsonl(tmp_path / "mbpp" / "mbpp.jsonl", MBPP)
    (mbpp,) = read("mbpp", tmp_path, 3)
    assert [doc["task_id"] for doc in mbpp.docs] == [11, 12] and [doc["task_id"] for doc in mbpp.pool] == [2, 3, 4]
    assert "\r\n" in mbpp.pool[0]["code"]


def test_truthfulqas_published_file(tmp_path: Path) -> None:
    targets = {"No": 0, "Yes": 1, "Never": 0}
    row = {"question": "Why?", "mc1_targets": targets, "mc2_targets": targets}
    (tmp_path / "truthfulqa").mkdir()
    (tmp_path / "truthfulqa" / "mc_task.json").write_text(json.dumps([row]))
    for name in ("truthfulqa_mc1", "truthfulqa_mc2"):
        (data,) = read(name, tmp_path)
        (item,) = Prompter(data, num_fewshot=0, seed=0).items()
        assert item.choices == ("No", "Yes", "Never") and item.pairs[1][1] == " Yes"
        found = choice_scores(data.task, item, Answer(logprobs=[-9.0, -1.0, -9.0]))
        assert next(iter(found.values())) > 0.99


def test_truthfulqas_table(tmp_path: Path) -> None:
    (tmp_path / "truthfulqa").mkdir()
    head = "Type,Category,Question,Best Answer,Best Incorrect Answer,Correct Answers,Incorrect Answers,Source\n"
    (tmp_path / "truthfulqa" / "TruthfulQA.csv").write_text(head + 'A,B,"Why, so?",Yes,No,Yes; Aye,No; Never,x\n')
    (one,) = read("truthfulqa_mc2", tmp_path)
    assert one.docs[0]["mc1_targets"] == {"choices": ["Yes", "No", "Never"], "labels": [1, 0, 0]}
    assert one.docs[0]["mc2_targets"] == {"choices": ["Yes", "Aye", "No", "Never"], "labels": [1, 1, 0, 0]}
    assert "TruthfulQA.csv" in one.notes[0] and "1 documents, and the published split validation has 817" in one.notes[1]


def test_other_counts_and_shots_from_another_split_are_told(tmp_path: Path) -> None:
    folder = write_data(tmp_path)
    (arc,) = read("arc_challenge", folder, 2)
    assert arc.notes == [
        "3 documents, and the published split test has 1,172",
        "shots: 27 documents, and the published split train has 1,119",
    ]
    (folder / "hellaswag" / "train.jsonl").unlink()
    (hellaswag,) = read("hellaswag", folder, 2)
    assert hellaswag.pool_split == "validation" and any("no published protocol" in note for note in hellaswag.notes)


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        ("gsm8k", None, r"gsm8k needs the split 'test': put it at .*gsm8k/test.parquet.*question, answer"),
        ("gsm8k", [{"question": "?", "solution": "!"}], "has not the column answer that gsm8k needs: its columns are question, solution"),
        ("gsm8k", [{"question": "?", "answer": "!"}, {"question": "?", "answer": None}], "Document 2 of .* has no answer"),
        ("mmlu", [{"question": "?", "choices": ["a"], "answer": 0}], "has not the column subject that mmlu needs"),
        ("gsm8k", [], "has no document"),
        ("mmlu", [{"question": "?", "subject": "s", "choices": "ab", "answer": 0}], "has the choices 'ab': mmlu needs a list"),
    ],
)
def test_what_is_missing_is_one_sentence(name: str, spoil: list[dict[str, object]] | None, said: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    if spoil is not None:
        jsonl(tmp_path / name / "test.jsonl", spoil)
    with pytest.raises(InputError, match=said) as error:
        read(name, tmp_path)
    assert "\n" not in str(error.value)


def test_too_few_shots_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bbh needs the file .*web_of_lies.txt|there are no documents|needs the split"):
        read("bbh", tmp_path, 3)
    with pytest.raises(InputError, match="wants 5 shots and its pool .dev. has 3"):
        read("mmlu", write_data(tmp_path), 5)
    with pytest.raises(InputError, match="does not exist: give --data a folder"):
        read("mmlu", tmp_path / "none")


def test_tables_that_cannot_be_read(tmp_path: Path) -> None:
    files = {"a.json": b"{", "b.jsonl.gz": b"no gzip", "c.json": b'{"a": 1}', "e.json": b'[{"a": "\\ud800"}]'}
    for name, data in (files | {"d.jsonl.gz": gzip.compress(b"[1]\n")}).items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=name):
            read_table(tmp_path / name)
    (tmp_path / "e.txt").write_text("no questions")
    with pytest.raises(InputError, match="none of BBH's prompt files"):
        read_prompt_file(tmp_path / "e.txt")
