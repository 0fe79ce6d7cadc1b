"""The models that a recipe names, ready to be asked: who writes, behind endpoints or in this process, and the reward model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from gristmill.core.errors import InputError
from gristmill.data.chat import Message
from gristmill.data.rows import Rating, make_id
from gristmill.generation.cached import CachedClient, Client
from gristmill.generation.endpoint import Endpoint, Target
from gristmill.generation.settings import Calls, Model
from gristmill.judge.reward_client import RemoteRewardScorer, RewardModelEndpoint, weight_set
from gristmill.judge.settings import Reward
from gristmill.runs.journal import Journal
from gristmill.synth.writer import Writer

if TYPE_CHECKING:
    from gristmill.judge.reward import RewardScorer

Talk = Sequence[Message]


def source_of(models: Sequence[Model], folder: Path | None, calls: Calls, chat_format: str, *, asks: bool = True) -> Client:
    """Who writes: models behind endpoints, or the one in the folder.

    Args:
        asks: False for a source that is never asked and needs no key.

    Raises:
        InputError: a URL or the folder is wrong, or a key is not where it should be.
    """
    if folder is None:
        targets = [Target(**model.model_dump()) for model in models]
        return Endpoint(targets if asks else [_keyless(target) for target in targets], **calls.model_dump())
    from gristmill.engine.async_source import AsyncEngineClient
    from gristmill.engine.load import EngineArgs, load_engine

    return AsyncEngineClient(load_engine(folder, EngineArgs(chat_format=chat_format)))


def check_reward(reward: Reward, asks: bool = True) -> None:
    """Raise `InputError` unless the reward model can be asked; without its key unless it is."""
    weight_set(reward.weights)
    if reward.base_url:
        RewardModelEndpoint([_target(reward) if asks else _keyless(_target(reward))])
    elif not reward.model or not (Path(reward.model) / "config.json").is_file():
        raise InputError(f"The reward model {reward.model!r} is no model folder: name one, or give base_url for an endpoint.")


def _target(reward: Reward) -> Target:
    return Target(reward.base_url, reward.model, api_key_env=reward.api_key_env, api_key_file=reward.api_key_file)


def _keyless(target: Target) -> Target:
    return replace(target, api_key_env="", api_key_file="")


@cache
def _scorer(folder: Path, chat_format: str) -> "RewardScorer":
    from gristmill.judge.reward import load_scorer

    return load_scorer(folder, chat_format)


async def rate(
    talks: Mapping[str, Talk], reward: Reward, calls: Calls, chat_format: str, writer: Writer, journal: Journal, *, retry_failed: bool
) -> tuple[dict[str, Rating], int]:
    """Ratings of the last turn of conversations, by their ids, and how many calls failed for good. There is none of one that is too long.

    Args:
        chat_format: of a reward model in a folder.
        writer: counts what is left out; its templates are not used.
        journal: of the ratings that were bought.
    """
    if not talks:
        return {}, 0
    if not reward.base_url:
        scorer = _scorer(Path(reward.model), chat_format)
        fitting = {name: talk for name, talk in talks.items() if scorer.fits(talk)}
        return dict(zip(fitting, scorer.score(list(fitting.values())), strict=True)), 0
    source = RewardModelEndpoint([_target(reward)], **calls.model_dump())
    async with source:
        client = CachedClient(source, journal, retry_failed=retry_failed)
        judge = RemoteRewardScorer(client, reward.weights)

        async def one(name: str) -> list[tuple[str, Rating]]:
            return [(name, await judge.rate(talks[name], make_id("rating", reward.model, name, talks[name][-1].content)))]

        return dict(await writer.all(talks, one)), client.failed
