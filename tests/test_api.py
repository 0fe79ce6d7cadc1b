"""The Python API: lazy, complete, documented, and every snippet of docs/api.md runs."""

import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

import gristmill

ROOT = Path(__file__).parent.parent
SNIPPETS = sorted((ROOT / "docs" / "snippets").glob("*.py"))
NAMES = {"LLM", "SamplingParams", "RewardModel", "load", "train", "evaluate", "synth", "curate", "align", "Trainer"}


def test_the_names_are_frozen_and_there() -> None:
    assert {name for name in gristmill.__all__ if not name.startswith("__")} == NAMES
    assert set(dir(gristmill)) >= NAMES and all(getattr(gristmill, name).__doc__ for name in NAMES)
    with pytest.raises(AttributeError, match="no attribute 'lmm'"):
        _ = gristmill.lmm  # type: ignore[attr-defined]


def test_importing_costs_nothing() -> None:
    code = "import sys, gristmill; print([m for m in ('torch', 'numpy', 'pydantic', 'pyarrow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["train", "evaluate", "synth", "curate"])
def test_a_package_of_the_same_name_is_the_function_too(name: str) -> None:
    code = f"""
import gristmill
before = gristmill.{name}
import gristmill.{name} as package
from gristmill import {name}
assert package is gristmill.{name} is {name} and package.__path__
for function in (before, package):
    try:
        function(bad=1)
    except TypeError as e:
        print(e)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(out) == 2 and out[0] == out[1] and f"{name}()" in out[0]


@pytest.mark.parametrize("path", SNIPPETS, ids=lambda path: path.stem)
def test_a_snippet_runs(path: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_there_are_ten_and_the_page_is_up_to_date() -> None:
    assert len(SNIPPETS) == 10
    spec = spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "api.md").read_text() == module.page(), "run `make docs`"
