"""Data by index and length: start-up reads no tokens, and where samples come from changes no loss."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gristmill.core.errors import InputError
from gristmill.data import token_store
from gristmill.data.token_store import TOKEN, Pieces, TokenStore
from gristmill.model.transformer import Transformer
from gristmill.train.batch_plan import BatchPlan
from gristmill.train.batches import PairSample, RatedGroup, RatedSample, Sample, fingerprint_samples
from gristmill.train.data import ListData, TokenStoreData
from gristmill.train.objectives.next_token import next_token_objective
from gristmill.train.trainer import Trainer, TrainSettings

Make = Callable[..., Transformer]
MakeSamples = Callable[..., list[Sample]]
SETTINGS = TrainSettings(lr=1e-2, epochs=1, batch_tokens=64, shuffle=False)
LENGTHS = [[9, 1, 20, 33], [16, 17, 5]]  # of the documents, by shard


@pytest.fixture
def store_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(token_store, "BLOCK", 3)
    rng = np.random.default_rng(0)
    folder, shards = tmp_path / "blend", []
    folder.mkdir()
    for number, lengths in enumerate(LENGTHS):
        name = f"tokens-{number:05d}.bin"
        rng.integers(0, 48, sum(lengths)).astype(TOKEN).tofile(folder / name)
        shards.append({"file": name, "tokens": sum(lengths), "documents": len(lengths)})
    ends = np.cumsum(np.concatenate(LENGTHS))
    np.save(folder / "ends.npy", ends)
    facts = {"key": "a", "tokens": int(ends[-1]), "documents": len(ends), "shards": shards, "tokenizer": {"fingerprint": "t"}}
    (folder / "blend.json").write_text(json.dumps(facts))
    return folder


class Recorder:
    """A shard that knows what was read of it."""

    def __init__(self, shard: np.ndarray) -> None:
        self.shard, self.num_read = shard, 0

    def __len__(self) -> int:
        return len(self.shard)

    def __getitem__(self, part: slice) -> np.ndarray:
        self.num_read += part.stop - part.start
        return self.shard[part]


def test_pieces_of_documents_across_shards(store_folder: Path) -> None:
    data = TokenStoreData(TokenStore(store_folder), 16)
    expected = {
        "document 0": 9,  # document 1 has one token, which nothing predicts
        "document 2 from token 0": 16,
        "document 2 from token 16": 4,
        "document 3 from token 0": 16,
        "document 3 from token 16": 16,  # and the last token of it is alone
        "document 4": 16,
        "document 5 from token 0": 16,
        "document 6": 5,
    }
    samples = [data[index] for index in range(len(data))]
    assert {sample.id: sample.num_tokens for sample in samples} == expected and np.asarray(data.lengths).tolist() == list(expected.values())
    tokens = np.concatenate([np.fromfile(path, TOKEN) for path in sorted(store_folder.glob("*.bin"))])
    starts = [0, 10, 26, 30, 46, 63, 79, 96]
    for sample, start in zip(samples, starts, strict=True):
        assert np.array_equal(sample.ids, tokens[start : start + sample.num_tokens])
        assert sample.num_targets == sample.num_tokens - 1
    # a document is given whole as long as those before it have fewer tokens
    for num_tokens, last in ((9, 1), (10, 1), (11, 3), (30, 3), (31, 5)):
        assert len(TokenStoreData(TokenStore(store_folder), 16, num_tokens=num_tokens)) == last


@pytest.mark.parametrize("batch", [{"batch_tokens": 33}, {"batch_tokens": 100}, {"batch_size": [[0, 2], [7, 5]]}])
def test_a_plan_finds_the_samples_of_a_step_without_all_lengths(batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A block at a time, the steps of a list of lengths; blocks of documents of one token have no samples."""
    monkeypatch.setattr(token_store, "BLOCK", 4)
    sizes = np.random.default_rng(1).integers(0, 60, 50)
    sizes[8:17] = 1
    pieces = Pieces(np.cumsum(sizes), 16)
    lengths = np.asarray(pieces)
    assert len(lengths) == len(pieces) and lengths.sum() == pieces.num_tokens and lengths.max() == pieces.max() == 16
    plans = [BatchPlan(form, seed=0, epochs=2.5, shuffle=False, **batch) for form in (pieces, lengths)]
    assert plans[0].num_steps == plans[1].num_steps > 10
    assert [plans[0].step(step) for step in range(plans[0].num_steps)] == [plans[1].step(step) for step in range(plans[0].num_steps)]


def test_a_token_beyond_the_vocabulary_ends_training_in_a_sentence(store_folder: Path) -> None:
    path = store_folder / "tokens-00001.bin"
    tokens = np.fromfile(path, TOKEN)
    for wrong in (-1, np.iinfo(TOKEN).min):
        tokens[3] = wrong
        tokens.tofile(path)
        data = TokenStoreData(TokenStore(store_folder), 16)
        with pytest.raises(InputError, match="not in the tokenizer's vocabulary"):
            list(map(data.__getitem__, range(len(data))))
    tokens[3] = 48
    tokens.tofile(path)
    store = TokenStore(store_folder)
    store.max_id = 47
    with pytest.raises(InputError, match="document 4 has a token"):
        list(map(TokenStoreData(store, 64).__getitem__, range(5)))


@pytest.mark.parametrize("file", ["../blend/tokens-00000.bin", "{folder}/tokens-00000.bin"])
def test_a_store_reads_files_of_its_own_folder(file: str, store_folder: Path) -> None:
    facts = json.loads((store_folder / "blend.json").read_text())
    facts["shards"][0]["file"] = file.format(folder=store_folder)
    (store_folder / "blend.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match="it names files outside of it"):
        TokenStore(store_folder)


def test_ends_of_documents_only_grow(store_folder: Path) -> None:
    ends = np.load(store_folder / "ends.npy")
    ends[[1, 2]] = ends[[2, 1]]
    np.save(store_folder / "ends.npy", ends)
    with pytest.raises(InputError, match="where its documents end"):
        TokenStore(store_folder)


def test_only_the_tokens_of_the_steps_are_read(store_folder: Path, make_model: Make, tmp_path: Path) -> None:
    store = TokenStore(store_folder)
    shards = [Recorder(shard) for shard in store.shards]
    store.shards = shards
    data = TokenStoreData(store, 16)
    read: list[int] = []
    settings = replace(SETTINGS, epochs=None, steps=2, batch_tokens=30)

    def on_step(step: int, num_steps: int, metrics: dict[str, float]) -> None:
        read.append(sum(shard.num_read for shard in shards))
        assert read[-1] == metrics["tokens"]

    Trainer(make_model(), next_token_objective, settings, folder=tmp_path / "out", on_step=on_step).fit(data)
    assert 20 < read[0] < read[1] < sum(map(len, shards))


def test_a_store_trains_as_the_list_of_its_samples_does(store_folder: Path, make_model: Make) -> None:
    data = TokenStoreData(TokenStore(store_folder), 20)
    losses: list[list[float]] = []
    for form in (data, [data[index] for index in range(len(data))]):
        seen: list[float] = []
        note = lambda step, total, metrics, seen=seen: seen.append(metrics["loss"])  # noqa: E731
        result = Trainer(make_model(), next_token_objective, replace(SETTINGS, max_tokens=17), on_step=note).fit(form, form)
        assert len(result.dropped_long) == 2 and result.tokens == sum(length for length in np.asarray(data.lengths) if length <= 17)
        losses.append([*seen, result.metrics["validation_loss"]])
    assert losses[0] == losses[1] and len(losses[0]) >= 2


def test_a_store_is_known_by_what_its_blend_recorded(store_folder: Path, tmp_path: Path, make_model: Make) -> None:
    print_of = lambda folder, *limits: TokenStoreData(TokenStore(folder), *limits).fingerprint()  # noqa: E731
    copy = Path(shutil.copytree(store_folder, tmp_path / "elsewhere"))
    assert print_of(copy, 16) == print_of(store_folder, 16) != print_of(store_folder, 17)
    out = tmp_path / "out"
    Trainer(make_model(), next_token_objective, SETTINGS, folder=out).fit(TokenStoreData(TokenStore(store_folder), 16))
    (copy / "blend.json").write_text((copy / "blend.json").read_text().replace('"key": "a"', '"key": "b"'))
    assert print_of(copy, 16) != print_of(store_folder, 16)
    with pytest.raises(InputError, match="another data set"):
        Trainer(make_model(), next_token_objective, SETTINGS, folder=out).fit(TokenStoreData(TokenStore(copy), 16))


class Squares:
    """Data that are made when they are asked for."""

    def __init__(self, lengths: list[int], highest: int = 47) -> None:
        self.lengths, self._highest = np.array(lengths), highest

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int, /) -> Sample:
        ids = np.arange(self.lengths[index]) ** 2 % (self._highest + 1)
        ids[-1] = self._highest
        return Sample(ids, [True] * len(ids), f"square {index}")

    def fingerprint(self) -> str:
        return "squares"


def test_data_of_another_kind(make_model: Make) -> None:
    settings = replace(SETTINGS, max_tokens=10)
    result = Trainer(make_model(), next_token_objective, settings).fit(Squares([5, 11, 8, 30]), Squares([4]))
    assert result.dropped_long == ["#1", "#3"] and result.tokens == 13 and result.metrics["validation_loss"] > 0
    with pytest.raises(InputError, match="sample #0 and all others are over 10 tokens"):
        Trainer(make_model(), next_token_objective, settings).fit(Squares([11, 12]))
    with pytest.raises(InputError, match="the data set is empty"):
        Trainer(make_model(), next_token_objective, settings).fit(Squares([]))
    with pytest.raises(InputError, match="sample square 0 has token 48 but the model has 48"):
        Trainer(make_model(), next_token_objective, settings).fit(Squares([5, 6], highest=48))


def test_a_list_is_known_by_its_samples(make_samples: MakeSamples, make_pairs: Callable[..., list[PairSample]]) -> None:
    rated: list[Any] = [RatedSample([1, 2, n], 2, [1, 2, 3, -100, 4], id=str(n), prompt=str(n // 2)) for n in range(4)]
    for samples, num in ((make_samples(5), 5), (make_pairs(4), 4), (rated, 2)):
        data = ListData(samples)
        assert len(data) == num == len(data.lengths) and data.rows.sum() == len(samples)
        assert data.fingerprint() == fingerprint_samples(data.items)
        assert data.lengths.tolist() == [item.num_tokens for item in data.items]
    assert isinstance(data[0], RatedGroup)
