"""What a model of ours says of documents."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from gristmill.core.errors import InputError
from gristmill.curate.outcome import DOCUMENT
from gristmill.curate.quality import lm_scores
from gristmill.curate.quality.buckets import Quality, measure, models
from gristmill.model.hf import load_model
from gristmill.model.packed import PackedShape

TEXTS = ["the sum of two numbers", "", "x", "qz#" * 3000, "\u00e9t\u00e9 \u65e5\u672c"]


def test_bits_are_those_of_the_models_logits(random_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_scores, "MAX_TOKENS", 40)
    model, tokenizer = load_model(random_base)
    found = lm_scores.bits_per_byte(TEXTS, random_base)
    for text, bits_per_byte in zip(TEXTS, found, strict=True):
        ids = tokenizer.encode(text)[:40]
        if not ids:
            assert np.isnan(bits_per_byte)
            continue
        logits = model(torch.tensor([tokenizer.eos_id, *ids[:-1]]), PackedShape.from_lengths([len(ids)]))
        nats = -torch.log_softmax(logits.double(), -1)[range(len(ids)), ids].sum().item()
        assert bits_per_byte == pytest.approx(nats / np.log(2) / len(tokenizer.decode(ids).encode()), rel=1e-4)


def test_documents_do_not_depend_on_those_beside_them(random_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together, means = lm_scores.bits_per_byte(TEXTS, random_base), lm_scores.mean_hidden_states(TEXTS, random_base)
    monkeypatch.setattr(lm_scores, "PACK_TOKENS", 1)
    assert np.allclose(lm_scores.bits_per_byte(TEXTS, random_base), together, equal_nan=True, rtol=1e-4)
    assert np.allclose(lm_scores.mean_hidden_states(TEXTS, random_base), means, atol=1e-5) and not means[1].any()


def test_what_it_has_learnt_is_better(tiny_base: Path) -> None:
    texts = ["How many of them are there?", "sewom yna htiw eraht fo ynam?", "{}[];;0x0x$$%%"]
    table = pa.table([["a", "b", "c"], texts, ["", "", ""], ["{}", "{}", "{}"]], schema=DOCUMENT)
    settings = Quality(classifiers=[f"perplexity:{tiny_base}"])
    models(settings)
    own, wrong, none = measure(table, settings)["score_0"].to_pylist()
    assert own > wrong > none


def test_a_folder_without_a_model(tmp_path: Path, random_base: Path) -> None:
    lm_scores.check(random_base)
    with pytest.raises(InputError, match="config.json does not exist"):
        lm_scores.check(tmp_path)
    sound = (random_base / "config.json").read_text()
    for config, words in (("{", "not valid JSON"), ("{}", "is not supported"), ("[]", "no JSON object"), (sound, "needs its tokenizer")):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(InputError, match=words):
            models(Quality(classifiers=[f"perplexity:{tmp_path}"]))
