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
from gristmill.runs import artifacts
from gristmill.train.settings import PreferenceTraining, Training
from gristmill.workflows.alignment import monitors
from gristmill.workflows.alignment.alarms import code_left_out, collapsed, few_steps, kept_nothing, no_pairs
from gristmill.workflows.alignment.answering import answer, answer_pairs, prompt_demonstrations
from gristmill.workflows.alignment.context import AlignmentContext
from gristmill.workflows.alignment.prompt_generation import write_prompts
from gristmill.workflows.alignment.recipe import AlignmentRecipe
from gristmill.workflows.alignment.source import contaminated, normalize_prompt
from gristmill.workflows.alignment.state import State
from gristmill.workflows.alignment.training import train_stage
from gristmill.workflows.dataset.steps import KEPT_FILES, PAIR_FILES, PROMPT_FILES
from gristmill.workflows.train import MODEL

CODE_ROWS_MIN = 8
HUMAN: list[artifacts.AnyArtifact] = [artifacts.HUMAN_DEMONSTRATIONS, artifacts.RATINGS, artifacts.EVALUATION]
MODEL_FILES: list[artifacts.AnyArtifact] = [artifacts.OUTCOMES, artifacts.EVALUATION_CALLS]


def run(recipe: AlignmentRecipe, folder: Path, progress: Progress, unsafe_code: bool = False) -> dict[str, Any]:
    """Turn the mill, from the start or from where an earlier start was cut off. Returns what `results.json` holds.

    Raises:
        InputError: bad input, before work is spent.
    """
    context = AlignmentContext(recipe, folder, progress, unsafe_code)
    try:
        return _run(context)
    finally:
        context.close()


def _run(context: AlignmentContext) -> dict[str, Any]:
    if context.recipe.world is None and not context.source.ratings() and all(p.truth is None for p in context.source.prompts()):
        raise InputError("Nothing can judge answers: give data.ratings for a reward model, or data.prompts with known answers.")
    state = _data(context)
    if state.ratings:
        _reward(context, state)
    first = _train(context, state, "demonstrations", 0, context.recipe.demonstration_sft, context.base_folder, state.demonstrations)
    _check_reward(context, state, first)
    monitors.measure(context, state, "demonstrations", 0)
    current = "demonstrations"
    stopped = None
    for number in range(1, context.recipe.rounds + 1):
        current = _round(context, state, number, current)
        alarms = monitors.measure(context, state, current, number)
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
            if contaminated(messages, context.held_out):
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

    settings = recipe.model_dump(mode="json", include={"data", "world", "seed"})
    files = {k: hashlib.blake2b(v.read_bytes()).hexdigest() for k, v in recipe.data if isinstance(v, Path)}
    done = context.run.stage("data", [settings, files, context.base_fingerprint], work, artifacts=HUMAN)
    folder = done.folder
    demonstrations = artifacts.HUMAN_DEMONSTRATIONS.read(folder)
    ratings = artifacts.RATINGS.read(folder)
    state = State(demonstrations, ratings, done.fingerprint)
    state.seen = {normalize_prompt(d.messages[:-1]) for d in demonstrations}
    return state


def _split_ratings(context: AlignmentContext, state: State) -> tuple[list[Rated], list[Rated]]:
    """Rows to train the reward model on, and rows to measure it on; both answers to a prompt go the same way."""
    pairs = list(dict.fromkeys(r.pair for r in state.ratings))
    held = set(pairs[len(pairs) - min(context.recipe.data.num_held_out_ratings, len(pairs) // 3) :])
    return [r for r in state.ratings if r.pair not in held], [r for r in state.ratings if r.pair in held]


def _reward(context: AlignmentContext, state: State) -> None:
    rows, _ = _split_ratings(context, state)
    settings = [context.recipe.reward.model_dump(), list(context.weights), state.chain]

    def work(folder: Path) -> dict[str, Any]:
        return train_stage(context, "reward", context.base_folder, rows, context.recipe.reward, folder)

    done = context.run.stage("reward", settings, work, files=[f"{MODEL}/*"])
    _watch_steps(context, state, "reward", done.summary, context.recipe.reward)
    state.reward_folder = done.folder / MODEL
    state.chain = done.fingerprint


def _check_reward(context: AlignmentContext, state: State, instruct: Engine) -> None:
    """Measure the reward model, and the first Instruct as an LLM judge on the same pairs."""
    if state.reward_folder is None:
        return

    def work(folder: Path) -> dict[str, Any]:
        assert state.reward_folder is not None
        scorer = context.scorer(state.reward_folder)
        _, held = _split_ratings(context, state)
        ratings = asyncio.run(LocalRater(scorer, context.progress.tick).rate({r.id: r.messages for r in held}))
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

    inputs = [state.chain, context.recipe.answers.model_dump()]
    done = context.run.stage("reward-check", inputs, work, artifacts=[artifacts.RESPONSES])
    context.reward_report = {k: done.summary[k] for k in ("easy", "hard", "llm_judge", "correlation")}


def _readable(context: AlignmentContext, c: Comparison) -> bool:
    """Whether a judge has room for both answers at once."""
    request = "\n".join(f"{m.role}: {m.content}" for m in c.messages)
    return context.holds((Message("user", TEMPLATE.format(request=request, a=c.first, b=c.second)), Message("assistant", "A")))


# ---- one round ----


def _round(context: AlignmentContext, state: State, number: int, generator: str) -> str:
    """One round; returns the name of its last model."""
    recipe, human_only = context.recipe, context.recipe.control == "human-only"
    client = context.client(number, state.models, generator)
    prompts, whole = ([], []) if human_only else _prompts(context, state, number, client)
    code, general, answers = _answers(context, state, number, client, prompts, whole)
    human_code = [d for d in state.demonstrations if d.task in context.source.code_tasks]
    start = context.base_folder
    rows = code if recipe.control == "replace" else [*human_code, *code]
    if 0 < len(rows) < CODE_ROWS_MIN:
        state.alarms.append(code_left_out(f"r{number}-code-sft", len(rows), CODE_ROWS_MIN))
    elif rows:
        _train(context, state, f"r{number}-code-sft", number, recipe.code_sft, start, rows)
        start = state.models[f"r{number}-code-sft"]
    repeat = _repeat(code, recipe.judging.code_share, len(general), number)
    rows = [*general, *repeat] if recipe.control == "replace" else [*state.demonstrations, *general, *repeat]
    if not rows:
        raise InputError(f"Round {number} kept no answer, and control {recipe.control} trains on nothing else: ask for more prompts.")
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
            pairs = _human_pairs(_split_ratings(context, state)[0], settings.num_pairs, seed=number * 100 + i)
        else:
            pairs = _pairs(context, state, f"r{number}-{name}-pairs", client, chosen, settings)
        if not pairs:  # the model stays as it is
            if human_only:
                why = {"rated answers, none better than the other to its prompt": len(state.ratings)}
                state.alarms.append(no_pairs(f"r{number}-{name}", why))
            continue
        state.pairs += 0 if human_only else len(pairs)
        state.human_pairs += len(pairs) if human_only else 0
        _prefer(context, state, f"r{number}-{name}", number, settings, state.models[current], pairs)
        current = f"r{number}-{name}"
    return current


def _prompts(context: AlignmentContext, state: State, number: int, client: Client) -> tuple[list[Prompt], list[Demonstration]]:
    """This round's prompts, and conversations that were written whole."""
    recipe = context.recipe
    writing = recipe.model_dump(mode="json", include={"templates", "topics", "pipelines"})
    inputs = [state.chain, writing, recipe.control, number, [g.identity for g in context.generators(number)]]
    answered = set() if recipe.control == "replace" else {parent for d in state.synthetic for parent in d.parents}

    def work(folder: Path) -> dict[str, Any]:
        return write_prompts(context, client, number, seen=state.seen, answered=answered, folder=folder)

    done = context.run.stage(f"r{number}-prompts", inputs, work, artifacts=PROMPT_FILES)
    prompts = artifacts.PROMPTS.read(done.folder)
    state.seen |= {normalize_prompt(p.messages) for p in prompts}
    state.chain = done.fingerprint
    if not prompts:
        raise InputError(f"Round {number} has no prompts left: see the funnel in {done.folder}/done.json.")
    return prompts, artifacts.CONVERSATIONS.read(done.folder)


def _answers(
    context: AlignmentContext, state: State, number: int, client: Client, prompts: Sequence[Prompt], whole: Sequence[Demonstration]
) -> tuple[list[Demonstration], list[Demonstration], list[Response]]:
    """Kept answers of this round (and, unless replaced, of earlier ones): for code SFT, and for general SFT. And all of this one's."""
    recipe, judging, code_tasks = context.recipe, context.recipe.judging, context.source.code_tasks
    answers: list[Response] = []
    if prompts:

        def work(folder: Path) -> dict[str, Any]:
            async def keep(rows: list[Response], judges: Judges) -> dict[str, Any]:
                quotas = dict.fromkeys(code_tasks, judging.max_code_per_task)
                topics = {p.id: p.parents[-1] for p in prompts if p.parents}
                kept, funnel = select(rows, judging, number, control=recipe.control, topics=topics, quotas=quotas)
                kept += [*prompt_demonstrations(prompts, kept, judging.max_prompts_per_task), *whole]
                artifacts.KEPT.write(folder, kept)
                return {"funnel": funnel, "kept": len(kept), **judges.left_out()}

            seed = recipe.seed * 1000 + number
            return answer(context, client, prompts, seed, folder=folder, reward_folder=state.reward_folder, work=keep)

        generators = [g.identity for g in context.generators(number)]
        inputs = [state.chain, recipe.answers.model_dump(), judging.model_dump(mode="json"), generators]
        done = context.run.stage(f"r{number}-answers", inputs, work, artifacts=[*KEPT_FILES, artifacts.CALLS])
        kept = artifacts.KEPT.read(done.folder)
        answers = artifacts.RESPONSES.read(done.folder)
        if not kept:
            state.alarms.append(kept_nothing(f"r{number}-answers", done.summary["funnel"]))
        state.synthetic = kept if recipe.control == "replace" else [*state.synthetic, *kept]
        state.chain = done.fingerprint
    code = [d for d in state.synthetic if d.task in code_tasks]
    return code, [d for d in state.synthetic if d.task not in code_tasks], answers


def _repeat(code: list[Demonstration], share: float, num_general: int, number: int) -> list[Demonstration]:
    """Code-SFT rows that general SFT sees again against forgetting: `share` of its blend."""
    count = min(len(code), round(share * num_general / (1 - share))) if share < 1 else len(code)
    return random.Random(number).sample(code, count)


def _pairs(
    context: AlignmentContext, state: State, name: str, client: Client, prompts: Sequence[Prompt], settings: PreferenceTraining
) -> list[Pair]:
    def work(folder: Path) -> dict[str, Any]:
        seed = context.recipe.seed * 1000 + len(context.run.stages)
        pairs, facts = answer_pairs(context, client, prompts, settings, seed, folder=folder, reward_folder=state.reward_folder)
        pairs = pairs[: settings.num_pairs]
        artifacts.PAIRS.write(folder, pairs)
        return {**facts, "pairs": len(pairs)}

    inputs = [
        state.chain,
        context.recipe.answers.model_dump(),
        context.recipe.judging.model_dump(mode="json"),
        settings.num_prompts,
        settings.num_pairs,
        settings.keep_chosen,
    ]
    done = context.run.stage(name, inputs, work, artifacts=[*PAIR_FILES, artifacts.CALLS])
    state.chain = done.fingerprint
    pairs = artifacts.PAIRS.read(done.folder)
    if not pairs:
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

    inputs = [state.chain, settings.model_dump(), make_id([r.id for r in rows]), str(start.name)]
    return _model_stage(context, state, name, number, inputs, work, settings)


def _prefer(
    context: AlignmentContext, state: State, name: str, number: int, settings: PreferenceTraining, start: Path, pairs: Sequence[Pair]
) -> Engine:
    inputs = [state.chain, settings.model_dump(), make_id([p.id for p in pairs])]

    def work(folder: Path) -> dict[str, Any]:
        return train_stage(context, settings.loss, start, pairs, settings, folder)

    return _model_stage(context, state, name, number, inputs, work, settings)


def _watch_steps(context: AlignmentContext, state: State, name: str, done: dict[str, Any], settings: Training) -> None:
    alarm = few_steps(name, done["steps"], done["rows"], settings=settings, min_steps=context.recipe.alarms.min_steps)
    state.alarms += [alarm] if alarm else []


def _model_stage(context: AlignmentContext, state: State, name: str, number: int, inputs: Any, work: Any, settings: Training) -> Engine:
    """Train, then evaluate on the held-out prompts."""

    def trained(folder: Path) -> dict[str, Any]:
        facts = work(folder)
        engine = context.engine(name, folder / MODEL)
        num_weak = 0

        def check(cases: list[tuple[dict[str, Any], str]]) -> list[bool]:
            nonlocal num_weak
            right = context.verifier.verify(cases)
            num_weak = context.verifier.num_weak(cases, right)
            return right

        scores = evaluate_model(
            context.evaluation,
            lambda requests: context.generate(engine, requests, folder / "evaluation.jsonl"),
            check,
            max_tokens=context.recipe.answers.max_tokens,
            seed=context.recipe.seed,
        )
        artifacts.OUTCOMES.write(folder, scores.pop("outcomes"))
        return {**facts, **scores, **({"weak": num_weak} if num_weak else {})}

    done = context.run.stage(name, [inputs, context.recipe.answers.max_tokens], trained, artifacts=MODEL_FILES, files=[f"{MODEL}/*"])
    _watch_steps(context, state, name, done.summary, settings)
    folder = done.folder
    state.models[name] = folder / MODEL
    state.chain = done.fingerprint
    told = {key: done.summary[key] for key in (*MODES, "weak") if key in done.summary}
    state.stages.append({"name": name, "round": number, "model": f"{folder.name}/{MODEL}", **told})
    return context.engine(name, folder / MODEL)


# ---- the end ----


def _results(context: AlignmentContext, state: State, stopped: str | None) -> dict[str, Any]:
    human, synthetic = len(state.demonstrations) + state.human_pairs, len(state.synthetic) + state.pairs
    done = [read_json(context.run.path / s / "done.json") for s in context.run.stages]
    seconds = sum(s["seconds"] for s in done)
    num_weak = sum(s.get("weak", 0) for s in done)
    left_out = sum((Counter(s.get("left_out", {})) for s in done), Counter[str]())
    results = {
        "name": context.recipe.name,
        "control": context.recipe.control,
        "seed": context.recipe.seed,
        "seconds": round(seconds, 1),
        "synthetic_share": round(synthetic / max(1, human + synthetic), 4),
        "alignment_samples": {"human": human, "synthetic": synthetic, "human_ratings": len(state.ratings)},
        "stages": state.stages,
        "reward": context.reward_report,
        "collapse": state.collapse,
        "stopped": stopped,
        "alarms": state.alarms,
        **({"weak": num_weak} if num_weak else {}),  # verdicts of the evaluations that rest on what programs say of themselves
        **({"left_out": dict(left_out)} if left_out else {}),  # calls without a field that an endpoint refused, by field
    }
    return context.run.finish(results)
