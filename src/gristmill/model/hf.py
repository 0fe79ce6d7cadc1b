"""Hugging Face model folders, read and written: config.json, safetensors, generation_config.json, the tokenizer.

Every folder is written beside its target, flushed, and renamed into place, so a half-written model is never
seen. Nothing is ever unpickled.
"""

import errno
import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gristmill.core.device import free_memory, returned_at_once, trim_heap
from gristmill.core.errors import InputError
from gristmill.core.io import disk_errors, make_folder, sync, write_json
from gristmill.core.tensors import Place, places, write_tensors
from gristmill.core.untrusted import is_bare_name, quoted, quoted_path, read_untrusted_json
from gristmill.data.chat import FORMATS, guess_format, matching_formats
from gristmill.data.rows import ATTRIBUTES
from gristmill.data.tokenizer import FILES, TEMPLATES, Tokenizer
from gristmill.model.config import ModelConfig
from gristmill.model.folder import model_file
from gristmill.model.guard import GuardModel
from gristmill.model.hf_config import from_hf, read_config, to_hf
from gristmill.model.quantized import (
    INT4_GROUP,
    INT4_GROUPS,
    Quantize,
    check_widths,
    compress,
    decompress,
    is_quantized,
    kind_of,
    quantization_config,
    scale_name,
    stored_as,
)
from gristmill.model.reward import REWARD_WEIGHTS, RewardModel
from gristmill.model.transformer import PRECISIONS, Block, Linear, Transformer

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Beside the safetensors, all that a folder written here holds; only such a folder is ever replaced.
SMALL_FILES = ("config.json", *FILES, INDEX_FILE)
MAX_SHARD_BYTES = 5 * 1000**3
# Published embeddings are padded to a multiple of 128, 256 or 512 beyond the tokenizer's ids.
MAX_VOCAB_PADDING = 511

# Largest header of a safetensors file that is read; those of published models with ten thousand tensors have 1 MB.
MAX_HEADER_BYTES = 4 << 20
# Largest root mean square of a tensor's values; trained weights stay below 10, biases below some hundreds.
MAX_RMS = 1e4
CHECKED_VALUES = 1 << 18  # at a time while they are copied, so that they are still in the cache

MISFIT = "Use a checkpoint whose tensors fit its config.json"
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
AnyModel = TypeVar("AnyModel", bound=nn.Module)


# ---- names: our parameters, or row ranges of them, under Hugging Face's names ----


def hf_tensors(model: Transformer) -> dict[str, Tensor]:
    """Hugging Face names to views of the model's parameters; writing into a view changes the model."""
    named = {EMBEDDING: model.embedding.detach()}
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        named.update({f"model.layers.{index}.{name}": view for name, view in _block_tensors(block).items()})
    named.update(_vectors("model.norm", model.final_norm))
    if model.lm_head is not None:
        named[OUTPUT] = model.lm_head.weight.detach()
    return named


def _block_tensors(block: Block) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    attention, mlp = block.attention, block.mlp
    if attention is not None:
        named.update(_vectors("input_layernorm", block.attention_norm))
        rows = [heads * attention.head_dim for heads in (attention.num_heads, *(attention.num_kv_heads,) * 2)]
        for kind, merged in _parts("", attention.qkv).items():
            views = {"qkv": merged} if block.fused else dict(zip("qkv", merged.split(rows), strict=True))
            named |= {f"self_attn.{name}_proj{kind}": view for name, view in views.items()}
        named |= _parts("self_attn.o_proj", attention.output)
        named |= _vectors("self_attn.q_norm", attention.q_norm) | _vectors("self_attn.k_norm", attention.k_norm)
        named |= _vectors("post_attention_layernorm", block.attention_post_norm)
    if mlp is not None:
        has_post_norm = block.mlp_post_norm is not None
        named |= _vectors("pre_feedforward_layernorm" if has_post_norm else "post_attention_layernorm", block.mlp_norm)
        for name, linear in {"gate_up": mlp.gate_up, "gate": mlp.gate, "up": mlp.up, "down": mlp.down}.items():
            named |= {} if linear is None else _parts(f"mlp.{name}_proj", linear)
        named |= _vectors("post_feedforward_layernorm", block.mlp_post_norm)
    return named


def _parts(name: str, linear: Linear) -> dict[str, Tensor]:
    """Weight of a linear layer, and its bias if it has one."""
    weight = {f"{name}.weight": linear.weight.detach()}
    return weight if linear.bias is None else weight | {f"{name}.bias": linear.bias.detach()}


def _vectors(prefix: str, norm: nn.Module | None) -> dict[str, Tensor]:
    return {} if norm is None else {f"{prefix}.{name}": parameter.detach() for name, parameter in norm.named_parameters()}


def _reward_tensors(model: RewardModel) -> dict[str, Tensor]:
    head = {"reward_head.weight": model.head.weight.detach(), "reward_head.bias": model.head.bias.detach()}
    return hf_tensors(model.backbone) | head


def _guard_tensors(model: GuardModel) -> dict[str, Tensor]:
    return hf_tensors(model.backbone) | {"guard_head.weight": model.head.weight.detach(), "guard_head.bias": model.head.bias.detach()}


# ---- saving ----


def save_model(model: Transformer, tokenizer: Tokenizer, folder: Path | str, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write a folder that `load_model` and every reader of Hugging Face folders understands.

    Values keep the parameters' dtype. An earlier model of the same name is replaced. Where layers differ or lack a part,
    config.json holds them under "gristmill" and names an architecture that only `load_model` reads and others refuse.

    Raises:
        InputError: the folder holds more than a model, the tokenizer does not fit, or the disk is full.
    """
    _save(hf_tensors(model), model.config, {}, tokenizer, Path(folder), max_shard_bytes)


def save_quantized(
    model: Transformer, tokenizer: Tokenizer, folder: Path | str, *, kind: Quantize, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """As `save_model`, with the layers' matrices quantized in compressed-tensors' form; all else keeps its dtype.

    Raises:
        InputError: as `save_model`.
    """
    tensors = _compressed(hf_tensors(model), kind)
    _save(tensors, model.config, {"quantization_config": quantization_config(kind)}, tokenizer, Path(folder), max_shard_bytes)


def _compressed(
    named: dict[str, Tensor], kind: Quantize, dtype: torch.dtype | None = None, *, group: int = INT4_GROUP
) -> dict[str, Tensor]:
    """Tensors as a quantized folder holds them; those that are not quantized in `dtype` (None: as they are)."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in named.items():
        tensors |= (
            compress(name, tensor, kind, group=group) if is_quantized(name) else {name: tensor if dtype is None else tensor.to(dtype)}
        )
    return tensors


def saved_as(folder: Path | str) -> Quantize:
    """How the model of a folder is quantized; "" if it is not.

    Raises:
        InputError: there is no model, or it is quantized in a way that is not read here.
    """
    return kind_of(read_untrusted_json(model_file(Path(folder), "config.json")))


def save_reward(model: RewardModel, tokenizer: Tokenizer, folder: Path | str, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write a reward model: as `save_model`, plus the tensors reward_head.weight and reward_head.bias and the
    keys reward_attributes and reward_weights in config.json.

    Raises:
        InputError: as `save_model`.
    """
    extra = {"reward_attributes": list(ATTRIBUTES), "reward_weights": list(model.weights)}
    _save(_reward_tensors(model), model.backbone.config, extra, tokenizer, Path(folder), max_shard_bytes)


def save_guard(model: GuardModel, tokenizer: Tokenizer, folder: Path | str, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write a guard model: as `save_model`, plus the tensors guard_head.weight and guard_head.bias and the keys guard_codes,
    guard_thresholds and guard_caution in config.json.

    Raises:
        InputError: as `save_model`.
    """
    extra = {"guard_codes": list(model.codes), "guard_thresholds": list(model.thresholds), "guard_caution": model.caution}
    _save(_guard_tensors(model), model.backbone.config, extra, tokenizer, Path(folder), max_shard_bytes)


def _save(
    tensors: dict[str, Tensor],
    config: ModelConfig,
    extra: dict[str, Any],
    tokenizer: Tokenizer,
    folder: Path,
    max_shard_bytes: int,
) -> None:
    _check_vocabulary(config, tokenizer, folder)
    dtype = str(tensors[EMBEDDING].dtype).removeprefix("torch.")
    hf = to_hf(config) | {"torch_dtype": dtype} | tokenizer.special_ids() | {"eos_token_id": tokenizer.eos_id} | extra
    formats = matching_formats(tokenizer)
    if not tokenizer.files and len(formats) == 1:  # one that was made here, for a format
        tokenizer = tokenizer.with_chat_template(formats[0].template, cut=True)
    with _new_folder(folder) as new:
        tokenizer.save(new)
        write_json(new / "config.json", hf)
        if (generation := _generation_config(tokenizer)) is not None:
            write_json(new / "generation_config.json", generation)
        _write_shards(tensors, new, max_shard_bytes)


def _generation_config(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """What tells other programs where to stop; None where the tokenizer's own file says all that is due."""
    given = tokenizer.generation_config()
    ends = [tokenizer.eos_id]
    if tokenizer.chat_templates:
        with suppress(InputError):  # a template that cannot be used has no end of its own
            ends.append(guess_format(tokenizer).end_of_turn_id(tokenizer))
    if given and set(ends) <= set(tokenizer.end_ids):
        return None
    ends = list(dict.fromkeys([*tokenizer.end_ids, *ends]))
    return given | {"eos_token_id": ends if tokenizer.chat_templates or len(ends) > 1 else ends[0]}


def _write_shards(tensors: dict[str, Tensor], folder: Path, max_shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    count = len(shards)
    files = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        files = [SINGLE_FILE]
    for file, shard in zip(files, shards, strict=True):
        write_tensors(folder / file, shard, {"format": "pt"})
    if count > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _is_ours(path: Path, small_files: Sequence[str]) -> bool:
    templates = path.name == TEMPLATES and path.is_dir() and all(one.suffix == ".jinja" for one in path.iterdir())
    return path.name in small_files or path.name.endswith(".safetensors") or templates


@contextmanager
def _new_folder(folder: Path, small_files: Sequence[str] = SMALL_FILES) -> Iterator[Path]:
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


# ---- loading ----


OnBlock = Callable[[Block], None]


def load_model(
    folder: Path | str,
    dtype: torch.dtype = torch.float32,
    *,
    vector_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    on_block: OnBlock | None = None,
) -> tuple[Transformer, Tokenizer]:
    """Read a model folder; parameters and `compute_dtype` become `dtype`, quantized ones too (see `saved_as`).

    Each tensor is mapped and copied by itself, block after block, so that memory holds the weights once.

    Args:
        vector_dtype: of norms and biases; None for `dtype`. What only generates keeps them in fp32.
        on_block: is given each block when it is read, in fp32. What it moves to the meta device makes room for the next.

    Raises:
        InputError: the folder or a file is absent or damaged, the architecture is not supported, a tensor is
            missing, unexpected or misshapen, the tokenizer belongs to another model, or the memory is not enough.
    """
    folder = Path(folder)
    hf, config, tokenizer = _read_descriptions(folder)
    if "reward_weights" in hf:
        raise InputError(f"Choose a language model instead of {folder}: it holds a reward model.")
    if "guard_codes" in hf:
        raise InputError(f"Choose a language model instead of {folder}: it holds a guard model.")
    with torch.device("meta"):
        model = Transformer(config)
    model.compute_dtype = dtype
    set_dtypes(model, dtype, vector_dtype)
    return _fill(model, hf_tensors, folder, hf=hf, device=torch.device(device), on_block=on_block), tokenizer


def load_reward(
    folder: Path | str, dtype: torch.dtype = torch.float32, *, vector_dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[RewardModel, Tokenizer]:
    """Read a reward model folder; see `load_model`. The head stays in fp32, in which it computes.

    Raises:
        InputError: as `load_model`, or the folder holds no reward head for our attributes.
    """
    folder = Path(folder)
    hf, config, tokenizer = _read_descriptions(folder)
    attributes = hf.get("reward_attributes", list(ATTRIBUTES))
    if attributes != list(ATTRIBUTES):
        raise InputError(f"Use a reward model that scores {', '.join(ATTRIBUTES)}: {folder} scores {quoted(attributes)}.")
    with torch.device("meta"):
        backbone = Transformer(config)
    backbone.compute_dtype = dtype
    model = RewardModel(backbone, hf.get("reward_weights", REWARD_WEIGHTS["nemotron4-340b"]))
    set_dtypes(backbone, dtype, vector_dtype)
    return _fill(model, _reward_tensors, folder, hf=hf, device=torch.device(device)), tokenizer


def load_guard(
    folder: Path | str, dtype: torch.dtype = torch.float32, *, vector_dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[GuardModel, Tokenizer]:
    """Read a guard model folder; see `load_model`. The head stays in fp32, in which it computes.

    Raises:
        InputError: as `load_model`, or the folder holds no guard head.
    """
    folder = Path(folder)
    hf, config, tokenizer = _read_descriptions(folder)
    if "guard_codes" not in hf:
        raise InputError(f"Choose the folder of a guard model instead of {folder}: it has no guard_codes (`gristmill train guard`).")
    with torch.device("meta"):
        backbone = Transformer(config)
    backbone.compute_dtype = dtype
    codes, thresholds = hf["guard_codes"], hf.get("guard_thresholds", [])
    model = GuardModel(backbone, codes, thresholds=thresholds, caution=hf.get("guard_caution", ""))
    set_dtypes(backbone, dtype, vector_dtype)
    return _fill(model, _guard_tensors, folder, hf=hf, device=torch.device(device)), tokenizer


def set_dtypes(model: Transformer, dtype: torch.dtype, vector_dtype: torch.dtype | None) -> None:
    """Cast matrices to a type, and norms and biases to another (None: the same)."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype if parameter.ndim == 2 else vector_dtype or dtype)


def fingerprint(folder: Path | str) -> str:
    """Hash of the weights and config.json of a model folder, for caches and run folders.

    Raises:
        InputError: the folder holds no model.
    """
    folder = Path(folder)
    digest = hashlib.blake2b(digest_size=8)
    for path in [model_file(folder, "config.json"), *_weight_files(folder)]:
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest())
    return digest.hexdigest()


def _read_descriptions(folder: Path) -> tuple[dict[str, Any], ModelConfig, Tokenizer]:
    hf, config = read_config(folder)
    tokenizer = Tokenizer.load(folder)
    trim_heap()
    _check_vocabulary(config, tokenizer, folder)
    return hf, config, tokenizer


def _check_vocabulary(config: ModelConfig, tokenizer: Tokenizer, folder: Path) -> None:
    if not 0 <= config.vocab_size - tokenizer.vocab_size <= MAX_VOCAB_PADDING:
        raise InputError(
            f"Use the tokenizer that belongs to {folder}: the model has {config.vocab_size} embeddings, the "
            f"tokenizer {tokenizer.vocab_size} tokens."
        )
    if tokenizer.max_id >= config.vocab_size:
        raise InputError(
            f"Use the tokenizer that belongs to {folder}: the model has {config.vocab_size} embeddings, and a token has the id "
            f"{tokenizer.max_id}."
        )


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file() or not index.is_file():  # in this order, as transformers
        return [model_file(folder, SINGLE_FILE)]
    weight_map = read_untrusted_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"Download or save {index} again: it has no weight_map from tensors to files.")
    for name in weight_map.values():
        if not is_bare_name(name) or not name.endswith(".safetensors"):
            raise InputError(f"Download or save {index} again: {quoted(name)} is no name of a safetensors file in its folder.")
    return [model_file(folder, name) for name in sorted(set(weight_map.values()))]


def _open(path: Path, stack: ExitStack) -> Any:
    """A safetensors file of which nothing but the header is read."""
    with _damage(path), path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise InputError(f"Fetch {path} with `git lfs pull`: it is a pointer to the file.")
        if (length := int.from_bytes(start, "little")) > MAX_HEADER_BYTES:
            raise InputError(f"Download or save {path} again: it is no safetensors file, or has a header of {length:,} bytes.")
        return stack.enter_context(safe_open(path, framework="pt"))


def _fill(
    model: AnyModel,
    tensors: Callable[[AnyModel], dict[str, Tensor]],
    folder: Path,
    *,
    hf: dict[str, Any],
    device: torch.device,
    on_block: OnBlock | None = None,
) -> AnyModel:
    """Give a model on the meta device memory and the tensors of a folder; names, types and shapes are compared before any is read.

    Args:
        tensors: Hugging Face names to views of the model's parameters.
    """
    kind, tied = kind_of(hf), from_hf(hf).tie_embeddings
    files: dict[str, Path] = {}
    lies: dict[str, Place] = {}
    with ExitStack() as stack:
        found: dict[str, Any] = {}  # the file that holds a name
        for path in _weight_files(folder):
            file = _open(path, stack)
            with _damage(path):
                lies |= places(path)
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                if name in found:
                    raise InputError(f"{MISFIT}: {path} has {_shown(name)} a second time.")
                found[name], files[name] = file, path
        stored = _check_headers(found, tensors(model), folder, kind=kind, tied=tied)
    backbone = cast(Transformer, getattr(model, "backbone", model))
    if on_block is not None:
        backbone.blocks.float()
    _check_memory(model, backbone.blocks, folder, device=device, quantized=on_block is not None)

    def read(name: str) -> Tensor:  # a file is mapped for one tensor, or its pages would stay in memory
        with safe_open(files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def fill(module: nn.Module, *, recurse: bool) -> None:
        module.to_empty(device="cpu", recurse=recurse)
        for name, view in tensors(model).items():
            if name in stored and not view.is_meta:
                parts = stored.pop(name)
                with _damage(folder):
                    if len(parts) > 1:
                        _copy(view, decompress(name, kind, read), f"{folder} has {name}")
                    else:  # mapped, or read whole, it would be held beside its copy
                        _copy_pieces(view, lies[name].pieces(CHECKED_VALUES), f"{folder} has {name}")

    with returned_at_once():
        in_blocks = set(backbone.blocks.modules())
        others = [module for module in model.modules() if module not in in_blocks]
        for module in others:
            fill(module, recurse=False)
        if tied and OUTPUT in files and not torch.equal(read(OUTPUT), read(EMBEDDING)):  # which others read in different ways
            raise InputError(f"Set tie_word_embeddings to false in {folder}: its {OUTPUT} is another matrix than {EMBEDDING}.")
        for module in others:
            module._apply(lambda tensor: tensor.to(device), recurse=False)
        for block in backbone.blocks:
            assert isinstance(block, Block)
            fill(block, recurse=True)
            block.to(device)
            if on_block is not None:
                on_block(block)
    return model


def _check_headers(found: dict[str, Any], expected: dict[str, Tensor], folder: Path, *, kind: Quantize, tied: bool) -> dict[str, list[str]]:
    """Compare what the headers of files say with what a model needs; for each of its tensors, the names of those that stand for it."""
    stored: dict[str, list[str]] = {}
    known: set[str] = set()
    wrong = ""  # told when no name is missing or unexpected
    for name, view in expected.items():
        parts = stored_as(name, kind if scale_name(name) in found else "", view.shape)
        stored[name] = list(parts)
        known.update(parts)
        for part, (dtypes, shapes) in parts.items():
            if wrong or part not in found:
                continue
            with _damage(folder):
                header = found[part].get_slice(part)
                dtype, shape = header.get_dtype(), header.get_shape()
            if dtype not in dtypes:
                scales = "" if dtype.startswith("F") and dtype[1:].isdigit() else " without its scales" if len(parts) == 1 else ""
                wrong = f"{MISFIT}: {folder} has {part} in {quoted(dtype)[1:-1]}{scales}."
            elif shape not in shapes:
                wrong = f"{MISFIT}: {folder} has {part} in shape {quoted(shape)}, not {shapes[0]}."
    # Some published files repeat the tied output matrix, old ones store the rotary frequencies.
    redundant = (n for n in found if n.endswith("rotary_emb.inv_freq") or (tied and n == OUTPUT))
    if strange := sorted(found.keys() - known - set(redundant)):
        raise InputError(f"{MISFIT}: {folder} has an unexpected tensor {_shown(strange[0])} ({len(strange)} in all).")
    if missing := sorted(known - found.keys()):
        raise InputError(f"{MISFIT}: {folder} lacks {', '.join(missing[:3])} ({len(missing)} in all).")
    if wrong:
        raise InputError(wrong)
    return stored


def _shown(name: str) -> str:
    return quoted(name)[1:-1]


def _check_memory(model: nn.Module, blocks: nn.ModuleList, folder: Path, *, device: torch.device, quantized: bool) -> None:
    """InputError where the weights are more than the memory that is free (`quantized`: the blocks in eight bits)."""

    def size(module: nn.Module) -> int:
        return sum(parameter.nbytes for parameter in module.parameters())

    needed = size(model)
    if quantized:
        needed -= size(blocks) * 3 // 4 - max((size(block) for block in blocks), default=0)
    if needed > (free := free_memory(device)):
        widest = max((parameter.dtype for parameter in model.parameters()), key=lambda dtype: dtype.itemsize)
        taken = f"{needed / 1e9:,.1f} GB{'' if quantized else ' in ' + str(widest).removeprefix('torch.')}"
        less = "" if quantized else "int8, " if widest != torch.float32 else "bf16 (half of that), int8, "
        raise InputError(
            f"{folder} does not fit: its weights take {taken}, and {free / 1e9:,.1f} GB of memory are free. "
            f"Use {less}{'or ' if less else ''}a smaller model, or a machine with more memory."
        )


def _copy(view: Tensor, tensor: Tensor, what: str) -> None:
    """Copy a tensor, refusing values that are not finite or are beyond what any training makes."""
    if tensor.shape != view.shape:
        raise InputError(f"{MISFIT}: {what} in shape {list(tensor.shape)}, not {list(view.shape)}.")
    _copy_pieces(view, tensor.reshape(-1).split(CHECKED_VALUES), what)


def _copy_pieces(view: Tensor, pieces: Iterable[Tensor], what: str) -> None:
    """The same of CHECKED_VALUES at a time."""
    total = 0.0
    for to, values in zip(view.view(-1).split(CHECKED_VALUES), pieces, strict=True):
        to.copy_(values)
        total += float(torch.dot(to, to) if to.dtype == torch.float32 else torch.linalg.vector_norm(to, dtype=torch.float32) ** 2)
    if not math.isfinite(total):
        raise InputError(f"Download or train the model again: {what} with values that are not finite, or too large to compute with.")
    if (rms := math.sqrt(total / view.numel())) > MAX_RMS:
        raise InputError(f"Download or train the model again: {what} with values of {rms:.1e}, beyond what any training makes.")


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, RuntimeError, IndexError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        if f"({errno.ENOMEM})" in str(error):
            free = f"{free_memory(torch.device('cpu')) / 1e9:,.1f} GB are free"
            raise InputError(f"{quoted_path(path)} does not fit into the memory that this process may take (ulimit -v): {free}.") from None
        why = "".join(c for c in str(error) if c.isprintable())[:200]  # it may quote the file
        raise InputError(f"Download or save {quoted_path(path)} again: a file is damaged ({why}).") from None


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
    model, tokenizer = load_model(folder, PRECISIONS["bf16"] if _is_bf16(folder) else torch.float32)
    more = tokenizer.with_tokens(FORMATS[name].special_tokens)
    new = [more.special_id(token) for token in FORMATS[name].special_tokens if not tokenizer.has(token)]
    resize_embeddings(model, more.max_id + 1, new)
    save_model(model, more.with_chat_template(FORMATS[name].template, cut=True), out)
    return {"model": str(out), "chat_format": name, "added": len(new), "embeddings": model.config.vocab_size}


def _is_bf16(folder: Path) -> bool:
    hf = read_untrusted_json(model_file(folder, "config.json"))
    return "bfloat16" in (hf.get("dtype"), hf.get("torch_dtype"))


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
        named = {f"model.layers.{num_blocks}.{name}": view for name, view in _block_tensors(block).items()}
        held.update(_compressed(named, kind, PRECISIONS[dtype], group=group))
        block.to("meta")
        num_blocks += 1

    model, tokenizer = load_model(folder, PRECISIONS[dtype], on_block=compress_block)
    tensors = {name: held.get(name, view) for name, view in hf_tensors(model).items() if name in held or not view.is_meta} | held
    _save(tensors, model.config, {"quantization_config": quantization_config(kind, group)}, tokenizer, out, MAX_SHARD_BYTES)
    return {"model": str(out), "quantize": kind, "bytes": sum(path.stat().st_size for path in out.glob("*.safetensors"))}
