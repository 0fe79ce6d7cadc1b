"""Scores of a model that thinks when it is asked to: accuracy by mode and level, obedience to the toggle, steps, lengths, budgets."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from gristmill.data.rows import Prompt
from gristmill.data.thinking import LINES, keeps_form, split_answer
from gristmill.evaluate.stats import accuracy
from gristmill.generation.api import Completion
from gristmill.verify.verify import EQUATION, working_holds

Check = Callable[[list[tuple[dict[str, Any], str]]], list[bool]]


def right_answers(prompts: Sequence[Prompt], answers: Mapping[str, Completion], check: Check) -> dict[str, bool]:
    """By prompt, whether its answer came to its end, keeps the form of its mode, and its reply is right."""
    verdicts = check([(p.truth or {}, answers[p.id].text) for p in prompts])
    return {
        p.id: ok and answers[p.id].finish == "stop" and keeps_form(answers[p.id].text, p.meta["reasoning"] == "on")
        for p, ok in zip(prompts, verdicts, strict=True)
    }


def reasoning_scores(prompts: Sequence[Prompt], answers: Mapping[str, Completion], check: Check, *, task: str = "") -> dict[str, Any]:
    """Scores of the answers to prompts in both modes.

    Args:
        prompts: with truths, and `reasoning` (the mode) in their metadata; `level` and `trace` (a reference) where there are any.
        task: the task that thinking is for; "": all.

    Returns:
        {"on": {mean, ci95, n}, "off": ..} of that task; "levels" and "tasks": the same of each by mode; "obedience": by mode the share
        of all answers that keep its form; "steps": with thinking on, the share of traces whose equations are those of the reference,
        or where there is none, all true; "tokens": by mode the mean length of right and of wrong answers; "outcomes": by mode
        {prompt id: right} of the task.
    """
    right = right_answers(prompts, answers, check)
    out: dict[str, Any] = {name: {} for name in ("levels", "tasks", "obedience", "tokens", "outcomes")}
    for mode in LINES:
        asked = [p for p in prompts if p.meta["reasoning"] == mode]
        mine = [p for p in asked if not task or p.task == task]
        out[mode] = accuracy([right[p.id] for p in mine])
        levels = sorted({p.meta["level"] for p in mine if "level" in p.meta})
        out["levels"][mode] = {str(n): accuracy([right[p.id] for p in mine if p.meta.get("level") == n]) for n in levels}
        tasks = dict.fromkeys(p.task for p in asked)
        out["tasks"][mode] = {name: accuracy([right[p.id] for p in asked if p.task == name]) for name in tasks}
        out["obedience"][mode] = accuracy([keeps_form(answers[p.id].text, mode == "on") for p in asked])
        lengths = {told: [answers[p.id].num_tokens for p in mine if right[p.id] == ok] for told, ok in (("right", True), ("wrong", False))}
        out["tokens"][mode] = {told: round(fmean(values), 1) for told, values in lengths.items() if values}
        out["outcomes"][mode] = {p.id: right[p.id] for p in mine}
    traced = [p for p in prompts if p.meta["reasoning"] == "on" and (not task or p.task == task)]
    out["steps"] = accuracy([_steps_hold(answers[p.id].text, p.meta.get("trace")) for p in traced])
    return out


def _steps_hold(text: str, reference: str | None) -> bool:
    """Whether a trace has the equations of a reference, in its order, and no others; or, without one, any, of which none is false."""
    trace = split_answer(text)[0]
    found = EQUATION.findall(trace)
    return bool(found) and (working_holds(trace) if reference is None else found == EQUATION.findall(reference))


def budget_score(prompts: Sequence[Prompt], answers: Mapping[str, Completion], check: Check, budget: int | None) -> dict[str, Any]:
    """Accuracy under a thinking budget (None: without), and the mean length of the answers."""
    right = right_answers(prompts, answers, check)
    tokens = fmean(answers[p.id].num_tokens for p in prompts)
    return {"budget": budget, **accuracy(list(right.values())), "tokens": round(tokens, 1)}
