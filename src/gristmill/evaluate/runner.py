"""Evaluation runner: accuracy on prompts with known truths, greedy and at temperature 1, by task and overall."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gristmill.data.rows import Prompt
from gristmill.evaluate.stats import accuracy
from gristmill.generation.api import Completion, Request, SamplingParams

MODES = {"greedy": 0.0, "sampled": 1.0}
GenerateFn = Callable[[list[Request]], dict[str, list[Completion]]]
VerifyFn = Callable[[list[tuple[dict[str, Any], str]]], list[bool]]


def build_requests(prompts: Sequence[Prompt], max_tokens: int, seed: int, modes: Mapping[str, float] = MODES) -> list[Request]:
    """A request a prompt and mode: one greedy, one sampled."""
    return [
        Request(f"{p.id}-{mode}", p.messages, SamplingParams(temperature=temperature, max_tokens=max_tokens), seed)
        for p in prompts
        for mode, temperature in modes.items()
    ]


def evaluate_model(
    prompts: Sequence[Prompt], generate: GenerateFn, check: VerifyFn, *, max_tokens: int, seed: int, modes: Mapping[str, float] = MODES
) -> dict[str, Any]:
    """Evaluate a model: its accuracies with their intervals.

    Args:
        prompts: with truths.
        generate: requests -> completions by request id.
        check: (truth, answer) pairs -> right or wrong.
        max_tokens: longest answer; a longer one is cut and judged as it is.
        modes: names and temperatures of those that are asked for.

    Returns:
        {"greedy": {"overall": {mean, ci95, n}, task: ...}, "sampled": ..., "outcomes": {mode: {prompt id: right}}}
    """
    asked = build_requests(prompts, max_tokens, seed, modes)
    answers = generate(asked)
    truths = {p.id: p.truth or {} for p in prompts}
    tasks = {p.id: p.task for p in prompts}
    keys = [r.id.rsplit("-", 1) for r in asked]
    right = check([(truths[i], answers[f"{i}-{mode}"][0].text) for i, mode in keys])
    out: dict[str, Any] = {"outcomes": {mode: {} for mode in modes}}
    for (i, mode), ok in zip(keys, right, strict=True):
        out["outcomes"][mode][i] = ok
    for mode in modes:
        outcomes = out["outcomes"][mode]
        by_task = {t: accuracy([ok for i, ok in outcomes.items() if tasks[i] == t]) for t in dict.fromkeys(tasks.values())}
        out[mode] = {"overall": accuracy(list(outcomes.values())), **by_task}
    return out
