"""A whole run on two processes of torchrun: one folder, one writer, the rows of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from gristmill.data.chat import Message
from gristmill.generation.api import Request
from gristmill.workflows.ranks import dealt


def start(*arguments: object) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "gristmill", "run"]
    command = [sys.executable, *launcher, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=600)


def rows_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {str(path.relative_to(folder)): pq.read_table(path).to_pylist() for path in sorted(folder.glob("*/*.parquet"))}


def texts(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Ids, prompts, answers and all else that is no number, nor JSON, which may hold some."""
    return [{key: value for key, value in row.items() if isinstance(value, str) and value[:1] not in ("{", "[")} for row in rows]


def test_two_processes_make_the_rows_of_one(tiny_recipe: dict[str, Any], finished: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "two"
    recipe.write_text(yaml.safe_dump({"kind": "alignment", **tiny_recipe}))
    told = start(recipe, "--out", out, "--json", "--quiet")
    assert told.returncode in (0, 4), told.stderr  # 4: with alarms, as of one process
    (line,) = told.stdout.splitlines()  # the other process is silent
    alone, together = rows_of(finished), rows_of(out)
    assert alone.keys() == together.keys() and len(alone) > 10
    for name, rows in alone.items():
        assert texts(together[name]) == texts(rows), name
    results = [json.loads((folder / "results.json").read_text()) for folder in (finished, out)]
    assert json.loads(line)["best"] == results[1]["best"] and results[1]["best"]["model"] == results[0]["best"]["model"]


def test_requests_of_one_prompt_go_to_one_process() -> None:
    requests = [Request(str(n), (Message("user", str(n // 3)),), seed=n) for n in range(21)] + [Request("t", (), prompt_ids=(1, 2))]
    shares = dealt(requests, 3)
    assert sorted(request.id for share in shares for request in share) == sorted(request.id for request in requests)
    assert max(map(len, shares)) - min(map(len, shares)) <= 3
    prompts = [{request.messages for request in share} for share in shares]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 8  # none is in two shares


def test_a_changed_recipe_is_refused_by_one_process_and_ends_both(tiny_recipe: dict[str, Any], copy: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"kind": "alignment", **tiny_recipe, "seed": 1}))
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.name != ".lock"}
    told = start(recipe, "--out", copy, "--quiet")
    assert told.returncode not in (0, 4) and "--redo" in told.stderr
    assert before == {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.name != ".lock"}
