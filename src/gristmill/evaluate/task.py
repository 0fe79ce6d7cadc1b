"""Benchmark tasks as data: the schema of a task file, in the terms of lm-eval 0.4.13, and the shipped tasks.

A task file says where its documents come from, how a document becomes prompt pieces (Jinja), how pieces become a prompt, what is asked of
the model, and how its answer becomes a score. `own` names our extraction, which is reported beside the harness's.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from gristmill.core.config import SUFFIXES, Line, Section, check, read
from gristmill.core.errors import InputError
from gristmill.core.untrusted import quoted_path
from gristmill.evaluate.prompt_pieces import compile_piece

TASKS = Path(__file__).parent / "tasks"  # the shipped ones
MAX_GEN_TOKS = 256  # the harness's, unless the task says otherwise
FEWSHOT_SEED = 1234  # the harness's

ELSEWHERE = {  # benchmarks that other commands run
    "mt_bench": "judge mt-bench",
    "arena_hard": "judge arena-hard",
    "alpaca_eval": "judge alpaca-eval",
    "llmbar": "judge agreement",
    "pandalm": "judge agreement",
    "reward_bench": "judge rewards",
    "rewardbench": "judge rewards",
    **dict.fromkeys(("xstest", "advbench", "harmbench", "do_not_answer"), "safety"),
}

OutputType = Literal["multiple_choice", "generate_until", "loglikelihood_rolling"]
MetricName = Literal["acc", "acc_norm", "acc_bytes", "mc2", "exact_match", "pass@1", "ifeval", "word_perplexity", "byte_perplexity"]
METRICS: dict[OutputType, frozenset[str]] = {
    "multiple_choice": frozenset({"acc", "acc_norm", "acc_bytes", "mc2"}),
    "generate_until": frozenset({"exact_match", "pass@1", "ifeval"}),
    "loglikelihood_rolling": frozenset({"word_perplexity", "byte_perplexity"}),
}


class Split(Section):
    """A split of the data: its size in the published revision, and where else than in the usual files it may be."""

    count: int = Field(0, ge=0, description="documents in the published revision; 0: unknown")
    counts: tuple[int, ...] = Field((), description="documents in other published revisions")
    files: tuple[str, ...] = Field((), description="further file patterns in the task's folder, tried first; {subset} is a subset's name")
    column: str = Field("", description="where one file holds all splits: the column that tells them apart")
    first: int = Field(0, description="smallest value of that column in this split")
    last: int = Field(0, description="largest")


class Layout(Section):
    """Another form of the data files: documents that have its columns are rewritten by its templates."""

    columns: tuple[str, ...] = Field(min_length=1, description="columns by which this form is known")
    doc: dict[str, str] = Field(description="columns to make of them, as templates; the whole row is `row`")
    note: str = Field("", description="what a score on this form is not, told with the score")


class Subsets(Section):
    """Parts of a benchmark that are tasks of their own: with shots, seeds and scores of their own."""

    column: str = Field("", description="column that names a document's subset")
    names: tuple[str, ...] = Field((), description="subsets that are files of their own, by name")
    count: int = Field(0, ge=0, description="number of subsets in the published revision")


class FilterStep(Section):
    """A step from an answer to what is scored."""

    function: Literal["regex", "take_first", "prompt_and_answer", "code_block"]
    regex_pattern: str = Field("", description="regex: whose matches are found")
    group_select: int = Field(0, description="regex: which match, -1 the last")
    fallback: str = Field("[invalid]", description="regex: what stands for no match")


class AnswerFilter(Section):
    """A named chain of steps; every chain gives a score of its own."""

    name: str
    filter: tuple[FilterStep, ...] = Field(min_length=1)


class MetricSpec(Section):
    """A metric, and for exact_match what is ignored."""

    metric: MetricName
    regexes_to_ignore: tuple[str, ...] = ()
    ignore_case: bool = False
    ignore_punctuation: bool = False


class GenerationKwargs(Section):
    """How answers are generated; always greedily."""

    until: tuple[str, ...] = Field((), description="texts that end an answer and are no part of it")
    max_gen_toks: int = Field(MAX_GEN_TOKS, gt=0, description="longest answer, in tokens")


class FewshotConfig(Section):
    """Where shots come from and how they are chosen."""

    sampler: Literal["default", "first_n"] = Field("default", description="default: drawn anew for each document, in their order")
    samples: tuple[dict[str, Any], ...] = Field((), description="shots that the file itself holds")
    prompt_file: str = Field("", description="file in the task's folder with a description and shots (BBH's cot-prompts)")
    values: tuple[int, ...] = Field((), description="with `column`: the only documents of the pool that are shots")
    column: str = ""
    doc_to_text: str | None = Field(None, description="of shots, where it is another")
    doc_to_target: str | int | None = Field(None, description="of shots, where it is another")


class Own(Section):
    """Our extraction, a second column beside the harness's."""

    extract: Literal["number", "answer", "code", "ifeval"] = Field(description="number, answer: of the final answer; code: a program")
    target: str = Field("", description="template of what is right; default doc_to_target")
    differs: str = Field("", description="how it deliberately differs from the harness's")


class Task(Section):
    """A benchmark."""

    task: str = Field(pattern=r"^[\w][\w.-]*$", description="name")
    about: Line = Field("", description="one line")
    licence: Line = Field("", description="of the data")
    source: Line = Field("", description="where the data are published")
    folders: tuple[str, ...] = Field((), description="other names of its folder in the data folder")
    configs: tuple[str, ...] = Field((), description="folders of the Hub's configurations in it")
    splits: dict[str, Split] = Field(min_length=1)
    columns: tuple[str, ...] = Field(min_length=1, description="that every document needs; NAME[] is a list, NAME{} an object")
    layouts: tuple[Layout, ...] = ()
    subsets: Subsets | None = None
    output_type: OutputType
    test_split: str | None = None
    validation_split: str | None = None
    training_split: str | None = None
    fewshot_split: str | None = None
    num_fewshot: int = Field(0, ge=0)
    fewshot_config: FewshotConfig = FewshotConfig()
    process_docs: dict[str, str] = Field({}, description="columns made of a document before all else, as templates")
    description: str = ""
    doc_to_text: str = ""
    doc_to_choice: str | tuple[str, ...] | None = None
    doc_to_target: str | int = ""
    target_delimiter: str = " "
    fewshot_delimiter: str = "\n\n"
    generation_kwargs: GenerationKwargs = GenerationKwargs()
    filter_list: tuple[AnswerFilter, ...] = ()
    metric_list: tuple[MetricSpec, ...] = Field(min_length=1, description="the first is the headline")
    own: Own | None = None
    notes: tuple[Line, ...] = Field((), description="what a reader of a score should know")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name in ("test_split", "validation_split", "training_split", "fewshot_split"):
            split = getattr(self, name)
            if split is not None and split not in self.splits:
                raise ValueError(f"{name} is {split!r}, and splits has {', '.join(self.splits)}")
        if self.test_split is None and self.validation_split is None:
            raise ValueError("give test_split or validation_split: one is evaluated")
        if wrong := [m.metric for m in self.metric_list if m.metric not in METRICS[self.output_type]]:
            known = ", ".join(sorted(METRICS[self.output_type]))
            raise ValueError(f"metric {wrong[0]} is none of {self.output_type}, whose metrics are {known}")
        if (self.output_type == "multiple_choice") != (self.doc_to_choice is not None):
            raise ValueError("doc_to_choice belongs to output_type multiple_choice, which needs it")
        names = {spec.metric for spec in self.metric_list}
        if "ifeval" in names and (lacks := {"prompt", "instruction_id_list", "kwargs"} - set(self.column_types)):
            raise ValueError(f"metric ifeval needs {min(lacks)} among columns")
        patterns = [step.regex_pattern for chain in self.filter_list for step in chain.filter]
        for pattern in (*patterns, *(pattern for spec in self.metric_list for pattern in spec.regexes_to_ignore)):
            try:
                re.compile(pattern)
            except re.error as e:
                raise ValueError(f"the regular expression {pattern!r} cannot be used ({e})") from e
        for template in self._templates():
            compile_piece(template)
        if self.own is not None and self.output_type != "generate_until":
            raise ValueError("own is for generated answers: leave it out")
        return self

    @property
    def column_types(self) -> dict[str, type]:
        """The columns that every document needs, with the type of their values; object: any."""
        kinds = {"[]": list, "{}": dict}
        return {name.removesuffix(name[-2:]) if name[-2:] in kinds else name: kinds.get(name[-2:], object) for name in self.columns}

    def _templates(self) -> Iterator[str]:
        """All templates, so that what cannot be used is found before work is spent."""
        config, choices = self.fewshot_config, self.doc_to_choice
        fields = (self.description, self.doc_to_text, self.doc_to_target, config.doc_to_text, config.doc_to_target)
        made = [template for layout in self.layouts for template in layout.doc.values()]
        more = [*self.process_docs.values(), *made, *([choices] if isinstance(choices, str) else choices or ())]
        yield from (one for one in (*fields, *more, self.own.target if self.own else "") if isinstance(one, str))

    @property
    def evaluated_split(self) -> str:
        """The split that is evaluated."""
        return self.test_split or self.validation_split or ""

    @property
    def num_documents(self) -> int:
        """Documents of the evaluated split in the published revision; 0: unknown."""
        return self.splits[self.evaluated_split].count


class TaskGroup(Section):
    """A name for several tasks that are asked for together."""

    group: str
    about: str = ""
    tasks: tuple[str, ...] = Field(min_length=1)


def shipped() -> dict[str, Task | TaskGroup]:
    """The shipped tasks and groups by name."""
    found = [_load(path) for path in sorted(TASKS.glob("*.yaml"))]
    return {one.task if isinstance(one, Task) else one.group: one for one in found}


def find_tasks(names: Sequence[str]) -> list[Task]:
    """Tasks by name, groups spelt out; a name that ends in .yaml is a task file.

    Raises:
        InputError: there is no such task, or a file is wrong.
    """
    known = shipped()
    found: dict[str, Task] = {}
    for name in names:
        one = _load(Path(name)) if name.endswith(SUFFIXES) else known.get(name)
        if one is None:
            if command := ELSEWHERE.get(name.lower().replace("-", "_")):
                raise InputError(f"{name} is run by another command: `gristmill {command}`.")
            whole = [task for task in known.values() if isinstance(task, Task) and task.subsets and name.startswith(f"{task.task}_")]
            hint = f"ask for --tasks {whole[0].task} --subsets {name.removeprefix(whole[0].task + '_')}" if whole else ""
            raise InputError(f"There is no task {name!r}: {hint or 'give a task file (.yaml), or one of ' + ', '.join(known)}.")
        for task in [one] if isinstance(one, Task) else find_tasks(one.tasks):
            if found.setdefault(task.task, task) != task:
                raise InputError(f"Two different tasks are called {task.task!r}: rename one.")
    if not found:
        raise InputError("No task is named: give --tasks a name, or several parted by commas.")
    return list(found.values())


def _load(path: Path) -> Task | TaskGroup:
    if not path.exists():
        raise InputError(f"The task file {quoted_path(path)} does not exist: check the path, or name a shipped task.")
    values = read(path)
    if "group" in values:
        return check(TaskGroup, values, f"The task file {path}")
    return check(Task, values, f"The task file {path}")
