"""IFEval's scores (arXiv 2311.07911): strict and loose, of prompts and of instructions, by type; paired between two models."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from gristmill.core.response_text import repetition, strip_thinking
from gristmill.evaluate.stats import accuracy, clustered, paired, paired_clustered
from gristmill.verify.ifeval import check_instructions

MAX_REPETITION = 0.3  # share of repeated 4-grams beyond which an answer loops
MODES = {"strict": False, "loose": True}
Verdicts = dict[str, dict[str, list[bool]]]  # strict or loose -> prompt -> of each instruction whether it holds


def instruction_verdicts(truths: Mapping[str, Mapping[str, Any]], answers: Mapping[str, str]) -> Verdicts:
    """What holds of each prompt's instructions. Prompts whose truth is of another kind are left out."""
    asked = {name: truth["checks"] for name, truth in truths.items() if truth.get("kind") == "instructions"}
    said = {name: strip_thinking(answers[name]) for name in asked}
    return {mode: {n: check_instructions(checks, said[n], loose=loose) for n, checks in asked.items()} for mode, loose in MODES.items()}


def instruction_scores(truths: Mapping[str, Mapping[str, Any]], verdicts: Verdicts) -> dict[str, Any]:
    """Prompt level, instruction level (its interval clustered by prompt) and types, each strict and loose."""
    out: dict[str, Any] = {"prompt": {}, "instruction": {}, "types": defaultdict(dict)}
    for mode, found in verdicts.items():
        out["prompt"][mode] = accuracy([all(of_prompt) for of_prompt in found.values()])
        out["instruction"][mode] = clustered(list(found.values()))
        types: dict[str, list[bool]] = defaultdict(list)
        for name, of_prompt in found.items():
            for check, ok in zip(truths[name]["checks"], of_prompt, strict=True):
                types[check["id"]].append(ok)
        for kind in sorted(types):
            out["types"][kind][mode] = accuracy(types[kind])
    return {**out, "types": dict(out["types"])}


def paired_scores(before: Verdicts, after: Verdicts) -> dict[str, Any]:
    """Differences of two models on the same prompts, at both levels, strict and loose."""
    out: dict[str, Any] = {"prompt": {}, "instruction": {}}
    for mode in MODES:
        both = [(before[mode][name], after[mode][name]) for name in after[mode]]
        out["prompt"][mode] = paired([all(a) for a, _ in both], [all(b) for _, b in both])
        out["instruction"][mode] = paired_clustered([a for a, _ in both], [b for _, b in both])
    return out


def looping(answers: Sequence[str]) -> list[bool]:
    """Which answers repeat themselves."""
    return [repetition(text) > MAX_REPETITION for text in answers]
