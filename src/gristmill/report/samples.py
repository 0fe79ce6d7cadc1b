"""Samples of a run with their lineage: topic, prompt, answers with their judgements, and what became of them."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gristmill.data.chat import Conversation
from gristmill.data.rows import ATTRIBUTES, Pair, Prompt, Refused, Response, TopicRow
from gristmill.report.comparisons import round_of, short_label, stage_label
from gristmill.report.markup import Markup, el, table
from gristmill.runs import artifacts
from gristmill.runs.reader import RunData

NUM_KEPT, NUM_DROPPED, NUM_PAIRED, NUM_UNPAIRED = 2, 2, 2, 1  # prompts that are shown, a task
NUM_REFUSED = 2  # a round and reason
MAX_CHARACTERS = 1500  # of a text that are shown
MAX_CHIP_CHARACTERS = 80
GIVEN = ("human", "file")  # origins of prompts that no model wrote
JUDGES = {"reward": "the reward model", "verifier": "a verifier"}


@dataclass
class JudgedStage:
    """The judged answers of one stage.

    Attributes:
        name: such as "r1-answers" or "r2-dpo-pairs".
        makes_pairs: whether it made preference pairs, rather than demonstrations.
        answers: by prompt id.
        kept: ids of the answers that became training rows; of pair stages, of both answers of each pair.
        pairs: by prompt id.
    """

    name: str
    makes_pairs: bool
    answers: dict[str, list[Response]] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)
    pairs: dict[str, list[Pair]] = field(default_factory=dict)


def read_judged(data: RunData) -> list[JudgedStage]:
    """All finished stages that made training rows of judged answers, in order."""
    out = []
    for done in data.stages_with(artifacts.RESPONSES):
        makes_pairs = done in data.stages_with(artifacts.PAIRS)
        if not makes_pairs and done not in data.stages_with(artifacts.KEPT):
            continue
        stage = JudgedStage(done["name"], makes_pairs)
        for r in data.read(done["folder"], artifacts.RESPONSES):
            stage.answers.setdefault(r.prompt, []).append(r)
        if makes_pairs:
            for p in data.read(done["folder"], artifacts.PAIRS):
                stage.pairs.setdefault(p.prompt, []).append(p)
                stage.kept |= set(p.parents)
        else:
            parents = {i for d in data.read(done["folder"], artifacts.KEPT) for i in d.parents}
            stage.kept = {r.id for rows in stage.answers.values() for r in rows if r.id in parents}
        out.append(stage)
    return out


@dataclass(frozen=True)
class Lineage:
    """Where prompts came from.

    Attributes:
        prompts: by id, of all rounds.
        topics: by id, of all rounds.
        refused: by stage, prompts that were written and not kept.
    """

    prompts: dict[str, Prompt]
    topics: dict[str, TopicRow]
    refused: dict[str, list[Refused]]

    def is_written(self, prompt_id: str) -> bool:
        """Whether a model wrote a prompt."""
        prompt = self.prompts.get(prompt_id)
        return prompt is not None and prompt.origin not in GIVEN

    def opening(self, prompt: Prompt) -> Prompt | None:
        """The earlier prompt that this one goes on from."""
        return next((self.prompts[p] for p in prompt.parents if p in self.prompts), None)

    def topic(self, prompt: Prompt) -> TopicRow | None:
        """The topic that a prompt grew from, by way of its opening where it has one."""
        found = next((self.topics[p] for p in reversed(prompt.parents) if p in self.topics), None)
        opening = self.opening(prompt)
        return found or (self.topic(opening) if opening else None)


def read_lineage(data: RunData) -> Lineage:
    """Prompts of all rounds with their topics, and the refused ones."""
    prompts = {p.id: p for s in data.stages_with(artifacts.PROMPTS) for p in data.read(s["folder"], artifacts.PROMPTS)}
    topics = {t.id: t for s in data.stages_with(artifacts.TOPICS) for t in data.read(s["folder"], artifacts.TOPICS)}
    refused = {s["name"]: data.read(s["folder"], artifacts.REFUSED) for s in data.stages_with(artifacts.REFUSED)}
    return Lineage(prompts, topics, refused)


def samples_section(data: RunData, judged: Sequence[JudgedStage], lineage: Lineage) -> list[Markup]:
    """A few prompts a task, drawn by the run's seed: with kept, dropped and paired answers, and without a pair. Then refused prompts."""
    seed = data.recipe.get("seed", 0)
    tasks = list(dict.fromkeys(r.task for stage in judged for rows in stage.answers.values() for r in rows))
    out = []
    for i, task in enumerate(tasks):
        rng = random.Random(f"samples-{seed}-{task}")
        cards = [_card(stage, prompt, lineage) for stage, prompt in _draw(judged, task, lineage, rng)]
        out.append(el("details", el("summary", task), cards, class_="task", open="" if i == 0 else None))
    for stage_name, refused in lineage.refused.items():
        rng = random.Random(f"refused-{seed}-{stage_name}")
        rows: list[Iterable[Any]] = []
        for reason in dict.fromkeys(r.reason for r in refused):
            same = [r for r in refused if r.reason == reason]
            drawn = rng.sample(same, min(NUM_REFUSED, len(same)))
            rows += [(el("td", el("div", _truncate(r.text) or "(nothing)", class_="said", dir="auto")), r.task, reason) for r in drawn]
        if rows:
            out.append(el("h3", f"Prompts that {_origin(stage_name)} refused"))
            out.append(table(["prompt", "task", "why"], rows, numeric_from=3))
    return out


def _origin(name: str) -> str:
    """A round, for a stage of one."""
    number = round_of(name)
    return f"round {number}" if number else name


def _draw(judged: Sequence[JudgedStage], task: str, lineage: Lineage, rng: random.Random) -> list[tuple[JudgedStage, str]]:
    """Prompts of a task to show, with the stage that judged their answers; one of each kind that a model wrote, where there is one."""
    groups: dict[str, list[tuple[JudgedStage, str]]] = {"kept": [], "dropped": [], "paired": [], "unpaired": []}
    for stage in judged:
        for prompt, answers in stage.answers.items():
            if answers[0].task != task:
                continue
            if stage.makes_pairs:
                group = "paired" if prompt in stage.pairs else "unpaired"
            else:
                group = "kept" if any(r.id in stage.kept for r in answers) else "dropped"
            groups[group].append((stage, prompt))
    amounts = {"kept": NUM_KEPT, "dropped": NUM_DROPPED, "paired": NUM_PAIRED, "unpaired": NUM_UNPAIRED}
    out = []
    for group, found in groups.items():
        drawn = rng.sample(found, len(found))
        written = next((i for i, (_, prompt) in enumerate(drawn) if lineage.is_written(prompt)), 0)
        out += [*drawn[written : written + 1], *drawn[:written], *drawn[written + 1 :]][: amounts[group]]
    return out


def _card(stage: JudgedStage, prompt_id: str, lineage: Lineage) -> Markup:
    """A prompt, its lineage, and its answers: pair by pair, or kept ones first."""
    answers, pairs = stage.answers[prompt_id], stage.pairs.get(prompt_id, [])
    if stage.makes_pairs:
        fate = el(
            "span", f"{len(pairs)} pairs" if len(pairs) > 1 else "pair" if pairs else "no pair", class_="chip good" if pairs else "chip"
        )
    else:
        kept = any(r.id in stage.kept for r in answers)
        fate = el("span", "kept" if kept else "dropped", class_="chip good" if kept else "chip bad")
    first = [i for p in pairs for i in p.parents] or [r.id for r in answers if r.id in stage.kept]
    ordered = sorted(answers, key=lambda r: (first.index(r.id) if r.id in first else len(first), -(r.score or 0.0)))
    top = el("p", fate, _chips(stage, prompt_id, lineage), class_="lineage")
    return el("div", top, _conversation(answers[0].messages), [_answer(r, stage, pairs) for r in ordered], class_="sample")


def _chips(stage: JudgedStage, prompt_id: str, lineage: Lineage) -> list[Markup]:
    """The lineage: round, topic, who wrote the prompt, what was done with it."""
    steps = [_origin(stage.name)]
    prompt = lineage.prompts.get(prompt_id)
    if prompt is not None:
        topic, opening = lineage.topic(prompt), lineage.opening(prompt)
        if topic is not None:
            steps.append(f"topic: {topic.text}")
        if opening is not None:
            steps.append(f"prompt {_by(opening)}")
        num_turns = sum(m.role == "user" for m in prompt.messages)
        turn = "prompt" if num_turns == 1 else "second turn" if num_turns == 2 else f"turn {num_turns}"
        steps.append(f"{turn} {_by(prompt)}")
        steps.append("a program can check it" if prompt.truth else "judged by the reward model")
    steps.append(f"answers for {short_label(stage.name)}" if stage.makes_pairs else "answers for SFT")
    chips = [el("span", _truncate(s, MAX_CHIP_CHARACTERS), class_="chip") for s in steps]
    return [m for i, chip in enumerate(chips) for m in ([el("span", "\u2192")] if i else []) + [chip]]


def _by(prompt: Prompt) -> str:
    return "from the recipe's file" if prompt.origin == "file" else f"by {stage_label(prompt.origin)}"


def _conversation(messages: Conversation) -> list[Markup]:
    return [
        el("div", el("div", m.role, class_="who"), el("div", _truncate(m.content), class_="said", dir="auto"), class_="turn")
        for m in messages
    ]


def _answer(r: Response, stage: JudgedStage, pairs: Sequence[Pair]) -> Markup:
    """An answer with its verdicts; the chosen one of a pair with the reward gap."""
    pair = next((p for p in pairs if r.id in p.parents), None)
    side = ""
    if pair is not None:
        side = "chosen" if r.id == pair.parents[0] else "rejected"
    elif not stage.makes_pairs and r.id in stage.kept:
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
        gap = pair.chosen_reward - pair.rejected_reward
        facts.append(el("span", f"reward gap {gap:.2f}, decided by {JUDGES.get(pair.judge, pair.judge)}"))
    facts.append(el("span", f"{stage_label(r.generator)}, temperature {r.temperature:g}, {r.num_tokens} tokens"))
    if r.edits:
        facts.append(el("span", f"repaired by a program for {', '.join(r.edits)}"))
    if r.votes > 1:
        facts.append(el("span", f"given {r.votes} times"))
    if r.weak:
        facts.append(el("span", "weak verdict: the program could have lied to its tests"))
    css = "answer rejected" if side == "rejected" else "answer kept" if side else "answer"
    return el("div", el("div", _truncate(r.text) or "(nothing)", class_="said", dir="auto"), el("div", facts, class_="facts"), class_=css)


def _truncate(text: str, longest: int = MAX_CHARACTERS) -> str:
    return text if len(text) <= longest else f"{text[:longest]} [... {len(text) - longest:,} more characters]"
