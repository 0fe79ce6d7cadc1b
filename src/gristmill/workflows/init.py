"""`gristmill init`: look at a person's files and model before any work is spent, and write a recipe that explains itself.

In the recipe a value stands bare where it differs from its section's default, and behind a `#` where it is the default: taking the
`#` away changes nothing until the value is changed.
"""

import http.client
import json
import math
import os
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
import yaml
from pydantic.fields import FieldInfo

from gristmill.core.config import RECIPES, Section, check, read
from gristmill.core.echo import echo, visible
from gristmill.core.errors import InputError
from gristmill.core.io import reason, write_text
from gristmill.data.chat_format import ChatFormat
from gristmill.data.find_format import find_format
from gristmill.data.readers import read_demonstrations, read_prompts, read_ratings
from gristmill.data.rows import Demonstration
from gristmill.data.tokenizer import Tokenizer
from gristmill.generation.endpoint import Endpoint, Target
from gristmill.miniature.base import BASE
from gristmill.model import convert, hf
from gristmill.model.flops import num_parameters
from gristmill.synth.registry import Pipelines
from gristmill.train.by_size import fill
from gristmill.train.settings import Training
from gristmill.workflows.alignment.context import STAGE_KINDS
from gristmill.workflows.alignment.recipe import OF_WORLD, AlignmentRecipe
from gristmill.workflows.alignment.source import contaminated, normalize_prompt

NEEDED = ("demonstrations", "evaluation")
SAMPLED = 240  # demonstrations that limits are read off
SHARE = 0.99  # of the demonstrations that a limit in tokens must hold
ROUND_TOKENS = 16  # limits are rounded up to a multiple of this
TEACHER_SECONDS = 10.0
MAX_MODELS_BYTES, MAX_MODELS_SHOWN = 4 << 20, 10
BOUNDS = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
STAGES = {
    "demonstration_sft": "SFT of Base on the demonstrations: the first Instruct.",
    "reward": "The reward model: regression of the five attributes, from Base.",
    "code_sft": "Each round: SFT of Base on code alone.",
    "general_sft": "Each round: SFT on everything else, with a little of the code.",
    "dpo": "Each round: DPO on pairs of the general SFT model's answers.",
    "rpo": "Each round, rpo_iterations times: RPO on pairs of the latest model's answers, with that model as reference.",
}
HEADER = """\
# A recipe for gristmill: `gristmill run {file}`.
# A line that begins with # and a key shows a default: take the # away (and that of its section) to change it.
# Relative paths are relative to this file.
"""


def write_recipe(
    out: Path,
    name: str,
    model: str,
    files: dict[str, Path],
    force: bool = False,
    *,
    chat_format: str = "auto",
    add_chat_tokens: str = "",
    teacher: dict[str, str] | None = None,
) -> Path:
    """Check the files and the model, and write a commented recipe.

    Args:
        out: the recipe file.
        name: of the run.
        model: Hugging Face folder of the Base model, or "miniature".
        files: by kind: "demonstrations", "evaluation", and "ratings" or "prompts" or both; empty for the miniature world.
        force: overwrite `out`.
        chat_format: "auto" for the model folder's own, or a name.
        add_chat_tokens: give the model the tokens of this format first, in a folder beside `out`.
        teacher: an endpoint that writes prompts and answers instead of the run's models: its base_url, and where they are needed its
            model and api_key_env.

    Returns:
        `out`.

    Raises:
        InputError: a file or the model cannot be used, a file holds what the evaluation asks, `out` exists, or the name is no name.
    """
    if os.path.exists(out) and not force:
        raise InputError(f"{out} exists: give another file with --out, or --force to overwrite it.")
    values: dict[str, Any] = {"name": name}
    if teacher:
        values["generators"] = [_teacher(**teacher)]
    demonstrations: list[Demonstration] = []
    rows: dict[str, int] = {}
    for path in files.values():
        if not path.is_file():
            raise InputError(f"{path} {'is no file' if path.exists() else 'does not exist'}: check the path.")
    if files:
        missing = [k for k in NEEDED if k not in files]
        if missing:
            options = " and ".join(f"--{k}" for k in missing)
            raise InputError(f"Give {options} too: your own data needs {', '.join(NEEDED)}.")
        if not {"ratings", "prompts"} & files.keys():
            raise InputError("Give --ratings for a reward model, or --prompts with known answers: something must judge the answers.")
        demonstrations, num_ratings = _check_files(files)
        rows = {"demonstration_sft": len(demonstrations) + len(demonstrations[::5]), "reward": num_ratings}
        values["data"] = {k: _path(p, out) for k, p in files.items()}
    else:
        values["world"] = "miniature"
        shipped = read(RECIPES / "miniature.yaml")
        values |= {name: shipped[name] for name in OF_WORLD}
    if add_chat_tokens:
        changed = out.with_name(f"{out.stem}-{add_chat_tokens}-base")
        convert.add_chat_tokens(Path(model), changed, add_chat_tokens)
        model = str(changed)
    values["model"] = model if model == "miniature" else _path(Path(model), out)
    if chat_format != "auto":
        values["chat_format"] = chat_format
    loaded = _load(model, chat_format)
    if files:
        values |= _limits(model, loaded, demonstrations)
    text = HEADER.format(file=out.name) + "\n".join(render(values, _sized(loaded.num_parameters, rows))) + "\n"
    check(AlignmentRecipe, yaml.safe_load(text))
    write_text(out, text)
    if files or model != "miniature":
        echo(f"Model: {model}, chat format: {loaded.chat_format.name}.", err=True)
    return out


def _path(path: Path, out: Path) -> str:
    """Relative when the file lies beside or under the recipe, else absolute."""
    full, folder = path.resolve(), out.resolve().parent
    near = os.path.relpath(full, folder) if full.is_relative_to(folder) else str(full)
    return str(full) if near == "miniature" else near  # that word alone is the shipped model


# ---- checks ----


def _teacher(base_url: str, model: str = "", api_key_env: str = "") -> dict[str, str]:
    """A generator of the recipe. An endpoint that serves one model need not be told its name.

    Raises:
        InputError: the endpoint does not answer, or does not serve the model.
    """
    named = {"base_url": base_url, "model": model, "api_key_env": api_key_env}
    Endpoint([Target(base_url, model, api_key_env=api_key_env)])  # which looks at the URL and the key
    key = os.environ.get(api_key_env, "").strip() if api_key_env else ""
    try:
        request = urllib.request.Request(base_url.rstrip("/") + "/models", headers={"Authorization": f"Bearer {key}"} if key else {})
        with urllib.request.urlopen(request, timeout=TEACHER_SECONDS) as reply:
            answer = json.loads(reply.read(MAX_MODELS_BYTES))
        known = [str(entry["id"]) for entry in answer["data"]]
    except (OSError, ValueError, LookupError, TypeError, RecursionError, http.client.HTTPException) as e:
        raise InputError(
            f"The teacher {base_url} does not say which models it serves ({reason(e)}): give the base URL up to and including /v1, and "
            "--teacher-key-env where it wants a key."
        ) from e
    shown = ", ".join(map(visible, known[:MAX_MODELS_SHOWN])) or "none"
    if not model and len(known) != 1:
        raise InputError(f"The teacher {base_url} serves several models or none ({shown}): name one with --teacher-model.")
    if model and model not in known:
        raise InputError(f"The teacher {base_url} does not serve {model!r}: it serves {shown}.")
    return {k: v for k, v in (named | {"model": model or known[0]}).items() if v}


def _check_files(files: dict[str, Path]) -> tuple[list[Demonstration], int]:
    """Read every file whole, and refuse rows that ask what the evaluation asks; the demonstrations, and how many ratings there are."""
    demonstrations = read_demonstrations(files["demonstrations"])
    ratings = read_ratings(files["ratings"]) if "ratings" in files else []
    prompts = read_prompts(files["prompts"], "file") if "prompts" in files else []
    held_out = frozenset(normalize_prompt(p.messages) for p in read_prompts(files["evaluation"], "human", truth=True))
    asked = {
        "demonstrations": [d.messages[:-1] for d in demonstrations],
        "ratings": [r.messages[:-1] for r in ratings],
        "prompts": [p.messages for p in prompts],
        "validation": [p.messages for p in read_prompts(files["validation"], "validation", truth=True)] if "validation" in files else [],
    }
    for kind, rows in asked.items():
        for number, messages in enumerate(rows, 1):
            if contaminated(messages, held_out):
                raise InputError(
                    f"Row {number} of {files[kind]} asks what a row of {files['evaluation']} asks: take it out of one of the two files."
                )
    return demonstrations, len(ratings)


@dataclass(frozen=True)
class _Loaded:
    """What a recipe needs to know of a model whose weights load."""

    tokenizer: Tokenizer
    chat_format: ChatFormat
    max_positions: int
    num_parameters: int


def _load(model: str, chat_format: str) -> _Loaded:
    """A model folder whose weights load.

    Raises:
        InputError: they do not, or the model has no chat format that is known.
    """
    transformer, tokenizer = hf.load_model(BASE if model == "miniature" else Path(model))
    form, config = find_format(chat_format, tokenizer), transformer.config
    return _Loaded(tokenizer, form, config.max_positions, num_parameters(config))


def _sized(size: int, rows: dict[str, int]) -> dict[str, dict[str, Any]]:
    """What every training section takes for a model of this size where it gives nothing, as plain values."""
    out = {}
    for name, kind in STAGE_KINDS.items():
        default: Training = AlignmentRecipe.model_fields[name].default
        found = fill(default, kind, size, device=torch.device("cpu"), num_rows=rows.get(name), precision="auto")
        out[name] = found.model_dump(mode="json")
    return out


def _limits(model: str, loaded: _Loaded, demonstrations: Sequence[Demonstration]) -> dict[str, Any]:
    """Token limits that hold nearly all demonstrations: of a written prompt, and of an answer.

    Raises:
        InputError: every demonstration is too long for the model.
    """
    tokenizer, chat_format, longest = loaded.tokenizer, loaded.chat_format, loaded.max_positions
    sample = demonstrations[:SAMPLED]
    if not sample:
        return {}
    rendered = [chat_format.render(d.messages, tokenizer, tools=d.meta.get("tools") or ()) for d in sample]
    if all(len(one.ids) > longest for one in rendered):
        raise InputError(f"Every demonstration is longer than the {longest} tokens of {model}: choose a model with more, or shorter ones.")
    answers = [len(tokenizer.encode(d.messages[-1].content)) for d in sample]
    asked = [len(tokenizer.encode(next(m.content for m in d.messages if m.role == "user"))) for d in sample]
    of_prompts, of_answers = (_limit(lengths, longest // 2) for lengths in (asked, answers))
    return {"pipelines": {"by_task": {"max_tokens": of_prompts}}, "answers": {"max_tokens": of_answers}}


def _limit(lengths: Sequence[int], most: int) -> int:
    """A limit for nearly all lengths and the end of turn."""
    enough = sorted(lengths)[math.ceil(SHARE * len(lengths)) - 1] + 1
    return min(most, math.ceil(enough / ROUND_TOKENS) * ROUND_TOKENS)


# ---- the text ----


def render(values: dict[str, Any], sized: dict[str, dict[str, Any]]) -> list[str]:
    """Lines of a recipe with every key, its default and what it means.

    Args:
        values: what differs from the defaults, as plain values; sections as mappings.
        sized: training sections with the defaults of the model's size, as plain values.
    """
    lines: list[str] = []
    for key, field in AlignmentRecipe.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            lines += ["", *_section(key, kind, field.default, values.get(key, {}), sized.get(key))]
        else:
            lines.append(_line(key, field, field.default, values))
    return lines


def _section(key: str, kind: type[Section], default: Section, values: dict[str, Any], sized: dict[str, Any] | None) -> list[str]:
    """A section's lines. What a training section's default sets itself is written out: it makes the section what it is."""
    plain = sized or default.model_dump(mode="json")
    if issubclass(kind, Training):
        values = {k: plain[k] for k in kind.model_fields if k in default.model_fields_set} | values
    about = STAGES.get(key) or " ".join((kind.__doc__ or "").split())
    lines = [f"# {about}", f"{key}:" if values else f"#{key}:"]
    for name, field in kind.model_fields.items():
        if kind is Pipelines and name not in plain and name not in values:
            continue  # named alone, it would write
        line = _line(name, field, plain.get(name, getattr(default, name)), values)
        lines.append(f"  {line}" if values else f"#  {line.removeprefix('#')}")
    return lines


def _line(key: str, field: FieldInfo, default: Any, values: dict[str, Any]) -> str:
    given = key in values
    value = values[key] if given else default
    value = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").rstrip("\n")
    text = json.dumps(value) if "\n" in text else text  # which is YAML of one line
    about = _about(field)
    return f"{'' if given else '#'}{key}: {text}" + (f"  # {about}" if about else "")


def _about(field: FieldInfo) -> str:
    """A field's description, choices and bounds; a bound of 0 goes without saying."""
    bounds = [f"{word} {limit:g}" for m in field.metadata for name, word in BOUNDS.items() if (limit := getattr(m, name, None))]
    choices = _choices(field.annotation)
    parts = [field.description, f"one of {', '.join(choices)}" if choices else None, ", ".join(bounds)]
    return "; ".join(p for p in parts if p)


def _choices(annotation: Any) -> list[str]:
    """The values of a Literal, also of one that may be left out."""
    if get_origin(annotation) is Literal:
        return [str(c) for c in get_args(annotation)]
    return [c for part in get_args(annotation) for c in _choices(part)]
