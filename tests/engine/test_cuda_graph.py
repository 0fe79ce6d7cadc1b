"""Steps that are recorded, without a GPU: computed anew where a graph would be replayed."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.engine import model_runner
from gristmill.engine.attention import TorchAttention, TritonAttention, _LayerCache, _SlotMapping
from gristmill.engine.block_manager import BLOCK_SIZE
from gristmill.engine.cuda_graph import CudaGraphs, PiecewiseGraphs
from gristmill.engine.layers import Decoder
from gristmill.engine.lora import LoadedAdapter, LoraRows, LoraSlots, SlotRows
from gristmill.model.adapters import Adapter
from gristmill.model.config import BlockConfig
from gristmill.model.lora import LoraConfig, adapter_parts, add_adapters
from gristmill.model.transformer import Transformer
from tests.engine import test_lora
from tests.engine.test_core import WIDE, core_of, finish, model_of, states_of
from tests.other_device import OTHER, other_device, waits

NARROW = (BlockConfig(0, 0, 0, 64), BlockConfig(4, 2, 8, 64), BlockConfig(2, 2, 8, 48), BlockConfig(0, 0, 0, 64))


class FromInputs(TritonAttention):
    """By torch, from what the kernels are given."""

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        given, cache = self.inputs, _LayerCache(self.config, self.kv_cache, layer)
        mapping = _SlotMapping(given["positions"], given["blocks"])
        q_THd = cache.store(qkv[: len(given["positions"])], mapping, *self.angles[self.config.blocks[layer].rope])
        out_THd = q_THd.new_zeros(len(qkv), *q_THd.shape[1:])
        for sequence, first, position, count in torch.cat([given["decodes"], given["prefills"]]).tolist():
            end, mine = position + count, slice(first, first + count)
            blocks = given["block_tables"][sequence, : -(-end // BLOCK_SIZE)].long()
            k_KLd = cache.keys[blocks].permute(1, 0, 3, 2).flatten(1, 2)[:, :end]
            v_KLd = cache.values[blocks].transpose(0, 1).flatten(1, 2)[:, :end, : cache.size]
            seen_tL = torch.arange(end) <= torch.arange(position, end)[:, None]
            out_THd[mine] = F.scaled_dot_product_attention(q_THd[mine].transpose(0, 1), k_KLd, v_KLd, seen_tL, enable_gqa=True).transpose(
                0, 1
            )
        return out_THd


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Engines record their steps; rows of each decode step since, and whether it had adapters."""
    seen: list[tuple[int, bool]] = []
    run = CudaGraphs.run

    def watched(self: CudaGraphs, ids: Any, metadata: Any, adapted: Any = None) -> Tensor:
        if len(metadata.slots):  # not at the start
            seen.append((len(ids), adapted is not None))
        return run(self, ids, metadata, adapted)

    monkeypatch.setattr(CudaGraphs, "run", watched)
    monkeypatch.setattr(model_runner, "select_backend", lambda config, cache, dtype, **angles: FromInputs(config, cache, **angles))
    return seen


@pytest.mark.parametrize(("family", "blocks"), [("nemotron", WIDE), ("llama", NARROW)])
def test_steps_in_pieces_give_the_same_answers(family: str, blocks: tuple[BlockConfig, ...]) -> None:
    model = model_of(family, blocks)
    plain = finish(core_of(model), states_of(6, answer=8))
    core, sizes = core_of(model), []
    runner = core.model_runner
    runner.compiled_decoder = None  # small steps would go through it
    graphs = runner.piecewise_graphs = PiecewiseGraphs(runner.decoder, runner.attention)
    with torch.inference_mode():
        graphs.record([1, 8, 40, 200])
    run = graphs.run
    graphs.run = lambda ids, *given: (sizes.append(len(ids)), run(ids, *given))[1]  # type: ignore[method-assign]
    assert finish(core, states_of(6, answer=8)) == plain
    assert min(sizes) <= 8 and 40 < max(sizes) <= 200, "of several sizes"
    core.refresh()
    assert not graphs.captured and not graphs.fits(1)


@pytest.mark.parametrize("max_batch", [3, 8])
def test_recorded_steps_give_the_same_answers(recorded: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch, max_batch: int) -> None:
    model = model_of("llama", NARROW)
    with monkeypatch.context() as patch:
        patch.setattr(model_runner, "select_backend", attention_of_torch)
        plain = finish(core_of(model, max_batch), states_of(6, answer=8))
    core = core_of(model, max_batch)
    core.start()
    graphs, pieces = core.model_runner.cuda_graphs, core.model_runner.piecewise_graphs
    assert graphs is not None and pieces is not None and len(graphs.captured) == max_batch and pieces.captured
    assert finish(core, states_of(6, answer=8)) == plain and len(recorded) > 3


def attention_of_torch(config: Any, cache: Any, dtype: torch.dtype, **angles: Any) -> Any:
    return TorchAttention(config, cache, **angles)


def test_new_weights_are_recorded_again_and_memory_is_let_go(recorded: list[tuple[int, bool]]) -> None:
    core = core_of(model_of("llama", NARROW), 2)
    finish(core, states_of(2, answer=4))
    runner = core.model_runner
    core.refresh()
    assert runner.cuda_graphs is not None and not runner.cuda_graphs.captured
    finish(core, states_of(2, answer=4))
    assert runner.piecewise_graphs is not None and runner.piecewise_graphs.captured and len(runner.cuda_graphs.captured) == 2
    assert runner.kv_cache.memory.numel()
    core.release()
    assert not runner.kv_cache.memory.numel() and runner.cuda_graphs is None is runner.piecewise_graphs


def test_steps_with_adapters_are_recorded_too(recorded: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [test_lora.ask(name, number) for number in range(3) for name in ("a", "", "b")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_runner, "select_backend", attention_of_torch)
        expected = test_lora.run(test_lora.engine("llama", max_batch=4), requests)
    recorded.clear()
    pieces: list[bool] = []
    run = PiecewiseGraphs.run
    monkeypatch.setattr(PiecewiseGraphs, "run", lambda self, *given: (pieces.append(given[2] is not None), run(self, *given))[1])
    found = test_lora.run(test_lora.engine("llama", max_batch=4), requests)
    for request in requests:
        test_lora.assert_same(found[request.id], expected[request.id])
    assert sum(adapted for _, adapted in recorded) > 5 and any(pieces)


def test_slots_hold_whose_turn_it_is() -> None:
    model = test_lora.base("llama").requires_grad_(False)
    one, two, three = (LoadedAdapter(str(n), test_lora.make_adapter("llama", n), model, torch.float32) for n in (1, 2, 3))
    slots = LoraSlots(model, 2, 5, torch.float32)
    generator = torch.Generator().manual_seed(0)
    for adapters in ([one, None, two, one], [three, two, None, three], [None, one, three, None]):
        slot_T = torch.tensor(slots.load(adapters))
        assert [slots.loaded[slot] if slot >= 0 else None for slot in slot_T.tolist()] == adapters
        for linear, (a_SWD, b_SWN) in slots.layers[1].items():
            x_TD, out_TN = torch.randn(4, a_SWD.shape[2], generator=generator), torch.randn(4, b_SWN.shape[2], generator=generator)
            expected_TN = out_TN.clone()
            rows = LoraRows.of(adapters, [1] * 4, torch.device("cpu"))
            assert rows is not None
            rows.add(1, linear, x_TD, expected_TN)
            SlotRows(slots, slot_T).add(1, linear, x_TD, out_TN)
            torch.testing.assert_close(out_TN, expected_TN, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantize", ["", "int8", "int8-weight", "int4"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "nemotron"])
def test_nothing_that_is_recorded_waits_for_the_device(family: str, quantize: Any) -> None:
    blocks = (BlockConfig(4, 2, 8, 64), BlockConfig(4, 2, 8, 64))
    with other_device():
        model = model_of(family, blocks).to(OTHER)
        decoder = Decoder(model, torch.float32, quantize)
        adapter = LoadedAdapter("a", adapter_of(model), model, torch.float32)
        slots = LoraSlots(model, 1, 2, torch.float32)
        rows = SlotRows(slots, torch.tensor(slots.load([adapter]), device=OTHER))
        waits.clear()
        for lora in (None, rows):
            x_TD, delta_TD = decoder.embed(torch.zeros(1, dtype=torch.int64, device=OTHER)), None
            for layer in decoder.layers:
                x_TD, qkv = layer.project_qkv(x_TD, delta_TD, lora)
                x_TD, delta_TD = layer.feed_forward(x_TD, layer.project_output(qkv[:, :4].flatten(1), lora), lora)
            logits = decoder.logits(decoder.final_norm(x_TD, delta_TD)[1]).float()
        assert logits.device == OTHER and not waits


def adapter_of(model: Transformer) -> Adapter:
    lora, copy = LoraConfig(rank=2, alpha=4.0), Transformer(model.config)
    add_adapters(copy, lora, seed=0)
    return Adapter(lora, adapter_parts(copy), "")


def test_a_step_waits_for_its_tokens_alone() -> None:
    with other_device():
        core = core_of(model_of("llama", NARROW).to(OTHER), 4)
        for state in states_of(4, answer=6):
            core.add(state)
        steps = 0
        while not core.idle:
            waits.clear()
            core.step()
            assert len(waits) == 2, waits  # tokens and their log-probabilities
            steps += 1
    assert steps > 3


def test_every_size_of_tile_is_compiled_before_it_is_needed(recorded: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch) -> None:
    core = core_of(model_of("llama", NARROW), 2)
    core.start()
    rows, attend, runner = [], FromInputs.attend, core.model_runner
    monkeypatch.setattr(FromInputs, "attend", lambda self, *step: (rows.append(self.prefill_rows), attend(self, *step))[1])
    assert isinstance(runner.attention, TritonAttention)
    with torch.inference_mode():
        runner._compile_prefill(runner.attention, core.block_manager.num_blocks)
    assert set(rows) == {16, 32, 64, 128}
