"""What the single-step commands do: pretrain, train, generate, score, evaluate. The flywheel joins the same parts into a loop."""

import itertools
import json
import math
import os
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from gristmill.chat import FORMATS, ChatFormat, Message, check, conversation, guess_format
from gristmill.engine.engine import Engine
from gristmill.engine.generator import Request, Sampling
from gristmill.engine.quality import divergence
from gristmill.errors import InputError
from gristmill.evaluate.score import score as score_model
from gristmill.flywheel.progress import Progress
from gristmill.flywheel.source import read_demonstrations, read_prompts, read_ratings
from gristmill.judge.reward import RewardScorer
from gristmill.judge.sandbox import Sandbox
from gristmill.judge.verify import verify
from gristmill.miniature.source import MiniatureSource
from gristmill.miniature.world import World
from gristmill.model.config import PRESETS, ModelConfig
from gristmill.model.quantized import Quantize
from gristmill.model.reward import RewardModel
from gristmill.model.transformer import Linear, Transformer
from gristmill.model.weights import MAX_VOCAB_PADDING, load_model, load_reward, save_model, save_quantized, save_reward, saved_as
from gristmill.recipe import Data, Section, Training, checked, read
from gristmill.rows import Pair, make_id, read_records
from gristmill.tokenizer import Tokenizer
from gristmill.train.loop import PRECISIONS, OnStep, TrainResult, TrainSettings, train
from gristmill.train.packing import Sample
from gristmill.train.preference import PreferenceObjective, compute_reference_logprobs, pair_samples
from gristmill.train.pretrain import next_token_objective, token_samples
from gristmill.train.reward import rated_samples, reward_objective
from gristmill.train.sft import demonstration_samples, sft_objective
from gristmill.train.tokens import TokenStore

TOKENIZER_DOCUMENTS = 4000  # documents that a new tokenizer is trained on
ENCODE_BATCH = 4096
SHUTDOWN_SECONDS = 60.0  # that answers under way may take when the server is told to end


class Pretraining(Section):
    """The recipe of `gristmill pretrain`."""

    world: Literal["miniature"] | None = Field(None, description="a built-in world that supplies documents")
    documents: Path | None = Field(
        None, description="a .jsonl or .parquet file with a `text` column, a folder of .txt files, or one of `gristmill blend`"
    )
    preset: str = Field("miniature", description="architecture, one of the model presets")
    tokenizer: Path | None = Field(None, description="folder of an existing tokenizer; default: train one on the documents")
    chat_format: Literal["nemotron", "chatml", "llama3"] = "nemotron"
    tokens: int = Field(8_000_000, gt=0, description="tokens to train on; fewer when the documents end")
    seed: int = 0
    batch_tokens: int = Field(8192, gt=0)
    micro_batch_tokens: int = Field(8192, gt=0)
    optimizer: Literal["adamw", "muon"] = "muon"
    lr: float = Field(3e-3, gt=0)
    muon_lr: float = Field(0.02, gt=0)
    schedule: Literal["constant", "cosine", "linear"] = "linear"
    warmup_steps: int = Field(50, ge=0)
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    weight_decay: float = Field(0.1, ge=0)
    precision: Literal["fp32", "bf16"] = "bf16"


def load_pretraining(path: Path) -> Pretraining:
    """Read a pretraining recipe.

    Raises:
        InputError: the file is missing or wrong.
    """
    recipe = checked(Pretraining, read(path), str(path))
    if (recipe.world is None) == (recipe.documents is None):
        raise InputError(f"{path}: give either world or documents.")
    return recipe


def pretrain(recipe: Pretraining, out: Path, on_step: OnStep | None = None) -> TrainResult:
    """Train a Base model from scratch; its folder is `out/model`, its log `out/train/metrics.jsonl`."""
    if recipe.preset not in PRESETS:
        raise InputError(f"Unknown preset {recipe.preset!r}: choose one of {', '.join(PRESETS)}.")
    config = PRESETS[recipe.preset]
    blended = recipe.documents is not None and (recipe.documents / "blend.json").is_file()
    tokenizer, samples = _blended(recipe, config.max_positions) if blended else _encoded(recipe, config)
    model = Transformer(config)
    model.init_weights(recipe.seed)
    values = {k: v for k, v in recipe.model_dump().items() if k in TrainSettings.__dataclass_fields__}
    settings = TrainSettings(**values, epochs=1, checkpoint_every=120.0, shuffle=not blended)
    result = train(model, next_token_objective, samples, settings, out / "train", on_step=on_step)
    save_model(model, tokenizer, out / "model")
    return result


def _blended(recipe: Pretraining, max_tokens: int) -> tuple[Tokenizer, list[Sample]]:
    """The documents of a folder that `gristmill blend` wrote, in its order."""
    assert recipe.documents is not None
    tokenizer = Tokenizer.load(recipe.tokenizer or recipe.documents / "tokenizer")
    _check_vocabulary(recipe.preset, tokenizer)
    return tokenizer, TokenStore(recipe.documents, tokenizer).samples(max_tokens, recipe.tokens)


def _check_vocabulary(preset: str, tokenizer: Tokenizer) -> None:
    wanted = PRESETS[preset].vocab_size
    if not 0 <= wanted - tokenizer.vocab_size <= MAX_VOCAB_PADDING:
        raise InputError(
            f"The tokenizer has {tokenizer.vocab_size} tokens and preset {preset!r} {wanted}: "
            "give more text to train it on, another tokenizer, or another preset."
        )


def _encoded(recipe: Pretraining, config: ModelConfig) -> tuple[Tokenizer, list[Sample]]:
    """Documents as text, encoded here and now."""
    stream = _documents(recipe)
    first = list(itertools.islice(stream, TOKENIZER_DOCUMENTS))
    if not first:
        raise InputError("There are no documents to train on.")
    if recipe.tokenizer:
        tokenizer = Tokenizer.load(recipe.tokenizer)
    else:
        tokenizer = Tokenizer.train(first, config.vocab_size, FORMATS[recipe.chat_format].special_tokens)
    _check_vocabulary(recipe.preset, tokenizer)
    documents: list[list[int]] = []
    count = 0
    source = itertools.chain(first, stream)
    while count < recipe.tokens and (batch := list(itertools.islice(source, ENCODE_BATCH))):
        for ids in tokenizer.encode_batch(batch):
            if count >= recipe.tokens:
                break
            documents.append([*ids, tokenizer.eos_id])
            count += len(ids) + 1
    return tokenizer, token_samples(documents, config.max_positions)


def _documents(recipe: Pretraining) -> Iterator[str]:
    if recipe.world:
        yield from World.make().documents(recipe.seed)
    elif recipe.documents and recipe.documents.is_dir():
        for path in sorted(recipe.documents.rglob("*.txt")):
            yield path.read_text(encoding="utf-8", errors="replace")
    elif recipe.documents:
        for number, record in enumerate(read_records(recipe.documents), 1):
            if not isinstance(record.get("text"), str):
                raise InputError(f"Row {number} of {recipe.documents} has no `text`.")
            yield record["text"]


def chat_format_of(name: str, tokenizer: Tokenizer) -> ChatFormat:
    """A chat format by name, or the one that fits the tokenizer for `auto`."""
    if name == "auto":
        return guess_format(tokenizer)
    if name not in FORMATS:
        raise InputError(f"Unknown chat format {name!r}: choose auto or one of {', '.join(FORMATS)}.")
    return FORMATS[name]


def train_model(
    kind: str, model_folder: Path, data: Path, out: Path, recipe: Training, chat_format: str, seed: int, on_step: OnStep | None
) -> TrainResult:
    """One training stage on the user's own rows; the model goes to `out/model`.

    Args:
        kind: sft, reward, or the name of a preference loss.
        recipe: a `Training`, or a `PreferenceTraining` for preference losses.
    """
    model, tokenizer = load_model(model_folder)
    form = chat_format_of(chat_format, tokenizer)
    values = {k: v for k, v in recipe.model_dump().items() if k in TrainSettings.__dataclass_fields__}
    settings = TrainSettings(**values, seed=seed, max_tokens=model.config.max_positions, checkpoint_every=60.0)
    if kind == "sft":
        rows = read_demonstrations(data)
        samples = demonstration_samples(rows, form, tokenizer)
        result = train(model, sft_objective, samples, settings, out / "train", on_step=on_step)
        save_model(model, tokenizer, out / "model")
    elif kind == "reward":
        reward = RewardModel(model, seed=seed)
        rated = rated_samples(read_ratings(data), form, tokenizer)
        result = train(reward, reward_objective, rated, settings, out / "train", on_step=on_step)
        save_reward(reward, tokenizer, out / "model")
    else:
        options = recipe.model_dump()
        names = ("beta", "eta", "label_smoothing", "sft_weight", "logprobs")
        objective = PreferenceObjective(kind, **{k: options[k] for k in names})
        pairs = compute_reference_logprobs(model, pair_samples(_pairs(data), form, tokenizer), out / "train", precision=settings.precision)
        result = train(model, objective, pairs, settings, out / "train", on_step=on_step)
        save_model(model, tokenizer, out / "model")
    return result


def _pairs(path: Path) -> list[Pair]:
    """Pairs of our own files, or plain ones: `prompt` (or `messages`), `chosen`, `rejected`, optional rewards."""
    out = []
    for number, r in enumerate(read_records(path), 1):
        try:
            turns = r["messages"] if r.get("messages") is not None else [{"role": "user", "content": r["prompt"]}]
            for answer in (r["chosen"], r["rejected"]):
                talk = conversation([*turns, {"role": "assistant", "content": answer}])
                check(talk)
        except KeyError as e:
            raise InputError(f"Row {number} of {path} lacks {e}: give prompt (or messages), chosen and rejected.") from e
        except (InputError, TypeError) as e:
            raise InputError(f"Row {number} of {path}: {e}") from e
        rewards = _reward(path, number, r, "chosen_reward", 1.0), _reward(path, number, r, "rejected_reward", 0.0)
        name = str(r.get("id") or make_id(number, r["chosen"]))
        out.append(Pair(name, "", r.get("task") or "", talk[:-1], r["chosen"], r["rejected"], *rewards, "file"))
    if not out:
        raise InputError(f"{path} holds no pairs.")
    return out


def _reward(path: Path, number: int, record: dict[str, Any], name: str, default: float) -> float:
    value = default if record.get(name) is None else record[name]
    try:
        reward = float(value)
    except (TypeError, ValueError):
        reward = math.nan
    if not math.isfinite(reward):
        raise InputError(f"Row {number} of {path} has {name} {value!r}: give a number, or leave it out.")
    return reward


CACHES = PRECISIONS | {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def quantize(folder: Path, out: Path, kind: Quantize, dtype: str) -> dict[str, Any]:
    """Write a model folder again with its layers' matrices quantized, all else in `dtype`."""
    if out.resolve() == folder.resolve():
        raise InputError(f"Choose another --out than the model itself: {folder} would be replaced.")
    if saved_as(folder):
        raise InputError(f"Give the model as it was before it was quantized: {folder} is quantized already.")
    model, tokenizer = load_model(folder)
    for parameter in model.parameters():
        if not any(parameter is module.weight for module in model.blocks.modules() if isinstance(module, Linear)):
            parameter.data = parameter.data.to(PRECISIONS[dtype])
    save_quantized(model, tokenizer, out, kind)
    return {"model": str(out), "quantize": kind, "bytes": sum(path.stat().st_size for path in out.glob("*.safetensors"))}


@dataclass(frozen=True)
class Running:
    """How a model computes in the engine.

    Attributes:
        dtype: of activations, and of matrices that are not quantized.
        quantize: as in `Engine`; "" for what the model's folder was saved as.
        cache: type of keys and values; "" for `dtype`.
        max_batch, cache_tokens: as in `Engine`.
        chat_format: "auto", or a name.
    """

    dtype: Literal["fp32", "bf16"] = "fp32"
    quantize: Quantize = ""
    cache: Literal["", "fp32", "bf16", "int8", "fp8"] = ""
    max_batch: int = 256
    cache_tokens: int | None = None
    chat_format: str = "auto"


def engine_of(folder: Path, how: Running = Running(), name: str = "", own: bool = True) -> Engine:
    """A model folder, ready to generate. `own` as in `Engine`."""
    model, tokenizer = load_model(folder)
    if torch.cuda.is_available():
        model = model.cuda()
    return Engine(
        model,
        tokenizer,
        chat_format_of(how.chat_format, tokenizer),
        name or folder.resolve().name,
        how.max_batch,
        PRECISIONS[how.dtype],
        how.cache_tokens,
        CACHES[how.cache] if how.cache else None,
        how.quantize or saved_as(folder),
        own,
    )


def generate(engine: Engine, prompts: Sequence[Sequence[Message]], sampling: Sampling, seed: int) -> Iterator[dict[str, Any]]:
    """Answers as rows, as they finish."""
    requests = [Request(str(i), tuple(messages), sampling, seed) for i, messages in enumerate(prompts)]
    for request, completions in engine.generate(requests):
        yield {
            "index": int(request.id),
            "messages": [asdict(m) for m in request.messages],
            "responses": [
                {"text": c.text, "num_tokens": c.num_tokens, "logprob": sum(c.logprobs), "finish": c.finish} for c in completions
            ],
        }


def rate(folder: Path, data: Path, chat_format: str = "auto") -> list[dict[str, Any]]:
    """Rate every conversation of a file with a reward model."""
    model, tokenizer = load_reward(folder)
    scorer = RewardScorer(model, tokenizer, chat_format_of(chat_format, tokenizer))
    rows = read_demonstrations(data)
    ratings = scorer.score([r.messages for r in rows])
    return [{"id": r.id, **asdict(x), "score": round(scorer.total(x), 4)} for r, x in zip(rows, ratings, strict=True)]


def evaluate(
    engine: Engine, prompts_file: Path | None, max_tokens: int, seed: int, unsafe_code: bool, progress: Progress
) -> dict[str, Any]:
    """Greedy and sampled accuracy on a file's prompts with truths, or on the miniature world's."""
    prompts = MiniatureSource(Data(), seed).evaluation() if prompts_file is None else read_prompts(prompts_file, "human", truth=True)
    needs_code = any((p.truth or {}).get("kind") == "code" for p in prompts)

    def run(requests: list[Request]) -> dict[str, Any]:
        return {r.id: c for r, c in progress.track(engine.generate(requests), len(requests))}

    with Sandbox(unsafe=unsafe_code) if needs_code else nullcontext() as sandbox:
        check = lambda cases: [  # noqa: E731
            verify(truth, answer, lambda p, t: sandbox is not None and sandbox.run(p, t).passed) for truth, answer in cases
        ]
        scores = score_model(prompts, run, check, max_tokens, seed)
    if engine.quantize or engine.cache_dtype != engine.dtype:  # on what the model itself answers
        own = Engine(engine.model, engine.tokenizer, engine.chat_format, engine.name, engine.max_batch)
        asked = [Request(str(i), p.messages, Sampling(temperature=0.0, max_tokens=max_tokens), seed) for i, p in enumerate(prompts)]
        said = [(*r.messages, Message("assistant", outs[0].text)) for r, outs in own.generate(asked) if outs[0].text.strip()]
        scores["quantized"] = divergence(engine, said)
    return scores


@dataclass(frozen=True)
class Serving:
    """How a model is served.

    Attributes:
        reward: folder of a reward model that is served too.
        api_key_env, api_key_file: where the keys are that requests must bear, one a line; neither: everybody may ask.
        most_open: samples under way or waiting, beyond which requests are sent away for a while.
        timeout: seconds a request may take.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str = ""
    reward: Path | None = None
    api_key_env: str = ""
    api_key_file: Path | None = None
    most_open: int = 4096
    timeout: float = 600.0


def serve(model_folder: Path, how: Serving, running: Running) -> None:
    """Serve a model until interrupted. Prints the address when it is ready.

    Raises:
        InputError: a folder is no model, a key is missing, or the address cannot be used.
    """
    from aiohttp import web

    from gristmill.engine.server import Limits, Server

    if how.most_open < 1 or not how.timeout > 0 or (running.cache_tokens is not None and running.cache_tokens < 1):
        raise InputError("--most-open and --cache-tokens must be at least 1, and --timeout above 0.")
    keys = _keys(how.api_key_env, how.api_key_file)
    name = how.name or model_folder.resolve().name
    engine = engine_of(model_folder, running, name)
    rate = _rater(how.reward, running.chat_format) if how.reward is not None else None
    reward_name = how.reward.resolve().name if how.reward is not None else ""
    if reward_name == name:
        reward_name += "-reward"
    server = Server(engine, Limits(keys, how.most_open, how.timeout), rate, reward_name)
    try:
        listening = socket.create_server((how.host, how.port))
    except (OSError, OverflowError) as e:
        reason = getattr(e, "strerror", None) or e
        raise InputError(f"Nothing can listen at {how.host}:{how.port} ({reason}): choose another --host or --port.") from e

    def ready(_: object) -> None:
        both = f"{name} and the reward model {reward_name} answer" if rate else f"{name} answers"
        print(f"{both} at http://{how.host}:{listening.getsockname()[1]}/v1", flush=True)
        print(f"attention: {server.live.workers[0].core.runner.attention.name}", file=sys.stderr)

    web.run_app(server.app(), sock=listening, print=ready, access_log=None, handler_cancellation=True, shutdown_timeout=SHUTDOWN_SECONDS)
    if not server.quiet:  # in the middle of a long step; torch's threads would not end quietly
        os._exit(0)


def _keys(variable: str, file: Path | None) -> list[str]:
    keys = os.environ.get(variable, "").split() if variable else []
    if file is not None:
        try:
            keys += file.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(f"The key file {file} cannot be read ({e}).") from e
    if (variable or file is not None) and not keys:
        raise InputError(f"There is no API key in {variable or file}: write one there, or leave the option out to let everybody ask.")
    return keys


def _rater(folder: Path, chat_format: str) -> Any:
    model, tokenizer = load_reward(folder)
    scorer = RewardScorer(model, tokenizer, chat_format_of(chat_format, tokenizer))

    def rate(talks: list[Any]) -> list[dict[str, float]]:
        return [asdict(rating) | {"score": scorer.total(rating)} for rating in scorer.score(talks)]

    return rate


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows as they come; returns their number."""
    count = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
    except OSError as e:
        raise InputError(f"{path} cannot be written ({e.strerror}): free some space or choose another place.") from e
    return count
