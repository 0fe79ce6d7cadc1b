"""Annotation server: people rate, compare and settle the rows of a run in the browser, and their answers become training rows."""
