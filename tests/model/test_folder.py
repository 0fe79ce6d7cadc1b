"""What people give in place of a model folder is refused with what to do."""

from pathlib import Path

import pytest

from gristmill.core.errors import InputError
from gristmill.model.folder import folder_stamps, model_file
from gristmill.model.hf_config import read_config


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("file.gguf", "GGUF is not read. Fetch the checkpoint"),
        ("file.bin", "GGUF is not read"),  # by its first bytes
        ("ggufs", "GGUF is not read"),
        ("gone/model.gguf", "GGUF is not read"),
        ("config.json", "not one of its files"),
        ("Some-Org/Some_Model-1.5B", "hf download Some-Org/Some_Model-1.5B --local-dir Some_Model-1.5B"),
        ("stage", "that of .*stage is .*stage/model"),  # as `train` and `run` leave it
        ("nowhere", "nowhere/config.json does not exist"),
        ("a/b/c/d", "d/config.json does not exist"),
        ("a\0b", "does not exist"),
    ],
)
def test_other_forms_of_models(given: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ggufs").mkdir()
    for name in ("file.gguf", "file.bin", "ggufs/q8_0.gguf"):
        (tmp_path / name).write_bytes(b"GGUF\3\0\0\0")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "stage" / "model").mkdir(parents=True)
    (tmp_path / "stage" / "model" / "config.json").write_text("{}")
    for path in (Path(given), tmp_path / given):  # as on the command line, and as in a recipe
        with pytest.raises(InputError, match=said):
            read_config(path)


def test_pickled_weights_are_named(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    (tmp_path / "config.json").write_text("{}")
    assert model_file(tmp_path, "config.json") == tmp_path / "config.json"
    with pytest.raises(InputError, match="as safetensors first"):
        model_file(tmp_path, "model.safetensors")


def test_stamps_of_a_folder_tell_a_trained_adapter_from_the_one_before(tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors", "notes.txt"):
        (tmp_path / name).write_text("before")
    before = folder_stamps(tmp_path)
    assert before.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    (tmp_path / "adapter_model.safetensors").write_text("now")
    assert folder_stamps(tmp_path)["adapter_model.safetensors"] != before["adapter_model.safetensors"]
