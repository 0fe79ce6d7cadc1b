"""Measuring models: scores with their intervals, the reward model's accuracy, collapse monitors."""
