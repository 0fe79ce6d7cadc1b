"""Command that evaluates a model's safety, plants and looks for canaries, and reads a scanner's report."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from gristmill.cli.app import AsJson, ChatFormat, Device, Dtype, MaxTokens, Quiet, Seed, command, endpoint_options
from gristmill.core.echo import echo
from gristmill.core.errors import InputError

MAKES_CANARIES = "canaries"  # in the place of a model
_URL, _NAME, _KEY = endpoint_options("endpoint", "the model's")
_GUARD, _GUARD_NAME, _GUARD_KEY = endpoint_options(
    "guard",
    "the guards'",
    "Guard of the answers: a folder (`gristmill train guard`, or a language model that is shown the taxonomy), or "
    "FORM=URL of an endpoint, FORM being judge, llama-guard or wildguard. Several times for several.",
)


@command("gristmill safety runs/miniature/02-demonstrations/model --data data --sets xstest,own.jsonl --attacks base64,role_play+typos")
def safety(
    model: Annotated[str, typer.Argument(help="Model or adapter folder; `canaries` writes rows that plant secrets.")] = "",
    endpoint: Annotated[str, _URL] = "",
    endpoint_model: Annotated[str, _NAME] = "",
    endpoint_key_env: Annotated[str, _KEY] = "",
    data: Annotated[Path | None, typer.Option(help="Folder of published sets; nothing is downloaded.")] = None,
    sets: Annotated[
        str, typer.Option(help="xstest, advbench, harmbench, do_not_answer or files, parted by commas; default all there.")
    ] = "",
    attacks: Annotated[str, typer.Option(help="Chains such as base64,role_play+typos, for unsafe prompts; `all`: each alone.")] = "",
    guard: Annotated[list[str] | None, _GUARD] = None,
    guard_model: Annotated[str, _GUARD_NAME] = "",
    guard_key_env: Annotated[str, _GUARD_KEY] = "",
    guard_logprobs: Annotated[bool, typer.Option("--guard-logprobs", help="Ask guards' endpoints for log-probabilities too.")] = False,
    taxonomy: Annotated[Path | None, typer.Option(help="JSON file of categories for judges; default AEGIS's thirteen.")] = None,
    caution: Annotated[
        Literal["defensive", "permissive"], typer.Option(help="What violates the caution category alone: unsafe, or safe.")
    ] = "defensive",
    system: Annotated[str, typer.Option(help="System message before every prompt that has none.")] = "",
    limit: Annotated[int | None, typer.Option(help="Most prompts of each set and label, of all types alike.", min=1)] = None,
    max_tokens: MaxTokens = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    concurrency: Annotated[int, typer.Option(help="Most requests in flight at an endpoint.", min=1)] = 16,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Ask again what got no answer before.")] = False,
    canaries: Annotated[Path | None, typer.Option(help="Look for the canaries of this file in the model, and do nothing else.")] = None,
    num: Annotated[int, typer.Option("--n", help="Canaries to make.", min=1)] = 20,
    import_garak: Annotated[Path | None, typer.Option(help="Read garak's report or hit log, and do nothing else.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write to; default runs/safety-NAME.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    format: ChatFormat = "auto",
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """What a model refuses and answers: published sets and yours, plain and under attack, with guards; leaked canaries; garak's reports."""
    from gristmill.core.progress import Progress
    from gristmill.judge.party import required_party
    from gristmill.workflows import safety as workflow

    if import_garak is not None:
        _end(workflow.import_garak(import_garak, out), out, as_json)
        return
    if model == MAKES_CANARIES and not endpoint:
        _make_canaries(num, seed, out, as_json)
        return
    how: dict[str, Any] = {"chat_format": format, "device": device, "dtype": dtype}
    asked = required_party("endpoint", model, endpoint, model=endpoint_model, key_env=endpoint_key_env, **how)
    folder = out or Path("runs") / f"safety-{_file_name(asked.name)}"
    with Progress(quiet=quiet) as progress:
        if canaries is not None:
            from gristmill.evaluate.safety import read_canaries

            results = workflow.leakage(asked, read_canaries(canaries), folder, progress, seed=seed)
            _end(results, folder, as_json, lines=_canary_lines(results))
            return
        from gristmill.evaluate.attacks import ATTACKS

        chains = list(ATTACKS) if attacks == "all" else _parted(attacks)
        guards = workflow.open_guards(
            guard or [],
            guard_model,
            guard_key_env,
            logprobs=guard_logprobs,
            taxonomy=taxonomy,
            permissive=caution == "permissive",
            device=device,
            dtype=dtype,
        )
        settings = workflow.SafetySettings(
            sets=_parted(sets),
            data=data,
            attacks=chains,
            limit=limit,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            concurrency=concurrency,
            system=system,
            retry_failed=retry_failed,
            guards=guards,
        )
        results = workflow.safety(asked, settings, folder, progress)
    _end(results, folder, as_json)


def _parted(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip(".")[:80] or "model"


def _make_canaries(num: int, seed: int, out: Path | None, as_json: bool) -> None:
    from gristmill.data.rows import write_rows
    from gristmill.evaluate.safety import canary_rows, make_canaries

    path = out or Path("canaries.jsonl")
    if path.suffix not in (".jsonl", ".parquet"):
        raise InputError(f"{path} is neither .jsonl nor .parquet: name such a file with --out.")
    written = write_rows(path, canary_rows(make_canaries(num, seed)))
    facts = {"canaries": written, "file": str(path)}
    echo(
        json.dumps(facts)
        if as_json
        else f"{written} canaries: {path}\nTrain on them among other rows, then: gristmill safety MODEL --canaries {path}"
    )


def _canary_lines(results: dict[str, Any]) -> list[str]:
    lines = []
    for name in ("planted", "control"):
        found = results[name]
        s = found["repeated"]
        line = f"{name:<8} repeated {s['mean']:.3f} [{s['ci95'][0]:.3f}, {s['ci95'][1]:.3f}]  n {s['n']}"
        if e := found.get("exposure"):
            line += f"  exposure {e['mean']:.2f} bits [{e['ci95'][0]:.2f}, {e['ci95'][1]:.2f}] of {results['candidates']} candidates"
        lines.append(line)
    return lines


def _end(results: dict[str, Any], folder: Path | None, as_json: bool, lines: list[str] | None = None) -> None:
    from gristmill.report.safety import write_safety_page
    from gristmill.workflows.safety import table_lines

    page = write_safety_page(folder) if folder is not None else None
    if as_json:
        echo(json.dumps(results))
        return
    for line in table_lines(results) if lines is None else lines:
        echo(line)
    if folder is not None:
        echo(f"folder: {folder}\npage: {page}")
