"""Plan of a parallel layout, a search and the published rows as lines of text."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from gristmill.curate.plan import NODE_BANDWIDTH, CurationPlan
from gristmill.parallel.layout import warnings
from gristmill.parallel.planner import ERROR, Found, Plan, root_mean_square

TIME_WORDS = {
    "products": "matrix products",
    "attention": "attention",
    "elementwise": "element-wise",
    "head": "output matrix and loss",
    "recompute": "recompute",
    "traffic_tp": "TP traffic",
    "traffic_cp": "CP traffic",
    "traffic_pp": "PP traffic",
    "bubble": "pipeline bubble",
    "traffic_dp": "DP traffic",
    "optimizer": "optimizer",
    "stragglers": "stragglers",
}
DAY = 86_400


def _seconds(value: float) -> str:
    return f"{value:,.3g} s" if value < 100 else f"{value:,.0f} s"


def _count(value: float) -> str:
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:,.4g}{unit}"
    return f"{value:,.4g}"


def devices_of(plan: Plan) -> str:
    """How many of which device."""
    return f"{plan.layout.num_devices:,} {'processes on ' if plan.hardware.is_cpu else ''}{plan.hardware.name}"


def plan_lines(plan: Plan, tokens: float | None = None) -> list[str]:
    """A plan in a few lines; `tokens` is what the whole training reads."""
    layout, facts = plan.layout, plan.as_dict()
    trained = "" if layout.lora is None else f", {_count(facts['trained_parameters'])} more that are trained,"
    lines = [
        f"{plan.name}: {_count(facts['parameters'])} parameters{trained} on {devices_of(plan)}, {layout}, {layout.precision}",
        f"batch    {layout.batch_size:,} x {layout.seq_len:,} tokens a step, in {layout.num_micro_batches:,} micro-batches a DP rank",
        f"step     {_seconds(plan.time.total)}, {_count(plan.tokens_per_second)} tokens/s, "
        f"{plan.tokens_per_second / layout.num_devices:,.0f} a {'process' if plan.hardware.is_cpu else 'GPU'}",
        f"MFU      {plan.mfu():.1%} with attention counted in full, {plan.mfu(causal=True):.1%} causal"
        + (f"; {plan.mfu(precision='fp8'):.1%} of the peak in fp8" if layout.precision == "fp8" else ""),
    ]
    parts = sorted(asdict(plan.time).items(), key=lambda part: -part[1])
    named = ", ".join(f"{TIME_WORDS[name]} {value / plan.time.total:.1%}" for name, value in parts if value >= 0.001 * plan.time.total)
    lines.append(f"time     {named}")
    for name, rank in plan.memory.items():
        named = ", ".join(f"{part} {value / 2**30:,.3g}" for part, value in asdict(rank).items() if value)
        where = "a rank" if len(plan.memory) == 1 else f"the {name} rank"
        lines.append(f"memory   {rank.total / 2**30:,.1f} of {facts['usable_gib']:,.1f} GiB usable on {where}: {named}")
    if tokens is not None:
        seconds = tokens / plan.tokens_per_second
        spent = f", {seconds * layout.num_devices / 3600:,.0f} GPU-hours" if not plan.hardware.is_cpu else ""
        lines.append(f"training {_count(tokens)} tokens take {seconds / DAY:,.2f} days{spent}")
    return [*lines, *(f"note: {text}" for text in warnings(plan.config, layout, plan.hardware))]


def search_lines(found: Found, num_shown: int) -> list[str]:
    """The fastest layouts of a search, one a TP and PP."""
    lines = [f"{found.num_valid:,} layouts are valid, {found.num_fit:,} fit; the best of each TP and PP:"]
    lines.append(f"{'TP':>4}{'PP':>4}{'VP':>4}{'CP':>4}{'DP':>6}{'micro':>7}  {'recompute':<10}{'step':>10}{'MFU':>8}{'GiB':>8}")
    for plan in found.plans[:num_shown]:
        x = plan.layout
        lines.append(
            f"{x.tp:>4}{x.pp:>4}{x.vp:>4}{x.cp:>4}{x.dp:>6}{x.micro_batch:>7}  {x.recompute:<10}{_seconds(plan.time.total):>10}"
            f"{plan.mfu():>8.1%}{plan.memory[plan.fullest].total / 2**30:>8.1f}"
        )
    if found.undecided > 1:
        lines.append(f"The first {found.undecided} are nearer to each other than the planner's error of {ERROR:.1%}: measure them.")
    return lines


def curation_lines(plan: CurationPlan) -> list[str]:
    """A curation's plan, a line a stage."""
    machines = f"{plan.nodes:,} nodes of {plan.cores:,} cores"
    lines = [f"{_count(plan.documents)} documents, {_bytes(plan.text_bytes)} of text, {machines}; at most, with nothing dropped:"]
    lines.append(f"{'stage':<28}{'core hours':>12}{'minutes':>9}{'read':>11}{'written':>11}{'keys':>11}{'disk':>11}")
    for stage in plan.stages:
        sizes = "".join(f"{_bytes(size):>11}" for size in (stage.read, stage.written, stage.shuffled, stage.disk))
        minutes = stage.seconds(plan.nodes, plan.cores) / 60
        lines.append(f"{stage.name:<28}{stage.cpu_seconds / 3600:>12,.1f}{minutes:>9,.1f}{sizes}")
    lines.append(
        f"In all {plan.hours:,.2f} hours ({plan.core_hours:,.1f} of a core), {_bytes(plan.disk)} of disk before the stages are removed, "
        f"{_bytes(plan.traffic)} to and from the shared storage, at {_bytes(NODE_BANDWIDTH)} a second and node."
    )
    if plan.unknown:
        lines.append(f"note: no rate was measured of {', '.join(plan.unknown)}: their time is not counted.")
    return [*lines, "note: not counted are candidate pairs of near duplicates, and their clusters, which one process makes."]


def _bytes(size: float) -> str:
    for unit, factor in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:,.3g} {unit}"
    return f"{size:,.0f} B"


def published_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Published measurements beside the plan."""
    lines = [f"{'':<28}{'layout':<51}{'measured':>9}{'plan':>9}{'error':>9}"]
    for row in rows:
        shown = [f"{row[key]:.2f} s" if row["kind"] == "step_seconds" else f"{row[key]:.1%}" for key in ("measured", "planned")]
        lines.append(f"{row['name']:<28}{row['layout']:<51}{shown[0]:>9}{shown[1]:>9}{row['error']:>+9.1%}")
    errors = [row["error"] for row in rows]
    lines.append(f"root mean square of the errors {root_mean_square(errors):.1%}; seconds of a step, or MFU by the source's own count")
    return lines
