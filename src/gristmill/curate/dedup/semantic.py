"""Semantic deduplication (SemDeDup, 2303.09540): k-means over embeddings, then a cosine threshold inside each cluster.

    vectors of each shard -> start -> (sums of each shard -> centroids), again and again -> clusters of each shard -> drops of each part

Vectors are of length 1, or 0 where a document has nothing to be known by; such a one is like no other. Clusters are those of spherical
k-means (Dhillon and Modha 2001), begun as k-means++ does (Arthur and Vassilvitskii 2007), several centroids at a draw if there are many.
Inside a cluster a document is dropped if its cosine to any document *kept* before it is at least 1 - eps. (The public recipe compares with
all documents before it, so that one may go because of another that goes too; here each has a keeper that stays.)

Memory: a shard's vectors, the sample that the start is drawn from, or a cluster's kept vectors.
Shapes: N documents of a shard, D dimensions, K clusters, S documents of the sample, F features of one document.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numba import njit
from pydantic import Field

from gristmill.core.config import Section, SourceOrPath
from gristmill.core.errors import InputError
from gristmill.curate.dedup import minhash
from gristmill.curate.dedup.duplicates import write_drops
from gristmill.curate.io import shards
from gristmill.curate.outcome import hash_uniform
from gristmill.curate.quality import lm_scores
from gristmill.curate.text.text_column import TextColumn, longest
from gristmill.curate.text.words import buffers, signs_and_lower
from gristmill.data.minhash import GOLDEN, mix64

BLOCK = 1024  # vectors that are compared at once
SAMPLE = 65_536  # documents that the start is drawn from, at most
DRAWS = 64  # of centroids, at most
ROUNDING = 1e-6  # of a cosine in float32
STILL = 1e-4  # a move of all centroids, at most, after which k-means is at an end
COLUMN = "column:"


class Semantic(Section):
    """Semantic deduplication: of documents whose embeddings have a cosine of 1 - eps or more keep one."""

    step: Literal["semantic"] = "semantic"
    embedding: SourceOrPath = Field("hashed", min_length=1, description="hashed (words and pairs of words), column:NAME, or a model folder")
    dimensions: int = Field(256, gt=0, le=8192, description="of hashed vectors")
    clusters: int = Field(0, ge=0, description="0: the square root of the number of documents")
    iterations: int = Field(20, ge=0, description="of k-means, at most")
    eps: float = Field(0.01, ge=0, lt=1, description="1 - the min cosine of a duplicate")
    order: Literal["hard", "easy", "random"] = Field("hard", description="what stays: far from the centroid, near it, or by chance")
    seed: int = 0


def num_clusters(documents: int, how: Semantic) -> int:
    return how.clusters or max(1, round(documents**0.5))


# ---- vectors ----


@njit(cache=True, nogil=True)
def _hashed(data_B, begin_N, table, seed, vector_ND):  # type: ignore[no-untyped-def]
    """Sums of sign vectors of the words and pairs of words of each text, each weighted with log(1 + count)."""
    room = 2 * longest(begin_N)
    _, start_W, stop_W = buffers(begin_N)
    word_F, pair_F = np.empty(room, np.uint64), np.empty(room, np.uint64)
    for n in range(len(begin_N) - 1):
        data = data_B[begin_N[n] : begin_N[n + 1]]
        words = minhash.word_shingles(data, table, 1, word_F, start_W, stop_W)
        pairs = minhash.word_shingles(data, table, 2, pair_F, start_W, stop_W) if words > 1 else 0
        hash_F = np.sort(np.concatenate((word_F[:words], pair_F[:pairs])))
        vector = vector_ND[n]
        i = 0
        while i < len(hash_F):
            j = i + 1
            while j < len(hash_F) and hash_F[j] == hash_F[i]:
                j += 1
            weight = np.float32(np.log(1.0 + (j - i)))
            bits = hash_F[i] ^ seed
            for d in range(0, len(vector), 64):
                bits = mix64(bits + GOLDEN)
                for k in range(min(64, len(vector) - d)):
                    vector[d + k] += weight if (bits >> np.uint64(k)) & np.uint64(1) else -weight
            i = j


def _of_column(table: pa.Table, name: str) -> np.ndarray:
    if name not in table.column_names:
        raise InputError(f"The documents have no column {name!r}: check `embedding` of the step `semantic`.")
    column = table[name].combine_chunks()
    column = pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column
    try:
        column = column.cast(pa.list_(pa.float32()))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as e:
        raise InputError(f"The column {name!r} holds no lists of numbers: check `embedding` of the step `semantic`.") from e
    sizes = pc.list_value_length(column).drop_null().unique().to_pylist()
    if len(sizes) > 1:
        raise InputError(f"The vectors of the column {name!r} have several lengths, {sizes[0]} and {sizes[1]}: make them the same.")
    vector_ND = np.zeros((len(column), sizes[0] if sizes else 1), np.float32)
    vector_ND[column.is_valid().to_numpy(zero_copy_only=False)] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, *sizes)
    return np.nan_to_num(vector_ND, posinf=0.0, neginf=0.0)


def embed(shard: int, source: Path, out: Path, how: Semantic) -> dict[str, int]:
    """Embeddings of a shard's documents, float32, of length 1 or 0, and the number that each document draws."""
    table = shards.read(source)
    if how.embedding == "hashed":
        texts = TextColumn.of(table["text"])
        vector_ND = np.zeros((len(texts), how.dimensions), np.float32)
        _hashed(texts.data_B, texts.begin_N, signs_and_lower(), np.uint64(how.seed % 2**64), vector_ND)
    elif how.embedding.startswith(COLUMN):
        vector_ND = _of_column(table, how.embedding.removeprefix(COLUMN))
    else:
        vector_ND = lm_scores.mean_hidden_states(table["text"].to_pylist(), Path(how.embedding))
    shards.write(out, pa.table({"vector": shards.packed(_unit(vector_ND)), "uniform": hash_uniform(table["id"], how.seed, "rank")}))
    return {"dimensions": vector_ND.shape[1]}


def _unit(vector_ND: np.ndarray) -> np.ndarray:
    lengths = np.sqrt(np.einsum("nd,nd->n", vector_ND, vector_ND, dtype=np.float64))
    return (vector_ND / np.where(lengths > 0, lengths, 1.0)[:, None]).astype(np.float32)


def _unpacked(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    array = pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
    dimensions = array.type.byte_width // 4
    data = np.frombuffer(array.buffers()[1], np.float32)
    return data[array.offset * dimensions : (array.offset + len(array)) * dimensions].reshape(-1, dimensions)


def _vectors(path: Path) -> np.ndarray:
    table = shards.read(path)
    return _unpacked(table["vector"]) if len(table) else np.empty((0, table.schema.field("vector").type.byte_width // 4), np.float32)


# ---- k-means ----


def start(embeddings: Sequence[Path], out: Path, how: Semantic) -> dict[str, int]:
    """Initial centroids [K, D] (k-means++): documents of a sample, each drawn by its squared distance from those drawn before.

    They are fewer than asked for if there are no more that differ.
    """
    rows = [shards.num_rows(path) for path in embeddings]
    draw = np.random.default_rng(how.seed)
    chosen = np.sort(draw.choice(sum(rows), min(sum(rows), max(SAMPLE, 2 * how.clusters)), replace=False))
    ends = np.cumsum(rows)
    shard = np.searchsorted(ends, chosen, side="right")
    numbers = (shard << shards.ROW_BITS) + chosen - (ends - rows)[shard]
    sample_SD = _unpacked(shards.column_of(embeddings, numbers, "vector"))
    sample_SD = sample_SD[np.einsum("sd,sd->s", sample_SD, sample_SD) > 0.5]
    wanted = num_clusters(sum(rows), how)
    centroids = [np.zeros((0, sample_SD.shape[1]), np.float32)]
    weight_S = np.ones(len(sample_SD))
    count = 0
    while count < wanted:
        some = np.flatnonzero(weight_S > ROUNDING)
        if not len(some):
            break
        size = min(len(some), wanted - count, 1 if count == 0 else -(-wanted // DRAWS))
        new = draw.choice(some, size, replace=False, p=weight_S[some] / weight_S[some].sum())
        centroids.append(sample_SD[new])
        for begin in range(0, size, BLOCK):
            block = sample_SD[new[begin : begin + BLOCK]]
            for at in range(0, len(sample_SD), BLOCK):
                near = 1.0 - (sample_SD[at : at + BLOCK] @ block.T).max(1)  # half the squared distance
                weight_S[at : at + BLOCK] = np.minimum(weight_S[at : at + BLOCK], np.maximum(near, 0.0))
        count += size
    centroid_KD = np.concatenate(centroids)
    shards.write(out, pa.table({"vector": shards.packed(centroid_KD if count else np.zeros((1, sample_SD.shape[1]), np.float32))}))
    return {"clusters": max(1, count)}


def _nearest(vector_ND: np.ndarray, centroid_KD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The centroid of each vector, and the cosine: the same for the same vector, whatever stands beside it."""
    nearest = np.zeros(len(vector_ND), np.int64)
    for at in range(0, len(vector_ND), BLOCK):
        block = vector_ND[at : at + BLOCK]
        cosine = block @ centroid_KD.T
        nearest[at : at + BLOCK] = cosine.argmax(1)
        close = cosine >= cosine.max(1, keepdims=True) - 10 * ROUNDING
        for n in np.flatnonzero(close.sum(1) > 1).tolist():  # a product of matrices rounds by the place in the block
            among = np.flatnonzero(close[n])
            nearest[at + n] = among[(centroid_KD[among] * block[n]).sum(1).argmax()]
    return nearest, np.einsum("nd,nd->n", vector_ND, centroid_KD[nearest])


def sums(shard: int, embedding: Path, centroids: Path, out: Path) -> dict[str, float]:
    """Sums of a shard's vectors by their centroids, float64 [K, D], and how many they are."""
    vector_ND, centroid_KD = _vectors(embedding), _vectors(centroids)
    nearest, cosine = _nearest(vector_ND, centroid_KD)
    order = np.argsort(nearest, kind="stable")
    counts = np.bincount(nearest, minlength=len(centroid_KD))
    total_KD: np.ndarray = np.zeros(centroid_KD.shape)
    some = np.flatnonzero(counts)
    if len(some):
        total_KD[some] = np.add.reduceat(vector_ND[order].astype(np.float64), (np.cumsum(counts) - counts)[some])
    shards.write(out, pa.table({"total": shards.packed(total_KD)}))
    return {"cosine": float(cosine.sum())}


def centroids(partial: Sequence[Path], old: Path, out: Path) -> dict[str, float]:
    """Means of the sums of all shards, of length 1; a centroid that has no document stays. Returns how far the farthest has moved."""
    old_KD = _vectors(old)
    total_KD: np.ndarray = np.zeros(old_KD.shape)
    for path in partial:
        total_KD += np.frombuffer(shards.read(path)["total"].combine_chunks().buffers()[1], np.float64).reshape(old_KD.shape)
    new_KD = _unit(total_KD)
    empty = ~new_KD.any(1)
    new_KD[empty] = old_KD[empty]
    shards.write(out, pa.table({"vector": shards.packed(new_KD)}))
    return {"moved": float(np.sqrt(((new_KD - old_KD) ** 2).sum(1)).max())}


# ---- duplicates ----


def assign(shard: int, embedding: Path, centroids: Path, out: Path, parts: int, how: Semantic) -> dict[str, int]:
    """Cluster of each document of a shard, and its rank there: the lowest stays; those without a vector are left out."""
    vector_ND = _vectors(embedding)
    nearest, cosine = _nearest(vector_ND, _vectors(centroids))
    some = np.flatnonzero(vector_ND.any(1))
    if how.order == "random":
        rank = shards.read(embedding)["uniform"].to_numpy()
    else:
        rank = np.round((cosine if how.order == "hard" else -cosine).astype(np.float64), 6)
    names = {"cluster": nearest[some], "number": shards.number(shard, some), "rank": rank[some]}
    shards.write_parts(out, pa.table(names), nearest[some] % parts, num_parts=parts)
    return {}


def semantic_groups(part: int, assigned: Sequence[Path], embeddings: Sequence[Path], out: Path, how: Semantic) -> dict[str, int]:
    """What is to be dropped of the clusters of one part."""
    table = shards.read_part(assigned, part)
    cluster, number, rank = (table[name].to_numpy() for name in ("cluster", "number", "rank"))
    order = np.lexsort((number, rank, cluster))
    cluster, number = cluster[order], number[order]
    dropped: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for members in np.split(number, np.flatnonzero(np.diff(cluster)) + 1):
        if len(members) > 1:
            dropped.append(_resolve_cluster(members, embeddings, 1.0 - how.eps - ROUNDING))
    nothing = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
    numbers, keepers, figures = (np.concatenate(column) for column in zip(nothing, *dropped, strict=True))
    write_drops(out, numbers, keepers, figures=figures, num_shards=len(embeddings))
    return {"dropped": len(numbers)}


def _resolve_cluster(members: np.ndarray, embeddings: Sequence[Path], limit: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers, keepers and cosines of what is dropped of one cluster, whose members are in their order."""
    kept: list[tuple[np.ndarray, np.ndarray]] = []  # blocks of numbers and vectors
    keeper, figure = np.full(len(members), -1), np.zeros(len(members))
    for at in range(0, len(members), BLOCK):
        numbers = members[at : at + BLOCK]
        vector_ND = _unpacked(shards.column_of(embeddings, numbers, "vector"))
        mine, cosines = keeper[at : at + BLOCK], figure[at : at + BLOCK]  # views
        for earlier, kept_ND in kept:
            _mark(np.flatnonzero(mine < 0), vector_ND, earlier, kept_ND, limit, mine, cosines)
        stay = mine < 0
        like = vector_ND @ vector_ND.T
        for i in np.flatnonzero((np.triu(like, 1) >= limit).any(1)).tolist():
            if stay[i]:
                hits = i + 1 + np.flatnonzero(stay[i + 1 :] & (like[i, i + 1 :] >= limit))
                stay[hits], mine[hits], cosines[hits] = False, numbers[i], like[i, hits]
        kept.append((numbers[stay], vector_ND[stay]))
    gone = keeper >= 0
    return members[gone], keeper[gone], figure[gone]


def _mark(
    rows: np.ndarray, vector_ND: np.ndarray, earlier: np.ndarray, kept_ND: np.ndarray, limit: float, keeper: np.ndarray, figure: np.ndarray
) -> None:
    """Give those rows a keeper that are like one of the kept: the first such."""
    if not len(rows) or not len(earlier):
        return
    like = vector_ND[rows] @ kept_ND.T
    first = (like >= limit).argmax(1)
    cosine = like[np.arange(len(rows)), first]
    hit = cosine >= limit
    keeper[rows[hit]], figure[rows[hit]] = earlier[first[hit]], cosine[hit]
