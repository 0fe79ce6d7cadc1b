"""Accuracy on prompts with known answers, with 95 % intervals."""

import json
from pathlib import Path

import gristmill

rows = [{"prompt": f"Ana has {n} apples. Ana finds 2 more. How many apples are there now?", "answer": n + 2} for n in range(4)]
Path("test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
scores = gristmill.evaluate("miniature", "test.jsonl", max_tokens=16)
print(scores["greedy"]["overall"])
