"""A dataset from a recipe: prompts, dialogues, answers, judgements, pairs, and their export."""
