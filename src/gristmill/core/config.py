"""Recipes: typed sections read from YAML. An unknown key is an error that names the nearest right one; paths are relative to the file."""

import difflib
import os
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    model_serializer,
    model_validator,
)

from gristmill.core.errors import InputError
from gristmill.core.io import DamagedFile, read_bytes

AnySection = TypeVar("AnySection", bound=BaseModel)
RECIPES = Path(__file__).parents[1] / "recipes"  # the shipped ones
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # what no name on one line has
MAX_RUN_NAME_BYTES = 200  # a seed and a control are appended to it
SUFFIXES = (".yaml", ".yml")
MAX_YAML_BYTES = 4 << 20
MAX_NODES = 200_000
MAX_DEPTH = 64
MAX_DIGITS = 100
MAX_INTEGER = 1 << 53  # seeds are multiplied by a thousand, and stay below 2^63
COMMANDS = {  # kind of recipe -> the command that takes it
    "alignment": "run",
    "dataset": "synth",
    "curation": "curate",
    "blend": "blend",
    "pretraining": "pretrain",
    "rl": "rl",
    "compress": "compress",
    "reasoning": "run",
}
RENAMED = {  # keys of earlier versions, for the error that names the new one
    "models": "generators",
    "folder": "generators",
    "responses": "answers",
    "quota": "max_per_task",
    "code_quota": "max_code_per_task",
    "writing_quota": "max_prompts_per_task",
    "quota_per_topic": "max_per_topic",
    "keep_per_prompt": "max_per_prompt",
    "pairs_per_prompt": "max_pairs_per_prompt",
    "pairs_per_task": "max_pairs_per_task",
    "min_correctness": "keep",
    "min_chosen": "keep_chosen",
    "most_document_bytes": "max_document_bytes",
    "most_expansion": "max_expansion",
    "most_epochs": "max_epochs",
    "most_matches": "max_matches",
    "most_pieces": "max_pieces",
    "most": "max_findings",
    "least": "min_bucket",
    "least_left": "min_left",
    "least_part": "min_part",
    "least_reward": "min_reward",
}


class Section(BaseModel):
    """A part of a recipe: immutable, unknown keys refused.

    Attributes:
        added: keys that a run of an earlier version does not know. They are written out where they differ from their defaults, so that
            such a run is taken up again.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    added: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _no_truths_for_numbers(cls, values: Any) -> Any:
        """YAML reads `on` and `yes` as true, which would count as 1."""
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field is not None and (types := _types(field.annotation)) & {int, float} and bool not in types:
                raise ValueError(f"{name} is {str(value).lower()}: give a number")
        return values

    @model_serializer(mode="wrap")
    def _without_added(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = dump(self)
        fields = type(self).model_fields
        return {k: v for k, v in values.items() if k not in self.added or getattr(self, k) != fields[k].default}


class Recipe(Section):
    """A whole recipe. Its `kind` says which.

    Attributes:
        may_change: keys whose values may differ when a run is taken up again.
    """

    may_change: ClassVar[frozenset[str]] = frozenset()

    def changed(self, old: dict[str, Any]) -> list[str]:
        """The keys with which a run of the `old` plain values cannot be taken up by this recipe."""
        new = self.model_dump(mode="json")
        return [key for key in sorted(old.keys() | new.keys()) if key not in self.may_change and old.get(key) != new.get(key)]

    def forbidden(self, old: dict[str, Any]) -> list[str]:
        """Of the `changed` keys those that may not change even where each stage knows what it was made from."""
        return self.changed(old)


def _types(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    return set().union(*map(_types, inner)) if (inner := get_args(annotation)) else {annotation}


# ---- paths ----


def resolved(path: Path | str, info: ValidationInfo) -> str:
    """A path or pattern of a recipe, seen from the recipe's folder where it was read from a file."""
    base = (info.context or {}).get("base")
    try:
        return str(path) if base is None else str(base / Path(path).expanduser())
    except RuntimeError as e:
        raise ValueError(f"{path}: there is no such user") from e


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"[\w-][\w.-]*", name) or len(name.encode()) > MAX_RUN_NAME_BYTES:
        raise ValueError(
            f"a run's name has letters, digits, '_', '-' and '.', does not begin with '.', and has {MAX_RUN_NAME_BYTES} bytes at most"
        )
    return name


def _one_line(text: str) -> str:
    if CONTROL.search(text):
        raise ValueError("give one line, without control characters: it stands in tables and cards")
    return text


def _resolved_path(path: Path, info: ValidationInfo) -> Path:
    found = Path(resolved(path, info))
    try:
        return found.resolve() if (info.context or {}).get("base") is not None else found
    except (OSError, RuntimeError) as e:
        raise ValueError(f"{path} is no path ({e})") from e


def _resolved_or_empty(path: str, info: ValidationInfo) -> str:
    return resolved(path, info) if path else ""


def _resolved_yaml(name: str, info: ValidationInfo) -> str:
    return resolved(name, info) if name.endswith(SUFFIXES) else name


def _resolved_after_prefix(name: str, info: ValidationInfo) -> str:
    prefix, colon, path = name.rpartition(":")
    return f"{prefix}{colon}{resolved(path, info)}" if prefix != "column" and name != "hashed" else name


FilePath = Annotated[Path, AfterValidator(_resolved_path)]  # a file or folder
PatternPath = Annotated[str, AfterValidator(_resolved_or_empty)]  # a file, folder or pattern; "" for none
# A folder, `perplexity:FOLDER`, or something that is no path: `hashed`, `column:NAME`.
SourceOrPath = Annotated[str, AfterValidator(_resolved_after_prefix)]
RunName = Annotated[str, AfterValidator(_folder_name)]  # names the run's folder where no other is given
Line = Annotated[str, AfterValidator(_one_line)]  # what people type and read again elsewhere: a model's name, a licence
NameOrPath = Annotated[str, AfterValidator(_resolved_yaml)]  # a shipped thing by its name, or a YAML file


# ---- reading and writing ----


def find_recipe(name: str, *kinds: str) -> Path:
    """The file of a recipe: a path that ends in .yaml or .yml, or else the name of a shipped recipe of one of these kinds (also without the
    kind at its end: `miniature` for miniature-rl).

    Raises:
        InputError: there is no such file or recipe, or the shipped recipe is of another kind.
    """
    shipped = {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}
    if name.endswith(SUFFIXES):
        if not os.path.isfile(name):
            raise InputError(f"There is no recipe {name!r}: check the path, or write a recipe with `gristmill init`.")
        return Path(name)
    fitting = [stem for stem, path in shipped.items() if read(path).get("kind") in kinds]
    if name not in fitting:
        name = next((f"{name}-{kind}" for kind in kinds if f"{name}-{kind}" in fitting), name)
    if name not in shipped:
        also = f" or one of the shipped recipes ({', '.join(fitting)})" if fitting else ""
        raise InputError(f"There is no recipe {name!r}: give a .yaml file{also}.")
    if name not in fitting:
        other = read(shipped[name])["kind"]
        raise InputError(f"The recipe {name!r} is of the kind {other}: use `gristmill {COMMANDS[other]} {name}`.")
    return shipped[name]


def load(path: Path, recipe: type[AnySection], overrides: dict[str, Any] | None = None) -> AnySection:
    """Read a recipe file. Paths in it are relative to its folder, those of `overrides` to the working directory.

    Raises:
        InputError: the file is missing, is not YAML, is of another kind, or holds a wrong key or value.
    """
    values = read(path)
    kind = recipe.model_fields["kind"].default
    if (given := values.get("kind", kind)) != kind:
        use = (
            f": use `gristmill {COMMANDS[given]} {path}`"
            if isinstance(given, str) and given in COMMANDS
            else f": the kinds are {', '.join(COMMANDS)}"
        )
        raise InputError(f"{path} is a recipe of the kind {given!r}, and {kind!r} is needed{use}.")
    found = check(recipe, values, str(path), base=path.parent)
    if not overrides:
        return found
    here = check(recipe, {**values, **overrides}, str(path), base=path.parent)
    given_here = check(recipe, {**values, **overrides}, str(path))
    return here.model_copy(update={key: getattr(given_here, key) for key in overrides})


def read(path: Path) -> dict[str, Any]:
    """The plain values of a recipe file.

    Raises:
        InputError: the file is missing, or is not a YAML mapping.
    """
    try:
        values = read_yaml(path)
    except DamagedFile as e:
        raise InputError(f"The recipe {e} Check the path, or write one with `gristmill init`.") from e
    if not isinstance(values, dict):
        raise InputError(f"{path} must be a mapping of keys to values.")
    return values


def read_yaml(path: Path) -> Any:
    """The plain values of a YAML file, whoever wrote it: its size, depth and numbers have limits, also with its aliases spelt out.

    Raises:
        DamagedFile: the file is missing or cannot be read.
        InputError: it is not YAML, or is beyond a limit.
    """
    data = read_bytes(path, MAX_YAML_BYTES)
    try:
        loader = _Loader(data.decode("utf-8-sig"))
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _num_nodes(node, {}, 0)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError as e:
        raise InputError(f"{path} is not YAML of ours: it is nested too deeply.") from e
    # what a tag promises and its text does not hold raises whatever comes first
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, OverflowError) as e:
        raise InputError(f"{path} is not YAML{' of ours' if isinstance(e, _BeyondLimit) else ''}: {' '.join(str(e).split())[:300]}") from e


class _BeyondLimit(ValueError):
    pass


class _Loader(yaml.SafeLoader):
    """The safe loader, without numbers that nothing here can count with."""

    def int_of(self, node: Any) -> int:
        value: int = self.construct_yaml_int(node)
        if abs(value) > MAX_INTEGER:
            raise _BeyondLimit(f"the number {node.value} (line {node.start_mark.line + 1}) is larger than 2^53.")
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.int_of)


def _num_nodes(node: Any, known: dict[int, int], depth: int) -> int:
    """Values below a node, with every alias counted in full. `known` holds those of nodes seen before, 0 for those that are not through."""
    where = f"(line {node.start_mark.line + 1})"
    if id(node) in known:
        if not known[id(node)]:
            raise _BeyondLimit(f"an alias {where} stands in what it stands for.")
        return known[id(node)]
    known[id(node)] = 0
    count = 1
    if isinstance(node, yaml.ScalarNode):
        if node.tag.endswith((":int", ":float")) and len(node.value) > MAX_DIGITS:
            raise _BeyondLimit(f"a number {where} has {len(node.value):,} digits.")
        if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in node.value):
            raise _BeyondLimit(f"a text {where} holds a character that no file can: NUL, or half of a pair.")
    elif depth > MAX_DEPTH:
        raise _BeyondLimit(f"it is nested more than {MAX_DEPTH} deep {where}.")
    elif isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key, times in Counter(keys).items() if times > 1 and key != "<<"]:
            raise _BeyondLimit(f"the key {twice[0]!r} stands twice in the mapping {where}.")
        count += sum(_num_nodes(part, known, depth + 1) for pair in node.value for part in pair)
    else:
        count += sum(_num_nodes(part, known, depth + 1) for part in node.value)
    if count > MAX_NODES:
        raise _BeyondLimit(f"it holds more than {MAX_NODES:,} values, its aliases spelt out {where}.")
    known[id(node)] = count
    return count


def check(section: type[AnySection], values: Any, origin: str = "the recipe", *, base: Path | None = None) -> AnySection:
    """A recipe or a section of it from plain values.

    Args:
        origin: what the values are, for errors.
        base: the folder that relative paths are seen from; None leaves them as they are.

    Raises:
        InputError: a key is unknown (the nearest right one is named) or a value is wrong.
    """
    if not isinstance(values, dict):
        raise InputError(f"{origin} must be a mapping of keys to values.")
    try:
        return section.model_validate(values, context={"base": base.resolve()} if base is not None else None)
    except ValidationError as e:
        raise InputError(f"{origin}: {explain(e, section)}") from e


def dump(recipe: BaseModel) -> str:
    """The resolved recipe as YAML. It holds no key of a service: recipes name where keys are."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


# ---- errors ----


def explain(error: ValidationError, section: type[BaseModel]) -> str:
    """One sentence for the first error, with the nearest right key when a key is unknown."""
    # a misspelt key is told before the right one that is missing
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    where = ".".join(str(p) for p in first["loc"])
    if first["type"] != "extra_forbidden":
        return f"{where}: {first['msg']}." if where else f"{first['msg']}."
    known = _keys(first["loc"][:-1], section)
    key = str(first["loc"][-1])
    if key == "writing" and "pipelines" in known:
        return "unknown key 'writing': its keys templates, topics and pipelines stand in the recipe itself now."
    if (new := RENAMED.get(key)) in known:
        return f"unknown key {where!r}: it is called {new!r} now."
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"the keys here are {', '.join(known)}."
    return f"unknown key {where!r}: {hint}"


def _keys(location: tuple[int | str, ...], section: type[BaseModel]) -> list[str]:
    choices = [section]  # several where a list holds sections of different kinds
    for part in location:
        if isinstance(part, int):
            continue  # a place in a list, whose items are of the sections found last
        if part not in choices[0].model_fields:  # the name of one of those kinds
            choices = [kind for kind in choices if part in (field.default for field in kind.model_fields.values())] or choices
            continue
        choices = _sections(choices[0].model_fields[part].annotation)
        assert choices, f"{part} is no section"
    return list(choices[0].model_fields)


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections that an annotation speaks of, however deep."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [kind for part in get_args(annotation) for kind in _sections(part)]
