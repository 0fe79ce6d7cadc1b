import json
import math
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.numpy import load_file

from gristmill.core.errors import InputError
from gristmill.curate.outcome import DOCUMENT, DROPPED, Outcome
from gristmill.curate.quality import classifier, perplexity
from gristmill.curate.quality.buckets import Quality, label, measure, models, quality, scores_of, thresholds
from gristmill.curate.quality.classifier import load, train
from gristmill.curate.text.text_column import TextColumn

NOUNS = [
    "river",
    "garden",
    "teacher",
    "winter",
    "letter",
    "village",
    "morning",
    "bread",
    "mountain",
    "window",
    "doctor",
    "market",
    "island",
]
VERBS = ["carried", "watched", "followed", "remembered", "answered", "painted", "crossed", "visited", "forgot", "described"]
NAMES = [
    "count",
    "index",
    "value",
    "node",
    "buffer",
    "total",
    "parser",
    "offset",
    "queue",
    "token",
    "left",
    "right",
    "size",
    "key",
    "cache",
]
ODD = ["", "x", "word", " ", "\n", "\u3042", "\U0001f600", "\x00", "a" * 5000, "!" * 5000, "\u00e9t\u00e9", "the end"]


def prose(seed: int) -> str:
    draw = random.Random(seed)
    one = lambda: f"The {draw.choice(NOUNS)} {draw.choice(VERBS)} the {draw.choice(NOUNS)} of a {draw.choice(NOUNS)}."  # noqa: E731
    return " ".join(one() for _ in range(draw.randint(2, 12)))


def code(seed: int) -> str:
    draw = random.Random(seed)
    one = lambda: f"    {draw.choice(NAMES)}[{draw.randint(0, 9)}] = self.{draw.choice(NAMES)}({draw.choice(NAMES)})"  # noqa: E731
    return "\n".join(["def run(self):", *(one() for _ in range(draw.randint(2, 12)))])


def documents(texts: list[str], metas: list[object] | None = None, first: int = 0) -> pa.Table:
    ids = [f"d{i}" for i in range(first, first + len(texts))]
    return pa.table([ids, texts, ["test"] * len(texts), [json.dumps(m) for m in metas or [{}] * len(texts)]], schema=DOCUMENT)


def texts_of(texts: list[str]) -> TextColumn:
    return TextColumn.of(pa.array(texts, pa.large_string()))


def measured(scores: list[float], sizes: list[int] | None = None) -> pa.Table:
    keys = np.random.default_rng(1).permutation(len(scores)).astype(np.uint64)
    return pa.table({"score_0": np.array(scores, np.float32), "bytes": np.array(sizes or [1] * len(scores), np.int64), "key": keys})


def cut(table: pa.Table, chosen: Quality) -> Outcome:
    found = measure(table, chosen)
    return quality(table, chosen, scores_of(found, chosen), limits=thresholds([found], chosen))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    positive = documents([prose(i) for i in range(300)])
    train([positive.slice(0, 100), positive.slice(100)], [documents([code(i) for i in range(300)])], folder, buckets=2**14, held_out=0.4)
    return folder


@pytest.fixture(scope="module")
def trigrams(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trigrams")
    perplexity.train([documents([prose(i) for i in range(150)]), documents([prose(i) for i in range(150, 300)])], folder)
    return folder


# --- classifiers ---------------------------------------------------------------------------------------------------------


def test_a_classifier_learns_prose_from_code(trained: Path) -> None:
    facts = load(trained).settings
    assert facts["held_out_auc"] > 0.9 and facts["held_out_accuracy"] > 0.9 and facts["calibration_error"] < 0.1
    assert facts["positive_documents"] == facts["negative_documents"] == 300 and facts["held_out_documents"] == 120
    scores = load(trained).scores(texts_of([prose(1000), code(1000)]))
    assert scores.dtype == np.float32 and scores[0] > 0.8 and scores[1] < 0.2


def test_training_and_scores_are_the_same_again_and_after_loading(trained: Path, tmp_path: Path) -> None:
    tables = [documents([prose(i) for i in range(60)])], [documents([code(i) for i in range(60)])]
    first, second = (train(*tables, tmp_path / name, buckets=2**10, seed=3) for name in "ab")
    other = train(*tables, tmp_path / "c", buckets=2**10, seed=4)
    assert np.array_equal(first.weights_F, second.weights_F) and first.settings == second.settings
    assert not np.array_equal(first.weights_F, other.weights_F)
    loaded = load(tmp_path / "a")
    assert np.array_equal(loaded.weights_F, first.weights_F) and loaded.settings == first.settings
    texts = [prose(i) for i in range(5)] + ODD
    whole = first.scores(texts_of(texts))
    assert np.array_equal(loaded.scores(texts_of(texts)), whole)
    assert np.array_equal([first.scores(texts_of([text]))[0] for text in texts], whole)  # wherever a text lies


def test_odd_texts_have_scores(trained: Path) -> None:
    scores = load(trained).scores(texts_of(ODD))
    assert np.isfinite(scores).all() and (scores >= 0).all() and (scores <= 1).all()
    assert len(load(trained).scores(texts_of([]))) == 0


def test_training_on_odd_or_few_texts(tmp_path: Path) -> None:
    classifier = train([documents(ODD)], [documents(["y"])], tmp_path / "odd", buckets=2, held_out=0)
    assert np.isfinite(classifier.weights_F).all() and classifier.settings["held_out_auc"] is None
    json.loads((tmp_path / "odd" / "model.json").read_text(), parse_constant=pytest.fail)
    train([documents(["a"])], [documents(["a"])], tmp_path / "same", buckets=64, held_out=0.5)


def test_what_training_refuses(tmp_path: Path) -> None:
    some = documents(["a"])
    with pytest.raises(InputError, match="no negative document"):
        train([some], [documents([])], tmp_path)
    with pytest.raises(InputError, match="power of 2"):
        train([some], [some], tmp_path, buckets=1000)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        train([some], [some], tmp_path / "file" / "x", buckets=64)
    with pytest.raises(InputError, match="no word"):
        perplexity.train([documents(["", " "])], tmp_path)


def test_what_loading_refuses(trained: Path, trigrams: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no trained classifier model"):
        load(tmp_path)
    with pytest.raises(InputError, match="kind 'trigrams', not 'classifier'"):
        load(trigrams)
    with pytest.raises(InputError, match="kind 'classifier', not 'trigrams'"):
        models(Quality(classifiers=[str(trained), "column:x", f"perplexity:{trained}"]))
    for name, data in (("model.json", (trained / "model.json").read_bytes()), ("model.safetensors", b"\x08\0\0")):
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match="no trained classifier model"):
        load(tmp_path)


def test_tensors_that_the_kernels_would_misread_are_refused(trained: Path, trigrams: Path, tmp_path: Path) -> None:
    def copy_of(source: Path, name: str, tensor: np.ndarray | None, **settings: object) -> Path:
        tensors = load_file(source / "model.safetensors") | ({} if tensor is None else {name: tensor})
        if tensor is None and name:
            del tensors[name]
        perplexity.write_model(tmp_path, tensors, json.loads((source / "model.json").read_text()) | settings)
        return tmp_path

    weights = load_file(trained / "model.safetensors")["weights_F"]
    nan = weights.copy()
    nan[3] = np.nan
    for name, tensor in (
        ("weights_F", weights[:-1]),
        ("weights_F", weights[:0]),
        ("weights_F", weights.astype(np.float64)),
        ("weights_F", weights[:, None]),
        ("weights_F", nan),
        ("weights_F", None),
        ("other\x1b[2J", weights),
    ):
        with pytest.raises(InputError, match="damaged"):
            load(copy_of(trained, name, tensor))
    for bias in (None, "1", float("nan")):
        with pytest.raises(InputError, match="damaged"):
            load(copy_of(trained, "", None, bias=bias))
    whole = load_file(trigrams / "model.safetensors")
    for name in whole:
        for tensor in (None, whole[name][:-1], whole[name].astype(np.int32)):
            with pytest.raises(InputError, match="damaged"):
                perplexity.load(copy_of(trigrams, name, tensor))
    perplexity.load(copy_of(trigrams, "", None))


def test_area_under_the_curve_and_calibration() -> None:
    labels = np.array([False, True, False, True])
    assert classifier.area(np.array([0.1, 0.9, 0.2, 0.8]), labels) == 1
    assert classifier.area(np.array([0.5, 0.5, 0.5, 0.5]), labels) == 0.5
    assert classifier.area(np.array([0.1, 0.2, 0.2, 0.3]), labels) == 3.5 / 4
    assert classifier.area(np.array([0.1]), np.array([True])) is None
    assert classifier.calibration_error(np.array([0.5, 0.5, 1.0]), np.array([True, False, True])) == 0
    assert classifier.calibration_error(np.array([0.9, 0.95]), np.array([True, False])) == pytest.approx(0.425)


def test_calibration_finds_scale_and_shift() -> None:
    draw = np.random.default_rng(0)
    true = draw.normal(0, 2, 20_000)
    labels = draw.random(20_000) < 1 / (1 + np.exp(-true))
    scale, shift = classifier._platt((true - 1) / 3, labels)
    assert scale == pytest.approx(3, rel=0.05) and shift == pytest.approx(1, abs=0.1)
    assert classifier._platt(-true, labels) == (1, 0)  # worse than chance: left as it is


# --- perplexity ----------------------------------------------------------------------------------------------------------


def test_perplexity_is_lower_on_text_like_that_of_training(trigrams: Path) -> None:
    model = perplexity.load(trigrams)
    unlike = "Quarterly dividends fell sharply because wholesale copper contracts expired unsold."
    own, new, mix64, other, script = model.perplexity(texts_of([prose(5), prose(5000), "of of the The a a river", unlike, code(1)]))
    assert own < 40 and new < 40 and max(own, new) < mix64 < other and max(own, new) < script


def test_probabilities_sum_to_one(tmp_path: Path) -> None:
    words = ["a", "b", "c", "d", "e", "f"]
    draw = random.Random(0)
    texts = [" ".join(draw.choices(words, [6, 5, 4, 3, 2, 1], k=9)) for _ in range(30)]

    def probability(model: perplexity.Trigrams, text: str) -> float:
        return 2 ** -(len(text.split()) * float(model.bits(texts_of([text]))[0])) if text else 1.0

    for min_count in (1, 2, 3):
        model = perplexity.train([documents(texts)], tmp_path, min_count=min_count)
        assert model.settings["words"] == 6 and model.settings["rare_words"] == 0
        for before in ("", "a", "a b", "f f", "b zzz"):  # the last of them never seen
            found = sum(probability(model, f"{before} {word}") for word in [*words, "zzz"])
            assert found == pytest.approx(probability(model, before), rel=1e-4)


def test_a_model_is_the_same_after_loading_and_however_it_is_read(trigrams: Path, tmp_path: Path) -> None:
    again = perplexity.train([documents([prose(i) for i in range(300)])], tmp_path)
    texts = texts_of([prose(7), code(7), *ODD])
    bits = perplexity.load(trigrams).bits(texts)
    assert np.array_equal(again.bits(texts), bits, equal_nan=True)
    assert np.array_equal(perplexity.load(tmp_path).bits(texts), bits, equal_nan=True)
    empty = [math.isnan(x) for x in bits[2:].tolist()]
    assert empty == [not text.strip(" \n\0") for text in ODD]
    assert np.array_equal(again.bits(texts_of([code(7)])), bits[1:2])


# --- thresholds and buckets ----------------------------------------------------------------------------------------------


def test_thresholds_of_equal_weights() -> None:
    chosen = Quality(classifiers=["column:x"], weight="documents")
    scores = np.arange(100, dtype=np.float32)[:, None]
    found = thresholds([measured(list(range(100)))], chosen)
    assert found.shape == (1, 19) and found[0].tolist() == list(range(4, 95, 5))
    outcome = quality(documents(["t"] * 100), chosen, scores, limits=found)
    assert np.bincount(outcome.kept["quality_bucket"].to_numpy()).tolist() == [4] + [5] * 18 + [6]
    weighted = thresholds([measured(list(range(100)), [7] * 100)], Quality(classifiers=["column:x"]))
    assert np.array_equal(weighted, found)


def test_thresholds_by_bytes() -> None:
    chosen = Quality(classifiers=["column:x"])
    sizes = [1] * 50 + [3] * 50
    found = thresholds([measured(list(range(100)), sizes)], chosen)
    buckets = np.digitize(np.arange(100), found[0])
    carried = np.bincount(buckets, sizes, minlength=20)
    assert carried.sum() == 200 and carried.min() >= 9 and carried.max() <= 12


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_thresholds_do_not_depend_on_shards(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 60))
    number = st.one_of(st.floats(-3, 3, width=32), st.just(0.5), st.just(float("nan")))
    scores = data.draw(st.lists(number, min_size=count, max_size=count))
    sizes = data.draw(st.lists(st.integers(0, 1000), min_size=count, max_size=count))
    scores[0] = 1.0
    table = measured(scores, sizes)
    table = table.set_column(
        2, "key", pa.array(np.array(data.draw(st.lists(st.integers(0, 40), min_size=count, max_size=count)), np.uint64))
    )
    chosen = Quality(classifiers=["column:x"], weight=data.draw(st.sampled_from(["bytes", "documents"])), bins=7, sample=10_000)
    few = chosen.model_copy(update={"sample": data.draw(st.integers(1, 70))})
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=5)))
    mix64 = table.take(pa.array(data.draw(st.permutations(range(count)))))
    parts = [mix64.slice(a, b - a) for a, b in zip([0, *cuts], [*cuts, count], strict=True)]
    assert np.array_equal(thresholds([table], chosen), thresholds(parts, chosen))
    try:
        expected = thresholds([table], few)
    except InputError:  # none of the sample has a score
        with pytest.raises(InputError):
            thresholds(parts, few)
    else:
        assert np.array_equal(expected, thresholds(iter(parts), few))
        assert (np.diff(expected) >= 0).all()


def test_a_sample_serves_for_the_whole() -> None:
    table = documents(["t"] * 20_000, [{"x": i} for i in range(20_000)])
    chosen = Quality(classifiers=["column:x"], sample=2000)
    found = thresholds([measure(table, chosen)], chosen)[0]
    assert np.abs(found - 1000 * np.arange(1, 20)).max() < 700
    other = chosen.model_copy(update={"seed": 1})
    assert not np.array_equal(found, thresholds([measure(table, other)], other)[0])
    halves = [measure(documents(["t"] * 10_000, [{"x": i} for i in range(a, a + 10_000)], a), chosen) for a in (10_000, 0)]
    assert np.array_equal(found, thresholds(halves, chosen)[0])


def test_the_ensemble_is_the_maximum_of_bins() -> None:
    draw = np.random.default_rng(0)
    scores = draw.random((400, 3)).astype(np.float32) * np.array([1, 10, 100], np.float32)
    metas = [dict(zip("abc", row, strict=True)) for row in scores.tolist()]
    metas[7] = {"a": 2.0}  # above all, and without the others
    metas[8], metas[9] = {}, {"a": "0.5", "b": None, "c": True}
    table = documents(["text " * (1 + i % 9) for i in range(400)], metas)
    chosen = Quality(classifiers=["column:a", "column:b", "column:c"])
    found = measure(table, chosen)
    limits = thresholds([found], chosen)
    outcome = quality(table, chosen, scores_of(found, chosen), limits=limits)
    buckets = outcome.kept["quality_bucket"].to_numpy()
    singles = [np.digitize(scores[:, c], limits[c]) for c in range(3)]
    others = [n for n in range(400) if n not in (7, 8, 9)]
    assert np.array_equal(buckets[others], np.max(singles, axis=0)[others])
    assert buckets[7:10].tolist() == [19, 0, 0]
    assert outcome.kept.schema.field("quality_bucket").type == pa.int32() and len(outcome.dropped) == 0
    assert outcome.kept["quality"].to_pylist() == [label(b) for b in buckets.tolist()]


def test_labels() -> None:
    expected = ["Low"] * 7 + ["Medium-Low"] * 5 + ["Medium"] * 6 + ["Medium-High", "High"]
    assert [label(bucket) for bucket in range(20)] == expected
    assert [label(bucket, 100) for bucket in range(4, 100, 5)] == expected
    assert [label(bucket, 3) for bucket in range(3)] == ["Low", "Medium", "High"]


def test_low_buckets_and_unwanted_labels_are_dropped() -> None:
    table = documents(["t"] * 100, [{"x": i} for i in range(100)]).append_column("quality", pa.array(["old"] * 100))
    low = cut(table, Quality(classifiers=["column:x"], min_bucket=18))
    assert low.kept["id"].to_pylist() == [f"d{i}" for i in range(89, 100)]
    assert set(low.kept["quality"].to_pylist()) == {"Medium-High", "High"}
    assert low.dropped.schema == DROPPED and set(low.dropped["reason"].to_pylist()) == {"quality"}
    assert low.dropped["figure"].to_pylist()[:5] == [0, 0, 0, 0, 1] and set(low.dropped["limit"].to_pylist()) == {18}
    kept = cut(table, Quality(classifiers=["column:x"], keep=["Low", "High"], min_bucket=1))
    assert set(kept.kept["quality"].to_pylist()) == {"Low", "High"} and min(kept.kept["quality_bucket"].to_pylist()) == 1
    assert set(kept.dropped["reason"].to_pylist()) == {"quality", "quality Medium-Low", "quality Medium", "quality Medium-High"}


def test_columns_come_before_keys_of_meta() -> None:
    table = documents(["t"] * 3, [{"x": 9}] * 3).append_column("x", pa.array([1, None, 3]))
    assert measure(table, Quality(classifiers=["column:x"]))["score_0"].to_pylist()[::2] == [1, 3]
    with pytest.raises(InputError, match="'text' holds large_string, not numbers"):
        measure(table, Quality(classifiers=["column:text"]))
    with pytest.raises(InputError, match="No document has a score of 'column:y'"):
        cut(table, Quality(classifiers=["column:y"]))
    escaped = table.set_column(3, "meta", pa.array(['{"\\u0079": 2}', None, "[1]"]))
    assert measure(escaped, Quality(classifiers=["column:y"]))["score_0"].to_pylist()[0] == 2
    metas = ['{"y": ' + "[" * 100_000 + "]" * 100_000 + "}", '{"y": %s}' % ("9" * 400), '{"y": %s}' % ("9" * 5000)]
    hostile = table.set_column(3, "meta", pa.array(metas))
    assert all(map(math.isnan, measure(hostile, Quality(classifiers=["column:y"]))["score_0"].to_pylist())), "no number that can be held"


def test_classifier_and_perplexity_together(trained: Path, trigrams: Path) -> None:
    table = documents([prose(i) for i in range(2000, 2060)] + [code(i) for i in range(60)] + ODD)
    chosen = Quality(classifiers=[str(trained), f"perplexity:{trigrams}"], weight="documents")
    outcome = cut(table, chosen)
    buckets = outcome.kept["quality_bucket"].to_numpy()
    assert len(buckets) == len(table) and buckets[:60].mean() > 8 + buckets[60:120].mean()
    assert cut(table, chosen).kept.equals(outcome.kept)
    for texts in ([], [""], ["word"]):
        assert len(cut(documents(texts), Quality(classifiers=[str(trained)])).kept) == len(texts)


# --- Pareto sampling -----------------------------------------------------------------------------------------------------


def test_pareto_keeps_with_the_probability_of_curator() -> None:
    table = documents(["t"] * 100_000)
    chosen = Quality(classifiers=["column:p"], pareto=3, bins=2)
    kept: set[str] = set()
    for score, share in ((0, 0.125), (0.25, 0.187), (0.5, 0.296), (0.75, 0.512), (0.9, 0.751), (1, 1)):
        outcome = quality(table, chosen, np.full((100_000, 1), score, np.float32), limits=np.zeros((1, 1), np.float32))
        found = len(outcome.kept) / 100_000
        exact = (2 - score) ** -3
        assert abs(exact - share) < 6e-4 and abs(found - exact) <= 3 * math.sqrt(exact * (1 - exact) / 100_000)
        assert kept <= set(outcome.kept["id"].to_pylist())  # by a number of the document's own
        kept = set(outcome.kept["id"].to_pylist())
        assert (outcome.dropped["limit"].to_numpy() >= outcome.dropped["figure"].to_numpy()).all()
        assert set(outcome.dropped["reason"].to_pylist()) <= {"pareto"}


def test_what_pareto_refuses() -> None:
    with pytest.raises(InputError, match="no probabilities"):
        cut(documents(["t"], [{"x": 3}]), Quality(classifiers=["column:x"], pareto=3))
    with pytest.raises(ValidationError, match="pareto needs a probability"):
        Quality(classifiers=["perplexity:x"], pareto=3)


def test_wrong_settings() -> None:
    for values in ({"classifiers": []}, {"classifiers": ["column:"]}, {"min_bucket": 20}, {"keep": ["Best"]}, {"bins": 1}):
        with pytest.raises(ValidationError):
            Quality.model_validate({"classifiers": ["column:x"]} | values)
