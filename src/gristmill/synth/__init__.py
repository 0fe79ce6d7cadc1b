"""Synthetic data generation: templates, the writer, and the prompt pipelines."""
