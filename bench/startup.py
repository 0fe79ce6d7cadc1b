"""Start-up of pretraining on a blend: seconds and memory from a loaded model to the first step, by the number of documents.

    PYTHONPATH=src OMP_NUM_THREADS=1 python bench/startup.py --documents 100 100000 200000 400000 800000

Documents have 500 tokens and are made here, in a temporary folder (2 KB each). Each number of them is measured in a process of its own:
opening the store, the plan of steps, and a new Trainer's `fit` until it has the first step's samples. Prints a line of JSON each:
seconds on the wall and of the processor, and MiB above those of the loaded model, then and at the most.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

TOKENS = 500


def make(folder: Path, num_documents: int) -> None:
    """A blend of random tokens, as `gristmill blend` leaves it, for the miniature's tokenizer."""
    import numpy as np

    from gristmill.data.tokenizer import Tokenizer
    from gristmill.miniature.base import BASE

    tokenizer = Tokenizer.load(BASE)
    shards = []
    rng = np.random.default_rng(0)
    for first in range(0, num_documents, 100_000):
        ids = rng.integers(5, tokenizer.vocab_size, min(100_000, num_documents - first) * TOKENS).astype("<i4")
        shards.append({"file": f"tokens-{len(shards):05d}.bin", "tokens": len(ids)})
        ids.tofile(folder / shards[-1]["file"])
    np.save(folder / "ends.npy", np.arange(1, num_documents + 1, dtype=np.int64) * TOKENS)
    facts = {"key": "bench", "documents": num_documents, "tokens": num_documents * TOKENS, "shards": shards}
    (folder / "blend.json").write_text(json.dumps(facts | {"tokenizer": {"fingerprint": tokenizer.fingerprint()}}))


def memory(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) // 1024


class FirstStep(Exception):
    pass


def measure(folder: Path) -> dict[str, float]:
    """Of this process, which does nothing else."""
    import torch

    from gristmill.data.token_store import TokenStore
    from gristmill.miniature.base import BASE
    from gristmill.model.hf import load_model
    from gristmill.train.data import TokenStoreData
    from gristmill.train.objectives.next_token import next_token_objective
    from gristmill.train.trainer import Trainer, TrainSettings

    torch.set_num_threads(1)
    settings = TrainSettings(epochs=1, shuffle=False, batch_tokens=8192, optimizer="muon", checkpoint_every=120.0)

    def start(data_folder: Path, place: Path) -> None:
        model, tokenizer = load_model(BASE)
        trainer = Trainer(model, next_token_objective, settings, folder=place)

        def stop(_: object) -> dict[str, float]:
            raise FirstStep

        trainer.step = stop  # type: ignore[method-assign, assignment]
        nonlocal before, wall, cpu
        before, wall, cpu = memory("VmRSS"), time.monotonic(), time.process_time()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins here
        store = TokenStore(data_folder, tokenizer)
        with suppress(FirstStep):
            trainer.fit(TokenStoreData(store, model.config.max_positions))
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu

    before, wall, cpu = 0, 0.0, 0.0
    with tempfile.TemporaryDirectory() as few, tempfile.TemporaryDirectory() as place:
        make(Path(few), 100)
        start(Path(few), Path(place, "warm"))  # imports and code that is made on first use
        start(folder, Path(place, "run"))
    return {"seconds": round(wall, 3), "cpu_seconds": round(cpu, 3), "mib": memory("VmRSS") - before, "peak_mib": memory("VmHWM") - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[100_000])
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    for num_documents in args.documents:
        with tempfile.TemporaryDirectory() as name:
            make(Path(name), num_documents)
            done = subprocess.run([sys.executable, __file__, "--measure", name], stdout=subprocess.PIPE, text=True, check=True)
        print(json.dumps({"documents": num_documents} | json.loads(done.stdout)), flush=True)


if __name__ == "__main__":
    main()
