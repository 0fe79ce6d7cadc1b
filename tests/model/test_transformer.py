"""The transformer by itself: packing, initialisation, types, layers that lack a part."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.core.errors import InputError
from gristmill.model.attention import varlen_attention
from gristmill.model.config import PRESETS, BlockConfig, ModelConfig, uniform_blocks
from gristmill.model.hf_tensors import hf_tensors
from gristmill.model.kernels import library as kernels
from gristmill.model.layers import MLP, LayerNorm1P, gate_activation
from gristmill.model.packed import PackedShape
from gristmill.model.rope import RopeScaling
from gristmill.model.rotary import rotate
from gristmill.model.transformer import Transformer

NEMOTRON = ModelConfig("nemotron", 50, 32, uniform_blocks(2, 4, 2, 8, 64), 64, init_std=0.2)
MODELS = {
    family: Transformer(replace(NEMOTRON, family=family, rotary_fraction=fraction))
    for family, fraction in (("nemotron", 0.5), ("llama", 1.0), ("qwen2", 1.0), ("qwen3", 1.0))
}
WINDOWS = (BlockConfig(4, 2, 8, 64, 5), BlockConfig(4, 2, 8, 64))
MODELS |= {
    "olmo2": Transformer(ModelConfig("olmo2", 50, 32, WINDOWS, 64, init_std=0.2)),
    "gemma2": Transformer(ModelConfig("gemma2", 50, 32, WINDOWS, 64, init_std=0.2, attention_soft_cap=2.0, logits_soft_cap=5.0)),
}


def random_ids(total: int) -> torch.Tensor:
    return torch.randint(0, 50, (total,), generator=torch.Generator().manual_seed(total))


@pytest.mark.parametrize("family", MODELS)
@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6), data=st.data())
def test_a_document_does_not_see_its_neighbours(family: str, lengths: list[int], data: st.DataObject) -> None:
    model, documents = MODELS[family], list(random_ids(sum(lengths)).split(lengths))
    order = data.draw(st.permutations(range(len(lengths))))
    with torch.no_grad():
        shuffled = [lengths[i] for i in order]
        packed = model(torch.cat([documents[i] for i in order]), PackedShape.from_lengths(shuffled))
        for i, logits_TV in zip(order, packed.split(shuffled), strict=True):
            alone_TV = model(documents[i], PackedShape.from_lengths([lengths[i]]))
            torch.testing.assert_close(logits_TV, alone_TV, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", MODELS)
def test_a_token_does_not_see_the_future(family: str) -> None:
    model, ids_T, shape = MODELS[family], random_ids(20), PackedShape.from_lengths([20])
    changed_T = torch.cat([ids_T[:10], (ids_T[10:] + 1) % 50])
    with torch.no_grad():
        before_TV, after_TV = model(ids_T, shape), model(changed_T, shape)
    torch.testing.assert_close(before_TV[:10], after_TV[:10], atol=1e-6, rtol=0)
    assert (before_TV[10:] - after_TV[10:]).abs().min(dim=-1).values.max() > 0


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gated_mlp_keeps_gate_and_up_alone(family: str, dtype: torch.dtype) -> None:
    config = replace(NEMOTRON, family=family, rotary_fraction=1.0)
    mlp = MLP(config, config.blocks[0])
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x_TD, grad_TD = torch.randn(2, 9, 32).to(dtype)

    def plain(x_TD: torch.Tensor) -> torch.Tensor:
        gate_TF, up_TF = (mlp.gate(x_TD), mlp.up(x_TD)) if mlp.gate and mlp.up else mlp.gate_up(x_TD).chunk(2, dim=-1)  # type: ignore[misc]
        return mlp.down(gate_activation(gate_TF, config.parts) * up_TF)

    results, kept = [], []
    for function in (mlp, plain):
        leaves = [x_TD.clone().requires_grad_(), *mlp.parameters()]
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out_TD = function(leaves[0])
        results.append([out_TD, *torch.autograd.grad(out_TD, leaves, grad_TD)])
        kept.append(sum(sizes.values()))
    error = 1e-5 if dtype == torch.float32 else 0.02
    assert all((ours - plain).abs().max() <= error * plain.abs().max() for ours, plain in zip(*results, strict=True))
    assert kept[1] - kept[0] == 2 * 9 * 64 * dtype.itemsize


def test_initial_stds_follow_the_published_recipe() -> None:
    config = PRESETS["miniature"]
    model = Transformer(config)
    residual = config.init_std / math.sqrt(2 * 6)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert not parameter.any(), name
            continue
        is_residual = name.endswith(("attention.output.weight", "mlp.down.weight"))
        wanted = residual if is_residual else config.init_std
        assert parameter.std().item() == pytest.approx(wanted, rel=0.03), name
        assert abs(parameter.mean().item()) < 0.1 * config.init_std, name
    assert PRESETS["nemotron4-340b"].init_std / math.sqrt(2 * 96) == pytest.approx(0.00045466, abs=5e-9)


def test_rms_gains_start_at_one() -> None:
    gains = [p for n, p in MODELS["qwen3"].named_parameters() if n.endswith("norm.weight")]
    assert len(gains) == 2 * 4 + 1
    assert all(bool((gain == 1).all()) for gain in gains)


def test_the_seed_decides_the_weights() -> None:
    first, second = Transformer(NEMOTRON), Transformer(NEMOTRON)
    assert torch.equal(first.embedding, second.embedding)
    second.init_weights(1)
    assert not torch.equal(first.embedding, second.embedding)


def test_a_parameters_initial_values_depend_on_its_name_alone() -> None:
    deep, shallow = Transformer(NEMOTRON), Transformer(replace(NEMOTRON, blocks=NEMOTRON.blocks[:1], tie_embeddings=True))
    found, scaled = dict(deep.named_parameters()), ("attention.output.weight", "mlp.down.weight")  # whose spread is by the number of layers
    assert all(torch.equal(found[name], p) for name, p in shallow.named_parameters() if not name.endswith(scaled))
    assert not torch.equal(found["blocks.0.mlp.up.weight"], found["blocks.1.mlp.up.weight"])


def test_rows_of_qkv_are_grouped_by_key_value_head() -> None:
    model = Transformer(NEMOTRON)
    attention = model.blocks["0"].attention  # type: ignore[union-attr]
    with torch.no_grad():
        attention.qkv.weight.copy_(torch.arange(64.0)[:, None].expand(-1, 32))  # type: ignore[union-attr, operator]
    queries, keys = [*range(16), *range(32, 48)], [*range(16, 24), *range(48, 56)]  # two heads of each group, one
    named = {name: hf_tensors(model)[f"model.layers.0.self_attn.{name}_proj.weight"][:, 0].tolist() for name in "qkv"}
    assert named == {"q": queries, "k": keys, "v": [*range(24, 32), *range(56, 64)]}


def test_layernorm1p_by_hand() -> None:
    norm = LayerNorm1P(4, eps=0.0)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.0, 1.0, -1.0, 0.5]))
        norm.bias.copy_(torch.tensor([0.0, 0.0, 3.0, 1.0]))
        out = norm(torch.tensor([[1.0, 3.0, 1.0, 3.0]]))  # mean 2, biased variance 1
    torch.testing.assert_close(out, torch.tensor([[-1.0, 2.0, 3.0, 2.5]]))


def test_layernorm1p_trains_its_gain_in_fp32_on_bf16_states() -> None:
    # Sums over thousands of tokens: added up in bf16 they would be off by several percent.
    generator = torch.Generator().manual_seed(0)
    x_TD, upstream_TD = (torch.randn(5000, 8, generator=generator).bfloat16() for _ in range(2))
    norm, exact_norm = LayerNorm1P(8, 1e-5), LayerNorm1P(8, 1e-5)
    for module in (norm, exact_norm):
        torch.nn.init.constant_(module.weight, 0.25)
        torch.nn.init.zeros_(module.bias)
    rough_x_TD, exact_x_TD = x_TD.clone().requires_grad_(), x_TD.float().requires_grad_()
    out_TD, exact_TD = norm(rough_x_TD), exact_norm(exact_x_TD)
    out_TD.backward(upstream_TD)
    exact_TD.backward(upstream_TD.float())
    assert out_TD.dtype == torch.bfloat16
    torch.testing.assert_close(out_TD.float(), exact_TD, atol=0, rtol=2**-8)
    torch.testing.assert_close(norm.weight.grad, exact_norm.weight.grad, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(norm.bias.grad, exact_norm.bias.grad, atol=1e-4, rtol=1e-5)
    assert rough_x_TD.grad is not None and exact_x_TD.grad is not None
    torch.testing.assert_close(rough_x_TD.grad.float(), exact_x_TD.grad, atol=1e-6, rtol=2**-8)


def test_rotation_pairs_the_two_halves_and_leaves_the_rest() -> None:
    # One pair (0, 1) turned by a right angle; dimensions 2 and 3 pass through.
    x_THd = torch.tensor([[[2.0, 5.0, 7.0, 9.0]]], requires_grad=True)
    out = rotate(x_THd, torch.tensor([[0.0]]), torch.tensor([[1.0]]))
    assert out.tolist() == [[[-5.0, 2.0, 7.0, 9.0]]]
    out.backward(torch.tensor([[[1.0, 10.0, 100.0, 1000.0]]]))
    assert x_THd.grad is not None and x_THd.grad.tolist() == [[[10.0, -1.0, 100.0, 1000.0]]]


def test_squared_relu_by_hand() -> None:
    mlp = MLP(replace(NEMOTRON, hidden_size=1), BlockConfig(0, 0, 0, 3))
    up_F1, down_1F = torch.tensor([[1.0], [-1.0], [2.0]]), torch.tensor([[1.0, 10.0, 100.0]])
    mlp.up.weight.data, mlp.down.weight.data = up_F1, down_1F
    x_TD = torch.tensor([[3.0], [-1.0]], requires_grad=True)
    out_TD = mlp(x_TD)
    assert out_TD.tolist() == [[9.0 + 3600.0], [10.0]]
    out_TD.sum().backward()
    assert x_TD.grad is not None and x_TD.grad.tolist() == [[6.0 + 2400.0], [-20.0]]
    assert mlp.up.weight.grad is not None and mlp.up.weight.grad.tolist() == [[18.0], [-20.0], [3600.0]]


def test_layers_may_lack_attention_or_mlp() -> None:
    blocks = (BlockConfig(4, 2, 8, 64), BlockConfig(0, 0, 0, 16), BlockConfig(4, 1, 8, 0))
    model = Transformer(replace(NEMOTRON, blocks=blocks))
    assert model.blocks["1"].attention is None and model.blocks["2"].mlp is None
    logits_TV = model(random_ids(12), PackedShape.from_lengths([5, 7]))
    logits_TV.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_a_cache_can_stand_between_the_halves_of_a_block() -> None:
    model, ids_T, shape = MODELS["qwen3"], random_ids(9), PackedShape.from_lengths([4, 5])
    cos_TR, sin_TR = model.rope(shape.positions_T)["global"]
    with torch.no_grad():
        x_TD = model.embed(ids_T)
        for block in model.blocks.values():
            x_TD = block.finish(x_TD, varlen_attention(*block.qkv(x_TD, cos_TR, sin_TR), shape))
        torch.testing.assert_close(model.logits(model.final_norm(x_TD)), model(ids_T, shape))


def test_bf16_compute_on_fp32_weights() -> None:
    model = Transformer(NEMOTRON)
    ids_T, shape = random_ids(40), PackedShape.from_lengths([25, 15])
    exact_TV = model(ids_T, shape).detach()
    model.compute_dtype = torch.bfloat16
    rough_TV = model(ids_T, shape)
    assert rough_TV.dtype == torch.bfloat16
    rough_TV.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert (rough_TV.float() - exact_TV).abs().max() < 0.05 * exact_TV.abs().max()
    assert all(table.dtype == torch.float32 for table in model.rope(shape.positions_T)["global"])


def test_tied_embeddings_are_one_parameter() -> None:
    model = Transformer(replace(NEMOTRON, tie_embeddings=True))
    assert model.unembedding() is model.embedding
    assert not any("lm_head" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_angles_that_depend_on_the_length_are_refused_beyond_the_positions(kind: str) -> None:
    scaling = RopeScaling(2.0, kind=kind, short_factor=(1.0,) * 4, long_factor=(2.0,) * 4, original_max_positions=8)
    config = ModelConfig("llama", 64, 32, uniform_blocks(1, 4, 2, 8, 48), 8, rope_scaling=scaling)
    model = Transformer(config)
    model(random_ids(12) % 64, PackedShape.from_lengths([8, 4]))
    with pytest.raises(InputError, match=f"at most 8 tokens, not 9.*{kind}"):
        model(random_ids(12) % 64, PackedShape.from_lengths([3, 9]))


@pytest.mark.parametrize("family", ["nemotron", "llama", "qwen3", "gemma2", "phi3", "olmo2"])
def test_kernels_compute_what_torch_does(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(family, 50, 24, uniform_blocks(2, 4, 2, 8, 20), 64, attention_soft_cap=2.0 if family == "gemma2" else None)
    model, ids_T, shape = Transformer(config), torch.arange(40) * 7 % 50, PackedShape.from_lengths([20, 15, 12], shared=[0, 0, 7])
    rows_S = torch.tensor([39, 3, 3, 0])
    results = []
    for _ in range(2):
        states_SD = model.hidden(ids_T, shape, rows_S)
        weights_SD = torch.arange(states_SD.numel()).view_as(states_SD).sin()  # a sum of squares behind a norm has no gradient
        grads = torch.autograd.grad((states_SD * weights_SD).sum(), list(model.parameters()), allow_unused=True)
        results.append([states_SD, *(grad for grad in grads if grad is not None)])
        monkeypatch.setattr(kernels, "load", lambda: None)
    assert all((ours - plain).abs().max() <= 1e-4 * plain.abs().max() for ours, plain in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_of_some_tokens_are_those_of_all(dtype: torch.dtype) -> None:
    model = Transformer(ModelConfig("nemotron", 50, 24, uniform_blocks(2, 4, 2, 8, 20), 64))
    model.compute_dtype = dtype
    ids_T, shape = torch.arange(40), PackedShape.from_lengths([20, 20])
    whole_TD = model.hidden(ids_T, shape)
    far = 1e-5 if dtype == torch.float32 else 0.02
    for rows_S in (torch.tensor([39, 3, 3, 0]), torch.arange(37), torch.empty(0, dtype=torch.int64)):
        torch.testing.assert_close(model.hidden(ids_T, shape, rows_S), whole_TD[rows_S], rtol=0, atol=far)
