"""HTTP content codings and character encodings: bodies and files of bytes become text, or an `UndecodableError` says why they cannot.

Encodings go by the labels of the WHATWG Encoding Standard (section 4.2), as browsers take them: gb2312 is GBK, latin1 is windows-1252.
"""

import codecs
import re
import zlib
from collections.abc import Iterator, Mapping

import pyarrow as pa

MAX_CODINGS = 4  # of one body, in each other
MAX_MEMBERS = 16  # of a gzip stream: each is looked for in a copy of the rest
MAX_REPLACED = 0.01  # share of a text's characters: more, and it is in another encoding, or no text
MAX_CONTROL = 0.02  # the same of control characters, which text has none of and compressed data many
FEW = 2  # characters that are replaced in any text, however short; fewer say nothing of the encoding
PRESCAN = 1024  # bytes in which a page says its encoding (HTML standard, section 13.2.3.2)

# What servers say of bodies that are not coded.
_NO_CODING = {"", "identity", "none", "chunked", "utf-8", "utf8", "7bit", "8bit", "binary"}
_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_BE, "utf-16-be"), (codecs.BOM_UTF16_LE, "utf-16-le"))
# Python's codec for a WHATWG encoding, where resiliparse names a narrower one, or none.
_CODECS = {
    "gbk": "gb18030",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
    "big5": "big5hkscs",
    "iso8859-11": "cp874",
    "iso2022_jp": "iso2022_jp_ext",
    "utf-16": "utf-16-le",
}
_SINGLE_BYTE = {f"cp{n}" for n in (866, 874, *range(1250, 1259))} | {f"iso8859-{n}" for n in range(1, 17)} | {"koi8-r", "koi8-u"}
_LABELS = {"x-mac-cyrillic": "mac-cyrillic", "x-mac-ukrainian": "mac-cyrillic", "x-user-defined": "x-user-defined"}
_REFUSED = {"replacement", "hz-gb-2312", "iso-2022-cn", "iso-2022-cn-ext", "iso-2022-kr", "csiso2022kr"}
_OTHERS = re.compile(r"cp\d+|iso.+|mac.+|shift.+|euc.+|utf-(?:8|16|32).*")  # not those that are no encodings of texts
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\r\n]*)?\r?\n")
_COMMENT = re.compile(rb"<!--.*?(?:-->|\Z)", re.S)
_META = re.compile(rb"<meta[\s/]((?:[^>\"']|\"[^\"]*\"|'[^']*')*)", re.I)
_ATTRIBUTE = re.compile(rb"([^\s\"'>/=]+)(?:\s*=\s*(?:\"([^\"]*)\"|'([^']*)'|([^\s>\"']+)))?")
_CHARSET = re.compile(rb"(?<![^\s;,])charset\s*=\s*[\"']?\s*([^\s\"';]+)", re.I)
_XML = re.compile(rb"\s*<\?xml[^>]*?\sencoding\s*=\s*[\"']([\w.:-]+)[\"']", re.I)
_CONTROL = re.compile("[\0-\x08\x0e-\x1a\x1c-\x1f\x7f]")  # an escape may be part of a text


class UndecodableError(ValueError):
    """Bytes are not the text that they are said to be; the message says why."""


# ---- content codings ----


def decoded_body(body: bytes, headers: Mapping[str, str], max_bytes: int) -> bytes:
    """An HTTP body without its transfer codings and content codings: gzip, deflate, br, zstd, chunked.

    A crawler may have undone a coding and left the header: what is plain text is let through as it is.

    Args:
        headers: by lower-case names; those of one name are joined by commas.
        max_bytes: of the result, and of what lies between two codings.

    Raises:
        UndecodableError: a coding is unknown or damaged, or more comes out.
    """
    named = [[one.strip().lower() for one in headers.get(name, "").split(",")] for name in ("content-encoding", "transfer-encoding")]
    if "chunked" in named[1]:
        body = _dechunked(body)
    codings = [one.removeprefix("x-") for names in named for one in names if one not in _NO_CODING]
    if len(codings) > MAX_CODINGS:
        raise UndecodableError(f"{len(codings)} content codings in each other")
    for coding in reversed(codings):
        if coding not in ("gzip", "deflate", "br", "zstd"):
            raise UndecodableError(f"the content coding {coding[:40]!r} is unknown")
        parts: list[bytes] = []
        size = 0
        try:
            for part in _inflated(body, coding) if coding in ("gzip", "deflate") else _decompressed(body, coding):
                parts.append(part)
                size += len(part)
                if size > max_bytes:
                    raise UndecodableError(f"a document of more than {max_bytes:,} bytes in its content coding {coding}")
        except (zlib.error, OSError, EOFError) as e:
            if not _is_plain(body):
                raise UndecodableError(f"its content coding {coding} cannot be undone: {' '.join(str(e).split())[:100]}") from e
        else:
            body = b"".join(parts)
    return body


def _inflated(body: bytes, coding: str) -> Iterator[bytes]:
    """The parts of gzip's members, or of a deflate stream with zlib's header or without. What follows the last member is no part of it."""
    wbits = [31] if coding == "gzip" else [15, -15]
    rest, first = body, True
    for _ in range(MAX_MEMBERS):
        stream = zlib.decompressobj(wbits[0])
        try:
            part = stream.decompress(rest, 1 << 20)
        except zlib.error:
            if not first or len(wbits) == 1:
                raise
            stream = zlib.decompressobj(wbits[1])
            part = stream.decompress(rest, 1 << 20)
        first = False
        yield part
        while not stream.eof:
            part = stream.decompress(stream.unconsumed_tail, 1 << 20)
            if not part and not stream.eof and not stream.unconsumed_tail:
                raise EOFError("it breaks off")
            yield part
        rest = stream.unused_data if coding == "gzip" else b""
        if rest[:2] != b"\x1f\x8b":
            return
    raise EOFError(f"it has more than {MAX_MEMBERS} members")


def _decompressed(body: bytes, coding: str) -> Iterator[bytes]:
    if not body:
        raise EOFError("it breaks off")
    with pa.CompressedInputStream(pa.BufferReader(body), {"br": "brotli"}.get(coding, coding)) as stream:
        while part := stream.read(1 << 20):
            yield part


def _dechunked(body: bytes) -> bytes:
    """A body without its chunk sizes; as it is if it has none: a crawler has taken them away and left the header."""
    parts: list[bytes] = []
    at = 0
    while found := _CHUNK.match(body, at):
        size, begin = int(found[1], 16), found.end()
        if size == 0:
            return b"".join(parts)
        at = begin + size
        if at > len(body):
            raise UndecodableError("its chunked coding breaks off")
        end = body[at : at + 2]
        if end[:1] != b"\n" and end != b"\r\n":
            if not parts:  # it only begins like a chunk
                return body
            break
        parts.append(body[begin:at])
        at += 2 if end == b"\r\n" else 1
    if parts:
        raise UndecodableError("its chunked coding is damaged" if at < len(body) else "its chunked coding breaks off")
    return body


def _is_plain(body: bytes) -> bool:
    """Whether bytes are text that was never compressed: no control characters, and UTF-8 or the beginning of a page."""
    opening = body[:4096]
    if not body or _CONTROL.search(opening.decode("latin-1")):
        return False
    return opening.lstrip()[:1] == b"<" or _decoded(opening, "utf-8")[1] <= (len(body) > len(opening))  # the last may be cut


# ---- character encodings ----


def codec_of(label: str) -> str | None:
    """Python's codec for a label of the WHATWG Encoding Standard, or one that Python alone knows, as latin-1; else None."""
    from resiliparse.parse.encoding import map_encoding_to_html5

    label = label.strip().strip("\"'").lower()
    if label in _REFUSED:
        return None
    found = _LABELS.get(label) or map_encoding_to_html5(label, fallback_utf8=False)
    if found is None:
        try:
            name = codecs.lookup(label).name
        except (LookupError, ValueError, UnicodeError):
            return None
        found = map_encoding_to_html5(name, fallback_utf8=False) or (name if _OTHERS.fullmatch(name) else None)
    return None if found is None else _CODECS.get(found, str(found))


def label_of(content_type: str) -> str | None:
    """The `charset` of a Content-Type."""
    found = _CHARSET.search(content_type.encode("latin-1", "ignore"))
    return str(found[1].decode("latin-1")) if found else None


def _declared(page: bytes) -> str | None:
    """The label in a page's `<meta>`, of either form, or in its XML declaration."""
    opening = page[:PRESCAN]
    if found := _XML.match(opening):
        return str(found[1].decode("latin-1"))
    for tag in _META.finditer(_COMMENT.sub(b"", opening)):
        pairs = _ATTRIBUTE.findall(tag[1])
        values = {name.lower(): a or b or c for name, a, b, c in reversed(pairs)}  # the first of a name counts
        if label := values.get(b"charset"):
            return str(label.decode("latin-1"))
        if values.get(b"http-equiv", b"").strip().lower() == b"content-type" and (charset := _CHARSET.search(values.get(b"content", b""))):
            return str(charset[1].decode("latin-1"))
    return None


def decoded_text(data: bytes, label: str | None = None, *, is_html: bool = False) -> tuple[str, str]:
    """Bytes as text, and what was done about bytes that are not in the encoding, or "".

    A byte order mark wins, then the label of the HTTP header, then a page's own; without any, UTF-8 is tried, then what the bytes look
    like. A label that the bytes contradict is passed over for one of these. A few bad bytes are replaced by U+FFFD.

    Raises:
        UndecodableError: the encoding is one that browsers refuse, or the bytes are no text in it.
    """
    for bom, codec in _BOMS:
        if data.startswith(bom):
            text, replaced = _decoded(data[len(bom) :], codec)
            return _checked(text, codec, replaced)
    codecs_: list[str] = []
    for given, is_meta in ((label, False), (_declared(data) if is_html else None, True)):
        if not given or not given.strip():
            continue
        found = codec_of(given)
        if found is None:
            if given.strip().lower() in _REFUSED:
                raise UndecodableError(f"the encoding {given[:40]!r} is one that browsers refuse")
            continue
        if is_meta:  # a page whose label could be read is not in these
            found = {"utf-16-le": "utf-8", "utf-16-be": "utf-8", "x-user-defined": "cp1252"}.get(found, found)
        codecs_.append(found)
    if not codecs_ and b"\x1b$" in data and data.isascii():
        codecs_.append("iso2022_jp_ext")  # which is ASCII that says so
    if codecs_ and codecs_[0] in _SINGLE_BYTE and not data.isascii():
        text, replaced = _decoded(data, "utf-8")
        if not replaced and sum(c > "\x7f" for c in text) > FEW:  # UTF-8 is what nothing else is by chance
            return _checked(text, "utf-8", 0, f"read as UTF-8: not {_shown(codecs_[0])}")
    for codec in dict.fromkeys([*codecs_, "utf-8"]):
        text, replaced = _decoded(data, codec)
        if not replaced:
            return _checked(text, codec, 0)
    best = codecs_[0] if codecs_ else "utf-8"
    text, replaced = _decoded(data, best)
    if replaced > max(sum(c > "\x7f" and c != "\ufffd" for c in text), 0 if is_html else FEW):
        from resiliparse.parse.encoding import detect_encoding

        looks_like = codec_of(detect_encoding(data) or "utf-8") if replaced > FEW else "cp1252"
        other, wrong = _decoded(data, looks_like or "utf-8")
        if not wrong:
            return _checked(other, looks_like or "utf-8", 0, f"read as {looks_like}: not {_shown(best)}")
    return _checked(text, best, replaced)


def _decoded(data: bytes, codec: str) -> tuple[str, int]:
    """Text, and how many of its U+FFFD stand for bytes that are not in the encoding."""
    if codec == "x-user-defined":
        return data.decode("latin-1").translate({byte: 0xF700 + byte for byte in range(0x80, 0x100)}), 0
    text = data.decode(codec, "gristmill-whatwg")
    if text.isascii():
        return text, 0
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # a codec may give halves of surrogate pairs
    return text, text.count("\ufffd") - data.count("\ufffd".encode(codec, "ignore") or data + b"-")


def _on_error(e: UnicodeError) -> tuple[str, int]:
    """What browsers make of bytes that Python's codecs do not know."""
    assert isinstance(e, UnicodeDecodeError)
    byte = e.object[e.start]
    name = e.encoding.replace("-", "_").lower()
    if name == "gb18030" and byte == 0x80:
        return "\u20ac", e.start + 1
    if name == "euc_jp":  # the rows that NEC added
        try:
            return e.object[e.start : e.start + 2].decode("euc_jis_2004"), e.start + 2
        except UnicodeDecodeError:
            return "\ufffd", e.start + 1
    if byte < 0xA0 and ("125" in name or name in ("charmap", "cp874")):
        return chr(byte), e.start + 1
    return "\ufffd", e.end if name.startswith("utf") else e.start + 1


codecs.register_error("gristmill-whatwg", _on_error)


def _shown(codec: str) -> str:
    return codec.upper() if codec.startswith("utf") else codec


def _checked(text: str, codec: str, replaced: int, note: str = "") -> tuple[str, str]:
    """The text, if it is one."""
    if replaced > max(MAX_REPLACED * len(text), FEW):
        raise UndecodableError(f"not text in {_shown(codec)}: {replaced:,} of {len(text):,} characters cannot be decoded")
    controls = text.count("\0") if codec == "utf-8" else len(_CONTROL.findall(text))  # UTF-8 is what nothing else is by chance
    if controls > max(MAX_CONTROL * len(text), FEW):
        raise UndecodableError(f"not text in {_shown(codec)}: {controls:,} of {len(text):,} characters are control characters")
    return text, note or (f"replaced: not {_shown(codec)}" if replaced else "")
