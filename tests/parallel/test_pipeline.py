"""Pipeline parallelism without processes: which layers a stage has, how many micro-batches a step, and what is refused."""

import pytest
import torch

from gristmill.core.errors import InputError
from gristmill.model.compiled_blocks import takes
from gristmill.model.config import ModelConfig, uniform_blocks
from gristmill.model.packed import pack
from gristmill.model.reward import RewardModel
from gristmill.model.transformer import Transformer
from gristmill.parallel.mesh import ParallelDims
from gristmill.parallel.pipeline import TIED, Stage, num_micro_batches
from gristmill.train.sharded import check_parallel

BLOCKS = uniform_blocks(num_layers=6, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=40)
CONFIG = ModelConfig("llama", 48, 32, BLOCKS, max_positions=64, tie_embeddings=True)


def test_stages_have_all_parameters_once_and_share_their_memory() -> None:
    model = Transformer(CONFIG)
    whole = dict(model.named_parameters())
    found: dict[str, torch.Tensor] = {}
    for number in range(4):  # six layers and two more in four stages
        stage = Stage(model, number, 4)
        assert len(stage.decoder[0].blocks) == (1 if number in (0, 3) else 2)
        for name, parameter in stage.model.named_parameters():
            assert name not in found
            found[name] = parameter
    copy = found.pop(TIED)
    assert found.keys() == whole.keys() and all(found[name] is parameter for name, parameter in whole.items())
    assert torch.equal(copy, whole["embedding"]) and copy.data_ptr() != whole["embedding"].data_ptr()


def test_no_stage_is_computed_as_a_whole_decoder() -> None:
    model = Transformer(CONFIG)
    model.compute_dtype = torch.bfloat16
    assert not any(takes(Stage(model, number, 4).decoder[0]) for number in range(4))


def test_a_head_is_the_last_stages_and_needs_no_copy_of_the_embedding() -> None:
    names = [{name for name, _ in Stage(RewardModel(Transformer(CONFIG)), number, 2).model.named_parameters()} for number in (0, 1)]
    assert "backbone.embedding" in names[0] - names[1] and "head.weight" in names[1] - names[0]
    assert not any("lm_head" in name for name in names[1])


@pytest.mark.parametrize(
    ("wanted", "pp", "vp", "schedule", "number"),
    [
        (1, 4, 1, "1f1b", 4),
        (7, 4, 1, "1f1b", 7),
        (7, 4, 2, "1f1b", 8),
        (8, 4, 2, "zero-bubble", 8),
        (1, 2, 3, "1f1b", 2),
        (7, 4, 2, "zbv", 7),
    ],
)
def test_micro_batches_of_a_step(wanted: int, pp: int, vp: int, schedule: str, number: int) -> None:
    assert num_micro_batches(wanted, ParallelDims(pp=pp, vp=vp, schedule=schedule)) == number


@pytest.mark.parametrize(
    ("dims", "base", "said"),
    [
        (ParallelDims(pp=5), "", "divides the 6 layers"),
        (ParallelDims(pp=4, vp=2), "", "leave a stage of 8 without any"),
        (ParallelDims(tp=3), "", "divides the 4 attention heads"),
        (ParallelDims(tp=2), "nf4", "a matrix in nf4 cannot be cut"),
    ],
)
def test_what_a_model_cannot_be_cut_into_is_refused(dims: ParallelDims, base: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_parallel(CONFIG, dims, bases=[base])
    check_parallel(CONFIG, ParallelDims(tp=2, cp=3, pp=3, vp=2), bases=["int8"])
    check_parallel(CONFIG, ParallelDims(), bases=["nf4"])


@pytest.mark.parametrize(
    ("dims", "said"),
    [
        (ParallelDims(vp=2), "Leave --vp out"),
        (ParallelDims(pp=0), "numbers above zero"),
        (ParallelDims(pp=2, schedule="zbv"), "Give --vp 2 with"),
        (ParallelDims(pp=2, schedule="zero-bubble"), "Give --vp 2 or more"),
        (ParallelDims(schedule="gpipe"), "Choose --pp-schedule"),
    ],
)
def test_contradictions_are_refused(dims: ParallelDims, said: str) -> None:
    with pytest.raises(InputError, match=said):
        dims.check()


def test_micro_batches_are_filled_to_a_number_of_tokens() -> None:
    ids_T, shape, num_tokens = pack([[[1, 2, 3]], [[4, 5]]], torch.device("cpu"), fill=9)
    assert len(ids_T) == shape.num_tokens == 9 and num_tokens == 5 and shape.lengths == [3, 2, 1, 1, 1, 1]
