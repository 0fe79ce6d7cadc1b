"""Evaluation on benchmarks: answers kept, nothing asked twice, right and wrong answers, what puts a score in doubt."""

import json
import math
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from gristmill.cli.main import app
from gristmill.core.errors import InputError
from gristmill.core.progress import Progress
from gristmill.data.rows import Demonstration, write_rows
from gristmill.engine.load import EngineArgs, load_engine
from gristmill.evaluate.harness import rolling_windows
from gristmill.report.benchmarks import benchmark_text, write_benchmark_page
from gristmill.workflows.benchmark_requests import BenchmarkArgs
from gristmill.workflows.benchmark_sources import AnswerSource, EngineSource
from gristmill.workflows.benchmarks import ANSWERS, SAMPLES, differences, headlines, run_benchmarks
from tests.evaluate.benchmarks import HUMANEVAL, MBPP, Scripted, jsonl, write_data

SHOTS: dict[str, Any] = {"num_fewshot": 1}


def run(source: AnswerSource | Callable[[], AnswerSource], folder: Path, tasks: str, **settings: Any) -> dict[str, Any]:
    args = BenchmarkArgs(tasks=tuple(tasks.split(",")), data=folder, **settings)
    opened = source if callable(source) else lambda: source
    model = {"name": settings.get("out").name if settings.get("out") else "x"}  # type: ignore[union-attr]
    return run_benchmarks(opened, model, args, Progress(quiet=True))


def samples(out: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / SAMPLES / f"{task}.jsonl").read_text().splitlines()]


def test_killed_at_ten_moments_an_evaluation_goes_on_and_asks_nothing_twice(tmp_path: Path) -> None:
    folder, tasks, log = write_data(tmp_path / "data"), "mmlu,arc_challenge,gsm8k,winogrande", tmp_path / "asked"
    limited: dict[str, Any] = {"limit": 2, **SHOTS}
    whole = run(Scripted(), folder, tasks, out=tmp_path / "whole", **limited)
    out = tmp_path / "killed" / "whole"
    for num in (0, 1, 5, 2, 7, 0, 3, 4, 1, 3):  # answers before each kill
        child = os.fork()
        if child == 0:
            try:
                run(Scripted(log=log, killed_after=num), folder, tasks, out=out, **limited)
            finally:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        with (out / ANSWERS).open("ab") as file:
            file.write(b'{"id": "torn')
    assert run(Scripted(log=log), folder, tasks, out=out, **limited)["tasks"] == whole["tasks"]
    for task in whole["tasks"]:
        assert samples(out, task) == samples(tmp_path / "whole", task)

    def never() -> AnswerSource:
        raise AssertionError("no model is loaded where all is answered")

    assert run(never, folder, tasks, out=out, **limited)["tasks"] == whole["tasks"]
    run(Scripted(log=log), folder, tasks, out=out, **SHOTS)  # all documents: the others alone are asked
    asked = log.read_text().splitlines()
    assert len(asked) == len(set(asked)) == 2 * 3 * 4 + 3 * 3 + 3 + 3 * 2


def test_of_an_answer_that_thinks_the_reply_is_scored(tmp_path: Path) -> None:
    folder, out = write_data(tmp_path / "data"), tmp_path / "out"
    told = ("<think>Maybe #### 7</think>It is #### 0", "<think>#### 2</think>#### 3", "#### 4")
    answers = {f"What is {i} and {i}?\nAnswer:": text for i, text in enumerate(told)}
    report = run(Scripted(answers), folder, "gsm8k", out=out, thinking="on", max_thinking_tokens=9, **SHOTS)
    entry = report["tasks"]["gsm8k"]
    assert [row["scores"]["exact_match,strict-match"] for row in samples(out, "gsm8k")] == [1.0, 0.0, 1.0]
    assert [row["keeps_form"] for row in samples(out, "gsm8k")] == [True, True, False] and entry["obedience"]["mean"] == 0.6667
    assert "0.667 of the answers keep the form of thinking on" in benchmark_text(report)
    assert "thinking on, 9 tokens of it at most" in write_benchmark_page(out, report).read_text()
    log = tmp_path / "asked"
    run(Scripted(answers, log=log), folder, "gsm8k", out=out, thinking="off", **SHOTS)  # other requests
    assert len(log.read_text().splitlines()) == 3
    run(Scripted(answers, log=log), folder, "gsm8k", out=out, thinking="on", max_thinking_tokens=9, **SHOTS)
    assert len(log.read_text().splitlines()) == 3
    with pytest.raises(InputError, match="Give --max-thinking-tokens with --thinking on"):
        run(Scripted(), folder, "gsm8k", thinking="on")


def test_answers_of_another_model_are_not_mixed(tmp_path: Path) -> None:
    folder, out = write_data(tmp_path / "data"), tmp_path / "out"
    run(Scripted(), folder, "gsm8k", out=out, **SHOTS)
    args = BenchmarkArgs(tasks=("gsm8k",), data=folder, out=out, num_fewshot=1)
    with pytest.raises(InputError, match=r"answers of another model \(name\): choose another --out"):
        run_benchmarks(Scripted, {"name": "other"}, args, Progress(quiet=True))


def test_scores_subsets_and_groups(tmp_path: Path) -> None:
    """The longest continuation is the likeliest: " black" by no means, as the letters are equal: the first."""
    folder = write_data(tmp_path / "data")
    report = run(Scripted(), folder, "mmlu,arc_challenge,winogrande", **SHOTS)
    assert report["tasks"]["mmlu_rivers"]["metrics"]["acc"]["value"] == pytest.approx(1 / 3)
    assert report["groups"]["mmlu"]["metrics"]["acc"]["n"] == 6 and report["groups"]["mmlu"]["subsets"] == 2
    assert report["tasks"]["arc_challenge"]["metrics"]["acc"]["value"] == pytest.approx(1 / 3)  # " for it is", right in document 1
    assert len(report["tasks"]["mmlu_rivers"]["ties"]) == 3
    only = run(Scripted(), folder, "mmlu", subsets=("rivers",), limit=2, **SHOTS)
    assert list(only["tasks"]) == ["mmlu_rivers"] and only["tasks"]["mmlu_rivers"]["n"] == 2
    with pytest.raises(InputError, match="None of gsm8k has subsets"):
        run(Scripted(), folder, "gsm8k", subsets=("rivers",), **SHOTS)
    with pytest.raises(InputError, match="no subset 'lakes'"):
        run(Scripted(), folder, "mmlu", subsets=("lakes",), **SHOTS)


def test_generated_answers_with_both_extractions(tmp_path: Path) -> None:
    folder, out = write_data(tmp_path / "data"), tmp_path / "out"
    answers = {"0 and 0?\nA:": " The answer is 0.", "1 and 1?\nA:": " The answer is 2", "2 and 2?\nA:": ""}
    report = run(Scripted(answers), folder, "gsm8k_cot", out=out)
    entry = report["tasks"]["gsm8k_cot"]
    values = {name: one["value"] for name, one in entry["metrics"].items()}
    assert values == pytest.approx({"exact_match,strict-match": 1 / 3, "exact_match,flexible-extract": 2 / 3, "own": 2 / 3})
    assert entry["empty"] == 1 and entry["unparsed"] == {"exact_match,strict-match": 2, "exact_match,flexible-extract": 1, "own": 1}
    first, second, _ = samples(out, "gsm8k_cot")
    assert first["answer"] == " The answer is 0." and second["extracted"]["own"] == "2"
    later = run(Scripted(), folder, "gsm8k_cot", out=tmp_path / "later", against=out)
    assert later["tasks"]["gsm8k_cot"]["against"]["mean"] == pytest.approx(-1 / 3, abs=1e-4)
    with pytest.raises(InputError, match="holds no results.json"):
        run(Scripted(), folder, "gsm8k_cot", against=folder)


def test_ifeval_and_texts(tmp_path: Path) -> None:
    folder = write_data(tmp_path / "data")
    report = run(Scripted({"word.": "Yes", "words.": "Hello there"}), folder, "ifeval,text_perplexity")
    values = {name: one["value"] for name, one in report["tasks"]["ifeval"]["metrics"].items()}
    assert values["prompt_level_strict_acc"] == 0.5 and values["inst_level_strict_acc"] == pytest.approx(2 / 3)
    text = report["tasks"]["text_perplexity"]["metrics"]["word_perplexity"]
    assert text["n"] == 46 and text["value"] == pytest.approx(math.exp(45 / 46))  # the last word is empty, as the harness counts


@pytest.mark.parametrize("right", [True, False])
def test_programs_run_in_the_sandbox(right: bool, tmp_path: Path) -> None:
    folder = write_data(tmp_path / "data")
    answers = {row["prompt"]: row["canonical_solution"] if right else "    return 0\n" for row in HUMANEVAL}
    for row in MBPP:
        answers["\n".join(row["test_list"]) + "\n[BEGIN]\n"] = str(row["code"]) if right else "def add(x):\n    return 0"
    report = run(Scripted(answers), folder, "humaneval,mbpp")
    values = [one["value"] for entry in report["tasks"].values() for one in entry["metrics"].values()]
    assert values == [float(right)] * 4
    assert [list(entry["metrics"]) for entry in report["tasks"].values()] == [["pass@1,create_test", "own"], ["pass@1,extract_code", "own"]]


def test_contaminated_items_are_marked(tmp_path: Path) -> None:
    folder = write_data(tmp_path / "data")
    known = "the miller of the old stone mill by the river asks how many loaves he can bake from it"
    rows = [{"question": f"{known} on day {i}" if i == 1 else "How many?", "answer": f"#### {i}"} for i in range(3)]
    jsonl(folder / "gsm8k" / "test.jsonl", rows)
    trained = tmp_path / "trained.parquet"
    write_rows(trained, [Demonstration("a", "t", (), "human", meta={"text": f"He said: {known}, and more."})])
    entry = run(Scripted(), folder, "gsm8k_cot", contamination=trained, out=tmp_path / "out")["tasks"]["gsm8k_cot"]
    assert entry["contaminated"] == 1 and entry["clean_metrics"]["own"]["n"] == 2
    assert [row.get("contaminated", False) for row in samples(tmp_path / "out", "gsm8k_cot")] == [False, True, False]


# ---- in process ----


def test_an_engine_scores_choices_and_generates(tmp_path: Path, random_base: Path) -> None:
    folder, out = write_data(tmp_path / "data"), tmp_path / "out"
    engine = load_engine(random_base, EngineArgs(device="cpu"))
    report = run(EngineSource(engine), folder, "arc_challenge,text_perplexity", out=out, num_fewshot=0)
    encode = engine.tokenizer.encode
    for row in samples(out, "arc_challenge"):
        for continuation, logprob in zip(row["continuations"], row["logprobs"], strict=True):
            context, whole = encode(row["context"]), encode(row["context"] + continuation)
            assert logprob == pytest.approx(sum(engine.prompt_logprobs(whole, 1)[0][len(context) - 1 :]), abs=1e-3)
    (text,) = samples(out, "text_perplexity")
    windows = rolling_windows(encode(text["context"]), engine.tokenizer.context_id, 256)
    expected = sum(sum(engine.prompt_logprobs(ids, 1)[0][-num:]) for ids, num in windows if len(ids) <= 256)
    assert text["logprob"] == pytest.approx(expected, rel=0.2) and len(windows) == 1 + (len(encode(text["context"])) > 256)
    assert report["tasks"]["arc_challenge"]["n"] == 3


def test_what_does_not_fit_is_cut_from_the_left_and_told(tmp_path: Path, random_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tokenizer of bytes and a context of 256: shots of about 40 tokens each. Told before the model is asked, and with the score."""
    folder = write_data(tmp_path / "data")
    source = EngineSource(load_engine(random_base, EngineArgs(device="cpu")))
    entry = run(source, folder, "arc_challenge", num_fewshot=20)["tasks"]["arc_challenge"]
    assert entry["cut"]["documents"] == 3 and 4 <= entry["cut"]["shots"] <= 7
    assert any("were cut from the left" in note and "of 20 shots fit" in note for note in entry["notes"])
    warned = capsys.readouterr().err
    assert re.search(r"holds 257: [4-7] of 20 shots fit in it, and the others are cut off.* --num-fewshot asks for fewer\.\n$", warned)
    assert run(source, folder, "arc_challenge", num_fewshot=1)["tasks"] and capsys.readouterr().err == ""
    with pytest.raises(InputError, match="Answers may have 256 tokens and the model's context is 256"):
        run(source, folder, "gsm8k", num_fewshot=0)


def test_bad_settings_come_before_work(tmp_path: Path) -> None:
    def never() -> AnswerSource:
        raise AssertionError("no model is loaded for wrong data")

    with pytest.raises(InputError, match="does not exist"):
        run(never, tmp_path / "none", "mmlu")
    with pytest.raises(InputError, match="--limit must be at least 1"):
        run(never, tmp_path, "mmlu", limit=0)
    with pytest.raises(InputError, match="none does not exist: give the folder of a run"):
        run(never, write_data(tmp_path / "data"), "winogrande", contamination=tmp_path / "none", **SHOTS)
    told = CliRunner().invoke(app, ["eval", "model", "--data", str(tmp_path)])
    assert told.exit_code == 2 and "Give benchmarks by --tasks" in told.stderr


STONES: dict[str, Any] = {
    "task": "stones",
    "splits": {"test": {}},
    "columns": ["question", "options[]", "right"],
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "Q: {{question.strip()}}\nA:",
    "doc_to_choice": "options",
    "doc_to_target": "right",
    "metric_list": [{"metric": "acc"}],
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"doc_to_text": "{{questoin}}"}, "Document 1 of stones: doc_to_text: The template '{{questoin}}' fails .*'questoin' is undefined"),
        ({"doc_to_choice": "{{options[9]}}"}, "Document 1 of stones: doc_to_choice: "),
        ({"doc_to_target": "rihgt"}, "doc_to_target names the column 'rihgt', and the document has question, options, right"),
        ({"doc_to_target": "{{options|length}}"}, "None of the documents of stones .* names a right choice: mend doc_to_target"),
        ({"process_docs": {"x": "{{question + 1}}"}}, "Document 1 of stones: process_docs.x: "),
        ({"num_fewshot": 1, "fewshot_config": {"doc_to_target": "{{no}}"}}, "Document 1 of stones: doc_to_target of shots: "),
    ],
)
def test_a_template_that_fails_is_told_by_its_key_before_a_model_is_loaded(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    def never() -> AnswerSource:
        raise AssertionError("no model is loaded for a wrong task file")

    jsonl(tmp_path / "stones" / "test.jsonl", [{"question": f"Stone {i}?", "options": ["hard", "soft"], "right": i % 2} for i in range(4)])
    for name, values in (("right", STONES), ("wrong", STONES | change)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    assert run(Scripted(), tmp_path, str(tmp_path / "right.yaml"))["tasks"]["stones"]["n"] == 4
    with pytest.raises(InputError, match=said):
        run(never, tmp_path, str(tmp_path / "wrong.yaml"))


def test_right_choices_may_be_a_list_of_anything(tmp_path: Path) -> None:
    jsonl(tmp_path / "stones" / "test.jsonl", [{"question": "?", "options": ["a", "b"], "right": right} for right in ([1], ["x", 0], [])])
    (tmp_path / "stones.yaml").write_text(yaml.safe_dump(STONES))
    found = run(Scripted(), tmp_path, str(tmp_path / "stones.yaml"))["tasks"]["stones"]
    assert found["metrics"]["acc"]["value"] == pytest.approx(1 / 3), "the first of equal choices is taken"
    assert "1 documents name no right choice among theirs, and count as wrong" in found["notes"]


def test_the_list_of_tasks_says_what_files_they_want() -> None:
    listed = CliRunner().invoke(app, ["eval", "tasks", "--json"])
    assert listed.exit_code == 0, listed.output
    rows = {row["task"]: row for row in json.loads(listed.stdout)}
    assert rows["mmlu"]["n"] == 14042 and rows["mmlu"]["licence"] == "MIT"
    assert rows["mmlu"]["files"] == ["mmlu/test.parquet", "mmlu/dev.parquet"]
    assert "gsm8k_cot" in CliRunner().invoke(app, ["eval", "tasks"]).output


def test_the_command_takes_the_answers_of_one_model_alone(tmp_path: Path, tiny_base: Path, random_base: Path) -> None:
    command = ["--tasks", "winogrande", "--num-fewshot", "0", "--data", str(write_data(tmp_path / "data")), "--out", str(tmp_path / "out")]
    told = CliRunner().invoke(app, ["eval", str(tiny_base), *command, "--quiet", "--json"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["tasks"]["winogrande"]["metrics"] and (tmp_path / "out" / "report.html").is_file()
    other = CliRunner().invoke(app, ["eval", str(random_base), *command, "--quiet"])
    assert other.exit_code == 2 and "another model" in other.output


def test_two_evaluations_are_compared_document_by_document(tmp_path: Path) -> None:
    folder, tasks = write_data(tmp_path / "data"), "mmlu,gsm8k_cot,text_perplexity"
    one, other = tmp_path / "one", tmp_path / "other"
    run(Scripted({"0 and 0?\nA:": "The answer is 0."}), folder, tasks, out=one, **SHOTS)
    report = run(Scripted(), folder, tasks, out=other, subsets=("rivers",), **SHOTS)
    found = differences(one, other)
    assert {task: (d["n"], d["worse"]) for task, d in found.items()} == {
        "mmlu": (3, 0),
        "gsm8k_cot": (3, 1),
        "text_perplexity": (1, 0),
    }
    assert found["gsm8k_cot"]["mean"] == pytest.approx(-1 / 3, abs=1e-4) and found["text_perplexity"]["column"] == "loglikelihood/word"
    whole = headlines(report)
    assert whole["mmlu"]["n"] == 3 and whole["gsm8k_cot"]["column"] == "exact_match,strict-match" and whole["gsm8k_cot"]["mean"] == 0.0
