"""Packed batches: samples laid end to end without a batch axis, and micro-batches.

A batch lays its documents end to end in one ``ids_T`` vector, token-major; every objective trains on it. Shape legend:

    T  tokens of a batch          R  rows of the hidden states that predict a trained target
    N  documents of a batch       P  preference pairs (N = 2 P: chosen 0, rejected 0, chosen 1, ...)
    5  attributes of a rating
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from itertools import cycle, zip_longest
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from gristmill.core.errors import InputError
from gristmill.model.packed import PackedShape, num_shared, pack

# Answers to one prompt that go through the model together. Attention repeats the prompt for each of them on some back-ends, and adds
# their gradients up in the type of the computation.
MAX_ANSWERS = 16
IGNORE_LABEL = -100.0  # a label with this value is absent; the value NeMo-Aligner's regression data uses


@dataclass
class Sample:
    """One document; ``mask[i]`` says that token i is a trained target (of the first, nothing can predict it).

    ``ids`` and ``mask`` may be given as lists; they are kept as int32 and bool arrays, since a Python list
    of a million tokens takes 36 MB.
    """

    ids: Sequence[int] | np.ndarray
    mask: Sequence[bool] | np.ndarray
    id: str = ""

    def __post_init__(self) -> None:
        self.ids = np.asarray(self.ids, dtype=np.int32)
        self.mask = np.asarray(self.mask, dtype=np.bool_)
        if self.ids.ndim != 1 or self.ids.shape != self.mask.shape:
            raise InputError(
                f"sample {self.id or '(no id)'} has {self.ids.size} tokens but a mask of {self.mask.size}; "
                "give one mask entry for every token"
            )

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @cached_property
    def num_targets(self) -> int:
        """Tokens that the loss is taken over."""
        return int(np.count_nonzero(np.asarray(self.mask)[1:]))


@dataclass
class TaughtSample(Sample):
    """A document with its teacher's largest log-probabilities (train/top_logprobs.py).

    Attributes:
        top: of each target, a row with the fields `ids` and `logprobs`.
    """

    _: KW_ONLY
    top: np.ndarray


@dataclass
class PairSample:
    """Two responses to one prompt, the better one first.

    Each side holds prompt and response; its mask marks the response. Rewards are the r* of the report's
    section 3.3; a missing one counts as chosen 1, rejected 0, as in NeMo-Aligner. ``ref_chosen`` and
    ``ref_rejected`` are the reference model's summed log-probabilities of the responses.
    """

    chosen: Sample
    rejected: Sample
    _: KW_ONLY
    chosen_reward: float = 1.0
    rejected_reward: float = 0.0
    id: str = ""
    ref_chosen: float | None = None
    ref_rejected: float | None = None

    @cached_property
    def num_tokens(self) -> int:
        """Tokens that go through the model: what both sides begin with counts once."""
        return self.chosen.num_tokens + self.rejected.num_tokens - num_shared([self.chosen.ids, self.rejected.ids])

    @property
    def num_targets(self) -> int:
        """One loss term a pair; a pair with an empty side has none, since there is nothing to compare."""
        return int(self.chosen.num_targets > 0 and self.rejected.num_targets > 0)


@dataclass
class RatedSample:
    """A conversation and its five ratings; ``end`` indexes the end-of-turn token whose state is scored.

    Samples with the same ``prompt`` (any name but "") are answers to one prompt: see ``RatedGroup``.
    """

    ids: Sequence[int] | np.ndarray
    end: int
    labels: Sequence[float]
    _: KW_ONLY
    id: str = ""
    prompt: str = ""
    num_targets: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.ids = np.asarray(self.ids, dtype=np.int32)
        self.labels = [float(label) for label in self.labels]
        if not 0 <= self.end < len(self.ids):
            raise InputError(
                f"sample {self.id or '(no id)'} is scored at token {self.end} of {len(self.ids)}; "
                "give the index of its last end-of-turn token"
            )
        self.num_targets = sum(label != IGNORE_LABEL for label in self.labels)

    @property
    def num_tokens(self) -> int:
        return len(self.ids)


@dataclass
class Rollout(Sample):
    """A sampled answer to a prompt, for policy gradients; the mask marks the tokens that the model chose, and no others.

    Rollouts with the same ``prompt`` (any name but "") go through the model together: see ``RolloutGroup``.

    Attributes:
        advantage: of the answer against the others of its group, or of each target.
        logprobs: of each target, under the policy as it sampled them.
        weight: of each target's term in the loss sum.
        num_terms: what the answer adds to the divisor of the step.
        old: of each target, its log-probability under the trainer's weights before the rollouts' first update; None: this is the first.
        reference: of each target, under the reference model.
    """

    _: KW_ONLY
    advantage: float | np.ndarray = 0.0
    logprobs: Sequence[float] | np.ndarray = ()
    prompt: str = ""
    weight: float = 1.0
    num_terms: int = 1
    old: np.ndarray | None = None
    reference: np.ndarray | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.logprobs = np.asarray(self.logprobs, dtype=np.float32)
        if len(self.logprobs) != self.num_targets:
            raise InputError(
                f"rollout {self.id or '(no id)'} has {self.num_targets} sampled tokens but {len(self.logprobs)} log-probabilities; "
                "give one for every sampled token"
            )


AnswerT = TypeVar("AnswerT", RatedSample, Rollout)


@dataclass
class _Group(Generic[AnswerT]):
    """Answers to one prompt. They go through the model together, so that it reads the prompt once."""

    answers: Sequence[AnswerT]

    @property
    def id(self) -> str:
        return self.answers[0].id

    @cached_property
    def num_tokens(self) -> int:
        """Tokens that go through the model: what all answers begin with counts once."""
        documents = [answer.ids for answer in self.answers]
        return sum(map(len, documents)) - (len(documents) - 1) * num_shared(documents)

    @property
    def num_targets(self) -> int:
        return sum(answer.num_targets for answer in self.answers)


class RatedGroup(_Group[RatedSample]):
    """Rated answers to one prompt."""


class RolloutGroup(_Group[Rollout]):
    """Rollouts of one prompt."""


AnySample = Sample | PairSample | RatedSample
# What `SampleData` gives and a step is made of.
DataItem = Sample | PairSample | RatedGroup | RolloutGroup


def group_answers(samples: Sequence[AnySample | DataItem], max_answers: int, max_tokens: float) -> list[DataItem]:
    """Rated samples of one prompt become groups, and rollouts likewise: of `max_answers` and MAX_ANSWERS at most, and of so many tokens
    where they are several.
    """
    max_answers = min(max_answers, MAX_ANSWERS)
    items: list[DataItem] = []
    latest: dict[str, int] = {}  # of each prompt its last group's place
    for sample in samples:
        if not isinstance(sample, RatedSample | Rollout):
            items.append(sample)
            continue
        kind: type[RatedGroup | RolloutGroup] = RatedGroup if isinstance(sample, RatedSample) else RolloutGroup
        if sample.prompt in latest:
            group = items[latest[sample.prompt]]
            assert isinstance(group, kind)
            larger = kind([*group.answers, sample])  # type: ignore[list-item]
            if len(larger.answers) <= max_answers and larger.num_tokens <= max_tokens:
                items[latest[sample.prompt]] = larger
                continue
        if sample.prompt:
            latest[sample.prompt] = len(items)
        items.append(kind([sample]))  # type: ignore[list-item]
    return items


def documents_of(sample: AnySample | DataItem) -> Sequence[Sample | RatedSample]:
    """The documents that a sample lays into a packed batch."""
    if isinstance(sample, PairSample):
        return sample.chosen, sample.rejected
    if isinstance(sample, RatedGroup | RolloutGroup):
        return sample.answers
    return (sample,)


@dataclass(frozen=True)
class TokenBatch:
    """Documents for next-token losses: row ``rows_R[i]`` of the states predicts token ``targets_R[i]``."""

    ids_T: Tensor
    shape: PackedShape
    num_tokens: int
    rows_R: Tensor
    targets_R: Tensor
    teacher_RK: tuple[Tensor, Tensor] | None = None  # of `TaughtSample`: tokens and their log-probabilities

    @property
    def count(self) -> int:
        """Number of loss terms: the divisor of this batch's loss sum."""
        return len(self.targets_R)


@dataclass(frozen=True)
class PairBatch:
    """Preference pairs. ``documents_R`` says to which of the N = 2 P documents a row belongs."""

    tokens: TokenBatch
    documents_R: Tensor
    lengths_N: Tensor  # trained targets of each document
    rewards_P2: Tensor  # chosen, rejected
    reference_P2: Tensor | None

    @property
    def num_tokens(self) -> int:
        return self.tokens.num_tokens

    @property
    def count(self) -> int:
        return len(self.rewards_P2)


@dataclass(frozen=True)
class RatedBatch:
    """Rated conversations. ``ends_N`` index the scored tokens in ``ids_T``."""

    ids_T: Tensor
    shape: PackedShape
    num_tokens: int
    ends_N: Tensor
    labels_N5: Tensor

    @cached_property
    def count(self) -> int:
        return int((self.labels_N5 != IGNORE_LABEL).sum())


@dataclass(frozen=True)
class RolloutBatch:
    """Rollouts. ``documents_R`` says to which of the N documents a row belongs; what is of rows is of sampled tokens, in fp32."""

    tokens: TokenBatch
    documents_R: Tensor
    lengths_N: Tensor  # sampled tokens of each document
    advantages_R: Tensor
    weights_N: Tensor
    sampler_R: Tensor
    old_R: Tensor | None
    reference_R: Tensor | None
    count: int

    @property
    def num_tokens(self) -> int:
        return self.tokens.num_tokens


class Batch(Protocol):
    """What the loop must know of a micro-batch, whatever its objective makes of it."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def count(self) -> int:
        """Number of loss terms."""
        ...


AnyBatch = TokenBatch | PairBatch | RatedBatch | RolloutBatch


def _token_batch(groups: Sequence[Sequence[Sample]], device: torch.device, fill: bool | int) -> TokenBatch:
    """Samples end to end, those of a group sharing what they begin with.

    A document's last row predicts nothing, so no target ever crosses from one document into the next.
    """
    ids_T, shape, num_tokens = pack([[sample.ids for sample in group] for group in groups], device, fill=fill)
    # a document's own first mask entry is void
    trained = [np.append(False, np.asarray(sample.mask)[1:]) for group in groups for sample in group]
    targets_R = torch.from_numpy(np.flatnonzero(np.concatenate(trained))).to(device)
    return TokenBatch(ids_T, shape, num_tokens, shape.keys_S[targets_R - 1], ids_T[shape.keys_S[targets_R]])


def collate_tokens(samples: Sequence[Sample], device: torch.device, *, fill: bool | int = True) -> TokenBatch:
    """Lay samples end to end."""
    batch = _token_batch([[sample] for sample in samples], device, fill)
    taught = [sample.top for sample in samples if isinstance(sample, TaughtSample)]
    if len(taught) < len(samples):
        return batch
    ids_RK, logprobs_RK = (torch.from_numpy(np.concatenate([top[name] for top in taught])).to(device) for name in ("ids", "logprobs"))
    return replace(batch, teacher_RK=(ids_RK.long(), logprobs_RK))


def collate_pairs(pairs: Sequence[PairSample], device: torch.device, *, fill: bool | int = True) -> PairBatch:
    """Lay pairs end to end, chosen before rejected. References are set when every pair has them."""
    sides = [(pair.chosen, pair.rejected) for pair in pairs]
    lengths = np.array([side.num_targets for both in sides for side in both])
    references = [(pair.ref_chosen, pair.ref_rejected) for pair in pairs]
    known = all(chosen is not None and rejected is not None for chosen, rejected in references)
    return PairBatch(
        tokens=_token_batch(sides, device, fill),
        documents_R=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(device),
        lengths_N=torch.from_numpy(lengths).to(device),
        rewards_P2=torch.tensor([(p.chosen_reward, p.rejected_reward) for p in pairs], device=device),
        # fp32 holds a summed log-probability of -1000 to 6e-5, which is all the model's own arithmetic gives
        reference_P2=torch.tensor(references, dtype=torch.float32, device=device) if known else None,
    )


def collate_rated(groups: Sequence[RatedGroup], device: torch.device, *, fill: bool | int = True) -> RatedBatch:
    """Lay rated conversations end to end."""
    ids_T, shape, num_tokens = pack([[answer.ids for answer in group.answers] for group in groups], device, fill=fill)
    answers = [answer for group in groups for answer in group.answers]
    ends_N = shape.keys_S[shape.cu_keys[: len(answers)] + torch.tensor([answer.end for answer in answers], device=device)]
    labels_N5 = torch.tensor([answer.labels for answer in answers], dtype=torch.float32, device=device)
    return RatedBatch(ids_T, shape, num_tokens, ends_N, labels_N5)


def collate_rollouts(groups: Sequence[RolloutGroup], device: torch.device, *, fill: bool | int = True) -> RolloutBatch:
    """Lay rollouts end to end. Old and reference log-probabilities are set when every rollout has them."""
    answers = [answer for group in groups for answer in group.answers]
    lengths = np.array([answer.num_targets for answer in answers])

    def rows(values: Sequence[np.ndarray | None]) -> Tensor | None:
        known = [value for value in values if value is not None]
        return torch.from_numpy(np.concatenate(known)).to(device, torch.float32) if len(known) == len(values) else None

    def each(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    sampler_R = rows([np.asarray(answer.logprobs) for answer in answers])
    advantages_R = rows([np.broadcast_to(np.float32(answer.advantage), answer.num_targets) for answer in answers])
    assert sampler_R is not None and advantages_R is not None
    return RolloutBatch(
        tokens=_token_batch([group.answers for group in groups], device, fill),
        documents_R=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(device),
        lengths_N=torch.from_numpy(lengths).to(device),
        advantages_R=advantages_R,
        weights_N=each([answer.weight for answer in answers]),
        sampler_R=sampler_R,
        old_R=rows([answer.old for answer in answers]),
        reference_R=rows([answer.reference for answer in answers]),
        count=sum(answer.num_terms for answer in answers),
    )


def collate(items: Sequence[DataItem], device: torch.device, *, fill: bool | int = True) -> AnyBatch:
    """Pack samples of one kind into the batch of that kind; `fill` as of `pack`."""
    first = items[0]
    if isinstance(first, RolloutGroup):
        return collate_rollouts(items, device, fill=fill)  # type: ignore[arg-type]
    if isinstance(first, Sample):
        return collate_tokens(items, device, fill=fill)  # type: ignore[arg-type]
    if isinstance(first, PairSample):
        return collate_pairs(items, device, fill=fill)  # type: ignore[arg-type]
    return collate_rated(items, device, fill=fill)  # type: ignore[arg-type]


def fills(device: torch.device, precision: str, num_workers: int) -> bool:
    """Whether to fill batches up. A large model in fp32 on a CPU pays for each token, and no code is made for a shape."""
    return device.type != "cpu" or precision != "fp32" or num_workers > 1


ItemT = TypeVar("ItemT", Sample, PairSample, RatedGroup, RolloutGroup, DataItem)


def split_micro_batches(samples: Sequence[ItemT], max_tokens: int, num_workers: int = 1) -> list[list[ItemT]]:
    """Cut the samples of one step into micro-batches, of which any ``num_workers`` neighbours hold at most ``max_tokens`` tokens.

    A longer sample gets one of its own. Sorted by length, so that the documents of a micro-batch are
    alike and attention pads little. Several workers get equal shares of long and short ones.
    """
    shares = share_out(samples, max_tokens // num_workers, num_workers)
    return [group for turn in zip_longest(*shares) for group in turn if group]


def share_out(samples: Sequence[ItemT], max_tokens: int, num_shares: int) -> list[list[list[ItemT]]]:
    """Micro-batches of at most `max_tokens` tokens for each of `num_shares` workers or processes, to which long and short samples fall
    alike.
    """
    ordered = sorted(samples, key=lambda sample: sample.num_tokens, reverse=True)
    there_and_back = [*range(num_shares), *reversed(range(num_shares))]
    shares: list[list[ItemT]] = [[] for _ in range(num_shares)]
    for sample, share in zip(ordered, cycle(there_and_back)):  # noqa: B905
        shares[share].append(sample)
    return [list(neighbours(share, max_tokens)) for share in shares]


def neighbours(samples: Sequence[ItemT], max_tokens: int) -> Iterator[list[ItemT]]:
    """Samples in their order, as many at once as have `max_tokens` tokens; a longer one alone."""
    group: list[ItemT] = []
    size = 0
    for sample in samples:
        if group and size + sample.num_tokens > max_tokens:
            yield group
            group, size = [], 0
        group.append(sample)
        size += sample.num_tokens
    if group:
        yield group


def fingerprint_samples(samples: Sequence[AnySample | DataItem]) -> str:
    """A hash of everything in the samples that training can see, in their order. 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    for sample in samples:
        documents = documents_of(sample)
        digest.update(np.int64(len(documents)).tobytes())
        for document in documents:
            digest.update(np.int64(document.num_tokens).tobytes() + np.asarray(document.ids).tobytes())
            if isinstance(document, Sample):
                digest.update(np.asarray(document.mask).tobytes())
            else:
                digest.update(np.array([document.end, *document.labels], dtype=np.float64).tobytes())
        if isinstance(sample, PairSample):
            numbers = (sample.chosen_reward, sample.rejected_reward, sample.ref_chosen, sample.ref_rejected)
            digest.update(repr(numbers).encode())
    return digest.hexdigest()
