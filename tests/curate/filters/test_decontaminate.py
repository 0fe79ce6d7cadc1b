import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gristmill.core.errors import InputError
from gristmill.curate.filters.decontaminate import MAX_TOKENS, Benchmarks, Decontaminate, counts, decontaminate
from gristmill.curate.outcome import DOCUMENT, DROPPED, Outcome
from gristmill.curate.text.text_column import read_only
from gristmill.curate.text.words import FNV_OFFSET, buffers, lower_letters, tokenize

ITEM = "Anna, who sold 48 clips in April; sold half as many in May"  # 13 words
FILLER = "Some quite ordinary sentence follows here number {}. "


def documents(texts: list[str]) -> pa.Table:
    return pa.table([[f"d{i}" for i in range(len(texts))], texts, ["test"] * len(texts), ["{}"] * len(texts)], schema=DOCUMENT)


def benchmark(folder: Path, items: list[str]) -> Path:
    path = folder / "bench.jsonl"
    path.write_text("".join(json.dumps({"question": item}) + "\n" for item in items))
    return path


def run(folder: Path, texts: list[str], items: list[str], **values: object) -> Outcome:
    chosen = Decontaminate(benchmarks=[benchmark(folder, items)], **values)
    benchmarks = Benchmarks.read(chosen)
    table = documents(texts)
    return decontaminate(table, chosen, benchmarks, total_counts=counts(table, benchmarks))


def filler(size: int, first: int = 0) -> str:
    return "".join(FILLER.format(i) for i in range(first, first + size // len(FILLER) + 1))[:size]


def texts_of(outcome: Outcome) -> list[str]:
    return outcome.kept["text"].to_pylist()


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def test_a_benchmark_sentence_leaves_two_parts(tmp_path: Path) -> None:
    text = f"{filler(990)} {ITEM}. {filler(1007 - len(ITEM), 500)}"
    assert len(text) == 2000
    outcome = run(tmp_path, [text], [ITEM])
    assert outcome.kept["id"].to_pylist() == ["d0", "d0#2"]
    assert outcome.kept["source"].to_pylist() == ["test", "test"]
    first, second = texts_of(outcome)
    assert text.startswith(first) and text.endswith(second) and first.endswith(".")
    for part in (first, second):
        assert len(part) > 200 and "clips" not in part
    assert 600 < len(first) <= 800 and 600 < len(second) <= 800  # 200 characters, and on to the end of a sentence
    assert outcome.dropped.num_rows == 0 and outcome.counts == {"matches": 1, "cut": 1, "parts": 2}


def test_the_eleventh_occurrence_makes_an_ngram_common(tmp_path: Path) -> None:
    text = f"{filler(1000)} {ITEM}. {filler(1000, 500)}"
    assert len(texts_of(run(tmp_path, [text] * 10, [ITEM]))) == 20
    assert texts_of(run(tmp_path, [text] * 11, [ITEM])) == [text] * 11


def test_counts_add_up_over_tables(tmp_path: Path) -> None:
    benchmarks = Benchmarks.read(Decontaminate(benchmarks=[benchmark(tmp_path, [ITEM, " ".join(f"w{i}" for i in range(20))])]))
    table = documents([ITEM, f"{ITEM} {ITEM}", "", " ".join(f"w{i}" for i in range(5, 20))])
    whole = counts(table, benchmarks)
    assert whole.dtype == np.int64 and len(whole) == len(benchmarks) == 9 and whole.sum() == 3 + 3
    assert (counts(table.slice(0, 1), benchmarks) + counts(table.slice(1), benchmarks)).tolist() == whole.tolist()


@pytest.mark.parametrize("size", [7, 8, 12, 13, 14])
def test_short_items_are_one_ngram_and_shorter_ones_none(tmp_path: Path, size: int) -> None:
    item = " ".join(f"word{i}" for i in range(size))
    text = filler(1000) + item + ". " + filler(1000, 500)
    outcome = run(tmp_path, [text], [item, "x " * 13])
    assert len(texts_of(outcome)) == (1 if size < 8 else 2)
    # all but the last word of an item of one n-gram is no match
    almost = filler(1000) + item.rsplit(" ", 1)[0] + ". " + filler(1000, 500)
    assert len(texts_of(run(tmp_path, [almost], [item, "x " * 13]))) == (2 if size > 13 else 1)


def test_case_and_punctuation_do_not_matter_and_cuts_are_where_the_match_is(tmp_path: Path) -> None:
    # much punctuation and letters of several bytes before the match: offsets of a stripped text would be far off
    before = "«Ça», — “né” … (été)!!! " * 40
    shouted = "** " + " -- ".join(word.upper() for word in words(ITEM)) + " **"
    text = before + shouted + " Then. " + before
    (first, second) = texts_of(run(tmp_path, [text], [ITEM], margin=0, min_part=0))
    assert first == before.strip() and second == before.strip()


def test_no_end_of_sentence_cuts_to_the_end(tmp_path: Path) -> None:
    text = "First. " * 60 + "plain words " * 60 + ITEM + " plain words" * 60
    assert texts_of(run(tmp_path, [text], [ITEM])) == [("First. " * 60).strip()]


def test_parts_of_200_characters_are_discarded(tmp_path: Path) -> None:
    for size in (200, 201):
        part = "a" * (size - 1) + "."
        outcome = run(tmp_path, [f"{part} {'b' * 300} {ITEM} {'c' * 300}"], [ITEM])
        assert texts_of(outcome) == ([part] if size > 200 else [])
        if size == 200:  # nothing remains
            assert outcome.dropped.schema == DROPPED
            row = outcome.dropped.to_pylist()[0]
            assert (row["step"], row["reason"], row["figure"], row["limit"]) == ("decontaminate", "contaminated", 1.0, 10.0)


def test_more_than_ten_pieces_are_dropped(tmp_path: Path) -> None:
    items = [" ".join(f"q{k}x{i}" for i in range(13)) for k in range(10)]
    for cuts in (9, 10):
        text = filler(900) + "".join(f". {item}. {filler(900)}" for item in items[:cuts])
        outcome = run(tmp_path, ["kept", text, "too"], items)
        if cuts == 9:
            assert outcome.kept["id"].to_pylist() == ["d0", "d1", *(f"d1#{k}" for k in range(2, 11)), "d2"]
        else:
            assert texts_of(outcome) == ["kept", "too"]
            assert outcome.dropped.select(["id", "figure", "limit"]).to_pylist() == [{"id": "d1", "figure": 11.0, "limit": 10.0}]


def test_a_long_item_is_cut_out_whole(tmp_path: Path) -> None:
    item = " ".join(f"word{i}" for i in range(300))  # far longer than the margin
    text = filler(1000) + ". " + item + ". " + filler(1000, 500)
    outcome = run(tmp_path, [text], [item])
    assert len(texts_of(outcome)) == 2 and not any("word" in part for part in texts_of(outcome))


def test_empty_and_tiny_documents_and_slices(tmp_path: Path) -> None:
    texts = ["", "a", "one line", "\n", "."]
    outcome = run(tmp_path, texts, [ITEM])
    assert texts_of(outcome) == texts and outcome.kept.schema == DOCUMENT
    assert run(tmp_path, [], [ITEM]).kept.num_rows == 0
    chosen = Decontaminate(benchmarks=[benchmark(tmp_path, [ITEM])])
    benchmarks = Benchmarks.read(chosen)
    table = documents(["x" * 50, f"{filler(500)} {ITEM}. {filler(500)}", "", "end"])
    pieces = pa.concat_tables([table.slice(1, 1), table.slice(2)])  # several chunks, none at the start of its buffer
    outcome = decontaminate(pieces, chosen, benchmarks, total_counts=counts(pieces, benchmarks))
    assert outcome.kept["id"].to_pylist() == ["d1", "d1#2", "d2", "d3"] and texts_of(outcome)[2:] == ["", "end"]
    assert outcome.kept.schema == DOCUMENT


SMALL = st.lists(st.sampled_from(["a", "b", "A", "é", "É", "1", "Ω", "中", ".", ",", " ", "!", "ab-cd"]), max_size=40).map(" ".join)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(SMALL, min_size=1, max_size=4), st.lists(SMALL, max_size=4), st.integers(2, 5), st.integers(1, 5))
def test_the_same_matches_as_by_definition(tmp_path: Path, items: list[str], texts: list[str], ngram: int, min_words: int) -> None:
    grams: set[tuple[str, ...]] = set()
    for item in items:
        of_item = words(item)
        if len(of_item) >= min(min_words, ngram):
            size = min(len(of_item), ngram)
            grams |= {tuple(of_item[i : i + size]) for i in range(len(of_item) - size + 1)}
    chosen = Decontaminate(
        benchmarks=[benchmark(tmp_path, items)], ngram=ngram, min_words=min_words, margin=0, min_part=0, max_matches=10**6
    )
    if not grams:
        with pytest.raises(InputError, match="no text of"):
            Benchmarks.read(chosen)
        return
    benchmarks = Benchmarks.read(chosen)
    table = documents(texts)
    want: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        of_text = words(text)
        for size in {len(gram) for gram in grams}:
            want.update(gram for i in range(len(of_text) - size + 1) if (gram := tuple(of_text[i : i + size])) in grams)
    found = counts(table, benchmarks)
    assert len(found) == len(grams) and sorted(found[found > 0].tolist()) == sorted(want.values())
    clean = decontaminate(table, chosen, benchmarks, total_counts=found)
    assert counts(clean.kept, benchmarks).sum() == 0  # nothing of the benchmark remains
    names = {name.split("#")[0] for name in clean.kept["id"].to_pylist()} | set(clean.dropped["id"].to_pylist())
    assert names == {f"d{i}" for i in range(len(texts))}


ASKED = {
    "zh": "磨坊里有五袋面粉，卖掉两袋，还剩几袋？",
    "th": "โรงสีมีแป้งห้าถุงขายไปสองถุงเหลือกี่ถุง",
    "hi": "चक्की में आटे की पाँच बोरियाँ थीं कितनी बचीं",
}


@pytest.mark.parametrize("language", ASKED)
def test_items_of_every_script_are_cut_out(tmp_path: Path, language: str) -> None:
    item = ASKED[language]
    outcome = run(
        tmp_path, [f"{filler(1000)}. {item} {filler(1000, 500)}", f"{filler(1000)}. {item[: len(item) // 3]} {filler(9)}"], [item]
    )
    first, rest, other = texts_of(outcome)
    assert item not in first + rest and item[: len(item) // 3] in other


def test_signs_are_part_of_an_item(tmp_path: Path) -> None:
    item = "if the first wheel makes a + b turns then the second one makes how many turns"
    texts = [f"{filler(1000)}. {text} {filler(1000, 500)}" for text in (item, item.replace("+", "-"), item.replace("a + b", "a+b"))]
    kept = texts_of(run(tmp_path, texts, [item]))
    assert len(kept) == 5 and sum("turns" in text for text in kept) == 1


PIECES = ["a", "b", "1", " + ", " - ", "=\u0338", "\u0301", "\u8a9e", "\u0e01", " ", ", "]
SIGNS = st.lists(st.sampled_from(PIECES), max_size=24).map("".join)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(SIGNS, min_size=1, max_size=4), st.lists(SIGNS, max_size=4), st.integers(2, 5))
def test_the_same_matches_of_words_and_signs_as_by_definition(tmp_path: Path, items: list[str], texts: list[str], ngram: int) -> None:
    def tokens(text: str) -> list[tuple[int, int, bool]]:
        """Hash, thirds of a word, and whether letters are in it."""
        data = read_only(np.frombuffer(text.encode(), np.uint8))
        hash_W, start_W, stop_W = buffers(np.array([0, len(data)]))
        num = tokenize(data, 0, len(data), lower_letters(), FNV_OFFSET, hash_W, start_W, stop_W)
        found = [(int(hash_W[w]), bytes(data[start_W[w] : stop_W[w]]).decode()) for w in range(num)]
        thirds = [1 if word[0] == "\u0e01" else 0 if word[0] in "+-=" else 3 for _, word in found]
        return [(h, third, bool(third and word.strip("\u0301\u0338"))) for (h, word), third in zip(found, thirds, strict=True)]

    def grams(text: str, lengths: set[int]) -> list[tuple[int, tuple[int, ...]]]:
        out, of_text = set(), tokens(text)
        for length in lengths:
            for first in range(len(of_text)):
                stop = next((k for k in range(first, len(of_text) + 1) if sum(t[1] for t in of_text[first:k]) >= length), 0)
                part = of_text[first:stop]
                if part and part[0][1] and len(part) <= MAX_TOKENS * ngram and any(t[2] for t in part):
                    out.add((first, tuple(t[0] for t in part)))
        return sorted(out)

    known: set[tuple[int, ...]] = set()
    lengths = set()
    for item in items:
        if (whole := sum(t[1] for t in tokens(item))) >= 3:
            lengths.add(min(whole, 3 * ngram))
            known |= {gram for _, gram in grams(item, {min(whole, 3 * ngram)})}
    chosen = Decontaminate(benchmarks=[benchmark(tmp_path, items)], ngram=ngram, min_words=1)
    if known:
        want = Counter(gram for text in texts for _, gram in grams(text, lengths) if gram in known)
        found = counts(documents(texts), Benchmarks.read(chosen))
        assert len(found) == len(known) and sorted(found[found > 0].tolist()) == sorted(want.values())


def test_files_of_every_kind_and_fields(tmp_path: Path) -> None:
    row = {
        "question": ITEM,
        "choices": [" ".join(f"c{i}" for i in range(9)), "short"],
        "nested": {"a": " ".join(f"n{i}" for i in range(14))},
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "b.json").write_text(json.dumps([row]))
    (tmp_path / "c.json").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    (tmp_path / "d.txt").write_text(f"{ITEM}\n{row['choices'][0]}\n\n{row['nested']['a']}\n")
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "e.parquet")
    want = Benchmarks.read(Decontaminate(benchmarks=[tmp_path / "a.jsonl"])).grams_G.tolist()
    assert len(want) == 1 + 1 + 2
    for name in ("b.json", "c.json", "d.txt", "e.parquet"):
        assert Benchmarks.read(Decontaminate(benchmarks=[tmp_path / name])).grams_G.tolist() == want, name
    assert len(Benchmarks.read(Decontaminate(benchmarks=[tmp_path / "b.json"], fields=["question", "choices"]))) == 2


def test_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"a": 1}\n{"b":\n')
    (tmp_path / "latin.txt").write_bytes("été".encode("latin-1"))
    (tmp_path / "latin.json").write_bytes('["été"]'.encode("latin-1"))
    (tmp_path / "not.parquet").write_bytes(b"nothing")
    (tmp_path / "other.csv").write_text("a,b\n")
    for name in ("missing.jsonl", "broken.jsonl", "latin.txt", "latin.json", "not.parquet", "other.csv", "."):
        with pytest.raises(InputError, match=re.escape(str(tmp_path / name))):
            Benchmarks.read(Decontaminate(benchmarks=[tmp_path / name]))
    with pytest.raises(InputError, match="no field 'prompt': its fields are question"):
        Benchmarks.read(Decontaminate(benchmarks=[benchmark(tmp_path, [ITEM])], fields=["prompt"]))
    with pytest.raises(InputError, match="no text of 8 words"):
        Benchmarks.read(Decontaminate(benchmarks=[benchmark(tmp_path, ["too short"])]))
