"""What `gristmill eval --tasks` and `gristmill eval tasks` do."""

import json
from typing import TYPE_CHECKING, Any

from gristmill.core.echo import echo

if TYPE_CHECKING:
    from gristmill.engine.load import EngineArgs
    from gristmill.judge.party import Party
    from gristmill.workflows.benchmark_requests import BenchmarkArgs


def run_tasks(party: "Party", running: "EngineArgs", args: "BenchmarkArgs", *, quiet: bool, as_json: bool) -> None:
    """Run benchmarks, print their scores and, where a folder is given, write its page. `running` is of a folder's model."""
    from gristmill.core.progress import Progress
    from gristmill.engine.load import load_engine
    from gristmill.report.benchmarks import benchmark_text, write_benchmark_page
    from gristmill.workflows.benchmark_sources import AnswerSource, EndpointSource, EngineSource
    from gristmill.workflows.benchmarks import run_benchmarks

    def source() -> AnswerSource:
        if party.is_endpoint:
            return EndpointSource(party.place, party.model, api_key_env=party.key_env)
        return EngineSource(load_engine(party.folder, running))

    with Progress(quiet=quiet) as progress, progress.stage("eval"):
        report = run_benchmarks(source, _identity(party, running), args, progress)
    echo(json.dumps(report) if as_json else benchmark_text(report))
    if args.out is not None:
        page = write_benchmark_page(args.out, report)
        echo(f"results: {args.out / 'results.json'}\npage: {page}", err=as_json)


def _identity(party: "Party", running: "EngineArgs") -> dict[str, Any]:
    """What answers depend on: an evaluation's folder takes those of one model alone."""
    if party.is_endpoint:
        return {"name": party.name, "endpoint": party.place}
    from gristmill.model.folder import folder_stamps

    running = running.resolved(party.folder)
    facts = {name: getattr(running, name) for name in ("dtype", "quantize", "head", "cache")}
    return {"name": party.name, "files": folder_stamps(party.folder), **facts, "format": running.chat_format}


def list_tasks(as_json: bool) -> None:
    """List the shipped benchmarks with their size, licence and files."""
    from gristmill.evaluate.task import Task, shipped

    rows: list[dict[str, Any]] = []
    for name, task in shipped().items():
        if not isinstance(task, Task):
            rows.append({"task": name, "about": task.about, "tasks": list(task.tasks)})
            continue
        splits = dict.fromkeys(s for s in (task.evaluated_split, task.fewshot_split, task.training_split) if s is not None)
        files = [f"{name}/{split}.parquet" for split in splits] + ([f"{name}/cot-prompts/*.txt"] if task.fewshot_config.prompt_file else [])
        rows.append(
            {
                "task": name,
                "about": task.about,
                "n": task.num_documents,
                "shots": task.num_fewshot,
                "metric": task.metric_list[0].metric,
                "licence": task.licence,
                "files": files,
                "columns": list(task.columns),
                "source": task.source,
            }
        )
    if as_json:
        echo(json.dumps(rows))
        return
    for row in rows:
        if "tasks" in row:
            echo(f"{row['task']:<16} {', '.join(row['tasks'])}: {row['about']}")
            continue
        num = f"n {row['n']:,}" if row["n"] else "n as given"
        echo(f"{row['task']:<16} {num}, {row['shots']} shots, {row['metric']}, {row['licence']}: {row['about']}")
        echo(f"{'':<16} wants {', '.join(row['files'])} with {', '.join(row['columns'])}; from {row['source']}")
    echo("with a judge: `gristmill judge`; refusals and attacks: `gristmill safety`")
