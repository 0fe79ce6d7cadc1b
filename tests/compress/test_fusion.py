"""FFN Fusion: a sum of MLPs is one wide MLP (Theorem 3.1), which runs are fused, and fusing hurts less than removing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gristmill.compress.activations import Piece
from gristmill.compress.child import Child, Reference
from gristmill.compress.fusion import dependency_matrix, fusable_runs, fuse, independent_runs
from gristmill.core.errors import InputError
from gristmill.model.config import BlockConfig, ModelConfig, uniform_blocks
from gristmill.model.transformer import Block, Transformer

ATTENTION, NONE = BlockConfig(4, 2, 8, 48), BlockConfig(0, 0, 0, 48)


def child(make_parent, family: str, widths: tuple[int, ...]) -> Child:  # type: ignore[no-untyped-def]
    """A layer with attention, then layers without, of these widths."""
    config = make_parent(family).config
    blocks = (ATTENTION, *(replace(NONE, ffn_size=width) for width in widths))
    model = Transformer(replace(config, blocks=blocks)).requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return Child(model, tuple(range(len(blocks))))


def test_all_of_a_run_but_its_last_are_fused() -> None:
    def runs(kinds: str) -> list[range]:
        blocks = tuple({"a": ATTENTION, "-": NONE, "0": BlockConfig(4, 2, 8, 0)}[kind] for kind in kinds)
        return fusable_runs(ModelConfig("nemotron", 96, 32, blocks, 64))

    assert runs("aaaa") == [] and runs("a--a") == [] and runs("a---a--") == [range(1, 3)]
    assert runs("----a-----") == [range(0, 3), range(5, 9)] and runs("a-0--a---") == [range(6, 8)]


@pytest.mark.parametrize("family", ["nemotron", "llama", "phi3", "granite"])
def test_a_fused_layer_is_the_parallel_sum_with_the_last_norm(make_parent, family: str) -> None:  # type: ignore[no-untyped-def]
    before = child(make_parent, family, (48, 16, 24, 32))
    after = fuse(before, [range(1, 4)])
    assert [block.ffn_size for block in after.model.config.blocks] == [48, 88, 32] and after.layers == (0, 3, 4)
    x_TD = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    blocks = [before.model.get_submodule(f"blocks.{number}") for number in (1, 2, 3)]
    assert all(isinstance(block, Block) for block in blocks)
    norm, multiplier = blocks[-1].mlp_norm, blocks[0].residual_multiplier
    with torch.no_grad():
        parallel_TD = x_TD + multiplier * sum(block.mlp(norm(x_TD)) for block in blocks)
        fused_TD = after.model.get_submodule("blocks.1").finish(x_TD, None)
    torch.testing.assert_close(fused_TD, parallel_TD, rtol=0, atol=1e-5)


def test_fusing_hurts_less_than_removing(make_parent, pieces: list[Piece]) -> None:  # type: ignore[no-untyped-def]
    """Layers that add little to what they read, as trained ones do: the fused read the same as before, almost."""
    before = child(make_parent, "nemotron", (64, 64, 64))
    for number in (1, 2, 3):
        before.model.get_submodule(f"blocks.{number}.mlp.down").weight.mul_(0.3)
    reference = Reference(before.model, pieces)
    fused = reference.distance(fuse(before).model).kl
    blocks = (ATTENTION, *before.model.config.blocks[2:])
    removed = Transformer(replace(before.model.config, blocks=blocks)).requires_grad_(False)
    state = {name.replace("blocks.2.", "blocks.1.").replace("blocks.3.", "blocks.2."): tensor
             for name, tensor in before.model.state_dict().items() if not name.startswith("blocks.1.")}  # fmt: skip
    removed.load_state_dict(state)
    assert 0 < fused < reference.distance(removed).kl / 3
    assert fused < reference.distance(fuse(before, [range(1, 4)]).model).kl, "the last MLP of a run is left out for a reason"


def test_a_dependency_is_the_distance_to_the_layer_without_the_other(make_parent, pieces: list[Piece]) -> None:  # type: ignore[no-untyped-def]
    model = child(make_parent, "nemotron", (64, 48, 64, 32)).model
    found = dependency_matrix(model, pieces, range(1, 4))
    assert np.array_equal(found, np.triu(found, 1)) and (found[np.triu_indices(3, 1)] > 1e-3).all()
    distances: list[torch.Tensor] = []
    for piece in pieces:  # of layer 3 on layer 1
        states: list[torch.Tensor] = []
        model.hidden(piece.ids_T, piece.shape, layers=states)
        second, third = (model.get_submodule(f"blocks.{number}") for number in (2, 3))
        without_TD = second.finish(states[0], None)
        distances.append(1 - F.cosine_similarity(states[3] - states[2], third.finish(without_TD, None) - without_TD, dim=-1))
    assert found[0, 2] == pytest.approx(float(torch.cat(distances).mean()), rel=1e-4)


def test_layers_that_need_each_other_are_not_fused() -> None:
    """The longest parts within the limit, then those that depend least."""
    matrix = np.zeros((5, 5))
    matrix[0, 1:] = 0.7
    assert independent_runs({range(2, 7): matrix}, 0.1) == [range(3, 7)] and independent_runs({range(2, 7): matrix}, 0.7) == [range(2, 7)]
    matrix[2, 3] = 0.3
    assert independent_runs({range(2, 7): matrix}, 0.1) == [range(3, 5), range(5, 7)]
    matrix[1, 2], matrix[3, 4] = 0.05, 0.2
    assert independent_runs({range(2, 7): matrix, range(9, 11): np.zeros((2, 2))}, 0.1) == [range(3, 5), range(9, 11)]
    assert independent_runs({range(2, 7): matrix}, 0.04) == []


def test_what_the_dependency_matrix_keeps_apart_would_hurt_more(make_parent, pieces: list[Piece]) -> None:  # type: ignore[no-untyped-def]
    """A first layer that turns all states, as trained models' first layers do, and two that add little beside it."""
    before = child(make_parent, "nemotron", (64, 64, 64, 64))
    before.model.get_submodule("blocks.1.mlp.down").weight.mul_(20)
    reference = Reference(before.model, pieces)
    (run,) = fusable_runs(before.model.config)
    matrix = dependency_matrix(before.model, pieces, run)
    chosen = independent_runs({run: matrix}, 0.1)
    assert chosen == [range(2, 4)] and matrix[0].max() > 0.3
    fused, other = (reference.distance(fuse(before, runs).model).kl for runs in (chosen, [range(1, 3)]))
    assert 0 < fused < other / 5


def test_what_cannot_be_fused_is_refused(make_parent) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match="norms what each MLP gives"):
        fuse(child(make_parent, "gemma2", (48, 48, 48)))
    with pytest.raises(InputError, match="one of them has attention"):
        fuse(child(make_parent, "llama", (48, 48)), [range(0, 2)])
    uniform = Transformer(ModelConfig("nemotron", 96, 32, uniform_blocks(2, 4, 2, 8, 48), 64))
    assert fuse(Child(uniform, (0, 1))).model is uniform, "nothing to fuse"
