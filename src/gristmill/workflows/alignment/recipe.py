"""The recipe of an alignment run."""

from typing import Annotated, Any, ClassVar, Literal, Self, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from gristmill.core.config import RECIPES, FilePath, Line, NameOrPath, Recipe, RunName, Section, read, resolved
from gristmill.data.human import HumanData
from gristmill.evaluate.safety import SETS
from gristmill.evaluate.task import FEWSHOT_SEED
from gristmill.generation.settings import Calls, GeneratorSettings
from gristmill.judge.settings import Control, Judging, Reward
from gristmill.synth.pipelines.by_task import ByTask
from gristmill.synth.pipelines.topics import Topics
from gristmill.synth.registry import Pipelines
from gristmill.train.settings import MIN_STEPS, PreferenceTraining, Training
from gristmill.workflows.dataset.recipe import Answers

World = Literal["miniature"]
CONTROLS: tuple[Control, ...] = get_args(Control)
BASE_ROW = "base"  # the model as given, in results; without demonstrations it is the first Instruct
OF_WORLD = ("templates", "topics", "pipelines")  # sections that a world's own recipe has in another way than the defaults


def _model_path(name: str, info: ValidationInfo) -> str:
    return name if name == "miniature" else resolved(name, info)


def _set_path(name: str, info: ValidationInfo) -> str:
    return name if name in SETS else resolved(name, info)


def _guard_path(spec: str, info: ValidationInfo) -> str:
    return spec if "://" in spec else resolved(spec, info)


def _several(value: Any) -> Any:
    """One name is a list of one."""
    return [value] if isinstance(value, str) else value


def _studio(value: Any) -> Any:
    """The word alone is a section of defaults."""
    return {"source": value} if isinstance(value, str) else value


def _rows(value: Any) -> Any:
    """A number alone is that of the sample."""
    return {"sample": value} if isinstance(value, int) and not isinstance(value, bool) else value


BaseModelPath = Annotated[str, AfterValidator(_model_path)]
Tasks = Annotated[tuple[NameOrPath, ...], BeforeValidator(_several)]
Rows = Annotated[tuple[Annotated[str, AfterValidator(_set_path)], ...], BeforeValidator(_several)]
Guards = Annotated[tuple[Annotated[str, AfterValidator(_guard_path)], ...], BeforeValidator(_several)]
When = Literal["each_stage", "each_round", "end"]


class EngineSettings(Section):
    """How the run's models generate."""

    max_batch: int = Field(256, gt=0, description="most responses in flight")
    precision: Literal["auto", "fp32", "bf16", "int8"] = Field(
        "auto", description="of generation; auto: bf16 where the device is made for it; int8: matrix products in int8, all else in bf16"
    )


class AlignmentJudging(Judging):
    """Who judges answers, and what is kept, a round."""

    reward: Reward | None = Field(Reward(weights="goodness"), description="default: the reward model that the run trains on data.ratings")
    keep: str = Field("correctness >= 2.5", description="condition on attributes and score of an answer that no verifier can check")
    keep_chosen: str = Field("correctness >= 2", description="condition on the chosen answer of a pair that the reward model decides")
    max_per_prompt: int = Field(2, gt=0, description="answers kept a prompt")
    max_per_task: int = Field(400, gt=0, description="answers kept a task and round for general SFT")
    max_code_per_task: int = Field(400, gt=0, description="answers kept a task and round for code SFT")
    max_prompts_per_task: int = Field(150, ge=0, description="prompts of kept answers a task and round that general SFT learns to write")
    code_share: float = Field(0.02, ge=0, le=1, description="share of code-SFT answers repeated in general SFT")
    max_pairs_per_prompt: int = Field(2, gt=0)
    min_gap: float = Field(1.5, ge=0, description="smallest reward gap of a pair that the reward model decides")
    near_duplicates: float = Field(1.0, gt=0, le=1, description="Jaccard similarity from which two answers make no pair; 1: off")


class Collapse(Section):
    """Alarm levels of the monitors, relative to the human text; `stop` ends the run after this many alarms at once."""

    tokens: int = Field(4000, gt=0, description="token budget every text set is cut to")
    stop: int = Field(4, gt=0)


class Probe(Section):
    """A few calls, before a round buys its prompts, that show whether the model writes usable ones for `pipelines.by_task`."""

    num_prompts: int = Field(8, ge=0, description="prompts asked for first; 0: no probe")
    min_usable: float = Field(0.25, ge=0, le=1, description="share of them that must be usable")
    fallback: Pipelines = Field(Pipelines(), description="pipelines that write instead where it is less; none: nobody writes")


class Evaluate(Section):
    """Benchmarks that the run's models are asked, the model as given before all others (docs/evaluation.md)."""

    tasks: Tasks = Field(min_length=1, description="names, or task files (.yaml)")
    data: FilePath = Field(description="folder with a folder for each task")
    when: When = Field("each_stage", description="after each stage that makes a model, each round, or at the end (the last and the best)")
    limit: int | None = Field(None, gt=0, description="the first so many documents of each task (of each subset) alone")
    num_fewshot: int | None = Field(None, ge=0, description="shots; default each task's own")
    seed: int = Field(FEWSHOT_SEED, description="of what draws shots")
    chat: bool = Field(False, description="generated answers are asked for as a message, in the run's chat format")
    subsets: tuple[str, ...] = Field((), description="of tasks that have some, the only ones")


class Safety(Section):
    """Prompts that the run's models are asked again, to see what they refuse, and canaries (docs/safety.md)."""

    rows: Rows = Field((), description="files (such as regressions.jsonl of `gristmill safety`), or names of published sets in data")
    data: FilePath | None = Field(None, description="folder of published sets; without rows all that it holds are asked")
    canaries: FilePath | None = Field(None, description="file of `gristmill safety canaries`: is a secret repeated?")
    when: When = Field("each_stage", description="as in evaluate")
    limit: int | None = Field(None, gt=0, description="most prompts of each set and label, of all types alike")
    attacks: tuple[str, ...] = Field((), description="chains that unsafe prompts are asked under besides")
    guard: Guards = Field((), description="folders, or FORM=URL; of several the first that can be read decides")
    guard_model: Line = Field("", description="name that the guards' endpoints know them by")
    guard_key_env: str = Field("", description="environment variable with the guards' key")
    guard_logprobs: bool = False
    taxonomy: FilePath | None = Field(None, description="categories for judges; default AEGIS's")
    caution: Literal["defensive", "permissive"] = "defensive"
    system: str = Field("", description="system message before every prompt that has none")
    max_tokens: int | None = Field(None, gt=0, description="longest answer; default answers.max_tokens")

    @model_validator(mode="after")
    def _asks(self) -> Self:
        if not self.rows and self.data is None and self.canaries is None:
            raise ValueError("name rows, data or canaries: there is nothing to ask")
        of_guards = {name: getattr(self, name) for name in ("guard_model", "guard_key_env", "guard_logprobs", "taxonomy")}
        if not self.guard and (given := [name for name, value in of_guards.items() if value]):
            raise ValueError(f"{given[0]} is of guards: name one in guard, or take it out")
        return self


class People(Section):
    """What people said in the run's studio, taken as human data at the beginning of every round (docs/studio.md#in-the-loop)."""

    source: Literal["studio"] = "studio"
    database: str = Field("", description="as `gristmill studio --database`, seen from the recipe; default the run's folder `studio`")

    @field_validator("database")
    @classmethod
    def _place(cls, value: str, info: ValidationInfo) -> str:
        if not value.startswith(("postgresql://", "postgres://")):
            return resolved(value, info) if value else ""
        if urlsplit(value).password:
            raise ValueError("a recipe is shown in reports: leave the password out of the URL, and give it in the variable PGPASSWORD")
        return value


class Check(Section):
    """A check of a round's rows by people before they are trained on (docs/studio.md#round-check)."""

    sample: int = Field(40, gt=0, description="rows that people are shown, the tasks in equal parts")
    hours: float = Field(24, gt=0, description="how long the run waits for a decision")
    default: Literal["approve", "stop"] = Field("approve", description="what happens after that")


class Alarms(Section):
    """What a run calls out, and ends with exit code 4 for."""

    min_steps: int = Field(MIN_STEPS, ge=0, description="a training stage of fewer steps alarms, unless its `steps` are given")


class AlignmentRecipe(Recipe):
    """A whole alignment run."""

    may_change: ClassVar[frozenset[str]] = frozenset(
        {"rounds", "threads", "device", "calls", "alarms", "evaluate", "safety", "people", "check"}
    )
    added: ClassVar[frozenset[str]] = frozenset({"evaluate", "safety", "people", "check"})

    kind: Literal["alignment"] = "alignment"
    name: RunName = "miniature"
    world: World | None = Field(None, description="a built-in world that supplies data, or none: your own files")
    model: BaseModelPath = Field("miniature", description="Hugging Face folder of the Base model; `miniature` is the shipped one")
    chat_format: Literal["auto", "plain", "nemotron", "chatml", "llama3"] = "auto"
    seed: int = 0
    rounds: int = Field(2, gt=0)
    rpo_iterations: int = Field(3, ge=0)
    control: Control | None = None
    threads: int | None = Field(None, gt=0, description="CPU threads; default all cores")
    device: str = Field("auto", description="where models compute: auto (a GPU where there is one), cpu, cuda, cuda:1, ...")
    data: HumanData = HumanData()
    generators: tuple[GeneratorSettings, ...] = Field((), description="who writes prompts and answers; none: the latest model of the run")
    calls: Calls = Calls()
    templates: NameOrPath = Field("default", description="a shipped pack of prompt templates, or a file of them")
    topics: Topics = Field(Topics(macro=0, subtopics=0), description="for the pipelines that need topics")
    pipelines: Pipelines = Field(Pipelines(by_task=ByTask()), description="which pipelines write prompts, and how many")
    probe: Probe = Probe()
    answers: Answers = Answers(max_tokens=80)
    engine: EngineSettings = EngineSettings()
    judging: AlignmentJudging = AlignmentJudging()
    collapse: Collapse = Collapse()
    alarms: Alarms = Alarms()
    evaluate: Evaluate | None = Field(None, description="benchmarks in the loop, as {tasks: [gsm8k], data: FOLDER, when: each_round}")
    safety: Safety | None = Field(None, description="safety rows in the loop, as {rows: regressions.jsonl, when: each_stage}")
    people: Annotated[People | None, BeforeValidator(_studio)] = Field(
        None, description="`studio`: what people say in the run's studio is human data of the next round"
    )
    check: Annotated[Check | None, BeforeValidator(_rows)] = Field(
        None, description="rows of each round that people approve before they are trained on, as 40 or {sample: 40, hours: 24}"
    )
    demonstration_sft: Training = Training()
    reward: Training = Training()
    code_sft: Training = Training()
    general_sft: Training = Training()
    dpo: PreferenceTraining = PreferenceTraining()
    rpo: PreferenceTraining = PreferenceTraining(loss="rpo")

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        """A section that is given in part keeps the rest of its own defaults, e.g. `rpo: {lr: 1e-5}` stays RPO."""
        if not isinstance(values, dict):
            return values
        merged = dict(values)
        if values.get("world") in get_args(World):  # a world has its own way to write prompts
            shipped = read(RECIPES / f"{values['world']}.yaml")
            merged = {**{name: shipped[name] for name in OF_WORLD}, **merged}
        for name, given in merged.items():
            default = cls.model_fields[name].default if name in cls.model_fields else None
            if isinstance(default, Training | Answers) and isinstance(given, dict):
                merged[name] = {**default.model_dump(exclude_unset=True), **given}
        return merged

    @model_validator(mode="after")
    def _sources(self) -> Self:
        if self.world is None and self.data.evaluation is None:
            raise ValueError("without a world, data.evaluation must name a file, and data.demonstrations unless the model is an Instruct")
        if self.world is None and self.data.demonstrations is None and self.control == "human-only":
            raise ValueError("control human-only needs data.demonstrations: name a file")
        files = {name: getattr(self.data, name) for name in ("demonstrations", "ratings", "prompts", "evaluation", "validation")}
        if self.world is not None and (given := [f"data.{name}" for name, path in files.items() if path is not None]):
            raise ValueError(f"{given[0]} would not be read, since the world {self.world} writes its own rows: take one of the two out")
        for number, name in (("num_rated_prompts", "ratings"), ("num_prompts", "prompts")):
            if self.world is None and files[name] is None and getattr(self.data, number) is not None:
                raise ValueError(f"data.{number} counts rows of data.{name}, which is not given: name the file, or take the number out")
        if self.world is None and self.data.ratings is None and self.data.num_held_out_ratings != HumanData().num_held_out_ratings:
            raise ValueError("data.num_held_out_ratings counts rows of data.ratings, which is not given: name the file, or take it out")
        if self.probe.fallback.named() and not self.probe.num_prompts:
            raise ValueError("probe.fallback would write nothing, as probe.num_prompts is 0: take one of the two out")
        self.judging.check_votes(self.answers.samples)
        return self

    def model_stages(self) -> list[str]:
        """The stages that train a language model, in their order."""
        each = ["code-sft", "general-sft", "dpo", *(f"rpo{i}" for i in range(1, self.rpo_iterations + 1))]
        first = BASE_ROW if self.world is None and self.data.demonstrations is None else "demonstrations"
        return [first, *(f"r{number}-{name}" for number in range(1, self.rounds + 1) for name in each)]

    def changed(self, old: dict[str, Any]) -> list[str]:
        """As `Recipe.changed`; rounds may grow, not shrink, and of the generators only what decides who answers what counts."""
        asked = [GeneratorSettings.model_validate(g).identity for g in old.get("generators", ())]
        same = asked == [g.identity for g in self.generators]
        return [key for key in super().changed(old) if key != "generators" or not same] + self.forbidden(old)

    def forbidden(self, old: dict[str, Any]) -> list[str]:
        """Fewer rounds: what they have made would be of no run."""
        return ["rounds, which may grow, not shrink"] if self.rounds < old.get("rounds", 0) else []
