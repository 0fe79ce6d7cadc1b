"""Resume: bit for bit, refused for another run, and never worse off after a kill or a full disk."""

import errno
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gristmill.core.errors import InputError
from gristmill.core.tensors import write_tensors
from gristmill.model.lora import LoraConfig, add_adapters
from gristmill.model.transformer import Transformer
from gristmill.train import checkpoint
from gristmill.train.batches import Sample
from gristmill.train.objectives.next_token import next_token_objective
from gristmill.train.trainer import Trainer, TrainSettings

Make = Callable[..., Transformer]
MakeSamples = Callable[..., list[Sample]]
EVERY_STEP = 1e-9
SETTINGS = TrainSettings(lr=1e-2, epochs=3, batch_size=5, warmup_steps=2, checkpoint_every=EVERY_STEP)


class Killed(Exception):
    pass


def kill_at(step: int) -> Callable[[int, int, dict[str, float]], None]:
    def on_step(now: int, total: int, metrics: dict[str, float]) -> None:
        if now == step:
            raise Killed

    return on_step


def trace(folder: Path) -> list[tuple[int, float, float, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"], line["tokens"]) for line in lines]


@pytest.mark.parametrize(("optimizer", "precision"), [("adamw", "fp32"), ("muon", "bf16")])
def test_resumed_run_is_the_uninterrupted_one(
    make_model: Make, make_samples: MakeSamples, tmp_path: Path, optimizer: str, precision: str
) -> None:
    settings = replace(SETTINGS, optimizer=optimizer, precision=precision)
    samples, held_out = make_samples(13), make_samples(3, seed=5)
    settings = replace(settings, validate_every=2)
    straight = make_model()
    expected = Trainer(straight, next_token_objective, settings, folder=tmp_path / "a").fit(samples, held_out)
    folder = tmp_path / "b"
    for step in (2, 5):  # killed twice, the second time in another epoch
        with pytest.raises(Killed):
            Trainer(make_model(), next_token_objective, settings, folder=folder, on_step=kill_at(step)).fit(samples, held_out)
    resumed = make_model()
    first: list[int] = []
    note = lambda step, total, metrics: first.append(step)  # noqa: E731
    result = Trainer(resumed, next_token_objective, settings, folder=folder, on_step=note).fit(samples, held_out)
    assert first[0] == 5  # step 5 was done but not saved before the kill
    assert trace(folder) == trace(tmp_path / "a")
    for (name, a), b in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert (result.steps, result.tokens, result.best_step) == (
        expected.steps,
        expected.tokens,
        expected.best_step,
    )


@pytest.mark.parametrize(("base", "dora"), [("fp32", False), ("int8", True)])
def test_a_resumed_adapter_is_the_uninterrupted_one_and_its_checkpoints_hold_no_base(
    make_model: Make, make_samples: MakeSamples, tmp_path: Path, base: str, dora: bool
) -> None:
    def make(alpha: float = 8.0) -> Transformer:
        model = make_model()
        add_adapters(model, LoraConfig(rank=4, alpha=alpha, dora=dora), seed=0, base=base)
        return model

    settings, samples = replace(SETTINGS, precision="bf16", b_lr_ratio=4.0), make_samples(13)
    straight, resumed = make(), make()
    Trainer(straight, next_token_objective, settings, folder=tmp_path / "a").fit(samples)
    with pytest.raises(Killed):
        Trainer(make(), next_token_objective, settings, folder=tmp_path / "b", on_step=kill_at(4)).fit(samples)
    store = next((tmp_path / "b").glob("checkpoint-*/state.safetensors"))
    names = {name.split("|")[1] for name in load_file(store) if "|" in name}
    assert names == {name for name, parameter in straight.named_parameters() if parameter.requires_grad}
    Trainer(resumed, next_token_objective, settings, folder=tmp_path / "b").fit(samples)
    assert trace(tmp_path / "a") == trace(tmp_path / "b")
    frozen, changed = make().state_dict(), set()
    for (name, a), b in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
        if not torch.equal(a, frozen[name]):
            changed.add(name)
    assert changed == names  # all that is trained, and nothing else
    with pytest.raises(InputError, match="another starting model"):  # another scaling goes on from no checkpoint
        Trainer(make(alpha=16.0), next_token_objective, settings, folder=tmp_path / "b").fit(samples)


def noisy(model: Transformer, batch: object):  # type: ignore[no-untyped-def]
    output = next_token_objective(model, batch)  # type: ignore[arg-type]
    return replace(output, sum=output.sum * (1 + torch.rand(())))


def test_random_state_is_restored(make_model: Make, make_samples: MakeSamples, tmp_path: Path) -> None:
    samples = make_samples(10)
    straight, resumed, loaded = make_model(), make_model(), make_model(seed=1)
    before = torch.get_rng_state()
    Trainer(straight, noisy, SETTINGS, folder=tmp_path / "a").fit(samples)
    assert torch.equal(before, torch.get_rng_state())  # the caller's generator is left alone
    with pytest.raises(Killed):
        Trainer(make_model(), noisy, SETTINGS, folder=tmp_path / "b", on_step=kill_at(4)).fit(samples)
    Trainer(resumed, noisy, SETTINGS, folder=tmp_path / "b").fit(samples)
    states: list[checkpoint.Checkpoint] = []

    def keep(step: int, total: int, metrics: dict[str, float]) -> None:
        if step == 4:
            states.append(trainer.state())
            raise Killed

    trainer = Trainer(make_model(), noisy, SETTINGS, on_step=keep)
    with pytest.raises(Killed):
        trainer.fit(samples)
    after = Trainer(loaded, noisy, SETTINGS)
    after.load_state(states[0])
    after.fit(samples)
    for other in (resumed, loaded):
        assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), other.parameters(), strict=True))


def test_a_finished_folder_returns_at_once(make_model: Make, make_samples: MakeSamples, tmp_path: Path) -> None:
    trained, again = make_model(), make_model()
    settings = replace(SETTINGS, checkpoint_every=0.0)
    result = Trainer(trained, next_token_objective, settings, folder=tmp_path).fit(make_samples(8))

    def no_step(step: int, total: int, metrics: dict[str, float]) -> None:
        raise AssertionError("a finished run took a step")

    assert Trainer(again, next_token_objective, settings, folder=tmp_path, on_step=no_step).fit(make_samples(8)) == result
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), again.parameters(), strict=True))
    files = sorted(path.name for path in tmp_path.glob("checkpoint*/*"))
    assert files == ["state.json", "state.safetensors"] and len(list(tmp_path.glob("checkpoint*"))) == 1


@pytest.mark.parametrize("finished", [False, True])
def test_another_run_is_refused_with_both_fingerprints(make_model: Make, make_samples: MakeSamples, tmp_path: Path, finished: bool) -> None:
    samples = make_samples(10)
    if finished:
        Trainer(make_model(), next_token_objective, SETTINGS, folder=tmp_path).fit(samples)
    else:
        with pytest.raises(Killed):
            Trainer(make_model(), next_token_objective, SETTINGS, folder=tmp_path, on_step=kill_at(3)).fit(samples)
    state = json.loads(next(tmp_path.glob("checkpoint-*/state.json")).read_text())["identity"]
    others = {
        "starting model": (make_model(seed=1), samples, SETTINGS, "model"),
        "data set": (make_model(), samples[:-1], SETTINGS, "data"),
        "settings": (make_model(), samples, replace(SETTINGS, lr=2e-2), "settings"),
    }
    for noun, (model, data, settings, key) in others.items():
        with pytest.raises(InputError, match=rf"another {noun}|other {noun}") as caught:
            Trainer(model, next_token_objective, settings, folder=tmp_path).fit(data)
        assert state[key] in str(caught.value) and "now " in str(caught.value)
    # how often to save is no part of what is computed
    settings = replace(SETTINGS, checkpoint_every=0.0)
    assert Trainer(make_model(), next_token_objective, settings, folder=tmp_path).fit(samples).steps == 6


def test_a_checkpoint_of_another_order_of_rows_is_refused(make_model: Make, make_samples: MakeSamples, tmp_path: Path) -> None:
    Trainer(make_model(), next_token_objective, SETTINGS, folder=tmp_path).fit(make_samples(10))
    path = next(tmp_path.glob("checkpoint-*/state.json"))
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "layout"}))
    with pytest.raises(InputError, match="an earlier version, whose queries, keys and values lie in another order"):
        Trainer(make_model(), next_token_objective, SETTINGS, folder=tmp_path).fit(make_samples(10))


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("function", ["write_tensors", "write_json"])
def test_a_full_disk_keeps_the_last_checkpoint(make_model: Make, make_samples: MakeSamples, tmp_path: Path, function: str) -> None:
    samples = make_samples(10)
    straight, resumed = make_model(), make_model()
    Trainer(straight, next_token_objective, SETTINGS, folder=tmp_path / "a").fit(samples)

    def fill(step: int, total: int, metrics: dict[str, float]) -> None:
        if step == 3:
            patch.setattr(checkpoint, function, full_disk)

    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(InputError, match="the disk of .* is full; free some"),
    ):
        Trainer(make_model(), next_token_objective, SETTINGS, folder=tmp_path / "b", on_step=fill).fit(samples)
    assert sorted(path.name for path in (tmp_path / "b").glob("checkpoint*")) == ["checkpoint-00000002"]
    Trainer(resumed, next_token_objective, SETTINGS, folder=tmp_path / "b").fit(samples)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_a_kill_while_writing_keeps_the_last_checkpoint(
    make_model: Make, make_samples: MakeSamples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = make_samples(10)
    with pytest.raises(Killed):
        Trainer(make_model(), next_token_objective, SETTINGS, folder=tmp_path, on_step=kill_at(3)).fit(samples)
    torn = tmp_path / "checkpoint.tmp"  # what a kill in the middle of the next write leaves
    torn.mkdir()
    (torn / "state.safetensors").write_bytes(b"\x10\x00")
    assert Trainer(make_model(), next_token_objective, SETTINGS, folder=tmp_path).fit(samples).steps == 6
    assert not torn.exists()


def test_a_checkpoint_is_on_the_disk_before_it_is_the_last_one(
    make_model: Make, make_samples: MakeSamples, tmp_path: Path, disk_log: list[tuple[str, Path, int | Path]]
) -> None:
    Trainer(make_model(), next_token_objective, replace(SETTINGS, checkpoint_every=0.0), folder=tmp_path).fit(make_samples(5))
    temporary, final = tmp_path / "checkpoint.tmp", tmp_path / "checkpoint-00000003"
    placed = disk_log.index(("rename", temporary, final))
    synced = {(path, size) for kind, path, size in disk_log[:placed] if kind == "fsync"}
    renamed = {target: source for kind, source, target in disk_log[:placed] if kind == "rename"}
    for name in ("state.safetensors", "state.json"):
        assert (renamed[temporary / name], (final / name).stat().st_size) in synced
    assert disk_log[placed - 1][:2] == ("fsync", temporary) and disk_log[placed + 1][:2] == ("fsync", tmp_path)


def test_tensors_are_on_the_disk_before_they_have_their_name(tmp_path: Path, disk_log: list[tuple[str, Path, int | Path]]) -> None:
    path = tmp_path / "reference.safetensors"
    write_tensors(path, {"a": torch.ones(3)})
    (kind, temporary, size), renamed, (_, folder, _) = disk_log
    assert (kind, size) == ("fsync", path.stat().st_size) and renamed == ("rename", temporary, path) and folder == tmp_path


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "other", "gone"])
def test_a_damaged_checkpoint_is_passed_over_with_a_word(
    make_model: Make, make_samples: MakeSamples, tmp_path: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = make_samples(10)
    straight, resumed = make_model(), make_model()
    Trainer(straight, next_token_objective, SETTINGS, folder=tmp_path).fit(samples)
    path = next(tmp_path.glob(f"checkpoint-*/{name}"))
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:100] if damage == "cut" else data[:-9] + bytes(9 * [7]))
    Trainer(resumed, next_token_objective, SETTINGS, folder=tmp_path).fit(samples)
    assert "is damaged" in capsys.readouterr().err
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    assert path.read_bytes() == data or name == "state.json", "and it was made again"


@pytest.mark.parametrize("step", [1, 4])
def test_kill_9_and_the_same_command(make_model: Make, make_samples: MakeSamples, tmp_path: Path, step: int) -> None:
    samples = make_samples(10)
    straight, resumed = make_model(), make_model()
    Trainer(straight, next_token_objective, SETTINGS, folder=tmp_path / "a").fit(samples)

    def kill_9(now: int, total: int, metrics: dict[str, float]) -> None:
        if now == step:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        Trainer(make_model(), next_token_objective, SETTINGS, folder=tmp_path / "b", on_step=kill_9).fit(samples)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    Trainer(resumed, next_token_objective, SETTINGS, folder=tmp_path / "b").fit(samples)
    assert trace(tmp_path / "a") == trace(tmp_path / "b")
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
