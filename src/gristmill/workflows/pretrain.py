"""Pretraining of a Base model from scratch, from documents or from a blend of tokens."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import nn

from gristmill.core.config import FilePath, Line, Recipe
from gristmill.core.device import pick_device
from gristmill.core.errors import InputError
from gristmill.core.io import read_json, write_json
from gristmill.data.chat_format import FORMATS
from gristmill.data.find_format import matching_formats, with_template_of
from gristmill.data.rows import read_records
from gristmill.data.token_store import TokenStore
from gristmill.data.tokenizer import Tokenizer
from gristmill.evaluate.benchmark_scores import mean_score
from gristmill.miniature.base import BASE
from gristmill.miniature.world import KINDS, World
from gristmill.model.config import PRESETS, ModelConfig
from gristmill.model.hf import MAX_VOCAB_PADDING, load_model
from gristmill.model.hf_save import save_model
from gristmill.model.transformer import Transformer
from gristmill.parallel.mesh import Mesh
from gristmill.train.batches import Sample, collate_tokens, split_micro_batches
from gristmill.train.data import SampleData, TokenStoreData
from gristmill.train.losses import token_logprobs
from gristmill.train.memory import MIN_MICRO_BATCH
from gristmill.train.objectives.next_token import next_token_objective, token_samples
from gristmill.train.settings import CHECKPOINTING, COMPILE, BatchSize, ramp_of
from gristmill.train.sharded import check_parallel
from gristmill.train.trainer import OnStep, Trainer, TrainResult, TrainSettings

DocumentKind = Literal["facts", "sums", "long_sums", "code", "lists", "followups"]
TOKENIZER_DOCUMENTS = 4000  # documents that a new tokenizer is trained on
ENCODE_BATCH = 4096
HELD_OUT, HELD_OUT_DOCUMENTS, HELD_OUT_SEED = "held_out.json", 200, 10_000  # a source's documents; of a world they have another seed


class Pretraining(Recipe):
    """The recipe of `gristmill pretrain`."""

    kind: Literal["pretraining"] = "pretraining"
    world: Literal["miniature"] | None = Field(None, description="a built-in world that supplies documents")
    documents: FilePath | None = Field(
        None, description="a .jsonl or .parquet file with a `text` column, a folder of .txt files, or one of `gristmill blend`"
    )
    weights: dict[DocumentKind, Annotated[float, Field(gt=0)]] | None = Field(
        None, description="of the world: shares of its kinds of documents"
    )
    held_out: dict[Line, FilePath] = Field(
        {}, description="files of documents by the name of their source, whose loss is measured before and after; of a world, its kinds"
    )
    model: Literal["miniature"] | FilePath | None = Field(
        None, description="folder of a model to go on from, with its tokenizer; miniature: the shipped Base"
    )
    preset: str = Field("miniature", description="architecture, one of the model presets, where no model is given")
    tokenizer: FilePath | None = Field(None, description="folder of an existing tokenizer; default: train one on the documents")
    chat_format: Literal["nemotron", "chatml", "llama3"] = "nemotron"
    tokens: int = Field(8_000_000, gt=0, description="tokens to train on; fewer when the documents end")
    seed: int = 0
    batch_tokens: int = Field(8192, gt=0)
    batch_size: BatchSize | None = Field(
        None, description="in place of batch_tokens: samples a step, or pairs [from sample, samples a step]"
    )
    micro_batch_tokens: int | None = Field(None, gt=0, description="tokens at once; null: as many as pay, within the free memory")
    checkpoint_activations: Literal["auto", "selective"] | bool = Field("auto", description=CHECKPOINTING)
    compile: bool = Field(False, description=COMPILE)
    optimizer: Literal["adamw", "muon"] = "muon"
    lr: float = Field(3e-3, gt=0)
    muon_lr: float = Field(0.02, gt=0)
    schedule: Literal["constant", "cosine", "linear"] = "linear"
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="share of the steps")
    warmup_steps: int | None = Field(None, ge=0, description="instead of warmup_ratio")
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    weight_decay: float = Field(0.1, ge=0)
    precision: Literal["fp32", "bf16", "fp8", "fp8_tensorwise"] = "bf16"
    device: str = Field("auto", description="auto (a GPU where there is one), cpu, cuda, cuda:N or mps")

    @model_validator(mode="after")
    def _source(self) -> Self:
        if (self.world is None) == (self.documents is None):
            raise ValueError("give either world or documents")
        if self.weights is not None and self.world is None:
            raise ValueError("weights are of a world's kinds of documents: a blend has weights of its own (`gristmill blend`)")
        if self.model is not None and {"preset", "tokenizer", "chat_format"} & self.model_fields_set:
            raise ValueError("leave preset, tokenizer and chat_format out where a model is given: it has them")
        if self.model is None and self.held_out:
            raise ValueError("held_out is measured before and after training from a model: give model, or leave it out")
        if self.batch_size is not None:
            ramp_of(self.batch_size)
        return self


def pretrain(recipe: Pretraining, out: Path, on_step: OnStep | None = None, mesh: Mesh | None = None) -> TrainResult:
    """Train a Base model, from scratch or from a given one; its folder is `out/model`, its log `out/train/metrics.jsonl`.

    Of a given one, losses of held-out documents before and after go to `out/held_out.json`, by source.
    """
    if recipe.preset not in PRESETS:
        raise InputError(f"Unknown preset {recipe.preset!r}: choose one of {', '.join(PRESETS)}.")
    given = None if recipe.model is None else load_model(BASE if recipe.model == "miniature" else Path(recipe.model))
    config = PRESETS[recipe.preset] if given is None else given[0].config
    check_parallel(config, (mesh or Mesh()).dims)
    device = pick_device(recipe.device)
    blended = recipe.documents is not None and (recipe.documents / "blend.json").is_file()
    data: SampleData | list[Sample]
    known = None if given is None else given[1]
    tokenizer, data = _blended(recipe, config, known) if blended else _encoded(recipe, config, known)
    model = Transformer(config) if given is None else given[0]
    if given is None:
        model.init_weights(recipe.seed)
    held_out = _held_out(recipe, tokenizer, config.max_positions) if given is not None else {}
    before = {name: document_losses(model.to(device), samples) for name, samples in held_out.items()}
    values = {k: v for k, v in recipe.model_dump().items() if k in TrainSettings.__dataclass_fields__}
    if recipe.batch_size is not None:
        values["batch_tokens"] = None
    settings = TrainSettings(**values, epochs=1, checkpoint_every=120.0, shuffle=not blended)
    trainer = Trainer(model, next_token_objective, settings, device=device, folder=out / "train", on_step=on_step, mesh=mesh)
    result = trainer.fit(data)
    if not trainer.mesh.is_writer:
        return result
    if held_out:
        after = {name: document_losses(trainer.model, samples) for name, samples in held_out.items()}
        changes = {name: [new - old for new, old in zip(after[name], before[name], strict=True)] for name in before}
        scores = {"before": before, "after": after, "change": changes}
        write_json(out / HELD_OUT, {key: {name: mean_score(x) for name, x in found.items()} for key, found in scores.items()})
    formats = matching_formats(tokenizer)
    if len(formats) == 1 and not tokenizer.chat_templates:  # it was made for one
        tokenizer = with_template_of(formats[0], tokenizer)
    save_model(cast(Transformer, trainer.model), tokenizer, out / "model")
    return result


def _blended(recipe: Pretraining, config: ModelConfig, known: Tokenizer | None) -> tuple[Tokenizer, TokenStoreData]:
    """The documents of a folder that `gristmill blend` wrote, in its order."""
    assert recipe.documents is not None
    tokenizer = known or Tokenizer.load(recipe.tokenizer or recipe.documents / "tokenizer")
    _check_vocabulary(recipe.preset, config, tokenizer)
    return tokenizer, TokenStoreData(TokenStore(recipe.documents, tokenizer), config.max_positions, num_tokens=recipe.tokens)


def _held_out(recipe: Pretraining, tokenizer: Tokenizer, max_tokens: int) -> dict[str, list[Sample]]:
    """Held-out documents by source, each cut off at the model's context."""
    sources = {name: read_documents(path) for name, path in recipe.held_out.items()}
    if recipe.world and not sources:
        sources = {kind: World.make().documents(recipe.seed + HELD_OUT_SEED, {kind: 1.0}) for kind in KINDS}
    found = {}
    for name, texts in sources.items():
        encoded = tokenizer.encode_batch(list(itertools.islice(texts, HELD_OUT_DOCUMENTS)))
        found[name] = token_samples([[*ids, tokenizer.eos_id][:max_tokens] for ids in encoded if ids], max_tokens)
        if not found[name]:
            raise InputError(f"The held-out source {name} has no documents.")
    return found


def held_out_lines(out: Path) -> list[str]:
    """What continued pretraining did to the loss of each source."""
    if not (out / HELD_OUT).exists():
        return []
    found = read_json(out / HELD_OUT)
    lines = []
    for name, change in found["change"].items():
        low, high = change["ci95"]
        before, after = (found[key][name]["value"] for key in ("before", "after"))
        lines.append(f"{name:<12} loss {before:.4f} -> {after:.4f}  {change['value']:+.4f} [{low:+.4f}, {high:+.4f}]  n {change['n']}")
    return lines


@torch.no_grad()
def document_losses(model: nn.Module, samples: Sequence[Sample]) -> list[float]:
    """Mean loss of a token in each document, computed in fp32."""
    decoder, losses = cast(Transformer, model.eval()), dict[int, float]()
    for group in split_micro_batches(samples, MIN_MICRO_BATCH):
        batch = collate_tokens(group, decoder.embedding.device, fill=False)
        hidden_RD = decoder.hidden(batch.ids_T, batch.shape, batch.rows_R)
        logprobs_R = token_logprobs(hidden_RD, decoder.unembedding(), batch.targets_R, cap=decoder.config.logits_soft_cap)
        parts = logprobs_R.split([sample.num_targets for sample in group])
        losses |= {id(sample): -float(part.mean()) for sample, part in zip(group, parts, strict=True)}
    return [losses[id(sample)] for sample in samples]


def _check_vocabulary(preset: str, config: ModelConfig, tokenizer: Tokenizer) -> None:
    wanted = config.vocab_size
    if not 0 <= wanted - tokenizer.vocab_size <= MAX_VOCAB_PADDING:
        raise InputError(
            f"The tokenizer has {tokenizer.vocab_size} tokens and preset {preset!r} {wanted}: "
            "give more text to train it on, another tokenizer, or another preset."
        )


def _encoded(recipe: Pretraining, config: ModelConfig, known: Tokenizer | None) -> tuple[Tokenizer, list[Sample]]:
    """Documents as text, encoded here and now."""
    stream = _documents(recipe)
    first = list(itertools.islice(stream, TOKENIZER_DOCUMENTS))
    if not first:
        raise InputError("There are no documents to train on.")
    if known is not None or recipe.tokenizer:
        tokenizer = known or Tokenizer.load(cast(Path, recipe.tokenizer))
    else:
        tokenizer = Tokenizer.train(first, config.vocab_size, FORMATS[recipe.chat_format].special_tokens)
    _check_vocabulary(recipe.preset, config, tokenizer)
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
        yield from World.make().documents(recipe.seed, cast("dict[str, float] | None", recipe.weights))
    elif recipe.documents:
        yield from read_documents(recipe.documents)


def read_documents(path: Path) -> Iterator[str]:
    """Texts of a folder of .txt files, or of the column `text` of a file.

    Raises:
        InputError: the file is missing, or a row has no text.
    """
    if path.is_dir():
        for file in sorted(file for file in path.rglob("*.txt") if file.is_file()):
            yield file.read_text(encoding="utf-8", errors="replace")
        return
    for number, record in enumerate(read_records(path), 1):
        if not isinstance(record.get("text"), str):
            raise InputError(f"Row {number} of {path} has no `text`.")
        yield record["text"]
