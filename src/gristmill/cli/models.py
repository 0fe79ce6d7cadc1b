"""Commands that train, run, judge and serve models."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from gristmill.cli.app import (
    AsJson,
    CacheDtype,
    ChatFormat,
    Cp,
    Device,
    Dtype,
    MaxTokens,
    Out,
    Pp,
    PpSchedule,
    Quantized,
    QuantizedHead,
    Quiet,
    RunDevice,
    Seed,
    Speculative,
    StepTokens,
    Thinking,
    ThinkingTokens,
    Tp,
    Unsafe,
    Vp,
    command,
    endpoint_options,
    given,
)
from gristmill.core.echo import echo
from gristmill.core.errors import InputError

_URL, _NAME, _KEY = endpoint_options("endpoint", "the model's")


@command("gristmill pretrain miniature-base --out runs/base")
def pretrain(
    recipe: Annotated[str, typer.Argument(help="A pretraining recipe file, or the name of a shipped one.")],
    out: Out,
    model: Annotated[str | None, typer.Option(help="Model folder to go on from; overrides the recipe's.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Overrides the recipe's tokens.")] = None,
    tp: Tp = 1,
    cp: Cp = 1,
    pp: Pp = 1,
    vp: Vp = 1,
    pp_schedule: PpSchedule = "1f1b",
    device: RunDevice = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a Base model on documents: from scratch, or from a model (continued pretraining), with losses by source before and after."""
    from gristmill.core.config import find_recipe, load
    from gristmill.core.device import pick_device
    from gristmill.core.progress import Progress
    from gristmill.parallel.mesh import ParallelDims, process_mesh
    from gristmill.workflows import pretrain as pretraining

    loaded = load(find_recipe(recipe, "pretraining"), pretraining.Pretraining, given(model=model, tokens=tokens, device=device))
    with (
        process_mesh(pick_device(loaded.device), ParallelDims(tp, cp, pp, vp, pp_schedule)) as mesh,
        Progress(quiet=quiet or not mesh.is_writer) as progress,
        progress.stage("pretrain"),
    ):
        result = pretraining.pretrain(loaded, out, progress.train_step, mesh)
    if mesh.is_writer:
        _done(result, out / "model", as_json)
        if result.tokens < 0.95 * loaded.tokens:
            words = f"gristmill: the documents end after {result.tokens:,} of the {loaded.tokens:,} tokens that `tokens` asks for."
            echo(words, err=True)
        for line in pretraining.held_out_lines(out) if not as_json else ():
            echo(line)


@command("gristmill train sft --model runs/base/model --data demonstrations.jsonl --out runs/sft")
def train(
    kind: Annotated[str, typer.Argument(help="sft, reward, guard, distill, dpo, cdpo, ipo, rpo, rpo_fwd_kl or rpo_sq.")],
    model: Annotated[Path, typer.Option(help="Model folder to start from (Hugging Face layout).")],
    data: Annotated[Path, typer.Option(help="JSONL or Parquet: messages; ratings; codes; or prompt, chosen, rejected.")],
    out: Out,
    lr: Annotated[float | None, typer.Option(help="Learning rate; default by the model's size.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data; default by the model's size.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples (or pairs) a step; default by the model's size and the rows.")] = None,
    beta: Annotated[float, typer.Option(help="Preference losses: strength of the reference.")] = 0.1,
    eta: Annotated[float, typer.Option(help="RPO: scale of the reward gap.")] = 1.0,
    sft_weight: Annotated[float, typer.Option(help="Preference losses: weight of the SFT term.")] = 0.0,
    taxonomy: Annotated[Path | None, typer.Option(help="Guard: JSON file of categories; default AEGIS's thirteen.")] = None,
    max_fpr: Annotated[float, typer.Option(help="Guard: share of safe rows that each category may call unsafe.", min=0, max=0.999)] = 0.05,
    teacher: Annotated[Path | None, typer.Option(help="Distill: model folder to learn from, with the same tokenizer.")] = None,
    distill_loss: Annotated[
        Literal["auto", "cosine+kl", "kl", "cosine+kl+lm", "kl+lm", "lm"],
        typer.Option(help="Distill: terms of the loss; auto: cosine+kl where layers pair, else kl."),
    ] = "auto",
    teacher_top_k: Annotated[
        int | None,
        typer.Option(help="Distill: keep so many of the teacher's log-probabilities a token on disk, not the teacher in memory.", min=1),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="auto, fp32 or bf16 compute, or fp8 or fp8_tensorwise products in bf16; weights are always fp32.")
    ] = "auto",
    micro_batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens that go through the model at once; default: as many as pay, within the free memory.")
    ] = None,
    checkpoint_activations: Annotated[
        Literal["auto", "true", "false", "selective"],
        typer.Option(help="Compute activations twice, to keep fewer; selective: but products; auto: where memory is short."),
    ] = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="Norms, activations and rotations by torch.compile: for GPUs.")] = False,
    tp: Tp = 1,
    cp: Cp = 1,
    pp: Pp = 1,
    vp: Vp = 1,
    pp_schedule: PpSchedule = "1f1b",
    lora_rank: Annotated[int, typer.Option(help="Train a LoRA adapter of this rank, written to OUT/adapter; 0: all weights.")] = 0,
    lora_alpha: Annotated[float | None, typer.Option(help="LoRA: alpha / rank scales the update; default twice the rank.")] = None,
    lora_targets: Annotated[str, typer.Option(help="LoRA: names as q_proj,v_proj parted by commas; default all there are.")] = "",
    lora_base: Annotated[Literal["fp32", "bf16", "int8", "nf4"], typer.Option(help="LoRA: type of the frozen matrices.")] = "fp32",
    lora_b_lr_ratio: Annotated[float, typer.Option(help="LoRA+: learning rate of B, in those of A.")] = 1.0,
    rslora: Annotated[bool, typer.Option("--rslora", help="LoRA: alpha / sqrt(rank) in place of alpha / rank.")] = False,
    dora: Annotated[bool, typer.Option("--dora", help="LoRA: train the lengths of the updated rows too.")] = False,
    device: Device = "auto",
    format: ChatFormat = "auto",
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """One training stage on your own rows: of the whole model, or with --lora-rank of an adapter beside it."""
    from gristmill.core.device import pick_device
    from gristmill.core.progress import Progress
    from gristmill.judge.guards import read_taxonomy
    from gristmill.parallel.mesh import ParallelDims, process_mesh
    from gristmill.train.settings import MIN_STEPS, training_section
    from gristmill.workflows.train import train_model

    values: dict[str, Any] = {"lr": lr, "epochs": epochs, "batch_size": batch_size, "precision": precision, "compile": compile}
    values |= given(micro_batch_tokens=micro_batch_tokens)
    values["checkpoint_activations"] = {"true": True, "false": False}.get(checkpoint_activations, checkpoint_activations)
    if kind != "guard" and (taxonomy is not None or max_fpr != 0.05):
        raise InputError("--taxonomy and --max-fpr are of a guard: give them to `gristmill train guard`.")
    if kind == "distill":
        values |= {"loss": distill_loss, "teacher_top_k": teacher_top_k}
    elif teacher is not None or distill_loss != "auto" or teacher_top_k is not None:
        raise InputError("--teacher, --distill-loss and --teacher-top-k are of distillation: give them to `gristmill train distill`.")
    if kind not in ("sft", "reward", "guard", "distill"):
        values |= {"beta": beta, "eta": eta, "sft_weight": sft_weight}
    lora = given(alpha=lora_alpha) | {"targets": tuple(lora_targets.replace(",", " ").split()), "rslora": rslora, "dora": dora}
    lora |= {"base": lora_base, "b_lr_ratio": lora_b_lr_ratio}
    if lora_rank:
        values["lora"] = {"rank": lora_rank, **lora}
    elif lora != {"targets": (), "rslora": False, "dora": False, "base": "fp32", "b_lr_ratio": 1.0}:
        raise InputError("Give --lora-rank with the other options of LoRA: without it all weights are trained.")
    settings = training_section(kind, values)
    with (
        process_mesh(pick_device(device), ParallelDims(tp, cp, pp, vp, pp_schedule)) as mesh,
        Progress(quiet=quiet or not mesh.is_writer) as progress,
        progress.stage(kind),
    ):
        result = train_model(
            kind,
            model,
            data,
            out=out,
            recipe=settings,
            device=device,
            chat_format=format,
            seed=seed,
            taxonomy=read_taxonomy(taxonomy),
            max_fpr=max_fpr,
            teacher=teacher,
            on_step=progress.train_step,
            tick=progress.tick,
            say=progress.say,
            mesh=mesh,
        )
    if not mesh.is_writer:
        return
    _done(result, out / ("adapter" if lora_rank else "model"), as_json)
    if result.steps < MIN_STEPS:
        echo(f"gristmill: {result.steps} steps hardly change a model: lower --batch-size, raise --epochs, or give more rows.", err=True)


def _done(result: Any, model: Path, as_json: bool) -> None:
    facts = {"model": str(model), "steps": result.steps, "tokens": result.tokens, "seconds": result.seconds, "loss": result.metrics["loss"]}
    text = (
        f"{result.steps} steps, {result.tokens:,} tokens in {result.seconds:.1f} s, last loss {result.metrics['loss']:.4f}\nmodel: {model}"
    )
    echo(json.dumps(facts) if as_json else text)


@command("gristmill merge runs/sft/adapter --out runs/sft/merged")
def merge(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder (PEFT layout).")],
    out: Out,
    base: Annotated[Path | None, typer.Option(help="Model folder to merge into; default the one that the adapter names.")] = None,
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option("--dtype", help="Type to store; bf16 rounds small updates away.")] = "fp32",
    rows: Annotated[Path | None, typer.Option(help="Rows as for `train`: the loss on them of base, adapter and stored model.")] = None,
    as_json: AsJson = False,
) -> None:
    """Merge a LoRA adapter into its base, in fp32, and say how large the update is, and how much of it the stored type keeps."""
    from gristmill.workflows.train import merge_adapter_folder

    facts = merge_adapter_folder(adapter, out, rows, base=base, dtype=dtype)
    if as_json:
        echo(json.dumps(facts))
        return
    for name, found in facts["update"].items():
        lost = f"  rounding in {dtype} changes {found['rounding']:.2%} of it, {found['unmoved']:.2%} of the weights stay"
        echo(f"{name:<10} |D|/|W| {found['update']:.2e}{lost if dtype != 'fp32' else ''}")
    if loss := facts.get("loss"):
        dropped = f", {facts['dropped']} left out" if facts["dropped"] else ""
        echo(
            f"loss on {facts['rows']:,} rows{dropped}: base {loss['base']:.4f}, with the adapter {loss['adapter']:.4f}, "
            f"merged and stored {loss['stored']:.4f}"
        )
    if facts["base_dtype"] != "fp32":
        echo(f"trained on a base in {facts['base_dtype']} and merged into the original weights: it differs a little from what was trained")
    echo(f"model: {facts['model']}")


@command("gristmill quantize runs/miniature/02-demonstrations/model --to int8 --out runs/int8")
def quantize(
    model: Annotated[Path, typer.Argument(help="Model folder.")],
    out: Out,
    to: Annotated[
        Literal["int8", "int8-weight", "int4", "fp8"], typer.Option(help="int8 and fp8: activations too, as they come.")
    ] = "int8",
    group: Annotated[int, typer.Option(help="Columns of int4 that share a scale: 32, 64 or 128.")] = 32,
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option("--dtype", help="Type of embeddings, norms and output matrix.")] = "bf16",
    text: Annotated[Path | None, typer.Option(help="Text file on which the KL from the model is measured; default a built-in one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Save a model with its layers' matrices in eight or four bits, in compressed-tensors' form, which gristmill and vLLM read."""
    from gristmill.engine.parity import read_sample, saved_divergence
    from gristmill.model.convert import quantize_folder

    sample = read_sample(text)
    facts = quantize_folder(model, out, to, dtype=dtype, group=group)
    facts |= saved_divergence(model, out, sample)
    if as_json:
        echo(json.dumps(facts))
        return
    echo(f"{facts['bytes'] / 2**20:,.1f} MiB of weights\nmodel: {facts['model']}\n{_lost(facts, 'the model')}")


def _lost(found: dict[str, Any], beside: str) -> str:
    return (
        f"beside {beside}: KL {found['kl']:.2g} nats a token (at most {found['kl_max']:.2g}), the likeliest token is the same for "
        f"{found['agreement']:.2%} of {found['tokens']:,} tokens"
    )


@command("gristmill export runs/compress/06-child-1.3x/model --to padded --out runs/padded")
def export(
    model: Annotated[Path, typer.Argument(help="Model folder, of which layers may differ.")],
    out: Out,
    to: Annotated[
        Literal["padded", "nemotron-nas"],
        typer.Option(help="padded: the family's uniform shape, without its speed; nemotron-nas: DeciLM, of the Llama family."),
    ] = "padded",
    as_json: AsJson = False,
) -> None:
    """Write a compressed model in a form that transformers, vLLM or llama.cpp read; gristmill is fast on its own folder."""
    from gristmill.compress.export import export_folder

    facts = export_folder(model, out, to)
    text = f"{facts['parameters']:,} parameters, {facts['parameters_written']:,} written\nmodel: {facts['model']}"
    echo(json.dumps(facts) if as_json else text)


@command("gristmill add-chat-tokens ./base --to chatml --out runs/base-chatml")
def add_chat_tokens(
    model: Annotated[Path, typer.Argument(help="Folder of a Base model, without a chat template.")],
    out: Out,
    to: Annotated[Literal["chatml", "llama3", "nemotron"], typer.Option(help="Chat format whose tokens it gets.")] = "chatml",
    as_json: AsJson = False,
) -> None:
    """Give a Base the control tokens of a chat format: rows of embeddings, each the mean of all, and the chat template."""
    from gristmill.model import convert

    facts = convert.add_chat_tokens(model, out, to)
    text = f"{facts['added']} tokens added, {facts['embeddings']:,} embeddings, chat format {to}\nmodel: {facts['model']}"
    echo(json.dumps(facts) if as_json else text)


@command('gristmill generate runs/base/model "What is the capital of Runi?"')
def generate(
    model: Annotated[Path, typer.Argument(help="Model or adapter folder.")],
    prompt: Annotated[str | None, typer.Argument(help="One prompt; or use --prompts.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSONL or Parquet with `prompt` or `messages`.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="JSONL file for the answers; default standard output.")] = None,
    n: Annotated[int, typer.Option(help="Answers a prompt.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 keeps all.")] = 0,
    max_tokens: MaxTokens = 128,
    dtype: Dtype = "auto",
    quantize: Quantized = "",
    head: QuantizedHead = "",
    step_tokens: StepTokens = None,
    speculative_config: Speculative = "",
    device: Device = "auto",
    format: ChatFormat = "auto",
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
    engine = load_engine(model, EngineArgs.of(locals()))
    rows = answer_rows(engine, asked, sampling, seed=seed)
    if out:
        echo(f"{write_jsonl(out, rows)} prompts answered: {out}", err=as_json)
    else:
        for row in rows:
            echo(json.dumps(row) if as_json else "\n".join(r["text"] for r in row["responses"]))
    if engine.speculative is not None:
        echo(engine.stats.acceptance, err=True)


@command("gristmill score runs/miniature/01-reward/model --data answers.jsonl")
def score(
    model: Annotated[Path, typer.Argument(help="Folder of a reward model, or of its adapter.")],
    data: Annotated[Path, typer.Option(help="JSONL or Parquet: messages ending with the assistant, or prompt and response.")],
    dtype: Dtype = "auto",
    device: Device = "auto",
    format: ChatFormat = "auto",
    as_json: AsJson = False,
) -> None:
    """Rate answers: helpfulness, correctness, coherence, complexity, verbosity, and their weighted sum."""
    from gristmill.judge.reward import rate_file

    for row in rate_file(model, data, format, device=device, dtype=dtype):
        line = ",".join(f"{k}:{v:.4f}" for k, v in row.items() if k != "id")
        echo(json.dumps(row) if as_json else f"{row['id']}  {line}")


@command("gristmill eval runs/miniature/02-demonstrations/model --tasks mmlu,gsm8k --data benchmarks --out runs/eval")
def eval(
    model: Annotated[str, typer.Argument(help="Model or adapter folder; or `tasks`, which lists the benchmarks.")] = "",
    tasks: Annotated[str, typer.Option(help="Benchmarks parted by commas, or task files (.yaml), in place of prompts.")] = "",
    data: Annotated[Path | None, typer.Option(help="Folder of the benchmarks' files: DATA/TASK/SPLIT.parquet or .jsonl.")] = None,
    endpoint: Annotated[str, _URL] = "",
    endpoint_model: Annotated[str, _NAME] = "",
    endpoint_key_env: Annotated[str, _KEY] = "",
    num_fewshot: Annotated[int | None, typer.Option(help="Shots of a document; default as each benchmark says.")] = None,
    limit: Annotated[int | None, typer.Option(help="The first so many documents of each benchmark alone.")] = None,
    subsets: Annotated[str, typer.Option(help="Of benchmarks with subjects, the only ones, parted by commas.")] = "",
    as_chat: Annotated[bool, typer.Option("--chat", help="Ask for generated answers in the chat format.")] = False,
    contamination: Annotated[Path | None, typer.Option(help="Run folder or rows: which test items are in what was trained on.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts with `truth`, `answer` or tests; default the miniature world's.")] = None,
    max_tokens: MaxTokens = 80,
    thinking: Thinking = "",
    max_thinking_tokens: ThinkingTokens = None,
    dtype: Dtype = "auto",
    quantize: Quantized = "",
    head: QuantizedHead = "",
    cache: CacheDtype = "",
    device: Device = "auto",
    format: ChatFormat = "auto",
    seed: Annotated[int | None, typer.Option(help="Seed of everything random; default 0, of benchmarks' shots 1234.")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Greedy answers alone, as IFEval wants them.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="JSONL file for the greedy answers, of benchmarks a folder; killed, it goes on.")
    ] = None,
    against: Annotated[Path | None, typer.Option(help="Answers of another model (its --out), to compare with in pairs.")] = None,
    unsafe_code: Unsafe = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Greedy and sampled accuracy with 95 % intervals, by task; IFEval's scores; with --quantize or --cache what that costs.

    With --tasks: benchmarks as lm-eval asks them, from files in --data.
    """
    if model == "tasks" and not tasks and not Path(model).is_dir():
        from gristmill.cli.benchmarks import list_tasks

        list_tasks(as_json)
        return
    from gristmill.engine.load import EngineArgs
    from gristmill.judge.party import is_url, party_of, required_party

    running = EngineArgs.of(locals())
    named: dict[str, Any] = {"model": endpoint_model, "key_env": endpoint_key_env}
    if tasks or data is not None or endpoint or is_url(model):
        from gristmill.cli.benchmarks import run_tasks
        from gristmill.workflows.benchmark_requests import BenchmarkArgs

        if data is None or not tasks:
            raise InputError("Give benchmarks by --tasks and the folder of their files by --data: `gristmill eval tasks` lists them.")
        given_args = BenchmarkArgs(
            tasks=tuple(name.strip() for name in tasks.split(",") if name.strip()),
            data=data,
            num_fewshot=num_fewshot,
            limit=limit,
            chat=as_chat,
            thinking=thinking,
            max_thinking_tokens=max_thinking_tokens,
            out=out,
            against=against,
            contamination=contamination,
            unsafe_code=unsafe_code,
            subsets=tuple(name.strip() for name in subsets.split(",") if name.strip()),
            **given(seed=seed),
        )
        run_tasks(required_party("endpoint", model, endpoint, **named), running, given_args, quiet=quiet, as_json=as_json)
        return
    if (party := party_of("endpoint", model, **named)) is None:
        raise InputError("Give a model folder, or `tasks` for a list of the benchmarks.")
    from gristmill.core.progress import Progress
    from gristmill.engine.load import load_engine
    from gristmill.model.adapters import is_adapter
    from gristmill.model.hf import saved_as
    from gristmill.workflows.evaluate import evaluate, model_identity

    with Progress(quiet=quiet) as progress, progress.stage("eval"):
        scores = evaluate(
            load_engine(party.folder, running, own=False),
            prompts,
            progress,
            max_tokens=max_tokens,
            thinking=thinking,
            max_thinking_tokens=max_thinking_tokens,
            seed=seed or 0,
            unsafe_code=unsafe_code,
            greedy=greedy,
            out=out,
            against=against,
            identity=model_identity(party.folder, running.resolved(party.folder)),
        )
    scores.pop("outcomes")
    if as_json:
        echo(json.dumps(scores))
        return
    for task in scores["greedy"]:
        cells = [f"{mode} {_interval(scores[mode][task])}" for mode in ("greedy", "sampled") if mode in scores]
        echo(f"{task:<12} {'  '.join(cells)}  n {scores['greedy'][task]['n']}")
    if found := scores.get("instructions"):
        for level, s in {"prompts": found["prompt"], "instructions": found["instruction"], **found["types"]}.items():
            echo(f"{level:<46} strict {_interval(s['strict'])}  loose {_interval(s['loose'])}  n {s['strict']['n']}")
    echo(f"looping answers {_interval(scores['looping'])}")
    if obeyed := scores.get("obedience"):
        echo(f"answers that keep the form of thinking {thinking} {_interval(obeyed)}")
    if against is not None:
        pairs = scores["paired"]
        lines = {"right": pairs["right"], "looping": pairs["looping"]}
        lines |= {f"{level}s, {mode}": s for level in ("prompt", "instruction") for mode, s in pairs.get(level, {}).items()}
        for name, s in lines.items():
            echo(f"against {against.name}: {name:<21} {_interval(s, '+.3f')}  n {s['n']}")
    if weak := scores.get("weak"):
        echo(f"weak: {weak} programs passed tests that they could have lied to (docs/design.md, judging)")
    if lost := scores.get("quantized"):
        beside = "the model" if is_adapter(party.folder) or not saved_as(party.folder) else "the weights that it was saved with"
        echo(_lost(lost, beside))


def _interval(score: dict[str, Any], form: str = ".3f") -> str:
    low, high = score["ci95"]
    return f"{score['mean']:{form}} [{low:{form}}, {high:{form}}]"


@command("gristmill chat runs/miniature/02-demonstrations/model")
def chat(
    model: Annotated[Path, typer.Argument(help="Model or adapter folder.")],
    system: Annotated[str, typer.Option(help="System message that conversations begin with.")] = "",
    history: Annotated[
        Path | None, typer.Option(help="JSONL file of conversations: the last goes on, and is saved after every answer.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus.")] = 1.0,
    max_tokens: MaxTokens = 256,
    thinking: Thinking = "",
    max_thinking_tokens: ThinkingTokens = None,
    dtype: Dtype = "auto",
    quantize: Quantized = "",
    head: QuantizedHead = "",
    device: Device = "auto",
    format: ChatFormat = "auto",
    seed: Seed = 0,
) -> None:
    """Talk with a model in the terminal. /help lists the commands; an empty line or Ctrl-D ends it."""
    from gristmill.cli.chat import ChatSession
    from gristmill.engine.load import EngineArgs, load_engine
    from gristmill.generation.api import SamplingParams

    sampling = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_tokens, max_thinking_tokens=max_thinking_tokens)
    engine = load_engine(model, EngineArgs.of(locals() | {"max_batch": 1}))
    ChatSession(engine, sampling, seed=seed, system=system, thinking=thinking, history=history).run()


@command("gristmill serve runs/miniature/29-r2-rpo3/model --reward runs/miniature/01-reward/model --port 8000")
def serve(
    model: Annotated[Path, typer.Argument(help="Model or adapter folder.")],
    reward: Annotated[Path | None, typer.Option(help="Folder of a reward model, served beside it by its folder's name.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    name: Annotated[str, typer.Option(help="Name that clients know the model by; default the folder's.")] = "",
    api_key_env: Annotated[str, typer.Option(help="Environment variable with keys, parted by spaces.")] = "",
    api_key_file: Annotated[Path | None, typer.Option(help="File with such keys, one a line.")] = None,
    max_open_samples: Annotated[int, typer.Option(help="Samples under way or waiting, beyond which requests get status 429.")] = 4096,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take.")] = 600.0,
    reasoning_parser: Annotated[
        str,
        typer.Option(help="Thinking as reasoning_content: think (where an answer begins with a tag), or vLLM's deepseek_r1 or qwen3."),
    ] = "",
    tool_call_parser: Annotated[
        str, typer.Option(help="How the model writes calls of tools: hermes, llama3_json, mistral, ...; default as its chat template does.")
    ] = "",
    enable_auto_tool_choice: Annotated[
        bool, typer.Option("--enable-auto-tool-choice", help="Start only if the model's calls of tools can be told from text.")
    ] = False,
    max_batch: Annotated[int, typer.Option(help="Most responses in flight.")] = 256,
    cache_tokens: Annotated[
        int | None, typer.Option(help="Positions in a worker's cache; default: a quarter of the memory at most.")
    ] = None,
    step_tokens: StepTokens = None,
    speculative_config: Speculative = "",
    enable_lora: Annotated[bool, typer.Option("--enable-lora", help="Serve LoRA adapters beside the model.")] = False,
    lora_modules: Annotated[list[str] | None, typer.Option(help="NAME=PATH of an adapter; may be given several times.")] = None,
    max_loras: Annotated[int, typer.Option(help="Adapters whose requests may be in flight at once.")] = 8,
    max_lora_rank: Annotated[int, typer.Option(help="Largest rank of an adapter.")] = 64,
    lora_folder: Annotated[
        Path | None, typer.Option(help="Requests may load adapters from here, if VLLM_ALLOW_RUNTIME_LORA_UPDATING is set to True.")
    ] = None,
    dtype: Dtype = "auto",
    quantize: Quantized = "",
    head: QuantizedHead = "",
    cache: CacheDtype = "",
    device: Device = "auto",
    chat_format: ChatFormat = "auto",
) -> None:
    """Serve a model by the OpenAI protocol: chat and text completions, streamed too; adapters; ratings; /health and /metrics."""
    from gristmill.engine.load import EngineArgs
    from gristmill.server.adapters import LoraArgs
    from gristmill.server.serve import ServerArgs
    from gristmill.server.serve import serve as serve_model

    args = ServerArgs(
        host=host,
        port=port,
        name=name,
        reward=reward,
        api_key_env=api_key_env,
        api_key_file=api_key_file,
        max_open_samples=max_open_samples,
        timeout=timeout,
        reasoning_parser=reasoning_parser,
        tool_call_parser=tool_call_parser,
        enable_auto_tool_choice=enable_auto_tool_choice,
        lora=LoraArgs(enable=enable_lora, modules=lora_modules or (), max_loras=max_loras, max_rank=max_lora_rank, folder=lora_folder),
    )
    serve_model(model, args, EngineArgs.of(locals()))
