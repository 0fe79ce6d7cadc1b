"""Judged benchmarks: MT-Bench, Arena-Hard, AlpacaEval 2, a judge's agreement with people, reward benchmarks.

Answers and verdicts are journalled as they arrive, in a folder: a killed run goes on, nothing is asked twice, and scores are made anew
from what was said. The folder gets results.json, samples.jsonl (a line a verdict, to be looked at) and the model's answers in the
benchmark's form.
"""

from collections.abc import Callable
from typing import Any

from gristmill.core.errors import InputError
from gristmill.core.io import replacing, write_json, write_jsonl
from gristmill.core.progress import Progress
from gristmill.core.untrusted import quoted, quoted_path
from gristmill.judge.reward_client import weight_set
from gristmill.workflows.judged.of_judges import is_reward_model, run_agreement, run_rewards
from gristmill.workflows.judged.of_models import run_alpaca_eval, run_arena_hard, run_mt_bench
from gristmill.workflows.judged.session import RESULTS, SAMPLES, JudgeArgs, JudgedSession, Kind, Prepared

WORK: dict[Kind, Callable[[JudgedSession], Prepared]] = {
    "mt-bench": run_mt_bench,
    "arena-hard": run_arena_hard,
    "alpaca-eval": run_alpaca_eval,
    "agreement": run_agreement,
    "rewards": run_rewards,
}
KINDS = tuple(WORK)
OF_MODELS = ("mt-bench", "arena-hard", "alpaca-eval")  # kinds that score a model; the others score the judge itself


def run(kind: Kind, args: JudgeArgs, progress: Progress) -> dict[str, Any]:
    """Run a judged benchmark; its results, which are in results.json too.

    Raises:
        InputError: a file is wrong, a model cannot be asked, or no reply of the judge can be read.
    """
    _check(kind, args)
    session = JudgedSession(kind, args, progress)
    prepared = WORK[kind](session)
    with session.folder():
        results, samples = prepared()
        notes = [*results.pop("notes", []), *session.notes()]
        results = {"benchmark": kind, **session.head(), **results, "failed_calls": session.failed, "notes": notes}
        with replacing(args.out / SAMPLES) as path:
            write_jsonl(path, samples)
        write_json(args.out / RESULTS, results)
    if session.num_replies and session.unreadable == session.num_replies:
        raise InputError(
            f"The judge {quoted(results['judge'])} gave no readable verdict in any of {session.num_replies} replies (the first begins "
            f"{quoted(session.first_unreadable)}): look at {quoted_path(args.out / SAMPLES)}, and take a judge that keeps to the form."
        )
    return results


def _check(kind: Kind, args: JudgeArgs) -> None:
    if kind not in KINDS:
        raise InputError(f"There is no judged benchmark {kind!r}: choose one of {', '.join(KINDS)}.")
    if kind in OF_MODELS and (args.model is None) == (args.answers is None):
        raise InputError(f"{kind} judges a model: give its folder, the base URL of its endpoint, or a file of its answers.")
    if kind not in OF_MODELS and (args.model is not None or args.answers is not None):
        raise InputError(f"{kind} measures the judge itself: give it with --judge alone.")
    of_pairs = ("agreement", "rewards")
    given = {
        "--baseline": (args.baseline, ("mt-bench", "arena-hard")),
        "--references": (args.references, ("mt-bench",)),
        "--greedy": (args.greedy or None, ("mt-bench",)),
        "--explain": (args.explain or None, of_pairs),
        "--reward or --llm": (args.is_reward, of_pairs),
    }
    for name, (option, kinds) in given.items():
        if option is not None and kind not in kinds:
            raise InputError(f"{kind} does not take {name}, which is for {' and '.join(kinds)}: leave it out.")
    for name, value in (("--limit", args.limit), ("--max-tokens", args.max_tokens), ("--judge-tokens", args.judge_tokens)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}.")
    weight_set(args.weights)
    if args.model is not None:
        args.model.check("endpoint")
    if args.judge is not None:
        args.judge.check("judge")
        if kind in OF_MODELS and is_reward_model(args.judge):
            raise InputError(f"{quoted(args.judge.place)} holds a reward model, which writes no verdicts: give a judge that writes.")
