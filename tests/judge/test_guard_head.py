"""The guard head: rows with labels, thresholds, and an invented taxonomy of the miniature world whose truth a program knows."""

import dataclasses
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from gristmill.core.errors import InputError
from gristmill.data.chat import Message
from gristmill.evaluate.stats import wilson
from gristmill.judge.guard_head import fit_thresholds, load_guard_scorer, read_labelled, split_held_out
from gristmill.judge.guards import AEGIS, Category, Taxonomy
from gristmill.miniature.base import BASE
from gristmill.miniature.world import World
from gristmill.model.hf import load_guard, load_model
from gristmill.train.losses import masked_bce
from gristmill.train.settings import Training
from gristmill.workflows.train import train_model

INVENTED = Taxonomy((Category("X1", "Doubling"), Category("X2", "Beasts"), Category("X3", "Lists")), "X3")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def codes_of(question: str) -> list[str]:
    """The truth of the invented taxonomy."""
    signs = {"X1": r"times as many", "X2": r"which animal", "X3": r"^(?:Name|List) "}
    return [code for code, sign in signs.items() if re.search(sign, question)]


def invented(num: int, seed: int) -> list[dict[str, Any]]:
    world, rng = World.make(), random.Random(seed)
    rows = []
    for i in range(num):
        problem = world.draw(rng, rng.choice(("facts", "sums", "code", "lists")))
        talk = [{"role": "user", "content": problem.question}]
        if i % 2:
            talk.append({"role": "assistant", "content": problem.answer})
        rows.append({"messages": talk, "codes": codes_of(problem.question)})
    return rows


def test_f1_on_held_out_prompts_of_an_invented_taxonomy(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", invented(480, 1))
    recipe = Training(lr=3e-3, steps=40, batch_size=16, precision="fp32")
    train_model("guard", BASE, data, out=tmp_path / "guard", recipe=recipe, taxonomy=INVENTED, max_fpr=0.005)
    model, _ = load_guard(tmp_path / "guard" / "model")
    assert model.codes == ("X1", "X2", "X3") and model.caution == "X3" and len(model.thresholds) == 3
    held = invented(160, 2)
    scorer = load_guard_scorer(tmp_path / "guard" / "model")
    verdicts = scorer.verdicts([tuple(Message(m["role"], m["content"]) for m in row["messages"]) for row in held])
    pairs = [(code in row["codes"], code in verdict.codes) for row, verdict in zip(held, verdicts, strict=True) for code in INVENTED.codes]
    found, missed, wrong = (pairs.count(kind) for kind in ((True, True), (True, False), (False, True)))
    assert wilson(found, found + missed + wrong)[0] > 0.6  # F1 is above the share of hits among hits and errors
    assert {v.role for v in verdicts} == {"user", "assistant"} and all(set(v.scores) == {"X1", "X2", "X3", "unsafe"} for v in verdicts)
    scorer.permissive = True
    only_caution = next(i for i, verdict in enumerate(verdicts) if verdict.codes == ("X3",))
    talk = tuple(Message(m["role"], m["content"]) for m in held[only_caution]["messages"])
    (lenient,) = scorer.verdicts([talk])
    assert verdicts[only_caution].unsafe and not lenient.unsafe and lenient.codes == ("X3",)
    with pytest.raises(InputError, match="holds a guard model"):
        load_model(tmp_path / "guard" / "model")
    with pytest.raises(InputError, match="no guard_codes"):
        load_guard(BASE)


def test_missing_labels_are_masked() -> None:
    logits = torch.tensor([[0.0, 5.0], [2.0, -1.0]])
    total, count = masked_bce(logits, torch.tensor([[1.0, -100.0], [0.0, 1.0]]))
    expected = [torch.log(torch.tensor(2.0)), torch.log1p(torch.exp(torch.tensor(2.0))), torch.log1p(torch.exp(torch.tensor(1.0)))]
    assert int(count) == 3 and float(total) == pytest.approx(float(sum(expected)), rel=1e-6)


def test_thresholds_keep_the_rate() -> None:
    scores = [[i / 100] for i in range(100)]
    labels: list[list[float | None]] = [[0.0]] * 100
    for rate in (0.0, 0.05, 0.5):
        (limit,) = fit_thresholds(scores, labels, rate)
        assert sum(s[0] >= limit for s in scores) == rate * 100
    assert fit_thresholds(scores[:10], labels[:10], 0.05) == [0.5]  # too few to fit
    assert fit_thresholds([[0.3]] * 40, [[0.0]] * 40, 0.05)[0] > 0.3  # equal scores go together
    assert fit_thresholds(scores, [[None]] * 100, 0.1) == [0.5]


def test_rows_of_every_form(tmp_path: Path) -> None:
    rows = read_labelled(
        write(
            tmp_path / "rows.jsonl",
            [
                {"prompt": "a", "codes": ["O3"]},
                {"prompt": "a", "response": "b", "labels": {"O3": True, "O5": None, "O1": 0}},
                {"prompt": "a", "response": "b", "prompt_label": "unsafe", "response_label": "safe", "violated_categories": "Threat"},
                {"prompt": "a", "response": None, "prompt_label": "unsafe", "violated_categories": "Threat, Violence"},
                {"prompt": "a", "prompt_label": "unsafe", "violated_categories": "Suicide and Self Harm"},  # as Aegis 2.0 writes it
                {"prompt": "a", "prompt_label": "unsafe", "violated_categories": "Something else"},
                {"text": "a", "text_type": "user_message", "labels_0": "Violence", "labels_1": "Violence, Threat", "labels_2": "Safe"},
            ],
        ),
        AEGIS,
    )
    marked = [tuple(c for c, label in zip(AEGIS.codes, row.labels, strict=True) if label == 1) for row in rows]
    assert marked == [("O3",), ("O3",), (), ("O1", "O11"), ("O6",), ("O1",)]
    assert rows[1].labels[4] is None and rows[1].labels[0] == 0 and rows[1].labels[1] is None
    assert [row.messages[-1].role for row in rows] == ["user", "assistant", "assistant", "user", "user", "user"]


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"prompt": "a"}, "neither `codes`"),
        ({"prompt": "a", "codes": ["O77"]}, "no code of the taxonomy"),
        ({"prompt": "a", "labels": {"O1": 7}}, "true, false or null"),
        ({"codes": ["O1"]}, "Row 1"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: dict[str, Any], part: str) -> None:
    with pytest.raises(InputError, match=part):
        read_labelled(write(tmp_path / "rows.jsonl", [row]), AEGIS)


def test_held_out_rows_are_chosen_by_their_ids(tmp_path: Path) -> None:
    rows = read_labelled(write(tmp_path / "rows.jsonl", [{"prompt": f"p{i}", "codes": []} for i in range(200)]), AEGIS)
    kept, held = split_held_out(rows)
    assert 20 < len(held) < 60 and len(kept) + len(held) == 200
    named = [dataclasses.replace(row, id=f"row {i}") for i, row in enumerate(rows)]
    assert 20 < len(split_held_out(named)[1]) < 60
    assert split_held_out(list(reversed(rows)))[1] == list(reversed(held))
