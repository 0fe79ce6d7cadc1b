"""The command of benchmarks with a judge."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from gristmill.cli.app import AsJson, ChatFormat, Device, Dtype, Quiet, RunOut, Seed, command, endpoint_options
from gristmill.core.echo import echo
from gristmill.core.errors import InputError

_URL, _NAME, _KEY = endpoint_options("endpoint", "the model's", "The model's endpoint, by its base URL, in the place of MODEL.")
_JUDGE, _JUDGE_NAME, _JUDGE_KEY = endpoint_options(
    "judge", "the judge's", "Who judges: a model folder (also of a reward model), or an endpoint's base URL."
)


@command(
    "gristmill judge mt-bench runs/sft/model --data mt_bench --judge https://api.openai.com/v1 --judge-model gpt-4.1 --judge-key-env KEY"
)
def judge(
    kind: Annotated[str, typer.Argument(help="mt-bench, arena-hard, alpaca-eval; or, of the judge itself, agreement, rewards.")],
    data: Annotated[Path, typer.Option(help="The benchmark's file, or a folder that holds it; nothing is downloaded.")],
    model: Annotated[
        str, typer.Argument(help="Whose answers are judged: a model folder, an endpoint's base URL, or a file of answers.")
    ] = "",
    judge: Annotated[str, _JUDGE] = "",
    judge_model: Annotated[str, _JUDGE_NAME] = "",
    judge_key_env: Annotated[str, _JUDGE_KEY] = "",
    endpoint: Annotated[str, _URL] = "",
    endpoint_model: Annotated[str, _NAME] = "",
    endpoint_key_env: Annotated[str, _KEY] = "",
    baseline: Annotated[Path | None, typer.Option(help="File of a baseline's answers; with mt-bench: compare in pairs, too.")] = None,
    references: Annotated[Path | None, typer.Option(help="MT-Bench's reference answers; default the corrected ones in --data.")] = None,
    reward: Annotated[
        bool | None, typer.Option("--reward/--llm", help="The judge is a reward model or not; default as its folder says.")
    ] = None,
    weights: Annotated[str, typer.Option(help="Weight set of a reward model behind an endpoint.")] = "nemotron4-340b",
    explain: Annotated[
        bool, typer.Option("--explain", help="agreement, rewards: let the judge explain itself before its verdict.")
    ] = False,
    greedy: Annotated[bool, typer.Option("--greedy", help="mt-bench: greedy answers throughout, as for Nemotron-4.")] = False,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens; default the protocol's.")] = None,
    judge_tokens: Annotated[int | None, typer.Option(help="Longest reply of the judge, in tokens; default the protocol's.")] = None,
    limit: Annotated[int | None, typer.Option(help="Most questions of each category or subset.")] = None,
    concurrency: Annotated[int, typer.Option(help="Most requests in flight at an endpoint.")] = 64,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Ask again what failed for good in an earlier start.")] = False,
    out: RunOut = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    format: ChatFormat = "auto",
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """MT-Bench, Arena-Hard, AlpacaEval 2; a judge against people; RewardBench. Killed, it goes on; exit code 3 when calls failed."""
    from gristmill.core.progress import Progress
    from gristmill.judge.party import party_of
    from gristmill.report.judged import judged_text, write_judged_page
    from gristmill.workflows.judged.run import KINDS, run
    from gristmill.workflows.judged.session import SAMPLES, JudgeArgs

    if kind not in KINDS:
        raise InputError(f"There is no judged benchmark {kind!r}: choose one of {', '.join(KINDS)}.")
    # checked by `run`, which knows who is needed
    more: dict[str, Any] = {"chat_format": format, "device": device, "dtype": dtype, "checked": False}
    is_file = Path(model).is_file() and not endpoint
    args = JudgeArgs(
        data=data,
        out=out or Path("runs") / kind,
        model=party_of("endpoint", "" if is_file else model, endpoint, model=endpoint_model, key_env=endpoint_key_env, **more),
        answers=Path(model) if is_file else None,
        judge=party_of("judge", judge, model=judge_model, key_env=judge_key_env, **more),
        baseline=baseline,
        references=references,
        is_reward=reward,
        weights=weights,
        explain=explain,
        greedy=greedy,
        max_tokens=max_tokens,
        judge_tokens=judge_tokens,
        limit=limit,
        seed=seed,
        concurrency=concurrency,
        retry_failed=retry_failed,
    )
    with Progress(quiet=quiet) as progress:
        results = run(kind, args, progress)
    page = write_judged_page(args.out, results, args.out / SAMPLES)
    echo(json.dumps(results) if as_json else f"{judged_text(results)}\nsamples: {args.out / SAMPLES}")
    echo(f"page: {page}", err=as_json)
    if failed := results["failed_calls"]:
        echo(f"gristmill: {failed:,} calls failed for good: run the same command again with --retry-failed.", err=True)
        raise typer.Exit(3)
