"""A model that is asked: behind an endpoint, or in a model or adapter folder, which is run in this process."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gristmill.core.errors import InputError
from gristmill.core.untrusted import quoted
from gristmill.data.rows import make_id
from gristmill.generation.cached import Client
from gristmill.generation.endpoint import Endpoint, Target
from gristmill.judge.backends import Dtype, engine_client
from gristmill.model.adapters import check_model_folder
from gristmill.model.folder import folder_stamps

EITHER = "Give either a model folder, or --{0} URL with --{0}-model NAME."
OF_AN_ENDPOINT = "--{0}-model and --{0}-key-env are of an endpoint: give --{0} URL with them, or leave them out."


def is_url(place: str) -> bool:
    """Whether a place is an endpoint's base URL, and no folder."""
    return place.lower().startswith(("http://", "https://"))


@dataclass(frozen=True)
class Party:
    """A model that is asked.

    Attributes:
        place: base URL of an endpoint, up to and including `/v1`, or a folder.
        model: name that the endpoint knows the model by.
        key_env: environment variable that holds the endpoint's key.
        logprobs: ask the endpoint for log-probabilities too; a folder's model always tells them.
        chat_format, device, dtype: of a folder, as `EngineArgs` takes them.
        label: name for reports; default the endpoint's name of the model, or the folder's.
        running: how else it is run, as the type that it computes in, where its answers depend on that.
    """

    place: str
    model: str = ""
    key_env: str = ""
    logprobs: bool = False
    chat_format: str = "auto"
    device: str = "auto"
    dtype: Dtype = "auto"
    label: str = ""
    running: str = ""

    @property
    def is_endpoint(self) -> bool:
        return is_url(self.place)

    @property
    def folder(self) -> Path:
        assert not self.is_endpoint
        return Path(self.place)

    @property
    def name(self) -> str:
        return self.label or (self.model if self.is_endpoint else self.folder.resolve().name)

    @property
    def target(self) -> Target | None:
        """The endpoint's target; None of a folder."""
        return Target(self.place, self.model, api_key_env=self.key_env, logprobs=self.logprobs) if self.is_endpoint else None

    @cached_property
    def identity(self) -> str:
        """What its answers depend on: an endpoint's on its address and name, a folder's on its files as they were when first looked at."""
        if self.is_endpoint:
            return f"{self.place} {self.model}"
        more = [self.running] * bool(self.running) + [self.dtype] * (self.dtype != "auto")
        return make_id(folder_stamps(self.folder), self.chat_format, *more)

    def client(self, concurrency: int) -> Client:
        """What asks it; `concurrency` is of an endpoint.

        Raises:
            InputError: the model cannot be loaded.
        """
        if (target := self.target) is not None:
            return Endpoint([target], concurrency=concurrency)
        return engine_client(self.folder, self.chat_format, self.device, self.dtype)[0]

    def check(self, option: str) -> None:
        """Raise `InputError` unless it can be asked; `option` is the command line's that names it, without dashes."""
        if (target := self.target) is not None:
            Endpoint([target])  # which looks at the URL and the key; first, for a URL may hold a secret
            if not self.model:
                raise InputError(f"Give --{option}-model, the name that {quoted(self.place)[1:-1]} knows the model by.")
        elif self.model or self.key_env:
            raise InputError(OF_AN_ENDPOINT.format(option))
        else:
            check_model_folder(self.folder)


def party_of(
    option: str, place: str, url: str = "", *, model: str = "", key_env: str = "", checked: bool = True, **running: Any
) -> Party | None:
    """The party that a command's options name; None where they name none.

    Args:
        option: name of the option for its URL, without dashes; those for its model and key begin with it.
        place: a folder, or a URL too.
        checked: look at the folder, or at the URL, name and key, now; else who asks does.
        running: other attributes of the party.

    Raises:
        InputError: they name two or contradict each other, the folder is none, or the key is not where it should be.
    """
    if place and url:
        raise InputError(EITHER.format(option))
    if not (place or url):
        if model or key_env:
            raise InputError(OF_AN_ENDPOINT.format(option))
        return None
    party = Party(place or url, model, key_env, **running)
    if url and not party.is_endpoint:
        Endpoint([Target(url, model)])  # which says what a URL looks like
    if checked:
        party.check(option)
    return party


def required_party(option: str, place: str, url: str = "", **named: Any) -> Party:
    """As `party_of`; `InputError` where no party is named."""
    if (party := party_of(option, place, url, **named)) is None:
        raise InputError(EITHER.format(option))
    return party
