"""What a stage does: the tasks of each kind of step, over shards and over parts of a key's range, and how they follow each other."""

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gristmill.core.io import state, write_json
from gristmill.curate.dedup import duplicates, semantic, substring
from gristmill.curate.dedup import seen_index as snapshots
from gristmill.curate.dedup.duplicates import Exact, Fuzzy
from gristmill.curate.dedup.seen_index import Remember, Seen
from gristmill.curate.dedup.semantic import Semantic
from gristmill.curate.dedup.substring import Substring
from gristmill.curate.filters.decontaminate import Benchmarks, Decontaminate, counts, decontaminate
from gristmill.curate.filters.heuristics import heuristics
from gristmill.curate.filters.language import language
from gristmill.curate.io import shards
from gristmill.curate.outcome import Outcome, none_dropped
from gristmill.curate.quality import buckets
from gristmill.curate.quality import lm_scores as base
from gristmill.curate.quality.buckets import Quality
from gristmill.curate.text.text_column import TextColumn
from gristmill.curate.transforms import rephrase
from gristmill.curate.transforms.clean import clean
from gristmill.curate.transforms.pii import pii
from gristmill.curate.transforms.rephrase import Rephrase
from gristmill.runs.executor import Task
from gristmill.runs.journal import Journal

Facts = dict[str, Any]
# Steps that look at one document at a time: those that follow each other are done in one pass.
LOCAL: dict[str, Callable[[pa.Table, Any], Outcome]] = {"clean": clean, "language": language, "filter": heuristics, "pii": pii}


@dataclass
class Stage:
    """Where a stage finds and leaves its shards.

    Attributes:
        folder: for everything in between.
        sources: shards as they come.
        documents: in all of them.
        index: where `remember` leaves what it remembers.
        journals: folder of what models have said.
        do: has tasks done, with a name for the person who waits; gives their results in order. With `here` set, in this process.
        tick: shows how far a task that is done here has come.
    """

    folder: Path
    sources: list[Path]
    documents: int
    index: Path
    journals: Path
    do: Callable[[str, Sequence[Task], bool], list[Facts]]
    tick: rephrase.Tick

    @property
    def num(self) -> int:
        return len(self.sources)

    def paths(self, name: str, count: int) -> list[Path]:
        return [self.folder / f"{name}-{i:05d}.arrow" for i in range(count)]

    @property
    def kept(self) -> list[Path]:
        return self.paths("kept", self.num)

    def dropped(self, shard: int) -> Path:
        return self.folder / f"dropped-{shard:05d}.parquet"

    def each(self, what: str, count: int, call: Callable[[int], tuple[Any, ...]], here: bool = False) -> list[Facts]:
        """So many tasks: a function and its arguments for each number."""
        tasks = []
        for i in range(count):
            work, *arguments = call(i)
            tasks.append(Task(work, tuple(arguments), self.folder / f"{what}-{i:05d}.json"))
        return self.do(what, tasks, here)


# ---- what tasks do ----


def local(source: Path, kept: Path, dropped: Path, steps: Sequence[Any]) -> Facts:
    """Steps that look at one document at a time, on one shard."""
    table, gone, facts = shards.read(source), [], []
    for step in steps:
        outcome = LOCAL[step.step](table, step)
        facts.append(_facts(step.step, table, outcome))
        gone.append(outcome.dropped)
        table = outcome.kept
    shards.write(kept, table)
    _write_dropped(dropped, gone)
    return {"steps": facts}


def _leave(step: str, table: pa.Table, outcome: Outcome, kept: Path, dropped: Path) -> Facts:
    shards.write(kept, outcome.kept)
    _write_dropped(dropped, [outcome.dropped])
    return {"steps": [_facts(step, table, outcome)]}


def without(shard: int, sources: Sequence[Path], drops: Sequence[Path], kept: Path, dropped: Path, step: str, limit: float) -> Facts:
    """A shard without its duplicates."""
    return _leave(step, shards.read(sources[shard]), duplicates.drop(shard, sources, drops, step, limit), kept, dropped)


def unseen(
    shard: int, source: Path, sketches: Sequence[Path], old: Sequence[Path], found: Sequence[Path], how: Seen, kept: Path, dropped: Path
) -> Facts:
    """A shard without what an index holds."""
    table, outcome = snapshots.unseen(shard, source, sketches, old, found, how)
    return _leave(how.step, table, outcome, kept, dropped)


def substringed(shard: int, source: Path, own: Path, ranges: Sequence[Path], how: Substring, kept: Path, dropped: Path) -> Facts:
    """A shard without the spans that stood before."""
    return _leave(how.step, shards.read(source), substring.cut(shard, source, own, ranges, how), kept, dropped)


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
        base.check(paths[0])
    if isinstance(step, Rephrase):
        paths = rephrase.check(step)
    if isinstance(step, Seen):
        snapshots.described(step.index)
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
    return _leave(settings.step, table, outcome, kept, dropped)


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
    return _leave(settings.step, table, outcome, kept, dropped)


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
    return _leave(how.step, table, rephrase.rephrase(table, how, journals, tick=tick), kept, dropped)


def num_bytes(table: pa.Table) -> int:
    """Of all texts, UTF-8."""
    texts = TextColumn.of(table["text"])
    return int(texts.begin_N[-1] - texts.begin_N[0])


def _facts(step: str, before: pa.Table, outcome: Outcome) -> Facts:
    another = r"\1 another"
    reasons = Counter(
        re.sub(r"^(same text as|near duplicate of|seen before as) .*", another, reason, flags=re.DOTALL)
        for reason in outcome.dropped["reason"].to_pylist()
    )
    return {
        "step": step,
        "documents_in": len(before),
        "bytes_in": num_bytes(before),
        "documents_out": len(outcome.kept),
        "bytes_out": num_bytes(outcome.kept),
        "reasons": dict(reasons),
        "changed": dict(outcome.counts),
    }


def _write_dropped(path: Path, tables: Sequence[pa.Table]) -> None:
    table = pa.concat_tables([none_dropped(), *tables])
    if len(table):
        temporary = path.with_suffix(f".{os.getpid()}")
        pq.write_table(table, temporary, compression="zstd")
        temporary.replace(path)


# ---- chains of them ----


def _locally(stage: Stage, steps: Sequence[Any]) -> list[Facts]:
    return stage.each("shard", stage.num, lambda i: (local, stage.sources[i], stage.kept[i], stage.dropped(i), steps))


def _without(stage: Stage, step: str, drops: list[Path], limit: float) -> list[Facts]:
    return stage.each("shard", stage.num, lambda i: (without, i, stage.sources, drops, stage.kept[i], stage.dropped(i), step, limit))


def _exact(stage: Stage, how: Exact) -> list[Facts]:
    parts = duplicates.num_parts(stage.documents, 1)
    keys, drops = stage.paths("key", stage.num), stage.paths("drop", parts)
    stage.each("keys", stage.num, lambda i: (duplicates.exact_keys, i, stage.sources[i], keys[i], parts))
    stage.each("groups", parts, lambda p: (duplicates.exact_groups, p, keys, drops[p], stage.num))
    return _without(stage, how.step, drops, 1.0)


def _fuzzy(stage: Stage, how: Fuzzy) -> list[Facts]:
    num, sources = stage.num, stage.sources
    parts = duplicates.num_parts(stage.documents, how.bands)
    keys, signatures, found = stage.paths("key", num), stage.paths("signature", num), stage.paths("pair", parts)
    verified, cluster, drops = stage.paths("verified", num), stage.folder / "cluster.arrow", stage.paths("drop", num)
    stage.each("sketches", num, lambda i: (duplicates.sketch, i, sources[i], keys[i], signatures[i], parts, how))
    stage.each("pairs", parts, lambda p: (duplicates.pairs, p, keys, found[p], num))
    stage.each("verification", num, lambda i: (duplicates.verify, i, found, sources, signatures, verified[i], how))
    stage.each("clusters", 1, lambda _: (duplicates.clusters, verified, cluster, num))
    stage.each("settled", num, lambda p: (duplicates.resolve_clusters, p, cluster, sources, signatures, drops[p], how))
    return _without(stage, how.step, drops, how.threshold)


def _decontaminate(stage: Stage, how: Decontaminate) -> list[Facts]:
    found = stage.paths("matches", stage.num)
    stage.each("matches", stage.num, lambda i: (matches, stage.sources[i], found[i], how))
    return stage.each("shard", stage.num, lambda i: (decontaminated, stage.sources[i], found, stage.kept[i], stage.dropped(i), how))


def _remember(stage: Stage, how: Remember) -> list[Facts]:
    stage.index.mkdir(parents=True, exist_ok=True)
    for old in stage.index.glob("*.arrow"):
        old.unlink()
    stage.each("index", stage.num, lambda i: (snapshots.remember, stage.sources[i], stage.paths("index", stage.num)[i], how))
    for path in stage.paths("index", stage.num):
        (stage.index / path.name).hardlink_to(path)
    write_json(stage.index / snapshots.DESCRIPTION, how.model_dump(mode="json"))
    return _locally(stage, [])


def _seen(stage: Stage, how: Seen) -> list[Facts]:
    num, old = stage.num, sorted(how.index.glob("*.arrow"))
    parts = duplicates.num_parts(stage.documents, snapshots.described(how.index).bands)
    sketches, new_keys, old_keys = stage.paths("sketch", num), stage.paths("key", num), stage.paths("old", len(old))
    found = stage.paths("pair", parts)
    stage.each("sketches", num, lambda i: (snapshots.sketch, stage.sources[i], sketches[i], how.index))
    stage.each("keys", num, lambda i: (snapshots.keys, i, sketches[i], new_keys[i], parts, how.index))
    stage.each("index", len(old), lambda i: (snapshots.keys, i, old[i], old_keys[i], parts, how.index))
    stage.each("pairs", parts, lambda p: (snapshots.pairs, p, new_keys, old_keys, found[p], num))
    return stage.each("shard", num, lambda i: (unseen, i, stage.sources[i], sketches, old, found, how, stage.kept[i], stage.dropped(i)))


def _quality(stage: Stage, how: Quality) -> list[Facts]:
    found, limit = stage.paths("measured", stage.num), stage.folder / "limits.arrow"
    stage.each("scores", stage.num, lambda i: (measured, stage.sources[i], found[i], how))
    stage.each("buckets", 1, lambda _: (limits, found, limit, how))
    return stage.each("shard", stage.num, lambda i: (bucketed, stage.sources[i], found[i], limit, stage.kept[i], stage.dropped(i), how))


def _rephrase(stage: Stage, how: Rephrase) -> list[Facts]:
    scored = nullcontext() if how.reward is None else Journal(stage.journals / "ratings.jsonl")
    with Journal(stage.journals / "journal.jsonl") as answers, scored as ratings:

        def call(i: int) -> tuple[Any, ...]:
            return rephrased, stage.sources[i], stage.kept[i], stage.dropped(i), how, (answers, ratings), stage.tick

        return stage.each("shard", stage.num, call, here=True)


def _substring(stage: Stage, how: Substring) -> list[Facts]:
    num, sources = stage.num, stage.sources
    parts = substring.num_parts(sources)
    keys, windows, own = (stage.paths(name, num) for name in ("key", "window", "own"))
    repeats, ranges = stage.paths("repeat", parts), stage.paths("range", parts)
    stage.each("keys", num, lambda i: (substring.substring_keys, i, sources[i], keys[i], parts, how))
    stage.each("repeats", parts, lambda p: (substring.substring_repeats, p, keys, repeats[p]))
    stage.each("windows", num, lambda i: (substring.substring_windows, i, sources[i], repeats, windows[i], own[i], parts, how))
    stage.each("matches", parts, lambda p: (substring.substring_matches, p, windows, ranges[p], num))
    return stage.each("shard", num, lambda i: (substringed, i, sources[i], own[i], ranges, how, stage.kept[i], stage.dropped(i)))


def _semantic(stage: Stage, how: Semantic) -> list[Facts]:
    num, parts = stage.num, duplicates.num_parts(stage.documents, 1)
    vectors, partial, assigned = (stage.paths(name, num) for name in ("vector", "sum", "assigned"))
    drops, means = stage.paths("drop", parts), stage.paths("centroid", how.iterations + 1)
    stage.each("vectors", num, lambda i: (semantic.embed, i, stage.sources[i], vectors[i], how))
    stage.each("start", 1, lambda _: (semantic.start, vectors, means[0], how))
    last = 0
    for turn in range(how.iterations):
        before, after = means[turn], means[turn + 1]
        stage.each(f"sums-{turn}", num, lambda i, before=before: (semantic.sums, i, vectors[i], before, partial[i]))  # type: ignore[misc]
        (facts,) = stage.each(f"centroids-{turn}", 1, lambda _, b=before, a=after: (semantic.centroids, partial, b, a))  # type: ignore[misc]
        last = turn + 1
        if facts["moved"] < semantic.STILL:
            break
    stage.each("assigned", num, lambda i: (semantic.assign, i, vectors[i], means[last], assigned[i], parts, how))
    stage.each("groups", parts, lambda p: (semantic.semantic_groups, p, assigned, vectors, drops[p], how))
    return _without(stage, how.step, drops, 1.0 - how.eps)


CHAINS: dict[str, Callable[[Stage, Any], list[Facts]]] = {
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


def do(stage: Stage, steps: Sequence[Any]) -> list[Facts]:
    """All tasks of a stage; the facts of its steps for each shard."""
    if steps[0].step in LOCAL:
        return _locally(stage, steps)
    return CHAINS[steps[0].step](stage, steps[0])
