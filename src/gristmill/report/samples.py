"""Samples of a run with their lineage: topic, prompt, answers with their judgements, and what became of them."""

import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gristmill.data.chat import Conversation
from gristmill.data.rows import ATTRIBUTES, Pair, Prompt, Response, TopicRow, rows_of
from gristmill.report.comparisons import short_label, stage_label
from gristmill.report.markup import Markup, el, table
from gristmill.report.sample_files import studio_link
from gristmill.runs import artifacts
from gristmill.runs.reader import RunData
from gristmill.runs.stage_names import round_of

NUM_KEPT, NUM_DROPPED, NUM_PAIRED, NUM_UNPAIRED = 2, 2, 2, 1  # prompts that are shown, a task
NUM_REFUSED = 2  # a round and reason
MAX_CHARACTERS = 1500  # of a text that are shown
MAX_CHIP_CHARACTERS = 80
GIVEN = ("human", "file")  # origins of prompts that no model wrote
JUDGES = {"reward": "the reward model", "verifier": "a verifier"}


@dataclass(frozen=True)
class JudgedStage:
    """The judged answers of one stage as columns, those of a prompt together; texts stay on the disk.

    N answers, in the order in which their prompts first come, to P prompts.

    Attributes:
        name: such as "r1-answers" or "r2-dpo-pairs".
        folder: the stage's.
        makes_pairs: whether it made preference pairs, rather than demonstrations.
        prompts: ids of the prompts.
        tasks: their names.
        row_N: numbers of the answers in their file.
        prompt_N: the place of each answer's prompt in `prompts`, rising.
        task_N: the place of each answer's task in `tasks`.
        score_N: NaN where there is none.
        kept_N: whether the answer became a training row; of pair stages, one of a pair.
        pair_prompts: prompt id of each pair.
    """

    name: str
    folder: str
    makes_pairs: bool
    prompts: pa.Array
    tasks: list[str]
    row_N: np.ndarray
    prompt_N: np.ndarray
    task_N: np.ndarray
    score_N: np.ndarray
    kept_N: np.ndarray
    pair_prompts: pa.Array

    @property
    def starts_P(self) -> np.ndarray:
        """The place of each prompt's first answer."""
        return np.searchsorted(self.prompt_N, np.arange(len(self.prompts)))


def read_judged(data: RunData) -> list[JudgedStage]:
    """All finished stages that made training rows of judged answers, in order."""
    out = []
    for done in data.stages_with(artifacts.RESPONSES):
        makes_pairs = done in data.stages_with(artifacts.PAIRS)
        if not makes_pairs and done not in data.stages_with(artifacts.KEPT):
            continue
        folder = done["folder"]
        columns = data.columns(folder, artifacts.RESPONSES, "id", "prompt", "task", "score")
        rows = (
            data.columns(folder, artifacts.PAIRS, "prompt", "parents") if makes_pairs else data.columns(folder, artifacts.KEPT, "parents")
        )
        prompts, prompt_N = by_first(columns["prompt"])
        order_N = np.argsort(prompt_N, kind="stable")
        tasks, task_N = by_first(columns["task"].take(pa.array(order_N)))
        kept_N = is_in(columns["id"], rows["parents"].flatten())
        out.append(
            JudgedStage(
                done["name"],
                folder,
                makes_pairs,
                prompts,
                tasks.to_pylist(),
                row_N=order_N,
                prompt_N=prompt_N[order_N],
                task_N=task_N,
                score_N=columns["score"].to_numpy(zero_copy_only=False)[order_N],
                kept_N=kept_N[order_N],
                pair_prompts=rows["prompt"] if makes_pairs else rows["parents"].flatten()[:0],
            )
        )
    return out


def by_first(texts: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """The different texts of a dictionary array in the order in which they first come, and the place of each row's among them."""
    codes_N = texts.indices.to_numpy()
    found, first, place_N = np.unique(codes_N, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return texts.dictionary.take(pa.array(found[order])), rank[place_N]


def is_in(texts: pa.Array, among: pa.Array) -> np.ndarray:
    """Which rows of a dictionary array are among the texts of another."""
    used = among.dictionary.take(pc.unique(among.indices.drop_null()))
    return pc.is_in(texts.dictionary, value_set=used).to_numpy(zero_copy_only=False)[texts.indices.to_numpy()]


@dataclass(frozen=True)
class Lineage:
    """Where some prompts came from.

    Attributes:
        prompts: by id, with all that they grew from.
        topics: by id.
    """

    prompts: dict[str, Prompt]
    topics: dict[str, TopicRow]

    def opening(self, prompt: Prompt) -> Prompt | None:
        """The earlier prompt that this one goes on from."""
        return next((self.prompts[p] for p in prompt.parents if p in self.prompts), None)

    def topic(self, prompt: Prompt) -> TopicRow | None:
        """The topic that a prompt grew from, by way of its opening where it has one."""
        found = next((self.topics[p] for p in reversed(prompt.parents) if p in self.topics), None)
        opening = self.opening(prompt)
        return found or (self.topic(opening) if opening else None)


class Ancestry:
    """Ids, origins and parents of the prompts of all rounds; of a prompt that is in several rounds the last row counts."""

    def __init__(self, data: RunData):
        self._data = data
        names = ("id", "origin", "parents")
        self._stages = [(s["folder"], data.columns(s["folder"], artifacts.PROMPTS, *names)) for s in data.stages_with(artifacts.PROMPTS)]

    def written(self, prompts: pa.Array) -> np.ndarray:
        """Which prompts, given by their ids, a model wrote."""
        out = np.zeros(len(prompts), bool)
        for _, columns in self._stages:
            row_P = rows_of(columns["id"], prompts)
            given = ~is_in(columns["origin"], pa.array(GIVEN).dictionary_encode())
            out[row_P >= 0] = given[row_P[row_P >= 0]]
        return out

    def lineage(self, prompts: Collection[str]) -> Lineage:
        """Prompts, given by their ids, and what they grew from."""
        wanted, news = set(prompts), set(prompts)
        while news:
            names, parents = pa.array(sorted(news), pa.string()), set()
            for _, columns in self._stages:
                rows = rows_of(columns["id"], names)
                parents |= {p for of in columns["parents"].take(pa.array(rows[rows >= 0])).to_pylist() for p in of or ()}
            news = parents - wanted
            wanted |= news
        names = pa.array(sorted(wanted), pa.string())
        found: dict[str, Prompt] = {}
        for folder, columns in self._stages:
            rows = rows_of(columns["id"], names)
            found |= {p.id: p for p in self._data.read(folder, artifacts.PROMPTS, sorted(rows[rows >= 0].tolist()))}
        topics: dict[str, TopicRow] = {}
        for stage in self._data.stages_with(artifacts.TOPICS):
            rows = rows_of(self._data.columns(stage["folder"], artifacts.TOPICS, "id")["id"], names)
            topics |= {t.id: t for t in self._data.read(stage["folder"], artifacts.TOPICS, sorted(rows[rows >= 0].tolist()))}
        return Lineage(found, topics)


@dataclass(frozen=True)
class Drawn:
    """A prompt to show with the answers of a stage and their pairs.

    Attributes:
        row: number of its first answer in the stage's file.
    """

    stage: JudgedStage
    prompt: str
    row: int
    answers: list[Response]
    kept: set[str]
    pairs: list[Pair]


def samples_section(data: RunData, judged: Sequence[JudgedStage]) -> list[Markup]:
    """A few prompts a task, drawn by the run's seed: with kept, dropped and paired answers, and without a pair. Then refused prompts."""
    seed = data.recipe.get("seed", 0)
    ancestry = Ancestry(data)
    written = [ancestry.written(stage.prompts) for stage in judged]
    tasks = list(dict.fromkeys(task for stage in judged for task in stage.tasks))
    places = {task: _draw(judged, task, written, random.Random(f"samples-{seed}-{task}")) for task in tasks}
    drawn = _read_drawn(data, judged, [place for of_task in places.values() for place in of_task])
    lineage = ancestry.lineage({d.prompt for d in drawn.values()})
    out = []
    for i, task in enumerate(tasks):
        cards = [_card(drawn[place], lineage) for place in places[task]]
        out.append(el("details", el("summary", task), cards, class_="task", open="" if i == 0 else None))
    for stage in data.stages_with(artifacts.REFUSED):
        rows = _refused(data, stage["folder"], random.Random(f"refused-{seed}-{stage['name']}"))
        if rows:
            out.append(el("h3", f"Prompts that {_origin(stage['name'])} refused"))
            out.append(table(["prompt", "task", "why", ""], rows, numeric_from=4))
    return out


def _refused(data: RunData, folder: str, rng: random.Random) -> list[Iterable[Any]]:
    """A few refused prompts of each reason, as rows of a table."""
    reasons, reason_N = by_first(data.columns(folder, artifacts.REFUSED, "reason")["reason"])
    drawn: list[int] = []
    for place in range(len(reasons)):
        same = np.flatnonzero(reason_N == place).tolist()
        drawn += rng.sample(same, min(NUM_REFUSED, len(same)))
    numbers = sorted(drawn)
    found = dict(zip(numbers, data.read(folder, artifacts.REFUSED, numbers), strict=True))
    return [
        (
            el("td", el("div", _truncate(found[number].text) or "(nothing)", class_="said", dir="auto")),
            found[number].task,
            found[number].reason,
            el("td", studio_link(f"{folder}/{artifacts.REFUSED.file}", number)),
        )
        for number in drawn
    ]


def _origin(name: str) -> str:
    """A round, for a stage of one."""
    number = round_of(name)
    return f"round {number}" if number else name


Place = tuple[int, int]  # of a prompt: its stage among those that judged, and the prompt in it


def _draw(judged: Sequence[JudgedStage], task: str, written: Sequence[np.ndarray], rng: random.Random) -> list[Place]:
    """Prompts of a task to show; one of each kind that a model wrote, where there is one."""
    groups: dict[str, list[Place]] = {"kept": [], "dropped": [], "paired": [], "unpaired": []}
    for number, stage in enumerate(judged):
        if task not in stage.tasks:
            continue
        is_task_P = stage.task_N[stage.starts_P] == stage.tasks.index(task)
        if stage.makes_pairs:
            names, is_first_P = ("paired", "unpaired"), pc.is_in(stage.prompts, value_set=stage.pair_prompts.dictionary).to_numpy(False)
        else:
            names, is_first_P = ("kept", "dropped"), np.bincount(stage.prompt_N[stage.kept_N], minlength=len(stage.prompts)) > 0
        for name, is_in_group_P in zip(names, (is_first_P, ~is_first_P), strict=True):
            groups[name] += [(number, place) for place in np.flatnonzero(is_task_P & is_in_group_P).tolist()]
    amounts = {"kept": NUM_KEPT, "dropped": NUM_DROPPED, "paired": NUM_PAIRED, "unpaired": NUM_UNPAIRED}
    out = []
    for group, found in groups.items():
        drawn = rng.sample(found, len(found))
        first = next((i for i, (number, place) in enumerate(drawn) if written[number][place]), 0)
        out += [*drawn[first : first + 1], *drawn[:first], *drawn[first + 1 :]][: amounts[group]]
    return out


def _read_drawn(data: RunData, judged: Sequence[JudgedStage], places: Sequence[Place]) -> dict[Place, Drawn]:
    """The texts of what was drawn, each stage's in one pass over its files."""
    out = {}
    for number in {number for number, _ in places}:
        stage = judged[number]
        mine = sorted({place for of, place in places if of == number})
        which_N = np.isin(stage.prompt_N, mine)
        rows = np.sort(stage.row_N[which_N])
        kept_rows = set(stage.row_N[which_N & stage.kept_N].tolist())
        answers: dict[str, list[Response]] = {}
        first: dict[str, int] = {}
        kept = set()
        for row, r in zip(rows.tolist(), data.read(stage.folder, artifacts.RESPONSES, rows.tolist()), strict=True):
            answers.setdefault(r.prompt, []).append(r)
            first.setdefault(r.prompt, row)
            kept |= {r.id} if row in kept_rows else set()
        pairs: dict[str, list[Pair]] = {}
        if stage.makes_pairs:
            chosen = is_in(stage.pair_prompts, stage.prompts.take(pa.array(mine)).dictionary_encode())
            for p in data.read(stage.folder, artifacts.PAIRS, np.flatnonzero(chosen).tolist()):
                pairs.setdefault(p.prompt, []).append(p)
        for place in mine:
            prompt = stage.prompts[place].as_py()
            out[number, place] = Drawn(stage, prompt, first[prompt], answers[prompt], kept, pairs.get(prompt, []))
    return out


def _card(drawn: Drawn, lineage: Lineage) -> Markup:
    """A prompt, its lineage, and its answers: pair by pair, or kept ones first."""
    answers, pairs = drawn.answers, drawn.pairs
    if drawn.stage.makes_pairs:
        fate = el(
            "span", f"{len(pairs)} pairs" if len(pairs) > 1 else "pair" if pairs else "no pair", class_="chip good" if pairs else "chip"
        )
    else:
        kept = any(r.id in drawn.kept for r in answers)
        fate = el("span", "kept" if kept else "dropped", class_="chip good" if kept else "chip bad")
    first = [i for p in pairs for i in p.parents] or [r.id for r in answers if r.id in drawn.kept]
    ordered = sorted(answers, key=lambda r: (first.index(r.id) if r.id in first else len(first), -(r.score or 0.0)))
    top = el(
        "p",
        fate,
        _chips(drawn.stage, drawn.prompt, lineage),
        studio_link(f"{drawn.stage.folder}/{artifacts.RESPONSES.file}", drawn.row),
        class_="lineage",
    )
    return el("div", top, _conversation(answers[0].messages), [_answer(r, drawn) for r in ordered], class_="sample")


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


def _answer(r: Response, drawn: Drawn) -> Markup:
    """An answer with its verdicts; the chosen one of a pair with the reward gap."""
    pair = next((p for p in drawn.pairs if r.id in p.parents), None)
    side = ""
    if pair is not None:
        side = "chosen" if r.id == pair.parents[0] else "rejected"
    elif not drawn.stage.makes_pairs and r.id in drawn.kept:
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
