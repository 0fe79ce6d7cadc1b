"""What an alignment takes from its model and device: settings by size, and precisions that stay when it is taken up elsewhere."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gristmill.core.config import check, dump
from gristmill.data.human import HumanData
from gristmill.miniature.source import MiniatureSource
from gristmill.workflows.alignment.context import STAGE_KINDS, resolved_recipe
from gristmill.workflows.alignment.recipe import AlignmentRecipe

CPU, GPU = torch.device("cpu"), torch.device("cuda")
Resolve = Callable[..., AlignmentRecipe]


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Resolve:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr("gristmill.core.device.bf16_is_faster", lambda: False)
    source = MiniatureSource(HumanData(), 0)
    return lambda recipe, size, device: resolved_recipe(recipe, size, device, source=source, folder=tmp_path)


def precisions(recipe: AlignmentRecipe) -> set[str]:
    return {recipe.engine.precision, *(getattr(recipe, name).precision for name in STAGE_KINDS)}


def test_everything_computes_in_bf16_on_a_gpu_and_in_fp32_on_a_cpu_without_it(resolve: Resolve) -> None:
    recipe = check(AlignmentRecipe, {"world": "miniature"})
    assert precisions(resolve(recipe, 10**9, GPU)) == {"bf16"} and precisions(resolve(recipe, 10**9, CPU)) == {"fp32"}


def test_a_run_that_is_taken_up_elsewhere_keeps_its_precision(resolve: Resolve, tmp_path: Path) -> None:
    recipe = check(AlignmentRecipe, {"world": "miniature"})
    first = resolve(recipe, 10**9, GPU)
    (tmp_path / "recipe.yaml").write_text(dump(first))
    assert resolve(recipe, 10**9, CPU) == first
    said = check(AlignmentRecipe, {"world": "miniature", "engine": {"precision": "int8"}, "dpo": {"precision": "fp32"}})
    found = resolve(said, 10**9, CPU)
    assert (found.engine.precision, found.dpo.precision, found.rpo.precision) == ("int8", "fp32", "bf16")


def test_no_gap_stays_and_what_is_given_is_kept(resolve: Resolve) -> None:
    found = resolve(check(AlignmentRecipe, {"world": "miniature", "rpo": {"beta": 0.3}, "reward": {"epochs": 7}}), 135 * 10**6, CPU)
    for name in STAGE_KINDS:
        section = getattr(found, name)
        assert section.lr and section.batch_size and (section.steps or section.epochs), name
    assert (found.rpo.beta, found.rpo.loss, found.rpo.lr, found.reward.epochs, found.reward.lr) == (0.3, "rpo", 4e-5, 7, 1e-4)
    assert resolve(found, 135 * 10**6, GPU) == found  # resolved once, for good


def test_the_miniature_leaves_the_precision_alone_open(resolve: Resolve) -> None:
    from gristmill.core.config import find_recipe, load

    recipe = load(find_recipe("miniature", "alignment"), AlignmentRecipe)
    for device, precision in ((GPU, "bf16"), (CPU, "fp32")):
        sections = {name: getattr(recipe, name).model_copy(update={"precision": precision}) for name in STAGE_KINDS}
        engine = recipe.engine.model_copy(update={"precision": precision})
        assert resolve(recipe, 10**6, device) == recipe.model_copy(update={**sections, "engine": engine})
