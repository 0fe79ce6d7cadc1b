"""Pipeline schedules: they are torch's, and bubble and what is in flight are those that time and memory are planned with."""

from types import SimpleNamespace
from typing import Any

import pytest

from gristmill.parallel.layout import Layout, stages_of
from gristmill.parallel.memory import micro_batches_in_flight
from gristmill.parallel.schedule import BACKWARD, FORWARD, INPUT, WEIGHT, Times, bubble, order, read_by, timeline

SHAPES = [(1, 1, 3), (4, 1, 8), (4, 1, 5), (4, 2, 8), (2, 3, 4), (4, 4, 4), (12, 8, 36), (8, 12, 24)]
PARTED = [
    ("zero-bubble", 4, 2, 8),
    ("zero-bubble", 2, 3, 4),
    ("zero-bubble", 4, 4, 4),
    ("zbv", 4, 2, 9),
    ("zbv", 4, 2, 4),
    ("zbv", 8, 2, 32),
]
ALL = [("1f1b", *shape) for shape in SHAPES] + PARTED


@pytest.mark.parametrize(("pp", "vp", "m"), SHAPES)
def test_bubble_and_activations_in_flight(pp: int, vp: int, m: int) -> None:
    slots = timeline("1f1b", pp, vp, m)
    assert max(row[-1].end for row in slots) - 3 * m * vp == bubble("1f1b", pp, vp, m) == 3 * (pp - 1)
    layout = Layout(pp=pp, vp=vp, batch_size=m, seq_len=8)
    for rank, row in enumerate(slots):
        held = most = 0
        for slot in row:
            held += 1 if slot.kind == FORWARD else -1
            most = max(most, held)
        assert most / vp == micro_batches_in_flight(layout, rank)


@pytest.mark.parametrize(("schedule", "pp", "vp", "m"), PARTED)
@pytest.mark.parametrize("times", [Times(), Times(1, 1.3, 0.7), Times(1, 0.9, 1.2)])
def test_zero_bubble(schedule: str, pp: int, vp: int, m: int, times: Times) -> None:
    slots = timeline(schedule, pp, vp, m, times)
    whole = times.forward + times.states + times.matrices
    found = max(row[-1].end for row in slots) - m * vp * whole
    assert found == pytest.approx(bubble(schedule, pp, vp, m, times))
    if schedule == "zero-bubble":
        assert found == pytest.approx((pp - 1) * max(times.forward, whole - 2 * times.matrices))
    elif m >= 2 * pp and times == Times():  # nothing but what later ranks wait for at the start
        assert found == pp - 1 and all(row[-1].end - row[0].start == 3 * m * vp for row in slots)
    layout = Layout(pp=pp, vp=vp, schedule=schedule, batch_size=m, seq_len=8)
    for rank, row in enumerate(slots):
        held = [0]
        for slot in row:
            held.append(held[-1] + {FORWARD: 1, WEIGHT: -1}.get(slot.kind, 0))
        assert max(held) / vp <= micro_batches_in_flight(layout, rank)


@pytest.mark.parametrize(("schedule", "pp", "vp", "m"), ALL)
def test_nothing_is_computed_before_what_it_reads(schedule: str, pp: int, vp: int, m: int) -> None:
    slots = timeline(schedule, pp, vp, m)
    done = {(s.kind, s.micro_batch, s.stage): s for row in slots for s in row}
    assert len(done) == (2 if schedule == "1f1b" else 3) * m * pp * vp
    for (kind, micro_batch, stage), slot in done.items():
        before = read_by(kind, micro_batch, stage, pp * vp - 1)
        assert before is None or done[before].end <= slot.start
        assert kind not in (INPUT, BACKWARD) or done[FORWARD, micro_batch, stage].end <= slot.start
    for rank, row in enumerate(slots):
        assert {slot.stage for slot in row} == set(stages_of(schedule, pp, vp, rank))
        assert all(a.end <= b.start for a, b in zip(row, row[1:], strict=False))


@pytest.mark.parametrize(("schedule", "pp", "vp", "m"), PARTED)
def test_orders_are_torchs(schedule: str, pp: int, vp: int, m: int) -> None:
    from torch.distributed.pipelining import schedules

    theirs: Any = schedules.ScheduleZBVZeroBubble if schedule == "zbv" else schedules.ScheduleInterleavedZeroBubble
    facts = SimpleNamespace(pp_group_size=pp, _n_microbatches=m, num_stages=pp * vp, n_local_stages=vp, microbatches_per_round=pp)
    for rank in range(pp):
        actions = [action for action in theirs._calculate_single_rank_operations(facts, rank) if action]
        assert [(a.computation_type.value, a.microbatch_index, a.stage_index) for a in actions] == order(schedule, pp, vp, m, rank)
