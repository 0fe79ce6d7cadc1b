"""Judges: the reward scorer, exact verifiers, the code sandbox, comparison by a model."""
