"""Row sources: the typed rows of a run's stages, or of the files in a folder, read by page.

A file is expanded once into an uncompressed Arrow file in the studio's folder. It is memory-mapped, so that a page of 50 rows costs the
same wherever it lies. Orders are computed over whole columns, filters a batch at a time, and mapped pages are given back after each.
"""

import hashlib
import json
import mmap
import random
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gristmill.core.errors import InputError
from gristmill.core.io import make_folder, replacing, state
from gristmill.data.parquet import Expansion, ParquetReader, max_held_bytes
from gristmill.data.readers import read_demonstrations, read_pairs, read_prompts, read_ratings
from gristmill.data.rows import ATTRIBUTES, Response, make_id, read_records, read_rows, write_rows
from gristmill.report.sample_files import read_samples, sample_files
from gristmill.runs.artifacts import ALL, CHECK, Artifact
from gristmill.runs.reader import read_run
from gristmill.runs.run_dir import RECIPE
from gristmill.studio.apart import Died, Told, apart
from gristmill.studio.database import clean
from gristmill.studio.filters import fields_of, is_plain, mask
from gristmill.studio.rollouts import ROLLOUTS, read_rollouts
from gristmill.studio.store import NewItem, Refused
from gristmill.studio.tasks import PAIR, RATE

MAX_TEXT_CHARS = 20_000  # of a text that is sent at once
EXCERPT_CHARS = 200
PAGE_ROWS, MAX_PAGE = 60, 200
LIST_SECONDS = 5.0  # for which the list of a run's files is remembered
MAX_ORDERS = 8  # filtered or sorted, that are kept
BATCH_ROWS = 1 << 14
RESPONSES, PAIRS, RATED, DEMONSTRATIONS, PROMPTS, OTHER = "responses", "pairs", "rated", "demonstrations", "prompts", "other"
SAMPLES = "samples"  # of evaluations and curations: for reading alone
KIND_OF_ROW = {"Response": RESPONSES, "Pair": PAIRS, "Rated": RATED, "Demonstration": DEMONSTRATIONS, "Prompt": PROMPTS}
OWN_COLUMNS = {  # by which a file of ours is known
    RESPONSES: {"id", "prompt", "messages", "text", "generator"},
    PAIRS: {"id", "prompt", "messages", "chosen", "rejected", "chosen_reward"},
    RATED: {"id", "messages", "labels", "pair"},
    DEMONSTRATIONS: {"id", "task", "messages", "origin", "parents"},
}
TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SMALL_BYTES = 4 << 20  # of a file that is converted in this process
OF_KIND = {RATE: (RESPONSES, RATED, DEMONSTRATIONS), PAIR: (RESPONSES, PAIRS)}  # what a project can be made of
FACTS = (
    *("task", "generator", "origin", "temperature", "judge", "score", "verified", "good", "finished", "votes", "num_tokens", "logprob"),
    *("chosen_reward", "rejected_reward", "reason"),
)


@dataclass(frozen=True)
class Source:
    """A file of rows.

    Attributes:
        name: by which it is asked for: its path in the folder.
        kind: of its rows.
        stage: that wrote it; "" outside of runs.
    """

    name: str
    path: Path
    kind: str
    stage: str


@dataclass(frozen=True)
class Expanded:
    """The rows of a file, memory-mapped.

    Attributes:
        pages: of the file, which count as this process's memory while they are mapped.
    """

    table: pa.Table
    pages: mmap.mmap

    @classmethod
    def open(cls, path: Path) -> "Expanded":
        with path.open("rb") as file:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return cls(pa.ipc.open_file(pa.py_buffer(pages)).read_all(), pages)

    @property
    def kind(self) -> str:
        return str((self.table.schema.metadata or {}).get(b"kind", b"other").decode())

    def give_back(self) -> None:
        """Unmap what was read, which stays in the system's page cache: the next reader maps it again."""
        self.pages.madvise(mmap.MADV_DONTNEED)


class Sources:
    """The rows of a run or of a folder of files."""

    def __init__(self, folder: Path, cache: Path):
        self.folder, self.cache = folder, cache
        self.is_run = (folder / RECIPE).is_file()
        self._guard, self._expanding = threading.RLock(), dict[str, threading.Lock]()
        self._ahead, self._ends = ThreadPoolExecutor(1, "studio-expand"), threading.Event()
        self._tables: dict[str, Expanded] = {}
        self._heads: dict[tuple[str, int], dict[str, Any]] = {}
        self._orders: OrderedDict[tuple[Any, ...], np.ndarray] = OrderedDict()
        self._known, self._listed = {source.name: source for source in self.all()}, time.monotonic()

    def all(self) -> list[Source]:
        """All sources, in the order of their stages.

        Raises:
            InputError: the folder holds none.
        """
        found = list(self._of_run() if self.is_run else self._of_folder())
        if not found and not self.is_run:
            raise InputError(f"{self.folder} holds neither a run nor .parquet or .jsonl files with rows: give the folder of one.")
        return found

    def _samples(self, folder: Path, stage: str = "") -> Iterator[Source]:
        for path in sample_files(folder):
            yield Source(path.relative_to(self.folder).as_posix(), path, SAMPLES, stage)

    def _of_run(self) -> Iterator[Source]:
        yield from self._samples(self.folder)
        for stage in read_run(self.folder).stages:
            waiting = (CHECK.file,) if stage["folder"].endswith("-check") else ()
            for file in stage.get("artifacts", waiting):
                artifact = ALL.get(file)
                path = self.folder / stage["folder"] / file
                if isinstance(artifact, Artifact) and path.is_file():
                    yield Source(f"{stage['folder']}/{file}", path, KIND_OF_ROW.get(artifact.row.__name__, OTHER), stage["folder"])
            if "name" in stage:  # done: a journal that still grows would be another file at every look
                folder = self.folder / stage["folder"]
                for path in sorted([*folder.glob(ROLLOUTS), *folder.glob(f"run/*/{ROLLOUTS}")]):  # a reasoning stage is a run of its own
                    yield Source(path.relative_to(self.folder).as_posix(), path, RESPONSES, stage["folder"])
                yield from self._samples(folder, stage["folder"])

    def _of_folder(self) -> Iterator[Source]:
        if not self.folder.is_dir():
            return
        samples = list(self._samples(self.folder))
        yield from samples
        for path in sorted(set(self.folder.iterdir()) - {one.path for one in samples}):
            if path.suffix in (".parquet", ".jsonl", ".json") and path.is_file():
                yield Source(path.name, path, "", "")

    def source(self, name: str) -> Source:
        """A source by its name; for "" the one to begin with: the last answers, or what is first.

        Raises:
            Refused: there is none.
        """
        with self._guard:
            if name not in self._known or time.monotonic() > self._listed + LIST_SECONDS:
                self._known, self._listed = {source.name: source for source in self.all()}, time.monotonic()
            known = list(self._known.values())
        first = next((one for one in known[::-1] if one.kind == RESPONSES), *known[:1]) if known else None
        found = self._known.get(name) if name else first
        if found is None:
            raise Refused(404, "There is no such file of rows here any more: choose another.")
        return found

    @contextmanager
    def _reading(self, source: Source) -> Iterator[Expanded]:
        """The rows of a source, while they are read.

        Raises:
            InputError: the file cannot be read.
        """
        opened = self._open(source)
        try:
            yield opened
        finally:
            opened.give_back()

    def _open(self, source: Source) -> Expanded:
        """The rows of a source, which are expanded first where they are not yet.

        Raises:
            InputError: the file cannot be read.
        """
        key, path = self._expanded(source)
        with self._guard:
            expanding = self._expanding.setdefault(key, threading.Lock())
        with expanding:  # others are served meanwhile
            if key not in self._tables:
                if not path.is_file():
                    if source.path.stat().st_size < SMALL_BYTES:
                        expand(source.path, source.kind, path)
                    else:  # it takes several times the file, for a while: the memory of another process
                        try:
                            apart(_expand_apart, source.path, source.kind, path, stop=self._ends)
                        except Died as e:
                            raise InputError(f"{source.name} could not be expanded: is there memory and disk for it?") from e
                self._tables[key] = Expanded.open(path)
            return self._tables[key]

    def close(self) -> None:
        """End expansions that are under way: they begin anew when they are needed."""
        self._ends.set()
        self._ahead.shutdown(wait=False, cancel_futures=True)

    def look_ahead(self) -> None:
        """Read, in a thread of its own, what the first look at the rows will be."""
        self._ahead.submit(self.page, "")

    def _expanded(self, source: Source) -> tuple[str, Path]:
        """What a file's content is known by, and where its rows are expanded to."""
        try:
            key = make_id(*state(source.path))
        except OSError as e:
            raise Refused(404, f"{source.name} is gone: put it back, or choose another file.") from e
        return key, self.cache / f"{key}.arrow"

    def _head(self, source: Source, num: int) -> dict[str, Any] | None:
        """The first page of a large file that is not expanded yet, which begins meanwhile; None where there is nothing to save."""
        key, path = self._expanded(source)
        if path.is_file():
            return None
        if (key, num) in self._heads:
            return self._heads[key, num]
        if source.path.stat().st_size < SMALL_BYTES or not (kind := source.kind or kind_of(source.path)):
            return None
        try:
            with ParquetReader(source.path, max_held_bytes(source.path.stat().st_size)) as file:
                batch = next(file.coded_batches(0, num)).slice(0, num)
                table, total = pa.Table.from_batches([batch.cast(file.schema)]), file.facts.num_rows
        except (pa.ArrowException, Expansion, OSError, StopIteration):
            return None  # it is told when it is read whole
        rows = [_brief(table, kind, place) for place in range(table.num_rows)]
        self._ahead.submit(self._open, source)
        head = {"kind": kind, "total": total, "rows": rows, "fields": fields_of(table), "more": len(rows) < total}
        self._heads[key, num] = head
        return head

    def page(self, name: str, *, filter: str = "", sort: str = "", after: int = -1, num: int = PAGE_ROWS) -> dict[str, Any]:
        """A page of rows, those after a row's number in the order; with how many there are, and the names for filters and orders.

        Args:
            name: of the source; "": the last answers.
            sort: a column's name, with "-" before it for the largest first; "" for the file's order.
        """
        source, num = self.source(name), max(1, min(num, MAX_PAGE))
        if not filter and not sort and after < 0 and (head := self._head(source, num)) is not None:
            return head | {"source": source.name}
        with self._reading(source) as opened:
            return self._page(source, opened, filter=filter, sort=sort, after=after, num=num) | {"source": source.name}

    def _page(self, source: Source, opened: Expanded, *, filter: str, sort: str, after: int, num: int) -> dict[str, Any]:
        table, kind = opened.table, opened.kind
        key = (source.name, id(table), filter, sort)
        with self._guard:
            order = self._orders.get(key)
            if order is None:
                self._orders[key] = order = _order(opened, filter, sort)
                while len(self._orders) > MAX_ORDERS:
                    self._orders.popitem(last=False)
            self._orders.move_to_end(key)
        begin = 0
        if after >= 0:
            begin = int(np.searchsorted(order, after, "right")) if not sort else int(np.argmax(order == after)) + 1
        places = order[begin : begin + num].tolist()
        rows = [_brief(table, kind, place) for place in places]
        return {"kind": kind, "total": len(order), "rows": rows, "fields": fields_of(table), "more": begin + len(places) < len(order)}

    def row(self, name: str, place: int) -> dict[str, Any]:
        """A row for reading: turns, answers and facts.

        Raises:
            Refused: it is gone.
        """
        with self._reading(self.source(name)) as opened:
            if not 0 <= place < opened.table.num_rows:
                raise Refused(404, "This row is gone.")
            return view(_record(opened.table, place), opened.kind) | {"source": name, "place": place}

    def siblings(self, name: str, place: int) -> list[dict[str, Any]]:
        """The other answers to the prompt of an answer, in the same file."""
        with self._reading(self.source(name)) as opened:
            table, kind = opened.table, opened.kind
            if kind != RESPONSES:
                return []
            prompt = table.column("prompt")[place]
            places = pc.indices_nonzero(pc.equal(table.column("prompt"), prompt)).to_pylist()
            return [view(_record(table, other), kind) | {"source": name, "place": other} for other in places[:16] if other != place]

    def find(self, place: Sequence[Any], row_id: str) -> dict[str, Any] | None:
        """The row of an item: where it was, or elsewhere in that file. None where it is gone, or now says something else."""
        name, number, digest = place
        with suppress(InputError), self._reading(self.source(name)) as opened:
            table = opened.table
            ids = table.column("id") if "id" in table.schema.names else None
            if ids is None:
                return None
            if not (0 <= number < table.num_rows and ids[number].as_py() == row_id):
                number = pc.index(ids, row_id).as_py()
            if number >= 0:
                found = view(_record(table, number), opened.kind)
                return found if digest_of(found) == digest else None
        return None

    def choose_items(self, name: str, kind: str, *, num: int, seed: int) -> list[NewItem]:
        """A random sample of what people can be asked about in a source, answers to one prompt one after the other.

        Args:
            num: prompts, or pairs, that are asked about.

        Raises:
            InputError: rows of this kind cannot be rated or compared.
        """
        source = self.source(name)
        with self._reading(source) as opened:
            return self._choose(source, opened, kind, num=num, seed=seed)

    def _choose(self, source: Source, opened: Expanded, kind: str, *, num: int, seed: int) -> list[NewItem]:
        table, rows = opened.table, opened.kind
        if rows not in OF_KIND[kind]:
            what = "answers" if kind == RATE else "pairs, nor several answers to a prompt"
            raise InputError(f"{source.name} holds no {what}: choose another file.")
        together = kind == RATE or rows == RESPONSES
        groups = self._groups(table, rows) if together else [[place] for place in range(table.num_rows)]
        random.Random(seed).shuffle(groups)
        out: list[NewItem] = []
        taken = 0
        for group in groups:
            if taken == num:
                break
            different = list({_answer_text(table, rows, place): place for place in reversed(group)}.values())[::-1]
            if kind == PAIR and rows == RESPONSES:
                if len(different) < 2:
                    continue
                chosen = [tuple(random.Random(f"{seed}/{group[0]}").sample(different, 2))]
            else:
                chosen = [(place,) for place in different[:2]]
            taken += 1
            out += [self._item(source, table, rows, places) for places in chosen]
            opened.give_back()  # rows at random map much around them
        return out

    def _item(self, source: Source, table: pa.Table, kind: str, places: Sequence[int]) -> NewItem:
        views = [view(_record(table, place), kind) for place in places]
        excerpt = " ".join(views[0]["messages"][-1]["content"][: 2 * EXCERPT_CHARS].split())[:EXCERPT_CHARS] if views[0]["messages"] else ""
        prompt = make_id([m["content"] for m in views[0]["messages"]])
        where = tuple((source.name, place, digest_of(one)) for place, one in zip(places, views, strict=True))
        return NewItem(tuple(one["id"] for one in views), where, prompt, views[0]["facts"].get("task") or "", excerpt)

    def _groups(self, table: pa.Table, kind: str) -> list[list[int]]:
        """Numbers of the rows of each prompt."""
        name = {RESPONSES: "prompt", RATED: "pair"}.get(kind, "id")
        groups: dict[Any, list[int]] = defaultdict(list)
        for place, key in enumerate(table.column(name).to_pylist()):
            groups[key or place].append(place)
        return list(groups.values())


def view(record: dict[str, Any], kind: str) -> dict[str, Any]:
    """A row for reading: `messages` up to the answer, `answers` with a label each, and `facts`; of a sample `at`, its place in its file."""
    told = json.loads(record["meta"]) if kind == SAMPLES else {}
    said = told.get("messages", record.get("messages")) or ()
    turns = [{"role": str(m.get("role")), "content": clean(str(m.get("content") or ""))} for m in said]
    if kind == RESPONSES:
        answers = [("answer", record.get("text"))]
    elif kind == PAIRS:
        answers = [("chosen", record.get("chosen")), ("rejected", record.get("rejected"))]
    elif kind == SAMPLES:
        answers = told["parts"]
    elif kind in (RATED, DEMONSTRATIONS) and turns and turns[-1]["role"] == "assistant":
        answers = [("answer", turns.pop()["content"])]
    else:
        answers = [("text", record["text"])] if "text" in record else []
    facts = told.get("facts") or {name: record[name] for name in FACTS if record.get(name) is not None}
    if isinstance(record.get("rating"), str):
        with suppress(ValueError):
            facts["rating"] = json.loads(record["rating"])
    if record.get("labels"):
        facts["labels"] = dict(zip(ATTRIBUTES, record["labels"], strict=False))
    plain = [{"label": label, "text": clean(str(text or ""))} for label, text in answers]
    row = {"id": str(record.get("id") or ""), "kind": kind, "messages": turns, "answers": plain, "facts": facts}
    return row | {"at": told["at"]} if told else row


def digest_of(row: dict[str, Any]) -> str:
    """Hash of what a row says: an item whose row says something else is gone."""
    said = json.dumps([row["messages"], [answer["text"] for answer in row["answers"]]])
    return hashlib.blake2b(said.encode(), digest_size=8).hexdigest()


def cut(text: str, begin: int = 0) -> dict[str, Any]:
    """A piece of a long text, and how long the whole is."""
    return {"text": text[begin : begin + MAX_TEXT_CHARS], "length": len(text)}


def _record(table: pa.Table, place: int) -> dict[str, Any]:
    (record,) = table.slice(place, 1).to_pylist()
    return dict(record)


def _answer_text(table: pa.Table, kind: str, place: int) -> Any:
    return table.column("text")[place].as_py() if kind == RESPONSES else place


def _brief(table: pa.Table, kind: str, place: int) -> dict[str, Any]:
    """A row for a list: short values, and the beginning of its text."""
    row = view(_record(table, place), kind)
    text = (row["answers"] or row["messages"][-1:] or [{}])[0]
    said = str(text.get("text", text.get("content", "")))[: 2 * EXCERPT_CHARS]
    asked = row["messages"][-1]["content"][: 2 * EXCERPT_CHARS] if row["messages"] else ""
    short = [" ".join(one.split())[:EXCERPT_CHARS] for one in (asked, said)]
    return {"place": place, "id": row["id"], "asked": short[0] if row["answers"] else "", "said": short[1], "facts": row["facts"]}


def _order(opened: Expanded, filter: str, sort: str) -> np.ndarray:
    """Numbers of the rows that a filter lets through, in an order."""
    table, order = opened.table, _wanted(opened, filter)
    if sort:
        name, down = sort.removeprefix("-"), sort.startswith("-")
        if name not in table.schema.names or not is_plain(table.schema.field(name).type):
            raise InputError(f"These rows cannot be sorted by that: choose one of {', '.join(fields_of(table))}.")
        keyed = pa.table({"key": table.column(name).take(pa.array(order)), "place": pa.array(order)})
        ascending = "descending" if down else "ascending"
        order = order[pc.sort_indices(keyed, sort_keys=[("key", ascending), ("place", "ascending")]).to_numpy()]
    return order


def _wanted(opened: Expanded, filter: str) -> np.ndarray:
    """Numbers of the rows that a filter lets through. A search for text reads the whole file, and holds a batch of it."""
    if mask(opened.table.slice(0, 0), filter) is None:
        return np.arange(opened.table.num_rows)
    found = []
    for batch in opened.table.to_batches():
        lets = mask(pa.Table.from_batches([batch]), filter)
        assert lets is not None
        found.append(np.asarray(lets.to_numpy(zero_copy_only=False), bool))
        opened.give_back()
    return np.flatnonzero(np.concatenate(found)) if found else np.arange(0)


def kind_of(path: Path) -> str:
    """The kind of rows that a Parquet file of our own holds, by its columns and their types; "" of any other file."""
    if path.suffix != ".parquet":
        return ""
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError):
        return ""  # its reader says what is wrong
    types = dict(zip(schema.names, schema.types, strict=True))
    texts = [types[name] for name in ("id", "text", "chosen", "rejected") if name in types]
    if types.get("messages") != TURNS or not all(map(pa.types.is_string, texts)):
        return ""
    return next((kind for kind, columns in OWN_COLUMNS.items() if columns <= types.keys()), "")


def expand(path: Path, kind: str, target: Path) -> None:
    """Write a file of rows as an uncompressed Arrow file, a batch at a time.

    Args:
        kind: of its rows; "" where that is to be found out.

    Raises:
        InputError: the file cannot be read.
    """
    make_folder(target.parent)
    source, made = path, None
    kind = kind or kind_of(path)
    if not kind or source.name == ROLLOUTS or kind == SAMPLES:
        path = made = target.with_suffix(".parquet")
        kind, rows = (kind, read_samples(source) if kind == SAMPLES else read_rollouts(source)) if kind else _read_users(source)
        write_rows(path, rows)
    try:
        with ParquetReader(path, max_held_bytes(path.stat().st_size)) as file, replacing(target) as temporary:
            schema = file.schema.with_metadata({"kind": kind})
            with pa.OSFile(str(temporary), "wb") as out, pa.ipc.new_file(out, schema) as writer:
                for group in range(file.facts.num_row_groups):
                    for batch in file.coded_batches(group, BATCH_ROWS):
                        writer.write_batch(batch.cast(schema))
    except (pa.ArrowException, Expansion, OSError) as e:
        raise InputError(f"{source} cannot be read as Parquet ({type(e).__name__}): write or download it again.") from e
    finally:
        pa.default_memory_pool().release_unused()
        if made is not None:
            made.unlink(missing_ok=True)


def _expand_apart(_: Told, path: Path, kind: str, target: Path) -> None:
    expand(path, kind, target)


def _read_users(path: Path) -> tuple[str, Iterable[Any]]:
    """Rows of a user's file, by what its first row has."""
    first: dict[str, Any] = next(iter(read_records(path)), {})
    names = {name for name, value in first.items() if value is not None}
    if not names:
        raise InputError(f"{path} holds no rows.")
    if OWN_COLUMNS[RESPONSES] <= names:
        return RESPONSES, read_rows(path, Response)
    if names & {"chosen", "chosen_response"}:
        return PAIRS, read_pairs(path)
    if "labels" in names or names & set(ATTRIBUTES):
        return RATED, read_ratings(path)
    try:
        return DEMONSTRATIONS, read_demonstrations(path)
    except InputError as unanswered:
        try:
            return PROMPTS, read_prompts(path, "file")
        except InputError:
            raise unanswered from None
