"""Rewards by models, as parts beside the verifier's verdict: the five-attribute reward model, and an LLM judge that grades.

Both see the reply behind the thinking. What an endpoint has said is in a journal, and equal answers to a prompt are asked about once.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from gristmill.core.errors import InputError
from gristmill.core.response_text import answer_text
from gristmill.data.chat import Message
from gristmill.data.rows import Prompt, make_id
from gristmill.engine.engine import Engine
from gristmill.engine.load import EngineArgs, load_engine
from gristmill.evaluate.mt_bench import GRADE, MAX_RATING, MIN_RATING, OF_REFERENCE, parse_rating
from gristmill.generation.api import Completion, Request, SamplingParams
from gristmill.generation.cached import BatchingClient, CachedClient, Client
from gristmill.generation.endpoint import Endpoint, Target
from gristmill.generation.settings import Calls, GeneratorSettings
from gristmill.judge.backends import check_reward, rater_of, target_of
from gristmill.judge.judges import Scorer, gather_unfailed
from gristmill.judge.pairwise import judge_prompt
from gristmill.judge.reward_client import weight_set
from gristmill.model.adapters import check_model_folder
from gristmill.runs.journal import Journal
from gristmill.workflows.rl.recipe import Judge, RewardModel, RlRecipe
from gristmill.workflows.rl.rewards import RewardPart

Values = list[float | str | None]


def check_models(recipe: RlRecipe) -> None:
    """Raise `InputError` unless the models of a recipe's rewards can be asked."""
    if recipe.rewards.reward_model is not None:
        check_reward(recipe.rewards.reward_model)
    judge = recipe.rewards.judge
    if judge is not None and judge.folder is not None:
        check_model_folder(judge.folder)
    elif judge is not None:
        Endpoint([_target(judge)])


def model_parts(recipe: RlRecipe, journal: Journal, scorer: Callable[[Path], Scorer]) -> list[RewardPart]:
    """The parts of a recipe's rewards that are models; what their endpoints say goes into the journal.

    Args:
        scorer: of a reward model in a folder.
    """
    out: list[RewardPart] = []
    if (reward := recipe.rewards.reward_model) is not None:
        own = None if reward.folder is None else scorer(reward.folder)
        out.append(RewardModelPart(reward, recipe.calls, journal, device=recipe.device, scorer=own))
    if (judge := recipe.rewards.judge) is not None:
        out.append(JudgePart(judge, recipe.calls, journal, device=recipe.device))
    return out


class RewardModelPart:
    """The five-attribute reward model, in this process or behind an endpoint: the weighted sum of the attributes."""

    name = "reward_model"

    def __init__(self, settings: RewardModel, calls: Calls, journal: Journal, *, device: str, scorer: Scorer | None = None):
        self.weight, self._weights = settings.weight, weight_set(settings.weights)
        self._rater = rater_of(settings, calls, journal, device=device, retry_failed=True, scorer=scorer)

    def rewards(self, prompts: Sequence[Prompt], answers: Sequence[Completion]) -> Values:
        """Scores of answers; of one that it cannot rate, why.

        Raises:
            InputError: it rates none.
        """
        names = [make_id(p.id, a.text) for p, a in zip(prompts, answers, strict=True)]
        talks = {name: (*p.messages, _reply(a)) for name, p, a in zip(names, prompts, answers, strict=True)}
        found = asyncio.run(self._rater.rate(talks))
        error = "the reward model has no rating of it: its context is too short, or the call failed"
        return _some(self.name, [found[name].score(self._weights) if name in found else error for name in names])


class JudgePart:
    """An LLM judge, in this process or behind an endpoint: its grade of an answer, 1 to 10, as 0 to 1."""

    name = "judge"

    def __init__(self, settings: Judge, calls: Calls, journal: Journal, *, device: str):
        self.weight, self._settings, self._calls, self._journal = settings.weight, settings, calls, journal
        self._engine: Engine | None = None
        if settings.folder is not None:
            self._engine = load_engine(settings.folder, EngineArgs(device=device))

    def rewards(self, prompts: Sequence[Prompt], answers: Sequence[Completion]) -> Values:
        """Grades of answers; of one without a grade, why.

        Raises:
            InputError: it grades none.
        """
        asked = [self._request(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        replies = asyncio.run(self._replies({request.id: request for request in asked}))
        return _some(self.name, [self._value(replies.get(request.id)) for request in asked])

    def _request(self, prompt: Prompt, answer: Completion) -> Request:
        talk = "\n".join(f"{m.role}: {m.content}" for m in prompt.messages)
        known = (prompt.truth or {}).get("value")
        parts = [f"### Request:\n{talk}", f"### Answer to grade:\n{_reply(answer).content}"]
        if known is not None:
            parts.insert(1, f"### Reference answer:\n{known}")
        messages = judge_prompt(GRADE.format(more=OF_REFERENCE if known is not None else ""), parts)
        name = make_id("grade", *self._settings.identity, self._settings.max_tokens, messages[0].content)
        return Request(name, messages, SamplingParams(temperature=0.0, max_tokens=self._settings.max_tokens))

    async def _replies(self, requests: dict[str, Request]) -> dict[str, str]:
        async with AsyncExitStack() as stack:
            source: Client
            if self._engine is not None:
                source = BatchingClient(self._engine)
            else:
                source = await stack.enter_async_context(Endpoint([_target(self._settings)], **self._calls.model_dump()))
            client = CachedClient(source, self._journal, retry_failed=True)

            async def one(request: Request) -> tuple[str, str]:
                return request.id, (await client.complete(request))[0].text

            return dict(await gather_unfailed(requests.values(), one))

    @staticmethod
    def _value(reply: str | None) -> float | str:
        if reply is None:
            return "the call of the judge failed"
        rating = parse_rating(reply)
        return "the judge's reply holds no grade" if rating is None else (rating - MIN_RATING) / (MAX_RATING - MIN_RATING)


def _target(judge: Judge) -> Target:
    return target_of(GeneratorSettings(**judge.model_dump(include=GeneratorSettings.model_fields.keys() - {"weight"})))


def _reply(answer: Completion) -> Message:
    return Message("assistant", answer_text(answer.text))


def _some(name: str, values: Values) -> Values:
    """The values; `InputError` where all are errors."""
    if values and all(isinstance(value, str) for value in values):
        raise InputError(
            f"rewards.{name} fails on every answer ({values[0]}): mend it and run the same command again; nothing sampled is lost."
        )
    return values
