"""Model-written programs, run in a jail."""
