"""The loop itself: what the report's section 3 does, in order, as stages of a run folder.

    data -> reward model -> demonstrations
    each round: prompts -> answers -> code SFT -> general SFT -> (pairs -> DPO) -> (pairs -> RPO) x 3 -> monitors

Every round trains from Base; its prompts and first answers come from the last round's Instruct. Human rows are in every round's
blend, and earlier rounds' synthetic rows stay in it.
"""

import asyncio
import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gristmill.core.errors import InputError
from gristmill.core.io import read_json
from gristmill.core.progress import Progress
from gristmill.data.chat import Message
from gristmill.data.rows import Demonstration, Pair, Prompt, Rated, Response, make_id
from gristmill.engine.engine import Engine
from gristmill.evaluate import reward_bench
from gristmill.evaluate.runner import MODES, evaluate_model
from gristmill.generation.cached import Client
from gristmill.judge.judges import Judges, LocalRater
from gristmill.judge.pairwise import TEMPLATE, Comparison, Verdict, compare
from gristmill.judge.select import contested, select
from gristmill.parallel.mesh import Mesh
from gristmill.runs import artifacts
from gristmill.train.settings import PreferenceTraining, Training
from gristmill.verify.repair import instructions_of
from gristmill.workflows.alarms import code_left_out, collapsed, few_steps, kept_nothing, no_pairs, no_prompts, unusable_prompts
from gristmill.workflows.alignment import monitors
from gristmill.workflows.alignment.answering import answer, answer_pairs, prompt_demonstrations
from gristmill.workflows.alignment.best import choose_best
from gristmill.workflows.alignment.context import ASKED, AlignmentContext
from gristmill.workflows.alignment.measurements import STAGE_OF, catch_up, measure, measured_rows
from gristmill.workflows.alignment.people import RoundEnded, checked, split_ratings, take_said
from gristmill.workflows.alignment.prompt_generation import write_prompts
from gristmill.workflows.alignment.recipe import BASE_ROW, AlignmentRecipe
from gristmill.workflows.alignment.source import contaminated, normalize_prompt
from gristmill.workflows.alignment.state import ReadSaid, State
from gristmill.workflows.alignment.training import train_stage
from gristmill.workflows.dataset.steps import KEPT_FILES, PAIR_FILES, PROMPT_FILES
from gristmill.workflows.train import ADAPTER, MODEL

CODE_ROWS_MIN = 8
HUMAN: list[artifacts.AnyArtifact] = [artifacts.HUMAN_DEMONSTRATIONS, artifacts.RATINGS, artifacts.EVALUATION]
NUM_HUMAN = ("demonstrations", "rated_prompts", "evaluation", "held_out_ratings")
# What of judging only the choice of rows reads, and only that of pairs.
OF_ROWS = frozenset(
    {"max_per_prompt", "max_judged_per_prompt", "max_per_task", "max_code_per_task", "max_prompts_per_task", "max_per_topic", "code_share"}
)
OF_PAIRS = frozenset(
    {
        "llm",
        "keep_chosen",
        "max_pairs_per_prompt",
        "max_pairs_per_task",
        "min_gap",
        "verified_gap",
        "near_duplicates",
        "max_length_difference",
        "code_share",
    }
)
TRAINED = [f"{MODEL}/*", f"{ADAPTER}/*"]
MODEL_FILES: list[artifacts.AnyArtifact] = [artifacts.OUTCOMES, artifacts.EVALUATION_CALLS]


def run(
    recipe: AlignmentRecipe,
    folder: Path,
    progress: Progress,
    unsafe_code: bool = False,
    *,
    redo: bool = False,
    mesh: Mesh | None = None,
    read_said: ReadSaid | None = None,
) -> dict[str, Any]:
    """Turn the mill, from the start or from where an earlier start was cut off. Returns what `results.json` holds, in the first process.

    Args:
        mesh: the processes of the run (`process_mesh`), of which the first alone writes; default this one alone.
        redo: make stages again that were made from another recipe or other files, and what depends on them; else they are refused.
        read_said: what people have said in the run's studio, for recipes with `people` (`studio.said`).

    Raises:
        InputError: bad input, before work is spent.
    """
    context = AlignmentContext(recipe, folder, progress, unsafe_code, redo=redo, mesh=mesh, read_said=read_said)
    try:
        if not context.ranks.mesh.is_writer:
            context.ranks.follow()
            return {}
        return _run(context)
    finally:
        context.close()


def _run(context: AlignmentContext) -> dict[str, Any]:
    recipe, source = context.recipe, context.source
    judged = recipe.world or recipe.pipelines.instructions or source.ratings() or any(p.truth is not None for p in source.prompts())
    if not judged:
        raise InputError("Nothing can judge answers: give data.ratings for a reward model, or data.prompts with known answers.")
    state = _data(context)
    _base(context, state)
    if state.ratings:
        _reward(context, state)
    current = "demonstrations" if state.demonstrations else BASE_ROW
    if state.demonstrations:
        first = _train(context, state, current, 0, recipe.demonstration_sft, context.base_folder, state.demonstrations)
    else:
        first = context.engine(BASE_ROW, context.base_folder)  # taken for an Instruct
    _check_reward(context, state, first)
    monitors.measure(context, state, current, 0)
    measure(context, state, current, "each_round")
    stopped = None
    for number in range(1, context.recipe.rounds + 1):
        try:
            current = _round(context, state, number, current)
        except RoundEnded as e:
            stopped = str(e)
            state.alarms.append(e.alarm)
            break
        alarms = monitors.measure(context, state, current, number)
        measure(context, state, current, "each_round")
        if len(alarms) >= context.recipe.collapse.stop:
            stopped = f"round {number}: {', '.join(alarms)}"
            state.alarms.append(collapsed(f"r{number}-monitors", alarms))
            break
    return _results(context, state, stopped)


# ---- before the first round ----


def _data(context: AlignmentContext) -> State:
    recipe = context.recipe

    def work(folder: Path) -> dict[str, Any]:
        demonstrations, ratings = context.source.demonstrations(), context.source.ratings()
        asked = [(d.id, d.messages[:-1]) for d in demonstrations] + [(r.id, r.messages[:-1]) for r in ratings]
        for name, messages in asked:
            if contaminated(messages, context.evaluated):
                raise InputError(f"Human row {name} asks what the evaluation asks: take it out of one of the two files.")
        whole = [d.messages for d in demonstrations if not d.parents] + [r.messages for r in ratings]
        long = [messages for messages in whole if not context.holds(messages)]
        if long:
            raise InputError(
                f"{len(long)} human rows have more than the {context.max_positions} tokens of the model's context, the first is "
                f"{long[0][0].content[:60]!r}: take them out or shorten them."
            )
        artifacts.HUMAN_DEMONSTRATIONS.write(folder, demonstrations)
        artifacts.RATINGS.write(folder, ratings)
        artifacts.EVALUATION.write(folder, context.evaluation)
        return {"demonstrations": len(demonstrations), "ratings": len(ratings), "evaluation": len(context.evaluation)}

    used = [k for k in ("demonstrations", "ratings", "evaluation") if getattr(recipe.data, k) is not None]
    files = {k: hashlib.blake2b(getattr(recipe.data, k).read_bytes()).hexdigest() for k in used}
    inputs = [
        context.parts("world", "seed", "chat_format", *(f"data.num_{k}" for k in NUM_HUMAN)),
        files,
        make_id([p.id for p in context.evaluation]),
        "" if recipe.world else context.templates["task_prompt"].text,  # of the demonstrations of prompt writing
        context.base_fingerprint,
    ]
    done = context.run.stage("data", inputs, work, artifacts=HUMAN)
    folder = done.folder
    demonstrations = artifacts.HUMAN_DEMONSTRATIONS.read(folder)
    ratings = artifacts.RATINGS.read(folder)
    state = State(demonstrations, ratings, {"data": done.fingerprint})
    state.seen = {normalize_prompt(d.messages[:-1]) for d in demonstrations}
    return state


def _base(context: AlignmentContext, state: State) -> None:
    """Row 0: the model as it was given, asked as all models of the run are."""

    def work(folder: Path) -> dict[str, Any]:
        scores = _evaluate(context, context.engine(BASE_ROW, context.base_folder), folder)
        return {**scores, "asked": f"in the chat format {context.format.name}, as every model of the run, also where it never saw one"}

    done = context.run.stage(BASE_ROW, [state.made["data"], context.parts(*ASKED)], work, artifacts=MODEL_FILES, beside=True)
    state.made[BASE_ROW] = done.fingerprint
    state.models[BASE_ROW] = context.base_folder
    row = {"name": BASE_ROW, "round": 0, "model": str(context.base_folder), "folder": done.folder.name}
    state.stages.append(row | _scores(done.summary))
    measure(context, state, BASE_ROW, "each_stage")


def _reward(context: AlignmentContext, state: State) -> None:
    rows, _ = split_ratings(context, state)
    settings = [context.recipe.reward.model_dump(), list(context.weights), state.made["data"]]

    def work(folder: Path) -> dict[str, Any]:
        return train_stage(context, "reward", context.base_folder, rows, context.recipe.reward, folder)

    done = context.run.stage("reward", settings, work, files=TRAINED)
    _watch_steps(context, state, "reward", done.summary, context.recipe.reward)
    state.reward_folder = done.folder / MODEL
    state.made["reward"] = done.fingerprint


def _check_reward(context: AlignmentContext, state: State, instruct: Engine) -> None:
    """Measure the reward model, and the first Instruct as an LLM judge on the same pairs."""
    if state.reward_folder is None:
        return

    def work(folder: Path) -> dict[str, Any]:
        assert state.reward_folder is not None
        scorer = context.scorer(state.reward_folder)
        _, held = split_ratings(context, state)
        rater = LocalRater(context.ranks.shared_scorer(state.reward_folder), context.progress.tick)
        ratings = asyncio.run(rater.rate({r.id: r.messages for r in held}))
        by_id = {name: scorer.total(rating) for name, rating in ratings.items()}

        async def keep(rows: list[Response], judges: Judges) -> list[Response]:
            return rows

        client = context.engine_client(instruct)
        seed = context.recipe.seed
        answers = answer(context, client, context.evaluation, seed, folder=folder, reward_folder=state.reward_folder, work=keep)
        easy = reward_bench.easy_pairs(held)
        hard = reward_bench.hard_pairs([r for r in answers if r.verified is not None], 60)
        sides = {
            "easy": [(a.task, a.messages[:-1], a.messages[-1].content, b.messages[-1].content, by_id[a.id], by_id[b.id]) for a, b in easy],
            "hard": [(a.task, a.messages, a.text, b.text, a.score or 0.0, b.score or 0.0) for a, b in hard],
        }
        out: dict[str, Any] = {"correlation": reward_bench.correlations(held, [ratings[r.id] for r in held]), "llm_judge": {}}
        for name, pairs in sides.items():
            tasks = [p[0] for p in pairs]
            out[name] = reward_bench.pair_accuracy(tasks, [good > bad for *_, good, bad in pairs])
            comparisons = [Comparison(f"{name}-{i}", p[1], p[2], p[3]) for i, p in enumerate(pairs)]
            verdicts: dict[str, Verdict] = dict.fromkeys((c.id for c in comparisons), "unparsed")
            verdicts |= {c.id: v for c, v in compare(instruct, [c for c in comparisons if _readable(context, c)])}
            out["llm_judge"][name] = reward_bench.judge_accuracy(tasks, comparisons, verdicts)
        return out

    parts = context.parts("answers", "engine.precision", "judging.reward")
    done = context.run.stage("reward-check", [state.of("reward", "demonstrations"), parts], work, artifacts=[artifacts.RESPONSES])
    context.reward_report = {k: done.summary[k] for k in ("easy", "hard", "llm_judge", "correlation")}


def _readable(context: AlignmentContext, c: Comparison) -> bool:
    """Whether a judge has room for both answers at once."""
    request = "\n".join(f"{m.role}: {m.content}" for m in c.messages)
    return context.holds((Message("user", TEMPLATE.format(request=request, a=c.first, b=c.second)), Message("assistant", "A")))


# ---- one round ----


def _round(context: AlignmentContext, state: State, number: int, generator: str) -> str:
    """One round; returns the name of its last model."""
    recipe, human_only = context.recipe, context.recipe.control == "human-only"
    take_said(context, state, number)
    client = context.client(number, state.models, generator)
    prompts, whole = ([], []) if human_only else _prompts(context, state, number, client, generator)
    code, general, answers = _answers(context, state, number, client, generator, prompts, whole)
    human_code = [d for d in state.demonstrations if d.task in context.source.code_tasks]
    start = context.base_folder
    rows = code if recipe.control == "replace" else [*human_code, *code]
    if 0 < len(rows) < CODE_ROWS_MIN:
        state.alarms.append(code_left_out(f"r{number}-code-sft", len(rows), CODE_ROWS_MIN))
    elif rows:
        _train(context, state, f"r{number}-code-sft", number, recipe.code_sft, start, rows)
        start = state.models[f"r{number}-code-sft"]
    repeat = _repeat(code, recipe.judging.code_share, len(general), number)
    by_people = [*state.demonstrations, *state.said.demonstrations]
    rows = [*general, *repeat] if recipe.control == "replace" else [*by_people, *general, *repeat]
    if not rows:
        alone = f"control {recipe.control} trains on nothing else" if recipe.control == "replace" else "there are no demonstrations"
        raise InputError(f"Round {number} kept no answer, and {alone}: ask for more prompts, or look at its answers.")
    current = f"r{number}-general-sft"
    # Demonstrations alone are few: passes that suit a blend with synthetic rows would teach next to nothing.
    _train(context, state, current, number, recipe.demonstration_sft if human_only else recipe.general_sft, start, rows)
    stages: list[tuple[str, PreferenceTraining]] = [("dpo", recipe.dpo)]
    stages += [(f"rpo{i}", recipe.rpo) for i in range(1, recipe.rpo_iterations + 1)]
    for i, (name, settings) in enumerate(stages):
        pool = contested(prompts, answers, settings.num_prompts)
        offset = i * settings.num_prompts
        chosen = [pool[(offset + k) % len(pool)] for k in range(min(settings.num_prompts, len(pool)))]
        client = context.engine_client(context.engine(current, state.models[current]))
        if human_only:
            pairs = _human_pairs(split_ratings(context, state)[0], settings.num_pairs, seed=number * 100 + i)
        else:
            pairs = _pairs(context, state, f"r{number}-{name}-pairs", client, chosen, current=current, settings=settings)
        pairs = [*pairs, *state.said.pairs]
        if not pairs:  # the model stays as it is
            if human_only:
                why = {"rated answers, none better than the other to its prompt": len(state.ratings)}
                state.alarms.append(no_pairs(f"r{number}-{name}", why))
            continue
        num_human = len(pairs) if human_only else len(state.said.pairs)
        state.pairs += len(pairs) - num_human
        state.human_pairs += num_human
        _prefer(context, state, f"r{number}-{name}", number, settings, state.models[current], pairs)
        current = f"r{number}-{name}"
    return current


def _prompts(
    context: AlignmentContext, state: State, number: int, client: Client, generator: str
) -> tuple[list[Prompt], list[Demonstration]]:
    """This round's prompts, and conversations that were written whole."""
    recipe = context.recipe
    inputs = [
        state.of("data", *state.rounds_made(number)),
        context.parts("topics", "pipelines", "probe", "answers.temperatures", "control", *ASKED),
        context.templates.identity,
        number,
        context.who(number, state.made, generator),
        [[p.id, p.truth] for p in context.source.prompts()],
        make_id(sorted(context.held_out)),
    ]
    answered = set() if recipe.control == "replace" else {parent for d in state.synthetic for parent in d.parents}

    def work(folder: Path) -> dict[str, Any]:
        return write_prompts(context, client, number, seen=state.seen, answered=answered, folder=folder)

    done = context.run.stage(f"r{number}-prompts", inputs, work, artifacts=PROMPT_FILES)
    prompts = artifacts.PROMPTS.read(done.folder)
    state.seen |= {normalize_prompt(p.messages) for p in prompts}
    state.made[f"r{number}-prompts"] = done.fingerprint
    if probe := done.summary.get("probe"):
        state.alarms.append(unusable_prompts(f"r{number}-prompts", probe))
    if not prompts:
        raise RoundEnded(f"round {number}: no prompts", no_prompts(f"r{number}-prompts"))
    return prompts, artifacts.CONVERSATIONS.read(done.folder)


def _answers(
    context: AlignmentContext,
    state: State,
    number: int,
    client: Client,
    generator: str,
    prompts: Sequence[Prompt],
    whole: Sequence[Demonstration],
) -> tuple[list[Demonstration], list[Demonstration], list[Response]]:
    """Kept answers of this round (and, unless replaced, of earlier ones): for code SFT, and for general SFT. And all of this one's."""
    recipe, judging, code_tasks = context.recipe, context.recipe.judging, context.source.code_tasks
    answers: list[Response] = []
    if prompts:

        def work(folder: Path) -> dict[str, Any]:
            async def keep(rows: list[Response], judges: Judges) -> dict[str, Any]:
                quotas = dict.fromkeys(code_tasks, judging.max_code_per_task)
                topics = {p.id: p.parents[-1] for p in prompts if p.parents}
                asked = {p.id: instructions_of(p.truth) for p in prompts}
                kept, funnel = select(rows, judging, number, control=recipe.control, topics=topics, quotas=quotas, instructions=asked)
                kept += [*prompt_demonstrations(prompts, kept, judging.max_prompts_per_task), *whole]
                artifacts.KEPT.write(folder, kept)
                edited = {r.id for r in rows if r.edits}
                repaired = {"repaired": sum(d.parents[0] in edited for d in kept)} if judging.repair else {}
                return {"funnel": funnel, "kept": len(kept), **repaired, **judges.left_out()}

            seed, repair = recipe.seed * 1000 + number, judging.repair is not None
            return answer(context, client, prompts, seed, folder=folder, reward_folder=state.reward_folder, work=keep, repair=repair)

        inputs = [
            state.of("reward", f"r{number}-prompts"),
            context.parts("answers", "engine.precision", "control"),
            context.judging_parts(without=OF_PAIRS),
            context.who(number, state.made, generator),
        ]
        done = context.run.stage(f"r{number}-answers", inputs, work, artifacts=[*KEPT_FILES, artifacts.CALLS])
        kept = checked(context, state, number, artifacts.KEPT.read(done.folder))
        answers = artifacts.RESPONSES.read(done.folder)
        if not done.summary["kept"]:
            state.alarms.append(kept_nothing(f"r{number}-answers", done.summary["funnel"]))
        state.synthetic = kept if recipe.control == "replace" else [*state.synthetic, *kept]
        repaired = done.summary.get("repaired", 0)
        state.repaired = repaired if recipe.control == "replace" else state.repaired + repaired
        state.made[f"r{number}-answers"] = done.fingerprint
    code = [d for d in state.synthetic if d.task in code_tasks]
    return code, [d for d in state.synthetic if d.task not in code_tasks], answers


def _repeat(code: list[Demonstration], share: float, num_general: int, number: int) -> list[Demonstration]:
    """Code-SFT rows that general SFT sees again against forgetting: `share` of its blend."""
    count = min(len(code), round(share * num_general / (1 - share))) if share < 1 else len(code)
    return random.Random(number).sample(code, count)


def _pairs(
    context: AlignmentContext,
    state: State,
    name: str,
    client: Client,
    prompts: Sequence[Prompt],
    *,
    current: str,
    settings: PreferenceTraining,
) -> list[Pair]:
    def work(folder: Path) -> dict[str, Any]:
        seed = context.recipe.seed * 1000 + len(context.run.stages)
        pairs, facts = answer_pairs(context, client, prompts, settings, seed, folder=folder, reward_folder=state.reward_folder)
        pairs = pairs[: settings.num_pairs]
        artifacts.PAIRS.write(folder, pairs)
        return {**facts, "pairs": len(pairs)}

    round_ = name.split("-")[0]
    inputs = [
        state.of("reward", current, f"{round_}-prompts", f"{round_}-answers"),
        context.parts("answers", "engine.precision", "control"),
        context.judging_parts(without=OF_ROWS),
        [p.id for p in prompts],
        settings.num_pairs,
        settings.keep_chosen,
        len(context.run.stages),  # which the seed is made of
        *([settings.temperatures] if settings.temperatures else []),
    ]
    done = context.run.stage(name, inputs, work, artifacts=[*PAIR_FILES, artifacts.CALLS])
    state.made[name] = done.fingerprint
    pairs = artifacts.PAIRS.read(done.folder)
    if not pairs and not state.said.pairs:
        state.alarms.append(no_pairs(name, done.summary["funnel"]))
    return pairs


def _human_pairs(ratings: Sequence[Rated], most: int, seed: int) -> list[Pair]:
    """Pairs of rated answers, the more helpful first, ties dropped (HelpSteer2's DPO); at most `most` of them, drawn by seed."""
    groups: dict[str, list[Rated]] = {}
    for r in ratings:
        groups.setdefault(r.pair, []).append(r)
    out = []
    for group in groups.values():
        if len(group) != 2 or None in (group[0].labels[0], group[1].labels[0]):
            continue
        worse, better = sorted(group, key=lambda r: r.labels[0] or 0.0)
        high, low = better.labels[0] or 0.0, worse.labels[0] or 0.0
        if high > low and better.messages[-1] != worse.messages[-1]:
            out.append(
                Pair(
                    make_id("human", better.id, worse.id),
                    better.pair,
                    better.task,
                    better.messages[:-1],
                    better.messages[-1].content,
                    worse.messages[-1].content,
                    high,
                    low,
                    "human",
                    (better.id, worse.id),
                )
            )
    return out if len(out) <= most else random.Random(seed).sample(out, most)


def _train(
    context: AlignmentContext, state: State, name: str, number: int, settings: Training, start: Path, rows: Sequence[Demonstration]
) -> Engine:
    def work(folder: Path) -> dict[str, Any]:
        return {**train_stage(context, "sft", start, rows, settings, folder), "human_rows": sum(r.origin == "human" for r in rows)}

    # an answer's id says who was asked what, so what made the rows must be said too
    sources = [f"r{i}-{stage}" for i in range(1, number + 1) for stage in ("answers", "check", "people")]
    begun = next((stage for stage, folder in state.models.items() if folder == start), BASE_ROW)
    inputs = [state.of("data", *sources, begun), settings.model_dump(), make_id([r.id for r in rows])]
    return _model_stage(context, state, name, number, inputs, work, settings)


def _prefer(
    context: AlignmentContext, state: State, name: str, number: int, settings: PreferenceTraining, start: Path, pairs: Sequence[Pair]
) -> Engine:
    begun = next(stage for stage, folder in state.models.items() if folder == start)
    inputs = [state.of("data", begun, f"{name}-pairs", f"r{number}-people"), settings.model_dump(), make_id([p.id for p in pairs])]

    def work(folder: Path) -> dict[str, Any]:
        return train_stage(context, settings.loss, start, pairs, settings, folder)

    return _model_stage(context, state, name, number, inputs, work, settings)


def _watch_steps(context: AlignmentContext, state: State, name: str, done: dict[str, Any], settings: Training) -> None:
    state.alarms += few_steps(name, done["steps"], done["rows"], settings=settings, min_steps=context.recipe.alarms.min_steps)


def _model_stage(context: AlignmentContext, state: State, name: str, number: int, inputs: Any, work: Any, settings: Training) -> Engine:
    """Train, then evaluate on the held-out prompts."""

    def trained(folder: Path) -> dict[str, Any]:
        facts = work(folder)
        return {**facts, **_evaluate(context, context.engine(name, folder / MODEL), folder)}

    done = context.run.stage(name, [inputs, context.parts(*ASKED)], trained, artifacts=MODEL_FILES, files=TRAINED)
    _watch_steps(context, state, name, done.summary, settings)
    folder = done.folder
    state.models[name] = folder / MODEL
    state.made[name] = done.fingerprint
    row = {"name": name, "round": number, "model": f"{folder.name}/{MODEL}", "folder": folder.name}
    state.stages.append(row | _scores(done.summary))
    measure(context, state, name, "each_stage")
    return context.engine(name, folder / MODEL)


def _evaluate(context: AlignmentContext, engine: Engine, folder: Path) -> dict[str, Any]:
    """Accuracy on the held-out prompts; the outcomes go to the stage's folder."""
    num_weak = 0

    def check(cases: list[tuple[dict[str, Any], str]]) -> list[bool]:
        nonlocal num_weak
        right = context.verifier.verify(cases)
        num_weak = context.verifier.num_weak(cases, right)
        return right

    scores = evaluate_model(
        context.evaluation,
        lambda requests: context.generate(engine, requests, folder / artifacts.EVALUATION_CALLS.file),
        check,
        max_tokens=context.recipe.answers.max_tokens,
        seed=context.recipe.seed,
    )
    artifacts.OUTCOMES.write(folder, scores.pop("outcomes"))
    return scores | ({"weak": num_weak} if num_weak else {})


def _scores(summary: dict[str, Any]) -> dict[str, Any]:
    """What results hold of an evaluation."""
    return {key: summary[key] for key in (*MODES, "asked", "weak") if key in summary}


# ---- the end ----


def _results(context: AlignmentContext, state: State, stopped: str | None) -> dict[str, Any]:
    best = choose_best(context, state)
    for row in state.stages:
        if row["name"] in (best["name"], state.stages[-1]["name"]):
            measure(context, state, row["name"], "end")
    catch_up(context, state)
    human = len(state.demonstrations) + len(state.said.demonstrations) + state.human_pairs
    synthetic = len(state.synthetic) + state.pairs
    ratings = len(state.ratings) + len(state.said.ratings)
    done = [read_json(context.run.path / s / "done.json") for s in [*context.run.beside, *context.run.stages]]
    seconds = sum(s["seconds"] for s in done)
    num_weak = sum(s.get("weak", 0) for s in done)
    left_out = sum((Counter(s.get("left_out", {})) for s in done), Counter[str]())
    results = {
        "name": context.recipe.name,
        "control": context.recipe.control,
        "seed": context.recipe.seed,
        "chat_format": context.format.name,
        "seconds": round(seconds, 1),
        "synthetic_share": round(synthetic / max(1, human + synthetic), 4),
        "alignment_samples": {"human": human, "synthetic": synthetic, "human_ratings": ratings}
        | ({"repaired": state.repaired} if context.recipe.judging.repair else {}),
        "stages": state.stages,
        "best": best,
        "reward": context.reward_report,
        "collapse": state.collapse,
        "stopped": stopped,
        "alarms": state.alarms,
        **{STAGE_OF[kind]: measured_rows(state, kind) for kind in STAGE_OF if getattr(context.recipe, kind) is not None},
        **({"weak": num_weak} if num_weak else {}),  # verdicts of the evaluations that rest on what programs say of themselves
        **({"left_out": dict(left_out)} if left_out else {}),  # calls without a field that an endpoint refused, by field
    }
    return context.run.finish(results)
