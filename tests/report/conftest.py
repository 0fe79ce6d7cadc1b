"""Variants of one real tiny run: unfinished, a control, of another seed, with other outcomes, or with more text in every row."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from gristmill.data.chat import Message
from gristmill.evaluate.stats import accuracy
from gristmill.runs import artifacts
from gristmill.runs.artifacts import Artifact


def patch_json(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value) or value))


def stage_named(folder: Path, name: str) -> Path:
    return next(p for p in sorted(folder.iterdir()) if p.name.split("-", 1)[1:] == [name])


def longer(row: Any, text: str) -> Any:
    """A row with `text` behind everything that people or models wrote."""
    fields = {f.name for f in dataclasses.fields(row)}
    changes: dict[str, Any] = {k: getattr(row, k) + text for k in ("text", "chosen", "rejected") if k in fields}
    if "messages" in fields:
        changes["messages"] = tuple(Message(m.role, m.content + text) for m in row.messages)
    return dataclasses.replace(row, **changes)


MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(finished: Path, tmp_path: Path) -> MakeRun:
    """make_run(name="run", seed=0, control=None, text="", done=True) -> a folder with the files of the tiny run, but for its models."""

    def make(name: str = "run", *, seed: int = 0, control: str | None = None, text: str = "", done: bool = True) -> Path:
        folder = tmp_path / name
        shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("model", "train", "report.html"))
        facts = {"name": name, "seed": seed, "control": control}
        saved = folder / "recipe.yaml"
        saved.write_text(yaml.safe_dump({**yaml.safe_load(saved.read_text()), **facts}))
        patch_json(folder / "results.json", lambda results: results.update(facts))
        for marker in folder.glob("*/done.json") if text else ():
            for file in json.loads(marker.read_text())["artifacts"]:
                artifact = artifacts.ALL[file]
                if isinstance(artifact, Artifact):
                    artifact.write(marker.parent, [longer(row, text) for row in artifact.read(marker.parent)])
        if not done:  # killed in the middle of the first SFT of the round
            (folder / "results.json").unlink()
            last = stage_named(folder, "r1-code-sft")
            for path in folder.iterdir():
                if path.is_dir() and path.name > last.name:
                    shutil.rmtree(path)
            (last / "done.json").unlink()
        return folder

    return make


@pytest.fixture(scope="session")
def stage_folder() -> Callable[[Path, str], Path]:
    """stage_folder(run folder, stage's name) -> its folder."""
    return stage_named


@pytest.fixture(scope="session")
def change_json() -> Callable[[Path, Callable[[Any], Any]], None]:
    """change_json(path, change): the function changes the value in place, or returns another."""
    return patch_json


@pytest.fixture(scope="session")
def set_outcomes() -> Callable[[Path, str, Callable[[int, str], bool]], None]:
    """set_outcomes(folder, stage, right): of evaluation prompts by their place and task, in all that is written about the stage."""

    def change(folder: Path, name: str, right: Callable[[int, str], bool]) -> None:
        prompts = artifacts.EVALUATION.read(stage_named(folder, "data"))
        outcomes = {p.id: right(i, p.task) for i, p in enumerate(prompts)}
        tasks = dict.fromkeys(p.task for p in prompts)
        scores = {"overall": accuracy(list(outcomes.values()))}
        scores |= {t: accuracy([outcomes[p.id] for p in prompts if p.task == t]) for t in tasks}
        both = {"greedy": scores, "sampled": scores}
        stage = stage_named(folder, name)
        artifacts.OUTCOMES.write(stage, {"greedy": outcomes, "sampled": outcomes})
        patch_json(stage / "done.json", lambda done: done.update(both))
        patch_json(folder / "results.json", lambda results: next(s for s in results["stages"] if s["name"] == name).update(both))

    return change


class Reader(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="session")
def read_page() -> Callable[[str], Reader]:
    """read_page(html) -> its tags and text."""
    return Reader
