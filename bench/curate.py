"""Curation of what a machine has: each step alone, the whole pipeline, its memory, its recall; beside datatrove and datasketch.

    PYTHONPATH=src python bench/curate.py --megabytes 120
    PYTHONPATH=src python bench/curate.py --peers-python VENV/bin/python     # datatrove[processing] and datasketch, on a part of the same

The corpus is made from installed packages' sources and documentation, in a fixed order, with injected exact duplicates and with near ones
whose Jaccard similarity (word 5-grams, the words of `curate.minhash`) is computed from sets of strings. Steps are measured in one process
on one thread, after a warm-up that loads the kernels: MB of UTF-8 a CPU second. The pipeline is that of `recipes/folder.yaml` with
Gopher's rules, without and with language identification, in one process, files read and written and start-up included. Prints lines of
JSON; the last is the summary.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SUFFIXES = {".py", ".md", ".rst", ".txt", ".c", ".h", ".hpp", ".js", ".html", ".pyi"}
LARGEST = 200_000
TARGETS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
PEER_MEGABYTES = 4


# A small process that starts the one to be measured: a child's peak includes that of whoever forked it.
LAUNCH = """
import json, resource, subprocess, sys
status = subprocess.run(sys.argv[1:]).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"seconds": used.ru_utime + used.ru_stime, "peak_mib": used.ru_maxrss // 1024}))
sys.exit(status)
"""

# ---- the corpus ----


def files() -> Iterator[Path]:
    """Text files of this machine, in an order that looks random and is always the same."""
    roots = {Path(sysconfig.get_paths()["purelib"]), Path(sysconfig.get_paths()["stdlib"]), Path("/usr/share"), Path("/usr/lib/python3")}
    found = [path for root in sorted(roots) for path in root.rglob("*") if path.suffix in SUFFIXES]
    random.Random(0).shuffle(found := sorted(set(found)))
    for path in found:
        try:
            if path.is_file() and 200 < path.stat().st_size < LARGEST:
                yield path
        except OSError:
            continue


def shingles(text: str) -> set[str]:
    lowered = "".join(c.lower() if ord(c) < 128 else c for c in text)
    words = [word for word in "".join(c if ord(c) > 127 or c.isalnum() else " " for c in lowered).split(" ") if word]
    return {" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4))} if words else set()


def changed(draw: random.Random, text: str, target: float) -> str:
    """A near duplicate: a run of words in the middle is others, so many that about `target` of the shingles are shared."""
    pieces = re.split(r"(\s+)", text)
    words = len(pieces) // 2 + 1
    count = max(1, round(words * (1 - target) / (1 + target)))
    begin = draw.randint(0, max(0, words - count))
    for i in range(begin, min(words, begin + count)):
        pieces[2 * i] = f"q{draw.randrange(10**9)}"
    return "".join(pieces)


def make_corpus(folder: Path, megabytes: int) -> dict[str, Any]:
    """JSONL files of about 16 MB each, and the truth about what was injected: pairs with their similarity, and exact copies."""
    draw = random.Random(0)
    size, number, near, exact = 0, 0, [], 0
    out = None
    seen: list[tuple[str, str]] = []

    def put(text: str) -> str:
        nonlocal size, number, out
        if out is None or out.tell() > 16_000_000:
            out = (folder / f"part-{size // 16_000_000:03d}-{number:06d}.jsonl").open("w", encoding="utf-8")
        name = f"doc{number:06d}"
        out.write(json.dumps({"id": name, "text": text}, ensure_ascii=False) + "\n")
        size += len(text.encode())
        number += 1
        return name

    for path in files():
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if "\0" in text:
            continue
        name = put(text)
        if len(text.split()) > 200:
            seen.append((name, text))
        if seen and number % 40 == 0:
            exact += 1
            put(draw.choice(seen)[1])
        if seen and number % 25 == 0:
            name, text = draw.choice(seen)
            copy = changed(draw, text, draw.choice(TARGETS))
            left, right = shingles(text), shingles(copy)
            near.append((name, put(copy), len(left & right) / len(left | right)))
        if size > megabytes * 1_000_000:
            break
    assert out is not None
    out.close()
    return {"bytes": size, "documents": number, "near": near, "exact": exact}


# ---- steps alone ----


def tables(folder: Path, megabytes: float = 1e9) -> list[Any]:
    from gristmill.curate.io import readers

    found, size = [], 0
    for path in readers.list_files([folder]):
        for table in readers.read(path, readers.Reading(), lambda where, why: None):
            found.append(table)
            size += table["text"].nbytes
            if size > megabytes * 1e6:
                return found
    return found


def cpu(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def steps(folder: Path) -> dict[str, float]:
    """MB a CPU second of each step."""
    from gristmill.curate.dedup import duplicates, minhash
    from gristmill.curate.filters.decontaminate import Benchmarks, Decontaminate, counts, decontaminate
    from gristmill.curate.filters.heuristics import Filter, heuristics
    from gristmill.curate.filters.language import Language, language
    from gristmill.curate.io import shards
    from gristmill.curate.text import text_metrics
    from gristmill.curate.text.text_column import TextColumn
    from gristmill.curate.transforms.clean import Clean, clean
    from gristmill.curate.transforms.pii import Pii, pii

    all_tables = tables(folder)
    small = all_tables[:1]
    benchmark = folder.parent / "benchmark.jsonl"
    benchmark.write_text(
        "".join(json.dumps({"question": f"item {i} " + " ".join(f"word{i * 7 + k}" for k in range(30))}) + "\n" for i in range(2000))
    )
    contaminated = Decontaminate(benchmarks=[benchmark])
    known = Benchmarks.read(contaminated)

    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    for i, table in enumerate(all_tables):
        shards.write(scratch / f"{i}.arrow", table)

    def exact(some: list[Any]) -> None:
        for i in range(len(some)):
            duplicates.exact_keys(i, scratch / f"{i}.arrow", scratch / f"k{i}.arrow", 1)
        duplicates.exact_groups(0, [scratch / f"k{i}.arrow" for i in range(len(some))], scratch / "d.arrow", len(some))

    def signatures(some: list[Any], words: bool, size: int, hashes: int) -> None:
        for table in some:
            minhash.signatures(TextColumn.of(table["text"]), words, size, num_hashes=hashes)

    def decontamination(some: list[Any]) -> None:
        total = sum(counts(table, known) for table in some)
        for table in some:
            decontaminate(table, contaminated, known, total_counts=total)

    calls: dict[str, Callable[[list[Any]], object]] = {
        "minhash, words, 260": lambda some: signatures(some, True, 5, 260),
        "minhash, words, 112": lambda some: signatures(some, True, 5, 112),
        "minhash, characters, 260": lambda some: signatures(some, False, 24, 260),
        "heuristics": lambda some: [heuristics(table, Filter()) for table in some],
        "heuristics, metrics alone": lambda some: [text_metrics.compute(TextColumn.of(table["text"])) for table in some],
        "exact": exact,
        "clean": lambda some: [clean(table, Clean()) for table in some],
        "pii": lambda some: [pii(table, Pii()) for table in some],
        "decontaminate": decontamination,
        "language": lambda some: [language(table, Language()) for table in some],
    }
    size = sum(TextColumn.of(table["text"]).sizes_N.sum() for table in all_tables) / 1e6
    out = {}
    for name, call in calls.items():
        call(small)
        out[name] = round(float(size) / cpu(lambda call=call: call(all_tables)), 1)  # type: ignore[misc]
    return out


# ---- the whole ----


def pipeline(folder: Path, out: Path, with_language: bool) -> dict[str, Any]:
    """The shipped recipe in a process of its own."""
    recipe = {
        "name": "bench",
        "inputs": [str(folder)],
        "workers": 1,
        "steps": [
            {"step": "clean"},
            *([{"step": "language"}] if with_language else []),
            {"step": "filter", "rules": "gopher"},
            {"step": "exact"},
            {"step": "fuzzy"},
            {"step": "pii"},
        ],
    }
    path = out.parent / f"{out.name}.yaml"
    path.write_text(json.dumps(recipe))
    started = time.perf_counter()
    command = [sys.executable, "-m", "gristmill.cli", "curate", str(path), "--out", str(out), "--quiet", "--json"]
    done = subprocess.run([sys.executable, "-c", LAUNCH, *command], capture_output=True, text=True, check=True)
    funnel, usage = map(json.loads, done.stdout.splitlines())
    seconds = usage["seconds"]
    return {
        "mb_per_cpu_s": round(funnel["read"]["bytes"] / 1e6 / seconds, 1),
        "cpu_s": round(seconds, 1),
        "wall_s": round(time.perf_counter() - started, 1),
        "peak_mib": usage["peak_mib"],
        "documents": [funnel["read"]["documents"], *[step["documents_out"] for step in funnel["steps"]]],
    }


def recall(folder: Path, out: Path, truth: dict[str, Any], verify: str) -> dict[str, Any]:
    """Exact and fuzzy alone: which injected near duplicates lose one of the two, and is what is dropped near what it is dropped for."""
    path = out.parent / f"{out.name}.yaml"
    steps_ = [{"step": "exact"}, {"step": "fuzzy", "verify": verify}]
    path.write_text(json.dumps({"name": "recall", "inputs": [str(folder)], "workers": 1, "steps": steps_}))
    command = [sys.executable, "-m", "gristmill.cli", "curate", str(path), "--out", str(out), "--quiet", "--json"]
    funnel = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    import pyarrow.parquet as pq

    dropped = {row["id"]: row for file in sorted((out / "dropped").iterdir()) for row in pq.read_table(file).to_pylist()}
    texts = {
        row["id"]: row["text"]
        for file in sorted((out / "data").iterdir())
        for row in pq.read_table(file, columns=["id", "text"]).to_pylist()
    }
    by_similarity = {}
    for low, high in zip((0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95), (0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.01), strict=True):
        pairs = [(a, b) for a, b, j in truth["near"] if low <= j < high]
        lost = sum(a in dropped or b in dropped for a, b in pairs)
        by_similarity[f"{low}-{min(high, 1):.2f}"] = f"{lost}/{len(pairs)}"
    near = [row for row in dropped.values() if row["step"] == "fuzzy"]
    sample = random.Random(0).sample(near, min(400, len(near)))
    right = 0
    for row in sample:
        kept = texts.get(row["reason"].split()[-1])
        left, other = shingles(row["text"]), shingles(kept or "")
        right += len(left & other) / max(1, len(left | other)) >= 0.7
    exact = sum(row["step"] == "exact" for row in dropped.values())
    return {
        "exact_dropped": exact,
        "exact_injected": truth["exact"],
        "fuzzy_dropped": len(near),
        "documents": funnel["documents"],
        "injected_near_lost_by_similarity": by_similarity,
        "precision_at_0.7": f"{right}/{len(sample)}",
    }


# ---- peers ----


def peers(folder: Path) -> dict[str, float]:
    """datatrove's and datasketch's MinHash on whitespace words, and datatrove's filters, on a few megabytes of the corpus."""
    texts: list[str] = []
    size = 0
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.open(encoding="utf-8"):
            texts.append(json.loads(line)["text"])
            size += len(texts[-1].encode())
            if size > PEER_MEGABYTES * 1e6:
                break
        if size > PEER_MEGABYTES * 1e6:
            break
    from datasketch import MinHash
    from datatrove.data import Document
    from datatrove.pipeline.dedup import minhash as dedup
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.pipeline.filters import C4QualityFilter, FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
    from datatrove.utils import word_tokenizers
    from datatrove.utils.hashing import HashConfig

    class Whitespace(word_tokenizers.WordTokenizer):
        """Instead of spaCy's, which takes ten times as long."""

        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        def sent_tokenize(self, text: str) -> list[str]:
            return re.split(r"(?<=[.!?])\s+", text)

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [match.span() for match in re.finditer(r"\S+", text)]

    words = Whitespace()
    word_tokenizers.load_word_tokenizer = dedup.load_word_tokenizer = lambda *_: words
    out: dict[str, float] = {}
    for num, bands, rows in ((260, 20, 13), (112, 14, 8)):

        def sketch(num: int = num) -> None:
            for text in texts:
                parts = text.split()
                one = MinHash(num_perm=num)
                one.update_batch([" ".join(parts[i : i + 5]).encode() for i in range(max(1, len(parts) - 4))])

        out[f"datasketch minhash {num}"] = round(size / 1e6 / cpu(sketch), 2)
        config = MinhashConfig(hash_config=HashConfig(precision=32), num_buckets=bands, hashes_per_bucket=rows)
        signature = MinhashDedupSignature(output_folder=tempfile.mkdtemp(), config=config)

        def datatrove(signature: Any = signature) -> None:
            for text in texts:
                shingles_ = signature.get_shingles(text)
                if shingles_.size:
                    signature.get_signature(shingles_)

        out[f"datatrove minhash {num}"] = round(size / 1e6 / cpu(datatrove), 2)
    filters = [kind() for kind in (GopherQualityFilter, GopherRepetitionFilter, C4QualityFilter, FineWebQualityFilter)]

    def heuristics() -> None:
        for i, text in enumerate(texts):
            for one in filters:
                one.filter(Document(text=text, id=str(i), metadata={}))

    out["datatrove gopher, c4 and fineweb filters"] = round(size / 1e6 / cpu(heuristics), 2)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=120)
    parser.add_argument("--peers-python", help="interpreter of an environment with datatrove[processing] and datasketch")
    parser.add_argument("--peers", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peers:
        return print(json.dumps(peers(args.peers)))
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "corpus"
        folder.mkdir()
        truth = make_corpus(folder, args.megabytes)
        summary: dict[str, Any] = {"corpus": {"mb": round(truth["bytes"] / 1e6, 1), "documents": truth["documents"]}}

        def note(name: str, found: Any) -> None:
            summary[name] = found
            print(json.dumps({name: found}), flush=True)

        note("steps", steps(folder))
        note("pipeline", pipeline(folder, Path(scratch) / "plain", False))
        note("pipeline with language", pipeline(folder, Path(scratch) / "language", True))
        half = Path(scratch) / "half"
        half.mkdir()
        for path in sorted(folder.iterdir())[::2]:
            (half / path.name).symlink_to(path)
        note("pipeline, half the corpus", pipeline(half, Path(scratch) / "halved", False))
        note("duplicates", recall(folder, Path(scratch) / "recall", truth, "exact"))
        if args.peers_python:
            done = subprocess.run([args.peers_python, __file__, "--peers", str(folder)], stdout=subprocess.PIPE, text=True, check=True)
            note("peers", json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps({"summary": summary}))


if __name__ == "__main__":
    main()
