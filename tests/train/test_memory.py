"""Memory of training: the estimate, what is chosen from it, and what is refused before any work."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gristmill.core.errors import InputError
from gristmill.model.config import ModelConfig, uniform_blocks
from gristmill.model.flops import num_parameters
from gristmill.model.kernels import library as kernels
from gristmill.model.lora import LoraConfig, add_adapters
from gristmill.model.transformer import Transformer
from gristmill.parallel.hardware import HARDWARE
from gristmill.parallel.layout import Layout
from gristmill.parallel.lora_plan import LoraPlan
from gristmill.parallel.memory import USABLE_SHARE
from gristmill.parallel.memory import memory as planned_memory
from gristmill.parallel.mesh import Mesh, ParallelDims
from gristmill.train import memory
from gristmill.train.batches import Sample, collate_tokens
from gristmill.train.memory import RECORD, choose_micro_batch, estimate_memory, fitting, lora_plan
from gristmill.train.objectives.next_token import next_token_objective
from gristmill.train.trainer import Trainer, TrainSettings

Make = Callable[..., Transformer]
MakeSamples = Callable[..., list[Sample]]
CPU = torch.device("cpu")
SMALL_LLAMA = ModelConfig("llama", 49_152, 576, uniform_blocks(30, 9, 3, 64, 1536), 8192, tie_embeddings=True, rotary_fraction=1.0)
SETTINGS = TrainSettings(lr=1e-2, steps=4, batch_size=6, checkpoint_every=1e-9)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    return lambda size: monkeypatch.setattr(memory, "free_memory", lambda device: int(size))


@pytest.fixture
def small_llama() -> nn.Module:
    with torch.device("meta"):
        return Transformer(SMALL_LLAMA)


def test_the_estimate_of_135_million_parameters(small_llama: nn.Module) -> None:
    needed = estimate_memory(small_llama, "adamw", precision="fp32", tokens=384, device=CPU)
    count = num_parameters(SMALL_LLAMA)
    assert (needed.weights, needed.gradients, needed.optimizer) == (4 * count, 4 * count, 8 * count)
    total, activations = ("3.1", "0.7") if kernels.load() else ("3.2", "0.8")
    parts = f"about {total} GB: weights 0.5, gradients 0.5, optimizer 1.1, activations {activations} (of 384 tokens at once)"
    assert str(needed).startswith(parts), str(needed)
    twice = estimate_memory(small_llama, "adamw", precision="fp32", tokens=768, device=CPU)
    assert 1.5 < twice.activations / needed.activations < 2
    checkpointed = estimate_memory(small_llama, "adamw", precision="fp32", tokens=4096, device=CPU, checkpointed=True)
    assert checkpointed.activations < twice.activations
    muon = estimate_memory(small_llama, "muon", precision="bf16", tokens=512, device=CPU)
    assert muon.optimizer < needed.optimizer < 2 * muon.optimizer and muon.weights > needed.weights


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_planner_counts_one_process_as_the_trainer_does(small_llama: nn.Module, checkpointed: bool) -> None:
    hardware = replace(HARDWARE["h100"], threads=1, kernels=kernels.load() is not None)
    layout = Layout(batch_size=1, seq_len=2048, precision="fp32", recompute="full" if checkpointed else "none")
    planned = planned_memory(SMALL_LLAMA, layout, hardware)["first"]
    needed = estimate_memory(small_llama, "adamw", precision="fp32", tokens=2048, device=CPU, checkpointed=checkpointed)
    states = needed.weights + needed.gradients + needed.optimizer
    assert planned.weights + planned.gradients + planned.optimizer == pytest.approx(states, rel=1e-3)
    assert planned.activations + planned.loss == pytest.approx(needed.activations, rel=0.03)


@pytest.mark.parametrize(("base", "dora"), [("fp32", False), ("int8", True)])
@pytest.mark.parametrize("family", ["nemotron", "llama", "phi3"])
def test_what_autograd_saves_with_an_adapter_is_what_is_planned(family: str, base: str, dora: bool) -> None:
    config = ModelConfig(family, 512, 128, uniform_blocks(4, 4, 2, 32, 320), 512)
    model = Transformer(config)
    model.init_weights(0)
    add_adapters(model, LoraConfig(rank=8, alpha=16.0, dora=dora), seed=0, base=base)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}  # held, so that no other takes its place

    def pack(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            kept[place] = tensor
        return tensor

    batch = collate_tokens([Sample(np.arange(512), np.ones(512, bool))], CPU)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states_TD = model.states(batch.ids_T, batch.shape)
    saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    hardware = replace(HARDWARE["h100"], threads=1, kernels=kernels.load() is not None)
    layout = Layout(batch_size=1, seq_len=512, precision="fp32", lora=LoraPlan(rank=8, base=base, dora=dora))
    found, planned = lora_plan(model), planned_memory(config, layout, hardware)["first"]
    assert len(states_TD) == 512 and found is not None and (found.rank, found.base, found.dora) == (8, base, dora)
    assert planned.activations == pytest.approx(saved, rel=0.02 if kernels.load() else 0.12)
    needed = estimate_memory(model, "adamw", precision="fp32", tokens=512, device=CPU)
    assert needed.weights == pytest.approx(planned.weights, rel=0.01) and needed.gradients == planned.gradients
    assert needed.activations == pytest.approx(planned.activations + planned.loss, rel=0.05)


def test_processes_share_out_what_training_holds(
    small_llama: nn.Module, free: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def mesh(size: int, **dims: int) -> Mesh:
        one = Mesh(dims=ParallelDims(**dims))
        one.size = size
        return one

    def states(processes: Mesh | None) -> int:
        needed = estimate_memory(small_llama, "adamw", precision="fp32", tokens=512, device=CPU, mesh=processes)
        return needed.weights + needed.gradients + needed.optimizer

    alone = states(None)
    assert states(mesh(1)) == alone
    assert states(mesh(8)) < 0.55 * alone  # gradients are whole until the last micro-batch, and the embedding is gathered
    assert states(mesh(4, pp=4)) < 0.5 * alone and states(mesh(3, tp=3)) == pytest.approx(alone / 3, rel=0.02)
    fit = lambda **more: fitting(small_llama, "adamw", precision="fp32", tokens=512, device=CPU, loaded=False, **more)  # noqa: E731
    free(2.2e9)
    assert not fit(mesh=mesh(3, tp=3)).checkpointed
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")  # on one machine
    with pytest.raises(InputError, match=r"it takes each of the processes about .*share more out \(--tp, --pp, more machines\)"):
        fit(mesh=mesh(3, tp=3))


def test_workers_hold_gradients_of_their_own(make_model: Make) -> None:
    sizes = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        sizes.append(estimate_memory(make_model(), "adamw", precision="fp32", tokens=64, device=CPU).gradients)
    torch.set_num_threads(1)
    assert sizes[1] == 3 * sizes[0]


def test_a_micro_batch_is_what_pays_and_fits(make_model: Make, small_llama: nn.Module, free: Callable[[float], None]) -> None:
    choose = lambda model, device=CPU: choose_micro_batch(model, "adamw", precision="fp32", device=device, loaded=False)  # noqa: E731
    free(100e9)
    assert choose(make_model()) == 8192 and choose(small_llama) == 384
    assert choose(small_llama, torch.device("cuda")) == 8192
    free(8e9)
    assert 384 < choose(small_llama, torch.device("cuda")) < 8192
    free(1e9)
    assert choose(small_llama, torch.device("cuda")) == 384


def test_what_does_not_fit_is_refused_with_what_to_do(small_llama: nn.Module, free: Callable[[float], None]) -> None:
    fit = lambda **more: fitting(small_llama, "adamw", precision="fp32", device=CPU, loaded=False, **more)  # noqa: E731
    free(1.5e9)
    with pytest.raises(InputError, match=r"does not fit: it takes about .* GB: .*, and 1\.5 GB are free;"):
        fit(tokens=512)
    free(4e9)
    assert not fit(tokens=512).checkpointed and fit(tokens=2048).checkpointed
    assert fit(tokens=512, checkpoint=True).checkpointed
    with pytest.raises(InputError, match="lower micro_batch_tokens"):
        fit(tokens=2048, checkpoint=False)
    with pytest.raises(InputError, match="leave out samples as long as 100,000 tokens"):
        fit(tokens=512, longest=100_000)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["nemotron", "qwen3"])
def test_checkpointed_activations_give_the_same_gradients(family: str, precision: str, make_samples: MakeSamples) -> None:
    config = ModelConfig(family, 48, 16, uniform_blocks(3, 2, 1, 8, 32), 256, rotary_fraction=1.0)
    batch = collate_tokens(make_samples(6), CPU)
    gradients: list[list[Tensor | None]] = []
    kept: list[int] = []
    for checkpointed in (False, True, "selective"):
        model = Transformer(config)
        model.compute_dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        model.checkpoint_activations = checkpointed
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = next_token_objective(model, batch)
        kept.append(sum(sizes.values()))
        output.sum.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for again in gradients[1:]:
        assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(gradients[0], again, strict=True))
    assert kept[1] < 0.7 * kept[0]


@pytest.mark.parametrize("threads", [1, 2])
def test_the_trainer_checkpoints_where_memory_is_short(
    threads: int, make_model: Make, make_samples: MakeSamples, free: Callable[[float], None]
) -> None:
    torch.set_num_threads(threads)
    models = [make_model(), make_model()]
    least = estimate_memory(models[0], "adamw", precision="fp32", tokens=8192, device=CPU, checkpointed=True)
    short = (least.total - memory.PROGRAM_BYTES - least.weights) / USABLE_SHARE + 10_000
    seen: list[bool] = []

    def objective(model: Transformer, batch: object) -> object:
        seen.append(model.checkpoint_activations)
        return next_token_objective(model, batch)  # type: ignore[arg-type]

    for model, size in zip(models, (1e12, short), strict=True):
        free(size)
        settings = replace(SETTINGS, micro_batch_tokens=8192)
        Trainer(model, objective, settings).fit(make_samples(12))  # type: ignore[arg-type]
        assert not model.checkpoint_activations
    torch.set_num_threads(1)
    assert not seen[0] and seen[-1]
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    free(1000)
    with pytest.raises(InputError, match="training does not fit"):
        Trainer(make_model(), next_token_objective, SETTINGS).fit(make_samples(12))


def test_a_resumed_run_takes_the_micro_batches_that_it_began_with(
    make_model: Make, make_samples: MakeSamples, tmp_path: Path, free: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = make_samples(12)
    monkeypatch.setattr(memory, "MIN_MICRO_BATCH", 16)
    monkeypatch.setattr("gristmill.train.memory.choose_micro_batch", lambda *args, **options: 20)
    monkeypatch.setattr("gristmill.train.trainer.choose_micro_batch", lambda *args, **options: 20)
    straight, resumed = make_model(), make_model()
    Trainer(straight, next_token_objective, SETTINGS, folder=tmp_path / "a").fit(samples)

    def stop(step: int, total: int, metrics: dict[str, float]) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(make_model(), next_token_objective, SETTINGS, folder=tmp_path / "b", on_step=stop).fit(samples)
    monkeypatch.setattr("gristmill.train.trainer.choose_micro_batch", lambda *args, **options: pytest.fail("it chose again"))
    trainer = Trainer(resumed, next_token_objective, SETTINGS, folder=tmp_path / "b")
    assert trainer.micro_batch_tokens == 20
    trainer.fit(samples)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    # a folder of an earlier version, which took 8192 and wrote none of this down
    (tmp_path / "b" / RECORD).unlink()
    assert Trainer(make_model(), next_token_objective, SETTINGS, folder=tmp_path / "b").micro_batch_tokens == 8192
