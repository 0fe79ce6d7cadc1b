"""A guard behind an endpoint, asked about single answers of the red team's models."""

import json
import os
import urllib.request
from dataclasses import dataclass
from typing import Any, cast, get_args

from gristmill.core.errors import InputError
from gristmill.core.untrusted import quoted
from gristmill.data.chat import conversation
from gristmill.judge.guards import AEGIS, Form, guard_messages, parse_guard

SECONDS, MAX_TOKENS, MAX_ANSWER_BYTES = 60.0, 128, 1 << 20


@dataclass(frozen=True)
class GuardView:
    """A guard that is asked as a chat model.

    Attributes:
        url: up to and including /v1.
        model: name that the endpoint knows it by.
        key_env: environment variable that holds its key; "": none is sent.
    """

    form: Form
    url: str
    model: str
    key_env: str = ""

    def verdict(self, turns: list[dict[str, str]]) -> dict[str, Any]:
        """What the guard says of the last turn; `unsafe` is None where it cannot be asked or read, and `says` tells why."""
        asked = guard_messages(conversation(turns), AEGIS, self.form)
        messages = [{"role": message.role, "content": message.content} for message in asked]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_env, "") if self.key_env else "":
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as reply:
                text = str(json.loads(reply.read(MAX_ANSWER_BYTES))["choices"][0]["message"]["content"])
        except (OSError, ValueError, LookupError, TypeError) as e:
            return {"unsafe": None, "codes": [], "says": f"The guard cannot be asked ({type(e).__name__})."}
        found = parse_guard(text, AEGIS, role="assistant", guard=self.model, form=self.form)
        return {
            "unsafe": found.unsafe,
            "codes": list(found.codes),
            "says": "" if found.unsafe is not None else "The guard's answer says nothing.",
        }


def guard_of(spec: str, model: str, key_env: str) -> GuardView | None:
    """The guard of FORM=URL; None where none is given.

    Raises:
        InputError: the form is unknown, or it has no URL or name.
    """
    if not spec:
        return None
    form, _, url = spec.partition("=")
    if form not in get_args(Form) or not url.startswith(("http://", "https://")):
        raise InputError(f"--guard {quoted(spec)} is no guard: write {', '.join(f'{one}=URL' for one in get_args(Form))}.")
    if not model:
        raise InputError("Give --guard-model, the name that the guard's endpoint knows it by.")
    if key_env and not os.environ.get(key_env):
        raise InputError(f"There is no key in {key_env}: set the variable, or leave --guard-key-env out.")
    return GuardView(cast(Form, form), url, model, key_env)
