"""Supervised fine-tuning on your own conversations."""

import json
from pathlib import Path

import gristmill

rows = [{"prompt": f"Say {word}.", "response": f"{word.capitalize()}!"} for word in ("plum", "fig", "pear", "lime")]
Path("demonstrations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
result = gristmill.train("sft", "miniature", "demonstrations.jsonl", out="runs/sft", lr=1e-3, steps=4, batch_size=4)
print(result.steps, result.metrics["loss"])
print(gristmill.LLM("runs/sft/model").chat([{"role": "user", "content": "Say plum."}])[0].outputs[0].text)
