"""Training on several processes gives what one process gives: gradients, checkpoints, weights."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gristmill.core.errors import InputError
from gristmill.parallel.mesh import Mesh, process_mesh
from gristmill.train.checkpoint import fingerprint_model

WORKER = Path(__file__).parent / "worker.py"


def start(size: int, job: str, out: Path, **options: Any) -> list[subprocess.Popen[str]]:
    """The processes of a job of worker.py, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(WORKER), job, str(out), json.dumps(options)]
    common = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
    return [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for env in ranks]


def run(size: int, job: str, out: Path, **options: Any) -> Path:
    processes = start(size, job, out, **options)
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * size, "\n".join(errors)
    return out


def test_one_process_is_the_identity() -> None:
    mesh = Mesh()
    assert (mesh.size, mesh.rank, mesh.is_writer) == (1, 0, True)
    assert mesh.gather({"a": 1}) == [{"a": 1}] and mesh.first(2) == 2
    mesh.agree("x", "nothing")
    with process_mesh(torch.device("cpu")) as alone:
        assert alone.size == 1


def test_half_of_torchruns_variables_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match=r"RANK.*torchrun"), process_mesh(torch.device("cpu")):
        pass


def test_the_gpu_of_another_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="a GPU of its own"), process_mesh(torch.device("cuda:0")):
        pass


# What each mesh of a number of processes is made of; the rest shares out the samples. Some have only the cases of these names.
MESHES: dict[int, list[dict[str, Any]]] = {
    1: [{}, {"plain": True}],
    2: [{"only": "tied"}, {"tp": 2, "plain": True, "small": True}, {"cp": 2}, {"pp": 2}],
    4: [
        {"only": "few"},
        {"tp": 4},
        {"tp": 2, "small": True},
        {"pp": 2, "vp": 2, "only": "deep"},
        {"pp": 2, "tp": 2, "only": "deep tied"},
        {"pp": 2, "cp": 2, "only": "deep r"},
        {"cp": 2, "tp": 2, "only": "deep r"},
        {"cp": 2, "only": "deep r"},
    ],
}


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Gradients in all meshes of so many processes, which are started once."""
    folder = tmp_path_factory.mktemp("gradients")
    return {size: run(size, "gradients", folder / str(size), meshes=meshes) for size, meshes in MESHES.items()}


def farthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Largest difference in the largest number of its tensor, and the tensor's name."""
    far = {name: float((other[name] - x).abs().max()) / max(float(x.abs().max()), 1e-12) for name, x in one.items() if name in other}
    cases = {name.rsplit(" ", 1)[0] for name in other}
    assert {name for name in one if name.rsplit(" ", 1)[0] in cases} == far.keys() and len(far) > 10
    name = max(far, key=far.__getitem__)
    return far[name], name


@pytest.mark.parametrize(("size", "options"), [(size, options) for size in (2, 4) for options in MESHES[size]])
def test_gradients_of_every_parameter(gradients: dict[int, Path], size: int, options: dict[str, Any]) -> None:
    """Of all objectives, with loss and norm; shares are unequal, and of four processes one has nothing in the step of three samples.

    With tp 4 two processes share a key-value head, and nothing divides the 50 tokens of one vocabulary.
    """
    alone = load_file(gradients[1] / json.dumps({"plain": True} if options.get("plain") else {}))
    together = load_file(gradients[size] / json.dumps(options))
    exact = [together.pop(name) for name in list(together) if name.endswith(" far")]
    far, name = farthest(alone, together)
    assert far <= 2e-6, name
    if size == options.get("pp"):  # the same micro-batches in one process, one after another
        assert exact and all(not differences.any() for differences in exact)


def test_initial_weights_are_the_same_in_every_mesh(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("worker", WORKER)
    assert spec is not None and spec.loader is not None
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    assert run(2, "initial", tmp_path / "name", dims={"tp": 2}).read_text() == fingerprint_model(worker.make_model())


def test_a_run_goes_on_in_another_mesh(tmp_path: Path) -> None:
    """From one process to four with other layers and parts of matrices, to two with other tokens, and back to one.

    Two do not divide the vocabulary, so that one process writes the checkpoints of the four, and all write those of the two.
    """
    ramp = {"batch_size": [[0, 3], [6, 6]], "vocab": 51, "family": "llama"}
    whole = load_file(run(1, "train", tmp_path / "whole.safetensors", folder=str(tmp_path / "a"), **ramp))
    for size, dims, stop in ((1, {}, 2), (4, {"pp": 2, "tp": 2}, 5), (2, {"cp": 2}, 7)):
        run(size, "train", tmp_path / "part.safetensors", folder=str(tmp_path / "b"), stop=stop, dims=dims, **ramp)
    last = load_file(run(1, "train", tmp_path / "last.safetensors", folder=str(tmp_path / "b"), **ramp))
    losses = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in "ab"]
    assert [row["step"] for row in losses[0]] == [row["step"] for row in losses[1]] == list(range(1, 9))
    for one, other in zip(*losses, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5) and other["tokens"] == one["tokens"]
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    for name, tensor in whole.items():
        torch.testing.assert_close(last[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_killed_process_costs_no_step(tmp_path: Path) -> None:
    dims = {"pp": 2}
    unbroken = run(2, "train", tmp_path / "unbroken", folder=str(tmp_path / "a"), dims=dims).read_bytes()
    for kill in (2, 5):
        processes = start(2, "train", tmp_path / "broken", folder=str(tmp_path / "b"), kill=kill, dims=dims)
        for process in processes:
            process.communicate(timeout=300)  # the other one does not wait for it
        assert processes[1].returncode == -signal.SIGKILL and processes[0].returncode not in (0, 3)
    assert not list((tmp_path / "b").glob("checkpoint-*/state.safetensors"))  # both write what they have
    assert run(2, "train", tmp_path / "broken", folder=str(tmp_path / "b"), dims=dims).read_bytes() == unbroken
    steps = [json.loads(line)["step"] for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))


def test_muon_in_bf16(tmp_path: Path) -> None:
    losses = []
    for size, tp in ((1, 1), (2, 1), (2, 2)):
        folder = tmp_path / f"{size} {tp}"
        run(size, "train", tmp_path / "out", folder=str(folder), optimizer="muon", precision="bf16", dims={"tp": tp})
        losses.append([json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()])
    # Newton-Schulz and the model compute in bf16: eight steps lower the loss by fifty times as much as this
    assert losses[1] == pytest.approx(losses[0], rel=2e-3) and losses[2] == pytest.approx(losses[0], rel=2e-3)


@pytest.mark.parametrize(("job", "said"), [("nan", "the loss is nan"), ("other", "different starting weights")])
def test_a_fault_of_one_process_ends_all(tmp_path: Path, job: str, said: str) -> None:
    processes = start(2, job, tmp_path / "out")
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [3, 3], errors
    assert all(said in error for error in errors)
