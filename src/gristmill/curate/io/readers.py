"""Document readers and writers of every usual format. Nothing in a file stops the run: it is skipped and named.

Memory: one table (`batch_bytes` of text) and one document (`max_document_bytes`), whatever the size of the files.
"""

import glob
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from gristmill.core.config import Section
from gristmill.core.errors import InputError
from gristmill.core.io import make_folder, replacing
from gristmill.curate.io import decode, html
from gristmill.curate.outcome import DOCUMENT
from gristmill.data.parquet import FREE_EXPANSION, MAX_EXPANSION, MAX_PAGE_BYTES, Expansion, LargePages, ParquetReader
from gristmill.data.rows import finite, num_bytes
from gristmill.data.tokenizer import SURROGATE

OnSkip = Callable[[str, str], None]  # where, why
Format = Literal["parquet", "jsonl", "jsonl.zst"]
Row = tuple[str | None, str, str | None, dict[str, Any], str]  # id, text, source, everything else, where it is
Numbered = tuple[int, Row]  # 1 for the first line of the file, row or record, whether or not it was a document
ROW_BYTES = 64  # of a document beside its text and meta
BLOCK = 1 << 18  # bytes read at a time; where a compressed file breaks off, what the last read gave is lost
CODECS = {".gz": "gzip", ".zst": "zstd"}
TEXT_SUFFIXES = {".txt", ".md", ".rst", ".html", ".htm"}

_ENCODER, _DECODER = json.JSONEncoder(default=str, allow_nan=False), json.JSONDecoder(strict=False)  # `json.dumps` would make one each time


class Reading(Section):
    """Reader settings: how files become documents."""

    text_field: str = "text"
    id_field: str = "id"
    source_field: str = "source"
    batch_bytes: int = Field(32 << 20, gt=0, description="of text in a table")
    max_document_bytes: int = Field(64 << 20, gt=0, description="larger documents (and lines) are skipped")
    max_expansion: int = Field(MAX_EXPANSION, gt=0, description="decompressed bytes to a compressed one; beyond it the file is left")
    max_page_bytes: int = Field(MAX_PAGE_BYTES, gt=0, description="decompressed, of Parquet's pages that are open at once")


class _Stop(Exception):
    """The rest of this file cannot be read; the message says why."""


def list_files(inputs: Sequence[Path | str], on_skip: OnSkip = lambda where, why: None) -> dict[Path, str]:
    """Every file under the given files, folders and globs, with the name that its documents' ids begin with.

    The name is the path below the given folder, or the file's name; if two files would share it, the whole path. Bytes in it that are no
    UTF-8 are spelled out. What is hidden is passed over, links to folders are not followed.

    Args:
        skipped: told where and why, of everything that cannot be looked at.

    Raises:
        InputError: an input stands for no file.
    """
    found: dict[Path, str] = {}
    for given in inputs:
        why = ""

        def passed(where: str, reason: str) -> None:
            nonlocal why
            why = why or f" ({where}: {reason})"
            on_skip(where, reason)

        pairs: list[tuple[Path, str]] = []
        for place in _places(given, passed):
            if os.path.isdir(place):
                pairs += [(p, _shown(p.relative_to(place))) for p in sorted(p for p, is_dir in _below(place, passed) if not is_dir)]
            else:
                pairs.append((place, _shown(Path(place.name))))
        if not pairs:
            raise InputError(f"There is no document at {_shown(Path(given))}{why}: give a file, a folder or a glob that matches some.")
        for place, name in pairs:
            found.setdefault(place, name)
    times: dict[str, int] = {}
    for name in found.values():
        times[name] = times.get(name, 0) + 1
    return {place: name if times[name] == 1 else _shown(place) for place, name in found.items()}


def _shown(path: Path) -> str:
    """A path as text that can be printed, whatever bytes are in it."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def _places(given: Path | str, on_skip: OnSkip) -> list[Path]:
    """What an input stands for: itself, or what matches it."""
    path = Path(given)
    if os.path.exists(path):
        return [path]
    found = set(_matching(Path(path.anchor), path.parts[bool(path.anchor) :], on_skip))
    return sorted((one for one in found if one.is_dir() or not str(given).endswith("/")), key=str)


def _entries(folder: Path, on_skip: OnSkip) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except (FileNotFoundError, NotADirectoryError):  # a pattern asks for what may not be there
        return
    except OSError as e:
        on_skip(_shown(folder), f"cannot be read: {e.strerror}")


def _below(folder: Path, on_skip: OnSkip) -> Iterator[tuple[Path, bool]]:
    """Every file and folder (True) below, without hidden ones."""
    waiting = [folder]
    while waiting:
        for entry in _entries(waiting.pop(), on_skip):
            path = Path(entry.path)
            if entry.name.startswith("."):
                continue
            try:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(path)
                    yield path, True
                elif stat.S_ISREG(entry.stat().st_mode):
                    yield path, False
                else:
                    on_skip(_shown(path), "a link to a folder" if entry.is_dir() else "not a file")
            except OSError as e:
                on_skip(_shown(path), f"cannot be read: {e.strerror}")


def _matching(folder: Path, parts: Sequence[str], on_skip: OnSkip) -> Iterator[Path]:
    """What a pattern stands for. (`glob` follows links through `**`, in loops without end, and is silent about what it cannot read.)"""
    if not parts:
        try:
            os.stat(folder)
        except OSError as e:
            if os.path.islink(folder):
                on_skip(_shown(folder), f"cannot be read: {e.strerror}")
        else:
            yield folder
        return
    first, rest = parts[0], parts[1:]
    if first == "**":
        yield from _matching(folder, rest, on_skip)
        for path, is_dir in _below(folder, on_skip):
            if is_dir:
                yield from _matching(path, rest, on_skip)
    elif glob.has_magic(first):
        for entry in _entries(folder, on_skip):
            if fnmatch(entry.name, first) and (first.startswith(".") or not entry.name.startswith(".")):
                yield from _matching(Path(entry.path), rest, on_skip)
    else:
        yield from _matching(folder / first, rest, on_skip)


def read(path: Path, settings: Reading, on_skip: OnSkip, *, name: str | None = None) -> Iterator[pa.Table]:
    """The documents of one file, in tables of schema DOCUMENT with at most `batch_bytes` of text (or one document).

    Args:
        skipped: told where and why, of everything that is left out or mended.
        name: what ids of documents without one begin with (see `list_files`); the file's name if not given.
    """
    for table, _, _ in read_from(0, path, settings, on_skip=on_skip, name=name or path.name):
        yield table


def read_from(start: int, path: Path, settings: Reading, *, on_skip: OnSkip, name: str) -> Iterator[tuple[pa.Table, int, int]]:
    """As `read`, without the first `start` rows (lines, rows of a table, records), which are not parsed.

    Returns:
        Each table with the number of rows after which the next one begins, and how many skips were told of the rows from `start` to there:
        who begins again at the former has what was told beyond the latter told again.
    """
    batch = _Batch(settings)
    done, told, told_of_done = start, 0, 0

    def counted(where: str, why: str) -> None:
        nonlocal told
        told += 1
        on_skip(where, why)

    try:
        for number, row in _rows(path, name, settings, counted, start):
            for table in batch.add(row, counted):
                yield table, done, told_of_done
            done, told_of_done = number, told
    except _Stop as e:
        counted(name, str(e))
    except (OSError, EOFError, ValueError, pa.ArrowException) as e:
        counted(name, f"the rest cannot be read: {' '.join(str(e).split())[:200]}")
    for table in batch.rest():
        yield table, done, told_of_done


class _Batch:
    """Documents until they fill a table."""

    def __init__(self, settings: Reading):
        self.settings = settings
        self.rows: list[tuple[str, bytes, str | None, str]] = []
        self.size = 0

    def add(self, row: Row, on_skip: OnSkip) -> Iterator[pa.Table]:
        identity, text, source, rest, where = row
        try:
            data = text.encode()
        except UnicodeEncodeError:  # half a surrogate pair, as JSON can spell it
            data = _whole(text).encode()
            on_skip(where, "replaced: not Unicode")
        if len(data) > self.settings.max_document_bytes:
            on_skip(where, f"a document of {len(data):,} bytes")
            return
        try:
            meta = _meta(rest)
        except RecursionError:
            meta = "{}"
            on_skip(where, "its other fields: too deep in each other")
        more = len(data) + len(meta) + ROW_BYTES
        if self.rows and self.size + more > self.settings.batch_bytes:
            yield from self.rest()
        self.rows.append((_whole(where if identity is None else identity), data, None if source is None else _whole(source), meta))
        self.size += more

    def rest(self) -> Iterator[pa.Table]:
        if self.rows:
            ids, texts, sources, metas = zip(*self.rows, strict=True)
            self.rows, self.size = [], 0
            begin_N = np.cumsum([0, *map(len, texts)], dtype=np.int64)
            text = pa.LargeStringArray.from_buffers(len(texts), pa.py_buffer(begin_N), pa.py_buffer(b"".join(texts)))
            columns = [pa.array(ids, pa.string()), text, pa.array(sources, pa.string()), pa.array(metas, pa.string())]
            yield pa.table(columns, schema=DOCUMENT)


def _whole(text: str) -> str:
    """The same without halves of surrogate pairs."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _meta(rest: dict[str, Any]) -> str:
    """Everything else of a document as JSON (null for NaN and infinities). A `meta` that is an object is not put into another."""
    inner = rest.get("meta")
    if isinstance(inner, str):
        try:
            inner = json.loads(inner)
        except (ValueError, RecursionError):
            inner = None
    if isinstance(inner, dict):
        rest = {**inner, **{key: value for key, value in rest.items() if key != "meta"}}
    if not rest:
        return "{}"
    try:
        text = _ENCODER.encode(rest)
    except ValueError:  # JSON has no NaN
        text = _ENCODER.encode(finite(rest))
    if "\\ud" in text:  # whole pairs are written so too
        whole = json.dumps(json.loads(text), ensure_ascii=False)
        text = text if SURROGATE.search(whole) is None else json.dumps(json.loads(_whole(whole)))
    return text


def _rows(path: Path, name: str, settings: Reading, on_skip: OnSkip, start: int) -> Iterator[Numbered]:
    suffixes = [s.lower() for s in path.suffixes]
    codec = CODECS.get(suffixes[-1]) if suffixes else None
    kind = (suffixes[:-1] if codec else suffixes)[-1:] or [""]
    if path.stat().st_size == 0:
        on_skip(name, "empty")
    elif kind[0] == ".parquet" and not codec:
        yield from _parquet(path, name, settings, on_skip, start)
    elif kind[0] in (".jsonl", ".ndjson", ".json"):
        yield from _json(path, name, codec, kind[0], settings, on_skip, start)
    elif kind[0] in (".warc", ".wet"):
        yield from _warc(path, name, codec, settings, on_skip, start)
    elif start == 0:
        yield 1, _text(path, name, codec, kind[0], settings, on_skip)


class _Stream:
    """The decompressed bytes of a file, until they are suspiciously many. It has the `read` that a file has."""

    def __init__(self, path: Path, codec: str | None, settings: Reading):
        self.raw = pa.OSFile(os.fsencode(path))
        self.stream = pa.CompressedInputStream(self.raw, codec) if codec else self.raw
        self.max_expansion = settings.max_expansion if codec else None
        self.given = 0

    def read(self, size: int = BLOCK) -> bytes:
        block = self.stream.read(min(size, BLOCK) if size >= 0 else BLOCK)
        self.given += len(block)
        if self.max_expansion is not None and self.given > max(self.max_expansion * self.raw.tell(), FREE_EXPANSION):
            raise _Stop(f"more than {self.max_expansion} bytes come out of each compressed byte")
        return bytes(block)

    def tell(self) -> int:
        return self.given

    def seek(self, offset: int, whence: int = 0) -> int:  # FastWARC asks whether there is one
        raise OSError("this stream only goes forward")

    def close(self) -> None:
        self.stream.close()
        self.raw.close()


def _lines(stream: _Stream, settings: Reading) -> Iterator[tuple[int, bytes | None]]:
    """Number and bytes of every line that is not blank; None in place of a line that is too long, which is never held."""
    number, held, lost = 1, bytearray(), False
    while True:
        try:
            block = stream.read()
        except _Stop:
            if held and not lost:
                yield number, bytes(held)
            raise
        *ends, last = block.split(b"\n")
        for end in ends:
            if lost or len(held) + len(end) > settings.max_document_bytes:
                yield number, None
            elif held or end.strip():
                yield number, bytes(held) + end
            held.clear()
            number, lost = number + 1, False
        held += last
        if len(held) > settings.max_document_bytes:
            held.clear()
            lost = True
        if not block:
            if lost or held.strip():
                yield number, None if lost else bytes(held)
            return


def _json(path: Path, name: str, codec: str | None, kind: str, settings: Reading, on_skip: OnSkip, start: int) -> Iterator[Numbered]:
    if kind == ".json" and not codec and path.stat().st_size <= settings.max_document_bytes:
        data = path.read_bytes()
        text = data.decode("utf-8", "replace")
        if "\ufffd" in text and "\ufffd".encode() not in data:
            on_skip(name, "replaced: not UTF-8")
        value = _value(text)  # one value, which may be spread over lines
        rows = value if isinstance(value, list) else [value] if isinstance(value, dict) else []
        for number, row in enumerate(rows[start:], start + 1):
            yield from _object(row, number, f"{name}:{number}", settings, on_skip)
        if rows:
            return
    with closing(_Stream(path, codec, settings)) as stream:
        for number, line in _lines(stream, settings):
            if number <= start:
                continue
            where = f"{name}:{number}"
            if line is None:
                on_skip(where, f"a line of more than {settings.max_document_bytes:,} bytes")
                continue
            try:
                text = line.decode()
            except UnicodeDecodeError:
                text = line.decode("utf-8", "replace")
                on_skip(where, "replaced: not UTF-8")
            row = _value(text)
            if row is None:
                on_skip(where, "not JSON")
            else:
                yield from _object(row, number, where, settings, on_skip)


def _value(text: str) -> Any:
    """What the JSON says, or None if it is none. Control characters within strings are let through: cleaning sees to them."""
    try:
        return _DECODER.decode(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError):  # also numbers of thousands of digits, and deep nesting
        return None


def _object(row: Any, number: int, where: str, settings: Reading, on_skip: OnSkip) -> Iterator[Numbered]:
    text = row.get(settings.text_field) if isinstance(row, dict) else None
    if not isinstance(row, dict):
        on_skip(where, "not a JSON object")
    elif not isinstance(text, str):
        on_skip(where, f"no text in {settings.text_field!r}")
    else:
        fields = (settings.text_field, settings.id_field, settings.source_field)
        identity, source = (row.get(field) for field in fields[1:])
        rest = {key: value for key, value in row.items() if key not in fields}
        yield number, (None if identity in (None, "") else str(identity), text, None if source is None else str(source), rest, where)


def _parquet(path: Path, name: str, settings: Reading, on_skip: OnSkip, start: int) -> Iterator[Numbered]:
    first = given = 0
    most = max(settings.max_expansion * path.stat().st_size, FREE_EXPANSION)
    with ParquetReader(path, most, max_page_bytes=settings.max_page_bytes) as file:
        if settings.text_field not in file.schema.names:
            raise _Stop(f"no column {settings.text_field!r}")
        for group in range(file.facts.num_row_groups):
            about = file.facts.row_group(group)
            number, first = first, first + about.num_rows
            if first <= start:
                continue
            try:
                for batch in file.batches(group):
                    passed = min(len(batch), max(0, start - number))
                    number += passed
                    taken = batch.slice(passed).to_pylist()
                    given += num_bytes(taken)
                    if given > most:
                        raise Expansion
                    for row in taken:
                        number += 1
                        text = row[settings.text_field]
                        if isinstance(text, bytes):
                            row[settings.text_field] = decoded = text.decode("utf-8", "replace")
                            if "\ufffd" in decoded and "\ufffd".encode() not in text:
                                on_skip(f"{name}:{number}", "replaced: not UTF-8")
                        yield from _object(row, number, f"{name}:{number}", settings, on_skip)
            except LargePages as e:
                raise _Stop("its pages are too large to be opened: raise reading.max_page_bytes and reading.max_expansion") from e
            except Expansion as e:
                raise _Stop(f"more than {settings.max_expansion} bytes come out of each of its bytes") from e
            except (OSError, ValueError, pa.ArrowException) as e:  # the next group may be whole
                on_skip(f"{name}:{number + 1}", f"the rest of row group {group} cannot be read: {' '.join(str(e).split())[:200]}")


def _text(path: Path, name: str, codec: str | None, kind: str, settings: Reading, on_skip: OnSkip) -> Row:
    parts: list[bytes] = []
    size = 0
    with closing(_Stream(path, codec, settings)) as stream:
        while block := stream.read():
            if not parts and kind not in TEXT_SUFFIXES and b"\0" in block[:8192] and block[:2] not in (b"\xff\xfe", b"\xfe\xff"):
                raise _Stop("not text")
            parts.append(block)
            size += len(block)
            if size > settings.max_document_bytes:
                raise _Stop(f"a document of more than {settings.max_document_bytes:,} bytes")
    is_html = kind in (".html", ".htm")
    try:
        text, note = decode.decoded_text(b"".join(parts), is_html=is_html)
        text = html.main_text(text) if is_html else text
    except (decode.UndecodableError, html.PageError) as e:
        raise _Stop(str(e)) from e
    if note:
        on_skip(name, note)
    return name, text, _shown(path), {}, name


def _warc(path: Path, name: str, codec: str | None, settings: Reading, on_skip: OnSkip, start: int) -> Iterator[Numbered]:
    from fastwarc.warc import ArchiveIterator, WarcRecordType

    kinds = WarcRecordType.response | WarcRecordType.conversion | WarcRecordType.resource
    with closing(_Stream(path, codec, settings)) as stream:
        for number, record in enumerate(ArchiveIterator(stream, record_types=kinds, parse_http=False), 1):
            if number <= start:
                continue
            where = f"{name}:{number}"
            try:
                row = _record(record, where, settings, on_skip)
            except (decode.UndecodableError, html.PageError) as e:
                on_skip(where, str(e))
                continue
            if row is not None:
                yield number, row


def _record(record: Any, where: str, settings: Reading, on_skip: OnSkip) -> Row | None:
    """The document of a record; None for a picture, a script and the like.

    Raises:
        UndecodableError, PageError: it is a text that cannot be read.
    """
    try:
        record.parse_http()
    except (OSError, ValueError) as e:
        raise decode.UndecodableError(f"its HTTP headers cannot be read: {' '.join(str(e).split())[:100]}") from e
    if record.content_length > settings.max_document_bytes:
        raise decode.UndecodableError(f"a document of {record.content_length:,} bytes")
    headers: dict[str, str] = {}
    for key, value in (record.http_headers or record.headers).astuples() if record.is_http else record.headers.astuples():
        key = key.lower()
        headers[key] = f"{headers[key]}, {value}" if key in headers else value
    kind = (headers.get("content-type") or ("" if record.is_http else "text/plain")).split(";")[0].split(",")[0].strip().lower()
    if kind not in ("text/plain", "text/html", "application/xhtml+xml"):
        return None
    body = record.reader.read(settings.max_document_bytes)
    label = (decode.label_of(headers.get("content-type", ""))) if record.is_http else "utf-8"
    body = decode.decoded_body(body, headers if record.is_http else {}, settings.max_document_bytes)
    is_html = kind != "text/plain"
    text, note = decode.decoded_text(body, label, is_html=is_html)
    text = html.main_text(text) if is_html else text
    if note:
        on_skip(where, note)
    uri = record.headers.get("WARC-Target-URI")
    identity = record.record_id or record.headers.get("WARC-Record-ID") or uri
    return identity, text, uri, {"date": record.headers.get("WARC-Date")}, where


class Writer:
    """Sharded writer: documents into part-00000.parquet (or .jsonl, .jsonl.zst), part-00001...: each is whole or not there.

    The cut depends on the documents alone, not on how they come in tables. `close` removes later parts of an earlier, longer run.
    """

    def __init__(self, folder: Path, format: Format, shard_bytes: int):
        self.folder, self.format, self.shard_bytes = folder, format, shard_bytes
        self.paths: list[Path] = []
        self.place = ExitStack()  # of the part that is open
        self.size = 0  # bytes of text in the part that is open
        self.sink: Any = None
        self.parquet: pq.ParquetWriter | None = None
        make_folder(folder)

    def add(self, table: pa.Table) -> None:
        """Write the documents; a part ends with the one that fills it."""
        import pyarrow.compute as pc

        sizes_N = pc.fill_null(pc.binary_length(table["text"]), 0).to_numpy()
        begin = 0
        while begin < len(sizes_N):
            ends_N = np.cumsum(sizes_N[begin:]) + self.size
            take = int(np.searchsorted(ends_N, self.shard_bytes)) + 1
            piece = table.slice(begin, take)
            self._write(piece)
            begin += len(piece)
            self.size = int(ends_N[len(piece) - 1])
            if self.size >= self.shard_bytes:
                self._end()

    def close(self) -> list[Path]:
        """The parts, in order."""
        self._end()
        for old in self.folder.glob(f"part-{'[0-9]' * 5}.{self.format}"):
            if old not in self.paths:
                old.unlink()
        return self.paths

    def _write(self, piece: pa.Table) -> None:
        if self.sink is None:
            self.paths.append(self.folder / f"part-{len(self.paths):05d}.{self.format}")
            self.sink = pa.OSFile(str(self.place.enter_context(replacing(self.paths[-1]))), "wb")
            if self.format == "parquet":
                self.parquet = pq.ParquetWriter(self.sink, piece.schema, compression="zstd")
            elif self.format == "jsonl.zst":
                self.sink = pa.CompressedOutputStream(self.sink, "zstd")
        if self.parquet is not None:
            self.parquet.write_table(piece)
            return
        for row in piece.to_pylist():
            self.sink.write(json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n")

    def _end(self) -> None:
        if self.sink is None:
            return
        if self.parquet is not None:
            self.parquet.close()
        self.sink.close()
        self.sink, self.parquet, self.size = None, None, 0
        self.place.close()


def write(tables: Iterator[pa.Table], folder: Path, format: Format, *, shard_bytes: int) -> list[Path]:
    """All of the tables through a `Writer`."""
    writer = Writer(folder, format, shard_bytes)
    with writer.place:
        for table in tables:
            writer.add(table)
        return writer.close()
