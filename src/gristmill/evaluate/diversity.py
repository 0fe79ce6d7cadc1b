"""Diversity metrics and collapse monitors: is the text that a model writes losing its variety?

Each number sees one failure and misses another (repetition, or a lost tail), so they are read as a
vector. All of them depend on how much text there is: every set is first cut to the same number of tokens.

Sources: self-BLEU is 1802.01886; distinct-n is 1510.03055; that tails vanish first is 2305.17493.
"""

import gzip
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain

from gristmill.core.errors import InputError

Tokenize = Callable[[str], list[int]]

BLEU_TEXTS = 100  # texts that are scored; they are compared with all texts
BLEU_ORDER = 4
RARE_COUNTS = (2, 3)  # a type seen once may be a slip; one seen more often is not rare

# How far a monitor may move from its first measurement. Below 1: alarm when it falls below this multiple of
# the first value. Above 1: alarm when it rises above this multiple. Names in `POINTS`: alarm when it rises by
# more than this many points.
LEVELS: dict[str, float] = {
    "distinct_4": 0.7,  # falls: the same phrases again and again
    "self_bleu": 25.0,  # rises: the texts copy each other
    "compression": 1.5,  # rises: the texts repeat themselves or each other
    "rare_types": 0.5,  # falls: the tail is gone
    "human_nll": 1.5,  # nats a token of human texts held out, under the model; rises: forgotten
    "base_nll": 0.5,  # nats a token of its samples under Base; falls: only the likeliest is left
}
POINTS = frozenset({"self_bleu"})


def measure(texts: Sequence[str], tokenize: Tokenize, budget: int, *, reference: Sequence[str]) -> dict[str, float]:
    """Compute all diversity metrics of `texts`.

    Args:
        texts: samples of a model, in an order shuffled by seed: only the first `budget` tokens count.
        tokenize: text to ids; types and n-grams are of these ids.
        budget: tokens that each text set is cut to. When either has fewer, both are cut to that.
        reference: what people wrote, in an order shuffled by seed.

    Returns:
        distinct_4: different 4-grams over all 4-grams; n-grams never cross from one text to the next.
        self_bleu: 0 to 100, mean BLEU-4 of up to `BLEU_TEXTS` whole texts against all others; 0 when there
            are fewer than two.
        compression: bytes over bytes after gzip.
        rare_types: share of the reference's rare types (seen 2 or 3 times) that `texts` still use.
        tokens: tokens of each set that were used. Compare measurements only where this is alike.
        Where there is nothing to count a value is 0, so that a model that has gone silent alarms.

    Raises:
        InputError: the budget is not positive or the reference is empty.
    """
    if budget < 1:
        raise InputError(f"The token budget of the collapse monitors must be at least 1, got {budget}.")
    whole, whole_reference = _encode(texts, tokenize, budget), _encode(reference, tokenize, budget)
    if not any(whole_reference):
        raise InputError("The collapse monitors have no reference text: give answers that people wrote.")
    tokens = min(budget, _total(whole), _total(whole_reference))
    ids = _cut(whole, tokens)
    complete = len(ids) if not ids or len(ids[-1]) == len(whole[len(ids) - 1]) else len(ids) - 1
    partial = [_beginning(texts[complete], tokenize, len(t)) for t in ids[complete:]]
    return {
        "distinct_4": distinct(ids, 4),
        "self_bleu": self_bleu(ids[:complete]),
        "compression": compression([*texts[:complete], *partial]),
        "rare_types": rare_types(ids, _cut(whole_reference, tokens)),
        "tokens": float(tokens),
    }


def alarms(now: dict[str, float], first: dict[str, float], levels: dict[str, float] = LEVELS) -> list[str]:
    """Names of the monitors that have moved past their level since the first measurement.

    A monitor that either measurement lacks is skipped. One that is not a number (a diverged model) alarms.

    Args:
        now: values by name, as `measure` returns them, and the two likelihoods.
        first: the same of the first measurement.
        levels: see `LEVELS`.
    """
    out = []
    for name, level in levels.items():
        if name not in now or name not in first:
            continue
        if name in POINTS:
            fine = now[name] <= first[name] + level
        elif level < 1:
            fine = now[name] >= first[name] * level
        else:
            fine = now[name] <= first[name] * level
        if not fine:
            out.append(name)
    return out


def distinct(ids: Sequence[Sequence[int]], order: int) -> float:
    """Different n-grams over all n-grams, 0 when there is none."""
    counts = Counter(chain.from_iterable(_ngrams(t, order) for t in ids))
    return len(counts) / counts.total() if counts else 0.0


def compression(texts: Sequence[str]) -> float:
    """Bytes over gzip bytes of the texts, one a line; 0 when they are empty."""
    data = "\n".join(texts).encode()
    return len(data) / len(gzip.compress(data, mtime=0)) if data else 0.0


def rare_types(ids: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> float:
    """Share of the types seen 2 or 3 times in `reference` that `ids` use, 0 when there is none."""
    rare = {t for t, n in Counter(chain.from_iterable(reference)).items() if n in RARE_COUNTS}
    return len(rare.intersection(chain.from_iterable(ids))) / len(rare) if rare else 0.0


def self_bleu(ids: Sequence[Sequence[int]]) -> float:
    """Mean BLEU-4 (0 to 100) of the first `BLEU_TEXTS` texts, each against all the others.

    Not smoothed: a text that shares no 4-gram with another scores 0. A text of fewer than four tokens is
    scored on the n-grams it has. Empty texts do not count.

    An n-gram's count is clipped at its highest count in any other text. One table of the highest count, who
    has it, and the second-highest answers that for every text at once.
    """
    kept = [t for t in ids if t]
    if len(kept) < 2:
        return 0.0
    best: dict[tuple[int, ...], tuple[int, int, int]] = {}  # highest, whose it is, second-highest
    counts = [_all_ngrams(t) for t in kept]
    for i, grams in enumerate(counts):
        for gram, n in grams.items():
            top, owner, second = best.get(gram, (0, -1, 0))
            best[gram] = (n, i, top) if n > top else (top, owner, max(second, n))
    lengths = sorted(len(t) for t in kept)
    scores = []
    for i in range(min(BLEU_TEXTS, len(kept))):
        matched = [0] * (BLEU_ORDER + 1)
        for gram, n in counts[i].items():
            top, owner, second = best[gram]
            matched[len(gram)] += min(n, second if owner == i else top)
        scores.append(_bleu(matched, len(kept[i]), _closest(lengths, len(kept[i]))))
    return 100 * sum(scores) / len(scores)


def _bleu(matched: Sequence[int], length: int, closest: int) -> float:
    """BLEU of one text from its clipped matches by order, its length and the nearest length of the others."""
    orders = range(1, min(BLEU_ORDER, length) + 1)
    if any(matched[order] == 0 for order in orders):
        return 0.0
    precision = sum(math.log(matched[order] / (length - order + 1)) for order in orders) / len(orders)
    return math.exp(precision + min(0.0, 1 - closest / length))


def _closest(lengths: Sequence[int], length: int) -> int:
    """The nearest length in a sorted list without one entry of `length` itself; the shorter of a tie."""
    at = bisect_left(lengths, length)
    near = [lengths[i] for i in (at - 1, at + 1) if 0 <= i < len(lengths)]
    return min(near, key=lambda other: (abs(other - length), other))


def _ngrams(ids: Sequence[int], order: int) -> "zip[tuple[int, ...]]":
    return zip(*(ids[i:] for i in range(order)), strict=False)


def _all_ngrams(ids: Sequence[int]) -> Counter[tuple[int, ...]]:
    return Counter(chain.from_iterable(_ngrams(ids, order) for order in range(1, BLEU_ORDER + 1)))


def _encode(texts: Sequence[str], tokenize: Tokenize, budget: int) -> list[list[int]]:
    """Ids of the first texts, up to the one that reaches the budget."""
    out: list[list[int]] = []
    total = 0
    for text in texts:
        if total >= budget:
            break
        out.append(tokenize(text))
        total += len(out[-1])
    return out


def _cut(ids: Sequence[list[int]], budget: int) -> list[list[int]]:
    """The first `budget` tokens; the last text may be cut short, later ones are left out."""
    out: list[list[int]] = []
    for text in ids:
        if budget <= 0:
            break
        out.append(text[:budget])
        budget -= len(out[-1])
    return out


def _beginning(text: str, tokenize: Tokenize, max_tokens: int) -> str:
    """The longest beginning of a text that has no more than `max_tokens` tokens, for a text that has more."""
    return text[: bisect_left(range(len(text)), True, key=lambda n: len(tokenize(text[:n])) > max_tokens) - 1]


def _total(ids: Sequence[Sequence[int]]) -> int:
    return sum(len(t) for t in ids)
