"""The policy: the model that the engine samples from and the Trainer updates, all of its weights or an adapter beside them."""

from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch

from gristmill.core.errors import InputError
from gristmill.data.find_format import find_format, with_template_of
from gristmill.engine.engine import Engine
from gristmill.model.adapters import Adapter, is_adapter, merge_folder, save_adapter
from gristmill.model.hf import load_model
from gristmill.model.hf_save import save_model
from gristmill.model.lora import adapter_parts, adapters_disabled, add_adapters
from gristmill.model.transformer import PRECISIONS, Transformer
from gristmill.train.batches import Rollout
from gristmill.train.objectives.policy_gradient import with_logprobs
from gristmill.workflows.rl.recipe import RlRecipe
from gristmill.workflows.train import ADAPTER, MODEL, lora_config


class Policy:
    """One set of weights for sampling and training.

    Args:
        recipe: with the engine's precision.
        start: folder of the model that the run starts from, which is the reference of the KL divergence too.

    Attributes:
        device: where the model is.
        engine: samples; `refresh` makes it see what was trained.
        adapter: name of the adapter that its requests ask for; "" where all weights are trained.

    Raises:
        InputError: the model cannot be used, or cannot have the adapter.
    """

    def __init__(self, recipe: RlRecipe, start: Path, device: torch.device):
        self._recipe, self._start, self.device = recipe, start, device
        lora = self._lora = recipe.training.lora
        if is_adapter(start):
            raise InputError(f"Merge the adapter first (`gristmill merge {start} --out DIR`), and train what it made: {start} is no model.")
        # an engine in bf16 reads a base in bf16 where it is
        self.model, self.tokenizer = load_model(start, PRECISIONS[lora.base] if lora else torch.float32)
        self.model = self.model.to(device)
        self.chat_format = find_format(recipe.chat_format, self.tokenizer)
        if lora:
            add_adapters(self.model, lora_config(lora), seed=recipe.seed, base=lora.base)
        self.engine, self.adapter = self._engine(), ""
        self._reference: Transformer | None = None

    def _engine(self) -> Engine:
        settings = self._recipe.engine
        dtype = torch.float32 if settings.precision == "fp32" else torch.bfloat16
        quantize: Literal["int8", ""] = "int8" if settings.precision == "int8" else ""
        return Engine(
            self.model, self.tokenizer, self.chat_format, name="policy", max_batch=settings.max_batch, dtype=dtype, quantize=quantize
        )

    def refresh(self) -> None:
        """Let the engine see the weights as they are now. Beside an adapter they never change."""
        if self._lora is None:
            self.engine.refresh()
            return
        if self.adapter:
            self.engine.remove_adapter(self.adapter)
        self.adapter = "trained"
        self.engine.add_adapter(self.adapter, Adapter(lora_config(self._lora), adapter_parts(self.model), str(self._start)))

    def with_reference(self, rollouts: list[Rollout], *, precision: str, micro_batch_tokens: int) -> list[Rollout]:
        """The rollouts with the log-probabilities of the model that the run starts from: with an adapter, of the model without it."""
        with ExitStack() as stack:
            model = self.model
            if self._lora is not None:
                stack.enter_context(adapters_disabled())
            else:
                self._reference = model = self._reference or load_model(self._start)[0].to(self.device)
            return with_logprobs(model, rollouts, "reference", precision=precision, micro_batch_tokens=micro_batch_tokens)

    def save(self, folder: Path) -> None:
        """Write the model to `folder/model`, and an adapter, which is merged there, to `folder/adapter`; see `take_saved`."""
        if self._lora is None:
            save_model(self.model, with_template_of(self.chat_format, self.tokenizer), folder / MODEL)
            return
        save_adapter(self.model, lora_config(self._lora), folder / ADAPTER, base=self._start, base_dtype=self._lora.base)
        merge_folder(folder / ADAPTER, folder / MODEL)

    def take_saved(self, folder: Path) -> None:
        """Answer as the model does that `save` has written: an adapter is merged there."""
        if self._lora is not None:
            self.model = load_model(folder / MODEL)[0].to(self.device)
            self.engine, self.adapter = self._engine(), ""
