"""Write a dataset with a model of your own, in this process; and estimate one from an endpoint."""

import gristmill
from gristmill.miniature.base import BASE

recipe = {
    "name": "tides",
    "generators": [{"folder": str(BASE)}],
    "templates": "miniature",
    "pipelines": {"by_task": {"tasks": ["facts"], "prompts": 3, "max_tokens": 24}},
    "answers": {"samples": 2, "max_tokens": 16},
}
print(gristmill.synth(recipe, out="runs/tides")["responses"])
remote = recipe | {"generators": [{"base_url": "http://localhost:8000/v1", "model": "my-model", "price_out": 1.5}]}
print(gristmill.synth(remote, dry_run=True))
