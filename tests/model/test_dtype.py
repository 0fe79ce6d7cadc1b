"""What inference computes in where it is left to the checkpoint and the device."""

from pathlib import Path

import pytest
import torch

from gristmill.core.errors import InputError
from gristmill.engine.load import EngineArgs, load_engine
from gristmill.judge.reward import load_scorer
from gristmill.model import dtype as dtypes
from gristmill.model.adapters import save_adapter
from gristmill.model.convert import quantize_folder
from gristmill.model.dtype import pick_dtype
from gristmill.model.hf import load_model
from gristmill.model.hf_save import save_model, save_reward
from gristmill.model.lora import LoraConfig, add_adapters
from gristmill.model.reward import REWARD_WEIGHTS, RewardModel

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stored(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in three types."""
    folder = tmp_path_factory.mktemp("stored")
    model, tokenizer = load_model(tiny_base)
    for name in ("float32", "float16", "bfloat16"):
        save_model(model.to(getattr(torch, name)), tokenizer, folder / name)
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "fast", "want"),
    [("float32", "bf16", "fp32"), ("float16", "bf16", "bf16"), ("bfloat16", "bf16", "bf16"), ("bfloat16", "fp32", "fp32")],
)
def test_auto_is_the_checkpoints_own_type_where_the_cpu_is_made_for_it(
    name: str, fast: str, want: str, stored: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dtypes, "pick_precision", lambda device: fast)
    assert pick_dtype("auto", stored[name], CPU) == want
    assert load_engine(stored[name], EngineArgs(device="cpu")).dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[want]
    assert [pick_dtype(asked, stored[name], CPU) for asked in ("fp32", "bf16")] == ["fp32", "bf16"]


def test_a_gpu_computes_in_bf16_whatever_is_stored(stored: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtypes, "pick_precision", lambda device: "bf16")
    monkeypatch.setattr(dtypes, "check_dtype", lambda device, dtype: None)
    assert pick_dtype("auto", stored["float32"], torch.device("cuda")) == "bf16"


def test_quantized_folders_adapters_and_reward_models_go_by_their_base(
    stored: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dtypes, "pick_precision", lambda device: "bf16")
    for name, want in (("bfloat16", "bf16"), ("float32", "fp32")):
        quantize_folder(stored[name], tmp_path / name, "int8", dtype=want)
        assert pick_dtype("auto", tmp_path / name, CPU) == want
    model, tokenizer = load_model(stored["bfloat16"], torch.bfloat16)
    add_adapters(model, LoraConfig(rank=2, alpha=4.0), seed=0, base="bf16")
    save_adapter(model, LoraConfig(rank=2, alpha=4.0), tmp_path / "adapter", base=stored["bfloat16"], base_dtype="bf16")
    assert pick_dtype("auto", tmp_path / "adapter", CPU) == "bf16"
    model, tokenizer = load_model(stored["bfloat16"], torch.bfloat16)
    save_reward(RewardModel(model, REWARD_WEIGHTS["nemotron4-340b"]), tokenizer, tmp_path / "reward")
    assert load_scorer(tmp_path / "reward", device="cpu").model.backbone.compute_dtype == torch.bfloat16


@pytest.mark.parametrize(("fast", "more"), [("fp32", ""), ("bf16", "; bf16 is faster on this device")])
def test_it_is_said_once(
    stored: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fast: str, more: str
) -> None:
    monkeypatch.setattr(dtypes, "pick_precision", lambda device: fast)
    dtypes._say.cache_clear()
    for _ in range(2):
        pick_dtype("auto", stored["float32"], CPU)
        pick_dtype("bf16", stored["float32"], CPU)
    assert capsys.readouterr().err == f"{stored['float32']} is stored in float32 and computes in fp32 (dtype auto{more}).\n"


def test_a_folder_without_a_model_is_refused_as_by_the_loader(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Give a folder with a Hugging Face model"):
        pick_dtype("auto", tmp_path, CPU)
