"""Alarms of a run: what went on but cannot have done what it was meant for, with the reason and what to change."""

from collections.abc import Mapping, Sequence
from typing import Any

from gristmill.evaluate.stats import paired
from gristmill.train.settings import MIN_STEPS, Training

Alarm = dict[str, str]  # stage, and one text that says what, why and what to change
SPEED_NOISE = 0.05
BY_HEART = 3  # times the KL on text that was trained on: with enough prompts 1.3 to 2 were seen, with few 5 and 9 (docs/lab.md)
MIN_WORSE = 3  # documents or rows: that fewer turn out worse may be chance, whatever their interval


def unusable_prompts(stage: str, probe: Mapping[str, Any]) -> Alarm:
    """A model that cannot write prompts for the recipe's tasks."""
    instead = f"{probe['instead']} write instead" if probe["instead"] else "nobody writes in its place"
    return {
        "stage": stage,
        "text": f"{stage}: the model writes no usable prompts by task ({probe['usable']} of {probe['asked']}, the first is "
        f"{probe['example']!r}), so by_task is left out and {instead}. To change it, name probe.fallback or other pipelines, let a "
        "stronger model write (generators), or give data.prompts.",
    }


def no_prompts(stage: str) -> Alarm:
    """A round that nobody has a prompt for."""
    text = f"the run ends at {stage}, which has no prompts left: see the funnel in its done.json. To change it, give more data.prompts."
    return {"stage": stage, "text": text}


def stopped_by_people(stage: str, check: Mapping[str, Any]) -> Alarm:
    """A round that people do not want to be trained on."""
    wrong = f", {check['wrong']['mean']:.0%} of {check['wrong']['n']} rows wrong" if check["wrong"]["n"] else ""
    todo = "change judging or the pipelines and run again with --redo, or say `gristmill check RUN --approve` and run again"
    return {"stage": stage, "text": f"{stage}: {check['by']} stopped the round before it was trained on{wrong}. To go on, {todo}."}


def kept_nothing(stage: str, funnel: Mapping[str, Mapping[str, Any]]) -> Alarm:
    """A round whose judges keep no answer."""
    answers, good = (sum(of_task[key] for of_task in funnel.values()) for key in ("answers", "good"))
    why = (
        "the models gave none"
        if not answers
        else f"none of {answers:,} is good by its judge"
        if not good
        else f"{good:,} of {answers:,} are good, and too few samples agree or the quotas are 0"
    )
    todo = (
        "look at the answers in its folder; then lower judging.keep or judging.min_votes, ask for more answers.samples, raise "
        "answers.max_tokens where answers are cut off, or let a stronger model write (generators)"
    )
    return {"stage": stage, "text": f"{stage} keeps no answer: {why}. The round trains on what people wrote alone. To change it, {todo}."}


def no_pairs(stage: str, funnel: Mapping[str, int]) -> Alarm:
    """A preference stage without a pair: the model stays as it is."""
    lost = ", ".join(f"{n:,} {why}" for why, n in funnel.items() if why != "pairs" and n) or "no prompt was asked"
    todo = "ask for more answers.samples or a higher temperature, lower judging.min_gap or keep_chosen, or raise num_prompts"
    return {"stage": stage, "text": f"{stage} makes no pair: {lost}. The stage is left out. To change it, {todo}."}


def code_left_out(stage: str, num_rows: int, min_rows: int) -> Alarm:
    """A code-SFT stage that has too few rows."""
    return {
        "stage": stage,
        "text": f"{stage} is left out: there are {num_rows} programs to learn from, and it needs {min_rows}. "
        "To change it, give more demonstrations of code, or more prompts for programs.",
    }


def few_steps(stage: str, steps: int, num_rows: int, *, settings: Training, min_steps: int | None = None) -> list[Alarm]:
    """A training stage whose rows are too few for its passes; none where steps are enough, or were asked for as a number.

    Args:
        settings: a section of a recipe, with or without gaps.
        min_steps: what the recipe's alarms.min_steps says; None where it has none.
    """
    enough = MIN_STEPS if min_steps is None else min_steps
    if steps >= enough or settings.steps is not None:
        return []
    passes = f", {settings.epochs:g} epochs" if settings.epochs is not None else ""
    batches = f", batches of {settings.batch_size}" if settings.batch_size is not None else ""
    meant = "its `steps` say" if min_steps is None else "its `steps` or alarms.min_steps say"
    text = (
        f"{stage} takes {steps} steps only: {num_rows:,} rows{passes}{batches}. Under {enough} a model hardly changes. To change it, "
        f"lower its batch_size, raise its epochs, or give it more rows ({meant} that few are meant)."
    )
    return [{"stage": stage, "text": text}]


def few_updates(stage: str, updates: int, wanted: int) -> list[Alarm]:
    """Reinforcement learning of which most steps taught nothing; none where at least half did."""
    if 2 * updates >= wanted:
        return []
    text = (
        f"{stage} makes {updates} of {wanted} updates: in the other steps all answers to a prompt had the same reward. To change it, look "
        "at the shares all right and all wrong in its page; then give harder or easier prompts, or raise samples or max_draws."
    )
    return [{"stage": stage, "text": text}]


def slower_than_asked(stage: str, speed: float, target: float) -> list[Alarm]:
    """A compressed model whose measured speed misses the target by more than what measuring again changes."""
    if speed >= target * (1 - SPEED_NOISE):
        return []
    text = (
        f"{stage} is {speed:.2f} times as fast as its parent, and {target:.2f} were asked for: what layers were predicted to cost does "
        "not add up here. To change it, ask for a higher target, or raise costs.repeats on a machine that does nothing else."
    )
    return [{"stage": stage, "text": text}]


def not_distilled(stage: str, before: float, after: float) -> list[Alarm]:
    """A distillation that leaves the child as far from its parent as it was."""
    if after < before:
        return []
    text = (
        f"{stage} is as far from its parent after the distillation as before it (KL {before:.3g}, then {after:.3g} nats a token). "
        "To change it, lower distillation.lr, or give it more steps or text."
    )
    return [{"stage": stage, "text": text}]


def learned_by_heart(stage: str, trained_on: float, held_out: float) -> list[Alarm]:
    """A child much nearer to its parent on the text that it was distilled on than on other text."""
    if held_out <= BY_HEART * trained_on:
        return []
    text = (
        f"{stage} knows its text by heart: KL from the parent is {trained_on:.3g} nats a token on text that it was distilled on, and "
        f"{held_out:.3g} on other text. Give it more different prompts or documents; more answers to the same prompts help little."
    )
    return [{"stage": stage, "text": text}]


def collapsed(stage: str, alarms: list[str]) -> Alarm:
    """Monitors that ended the run."""
    return {
        "stage": stage,
        "text": f"the run ends after {stage}, since the text is losing its variety: {', '.join(alarms)}. "
        "Its last model is not to be trusted: compare it with the one before.",
    }


def fell_behind(stage: str, what: str, falls: Mapping[str, Mapping[str, Any]]) -> Alarm:
    """A benchmark, a safety rate or an accuracy that is worse than an earlier model's, beyond the interval of the paired difference.

    Args:
        falls: differences, with `n`, by the name of the model that it was compared with.
    """
    told = ", ".join(
        f"{d['mean']:+.3f} [{d['ci95'][0]:+.3f}, {d['ci95'][1]:+.3f}] against {'the model as given' if other == 'base' else other}"
        for other, d in falls.items()
    )
    num = next(iter(falls.values()))["n"]
    return {
        "stage": stage,
        "text": f"{stage} is worse on {what}: {told} (paired, n {num:,}). To change it, lower its lr or epochs, give it rows of what it "
        "forgets, or serve the model before it.",
    }


def worse_on(stage: str, what: str, other: str, before: Sequence[float], after: Sequence[float]) -> list[Alarm]:
    """As `fell_behind`, of outcomes on the same prompts; none where the model is no worse than another by more than chance."""
    difference = paired(before, after)
    if difference["ci95"][1] >= 0 or sum(new < old for old, new in zip(before, after, strict=True)) < MIN_WORSE:
        return []
    return [fell_behind(stage, what, {other: difference})]
