"""The alignment loop, as small as it goes."""

import gristmill

training = {"lr": 1e-4, "steps": 1, "batch_size": 4}
recipe = {
    "world": "miniature",
    "rounds": 1,
    "rpo_iterations": 0,
    "data": {"num_demonstrations": 12, "num_rated_prompts": 8, "num_held_out_ratings": 4, "num_prompts": 4, "num_evaluation": 1},
    "topics": {"macro": 0, "subtopics": 0, "own": ["Batru"]},
    "pipelines": {"open_qa": {"questions": 2, "revisions": 0}},
    "answers": {"samples": 2, "max_tokens": 16},
    **{stage: training for stage in ("demonstration_sft", "reward", "code_sft", "general_sft")},
    "dpo": training | {"num_prompts": 4},
    "judging": {"keep": "correctness >= -9", "keep_chosen": "correctness >= -9", "min_gap": 0},
}
results = gristmill.align(recipe, out="runs/tiny")
print(results["synthetic_share"], [stage["name"] for stage in results["stages"]])
