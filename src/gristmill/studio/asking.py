"""What to ask next: which prompts people are shown, by how much their answers would teach the reward model, always beside a random part.

Strategies: random; disagreement of bootstrap reward heads on one trunk; D-optimal design on the trunk's states (Fisher information of the
last layer, arXiv 2502.04354); conflict of a verifier with the reward model. N answers, D size of a state, K heads.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gristmill.core.errors import InputError
from gristmill.data.chat import Conversation, conversation
from gristmill.data.rows import Rated
from gristmill.runs import artifacts
from gristmill.runs.reader import read_run
from gristmill.runs.stage_names import round_of
from gristmill.studio.apart import Died, Told, apart
from gristmill.studio.export import answer_texts, rows_of
from gristmill.studio.sources import Sources
from gristmill.studio.store import NewItem
from gristmill.studio.tasks import PAIR

if TYPE_CHECKING:
    from gristmill.judge.reward import RewardScorer

RANDOM, DISAGREEMENT, D_OPTIMAL, CONFLICT = "random", "disagreement", "d-optimal", "conflict"
STRATEGIES = (RANDOM, DISAGREEMENT, D_OPTIMAL, CONFLICT)
RANDOM_EVERY = 5  # of a batch: one in so many is random, so that statistics and evaluation have an unbiased part
NUM_HEADS = 5
RIDGE = 1.0
MAX_CANDIDATES = 2000  # prompts that are scored
RATED_TOGETHER = 256  # answers whose states are computed in one go, and told of
TASK_SHARE = 2.0  # times its even share that a task may have of what is chosen
Floats = NDArray[np.float64]


def choose_items(
    sources: Sources,
    name: str,
    kind: str,
    *,
    num: int,
    seed: int,
    strategy: str,
    told: Told | None = None,
    stop: Event | None = None,
) -> list[NewItem]:
    """Items of `num` prompts of a source by a strategy; each says why it was chosen.

    Args:
        told: gets how many answers the reward model has read, and of how many.
        stop: ends it, at once, when it is set.

    Raises:
        InputError: there is no such strategy, or the run has not what it needs.
        Stopped: by `stop`.
    """
    if strategy not in STRATEGIES:
        raise InputError(f"Items are chosen by {', '.join(STRATEGIES)}.")
    if strategy == RANDOM:
        return sources.choose_items(name, kind, num=num, seed=seed)
    items = sources.choose_items(name, kind, num=max(num, MAX_CANDIDATES), seed=seed)
    rows = [rows_of(sources, {"places": item.places, "row_ids": item.row_ids}) or [] for item in items]
    groups: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        groups.setdefault(item.prompt, []).append(place)
    prompts = list(groups.values())
    tasks = [items[group[0]].task for group in prompts]
    if strategy == CONFLICT:
        gains = conflicts([row[0].get("facts", {}) if row else {} for row in rows])
        best = [max(gains[i] for i in group) for group in prompts]
        order = [place for place in ranked(best) if best[place] > -np.inf]
        if not order:
            raise InputError(f"No answer in {name} has both a reward model's score and a verifier's verdict: choose another strategy.")
    else:
        if told is not None:
            told(0, len(items))  # until it is known how many rated ones there are too
        rated = _rated(sources) if strategy == DISAGREEMENT else []
        talks, places = _talks(kind, rows)
        states_ND = scaled(states_of(reward_folder(sources.folder), [*talks, *(r.messages for r in rated)], told=told, stop=stop))
        features, rated_ND = _features(states_ND, places), states_ND[len(talks) :]
        if strategy == DISAGREEMENT:
            heads = bootstrap_heads(rated_ND, label_of(rated), num=NUM_HEADS, seed=seed)
            spread = disagreement(features, heads)
            order = ranked([float(spread[group].max()) for group in prompts])
        else:
            order = d_optimal([features[group] for group in prompts], num=num)
    batch = mixed(order, tasks, num=num, seed=seed)
    return [replace(items[i], why=strategy if chosen else RANDOM) for place, chosen in batch for i in prompts[place]]


def mixed(order: Sequence[int], tasks: Sequence[str], *, num: int, seed: int) -> list[tuple[int, bool]]:
    """A batch of prompts: one in five at random, the others in the order of a strategy, none twice, no task more than twice its share.

    Args:
        order: numbers of the prompts that the strategy has a view of, the best first.
        tasks: of all prompts.

    Returns:
        numbers of prompts, and whether the strategy chose them.
    """
    most = ceil(TASK_SHARE * num / max(1, len(set(tasks))))
    random = [int(i) for i in np.random.default_rng(seed).permutation(len(tasks))]
    chosen, taken, counts = list(order), set[int](), Counter[str]()
    out: list[tuple[int, bool]] = []
    while len(out) < min(num, len(tasks)):
        at_random = len(out) % RANDOM_EVERY == 0
        free = (i for i in (random if at_random else chosen) if i not in taken)
        place = next((i for i in free if at_random or counts[tasks[i]] < most), None)
        if place is None:  # what is left are tasks that have enough
            at_random, place = True, next(i for i in random if i not in taken)
        taken.add(place)
        counts[tasks[place]] += not at_random
        out.append((place, not at_random))
    return out


def ranked(gains: Sequence[float]) -> list[int]:
    """Numbers by their gains, the largest first, equals as they stand."""
    return sorted(range(len(gains)), key=lambda i: -gains[i])


def bootstrap_heads(states_ND: Floats, labels_N: Floats, *, num: int, seed: int) -> Floats:
    """Ridge regression heads (K, D) on bootstraps of rated answers. What they are compared by needs no bias."""
    rng, labels_N = np.random.default_rng(seed), labels_N - labels_N.mean()
    drawn = (rng.integers(0, len(states_ND), len(states_ND)) for _ in range(num))
    return np.stack([ridge(states_ND[rows], labels_N[rows]) for rows in drawn])


def ridge(x_ND: Floats, y_N: Floats) -> Floats:
    """Ridge regression weights of one head."""
    return np.asarray(np.linalg.solve(x_ND.T @ x_ND + RIDGE * np.eye(x_ND.shape[1]), x_ND.T @ y_N))


def disagreement(features_ND: Floats, heads_KD: Floats) -> Floats:
    """Variance of the heads' predictions, (N,)."""
    return np.asarray((features_ND @ heads_KD.T).var(1))


def d_optimal(groups: Sequence[Floats], *, num: int) -> list[int]:
    """Prompts in the order of a greedy D-optimal design: each adds most to log det(l I + sum x x'), given those before it.

    Args:
        groups: states of each prompt's answers.

    Returns:
        the first `num` numbers by gain, and all others behind them.
    """
    x_GD = np.stack([group.mean(0) for group in groups])
    inverse_DD = np.eye(x_GD.shape[1]) / RIDGE
    gains_G = np.einsum("gd,de,ge->g", x_GD, inverse_DD, x_GD)
    left, order = np.ones(len(x_GD), bool), []
    for _ in range(min(num, len(x_GD))):
        best = int(np.argmax(np.where(left, gains_G, -np.inf)))
        order.append(best)
        left[best] = False
        v_D = inverse_DD @ x_GD[best]
        scale = 1 + x_GD[best] @ v_D
        inverse_DD -= np.outer(v_D, v_D) / scale
        gains_G -= (x_GD @ v_D) ** 2 / scale
    return order + np.flatnonzero(left).tolist()


def conflicts(facts: Sequence[Mapping[str, Any]]) -> list[float]:
    """How far reward scores speak against what a verifier found, task by task; -inf where one of the two is silent."""
    scores: dict[str, list[float]] = {}
    for one in facts:
        if isinstance(one.get("score"), int | float):
            scores.setdefault(str(one.get("task")), []).append(float(one["score"]))
    out = []
    for one in facts:
        if not isinstance(one.get("verified"), bool) or not isinstance(one.get("score"), int | float):
            out.append(-np.inf)
            continue
        of_task = scores[str(one.get("task"))]
        z = (one["score"] - float(np.mean(of_task))) / (float(np.std(of_task)) or 1.0)
        out.append(float(-z if one["verified"] else z))
    return out


# ---- states of answers, by the run's reward model ----


def _talks(kind: str, rows: Sequence[Sequence[dict[str, Any]]]) -> tuple[list[Conversation], list[list[int]]]:
    """Conversations whose states are needed, and the numbers of each item's among them: none where its rows are gone."""
    talks: list[Conversation] = []
    places: list[list[int]] = []
    for row in rows:
        answers = answer_texts(row)[: 2 if kind == PAIR else 1]
        places.append(list(range(len(talks), len(talks) + len(answers))))
        talks += [conversation([*row[0]["messages"], {"role": "assistant", "content": text}]) for text in answers]
    return talks, places


def _features(states_ND: Floats, places: Sequence[Sequence[int]]) -> Floats:
    """A state an item: of two answers the difference of theirs; zeros where the rows are gone."""
    features_ND = np.zeros((len(places), states_ND.shape[1]))
    for item, here in enumerate(places):
        if here:
            features_ND[item] = states_ND[here[0]] - (states_ND[here[1]] if len(here) == 2 else 0)
    return features_ND


def _rated(sources: Sources) -> list[Rated]:
    """The answers that people have rated before the run."""
    data = read_run(sources.folder)
    stages = data.stages_with(artifacts.RATINGS)
    rated = [r for r in data.read(stages[0]["folder"], artifacts.RATINGS) if None not in r.labels[:2]] if stages else []
    if len(rated) < NUM_HEADS:
        raise InputError("This run has too few rated answers for heads that could disagree: choose another strategy.")
    return rated


def label_of(rated: Sequence[Rated]) -> Floats:
    """One number a rated answer: the mean of helpfulness and correctness."""
    return np.array([sum(label or 0.0 for label in r.labels[:2]) / 2 for r in rated])


def scaled(states_ND: Floats) -> Floats:
    """States of mean 0 and of length about 1."""
    return np.asarray((states_ND - states_ND.mean(0)) / (states_ND.std(0) + 1e-6) / np.sqrt(states_ND.shape[1]))


def reward_folder(run: Path) -> Path:
    """The reward model of a run's last round that trained one.

    Raises:
        InputError: it has none.
    """
    found = {path.parents[1].name.partition("-")[2]: path.parent for path in run.glob("*-reward/model/config.json")}
    if not found:
        raise InputError("This run has trained no reward model: choose random, or conflict.")
    return found[max(found, key=round_of)]


def states_of(model: Path, talks: Sequence[Conversation], *, told: Told | None = None, stop: Event | None = None) -> Floats:
    """States (N, D) of the answers that conversations end with, computed in a process of its own.

    Args:
        told: gets how many there are so far, and of how many.
        stop: ends the process when it is set.
    """
    try:
        return np.asarray(apart(_states, model, list(talks), told=told, stop=stop), float)
    except Died as e:
        raise InputError(f"The states of {len(talks):,} answers could not be computed: is there memory for {model}?") from e


def _states(tell: Told, model: Path, talks: list[Conversation]) -> list[list[float]]:
    from gristmill.core.device import pick_device, pick_precision
    from gristmill.judge.reward import load_scorer

    tell(0, len(talks))
    scorer = load_scorer(model, dtype=pick_precision(pick_device("auto")))  # it ranks prompts: the faster type will do
    out: list[list[float]] = []
    for begin in range(0, len(talks), RATED_TOGETHER):
        out += _states_of_some(scorer, talks[begin : begin + RATED_TOGETHER])
        tell(len(out), len(talks))
    return out


def _states_of_some(scorer: "RewardScorer", talks: list[Conversation]) -> list[list[float]]:
    """Zeros where the model's context has no room."""
    try:
        return scorer.states(talks)
    except InputError:
        fits = [scorer.fits(talk) for talk in talks]
        found = iter(scorer.states([talk for talk, fit in zip(talks, fits, strict=True) if fit]))
        return [next(found) if fit else [0.0] * scorer.model.backbone.config.hidden_size for fit in fits]
