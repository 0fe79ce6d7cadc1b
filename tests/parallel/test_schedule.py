"""The pipeline's schedule: its bubble and what it holds in flight are those that time and memory are planned with."""

import pytest

from gristmill.parallel.layout import Layout
from gristmill.parallel.memory import micro_batches_in_flight
from gristmill.parallel.schedule import BACKWARD, timeline

SHAPES = [(1, 1, 3), (4, 1, 8), (4, 1, 5), (4, 2, 8), (2, 3, 4), (4, 4, 4), (12, 8, 36), (8, 12, 24)]


@pytest.mark.parametrize(("pp", "vp", "m"), SHAPES)
def test_bubble_and_activations_in_flight(pp: int, vp: int, m: int) -> None:
    slots = timeline(pp, vp, m)
    end = max(row[-1].end for row in slots)
    assert end / ((1 + BACKWARD) * m * vp) - 1 == pytest.approx((pp - 1) / (vp * m))
    layout = Layout(pp=pp, vp=vp, batch_size=m, seq_len=8)
    for rank, row in enumerate(slots):
        held = most = 0
        for slot in row:
            held += -1 if slot.backward else 1
            most = max(most, held)
        assert most / vp == micro_batches_in_flight(layout, rank)


@pytest.mark.parametrize(("pp", "vp", "m"), SHAPES)
def test_nothing_is_computed_before_what_it_reads(pp: int, vp: int, m: int) -> None:
    slots = timeline(pp, vp, m)
    done = {(s.backward, s.micro_batch, s.stage): s for row in slots for s in row}
    assert len(done) == 2 * m * pp * vp
    for (backward, micro_batch, stage), slot in done.items():
        before = done.get((backward, micro_batch, stage + 1 if backward else stage - 1))
        before = done[(False, micro_batch, stage)] if backward and before is None else before
        assert before is None or before.end <= slot.start
    for row in slots:
        assert all(a.end <= b.start for a, b in zip(row, row[1:], strict=False))
