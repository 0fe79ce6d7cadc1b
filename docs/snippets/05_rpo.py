"""Preference optimization: RPO on pairs with rewards."""

import json
from pathlib import Path

import gristmill

rows = [
    {"prompt": f"What is {n} + 1?", "chosen": f"{n + 1}.", "rejected": f"{n}.", "chosen_reward": 4.0, "rejected_reward": 1.0}
    for n in range(8)
]
Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
result = gristmill.train("rpo", "miniature", "pairs.jsonl", out="runs/rpo", lr=1e-4, epochs=1, batch_size=4, beta=0.1, sft_weight=1.0)
print(result.metrics["accuracy"])
