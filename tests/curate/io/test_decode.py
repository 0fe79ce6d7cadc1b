"""Bodies of web archives and bytes in any encoding become text, or are refused with a reason."""

import gzip
import zlib
from collections.abc import Callable

import pyarrow as pa
import pytest

from gristmill.curate.io.decode import UndecodableError, codec_of, decoded_body, decoded_text, label_of

TEXT = b"<p>The mill stands where the brook meets the pond, and it has ground rye since the flood.</p>" * 4


def deflate(body: bytes) -> bytes:
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)
    return stream.compress(body) + stream.flush()


def brotli(body: bytes) -> bytes:
    return pa.compress(body, codec="brotli", asbytes=True)


def zstd(body: bytes) -> bytes:
    return pa.compress(body, codec="zstd", asbytes=True)


def chunked(body: bytes, size: int = 70) -> bytes:
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%X;a=b\r\n" % len(one) + one + b"\r\n" for one in pieces) + b"0\r\nTrailer: x\r\n\r\n"


CODINGS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "X-Gzip": lambda body: gzip.compress(body[:50]) + gzip.compress(body[50:]),
    "deflate": deflate,
    "Deflate": zlib.compress,
    "br": brotli,
    "zstd": zstd,
    "br, gzip": lambda body: gzip.compress(brotli(body)),
    "identity": bytes,
    "utf-8": bytes,
}


@pytest.mark.parametrize("coding", CODINGS)
def test_content_codings_are_undone(coding: str) -> None:
    headers = {"content-encoding": coding}
    assert decoded_body(CODINGS[coding](TEXT), headers, 1 << 20) == TEXT
    assert decoded_body(chunked(CODINGS[coding](TEXT)), headers | {"transfer-encoding": "chunked"}, 1 << 20) == TEXT
    assert decoded_body(TEXT, headers | {"transfer-encoding": "chunked"}, 1 << 20) == TEXT  # a crawler undid both


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd"])
def test_what_cannot_be_undone_is_refused(coding: str) -> None:
    body = CODINGS[coding](TEXT)
    with pytest.raises(UndecodableError, match="cannot be undone"):
        decoded_body(body[:-20], {"content-encoding": coding}, 1 << 20)
    with pytest.raises(UndecodableError, match="more than 100,000 bytes"):
        decoded_body(CODINGS[coding](b"a" * 3_000_000), {"content-encoding": coding}, 100_000)


def test_codings_that_are_unknown_damaged_or_many() -> None:
    for coding, why in (("compress", "unknown"), (", ".join(["gzip"] * 9), "9 content codings")):
        with pytest.raises(UndecodableError, match=why):
            decoded_body(TEXT, {"content-encoding": coding}, 1 << 20)
    for body in (chunked(TEXT)[:-30], chunked(TEXT)[:100] + b"??" + chunked(TEXT)[100:], b"ffffffffff\r\n" + TEXT):
        with pytest.raises(UndecodableError, match="chunked"):
            decoded_body(body, {"transfer-encoding": "chunked"}, 1 << 20)
    with pytest.raises(UndecodableError, match="members"):
        decoded_body(gzip.compress(b"") * 1000, {"content-encoding": "gzip"}, 1 << 20)


@pytest.mark.parametrize(
    ("label", "codec", "text"),
    [
        ("gb2312", "gbk", "\u9555\u6c5f"),
        ("Latin1", "cp1252", "\u20ac5 \u201cok\u201d"),
        ("latin-1", "cp1252", "\u201cok\u201d"),
        ("us-ascii", "cp1252", "it\u2019s"),
        ("windows-1252", "latin-1", "\x81\x9d"),
        ("euc-kr", "cp949", "\ub611\ubc29\uac01\ud558"),
        ("shift_jis", "cp932", "\u2460\u9ad9\uff5e"),
        ("euc-jp", "euc_jis_2004", "\u2461\u65e5"),
        ("big5", "big5hkscs", "\u55ba\u5497"),
        ("tis-620", "cp874", "\u0e44\u0e17\u0e22\u2026"),
        ("iso-8859-9", "cp1254", "\u0131\u20ac"),
        ("utf-16", "utf-16-le", "\u0440\u0435"),
        ("x-mac-cyrillic", "mac-cyrillic", "\u044f"),
        ("no-such-label", "utf-8", "\xe9"),
    ],
)
def test_labels_are_what_browsers_take_them_for(label: str, codec: str, text: str) -> None:
    text = f"The brook {text} flows."
    assert decoded_text(text.encode(codec), label) == (text, "")


def test_the_users_own_encoding_and_those_that_browsers_refuse() -> None:
    assert decoded_text(b"a\x80\xff", "x-user-defined") == ("a\uf780\uf7ff", "")
    for label in ("hz-gb-2312", "ISO-2022-KR", "replacement"):
        with pytest.raises(UndecodableError, match="refuse"):
            decoded_text(b"abc", label)
    assert decoded_text(b"+AGE-", "utf-7") == ("+AGE-", "")


@pytest.mark.parametrize(
    ("head", "codec"),
    [
        ('<meta charset="koi8-r">', "koi8-r"),
        ("<META CHARSET=KOI8-R />", "koi8-r"),
        ('<meta http-equiv="Content-Type" content="text/html; charset=windows-1251">', "cp1251"),
        ("<meta content='text/html;charset=ibm866' http-equiv='content-type'>", "cp866"),
        ("<!-- <meta charset=latin1> --><meta charset=koi8-r>", "koi8-r"),
        ("<meta name=description content='charset=latin1'><meta charset=koi8-r>", "koi8-r"),
        ("<meta charset='utf-16'>", "utf-8"),
    ],
)
def test_pages_say_their_encoding(head: str, codec: str) -> None:
    text = f"<html>{head}\u0440\u0435\u043a\u0430"
    assert decoded_text(text.encode(codec), is_html=True) == (text, "")
    assert decoded_text(b"\xef\xbb\xbf" + text.encode(), is_html=True) == (text, "")
    assert decoded_text(b"\xff\xfe" + text.encode("utf-16-le"), "latin1", is_html=True) == (text, "")


def test_bytes_that_are_no_text() -> None:
    russian = "\u043c\u0435\u043b\u044c\u043d\u0438\u0446\u0430 \u0441\u0442\u043e\u0438\u0442 \u0443 \u0440\u0435\u043a\u0438. " * 5
    assert decoded_text(russian.encode("cp1251"), "utf-8") == (russian, "read as cp1251: not UTF-8")
    assert decoded_text(russian.encode() + b"\xff") == (russian + "\ufffd", "replaced: not UTF-8")
    assert decoded_text("a \ufffd b".encode()) == ("a \ufffd b", "")
    for label in ("latin1", "windows-1252", "koi8-r"):  # a label that the bytes contradict
        assert decoded_text(russian.encode(), label) == (russian, f"read as UTF-8: not {codec_of(label)}")
    japanese = "\u65e5\u672c\u8a9e"
    assert decoded_text(japanese.encode("iso2022_jp")) == (japanese, "")
    for data in (gzip.compress(russian.encode() * 9), bytes(range(256)) * 5, russian.encode("utf-16-le")):
        with pytest.raises(UndecodableError, match="not text"):
            decoded_text(data)


def test_the_label_of_a_header() -> None:
    assert label_of('text/html; Charset = "gb2312"') == "gb2312"
    assert label_of("text/html;charset=utf-8;x=y") == "utf-8"
    assert label_of("text/html; xcharset=a") is None
