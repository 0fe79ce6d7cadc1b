"""Evaluation: accuracies with their intervals, the reward model's accuracy, diversity metrics."""
