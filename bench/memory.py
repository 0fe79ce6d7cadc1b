"""Memory of real sizes: what loading, generating and serving a folder takes beside its file, and a random folder to try it on.

    PYTHONPATH=src python bench/memory.py make FOLDER --tokenizer SMOL      a Llama of 1.24B parameters with random weights in bf16
    PYTHONPATH=src python bench/memory.py load FOLDER [--dtype bf16] [--quantize int8] [--tokens 4]
    PYTHONPATH=src python bench/memory.py train SMOL --rows gsm8k/train.jsonl [--num-rows 64]      `gristmill train sft`, default settings

Prints one line of JSON. Of load: MiB of the weight files, of the process before (imports, tokenizer), at its peak (VmHWM) and at rest, and
of the file pages among the last (RssFile). Of train: bytes at the peak, and seconds to the first line, in all and of the processor.
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path


def memory(*names: str) -> list[int]:
    """Lines of /proc/self/status, in MiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(("Vm", "Rss")))
    return [int(lines[name].split()[0]) // 1024 for name in names]


def make(folder: Path, tokenizer_folder: Path) -> None:
    """Save a random Llama of the size of Llama 3.2 1B; its vocabulary is the tokenizer's."""
    import torch

    from gristmill.data.tokenizer import Tokenizer
    from gristmill.model.config import uniform_blocks
    from gristmill.model.hf_config import read_config
    from gristmill.model.hf_save import save_model
    from gristmill.model.transformer import Transformer

    _, config = read_config(tokenizer_folder)
    config = replace(config, hidden_size=2048, blocks=uniform_blocks(18, 32, 8, 64, 8192))
    with torch.device("meta"):
        model = Transformer(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    model.init_weights(0)
    save_model(model, Tokenizer.load(tokenizer_folder), folder)


def load(folder: Path, dtype: str, quantize: str, *, num_tokens: int, num_prompts: int) -> None:
    """Load an engine, and let it say a few tokens."""
    from gristmill.data.tokenizer import Tokenizer
    from gristmill.engine.load import EngineArgs, load_engine
    from gristmill.generation.api import Request, SamplingParams

    Tokenizer.load(folder)
    (before,) = memory("VmRSS")
    started = time.process_time()
    engine = load_engine(folder, EngineArgs(dtype=dtype, quantize=quantize))  # type: ignore[arg-type]
    seconds = time.process_time() - started
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0)
    list(engine.generate([Request(str(i), (), sampling, 0, prompt_ids=(5 + i, 6, 7)) for i in range(num_prompts)]))
    peak, rest, files = memory("VmHWM", "VmRSS", "RssFile")
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors")) // 2**20
    facts = {"file": weights, "before": before, "peak": peak, "rest": rest, "rest_files": files, "load_cpu_seconds": round(seconds, 1)}
    print(json.dumps({"dtype": dtype, "quantize": quantize} | facts | {"peak_to_file": round(peak / weights, 3)}))


def train(folder: Path, rows: Path, num_rows: int) -> None:
    """Train on questions and answers as conversations, in a process of its own."""
    with gzip.open(rows, "rt") if rows.suffix == ".gz" else rows.open() as file:
        given = [json.loads(line) for line, _ in zip(file, range(num_rows), strict=False)]
    with tempfile.TemporaryDirectory() as place:
        data = Path(place, "rows.jsonl")
        talks = [[{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}] for row in given]
        data.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
        command = [sys.executable, "-m", "gristmill.cli", "train", "sft", "--model", folder, "--data", data, "--out", Path(place, "out")]
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert process.stdout is not None
        process.stdout.readline()
        first = time.monotonic() - started
        output = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)  # of this process alone
        if status:
            sys.exit(output.decode())
    facts = {"rows": len(given), "peak_bytes": used.ru_maxrss * 1024, "first_line_seconds": round(first, 1)}
    print(json.dumps(facts | {"seconds": round(time.monotonic() - started), "cpu_seconds": round(used.ru_utime + used.ru_stime)}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "load", "train"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="folder whose tokenizer and kind of model are taken")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--quantize", default="")
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--rows", type=Path, help="JSONL with question and answer, gzip too")
    parser.add_argument("--num-rows", type=int, default=64)
    args = parser.parse_args()
    if args.what == "make":
        make(args.folder, args.tokenizer)
    elif args.what == "train":
        train(args.folder, args.rows, args.num_rows)
    else:
        load(args.folder, args.dtype, args.quantize, num_tokens=args.tokens, num_prompts=args.prompts)
