"""The loop: stages, the run folder, and what flows between them."""
