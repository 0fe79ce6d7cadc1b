"""Quality classifier: logistic regression on hashed word unigrams and bigrams, trained from files that are good and files that are not.

Shapes: N documents, F buckets of features, T tokens of one document.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numba import njit

from gristmill.core.errors import InputError
from gristmill.curate.quality.perplexity import check_tensors, is_number, read_model, write_model
from gristmill.curate.text.text_column import TextColumn, longest, read_only
from gristmill.curate.text.words import BYTES_AND_MARKS, FNV_OFFSET, buffers, tokenize
from gristmill.data.minhash import GOLDEN, mix64


@njit(cache=True, nogil=True)
def _features(data_B, begin, end, table, mask, buffers, out):  # type: ignore[no-untyped-def]
    """Places (int64) of the tokens and the pairs of tokens of one text among the weights; their number."""
    tokens_T, start_T, stop_T = buffers
    count, total, last = tokenize(data_B, begin, end, table, FNV_OFFSET, tokens_T, start_T, stop_T), 0, np.uint64(0)
    for t in range(count):
        token = tokens_T[t]
        out[total] = np.int64(token & mask)
        total += 1
        if t:
            out[total] = np.int64(mix64(last * GOLDEN + token) & mask)
            total += 1
        last = token
    return total


@njit(cache=True, nogil=True)
def _logits(data_B, begin_N, table, weights_F, bias, out_N):  # type: ignore[no-untyped-def]
    room, places = buffers(begin_N), np.empty(2 * longest(begin_N), np.int64)
    for n in range(len(begin_N) - 1):
        count = _features(data_B, begin_N[n], begin_N[n + 1], table, np.uint64(len(weights_F) - 1), room, places)
        total = 0.0
        for k in range(count):
            total += weights_F[places[k]]
        out_N[n] = bias + (total / count if count else 0.0)


@njit(cache=True, nogil=True)
def _epoch(data_B, begin_N, table, order, labels_N, rate, weights_F, squares_F, bias):  # type: ignore[no-untyped-def]
    """AdaGrad on the logistic loss, one text at a time. Args: `bias`, float64 [2], the bias and the sum of its squared gradients."""
    room, places = buffers(begin_N), np.empty(2 * longest(begin_N), np.int64)
    for n in order:
        count = _features(data_B, begin_N[n], begin_N[n + 1], table, np.uint64(len(weights_F) - 1), room, places)
        total = 0.0
        for k in range(count):
            total += weights_F[places[k]]
        logit = bias[0] + (total / count if count else 0.0)
        error = 1.0 / (1.0 + np.exp(-min(max(logit, -30.0), 30.0))) - labels_N[n]
        bias[1] += error * error
        bias[0] -= rate * error / np.sqrt(bias[1] + 1e-12)
        if count:
            step = np.float32(error / count)
            for k in range(count):  # a feature that occurs twice is moved twice
                f = places[k]
                squares_F[f] += step * step
                weights_F[f] -= np.float32(rate) * step / np.sqrt(squares_F[f] + np.float32(1e-20))


@dataclass(frozen=True)
class Classifier:
    """A logistic regression on hashed tokens and pairs of them, each counted as its share of all.

    Attributes:
        weights_F: float32.
        settings: of training, and what it measured; `bias` among them.
    """

    weights_F: np.ndarray
    settings: dict[str, Any]

    def logits(self, texts: TextColumn) -> np.ndarray:
        """float64 [N]."""
        out_N = np.empty(len(texts), np.float64)
        _logits(
            read_only(texts.data_B),
            read_only(texts.begin_N),
            BYTES_AND_MARKS,
            read_only(self.weights_F),
            float(self.settings["bias"]),
            out_N,
        )
        return out_N

    def scores(self, texts: TextColumn) -> np.ndarray:
        """float32 [N]: the probability that a text is like the positive ones."""
        return _sigmoid(self.logits(texts)).astype(np.float32)


def load(folder: Path) -> Classifier:
    """A classifier that `train` wrote.

    Raises:
        InputError: the folder is missing, damaged, or holds a model of another kind.
    """
    tensors, settings = read_model(folder, "classifier")
    check_tensors(folder, tensors, {"weights_F": (np.float32, 0)})
    size = len(tensors["weights_F"])
    if size < 2 or size & (size - 1) or not is_number(settings.get("bias")):
        raise InputError(f"The folder {folder} holds a damaged classifier ({size} weights): copy it again or train it again.")
    return Classifier(tensors["weights_F"], settings)


def _sigmoid(logits_N: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-np.clip(logits_N, -500.0, 500.0)))


def area(scores_N: np.ndarray, labels_N: np.ndarray) -> float | None:
    """Area under the ROC curve: how often a positive scores above a negative, a tie being half; None without one of either."""
    _, place, counts = np.unique(scores_N, return_inverse=True, return_counts=True)
    ranks_N = (np.cumsum(counts) - (counts - 1) / 2)[place]
    positives = int(labels_N.sum())
    pairs = positives * (len(labels_N) - positives)
    return (float(ranks_N[labels_N].sum()) - positives * (positives + 1) / 2) / pairs if pairs else None


def calibration_error(scores_N: np.ndarray, labels_N: np.ndarray, bins: int = 10) -> float | None:
    """Mean distance of score and share of positives, over bins of equal width, by documents (Guo et al. 2017); None without documents."""
    if not len(scores_N):
        return None
    bin_N = np.minimum((scores_N * bins).astype(np.int64), bins - 1)
    return float(np.abs(np.bincount(bin_N, scores_N - labels_N, bins)).sum() / len(scores_N))


def _platt(logits_N: np.ndarray, labels_N: np.ndarray) -> tuple[float, float]:
    """Scale and shift of the logits that make them probabilities (Platt 1999), by Newton's method; 1 and 0 where they cannot be found."""
    positives = int(labels_N.sum())
    negatives = len(labels_N) - positives
    if min(positives, negatives) < 10:
        return 1.0, 0.0
    # Platt's targets keep the scale finite where the classes are wholly apart
    targets_N = np.where(labels_N, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    spread = float(logits_N.std()) or 1.0
    inputs = np.stack([(logits_N - logits_N.mean()) / spread, np.ones(len(logits_N))])
    found = np.array([0.0, np.log(positives / negatives)])
    for _ in range(50):
        scores_N = _sigmoid(found @ inputs)
        curvature = (inputs * (scores_N * (1 - scores_N))) @ inputs.T + 1e-6 * np.eye(2)
        move = np.linalg.solve(curvature, inputs @ (scores_N - targets_N))
        found = found - move * min(1.0, 4.0 / float(np.abs(move).max() + 1e-12))
        if np.abs(move).max() < 1e-9:
            break
    scale, shift = float(found[0]) / spread, float(found[1] - found[0] * logits_N.mean() / spread)
    return (scale, shift) if np.isfinite([scale, shift]).all() and scale > 0 else (1.0, 0.0)


def _joined(tables: Iterable[pa.Table], kind: str) -> list[pa.Array]:
    chunks = [chunk.cast(pa.large_string()) for table in tables for chunk in table["text"].chunks if len(chunk)]
    if not chunks:
        raise InputError(f"There is no {kind} document to train a classifier on: check the files.")
    return chunks


def train(
    positive: Iterable[pa.Table],
    negative: Iterable[pa.Table],
    folder: Path,
    *,
    buckets: int = 2**20,
    epochs: int = 3,
    rate: float = 2.0,
    held_out: float = 0.1,
    seed: int = 0,
) -> Classifier:
    """Train a classifier on the texts of tables and write it. All texts are held in memory.

    Args:
        buckets: weights, a power of 2.
        rate: of AdaGrad.
        held_out: share of the documents that are not trained on: half of them calibrate the scores, half are for the figures in the
            settings, `held_out_auc`, `held_out_accuracy` and `calibration_error`.

    Raises:
        InputError: one of the classes has no document, a setting is wrong, or the folder cannot be written.
    """
    if buckets < 2 or buckets & (buckets - 1) or epochs < 1 or not 0 <= held_out < 1:
        raise InputError("A classifier needs buckets that are a power of 2, an epoch or more, and a held-out share from 0 to below 1.")
    classes = [_joined(positive, "positive"), _joined(negative, "negative")]
    texts = TextColumn.of(pa.chunked_array([chunk for chunks in classes for chunk in chunks]))
    num_positive = sum(map(len, classes[0]))
    del classes
    labels_N = np.arange(len(texts)) < num_positive
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(texts))
    aside = round(len(order) * held_out)
    checked, trained = order[:aside], order[aside:]

    data_B, begin_N = read_only(texts.data_B), read_only(texts.begin_N)
    weights_F, squares_F, bias = np.zeros(buckets, np.float32), np.zeros(buckets, np.float32), np.zeros(2)
    targets_N = labels_N.astype(np.float64)
    for epoch in range(epochs):
        draw.shuffle(trained)
        slower = rate * (1 - epoch / epochs)
        _epoch(data_B, begin_N, BYTES_AND_MARKS, trained, targets_N, slower, weights_F, squares_F, bias)

    held = TextColumn.of(pa.array([str(texts.bytes_of(n), "utf-8") for n in checked.tolist()], pa.large_string()))
    logits = Classifier(weights_F, {"bias": bias[0]}).logits(held)
    half = len(checked) // 2
    scale, shift = _platt(logits[:half], labels_N[checked[:half]])
    scores, labels = _sigmoid(scale * logits[half:] + shift), labels_N[checked[half:]]
    settings = {
        "kind": "classifier",
        "bias": scale * float(bias[0]) + shift,
        "buckets": buckets,
        "epochs": epochs,
        "rate": rate,
        "held_out": held_out,
        "seed": seed,
        "positive_documents": num_positive,
        "negative_documents": len(texts) - num_positive,
        "bytes": int(texts.sizes_N.sum()),
        "held_out_documents": len(labels),
        "held_out_auc": area(scores, labels),
        "held_out_accuracy": float(((scores > 0.5) == labels).mean()) if len(labels) else None,
        "calibration_error": calibration_error(scores, labels),
    }
    classifier = Classifier(weights_F * np.float32(scale), settings)
    write_model(folder, {"weights_F": classifier.weights_F}, settings)
    return classifier
