"""Rollouts of a step: prompts drawn by (seed, step), answers from the journal or the engine, rewards, advantages, training samples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from gristmill.data.rows import Prompt
from gristmill.generation.api import Completion, Generator, Request, SamplingParams
from gristmill.runs.journal import Journal
from gristmill.train.batches import Rollout
from gristmill.train.objectives.policy_gradient import group_advantages
from gristmill.workflows.rl.policy import Policy
from gristmill.workflows.rl.process import step_advantages, token_advantages
from gristmill.workflows.rl.recipe import ADVANTAGE, RlRecipe
from gristmill.workflows.rl.rewards import Reward, Rewarder

# What is sampled from is what is trained: a cut or a temperature would change one side's probabilities alone.
TEMPERATURE = 1.0


@dataclass(frozen=True)
class Group:
    """The answers to one prompt, sampled by the weights of one step."""

    id: str
    prompt: Prompt
    answers: Sequence[Completion]
    rewards: Sequence[Reward]

    @property
    def kept(self) -> list[int]:
        """Places of the answers that count."""
        return [i for i, reward in enumerate(self.rewards) if not reward.is_masked]

    @property
    def has_spread(self) -> bool:
        """Whether there is anything to learn: told by equality, for a deviation of rounding errors is no spread."""
        earned = [(self.rewards[i].total, *self.rewards[i].steps) for i in self.kept]
        return bool(earned) and max(earned) > min(earned)


class RolloutSource:
    """Gives the groups of each step, and never asks or judges twice what the journal holds.

    Args:
        prompts: with truths.
        policy: samples from the weights that are trained.
        journal: of answers, which are there before their rewards, and of rewards.
        order: places of the prompts of all steps; none: shuffles of all of them, one after another.
        sampler: what answers with the policy's weights; default its engine.
    """

    def __init__(
        self,
        recipe: RlRecipe,
        prompts: Sequence[Prompt],
        policy: Policy,
        rewarder: Rewarder,
        journal: Journal,
        *,
        order: Sequence[int] = (),
        sampler: Generator | None = None,
    ):
        self._recipe, self._prompts, self._policy, self._rewarder, self._journal = recipe, prompts, policy, rewarder, journal
        self._given, self._sampler = order, sampler
        self._order: tuple[int, np.ndarray] = (-1, np.arange(0))  # the latest epoch and its shuffle

    def step(self, step: int) -> list[Group]:
        """All groups of a step: of one draw, or of as many as dynamic sampling takes until enough have a spread (`trained`)."""
        groups: list[Group] = []
        for draw in range(self._recipe.max_draws):
            groups += self._draw(step, draw)
            if len(self.trained(groups)) >= self._recipe.prompts:
                break
        return groups

    def trained(self, groups: Sequence[Group]) -> list[Group]:
        """The groups of a step that are trained on: the first with a spread, as many as the recipe wants."""
        return [group for group in groups if group.has_spread][: self._recipe.prompts]

    def _draw(self, step: int, draw: int) -> list[Group]:
        recipe = self._recipe
        first = (step * recipe.max_draws + draw) * recipe.prompts
        chosen = {f"s{step}-{draw}-{i}-{p.id}": p for i, p in enumerate(self._stream(first, recipe.prompts))}
        limits: dict[str, Any] = {"max_tokens": recipe.max_tokens, "max_thinking_tokens": recipe.max_thinking_tokens}
        sampling = SamplingParams(temperature=TEMPERATURE, n=recipe.samples, **limits)
        # the step is part of a request's id: each visit of a prompt shall see other answers
        requests = [Request(name, p.messages, sampling, recipe.seed, adapter=self._policy.adapter) for name, p in chosen.items()]
        if any(request.id not in self._journal for request in requests):
            # All of them again after a kill: in a smaller batch the last digits of sums may differ. What is in the journal stays.
            for request, completions in (self._sampler or self._policy.engine).generate(requests):
                if request.id not in self._journal:
                    asked, out = chosen[request.id], [_written(completion) for completion in completions]
                    question = asked.messages[-1].content
                    self._journal.append({"id": request.id, "step": step, "prompt": asked.id, "question": question, "out": out})
        answers = {name: [_read(one) for one in self._journal[name]["out"]] for name in chosen}
        judged = f"s{step}-{draw}-rewards"  # one record: a reward model that rates fewer answers together sums in another order
        if judged not in self._journal:
            cases = [(prompt, answer) for name, prompt in chosen.items() for answer in answers[name]]
            found = iter(self._rewarder.rewards([p for p, _ in cases], [a for _, a in cases]))
            rewards = {name: [vars(next(found)) for _ in answers[name]] for name in chosen}
            self._journal.append({"id": judged, "step": step, "rewards": rewards})
        rewards = self._journal[judged]["rewards"]
        return [Group(name, p, answers[name], [Reward(**values) for values in rewards[name]]) for name, p in chosen.items()]

    def _stream(self, first: int, num: int) -> Iterator[Prompt]:
        """Prompts from a place on of the given order, or of one shuffle of all of them after another."""
        if self._given:
            yield from (self._prompts[i] for i in self._given[first : first + num])
            return
        size = len(self._prompts)
        for place in range(first, first + num):
            epoch, offset = divmod(place, size)
            if self._order[0] != epoch:
                self._order = (epoch, np.random.default_rng([self._recipe.seed, epoch]).permutation(size))
            yield self._prompts[int(self._order[1][offset])]

    def samples(self, group: Group) -> list[Rollout]:
        """Training samples of a group's answers that count."""
        prompt = self._policy.chat_format.render_prompt(group.prompt.messages, self._policy.tokenizer)
        out = []
        for i, advantage in zip(group.kept, self._advantages(group), strict=True):
            answer = group.answers[i]
            chosen = [place not in answer.forced for place in range(len(answer.tokens))]  # by the model: all but a budget's closing tags
            logprobs = [value for value, own in zip(answer.logprobs, chosen, strict=True) if own]
            ids, mask = [*prompt, *answer.tokens], [False] * len(prompt) + chosen
            own_advantage = advantage[chosen] if isinstance(advantage, np.ndarray) else advantage
            out.append(Rollout(ids, mask, f"{group.id}-{i}", advantage=own_advantage, logprobs=logprobs, prompt=group.id))
        return out

    def _advantages(self, group: Group) -> Sequence[float | np.ndarray]:
        """Of each answer that counts its advantage, or those of its tokens where steps are rewarded one by one."""
        kind, kept = self._recipe.advantage or ADVANTAGE[self._recipe.method], group.kept
        if not all(group.rewards[i].steps for i in kept):
            return group_advantages(kind, [group.rewards[i].total for i in kept])
        answers, steps = [group.answers[i] for i in kept], step_advantages(kind, [group.rewards[i].steps for i in kept])
        tokenizer = self._policy.tokenizer
        return [token_advantages(tokenizer, a.text, a.tokens, found) for a, found in zip(answers, steps, strict=True)]


def _written(answer: Completion) -> dict[str, Any]:
    told = {"text": answer.text, "tokens": answer.tokens, "logprobs": answer.logprobs, "finish": answer.finish}
    return told | ({"forced": answer.forced} if answer.forced else {})


def _read(record: dict[str, Any]) -> Completion:
    tokens = tuple(record["tokens"])
    logprobs, forced = tuple(record["logprobs"]), tuple(record.get("forced", ()))
    return Completion(record["text"], len(tokens), logprobs, record["finish"], tokens, forced=forced)


def group_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Rewards by part, groups with a spread, and the lengths of right and wrong answers apart."""
    rewards = [(reward, answer) for group in groups for reward, answer in zip(group.rewards, group.answers, strict=True)]
    lengths: dict[bool, list[int]] = {True: [], False: []}
    for reward, answer in rewards:
        lengths[reward.right > 0].append(answer.num_tokens)
    right = [[reward.right for reward in group.rewards] for group in groups]
    out = {name: fmean(getattr(reward, name) for reward, _ in rewards) for name in ("total", "right", "form", "overlong")}
    out |= {
        "cut_off": fmean(answer.finish == "length" for _, answer in rewards),
        "spread": fmean(group.has_spread for group in groups),
        "all_right": fmean(min(values) > 0 for values in right),
        "all_wrong": fmean(max(values) == 0 for values in right),
    }
    names = dict.fromkeys(name for reward, _ in rewards for name in reward.parts)
    out |= {f"reward_{name}": fmean(reward.parts[name] for reward, _ in rewards if name in reward.parts) for name in names}
    if any(reward.error for reward, _ in rewards):
        out["failed"] = fmean(bool(reward.error) for reward, _ in rewards)
    return {f"reward_{k}" if k in ("total", "right", "form", "overlong") else k: v for k, v in out.items()} | {
        f"length_{'right' if ok else 'wrong'}": fmean(values) for ok, values in lengths.items() if values
    }
