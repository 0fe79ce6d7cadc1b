"""Collapse monitors of a run: what a model writes now, against what people wrote (see `evaluate.diversity` for the metrics)."""

import random
from pathlib import Path
from typing import Any

from gristmill.data.chat import Message
from gristmill.evaluate import diversity
from gristmill.generation.api import Request, SamplingParams
from gristmill.workflows.alignment.context import ASKED, AlignmentContext
from gristmill.workflows.alignment.state import State

SAMPLES = 200


def measure(context: AlignmentContext, state: State, name: str, number: int) -> list[str]:
    """Sample the model on the evaluation prompts (the same ones every time), measure, and return the alarms.

    Without a text that people wrote there is nothing to measure against, and no alarm.
    """
    if not state.ratings and not state.demonstrations:
        return []

    def work(folder: Path) -> dict[str, Any]:
        engine, base = context.engine(name, state.models[name]), context.engine("base", context.base_folder)
        # shuffled, because the token budget cuts the texts off at the end
        prompts = random.Random(context.recipe.seed).sample(context.evaluation, min(SAMPLES, len(context.evaluation)))
        sampling = SamplingParams(temperature=1.0, max_tokens=context.recipe.answers.max_tokens)
        requests = [Request(f"{p.id}-monitor", p.messages, sampling, context.recipe.seed) for p in prompts]
        replies = context.generate(engine, requests, folder / "samples.jsonl")
        talks = [(*p.messages, Message("assistant", replies[f"{p.id}-monitor"][0].text)) for p in prompts]
        human = [r.messages for r in state.ratings if (r.labels[1] or 0) >= 3][-len(prompts) :]
        human = human or [d.messages for d in state.demonstrations]
        random.Random(context.recipe.seed).shuffle(human)
        now = diversity.measure(
            [t[-1].content for t in talks],
            context.tokenizer.encode,
            context.recipe.collapse.tokens,
            reference=[m[-1].content for m in human],
        )
        now["human_nll"] = _nll(engine.loglikelihood(human))
        now["base_nll"] = _nll(base.loglikelihood([t for t in talks if context.holds(t)]))
        first = state.collapse[0]["values"] if state.collapse else now
        return {"values": {k: round(v, 4) for k, v in now.items()}, "alarms": diversity.alarms(now, first)}

    inputs = [state.of(name, "data", *(["monitors"] if number else [])), context.parts("collapse.tokens", *ASKED)]
    done = context.run.stage(f"r{number}-monitors" if number else "monitors", inputs, work)
    state.made[f"r{number}-monitors" if number else "monitors"] = done.fingerprint
    state.collapse.append({"round": number, "model": name, "values": done.summary["values"], "alarms": done.summary["alarms"]})
    return list(done.summary["alarms"])


def _nll(scores: list[tuple[float, int]]) -> float:
    """Nats a token."""
    return -sum(s for s, _ in scores) / max(1, sum(n for _, n in scores))
