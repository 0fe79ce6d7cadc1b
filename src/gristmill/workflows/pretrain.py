"""Pretraining of a Base model from scratch, from documents or from a blend of tokens."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self, cast

from pydantic import Field, model_validator

from gristmill.core.config import FilePath, Recipe
from gristmill.core.device import pick_device
from gristmill.core.errors import InputError
from gristmill.data.chat_format import FORMATS
from gristmill.data.find_format import matching_formats, with_template_of
from gristmill.data.rows import read_records
from gristmill.data.token_store import TokenStore
from gristmill.data.tokenizer import Tokenizer
from gristmill.miniature.world import World
from gristmill.model.config import PRESETS, ModelConfig
from gristmill.model.hf import MAX_VOCAB_PADDING
from gristmill.model.hf_save import save_model
from gristmill.model.transformer import Transformer
from gristmill.parallel.mesh import Mesh
from gristmill.parallel.tensor import check_tensor_parallel
from gristmill.train.batches import Sample
from gristmill.train.data import SampleData, TokenStoreData
from gristmill.train.objectives.next_token import next_token_objective, token_samples
from gristmill.train.settings import BatchSize, ramp_of
from gristmill.train.trainer import OnStep, Trainer, TrainResult, TrainSettings

TOKENIZER_DOCUMENTS = 4000  # documents that a new tokenizer is trained on
ENCODE_BATCH = 4096


class Pretraining(Recipe):
    """The recipe of `gristmill pretrain`."""

    kind: Literal["pretraining"] = "pretraining"
    world: Literal["miniature"] | None = Field(None, description="a built-in world that supplies documents")
    documents: FilePath | None = Field(
        None, description="a .jsonl or .parquet file with a `text` column, a folder of .txt files, or one of `gristmill blend`"
    )
    preset: str = Field("miniature", description="architecture, one of the model presets")
    tokenizer: FilePath | None = Field(None, description="folder of an existing tokenizer; default: train one on the documents")
    chat_format: Literal["nemotron", "chatml", "llama3"] = "nemotron"
    tokens: int = Field(8_000_000, gt=0, description="tokens to train on; fewer when the documents end")
    seed: int = 0
    batch_tokens: int = Field(8192, gt=0)
    batch_size: BatchSize | None = Field(
        None, description="in place of batch_tokens: samples a step, or pairs [from sample, samples a step]"
    )
    micro_batch_tokens: int | None = Field(None, gt=0, description="tokens at once; null: as many as pay, within the free memory")
    checkpoint_activations: Literal["auto"] | bool = Field("auto", description="compute activations twice; auto: where memory is short")
    optimizer: Literal["adamw", "muon"] = "muon"
    lr: float = Field(3e-3, gt=0)
    muon_lr: float = Field(0.02, gt=0)
    schedule: Literal["constant", "cosine", "linear"] = "linear"
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="share of the steps")
    warmup_steps: int | None = Field(None, ge=0, description="instead of warmup_ratio")
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    weight_decay: float = Field(0.1, ge=0)
    precision: Literal["fp32", "bf16"] = "bf16"
    device: str = Field("auto", description="auto (a GPU where there is one), cpu, cuda, cuda:N or mps")

    @model_validator(mode="after")
    def _source(self) -> Self:
        if (self.world is None) == (self.documents is None):
            raise ValueError("give either world or documents")
        if self.batch_size is not None:
            ramp_of(self.batch_size)
        return self


def pretrain(recipe: Pretraining, out: Path, on_step: OnStep | None = None, mesh: Mesh | None = None) -> TrainResult:
    """Train a Base model from scratch; its folder is `out/model`, its log `out/train/metrics.jsonl`."""
    if recipe.preset not in PRESETS:
        raise InputError(f"Unknown preset {recipe.preset!r}: choose one of {', '.join(PRESETS)}.")
    config = PRESETS[recipe.preset]
    check_tensor_parallel(config, 1 if mesh is None or mesh.tensor is None else mesh.tensor.size)
    device = pick_device(recipe.device)
    blended = recipe.documents is not None and (recipe.documents / "blend.json").is_file()
    data: SampleData | list[Sample]
    tokenizer, data = _blended(recipe, config.max_positions) if blended else _encoded(recipe, config)
    model = Transformer(config)
    model.init_weights(recipe.seed)
    values = {k: v for k, v in recipe.model_dump().items() if k in TrainSettings.__dataclass_fields__}
    if recipe.batch_size is not None:
        values["batch_tokens"] = None
    settings = TrainSettings(**values, epochs=1, checkpoint_every=120.0, shuffle=not blended)
    trainer = Trainer(model, next_token_objective, settings, device=device, folder=out / "train", on_step=on_step, mesh=mesh)
    result = trainer.fit(data)
    if not trainer.mesh.is_writer:
        return result
    formats = matching_formats(tokenizer)
    if len(formats) == 1 and not tokenizer.chat_templates:  # it was made for one
        tokenizer = with_template_of(formats[0], tokenizer)
    save_model(cast(Transformer, trainer.model), tokenizer, out / "model")
    return result


def _blended(recipe: Pretraining, max_tokens: int) -> tuple[Tokenizer, TokenStoreData]:
    """The documents of a folder that `gristmill blend` wrote, in its order."""
    assert recipe.documents is not None
    tokenizer = Tokenizer.load(recipe.tokenizer or recipe.documents / "tokenizer")
    _check_vocabulary(recipe.preset, tokenizer)
    return tokenizer, TokenStoreData(TokenStore(recipe.documents, tokenizer), max_tokens, num_tokens=recipe.tokens)


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
    elif recipe.documents:
        yield from read_documents(recipe.documents)


def read_documents(path: Path) -> Iterator[str]:
    """Texts of a folder of .txt files, or of the column `text` of a file.

    Raises:
        InputError: the file is missing, or a row has no text.
    """
    if path.is_dir():
        for file in sorted(path.rglob("*.txt")):
            yield file.read_text(encoding="utf-8", errors="replace")
        return
    for number, record in enumerate(read_records(path), 1):
        if not isinstance(record.get("text"), str):
            raise InputError(f"Row {number} of {path} has no `text`.")
        yield record["text"]
