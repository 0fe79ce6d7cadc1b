"""The command that plans a training on many devices."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from gristmill.cli.app import AsJson, PpSchedule, command, end_with_alarms, given
from gristmill.core.echo import echo
from gristmill.core.errors import InputError

WAYS = ("tp", "pp", "vp", "cp", "micro_batch", "recompute")  # what a search may choose
MAX_NAME = 60  # characters of a path that stand for a model


@command("gristmill plan nemotron4-340b --gpus 6144 --tp 8 --pp 12 --vp 8 --batch-size 2304")
def plan(
    model: Annotated[
        str,
        typer.Argument(help="nemotron4-340b, nemotron4-15b, llama3-8b, -70b, -405b, ...; a Hugging Face folder; a recipe; or curate."),
    ] = "",
    gpus: Annotated[int | None, typer.Option(help="GPUs (or processes) in all; default TP x PP x CP x DP.")] = None,
    tp: Annotated[int | None, typer.Option(help="Tensor (and sequence) parallel ways.")] = None,
    pp: Annotated[int | None, typer.Option(help="Pipeline stages.")] = None,
    vp: Annotated[int | None, typer.Option(help="Virtual stages a rank: the interleaved schedule.")] = None,
    pp_schedule: PpSchedule = "1f1b",
    cp: Annotated[int | None, typer.Option(help="Context parallel ways.")] = None,
    dp: Annotated[int | None, typer.Option(help="Data parallel ways; default what is left of --gpus.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Sequences a step over all GPUs; default four micro-batches a pipeline stage, or one.")
    ] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Sequences that go through a rank at once; default 1.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of a sequence; default the model's context, at most 8192.")] = None,
    precision: Annotated[str, typer.Option(help="bf16, fp8 or fp32; default bf16, on a CPU fp32.")] = "",
    recompute: Annotated[
        Literal["", "none", "selective", "full"], typer.Option(help="Activations made again in the backward pass; default none.")
    ] = "",
    zero: Annotated[int, typer.Option(help="DP ranks share 1: optimizer states, 2: gradients too, 3: weights too; 0: nothing.")] = 1,
    lora_rank: Annotated[int, typer.Option(help="Plan a LoRA adapter of this rank beside the frozen model; 0: all weights.")] = 0,
    lora_base: Annotated[
        Literal["", "fp32", "bf16", "int8", "nf4"], typer.Option(help="LoRA: type of the frozen matrices; default --precision's.")
    ] = "",
    lora_targets: Annotated[str, typer.Option(help="LoRA: names as q_proj,v_proj parted by commas; default all there are.")] = "",
    dora: Annotated[bool, typer.Option("--dora", help="LoRA: train the lengths of the updated rows too.")] = False,
    gpu: Annotated[str, typer.Option(help="h100 (default), h200, a100, b200; cpu or cuda after --calibrate; or a row's .json file.")] = "",
    search: Annotated[bool, typer.Option("--search", help="Try all layouts of --gpus that fit; options that are given stay.")] = False,
    top: Annotated[int, typer.Option(help="Layouts of a search that are printed.", min=1)] = 5,
    tokens: Annotated[float | None, typer.Option(help="Tokens of the whole training, for its days.")] = None,
    documents: Annotated[float | None, typer.Option(help="Of a curation (`curate`, or its recipe): how many documents.")] = None,
    nodes: Annotated[int, typer.Option(help="Of a curation: machines.")] = 1,
    cores: Annotated[int, typer.Option(help="Of a curation: cores of a machine.")] = 64,
    document_bytes: Annotated[float, typer.Option(help="Of a curation: mean bytes of a document's text.")] = 4000,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="HTML page with memory, time and the pipeline's timeline.")] = None,
    published: Annotated[bool, typer.Option("--published", help="Print 18 published measurements beside the plan.")] = False,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Measure this machine in a minute or two: its GPU, or --gpu cpu.")] = False,
    as_json: AsJson = False,
) -> None:
    """Memory, step time and MFU of a training on many GPUs, before it is started. Exit code 4 where it does not fit.

    All layouts that fit, the fastest first: `gristmill plan llama3-70b --gpus 64 --batch-size 64 --search`. How far to trust it: `gristmill
    plan --published`. This machine: `gristmill plan --calibrate`, then `gristmill plan FOLDER --gpu cpu`. A curation: `gristmill plan
    curate --documents 1e9 --nodes 32`.
    """
    if calibrate:
        from gristmill.workflows.calibrate import calibrate as measure

        row, path = measure(gpu)
        echo(json.dumps(row) if as_json else "\n".join([*(f"{name}: {value}" for name, value in row.items()), f"hardware row: {path}"]))
        return
    from gristmill.report import plan as lines_of

    if published:
        from gristmill.parallel.planner import published_rows

        rows = published_rows()
        echo(json.dumps(rows) if as_json else "\n".join(lines_of.published_lines(rows)))
        return
    if documents is not None or model == "curate":
        from gristmill.core.config import find_recipe, read
        from gristmill.curate.plan import plan_curation, steps_of

        if documents is None:
            raise InputError("Give --documents, as `gristmill plan curate --documents 1e9 --nodes 32`.")
        recipe = find_recipe("english-text" if model == "curate" else model, "curation")
        curation = plan_curation(steps_of(read(recipe)), documents, nodes, cores=cores, document_bytes=document_bytes)
        echo(json.dumps(curation.as_dict()) if as_json else "\n".join(lines_of.curation_lines(curation)))
        return
    from gristmill.parallel.hardware import find_hardware
    from gristmill.parallel.layout import default_layout
    from gristmill.parallel.lora_plan import LoraPlan
    from gristmill.parallel.models import find_model
    from gristmill.parallel.planner import make_plan
    from gristmill.parallel.planner import search as search_layouts

    if not model:
        raise InputError("Name a model to plan, as `gristmill plan nemotron4-340b --gpus 6144 --batch-size 2304 --search`.")
    if tokens is not None and not 0 < tokens <= 1e18:
        raise InputError(f"Give --tokens a number above zero and at most 1e18: it is {tokens:g}.")
    hardware, config = find_hardware(gpu or "h100"), find_model(model)
    name = model if len(model) <= MAX_NAME else Path(model).name
    ways: dict[str, Any] = given(tp=tp, pp=pp, vp=vp, cp=cp, dp=dp, micro_batch=micro_batch, seq_len=seq_len, batch_size=batch_size)
    ways |= {"schedule": pp_schedule} | ({"recompute": recompute} if recompute else {})
    precision = precision or ("fp32" if hardware.is_cpu else "bf16")
    if lora_rank:
        base, targets = lora_base or ("fp32" if precision == "fp32" else "bf16"), tuple(lora_targets.replace(",", " ").split())
        ways["lora"] = LoraPlan(rank=lora_rank, base=base, dora=dora, targets=targets)
    elif lora_base or lora_targets or dora:
        raise InputError("Give --lora-rank with the other options of LoRA: without it all weights are trained.")
    found = None
    if search:
        if gpus is None or batch_size is None:
            raise InputError("Give --search the number of --gpus and the --batch-size that it is for.")
        layout = default_layout(config, {**ways, "dp": 1}, num_devices=None, precision=precision, zero=zero)
        free = [way for way in WAYS if way not in ways]
        found = search_layouts(name, config, layout, hardware=hardware, num_devices=gpus, free=free, dp=dp)
        planned = found.plans[0]
    else:
        layout = default_layout(config, ways, num_devices=gpus, precision=precision, zero=zero)
        planned = make_plan(name, config, layout, hardware=hardware)
    if out is not None:
        from gristmill.report.plan_page import write_page

        write_page(planned, out, found, tokens)
    if as_json:
        facts = planned.as_dict()
        if tokens is not None:
            facts["days"] = tokens / planned.tokens_per_second / lines_of.DAY
        if found is not None:
            shown = [one.as_dict() for one in found.plans[:top]]
            facts["search"] = {"num_valid": found.num_valid, "num_fit": found.num_fit, "undecided": found.undecided, "plans": shown}
        echo(json.dumps(facts))
    else:
        lines = lines_of.plan_lines(planned, tokens)
        echo("\n".join([*(lines_of.search_lines(found, top) if found is not None else []), *lines, *([f"page: {out}"] if out else [])]))
    end_with_alarms([{"text": planned.refusal}] if planned.refusal else [])
