"""Row sources: pages by key, filters, and items that know their rows again."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gristmill.core.errors import InputError
from gristmill.data.chat import Message
from gristmill.data.rows import Response, read_rows, write_rows
from gristmill.studio import sources as sources_module
from gristmill.studio.sources import Sources, cut
from gristmill.studio.store import Refused

ANSWERS = "01-answers/responses.parquet"


def test_a_runs_files_are_its_sources(sources: Sources) -> None:
    assert [(s.name, s.kind) for s in sources.all()] == [
        ("01-answers/prompts.parquet", "prompts"),
        (ANSWERS, "responses"),
        ("01-answers/pairs.parquet", "pairs"),
    ]
    assert sources.page("")["source"] == ANSWERS, "the last answers are what one begins with"
    with pytest.raises(Refused, match="no such file"):
        sources.page("../../etc/passwd")


@pytest.mark.parametrize("sort", ["", "-score", "score", "text"])
@pytest.mark.parametrize("filter", ["", "score > 1 and text ~ 'it is'"])
def test_pages_by_key_are_the_whole_list(sources: Sources, sort: str, filter: str) -> None:
    whole = sources.page(ANSWERS, filter=filter, sort=sort, num=200)
    found, after = [], -1
    while True:
        page = sources.page(ANSWERS, filter=filter, sort=sort, after=after, num=4)
        found += page["rows"]
        if not page["more"]:
            break
        after = page["rows"][-1]["place"]
    assert found == whole["rows"] and len(found) == whole["total"] == (9 if filter else 18)
    if sort.endswith("score"):
        scores = [row["facts"]["score"] for row in found]
        assert scores == sorted(scores, reverse=sort.startswith("-"))
    with pytest.raises(InputError, match="cannot be sorted"):
        sources.page(ANSWERS, sort="messages")


def test_a_row_has_its_turns_answers_and_siblings(sources: Sources) -> None:
    row = sources.row(ANSWERS, 16)
    assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant", "user"]
    assert row["answers"] == [{"label": "answer", "text": "Perhaps 10?"}] and row["facts"]["score"] == 5.1
    assert [one["place"] for one in sources.siblings(ANSWERS, 16)] == [15, 17]
    pair = sources.row("01-answers/pairs.parquet", 0)
    assert [a["label"] for a in pair["answers"]] == ["chosen", "rejected"] and pair["facts"]["chosen_reward"] == 2.0
    with pytest.raises(Refused, match="gone"):
        sources.row(ANSWERS, 18)


def test_items_of_ratings_are_the_different_answers_of_random_prompts(sources: Sources) -> None:
    items = sources.choose_items(ANSWERS, "rate", num=4, seed=1)
    assert len(items) == 8 and items == sources.choose_items(ANSWERS, "rate", num=4, seed=1)
    assert [items[n].prompt == items[n + 1].prompt for n in range(7)] == [True, False] * 3 + [True]
    assert len({i.prompt for i in items}) == 4
    assert items != sources.choose_items(ANSWERS, "rate", num=4, seed=2)
    with pytest.raises(InputError, match="holds no answers"):
        sources.choose_items("01-answers/prompts.parquet", "rate", num=1, seed=0)


def test_items_of_comparisons_have_two_different_answers(sources: Sources) -> None:
    for item in sources.choose_items(ANSWERS, "pair", num=9, seed=0):
        one, two = (sources.find(place, name) for place, name in zip(item.places, item.row_ids, strict=True))
        assert one and two and one["messages"] == two["messages"] and one["answers"] != two["answers"]
    assert len(sources.choose_items("01-answers/pairs.parquet", "pair", num=9, seed=0)) == 6


def test_a_changed_row_is_gone_and_a_moved_one_is_found(sources: Sources, run_folder: Path) -> None:
    items = sources.choose_items(ANSWERS, "rate", num=1, seed=0)
    path = run_folder / ANSWERS
    rows = read_rows(path, Response)
    place = items[0].places[0]
    write_rows(path, rows[::-1])
    found = sources.find(place, items[0].row_ids[0])
    assert found and found["id"] == items[0].row_ids[0]
    write_rows(path, [Response(**{**vars(r), "text": "other"}) for r in rows])
    assert sources.find(place, items[0].row_ids[0]) is None
    path.unlink()
    assert sources.find(place, items[0].row_ids[0]) is None


def test_users_files_of_several_forms(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = {
        "pairs": {"prompt": "q", "chosen": "a", "rejected": "b"},
        "rated": {"prompt": "q", "response": "a", "helpfulness": 3},
        "demonstrations": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a\0\ud800"[:2]}]},
        "prompts": {"prompt": "q"},
    }
    for name, row in rows.items():
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "broken.jsonl").write_text("{\n")
    sources = Sources(folder, tmp_path / "cache")
    for name in rows:
        page = sources.page(f"{name}.jsonl")
        assert (page["kind"], page["total"]) == (name, 1)
    with pytest.raises(InputError, match="is not JSON"):
        sources.page("broken.jsonl")
    assert sources.row("demonstrations.jsonl", 0)["answers"][0]["text"] == "a\ufffd"


def test_a_folder_without_rows_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="neither a run nor"):
            Sources(folder, tmp_path / "cache")


def test_long_texts_come_in_pieces() -> None:
    text = "ab" * 15_000
    assert cut(text)["text"] + cut(text, 20_000)["text"] == text and cut(text)["length"] == 30_000


def test_a_large_file_is_expanded_beside_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_module, "SMALL_BYTES", 0)
    turns = (Message("user", "Hi"),)
    rows = [Response(f"r{n}", f"p{n}", "t", turns, f"answer {n}", "m", 1.0, 0, 1, None, True) for n in range(500)]
    write_rows(tmp_path / "rows.parquet", rows)
    (tmp_path / "talks.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    found = Sources(tmp_path, tmp_path / "cache")
    first = found.page("rows.parquet", num=20)  # from the file itself
    assert [row["place"] for row in first["rows"]] == list(range(20)) and (first["total"], first["more"]) == (500, True)
    second = found.page("rows.parquet", after=19, num=20)
    assert second["rows"][0]["said"] == "answer 20" and first["fields"] == second["fields"] and first["kind"] == second["kind"]
    assert found.page("rows.parquet", num=20)["rows"] == first["rows"]
    assert found.page("talks.jsonl")["total"] == 1
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    with pytest.raises(InputError, match=r"bad\.parquet"):
        found.page("bad.parquet")


def test_a_file_with_our_names_and_other_types_is_no_file_of_ours(tmp_path: Path) -> None:
    columns = {name: ["a"] for name in ("id", "prompt", "messages", "text", "generator")}
    pq.write_table(pa.table(columns), tmp_path / "theirs.parquet")
    assert sources_module.kind_of(tmp_path / "theirs.parquet") == ""


def test_what_was_read_of_a_file_is_given_back(tmp_path: Path) -> None:
    turns = (Message("user", "Hi"),)
    write_rows(
        tmp_path / "rows.parquet", [Response(f"r{n}", "p", "t", turns, f"{n} " * 9999, "m", 1.0, 0, 1, None, True) for n in range(50)]
    )
    found = Sources(tmp_path, tmp_path / "cache")

    def resident_kib() -> int:
        """Of the expanded file, by the kernel."""
        maps = re.split(r"\n(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text())
        (mine,) = [one for one in maps if f"{tmp_path}/cache/" in one]
        return int(re.findall(r"Rss: +(\d+) kB", mine)[0])

    for ask in (lambda: found.page("rows.parquet", filter="text ~ '49 49'"), lambda: found.row("rows.parquet", 3)):
        assert ask() and resident_kib() == 0
    with found._reading(found.source("rows.parquet")) as opened:
        assert len(opened.table.column("text")[0].as_py()) > 9999 and resident_kib() > 0
