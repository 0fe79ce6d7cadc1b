"""Curation: from raw text to documents worth training on. Every step is a pure function of an Arrow table."""
