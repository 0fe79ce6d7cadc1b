"""Search space and training-free initialisation: halves make the whole, and a variant of the parent's size is the parent."""

import pytest
import torch

from gristmill.compress.activations import Piece
from gristmill.compress.variants import ChannelContribution, Choice, Space, Variant, half_of, initial
from gristmill.core.errors import InputError
from gristmill.model.config import FAMILIES, ModelConfig, uniform_blocks
from gristmill.model.transformer import Block, Transformer

LLAMA_70B = ModelConfig("llama", 128_256, 8192, uniform_blocks(80, 64, 8, 128, 28_672), 8192)


def through(parent: Transformer, halves: list[Block], piece: Piece, x_TD: torch.Tensor) -> torch.Tensor:
    angles = parent.rope(piece.shape.positions_T)["global"]
    for half in halves:
        x_TD = half(x_TD, *angles, piece.shape)
    return x_TD


def test_the_space_of_the_paper_has_its_size() -> None:
    """6 attentions and 9 MLPs a layer make 54^80 = 10^138.6 architectures; ours has no linear ones: 5 and 8."""
    space = Space.of(LLAMA_70B, widths=(0.87, 0.75, 0.5, 0.25, 0.2, 0.1), width_multiple=256)
    assert space.attention[0] == (8, 4, 2, 1, 0) and len(space.mlp[0]) == 8
    assert space.num_architectures == 40**80
    assert len(space.variants()) == (4 + 7) * 80, "decoupled: m + n variants a layer, not m n"


def test_widths_are_multiples_and_smaller_than_the_parents() -> None:
    space = Space.of(LLAMA_70B, kv_heads=(4,), widths=(0.5, 0.501, 0.9999), width_multiple=4096, no_attention=False, no_mlp=False)
    assert space.attention[0] == (8, 4) and space.mlp[0] == (28_672, 16_384)
    whole = Space.of(LLAMA_70B)
    assert whole.choices(3)[whole.empty[3]] == Choice(0, 0) and Space.of(LLAMA_70B, fixed_layers=(0,)).empty == ()
    assert Space.of(LLAMA_70B, fixed_layers=(0, -1)).choices(79) == [Choice(8, 28_672)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"widths": (1.5,)}, "between 0 and 1"),
        ({"fixed_layers": (80,)}, "no layer 80"),
        ({"kv_heads": (4, 3)}, "that divide the parent's .8.: 3 does not"),
        ({"kv_heads": (), "widths": (), "no_attention": False, "no_mlp": False}, "No layer of this model can change"),
    ],
)
def test_a_space_that_is_none_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Space.of(LLAMA_70B, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["nemotron", "llama", "phi3", "olmo2", "gemma2", "granite"])
def test_two_halves_are_the_layer(make_parent, pieces: list[Piece], family: str) -> None:  # type: ignore[no-untyped-def]
    parent, piece = make_parent(family), pieces[0]
    x_TD = parent.embed(piece.ids_T)
    halves = [half_of(parent, 1, half) for half in ("attention", "mlp")]
    whole = through(parent, [parent.get_submodule("blocks.1")], piece, x_TD)
    assert torch.equal(through(parent, halves, piece, x_TD), whole)
    names = {name for half in halves for name, _ in half.named_parameters()}
    assert names == {name for name, _ in parent.get_submodule("blocks.1").named_parameters()}


@pytest.mark.parametrize("family", ["nemotron", "llama", "phi3", "olmo2", "qwen3"])
def test_pooling_equal_key_value_heads_changes_nothing(make_parent, pieces: list[Piece], family: str) -> None:  # type: ignore[no-untyped-def]
    parent, piece = make_parent(family), pieces[0]
    attention = parent.get_submodule("blocks.1.attention")
    for rows in filter(lambda one: one is not None, (attention.qkv.weight, attention.qkv.bias)):
        _, k, v = attention.parts(rows)
        for part in (k, v):
            part[1::2] = part[::2]
    if attention.norms_whole:
        gain = attention.k_norm.weight.view(attention.num_kv_heads, -1)
        gain[1::2] = gain[::2]
    x_TD = parent.embed(piece.ids_T)
    pooled = initial(parent, Variant(1, "attention", attention.num_kv_heads // 2), None)
    own = through(parent, [half_of(parent, 1, "attention")], piece, x_TD)
    assert pooled.attention is not None and pooled.attention.num_kv_heads == attention.num_kv_heads // 2
    torch.testing.assert_close(through(parent, [pooled], piece, x_TD), own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["nemotron", "llama", "phi3"])
def test_channels_that_give_nothing_go_first(make_parent, pieces: list[Piece], family: str) -> None:  # type: ignore[no-untyped-def]
    parent, piece = make_parent(family), pieces[0]
    mlp = parent.get_submodule("blocks.2.mlp")
    idle = torch.arange(64) % 4 != 1
    mlp.down.weight[:, idle] = 0
    half = half_of(parent, 2, "mlp")
    counter = ChannelContribution(half)
    x_TD = parent.embed(piece.ids_T)
    with torch.no_grad():
        own = through(parent, [half], piece, x_TD)
    contribution_F = counter.close()
    assert (contribution_F[idle] == 0).all() and (contribution_F[~idle] > 0).all()
    narrow = initial(parent, Variant(2, "mlp", 16), contribution_F)
    torch.testing.assert_close(through(parent, [narrow], piece, x_TD), own, rtol=1e-5, atol=1e-5)


def test_contribution_is_activation_times_column_norm(make_parent, pieces: list[Piece]) -> None:  # type: ignore[no-untyped-def]
    """By hand for Nemotron: sum over tokens of relu(up norm(x))^2, times the norm of the column."""
    parent, piece = make_parent("nemotron"), pieces[0]
    half = half_of(parent, 0, "mlp")
    counter = ChannelContribution(half)
    x_TD = parent.embed(piece.ids_T)
    with torch.no_grad():
        through(parent, [half], piece, x_TD)
    assert half.mlp is not None and half.mlp_norm is not None and half.mlp.up is not None
    inner_TF = torch.relu(half.mlp.up(half.mlp_norm(x_TD))).square()
    expected_F = inner_TF.sum(0) * half.mlp.down.weight.norm(dim=0)
    torch.testing.assert_close(counter.close().float(), expected_F, rtol=1e-4, atol=1e-4)


def test_no_half_is_the_identity(make_parent, pieces: list[Piece]) -> None:  # type: ignore[no-untyped-def]
    parent, piece = make_parent("nemotron"), pieces[0]
    x_TD = parent.embed(piece.ids_T)
    halves = [initial(parent, Variant(0, half, 0), None) for half in ("attention", "mlp")]  # type: ignore[arg-type]
    assert torch.equal(through(parent, halves, piece, x_TD), x_TD)
    assert FAMILIES["nemotron"].norm == "layernorm1p" and not list(halves[0].parameters())
