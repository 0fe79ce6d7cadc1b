"""Hugging Face model folders, read: config.json, safetensors, the tokenizer. Nothing is ever unpickled."""

import errno
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gristmill.core.device import Arena, free_memory, returned_at_once, trim_heap
from gristmill.core.errors import InputError
from gristmill.core.tensors import Place, places
from gristmill.core.untrusted import is_bare_name, quoted, quoted_path, read_untrusted_json
from gristmill.data.rows import ATTRIBUTES
from gristmill.data.tokenizer import Tokenizer
from gristmill.model.config import ModelConfig
from gristmill.model.folder import model_file
from gristmill.model.guard import GuardModel
from gristmill.model.hf_config import from_hf, read_config
from gristmill.model.hf_tensors import EMBEDDING, OUTPUT, Rows, guard_rows, hf_rows, reward_rows
from gristmill.model.quantized import Quantize, decompress, kind_of, scale_name, stored_as
from gristmill.model.reward import REWARD_WEIGHTS, RewardModel
from gristmill.model.transformer import Block, Transformer

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Published embeddings are padded to a multiple of 128, 256 or 512 beyond the tokenizer's ids.
MAX_VOCAB_PADDING = 511

# Largest header of a safetensors file that is read; those of published models with ten thousand tensors have 1 MB.
MAX_HEADER_BYTES = 4 << 20
TRIMMED_VOCABULARY = 16_384  # tokens from which on what their reading leaves is worth a walk over the heap
# Largest root mean square of a tensor's values; trained weights stay below 10, biases below some hundreds.
MAX_RMS = 1e4
CHECKED_VALUES = 1 << 18  # at a time while they are copied, so that they are still in the cache

MISFIT = "Use a checkpoint whose tensors fit its config.json"
AnyModel = TypeVar("AnyModel", bound=nn.Module)


def saved_as(folder: Path | str) -> Quantize:
    """How the model of a folder is quantized; "" if it is not.

    Raises:
        InputError: there is no model, or it is quantized in a way that is not read here.
    """
    return kind_of(read_untrusted_json(model_file(Path(folder), "config.json")))


def stored_dtype(folder: Path | str) -> torch.dtype:
    """The type of a checkpoint: that of its embeddings, which no quantization changes; fp32 where there are none.

    Raises:
        InputError: there is no model, or a file is damaged.
    """
    folder = Path(folder)
    model_file(folder, "config.json")
    for path in _weight_files(folder):
        with ExitStack() as stack:
            open_safetensors(path, stack)  # which checks the header
            with explain_damage(path):
                if (found := places(path).get(EMBEDDING)) is not None:
                    return found.dtype
    return torch.float32


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
    return _fill(model, hf_rows, folder, hf=hf, device=torch.device(device), on_block=on_block), tokenizer


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
    return _fill(model, reward_rows, folder, hf=hf, device=torch.device(device)), tokenizer


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
    return _fill(model, guard_rows, folder, hf=hf, device=torch.device(device)), tokenizer


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
    if tokenizer.vocab_size >= TRIMMED_VOCABULARY:
        trim_heap()
    check_vocabulary(config, tokenizer, folder)
    return hf, config, tokenizer


def check_vocabulary(config: ModelConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """Raise `InputError` unless each of the tokenizer's ids has an embedding, and not many embeddings have none."""
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


def open_safetensors(path: Path, stack: ExitStack) -> Any:
    """A safetensors file of which nothing but the header is read."""
    with explain_damage(path), path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise InputError(f"Fetch {path} with `git lfs pull`: it is a pointer to the file.")
        if (length := int.from_bytes(start, "little")) > MAX_HEADER_BYTES:
            raise InputError(f"Download or save {path} again: it is no safetensors file, or has a header of {length:,} bytes.")
        return stack.enter_context(safe_open(path, framework="pt"))


def _fill(
    model: AnyModel,
    tensors: Callable[[AnyModel], dict[str, Rows]],
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
            file = open_safetensors(path, stack)
            with explain_damage(path):
                lies |= places(path)
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                if name in found:
                    raise InputError(f"{MISFIT}: {path} has {_shown(name)} a second time.")
                found[name], files[name] = file, path
        stored = _check_headers(found, tensors(model), folder, kind=kind, tied=tied)
    backbone = cast(Transformer, getattr(model, "backbone", model))
    if on_block is not None:
        backbone.blocks.float()
    _check_memory(model, backbone.blocks.values(), folder, device=device, quantized=on_block is not None)

    def read(name: str) -> Tensor:  # a file is mapped for one tensor, or its pages would stay in memory
        with safe_open(files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    arena = Arena()

    def place(tensor: Tensor) -> Tensor:
        if device.type == "cpu" and on_block is None:
            return arena.zeros(tensor.shape, tensor.dtype)
        return torch.empty_like(tensor, device="cpu")  # of what goes soon, each for itself

    def fill(module: nn.Module, *, recurse: bool) -> None:
        module._apply(place, recurse=recurse)
        for name, rows in tensors(model).items():
            if name in stored and not rows[0].is_meta:
                parts = stored.pop(name)
                with explain_damage(folder):
                    if len(parts) > 1:
                        _copy_whole(rows, decompress(name, kind, read), f"{folder} has {name}")
                    else:  # mapped, or read whole, it would be held beside its copy
                        _copy_pieces(rows, lies[name].pieces(CHECKED_VALUES), f"{folder} has {name}")

    with returned_at_once():
        in_blocks = set(backbone.blocks.modules())
        others = [module for module in model.modules() if module not in in_blocks]
        for module in others:
            fill(module, recurse=False)
        if tied and OUTPUT in files and not torch.equal(read(OUTPUT), read(EMBEDDING)):  # which others read in different ways
            raise InputError(f"Set tie_word_embeddings to false in {folder}: its {OUTPUT} is another matrix than {EMBEDDING}.")
        for module in others:
            module._apply(lambda tensor: tensor.to(device), recurse=False)
        for block in backbone.blocks.values():
            assert isinstance(block, Block)
            fill(block, recurse=True)
            block.to(device)
            if on_block is not None:
                on_block(block)
    return model


def _check_headers(found: dict[str, Any], expected: dict[str, Rows], folder: Path, *, kind: Quantize, tied: bool) -> dict[str, list[str]]:
    """Compare what the headers of files say with what a model needs; for each of its tensors, the names of those that stand for it."""
    stored: dict[str, list[str]] = {}
    known: set[str] = set()
    wrong = ""  # told when no name is missing or unexpected
    for name, rows in expected.items():
        parts = stored_as(name, kind if scale_name(name) in found else "", (sum(map(len, rows)), *rows[0].shape[1:]))
        stored[name] = list(parts)
        known.update(parts)
        for part, (dtypes, shapes) in parts.items():
            if wrong or part not in found:
                continue
            with explain_damage(folder):
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


def _check_memory(model: nn.Module, blocks: Iterable[nn.Module], folder: Path, *, device: torch.device, quantized: bool) -> None:
    """InputError where the weights are more than the memory that is free (`quantized`: the blocks in eight bits)."""

    def size(module: nn.Module) -> int:
        return sum(parameter.nbytes for parameter in module.parameters())

    needed = size(model)
    if quantized:
        sizes = [size(block) for block in blocks]
        needed -= sum(sizes) * 3 // 4 - max(sizes, default=0)
    if needed > (free := free_memory(device)):
        widest = max((parameter.dtype for parameter in model.parameters()), key=lambda dtype: dtype.itemsize)
        taken = f"{needed / 1e9:,.1f} GB{'' if quantized else ' in ' + str(widest).removeprefix('torch.')}"
        less = "" if quantized else "int8, " if widest != torch.float32 else "bf16 (half of that), int8, "
        raise InputError(
            f"{folder} does not fit: its weights take {taken}, and {free / 1e9:,.1f} GB of memory are free. "
            f"Use {less}{'or ' if less else ''}a smaller model, or a machine with more memory."
        )


def copy_tensor(view: Tensor, tensor: Tensor, what: str) -> None:
    """Copy a tensor, refusing values that are not finite or are beyond what any training makes."""
    _copy_whole([view], tensor, what)


def _copy_whole(rows: Rows, tensor: Tensor, what: str) -> None:
    shape = [sum(map(len, rows)), *rows[0].shape[1:]]
    if list(tensor.shape) != shape:
        raise InputError(f"{MISFIT}: {what} in shape {list(tensor.shape)}, not {shape}.")
    _copy_pieces(rows, tensor.reshape(-1).split(CHECKED_VALUES), what)


def _copy_pieces(rows: Rows, pieces: Iterable[Tensor], what: str) -> None:
    """The same of CHECKED_VALUES at a time."""
    total, places = 0.0, iter([view.view(-1) for view in rows])
    place = next(places)
    for piece in pieces:
        values = piece
        while len(values):
            place = place if len(place) else next(places)
            to = place[: len(values)]
            to.copy_(values[: len(to)])
            total += float(torch.dot(to, to) if to.dtype == torch.float32 else torch.linalg.vector_norm(to, dtype=torch.float32) ** 2)
            place, values = place[len(to) :], values[len(to) :]
    assert not len(place) and next(places, None) is None, "the sizes were compared before"
    if not math.isfinite(total):
        raise InputError(f"Download or train the model again: {what} with values that are not finite, or too large to compute with.")
    if (rms := math.sqrt(total / sum(view.numel() for view in rows))) > MAX_RMS:
        raise InputError(f"Download or train the model again: {what} with values of {rms:.1e}, beyond what any training makes.")


@contextmanager
def explain_damage(path: Path) -> Iterator[None]:
    """Turn what goes wrong in reading a file of tensors into a sentence about it."""
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
