"""Access of the studio: roles of every route, passwords and tokens, limits on tries, and the headers of every answer.

Texts on the pages were written by models, and by people who attack models. So no page may run or load anything but its own files.
"""

import hashlib
import hmac
import secrets
import time
from collections import defaultdict, deque
from urllib.parse import urlsplit

from gristmill.core.errors import InputError
from gristmill.studio.store import ANNOTATOR, EXPERT, OWNER, READER, ROLES

ANYBODY = "anybody"
WORKERS = frozenset({OWNER, EXPERT, ANNOTATOR})
EVERYONE = frozenset(ROLES)
LOOKERS = frozenset({OWNER, EXPERT, READER})
EXPERTS = frozenset({OWNER, EXPERT})
OWNERS = frozenset({OWNER})
# Who may do what: the one place that says it. `None`: also who has not logged in.
ROUTES: dict[tuple[str, str], frozenset[str] | None] = {
    ("POST", "/session"): None,
    ("DELETE", "/session"): EVERYONE,
    ("GET", "/me"): None,
    ("GET", "/projects"): EVERYONE,
    ("POST", "/projects"): OWNERS,
    ("POST", "/projects/{project}/guideline"): OWNERS,
    ("GET", "/queue"): WORKERS,
    ("POST", "/answers"): WORKERS,
    ("POST", "/flags"): WORKERS,
    ("POST", "/leases/renew"): WORKERS,
    ("GET", "/items/{item}/text"): WORKERS,
    ("GET", "/items/{item}"): EXPERTS,
    ("POST", "/items/{item}/resolve"): EXPERTS,
    ("GET", "/progress/{project}"): EVERYONE,
    ("GET", "/statistics/{project}"): LOOKERS,
    ("GET", "/sources"): LOOKERS,
    ("GET", "/rows"): LOOKERS,
    ("GET", "/row"): LOOKERS,
    ("GET", "/row/text"): LOOKERS,
    ("GET", "/row/lineage"): LOOKERS,
    ("GET", "/people"): OWNERS,
    ("POST", "/invitations"): OWNERS,
    ("DELETE", "/people/{person}"): OWNERS,
    ("GET", "/events"): EVERYONE,
    ("GET", "/export/{name}"): OWNERS,
    ("GET", "/run"): LOOKERS,
    ("GET", "/run/{stage}"): LOOKERS,
    ("GET", "/checks"): LOOKERS,
    ("POST", "/checks/{stage}"): EXPERTS,
    ("GET", "/models"): EXPERTS,
    ("POST", "/chat"): EXPERTS,
    ("POST", "/made"): EXPERTS,
    ("GET", "/attacks"): EXPERTS,  # what attacks are made of is not for people who rate
    ("POST", "/attacks"): EXPERTS,
    ("POST", "/attacks/transform"): EXPERTS,
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
COOKIE = "gristmill-studio"
SESSION_SECONDS, INVITATION_SECONDS = 12 * 3600.0, 7 * 86400.0
MAX_TRIES, TRY_SECONDS = 10, 900.0  # of a name from one address
MAX_TRIES_TOGETHER = 100  # of an address, behind which there may be many people; of a name, from anywhere
MIN_PASSWORD_CHARS, MAX_PASSWORD_CHARS = 10, 200
SCRYPT = {"n": 1 << 15, "r": 8, "p": 1, "maxmem": 64 << 20, "dklen": 32}


def new_token() -> str:
    """A random token that nobody guesses."""
    return secrets.token_urlsafe(24)


def key_of(token: str) -> str:
    """What is stored of a token: a database that is read gives nobody a way in."""
    return hashlib.sha256(token.encode(errors="replace")).hexdigest()


def hash_password(password: str) -> str:
    """scrypt hash of a password with a salt of its own.

    Raises:
        InputError: it is too short or too long.
    """
    if not MIN_PASSWORD_CHARS <= len(password) <= MAX_PASSWORD_CHARS:
        raise InputError(f"A password needs from {MIN_PASSWORD_CHARS} to {MAX_PASSWORD_CHARS} characters.")
    salt = secrets.token_bytes(16)
    return f"{salt.hex()}${_scrypt(password, salt).hex()}"


def check_password(password: str, secret: str) -> bool:
    """Whether a password is the one of a hash. It takes as long where there is no hash, so that time tells no names."""
    salt, _, wanted = secret.partition("$")
    found = _scrypt(password[:MAX_PASSWORD_CHARS], bytes.fromhex(salt) if wanted else bytes(16)).hex()
    return hmac.compare_digest(found, wanted)


def _scrypt(password: str, salt: bytes) -> bytes:
    return hashlib.scrypt(password.encode(errors="replace"), salt=salt, **SCRYPT)


class Tries:
    """Limits on wrong passwords and tokens in a quarter of an hour: of an address, of a name, and, lower, of a name from one address."""

    def __init__(self) -> None:
        self._counted: dict[tuple[str, str], deque[float]] = defaultdict(deque)

    def begin(self, address: str, name: str) -> bool:
        """Count a try before it is checked, so that tries at one time are limited too; False where no more may be made.

        Args:
            name: whose password is tried; "" for a token.
        """
        now = time.monotonic()
        for times in self._counted.values():
            while times and times[0] < now - TRY_SECONDS:
                times.popleft()
        self._counted = defaultdict(deque, {key: times for key, times in self._counted.items() if times})
        limits = self._limits(address, name)
        allowed = all(len(self._counted[key]) < most for key, most in limits.items())
        if allowed:
            for key in limits:
                self._counted[key].append(now)
        return allowed

    def succeed(self, address: str, name: str) -> None:
        """Take back the last try, which was right; the name's own wrong ones from this address are forgotten."""
        for key in self._limits(address, name):
            if self._counted[key]:
                self._counted[key].pop()
        if name:
            self._counted.pop((address, name), None)

    @staticmethod
    def _limits(address: str, name: str) -> dict[tuple[str, str], int]:
        together = {(address, ""): MAX_TRIES_TOGETHER}
        return together | {("", name): MAX_TRIES_TOGETHER, (address, name): MAX_TRIES} if name else together


def origins_of(host: str, port: int, url: str) -> tuple[frozenset[str], str]:
    """Origins that people's browsers have, and the first of them, which is printed.

    Args:
        url: by which others reach the server; "" where nobody but this machine does.

    Raises:
        InputError: the URL is none, or is needed and missing.
    """
    local = [_origin("http", name, port) for name in ("127.0.0.1", "localhost", "[::1]")]
    if url:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query or parts.username:
            raise InputError(f"--url {url} is no address of a server: give it as https://studio.example.org, without a path.")
        try:
            origin = _origin(parts.scheme, f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname, parts.port)
        except ValueError as e:
            raise InputError(f"--url {url} has a port that is none: {e}.") from e
        return frozenset({origin, *local}), origin
    if host in ("127.0.0.1", "localhost", "::1"):
        return frozenset(local), local[0]
    if host in ("0.0.0.0", "::", ""):
        raise InputError(
            f"--host {host or repr(host)} needs --url too: the address that people's browsers ask, as http://mill.local:{port}."
        )
    origin = _origin("http", f"[{host}]" if ":" in host else host.lower(), port)
    return frozenset({origin, *local}), origin


def _origin(scheme: str, host: str, port: int | None) -> str:
    """Origin as browsers write it: without the port that its scheme has anyway."""
    return f"{scheme}://{host}" + ("" if port in (None, {"http": 80, "https": 443}[scheme]) else f":{port}")
