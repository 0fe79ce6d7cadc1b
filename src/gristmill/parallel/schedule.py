"""Pipeline schedule: when each rank computes which micro-batch of which virtual stage, by 1F1B or its interleaved form."""

from dataclasses import dataclass

BACKWARD = 2.0  # in units of a forward pass of the same stage


@dataclass(frozen=True)
class Slot:
    """One forward or backward pass of a micro-batch through a virtual stage; times in forward passes of one virtual stage."""

    backward: bool
    micro_batch: int
    stage: int
    start: float
    end: float


def orders(pp: int, vp: int, num_micro_batches: int) -> list[list[tuple[bool, int, int]]]:
    """What each rank does in which order: (backward, micro-batch, virtual stage of all pp x vp). Needs a multiple of pp where vp > 1."""
    assert vp == 1 or num_micro_batches % pp == 0
    total = num_micro_batches * vp

    def pass_of(rank: int, k: int, backward: bool) -> tuple[bool, int, int]:
        group, within = divmod(k, pp * vp)
        chunk = within // pp
        micro_batch = group * pp + within % pp if vp > 1 else k
        chunk = vp - 1 - chunk if backward else chunk
        return backward, micro_batch, (chunk if vp > 1 else 0) * pp + rank

    out = []
    for rank in range(pp):
        warmup = min(total, (pp - rank - 1) * 2 + (vp - 1) * pp if vp > 1 else pp - rank - 1)
        order = [pass_of(rank, k, False) for k in range(warmup)]
        for k in range(warmup, total):
            order += [pass_of(rank, k, False), pass_of(rank, k - warmup, True)]
        out.append(order + [pass_of(rank, k, True) for k in range(total - warmup, total)])
    return out


def timeline(pp: int, vp: int, num_micro_batches: int) -> list[list[Slot]]:
    """The slots of each rank where every pass starts as soon as its rank is free and what it reads has been computed."""
    todo = orders(pp, vp, num_micro_batches)
    last = pp * vp - 1
    ends: dict[tuple[bool, int, int], float] = {}
    slots: list[list[Slot]] = [[] for _ in range(pp)]
    places = [0] * pp
    moved = True
    while moved:
        moved = False
        for rank in range(pp):
            while places[rank] < len(todo[rank]):
                backward, micro_batch, stage = todo[rank][places[rank]]
                if backward:
                    before = (True, micro_batch, stage + 1) if stage < last else (False, micro_batch, stage)
                else:
                    before = (False, micro_batch, stage - 1)
                if (backward or stage) and before not in ends:
                    break
                free = slots[rank][-1].end if slots[rank] else 0.0
                start = max(free, ends.get(before, 0.0))
                end = start + (BACKWARD if backward else 1.0)
                ends[(backward, micro_batch, stage)] = end
                slots[rank].append(Slot(backward, micro_batch, stage, start, end))
                places[rank] += 1
                moved = True
    assert places == [len(order) for order in todo], "a schedule waits for itself"
    return slots
