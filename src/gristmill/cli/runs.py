"""Commands about whole runs: start one, look at it, compare it, write its recipe."""

import gc
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gristmill.cli.app import (
    AsJson,
    ChatFormat,
    Cp,
    Out,
    Pp,
    PpSchedule,
    Quiet,
    RunDevice,
    RunOut,
    Tp,
    Unsafe,
    Vp,
    command,
    end_with_alarms,
    endpoint_options,
    given,
)
from gristmill.core.echo import echo
from gristmill.core.errors import InputError

if TYPE_CHECKING:
    from gristmill.core.progress import Progress
    from gristmill.runs.reader import RunData

_TEACHER, _TEACHER_NAME, _TEACHER_KEY = endpoint_options(
    "teacher", "the teacher's", "Base URL of an endpoint whose model writes prompts and answers, up to /v1; it may serve several models."
)


@command("gristmill run miniature")
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")],
    out: RunOut = None,
    model: Annotated[str | None, typer.Option(help="Model folder to start from; overrides the recipe's model.")] = None,
    control: Annotated[
        str | None, typer.Option(help="Run a control instead: unfiltered, random-filter, reward-only, human-only or replace.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Overrides the recipe's seed.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Overrides the recipe's rounds.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default all cores.")] = None,
    device: RunDevice = None,
    tp: Tp = 1,
    cp: Cp = 1,
    pp: Pp = 1,
    vp: Vp = 1,
    pp_schedule: PpSchedule = "1f1b",
    redo: Annotated[
        bool, typer.Option("--redo", help="Make again what was made from another recipe or other files; what is there is moved aside.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Make nothing: probe the model for some seconds and print time, memory and disk.")
    ] = False,
    unsafe_code: Unsafe = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run the alignment loop, or a recipe of reasoning: from the start or from where it was cut off.

    Under torchrun all processes train together and each answers and rates a share (docs/scale.md).
    """
    from gristmill.core.config import find_recipe, load, read
    from gristmill.core.device import pick_device
    from gristmill.core.progress import Progress
    from gristmill.parallel.mesh import ParallelDims, process_mesh
    from gristmill.report.alignment import write_report
    from gristmill.report.summary import best_lines, headline, measured_lines, stage_line
    from gristmill.studio.said import read_said
    from gristmill.workflows.alignment.loop import run as run_loop
    from gristmill.workflows.alignment.recipe import AlignmentRecipe

    overrides = given(model=model, control=control, seed=seed, rounds=rounds, threads=threads, device=device)
    path = find_recipe(recipe, "alignment", "reasoning")
    if read(path).get("kind") == "reasoning":
        ways = {name: number if number > 1 else None for name, number in {"tp": tp, "cp": cp, "pp": pp, "vp": vp}.items()}
        other = {"redo": redo or None, "dry_run": dry_run or None, "pp_schedule": pp_schedule if pp_schedule != "1f1b" else None}
        unfit = given(control=control, rounds=rounds, **other, **ways)
        if unfit:
            raise InputError(
                f"--{next(iter(unfit)).replace('_', '-')} is for the alignment loop: leave it out, {path.name} is of reasoning."
            )
        return _run_reasoning(path, out, overrides, unsafe_code=unsafe_code, quiet=quiet, as_json=as_json)
    loaded = load(path, AlignmentRecipe, overrides)
    if dry_run:
        from gristmill.report.summary import duration
        from gristmill.workflows.alignment.estimate import dry_run as estimate_run
        from gristmill.workflows.alignment.estimate import estimate_lines

        with Progress(quiet=quiet) as progress:
            estimate = estimate_run(loaded, progress, unsafe_code)
        echo(json.dumps(estimate) if as_json else "\n".join(estimate_lines(estimate, duration)))
        return
    name = "-".join([loaded.name, *([loaded.control] if loaded.control else []), *([f"seed{seed}"] if seed is not None else [])])
    folder = out or Path("runs") / name
    gc.freeze()  # what imports made is no garbage: looking at it took the miniature 1 % of its time, in which no thread computes
    with (
        process_mesh(pick_device(loaded.device), ParallelDims(tp, cp, pp, vp, pp_schedule)) as mesh,
        Progress(quiet=quiet or not mesh.is_writer, describe=stage_line) as progress,
    ):
        results = run_loop(loaded, folder, progress, unsafe_code, redo=redo, mesh=mesh, read_said=read_said)
    if not mesh.is_writer:
        return
    page = write_report(folder)
    if as_json:
        echo(json.dumps(results))
    else:
        for line in [*measured_lines(results), *headline(results, folder), *best_lines(results, folder)]:
            echo(line)
        echo(f"report: {page}")
    end_with_alarms(results["alarms"])


def _finish(
    name: str,
    seed: int | None,
    out: Path | None,
    start: Callable[[Path, "Progress"], dict[str, Any]],
    write_page: Callable[["RunData"], Path],
    lines: Callable[[dict[str, Any], Path], list[str]],
    *,
    quiet: bool,
    as_json: bool,
    shared: bool = False,
) -> None:
    """Turn a run from the start or from where it was cut off, and tell its results and its page.

    Args:
        shared: whether several processes can work on it; the first one alone talks.
    """
    from gristmill.core.progress import Progress
    from gristmill.report.summary import stage_line
    from gristmill.runs.reader import read_run

    is_alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if not shared and not is_alone:
        raise InputError("This kind of run has one process: start it without torchrun.")
    folder = out or Path("runs") / "-".join([name, *([f"seed{seed}"] if seed is not None else [])])
    talks = is_alone or os.environ.get("RANK", "0") == "0"
    with Progress(quiet=quiet or not talks, describe=stage_line) as progress:
        results = start(folder, progress)
    if not talks:
        return
    page = write_page(read_run(folder))
    echo(json.dumps(results) if as_json else "\n".join([*lines(results, folder), f"report: {page}"]))
    end_with_alarms(results.get("alarms", ()))  # none in results of an earlier version


def _run_reasoning(path: Path, out: Path | None, overrides: dict[str, Any], *, unsafe_code: bool, quiet: bool, as_json: bool) -> None:
    """`run` of a reasoning recipe."""
    from gristmill.core.config import load
    from gristmill.report.reasoning import write_page
    from gristmill.report.summary import reasoning_lines
    from gristmill.workflows.reasoning.recipe import ReasoningRecipe
    from gristmill.workflows.reasoning.run import run as run_reasoning

    loaded = load(path, ReasoningRecipe, overrides)
    start = partial(run_reasoning, loaded, unsafe_code=unsafe_code)
    _finish(loaded.name, overrides.get("seed"), out, start, write_page, reasoning_lines, quiet=quiet, as_json=as_json)


@command("gristmill rl miniature-rl --model runs/miniature/02-demonstrations/model")
def rl(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")],
    out: RunOut = None,
    model: Annotated[str | None, typer.Option(help="Model folder to start from; overrides the recipe's model.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts to train on; overrides the recipe's data.prompts.")] = None,
    reward_model: Annotated[
        Path | None, typer.Option(help="Folder of a reward model that rewards; overrides the recipe's rewards.reward_model.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Overrides the recipe's seed.")] = None,
    steps: Annotated[int | None, typer.Option(help="Overrides the recipe's steps.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default all cores.")] = None,
    device: RunDevice = None,
    unsafe_code: Unsafe = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Reinforcement learning by programs, models and functions: GRPO and its relatives, from the start or where it was cut off.

    Under torchrun each process samples a share of the groups and trains on a share (docs/rl.md).
    """
    from gristmill.core.config import find_recipe, load
    from gristmill.core.device import pick_device
    from gristmill.parallel.mesh import ParallelDims, process_mesh
    from gristmill.report.rl import write_page
    from gristmill.report.summary import rl_lines
    from gristmill.workflows.rl.loop import run as run_rl
    from gristmill.workflows.rl.recipe import RlRecipe

    loaded = load(find_recipe(recipe, "rl"), RlRecipe, given(model=model, seed=seed, steps=steps, threads=threads, device=device))
    loaded = loaded.with_files(prompts=prompts, reward_model=reward_model)

    def start(folder: Path, progress: "Progress") -> dict[str, Any]:
        with process_mesh(pick_device(loaded.device), ParallelDims(replicate=True)) as mesh:
            return run_rl(loaded, folder, progress, unsafe_code, mesh=mesh)

    _finish(loaded.name, seed, out, start, write_page, rl_lines, quiet=quiet, as_json=as_json, shared=True)


@command("gristmill compress miniature --model runs/miniature/02-demonstrations/model --speed 1.3")
def compress(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")],
    out: RunOut = None,
    model: Annotated[str | None, typer.Option(help="Model folder to compress; overrides the recipe's model.")] = None,
    speed: Annotated[
        float | None, typer.Option(help="Tokens a second of the child, in those of the model; overrides the target's.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Overrides the recipe's seed.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default all cores.")] = None,
    device: RunDevice = None,
    unsafe_code: Unsafe = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """A smaller, faster child of a model (Puzzle): layers searched by costs measured here, then distilled; resumes, takes more targets."""
    from gristmill.core.config import find_recipe, load
    from gristmill.report.compression import write_page
    from gristmill.report.summary import compression_lines
    from gristmill.workflows.compress.recipe import CompressionRecipe
    from gristmill.workflows.compress.run import run as run_compression

    loaded = load(find_recipe(recipe, "compress"), CompressionRecipe, given(model=model, seed=seed, threads=threads, device=device))
    if speed is not None:
        loaded = loaded.with_speed(speed)
    start = partial(run_compression, loaded, unsafe_code=unsafe_code)
    _finish(loaded.name, seed, out, start, write_page, compression_lines, quiet=quiet, as_json=as_json)


@command("gristmill status runs/miniature")
def status(
    folder: Annotated[Path, typer.Argument(help="Run folder.")] = Path("runs/miniature"),
    as_json: AsJson = False,
) -> None:
    """What a run of any kind has done so far, stage by stage."""
    from gristmill.report.summary import MEASURED, best_lines, doubts, stage_line
    from gristmill.runs.reader import read_run, reading_back

    with reading_back(folder):
        data = read_run(folder)
        stages = [
            {k: s.get(k) for k in ("folder", "seconds", "tokens_per_second", "peak_mib")}
            | {"done": s.get("fingerprint") is not None}
            | {kind: s[kind] for kind in MEASURED if kind in s}
            for s in data.stages
        ]
        lines = []
        for s in data.stages:
            seconds = f"{s['seconds']:>7.1f} s" if "seconds" in s else "  unfinished"
            peak = f"{s['peak_mib']:>7,} MiB" if "peak_mib" in s else ""
            lines.append(f"{s['folder']:<22} {seconds}{peak}  {stage_line(s)}".rstrip())
        if data.results and data.kind == "alignment":
            lines += best_lines(data.results, folder)
    if as_json:
        echo(json.dumps({"folder": str(folder), "finished": data.results is not None, "stages": stages}))
        return
    lines += [f"alarm: {alarm['text']}" for alarm in (data.results or {}).get("alarms", ())]
    lines += [f"{head.strip(' .').lower()}: {words}" for head, words in doubts(data.results or {})]
    lines.append("finished" if data.results else "not finished: run the same command again to continue")
    echo("\n".join(lines))


@command("gristmill check runs/miniature --approve")
def check(
    folder: Annotated[Path, typer.Argument(help="Run folder.")] = Path("runs/miniature"),
    approve: Annotated[bool, typer.Option("--approve", help="The run goes on and trains on the rows.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="The run ends before it trains on them.")] = False,
    reject: Annotated[list[str] | None, typer.Option(help="With --approve: a row that is left out, by its id; again for each.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Decide the last check anew, though it was decided before.")] = False,
    as_json: AsJson = False,
) -> None:
    """The rows that a run asks people about before it trains on them, and the answer: approve them, or stop the run."""
    from gristmill.report.people import check_lines, check_rows
    from gristmill.runs.checks import APPROVE, REJECT, STOP, decide, find_checks
    from gristmill.runs.reader import read_run

    read_run(folder, kind="alignment")
    if approve and stop:
        raise InputError("Give --approve or --stop, not both.")
    if reject and not approve:
        raise InputError("--reject leaves rows out of what is approved: give --approve too.")
    every = find_checks(folder)
    found = [one for one in every if one.decision is None] or (every[-1:] if again or not (approve or stop) else [])
    if not found:
        raise InputError(f"No check of {folder} waits for a decision: `check:` in the recipe asks for one, and --again changes the last.")
    asked = found[0]
    rows = check_rows(asked)
    if unknown := sorted(set(reject or ()) - {row["id"] for row in rows}):
        raise InputError(f"The check has no row {unknown[0]!r}: `gristmill check {folder}` lists them.")
    if approve or stop:
        decide(asked, APPROVE if approve else STOP, "terminal", verdicts=dict.fromkeys(reject or (), REJECT))
    decision = APPROVE if approve else STOP if stop else (asked.decision or {}).get("decision")
    if as_json:
        echo(json.dumps({"stage": asked.stage, **asked.question, "decision": decision, "sample": rows}))
    elif approve or stop:
        echo(f"{asked.stage}: {decision}")
    else:
        echo("\n".join(check_lines(asked, rows)))


@command("gristmill answers runs/miniature --prompt 12")
def answers(
    folder: Annotated[Path, typer.Argument(help="Run folder.")] = Path("runs/miniature"),
    prompt: Annotated[
        str, typer.Option(help="An evaluation prompt by its id or number; default one that the first model fails and the last answers.")
    ] = "",
    sampled: Annotated[bool, typer.Option("--sampled", help="The answers at temperature 1 instead of the greedy ones.")] = False,
    as_json: AsJson = False,
) -> None:
    """One question with the answers of all models of a run side by side."""
    from gristmill.report.answers import Answers, answers_lines, answers_table
    from gristmill.runs.reader import read_run, reading_back

    with reading_back(folder):
        found = Answers(read_run(folder, kind="alignment"), "sampled" if sampled else "greedy")
        table = answers_table(found, found.find(prompt))
    echo(json.dumps(table) if as_json else "\n".join(answers_lines(table)))


@command("gristmill report runs/miniature")
def report(folder: Annotated[Path, typer.Argument(help="Run folder.")] = Path("runs/miniature"), as_json: AsJson = False) -> None:
    """Write the page of a run again (an alignment, a curation, reinforcement learning, reasoning or a compression) and print its path."""
    from gristmill.report import alignment, compression, curation, reasoning, rl
    from gristmill.runs.reader import read_run, reading_back

    with reading_back(folder):
        data = read_run(folder)
        if data.kind == "curation" and data.results:
            page = curation.write_page(folder, data.results)
        else:
            pages = {"rl": rl.write_page, "reasoning": reasoning.write_page, "compress": compression.write_page}
            page = pages[data.kind](data) if data.kind in pages else alignment.write_report(folder)
    echo(json.dumps({"report": str(page)}) if as_json else str(page))


@command("gristmill compare runs/miniature runs/miniature-human-only")
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Run folders; the first is what the others are compared with.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write a page.")] = None,
    as_json: AsJson = False,
) -> None:
    """Set finished runs side by side."""
    from gristmill.report.compare import compare_runs, comparison_text, write_comparison
    from gristmill.runs.reader import reading_back

    with reading_back(Path(", ".join(map(str, folders)))):
        table = compare_runs(folders)
        text = json.dumps(table) if as_json else comparison_text(table)
    echo(text)
    if out:
        echo(str(write_comparison(table, out)), err=as_json)


@command("gristmill claims --seeds 3 --only rpo --only accumulate")
def claims(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")] = "miniature",
    out: Out = Path("runs/claims"),
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Seeds, from 0; an interval needs two.")] = 3,
    only: Annotated[list[str] | None, typer.Option(help="A claim by its name, again for each; default all. --list names them.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at once; default one for each core, two at most.")] = None,
    redo: Annotated[bool, typer.Option("--redo", help="Make again what was made from other files.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="Run nothing: list the claims and the runs that each needs.")] = False,
    unsafe_code: Unsafe = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """What of the report holds here: a recipe and its controls over several seeds, and one table. Run it again after a kill."""
    import os

    from gristmill.core.config import find_recipe
    from gristmill.core.io import make_folder, write_json
    from gristmill.core.progress import Progress
    from gristmill.report.claims import CLAIMS, claims_lines, measure_claims, write_claims
    from gristmill.runs.reader import read_run
    from gristmill.workflows.claims import plan, run_grid

    chosen = [c for c in CLAIMS if not only or c.name in only]
    if unknown := set(only or ()) - {c.name for c in CLAIMS}:
        raise InputError(f"There is no claim {sorted(unknown)[0]!r}: choose of {', '.join(c.name for c in CLAIMS)}.")
    if list_:
        rows = [{"claim": c.name, "text": c.text, "figure": c.figure, "runs": c.variants} for c in chosen]
        echo(json.dumps(rows) if as_json else "\n".join(f"{r['claim']:<18} {r['text']} ({', '.join(r['runs'])})" for r in rows))
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = jobs or min(2, cores)
    make_folder(out)
    runs = plan(find_recipe(recipe, "alignment"), out, list(dict.fromkeys(v for c in chosen for v in c.variants)), range(seeds))
    with Progress(quiet=quiet) as progress, progress.stage("claims"):
        failed = run_grid(runs, progress, jobs=jobs, threads=max(1, cores // jobs), redo=redo, unsafe_code=unsafe_code)
    finished = {seed: {r.variant: read_run(r.folder) for r in runs if r.seed == seed and r.name not in failed} for seed in range(seeds)}
    table = measure_claims(chosen, finished)
    write_json(out / "results.json", {"recipe": recipe, "seeds": seeds, "claims": table, "failed": failed})
    page = write_claims(out, table, f"{recipe}, {seeds} seeds, {len(runs) - len(failed)} runs")
    echo(json.dumps({"claims": table, "failed": failed, "report": str(page)}) if as_json else "\n".join(claims_lines(table)))
    for name, line in failed.items():
        echo(f"gristmill: {name} failed: {line} Mend it and run the same command again; its log is {out / name}.log.", err=True)
    if not as_json:
        echo(f"report: {page}")
    if failed:
        raise typer.Exit(3)


@command("gristmill init --model ./llama --demonstrations demos.jsonl --ratings rated.jsonl --evaluation test.jsonl --out mine.yaml")
def init(
    out: Annotated[Path, typer.Option("--out", "-o", help="Recipe file to write.")] = Path("recipe.yaml"),
    model: Annotated[str, typer.Option(help="Hugging Face folder of your Base model, or `miniature`.")] = "miniature",
    demonstrations: Annotated[Path | None, typer.Option(help="Conversations to imitate.")] = None,
    ratings: Annotated[Path | None, typer.Option(help="Rated answers, HelpSteer2's columns.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts, with or without known answers.")] = None,
    evaluation: Annotated[Path | None, typer.Option(help="Held-out prompts with known answers.")] = None,
    format: ChatFormat = "auto",
    add_chat_tokens: Annotated[
        Literal["", "chatml", "llama3", "nemotron"],
        typer.Option(help="Give a Base without tokens for chats those of this format; it is written beside the recipe."),
    ] = "",
    validation: Annotated[Path | None, typer.Option(help="Prompts with known answers that choose the best model.")] = None,
    teacher: Annotated[str, _TEACHER] = "",
    teacher_model: Annotated[str, _TEACHER_NAME] = "",
    teacher_key_env: Annotated[str, _TEACHER_KEY] = "",
    name: Annotated[str, typer.Option(help="Name of the run.")] = "mine",
    force: Annotated[bool, typer.Option(help="Overwrite the recipe file.")] = False,
) -> None:
    """Check your files and write a commented recipe for them (or for the miniature world, without files)."""
    from gristmill.judge.party import OF_AN_ENDPOINT
    from gristmill.workflows.init import write_recipe

    files = {"demonstrations": demonstrations, "ratings": ratings, "prompts": prompts, "evaluation": evaluation, "validation": validation}
    asked = {"base_url": teacher, "model": teacher_model, "api_key_env": teacher_key_env}
    if not teacher and any(asked.values()):
        raise InputError(OF_AN_ENDPOINT.format("teacher"))
    if add_chat_tokens and model == "miniature":
        raise InputError("Give --model with --add-chat-tokens: the shipped model has its tokens.")
    write_recipe(
        out,
        name,
        model,
        {k: v for k, v in files.items() if v is not None},
        force,
        chat_format=format,
        add_chat_tokens=add_chat_tokens,
        teacher=asked if teacher else None,
    )
    echo(f"{out} is written: read it, then `gristmill run {out}`.")
