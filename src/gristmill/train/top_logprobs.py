"""A teacher's largest log-probabilities on disk, so that it need not be in memory while a student is distilled from it.

One file of rows, one a trained target in the order of the samples: K tokens and their log-probabilities, 8 bytes each. It is named after
teacher, text, precision and K, appended to group by group, and renamed when it is whole; a start that was killed goes on behind its last
whole group. Training maps it into memory.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from gristmill.core.errors import InputError
from gristmill.core.io import disk_errors, make_folder
from gristmill.core.threads import num_workers, workers
from gristmill.model.flops import CHUNK_LOGITS
from gristmill.model.transformer import Transformer, soft_cap
from gristmill.train.batches import Sample, TaughtSample, collate_tokens, fills, fingerprint_samples, neighbours
from gristmill.train.checkpoint import fingerprint_text

GROUP_TOKENS = 4096  # that the teacher reads at once; a restart goes on behind whole groups, so nothing else may decide them
SPARE_BYTES = 64 << 20  # that stay free
Tick = Callable[[int, int, str], None]  # done, of how many, of what


def check_top_k(top_k: int | None, vocab_size: int) -> None:
    """InputError where a vocabulary has not so many tokens."""
    if top_k is not None and top_k > vocab_size:
        raise InputError(f"teacher_top_k {top_k} is more than the {vocab_size} tokens of the vocabulary: lower it.")


def taught_samples(
    samples: Sequence[Sample],
    folder: Path,
    teacher: Callable[[], Transformer],
    *,
    identity: str,
    top_k: int,
    max_tokens: int,
    precision: str,
    tick: Tick = lambda done, total, note: None,
) -> list[Sample]:
    """The samples with their teacher's `top_k` largest log-probabilities; those that no training takes (too long, no target) as they are.

    Args:
        folder: of the file.
        teacher: loads it, if anything is missing; it is let go afterwards.
        identity: fingerprint of the teacher.
        max_tokens: of the longest sample that is trained on.
        precision: that the teacher computes in.

    Raises:
        InputError: the disk has no room, before anything is computed.
    """
    usable = [sample for sample in samples if sample.num_targets and sample.num_tokens <= max_tokens]
    if not usable:
        return list(samples)
    row = np.dtype([("ids", "<i4", (top_k,)), ("logprobs", "<f4", (top_k,))])
    key = fingerprint_text(f"{identity} {fingerprint_samples(usable)} {precision} {top_k}")
    path = folder / f"teacher-{key}.bin"
    num_rows = sum(sample.num_targets for sample in usable)
    with disk_errors(folder):
        make_folder(folder)
        if not path.exists() or path.stat().st_size != num_rows * row.itemsize:
            _write(path, usable, teacher, row, top_k, precision, tick)
        rows = np.memmap(path, dtype=row, mode="r", shape=(num_rows,))
    ends = np.cumsum([sample.num_targets for sample in usable])
    tops = {id(sample): rows[end - sample.num_targets : end] for sample, end in zip(usable, ends, strict=True)}
    return [TaughtSample(one.ids, one.mask, one.id, top=tops[id(one)]) if id(one) in tops else one for one in samples]


def _write(
    path: Path, samples: Sequence[Sample], load: Callable[[], Transformer], row: np.dtype, top_k: int, precision: str, tick: Tick
) -> None:
    groups = list(neighbours(samples, GROUP_TOKENS))
    sizes = [sum(sample.num_targets for sample in group) for group in groups]
    part = path.with_suffix(".part")
    found = part.stat().st_size // row.itemsize if part.exists() else 0
    num_done = int(np.searchsorted(np.cumsum(sizes), found, side="right"))  # groups that are whole
    begun = sum(sizes[:num_done]) * row.itemsize
    needed, free = sum(sizes) * row.itemsize - begun + SPARE_BYTES, shutil.disk_usage(path.parent).free
    if needed > free:
        raise InputError(
            f"The teacher's {top_k} largest log-probabilities of {sum(sizes):,} tokens take {needed / 1e9:.1f} GB more, and "
            f"{free / 1e9:.1f} GB are free at {path.parent}: free some space, or lower teacher_top_k."
        )
    teacher = load()
    device, count = teacher.embedding.device, num_workers(teacher)

    def work(group: Sequence[Sample]) -> bytes:
        return _top_rows(teacher, group, device, fill=fills(device, precision, count), row=row, top_k=top_k)

    with part.open("ab") as file, workers(count) as each:
        file.truncate(begun)
        for start in range(num_done, len(groups), count):
            for data in each(work, groups[start : start + count]):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())  # the size alone says what is done
            tick(min(start + count, len(groups)), len(groups), "groups read by the teacher")
    part.replace(path)


@torch.no_grad()
def _top_rows(teacher: Transformer, group: Sequence[Sample], device: torch.device, *, fill: bool, row: np.dtype, top_k: int) -> bytes:
    batch = collate_tokens(group, device, fill=fill)
    hidden_RD = teacher.hidden(batch.ids_T, batch.shape, batch.rows_R)
    weight_VD = teacher.unembedding().to(hidden_RD.dtype)
    out = np.empty(batch.count, row)
    step = max(1, CHUNK_LOGITS // len(weight_VD))
    for start in range(0, batch.count, step):
        logits_CV = soft_cap((hidden_RD[start : start + step] @ weight_VD.T).float(), teacher.config.logits_soft_cap)
        logprobs_CK, ids_CK = logits_CV.log_softmax(-1).topk(top_k)
        out["ids"][start : start + step], out["logprobs"][start : start + step] = ids_CK.cpu().numpy(), logprobs_CK.cpu().numpy()
    return out.tobytes()
