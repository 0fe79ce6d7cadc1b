"""The best model of a run, chosen on validation prompts. The evaluation prompts, which are reported, have no say in it."""

from pathlib import Path
from typing import Any

from gristmill.data.rows import make_id
from gristmill.evaluate.stats import accuracy
from gristmill.generation.api import Request, SamplingParams
from gristmill.runs import artifacts
from gristmill.workflows.alignment.context import ASKED, AlignmentContext
from gristmill.workflows.alignment.source import normalize_prompt
from gristmill.workflows.alignment.state import State

STAGE = "validation"
RULE = "the highest greedy accuracy on {num} validation prompts ({which}), among equals the earliest; the model as given is one of them"
NO_PROMPTS = "the last model, since there are no validation prompts: name data.validation"


def choose_best(context: AlignmentContext, state: State) -> dict[str, Any]:
    """Ask every model the validation prompts, and choose.

    Returns:
        {"name", "model", "rule", "score", "scores": {name: {mean, ci95, n}}}; "score" is {mean, ci95, n}, or None without prompts.
    """
    prompts = [p for p in context.validation if not _asked(state, normalize_prompt(p.messages))]
    rows = {row["name"]: row for row in state.stages}
    if not prompts:
        last = state.stages[-1]
        return {"name": last["name"], "model": last["model"], "rule": NO_PROMPTS, "score": None, "scores": {}}
    sampling = SamplingParams(temperature=0.0, max_tokens=context.recipe.answers.max_tokens)

    def work(folder: Path) -> dict[str, Any]:
        outcomes: dict[str, dict[str, bool]] = {}
        for name in rows:
            requests = [Request(f"{state.made[name]}-{p.id}", p.messages, sampling, context.recipe.seed) for p in prompts]
            engine = context.engine(name, state.models[name])
            answers = context.generate(engine, requests, folder / artifacts.EVALUATION_CALLS.file)
            cases = [(p.truth or {}, answers[request.id][0].text) for p, request in zip(prompts, requests, strict=True)]
            outcomes[name] = dict(zip([p.id for p in prompts], context.verifier.verify(cases), strict=True))
        artifacts.OUTCOMES.write(folder, outcomes)
        return {"scores": {name: accuracy(list(found.values())) for name, found in outcomes.items()}}

    inputs = [state.of(*rows), make_id([[p.id, p.truth] for p in prompts]), context.parts(*ASKED)]
    done = context.run.stage(STAGE, inputs, work, artifacts=MODEL_FILES, on_change="continue", beside=True)
    scores = done.summary["scores"]
    best = max(rows, key=lambda name: scores[name]["mean"])  # the first of equals
    which = "data.validation" if context.recipe.data.validation else context.source.validated_on
    rule = RULE.format(num=len(prompts), which=which)
    return {"name": best, "model": rows[best]["model"], "rule": rule, "score": scores[best], "scores": scores}


MODEL_FILES: list[artifacts.AnyArtifact] = [artifacts.OUTCOMES, artifacts.EVALUATION_CALLS]


def _asked(state: State, text: str) -> bool:
    """Whether the run has trained on a prompt."""
    return text in state.seen or text in {normalize_prompt(r.messages[:-1]) for r in state.ratings}
