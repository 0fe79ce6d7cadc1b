"""A reasoning run: SFT with the toggle, stages of reinforcement learning from easy to hard, the model before and after in both modes.

00-data     answers that are imitated, without those that are rejected; also as Llama-Nemotron's records
NN-pretraining   the model, trained further on documents, where the recipe asks for it
NN-base     the model with a token for each tag of thinking
NN-sft      trained on them
NN-before   answers to the held-out prompts, in both modes
NN-NAME     a stage of reinforcement learning: a run of `gristmill rl` in its folder `run`, which goes on from its own checkpoint
..
NN-after    as before, and under thinking budgets
"""

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gristmill.core.device import pick_device, pick_precision
from gristmill.core.errors import InputError
from gristmill.core.io import stamp, stamps, write_text
from gristmill.core.progress import Progress
from gristmill.core.untrusted import quoted_path
from gristmill.data.chat import to_dicts
from gristmill.data.find_format import find_format
from gristmill.data.rows import Demonstration, Prompt
from gristmill.data.thinking import LINES, nemotron_record
from gristmill.data.tokenizer import Tokenizer
from gristmill.engine.engine import Engine
from gristmill.evaluate.reasoning import budget_score, reasoning_scores
from gristmill.evaluate.stats import paired
from gristmill.generation.api import Request, SamplingParams
from gristmill.judge.programs import Verifier, is_code
from gristmill.miniature.base import BASE
from gristmill.model.convert import add_thinking_tokens
from gristmill.model.hf import fingerprint, load_model
from gristmill.model.hf_config import read_config
from gristmill.runs.artifacts import EVALUATION, HUMAN_DEMONSTRATIONS
from gristmill.runs.run_dir import RunDir, Stage
from gristmill.workflows.alarms import few_steps, few_updates, worse_on
from gristmill.workflows.answers import journalled
from gristmill.workflows.dataset.steps import check_given_tests, open_verifier
from gristmill.workflows.pretrain import pretrain
from gristmill.workflows.reasoning.recipe import ReasoningRecipe, RlStage
from gristmill.workflows.reasoning.rows import FileRows, WorldRows, judged
from gristmill.workflows.rl import loop as rl
from gristmill.workflows.rl.prompts import check_room, check_steps
from gristmill.workflows.train import MODEL, train_model

ANSWERS, RECORDS, PROMPTS, WATCHED, RL_RUN = "answers.jsonl", "llama-nemotron.jsonl", "prompts.jsonl", "watched.jsonl", "run"


def run(recipe: ReasoningRecipe, folder: Path, progress: Progress, unsafe_code: bool = False) -> dict[str, Any]:
    """Run a reasoning recipe, from the start or from where it was cut off; what `results.json` holds.

    Raises:
        InputError: a file or the model cannot be used, all answers to imitate are rejected, or the disk is full.
    """
    with ExitStack() as stack:
        return _Run(recipe, folder, progress, unsafe_code, stack).results()


class _Run:
    def __init__(self, recipe: ReasoningRecipe, folder: Path, progress: Progress, unsafe_code: bool, stack: ExitStack):
        self.recipe, self.progress, self.unsafe_code = recipe, progress, unsafe_code
        self.device = pick_device(recipe.device)
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        self.start = BASE if recipe.model == "miniature" else Path(recipe.model)
        self.rows = FileRows(recipe) if recipe.world is None else WorldRows(recipe)
        self.evaluation = self.rows.evaluation()
        self.prompts = {stage.name: self.rows.prompts(stage) for stage in recipe.stages}
        for stage in recipe.stages:
            check_steps(recipe.rewards_of(stage), self.prompts[stage.name])
        self.demonstrations = self.rows.demonstrations()
        if (documents := recipe.pretraining and recipe.pretraining.documents) and not documents.exists():
            raise InputError(f"There is no {quoted_path(documents)}, which pretraining.documents names: check the path.")
        given = [*self.evaluation, *(p for prompts in self.prompts.values() for p in prompts)]
        tokenizer, context = Tokenizer.load(self.start), read_config(self.start)[1].max_positions
        form = find_format(recipe.chat_format, tokenizer)
        check_room(given, form, tokenizer, max_tokens=recipe.rl.max_tokens, context=context)
        if recipe.world is None:  # the built-in world's are known to be right
            check_given_tests(given, unsafe_code=unsafe_code, quiet=progress.quiet)
        needs_code = any(is_code(truth) for truth in [*(p.truth for p in given), *(truth for _, truth in self.demonstrations)])
        self.verifier: Verifier = open_verifier(stack, needs_code=needs_code, unsafe_code=unsafe_code)
        self.dir = stack.enter_context(RunDir(folder, recipe, progress))

    def results(self) -> dict[str, Any]:
        recipe = self.recipe
        asked = [[p.id, p.truth] for p in self.evaluation]
        given = [asked, *([row.id, row.messages[-1].content, truth] for row, truth in self.demonstrations)]
        data = self.dir.stage("data", given, self._data, artifacts=[HUMAN_DEMONSTRATIONS, EVALUATION], files=[RECORDS])
        start = self._pretrained()
        base = self.dir.stage("base", fingerprint(start), partial(self._base, start=start), files=[f"{MODEL}/*"])
        inputs = [data.fingerprint, base.fingerprint, recipe.sft.model_dump(mode="json"), recipe.seed, recipe.chat_format]
        sft = self.dir.stage("sft", inputs, partial(self._sft, base=base.folder / MODEL, data=data.folder), files=[f"{MODEL}/*"])
        model = sft.folder / MODEL
        before = self._measured("before", model, sft.fingerprint, budgets=())
        done, last = before, sft.fingerprint
        alarms = few_steps("sft", sft.summary["steps"], sft.summary["rows"], settings=recipe.sft)
        for stage in recipe.stages:
            done = self._reinforced(stage, model, last)
            alarms += few_updates(stage.name, done.summary["updates"], done.summary["steps"])
            model, last = done.folder / RL_RUN / done.summary["model"], done.fingerprint
        after = self._measured("after", model, last, budgets=recipe.budgets)
        old, new = before.summary["reasoning"], after.summary["reasoning"]
        outcomes = {mode: [list(of["outcomes"][mode].values()) for of in (old, new)] for mode in LINES}
        for mode, both in outcomes.items():
            alarms += worse_on("after", f"held-out prompts (thinking {mode})", "sft", *both)
        scores = [{name: value for name, value in found.items() if name != "outcomes"} for found in (old, new)]
        results = {
            "reasoning": {
                "before": scores[0],
                "after": scores[1],
                "paired": {mode: paired(*both) for mode, both in outcomes.items()},
                "budget": after.summary["budget"],
            },
            "rejected": data.summary["rejected"],
            "model": str(model.relative_to(self.dir.path)),
            "alarms": alarms,
        }
        return self.dir.finish(results)

    def _data(self, folder: Path) -> dict[str, Any]:
        """Write the answers that are imitated, without the rejected ones."""
        why = judged(self.demonstrations, self.verifier.verify)
        kept = [row for (row, _), reason in zip(self.demonstrations, why, strict=True) if not reason]
        if not kept:
            raise InputError(f"All {len(why)} answers to imitate are rejected ({_counted(why)}): look at their form and their truths.")
        HUMAN_DEMONSTRATIONS.write(folder, kept)
        EVALUATION.write(folder, self.evaluation)
        records = [nemotron_record(row.messages, category=row.task, generator=row.origin) for row in kept]
        write_text(folder / RECORDS, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        return {"kept_rows": len(kept), "num_evaluation": len(self.evaluation), "rejected": Counter(reason for reason in why if reason)}

    def _pretrained(self) -> Path:
        """The model that the run starts from, trained further on documents where the recipe asks for it."""
        if self.recipe.pretraining is None:
            return self.start
        recipe = self.recipe.pretraining_recipe(self.start)

        def work(folder: Path) -> dict[str, Any]:
            result = pretrain(recipe, folder, self.progress.train_step)
            return {"steps": result.steps, "tokens": result.tokens}

        documents = recipe.documents
        content = stamps(documents, ["*"]) if documents and documents.is_dir() else documents and stamp(documents)
        inputs = [fingerprint(self.start), self.recipe.pretraining.model_dump(mode="json"), self.recipe.seed, content]
        return self.dir.stage("pretraining", inputs, work, files=[f"{MODEL}/*"]).folder / MODEL

    def _base(self, folder: Path, start: Path) -> dict[str, Any]:
        return add_thinking_tokens(start, folder / MODEL)

    def _sft(self, folder: Path, base: Path, data: Path) -> dict[str, Any]:
        rows: list[Demonstration] = HUMAN_DEMONSTRATIONS.read(data)
        settings = {"recipe": self.recipe.sft, "device": self.device, "chat_format": self.recipe.chat_format, "seed": self.recipe.seed}
        result = train_model("sft", base, rows, out=folder, on_step=self.progress.train_step, checkpoint_every=20.0, **settings)  # type: ignore[arg-type]
        speed = round(result.tokens / max(result.seconds, 1e-9))
        return {"rows": len(rows), "steps": result.steps, "metrics": result.metrics, "tokens_per_second": speed}

    def _reinforced(self, stage: RlStage, model: Path, inputs: str) -> Stage:
        """A stage of reinforcement learning, on prompts that are written beside it."""

        def work(folder: Path) -> dict[str, Any]:
            _write_prompts(folder / PROMPTS, self.prompts[stage.name])
            _write_prompts(folder / WATCHED, self.rows.watched(stage))
            recipe = self.recipe.rl_recipe(stage, model=str(model), prompts=str(folder / PROMPTS), evaluation=str(folder / WATCHED))
            results = rl.run(recipe, folder / RL_RUN, self.progress, self.unsafe_code)
            return {key: value for key, value in results.items() if key != "alarms"}  # this run has its own

        asked = [[p.id, p.truth] for p in self.prompts[stage.name]]
        settings = [stage.model_dump(mode="json"), self.recipe.rl.model_dump(mode="json"), asked]
        return self.dir.stage(stage.name, [inputs, settings], work, files=[f"{RL_RUN}/*/{MODEL}/*"])

    # ---- what is measured ----

    def _measured(self, name: str, model: Path, inputs: str, *, budgets: Sequence[int]) -> Stage:
        work = partial(self._measure, model=model, budgets=budgets)
        return self.dir.stage(name, [inputs, self.recipe.rl.max_tokens, list(budgets)], work)

    def _measure(self, folder: Path, model: Path, budgets: Sequence[int]) -> dict[str, Any]:
        """Greedy answers in both modes, and those of the thinking mode again under every budget."""
        prompts, task = self.evaluation, self.recipe.data.task
        curve = [p for p in prompts if p.meta["reasoning"] == "on" and (not task or p.task == task)] if budgets else []
        asked = {p.id: self._request(p, None) for p in prompts}
        asked |= {f"{p.id}-{budget}": self._request(p, budget) for p in curve for budget in budgets}
        found = journalled(list(asked.values()), lambda: self._engine(model), folder / ANSWERS, self.progress)
        answers = {name: found[request.id][0] for name, request in asked.items()}
        scores = reasoning_scores(prompts, answers, self.verifier.verify, task=task)
        points = []
        for limit in (*budgets, None) if budgets else ():
            of_limit = {p.id: answers[p.id if limit is None else f"{p.id}-{limit}"] for p in curve}
            points.append(budget_score(curve, of_limit, self.verifier.verify, limit))
        return {"num_answers": len(asked), "reasoning": scores, "budget": points}

    def _request(self, prompt: Prompt, budget: int | None) -> Request:
        sampling = SamplingParams(temperature=0.0, max_tokens=self.recipe.rl.max_tokens, max_thinking_tokens=budget)
        return Request(prompt.id if budget is None else f"{prompt.id}-{budget}", prompt.messages, sampling, self.recipe.seed)

    def _engine(self, folder: Path) -> Engine:
        model, tokenizer = load_model(folder)
        form, settings = find_format(self.recipe.chat_format, tokenizer), self.recipe.rl.engine
        precision = pick_precision(self.device) if settings.precision == "auto" else settings.precision
        dtype, quantize = torch.float32 if precision == "fp32" else torch.bfloat16, "int8" if precision == "int8" else ""
        name = folder.parent.name
        return Engine(model.to(self.device), tokenizer, form, name=name, max_batch=settings.max_batch, dtype=dtype, quantize=quantize)  # type: ignore[arg-type]


def _write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    rows = [{"id": p.id, "task": p.task, "messages": to_dicts(p.messages), "truth": p.truth} for p in prompts]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _counted(reasons: Sequence[str]) -> str:
    return ", ".join(f"{num} {reason}" for reason, num in Counter(filter(None, reasons)).items())
