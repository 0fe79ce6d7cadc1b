"""Duplicates, exact and near, of documents and of spans."""
