"""Task files: the shipped ones, a user's own, and what is wrong with one in one sentence."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from gristmill.core.errors import InputError
from gristmill.evaluate.documents import read_task
from gristmill.evaluate.harness import Prompter
from gristmill.evaluate.task import Task, TaskGroup, find_tasks, shipped
from tests.evaluate.benchmarks import jsonl

OWN: dict[str, Any] = {
    "task": "stones",
    "licence": "mine",
    "splits": {"test": {"count": 3}},
    "columns": ["q", "a"],
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "{{q}}",
    "doc_to_target": "{{a}}",
    "metric_list": [{"metric": "exact_match"}],
}

# benchmark: published documents, shots, headline
PUBLISHED = {
    "mmlu": (14042, 5, "acc"),
    "arc_challenge": (1172, 25, "acc_norm"),
    "hellaswag": (10042, 10, "acc_norm"),
    "winogrande": (1267, 5, "acc"),
    "truthfulqa_mc1": (817, 0, "acc"),
    "truthfulqa_mc2": (817, 0, "mc2"),
    "gsm8k": (1319, 5, "exact_match"),
    "gsm8k_cot": (1319, 8, "exact_match"),
    "bbh": (6511, 3, "exact_match"),
    "humaneval": (164, 0, "pass@1"),
    "mbpp": (500, 3, "pass@1"),
    "ifeval": (541, 0, "ifeval"),
}


def test_shipped_tasks_have_the_published_sizes() -> None:
    tasks = {name: one for name, one in shipped().items() if isinstance(one, Task)}
    told = {name: (one.num_documents, one.num_fewshot, one.metric_list[0].metric) for name, one in tasks.items()}
    assert PUBLISHED.items() <= told.items()
    assert all(one.licence and one.source and one.about for one in tasks.values())
    assert tasks["bbh"].subsets is not None and len(tasks["bbh"].subsets.names) == 27


def test_groups_are_spelt_out_once() -> None:
    assert isinstance(shipped()["truthfulqa"], TaskGroup)
    assert [one.task for one in find_tasks(["truthfulqa", "truthfulqa_mc1"])] == ["truthfulqa_mc1", "truthfulqa_mc2"]
    with pytest.raises(InputError, match="no task 'mmlx'.*mmlu"):
        find_tasks(["mmlx"])
    with pytest.raises(InputError, match="ask for --tasks mmlu --subsets anatomy"):
        find_tasks(["mmlu_anatomy"])
    with pytest.raises(InputError, match=r"The task file none\.yaml does not exist: check the path"):
        find_tasks(["none.yaml"])
    with pytest.raises(InputError, match="MT-Bench is run by another command: `gristmill judge mt-bench`"):
        find_tasks(["MT-Bench"])


def test_a_users_own_task_file(tmp_path: Path) -> None:
    path = tmp_path / "stones.yaml"
    path.write_text(yaml.safe_dump(OWN))
    assert find_tasks([str(path)])[0].evaluated_split == "test"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"doc_to_txt": "x"}, "unknown key 'doc_to_txt': did you mean 'doc_to_text'"),
        ({"fewshot_split": "dev"}, "fewshot_split is 'dev', and splits has test"),
        ({"test_split": None}, "give test_split or validation_split"),
        ({"metric_list": [{"metric": "acc"}]}, "metric acc is none of generate_until"),
        ({"doc_to_choice": ["a"]}, "doc_to_choice belongs to output_type multiple_choice"),
        ({"splits": {"test": {"counts": "x"}}}, "splits.test.counts"),
        ({"metric_list": []}, "metric_list"),
        ({"doc_to_text": "{{q"}, "template '{{q' cannot be used"),
        ({"own": {"extract": "number", "target": "{% macro x() %}{% endmacro %}"}}, "Macro has no place in a task"),
        (
            {"filter_list": [{"name": "a", "filter": [{"function": "regex", "regex_pattern": "("}]}]},
            "regular expression '(' cannot be used",
        ),
        ({"metric_list": [{"metric": "ifeval"}]}, "metric ifeval needs instruction_id_list among columns"),
    ],
)
def test_what_is_wrong_is_one_sentence(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "stones.yaml"
    path.write_text(yaml.safe_dump(OWN | change))
    with pytest.raises(InputError, match="task file.*stones.yaml") as error:
        find_tasks([str(path)])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_task_file_of_the_documentation(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    (tmp_path / "stones.yaml").write_text(next(part for part in text.split("```yaml\n") if part.startswith("task:")).split("```")[0])
    (task,) = find_tasks([str(tmp_path / "stones.yaml")])
    rows = [{"question": f" Stone {i}? ", "options": ["hard", "soft"], "right": i % 2} for i in range(5)]
    jsonl(tmp_path / "stones" / "test.jsonl", rows)
    jsonl(tmp_path / "stones" / "train.jsonl", rows)
    (data,) = read_task(task, tmp_path, num_fewshot=task.num_fewshot)
    item = Prompter(data, num_fewshot=3, seed=0).items()[1]
    assert item.pairs[0][0].endswith("Q: Stone 1?\nA:") and item.pairs[0][0].count("A: ") == 3 and item.gold == 1
