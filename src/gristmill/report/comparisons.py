"""Model comparisons: every model of a run against its baseline, with paired differences, and in words what did not improve.

Differences between two models of one run are paired (the same prompts). Accuracies of different runs are compared by Newcombe's
interval for two independent proportions.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gristmill.evaluate.stats import paired
from gristmill.runs.reader import RunData
from gristmill.runs.stage_names import baselines, is_single_task, round_of

MODES = ("greedy", "sampled")
Score = Mapping[str, Any]  # {"mean", "ci95": [low, high], "n"}


@dataclass(frozen=True)
class Comparison:
    """A model and its paired difference to its baseline.

    Attributes:
        name: of the model's stage.
        baseline: of the stage that it is to improve on.
        differences: by mode, {"mean", "ci95", "n"}; a mode is absent when the outcomes are not there.
    """

    name: str
    baseline: str
    differences: dict[str, dict[str, Any]]


def model_stages(data: RunData) -> list[dict[str, Any]]:
    """The finished stages that made a model and evaluated it."""
    return [s for s in data.stages if "greedy" in s]


def short_label(name: str) -> str:
    """Label of a stage without its round: "r2-general-sft" is "general SFT", "r1-rpo3" is "RPO 3"."""
    bare = re.sub(r"^r\d+-", "", name)
    bare = re.sub(r"^rpo(\d+)", r"RPO \1", bare)
    return bare.replace("dpo", "DPO").replace("-sft", " SFT").replace("-", " ")


def stage_label(name: str) -> str:
    """Label of a stage: as `short_label`, with the round."""
    number = round_of(name)
    return f"round {number} {short_label(name)}" if number else short_label(name)


def paired_difference(data: RunData, before: str, after: str, *, mode: str) -> dict[str, Any] | None:
    """Paired difference of the outcomes of two stages of a run, `after` minus `before`, by their folders; None without common outcomes.

    Args:
        before: stage folder.
        after: stage folder.
        mode: "greedy" or "sampled".
    """
    return differences_by_task(data, before, after, mode=mode).get("")


def differences_by_task(
    data: RunData, before: str, after: str, *, mode: str, tasks: Mapping[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """As `paired_difference`, of each task that the prompts of common outcomes are of.

    Args:
        tasks: task by prompt id; None: all prompts are of the task "".
    """
    from gristmill.runs import artifacts  # `gristmill status` starts without what rows need

    old, new = (data.read(stage, artifacts.OUTCOMES).get(mode, {}) for stage in (before, after))
    outcomes: dict[str, tuple[list[bool], list[bool]]] = {}
    if tasks is None:
        common = [i for i in old if i in new]
        outcomes = {"": ([old[i] for i in common], [new[i] for i in common])} if common else {}
    else:
        for i in old:
            if i in new and (task := tasks.get(i)) is not None:
                of_task = outcomes.setdefault(task, ([], []))
                of_task[0].append(old[i])
                of_task[1].append(new[i])
    return {task: paired(*of_task) for task, of_task in outcomes.items()}


def baseline_comparisons(data: RunData) -> list[Comparison]:
    """Every model of the run but the first, against its baseline."""
    folders = {s["name"]: s["folder"] for s in model_stages(data)}
    out = []
    for name, baseline in baselines(list(folders)).items():
        found = {m: paired_difference(data, folders[baseline], folders[name], mode=m) for m in MODES}
        out.append(Comparison(name, baseline, {m: d for m, d in found.items() if d}))
    return out


def unpaired_difference(before: Score, after: Score) -> dict[str, Any]:
    """Difference of two accuracies that were measured independently, with Newcombe's 95 % interval.

    Source: Newcombe, Statistics in Medicine 17 (1998), method 10: the two Wilson intervals, combined.
    """
    (low_b, high_b), (low_a, high_a) = before["ci95"], after["ci95"]
    mean = after["mean"] - before["mean"]
    low = mean - math.hypot(after["mean"] - low_a, high_b - before["mean"])
    high = mean + math.hypot(high_a - after["mean"], before["mean"] - low_b)
    return {"mean": round(mean, 4), "ci95": [round(low, 4), round(high, 4)]}


def significance(difference: Score) -> int:
    """Sign of a significant difference: 1 when the 95 % interval lies above 0, -1 when below, 0 when it holds 0."""
    low, high = difference["ci95"]
    return 1 if low > 0 else -1 if high < 0 else 0


def format_score(value: float) -> str:
    """An accuracy, a share or a score."""
    return f"{value:.3f}"


def format_ci(score: Score, sign: str = "") -> str:
    """A 95 % interval; `sign` "+" writes the signs of both ends."""
    low, high = score["ci95"]
    return f"[{low:{sign}.3f}, {high:{sign}.3f}]"


def format_score_ci(score: Score) -> str:
    """A mean and its interval."""
    return f"{format_score(score['mean'])} {format_ci(score)}"


def format_difference(score: Score) -> str:
    """A difference and its interval."""
    return f"{score['mean']:+.3f} {format_ci(score, '+')}"


def shortfalls(data: RunData) -> list[str]:
    """Regressions and ties in words, one sentence each; empty when everything improved, or there is nothing to compare yet."""
    models = model_stages(data)
    out: list[str] = []
    if len(models) > 1:
        out += _whole(data, models[0], models[-1])
    for comparison in baseline_comparisons(data):
        if not is_single_task(comparison.name):
            out += _failed(stage_label(comparison.name), stage_label(comparison.baseline), comparison.differences)
    ends = [[s for s in models if round_of(s["name"]) == r][-1] for r in sorted({round_of(s["name"]) for s in models} - {0})]
    for old, new in zip(ends, ends[1:], strict=False):
        found = {m: paired_difference(data, old["folder"], new["folder"], mode=m) for m in MODES}
        out += _failed(f"The end of round {round_of(new['name'])}", f"the end of round {round_of(old['name'])}", found)
    out += _reward(data)
    stopped = (data.results or {}).get("stopped")
    return [*out, f"The run was stopped in {stopped}."] if stopped else out


def _whole(data: RunData, first: dict[str, Any], last: dict[str, Any]) -> list[str]:
    found = {m: paired_difference(data, first["folder"], last["folder"], mode=m) for m in MODES}
    against = "the model as given" if first["name"] == "base" else "the demonstrations alone"
    out = _failed(f"The last model ({stage_label(last['name'])})", against, found)
    tasks = prompt_tasks(data)
    by_mode = {m: differences_by_task(data, first["folder"], last["folder"], mode=m, tasks=tasks) for m in MODES}
    for task in dict.fromkeys(tasks.values()):
        for mode in MODES:
            d = by_mode[mode].get(task)
            if d and significance(d) < 0:
                out.append(f"On {task} ({mode}) the last model is worse than {against}: {format_difference(d)}.")
    return out


def prompt_tasks(data: RunData) -> dict[str, str]:
    """Task by evaluation prompt id."""
    from gristmill.runs import artifacts

    out: dict[str, str] = {}
    for stage in data.stages_with(artifacts.EVALUATION):
        columns = data.columns(stage["folder"], artifacts.EVALUATION, "id", "task")
        out.update(zip(columns["id"].to_pylist(), columns["task"].to_pylist(), strict=True))
    return out


def _failed(name: str, against: str, differences: Mapping[str, dict[str, Any] | None]) -> list[str]:
    """A sentence unless every known difference is an improvement."""
    known = {m: d for m, d in differences.items() if d}
    worse = {m: d for m, d in known.items() if significance(d) < 0}
    flat = {m: d for m, d in known.items() if significance(d) == 0}
    start = name[0].upper() + name[1:]
    out = []
    if worse:
        out.append(f"{start} is worse than {against}: {_listed(worse)}.")
    if flat:
        out.append(f"{start} did not measurably improve on {against}: {_listed(flat)}.")
    return out


def _listed(differences: Mapping[str, dict[str, Any]]) -> str:
    return ", ".join(f"{mode} {format_difference(d)}" for mode, d in differences.items())


def reward_report(data: RunData) -> dict[str, Any]:
    """What the reward-check stage measured; empty when there was none."""
    done = next((s for s in data.stages if s.get("name") == "reward-check" and "easy" in s), {})
    return {k: done[k] for k in ("easy", "hard", "llm_judge", "correlation") if k in done}


def _reward(data: RunData) -> list[str]:
    report = reward_report(data)
    out = []
    for kind in ("easy", "hard") if report else ():
        score, other = report[kind]["overall"], report["llm_judge"][kind]["overall"]
        if not score["n"]:
            out.append(f"There were no {kind} pairs to measure the reward model on.")
            continue
        if score["ci95"][0] <= 0.5:
            out.append(f"On {kind} pairs the reward model is not measurably better than guessing: {format_score_ci(score)}.")
        if score["mean"] <= other["mean"]:
            means = [format_score(s["mean"]) for s in (score, other)]
            out.append(f"On {kind} pairs the reward model ({means[0]}) is no better than the LLM judge ({means[1]}).")
    return out
