"""Judged benchmarks over a real endpoint client: results, journals, kills, and what ends in one sentence."""

import json
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from gristmill.cli.main import app
from gristmill.core.errors import InputError
from gristmill.core.progress import Progress
from gristmill.judge.party import Party
from gristmill.report.judged import judged_text
from gristmill.workflows.judged import run as judged
from gristmill.workflows.judged.session import JudgeArgs, Kind, call_identity, identity_of

BASELINE = "gpt-4-0314"


class Service:
    """Endpoint of a writer and of judges: each says something that follows from what it is asked. It may kill who asks."""

    def __init__(self) -> None:
        self.answered: Counter[str] = Counter()
        self.kill_at, self.num_requests, self.victim = 0, 0, 0
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                body = json.loads(data)
                service.num_requests += 1
                if service.kill_at and service.num_requests >= service.kill_at:
                    os.kill(service.victim, signal.SIGKILL)
                    return
                service.answered[json.dumps([body["model"], body["messages"], body.get("max_tokens")])] += 1
                text, logprob = service.reply(body["model"], "\n".join(m["content"] for m in body["messages"]))
                choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "length" if text.endswith("..") else "stop"}
                if body.get("logprobs"):
                    choice["logprobs"] = {"content": [{"token": text, "logprob": logprob}]}
                usage = {"prompt_tokens": 1, "completion_tokens": 1}
                out = json.dumps({"choices": [choice], "usage": usage}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(out)))
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(out)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reply(self, model: str, text: str) -> tuple[str, float]:
        if model == "writer":
            return f"written for: {text.splitlines()[-1]}", -1.0
        if model == "mumbler":
            return "It depends.", -1.0
        if model == "rambler":
            return ("It depends, since.." if "two?" in text else "It depends." if "stem" in text else "Rating: [[7]]"), -1.0
        if model == "reward":
            names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
            return ",".join(f"{name}:{'good' in text:d}" for name in names), -1.0
        if "model m and" in text or "answer of model m" in text:
            written = "m" if re.search(r"answer of model m\|>\nwritten", text) else "M"
            return written, -0.1
        if "[[A>>B]]" in text:
            return ("[[A>>B]]" if re.search(r"begin of assistant A's answer\|>\nwritten", text) else "[[B>A]]"), -1.0
        if "[[A]]" in text:  # pairs: whatever holds "good", else whatever the writer wrote
            shown = re.search(r"(?:Answer A:|assistant A's answers)(.*?)(?:Answer B:|end of assistant A)", text, re.S)
            assert shown is not None
            return ("[[A]]" if "good" in shown[1] or "written" in shown[1] else "[[B]]"), -1.0
        if "Reply with A or B" in text:
            shown = re.search(r"Answer A:(.*)Answer B:", text, re.S)
            return ("A" if shown is not None and "good" in shown[1] else "B"), -1.0
        return f"So so. Rating: [[{3 + len(text) % 5}]]", -1.0


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    yield made
    made.server.shutdown()


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder for each benchmark."""
    folder = tmp_path / "data"
    for name in ("mt", "arena", "alpaca", "pairs", "rewards"):
        (folder / name).mkdir(parents=True)
    categories = ["writing", "math", "stem"]
    write(
        folder / "mt" / "question.jsonl",
        [{"question_id": i, "category": c, "turns": [f"{c} one?", f"{c} two?"]} for i, c in enumerate(categories)],
    )
    write(folder / "mt" / "reference.jsonl", [{"question_id": 1, "model_id": "r", "choices": [{"turns": ["r one", "r two"]}]}])
    write(folder / "arena" / "question.jsonl", [{"uid": f"u{i}", "category": "arena-hard-v0.1", "prompt": f"arena {i}?"} for i in range(4)])
    answers = [
        {"uid": f"u{i}", "model": BASELINE, "messages": [{"role": "assistant", "content": {"answer": f"base {i}"}}]} for i in range(4)
    ]
    write(folder / "arena" / f"answers_{BASELINE}.jsonl", answers)
    rows = [{"instruction": f"do {i}", "output": "base " * (i + 1), "generator": "gpt4_1106_preview"} for i in range(6)]
    write(folder / "alpaca" / "base.jsonl", rows)
    pairs = [
        {"input": f"ask {i}", "output_1": "good" if i % 2 else "bad", "output_2": "bad" if i % 2 else "good", "label": 2 - i % 2}
        for i in range(4)
    ]
    write(folder / "pairs" / "natural.jsonl", pairs)
    write(
        folder / "rewards" / "filtered.jsonl",
        [{"prompt": f"p{i}", "chosen": "good", "rejected": "bad", "subset": "hep-go", "id": i} for i in range(3)],
    )
    return folder


def args(service: Service, data: Path, out: Path, *, kind: Kind, judge: str = "judge", **more: Any) -> JudgeArgs:
    folder = {"mt-bench": "mt", "arena-hard": "arena", "alpaca-eval": "alpaca", "agreement": "pairs", "rewards": "rewards"}[kind]
    model = Party(service.url, "writer") if kind in judged.OF_MODELS else None
    return JudgeArgs(data=data / folder, out=out, model=model, judge=Party(service.url, judge), concurrency=1, **more)


def run(kind: Kind, given: JudgeArgs) -> dict[str, Any]:
    results = judged.run(kind, given, Progress(quiet=True))
    assert json.loads((given.out / "results.json").read_text()) == results
    assert judged_text(results)
    return results


def test_mt_bench(service: Service, data: Path, tmp_path: Path) -> None:
    results = run("mt-bench", args(service, data, tmp_path / "out", kind="mt-bench"))
    assert results["scores"]["overall"]["n"] == 6 and results["verdicts"] == {"replies": 6, "unreadable": 0}
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert samples[1]["answer"] == "written for: writing two?" and 3 <= samples[1]["score"] <= 7
    asked = [json.loads(key) for key in service.answered]
    assert [m["content"] for m in next(a[1] for a in asked if len(a[1]) == 3)] == [
        "writing one?",
        "written for: writing one?",
        "writing two?",
    ]
    # its answers are a file that may be judged again, here in pairs with themselves
    again = args(service, data, tmp_path / "pairs", kind="mt-bench", baseline=tmp_path / "out" / "answers.jsonl")
    pairs = run("mt-bench", again)["pairs"]
    assert pairs["first_place"]["mean"] == 1.0 and pairs["first_place"]["n"] == 12
    assert pairs["overall"]["ties"] == 6 and pairs["overall"]["mean"] == 0.5  # A is always preferred


def test_arena_hard(service: Service, data: Path, tmp_path: Path) -> None:
    results = run("arena-hard", args(service, data, tmp_path / "out", kind="arena-hard"))
    score, place = results["scores"]["arena-hard-v0.1"], results["first_place"]
    assert place["mean"] == 0.5 and place["n"] == 8
    assert score["mean"] == 100.0 and score["n"] == 4 and score["style_controlled"]["mean"] > 99


def test_alpaca_eval(service: Service, data: Path, tmp_path: Path) -> None:
    results = run("alpaca-eval", args(service, data, tmp_path / "out", kind="alpaca-eval"))
    assert results["scores"]["win_rate"]["mean"] == pytest.approx(90.4837, abs=1e-3)  # exp(-.1), wherever the model stands
    assert results["scores"]["length_controlled"]["name"] == "LC (re-estimated, by length alone)"
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert {s["model_is"] for s in samples} == {"m", "M"}
    again = JudgeArgs(data=data / "alpaca", out=tmp_path / "again", answers=tmp_path / "out" / "samples.jsonl")
    assert run("alpaca-eval", again)["scores"] == results["scores"]


@pytest.mark.parametrize("explain", [False, True])
def test_agreement(service: Service, data: Path, tmp_path: Path, explain: bool) -> None:
    scores = run("agreement", args(service, data, tmp_path / "out", kind="agreement", explain=explain))["scores"]
    assert scores["agreement"]["mean"] == scores["consistent"]["mean"] == 1.0 and scores["first_place"]["mean"] == 0.5


@pytest.mark.parametrize("judge", ["judge", "reward"])
def test_rewards(service: Service, data: Path, tmp_path: Path, judge: str) -> None:
    given = args(service, data, tmp_path / "out", kind="rewards", judge=judge, is_reward=judge == "reward")
    results = run("rewards", given)
    assert results["scores"]["rewardbench"]["subsets"]["hep-go"]["mean"] == 1.0 and "hep-go has 3 of 164" in results["notes"][0]
    before = sum(service.answered.values())
    assert run("rewards", given) == results and sum(service.answered.values()) == before


def test_a_reward_model_in_process(data: Path, tmp_path: Path, random_base: Path) -> None:
    from gristmill.model.hf import load_model
    from gristmill.model.hf_save import save_reward
    from gristmill.model.reward import RewardModel

    model, tokenizer = load_model(random_base)
    save_reward(RewardModel(model), tokenizer, tmp_path / "reward")
    given = JudgeArgs(data=data / "rewards", out=tmp_path / "out", judge=Party(str(tmp_path / "reward")))
    results = run("rewards", given)
    assert results["judge_kind"] == "reward model" and results["unrated"] == 0
    journal = (tmp_path / "out" / "rating-calls.jsonl").read_bytes()
    assert run("rewards", given) == results and (tmp_path / "out" / "rating-calls.jsonl").read_bytes() == journal
    with pytest.raises(InputError, match="give a judge that writes"):
        judged.run("mt-bench", JudgeArgs(data=data / "mt", out=tmp_path / "mt", answers=tmp_path, judge=given.judge), Progress(quiet=True))
    assert run("agreement", JudgeArgs(data=data / "pairs", out=tmp_path / "pairs", judge=given.judge))["judge_kind"] == "reward model"


def test_killed_runs_go_on_and_ask_nothing_twice(service: Service, data: Path, tmp_path: Path) -> None:
    whole = run("mt-bench", args(service, data, tmp_path / "whole", kind="mt-bench"))
    service.answered.clear()
    for kill_at in (2, 1, 4, 3, 1, 2):  # requests into a start
        service.kill_at, service.num_requests = kill_at, 0
        child = os.fork()
        if child == 0:
            try:
                judged.run("mt-bench", args(service, data, tmp_path / "killed", kind="mt-bench"), Progress(quiet=True))
            finally:
                os._exit(0)
        service.victim = child
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
    service.kill_at = 0
    assert run("mt-bench", args(service, data, tmp_path / "killed", kind="mt-bench")) == whole
    assert set(service.answered.values()) == {1} and len(service.answered) == 12
    assert (tmp_path / "killed" / "samples.jsonl").read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()


@pytest.mark.parametrize("kind", judged.KINDS)
def test_a_judge_that_says_nothing_readable(service: Service, data: Path, tmp_path: Path, kind: Kind) -> None:
    given = args(service, data, tmp_path / "out", kind=kind, judge="mumbler")
    with pytest.raises(InputError, match=r"no readable verdict in any of \d+ replies .*'It depends\.'"):
        judged.run(kind, given, Progress(quiet=True))
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["verdicts"]["unreadable"] > 0 and f"unreadable verdicts: {found['verdicts']['unreadable']} of" in judged_text(found)


def test_a_judge_that_says_little_that_can_be_read(service: Service, data: Path, tmp_path: Path) -> None:
    results = run("mt-bench", args(service, data, tmp_path / "out", kind="mt-bench", judge="rambler"))
    assert results["verdicts"] == {"replies": 6, "unreadable": 4} and results["scores"]["overall"]["n"] == 2
    assert "3 of the replies that cannot be read were cut off before their end: raise --judge-tokens." in results["notes"]
    assert any(note.startswith("Most replies cannot be read") for note in results["notes"])


def test_a_folder_of_another_benchmark_or_of_something_else_is_left_alone(service: Service, data: Path, tmp_path: Path) -> None:
    run("agreement", args(service, data, tmp_path / "out", kind="agreement"))
    with pytest.raises(InputError, match="judge agreement"):
        judged.run("rewards", args(service, data, tmp_path / "out", kind="rewards"), Progress(quiet=True))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="holds no run"):
        judged.run("rewards", args(service, data, tmp_path / "mine", kind="rewards"), Progress(quiet=True))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_the_judge_is_the_model_itself(service: Service, data: Path, tmp_path: Path) -> None:
    given = args(service, data, tmp_path / "out", kind="arena-hard")
    notes = run("arena-hard", JudgeArgs(data=given.data, out=given.out, model=Party(service.url, "judge"), judge=given.judge))["notes"]
    assert [n for n in notes if "model itself" in n]


def test_the_command(service: Service, data: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    words = [
        "judge",
        "agreement",
        "--data",
        str(data / "pairs"),
        "--judge",
        service.url,
        "--judge-model",
        "judge",
        "--out",
        out,
        "--limit",
        "2",
        "-q",
    ]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    assert "agreement                          1.000" in shown.stdout and "unreadable verdicts: 0 of 4 replies" in shown.stdout
    assert f"page: {out}/report.html" in shown.stdout
    assert "agreement: the judge itself judged by judge" in (tmp_path / "out" / "report.html").read_text()
    told = CliRunner().invoke(app, [*words, "--json"])
    assert json.loads(told.stdout)["scores"]["agreement"]["n"] == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mt-bnch", "--data", "."], "choose one of mt-bench"),
        (["mt-bench", "--data", "."], "give its folder"),
        (["agreement", "m", "--data", "."], "--judge alone"),
        (["rewards", "--data", ".", "--judge", "http://127.0.0.1:1/v1"], "--judge-model"),
        (["rewards", "--data", ".", "--judge", "none"], "none/config.json does not exist"),
        (["rewards", "--data", ".", "--limit", "0"], "--limit"),
        (["rewards", "--data", ".", "--greedy"], "--greedy, which is for mt-bench"),
        (["mt-bench", "none", "--data", "."], "none/config.json does not exist"),
        (["rewards", "--data", "none", "--judge", "http://127.0.0.1:1/v1", "--judge-model", "j"], "does not exist"),
    ],
)
def test_bad_input_ends_in_one_sentence(words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["judge", *words])
    assert result.exit_code == 2 and result.stdout == "" and said in result.stderr and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_another_chat_format_or_type_is_asked_anew(random_base: Path) -> None:
    own = Party(str(random_base))
    others = Party(str(random_base), chat_format="plain"), Party(str(random_base), dtype="bf16")
    assert call_identity(own) == identity_of(own)
    for other in others:
        assert call_identity(other) != call_identity(own) and other.identity != own.identity
        assert identity_of(other) == identity_of(own)  # who judges himself, in whatever format and type
    engine = others[1].client(1).engine  # type: ignore[attr-defined]
    assert engine.dtype == torch.bfloat16
