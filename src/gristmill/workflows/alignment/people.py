"""People in the loop: what they said in the studio becomes human data of a round, and a sample is checked before it is trained on.

Both are stages beside the order of the others, so that a run may get or lose them between two starts. A round that has begun without
people goes on without them.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from gristmill.core.errors import InputError
from gristmill.data.chat import Conversation, Message
from gristmill.data.rows import Demonstration, Pair, Rated, make_id
from gristmill.evaluate import reward_bench
from gristmill.evaluate.stats import accuracy, paired
from gristmill.judge.judges import LocalRater
from gristmill.runs import artifacts, checks
from gristmill.runs.run_dir import MARKER
from gristmill.workflows.alarms import stopped_by_people
from gristmill.workflows.alignment.context import AlignmentContext
from gristmill.workflows.alignment.recipe import Check
from gristmill.workflows.alignment.source import contaminated
from gristmill.workflows.alignment.state import Said, State
from gristmill.workflows.alignment.training import train_stage
from gristmill.workflows.train import ADAPTER, MODEL

POLL_SECONDS = 0.5
SAID: tuple[artifacts.Artifact[Any], ...] = (artifacts.SAID_RATINGS, artifacts.SAID_PAIRS, artifacts.SAID_DEMONSTRATIONS)


class RoundEnded(Exception):
    """A round that goes no further; what it made so far stays."""

    def __init__(self, why: str, alarm: dict[str, str]):
        super().__init__(why)
        self.alarm = alarm


def take_said(context: AlignmentContext, state: State, number: int) -> None:
    """Take what people have said so far as human data of a round. A reward model that has not seen their ratings is trained again."""
    name = f"r{number}-people"
    if not _is_done(context, name) and (context.recipe.people is None or _is_begun(context, f"r{number}-prompts", beside=name)):
        return

    def work(folder: Path) -> dict[str, Any]:
        people = context.recipe.people
        if context.read_said is None or people is None:
            raise InputError(f"{folder} is damaged, and the recipe takes nothing from people: give it `people: studio` again.")
        said, left_out = context.read_said(context.run.path, people.database), Counter[str]()

        def usable(rows: Sequence[Any], whole: Callable[[Any], Sequence[Conversation]]) -> list[Any]:
            out = []
            for row in rows:
                prompt = row.messages if isinstance(row, Pair) else row.messages[:-1]
                if contaminated(prompt, context.held_out):
                    left_out["asks what the evaluation asks"] += 1
                elif not all(context.holds(one) for one in whole(row)):
                    left_out["longer than the model's context"] += 1
                else:
                    out.append(row)
            return out

        ratings = usable(said.ratings, lambda r: [r.messages])
        pairs = usable(said.pairs, lambda p: [(*p.messages, Message("assistant", text)) for text in (p.chosen, p.rejected)])
        demonstrations = usable(said.demonstrations, lambda d: [d.messages])
        for artifact, rows in zip(SAID, (ratings, pairs, demonstrations), strict=True):
            artifact.write(folder, rows)
        counts = {"ratings": len(ratings), "pairs": len(pairs), "demonstrations": len(demonstrations)}
        return {"said": {**counts, "people": said.people, "left_out": dict(left_out)}}

    done = context.run.stage(name, [number], work, artifacts=SAID, beside=True)
    ratings, pairs, demonstrations = (artifact.read(done.folder) for artifact in SAID)
    state.said = Said(ratings, pairs, demonstrations, done.summary["said"]["people"])
    state.made[name] = done.fingerprint
    if state.said.ratings and _labels(state.said.ratings) != state.rated_by_people:
        _train_reward(context, state, number)


def _is_done(context: AlignmentContext, stage: str) -> bool:
    """Whether a round has it from an earlier start: it stays, whatever the recipe says by now."""
    return (context.run.path / f"00-{stage}" / MARKER).exists()


def _is_begun(context: AlignmentContext, stage: str, *, beside: str) -> bool:
    """Whether an earlier start has gone on to a stage without what belongs before it."""
    begun = any(path.name.partition("-")[2] == stage for path in context.run.path.glob(f"*-{stage}"))
    return begun and not (context.run.path / f"00-{beside}").exists()


def _labels(ratings: Sequence[Rated]) -> str:
    return make_id([(r.id, r.labels) for r in ratings])


def split_ratings(context: AlignmentContext, state: State) -> tuple[list[Rated], list[Rated]]:
    """Rows to train the reward model on, and rows to measure it on; both answers to a prompt go the same way."""
    pairs = list(dict.fromkeys(r.pair for r in state.ratings))
    held = set(pairs[len(pairs) - min(context.recipe.data.num_held_out_ratings, len(pairs) // 3) :])
    return [r for r in state.ratings if r.pair not in held], [r for r in state.ratings if r.pair in held]


def _train_reward(context: AlignmentContext, state: State, number: int) -> None:
    """Train the reward model again, from Base, on the given ratings and those of the studio, and compare it with the one before."""
    given, held = split_ratings(context, state)
    rows = [*given, *state.said.ratings]
    before = state.reward_folder
    inputs = [context.recipe.reward.model_dump(), list(context.weights), state.of("data", "reward"), _labels(state.said.ratings)]

    def work(folder: Path) -> dict[str, Any]:
        facts = train_stage(context, "reward", context.base_folder, rows, context.recipe.reward, folder)
        pairs = reward_bench.easy_pairs(held)
        if before is None or not pairs:
            return facts
        old, new = (_prefers(context, path, pairs) for path in (before, folder / MODEL))
        return {**facts, "held_out": {"before": accuracy(old), "after": accuracy(new), "difference": paired(old, new)}}

    files = [f"{MODEL}/*", f"{ADAPTER}/*"]
    done = context.run.stage(f"r{number}-reward", inputs, work, files=files, beside=True)
    state.reward_folder = done.folder / MODEL
    state.made["reward"] = done.fingerprint
    state.rated_by_people = _labels(state.said.ratings)


def _prefers(context: AlignmentContext, folder: Path, pairs: Sequence[tuple[Rated, Rated]]) -> list[bool]:
    """Whether a reward model prefers the better answer of each pair."""
    scorer = context.scorer(folder)
    both = {row.id: row.messages for pair in pairs for row in pair}
    ratings = asyncio.run(LocalRater(scorer, context.progress.tick).rate(both))
    return [scorer.total(ratings[better.id]) > scorer.total(ratings[worse.id]) for better, worse in pairs]


# ---- round check ----


def checked(context: AlignmentContext, state: State, number: int, kept: list[Demonstration]) -> list[Demonstration]:
    """Rows of a round after people have looked at a sample of them: without rejected ones, and with repaired ones as they are now.

    Raises:
        RoundEnded: they said that the round is not to be trained on.
    """
    section, name = context.recipe.check, f"r{number}-check"
    asks = section is not None and not _is_begun(context, f"r{number}-general-sft", beside=name)
    if not kept or not (_is_done(context, name) or asks):
        return kept
    identity = make_id([(row.id, row.messages[-1].content) for row in kept])

    def work(folder: Path) -> dict[str, Any]:
        check = checks.read_check(folder) if section is None else _ask(context, section, folder, kept, number=number, identity=identity)
        if check is None or (section is None and check.decision is None):
            raise InputError(f"{folder} is damaged, and the recipe asks nobody: give it `check` again.")
        return {"checked": _told(_wait(context, check), check.question["rows"], len(kept))}

    def again(done: dict[str, Any]) -> bool:
        found = checks.read_check(context.run.path / f"00-{name}")
        return found is not None and found.decision is not None and found.decision["at"] != done["checked"]["at"]

    inputs, files = [identity, number], (artifacts.CHECK, artifacts.QUESTION, artifacts.DECISION)
    done = context.run.stage(name, inputs, work, artifacts=files, on_change="continue", again=again, beside=True)
    check = checks.read_check(done.folder)
    if check is None or check.decision is None:
        raise InputError(f"{done.folder} has lost its decision: delete the folder, and people are asked again.")
    state.made[name] = make_id(done.fingerprint, check.decision["verdicts"], check.decision["repaired"])
    if check.decision["decision"] == checks.STOP:
        raise RoundEnded(f"round {number}: stopped by people", stopped_by_people(done.folder.name, done.summary["checked"]))
    return apply_verdicts(kept, check.decision)


def draw(rows: Sequence[Demonstration], num: int, *, seed: int) -> list[Demonstration]:
    """A stratified random sample: as many rows of each task as of any other, as far as there are so many."""
    rng, by_task = random.Random(seed), dict[str, list[Demonstration]]()
    for row in rows:
        by_task.setdefault(row.task, []).append(row)
    piles = [rng.sample(found, len(found)) for _, found in sorted(by_task.items())]
    out: list[Demonstration] = []
    while len(out) < num and any(piles):
        out += [pile.pop() for pile in piles if pile][: num - len(out)]
    return out


def _ask(
    context: AlignmentContext, section: Check, folder: Path, kept: Sequence[Demonstration], *, number: int, identity: str
) -> checks.Check:
    """The question of a check; one that was asked by an earlier start keeps its sample and its time."""
    asked = {"id": make_id(identity, section.sample), "hours": section.hours, "default": section.default}
    with suppress(InputError):
        earlier = checks.read_check(folder)
        if earlier is not None and asked.items() <= earlier.question.items():
            return earlier
    seed = context.recipe.seed * 1000 + number
    sample = draw(kept, section.sample, seed=seed)
    artifacts.CHECK.write(folder, sample)
    question = {**asked, "round": number, "rows": len(sample), "of": len(kept), "seed": seed}
    question |= {"asked": checks.utc(), "until": checks.utc(time.time() + section.hours * 3600)}
    artifacts.QUESTION.write(folder, question)
    return checks.Check(folder, question, None)


def _wait(context: AlignmentContext, check: checks.Check) -> dict[str, Any]:
    """The decision about a check, when there is one or its time is over."""
    run, until = context.run.path, check.question["until"]
    if check.decision is None:
        words = f"asks people about {check.question['rows']} of {check.question['of']} rows"
        context.progress.warn(f"{check.stage} {words}: answer in `gristmill studio {run}`, or with `gristmill check {run} --approve`;")
        context.progress.warn(f"  without an answer by {until}: {check.question['default']}")
    started = time.monotonic()
    while True:
        found = checks.read_check(check.folder)
        if found is not None and found.decision is not None:
            return found.decision
        if checks.seconds_until(until) <= 0:
            checks.decide(check, check.question["default"], checks.TIMEOUT)
            continue
        time.sleep(POLL_SECONDS)
        context.progress.tick(round(time.monotonic() - started), None, f"seconds: waiting for people until {until}")


def _told(decision: dict[str, Any], num_rows: int, num_kept: int) -> dict[str, Any]:
    """What a check's summary says: who decided, and the share of wrong rows among those that were looked at."""
    verdicts = list(decision["verdicts"].values())
    told = {name: decision[name] for name in ("decision", "by", "at")} | {"rows": num_rows, "of": num_kept}
    return told | {"wrong": accuracy([v != checks.ACCEPT for v in verdicts])} | {v: verdicts.count(v) for v in checks.VERDICTS}


def apply_verdicts(rows: Sequence[Demonstration], decision: dict[str, Any]) -> list[Demonstration]:
    """Rows without those that were rejected. A repaired row is another row, by a person, and names the one that it was."""
    out = []
    for row in rows:
        verdict = decision["verdicts"].get(row.id)
        if verdict == checks.REPAIR and (text := decision["repaired"].get(row.id)):
            messages = (*row.messages[:-1], replace(row.messages[-1], content=text))
            out.append(replace(row, id=make_id("repaired", row.id, text), messages=messages, origin="human", parents=(row.id,)))
        elif verdict not in (checks.REJECT, checks.REPAIR):
            out.append(row)
    return out
