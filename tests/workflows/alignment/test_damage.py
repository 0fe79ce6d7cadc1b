"""A finished run with damaged files: the same command makes them again and ends with the same results; looking at it is one sentence."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from gristmill.cli.main import app
from gristmill.core.errors import InputError

Damage = Callable[[Path], object]


def put(name: str, data: bytes) -> Damage:
    return lambda folder: next(folder.glob(name)).write_bytes(data)


def cut(name: str, size: int) -> Damage:
    return lambda folder: os.truncate(next(folder.glob(name)), size)


def gone(name: str) -> Damage:
    def remove(folder: Path) -> None:
        for path in list(folder.glob(name)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def flip(name: str) -> Damage:
    def turn(folder: Path) -> None:
        path = next(folder.glob(name))
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 255
        path.write_bytes(data)

    return turn


TOGETHER: dict[str, list[Damage]] = {
    "artifacts": [
        put("00-data/demonstrations.parquet", b""),
        cut("05-*/prompts.parquet", 300),
        flip("06-*/kept.parquet"),
        gone("06-*/responses.parquet"),
        cut("08-*/model/model.safetensors", 1000),
        flip("10-*/outcomes.json"),
        gone("12-*/model"),
    ],
    "markers": [
        put("00-data/done.json", b""),
        cut("01-*/done.json", 40),
        put("02-*/done.json", b"[]"),
        put("03-*/done.json", b'{"fingerprint": 3, "seconds": "x"}'),
        put("05-*/done.json", b"[" * 100_000),
        lambda folder: next(folder.glob("06-*/done.json")).write_text(next(folder.glob("07-*/done.json")).read_text().replace("s", "S", 1)),
        put("recipe.yaml", b"\x00\xff"),
        cut("results.json", 50),
    ],
    "training": [
        lambda folder: [os.truncate(path, 30) for path in folder.rglob("state.json")],
        put("12-*/train/metrics.jsonl", b"\xff\x00{"),
        gone("1*/done.json"),
        gone("10-*/model"),
        lambda folder: next(folder.glob("06-*/calls.jsonl")).write_bytes(os.urandom(3000)),
        gone("06-*/done.json"),
        lambda folder: (folder / "06-r1-answers" / ".kept.parquet.77.tmp").touch(),
    ],
}


def made(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob("*/model/*"))}
    for path in sorted(folder.glob("*/*.parquet")):
        found[str(path.relative_to(folder))] = pq.read_table(path).to_pylist()
    results = json.loads((folder / "results.json").read_text())
    return found | {"results": {key: results[key] for key in ("stages", "reward", "collapse", "alignment_samples")}}


@pytest.mark.parametrize("kind", TOGETHER)
def test_what_is_damaged_is_made_again(
    kind: str, copy: Path, finished: Path, make_recipe: Any, run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for damage in TOGETHER[kind]:
        damage(copy)
    for command in ("status", "report", "compare"):
        shown = CliRunner().invoke(app, [command, str(copy)])
        assert shown.exit_code in (0, 2) and isinstance(shown.exception, SystemExit | None), (command, shown.exception)
    run(make_recipe(), copy)
    assert made(copy) == made(finished)
    assert "damaged" in capsys.readouterr().err, "and said so"
    assert not list(copy.rglob(".*.tmp"))


IN_THE_WAY: list[Damage] = [
    lambda folder: [gone("06-*")(folder), (folder / "06-r1-answers").touch()],
    lambda folder: [gone("06-*/done.json")(folder), (folder / "06-r1-answers" / "done.json").mkdir()],
    lambda folder: [gone("06-*/done.json")(folder), os.mkfifo(folder / "06-r1-answers" / "done.json")],
    lambda folder: [gone("06-*/kept.parquet")(folder), (folder / "06-r1-answers" / "kept.parquet").mkdir()],
    lambda folder: [gone("06-*/*.j*")(folder), (folder / "06-r1-answers" / "calls.jsonl").mkdir()],
    lambda folder: [gone("06-*/*.j*")(folder), os.mkfifo(folder / "06-r1-answers" / "calls.jsonl")],
    lambda folder: [gone(".lock")(folder), (folder / ".lock").mkdir()],
    lambda folder: [gone("recipe.yaml")(folder), (folder / "recipe.yaml").mkdir()],
]


@pytest.mark.parametrize("number", range(len(IN_THE_WAY)))
def test_what_stands_in_the_way_is_one_sentence(number: int, copy: Path, make_recipe: Any, run: Any) -> None:
    IN_THE_WAY[number](copy)
    with pytest.raises(InputError) as caught:
        run(make_recipe(), copy)
    assert "\n" not in str(caught.value) and str(copy) in str(caught.value)


@pytest.mark.parametrize(
    "text", ['{"stages": 3}', '{"stages": [1], "name": []}', '{"a"', "[]", '{"stages": [{"name": "x", "greedy": {}}]}']
)
def test_results_of_another_form_are_one_sentence(copy: Path, text: str) -> None:
    (copy / "results.json").write_text(text)
    for command in ("status", "report", "compare"):
        shown = CliRunner().invoke(app, [command, str(copy)])
        assert shown.exit_code in (0, 2) and isinstance(shown.exception, SystemExit | None), (command, shown.exception)
