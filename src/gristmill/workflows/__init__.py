"""Whole runs: alignment, datasets, training, pretraining."""
