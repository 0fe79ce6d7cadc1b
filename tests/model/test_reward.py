"""The reward head: which state it reads, the weighted sum, its start."""

import pytest
import torch

from gristmill.core.errors import InputError
from gristmill.data.rows import Rating
from gristmill.model.config import ModelConfig, uniform_blocks
from gristmill.model.packed import PackedShape
from gristmill.model.reward import ATTRIBUTES, REWARD_WEIGHTS, RewardModel
from gristmill.model.transformer import Transformer

CONFIG = ModelConfig("nemotron", 50, 32, uniform_blocks(2, 4, 2, 8, 64), 64, init_std=0.2)


def test_the_order_of_attributes() -> None:
    assert ATTRIBUTES == ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def test_published_weights_give_the_published_scores() -> None:
    rating = Rating(1.6171875, 1.6484375, 3.3125, 0.546875, 0.515625)
    expected = {"nemotron4-340b": 3.315625, "llama3-70b": 3.955078, "goodness": 3.860547}
    for name, score in expected.items():
        assert rating.score(REWARD_WEIGHTS[name]) == pytest.approx(score, abs=1e-6)
    assert RewardModel(Transformer(CONFIG)).weights == (0.3, 0.74, 0.46, 0.47, -0.33)


def test_scores_depend_on_nothing_but_their_own_conversation() -> None:
    model = RewardModel(Transformer(CONFIG))
    first_T, second_T = torch.arange(10), torch.arange(20, 36)
    with torch.no_grad():
        packed = model(torch.cat([first_T, second_T]), PackedShape.from_lengths([10, 16]), torch.tensor([9, 23]))
        one = model(first_T, PackedShape.from_lengths([10]), torch.tensor([9]))
        # What follows the scored token (here positions 14 and 15) must not matter.
        two = model(second_T[:14], PackedShape.from_lengths([14]), torch.tensor([13]))
    torch.testing.assert_close(packed, torch.cat([one, two]), atol=1e-5, rtol=0)
    assert packed.dtype == torch.float32 and packed.shape == (2, 5)


def test_the_state_of_the_end_token_itself_is_read() -> None:
    model, shape = RewardModel(Transformer(CONFIG)), PackedShape.from_lengths([6, 4])
    ids_T, ends_N = torch.arange(10), torch.tensor([3, 9])
    with torch.no_grad():
        model.head.bias.copy_(torch.arange(5.0))
        before = model(ids_T, shape, ends_N)
        for token, moved in [(3, [True, False]), (4, [False, False]), (9, [False, True])]:
            changed_T = ids_T.clone()
            changed_T[token] = 40
            differs_N = (model(changed_T, shape, ends_N) - before).abs().amax(dim=1) > 1e-3
            assert differs_N.tolist() == moved
        states_N = model.backbone.hidden(ids_T, shape)[ends_N]
        torch.testing.assert_close(before, states_N @ model.head.weight.T + torch.arange(5.0))


def test_head_starts_like_a_matrix_of_the_backbone_and_has_a_bias() -> None:
    config = ModelConfig("nemotron", 50, 512, uniform_blocks(1, 4, 2, 8, 64), 64, init_std=0.2)
    head = RewardModel(Transformer(config)).head
    assert head.weight.std().item() == pytest.approx(0.2, rel=0.05)
    assert head.bias.tolist() == [0.0] * 5


def test_scores_are_fp32_under_bf16_compute() -> None:
    model = RewardModel(Transformer(CONFIG))
    model.backbone.compute_dtype = torch.bfloat16
    assert model(torch.arange(5), PackedShape.from_lengths([5]), torch.tensor([4])).dtype == torch.float32


def test_one_weight_an_attribute() -> None:
    with pytest.raises(InputError, match="5 aggregation weights"):
        RewardModel(Transformer(CONFIG), [1.0, 2.0])
