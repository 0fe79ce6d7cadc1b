"""Latency of an engine core under load, and what drafts gain, in processor seconds of one thread.

    PYTHONPATH=src taskset -c 1 python bench/latency.py gaps MODEL --clients 1 8 64 --step-tokens auto 2048 256
    PYTHONPATH=src taskset -c 1 python bench/latency.py drafts MODEL --requests 12

`gaps`: so many clients, each of which asks again as soon as its answer has ended, ask a core as the server has one (`interactive`): prompts
of 16 to 1,024 random tokens (log-uniform), answers of 16 to 128. Told are the time to the first token and the gaps between tokens in ms,
the first token of the shorter half of the prompts, and output tokens a second. The clock is the processor time of the process, by which
clients live too: a neighbour does not stretch it. `auto` is the server's default. With `--cost` nothing is computed, and the clock is
moved by what each step would take. `drafts`: greedy answers with and without n-gram drafts, to prompts that ask for a text again with a
small change, and to plain questions; answers must be the same. Each measurement
prints a line of JSON; the last line of `drafts` has the ratios.
"""

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gristmill.core.device import check_dtype
from gristmill.engine.core import Core
from gristmill.engine.engine import Engine
from gristmill.engine.load import EngineArgs, load_engine
from gristmill.engine.scheduler import SchedulerOutput
from gristmill.engine.sequence import RequestState
from gristmill.engine.speculative import SpeculativeConfig
from gristmill.generation.api import Request, SamplingParams

TEXTS = (
    "The mill stands at the river since 1843. Its wheel is made of oak and turns twelve times a minute when the water is high. In summer "
    "the miller opens the lower gate, so that the stones do not run dry. The flour is sold on Fridays at the market of Brandeck.",
    "Invoice 20417, issued on 3 March 2026. Customer: Alder and Sons, 14 Weir Lane, Torrow. Items: 12 bags of rye flour at 8.40 each, "
    "3 bags of bran at 5.10 each, delivery 15.00. Total: 131.10, payable within 30 days to account 5530-118-7.",
    "def weigh(bags, limit):\n    total = 0\n    for bag in bags:\n        if bag.weight > limit:\n            raise ValueError(bag.name)\n"
    "        total += bag.weight\n    return total\n",
    "Minutes of the meeting: Ada reported that the new sieve works. Brian asked for a second pump, which Clara will order by Monday. The "
    "board agreed to repair the roof before winter. Ada will write to the insurance company. The next meeting is on 9 May.",
)
COPY = (
    "Repeat this text word for word, and write every name in capitals:\n\n{}",
    "Correct the spelling of the following text and give back the whole text:\n\n{}",
    "Copy the following text:\n\n{}",
)
PLAIN = (
    "Why is the sky blue?",
    "Write a short story about a lighthouse.",
    "What are three ways to save water at home?",
    "Explain how a bicycle stays upright.",
    "Give me a recipe for lentil soup.",
    "What should I look at when I buy a used car?",
)


# ---- gaps ----


def asked(draw: random.Random, vocabulary: int, context: int) -> tuple[list[int], int]:
    """Prompt and number of tokens of the answer."""
    length = round(math.exp(draw.uniform(math.log(16), math.log(min(1024, context - 128)))))
    return [draw.randrange(vocabulary) for _ in range(length)], draw.randint(16, 128)


def simulate(core: Core, cost: list[float]) -> None:
    """Let a core's steps take what they cost, without computing anything."""
    now = [0.0]

    def run(step: SchedulerOutput) -> torch.Tensor:
        decoded = step.num_decoded_tokens
        now[0] += cost[0] + cost[1] * decoded + cost[2] * (sum(step.num_tokens) - decoded)
        return torch.zeros(len(step.sample_rows), len(core.stop_V))

    core.clock, core.model_runner.run = (lambda: now[0]), run  # type: ignore[method-assign]


def gaps(
    engine: Engine, step_tokens: int | None, clients: int, *, num_requests: int, seed: int, cost: list[float] | None
) -> dict[str, Any]:
    """Clients in a closed loop."""
    engine.step_tokens = step_tokens
    core = engine.core(interactive=True)
    core.clock = time.process_time
    if cost is not None:
        simulate(core, cost)
    core.stop_V = np.zeros_like(core.stop_V)  # nobody stops early
    draw = random.Random(seed)
    config = engine.model.config
    todo = [asked(draw, config.vocab_size, config.max_positions) for _ in range(num_requests)]
    prompts, first, between = [len(prompt) for prompt, _ in todo], [0.0] * num_requests, []
    started = 0

    def ask(place: int) -> None:
        prompt, most = todo[place]
        state = engine.prepare(Request(f"r{place}", (), SamplingParams(max_tokens=most), prompt_ids=tuple(prompt)))
        heard = [core.clock()]

        def listener(*_: object) -> None:
            now = core.clock()
            if len(heard) == 1:
                first[place] = now - heard[0]
            else:
                between.append(now - heard[-1])
            heard.append(now)

        state.listener = listener
        core.add(state)

    began = core.clock()
    while started < min(clients, num_requests):
        ask(started)
        started += 1
    while not core.idle:
        core.step()
        for _ in core.take_finished():
            if started < num_requests:
                ask(started)
                started += 1
    seconds = core.clock() - began
    short = [one for one, length in zip(first, prompts, strict=True) if length <= np.median(prompts)]
    ms = lambda values, share: round(1000 * float(np.percentile(values, share)), 1)  # noqa: E731
    return {
        "clients": clients,
        "step_tokens": step_tokens or "auto",
        "first_token_p50": ms(first, 50),
        "first_token_p99": ms(first, 99),
        "short_first_token_p50": ms(short, 50),
        "gap_p50": ms(between, 50),
        "gap_p99": ms(between, 99),
        "p99_to_median": round(float(np.percentile(between, 99) / np.median(between)), 2),
        "output_tokens_per_s": round(core.output_tokens / seconds, 1),
        "seconds": round(seconds, 1),
    }


# ---- drafts ----


def answers(engine: Engine, requests: list[Request], config: SpeculativeConfig | None, in_flight: int) -> tuple[dict[str, Any], list[Any]]:
    """Greedy answers of requests, so many at a time, and what they took."""
    engine.speculative, engine.max_batch = config, in_flight
    core: Core = engine.core()
    states: list[RequestState] = [engine.prepare(request) for request in requests]
    began = time.process_time()
    for state in states:
        core.add(state)
    while not core.idle:
        core.step()
    seconds = time.process_time() - began
    said = [completion.tokens for state in states for completion in state.completions if completion is not None]
    found = {
        "tokens_per_cpu_s": round(core.output_tokens / seconds, 1),
        "drafted": core.draft_tokens,
        "acceptance": round(core.accepted_tokens / max(1, core.draft_tokens), 3),
    }
    return found, said


def drafts(engine: Engine, args: argparse.Namespace) -> bool:
    from gristmill.data.chat import Message

    config = SpeculativeConfig.parse(args.speculative_config)
    ratios: dict[str, Any] = {}
    same = True
    for name, texts in (("copy", [one.format(text) for text in TEXTS for one in COPY]), ("plain", list(PLAIN) * 2)):
        sampling = SamplingParams(temperature=0.0, max_tokens=args.max_tokens)
        requests = [Request(f"{name}{i}", (Message("user", text),), sampling) for i, text in enumerate(texts[: args.requests])]
        for in_flight in args.in_flight:
            without, expected = answers(engine, requests, None, in_flight)
            found, said = answers(engine, requests, config, in_flight)
            equal = sum(a == b for a, b in zip(said, expected, strict=True))
            same &= equal == len(said)
            ratio = round(found["tokens_per_cpu_s"] / without["tokens_per_cpu_s"], 2)
            line = {"workload": name, "in_flight": in_flight, "without": without, "with": found, "same": f"{equal} of {len(said)}"}
            print(json.dumps(line | {"ratio": ratio}), flush=True)
            ratios[f"{name}, {in_flight} in flight"] = ratio
    print(json.dumps({"ratios": ratios}))
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("gaps", "drafts"))
    parser.add_argument("model", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--step-tokens", nargs="+", default=["auto", "2048"], help="numbers, or auto")
    parser.add_argument("--requests", type=int, default=0, help="default: three a client, twelve at least")
    parser.add_argument("--warm", type=int, default=12, help="requests before those that are measured")
    parser.add_argument("--cost", type=float, nargs=3, help="simulate: seconds of a step, of a decoded token and of a prompt token in it")
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--speculative-config", default="ngram")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    args = parser.parse_args()
    torch.set_num_threads(1)
    check_dtype(torch.device("cpu"), torch.float32 if args.dtype == "fp32" else torch.bfloat16)
    engine = load_engine(args.model, EngineArgs(dtype=args.dtype, device="cpu"))
    if args.what == "drafts":
        args.requests = args.requests or 12
        sys.exit(not drafts(engine, args))
    for clients in args.clients:
        for each in args.step_tokens:
            for seed, num_requests in ((1, args.warm), (0, args.requests or max(12, 3 * clients))):  # products are made ready by sizes
                step_tokens = None if each == "auto" else int(each)
                found = gaps(engine, step_tokens, clients, num_requests=num_requests, seed=seed, cost=args.cost)
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
