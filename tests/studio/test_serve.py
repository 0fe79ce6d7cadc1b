"""The command: a process that is killed under load keeps every acknowledged answer; bad input ends in one sentence."""

import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gristmill.cli.main import app
from gristmill.studio.serve import open_store
from gristmill.studio.store import ANNOTATOR
from tests.studio.conftest import Client, answer

ANSWERS = "01-answers/responses.parquet"


def start(folder: Path) -> tuple[subprocess.Popen[str], str, str]:
    """A running studio, its address and its owner's token."""
    command = [sys.executable, "-m", "gristmill.cli", "studio", str(folder), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    found = re.fullmatch(r".* is open at (\S+)/#token=(\S+)\n", process.stdout.readline())
    assert found
    return process, found[1], found[2]


def log_in(origin: str, **body: str) -> Client:
    client = Client(origin)
    status, said = client.api("POST", "/session", body)
    assert status == 200, said
    client.headers["Cookie"] = client.reply["Set-Cookie"].split(";")[0]
    return client


def test_a_killed_server_has_every_answer_that_it_acknowledged(run_folder: Path, tmp_path: Path) -> None:
    process, origin, token = start(run_folder)
    owner = log_in(origin, token=token)
    made = owner.api("POST", "/projects", {"kind": "rate", "source": ANSWERS, "num": 6, "need": 3})[1]["id"]
    acknowledged: list[str] = []
    enough = threading.Event()

    def work(client: Client) -> None:
        version = 0
        _, queue = client.api("GET", f"/queue?project={made}&n=1")
        while True:  # one item again and again: each version is an answer of its own
            version += 1
            said = answer(queue["items"][0]["id"], version)
            try:
                status, _ = client.api("POST", "/answers", {"answers": [said]})
            except OSError:
                return
            if status != 200:
                return
            acknowledged.append(said["id"])
            if len(acknowledged) > 30:
                enough.set()

    clients = [owner]
    for name in ("Ada", "Bo"):
        invited = owner.api("POST", "/invitations", {"role": ANNOTATOR})[1]["token"]
        clients.append(log_in(origin, token=invited, name=name, password="a long password"))
    threads = [threading.Thread(target=work, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    assert enough.wait(60)
    process.kill()
    for thread in threads:
        thread.join()
    process.wait(30)
    store, _ = open_store(run_folder)
    stored = {a["id"] for item in store.items(made) for a in store.history(item["id"])}
    store.database.close()
    assert set(acknowledged) <= stored and len(stored) <= len(acknowledged) + len(clients)
    process, origin, token = start(run_folder)
    assert log_in(origin, token=token).api("GET", "/projects")[1]["projects"][0]["id"] == made
    assert log_in(origin, name="Ada", password="a long password").api("GET", "/me")[1]["name"] == "Ada"
    result = CliRunner().invoke(app, ["studio", str(run_folder), "--export", str(tmp_path / "said")])  # while it is open
    assert result.exit_code == 0 and "rated.parquet: " in result.stdout and (tmp_path / "said" / "ratings.jsonl").read_text()
    process.terminate()
    assert process.wait(30) == 0


def test_an_export_of_what_nobody_said_makes_no_studio(run_folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["studio", str(run_folder), "--export", str(tmp_path / "said")])
    assert result.exit_code == 2 and "nobody has said anything" in result.stderr
    assert not (run_folder / "studio").exists() and not (tmp_path / "said").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["nowhere"], "neither a run nor"),
        (["run", "--port", "99999"], "choose another --host or --port"),
        (["run", "--host", "0.0.0.0"], "needs --url too"),
        (["run", "--url", "mill"], "is no address"),
        (["run", "--database", "postgresql://127.0.0.1:1/x?connect_timeout=2"], "postgresql"),
    ],
)
def test_bad_input_ends_in_one_sentence(run_folder: Path, options: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["studio", str(run_folder.parent / options[0]), *options[1:]])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert words.lower() in result.stderr.lower() and "Traceback" not in result.stderr
