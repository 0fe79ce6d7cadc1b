"""Text summary of a run: a line a stage, and the headline of three. Light to import, for `gristmill status`."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gristmill.report.comparisons import (
    MODES,
    format_difference,
    format_score,
    format_score_ci,
    paired_difference,
    stage_label,
    unpaired_difference,
)
from gristmill.runs.reader import read_run

MEASURED = ("benchmarks", "safety")  # measurements beside the stages


def stage_line(done: Mapping[str, Any]) -> str:
    """What a finished stage did, in one line, from its `done.json`; empty for an unfinished one.

    A stage of an alignment run is told in words, one of another kind by its counts.
    """
    funnel = done.get("funnel", {})
    if kind := next((kind for kind in MEASURED if kind in done), None):
        return "; ".join(f"{what} {_measured(entry)}" for what, entry in done[kind].items())
    if "said" in done:
        return said_line(done["said"])
    if "checked" in done:
        return check_line(done["checked"])
    if "greedy" in done:
        return _model(done)
    if "reasoning" in done:
        found = done["reasoning"]
        return "; ".join(
            f"thinking {mode} {format_score_ci(found[mode])}, obeyed {found['obedience'][mode]['mean']:.3f}" for mode in ("on", "off")
        )
    if "scores" in done:
        return ", ".join(f"{stage_label(name)} {format_score(score['mean'])}" for name, score in done["scores"].items())
    if "kl_before" in done:
        return f"{done['steps']:,} steps, {done['tokens']:,} tokens, KL from the parent {done['kl_before']:.3f} -> {done['kl']:.3f}"
    if "speed" in done and "parameters" in done:
        return f"{done['speed']['median']:.2f}x the parent's speed, {done['parameters']:,} parameters"
    if "llm_judge" in done:
        return f"pair accuracy easy {_pair(done, 'easy')}, hard {_pair(done, 'hard')}"
    if "alarms" in done:
        return f"alarms: {', '.join(done['alarms'])}" if done["alarms"] else "no alarm"
    if {"demonstrations", "ratings", "evaluation"} <= done.keys():
        return f"{done['demonstrations']:,} demonstrations, {done['ratings']:,} ratings, {done['evaluation']:,} evaluation prompts"
    if "answers" in funnel:
        kept = sum(of_task["kept"] for of_task in funnel["answers"].values())
        repaired = f" ({done['repaired']:,} repaired)" if "repaired" in done else ""
        return f"kept {kept:,}{repaired} of {done['responses']:,} answers, {done['pairs']:,} pairs"
    if "pairs" in done and "funnel" in done:
        return _pairs(done)
    if "kept" in done and "funnel" in done:
        answers, good = (sum(of_task[key] for of_task in funnel.values()) for key in ("answers", "good"))
        repaired = f", {done['repaired']:,} of them repaired" if "repaired" in done else ""
        return f"kept {done['kept']:,} of {answers:,} answers ({good:,} good){repaired}"
    if "kept" in funnel:
        return _prompts(funnel)
    if "metrics" in done:
        held = done.get("held_out")
        gain = f"; held-out pairs {format_score(held['before']['mean'])} -> {format_score_ci(held['after'])}" if held else ""
        return f"{done['rows']:,} rows, {_training(done)}{gain}"
    counts = {k: n for k, n in done.items() if isinstance(n, int) and k != "peak_mib"}
    return ", ".join(f"{n:,} {name.removeprefix('num_').replace('_', ' ')}" for name, n in counts.items())


def said_line(said: Mapping[str, Any]) -> str:
    """What people in the studio gave a round."""
    taken = ", ".join(f"{said[kind]:,} {kind}" for kind in ("ratings", "pairs", "demonstrations"))
    lost = "".join(f"; {n:,} left out: {why}" for why, n in said["left_out"].items())
    return f"{taken} by {len(said['people'])} people{lost}"


def check_line(check: Mapping[str, Any]) -> str:
    """What people found in a sample of a round, and who decided."""
    wrong = f"{format_score_ci(check['wrong'])} wrong of {check['wrong']['n']}" if check["wrong"]["n"] else "no row was looked at"
    found = f"{check['reject']} rejected, {check['repair']} repaired"
    return f"{check['decision']} by {check['by']}: {wrong} ({found}); sample of {check['rows']} of {check['of']:,} rows"


def _model(done: Mapping[str, Any]) -> str:
    tasks = [f"{t} {done['greedy'][t]['mean']:.2f}/{done['sampled'][t]['mean']:.2f}" for t in done["greedy"] if t != "overall"]
    overall = f"greedy {format_score(done['greedy']['overall']['mean'])} sampled {format_score(done['sampled']['overall']['mean'])}"
    weak = f"; {done['weak']:,} verdicts are weak" if done.get("weak") else ""
    trained = f"{done['rows']:,} rows, {_training(done)}" if "rows" in done else "the model as given"
    if "updates" in done:
        trained = f"{done['steps']:,} steps, {done['updates']:,} updates, reward {done['first_reward']:.2f} -> {done['last_reward']:.2f}"
    return f"{overall} ({', '.join(tasks)}); {trained}{weak}"


def _measured(entry: Mapping[str, Any]) -> str:
    """A benchmark's or a rate's figure with its interval, and its paired differences to the model as given and to the one before."""
    against = {"base": "to the model as given", "before": "to the model before"}
    told = [f"{format_difference(entry[key])} {words}" for key, words in against.items() if entry.get(key)]
    return f"{format_measured(entry)}{' (' + ', '.join(told) + ')' if told else ''}"


def format_measured(entry: Mapping[str, Any]) -> str:
    """A figure with its interval, as far as there are any."""
    if entry["mean"] is None:
        return "-"
    bounds = entry["ci95"]
    return format_score_ci(entry) if bounds and None not in bounds else format_score(entry["mean"])


def measured_lines(results: Mapping[str, Any]) -> list[str]:
    """Benchmarks and safety rates of a run's models, a line a model and figure, for a terminal."""
    lines = []
    for kind in (kind for kind in MEASURED if kind in results):
        lines.append(f"{kind:<22}{'':<26}{'95 % interval':<24}{'paired, to the model as given':<32}to the model before")
        for row in results[kind]:
            for what, entry in row[kind].items():
                pairs = [format_difference(entry[key]) if entry.get(key) else "-" for key in ("base", "before")]
                column = f" {entry['column']}" if "column" in entry else ""
                name = f"{what.replace('_', ' ')}{column}"
                before = f" ({stage_label(row['before'])})" if row["before"] else ""
                lines.append(f"  {stage_label(row['name']):<20}{name:<26}{format_measured(entry):<24}{pairs[0]:<32}{pairs[1]}{before}")
    return lines


def _training(done: Mapping[str, Any]) -> str:
    dropped = f", {done['dropped']:,} dropped as too long" if done.get("dropped") else ""
    return f"loss {done['metrics'].get('loss', float('nan')):.3f}, {done['tokens_per_second']:,} tokens/s{dropped}{lora_update(done)}"


def lora_update(done: Mapping[str, Any]) -> str:
    """Rank of a stage's adapter and the size |D|/|W| of its update, from the smallest to the largest kind of matrix; "" without one."""
    if not (lora := done.get("lora")):
        return ""
    sizes = sorted(lora["update"].values())
    return f", LoRA of rank {lora['rank']}, |D|/|W| {sizes[0]:.1e} to {sizes[-1]:.1e}"


def _pair(done: Mapping[str, Any], kind: str) -> str:
    return f"{format_score(done[kind]['overall']['mean'])} (LLM judge {format_score(done['llm_judge'][kind]['overall']['mean'])})"


def _pairs(done: Mapping[str, Any]) -> str:
    lost = [f"{n:,} {why}" for why, n in done["funnel"].items() if why != "pairs"]
    return f"{done['pairs']:,} pairs" + (f"; no pair: {', '.join(lost)}" if lost else "")


def _prompts(funnel: Mapping[str, int]) -> str:
    lost = [f"{n:,} {why}" for why, n in funnel.items() if why not in ("kept", "written", "from file") and n]
    from_file = f" and {funnel['from file']:,} from file" if funnel.get("from file") else ""
    return f"kept {funnel['kept']:,} of {funnel.get('written', 0):,} written{from_file}" + (f"; {', '.join(lost)}" if lost else "")


def headline(results: Mapping[str, Any], folder: Path | None = None) -> list[str]:
    """The headline of a finished run: models, reward model, data.

    Args:
        results: what `results.json` holds.
        folder: the run's folder. With it, the difference of the last model to the first is paired by prompt (a narrower interval).
    """
    return [_gain(results, folder), _judge(results.get("reward") or {}), _data_mix(results)]


def rl_lines(results: Mapping[str, Any], folder: Path) -> list[str]:
    """What reinforcement learning changed on the evaluation prompts, and the command that serves the model."""
    lines = []
    for mode in MODES:
        before, after = (format_score_ci(stage[mode]["overall"]) for stage in results["stages"])
        lines.append(f"{mode}: {before} -> {after}, paired {format_difference(results['paired'][mode])}")
    return [*lines, f"serve it: gristmill serve {shlex.quote(str(folder / results['model']))}"]


def compression_lines(results: Mapping[str, Any], folder: Path) -> list[str]:
    """What a compression came to: speed, accuracy and KL of the child beside its parent, and the command that serves it."""
    found = results["compress"]
    speed, sizes = found["speed"], found["parameters"]
    spread = f"{speed['spread']['low']:.2f} to {speed['spread']['high']:.2f}"
    lines = [f"speed: {speed['measured']:.2f}x measured ({spread}), {speed['predicted']:.2f}x predicted"]
    if accuracy := found["accuracy"]:
        before, after = (format_score_ci(accuracy["scores"][who]["overall"]) for who in ("parent", "child"))
        lines.append(f"greedy: {before} -> {after}, paired {format_difference(accuracy['paired'])}")
    lines.append(f"KL from the parent: {found['kl_before']:.3f} nats a token before the distillation, {found['kl']:.3f} after")
    lines.append(f"parameters: {sizes['parent']:,} -> {sizes['child']:,}; {found['seconds']:,.0f} s in all")
    return [*lines, f"serve it: gristmill serve {shlex.quote(str(folder / results['model']))}"]


def reasoning_lines(results: Mapping[str, Any], folder: Path) -> list[str]:
    """What reinforcement learning changed in both modes, thinking budgets, and the command that serves the model."""
    found = results["reasoning"]
    lines = []
    for mode in ("on", "off"):
        before, after = (format_score_ci(found[when][mode]) for when in ("before", "after"))
        obeyed = found["after"]["obedience"][mode]["mean"]
        lines.append(f"thinking {mode:<3} {before} -> {after}, paired {format_difference(found['paired'][mode])}, obeyed {obeyed:.3f}")
    told = [f"{point['budget'] if point['budget'] is not None else 'none'} {format_score(point['mean'])}" for point in found["budget"]]
    lines += [f"thinking budget: {', '.join(told)}"] if told else []
    served = f"gristmill serve {shlex.quote(str(folder / results['model']))} --reasoning-parser think"
    return [*lines, f"serve it: {served}"]


def best_lines(results: Mapping[str, Any], folder: Path) -> list[str]:
    """The best model of a finished run, how it was chosen, and the command that serves it; nothing of a run of an earlier version."""
    best = results.get("best")
    if not best:
        return []
    score = f", {format_score_ci(best['score'])}" if best["score"] else ""
    return [
        f"Best: {stage_label(best['name'])}{score}: {best['rule']}",
        f"serve it: gristmill serve {shlex.quote(str(folder / best['model']))}",
    ]


def _gain(results: Mapping[str, Any], folder: Path | None) -> str:
    stages = results["stages"]
    if len(stages) < 2:
        return "Models: there is only one to show, nothing can be compared."
    first, last = stages[0], stages[-1]
    data = read_run(folder) if folder is not None else None
    parts = []
    for mode in MODES:
        old, new = first[mode]["overall"], last[mode]["overall"]
        d, kind = None, "paired"
        if data is not None:
            before, after = (row.get("folder") or Path(row["model"]).parts[0] for row in (first, last))
            d = paired_difference(data, before, after, mode=mode)
        if d is None:
            d, kind = unpaired_difference(old, new), "unpaired"
        parts.append(f"{mode} {format_score_ci(old)} -> {format_score_ci(new)}, {kind} difference {format_difference(d)}")
    return f"Models: {stage_label(first['name'])} -> {stage_label(last['name'])}: {'; '.join(parts)}"


def _judge(reward: Mapping[str, Any]) -> str:
    if not reward:
        return "Reward model: none in this run."
    kinds = []
    for kind in ("easy", "hard"):
        score, other = reward[kind]["overall"], reward["llm_judge"][kind]["overall"]
        kinds.append(
            f"{kind} {format_score_ci(score)} (LLM judge {format_score_ci(other)}, n {score['n']})" if score["n"] else f"{kind}: no pairs"
        )
    return f"Reward model: pair accuracy {'; '.join(kinds)}"


def doubts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a run's results rest on that a reader should know: weak verdicts, and fields that endpoints refused; head and words of each."""
    found = []
    if weak := results.get("weak"):
        words = f"{weak:,} programs of the evaluations passed tests that they could have lied to (docs/design.md, judging)."
        found.append(("Weak verdicts. ", words))
    if left_out := results.get("left_out"):
        words = ", ".join(f"{name} ({num:,} calls)" for name, num in left_out.items())
        found.append(("Fields left out. ", f"An endpoint refused what the run asks with, and was asked without: {words}."))
    return found


def _data_mix(results: Mapping[str, Any]) -> str:
    samples = results["alignment_samples"]
    total = samples["human"] + samples["synthetic"]
    alarms = [f"round {c['round']} {', '.join(c['alarms'])}" for c in results["collapse"] if c["alarms"]]
    control = f"control {results['control']}: " if results.get("control") else ""
    repaired = f" ({samples['repaired']:,} repaired)" if "repaired" in samples else ""
    return (
        f"Data: {control}{results['synthetic_share']:.1%} of {total:,} alignment samples synthetic{repaired}, "
        f"{duration(results['seconds'])}, collapse alarms: {'; '.join(alarms) or 'none'}"
    )


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
