"""A child whose layers differ, as the Base of what comes after compression: continued pretraining, SFT, and a whole alignment."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from gristmill.cli.main import app
from gristmill.compress.activations import pieces_of
from gristmill.compress.child import make_child
from gristmill.compress.library import BldSettings, Library, build_library
from gristmill.compress.variants import Choice, Space
from gristmill.core.progress import Progress
from gristmill.model.hf import load_model
from gristmill.model.hf_save import save_model
from gristmill.model.transformer import Transformer
from gristmill.train.batches import Sample

KINDS = [(2, 64), (0, 48)]  # heads and channels of each layer


@pytest.fixture(scope="module")
def child(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fewer channels in both layers, no attention in the second."""
    folder = tmp_path_factory.mktemp("child")
    parent, tokenizer = load_model(tiny_base)
    parent.requires_grad_(False)
    space = Space.of(parent.config, widths=[0.67, 0.5], width_multiple=16)
    sample = Sample(np.arange(200) % parent.config.vocab_size, [True] * 200)
    pieces = pieces_of([sample], 200, torch.device("cpu"))
    build_library(parent, space, pieces, folder / "library", BldSettings(0, 1e-3, "fp32", 0), Progress(quiet=True))
    made = make_child(Library(parent, folder / "library"), [Choice(1, 64), Choice(0, 48)])
    save_model(made.model, tokenizer, folder / "model")
    return folder / "model"


def loaded(folder: Path) -> Transformer:
    """A model of the child's shape, or it fails."""
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["GristmillForCausalLM"]
    model = load_model(folder)[0]
    assert [(block.num_heads, block.ffn_size) for block in model.config.blocks] == KINDS
    return model


def test_continued_pretraining_and_sft_go_on_from_a_child(child: Path, tmp_path: Path) -> None:
    def command(*args: Any) -> None:
        shown = CliRunner().invoke(app, [*map(str, args), "--quiet"])
        assert shown.exit_code == 0, shown.output

    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"There are {i} apples in Batru."}) + "\n" for i in range(60)))
    how = {"documents": str(texts), "held_out": {"apples": str(texts)}, "tokens": 600, "batch_tokens": 300, "precision": "fp32"}
    recipe = tmp_path / "cpt.yaml"
    recipe.write_text(json.dumps({"kind": "pretraining", "model": str(child), "optimizer": "adamw", **how}))
    command("pretrain", recipe, "--out", tmp_path / "cpt")
    assert json.loads((tmp_path / "cpt/held_out.json").read_text())["change"]["apples"]["value"] < 0
    rows = tmp_path / "rows.jsonl"
    turns = [[{"role": "user", "content": f"Say {w}."}, {"role": "assistant", "content": w * 3}] for w in "abcdefgh"]
    rows.write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns))
    command(
        "train", "sft", "--model", tmp_path / "cpt/model", "--data", rows, "--epochs", 2, "--precision", "fp32", "--out", tmp_path / "sft"
    )
    folders = [child, tmp_path / "cpt/model", tmp_path / "sft/model"]
    weights = [loaded(folder).get_parameter("blocks.1.mlp.down.weight") for folder in folders]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


def test_an_alignment_takes_a_child_as_its_base(
    child: Path, make_recipe: Callable[..., Any], run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    results = run(make_recipe(model=str(child)), tmp_path / "run")
    names = [stage["name"] for stage in results["stages"]]
    assert names[0] == "base" and names[-1].startswith("r1-rpo")
    models = sorted((tmp_path / "run").glob("*/model/config.json"))
    assert len(models) >= 5
    for path in models:
        if "reward" not in path.parent.parent.name:
            loaded(path.parent)
