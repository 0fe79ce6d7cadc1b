"""Model folders written again: with the tokens of a chat format, or quantized."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gristmill.core.errors import InputError
from gristmill.data.chat_format import FORMATS
from gristmill.data.thinking import CLOSE, OPEN, hidden_tag
from gristmill.data.tokenizer import Tokenizer
from gristmill.model.hf import load_model, saved_as, stored_dtype
from gristmill.model.hf_config import read_config
from gristmill.model.hf_save import compress_tensors, save_folder, save_model
from gristmill.model.hf_tensors import Rows, block_rows, hf_rows
from gristmill.model.quantized import INT4_GROUP, INT4_GROUPS, Quantize, check_widths, quantization_config
from gristmill.model.transformer import PRECISIONS, Block, Transformer


@torch.no_grad()
def resize_embeddings(model: Transformer, num_tokens: int, new: Sequence[int]) -> None:
    """Give a model rows for further tokens, in the embedding and the output matrix: each the mean of the rows of the other tokens.

    Args:
        num_tokens: ids that the tokenizer has, the new ones included; rows beyond them, which pad published models, are kept.
        new: ids of the new tokens.
    """
    rows = max(model.config.vocab_size, num_tokens)
    old = [token for token in range(min(num_tokens, model.config.vocab_size)) if token not in set(new)]

    def resized(matrix: Tensor) -> nn.Parameter:
        out = matrix.new_zeros(rows, matrix.shape[1])
        out[: len(matrix)] = matrix
        out[list(new)] = matrix[old].float().mean(0).to(matrix.dtype)
        return nn.Parameter(out)

    model.embedding = resized(model.embedding)
    if model.lm_head is not None:
        model.lm_head.weight = resized(model.lm_head.weight)
    model.config = replace(model.config, vocab_size=rows)


def add_chat_tokens(folder: Path, out: Path, name: str) -> dict[str, Any]:
    """Write a Base again with the control tokens of a chat format, rows for them, and its chat template.

    Raises:
        InputError: the folder has a chat template already, or is no language model.
    """
    if name not in FORMATS:
        raise InputError(f"Unknown chat format {name!r}: choose one of {', '.join(FORMATS)}.")
    if out.resolve() == folder.resolve():
        raise InputError(f"Choose another --out than the model itself: {folder} would be replaced.")
    if saved_as(folder):
        raise InputError(f"Give the model as it was before it was quantized: {folder} is quantized.")
    if Tokenizer.load(folder).chat_templates:
        raise InputError(f"{folder} brings a chat template already: it needs no tokens for another.")
    model, tokenizer = load_model(folder, _kept_dtype(folder))
    more = tokenizer.with_tokens(FORMATS[name].special_tokens)
    new = [more.special_id(token) for token in FORMATS[name].special_tokens if not tokenizer.has(token)]
    resize_embeddings(model, more.max_id + 1, new)
    save_model(model, more.with_chat_template(FORMATS[name].template, cut=True), out)
    return {"model": str(out), "chat_format": name, "added": len(new), "embeddings": model.config.vocab_size}


def add_thinking_tokens(folder: Path, out: Path) -> dict[str, Any]:
    """Write a model again in whose vocabulary the tags of thinking are a token each, with rows for them; how many were added.

    Raises:
        InputError: the folder is quantized or is no language model, or a tag is a control token there.
    """
    if saved_as(folder):
        raise InputError(f"Give the model as it was before it was quantized: {folder} is quantized.")
    if (tag := hidden_tag(Tokenizer.load(folder))) is not None:
        raise InputError(
            f"{folder}: {tag} is a control token there, which no answer shows and none is trained on: "
            'set "special": false for it in tokenizer.json.'
        )
    model, tokenizer = load_model(folder, _kept_dtype(folder))
    names = [tag for tag in (OPEN, CLOSE) if len(tokenizer.encode(tag)) > 1]
    if names:
        tokenizer = tokenizer.with_tokens(names, special=False)
        resize_embeddings(model, tokenizer.max_id + 1, [tokenizer.encode(name)[0] for name in names])
    save_model(model, tokenizer, out)
    return {"num_added": len(names), "embeddings": model.config.vocab_size}


def _kept_dtype(folder: Path) -> torch.dtype:
    """What a folder is written again in: bf16 where it is stored so, else fp32."""
    return torch.bfloat16 if stored_dtype(folder) == torch.bfloat16 else torch.float32


def quantize_folder(folder: Path, out: Path, kind: Quantize, *, dtype: str, group: int = INT4_GROUP) -> dict[str, Any]:
    """Write a model folder again with its layers' matrices quantized, all else in `dtype`; `group` of int4."""
    if group not in INT4_GROUPS:
        raise InputError(f"Choose a --group of {', '.join(map(str, INT4_GROUPS))} columns: {group} is none.")
    if out.resolve() == folder.resolve():
        raise InputError(f"Choose another --out than the model itself: {folder} would be replaced.")
    if saved_as(folder):
        raise InputError(f"Give the model as it was before it was quantized: {folder} is quantized already.")
    if kind == "int4":
        check_widths(read_config(folder)[1], group)
    held: dict[str, Tensor] = {}
    num_blocks = 0

    def compress_block(block: Block) -> None:  # before the next is read
        nonlocal num_blocks
        named = {f"model.layers.{num_blocks}.{name}": rows for name, rows in block_rows(block).items()}
        held.update(compress_tensors(named, kind, PRECISIONS[dtype], group=group))
        block.to("meta")
        num_blocks += 1

    model, tokenizer = load_model(folder, PRECISIONS[dtype], on_block=compress_block)
    tensors: dict[str, Tensor | Rows] = {
        name: held.get(name, rows) for name, rows in hf_rows(model).items() if name in held or not rows[0].is_meta
    }
    tensors |= held
    save_folder(tensors, model.config, {"quantization_config": quantization_config(kind, group)}, tokenizer=tokenizer, folder=out)
    return {"model": str(out), "quantize": kind, "bytes": sum(path.stat().st_size for path in out.glob("*.safetensors"))}
