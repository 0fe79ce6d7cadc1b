"""A server with adapters: each by its own name, loaded and unloaded while it runs where that is allowed, and only from its folder."""

import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gristmill.core.errors import InputError
from gristmill.engine.load import EngineArgs, load_engine
from gristmill.model.adapters import merge_folder, save_adapter
from gristmill.model.hf import load_model
from gristmill.model.lora import LoraConfig, add_adapters
from gristmill.server.adapters import RUNTIME_VARIABLE, LoraArgs
from gristmill.server.serve import ServerArgs, serve


def make_adapter(base: Path, folder: Path, seed: int, rank: int = 4, **config: Any) -> Path:
    model, _ = load_model(base)
    lora = LoraConfig(rank=rank, alpha=8.0, **config)
    add_adapters(model, lora, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.2, generator=generator)
    save_adapter(model, lora, folder, base=base, base_dtype="fp32")
    return folder


@pytest.fixture(scope="module")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "two")):
        make_adapter(tiny_base, folder / name, seed)
    make_adapter(tiny_base, folder / "dora", 3, dora=True)
    make_adapter(tiny_base, folder / "large", 4, rank=8)
    other = tmp_path_factory.mktemp("other") / "base"
    merge_folder(folder / "two", other)
    make_adapter(other, folder / "foreign", 5)
    return folder


@pytest.fixture(scope="module")
def url(tiny_base: Path, adapters: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "gristmill.cli", "serve", str(tiny_base), "--port", "0", "--name", "tiny", "--enable-lora"]
    command += ["--lora-modules", f"one={adapters / 'one'}", "--lora-folder", str(adapters), "--max-lora-rank", "4"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {RUNTIME_VARIABLE: "True"})
    assert process.stdout is not None
    yield process.stdout.readline().split()[-1]
    process.terminate()
    assert process.wait(20) == 0


def call(url: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}{path}", data), timeout=30) as reply:
            raw = reply.read()
            return reply.status, json.loads(raw) if reply.headers.get_content_type() == "application/json" else raw.decode()
    except urllib.error.HTTPError as e:
        return e.code, json.loads(e.read())["error"]["message"]


def scored(url: str, model: str) -> tuple[list[float], str]:
    body = {"model": model, "prompt": "Name a land.", "max_tokens": 2, "temperature": 0, "logprobs": 1, "echo": True}
    status, reply = call(url, "/completions", body)
    assert status == 200, reply
    return reply["choices"][0]["logprobs"]["token_logprobs"][1:], reply["model"]


def test_adapters_answer_by_their_names_and_come_and_go(url: str, adapters: Path, tiny_base: Path) -> None:
    _, models = call(url, "/models")
    assert [(m["id"], m.get("parent")) for m in models["data"]] == [("tiny", None), ("one", "tiny")]
    assert call(url, "/completions", {"model": "two", "prompt": "x"})[0] == 404
    status, text = call(url, "/load_lora_adapter", {"lora_name": "two", "lora_path": "two"})
    assert (status, text) == (200, "Success: LoRA adapter 'two' added successfully.")
    assert [m["id"] for m in call(url, "/models")[1]["data"]] == ["tiny", "one", "two"]
    found = {name: scored(url, name) for name in ("tiny", "one", "two")}
    assert [found[name][1] for name in found] == list(found)
    for name, folder in (("tiny", tiny_base), ("one", adapters / "one"), ("two", adapters / "two")):
        engine = load_engine(folder)
        given, _ = engine.prompt_logprobs(engine.tokenizer.encode("Name a land."), 1)
        assert torch.allclose(torch.tensor(found[name][0][: len(given)]), torch.tensor(given), atol=1e-3)
    assert len({tuple(values) for values, _ in found.values()}) == 3
    chat = {"messages": [{"role": "user", "content": "Name a land."}], "model": "one", "max_tokens": 4}
    assert call(url, "/chat/completions", chat)[1]["model"] == "one"
    status, text = call(url, "/unload_lora_adapter", {"lora_name": "two"})
    assert (status, text) == (200, "Success: LoRA adapter 'two' removed successfully.")
    status, message = call(url, "/completions", {"model": "two", "prompt": "x"})
    assert status == 404 and "this server has 'tiny', adapters 'one'" in message


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("load", {"lora_name": "x", "lora_path": "../base"}, 400, "leads out of the folder"),
        ("load", {"lora_name": "x", "lora_path": "/etc"}, 400, "leads out of the folder"),
        ("load", {"lora_name": "x", "lora_path": "a\0b"}, 400, "leads out of the folder"),
        ("load", {"lora_name": "x", "lora_path": "nobody"}, 400, "DIR/nobody holds none"),
        ("load", {"lora_name": "x", "lora_path": "dora"}, 400, "Merge the adapter 'x'"),
        ("load", {"lora_name": "x", "lora_path": "large"}, 400, "Raise --max-lora-rank, now 4"),
        ("load", {"lora_name": "x", "lora_path": "foreign"}, 400, "the model is another model"),
        ("load", {"lora_name": "one", "lora_path": "one"}, 400, "loaded already"),
        ("load", {"lora_name": "tiny", "lora_path": "one"}, 400, "loaded already"),
        ("load", {"lora_name": "", "lora_path": "one"}, 400, "lora_name"),
        ("load", {"lora_name": "x"}, 400, "lora_path"),
        ("load", {"lora_name": "x", "lora_path": "one", "load_inplace": True}, 400, "unknown field"),
        ("unload", {"lora_name": "nobody"}, 404, "no LoRA adapter 'nobody'"),
    ],
)
def test_what_is_not_loaded_has_a_reason(url: str, path: str, body: dict[str, Any], status: int, words: str) -> None:
    found, message = call(url, f"/{path}_lora_adapter", body)
    assert found == status and words in message
    assert "/tmp" not in message and "pytest" not in message  # nothing of the disk


def test_a_link_out_of_the_folder_is_not_followed(url: str, adapters: Path, tmp_path: Path) -> None:
    shutil.copytree(adapters / "two", tmp_path / "outside")
    (adapters / "link").symlink_to(tmp_path / "outside")
    assert "leads out" in call(url, "/load_lora_adapter", {"lora_name": "x", "lora_path": "link"})[1]


def test_without_the_variable_requests_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, may in (("True", True), ("1", True), ("", False), ("False", False), ("no", False)):
        monkeypatch.setenv(RUNTIME_VARIABLE, value)
        assert LoraArgs(enable=True).may_change is may
        assert not LoraArgs().may_change


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"modules": ("a=b",)}, "Give --enable-lora"),
        ({"enable": True, "max_loras": 0}, "at least 1"),
        ({"enable": True, "folder": Path("/nowhere")}, "there is none at /nowhere"),
        ({"enable": True, "modules": ("one",)}, "as NAME=PATH: 'one'"),
        ({"enable": True, "modules": ("one=/nowhere",)}, "/nowhere holds none"),
    ],
)
def test_a_wrong_start_is_one_sentence(lora: dict[str, Any], said: str, tiny_base: Path) -> None:
    with pytest.raises(InputError, match=said):
        serve(tiny_base, ServerArgs(lora=LoraArgs(**lora)), EngineArgs())
