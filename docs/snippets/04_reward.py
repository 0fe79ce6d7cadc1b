"""Train a reward model on HelpSteer2's columns, and rate answers with it."""

import json
from pathlib import Path

import gristmill

marks = {"helpfulness": 4, "correctness": 4, "coherence": 4, "complexity": 1, "verbosity": 1}
rows = [
    {"prompt": "What is 2 + 2?", "response": answer, **marks, "correctness": correct}
    for answer, correct in (("4.", 4), ("5.", 0), ("It is 4.", 4), ("It is 22.", 0))
]
Path("ratings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
gristmill.train("reward", "miniature", "ratings.jsonl", out="runs/reward", lr=1e-3, steps=4, batch_size=4)
reward = gristmill.RewardModel("runs/reward/model")
talks = [[{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": text}] for text in ("4.", "5.")]
print(reward.score(talks), reward.rate(talks)[0].correctness)
