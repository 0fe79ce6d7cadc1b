"""Ten megabytes of the worst: the pipeline ends, names what it skipped, keeps what is good, and stays within memory."""

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

# A small process that starts the one to be measured: a child's peak includes that of whoever forked it.
LAUNCH = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""
STEPS = ["clean", "language", "filter", "exact", "fuzzy", "pii"]


def prose(draw: random.Random) -> str:
    words = ["the", "river", "and", "a", "boat", "that", "people", "of", "our", "have", "with", "them", "to", "sail", "be", "old"]
    return "\n".join(" ".join(draw.choices(words, k=14)).capitalize() + "." for _ in range(12))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    draw = random.Random(0)
    good = [json.dumps({"id": f"good{i}", "text": prose(draw)}) for i in range(40)]
    lines = [line.encode() for line in good]
    lines += [
        b'{"id": "bytes", "text": "' + bytes([0xFF, 0xFE, 0xC3]) * 500 + b'"}',
        b'{"id": "surrogate", "text": "\\ud800 ' + b"x " * 300 + b'"}',
        b'{"id": "nul", "text": "' + b"\\u0000" * 5000 + b'"}',
        b'{"text": 3}',
        b"[1, 2]",
        b"not json at all",
        b'{"text": ' * 20_000,
        b'{"id": "empty", "text": ""}',
        b'{"id": "blank", "text": " \\n\\t "}',
        b'{"id": "spaces", "text": "' + b" " * 1_000_000 + b'"}',
        b'{"id": "word", "text": "' + b"a" * 2_000_000 + b'"}',
        b'{"id": "same", "text": "' + b"again " * 200_000 + b'"}',
        b'{"id": "digits", "text": "' + b"4111 " * 200_000 + b'"}',
        b'{"id": "ats", "text": "' + b"@" * 500_000 + b'"}',
        b'{"id": "tags", "text": "' + b"<b<b<br>" * 50_000 + b'"}',
        *[b'{"id": "twin", "text": "' + prose(draw).replace("\n", "\\n").encode() + b'"}' for _ in range(2)],
    ]
    (folder / "lines.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (folder / "bomb.jsonl.gz").write_bytes(gzip.compress(b'{"id": "bomb", "text": "' + b"0" * 60_000_000 + b'"}'))
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress("\n".join(good).encode())[:-20])
    (folder / "deep.html").write_text("<div>" * 100_000 + "deep")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "damaged.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    (folder / "picture.bin").write_bytes(bytes(range(256)) * 100)
    with (folder / "long.jsonl").open("wb") as file:  # a line of 50 MB
        file.write(b'{"id": "long", "text": "' + b"x" * 50_000_000 + b'"}\n')
        file.write(good[0].replace("good0", "after").replace("river", "brook").encode() + b"\n")
    return folder


def test_it_ends_and_names_what_it_skipped(hostile: Path, tmp_path: Path) -> None:
    recipe = {
        "name": "hostile",
        "inputs": [str(hostile)],
        "workers": 1,
        "reading": {"max_document_bytes": 8 << 20, "max_expansion": 100},
        "steps": [{"step": step, **({"rules": "gopher"} if step == "filter" else {})} for step in STEPS],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [
        sys.executable,
        "-m",
        "gristmill.cli",
        "curate",
        str(tmp_path / "recipe.yaml"),
        "--out",
        str(tmp_path / "run"),
        "--quiet",
        "--json",
    ]
    done = subprocess.run([sys.executable, "-c", LAUNCH, *command], stdout=subprocess.PIPE, text=True, check=True)
    printed, peak = done.stdout.splitlines()
    funnel = json.loads(printed)
    skipped = dict(funnel["read"]["skipped"])
    for name in ("bomb.jsonl.gz", "deep.html", "empty.txt", "damaged.parquet", "picture.bin", "long.jsonl:1"):
        assert any(where.startswith(name) for where in skipped), name
    assert sum(where.startswith("lines.jsonl:") for where in skipped) >= 5
    kept = [row["id"] for path in sorted((tmp_path / "run" / "data").iterdir()) for row in pq.read_table(path).to_pylist()]
    assert {f"good{i}" for i in range(40)} <= set(kept) and kept.count("twin") == 2
    assert not {"empty", "blank", "spaces", "word", "nul", "bomb", "long"} & set(kept)
    assert int(peak) < 1 << 20, "KiB"
    assert "<script" not in (tmp_path / "run" / "report.html").read_text()
