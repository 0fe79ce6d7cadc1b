"""Compiled kernels of the engine, for CPUs and GPUs."""
