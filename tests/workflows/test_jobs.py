"""The single steps: pretrain, train, generate, rate, evaluate; and what each refuses before work."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from gristmill.core.config import load
from gristmill.core.errors import InputError
from gristmill.core.io import write_jsonl
from gristmill.core.progress import Progress
from gristmill.data.chat import Message
from gristmill.data.readers import read_pairs
from gristmill.data.tokenizer import Tokenizer
from gristmill.engine.load import answer_rows, load_engine
from gristmill.generation.api import SamplingParams
from gristmill.judge.reward import rate_file
from gristmill.model.config import PRESETS, ModelConfig, uniform_blocks
from gristmill.model.hf import load_model, load_reward
from gristmill.model.reward import ATTRIBUTES
from gristmill.train.settings import PreferenceTraining, Training
from gristmill.workflows import pretrain as pretraining_
from gristmill.workflows.evaluate import evaluate
from gristmill.workflows.train import train_model

RATED = {"helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 1, "verbosity": 2}
STEPS = Training(lr=1e-3, steps=2, batch_size=4)
PREFERENCE = PreferenceTraining(lr=1e-3, steps=2, batch_size=4)
DEMONSTRATIONS = [{"prompt": f"Say {i}.", "response": f"It is {i}."} for i in range(8)]
RATINGS = [{"prompt": f"Say {i // 2}.", "response": f"It is {i}.", **RATED} for i in range(8)]
PAIRS = [{"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": "No."} for i in range(8)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def config_file(folder: Path, **values: Any) -> Path:
    path = folder / "base.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    """A preset that is trained in no time."""
    config = ModelConfig("nemotron", 400, 16, uniform_blocks(1, 2, 1, 8, 32), max_positions=64)
    monkeypatch.setitem(PRESETS, "small", config)
    return config


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Documents with enough different words for 400 tokens."""
    words = ["".join(chr(97 + (i * k + k) % 26) for k in range(2, 7)) for i in range(300)]
    return write(tmp_path / "texts.jsonl", [{"text": " ".join(words[i % 300 : i % 300 + 12]) + "."} for i in range(400)])


# ---- pretrain ----


def pretraining(**values: Any) -> pretraining_.Pretraining:
    quick = {"preset": "small", "tokens": 2000, "batch_tokens": 500, "warmup_steps": 1, "precision": "fp32"}
    return pretraining_.Pretraining(**{**quick, **values})


@pytest.mark.parametrize("kind", ["world", "jsonl", "folder"])
def test_pretraining_from_each_kind_of_text(kind: str, small: ModelConfig, texts: Path, tmp_path: Path) -> None:
    if kind == "folder":
        (tmp_path / "library" / "deep").mkdir(parents=True)
        for i, line in enumerate(texts.read_text().splitlines()):
            (tmp_path / "library" / "deep" / f"{i}.txt").write_text(json.loads(line)["text"])
    source = {"world": {"world": "miniature"}, "jsonl": {"documents": texts}, "folder": {"documents": tmp_path / "library"}}[kind]
    steps: list[int] = []
    result = pretraining_.pretrain(pretraining(**source), tmp_path / "out", lambda step, total, metrics: steps.append(step))
    assert steps == list(range(1, result.steps + 1)) and result.steps >= 3 and math.isfinite(result.metrics["loss"])
    assert 2000 <= result.tokens <= 2200
    model, tokenizer = load_model(tmp_path / "out" / "model")
    assert model.config == small and tokenizer.has("<extra_id_1>")
    assert len((tmp_path / "out" / "train" / "metrics.jsonl").read_text().splitlines()) == result.steps


def test_pretraining_again_is_the_same_model_at_once(small: ModelConfig, texts: Path, tmp_path: Path) -> None:
    first = pretraining_.pretrain(pretraining(documents=texts), tmp_path / "out")
    weights = (tmp_path / "out" / "model" / "model.safetensors").read_bytes()
    again = pretraining_.pretrain(pretraining(documents=texts), tmp_path / "out", lambda *args: pytest.fail("it trained again"))
    assert again == first and (tmp_path / "out" / "model" / "model.safetensors").read_bytes() == weights


def test_pretraining_with_a_given_tokenizer(small: ModelConfig, texts: Path, tmp_path: Path) -> None:
    pretraining_.pretrain(pretraining(documents=texts), tmp_path / "one")
    pretraining_.pretrain(pretraining(documents=texts, tokenizer=tmp_path / "one" / "model", seed=1), tmp_path / "two")
    prints = [Tokenizer.load(tmp_path / name / "model").fingerprint() for name in ("one", "two")]
    assert prints[0] == prints[1]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "either world or documents"),
        ({"world": "miniature", "documents": "a.jsonl"}, "either world or documents"),
        ({"world": "miniature", "tokns": 5}, "did you mean 'tokens'"),
        ({"world": "miniature", "tokens": 0}, "tokens"),
    ],
)
def test_a_wrong_pretraining_recipe(values: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words) as caught:
        load(config_file(tmp_path, **values), pretraining_.Pretraining)
    assert "base.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_right_pretraining_recipe(tmp_path: Path) -> None:
    assert load(config_file(tmp_path, world="miniature", tokens=5), pretraining_.Pretraining).tokens == 5


@pytest.mark.parametrize("text", ["", "tokens: [", "- a"])
def test_a_file_that_is_no_pretraining_recipe(text: str, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(text)
    with pytest.raises(InputError, match="base.yaml"):
        load(tmp_path / "base.yaml", pretraining_.Pretraining)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "no documents"),
        ([{"text": "fine"}, {"txt": "?"}], "Row 2 .* no `text`"),
        ([{"text": 5}], "Row 1"),
        ([{"text": "a b"}], "tokens"),
    ],
)
def test_documents_that_cannot_be_used(rows: list[dict[str, Any]], words: str, small: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        pretraining_.pretrain(pretraining(documents=write(tmp_path / "bad.jsonl", rows), preset="miniature"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_size_is_refused_before_work(small: ModelConfig, texts: Path, tmp_path: Path, tiny_base: Path) -> None:
    with pytest.raises(InputError, match="tokenizer"):
        pretraining_.pretrain(pretraining(documents=texts, tokenizer=tiny_base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_preset(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="preset 'huge'.*miniature"):
        pretraining_.pretrain(pretraining(world="miniature", preset="huge"), tmp_path / "out")


# ---- train ----


@pytest.mark.parametrize(
    ("kind", "rows", "recipe"),
    [("sft", DEMONSTRATIONS, STEPS), ("reward", RATINGS, STEPS), ("dpo", PAIRS, PREFERENCE), ("rpo_sq", PAIRS, PREFERENCE)],
)
def test_each_kind_of_training(kind: str, rows: list[dict[str, Any]], recipe: Training, tmp_path: Path, random_base: Path) -> None:
    data, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    result = train_model(kind, random_base, data, out, recipe)
    assert result.steps == 2 and result.tokens > 0 and math.isfinite(result.metrics["loss"])
    if kind == "dpo":
        first = json.loads((out / "train" / "metrics.jsonl").read_text().splitlines()[0])
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    weights = (out / "model" / "model.safetensors").read_bytes()
    assert weights != (random_base / "model.safetensors").read_bytes()
    (load_reward if kind == "reward" else load_model)(out / "model")
    again = train_model(kind, random_base, data, out, recipe, on_step=lambda *args: pytest.fail("it trained again"))
    assert again == result and (out / "model" / "model.safetensors").read_bytes() == weights


def test_our_own_pairs_are_read_with_their_rewards(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}, {"role": "user", "content": "C?"}]
    row = {"id": "x", "task": "t", "messages": talk, "chosen": "D.", "rejected": "E.", "chosen_reward": 2.5, "rejected_reward": -1}
    own, plain = read_pairs(write(tmp_path / "pairs.jsonl", [row, PAIRS[0] | {"chosen_reward": None, "task": None}]))
    assert (own.id, own.task, own.chosen_reward, own.rejected_reward) == ("x", "t", 2.5, -1.0) and len(own.messages) == 3
    assert (plain.task, plain.chosen_reward, plain.rejected_reward) == ("", 1.0, 0.0) and plain.messages == (Message("user", "Say 0."),)


LONG = "word " * 100
BAD: list[tuple[str, list[dict[str, Any]], str]] = [
    ("sft", [], "holds no rows"),
    ("reward", [], "holds no rows"),
    ("dpo", [], "holds no pairs"),
    ("sft", [{"messages": [{"role": "assistant", "content": "Hi"}]}], "Row 1 .* starting with the user"),
    ("sft", [{"messages": [{"role": "user", "content": "Hi"}]}], "Row 1 .* end with the assistant"),
    ("sft", [{"prompt": LONG, "response": LONG}], "over 256 tokens"),
    ("reward", [{"prompt": "Q", "response": "A", **dict.fromkeys(RATED)}], "none of the columns"),
    ("reward", [{"prompt": LONG, "response": LONG, **RATED}], "over 256 tokens"),
    ("dpo", [{"prompt": "Q", "chosen": "A"}], "Row 1 .* lacks 'rejected'"),
    ("dpo", [{"chosen": "A", "rejected": "B"}], "Row 1 .* lacks 'prompt'"),
    ("dpo", [{"prompt": 5, "chosen": "A", "rejected": "B"}], "Row 1 .*text"),
    ("dpo", [{"messages": 5, "chosen": "A", "rejected": "B"}], "Row 1"),
    ("dpo", [{"prompt": "Q", "chosen": "A", "rejected": None}], "Row 1 .*text"),
    ("dpo", [{"prompt": "Q", "chosen": "A", "rejected": "B", "chosen_reward": "much"}], "Row 1 .*chosen_reward 'much'"),
    ("dpo", [{"prompt": "Q", "chosen": "A", "rejected": "A"}], "same answer on both sides"),
    ("dpo", [{"messages": [{"role": "assistant", "content": "Hi"}], "chosen": "A", "rejected": "B"}], "starting with the user"),
    ("rpo", [{"prompt": LONG, "chosen": LONG, "rejected": "B"}], "over 256 tokens"),
]


@pytest.mark.parametrize(("kind", "rows", "words"), BAD)
def test_rows_that_cannot_be_trained_on(kind: str, rows: list[dict[str, Any]], words: str, tmp_path: Path, random_base: Path) -> None:
    recipe = STEPS if kind in ("sft", "reward") else PREFERENCE
    with pytest.raises(InputError, match=words) as caught:
        train_model(kind, random_base, write(tmp_path / "bad.jsonl", rows), tmp_path / "out", recipe)
    assert "\n" not in str(caught.value) and not (tmp_path / "out" / "model").exists()


def test_a_folder_that_another_training_wrote(tmp_path: Path, random_base: Path) -> None:
    one, other = (write(tmp_path / f"{n}.jsonl", DEMONSTRATIONS[n:]) for n in (0, 1))
    train_model("sft", random_base, one, tmp_path / "out", STEPS)
    weights = (tmp_path / "out" / "model" / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="another data set"):
        train_model("sft", random_base, other, tmp_path / "out", STEPS)
    assert (tmp_path / "out" / "model" / "model.safetensors").read_bytes() == weights


def test_an_unknown_chat_format_lists_the_known(tmp_path: Path, random_base: Path) -> None:
    with pytest.raises(InputError, match="chatml"):
        train_model("sft", random_base, write(tmp_path / "d.jsonl", DEMONSTRATIONS), tmp_path / "out", STEPS, chat_format="chatlm")


# ---- generate, rate, evaluate ----


def test_answers_are_rows(tiny_base: Path) -> None:
    engine = load_engine(tiny_base)
    prompts = [[Message("user", f"Name a land. {i}")] for i in range(3)]
    rows = list(answer_rows(engine, prompts, SamplingParams(max_tokens=6, n=2), seed=7))
    assert sorted(r["index"] for r in rows) == [0, 1, 2] and engine.name == tiny_base.name
    for row in rows:
        assert row["messages"] == [{"role": "user", "content": f"Name a land. {row['index']}"}] and len(row["responses"]) == 2
        for r in row["responses"]:
            assert 1 <= r["num_tokens"] <= 6 and r["logprob"] < 0 and r["finish"] in ("stop", "length")
    again = list(answer_rows(engine, prompts, SamplingParams(max_tokens=6, n=2), seed=7))
    assert json.loads(json.dumps(again)) == rows


def test_ratings_have_five_attributes_and_a_score(tmp_path: Path, random_base: Path) -> None:
    train_model("reward", random_base, write(tmp_path / "r.jsonl", RATINGS), tmp_path / "out", STEPS)
    rows = rate_file(tmp_path / "out" / "model", write(tmp_path / "d.jsonl", DEMONSTRATIONS[:3]))
    model, _ = load_reward(tmp_path / "out" / "model")
    assert len(rows) == 3 == len({r["id"] for r in rows})
    for row in rows:
        assert set(row) == {"id", "score", *ATTRIBUTES}
        assert row["score"] == pytest.approx(sum(w * row[a] for w, a in zip(model.weights, ATTRIBUTES, strict=True)), abs=1e-3)


def test_a_language_model_does_not_rate(tmp_path: Path, random_base: Path) -> None:
    with pytest.raises(InputError, match="reward"):
        rate_file(random_base, write(tmp_path / "d.jsonl", DEMONSTRATIONS))


def test_evaluation_on_a_file(tmp_path: Path, tiny_base: Path) -> None:
    rows = [{"prompt": f"Ask {i}?", "answer": i, "task": "ab"[i % 2]} for i in range(6)]
    engine = load_engine(tiny_base)
    scores = evaluate(engine, write(tmp_path / "test.jsonl", rows), 5, 0, False, Progress(quiet=True))
    assert scores["greedy"].keys() == {"overall", "a", "b"} and scores["sampled"]["overall"]["n"] == 6
    assert len(scores["outcomes"]["greedy"]) == 6
    again = evaluate(engine, write(tmp_path / "test.jsonl", rows), 5, 0, False, Progress(quiet=True))
    assert again == scores


def test_an_evaluation_must_know_what_is_right(tmp_path: Path, tiny_base: Path) -> None:
    with pytest.raises(InputError, match="neither `truth` nor `answer`"):
        evaluate(load_engine(tiny_base), write(tmp_path / "t.jsonl", [{"prompt": "?"}]), 5, 0, False, Progress(quiet=True))


def test_rows_are_written_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    assert write_jsonl(path, ({"text": t} for t in ("\u00e9", "a\nb"))) == 2
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == ["\u00e9", "a\nb"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="rows.jsonl cannot be written"):
        write_jsonl(tmp_path / "file" / "rows.jsonl", [{}])
