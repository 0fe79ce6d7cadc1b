"""Prompt templates, kept as data: a pack is a YAML file, and what it lacks is taken from `default.yaml`."""

import difflib
import string
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from gristmill.core.config import read_yaml
from gristmill.core.errors import InputError
from gristmill.core.io import DamagedFile
from gristmill.core.untrusted import is_bare_name
from gristmill.data.rows import make_id
from gristmill.generation.api import SamplingParams

Parser = Literal["text", "list", "yes"]
FOLDER = Path(__file__).parent / "packs"
KEYS = ("slots", "text", "parser", "sampling", "agree")
DEFAULT_SAMPLING = SamplingParams(temperature=1.0, top_p=0.95, max_tokens=1024)


@dataclass(frozen=True)
class Template:
    """Prompt template with named slots, an answer parser and sampling parameters.

    Attributes:
        slots: what `render` needs.
        parser: what the answer is read as. A pack may ask for one item at a time where the default pack asks for a list: then
            its parser is "text".
        agree: of a list that is asked for item by item, how often an item must be named to count: what a small model names once in
            many draws is often a slip.
    """

    name: str
    slots: tuple[str, ...]
    text: str
    parser: Parser = "text"
    sampling: SamplingParams = field(default=DEFAULT_SAMPLING)
    agree: int = 1

    def render(self, **values: object) -> str:
        """The text with its slots filled in; braces in a value are just braces.

        Raises:
            InputError: a slot is left out, or one is given that the template does not have.
        """
        if set(values) != set(self.slots):
            wrong = ", ".join(sorted(set(values) ^ set(self.slots)))
            raise InputError(f"Template {self.name} has the slots {', '.join(self.slots)}; wrong or missing: {wrong}.")
        return self.text.format(**values)


class TemplatePack(Mapping[str, Template]):
    """Mapping of names to templates."""

    def __init__(self, templates: Mapping[str, Template]):
        self._templates = dict(templates)

    def __getitem__(self, name: str) -> Template:
        return self._templates[name]

    def __iter__(self) -> Any:
        return iter(self._templates)

    def __len__(self) -> int:
        return len(self._templates)

    @property
    def identity(self) -> str:
        """Of all that the templates say and ask for."""
        return make_id(sorted(repr(template) for template in self._templates.values()))

    @staticmethod
    def load(name: str = "default") -> "TemplatePack":
        """A shipped pack by its name, or a file of templates; what it lacks comes from the default pack.

        Raises:
            InputError: there is no such pack, it is not YAML, or a template of it is wrong.
        """
        default = _read(FOLDER / "default.yaml", None)
        if name == "default":
            return TemplatePack(default)
        path = Path(name)
        if path.suffix not in (".yaml", ".yml"):
            path = FOLDER / f"{name}.yaml"
            if not is_bare_name(name) or not path.is_file():
                shipped = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml")))
                raise InputError(f"There is no template pack {name!r}: give a .yaml file or one of {shipped}.")
        return TemplatePack({**default, **_read(path, default)})


def _read(path: Path, default: Mapping[str, Template] | None) -> dict[str, Template]:
    try:
        values = read_yaml(path)
    except DamagedFile as e:
        raise InputError(f"The template pack {e}") from e
    if not isinstance(values, dict):
        raise InputError(f"{path} must be a mapping of template names to templates.")
    templates = {str(name): _template(str(name), given, path) for name, given in values.items()}
    for name, template in templates.items():
        if default is None:
            continue
        if name not in default:
            near = difflib.get_close_matches(name, default, n=1)
            raise InputError(f"{path} has a template {name!r} that no pipeline uses{f'; did you mean {near[0]!r}?' if near else '.'}")
        if extra := set(template.slots) - set(default[name].slots):
            known = ", ".join(default[name].slots) or "none"
            raise InputError(f"Template {name} of {path} has the slot {sorted(extra)[0]!r}, which nobody fills: the slots are {known}.")
        if template.parser not in (default[name].parser, "text"):
            raise InputError(f"Template {name} of {path} has the parser {template.parser!r}: use {default[name].parser!r} or 'text'.")
        # a template of another pack may leave slots out
        templates[name] = replace(template, slots=default[name].slots)
    return templates


def _template(name: str, given: Any, path: Path) -> Template:
    where = f"Template {name} of {path}"
    if not isinstance(given, dict) or not isinstance(given.get("text"), str):
        raise InputError(f"{where} must have a text.")
    if unknown := set(given) - set(KEYS):
        raise InputError(f"{where} has the unknown key {sorted(unknown)[0]!r}: the keys are {', '.join(KEYS)}.")
    # YAML reads a bare `yes` as true
    parser = "yes" if given.get("parser") is True else given.get("parser", "text")
    if parser not in get_args(Parser):
        raise InputError(f"{where} has the parser {parser!r}: use one of {', '.join(get_args(Parser))}.")
    text = given["text"].strip()
    try:
        fields_in = [(slot, spec, turned) for _, slot, spec, turned in string.Formatter().parse(text) if slot is not None]
    except ValueError as e:
        raise InputError(f"{where} cannot be read ({e}): write {{{{ and }}}} for braces that are no slot.") from e
    used = {slot for slot, _, _ in fields_in}
    if any(spec or turned or not slot for slot, spec, turned in fields_in):
        raise InputError(f"{where} has braces that are no slot: write {{{{ and }}}} for those.")
    slots = given.get("slots", sorted(used))
    if not isinstance(slots, list) or not all(isinstance(slot, str) for slot in slots):
        raise InputError(f"{where}: slots must be a list of names.")
    slots = tuple(slots)
    for slot in sorted(used - set(slots)):
        raise InputError(f"{where} uses the slot {slot!r} that it does not declare: its slots are {', '.join(slots) or 'none'}.")
    sampling = given.get("sampling") or {}
    known = [f.name for f in fields(SamplingParams) if not isinstance(f.default, tuple)]
    if not isinstance(sampling, dict) or set(sampling) - set(known):
        raise InputError(f"{where}: sampling must be a mapping of {', '.join(known)}.")
    base = {f.name: getattr(DEFAULT_SAMPLING, f.name) for f in fields(SamplingParams)}
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in sampling.values()):
        raise InputError(f"{where}: the values of sampling must be numbers.")
    try:
        drawn = SamplingParams(**{**base, **sampling})
    except InputError as e:
        raise InputError(f"{where}: {e}") from e
    agree = given.get("agree", 1)
    if isinstance(agree, bool) or not isinstance(agree, int) or agree < 1:
        raise InputError(f"{where}: agree must be a number of times, 1 or more.")
    return Template(name, slots, text, cast(Parser, parser), drawn, agree)
