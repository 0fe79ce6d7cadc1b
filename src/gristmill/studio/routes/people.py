"""Routes of people: sessions, invitations, and who is here."""

import asyncio
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from gristmill.core.errors import InputError
from gristmill.studio.security import (
    COOKIE,
    INVITATION_SECONDS,
    SESSION_SECONDS,
    Tries,
    check_password,
    hash_password,
    key_of,
    new_token,
)
from gristmill.studio.service import PERSON, Handler, Routes, Service, body_of, json_reply, text_of
from gristmill.studio.store import OWNER, ROLES, Person, Refused

MAX_HASHED = 2  # passwords at once: each takes 32 MiB, and a thread that others wait for


class PeopleRoutes(Routes):
    """People and their sessions.

    Args:
        secure: whether cookies are sent over TLS alone.
        owner_key: hash of the token by which the owner comes in, once.
    """

    def __init__(self, service: Service, *, secure: bool, owner_key: str):
        super().__init__(service)
        self.secure, self.owner_key, self.tries = secure, owner_key, Tries()
        self._hashing = asyncio.Semaphore(MAX_HASHED)

    @property
    def handlers(self) -> Mapping[tuple[str, str], Handler]:
        return {
            ("POST", "/session"): self.log_in,
            ("DELETE", "/session"): self.log_out,
            ("GET", "/me"): self.me,
            ("GET", "/people"): self.people,
            ("POST", "/invitations"): self.invite,
            ("DELETE", "/people/{person}"): self.remove_person,
        }

    async def log_in(self, request: web.Request) -> web.StreamResponse:
        """By the owner's token, an invitation with a new name and password, or a name and password."""
        body = await body_of(request)
        token, name, password = (text_of(body, field) for field in ("token", "name", "password"))
        tried = (str(request.remote), "" if token else name)
        if not self.tries.begin(*tried):
            raise Refused(429, "Too many wrong tries: wait a quarter of an hour.")
        person = await self._person(token, name, password)
        if person is None:
            words = "This link was used already: the program prints a new one when it is started." if token and not name else ""
            raise Refused(403, words or "The name or the password is wrong.")
        self.tries.succeed(*tried)
        session = new_token()
        await self.in_thread(self.store.open_session, key_of(session), person, SESSION_SECONDS)
        reply = json_reply(self._told(person))
        reply.set_cookie(COOKIE, session, max_age=int(SESSION_SECONDS), httponly=True, samesite="Strict", secure=self.secure, path="/")
        return reply

    async def _person(self, token: str, name: str, password: str) -> Person | None:
        """Who comes in by these; None where they are wrong."""
        if token and self.owner_key and key_of(token) == self.owner_key:
            self.owner_key = ""  # it works once
            return await self.in_thread(self.store.owner)
        if token and name:
            async with self._hashing:
                secret = await self.in_thread(hash_password, password)
            return await self.in_thread(self.store.accept, key_of(token), name, secret)
        if not (name and password):
            return None
        found = await self.in_thread(self.store.secret_of, name)
        async with self._hashing:
            right = await self.in_thread(check_password, password, found[1] if found else "")
        return found[0] if found and right else None

    async def log_out(self, request: web.Request) -> web.StreamResponse:
        body = await body_of(request)
        key = key_of(request.cookies.get(COOKIE, ""))
        await self.in_thread(self.store.close_sessions, key, request[PERSON], body.get("everywhere") is True)
        reply = json_reply({})
        reply.del_cookie(COOKIE, path="/", httponly=True, samesite="Strict", secure=self.secure)
        return reply

    async def me(self, request: web.Request) -> web.StreamResponse:
        person = request.get(PERSON)
        return json_reply(self._told(person) if person else {"role": None})

    async def people(self, request: web.Request) -> web.StreamResponse:
        return json_reply({"people": await self.in_thread(self.store.people)})

    async def invite(self, request: web.Request) -> web.StreamResponse:
        role = (await body_of(request)).get("role")
        if role not in ROLES or role == OWNER:
            raise InputError("An invitation is for an expert, an annotator or a reader.")
        token = new_token()
        await self.in_thread(self.store.invite, key_of(token), str(role), INVITATION_SECONDS)
        return json_reply({"token": token, "days": int(INVITATION_SECONDS / 86400)})

    async def remove_person(self, request: web.Request) -> web.StreamResponse:
        await self.in_thread(self.store.remove_person, request.match_info["person"], request[PERSON])
        return json_reply({})

    def _told(self, person: Person) -> dict[str, Any]:
        names = {name: getattr(person, name) for name in ("id", "name", "pseudonym", "role")}
        return names | {"is_run": self.sources.is_run}
