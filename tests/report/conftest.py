"""A run folder as a run leaves it, written with the run's own writers, in a fraction of a second."""

import json
import random
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from gristmill.core.config import check, dump
from gristmill.core.io import write_json
from gristmill.data.chat import Message
from gristmill.data.rows import Demonstration, Pair, Prompt, Rating, Response, make_id, write_rows
from gristmill.evaluate.stats import accuracy
from gristmill.workflows.alignment.recipe import AlignmentRecipe

TASKS = ("facts", "sums", "code")
SKILL = {"demonstrations": 0.4, "code-sft": 0.25, "general-sft": 0.55, "dpo": 0.55, "rpo1": 0.62}
HUMAN_NLL = (1.9, 2.1, 3.4)  # the last one alarms


class Writer:
    """Writes one stage after the other.

    Args:
        folder: the run's folder.
        seed: of everything random.
        text: appended to every text that a model is said to have written.
    """

    def __init__(self, folder: Path, seed: int, text: str):
        self.folder, self.rng, self.text = folder, random.Random(seed), text
        self.count = 0
        self.stages: list[dict[str, Any]] = []
        self.collapse: list[dict[str, Any]] = []

    def start(self, name: str) -> Path:
        path = self.folder / f"{self.count:02d}-{name}"
        path.mkdir(parents=True)
        self.count += 1
        return path

    def done(self, path: Path, **facts: Any) -> None:
        name = path.name.split("-", 1)[1]
        write_json(path / "done.json", {"name": name, "fingerprint": make_id(name), "seconds": self.rng.uniform(1, 30), **facts})

    def data(self) -> None:
        path = self.start("data")
        rows = [
            Prompt(make_id("evaluation", t, i), t, (Message("user", f"{t} {i}?"),), "human", (), {"kind": "exact"})
            for t in TASKS
            for i in range(40)
        ]
        write_rows(path / "evaluation.parquet", rows)
        self.evaluation = rows
        self.done(path, demonstrations=24, ratings=60, evaluation=len(rows))

    def model(self, name: str, number: int, skill: float, **facts: Any) -> None:
        path = self.start(name)
        outcomes = {
            mode: {p.id: self.rng.random() < skill - drop for p in self.evaluation} for mode, drop in (("greedy", 0.0), ("sampled", 0.1))
        }
        write_json(path / "outcomes.json", outcomes)
        scores: dict[str, Any] = {
            mode: {"overall": accuracy(list(right.values()))}
            | {t: accuracy([right[p.id] for p in self.evaluation if p.task == t]) for t in TASKS}
            for mode, right in outcomes.items()
        }
        self.done(
            path,
            rows=100,
            steps=20,
            tokens=9000,
            train_seconds=3.0,
            tokens_per_second=3000,
            metrics={"loss": 0.5},
            dropped=1,
            **facts,
            **scores,
        )
        self.stages.append({"name": name, "round": number, "model": f"{path.name}/model", **scores})

    def reward(self) -> None:
        path = self.start("reward")
        self.done(path, rows=60, steps=10, tokens=5000, train_seconds=2.0, tokens_per_second=2500, metrics={"loss": 0.3}, dropped=0)

    def reward_check(self) -> dict[str, Any]:
        path = self.start("reward-check")
        easy, hard = (
            {"overall": accuracy(x * 3), **{t: accuracy(x) for t in TASKS}} for x in ([True] * 9 + [False], [True] * 5 + [False] * 5)
        )
        judge = {"overall": {"mean": 0.5, "ci95": [0.3, 0.7], "n": 30}, "verdicts": {"tie": 30}} | {
            t: {"mean": 0.5, "n": 10} for t in TASKS
        }
        attributes = dict.fromkeys(("helpfulness", "correctness", "coherence", "complexity"), 0.6)
        report = {"correlation": {**attributes, "verbosity": None}, "llm_judge": {"easy": judge, "hard": judge}, "easy": easy, "hard": hard}
        self.done(path, **report)
        return report

    def prompts(self, number: int, generator: str) -> list[Prompt]:
        path = self.start(f"r{number}-prompts")
        topics = {t: f"{t} topic {number}{self.text}" for t in TASKS}
        write_rows_jsonl(path / "topics.jsonl", {make_id("t", t): topics[t] for t in TASKS})
        rows = [
            Prompt(
                make_id("prompt", number, t, i),
                t,
                (Message("user", f"{t} question {i}{self.text}"),),
                generator,
                (make_id("topic", t, topics[t]),),
            )
            for t in TASKS
            for i in range(8)
        ]
        first = rows[0]
        talk = (*first.messages, Message("assistant", f"said{self.text}"), Message("user", f"and then?{self.text}"))
        rows.append(Prompt(make_id("next", number), "facts", talk, generator, (first.id,)))
        dropped = {make_id("dropped", i): f"facts question {i}{self.text}" for i in range(3)}
        write_rows_jsonl(path / "prompts.jsonl", {p.id: p.messages[-1].content for p in rows[:-1]} | dropped)
        write_rows(path / "prompts.parquet", rows)
        self.done(path, funnel={"from file": 0, "written": 27, "repeated": 2, "held out": 1, "kept": 24}, topics=dict.fromkeys(TASKS, 1))
        return rows

    def responses(self, path: Path, prompts: list[Prompt], generator: str) -> list[Response]:
        rows = []
        for p in prompts:
            for k in range(4):
                values = [self.rng.uniform(0, 4) for _ in range(5)]
                checked = None if p.task == "facts" else k != 1
                good = checked if checked is not None else k != 1
                judge = "reward" if checked is None else "verifier"
                finished = k != 3
                name, text = make_id(path.name, p.id, k), f"answer {k}{self.text}"
                score = 0.65 * values[0] + 0.8 * values[1] + 0.45 * values[2]
                rows.append(
                    Response(
                        name,
                        p.id,
                        p.task,
                        p.messages,
                        text,
                        generator,
                        0.7,
                        k,
                        9,
                        -3.0,
                        finished,
                        Rating(*values),
                        score,
                        checked,
                        judge,
                        good and finished,
                    )
                )
        write_rows(path / "responses.parquet", rows)
        return rows

    def answers(self, number: int, prompts: list[Prompt], generator: str) -> None:
        path = self.start(f"r{number}-answers")
        rows = self.responses(path, prompts, generator)
        kept = [r for r in rows if r.sample == 0 and r.prompt != prompts[1].id]
        write_rows(
            path / "kept.parquet",
            [
                Demonstration(make_id("synthetic", r.id), r.task, (*r.messages, Message("assistant", r.text)), generator, (r.id, r.prompt))
                for r in kept
            ],
        )
        funnel = {
            t: {
                "prompts": len({r.prompt for r in rows if r.task == t}),
                "answers": sum(r.task == t for r in rows),
                "good": sum(bool(r.good) for r in rows if r.task == t),
                "kept": sum(r.task == t for r in kept),
                "judge": {"verifier": 3},
                "score_before": 3.1,
                "score_after": None if t == "code" else 4.2,
            }
            for t in dict.fromkeys(r.task for r in rows)
        }
        self.done(path, funnel=funnel, kept=len(kept))

    def pairs(self, name: str, prompts: list[Prompt], generator: str) -> None:
        path = self.start(f"{name}-pairs")
        rows = self.responses(path, prompts, generator)
        groups = [rows[i : i + 4] for i in range(0, len(rows), 4)][1:]
        pairs = [
            Pair(
                make_id("pair", g[0].id),
                g[0].prompt,
                g[0].task,
                g[0].messages,
                g[0].text,
                g[1].text,
                4.0,
                2.0,
                g[0].judge or "",
                (g[0].id, g[1].id),
            )
            for g in groups
        ]
        write_rows(path / "pairs.parquet", pairs)
        self.done(
            path, funnel={"pairs": len(pairs), "all right": 1}, tasks={"facts": len(pairs)}, judges={"reward": len(pairs)}, pairs=len(pairs)
        )

    def monitors(self, model: str, number: int) -> None:
        path = self.start(f"r{number}-monitors" if number else "monitors")
        values = {"distinct_4": 0.6 - number / 50, "self_bleu": 40.0, "compression": 3.1, "rare_types": 0.5, "tokens": 4000.0}
        values |= {"human_nll": HUMAN_NLL[number], "base_nll": 0.8}
        alarms = ["human_nll"] if number == 2 else []
        self.done(path, values=values, alarms=alarms)
        self.collapse.append({"round": number, "model": model, "values": values, "alarms": alarms})


def write_rows_jsonl(path: Path, texts: dict[str, str]) -> None:
    """A journal of one-sample generations."""
    path.write_text("".join(json.dumps({"id": i, "out": [[t, 5, -1.0, "stop"]]}) + "\n" for i, t in texts.items()))


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


@pytest.fixture
def read_page() -> Callable[[str], Reader]:
    """read_page(html) -> its tags and text."""
    return Reader


MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """make_run(name, seed=0, control=None, text="", gain=0.0, finished=True) -> run folder."""

    def make(
        name: str = "run", *, seed: int = 0, control: str | None = None, text: str = "", gain: float = 0.0, finished: bool = True
    ) -> Path:
        recipe = check(AlignmentRecipe, {"name": name, "world": "miniature", "seed": seed, "control": control, "rpo_iterations": 1})
        w = Writer(tmp_path / name, seed, text)
        w.folder.mkdir()
        (w.folder / "recipe.yaml").write_text(dump(recipe))
        w.data()
        w.reward()
        w.model("demonstrations", 0, SKILL["demonstrations"], human_rows=24)
        report = w.reward_check()
        w.monitors("demonstrations", 0)
        current = "demonstrations"
        for number in (1, 2):
            prompts = w.prompts(number, current)
            half = len(prompts) // 2
            w.answers(number, prompts[:half], current)
            if not finished:
                w.start(f"r{number}-code-sft")
                return w.folder
            for stage in ("code-sft", "general-sft", "dpo", "rpo1"):
                if stage in ("dpo", "rpo1"):
                    w.pairs(f"r{number}-{stage}", prompts[half:], current)
                current = f"r{number}-{stage}"
                facts = {"human_rows": 24} if stage.endswith("sft") else {}
                w.model(current, number, SKILL[stage] + gain + number / 50, **facts)
            w.monitors(current, number)
        results = {"name": name, "control": control, "seed": seed, "seconds": 312.4, "synthetic_share": 0.9834}
        results |= {"alignment_samples": {"human": 24, "synthetic": 1422, "human_ratings": 60}, "stages": w.stages}
        write_json(w.folder / "results.json", {**results, "reward": report, "collapse": w.collapse, "stopped": None})
        return w.folder

    return make
