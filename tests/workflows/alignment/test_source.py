"""A user's own files: what their columns mean, and one clear sentence for each that cannot be used."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gristmill.core.errors import InputError
from gristmill.data.chat import Message
from gristmill.data.human import HumanData
from gristmill.data.readers import read_demonstrations, read_prompts, read_ratings
from gristmill.synth.templates import TemplatePack
from gristmill.workflows.alignment.source import FileSource, contaminated, normalize_prompt

RATED = {"helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 1, "verbosity": 2}
USER, ASSISTANT = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}


REQUEST = TemplatePack.load()["task_prompt"]


def files_of(data: HumanData) -> FileSource:
    return FileSource(data, REQUEST)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def data(tmp_path: Path) -> HumanData:
    return HumanData(
        demonstrations=write(tmp_path / "demos.jsonl", [{"prompt": f"Q{i}?", "response": f"A{i}.", "task": "talk"} for i in range(10)]),
        ratings=write(tmp_path / "ratings.jsonl", [{"prompt": f"R{i // 2}?", "response": f"A{i}.", **RATED} for i in range(8)]),
        prompts=write(tmp_path / "prompts.jsonl", [{"prompt": "1 + 1?", "answer": 2}, {"prompt": "Why?", "task": "why"}]),
        evaluation=write(tmp_path / "test.jsonl", [{"prompt": f"E{i}?", "answer": i, "task": f"t{i % 2}"} for i in range(10)]),
        num_demonstrations=6,
        num_rated_prompts=2,
        num_held_out_ratings=1,
        num_evaluation=3,
    )


def test_amounts_are_those_of_the_recipe(data: HumanData) -> None:
    source = files_of(data)
    own = [d for d in source.demonstrations() if d.task != "prompt-writing"]
    assert len(own) == 6 and len(source.ratings()) == 6 and len(source.prompts()) == 2
    assert [p.task for p in source.evaluation()] == ["t0"] * 3 + ["t1"] * 3  # a task


def known(num: int, what: str) -> list[dict[str, Any]]:
    return [{"prompt": f"{what} {i}?", "answer": i} for i in range(num)]


def test_rows_that_choose_the_best_model_are_used_for_nothing_else(data: HumanData, tmp_path: Path) -> None:
    def split(**changes: Any) -> tuple[int, int, list[str]]:
        source = files_of(data.model_copy(update=changes))
        rows = source.validation()
        used = [p.id for p in [*source.prompts(), *source.evaluation()]]
        assert not set(used) & {p.id for p in rows} and all(p.truth for p in rows) and bool(rows) == bool(source.validated_on)
        return len(source.prompts()), len(source.evaluation()), [p.messages[-1].content for p in rows]

    prompts = write(tmp_path / "known.jsonl", [{"prompt": "Why?"}, *known(11, "P")])
    many = write(tmp_path / "many.jsonl", known(20, "M"))
    assert split() == (2, 6, [])  # 4 rows beyond num_evaluation are too few, and the evaluation is as large as was asked for
    assert split(num_evaluation=2) == (2, 4, ["E4?", "E5?", "E6?", "E7?", "E8?", "E9?"])
    assert split(prompts=prompts) == (10, 6, ["P 4?", "P 9?"])
    assert split(prompts=prompts, num_prompts=6) == (6, 6, ["E6?", "E7?", "E8?", "E9?", *(f"P {i}?" for i in range(5, 11))])
    assert split(evaluation=many, num_evaluation=None) == (2, 16, ["M 4?", "M 9?", "M 14?", "M 19?"])
    assert split(validation=many, prompts=prompts) == (12, 6, [f"M {i}?" for i in range(20)])


def test_a_validation_row_that_is_evaluated_too_is_refused(data: HumanData, tmp_path: Path) -> None:
    rows = write(tmp_path / "validation.jsonl", [{"prompt": "New?", "answer": 1}, {"prompt": " e2? ", "answer": 2}])
    with pytest.raises(InputError, match="Row 2 of .*validation.jsonl asks what the evaluation asks"):
        files_of(data.model_copy(update={"validation": rows}))


def test_the_demonstrations_teach_to_write_prompts(data: HumanData) -> None:
    source = files_of(data)
    asked = "Write a prompt for the task talk."
    writing = [d for d in source.demonstrations() if d.task == "prompt-writing"]
    assert [d.messages for d in writing] == [
        (Message("user", asked), Message("assistant", "Q0?")),
        (Message("user", asked), Message("assistant", "Q5?")),
    ]
    assert [d.parents for d in writing] == [(source.demonstrations()[i].id,) for i in (0, 5)]


def test_rows_have_ids_of_their_own(data: HumanData) -> None:
    source = files_of(data)
    ids = [r.id for rows in (source.demonstrations(), source.ratings(), source.prompts(), source.evaluation()) for r in rows]
    assert len(set(ids)) == len(ids)


def test_answers_to_one_prompt_are_a_pair(data: HumanData) -> None:
    pairs = [r.pair for r in files_of(data).ratings()]
    assert pairs[0] == pairs[1] != pairs[2] == pairs[3]


@pytest.mark.parametrize(
    ("answer", "kind"),
    [(12, "number"), (1.5, "number"), ("1,200", "number"), ("-3", "number"), ("$5", "number"), ("blue", "math"), ("Nan bread", "math")],
)
def test_known_answers_are_numbers_or_final_answers(tmp_path: Path, answer: Any, kind: str) -> None:
    (prompt,) = read_prompts(write(tmp_path / "p.jsonl", [{"prompt": "?", "answer": answer}]), "human", truth=True)
    assert prompt.truth == {"kind": kind, "value": str(answer)}


def test_a_truth_is_taken_as_it_is(tmp_path: Path) -> None:
    truth = {"kind": "choice", "value": "B"}
    (prompt,) = read_prompts(write(tmp_path / "p.jsonl", [{"prompt": "?", "truth": truth, "answer": 3}]), "human")
    assert prompt.truth == truth


def test_tasks_whose_truths_are_programs_are_code_tasks(data: HumanData, tmp_path: Path) -> None:
    row = {"prompt": "Write f.", "task": "programs", "truth": {"kind": "code", "tests": "assert f(1) == 1"}}
    assert "programs" in files_of(data.model_copy(update={"prompts": write(tmp_path / "code.jsonl", [row])})).code_tasks


def test_parquet_with_gaps_is_read_as_jsonl(tmp_path: Path) -> None:
    rows = [
        {"messages": [USER, ASSISTANT], "prompt": None, "response": None, "task": None, **RATED},
        {"messages": None, "prompt": "Hi?", "response": "Hello.", "task": "talk", **RATED, "verbosity": None, "complexity": float("nan")},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
    first, second = read_ratings(tmp_path / "r.parquet")
    assert first.messages == second.messages and (first.task, second.task) == ("general", "talk")
    assert first.labels == (3, 4, 4, 1, 2) and second.labels == (3, 4, 4, None, None)


def test_a_task_name_with_braces_is_only_a_name(data: HumanData, tmp_path: Path) -> None:
    demonstrations = write(tmp_path / "odd.jsonl", [{"prompt": "Q?", "response": "A.", "task": "a{b}"}])
    source = files_of(data.model_copy(update={"demonstrations": demonstrations}))
    assert source.tasks == ("a{b}",) and source.demonstrations()[-1].messages[0].content == "Write a prompt for the task a{b}."


DEMONSTRATION, RATING, PROMPT, TEST = "demonstrations", "ratings", "prompts", "evaluation"
BAD: list[tuple[str, list[dict[str, Any]], str]] = [
    *((kind, [], "holds no rows") for kind in (DEMONSTRATION, RATING, PROMPT, TEST)),
    (DEMONSTRATION, [{"prompt": "Q?"}], "Row 1 .* and one of response"),
    (DEMONSTRATION, [{"prompt": "Q?", "response": "A."}, {"text": "?"}], "Row 2 .* looks like plain documents"),
    (DEMONSTRATION, [{"prompt": 5, "response": "A."}], "Row 1 .* text"),
    (DEMONSTRATION, [{"prompt": "Q?", "response": None}], "Row 1 .* lacks a conversation"),
    (DEMONSTRATION, [{"messages": []}], "Row 1 .* lacks a conversation"),
    (DEMONSTRATION, [{"messages": 5}], "Row 1 "),
    (DEMONSTRATION, [{"messages": "Hi?"}], "Row 1 "),
    (DEMONSTRATION, [{"messages": [ASSISTANT]}], "Row 1 .* starting with the user"),
    (DEMONSTRATION, [{"messages": [ASSISTANT, USER, ASSISTANT]}], "Row 1 .* starting with the user"),
    (DEMONSTRATION, [{"messages": [USER, USER, ASSISTANT]}], "Row 1 .* alternate"),
    (DEMONSTRATION, [{"messages": [USER]}], "Row 1 .* must end with the assistant"),
    (DEMONSTRATION, [{"messages": [{"role": "robot", "content": "Hi"}]}], "Row 1 .* role"),
    (DEMONSTRATION, [{"prompt": "Q?", "response": "A.", "task": 7}], "Row 1 .* task 7"),
    (RATING, [{"prompt": "Q?", "response": "A."}], "none of the columns helpfulness"),
    (RATING, [{"prompt": "Q?", "response": "A.", **dict.fromkeys(RATED)}], "none of the columns"),
    (RATING, [{"prompt": "Q?", "response": "A.", **RATED, "verbosity": "high"}], "Row 1 .* verbosity 'high'"),
    (RATING, [{"prompt": "Q?", "response": "A.", **RATED, "coherence": 1e999}], "Row 1 .* coherence inf"),
    (RATING, [{"messages": [ASSISTANT], **RATED}], "Row 1 .* starting with the user"),
    (PROMPT, [{"messages": [USER, ASSISTANT]}], "Row 1 .* must end with the user"),
    (PROMPT, [{"prompt": "Q?", "truth": {"kind": "guess"}}], "Row 1 .* unknown kind"),
    (TEST, [{"prompt": "Q?"}], "Row 1 .* neither `truth` nor `answer`"),
    (TEST, [{"prompt": "Q?", "truth": "4"}], "Row 1 .* lacks the field 'kind'"),
    (TEST, [{"prompt": "Q?", "truth": {"kind": "number", "value": "four"}}], "Row 1 .* no number"),
    (TEST, [{"prompt": "Q?", "truth": {"kind": "code"}}], "Row 1 .* lacks the field 'tests'"),
    (TEST, [{"messages": [ASSISTANT], "answer": 1}], "Row 1 .* starting with the user"),
]


@pytest.mark.parametrize(("kind", "rows", "words"), BAD)
def test_a_bad_file_is_one_sentence_that_names_the_row(
    data: HumanData, tmp_path: Path, kind: str, rows: list[dict[str, Any]], words: str
) -> None:
    path = write(tmp_path / "bad.jsonl", rows)
    with pytest.raises(InputError, match=words) as caught:
        files_of(data.model_copy(update={kind: path}))
    assert "bad.jsonl" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [DEMONSTRATION, RATING, PROMPT, TEST])
def test_a_missing_file_is_named(data: HumanData, tmp_path: Path, kind: str) -> None:
    with pytest.raises(InputError, match="nowhere.jsonl does not exist"):
        files_of(data.model_copy(update={kind: tmp_path / "nowhere.jsonl"}))


def test_without_ratings_and_prompts(data: HumanData) -> None:
    source = files_of(data.model_copy(update={"ratings": None, "prompts": None}))
    assert source.ratings() == [] and source.prompts() == []


def test_demonstrations_keep_every_turn(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be kind."}, USER, ASSISTANT, USER, ASSISTANT]
    (row,) = read_demonstrations(write(tmp_path / "d.jsonl", [{"messages": turns}]))
    assert [m.role for m in row.messages] == ["system", "user", "assistant", "user", "assistant"] and row.origin == "human"


def test_contamination_looks_at_the_whole_and_at_each_user_turn() -> None:
    asked, other = Message("user", "What is  the capital of Runi?"), Message("user", "And its river?")
    said = Message("assistant", "It is Bo.")
    held = frozenset({normalize_prompt([asked]), normalize_prompt([other, said, asked])})
    assert contaminated([Message("user", " WHAT is the capital\nof runi?")], held)
    assert contaminated([asked, said, other], held), "a first turn that is held out on its own"
    assert contaminated([other, said, asked], held)
    assert not contaminated([other], held)
    assert not contaminated([Message("user", "What is the capital of Runi, please?")], held)
    assert not contaminated([other, Message("assistant", asked.content), other], held), "only what users say counts"
