"""What runs on a GPU, end to end: training, scoring, generation and evaluation, timed, and checked against the CPU.

    PYTHONPATH=src python bench/gpu.py                  # the sizes of a GPU, on the one that torch finds
    PYTHONPATH=src python bench/gpu.py --smoke          # the same at toy size, on whatever device there is
    PYTHONPATH=src python bench/gpu.py --device cuda:1
    PYTHONPATH=src python bench/gpu.py --compile        # Triton's kernels alone, for GPUs that need not be there

Trains a random model by SFT, reward regression and DPO, each in fp32 and bf16; scores conversations; generates greedily with the shipped
Base (fp32, bf16, and bf16 with an int8 cache) and with adapters of it; evaluates it on the miniature's prompts without code. Then the
engine's parts for a GPU, each beside torch's operations: keys split over programs, tiles of several sizes, rotation and store, residual
add and norm, pinned copies, penalties and sampling. Prints one JSON object. It fails when a loss, gradient norm or score is not finite,
when the first losses are not the CPU's, when a part for a GPU differs from torch's, or (with --smoke: over long answers two devices may
round a tie in two ways) when greedy text in fp32 is not the CPU's. Without a GPU, --smoke runs Triton's interpreter, where Triton is
installed, and records nothing. --compile prints the shared memory of each kernel, and fails where a GPU has less.
"""

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

if "--smoke" in sys.argv and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when it is imported

import gristmill.miniature
from gristmill.core.device import pick_device
from gristmill.core.progress import Progress
from gristmill.data.chat import Message
from gristmill.data.chat_format import FORMATS
from gristmill.data.human import HumanData
from gristmill.data.rows import Prompt
from gristmill.engine.block_manager import BLOCK_SIZE
from gristmill.engine.load import EngineArgs, answer_rows, load_engine
from gristmill.generation.api import Completion, Request, SamplingParams
from gristmill.judge.reward import RewardScorer
from gristmill.miniature.source import MiniatureSource
from gristmill.model.adapters import Adapter
from gristmill.model.config import ModelConfig, uniform_blocks
from gristmill.model.hf import load_model
from gristmill.model.lora import LoraConfig, adapter_parts, add_adapters
from gristmill.model.reward import RewardModel
from gristmill.model.transformer import Transformer
from gristmill.train.batches import AnySample, PairSample, RatedSample, Sample
from gristmill.train.objectives.next_token import next_token_objective
from gristmill.train.objectives.preference import PreferenceObjective, compute_reference_logprobs
from gristmill.train.objectives.reward import reward_objective
from gristmill.train.trainer import Objective, Trainer, TrainSettings

BASE = Path(gristmill.miniature.__file__).parent / "checkpoint"
OBJECTIVES: dict[str, Objective] = {"sft": next_token_objective, "reward": reward_objective, "dpo": PreferenceObjective("dpo")}
ENGINES = {
    "fp32": EngineArgs(dtype="fp32"),
    "bf16": EngineArgs(dtype="bf16"),
    "bf16, int8 cache": EngineArgs(dtype="bf16", cache="int8"),
}
# The first loss beside the CPU's: sums in another order, and the 8 bits of bf16.
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
SHARED_KIB = {80: 163, 89: 99, 90: 227}  # of a program, by compute capability
# What attention is compiled for: head size, types of activations and of the cache, compute capabilities.
COMPILED = (
    (128, torch.bfloat16, torch.bfloat16, (80, 89, 90)),
    (128, torch.bfloat16, torch.int8, (89,)),
    (128, torch.bfloat16, torch.float8_e4m3fn, (89, 90)),
    (256, torch.bfloat16, torch.bfloat16, (89,)),
    (128, torch.float32, torch.float32, (89,)),
    (256, torch.float32, torch.float32, (89,)),
)
TRITON_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "i8", torch.float8_e4m3fn: "fp8e4nv"}
TRITON_TYPES |= {torch.int32: "i32", torch.int64: "i64"}


class Size:
    """How much is done."""

    def __init__(self, smoke: bool) -> None:
        self.smoke = smoke
        heads = (2, 1, 16) if smoke else (16, 4, 64)
        hidden, self.layers = (32, 2) if smoke else (1024, 12)
        vocab, context = (512, 128) if smoke else (32_768, 2048)
        self.config = ModelConfig("nemotron", vocab, hidden, uniform_blocks(self.layers, *heads, 4 * hidden), max_positions=context)
        self.steps, self.batch_size = (2, 8) if smoke else (10, 64)
        self.tokens = (16, 60) if smoke else (256, 1024)  # of a document, from and to
        self.prompts, self.new_tokens = (4, 12) if smoke else (256, 200)
        self.evaluated = 6 if smoke else 400
        self.checked = 4 if smoke else 32  # greedy answers compared with the CPU's


def samples_of(kind: str, size: Size) -> list[AnySample]:
    rng = np.random.default_rng(0)

    def ids(low: int, high: int) -> np.ndarray:
        return rng.integers(0, size.config.vocab_size, int(rng.integers(low, high + 1)))

    low, high = size.tokens
    out: list[AnySample] = []
    for number in range(size.batch_size * size.steps):
        prompt = ids(low // 2, high // 2)
        answers = [np.concatenate([prompt, ids(low // 2, high // 2)]) for _ in range(2)]
        first, second = (Sample(answer, np.arange(len(answer)) >= len(prompt), str(number)) for answer in answers)
        if kind == "sft":
            out.append(first)
        elif kind == "dpo":
            out.append(PairSample(first, second, id=str(number)))
        else:
            out.append(RatedSample(first.ids, first.num_tokens - 1, rng.integers(0, 5, 5), id=str(number)))
    return out


def timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    started = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - started


def train(kind: str, precision: str, size: Size, device: torch.device, compile: bool = False) -> dict[str, Any]:
    """A few steps; the first loss beside that of the same step on the CPU."""
    samples = samples_of(kind, size)
    settings = TrainSettings(lr=1e-3, steps=size.steps, batch_size=size.batch_size, precision=precision, shuffle=False, compile=compile)

    def trainer(where: torch.device, num: int) -> tuple[Trainer, list[AnySample]]:
        model: torch.nn.Module = Transformer(size.config)
        data = samples[:num]
        if kind == "dpo":
            pairs = [sample for sample in data if isinstance(sample, PairSample)]
            data = list(compute_reference_logprobs(model.to(where), pairs, precision=precision))
        elif kind == "reward":
            model = RewardModel(model)
        return Trainer(model, OBJECTIVES[kind], settings, device=where, on_step=lambda step, total, m: seen.append(m)), data

    seen: list[dict[str, float]] = []
    ours, data = trainer(device, len(samples))
    result, seconds = timed(lambda: ours.fit(data), device)
    few = min(size.batch_size, 8)  # a small step is enough to compare
    steps = [one.step(given) for one, given in (trainer(torch.device("cpu"), few), trainer(device, few))]
    here, there = (step["loss"] for step in steps)
    assert all(math.isfinite(m["loss"]) and math.isfinite(m["grad_norm"]) for m in seen), (kind, precision, seen)
    assert math.isclose(here, there, rel_tol=TOLERANCE[precision]), (kind, precision, here, there)
    rate = seen[-1]["tokens_per_second"]
    return {"first_loss": seen[0]["loss"], "last_loss": seen[-1]["loss"], "seconds": seconds, "tokens": result.tokens, "last_rate": rate}


def score(size: Size, prompts: Sequence[Prompt], device: torch.device) -> dict[str, Any]:
    """Ratings by a random head on the shipped Base, and how far from the CPU's."""
    ratings = []
    talks = [[*prompt.messages, Message("assistant", f"It is {number}.")] for number, prompt in enumerate(prompts)]
    for where in (torch.device("cpu"), device):
        model, tokenizer = load_model(BASE)
        scorer = RewardScorer(RewardModel(model).to(where), tokenizer, FORMATS["nemotron"])
        rated, seconds = timed(lambda scorer=scorer: scorer.score(talks), where)
        ratings.append(np.array([astuple(rating) for rating in rated]))
    assert np.isfinite(ratings[1]).all()
    difference = float(np.abs(ratings[0] - ratings[1]).max())
    assert difference < 1e-3, difference
    return {"conversations": len(talks), "seconds": seconds, "largest_difference": difference}


def generate(how: EngineArgs, size: Size, prompts: Sequence[Prompt], device: torch.device) -> dict[str, Any]:
    """Greedy answers, and the share of some that the CPU gives too."""
    greedy = SamplingParams(temperature=0.0, max_tokens=size.new_tokens)

    def answers(where: torch.device, asked: Sequence[Prompt]) -> dict[int, dict[str, Any]]:
        engine = load_engine(BASE, EngineArgs(dtype=how.dtype, cache=how.cache, device=str(where)))
        rows = answer_rows(engine, [prompt.messages for prompt in asked], greedy, seed=0)
        return {row["index"]: row["responses"][0] for row in rows}

    out, seconds = timed(lambda: answers(device, prompts), device)
    here = answers(torch.device("cpu"), prompts[: size.checked])
    same = float(np.mean([out[index]["text"] == row["text"] for index, row in here.items()]))
    assert all(math.isfinite(row["logprob"]) for row in out.values())
    assert same == 1 or how.dtype != "fp32" or not size.smoke, f"{1 - same:.0%} of the greedy answers in fp32 are not the CPU's"
    tokens = sum(row["num_tokens"] for row in out.values())
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds, "same_as_cpu": same, "compared": len(here)}


def adapted(size: Size, prompts: Sequence[Prompt], device: torch.device) -> dict[str, Any]:
    """Greedy answers in fp32 of the shipped Base and two random adapters in one batch, and the share of some that the CPU gives too."""
    greedy = SamplingParams(temperature=0.0, max_tokens=size.new_tokens)

    def answers(where: torch.device, asked: Sequence[Prompt]) -> tuple[dict[str, Completion], float]:
        engine = load_engine(BASE, EngineArgs(dtype="fp32", device=str(where)))
        for rank in (4, 8):
            model, config = load_model(BASE)[0], LoraConfig(rank=rank, alpha=8.0)
            add_adapters(model, config, seed=rank)
            for part in adapter_parts(model).values():
                torch.nn.init.normal_(part.lora_B, std=0.05, generator=torch.Generator().manual_seed(rank))
            engine.add_adapter(f"rank {rank}", Adapter(config, adapter_parts(model), ""))
        names = ("", *engine.adapters)
        requests = [Request(str(i), tuple(p.messages), greedy, adapter=names[i % 3]) for i, p in enumerate(asked)]
        found, seconds = timed(lambda: list(engine.generate(requests)), where)
        return {request.id: completions[0] for request, completions in found}, seconds

    (out, seconds), (here, _) = answers(device, prompts), answers(torch.device("cpu"), prompts[: size.checked])
    same = float(np.mean([out[name].text == one.text for name, one in here.items()]))
    assert same == 1 or not size.smoke, f"{1 - same:.0%} of the answers with adapters are not the CPU's"
    tokens = sum(one.num_tokens for one in out.values())
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds, "same_as_cpu": same, "compared": len(here)}


def attention_parts(size: Size, device: torch.device) -> dict[str, Any]:
    """Attention of a step with long sequences that decode and prompts that begin, by Triton beside torch, with keys split and tiles of
    several sizes; rotation and store are part of each."""
    from gristmill.engine import attention

    heads = (2, 1, 16) if size.smoke else (32, 8, 128)
    config = ModelConfig("llama", 512, 64, uniform_blocks(1, *heads, 64), max_positions=4096)
    angles = Transformer(config).rope(torch.arange(4096))
    angles = {kind: (cos.to(device), sin.to(device)) for kind, (cos, sin) in angles.items()}
    seq_lens = np.array([100, 33, 40, 6] if size.smoke else [4000, 900, 2000, 1024], np.int32)
    counts = np.array([1, 1, 9, 6] if size.smoke else [1, 1, 1500, 1024])
    blocks = -(-int(seq_lens.max()) // BLOCK_SIZE)
    tables = np.random.default_rng(0).permutation(4 * blocks).astype(np.int32).reshape(4, blocks)
    start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    positions = np.concatenate([np.arange(n - c, n) for n, c in zip(seq_lens, counts, strict=True)])
    step = attention.AttentionMetadata(start, seq_lens, np.arange(4, dtype=np.int32), tables, positions.astype(np.int64), 2)
    dtype = torch.float32 if size.smoke else torch.bfloat16
    qkv = torch.randn(int(start[-1]), heads[0] + 2 * heads[1], heads[2], device=device).to(dtype)
    found: dict[str, Any] = {}
    expected: torch.Tensor | None = None
    for splits, rows in ((1, 64), (1, 128), (4, 128), (16, 128)):
        with patched(attention, MAX_SPLITS=splits, TILE_ROWS=rows):
            for make in (attention.TorchAttention, attention.TritonAttention) if expected is None else (attention.TritonAttention,):
                cache = attention.KVCache(config, dtype, device)
                cache.allocate(4 * blocks)
                torch.manual_seed(0)
                cache.memory.normal_()
                backend = make(config, cache, angles=angles)
                backend.prepare(step)
                if not size.smoke:
                    backend.attend(0, qkv)  # compiles
                out, seconds = timed(lambda backend=backend: backend.attend(0, qkv), device)
                if expected is None:
                    expected, stored = out, cache.memory
                    found["torch"] = {"seconds": seconds}
                    continue
                far = float((out - expected).abs().max())
                assert far < (1e-4 if size.smoke else 0.05) and torch.allclose(cache.memory, stored, atol=1e-5 if size.smoke else 0.05), far
                found[f"{splits} splits, tiles of {rows}"] = {"seconds": seconds, "largest_difference": far}
    return found


def norm_part(size: Size, device: torch.device) -> dict[str, Any]:
    """Residual add and RMS norm in one kernel beside torch's."""
    from gristmill.engine.layers import Norm
    from gristmill.model.layers import RMSNorm

    width = 96 if size.smoke else 4096
    module = RMSNorm(width, 1e-5).to(device).requires_grad_(False)
    torch.nn.init.normal_(module.weight)
    norm, outs, found = Norm(module), [], {}
    norm.library = None
    x, delta = torch.randn(2, 8 if size.smoke else 512, width, device=device)
    for norm.fused in (False, True):
        norm(x.clone(), delta)
        mine = x.clone()
        out, seconds = timed(lambda mine=mine: norm(mine, delta), device)
        outs.append(out)
        found["fused" if norm.fused else "torch"] = {"seconds": seconds}
    assert torch.equal(outs[0][0], outs[1][0]) and torch.allclose(outs[0][1], outs[1][1], atol=1e-5)
    return found


def sampling_part(size: Size, device: torch.device) -> dict[str, Any]:
    """Penalties, top-k, top-p and min-p on the device beside the CPU: the same tokens."""
    from gristmill.core.device import put
    from gristmill.engine.sampler import SamplingMetadata, penalise, sample

    rng, (rows, vocab) = np.random.default_rng(0), (6, 500) if size.smoke else (64, 128_256)
    logits, u = rng.normal(0, 3, (rows, vocab)).astype(np.float32), rng.random(rows, np.float32)
    histories = [(rng.integers(0, vocab, 40, np.int32), rng.integers(0, vocab, 20, np.int32)) for _ in range(rows)]
    params = [SamplingParams(repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.1)] * rows
    settings = {
        "top_p_B": np.where(np.arange(rows) % 2, 0.9, 1.0).astype(np.float32),
        "top_k_B": np.arange(rows) % 3 * 20,
        "min_p_B": np.where(np.arange(rows) % 5, 0.0, 0.05).astype(np.float32),
    }
    temperature = np.where(np.arange(rows) % 4, 0.8, 0.0).astype(np.float32)
    outs, found = [], {}
    for where in (torch.device("cpu"), device):
        need = SamplingMetadata.of(temperature, settings["top_p_B"], settings["top_k_B"], min_p_B=settings["min_p_B"])

        def draw(where: torch.device = where, need: SamplingMetadata = need) -> torch.Tensor:
            plain = put(logits, where)
            processed = plain.clone()
            penalise(processed, list(range(rows)), histories, params)
            others = {name: put(array, where) for name, array in settings.items()}
            given = put(u, where), put(temperature, where)
            return sample(plain, *given, **others, metadata=need, processed_BV=processed)[0]

        draw()
        tokens, seconds = timed(draw, where)
        outs.append(tokens.cpu())
        found[str(where)] = {"seconds": seconds}
    same = float((outs[0] == outs[1]).float().mean())
    assert same == 1 or not size.smoke, same
    pinned = device.type == "cuda" and torch.from_numpy(logits).pin_memory().is_pinned()
    return found | {"same_tokens": same, "pinned_copies": pinned}


@contextmanager
def patched(place: Any, **values: Any) -> Iterator[None]:
    """Other values of a module's or class's names, for a while."""
    old = {name: getattr(place, name) for name in values}
    for name, value in values.items():
        setattr(place, name, value)
    try:
        yield
    finally:
        for name, value in old.items():
            setattr(place, name, value)


def engine_parts(size: Size, device: torch.device) -> dict[str, Any]:
    """The engine's parts for a GPU."""
    parts: dict[str, Any] = {"sampling": sampling_part(size, device)}
    if find_spec("triton") is None:
        return parts | {"triton": "it is not installed: pip install triton"}
    if device.type != "cuda" and not size.smoke:
        return parts | {"triton": "its interpreter is for --smoke"}
    with torch.inference_mode():
        return parts | {"attention": attention_parts(size, device), "add and norm": norm_part(size, device)}


def compiled() -> Iterator[dict[str, Any]]:
    """Shared memory of the kernels of attention, as a step launches them, and of the fused norm."""
    from gristmill.engine import attention
    from gristmill.engine.kernels import triton_attention, triton_norm

    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    class Recorder:
        """In a kernel's place."""

        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *args, **options: calls.append((self.kernel, args, options))

    def compile_calls(targets: Sequence[int], **what: str) -> Iterator[dict[str, Any]]:
        for call in calls:
            for target in targets:
                yield what | compile_one(*call, target)
        calls.clear()

    names = ("_attend", "_join", "_rotate_and_store")
    with patched(triton_attention, **{name: Recorder(getattr(triton_attention, name)) for name in names}):
        for head_dim, dtype, cache_dtype, targets in COMPILED:
            config = ModelConfig("llama", 512, 64, uniform_blocks(1, 32, 8, head_dim, 64), max_positions=4096)
            cache = attention.KVCache(config, cache_dtype, torch.device("cpu"))
            cache.allocate(64)
            backend = attention.TritonAttention(config, cache, angles=Transformer(config).rope(torch.arange(4096)), dtype=dtype)
            lens, start = np.array([1000, 200], np.int32), np.array([0, 1, 201], np.int32)
            positions = np.concatenate([[999], np.arange(200)])
            table = np.arange(64, dtype=np.int32).reshape(2, 32)
            backend.prepare(attention.AttentionMetadata(start, lens, np.arange(2, dtype=np.int32), table, positions, 1))
            backend.attend(0, torch.zeros(201, 48, head_dim, dtype=dtype))
            yield from compile_calls(targets, head=str(head_dim), activations=str(dtype), cache=str(cache_dtype))
    with patched(triton_norm, _add_norm=Recorder(triton_norm._add_norm)):
        x_TD, gain_D = torch.zeros(1, 8192, dtype=torch.bfloat16), torch.zeros(8192)
        triton_norm.add_norm(x_TD, x_TD, gain_D, gain_D, eps=1e-5, centred=True)
        yield from compile_calls(tuple(SHARED_KIB), width="8192")


def compile_one(kernel: Any, args: Sequence[Any], options: dict[str, Any], target: int) -> dict[str, Any]:
    """A kernel compiled for a compute capability, with what Triton would know of these arguments."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, known = {}, {}, {}
    for number, (parameter, value) in enumerate(zip(kernel.params, args, strict=True)):
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[(number,)] = "constexpr", value
            continue
        tensor = isinstance(value, torch.Tensor)
        signature[parameter.name] = f"*{TRITON_TYPES[value.dtype]}" if tensor else "i32" if isinstance(value, int) else "fp32"
        if tensor or (isinstance(value, int) and value % 16 == 0):  # torch's memory begins at whole 16 bytes
            known[(number,)] = [["tt.divisibility", 16]]
    done = triton.compile(ASTSource(kernel, signature, constants, known), target=GPUTarget("cuda", target, 32), options=options)
    shared = done.metadata.shared / 1024
    assert shared <= SHARED_KIB[target], (kernel.__name__, target, shared)
    rows = dict(zip([p.name for p in kernel.params], args, strict=True)).get("R")
    return {"kernel": kernel.__name__, "capability": target, "shared_kib": shared} | ({} if rows is None else {"rows": rows})


def evaluation(size: Size, prompts: Sequence[Prompt], device: torch.device) -> dict[str, Any]:
    """Accuracy of the shipped Base."""
    from gristmill.workflows.evaluate import evaluate

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.jsonl"
        rows = [{"messages": [asdict(m) for m in p.messages], "truth": p.truth, "task": p.task} for p in prompts[: size.evaluated]]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        engine = load_engine(BASE, EngineArgs(device=str(device)))
        work = lambda: evaluate(engine, path, Progress(quiet=True), max_tokens=size.new_tokens, seed=0)  # noqa: E731
        scores, seconds = timed(work, device)
    return {"greedy": scores["greedy"]["overall"], "sampled": scores["sampled"]["overall"], "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--smoke", action="store_true", help="toy size")
    parser.add_argument("--compile", action="store_true", help="compile Triton's kernels, and nothing else")
    args = parser.parse_args()
    if args.compile:
        for row in compiled():
            print(json.dumps(row), flush=True)
        return
    device, size = pick_device(args.device), Size(args.smoke)
    prompts = [p for p in MiniatureSource(HumanData(), 0).evaluation() if p.truth and p.truth["kind"] != "code"]
    asked = prompts[: size.prompts]
    report: dict[str, Any] = {
        "device": str(device),
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
        | {name: metadata.version(name) for name in ("gristmill", "numpy")},
        "train": {f"{kind} {p}": train(kind, p, size, device) for kind in OBJECTIVES for p in TOLERANCE}
        | {"sft bf16, compiled": train("sft", "bf16", size, device, compile=True)},
        "score": score(size, asked, device),
        "generate": {name: generate(how, size, asked, device) for name, how in ENGINES.items()},
        "adapters": adapted(size, asked, device),
        "evaluate": evaluation(size, prompts, device),
        "engine": engine_parts(size, device),
    }
    if device.type == "cuda":
        report["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    json.dump(report, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
