"""An OpenAI-compatible endpoint whose behaviour each prompt asks for, in a process of its own.

A prompt "... [fate 429 500 ok]" gets a 429 on its first attempt, a 500 on the second, and then answers. The answer repeats the
prompt, so that a lost, doubled or misplaced one shows. `GET /_stats` tells what was asked.
"""

import argparse
import asyncio
import hashlib
import json
import re
import sys
from collections import Counter
from typing import Any

from aiohttp import web

WORDS = ("harbour", "violin", "glacier", "ledger", "orchard", "compass", "lantern")
FATE = re.compile(r"\[fate ([^\]]+)\]")
asked: Counter[str] = Counter()
seen: dict[str, Any] = {"requests": 0, "in_flight": 0, "most": 0, "bodies": [], "keys": []}
dropped: list[web.Request] = []


async def complete(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    chat = request.path.endswith("/chat/completions")
    prompt = body["messages"][-1]["content"] if chat else body["prompt"]
    seen["requests"] += 1
    if not options.forget:
        seen["bodies"].append(body)
        seen["keys"].append(request.headers.get("Authorization", ""))
    seen["in_flight"] += 1
    seen["most"] = max(seen["most"], seen["in_flight"])
    try:
        await asyncio.sleep(options.latency)
        fates = found[1].split() if (found := FATE.search(prompt)) else ["ok"]
        fate = fates[min(asked[prompt], len(fates) - 1)]
        asked[prompt] += 1
        return await answer(request, body, prompt, fate, chat)
    finally:
        seen["in_flight"] -= 1


async def answer(request: web.Request, body: dict[str, Any], prompt: str, fate: str, chat: bool) -> web.StreamResponse:
    kind, _, value = fate.partition(":")
    if kind == "hang":
        await asyncio.sleep(60)
    if kind == "reset":
        assert request.transport is not None
        request.transport.abort()
        return web.Response()
    if kind.isdigit():
        headers = {"Retry-After": value} if value else {}
        words = "no request may say rate or temperature, and the key was " + request.headers.get("Authorization", "")
        return web.json_response({"error": {"message": words}}, status=int(kind), headers=headers)
    text = "" if kind == "empty" else fitting(prompt, body) if options.obedient else f"answer to {prompt}"
    num = 1 if kind == "one" else body.get("n", 1)
    logprobs = {"content": [{"token": "x", "logprob": -0.5}] * 3} if body.get("logprobs") else None
    if kind == "surrogate":
        text = "half a pair \ud800"
    finish = {"cut": "length", "filter": "content_filter"}.get(kind, "stop")
    choice: dict[str, Any] = {"finish_reason": finish, "logprobs": logprobs}
    choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    data = json.dumps({"choices": [choice] * num, "usage": {"prompt_tokens": 10, "completion_tokens": 20 * num}}).encode()
    if kind == "endless":
        data = data.replace(b'"completion_tokens": 20', b'"completion_tokens": 1e999')
    if kind == "deep":
        data = b'{"choices":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    return web.Response(body=data[: len(data) // 2] if kind == "bad" else data, content_type="application/json")


def fitting(prompt: str, body: dict[str, Any]) -> str:
    """What a model that follows the default templates could answer; different for different prompts, the same for the same."""
    mark = hashlib.blake2b(f"{prompt}{body.get('seed')}".encode(), digest_size=4).hexdigest()
    num = int(found[1]) if (found := re.search(r"\b(?:Name|Write|in|of|Design) (\d{1,2})\b", prompt)) else 3
    if body["model"] == "mock-reward" and "unrated" in prompt:
        return "I cannot rate this."
    if body["model"] == "mock-reward":
        talk = "".join(m["content"] for m in body["messages"])
        digest = hashlib.blake2b(talk.encode(), digest_size=5).digest()
        names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
        return ",".join(f"{name}:{byte / 64}" for name, byte in zip(names, digest, strict=True))
    if "JSON array and nothing else. Each" in prompt:
        schema = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
        return json.dumps([{"name": f"look_up_{mark}", "description": "Looks something up.", "parameters": schema}])
    if "Reply with the one call" in prompt:
        name = found[0] if (found := re.search(r"look_up_\w+", prompt)) else "nothing"
        return "```json\n" + json.dumps({"name": name, "arguments": {"place": "the harbour"}}) + "\n```"
    if "numbered list" in prompt:
        return "Here they are:\n\n" + "\n".join(
            f"{n}. {WORDS[n % 7]} {mark}-{n} {WORDS[(n + int(mark, 16)) % 7]}" for n in range(1, num + 1)
        )
    if "with Yes or No" in prompt or "Begin your reply" in prompt:
        return "Yes, it does."
    if "unrated" in prompt:
        return f"unrated {mark}"
    return f"Thanks! The {WORDS[int(mark, 16) % 7]} of {mark} is what you want, and it is {len(prompt)} long. Is it?"


async def stats(request: web.Request) -> web.Response:
    return web.json_response({**seen, "asked": dict(asked)})


async def main() -> None:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", complete)
    app.router.add_post("/v1/completions", complete)
    app.router.add_get("/_stats", stats)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", options.port, reuse_address=True)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.to_thread(sys.stdin.read)  # until whoever started this goes away


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--obedient", action="store_true", help="answer as the templates ask")
    parser.add_argument("--forget", action="store_true", help="keep no request, for benchmarks")
    parser.add_argument("--latency", type=float, default=0.01)
    options = parser.parse_args()
    asyncio.run(main())
