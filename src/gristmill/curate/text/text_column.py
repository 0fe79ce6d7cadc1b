"""Text columns as numba reads them: all bytes in one array, and where each text begins.

Shapes: N documents, B bytes of all of them.
"""

import sys
import unicodedata
from dataclasses import dataclass
from functools import cache

import numpy as np
import pyarrow as pa
from numba import njit

LAST_LETTER = 0x323AF  # beyond it there are tags, selectors and private use; a test holds it to the Unicode of this Python
# Bits of `char_classes`. NUMERIC is whatever has a value, an ideograph too; TERMINAL and CLOSER are beyond ASCII.
SPACE, LETTER, DIGIT, COMBINING, SYMBOL, NUMERIC, CLOSER, TERMINAL = (1 << k for k in range(8))
# Ends of sentences beyond ASCII: property Sentence_Terminal of Unicode, with the semicolon of Arabic.
TERMINALS = (
    "\u037e\u0589\u061b\u061d\u061e\u061f\u06d4\u0700\u0701\u0702\u07f9\u0837\u0839\u083d\u083e\u0964\u0965\u0f0d\u0f0e\u104a\u104b"
    "\u1362\u1367\u1368\u166e\u1735\u1736\u17d4\u17d5\u1803\u1809\u1944\u1945\u1aa8\u1aa9\u1aaa\u1aab\u1b5a\u1b5b\u1b5e\u1b5f\u1c3b\u1c3c"
    "\u1c7e\u1c7f\u203c\u203d\u2047\u2048\u2049\u2e2e\u2e3c\u3002\ua4ff\ua60e\ua60f\ua6f3\ua6f7\ua876\ua877\ua8ce\ua8cf\ua92f\ua9c8\ua9c9"
    "\uaa5d\uaa5e\uaa5f\uaaf0\uaaf1\uabeb\ufe52\ufe56\ufe57\uff01\uff0e\uff1f\uff61"
)


@dataclass(frozen=True)
class TextColumn:
    """Arrow string column as arrays: `data_B`, its UTF-8 bytes, `begin_N` of each text, and one more: the end."""

    data_B: np.ndarray
    begin_N: np.ndarray

    @staticmethod
    def of(column: pa.ChunkedArray | pa.Array) -> "TextColumn":
        """A column of strings; bytes are not copied where it is one piece."""
        chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
        array = chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks or [pa.array([], pa.large_string())])
        array = array.cast(pa.large_string())
        _, offsets, data = array.buffers()
        if len(array) == 0 or offsets is None:
            return TextColumn(np.empty(0, np.uint8), np.zeros(1, np.int64))
        begin_N = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
        data_B = np.empty(0, np.uint8) if data is None else np.frombuffer(data, np.uint8)
        return TextColumn(data_B, begin_N)

    def __len__(self) -> int:
        return len(self.begin_N) - 1

    def bytes_of(self, index: int) -> memoryview:
        """One text."""
        return memoryview(self.data_B[self.begin_N[index] : self.begin_N[index + 1]])  # type: ignore[arg-type]

    @property
    def sizes_N(self) -> np.ndarray:
        """Bytes of each text."""
        return np.diff(self.begin_N)


def read_only(array: np.ndarray) -> np.ndarray:
    """A view that cannot be written to, so that one compiled function serves all arrays."""
    view = array.view()
    view.flags.writeable = False
    return view


@njit(cache=True, nogil=True)
def decode_utf8(data_B, i):  # type: ignore[no-untyped-def]
    """Decode the code point of more than one byte at i, in UTF-8 that Arrow has checked, and how many bytes."""
    lead = np.int64(data_B[i])
    if lead < 0xE0:
        return (lead & 0x1F) << 6 | data_B[i + 1] & 0x3F, 2
    if lead < 0xF0:
        return (lead & 0x0F) << 12 | (data_B[i + 1] & 0x3F) << 6 | data_B[i + 2] & 0x3F, 3
    return (lead & 7) << 18 | (data_B[i + 1] & 0x3F) << 12 | (data_B[i + 2] & 0x3F) << 6 | data_B[i + 3] & 0x3F, 4


@njit(cache=True, nogil=True)
def longest(begin_N):  # type: ignore[no-untyped-def]
    """Bytes of the longest text, and one more."""
    size = 0
    for n in range(len(begin_N) - 1):
        size = max(size, begin_N[n + 1] - begin_N[n])
    return size + 1


@njit(cache=True, nogil=True)
def hash_table(hash_K):  # type: ignore[no-untyped-def]
    """Hash table, int32 [S], by open addressing of the low bits: the place of a hash in hash_K, or -1. S is a power of 2, at least 4 K."""
    size = 16
    while size < 4 * len(hash_K):
        size *= 2
    place_S = np.full(size, -1, np.int32)
    for k in range(len(hash_K)):
        at = np.int64(hash_K[k] & np.uint64(size - 1))
        while place_S[at] >= 0:
            at = (at + 1) & (size - 1)
        place_S[at] = k
    return place_S


@njit(cache=True, nogil=True, inline="always")
def lookup(wanted, hash_K, place_S):  # type: ignore[no-untyped-def]
    """Where a hash is in hash_K, or -1."""
    at = np.int64(wanted & np.uint64(len(place_S) - 1))
    while place_S[at] >= 0 and hash_K[place_S[at]] != wanted:
        at = (at + 1) & (len(place_S) - 1)
    return place_S[at]


@cache
def char_classes() -> np.ndarray:
    """Character classes, uint8 for every code point: what `unicodedata` says of it, as bits, and whether it ends a sentence."""
    table = np.zeros(sys.maxunicode + 1, np.uint8)
    bits = {"Nd": DIGIT, "Sm": SYMBOL, "Sc": SYMBOL, "Pe": CLOSER, "Pf": CLOSER, "Pi": CLOSER}
    for point in range(LAST_LETTER + 1):
        char = chr(point)
        kind = unicodedata.category(char)
        if kind[0] == "L":
            table[point] = LETTER
        elif kind[0] == "M":
            table[point] = COMBINING
        elif kind in bits and (point >= 0x80 or kind == "Nd"):
            table[point] = bits[kind]
        if unicodedata.numeric(char, None) is not None:
            table[point] |= NUMERIC
    for point in range(0xE0100, 0xE01F0):  # variation selectors
        table[point] = COMBINING
    for char in TERMINALS:
        table[ord(char)] |= TERMINAL
    for point in range(0x3001):
        if chr(point).isspace():
            table[point] |= SPACE
    return table
