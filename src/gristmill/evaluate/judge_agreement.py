"""Agreement of an LLM judge with people on labelled pairs (LLMBar, PandaLM, JudgeBench): accuracy, position bias, length bias, kappa."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from gristmill.core.errors import InputError
from gristmill.core.untrusted import quoted_path
from gristmill.data.chat import Conversation, Message
from gristmill.data.rows import read_records
from gristmill.evaluate.model_answers import data_files, text_of
from gristmill.evaluate.reliability import alpha_of, coincidences, kappa_of, weighted_kappa
from gristmill.evaluate.stats import accuracy, bootstrap, paired
from gristmill.judge.pairwise import Comparison, combine_verdicts, named_answer

Label = Literal["first", "second", "tie"]
LABELS: tuple[Label, ...] = ("first", "second", "tie")
PANDALM: tuple[Label, ...] = ("tie", "first", "second")  # what its people's 0, 1 and 2 mean
ANNOTATORS = ("annotator1", "annotator2", "annotator3")
JUDGEBENCH: dict[str, Label] = {"A>B": "first", "B>A": "second"}
FORMS = "LLMBar's input, output_1, output_2, label; PandaLM's instruction, response1, response2, annotator1 to 3; or JudgeBench's columns"


@dataclass(frozen=True)
class LabelledPair:
    """Two answers to one request, and what people say of them.

    Attributes:
        subset: the file's name, or the set that the row names.
        label: what most people say.
        labels: what each of them says.
    """

    id: str
    subset: str
    messages: Conversation
    first: str
    second: str
    label: Label
    labels: tuple[Label, ...]

    @property
    def comparison(self) -> Comparison:
        return Comparison(self.id, self.messages, self.first, self.second)


# ---- files ----


def read_labelled_pairs(data: Path) -> list[LabelledPair]:
    """Pairs of all files of the known forms in a folder, or of one file.

    Raises:
        InputError: no file has a known form, or a row lacks a column or has another label.
    """
    pairs: list[LabelledPair] = []
    for path in data_files(data, deep=False):
        rows = read_records(path)
        if rows and has_labels(rows[0]):
            pairs += labelled_pairs(path, rows)
    if not pairs:
        raise InputError(f"{quoted_path(data)} holds no pairs that people have judged: give {FORMS}.")
    return pairs


def has_labels(row: Mapping[str, Any]) -> bool:
    """Whether a row is a labelled pair of a known form."""
    return any(row.keys() >= set(names) for names in (("output_1", "output_2", "label"), ("response1", "annotator1"), ("pair_id", "label")))


def labelled_pairs(path: Path, rows: Sequence[Mapping[str, Any]]) -> list[LabelledPair]:
    """The labelled pairs of a file."""
    return [_pair(row, f"{path.stem}-{number}", path.stem, f"Row {number} of {quoted_path(path)}") for number, row in enumerate(rows, 1)]


def _pair(row: Mapping[str, Any], name: str, subset: str, where: str) -> LabelledPair:
    if "annotator1" in row:
        asked = text_of(row, ("instruction",), where)
        asked += f"\n\n{row['input']}" if isinstance(row.get("input"), str) and row["input"].strip() else ""
        marks = [row.get(key) for key in ANNOTATORS if row.get(key) is not None]
        if not marks or any(mark not in (0, 1, 2) for mark in marks):
            raise InputError(f"{where} has the labels {marks}: give each annotator's 0 (tie), 1 (first) or 2 (second).")
        labels = tuple(PANDALM[int(mark)] for mark in marks if mark is not None)
        answers = text_of(row, ("response1",), where), text_of(row, ("response2",), where)
        (most, num), *others = Counter(labels).most_common()
        label: Label = "tie" if others and others[0][1] == num else most
        return LabelledPair(name, subset, (Message("user", asked),), *answers, label, labels)
    if "pair_id" in row:
        asked, answers = text_of(row, ("question",), where), (text_of(row, ("response_A",), where), text_of(row, ("response_B",), where))
        found, source = JUDGEBENCH.get(str(row.get("label"))), str(row.get("source", subset)).partition("-")[0]
        name, subset = f"{subset}-{row['pair_id']}", source
    else:
        asked, answers = text_of(row, ("input",), where), (text_of(row, ("output_1",), where), text_of(row, ("output_2",), where))
        found = {1: "first", 2: "second"}.get(row["label"] if isinstance(row["label"], int) else 0)  # type: ignore[assignment]
    if found is None:
        raise InputError(f"{where} has the label {row.get('label')!r}: give 1 or 2 (LLMBar), A>B or B>A (JudgeBench).")
    return LabelledPair(name, subset, (Message("user", asked),), *answers, found, (found,))


# ---- scores ----


def agreement(pairs: Sequence[LabelledPair], replies: Mapping[str, tuple[str, str]], *, seed: int = 0) -> dict[str, Any]:
    """How far a judge agrees with people, and which habits it has.

    Args:
        replies: by pair the replies to (A = first, B = second) and to (A = second, B = first).

    Returns:
        agreement: the combined verdict is the label; of all pairs, an unreadable one being wrong; by subset, too;
        decided: the same where both orders name the same answer; single_order: of each reply alone;
        consistent: both orders name the same; first_place: share of readable replies that name the answer that stands first (.5
        without bias); length: how often the judge and people choose the longer answer where both decide; kappa, with the label;
        people: how far they agree with each other, where there are several.
    """
    verdicts = {p.id: combine_verdicts(*replies[p.id]) for p in pairs}
    named = {p.id: tuple(named_answer(reply) for reply in replies[p.id]) for p in pairs}
    readable = [p for p in pairs if verdicts[p.id] != "unparsed"]
    decided = [p for p in readable if verdicts[p.id] != "tie"]
    by_subset = {s: [p for p in pairs if p.subset == s] for s in dict.fromkeys(p.subset for p in pairs)}

    def right(part: Sequence[LabelledPair]) -> dict[str, Any]:
        return accuracy([verdicts[p.id] == p.label for p in part])

    meaning = {"A": "first", "B": "second", "C": "tie"}
    singles = [[meaning.get(name) == _seen(p.label, order) for order, name in enumerate(named[p.id])] for p in pairs]
    places = [name == "A" for p in pairs for name in named[p.id] if name in ("A", "B")]
    out: dict[str, Any] = {
        "agreement": right(pairs),
        "decided": right(decided),
        "single_order": bootstrap(singles, seed=seed),
        "consistent": accuracy([len(set(named[p.id])) == 2 and "C" not in named[p.id] or named[p.id] == ("C", "C") for p in readable]),
        "first_place": accuracy(places),
        "length": _length(decided, verdicts),
        "kappa": _kappa(readable, verdicts, seed),
        "subsets": {s: right(part) for s, part in by_subset.items()},
        "verdicts": dict(Counter(verdicts.values())),
        "labels": dict(Counter(p.label for p in pairs)),
    }
    return out | ({"people": _people(pairs, verdicts)} if any(len(p.labels) > 1 for p in pairs) else {})


def _seen(label: Label, order: int) -> Label:
    """The label as it reads in an order of the answers."""
    swapped: dict[Label, Label] = {"first": "second", "second": "first", "tie": "tie"}
    return swapped[label] if order else label


def _length(decided: Sequence[LabelledPair], verdicts: Mapping[str, str]) -> dict[str, Any]:
    """Length bias: how often each side chooses the longer answer, on pairs where both choose and lengths differ."""
    kept = [p for p in decided if p.label != "tie" and len(p.first) != len(p.second)]
    longer = ["first" if len(p.first) > len(p.second) else "second" for p in kept]
    judge = [verdicts[p.id] == side for p, side in zip(kept, longer, strict=True)]
    people = [p.label == side for p, side in zip(kept, longer, strict=True)]
    return {"judge": accuracy(judge), "people": accuracy(people), "difference": paired(people, judge)}


def _kappa(readable: Sequence[LabelledPair], verdicts: Mapping[str, str], seed: int) -> dict[str, Any]:
    """Cohen's kappa with the label over first, second and tie, with a bootstrap interval over pairs."""
    import numpy as np

    n = len(readable)
    table = np.zeros((len(LABELS), len(LABELS)))
    np.add.at(table, (_numbers([verdicts[p.id] for p in readable]), _numbers([p.label for p in readable])), 1)
    if (kappa := kappa_of(table, weights="none")) is None:
        return {"mean": None, "ci95": None, "n": n}
    draws = np.random.default_rng(seed).multinomial(n, table.ravel() / n, size=1000).reshape(-1, *table.shape)
    kappas = [one for draw in draws if (one := kappa_of(draw.astype(float), weights="none")) is not None]
    low, high = np.percentile(kappas, [2.5, 97.5])
    return {"mean": round(kappa, 4), "ci95": [round(float(low), 4), round(float(high), 4)], "n": n}


def _numbers(labels: Sequence[str]) -> list[int]:
    """Labels as the values that statistics count."""
    return [LABELS.index(cast(Label, label)) for label in labels]


def _kappa_of_two(one: Sequence[str], other: Sequence[str]) -> float | None:
    return weighted_kappa(_numbers(one), _numbers(other), len(LABELS), weights="none")


def _people(pairs: Sequence[LabelledPair], verdicts: Mapping[str, str]) -> dict[str, Any]:
    """Agreement among people (kappa of each two, Krippendorff's alpha), and the judge's kappa with each of them."""
    among = people_agreement(pairs)
    whole = [p for p in pairs if len(p.labels) == len(ANNOTATORS) and verdicts[p.id] != "unparsed"]
    judge = [_kappa_of_two([p.labels[i] for p in whole], [verdicts[p.id] for p in whole]) for i in range(len(ANNOTATORS))]
    return among | {"judge_kappas": [k if k is None else round(k, 6) for k in judge]}


def people_agreement(pairs: Sequence[LabelledPair]) -> dict[str, Any]:
    """Agreement among people: Krippendorff's nominal alpha, kappa of each two, how many pairs they are of one mind about."""
    whole = [p.labels for p in pairs if len(p.labels) == len(ANNOTATORS)]
    twos = [(0, 1), (0, 2), (1, 2)]
    kappas = [_kappa_of_two([labels[a] for labels in whole], [labels[b] for labels in whole]) for a, b in twos]
    alpha = alpha_of(coincidences([_numbers(p.labels) for p in pairs], len(LABELS)).sum(0), "nominal")
    return {
        "alpha": alpha if alpha is None else round(alpha, 6),
        "kappas": [k if k is None else round(k, 6) for k in kappas],
        "unanimous": accuracy([len(set(labels)) == 1 for labels in whole]),
    }
