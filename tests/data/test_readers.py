"""Readers of user files: rows from JSONL, JSON and Parquet."""

import json
from pathlib import Path
from typing import Any

import pytest

from gristmill.core.errors import InputError
from gristmill.data.chat import Message
from gristmill.data.readers import read_demonstrations, read_pairs, read_prompts, read_ratings
from gristmill.data.rows import ATTRIBUTES, Demonstration, Pair, Rated, read_records, read_rows, write_rows
from gristmill.workflows.dataset import export

PAIRS = [{"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": "No."} for i in range(8)]
MARKS = dict(zip(ATTRIBUTES, (3, 3, 4, 1, 1), strict=True))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_our_own_pairs_are_read_with_their_rewards(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}, {"role": "user", "content": "C?"}]
    row = {"id": "x", "task": "t", "messages": talk, "chosen": "D.", "rejected": "E.", "chosen_reward": 2.5, "rejected_reward": -1}
    own, plain = read_pairs(write(tmp_path / "pairs.jsonl", [row, PAIRS[0] | {"chosen_reward": None, "task": None}]))
    assert (own.id, own.task, own.chosen_reward, own.rejected_reward) == ("x", "t", 2.5, -1.0) and len(own.messages) == 3
    assert (plain.task, plain.chosen_reward, plain.rejected_reward) == ("", 1.0, 0.0) and plain.messages == (Message("user", "Say 0."),)


TALKS = {
    "one turn": (Message("user", "A?"),),
    "a system turn": (Message("system", "Be kind."), Message("user", "A?")),
    "many turns": (Message("user", "A?"), Message("assistant", "B\n\nC"), Message("user", "D?")),
    "both": (Message("system", "s"), Message("user", "A?"), Message("assistant", "B"), Message("user", "D?")),
}


@pytest.mark.parametrize("name", TALKS)
@pytest.mark.parametrize("file", ["preference.jsonl", "preference.parquet", "nemo_aligner.jsonl"])
def test_what_is_exported_is_read(file: str, name: str, tmp_path: Path) -> None:
    pair = Pair("i", "0123456789abcdef", "t", TALKS[name], " x\n", "y", 3.0, 1.5, "reward", ("p",))
    shown = Demonstration("j", "t", (*TALKS[name], Message("assistant", "x")), "m")
    export.write_tables(tmp_path, [shown], [pair])
    (read,) = read_pairs(tmp_path / "export" / file)
    assert (read.messages, read.chosen, read.rejected, read.chosen_reward, read.rejected_reward) == (TALKS[name], " x\n", "y", 3.0, 1.5)
    for ending in ("jsonl", "parquet"):
        (demonstration,) = read_demonstrations(tmp_path / "export" / f"sft.{ending}")
        assert demonstration.messages == shown.messages and demonstration.meta == {"generator": "m"}


def test_pairs_say_which_answer_was_cut_off(tmp_path: Path) -> None:
    pair = Pair("i", "0123456789abcdef", "t", TALKS["one turn"], "x", "y", 3.0, 1.5, "verifier", rejected_finished=False)
    ended = Pair("j", "0123456789abcdef", "t", TALKS["one turn"], "x", "z", 3.0, 1.5, "verifier")
    for name in ("pairs.jsonl", "pairs.parquet"):
        write_rows(tmp_path / name, [ended, pair])
        assert read_rows(tmp_path / name, Pair) == [ended, pair]
        assert [(p.chosen_finished, p.rejected_finished) for p in read_pairs(tmp_path / name)] == [(True, True), (True, False)]
        write_rows(tmp_path / name, [ended])  # as earlier versions wrote it
        assert "rejected_finished" not in read_records(tmp_path / name)[0] and read_rows(tmp_path / name, Pair) == [ended]
    with pytest.raises(InputError, match="rejected_finished 'no'"):
        read_pairs(write(tmp_path / "p.jsonl", [PAIRS[0] | {"rejected_finished": "no"}]))


def test_the_rewards_of_others_are_known(tmp_path: Path) -> None:
    (pair,) = read_pairs(write(tmp_path / "p.jsonl", [PAIRS[0] | {"score_chosen": 8.5, "score_rejected": 3}]))
    assert (pair.chosen_reward, pair.rejected_reward, pair.meta) == (8.5, 3.0, {})


def test_answers_that_begin_with_the_prompt_in_every_row_are_refused(tmp_path: Path) -> None:
    both = [{"prompt": "Q: 1+1? A:", "chosen": "Q: 1+1? A: 2", "rejected": "Q: 1+1? A: 3"}]
    with pytest.raises(InputError, match="both answers begin with the prompt"):
        read_pairs(write(tmp_path / "p.jsonl", both))
    assert len(read_pairs(write(tmp_path / "p.jsonl", [*both, PAIRS[0]]))) == 2, "an answer may repeat its prompt"


def test_the_turns_inside_a_rated_prompt_are_turns(tmp_path: Path) -> None:
    row = {"prompt": "a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc", "response": "d", **MARKS}
    (rated,) = read_ratings(write(tmp_path / "r.jsonl", [row]))
    assert [m.role for m in rated.messages] == ["user", "assistant", "user", "assistant"] and rated.labels == (3, 3, 4, 1, 1)


@pytest.mark.parametrize(("mark", "label"), [(None, None), (float("nan"), None), (-100, None), (0, 0), ("4", 4)])
def test_a_mark_that_nobody_gave_is_none(mark: Any, label: float | None, tmp_path: Path) -> None:
    (rated,) = read_ratings(write(tmp_path / "r.jsonl", [{"prompt": "a", "response": "b", **MARKS, "coherence": mark}]))
    assert rated.labels[ATTRIBUTES.index("coherence")] == label


@pytest.mark.parametrize("mark", [4.5, -1, 1e308, "high", float("inf"), [3]])
def test_a_mark_out_of_range_is_refused(mark: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Row 1 .* coherence .* from 0 to 4"):
        read_ratings(write(tmp_path / "r.jsonl", [{"prompt": "a", "response": "b", **MARKS, "coherence": mark}]))


def test_our_own_rated_rows_are_read(tmp_path: Path) -> None:
    row = Rated("i", "t", (Message("user", "a"), Message("assistant", "b")), (4.0, None, 2.0, 1.0, 0.0), "p")
    write_rows(tmp_path / "r.parquet", [row])
    assert read_ratings(tmp_path / "r.parquet")[0].labels == row.labels


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_other_columns_are_kept_in_meta_and_survive_a_file(ending: str, tmp_path: Path) -> None:
    rows = [{"id": "1", "prompt": "a", "response": "b", "source": "forum", "score": float("nan")}, {"prompt": "c", "response": "d"}]
    read = read_demonstrations(write(tmp_path / "d.jsonl", rows))
    assert read[0].meta["source"] == "forum" and read[1].meta == {}
    write_rows(tmp_path / f"own.{ending}", read)
    own = read_rows(tmp_path / f"own.{ending}", Demonstration)
    assert [r.meta for r in own] == [{"source": "forum", "score": None}, {}], "JSON has no NaN"
    assert read_demonstrations(tmp_path / f"own.{ending}")[0].meta == {"source": "forum", "score": None, "origin": "human", "parents": []}


def test_a_list_in_one_json_file_is_read(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    (tmp_path / "s.json").write_text(json.dumps([{"conversations": talk}] * 2, indent=1))
    assert [len(d.messages) for d in read_demonstrations(tmp_path / "s.json")] == [2, 2]
    (tmp_path / "s.json").write_text('[{"conversations": []}, 3]')
    with pytest.raises(InputError, match="Item 2 of .* is not a JSON object"):
        read_demonstrations(tmp_path / "s.json")


@pytest.mark.parametrize("line", ['{"prompt": "a", "response": "\\ud83d"}', '{"prompt": {"\\uDC00": 1}}', '{"prompt": "a", "prompt": "b"}'])
def test_half_of_a_pair_and_a_name_twice_are_refused_with_their_line(line: str, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"prompt": "\\ud83d\\ude00", "response": "b"}\n' + line + "\n")
    with pytest.raises(InputError, match="Line 2 of .*(surrogate|twice)"):
        read_demonstrations(tmp_path / "d.jsonl")


def test_a_question_with_its_answer_is_a_prompt_with_a_truth(tmp_path: Path) -> None:
    (prompt,) = read_prompts(write(tmp_path / "p.jsonl", [{"question": "1+1?", "answer": "2", "source": "s"}]), "human", truth=True)
    assert prompt.messages == (Message("user", "1+1?"),) and prompt.truth is not None and prompt.meta == {"source": "s"}


@pytest.mark.parametrize("task", ["a\nb", "a\x1b[2J", "a" * 201, 5])
def test_a_task_is_a_name_on_one_line(task: Any, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "Hi", "task": task}) + "\n")
    with pytest.raises(InputError, match="on one line") as caught:
        read_prompts(path, "human")
    assert str(caught.value).isprintable()
