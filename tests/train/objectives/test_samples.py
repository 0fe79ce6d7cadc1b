"""Demonstrations and rated answers become samples; reward regression learns from present labels."""

from collections.abc import Callable

import pytest
import torch

from gristmill.core.errors import InputError
from gristmill.data.chat import Message
from gristmill.data.chat_format import FORMATS
from gristmill.data.rows import Demonstration, Rated
from gristmill.data.tokenizer import Tokenizer
from gristmill.model.reward import RewardModel
from gristmill.model.transformer import Transformer
from gristmill.train.batches import RatedBatch, RatedGroup, RatedSample, collate_rated, group_answers
from gristmill.train.objectives.reward import rated_samples, reward_objective
from gristmill.train.objectives.sft import demonstration_samples
from gristmill.train.trainer import LossOutput, Trainer, TrainSettings

CPU = torch.device("cpu")
TURNS = (
    Message("user", "one and one"),
    Message("assistant", "two"),
    Message("user", "and one"),
    Message("assistant", "three"),
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    names = [name for chat_format in FORMATS.values() for name in chat_format.special_tokens]
    return Tokenizer.train(["User Assistant System one two three and"] * 3, 400, names)


@pytest.mark.parametrize("name", list(FORMATS))
def test_every_assistant_turn_and_its_end_is_trained(tokenizer: Tokenizer, name: str) -> None:
    (sample,) = demonstration_samples([Demonstration("d", "sums", TURNS, "human")], FORMATS[name], tokenizer)
    end = FORMATS[name].end_of_turn_id(tokenizer)
    trained = [int(token) for token in sample.ids[sample.mask]]
    assert trained.count(end) == 2 and trained[-1] == end
    words = [
        word.strip()
        for word in tokenizer.decode(trained, keep_special=True).split(
            next(token for token in FORMATS[name].special_tokens if tokenizer.special_id(token) == end)
        )
    ]
    assert words == ["two", "three", ""] and sample.id == "d"


def test_a_conversation_without_an_answer_is_named(tokenizer: Tokenizer) -> None:
    rows = [Demonstration("good", "sums", TURNS, "human"), Demonstration("mute", "sums", TURNS[:1], "human")]
    with pytest.raises(InputError, match="conversation mute has nothing to learn from"):
        demonstration_samples(rows, FORMATS["nemotron"], tokenizer)
    with pytest.raises(InputError, match="conversation odd: "):
        demonstration_samples([Demonstration("odd", "sums", TURNS[1:], "human")], FORMATS["nemotron"], tokenizer)


@pytest.mark.parametrize("name", list(FORMATS))
def test_the_last_end_of_turn_is_scored(tokenizer: Tokenizer, name: str) -> None:
    (sample,) = rated_samples([Rated("r", "sums", TURNS, (4, 3, None, 1, 0))], FORMATS[name], tokenizer)
    end = FORMATS[name].end_of_turn_id(tokenizer)
    assert sample.ids[sample.end] == end and end not in list(sample.ids[sample.end + 1 :])
    assert sample.labels == [4, 3, -100, 1, 0] and sample.num_targets == 4


def test_bad_rated_rows_are_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="rated row r has 2 labels; give helpfulness"):
        rated_samples([Rated("r", "sums", TURNS, (1, 2))], FORMATS["nemotron"], tokenizer)
    with pytest.raises(InputError, match="rated row r does not end with the assistant"):
        rated_samples([Rated("r", "sums", TURNS[:3], (1, 2, 3, 4, 0))], FORMATS["nemotron"], tokenizer)


def test_answers_to_one_prompt_are_one_group(tokenizer: Tokenizer) -> None:
    other = (*TURNS[:3], Message("assistant", "one"))
    rows = [Rated(str(n), "sums", turns, (1, 2, 3, 4, 0)) for n, turns in enumerate((TURNS, TURNS[:2], other))]
    groups = group_answers(rated_samples(rows, FORMATS["nemotron"], tokenizer), 8, 1000)
    assert [[answer.id for answer in group.answers] for group in groups] == [["0", "2"], ["1"]]  # type: ignore[union-attr]


def test_scores_do_not_depend_on_neighbours(make_model: Callable[..., Transformer]) -> None:
    model = RewardModel(make_model())
    ids = [[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 4, 6], [7]]
    samples = [RatedSample(tokens, len(tokens) - 1, [0] * 5) for tokens in ids]
    batch = collate_rated([RatedGroup(samples[:3]), RatedGroup(samples[3:])], CPU)
    together = model(batch.ids_T, batch.shape, batch.ends_N)
    for row, sample in enumerate(samples):
        alone = collate_rated([RatedGroup([sample])], CPU)
        torch.testing.assert_close(model(alone.ids_T, alone.shape, alone.ends_N)[0], together[row], rtol=0, atol=1e-6)


def test_a_batch_of_reward_training_is_counted_in_answers(make_model: Callable[..., Transformer]) -> None:
    samples = [RatedSample([1, 2, number], 2, [0] * 5, id=str(number), prompt=str(number // 2)) for number in range(12)]
    sizes: list[int] = []

    def count(model: RewardModel, batch: RatedBatch) -> LossOutput:
        sizes.append(len(batch.ends_N))
        # both answers of a prompt, which is laid out once
        assert batch.num_tokens == 2 * len(batch.ends_N)
        return reward_objective(model, batch)

    Trainer(RewardModel(make_model()), count, TrainSettings(epochs=2, batch_size=4)).fit(samples)
    assert sizes == [4] * 6


def test_reward_training_learns_and_ignores_missing_labels(make_model: Callable[..., Transformer]) -> None:
    model = RewardModel(make_model())
    samples = [
        RatedSample([1, 2, 3], 2, [4, 3, 2, -100, 0], id="a"),
        RatedSample([4, 5, 3], 2, [0, 1, 2, -100, 4], id="b"),
        RatedSample([4, 5, 3], 2, [-100] * 5, id="unlabelled"),
    ]
    untouched = model.head.weight[3].detach().clone()
    settings = TrainSettings(lr=1e-2, weight_decay=0.0, schedule="constant", steps=150, batch_size=2)
    result = Trainer(model, reward_objective, settings).fit(samples)
    assert result.dropped_untrained == ["unlabelled"]
    assert result.metrics["loss"] < 0.02 and "mse_complexity" not in result.metrics
    assert result.metrics["mse_verbosity"] < 0.05
    assert torch.equal(model.head.weight[3], untouched)
    batch = collate_rated([RatedGroup(samples[:2])], CPU)
    scores = model(batch.ids_T, batch.shape, batch.ends_N)
    assert scores[0].tolist()[:3] == pytest.approx([4, 3, 2], abs=0.4)
