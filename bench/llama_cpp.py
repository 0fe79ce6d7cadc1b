"""llama.cpp beside the engine: a model folder goes through llama.cpp's converter, then both answer the same prompts greedily in float32.

    PYTHONPATH=src python bench/llama_cpp.py --converter LLAMA_CPP/convert_hf_to_gguf.py --llama-python VENV/bin/python
    PYTHONPATH=src python bench/llama_cpp.py MODEL --converter ... --llama-python ... --texts FILE.jsonl

LLAMA_CPP is llama.cpp's repository, VENV has xllamacpp, and nothing of gristmill; README.md beside this file gets both.

The converter runs in the interpreter of this script (it needs torch and transformers). It is told two things: that a Nemotron's
vocabulary may be byte-level BPE (it looks for SentencePiece's tokenizer.model alone), and the name of llama.cpp's pre-tokenizer, which it
otherwise finds by a hash of token ids that no newly trained vocabulary can match. `starcoder` is the nearest that llama.cpp has, and not
quite ours; README.md says where they differ.

Prompts are the beginnings of texts, given to both as token ids; the default model is the miniature's Base. The texts are then given to
both tokenizers as text, and so are awkward ones made of quotes, white space, digits and characters of many scripts. Prints one line of
JSON: prompts answered with the same tokens, the largest difference between log-probabilities, how close the two likeliest tokens ever
came, and texts with the same ids; of what differs, the first few. Exits 1 if an answer or a text (awkward ones aside) differs.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import torch

from gristmill.engine.engine import Engine
from gristmill.engine.load import EngineArgs, load_engine
from gristmill.generation.api import Completion, Request, SamplingParams
from gristmill.miniature.base import BASE
from gristmill.miniature.world import World

SHOWN = 5  # differences of a kind that are printed
CONVERT = """
import json, sys
from pathlib import Path

tool, pre, folder, out = sys.argv[1:]
sys.path.insert(0, str(Path(tool).parent))
import convert_hf_to_gguf as converter

(name,) = json.loads((Path(folder) / "config.json").read_text())["architectures"]
model = converter.get_model_class(name)
model.set_vocab = model._set_vocab_gpt2
model.get_vocab_base_pre = lambda self, tokenizer: pre
sys.argv = [tool, folder, "--outtype", "f32", "--outfile", out]
converter.main()
"""
SERVE = """
import sys
import xllamacpp as llama

params = llama.CommonParams()
params.model.path = sys.argv[1]
params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.n_gpu_layers = 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[2])
params.verbosity = 1  # errors
server = llama.Server(params)
print(llama.__version__, server.listening_address, flush=True)
sys.stdin.read()
"""
AWKWARD = (
    *("the", " the", "don't", "'the", "'s", " 'some", "I'LL", "('re", '"', "''", "``", "...", " ...", "!?", "->", " != ", "://"),
    *("$5.00", " ", "  ", "     ", "\t", "\n", "\n\n", "\n    ", " \n", "\r\n", "\xa0", "\u2003", "\x85", "\u200b", "3", " 42"),
    *("  1234567", "3.14", "\xb2", " \xbd", "\u2163", "\u0665", " \u0967\u0968", "na\xefve", "e\u0301", " \xfcber", "\xe6"),
    *("\u0416\u0443\u043a", "\u03b1\u03b2", "\u4f60\u597d", "\u30ab\u30ca", "\ud55c\uae00", "\u0915\u094d\u0937\u093f"),
    *("\u0e01\u0e33", "\u05e9\u05b8\u05c1", "\u0645\u064e", "\u2014", " \u201cso\u201d", "\u2019s", "\xb0\xb1", "\U0001f680"),
    *(" \U0001f9d1\u200d\U0001f52c", "\u2705", "\u222b", "\u20ac", "<|endoftext|>", "def f(x):", " x += 1", "camelCase", "A_b"),
)


def awkward(num: int) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(AWKWARD, k=draw.randint(1, 12))) for _ in range(num)]


# ---- llama.cpp ----


def convert(converter: Path, pre: str, folder: Path, out: Path) -> None:
    command = [sys.executable, "-c", CONVERT, str(converter.resolve()), pre, str(folder.resolve()), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])


class Llama:
    """llama.cpp's server."""

    def __init__(self, version: str, url: str) -> None:
        self.version, self.url = version, url

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def encode(self, text: str) -> list[int]:
        found: list[int] = self.post("/tokenize", {"content": text, "add_special": True, "parse_special": False})["tokens"]
        return found

    def answer(self, prompt: list[int], most: int) -> dict[str, Any]:
        return self.post(
            "/completion",
            {"prompt": prompt, "n_predict": most, "temperature": 0, "return_tokens": True, "n_probs": 1, "cache_prompt": False},
        )


@contextmanager
def served(python: str, model: Path, threads: int) -> Iterator[Llama]:
    command = [python, "-c", SERVE, str(model), str(threads)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            told = process.stdout.readline().split()
            if not told:
                sys.exit("llama.cpp does not load the converted model: it says why above.")
            yield Llama(*told)
        finally:
            process.terminate()


# ---- the comparison ----


def own_answers(engine: Engine, prompts: list[list[int]], most: int) -> list[Completion]:
    engine.stop_V[:] = False
    engine.stop_V[engine.tokenizer.eos_id] = True  # a GGUF file knows no end of turn
    core = engine.core()
    for i, prompt in enumerate(prompts):
        core.add(
            engine.prepare(Request(str(i), (), SamplingParams(temperature=0, max_tokens=most, top_logprobs=2), prompt_ids=tuple(prompt)))
        )
    answers: dict[int, Completion] = {}
    while not core.idle:
        core.step()
        for state in core.take_finished():
            (answer,) = state.completions
            assert answer is not None
            answers[int(state.request.id)] = answer
    return [answers[i] for i in range(len(prompts))]


def compare_answers(engine: Engine, llama: Llama, prompts: list[list[int]], most: int) -> dict[str, Any]:
    same = same_text = tokens = 0
    largest, closest = 0.0, float("inf")
    differences = []
    for prompt, own in zip(prompts, own_answers(engine, prompts, most), strict=True):
        found = llama.answer(prompt, most)
        ours = [token for token in own.tokens if token != engine.tokenizer.eos_id]
        theirs = [token for token in found["tokens"] if token != engine.tokenizer.eos_id]
        ended = {"stop": "eos", "length": "limit"}[own.finish] == found["stop_type"]
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False)))
        steps = found["completion_probabilities"]  # lack tokens that end within a character: compared up to the first such
        told = takewhile(lambda pair: pair[0][0] == pair[1]["id"], zip(zip(ours[:common], own.logprobs, strict=False), steps, strict=False))
        largest = max([largest, *(abs(logprob - step["logprob"]) for (_, logprob), step in told)])
        closest = min([closest, *(best[0][1] - best[1][1] for best in own.top_logprobs)])
        tokens += len(ours)
        same += ours == theirs and ended
        same_text += engine.tokenizer.decode(ours) == found["content"]
        if ours != theirs or not ended:
            before = [*prompt, *ours[:common]]
            (a, b) = (part[common] if common < len(part) else engine.tokenizer.eos_id for part in (ours, theirs))
            gap = engine.prompt_logprobs([*before, a], 1)[0][-1] - engine.prompt_logprobs([*before, b], 1)[0][-1]
            differences.append({"at": common, "tokens": [a, b], "logit_gap": gap})
    out = {"prompts": len(prompts), "same": same, "same_text": same_text, "tokens": tokens}
    return out | {"largest_logprob_difference": largest, "smallest_logit_gap": closest, "differences": differences[:SHOWN]}


def compare_ids(engine: Engine, llama: Llama, texts: list[str]) -> dict[str, Any]:
    differences = []
    tokens = 0
    for text, ours in zip(texts, engine.tokenizer.encode_batch(texts), strict=True):
        theirs = llama.encode(text)
        tokens += len(ours)
        if ours != theirs:
            at = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False)))
            parts = [[engine.tokenizer.decode([token]) for token in ids[at : at + 3]] for ids in (ours, theirs)]
            differences.append({"before": engine.tokenizer.decode(ours[:at])[-12:], "ours": parts[0], "theirs": parts[1]})
    return {"texts": len(texts), "tokens": tokens, "token_ids_same": len(texts) - len(differences), "differences": differences[:SHOWN]}


def read_texts(path: Path | None, num: int) -> list[str]:
    if path is None:
        return list(islice(World.make().documents(0), num))
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in islice(lines, num)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=BASE)
    parser.add_argument("--converter", type=Path, required=True, help="llama.cpp's convert_hf_to_gguf.py, inside its repository")
    parser.add_argument("--llama-python", required=True, help="interpreter of an environment with xllamacpp")
    parser.add_argument("--pre", default="starcoder", help="llama.cpp's name of the pre-tokenizer")
    parser.add_argument("--texts", type=Path, help="a .jsonl file with a `text` column instead of documents of the miniature world")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    engine = load_engine(args.model, EngineArgs(dtype="fp32"))
    texts = read_texts(args.texts, args.prompts)
    draw = random.Random(0)
    prompts = [ids[: draw.randint(4, 64)] for ids in engine.tokenizer.encode_batch(texts)]
    with tempfile.TemporaryDirectory() as scratch:
        gguf = Path(scratch) / "model.gguf"
        convert(args.converter, args.pre, args.model, gguf)
        with served(args.llama_python, gguf, torch.get_num_threads()) as llama:
            answers = compare_answers(engine, llama, prompts, args.max_tokens)
            ids, hard = compare_ids(engine, llama, texts), compare_ids(engine, llama, awkward(args.prompts))
    written_by = re.search(r'^version = "(.*)"', (args.converter.parent / "gguf-py" / "pyproject.toml").read_text(), re.M)
    versions = {name: metadata.version(name) for name in ("gristmill", "torch", "transformers")}
    versions |= {"xllamacpp": llama.version, "gguf": written_by[1] if written_by else ""}
    print(json.dumps({**answers, "pre": args.pre, "ids": ids, "awkward": hard, "versions": versions}))
    sys.exit(answers["same"] < len(prompts) or ids["token_ids_same"] < len(texts))


if __name__ == "__main__":
    main()
