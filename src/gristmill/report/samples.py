"""Rows of a run with the way they came: topic, prompt, answers with their judgements, and what became of them."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gristmill.data.chat import Conversation
from gristmill.data.rows import ATTRIBUTES, Demonstration, Pair, Prompt, Response, make_id
from gristmill.report.claims import full, round_of
from gristmill.report.markup import Markup, el
from gristmill.runs.reader import RunData

KEPT, DROPPED, PAIRED, UNPAIRED, REFUSED = 2, 2, 2, 1, 4  # how many are shown, a task (refused prompts: a round)
LONGEST = 1500  # characters of a text that are shown
JUDGES = {"reward": "the reward model", "verifier": "a verifier"}


@dataclass
class Batch:
    """The judged answers of one stage.

    Attributes:
        stage: its name, such as "r1-answers" or "r2-dpo-pairs".
        answers: by prompt id.
        kept: ids of the answers that became training rows; of pair stages, of both answers of each pair.
        pairs: by prompt id; empty for answer stages.
    """

    stage: str
    answers: dict[str, list[Response]] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)
    pairs: dict[str, Pair] = field(default_factory=dict)

    @property
    def makes_pairs(self) -> bool:
        """Whether the stage made preference pairs."""
        return self.stage.endswith("-pairs")


def read_batches(data: RunData) -> list[Batch]:
    """All finished stages with judged answers, in order."""
    out = []
    for done in data.stages:
        name = done.get("name", "")
        if not round_of(name) or not name.endswith(("-answers", "-pairs")):
            continue
        batch = Batch(name)
        for r in data.rows(done["folder"], "responses.parquet", Response):
            batch.answers.setdefault(r.prompt, []).append(r)
        if batch.makes_pairs:
            batch.pairs = {p.prompt: p for p in data.rows(done["folder"], "pairs.parquet", Pair)}
            batch.kept = {i for p in batch.pairs.values() for i in p.parents}
        else:
            batch.kept = {d.parents[0] for d in data.rows(done["folder"], "kept.parquet", Demonstration) if d.parents}
        out.append(batch)
    return out


@dataclass(frozen=True)
class Origins:
    """Where prompts came from.

    Attributes:
        prompts: by id, of all rounds.
        topics: topic text by its id.
        refused: by round, texts that were written but not kept, with whether the writer was cut off.
    """

    prompts: dict[str, Prompt]
    topics: dict[str, str]
    refused: dict[int, list[tuple[str, bool]]]


def read_origins(data: RunData) -> Origins:
    """Prompts of all rounds with their topics."""
    prompts: dict[str, Prompt] = {}
    topics: dict[str, str] = {}
    refused: dict[int, list[tuple[str, bool]]] = {}
    for done in data.stages:
        name = done.get("name", "")
        if not round_of(name) or not name.endswith("-prompts"):
            continue
        rows = {p.id: p for p in data.rows(done["folder"], "prompts.parquet", Prompt)}
        prompts |= rows
        texts = {_text(r) for r in data.journal(done["folder"], "topics.jsonl").values()}
        topics |= {make_id("topic", task, text): text for task in done.get("topics", {}) for text in texts}
        written = {**data.journal(done["folder"], "prompts.jsonl"), **data.journal(done["folder"], "next.jsonl")}
        refused[round_of(name)] = [(_text(r), r["out"][0][3] != "stop") for i, r in written.items() if i not in rows]
    return Origins(prompts, topics, refused)


def _text(record: Mapping[str, Any]) -> str:
    return str(record["out"][0][0]).strip()


def samples_section(data: RunData, batches: Sequence[Batch], origins: Origins) -> list[Markup]:
    """A few rows a task, drawn by the run's seed: kept and dropped answers, pairs, and prompts that no pair came of."""
    seed = data.recipe.get("seed", 0)
    tasks = list(dict.fromkeys(r.task for b in batches for rows in b.answers.values() for r in rows))
    out = []
    for i, task in enumerate(tasks):
        rng = random.Random(f"samples-{seed}-{task}")
        cards = [_card(batch, prompt, origins) for batch, prompt in _choose(batches, task, rng)]
        out.append(el("details", el("summary", task), cards, class_="task", open="" if i == 0 else None))
    for number, texts in origins.refused.items():
        chosen = random.Random(f"refused-{seed}-{number}").sample(texts, min(REFUSED, len(texts)))
        rows = [
            [el("td", el("div", _cut(t) or "(nothing)", class_="said")), "cut off" if cut else "repeated, held out or not understood"]
            for t, cut in chosen
        ]
        if rows:
            out.append(el("h3", f"Prompts that round {number} wrote and did not keep"))
            out.append(el("div", _plain_table(rows), class_="wide"))
    return out


def _plain_table(rows: list[list[Any]]) -> Markup:
    body = [el("tr", text, el("td", why, class_="soft")) for text, why in rows]
    return el("table", el("thead", el("tr", el("th", "prompt", scope="col"), el("th", "why", scope="col"))), el("tbody", body))


def _choose(batches: Sequence[Batch], task: str, rng: random.Random) -> list[tuple[Batch, str]]:
    kinds: dict[str, list[tuple[Batch, str]]] = {"kept": [], "dropped": [], "paired": [], "unpaired": []}
    for batch in batches:
        for prompt, answers in batch.answers.items():
            if answers[0].task != task:
                continue
            if batch.makes_pairs:
                kind = "paired" if prompt in batch.pairs else "unpaired"
            else:
                kind = "kept" if any(r.id in batch.kept for r in answers) else "dropped"
            kinds[kind].append((batch, prompt))
    amounts = {"kept": KEPT, "dropped": DROPPED, "paired": PAIRED, "unpaired": UNPAIRED}
    return [c for kind, found in kinds.items() for c in rng.sample(found, min(amounts[kind], len(found)))]


def _card(batch: Batch, prompt_id: str, origins: Origins) -> Markup:
    answers, pair = batch.answers[prompt_id], batch.pairs.get(prompt_id)
    if batch.makes_pairs:
        fate = el("span", "pair" if pair else "no pair", class_="chip good" if pair else "chip")
    else:
        kept = any(r.id in batch.kept for r in answers)
        fate = el("span", "kept" if kept else "dropped", class_="chip good" if kept else "chip bad")
    lineage = el("p", fate, _lineage(batch, prompt_id, origins), class_="lineage")
    first = pair.parents if pair else tuple(r.id for r in answers if r.id in batch.kept)
    ordered = sorted(answers, key=lambda r: (first.index(r.id) if r.id in first else len(first), -(r.score or 0.0)))
    return el("div", lineage, _conversation(answers[0].messages), [_answer(r, batch, pair) for r in ordered], class_="sample")


def _lineage(batch: Batch, prompt_id: str, origins: Origins) -> list[Markup]:
    """Chips: round, topic, who wrote the prompt, what was done with it."""
    steps = [f"round {round_of(batch.stage)}"]
    prompt = origins.prompts.get(prompt_id)
    if prompt is not None:
        first = prompt
        if prompt.parents and (earlier := origins.prompts.get(prompt.parents[0])) is not None:
            first = earlier
        topic = next((origins.topics[p] for p in first.parents if p in origins.topics), None)
        if topic is not None:
            steps.append(f"topic: {topic}")
        steps.append(f"prompt by {full(prompt.origin)}")
        if first is not prompt:
            steps.append("second turn")
        steps.append("a program can check it" if prompt.truth else "judged by the reward model")
    steps.append(f"answers for {full(batch.stage)}" if batch.makes_pairs else "answers for SFT")
    chips = [el("span", _cut(s, 80), class_="chip") for s in steps]
    return [m for i, chip in enumerate(chips) for m in ([el("span", "\u2192")] if i else []) + [chip]]


def _conversation(messages: Conversation) -> list[Markup]:
    return [
        el("div", el("div", m.role, class_="who"), el("div", _cut(m.content), class_="said", dir="auto"), class_="turn") for m in messages
    ]


def _answer(r: Response, batch: Batch, pair: Pair | None) -> Markup:
    side = ""
    if pair is not None and r.id in pair.parents:
        side = "chosen" if r.id == pair.parents[0] else "rejected"
    elif not batch.makes_pairs and r.id in batch.kept:
        side = "kept"
    facts: list[Markup] = []
    if side:
        facts.append(el("span", side, class_="chip bad" if side == "rejected" else "chip good"))
    if r.verified is not None:
        facts.append(el("span", "right" if r.verified else "wrong", class_="chip good" if r.verified else "chip bad"))
    elif r.good is not None:
        facts.append(el("span", "accepted" if r.good else "not accepted", class_="chip good" if r.good else "chip bad"))
    if not r.finished:
        facts.append(el("span", "cut off", class_="chip hint"))
    if r.score is not None:
        facts.append(el("span", el("b", f"score {r.score:.2f}")))
    if r.rating is not None:
        facts.append(el("span", " \u00b7 ".join(f"{a} {getattr(r.rating, a):.1f}" for a in ATTRIBUTES)))
    if pair is not None and side == "chosen":
        facts.append(
            el("span", f"reward gap {pair.chosen_reward - pair.rejected_reward:.2f}, decided by {JUDGES.get(pair.judge, pair.judge)}")
        )
    facts.append(el("span", f"{full(r.generator)}, temperature {r.temperature:g}, {r.num_tokens} tokens"))
    css = "answer rejected" if side == "rejected" else "answer kept" if side else "answer"
    return el("div", el("div", _cut(r.text) or "(nothing)", class_="said", dir="auto"), el("div", facts, class_="facts"), class_=css)


def _cut(text: str, longest: int = LONGEST) -> str:
    return text if len(text) <= longest else f"{text[:longest]} [... {len(text) - longest:,} more characters]"
