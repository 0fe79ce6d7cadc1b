"""The command line. Each command is a few lines that call the library; heavy imports wait until a command needs them.

Exit codes: 0 done, 1 a bug (with a traceback), 2 bad input (one sentence), 3 rows failed for good, 130 interrupted.
"""

import json
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from gristmill.core.errors import InputError

# Before torch is loaded: threads that wait must not spin. On two cores with a busy neighbour, spinning costs up to 9x.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    help="Base, Instruct and Reward models that write, judge and learn from their own alignment data.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write to.")]
ComputeIn = Annotated[Literal["fp32", "bf16"], typer.Option("--dtype", help="Type to compute in.")]
Quantized = Annotated[
    Literal["", "int8", "int8-weight", "fp8"],
    typer.Option("--quantize", help="Quantize the layers' matrices, and activations but for int8-weight; default as the folder was saved."),
]
Cached = Annotated[Literal["", "fp32", "bf16", "int8", "fp8"], typer.Option("--cache", help="Type of keys and values; default as --dtype.")]
Format = Annotated[str, typer.Option("--format", help="Chat format: auto, nemotron, chatml or llama3.")]
Unsafe = Annotated[bool, typer.Option("--unsafe-code", help="Run model-written programs WITHOUT a jail where the kernel offers none.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress display.")]
MaxTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]


def command(example: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a command: its example closes its help, bad input ends in one sentence and exit code 2."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def safe(*args: Any, **kwargs: Any) -> None:
            try:
                function(*args, **kwargs)
            except InputError as e:
                typer.echo(f"gristmill: {e}", err=True)
                raise typer.Exit(2) from e
            except KeyboardInterrupt as e:
                typer.echo("gristmill: interrupted; run the same command again to continue.", err=True)
                raise typer.Exit(130) from e

        app.command(epilog=f"Example: {example}")(safe)
        return function

    return register


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Base, Instruct and Reward models that write, judge and learn from their own alignment data."""
    if version:
        from gristmill import __version__

        typer.echo(__version__)
        raise typer.Exit


@command("gristmill run miniature")
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder; default runs/NAME.")] = None,
    control: Annotated[
        str | None, typer.Option(help="Run a control instead: unfiltered, random-filter, reward-only, human-only or replace.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Overrides the recipe's seed.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Overrides the recipe's rounds.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default all cores.")] = None,
    unsafe_code: Unsafe = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Turn the mill: all rounds of a recipe, from the start or from where it was cut off."""
    from gristmill.core.config import find_recipe, load
    from gristmill.workflows.alignment.recipe import AlignmentRecipe

    given = {"control": control, "seed": seed, "rounds": rounds, "threads": threads}
    loaded = load(find_recipe(recipe, "alignment"), AlignmentRecipe, {k: v for k, v in given.items() if v is not None})
    name = "-".join([loaded.name, *([loaded.control] if loaded.control else []), *([f"seed{seed}"] if seed is not None else [])])
    folder = out or Path("runs") / name
    from gristmill.core.progress import Progress
    from gristmill.report.report import write_report
    from gristmill.report.text import headline, stage_line
    from gristmill.workflows.alignment.loop import run as turn

    with Progress(quiet=quiet, describe=stage_line) as progress:
        results = turn(loaded, folder, progress, unsafe_code)
    page = write_report(folder)
    if as_json:
        typer.echo(json.dumps(results))
    else:
        for line in headline(results, folder):
            typer.echo(line)
        typer.echo(f"report: {page}")


@command("gristmill status runs/miniature")
def status(
    folder: Annotated[Path, typer.Argument(help="Run folder.")] = Path("runs/miniature"),
    as_json: AsJson = False,
) -> None:
    """What a run has done so far."""
    from gristmill.report.text import stage_line
    from gristmill.runs.reader import read_run

    data = read_run(folder)
    stages = [{k: s.get(k) for k in ("folder", "seconds")} | {"done": s.get("fingerprint") is not None} for s in data.stages]
    if as_json:
        typer.echo(json.dumps({"folder": str(folder), "finished": data.results is not None, "stages": stages}))
        return
    for s in data.stages:
        seconds = f"{s['seconds']:>7.1f} s" if "seconds" in s else "  unfinished"
        typer.echo(f"{s['folder']:<22} {seconds}  {stage_line(s)}".rstrip())
    typer.echo("finished" if data.results else "not finished: run the same command again to continue")


@command("gristmill report runs/miniature")
def report(folder: Annotated[Path, typer.Argument(help="Run folder.")] = Path("runs/miniature"), as_json: AsJson = False) -> None:
    """Write the page of a run again and print its path."""
    from gristmill.report.report import write_report

    page = write_report(folder)
    typer.echo(json.dumps({"report": str(page)}) if as_json else str(page))


@command("gristmill compare runs/miniature runs/miniature-human-only")
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Run folders; the first is what the others are compared with.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write a page.")] = None,
    as_json: AsJson = False,
) -> None:
    """Set finished runs side by side."""
    from gristmill.report.compare import compare_runs, comparison_text, write_comparison

    table = compare_runs(folders)
    typer.echo(json.dumps(table) if as_json else comparison_text(table))
    if out:
        typer.echo(str(write_comparison(table, out)), err=as_json)


@command("gristmill pretrain miniature-base --out runs/base")
def pretrain(
    recipe: Annotated[str, typer.Argument(help="A pretraining recipe file, or the name of a shipped one.")],
    out: Out,
    tokens: Annotated[int | None, typer.Option(help="Overrides the recipe's tokens.")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a Base model from scratch on documents."""
    from gristmill.core.config import find_recipe, load
    from gristmill.core.progress import Progress
    from gristmill.workflows import pretrain as pretraining
    from gristmill.workflows.alignment.context import on_step

    loaded = load(find_recipe(recipe, "pretraining"), pretraining.Pretraining)
    if tokens is not None:
        loaded = loaded.model_copy(update={"tokens": tokens})
    with Progress(quiet=quiet) as progress, progress.stage("pretrain"):
        result = pretraining.pretrain(loaded, out, on_step(progress))
    _done(result, out / "model", as_json)


@command("gristmill train sft --model runs/base/model --data demonstrations.jsonl --out runs/sft")
def train(
    kind: Annotated[str, typer.Argument(help="sft, reward, dpo, cdpo, ipo, rpo, rpo_fwd_kl or rpo_sq.")],
    model: Annotated[Path, typer.Option(help="Model folder to start from (Hugging Face layout).")],
    data: Annotated[Path, typer.Option(help="JSONL or Parquet: messages; ratings; or prompt, chosen, rejected.")],
    out: Out,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-5,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Samples (or pairs) a step.")] = 64,
    beta: Annotated[float, typer.Option(help="Preference losses: strength of the reference.")] = 0.1,
    eta: Annotated[float, typer.Option(help="RPO: scale of the reward gap.")] = 1.0,
    sft_weight: Annotated[float, typer.Option(help="Preference losses: weight of the SFT term.")] = 0.0,
    precision: Annotated[str, typer.Option(help="fp32 or bf16 compute; weights are always fp32.")] = "fp32",
    format: Format = "auto",
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """One training stage on your own rows."""
    from gristmill.core.progress import Progress
    from gristmill.train.settings import section
    from gristmill.workflows.alignment.context import on_step
    from gristmill.workflows.train import train_model

    values: dict[str, Any] = {"lr": lr, "epochs": epochs, "batch_size": batch_size, "precision": precision}
    if kind not in ("sft", "reward"):
        values |= {"loss": kind, "beta": beta, "eta": eta, "sft_weight": sft_weight}
    settings = section(values, preference=kind not in ("sft", "reward"))
    with Progress(quiet=quiet) as progress, progress.stage(kind):
        result = train_model(kind, model, data, out, settings, chat_format=format, seed=seed, on_step=on_step(progress))
    _done(result, out / "model", as_json)


def _done(result: Any, model: Path, as_json: bool) -> None:
    facts = {"model": str(model), "steps": result.steps, "tokens": result.tokens, "seconds": result.seconds, "loss": result.metrics["loss"]}
    text = (
        f"{result.steps} steps, {result.tokens:,} tokens in {result.seconds:.1f} s, last loss {result.metrics['loss']:.4f}\nmodel: {model}"
    )
    typer.echo(json.dumps(facts) if as_json else text)


@command('gristmill generate runs/base/model "What is the capital of Runi?"')
def generate(
    model: Annotated[Path, typer.Argument(help="Model folder.")],
    prompt: Annotated[str | None, typer.Argument(help="One prompt; or use --prompts.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSONL or Parquet with `prompt` or `messages`.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="JSONL file for the answers; default standard output.")] = None,
    n: Annotated[int, typer.Option(help="Answers a prompt.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 keeps all.")] = 0,
    max_tokens: MaxTokens = 128,
    format: Format = "auto",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Answer prompts with a model."""
    from gristmill.core.io import write_jsonl
    from gristmill.data.chat import Message
    from gristmill.data.readers import read_prompts
    from gristmill.engine.load import EngineArgs, answer_rows, load_engine
    from gristmill.generation.api import SamplingParams

    if (prompt is None) == (prompts is None):
        raise InputError("Give either a prompt or --prompts FILE.")
    asked = [(Message("user", prompt),)] if prompt is not None else [p.messages for p in read_prompts(prompts or Path(), "file")]
    sampling = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens, n=n)
    rows = answer_rows(load_engine(model, EngineArgs(chat_format=format)), asked, sampling, seed)
    if out:
        typer.echo(f"{write_jsonl(out, rows)} prompts answered: {out}", err=as_json)
        return
    for row in rows:
        typer.echo(json.dumps(row) if as_json else "\n".join(r["text"] for r in row["responses"]))


@command("gristmill score runs/miniature/01-reward/model --data answers.jsonl")
def score(
    model: Annotated[Path, typer.Argument(help="Reward model folder.")],
    data: Annotated[Path, typer.Option(help="JSONL or Parquet: messages ending with the assistant, or prompt and response.")],
    format: Format = "auto",
    as_json: AsJson = False,
) -> None:
    """Rate answers: helpfulness, correctness, coherence, complexity, verbosity, and their weighted sum."""
    from gristmill.judge.reward import rate_file

    for row in rate_file(model, data, format):
        line = ",".join(f"{k}:{v:.4f}" for k, v in row.items() if k != "id")
        typer.echo(json.dumps(row) if as_json else f"{row['id']}  {line}")


@command("gristmill eval runs/miniature/02-demonstrations/model")
def eval(
    model: Annotated[Path, typer.Argument(help="Model folder.")],
    prompts: Annotated[Path | None, typer.Option(help="Prompts with `truth` or `answer`; default the miniature world's.")] = None,
    max_tokens: MaxTokens = 80,
    dtype: ComputeIn = "fp32",
    quantize: Quantized = "",
    cache: Cached = "",
    format: Format = "auto",
    seed: Seed = 0,
    unsafe_code: Unsafe = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Greedy and sampled accuracy with 95 % intervals, by task; with --quantize or --cache also how far from the model that leads."""
    from gristmill.core.progress import Progress
    from gristmill.engine.load import EngineArgs, load_engine
    from gristmill.model.hf import saved_as
    from gristmill.workflows.evaluate import evaluate

    running = EngineArgs(dtype, quantize, cache, chat_format=format)
    with Progress(quiet=quiet) as progress, progress.stage("eval"):
        scores = evaluate(load_engine(model, running, own=False), prompts, max_tokens, seed, unsafe_code, progress)
    scores.pop("outcomes")
    if as_json:
        typer.echo(json.dumps(scores))
        return
    for task in scores["greedy"]:
        greedy, sampled = scores["greedy"][task], scores["sampled"][task]
        cells = [f"{s['mean']:.3f} [{s['ci95'][0]:.3f}, {s['ci95'][1]:.3f}]" for s in (greedy, sampled)]
        typer.echo(f"{task:<12} greedy {cells[0]}  sampled {cells[1]}  n {greedy['n']}")
    if lost := scores.get("quantized"):
        beside = "the weights that it was saved with" if saved_as(model) else "the model"
        typer.echo(
            f"beside {beside}: KL {lost['kl']:.2g} nats a token (at most {lost['kl_max']:.2g}), the likeliest token is the same for "
            f"{lost['agreement']:.2%} of {lost['tokens']:,} tokens"
        )


@command("gristmill quantize runs/miniature/02-demonstrations/model --to int8 --out runs/int8")
def quantize(
    model: Annotated[Path, typer.Argument(help="Model folder.")],
    out: Out,
    to: Annotated[Literal["int8", "int8-weight", "fp8"], typer.Option(help="int8 and fp8: activations too, as they come.")] = "int8",
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option("--dtype", help="Type of embeddings, norms and output matrix.")] = "bf16",
    as_json: AsJson = False,
) -> None:
    """Save a model with its layers' matrices in eight bits, in compressed-tensors' form, which gristmill and vLLM read."""
    from gristmill.model.hf import quantize_folder

    facts = quantize_folder(model, out, to, dtype)
    typer.echo(json.dumps(facts) if as_json else f"{facts['bytes'] / 2**20:,.1f} MiB of weights\nmodel: {facts['model']}")


@command("gristmill chat runs/miniature/02-demonstrations/model")
def chat(
    model: Annotated[Path, typer.Argument(help="Model folder.")],
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    max_tokens: MaxTokens = 256,
    format: Format = "auto",
    seed: Seed = 0,
) -> None:
    """Talk with a model in the terminal. An empty line or Ctrl-D ends it; /new starts over."""
    from gristmill.data.chat import Message
    from gristmill.engine.load import EngineArgs, answer_rows, load_engine
    from gristmill.generation.api import SamplingParams

    engine = load_engine(model, EngineArgs(chat_format=format))
    sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens)
    talk: list[Message] = []
    while True:
        typer.echo("you> ", nl=False)
        line = sys.stdin.readline().strip()
        if not line:
            typer.echo("")
            return
        if line == "/new":
            talk = []
            continue
        talk.append(Message("user", line))
        row = next(answer_rows(engine, [talk], sampling, seed))
        answer = row["responses"][0]["text"]
        talk.append(Message("assistant", answer))
        typer.echo(f"{engine.name}> {answer}")


@command("gristmill init --model ./llama --demonstrations demos.jsonl --ratings rated.jsonl --evaluation test.jsonl --out mine.yaml")
def init(
    out: Annotated[Path, typer.Option("--out", "-o", help="AlignmentRecipe file to write.")] = Path("recipe.yaml"),
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
    typer.echo(f"{out} is written: read it, then `gristmill run {out}`.")


@command("gristmill serve runs/miniature/29-r2-rpo3/model --reward runs/miniature/01-reward/model --port 8000")
def serve(
    model: Annotated[Path, typer.Argument(help="Model folder.")],
    reward: Annotated[Path | None, typer.Option(help="Folder of a reward model, served beside it by its folder's name.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    name: Annotated[str, typer.Option(help="Name that clients know the model by; default the folder's.")] = "",
    api_key_env: Annotated[str, typer.Option(help="Environment variable with keys, parted by spaces.")] = "",
    api_key_file: Annotated[Path | None, typer.Option(help="File with such keys, one a line.")] = None,
    most_open: Annotated[int, typer.Option(help="Samples under way or waiting, beyond which requests get status 429.")] = 4096,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take.")] = 600.0,
    max_batch: Annotated[int, typer.Option(help="Most responses in flight.")] = 256,
    cache_tokens: Annotated[
        int | None, typer.Option(help="Positions in a worker's cache; default: a quarter of the memory at most.")
    ] = None,
    dtype: ComputeIn = "fp32",
    quantize: Quantized = "",
    cache: Cached = "",
    chat_format: Format = "auto",
) -> None:
    """Serve a model by the OpenAI protocol: chat and text completions, streamed too; ratings; /health and /metrics."""
    from gristmill.engine.load import EngineArgs
    from gristmill.server.serve import Serving
    from gristmill.server.serve import serve as serve_model

    how = Serving(host, port, name, reward, api_key_env, api_key_file, most_open, timeout)
    serve_model(model, how, EngineArgs(dtype, quantize, cache, max_batch, cache_tokens, chat_format))


@command("gristmill synth recipe.yaml --dry-run")
def synth(
    recipe: Annotated[str, typer.Argument(help="A dataset recipe; or `errors`, to list the calls of a run that failed for good.")],
    folder: Annotated[Path | None, typer.Argument(help="After `errors`: the run's folder.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder; default runs/NAME.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Ask nobody: print the calls, tokens and cost that it would take.")] = False,
    limit: Annotated[int | None, typer.Option(help="Most rows of each pipeline, to try a recipe.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Ask again what failed for good in an earlier start.")] = False,
    unsafe_code: Unsafe = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write a dataset: prompts, dialogues, answers, judgements and pairs. Exit code 3 when calls failed for good."""
    if recipe == "errors":
        return _synth_errors(folder or Path("runs"), as_json)
    from gristmill.core.config import find_recipe, load
    from gristmill.workflows.dataset import run as dataset
    from gristmill.workflows.dataset.recipe import DatasetRecipe

    loaded = load(find_recipe(recipe, "dataset"), DatasetRecipe)
    if dry_run:
        estimate = dataset.dry_run(loaded)
        if as_json:
            typer.echo(json.dumps(estimate))
            return
        for name, m in estimate["models"].items():
            typer.echo(f"{name}: {m['calls']:,} calls, {m['tokens_in']:,} tokens in, {m['tokens_out']:,} out, cost {m['cost']:.2f}")
        typer.echo(f"in all about {estimate['calls']:,} calls, cost {estimate['cost']:.2f}; nothing was asked")
        return
    from gristmill.core.progress import Progress

    target = out or Path("runs") / loaded.name
    results = dataset.run(loaded, target, Progress(quiet=quiet), limit=limit, retry_failed=retry_failed, unsafe_code=unsafe_code)
    if as_json:
        typer.echo(json.dumps(results))
    else:
        counts = ", ".join(f"{results[name]:,} {name}" for name in ("prompts", "responses", "demonstrations", "pairs"))
        typer.echo(f"{counts}: {target}")
    if failed := results["calls"]["failed"]:
        typer.echo(
            f"gristmill: {failed:,} calls failed for good: see `gristmill synth errors {target}`, and run again with --retry-failed.",
            err=True,
        )
        raise typer.Exit(3)


def _synth_errors(folder: Path, as_json: bool) -> None:
    from gristmill.workflows.dataset.lineage import errors

    for record in errors(folder):
        if as_json:
            typer.echo(json.dumps(record))
        else:
            asked = " ".join(record.get("prompt", "").split())[:80]
            typer.echo(f"{record['id']}  {record['attempts']} attempts, status {record['status']}: {record['error']}  [{asked}]")


@command("gristmill curate folder --input docs --out runs/docs")
def curate(
    recipe: Annotated[str, typer.Argument(help="A curation recipe file, or the name of a shipped one.")],
    input: Annotated[list[str] | None, typer.Option("--input", "-i", help="File, folder or pattern; overrides the recipe's.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder; default runs/NAME.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; default one a core.")] = None,
    executor: Annotated[Literal["", "processes", "ray"], typer.Option(help="Who does the work; overrides the recipe's.")] = "",
    explain: Annotated[str, typer.Option(help="Do nothing but say what became of the document of this id.")] = "",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """From raw text to documents worth training on: cleaned, filtered, without duplicates, with a reason for every one dropped."""
    from gristmill.core.config import find_recipe, load
    from gristmill.curate import run as curation
    from gristmill.curate.recipe import Curation

    given = {"inputs": input, "workers": workers, "executor": executor or None}
    loaded = load(find_recipe(recipe, "curation"), Curation, {k: v for k, v in given.items() if v is not None})
    folder = out or Path("runs") / loaded.name
    if explain:
        for found in curation.explain(folder, explain):
            text = " ".join(found.pop("text").split())
            facts = ", ".join(f"{k} {v}" for k, v in found.items() if v not in (None, ""))
            typer.echo(json.dumps(found | {"text": text}) if as_json else f"{facts}\n    {text[:300]}")
        return
    from gristmill.core.progress import Progress
    from gristmill.report.curation import funnel_lines, write_page

    with Progress(quiet=quiet) as progress:
        funnel = curation.run(loaded, folder, progress)
    page = write_page(folder, funnel)
    typer.echo(json.dumps(funnel) if as_json else "\n".join([*funnel_lines(funnel), f"documents: {folder / 'data'}", f"report: {page}"]))


@command("gristmill blend blend.yaml --out runs/blend")
def blend(
    recipe: Annotated[str, typer.Argument(help="A blend recipe file, or the name of a shipped one.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the blend; default runs/NAME.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; default one a core.")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Documents of several sources as tokens, each in its share, in the order that they are trained on."""
    from gristmill.core.config import find_recipe, load
    from gristmill.core.progress import Progress
    from gristmill.curate.blend import blend as blends

    loaded = load(find_recipe(recipe, "blend"), blends.Blend, {} if workers is None else {"workers": workers})
    folder = out or Path("runs") / loaded.name
    with Progress(quiet=quiet) as progress:
        facts = blends.blend(loaded, folder, progress)
    typer.echo(json.dumps(facts) if as_json else "\n".join([*blends.blend_lines(facts), f"tokens: {folder}"]))


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
    typer.echo(json.dumps(facts) if as_json else "\n".join([*(f"{name}: {value}" for name, value in facts.items()), f"model: {out}"]))


@command("gristmill rows lineage 0123456789abcdef --folder runs/tides")
def rows(
    action: Annotated[str, typer.Argument(help="What to show: lineage, the chain of calls and rows behind a row.")],
    name: Annotated[str, typer.Argument(help="The row's id.")],
    folder: Annotated[Path, typer.Option(help="Folder of a dataset run.")] = Path("."),
    as_json: AsJson = False,
) -> None:
    """Look into the rows of a dataset run."""
    if action != "lineage":
        raise InputError(f"Unknown action {action!r}: use `gristmill rows lineage ID`.")
    from gristmill.workflows.dataset.lineage import lineage

    for entry in lineage(folder, name):
        if as_json:
            typer.echo(json.dumps(entry))
            continue
        hidden = {"id", "depth", "kind", "text", "parents"}
        facts = ", ".join(f"{k} {v}" for k, v in entry.items() if k not in hidden and v not in ("", {}))
        typer.echo(f"{'  ' * entry['depth']}{entry['id']}  {entry['kind']}  {facts}  {entry['text']}".rstrip())
