"""Steps that are recorded in pieces, without a GPU: computed anew where a graph would be replayed."""

import pytest
import torch

from gristmill.engine.cuda_graph import PiecewiseGraphs
from gristmill.model.config import BlockConfig
from tests.engine.test_core import WIDE, core_of, finish, model_of, states_of

NARROW = (BlockConfig(0, 0, 0, 64), BlockConfig(4, 2, 8, 64), BlockConfig(2, 2, 8, 48), BlockConfig(0, 0, 0, 64))


@pytest.mark.parametrize(("family", "blocks"), [("nemotron", WIDE), ("llama", NARROW)])
def test_steps_in_pieces_give_the_same_answers(family: str, blocks: tuple[BlockConfig, ...]) -> None:
    model = model_of(family, blocks)
    plain = finish(core_of(model), states_of(6, answer=8))
    core, sizes = core_of(model), []
    runner = core.model_runner
    runner.compiled_decoder = None  # small steps would go through it
    graphs = runner.piecewise_graphs = PiecewiseGraphs(runner.decoder, runner.attention)
    with torch.inference_mode():
        graphs.record([1, 8, 40, 200])
    run = graphs.run
    graphs.run = lambda ids, last_R: (sizes.append(len(ids)), run(ids, last_R))[1]  # type: ignore[method-assign]
    assert finish(core, states_of(6, answer=8)) == plain
    assert min(sizes) <= 8 and 40 < max(sizes) <= 200, "of several sizes"
    core.refresh()
    assert not graphs.captured and not graphs.fits(1)
