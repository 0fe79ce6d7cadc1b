"""Tasks by every executor, and what becomes of them when a worker is killed."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from gristmill.core.errors import InputError
from gristmill.core.progress import Progress
from gristmill.runs import executor
from gristmill.runs.executor import InProcess, Processes, Task


def square(number: int, out: Path) -> dict[str, Any]:
    with out.open("a") as file:
        file.write("done\n")
    return {"square": number * number, "pid": os.getpid()}


def kill_once(number: int, folder: Path) -> dict[str, Any]:
    """The first to come here kills its process in the middle."""
    try:
        (folder / "killed").touch(exist_ok=False)
    except FileExistsError:
        time.sleep(0.01)
        return {"number": number}
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def kill_always() -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def refuse() -> dict[str, Any]:
    raise InputError("not this one")


def squares(folder: Path) -> list[Task]:
    return [Task(square, (i, folder / f"{i}.txt"), folder / f"{i}.json") for i in range(8)]


@pytest.mark.parametrize("make", [InProcess, lambda: Processes(2)])
def test_each_task_is_done_once(tmp_path: Path, make: Any) -> None:
    for _ in range(2):
        one = make()
        found = dict(one.run(squares(tmp_path)))
        one.close()
        assert {place: facts["square"] for place, facts in found.items()} == {i: i * i for i in range(8)}
    assert all((tmp_path / f"{i}.txt").read_text() == "done\n" for i in range(8)), "the second time only markers are read"


def hold(num_bytes: int) -> dict[str, Any]:
    time.sleep(0.05)
    return {"held": len(b"x" * num_bytes)}


def test_a_task_tells_its_time_and_memory_also_when_it_was_done_before(tmp_path: Path) -> None:
    pool = Processes(1)
    tasks = [Task(hold, (1 << 28,), tmp_path / "0.json")]
    ((_, first),) = pool.run(tasks)
    pool.close()
    assert first["held"] == 1 << 28 and first["seconds"] >= 0.05 and first["peak_mib"] > 256
    assert executor.run_tasks(InProcess(), tasks, Progress(quiet=True), "again") == [first]


def test_a_killed_worker_costs_nothing(tmp_path: Path) -> None:
    pool = Processes(2)
    tasks = [Task(kill_once, (i, tmp_path), tmp_path / f"{i}.json") for i in range(6)]
    assert sorted(facts["number"] for _, facts in pool.run(tasks)) == list(range(6))
    pool.close()


def test_what_always_kills_is_given_up(tmp_path: Path) -> None:
    pool = Processes(1)
    with pytest.raises(InputError, match="killed again and again"):
        list(pool.run([Task(kill_always, (), tmp_path / "0.json")]))
    pool.close()


def test_bad_input_in_a_worker_is_told(tmp_path: Path) -> None:
    pool = Processes(1)
    with pytest.raises(InputError, match="not this one"):
        list(pool.run([Task(refuse, (), tmp_path / "0.json")]))
    pool.close()


def test_ray_does_the_same(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    cluster = executor.make("ray", 2)
    try:
        found = dict(cluster.run(squares(tmp_path)))
        tasks = [Task(kill_once, (i, tmp_path), tmp_path / f"k{i}.json") for i in range(6)]
        assert sorted(facts["number"] for _, facts in cluster.run(tasks)) == list(range(6))
        with pytest.raises(InputError, match="not this one"):
            list(cluster.run([Task(refuse, (), tmp_path / "refused.json")]))
    finally:
        cluster.close()
    assert {place: facts["square"] for place, facts in found.items()} == {i: i * i for i in range(8)}
