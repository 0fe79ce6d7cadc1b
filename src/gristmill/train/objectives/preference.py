"""Preference optimisation: DPO, cDPO, IPO and the three distances of RPO, each with an SFT term.

Shape legend: see batches.py. Source: Nemotron-4 340B report, section 3.3.2, and NeMo-Aligner's preference
losses.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gristmill.core.errors import InputError
from gristmill.core.tensors import write_tensors
from gristmill.core.threads import num_workers, workers
from gristmill.data.chat import Message
from gristmill.data.chat_format import ChatFormat
from gristmill.data.rows import Pair
from gristmill.data.tokenizer import Tokenizer
from gristmill.model.compiled_blocks import unchanged
from gristmill.model.lora import adapters_disabled
from gristmill.model.transformer import Transformer
from gristmill.train.batches import (
    PairBatch,
    PairSample,
    Sample,
    collate_pairs,
    fills,
    fingerprint_samples,
    split_micro_batches,
)
from gristmill.train.checkpoint import fingerprint_model, fingerprint_text
from gristmill.train.data import check_vocabulary
from gristmill.train.losses import preference_loss, preference_name, token_logprobs
from gristmill.train.metrics import LossOutput
from gristmill.train.trainer import compute_precision

LOGPROBS = ("sum", "mean")


@dataclass(frozen=True)
class PreferenceObjective:
    """The mean over pairs of ``preference_loss`` - ``sft_weight`` * log pi(chosen), for ``train``.

    ``logprobs`` says whether the log-probability of a response is the "sum" over its tokens (the report's,
    and what its betas are for) or their "mean"; the SFT term follows the same choice. ``beta`` scales the
    policy's margin, ``eta`` the reward gap of the RPO losses; ``label_smoothing`` is cDPO's share of flips.
    """

    loss: str = "dpo"
    beta: float = 0.1
    eta: float = 1.0
    label_smoothing: float = 0.0
    sft_weight: float = 0.0
    logprobs: str = "sum"

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss", preference_name(self.loss))
        if self.logprobs not in LOGPROBS:
            raise InputError(f"logprobs is {self.logprobs!r}; choose one of {', '.join(LOGPROBS)}")
        if not self.beta > 0:
            raise InputError(f"beta is {self.beta}; it must be above zero")
        if not 0 <= self.label_smoothing < 0.5:
            raise InputError(f"label_smoothing is {self.label_smoothing}; it must be at least 0 and below 0.5")

    def __call__(self, model: Transformer, batch: PairBatch) -> LossOutput:
        """Sum over the batch's pairs. Their references must be there: see ``compute_reference_logprobs``."""
        if batch.reference_P2 is None:
            raise InputError("pairs have no reference log-probabilities; run compute_reference_logprobs on them first")
        policy_P2 = response_logprobs(model, batch).view(-1, 2)
        reference_P2 = batch.reference_P2
        if self.logprobs == "mean":
            lengths_P2 = batch.lengths_N.view(-1, 2)
            policy_P2, reference_P2 = policy_P2 / lengths_P2, reference_P2 / lengths_P2
        ratio_P2 = policy_P2 - reference_P2
        margin_P = ratio_P2[:, 0] - ratio_P2[:, 1]
        gap_P = batch.rewards_P2[:, 0] - batch.rewards_P2[:, 1]
        loss_P = preference_loss(self.loss, margin_P, gap_P, beta=self.beta, eta=self.eta, label_smoothing=self.label_smoothing)
        total = (loss_P - self.sft_weight * policy_P2[:, 0]).sum()
        with torch.no_grad():
            # a margin of exactly 0, where training starts, is half right: that is what a coin would score
            correct_P = (margin_P > 0).float() + 0.5 * (margin_P == 0).float()
            metrics = {
                "preference_loss": loss_P,
                "accuracy": correct_P,
                "margin": margin_P,
                "chosen_logprob": policy_P2[:, 0],
                "rejected_logprob": policy_P2[:, 1],
            }
            sums = {name: (value_P.detach().sum(), float(batch.count)) for name, value_P in metrics.items()}
        return LossOutput(total, batch.count, sums)


def response_logprobs(model: Transformer, batch: PairBatch) -> Tensor:
    """log pi(response | prompt), summed over the response's tokens, of each document: (N,) in fp32.

    Policy and reference both come from here, so that their ratio is 1 when they are one model.
    """
    tokens = batch.tokens
    hidden_RD = model.hidden(tokens.ids_T, tokens.shape, tokens.rows_R)
    logprobs_R = token_logprobs(hidden_RD, model.unembedding(), tokens.targets_R, cap=model.config.logits_soft_cap)
    return logprobs_R.new_zeros(len(batch.lengths_N)).index_add(0, batch.documents_R, logprobs_R)


@torch.no_grad()
def compute_reference_logprobs(
    model: Transformer,
    pairs: Sequence[PairSample],
    cache_folder: Path | None = None,
    *,
    precision: str = "fp32",
    micro_batch_tokens: int = 8192,
) -> list[PairSample]:
    """The pairs with ``model``'s log-probabilities of both responses filled in; a model with adapters has its base as reference.

    Use the precision of the training that follows. With a ``cache_folder`` they are computed once and read
    back whenever model, pairs and settings are the same; the file's name is the fingerprint of all three.
    """
    bare = [replace(pair, ref_chosen=None, ref_rejected=None) for pair in pairs]
    if not bare:
        return []
    check_vocabulary(model, bare)
    path = None
    if cache_folder is not None:
        key = f"{fingerprint_model(model)} {fingerprint_samples(bare)} {precision} {micro_batch_tokens}"
        path = cache_folder / f"reference-{fingerprint_text(key)}.safetensors"
        cached_P2 = _read_cache(path, len(bare))
        if cached_P2 is not None:
            return _with_references(bare, cached_P2)
    device = next(model.parameters()).device
    reference_P2 = torch.empty(len(bare), 2)
    position = {id(pair): index for index, pair in enumerate(bare)}
    was_training = model.training
    model.eval()
    count = num_workers(model)
    groups, fill = split_micro_batches(bare, micro_batch_tokens, count), fills(device, precision, count)
    with workers(count) as each, compute_precision(model, precision), unchanged(model, each):
        # gradients are switched off by thread, and so are adapters
        score = adapters_disabled()(torch.no_grad()(lambda group: response_logprobs(model, collate_pairs(group, device, fill=fill))))
        logprobs = each(score, groups)
    for group, logprobs_D in zip(groups, logprobs, strict=True):
        reference_P2[[position[id(pair)] for pair in group]] = logprobs_D.view(-1, 2).cpu()
    model.train(was_training)
    if path is not None:
        write_tensors(path, {"reference_P2": reference_P2})
    return _with_references(bare, reference_P2)


def _read_cache(path: Path, num_pairs: int) -> Tensor | None:
    """What an earlier run wrote; None where nothing can be read, so that it is computed anew."""
    if not path.exists():
        return None
    try:
        reference_P2 = load_file(path)["reference_P2"].clone()
    except (SafetensorError, KeyError, OSError):
        return None
    return reference_P2 if reference_P2.shape == (num_pairs, 2) else None


def _with_references(pairs: Sequence[PairSample], reference_P2: Tensor) -> list[PairSample]:
    values = reference_P2.tolist()
    return [replace(pair, ref_chosen=chosen, ref_rejected=rejected) for pair, (chosen, rejected) in zip(pairs, values, strict=True)]


def pair_samples(pairs: Iterable[Pair], chat_format: ChatFormat, tokenizer: Tokenizer) -> list[PairSample]:
    """Samples of preference rows. Only the compared answer is masked in, not the assistant's earlier turns; a cut-off one has no end.

    Raises InputError, naming the row, when its conversation cannot be rendered or both answers are the same.
    """
    samples = []
    for pair in pairs:
        if pair.chosen == pair.rejected:
            raise InputError(f"pair {pair.id} has the same answer on both sides; leave it out")
        try:
            context = [replace(message, trained=False) for message in pair.messages]
            chosen, rejected = (
                _response_sample([*context, Message("assistant", text)], chat_format, tokenizer, finished)
                for text, finished in ((pair.chosen, pair.chosen_finished), (pair.rejected, pair.rejected_finished))
            )
        except InputError as error:
            raise InputError(f"pair {pair.id}: {error}") from error
        if np.array_equal(chosen.ids, rejected.ids):
            raise InputError(f"pair {pair.id} has the same tokens on both sides, since the tokenizer sees no difference; leave it out")
        samples.append(PairSample(chosen, rejected, chosen_reward=pair.chosen_reward, rejected_reward=pair.rejected_reward, id=pair.id))
    return samples


def _response_sample(messages: Sequence[Message], chat_format: ChatFormat, tokenizer: Tokenizer, finished: bool) -> Sample:
    rendered = chat_format.render(messages, tokenizer, ended=finished)
    return Sample(rendered.ids, rendered.mask)
