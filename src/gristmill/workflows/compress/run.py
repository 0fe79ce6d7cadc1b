"""Compression of a model by Puzzle: library, scores, costs, search, global distillation, and what the child comes to.

What does not depend on the target (text, library, scores, the parent's accuracy) is made once a folder, costs once an operating point;
each target adds a search, a child and its measurements. Every stage goes on where it was cut off, and nothing is trained, scored or
measured twice.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gristmill.compress.activations import pieces_of
from gristmill.compress.child import Child, Reference, make_child
from gristmill.compress.costs import Meter, OperatingPoint, check_measurable, check_room, compare_models, layer_share, measure_variants
from gristmill.compress.fusion import dependency_matrix, fusable_runs, fuse, independent_runs
from gristmill.compress.library import BldSettings, Library, build_library
from gristmill.compress.scores import Task, score_accuracy, score_blocks, search_scores
from gristmill.compress.search import (
    LIMITS,
    Architecture,
    Limits,
    Problem,
    check_feasible,
    check_solver,
    greedy,
    random_architectures,
    solve,
)
from gristmill.compress.variants import Choice, Space, block_config, kv_values_per_token, num_block_parameters
from gristmill.core.device import pick_device, pick_precision
from gristmill.core.errors import InputError
from gristmill.core.progress import Progress
from gristmill.data.find_format import find_format, with_template_of
from gristmill.data.human import HumanData
from gristmill.data.readers import read_prompts
from gristmill.data.rows import Prompt, make_id
from gristmill.engine.engine import Engine
from gristmill.evaluate.runner import MODES, evaluate_model
from gristmill.evaluate.stats import paired
from gristmill.generation.api import Completion, Request
from gristmill.judge.programs import Verifier, is_code
from gristmill.miniature.base import BASE
from gristmill.miniature.source import MiniatureSource
from gristmill.model.flops import kv_bytes_per_token, num_parameters
from gristmill.model.hf import fingerprint, load_model
from gristmill.model.hf_save import save_model
from gristmill.model.transformer import PRECISIONS, Transformer
from gristmill.runs.journal import Journal
from gristmill.runs.run_dir import RunDir, Stage
from gristmill.train.batches import Sample, fingerprint_samples
from gristmill.train.by_size import fill
from gristmill.train.top_logprobs import check_top_k
from gristmill.train.trainer import Trainer, TrainSettings
from gristmill.workflows.alarms import few_steps, learned_by_heart, not_distilled, slower_than_asked
from gristmill.workflows.alignment.source import normalize_prompt
from gristmill.workflows.answers import journalled
from gristmill.workflows.compress.recipe import CompressionRecipe
from gristmill.workflows.compress.text import CalibrationText, answer_samples, document_samples
from gristmill.workflows.dataset.steps import check_given_tests, open_verifier
from gristmill.workflows.train import MODEL, distillation_from

EVALUATION, MEASURED, TRAIN, TEACHER = "evaluation.jsonl", "measured.jsonl", "train", "teacher"
PIECE_TOKENS = 4096  # of a batch of blockwise distillation and scores
MIN_PROMPTS = 20  # with known answers, under which accuracies are noise
NUM_RANDOM = 2  # random architectures that are measured beside the search's
CHECKPOINT_SECONDS = 20.0


def run(recipe: CompressionRecipe, folder: Path, progress: Progress, unsafe_code: bool = False) -> dict[str, Any]:
    """Run a compression, from the start or from where it was cut off; what `results.json` holds.

    Raises:
        InputError: a file or the model cannot be used, the text is too short, no layer can change, or the target is out of reach.
    """
    with ExitStack() as stack:
        return _Run(recipe, folder, progress, unsafe_code, stack).results()


class _Run:
    """A compression in progress."""

    def __init__(self, recipe: CompressionRecipe, folder: Path, progress: Progress, unsafe_code: bool, stack: ExitStack):
        check_solver()
        self.device, self.progress = pick_device(recipe.device), progress
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        self.start = BASE if recipe.model == "miniature" else Path(recipe.model)
        self.parent, self.tokenizer = load_model(self.start)
        self.parent = self.parent.to(self.device).requires_grad_(False)
        self.format = find_format(recipe.chat_format, self.tokenizer)
        self.recipe = recipe
        self.precision = pick_precision(self.device)
        check_room(self.point, self.parent.config)
        self.space = Space.of(self.parent.config, **recipe.space.model_dump())
        check_measurable(self.parent.config, self.space)
        self._check_target(None)
        check_top_k(recipe.distillation.teacher_top_k, self.parent.config.vocab_size)
        self._world = None if recipe.world is None else MiniatureSource(HumanData(num_evaluation=recipe.data.num_evaluation), recipe.seed)
        self._given, self.evaluation = _prompts(recipe) if self._world is None else ([], self._world.evaluation())
        self.known = [] if recipe.search.metric != "accuracy" else _with_truths(recipe, self.prompts)
        self.documents: list[Sample] = []
        if recipe.data.documents is not None:
            self.documents = document_samples(recipe.data.documents, self.tokenizer, recipe.calibration, self.parent.config.max_positions)
            CalibrationText.of(self.documents, recipe.calibration, recipe.seed)  # before work is spent
        if recipe.world is None:
            check_given_tests([*self.evaluation, *self.known], unsafe_code=unsafe_code, quiet=progress.quiet)
        needs_code = any(is_code(p.truth) for p in [*self.evaluation, *self.known])
        self.verifier: Verifier = open_verifier(stack, needs_code=needs_code, unsafe_code=unsafe_code)
        self.dir = stack.enter_context(RunDir(folder, recipe, progress))

    @cached_property
    def prompts(self) -> list[Prompt]:
        """Prompts that the parent answers for the text."""
        if self._world is None:
            return self._given
        with self.progress.stage("prompts"):
            return self._world.drawn(self.recipe.calibration.num_draws, self.progress)

    @property
    def point(self) -> OperatingPoint:
        """What models are measured at."""
        costs = self.recipe.costs
        precision = self.precision if costs.precision == "auto" else costs.precision
        return OperatingPoint(costs.batch, costs.prompt_tokens, costs.output_tokens, precision, self.device.type)

    def results(self) -> dict[str, Any]:
        recipe = self.recipe
        of_model = [fingerprint(self.start), recipe.seed]
        of_prompts = [p.id for p in self._given] if self._world is None else [recipe.world, recipe.calibration.num_draws]
        asked = [recipe.calibration.model_dump(), of_prompts, fingerprint_samples(self.documents)]
        text = self.dir.stage("text", [*of_model, asked], self._make_text)
        self._text_folder, self.precision = text.folder, text.summary["precision"]
        of_costs = [*of_model, asdict(self.space), asdict(self.point), recipe.costs.repeats]
        costs = self.dir.stage(f"costs{recipe.costs.name}", of_costs, self._measure)
        self._check_target(costs.summary)
        of_library = [text.fingerprint, asdict(self.space), recipe.bld.model_dump()]
        library = self.dir.stage("library", of_library, self._build_library, files=["*.safetensors"])
        self.library = Library(self.parent, library.folder)
        scores = self.dir.stage("scores", library.fingerprint, self._score, again=self._lacks_accuracy)
        base = self.dir.stage("parent", [*of_model, [[p.id, p.truth] for p in self.evaluation]], self._evaluate_parent)
        found_scores = search_scores(scores.summary["blocks"], self.space, recipe.search.metric, len(self.known))
        self._problem = Problem(found_scores, self._costs(costs.summary), self.space.empty)
        name = f"{recipe.target.name}{recipe.costs.name}"
        searched = recipe.search.model_dump(exclude=set() if self.known else {"num_prompts"})
        wanted = [scores.fingerprint, costs.fingerprint, recipe.target.model_dump(), searched, *([self.task.id] if self.known else [])]
        found = self.dir.stage(f"search-{name}", wanted, self._search)
        trained = recipe.distillation.model_dump(exclude={"teacher_top_k"} if recipe.distillation.teacher_top_k is None else set())
        inputs = [found.fingerprint, recipe.fusion and recipe.fusion_limit, trained]
        child = self.dir.stage(f"child-{name}", inputs, partial(self._distil, found=found.summary), files=[f"{MODEL}/*"])
        wanted = [child.fingerprint, costs.fingerprint, base.fingerprint]
        measured = self.dir.stage(f"measured-{name}", wanted, partial(self._measure_child, child=child))
        stages = [text, costs, library, scores, base, found, child, measured]
        out = self._results(stages, costs.summary, base.summary, found.summary, child, measured.summary)
        self.dir.finish(out)
        return out

    # ---- text, library, scores, costs ----

    def _make_text(self, folder: Path) -> dict[str, Any]:
        self._text_folder = folder
        text = self.text
        return {"num_samples": len(text.train), "num_tokens": text.num_tokens, "precision": self.precision}

    @cached_property
    def text(self) -> CalibrationText:
        """The text, from the journal of the stage that made it."""
        recipe, wanted = self.recipe, self.recipe.calibration
        samples = self.documents
        if not samples:
            engine = self._engine(self.parent)
            samples = answer_samples(engine, self.prompts, wanted, self._text_folder, self.progress, recipe.seed)
        return CalibrationText.of(samples, wanted, recipe.seed)

    @cached_property
    def reference(self) -> Reference:
        """The parent on the validation text, in fp32: small differences drown in bf16."""
        return Reference(self.parent, pieces_of(self.text.validation, PIECE_TOKENS, self.device))

    def _engine(self, model: Transformer) -> Engine:
        return Engine(model, self.tokenizer, self.format, name="model", max_batch=256, dtype=PRECISIONS[self.precision])

    def _build_library(self, folder: Path) -> dict[str, Any]:
        bld = self.recipe.bld
        settings = BldSettings(bld.steps, bld.lr, self.precision, self.recipe.seed)
        pieces = pieces_of(self.text.blocks, PIECE_TOKENS, self.device)
        self.parent.compute_dtype = PRECISIONS[self.precision]
        try:
            records = build_library(self.parent, self.space, pieces, folder, settings, self.progress)
        finally:
            self.parent.compute_dtype = torch.float32
        trained = {name: {key: record[key] for key in ("half", "size", "before", "after")} for name, record in records.items()}
        return {"num_variants": len(trained), "num_architectures": str(self.space.num_architectures), "variants": trained}

    def _score(self, folder: Path) -> dict[str, Any]:
        scores = score_blocks(self.library, self.space, self.reference, folder, self.progress)
        found: dict[str, Any] = {"num_blocks": len(scores), "blocks": {name: dict(score) for name, score in scores.items()}}
        if self.known:
            of_task = dict(score_accuracy(self.library, self.space, self.task, folder, self.progress))
            right = of_task.pop("parent")["right"]
            found["task"] = {"id": self.task.id, "num_prompts": len(right), "parent": sum(right) / len(right)}
            found["blocks"] = {name: score | of_task[name] for name, score in found["blocks"].items()}
        return found

    def _lacks_accuracy(self, done: Mapping[str, Any]) -> bool:
        return bool(self.known) and done.get("task", {}).get("id") != self.task.id

    def _measure(self, folder: Path) -> dict[str, Any]:
        repeats, meter = self.recipe.costs.repeats, Meter(self.point, self.tokenizer, self.format)
        table = measure_variants(self.parent.config, self.space, meter, folder, self.progress, repeats=repeats, device=self.device)
        return {"num_rounds": repeats, "point": asdict(self.point), **table}

    # ---- accuracy ----

    @cached_property
    def task(self) -> Task:
        """What scores by accuracy are made with."""
        max_tokens = self.recipe.calibration.max_tokens

        def judge(model: Transformer) -> list[bool]:
            def generate(requests: list[Request]) -> dict[str, list[Completion]]:
                return {request.id: outs for request, outs in self._engine(model).generate(requests)}

            modes = {"greedy": MODES["greedy"]}
            found = evaluate_model(self.known, generate, self.verifier.verify, max_tokens=max_tokens, seed=0, modes=modes)
            return list(found["outcomes"]["greedy"].values())

        return Task(make_id([[p.id, p.truth] for p in self.known], max_tokens, self.precision), judge)

    def _evaluate_parent(self, folder: Path) -> dict[str, Any]:
        return self._evaluate(self.parent, folder)

    def _evaluate(self, model: Transformer, folder: Path) -> dict[str, Any]:
        """Greedy accuracy on the evaluation prompts, if there are any."""
        if not self.evaluation:
            return {"num_prompts": 0}
        generate = partial(journalled, engine=lambda: self._engine(model), path=folder / EVALUATION, progress=self.progress)
        modes = {"greedy": MODES["greedy"]}
        max_tokens, seed = self.recipe.calibration.max_tokens, self.recipe.seed
        return {"accuracy": evaluate_model(self.evaluation, generate, self.verifier.verify, max_tokens=max_tokens, seed=seed, modes=modes)}

    # ---- search ----

    def _costs(self, table: Mapping[str, Any] | None) -> dict[str, list[np.ndarray]]:
        """By the names of LIMITS, what every choice takes less than the layer's own, in shares of the parent's.

        Args:
            table: of measured costs; None where nothing is measured yet: all layers take the same time.
        """
        config, point, space = self.parent.config, self.point, self.space
        own = [num_block_parameters(config, block) for block in config.blocks]
        value_bytes, parameters = point.dtype.itemsize, num_parameters(config)
        block_bytes = 1 if point.precision == "int8" else value_bytes  # a parameter of a layer
        cached = point.batch * (point.prompt_tokens + point.output_tokens) * value_bytes
        memory = (parameters - sum(own)) * value_bytes + sum(own) * block_bytes + kv_bytes_per_token(config, 1) * cached
        costs: dict[str, list[np.ndarray]] = {name: [] for name in LIMITS}
        for layer, block in enumerate(config.blocks):
            choices = space.choices(layer)
            made = [block_config(block, choice) for choice in choices]
            fewer = np.array([num_block_parameters(config, one) - own[layer] for one in made])
            values = np.array([kv_values_per_token(one) - kv_values_per_token(block) for one in made])
            time = [0.0 if table is None else layer_share(table, choices[0], choice) for choice in choices]
            costs["time"].append(np.array(time))
            costs["memory"].append((fewer * block_bytes + values * cached) / memory)
            costs["parameters"].append(fewer / parameters)
        return costs

    @property
    def _limits(self) -> Limits:
        target = self.recipe.target
        return Limits(1 / target.speed, target.memory, target.parameters, alpha=self.recipe.search.diversity)

    def _check_target(self, table: Mapping[str, Any] | None) -> None:
        """InputError where no child comes to the target, as far as the costs are known."""
        costs = self._costs(table)
        nothing = [np.zeros(len(of_layer)) for of_layer in costs["time"]]
        check_feasible(Problem(nothing, costs, self.space.empty), self._limits if table is not None else replace(self._limits, time=1.0))

    def _choices(self, architecture: Architecture) -> list[Choice]:
        return [self.space.choices(layer)[j] for layer, j in enumerate(architecture)]

    def _search(self, folder: Path) -> dict[str, Any]:
        """Candidates at the target, the best children at other speeds, and a greedy and random ones: real KL and measured speed of each."""
        recipe, problem, target, limits = self.recipe, self._problem, self.recipe.target, self._limits
        found: list[tuple[str, float, Architecture]] = []
        earlier: tuple[Architecture, ...] = ()
        for _ in range(recipe.search.candidates):
            solution = solve(problem, replace(limits, earlier=earlier))
            if solution is None:
                break
            earlier = (*earlier, solution)
            found.append(("mip", target.speed, solution))
        if (other := greedy(problem, limits)) is not None:
            found.append(("greedy", target.speed, other))
        found += [("random", target.speed, one) for one in random_architectures(problem, limits, NUM_RANDOM, recipe.seed)]
        for speed in recipe.search.curve:
            solution = solve(problem, Limits(1 / speed)) if speed != target.speed else None
            found += [("curve", speed, solution)] if solution is not None else []
        children = [self._described(number, *one, folder) for number, one in enumerate(found)]
        speeds = self._speeds(folder, dict.fromkeys(architecture for _, _, architecture in found))
        children = [one | {"measured": speeds[_name(architecture)]} for one, (_, _, architecture) in zip(children, found, strict=True)]
        best = min((one for one in children if one["search"] == "mip"), key=lambda one: (-one.get("accuracy", 0.0), one["kl"]))
        return {"num_children": len(children), "target": target.model_dump(), "chosen": best["number"], "children": children}

    def _described(self, number: int, search: str, speed: float, architecture: Architecture, folder: Path) -> dict[str, Any]:
        """What an architecture is predicted to come to, and its KL (and accuracy, where layers are scored by it) before any training."""
        name = "-".join([_name(architecture), *([self.task.id] if self.known else [])])
        with Journal(folder / "children.jsonl") as journal:
            if name not in journal:
                model = make_child(self.library, self._choices(architecture)).model
                distance, right = self.reference.distance(model), self.task.judge(model) if self.known else []
                asked = {"accuracy": sum(right) / len(right)} if right else {}
                journal.append({"id": name, "kl": distance.kl, "lm_loss": distance.lm_loss, **asked})
            real: dict[str, Any] = {key: journal[name][key] for key in ("kl", "accuracy") if key in journal[name]}
        predicted = {name: self._problem.cost(name, architecture) for name in ("time", "memory", "parameters")}
        layers = [asdict(choice) for choice in self._choices(architecture)]
        said = {"number": number, "search": search, "target": speed, "architecture": list(architecture), "layers": layers}
        return {**said, "score": self._problem.score(architecture), **real, "predicted": {"speed": 1 / predicted["time"], **predicted}}

    def _speeds(self, folder: Path, architectures: Iterable[Architecture]) -> dict[str, dict[str, float]]:
        """Measured speeds against the parent, in turns."""

        def make(architecture: Architecture) -> Transformer:
            return make_child(self.library, self._choices(architecture)).model

        return self._compared({_name(one): partial(make, one) for one in architectures}, folder)

    def _compared(self, makers: Mapping[str, Callable[[], Transformer]], folder: Path) -> dict[str, dict[str, float]]:
        meter = Meter(self.point, self.tokenizer, self.format)
        return compare_models(self.parent, makers, meter, folder / MEASURED, self.progress, repeats=self.recipe.costs.repeats)

    # ---- the child ----

    def _child(self, found: Mapping[str, Any]) -> tuple[Child, dict[str, Any]]:
        """The chosen child, and what was fused by which dependencies, by the parent's numbers of layers."""
        layers = next(one["layers"] for one in found["children"] if one["number"] == found["chosen"])
        child = make_child(self.library, [Choice(**one) for one in layers])
        if not self.recipe.fusion:
            return child, {}
        matrices = {run: dependency_matrix(child.model, self.reference.pieces, run) for run in fusable_runs(child.model.config)}
        fused = independent_runs(matrices, self.recipe.fusion_limit)
        told = [{"layers": [child.layers[n] for n in run], "dependencies": matrix.tolist()} for run, matrix in matrices.items()]
        return fuse(child, fused), {"fusion": {"runs": told, "fused": [[child.layers[n] for n in run] for run in fused]}}

    def _distil(self, folder: Path, found: Mapping[str, Any]) -> dict[str, Any]:
        (child, fusion), recipe = self._child(found), self.recipe
        before = self.reference.distance(child.model)
        parameters, num_rows = num_parameters(self.parent.config), len(self.text.train)
        training = fill(recipe.distillation, "sft", parameters, device=self.device, num_rows=num_rows, precision=self.precision)
        values = {k: v for k, v in training.model_dump().items() if k in TrainSettings.__dataclass_fields__}
        settings = TrainSettings(**values, seed=recipe.seed, checkpoint_every=CHECKPOINT_SECONDS)
        device, cache, tick = self.device, self.library.folder / TEACHER, self.progress.tick  # one file for all targets
        objective, samples = distillation_from(
            self.start, training, self.text.train, settings, child.model.config, device=device, cache=cache, tick=tick, layers=child.layers
        )
        trainer = Trainer(child.model, objective, settings, device=device, folder=folder / TRAIN, on_step=self.progress.train_step)
        result = trainer.fit(samples)
        save_model(child.model, with_template_of(self.format, self.tokenizer), folder / MODEL)
        after = self.reference.distance(child.model)
        known = pieces_of(self.text.train[: len(self.text.validation)], PIECE_TOKENS, self.device)
        kl_trained_on = Reference(self.parent, known).distance(child.model).kl
        told = {"steps": result.steps, "tokens": result.tokens, "train_seconds": round(result.seconds, 2)}
        kl = {"kl_before": before.kl, "kl": after.kl, "kl_trained_on": kl_trained_on}
        return {**told, **kl, "lm_loss": after.lm_loss, "layers": list(child.layers), **fusion}

    def _measure_child(self, folder: Path, child: Stage) -> dict[str, Any]:
        def load() -> Transformer:
            return load_model(child.folder / MODEL)[0].to(self.device).requires_grad_(False)

        speed = self._compared({"child": load}, folder)["child"]
        model = load()
        sizes = {
            "parameters": num_parameters(model.config),
            "kv_bytes_per_token": kv_bytes_per_token(model.config, self.point.dtype.itemsize),
        }
        return {"speed": speed, **sizes, **self._evaluate(model, folder)}

    def _results(
        self,
        stages: Sequence[Stage],
        costs: Mapping[str, Any],
        base: Mapping[str, Any],
        found: Mapping[str, Any],
        child: Stage,
        measured: Mapping[str, Any],
    ) -> dict[str, Any]:
        chosen = next(one for one in found["children"] if one["number"] == found["chosen"])
        accuracy = None
        if "accuracy" in base:
            scores = {who: one["accuracy"]["greedy"] for who, one in (("parent", base), ("child", measured))}
            outcomes = [list(one["accuracy"]["outcomes"]["greedy"].values()) for one in (base, measured)]
            accuracy = {who: score["overall"]["mean"] for who, score in scores.items()} | {"scores": scores, "paired": paired(*outcomes)}
        sizes = {"parent": num_parameters(self.parent.config), "child": measured["parameters"]}
        speed, summary = measured["speed"]["median"], child.summary
        alarms = slower_than_asked(child.folder.name, speed, self.recipe.target.speed)
        alarms += few_steps(child.folder.name, summary["steps"], stages[0].summary["num_samples"], settings=self.recipe.distillation)
        alarms += not_distilled(child.folder.name, summary["kl_before"], summary["kl"])
        alarms += learned_by_heart(child.folder.name, summary.get("kl_trained_on", summary["kl"]), summary["kl"])
        return {
            "compress": {
                "target": found["target"],
                "speed": {"predicted": chosen["predicted"]["speed"], "measured": speed, "spread": measured["speed"]},
                "accuracy": accuracy,
                "kl": summary["kl"],
                "kl_before": summary["kl_before"],
                "score": chosen["score"],
                "parameters": sizes,
                "seconds": round(sum(stage.summary["seconds"] for stage in stages), 2),
            },
            "point": costs["point"],
            "parent_layers": [asdict(self.space.choices(layer)[0]) for layer in range(self.parent.config.num_layers)],
            "layers": chosen["layers"],
            "children": found["children"],
            **({"fusion": summary["fusion"]} if "fusion" in summary else {}),
            "model": f"{child.folder.name}/{MODEL}",
            "alarms": alarms,
        }


def _name(architecture: Architecture) -> str:
    """Name of an architecture in journals."""
    return "-".join(map(str, architecture))


def _prompts(recipe: CompressionRecipe) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts of files: those that the parent answers for the text, and those of the evaluation."""
    data = recipe.data
    prompts = [] if data.prompts is None else read_prompts(data.prompts, "file")
    evaluation = [] if data.evaluation is None else read_prompts(data.evaluation, "human", truth=True)
    if data.prompts is not None and not prompts:
        raise InputError(f"{data.prompts} holds no prompts.")
    asked = {normalize_prompt(p.messages) for p in evaluation}
    if both := next((p for p in prompts if normalize_prompt(p.messages) in asked), None):
        raise InputError(f"Prompt {both.messages[-1].content[:60]!r} is asked by the evaluation too: take it out of one.")
    tasks = list(dict.fromkeys(p.task for p in evaluation))
    return prompts, [p for task in tasks for p in [q for q in evaluation if q.task == task][: data.num_evaluation]]


def _with_truths(recipe: CompressionRecipe, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Prompts by which layers are scored by accuracy.

    Raises:
        InputError: there are too few with known answers.
    """
    known = [p for p in prompts if p.truth is not None]
    if len(known) < MIN_PROMPTS:
        raise InputError(
            f"search.metric accuracy needs prompts (data.prompts) whose answers are known, by `truth` or `answer`: at least {MIN_PROMPTS}, "
            f"and there are {len(known)}. Give more, or take the metric kl."
        )
    drawn = np.random.default_rng(recipe.seed).permutation(len(known))[: recipe.search.num_prompts]
    return [known[i] for i in drawn]
