"""Python API: what `import gristmill` offers. The command line calls the same functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from gristmill.core.config import Recipe, check, find_recipe
from gristmill.core.config import load as load_recipe
from gristmill.core.progress import Progress
from gristmill.data.chat import Conversation, conversation
from gristmill.data.rows import Rating
from gristmill.data.tokenizer import Tokenizer
from gristmill.engine.engine import EngineStats
from gristmill.engine.load import EngineArgs, load_engine
from gristmill.generation.api import Completion, Request, SamplingParams
from gristmill.judge.reward import load_scorer
from gristmill.miniature.base import BASE
from gristmill.model.adapters import check_model_folder, load_model
from gristmill.model.quantized import Head, Quantize
from gristmill.model.transformer import Transformer
from gristmill.train.settings import training_section
from gristmill.train.trainer import TrainResult

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)
Messages = Sequence[Mapping[str, str]]  # [{"role": "user", "content": "..."}, ...]


@dataclass(frozen=True)
class RequestOutput:
    """The completions of one prompt.

    Attributes:
        prompt: the text, or the conversation, that was asked.
        outputs: `n` completions, each with `text`, `tokens`, `logprobs` and `finish`.
    """

    prompt: str | Conversation
    outputs: list[Completion]


class LLM:
    """Inference engine over a model folder.

    Args:
        model: a Hugging Face folder, or the folder of a LoRA adapter; "miniature" is the shipped Base.
        dtype: of matrices and activations; "auto": as the checkpoint is stored, bf16 where that is fast (on a GPU always).
        quantize: the layers' matrices: "int8", "int8-weight", "int4" or "fp8"; "" for what the folder was saved as.
        head: "int8": the output matrix in eight bits too, its weights alone.
        cache: type of keys and values; "" for `dtype`.
        max_batch: most responses in flight.
        step_tokens: most tokens that are computed at once (vLLM's max_num_batched_tokens); None for what gives the most tokens a second.
        speculative_config: draft tokens by n-gram look-up, with vLLM's settings: {"method": "ngram", "num_speculative_tokens": 5,
            "prompt_lookup_max": 4, "prompt_lookup_min": 2}, or "ngram" for these; None: no drafts. Answers are the same.
        chat_format: "auto" (the folder's own), plain, nemotron, chatml or llama3.
        device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", "mps".

    Raises:
        InputError: the folder holds no model that is known, a setting is wrong, or the device is not there.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: Literal["auto", "fp32", "bf16"] = "auto",
        quantize: Quantize = "",
        head: Head = "",
        cache: Literal["", "fp32", "bf16", "int8", "fp8"] = "",
        max_batch: int = 256,
        step_tokens: int | None = None,
        speculative_config: str | Mapping[str, Any] | None = None,
        chat_format: str = "auto",
        device: str = "auto",
    ):
        self.engine = load_engine(_folder(model), EngineArgs.of(locals()), own=False)

    @property
    def stats(self) -> EngineStats:
        """Tokens computed, generated, drafted and accepted so far, and seconds."""
        return self.engine.stats

    def generate(self, prompts: str | Sequence[str], params: SamplingParams | None = None, *, seed: int = 0) -> list[RequestOutput]:
        """Continue texts as they are, without a chat format."""
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        requests = [
            Request(str(i), (), params or SamplingParams(), seed, prompt_ids=tuple(self.engine.tokenizer.encode(text)))
            for i, text in enumerate(texts)
        ]
        return self._outputs(requests, texts)

    def chat(
        self, conversations: Messages | Sequence[Messages], params: SamplingParams | None = None, *, seed: int = 0
    ) -> list[RequestOutput]:
        """The assistant's next turn of conversations, written in the model's chat format."""
        several: Any = [conversations] if conversations and isinstance(conversations[0], Mapping) else conversations
        talks = [conversation([dict(turn) for turn in talk]) for talk in several]
        requests = [Request(str(i), talk, params or SamplingParams(), seed) for i, talk in enumerate(talks)]
        return self._outputs(requests, talks)

    def loglikelihood(self, conversations: Sequence[Messages]) -> list[tuple[float, int]]:
        """Sum of log-probabilities (nats) of the assistant's turns of each conversation, and the number of their tokens."""
        return self.engine.loglikelihood([conversation([dict(turn) for turn in talk]) for talk in conversations])

    def _outputs(self, requests: Sequence[Request], prompts: Sequence[str | Conversation]) -> list[RequestOutput]:
        done = {request.id: completions for request, completions in self.engine.generate(requests)}
        return [RequestOutput(prompt, done[request.id]) for request, prompt in zip(requests, prompts, strict=True)]


class RewardModel:
    """Reward model over a folder: five attributes of an answer, and their weighted sum.

    Args:
        model: folder of a reward model.
        chat_format: "auto" (the folder's own), plain, nemotron, chatml or llama3.
        device: as for `LLM`.

    Raises:
        InputError: the folder holds no reward model, or the device is not there.
    """

    def __init__(self, model: str | Path, *, chat_format: str = "auto", device: str = "auto"):
        self._scorer = load_scorer(Path(model), chat_format, device=device)

    def rate(self, conversations: Sequence[Messages]) -> list[Rating]:
        """Helpfulness, correctness, coherence, complexity and verbosity of the last turn of each conversation."""
        return self._scorer.score([conversation([dict(turn) for turn in talk]) for talk in conversations])

    def score(self, conversations: Sequence[Messages]) -> list[float]:
        """The weighted sum of the attributes of each conversation's last turn."""
        return [self._scorer.total(rating) for rating in self.rate(conversations)]


def load(model: str | Path) -> tuple[Transformer, Tokenizer]:
    """The weights of a Hugging Face folder (or of a LoRA adapter's, merged) as a `torch.nn.Module`, in fp32, and its tokenizer.

    Raises:
        InputError: a tensor is missing, unexpected or misshapen, or the architecture is unknown.
    """
    return load_model(_folder(model))


def train(
    objective: str,
    model: str | Path,
    data: str | Path | Sequence[Any],
    *,
    out: str | Path,
    chat_format: str = "auto",
    seed: int = 0,
    device: str = "auto",
    tp: int = 1,
    cp: int = 1,
    pp: int = 1,
    vp: int = 1,
    pp_schedule: str = "1f1b",
    teacher: str | Path | None = None,
    **settings: Any,
) -> TrainResult:
    """Train a model on rows; it goes to `out/model`, checkpoints and metrics to `out/train`. Run again, it resumes.

    With `lora={"rank": 16, ...}` an adapter is trained, which goes to `out/adapter`.

    Args:
        objective: sft, reward, distill, or a preference loss: dpo, cdpo, ipo, rpo, rpo_fwd_kl, rpo_sq.
        data: a JSONL or Parquet file, or rows of `gristmill.data.rows`.
        tp, cp, pp: processes of torchrun that share out every matrix, the tokens of documents, and the layers; the others share out the
            samples (docs/scale.md).
        vp: virtual stages of each process of a pipeline.
        pp_schedule: of a pipeline: 1f1b, zero-bubble or zbv.
        teacher: of distill, the folder of the model to learn from (docs/compress.md).
        settings: as in a recipe's training section: lr, epochs or steps, batch_size, precision, beta, lora, ...; what is left out is
            chosen by the model's size (docs/settings.md).

    Raises:
        InputError: a row or a setting is wrong, or `out` holds another training.
    """
    from gristmill.core.device import pick_device
    from gristmill.parallel.mesh import ParallelDims, process_mesh
    from gristmill.workflows.train import train_model

    rows = Path(data) if isinstance(data, str | Path) else data
    section = training_section(objective, settings)
    with process_mesh(pick_device(device), ParallelDims(tp, cp, pp, vp, pp_schedule)) as mesh:
        options: dict[str, Any] = {"recipe": section, "chat_format": chat_format, "seed": seed, "device": device, "mesh": mesh}
        options["teacher"] = None if teacher is None else _folder(teacher)
        return train_model(objective, _folder(model), rows, out=Path(out), **options)


def evaluate(
    model: str | Path | LLM,
    prompts: str | Path | None = None,
    *,
    max_tokens: int = 80,
    seed: int = 0,
    unsafe_code: bool = False,
) -> dict[str, Any]:
    """Greedy and sampled accuracy by task with 95 % intervals, on a file's prompts with known answers.

    Args:
        prompts: JSONL or Parquet with `truth` or `answer`; None: the miniature world's.
    """
    from gristmill.workflows.evaluate import evaluate as evaluate_engine

    llm = model if isinstance(model, LLM) else LLM(model)
    path = Path(prompts) if prompts is not None else None
    return evaluate_engine(llm.engine, path, max_tokens=max_tokens, seed=seed, unsafe_code=unsafe_code, progress=Progress(quiet=True))


def synth(
    recipe: str | Path | Mapping[str, Any], *, out: str | Path | None = None, dry_run: bool = False, limit: int | None = None
) -> dict[str, Any]:
    """Write a dataset; what stands in its `results.json`. Run again, it goes on and buys nothing twice.

    Args:
        recipe: a recipe file, the name of a shipped recipe, or its values.
        out: run folder; default runs/NAME.
        dry_run: ask nobody; the calls, tokens and cost that it would take.
        limit: most rows of each pipeline.
    """
    from gristmill.workflows.dataset import run
    from gristmill.workflows.dataset.recipe import DatasetRecipe

    loaded = _recipe(recipe, DatasetRecipe)
    if dry_run:
        return run.dry_run(loaded)
    return run.run(loaded, Path(out or Path("runs") / loaded.name), Progress(quiet=True), limit=limit)


def curate(recipe: str | Path | Mapping[str, Any], *, out: str | Path | None = None) -> dict[str, Any]:
    """Curate documents from files to files; what stands in the run's `results.json`.

    Args:
        recipe: a recipe file, the name of a shipped recipe, or its values.
        out: run folder; default runs/NAME.
    """
    from gristmill.curate.recipe import Curation
    from gristmill.curate.run import run

    loaded = _recipe(recipe, Curation)
    return run(loaded, Path(out or Path("runs") / loaded.name), Progress(quiet=True))


def align(
    recipe: str | Path | Mapping[str, Any], *, out: str | Path | None = None, unsafe_code: bool = False, redo: bool = False
) -> dict[str, Any]:
    """Run the alignment loop; what stands in its `results.json`. Run again, it goes on where it was cut off.

    Args:
        recipe: a recipe file, the name of a shipped recipe, or its values.
        out: run folder; default runs/NAME.
        unsafe_code: run model-written programs without a jail where the kernel offers none.
        redo: make stages again that were made from another recipe or other files; what is there is moved aside.
    """
    from gristmill.studio.said import read_said
    from gristmill.workflows.alignment.loop import run
    from gristmill.workflows.alignment.recipe import AlignmentRecipe

    loaded = _recipe(recipe, AlignmentRecipe)
    with Progress(quiet=True) as progress:
        return run(loaded, Path(out or Path("runs") / loaded.name), progress, unsafe_code, redo=redo, read_said=read_said)


def _folder(model: str | Path) -> Path:
    folder = BASE if model == "miniature" else Path(model)
    check_model_folder(folder)
    return folder


def _recipe(recipe: str | Path | Mapping[str, Any], kind: type[AnyRecipe]) -> AnyRecipe:
    if isinstance(recipe, Mapping):
        return check(kind, dict(recipe))
    return load_recipe(find_recipe(str(recipe), kind.model_fields["kind"].default), kind)
