"""Commands that write and curate data."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from gristmill.cli.app import AsJson, Out, Quiet, RunDevice, RunOut, Unsafe, Workers, command, end_with_alarms, given
from gristmill.core.echo import echo
from gristmill.core.errors import InputError


@command("gristmill synth recipe.yaml --dry-run")
def synth(
    recipe: Annotated[str, typer.Argument(help="A dataset recipe file, or the name of a shipped one.")],
    out: RunOut = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Ask nobody: print the calls, tokens and cost that it would take.")] = False,
    limit: Annotated[int | None, typer.Option(help="Most rows of each pipeline, to try a recipe.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Ask again what failed for good in an earlier start.")] = False,
    device: RunDevice = None,
    unsafe_code: Unsafe = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write a dataset: prompts, dialogues, answers, judgements and pairs. Exit code 3 when calls failed for good."""
    from gristmill.core.config import find_recipe, load
    from gristmill.workflows.dataset import run as dataset
    from gristmill.workflows.dataset.recipe import DatasetRecipe

    loaded = load(find_recipe(recipe, "dataset"), DatasetRecipe, given(device=device))
    if dry_run:
        estimate = dataset.dry_run(loaded)
        if as_json:
            echo(json.dumps(estimate))
            return
        for name, m in estimate["models"].items():
            echo(f"{name}: {m['calls']:,} calls, {m['tokens_in']:,} tokens in, {m['tokens_out']:,} out, cost {m['cost']:.2f}")
        echo(f"in all about {estimate['calls']:,} calls, cost {estimate['cost']:.2f}; nothing was asked")
        return
    from gristmill.core.progress import Progress

    target = out or Path("runs") / loaded.name
    results = dataset.run(loaded, target, Progress(quiet=quiet), limit=limit, retry_failed=retry_failed, unsafe_code=unsafe_code)
    if as_json:
        echo(json.dumps(results))
    else:
        counts = ", ".join(f"{results[name]:,} {name}" for name in ("prompts", "responses", "demonstrations", "pairs"))
        echo(f"{counts}: {target}")
    if failed := results["calls"]["failed"]:
        echo(
            f"gristmill: {failed:,} calls failed for good: see `gristmill rows errors --folder {target}`, run again with --retry-failed.",
            err=True,
        )
    end_with_alarms(results["alarms"], code=3 if failed else 4)
    if failed:
        raise typer.Exit(3)


@command("gristmill curate english-text --input docs --out runs/docs")
def curate(
    recipe: Annotated[str, typer.Argument(help="A curation recipe file, or the name of a shipped one.")],
    input: Annotated[list[str] | None, typer.Option("--input", "-i", help="File, folder or pattern; overrides the recipe's.")] = None,
    out: RunOut = None,
    workers: Workers = None,
    executor: Annotated[Literal["", "processes", "ray"], typer.Option(help="Who does the work; overrides the recipe's.")] = "",
    explain: Annotated[str, typer.Option(help="Do nothing but say what became of the document of this id.")] = "",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """From raw text to documents worth training on: cleaned, filtered, without duplicates, with a reason for every one dropped."""
    from gristmill.core.config import find_recipe, load
    from gristmill.curate import run as curation
    from gristmill.curate.recipe import Curation

    overrides = given(inputs=input, workers=workers, executor=executor or None)
    loaded = load(find_recipe(recipe, "curation"), Curation, overrides)
    folder = out or Path("runs") / loaded.name
    if explain:
        for found in curation.explain(folder, explain):
            text = " ".join(found.pop("text").split())
            facts = ", ".join(f"{k} {v}" for k, v in found.items() if v not in (None, ""))
            echo(json.dumps(found | {"text": text}) if as_json else f"{facts}\n    {text[:300]}")
        return
    from gristmill.core.progress import Progress
    from gristmill.report.curation import funnel_lines, write_page

    with Progress(quiet=quiet) as progress:
        funnel = curation.run(loaded, folder, progress)
    page = write_page(folder, funnel)
    echo(json.dumps(funnel) if as_json else "\n".join([*funnel_lines(funnel), f"documents: {folder / 'data'}", f"report: {page}"]))
    if not funnel["documents"]:
        why = f"of {funnel['read']['documents']:,} documents that were read none is kept"
        end_with_alarms([{"text": f"{why}. Look for the step that drops most, and its reasons in {folder / 'dropped'}; then loosen it."}])


@command("gristmill blend blend.yaml --out runs/blend")
def blend(
    recipe: Annotated[str, typer.Argument(help="A blend recipe file, or the name of a shipped one.")],
    out: RunOut = None,
    workers: Workers = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Documents of several sources as tokens, each in its share, in the order that they are trained on."""
    from gristmill.core.config import find_recipe, load
    from gristmill.core.progress import Progress
    from gristmill.curate.blend import blend as blends

    loaded = load(find_recipe(recipe, "blend"), blends.Blend, given(workers=workers))
    folder = out or Path("runs") / loaded.name
    with Progress(quiet=quiet) as progress:
        facts = blends.blend(loaded, folder, progress)
    echo(json.dumps(facts) if as_json else "\n".join([*blends.blend_lines(facts), f"tokens: {folder}"]))


@command("gristmill quality classifier --positive good.jsonl --negative 'crawl/*.jsonl' --out runs/good")
def quality(
    kind: Annotated[Literal["classifier", "perplexity"], typer.Argument(help="What to train.")],
    positive: Annotated[list[str], typer.Option(help="Documents that are wanted: files, folders, patterns.")],
    out: Out,
    negative: Annotated[list[str] | None, typer.Option(help="For a classifier: documents that are not.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train what the step `quality` of a curation scores documents by: a classifier, or a model of how usual a text is."""
    from gristmill.curate.quality.buckets import learn

    facts = learn(kind, positive, negative or [], folder=out)
    echo(json.dumps(facts) if as_json else "\n".join([*(f"{name}: {value}" for name, value in facts.items()), f"model: {out}"]))


@command("gristmill rows lineage 0123456789abcdef --folder runs/tides")
def rows(
    action: Annotated[
        Literal["lineage", "errors"],
        typer.Argument(help="lineage: the chain of calls and rows behind a row. errors: the calls that failed for good."),
    ],
    name: Annotated[str, typer.Argument(help="lineage: the row's id.")] = "",
    folder: Annotated[Path, typer.Option(help="Folder of a dataset or alignment run.")] = Path("."),
    as_json: AsJson = False,
) -> None:
    """Look into the rows and calls of a run."""
    from gristmill.runs.reader import reading_back
    from gristmill.workflows.dataset.lineage import errors, lineage

    if (action == "lineage") != bool(name):
        raise InputError("Use `gristmill rows lineage ID --folder RUN` or `gristmill rows errors --folder RUN`.")
    with reading_back(folder):
        found = list(lineage(folder, name) if name else errors(folder))
    for entry in found:
        if as_json:
            echo(json.dumps(entry))
        elif name:
            hidden = {"id", "depth", "kind", "text", "parents"}
            facts = ", ".join(f"{k} {v}" for k, v in entry.items() if k not in hidden and v not in ("", {}))
            echo(f"{'  ' * entry['depth']}{entry['id']}  {entry['kind']}  {facts}  {entry['text']}".rstrip())
        else:
            asked = " ".join(entry.get("prompt", "").split())[:80]
            echo(f"{entry['id']}  {entry['attempts']} attempts, status {entry['status']}: {entry['error']}  [{asked}]")
