"""The models that a recipe names, ready to be asked: generators and reward models, behind endpoints or in this process."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gristmill.core.errors import InputError
from gristmill.generation.cached import Client
from gristmill.generation.endpoint import Endpoint, Target
from gristmill.generation.mixture import MixtureClient
from gristmill.generation.settings import Calls, GeneratorSettings
from gristmill.judge.judges import EndpointRater, LocalRater, Rater, Scorer
from gristmill.judge.programs import Tick
from gristmill.judge.reward_client import RewardModelEndpoint, weight_set
from gristmill.judge.settings import Reward
from gristmill.model.folder import model_file
from gristmill.runs.journal import Journal

if TYPE_CHECKING:
    from gristmill.judge.reward import RewardScorer

Dtype = Literal["auto", "fp32", "bf16"]  # that a folder's model computes in
Local = Callable[[GeneratorSettings], tuple[Client, str]]  # a client of a model in this process, and the model's name


def client_of(generators: Sequence[GeneratorSettings], calls: Calls, local: Local, *, asks: bool = True) -> Client:
    """Who writes: one client for all generators, to which each request goes by their weights.

    Args:
        local: makes the client of a generator that is no endpoint.
        asks: False for a client that is never asked and needs no key.

    Raises:
        InputError: a URL or a folder is wrong, or a key is not where it should be.
    """
    clients: list[tuple[Client, float, Sequence[str]]] = []
    if remote := [g for g in generators if g.base_url]:
        targets = [_keyless(target_of(g)) if not asks else target_of(g) for g in remote]
        clients.append((Endpoint(targets, **calls.model_dump()), sum(g.weight for g in remote), [g.model for g in remote]))
    for g in generators:
        if not g.base_url:
            client, name = local(g)
            clients.append((client, g.weight, [name]))
    return clients[0][0] if len(clients) == 1 else MixtureClient(clients)


def target_of(generator: GeneratorSettings) -> Target:
    """A generator's endpoint."""
    return Target(**generator.model_dump(exclude={"folder", "checkpoint", "rounds"}))


def engine_client(folder: Path, chat_format: str = "auto", device: str = "auto", dtype: Dtype = "auto") -> tuple[Client, str]:
    """A model folder whose engine takes calls as they come, like an endpoint, and the model's name."""
    from gristmill.engine.async_source import AsyncEngineClient
    from gristmill.engine.load import EngineArgs, load_engine

    engine = load_engine(folder, EngineArgs(chat_format=chat_format, device=device, dtype=dtype))
    return AsyncEngineClient(engine), engine.name


def check_reward(reward: Reward, asks: bool = True) -> None:
    """Raise `InputError` unless the reward model can be asked; without its key unless it is."""
    weight_set(reward.weights)
    if reward.base_url:
        RewardModelEndpoint([_target(reward) if asks else _keyless(_target(reward))])
    elif reward.folder is None:
        raise InputError("The reward model has no place: give its folder, or base_url for an endpoint.")
    else:
        model_file(reward.folder, "config.json")


def rater_of(
    reward: Reward,
    calls: Calls,
    journal: Journal,
    *,
    chat_format: str = "auto",
    device: str = "auto",
    retry_failed: bool = False,
    tick: Tick | None = None,
    scorer: Scorer | None = None,
) -> Rater:
    """The reward model of a recipe.

    Args:
        scorer: what rates in place of a folder's reward model in this process.
    """
    if reward.base_url:
        return EndpointRater(_target(reward), reward, calls, journal, retry_failed=retry_failed)
    assert reward.folder is not None
    return LocalRater(scorer or scorer_of(reward.folder, chat_format, device), tick)


def _target(reward: Reward) -> Target:
    given = reward.model_dump(include={"base_url", "model", "api_key_env", "api_key_file", "fields", "extra_body"})
    return Target(**given)


def _keyless(target: Target) -> Target:
    return replace(target, api_key_env="", api_key_file="")


@cache
def scorer_of(folder: Path, chat_format: str, device: str) -> "RewardScorer":
    """The reward model in a folder, loaded once."""
    from gristmill.judge.reward import load_scorer

    return load_scorer(folder, chat_format, device=device)
