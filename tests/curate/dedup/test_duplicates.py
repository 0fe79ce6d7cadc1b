"""Exact and near duplicates: signatures by their theory, and whole chains of tasks by their truth."""

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.curate.dedup import duplicates, minhash
from gristmill.curate.dedup.duplicates import Fuzzy
from gristmill.curate.io import shards
from gristmill.data.minhash import jaccard

words = st.lists(st.sampled_from(["a", "Bc", "naïve", "xy", "語", ",", "  ", "\n", "."]), max_size=30).map(" ".join)


def as_bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


def plain_shingles(text: str, of_words: bool, size: int) -> set[str]:
    """What the kernel hashes, as strings."""
    kept = "".join(c.lower() if ord(c) < 128 else c for c in text)
    parts = "".join(c if ord(c) > 127 or c.isalnum() else " " for c in kept).split(" ")
    found = [part for part in parts if part]
    if of_words:
        return {" ".join(found[i : i + size]) for i in range(max(1, len(found) - size + 1))} if found else set()
    joined = " ".join(found)
    return {joined[i : i + size] for i in range(max(1, len(joined) - size + 1))} if joined else set()


@given(words, words, st.booleans(), st.integers(1, 6))
def test_jaccard_is_that_of_the_sets(left: str, right: str, of_words: bool, size: int) -> None:
    sets = [plain_shingles(text, of_words, size) for text in (left, right)]
    hashed = [minhash.shingle_set(as_bytes(text), of_words, size) for text in (left, right)]
    assert [len(s) for s in hashed] == [len(s) for s in sets]
    union = sets[0] | sets[1]
    assert jaccard(*hashed) == pytest.approx(len(sets[0] & sets[1]) / len(union) if union else 0.0)


REST = " while the children of the village watched from the wall and sang what their mothers had taught them on long winter evenings"


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("3 + 4", "3 - 4"),
        ("we wrote it in C++", "we wrote it in C#"),
        ("a < b", "a > b"),
        ("12 sacks", "13 sacks"),
        ("three sacks", "four sacks"),
        ("$5", "5"),
        ("1.5 pounds", "1,5 pounds"),
        ("(a + b) * c", "a + (b * c)"),
        ("x \u2264 y", "x \u2265 y"),
        ("x\u00b2", "x\u00b3"),
        ("\u4e09\u888b", "\u56db\u888b"),
        ("width - height", "width * height"),
    ],
)
def test_short_texts_of_other_signs_or_numbers_are_no_duplicates(left: str, right: str) -> None:
    for of_words, size in ((True, 5), (False, 24)):
        a, b, same = (minhash.shingle_set(as_bytes(text), of_words, size) for text in (left + REST, right + REST, f"{left},{REST}."))
        assert jaccard(a, b) == 0 and jaccard(a, same) > 0.85


def test_long_texts_of_other_numbers_are_duplicates() -> None:
    long = " ".join(["and", *text_of(random.Random(2), minhash.MAX_SHORT)])
    a, b = (minhash.shingle_set(as_bytes(f"{number} sacks {long}"), True, 5) for number in (12, 13))
    assert 0.9 < jaccard(a, b) < 1


# ---- chains of tasks ----


def stored(folder: Path, texts: list[list[str]]) -> list[Path]:
    paths = []
    for i, column in enumerate(texts):
        table = pa.table({"id": [f"d{i}.{j}" for j in range(len(column))], "text": pa.array(column, pa.large_string())})
        table = table.append_column("source", pa.array([""] * len(column))).append_column("meta", pa.array(["{}"] * len(column)))
        paths.append(folder / f"s{i}.arrow")
        shards.write(paths[-1], table)
    return paths


def fuzzy_drops(folder: Path, sources: list[Path], how: Fuzzy, parts: int) -> list[dict[str, str | float]]:
    """The chain, as `run` strings it together."""
    num = len(sources)

    def paths(name: str, count: int) -> list[Path]:
        return [folder / f"{name}{i}.arrow" for i in range(count)]

    keys, signatures, found = paths("key", num), paths("sig", num), paths("pair", parts)
    verified, drops, cluster = paths("ver", num), paths("drop", num), folder / "cluster.arrow"
    for i in range(num):
        duplicates.sketch(i, sources[i], keys[i], signatures[i], parts, how)
    for p in range(parts):
        duplicates.pairs(p, keys, found[p], num)
    for i in range(num):
        duplicates.verify(i, found, sources, signatures, verified[i], how)
    duplicates.clusters(verified, cluster, num)
    for p in range(num):
        duplicates.resolve_clusters(p, cluster, sources, signatures, drops[p], how)
    return [row for i in range(num) for row in duplicates.drop(i, sources, drops, "fuzzy", how.threshold).dropped.to_pylist()]


def text_of(draw: random.Random, length: int = 120) -> list[str]:
    return [f"w{draw.randrange(5000)}" for _ in range(length)]


@pytest.mark.parametrize("verify", ["exact", "estimate"])
@pytest.mark.parametrize("parts", [1, 3])
def test_near_duplicates_are_found_across_shards(tmp_path: Path, verify: str, parts: int) -> None:
    draw = random.Random(0)
    bases = [text_of(draw) for _ in range(30)]
    near = [[*base[:-4], *text_of(draw, 3)] for base in bases[:12]]  # J about .9, one word shorter
    far = [[*base[:60], *text_of(draw, 60)] for base in bases[12:20]]  # J about .3
    columns: list[list[str]] = [[], [], []]
    truth = set()
    for i, one in enumerate([*bases, *near, *far]):
        columns[i % 3].append(" ".join(one))
        if 30 <= i < 42:
            truth.add(f"d{i % 3}.{len(columns[i % 3]) - 1}")
    sources = stored(tmp_path, columns)
    gone = fuzzy_drops(tmp_path, sources, Fuzzy(verify=verify), parts)
    assert {row["id"] for row in gone} == truth
    assert all(row["figure"] >= 0.7 and str(row["reason"]).startswith("near duplicate of d") for row in gone)


def test_a_chain_does_not_pull_down_what_is_unlike(tmp_path: Path) -> None:
    draw = random.Random(1)
    chain = [text_of(draw, 200)]
    for _ in range(8):  # each like the one before it, the last not like the first
        chain.append([*chain[-1][15:], *text_of(draw, 15)])
    how = Fuzzy(bands=60, rows=4)
    sources = stored(tmp_path, [[" ".join(one) for one in chain]])
    gone = {str(row["id"]): str(row["reason"]).split()[-1] for row in fuzzy_drops(tmp_path, sources, how, 1)}
    sets = {f"d0.{i}": minhash.shingle_set(as_bytes(" ".join(one)), True, 5) for i, one in enumerate(chain)}
    kept = [name for name in sets if name not in gone]
    assert len(kept) > 1 and gone
    assert all(keeper in kept and jaccard(sets[name], sets[keeper]) >= 0.7 for name, keeper in gone.items())
    assert all(jaccard(sets[a], sets[b]) < 0.7 for a in kept for b in kept if a < b)


@given(st.lists(st.lists(st.sampled_from(["", "a", "b", "ab", "語"]), min_size=1, max_size=6), min_size=1, max_size=4), st.integers(1, 3))
def test_exact_keeps_the_first_of_each(tmp_path_factory: pytest.TempPathFactory, texts: list[list[str]], parts: int) -> None:
    folder = tmp_path_factory.mktemp("exact")
    sources = stored(folder, texts)
    keys, drops = [folder / f"k{i}" for i in range(len(texts))], [folder / f"g{p}" for p in range(parts)]
    for i, source in enumerate(sources):
        duplicates.exact_keys(i, source, keys[i], parts)
    for p in range(parts):
        duplicates.exact_groups(p, keys, drops[p], len(texts))
    outcomes = [duplicates.drop(i, sources, drops, "exact", 1.0) for i in range(len(texts))]
    kept = [text for outcome in outcomes for text in outcome.kept["text"].to_pylist()]
    assert kept == list(dict.fromkeys(text for column in texts for text in column))
    for outcome in outcomes:
        for row in outcome.dropped.to_pylist():
            shard, place = map(int, row["reason"].removeprefix("same text as d").split("."))
            assert texts[shard][place] == row["text"]
