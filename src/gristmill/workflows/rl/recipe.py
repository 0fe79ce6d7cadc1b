"""The recipe of `gristmill rl`: which prompts, how answers are rewarded, and the policy gradient's switches."""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from gristmill.core.config import FilePath, Line, Recipe, RunName, Section
from gristmill.core.errors import InputError
from gristmill.generation.settings import Calls, GeneratorSettings
from gristmill.judge.settings import Reward
from gristmill.train.by_size import LORA_LR_FACTOR
from gristmill.train.objectives.policy_gradient import METHODS, Advantage, Kl, Normalize, PolicyGradientObjective
from gristmill.train.settings import Lora
from gristmill.workflows.alignment.recipe import BaseModelPath, EngineSettings

Method = Literal["grpo", "dapo", "dr_grpo", "gspo", "rloo", "cispo"]
LRS = ((20e6, 3e-4), (500e6, 4e-5), (3e9, 3e-6), (float("inf"), 1e-6))  # largest number of parameters -> learning rate
NORMALIZE: dict[str, Normalize] = {name: found["normalize"] for name, found in METHODS.items()}
PARTS = ("total", "right", "form", "overlong", "reward_model", "judge", "environment")  # of the reward, beside functions
ADVANTAGE: dict[str, Advantage] = {name: found["advantage"] for name, found in METHODS.items()}


class RlData(Section):
    """Prompts with known answers, and those that the model is evaluated on before and after. A world supplies its own."""

    prompts: FilePath | None = Field(None, description="JSONL or Parquet with `prompt` or `messages`, and `answer`, `truth` or tests")
    evaluation: FilePath | None = Field(None, description="the same, asked for nothing but the evaluation")
    num_prompts: int | None = Field(None, gt=0, description="default all")
    num_evaluation: int | None = Field(None, gt=0, description="a task; default all")
    tasks: tuple[str, ...] = Field((), description="only prompts of these tasks; none: all that a program can check")


class RewardFunction(Section):
    """A function of yours in TRL's form, `f(prompts, completions, completion_ids, **columns)` -> numbers, run in a process of its own."""

    file: FilePath = Field(description="Python file")
    name: Line = Field("reward", description="of the function")
    weight: float = 1.0
    messages: bool = Field(False, description="prompts and completions are lists of messages, not texts")
    timeout: float = Field(60.0, gt=0, description="seconds for the answers of a step")


class RewardModel(Reward):
    """The five-attribute reward model: the part is the weighted sum of its attributes."""

    weight: float = Field(1.0, description="of the part; `weights` are those of the attributes")

    @model_validator(mode="after")
    def _has_a_place(self) -> Self:
        if bool(self.base_url) == (self.folder is not None):
            raise ValueError("give the reward model's folder, or base_url and model of an endpoint")
        return self


class Judge(GeneratorSettings):
    """An LLM judge, which grades each answer from 1 to 10, beside the known answer where there is one: the part is 0 to 1."""

    weight: float = Field(1.0, description="of the part")
    max_tokens: int = Field(512, gt=0, description="longest grade, with its reasons")

    @model_validator(mode="after")
    def _of_no_run(self) -> Self:
        if self.checkpoint or self.rounds:
            raise ValueError("a judge is an endpoint or a folder: leave checkpoint and rounds out")
        return self


class Rewards(Section):
    """What an answer earns: the weighted sum of its parts if it keeps to the form, less what it is punished for."""

    added: ClassVar[frozenset[str]] = frozenset({"reward_model", "judge", "supervision", "form_penalty"})

    verifier: float = Field(1.0, ge=0, description="weight of the verdict of programs, on prompts with a truth; 0: it is measured alone")
    reward_model: RewardModel | None = Field(None, description="a reward model's score as a part")
    judge: Judge | None = Field(None, description="an LLM judge's grade as a part")
    functions: tuple[RewardFunction, ...] = ()
    form: Literal["any", "thinking"] = Field(
        "any", description="thinking: a block in front where the system line is `detailed thinking on`, and none elsewhere"
    )
    form_penalty: float = Field(0.0, ge=0, description="what a wrong form costs: with 0 it is no worse than a wrong answer")
    supervision: Literal["outcome", "process"] = Field(
        "outcome", description="process: steps are rewarded one by one where a truth has `steps` and thinking is on"
    )
    cut_off: Literal["wrong", "masked"] = Field("wrong", description="answers that did not end: they earn nothing, or are left out")
    overlong_buffer: int = Field(0, ge=0, description="last tokens before max_tokens, over which the punishment grows to 1; 0: none")

    @model_validator(mode="after")
    def _named_apart(self) -> Self:
        names = [*PARTS, *(function.name for function in self.functions)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"functions: another part has the name {twice[0]}; give each function its own")
        if self.supervision == "process" and self.form != "thinking":
            raise ValueError("supervision: process rewards the steps of thinking, and goes with form: thinking")
        return self

    @property
    def judges_all(self) -> bool:
        """Whether prompts without a truth earn something."""
        return bool(self.functions or self.reward_model or self.judge)


class Environment(Section):
    """Prompts and their reward from another program, in one turn: a verifiers (v0) module, or NeMo-Gym's rows and server."""

    verifiers: FilePath | None = Field(None, description="Python file with `load_environment`, which runs in a process of its own")
    args: dict[str, Any] = Field({}, description="of `load_environment`")
    nemo_gym: FilePath | None = Field(None, description="JSONL of rows with `responses_create_params`")
    url: str = Field("", description="of the resources server, whose /verify rewards answers to these rows")
    weight: float = Field(1.0, description="of the part")
    passing: float = Field(1.0, description="reward from which an answer is right in the evaluation, where data has no evaluation")
    timeout: float = Field(60.0, gt=0, description="seconds for the answers of a step, or for one call of a server")

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.verifiers is None) == (self.nemo_gym is None):
            raise ValueError("give either verifiers or nemo_gym")
        if (self.nemo_gym is not None) != self.url.startswith(("http://", "https://")):
            raise ValueError("nemo_gym and the url of its resources server go together")
        return self


class Curriculum(Section):
    """Which prompts, and in which order, by the rate at which the starting model passes them."""

    order: Literal["jitter", "paper", "random"] = Field("jitter", description="easy to hard, smoothly or as in the paper; or none")
    samples: int = Field(8, gt=0, description="answers a prompt that its pass rate is estimated by")
    min_pass_rate: float = Field(0.0, ge=0, le=1)
    max_pass_rate: float = Field(0.75, gt=0, le=1.1, description="prompts of this rate or more are left out; 1.1: none")
    sigma: float = Field(0.05, ge=0, description="width, in pass rates")


class RlTraining(Section):
    """The optimizer of policy-gradient steps."""

    added: ClassVar[frozenset[str]] = frozenset({"lora"})

    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float | None = Field(None, gt=0, description="default by the model's size")
    muon_lr: float = Field(0.02, gt=0)
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = Field(5, ge=0)
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, ge=0, description="largest gradient norm; 0: any")
    micro_batch_tokens: int | None = Field(None, gt=0, description="tokens at once; null: as many as pay, within the free memory")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="of computing; auto: bf16 where the device is made for it")
    lora: Lora | None = Field(None, description="train an adapter; none: all weights")

    @model_validator(mode="after")
    def _sampled_from(self) -> Self:
        if self.optimizer != "muon" and self.muon_lr != type(self).model_fields["muon_lr"].default:
            raise ValueError("muon_lr is of optimizer: muon, and would not be read")
        if self.lora is None:
            return self
        if self.optimizer != "adamw":
            raise ValueError("lora trains with optimizer: adamw, since muon is made for whole matrices")
        if self.lora.dora or self.lora.base not in ("fp32", "bf16"):
            raise ValueError("lora: the engine samples beside a base in fp32 or bf16, and without dora")
        return self


class RlRecipe(Recipe):
    """A whole run of reinforcement learning."""

    may_change: ClassVar[frozenset[str]] = frozenset({"threads", "device", "calls"})
    added: ClassVar[frozenset[str]] = frozenset({"calls", "environment", "max_thinking_tokens"})

    kind: Literal["rl"] = "rl"
    name: RunName = "rl"
    model: BaseModelPath = Field("miniature", description="folder of the model to start from")
    chat_format: Literal["auto", "plain", "nemotron", "chatml", "llama3"] = "auto"
    seed: int = 0
    threads: int | None = Field(None, gt=0, description="CPU threads; default all cores")
    device: str = Field("auto", description="auto (a GPU where there is one), cpu, cuda, cuda:N or mps")
    world: Literal["miniature"] | None = Field(None, description="a built-in world that supplies prompts and their truths")
    data: RlData = RlData()
    environment: Environment | None = Field(None, description="another program's tasks in place of data.prompts")
    method: Method = "grpo"
    advantage: Advantage | None = Field(None, description="std, mean or leave_one_out; default the method's")
    normalize: Normalize | None = Field(None, description="token, sequence or constant; default the method's")
    clip_low: float | None = Field(None, ge=0, le=1, description="default the method's")
    clip_high: float | None = Field(None, ge=0, description="default the method's")
    beta: float = Field(0.0, ge=0, description="weight of the KL divergence from the model that the run starts from")
    kl: Kl = "k3"
    max_importance: float | None = Field(None, gt=0, description="largest weight for what sampler and trainer differ in; null: all weigh 1")
    steps: int = Field(100, gt=0, description="rollout steps")
    prompts: int = Field(32, gt=0, description="prompts a step")
    samples: int = Field(8, gt=1, description="answers a prompt")
    max_tokens: int = Field(256, gt=0, description="longest answer")
    max_thinking_tokens: int | None = Field(None, ge=0, description="of an answer, then its thinking is closed by force; null: any")
    updates: int = Field(1, gt=0, description="optimizer updates a rollout step, each on a share of its groups")
    max_draws: int = Field(1, gt=0, description="dynamic sampling: draws a step, until `prompts` groups have a spread; 1: off")
    max_idle_steps: int = Field(10, gt=0, description="steps in a row without any spread after which the run stops")
    curriculum: Curriculum | None = Field(None, description="none: prompts as they are, in the order of the seed")
    rewards: Rewards = Rewards()
    calls: Calls = Field(Calls(), description="how endpoints of rewards are called")
    training: RlTraining = RlTraining()
    engine: EngineSettings = EngineSettings()

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if sum(source is not None for source in (self.world, self.data.prompts, self.environment)) != 1:
            raise ValueError("data: give prompts, or name a world or an environment, and one of them alone")
        if (self.data.prompts is not None) > (self.data.evaluation is not None):
            raise ValueError("data: give evaluation beside prompts")
        if self.world is not None and self.data.evaluation is not None:
            raise ValueError("data: a world supplies the evaluation; leave the file out, or the world")
        if self.rewards.overlong_buffer >= self.max_tokens:
            raise ValueError("rewards.overlong_buffer must be below max_tokens")
        if self.curriculum is not None and self.max_draws > 1:
            raise ValueError("curriculum: its order is that of the steps; leave max_draws out")
        if not self.beta and self.kl != "k3":
            raise ValueError("kl is the estimate of what beta weighs: give beta above 0, or leave kl out")
        if self.updates > self.prompts:
            raise ValueError("updates: at most one a prompt")
        return self

    @property
    def asks_others(self) -> bool:
        """Whether rewards come from models or from a server."""
        return bool(self.rewards.reward_model or self.rewards.judge or (self.environment and self.environment.nemo_gym))

    def with_files(self, *, prompts: Path | None, reward_model: Path | None) -> Self:
        """The recipe with other prompts, and with a reward model in a folder; None leaves what there is.

        Raises:
            InputError: the recipe has no prompts of its own.
        """
        changes: dict[str, Any] = {}
        if prompts is not None:
            if self.data.prompts is None:
                raise InputError(f"The recipe {self.name!r} takes its prompts from a world or an environment: leave --prompts out.")
            changes["data"] = self.data.model_copy(update={"prompts": prompts})
        if reward_model is not None:
            part = self.rewards.reward_model or RewardModel(folder=reward_model)
            part = part.model_copy(update={"folder": reward_model, "base_url": "", "model": ""})
            changes["rewards"] = self.rewards.model_copy(update={"reward_model": part})
        return self.model_copy(update=changes)

    def lr(self, num_parameters: int) -> float:
        """The learning rate: the recipe's, or by the model's size, and more for an adapter."""
        by_size = next(lr for largest, lr in LRS if num_parameters <= largest)
        return self.training.lr or by_size * (1 if self.training.lora is None else LORA_LR_FACTOR)

    def objective(self) -> PolicyGradientObjective:
        """The loss that the method and what overrides it make."""
        values: dict[str, Any] = {k: v for k, v in METHODS[self.method].items() if k not in ("advantage", "normalize")}
        values |= {k: v for k in ("clip_low", "clip_high") if (v := getattr(self, k)) is not None}
        return PolicyGradientObjective(**values, beta=self.beta, kl=self.kl, max_importance=self.max_importance)
