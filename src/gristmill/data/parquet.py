"""Parquet files of strangers, read within bounds: what a page, a dictionary or a list would expand to is counted before it does.

Arrow takes memory for as many bytes as a page's own header says, and no page gives more, whatever the footer says. So the headers of all
pages are read first: their sum is what comes out, and the largest of each column are what must be held at once, for one page after another
is decompressed. Small pages can still stand for much: a dictionary is a text and millions of references to it, and runs of equal
numbers and levels take a few bytes. So a batch has few rows, and lists, of which one row may hold all, are read as references first.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

MAX_EXPANSION = 1000  # bytes that may come out of one
MAX_HELD_EXPANSION, FREE_HELD = 100, 512 << 20  # the same where all rows are held at once, of a file that gives more than so many bytes
MAX_PAGE_BYTES = 1 << 30  # of the largest pages of all columns, which are open at once; writers make pages of 1 MiB, or of 1,024 values
FREE_PAGES, PAGE_SHARE = 64 << 20, 20  # open pages that no file is suspected for; beyond, one part in so many of all that may come out
FREE_EXPANSION = 16 << 20  # bytes that no file is suspected for, and of a batch in the mean
REPEATED_BYTES = 64 << 20  # of a batch whose values are all the longest: 16 from a dictionary of 4 MiB, four times what writers make
FEW_ROWS, CODED_ROWS = 16, 1 << 10  # of a batch: of plain values; of texts that are numbers into a dictionary, as the file holds them
BUFFER_BYTES = 1 << 20  # of a column chunk that are read at once; without, Arrow holds the compressed chunks of all columns whole
MAX_HEADER_BYTES = 1 << 20  # of a page; usual are less than a hundred, with statistics some thousands
PADDING = 100  # bytes after a column chunk that Arrow reads too, in files of some writers
WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}
# Thrift's types, and page types and encodings of the Parquet format.
_BOOL, _BYTE, _INT32, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT, _UUID = (1, 2), 3, 5, 7, 8, 9, 10, 11, 12, 13
_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3
_DELTA_BYTE_ARRAY = 7


class Expansion(Exception):
    """More would come out of a file than may."""


class LargePages(Expansion):
    """More would have to be held at once to read a file than may."""


def max_held_bytes(num_bytes: int) -> int:
    """Bytes that may come out of a file of so many bytes where all of it is held at once."""
    return max(FREE_EXPANSION, min(MAX_EXPANSION * num_bytes, max(FREE_HELD, MAX_HELD_EXPANSION * num_bytes)))


@dataclass
class _Column:
    """What the pages of a column chunk may expand to."""

    nested: bool  # in a list: a row may have any number of values
    coded: bool  # a text, which Arrow can leave as numbers into a dictionary
    width: int  # bytes of a value of fixed width; of others 0
    num_bytes: int = 0  # of all pages, decompressed
    num_values: int = 0
    page: int = 0  # bytes of the largest page of values
    dictionary: int = 0  # bytes of it: no value in it has more
    delta: int = 0  # bytes of the largest page in which values repeat what the one before begins with

    def max_value_bytes(self, coded: bool) -> int:
        """Bytes of a value that the file need not hold as often as it gives it."""
        return max(self.width, self.delta, 0 if coded and self.coded else self.dictionary)


class ParquetReader:
    """A Parquet file that gives its row groups as batches of plain values, each of bounded size.

    Args:
        max_bytes: that may come out of the file; more raise Expansion.
        names: of the columns to read; None for all. Those that the file lacks are left out.
        max_page_bytes: of pages that are open at once, one of each column; a small file's may have less. More raise LargePages.
    """

    def __init__(self, path: Path, max_bytes: int, names: Sequence[str] | None = None, *, max_page_bytes: int = MAX_PAGE_BYTES):
        self._raw = pa.OSFile(os.fsencode(path))
        try:
            self._file = pq.ParquetFile(self._raw, pre_buffer=False, buffer_size=BUFFER_BYTES)
            self.schema, self.facts = self._file.schema_arrow, self._file.metadata
            self.names = None if names is None else [name for name in names if name in self.schema.names]
            leaves = map(self.facts.schema.column, range(self.facts.num_columns))
            texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
            self._coded = pq.ParquetFile(self._raw, metadata=self.facts, read_dictionary=texts, pre_buffer=False, buffer_size=BUFFER_BYTES)
            self._leaves = [(field.name, leaf) for field in self._coded.schema_arrow for leaf in _leaf_types(field.type)]
        except BaseException:
            self._raw.close()
            raise
        self._max_bytes, self._given, self._nested_given = max_bytes, 0, 0
        self._max_open = max(FREE_PAGES, min(max_page_bytes, max(max_bytes, MAX_EXPANSION * self._raw.size()) // PAGE_SHARE))

    def __enter__(self) -> "ParquetReader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._raw.close()

    def batches(self, group: int) -> Iterator[pa.RecordBatch]:
        """The rows of a row group as plain values."""
        columns = self._checked(group)
        if any(column.nested and column.coded and column.dictionary for column in columns):
            for batch in self._batches(group, columns, CODED_ROWS):
                yield from self._plain(batch)
        else:
            yield from self._batches(group, columns, FEW_ROWS, coded=False)

    def coded_batches(self, group: int, max_rows: int) -> Iterator[pa.RecordBatch]:
        """The rows of a row group with texts as dictionaries."""
        for batch in self._batches(group, self._checked(group), max_rows):
            self._count(batch.nbytes)
            yield batch

    def _batches(self, group: int, columns: list[_Column], max_rows: int, *, coded: bool = True) -> Iterator[pa.RecordBatch]:
        """Batches of so few rows that they have few bytes in the mean, and with any values that repeat."""
        file, mean = self._coded if coded else self._file, sum(column.num_bytes for column in columns)
        num_rows = max(FEW_ROWS, min(max_rows, FREE_EXPANSION * self.facts.row_group(group).num_rows // max(mean, 1)))
        most = max((column.max_value_bytes(coded) for column in columns if not column.nested), default=0)
        num_rows = max(1, min(num_rows, REPEATED_BYTES // max(most, 1)))
        yield from file.iter_batches(num_rows, row_groups=[group], columns=self.names, use_threads=False)

    def _count(self, num_bytes: int) -> None:
        self._given += num_bytes
        if self._given > self._max_bytes:
            raise Expansion

    def _plain(self, batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        """A batch with dictionaries in plain values, in parts of few bytes or of one row."""
        size = sum(map(_decoded_bytes, batch.columns))
        if size > FREE_EXPANSION and batch.num_rows > 1:
            half = batch.num_rows // 2
            yield from self._plain(batch.slice(0, half))
            yield from self._plain(batch.slice(half))
            return
        self._count(size)
        schema = self.schema if self.names is None else pa.schema([self.schema.field(name) for name in batch.schema.names])
        yield batch.cast(schema)

    def _checked(self, group: int) -> list[_Column]:
        """The column chunks of a row group that are read.

        Raises:
            Expansion: their pages, or their lists, may hold more than comes out of the file.
            LargePages: the largest page of each, together, may hold more than is held at once.
        """
        about, columns = self.facts.row_group(group), []
        known = len(self._leaves) == about.num_columns
        for i in range(about.num_columns):
            name, kind = self._leaves[i] if known else ("", pa.null())
            if self.names is not None and known and name not in self.names:
                continue
            leaf = self.facts.schema.column(i)
            width = leaf.length if leaf.physical_type == "FIXED_LEN_BYTE_ARRAY" else WIDTHS.get(leaf.physical_type, 0)
            column = _Column(leaf.max_repetition_level > 0, pa.types.is_dictionary(kind), width)
            self._read_pages(about.column(i), column)
            if column.nested:
                self._nested_given += column.num_values * max(8, column.max_value_bytes(True))
            columns.append(column)
        if max(sum(column.num_bytes for column in columns), self._nested_given) > self._max_bytes:
            raise Expansion
        if sum(column.page + column.dictionary for column in columns) > self._max_open:
            raise LargePages
        return columns

    def _read_pages(self, chunk: Any, column: _Column) -> None:
        """Add up what the headers of a column chunk's pages say."""
        at = chunk.data_page_offset
        if chunk.dictionary_page_offset is not None and 0 < chunk.dictionary_page_offset < at:
            at = chunk.dictionary_page_offset
        end = at + chunk.total_compressed_size
        while at < end + PADDING and column.num_values < chunk.num_values:
            header, size = self._header(at)
            if header is None:
                if at < end:
                    raise ValueError("a page has no header that can be read")
                return
            at += size + header.compressed
            column.num_bytes += header.uncompressed
            if header.kind == _DICTIONARY and not column.width:
                column.dictionary = max(column.dictionary, header.uncompressed)
            elif header.kind in (_DATA, _DATA_V2):
                column.num_values += header.num_values
                column.page = max(column.page, header.uncompressed)
                if header.encoding == _DELTA_BYTE_ARRAY and not column.width:
                    column.delta = max(column.delta, header.uncompressed)
            if column.num_bytes > self._max_bytes:
                raise Expansion

    def _header(self, at: int) -> "tuple[_Page | None, int]":
        """The header of the page at a byte of the file, and its size."""
        length = 1 << 8
        while True:
            data = self._raw.read_at(length, at)
            try:
                fields, size = _struct(data, 0)
                return _Page.of(fields), size
            except IndexError:
                if len(data) < length or length >= MAX_HEADER_BYTES:
                    return None, 0
                length <<= 4
            except (ValueError, KeyError, RecursionError):
                return None, 0


@dataclass
class _Page:
    """What a page's header says."""

    kind: int
    uncompressed: int
    compressed: int
    num_values: int
    encoding: int

    @staticmethod
    def of(fields: dict[tuple[int, int], Any]) -> "_Page":
        """The page of the fields of a header: numbers by the field's number and Thrift's type, as Arrow takes them."""
        kind, uncompressed, compressed = (fields[number, _INT32] for number in (1, 2, 3))
        about = fields.get(({_DATA: 5, _DICTIONARY: 7, _DATA_V2: 8}.get(kind, 0), _STRUCT), {})
        encoding = about.get(((4 if kind == _DATA_V2 else 2), _INT32), 0)
        page = _Page(kind, uncompressed, compressed, about.get((1, _INT32), 0), encoding)
        if min(page.uncompressed, page.compressed, page.num_values) < 0:
            raise ValueError("less than nothing")
        return page


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _signed(value: int) -> int:
    return value >> 1 ^ -(value & 1)


def _struct(data: bytes, at: int, depth: int = 0) -> tuple[dict[tuple[int, int], Any], int]:
    """Fields of a struct in Thrift's compact protocol by number and type, and where it ends. Texts and lists are passed over."""
    if depth > 16:
        raise ValueError("too deep")
    fields: dict[tuple[int, int], Any] = {}
    number = 0
    while (byte := data[at]) != 0:
        at, kind, step = at + 1, byte & 15, byte >> 4
        if step:
            number += step
        else:
            value, at = _varint(data, at)
            number = _signed(value)
        fields[number, kind], at = (None, at) if kind in _BOOL else _value(data, at, kind, depth)
    return fields, at + 1


def _value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (4, _INT32, 6):
        value, at = _varint(data, at)
        return _signed(value), at
    if kind == _STRUCT:
        return _struct(data, at, depth + 1)
    if kind == _BINARY:
        size, at = _varint(data, at)
        end = at + size
    elif kind in (_LIST, _SET):
        size, inner, at = data[at] >> 4, (data[at] & 15,), at + 1
        if size == 15:
            size, at = _varint(data, at)
        return None, _passed(data, at, inner, size, depth=depth)
    elif kind == _MAP:
        size, at = _varint(data, at)
        return None, _passed(data, at + 1, (data[at] >> 4, data[at] & 15), size, depth=depth) if size else at
    elif kind in (_BYTE, *_BOOL, _DOUBLE, _UUID):
        end = at + {_DOUBLE: 8, _UUID: 16}.get(kind, 1)
    else:
        raise ValueError("no such type")
    return None, end


def _passed(data: bytes, at: int, kinds: tuple[int, ...], size: int, *, depth: int) -> int:
    for _ in range(size):
        for kind in kinds:
            _, at = _value(data, at, kind, depth + 1)
    return at


def _leaf_types(kind: pa.DataType) -> Iterator[pa.DataType]:
    """The types of the values at the ends of a nested type, in the order of Parquet's columns."""
    inner = [kind.field(i).type for i in range(kind.num_fields)]
    if not inner:
        yield kind
    for each in inner:
        yield from _leaf_types(each)


def _decoded_bytes(array: pa.Array) -> int:
    """Bytes of an array when its dictionaries are spelt out."""
    if pa.types.is_dictionary(array.type):
        lengths = pc.binary_length(array.dictionary).take(array.indices)
        return (pc.sum(lengths.cast(pa.int64())).as_py() or 0) + 8 * len(array)
    if isinstance(array, pa.StructArray):
        return sum(map(_decoded_bytes, array.flatten()))
    if isinstance(array, pa.ListArray | pa.LargeListArray):  # a map is one
        first, last = array.offsets[0].as_py(), array.offsets[-1].as_py()
        return _decoded_bytes(array.values.slice(first, last - first)) + 8 * len(array)
    if isinstance(array, pa.FixedSizeListArray):
        return _decoded_bytes(array.flatten()) + 8 * len(array)
    return int(array.nbytes)
