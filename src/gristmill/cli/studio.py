"""The command that opens a run for people."""

from pathlib import Path
from typing import Annotated

import typer

from gristmill.cli.app import command
from gristmill.core.echo import echo


@command("gristmill studio runs/mine --port 8600")
def studio(
    folder: Annotated[Path, typer.Argument(help="A run, or a folder of .parquet and .jsonl files with rows.")],
    port: Annotated[int, typer.Option(help="Port to listen at; 0 for any that is free.")] = 8600,
    host: Annotated[str, typer.Option(help="Address to listen at; 127.0.0.1: this machine alone.")] = "127.0.0.1",
    url: Annotated[str, typer.Option(help="Address that other people's browsers ask, as https://studio.example.org.")] = "",
    database: Annotated[
        str, typer.Option(help="Where answers are kept: a folder of a local disk, or a postgresql:// URL; default FOLDER/studio.")
    ] = "",
    guard: Annotated[str, typer.Option(help="FORM=URL of a guard that judges answers to attacks, as in `gristmill safety --guard`.")] = "",
    guard_model: Annotated[str, typer.Option(help="Name that the guard's endpoint knows it by.")] = "",
    guard_key_env: Annotated[str, typer.Option(help="Environment variable that holds the key of the guard's endpoint.")] = "",
    export: Annotated[Path | None, typer.Option(help="Write people's answers as rows to this folder, and end.")] = None,
) -> None:
    """Open a run for people in the browser: they rate and compare its rows, and their answers become rows to train on."""
    from gristmill.studio.serve import StudioArgs, serve, write_exports

    if export is not None:
        counts = write_exports(folder, database, export)
        gone, split = counts.pop("gone"), counts.pop("split")
        for name, count in counts.items():
            echo(f"{export / name}: {count:,} rows")
        if gone or split:
            echo(f"left out: {split:,} items in dispute, {gone:,} whose rows are gone", err=True)
        return
    serve(
        folder,
        StudioArgs(host=host, port=port, url=url, database=database, guard=guard, guard_model=guard_model, guard_key_env=guard_key_env),
    )
