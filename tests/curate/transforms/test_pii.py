import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.curate.outcome import DOCUMENT, DROPPED
from gristmill.curate.text.text_column import read_only
from gristmill.curate.transforms import pii as module
from gristmill.curate.transforms import pii_patterns as patterns
from gristmill.curate.transforms.pii import Pii, pii, redact
from gristmill.curate.transforms.pii_patterns import KINDS

# Formats from the standards' and the makers' own examples, and what a whole text becomes.
KNOWN = {
    "email": [
        "john.doe@example.com", "x@example.co.uk", "a.b+tag@sub.domain.example.org", "O_1%x@a-b.io", "1234567890@numbers.example",
        "very.long.local.part.with.dots@museum.museum", "j\u00f6rg@example.de", "jose\u0301.p\u00e9rez@example.com",
        "info@m\u00fcller.example",
        "\u043f\u043e\u0447\u0442\u0430@\u043f\u0440\u0438\u043c\u0435\u0440.\u0440\u0444", "\u7528\u6237@\u4f8b\u5b50.\u516c\u53f8",
        "o'brien@example.ie", "d\u2019angelo@example.it",
        '"two words"@example.com', '"john..doe"@example.com', "a+b+c@xn--mller-kva.example", "git@gitmail.example.com",
    ],
    "phone": [
        "+1 415 555 2671", "+1-415-555-2671", "+1 (415) 555-2671", "+14155552671", "(415) 555-2671", "(415)555-2671", "415-555-2671",
        "415.555.2671", "415 555-2671", "1-800-555-0199", "1 (800) 555-0199", "1.800.555.0199", "+44 20 7946 0958", "+442079460958",
        "+44 (0)20 7946 0958", "+33 1 23 45 67 89", "+49 30 901820", "+49 (0)30 12345678", "+49-89-636-48018", "+7 (495) 123-45-67",
        "+86 138 0013 8000", "+91 98765 43210", "+61 2 9374 4000", "+353 1 234 5678", "+55 (11) 91234-5678", "+852 2345 6789",
        "+46 8 123 456 78", "+39 06 1234 5678", "555-123-4567",
        "+49\u00a030\u00a0901820", "415\u2011555\u20112671", "(415)\u00a0555\u20132671", "+1\u2009415\u2009555\u20092671",
        "+44\u202f20\u202f7946\u202f0958",
    ],
    "ip": [
        "52.95.110.1", "203.1.113.77", "8.26.56.26", "104.16.132.229", "223.255.255.254", "2606:4700:4700::1111", "2001:4860:4860::8888",
        "2a00:1450:4001:081b:0000:0000:0000:200e", "2A00:1450:4001:81B::200E", "11.22.33.44",
    ],
    "card": [
        "4111 1111 1111 1111", "4111-1111-1111-1111", "4111111111111111", "5555555555554444", "2223003122003222", "378282246310005",
        "3782 822463 10005", "6011111111111117", "30569309025904", "3056 930902 5904", "3530111333300000", "6200000000000005",
        "2221000000000009", "2720990000000007", "6011-5776-3171-1174", "4111\u00a01111\u00a01111\u00a01111",
        "4111\u20111111\u20111111\u20111111",
            ],
    "iban": [
        "DE89 3704 0044 0532 0130 00", "DE89370400440532013000", "GB82 WEST 1234 5698 7654 32", "FR14 2004 1010 0505 0001 3M02 606",
        "NL91 ABNA 0417 1643 00", "BE68 5390 0754 7034", "NO93 8601 1117 947", "CH93 0076 2011 6238 5295 7", "ES9121000418450200051332",
        "IT60 X054 2811 1010 0000 0123 456", "PL61 1090 1014 0000 0712 1981 2874", "MT84MALT011000012345MTLCAST001S",
        "SE4550000000058398257466", "SA03 8000 0000 6080 1016 7519", "AE07 0331 2345 6789 0123 456", "AT61 1904 3002 3457 3201",
        "BR1800360305000010009795493C1", "DE89\u00a03704\u00a00044\u00a00532\u00a00130\u00a000", "DE89-3704-0044-0532-0130-00",
    ],
    "ssn": ["123-45-6789", "001-01-0001", "899-99-9999", "123\u201145\u20116789", "123\u201345\u20136789"],
    "key": [
        "sk-proj-4f9Kd82hGh3kLmN0pQrStUv7", "sk-4f9Kd82hGh3kLmN0pQrS", "ghp_16C7e42F292c6912E7710c838347Ae178B4a", "gho_" + "a1B2" * 9,
        "github_pat_11ABCDE0aBcDeFgHiJkLmNo", "AKIAIOSFODNN7EXAMPLE", "xoxb-123456789012-abcdefABCDEF", "AIza" + "Sy0_-" * 7,
        "glpat-abcdefghij1234567890", "hf_aBcDeFgHiJkLmNoPqRsTuVwXyZaBcDeFgH", "npm_" + "a1B2" * 9, "sk_live_" + "a1B2" * 6,
        "gsk_" + "a1B2" * 12, "xai-" + "a1B2" * 20, "SG." + "a1B2" * 5 + "-_." + "a1B2" * 10 + "a1B",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U",
        "-----BEGIN RSA PRIVATE KEY-----\n" + "MIIEpAIBAAKCAQEA3Tz2mr7SZiAMfQyuvBjM9Oi\n" * 4 + "-----END RSA PRIVATE KEY-----",
        "-----BEGIN OPENSSH PRIVATE KEY-----\n" + "b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9u\n" * 4 + "-----END OPENSSH PRIVATE KEY-----",
    ],
}  # fmt: skip
AROUND = ["{}", "Write to {}.", "({})", "x, {}, y", "<b>{}</b>", '"{}"', "“{}”", "电话：{}。", "a\n{}\nb", "{}; {}", "see: {}!"]

ASSIGNED = [
    'password = "{}"', "API_KEY={}", "api-key: '{}'", '"client_secret": "{}"', "token => '{}'", "auth_token := \"{}\"", "db_passwd:{}\n",
    "Authorization: Bearer {}", '{{"authorization": "bearer {}"}}',
]  # fmt: skip

# What is not personal, however much it looks so.
HARMLESS = [
    "doi:10.1234/415-555-2671",
    "", " ", "@", "a@", "@b.com", "2024-01-31", "2024-01-31T23:59:59.123456Z", "2024-01-31 10:20:30 +0530", "31.12.2024", "12/31/2024",
    "20240131123456", "1706659199", "1706659199123", "1706659199123456789", "+2024-01-31", "x = 1 +12345678", "+1.234567890123",
    "3.14159265358979", "0.4111111111111111", "-1234567.89e+10", "1,234,567,890", "1 234 567 890", "version 52.95.110.1", "v52.95.110.1",
    'Version="52.10.0.1"', "Chrome/91.0.44.124", "foo-1.2.3.4.tar.gz", "1.2.3.4", "2.1.34.5", "==12.4.5.8", "pkg-12.11.3.8-py3",
    "1.3.6.1.4.1.311", "256.100.100.100", "300.1.1.1", "127.0.0.1", "0.0.0.0", "10.1.2.3", "192.168.1.1", "172.16.5.4", "169.254.0.1",
    "255.255.255.0", "192.0.2.44", "224.0.0.251", "::1", "::", "fe80::1", "2001:db8::1", "std::string", "a::b", "x[2000::2]",
    "x[2000:3000:2]", "12:34:56:78", "de:ad:be:ef:00:01", "d41d8cd98f00b204e9800998ecf8427e",
    "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08", "123e4567-e89b-12d3-a456-426614174000",
    "4222222222222", "978-3-16-148410-0", "ISBN 9783161484100", "0-306-40615-2", "000-12-3456", "666-12-3456", "900-12-3456", "123-00-4567",
    "123-45-0000", "1123-45-6789", "123-45-67890", "123-45-6789-1", "1-123-45-6789", "115-555-2671", "1415-555-2671", "415-555-26711",
    "415-555-2671-0", "4111 1111 1111 1112", "4111111111111112", "0000000000000000", "1234567812345670", "DE89 3704 0044 0532 0130 01",
    "ZZ89 3704 0044 0532 0130 00", "DE89 3704 0044 0532 0130", "ABCD1234", "AB12 CD34", "logo@2x.png", "icon@home.png", "A@B.mean()",
    "@app.route", "user@localhost", "foo@1.2.3", "sk-estimator-doc-link-hover-2", "hf_transformers_cache_directory_x",
    "token = tokenizer_get_next_token", "password = os_environ_password_1", "api_key: your-api-key-goes-here",
    "key = 4f9Kd82hGh3kLmN0pQrS", "password: short1", "eyJhbGciOiJIUzI1NiJ9", "ghp_short", "AKIAIOSFODNN7EXAMPL",
    "-----BEGIN PUBLIC KEY-----", "_START = '-----BEGIN PRIVATE KEY-----'\n_END = '-----END PRIVATE KEY-----'", "$1,415.55", "(123) 456",
    "git clone git@github.com:org/repo.git", "git@host.example.com:~user/repo", "me@host.example.com:/srv/x", "ssh://user@svn.example.com/x",
    "deploy@web.example.com:app", "rsync me@host.example.com::module", "test@fonts.woff2", "EAN 4131672754818", "EAN-13: 4006381333931",
    "4131672754818", "IMEI 356938035643809", "GTIN 30614141999996", "1748503543012", "1748503543012345678", "2.4670000000000001E-2",
    "8.46786664623715e-47", "4111111111111111.25", "0.4111111111111111", "+37.7749295", "+40.7128 -74.0060", "+999 123456789",
    "version 2.415.555.2671", "FFmpeg 11.22.33.44 was released", "FFmpeg 11.22.33.44", "firmware 23.45.12.8", "Chrome 91.0.44.124 fixes it",
    "install Skype 12.33.44.55", "MariaDB 11.22.33.44 to 12.33.44.55", "upgraded from 23.45.12.8 to 24.33.44.55", "23.45.12.8 or later",
    "part 123-45-6789", "serial no. 415-555-2671",
    "version_number = '52.1.2.3'", "123 45 6789", "123456789", "12\u2013123\u201345\u20136789", "f(200) 300", "(200, 300)", "#415",
    "1 + 1 = 2", "10.1000/182", "arXiv:2412.02595", "git log -p --since=2.weeks", "+-+-+-+-+",
]  # fmt: skip


def slow(text: str, kinds: tuple[str, ...] = KINDS) -> tuple[str, Counter[str]]:
    """The same detectors, tried at every byte of the text."""
    raw, counts = text.encode(), Counter[str]()
    for _ in range(module.ROUNDS):
        spans = [
            (*span, kind)
            for at in range(len(raw))
            for kind in range(len(KINDS))
            if KINDS[kind] in kinds and (span := patterns.confirm(kind, raw, at))
        ]
        merged = list(module._merged(spans))
        if not merged:
            break
        for begin, end, kind in reversed(merged):
            raw = raw[:begin] + f"<{KINDS[kind].upper()}>".encode() + raw[end:]
            counts[KINDS[kind]] += 1
    return raw.decode(), counts


def documents(texts: list[str]) -> pa.Table:
    return pa.table([[f"d{i}" for i in range(len(texts))], texts, ["test"] * len(texts), ["{}"] * len(texts)], schema=DOCUMENT)


@pytest.mark.parametrize("kind", KINDS)
def test_known_formats_are_found_whole(kind: str) -> None:
    for value in KNOWN[kind]:
        for frame in AROUND:
            want = frame.replace("{}", f"<{kind.upper()}>")
            assert redact(frame.replace("{}", value)) == (want, {kind: frame.count("{}")}), (value, frame)
        assert redact(value, [k for k in KINDS if k != kind])[1][kind] == 0


@pytest.mark.parametrize("frame", ASSIGNED)
def test_assigned_secrets_are_found(frame: str) -> None:
    for value in (
        "aK39fjQ02lsPq8xZ",
        "9f86d081884c7d659a2feaa0c55ad015",
        "wJalrXUtnF3MI/K7MDENG/bPxRfi4CYE9KEY",
        "QWxhZGRpbjpvc2Vz1YW1l0A5==",
    ):
        assert redact(frame.format(value)) == (frame.format("<KEY>"), {"key": 1})


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_not_personal_stays(text: str) -> None:
    assert redact(text) == (text, {})
    assert redact(f"see {text} there") == (f"see {text} there", {})


def luhn(prefix: str, size: int) -> str:
    """A number of a prefix with the last digit that ISO/IEC 7812 asks for."""
    body = prefix.ljust(size - 1, "3")
    return next(body + digit for digit in "0123456789" if patterns._luhn((body + digit).encode()))


@pytest.mark.parametrize(
    ("network", "prefix", "size"),
    [
        ("Mastercard", "2221", 16), ("Mastercard", "2720", 16), ("UnionPay", "62", 16), ("UnionPay", "62", 19), ("UnionPay", "8171", 16),
        ("RuPay", "60", 16), ("RuPay", "6521", 16), ("RuPay", "82", 16), ("RuPay", "508", 16), ("Mir", "2200", 16), ("Mir", "2204", 19),
        ("Elo", "506699", 16), ("Elo", "506778", 16), ("Elo", "509", 16), ("Elo", "636368", 16), ("Elo", "438935", 16),
        ("Verve", "506100", 19),
        ("Troy", "9792", 16), ("Maestro", "6759", 16), ("JCB", "3589", 16), ("Diners Club", "36", 14), ("Visa", "4", 19),
    ],
)  # fmt: skip
def test_the_networks_numbers_are_cards(network: str, prefix: str, size: int) -> None:
    number = luhn(prefix, size)
    assert redact(f"card {number}, thanks") == ("card <CARD>, thanks", {"card": 1})
    for other in (luhn(prefix, 13), luhn(prefix, 20), luhn("7" + prefix[1:], size), luhn("1" + prefix[1:], size)):
        assert redact(f"number {other}") == (f"number {other}", {})


def test_words_around_a_number_say_what_it_is() -> None:
    for text, want in (
        ("SSN: 123456789", "SSN: <SSN>"),
        ("social security number is 123 45 6789", "social security number is <SSN>"),
        ("DNS 8.8.8.8, ping 1.1.1.1", "DNS <IP>, ping <IP>"),
        ("from 93.184.216.34:80", "from <IP>:80"),
        ("Blocked 52.95.110.1", "Blocked <IP>"),
        ("pay with 4111 1111 1111 1111 123", "pay with <CARD> 123"),
        ("a@b.com:hunter2", "<EMAIL>:hunter2"),
        ("b'john@example.com'", "b'<EMAIL>'"),
        ("\u8bf7\u8054\u7cfbabc@example.com\u8c22\u8c22", "\u8bf7\u8054\u7cfb<EMAIL>\u8c22\u8c22"),
        ("abc@example.com\uc73c\ub85c", "<EMAIL>\uc73c\ub85c"),
    ):
        assert redact(text)[0] == want
        assert redact(want) == (want, {})


@pytest.mark.parametrize("kind", ["card", "iban"])
def test_one_wrong_digit_is_not_found(kind: str) -> None:
    for value in KNOWN[kind]:
        for at in [i for i, c in enumerate(value) if c.isdigit()]:
            for digit in {"0", "4", "9"} - {value[at]}:
                assert redact(value[:at] + digit + value[at + 1 :], [kind])[1] == {}


def test_luhn_by_definition() -> None:
    for number in ("79927398713", "0", "18", "4111111111111111"):
        assert patterns._luhn(number.encode())
        wrong = number[:-1] + str((int(number[-1]) + 1) % 10)
        assert not patterns._luhn(wrong.encode())


FRAGMENTS = st.sampled_from(
    [value for values in KNOWN.values() for value in values if len(value) < 60]
    + [t for t in HARMLESS if len(t) < 60]
    + [
        "\u00a0", "\u2011", "\u00f6", "\u8bf7", ":/", "://", "SSN ", "EAN ", "version ", "from ", " to ", "Skype ", "d'", " was released",
        "password=", "token: ", "key:", "=", ":", ">", "'", '"', " ", "\n", "-", ".", "+", "(", ")", "/", "_", "@", "é", "中", "1", "44",
        "415", "2001", "a", "Z", "x.com",
    ]
)  # fmt: skip
TEXTS = st.lists(FRAGMENTS, max_size=12).map("".join)
NOISE = st.text(alphabet="0123456789 .-+():@aA/=xZ", max_size=60)


@settings(max_examples=300)
@given(st.one_of(TEXTS, NOISE))
def test_the_scan_misses_nothing(text: str) -> None:
    assert redact(text) == slow(text)


@settings(max_examples=300)
@given(st.one_of(TEXTS, NOISE))
def test_redacting_twice_changes_nothing(text: str) -> None:
    once, _ = redact(text)
    assert redact(once) == (once, {})


@settings(max_examples=60)
@given(st.lists(st.one_of(TEXTS, NOISE), max_size=6), st.integers(0, 2))
def test_a_column_is_its_texts(texts: list[str], skip: int) -> None:
    outcome = pii(documents(texts).slice(skip), Pii())
    each = [redact(text) for text in texts[skip:]]
    assert outcome.kept["text"].to_pylist() == [text for text, _ in each]
    assert outcome.kept["id"].to_pylist() == [f"d{i}" for i in range(len(texts))][skip:]
    assert outcome.counts == sum((counts for _, counts in each), Counter())
    assert outcome.kept.schema == DOCUMENT and outcome.dropped.schema == DROPPED


def test_neighbours_do_not_join() -> None:
    # the last bytes of one document and the first of the next are no finding
    table = documents(["415-555", "-2671", "a@", "b.com", "", "x"])
    assert pii(table, Pii()).kept.equals(table)


def test_documents_with_too_many_findings_are_dropped() -> None:
    table = documents(["none", "a@b.com", "a@b.com and c@d.org", ""])
    outcome = pii(table, Pii(action="drop", max_findings=1))
    assert outcome.kept["text"].to_pylist() == ["none", "a@b.com", ""]
    assert outcome.dropped.select(["id", "step", "reason", "figure", "limit"]).to_pylist() == [
        {"id": "d2", "step": "pii", "reason": "pii", "figure": 2.0, "limit": 1.0}
    ]
    assert outcome.counts == {"email": 3}


def test_only_the_kinds_asked_for() -> None:
    text = "a@b.com, 415-555-2671"
    assert redact(text, ["phone"]) == ("a@b.com, <PHONE>", {"phone": 1})
    assert pii(documents([text]), Pii(kinds=["email"])).kept["text"].to_pylist() == ["<EMAIL>, 415-555-2671"]


def test_overlaps_are_hidden_whole() -> None:
    text, counts = redact("password='sk-4f9Kd82hGh3kLmN0pQrS' +1 (415) 555-2671")
    assert (text, counts) == ("password='<KEY>' <PHONE>", {"key": 1, "phone": 1})


def test_empty_and_tiny_documents() -> None:
    assert pii(DOCUMENT.empty_table(), Pii()).kept.num_rows == 0
    table = documents(["", "a", "\n", "one line", "é", "@", "+", "(", "-", "=", "1"])
    assert pii(table, Pii()).kept.equals(table)


@pytest.mark.parametrize(
    "unit",
    [
        "1", "@", "a@", "1 ", "1.", "1-", "+1", "(", "(415)", "+1 ", "a.", "a-", "%", ":", "2001:", "2::", "=", "key=1a", "password=",
        "4111 ", "AB12", "AB12 ", "eyJ.", "eyJaaaaaaaa.", "sk-", "-", "-----BEGIN PRIVATE KEY-----", "a@a.", "@a.b", "x@y.co", " ", "é",
    ],
)  # fmt: skip
def test_hostile_texts_end(unit: str) -> None:
    text = unit * (500_000 // len(unit))
    redacted, counts = redact(text)
    assert len(re.findall("<[A-Z]+>", redacted)) == counts.total()


def test_long_lines_of_digits_and_signs_end() -> None:
    for unit in ("7", "@"):
        assert redact(unit * 5_000_000)[1] == {}


def test_the_scan_names_few_places_in_prose() -> None:
    text = "The quick brown fox, at 12:30 on 3 May 2024, jumped over 13 lazy dogs (see https://example.org/a?b=c). " * 50
    data_B, begin_N = np.frombuffer(text.encode(), np.uint8), np.array([0, len(text)])
    where, _ = module._scan(*map(read_only, (data_B, begin_N)), module._CLASSES, module._key_starts())
    assert len(where) < len(text) / 300
