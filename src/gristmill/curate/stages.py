"""Stages: the tasks of each kind of step, over shards and over parts of the keys' range, and the order of the passes."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gristmill.core.io import make_folder, replacing, state
from gristmill.curate import stats
from gristmill.curate.dedup import duplicates, seen_index, semantic, substring
from gristmill.curate.dedup.duplicates import Exact, Fuzzy
from gristmill.curate.dedup.seen_index import Remember, Seen
from gristmill.curate.dedup.semantic import Semantic
from gristmill.curate.dedup.substring import Substring
from gristmill.curate.filters.decontaminate import Benchmarks, Decontaminate, counts, decontaminate
from gristmill.curate.filters.heuristics import heuristics
from gristmill.curate.filters.language import language
from gristmill.curate.io import shards
from gristmill.curate.outcome import Metric, Outcome, none_dropped
from gristmill.curate.quality import buckets, lm_scores
from gristmill.curate.quality.buckets import Quality
from gristmill.curate.stats import Facts
from gristmill.curate.transforms import rephrase
from gristmill.curate.transforms.clean import clean
from gristmill.curate.transforms.pii import pii
from gristmill.curate.transforms.rephrase import Rephrase
from gristmill.runs.executor import Task
from gristmill.runs.journal import Journal

# Steps that look at one document at a time: those that follow each other are done in one pass.
LOCAL: dict[str, Callable[[pa.Table, Any], Outcome]] = {"clean": clean, "language": language, "filter": heuristics, "pii": pii}


@dataclass
class Stage:
    """A stage under way: where its tasks find and leave their shards.

    Attributes:
        folder: for everything in between.
        sources: shards as they come.
        documents: in all of them.
        journals: folder of what models have said.
        run: has tasks done, with a name for the person who waits; gives their results in order. With `here` set, in this process.
        tick: shows how far a task that is done here has come.
        seconds, peak_mib: of all tasks so far, and of the largest process.
    """

    folder: Path
    sources: list[Path]
    documents: int
    journals: Path
    run: Callable[[str, Sequence[Task], bool], list[Facts]]
    tick: rephrase.Tick
    seconds: float = 0.0
    peak_mib: int = 0

    @property
    def num_shards(self) -> int:
        return len(self.sources)

    @property
    def index(self) -> Path:
        """Where `remember` leaves what it remembers."""
        return self.folder / "index"

    def paths(self, name: str, count: int) -> list[Path]:
        return [self.folder / f"{name}-{i:05d}.arrow" for i in range(count)]

    @property
    def kept(self) -> list[Path]:
        return self.paths("kept", self.num_shards)

    def dropped(self, shard: int) -> Path:
        return self.folder / f"dropped-{shard:05d}.parquet"

    def map(self, what: str, count: int, call: Callable[[int], tuple[Any, ...]], here: bool = False) -> list[Facts]:
        """Run `count` tasks: a function and its arguments for each number. Their results in order."""
        tasks = []
        for i in range(count):
            work, *arguments = call(i)
            tasks.append(Task(work, tuple(arguments), self.folder / f"{what}-{i:05d}.json"))
        results = self.run(what, tasks, here)
        self.seconds += sum(result["seconds"] for result in results)
        self.peak_mib = max([self.peak_mib, *(result["peak_mib"] for result in results)])
        return results


# ---- what tasks do ----


def local(source: Path, kept: Path, dropped: Path, steps: Sequence[Any]) -> Facts:
    """Steps that look at one document at a time, on one shard."""
    table, gone, facts = shards.read(source), [], []
    for step in steps:
        started = time.monotonic()
        outcome = LOCAL[step.step](table, step)
        facts.append(stats.of_step(step, table, outcome, time.monotonic() - started))
        gone.append(outcome.dropped)
        table = outcome.kept
    shards.write(kept, table)
    _write_dropped(dropped, gone)
    return {"steps": facts}


def _write(step: Any, table: pa.Table, outcome: Outcome, kept: Path, dropped: Path) -> Facts:
    shards.write(kept, outcome.kept)
    _write_dropped(dropped, [outcome.dropped])
    return {"steps": [stats.of_step(step, table, outcome)]}


def _similar(outcome: Outcome, limit: float) -> Outcome:
    """With how like the dropped documents are to those that are kept for them."""
    values_N = outcome.dropped["figure"].to_numpy().astype(np.float64)
    metric = Metric(values_N, max=limit, description="of a dropped document to the one that is kept for it", of_input=False)
    return replace(outcome, metrics={"similarity": metric})


def without(shard: int, sources: Sequence[Path], drops: Sequence[Path], kept: Path, dropped: Path, step: Any, limit: float) -> Facts:
    """A shard without its duplicates."""
    outcome = duplicates.drop(shard, sources, drops, step.step, limit)
    return _write(step, shards.read(sources[shard]), _similar(outcome, limit) if limit < 1 else outcome, kept, dropped)


def unseen(
    shard: int, source: Path, sketches: Sequence[Path], old: Sequence[Path], found: Sequence[Path], how: Seen, kept: Path, dropped: Path
) -> Facts:
    """A shard without what an index holds."""
    table, outcome = seen_index.unseen(shard, source, sketches, old, found, how)
    return _write(how, table, _similar(outcome, how.threshold), kept, dropped)


def substringed(shard: int, source: Path, own: Path, ranges: Sequence[Path], how: Substring, kept: Path, dropped: Path) -> Facts:
    """A shard without the spans that stood before."""
    return _write(how, shards.read(source), substring.cut(shard, source, own, ranges, how), kept, dropped)


@cache
def _benchmarks(settings: str) -> Benchmarks:
    return Benchmarks.read(Decontaminate.model_validate_json(settings))


def check(step: Any) -> list[tuple[str, int, int, int]]:
    """Find out, before work is spent, whether what a step reads beside its documents is there; returns the state of those files.

    Raises:
        InputError: it is not.
    """
    paths: list[Path] = []
    if isinstance(step, Decontaminate):
        _benchmarks.cache_clear()
        _benchmarks(step.model_dump_json())
        paths = list(step.benchmarks)
    if isinstance(step, Quality):
        buckets.models(step)
        paths = [Path(name.removeprefix(buckets.PERPLEXITY)) for name in step.classifiers if not name.startswith(buckets.COLUMN)]
    if isinstance(step, Semantic) and step.embedding != "hashed" and not step.embedding.startswith("column:"):
        paths = [Path(step.embedding)]
        lm_scores.check(paths[0])
    if isinstance(step, Rephrase):
        paths = rephrase.check(step)
    if isinstance(step, Seen):
        seen_index.described(step.index)
        paths = [step.index]
    return [state(file) for path in paths for file in ([path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()))]


def matches(source: Path, out: Path, settings: Decontaminate) -> Facts:
    """How often a shard has each n-gram of the benchmarks."""
    found = counts(shards.read(source), _benchmarks(settings.model_dump_json()))
    shards.write(out, pa.table({"count": found}))
    return {}


def decontaminated(source: Path, found: Sequence[Path], kept: Path, dropped: Path, settings: Decontaminate) -> Facts:
    """A shard without what the benchmarks hold."""
    total = np.sum([shards.read(path)["count"].to_numpy() for path in found], axis=0)
    table = shards.read(source)
    outcome = decontaminate(table, settings, _benchmarks(settings.model_dump_json()), total_counts=total)
    return _write(settings, table, outcome, kept, dropped)


def measured(source: Path, out: Path, settings: Quality) -> Facts:
    """What the buckets of quality are made of, of one shard."""
    shards.write(out, buckets.measure(shards.read(source), settings))
    return {}


def limits(found: Sequence[Path], out: Path, settings: Quality) -> Facts:
    """Where the buckets begin, from all shards."""
    found_CB = buckets.thresholds((shards.read(path) for path in found), settings)
    shards.write(out, pa.table({f"limit_{c}": row for c, row in enumerate(found_CB)}))
    return {}


def bucketed(source: Path, found: Path, limits: Path, kept: Path, dropped: Path, settings: Quality) -> Facts:
    """A shard with its buckets of quality, without what is not wanted."""
    table = shards.read(source)
    limits_CB = np.stack([column.to_numpy() for column in shards.read(limits).columns])
    outcome = buckets.quality(table, settings, buckets.scores_of(shards.read(found), settings), limits=limits_CB)
    return _write(settings, table, outcome, kept, dropped)


def rephrased(
    source: Path,
    kept: Path,
    dropped: Path,
    how: Rephrase,
    journals: tuple[Journal, Journal | None],
    tick: rephrase.Tick,
) -> Facts:
    """A shard with what a model made of its documents."""
    table = shards.read(source)
    return _write(how, table, rephrase.rephrase(table, how, journals, tick=tick), kept, dropped)


def _write_dropped(path: Path, tables: Sequence[pa.Table]) -> None:
    table = pa.concat_tables([none_dropped(), *tables])
    if len(table):
        with replacing(path) as temporary:
            pq.write_table(table, temporary, compression="zstd")


# ---- the passes of each step ----


def _locally(stage: Stage, steps: Sequence[Any]) -> list[Facts]:
    return stage.map("shard", stage.num_shards, lambda i: (local, stage.sources[i], stage.kept[i], stage.dropped(i), steps))


def _without(stage: Stage, step: Any, drops: list[Path], limit: float) -> list[Facts]:
    return stage.map("shard", stage.num_shards, lambda i: (without, i, stage.sources, drops, stage.kept[i], stage.dropped(i), step, limit))


def _exact(stage: Stage, how: Exact) -> list[Facts]:
    parts = duplicates.num_parts(stage.documents, 1)
    keys, drops = stage.paths("key", stage.num_shards), stage.paths("drop", parts)
    stage.map("keys", stage.num_shards, lambda i: (duplicates.exact_keys, i, stage.sources[i], keys[i], parts))
    stage.map("groups", parts, lambda p: (duplicates.exact_groups, p, keys, drops[p], stage.num_shards))
    return _without(stage, how, drops, 1.0)


def _fuzzy(stage: Stage, how: Fuzzy) -> list[Facts]:
    num, sources = stage.num_shards, stage.sources
    parts = duplicates.num_parts(stage.documents, how.bands)
    keys, signatures, found = stage.paths("key", num), stage.paths("signature", num), stage.paths("pair", parts)
    verified, cluster, drops = stage.paths("verified", num), stage.folder / "cluster.arrow", stage.paths("drop", num)
    stage.map("sketches", num, lambda i: (duplicates.sketch, i, sources[i], keys[i], signatures[i], parts, how))
    stage.map("pairs", parts, lambda p: (duplicates.pairs, p, keys, found[p], num))
    stage.map("verification", num, lambda i: (duplicates.verify, i, found, sources, signatures, verified[i], how))
    stage.map("clusters", 1, lambda _: (duplicates.clusters, verified, cluster, num))
    stage.map("settled", num, lambda p: (duplicates.resolve_clusters, p, cluster, sources, signatures, drops[p], how))
    return _without(stage, how, drops, how.threshold)


def _decontaminate(stage: Stage, how: Decontaminate) -> list[Facts]:
    found = stage.paths("matches", stage.num_shards)
    stage.map("matches", stage.num_shards, lambda i: (matches, stage.sources[i], found[i], how))
    return stage.map("shard", stage.num_shards, lambda i: (decontaminated, stage.sources[i], found, stage.kept[i], stage.dropped(i), how))


def _remember(stage: Stage, how: Remember) -> list[Facts]:
    make_folder(stage.index)
    stage.map("index", stage.num_shards, lambda i: (seen_index.remember, stage.sources[i], stage.paths("index", stage.num_shards)[i], how))
    for path in stage.paths("index", stage.num_shards):
        (stage.index / path.name).unlink(missing_ok=True)
        (stage.index / path.name).hardlink_to(path)
    seen_index.describe(stage.index, how)
    return _locally(stage, [])


def _seen(stage: Stage, how: Seen) -> list[Facts]:
    num, old = stage.num_shards, sorted(how.index.glob("*.arrow"))
    parts = duplicates.num_parts(stage.documents, seen_index.described(how.index).bands)
    sketches, new_keys, old_keys = stage.paths("sketch", num), stage.paths("key", num), stage.paths("old", len(old))
    found = stage.paths("pair", parts)
    stage.map("sketches", num, lambda i: (seen_index.sketch, stage.sources[i], sketches[i], how.index))
    stage.map("keys", num, lambda i: (seen_index.keys, i, sketches[i], new_keys[i], parts, how.index))
    stage.map("index", len(old), lambda i: (seen_index.keys, i, old[i], old_keys[i], parts, how.index))
    stage.map("pairs", parts, lambda p: (seen_index.pairs, p, new_keys, old_keys, found[p], num))
    return stage.map("shard", num, lambda i: (unseen, i, stage.sources[i], sketches, old, found, how, stage.kept[i], stage.dropped(i)))


def _quality(stage: Stage, how: Quality) -> list[Facts]:
    found, limit = stage.paths("measured", stage.num_shards), stage.folder / "limits.arrow"
    stage.map("scores", stage.num_shards, lambda i: (measured, stage.sources[i], found[i], how))
    stage.map("buckets", 1, lambda _: (limits, found, limit, how))

    def call(i: int) -> tuple[Any, ...]:
        return bucketed, stage.sources[i], found[i], limit, stage.kept[i], stage.dropped(i), how

    return stage.map("shard", stage.num_shards, call)


def _rephrase(stage: Stage, how: Rephrase) -> list[Facts]:
    scored = nullcontext() if how.reward is None else Journal(stage.journals / "ratings.jsonl")
    with Journal(stage.journals / "journal.jsonl") as answers, scored as ratings:

        def call(i: int) -> tuple[Any, ...]:
            return rephrased, stage.sources[i], stage.kept[i], stage.dropped(i), how, (answers, ratings), stage.tick

        return stage.map("shard", stage.num_shards, call, here=True)


def _substring(stage: Stage, how: Substring) -> list[Facts]:
    num, sources = stage.num_shards, stage.sources
    parts = substring.num_parts(sources)
    keys, windows, own = (stage.paths(name, num) for name in ("key", "window", "own"))
    repeats, ranges = stage.paths("repeat", parts), stage.paths("range", parts)
    stage.map("keys", num, lambda i: (substring.substring_keys, i, sources[i], keys[i], parts, how))
    stage.map("repeats", parts, lambda p: (substring.substring_repeats, p, keys, repeats[p]))
    stage.map("windows", num, lambda i: (substring.substring_windows, i, sources[i], repeats, windows[i], own[i], parts, how))
    stage.map("matches", parts, lambda p: (substring.substring_matches, p, windows, ranges[p], num))
    return stage.map("shard", num, lambda i: (substringed, i, sources[i], own[i], ranges, how, stage.kept[i], stage.dropped(i)))


def _semantic(stage: Stage, how: Semantic) -> list[Facts]:
    num, parts = stage.num_shards, duplicates.num_parts(stage.documents, 1)
    vectors, partial, assigned = (stage.paths(name, num) for name in ("vector", "sum", "assigned"))
    drops, means = stage.paths("drop", parts), stage.paths("centroid", how.iterations + 1)
    stage.map("vectors", num, lambda i: (semantic.embed, i, stage.sources[i], vectors[i], how))
    stage.map("start", 1, lambda _: (semantic.start, vectors, means[0], how))
    last = 0
    for turn in range(how.iterations):
        before, after = means[turn], means[turn + 1]
        stage.map(f"sums-{turn}", num, lambda i, before=before: (semantic.sums, i, vectors[i], before, partial[i]))  # type: ignore[misc]
        (facts,) = stage.map(f"centroids-{turn}", 1, lambda _, b=before, a=after: (semantic.centroids, partial, b, a))  # type: ignore[misc]
        last = turn + 1
        if facts["moved"] < semantic.STILL:
            break
    stage.map("assigned", num, lambda i: (semantic.assign, i, vectors[i], means[last], assigned[i], parts, how))
    stage.map("groups", parts, lambda p: (semantic.semantic_groups, p, assigned, vectors, drops[p], how))
    return _without(stage, how, drops, 1.0 - how.eps)


PASSES: dict[str, Callable[[Stage, Any], list[Facts]]] = {
    "exact": _exact,
    "fuzzy": _fuzzy,
    "decontaminate": _decontaminate,
    "quality": _quality,
    "remember": _remember,
    "rephrase": _rephrase,
    "seen": _seen,
    "semantic": _semantic,
    "substring": _substring,
}


def run_stage(stage: Stage, steps: Sequence[Any]) -> tuple[list[Facts], list[Facts]]:
    """Run all tasks of a stage; the facts of its steps over all shards, and their samples."""
    results = _locally(stage, steps) if steps[0].step in LOCAL else PASSES[steps[0].step](stage, steps[0])
    of_steps = list(zip(*(result["steps"] for result in results), strict=True))
    facts = [stats.add(of_step) for of_step in of_steps]
    for one in facts:
        one |= {"seconds": round(one["seconds"] if len(facts) > 1 else stage.seconds, 2), "peak_mib": stage.peak_mib}
    return facts, [stats.add_samples(of_step) for of_step in of_steps]
