"""Evaluation of one model on prompts with known answers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from gristmill.core.errors import InputError
from gristmill.core.io import write_jsonl
from gristmill.core.progress import Progress
from gristmill.data.chat import Message, to_dicts
from gristmill.data.human import HumanData
from gristmill.data.readers import read_prompts
from gristmill.data.rows import Prompt, make_id, read_records
from gristmill.data.thinking import keeps_form, with_toggle
from gristmill.engine.engine import Engine
from gristmill.engine.parity import divergence
from gristmill.evaluate.instructions import instruction_scores, instruction_verdicts, looping, paired_scores
from gristmill.evaluate.runner import MODES, evaluate_model
from gristmill.evaluate.stats import accuracy, paired
from gristmill.generation.api import Completion, Request, SamplingParams
from gristmill.generation.cached import completions_of
from gristmill.judge.programs import Verifier, check_tests, is_code
from gristmill.miniature.source import MiniatureSource
from gristmill.model.folder import folder_stamps
from gristmill.runs.journal import Journal
from gristmill.sandbox.sandbox import Sandbox


def evaluate(
    engine: Engine,
    prompts_file: Path | None,
    progress: Progress,
    *,
    max_tokens: int,
    seed: int,
    thinking: Literal["", "on", "off"] = "",
    max_thinking_tokens: int | None = None,
    unsafe_code: bool = False,
    greedy: bool = False,
    out: Path | None = None,
    against: Path | None = None,
    identity: str = "",
) -> dict[str, Any]:
    """Greedy and sampled accuracy on a file's prompts with truths, or on the miniature world's; IFEval's scores of verifiable instructions.

    Args:
        thinking: asks with the toggle's line for this mode; an answer that does not keep its form is wrong.
        max_thinking_tokens: thinking budget of an answer.
        greedy: ask for greedy answers alone.
        out: JSONL file for the greedy answers. Beside it is a journal, so that a killed evaluation goes on where it was.
        against: such a file of another model on the same prompts, to be compared with in pairs.
        identity: of the model and of how it runs; answers of another one in the journal are not taken.

    Raises:
        InputError: a file is wrong, or `against` answers other prompts.
    """
    prompts = MiniatureSource(HumanData(), seed).evaluation() if prompts_file is None else read_prompts(prompts_file, "human", truth=True)
    if thinking:
        prompts = [replace(p, messages=with_toggle(p.messages, thinking)) for p in prompts]
    baseline = _read_answers(against, prompts) if against is not None else None  # before work is spent
    needs_code = any(is_code(p.truth) for p in prompts)

    answers: dict[str, Completion] = {}

    def run(requests: list[Request]) -> dict[str, Any]:
        if max_thinking_tokens is not None:
            requests = [replace(r, sampling=replace(r.sampling, max_thinking_tokens=max_thinking_tokens)) for r in requests]
        with Journal(out.with_name(f"{out.name}.journal")) if out is not None else nullcontext() as journal:
            done = {r.id: c for r, c in progress.track(_answered(engine, requests, journal, identity), len(requests))}
        answers.update({p.id: done[f"{p.id}-greedy"][0] for p in prompts})
        return done

    with Sandbox(unsafe=unsafe_code) if needs_code else nullcontext() as sandbox:
        if sandbox is not None and prompts_file is not None:
            check_tests(prompts, sandbox, quiet=progress.quiet)
        verifier = Verifier(sandbox)
        num_weak = 0

        def check(cases: list[tuple[dict[str, Any], str]]) -> list[bool]:
            nonlocal num_weak
            right = verifier.verify(cases)
            if thinking:
                right = [ok and keeps_form(text, thinking == "on") for ok, (_, text) in zip(right, cases, strict=True)]
            num_weak = verifier.num_weak(cases, right)
            return right

        modes = {"greedy": MODES["greedy"]} if greedy else MODES
        scores = evaluate_model(prompts, run, check, max_tokens=max_tokens, seed=seed, modes=modes)
    right = scores["outcomes"]["greedy"]
    rows: list[dict[str, Any]] = []
    for p in prompts:
        answer = answers[p.id]
        told = {"text": answer.text, "finished": answer.finish == "stop", "right": right[p.id]}
        rows.append({"id": p.id, "task": p.task, "messages": to_dicts(p.messages), **told})
    if out is not None:
        write_jsonl(out, rows)
    scores |= _instructions(prompts, {row["id"]: row for row in rows}, baseline)
    if thinking:
        scores["obedience"] = accuracy([keeps_form(row["text"], thinking == "on") for row in rows])
    if num_weak:
        scores["weak"] = num_weak
    if engine.is_quantized:  # on what the model itself answers
        own = Engine(engine.model, engine.tokenizer, engine.chat_format, name=engine.name, max_batch=engine.max_batch, dtype=engine.dtype)
        asked = [Request(str(i), p.messages, SamplingParams(temperature=0.0, max_tokens=max_tokens), seed) for i, p in enumerate(prompts)]
        said = [(*r.messages, Message("assistant", outs[0].text)) for r, outs in own.generate(asked) if outs[0].text.strip()]
        scores["quantized"] = divergence(engine, said)
    return scores


def model_identity(folder: Path, running: object) -> str:
    """Identity of a model folder, by its files' contents, and of how it is run."""
    return make_id(folder_stamps(folder), repr(running))


def _answered(
    engine: Engine, requests: Sequence[Request], journal: Journal | None, identity: str
) -> Iterator[tuple[Request, list[Completion]]]:
    """Completions of the requests: those of an earlier start from the journal, then the others, journalled as they come."""
    if journal is None:
        yield from engine.generate(requests)
        return
    settings = {r.id: {k: v for k, v in asdict(r.sampling).items() if v is not None} for r in requests}  # as earlier versions know them
    keys = {r.id: make_id(identity, r.id, to_dicts(r.messages), settings[r.id], r.seed) for r in requests}
    found = {r.id: completions_of(journal[keys[r.id]]) for r in requests if keys[r.id] in journal}
    yield from ((r, found[r.id]) for r in requests if found.get(r.id))
    for r, outs in engine.generate([r for r in requests if not found.get(r.id)]):
        journal.append({"id": keys[r.id], "out": [[c.text, c.num_tokens, None, c.finish] for c in outs]})
        yield r, outs


def _read_answers(path: Path, prompts: Sequence[Prompt]) -> dict[str, dict[str, Any]]:
    rows = {str(row.get("id")): row for row in read_records(path)}
    for number, p in enumerate(prompts, 1):
        row = rows.get(p.id, {})
        if not isinstance(row.get("text"), str) or not isinstance(row.get("right"), bool):
            raise InputError(
                f"{path} has no answer (id, text, right) to prompt {number}, {p.messages[-1].content[:60]!r}: give a file that "
                "`gristmill eval --out` wrote for the same prompts."
            )
    return rows


def _instructions(
    prompts: Sequence[Prompt], rows: Mapping[str, Mapping[str, Any]], baseline: Mapping[str, Mapping[str, Any]] | None
) -> dict[str, Any]:
    """Scores of the greedy answers: IFEval's where prompts have instructions, the share of looping answers, pairs with a baseline."""
    truths = {p.id: p.truth or {} for p in prompts}
    verdicts = instruction_verdicts(truths, {name: row["text"] for name, row in rows.items()})
    loops = looping([rows[name]["text"] for name in truths])
    out: dict[str, Any] = {"looping": accuracy(loops)}
    if verdicts["strict"]:
        out["instructions"] = instruction_scores(truths, verdicts)
    if baseline is not None:
        then = looping([baseline[name]["text"] for name in truths])
        out["paired"] = {
            "right": paired([baseline[name]["right"] for name in truths], [rows[name]["right"] for name in truths]),
            "looping": paired(then, loops),
        }
        if verdicts["strict"]:
            before = instruction_verdicts(truths, {name: row["text"] for name, row in baseline.items() if name in truths})
            out["paired"] |= paired_scores(before, verdicts)
    return out
