"""Live view of a run, from its files alone: stages with their lines, curves of those that train, monitors and alarms."""

import json
import math
import time
from pathlib import Path
from typing import Any

from gristmill.report.summary import stage_line
from gristmill.report.training import thinned
from gristmill.runs.reader import STAGE_FOLDER, read_run, reading_back
from gristmill.studio.store import Refused

METRICS = Path("train") / "metrics.jsonl"
MAX_READ = 4 << 20  # bytes of metrics in one answer
NO_CURVES = frozenset({"step", "tokens", "seconds"})
ALIVE_SECONDS = 120.0  # since the last write into an unfinished stage, beyond which a run is called idle


def overview(folder: Path) -> dict[str, Any]:
    """Stages of a run in their order, what each did, and which of them have curves."""
    with reading_back(folder):
        data = read_run(folder)
        stages = [_stage(folder / stage["folder"], stage) for stage in data.stages]
    started = [stage for stage in stages if not stage["done"] and stage["written"]]
    running = max(started, key=lambda stage: stage["written"], default=None)
    alive = running is not None and time.time() - running["written"] < ALIVE_SECONDS
    results = data.results or {}
    collapse = [
        {"stage": s["name"], "values": _plain(s["values"]), "alarms": s.get("alarms", [])}
        for s in data.stages
        if isinstance(s.get("values"), dict)
    ]
    return {
        "kind": data.kind,
        "name": str(data.recipe.get("name", folder.name)),
        "finished": data.results is not None,
        "running": running["folder"] if running and alive else "",
        "stages": stages,
        "monitors": collapse,
        "alarms": [alarm["text"] for alarm in results.get("alarms", ())],
    }


def _stage(path: Path, stage: dict[str, Any]) -> dict[str, Any]:
    done = "fingerprint" in stage
    line = ""
    if done:
        try:
            line = stage_line(stage)
        except (LookupError, TypeError, AttributeError, ValueError):  # of another version: the rest can be told
            line = ""
    seconds, peak = (stage.get(name) for name in ("seconds", "peak_mib"))
    written = 0.0 if done else max((one.stat().st_mtime for one in path.rglob("*") if one.is_file()), default=0.0)
    told = {"folder": path.name, "done": done, "seconds": seconds, "peak_mib": peak, "line": line}
    return told | {"curves": (path / METRICS).is_file(), "written": written}


def _plain(values: dict[str, Any]) -> dict[str, float]:
    return {name: float(v) for name, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}


def curves(folder: Path, stage: str, *, after: int) -> dict[str, Any]:
    """Metrics of a stage's steps that were written since.

    Args:
        after: bytes of the file that the page has seen; the answer says how many it has seen then, as `next`.
    """
    path = folder / stage / METRICS
    if not STAGE_FOLDER.fullmatch(stage) or not path.is_file():
        raise Refused(404, "This stage has no curves.")
    with path.open("rb") as file:
        size = file.seek(0, 2)
        begin = after if after <= size else 0  # written anew
        file.seek(begin)
        data = file.read(MAX_READ)
    whole = data[: data.rfind(b"\n") + 1]  # the last line may be under way
    steps = [found for line in whole.splitlines() if "step" in (found := _step(line))]
    names = sorted({name for step in steps for name in step} - NO_CURVES, key=lambda name: (name != "loss", name))
    shown = thinned(steps) if steps else []
    end = begin + len(whole)
    return {"steps": shown, "names": names, "next": end, "begin": begin, "more": bool(whole) and end < size}


def _step(line: bytes) -> dict[str, float]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return _plain(found) if isinstance(found, dict) else {}
