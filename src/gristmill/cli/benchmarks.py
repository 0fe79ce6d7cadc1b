"""What `gristmill eval --tasks` and `gristmill eval tasks` do."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gristmill.core.echo import echo
from gristmill.core.errors import InputError

if TYPE_CHECKING:
    from gristmill.engine.load import EngineArgs
    from gristmill.workflows.benchmark_sources import AnswerSource
    from gristmill.workflows.benchmarks import BenchmarkArgs


@dataclass(frozen=True)
class Asked:
    """Who answers: a model folder in process, or an endpoint."""

    folder: Path | None
    endpoint: str
    endpoint_model: str
    api_key_env: str
    engine: "EngineArgs"

    def check(self) -> None:
        """Raise `InputError` unless one of both is given, and there."""
        if (self.folder is None) == (not self.endpoint):
            raise InputError("Give either a model folder, or --endpoint URL with --endpoint-model NAME.")
        if self.endpoint and not self.endpoint_model:
            raise InputError("Give --endpoint-model, the name that the endpoint knows the model by.")
        if self.folder is not None and not self.folder.is_dir():
            raise InputError(f"There is no model folder {self.folder}: check the path.")

    @property
    def identity(self) -> dict[str, Any]:
        """What answers depend on: an evaluation's folder takes those of one model alone."""
        if self.folder is None:
            return {"name": self.endpoint_model, "endpoint": self.endpoint}
        from gristmill.model.folder import folder_stamps

        args = self.engine
        return {
            "name": self.folder.resolve().name,
            "files": folder_stamps(self.folder),
            "dtype": args.dtype,
            "quantize": args.quantize,
            "head": args.head,
            "cache": args.cache,
            "format": args.chat_format,
        }

    def open(self) -> "AnswerSource":
        """The source of answers."""
        from gristmill.workflows.benchmark_sources import EndpointSource, EngineSource

        if self.folder is None:
            return EndpointSource(self.endpoint, self.endpoint_model, api_key_env=self.api_key_env)
        from gristmill.engine.load import load_engine

        return EngineSource(load_engine(self.folder, self.engine))


def run_tasks(asked: Asked, args: "BenchmarkArgs", *, quiet: bool, as_json: bool) -> None:
    """Run benchmarks, print their scores and, where a folder is given, write its page."""
    from gristmill.core.progress import Progress
    from gristmill.report.benchmarks import benchmark_text, write_benchmark_page
    from gristmill.workflows.benchmarks import run_benchmarks

    asked.check()
    with Progress(quiet=quiet) as progress, progress.stage("eval"):
        report = run_benchmarks(asked.open, asked.identity, args, progress)
    echo(json.dumps(report) if as_json else benchmark_text(report))
    if args.out is not None:
        page = write_benchmark_page(args.out, report)
        echo(f"results: {args.out / 'results.json'}\npage: {page}", err=as_json)


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
