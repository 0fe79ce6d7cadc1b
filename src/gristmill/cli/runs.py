"""Commands about whole runs: start one, look at it, compare it, write its recipe."""

import json
from pathlib import Path
from typing import Annotated

import typer

from gristmill.cli.app import AsJson, Quiet, RunDevice, RunOut, Unsafe, command, end_with_alarms, given
from gristmill.core.echo import echo


@command("gristmill run miniature")
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")],
    out: RunOut = None,
    control: Annotated[
        str | None, typer.Option(help="Run a control instead: unfiltered, random-filter, reward-only, human-only or replace.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Overrides the recipe's seed.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Overrides the recipe's rounds.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default all cores.")] = None,
    device: RunDevice = None,
    unsafe_code: Unsafe = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run the alignment loop: all rounds of a recipe, from the start or from where it was cut off."""
    from gristmill.core.config import find_recipe, load
    from gristmill.core.progress import Progress
    from gristmill.report.alignment import write_report
    from gristmill.report.summary import headline, stage_line
    from gristmill.workflows.alignment.loop import run as run_loop
    from gristmill.workflows.alignment.recipe import AlignmentRecipe

    overrides = given(control=control, seed=seed, rounds=rounds, threads=threads, device=device)
    loaded = load(find_recipe(recipe, "alignment"), AlignmentRecipe, overrides)
    name = "-".join([loaded.name, *([loaded.control] if loaded.control else []), *([f"seed{seed}"] if seed is not None else [])])
    folder = out or Path("runs") / name
    with Progress(quiet=quiet, describe=stage_line) as progress:
        results = run_loop(loaded, folder, progress, unsafe_code)
    page = write_report(folder)
    if as_json:
        echo(json.dumps(results))
    else:
        for line in headline(results, folder):
            echo(line)
        echo(f"report: {page}")
    end_with_alarms(results["alarms"])


@command("gristmill status runs/miniature")
def status(
    folder: Annotated[Path, typer.Argument(help="Run folder.")] = Path("runs/miniature"),
    as_json: AsJson = False,
) -> None:
    """What a run of any kind has done so far, stage by stage."""
    from gristmill.report.summary import doubts, stage_line
    from gristmill.runs.reader import read_run, reading_back

    with reading_back(folder):
        data = read_run(folder)
        stages = [{k: s.get(k) for k in ("folder", "seconds")} | {"done": s.get("fingerprint") is not None} for s in data.stages]
        lines = []
        for s in data.stages:
            seconds = f"{s['seconds']:>7.1f} s" if "seconds" in s else "  unfinished"
            lines.append(f"{s['folder']:<22} {seconds}  {stage_line(s)}".rstrip())
    if as_json:
        echo(json.dumps({"folder": str(folder), "finished": data.results is not None, "stages": stages}))
        return
    lines += [f"alarm: {alarm['text']}" for alarm in (data.results or {}).get("alarms", ())]
    lines += [f"{head.strip(' .').lower()}: {words}" for head, words in doubts(data.results or {})]
    lines.append("finished" if data.results else "not finished: run the same command again to continue")
    echo("\n".join(lines))


@command("gristmill report runs/miniature")
def report(folder: Annotated[Path, typer.Argument(help="Run folder.")] = Path("runs/miniature"), as_json: AsJson = False) -> None:
    """Write the page of an alignment or a curation again and print its path."""
    from gristmill.report import alignment, curation
    from gristmill.runs.reader import read_run, reading_back

    with reading_back(folder):
        data = read_run(folder)
        page = curation.write_page(folder, data.results) if data.kind == "curation" and data.results else alignment.write_report(folder)
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


@command("gristmill init --model ./llama --demonstrations demos.jsonl --ratings rated.jsonl --evaluation test.jsonl --out mine.yaml")
def init(
    out: Annotated[Path, typer.Option("--out", "-o", help="Recipe file to write.")] = Path("recipe.yaml"),
    model: Annotated[str, typer.Option(help="Hugging Face folder of your Base model, or `miniature`.")] = "miniature",
    demonstrations: Annotated[Path | None, typer.Option(help="Conversations to imitate.")] = None,
    ratings: Annotated[Path | None, typer.Option(help="Rated answers, HelpSteer2's columns.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts, with or without known answers.")] = None,
    evaluation: Annotated[Path | None, typer.Option(help="Held-out prompts with known answers.")] = None,
    name: Annotated[str, typer.Option(help="Name of the run.")] = "mine",
    force: Annotated[bool, typer.Option(help="Overwrite the recipe file.")] = False,
) -> None:
    """Check your files and write a commented recipe for them (or for the miniature world, without files)."""
    from gristmill.workflows.init import write_recipe

    files = {"demonstrations": demonstrations, "ratings": ratings, "prompts": prompts, "evaluation": evaluation}
    write_recipe(out, name, model, {k: v for k, v in files.items() if v is not None}, force)
    echo(f"{out} is written: read it, then `gristmill run {out}`.")
