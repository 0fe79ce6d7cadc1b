"""The wheel: holds every file of the package, installs without a compiler, and works where no development package is."""

import csv
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import gristmill

pytest.importorskip("hatchling", reason="the wheel is built with hatchling, of the dev extra")

PACKAGE = Path(gristmill.__file__).parent
ROOT = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
DEVELOPMENT = ("hatchling", "hypothesis", "mypy", "pytest", "transformers")  # modules of the dev extra

TEXTS = (
    "The river rises in the hills above the village and turns two wheels before it reaches the sea. In spring the water stands so high "
    "that the lower meadows are closed to cattle, and the ferryman moves his boat behind the old stone wall. Nobody remembers who built "
    "that wall, but a letter in the church mentions it as early as the year of the great frost. Children climb on it to watch the herons, "
    "which nest in the alders on the far bank and leave when the first nights of autumn become cold.",
    "A good loaf needs little more than flour, water, salt and time. Mix them in the evening until no dry spots are left, cover the bowl "
    "with a damp cloth and forget about it until breakfast. The dough will have doubled by then, and it should tremble when you push the "
    "side of the bowl. Shape it gently, let it rest for another hour, and heat the oven as far as it goes. Steam in the first minutes "
    "makes the crust thin and shiny, so put a pan of boiling water on the lowest shelf.",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [*PIP, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (built,) = folder.iterdir()
    return built


def runtime_requirements(texts: list[str]) -> set[str]:
    """Names of the distributions that requirements lead to, without any extra of the first ones."""
    found: set[str] = set()
    waiting = [Requirement(text) for text in texts]
    while waiting:
        requirement = waiting.pop()
        extras = requirement.extras or {""}
        if requirement.name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(requirement.name)
        try:
            nested = [Requirement(text) for text in distribution(requirement.name).requires or []]
        except PackageNotFoundError:  # optional on this platform
            continue
        waiting += [r for r in nested if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in extras)]
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment that holds the wheel and what it requires, and nothing else.

    The requirements are links into the environment that the tests run in, so that nothing is downloaded or copied.
    """
    venv = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True, capture_output=True)
    python = venv / "bin" / "python"
    no_compiler = {**os.environ, "PATH": str(venv / "bin"), "CC": "false", "CXX": "false"}
    command = [*PIP, "--python", str(python), "install", "--no-deps", "--no-index", "--no-compile", str(wheel)]
    subprocess.run(command, check=True, capture_output=True, text=True, env=no_compiler)
    (site,) = venv.glob("lib/python*/site-packages")
    own = next(site.glob("gristmill-*.dist-info"))
    requires = re.findall(r"^Requires-Dist: (.*)$", (own / "METADATA").read_text(), re.M)
    for name in runtime_requirements([text for text in requires if "extra ==" not in text]):
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            target = Path(str(found.locate_file(top)))
            if not top.endswith(".pth") and not (site / top).exists():
                (site / top).symlink_to(target)
    return python


@pytest.fixture
def gristmill_command(installed: Path, tmp_path: Path) -> Callable[..., str]:
    """gristmill_command(*arguments, **environment) -> what the installed command prints, started in a folder of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST"))}

    def call(*arguments: str, **more: str) -> str:
        command = [str(installed.parent / "gristmill"), *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**environment, **more}, timeout=300)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    return call


def test_every_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = {f"gristmill/{p.relative_to(PACKAGE)}" for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert names == files
    for pattern in (
        "recipes/.*yaml",
        "synth/packs/.*yaml",
        "miniature/checkpoint/model.safetensors",
        r".*kernels\.cpp",
        r".*vectors\.h",
        r"py\.typed",
    ):
        assert any(re.fullmatch(f"gristmill/{pattern}", name) for name in names), pattern


def test_it_installs_without_a_compiler_and_on_any_machine(wheel: Path, installed: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    (record,) = installed.parents[1].glob("lib/python*/site-packages/gristmill-*.dist-info/RECORD")
    assert not [name for name, *_ in csv.reader(record.read_text().splitlines()) if name.endswith((".so", ".o"))]


def test_the_environment_has_no_development_package(installed: Path) -> None:
    code = f"import importlib.util, gristmill; print(gristmill.__file__, [m for m in {DEVELOPMENT} if importlib.util.find_spec(m)])"
    said = subprocess.run([str(installed), "-I", "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.startswith(str(installed.parents[1])) and said.strip().endswith("[]")


def test_help(gristmill_command: Callable[..., str]) -> None:
    assert "curate" in gristmill_command("--help")


def test_a_tiny_run(gristmill_command: Callable[..., str], tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_recipe))
    results = json.loads(gristmill_command("run", "tiny.yaml", "--out", "tiny", "--quiet", "--json"))
    assert results["stages"][-1]["name"] == "r1-rpo1"
    assert (tmp_path / "tiny" / "report.html").is_file()


def test_a_tiny_curation(gristmill_command: Callable[..., str], tmp_path: Path) -> None:
    rows = [{"id": str(i), "text": TEXTS[i // 2]} for i in range(3)]  # the first two are the same
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ("curate", "english-text", "--input", "documents.jsonl", "--out", "curated", "--workers", "1", "--quiet", "--json")
    funnel = json.loads(gristmill_command(*command, NUMBA_DISABLE_JIT="1"))  # compiling takes half a minute, once for each environment
    assert funnel["read"]["documents"] == 3 and funnel["documents"] == 2
    assert (tmp_path / "curated" / "report.html").is_file()


def test_a_dry_run_of_a_dataset(gristmill_command: Callable[..., str]) -> None:
    assert "nothing was asked" in gristmill_command("synth", "domain", "--dry-run")
