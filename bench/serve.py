"""The server under load, and under nonsense.

    PYTHONPATH=src python bench/serve.py load MODEL --clients 500 --seconds 120
    PYTHONPATH=src python bench/serve.py fuzz MODEL --requests 10000
    PYTHONPATH=src python bench/serve.py attack MODEL --seconds 10
    PYTHONPATH=src python bench/serve.py gaps MODEL --clients 1 8 64 --seconds 60 --rounds 2 --step-tokens auto 2048

`load` starts `gristmill serve MODEL` and lets so many clients stream answers, one after another; a fifth of the streams are broken off
at a random moment. Then nothing may be left: no block of the cache in use, no sample open; every stream that was not broken off must be
whole and equal to the answer of a quiet server (each asks with a seed of its own); SIGTERM in the middle of streams lets them end. Memory
is told for both halves of the time. `fuzz` sends bodies that are wrong in every way; each must get a 4xx with a reason or an answer,
never a 5xx, and the server must answer as before afterwards. `attack` gives the server 1,024 files and a key, and does without the
key what holds servers up: 1,500 connections with half a request that come again when they are dropped, as many that send a byte of a
header a second, and gzip bodies of 3.5 GB; and with it bodies of 80,000 messages. Meanwhile somebody else asks for /health on new
connections: 99 of 100 must be answered within 250 ms, and the log stay below 1 MB; memory is told after each. Each prints one line of
JSON and exits 1 if something is not so.

`gaps` starts a server for each number of `--step-tokens` (`auto` is the default) and asks one after the other, in `--rounds`: clients in a
closed loop stream completions of `--answer-tokens` or down to an eighth of that, to prompts of 16 to `--prompt-tokens` random tokens
(log-uniform), for so many seconds, in the first fifth of which they begin and nothing counts. Told are the time to the first token and
the gaps between two in ms, and output tokens a second, by the clock on the wall as the clients see it; gaps and tokens by the processor
time of the server too (`cpu`), which its neighbours do not stretch. In short runs chance decides how many prompts are read and not yet
answered: `all_tokens_per_cpu_s` counts those of prompts and of answers. A line of JSON for each, and one for all rounds together.
"""

import argparse
import asyncio
import contextlib
import json
import math
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import IO, Any

import aiohttp

QUESTIONS = ("Name a land.", "Write a word sum about eggs.", "What is the capital of Batru?", "List three fruits separated by commas.")
BROKEN_OFF = 0.2
NUM_HALF_OPEN = 1500
TOKENS = range(32, 1000)  # that every model has, and that are no control tokens
KEYS = "GRISTMILL_BENCH_KEYS"


class Served:
    def __init__(self, model: str, *options: str, num_files: int = 0, log: IO[str] | None = None):
        command = [sys.executable, "-m", "gristmill.cli", "serve", model, "--port", "0", "--name", "model", *options]
        if num_files:
            command = ["prlimit", f"--nofile={num_files}:{num_files}", *command]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().split()[-1]

    def memory_mib(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) // 1024

    def cpu_seconds(self) -> float:
        return time.clock_gettime(~self.process.pid << 3 | 2)  # Linux's number of the clock of a process's processor time

    async def computed(self, session: aiohttp.ClientSession) -> float:
        """Tokens of prompts and of answers so far."""
        return await self.metric(session, "gristmill_prompt_tokens") + await self.metric(session, "gristmill_output_tokens")

    async def metric(self, session: aiohttp.ClientSession, name: str) -> float:
        async with session.get(f"{self.url.removesuffix('/v1')}/metrics") as reply:
            lines = (await reply.text()).splitlines()
        return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


@contextlib.contextmanager
def serving(model: str, *options: str, num_files: int = 0, log: IO[str] | None = None) -> Iterator[Served]:
    served = Served(model, *options, num_files=num_files, log=log)
    try:
        yield served
    finally:
        served.process.terminate()
        served.process.wait(90)


def body_of(number: int, tokens: int) -> dict[str, Any]:
    question = QUESTIONS[number % len(QUESTIONS)]
    messages = [{"role": "user", "content": question}]
    return {"model": "model", "messages": messages, "max_tokens": tokens, "seed": number, "temperature": 1.0, "stream": True}


async def stream(session: aiohttp.ClientSession, url: str, body: dict[str, Any], most: int | None = None) -> tuple[int, str, bool]:
    """Status, text, and whether the stream came to its end; read no further than `most` chunks."""
    async with session.post(f"{url}/chat/completions", json=body) as reply:
        if reply.status != 200:
            return reply.status, "", False
        text, chunks = "", 0
        async for line in reply.content:
            if line.startswith(b"data: [DONE]"):
                return 200, text, True
            if line.startswith(b"data: "):
                text += json.loads(line[6:])["choices"][0]["delta"]["content"]
                chunks += 1
                if chunks == most:
                    reply.close()
                    return 200, text, False
        return 200, text, False


async def load(served: Served, args: argparse.Namespace) -> dict[str, Any]:
    draw = random.Random(0)
    count: Counter[str] = Counter()
    texts: dict[int, str] = {}
    memory: list[tuple[float, int]] = []
    began = time.monotonic()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=300)) as session:

        async def client(number: int) -> None:
            turn = 0
            while time.monotonic() - began < args.seconds:
                seed = number + args.clients * turn
                turn += 1
                most = draw.randint(1, 20) if draw.random() < BROKEN_OFF else None
                status, text, whole = await stream(session, served.url, body_of(seed, 48), most)
                if status == 429:
                    count["sent away"] += 1
                    await asyncio.sleep(1)
                elif whole:
                    count["whole"] += 1
                    texts[seed] = text
                else:
                    count["broken off" if most else "torn"] += 1

        async def watch() -> None:
            while True:
                memory.append((time.monotonic() - began, served.memory_mib()))
                await asyncio.sleep(1)

        watching = asyncio.ensure_future(watch())
        await asyncio.gather(*(client(number) for number in range(args.clients)))
        watching.cancel()
        seconds = time.monotonic() - began
        for _ in range(100):
            if not await served.metric(session, "gristmill_open_samples"):
                break
            await asyncio.sleep(0.1)
        left = {name: await served.metric(session, f"gristmill_{name}") for name in ("open_samples", "running", "pages_in_use")}
        output = await served.metric(session, "gristmill_output_tokens")
        # a quiet server says the same
        chosen = draw.sample(sorted(texts), min(200, len(texts)))
        different = 0
        for seed in chosen:
            _, text, _ = await stream(session, served.url, body_of(seed, 48))
            different += text != texts[seed]
        # told to end in the middle of streams
        ending = [asyncio.ensure_future(stream(session, served.url, body_of(10**6 + i, 200))) for i in range(50)]
        await asyncio.sleep(0.3)
        served.process.send_signal(signal.SIGTERM)
        drained = await asyncio.gather(*ending, return_exceptions=True)
    early = [mib for at, mib in memory if at < seconds / 2]
    late = [mib for at, mib in memory if at >= seconds / 2]
    return {
        "clients": args.clients,
        "seconds": round(seconds, 1),
        "streams": dict(count),
        "output_tokens_per_s": round(output / seconds),
        "left": left,
        "memory_mib": {"first half": max(early), "second half": max(late)},
        "compared": len(chosen),
        "different": different,
        "drained": sum(isinstance(one, tuple) and one[2] for one in drained),
        "told to end while streaming": len(ending),
        "exit": served.process.wait(90),
    }


async def closed_loop(served: Served, clients: int, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """What clients see that ask again as soon as they have their answer."""
    seconds, most = args.seconds, args.answer_tokens
    draw, begin = random.Random(seed), time.monotonic() + seconds / 5
    first: list[tuple[int, float]] = []
    between: list[tuple[float, float]] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)) as session:

        async def client(number: int) -> None:
            await asyncio.sleep(seconds / 5 * number / clients)
            while True:
                prompt = draw.choices(TOKENS, k=round(math.exp(draw.uniform(math.log(16), math.log(args.prompt_tokens)))))
                body = {"model": "model", "prompt": prompt, "max_tokens": draw.randint(most // 8, most), "stream": True, "temperature": 2.0}
                heard = asked = time.monotonic()
                heard_cpu = 0.0
                async with session.post(f"{served.url}/completions", json=body) as reply:
                    if reply.status != 200:
                        raise SystemExit(await reply.text())
                    async for line in reply.content:
                        if not line.startswith(b"data: {"):
                            continue
                        now, cpu = time.monotonic(), served.cpu_seconds()
                        if now > begin and heard == asked:
                            first.append((len(prompt), now - asked))
                        elif now > begin:
                            between.append((now - heard, cpu - heard_cpu))
                        heard, heard_cpu = now, cpu

        asking = [asyncio.ensure_future(client(number)) for number in range(clients)]
        await asyncio.wait(asking, timeout=seconds / 5, return_when=asyncio.FIRST_EXCEPTION)
        spent, computed = served.cpu_seconds(), await served.computed(session)
        await asyncio.wait(asking, timeout=seconds * 4 / 5, return_when=asyncio.FIRST_EXCEPTION)
        spent, computed = served.cpu_seconds() - spent, await served.computed(session) - computed
        for one in asking:
            one.cancel()
        for error in await asyncio.gather(*asking, return_exceptions=True):
            if not isinstance(error, asyncio.CancelledError):
                raise error
        while await served.metric(session, "gristmill_open_samples"):
            await asyncio.sleep(0.1)
    return {"first": first, "between": between, "seconds": seconds * 4 / 5, "cpu_s": spent, "computed": computed}


def percentiles(found: list[dict[str, Any]]) -> dict[str, Any]:
    first = [one for each in found for one in each["first"]]
    gap_pairs = [gap for each in found for gap in each["between"]]
    if not first or not gap_pairs:
        return {"answers": len(first), "gaps": len(gap_pairs)}
    between, cpu = zip(*gap_pairs, strict=True)
    ms = lambda values, share: round(1000 * sorted(values)[min(len(values) - 1, len(values) * share // 100)], 1)  # noqa: E731
    middle = sorted(length for length, _ in first)[len(first) // 2]
    tokens = len(first) + len(between)
    return {
        "first_token_p50": ms([one for _, one in first], 50),
        "first_token_p99": ms([one for _, one in first], 99),
        "short_first_token_p50": ms([one for length, one in first if length <= middle], 50),
        "gap_p50": ms(between, 50),
        "gap_p99": ms(between, 99),
        "p99_to_median": round(ms(between, 99) / ms(between, 50), 2),
        "cpu_gap_p50": ms(cpu, 50),
        "cpu_gap_p99": ms(cpu, 99),
        "cpu_p99_to_median": round(ms(cpu, 99) / ms(cpu, 50), 2),
        "output_tokens_per_s": round(tokens / sum(each["seconds"] for each in found), 1),
        "output_tokens_per_cpu_s": round(tokens / sum(each["cpu_s"] for each in found), 1),
        "all_tokens_per_cpu_s": round(sum(each["computed"] for each in found) / sum(each["cpu_s"] for each in found), 1),
        "answers": len(first),
        "gaps": len(between),
    }


def gaps(args: argparse.Namespace) -> None:
    with contextlib.ExitStack() as stack:
        options = {name: [] if name == "auto" else ["--step-tokens", name] for name in args.step_tokens}
        servers = {name: stack.enter_context(serving(args.model, *given)) for name, given in options.items()}
        for clients in args.clients or [8]:
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
            for number in range(args.rounds):
                for name in list(servers)[:: 1 if number % 2 else -1]:
                    load = os.getloadavg()[0]
                    found[name].append(asyncio.run(closed_loop(servers[name], clients, args, number)))
                    facts = {"clients": clients, "step_tokens": name, "load": round(load, 1)}
                    print(json.dumps(facts | percentiles(found[name][-1:])), flush=True)
            for name, all_rounds in found.items():
                print(json.dumps({"clients": clients, "step_tokens": name, "rounds": args.rounds} | percentiles(all_rounds)), flush=True)


def strange(draw: random.Random) -> bytes:
    """A body that is wrong somewhere, or by luck right."""
    good: dict[str, Any] = {"model": "model", "messages": [{"role": "user", "content": "Name a land."}], "max_tokens": 3}
    if draw.random() < 0.3:
        good = {"model": "model", "prompt": "Name a land.", "max_tokens": 3}
    names = [
        *good,
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "n",
        "seed",
        "stop",
        "logit_bias",
        "logprobs",
        "top_logprobs",
        "stream",
        "echo",
    ]
    names += ["presence_penalty", "frequency_penalty", "repetition_penalty", "stream_options", "priority", "user", "zzz", "\u0000"]
    values: list[Any] = [
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        128,
        10**30,
        -(10**30),
        0.5,
        1e308,
        -1e308,
        "",
        "a",
        "\ud800",
        [],
        {},
        [[]],
        [None],
    ]
    values += ["x" * 5000, [0], [1, 2], [[1], [2]], ["a", ""], {"1": 1}, {"-1": 5}, {"a": 1}, {"1": 1e308}, [{"role": "user"}], 3.0, "1"]
    values += [[{"role": "assistant", "content": "x"}], [{"role": "user", "content": None}], [{"role": "x", "content": "y"}], [7, "a"]]
    body = dict(good)
    for _ in range(draw.randint(1, 3)):
        name = draw.choice(names)
        if draw.random() < 0.15:
            body.pop(name, None)
        else:
            body[name] = draw.choice(values)
    raw = json.dumps(body).encode()
    kind = draw.random()
    if kind < 0.1:
        return raw[: draw.randrange(len(raw))]
    if kind < 0.15:
        return draw.randbytes(draw.randrange(200))
    if kind < 0.17:
        return raw.replace(b"3", b"NaN")
    return raw if kind > 0.19 else b"[" * draw.randint(1, 50_000)


async def fuzz(served: Served, args: argparse.Namespace) -> dict[str, Any]:
    draw = random.Random(args.seed)
    statuses: Counter[int] = Counter()
    wrong: list[str] = []
    paths = ("/chat/completions", "/completions", "/rewards")
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        _, before, _ = await stream(session, served.url, body_of(1, 24))
        gate = asyncio.Semaphore(64)

        async def one(path: str, raw: bytes) -> None:
            async with gate, session.post(served.url + path, data=raw, headers={"Content-Type": "application/json"}) as reply:
                text = await reply.text()
                statuses[reply.status] += 1
                reason = reply.status == 200 or bool(json.loads(text).get("error", {}).get("message"))
                if reply.status >= 500 or not reason:
                    wrong.append(f"{reply.status} {path} {raw[:300]!r} {text[:200]}")

        await asyncio.gather(*(one(draw.choice(paths), strange(draw)) for _ in range(args.requests)))
        _, after, whole = await stream(session, served.url, body_of(1, 24))
        left = {name: await served.metric(session, f"gristmill_{name}") for name in ("open_samples", "running", "pages_in_use")}
    found = {"requests": args.requests, "statuses": {str(k): v for k, v in sorted(statuses.items())}, "wrong": wrong[:5], "left": left}
    return found | {"same answer afterwards": whole and before == after}


def health(address: tuple[str, int], stop: Event, found: "Queue[list[float]]") -> None:
    """Ask for /health on new connections until told to stop; a process of its own, which the attack does not slow down."""
    seconds: list[float] = []
    found.put(seconds)  # ready
    while not stop.is_set():
        began = time.monotonic()
        good = False
        with contextlib.suppress(OSError), socket.create_connection(address, 20) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            good = connection.recv(100).startswith(b"HTTP/1.1 200")
        seconds.append(time.monotonic() - began if good else 20.0)
        time.sleep(0.01)
    found.put(sorted(seconds))


async def half_open(served: Served, seconds: float, *, slow: bool) -> Counter[str]:
    """Connections that never send a whole request, and come again when they are dropped."""
    host, port = served.url.split("/")[2].split(":")
    count: Counter[str] = Counter()

    async def one() -> None:
        while True:
            try:
                reader, writer = await asyncio.open_connection(host, int(port))
                count["opened"] += 1
                writer.write(b"GET /health HTTP/1.1\r\nX-a: ")
                while slow and not reader.at_eof() and not writer.is_closing():
                    await asyncio.sleep(1)
                    writer.write(b"a")
                await reader.read()
            except OSError:
                pass
            count["dropped"] += 1
            await asyncio.sleep(random.uniform(0.5, 2))

    clients = [asyncio.ensure_future(one()) for _ in range(NUM_HALF_OPEN)]
    await asyncio.sleep(seconds)
    for client in clients:
        client.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    return count


async def bodies(served: Served, raw: bytes, headers: dict[str, str], times: int) -> Counter[str]:
    """Requests with one body, one after another."""
    count: Counter[str] = Counter()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        for _ in range(times):
            try:
                async with session.post(f"{served.url}/chat/completions", data=raw, headers=headers) as reply:
                    await reply.read()
                    count[str(reply.status)] += 1
            except aiohttp.ClientError as e:
                count[type(e).__name__] += 1
    return count


async def attack(served: Served, args: argparse.Namespace, log: Path) -> dict[str, Any]:
    compress = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join(compress.compress(b" " * (1 << 20)) for _ in range(3500)) + compress.flush()
    empty = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}] * 40_000
    many = json.dumps({"model": "model", "messages": [*empty, {"role": "user", "content": "x"}]}).encode()
    gzip, key = {"Content-Encoding": "gzip"}, {"Authorization": "Bearer key"}
    host, port = served.url.split("/")[2].split(":")
    context = multiprocessing.get_context("spawn")
    found: dict[str, Any] = {"memory_mib": [served.memory_mib()]}
    for name, work in (
        ("nothing", lambda: asyncio.sleep(args.seconds / 2)),
        ("half-open", lambda: half_open(served, args.seconds, slow=False)),
        ("slow headers", lambda: half_open(served, args.seconds, slow=True)),
        ("gzip", lambda: bodies(served, bomb, gzip, 5)),
        ("80,000 messages", lambda: bodies(served, many, key, 20)),
    ):
        stop, heard = context.Event(), context.Queue()
        asking = context.Process(target=health, args=((host, int(port)), stop, heard))
        asking.start()
        heard.get(timeout=60)
        count = await work()
        stop.set()
        seconds = heard.get(timeout=60)
        asking.join()
        ms = {f"p{share}": round(1000 * seconds[min(len(seconds) - 1, len(seconds) * share // 100)], 1) for share in (50, 99, 100)}
        found[name] = {"health_ms": ms, "asked": len(seconds)} | dict(count or {})
        found["memory_mib"].append(served.memory_mib())
    return found | {"log_bytes": log.stat().st_size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("load", "fuzz", "attack", "gaps"))
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, nargs="+", help="default: 500; for gaps several numbers, 8 by default")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=1024, help="of the longest prompts")
    parser.add_argument("--answer-tokens", type=int, default=128, help="of the longest answers")
    parser.add_argument("--step-tokens", nargs="+", default=["auto", "2048"])
    args = parser.parse_args()
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).parent.parent / "src"))
    if args.what == "gaps":
        gaps(args)
        return
    args.clients = args.clients[0] if args.clients else 500
    if args.what == "attack":
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, max(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1])))
        os.environ[KEYS] = "key"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "log"
            with path.open("w") as log, serving(args.model, "--api-key-env", KEYS, num_files=1024, log=log) as served:
                found = asyncio.run(attack(served, args, path))
        print(json.dumps(found))
        slow = max(phase["health_ms"]["p99"] for phase in found.values() if isinstance(phase, dict))
        sys.exit(slow > 250 or found["log_bytes"] > 1 << 20)
    with serving(args.model, "--max-batch", "256") as served:
        found = asyncio.run((load if args.what == "load" else fuzz)(served, args))
    print(json.dumps(found))
    bad = any(found["left"].values())
    if args.what == "load":
        bad |= bool(
            found["different"] or found["streams"].get("torn") or found["exit"] or found["drained"] < found["told to end while streaming"]
        )
    else:
        bad |= bool(found["wrong"]) or not found["same answer afterwards"]
    sys.exit(bad)


if __name__ == "__main__":
    main()
