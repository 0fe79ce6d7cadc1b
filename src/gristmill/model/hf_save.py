"""Hugging Face model folders, written: config.json, safetensors, generation_config.json, the tokenizer.

Every folder is written beside its target, flushed, and renamed into place, so a half-written model is never seen.
"""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from gristmill.core.errors import InputError
from gristmill.core.io import disk_errors, make_folder, sync, write_json
from gristmill.core.tensors import write_tensors
from gristmill.data.find_format import guess_format, matching_formats
from gristmill.data.rows import ATTRIBUTES
from gristmill.data.tokenizer import FILES, TEMPLATES, Tokenizer, named_ends
from gristmill.model.config import ModelConfig
from gristmill.model.guard import GuardModel
from gristmill.model.hf import INDEX_FILE, SINGLE_FILE, check_vocabulary
from gristmill.model.hf_config import to_hf
from gristmill.model.hf_tensors import EMBEDDING, Rows, guard_rows, hf_rows, joined, reward_rows
from gristmill.model.quantized import INT4_GROUP, Quantize, compress, is_quantized, quantization_config
from gristmill.model.reward import RewardModel
from gristmill.model.transformer import Transformer

# Beside the safetensors, all that a folder written here holds; only such a folder is ever replaced.
SMALL_FILES = ("config.json", *FILES, INDEX_FILE)
MAX_SHARD_BYTES = 5 * 1000**3


def save_model(model: Transformer, tokenizer: Tokenizer, folder: Path | str, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write a folder that `load_model` and every reader of Hugging Face folders understands.

    Values keep the parameters' dtype. An earlier model of the same name is replaced. Where layers differ or lack a part,
    config.json holds them under "gristmill" and names an architecture that only `load_model` reads and others refuse.

    Raises:
        InputError: the folder holds more than a model, the tokenizer does not fit, or the disk is full.
    """
    save_folder(hf_rows(model), model.config, {}, tokenizer=tokenizer, folder=folder, max_shard_bytes=max_shard_bytes)


def save_quantized(
    model: Transformer, tokenizer: Tokenizer, folder: Path | str, *, kind: Quantize, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """As `save_model`, with the layers' matrices quantized in compressed-tensors' form; all else keeps its dtype.

    Raises:
        InputError: as `save_model`.
    """
    tensors, extra = compress_tensors(hf_rows(model), kind), {"quantization_config": quantization_config(kind)}
    save_folder(tensors, model.config, extra, tokenizer=tokenizer, folder=folder, max_shard_bytes=max_shard_bytes)


def compress_tensors(
    named: Mapping[str, Rows], kind: Quantize, dtype: torch.dtype | None = None, *, group: int = INT4_GROUP
) -> dict[str, Tensor]:
    """Tensors as a quantized folder holds them; those that are not quantized in `dtype` (None: as they are)."""
    tensors: dict[str, Tensor] = {}
    for name, rows in named.items():
        tensor = joined(rows)
        tensors |= (
            compress(name, tensor, kind, group=group) if is_quantized(name) else {name: tensor if dtype is None else tensor.to(dtype)}
        )
    return tensors


def save_reward(model: RewardModel, tokenizer: Tokenizer, folder: Path | str, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write a reward model: as `save_model`, plus the tensors reward_head.weight and reward_head.bias and the
    keys reward_attributes and reward_weights in config.json.

    Raises:
        InputError: as `save_model`.
    """
    extra = {"reward_attributes": list(ATTRIBUTES), "reward_weights": list(model.weights)}
    save_folder(reward_rows(model), model.backbone.config, extra, tokenizer=tokenizer, folder=folder, max_shard_bytes=max_shard_bytes)


def save_guard(model: GuardModel, tokenizer: Tokenizer, folder: Path | str, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write a guard model: as `save_model`, plus the tensors guard_head.weight and guard_head.bias and the keys guard_codes,
    guard_thresholds and guard_caution in config.json.

    Raises:
        InputError: as `save_model`.
    """
    extra = {"guard_codes": list(model.codes), "guard_thresholds": list(model.thresholds), "guard_caution": model.caution}
    save_folder(guard_rows(model), model.backbone.config, extra, tokenizer=tokenizer, folder=folder, max_shard_bytes=max_shard_bytes)


def save_folder(
    tensors: Mapping[str, Tensor | Rows],
    config: ModelConfig,
    extra: dict[str, Any],
    *,
    tokenizer: Tokenizer,
    folder: Path | str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write tensors by Hugging Face's names, config.json with `extra` keys, and the tokenizer.

    Raises:
        InputError: as `save_model`.
    """
    folder = Path(folder)
    check_vocabulary(config, tokenizer, folder)
    dtype = str(_rows(tensors[EMBEDDING])[0].dtype).removeprefix("torch.")
    hf = to_hf(config) | {"torch_dtype": dtype} | tokenizer.special_ids() | {"eos_token_id": tokenizer.eos_id} | extra
    formats = matching_formats(tokenizer)
    if not tokenizer.files and len(formats) == 1:  # one that was made here, for a format
        tokenizer = tokenizer.with_chat_template(formats[0].template, cut=True)
    with new_folder(folder) as new:
        tokenizer.save(new)
        write_json(new / "config.json", hf)
        if (generation := _generation_config(tokenizer)) is not None:
            write_json(new / "generation_config.json", generation)
        _write_shards(tensors, new, max_shard_bytes)


def _generation_config(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """What tells other programs where to stop; None where the tokenizer's own file says all that is due."""
    given = tokenizer.generation_config()
    ends = [*tokenizer.end_ids, tokenizer.eos_id]
    if tokenizer.chat_templates:
        with suppress(InputError):  # a template that cannot be used has no end of its own
            ends.append(guess_format(tokenizer).end_of_turn_id(tokenizer))
    if set(ends) <= set(named_ends(given)):
        return None
    ends = list(dict.fromkeys(ends))
    return given | {"eos_token_id": ends if tokenizer.chat_templates or len(ends) > 1 else ends[0]}


def _rows(tensor: Tensor | Rows) -> Rows:
    return [tensor] if isinstance(tensor, Tensor) else tensor


def _write_shards(tensors: Mapping[str, Tensor | Rows], folder: Path, max_shard_bytes: int) -> None:
    shards: list[dict[str, Tensor | Rows]] = [{}]
    filled = total = 0
    for name, tensor in tensors.items():
        size = sum(rows.nbytes for rows in _rows(tensor))
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled, total = filled + size, total + size
    count = len(shards)
    files = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        files = [SINGLE_FILE]
    for file, shard in zip(files, shards, strict=True):
        write_tensors(folder / file, shard, {"format": "pt"})
    if count > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _is_ours(path: Path, small_files: Sequence[str]) -> bool:
    templates = path.name == TEMPLATES and path.is_dir() and all(one.suffix == ".jinja" for one in path.iterdir())
    return path.name in small_files or path.name.endswith(".safetensors") or templates


@contextmanager
def new_folder(folder: Path, small_files: Sequence[str] = SMALL_FILES) -> Iterator[Path]:
    """A temporary folder beside `folder` that replaces it if the body succeeds and vanishes if it fails."""
    with disk_errors(folder):
        is_free = not folder.exists() or (folder.is_dir() and all(_is_ours(path, small_files) for path in folder.iterdir()))
    if not is_free:
        raise InputError(f"Choose another folder than {folder}: it holds more than a saved model.")
    folder = Path(os.path.abspath(folder))  # "." and ".." have no name of their own
    new, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    try:
        shutil.rmtree(new, ignore_errors=True)  # what a killed process may have left
        shutil.rmtree(old, ignore_errors=True)
        make_folder(new)
        yield new
        if folder.exists():  # a folder that is not empty cannot be renamed over
            folder.rename(old)
        new.rename(folder)
        sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise InputError(f"Free some space or choose a writable place for {folder}: {error}.") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
