"""The current Instruct writes prompts with the pipelines of the recipe (report, section 3.2.1), and what is worth answering is kept."""

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gristmill.data.rows import Demonstration, Prompt, Refused
from gristmill.generation.api import SamplingParams
from gristmill.generation.cached import Client
from gristmill.generation.mixture import opened, shown
from gristmill.runs import artifacts
from gristmill.runs.journal import Journal
from gristmill.synth.pipelines.base import Inputs
from gristmill.synth.registry import PipelineOutput, Pipelines, run_pipelines
from gristmill.synth.writer import Writer
from gristmill.workflows.alignment.context import AlignmentContext
from gristmill.workflows.alignment.source import contaminated, normalize_prompt
from gristmill.workflows.dataset.steps import write_topics


def write_prompts(
    context: AlignmentContext, client: Client, number: int, *, seen: set[str], answered: set[str], folder: Path
) -> dict[str, Any]:
    """A round's prompts, deduplicated against `seen` (earlier rounds and human rows) and decontaminated, in random order.

    Prompts of a file are asked in every round until an answer was kept: `answered` are the ids of those.

    Returns:
        the funnel (how many were dropped and why), topics by task, and how many conversations pipelines wrote whole.
    """
    seed = context.recipe.seed * 1000 + number
    funnel: Counter[str] = Counter()
    kept: list[Prompt] = []
    refused: list[Refused] = []
    for given in context.source.prompts():
        funnel["from file"] += 1
        if contaminated(given.messages, context.held_out):
            funnel["held out"] += 1
            refused.append(Refused(given.id, given.task, given.messages[-1].content, "held out"))
        elif given.id in answered:
            funnel["answered before"] += 1
        else:
            seen.add(normalize_prompt(given.messages))
            kept.append(replace(given, truth=None) if context.recipe.control == "reward-only" else given)
    num_given, given_refused = len(kept), len(refused)
    answers = context.recipe.answers
    answering = SamplingParams(temperature=min(answers.temperatures), max_tokens=answers.max_tokens)

    async def go(journal: Journal) -> tuple[Writer, list[Demonstration], dict[str, int]]:
        async with opened(client):
            writer = Writer(context.cached(client, journal), context.templates, seed, answer_sampling=answering)
            async with shown(writer.client, context.progress.tick):
                whole, topics = await _write(context, writer, seen, refused, kept)
        return writer, whole, topics

    with Journal(folder / artifacts.CALLS.file) as journal:
        writer, whole, topics = asyncio.run(go(journal))
    written = refused[given_refused:]
    funnel["written"] = len(kept) - num_given + len(written)
    funnel.update(r.reason for r in written)
    funnel.update(writer.dropped)
    funnel["kept"] = len(kept)
    random.Random(seed).shuffle(kept)
    artifacts.PROMPTS.write(folder, kept)
    artifacts.CONVERSATIONS.write(folder, whole)
    artifacts.REFUSED.write(folder, refused)
    write_topics(folder, writer)
    left_out = {"left_out": dict(writer.client.left_out)} if writer.client.left_out else {}
    return {"funnel": dict(funnel), "topics": topics, "conversations": len(whole), **left_out}


async def _write(
    context: AlignmentContext, writer: Writer, seen: set[str], refused: list[Refused], kept: list[Prompt]
) -> tuple[list[Demonstration], dict[str, int]]:
    """Run the pipelines, the one for second turns last; add the prompts to `kept`.

    Returns:
        whole conversations, and how many different topics each task's prompts grew from.
    """
    settings, inputs = context.recipe, Inputs(tasks=context.source.tasks)
    first = await run_pipelines(writer, settings.topics, settings.pipelines.model_copy(update={"two_turn": None}), inputs=inputs)
    _keep(context, first.prompts, seen, refused, kept)
    openings = [p for p in kept if len(p.messages) == 1 and p.task not in context.source.code_tasks]
    second = PipelineOutput()
    if openings and settings.pipelines.two_turn is not None:
        last = Pipelines(two_turn=settings.pipelines.two_turn)
        second = await run_pipelines(writer, settings.topics, last, inputs=replace(inputs, prompts=openings))
        _keep(context, second.prompts, seen, refused, kept)
    roots: dict[str, set[str]] = {}
    for p in first.prompts:
        roots.setdefault(context.source.task(p.task), set()).add(p.parents[-1])
    whole = [d for d in [*first.demonstrations, *second.demonstrations] if not contaminated(d.messages[:-1], context.held_out)]
    return [d for d in whole if context.fits(d.messages[:-1])], {task: len(names) for task, names in roots.items()}


def _keep(context: AlignmentContext, written: Sequence[Prompt], seen: set[str], refused: list[Refused], kept: list[Prompt]) -> None:
    """Add the prompts that are not repeated, held out, too long, or of a task whose verifier cannot read them."""
    for prompt in written:
        prompt = replace(prompt, task=context.source.task(prompt.task))
        text = normalize_prompt(prompt.messages)
        truth = context.source.truth(prompt.task, prompt.messages)
        reason = ""
        if text in seen:
            reason = "repeated"
        elif contaminated(prompt.messages, context.held_out):
            reason = "held out"
        elif not context.fits(prompt.messages):
            reason = "too long"
        elif truth is None and prompt.truth is None and context.source.checkable(prompt.task, prompt.messages):
            reason = "not understood"
        if reason:
            refused.append(Refused(prompt.id, prompt.task, prompt.messages[-1].content, reason))
            continue
        seen.add(text)
        known = None if context.recipe.control == "reward-only" else truth or prompt.truth
        kept.append(replace(prompt, truth=known))
