"""Curate a folder of text."""

from pathlib import Path

import gristmill

Path("docs").mkdir(exist_ok=True)
for n in range(4):
    Path(f"docs/{n}.txt").write_text(f"The harbour of town {n % 3} sells fish on Mondays, and bread on every other day of the week.")
results = gristmill.curate({"inputs": ["docs"], "steps": [{"step": "clean"}, {"step": "exact"}], "workers": 1}, out="runs/docs")
print(results["documents"], [step["reasons"] for step in results["steps"]])
