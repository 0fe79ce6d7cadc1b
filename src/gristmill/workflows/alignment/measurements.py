"""Measurements of a run's models: benchmarks and safety rows, each in a stage beside the others, in pairs with earlier models.

A measurement trains nothing and decides nothing, so it may change, come later or go, and every other stage stays. Its answers are
journalled under ids of all that is asked; what a changed recipe asks besides is all that is asked anew.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gristmill.core.io import read_json
from gristmill.data.rows import make_id
from gristmill.judge.party import Party
from gristmill.runs.run_dir import Stage
from gristmill.runs.stage_names import baselines, is_single_task, round_of
from gristmill.workflows.alarms import MIN_WORSE, Alarm, fell_behind
from gristmill.workflows.alignment.context import AlignmentContext
from gristmill.workflows.alignment.recipe import BASE_ROW, When
from gristmill.workflows.alignment.state import State
from gristmill.workflows.benchmark_sources import EngineSource
from gristmill.workflows.benchmarks import ANSWERS, MODEL, RESULTS, SAMPLES, differences, headlines, run_benchmarks
from gristmill.workflows.safety import CANARIES, RATES, leakage, rate_differences, rates, safety, verdicts_by_rate
from gristmill.workflows.safety import SAMPLES as SAFETY_SAMPLES

STAGE_OF = {"evaluate": "benchmarks", "safety": "safety"}  # section of the recipe -> end of the stage's name, and what it measures
FILES = {"evaluate": [RESULTS, f"{SAMPLES}/*.jsonl"], "safety": [SAFETY_SAMPLES, CANARIES]}
AGAINST = ("base", "before")  # whom a model is compared with


def measure(context: AlignmentContext, state: State, name: str, moment: When) -> None:
    """Measure a model on all that the recipe wants at this moment; the model as given always.

    While a later stage may still refuse the start, nothing is measured: `catch_up` does it.
    """
    for kind in STAGE_OF:
        section = getattr(context.recipe, kind)
        wanted = section is not None and (name == BASE_ROW or section.when == moment)
        if wanted and name not in state.measured.get(kind, {}) and (kind, name) not in state.unmeasured:
            state.unmeasured.append((kind, name))
    if not context.run.unsettled:
        catch_up(context, state)


def catch_up(context: AlignmentContext, state: State) -> None:
    """Measure what waits."""
    waiting, state.unmeasured = state.unmeasured, []
    for kind, name in waiting:
        measured = state.measured.setdefault(kind, {})
        before = baselines([*measured, name]).get(name, "")
        compared = {key: other for key, other in zip(AGAINST, (BASE_ROW, before), strict=True) if other and name != BASE_ROW}
        done = _stage(context, state, kind, name, {key: measured[other] for key, other in compared.items()})
        measured[name] = done
        state.alarms += _alarms(name, compared, done.summary[STAGE_OF[kind]])


def measured_rows(state: State, kind: str) -> list[dict[str, Any]]:
    """What results hold of a kind of measurement, a row a model."""
    return [
        {"name": name, "round": round_of(name), "folder": done.folder.name, "before": done.summary["before"]}
        | {STAGE_OF[kind]: done.summary[STAGE_OF[kind]]}
        for name, done in state.measured.get(kind, {}).items()
    ]


def _stage(context: AlignmentContext, state: State, kind: str, name: str, others: Mapping[str, Stage]) -> Stage:
    precision = context.recipe.engine.precision
    made = context.base_fingerprint if name == BASE_ROW else state.made[name]
    identity = {"name": name, "made": made, "precision": precision, "format": context.format.name}
    run = _benchmarks if kind == "evaluate" else _safety

    def work(folder: Path) -> dict[str, Any]:
        found = run(context, state, name, identity, folder)
        for key, other in others.items():
            differ = _differences(kind, other.folder, folder)
            for what, entry in found.items():
                entry[key] = differ.get(what)
        before = others["before"].summary["model"] if "before" in others else ""
        return {"model": name, "before": before, STAGE_OF[kind]: found}

    inputs = [identity, context.asked[kind], {key: other.fingerprint for key, other in others.items()}]
    return context.run.stage(f"{name}-{STAGE_OF[kind]}", inputs, work, files=FILES[kind], on_change="continue", beside=True)


def _benchmarks(context: AlignmentContext, state: State, name: str, identity: dict[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    saved = folder / MODEL
    if saved.is_file() and (earlier := read_json(saved)) != identity:  # the model was made anew: answers of the old one stay apart
        if (folder / ANSWERS).is_file():
            (folder / ANSWERS).replace(folder / f"answers-{make_id(earlier)}.jsonl")
        saved.unlink()
    report = run_benchmarks(
        lambda: EngineSource(context.engine(name, state.models[name])), identity, context.benchmark_args(folder), context.progress
    )
    return headlines(report)


def _safety(context: AlignmentContext, state: State, name: str, identity: dict[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    asked = Party(str(state.models[name]), label=name, running=make_id(identity))
    num = len(context.probes) + 2 * len(context.canaries)
    client = context.engine_client(context.engine(name, state.models[name]), num)
    for stale in (SAFETY_SAMPLES, CANARIES):  # of earlier rows; answers are in the journal
        (folder / stale).unlink(missing_ok=True)
    if context.probes:
        safety(asked, context.safety_settings(), folder, context.progress, client=client)
    if context.canaries:
        leakage(asked, context.canaries, folder, context.progress, seed=context.recipe.seed, client=client)
    return rates(verdicts_by_rate(folder))


def _differences(kind: str, before: Path, after: Path) -> dict[str, dict[str, Any]]:
    return differences(before, after) if kind == "evaluate" else rate_differences(verdicts_by_rate(before), verdicts_by_rate(after))


def _alarms(name: str, compared: Mapping[str, str], found: Mapping[str, Mapping[str, Any]]) -> list[Alarm]:
    """What is worse than with the models compared with, beyond the interval."""
    if is_single_task(name):  # it starts from Base, not from the model before it
        compared = {key: other for key, other in compared.items() if key == "base"}
    out = []
    for what, entry in found.items():
        told = {other: entry[key] for key, other in compared.items() if entry.get(key)}
        if falls := {other: difference for other, difference in told.items() if _is_worse(difference, RATES.get(what, 1))}:
            out.append(fell_behind(name, what.replace("_", " ") if what in RATES else what, falls))
    return out


def _is_worse(difference: Mapping[str, Any], sign: int) -> bool:
    low, high = difference["ci95"]
    return bool(difference["worse"] >= MIN_WORSE and (high < 0 if sign > 0 else low > 0))
