"""Calibration text of a compression: the parent's own answers at temperature 1 to the prompts that it serves, or documents.

A model is distilled on text of its use, or it forgets that first.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gristmill.core.errors import InputError
from gristmill.core.progress import Progress
from gristmill.data.rows import Prompt
from gristmill.data.tokenizer import Tokenizer
from gristmill.engine.engine import Engine
from gristmill.generation.api import Request, SamplingParams
from gristmill.runs.journal import Journal
from gristmill.train.batches import Sample
from gristmill.train.objectives.next_token import token_samples
from gristmill.workflows.alignment.source import normalize_prompt
from gristmill.workflows.compress.recipe import Calibration
from gristmill.workflows.pretrain import read_documents

ANSWERS = "answers.jsonl"
MIN_TOKENS, MIN_TEXTS = 2000, 4  # of the calibration text, under which scores are noise
MAX_PASSES = 64  # over the prompts
AT_ONCE = 1024  # prompts that are answered together, after which tokens are counted


@dataclass(frozen=True)
class CalibrationText:
    """Samples for global distillation, those of them for blockwise distillation, and others for scores."""

    train: Sequence[Sample]
    blocks: Sequence[Sample]
    validation: Sequence[Sample]

    @staticmethod
    def of(samples: Sequence[Sample], wanted: Calibration, seed: int) -> "CalibrationText":
        """Samples shuffled and dealt out; those of one `id` (answers to one prompt) are never both trained on and scored.

        Raises:
            InputError: they are too few.
        """
        count, ids = sum(sample.num_tokens for sample in samples), list(dict.fromkeys(sample.id for sample in samples))
        if count < MIN_TOKENS or len(ids) < MIN_TEXTS:
            raise InputError(
                f"The calibration text is too short: {count:,} tokens of {len(ids)} prompts or documents. Give more: at least "
                f"{MIN_TOKENS:,} tokens of {MIN_TEXTS}."
            )
        rng = np.random.default_rng(seed)
        shuffled = [samples[i] for i in rng.permutation(len(samples))]
        num_tokens = min(wanted.validation_tokens, count // 4)
        num_held_out = min(round(num_tokens * len(samples) / count) + 1, len(ids) // 4)
        held_out = {ids[i] for i in rng.permutation(len(ids))[:num_held_out]}
        validation = [sample for sample in shuffled if sample.id in held_out]
        validation = validation[: _reaching(validation, num_tokens)]
        train = [sample for sample in shuffled if sample.id not in held_out]
        train = train[: _reaching(train, wanted.tokens)]
        return CalibrationText(train, train[: _reaching(train, wanted.block_tokens)], validation)

    @property
    def num_tokens(self) -> int:
        """Of global distillation."""
        return sum(sample.num_tokens for sample in self.train)


def _reaching(samples: Sequence[Sample], tokens: int) -> int:
    """How many of the first samples come to so many tokens."""
    sums = np.cumsum([sample.num_tokens for sample in samples])
    return min(len(samples), int(np.searchsorted(sums, tokens)) + 1)


def answer_samples(
    engine: Engine, prompts: Sequence[Prompt], wanted: Calibration, folder: Path, progress: Progress, seed: int
) -> list[Sample]:
    """The model's own answers to prompts in a random order, asked again, with other answers, until there are enough tokens. They are
    journalled.

    The `id` of each is its prompt's text.
    """
    sampling = SamplingParams(temperature=1.0, max_tokens=wanted.max_tokens)
    total = wanted.tokens + wanted.validation_tokens
    order = np.random.default_rng(seed).permutation(len(prompts)).tolist()  # the first of a file are often of one kind
    samples: list[Sample] = []
    count = 0
    with Journal(folder / ANSWERS) as journal:
        for number, start in itertools.product(range(MAX_PASSES), range(0, len(order), AT_ONCE)):
            asked = [(i, prompts[i]) for i in order[start : start + AT_ONCE]]
            requests = [Request(f"{number}-{i}-{prompt.id}", prompt.messages, sampling, seed) for i, prompt in asked]
            _answer(engine, requests, journal, progress)
            for request in requests:
                prompt_tokens = engine.chat_format.render_prompt(request.messages, engine.tokenizer)
                tokens, text = journal[request.id]["tokens"], normalize_prompt(request.messages)
                samples.append(Sample([*prompt_tokens, *tokens], [False] * len(prompt_tokens) + [True] * len(tokens), text))
                count += samples[-1].num_tokens
            if count >= total:
                break
    return samples


def _answer(engine: Engine, requests: Sequence[Request], journal: Journal, progress: Progress) -> None:
    """Journal the answers to requests. Where one is missing all are computed: in a smaller batch the last digits of sums may differ."""
    if all(request.id in journal for request in requests):
        return
    for request, outs in progress.track(engine.generate(requests), len(requests), lambda: "prompts answered"):
        if request.id not in journal:
            journal.append({"id": request.id, "tokens": outs[0].tokens})


def document_samples(path: Path, tokenizer: Tokenizer, wanted: Calibration, max_tokens: int) -> list[Sample]:
    """Documents cut into pieces of the model's context, as many as are wanted."""
    documents: list[list[int]] = []
    count = 0
    for text in read_documents(path):
        documents.append([*tokenizer.encode(text), tokenizer.eos_id])
        count += len(documents[-1])
        if count >= wanted.tokens + wanted.validation_tokens:
            break
    return [sample for sample in token_samples(documents, max_tokens) if sample.num_tokens > 1]
