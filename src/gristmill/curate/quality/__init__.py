"""Scores of quality and their buckets."""
