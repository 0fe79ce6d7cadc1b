"""Blockwise distillation and scores: what is exactly 0 or 1, every variant gets better, a second start does nothing."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from gristmill.compress import activations as activations_module
from gristmill.compress import child as child_module
from gristmill.compress import scores as scores_module
from gristmill.compress.activations import Activations, Piece
from gristmill.compress.child import Reference, make_child
from gristmill.compress.library import BldSettings, LayerBatch, Library, Replaced, build_library, normalized_mse
from gristmill.compress.scores import score_blocks, score_id
from gristmill.compress.variants import Choice, Space, block_config, half_of, initial, num_block_parameters
from gristmill.core.errors import InputError
from gristmill.core.progress import Progress
from gristmill.model.transformer import Transformer
from gristmill.train.losses import cross_entropy_sum, kl_divergence_sum

QUIET = Progress(quiet=True)
SETTINGS = BldSettings(steps=12, lr=3e-3, precision="fp32", seed=0)
SPACE = {"widths": (0.5, 0.25), "width_multiple": 8}


@pytest.fixture(scope="module")
def parent(make_parent) -> Transformer:  # type: ignore[no-untyped-def]
    return make_parent("nemotron", 2)


@pytest.fixture(scope="module")
def space(parent: Transformer) -> Space:
    return Space.of(parent.config, **SPACE)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(parent: Transformer, space: Space, pieces: list[Piece], tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("library")
    build_library(parent, space, pieces, folder, SETTINGS, QUIET)
    return folder


def test_activations_are_those_of_the_model(parent: Transformer, pieces: list[Piece], tmp_path: Path) -> None:
    found = Activations(parent, pieces, tmp_path / "activations")
    found.advance(1)
    piece = pieces[1]
    states: list[torch.Tensor] = []
    parent.hidden(piece.ids_T, piece.shape, layers=states)
    torch.testing.assert_close(found.inputs(piece), states[0])
    torch.testing.assert_close(found.outputs(piece), states[1])
    assert {path.name for path in found.folder.iterdir()} == {"states-001.bin", "states-002.bin", "middle.bin"}, "of one layer alone"
    found.close()
    assert not found.folder.exists()


def test_a_disk_without_room_is_told_before_work(
    parent: Transformer, pieces: list[Piece], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations_module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1 << 20}))
    with pytest.raises(InputError, match="activations of 149 tokens take .* lower calibration.tokens"):
        Activations(parent, pieces, tmp_path / "activations")
    assert not list((tmp_path / "activations").iterdir())


def test_the_normalised_loss_is_0_of_the_parent_and_1_of_nothing(parent: Transformer, pieces: list[Piece]) -> None:
    piece = pieces[0]
    angles = parent.rope(piece.shape.positions_T)["global"]
    x_TD = parent.embed(piece.ids_T)
    own = Replaced(half_of(parent, 0, "attention"), half_of(parent, 0, "mlp"), torch.float32)
    batch = LayerBatch(x_TD, x_TD, angles, piece.shape, piece.num_tokens)
    target_TD = own(batch)
    assert float(normalized_mse(own, LayerBatch(x_TD, target_TD, angles, piece.shape, piece.num_tokens)).sum) == 0
    nothing = Replaced(half_of(parent, 0, "mlp"), None, torch.float32)
    nothing.forward = lambda batch: torch.zeros_like(batch.x_TD)  # type: ignore[method-assign]
    assert float(normalized_mse(nothing, LayerBatch(x_TD, target_TD, angles, piece.shape, piece.num_tokens)).sum) == 1


def test_training_lowers_every_variant_and_leaves_the_parent(parent: Transformer, space: Space, folder: Path) -> None:
    records = [json.loads(line) for line in (folder / "library.jsonl").read_text().splitlines()]
    assert {one["id"] for one in records} == {variant.id for variant in space.variants() if variant.size}
    assert all(one["after"] < one["before"] for one in records)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in parent.parameters())
    assert not (folder / "activations").exists()


def test_a_second_start_trains_nothing_and_mends_what_is_damaged(
    parent: Transformer, space: Space, pieces: list[Piece], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (folder / "library.jsonl").read_bytes()
    monkeypatch.setattr(Activations, "advance", None)
    (folder / "activations").mkdir()  # of a start that was killed behind its last variant
    build_library(parent, space, pieces, folder, SETTINGS, QUIET)
    assert (folder / "library.jsonl").read_bytes() == before and not (folder / "activations").exists()
    monkeypatch.undo()
    damaged = folder / "001-mlp-32.safetensors"
    good = damaged.read_bytes()
    damaged.write_bytes(good[:-8] + bytes(8))
    build_library(parent, space, pieces, folder, SETTINGS, QUIET)
    assert damaged.read_bytes() == good, "made again from nothing, it is the same"


def test_scores_are_those_of_a_whole_model_with_one_layer_exchanged(
    parent: Transformer, space: Space, pieces: list[Piece], folder: Path, tmp_path: Path
) -> None:
    library, reference = Library(parent, folder), Reference(parent, pieces[:2])
    scores = score_blocks(library, space, reference, tmp_path, QUIET)
    own = space.choices(0)[0]
    assert scores[score_id(0, own)]["kl"] == scores[score_id(1, own)]["kl"] == 0 and reference.distance(parent).kl == 0
    for layer, choice in [(0, Choice(1, 32)), (1, Choice(0, 16)), (0, Choice(0, 0)), (1, Choice(2, 0))]:
        child = make_child(library, [choice if number == layer else own for number in range(2)]).model
        exact = reference.distance(child)
        found = scores[score_id(layer, choice)]
        assert found["kl"] == pytest.approx(exact.kl, rel=1e-4) and found["kl"] > 0
        left_out = sum(p.numel() for p in parent.parameters()) - sum(p.numel() for p in child.parameters())
        sizes = [num_block_parameters(parent.config, block_config(parent.config.blocks[layer], one)) for one in (own, choice)]
        assert sizes[0] - sizes[1] == left_out
    again = (tmp_path / "scores.jsonl").read_bytes()
    score_blocks(library, space, reference, tmp_path, QUIET)
    assert (tmp_path / "scores.jsonl").read_bytes() == again


@pytest.mark.parametrize("max_logits", [1, 2**10, 2**30])
def test_distances_are_those_of_the_losses(
    parent: Transformer, pieces: list[Piece], monkeypatch: pytest.MonkeyPatch, max_logits: int
) -> None:
    monkeypatch.setattr(child_module, "MAX_LOGITS", max_logits)
    reference, other = Reference(parent, pieces), deepcopy(parent)
    with torch.no_grad():
        other.blocks["1"].mlp.down.weight.mul_(0.5)
        states = [[model.hidden(piece.ids_T, piece.shape, piece.rows_R) for piece in pieces] for model in (parent, other)]
    head = parent.unembedding()
    targets_R = torch.cat([piece.targets_R for piece in pieces])
    kl = kl_divergence_sum(torch.cat(states[1]), head, torch.cat(states[0]), head) / reference.count
    lm_loss = cross_entropy_sum(torch.cat(states[1]), head, targets_R)[0] / reference.count
    own, found = reference.distances(states, head)
    assert own.kl == 0 and (found.kl, found.lm_loss) == pytest.approx((float(kl), float(lm_loss)), rel=1e-5)
    assert found == reference.distance(other), "how many models are compared at once changes no bit"


def test_a_layer_that_gives_no_numbers_is_not_the_best_one(
    parent: Transformer, space: Space, pieces: list[Piece], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = Reference(parent, pieces[:1])
    broken = torch.full((reference.count, parent.config.hidden_size), float("nan"))
    monkeypatch.setattr(scores_module, "_replaced", lambda *given: [broken])
    with pytest.raises(InputError, match="gives no numbers .KL nan."):
        score_blocks(Library(parent, folder), space, reference, tmp_path, QUIET)


def test_a_trained_variant_differs_from_the_one_as_made(parent: Transformer, folder: Path, space: Space) -> None:
    variant = next(one for one in space.variants() if one.half == "attention" and one.size)
    trained, made = Library(parent, folder).half(0, "attention", variant.size), initial(parent, variant, None)
    assert any((a != b).any() for a, b in zip(trained.parameters(), made.parameters(), strict=True))
