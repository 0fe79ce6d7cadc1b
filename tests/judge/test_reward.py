"""Scores of the reward model belong to the answer, whatever is scored beside it."""

import json
from dataclasses import astuple
from pathlib import Path

import pytest

from gristmill.core.errors import InputError
from gristmill.data.chat import Message
from gristmill.data.chat_format import FORMATS
from gristmill.data.tokenizer import Tokenizer
from gristmill.judge import reward
from gristmill.judge.reward import ANSWERS_TOGETHER, RewardScorer, load_scorer, rate_file
from gristmill.model.config import ModelConfig, uniform_blocks
from gristmill.model.hf import load_model
from gristmill.model.hf_save import save_reward
from gristmill.model.reward import ATTRIBUTES, RewardModel
from gristmill.model.transformer import Transformer
from tests.other_device import OTHER, other_device


@pytest.fixture(scope="module")
def scorer() -> RewardScorer:
    tokenizer = Tokenizer.train(["one two three and is"] * 3, 300, FORMATS["nemotron"].special_tokens)
    blocks = uniform_blocks(num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, ffn_size=32)
    model = Transformer(ModelConfig("nemotron", tokenizer.vocab_size, 16, blocks, max_positions=256, init_std=0.1))
    return RewardScorer(RewardModel(model), tokenizer, FORMATS["nemotron"])


def talk(question: str, answer: str) -> list[Message]:
    return [Message("user", question), Message("assistant", answer)]


def test_each_answer_gets_the_score_it_has_alone(scorer: RewardScorer) -> None:
    talks = [talk(f"one and {'two ' * (n % 3)}", "three " * (n % 5) + str(n)) for n in range(3 * ANSWERS_TOGETHER + 1)]
    scores = scorer.score(talks)
    assert len({rating.helpfulness for rating in scores}) > len(talks) // 2
    for messages, rating in zip(talks, scores, strict=True):
        assert astuple(scorer.score([messages])[0]) == pytest.approx(astuple(rating), abs=1e-5)


def test_a_talk_without_an_answer_is_refused(scorer: RewardScorer) -> None:
    with pytest.raises(InputError, match="Conversation 1 does not end with the assistant"):
        scorer.score([talk("one", "two"), talk("one", "two")[:1]])
    with pytest.raises(InputError, match="Conversation 0 has .* and the reward model's context is 256"):
        scorer.score([talk("one " * 300, "two")])


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    lines = [json.dumps({"prompt": f"Say {i}.", "response": f"It is {i}."}) for i in range(3)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_ratings_have_five_attributes_and_a_score(tmp_path: Path, rows: Path, random_base: Path) -> None:
    base, tokenizer = load_model(random_base)
    model = RewardModel(base)
    save_reward(model, tokenizer, tmp_path / "model")
    ratings = rate_file(tmp_path / "model", rows)
    assert len(ratings) == 3 == len({r["id"] for r in ratings})
    for rating in ratings:
        assert set(rating) == {"id", "score", *ATTRIBUTES}
        weighted = zip(model.weights, ATTRIBUTES, strict=True)
        assert rating["score"] == pytest.approx(sum(w * rating[a] for w, a in weighted), abs=1e-3)


def test_scores_are_the_same_on_another_device(tmp_path: Path, rows: Path, random_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tokenizer = load_model(random_base)
    save_reward(RewardModel(base), tokenizer, tmp_path / "model")
    here = rate_file(tmp_path / "model", rows, device="cpu")
    asked: list[str] = []
    monkeypatch.setattr(reward, "pick_device", lambda name: asked.append(name) or OTHER)
    with other_device():
        scorer = load_scorer(tmp_path / "model", device="cuda:1")
        assert scorer.model.head.weight.device == OTHER and asked == ["cuda:1"]
        there = rate_file(tmp_path / "model", rows)
    for one, other in zip(here, there, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_a_language_model_does_not_rate(rows: Path, random_base: Path) -> None:
    with pytest.raises(InputError, match="reward"):
        rate_file(random_base, rows)
