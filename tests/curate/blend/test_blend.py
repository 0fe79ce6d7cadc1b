"""Shares, epochs and the order of a blend, what it writes, and that nothing but the documents and the seed matters to it."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gristmill.miniature
from gristmill.core.config import load
from gristmill.core.errors import InputError
from gristmill.core.progress import Progress
from gristmill.curate.blend import blend as module
from gristmill.curate.blend.blend import Blend, blend, blend_lines, draw
from gristmill.data.token_store import TokenStore
from gristmill.data.tokenizer import Tokenizer
from gristmill.train.batches import fingerprint_samples
from gristmill.train.data import TokenStoreData
from gristmill.train.objectives.next_token import token_samples

TOKENIZER_FOLDER = Path(gristmill.miniature.__file__).parent / "checkpoint"
TOKENIZER = Tokenizer.load(TOKENIZER_FOLDER)
WORDS = ["the", "mill", "grinds", "pear", "quince", "larch", "12", "7", "wheat\n\n", "Größe", "漢"]
QUIET = Progress(quiet=True)


def texts(name: str, count: int) -> list[str]:
    rng = np.random.default_rng(len(name))
    return [f"{name} {i}: " + " ".join(rng.choice(WORDS, rng.integers(1, 30))) for i in range(count)]


SOURCES = {"english": texts("english", 60), "code": texts("code", 25), "other": texts("other", 40)}


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Each source's documents in three files, with some that are empty."""
    for name, docs in SOURCES.items():
        write(tmp_path / "in" / name, docs, 3)
    return tmp_path / "in"


def write(folder: Path, docs: list[str], files: int) -> None:
    folder.mkdir(parents=True)
    for number, part in enumerate(np.array_split(np.array([*docs, ""], object), files)):
        (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))


def recipe(inputs: Path, **values: Any) -> Blend:
    weights = {"english": 70, "code": 15, "other": 15}
    sources = [{"name": name, "inputs": [str(inputs / name)], "weight": weight} for name, weight in weights.items()]
    return Blend.model_validate({"tokenizer": TOKENIZER_FOLDER, "sources": sources, "tokens": 4000, "workers": 1, **values})


def written(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in [*sorted(folder.glob("tokens-*.bin")), folder / "ends.npy"])


def documents_of(folder: Path) -> list[str]:
    store = TokenStore(folder)
    ids = np.concatenate(store.shards)
    out = [TOKENIZER.decode(part[:-1].tolist()) for part in np.split(ids, store.ends_N[:-1])]
    assert all(ids[end - 1] == TOKENIZER.eos_id for end in store.ends_N)
    return out


TWO_PHASES = [{"share": 3}, {"share": 1, "weights": {"code": 1, "other": 2}}]


@st.composite
def plans(pick: st.DrawFn) -> tuple[Blend, list[np.ndarray]]:
    count = pick(st.integers(1, 4))
    names = [f"s{i}" for i in range(count)]
    lengths = [np.array(pick(st.lists(st.integers(1, 50), min_size=1, max_size=12))) for _ in names]
    weight = st.floats(0.1, 10)
    phases = pick(
        st.lists(
            st.builds(dict, share=weight, weights=st.just({}) | st.fixed_dictionaries({n: weight for n in names})), min_size=1, max_size=3
        )
    )
    sources = [{"name": n, "inputs": ["x"], "weight": pick(weight), "max_epochs": 1e9} for n in names]
    return Blend(
        tokenizer=Path("x"), sources=sources, tokens=pick(st.integers(1, 900)), phases=phases, seed=pick(st.integers(0, 9))
    ), lengths


@given(plans())
def test_shares_and_epochs(plan: tuple[Blend, list[np.ndarray]]) -> None:
    """Of each phase a source has its share of the tokens within one document, and no document is ahead of another by more than one use."""
    what, lengths = plan
    order, phases, sources = draw(what, lengths)
    all_lengths, firsts = np.concatenate(lengths), np.cumsum([0, *map(len, lengths)])
    shares = sum(phase.share for phase in what.phases)
    begin = 0
    wanted_of = dict.fromkeys(range(len(lengths)), 0.0)
    for phase, facts in zip(what.phases, phases, strict=True):
        part = order[begin : begin + facts["documents"]]
        begin += facts["documents"]
        weights = [phase.weights[s.name] if phase.weights else s.weight for s in what.sources]
        assert facts["tokens"] == all_lengths[part].sum()
        for i, of_source in enumerate(facts["sources"]):
            mine = part[(part >= firsts[i]) & (part < firsts[i + 1])]
            assert of_source["documents"] == len(mine) and of_source["tokens"] == all_lengths[mine].sum()
            wanted = what.tokens * phase.share / shares * weights[i] / sum(weights)
            wanted_of[i] += wanted
            assert abs(of_source["tokens"] - wanted) <= lengths[i].max() + 2 * len(phases)  # the rest is rounding
    for i, facts in enumerate(sources):
        uses = np.bincount(order[(order >= firsts[i]) & (order < firsts[i + 1])] - firsts[i], minlength=len(lengths[i]))
        assert set(uses) <= {int(np.floor(facts["epochs"])), int(np.ceil(facts["epochs"]))}
        assert facts["repeats"] == np.maximum(uses - 1, 0).sum()
        over = facts["tokens"] - wanted_of[i]
        assert -2 * len(phases) <= over < lengths[i].max() + 2 * len(phases)
    again = draw(what, lengths)
    assert np.array_equal(order, again[0]) and again[1:] == (phases, sources)


def test_a_blend(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_TOKENS", 700)  # so that there are several files on either side
    facts = blend(recipe(inputs, phases=TWO_PHASES, tokens=8000), tmp_path / "out", QUIET)
    assert len(facts["shards"]) > 3 and all(shard["tokens"] <= 700 for shard in facts["shards"])
    found = documents_of(tmp_path / "out")
    assert len(found) == facts["documents"]
    uses = Counter(found)
    for one in facts["sources"]:
        mine = SOURCES[one["name"]]
        counts = {uses[text] for text in mine}
        assert counts <= {int(one["epochs"]), int(one["epochs"]) + 1}
        assert one["empty"] == 1 and one["files"] == 3 and one["present"]["documents"] == len(mine)
        assert one["present"]["tokens"] == sum(len(TOKENIZER.encode(text)) + 1 for text in mine)
    second = found[facts["phases"][0]["documents"] :]
    assert not any(text.startswith("english") for text in second) and facts["phases"][1]["sources"][0]["tokens"] == 0
    kinds = [text.split()[0] for text in found[: facts["phases"][0]["documents"]]]
    assert sum(a != b for a, b in zip(kinds, kinds[1:], strict=False)) > 10  # shuffled together
    left = [".lock", "blend.json", "ends.npy", "recipe.yaml", "results.json", "tokenizer"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.suffix != ".bin") == left
    assert Tokenizer.load(tmp_path / "out" / "tokenizer").fingerprint() == TOKENIZER.fingerprint()
    assert any("again" in line for line in blend_lines(facts)) and "phase 2" in "".join(blend_lines(facts))
    before = written(tmp_path / "out")
    assert blend(recipe(inputs, phases=TWO_PHASES, tokens=8000), tmp_path / "out", QUIET) == facts  # nothing is left to do
    changed = blend(recipe(inputs, tokens=1000), tmp_path / "out", QUIET)
    assert changed["documents"] < facts["documents"] and written(tmp_path / "out") != before
    store = TokenStore(tmp_path / "out")
    assert len(TokenStoreData(store, 64, num_tokens=300)) < len(TokenStoreData(store, 64))


def test_only_documents_and_seed_matter(inputs: Path, tmp_path: Path) -> None:
    blend(recipe(inputs), tmp_path / "a", QUIET)
    for name, docs in SOURCES.items():
        write(tmp_path / "other files" / name, docs, 7)
    blend(recipe(tmp_path / "other files", workers=2), tmp_path / "b", QUIET)
    blend(recipe(inputs, seed=1), tmp_path / "c", QUIET)
    assert written(tmp_path / "a") == written(tmp_path / "b") != written(tmp_path / "c")


@pytest.mark.parametrize("calls", [2, 5, 9, 10])
def test_going_on_after_a_stop(calls: int, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends while it writes its n-th file leaves nothing by halves; the next one does only what is left."""
    monkeypatch.setattr(module, "SHARD_TOKENS", 3000)
    blend(recipe(inputs), tmp_path / "whole", QUIET)
    left = [calls]

    def stopping(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                with module._whole(tmp_path / "out" / "half") as file:
                    file.write(b"half")
                    raise KeyboardInterrupt
            return function(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(module, "encode", stopping(module.encode))
        patch.setattr(module, "gather", stopping(module.gather))
        with pytest.raises(KeyboardInterrupt):
            blend(recipe(inputs), tmp_path / "out", QUIET)
    assert not (tmp_path / "out" / "blend.json").exists()
    with pytest.raises(InputError, match="no finished blend"):
        TokenStore(tmp_path / "out")
    again = Counter[str]()
    for name in ("encode", "gather"):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, function=function, name=name: again.update([name]) or function(*a))
    blend(recipe(inputs), tmp_path / "out", QUIET)
    assert again == {k: v for k, v in {"encode": max(0, 10 - calls), "gather": min(2, 12 - calls)}.items() if v}
    assert written(tmp_path / "out") == written(tmp_path / "whole")


def test_a_stop_while_files_are_moved(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blend(recipe(inputs), tmp_path / "whole", QUIET)
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "save", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            blend(recipe(inputs), tmp_path / "out", QUIET)
    assert not (tmp_path / "out" / "blend.json").exists()
    blend(recipe(inputs), tmp_path / "out", QUIET)
    assert written(tmp_path / "out") == written(tmp_path / "whole")


@pytest.mark.parametrize("max_tokens", [16, 10_000])
def test_samples_are_those_of_the_documents(max_tokens: int, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_TOKENS", 1500)
    blend(recipe(inputs), tmp_path / "out", QUIET)
    store = TokenStore(tmp_path / "out", TOKENIZER)
    data = TokenStoreData(store, max_tokens)
    samples = [data[index] for index in range(len(data))]
    documents = ([*TOKENIZER.encode(text), TOKENIZER.eos_id] for text in documents_of(tmp_path / "out"))
    wanted = [sample for sample in token_samples(documents, max_tokens) if sample.num_targets]
    assert np.asarray(data.lengths).tolist() == [sample.num_tokens for sample in wanted]
    assert fingerprint_samples(samples) == fingerprint_samples(wanted)
    assert [s.id for s in samples] == [s.id for s in wanted]
    assert all(any(np.shares_memory(s.ids, shard) for shard in store.shards) for s in samples)
    assert all(np.shares_memory(s.mask, samples[0].mask) for s in samples) and not samples[0].mask.flags.writeable
    assert {s.ids.dtype for s in samples} == {np.dtype(np.int32)}


def test_a_store_that_does_not_fit(inputs: Path, tmp_path: Path) -> None:
    blend(recipe(inputs, tokens=500), tmp_path / "out", QUIET)
    with pytest.raises(InputError, match="another tokenizer"):
        TokenStore(tmp_path / "out", Tokenizer.train(["x"], 300, []))
    path = tmp_path / "out" / "tokens-00000.bin"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match="copy the folder again"):
        TokenStore(tmp_path / "out")


def test_too_many_epochs(inputs: Path, tmp_path: Path) -> None:
    present = sum(len(TOKENIZER.encode(text)) + 1 for text in SOURCES["code"])
    with pytest.raises(InputError) as error:
        blend(recipe(inputs, tokens=100_000), tmp_path / "out", QUIET)
    assert all(text in str(error.value) for text in ("'english'", "wants 70,000 of it", "max_epochs 4"))
    wanted = recipe(inputs, tokens=8 * present, phases=[{"share": 1, "weights": {"code": 1}}])
    with pytest.raises(InputError, match=f"'code' has {present:,} tokens and the blend wants {8 * present:,} of it, 8.00 epochs"):
        blend(wanted, tmp_path / "out", QUIET)


def test_an_empty_source(inputs: Path, tmp_path: Path) -> None:
    for path in (inputs / "code").iterdir():
        path.write_text('{"text": ""}\n')
    with pytest.raises(InputError, match="'code' holds no documents"):
        blend(recipe(inputs), tmp_path / "out", QUIET)
    with pytest.raises(InputError, match="no document at"):
        blend(recipe(tmp_path / "nowhere"), tmp_path / "out", QUIET)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sources": []}, "sources"),
        ({"sources": [{"name": "a", "inputs": ["x"], "weight": 0}]}, "weight"),
        ({"sources": [{"name": "a", "inputs": ["x"], "weight": 1}] * 2}, "same name"),
        ({"phases": [{"share": 1, "weights": {"b": 1}}]}, "'b', which is no source"),
        ({"phases": [{"share": 1, "weights": {"a": 0}}]}, "0 or more"),
        ({"tokenz": 3}, "did you mean 'tokens'"),
    ],
)
def test_wrong_recipes(change: dict, said: str, tmp_path: Path) -> None:
    values = {"tokenizer": "x", "tokens": 5, "sources": [{"name": "a", "inputs": ["x"], "weight": 1}]}
    path = tmp_path / "blend.yaml"
    path.write_text(json.dumps(values))
    assert load(path, Blend, {"workers": 2}).workers == 2
    path.write_text(json.dumps(values | change))
    with pytest.raises(InputError, match=said):
        load(path, Blend)
