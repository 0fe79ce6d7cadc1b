"""The processes of a run of reinforcement learning: each samples a share of a step's groups and trains on a share, from weights of its own.

The first process has the journal, rewards and metrics. All have the same weights, whole (DDP), since an engine samples from them: a
process's engine reads again what its own trainer has updated.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np

from gristmill.core.errors import InputError
from gristmill.judge.backends import scorer_of
from gristmill.parallel.mesh import Mesh
from gristmill.train.batches import Rollout
from gristmill.train.checkpoint import Checkpoint, CheckpointStore, Identity, fingerprint_model
from gristmill.train.memory import record_micro_batch
from gristmill.train.objectives.policy_gradient import with_logprobs
from gristmill.train.trainer import Trainer, TrainSettings
from gristmill.workflows.ranks import Ranks
from gristmill.workflows.rl.policy import Policy
from gristmill.workflows.rl.recipe import RlRecipe


class RlRanks(Ranks):
    """The processes of one run, with one policy; a `Generator` of its answers.

    Args:
        recipe: resolved, and the same in all processes.
    """

    name = "policy"

    def __init__(self, mesh: Mesh, recipe: RlRecipe, policy: Policy) -> None:
        scorer = partial(scorer_of, chat_format="auto", device=recipe.device)
        super().__init__(mesh, engine=lambda name, folder: policy.engine, scorer=scorer)
        self._recipe, self._policy = recipe, policy
        self._trainer: Trainer | None = None
        self._store: CheckpointStore | None = None

    # ---- what the first process asks for ----

    def begin(self, folder: Path, data: str, settings: str) -> Checkpoint | None:
        """Make the trainers, and go on from the latest checkpoint, if there is one.

        Args:
            folder: of checkpoints and metrics.
            data, settings: fingerprints of what decides the run beside the starting weights.
        """
        identity = Identity(fingerprint_model(self._policy.model), data, settings)
        order = {"job": "begin", "folder": str(folder), "identity": asdict(identity)}
        saved: Checkpoint | None = self._all(order, partial(self._begin, folder, identity))
        return saved

    def update(self, shares: Sequence[list[Rollout]]) -> dict[str, float]:
        """Optimizer updates, one on each share of a step's rollouts, which the engines see then; the means of their metrics."""
        if not shares:
            return {}
        order = {"job": "update", "shares": [[_plain(rollout) for rollout in share] for share in shares] if self.mesh.size > 1 else []}
        metrics: dict[str, float] = self._all(order, partial(self._update, shares))
        return metrics

    @property
    def num_updates(self) -> int:
        assert self._trainer is not None
        return self._trainer.result.steps

    def save_checkpoint(self, step: int, info: dict[str, Any], *, finished: bool = False) -> None:
        """Write what the trainer's next update depends on, and `info`: the first process has all of it."""
        assert self._trainer is not None and self._store is not None
        state = self._trainer.state(finished=finished)
        self._store.save(replace(state, step=step, info=state.info | info))

    def save_model(self, folder: Path) -> None:
        """Write the trained model (`Policy.save`), which is the one that answers from then on."""
        self._policy.save(folder)
        self._all({"job": "take", "folder": str(folder)}, partial(self._take, folder))

    def _all(self, order: dict[str, Any], work: Callable[[], Any]) -> Any:
        if self.mesh.size == 1:
            return work()
        with self._together(order):
            return work()

    # ---- what all do ----

    def _do(self, order: dict[str, Any]) -> None:
        with suppress(InputError):  # the first process says it
            if order["job"] == "begin":
                self._begin(Path(order["folder"]), Identity(**order["identity"]))
            elif order["job"] == "update":
                self._update([[_rollout(plain) for plain in share] for share in order["shares"]])
            elif order["job"] == "take":
                self._take(Path(order["folder"]))
            else:
                super()._do(order)

    def _begin(self, folder: Path, identity: Identity) -> Checkpoint | None:
        recipe, policy = self._recipe, self._policy
        values = {k: v for k, v in recipe.training.model_dump().items() if k in TrainSettings.__dataclass_fields__}
        if recipe.training.lora is not None:
            values["b_lr_ratio"] = recipe.training.lora.b_lr_ratio
        settings = TrainSettings(
            **values, steps=recipe.steps * recipe.updates, batch_size=recipe.prompts * recipe.samples, seed=recipe.seed
        )
        trainer = self._trainer = Trainer(policy.model, recipe.objective(), settings, device=policy.device, folder=folder, mesh=self.mesh)
        store = self._store = CheckpointStore(folder, identity, mesh=self.mesh)
        saved = store.load()
        self.mesh.agree(None if saved is None else saved.step, "checkpoints")
        if saved is not None:
            trainer.load_state(saved)
        if self.mesh.is_writer:
            record_micro_batch(folder, trainer.micro_batch_tokens)
        policy.refresh()
        return saved

    def _take(self, folder: Path) -> None:
        """Answer as the model that was written: where one process cannot read it, none goes on."""
        self._exchange(partial(self._policy.take_saved, folder))

    def _update(self, shares: Sequence[list[Rollout]]) -> dict[str, float]:
        assert self._trainer is not None
        settings: dict[str, Any] = {"precision": self._recipe.training.precision, "micro_batch_tokens": self._trainer.micro_batch_tokens}
        if self._recipe.updates > 1:  # by the trainer, before the first update
            shares = [self._filled("old", partial(with_logprobs, self._policy.model, name="old", **settings), share) for share in shares]
        if self._recipe.beta:
            shares = [self._filled("reference", partial(self._policy.with_reference, **settings), share) for share in shares]
        found = [self._trainer.step(share) for share in shares]
        self._policy.refresh()
        return {name: fmean(metrics[name] for metrics in found) for name in found[0]}

    def _filled(
        self, name: Literal["old", "reference"], fill: Callable[[list[Rollout]], list[Rollout]], rollouts: list[Rollout]
    ) -> list[Rollout]:
        """Rollouts with log-probabilities of which each process computes those of a share of the prompts."""
        if self.mesh.size == 1:
            return fill(rollouts)
        prompts = list(dict.fromkeys(rollout.prompt for rollout in rollouts))
        own = set(prompts[self.mesh.rank :: self.mesh.size])
        mine = [rollout for rollout in rollouts if rollout.prompt in own]
        values = {rollout.id: getattr(rollout, name).tolist() for rollout in (fill(mine) if mine else [])}
        found = {id_: logprobs for share in self.mesh.gather(values) for id_, logprobs in share.items()}
        return [replace(rollout, **{name: np.asarray(found[rollout.id], dtype=np.float32)}) for rollout in rollouts]  # type: ignore[arg-type]


def _plain(rollout: Rollout) -> dict[str, Any]:
    values = {field.name: getattr(rollout, field.name) for field in fields(rollout)}
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}


def _rollout(plain: dict[str, Any]) -> Rollout:
    advantage = plain["advantage"]
    own = np.asarray(advantage, dtype=np.float32) if isinstance(advantage, list) else advantage  # of each token, or of the answer
    return Rollout(**(plain | {"advantage": own}))
