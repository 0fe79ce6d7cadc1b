"""Processes of trainings: worker.py JOBS, a JSON list of [number of processes, job, out, options].

They are forked from this one, which has imported everything once. Prints of each job the exit codes, what each process said, which
checkpoints are whole, and the seconds that it took, as JSON.

Options of all jobs: `dims` of the mesh; `replicated`, as small models are, which otherwise are cut here as large ones are; and `fault`,
which ends or stops one process (`rank`): at a `moment` (see `arm`) of a `step`, or `after` so many seconds, counted from the start, or from
`logged` steps, or from when a checkpoint is being written then (`saving`).
"""

import copy
import json
import os
import pkgutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint.hf_storage as hf_storage
from safetensors.torch import save_file
from torch import Tensor, nn

from gristmill.core.errors import InputError
from gristmill.model.config import ModelConfig, uniform_blocks
from gristmill.model.fp8 import RECIPES
from gristmill.model.kernels import library as kernels
from gristmill.model.layers import Linear
from gristmill.model.lora import LoraConfig, add_adapters
from gristmill.model.reward import RewardModel
from gristmill.model.transformer import Transformer
from gristmill.parallel import mesh as meshes
from gristmill.parallel.mesh import Group, Mesh, Orders, ParallelDims, new_mesh, process_mesh
from gristmill.parallel.pipeline import Pipeline
from gristmill.train import checkpoint, losses, sharded
from gristmill.train.batches import AnySample, PairSample, RatedSample, Sample
from gristmill.train.checkpoint import fingerprint_model
from gristmill.train.losses import PREFERENCE_LOSSES
from gristmill.train.objectives.next_token import next_token_objective
from gristmill.train.objectives.preference import PreferenceObjective
from gristmill.train.objectives.reward import reward_objective
from gristmill.train.optim import Optimizer, OptimSettings
from gristmill.train.trainer import LossOutput, Objective, Trainer, TrainSettings

VOCAB = 48
SILENCE = timedelta(seconds=5)  # after which a process that was stopped counts as lost
REPLICATED = sharded.REPLICATED
SETTINGS = TrainSettings(steps=8, batch_size=6, micro_batch_tokens=40, lr=1e-3, schedule="linear", clip=1.0)


def make_model(
    family: str = "nemotron", seed: int = 0, *, vocab: int = VOCAB, layers: int = 2, ffn: int = 40, **options: Any
) -> Transformer:
    blocks = uniform_blocks(num_layers=layers, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=ffn)
    options = {"tie_embeddings": family == "llama"} | options
    model = Transformer(ModelConfig(family, vocab, 32, blocks, max_positions=256, init_std=0.1, **options))
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # gains and biases that are not all alike
                parameter.add_(torch.empty(parameter.shape).normal_(0, 0.1, generator=generator))
    return model


def make_adapted(family: str = "nemotron", *, base: str = "fp32", dora: bool = False, targets: str = "", **options: Any) -> Transformer:
    """With an adapter whose B is not zero, so that A, too, has a gradient."""
    model = make_model(family, **options)
    add_adapters(model, LoraConfig(rank=3, alpha=6.0, dora=dora, targets=tuple(targets.split())), seed=0, base=base)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith(("lora_B", "magnitude")):
            parameter.data += torch.empty(parameter.shape).normal_(0, 0.1, generator=generator)
    return model


def make_samples(num: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    lengths = [int(rng.integers(4, 33)) for _ in range(num)]
    return [Sample(rng.integers(0, VOCAB, n), np.arange(n) > n // 3, f"s{i}") for i, n in enumerate(lengths)]


def make_pairs(num: int) -> list[PairSample]:
    rng = np.random.default_rng(1)
    pairs = []
    for _ in range(num):
        prompt = rng.integers(0, VOCAB, int(rng.integers(2, 8)))
        sides = []
        for _ in range(2):
            ids = np.concatenate([prompt, rng.integers(0, VOCAB, int(rng.integers(1, 12)))])
            sides.append(Sample(ids, np.arange(len(ids)) >= len(prompt)))
        pairs.append(PairSample(*sides, chosen_reward=1.5, ref_chosen=-20.0, ref_rejected=-22.0))
    return pairs


def make_rated(num: int) -> list[RatedSample]:
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, VOCAB, 6) for _ in range(num)]
    answers = [np.concatenate([prompts[i // 2], rng.integers(0, VOCAB, int(rng.integers(1, 9)))]) for i in range(num)]
    return [RatedSample(ids, len(ids) - 1, rng.uniform(0, 4, 5).tolist(), prompt=f"p{i // 2}") for i, ids in enumerate(answers)]


def gradients_of(model: nn.Module, objective: Objective, samples: list[AnySample], mesh: Mesh, **settings: Any) -> dict[str, Tensor]:
    """Gradients of one step, whole, its loss and the norm of them all; of a pipeline alone also how far they are from those of one
    process with the same micro-batches.
    """
    alone = copy.deepcopy(model)
    trainer = Trainer(model, objective, replace(SETTINGS, clip=0.0, **settings), mesh=mesh)
    found: dict[str, Tensor] = {}
    steps: list[tuple[Any, int]] = []
    collated = trainer._collated_alike
    trainer._collated_alike = lambda items: steps.append(collated(items)) or steps[-1]  # type: ignore[method-assign, func-returns-value]

    def keep(*_: Any, **__: Any) -> None:
        grads = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
        own = {f"gradient|{name}": grad.to_dense() if grad.is_sparse else grad for name, grad in grads.items()}
        gathered = own.items() if trainer._sharded is None else trainer._sharded.gathered(own)
        found.update({name.split("|")[1]: gradient.clone() for name, gradient in gathered})
        if isinstance(trainer.model, Pipeline) and mesh.size == mesh.dims.pp and not alone_config(alone).tie_embeddings:
            batches, fillers = steps[0]
            count = sum(batch.count for batch in batches)
            for number, batch in enumerate([*batches, *fillers]):
                output = objective(alone, batch)
                (output.sum / count if number < len(batches) else output.sum * 0).backward()
            wanted = dict(alone.named_parameters())
            far = [float((wanted[name.split("|")[1]].grad - gradient).abs().max()) for name, gradient in own.items()]  # type: ignore[operator]
            found["far"] = torch.tensor(mesh.gather(max(far)))

    trainer.optimizer.step = keep  # type: ignore[method-assign]
    metrics = trainer.step(samples)
    return found | {name: torch.tensor([metrics[name]]) for name in ("loss", "grad_norm")}


def alone_config(model: nn.Module) -> ModelConfig:
    return getattr(model, "backbone", model).config  # type: ignore[union-attr, return-value]


def gradients(mesh: Mesh, out: Path, *, meshes: list[dict[str, Any]]) -> None:
    """Of meshes of the same processes, one after another."""
    kept = (losses.MIN_CHUNK_ROWS, losses.CHUNK_LOGITS, losses.KEPT_LOGITS, kernels.library_for, kernels.load)
    out.mkdir(exist_ok=True)
    for options in meshes:
        name, settings = json.dumps(options), dict(options)
        dims = ParallelDims(**{key: settings.pop(key) for key in ("tp", "cp", "pp", "vp", "schedule") if key in settings})
        sharded.REPLICATED = REPLICATED if settings.pop("replicated", False) else 0
        one = Mesh() if mesh.size == 1 else new_mesh(torch.device("cpu"), mesh.size, dims)
        found = gradients_in(one, **settings)
        if mesh.is_writer:
            save_file(found, out / name)
        losses.MIN_CHUNK_ROWS, losses.CHUNK_LOGITS, losses.KEPT_LOGITS, kernels.library_for, kernels.load = kept


def gradients_in(mesh: Mesh, *, plain: bool = False, small: bool = False, only: str = "", **settings: Any) -> dict[str, Tensor]:
    """Of all objectives and kinds of model; `plain`: without compiled kernels; `small`: losses in several chunks; `only`: some cases."""
    if small:
        losses.MIN_CHUNK_ROWS, losses.CHUNK_LOGITS, losses.KEPT_LOGITS = 8, 72, 0
    if plain:
        kernels.library_for = lambda tensor: None  # type: ignore[assignment]
        kernels.load = lambda: None  # type: ignore[assignment]
    cases: dict[str, tuple[Callable[[], nn.Module], Objective, list[Any]]] = {
        "next token": (make_model, next_token_objective, make_samples(17)),
        "tied": (lambda: make_model("llama"), next_token_objective, make_samples(17)),
        "few": (make_model, next_token_objective, make_samples(3)),
        "reward": (lambda: RewardModel(make_model()), reward_objective, make_rated(11)),
        "padded": (lambda: make_model(vocab=50), next_token_objective, make_samples(5)),  # which neither 4 nor 8 divides
        "biases": (lambda: make_model("qwen2", attention_bias=False), next_token_objective, make_samples(5)),
        "norms": (lambda: make_model("qwen3"), PreferenceObjective("dpo"), make_pairs(3)),
        "caps": (lambda: make_model("gemma2", logits_soft_cap=3.0), PreferenceObjective("dpo"), make_pairs(3)),
        "capped": (lambda: make_model("gemma2", logits_soft_cap=3.0), next_token_objective, make_samples(5)),
        "fused": (lambda: make_model("phi3"), next_token_objective, make_samples(5)),
        "deep": (lambda: make_model(layers=4), next_token_objective, make_samples(17)),
        "deep tied": (lambda: make_model("llama", layers=4), next_token_objective, make_samples(17)),
        "deep reward": (lambda: RewardModel(make_model("llama", layers=4)), reward_objective, make_rated(11)),
        "deep rpo": (lambda: make_model(layers=4), PreferenceObjective("rpo", beta=0.1, sft_weight=0.3), make_pairs(9)),
    }
    cases |= {
        "lora": (make_adapted, next_token_objective, make_samples(9)),
        "lora gated": (lambda: make_adapted("llama", targets="q_proj v_proj up_proj down_proj"), PreferenceObjective("dpo"), make_pairs(3)),
        "lora biases": (lambda: make_adapted("qwen2", attention_bias=False, dora=True), next_token_objective, make_samples(5)),
        "lora fused": (lambda: make_adapted("phi3", base="int8"), next_token_objective, make_samples(5)),
        "lora deep reward": (lambda: RewardModel(make_adapted(layers=4, base="int8", dora=True)), reward_objective, make_rated(11)),
        "lora deep tied": (lambda: make_adapted("llama", layers=4), next_token_objective, make_samples(9)),
    }
    for loss in PREFERENCE_LOSSES:
        cases[loss] = (make_model, PreferenceObjective(loss, beta=0.1, sft_weight=0.3), make_pairs(9))
    found: dict[str, Tensor] = {}
    for name, (make, objective, samples) in cases.items():
        if only in name:
            found |= {f"{name} {key}": gradient for key, gradient in gradients_of(make(), objective, samples, mesh, **settings).items()}
    return found


class Stop(Exception):
    pass


def initial(mesh: Mesh, out: Path) -> None:
    """Fingerprint of the weights as they are trained, whole again."""
    settings = replace(SETTINGS, steps=1, lr=1e-30, weight_decay=0.0)
    trainer = Trainer(make_model(), next_token_objective, settings, mesh=mesh)
    trainer.fit(make_samples(6))
    if mesh.is_writer:
        out.write_text(fingerprint_model(trainer.model))


def train(
    mesh: Mesh,
    out: Path,
    *,
    folder: str,
    stop: int = 0,
    vocab: int = VOCAB,
    layers: int = 2,
    family: str = "nemotron",
    lora: bool = False,
    **settings: Any,
) -> None:
    asked = replace(SETTINGS, **{"checkpoint_every": 1e-9, **settings})
    make = make_adapted if lora else make_model
    trainer = Trainer(make(family, vocab=vocab, layers=layers), next_token_objective, asked, folder=Path(folder), mesh=mesh)
    step, begun = trainer.step, []

    def until(samples: Any) -> dict[str, float]:
        if stop and trainer.result.steps == stop:
            raise Stop
        if not begun:
            begun.append(trainer.result.steps)
            print(f"begins after step {begun[0]}", file=sys.stderr, flush=True)
        return step(samples)

    trainer.step = until  # type: ignore[method-assign]
    try:
        trainer.fit(make_samples(20), make_samples(5))
    except Stop:
        return
    if mesh.is_writer:
        save_file(trainer.model.state_dict(), out)


def float8(mesh: Mesh, out: Path) -> None:
    """How many matrices multiply in 8 bits, and the largest error of a gradient's norm: in parts against one process, and against bf16."""
    found: dict[str, Any] = {}
    for precision in RECIPES:
        counts: list[int] = []

        def objective(model: Any, batch: Any, counts: list[int] = counts) -> LossOutput:
            counts.append(sum(isinstance(module, Linear) and module.product is not None for module in model.modules()))
            return next_token_objective(model, batch)

        def gradients(mesh: Mesh, precision: str, objective: Objective = objective) -> dict[str, Tensor]:
            return gradients_of(make_model("llama", layers=3, ffn=64), objective, make_samples(9), mesh, precision=precision)

        parts, alone, bf16 = gradients(mesh, precision), gradients(Mesh(), precision), gradients(mesh, "bf16")
        errors = [max(float((parts[name] - x).norm() / x.norm()) for name, x in other.items()) for other in (alone, bf16)]
        found[precision] = {"matrices": sorted(set(counts)), "errors": errors}
    if mesh.is_writer:
        out.write_text(json.dumps(found))


def sizes(mesh: Mesh, out: Path, *, cases: list[dict[str, Any]]) -> None:
    """Bytes that each process has of weights, gradients and optimizer states after a step in bf16, in meshes of the same processes."""
    found = []
    for case in cases:
        options = dict(case)
        one = new_mesh(torch.device("cpu"), mesh.size, ParallelDims(**options.pop("dims")))
        model = make_adapted(**options) if "base" in options else make_model(**options)
        trainer = Trainer(model, next_token_objective, replace(SETTINGS, precision="bf16"), mesh=one)
        release, gradients = trainer.optimizer.zero_grad, []
        trainer.optimizer.zero_grad = lambda: gradients.append(bytes_of(p.grad for p in trainer.model.parameters())) or release()  # type: ignore  # noqa: B023
        trainer.step(make_samples(6))
        weights = bytes_of(trainer.model.parameters()) + bytes_of(b for n, b in trainer.model.named_buffers() if n.endswith("scale_N"))
        state = {name: x for name, x in trainer.optimizer.state_tensors().items() if not name.endswith("step")}
        found.append(mesh.gather([weights, gradients[0], bytes_of(state.values())]))
    if mesh.is_writer:
        out.write_text(json.dumps(found))


def bytes_of(tensors: Iterable[Tensor | None]) -> int:
    return sum(meshes.local(tensor.detach()).nbytes for tensor in tensors if tensor is not None)


def muon(mesh: Mesh, out: Path) -> None:
    """Steps of Muon from the same gradients as one process."""
    exchanges: list[int] = []
    exchange = Group.all_to_all
    Group.all_to_all = lambda *given: exchanges.append(1) or exchange(*given)  # type: ignore[method-assign, func-returns-value]
    for dims in ({}, {"replicated": 1}, {"tp": 2}, {"pp": 2}, {"pp": 2, "tp": 2}):
        sharded.REPLICATED = REPLICATED if dims.pop("replicated", 0) else 0
        alone = make_model("llama", layers=4)
        settings = replace(SETTINGS, optimizer="muon", weight_decay=0.1)
        trainer = Trainer(copy.deepcopy(alone), next_token_objective, settings, mesh=new_mesh(torch.device("cpu"), 4, ParallelDims(**dims)))
        one = Optimizer(alone, OptimSettings(optimizer="muon", weight_decay=0.1))
        assert trainer._sharded is not None
        del exchanges[:]
        for seed in (0, 1):
            generator = torch.Generator().manual_seed(seed)
            for parameter in alone.parameters():
                parameter.grad = torch.empty(parameter.shape).normal_(generator=generator)
            grads = trainer._sharded.parts_of({name: p.grad for name, p in alone.named_parameters() if p.grad is not None})
            for name, parameter in trainer.model.named_parameters():
                parameter.grad = grads[name]
            for optimizer in (one, trainer.optimizer):
                optimizer.step()
        whole, wanted = trainer._sharded.assembled().state_dict(), alone.state_dict()
        unequal = [name for name in wanted if ".blocks." in f".{name}" and not torch.equal(whole[name], wanted[name])]
        assert not unequal and len(exchanges) == 4, (dims, unequal, exchanges)
    if mesh.is_writer:
        out.write_text("equal")


def nan(mesh: Mesh, out: Path) -> None:
    """The loss of one process alone is not finite."""

    def objective(model: Any, batch: Any) -> LossOutput:
        output = next_token_objective(model, batch)
        return replace(output, sum=output.sum * float("nan")) if mesh.rank else output

    Trainer(make_model(), objective, SETTINGS, mesh=mesh).fit(make_samples(20))


def other(mesh: Mesh, out: Path) -> None:
    Trainer(make_model(seed=mesh.rank), next_token_objective, SETTINGS, mesh=mesh)


def orders(mesh: Mesh, out: Path, *, stopped: int) -> None:
    """The first process is silent for longer than the timeout, gives an order that takes as long, and one of both is stopped."""
    meshes.TIMEOUT, long = timedelta(seconds=3), 3.6
    given = Orders(mesh)
    if mesh.is_writer:
        time.sleep(long)
        given.give({"job": "sleep"})
    else:
        out.write_text(given.take()["job"])
    time.sleep(long)
    if mesh.rank == stopped:
        os.kill(os.getpid(), signal.SIGSTOP)
    if mesh.is_writer:
        given.done()
        time.sleep(long)
        given.give({"job": "more"})
    else:
        given.take()


# ---- processes ----


def before(owner: Any, name: str, act: Callable[[], object]) -> None:
    """Act before a function runs."""
    real = getattr(owner, name)
    setattr(owner, name, lambda *arguments, **options: (act(), real(*arguments, **options))[1])


def rl(mesh: Mesh, out: Path, *, recipe: str) -> None:
    """`gristmill rl`, with a checkpoint after every step."""
    from gristmill.core.config import load
    from gristmill.core.progress import Progress
    from gristmill.workflows.rl import loop
    from gristmill.workflows.rl.recipe import RlRecipe

    loop.CHECKPOINT_SECONDS = 0.0
    loop.run(load(Path(recipe), RlRecipe), out, Progress(quiet=True), mesh=mesh)


def arm(moment: str, step: int) -> None:
    """Let this process end, or stop, when its training gets there; or see no trained model ("elsewhere")."""
    if moment == "elsewhere":
        from gristmill.workflows.rl import policy

        before(policy.Policy, "take_saved", lambda: setattr(policy, "MODEL", "elsewhere"))
        return
    sign = signal.SIGSTOP if moment == "stop" else signal.SIGKILL
    module, _, called = moment.rpartition(".")  # of a moment that is the name of a function
    begun: list[int] = []
    before(Trainer, "_micro_batches", lambda: begun.append(1))
    places: dict[str, tuple[Any, str]] = {
        "step": (Trainer, "_backward"),  # others are in the middle of it
        "stop": (Trainer, "_backward"),
        "writing": (hf_storage.HuggingFaceStorageWriter, "write_data"),  # its part of a checkpoint
        "written": (checkpoint, "write_json"),  # all parts are there, and no checkpoint yet
        "renamed": (checkpoint, "sync"),  # there is a checkpoint more than shall be, but for the first
    }
    before(
        *(places[moment] if moment in places else (pkgutil.resolve_name(module), called)),
        lambda: os.kill(os.getpid(), sign) if len(begun) == step else None,
    )


def train_in(job: str, out: Path, *, dims: dict[str, int], fault: dict[str, Any], replicated: bool = False, **options: Any) -> int:
    """Do a job as one of its processes; returns the exit code."""
    sharded.REPLICATED = REPLICATED if replicated else 0
    if fault.get("moment") == "stop" or fault.get("after") == 0:
        meshes.TIMEOUT = SILENCE
    if "moment" in fault and fault["rank"] == int(os.environ["RANK"]):
        arm(fault["moment"], fault["step"])
    try:
        with process_mesh(torch.device("cpu"), ParallelDims(**dims)) as mesh:
            globals()[job](mesh, out, **options)
    except InputError as error:
        print(error, file=sys.stderr, flush=True)
        return 3
    return 0


def await_moment(folder: Path, process: int, *, after: float, logged: int = 0, saving: bool = False, **_: Any) -> None:
    """Return at the moment of a fault, or when the process has ended before."""
    log, saved = folder / "metrics.jsonl", folder / "checkpoint.tmp"
    while (logged and not (log.exists() and log.read_bytes().count(b"\n") >= logged)) or (saving and not saved.exists()):
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(5e-4)
    time.sleep(after)


def start(size: int, job: str, out: str, options: dict[str, Any]) -> dict[str, Any]:
    """Start all processes of a job, and wait for them."""
    options = {"dims": {}, "fault": {}} | options
    fault, begin = options["fault"], time.monotonic()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children: list[int] = []
    files = [Path(f"{out}.{rank}.said") for rank in range(size)]
    for rank, said in enumerate(files):
        said.unlink(missing_ok=True)  # what an earlier start said
        if not (pid := os.fork()):
            given = {"WORLD_SIZE": size, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in given.items()})
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            code = 1
            try:
                code = train_in(job, Path(out), **options)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)  # nothing of the parent's is ended here
        children.append(pid)
    if "after" in fault:
        await_moment(Path(options.get("folder", out)), children[0], **fault)
        os.kill(children[fault["rank"]], signal.SIGKILL)
    codes, stopped = [0] * size, fault["rank"] if fault.get("moment") == "stop" else -1
    for rank in sorted(range(size), key=lambda rank: rank == stopped):
        if rank == stopped:
            os.kill(children[rank], signal.SIGKILL)
        codes[rank] = os.waitstatus_to_exitcode(os.waitpid(children[rank], 0)[1])
    words = [said.read_text() if said.exists() else "" for said in files]
    whole = sorted(path.parent.name for path in Path(options.get("folder", "/dev/null")).glob("checkpoint-*/state.json"))
    return {"codes": codes, "said": words, "whole": whole, "seconds": time.monotonic() - begin}


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs = json.loads(sys.argv[1])
    if any(job == "rl" for _, job, *_ in jobs):
        import gristmill.workflows.rl.loop  # noqa: F401 (once, for all that are forked)
    print(json.dumps([start(*job) for job in jobs]))
