"""Patterns and checks of personal data: what confirms that a finding begins at a place, by its shape, its checksum and the words around it.

Every pattern is bounded or cannot step back, so the time is linear in the text. Patterns are read on UTF-8 bytes, at one place; the group
"it" is the finding.

Sources: IBAN registry (ISO 13616), card prefixes and lengths (ISO/IEC 7812, the networks' published ranges), calling codes (ITU-T E.164),
addresses (RFC 5321, 6531, 5890).
"""

import ipaddress
import math
import re
from collections import Counter
from functools import cache
from typing import Literal, get_args

Kind = Literal["key", "email", "iban", "card", "ssn", "ip", "phone"]
# In this order: where findings overlap, the first kind names them all.
KINDS: tuple[Kind, ...] = get_args(Kind)
KEY, EMAIL, IBAN, CARD, SSN, IP, PHONE = range(len(KINDS))
_BLANK = rb"(?: |\xc2\xa0|\xe2\x80[\x80-\x8a\xaf]|\xe2\x81\x9f|\xe3\x80\x80)"  # of every width, no-break ones too
_HYPHEN = rb"(?:-|\xc2\xad|\xe2\x80[\x90-\x95]|\xe2\x81\x83|\xe2\x88\x92|\xef\xb9\xa3|\xef\xbc\x8d)"  # hyphens, dashes, minus
_MARK = rb"(?:%b|%b)" % (_BLANK, _HYPHEN)
_DOTTED = rb"(?:\.|%b)" % _MARK
# before and after a number that is no part of a longer one
_NUMBER = rb"(?<![A-Za-z0-9_])(?<![0-9][.-])(?<!\.)(?<![0-9]\xe2\x80[\x90-\x95])(?<![0-9]\xe2\x88\x92)"
_END = rb"(?![A-Za-z0-9_])"
_NUMBER_END = _END + rb"(?!(?:\.|%b)[0-9])" % _HYPHEN
_OCTET = rb"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"

# Letters beyond ASCII: of scripts that part words by spaces, and of those that do not.
_LETTER = (
    rb"(?:\xc3[\x80-\x96\x98-\xb6\xb8-\xbf]|[\xc4-\xd7][\x80-\xbf]|\xd8[\xa0-\xbf]|[\xd9\xda][\x80-\xbf]|\xdb[\x80-\x93\x95-\xbf]"
    rb"|[\xdc-\xdf][\x80-\xbf]|\xe0(?:[\xa4\xa6-\xb7][\x80-\xbf]|\xa5[\x80-\xa3\xa6-\xbf])|\xe1(?:[\x82\x83\xb8-\xbf])[\x80-\xbf])"
)
_IDEOGRAPH = rb"(?:\xe3[\x81-\x83][\x80-\xbf]|[\xe4-\xe9\xeb\xec][\x80-\xbf]{2}|\xea[\xb0-\xbf][\x80-\xbf]|\xed[\x80-\x9e][\x80-\xbf])"
_APOSTROPHE = rb"(?<=[DLMNOdlmno])(?:'|\xe2\x80\x99)(?=[A-Za-z])"  # o'brien, d'angelo
_LOCALS = [  # parts before the @, which the text that is searched ends with
    re.compile(rb"(?:[A-Za-z0-9_]|%b)(?:[A-Za-z0-9_.%%+-]|%b|%b)*\Z" % (_LETTER, _LETTER, _APOSTROPHE)),
    re.compile(rb"(?:[A-Za-z0-9_]|%b)(?:[A-Za-z0-9_.%%+-]|%b)*\Z" % (_IDEOGRAPH, _IDEOGRAPH)),
    re.compile(rb'(?<![A-Za-z0-9_\\])"(?:[^"\\\r\n]|\\[^\r\n]){1,64}"\Z'),
]
_ENDS_IN_IDEOGRAPH = re.compile(_IDEOGRAPH + rb"\Z")
MAX_LOCAL = 64  # characters before the @
_LOCAL_BYTES = 4 * MAX_LOCAL
_LABEL = rb"[A-Za-z0-9]|%b|%b" % (_LETTER, _IDEOGRAPH)
_DOMAIN = re.compile(
    rb"(?:(?:%b)(?:(?:%b|-){0,61}(?:%b))?\.){1,8}"
    % (_LABEL, _LABEL, _LABEL)
    + rb"(?:xn--[A-Za-z0-9-]{1,58}[A-Za-z0-9]|(?!(?:png|jpe?g|gif|svg|webp|ico|bmp|pdf|mp[34]|css|s[ac]ss|html?|json|ya?ml|toml|woff2?)\b)"
    rb"[A-Za-z]{2,24}"
    rb"|(?:%b|%b){1,24})(?![A-Za-z0-9_(@-])" % (_LETTER, _IDEOGRAPH)
)
# user@host:path and user@host/path are places for programs
_LOGINS = frozenset((b"git", b"hg", b"svn", b"ssh", b"root", b"deploy", b"ubuntu", b"ec2-user"))
_PATH = re.compile(rb"::[A-Za-z]|:(?:[/~]|\./|[^\s:/,;\"'<>)]{1,64}(?:/|\.git\b))")
_LOGIN_PATH = re.compile(rb"[:/][^\s:]")

_CARDS = [
    re.compile(
        _NUMBER + rb"(?P<it>[2-689][0-9]{13,18}|[2-689][0-9]{3}(?P<a>%b)[0-9]{4}(?P=a)[0-9]{4}(?P=a)[0-9]{4}%%b"
        rb"|3[0-9]{3}(?P<b>%b)[0-9]{6}(?P=b)[0-9]{4,5}|6[0-9]{5}%b[0-9]{13})" % (_MARK, _MARK, _MARK) % rest + _NUMBER_END
    )
    for rest in (rb"(?P=a)[0-9]{3}", b"")
]
# By network: Visa and the Elo cards among them, Mastercard, American Express, Diners Club, Discover and Elo, JCB, UnionPay, RuPay, Maestro,
# Mir, Elo, Verve, Troy, Uzcard and Humo. Visa's 13 digits are not issued any more, and a barcode has as many.
_ISSUER = re.compile(
    rb"4(?:.{15}|.{18})|(?:5[1-5]..|222[1-9]|22[3-9].|2[3-6]..|27[01].|2720).{12}|3[47].{13}|3(?:0[0-59]|[689].).{11}"
    rb"|(?:6011|65..|64[4-9].|35(?:2[89]|[3-8].)|62..|81[0-6].|817[01]|220[0-4]|5018|5020|5038|5893|6304|6759|676[1-3]).{12,15}"
    rb"|(?:60..|8[12]..|508.|9792|8600|9860).{12}|(?:504175|506699|5067[0-6].|50677[0-8]|509...|627780|636297|636368).{10}"
    rb"|(?:506099|5061[0-8].|50619[0-8]).{10,13}"
)
_CODED = re.compile(
    rb"(?:\b(?:ean|isbn|gtin|upc|jan|itf|issn|sscc|imei|sku|oclc|part|serial|lot|model|item)|bar ?code|article|timestamp)"
    rb"(?:[-_ ]?(?:8|1[0-4]|no\.?|nr\.?|number|code|id))?[\s:#=\"'(]{0,6}\Z",
    re.IGNORECASE,
)
_IN_DOI = re.compile(rb"\b10\.[0-9]{4,9}/[^\s\"'<>]*\Z")
_IN_ADDRESS = re.compile(rb"(?:://|\b10\.[0-9]{4,9}/)[^\s\"'<>]*/?\Z")  # of a page, or a DOI
_PAYS = re.compile(rb"\b(?:card|credit|debit|diners|pan|pay)", re.IGNORECASE)
_SSN = re.compile(_NUMBER + rb"(?P<it>(?!000|666|9)[0-9]{3}(?P<a>%b|)(?!00)[0-9]{2}(?P=a)(?!0000)[0-9]{4})" % _MARK + _NUMBER_END)
_HYPHENS = re.compile(_HYPHEN)
_SSN_SAID = re.compile(rb"(?:\bssn|social[ -]security(?: (?:number|no\.?))?)(?: is)?[\s:#=.\"'(]{0,6}\Z", re.IGNORECASE)
_V4 = re.compile(
    rb"(?<![A-Za-z0-9_.])(?<![A-Za-z_][/-])(?P<it>(?:" + _OCTET + rb"\.){3}" + _OCTET + rb")" + _END + rb"(?!\.[A-Za-z0-9_])(?!-[A-Za-z_])"
)
_V6 = re.compile(rb"(?<![A-Za-z0-9_:.])(?P<it>[23][0-9A-Fa-f]{3}(?::{1,2}[0-9A-Fa-f]{1,4}){2,7}(?:::)?)(?![A-Za-z0-9_]|:[0-9A-Fa-f:])")
_CALLING = (
    rb"(?:7|2(?:0|7|1[12368]|[2346].|5[0-8]|9[01789])|3(?:[0-469]|5.|7.|8[0-35-79])|4(?:[013-9]|2[013])|5(?:[1-8]|0.|9.)"
    rb"|6(?:[0-6]|7[02-9]|8[0-3]|8[5-9]|9[0-2])|8(?:[1246]|00|08|5[02356]|70|78|8[01236-8])|9(?:[0-58]|6[0-8]|7[0-7]|9[2-68]))"
).replace(b".", b"[0-9]")
_PHONE = re.compile(
    (
        rb"(?<![A-Za-z0-9_+])(?<![0-9][.-])(?<!\.)(?<![0-9]\xe2\x80[\x90-\x95])(?P<it>"
        rb"\+1S?(?:\([2-9][0-9]{2}\)|[2-9][0-9]{2})S?[0-9]{3}S?[0-9]{4}"
        rb"|\+CALLING(?:S?\([0-9]{1,5}\))?(?:S?[0-9]){4,13}"
        rb"|(?:1S)?(?:\([2-9][0-9]{2}\)S?[0-9]{3}S|[2-9][0-9]{2}(?P<h>HYPHEN)[0-9]{3}(?P=h)|[2-9][0-9]{2}\.[0-9]{3}\.|[2-9][0-9]{2}BLANK[0-9]{3}HYPHEN)"
        rb"[0-9]{4})"
    )
    .replace(b"HYPHEN", _HYPHEN)
    .replace(b"BLANK", _BLANK)
    .replace(b"CALLING", _CALLING)
    .replace(b"S", _DOTTED)
    + _NUMBER_END
)
_TOKEN = re.compile(
    rb"(?<![A-Za-z0-9_])(?P<it>(?<!-)(?:sk-[A-Za-z0-9_-]{20,250}+|xox[abeprs]-[A-Za-z0-9-]{20,250}+|AIza[A-Za-z0-9_-]{35}"
    rb"|glpat-[A-Za-z0-9_-]{20,250}+|xai-[A-Za-z0-9]{40,250}+|SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}"
    rb"|eyJ[A-Za-z0-9_-]{8,4000}+\.eyJ[A-Za-z0-9_-]{8,8000}+\.[A-Za-z0-9_-]{16,2000}+)"
    rb"|[sr]k_(?:live|test)_[A-Za-z0-9]{16,250}+|gh[pousr]_[A-Za-z0-9]{36,250}+|github_pat_[A-Za-z0-9_]{22,250}+"
    rb"|(?:AKIA|ASIA)[A-Z0-9]{16}|hf_[A-Za-z0-9]{30,60}+|gsk_[A-Za-z0-9]{40,60}+|npm_[A-Za-z0-9]{36})(?![A-Za-z0-9_])"
)
_PEM = re.compile(
    rb"(?P<it>-----BEGIN [A-Z ]{0,30}PRIVATE KEY(?: BLOCK)?-----(?:[^-]++|-(?!----))*+-----END [A-Z ]{0,30}PRIVATE KEY(?: BLOCK)?-----)"
)
_VALUE = re.compile(rb"(?<=[\s\"'=:>])(?P<it>[A-Za-z0-9+/_-]{16,200}={0,2})(?![A-Za-z0-9+/_=.(\[-])")
_SECRET = re.compile(
    rb"(?:password|passwd|pwd|secret|token|(?:api|access|auth|account|encryption|secret)[_-]?key)[\"']?\s{0,3}(?::=|=>|=|:)\s{0,3}[\"']?\Z"
    rb"|\bauthorization[\"']?\s{0,3}[:=]\s{0,3}[\"']?bearer \Z",
    re.IGNORECASE,
)
# What the words around four numbers make of them.
_VERSION = re.compile(
    rb"(?:\b(?:version|ver\.?|v\.?|release|section|chapter|oid|firmware|build|driver|revision|rev\.?|kernel|bios|sdk|hotfix|installer|library"
    rb"|plugin|changelog|notes (?:for|of)|tag(?:ged)?"
    rb"|(?:updat|upgrad|downgrad|patch)(?:e|es|ed|ing)?|patch)(?:[_ -]?(?:number|string|no\.?))?(?: (?:to|from|is|was))?[\s_:=\"'(>]{0,6}"
    rb"|[a-z]version[\s_:=\"'(>]{0,6}|[=<>~!]= ?|(?:\A|\n)#{1,6} \[?)\Z",
    re.IGNORECASE,
)
_ADDRESSED = re.compile(
    rb"(?:\b(?:ip(?:v[46])?|addr(?:ess(?:es)?)?|host|server|from|ping|traceroute|connect(?:ed|ing)?(?: to)?|peer|client|gateway|router|dns"
    rb"|nameserver|resolver|proxy|bind|listen(?:ing)?(?: on)?|ssh|telnet|curl|inet|remote|src|dst|source|destination|via)[\s:=\"'(\[>]{1,4}"
    rb"|://|@)\Z",
    re.IGNORECASE,
)
_PORT = re.compile(rb":[0-9]{1,5}\b|/[0-9]{1,2}\b")
_RELEASED = re.compile(
    rb"[\s)\"']{0,2}(?:\(|-)?(?:(?:was|is|are|were|has been|got) (?:just )?(?:released|out\b|available|installed"
    rb"|the (?:latest|newest|current))"
    rb"|released?\b|build\b|beta|alpha|rc[0-9 .]|update\b|installer|(?:or|and) (?:later|newer|higher|above|earlier|older|up\b))",
    re.IGNORECASE,
)
# The name of a product: capitals within, or a capital in the midst of a sentence.
_PRODUCT = re.compile(rb"(?:(?:\A|[\s(\"'>])[A-Za-z]*[a-z][A-Z][A-Za-z]*|(?:\A|[\s(\"'>])[A-Z]{2,}[a-z]+|[A-Za-z]{2,} [A-Z][a-z]+) \Z")
_NAME = re.compile(rb"(?:\A|[\s(\"'>])[A-Z][A-Za-z]*[a-z] \Z")
_OLDER = re.compile(rb"(?<![0-9.])(?P<it>[0-9]{1,3}(?:\.[0-9]{1,3}){3}) (?:to|->) \Z")
_DATE = re.compile(rb"\+?[0-9]{4}[.-][0-9]{2}[.-][0-9]{2}")
# Characters of an IBAN, by country.
_IBAN_SIZES = {
    code: size
    for size, codes in {
        15: "NO", 16: "BE", 18: "DK FI FK FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU MN XK", 21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM SO TL", 24: "AD CZ ES MD PK RO SA SE SK TN VG",
        25: "LY PT ST", 26: "IS TR", 27: "BI DJ FR GR IT MC MR SM", 28: "AL AZ BY CY DO GT HN HU LB NI PL SV", 29: "BR EG PS QA UA",
        30: "JO KW MU", 31: "MT SC", 32: "LC", 33: "RU",
    }.items()
    for code in codes.split()
}  # fmt: skip


@cache
def _iban(size: int) -> re.Pattern[bytes]:
    """An IBAN of so many characters, written whole or in groups of four."""
    groups, rest = divmod(size - 4, 4)
    tail = rb"(?P=a)[A-Z0-9]{%d}" % rest if rest else b""
    return re.compile(
        rb"(?<![A-Za-z0-9_])(?P<it>[A-Z]{2}[0-9]{2}(?:[A-Z0-9]{%d}|(?P<a>%b)[A-Z0-9]{4}(?:(?P=a)[A-Z0-9]{4}){%d}%b))"
        % (size - 4, _MARK, groups - 1, tail)
        + _END
    )


def _luhn(digits: bytes) -> bool:
    """The checksum of ISO/IEC 7812: every second digit from the right counts double, its digits summed."""
    total = sum(c - 48 for c in digits[-1::-2]) + sum((0, 2, 4, 6, 8, 1, 3, 5, 7, 9)[c - 48] for c in digits[-2::-2])
    return total % 10 == 0


def _random(value: bytes) -> bool:
    """Whether a value looks drawn and not written: letters and digits, at least 3.2 bits a character, digits in its midst."""
    counts = Counter(value)
    bits = -sum(n / len(value) * math.log2(n / len(value)) for n in counts.values())
    digits = len(re.findall(rb"[0-9]", value))
    # words with a number after them change class once; drawn characters do so all the time
    changes = len(re.findall(rb"[0-9](?=[A-Za-z])|[A-Za-z](?=[0-9])", value))
    return bits >= 3.2 and digits >= 2 and changes >= 4


def _email(text: bytes, at: int) -> tuple[int, int] | None:
    """The address around the @ at a byte."""
    if text[at : at + 1] != b"@" or not at:
        return None
    domain = _DOMAIN.match(text, at + 1)
    if not domain:
        return None
    first = begin = max(0, at - _LOCAL_BYTES)
    if text[at - 1 : at] != b'"':  # the search need not begin before what no local part holds
        begin = max(begin, *(text.rfind(mark, begin, at) + 1 for mark in (b" ", b"\n", b"<", b":", b"(", b"=")))
    before = text[begin:at]
    pattern = _LOCALS[2 if before.endswith(b'"') else 1 if _ENDS_IN_IDEOGRAPH.search(before[-3:]) else 0]
    local = pattern.search(before)
    if not local or len(local[0].decode(errors="replace")) > MAX_LOCAL + 2 * local[0].startswith(b'"'):
        return None
    if first and begin + local.start() < first + 4:  # it began before
        return None
    start, end = begin + local.start(), domain.end()
    is_login = _LOGIN_PATH.match(text, end) if local[0] in _LOGINS else _PATH.match(text, end)
    if is_login or (text[max(0, start - 3) : start] == b"://" and text[max(0, start - 9) : start] != b"mailto://"):
        return None
    return start, end


def _is_card(match: re.Match[bytes], text: bytes, at: int) -> bool:
    """Whether the digits of a match are of a network that has such numbers, pass Luhn's check, and are not called otherwise."""
    digits = re.sub(rb"[^0-9]", b"", match["it"])
    if not _ISSUER.fullmatch(digits) or not _luhn(digits):
        return False
    before = text[max(0, at - 40) : at]
    if _CODED.search(before) or _IN_ADDRESS.search(before):
        return False
    # a trade item number has 14 digits too; one number in ten is right as either
    return len(digits) != 14 or len(match["it"]) != 14 or not _gs1(digits) or _PAYS.search(before) is not None


def _gs1(digits: bytes) -> bool:
    """The checksum of barcodes: every second digit from the right counts three times."""
    return (sum(c - 48 for c in digits[-1::-2]) + 3 * sum(c - 48 for c in digits[-2::-2])) % 10 == 0


def _is_address(numbers: bytes, text: bytes, at: int, follows: bool = True) -> bool:
    """Whether four numbers are an address by the words around them, and no version.

    Args:
        follows: whether they may be the second of two versions.
    """
    before, after = text[max(0, at - 40) : at], text[at + len(numbers) : at + len(numbers) + 40]
    if _VERSION.search(before):
        return False
    if _ADDRESSED.search(before) or _PORT.match(after):
        return True
    if numbers[1:4:2] == b".." or _RELEASED.match(after):
        return False
    if follows and (older := _OLDER.search(before)) and not _is_address(older["it"], text, at - len(older[0]), False):
        return False
    first, second = numbers.split(b".")[:2]
    if max(len(first), len(second)) > 2:
        return True
    return not _PRODUCT.search(before) and not (len(second) == 1 and _NAME.search(before))


def confirm(kind: int, text: bytes, at: int) -> tuple[int, int] | None:
    """The finding of one kind whose pattern begins at a byte (of an address, whose @ is there): where it begins and ends."""
    if kind == EMAIL:
        return _email(text, at)
    match: re.Match[bytes] | None
    if kind == IBAN:
        size = _IBAN_SIZES.get(text[at : at + 2].decode("latin-1"))
        match = _iban(size).match(text, at) if size else None
        if match:
            code = re.sub(rb"[^A-Z0-9]", b"", match["it"])
            match = match if int("".join(str(int(chr(c), 36)) for c in code[4:] + code[:4])) % 97 == 1 else None
    elif kind == CARD:
        match = next((match for pattern in _CARDS if (match := pattern.match(text, at)) and _is_card(match, text, at)), None)
    elif kind == SSN:
        match = _SSN.match(text, at)
        before = text[max(0, at - 40) : at] if match else b""
        if match and (_CODED.search(before) if _HYPHENS.fullmatch(match["a"]) else not _SSN_SAID.search(before)):
            match = None  # nine digits in other forms are many things
    elif kind == IP:
        match = _V4.match(text, at)
        if match and not _is_address(match["it"], text, at):
            match = None
        match = match or _V6.match(text, at)
        if match:
            try:
                address = ipaddress.ip_address(match["it"].decode())
            except ValueError:
                return None
            match = match if address.is_global and not address.is_multicast and match["it"].count(b":") != 2 else None
    elif kind == PHONE:
        match = _PHONE.match(text, at)
        if match and text[at] == 43:
            whole = match["it"]
            digits = re.sub(rb"[^0-9]", b"", whole)
            # a bare run of digits may be a signed number, and one point makes a decimal
            bare = len(digits) == len(whole) - 1 and len(digits) < 10
            decimal = len(digits) == len(whole) - 2 and b"." in whole
            match = None if bare or decimal or len(digits) < 8 or _DATE.match(whole) else match
        elif match and any(
            other.search(text[max(0, at - 40) : at]) for other in (_CODED if b"." not in match["it"] else _VERSION, _IN_DOI)
        ):
            match = None
    else:
        match = _PEM.match(text, at)
        if match:
            return match.span("it") if len(match["it"]) > 120 else None  # less is the two lines alone
        match = _TOKEN.match(text, at)
        if match and match["it"][:3] in (b"sk-", b"hf_"):  # also the beginnings of ordinary names
            match = match if _random(match["it"]) or (match["it"][:3] == b"hf_" and not match["it"][3:].islower()) else None
        if not match:
            match = _VALUE.match(text, at)
            match = match if match and _SECRET.search(text[max(0, at - 32) : at]) and _random(match["it"]) else None
    return match.span("it") if match else None
