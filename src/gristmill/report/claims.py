"""What a run shows and what it does not: every model against the one it is meant to improve on, in plain sentences.

Differences between two models of one run are paired (the same prompts). Accuracies of different runs are compared by Newcombe's
interval for two independent proportions.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gristmill.evaluate.stats import paired
from gristmill.runs.reader import RunData

MODES = ("greedy", "sampled")
Score = Mapping[str, Any]  # {"mean", "ci95": [low, high], "n"}


@dataclass(frozen=True)
class Step:
    """A model and the paired difference to the model before it.

    Attributes:
        name: of the model's stage.
        against: of the stage it is compared with.
        differences: by mode, {"mean", "ci95", "n"}; a mode is absent when the outcomes are not there.
    """

    name: str
    against: str
    differences: dict[str, dict[str, Any]]


def model_stages(data: RunData) -> list[dict[str, Any]]:
    """The finished stages that made a model and evaluated it."""
    return [s for s in data.stages if "greedy" in s]


def round_of(name: str) -> int:
    """The round of a stage: "r2-dpo" is of round 2, "demonstrations" of round 0."""
    match = re.match(r"r(\d+)-", name)
    return int(match[1]) if match else 0


def short(name: str) -> str:
    """A stage's name for people: "r2-general-sft" is "general SFT", "r1-rpo3" is "RPO 3"."""
    bare = re.sub(r"^r\d+-", "", name)
    bare = re.sub(r"^rpo(\d+)", r"RPO \1", bare)
    return bare.replace("dpo", "DPO").replace("-sft", " SFT").replace("-", " ")


def full(name: str) -> str:
    """As `short`, with the round."""
    number = round_of(name)
    return f"round {number} {short(name)}" if number else short(name)


def is_specialist(name: str) -> bool:
    """Whether a stage trains for one task only, so that its overall accuracy says little."""
    return name.endswith("code-sft")


def predecessors(names: Sequence[str]) -> dict[str, str]:
    """What each model is compared with.

    Both SFT stages of a round start from Base and are to surpass the model that wrote their data: the last one of the round before.
    Every other stage continues the one before it.
    """
    out: dict[str, str] = {}
    for i, name in enumerate(names):
        earlier = [n for n in names[:i] if round_of(n) < round_of(name)]
        if name.endswith("-sft") and earlier:
            out[name] = earlier[-1]
        elif i:
            out[name] = names[i - 1]
    return out


def difference(
    data: RunData, before: str, after: str, mode: str, tasks: Mapping[str, str] | None = None, task: str = ""
) -> dict[str, Any] | None:
    """Paired difference of two stages of a run, `after` minus `before`, by their folders; None without common outcomes.

    Args:
        before: stage folder.
        after: stage folder.
        mode: "greedy" or "sampled".
        tasks: task by prompt id, to compare on one `task` only.
    """
    old, new = data.outcomes(before).get(mode, {}), data.outcomes(after).get(mode, {})
    common = [i for i in old if i in new and (tasks is None or tasks.get(i) == task)]
    return paired([old[i] for i in common], [new[i] for i in common]) if common else None


def steps(data: RunData) -> list[Step]:
    """Every model of the run but the first, against its predecessor."""
    folders = {s["name"]: s["folder"] for s in model_stages(data)}
    out = []
    for name, against in predecessors(list(folders)).items():
        found = {m: difference(data, folders[against], folders[name], m) for m in MODES}
        out.append(Step(name, against, {m: d for m, d in found.items() if d}))
    return out


def unpaired(before: Score, after: Score) -> dict[str, Any]:
    """Difference of two accuracies that were measured independently, with Newcombe's 95 % interval.

    Source: Newcombe, Statistics in Medicine 17 (1998), method 10: the two Wilson intervals, combined.
    """
    (low_b, high_b), (low_a, high_a) = before["ci95"], after["ci95"]
    mean = after["mean"] - before["mean"]
    low = mean - math.hypot(after["mean"] - low_a, high_b - before["mean"])
    high = mean + math.hypot(high_a - after["mean"], before["mean"] - low_b)
    return {"mean": round(mean, 4), "ci95": [round(low, 4), round(high, 4)]}


def sign(interval: Score) -> int:
    """1 when the 95 % interval lies above 0, -1 when below, 0 when it holds 0."""
    low, high = interval["ci95"]
    return 1 if low > 0 else -1 if high < 0 else 0


def figure(value: float) -> str:
    """An accuracy, a share or a score."""
    return f"{value:.3f}"


def bounds(score: Score, sign: str = "") -> str:
    """An interval; `sign` "+" writes the signs of both ends."""
    low, high = score["ci95"]
    return f"[{low:{sign}.3f}, {high:{sign}.3f}]"


def interval(score: Score) -> str:
    """A mean and its interval."""
    return f"{figure(score['mean'])} {bounds(score)}"


def signed(score: Score) -> str:
    """A difference and its interval."""
    return f"{score['mean']:+.3f} {bounds(score, '+')}"


def statements(data: RunData) -> list[str]:
    """What did not improve, one sentence each; empty when everything did, or when there is nothing to compare yet."""
    models = model_stages(data)
    out: list[str] = []
    if len(models) > 1:
        out += _whole(data, models[0], models[-1])
    for step in steps(data):
        if not is_specialist(step.name):
            out += _failed(full(step.name), full(step.against), step.differences)
    ends = [[s for s in models if round_of(s["name"]) == r][-1] for r in sorted({round_of(s["name"]) for s in models} - {0})]
    for old, new in zip(ends, ends[1:], strict=False):
        found = {m: difference(data, old["folder"], new["folder"], m) for m in MODES}
        out += _failed(f"The end of round {round_of(new['name'])}", f"the end of round {round_of(old['name'])}", found)
    out += _reward(data)
    stopped = (data.results or {}).get("stopped")
    return [*out, f"The stop rule ended the run in {stopped}."] if stopped else out


def _whole(data: RunData, first: dict[str, Any], last: dict[str, Any]) -> list[str]:
    found = {m: difference(data, first["folder"], last["folder"], m) for m in MODES}
    out = _failed(f"The last model ({full(last['name'])})", "the demonstrations alone", found)
    tasks = prompt_tasks(data)
    for task in dict.fromkeys(tasks.values()):
        for mode in MODES:
            d = difference(data, first["folder"], last["folder"], mode, tasks, task)
            if d and sign(d) < 0:
                out.append(f"On {task} ({mode}) the last model is worse than the demonstrations alone: {signed(d)}.")
    return out


def prompt_tasks(data: RunData) -> dict[str, str]:
    """Task by evaluation prompt id."""
    from gristmill.data.rows import Prompt

    folder = next((s["folder"] for s in data.stages if s.get("name") == "data"), None)
    return {p.id: p.task for p in data.rows(folder, "evaluation.parquet", Prompt)} if folder else {}


def _failed(name: str, against: str, differences: Mapping[str, dict[str, Any] | None]) -> list[str]:
    """A sentence unless every known difference is an improvement."""
    known = {m: d for m, d in differences.items() if d}
    worse = {m: d for m, d in known.items() if sign(d) < 0}
    flat = {m: d for m, d in known.items() if sign(d) == 0}
    start = name[0].upper() + name[1:]
    out = []
    if worse:
        out.append(f"{start} is worse than {against}: {_listed(worse)}.")
    if flat:
        out.append(f"{start} did not measurably improve on {against}: {_listed(flat)}.")
    return out


def _listed(differences: Mapping[str, dict[str, Any]]) -> str:
    return ", ".join(f"{mode} {signed(d)}" for mode, d in differences.items())


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
            out.append(f"On {kind} pairs the reward model is not measurably better than guessing: {interval(score)}.")
        if score["mean"] <= other["mean"]:
            out.append(
                f"On {kind} pairs the reward model ({figure(score['mean'])}) is no better than the LLM judge ({figure(other['mean'])})."
            )
    return out
