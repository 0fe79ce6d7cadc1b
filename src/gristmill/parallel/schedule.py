"""Pipeline schedules: when each rank computes which micro-batch of which virtual stage; 1F1B, interleaved, and those with zero bubble.

Sources: Megatron-LM (arXiv 2104.04473); zero-bubble pipeline parallelism (2401.10241), in the order of torch's schedules.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

FORWARD, BACKWARD, INPUT, WEIGHT = "F", "B", "I", "W"  # a backward pass is whole, or its gradients of states and of matrices are apart
Pass = tuple[str, int, int]  # kind, micro-batch, virtual stage


@dataclass(frozen=True)
class Times:
    """What the passes of a virtual stage take: forward, gradients of states, and gradients of matrices; a backward pass has both."""

    forward: float = 1.0
    states: float = 1.0
    matrices: float = 1.0

    def of(self, kind: str) -> float:
        """Of a kind of pass."""
        whole = self.states + self.matrices
        return {FORWARD: self.forward, BACKWARD: whole, INPUT: self.states, WEIGHT: self.matrices}[kind]


@dataclass(frozen=True)
class Slot:
    """One pass of a micro-batch through a virtual stage; times in the unit of `Times`."""

    kind: str
    micro_batch: int
    stage: int
    start: float
    end: float


def order(schedule: str, pp: int, vp: int, num_micro_batches: int, rank: int) -> list[Pass]:
    """What a rank does, one pass after another. Needs a multiple of pp micro-batches where stages are interleaved."""
    if schedule == "zbv":
        return [one for one in _zbv(pp, max(2 * pp - 1, num_micro_batches), rank) if one[1] < num_micro_batches]
    assert vp == 1 or num_micro_batches % pp == 0
    return list(_one_forward_one_backward(pp, vp, num_micro_batches * vp, rank, parted=schedule == "zero-bubble"))


def _one_forward_one_backward(pp: int, vp: int, total: int, rank: int, *, parted: bool) -> Iterator[Pass]:
    """As many forward passes as later ranks wait for, then one forward and one backward pass in turn; parted, gradients of matrices come
    `rank` passes behind.
    """

    def nth(kind: str, k: int) -> Pass:
        group, within = divmod(k, pp * vp)
        micro_batch = group * pp + within % pp if vp > 1 else k
        chunk = within // pp if vp > 1 else 0
        return kind, micro_batch, (chunk if kind == FORWARD else vp - 1 - chunk) * pp + rank

    hops = pp - rank - 1
    warmup = min(total, (vp - 1) * pp + hops * (2 if vp > 1 and not parted else 1))
    yield from (nth(FORWARD, k) for k in range(warmup))
    for k in range(total):
        if warmup + k < total:
            yield nth(FORWARD, warmup + k)
        yield nth(INPUT if parted else BACKWARD, k)
        if parted and k >= rank:
            yield nth(WEIGHT, k - rank)
    if parted:
        yield from (nth(WEIGHT, k) for k in range(max(0, total - rank), total))


def _zbv(pp: int, num_micro_batches: int, rank: int) -> list[Pass]:
    """Two stages a rank, which lie as on the branches of a V: the first rank has the first and the last one."""
    down, up = rank, 2 * pp - 1 - rank
    done: Counter[tuple[str, int]] = Counter()
    out: list[Pass] = []

    def do(*passes: tuple[str, int]) -> None:
        for kind, stage in passes:
            out.append((kind, done[kind, stage], stage))
            done[kind, stage] += 1

    do(*[(FORWARD, down)] * (2 * (pp - rank) - 1))
    do(*[(FORWARD, up), (FORWARD, down)] * rank)
    do(*[(FORWARD, up), (INPUT, up), (WEIGHT, up)] * (pp - rank))
    while done[FORWARD, up] < num_micro_batches:
        do(*[(FORWARD, down)] * (done[FORWARD, down] < num_micro_batches))
        do((INPUT, down), (WEIGHT, down), (FORWARD, up), (INPUT, up), (WEIGHT, up))
    do(*[(INPUT, down), (INPUT, up)] * rank)
    do(*[(INPUT, down), (WEIGHT, down)] * (pp - rank))
    for stage in (up, down):
        do(*[(WEIGHT, stage)] * (done[INPUT, stage] - done[WEIGHT, stage]))
    return out


def timeline(schedule: str, pp: int, vp: int, num_micro_batches: int, times: Times = Times()) -> list[list[Slot]]:
    """The slots of each rank where every pass starts as soon as its rank is free and what it reads has been computed."""
    todo = [order(schedule, pp, vp, num_micro_batches, rank) for rank in range(pp)]
    last = pp * vp - 1
    ends: dict[Pass, float] = {}
    slots: list[list[Slot]] = [[] for _ in range(pp)]
    places = [0] * pp
    moved = True
    while moved:
        moved = False
        for rank in range(pp):
            while places[rank] < len(todo[rank]):
                kind, micro_batch, stage = todo[rank][places[rank]]
                before = read_by(kind, micro_batch, stage, last)
                if before is not None and before not in ends:
                    break
                free = slots[rank][-1].end if slots[rank] else 0.0
                start = max(free, ends[before] if before is not None else 0.0)
                slots[rank].append(Slot(kind, micro_batch, stage, start, start + times.of(kind)))
                ends[kind, micro_batch, stage] = slots[rank][-1].end
                places[rank] += 1
                moved = True
    assert places == [len(passes) for passes in todo], "a schedule waits for itself"
    return slots


def read_by(kind: str, micro_batch: int, stage: int, last: int) -> Pass | None:
    """The pass whose result another one reads; None where there is none but those before it on its own rank."""
    if kind == FORWARD:
        return (FORWARD, micro_batch, stage - 1) if stage else None
    if kind == WEIGHT:
        return INPUT, micro_batch, stage
    return (kind, micro_batch, stage + 1) if stage < last else (FORWARD, micro_batch, stage)


def bubble(schedule: str, pp: int, vp: int, num_micro_batches: int, times: Times = Times()) -> float:
    """What a step takes beside the passes of all its micro-batches, in the unit of `times`.

    (pp - 1) (F + I + W) with 1F1B, whole and interleaved, and (pp - 1) max(F, F + I - W) with the interleaved zero bubble. Other
    schedules, and fewer micro-batches, are played through; beyond two a rank their number changes nothing.
    """
    if schedule == "1f1b":
        return (pp - 1) * (times.forward + times.states + times.matrices)
    played = -(-num_micro_batches // pp) * pp if schedule == "zero-bubble" else num_micro_batches
    played = min(played, 2 * pp)
    end = max(row[-1].end for row in timeline(schedule, pp, vp, played, times))
    return end - played * vp * (times.forward + times.states + times.matrices)
