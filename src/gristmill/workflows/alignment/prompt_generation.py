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
from gristmill.generation.endpoint import RowFailed
from gristmill.generation.mixture import opened, shown
from gristmill.runs import artifacts
from gristmill.runs.journal import Journal
from gristmill.synth.pipelines.base import Inputs
from gristmill.synth.registry import PipelineOutput, Pipelines, run_pipelines
from gristmill.synth.writer import ParseError, Writer
from gristmill.workflows.alignment.context import AlignmentContext
from gristmill.workflows.alignment.source import contaminated, normalize_prompt
from gristmill.workflows.dataset.steps import write_topics

MIN_LETTERS = 6  # of a usable prompt
MIN_PLAIN = 0.85  # of its characters are letters, digits, spaces or usual marks
MAX_REPEATS = 3  # of a word, in the mean
PUNCTUATION = frozenset("!\"#$%&'()*+,-./:;<=>?@[]^_`{|}~\\")


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

    async def go(journal: Journal) -> tuple[Writer, list[Demonstration], dict[str, int], dict[str, Any] | None]:
        async with opened(client):
            writer = Writer(context.cached(client, journal), context.templates, seed, answer_sampling=answering)
            pipelines, probe = await _probed(context, writer)
            async with shown(writer.client, context.progress.tick):
                whole, topics = await _write(context, writer, pipelines, seen, refused, kept)
        return writer, whole, topics, probe

    with Journal(folder / artifacts.CALLS.file) as journal:
        writer, whole, topics, probe = asyncio.run(go(journal))
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
    return {"funnel": dict(funnel), "topics": topics, "conversations": len(whole), **left_out} | ({"probe": probe} if probe else {})


async def _probed(context: AlignmentContext, writer: Writer) -> tuple[Pipelines, dict[str, Any] | None]:
    """The pipelines that write: the recipe's, or without by_task where a few calls show that the model cannot write so.

    The calls are the first ones of the round, so that none is bought twice.

    Returns:
        the pipelines, and what was found where by_task is left out.
    """
    settings, pipelines = context.recipe.probe, context.recipe.pipelines
    least = settings.min_usable
    if not settings.num_prompts or pipelines.by_task is None:
        return pipelines, None
    texts: list[str] = []
    template = context.templates["task_prompt"]
    sampling = replace(template.sampling, max_tokens=pipelines.by_task.max_tokens)
    tasks = pipelines.by_task.tasks or context.source.tasks
    calls = [(task, number) for number in range(pipelines.by_task.prompts) for task in tasks][: settings.num_prompts]

    async def one(entry: tuple[str, int]) -> None:
        task, number = entry
        try:
            reply = await writer.reply("task_prompt", salt=number, sampling=sampling, task=task)
        except (ParseError, RowFailed):  # cut off, or nothing: no prompt
            return
        texts.append(reply.text if reply.text != reply.request else "")

    await asyncio.gather(*(one(entry) for entry in calls))
    writer.dropped.clear()
    usable = {text for text in texts if is_usable_prompt(text)}
    if len(usable) >= least * len(calls):
        return pipelines, None
    instead = ", ".join(settings.fallback.named())
    found = {"asked": len(calls), "usable": len(usable), "example": min(texts, default="cut off")[:60], "instead": instead}
    changes = {name: getattr(settings.fallback, name) for name in settings.fallback.named()}
    return pipelines.model_copy(update={"by_task": None} | changes), found


def is_usable_prompt(text: str) -> bool:
    """Whether a text can be a prompt: words, mostly of letters, that do not go round in circles."""
    words, letters = text.split(), sum(c.isalpha() for c in text)
    plain = sum(c.isalnum() or c.isspace() or c in PUNCTUATION for c in text)
    if letters < MIN_LETTERS or plain < MIN_PLAIN * len(text):
        return False
    return len(set(words)) > len(words) / MAX_REPEATS


async def _write(
    context: AlignmentContext, writer: Writer, pipelines: Pipelines, seen: set[str], refused: list[Refused], kept: list[Prompt]
) -> tuple[list[Demonstration], dict[str, int]]:
    """Run the pipelines, the one for second turns last; add the prompts to `kept`.

    Returns:
        whole conversations, and how many different topics each task's prompts grew from.
    """
    settings, inputs = context.recipe, Inputs(tasks=context.source.tasks)
    first = await run_pipelines(writer, settings.topics, pipelines.model_copy(update={"two_turn": None}), inputs=inputs)
    _keep(context, first.prompts, seen, refused, kept)
    openings = [p for p in kept if len(p.messages) == 1 and p.task not in context.source.code_tasks]
    second = PipelineOutput()
    if openings and pipelines.two_turn is not None:
        last = Pipelines(two_turn=pipelines.two_turn)
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
