"""Training on several processes gives what one process gives: gradients, checkpoints, weights.

GRISTMILL_TEST_KILLS=N kills a process at N random moments, and at 2 N while a checkpoint is written, in each of some meshes: minutes.
"""

import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gristmill.core.errors import InputError
from gristmill.model.config import ModelConfig, uniform_blocks
from gristmill.parallel.hardware import HARDWARE
from gristmill.parallel.layout import Layout
from gristmill.parallel.lora_plan import LoraPlan
from gristmill.parallel.memory import memory
from gristmill.parallel.mesh import Mesh, process_mesh
from gristmill.train.checkpoint import fingerprint_model

WORKER = Path(__file__).parent / "worker.py"
KILLS = int(os.environ.get("GRISTMILL_TEST_KILLS", "0"))


def start(*jobs: tuple[int, str, Path, dict[str, Any]]) -> list[dict[str, Any]]:
    """What became of jobs of worker.py, one after another."""
    command = [sys.executable, str(WORKER), json.dumps([(size, job, str(out), options) for size, job, out, options in jobs])]
    ran = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=3600)
    assert ran.returncode == 0, ran.stderr
    found: list[dict[str, Any]] = json.loads(ran.stdout)
    return found


def run(*jobs: tuple[int, str, Path, dict[str, Any]]) -> None:
    """Jobs of worker.py that all succeed."""
    for (size, *_), ended in zip(jobs, start(*jobs), strict=True):
        assert ended["codes"] == [0] * size, "\n".join(ended["said"])


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
    2: [
        {"only": "tied"},
        {"only": "deep", "replicated": True},
        {"only": "lora"},
        {"tp": 2, "plain": True, "small": True},
        {"cp": 2},
        {"pp": 2},
        {"pp": 2, "vp": 2, "schedule": "zbv", "only": "deep"},
        {"pp": 2, "vp": 2, "schedule": "zero-bubble", "only": "deep r"},
    ],
    4: [
        {"only": "few"},
        {"only": "few", "replicated": True},
        {"tp": 4},
        {"tp": 2, "small": True},
        {"pp": 2, "vp": 2, "only": "deep"},
        {"pp": 2, "tp": 2, "only": "deep tied"},
        {"pp": 2, "vp": 2, "tp": 2, "schedule": "zbv", "only": "deep r"},
        {"pp": 2, "vp": 2, "schedule": "zbv", "only": "deep tied"},
        {"pp": 2, "cp": 2, "only": "deep r"},
        {"cp": 2, "tp": 2, "only": "deep r"},
        {"cp": 2, "only": "deep r"},
        {"pp": 2, "tp": 2, "only": "lora deep"},
        {"cp": 2, "tp": 2, "only": "lora deep"},
    ],
}


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Gradients in all meshes of so many processes, which are started once."""
    folder = tmp_path_factory.mktemp("gradients")
    run(*((size, "gradients", folder / str(size), {"meshes": meshes}) for size, meshes in MESHES.items()))
    return {size: folder / str(size) for size in MESHES}


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
    # in fp32 one process, too, is up to 2e-6 from the gradients of this one in fp64 (docs/scale.md)
    dora = {name: x for name, x in together.items() if name.startswith("lora deep reward")}
    for found, limit in (({name: x for name, x in together.items() if name not in dora}, 2e-6), (dora, 4e-6)):
        far, name = farthest(alone, found) if found else (0.0, "")
        assert far <= limit, name
    if size == options.get("pp"):  # the same micro-batches in one process, one after another
        assert exact and all(not differences.any() for differences in exact)


def test_initial_weights_are_the_same_in_every_mesh(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("worker", WORKER)
    assert spec is not None and spec.loader is not None
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    run((2, "initial", tmp_path / "name", {"dims": {"tp": 2}}))
    assert (tmp_path / "name").read_text() == fingerprint_model(worker.make_model())


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_goes_on_in_another_mesh(tmp_path: Path, lora: bool) -> None:
    """From one process to four with other layers and parts of matrices, to two with layers as on a V, two with other tokens, two with other
    samples, and back to one.

    Two do not divide the vocabulary, so that one process writes the checkpoints of the four, and all write those of the two; an
    adapter's are written by one.
    """
    options = {"batch_size": [[0, 3], [6, 6]], "vocab": 51, "layers": 4, "family": "llama", "lora": lora, "replicated": True}
    zbv = {"pp": 2, "vp": 2, "schedule": "zbv"}
    meshes: list[tuple[int, dict[str, Any], int]] = [
        (1, {}, 2),
        (4, {"pp": 2, "tp": 2}, 4),
        (2, zbv, 5),
        (2, {"cp": 2}, 6),
        (2, {}, 7),
        (1, {}, 0),
    ]
    whole, last = tmp_path / "whole.safetensors", tmp_path / "last.safetensors"
    run(
        (1, "train", whole, options | {"folder": str(tmp_path / "a")}),
        *(
            (size, "train", last, options | {"folder": str(tmp_path / "b"), "stop": stop, "dims": dims, "replicated": True})
            for size, dims, stop in meshes
        ),
    )
    losses = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in "ab"]
    assert [row["step"] for row in losses[0]] == [row["step"] for row in losses[1]] == list(range(1, 9))
    for one, other in zip(*losses, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5) and other["tokens"] == one["tokens"]
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    weights = load_file(last)
    for name, tensor in load_file(whole).items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4)


FAULTS: list[dict[str, Any]] = [  # each in a start of its own; steps count from there
    {"rank": 0, "moment": "step", "step": 1},
    {"rank": 1, "moment": "stop", "step": 2},
    {"rank": 1, "moment": "writing", "step": 2},
    {"rank": 0, "moment": "written", "step": 2},
    {"rank": 0, "moment": "renamed", "step": 3},
    {"rank": 1, "moment": "step", "step": 1},
]


def test_a_killed_or_stopped_process_costs_no_step(tmp_path: Path) -> None:
    """Of either process, in a step, while the checkpoint is written, and between its files; the others say so and end."""
    folder, options = str(tmp_path / "b"), {"dims": {"pp": 2}}
    one, other = tmp_path / "unbroken", tmp_path / "broken"
    faults = [(2, "train", other, options | {"folder": folder, "fault": fault}) for fault in FAULTS]
    unbroken, *broken, last = start(
        (2, "train", one, options | {"folder": str(tmp_path / "a")}), *faults, (2, "train", other, options | {"folder": folder})
    )
    assert unbroken["codes"] == last["codes"] == [0, 0], (unbroken, last)
    for fault, ended in zip(FAULTS, broken, strict=True):
        assert ended["codes"][fault["rank"]] == -signal.SIGKILL and ended["codes"][1 - fault["rank"]] == 3, ended
        said = "has not answered" if fault["moment"] == "stop" else "has ended, and says why unless it was killed"
        assert said in ended["said"][1 - fault["rank"]]
        assert fault["moment"] != "renamed" or ended["whole"]
    assert one.read_bytes() == other.read_bytes()
    steps = [json.loads(line)["step"] for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))


KILLED: list[tuple[dict[str, Any], bool]] = [({"replicated": True}, True)]
if KILLS:
    KILLED += [({"dims": {"pp": 2}}, True), ({"replicated": True}, False)]
    KILLED += [(mesh, saving) for mesh in ({}, {"dims": {"tp": 2}}) for saving in (False, True)]


@pytest.mark.parametrize(("options", "saving"), KILLED)
def test_kill_at_random_moments(tmp_path: Path, options: dict[str, Any], saving: bool) -> None:
    """The next start goes on from the last whole checkpoint, and the end is that of the unbroken run: weights, losses, each step once."""
    num_kills, draw = (KILLS or 1) * (1 + saving), random.Random(KILLS)
    num_steps = 2 * num_kills + 6
    folders, outs = [tmp_path / "a", tmp_path / "b"], [tmp_path / "unbroken", tmp_path / "broken"]
    jobs: list[tuple[int, str, Path, dict[str, Any]]] = [
        (2, "train", out, options | {"folder": str(folder), "steps": num_steps, "checkpoint_every": 1e-9 if saving else 0.1})
        for out, folder in zip(outs, folders, strict=True)
    ]
    unbroken, again = start(jobs[0], jobs[0])
    step = (unbroken["seconds"] - again["seconds"]) / num_steps
    faults: list[dict[str, Any]] = []
    for number in range(num_kills):  # every fourth while the processes start
        place = {"logged": 2 * number + draw.randrange(1, 4), "after": draw.uniform(0, step), "saving": saving}
        early = {"after": draw.uniform(0, again["seconds"])}
        faults.append({"rank": draw.randrange(2)} | (early if number % 4 == 3 and not saving else place))
    *broken, last = start(*((*jobs[1][:3], jobs[1][3] | {"fault": fault}) for fault in faults), jobs[1])
    assert unbroken["codes"] == last["codes"] == [0, 0], (unbroken, last)
    whole: list[str] = []
    for ended, fault in zip([*broken, last], [*faults, {}], strict=True):
        said = "".join(ended["said"])
        assert not fault or ended["codes"][fault["rank"]] == -signal.SIGKILL, ended
        assert "damaged" not in said and (ended["whole"] or not whole), ended
        assert set(re.findall(r"begins after step (\d+)", said)) <= {str(int(whole[-1][-8:])) if whole else "0"}, (ended, whole)
        whole = ended["whole"]
    assert outs[0].read_bytes() == outs[1].read_bytes()
    logs = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in folders]
    steps, other = [[(row["step"], row["loss"], row["grad_norm"], row["tokens"]) for row in log] for log in logs]
    assert steps == other and [step for step, *_ in steps] == list(range(1, num_steps + 1))
    training = sum("begins" in "".join(ended["said"]) for ended in broken)
    print(f"{num_kills} kills, {training} of them in training, {sum(bool(ended['whole']) for ended in broken)} with a whole checkpoint")


def test_a_process_that_is_stopped_between_orders_or_never_connects_is_missed(tmp_path: Path) -> None:
    """The first or another one, and none that is only busy for long."""
    faults = [{"rank": rank, "moment": "stop", "step": 0} for rank in range(2)]
    never: tuple[int, str, Path, dict[str, Any]] = (2, "initial", tmp_path / "never", {"fault": {"rank": 1, "after": 0}})
    *ended, alone = start(*((2, "orders", tmp_path / "out", {"stopped": fault["rank"], "fault": fault}) for fault in faults), never)
    assert (tmp_path / "out").read_text() == "sleep"
    for rank, who in enumerate(["The first process of this run", "Another process of this training"]):
        assert ended[rank]["codes"][1 - rank] == 3 and f"{who} has not answered for" in ended[rank]["said"][1 - rank], ended[rank]
    assert alone["codes"] == [3, -signal.SIGKILL] and "have not found each other" in alone["said"][0], alone


def test_products_in_8_bits_of_parts_of_matrices(tmp_path: Path) -> None:
    run((2, "float8", tmp_path / "found", {"dims": {"tp": 2}}))
    found = json.loads((tmp_path / "found").read_text())
    for facts in found.values():
        assert facts["matrices"] == [0, 5]  # of the middle layer: none in bf16
        assert 0 < facts["errors"][0] < 0.2 and 0 < facts["errors"][1] < 0.2, found


SIZED: list[dict[str, Any]] = [  # layers of 24,576 numbers, beside which norms and heads are small
    {"dims": {"tp": 2, "pp": 2}, "base": "int8", "dora": True, "layers": 4, "ffn": 320},
    {"dims": {"tp": 2}, "base": "bf16", "layers": 2, "ffn": 320},
    {"dims": {"pp": 2}, "layers": 4, "ffn": 320},
    {"dims": {"pp": 2, "vp": 2, "schedule": "zbv"}, "base": "fp32", "layers": 4, "ffn": 320},
]


def test_planned_bytes_of_tensors_are_what_processes_hold(tmp_path: Path) -> None:
    """Of weights, gradients and optimizer states, whole models and adapters, within 1 %."""
    run((4, "sizes", tmp_path / "found", {"cases": SIZED}))
    for case, found in zip(SIZED, json.loads((tmp_path / "found").read_text()), strict=True):
        lora = LoraPlan(rank=3, base=case["base"], dora=case.get("dora", False)) if "base" in case else None
        dims = {"tp": 1, "pp": 1} | case["dims"]
        dp = 4 // (dims["tp"] * dims["pp"])
        layout = Layout(**dims, dp=dp, batch_size=8 * dp, seq_len=40, precision="fp32", lora=lora)
        config = ModelConfig("nemotron", 48, 32, uniform_blocks(case["layers"], 4, 2, 8, case["ffn"]), max_positions=256)
        ranks = memory(config, layout, HARDWARE["h100"])
        shards = 1 if lora else dp  # between steps FSDP2 keeps parts alone
        for rank, name in ((0, "first"), (3, "last" if dims["pp"] > 1 else "first")):
            planned = ranks[name]
            assert found[rank][0] == pytest.approx(planned.weights / shards, rel=0.01), (case, name)
            assert found[rank][1] == pytest.approx(planned.gradients / shards, rel=0.01), (case, name)
            assert found[rank][2] == pytest.approx(planned.optimizer, rel=0.01), (case, name)


def test_muon_gives_each_matrix_the_bits_of_one_process(tmp_path: Path) -> None:
    """In two steps from given gradients, with two exchanges each, of weights in parts over samples, rows, columns and layers."""
    run((4, "muon", tmp_path / "said", {}))
    assert (tmp_path / "said").read_text() == "equal"


@pytest.mark.parametrize(("job", "said"), [("nan", "the loss is nan"), ("other", "different starting weights")])
def test_a_fault_of_one_process_ends_all(tmp_path: Path, job: str, said: str) -> None:
    (ended,) = start((2, job, tmp_path / "out", {}))
    assert ended["codes"] == [3, 3], ended
    assert all(said in words for words in ended["said"])
