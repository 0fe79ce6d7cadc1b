"""The current Instruct writes prompts: topics, questions about them, and second turns (report, section 3.2.1)."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from gristmill.chat import Conversation, Message
from gristmill.engine.engine import Engine
from gristmill.engine.generator import Completion, Request, Sampling
from gristmill.flywheel.mill import Mill, spread
from gristmill.flywheel.source import contaminated, fold
from gristmill.rows import Prompt, make_id, write_rows

MIN_NAMED = 2  # a topic that is named once in many draws is often a slip


def write_prompts(
    mill: Mill, engine: Engine, round_number: int, seen: set[str], answered: set[str], folder: Path
) -> tuple[list[Prompt], dict[str, Any]]:
    """A round's prompts, deduplicated against `seen` (earlier rounds and human rows) and decontaminated.

    Prompts of a file are asked in every round until an answer was kept: `answered` are the ids of those.

    Returns:
        prompts in random order, and the funnel: how many were dropped and why.
    """
    source, writing = mill.source, mill.recipe.writing
    seed = mill.recipe.seed * 1000 + round_number
    funnel: Counter[str] = Counter()
    sampling = Sampling(temperature=writing.temperature, top_p=writing.top_p, max_tokens=writing.max_tokens)
    topics = _topics(mill, engine, seed, sampling, folder)
    asked: list[tuple[Request, str, tuple[str, ...]]] = []
    for task, template in source.prompt_requests.items():
        pool = topics.get(task) or [""]
        for i, topic in enumerate(spread(pool, writing.prompts)):
            text = template.format(topic=topic, task=task)
            name = make_id("prompt", seed, task, i, text)
            asked.append((Request(name, (Message("user", text),), sampling, seed), task, (make_id("topic", task, topic),)))
    replies = mill.generate(engine, [r for r, _, _ in asked], folder / "prompts.jsonl")
    prompts: list[Prompt] = []
    for given in source.prompts():
        funnel["from file"] += 1
        if contaminated(given.messages, mill.held_out):
            funnel["held out"] += 1
        elif given.id in answered:
            funnel["answered before"] += 1
        else:
            seen.add(fold(given.messages))
            prompts.append(replace(given, truth=None) if mill.recipe.control == "reward-only" else given)
    for request, task, parents in asked:
        messages = (Message("user", replies[request.id][0].text.strip()),)
        _keep(
            mill,
            Prompt(request.id, task, messages, engine.name, parents, request=request.messages[0].content),
            replies[request.id][0],
            seen,
            funnel,
            prompts,
        )
    if source.followup_task:
        _second_turns(mill, engine, list(prompts), seed, folder, seen, funnel, prompts)
    funnel["kept"] = len(prompts)
    random.Random(seed).shuffle(prompts)
    write_rows(folder / "prompts.parquet", prompts)
    return prompts, {"funnel": dict(funnel), "topics": {t: len(set(v)) for t, v in topics.items()}}


def _topics(mill: Mill, engine: Engine, seed: int, sampling: Sampling, folder: Path) -> dict[str, list[str]]:
    """Different topics by task: the user's, then those that the model names more than once, the most often named first."""
    requests = [
        Request(make_id("topic", seed, task, i), (Message("user", text),), sampling, seed)
        for task, text in mill.source.topic_requests.items()
        for i in range(mill.recipe.writing.topics)
    ]
    replies = mill.generate(engine, requests, folder / "topics.jsonl")
    named: dict[str, Counter[str]] = {task: Counter() for task in mill.source.topic_requests}
    tasks = [task for task in mill.source.topic_requests for _ in range(mill.recipe.writing.topics)]
    for request, task in zip(requests, tasks, strict=True):
        topic = replies[request.id][0].text.strip()
        if 0 < len(topic) <= 40 and "\n" not in topic and replies[request.id][0].finish == "stop":
            named[task][topic] += 1
    manual = mill.source.topics()
    return {
        task: list(dict.fromkeys([*manual.get(task, []), *(t for t, count in counts.most_common() if count >= MIN_NAMED)]))
        for task, counts in named.items()
    }


def _second_turns(
    mill: Mill, engine: Engine, first: list[Prompt], seed: int, folder: Path, seen: set[str], funnel: Counter[str], out: list[Prompt]
) -> None:
    """User, assistant, user: the model answers one of its prompts, then asks the next question."""
    source, recipe = mill.source, mill.recipe
    task = source.followup_task
    assert task is not None
    chosen = [p for p in first if p.task != task and p.task not in source.code_tasks]
    random.Random(seed).shuffle(chosen)
    chosen = chosen[: recipe.writing.prompts]
    answering = Sampling(temperature=min(recipe.responses.temperatures), max_tokens=recipe.responses.max_tokens)
    answers = mill.generate(engine, [Request(f"{p.id}-a", p.messages, answering, seed) for p in chosen], folder / "answers.jsonl")
    sampling = Sampling(temperature=recipe.writing.temperature, top_p=recipe.writing.top_p, max_tokens=recipe.writing.max_tokens)
    requests, talks = [], []
    for p in chosen:
        answer = answers[f"{p.id}-a"][0].text
        text = source.next_request.format(question=p.messages[-1].content, answer=answer)
        if not mill.fits((Message("user", text),)):
            funnel["too long"] += 1
            continue
        requests.append(Request(make_id("next", seed, p.id), (Message("user", text),), sampling, seed))
        talks.append((p, answer))
    replies = mill.generate(engine, requests, folder / "next.jsonl")
    for request, (p, answer) in zip(requests, talks, strict=True):
        messages: Conversation = (*p.messages, Message("assistant", answer), Message("user", replies[request.id][0].text.strip()))
        _keep(
            mill,
            Prompt(request.id, task, messages, engine.name, (p.id,), request=request.messages[0].content),
            replies[request.id][0],
            seen,
            funnel,
            out,
        )


def _keep(mill: Mill, prompt: Prompt, reply: Completion, seen: set[str], funnel: Counter[str], out: list[Prompt]) -> None:
    """Add a prompt unless it is broken, repeated, held out, or of a task whose verifier cannot read it."""
    funnel["written"] += 1
    text = fold(prompt.messages)
    if reply.finish != "stop" or not prompt.messages[-1].content:
        funnel["unfinished"] += 1
    elif text in seen:
        funnel["repeated"] += 1
    elif contaminated(prompt.messages, mill.held_out):
        funnel["held out"] += 1
    elif not mill.fits(prompt.messages):
        funnel["too long"] += 1
    else:
        truth = None if mill.recipe.control == "reward-only" else mill.source.truth(prompt.task, prompt.messages)
        understood = truth or mill.source.truth(prompt.task, prompt.messages)
        if understood is None and mill.source.checkable(prompt.task, prompt.messages):
            funnel["not understood"] += 1
            return
        seen.add(text)
        out.append(replace(prompt, truth=truth))
