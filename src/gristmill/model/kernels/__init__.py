"""Compiled kernels of the model's forward and backward passes on CPUs."""
