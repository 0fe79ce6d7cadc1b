"""Training: packed batches, one loop, and one objective a file."""
