"""Experiment grid of the claims: runs of their own processes, taken up again; the table of what they say."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from gristmill.cli.main import app
from gristmill.core.config import RECIPES
from gristmill.core.errors import InputError
from gristmill.report.claims import CLAIMS, over_seeds, verdict
from gristmill.workflows.claims import VARIANTS, plan


def test_every_claim_has_its_runs_and_every_variant_is_a_recipe(tmp_path: Path) -> None:
    assert {v for claim in CLAIMS for v in claim.variants} == set(VARIANTS)
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)
    runs = plan(RECIPES / "miniature.yaml", tmp_path, list(VARIANTS), [0, 7])
    assert len({run.folder for run in runs}) == 2 * len(VARIANTS)
    recipes = {run.variant: yaml.safe_load(run.recipe.read_text()) for run in runs}
    assert recipes["replace"]["control"] == "replace" and recipes["full"]["control"] is None
    assert recipes["mixed-sft"]["judging"] == recipes["full"]["judging"] | {"code_share": 1.0}, "a section keeps its other keys"


def test_a_grid_of_another_recipe_is_not_mixed_in(tmp_path: Path) -> None:
    plan(RECIPES / "miniature.yaml", tmp_path, ["full"], [0])
    other = tmp_path / "other.yaml"
    other.write_text((RECIPES / "miniature.yaml").read_text().replace("rounds: 2", "rounds: 1"))
    with pytest.raises(InputError, match="of another recipe"):
        plan(other, tmp_path, ["full"], [0])


def test_a_grid_that_is_told_to_end_leaves_no_runs_behind(tmp_path: Path) -> None:
    code = f"""if True:
        import subprocess, sys
        from pathlib import Path
        from gristmill.core.progress import Progress
        from gristmill.workflows import claims
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        claims._start = lambda *_, **__: process
        claims._where = lambda run: str(print(process.pid, flush=True))
        claims.run_grid([claims.GridRun("full", 0, Path({str(tmp_path)!r}) / "a", Path("r"))], Progress(quiet=True), jobs=1, threads=1)
    """
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as grid:
        assert grid.stdout is not None
        run = int(grid.stdout.readline())
        os.kill(run, 0)
        grid.terminate()
        assert grid.wait(timeout=60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(run, 0)


def test_intervals_are_students_over_the_seeds() -> None:
    figure = over_seeds([0.1, 0.2, 0.3])  # deviation .1, t 4.303, root of 3
    assert figure == {"mean": 0.2, "ci95": [-0.0484, 0.4484], "n": 3}
    assert verdict(figure, 0.0) == "cannot be told" and verdict(figure, -0.05) == "holds" and verdict(figure, 0.45) == "does not hold"
    assert over_seeds([0.5])["ci95"] is None and verdict(over_seeds([0.5]), 0.0) == "cannot be told"


def test_claims_run_the_grid_and_are_taken_up_again(tmp_path: Path, tiny_recipe: dict[str, Any]) -> None:
    recipe, out = tmp_path / "tiny.yaml", tmp_path / "claims"
    recipe.write_text(yaml.safe_dump({"kind": "alignment", **tiny_recipe}))
    command = ["claims", str(recipe), "--out", str(out), "--seeds", "2", "--only", "loop", "--only", "dpo", "--quiet", "--json"]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    table = json.loads(first.stdout)["claims"]
    assert [(row["claim"], row["mode"]) for row in table] == [(c, m) for c in ("loop", "dpo") for m in ("greedy", "temperature 1")]
    results = [json.loads((out / f"full-seed{seed}" / "results.json").read_text()) for seed in (0, 1)]
    ends = [[run["stages"][i]["greedy"]["overall"]["mean"] for i in (0, -1)] for run in results]
    assert list(table[0]["seeds"].values()) == [round(last - first, 4) for first, last in ends]
    assert table[0]["n"] == 2 and table[0]["ci95"] is not None
    page, before = (out / "report.html").read_text(), (out / "full-seed0.log").stat().st_mtime_ns
    assert "The loop beats the demonstrations alone" in page and "The loop beats" in (out / "claims.md").read_text()
    (out / "full-seed1" / "results.json").unlink()  # as a kill leaves it
    again = CliRunner().invoke(app, command)
    assert json.loads(again.stdout)["claims"] == table
    assert (out / "full-seed0.log").stat().st_mtime_ns == before, "a finished run is not started again"


def test_a_run_that_fails_is_named_and_the_others_count(tmp_path: Path, tiny_recipe: dict[str, Any]) -> None:
    recipe, out = tmp_path / "tiny.yaml", tmp_path / "claims"
    recipe.write_text(yaml.safe_dump({"kind": "alignment", **tiny_recipe}))
    out.mkdir()
    (out / "full-seed0").write_text("in the way")
    ended = CliRunner().invoke(app, ["claims", str(recipe), "--out", str(out), "--seeds", "1", "--only", "loop", "--quiet"])
    assert ended.exit_code == 3 and "full-seed0 failed" in ended.output and "no figure" in ended.output


def test_an_unknown_claim_is_named() -> None:
    ended = CliRunner().invoke(app, ["claims", "--only", "lop"])
    assert ended.exit_code == 2 and "There is no claim 'lop'" in ended.output
