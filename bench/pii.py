"""Precision and recall of the step pii, by kind, on a labelled set made of templates with a fixed seed.

    PYTHONPATH=src python bench/pii.py            # both parts
    PYTHONPATH=src python bench/pii.py --misses   # and what went wrong in the part to look at

Each kind has 300 positives, of which the whole value and nothing else must be replaced, and 300 negatives that look like it. Values are
drawn at random, with the checksums that the standards ask for; what is not of a kind is drawn so that it passes as much of the kind's
checks as it can. The templates are dealt to two parts: one to look at, and one held out, on which nothing was tuned.
"""

import argparse
import random
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gristmill.curate.transforms.pii import redact
from gristmill.curate.transforms.pii_patterns import KINDS
from gristmill.evaluate.stats import wilson

SEED = 20240229
NUM = 300  # of each sort and kind
Rng = random.Random
Make = Callable[[Rng], str]


def digits(rng: Rng, num: int) -> str:
    return "".join(rng.choices(string.digits, k=num))


def letters(rng: Rng, num: int) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=num))


def pick(*values: str) -> Make:
    return lambda rng: rng.choice(values)


NAMES = ("anna", "peter", "maria", "jonas", "wei", "fatima", "olga", "carlos", "priya", "tom")
SURNAMES = ("smith", "garcia", "mueller", "novak", "tanaka", "rossi", "ivanova", "dubois", "khan", "lee")
ACCENTED = (
    "j\u00f6rg", "jos\u00e9", "zo\u00eb", "fran\u00e7ois", "\u0142ukasz",
    "s\u00f8ren", "andr\u00e9.p\u00e9rez", "\u043e\u043b\u044c\u0433\u0430", "\u03bd\u03af\u03ba\u03bf\u03c2", "o'brien",
    "d'angelo",
)  # fmt: skip
HOSTS = ("example.com", "mail.example.org", "uni-test.example.edu", "example.co.uk", "post.example.de", "web.example.io")
IDN = (
    "m\u00fcller.example", "b\u00fccher.example.de", "\u043f\u0440\u0438\u043c\u0435\u0440.\u0440\u0444", "xn--mller-kva.example",
    "caf\u00e9.example.fr",
)  # fmt: skip
BLANKS = (" ", "\u00a0", "\u202f", "\u2009", "\u2007")
HYPHENS = ("-", "\u2010", "\u2011", "\u2012", "\u2013", "\u2212")

# ---- numbers with their checksums ----


def luhn(body: str) -> str:
    """A number with the last digit that ISO/IEC 7812 asks for."""
    total = sum(int(c) if i % 2 else sum(divmod(2 * int(c), 10)) for i, c in enumerate(reversed(body)))
    return body + str(-total % 10)


def ean(body: str) -> str:
    """A number with the last digit that GS1 asks for."""
    return body + str(-sum(int(c) * (1 if i % 2 else 3) for i, c in enumerate(reversed(body))) % 10)


def both(make: Callable[[], str]) -> str:
    """A number of a GS1 code that passes Luhn's check too."""
    while luhn((number := make())[:-1]) != number:
        pass
    return number


def card(rng: Rng, prefix: str, size: int) -> str:
    return luhn(prefix + digits(rng, size - 1 - len(prefix)))


def grouped(number: str, mark: str) -> str:
    sizes = (4, 6, 5) if len(number) == 15 else (4, 6, 4) if len(number) == 14 else (4, 4, 4, 4, 3)
    parts, at = [], 0
    for size in sizes:
        if number[at : at + size]:
            parts.append(number[at : at + size])
        at += size
    return mark.join(parts)


def iban(rng: Rng, country: str, body: str) -> str:
    sets = {"n": string.digits, "a": string.ascii_uppercase, "c": string.ascii_uppercase + string.digits}
    filled = "".join(rng.choice(sets[c]) for c in body)
    number = int("".join(str(int(c, 36)) for c in f"{filled}{country}00"))
    return f"{country}{98 - number % 97:02d}{filled}"


IBANS = {
    "DE": "n" * 18, "GB": "aaaa" + "n" * 14, "FR": "n" * 10 + "c" * 11 + "nn", "NL": "aaaa" + "n" * 10, "NO": "n" * 11, "ES": "n" * 20,
    "CH": "nnnnn" + "c" * 12, "IT": "a" + "n" * 10 + "c" * 12, "PL": "n" * 24, "MT": "aaaa" + "nnnnn" + "c" * 18, "SA": "nn" + "c" * 18,
    "BE": "n" * 12,
}  # fmt: skip


def any_iban(rng: Rng) -> str:
    country = rng.choice(list(IBANS))
    return iban(rng, country, IBANS[country])


def in_fours(text: str, mark: str = " ") -> str:
    return mark.join(text[at : at + 4] for at in range(0, len(text), 4))


def octets(rng: Rng, first: tuple[int, int] = (11, 223)) -> str:
    while (a := rng.randint(*first)) in (100, 127, 169, 172, 192, 198, 203):
        pass
    return ".".join(map(str, (a, rng.randint(10, 255), rng.randint(0, 255), rng.randint(1, 254))))


def small(rng: Rng) -> str:
    return ".".join(map(str, (rng.randint(11, 60), rng.randint(0, 99), rng.randint(0, 99), rng.randint(0, 99))))


def v6(rng: Rng) -> str:
    start = [rng.choice(("2a00", "2606", "2001", "2400", "2804")), f"{rng.randint(0x500, 0xCFF):x}"]
    parts = start + [f"{rng.randint(0, 0xFFFF):x}" for _ in range(6)]
    if rng.random() < 0.5:
        at = rng.randint(2, 4)
        return ":".join(parts[:at]) + "::" + ":".join(parts[at + 3 :])
    return ":".join(parts)


def secret(rng: Rng, num: int) -> str:
    return "".join(rng.choices(string.ascii_letters + string.digits, k=num - 4)) + "a1B2"


# ---- the templates: (positive values, sentences around them, texts without any) ----


@dataclass
class Templates:
    values: list[Make]
    frames: list[str]
    negatives: list[Make]


PROSE = [
    "{}", "My details are {} as before.", "({})", "see {}, please", "<td>{}</td>", '{{"value": "{}"}}', "a;b;{};d",
    "\u8bf7\u8bb0\u4e0b\uff1a{}\u3002",
    "\u201c{}\u201d", "- {}\n- next", "Notiz: {}!", "| x | {} |",
]  # fmt: skip


def epoch(rng: Rng) -> str:
    return str(rng.randint(1_000_000_000, 1_999_999_999)) + digits(rng, rng.choice((0, 3, 6, 9)))


TEMPLATES = {
    "email": Templates(
        [
            lambda r: f"{r.choice(NAMES)}.{r.choice(SURNAMES)}@{r.choice(HOSTS)}",
            lambda r: f"{r.choice(ACCENTED)}@{r.choice(HOSTS)}",
            lambda r: f"{r.choice(NAMES)}+{letters(r, 5)}@{r.choice(HOSTS)}",
            lambda r: f"{r.choice(NAMES)}@{r.choice(IDN)}",
            lambda r: f"{r.choice(NAMES)}_{digits(r, 3)}%{letters(r, 2)}@{r.choice(HOSTS)}",
            lambda r: f"{r.choice(ACCENTED)}.{r.choice(SURNAMES)}+{letters(r, 3)}@{r.choice(IDN)}",
            lambda r: f"git@{r.choice(HOSTS)}",
            lambda r: f'"{r.choice(NAMES)} {r.choice(SURNAMES)}"@{r.choice(HOSTS)}',
        ],
        [frame for frame in PROSE if '"{}"' not in frame and "\u201c" not in frame]
        + ["mailto:{}", "<{}>", "Mail an {}: danke", "{} wrote:", "To: {}"],
        [
            lambda r: f"git clone git@{r.choice(HOSTS)}:{letters(r, 5)}/{letters(r, 6)}.git",
            lambda r: f"scp out.tar {r.choice(NAMES)}@{r.choice(HOSTS)}:/srv/{letters(r, 4)}",
            lambda r: f"ssh://git@{r.choice(HOSTS)}/{letters(r, 4)}.git",
            lambda r: f"icon_{letters(r, 4)}@{r.randint(2, 4)}x.png and hero@{letters(r, 4)}.webp",
            lambda r: f"npm install @{letters(r, 5)}/{letters(r, 4)}@{r.randint(1, 9)}.{r.randint(0, 9)}.{r.randint(0, 9)}",
            lambda r: f"C = A@B.{letters(r, 4)}()",
            lambda r: f"@{letters(r, 4)}.route('/{letters(r, 3)}')",
            lambda r: f"{letters(r, 5)}@localhost and root@{letters(r, 6)}",
            lambda r: f"rsync -a src/ deploy@{r.choice(HOSTS)}:www/{letters(r, 4)}",
            lambda r: f"follow @{letters(r, 6)} on the net, 5 @ 3.50 each",
            lambda r: f"hg clone ssh://hg@{r.choice(HOSTS)}//{letters(r, 4)}",
            lambda r: f"pip install {letters(r, 4)}@{r.randint(1, 9)}.{r.randint(0, 20)}",
        ],
    ),
    "phone": Templates(
        [
            lambda r: f"+1{r.choice(BLANKS)}{r.randint(201, 989)}{r.choice(BLANKS)}555{r.choice(BLANKS)}{digits(r, 4)}",
            lambda r: f"({r.randint(201, 989)}) {r.randint(201, 989)}-{digits(r, 4)}",
            lambda r: r.choice(HYPHENS).join((str(r.randint(201, 989)), str(r.randint(201, 989)), digits(r, 4))),
            lambda r: f"+44 20 {digits(r, 4)} {digits(r, 4)}",
            lambda r: f"+49{r.choice(BLANKS)}(0){r.randint(30, 89)}{r.choice(BLANKS)}{digits(r, 8)}",
            lambda r: f"+33{(b := r.choice(BLANKS))}1{b}{digits(r, 2)}{b}{digits(r, 2)}{b}{digits(r, 2)}{b}{digits(r, 2)}",
            lambda r: f"+4479{digits(r, 8)}",
            lambda r: f"+91{r.choice(HYPHENS)}98{digits(r, 3)}{r.choice(HYPHENS)}{digits(r, 5)}",
            lambda r: f"{r.randint(201, 989)}.{r.randint(201, 989)}.{digits(r, 4)}",
            lambda r: f"+7 ({r.randint(900, 999)}) {digits(r, 3)}-{digits(r, 2)}-{digits(r, 2)}",
        ],
        [*PROSE, "Tel. {}", "call {} today", "Phone:{}", "tel:{}", "fax {} / office"],
        [
            lambda r: f"at {epoch(r)} the job ended",
            lambda r: f"loss {r.random():.16f} after {digits(r, 7)} steps",
            lambda r: f"{r.random() * 9 + 1:.15f}e-{r.randint(1, 40)}",
            lambda r: f"on 20{r.randint(10, 29)}-0{r.randint(1, 9)}-{r.randint(10, 28)} 10:{r.randint(10, 59)}:00 +0{r.randint(1, 9)}00",
            lambda r: f"ISBN 978-{r.randint(0, 9)}-{digits(r, 3)}-{digits(r, 5)}-{r.randint(0, 9)}",
            lambda r: f"EAN {ean('400' + digits(r, 9))}",
            lambda r: f"x = {digits(r, 4)} +{digits(r, 8)}",
            lambda r: f"+{r.randint(1, 9)}.{digits(r, 12)}",
            lambda r: f"version {r.randint(1, 9)}.{digits(r, 3)}.{digits(r, 3)}.{digits(r, 4)}",
            lambda r: f"{digits(r, 3)},{digits(r, 3)},{digits(r, 3)} inhabitants, {digits(r, 3)} {digits(r, 3)} {digits(r, 3)} in all",
            lambda r: f"order {digits(r, 10)} of {digits(r, 12)}",
            lambda r: f"pages {r.randint(200, 400)}\u2013{r.randint(401, 500)}, 19{r.randint(10, 49)}\u201319{r.randint(50, 99)}",
            lambda r: f"id +{r.choice(('999', '210', '259', '969'))}{digits(r, 9)}",
        ],
    ),
    "card": Templates(
        [
            lambda r: card(r, "4", 16),
            lambda r: grouped(card(r, str(r.randint(51, 55)), 16), " "),
            lambda r: grouped(card(r, str(r.randint(2221, 2720)), 16), r.choice(BLANKS)),
            lambda r: card(r, r.choice(("34", "37")), 15),
            lambda r: grouped(card(r, "62", r.choice((16, 19))), r.choice(HYPHENS)),
            lambda r: grouped(card(r, r.choice(("6521", "6069", "8172", "8201", "5085")), 16), r.choice(BLANKS)),
            lambda r: card(r, str(r.randint(2200, 2204)), 16),
            lambda r: grouped(card(r, r.choice(("506707", "636368", "509012", "438935", "650720")), 16), " "),
            lambda r: grouped(card(r, r.choice(("34", "37")), 15), r.choice(HYPHENS)),
            lambda r: card(r, r.choice(("6011", "644", "65", "3528")), 16),
            lambda r: card(r, r.choice(("36", "300", "38")), 14),
        ],
        [*PROSE, "Card {} exp 09/29", "pay with {}", "PAN={}", "card no. {}"],
        [
            lambda r: f"EAN {both(lambda: ean(r.choice(('40', '41', '54', '59')) + digits(r, 10)))}",
            lambda r: f"ISBN {both(lambda: ean('978' + digits(r, 9)))}",
            lambda r: f"barcode {both(lambda: ean(r.choice(('3', '5')) + digits(r, 12)))}",
            lambda r: f"at {epoch(r)} and {epoch(r)}",
            lambda r: f"{r.randint(2, 6)}.{digits(r, 15)} and 0.{card(r, '4', 16)}",
            lambda r: f"{card(r, '4', 16)[:-1]}{(int(card(r, '4', 16)[-1]) + 5) % 10}x",
            lambda r: f"{both(lambda: ean(r.choice(('40', '50', '61')) + digits(r, 10)))} in stock",
            lambda r: f"GTIN {both(lambda: ean('30' + digits(r, 11)))}",
            lambda r: f"IMEI {luhn('35' + digits(r, 12))}",
            lambda r: f"order 7{luhn(digits(r, 14))} and 1{luhn(digits(r, 14))}",
            lambda r: f"{card(r, '4', 16)[:-2]}.{digits(r, 4)}e-{r.randint(2, 9)}",
            lambda r: f"uuid {digits(r, 8)}-{digits(r, 4)}-4{digits(r, 3)}-8{digits(r, 3)}-{digits(r, 12)}",
        ],
    ),
    "iban": Templates(
        [
            any_iban,
            lambda r: in_fours(any_iban(r)),
            lambda r: in_fours(any_iban(r), r.choice(BLANKS)),
            lambda r: in_fours(iban(r, "DE", "n" * 18)),
            lambda r: in_fours(any_iban(r), "\u00a0"),
            lambda r: iban(r, "GB", "aaaa" + "n" * 14),
        ],
        [*PROSE, "IBAN {}", "IBAN: {}", "Konto {} bei der Bank", "virement {} merci"],
        [
            lambda r: (v := any_iban(r))[:2] + f"{(int(v[2:4]) + 7) % 100:02d}" + v[4:],
            lambda r: in_fours((v := iban(r, "ES", "n" * 20))[:-1] + str((int(v[-1]) + 3) % 10)),
            lambda r: f"ZZ{digits(r, 20)}",
            lambda r: f"part DE{digits(r, 9)}",
            lambda r: f"AB{digits(r, 2)} CD{digits(r, 2)} EF{digits(r, 2)}",
            lambda r: any_iban(r) + digits(r, 3),
            lambda r: "x" + any_iban(r),
            lambda r: f"VAT GB{digits(r, 9)}",
            lambda r: f"flight LH{digits(r, 4)} seat A{digits(r, 2)}",
            lambda r: any_iban(r)[:-2],
            lambda r: f"sku NO{digits(r, 13)[:-1]}x",
            lambda r: f"SHA {secret(r, 24).upper()}",
        ],
    ),
    "ssn": Templates(
        [
            lambda r: f"{r.randint(1, 665):03d}-{r.randint(1, 99):02d}-{r.randint(1, 9999):04d}",
            lambda r: (r.choice(HYPHENS)).join((f"{r.randint(667, 899):03d}", f"{r.randint(1, 99):02d}", f"{r.randint(1, 9999):04d}")),
            lambda r: "\u2011".join((f"{r.randint(1, 665):03d}", f"{r.randint(1, 99):02d}", f"{r.randint(1, 9999):04d}")),
            lambda r: "\u2013".join((f"{r.randint(1, 665):03d}", f"{r.randint(1, 99):02d}", f"{r.randint(1, 9999):04d}")),
        ],
        [*PROSE, "SSN {}", "SSN: {}", "social security number {} of", "ssn={}"],
        [
            lambda r: f"{r.choice(('000', '666', '900', '987'))}-{r.randint(1, 99):02d}-{digits(r, 4)}",
            lambda r: f"{r.randint(1, 665):03d}-00-{digits(r, 4)}",
            lambda r: f"{r.randint(1, 665):03d}-{r.randint(10, 99)}-0000",
            lambda r: f"{r.randint(1, 9)}-{digits(r, 3)}-{digits(r, 2)}-{digits(r, 4)}",
            lambda r: f"on {digits(r, 2)}-{digits(r, 2)}-{digits(r, 4)}",
            lambda r: f"part {digits(r, 3)}-{digits(r, 2)}-{digits(r, 5)}",
            lambda r: f"call {r.randint(201, 989)}-555-{digits(r, 4)}",
            lambda r: f"{digits(r, 3)} {digits(r, 2)} {digits(r, 4)} rows",
            lambda r: f"ISBN 0-{digits(r, 3)}-{digits(r, 5)}-{r.randint(0, 9)}",
            lambda r: f"zip {digits(r, 5)}-{digits(r, 4)}, EIN {digits(r, 2)}-{digits(r, 7)}",
            lambda r: f"{digits(r, 3)}-{digits(r, 2)}-{digits(r, 4)}-{digits(r, 2)}",
            lambda r: f"model A{digits(r, 3)}-{digits(r, 2)}-{digits(r, 4)}",
        ],
    ),
    "ip": Templates(
        [
            octets,
            v6,
            lambda r: octets(r, (101, 220)),
            lambda r: v6(r).upper(),
            lambda r: octets(r, (11, 99)),
            octets,
        ],
        [
            *PROSE,
            "from {}:443",
            "http://{}/index.html",
            "ping {}",
            "the server {} answered",
            "Failed password for root from {} port 22",
            "IP address {}",
            '{} - - [10/Oct/2024:13:55:36] "GET /"',
            "host={}",
            "ssh root@{}",
        ],  # fmt: skip
        [
            lambda r: f"{r.choice(('FFmpeg', 'LibreOffice', 'Flash Player', 'OpenSSL', 'Firefox'))} {small(r)} was released",
            lambda r: f"firmware {small(r)}",
            lambda r: f"version {octets(r)}",
            lambda r: f"update to {small(r)} or later",
            lambda r: f"{letters(r, 6)}-{small(r)}.tar.gz",
            lambda r: f"v{octets(r)}",
            lambda r: f"build {small(r)}, driver {small(r)}",
            lambda r: f"{letters(r, 5)}=={small(r)}",
            lambda r: f"192.168.{r.randint(0, 255)}.{r.randint(1, 254)} and 10.{r.randint(0, 255)}.{r.randint(0, 255)}.7 and 127.0.0.1",
            lambda r: f"section {r.randint(10, 20)}.{r.randint(1, 9)}.{r.randint(1, 9)}.{r.randint(1, 9)}",
            lambda r: (
                f"at {r.randint(10, 23)}:{r.randint(10, 59)}:{r.randint(10, 59)}:00 fe80::{r.randint(1, 99)} 2001:db8::{r.randint(1, 99)}"
            ),
            lambda r: f"{r.choice(('Chrome', 'Opera', 'Safari'))}/{r.randint(60, 99)}.0.{r.randint(10, 99)}.{r.randint(1, 99)}",
            lambda r: f"OID 1.3.6.1.{r.randint(1, 9)}.{r.randint(1, 99)} and {octets(r)}.{r.randint(1, 9)}",
            lambda r: f"Upgraded {r.choice(('MariaDB', 'Photoshop', 'Skype'))} {small(r)} to {small(r)}",
            lambda r: f"the {small(r)} release of the SDK",
        ],
    ),
    "key": Templates(
        [
            lambda r: f"sk-{secret(r, 48)}",
            lambda r: f"ghp_{secret(r, 36)}",
            lambda r: f"AKIA{secret(r, 16).upper()}",
            lambda r: f"xoxb-{digits(r, 12)}-{secret(r, 24)}",
            lambda r: f"hf_{secret(r, 34)}",
            lambda r: f"sk-proj-{secret(r, 40)}",
            lambda r: f"glpat-{secret(r, 20)}",
            lambda r: f"AIza{secret(r, 35)}",
        ],
        [*PROSE, "export KEY={}", "token: {}", "Authorization: Bearer {}"],
        [
            lambda r: f"sk-{letters(r, 6)}-{letters(r, 7)}-{letters(r, 6)}-link",
            lambda r: f"hf_{letters(r, 8)}_{letters(r, 9)}_dir",
            lambda r: f"sha256:{r.getrandbits(256):064x}",
            lambda r: f"token = tokenizer_{letters(r, 5)}_next_{letters(r, 4)}",
            lambda r: f"password = os_environ_{letters(r, 9)}",
            lambda r: f"id {r.getrandbits(128):032x}"[:8] + f"-{letters(r, 4)}",
            lambda r: f"ghp_{letters(r, 5)}",
            lambda r: "api_key: your-api-key-goes-here",
            lambda r: f"AKIA{letters(r, 5)}",
            lambda r: f"commit {r.getrandbits(160):040x}",
            lambda r: f"secret: {letters(r, 20)}",
            lambda r: f"https://{letters(r, 5)}.example.com/{letters(r, 9)}?x={digits(r, 4)}",
        ],
    ),
}


# Texts that no rule can tell from the real thing, which are counted by themselves.
UNDECIDED: dict[str, list[Make]] = {
    "card": [lambda r: f"order {card(r, '4', 16)}", lambda r: f"account {card(r, '62', 19)}"],
    "ssn": [
        lambda r: f"file {r.randint(1, 665):03d}-{r.randint(1, 99):02d}-{r.randint(1, 9999):04d}",
        lambda r: f"case {r.randint(1, 665):03d}-{r.randint(1, 99):02d}-{r.randint(1, 9999):04d}",
    ],
    "ip": [lambda r: f"the new nginx {small(r)} fixes it", lambda r: f"- {small(r)}: fixes a leak"],
    "phone": [
        lambda r: f"order {r.randint(201, 989)}-{r.randint(201, 989)}-{digits(r, 4)}",
        lambda r: f"position ({r.randint(201, 989)}) {r.randint(201, 989)}-{digits(r, 4)}",
    ],
    "email": [
        lambda r: f"ftp://anonymous:{letters(r, 6)}@{r.choice(HOSTS)}/pub",
        lambda r: f"log in as {r.choice(NAMES)}@{r.choice(HOSTS)}",
    ],
}


def dealt(items: list, part: int) -> list:  # type: ignore[type-arg]
    """Every second one; all where there is only one."""
    return items[part::2]


def texts(kind: str, part: int) -> Iterator[tuple[str, str | None]]:
    """(text, what it must become; None for a negative) of one part of a kind."""
    made, rng = TEMPLATES[kind], random.Random(f"{SEED}/{kind}/{part}")
    values, frames = dealt(made.values, part), dealt(made.frames, part)
    negatives = dealt(made.negatives, part)
    for number in range(NUM // 2):
        value, frame = values[number % len(values)](rng), rng.choice(frames)
        yield frame.format(value), frame.format(f"<{kind.upper()}>")
    for number in range(NUM // 2):
        yield negatives[number % len(negatives)](rng), None


def measure(kind: str, part: int, misses: bool) -> tuple[int, int, int, int]:
    """Positives, found whole, negatives, and found where there was nothing."""
    num, found, num_not, false = 0, 0, 0, 0
    for text, want in texts(kind, part):
        got, counts = redact(text)
        if want is None:
            num_not, false, bad = num_not + 1, false + bool(counts[kind]), bool(counts[kind])
        else:
            num, found, bad = num + 1, found + (got == want), got != want
        if bad and misses:
            print(f"    {kind}: {text!r} -> {got!r}")
    return num, found, num_not, false


def interval(part: int, num: int) -> str:
    """A share with its 95 % interval."""
    low, high = wilson(part, num)
    return f"{part / max(1, num):.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--misses", action="store_true")
    options = parser.parse_args()
    rows = []
    for kind in KINDS:
        cells = []
        for part in (0, 1):
            num, found, _, false = measure(kind, part, options.misses and part == 0)
            cells += [interval(found, found + false), interval(found, num)]
        undecided, rng = UNDECIDED.get(kind, []), random.Random(f"{SEED}/{kind}/undecided")
        made = [make(rng) for make in undecided for _ in range(NUM // 6)]
        cells.append(f"{sum(bool(redact(text)[1][kind]) for text in made)} of {len(made)}")
        rows.append(f"| {kind} | {' | '.join(cells)} |")
    print("| kind | precision, looked at | recall, looked at | precision, held out | recall, held out | reported of the undecidable |")
    print("|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
