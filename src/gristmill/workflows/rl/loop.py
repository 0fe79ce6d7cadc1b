"""Reinforcement learning with one set of weights: rollouts by the engine, updates by the Trainer, exact resume.

A step: rollouts are journalled, then their rewards, then the update is made. A checkpoint holds weights, optimizer and the number of
steps. A start after a kill goes on from the checkpoint: it reads the rollouts of later steps from the journal and makes their updates
again, so that no answer is sampled or judged twice, and the weights are those of a run that was never killed. On several processes the
first one does all this, and the others sample and train with it (`ranks.py`).
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from gristmill import __version__
from gristmill.core.device import pick_device, pick_precision
from gristmill.core.errors import InputError
from gristmill.core.progress import Progress
from gristmill.data.rows import Prompt, make_id
from gristmill.evaluate.runner import MODES, evaluate_model
from gristmill.evaluate.stats import paired
from gristmill.generation.api import Completion, Request, SamplingParams
from gristmill.judge.programs import Verifier, is_code
from gristmill.miniature.base import BASE
from gristmill.model.flops import num_parameters
from gristmill.model.hf import fingerprint
from gristmill.model.hf_config import read_config
from gristmill.parallel.mesh import Mesh
from gristmill.runs.journal import Journal
from gristmill.runs.run_dir import RunDir
from gristmill.train.batches import Rollout
from gristmill.train.checkpoint import fingerprint_text
from gristmill.train.metrics import MetricsLog
from gristmill.train.objectives.policy_gradient import normalized
from gristmill.workflows.alarms import few_updates, worse_on
from gristmill.workflows.answers import journalled
from gristmill.workflows.dataset.steps import check_given_tests, open_verifier
from gristmill.workflows.rl.curriculum import curriculum_order, kept_by_rate
from gristmill.workflows.rl.environments import Tasks, open_environment
from gristmill.workflows.rl.functions import RewardProcess
from gristmill.workflows.rl.models import check_models, model_parts
from gristmill.workflows.rl.policy import Policy
from gristmill.workflows.rl.prompts import check_room, check_sources, find_prompts, source_stamps
from gristmill.workflows.rl.ranks import RlRanks
from gristmill.workflows.rl.recipe import NORMALIZE, RlRecipe
from gristmill.workflows.rl.rewards import Rewarder, RewardPart
from gristmill.workflows.rl.rollouts import Group, RolloutSource, group_metrics
from gristmill.workflows.train import MODEL

ROLLOUTS, JUDGEMENTS, EVALUATION, PASS_RATES = "rollouts.jsonl", "judgements.jsonl", "evaluation.jsonl", "pass_rates.jsonl"
TRAIN = "train"
CHECKPOINT_SECONDS = 20.0
SHOWN_STEPS = 5  # first and last ones that a summary gives the mean reward of


def run(recipe: RlRecipe, folder: Path, progress: Progress, unsafe_code: bool = False, *, mesh: Mesh | None = None) -> dict[str, Any]:
    """Run a recipe of reinforcement learning, from the start or from where it was cut off; what `results.json` holds, in the first process.

    Args:
        mesh: the processes of the run (`process_mesh`), which have all weights each; default this one alone.

    Raises:
        InputError: a file or the model cannot be used, no group has a spread for many steps, or the disk is full.
    """
    with ExitStack() as stack:
        started = _Run(recipe, progress, mesh or Mesh())
        stack.callback(started.ranks.dismiss)
        if not started.ranks.mesh.is_writer:
            started.ranks.follow()
            return {}
        started.open(folder, unsafe_code, stack)
        return started.results()


class _Run:
    """A run in progress: the model as given is evaluated, trained, and evaluated again on the same prompts."""

    def __init__(self, recipe: RlRecipe, progress: Progress, mesh: Mesh):
        self.device, self.progress = pick_device(recipe.device), progress
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        self.start = BASE if recipe.model == "miniature" else Path(recipe.model)
        self.recipe = self._resolved(recipe, mesh)
        mesh.agree(make_id(__version__, self.recipe.model_dump(mode="json")), "recipes or versions of gristmill")
        self.policy = Policy(self.recipe, self.start, self.device)
        self.ranks = RlRanks(mesh, self.recipe, self.policy)

    def open(self, folder: Path, unsafe_code: bool, stack: ExitStack) -> None:
        """What the first process alone has: prompts, what judges, and the folder."""
        recipe, progress = self.recipe, self.progress
        self.environment: Tasks | None = None
        if recipe.environment is not None:
            self.environment = open_environment(recipe.environment, stack, recipe.calls.concurrency)
        self.prompts, self.evaluation = find_prompts(recipe, self.environment)
        both, policy = [*self.prompts, *self.evaluation], self.policy
        check_room(both, policy.chat_format, policy.tokenizer, max_tokens=recipe.max_tokens, context=policy.model.config.max_positions)
        if recipe.world is None:  # the built-in world's are known to be right
            check_given_tests(both, unsafe_code=unsafe_code, quiet=progress.quiet)
        self.verifier: Verifier = open_verifier(stack, needs_code=any(is_code(p.truth) for p in both), unsafe_code=unsafe_code)
        check_models(recipe)
        self.functions = [stack.enter_context(RewardProcess(function)) for function in recipe.rewards.functions]
        self.sources = source_stamps(recipe)
        self.dir = stack.enter_context(RunDir(folder, self.recipe, progress))

    def _resolved(self, recipe: RlRecipe, mesh: Mesh) -> RlRecipe:
        """The recipe with what it leaves to the model's size and the device."""
        training, engine = recipe.training, recipe.engine
        lr = recipe.lr(num_parameters(read_config(self.start)[1]))
        picked = mesh.first(pick_precision(self.device)) if "auto" in (training.precision, engine.precision) else ""  # by measuring
        precision = picked if training.precision == "auto" else training.precision
        generation = picked if engine.precision == "auto" else engine.precision
        changes = {"lr": lr, "precision": precision}
        return recipe.model_copy(
            update={
                "training": training.model_copy(update=changes),
                "engine": engine.model_copy(update={"precision": generation}),
            }
        )

    def results(self) -> dict[str, Any]:
        start = {"model": fingerprint(self.start), "evaluation": [p.id for p in self.evaluation], "max_tokens": self.recipe.max_tokens}
        before = self.dir.stage("base", start, self._evaluate)
        rates = self._pass_rates()
        inputs = [before.fingerprint, [p.id for p in self.prompts], self._decides(), rates, *([self.sources] if self.sources else [])]
        after = self.dir.stage("rl", inputs, partial(self._train, rates=rates), files=[f"{MODEL}/*"])
        stages = [{"name": s.summary["name"], "folder": s.folder.name} | {m: s.summary[m] for m in MODES} for s in (before, after)]
        out: dict[str, Any] = {"stages": stages}
        outcomes = {mode: [list(s.summary["outcomes"][mode].values()) for s in (before, after)] for mode in MODES}
        out["paired"] = {mode: paired(*both) for mode, both in outcomes.items()}
        out |= {key: after.summary[key] for key in ("steps", "updates", "train_seconds")} | {"model": f"{after.folder.name}/{MODEL}"}
        out["alarms"] = few_updates("rl", out["updates"], out["steps"] * self.recipe.updates)
        for mode, both in outcomes.items():
            out["alarms"] += worse_on("rl", f"the evaluation ({mode})", "base", *both)
        self.dir.finish(out)
        return out

    def _decides(self) -> dict[str, Any]:
        """The keys of the recipe that decide what is trained."""
        return self.recipe.model_dump(mode="json", exclude={"name", *self.recipe.may_change})

    def _generate(self, requests: list[Request], path: Path) -> dict[str, list[Completion]]:
        """Completions by request; those that an earlier start finished are read from the journal."""
        return journalled(requests, lambda: self.ranks, path, self.progress)

    def _evaluate(self, folder: Path) -> dict[str, Any]:
        """Accuracy on the evaluation prompts, greedy and at temperature 1, by other requests than training's."""
        generate = partial(self._generate, path=folder / EVALUATION)
        by_environment = self.environment is not None and self.recipe.data.evaluation is None
        check = self._passing if by_environment else self.verifier.verify
        with ExitStack() as stack:
            if by_environment and self.recipe.asks_others:
                self._journalled(folder, stack)
            return evaluate_model(self.evaluation, generate, check, max_tokens=self.recipe.max_tokens, seed=self.recipe.seed)

    def _passing(self, cases: list[tuple[dict[str, Any], str]]) -> list[bool]:
        """Whether the environment's reward of each answer is one that passes.

        Raises:
            InputError: it could not be asked about one, which is no wrong answer.
        """
        assert self.environment is not None and self.recipe.environment is not None
        prompts = [Prompt("", "", (), "file", meta=truth) for truth, _ in cases]
        values = self.environment.rewards(prompts, [Completion(text, 0, (), "stop") for _, text in cases])
        if errors := [value for value in values if isinstance(value, str)]:
            raise InputError(f"The environment could not judge {len(errors)} of {len(values)} answers of the evaluation: {errors[0]}.")
        return [isinstance(value, float) and value >= self.recipe.environment.passing for value in values]

    def _pass_rates(self) -> list[float]:
        """Of every prompt, how often the starting model passes it; none without a curriculum."""
        recipe, curriculum = self.recipe, self.recipe.curriculum
        if curriculum is None:
            return []

        def work(folder: Path) -> dict[str, Any]:
            sampling = SamplingParams(temperature=1.0, max_tokens=recipe.max_tokens, n=curriculum.samples)
            requests = [Request(f"rate-{p.id}", p.messages, sampling, recipe.seed) for p in self.prompts]
            answers = self._generate(requests, folder / PASS_RATES)
            rates, rewarder = [], Rewarder(recipe.rewards, self.verifier, recipe.max_tokens)
            for prompt, request in zip(self.prompts, requests, strict=True):
                found = answers[request.id]
                rewards = rewarder.rewards([prompt] * len(found), found)
                rates.append(fmean(reward.right * reward.form for reward in rewards))
            return {"rates": rates, "num_prompts": len(rates), "num_kept": len(kept_by_rate(rates, curriculum))}

        inputs = [fingerprint(self.start), [p.id for p in self.prompts], recipe.max_tokens, recipe.seed, curriculum.samples]
        return [
            float(rate) for rate in self.dir.stage("pass-rates", [*inputs, recipe.rewards.model_dump(mode="json")], work).summary["rates"]
        ]

    # ---- training ----

    def _train(self, folder: Path, rates: Sequence[float]) -> dict[str, Any]:
        recipe, prompts, order = self.recipe, self.prompts, list[int]()
        if (curriculum := recipe.curriculum) is not None:
            kept = kept_by_rate(rates, curriculum)
            prompts, rates = [prompts[i] for i in kept], [rates[i] for i in kept]
            order = curriculum_order(rates, recipe.steps, recipe.prompts, curriculum=curriculum, seed=recipe.seed)
        ranks = self.ranks
        saved = ranks.begin(folder / TRAIN, make_id([p.id for p in self.prompts]), fingerprint_text(str(self._decides())))
        done, seconds, idle, rewards = 0, 0.0, 0, list[float]()
        if saved is not None:
            done, seconds, idle, rewards = (saved.info[name] for name in ("rollout_steps", "seconds", "idle", "rewards"))
        log = MetricsLog(folder / TRAIN, done)
        started = last_saved = time.monotonic()

        def save(*, finished: bool = False) -> None:
            elapsed = seconds + time.monotonic() - started
            info = {"rollout_steps": done, "seconds": elapsed, "idle": idle, "rewards": rewards}
            ranks.save_checkpoint(done, info, finished=finished)

        check_sources(folder, self.sources)
        with ExitStack() as stack:
            journal = stack.enter_context(Journal(folder / ROLLOUTS))
            rewarder = Rewarder(recipe.rewards, self.verifier, recipe.max_tokens, self._parts(folder, stack))
            source = RolloutSource(recipe, prompts, self.policy, rewarder, journal, order=order, sampler=ranks)
            while done < recipe.steps:
                began = time.monotonic()
                groups = source.step(done)
                sampled = time.monotonic()
                metrics = group_metrics(groups) | ranks.update(self._samples(source, groups))
                idle = 0 if any(group.has_spread for group in groups) else idle + 1
                self._check_idle(idle, groups)
                done += 1
                rewards.append(metrics["reward_total"])
                num_tokens = sum(answer.num_tokens for group in groups for answer in group.answers)
                metrics["generation_seconds"], metrics["update_seconds"] = sampled - began, time.monotonic() - sampled
                metrics["generated_tokens"] = num_tokens
                log.write(done, metrics)
                speed = num_tokens / (time.monotonic() - began)
                self.progress.tick(done, recipe.steps, f"steps, reward {metrics['reward_total']:.3f}, {speed:,.0f} tokens/s")
                if done < recipe.steps and time.monotonic() - last_saved >= CHECKPOINT_SECONDS:
                    save()
                    last_saved = time.monotonic()
        save(finished=True)
        log.close()
        ranks.save_model(folder)
        took = round(seconds + time.monotonic() - started, 2)
        shown = {"first_reward": fmean(rewards[:SHOWN_STEPS]), "last_reward": fmean(rewards[-SHOWN_STEPS:])}
        return {"steps": done, "updates": ranks.num_updates, "train_seconds": took, **shown, **self._evaluate(folder)}

    def _parts(self, folder: Path, stack: ExitStack) -> list[RewardPart]:
        """What rewards beside the verifier. What others were asked is in a journal of its own."""
        recipe = self.recipe
        parts: list[RewardPart] = [*self.functions]
        if recipe.asks_others:
            parts += model_parts(recipe, self._journalled(folder, stack), self.ranks.shared_scorer)
        return parts if self.environment is None else [*parts, self.environment]

    def _journalled(self, folder: Path, stack: ExitStack) -> Journal:
        """The journal of what others were asked in a stage, for the environment too."""
        journal = stack.enter_context(Journal(folder / JUDGEMENTS))
        if self.environment is not None:
            self.environment.journal = journal
            stack.callback(setattr, self.environment, "journal", None)
        return journal

    def _samples(self, source: RolloutSource, groups: Sequence[Group]) -> list[list[Rollout]]:
        """Samples of the groups that have a spread, in equal shares for the step's updates. None without any."""
        recipe = self.recipe
        kept = source.trained(groups)
        kind = recipe.normalize or NORMALIZE[recipe.method]
        shares = [kept[i :: recipe.updates] for i in range(recipe.updates)]
        return [normalized([r for group in share for r in source.samples(group)], kind, recipe.max_tokens) for share in shares if share]

    def _check_idle(self, idle: int, groups: Sequence[Group]) -> None:
        if idle < self.recipe.max_idle_steps:
            return
        right = fmean(reward.right for group in groups for reward in group.rewards)
        advice = "give easier prompts" if right < 0.5 else "give harder prompts"
        if self.recipe.rewards.judges_all or self.recipe.environment is not None:
            advice = "look at what rewards, which says the same of all answers to a prompt"
        raise InputError(
            f"No group had a spread for {idle} steps ({right:.0%} of the answers are right): {advice}, or raise samples. "
            "What was sampled is in the journal."
        )
