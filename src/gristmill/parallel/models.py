"""Models to plan: the presets and other published shapes, a Hugging Face folder, or the model that a recipe trains."""

from pathlib import Path

from gristmill.core.errors import InputError
from gristmill.core.untrusted import quoted
from gristmill.model.config import PRESETS, ModelConfig, uniform_blocks
from gristmill.model.hf_config import read_config


def _llama3(hidden: int, layers: int, heads: int, ffn: int) -> ModelConfig:
    return ModelConfig("llama", 128_256, hidden, uniform_blocks(layers, heads, 8, 128, ffn), 8192, rope_theta=500_000.0)


MODELS = PRESETS | {
    "llama3-8b": _llama3(4096, 32, 32, 14_336),
    "llama3-70b": _llama3(8192, 80, 64, 28_672),
    "llama3-405b": _llama3(16_384, 126, 128, 53_248),
}


def find_model(name: str) -> ModelConfig:
    """The configuration of a named model, of a folder's config.json, or of what a recipe trains. No weight is read.

    Raises:
        InputError: there is none, or it is one that cannot be run.
    """
    if name in MODELS:
        return MODELS[name]
    from gristmill.core.config import RECIPES, SUFFIXES

    path = Path(name)
    shipped = RECIPES / f"{name}.yaml"
    if name.endswith(SUFFIXES) or (shipped.is_file() and not path.exists()):
        return _of_recipe(path if name.endswith(SUFFIXES) else shipped)
    if path.is_dir() or path.is_file() or "/" in name:
        return read_config(path.parent if path.name == "config.json" else path)[1]
    raise InputError(f"Choose a model: {', '.join(MODELS)}, a folder with its config.json, or a recipe; there is no {quoted(name)}.")


def _of_recipe(path: Path) -> ModelConfig:
    from gristmill.core.config import read

    values = read(path)
    preset, model = values.get("preset"), values.get("model")
    if model == "miniature":
        preset = model
    elif values.get("kind") == "pretraining" and model is None:
        preset = preset or "miniature"
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise InputError(f"{path}: choose preset from {', '.join(PRESETS)}, not {quoted(preset)}.")
        return PRESETS[preset]
    if not isinstance(model, str) or not (path.parent / model).is_dir():
        raise InputError(f"{path} names no model folder: give the folder itself, as `gristmill plan FOLDER`.")
    return read_config(path.parent / model)[1]
