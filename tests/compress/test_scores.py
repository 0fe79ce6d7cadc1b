"""Scores by a task's accuracy: falls as counted, resumed, refused where nothing can fall; and what the search makes of noise."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from gristmill.compress.activations import Piece
from gristmill.compress.child import make_child
from gristmill.compress.library import BldSettings, Library, build_library
from gristmill.compress.scores import Task, score_accuracy, score_id, search_scores
from gristmill.compress.variants import Choice, Space
from gristmill.core.errors import InputError
from gristmill.core.progress import Progress
from gristmill.model.transformer import Transformer

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def space(make_parent) -> Space:  # type: ignore[no-untyped-def]
    return Space.of(make_parent(num_layers=2).config, widths=[0.5], width_multiple=16, no_mlp=False)


@pytest.fixture(scope="module")
def library(make_parent, space: Space, pieces: list[Piece], tmp_path_factory: pytest.TempPathFactory) -> Library:  # type: ignore[no-untyped-def]
    parent, folder = make_parent(num_layers=2), tmp_path_factory.mktemp("library")
    build_library(parent, space, pieces, folder, BldSettings(0, 1e-3, "fp32", 0), QUIET)
    return Library(parent, folder)


class Judge:
    """Right is a token that the parent would say too; it counts the models that it was asked about."""

    def __init__(self, parent: Transformer, piece: Piece) -> None:
        self._piece, self.asked = piece, 0
        self._truth = self._says(parent)

    def _says(self, model: Transformer) -> torch.Tensor:
        with torch.no_grad():
            return model.hidden(self._piece.ids_T, self._piece.shape) @ model.unembedding().T

    def __call__(self, model: Transformer) -> Sequence[bool]:
        self.asked += 1
        return (self._says(model).argmax(-1) == self._truth.argmax(-1)).tolist()


def test_a_fall_is_that_of_the_whole_model_and_is_made_once(library: Library, space: Space, pieces: list[Piece], tmp_path: Path) -> None:
    judge = Judge(library.parent, pieces[0])
    task = Task("t", judge)
    found = score_accuracy(library, space, task, tmp_path, QUIET)
    own = space.choices(0)[0]
    assert found[score_id(0, own)] == found[score_id(1, own)] == {"accuracy": 0, "stderr": 0}
    for layer, choice in ((0, Choice(1, 64)), (1, Choice(0, 32))):
        wrong = 1 - np.array(judge(make_child(library, [choice if number == layer else own for number in range(2)]).model))
        score = found[score_id(layer, choice)]
        assert score["accuracy"] == pytest.approx(wrong.mean()) and wrong.mean() > 0.02
        assert score["stderr"] == pytest.approx(wrong.std(ddof=1) / len(wrong) ** 0.5)
    journal = tmp_path / "scores.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 2 * len(space.choices(0))
    journal.write_bytes(b"".join(lines[:-2]) + lines[-2][:9])  # as a kill leaves it
    judge.asked = 0
    assert score_accuracy(library, space, task, tmp_path, QUIET) == found and judge.asked == 2
    assert journal.read_bytes() == b"".join(lines)
    assert score_accuracy(library, space, Task("other", judge), tmp_path, QUIET) == found, "other prompts are asked anew"
    assert len({json.loads(line)["id"] for line in journal.read_text().splitlines()}) == 2 * len(lines)


def test_a_parent_that_knows_no_answer_is_refused(library: Library, space: Space, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="answers none of 30 prompts rightly"):
        score_accuracy(library, space, Task("t", lambda model: [False] * 30), tmp_path, QUIET)


def test_a_rise_counts_as_none_and_kl_orders_what_is_equal() -> None:
    """At most half a prompt over all layers, so that no accuracy is overturned."""
    space = Space(((2, 1, 0),) * 2, ((64,),) * 2)
    falls, kl = {2: 0.0, 1: -0.1, 0: 0.05}, {2: 0.0, 1: 0.4, 0: 9.0}
    blocks = {score_id(layer, Choice(k, 64)): {"accuracy": falls[k], "kl": kl[k], "lm_loss": 0.0} for layer in (0, 1) for k in (2, 1, 0)}
    for own, better, worse in search_scores(blocks, space, "accuracy", num_prompts=20):
        assert 0 == own < better < 0.01 and 0.05 < worse <= 0.05 + 0.5 / 20 / 2
    assert [list(scores) for scores in search_scores(blocks, space, "kl")] == [[0.0, 0.4, 9.0]] * 2
