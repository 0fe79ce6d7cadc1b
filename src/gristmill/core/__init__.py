"""Foundations: errors, files, recipes, progress, threads."""
