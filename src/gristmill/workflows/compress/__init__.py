"""Runs of compression: library, scores, costs, search, distillation."""
