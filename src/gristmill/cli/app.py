"""The command-line application: groups of commands, options that several share, and how errors end.

Each command is a few lines that call the library; heavy imports wait until a command needs them. Exit codes: 0 done, 1 a bug (with a
traceback), 2 bad input (one sentence), 3 rows failed for good, 4 done with alarms, 130 interrupted.
"""

import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import typer.core

from gristmill.core.echo import echo, guarded_stderr, sentence
from gristmill.core.errors import InputError

# Before torch is loaded: threads that wait must not spin. On two cores with a busy neighbour, spinning costs up to 9x.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

GROUPS = {
    "Whole runs": ("run", "rl", "compress", "synth", "curate", "blend", "pretrain", "plan", "claims", "init"),
    "Look at runs": ("status", "report", "answers", "compare", "check", "rows"),
    "Single steps": ("train", "merge", "quality", "quantize", "export", "add-chat-tokens", "generate", "score", "eval", "judge", "safety"),
    "Talk and serve": ("chat", "serve", "studio"),
}


class Grouped(typer.core.TyperGroup):
    """Lists the commands by what they are for, each with its whole help line."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # classes of click, or of typer's copy of it
        width = max(map(len, self.commands))
        for title, names in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), self.commands[name].get_short_help_str(limit=400)) for name in names])

    def main(self, *args: Any, **options: Any) -> Any:
        with guarded_stderr():
            return super().main(*args, **options)


app = typer.Typer(
    cls=Grouped,
    help="Base, Instruct and Reward models that write, judge and learn from their own alignment data.",
    epilog="`gristmill COMMAND --help` shows a command's options and an example.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write to.")]
RunOut = Annotated[Path | None, typer.Option("--out", "-o", help="Run folder; default runs/NAME.")]
Dtype = Annotated[
    Literal["auto", "fp32", "bf16"],
    typer.Option("--dtype", help="Type to compute in; auto: as the checkpoint is stored, bf16 where that is fast; on a GPU bf16."),
]
Quantized = Annotated[
    Literal["", "int8", "int8-weight", "int4", "fp8"],
    typer.Option("--quantize", help="Quantize the layers' matrices, and of int8 and fp8 activations; default as the folder was saved."),
]
QuantizedHead = Annotated[Literal["", "int8"], typer.Option("--head", help="Quantize the output matrix too, its weights alone.")]
CacheDtype = Annotated[
    Literal["", "fp32", "bf16", "int8", "fp8"], typer.Option("--cache", help="Type of keys and values; default as --dtype.")
]
StepTokens = Annotated[
    int | None,
    typer.Option(
        help="Most tokens computed at once (vLLM's max_num_batched_tokens); default: as many as is fastest, in serve as keep gaps short."
    ),
]
Speculative = Annotated[
    str,
    typer.Option(
        "--speculative-config", help="Draft tokens by n-gram look-up: ngram, or vLLM's JSON. Same answers, sooner where they copy a text."
    ),
]
ChatFormat = Annotated[str, typer.Option("--format", help="Chat format: auto (the model folder's own), plain, nemotron, chatml or llama3.")]
Device = Annotated[str, typer.Option(help="Where to compute: auto (a GPU where there is one), cpu, cuda, cuda:1, mps.")]
RunDevice = Annotated[str | None, typer.Option("--device", help="Overrides the recipe's device: auto, cpu, cuda, cuda:1, mps.")]
Tp = Annotated[int, typer.Option(help="Processes of torchrun that share out every matrix (tensor parallel).")]
Cp = Annotated[int, typer.Option(help="Processes that share out the tokens of each document (context parallel).")]
Pp = Annotated[int, typer.Option(help="Processes that share out the layers (pipeline parallel); what is left shares out the samples.")]
Vp = Annotated[int, typer.Option(help="Virtual stages of each process of a pipeline; with 2 or more its schedule is interleaved.")]
PpSchedule = Annotated[
    Literal["1f1b", "zero-bubble", "zbv"],
    typer.Option(help="Schedule of a pipeline; zero-bubble (--vp 2 or more) and zbv (--vp 2): gradients of matrices fill its bubbles."),
]
Unsafe = Annotated[bool, typer.Option("--unsafe-code", help="Run model-written programs WITHOUT a jail where the kernel offers none.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress display.")]
MaxTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
Thinking = Annotated[
    Literal["", "on", "off"], typer.Option(help="Put the toggle's line, `detailed thinking on` or off, into the system turn.")
]
ThinkingTokens = Annotated[
    int | None, typer.Option("--max-thinking-tokens", help="Thinking budget: after so many tokens `</think>` is forced; default: none.")
]
Workers = Annotated[int | None, typer.Option(help="Processes; default one a core.")]


OTHER_PROCESSES_WAIT = 5.0  # seconds until a process that is not the first tells a fault


def endpoint_options(option: str, of: str, url: str = "") -> tuple[Any, Any, Any]:
    """Options of a model behind an endpoint: its base URL, the model's name there, the variable of its key (`judge.party.party_of`).

    Args:
        option: the first one's name, with which the others begin; without dashes.
        of: whose endpoint it is, for the help: "the judge's".
        url: help of the first, where it takes more than a URL.
    """
    return (
        typer.Option(f"--{option}", help=url or f"Base URL of {of} endpoint, up to and including /v1."),
        typer.Option(f"--{option}-model", help=f"Name that {of} endpoint knows it by."),
        typer.Option(f"--{option}-key-env", help=f"Environment variable that holds the key of {of} endpoint."),
    )


def command(example: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a command: its example closes its help, bad input ends in one sentence and exit code 2."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def safe(*args: Any, **kwargs: Any) -> None:
            try:
                function(*args, **kwargs)
            except (typer.Exit, typer.Abort):
                raise
            except InputError as e:
                who = "gristmill"
                if (rank := os.environ.get("RANK", "0")) != "0":
                    # the first process tells a fault that all share, and torchrun ends the others meanwhile
                    time.sleep(OTHER_PROCESSES_WAIT)
                    who = f"gristmill (process {rank})"
                echo(f"{who}: {sentence(str(e))}", err=True)
                raise typer.Exit(2) from e
            except KeyboardInterrupt as e:
                echo("gristmill: interrupted; run the same command again to continue.", err=True)
                raise typer.Exit(130) from e
            except BrokenPipeError as e:  # `gristmill ... | head`
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                raise typer.Exit(141) from e
            except OSError as e:
                where = f": {e.filename}" if e.filename else ""
                what = sentence(f"{e.strerror or e}{where}")
                echo(f"gristmill: {what}. What was finished is kept: mend this and run the same command again.", err=True)
                raise typer.Exit(2) from e
            except Exception as e:  # a bug; its message may hold foreign text
                echo(traceback.format_exc().rstrip(), err=True)
                raise typer.Exit(1) from e

        app.command(epilog=f"Example: {example}")(safe)
        return function

    return register


@app.callback(invoke_without_command=True)
def version_or_help(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Base, Instruct and Reward models that write, judge and learn from their own alignment data."""
    if version:
        from gristmill import __version__

        echo(__version__)
        raise typer.Exit


def end_with_alarms(alarms: Sequence[Mapping[str, str]], code: int = 4) -> None:
    """Say each alarm of a finished run, and end with an exit code if there is one."""
    for alarm in alarms:
        echo(f"gristmill: alarm: {sentence(alarm['text'])}", err=True)
    if alarms:
        raise typer.Exit(code)


def given(**values: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in values.items() if value is not None}
