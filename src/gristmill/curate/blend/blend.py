"""Data blending: documents of several sources, as tokens, in the order that they are trained on.

Each input file is encoded once. Then every phase draws whole documents of each source until the source has its share of the tokens; a
source is gone through in one seeded permutation of its documents after another, from phase to phase, so that none comes a second time
before all have come once. The documents of a phase are shuffled together. What comes out depends on the documents and their order alone:
neither on the files that they are spread over nor on the workers.

Nemotron-4 (2402.16819) blends 70 % English, 15 % other languages and 15 % code, and ends on a second, short phase of other weights.
"""

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import chain
from pathlib import Path
from typing import IO, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from gristmill.core.config import FilePath, PatternPath, Recipe, RunName, Section
from gristmill.core.errors import InputError
from gristmill.core.io import replacing, state, sync, write_json
from gristmill.core.progress import Progress
from gristmill.curate.blend.encode import Encoder, fast_encoder
from gristmill.curate.io import readers
from gristmill.curate.io.readers import Reading
from gristmill.data.rows import make_id
from gristmill.data.token_store import TOKEN
from gristmill.data.tokenizer import Tokenizer
from gristmill.runs import executor
from gristmill.runs.executor import Task
from gristmill.runs.run_dir import RunDir, Stage

SHARD_TOKENS = 1 << 28  # 1 GiB
MAX_SKIPPED = 1000  # skips that are named one by one
STORE = "blend.json"  # says that the token store is whole
ORDER, ENDS = "order.npy", "ends.npy"
Facts = dict[str, Any]


class Source(Section):
    """Data source: documents that share a weight."""

    name: str = Field(pattern=r"^[\w.-]+$")
    inputs: list[PatternPath] = Field(min_length=1, description="files, folders and patterns")
    weight: float = Field(gt=0, allow_inf_nan=False, description="of its tokens, relative to the other sources")
    max_epochs: float = Field(4.0, gt=0, description="how often its tokens may be used; repeats beyond four are worth little (2305.16264)")


class Phase(Section):
    """Phase of the data schedule: a stretch of the training tokens, with weights of its own."""

    share: float = Field(gt=0, allow_inf_nan=False, description="of the tokens, relative to the other phases")
    weights: dict[str, float] = Field(default_factory=dict, description="by source, 0 for those not named; none: the sources' own")


class Blend(Recipe):
    """Blend recipe: what is blended, and how much of it."""

    kind: Literal["blend"] = "blend"
    name: RunName = "blend"
    tokenizer: FilePath = Field(description="folder of a model or tokenizer")
    sources: list[Source] = Field(min_length=1)
    tokens: int = Field(gt=0, description="end-of-document tokens included")
    phases: list[Phase] = Field(default_factory=lambda: [Phase(share=1)], min_length=1)
    seed: int = Field(0, ge=0)
    reading: Reading = Reading()
    executor: Literal["processes", "ray"] = "processes"
    workers: int = Field(0, ge=0, description="processes; 0: one a core")

    def changed(self, old: dict[str, Any]) -> list[str]:
        """None: a run of another recipe begins again where they differ."""
        return []

    @model_validator(mode="after")
    def _weights(self) -> Self:
        names = {source.name for source in self.sources}
        if len(names) < len(self.sources):
            raise ValueError("two sources have the same name")
        for phase in self.phases:
            if unknown := sorted(phase.weights.keys() - names):
                raise ValueError(f"a phase gives a weight to {unknown[0]!r}, which is no source")
            if phase.weights and (min(phase.weights.values()) < 0 or not 0 < sum(phase.weights.values()) < math.inf):
                raise ValueError("the weights of a phase must be 0 or more, and one of them more than 0")
        return self


# ---- what tasks do ----


@cache
def _encoder(folder: Path, fingerprint: str) -> Encoder:
    return fast_encoder(Tokenizer.load(folder))


@contextmanager
def _whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, that is at `path` once it is written."""
    with replacing(path) as temporary, temporary.open("wb+") as file:
        yield file


def _save(path: Path, values: np.ndarray) -> None:
    with _whole(path) as file:
        np.save(file, values)


def encode(
    source: Path, name: str, out: Path, tokenizer: Path, fingerprint: str, eos_id: int, reading: Reading, shard_tokens: int
) -> Facts:
    """Encode a file of documents into `out`-00000.bin, each with the document ends in `out`-00000.npy. Empty documents are left out."""
    encoder = _encoder(tokenizer, fingerprint)
    skipped: list[tuple[str, str]] = []
    facts: Facts = {"shards": [], "documents": 0, "tokens": 0, "empty": 0}
    eos = np.array([eos_id], TOKEN).tobytes()

    def documents_of() -> Iterator[np.ndarray]:
        for table in readers.read(source, reading, lambda where, why: skipped.append((where, why)), name=name):
            texts = [text for text in table["text"].to_pylist() if text]
            facts["empty"] += len(table) - len(texts)
            yield from encoder(texts)

    rest = documents_of()
    ids = next(rest, None)
    while ids is not None:
        stem = f"{out.name}-{len(facts['shards']):05d}"
        ends: list[int] = []
        size = 0
        with _whole(out.with_name(stem + ".bin")) as file:
            while ids is not None and (not ends or size + len(ids) + 1 <= shard_tokens):
                file.write(ids.astype(TOKEN).tobytes() + eos)
                size += len(ids) + 1
                ends.append(size)
                ids = next(rest, None)
        _save(out.with_name(stem + ".npy"), np.array(ends, np.int64))
        facts["shards"].append({"stem": stem, "documents": len(ends)})
        facts["documents"] += len(ends)
        facts["tokens"] += size
    return facts | {"exact": encoder.exact, "num_skipped": len(skipped), "skipped": skipped[:MAX_SKIPPED]}


def gather(stems: Sequence[Path], firsts_S: np.ndarray, order: Path, ends: Path, begin: int, end: int, out: Path) -> Facts:
    """Write documents `begin` to `end` of the order into one file.

    Args:
        stems: of the encoded shards; shard s holds the documents from number `firsts_S[s]` on.
        order: the number of each drawn document, int64.
        ends: where each drawn document ends, in tokens from the beginning of the blend, int64.
    """
    document_N = np.load(order, mmap_mode="r")[begin:end]
    end_N = np.load(ends, mmap_mode="r")
    first = int(end_N[begin - 1]) if begin else 0
    length = int(end_N[end - 1]) - first
    to_N = np.concatenate([[0], end_N[begin : end - 1] - first])
    shard_N = np.searchsorted(firsts_S, document_N, side="right") - 1
    by_document = np.argsort(document_N, kind="stable")  # so that what is read lies in a row
    borders = np.searchsorted(shard_N[by_document], np.arange(len(stems) + 1))
    with _whole(out) as file:
        os.posix_fallocate(file.fileno(), 0, length * TOKEN.itemsize)  # a full disk is an error here; below it would end the process
        target = np.memmap(file, TOKEN, "r+", shape=(length,))
        for shard in np.flatnonzero(np.diff(borders)).tolist():
            places = by_document[borders[shard] : borders[shard + 1]]
            tokens = np.memmap(stems[shard].with_suffix(".bin"), TOKEN, "r")
            ends_M = np.load(stems[shard].with_suffix(".npy"))
            row = document_N[places] - firsts_S[shard]
            low = np.where(row > 0, ends_M[row - 1], 0)
            for to, a, b in zip(to_N[places].tolist(), low.tolist(), ends_M[row].tolist(), strict=True):
                target[to : to + b - a] = tokens[a:b]
        target.flush()
    return {"file": out.name, "documents": end - begin, "tokens": length}


# ---- the order ----


def _random(*parts: object) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=16).digest(), "big"))


class _Drawn:
    """A source, gone through again and again.

    Args:
        lengths_N: tokens of its documents.
        first: number of its first document among those of all sources.
    """

    def __init__(self, source: Source, lengths_N: np.ndarray, first: int, seed: int) -> None:
        self.source, self.lengths_N, self.first, self.seed = source, lengths_N, first, seed
        self.tokens = self.taken = self.wanted = 0  # the last in tokens of all phases so far
        self.epoch = -1
        self.left = np.empty(0, np.int64)

    def take(self, wanted: int) -> np.ndarray:
        """Numbers of documents until there are so many more tokens; what came too much before is taken off."""
        self.wanted += wanted
        parts = []
        while self.tokens < self.wanted:
            if not len(self.left):
                self.epoch += 1
                self.left = _random(self.seed, self.source.name, self.epoch).permutation(len(self.lengths_N))
            ends = np.cumsum(self.lengths_N[self.left])
            count = min(len(ends), int(np.searchsorted(ends, self.wanted - self.tokens)) + 1)
            parts.append(self.left[:count])
            self.left = self.left[count:]
            self.tokens += int(ends[count - 1])
            self.taken += count
        return np.concatenate([np.empty(0, np.int64), *parts]) + self.first


def draw(recipe: Blend, lengths: Sequence[np.ndarray]) -> tuple[np.ndarray, list[Facts], list[Facts]]:
    """The order of the documents, and what each phase and each source of it is made of.

    Args:
        lengths: tokens of the documents of each source.

    Returns:
        Numbers of documents, counted through all sources, int64; facts of the phases; facts of the sources.

    Raises:
        InputError: a source has too few tokens.
    """
    firsts = np.cumsum([0, *map(len, lengths)])
    drawn = [_Drawn(source, lengths[i], int(firsts[i]), recipe.seed) for i, source in enumerate(recipe.sources)]
    shares = _ends(recipe.tokens, [phase.share for phase in recipe.phases])
    of_phases = zip(recipe.phases, np.diff(shares, prepend=0).tolist(), strict=True)
    targets = [np.diff(_ends(tokens, _weights_of(recipe, phase)), prepend=0) for phase, tokens in of_phases]
    for one, wanted in zip(drawn, np.sum(targets, axis=0).tolist(), strict=True):
        present, name = int(one.lengths_N.sum()), one.source.name
        if wanted and not present:
            raise InputError(f"Source {name!r} holds no documents with text: give other inputs, or leave it out.")
        if wanted > present * one.source.max_epochs:
            raise InputError(
                f"Source {name!r} has {present:,} tokens and the blend wants {wanted:,} of it, {wanted / present:.2f} epochs, more "
                f"than its max_epochs {one.source.max_epochs:g}: lower its weight or `tokens`, raise max_epochs, or add documents."
            )
    order, phases = [], []
    for number, wanted_S in enumerate(targets):
        before = [(one.tokens, one.taken) for one in drawn]
        parts = [one.take(wanted) for one, wanted in zip(drawn, wanted_S.tolist(), strict=True)]
        together = np.concatenate(parts)
        order.append(together[_random(recipe.seed, "phase", number).permutation(len(together))])
        tokens = sum(one.tokens for one in drawn) - sum(t for t, _ in before)
        of_sources = [
            {
                "name": one.source.name,
                "tokens": one.tokens - t,
                "documents": one.taken - d,
                "share": (one.tokens - t) / max(1, tokens),
                "epochs": (one.taken - d) / max(1, len(one.lengths_N)),
            }
            for one, (t, d) in zip(drawn, before, strict=True)
        ]
        phases.append({"tokens": tokens, "documents": len(together), "sources": of_sources})
    total = max(1, sum(one.tokens for one in drawn))
    sources = [
        {
            "name": one.source.name,
            "tokens": one.tokens,
            "documents": one.taken,
            "share": one.tokens / total,
            "epochs": one.taken / max(1, len(one.lengths_N)),
            "repeats": max(0, one.taken - len(one.lengths_N)),  # documents drawn again
            "present": {"tokens": int(one.lengths_N.sum()), "documents": len(one.lengths_N)},
        }
        for one in drawn
    ]
    return np.concatenate(order), phases, sources


def _weights_of(recipe: Blend, phase: Phase) -> list[float]:
    return [phase.weights.get(source.name, 0.0) if phase.weights else source.weight for source in recipe.sources]


def _ends(total: int, weights: Sequence[float]) -> np.ndarray:
    """Where each part of `total` ends that is cut by weights, int64."""
    return np.rint(np.cumsum(weights) / np.sum(weights) * total).astype(np.int64)


# ---- the run ----


def blend(recipe: Blend, folder: Path, progress: Progress) -> Facts:
    """Run a recipe, or what is left of it; returns what is in `results.json`.

    The folder then holds `tokens-00000.bin` and so on (int32), `ends.npy` (where documents end, in tokens from the first file's beginning,
    int64), `tokenizer/` and `blend.json`, which `TokenStore` opens; and `recipe.yaml` and `results.json`.

    Raises:
        InputError: an input is missing, a source has too few tokens, or the disk is full.
    """
    tokenizer = Tokenizer.load(recipe.tokenizer)
    files = {source.name: readers.list_files(source.inputs) for source in recipe.sources}
    with RunDir(folder, recipe, progress) as run_dir:
        return _Run(recipe, run_dir, tokenizer, files=files).run()


class _Run:
    def __init__(self, recipe: Blend, run_dir: RunDir, tokenizer: Tokenizer, *, files: dict[str, dict[Path, str]]) -> None:
        self.recipe, self.run_dir, self.tokenizer, self.files = recipe, run_dir, tokenizer, files
        self.tokenizer_fingerprint = tokenizer.fingerprint()

    def run(self) -> Facts:
        inputs = {name: [state(path) for path in paths] for name, paths in self.files.items()}
        settings = self.recipe.model_dump(mode="json", exclude={"executor", "workers", "name"})
        whole = make_id(inputs, settings, self.tokenizer_fingerprint)
        results = self.run_dir.finished(whole, [STORE])
        if results is None:
            self.executor = executor.make(self.recipe.executor, self.recipe.workers or executor.cores())
            try:
                results = self._results(inputs, settings)
            finally:
                self.executor.close()
            head = {"kind": self.recipe.kind, "name": self.recipe.name, "fingerprint": whole, "settings": settings}
            results = self.run_dir.finish({**head, **results}, [STORE, ENDS, "tokens-*.bin", "tokenizer/*"])
        self.run_dir.drop_stages()
        return results

    def _results(self, inputs: Facts, settings: Facts) -> Facts:
        of_files = [inputs, [list(paths.values()) for paths in self.files.values()], settings["reading"], self.tokenizer_fingerprint]
        encoded = self.run_dir.stage("encode", [*of_files, SHARD_TOKENS], self._encode, on_change="redo")
        order = self.run_dir.stage("order", [encoded.fingerprint, settings], lambda out: self._order(out, encoded), on_change="redo")
        written = self.run_dir.stage("write", [order.fingerprint], lambda out: self._write(out, encoded, order), on_change="redo")
        stages, names = (encoded, order, written), ("name", "fingerprint", "seconds", "peak_mib")
        of_sources = zip(order.summary["sources"], encoded.summary["sources"], strict=True)
        return {
            **{name: written.summary[name] for name in ("tokens", "documents", "shards", "tokenizer")},
            "sources": [{**source, **{name: facts[name] for name in facts if name != "shards"}} for source, facts in of_sources],
            "phases": order.summary["phases"],
            "seconds": round(sum(stage.summary["seconds"] for stage in stages), 2),
            "stages": [{"folder": stage.folder.name, **{name: stage.summary[name] for name in names}} for stage in stages],
        }

    def _tasks(self, name: str, tasks: Sequence[Task]) -> list[Facts]:
        return executor.run_tasks(self.executor, tasks, self.run_dir.progress, name)

    def _encode(self, folder: Path) -> Facts:
        """Every file once: of each source its shards (stem and number of documents), and what was met on the way."""
        tasks: list[Task] = []
        reading, tokenizer = self.recipe.reading, self.recipe.tokenizer
        for path, name in chain.from_iterable(paths.items() for paths in self.files.values()):
            out = folder / make_id(str(path), name)
            arguments = (path, name, out, tokenizer, self.tokenizer_fingerprint, self.tokenizer.eos_id, reading, SHARD_TOKENS)
            tasks.append(Task(encode, arguments, out.with_suffix(".json")))
        different = {task.marker: task for task in tasks}  # a file may stand in two sources
        found = dict(zip(different, self._tasks("files", list(different.values())), strict=True))
        done = iter([found[task.marker] for task in tasks])
        sources = []
        for paths in self.files.values():
            mine = [next(done) for _ in paths]
            summed = {name: sum(one[name] for one in mine) for name in ("empty", "num_skipped")}
            skipped = [entry for one in mine for entry in one["skipped"]][:MAX_SKIPPED]
            shards = [shard for one in mine for shard in one["shards"]]
            exact = any(one["exact"] for one in mine)
            sources.append({"files": len(mine), **summed, "skipped": skipped, "exact": exact, "shards": shards})
        return {"sources": sources, "peak_mib": max(one["peak_mib"] for one in found.values())}

    def _order(self, folder: Path, encoded: Stage) -> Facts:
        """Which document comes when, into `order.npy` and `ends.npy`."""
        lengths = []
        for source in encoded.summary["sources"]:
            stems = [encoded.folder / shard["stem"] for shard in source["shards"]]
            lengths.append(np.concatenate([np.empty(0, np.int64), *(np.diff(np.load(f"{stem}.npy"), prepend=0) for stem in stems)]))
        order, phases, sources = draw(self.recipe, lengths)
        _save(folder / ORDER, order)
        _save(folder / ENDS, np.cumsum(np.concatenate(lengths)[order]))
        return {"phases": phases, "sources": sources}

    def _write(self, folder: Path, encoded: Stage, order: Stage) -> Facts:
        shards = [shard for source in encoded.summary["sources"] for shard in source["shards"]]
        stems = [encoded.folder / shard["stem"] for shard in shards]
        firsts_S = np.cumsum([0, *(shard["documents"] for shard in shards)])[:-1]
        order_file, ends_file = order.folder / ORDER, order.folder / ENDS
        ends = np.load(ends_file)
        tasks: list[Task] = []
        begin = 0
        while begin < len(ends):
            before = int(ends[begin - 1]) if begin else 0
            end = max(begin + 1, int(np.searchsorted(ends, before + SHARD_TOKENS, side="right")))
            name = f"tokens-{len(tasks):05d}"
            arguments = (stems, firsts_S, order_file, ends_file, begin, end, folder / f"{name}.bin")
            tasks.append(Task(gather, arguments, folder / f"{name}.json"))
            begin = end
        written = self._tasks("tokens", tasks)
        tokenizer = {
            "fingerprint": self.tokenizer_fingerprint,
            "eos_id": self.tokenizer.eos_id,
            "vocab_size": self.tokenizer.vocab_size,
        }
        store = {
            "tokens": int(ends[-1]),
            "documents": len(ends),
            "shards": [{name: one[name] for name in ("file", "documents", "tokens")} for one in written],
            "tokenizer": tokenizer,
        }
        self._publish([ends_file, *(folder / one["file"] for one in written)], store)
        return {**store, "peak_mib": max(one["peak_mib"] for one in written)}

    def _publish(self, made: Sequence[Path], store: Facts) -> None:
        """The files to their places, `blend.json` last: a folder without it is no blend. The stages keep them until the run has ended."""
        folder = self.run_dir.path
        (folder / STORE).unlink(missing_ok=True)
        for old in folder.glob("tokens-*.bin"):
            old.unlink()
        for path in made:
            target = folder / path.name
            target.unlink(missing_ok=True)
            target.hardlink_to(path)
        sync(folder)
        self.tokenizer.save(folder / "tokenizer")
        write_json(folder / STORE, {"name": self.recipe.name, **store})


def blend_lines(facts: Facts) -> list[str]:
    """What is in a blend, a line a source and one a phase."""
    lines = []
    for one in facts["sources"]:
        again = f", {one['repeats']:,} documents again" if one["repeats"] else ""
        lines.append(f"{one['name']:<14} {one['tokens']:>15,} tokens {one['share']:>6.1%}  {one['epochs']:.2f} epochs{again}")
    for number, phase in enumerate(facts["phases"], 1):
        shares = ", ".join(f"{one['name']} {one['share']:.1%}" for one in phase["sources"])
        lines.append(f"{f'phase {number}':<14} {phase['tokens']:>15,} tokens         {shares}")
    return [*lines, f"{'all':<14} {facts['tokens']:>15,} tokens in {facts['documents']:,} documents"]
