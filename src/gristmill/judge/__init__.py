"""Judges: reward models, in process and behind endpoints, pairwise LLM judges, filter expressions."""
