"""A model that is asked: every command says the same of a bad choice, before work is spent; what a good one is."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from gristmill.cli.main import app
from gristmill.core.errors import InputError
from gristmill.judge.party import Party, party_of, required_party
from gristmill.miniature.base import BASE

URL, KEY = "http://127.0.0.1:1/v1", "EMPTY_KEY"
SAFETY = ["safety", "--sets", "own.jsonl"]
# Of each set of options: its name, a command that has it, and what stands before a folder and before a URL.
OPTIONS = {
    "eval": ("endpoint", ["eval", "--tasks", "mmlu", "--data", "."], [], ["--endpoint"]),
    "eval MODEL": ("endpoint", ["eval", "--tasks", "mmlu", "--data", "."], [], []),
    "safety": ("endpoint", SAFETY, [], ["--endpoint"]),
    "safety MODEL": ("endpoint", SAFETY, [], []),
    "judge": ("endpoint", ["judge", "mt-bench", "--data", "."], [], ["--endpoint"]),
    "judge MODEL": ("endpoint", ["judge", "mt-bench", "--data", "."], [], []),
    "judge --judge": ("judge", ["judge", "rewards", "--data", "."], ["--judge"], ["--judge"]),
    "safety --guard": ("guard", [*SAFETY, "--endpoint", URL, "--endpoint-model", "m"], ["--guard"], ["--guard"]),
    "init": ("teacher", ["init"], [], ["--teacher"]),
}
NAMED_BY_FOLDER = [name for name in OPTIONS if name != "init"]
TAKES_ONE = [name for name in OPTIONS if OPTIONS[name][3] in (["--endpoint"], ["--teacher"])]


def complaint(name: str, *more: str) -> str:
    result = CliRunner().invoke(app, [*OPTIONS[name][1], *more])
    assert (result.exit_code, result.stdout) == (2, ""), (result.output, result.exception)
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("gristmill: ").strip().replace(f"--{OPTIONS[name][0]}", "--X")


def url(name: str, place: str = URL) -> list[str]:
    return [*OPTIONS[name][3], f"judge={place}" if name == "safety --guard" else place]


@pytest.fixture(autouse=True)
def nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(KEY, "")
    (tmp_path / "own.jsonl").write_text('{"prompt": "Why?", "label": "safe"}\n')
    yield
    assert [path.name for path in tmp_path.iterdir()] == ["own.jsonl"]


@pytest.mark.parametrize("name", NAMED_BY_FOLDER)
def test_an_endpoint_without_a_name(name: str) -> None:
    assert complaint(name, *url(name)) == f"Give --X-model, the name that {URL} knows the model by."


@pytest.mark.parametrize("name", OPTIONS)
def test_an_empty_key(name: str) -> None:
    option = OPTIONS[name][0]
    said = complaint(name, *url(name), f"--{option}-model", "m", f"--{option}-key-env", KEY)
    assert said == f"The environment variable {KEY} is empty: put the API key of 127.0.0.1 into it."


@pytest.mark.parametrize("given", ["model", "key-env"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_name_or_a_key_of_nothing_and_of_a_folder(name: str, given: str) -> None:
    words = [f"--{OPTIONS[name][0]}-{given}", "x"]
    said = "--X-model and --X-key-env are of an endpoint: give --X URL with them, or leave them out."
    assert complaint(name, *words) == said
    if name in NAMED_BY_FOLDER:
        assert complaint(name, *OPTIONS[name][2], str(BASE), *words) == said


@pytest.mark.parametrize("name", NAMED_BY_FOLDER)
def test_a_folder_that_is_none(name: str) -> None:
    said = complaint(name, *OPTIONS[name][2], "none")
    assert said == "Give a folder with a Hugging Face model: none/config.json does not exist."


@pytest.mark.parametrize("name", TAKES_ONE)
def test_a_url_that_is_none(name: str) -> None:
    said = complaint(name, *url(name, "localhost:8000"), f"--{OPTIONS[name][0]}-model", "m")
    assert said == "'localhost:8000' is not the base URL of an endpoint: give one like http://localhost:8000/v1."


@pytest.mark.parametrize("name", ["eval", "safety", "judge"])
def test_a_folder_and_an_endpoint(name: str) -> None:
    said = "Give either a model folder, or --X URL with --X-model NAME."
    assert complaint(name, str(BASE), *url(name), "--endpoint-model", "m") == said
    if name != "judge":  # which can do without a model, and says what it needs
        assert complaint(name) == said


def test_a_secret_in_a_url_is_not_printed() -> None:
    for name in OPTIONS:
        assert "hunter2" not in complaint(name, *url(name, "http://me:hunter2@127.0.0.1:1/v1"))


def test_a_party() -> None:
    assert party_of("endpoint", "") is None
    with pytest.raises(InputError, match="either a model folder, or --judge URL"):
        required_party("judge", "")
    endpoint, folder = party_of("endpoint", "", "HTTP://127.0.0.1:1/v1", model="m"), party_of("endpoint", str(BASE), device="cpu")
    assert endpoint is not None and endpoint.is_endpoint and endpoint.name == "m" and endpoint.target is not None
    assert folder == Party(str(BASE), device="cpu") and folder.name == BASE.name and folder.folder == BASE
