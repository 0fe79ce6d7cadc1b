"""Semantic duplicates: k-means over shards, and the greedy rule inside clusters against a plain version."""

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from gristmill.core.errors import InputError
from gristmill.curate.dedup import duplicates, semantic
from gristmill.curate.dedup.semantic import Semantic
from gristmill.curate.io import shards
from gristmill.curate.quality import lm_scores
from gristmill.model.hf import load_model
from gristmill.model.packed import PackedShape


def stored(folder: Path, texts: list[list[str]], vectors: list[np.ndarray] | None = None) -> list[Path]:
    paths = []
    for i, column in enumerate(texts):
        table = pa.table({"id": [f"d{i}.{j}" for j in range(len(column))], "text": pa.array(column, pa.large_string())})
        table = table.append_column("source", pa.array([""] * len(column))).append_column("meta", pa.array(["{}"] * len(column)))
        if vectors is not None:
            table = table.append_column("v", pa.array(list(vectors[i]), pa.list_(pa.float32())))
        paths.append(folder / f"s{i}.arrow")
        shards.write(paths[-1], table)
    return paths


def clustered(folder: Path, sources: list[Path], how: Semantic) -> tuple[list[Path], Path]:
    """Vectors and centroids, as `run` strings the tasks together."""
    num = len(sources)
    vectors, partial = [folder / f"v{i}" for i in range(num)], [folder / f"p{i}" for i in range(num)]
    for i in range(num):
        semantic.embed(i, sources[i], vectors[i], how)
    old = folder / "c0"
    semantic.start(vectors, old, how)
    for t in range(how.iterations):
        for i in range(num):
            semantic.sums(i, vectors[i], old, partial[i])
        new = folder / f"c{t + 1}"
        moved = semantic.centroids(partial, old, new)["moved"]
        old = new
        if moved < semantic.STILL:
            break
    return vectors, old


def dropped(folder: Path, sources: list[Path], how: Semantic, parts: int = 1) -> list[dict[str, str | float]]:
    num = len(sources)
    vectors, centroids = clustered(folder, sources, how)
    assigned, drops = [folder / f"a{i}" for i in range(num)], [folder / f"g{p}" for p in range(parts)]
    for i in range(num):
        semantic.assign(i, vectors[i], centroids, assigned[i], parts, how)
    for p in range(parts):
        semantic.semantic_groups(p, assigned, vectors, drops[p], how)
    return [row for i in range(num) for row in duplicates.drop(i, sources, drops, "semantic", 1 - how.eps).dropped.to_pylist()]


def of_vectors(folder: Path, vectors: list[np.ndarray], how: Semantic, parts: int = 1) -> dict[str, tuple[str, float]]:
    sources = stored(folder, [[f"{i} {j}" for j in range(len(one))] for i, one in enumerate(vectors)], vectors)
    rows = dropped(folder, sources, how.model_copy(update={"embedding": "column:v"}), parts)
    return {str(row["id"]): (str(row["reason"]).split()[-1], float(row["figure"])) for row in rows}


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("eps", [0.0, 0.01])
@pytest.mark.parametrize("clusters", [0, 1, 7, 40])
def test_identical_vectors_leave_one_of_a_group(tmp_path: Path, clusters: int, eps: float, parts: int) -> None:
    draw = np.random.default_rng(clusters)
    group = draw.integers(0, 25, 300)
    vectors = draw.standard_normal((25, 48)).astype(np.float32)[group] * draw.uniform(0.1, 9, (300, 1)).astype(np.float32)
    gone = of_vectors(tmp_path, np.array_split(vectors, 3), Semantic(clusters=clusters, eps=eps), parts)
    names = [f"d{i}.{j}" for i in range(3) for j in range(100)]
    kept = [g for g, name in zip(group.tolist(), names, strict=True) if name not in gone]
    assert sorted(kept) == sorted(set(group.tolist()))
    assert all(figure == pytest.approx(1, abs=1e-6) for _, figure in gone.values())


def test_without_eps_only_the_same_go(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    lm_scores = draw.standard_normal((50, 32))
    near = lm_scores + draw.standard_normal((50, 32)) * 0.01  # cosine about 1 - 5e-5
    gone = of_vectors(tmp_path, [lm_scores, np.concatenate([near, 3 * lm_scores[:10]])], Semantic(eps=0, clusters=3))
    pairs = {frozenset((name, keeper)) for name, (keeper, _) in gone.items()}
    assert pairs == {frozenset((f"d0.{j}", f"d1.{50 + j}")) for j in range(10)}


@pytest.mark.parametrize("order", ["hard", "easy", "random"])
def test_every_drop_has_a_keeper_and_no_two_kept_are_alike(tmp_path: Path, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semantic, "BLOCK", 16)  # so that a cluster is several
    draw = np.random.default_rng(1)
    angle = np.sort(draw.uniform(0, 3, 200))  # chains: each like the next, the ends not alike
    vectors = np.stack([np.cos(angle), np.sin(angle)], 1)
    how = Semantic(clusters=1, eps=0.01, order=order)  # type: ignore[arg-type]
    gone = of_vectors(tmp_path, np.array_split(vectors, 4), how, 2)
    unit = {f"d{i}.{j}": vectors[50 * i + j] for i in range(4) for j in range(50)}
    kept = [name for name in unit if name not in gone]
    like = np.array([[unit[a] @ unit[b] for a in kept] for b in kept])
    assert (like[~np.eye(len(kept), dtype=bool)] < 0.99 + 1e-5).all() and 5 < len(kept) < 60
    for name, (keeper, figure) in gone.items():
        assert keeper in kept and figure == pytest.approx(unit[name] @ unit[keeper], abs=1e-5) and figure >= 0.99 - 1e-5
    # the first in the order stays in any case
    sources = [tmp_path / f"s{i}.arrow" for i in range(4)]
    (centroid,) = semantic._vectors(clustered(tmp_path, sources, how.model_copy(update={"embedding": "column:v"}))[1])
    cosine = {name: float(vector @ centroid) for name, vector in unit.items()}
    if order != "random":
        assert (min if order == "hard" else max)(cosine, key=lambda name: cosine[name]) in kept


def test_k_means_finds_what_is_apart_whatever_the_shards(tmp_path: Path) -> None:
    draw = np.random.default_rng(2)
    centers = np.linalg.qr(draw.standard_normal((16, 16)))[0][:6]
    group = draw.integers(0, 6, 240)
    vectors = centers[group] + 0.05 * draw.standard_normal((240, 16))
    found = []
    for num in (1, 5):
        folder = tmp_path / str(num)
        folder.mkdir()
        pieces = np.array_split(vectors, num)
        sources = stored(folder, [["x"] * len(piece) for piece in pieces], pieces)
        _, centroids = clustered(folder, sources, Semantic(embedding="column:v", clusters=6))
        found.append(semantic._vectors(centroids))
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert np.sort((found[0] @ centers.T).argmax(1)).tolist() == list(range(6))
    assert (found[0] @ centers.T).max(1).min() > 0.99


def test_hashed_vectors_know_like_texts(tmp_path: Path) -> None:
    draw = random.Random(0)
    texts = [[f"w{draw.randrange(3000)}" for _ in range(200)] for _ in range(40)]
    near = [[*one[:-1], "else"] for one in texts[:10]]
    columns = [[" ".join(one) for one in texts], ["", "x", " \n", *(" ".join(one).upper() for one in near)]]
    rows = dropped(tmp_path, stored(tmp_path, columns), Semantic(eps=0.05, clusters=2), 2)
    pairs = {frozenset((str(row["id"]), str(row["reason"]).split()[-1])) for row in rows}
    assert pairs == {frozenset((f"d0.{j}", f"d1.{3 + j}")) for j in range(10)}
    assert {row["step"] for row in rows} == {"semantic"} and {row["limit"] for row in rows} == {0.95}
    vectors = semantic._vectors(tmp_path / "v0")
    like = vectors @ vectors.T - np.eye(40)
    assert vectors.shape == (40, 256) and abs(like.mean() - 200 / 3000 / 2) < 0.005  # words in common, of words and pairs
    assert like.max() < 0.5


@pytest.mark.parametrize("texts", [[[""]], [["", " "], ["x"]], [["x"], ["x", ""]], [["a line\n"], ["a line"]]])
def test_small_documents_pass(tmp_path: Path, texts: list[list[str]]) -> None:
    rows = dropped(tmp_path, stored(tmp_path, texts), Semantic(), 2)
    assert len(rows) == max(0, sum(bool(text.strip()) for column in texts for text in column) - 1)


def test_vectors_of_a_model_are_means_of_its_states(tmp_path: Path, random_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_scores, "PACK_TOKENS", 20)
    texts = ["a b c", "", "b " * 300, "c c a", "a b c"]
    (source,) = stored(tmp_path, [texts])
    semantic.embed(0, source, tmp_path / "v", Semantic(embedding=str(random_base)))
    vectors = semantic._vectors(tmp_path / "v")
    model, tokenizer = load_model(random_base)
    for text, vector in zip(texts, vectors, strict=True):
        ids = tokenizer.encode(text)[:256]  # all that this model reads
        mean = model.hidden(torch.tensor(ids), PackedShape.from_lengths([len(ids)])).mean(0).detach().numpy() if ids else np.zeros(16)
        assert vector == pytest.approx(mean / (np.linalg.norm(mean) or 1), abs=1e-5)


def test_columns_that_are_no_vectors(tmp_path: Path) -> None:
    (source,) = stored(tmp_path, [["a", "b"]], [np.ones((2, 3))])
    with pytest.raises(InputError, match="no column 'w'"):
        semantic.embed(0, source, tmp_path / "v", Semantic(embedding="column:w"))
    with pytest.raises(InputError, match="no lists of numbers"):
        semantic.embed(0, source, tmp_path / "v", Semantic(embedding="column:text"))
    table = shards.read(source)
    ragged = pa.array([[1.0], [1.0, 2.0]], pa.list_(pa.float64()))
    shards.write(tmp_path / "r", table.set_column(table.schema.get_field_index("v"), "v", ragged))
    with pytest.raises(InputError, match="several lengths, 1 and 2"):
        semantic.embed(0, tmp_path / "r", tmp_path / "v", Semantic(embedding="column:v"))
    missing = pa.array([None, [3.0, 4.0]], pa.list_(pa.float64()))
    shards.write(tmp_path / "m", table.set_column(table.schema.get_field_index("v"), "v", missing))
    semantic.embed(0, tmp_path / "m", tmp_path / "v", Semantic(embedding="column:v"))
    assert semantic._vectors(tmp_path / "v") == pytest.approx(np.array([[0, 0], [0.6, 0.8]]))
