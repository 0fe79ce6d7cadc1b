"""Readers of user files: rows from JSONL and Parquet."""

import json
from pathlib import Path
from typing import Any

from gristmill.data.chat import Message
from gristmill.data.readers import read_pairs

PAIRS = [{"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": "No."} for i in range(8)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_our_own_pairs_are_read_with_their_rewards(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}, {"role": "user", "content": "C?"}]
    row = {"id": "x", "task": "t", "messages": talk, "chosen": "D.", "rejected": "E.", "chosen_reward": 2.5, "rejected_reward": -1}
    own, plain = read_pairs(write(tmp_path / "pairs.jsonl", [row, PAIRS[0] | {"chosen_reward": None, "task": None}]))
    assert (own.id, own.task, own.chosen_reward, own.rejected_reward) == ("x", "t", 2.5, -1.0) and len(own.messages) == 3
    assert (plain.task, plain.chosen_reward, plain.rejected_reward) == ("", 1.0, 0.0) and plain.messages == (Message("user", "Say 0."),)
