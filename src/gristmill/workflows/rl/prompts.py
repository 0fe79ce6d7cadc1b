"""Prompts of a run, those of its evaluation, and the files of a user that reward answers to them."""

from collections.abc import Sequence
from pathlib import Path

from gristmill.core.errors import InputError
from gristmill.core.io import read_bytes, read_json, write_json
from gristmill.data.chat_format import ChatFormat
from gristmill.data.human import HumanData
from gristmill.data.readers import read_prompts
from gristmill.data.rows import Prompt, make_id
from gristmill.data.tokenizer import Tokenizer
from gristmill.miniature.source import MiniatureSource
from gristmill.model.hf import fingerprint
from gristmill.workflows.alignment.source import normalize_prompt
from gristmill.workflows.rl.environments import Tasks
from gristmill.workflows.rl.recipe import Rewards, RlRecipe

SOURCES = "rewards.json"  # in the stage's folder: what rewards were made by
HELD_OUT = 0.2  # share of an environment's rows that the evaluation takes where it has no set for that


def find_prompts(recipe: RlRecipe, environment: Tasks | None) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts that are trained on, and those of the evaluation.

    Raises:
        InputError: a file cannot be used, nothing can judge a prompt, or the evaluation asks it too.
    """
    prompts, evaluation = _read(recipe, environment)
    data = recipe.data
    if data.tasks:
        prompts, evaluation = ([p for p in rows if p.task in data.tasks] for rows in (prompts, evaluation))
        if not prompts or not evaluation:
            raise InputError(f"There are no prompts of the tasks {', '.join(data.tasks)}: look at data.tasks.")
    if not prompts or not evaluation:
        raise InputError(f"There are {len(prompts)} prompts to train on and {len(evaluation)} to evaluate with: give more rows.")
    check_steps(recipe.rewards, prompts)
    asked = {normalize_prompt(p.messages) for p in evaluation}
    for number, prompt in enumerate(prompts, 1):
        named = f"Prompt {number} ({prompt.messages[-1].content[:60]!r})"
        if prompt.truth is None and not recipe.rewards.judges_all and environment is None:
            raise InputError(
                f"{named} has no answer, truth or tests, and rewards have no reward_model, judge or functions: nothing can judge it."
            )
        if prompt.truth is None and recipe.curriculum is not None:
            raise InputError(f"{named} has no answer, truth or tests, which a pass rate is told by: leave curriculum out, or the prompt.")
        if normalize_prompt(prompt.messages) in asked:
            raise InputError(f"{named} is asked by the evaluation too: take it out of one.")
    return prompts, evaluation


def check_steps(rewards: Rewards, prompts: Sequence[Prompt]) -> None:
    """InputError where steps are to be rewarded and no prompt has any."""
    if rewards.supervision == "process" and not any((p.truth or {}).get("steps") for p in prompts):
        raise InputError("rewards.supervision is process, and no prompt has a truth with `steps`: give some, or leave supervision out.")


def check_room(prompts: Sequence[Prompt], form: ChatFormat, tokenizer: Tokenizer, *, max_tokens: int, context: int) -> None:
    """InputError where a prompt leaves no room for an answer of so many tokens."""
    for prompt in prompts:
        if len(form.render_prompt(prompt.messages, tokenizer)) + max_tokens > context:
            raise InputError(
                f"Prompt {prompt.messages[-1].content[:60]!r} leaves no room for an answer of {max_tokens} tokens in the "
                f"model's context of {context}: take it out, or lower max_tokens."
            )


def _read(recipe: RlRecipe, environment: Tasks | None) -> tuple[list[Prompt], list[Prompt]]:
    data = recipe.data
    if recipe.world is not None:
        source = MiniatureSource(HumanData(num_prompts=data.num_prompts, num_evaluation=data.num_evaluation), recipe.seed)
        return [p for p in source.prompts() if p.truth is not None], source.evaluation()
    if environment is not None:
        prompts, evaluation = environment.prompts, environment.evaluation
        if data.evaluation is None and not evaluation:
            held_out = min(data.num_evaluation or len(prompts), max(1, round(HELD_OUT * len(prompts))))
            prompts, evaluation = prompts[:-held_out], prompts[-held_out:]
    else:
        assert data.prompts is not None
        prompts, evaluation = read_prompts(data.prompts, "file"), []
    if data.evaluation is not None:
        evaluation = read_prompts(data.evaluation, "human", truth=True)
    else:  # who judges these is told their rows
        evaluation = [Prompt(p.id, p.task, p.messages, p.origin, truth=p.meta) for p in evaluation]
    return prompts[: data.num_prompts], _of_each_task(evaluation, data.num_evaluation)


def _of_each_task(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    tasks = dict.fromkeys(p.task for p in prompts)
    return [p for task in tasks for p in [q for q in prompts if q.task == task][:limit]]


# ---- what rewards are made by ----


def source_stamps(recipe: RlRecipe) -> dict[str, str]:
    """Hashes of the files and models that reward answers, by their paths."""
    rewards, environment = recipe.rewards, recipe.environment
    files = [function.file for function in rewards.functions]
    files += [path for path in (environment.verifiers, environment.nemo_gym) if path is not None] if environment else []
    models = [part.folder for part in (rewards.reward_model, rewards.judge) if part is not None and part.folder is not None]
    return {str(path): make_id(read_bytes(path).hex()) for path in files} | {str(folder): fingerprint(folder) for folder in models}


def check_sources(folder: Path, stamps: dict[str, str]) -> None:
    """Raise `InputError` where a file or model that rewards is another than when the stage in `folder` began; write down what it is.

    Rewards of two kinds in one run would teach neither.
    """
    path = folder / SOURCES
    begun = read_json(path) if path.exists() else {}
    if changed := [name for name, stamp in stamps.items() if begun.get(name, stamp) != stamp]:
        raise InputError(f"{changed[0]} has changed since this run began: put it back, or choose another folder with --out.")
    if stamps:
        write_json(path, stamps)
