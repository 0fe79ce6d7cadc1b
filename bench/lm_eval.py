"""lm-eval against gristmill: the same prompts, log-likelihoods and scores on benchmarks, and the same score over the server.

    PYTHONPATH=src python bench/lm_eval.py MODEL --lm-eval-python VENV/bin/python --data DIR --tasks mmlu,arc_challenge --items 50
    PYTHONPATH=src python bench/lm_eval.py MODEL --lm-eval-python VENV/bin/python --data DIR --tasks mmlu --items 5 --server
    PYTHONPATH=src python bench/lm_eval.py MODEL --lm-eval-python VENV/bin/python --data DIR --tasks mmlu --items 5 --speed
    PYTHONPATH=src python bench/lm_eval.py MODEL --lm-eval-python VENV/bin/python
    PYTHONPATH=src python bench/lm_eval.py --lm-eval-python VENV/bin/python --data DIR --verdicts answers.jsonl --items 3

The first compares, for each task and subset, the first items: prompts and continuations byte for byte, log-likelihoods, answers, what is
extracted of them, and metrics; ties within 1e-5 are told. Both read the same rows. It exits 1 if anything differs. With --random a Llama of
one layer and random weights, with a context of 16,384, stands in for MODEL, of which only the tokenizer is used. --max-gen-toks shortens
answers on both sides; how many of them a stop ended ("stopped") is told.
The second compares with lm-eval's `local-completions` on `gristmill serve MODEL` too, in lines of their own.
The third counts requests a second of processor time, in one thread, of lm-eval's HF back-end and of ours.
The fourth scores questions about the miniature world's lands by lm-eval's `local-completions` through `gristmill serve MODEL`, and in
process.
The fifth asks no model: every IFEval prompt's instructions are checked on as many texts of a file of answers (Arena-Hard's form), and the
verdicts that differ are counted by instruction.
VENV needs lm-eval 0.4.13 (for ifeval nltk's data too), and nothing of gristmill. Programs that a model wrote are
compared as texts, and not run.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from gristmill.core.progress import Progress
from gristmill.data.rows import read_records
from gristmill.data.tokenizer import Tokenizer
from gristmill.engine.engine import Engine
from gristmill.engine.load import EngineArgs, load_engine
from gristmill.evaluate.documents import TaskData, read_task
from gristmill.evaluate.harness import ifeval_verdicts
from gristmill.evaluate.model_answers import read_answers
from gristmill.evaluate.task import TASKS, find_tasks
from gristmill.miniature.world import World
from gristmill.model.config import ModelConfig, uniform_blocks
from gristmill.model.hf_save import save_model
from gristmill.model.transformer import Transformer
from gristmill.workflows.benchmark_requests import BenchmarkArgs
from gristmill.workflows.benchmark_sources import EngineSource
from gristmill.workflows.benchmarks import SAMPLES, run_benchmarks

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


@contextmanager
def served(model: Path, *options: str) -> Iterator[str]:
    """The base URL of a server of a model, which it knows as "model"."""
    command = [sys.executable, "-m", "gristmill.cli", "serve", str(model), "--port", "0", "--name", "model", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[-1]
        finally:
            process.terminate()


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


# ---- benchmarks ----

SHIPPED = {  # our task -> lm-eval's task file; of a task with subsets by the subset's name
    "mmlu": "mmlu/default/mmlu_{subset}.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "truthfulqa_mc1": "truthfulqa/truthfulqa_mc1.yaml",
    "truthfulqa_mc2": "truthfulqa/truthfulqa_mc2.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
    "gsm8k_cot": "gsm8k/gsm8k-cot.yaml",
    "bbh": "bbh/cot_fewshot/{subset}.yaml",
    "humaneval": "humaneval/humaneval.yaml",
    "mbpp": "mbpp/mbpp.yaml",
    "ifeval": "ifeval/ifeval.yaml",
}
DRAWN_LETTERS = (1122, 1129)  # for a character outside a to z the harness draws a letter
CODE_EVAL = """import datasets
import evaluate
class CodeEval(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Sequence(datasets.Value("string")), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)
    def _compute(self, predictions, references, k=(1,), **_):
        return {"pass@1": 0.0}, {}
"""
WORKER = """import json, sys, time
spec = json.load(open(sys.argv[1]))
import torch
torch.set_num_threads(1)
import resource
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
if "x_ifeval" in spec["tasks"]:
    import nltk
    nltk.data.find("tokenizers/punkt_tab/english/")  # which else fails when all answers are there
if spec["url"]:
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    lm = LocalCompletionsAPI(model="model", base_url=spec["url"] + "/completions", tokenizer=spec["model"], max_length=spec["context"],
        batch_size=1, num_concurrent=8, timeout=3600)
else:
    from lm_eval.models.huggingface import HFLM
    lm = HFLM(pretrained=spec["model"], dtype="float32", device="cpu", batch_size=spec["batch"])
before = time.process_time()
out = simple_evaluate(model=lm, tasks=spec["tasks"], limit=spec["items"], bootstrap_iters=0, log_samples=True,
    gen_kwargs=spec["gen_kwargs"],
    task_manager=TaskManager(include_path=spec["folder"], include_defaults=False), confirm_run_unsafe_code=True)
spent = time.process_time() - before
keep = lambda s: {"doc_id": s["doc_id"], "arguments": list(s["arguments"].values()) if isinstance(s["arguments"], dict) else s["arguments"],
    "resps": s["resps"], "filter": s["filter"], "filtered": s["filtered_resps"],
    "scores": {k: sum(v) / len(v) if isinstance(v, list) else v for k, v in s.items()
        if k in ("acc", "acc_norm", "acc_bytes", "exact_match") or k.endswith(("strict_acc", "loose_acc"))}}
result = {"seconds": spent, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "samples": {k: [keep(s) for s in v] for k, v in out["samples"].items()},
    "results": {k: {m: x for m, x in v.items() if isinstance(x, (int, float))} for k, v in out["results"].items()}}
json.dump(result, open(sys.argv[2], "w"))
"""

VERDICTS = """import json, sys
from lm_eval.tasks.ifeval.utils import InputExample, test_instruction_following_loose, test_instruction_following_strict
out = []
for row in json.load(open(sys.argv[1])):
    asked = InputExample(*(row[k] for k in ("key", "instruction_id_list", "prompt", "kwargs")))
    both = (test_instruction_following_strict, test_instruction_following_loose)
    out.append([check(asked, row["text"]).follow_instruction_list for check in both])
json.dump(out, open(sys.argv[2], "w"))
"""


def write_task(data: TaskData, items: int, folder: Path, package: Path) -> None:
    """An lm-eval task over the very rows that ours reads: a shipped file with the data's place put in."""
    task = data.task
    made = set(task.process_docs)
    splits = {task.evaluated_split: data.docs[: items if data.pool_split != task.evaluated_split else None]}
    if data.pool_split and data.pool_split != task.evaluated_split and task.task != "mbpp":  # whose shots are in lm-eval's own file
        splits[data.pool_split] = data.pool
    files = {}
    for split, docs in splits.items():
        files[split] = str(folder / f"{data.name}-{split}.parquet")
        plain = [{name: doc[name] for name in doc if name not in made and name != "row"} for doc in docs]
        pq.write_table(pa.Table.from_pylist(plain), files[split])
    values: dict[str, Any] = {"include": str(package / "tasks" / SHIPPED[task.task].format(subset=data.subset)), "task": f"x_{data.name}"}
    values |= {"dataset_path": "parquet", "dataset_name": None, "dataset_kwargs": {"data_files": files}, "num_fewshot": task.num_fewshot}
    values |= {f"{kind}_split": None for kind in ("training", "validation", "test") if getattr(task, f"{kind}_split") not in files}
    (folder / f"{data.name}.yaml").write_text(yaml.safe_dump(values))


def shortened(names: tuple[str, ...], max_gen_toks: int, folder: Path) -> tuple[str, ...]:
    """Files of our tasks with shorter answers; names of those that generate none stay."""
    out = []
    for task in find_tasks(names):
        if task.output_type == "generate_until":
            values = yaml.safe_load((TASKS / f"{task.task}.yaml").read_text())
            values.setdefault("generation_kwargs", {})["max_gen_toks"] = max_gen_toks
            path = folder / f"{task.task}.yaml"
            path.write_text(yaml.safe_dump(values))
            out.append(str(path))
        else:
            out.append(task.task)
    return tuple(out)


def random_model(tokenizer_folder: Path, folder: Path) -> Path:
    """Save a Llama of one layer with random weights and a context of 16,384; its vocabulary is the tokenizer's."""
    tokenizer = Tokenizer.load(tokenizer_folder)
    config = ModelConfig("llama", tokenizer.vocab_size, 64, uniform_blocks(1, 4, 2, 16, 128), max_positions=16_384)
    model = Transformer(config)
    model.init_weights(0)
    save_model(model, tokenizer, folder)
    return folder


def harness(python: str, spec: dict[str, Any], folder: Path, env: dict[str, str]) -> dict[str, Any]:
    """What lm-eval finds, in a process of its own."""
    (folder / "spec.json").write_text(json.dumps(spec))
    command = [python, "-c", WORKER, str(folder / "spec.json"), str(folder / "out.json")]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-4000:])
    return json.loads((folder / "out.json").read_text())


def compare_benchmarks(args: argparse.Namespace) -> bool:
    """Run both on the same rows; prints a line of JSON a task. Whether anything differs."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ALLOW_CODE_EVAL", "OMP_NUM_THREADS"), "1")
    found = subprocess.run([args.lm_eval_python, "-c", "import lm_eval; print(lm_eval.__file__)"], env=env, capture_output=True, text=True)
    package = Path(found.stdout.strip()).parent
    torch.set_num_threads(1)
    names = tuple(args.tasks.split(","))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = random_model(args.model, folder / "random") if args.random else args.model
        if args.max_gen_toks:
            names = shortened(names, args.max_gen_toks, folder)
        parts = [part for task in find_tasks(names) for part in read_task(task, args.data, num_fewshot=task.num_fewshot)]
        if args.subsets:
            chosen = set(args.subsets.split(","))
            parts = [part for part in parts if not part.subset or part.subset in chosen]
        (folder / "tasks").mkdir()
        (folder / "code_eval").mkdir()
        (folder / "code_eval" / "code_eval.py").write_text(CODE_EVAL)
        for part in parts:
            write_task(part, args.items, folder / "tasks", package)
        spec: dict[str, Any] = {"model": str(model.resolve()), "tasks": [f"x_{part.name}" for part in parts], "items": args.items}
        context = json.loads((model / "config.json").read_text())["max_position_embeddings"]
        spec |= {"folder": str(folder / "tasks"), "batch": args.batch, "url": "", "context": context}
        spec |= {"gen_kwargs": {"max_gen_toks": args.max_gen_toks} if args.max_gen_toks else None}
        env |= {"HF_HOME": str(folder / "hf")}
        theirs = {"hf": harness(args.lm_eval_python, spec, folder, env)}
        if args.server:
            with served(model, "--dtype", "fp32", "--device", "cpu") as url:
                theirs["local-completions"] = harness(args.lm_eval_python, spec | {"url": url}, folder, env)
        before = time.process_time()
        engine = load_engine(model, EngineArgs(device="cpu", dtype="fp32"))
        loaded = time.process_time() - before
        subsets = tuple(args.subsets.split(",")) if args.subsets else ()
        ours = BenchmarkArgs(tasks=names, data=args.data, limit=args.items, out=folder / "ours", subsets=subsets)
        with Progress(quiet=True) as progress, progress.stage("eval"):
            report = run_benchmarks(lambda: EngineSource(engine), {"model": str(args.model)}, ours, progress)
        spent = time.process_time() - before - loaded
        differs = False
        num = 0
        for part in parts:
            rows = read_records(folder / "ours" / SAMPLES / f"{part.name}.jsonl")
            for back_end, found in theirs.items():
                line = {"back-end": back_end, **compare_task(part, found, report, rows)}
                num += line["requests"] * (back_end == "hf")
                differs |= line["differs"]
                print(json.dumps(line), flush=True)
    if args.speed:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        speeds = {"ours": round(num / spent, 2), "lm-eval": round(num / theirs["hf"]["seconds"], 2)}
        told: dict[str, Any] = {"requests": num, "requests a CPU second": speeds, "ratio": round(theirs["hf"]["seconds"] / spent, 2)}
        told |= {"computed tokens": engine.stats.prompt_tokens, "peak MiB": {"ours": peak, "lm-eval": theirs["hf"]["peak"] >> 20}}
        print(json.dumps(told))
    return differs


def compare_verdicts(args: argparse.Namespace) -> bool:
    """Check IFEval's instructions on texts by both; prints a line of JSON. Whether any differ but where the harness draws a letter."""
    (data,) = read_task(find_tasks(("ifeval",))[0], args.data, num_fewshot=0)
    texts = [said[0] for said in read_answers(args.verdicts).by_question.values()]
    rows = [{**doc, "text": texts[(7 * k + j) % len(texts)]} for k, doc in enumerate(data.docs) for j in range(args.items)]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as scratch:
        asked, told = Path(scratch) / "rows.json", Path(scratch) / "verdicts.json"
        asked.write_text(json.dumps(rows))
        done = subprocess.run([args.lm_eval_python, "-c", VERDICTS, str(asked), str(told)], env=env, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-4000:])
        theirs = json.loads(told.read_text())
    counts: dict[str, list[int]] = {}
    differ: dict[str, list[Any]] = {}
    for row, levels in zip(rows, theirs, strict=True):
        ours = ifeval_verdicts(row, row["text"])
        for place, name in enumerate(row["instruction_id_list"]):
            count = counts.setdefault(name, [0, 0])
            for level, other in zip(("strict", "loose"), levels, strict=True):
                count[0] += 1
                if ours[level][place] != other[place]:
                    count[1] += 1
                    differ.setdefault(name, []).append([row["key"], level, ours[level][place]])
    total = [sum(count[i] for count in counts.values()) for i in (0, 1)]
    print(json.dumps({"verdicts": total[0], "differ": total[1], "by_instruction": counts, "keys": differ}))
    return any(key not in DRAWN_LETTERS for found in differ.values() for key, *_ in found)


def compare_task(part: TaskData, theirs: dict[str, Any], report: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What differs of a task: prompts, log-likelihoods, answers, what was extracted, scores ("drawn": where the harness draws a letter)."""
    name = part.name
    samples = theirs["samples"][f"x_{name}"]
    first = samples[0]["filter"]
    line: dict[str, Any] = {"task": name, "items": len(rows), "worst": 0.0}
    line |= dict.fromkeys(("requests", "prompts", "answers", "extracted", "scores"), 0)
    for sample in samples:
        row = rows[sample["doc_id"]]
        if "continuations" in row:
            contexts = row.get("contexts") or [row["context"]] * len(row["continuations"])
            asked = [[context, continuation] for context, continuation in zip(contexts, row["continuations"], strict=True)]
        else:
            asked = [[row["context"]]]
        given = [[argument[0], argument[1]] if "continuations" in row else [argument[0]] for argument in map(_values, sample["arguments"])]
        if sample["filter"] == first:
            line["requests"] += len(asked)
            line["prompts"] += asked != given
        if "continuations" in row:
            lls = [float(resp[0][0]) for resp in sample["resps"]]
            line["worst"] = max([line["worst"], *(abs(a - b) for a, b in zip(lls, row["logprobs"], strict=True))])
        else:
            if sample["filter"] == first:
                line["stopped"] = line.get("stopped", 0) + (row["finish"] != "length")
                line["answers"] += sample["resps"][0][0] != row["answer"]
            if "extracted" in row and sample["filter"] in row["extracted"]:
                found = sample["filtered"][0]  # of programs a list of samples
                line["extracted"] += (found[0] if isinstance(found, list) else found) != row["extracted"][sample["filter"]]
        for metric, value in sample["scores"].items():
            wanted = row["scores"].get(metric, row["scores"].get(f"{metric},{sample['filter']}", row["scores"].get("mc2")))
            kind = "drawn" if part.docs[sample["doc_id"]].get("key") in DRAWN_LETTERS else "scores"
            line[kind] = line.get(kind, 0) + (wanted is None or abs(float(value) - wanted) > 1e-4)
    metrics = report["tasks"][name]["metrics"]
    known = theirs["results"][f"x_{name}"]
    line["lm-eval"] = {k: v for k, v in known.items() if "stderr" not in k and k.split(",")[0] not in ("alias", "pass@1")}
    line["ours"] = {k: v["value"] for k, v in metrics.items() if v["value"] is not None}
    line["ties"] = len(report["tasks"][name].get("ties", ()))
    line["differs"] = bool(line["prompts"] or line["worst"] > 1e-3 or line["answers"] or line["extracted"] or line["scores"])
    return line


def _values(argument: Any) -> list[Any]:
    return list(argument.values()) if isinstance(argument, dict) else list(argument)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--lm-eval-python", required=True)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tasks", default="")
    parser.add_argument("--subsets", default="", help="of mmlu and bbh, the only ones")
    parser.add_argument("--items", type=int, default=50)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--server", action="store_true", help="compare with lm-eval over our server, too")
    parser.add_argument("--random", action="store_true", help="a random model with MODEL's tokenizer")
    parser.add_argument("--max-gen-toks", type=int, default=0, help="of every answer, on both sides")
    parser.add_argument("--verdicts", type=Path, help="file of answers that IFEval's instructions are checked on")
    args = parser.parse_args()
    if args.verdicts:
        sys.exit(compare_verdicts(args))
    if args.model is None:
        parser.error("give the model's folder")
    if args.tasks:
        sys.exit(compare_benchmarks(args))
    docs = questions(args.questions)
    with served(args.model, "--dtype", "fp32") as url:
        through = by_lm_eval(args.lm_eval_python, args.model.resolve(), url, docs)
    own = in_process(load_engine(args.model, EngineArgs(dtype="fp32")), docs)
    print(json.dumps({"questions": len(docs), "in process": own, "lm-eval": through}))
    sys.exit(any(own[name] != through[name] for name in own))


if __name__ == "__main__":
    main()
