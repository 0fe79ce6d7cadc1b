"""lm-eval against the server: the same score as in process, to the last digit.

    PYTHONPATH=src python bench/lm_eval.py MODEL --lm-eval-python VENV/bin/python

Questions about the miniature world's lands with four answers each, as a task file over a local JSONL, are scored twice: by lm-eval's
`local-completions` through `gristmill serve MODEL`, and in process by the same rule (the answer with the highest log-probability; per
character, too). Prints one line of JSON, and exits 1 if the scores differ. VENV needs lm-eval, and nothing of gristmill.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gristmill.engine.engine import Engine
from gristmill.engine.load import load_engine
from gristmill.miniature.world import World

TASK = """task: lands
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: " "
metric_list:
  - {{metric: acc}}
  - {{metric: acc_norm}}
"""


def questions(num: int) -> list[dict[str, Any]]:
    draw, world, out = random.Random(0), World.make(), []
    for _ in range(num):
        problem = world.draw(draw, "facts")
        choices = [problem.truth["value"], *draw.sample(list(problem.others), 3)]
        draw.shuffle(choices)
        out.append({"question": problem.question, "choices": choices, "label": choices.index(problem.truth["value"])})
    return out


def in_process(engine: Engine, docs: list[dict[str, Any]]) -> dict[str, float]:
    """Shares of documents whose right answer is the likeliest: as a whole, and per character."""
    right = {"acc": 0, "acc_norm": 0}
    for doc in docs:
        context = engine.tokenizer.encode(doc["question"])
        sums = []
        for choice in doc["choices"]:
            whole = engine.tokenizer.encode(f"{doc['question']} {choice}")
            assert whole[: len(context)] == context, "the question ends where a token does"
            logprobs, _ = engine.prompt_logprobs(whole, 1)
            sums.append(sum(logprobs[len(context) - 1 :]))
        norms = [value / len(choice) for value, choice in zip(sums, doc["choices"], strict=True)]
        right["acc"] += sums.index(max(sums)) == doc["label"]
        right["acc_norm"] += norms.index(max(norms)) == doc["label"]
    return {name: count / len(docs) for name, count in right.items()}


def by_lm_eval(python: str, model: Path, url: str, docs: list[dict[str, Any]]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "lands.jsonl"
        data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        (Path(scratch) / "lands.yaml").write_text(TASK.format(data=data))
        settings = {
            "model": "model",
            "base_url": f"{url}/completions",
            "tokenizer": str(model),
            "tokenized_requests": True,
            "num_concurrent": 8,
        }
        command = [python, "-m", "lm_eval", "--model", "local-completions", "--tasks", "lands", "--include_path", scratch]
        command += [
            "--model_args",
            ",".join(f"{k}={v}" for k, v in settings.items()),
            "--output_path",
            f"{scratch}/out",
            "--batch_size",
            "1",
        ]
        env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": f"{scratch}/cache", "PYTHONPATH": ""}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        (found,) = Path(scratch).glob("out/**/results_*.json")
        results = json.loads(found.read_text())
    scores = results["results"]["lands"]
    return {"acc": scores["acc,none"], "acc_norm": scores["acc_norm,none"], "version": results.get("lm_eval_version", "")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--lm-eval-python", required=True)
    parser.add_argument("--questions", type=int, default=200)
    args = parser.parse_args()
    docs = questions(args.questions)
    command = [sys.executable, "-m", "gristmill.cli", "serve", str(args.model), "--port", "0", "--name", "model"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            through = by_lm_eval(args.lm_eval_python, args.model.resolve(), process.stdout.readline().split()[-1], docs)
        finally:
            process.terminate()
    own = in_process(load_engine(args.model), docs)
    print(json.dumps({"questions": len(docs), "in process": own, "lm-eval": through}))
    sys.exit(any(own[name] != through[name] for name in own))


if __name__ == "__main__":
    main()
