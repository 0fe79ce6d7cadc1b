"""One training stage of each kind, and what it refuses before work."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from gristmill.core.errors import InputError
from gristmill.model.adapters import load_model as load_adapter
from gristmill.model.adapters import load_reward as load_reward_adapter
from gristmill.model.config import ModelConfig, uniform_blocks
from gristmill.model.hf import load_model, load_reward
from gristmill.train import memory
from gristmill.train.settings import Lora, PreferenceTraining, Training
from gristmill.workflows.train import merge_adapter_folder, train_model, training_memory

RATED = {"helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 1, "verbosity": 2}
STEPS = Training(lr=1e-3, steps=2, batch_size=4)
PREFERENCE = PreferenceTraining(lr=1e-3, steps=2, batch_size=4)
DEMONSTRATIONS = [{"prompt": f"Say {i}.", "response": f"It is {i}."} for i in range(8)]
RATINGS = [{"prompt": f"Say {i // 2}.", "response": f"It is {i}.", **RATED} for i in range(8)]
PAIRS = [{"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": "No."} for i in range(8)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.mark.parametrize(
    ("kind", "rows", "recipe"),
    [("sft", DEMONSTRATIONS, STEPS), ("reward", RATINGS, STEPS), ("dpo", PAIRS, PREFERENCE), ("rpo_sq", PAIRS, PREFERENCE)],
)
def test_each_kind_of_training(kind: str, rows: list[dict[str, Any]], recipe: Training, tmp_path: Path, random_base: Path) -> None:
    data, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    result = train_model(kind, random_base, data, out=out, recipe=recipe)
    assert result.steps == 2 and result.tokens > 0 and math.isfinite(result.metrics["loss"])
    if kind == "dpo":
        first = json.loads((out / "train" / "metrics.jsonl").read_text().splitlines()[0])
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    weights = (out / "model" / "model.safetensors").read_bytes()
    assert weights != (random_base / "model.safetensors").read_bytes()
    (load_reward if kind == "reward" else load_model)(out / "model")
    again = train_model(kind, random_base, data, out=out, recipe=recipe, on_step=lambda *args: pytest.fail("it trained again"))
    assert again == result and (out / "model" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("kind", "rows", "recipe"),
    [("sft", DEMONSTRATIONS, STEPS), ("reward", RATINGS, STEPS), ("dpo", PAIRS, PREFERENCE)],
)
def test_each_kind_of_training_with_an_adapter(
    kind: str, rows: list[dict[str, Any]], recipe: Training, tmp_path: Path, random_base: Path
) -> None:
    data, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    lora = recipe.model_copy(update={"lora": Lora(rank=4, base="int8" if kind == "dpo" else "fp32")})
    result = train_model(kind, random_base, data, out=out, recipe=lora)
    first = json.loads((out / "train" / "metrics.jsonl").read_text().splitlines()[0])
    if kind == "dpo":
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    elif kind == "sft":
        train_model(kind, random_base, data, out=tmp_path / "whole", recipe=recipe)
        whole = json.loads((tmp_path / "whole" / "train" / "metrics.jsonl").read_text().splitlines()[0])
        assert first["loss"] == whole["loss"]  # the first step is the base's
    assert not (out / "model").exists()
    weights = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    (load_reward_adapter if kind == "reward" else load_adapter)(out / "adapter")
    again = train_model(kind, random_base, data, out=out, recipe=lora, on_step=lambda *args: pytest.fail("it trained again"))
    assert again == result and (out / "adapter" / "adapter_model.safetensors").read_bytes() == weights
    with pytest.raises(InputError, match="Merge the adapter first"):
        train_model(kind, out / "adapter", data, out=tmp_path / "more", recipe=lora)


@pytest.mark.parametrize(("kind", "rows"), [("sft", DEMONSTRATIONS), ("reward", RATINGS)])
def test_merging_measures_the_loss_before_and_after(kind: str, rows: list[dict[str, Any]], tmp_path: Path, random_base: Path) -> None:
    data, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    lora = Training(lr=1e-2, steps=6, batch_size=8, precision="fp32", lora=Lora(rank=4))
    train_model(kind, random_base, data, out=out, recipe=lora)
    first = json.loads((out / "train" / "metrics.jsonl").read_text().splitlines()[0])["loss"]  # of all rows, before any step
    facts = merge_adapter_folder(out / "adapter", tmp_path / "merged", data)
    loss = facts["loss"]
    assert facts["rows"] == 8 and loss["adapter"] < loss["base"]
    assert loss["stored"] == pytest.approx(loss["adapter"], rel=1e-5)
    if kind == "sft":  # a reward adapter brings its own head, so the base with it is not where training began
        assert loss["base"] == pytest.approx(first, rel=1e-5)
        once = lora.model_copy(update={"lora": None, "steps": 1})
        again = train_model(kind, tmp_path / "merged", data, out=tmp_path / "more", recipe=once)
        assert again.metrics["loss"] == pytest.approx(loss["stored"], rel=1e-5)
    rounded = merge_adapter_folder(out / "adapter", tmp_path / "rounded", data, dtype="bf16")["loss"]
    assert rounded["adapter"] == loss["adapter"] and rounded["stored"] != loss["stored"]
    with pytest.raises(InputError, match="holds no rows"):
        merge_adapter_folder(out / "adapter", tmp_path / "none", write(tmp_path / "empty.jsonl", []))
    assert not (tmp_path / "none").exists()


def test_what_does_not_fit_whole_is_trained_with_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig("llama", 1000, 2048, uniform_blocks(8, 16, 16, 128, 8192), 512)  # half a billion parameters
    monkeypatch.setattr(memory, "free_memory", lambda device: 5_000_000_000)
    small = STEPS.model_copy(update={"lora": Lora(rank=8, base="bf16"), "precision": "bf16"})
    assert "weights 1.1, gradients 0.01, optimizer 0.02" in str(training_memory(config, small, torch.device("cpu")))
    with pytest.raises(InputError, match="train with LoRA"):
        training_memory(config, STEPS.model_copy(update={"precision": "fp32"}), torch.device("cpu"))


LONG = "word " * 100
BAD: list[tuple[str, list[dict[str, Any]], str]] = [
    ("sft", [], "holds no rows"),
    ("reward", [], "holds no rows"),
    ("dpo", [], "holds no pairs"),
    ("sft", [{"messages": [{"role": "assistant", "content": "Hi"}]}], "Row 1 .* starting with the user"),
    ("sft", [{"messages": [{"role": "user", "content": "Hi"}]}], "Row 1 .* end with the assistant"),
    ("sft", [{"prompt": LONG, "response": LONG}], "over 256 tokens"),
    ("reward", [{"prompt": "Q", "response": "A", **dict.fromkeys(RATED)}], "none of the columns"),
    ("reward", [{"prompt": LONG, "response": LONG, **RATED}], "over 256 tokens"),
    ("dpo", [{"prompt": "Q", "chosen": "A"}], "Row 1 .* lacks `rejected`"),
    ("dpo", [{"chosen": "A", "rejected": "B"}], "Row 1 .* implicit prompt"),
    ("dpo", [{"prompt": 5, "chosen": "A", "rejected": "B"}], "Row 1 .*list of turns"),
    ("dpo", [{"messages": 5, "chosen": "A", "rejected": "B"}], "Row 1"),
    ("dpo", [{"prompt": "Q", "chosen": "A", "rejected": None}], "Row 1 .* lacks `rejected`"),
    ("dpo", [{"prompt": "Q", "chosen": "A", "rejected": "B", "chosen_reward": "much"}], "Row 1 .*chosen_reward 'much'"),
    ("dpo", [{"prompt": "Q", "chosen": "A", "rejected": "A"}], "same answer on both sides"),
    ("dpo", [{"prompt": "Q", "chosen": "Q: A", "rejected": "Q: B"}], "both answers begin with the prompt"),
    ("sft", [{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "weight": 0}]}], "Row 1 .* weight 0"),
    ("reward", [{"prompt": "Q", "response": "A", **RATED, "coherence": 7}], "Row 1 .* coherence 7"),
    ("dpo", [{"messages": [{"role": "assistant", "content": "Hi"}], "chosen": "A", "rejected": "B"}], "is not `chosen`"),
    ("rpo", [{"prompt": LONG, "chosen": LONG, "rejected": "B"}], "over 256 tokens"),
]


@pytest.mark.parametrize(("kind", "rows", "words"), BAD)
def test_rows_that_cannot_be_trained_on(kind: str, rows: list[dict[str, Any]], words: str, tmp_path: Path, random_base: Path) -> None:
    recipe = STEPS if kind in ("sft", "reward") else PREFERENCE
    with pytest.raises(InputError, match=words) as caught:
        train_model(kind, random_base, write(tmp_path / "bad.jsonl", rows), out=tmp_path / "out", recipe=recipe)
    assert "\n" not in str(caught.value) and not (tmp_path / "out" / "model").exists()


def test_a_folder_that_another_training_wrote(tmp_path: Path, random_base: Path) -> None:
    one, other = (write(tmp_path / f"{n}.jsonl", DEMONSTRATIONS[n:]) for n in (0, 1))
    train_model("sft", random_base, one, out=tmp_path / "out", recipe=STEPS)
    weights = (tmp_path / "out" / "model" / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="another data set"):
        train_model("sft", random_base, other, out=tmp_path / "out", recipe=STEPS)
    assert (tmp_path / "out" / "model" / "model.safetensors").read_bytes() == weights


def test_an_unknown_chat_format_lists_the_known(tmp_path: Path, random_base: Path) -> None:
    rows = write(tmp_path / "d.jsonl", DEMONSTRATIONS)
    with pytest.raises(InputError, match="chatml"):
        train_model("sft", random_base, rows, out=tmp_path / "out", recipe=STEPS, chat_format="chatlm")


def test_a_device_that_is_not_here_is_refused_before_work(tmp_path: Path, random_base: Path) -> None:
    rows = write(tmp_path / "d.jsonl", DEMONSTRATIONS)
    with pytest.raises(InputError, match="unknown device 'gpu'"):
        train_model("sft", random_base, rows, out=tmp_path / "out", recipe=STEPS, device="gpu")
    assert not (tmp_path / "out").exists()
