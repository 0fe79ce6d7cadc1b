"""Answers of a round: drawn from its generators, judged, and made into demonstrations and pairs. The steps are those of a dataset run."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from gristmill.data.chat import Message
from gristmill.data.rows import Demonstration, Pair, Prompt, Response, make_id
from gristmill.generation.api import SamplingParams
from gristmill.generation.cached import Client
from gristmill.generation.mixture import opened, shown
from gristmill.judge.judges import Judges
from gristmill.judge.select import pair
from gristmill.runs import artifacts
from gristmill.runs.journal import Journal
from gristmill.synth.writer import Writer
from gristmill.train.settings import PreferenceTraining
from gristmill.workflows.alignment.context import AlignmentContext
from gristmill.workflows.dataset.steps import answer_prompts, conversation_of

WRITING = "prompt-writing"  # task of the rows that teach it
Result = TypeVar("Result")
Work = Callable[[list[Response], Judges], Awaitable[Result]]


def answer(
    context: AlignmentContext,
    client: Client,
    prompts: Sequence[Prompt],
    seed: int,
    *,
    folder: Path,
    reward_folder: Path | None,
    work: Work[Result],
    repair: bool = False,
    temperatures: tuple[float, ...] = (),
) -> Result:
    """Judged answers to prompts, `answers.samples` each, and what `work` makes of them while the judges can still be asked.

    Repeated answers to a prompt count as votes; those that take more tokens than the context when they are tokenized again are left out.

    Args:
        folder: the stage's, for the journals and the responses.
        reward_folder: of the reward model that the run has trained; None where it has none.
        repair: add repaired answers (`judging.repair`).
        temperatures: instead of `answers.temperatures`.
    """

    def request_id(prompt: Prompt, sampling: SamplingParams) -> str:
        return make_id("answer", seed, client.model_of(prompt.id), prompt.id, sampling.temperature)

    async def go() -> Result:
        with ExitStack() as stack:
            journal = stack.enter_context(Journal(folder / artifacts.CALLS.file))
            async with opened(client):
                writer = Writer(context.cached(client, journal), context.templates, seed)
                judges = context.judges(stack, folder, reward_folder=reward_folder, client=writer.client)
                answers = context.recipe.answers
                samplings = (answers.model_copy(update={"temperatures": temperatures}) if temperatures else answers).sampling()
                async with shown(writer.client, context.progress.tick, len(prompts) * len(samplings)):
                    rows = await answer_prompts(writer, prompts, samplings, request_id=request_id, strip=False)
                rows = [r for r in rows if context.holds(conversation_of(r))]
                rows = await judges.judge(prompts, rows)
                if repair:
                    rows += [r for r in await judges.repair(prompts, rows) if context.holds(conversation_of(r))]
                artifacts.RESPONSES.write(folder, rows)
                return await work(rows, judges)

    return asyncio.run(go())


def answer_pairs(
    context: AlignmentContext,
    client: Client,
    prompts: Sequence[Prompt],
    settings: PreferenceTraining,
    seed: int,
    *,
    folder: Path,
    reward_folder: Path | None,
) -> tuple[list[Pair], dict[str, Any]]:
    """Preference pairs of new answers to prompts, and what became of the prompts."""
    judging = context.recipe.judging

    async def work(rows: list[Response], judges: Judges) -> tuple[list[Pair], dict[str, Any]]:
        pairs, facts = await pair(
            rows,
            judging,
            seed,
            keep_chosen=settings.keep_chosen,
            control=context.recipe.control,
            compare=judges.compare if judging.llm else None,
        )
        return pairs, facts | judges.left_out()

    repair = judging.repair is not None and judging.repair.pairs
    return answer(
        context,
        client,
        prompts,
        seed,
        folder=folder,
        reward_folder=reward_folder,
        work=work,
        repair=repair,
        temperatures=settings.temperatures,
    )


def prompt_demonstrations(prompts: Sequence[Prompt], kept: Sequence[Demonstration], max_per_task: int) -> list[Demonstration]:
    """Prompts that a model wrote and that led to a kept answer, as demonstrations of prompt writing."""
    useful = {d.parents[1] for d in kept}
    count: Counter[str] = Counter()
    out = []
    for p in prompts:
        if p.id in useful and p.request and count[p.task] < max_per_task:
            count[p.task] += 1
            messages = (Message("user", p.request), Message("assistant", p.messages[-1].content))
            out.append(Demonstration(make_id("written", p.id), WRITING, messages, p.origin, (p.id,)))
    return out
