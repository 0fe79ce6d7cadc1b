"""Evaluation on benchmarks: answers kept as they come, scores with intervals, and what puts them in doubt."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gristmill.core.errors import InputError
from gristmill.core.io import lock, make_folder, read_json, write_json, write_jsonl
from gristmill.core.progress import Progress
from gristmill.core.response_text import strip_thinking
from gristmill.data.rows import make_id, read_records
from gristmill.data.thinking import keeps_form
from gristmill.evaluate.benchmark_scores import CLOSE, Outcome, group, margin, score
from gristmill.evaluate.harness import (
    INVALID,
    Answer,
    Item,
    choice_scores,
    extract,
    ifeval_verdicts,
    is_exact,
    own_is_right,
    programs,
    text_sizes,
)
from gristmill.evaluate.stats import accuracy, paired
from gristmill.evaluate.task import Task
from gristmill.runs.journal import Journal
from gristmill.sandbox.sandbox import Sandbox
from gristmill.workflows.benchmark_requests import BenchmarkArgs, Part, lost_shots, plain, read_parts, shots_left
from gristmill.workflows.benchmark_sources import AnswerSource, Chat
from gristmill.workflows.contamination import contaminated

BATCH = 64  # programs that the sandbox gets at once
RESULTS, ANSWERS, MODEL, SAMPLES = "results.json", "answers.jsonl", "evaluation.json", "samples"
Pairs = list[tuple[float, float]]
Store = dict[str, dict[str, Any]] | Journal


def run_benchmarks(
    open_source: Callable[[], AnswerSource], model: Mapping[str, Any], args: BenchmarkArgs, progress: Progress
) -> dict[str, Any]:
    """Evaluate a model on benchmarks.

    Args:
        open_source: makes the source of answers, once all files are found to be right.
        model: what identifies it; answers of another one are not mixed with its own.

    Returns:
        {"model", "settings", "tasks": {name: {"metrics": {column: {value, stderr, ci95, n}}, ...}}, "groups", "seconds"}

    Raises:
        InputError: a task, a file or a folder is wrong, or the model or endpoint cannot answer.
    """
    started = time.monotonic()
    parts = read_parts(args)
    earlier = _read_against(args.against) if args.against is not None else None
    marked = contaminated(args.contamination, {p.name: [i.doc for i in p.items] for p in parts}) if args.contamination else None
    with ExitStack() as stack:
        store = _open_store(args.out, model, stack)
        runs_code = any(spec.metric == "pass@1" for part in parts for spec in part.task.metric_list)
        sandbox = stack.enter_context(Sandbox(unsafe=args.unsafe_code) if runs_code else nullcontext())
        source: AnswerSource | None = None
        for part in parts:
            if waiting := _waiting(part, store, args.asking):
                source = source or open_source()
                if source.context is not None and (lost := lost_shots(part, *source.context)):
                    progress.warn(f"{lost}, and the others are cut off, as the harness does. --num-fewshot asks for fewer.")
                _ask(part, waiting, source, store, args=args, progress=progress)
        outcomes: dict[str, list[Outcome]] = {}
        results: dict[str, dict[str, Any]] = {}
        pairs: dict[str, Pairs] = {}
        for part in parts:
            found, rows = _judge(part, store, args, sandbox, progress)
            if args.thinking and "endpoint" not in model:  # an endpoint may tell thinking apart
                for row in rows:
                    row |= {"keeps_form": keeps_form(row["answer"], args.thinking == "on")} if "answer" in row else {}
            for outcome in found:
                outcome.contaminated = marked is not None and outcome.number in marked[part.name]
            outcomes[part.name] = found
            results[part.name] = _summary(part, found, rows, marked is not None)
            if earlier is not None:
                scored = [(make_id(plain(item.doc)), row["scores"]) for item, row in zip(part.items, rows, strict=True)]
                column, pairs[part.name] = _paired(scored, earlier.get(part.name, []))
                results[part.name]["against"] = _difference(column, pairs[part.name])
            if args.out is not None:
                write_jsonl(args.out / SAMPLES / f"{part.name}.jsonl", _samples(part, found, rows))
    settings = {
        "tasks": list(args.tasks),
        "num_fewshot": args.num_fewshot,
        "limit": args.limit,
        "seed": args.seed,
        "chat": args.asking is not None,
        "thinking": args.thinking,
        "max_thinking_tokens": args.max_thinking_tokens,
        "contamination": None if args.contamination is None else str(args.contamination),
    }
    report: dict[str, Any] = {"model": dict(model), "settings": settings, "tasks": results}
    report |= {"groups": _groups(parts, outcomes, results=results, pairs=pairs), "seconds": round(time.monotonic() - started, 1)}
    if args.against is not None:
        report["against"] = str(args.against)
    if args.out is not None:
        write_json(args.out / RESULTS, report)
    return report


def _open_store(out: Path | None, model: Mapping[str, Any], stack: ExitStack) -> Store:
    """Answers that there are, and will be: in a journal where a folder is given."""
    if out is None:
        return {}
    make_folder(out)
    stack.callback(lock(out).close)
    marker = out / MODEL
    if marker.is_file():
        if (known := read_json(marker)) != model:
            changed = sorted(key for key in known.keys() | model.keys() if known.get(key) != model.get(key))
            raise InputError(f"{out} holds answers of another model ({', '.join(changed)}): choose another --out, or that model.")
    else:
        write_json(marker, dict(model))
    return stack.enter_context(Journal(out / ANSWERS))


def _keep(store: Store, record: dict[str, Any]) -> None:
    if isinstance(store, Journal):
        store.append(record)
    else:
        store[record["id"]] = record


def _waiting(part: Part, store: Store, chat: Chat | None) -> dict[str, Any]:
    """A part's requests that have no answer yet, by id."""
    needed = "text" if part.task.output_type == "generate_until" else "logprob"
    asked = ((name, what) for item in part.items for name, what in part.requests(item, chat))
    return {name: what for name, what in asked if name not in store or needed not in store[name]}


def _ask(part: Part, waiting: Mapping[str, Any], source: AnswerSource, store: Store, *, args: BenchmarkArgs, progress: Progress) -> None:
    """Have requests answered, and keep each answer as it comes."""
    names, contents = list(waiting), list(waiting.values())
    kind = part.task.output_type
    if kind == "multiple_choice":
        answers: Iterator[tuple[int, Any]] = source.likelihoods(contents)
    elif kind == "loglikelihood_rolling":
        answers = source.rolling(contents)
    else:
        answers = source.generate(contents, part.task.generation_kwargs, chat=args.asking, seed=args.seed)
    started, done = time.monotonic(), 0

    def note() -> str:
        left = (time.monotonic() - started) / max(1, done) * (len(names) - done)
        return f"{part.name}, {int(left) // 60}:{int(left) % 60:02d} left"

    for number, answer in progress.track(answers, len(names), note):
        done += 1
        _keep(store, {"id": names[number], **{k: v for k, v in asdict(answer).items() if v is not None}})


# ---- judging ----


def _judge(
    part: Part, store: Store, args: BenchmarkArgs, sandbox: Sandbox | None, progress: Progress
) -> tuple[list[Outcome], list[dict[str, Any]]]:
    """What each answer was worth, and its record."""
    task = part.task
    outcomes: list[Outcome] = []
    rows: list[dict[str, Any]] = []
    runs: list[Any] = []
    for item in part.items:
        asked = part.requests(item, args.asking)
        told = [store[name] for name, _ in asked]
        outcome = Outcome(item.number)
        cut = [one["kept_chars"] for one in told if "kept_chars" in one]
        row: dict[str, Any] = {"doc_id": item.number, "kept_chars": min(cut, default=None)}
        if task.output_type == "multiple_choice":
            answer = Answer(logprobs=[one["logprob"] for one in told])
            outcome.scores = choice_scores(task, item, answer)
            outcome.margin = margin(answer.logprobs)
            row |= {"logprobs": answer.logprobs, "gold": item.gold}
        elif task.output_type == "loglikelihood_rolling":
            sizes = text_sizes(item.prompt)
            outcome.sums = {spec.metric: (told[0]["logprob"], sizes[spec.metric]) for spec in task.metric_list}
            row |= {"logprob": told[0]["logprob"]}
        else:
            text = told[0]["text"]
            row |= {"answer": text, "num_tokens": told[0]["num_tokens"], "finish": told[0]["finish"], "gold": item.gold}
            row |= {"left_out": told[0]["left_out"]} if "left_out" in told[0] else {}
            _judge_text(task, item, strip_thinking(text) if args.thinking else text, outcome=outcome, row=row, runs=runs)
        outcomes.append(outcome)
        rows.append(row)
    if runs:
        assert sandbox is not None
        unique = list(dict.fromkeys(run[1] for run in runs))
        passed: dict[tuple[str, str], Any] = {}
        for start in range(0, len(unique), BATCH):
            batch = unique[start : start + BATCH]
            passed |= dict(zip(batch, sandbox.run_many(batch), strict=True))
            progress.tick(start + len(batch), len(unique), f"{part.name}, programs run")
        for (outcome, row, column), run in runs:
            outcome.scores[column] = float(passed[run].passed)
            row.setdefault("programs", {})[column] = {"reason": passed[run].reason, "weak": passed[run].weak}
    for outcome, row in zip(outcomes, rows, strict=True):
        row["scores"] = outcome.scores | {name: sum(held) / len(held) for name, held in outcome.clusters.items()}
        for metric, (logprob, size) in outcome.sums.items():  # so that texts are compared in pairs too: higher is better
            row["scores"][f"loglikelihood/{metric.removesuffix('_perplexity')}"] = logprob / max(1, size)
    return outcomes, rows


def _judge_text(task: Task, item: Item, text: str, *, outcome: Outcome, row: dict[str, Any], runs: list[Any]) -> None:
    extracted = extract(task, item, text)
    for spec in task.metric_list:
        if spec.metric == "ifeval":
            for level, held in ifeval_verdicts(item.doc, text).items():
                outcome.scores[f"prompt_level_{level}_acc"] = float(all(held))
                outcome.clusters[f"inst_level_{level}_acc"] = held
            if extracted.own is not None:
                outcome.scores["own"] = float(all(ifeval_verdicts(item.doc, extracted.own)["strict"]))
        elif spec.metric == "pass@1":
            row["extracted"] = extracted.by_filter
            for name, run in programs(task, item, extracted).items():
                runs.append(((outcome, row, name if name == "own" else f"pass@1,{name}"), run))
        else:
            for name, found in extracted.by_filter.items():
                column = f"exact_match,{name}" if task.filter_list else "exact_match"
                outcome.scores[column] = float(any(is_exact(spec, found, gold) for gold in item.golds))
                if found == INVALID:
                    outcome.unparsed.append(column)
            if extracted.own is not None:
                outcome.scores["own"] = float(own_is_right(task, item, extracted.own))
                if extracted.own == INVALID:
                    outcome.unparsed.append("own")
            row["extracted"] = extracted.by_filter | ({} if extracted.own is None else {"own": extracted.own})


def _summary(part: Part, outcomes: Sequence[Outcome], rows: Sequence[Mapping[str, Any]], marked: bool) -> dict[str, Any]:
    task = part.task
    out: dict[str, Any] = {
        "task": task.task,
        "subset": part.data.subset,
        "n": len(outcomes),
        "num_fewshot": part.num_fewshot,
        "licence": task.licence,
        "metrics": score(outcomes),
        "notes": [*part.data.notes, *task.notes],
    }
    if (num := sum(item.in_shots for item in part.items)) > 0:
        out["notes"].append(f"{num:,} documents are among their own shots, as the harness draws them from the evaluated split")
    if (num := sum(item.lacks_gold for item in part.items)) > 0:
        out["notes"].append(f"{num:,} documents name no right choice among theirs, and count as wrong")
    cut = [(item, row["kept_chars"]) for item, row in zip(part.items, rows, strict=True) if row["kept_chars"] is not None]
    if cut:
        fit = min(shots_left(item, kept) for item, kept in cut)
        out["cut"] = {"documents": len(cut), "shots": fit}
        out["notes"].append(
            f"{len(cut):,} of {len(rows):,} contexts are longer than the model's and were cut from the left: {fit} of {part.num_fewshot} "
            "shots fit in all of them"
        )
    if task.output_type == "multiple_choice":
        out["ties"] = [outcome.number for outcome in outcomes if outcome.margin is not None and outcome.margin < CLOSE]
    if task.output_type == "generate_until":
        columns = dict.fromkeys(column for outcome in outcomes for column in outcome.unparsed)
        out["unparsed"] = {name: sum(name in outcome.unparsed for outcome in outcomes) for name in columns}
        out["empty"] = sum(not row["answer"].strip() for row in rows)
        out["cut_answers"] = sum(row["finish"] == "length" for row in rows)
        for name in sorted({name for row in rows for name in row.get("left_out", ())}):
            out["notes"].append(f"the endpoint refuses {name} and was asked without it: its answers are drawn otherwise")
        if any("keeps_form" in row for row in rows):
            out["obedience"] = accuracy([row["keeps_form"] for row in rows])
        out["mean_tokens"] = round(sum(row["num_tokens"] for row in rows) / max(1, len(rows)), 1)
        weak = sum(one["weak"] for row in rows for one in row.get("programs", {}).values())
        if weak:
            out["weak"] = weak
        late = sum(one["reason"] == "timeout" for row in rows for one in row.get("programs", {}).values())
        if late:
            out["notes"].append(f"{late:,} programs ended at the time limit, which on a busy machine says little: run the same again")
    if marked:
        clean = [outcome for outcome in outcomes if not outcome.contaminated]
        out["contaminated"] = len(outcomes) - len(clean)
        out["clean_metrics"] = score(clean)
    return out


def _groups(
    parts: Sequence[Part],
    outcomes: Mapping[str, Sequence[Outcome]],
    *,
    results: Mapping[str, Mapping[str, Any]],
    pairs: Mapping[str, Pairs],
) -> dict[str, dict[str, Any]]:
    """Tasks of several subsets: micro over all documents, as the harness weights them, and the mean of the subsets beside it."""
    out: dict[str, dict[str, Any]] = {}
    for task in dict.fromkeys(part.task.task for part in parts if part.task.subsets):
        mine = {part.name: outcomes[part.name] for part in parts if part.task.task == task}
        metrics = {name: results[name]["metrics"] for name in mine}
        num = sum(map(len, mine.values()))
        out[task] = {"n": num, "subsets": len(mine), "metrics": group(mine, metrics)}
        if told := next((one for name in mine if (one := results[name].get("against"))), None):
            out[task]["against"] = _difference(told["column"], [pair for name in mine for pair in pairs[name]])
    return out


# ---- records ----


def _samples(part: Part, outcomes: Sequence[Outcome], rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Records that one can open: what was asked, answered and found, a document a line."""
    for item, outcome, row in zip(part.items, outcomes, rows, strict=True):
        record: dict[str, Any] = {"doc_id": item.number, "task": part.name, "doc_hash": make_id(plain(item.doc)), "doc": plain(item.doc)}
        if item.pairs:
            contexts = list(dict.fromkeys(context for context, _ in item.pairs))
            record |= {"context": contexts[0]} if len(contexts) == 1 else {"contexts": [context for context, _ in item.pairs]}
            record |= {"continuations": [continuation for _, continuation in item.pairs]}
        else:
            record |= {"context": item.prompt}
        extra = {"contaminated": True} if outcome.contaminated else {}
        yield record | {k: v for k, v in row.items() if k != "doc_id" and v is not None} | extra


def _read_against(folder: Path) -> dict[str, list[tuple[str, dict[str, float]]]]:
    """Scores of another evaluation's documents with their hashes, by task."""
    if not (folder / RESULTS).is_file():
        raise InputError(f"{folder} holds no {RESULTS}: give the --out folder of an evaluation that has ended.")
    found: dict[str, list[tuple[str, dict[str, float]]]] = {}
    for path in sorted((folder / SAMPLES).glob("*.jsonl")):
        rows = read_records(path)
        found[path.stem] = [(row["doc_hash"], row["scores"]) for row in rows if isinstance(row.get("scores"), dict) and "doc_hash" in row]
    return found


def _paired(scored: Sequence[tuple[str, Mapping[str, Any]]], earlier: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[str, Pairs]:
    """Scores of the other model and of this one on the documents that both answered, by the first column."""
    known = dict(earlier)
    column = next(iter(scored[0][1]), "") if scored else ""
    both = [(known.get(name, {}).get(column), scores.get(column)) for name, scores in scored]
    return column, [(float(one), float(other)) for one, other in both if one is not None and other is not None]


def _difference(column: str, pairs: Pairs) -> dict[str, Any] | None:
    """This model minus the other, with its interval; None where no document is common."""
    return {"column": column, **paired([a for a, _ in pairs], [b for _, b in pairs])} if pairs else None


def differences(before: Path, after: Path) -> dict[str, dict[str, Any]]:
    """Paired differences of two evaluations' folders, `after` minus `before`, by task with all its subsets.

    Returns:
        {task: {"column", "mean", "ci95", "n", "worse"}}; `worse` counts documents. A task without common documents is left out.
    """
    old, new = _read_against(before), _read_against(after)
    columns: dict[str, str] = {}
    pairs: dict[str, Pairs] = {}
    for name, entry in read_json(after / RESULTS)["tasks"].items():
        column, found = _paired(new.get(name, []), old.get(name, []))
        columns.setdefault(entry["task"], column)
        pairs.setdefault(entry["task"], []).extend(found)
    found_all = {task: (_difference(columns[task], pairs[task]), sum(b < a for a, b in pairs[task])) for task in pairs}
    return {task: {**difference, "worse": worse} for task, (difference, worse) in found_all.items() if difference}


def headlines(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The first metric of each task, with all its subsets: {task: {"column", "mean", "ci95", "n", "num_fewshot", "notes"}}."""
    out: dict[str, dict[str, Any]] = {}
    for entry in report["tasks"].values():
        task = entry["task"]
        if task in out:
            out[task]["notes"] = list(dict.fromkeys([*out[task]["notes"], *entry["notes"]]))
            continue
        column, found = next(iter(report["groups"].get(task, entry)["metrics"].items()))
        figures = {"mean": found["value"], "ci95": found["ci95"], "n": found["n"]}
        out[task] = {"column": column, **figures, "num_fewshot": entry["num_fewshot"], "notes": list(entry["notes"])}
    return out
