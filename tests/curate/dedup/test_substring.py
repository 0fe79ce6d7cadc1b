"""Spans that recur are cut once too often never, and once too rarely never: whole chains of tasks against a slow plain version."""

import random
import re
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.curate.dedup import substring
from gristmill.curate.dedup.substring import Substring
from gristmill.curate.io import shards
from gristmill.curate.outcome import Outcome


def stored(folder: Path, texts: list[list[str]]) -> list[Path]:
    paths = []
    for i, column in enumerate(texts):
        table = pa.table({"id": [f"d{i}.{j}" for j in range(len(column))], "text": pa.array(column, pa.large_string())})
        table = table.append_column("source", pa.array([""] * len(column))).append_column("meta", pa.array(["{}"] * len(column)))
        paths.append(folder / f"s{i}.arrow")
        shards.write(paths[-1], table)
    return paths


def outcomes(folder: Path, texts: list[list[str]], how: Substring, parts: int = 1) -> list[Outcome]:
    """The chain, as `run` strings it together."""
    sources = stored(folder, texts)
    num = len(sources)

    def paths(name: str, count: int) -> list[Path]:
        return [folder / f"{name}{i}.arrow" for i in range(count)]

    keys, repeats, windows, own, ranges = paths("k", num), paths("r", parts), paths("w", num), paths("o", num), paths("m", parts)
    for i in range(num):
        substring.substring_keys(i, sources[i], keys[i], parts, how)
    for p in range(parts):
        substring.substring_repeats(p, keys, repeats[p])
    for i in range(num):
        substring.substring_windows(i, sources[i], repeats, windows[i], own[i], parts, how)
    for p in range(parts):
        substring.substring_matches(p, windows, ranges[p], num)
    return [substring.cut(i, sources[i], own[i], ranges, how) for i in range(num)]


def after(folder: Path, texts: list[list[str]], how: Substring, parts: int = 1) -> list[list[str]]:
    return [outcome.kept["text"].to_pylist() for outcome in outcomes(folder, texts, how, parts)]


def tokens(text: str) -> list[str]:
    return re.findall(r"語|[^\W_語]+|[^\w\s]|_", text)


def plainly(documents: list[str], n: int) -> list[list[str]]:
    """The rule, by what it says: tokens that stay."""
    split = [tokens(text) for text in documents]
    places: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    for d, one in enumerate(split):
        for i in range(len(one) - n + 1):
            places.setdefault(tuple(one[i : i + n]), []).append((d, i))
    goes = [[False] * len(one) for one in split]
    for firsts in (False, True):
        for found in places.values():
            for d, i in (found[:1] if len(found) > 1 else []) if firsts else found[1:]:
                goes[d][i : i + n] = [not firsts] * n
    left = []
    for one, gone in zip(split, goes, strict=True):
        runs = [match.span() for match in re.finditer("x+", "".join(".x"[g] for g in gone))]
        cut = {i for a, b in runs if b - a >= n for i in range(a, b)}
        left.append([token for i, token in enumerate(one) if i not in cut])
    return left


document = st.lists(st.sampled_from(["a", "a ", "bc ", "é", " ", "\n", ".", "-", "語 ", "4 ", "_", "𝒳 "]), max_size=40).map("".join)


@settings(max_examples=150)
@given(st.lists(st.lists(document, min_size=1, max_size=4), min_size=1, max_size=3), st.integers(1, 7), st.integers(1, 3))
def test_chain_is_the_plain_rule(tmp_path_factory: pytest.TempPathFactory, texts: list[list[str]], n: int, parts: int) -> None:
    before = [text for column in texts for text in column]
    left = [text for column in after(tmp_path_factory.mktemp("plain"), texts, Substring(tokens=n), parts) for text in column]
    assert [tokens(text) for text in left] == plainly(before, n)
    windows = [[tuple(one[i : i + n]) for one in map(tokens, column) for i in range(len(one) - n + 1)] for column in (before, left)]
    assert {w for w in windows[0] if windows[0].count(w) > 1} <= set(windows[1])  # nothing is lost with all its occurrences
    for old, new in zip(before, left, strict=True):
        if tokens(old) == tokens(new):
            assert old == new


def words(draw: random.Random, count: int) -> list[str]:
    return [f"w{draw.randrange(10**9)}" for _ in range(count)]


@pytest.mark.parametrize("parts", [1, 3])
def test_fifty_tokens_go_once_and_forty_nine_never(tmp_path: Path, parts: int) -> None:
    draw = random.Random(0)
    long, short = words(draw, 50), words(draw, 49)
    others = [words(draw, 80) for _ in range(12)]
    texts = [" ".join([*one[:30], *long, *one[30:50], *short, *one[50:]]) for one in others[:3]]
    columns = [[texts[0], " ".join(others[3])], [" ".join(others[4]), texts[1].replace(" ", "\n  ")], [texts[2], "", "x", " \n"]]
    first, second, third = after(tmp_path, columns, Substring(), parts)
    assert first == columns[0]
    assert second == [columns[1][0], "\n  ".join([*others[1][:50], *short, *others[1][50:]])]
    assert third == [" ".join([*others[2][:50], *short, *others[2][50:]]), "", "x", " \n"]


def test_repeats_in_one_document(tmp_path: Path) -> None:
    draw = random.Random(1)
    a, b, c = words(draw, 60), words(draw, 10), words(draw, 10)
    ((left, dashes, few),) = after(tmp_path, [[" ".join([*a, *b, *a, *c, *a]), "-" * 1000, "-" * 99]], Substring())
    assert left == " ".join([*a, *b, *c])
    assert (dashes, few) == ("-" * 50, "")  # the second has only what the first one keeps


def test_a_copy_grows_nothing_but_empty_and_a_limit_drops_it(tmp_path: Path) -> None:
    text = " ".join(words(random.Random(2), 70))
    columns = [[text, "an introduction: " + text], [text, "short"]]
    assert after(tmp_path, columns, Substring()) == [[text, "an introduction:"], ["", "short"]]
    found = outcomes(tmp_path, columns, Substring(min_left=20))
    assert [outcome.kept["text"].to_pylist() for outcome in found] == [[text], ["short"]]
    rows = [row for outcome in found for row in outcome.dropped.to_pylist()]
    assert [(row["id"], row["text"], row["reason"], row["figure"], row["limit"]) for row in rows] == [
        ("d0.1", columns[0][1], "substring", 16.0, 20.0),
        ("d1.0", text, "substring", 0.0, 20.0),
    ]
    assert [outcome.counts for outcome in found] == [
        {"documents cut": 1, "characters removed": len(text) + 1},
        {"documents cut": 1, "characters removed": len(text)},
    ]


def test_what_a_cut_brings_together_stays_parted(tmp_path: Path) -> None:
    block = "(" + ",".join(words(random.Random(3), 40)) + ")"
    assert after(tmp_path, [[block, "left" + block + "right"]], Substring()) == [[block, "left right"]]


def test_a_very_frequent_span_takes_linear_time(tmp_path: Path) -> None:
    line = " ".join(words(random.Random(4), 52))
    columns = [[f"{line} u{i}x{j}" for j in range(10_000)] for i in range(3)]
    left = after(tmp_path, columns, Substring(), 2)
    assert left[0][0] == columns[0][0]
    assert left[1] == [f"u1x{j}" for j in range(10_000)] and left[0][1:] == [f"u0x{j}" for j in range(1, 10_000)]
