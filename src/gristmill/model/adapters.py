"""Adapter folders in PEFT's form, read and written; models of a folder with the adapter that it may be, merged; merging on disk.

Keys of adapter_model.safetensors: `base_model.model.` + the Hugging Face name of a module + `.lora_A.weight` [r, D],
`.lora_B.weight` [N, r] and with DoRA `.lora_magnitude_vector` [N]. Of adapter_config.json every key is read, known to change nothing, or
refused by its name. gristmill.json beside them says which base it was, and holds the weights of a reward model.
"""

import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gristmill.core.errors import InputError
from gristmill.core.io import write_json
from gristmill.core.tensors import write_tensors
from gristmill.core.untrusted import existing_file, quoted, quoted_path, read_untrusted_json
from gristmill.data.tokenizer import Tokenizer
from gristmill.model import hf
from gristmill.model.folder import model_file
from gristmill.model.hf import copy_tensor, explain_damage, fingerprint, open_safetensors
from gristmill.model.hf_config import read_config
from gristmill.model.hf_save import new_folder, save_model, save_reward
from gristmill.model.lora import MAX_SCALE, OUTSIDE, LoraConfig, LowRank, adapter_parts, attach_adapter, matrix_shapes, merge_adapter
from gristmill.model.quantized import FLOATS
from gristmill.model.reward import REWARD_WEIGHTS, RewardModel
from gristmill.model.transformer import PRECISIONS, Transformer

CONFIG_FILE, WEIGHTS_FILE, FACTS_FILE = "adapter_config.json", "adapter_model.safetensors", "gristmill.json"
NO_ADAPTER = "Give a folder with a LoRA adapter"
PREFIX = "base_model.model."
HEAD = "reward_head"  # what a reward adapter trains beside its matrices
SUFFIXES = {"lora_A": ".lora_A.weight", "lora_B": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}
MAX_CONFIG_BYTES = 1 << 20
MAX_ADAPTER_RANK = 4096

_READ = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "bias", "rank_pattern", "alpha_pattern", "target_modules"),
    *("layers_to_transform", "layers_pattern", "exclude_modules", "modules_to_save", "init_lora_weights", "base_model_name_or_path"),
}
# Notes of other programs, and settings of training alone.
_HARMLESS = {
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout", "megatron_core", "qalora_group_size"),
    *("ensure_weight_tying", "loftq_config", "eva_config", "runtime_config"),
}
# Ways to begin that leave the base's weights as they are; others (PiSSA, OLoRA, CorDA, LoftQ, ...) change them.
_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as its folder holds it.

    Attributes:
        matrices: updates by the Hugging Face names of their modules.
        base: folder (or name on the Hub) of the model that it was trained on.
        base_fingerprint: of that model; "" where nobody recorded it.
        base_dtype: type of the frozen matrices that it was trained on, where that is recorded.
        head: tensors of a reward head, by their names in it.
    """

    config: LoraConfig
    matrices: dict[str, LowRank]
    base: str
    base_fingerprint: str = ""
    base_dtype: str = "fp32"
    head: dict[str, Tensor] = field(default_factory=dict)
    reward_weights: tuple[float, ...] = ()

    @property
    def max_rank(self) -> int:
        return max(part.rank for part in self.matrices.values())


def is_adapter(folder: Path | str) -> bool:
    """Whether a folder holds an adapter, and no model. Some have their base's config.json beside them."""
    weights = (hf.SINGLE_FILE, hf.INDEX_FILE)
    return (Path(folder) / CONFIG_FILE).is_file() and not any((Path(folder) / name).exists() for name in weights)


def check_model_folder(folder: Path) -> None:
    """Raise `InputError` unless a folder holds a model or an adapter. Its weights are not looked at."""
    if not is_adapter(folder):
        model_file(folder, "config.json")


# ---- writing ----


def save_adapter(model: Transformer | RewardModel, config: LoraConfig, folder: Path | str, *, base: Path | str, base_dtype: str) -> None:
    """Write the adapter of a model, and a reward model's head, as PEFT does; the base stands in it by its path and fingerprint.

    Raises:
        InputError: the folder holds more than an adapter, or the disk is full.
    """
    folder, base = Path(folder), Path(base).resolve()
    parts = adapter_parts(model.backbone if isinstance(model, RewardModel) else model)
    tensors = {
        PREFIX + name + SUFFIXES[attribute]: getattr(part, attribute)
        for name, part in parts.items()
        for attribute in SUFFIXES
        if getattr(part, attribute) is not None
    }
    facts: dict[str, Any] = {"base_fingerprint": fingerprint(base), "base_dtype": base_dtype}
    if isinstance(model, RewardModel):
        tensors |= {f"{PREFIX}{HEAD}.{name}": tensor for name, tensor in model.head.named_parameters()}
        facts["reward_weights"] = model.weights
    values: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None if isinstance(model, RewardModel) else "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted({name.rpartition(".")[2] for name in parts}),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "modules_to_save": [HEAD] if isinstance(model, RewardModel) else None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    with new_folder(folder, (CONFIG_FILE, FACTS_FILE)) as new:
        write_json(new / CONFIG_FILE, values)
        write_json(new / FACTS_FILE, facts)
        write_tensors(new / WEIGHTS_FILE, tensors, {"format": "pt"})


# ---- reading ----


def read_adapter(folder: Path | str, shapes: Mapping[str, tuple[int, int]]) -> Adapter:
    """Read an adapter folder; names, types and shapes are compared before any tensor is read.

    Args:
        shapes: of the base's matrices, as `matrix_shapes` gives them.

    Raises:
        InputError: a file is absent or damaged, a key is not supported, or the adapter is of another base.
    """
    folder = Path(folder)
    hf_config = _read_config(folder)
    config = _lora_config(hf_config, folder)
    with ExitStack() as stack:
        file = open_safetensors(existing_file(folder / WEIGHTS_FILE, NO_ADAPTER), stack)
        with explain_damage(folder):
            names = list(file.keys())
        head = [name for name in names if name.startswith(f"{PREFIX}{HEAD}.")]
        found = _modules([name for name in names if name not in head], folder, dora=config.dora)
        _check_targets(found, shapes, hf_config, folder)
        ranks, alphas = (_exceptions(hf_config, key, found, folder) for key in ("rank_pattern", "alpha_pattern"))
        for name in found:
            rank = ranks.get(name, config.rank)
            if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= MAX_ADAPTER_RANK:
                raise InputError(f"Give {folder / CONFIG_FILE} ranks from 1 to {MAX_ADAPTER_RANK}: that of {name} is {quoted(rank)}.")
            rows, columns = shapes[name]
            for attribute, shape in (("lora_A", [rank, columns]), ("lora_B", [rows, rank]), ("magnitude", [rows])):
                if attribute != "magnitude" or config.dora:
                    _check_tensor(file, PREFIX + name + SUFFIXES[attribute], shape, folder)

        def read(name: str, shape: tuple[int, ...]) -> Tensor:
            tensor = torch.empty(shape)
            with explain_damage(folder):
                copy_tensor(tensor, file.get_tensor(name), f"{folder} has {name}")
            return tensor

        matrices = {}
        for name in found:
            (rows, columns), key = shapes[name], PREFIX + name
            rank, alpha = ranks.get(name, config.rank), _alpha(alphas.get(name, config.alpha), folder)
            a_rD, b_Nr = read(key + SUFFIXES["lora_A"], (rank, columns)), read(key + SUFFIXES["lora_B"], (rows, rank))
            magnitude_N = read(key + SUFFIXES["magnitude"], (rows,)) if config.dora else None
            matrices[name] = LowRank(a_rD, b_Nr, config.scaling(rank, alpha), magnitude_N).requires_grad_(False)
        with explain_damage(folder):
            tensors = {name.removeprefix(f"{PREFIX}{HEAD}."): file.get_tensor(name) for name in head}
    return Adapter(config, matrices, hf_config.get("base_model_name_or_path") or "", head=tensors, **_read_facts(folder))


def _read_facts(folder: Path) -> dict[str, Any]:
    """What we record of an adapter, and PEFT does not."""
    path = folder / FACTS_FILE
    found = read_untrusted_json(path, MAX_CONFIG_BYTES) if path.exists() else {}
    weights = found.get("reward_weights", [])
    if not isinstance(weights, list) or not all(isinstance(found.get(key, ""), str) for key in ("base_fingerprint", "base_dtype")):
        raise InputError(f"Save the adapter again: {path} is not as gristmill writes it.")
    fingerprint, dtype = found.get("base_fingerprint", ""), found.get("base_dtype", "fp32")
    return {"base_fingerprint": fingerprint, "base_dtype": quoted(dtype)[1:-1], "reward_weights": tuple(weights)}


def _read_config(folder: Path) -> dict[str, Any]:
    path = existing_file(folder / CONFIG_FILE, NO_ADAPTER)
    found = read_untrusted_json(path, MAX_CONFIG_BYTES)
    if found.get("peft_type") != "LORA":
        raise InputError(f"Give a LoRA adapter (LoRA, rsLoRA or DoRA): the peft_type of {path} is {quoted(found.get('peft_type'))}.")
    for key, value in found.items():
        if key not in _READ and key not in _HARMLESS and value not in (None, False, "", [], {}):
            raise InputError(f"Give an adapter without {quoted(key)[1:-1]}: {path} sets it to {quoted(value)}, which is not supported.")
    if found.get("bias", "none") != "none":
        raise InputError(f"Give an adapter without trained biases: {path} has the bias {quoted(found['bias'])}.")
    if not any(found.get("init_lora_weights", True) is known or found["init_lora_weights"] == known for known in _INITS):
        raise InputError(
            f"Convert the adapter to plain LoRA with PEFT's path_initial_model_for_weight_conversion: {path} was begun as "
            f"{quoted(found['init_lora_weights'])}, which changes the base."
        )
    if (found.get("modules_to_save") or []) not in ([], [HEAD]):
        raise InputError(f"Give an adapter without whole modules: {path} saves {quoted(found['modules_to_save'])}.")
    base = found.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise InputError(f"Give base_model_name_or_path in {path} as a text: it is {quoted(base)}.")
    return found


def _alpha(value: Any, folder: Path) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= MAX_SCALE:
        raise InputError(f"Give lora_alpha in {folder / CONFIG_FILE} a number above 0, {MAX_SCALE:g} at most: it is {quoted(value)}.")
    return float(value)


def _lora_config(found: dict[str, Any], folder: Path) -> LoraConfig:
    rank = found.get("r", 8)
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= MAX_ADAPTER_RANK:
        raise InputError(f"Give {folder / CONFIG_FILE} a rank r from 1 to {MAX_ADAPTER_RANK}: it is {quoted(rank)}.")
    for key in ("use_rslora", "use_dora"):
        if found.get(key) not in (True, False, None):
            raise InputError(f"Give {key} in {folder / CONFIG_FILE} as true or false: it is {quoted(found[key])}.")
    rslora, dora = bool(found.get("use_rslora")), bool(found.get("use_dora"))
    return LoraConfig(rank=rank, alpha=_alpha(found.get("lora_alpha", 8), folder), rslora=rslora, dora=dora)


def _modules(names: list[str], folder: Path, *, dora: bool) -> list[str]:
    """Names of the adapted modules, each of which has all its tensors."""
    wanted = [suffix for attribute, suffix in SUFFIXES.items() if attribute != "magnitude" or dora]
    found: dict[str, set[str]] = {}
    for name in names:
        suffix = next((suffix for suffix in wanted if name.endswith(suffix)), None)
        if suffix is None or not name.startswith(PREFIX):
            raise InputError(f"Give an adapter of the layers' matrices: {folder} has {quoted(name)[1:-1]}, which is not supported.")
        found.setdefault(name.removeprefix(PREFIX).removesuffix(suffix), set()).add(suffix)
    if not found:
        raise InputError(f"Train the adapter, or save it again: {folder} has no tensors.")
    for name, suffixes in found.items():
        if lacking := [suffix for suffix in wanted if suffix not in suffixes]:
            raise InputError(f"Download or save the adapter again: {folder} lacks {PREFIX}{quoted(name)[1:-1]}{lacking[0]}.")
    return list(found)


def _check_targets(found: list[str], shapes: Mapping[str, Any], config: dict[str, Any], folder: Path) -> None:
    """Compare what an adapter has with what the base has, and with what its configuration says it has."""
    for name in found:
        if name not in shapes:
            outside = name.rpartition(".")[2] in OUTSIDE
            why = "and only the layers' matrices can be adapted." if outside else "which this model lacks: take the adapter's own base."
            raise InputError(f"{folder} changes {quoted(name)[1:-1]}, {why}")
    targets, names = config.get("target_modules"), list(shapes)
    if targets is None:
        return
    wanted = set(names) if targets == "all-linear" else _chosen(targets, names, "target_modules", folder)
    if excluded := config.get("exclude_modules"):
        wanted -= _chosen(excluded, names, "exclude_modules", folder)
    layers = config.get("layers_to_transform")
    if layers not in (None, []):
        if config.get("layers_pattern") not in (None, "", [], "layers", ["layers"]):
            raise InputError(f"Leave layers_pattern out of {folder / CONFIG_FILE}: it is {quoted(config['layers_pattern'])}.")
        numbers = layers if isinstance(layers, list) else [layers]
        wanted = {name for name in wanted if int(name.split(".")[2]) in numbers}
    if lacking := sorted(wanted - set(found)):
        raise InputError(
            f"Take the adapter's own base: this model's {lacking[0]} is not among the {len(found)} matrices that {folder} changes."
        )


def _chosen(targets: Any, names: list[str], key: str, folder: Path) -> set[str]:
    """Names that a list of names, or a regular expression, chooses."""
    if isinstance(targets, str):
        return _matching(targets, names, key, folder)
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise InputError(f"Give {key} in {folder / CONFIG_FILE} as a list of names: it is {quoted(targets)}.")
    ends = set(targets)
    return {name for name in names if any(name.split(".", i)[-1] in ends for i in range(name.count(".") + 1))}


def _matching(pattern: str, names: list[str], key: str, folder: Path) -> set[str]:
    """Names that a stranger's regular expression matches as a whole, in time that is linear in them (RE2, as Arrow has it)."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        found = pc.match_substring_regex(pa.array(names), f"^(?:{pattern})$").to_pylist()
    except (pa.ArrowInvalid, UnicodeError):
        raise InputError(f"Write {key} in {folder / CONFIG_FILE} with names: {quoted(pattern)} is no expression that is read.") from None
    return {name for name, hit in zip(names, found, strict=True) if hit}


def _exceptions(config: dict[str, Any], key: str, names: list[str], folder: Path) -> dict[str, Any]:
    """What a pattern of PEFT's says of modules: the first key that matches the end of a name counts."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise InputError(f"Give {key} in {folder / CONFIG_FILE} as an object: it is {quoted(patterns)}.")
    found: dict[str, Any] = {}
    known = set(names)
    for pattern, value in patterns.items():
        plain = re.fullmatch(r"[\w.]+", pattern, re.ASCII) and pattern in known
        for name in [pattern] if plain else _matching(rf"(?:.*\.)?(?:{pattern})", names, key, folder):
            found.setdefault(name, value)
    return found


def _check_tensor(file: Any, name: str, shape: list[int], folder: Path) -> None:
    with explain_damage(folder):
        header = file.get_slice(name)
        dtype, stored = header.get_dtype(), header.get_shape()
    if dtype not in FLOATS:
        raise InputError(f"Save the adapter in a floating-point type: {folder} has {name} in {quoted(dtype)[1:-1]}.")
    if stored != shape:
        raise InputError(f"Take the adapter's own base and rank: {folder} has {name} in shape {quoted(stored)}, and here it is {shape}.")


# ---- an adapter and its base ----


def base_of(folder: Path | str) -> Path:
    """Folder of the base that an adapter names.

    Raises:
        InputError: there is no such folder here, or it is an adapter itself.
    """
    folder = Path(folder)
    named = _read_config(folder).get("base_model_name_or_path") or ""
    merge = f"`gristmill merge {quoted_path(folder)} --base DIR --out DIR`"
    if not named or "\0" in named:
        raise InputError(f"Name the base of {quoted_path(folder)}, which it does not say itself: {merge}.")
    for base in (Path(named), folder / named):
        if is_adapter(base):
            raise InputError(f"Merge {quoted_path(base)} first: {quoted_path(folder)} was trained on it, and it is an adapter itself.")
        if (base / "config.json").is_file():
            return base
    raise InputError(f"Download the base of {quoted_path(folder)} and name it ({merge}): {quoted(named)} is no model folder here.")


def check_base(adapter: Adapter, base: Path | str, folder: Path | str, *, known: str = "") -> None:
    """Raise `InputError` where an adapter records another base than this one, whose fingerprint may be known."""
    if adapter.base_fingerprint and (now := known or fingerprint(base)) != adapter.base_fingerprint:
        raise InputError(
            f"Take the base that {quoted_path(Path(folder))} was trained on: {quoted_path(Path(base))} is another model "
            f"(fingerprint {now}, in the adapter {quoted(adapter.base_fingerprint)[1:-1]})."
        )


def _loaded(folder: Path, base: Path | None) -> tuple[Transformer, Tokenizer, Adapter]:
    """An adapter and its base."""
    base = base_of(folder) if base is None else base
    _, config = read_config(base)
    with torch.device("meta"):
        shapes = matrix_shapes(Transformer(config))
    adapter = read_adapter(folder, shapes)  # before the base, which is larger
    check_base(adapter, base, folder)
    return *hf.load_model(base), adapter


def _merged(folder: Path, base: Path | None, dtype: torch.dtype) -> tuple[Transformer, Tokenizer, Adapter, dict[str, dict[str, float]]]:
    """An adapter's base with the adapter merged in fp32."""
    model, tokenizer, adapter = _loaded(folder, base)
    return model, tokenizer, adapter, merge_adapter(model, adapter.matrices, stored_as=dtype)


def load_unmerged(folder: Path, base: Path | None = None) -> Transformer | RewardModel:
    """An adapter's base with the adapter beside its matrices, which are in the type that it was trained on (nf4: as they are stored).

    Args:
        base: instead of the path that the adapter names.

    Raises:
        InputError: as `load_model`.
    """
    model, _, adapter = _loaded(folder, base)
    attach_adapter(model, adapter.matrices, base=adapter.base_dtype if adapter.base_dtype in ("bf16", "int8") else "fp32")
    return _with_head(model, adapter, folder) if adapter.head else model


def is_reward_adapter(folder: Path | str) -> bool:
    """Whether an adapter folder holds a reward model's."""
    return _read_config(Path(folder)).get("modules_to_save") == [HEAD]


def load_model(
    folder: Path | str,
    dtype: torch.dtype = torch.float32,
    *,
    vector_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    on_block: hf.OnBlock | None = None,
) -> tuple[Transformer, Tokenizer]:
    """Read a model folder, as `hf.load_model`, or an adapter folder: its base with the adapter merged in fp32, cast last.

    Args:
        on_block: not called for an adapter.

    Raises:
        InputError: as `hf.load_model`; the adapter does not fit, or its base is not here or is another.
    """
    folder = Path(folder)
    if not is_adapter(folder):
        return hf.load_model(folder, dtype, vector_dtype=vector_dtype, device=device, on_block=on_block)
    model, tokenizer, adapter, _ = _merged(folder, None, dtype)
    if adapter.head:
        raise InputError(f"Choose a language model instead of {folder}: it holds the adapter of a reward model.")
    model.compute_dtype = dtype
    hf.set_dtypes(model, dtype, vector_dtype)
    return model.to(device), tokenizer


def load_reward(
    folder: Path | str, dtype: torch.dtype = torch.float32, *, vector_dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[RewardModel, Tokenizer]:
    """Read a reward model's folder, or the folder of a reward adapter; see `load_model`.

    Raises:
        InputError: as `load_model`, or there is no reward head.
    """
    folder = Path(folder)
    if not is_adapter(folder):
        return hf.load_reward(folder, dtype, vector_dtype=vector_dtype, device=device)
    model, tokenizer, adapter, _ = _merged(folder, None, dtype)
    reward = _with_head(model, adapter, folder)
    model.compute_dtype = dtype
    hf.set_dtypes(model, dtype, vector_dtype)  # the head computes in fp32
    return reward.to(device), tokenizer


def _with_head(model: Transformer, adapter: Adapter, folder: Path) -> RewardModel:
    if not adapter.head:
        raise InputError(f"Choose the adapter of a reward model instead of {folder}: it has no reward head.")
    reward = RewardModel(model, adapter.reward_weights or REWARD_WEIGHTS["nemotron4-340b"])
    own = dict(reward.head.named_parameters())
    if adapter.head.keys() != own.keys():
        raise InputError(f"Save the adapter again: the reward head of {folder} has {quoted(sorted(adapter.head))}.")
    for name, tensor in adapter.head.items():
        copy_tensor(own[name].detach(), tensor, f"{folder} has {HEAD}.{name}")
    return reward


def merge_folder(folder: Path, out: Path, *, base: Path | None = None, dtype: str = "fp32") -> dict[str, Any]:
    """Merge an adapter folder into its base and write the model: in fp32, cast last.

    Args:
        base: instead of the path that the adapter names.
        dtype: that the model is stored in.

    Returns:
        Its folder, and under `update` what `merge_adapter` tells.

    Raises:
        InputError: the folder is no adapter, it does not fit its base, or the base is another or not here.
    """
    existing_file(folder / CONFIG_FILE, NO_ADAPTER)
    if base is not None and is_adapter(base):
        raise InputError(f"Give a model as --base: {quoted_path(base)} is an adapter itself.")
    base = base_of(folder) if base is None else base
    if out.resolve() in (folder.resolve(), base.resolve()):
        raise InputError(f"Choose another --out than {quoted_path(out)}: the adapter or its base would be replaced.")
    model, tokenizer, adapter, update = _merged(folder, base, PRECISIONS[dtype])
    whole: nn.Module = _with_head(model, adapter, folder) if adapter.head else model
    whole.to(PRECISIONS[dtype])
    if isinstance(whole, RewardModel):
        save_reward(whole, tokenizer, out)
    else:
        save_model(model, tokenizer, out)
    return {"model": str(out), "base": str(base), "base_dtype": adapter.base_dtype, "update": update}
