"""Training speed and memory beside TRL: SFT, DPO, reward models and knowledge distillation on one CPU thread.

    PYTHONPATH=src python bench/train.py --trl-python TRL_VENV/bin/python --steps 3 --repeats 3
    PYTHONPATH=src python bench/train.py --trl-python TRL_VENV/bin/python --shape 135m
    PYTHONPATH=src python bench/train.py --shape 135m --profile

One model with the same weights is trained by both on the same conversations and pairs. Every measurement is a process of its own and
prints one line of JSON; the last line is the summary. README.md beside this file says what is counted and with which settings. The top
level needs numpy only, so that the driver stays small and TRL's interpreter can run this file too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

TASKS = ("sft", "dpo", "reward", "distil")
CHECKED = 8  # conversations whose logits are compared, at most
MAX_TOKENS = 1024
LEARNING_RATE, BETA, CLIP = 2e-5, 0.1, 1.0
SHARPENED = 5.0  # of the teacher's logits, every second one
MAX_DIFFERENCE = {"fp32": 2e-4, "bf16": 2e-3}  # of both sides' KL in the first step, relative


@dataclass(frozen=True)
class Shape:
    """Size of the model, and what is aimed at with it: tokens per CPU second and peak memory, as multiples of TRL's."""

    family: str
    vocab_size: int
    hidden_size: int
    layers: tuple[int, int, int, int, int]  # layers, heads, key-value heads, head size, ffn size
    targets: dict[str, float]
    max_memory: float
    steps: int  # of a repeat, unless --steps says otherwise
    batch: int  # conversations or pairs a step, unless --batch says otherwise

    @property
    def causal(self) -> str:
        """transformers' class of the family."""
        return f"{self.family.capitalize()}ForCausalLM"


SHAPES = {
    "8m": Shape("nemotron", 4096, 256, (8, 4, 2, 64, 1024), {"sft": 2.0, "dpo": 4.0, "reward": 3.0, "distil": 2.0}, 1.0, 2, 8),
    "135m": Shape(  # SmolLM2-135M's
        "llama", 49152, 576, (30, 9, 3, 64, 1536), {"sft": 2.6, "dpo": 4.0, "reward": 3.0, "distil": 2.0}, 0.6, 1, 2
    ),
}
PAD, BOS, EOS, USER, ASSISTANT, END_OF_TURN = range(6)
FIRST_WORD = 16
# Control tokens are matched anywhere in a text, so none may be the beginning of a word.
_WORDS = [f"<{number}>" if number < FIRST_WORD else f"w{number}" for number in range(max(shape.vocab_size for shape in SHAPES.values()))]
PACKAGES = {"gristmill": ("torch", "numpy"), "trl": ("torch", "trl", "transformers", "accelerate", "datasets")}


# ---- data: lengths as in real chat (log-normal, so many short turns and a long tail), random words ----


def _text(rng: np.random.Generator, vocab_size: int, median: float, sigma: float, shortest: int, longest: int) -> list[int]:
    length = int(np.clip(median * rng.lognormal(0.0, sigma), shortest, longest))
    return rng.integers(FIRST_WORD, vocab_size, length).tolist()


def make_conversations(num: int, seed: int, vocab_size: int) -> list[dict[str, list[int]]]:
    """Conversations of one to three turns: token ids, and a mask of what is trained (the assistant's turns)."""
    rng = np.random.default_rng([seed, 0])
    conversations = []
    for _ in range(num):
        ids, mask = [BOS], [0]
        for _ in range(int(rng.choice([1, 2, 3], p=[0.5, 0.33, 0.17]))):
            question = [USER, *_text(rng, vocab_size, 40, 0.9, 4, 400), END_OF_TURN, ASSISTANT]
            answer = [*_text(rng, vocab_size, 90, 0.8, 8, 600), END_OF_TURN]
            ids += question + answer
            mask += [0] * len(question) + [1] * len(answer)
        conversations.append({"ids": ids[:MAX_TOKENS], "mask": mask[:MAX_TOKENS]})
    return conversations


def make_pairs(num: int, seed: int, vocab_size: int) -> list[dict[str, list[int]]]:
    """A prompt, two answers that end with EOS, and five ratings (0 to 4) of each."""
    rng = np.random.default_rng([seed, 1])
    pairs = []
    for _ in range(num):
        prompt = [BOS, USER, *_text(rng, vocab_size, 120, 0.9, 8, 480), END_OF_TURN, ASSISTANT]
        answers = {name: [*_text(rng, vocab_size, median, 0.7, 8, 440), EOS] for name, median in (("chosen", 120), ("rejected", 100))}
        ratings = {f"{name}_ratings": rng.integers(0, 5, 5).tolist() for name in answers}
        pairs.append({"prompt": prompt} | answers | ratings)
    return pairs


def count_tokens(task: str, rows: list[dict[str, list[int]]]) -> int:
    """Real tokens, padding not counted, whoever computes them. A pair counts its prompt twice: each answer is read after it."""
    if task in ("sft", "distil"):
        return sum(len(row["ids"]) for row in rows)
    return sum(2 * len(row["prompt"]) + len(row["chosen"]) + len(row["rejected"]) for row in rows)


# ---- gristmill ----


def _our_model(shape: Shape) -> Any:
    from gristmill.model.config import ModelConfig, uniform_blocks
    from gristmill.model.transformer import Transformer

    # The weights are drawn with seed 0, so every process of a run has the same.
    blocks, kwargs = uniform_blocks(*shape.layers), {"max_positions": 2048}
    if shape.family == "llama":
        kwargs |= {"rotary_fraction": 1.0, "tie_embeddings": True}
    return Transformer(ModelConfig(shape.family, shape.vocab_size, shape.hidden_size, blocks, **kwargs))


def _our_teacher(shape: Shape) -> Any:
    """The teacher: the shape with other weights, in fp32. Half of its logits are sharper, so that the reverse KL is another number."""
    import torch

    teacher = _our_model(shape)
    teacher.init_weights(1)
    with torch.no_grad():
        teacher.unembedding()[::2] *= SHARPENED
    return teacher


def _save(model: Any, folder: Path) -> None:
    """Write a model as a Hugging Face folder."""
    from safetensors.torch import save_file

    from gristmill.model.hf_config import to_hf
    from gristmill.model.hf_tensors import hf_tensors

    folder.mkdir(exist_ok=True)
    save_file({name: tensor.clone() for name, tensor in hf_tensors(model).items()}, folder / "model.safetensors", {"format": "pt"})
    special = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(to_hf(model.config) | special))


def prepare(shape: Shape, folder: Path, num: int, *, seed: int, tasks: Sequence[str] = ()) -> None:
    """Write the data, the model as a Hugging Face folder (for distil the teacher too), and our logits of a packed batch."""
    import torch

    from gristmill.model.packed import PackedShape

    conversations = make_conversations(num, seed, shape.vocab_size)
    for task in ("sft", "distil"):
        (folder / f"{task}.json").write_text(json.dumps(conversations))
    for task in ("dpo", "reward"):
        (folder / f"{task}.json").write_text(json.dumps(make_pairs(num, seed, shape.vocab_size)))
    model = _our_model(shape)
    _save(model, folder)
    if "distil" in tasks:
        _save(_our_teacher(shape), folder / "teacher")
    documents = [row["ids"] for row in conversations[:CHECKED]]
    with torch.no_grad():
        logits_TV = model(torch.tensor(sum(documents, [])), PackedShape.from_lengths([len(ids) for ids in documents]))
    np.save(folder / "logits.npy", logits_TV.numpy())


def train_gristmill(shape: Shape, task: str, rows: list[dict[str, Any]], *, batch: int, warm: bool, precision: str) -> dict[str, Any]:
    """``gristmill.train.trainer.train``, as it is, on our kind of samples."""
    import torch

    from gristmill.model.hf import set_dtypes
    from gristmill.model.reward import RewardModel
    from gristmill.model.transformer import TRAINING_PRECISIONS
    from gristmill.train.batches import PairSample, RatedSample, Sample
    from gristmill.train.objectives.distillation import DistillationObjective
    from gristmill.train.objectives.preference import PreferenceObjective, compute_reference_logprobs
    from gristmill.train.objectives.reward import reward_objective
    from gristmill.train.objectives.sft import sft_objective
    from gristmill.train.trainer import Trainer, TrainSettings

    def side(row: dict[str, Any], name: str) -> Sample:
        return Sample(row["prompt"] + row[name], [False] * len(row["prompt"]) + [True] * len(row[name]))

    model = _our_model(shape)
    result: dict[str, Any] = {"imports_rss_mib": peak_rss_mib()}
    batch_size, objective, samples = batch, sft_objective, []
    if task in ("sft", "distil"):
        samples = [Sample(row["ids"], row["mask"]) for row in rows]
        if task == "distil":
            teacher = _our_teacher(shape).requires_grad_(False)
            teacher.compute_dtype = TRAINING_PRECISIONS[precision]
            set_dtypes(teacher, teacher.compute_dtype, torch.float32)  # as `gristmill train distill` loads it
            objective = DistillationObjective(teacher, "teacher", "kl")
    elif task == "dpo":
        pairs = [PairSample(side(row, "chosen"), side(row, "rejected")) for row in rows]
        start = time.process_time()
        samples = compute_reference_logprobs(model, pairs, precision=precision)
        result["reference_cpu_seconds"] = round(time.process_time() - start, 3)
        objective = PreferenceObjective("dpo", beta=BETA)
    else:
        model, objective, batch_size = RewardModel(model), reward_objective, 2 * batch
        for number, row in enumerate(rows):
            for name in ("chosen", "rejected"):
                ids = row["prompt"] + row[name]
                samples.append(RatedSample(ids, len(ids) - 1, row[f"{name}_ratings"], prompt=str(number)))
    settings = TrainSettings(
        lr=LEARNING_RATE,
        schedule="constant",
        epochs=1 + warm,
        batch_size=batch_size,
        weight_decay=0.0,
        clip=CLIP,
        precision=precision,
        shuffle=task != "distil",  # so that both sides' first steps are the same conversations, and their losses can be compared
    )
    losses: list[float] = []

    def on_step(step: int, total: int, metrics: dict[str, float]) -> None:
        losses.append(metrics["loss"])
        if warm and 2 * step == total:
            timer.restart()

    timer = Timer()
    Trainer(model, objective, settings, on_step=on_step).fit(samples)
    return result | timer.read() | {"losses": losses}


# Operations by the part of a step that they belong to; all others are sums, copies and gathers.
PARTS = {
    "products": r"^aten::(addmm_?|mm|bmm|linear)$",
    "attention": r"attention|attend|Pad",
    "norms": r"_AddNorm|rms_norm|layer_norm",
    "activations": r"_Activation|_GatedDown|silu|gelu",
    "loss": r"_CrossEntropySum|softmax",
    "optimizer": r"adam|clip|norm\.default|_foreach",
}


def profile_step(shape: Shape, precision: str) -> dict[str, Any]:
    """CPU seconds by part of an SFT step of the four shortest conversations, and those of its products alone."""
    import re

    import torch
    from torch.profiler import ProfilerActivity, profile

    from gristmill.train.batches import Sample
    from gristmill.train.objectives.sft import sft_objective
    from gristmill.train.trainer import Trainer, TrainSettings

    torch.set_num_threads(1)
    conversations = sorted(make_conversations(8, 0, shape.vocab_size), key=lambda row: len(row["ids"]))
    samples = [Sample(row["ids"], row["mask"]) for row in conversations[:4]]
    settings = TrainSettings(lr=LEARNING_RATE, schedule="constant", steps=9, batch_size=4, clip=CLIP, precision=precision)
    trainer = Trainer(_our_model(shape), sft_objective, settings)
    trainer.step(samples)  # the optimizer's states come into being
    started = time.process_time()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        trainer.step(samples)
        total = time.process_time() - started
    seconds = dict.fromkeys((*PARTS, "others"), 0.0)
    for event in found.key_averages():
        part = next((name for name, pattern in PARTS.items() if re.search(pattern, event.key, re.IGNORECASE)), "others")
        seconds[part] += event.self_cpu_time_total
    # the profiler's times are those of a clock on the wall: the step's CPU seconds are shared out by them
    seconds = {name: value * total / sum(seconds.values()) for name, value in seconds.items()}
    tokens, rows = sum(len(sample.ids) for sample in samples), sum(sample.num_targets for sample in samples)
    weights = [(module.weight.detach(), tokens) for module in trainer.model.modules() if isinstance(module, torch.nn.Linear)]
    weights = [pair for pair in weights if pair[0].shape[0] != shape.vocab_size] + [(trainer.model.unembedding().detach(), rows)]
    floor = 0.0
    for weight_ND, count in weights:
        kind = torch.bfloat16 if precision == "bf16" else torch.float32
        grad_TN, x_TD = (torch.ones(count, size, dtype=kind) for size in weight_ND.shape)
        used_ND = weight_ND.to(kind)
        start = time.process_time()
        x_TD @ used_ND.T, grad_TN @ used_ND, grad_TN.T @ x_TD
        floor += time.process_time() - start
    return {
        "family": shape.family,
        "layers": shape.layers[0],
        "precision": precision,
        "tokens": tokens,
        "targets": rows,
        "cpu_seconds": {name: round(value, 3) for name, value in seconds.items()},
        "products_alone": round(floor, 3),
    }


# ---- TRL ----


def _text_of(ids: list[int]) -> str:
    return " ".join(_WORDS[number] for number in ids)


def _tokenizer(shape: Shape) -> Any:
    """Token number i is the text ``_WORDS[i]``, so that a trainer which only takes text sees the same tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    unknown = _WORDS[FIRST_WORD - 1]
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(_WORDS[: shape.vocab_size])}, unk_token=unknown))
    words.pre_tokenizer = WhitespaceSplit()
    names = {"pad_token": _WORDS[PAD], "bos_token": _WORDS[BOS], "eos_token": _WORDS[EOS], "unk_token": unknown}
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def _trl_trainer(shape: Shape, task: str, rows: list[dict[str, Any]], *, folder: Path, batch: int, warm: bool, precision: str) -> Any:
    import torch
    import transformers
    import trl
    from datasets import Dataset

    common: dict[str, Any] = {
        "output_dir": str(folder / "trl"),
        # rows of MAX_TOKENS: two hold about as many tokens as 8 conversations
        "per_device_train_batch_size": max(1, batch // 4) if task == "sft" else batch,
        "num_train_epochs": 1 + warm,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": CLIP,
        "max_length": MAX_TOKENS,
        "optim": "adamw_torch_fused",
        "bf16": precision == "bf16",
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    kind = getattr(transformers, shape.causal.replace("CausalLM", "SequenceClassification") if task == "reward" else shape.causal)
    extra = {"num_labels": 1} if task == "reward" else {}
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa", **extra)
    if task in ("sft", "distil"):
        data = [
            {
                "input_ids": row["ids"],
                "labels": [token if trained else -100 for token, trained in zip(row["ids"], row["mask"], strict=True)],
            }
            for row in rows
        ]
    if task == "sft":
        args = trl.SFTConfig(packing=True, packing_strategy="bfd", **common)
        return trl.SFTTrainer(model, args, train_dataset=Dataset.from_list(data), processing_class=_tokenizer(shape))
    if task == "distil":
        from trl.experimental.gkd import GKDConfig, GKDTrainer
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        # Its forward pass gets no positions, so it cannot be packed: one conversation after another, or most of a batch would be padding.
        alone = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": batch}
        # beta 0 is KL(teacher || student); lmbda 0: on the given answers alone.
        args = GKDConfig(lmbda=0.0, beta=0.0, temperature=1.0, seq_kd=False, train_sampling_strategy="sequential", **common | alone)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        teacher = kind.from_pretrained(folder / "teacher", dtype=dtype, attn_implementation="sdpa")
        tokenizer = _tokenizer(shape)
        return GKDTrainer(
            model,
            teacher,
            args,
            # its default collator would train on the last turn alone
            data_collator=DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id),
            train_dataset=Dataset.from_list(data),
            processing_class=tokenizer,
        )
    if task == "dpo":
        args = trl.DPOConfig(precompute_ref_log_probs=True, beta=BETA, **common)
        data = [
            {"prompt": _text_of(row["prompt"]) + " ", "chosen": _text_of(row["chosen"]), "rejected": _text_of(row["rejected"])}
            for row in rows
        ]
        return trl.DPOTrainer(model, args=args, train_dataset=Dataset.from_list(data), processing_class=_tokenizer(shape))
    args = trl.RewardConfig(**common)
    data = [{f"{name}_ids": row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in rows]
    return trl.RewardTrainer(model, args=args, train_dataset=Dataset.from_list(data), processing_class=_tokenizer(shape))


def _tokens_of(task: str, dataset: Any) -> int:
    """Tokens in the trainer's own data, as ``count_tokens`` counts."""
    names = {
        "sft": ["input_ids"],
        "distil": ["input_ids"],
        "dpo": ["prompt_ids", "prompt_ids", "chosen_ids", "rejected_ids"],
        "reward": ["chosen_ids", "rejected_ids"],
    }
    return sum(len(ids) for name in names[task] for ids in dataset[name])


def train_trl(
    shape: Shape, task: str, rows: list[dict[str, Any]], *, folder: Path, batch: int, warm: bool, precision: str
) -> dict[str, Any]:
    """TRL's trainer of the task. Its constructor packs, tokenizes and computes the reference; it is not timed with the steps."""
    import datasets
    from transformers import TrainerCallback
    from trl import DPOTrainer, RewardTrainer, SFTTrainer  # noqa: F401 (imported on first use, which is to be no part of a figure)

    if task == "distil":
        from trl.experimental.gkd import GKDTrainer  # noqa: F401

    datasets.disable_progress_bars()
    result: dict[str, Any] = {"imports_rss_mib": peak_rss_mib()}
    compute_reference = DPOTrainer._precompute_ref_logps

    def timed(*args: Any) -> Any:
        start = time.process_time()
        rows_with_reference = compute_reference(*args)
        result["reference_cpu_seconds"] = round(time.process_time() - start, 3)
        return rows_with_reference

    DPOTrainer._precompute_ref_logps = timed
    trainer = _trl_trainer(shape, task, rows, folder=folder, batch=batch, warm=warm, precision=precision)
    seen, meant = _tokens_of(task, trainer.train_dataset), count_tokens(task, rows)
    if seen != meant:
        sys.exit(f"TRL was given {meant} tokens and trains on {seen}: the comparison is void.")

    class WarmUp(TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if warm and round(state.epoch) == 1:
                timer.restart()

    trainer.add_callback(WarmUp())
    timer = Timer()
    trainer.train()
    seconds = timer.read()
    return result | seconds | {"losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]}


def check_weights(shape: Shape, folder: Path) -> dict[str, Any]:
    """Largest difference between our packed logits and Hugging Face's of the same documents, one at a time, in fp32."""
    import torch
    import transformers

    model = getattr(transformers, shape.causal).from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    documents = [row["ids"] for row in json.loads((folder / "sft.json").read_text())[:CHECKED]]
    with torch.no_grad():
        theirs_TV = torch.cat([model(torch.tensor([ids])).logits[0] for ids in documents]).numpy()
    ours_TV = np.load(folder / "logits.npy")
    difference = float(np.abs(ours_TV - theirs_TV).max())
    return {
        "check": "the same weights are the same function",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": len(ours_TV),
        "largest_logit": round(float(np.abs(theirs_TV).max()), 4),
        "largest_difference": float(f"{difference:.3g}"),
        "same": difference < (1e-3 if shape.hidden_size > 256 else 1e-4),
    }


# ---- measuring ----


class Timer:
    """CPU (user and system) and wall seconds since it was made or restarted."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        cpu, wall = time.process_time() - self._cpu, time.perf_counter() - self._wall
        return {"cpu_seconds": round(cpu, 3), "wall_seconds": round(wall, 3)}


def peak_rss_mib() -> int:
    """Peak resident memory of this process so far (Linux; getrusage would count the parent's before exec too)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) // 1024
    raise RuntimeError("this kernel does not report VmHWM")


def measure(shape: Shape, trainer: str, task: str, *, folder: Path, batch: int, warm: bool, precision: str) -> dict[str, Any]:
    import torch

    if trainer == "trl":
        import torch._dynamo  # noqa: F401  # its own imports or its first optimizer would bring it in: a second that belongs to no step

    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = json.loads((folder / f"{task}.json").read_text())
    tokens = count_tokens(task, rows)
    if trainer == "gristmill":
        result = train_gristmill(shape, task, rows, batch=batch, warm=warm, precision=precision)
    else:
        result = train_trl(shape, task, rows, folder=folder, batch=batch, warm=warm, precision=precision)
    losses = result.pop("losses")
    rated = "five ratings of both answers" if trainer == "gristmill" else "pairs"
    work = {"sft": "assistant turns", "distil": "assistant turns", "dpo": "pairs", "reward": rated}[task]
    return {
        "trainer": trainer,
        "task": task,
        "trained_on": work,
        "tokens": tokens,
        "steps": len(losses),
        "tokens_per_cpu_second": round(tokens / result["cpu_seconds"], 1),
        **result,
        "peak_rss_mib": peak_rss_mib(),
        "loss_first_last": [round(losses[0], 4), round(losses[-1], 4)],
    }


def _child(python: str, folder: Path, *job: str) -> dict[str, Any]:
    """Run one job of this file in a new process; it answers with one line of JSON."""
    with tempfile.TemporaryDirectory() as cache:  # its own, so that nothing computed before is found again
        environment = os.environ | {
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
            **dict.fromkeys(("HF_HUB_OFFLINE", "TQDM_DISABLE"), "1"),
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HOME": cache,
            "TRANSFORMERS_VERBOSITY": "error",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [python, __file__, "--job", *job, "--folder", str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _run_job(options: argparse.Namespace) -> None:
    job, shape, folder = options.job, SHAPES[options.shape], options.folder
    if job[0] == "prepare":
        prepare(shape, folder, options.steps * options.batch, seed=options.seed, tasks=options.tasks)
        answer: dict[str, Any] = {"precision": options.precision or _fastest_precision()}
    elif job[0] == "check":
        answer = check_weights(shape, folder)
    elif job[0] == "versions":
        answer = {name: metadata.version(name) for name in PACKAGES[job[1]]}
    else:
        answer = measure(shape, *job, folder=folder, batch=options.batch, warm=options.warm, precision=options.precision)
    print(json.dumps(answer))


def _fastest_precision() -> str:
    """What both sides compute in: bf16 where this CPU multiplies in it, since a careful user would not choose the slower one."""
    import torch

    from gristmill.core.device import pick_precision

    return pick_precision(torch.device("cpu"))


def summarize(shape: Shape, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each task the medians over repeats, the ratio of every repeat, and whether both targets are met."""
    tasks = {}
    for task in dict.fromkeys(result["task"] for result in results):
        runs = {name: [r for r in results if r["task"] == task and r["trainer"] == name] for name in ("gristmill", "trl")}
        speed = {name: [run["tokens_per_cpu_second"] for run in of] for name, of in runs.items()}
        memory = {name: max(run["peak_rss_mib"] for run in of) for name, of in runs.items()}
        ratio = statistics.median(speed["gristmill"]) / statistics.median(speed["trl"])
        tasks[task] = {
            "tokens_per_cpu_second": {name: round(statistics.median(values)) for name, values in speed.items()},
            "of_each_repeat": speed,
            "ratio": round(ratio, 2),
            "ratio_of_each_repeat": [round(ours / theirs, 2) for ours, theirs in zip(speed["gristmill"], speed["trl"], strict=True)],
            "target": shape.targets[task],
            "peak_rss_mib": memory,
            "met": ratio >= shape.targets[task] and memory["gristmill"] < shape.max_memory * memory["trl"],
        }
        if task == "dpo":
            of = {name: statistics.median(run["reference_cpu_seconds"] for run in part) for name, part in runs.items()}
            tasks[task]["reference_cpu_seconds"] = of
        if task == "distil":
            tasks[task]["first_kl"] = {name: [run["loss_first_last"][0] for run in of] for name, of in runs.items()}
        if task == "reward":
            tasks[task]["compared"] = "five-attribute regression on both answers of a pair with TRL's pairwise trainer: the same tokens"
    return tasks


def check_first_losses(precision: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """End the run where the first steps, on the same conversations and weights, have another mean KL of their targets."""
    first = [run["loss_first_last"][0] for run in (theirs, ours)]
    if abs(first[0] - first[1]) > MAX_DIFFERENCE[precision] * max(first):
        sys.exit(f"The first step's KL is {first[0]} there and {first[1]} here, so there is nothing to compare.")


def _has_trl(python: str) -> bool:
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('trl') is None)"
    try:
        return subprocess.run([python, "-c", probe], capture_output=True).returncode == 0
    except OSError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--shape", choices=SHAPES, default="8m", help="size of the model")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="of both sides (default: the faster one on this CPU)")
    parser.add_argument("--steps", type=int, help="optimizer steps of a repeat (default: 2, of the large shape 1)")
    parser.add_argument("--batch", type=int, help="conversations or pairs a step (default: 8, of the large shape 2)")
    parser.add_argument("--warm", action="store_true", help="train on the data twice and count the second pass alone")
    parser.add_argument("--repeats", type=int, default=1, help="each with other data")
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--trl-python", default=sys.executable, help="an interpreter that has TRL (default: this one)")
    parser.add_argument("--profile", action="store_true", help="CPU seconds of one of our SFT steps by part, and nothing else")
    parser.add_argument("--layers", type=int, help="of the model that is profiled (default: all)")
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.steps, options.batch = options.steps or SHAPES[options.shape].steps, options.batch or SHAPES[options.shape].batch
    if options.job:
        return _run_job(options)
    if options.profile:
        shape = SHAPES[options.shape]
        shape = replace(shape, layers=(options.layers or shape.layers[0], *shape.layers[1:]))
        return print(json.dumps(profile_step(shape, options.precision or _fastest_precision())))
    if not _has_trl(options.trl_python):
        sys.exit(f"{options.trl_python} has no TRL; give --trl-python an interpreter that has (bench/README.md says how to make one).")
    python = {"gristmill": sys.executable, "trl": options.trl_python}
    with tempfile.TemporaryDirectory() as name:
        folder, results = Path(name), []
        for repeat in range(options.repeats):
            given = ["--shape", options.shape, "--batch", str(options.batch), *(["--warm"] if options.warm else [])]
            wanted = ["--steps", str(options.steps), "--seed", str(repeat), *given]
            wanted += ["--precision", options.precision] if options.precision else []
            wanted += ["--tasks", *options.tasks]
            options.precision = _child(sys.executable, folder, "prepare", *wanted)["precision"]
            given += ["--precision", options.precision]
            check = _child(options.trl_python, folder, "check", *given)
            print(json.dumps(check), flush=True)
            if not check["same"]:
                sys.exit("The two models are not the same function, so there is nothing to compare.")
            for task in options.tasks:
                for trainer in ("trl", "gristmill"):
                    results.append(_child(python[trainer], folder, trainer, task, *given))
                    print(json.dumps(results[-1]), flush=True)
                if task == "distil":
                    check_first_losses(options.precision, *results[-2:])
        versions = {trainer: _child(python[trainer], folder, "versions", trainer) for trainer in python}
    chosen = {name: getattr(options, name) for name in ("shape", "precision", "steps", "batch", "warm", "repeats")}
    print(json.dumps({"summary": chosen | {"versions": versions, "tasks": summarize(SHAPES[options.shape], results)}}))


if __name__ == "__main__":
    main()
